//! The Delta table of one stream: opened, created, read anew, extended by fields, and committed to.
//!
//! Rule 3 lives here. A batch is in the table if and only if its number is at most `txn[spool]`, which is the Delta
//! application transaction `appId = spool, version = seq`; the CRC of that batch is a second one,
//! `appId = spool/crc, version = crc`. Rows and transactions stand in one entry of the log, made by compare-and-swap: it is
//! put as the next version of the snapshot that was checked, if there is none. Where there is one, the log is read again
//! and everything is checked again, `txn` first; only the files that are written already are kept. A commit that would
//! leave a gap is refused, so is one that the table already covers. Commits that remove files go the same way, and check
//! that each of them is still part of the table. After any other error the outcome is unknown: [`DeltaTable::reload`], then
//! look at `txn`. Files of a commit that lost stay behind for vacuum, because a conditional put that was answered "taken"
//! may have been our own, tried twice by the transport.
//!
//! A snapshot holds files, transactions and columns; a commit adds to it what it wrote, and a reload what others did, so
//! neither costs more with a longer log (decision 0010). Checkpoints are for those who open the table
//! ([`checkpoint`]); maintenance writes them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arrow_array::RecordBatch;
use arrow_schema::{Schema, SchemaRef};
use buoyant_kernel::engine::arrow_conversion::TryIntoKernel;
use buoyant_kernel::schema::StructType;
use bytes::Bytes;
use deltalake_core::DeltaTableError;
use deltalake_core::kernel::Metadata;
use deltalake_core::kernel::transaction::CommitProperties;
use deltalake_core::logstore::LogStoreRef;
use deltalake_core::operations::create::CreateBuilder;
use deltalake_core::protocol::SaveMode;
use object_store::ObjectStoreExt;
use wire::ack::Mark;
use wire::ids::{Seq, SpoolId, StreamName};
use wire::schema::{DATE, DEVICE, FieldType, StreamField, TS, provenance_fields, table_schema};
use wire::{DataFile, DataFiles};

use self::entry::{Lines, shared};
use self::log::PutError;
use crate::store::{Store, StoreError};

mod audit;
mod clean;
mod columns;
mod entry;
pub(crate) mod file;
mod log;
mod order;
pub mod past;
mod txn;
mod write;

pub(crate) use self::audit::audit;
pub(crate) use self::clean::{clean, entries_since};
pub use self::columns::Note;
pub use self::entry::EntryError;
pub(crate) use self::entry::{Purpose, date_text};
pub use self::file::{FileError, last_compaction};
pub(crate) use self::log::named_files;

/// How often a commit is tried on a newer version within one call.
const REBASES_MAX: usize = 20;
/// So long after a table was last seen at its newest version it is read again before a commit: far less than a log is kept.
const FRESH: Duration = Duration::from_secs(600);

/// Per spool, the last batch that is in a table.
pub type Marks = HashMap<SpoolId, Mark>;

/// Why a table cannot be opened, created or read.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    #[error("read or make the table of stream {stream}")]
    Delta { stream: StreamName, source: Box<DeltaTableError> },
    #[error("read the log of stream {stream}")]
    Log { stream: StreamName, source: Box<buoyant_kernel::Error> },
    #[error("entry {version} in the log of stream {stream} is not understood")]
    Entry { stream: StreamName, version: u64, source: Box<EntryError> },
    #[error("the table of stream {stream} is not one of ours: {detail}")]
    Foreign { stream: StreamName, detail: String },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the thread that read the table of stream {stream} died")]
    Thread { stream: StreamName },
    #[error("the table of stream {stream} cannot be changed now: {detail}")]
    Busy { stream: StreamName, detail: String },
    #[error("the table of stream {stream} as it was: {detail}")]
    Past { stream: StreamName, detail: String },
    #[error("the store did not answer in time, or the task that asked it died")]
    Unanswered,
}

impl TableError {
    pub(crate) fn delta(stream: &StreamName, source: DeltaTableError) -> Self {
        Self::Delta { stream: stream.clone(), source: Box::new(source) }
    }
}

