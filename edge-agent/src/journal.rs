//! Every entry on disk before anything is acknowledged. One thread owns the log and syncs for many at once.
//!
//! Senders lay their entries, encoded, into one inbox, and the thread takes all at once, so that an entry costs neither an
//! allocation nor a wake-up. When something came it waits for a quarter of the group's wait, and 0.5 ms at most, so that a
//! burst shares one sync; syncs begin at least that wait apart, and half of the time at least there is none.
//!
//! A [`JournalSender`] gives an entry and gets a [`Ticket`]; when [`JournalSender::durable`] has reached the ticket, the
//! entry is synced. Tickets of one sender become durable in order. Entries that wait are bounded by
//! [`QUEUE_BYTES_MAX`]; when the log is full (by its cap or the disk) senders wait, or are told so by
//! [`JournalSender::try_append`]. What the agent says of the clock goes before all that waits, and into the log's reserve when
//! it is full ([`Journal::tell`]): a full journal may wait for nothing else. A failed sync is final: [`Journal::failed`] tells
//! it, and nothing is tried again.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use segment_log::{
    AppendError, Appended, Damage, Disk, FreeError, LogId, OpenError, Opening, Options, Position, ReadError, Reader,
    SegmentLog, SyncError,
};
use tokio::sync::{Semaphore, watch};

use crate::clock::Clock;
use crate::entry::{Entry, RECORD_KIND};
use crate::failpoint;

/// Entries that wait for the disk, in all.
pub const QUEUE_BYTES_MAX: usize = 4 << 20;
/// A permit of the queue stands for so many bytes; an entry takes at least one.
const PERMIT_BYTES: usize = 256;
/// A group is synced at once when it has so many bytes.
const GROUP_BYTES_MAX: usize = 1 << 20;
/// What a sender keeps allocated.
const ENCODED_BYTES_KEPT: usize = 4 << 10;
/// After so long without entries the log proves on disk that all was synced.
const IDLE: Duration = Duration::from_secs(1);
/// How often a full log is tried again when nothing was freed.
const FULL_RETRY: Duration = Duration::from_millis(200);
/// What is told and finds no room even in the reserve; then the oldest go.
const TOLD_MAX: usize = 16;

/// The number of an entry among those of its sender, from 1.
pub type Ticket = u64;

