//! What the door keeps between calls: prepared statements with their parameters, and which statement a ticket runs.
//!
//! A handle is 16 random bytes and belongs to the reader who made it.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use datafusion::common::ParamValues;
use parking_lot::Mutex;

use crate::engine::Prepared;
use crate::statements::Running;

/// Prepared statements of all callers.
pub(super) const HELD_MAX: usize = 1_024;
/// Tickets whose statements may be cancelled by them.
const TICKETS_MAX: usize = 4_096;

/// A prepared statement.
#[derive(Debug, Clone)]
pub(super) struct Statement {
    pub(super) reader: String,
    pub(super) text: Arc<str>,
    pub(super) prepared: Prepared,
    pub(super) parameters: Option<ParamValues>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Each with when it was used last.
    statements: HashMap<Bytes, (u64, Statement)>,
    clock: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Desk {
    kept: Mutex<Kept>,
    tickets: Mutex<HashMap<Bytes, Weak<Running>>>,
}

/// A handle that nobody guesses.
pub(super) fn handle() -> Bytes {
    Bytes::copy_from_slice(&rand::random::<[u8; 16]>())
}

impl Desk {
    /// Keeps a statement; the one used longest ago gives way to it.
    pub(super) fn keep(&self, statement: Statement) -> Bytes {
        let mut kept = self.kept.lock();
        if kept.statements.len() >= HELD_MAX {
            let oldest = kept.statements.iter().min_by_key(|(_, (used, _))| *used).map(|(handle, _)| handle.clone());
            oldest.map(|oldest| kept.statements.remove(&oldest));
        }
        kept.clock += 1;
        let (handle, now) = (handle(), kept.clock);
        kept.statements.insert(handle.clone(), (now, statement));
        handle
    }

    /// The reader's statement of this handle.
    pub(super) fn find(&self, handle: &Bytes, reader: &str) -> Option<Statement> {
        let mut kept = self.kept.lock();
        kept.clock += 1;
        let now = kept.clock;
        let (used, statement) = kept.statements.get_mut(handle).filter(|(_, statement)| statement.reader == reader)?;
        *used = now;
        Some(statement.clone())
    }

    /// Its next executions have these parameters. False when the reader has no such statement.
    pub(super) fn bind(&self, handle: &Bytes, reader: &str, parameters: Option<ParamValues>) -> bool {
        let mut kept = self.kept.lock();
        let found = kept.statements.get_mut(handle).filter(|(_, statement)| statement.reader == reader);
        found.map(|(_, statement)| statement.parameters = parameters).is_some()
    }

    /// Forgets it.
    pub(super) fn close(&self, handle: &Bytes, reader: &str) {
        let mut kept = self.kept.lock();
        if kept.statements.get(handle).is_some_and(|(_, statement)| statement.reader == reader) {
            kept.statements.remove(handle);
        }
    }

    /// A ticket's statement runs.
    pub(super) fn runs(&self, ticket: Bytes, running: &Arc<Running>) {
        let mut tickets = self.tickets.lock();
        if tickets.len() >= TICKETS_MAX {
            tickets.retain(|_, running| running.strong_count() > 0);
        }
        if tickets.len() < TICKETS_MAX {
            tickets.insert(ticket, Arc::downgrade(running));
        }
    }

    /// The statement that runs for a ticket.
    pub(super) fn running(&self, ticket: &Bytes) -> Option<Arc<Running>> {
        self.tickets.lock().get(ticket).and_then(Weak::upgrade)
    }
}
