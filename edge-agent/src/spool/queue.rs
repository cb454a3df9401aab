//! The batches of a lane that have no number yet, each stream's in the order in which they came.
//!
//! Memory does not grow with each of them. They are kept in blocks: about [`BLOCK_BATCHES`] batches that stand one behind the
//! other in one segment. The newest block and those that were asked for last are here batch by batch, 48 bytes each. Of
//! any other block only this is here: for each stream what its batches come to, and which of them still wait, one bit for
//! [`SLOT_BYTES`] of the log; it is read from the log again when it is asked for. So memory is at most [`HERE_MAX`] blocks, a
//! 512th of what the lane may take on disk, and 56 bytes for each stream in a block. Beside that, batches that a full lane
//! has moved to its end stay here, about 150 bytes each.
//!
//! A batch of a block that can no longer be read when the block is, waits on as one whose rows have rotted: it becomes void
//! when it is numbered, and its rows are counted as lost then.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use segment_log::{FileLayer, Position, ReadError, SegmentLog};
use wire::{CutBatch, StreamName, TS_MIN_US};

use super::Waiting;
use super::record::{self, Place};

/// A block ends with the cut that brings so many.
const BLOCK_BATCHES: u32 = if cfg!(test) { 6 } else { 1_024 };
/// Blocks that are here batch by batch, the newest among them.
const HERE_MAX: usize = if cfg!(test) { 2 } else { 8 };
/// A batch is never shorter on disk: its header alone is longer.
const SLOT_BYTES: u64 = 64;

/// All that wait in a lane.
#[derive(Debug, Default)]
pub(super) struct Queues {
    lane: usize,
    /// By the position of their first record.
    blocks: BTreeMap<u64, Block>,
    streams: BTreeMap<StreamName, Queue>,
    /// Of the streams, in the order of their first batch.
    names: Vec<StreamName>,
    /// Counts what was asked for.
    clock: u64,
}

/// What waits of one stream.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// Index in `names`.
    id: u32,
    pub(super) batches: usize,
    pub(super) rows: u64,
    pub(super) bytes: u64,
    /// What stands elsewhere than where it came. All of it came before what is in blocks.
    moved: VecDeque<Waiting>,
    parts: VecDeque<Part>,
}

/// What a block has of a stream, at least one batch.
#[derive(Debug)]
struct Part {
    block: u64,
    /// Its first and last record.
    first: u64,
    last: u64,
    rows: u64,
    bytes: u64,
    /// No batch was sealed before, of those that tell the time.
    oldest_us: i64,
    batches: u32,
}

#[derive(Debug)]
struct Block {
    segment: u64,
    /// Its last record.
    last: u64,
    came: u32,
    waiting: u32,
    /// When it was asked for last.
    used: u64,
    /// Something in it could not be read: it stays here.
    rotted: bool,
    batches: Batches,
}

#[derive(Debug)]
enum Batches {
    /// In the order in which they came.
    Here(Vec<Entry>),
    /// Which of those in the log: a bit for each slot.
    There(Vec<u64>),
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    group: u64,
    min_ts: i64,
    max_ts: i64,
    sealed_us: i64,
    index: u32,
    stream: u32,
    rows: u32,
    bytes: u32,
}

impl Entry {
    fn new(stream: u32, waiting: &Waiting) -> Self {
        let Waiting { place: Place { group, index, .. }, rows, bytes, min_ts, max_ts, sealed_us, .. } = *waiting;
        Self { group, min_ts, max_ts, sealed_us, index, stream, rows, bytes: u32::try_from(bytes).unwrap_or(u32::MAX) }
    }

    fn place(&self) -> (u64, u32) {
        (self.group, self.index)
    }
}

impl Queue {
    /// The record of the one that waits longest.
    pub(super) fn first(&self) -> u64 {
        let moved = self.moved.front().map(|waiting| waiting.place.group);
        moved.or(self.parts.front().map(|part| part.first)).unwrap_or(0)
    }

    /// The record that brought the last one.
    pub(super) fn newest(&self) -> u64 {
        let part = self.parts.back().map(|part| part.last);
        part.or(self.moved.back().map(|waiting| waiting.came.0)).unwrap_or(0)
    }

    /// Nothing was sealed before this, of what tells the time.
    pub(super) fn oldest_us(&self) -> i64 {
        let moved = self.moved.iter().map(|waiting| known_us(waiting.sealed_us));
        self.parts.iter().map(|part| part.oldest_us).chain(moved).min().unwrap_or(i64::MAX)
    }

