//! delta-rs's own state of a table, for those who read through delta-rs: loaded when somebody asks for it.
//!
//! It costs more with each file and each entry of the log, so no commit waits for it. All versions of a table share the
//! newest state that was loaded, and the next one goes on from there.

use std::sync::Arc;

use deltalake_core::table::state::DeltaTableState;
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use super::{TableError, TableSnapshot};

/// The state of one version, and the newest of the table.
#[derive(Debug, Clone, Default)]
pub(super) struct LazyState {
    here: Arc<OnceCell<DeltaTableState>>,
    newest: Arc<Mutex<Option<DeltaTableState>>>,
}

impl LazyState {
    /// For the next version.
    pub(super) fn next(&self) -> Self {
        Self { here: Arc::default(), newest: Arc::clone(&self.newest) }
    }
}

impl TableSnapshot {
    /// delta-rs's state at this version.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub async fn state(&self) -> Result<DeltaTableState, TableError> {
        let LazyState { here, newest } = &self.state;
        let load = async || {
            let known = newest.lock().clone().filter(|known| known.version() <= self.version);
            let mut followed = None;
            if let Some(mut state) = known
                && state.update(&self.log_store, Some(self.version)).await.is_ok()
            {
                followed = Some(state);
            }
            let state = match followed {
                Some(state) => state,
                None => DeltaTableState::try_new(&self.log_store, Some(self.version)).await?,
            };
            let mut newest = newest.lock();
            if newest.as_ref().is_none_or(|newest| newest.version() < state.version()) {
                *newest = Some(state.clone());
            }
            Ok(state)
        };
        let loaded: Result<_, deltalake_core::DeltaTableError> = here.get_or_try_init(load).await;
        loaded.cloned().map_err(|source| TableError::State {
            url: self.log_store.root_url().to_string(),
            source: Box::new(source),
        })
    }
}