/// Why the journal ended.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("append to the journal")]
    Append(#[source] AppendError),
    #[error(transparent)]
    Sync(#[from] SyncError),
    #[error(transparent)]
    Free(#[from] FreeError),
    #[error("read the journal")]
    Read(#[from] ReadError),
    #[error("start the journal's thread")]
    Thread(#[source] std::io::Error),
}

/// The journal has ended; what it did not call durable is not in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the journal has ended")]
pub struct Closed;

/// Why [`JournalSender::try_append`] did not take an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TryAppendError {
    #[error("the journal is full")]
    Full,
    #[error(transparent)]
    Closed(#[from] Closed),
}

/// A journal that was recovered, before it takes entries.
#[derive(Debug)]
pub struct OpenJournal(SegmentLog<Disk>);

/// The running journal.
#[derive(Debug)]
pub struct Journal {
    shared: Arc<Shared>,
    /// Where other readers come from; it reads nothing itself.
    reader: Reader<Disk>,
    synced: watch::Receiver<Position>,
    failed: watch::Receiver<Option<Arc<JournalError>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    clock: Arc<Clock>,
}

/// Gives entries to the journal; one for each source connection.
#[derive(Debug)]
pub struct JournalSender {
    shared: Arc<Shared>,
    progress: Arc<watch::Sender<Ticket>>,
    durable: watch::Receiver<Ticket>,
    next: Ticket,
    /// The entry that is being given.
    encoded: Vec<u8>,
    clock: Arc<Clock>,
}

#[derive(Debug)]
struct Shared {
    room: Semaphore,
    inbox: Mutex<Inbox>,
    /// Wakes the thread: for the first entry of a group, for one that fills it, for a position, for the end.
    wake: Condvar,
    full: AtomicBool,
    bytes_on_disk: AtomicU64,
    bytes_written: AtomicU64,
    syncs: AtomicU64,
}

/// What was given and not yet taken.
#[derive(Debug, Default)]
struct Inbox {
    group: Group,
    /// Nothing before it is needed any more.
    free_before: Option<Position>,
    /// Entries that go before all others.
    told: VecDeque<Vec<u8>>,
    stop: bool,
}

/// Entries in the order in which they were given.
#[derive(Debug, Default)]
struct Group {
    /// Their bytes, one after another.
    bytes: Vec<u8>,
    /// Where each ends in `bytes`.
    ends: Vec<usize>,
    /// Who gave them.
    runs: VecDeque<Run>,
}

/// Entries of one sender, one after another: the last speaks for all.
#[derive(Debug)]
struct Run {
    progress: Arc<watch::Sender<Ticket>>,
    entries: usize,
    last: Ticket,
}

impl OpenJournal {
    /// Recovers the log in a directory, or makes it.
    ///
    /// # Errors
    /// When the disk does not answer or another process has it. Damage is no error: it is in [`Opening`].
    pub fn open(directory: PathBuf, options: Options) -> Result<(Self, Opening), JournalError> {
        let (log, opening) = SegmentLog::open(Disk, directory, options)?;
        Ok((Self(log), opening))
    }

    /// The log's identity.
    pub fn id(&self) -> LogId {
        self.0.id()
    }

    /// Behind the last entry.
    pub fn end(&self) -> Position {
        self.0.end()
    }

    /// Goes on at `position` if the log ends before it, and returns what is missing: a position that a snapshot or a lane
    /// has seen must not be given to another entry, which they would take for one that they have.
    ///
    /// # Errors
    /// When the disk has no room, or does not answer.
    pub fn skip_to(&mut self, position: Position) -> Result<Option<Damage>, JournalError> {
        self.0.skip_to(position).map_err(JournalError::Append)
    }

    /// A reader of what is synced.
    ///
    /// # Errors
    /// When the position was freed or lies behind the end.
    pub fn reader(&self, from: Position) -> Result<Reader<Disk>, ReadError> {
        self.0.reader(from)
    }

    /// Records an entry before the journal runs; false when there is no room for it.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn record(&mut self, entry: &Entry) -> Result<bool, JournalError> {
        let mut bytes = Vec::new();
        entry.write(&mut bytes);
        self.recorded(|log| log.append(RECORD_KIND, &bytes))
    }

    /// The same, of a small entry that may take the reserve.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn record_in_reserve(&mut self, entry: &Entry) -> Result<bool, JournalError> {
        let mut bytes = Vec::new();
        entry.write(&mut bytes);
        self.recorded(|log| log.append_control(RECORD_KIND, &bytes))
    }

    fn recorded(
        &mut self,
        append: impl FnOnce(&mut SegmentLog<Disk>) -> Result<Appended, AppendError>,
    ) -> Result<bool, JournalError> {
        match append(&mut self.0) {
            Ok(_) => {}
            Err(AppendError::Full) => return Ok(false),
            Err(error) => return Err(JournalError::Append(error)),
        }
        self.0.sync()?;
        Ok(true)
    }

    /// Starts the thread. What comes is stamped by the clock.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn run(self, group_wait: Duration, clock: Arc<Clock>) -> Result<Journal, JournalError> {
        let reader = self.0.reader(self.0.synced())?;
        let (synced_sender, synced) = watch::channel(self.0.synced());
        let (failed_sender, failed) = watch::channel(None);
        let shared = Arc::new(Shared {
            room: Semaphore::new(QUEUE_BYTES_MAX / PERMIT_BYTES),
            inbox: Mutex::new(Inbox::default()),
            wake: Condvar::new(),
            full: AtomicBool::new(false),
            bytes_on_disk: AtomicU64::new(self.0.bytes_on_disk()),
            bytes_written: AtomicU64::new(0),
            syncs: AtomicU64::new(0),
        });
        let mut writer = Writer {
            log: self.0,
            group_wait,
            shared: Arc::clone(&shared),
            synced: synced_sender,
            group: Group::default(),
            next: Instant::now(),
            told: VecDeque::new(),
            stopping: false,
        };
        let thread = std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || {
                if let Err(error) = writer.run() {
                    tracing::error!(%error, "the journal ends");
                    failed_sender.send_replace(Some(Arc::new(error)));
                }
                writer.shared.room.close();
            })
            .map_err(JournalError::Thread)?;
        Ok(Journal { shared, reader, synced, failed, thread: Mutex::new(Some(thread)), clock })
    }
}

