//! The statements that run and the last of those that ran: for `system.queries`, for who wants to end one, and for the
//! limits of each.
//!
//! A [`Running`] statement lives as long as its rows: it holds its place in a lane, its memory, its deadline, and the
//! word that ends it. What it was is remembered when it is dropped; of how many, is configured.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, SystemTime};

use datafusion::execution::memory_pool::MemoryPool;
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::caller::{Caller, Door};
use crate::lanes::Place;
use crate::memory::StatementPool;

/// Of a statement's text so much is remembered, bytes.
const TEXT_BYTES_MAX: usize = 4_096;

/// How a statement ended, or that it has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum State {
    Running,
    Done,
    Failed,
    Cancelled,
    /// Whoever asked went away before the last row.
    Abandoned,
    /// It was to be planned only, and is.
    Planned,
}

impl State {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Abandoned => "abandoned",
            Self::Planned => "planned",
        }
    }

    fn of(value: u8) -> Self {
        [Self::Running, Self::Done, Self::Failed, Self::Cancelled, Self::Abandoned, Self::Planned]
            .into_iter()
            .find(|state| *state as u8 == value)
            .unwrap_or(Self::Abandoned)
    }
}

/// What `system.queries` tells of a statement.
#[derive(Debug, Clone)]
pub(crate) struct Told {
    pub(crate) id: u64,
    pub(crate) text: Arc<str>,
    pub(crate) reader: String,
    pub(crate) door: Door,
    pub(crate) lane: String,
    pub(crate) state: State,
    pub(crate) started: SystemTime,
    pub(crate) took: Duration,
    pub(crate) rows: u64,
    pub(crate) bytes: u64,
    /// The most memory that it had at a time, bytes.
    pub(crate) memory: u64,
}

/// All statements of the node.
#[derive(Debug)]
pub(crate) struct Statements {
    last: AtomicU64,
    running: Mutex<BTreeMap<u64, Weak<Running>>>,
    recent: Mutex<VecDeque<Told>>,
    recent_max: usize,
}

impl Statements {
    /// None yet; so many are remembered.
    pub(crate) fn new(recent_max: usize) -> Arc<Self> {
        Arc::new(Self { last: AtomicU64::new(0), running: Mutex::default(), recent: Mutex::default(), recent_max })
    }

    /// A statement begins in this place.
    pub(crate) fn begin(
        self: &Arc<Self>,
        caller: &Caller,
        place: &Arc<Place>,
        text: &str,
        all: &Arc<dyn MemoryPool>,
    ) -> Arc<Running> {
        let limits = &place.lane().settings;
        let mut end = text.len().min(TEXT_BYTES_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let running = Arc::new(Running {
            id: self.last.fetch_add(1, Ordering::Relaxed) + 1,
            text: text[..end].into(),
            caller: caller.clone(),
            started: SystemTime::now(),
            since: Instant::now(),
            timeout: limits.timeout,
            end: CancellationToken::new(),
            pool: Arc::new(StatementPool::new(limits.memory_bytes_max, limits.common_bytes_max, Arc::clone(all))),
            rows: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            state: AtomicU8::new(State::Running as u8),
            took: OnceLock::new(),
            lane: limits.name.clone(),
            place: Mutex::new(Some(Arc::clone(place))),
            statements: Arc::clone(self),
        });
        self.running.lock().insert(running.id, Arc::downgrade(&running));
        running
    }

    /// Ends a statement that the caller may end; false when there is none.
    pub(crate) fn cancel(&self, id: u64, caller: &Caller) -> bool {
        let running = self.running.lock().get(&id).and_then(Weak::upgrade);
        let own = running.filter(|running| caller.may_manage(running.caller.name()) && !running.end.is_cancelled());
        own.inspect(|running| running.cancel()).is_some()
    }

    /// Those that the caller may see, the newest first.
    pub(crate) fn told(&self, caller: &Caller) -> Vec<Told> {
        let running: Vec<Arc<Running>> = self.running.lock().values().filter_map(Weak::upgrade).collect();
        let mut told: Vec<Told> = running.iter().map(|running| running.told()).collect();
        // Not under the lock: the last owner's drop takes it.
        drop(running);
        told.extend(self.recent.lock().iter().cloned());
        told.retain(|statement| caller.may_manage(&statement.reader));
        told.sort_by_key(|statement| std::cmp::Reverse(statement.id));
        told.dedup_by_key(|statement| statement.id);
        told
    }
}

/// A statement from its parsing to its last row.
#[derive(Debug)]
pub struct Running {
    id: u64,
    text: Arc<str>,
    caller: Caller,
    started: SystemTime,
    since: Instant,
    timeout: Duration,
    end: CancellationToken,
    pool: Arc<StatementPool>,
    rows: AtomicU64,
    bytes: AtomicU64,
    state: AtomicU8,
    /// Until its end.
    took: OnceLock<Duration>,
    lane: String,
    /// Until its tasks have ended; whoever still holds its rows holds up nobody else.
    place: Mutex<Option<Arc<Place>>>,
    statements: Arc<Statements>,
}

impl Running {
    /// Names it in `system.queries`.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Its text, or as much of it as is remembered.
    pub(crate) fn text(&self) -> &Arc<str> {
        &self.text
    }

