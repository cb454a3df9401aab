//! Every entry on disk before anything is acknowledged. One thread owns the log and syncs for many at once.
//!
//! A [`JournalSender`] gives an entry and gets a [`Ticket`]; when [`JournalSender::durable`] has reached the ticket, the
//! entry is synced. Tickets of one sender become durable in order. Entries that wait are bounded by
//! [`QUEUE_BYTES_MAX`]; when the log is full (by its cap or the disk) senders wait, or are told so by
//! [`JournalSender::try_append`]. A failed sync is final: [`Journal::failed`] tells it, and nothing is tried again.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use segment_log::{
    AppendError, Disk, FreeError, LogId, OpenError, Opening, Options, Position, ReadError, Reader, SegmentLog,
    SyncError,
};
use tokio::sync::{Semaphore, watch};

use crate::entry::{Entry, RECORD_KIND};

/// Entries that wait for the disk, in all.
pub const QUEUE_BYTES_MAX: usize = 8 << 20;
/// A permit of the queue stands for so many bytes; an entry takes at least one.
const PERMIT_BYTES: usize = 256;
/// A group is synced at once when it has so many bytes.
const GROUP_BYTES_MAX: usize = 1 << 20;
/// After so long without entries the log proves on disk that all was synced.
const IDLE: Duration = Duration::from_secs(1);
/// How often a full log is tried again when nothing was freed.
const FULL_RETRY: Duration = Duration::from_millis(200);

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
    commands: Sender<Command>,
    shared: Arc<Shared>,
    synced: watch::Receiver<Position>,
    failed: watch::Receiver<Option<Arc<JournalError>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Gives entries to the journal; one for each source connection.
#[derive(Debug)]
pub struct JournalSender {
    commands: Sender<Command>,
    shared: Arc<Shared>,
    progress: Arc<watch::Sender<Ticket>>,
    durable: watch::Receiver<Ticket>,
    next: Ticket,
}

#[derive(Debug)]
struct Shared {
    room: Semaphore,
    full: AtomicBool,
    bytes_on_disk: AtomicU64,
    bytes_written: AtomicU64,
    syncs: AtomicU64,
}

#[derive(Debug)]
struct Item {
    bytes: Vec<u8>,
    permits: u32,
    ticket: Ticket,
    progress: Arc<watch::Sender<Ticket>>,
}

#[derive(Debug)]
enum Command {
    Append(Item),
    FreeBefore(Position),
    Stop,
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

    /// A reader of what is synced.
    ///
    /// # Errors
    /// When the position was freed or lies behind the end.
    pub fn reader(&self, from: Position) -> Result<Reader<Disk>, ReadError> {
        self.0.reader(from)
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn run(self, group_wait: Duration) -> Result<Journal, JournalError> {
        let (commands, inbox) = channel();
        let (synced_sender, synced) = watch::channel(self.0.synced());
        let (failed_sender, failed) = watch::channel(None);
        let shared = Arc::new(Shared {
            room: Semaphore::new(QUEUE_BYTES_MAX / PERMIT_BYTES),
            full: AtomicBool::new(false),
            bytes_on_disk: AtomicU64::new(self.0.bytes_on_disk()),
            bytes_written: AtomicU64::new(0),
            syncs: AtomicU64::new(0),
        });
        let mut writer = Writer {
            log: self.0,
            inbox,
            group_wait,
            shared: Arc::clone(&shared),
            synced: synced_sender,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
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
        Ok(Journal { commands, shared, synced, failed, thread: Mutex::new(Some(thread)) })
    }
}

impl Journal {
    /// A new sender with tickets of its own.
    pub fn sender(&self) -> JournalSender {
        let (progress, durable) = watch::channel(0);
        JournalSender {
            commands: self.commands.clone(),
            shared: Arc::clone(&self.shared),
            progress: Arc::new(progress),
            durable,
            next: 0,
        }
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
        // When the thread has ended there is nothing to free.
        let _ = self.commands.send(Command::FreeBefore(position));
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
        let _ = self.commands.send(Command::Stop);
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the journal's thread panicked");
        }
    }
}

impl JournalSender {
    /// Waits for room in the queue and gives the entry.
    ///
    /// # Errors
    /// When the journal has ended.
    pub async fn append(&mut self, entry: &Entry) -> Result<Ticket, Closed> {
        let (bytes, permits) = encode(entry);
        self.shared.room.acquire_many(permits).await.map_err(|_| Closed)?.forget();
        self.send(bytes, permits)
    }

