//! The log of a table, held against itself. Nothing is written, and the table need not be readable for it.
//!
//! Every entry and every checkpoint is read. An entry has only lines of kinds that Delta knows, removes only files that are
//! there, and has both transactions of a spool or none; a checkpoint says what the entries up to it say. Entries carry no
//! checksum: a digit that has become another one shows only where something else contradicts it.

use std::collections::BTreeMap;

use futures::TryFutureExt;
use object_store::path::Path;
use object_store::{GetResult, ObjectStoreExt};
use serde_json::Value;
use wire::DataFile;
use wire::ids::{SpoolId, StreamName};

use super::clean::{Kind, list};
use super::entry::Entry;
use super::{LogStoreRef, Marks, TableError, log, table_fields, txn};
use crate::errors::chain;

/// Every kind of line that an entry may have, and what each of a kind has to say.
const KINDS: [(&str, &[&str]); 10] = [
    ("add", &["path", "partitionValues", "size", "modificationTime", "dataChange"]),
    ("remove", &["path", "dataChange"]),
    ("txn", &["appId", "version"]),
    ("metaData", &["id", "format", "schemaString", "partitionColumns"]),
    ("protocol", &["minReaderVersion", "minWriterVersion"]),
    ("commitInfo", &[]),
    ("cdc", &[]),
    ("domainMetadata", &[]),
    ("checkpointMetadata", &[]),
    ("sidecar", &[]),
];

/// What is wrong with an object of a log, relative to the table.
#[derive(Debug)]
pub(crate) struct LogDamage {
    pub(crate) object: Path,
    pub(crate) detail: String,
}

/// What the log says of the table at a version.
#[derive(Debug, Default, PartialEq, Eq)]
struct State {
    files: BTreeMap<String, DataFile>,
    txn: Marks,
}

impl State {
    fn take(&mut self, entry: Entry) {
        for path in &entry.removed {
            self.files.remove(path);
        }
        self.files.extend(entry.added.into_iter().map(|file| (file.path.clone(), file)));
        for (app_id, version) in &entry.transactions {
            txn::apply(&mut self.txn, app_id, *version);
        }
    }

    /// What an entry that follows it cannot say.
    fn contradicts(&self, entry: &Entry) -> Option<String> {
        let gone = entry.removed.iter().find(|path| !self.files.contains_key(*path));
        gone.map(|path| format!("it removes the file {path}, which is not there"))
    }

    /// How a checkpoint differs from it.
    fn differs(&self, checkpoint: &Self) -> Option<String> {
        let files = checkpoint.files.len().max(self.files.len());
        let alike = self.files.iter().filter(|(path, file)| checkpoint.files.get(*path) == Some(file)).count();
        if alike < files {
            return Some(format!("of {} files it says something else than the entries before it", files - alike));
        }
        (self.txn != checkpoint.txn).then(|| "of what is committed it says something else than the entries".to_owned())
    }
}