    /// Who asks.
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// From its beginning to its last row.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// When it must have given its last row.
    pub fn deadline(&self) -> Instant {
        self.since + self.timeout
    }

    /// It was to be planned only, and that is done.
    pub fn planned(&self) {
        self.ended(State::Planned);
    }

    /// Ends it: its next row is an error. It is over also when nobody asks for that row.
    pub fn cancel(&self) {
        self.ended(State::Cancelled);
        self.end.cancel();
    }

    /// Resolves when it is to end.
    pub(crate) fn cancelled(&self) -> &CancellationToken {
        &self.end
    }

    pub(crate) fn pool(&self) -> &Arc<StatementPool> {
        &self.pool
    }

    /// Its place in the lane, as long as it has one.
    pub(crate) fn place(&self) -> Option<Arc<Place>> {
        self.place.lock().clone()
    }

    /// Gives its place back.
    pub(crate) fn leave(&self) {
        // Not under the lock: who comes next may be woken by it.
        let place = self.place.lock().take();
        drop(place);
    }

    /// Adds to what it has given out; rows and bytes until now.
    pub(crate) fn gave(&self, rows: usize, bytes: usize) -> (u64, u64) {
        let add = |counter: &AtomicU64, more: usize| counter.fetch_add(more as u64, Ordering::Relaxed) + more as u64;
        (add(&self.rows, rows), add(&self.bytes, bytes))
    }

    /// The first word about its end counts.
    pub(crate) fn ended(&self, state: State) {
        let running = State::Running as u8;
        if self.state.compare_exchange(running, state as u8, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.took.get_or_init(|| self.since.elapsed());
        }
    }

    fn told(&self) -> Told {
        // Whoever has stopped taking its rows does not hear that its time is over.
        if Instant::now() >= self.deadline() {
            self.ended(State::Failed);
        }
        Told {
            id: self.id,
            text: Arc::clone(&self.text),
            reader: self.caller.name().to_owned(),
            door: self.caller.door(),
            lane: self.lane.clone(),
            state: State::of(self.state.load(Ordering::Relaxed)),
            started: self.started,
            took: self.took.get().copied().unwrap_or_else(|| self.since.elapsed()),
            rows: self.rows.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            memory: self.pool.peak() as u64,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.ended(State::Abandoned);
        let told = self.told();
        if told.state != State::Planned && self.statements.recent_max > 0 {
            let mut recent = self.statements.recent.lock();
            while recent.len() >= self.statements.recent_max {
                recent.pop_front();
            }
            recent.push_back(told);
        }
        self.statements.running.lock().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use datafusion::execution::memory_pool::GreedyMemoryPool;

    use super::*;
    use crate::lanes::{LaneSettings, Lanes};
    use crate::scope::Scope;

    fn caller(name: &str, scoped: bool) -> Caller {
        let scope = scoped.then(|| Arc::new(Scope::new(Some(Vec::new()), None).unwrap()));
        Caller::new(name, Door::Http, scope, Arc::new([]))
    }

    #[tokio::test]
    async fn a_scoped_reader_sees_and_ends_its_own_statements_only() {
        let (one, two, all) = (caller("one", true), caller("two", true), caller("all", false));
        let lanes = Lanes::new(&[LaneSettings { threads: 1, ..LaneSettings::default() }]).unwrap();
        let pool: Arc<dyn MemoryPool> = Arc::new(GreedyMemoryPool::new(1));
        let statements = Statements::new(2);
        let place = Arc::new(lanes.enter(&one).await.unwrap());
        let first = statements.begin(&one, &place, "SELECT 'æ'", &pool);
        assert_eq!(statements.told(&one).len(), 1);
        assert_eq!(statements.told(&two).len(), 0);
        assert_eq!(statements.told(&all)[0].state.name(), "running");
        assert!(!statements.cancel(first.id(), &two));
        assert!(!first.cancelled().is_cancelled());
        assert!(statements.cancel(first.id(), &one) && first.cancelled().is_cancelled());
        assert!(!statements.cancel(99, &all));
        first.ended(State::Done);
        first.ended(State::Failed);
        drop(first);
        for _ in 0..3 {
            statements.begin(&one, &place, &"æ".repeat(TEXT_BYTES_MAX), &pool);
        }
        let told = statements.told(&all);
        assert_eq!(told.iter().map(|told| told.id).collect::<Vec<_>>(), [4, 3]);
        assert_eq!((told[0].text.len(), told[0].state.name()), (TEXT_BYTES_MAX, "abandoned"));
    }
}