impl Journal {
    /// A new sender with tickets of its own.
    pub fn sender(&self) -> JournalSender {
        let (progress, durable) = watch::channel(0);
        let (shared, progress) = (Arc::clone(&self.shared), Arc::new(progress));
        JournalSender { shared, progress, durable, next: 0, encoded: Vec::new(), clock: Arc::clone(&self.clock) }
    }

    /// By which entries are stamped.
    pub fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    /// Gives a small entry that goes before all that wait, and may take the reserve of a full log.
    pub fn tell(&self, entry: &Entry) {
        let mut bytes = Vec::new();
        entry.write(&mut bytes);
        self.shared.inbox.lock().told.push_back(bytes);
        self.shared.wake.notify_one();
    }

    /// A reader of what is synced.
    ///
    /// # Errors
    /// When the position was freed or lies behind the end.
    pub fn reader(&self, from: Position) -> Result<Reader<Disk>, ReadError> {
        self.reader.another(from)
    }

    /// The synced end; readers see all before it.
    pub fn synced(&self) -> watch::Receiver<Position> {
        self.synced.clone()
    }

    /// Some when the disk failed: the process must stop.
    pub fn failed(&self) -> watch::Receiver<Option<Arc<JournalError>>> {
        self.failed.clone()
    }

    /// Nothing before the position is needed any more.
    pub fn free_before(&self, position: Position) {
        let mut inbox = self.shared.inbox.lock();
        inbox.free_before = inbox.free_before.max(Some(position));
        self.shared.wake.notify_one();
    }

    /// Whether entries wait for room on disk.
    pub fn is_full(&self) -> bool {
        self.shared.full.load(Ordering::Relaxed)
    }

    /// Bytes on disk now; bytes written and syncs since the start.
    pub fn bytes_and_syncs(&self) -> (u64, u64, u64) {
        let load = |value: &AtomicU64| value.load(Ordering::Relaxed);
        (load(&self.shared.bytes_on_disk), load(&self.shared.bytes_written), load(&self.shared.syncs))
    }

    /// Takes what waits, syncs, and ends the thread. Blocks; entries that find no room are given up, undurable.
    pub fn stop(&self) {
        self.shared.inbox.lock().stop = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the journal's thread panicked");
        }
    }
}

impl JournalSender {
    /// What a message that comes now is stamped with.
    pub fn now_us(&self) -> i64 {
        self.clock.now_us()
    }

    /// Waits for room in the queue and gives the entry.
    ///
    /// # Errors
    /// When the journal has ended.
    pub async fn append(&mut self, entry: &Entry) -> Result<Ticket, Closed> {
        let permits = self.encode(entry);
        self.shared.room.acquire_many(permits).await.map_err(|_| Closed)?.forget();
        Ok(self.give())
    }

    /// Gives the entry if there is room at once and the log is not full.
    ///
    /// # Errors
    /// `Full`, or the journal has ended.
    pub fn try_append(&mut self, entry: &Entry) -> Result<Ticket, TryAppendError> {
        if self.shared.full.load(Ordering::Relaxed) {
            return Err(TryAppendError::Full);
        }
        let permits = self.encode(entry);
        match self.shared.room.try_acquire_many(permits) {
            Ok(permit) => permit.forget(),
            Err(tokio::sync::TryAcquireError::NoPermits) => return Err(TryAppendError::Full),
            Err(tokio::sync::TryAcquireError::Closed) => return Err(Closed.into()),
        }
        Ok(self.give())
    }

    /// All tickets up to this are synced.
    pub fn durable(&self) -> watch::Receiver<Ticket> {
        self.durable.clone()
    }