/// Why a commit was not made, or may not have been.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Nothing was written to the log: reload, drop what `txn` covers, start again.
    #[error("somebody else committed to {stream} after version {version}")]
    Moved { stream: StreamName, version: u64 },
    /// Nothing was written.
    #[error("batch {got} of spool {spool} does not follow the committed {committed}")]
    Gap { spool: SpoolId, committed: Seq, got: Seq },
    /// Nothing was written: the snapshot already holds batches of this commit. Drop them, start again.
    #[error("spool {spool} is committed up to {committed}")]
    Covered { spool: SpoolId, committed: Seq },
    /// Nothing was written to the log: the rows could not be made into files.
    #[error("write the rows of a commit to {stream}")]
    Rows { stream: StreamName, source: Box<RowsError> },
    /// Nothing was written to the log: a file that was to be replaced or removed is not part of the table any more.
    #[error("others have replaced or removed files of {stream}")]
    Gone { stream: StreamName },
    /// The commit may be there or not: reload and look at `txn`. If [`Store::sync_failure`] says something, stop.
    #[error("commit to {stream}: the outcome is not known")]
    Unknown { stream: StreamName, source: Box<object_store::Error> },
    /// The commit is there or not: reload. The table could not be read.
    #[error(transparent)]
    Store(#[from] TableError),
}

/// Why rows are not made into files.
#[derive(Debug, thiserror::Error)]
pub enum RowsError {
    #[error("{0}")]
    Schema(String),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("bring rows into their order")]
    Order(#[from] arrow_schema::ArrowError),
    #[error("describe the columns")]
    Columns(#[from] DeltaTableError),
    #[error("the thread that wrote them died: {0}")]
    Thread(String),
}

/// One immutable state of a table. Clones share everything.
#[derive(Debug, Clone)]
pub struct TableSnapshot {
    pub version: u64,
    pub log_store: LogStoreRef,
    /// The data files.
    pub files: DataFiles,
    /// The table's columns in order, `_date` last.
    pub schema: SchemaRef,
    /// The user's fields, in order.
    pub fields: Arc<[StreamField]>,
    /// Per spool, the last batch that is in the table.
    pub txn: Arc<Marks>,
    metadata: Arc<Metadata>,
}

/// The table of a stream, as a writer in this process holds it.
#[derive(Debug, Clone)]
pub struct DeltaTable {
    store: Store,
    stream: StreamName,
    snapshot: TableSnapshot,
    /// When the snapshot was known to be the newest.
    seen: SystemTime,
}

/// What a commit changes.
#[derive(Debug)]
struct Change<'a> {
    purpose: Purpose,
    marks: &'a [(SpoolId, Seq, Mark)],
    added: Vec<Arc<DataFile>>,
    removed: &'a [Arc<DataFile>],
}

impl DeltaTable {
    /// The table of a stream at its latest version; `None` if there is none.
    ///
    /// # Errors
    /// When the store does not answer, or the table is not one that Weir made.
    pub async fn open(store: &Store, stream: &StreamName) -> Result<Option<Self>, TableError> {
        let log_store = store.log_store(stream);
        let seen = SystemTime::now();
        let snapshot = match TableSnapshot::load(stream, &log_store, None).await {
            Ok(snapshot) => snapshot,
            // Only now: a table that can be read is there.
            Err(error) => {
                let there = log_store.is_delta_table_location().await;
                let there = there.map_err(|source| TableError::delta(stream, source))?;
                return if there { Err(error) } else { Ok(None) };
            }
        };
        store.settle(stream).await?;
        Ok(Some(Self { store: store.clone(), stream: stream.clone(), snapshot, seen }))
    }

