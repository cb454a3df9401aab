//! Definitions of views on disk: `<name>.sql` in one directory, each the statement that made the view.
//!
//! A definition is durable when [`save`] returns: it is written to a temporary file, which is synced and renamed, and then
//! the directory is synced. A temporary file that a crash left behind is not read.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use datafusion::sql::sqlparser::dialect::GenericDialect;
use wire::StreamName;

use super::definition::{Command, Definition};

const EXTENSION: &str = "sql";

fn wrong(path: &Path, error: impl std::fmt::Display) -> String {
    format!("{}: {error}", path.display())
}

fn path(directory: &Path, name: &StreamName) -> PathBuf {
    directory.join(format!("{name}.{EXTENSION}"))
}

/// All definitions of a directory, in order of their files' names; none when it is not there.
pub(super) fn load(directory: &Path) -> Result<Vec<Definition>, String> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(wrong(directory, error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| wrong(directory, error))?.path();
        if path.extension().is_some_and(|extension| extension == EXTENSION) {
            files.push(path);
        }
    }
    files.sort();
    let read = |file: PathBuf| {
        let text = fs::read_to_string(&file).map_err(|error| wrong(&file, error))?;
        match Command::parse(&GenericDialect {}, &text).map_err(|error| wrong(&file, error))? {
            Some(Command::Create { definition, .. }) => Ok(*definition),
            _ => Err(wrong(&file, "it is no CREATE MATERIALIZED VIEW")),
        }
    };
    files.into_iter().map(read).collect()
}

/// Keeps a definition.
pub(super) fn save(directory: &Path, definition: &Definition) -> Result<(), String> {
    let (file, temporary) = (path(directory, &definition.name), directory.join(format!("{}.tmp", definition.name)));
    let write = || {
        fs::create_dir_all(directory)?;
        let mut open = File::create(&temporary)?;
        open.write_all(definition.text.as_bytes())?;
        open.sync_all()?;
        fs::rename(&temporary, &file)?;
        sync(directory)?;
        // The directory itself may be new.
        directory.parent().map_or(Ok(()), sync)
    };
    write().map_err(|error: std::io::Error| wrong(&file, error))
}

/// Forgets a definition.
pub(super) fn remove(directory: &Path, name: &StreamName) -> Result<(), String> {
    let file = path(directory, name);
    match fs::remove_file(&file).and_then(|()| sync(directory)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(wrong(&file, error)),
        _ => Ok(()),
    }
}

fn sync(directory: &Path) -> std::io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_definition_is_read_back_and_forgotten() {
        let directory = std::env::temp_dir().join(format!("weir-views-{:032x}", rand::random::<u128>())).join("views");
        assert_eq!(load(&directory).unwrap(), []);
        let text = "CREATE MATERIALIZED VIEW b WITH (lateness = '5m') AS SELECT ts FROM traffic";
        let Some(Command::Create { definition, .. }) = Command::parse(&GenericDialect {}, text).unwrap() else {
            panic!()
        };
        save(&directory, &definition).unwrap();
        save(&directory, &definition).unwrap();
        fs::write(directory.join("a.tmp"), "half of").unwrap();
        assert_eq!(load(&directory).unwrap(), [*definition.clone()]);
        fs::write(directory.join("c.sql"), "SELECT 1").unwrap();
        assert!(load(&directory).unwrap_err().contains("c.sql: it is no CREATE"));
        fs::remove_file(directory.join("c.sql")).unwrap();
        remove(&directory, &definition.name).unwrap();
        remove(&directory, &definition.name).unwrap();
        assert_eq!(load(&directory).unwrap(), []);
        fs::remove_dir_all(directory.parent().unwrap()).unwrap();
    }
}
