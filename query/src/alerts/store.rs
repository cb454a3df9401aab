//! Where rules are kept: those that came over HTTP as `<data_dir>/rules/<name>.toml`, and those of the configuration.
//!
//! A file is written beside, synced, renamed, and its directory synced: a crash leaves the rule as it was or as it is.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::rule::{RULES_MAX, RuleSettings, check_name, inhibits_itself};

/// A rule with where it is from.
#[derive(Debug, Clone)]
pub(crate) struct Loaded {
    pub(crate) settings: RuleSettings,
    pub(crate) configured: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct RuleStore {
    directory: PathBuf,
    rules: BTreeMap<String, Loaded>,
}

impl RuleStore {
    /// Reads all rules.
    ///
    /// # Errors
    /// When a file cannot be read or is wrong; names it.
    pub(crate) fn open(directory: &Path, configured: Option<&Path>) -> Result<(Self, Vec<Loaded>), String> {
        let mut rules = BTreeMap::new();
        let of_configuration =
            configured.map(files).transpose().map_err(|error| format!("[alerts] directory: {error}"))?;
        for path in of_configuration.unwrap_or_default() {
            let read = RuleSettings::parse_file(&read(&path)?);
            for settings in read.map_err(|error| format!("{}: {error}", path.display()))? {
                let name = settings.name.clone();
                if rules.insert(name.clone(), Loaded { settings, configured: true }).is_some() {
                    return Err(format!("{}: there is another rule `{name}`", path.display()));
                }
            }
        }
        make(directory)?;
        for path in files(directory)? {
            let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().to_owned();
            let settings = RuleSettings::parse(&name, &read(&path)?);
            let settings = settings.map_err(|error| format!("{}: {error}", path.display()))?;
            if rules.insert(name.clone(), Loaded { settings, configured: false }).is_some() {
                return Err(format!("{}: there is a rule `{name}` in the configuration, too", path.display()));
            }
        }
        if rules.len() > RULES_MAX {
            return Err(format!("{} rules are more than {RULES_MAX}", rules.len()));
        }
        if let Some(name) = inhibits_itself(rules.values().map(|loaded| &loaded.settings)) {
            return Err(format!("rule `{name}` inhibits itself through others"));
        }
        let loaded = rules.values().cloned().collect();
        Ok((Self { directory: directory.to_owned(), rules }, loaded))
    }

    /// Whether a rule may come in beside the others.
    pub(crate) fn admits(&self, settings: &RuleSettings) -> Result<(), String> {
        if self.rules.get(&settings.name).is_some_and(|known| known.configured) {
            return Err(format!("rule `{}` is in a file of the configuration: change it there", settings.name));
        }
        if self.rules.len() >= RULES_MAX && !self.rules.contains_key(&settings.name) {
            return Err(format!("there are {RULES_MAX} rules: delete some"));
        }
        let others = self.rules.values().map(|loaded| &loaded.settings).filter(|other| other.name != settings.name);
        match inhibits_itself(others.chain([settings]).collect::<Vec<_>>().into_iter()) {
            Some(name) => Err(format!("rule `{name}` would inhibit itself through others")),
            None => Ok(()),
        }
    }

    pub(crate) fn put(&mut self, settings: RuleSettings, text: &str) -> Result<(), String> {
        let name = settings.name.clone();
        replace(&self.directory, &name, text)?;
        self.rules.insert(name, Loaded { settings, configured: false });
        Ok(())
    }

    pub(crate) fn delete(&mut self, name: &str) -> Result<(), String> {
        match self.rules.get(name) {
            None => return Err(format!("there is no rule `{name:.80}`")),
            Some(known) if known.configured => {
                return Err(format!("rule `{name}` is in a file of the configuration: remove it there"));
            }
            Some(_) => {}
        }
        remove(&self.directory, name)?;
        self.rules.remove(name);
        Ok(())
    }

    pub(crate) fn text(&self, name: &str) -> Option<String> {
        self.rules.get(name).filter(|known| !known.configured)?;
        read(&file(&self.directory, name).ok()?).ok()
    }
}

/// Makes the directory of such files, durably.
pub(crate) fn make(directory: &Path) -> Result<(), String> {
    let made = fs::create_dir_all(directory).and_then(|()| directory.parent().map_or(Ok(()), sync));
    made.map_err(|error| format!("make {}: {error}", directory.display()))
}

/// Writes `<name>.toml`, durably: it is there as it was or as it is.
pub(crate) fn replace(directory: &Path, name: &str, text: &str) -> Result<(), String> {
    let path = file(directory, name)?;
    let kept = |error: std::io::Error| format!("keep {}: {error}", path.display());
    let aside = directory.join(format!(".{name}.new"));
    let mut file = File::create(&aside).map_err(kept)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(kept)?;
    fs::rename(&aside, &path).map_err(kept)?;
    sync(directory).map_err(kept)
}

/// Removes `<name>.toml`, durably.
pub(crate) fn remove(directory: &Path, name: &str) -> Result<(), String> {
    let path = file(directory, name)?;
    let removed = fs::remove_file(&path).and_then(|()| sync(directory));
    removed.map_err(|error| format!("remove {}: {error}", path.display()))
}

fn file(directory: &Path, name: &str) -> Result<PathBuf, String> {
    check_name(name)?;
    Ok(directory.join(format!("{name}.toml")))
}

fn sync(directory: &Path) -> std::io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Reads one of them.
pub(crate) fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("read {}: {error}", path.display()))
}

/// The TOML files of a directory, in order of name.
pub(crate) fn files(directory: &Path) -> Result<Vec<PathBuf>, String> {
    let listed = fs::read_dir(directory).map_err(|error| format!("read {}: {error}", directory.display()))?;
    let mut files: Vec<PathBuf> = listed.filter_map(Result::ok).map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: &str = "sql = \"SELECT device FROM traffic WHERE v > 1\"\n";

    #[test]
    fn rules_are_kept_over_a_restart() {
        let directory = std::env::temp_dir().join(format!("weir-rules-{:032x}", rand::random::<u128>()));
        let (mut store, loaded) = RuleStore::open(&directory, None).unwrap();
        assert!(loaded.is_empty());
        let rule = RuleSettings::parse("a", RULE).unwrap();
        store.put(rule.clone(), RULE).unwrap();
        assert_eq!(store.text("a").as_deref(), Some(RULE));
        let (mut again, loaded) = RuleStore::open(&directory, None).unwrap();
        assert_eq!(loaded[0].settings, rule);
        // Two that silence each other would both be silent.
        let by = |name: &str, other: &str| {
            RuleSettings::parse(name, &format!("{RULE}inhibited_by = [\"{other}\"]")).unwrap()
        };
        again.admits(&by("b", "a")).unwrap();
        again.put(by("b", "a"), &format!("{RULE}inhibited_by = [\"a\"]")).unwrap();
        assert!(again.admits(&by("a", "b")).unwrap_err().contains("inhibit itself"));
        again.delete("a").unwrap();
        assert!(again.delete("a").is_err());
        assert!(again.delete("../a").is_err());
        let bare = RuleStore::open(&directory, Some(&directory)).unwrap_err();
        assert!(bare.contains("b.toml"), "a bare rule is no file of the configuration: {bare}");
        let nowhere = directory.join("nowhere");
        let missing = RuleStore::open(&directory, Some(&nowhere)).unwrap_err();
        assert!(missing.contains("[alerts] directory") && missing.contains("nowhere"), "{missing}");
        fs::remove_dir_all(&directory).unwrap();
    }
}