    fn less(&mut self, rows: u32, bytes: usize) {
        self.batches -= 1;
        self.rows -= u64::from(rows);
        self.bytes -= bytes as u64;
    }
}

fn known_us(sealed_us: i64) -> i64 {
    if sealed_us < TS_MIN_US { i64::MAX } else { sealed_us }
}

impl Queues {
    pub(super) fn new(lane: usize) -> Self {
        Self { lane, ..Self::default() }
    }

    /// The streams that have something.
    pub(super) fn streams(&self) -> impl DoubleEndedIterator<Item = (&StreamName, &Queue)> {
        self.streams.iter().filter(|(_, queue)| queue.batches > 0)
    }

    pub(super) fn of(&self, stream: &StreamName) -> Option<&Queue> {
        self.streams.get(stream).filter(|queue| queue.batches > 0)
    }

    fn queue(&mut self, stream: &StreamName) -> &mut Queue {
        if !self.streams.contains_key(stream) {
            let queue = Queue { id: self.names.len() as u32, ..Queue::default() };
            self.names.push(stream.clone());
            self.streams.insert(stream.clone(), queue);
        }
        self.streams.get_mut(stream).expect("it was put there")
    }

    /// A batch that came now, in a record of this segment.
    pub(super) fn push(&mut self, segment: u64, waiting: &Waiting) {
        let group = waiting.place.group;
        let newest = self.blocks.last_key_value();
        let goes_on = newest.is_some_and(|(_, block)| {
            let is_here = matches!(block.batches, Batches::Here(_));
            block.last == group || (is_here && block.segment == segment && block.came < BLOCK_BATCHES && !block.rotted)
        });
        if !goes_on {
            let batches = Batches::Here(Vec::new());
            let block = Block { segment, last: group, came: 0, waiting: 0, used: self.clock, rotted: false, batches };
            self.blocks.insert(group, block);
            self.send_away(group);
        }
        let entry = Entry::new(self.queue(&waiting.stream).id, waiting);
        let mut last = self.blocks.last_entry().expect("there is one");
        let start = *last.key();
        let block = last.get_mut();
        (block.last, block.came, block.waiting) = (group, block.came + 1, block.waiting + 1);
        match &mut block.batches {
            Batches::Here(entries) => entries.push(entry),
            Batches::There(_) => unreachable!("the newest block is not sent away"),
        }
        let queue = self.queue(&waiting.stream);
        queue.batches += 1;
        queue.rows += u64::from(entry.rows);
        queue.bytes += u64::from(entry.bytes);
        if queue.parts.back().is_none_or(|part| part.block != start) {
            let oldest_us = i64::MAX;
            queue.parts.push_back(Part {
                block: start,
                first: group,
                last: group,
                rows: 0,
                bytes: 0,
                oldest_us,
                batches: 0,
            });
        }
        let part = queue.parts.back_mut().expect("there is one");
        part.last = group;
        part.rows += u64::from(entry.rows);
        part.bytes += u64::from(entry.bytes);
        part.oldest_us = part.oldest_us.min(known_us(entry.sealed_us));
        part.batches += 1;
    }

    /// A batch that stands elsewhere now than where it came.
    pub(super) fn push_moved(&mut self, waiting: Waiting) {
        let queue = self.queue(&waiting.stream);
        queue.batches += 1;
        queue.rows += u64::from(waiting.rows);
        queue.bytes += waiting.bytes as u64;
        let at = queue.moved.partition_point(|other| other.came < waiting.came);
        queue.moved.insert(at, waiting);
    }

    /// Shows the batches of a stream that came before the record `until`, in their order or from the newest back, until
    /// `visit` has enough.
    pub(super) fn walk<L: FileLayer>(
        &mut self,
        log: &SegmentLog<L>,
        stream: &StreamName,
        (until, back): (u64, bool),
        mut visit: impl FnMut(Waiting) -> bool,
    ) -> Result<(), ReadError> {
        let Some(Queue { id, parts, moved, .. }) = self.streams.get(stream) else { return Ok(()) };
        let (id, parts, moved) = (*id, parts.len(), moved.len());
        // Both stand still meanwhile: what is brought here is what was there.
        for step in 0..parts + moved {
            let at = if back { parts + moved - 1 - step } else { step };
            let queue = &self.streams[stream];
            if at < moved {
                if queue.moved[at].came.0 < until && !visit(queue.moved[at].clone()) {
                    return Ok(());
                }
                continue;
            }
            let block = queue.parts[at - moved].block;
            if block >= until {
                continue;
            }
            self.bring(log, block)?;
            let Batches::Here(entries) = &self.blocks[&block].batches else { continue };
            let all = entries.iter().filter(|entry| entry.stream == id && entry.group < until);
            let mut all = all.map(|entry| self.shown(entry));
            let goes_on = if back { all.by_ref().rev().all(&mut visit) } else { all.all(&mut visit) };
            if !goes_on {
                return Ok(());
            }
        }
        Ok(())
    }

