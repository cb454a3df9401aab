//! From what waits to numbered batches: the number when a batch is first sent, the same bytes again later, and the void
//! batch that takes a number's place.
//!
//! Promises: a number is synced before its bytes leave, and never has two contents. What has rotted, with a number or
//! before it got one, becomes a void batch; its rows are counted as lost in the same record.

use bytes::Bytes;
use segment_log::{FileLayer, Position, ReadError};
use wire::sealed::BatchHeader;
use wire::{CutBatch, Mark, SealedBatch, Seq, StreamName};

use super::record::{self, Place};
use super::{Numbered, Spool, SpoolError, Waiting, losses};
use crate::failpoint;

impl<L: FileLayer> Spool<L> {
    /// Numbers waiting batches of one stream in a lane, up to `bytes_max` and at least one, and syncs the numbers; the
    /// bytes may leave when this returns. Live ones first, then the oldest of the backlog.
    ///
    /// # Errors
    /// `Full` when even the reserve is used up: acks must free something first.
    pub fn number(
        &mut self,
        lane: usize,
        stream: &StreamName,
        bytes_max: usize,
    ) -> Result<Vec<SealedBatch>, SpoolError> {
        let chosen = self.choose(lane, stream, bytes_max)?;
        let mut sealed = Vec::new();
        for waiting in chosen {
            let before = self.head(stream);
            let batch = match self.read(waiting.place)? {
                Some(batch) => batch.number(&self.settings.edge, self.id, before.seq.next(), before.crc),
                None => {
                    // It rotted before it had a number: a void batch says so in the sequence.
                    let times = (waiting.min_ts, waiting.max_ts);
                    SealedBatch::void(self.header(stream, times, before), "rotted on the edge's disk", 0)
                }
            };
            let mark = Mark { seq: before.seq.next(), crc: batch.crc() };
            match self.put(lane, record::NUMBERED, &record::numbered(waiting.place, stream, mark), &[], true) {
                Err(SpoolError::Full(_)) if !sealed.is_empty() => break,
                other => other?,
            };
            let rotted = batch.header().void.is_some();
            let sequence = self.sequences.entry(stream.clone()).or_default();
            sequence.head = mark;
            sequence.numbered.push_back(Numbered {
                place: waiting.place,
                mark,
                rows: waiting.rows,
                bytes: waiting.bytes,
                void: None,
            });
            self.lanes[lane].take(Some(stream), waiting.place)?;
            if rotted {
                self.put_void(&batch, false)?;
            }
            sealed.push(batch);
        }
        failpoint::reach("number.put");
        self.sync_numbers(lane)?;
        failpoint::reach("number.synced");
        Ok(sealed)
    }

    /// What goes next of a stream, in the order of its numbers: what has come since the last choice, at least the newest,
    /// before what is older. So what is live waits for one request, however much waits behind it.
    fn choose(&mut self, lane: usize, stream: &StreamName, bytes_max: usize) -> Result<Vec<Waiting>, SpoolError> {
        let lane = &mut self.lanes[lane];
        let end = lane.log.end();
        let until = lane.chosen.insert(stream.clone(), end).unwrap_or(end);
        let Some(queue) = lane.waiting.of(stream) else { return Ok(Vec::new()) };
        let (newest, all) = (queue.newest(), queue.batches);
        let mut bytes = 0;
        let mut fits = |waiting: &Waiting| {
            let fits = bytes == 0 || bytes + waiting.bytes <= bytes_max;
            bytes += waiting.bytes;
            fits
        };
        let is_live = |waiting: &Waiting| waiting.came.0 >= until.0 || waiting.came.0 == newest;
        let mut live = Vec::new();
        let visit = |waiting: Waiting| {
            let goes = is_live(&waiting) && fits(&waiting);
            if goes {
                live.push(waiting);
            }
            goes
        };
        lane.waiting.walk(&lane.log, stream, (u64::MAX, true), visit).map_err(SpoolError::Read)?;
        live.reverse();
        let mut backlog = Vec::new();
        let visit = |waiting: Waiting| {
            let goes = backlog.len() + live.len() < all && fits(&waiting);
            if goes {
                backlog.push(waiting);
            }
            goes
        };
        lane.waiting.walk(&lane.log, stream, (u64::MAX, false), visit).map_err(SpoolError::Read)?;
        if backlog.len() + live.len() == all {
            // All of it: in the order in which it came.
            backlog.append(&mut live);
            return Ok(backlog);
        }
        live.append(&mut backlog);
        Ok(live)
    }

