//! Carries what a stream that cannot commit still needs to the head of the WAL, so that the segments it pinned can be
//! freed (rule 7).
//!
//! It begins when the WAL is half full and its oldest segment is pinned by a stream whose commits fail or hang. All of
//! the stream's uncommitted batches are appended again, in order, in steps between requests; meanwhile the stream is
//! pushed back, so its sequences stand in order behind the point where the carrying began, whatever else is freed. A
//! crash in the middle leaves some twice: recovery drops a known number. Batches that are not committed may fill a
//! quarter of the WAL, and room for the largest carry is kept free: half a carry would only fill the WAL.

use std::time::{Duration, Instant};

use segment_log::{AppendError, FileLayer, Position, ReadError};
use wire::StreamName;

use super::stream::Stream;
use super::{Fault, Ingest};
use crate::wal::{Found, Replay, Wal};

/// Batches that are not committed may fill so large a part of the WAL: one in four.
pub(super) const LIVE_SHARE: usize = 4;
/// Bytes of the WAL that one step reads at most.
const STEP_BYTES: u64 = 8 << 20;
/// After one that found no room the next is tried so much later.
const TRY_AGAIN: Duration = Duration::from_secs(10);
/// After one that could not be read: each try leaves a part of the copy, and those must not fill the WAL.
const TRY_AGAIN_UNREADABLE: Duration = Duration::from_secs(3_600);

/// One stream's move.
#[derive(Debug)]
pub(super) struct Carry<L: FileLayer> {
    pub(super) stream: StreamName,
    replay: Replay<L>,
    /// What lies here or behind is not the old copy.
    until: Position,
    /// Where the first batch that was carried lies now.
    first: Option<Position>,
}

enum Step {
    More,
    /// All of it lies from here on.
    Over(Position),
    /// There is no room.
    Full,
    /// The disk does not give back what it has.
    Unreadable,
}

impl<L: FileLayer> Carry<L> {
    fn begin(wal: &Wal<L>, stream: &Stream) -> Result<Option<Self>, ReadError> {
        let Some(from) = stream.hot.wal_from() else { return Ok(None) };
        let replay = wal.replay_from(from, stream.schemas())?;
        Ok(Some(Self { stream: stream.name.clone(), replay, until: wal.end(), first: None }))
    }

    fn step(&mut self, wal: &mut Wal<L>, stream: &mut Stream) -> Result<Step, Fault> {
        let mut step_end = None;
        loop {
            let replayed = match self.replay.next() {
                Ok(None) => break,
                Ok(Some(Found::Batch(replayed))) => replayed,
                Ok(Some(Found::Damaged(range))) => {
                    tracing::error!(range, "wal record lost; its rows are still in memory, and at their edge");
                    continue;
                }
                Err(error) => {
                    tracing::error!(stream = %self.stream, %error, "read the wal again");
                    return Ok(Step::Unreadable);
                }
            };
            if replayed.next > self.until {
                break;
            }
            let header = replayed.batch.header();
            if header.stream == stream.name && header.seq > stream.sequence(header.spool).committed().seq {
                let position =
                    match wal.append(&replayed.batch, &replayed.schema, replayed.received_at_us, replayed.write) {
                        Ok(position) => position,
                        Err(AppendError::Full) => return Ok(Step::Full),
                        Err(error) => return Err(Fault::Append(error)),
                    };
                self.first.get_or_insert(position);
            }
            let step_end = *step_end.get_or_insert(replayed.next.0 + STEP_BYTES);
            if replayed.next.0 >= step_end {
                return Ok(Step::More);
            }
        }
        wal.sync()?;
        Ok(Step::Over(self.first.unwrap_or(self.until)))
    }
}

impl<L: FileLayer> Ingest<L> {
    /// The stream that keeps the oldest segment, when the WAL is half full and freeing that segment would help.
    pub(super) fn pins_wal(&self) -> Option<StreamName> {
        if self.wal.bytes() <= self.settings.wal.max_bytes.0 / 2 {
            return None;
        }
        let pins = self.streams.values().filter_map(|stream| Some((stream.hot.wal_from()?, &stream.name)));
        let (from, name) = pins.min()?;
        (from < self.wal.newest_segment()).then(|| name.clone())
    }

    /// Bytes of the WAL that the carry of a stream with so many may need.
    pub(super) fn carry_room(&self, largest: usize) -> usize {
        // Records have headers, segments have ends, and schemas are there again.
        largest + largest / 4 + self.settings.wal.segment_bytes.bytes()
    }

    /// Goes on with a carry, or begins one for the stream that pins the WAL.
    pub(super) fn carry(&mut self, pins: Option<StreamName>) -> Result<(), Fault> {
        if self.carry.is_none() {
            let early = self.carry_not_before.is_some_and(|until| until > Instant::now());
            let Some(stream) = pins.and_then(|name| self.streams.get(&name)).filter(|_| !early) else { return Ok(()) };
            let room = self.carry_room(stream.hot.wal_bytes());
            let fits = self.wal.bytes() as usize + room <= self.settings.wal.max_bytes.bytes();
            if !stream.commits.struggle() || !fits {
                return Ok(());
            }
            match Carry::begin(&self.wal, stream) {
                Ok(carry) => self.carry = carry,
                Err(error) => {
                    tracing::error!(stream = %stream.name, %error, "read the wal again");
                    self.carry_not_before = Some(Instant::now() + TRY_AGAIN_UNREADABLE);
                }
            }
        }
        let Some(mut carry) = self.carry.take() else { return Ok(()) };
        let stream = self.streams.get_mut(&carry.stream).filter(|stream| !stream.hot.is_empty());
        // It could be committed after all.
        let Some(stream) = stream else { return Ok(()) };
        match carry.step(&mut self.wal, stream)? {
            Step::More => self.carry = Some(carry),
            Step::Full => self.carry_not_before = Some(Instant::now() + TRY_AGAIN),
            Step::Unreadable => self.carry_not_before = Some(Instant::now() + TRY_AGAIN_UNREADABLE),
            Step::Over(to) => {
                tracing::info!(stream = %stream.name, from = %to, "carried to the head of the wal: it cannot commit");
                stream.hot.moved_in_wal(to);
                self.metrics.wal_carried.add(1);
                self.free()?;
            }
        }
        Ok(())
    }
}