    fn shown(&self, entry: &Entry) -> Waiting {
        let Entry { group, min_ts, max_ts, sealed_us, index, stream, rows, bytes } = *entry;
        Waiting {
            place: Place { lane: self.lane, group, index },
            stream: self.names[stream as usize].clone(),
            rows,
            bytes: bytes as usize,
            min_ts,
            max_ts,
            came: (group, index),
            sealed_us,
        }
    }

    /// The batch of a place, when it waits; `stream` is all that is known of its stream.
    pub(super) fn find<L: FileLayer>(
        &mut self,
        log: &SegmentLog<L>,
        stream: Option<&StreamName>,
        place: Place,
    ) -> Result<Option<Waiting>, ReadError> {
        if let Some((start, at)) = self.locate(log, place)?
            && let Batches::Here(entries) = &self.blocks[&start].batches
        {
            return Ok(Some(self.shown(&entries[at])));
        }
        let queues = self.streams.iter().filter(|(name, _)| stream.is_none_or(|stream| stream == *name));
        let mut moved = queues.flat_map(|(_, queue)| &queue.moved);
        Ok(moved.find(|waiting| waiting.place == place).cloned())
    }

    /// Takes the batch of a place out, when it waits.
    pub(super) fn take<L: FileLayer>(
        &mut self,
        log: &SegmentLog<L>,
        stream: Option<&StreamName>,
        place: Place,
    ) -> Result<Option<Waiting>, ReadError> {
        let Some(taken) = self.find(log, stream, place)? else { return Ok(None) };
        let located = self.locate(log, place)?;
        let queue = self.streams.get_mut(&taken.stream).expect("it is where it was found");
        queue.less(taken.rows, taken.bytes);
        let Some((start, at)) = located else {
            queue.moved.retain(|waiting| waiting.place != place);
            return Ok(Some(taken));
        };
        let block = self.blocks.get_mut(&start).expect("it is where it was found");
        let Batches::Here(entries) = &mut block.batches else { return Ok(Some(taken)) };
        let entry = entries.remove(at);
        let part_at = queue.parts.partition_point(|part| part.block < start);
        let part = &mut queue.parts[part_at];
        part.batches -= 1;
        part.rows -= u64::from(entry.rows);
        part.bytes -= u64::from(entry.bytes);
        if part.batches == 0 {
            queue.parts.remove(part_at);
        } else {
            let is_its = |other: &&Entry| other.stream == entry.stream;
            part.first = entries.iter().find(is_its).map_or(part.first, |first| first.group);
            part.last = entries.iter().rev().find(is_its).map_or(part.last, |last| last.group);
        }
        block.waiting -= 1;
        if block.waiting == 0 {
            self.blocks.remove(&start);
        }
        Ok(Some(taken))
    }

    /// The block of a place and the index in it, when it waits there.
    fn locate<L: FileLayer>(&mut self, log: &SegmentLog<L>, place: Place) -> Result<Option<(u64, usize)>, ReadError> {
        let Some((&start, block)) = self.blocks.range(..=place.group).next_back() else { return Ok(None) };
        if place.group > block.last {
            return Ok(None);
        }
        self.bring(log, start)?;
        let Batches::Here(entries) = &self.blocks[&start].batches else { return Ok(None) };
        // Not a binary search by the place: what has rotted stands first.
        let at = match self.blocks[&start].rotted {
            false => entries.binary_search_by_key(&(place.group, place.index), Entry::place).ok(),
            true => entries.iter().position(|entry| entry.place() == (place.group, place.index)),
        };
        Ok(at.map(|at| (start, at)))
    }

