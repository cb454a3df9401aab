//! The Delta table of one stream: opened, created, read anew, extended by fields, and committed to.
//!
//! Rule 3 lives here. A batch is in the table if and only if its number is at most `txn[spool]`, which is the Delta
//! application transaction `appId = spool, version = seq`; the CRC of that batch is a second one,
//! `appId = spool/crc, version = crc`. Rows and transactions stand in one commit, made by compare-and-swap on the
//! version of the snapshot that was checked: no retry, no hook. A commit that would leave a gap is refused, so is one
//! that the table already covers. After any other error the outcome is unknown: [`DeltaTable::reload`], then look at
//! `txn`. Files of a commit that lost stay behind as orphans; they are never deleted here, because a conditional put
//! that was answered "taken" may have been our own, tried twice by the transport.
//! Checkpoints are written by [`maintain`], which the owner runs on a task of its own.

use std::collections::HashMap;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::{Schema, SchemaRef};
use buoyant_kernel::engine::arrow_conversion::TryIntoKernel;
use buoyant_kernel::schema::StructType;
use deltalake_core::checkpoints::create_checkpoint;
use deltalake_core::kernel::transaction::{CommitBuilder, CommitProperties, FinalizedCommit, TransactionError};
use deltalake_core::kernel::{Action, MetadataExt, Transaction};
use deltalake_core::logstore::LogStoreRef;
use deltalake_core::operations::create::CreateBuilder;
use deltalake_core::protocol::{DeltaOperation, SaveMode};
use deltalake_core::table::state::DeltaTableState;
use deltalake_core::{DeltaTable as CoreTable, DeltaTableError};
use object_store::ObjectStoreExt;
use wire::FIELDS_MAX;
use wire::ack::Mark;
use wire::ids::{Seq, SpoolId, StreamName};
use wire::schema::{DATE, DEVICE, FieldType, StreamField, TS, provenance_fields, table_schema};

use crate::store::{Store, StoreError};

mod order;
pub mod past;
mod txn;
mod write;

/// Commits between two checkpoints.
pub const CHECKPOINT_EVERY: u64 = 100;

/// Per spool, the last batch that is in a table.
pub type Marks = HashMap<SpoolId, Mark>;

