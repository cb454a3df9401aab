//! The tables that a statement may name, in catalogue `weir`: one per stream in schema `public`, and those about the node
//! itself in schema `system`.
//!
//! The catalogue holds live handles and no rows. What a handle shows is decided when a statement is executed
//! (rule 4): until then it only knows its columns.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use arrow_schema::SchemaRef;
use async_trait::async_trait;
use datafusion::catalog::{CatalogProvider, SchemaProvider, TableProvider};
use datafusion::common::{DataFusionError, plan_err};
use datafusion::error::Result as DataFusionResult;
use deltalake_core::logstore::LogStoreRef;
use tokio::sync::watch;
use wire::hot::HotSource;
use wire::{DataFiles, EdgeId, Mark, Seq, SpoolId, StreamName};

use crate::as_of::{self, AsOf};
use crate::fused_table::LiveTable;
use crate::references;
use crate::remark::{ColumnNote, Remark};
use crate::system::SystemSchema;
use crate::views::Views;

/// Name of the one catalogue.
pub const CATALOG: &str = "weir";
/// Name of the schema that holds a table per stream.
pub const SCHEMA: &str = "public";
/// Name of the schema of the tables about the node itself.
pub const SYSTEM: &str = "system";

/// The cold half of a table at one version. Cheap to clone.
#[derive(Clone)]
pub struct ColdTable {
    pub version: u64,
    pub log_store: LogStoreRef,
    pub files: DataFiles,
    /// The last batch of each spool that the files have (rule 3).
    pub txn: Arc<HashMap<SpoolId, Mark>>,
    /// What the table's owner says of it.
    pub description: Option<String>,
    /// All columns of the table in the order of `wire::schema::table_schema`.
    pub schema: SchemaRef,
}

impl fmt::Debug for ColdTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ColdTable").field("version", &self.version).finish_non_exhaustive()
    }
}

/// A table could not be loaded, or not be changed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("table {stream}: {detail}")]
pub struct TablesError {
    pub stream: StreamName,
    pub detail: String,
}

/// What a node knows of the rows that one spool has sent it of one stream.
#[derive(Debug, Clone)]
pub struct SpoolFacts {
    pub stream: StreamName,
    pub edge: EdgeId,
    pub spool: SpoolId,
    /// Rows and batches that the node has taken: in all, or since it started.
    pub rows: u64,
    pub batches: u64,
    /// When the last batch was taken, µs since 1970 UTC.
    pub received_at_us: i64,
    /// The latest event time.
    pub max_ts: Option<i64>,
    /// The highest watermark that a batch carried since the node started (rule 5).
    pub watermark: Option<i64>,
    pub durable: Seq,
    pub committed: Seq,
    /// Version of the agent that sealed the last batch, and of its configuration.
    pub agent: String,
    pub configuration: u64,
}

/// What a node tells of one of the classes that it takes rows in, the first to go first.
#[derive(Debug, Clone, Copy)]
pub struct ClassFacts {
    pub class: &'static str,
    /// Rows since the node started, by what became of them.
    pub received: u64,
    pub durable: u64,
    pub duplicate: u64,
    pub refused: u64,
    pub pushed_back: u64,
    pub committed: u64,
    pub hot_rows: u64,
    pub hot_bytes: u64,
    /// Bytes of memory that are kept for it, and that it could still take.
    pub hot_kept_bytes: u64,
    pub hot_free_bytes: u64,
    /// Bytes of the log that are not committed, and that it could still take.
    pub wal_bytes: u64,
    pub wal_free_bytes: u64,
}

