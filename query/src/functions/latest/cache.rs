//! The newest row of each device of a stream's cold table, kept from statement to statement.
//!
//! What is held for a stream belongs to one version of its Delta table. For a newer version only the files are read that
//! its commits added. Commits that say `dataChange = false` (compaction) change no rows. Those that take rows away
//! (retention, retype) matter on the dates on which somebody's newest row lies: then, and when the log does not go back far
//! enough, all is read anew, as after a restart. Retention takes what is oldest, so that is seldom.
//!
//! A statement that is pinned to an older version V may take what is held for W > V, as long as nothing newest was taken away
//! between, and it looks at hot rows, too: hot at V holds all rows above V, those up to W among them, and a row that is looked at
//! twice is still one row. Otherwise the statement gets its own, which is not kept.
//!
//! Memory: what all streams hold is at most `bytes_max`; the one that was asked for longest ago goes first. While a
//! stream is read it may take `bytes_max`, too. Statements that ask for one stream at the same time wait for one of them to
//! read it; a statement that is cancelled meanwhile loses nothing but its own work.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow::datatypes::SchemaRef;
use arrow_array::{RecordBatch, new_null_array};
use chrono::NaiveDate;
use datafusion::common::{DataFusionError, Result};
use datafusion::object_store::ObjectStoreExt;
use datafusion::object_store::path::Path;
use deltalake_core::kernel::{Action, Remove};
use deltalake_core::logstore::get_actions;
use parking_lot::Mutex;
use wire::StreamName;
use wire::schema::DATE;

use super::newest::{Newest, Rows};
use crate::catalog::ColdTable;

/// Commits that are followed one by one; a table that is further behind is read anew.
const COMMITS_MAX: u64 = 10_000;

/// What is held for a stream.
#[derive(Debug)]
pub(crate) struct Held {
    version: u64,
    /// From here to `version` nothing was taken away that is newest.
    since: u64,
    pub(super) rows: Rows,
}

type Slot = Arc<tokio::sync::Mutex<Option<Arc<Held>>>>;

/// Of one stream: what is held, how much it is, and when it was asked for.
#[derive(Debug, Default)]
struct Entry {
    slot: Slot,
    bytes: usize,
    asked: u64,
}

/// The cache of an engine.
#[derive(Debug)]
pub(crate) struct LatestCache {
    bytes_max: usize,
    entries: Mutex<HashMap<StreamName, Entry>>,
    clock: AtomicU64,
    /// Tables that were read anew, and files that were read: for tests.
    pub(super) rebuilt: AtomicU64,
    pub(super) files: AtomicU64,
}