/// Why a table cannot be opened, created or read.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    #[error("read or make the table of stream {stream}")]
    Delta { stream: StreamName, source: Box<DeltaTableError> },
    #[error("read the transactions of stream {stream}")]
    Transactions { stream: StreamName, source: Box<buoyant_kernel::Error> },
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
    fn delta(stream: &StreamName, source: DeltaTableError) -> Self {
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
    Rows { stream: StreamName, source: Box<DeltaTableError> },
    /// The commit may be there or not: reload and look at `txn`. If [`Store::sync_failure`] says something, stop.
    #[error("commit to {stream}: the outcome is not known")]
    Unknown { stream: StreamName, source: Box<DeltaTableError> },
    /// The commit is there or not: reload. The table could not be read.
    #[error(transparent)]
    Store(#[from] TableError),
}

/// One immutable state of a table. Clones share everything.
#[derive(Debug, Clone)]
pub struct TableSnapshot {
    pub version: u64,
    pub state: DeltaTableState,
    pub log_store: LogStoreRef,
    /// The table's columns in order, `_date` last.
    pub schema: SchemaRef,
    /// The user's fields, in order.
    pub fields: Arc<[StreamField]>,
    /// Per spool, the last batch that is in the table.
    pub txn: Arc<Marks>,
}

/// The table of a stream, as its one writer in this process holds it.
#[derive(Debug, Clone)]
pub struct DeltaTable {
    store: Store,
    stream: StreamName,
    snapshot: TableSnapshot,
}

impl DeltaTable {
    /// The table of a stream at its latest version; `None` if there is none.
    ///
    /// # Errors
    /// When the store does not answer, or the table is not one that Weir made.
    pub async fn open(store: &Store, stream: &StreamName) -> Result<Option<Self>, TableError> {
        let delta = |source| TableError::delta(stream, source);
        let log_store = store.log_store(stream);
        if !log_store.is_delta_table_location().await.map_err(delta)? {
            return Ok(None);
        }
        let state = DeltaTableState::try_new(&log_store, None).await.map_err(delta)?;
        store.settle(stream).await?;
        let txn = txn::load(stream, &log_store, state.version()).await?;
        let snapshot = TableSnapshot::new(stream, state, log_store, Arc::new(txn))?;
        Ok(Some(Self { store: store.clone(), stream: stream.clone(), snapshot }))
    }

    /// Makes the table of a stream. If another node was faster, its table is opened, which may have other fields.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn create(store: &Store, stream: &StreamName, fields: &[StreamField]) -> Result<Self, TableError> {
        let delta = |source| TableError::delta(stream, source);
        let columns = kernel_schema(&table_schema(fields)).map_err(delta)?;
        let created = CreateBuilder::new()
            .with_log_store(store.log_store(stream))
            .with_table_name(stream.as_str())
            .with_columns(columns.fields().cloned())
            .with_partition_columns([DATE])
            .with_save_mode(SaveMode::ErrorIfExists)
            .with_commit_properties(plain_commit(Vec::new()))
            .await;
        match (Self::open(store, stream).await?, created) {
            (Some(table), _) => Ok(table),
            (None, Err(source)) => Err(delta(source)),
            (None, Ok(_)) => Err(delta(DeltaTableError::NotATable(stream.to_string()))),
        }
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
        let before = self.snapshot.version;
        let log_store = self.snapshot.log_store.clone();
        let mut state = self.snapshot.state.clone();
        if state.update(&log_store, None).await.is_err() {
            // The log below us may have been cleaned away: read the table from its checkpoint.
            let read = DeltaTableState::try_new(&log_store, None).await;
            state = read.map_err(|source| TableError::delta(&self.stream, source))?;
        }
        // Only now: what was listed before is durable after this.
        self.store.settle(&self.stream).await?;
        if state.version() == before {
            return Ok(self.snapshot());
        }
        let followed = txn::follow(&self.stream, &log_store, &self.snapshot.txn, before, state.version()).await?;
        let txn = match followed {
            Some(txn) => txn,
            None => txn::load(&self.stream, &log_store, state.version()).await?,
        };
        self.snapshot = TableSnapshot::new(&self.stream, state, log_store, Arc::new(txn))?;
        Ok(self.snapshot())
    }

    /// Adds those of the fields whose names the table does not have, as nullable columns, in one commit. Fields that
    /// it has are left as they are, with their type; those above the limit of a stream are left out, and their
    /// values are rescued.
    ///
    /// # Errors
    /// [`CommitError::Moved`] when somebody else committed: reload and try again.
    pub async fn add_fields(&mut self, fields: &[StreamField]) -> Result<TableSnapshot, CommitError> {
        let mut all = self.snapshot.fields.to_vec();
        for field in fields {
            if all.len() < FIELDS_MAX && !all.iter().any(|known| known.name == field.name) {
                all.push(field.clone());
            }
        }
        let added = &all[self.snapshot.fields.len()..];
        if added.is_empty() {
            return Ok(self.snapshot());
        }
        let rows = |source| CommitError::Rows { stream: self.stream.clone(), source: Box::new(source) };
        let schema = kernel_schema(&table_schema(&all)).map_err(rows)?;
        let new_columns = schema.fields().filter(|column| added.iter().any(|new| new.name.as_str() == column.name()));
        let operation = DeltaOperation::AddColumn { fields: new_columns.cloned().collect() };
        let metadata =
            self.snapshot.state.metadata().clone().with_schema(&schema).map_err(|error| rows(error.into()))?;
        let finalized = self.commit_actions(vec![Action::Metadata(metadata)], Vec::new(), operation).await?;
        self.advance(finalized, Arc::clone(&self.snapshot.txn))
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
        let txn = next_marks(&self.snapshot.txn, marks)?;
        let adds = write::write_rows(&self.snapshot, rows).await;
        let adds =
            adds.map_err(|source| CommitError::Rows { stream: self.stream.clone(), source: Box::new(source) })?;
        let operation = DeltaOperation::Write {
            mode: SaveMode::Append,
            partition_by: Some(vec![DATE.to_owned()]),
            predicate: None,
        };
        let actions = adds.into_iter().map(Action::Add).collect();
        let finalized = self.commit_actions(actions, txn::actions(marks), operation).await?;
        self.advance(finalized, Arc::new(txn))
    }

    async fn commit_actions(
        &self,
        actions: Vec<Action>,
        transactions: Vec<Transaction>,
        operation: DeltaOperation,
    ) -> Result<FinalizedCommit, CommitError> {
        let commit = CommitBuilder::from(plain_commit(transactions)).with_actions(actions).build(
            Some(&self.snapshot.state),
            self.snapshot.log_store.clone(),
            operation,
        );
        match commit.await {
            Ok(finalized) => Ok(finalized),
            Err(DeltaTableError::Transaction { source: TransactionError::MaxCommitAttempts(_) }) => {
                Err(CommitError::Moved { stream: self.stream.clone(), version: self.snapshot.version })
            }
            Err(source) => Err(CommitError::Unknown { stream: self.stream.clone(), source: Box::new(source) }),
        }
    }

    fn advance(&mut self, finalized: FinalizedCommit, txn: Arc<Marks>) -> Result<TableSnapshot, CommitError> {
        let log_store = self.snapshot.log_store.clone();
        self.snapshot = TableSnapshot::new(&self.stream, finalized.snapshot(), log_store, txn)?;
        Ok(self.snapshot())
    }
}