    /// Gives the entry if there is room at once and the log is not full.
    ///
    /// # Errors
    /// `Full`, or the journal has ended.
    pub fn try_append(&mut self, entry: &Entry) -> Result<Ticket, TryAppendError> {
        if self.shared.full.load(Ordering::Relaxed) {
            return Err(TryAppendError::Full);
        }
        let (bytes, permits) = encode(entry);
        match self.shared.room.try_acquire_many(permits) {
            Ok(permit) => permit.forget(),
            Err(tokio::sync::TryAcquireError::NoPermits) => return Err(TryAppendError::Full),
            Err(tokio::sync::TryAcquireError::Closed) => return Err(Closed.into()),
        }
        Ok(self.send(bytes, permits)?)
    }

    /// All tickets up to this are synced.
    pub fn durable(&self) -> watch::Receiver<Ticket> {
        self.durable.clone()
    }

    fn send(&mut self, bytes: Vec<u8>, permits: u32) -> Result<Ticket, Closed> {
        self.next += 1;
        let item = Item { bytes, permits, ticket: self.next, progress: Arc::clone(&self.progress) };
        self.commands.send(Command::Append(item)).map_err(|_| Closed)?;
        Ok(self.next)
    }
}

fn encode(entry: &Entry) -> (Vec<u8>, u32) {
    let mut bytes = Vec::with_capacity(256);
    entry.write(&mut bytes);
    let permits = bytes.len().div_ceil(PERMIT_BYTES).clamp(1, QUEUE_BYTES_MAX / PERMIT_BYTES);
    (bytes, permits as u32)
}

/// What the thread owns: woken by commands, by the group's deadline, and when idle; ends on `Stop` or a failed sync.
struct Writer {
    log: SegmentLog<Disk>,
    inbox: Receiver<Command>,
    group_wait: Duration,
    shared: Arc<Shared>,
    synced: watch::Sender<Position>,
    waiting: VecDeque<Item>,
    waiting_bytes: usize,
    stopping: bool,
}

impl Writer {
    fn run(&mut self) -> Result<(), JournalError> {
        let mut marked = false;
        while !self.stopping {
            match self.inbox.recv_timeout(IDLE) {
                Ok(command) => {
                    marked = false;
                    self.take(command)?;
                    self.gather()?;
                    self.write()?;
                }
                Err(RecvTimeoutError::Timeout) if !marked => {
                    self.log.mark()?;
                    marked = true;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.log.mark()?;
        Ok(())
    }

    fn take(&mut self, command: Command) -> Result<(), JournalError> {
        match command {
            Command::Append(item) => {
                self.waiting_bytes += item.bytes.len();
                self.waiting.push_back(item);
            }
            Command::FreeBefore(position) => {
                self.log.free_before(position)?;
                self.shared.bytes_on_disk.store(self.log.bytes_on_disk(), Ordering::Relaxed);
            }
            Command::Stop => self.stopping = true,
        }
        Ok(())
    }

    /// Others that come within the group's wait share its sync.
    fn gather(&mut self) -> Result<(), JournalError> {
        let until = Instant::now() + self.group_wait;
        while !self.stopping && !self.waiting.is_empty() && self.waiting_bytes < GROUP_BYTES_MAX {
            match self.inbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(command) => self.take(command)?,
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// Writes and syncs all that waits; when the log is full, waits for room.
    fn write(&mut self) -> Result<(), JournalError> {
        while !self.waiting.is_empty() {
            let mut written = 0;
            for item in &self.waiting {
                match self.log.append(RECORD_KIND, &item.bytes) {
                    Ok(_) => written += 1,
                    Err(AppendError::Full) => break,
                    Err(error) => return Err(JournalError::Append(error)),
                }
            }
            if written > 0 {
                self.sync(written)?;
            }
            let full = !self.waiting.is_empty();
            if self.shared.full.swap(full, Ordering::Relaxed) != full {
                tracing::warn!(full, "room in the journal changed: sources that can wait get no acknowledgement");
            }
            if full {
                if self.stopping {
                    return Ok(());
                }
                match self.inbox.recv_timeout(FULL_RETRY) {
                    Ok(command) => self.take(command)?,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => self.stopping = true,
                }
            }
        }
        Ok(())
    }

    fn sync(&mut self, count: usize) -> Result<(), JournalError> {
        let end = self.log.sync()?; // before acknowledged
        let counters = self.log.counters();
        self.shared.bytes_on_disk.store(self.log.bytes_on_disk(), Ordering::Relaxed);
        self.shared.bytes_written.store(counters.bytes_written, Ordering::Relaxed);
        self.shared.syncs.store(counters.syncs, Ordering::Relaxed);
        self.synced.send_replace(end);
        let mut permits = 0;
        let mut items = self.waiting.drain(..count).peekable();
        while let Some(item) = items.next() {
            permits += item.permits as usize;
            self.waiting_bytes -= item.bytes.len();
            // The last of a run of one sender speaks for the run.
            if items.peek().is_none_or(|next| !Arc::ptr_eq(&next.progress, &item.progress)) {
                item.progress.send_replace(item.ticket);
            }
        }
        drop(items);
        self.shared.room.add_permits(permits);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(text: &str) -> Entry {
        Entry::Forgotten { client: text.to_owned() }
    }

    fn open(directory: &std::path::Path, max_bytes: u64) -> OpenJournal {
        let options = Options { segment_bytes: 8 << 10, max_bytes, reserve_bytes: 64 };
        OpenJournal::open(directory.join("journal"), options).unwrap().0
    }

    fn read_all(reader: &mut Reader<Disk>) -> Vec<Entry> {
        let mut entries = Vec::new();
        while let Some(record) = reader.next().unwrap() {
            entries.push(Entry::read(bytes::Bytes::copy_from_slice(record.payload)).unwrap());
        }
        entries
    }

    #[tokio::test]
    async fn what_is_durable_is_read_back_in_order_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let journal = open(directory.path(), 1 << 20).run(Duration::from_millis(1)).unwrap();
        let (mut one, mut two) = (journal.sender(), journal.sender());
        for n in 0..200 {
            one.append(&entry(&format!("one {n}"))).await.unwrap();
            two.append(&entry(&format!("two {n}"))).await.unwrap();
        }
        one.durable().wait_for(|durable| *durable == 200).await.unwrap();
        two.durable().wait_for(|durable| *durable == 200).await.unwrap();
        let (_, _, syncs) = journal.bytes_and_syncs();
        assert!(syncs < 200, "{syncs} syncs for 400 entries: no group commit");
        journal.stop();
        let journal = open(directory.path(), 1 << 20);
        let entries = read_all(&mut journal.reader(Position(0)).unwrap());
        assert_eq!(entries.len(), 400);
        let of_one = entries.iter().filter(|e| matches!(e, Entry::Forgotten { client } if client.starts_with("one")));
        assert!(of_one.enumerate().all(|(n, e)| *e == entry(&format!("one {n}"))));
    }

    #[tokio::test]
    async fn a_full_journal_makes_senders_wait_until_something_is_freed() {
        let directory = tempfile::tempdir().unwrap();
        let open = open(directory.path(), 16 << 10);
        let mut reader = open.reader(Position(0)).unwrap();
        let journal = open.run(Duration::from_millis(1)).unwrap();
        let mut sender = journal.sender();
        let text = "x".repeat(200);
        let mut sent = 0;
        while !journal.is_full() {
            match sender.try_append(&entry(&text)) {
                Ok(_) => sent += 1,
                Err(TryAppendError::Full) => {}
                Err(error) => panic!("{error}"),
            }
            tokio::task::yield_now().await;
        }
        assert_eq!(sender.try_append(&entry("refused")), Err(TryAppendError::Full));
        let durable = *sender.durable().borrow();
        assert!(durable < sent, "{durable} of {sent}");
        let mut read = read_all(&mut reader).len() as u64;
        assert_eq!(read, durable);
        let mut progress = sender.durable();
        while read < sent {
            progress.borrow_and_update();
            journal.free_before(reader.position());
            if read == *progress.borrow() {
                progress.changed().await.unwrap();
            }
            read += read_all(&mut reader).len() as u64;
        }
        assert_eq!(read, sent);
    }
}
