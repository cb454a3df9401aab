//! Where messages come from. A source gives each message to the journal and does nothing else with it.

pub mod exec;
pub mod file;
pub mod host;
pub mod http;
mod lines;
mod missed;
pub mod modbus;
pub mod mqtt;
pub mod tick;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::decode::Command;

/// Commands that wait for the source; more are not kept, as what is needed is asked for again.
const COMMANDS_MAX: usize = 1_000;

/// What a source tells about itself, for status and metrics. Totals are since the agent's directory was made.
#[derive(Debug, Default)]
pub struct SourceState {
    /// Messages that were given to the journal, or were there already: received = journalled + redelivered (rule 6).
    pub received: AtomicU64,
    pub redelivered: AtomicU64,
    pub connected: AtomicBool,
    pub connects: AtomicU64,
    /// µs since 1970 UTC; 0 before the first.
    pub last_arrival_us: AtomicI64,
    pub last_error: Mutex<Option<String>>,
    /// Where a source that is a door listens.
    pub address: Mutex<Option<SocketAddr>>,
    /// What it is to publish, and how much it has.
    commands: Mutex<VecDeque<Command>>,
    commanded: Notify,
    pub commands_sent: AtomicU64,
}

impl SourceState {
    /// Counts go on from what a snapshot and the journal say.
    pub fn from_totals(journalled: u64, redelivered: u64) -> Self {
        let state = Self::default();
        state.received.store(journalled + redelivered, Ordering::Relaxed);
        state.redelivered.store(redelivered, Ordering::Relaxed);
        state
    }

    /// Gives it a command to publish; it is dropped when too many wait.
    pub fn command(&self, command: Command) {
        let mut commands = self.commands.lock();
        if commands.len() < COMMANDS_MAX {
            commands.push_back(command);
            self.commanded.notify_one();
        }
    }

    /// The commands that wait, in order.
    pub fn take_commands(&self) -> VecDeque<Command> {
        std::mem::take(&mut self.commands.lock())
    }

    fn error(&self, text: String) {
        *self.last_error.lock() = Some(text);
    }
}

/// The machine's clock as it is, µs since 1970 UTC; what runs goes by [`crate::clock::Clock`].
pub fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}