    /// Makes a block's batches be here.
    fn bring<L: FileLayer>(&mut self, log: &SegmentLog<L>, start: u64) -> Result<(), ReadError> {
        self.clock += 1;
        let block = self.blocks.get_mut(&start).expect("parts and blocks go together");
        block.used = self.clock;
        let (last, Batches::There(waits)) = (block.last, &block.batches) else { return Ok(()) };
        let waits = |place: Place| {
            let slot = slot(start, place.group, place.index);
            waits.get(slot / 64).is_some_and(|word| word >> (slot % 64) & 1 == 1)
        };
        let mut entries = Vec::with_capacity(block.waiting as usize);
        let mut reader = log.reader(Position(start))?;
        while reader.position().0 <= last {
            let record = match reader.next() {
                Ok(Some(record)) if record.position.0 <= last => record,
                Ok(_) => break,
                Err(ReadError::Damaged { .. }) => continue,
                Err(error) => return Err(error),
            };
            let group = record.position.0;
            let Some((sealed_us, batches)) = brought(self.lane, record.kind, Bytes::copy_from_slice(record.payload))
            else {
                continue;
            };
            for (index, batch) in (0..).zip(&batches) {
                let place = Place { lane: self.lane, group, index };
                if waits(place)
                    && let Some(queue) = self.streams.get(&batch.stream)
                {
                    entries.push(Entry::new(queue.id, &Waiting::new(place, batch, (group, index), sealed_us)));
                }
            }
        }
        let mut rotted = self.missing(start, &entries);
        let block = self.blocks.get_mut(&start).expect("it was there");
        block.rotted = !rotted.is_empty();
        rotted.append(&mut entries);
        block.batches = Batches::Here(rotted);
        self.send_away(start);
        Ok(())
    }

    /// What should be in a block and was not read: the rows of a stream stand in the first of its batches.
    fn missing(&self, start: u64, entries: &[Entry]) -> Vec<Entry> {
        let mut missing: Vec<Entry> = Vec::new();
        for queue in self.streams.values() {
            let at = queue.parts.partition_point(|part| part.block < start);
            let Some(part) = queue.parts.get(at).filter(|part| part.block == start) else { continue };
            let (mut batches, mut rows, mut bytes) = (part.batches, part.rows, part.bytes);
            for entry in entries.iter().filter(|entry| entry.stream == queue.id) {
                batches -= 1;
                rows -= u64::from(entry.rows);
                bytes -= u64::from(entry.bytes);
            }
            for _ in 0..batches {
                let index = u32::MAX - missing.len() as u32;
                let (rows, bytes) = (std::mem::take(&mut rows) as u32, std::mem::take(&mut bytes) as u32);
                let sealed_us = record::SEALED_UNKNOWN;
                missing.push(Entry {
                    group: start,
                    min_ts: 0,
                    max_ts: 0,
                    sealed_us,
                    index,
                    stream: queue.id,
                    rows,
                    bytes,
                });
            }
        }
        missing
    }

    /// How many batches are here one by one, and how many may be.
    #[cfg(test)]
    pub(super) fn here(&self) -> (usize, usize) {
        let here = self.blocks.values().map(|block| match &block.batches {
            Batches::Here(entries) => entries.len(),
            Batches::There(_) => 0,
        });
        (here.sum(), HERE_MAX * BLOCK_BATCHES as usize)
    }

    /// Keeps few blocks here: `wanted`, the newest, and what was asked for last.
    fn send_away(&mut self, wanted: u64) {
        let newest = self.blocks.last_key_value().map(|(start, _)| *start);
        let goes = |(start, block): &(&u64, &Block)| {
            **start != wanted && Some(**start) != newest && !block.rotted && matches!(block.batches, Batches::Here(_))
        };
        while self.blocks.iter().filter(goes).count() + 2 > HERE_MAX {
            let Some((&start, _)) = self.blocks.iter().filter(goes).min_by_key(|(_, block)| block.used) else { return };
            let Some(block) = self.blocks.get_mut(&start) else { return };
            let Batches::Here(entries) = &block.batches else { return };
            let most = entries.iter().map(|entry| slot(start, entry.group, entry.index)).max().unwrap_or(0);
            let mut waits = vec![0_u64; most / 64 + 1];
            for slot in entries.iter().map(|entry| slot(start, entry.group, entry.index)) {
                waits[slot / 64] |= 1 << (slot % 64);
            }
            block.batches = Batches::There(waits);
        }
    }
}

/// No two batches of a block have the same: each is longer than a slot.
fn slot(start: u64, group: u64, index: u32) -> usize {
    ((group - start) / SLOT_BYTES) as usize + index as usize
}

/// The batches that came with a record.
fn brought(lane: usize, kind: u8, payload: Bytes) -> Option<(i64, Vec<CutBatch>)> {
    let (kind, first) = record::kind(kind);
    match kind {
        record::GROUP | record::PART => record::read_group(payload).map(|group| (group.sealed_us, group.batches)),
        record::DROPPED => {
            let dropped = record::read_dropped(lane, payload, first)?;
            Some((record::SEALED_UNKNOWN, vec![dropped.losses]))
        }
        _ => None,
    }
}