    /// The permits that the entry takes.
    fn encode(&mut self, entry: &Entry) -> u32 {
        self.encoded.clear();
        entry.write(&mut self.encoded);
        permits(self.encoded.len())
    }

    fn give(&mut self) -> Ticket {
        self.next += 1;
        let mut inbox = self.shared.inbox.lock();
        let before = inbox.group.bytes.len();
        inbox.group.add(&self.encoded, &self.progress, self.next);
        if before == 0 || (before < GROUP_BYTES_MAX && inbox.group.bytes.len() >= GROUP_BYTES_MAX) {
            self.shared.wake.notify_one();
        }
        drop(inbox);
        // A large entry's room is not kept for small ones.
        self.encoded.shrink_to(ENCODED_BYTES_KEPT);
        self.next
    }
}

fn permits(bytes: usize) -> u32 {
    bytes.div_ceil(PERMIT_BYTES).clamp(1, QUEUE_BYTES_MAX / PERMIT_BYTES) as u32
}

impl Group {
    fn add(&mut self, entry: &[u8], sender: &Arc<watch::Sender<Ticket>>, ticket: Ticket) {
        self.bytes.extend_from_slice(entry);
        self.ends.push(self.bytes.len());
        match self.runs.back_mut() {
            Some(run) if Arc::ptr_eq(&run.progress, sender) => {
                run.entries += 1;
                run.last = ticket;
            }
            _ => self.runs.push_back(Run { progress: Arc::clone(sender), entries: 1, last: ticket }),
        }
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
        self.runs.clear();
        // What one long wait of the disk let it grow to.
        self.bytes.shrink_to(GROUP_BYTES_MAX);
        self.ends.shrink_to(GROUP_BYTES_MAX / PERMIT_BYTES);
    }
}

/// What comes in a burst shares a sync: the first of it waits so long, or a quarter of `group_wait` when that is less.
const LINGER_MAX: Duration = Duration::from_micros(500);

/// What the thread owns: woken by the inbox, by the group's deadline, and when idle; ends on `stop` or a failed sync.
struct Writer {
    log: SegmentLog<Disk>,
    group_wait: Duration,
    shared: Arc<Shared>,
    synced: watch::Sender<Position>,
    /// What was taken; its buffers and the inbox's change places.
    group: Group,
    /// Nothing is synced before.
    next: Instant,
    /// Entries that found no room yet, not even in the reserve.
    told: VecDeque<Vec<u8>>,
    stopping: bool,
}

impl Writer {
    fn run(&mut self) -> Result<(), JournalError> {
        let (mut marked, linger) = (false, (self.group_wait / 4).min(LINGER_MAX));
        while !self.stopping {
            let shared = Arc::clone(&self.shared);
            let inbox = shared.wait(Instant::now() + IDLE, |inbox| !inbox.group.ends.is_empty());
            let idle =
                inbox.group.ends.is_empty() && inbox.free_before.is_none() && inbox.told.is_empty() && !inbox.stop;
            if inbox.group.ends.is_empty() {
                self.obey(inbox)?;
            } else {
                drop(inbox);
                // Others that come until then share its sync.
                let filled = |inbox: &Inbox| inbox.group.bytes.len() >= GROUP_BYTES_MAX;
                let mut inbox = shared.gather(self.next.max(Instant::now() + linger), filled);
                std::mem::swap(&mut inbox.group, &mut self.group);
                self.obey(inbox)?;
                self.write()?;
            }
            if idle && !marked {
                self.log.mark()?;
            }
            marked = idle;
        }
        self.log.mark()?;
        Ok(())
    }

    fn obey(&mut self, mut inbox: MutexGuard<'_, Inbox>) -> Result<(), JournalError> {
        let free_before = inbox.free_before.take();
        self.told.append(&mut inbox.told);
        self.stopping |= inbox.stop;
        drop(inbox);
        self.write_told()?;
        if let Some(position) = free_before {
            self.log.free_before(position)?;
            failpoint::reach("journal.freed");
            self.shared.bytes_on_disk.store(self.log.bytes_on_disk(), Ordering::Relaxed);
        }
        Ok(())
    }