    /// Makes the table of a stream. If another node was faster, its table is opened, which may have other fields.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn create(store: &Store, stream: &StreamName, fields: &[StreamField]) -> Result<Self, TableError> {
        let delta = |source| TableError::delta(stream, source);
        let columns = columns::new_columns(fields).map_err(delta)?;
        let created = CreateBuilder::new()
            .with_log_store(store.log_store(stream))
            .with_table_name(stream.as_str())
            .with_columns(columns.fields().cloned())
            .with_partition_columns([DATE])
            .with_save_mode(SaveMode::ErrorIfExists)
            .with_commit_properties(plain_commit())
            .await;
        match (Self::open(store, stream).await?, created) {
            (Some(table), _) => Ok(table),
            (None, Err(source)) => Err(delta(source)),
            (None, Ok(_)) => Err(delta(DeltaTableError::NotATable(stream.to_string()))),
        }
    }

    /// A writer at a state that somebody else has read.
    pub(crate) fn at(store: &Store, stream: &StreamName, snapshot: TableSnapshot) -> Self {
        Self { store: store.clone(), stream: stream.clone(), snapshot, seen: SystemTime::UNIX_EPOCH }
    }

    /// The stream.
    pub fn stream(&self) -> &StreamName {
        &self.stream
    }

    /// The state that this handle saw last.
    pub fn snapshot(&self) -> TableSnapshot {
        self.snapshot.clone()
    }

    /// Reads what was committed since, by anyone, and makes sure that it is durable.
    ///
    /// # Errors
    /// When the store does not answer; the snapshot stays as it was.
    pub async fn reload(&mut self) -> Result<TableSnapshot, TableError> {
        let (seen, old) = (SystemTime::now(), &self.snapshot);
        let followed = log::follow(&self.stream, &old.log_store, old.version, &old.files, &old.txn).await?;
        let next = match followed {
            Some((version, ..)) if version == old.version => old.clone(),
            Some((version, files, txn)) => old.after(version, files, Arc::new(txn)),
            None => TableSnapshot::load(&self.stream, &old.log_store, None).await?,
        };
        // Only now: what was seen before is durable after this.
        self.store.settle(&self.stream).await?;
        (self.snapshot, self.seen) = (next, seen);
        Ok(self.snapshot())
    }

    /// Commits the batches `marks` = (spool, first, last) with their rows, in the table's columns but `_date`.
    /// Without rows (batches that are all void) it commits the transactions alone.
    ///
    /// # Errors
    /// See [`CommitError`]; only after `Unknown` and `Store` may the commit be there.
    pub async fn commit(
        &mut self,
        rows: &[RecordBatch],
        marks: &[(SpoolId, Seq, Mark)],
    ) -> Result<TableSnapshot, CommitError> {
        // Before anything is written for nothing.
        txn::next_marks(&self.snapshot.txn, marks)?;
        let added = write::write_rows(&self.snapshot, rows).await.map_err(|source| self.rows(source))?;
        self.put(Change { purpose: Purpose::Append, marks, added: shared(added), removed: &[] }).await
    }

    /// Puts `added` into the place of `removed`; transactions stay as they are. With [`Purpose::Compact`] the rows have to
    /// be the same, which nobody checks.
    ///
    /// # Errors
    /// See [`CommitError`]; only after `Unknown` and `Store` may the commit be there.
    pub(crate) async fn replace(
        &mut self,
        purpose: Purpose,
        removed: &[Arc<DataFile>],
        added: Vec<DataFile>,
    ) -> Result<TableSnapshot, CommitError> {
        self.put(Change { purpose, marks: &[], added: shared(added), removed }).await
    }

    async fn put(&mut self, change: Change<'_>) -> Result<TableSnapshot, CommitError> {
        let fields = Arc::clone(&self.snapshot.fields);
        for _ in 0..REBASES_MAX {
            let txn = txn::next_marks(&self.snapshot.txn, change.marks)?;
            if !self.snapshot.files.hold(change.removed) {
                return Err(CommitError::Gone { stream: self.stream.clone() });
            }
            let bytes = change.lines(self.snapshot.version);
            match self.put_next(bytes).await? {
                Ok(()) => {
                    let files = self.snapshot.files.with(change.added, change.removed);
                    self.snapshot = self.snapshot.after(self.snapshot.version + 1, files, Arc::new(txn));
                    return Ok(self.snapshot());
                }
                Err(PutError::Unknown(source)) => return Err(self.unknown(source)),
                Err(PutError::Taken) => {}
            }
            self.reload().await?;
            if !change.added.is_empty() && self.snapshot.files.hold(&change.added) {
                // The transport had tried twice.
                return Ok(self.snapshot());
            }
            // What is rescued depends on the columns: rows for others have to be made again.
            if change.purpose == Purpose::Append && self.snapshot.fields != fields {
                break;
            }
        }
        Err(self.moved())
    }

    /// Puts the entry behind the snapshot, if nobody else has. A snapshot that may be older than the log is long is read
    /// anew before and looked at again afterwards: a name that was cleaned away is no free one.
    async fn put_next(&mut self, bytes: Bytes) -> Result<Result<(), PutError>, CommitError> {
        if self.aged() {
            let before = self.snapshot.version;
            if self.reload().await?.version != before {
                return Ok(Err(PutError::Taken));
            }
        }
        let (log_store, version) = (self.snapshot.log_store.clone(), self.snapshot.version);
        let put = log::put_entry(&log_store, version + 1, bytes).await;
        if put.is_ok() {
            if self.aged() && !log::has_base(&self.stream, &log_store, version).await? {
                self.snapshot = TableSnapshot::load(&self.stream, &log_store, None).await?;
                return Ok(Err(PutError::Taken));
            }
            self.seen = SystemTime::now();
        }
        Ok(put)
    }

    fn aged(&self) -> bool {
        self.seen.elapsed().map_or(true, |age| age > FRESH)
    }

    fn moved(&self) -> CommitError {
        CommitError::Moved { stream: self.stream.clone(), version: self.snapshot.version }
    }

    fn unknown(&self, source: object_store::Error) -> CommitError {
        CommitError::Unknown { stream: self.stream.clone(), source: Box::new(source) }
    }

    fn rows(&self, source: RowsError) -> CommitError {
        CommitError::Rows { stream: self.stream.clone(), source: Box::new(source) }
    }
}

