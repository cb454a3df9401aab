//! The tables that a statement may name: one per stream, in schema `public` of catalogue `weir`.
//!
//! The catalogue holds live handles and no rows. What a handle shows is decided when a statement is executed
//! (rule 4): until then it only knows its columns.

use std::fmt;
use std::sync::Arc;

use arrow_schema::SchemaRef;
use async_trait::async_trait;
use datafusion::catalog::{CatalogProvider, SchemaProvider, TableProvider};
use datafusion::error::Result as DataFusionResult;
use deltalake_core::logstore::LogStoreRef;
use wire::hot::HotSource;
use wire::{DataFiles, StreamName};

use crate::fused_table::LiveTable;
use crate::references;

/// Name of the one catalogue.
pub const CATALOG: &str = "weir";
/// Name of the schema that holds a table per stream.
pub const SCHEMA: &str = "public";

/// The cold half of a table at one version. Cheap to clone.
#[derive(Clone)]
pub struct ColdTable {
    pub version: u64,
    pub log_store: LogStoreRef,
    pub files: DataFiles,
    /// All columns of the table in the order of `wire::schema::table_schema`.
    pub schema: SchemaRef,
}

impl fmt::Debug for ColdTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ColdTable").field("version", &self.version).finish_non_exhaustive()
    }
}

/// A table could not be loaded.
#[derive(Debug, Clone, thiserror::Error)]
#[error("load table {stream}: {detail}")]
pub struct TablesError {
    pub stream: StreamName,
    pub detail: String,
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
    /// Where hot rows are asked for.
    fn hot(&self) -> Arc<dyn HotSource>;
}

/// The catalogue `weir`.
#[derive(Debug)]
pub(crate) struct WeirCatalog {
    pub(crate) public: Arc<PublicSchema>,
}

impl CatalogProvider for WeirCatalog {
    fn schema_names(&self) -> Vec<String> {
        vec![SCHEMA.to_owned()]
    }

    fn schema(&self, name: &str) -> Option<Arc<dyn SchemaProvider>> {
        (name == SCHEMA).then(|| Arc::clone(&self.public) as _)
    }
}

/// The schema `public`: live handles, made when they are asked for.
#[derive(Debug)]
pub(crate) struct PublicSchema {
    pub(crate) tables: Arc<dyn Tables>,
}

#[async_trait]
impl SchemaProvider for PublicSchema {
    fn table_names(&self) -> Vec<String> {
        let streams = self.tables.streams();
        let views = references::names(&streams);
        streams.iter().map(ToString::to_string).chain(views).collect()
    }

    async fn table(&self, name: &str) -> DataFusionResult<Option<Arc<dyn TableProvider>>> {
        let Ok(stream) = name.parse::<StreamName>() else {
            return Ok(None);
        };
        match self.tables.cold(&stream) {
            Some(cold) => Ok(Some(Arc::new(LiveTable::new(stream, cold.schema)))),
            None => references::view(self.tables.as_ref(), name),
        }
    }

    fn table_exist(&self, name: &str) -> bool {
        let is_stream = name.parse::<StreamName>().is_ok_and(|stream| self.tables.cold(&stream).is_some());
        is_stream || matches!(references::view(self.tables.as_ref(), name), Ok(Some(_)))
    }
}
