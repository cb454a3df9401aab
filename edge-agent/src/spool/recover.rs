//! From the records of the lanes to the state in memory; and the file that names the spool.
//!
//! Each lane is read from its start. Numbers, freed marks and voids are only gathered, because a stream may have moved
//! between lanes; when all lanes are read they are put together. A damaged record was reported at opening; a numbered
//! batch in it becomes void when it is asked for.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use bytes::Bytes;
use segment_log::{FileLayer, LayerFile, Position, ReadError};
use wire::{Mark, SealedBatch, Seq, SpoolId, StreamName, StreamSchema};

use super::record::{self, Place};
use super::{Heads, Numbered, Spool, SpoolError, Waiting, release};

/// What replay gathers before the lanes are put together.
pub(super) enum Found {
    Numbered(Place, StreamName, Mark),
    Freed(usize, StreamName, Mark),
    Void(SealedBatch),
    Heads(usize, StreamName, Heads),
}

impl<L: FileLayer> Spool<L> {
    pub(super) fn replay(&mut self, index: usize, found: &mut Vec<Found>) -> Result<(), SpoolError> {
        let mut reader = self.lanes[index].log.reader(self.lanes[index].log.start()).map_err(SpoolError::Read)?;
        loop {
            let record = match reader.next() {
                Ok(Some(record)) => record,
                Ok(None) => return Ok(()),
                Err(ReadError::Damaged { .. }) => continue,
                Err(error) => return Err(SpoolError::Read(error)),
            };
            let (position, kind, payload) = (record.position, record.kind, Bytes::copy_from_slice(record.payload));
            self.replay_record(index, position, kind, payload, found);
        }
    }

    fn replay_record(&mut self, lane: usize, position: Position, kind: u8, payload: Bytes, found: &mut Vec<Found>) {
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
                    self.lanes[lane].cut = self.lanes[lane].cut.max(group.cut);
                    self.admit(lane, position, group.sealed_us, &group.batches);
                }
            }
            record::NUMBERED => {
                if let Some((place, stream, mark)) = record::read_numbered(lane, payload) {
                    found.push(Found::Numbered(place, stream, mark));
                }
            }
            record::FREED => {
                if let Some((totals, rest)) = record::split_totals(payload, first)
                    && let Some((stream, mark)) = record::read_freed(rest)
                {
                    self.lanes[lane].totals = totals;
                    found.push(Found::Freed(lane, stream, mark));
                }
            }
            record::DROPPED => {
                if let Some(dropped) = record::read_dropped(lane, payload, first) {
                    self.lanes[lane].totals = dropped.totals;
                    self.forget(lane, &dropped.places);
                    self.admit_losses(lane, position, &dropped.losses);
                }
            }
            record::MOVED => {
                for (index, moved) in record::read_moved(lane, payload).into_iter().flatten().enumerate() {
                    let place = Place { lane, group: position.0, index: index as u32 };
                    // Its group may be freed; what is there of it stands here from now on.
                    let known = self.lanes[lane].waiting.get_mut(&moved.batch.stream);
                    if let Some(at) = known.and_then(|all| all.iter_mut().find(|one| one.place == moved.from)) {
                        at.place = place;
                        release(&mut self.lanes[lane].live, moved.from.group);
                    } else {
                        let waiting = Waiting::new(place, &moved.batch, moved.came, moved.sealed_us);
                        self.lanes[lane].waiting.entry(moved.batch.stream.clone()).or_default().push_back(waiting);
                    }
                    *self.lanes[lane].live.entry(position.0).or_default() += 1;
                    found.extend(moved.mark.map(|mark| Found::Numbered(place, moved.batch.stream, mark)));
                }
            }
            record::VOID => {
                if let Some((totals, rest)) = record::split_totals(payload, first) {
                    self.lanes[lane].totals = totals;
                    found.extend(SealedBatch::parse(rest).ok().map(Found::Void));
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
                    found.extend(heads.into_iter().map(|(stream, heads)| Found::Heads(lane, stream, heads)));
                }
            }
            _ => {}
        }
    }

    pub(super) fn settle(&mut self, found: Vec<Found>) {
        let mut voids = Vec::new();
        // How far each lane itself counted a stream as freed.
        let mut counted: HashMap<(usize, StreamName), Seq> = HashMap::new();
        let mut waiting = HashMap::new();
        for lane in &mut self.lanes {
            let all = std::mem::take(&mut lane.waiting).into_values().flatten();
            waiting.extend(all.map(|batch| (batch.place, batch)));
        }
        for fact in found {
            match fact {
                Found::Heads(lane, stream, heads) => {
                    counted.insert((lane, stream.clone()), heads.freed.seq);
                    let sequence = self.sequences.entry(stream).or_default();
                    sequence.head = later(sequence.head, heads.head);
                    sequence.freed = later(sequence.freed, heads.freed);
                }
                Found::Freed(lane, stream, mark) => {
                    counted.insert((lane, stream.clone()), mark.seq);
                    let sequence = self.sequences.entry(stream).or_default();
                    sequence.head = later(sequence.head, mark);
                    sequence.freed = later(sequence.freed, mark);
                }
                Found::Numbered(place, stream, mark) => {
                    let sequence = self.sequences.entry(stream).or_default();
                    sequence.head = later(sequence.head, mark);
                    let taken: Option<Waiting> = waiting.remove(&place);
                    let (rows, bytes) = taken.map_or((0, 0), |waiting| (waiting.rows, waiting.bytes));
                    sequence.numbered.push_back(Numbered { place, mark, rows, bytes, void: None });
                }
                Found::Void(void) => voids.push(void),
            }
        }
        let mut left = waiting.into_values().collect::<Vec<_>>();
        left.sort_by_key(|batch: &Waiting| batch.came);
        for batch in left {
            self.lanes[batch.place.lane].waiting.entry(batch.stream.clone()).or_default().push_back(batch);
        }
        for sequence in self.sequences.values_mut() {
            // The sort is stable: of a number that was given here and moved, the last place is the right one.
            sequence.numbered.make_contiguous().sort_by_key(|numbered| numbered.mark.seq);
            let mut seqs = sequence.numbered.iter().skip(1).map(|n| n.mark.seq).collect::<Vec<_>>().into_iter();
            sequence.numbered.retain(|numbered| seqs.next() != Some(numbered.mark.seq));
        }
        voids.into_iter().for_each(|void| self.set_void(void));
        for (stream, sequence) in &mut self.sequences {
            while let Some(freed) = sequence.numbered.pop_front_if(|n| n.mark.seq <= sequence.freed.seq) {
                let lane = &mut self.lanes[freed.place.lane];
                release(&mut lane.live, freed.place.group);
                // Another lane's record says so; this lane's own was torn off.
                if counted.get(&(freed.place.lane, stream.clone())).is_none_or(|seq| *seq < freed.mark.seq) {
                    lane.totals.freed += u64::from(freed.rows);
                }
            }
        }
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