/// Where tables come from: the node's own catalogue, or (later) a catalogue that other nodes write.
#[async_trait]
pub trait Tables: Send + Sync + fmt::Debug {
    /// Every stream that has a table, in order of name.
    fn streams(&self) -> Vec<StreamName>;
    /// The newest snapshot that is at hand, without waiting.
    fn cold(&self, stream: &StreamName) -> Option<ColdTable>;
    /// A snapshot of at least this version.
    async fn reload(&self, stream: &StreamName, at_least: u64) -> Result<ColdTable, TablesError>;
    /// The table as it was.
    async fn cold_as_of(&self, stream: &StreamName, as_of: AsOf) -> Result<ColdTable, TablesError>;
    /// What is known of every spool that has ever sent this node something.
    fn spools(&self) -> Vec<SpoolFacts>;
    /// What is known of the spools that have sent it something of these streams since it started.
    fn spools_of(&self, streams: &BTreeSet<StreamName>) -> Vec<SpoolFacts> {
        self.spools().into_iter().filter(|spool| streams.contains(&spool.stream)).collect()
    }
    /// How the classes fare in which the node takes rows.
    fn classes(&self) -> Vec<ClassFacts> {
        Vec::new()
    }
    /// Tells that some table has moved on; several times may be told as one.
    fn changed(&self) -> watch::Receiver<u64>;
    /// Another number after each time that this table has moved on.
    fn moves(&self, _stream: &StreamName) -> u64 {
        *self.changed().borrow()
    }
    /// What is known of a table's columns, by name.
    fn notes(&self, _stream: &StreamName) -> BTreeMap<String, ColumnNote> {
        BTreeMap::new()
    }
    /// Writes what somebody says of a table, or of its column, into the table.
    async fn say(&self, remark: &Remark) -> Result<(), TablesError> {
        let detail = "what is said of it cannot be kept here".to_owned();
        Err(TablesError { stream: remark.stream.clone(), detail })
    }
    /// Where hot rows are asked for.
    fn hot(&self) -> Arc<dyn HotSource>;
}

/// The catalogue `weir`.
#[derive(Debug)]
pub(crate) struct WeirCatalog {
    pub(crate) public: Arc<PublicSchema>,
    pub(crate) system: Arc<SystemSchema>,
}

impl CatalogProvider for WeirCatalog {
    fn schema_names(&self) -> Vec<String> {
        vec![SCHEMA.to_owned(), SYSTEM.to_owned()]
    }

    fn schema(&self, name: &str) -> Option<Arc<dyn SchemaProvider>> {
        match name {
            SCHEMA => Some(Arc::clone(&self.public) as _),
            SYSTEM => Some(Arc::clone(&self.system) as _),
            _ => None,
        }
    }
}

/// The schema `public`: live handles, made when they are asked for.
#[derive(Debug)]
pub(crate) struct PublicSchema {
    pub(crate) tables: Arc<dyn Tables>,
    pub(crate) views: Arc<Views>,
}

#[async_trait]
impl SchemaProvider for PublicSchema {
    fn table_names(&self) -> Vec<String> {
        let streams = self.tables.streams();
        let views = self.views.names(self.tables.as_ref()).into_iter().chain(references::names(&streams));
        let names: BTreeSet<String> = streams.iter().map(ToString::to_string).chain(views).collect();
        names.into_iter().collect()
    }

    async fn table(&self, name: &str) -> DataFusionResult<Option<Arc<dyn TableProvider>>> {
        let (name, newest) = as_of::newest(name);
        let (name, as_of) = as_of::parts(name);
        let Ok(stream) = name.parse::<StreamName>() else {
            return Ok(None);
        };
        // A stream that comes later does not take the name of a view.
        if self.views.has(name) {
            if as_of.is_some() {
                return plan_err!("{name} is a view: what it showed when is in {name}_changes, by view_revision");
            }
            return self.views.table(self.tables.as_ref(), name).await;
        }
        let table = match (self.tables.cold(&stream), as_of) {
            (Some(cold), None) => LiveTable::new(stream, cold.schema),
            (Some(_), Some(as_of)) => {
                let past = self.tables.cold_as_of(&stream, as_of).await;
                let past = past.map_err(|error| DataFusionError::External(Box::new(error)))?;
                if newest { LiveTable::latest_past(past) } else { LiveTable::past(past) }
            }
            (None, None) => return references::view(self.tables.as_ref(), name),
            (None, Some(_)) if self.table_exist(name) => {
                return plan_err!(
                    "{name} is a reference table: what held when is in its history, valid_from to valid_to"
                );
            }
            (None, Some(_)) => return Ok(None),
        };
        Ok(Some(Arc::new(table)))
    }

    fn table_exist(&self, name: &str) -> bool {
        let (name, _) = as_of::parts(as_of::newest(name).0);
        self.views.has(name) || is_table(self.tables.as_ref(), name)
    }
}

/// Whether a name is that of a stream's table, or of a reference table.
pub(crate) fn is_table(tables: &dyn Tables, name: &str) -> bool {
    let is_stream = name.parse::<StreamName>().is_ok_and(|stream| tables.cold(&stream).is_some());
    is_stream || matches!(references::view(tables, name), Ok(Some(_)))
}
