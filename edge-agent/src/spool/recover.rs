//! From the records of the lanes to the state in memory; and the file that names the spool.
//!
//! Each lane is read from its start, and what a record says is done at once, so that no more is in memory than is still
//! needed. What a stream has in another lane (it may have moved between them) is put right when all lanes are read. A damaged
//! record was reported at opening; a numbered batch in it becomes void when it is asked for.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use bytes::Bytes;
use segment_log::{FileLayer, LayerFile, Position, ReadError};
use wire::{Mark, SealedBatch, Seq, SpoolId, StreamName, StreamSchema};

use super::record::{self, Moved, Place};
use super::{Heads, Numbered, Spool, SpoolError, Totals, Waiting};

/// What is kept until all lanes are read.
#[derive(Default)]
pub(super) struct Found {
    /// How far each lane itself counted a stream as freed.
    counted: HashMap<(usize, StreamName), Seq>,
    /// Of numbers that are not known yet.
    voids: Vec<SealedBatch>,
    /// Batches of parts of a group whose end has not come yet.
    parts: Vec<Waiting>,
}

impl<L: FileLayer> Spool<L> {
    pub(super) fn replay(&mut self, index: usize, found: &mut Found) -> Result<(), SpoolError> {
        let mut reader = self.lanes[index].log.reader(self.lanes[index].log.start()).map_err(SpoolError::Read)?;
        loop {
            let record = match reader.next() {
                Ok(Some(record)) => record,
                Ok(None) => {
                    // What has no end never came.
                    found.parts.clear();
                    return Ok(());
                }
                Err(ReadError::Damaged { .. }) => continue,
                Err(error) => return Err(SpoolError::Read(error)),
            };
            let (position, kind, payload) = (record.position, record.kind, Bytes::copy_from_slice(record.payload));
            self.replay_record(index, position, kind, payload, found)?;
        }
    }