    fn write_told(&mut self) -> Result<(), JournalError> {
        let before = self.told.len();
        while let Some(bytes) = self.told.front() {
            match self.log.append_control(RECORD_KIND, bytes) {
                Ok(_) => drop(self.told.pop_front()),
                Err(AppendError::Full) => break,
                Err(error) => return Err(JournalError::Append(error)),
            }
        }
        if self.told.len() < before {
            self.synced.send_replace(self.log.sync()?);
        }
        while self.told.len() > TOLD_MAX {
            self.told.pop_front();
        }
        Ok(())
    }

    /// Writes and syncs the group; when the log is full, waits for room.
    fn write(&mut self) -> Result<(), JournalError> {
        let mut written = 0;
        loop {
            let before = written;
            while let Some(end) = self.group.ends.get(written) {
                let start = if written == 0 { 0 } else { self.group.ends[written - 1] };
                match self.log.append(RECORD_KIND, &self.group.bytes[start..*end]) {
                    Ok(_) => written += 1,
                    Err(AppendError::Full) => break,
                    Err(error) => return Err(JournalError::Append(error)),
                }
            }
            if written > before {
                failpoint::reach("journal.append");
                self.sync(before, written)?;
            }
            let rest = written < self.group.ends.len();
            // Once full, until what was given meanwhile is on disk, too.
            let full = rest || (self.shared.full.load(Ordering::Relaxed) && self.shared.given());
            if self.shared.full.swap(full, Ordering::Relaxed) != full {
                tracing::warn!(full, "room in the journal changed: sources that can wait get no acknowledgement");
            }
            if !rest || self.stopping {
                self.group.clear();
                return Ok(());
            }
            let shared = Arc::clone(&self.shared);
            self.obey(shared.wait(Instant::now() + FULL_RETRY, |_| false))?;
        }
    }

    fn sync(&mut self, from: usize, to: usize) -> Result<(), JournalError> {
        let begun = Instant::now();
        let end = self.log.sync()?; // before acknowledged
        // However slow the disk is, half of the time it is free for others.
        self.next = (begun + self.group_wait).max(Instant::now() + begun.elapsed());
        failpoint::reach("journal.synced");
        let counters = self.log.counters();
        self.shared.bytes_on_disk.store(self.log.bytes_on_disk(), Ordering::Relaxed);
        self.shared.bytes_written.store(counters.bytes_written, Ordering::Relaxed);
        self.shared.syncs.store(counters.syncs, Ordering::Relaxed);
        self.synced.send_replace(end);
        let Group { ends, runs, .. } = &mut self.group;
        let mut start = if from == 0 { 0 } else { ends[from - 1] };
        let mut room = 0;
        for end in &ends[from..to] {
            room += permits(end - start) as usize;
            start = *end;
        }
        let mut count = to - from;
        while let Some(run) = runs.front_mut() {
            if run.entries > count {
                run.entries -= count;
                if count > 0 {
                    run.progress.send_replace(run.last - run.entries as u64);
                }
                break;
            }
            count -= run.entries;
            run.progress.send_replace(run.last);
            runs.pop_front();
        }
        self.shared.room.add_permits(room);
        Ok(())
    }
}

impl Shared {
    /// Whether entries were given that were not taken.
    fn given(&self) -> bool {
        !self.inbox.lock().group.ends.is_empty()
    }

    /// Waits until there is an order, or what is wanted, or the time is over.
    fn wait(&self, until: Instant, wanted: impl Fn(&Inbox) -> bool) -> MutexGuard<'_, Inbox> {
        self.gather(until, |inbox| inbox.free_before.is_some() || !inbox.told.is_empty() || wanted(inbox))
    }

    /// Waits until the end is ordered, or there is what is wanted, or the time is over.
    fn gather(&self, until: Instant, wanted: impl Fn(&Inbox) -> bool) -> MutexGuard<'_, Inbox> {
        let mut inbox = self.inbox.lock();
        while !inbox.stop && !wanted(&inbox) && !self.wake.wait_until(&mut inbox, until).timed_out() {}
        inbox
    }
}