impl LatestCache {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            entries: Mutex::default(),
            clock: AtomicU64::new(0),
            rebuilt: AtomicU64::new(0),
            files: AtomicU64::new(0),
        }
    }

    /// The newest rows for a statement that is pinned to `cold`, and looks at the hot rows above it.
    pub(crate) async fn at(&self, stream: &StreamName, cold: &ColdTable) -> Result<Arc<Held>> {
        let slot = {
            let mut entries = self.entries.lock();
            let entry = entries.entry(stream.clone()).or_default();
            entry.asked = self.clock.fetch_add(1, Ordering::Relaxed);
            Arc::clone(&entry.slot)
        };
        let mut held = slot.lock().await;
        let next = match held.as_ref() {
            Some(known) if known.version >= cold.version && known.since <= cold.version => {
                return Ok(Arc::clone(known));
            }
            // Rows were taken away after the version that this statement sees.
            Some(known) if known.version > cold.version => return Ok(Arc::new(self.read(cold).await?)),
            Some(known) => match self.follow(known, cold).await? {
                Some(next) => next,
                None => self.read(cold).await?,
            },
            None => self.read(cold).await?,
        };
        let next = Arc::new(next);
        *held = Some(Arc::clone(&next));
        self.make_room(stream, next.rows.bytes());
        Ok(next)
    }

    /// Counts what a stream holds now, and lets others go that were not asked for as lately.
    fn make_room(&self, stream: &StreamName, bytes: usize) {
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.get_mut(stream) {
            entry.bytes = bytes;
        }
        while entries.values().map(|entry| entry.bytes).sum::<usize>() > self.bytes_max {
            let oldest = entries.iter().filter(|(other, entry)| *other != stream && entry.bytes > 0);
            let Some(oldest) = oldest.min_by_key(|(_, entry)| entry.asked).map(|(name, _)| name.clone()) else {
                return;
            };
            // Who waits for the slot that goes reads anew.
            entries.remove(&oldest);
        }
    }

    /// Reads all files of a table, the newest days first: most rows of older ones then lose at the first look.
    async fn read(&self, cold: &ColdTable) -> Result<Held> {
        self.rebuilt.fetch_add(1, Ordering::Relaxed);
        let mut newest = Newest::new(Arc::clone(&cold.schema), self.bytes_max);
        let store = cold.log_store.object_store(None);
        for file in cold.files.dates().rev().flat_map(|(_, files)| files) {
            self.files.fetch_add(1, Ordering::Relaxed);
            newest.add_file(&store, &place(&file.path)?, file.bytes).await?;
        }
        Ok(Held { version: cold.version, since: cold.version, rows: newest.finish()? })
    }

    /// Reads what was added after what is known; None when that is not all that happened, or cannot be told.
    async fn follow(&self, known: &Held, cold: &ColdTable) -> Result<Option<Held>> {
        if cold.version - known.version > COMMITS_MAX {
            return Ok(None);
        }
        let mut added: Vec<(Path, u64)> = Vec::new();
        let (mut seen, mut gone) = (HashSet::new(), HashSet::new());
        for version in known.version + 1..=cold.version {
            let entry = cold.log_store.read_commit_entry(version).await;
            let actions = match entry {
                Ok(Some(bytes)) => get_actions(version, &bytes),
                // Cleaned away.
                Ok(None) => return Ok(None),
                Err(error) => Err(error),
            };
            for action in actions.map_err(|error| DataFusionError::External(Box::new(error)))? {
                match action {
                    Action::Add(add) if add.deletion_vector.is_some() => return Ok(None),
                    Action::Add(add) if add.data_change && seen.insert(add.path.clone()) => {
                        added.push((place(&add.path)?, u64::try_from(add.size).unwrap_or(0)));
                    }
                    Action::Remove(remove) if remove.data_change => match date(&remove) {
                        Some(date) => drop(gone.insert(date)),
                        None => return Ok(None),
                    },
                    _ => {}
                }
            }
        }
        let Some(rows) = with_columns(&known.rows.rows, &cold.schema) else {
            return Ok(None);
        };
        let mut newest = Newest::from(&known.rows, rows, self.bytes_max);
        let store = cold.log_store.object_store(None);
        for (path, bytes) in added {
            self.files.fetch_add(1, Ordering::Relaxed);
            match newest.add_file(&store, &path, bytes).await {
                Ok(()) => {}
                // Compacted, and the small file is gone already: its rows are in another.
                Err(_) if store.head(&path).await.is_err() => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        let rows = newest.finish()?;
        if rows.lie_on(&gone) {
            return Ok(None);
        }
        Ok(Some(Held { version: cold.version, since: known.since, rows }))
    }
}

/// The date of a file that is taken away, in days since 1970.
fn date(removed: &Remove) -> Option<i64> {
    let date = removed.partition_values.as_ref()?.get(DATE)?.as_ref()?;
    Some(i64::from(date.parse::<NaiveDate>().ok()?.to_epoch_days()))
}

/// Where a file is within its table.
fn place(path: &str) -> Result<Path> {
    Path::from_url_path(path).map_err(|error| DataFusionError::External(Box::new(error)))
}

/// Rows with the columns that a table has now; None when one has another type than it had.
fn with_columns(rows: &RecordBatch, schema: &SchemaRef) -> Option<RecordBatch> {
    if rows.schema() == *schema {
        return Some(rows.clone());
    }
    let columns = schema.fields().iter().map(|field| match rows.column_by_name(field.name()) {
        Some(column) if column.data_type() == field.data_type() => Some(Arc::clone(column)),
        Some(_) => None,
        None => Some(new_null_array(field.data_type(), rows.num_rows())),
    });
    RecordBatch::try_new(Arc::clone(schema), columns.collect::<Option<Vec<_>>>()?).ok()
}
