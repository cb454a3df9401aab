//! The log of a table: read whole when the table is opened, then followed entry by entry, and appended to.
//!
//! Opening reads the newest checkpoint and the entries behind it, with the kernel that deltalake-core stands on; files,
//! transactions and columns come out of one pass. After that nothing is listed and nothing is read twice: the entries
//! behind a known version have known names, and each costs what it says. So a commit costs the same after 10,000 of them.
//! An entry is made by a conditional put of the next version, and in no other way.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{Array, RecordBatch, StringArray, StructArray};
use arrow_schema::Schema;
use buoyant_kernel::actions::get_commit_schema;
use buoyant_kernel::engine::arrow_conversion::TryIntoArrow;
use buoyant_kernel::engine::arrow_data::ArrowEngineData;
use buoyant_kernel::table_configuration::TableConfiguration;
use buoyant_kernel::{DeltaResult, Engine, SnapshotRef};
use bytes::Bytes;
use deltalake_core::kernel::Metadata;
use deltalake_core::logstore::{LogStoreRef, commit_uri_from_version};
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutMode, PutOptions};
use url::Url;
use wire::ids::StreamName;
use wire::{DataFile, DataFiles};

use super::entry::{CRC, Entry, crc_of, data_file, shared};
use super::{Marks, TableError, txn};
use crate::failpoint;

/// A table as its log says it is.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) version: u64,
    pub(super) metadata: Metadata,
    pub(super) columns: Schema,
    pub(super) files: DataFiles,
    pub(super) txn: Marks,
}

/// Reads the table at its newest version.
pub(super) async fn load(stream: &StreamName, log_store: &LogStoreRef, at: Option<u64>) -> Result<Loaded, TableError> {
    let engine = log_store.engine(None);
    let url = log_store.root_url().clone();
    let read = move || -> Result<(u64, Metadata, Schema, Replay), LoadError> {
        let snapshot = listed(&url, engine.as_ref(), at)?;
        let configuration = snapshot.table_configuration();
        check(configuration).map_err(LoadError::Foreign)?;
        let columns: Schema = configuration
            .logical_schema()
            .as_ref()
            .try_into_arrow()
            .map_err(|error: arrow_schema::ArrowError| LoadError::Foreign(error.to_string()))?;
        let wanted = get_commit_schema().project(&["add", "remove", "txn"])?;
        let mut replay = Replay::default();
        for batch in snapshot.log_segment().read_actions(engine.as_ref(), wanted)? {
            let batch = batch?;
            let actions = ArrowEngineData::try_from_engine_data(batch.actions)?;
            replay.take(actions.record_batch(), batch.is_log_batch)?;
        }
        Ok((snapshot.version(), configuration.metadata().clone(), columns, replay))
    };
    let read = tokio::task::spawn_blocking(read).await;
    let read = read.map_err(|_| TableError::Thread { stream: stream.clone() })?;
    let (version, metadata, columns, replay) = read.map_err(|error| match error {
        LoadError::Kernel(source) => TableError::Log { stream: stream.clone(), source: Box::new(source) },
        LoadError::Foreign(detail) => TableError::Foreign { stream: stream.clone(), detail },
    })?;
    let mut marks = Marks::new();
    for (app_id, version) in &replay.transactions {
        txn::apply(&mut marks, app_id, *version);
    }
    let mut files = replay.files;
    // As they came, about: a log that was followed has them in this order.
    files.sort_by(|a, b| (a.modified_ms, &a.path).cmp(&(b.modified_ms, &b.path)));
    let files = DataFiles::default().with(shared(files), &[]);
    Ok(Loaded { version, metadata, columns, files, txn: marks })
}

/// The table as a list of its log shows it. A directory that is written to while it is read may show an entry and not the
/// one before it; such a list is asked for again, [`LISTS_MAX`] times in all.
fn listed(url: &Url, engine: &dyn Engine, at: Option<u64>) -> DeltaResult<SnapshotRef> {
    let mut lists = 0;
    loop {
        let builder = buoyant_kernel::Snapshot::builder_for(url.clone());
        let read = match at {
            Some(version) => builder.at_version(version).build(engine),
            None => builder.build(engine),
        };
        lists += 1;
        match read {
            Err(buoyant_kernel::Error::Generic(_)) if lists < LISTS_MAX => {}
            read => return read,
        }
    }
}