/// Reads the log; the number of its entries, and what is damaged. What is behind something damaged is not held against
/// anything before the next checkpoint.
///
/// # Errors
/// When the store does not answer.
pub(crate) async fn audit(stream: &StreamName, log_store: &LogStoreRef) -> Result<(usize, Vec<LogDamage>), TableError> {
    let mut objects = list(stream, log_store).await?;
    // A checkpoint of a version comes after its entry.
    objects.sort_by_key(|(version, kind, _)| (*version, *kind == Kind::Checkpoint));
    let (mut entries, mut damage, mut state, mut before) = (0, Vec::new(), None::<State>, None::<u64>);
    for (version, kind, meta) in objects {
        let found = match kind {
            Kind::Entry => {
                entries += 1;
                let is_missing = before.is_some_and(|before| before + 1 != version);
                before = Some(version);
                if is_missing {
                    state = None;
                    let detail = "the entry before it is missing".to_owned();
                    damage.push(LogDamage { object: meta.location.clone(), detail });
                } else if version == 0 {
                    state = Some(State::default());
                }
                match read_entry(stream, log_store, version).await {
                    Ok(None) => {
                        state = None;
                        Ok(())
                    }
                    Ok(Some((entry, odd))) => {
                        let odd = odd.or_else(|| state.as_ref().and_then(|state| state.contradicts(&entry)));
                        damage.extend(odd.map(|detail| LogDamage { object: meta.location.clone(), detail }));
                        if let Some(state) = &mut state {
                            state.take(entry);
                        }
                        Ok(())
                    }
                    Err(error) => Err(error),
                }
            }
            Kind::Checkpoint => match read_checkpoint(stream, log_store, version, &meta.location).await {
                Ok(None) => Ok(()),
                Ok(Some(checkpoint)) => {
                    let differs = state.as_ref().and_then(|state| state.differs(&checkpoint));
                    damage.extend(differs.map(|detail| LogDamage { object: meta.location.clone(), detail }));
                    state.get_or_insert(checkpoint);
                    Ok(())
                }
                Err(error) => Err(error),
            },
            Kind::Other => Ok(()),
        };
        match found {
            Ok(()) => {}
            Err(error @ (TableError::Entry { .. } | TableError::Log { .. } | TableError::Foreign { .. })) => {
                if kind == Kind::Entry {
                    state = None;
                }
                damage.push(LogDamage { object: meta.location, detail: chain(&error) });
            }
            Err(error) => return Err(error),
        }
    }
    Ok((entries, damage))
}

/// An entry, and what is odd about it by itself; none when it was cleaned away since.
async fn read_entry(
    stream: &StreamName,
    log_store: &LogStoreRef,
    version: u64,
) -> Result<Option<(Entry, Option<String>)>, TableError> {
    let Some(bytes) = log::read_entry(stream, log_store, version).await? else { return Ok(None) };
    let entry = log::parse(stream, version, &bytes)?;
    let odd = odd_line(&bytes).or_else(|| lone_transaction(&entry));
    Ok(Some((entry, odd)))
}

fn odd_line(bytes: &[u8]) -> Option<String> {
    let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty());
    let lines = lines.filter_map(|line| serde_json::from_slice::<serde_json::Map<String, Value>>(line).ok());
    lines.flatten().find_map(|(kind, said)| {
        let Some((_, needed)) = KINDS.iter().find(|(known, _)| *known == kind) else {
            return Some(format!("it has a line of the kind `{kind}`, which Delta does not know"));
        };
        let missing = needed.iter().find(|field| said[**field].is_null())?;
        Some(format!("a line of the kind `{kind}` does not say `{missing}`"))
    })
}

fn lone_transaction(entry: &Entry) -> Option<String> {
    let is_there = |wanted: &str| entry.transactions.iter().any(|(app_id, _)| app_id == wanted);
    let lone = entry.transactions.iter().map(|(app_id, _)| app_id).find(|app_id| match app_id.strip_suffix(txn::CRC) {
        Some(spool) => !is_there(spool),
        None => app_id.parse::<SpoolId>().is_ok() && !is_there(&format!("{app_id}{}", txn::CRC)),
    });
    lone.map(|app_id| format!("of number and checksum of a batch it has only one: {app_id}"))
}

/// The state as a reader finds it who begins with this checkpoint; none when it was cleaned away since.
async fn read_checkpoint(
    stream: &StreamName,
    log_store: &LogStoreRef,
    version: u64,
    object: &Path,
) -> Result<Option<State>, TableError> {
    // A store that does not answer is no damage.
    let store = log_store.object_store(None);
    let is_there = async || match store.get(object).and_then(GetResult::bytes).await {
        Ok(_) => Ok(true),
        Err(object_store::Error::NotFound { .. }) => Ok(false),
        Err(error) => Err(TableError::delta(stream, error.into())),
    };
    if !is_there().await? {
        return Ok(None);
    }
    let loaded = match log::load(stream, log_store, Some(version)).await {
        Err(error) => return if is_there().await? { Err(error) } else { Ok(None) },
        Ok(loaded) => loaded,
    };
    table_fields(stream, &loaded.columns)?;
    let files = loaded.files.iter().map(|file| (file.path.clone(), file.as_ref().clone())).collect();
    Ok(Some(State { files, txn: loaded.txn }))
}
