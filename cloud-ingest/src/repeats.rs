//! What the doors of this node have taken lately, so that a request that comes again is not stored twice.
//!
//! Each batch that a door makes has a [`WriteId`], a hash of what was sent. An id lies in the record of its batch in the WAL,
//! so both are durable or neither is, and here, in a log of its own that is synced before the WAL is freed: it outlives
//! the batch. It is forgotten after a time, or when there are too many. The log's id, made with its directory, is the spool
//! that this node numbers the batches of its doors in.
//! ```text
//! record, kind 1: received_at i64 LE, µs since 1970 | id [16]
//! ```

use std::collections::{HashMap, VecDeque};
use std::path::Path;

use segment_log::{
    AppendError, FileLayer, FreeError, OpenError, Opening, Options, Position, ReadError, SegmentLog, SyncError,
};
use wire::SpoolId;

const KIND_ID: u8 = 1;
/// A record with what the log has around it.
const RECORD_BYTES: u64 = 64;
/// So many segments hold all ids.
const SEGMENTS: u64 = 16;
const SEGMENT_BYTES: std::ops::RangeInclusive<u64> = 64 << 10..=4 << 20;
const RESERVE_BYTES: u64 = 4 << 10;

/// What was sent, as the first 16 bytes of a SHA-256; random for what may rightly come again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WriteId(pub [u8; 16]);

/// Why the ids cannot be read at the start.
#[derive(Debug, thiserror::Error)]
pub enum RepeatsError {
    #[error("open the log of what the doors took")]
    Open(#[from] OpenError),
    #[error("read the log of what the doors took")]
    Read(#[from] ReadError),
}

/// The ids, in memory and on disk.
#[derive(Debug)]
pub(crate) struct Repeats<L: FileLayer> {
    log: SegmentLog<L>,
    known: HashMap<WriteId, i64>,
    /// The oldest in front, with the place of its record if it has one.
    order: VecDeque<(i64, WriteId, Option<Position>)>,
    within_us: i64,
    ids_max: usize,
}

impl<L: FileLayer> Repeats<L> {
    /// Opens the log in a directory, or makes it there.
    pub(crate) fn open(
        layer: L,
        directory: &Path,
        within_us: i64,
        ids_max: usize,
    ) -> Result<(Self, Opening), RepeatsError> {
        let all_bytes = (ids_max as u64).saturating_mul(RECORD_BYTES);
        let segment_bytes = (all_bytes / SEGMENTS).clamp(*SEGMENT_BYTES.start(), *SEGMENT_BYTES.end());
        let max_bytes = all_bytes.saturating_add(4 * segment_bytes);
        let options = Options { segment_bytes, max_bytes, reserve_bytes: RESERVE_BYTES };
        let (log, opening) = SegmentLog::open(layer, directory, options)?;
        let mut repeats = Self { log, known: HashMap::new(), order: VecDeque::new(), within_us, ids_max };
        let mut reader = repeats.log.reader(repeats.log.start())?;
        loop {
            match reader.next() {
                Ok(None) => return Ok((repeats, opening)),
                Ok(Some(record)) => {
                    if let Some((at, id)) = read(record.kind, record.payload) {
                        repeats.known.insert(id, at);
                        repeats.order.push_back((at, id, Some(record.position)));
                    }
                }
                Err(error @ ReadError::Damaged { .. }) => {
                    tracing::error!(%error, "what the doors took then may be taken again");
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The spool of this node's doors.
    pub(crate) fn spool(&self) -> SpoolId {
        SpoolId(self.log.id().0)
    }

    pub(crate) fn contains(&self, id: WriteId) -> bool {
        self.known.contains_key(&id)
    }

    /// Remembers a batch that was appended to the WAL; durable with [`Repeats::sync`].
    pub(crate) fn insert(&mut self, id: WriteId, at_us: i64) -> Result<(), AppendError> {
        if self.known.insert(id, at_us).is_some() {
            return Ok(());
        }
        let record = [&at_us.to_le_bytes()[..], &id.0].concat();
        let position = match self.log.append(KIND_ID, &record) {
            Ok(appended) => Some(appended.position),
            Err(AppendError::Full) => {
                tracing::warn!("the disk is full: what the doors take is remembered until the next start only");
                None
            }
            Err(error) => return Err(error),
        };
        self.order.push_back((at_us, id, position));
        Ok(())
    }

    /// Makes what was inserted durable. To be called before the WAL is freed.
    pub(crate) fn sync(&mut self) -> Result<(), SyncError> {
        self.log.sync().map(|_| ())
    }

    /// So that damage in what is there will not pass for a torn tail.
    pub(crate) fn mark(&mut self) -> Result<(), SyncError> {
        self.log.mark()
    }

    /// Forgets what is too old, and the oldest of too many.
    pub(crate) fn expire(&mut self, now_us: i64) -> Result<(), FreeError> {
        let before = self.order.len();
        while let Some((at, id, _)) = self.order.front() {
            if at.saturating_add(self.within_us) > now_us && self.order.len() <= self.ids_max {
                break;
            }
            self.known.remove(id);
            self.order.pop_front();
        }
        if self.order.len() < before {
            let oldest = self.order.iter().find_map(|(_, _, position)| *position);
            self.log.free_before(oldest.unwrap_or(self.log.end()))?;
        }
        Ok(())
    }
}

fn read(kind: u8, payload: &[u8]) -> Option<(i64, WriteId)> {
    let (at, id) = payload.split_first_chunk::<8>()?;
    (kind == KIND_ID).then_some((i64::from_le_bytes(*at), WriteId(id.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use segment_log::sim::SimLayer;

    use super::*;
    use crate::store::tests::sim_machine;

    fn id(n: u64) -> WriteId {
        WriteId([n.to_le_bytes(), [7; 8]].concat().try_into().unwrap())
    }

    fn open(layer: &SimLayer) -> Repeats<SimLayer> {
        Repeats::open(layer.clone(), Path::new("/doors"), 1_000, 5_000).unwrap().0
    }

    #[test]
    fn ids_outlive_a_restart_and_are_forgotten_in_time() {
        let layer = sim_machine();
        let mut repeats = open(&layer);
        let spool = repeats.spool();
        for n in 0..10 {
            repeats.insert(id(n), n as i64 * 100).unwrap();
        }
        repeats.sync().unwrap();
        drop(repeats);
        let mut repeats = open(&layer);
        assert_eq!(repeats.spool(), spool, "the spool stays");
        assert!((0..10).all(|n| repeats.contains(id(n))));
        repeats.expire(1_200).unwrap();
        let kept: Vec<u64> = (0..10).filter(|n| repeats.contains(id(*n))).collect();
        assert_eq!(kept, [3, 4, 5, 6, 7, 8, 9]);
    }

    #[test]
    fn neither_memory_nor_disk_grow_above_what_is_set() {
        let mut repeats = open(&sim_machine());
        for n in 0..40_000 {
            repeats.insert(id(n), 0).unwrap();
            repeats.expire(0).unwrap();
        }
        assert_eq!((repeats.known.len(), repeats.order.len()), (5_000, 5_000));
        assert!(repeats.contains(id(39_999)) && !repeats.contains(id(34_999)));
        assert!(repeats.log.bytes_on_disk() <= 1 << 20, "{}", repeats.log.bytes_on_disk());
    }
}