const LISTS_MAX: usize = 4;

enum LoadError {
    Kernel(buoyant_kernel::Error),
    Foreign(String),
}

impl From<buoyant_kernel::Error> for LoadError {
    fn from(error: buoyant_kernel::Error) -> Self {
        Self::Kernel(error)
    }
}

/// Refuses what would be read or written wrongly here.
fn check(configuration: &TableConfiguration) -> Result<(), String> {
    let protocol = configuration.protocol();
    let (reader, writer) = (protocol.min_reader_version(), protocol.min_writer_version());
    if reader > 1 || writer > 2 {
        return Err(format!(
            "it asks for reader version {reader} and writer version {writer} of Delta; 1 and 2 are known"
        ));
    }
    Ok(())
}

/// The actions of a log, newest first: the first word on a file or an application counts.
#[derive(Debug, Default)]
struct Replay {
    files: Vec<DataFile>,
    transactions: HashMap<String, i64>,
    seen: HashSet<String>,
}

impl Replay {
    fn take(&mut self, actions: &RecordBatch, newer: bool) -> Result<(), LoadError> {
        let shape = || LoadError::Foreign("its log has columns of other types than asked for".to_owned());
        self.take_transactions(actions).ok_or_else(shape)?;
        let (added, removed) =
            (column(actions, "add").ok_or_else(shape)?, column(actions, "remove").ok_or_else(shape)?);
        let (paths, gone) = (text(added, "path").ok_or_else(shape)?, text(removed, "path").ok_or_else(shape)?);
        let stats = text(added, "stats").ok_or_else(shape)?;
        let values = added.column_by_name("partitionValues").and_then(|map| map.as_map_opt()).ok_or_else(shape)?;
        let integer = |name| added.column_by_name(name).and_then(|column| column.as_primitive_opt::<Int64Type>());
        let (sizes, times) = (integer("size").ok_or_else(shape)?, integer("modificationTime").ok_or_else(shape)?);
        let tags = added.column_by_name("tags").and_then(|map| map.as_map_opt()).ok_or_else(shape)?;
        let vectors = added.column_by_name("deletionVector").ok_or_else(shape)?;
        for row in (0..actions.num_rows()).filter(|row| added.is_valid(*row) && paths.is_valid(*row)) {
            let path = paths.value(row);
            if self.seen.contains(path) {
                continue;
            }
            if newer {
                self.seen.insert(path.to_owned());
            }
            let date = value(&values.value(row), wire::schema::DATE).ok_or_else(shape)?;
            let crc = if tags.is_valid(row) { value(&tags.value(row), CRC).ok_or_else(shape)? } else { None };
            let stats = stats.is_valid(row).then(|| stats.value(row));
            let size = u64::try_from(sizes.value(row)).unwrap_or(0);
            let vector = vectors.is_valid(row);
            let file = data_file(path.to_owned(), date.as_deref(), size, times.value(row), stats, vector)
                .map_err(|error| LoadError::Foreign(error.to_string()))?;
            self.files.push(DataFile { crc: crc.as_deref().and_then(crc_of), ..file });
        }
        if newer {
            for row in (0..actions.num_rows()).filter(|row| removed.is_valid(*row) && gone.is_valid(*row)) {
                self.seen.insert(gone.value(row).to_owned());
            }
        }
        Ok(())
    }

    fn take_transactions(&mut self, actions: &RecordBatch) -> Option<()> {
        let txn = column(actions, "txn")?;
        let ids = text(txn, "appId")?;
        let versions = txn.column_by_name("version")?.as_primitive_opt::<Int64Type>()?;
        for row in (0..txn.len()).filter(|row| txn.is_valid(*row) && ids.is_valid(*row)) {
            self.transactions.entry(ids.value(row).to_owned()).or_insert_with(|| versions.value(row));
        }
        Some(())
    }
}

fn column<'a>(actions: &'a RecordBatch, name: &str) -> Option<&'a StructArray> {
    actions.column_by_name(name)?.as_struct_opt()
}

fn text<'a>(action: &'a StructArray, name: &str) -> Option<&'a StringArray> {
    action.column_by_name(name)?.as_string_opt::<i32>()
}

