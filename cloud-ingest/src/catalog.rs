//! The readable state of every table: one immutable value behind one atomic pointer (rule 4).
//!
//! [`TableState`] is {snapshot, hot}. The ingest thread alone replaces it; a commit swaps both halves at once. Readers
//! load it without waiting. [`Catalogue`] is also the in-process implementation of the hot contract: it answers for
//! every version that its grace time still covers, and `Stale` otherwise. Who follows a stream waits for [`Catalogue::changed`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use parking_lot::RwLock;
use tokio::sync::watch;
use wire::StreamName;
use wire::hot::{HotAnswer, HotError, HotSource};

use crate::delta::TableSnapshot;
use crate::hot::HotSet;
use crate::ledger::Ledger;
use crate::own_names::OwnNames;

/// What a table holds at one moment.
#[derive(Debug)]
pub struct TableState {
    pub snapshot: TableSnapshot,
    pub hot: HotSet,
}

/// One table: its state, and how often that was replaced.
#[derive(Debug)]
struct Table {
    state: ArcSwap<TableState>,
    moves: AtomicU64,
}

/// All tables of this node.
#[derive(Debug, Default)]
pub struct Catalogue {
    tables: RwLock<BTreeMap<StreamName, Arc<Table>>>,
    ledger: Ledger,
    own_names: OwnNames,
    changes: watch::Sender<u64>,
}

impl Catalogue {
    /// What came from whom.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Which streams are filled by views of this node alone.
    pub fn own_names(&self) -> &OwnNames {
        &self.own_names
    }

    /// Every stream that has a table, in order of name.
    pub fn streams(&self) -> Vec<StreamName> {
        self.tables.read().keys().cloned().collect()
    }

    /// The state of a table now.
    pub fn state(&self, stream: &StreamName) -> Option<Arc<TableState>> {
        self.tables.read().get(stream).map(|table| table.state.load_full())
    }

    /// Tells that a state was replaced; several times may be told as one.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// How often the state of a table was replaced, or something was heard of its spools.
    pub fn moves(&self, stream: &StreamName) -> u64 {
        self.tables.read().get(stream).map_or(0, |table| table.moves.load(Ordering::Acquire))
    }

    /// Tells that the ledger knows more of these tables. For the ingest thread.
    pub(crate) fn heard<'a>(&self, streams: impl Iterator<Item = &'a StreamName>) {
        let tables = self.tables.read();
        for table in streams.filter_map(|stream| tables.get(stream)) {
            table.moves.fetch_add(1, Ordering::Release);
        }
        drop(tables);
        self.changes.send_modify(|count| *count += 1);
    }

    /// Replaces the state of a table, or adds it. For the ingest thread.
    pub(crate) fn replace(&self, stream: &StreamName, state: TableState) {
        let state = Arc::new(state);
        let known = self.tables.read().get(stream).cloned();
        match known {
            Some(known) => {
                known.state.store(state);
                // Behind the state: who has seen this number has seen that.
                known.moves.fetch_add(1, Ordering::Release);
            }
            None => {
                let table = Table { state: ArcSwap::new(state), moves: AtomicU64::new(1) };
                self.tables.write().insert(stream.clone(), Arc::new(table));
            }
        }
        self.changes.send_modify(|count| *count += 1);
    }
}

#[async_trait]
impl HotSource for Catalogue {
    async fn hot(&self, stream: &StreamName, at: u64) -> Result<HotAnswer, HotError> {
        let state = self
            .state(stream)
            .ok_or_else(|| HotError { stream: stream.clone(), detail: "this node has no such table".to_owned() })?;
        Ok(state.hot.answer(at, state.snapshot.version))
    }
}