    /// The numbered batches of a stream from `from` on, up to `bytes_max` and at least one. The same bytes as at the
    /// first sending; one that has rotted comes as a void batch of the same number.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn again(&mut self, stream: &StreamName, from: Seq, bytes_max: usize) -> Result<Vec<SealedBatch>, SpoolError> {
        let Some(sequence) = self.sequences.get(stream) else { return Ok(Vec::new()) };
        let mut previous = sequence.freed;
        let mut chosen = Vec::new();
        let mut bytes = 0;
        for numbered in &sequence.numbered {
            if numbered.mark.seq >= from {
                if !chosen.is_empty() && bytes + numbered.bytes > bytes_max {
                    break;
                }
                bytes += numbered.bytes;
                chosen.push((previous, numbered.clone()));
            }
            previous = numbered.mark;
        }
        let mut sealed = Vec::new();
        for (previous, numbered) in chosen {
            if let Some(void) = numbered.void {
                sealed.push(*void);
                continue;
            }
            let batch = self
                .read(numbered.place)?
                .map(|cut| cut.number(&self.settings.edge, self.id, numbered.mark.seq, previous.crc));
            match batch {
                Some(batch) if batch.crc() == numbered.mark.crc => sealed.push(batch),
                _ => sealed.push(self.make_void(stream, numbered.mark.seq, "rotted on the edge's disk", false)?),
            }
        }
        Ok(sealed)
    }

    /// The rows of a numbered batch, for `quarantine`, when they can still be read.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn rows_of(&mut self, stream: &StreamName, seq: Seq) -> Result<Option<CutBatch>, SpoolError> {
        let place = self.find(stream, seq).map(|(_, numbered)| numbered.place);
        place.map_or(Ok(None), |place| self.read(place))
    }

    /// Replaces a numbered batch by a void one, synced. The caller has put its rows into the journal before.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn void(&mut self, stream: &StreamName, seq: Seq, reason: &str) -> Result<SealedBatch, SpoolError> {
        self.make_void(stream, seq, reason, true)
    }

    /// `kept`: its rows are in the journal; else they are lost.
    fn make_void(
        &mut self,
        stream: &StreamName,
        seq: Seq,
        reason: &str,
        kept: bool,
    ) -> Result<SealedBatch, SpoolError> {
        let (previous, numbered) = self.find(stream, seq).expect("only a batch that is held is made void");
        if let Some(void) = &numbered.void {
            return Ok(SealedBatch::clone(void));
        }
        let lane = numbered.place.lane;
        let void = SealedBatch::void(self.header(stream, (0, 0), previous), reason, numbered.mark.crc);
        self.put_void(&void, kept)?;
        self.lanes[lane].log.sync()?;
        Ok(void)
    }

    /// Records a void batch in the lane of the batch whose number it has, and moves its rows to the totals.
    fn put_void(&mut self, void: &SealedBatch, kept: bool) -> Result<(), SpoolError> {
        let header = void.header();
        let (_, numbered) = self.find(&header.stream, header.seq).expect("a void batch has a number that is held");
        let (lane, rows) = (numbered.place.lane, u64::from(numbered.rows));
        let mut totals = self.lanes[lane].totals;
        if kept {
            totals.voided += rows;
        } else {
            totals.lost += rows;
        }
        let payload = record::with_totals(totals, void.bytes());
        self.put(lane, record::VOID, &payload, &[], true)?;
        self.lanes[lane].totals = totals;
        self.set_void(void.clone());
        Ok(())
    }

    fn header(&self, stream: &StreamName, (min_ts, max_ts): (i64, i64), before: Mark) -> BatchHeader {
        BatchHeader {
            edge: self.settings.edge.clone(),
            spool: self.id,
            stream: stream.clone(),
            seq: before.seq.next(),
            rows: 0,
            schema: losses::schema().id(),
            min_ts,
            max_ts,
            watermark: wire::sealed::NO_WATERMARK,
            agent: self.settings.agent.clone(),
            configuration: self.settings.configuration,
            previous_crc: before.crc,
            void: None,
        }
    }

    pub(super) fn read(&mut self, place: Place) -> Result<Option<CutBatch>, SpoolError> {
        let known = self.read_last.as_ref().filter(|(lane, group, _)| (*lane, *group) == (place.lane, place.group));
        if let Some((_, _, batches)) = known {
            return Ok(batches.get(place.index as usize).cloned());
        }
        let mut reader = match self.lanes[place.lane].log.reader(Position(place.group)) {
            Ok(reader) => reader,
            Err(ReadError::Freed { .. }) => return Ok(None),
            Err(error) => return Err(SpoolError::Read(error)),
        };
        let record = match reader.next() {
            Ok(Some(record)) if record.position.0 == place.group => record,
            Ok(_) | Err(ReadError::Damaged { .. }) => return Ok(None),
            Err(error) => return Err(SpoolError::Read(error)),
        };
        let payload = Bytes::copy_from_slice(record.payload);
        let (kind, first) = record::kind(record.kind);
        let batches = match kind {
            record::GROUP | record::PART => record::read_group(payload).map(|group| group.batches),
            record::DROPPED => record::read_dropped(place.lane, payload, first).map(|dropped| vec![dropped.losses]),
            record::MOVED => record::read_moved(place.lane, payload)
                .map(|moved| moved.into_iter().map(|moved| moved.batch).collect()),
            _ => None,
        };
        let Some(batches) = batches else { return Ok(None) };
        let batch = batches.get(place.index as usize).cloned();
        // Nothing is kept of a record with one batch: it will not be asked for again soon.
        self.read_last = (batches.len() > 1).then_some((place.lane, place.group, batches));
        Ok(batch)
    }

    /// False: no batch has its number.
    pub(super) fn set_void(&mut self, void: SealedBatch) -> bool {
        let sequence = self.sequences.get_mut(&void.header().stream);
        let numbered = sequence.and_then(|s| s.numbered.iter_mut().find(|n| n.mark.seq == void.header().seq));
        let Some(numbered) = numbered else { return false };
        numbered.rows = 0;
        numbered.void = Some(Box::new(void));
        true
    }
}