    fn replay_record(
        &mut self,
        lane: usize,
        position: Position,
        kind: u8,
        payload: Bytes,
        found: &mut Found,
    ) -> Result<(), SpoolError> {
        let (kind, first) = record::kind(kind);
        match kind {
            record::SCHEMA => {
                if let Some(schema) = std::str::from_utf8(&payload).ok().and_then(|t| StreamSchema::parse(t).ok()) {
                    if position >= self.lanes[lane].log.newest_segment() {
                        self.lanes[lane].schemas.1.push(schema.id());
                    }
                    self.schemas.insert(schema.id(), schema.canonical().to_owned());
                }
            }
            record::GROUP => {
                if let Some(group) = record::read_group(payload) {
                    let brought = super::append::brought(lane, position, group.sealed_us, &group.batches);
                    self.has_come(lane, &group, brought);
                }
            }
            record::PART => {
                if let Some(group) = record::read_group(payload) {
                    found.parts.extend(super::append::brought(lane, position, group.sealed_us, &group.batches));
                }
            }
            record::END => {
                if let Some((first, group)) = record::read_end(payload) {
                    let mut brought = std::mem::take(&mut found.parts);
                    // Those before were given up for want of room, or by a crash.
                    brought.retain(|waiting| waiting.place.group >= first.0);
                    self.has_come(lane, &group, brought);
                }
            }
            record::NUMBERED => {
                if let Some((place, stream, mark)) = record::read_numbered(lane, payload) {
                    self.is_numbered(place, stream, mark)?;
                }
            }
            record::FREED => {
                if let Some((totals, rest)) = record::split_totals(payload, first)
                    && let Some((stream, mark)) = record::read_freed(rest)
                {
                    self.lanes[lane].totals = totals;
                    self.is_freed(lane, stream, Heads { head: mark, freed: mark }, found);
                }
            }
            record::DROPPED => {
                if let Some(dropped) = record::read_dropped(lane, payload, first) {
                    self.lanes[lane].totals = dropped.totals;
                    self.forget(lane, &dropped.places)?;
                    self.admit_losses(lane, position, &dropped.losses);
                }
            }
            record::MOVED => {
                for (index, moved) in (0..).zip(record::read_moved(lane, payload).into_iter().flatten()) {
                    self.has_moved(Place { lane, group: position.0, index }, moved)?;
                }
            }
            record::VOID => {
                if let Some((totals, rest)) = record::split_totals(payload, first) {
                    self.lanes[lane].totals = totals;
                    if let Ok(void) = SealedBatch::parse(rest)
                        && !self.set_void(void.clone())
                    {
                        found.voids.push(void);
                    }
                }
            }
            record::STATE => {
                if let Some((totals, rest)) = record::split_totals(payload, first)
                    && let Some((cut, json)) = rest.split_at_checked(8)
                {
                    self.lanes[lane].totals = totals;
                    let cut = Position(u64::from_le_bytes(cut.try_into().expect("eight bytes were split off")));
                    self.lanes[lane].cut = self.lanes[lane].cut.max(cut);
                    let heads = serde_json::from_slice::<HashMap<StreamName, Heads>>(json).unwrap_or_default();
                    heads.into_iter().for_each(|(stream, heads)| self.is_freed(lane, stream, heads, found));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn has_come(&mut self, lane: usize, group: &record::Group, brought: Vec<Waiting>) {
        self.lanes[lane].cut = self.lanes[lane].cut.max(group.cut);
        self.lanes[lane].rows = self.lanes[lane].rows.max(group.rows);
        self.admit(lane, brought);
    }

    fn is_numbered(&mut self, place: Place, stream: StreamName, mark: Mark) -> Result<(), SpoolError> {
        let taken = self.lanes[place.lane].take(Some(&stream), place)?;
        if taken.is_none() {
            // Its group is damaged, and needed all the same: the number is.
            self.lanes[place.lane].hold(place);
        }
        let (rows, bytes) = taken.map_or((0, 0), |waiting| (waiting.rows, waiting.bytes));
        let sequence = self.sequences.entry(stream).or_default();
        sequence.head = later(sequence.head, mark);
        sequence.numbered.push_back(Numbered { place, mark, rows, bytes, void: None });
        Ok(())
    }

    /// A lane says what is freed of a stream: what it has of that itself, it has counted.
    fn is_freed(&mut self, lane: usize, stream: StreamName, heads: Heads, found: &mut Found) {
        let sequence = self.sequences.entry(stream.clone()).or_default();
        sequence.head = later(sequence.head, heads.head);
        sequence.freed = later(sequence.freed, heads.freed);
        let is_done = |n: &mut Numbered| n.place.lane == lane && n.mark.seq <= heads.freed.seq;
        while let Some(freed) = sequence.numbered.pop_front_if(is_done) {
            self.lanes[lane].release(freed.place);
        }
        found.counted.insert((lane, stream), heads.freed.seq);
    }

    /// A batch stands here from now on; the group that brought it may be freed.
    fn has_moved(&mut self, place: Place, moved: Moved) -> Result<(), SpoolError> {
        let Moved { from, came, sealed_us, mark, batch } = moved;
        let known = self.lanes[place.lane].take(Some(&batch.stream), from)?;
        if known.is_some() {
            self.lanes[place.lane].release(from);
        }
        self.lanes[place.lane].hold(place);
        let known = known.unwrap_or_else(|| Waiting::new(place, &batch, came, sealed_us));
        let Some(mark) = mark else {
            self.lanes[place.lane].waiting.push_moved(Waiting { place, ..known });
            return Ok(());
        };
        let sequence = self.sequences.entry(batch.stream).or_default();
        sequence.head = later(sequence.head, mark);
        if let Some(numbered) = sequence.numbered.iter_mut().find(|numbered| numbered.mark.seq == mark.seq) {
            if numbered.void.is_none() {
                // When the group that brought it is freed, only this tells.
                (numbered.rows, numbered.bytes) = (numbered.rows.max(known.rows), numbered.bytes.max(known.bytes));
            }
            let from = std::mem::replace(&mut numbered.place, place);
            self.lanes[from.lane].release(from);
        } else {
            let (rows, bytes) = (known.rows, known.bytes);
            sequence.numbered.push_back(Numbered { place, mark, rows, bytes, void: None });
        }
        Ok(())
    }

    /// All lanes are read.
    pub(super) fn settle(&mut self, found: Found) {
        for sequence in self.sequences.values_mut() {
            // The sort is stable: of a number that was given in two lanes, the last place is the right one.
            sequence.numbered.make_contiguous().sort_by_key(|numbered| numbered.mark.seq);
            let mut seqs = sequence.numbered.iter().skip(1).map(|n| n.mark.seq).collect::<Vec<_>>().into_iter();
            sequence.numbered.retain(|numbered| {
                let stays = seqs.next() != Some(numbered.mark.seq);
                if !stays {
                    self.lanes[numbered.place.lane].release(numbered.place);
                }
                stays
            });
        }
        for void in found.voids {
            self.set_void(void);
        }
        for (stream, sequence) in &mut self.sequences {
            while let Some(freed) = sequence.numbered.pop_front_if(|n| n.mark.seq <= sequence.freed.seq) {
                let lane = &mut self.lanes[freed.place.lane];
                lane.release(freed.place);
                // Another lane's record says so; this lane's own was torn off.
                let counted = found.counted.get(&(freed.place.lane, stream.clone()));
                if counted.is_none_or(|seq| *seq < freed.mark.seq) {
                    lane.totals.freed += u64::from(freed.rows);
                }
            }
        }
        for lane in 0..self.lanes.len() {
            // What was cut and is nowhere stood in records that are damaged, which was reported when the lane was opened.
            let placed = self.placed(lane);
            let missing = self.lanes[lane].rows.saturating_sub(placed);
            self.lanes[lane].totals.lost += missing;
            self.lanes[lane].rows = placed + missing;
            if missing > 0 {
                tracing::error!(lane = self.lanes[lane].settings.name, rows = missing, "rows were lost on disk");
            }
        }
    }

    /// Rows of a lane that were cut for it and are somewhere.
    fn placed(&self, lane: usize) -> u64 {
        let Totals { freed, lost, voided, made } = self.lanes[lane].totals;
        let waiting = self.lanes[lane].waiting.streams().map(|(_, queue)| queue.rows).sum::<u64>();
        let numbered = self.sequences.values().flat_map(|sequence| &sequence.numbered);
        let numbered = numbered.filter(|numbered| numbered.place.lane == lane).map(|numbered| u64::from(numbered.rows));
        (freed + lost + voided + waiting + numbered.sum::<u64>()).saturating_add_signed(-made)
    }
}

fn later(one: Mark, other: Mark) -> Mark {
    if other.seq > one.seq { other } else { one }
}

/// Reads `<directory>/id`, or makes it durable with the directory.
pub(super) fn settle_id<L: FileLayer>(layer: &L, directory: &Path, fresh: SpoolId) -> Result<SpoolId, SpoolError> {
    let io = |path: &Path, source| SpoolError::Io { path: path.to_owned(), source };
    let make = |path: &Path| match layer.create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(io(path, error)),
        _ => Ok(()),
    };
    make(directory)?;
    if let Some(parent) = directory.parent() {
        layer.sync_dir(parent).map_err(|e| io(parent, e))?;
    }
    let path = directory.join("id");
    let id = if layer.exists(&path).map_err(|e| io(&path, e))? {
        let mut text = [0; 32];
        let file = layer.open(&path).map_err(|e| io(&path, e))?;
        let read = file.read_at(&mut text, 0).map_err(|e| io(&path, e))?;
        let text = std::str::from_utf8(&text[..read]).map_err(|_| SpoolError::Id(path.clone()))?;
        text.parse().map_err(|_| SpoolError::Id(path.clone()))?
    } else {
        name(layer, directory, fresh)?;
        fresh
    };
    make(&directory.join(id.to_string()))?;
    // The name `id` and the directory it points to are durable before anything is written below.
    layer.sync_dir(directory).map_err(|e| io(directory, e))?;
    Ok(id)
}

/// Writes `<directory>/id`; the caller syncs the directory.
pub(super) fn name<L: FileLayer>(layer: &L, directory: &Path, id: SpoolId) -> Result<(), SpoolError> {
    let io = |path: &Path, source| SpoolError::Io { path: path.to_owned(), source };
    let path = directory.join("id");
    let temporary = directory.join("id.new");
    match layer.remove(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(&temporary, error)),
        _ => {}
    }
    let file = layer.create(&temporary).map_err(|e| io(&temporary, e))?;
    file.write_all_at(id.to_string().as_bytes(), 0).map_err(|e| io(&temporary, e))?;
    file.sync_data().map_err(|e| io(&temporary, e))?;
    layer.rename(&temporary, &path).map_err(|e| io(&path, e))
}
