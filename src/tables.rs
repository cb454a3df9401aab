//! The tables that `query` asks for, from the catalogue of the node in the same process.

use std::sync::Arc;

use async_trait::async_trait;
use cloud_ingest::{Catalogue, TableState};
use query::{ColdTable, Tables, TablesError};
use wire::StreamName;
use wire::hot::HotSource;

/// The catalogue of this process.
#[derive(Debug)]
pub(crate) struct NodeTables(pub(crate) Arc<Catalogue>);

fn cold(state: &TableState) -> ColdTable {
    ColdTable {
        version: state.snapshot.version,
        log_store: Arc::clone(&state.snapshot.log_store),
        files: state.snapshot.files.clone(),
        schema: Arc::clone(&state.snapshot.schema),
    }
}

#[async_trait]
impl Tables for NodeTables {
    fn streams(&self) -> Vec<StreamName> {
        self.0.streams()
    }

    fn cold(&self, stream: &StreamName) -> Option<ColdTable> {
        self.0.state(stream).map(|state| cold(&state))
    }

    /// The catalogue's snapshot is as new as its hot rows: whoever was told `Stale` finds it here.
    async fn reload(&self, stream: &StreamName, at_least: u64) -> Result<ColdTable, TablesError> {
        let failed = |detail: String| TablesError { stream: stream.clone(), detail };
        let state = self.0.state(stream).ok_or_else(|| failed("it is gone".to_owned()))?;
        if state.snapshot.version < at_least {
            return Err(failed(format!("version {at_least} is not known here")));
        }
        Ok(cold(&state))
    }

    fn hot(&self) -> Arc<dyn HotSource> {
        Arc::clone(&self.0) as Arc<dyn HotSource>
    }
}