/// The value of a key in a map, if it is there; None when the map is none of texts.
fn value(map: &StructArray, key: &str) -> Option<Option<String>> {
    let (keys, values) = (map.column(0).as_string_opt::<i32>()?, map.column(1).as_string_opt::<i32>()?);
    let at = (0..keys.len()).find(|row| keys.value(*row) == key);
    Some(at.filter(|row| values.is_valid(*row)).map(|row| values.value(row).to_owned()))
}

/// Files and transactions after the entries behind `version`, and the version they lead to; `None` when the table has to
/// be opened anew: its columns were changed, or its log was cleaned from under us.
pub(super) async fn follow(
    stream: &StreamName,
    log_store: &LogStoreRef,
    version: u64,
    files: &DataFiles,
    txn: &Marks,
) -> Result<Option<(u64, DataFiles, Marks)>, TableError> {
    let (mut at, mut files, mut marks) = (version, files.clone(), txn.clone());
    while let Some(bytes) = read_entry(stream, log_store, at + 1).await? {
        let entry = parse(stream, at + 1, &bytes)?;
        if entry.changes_table {
            return Ok(None);
        }
        let removed: HashSet<&str> = entry.removed.iter().map(String::as_str).collect();
        let gone: Vec<Arc<DataFile>> = if removed.is_empty() {
            Vec::new()
        } else {
            files.iter().filter(|file| removed.contains(file.path.as_str())).cloned().collect()
        };
        files = files.with(shared(entry.added), &gone);
        for (app_id, version) in &entry.transactions {
            txn::apply(&mut marks, app_id, *version);
        }
        at += 1;
    }
    if at == version && !has_base(stream, log_store, version).await? {
        return Ok(None);
    }
    Ok(Some((at, files, marks)))
}

/// The bytes of an entry, if there is one of this version.
pub(super) async fn read_entry(
    stream: &StreamName,
    log_store: &LogStoreRef,
    version: u64,
) -> Result<Option<Bytes>, TableError> {
    log_store.read_commit_entry(version).await.map_err(|source| TableError::delta(stream, source))
}

/// The paths of all files that an entry names, added or removed; none when the entry is gone.
pub(crate) async fn named_files(
    stream: &StreamName,
    log_store: &LogStoreRef,
    version: u64,
) -> Result<Vec<String>, TableError> {
    let Some(bytes) = read_entry(stream, log_store, version).await? else { return Ok(Vec::new()) };
    let entry = parse(stream, version, &bytes)?;
    Ok(entry.added.into_iter().map(|file| file.path).chain(entry.removed).collect())
}

pub(super) fn parse(stream: &StreamName, version: u64, bytes: &[u8]) -> Result<Entry, TableError> {
    Entry::parse(bytes).map_err(|source| TableError::Entry {
        stream: stream.clone(),
        version,
        source: Box::new(source),
    })
}

/// Whether the log still has the entry of a version, or a checkpoint of it: what is cleaned away is older than what is
/// there. Without it the next version's name may be free although the table has gone on.
pub(super) async fn has_base(stream: &StreamName, log_store: &LogStoreRef, version: u64) -> Result<bool, TableError> {
    let store = log_store.object_store(None);
    for path in [commit_uri_from_version(Some(version)), checkpoint_path(version)] {
        match store.head(&path).await {
            Ok(_) => return Ok(true),
            Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(TableError::delta(stream, error.into())),
        }
    }
    Ok(false)
}

fn checkpoint_path(version: u64) -> Path {
    Path::from(format!("_delta_log/{version:020}.checkpoint.parquet"))
}

/// How an entry was not made.
#[derive(Debug)]
pub(super) enum PutError {
    /// There is one of this version; it may be ours, when the transport tried twice.
    Taken,
    /// It may be there or not.
    Unknown(object_store::Error),
}

/// Makes the entry of a version, if there is none.
pub(super) async fn put_entry(log_store: &LogStoreRef, version: u64, bytes: Bytes) -> Result<(), PutError> {
    let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
    failpoint::reach("log.before_put");
    let path = commit_uri_from_version(Some(version));
    let put = log_store.object_store(None).put_opts(&path, bytes.into(), options).await;
    failpoint::reach("log.after_put");
    match put {
        Ok(_) => Ok(()),
        Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
            Err(PutError::Taken)
        }
        Err(error) => Err(PutError::Unknown(error)),
    }
}
