//! Which commands were begun, and what became of them: on disk before anything is done, so that none is done twice.
//!
//! A log of its own in `<data_dir>/commands`. Records, version 1 (`str8` is a length byte and UTF-8, `str16` a little-endian u16
//! length):
//! ```text
//! version u8 = 1 | kind u8 | id str8
//! kind 1 begun
//! kind 2 ended     ok u8 | answer str16
//! ```
//! The last [`IDS_MAX`] commands are remembered: more than can be begun while one of them may come again, which is its time
//! limit, at the rate of [`super::allowed::ALL`]. Segments that are older are freed.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;

use bytes::{Buf, Bytes};
use parking_lot::Mutex;
use segment_log::{Disk, OpenError, Options, Position, ReadError, SegmentLog};
use wire::CommandReply;

/// Commands that are remembered.
pub(super) const IDS_MAX: usize = 4_096;
const RECORD_KIND: u8 = 1;
const VERSION: u8 = 1;
const BEGUN: u8 = 1;
const ENDED: u8 = 2;
/// A command takes at most some 1,400 bytes.
const OPTIONS: Options = Options { segment_bytes: 256 << 10, max_bytes: 16 << 20, reserve_bytes: 4 << 10 };

/// What is known of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Known {
    /// And its end was never noted.
    Begun,
    Ended(CommandReply),
}

