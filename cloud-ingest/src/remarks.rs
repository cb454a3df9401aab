//! What people say of tables and columns: written into the table's own log, and shown by this node.
//!
//! It commits like every other writer, by compare-and-swap, and tells the ingest thread, which alone replaces what readers
//! see. It is answered when readers see it.

use std::sync::Arc;
use std::time::Duration;

use wire::StreamName;

use crate::catalog::Catalogue;
use crate::delta::DeltaTable;
use crate::errors::chain;
use crate::ingest::{Done, Job, Jobs};
use crate::store::Store;

/// How long it may take to be shown, when it is written.
const SHOWN_MAX: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(5);

/// See the module. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Remarks {
    store: Store,
    catalogue: Arc<Catalogue>,
    jobs: Jobs,
}

impl Remarks {
    pub(crate) fn new(store: Store, catalogue: Arc<Catalogue>, jobs: Jobs) -> Self {
        Self { store, catalogue, jobs }
    }

    /// Says what a table is, or one of its columns; without a text, takes it away.
    ///
    /// # Errors
    /// In words. It may be said again at any time.
    pub async fn say(&self, stream: &StreamName, column: Option<&str>, text: Option<&str>) -> Result<(), String> {
        let state = self.catalogue.state(stream).ok_or("it is gone")?;
        let mut table = DeltaTable::at(&self.store, stream, state.snapshot.clone());
        let said = table.say(column, text).await.map_err(|error| chain(&error))?;
        self.jobs.send(Job::Done(Box::new(Done::Maintained { stream: stream.clone(), table }))).ok();
        let shown = async {
            while self.catalogue.state(stream).is_some_and(|state| state.snapshot.version < said.version) {
                tokio::time::sleep(LOOK).await;
            }
        };
        let late = |_| "it is written, and this node does not show it yet".to_owned();
        tokio::time::timeout(SHOWN_MAX, shown).await.map_err(late)
    }
}