impl TableSnapshot {
    fn new(
        stream: &StreamName,
        state: DeltaTableState,
        log_store: LogStoreRef,
        txn: Arc<Marks>,
    ) -> Result<Self, TableError> {
        let fields: Arc<[StreamField]> = table_fields(stream, &state.snapshot().arrow_schema())?.into();
        let schema = Arc::new(table_schema(&fields));
        Ok(Self { version: state.version(), state, log_store, schema, fields, txn })
    }
}

/// Writes a checkpoint of the table when the last one is [`CHECKPOINT_EVERY`] commits back. It reads all of the
/// table's log state: run it on a task of its own, not in the way of commits. Says whether it wrote one.
///
/// # Errors
/// When the store does not answer; nothing is lost by that.
pub async fn maintain(stream: &StreamName, snapshot: &TableSnapshot) -> Result<bool, TableError> {
    let delta = |source| TableError::delta(stream, source);
    let hint = object_store::path::Path::from("_delta_log/_last_checkpoint");
    let last = match snapshot.log_store.object_store(None).get(&hint).await {
        Ok(found) => {
            let bytes = found.bytes().await.map_err(|error| delta(error.into()))?;
            let hint: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
            hint["version"].as_u64().unwrap_or(0)
        }
        Err(object_store::Error::NotFound { .. }) => 0,
        Err(error) => return Err(delta(error.into())),
    };
    if snapshot.version < last + CHECKPOINT_EVERY {
        return Ok(false);
    }
    let mut table = CoreTable::new(snapshot.log_store.clone());
    table.state = Some(snapshot.state.clone());
    create_checkpoint(&table, None).await.map_err(delta)?;
    Ok(true)
}

/// Compare-and-swap on the version that was read, and nothing else: no retry, no checkpoint, no clean-up.
fn plain_commit(transactions: Vec<Transaction>) -> CommitProperties {
    CommitProperties::default()
        .with_application_transactions(transactions)
        .with_max_retries(0)
        .with_create_checkpoint(false)
        .with_cleanup_expired_logs(Some(false))
}

/// `txn` after a commit of these batches: each must follow what is committed.
fn next_marks(txn: &Marks, marks: &[(SpoolId, Seq, Mark)]) -> Result<Marks, CommitError> {
    let mut next = txn.clone();
    for (spool, first, last) in marks {
        let committed = next.get(spool).map_or(Seq(0), |mark| mark.seq);
        if *first <= committed {
            return Err(CommitError::Covered { spool: *spool, committed });
        }
        if *first != committed.next() || last.seq < *first {
            return Err(CommitError::Gap { spool: *spool, committed, got: *first });
        }
        next.insert(*spool, *last);
    }
    Ok(next)
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
mod tests;