/// Why nothing is noted.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemoryError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("read the record of commands")]
    Read(#[from] ReadError),
    #[error("write the record of commands: {0}")]
    Write(String),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Memory {
    log: Arc<Mutex<SegmentLog<Disk>>>,
    known: HashMap<String, Known>,
    /// In the order in which they were begun, and where.
    order: VecDeque<(String, Position)>,
}

impl Memory {
    /// Reads what the runs before have noted. Blocks.
    pub(super) fn open(directory: &Path) -> Result<Self, MemoryError> {
        let (log, opening) = SegmentLog::open(Disk, directory, OPTIONS)?;
        for damage in &opening.incidents {
            tracing::error!(?damage, "the record of commands is damaged: one that is in it may be done again");
        }
        let (mut known, mut order) = (HashMap::new(), VecDeque::new());
        let mut reader = log.reader(opening.start)?;
        loop {
            match reader.next() {
                Ok(Some(record)) => {
                    let position = record.position;
                    if let Some((id, state)) = read(Bytes::copy_from_slice(record.payload))
                        && known.insert(id.clone(), state).is_none()
                    {
                        order.push_back((id, position));
                    }
                }
                Ok(None) => break,
                Err(ReadError::Damaged { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let mut memory = Self { log: Arc::new(Mutex::new(log)), known, order };
        memory.forget();
        Ok(memory)
    }

    pub(super) fn known(&self, id: &str) -> Option<Known> {
        self.known.get(id).cloned()
    }

    /// It is durable when this returns.
    pub(super) async fn begin(&mut self, id: &str) -> Result<(), MemoryError> {
        let oldest = self.forget();
        let position = self.append(record(id, None), oldest).await?;
        self.known.insert(id.to_owned(), Known::Begun);
        self.order.push_back((id.to_owned(), position));
        Ok(())
    }

    /// As [`Self::begin`].
    pub(super) async fn end(&mut self, id: &str, reply: &CommandReply) -> Result<(), MemoryError> {
        self.known.insert(id.to_owned(), Known::Ended(reply.clone()));
        self.append(record(id, Some(reply)), None).await.map(drop)
    }

    /// Makes room for one more. Returns where what is remembered begins, when something was forgotten.
    fn forget(&mut self) -> Option<Position> {
        let mut forgotten = false;
        while self.order.len() >= IDS_MAX {
            let Some((id, _)) = self.order.pop_front() else { break };
            self.known.remove(&id);
            forgotten = true;
        }
        self.order.front().filter(|_| forgotten).map(|(_, position)| *position)
    }

    async fn append(&self, record: Vec<u8>, free_before: Option<Position>) -> Result<Position, MemoryError> {
        let log = Arc::clone(&self.log);
        let written = tokio::task::spawn_blocking(move || {
            let mut log = log.lock();
            if let Some(position) = free_before {
                log.free_before(position).map_err(|error| error.to_string())?;
            }
            let appended = log.append(RECORD_KIND, &record).map_err(|error| error.to_string())?;
            // One that failed is final: every later one fails, and nothing is done.
            log.sync().map_err(|error| error.to_string())?;
            Ok(appended.position)
        });
        written.await.map_err(|error| MemoryError::Write(error.to_string()))?.map_err(MemoryError::Write)
    }
}

fn record(id: &str, reply: Option<&CommandReply>) -> Vec<u8> {
    let mut bytes = vec![VERSION, if reply.is_some() { ENDED } else { BEGUN }, id.len() as u8];
    bytes.extend_from_slice(id.as_bytes());
    if let Some(reply) = reply {
        bytes.push(u8::from(reply.ok));
        bytes.extend((reply.answer.len() as u16).to_le_bytes());
        bytes.extend_from_slice(reply.answer.as_bytes());
    }
    bytes
}

/// None of another version.
fn read(mut bytes: Bytes) -> Option<(String, Known)> {
    let (version, kind, length) = (bytes.try_get_u8().ok()?, bytes.try_get_u8().ok()?, bytes.try_get_u8().ok()?);
    let text = |bytes: &mut Bytes, length: usize| {
        let text = (bytes.len() >= length).then(|| bytes.split_to(length))?;
        String::from_utf8(text.into()).ok()
    };
    let id = text(&mut bytes, usize::from(length)).filter(|_| version == VERSION)?;
    match kind {
        BEGUN => Some((id, Known::Begun)),
        ENDED => {
            let (ok, length) = (bytes.try_get_u8().ok()? == 1, bytes.try_get_u16_le().ok()?);
            let answer = text(&mut bytes, usize::from(length))?;
            Some((id, Known::Ended(CommandReply { ok, answer })))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::allowed::ALL;
    use super::*;

    #[tokio::test]
    async fn what_was_begun_is_known_after_a_crash() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("commands");
        let mut memory = Memory::open(&path).unwrap();
        memory.begin("a").await.unwrap();
        memory.begin("b").await.unwrap();
        memory.end("a", &CommandReply::done("é")).await.unwrap();
        drop(memory);
        let memory = Memory::open(&path).unwrap();
        assert_eq!(memory.known("a"), Some(Known::Ended(CommandReply::done("é"))));
        assert_eq!((memory.known("b"), memory.known("c")), (Some(Known::Begun), None));
    }

    #[test]
    fn the_bytes_of_version_1_never_change() {
        assert_eq!(record("a-1", None), b"\x01\x01\x03a-1");
        let ended = record("a-1", Some(&CommandReply::done("yes")));
        assert_eq!(ended, b"\x01\x02\x03a-1\x01\x03\x00yes");
        for cut in 0..ended.len() {
            assert_eq!(read(Bytes::copy_from_slice(&ended[..cut])), None, "{cut}");
        }
        assert_eq!(read(Bytes::from_static(b"\x02\x01\x01a")), None, "of another version");
    }

    #[tokio::test]
    async fn the_oldest_are_forgotten_and_not_before_they_can_come_again() {
        let most =
            f64::from(ALL.count) * (1.0 + wire::command::COMMAND_TIMEOUT_MAX.as_secs_f64() / ALL.per.as_secs_f64());
        assert!(most < IDS_MAX as f64, "{most}");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("commands");
        let mut memory = Memory::open(&path).unwrap();
        // As if they had been begun.
        for n in 0..IDS_MAX {
            let id = format!("{n}");
            memory.known.insert(id.clone(), Known::Begun);
            memory.order.push_back((id, Position(0)));
        }
        memory.begin("new").await.unwrap();
        assert_eq!((memory.known("0"), memory.known("1")), (None, Some(Known::Begun)));
        assert_eq!(memory.order.len(), IDS_MAX);
        assert!(OPTIONS.max_bytes > (IDS_MAX * 1_500) as u64, "they have room");
    }
}