impl Change<'_> {
    fn lines(&self, base: u64) -> Bytes {
        let now_ms = chrono::Utc::now().timestamp_millis();
        // Compaction changes no row: whoever follows the table need not look.
        let data_change = self.purpose != Purpose::Compact;
        let mut lines = Lines::new(self.purpose, now_ms, base);
        for (app_id, version) in txn::transactions(self.marks) {
            lines.transaction(&app_id, version, now_ms);
        }
        self.removed.iter().for_each(|file| lines.remove(file, data_change, now_ms));
        self.added.iter().for_each(|file| lines.add(file, data_change));
        lines.into_bytes()
    }
}

impl TableSnapshot {
    /// What the table's owner says of it.
    pub fn description(&self) -> Option<&str> {
        self.metadata.description()
    }

    /// The newest version, or this one.
    async fn load(stream: &StreamName, log_store: &LogStoreRef, at: Option<u64>) -> Result<Self, TableError> {
        let loaded = log::load(stream, log_store, at).await?;
        let fields: Arc<[StreamField]> = table_fields(stream, &loaded.columns)?.into();
        Ok(Self {
            version: loaded.version,
            log_store: log_store.clone(),
            files: loaded.files,
            schema: Arc::new(table_schema(&fields)),
            fields,
            txn: Arc::new(loaded.txn),
            metadata: Arc::new(loaded.metadata),
        })
    }

    /// The same table at a later version.
    fn after(&self, version: u64, files: DataFiles, txn: Arc<Marks>) -> Self {
        Self { version, files, txn, ..self.clone() }
    }
}

/// Writes a checkpoint of the table at this version: who opens it from then on reads nothing older. It reads all of the
/// table's log state: not in the way of commits.
///
/// # Errors
/// When the store does not answer; nothing is lost by that.
pub async fn checkpoint(stream: &StreamName, snapshot: &TableSnapshot) -> Result<(), TableError> {
    let engine = snapshot.log_store.engine(None);
    let (url, version) = (snapshot.log_store.root_url().clone(), snapshot.version);
    let write = move || {
        let at = buoyant_kernel::Snapshot::builder_for(url).at_version(version).build(engine.as_ref())?;
        at.checkpoint(engine.as_ref(), None).map(drop)
    };
    crate::failpoint::reach("checkpoint.before");
    let written =
        tokio::task::spawn_blocking(write).await.map_err(|_| TableError::Thread { stream: stream.clone() })?;
    crate::failpoint::reach("checkpoint.after");
    written.map_err(|source| TableError::Log { stream: stream.clone(), source: Box::new(source) })
}

/// The version of the newest checkpoint, 0 when there is none.
///
/// # Errors
/// When the store does not answer.
pub(crate) async fn last_checkpoint(stream: &StreamName, log_store: &LogStoreRef) -> Result<u64, TableError> {
    let delta = |error: object_store::Error| TableError::delta(stream, error.into());
    let hint = object_store::path::Path::from("_delta_log/_last_checkpoint");
    match log_store.object_store(None).get(&hint).await {
        Ok(found) => {
            let bytes = found.bytes().await.map_err(delta)?;
            let hint: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
            Ok(hint["version"].as_u64().unwrap_or(0))
        }
        Err(object_store::Error::NotFound { .. }) => Ok(0),
        Err(error) => Err(delta(error)),
    }
}

/// No retry, no checkpoint, no clean-up.
fn plain_commit() -> CommitProperties {
    CommitProperties::default().with_max_retries(0).with_create_checkpoint(false).with_cleanup_expired_logs(Some(false))
}

fn kernel_schema(schema: &Schema) -> Result<StructType, DeltaTableError> {
    schema.try_into_kernel().map_err(|error| DeltaTableError::Arrow { source: error })
}

/// The user's fields among the columns of a table.
fn table_fields(stream: &StreamName, columns: &Schema) -> Result<Vec<StreamField>, TableError> {
    let foreign = |detail: String| TableError::Foreign { stream: stream.clone(), detail };
    let own = provenance_fields();
    let mut fields = Vec::new();
    for column in columns.fields() {
        let name = column.name().as_str();
        if matches!(name, TS | DEVICE | DATE) || own.iter().any(|own| own.name() == name) {
            continue;
        }
        let kind = FieldType::from_arrow(column.data_type())
            .ok_or_else(|| foreign(format!("column {name} has the type {}", column.data_type())))?;
        fields.push(StreamField { name: name.parse().map_err(|error| foreign(format!("{error}")))?, kind });
    }
    Ok(fields)
}

#[cfg(test)]
pub(crate) mod power_cut;
#[cfg(test)]
pub(crate) mod tests;
