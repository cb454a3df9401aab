//! What waits for the cloud: one log per lane, in which a cut is one record and so atomic.
//!
//! Promises (rules 1 and 2): a batch has no number until it is first sent, and the number is synced before its bytes
//! leave; one number never has two contents; a numbered batch that rots becomes a void batch of the same number; what
//! is freed was acknowledged with a CRC of our own. What a policy drops has no number and becomes a row of `losses`
//! in the same record that drops it. A failed sync is final: the caller stops the process.
//!
//! The lane logs lie in `<spool>/<id>/<lane>`; `<spool>/id` names the id in force. The records are in `spool/record.rs`.
//! A lane that the settings no longer have is opened behind the others and drained; it gets no new cuts. Memory: about
//! 150 bytes for each batch that waits; bodies stay on disk.

mod drop;
mod fork;
mod losses;
mod record;
mod recover;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use segment_log::{
    AppendError, Appended, Damage, FileLayer, FreeError, OpenError, Options, Position, ReadError, SegmentLog, SyncError,
};
use serde::{Deserialize, Serialize};
use wire::sealed::BatchHeader;
use wire::{CutBatch, EdgeId, Mark, SchemaId, SealedBatch, Seq, SpoolId, StreamName, StreamSchema};

use self::record::Place;
pub use crate::config::OnFull;

/// Kept in each lane for numbers, acks and losses when the lane is full.
const RESERVE_BYTES: u64 = 64 << 10;

/// One lane, highest priority first in [`SpoolSettings::lanes`].
#[derive(Debug, Clone)]
pub struct LaneSettings {
    /// Also the name of its directory.
    pub name: String,
    pub max_bytes: u64,
    pub segment_bytes: u64,
    pub on_full: OnFull,
}

/// What a spool is opened with.
#[derive(Debug, Clone)]
pub struct SpoolSettings {
    pub edge: EdgeId,
    /// Version of the agent, for the batches that the spool itself makes.
    pub agent: String,
    pub configuration: u64,
    pub lanes: Vec<LaneSettings>,
}

/// Why the spool cannot go on. All but `Full` are final.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// A state: the cut can be given again when something was freed.
    #[error("lane `{0}` is full")]
    Full(String),
    #[error("append to the spool")]
    Append(#[source] AppendError),
    #[error(transparent)]
    Sync(#[from] SyncError),
    #[error(transparent)]
    Free(#[from] FreeError),
    #[error("open a lane of the spool")]
    Open(#[from] OpenError),
    #[error("read a lane of the spool")]
    Read(#[source] ReadError),
    #[error("{path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("the id of the spool in {0} is damaged")]
    Id(PathBuf),
    #[error("make a batch of losses")]
    Losses(#[from] wire::sealed::CutError),
}

/// Damage found at opening, for the operator.
#[derive(Debug, Clone)]
pub struct Incident {
    pub lane: String,
    pub damage: Damage,
}

/// Rows that have left the spool, over all restarts, and those that are in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RowCounts {
    /// Acknowledged as committed.
    pub freed: u64,
    /// Dropped by a policy, or rotted on disk.
    pub lost: u64,
    /// Of batches that were made void because the cloud refused them.
    pub voided: u64,
    pub spooled: u64,
}

/// One lane, for status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneInfo {
    pub name: String,
    pub bytes: u64,
    pub max_bytes: u64,
    pub batches_waiting: usize,
}

/// What a lane has counted: in each record that changes it, so a torn tail takes both or neither.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Totals {
    freed: u64,
    lost: u64,
    voided: u64,
}

/// A batch on disk without a number.
#[derive(Debug, Clone)]
struct Waiting {
    place: Place,
    stream: StreamName,
    rows: u32,
    bytes: usize,
    min_ts: i64,
    max_ts: i64,
}

/// A batch with a number. `mark.crc` is that of the chain: of the batch that was numbered first.
#[derive(Debug, Clone)]
struct Numbered {
    place: Place,
    mark: Mark,
    rows: u32,
    bytes: usize,
    void: Option<SealedBatch>,
}

/// A stream's sequence. Invariant: `freed.seq <= head.seq`; `numbered` holds exactly (freed, head].
#[derive(Debug, Default)]
struct Sequence {
    head: Mark,
    freed: Mark,
    numbered: VecDeque<Numbered>,
}

#[derive(Serialize, Deserialize)]
struct Heads {
    head: Mark,
    freed: Mark,
}

#[derive(Debug)]
struct Lane<L: FileLayer> {
    settings: LaneSettings,
    log: SegmentLog<L>,
    /// Journal position of the newest cut in this lane.
    cut: Position,
    /// In order of arrival, by stream.
    waiting: BTreeMap<StreamName, VecDeque<Waiting>>,
    totals: Totals,
    /// How many batches of each record are still needed.
    live: BTreeMap<u64, u32>,
    /// Schemas in the newest segment, and which segment that is.
    schemas: (Position, Vec<SchemaId>),
}

/// The spool. One owner; see the module's documentation.
#[derive(Debug)]
pub struct Spool<L: FileLayer> {
    settings: SpoolSettings,
    id: SpoolId,
    lanes: Vec<Lane<L>>,
    sequences: HashMap<StreamName, Sequence>,
    schemas: HashMap<SchemaId, String>,
    /// The batches of the record that was read last: a cut's batches are read one after the other.
    read_last: Option<(usize, u64, Vec<CutBatch>)>,
}

impl<L: FileLayer> Spool<L> {
    /// Opens the spool in `directory`, whose parent is there, or makes it with `fresh` as its id.
    ///
    /// # Errors
    /// When the disk does not answer or another process has it. Damage is no error: it is in the second value.
    pub fn open(
        layer: &L,
        directory: &Path,
        settings: SpoolSettings,
        fresh: SpoolId,
    ) -> Result<(Self, Vec<Incident>), SpoolError> {
        let id = recover::settle_id(layer, directory, fresh)?;
        Self::open_as(layer, directory, settings, id)
    }

    /// Opens the lanes of one id, and behind the settings' lanes those that are only on disk.
    fn open_as(
        layer: &L,
        directory: &Path,
        mut settings: SpoolSettings,
        id: SpoolId,
    ) -> Result<(Self, Vec<Incident>), SpoolError> {
        let path = directory.join(id.to_string());
        let mut found = layer.list(&path).map_err(|source| SpoolError::Io { path: path.clone(), source })?;
        found.sort();
        for name in found {
            if !settings.lanes.iter().any(|lane| lane.name == name) {
                let widest = settings.lanes.iter().max_by_key(|lane| lane.max_bytes);
                let Some(widest) = widest.cloned() else { continue };
                settings.lanes.push(LaneSettings { name, on_full: OnFull::Refuse, ..widest });
            }
        }
        let mut spool = Self {
            id,
            lanes: Vec::new(),
            sequences: HashMap::new(),
            schemas: HashMap::new(),
            read_last: None,
            settings,
        };
        // Void batches and losses carry it.
        let losses = losses::schema();
        spool.schemas.insert(losses.id(), losses.canonical().to_owned());
        let mut incidents = Vec::new();
        let mut found = Vec::new();
        for (index, lane) in spool.settings.lanes.clone().into_iter().enumerate() {
            let options =
                Options { segment_bytes: lane.segment_bytes, max_bytes: lane.max_bytes, reserve_bytes: RESERVE_BYTES };
            let (log, opening) = SegmentLog::open(layer.clone(), path.join(&lane.name), options)?;
            for damage in opening.incidents {
                incidents.push(Incident { lane: lane.name.clone(), damage });
            }
            let schemas = (log.newest_segment(), Vec::new());
            spool.lanes.push(Lane {
                settings: lane,
                log,
                cut: Position(0),
                waiting: BTreeMap::new(),
                totals: Totals::default(),
                live: BTreeMap::new(),
                schemas,
            });
            spool.replay(index, &mut found)?;
        }
        spool.settle(found);
        Ok((spool, incidents))
    }

    /// The identity of this spool.
    pub fn id(&self) -> SpoolId {
        self.id
    }

    /// The journal position of the newest cut of a lane: only what came after it goes there.
    pub fn cut_position(&self, lane: usize) -> Position {
        self.lanes[lane].cut
    }

    /// The same of all lanes, by name.
    pub fn cut_positions(&self) -> BTreeMap<String, Position> {
        self.lanes.iter().map(|lane| (lane.settings.name.clone(), lane.cut)).collect()
    }

    /// Rows that are in the spool, numbered or not.
    pub fn rows(&self) -> u64 {
        let waiting = self.lanes.iter().flat_map(|lane| lane.waiting.values().flatten());
        let numbered = self.sequences.values().flat_map(|s| &s.numbered);
        waiting.map(|batch| u64::from(batch.rows)).sum::<u64>()
            + numbered.map(|batch| u64::from(batch.rows)).sum::<u64>()
    }

    /// Where all rows that ever came here are now.
    pub fn rows_counted(&self) -> RowCounts {
        let sum = |value: fn(&Totals) -> u64| self.lanes.iter().map(|lane| value(&lane.totals)).sum();
        RowCounts {
            freed: sum(|totals| totals.freed),
            lost: sum(|totals| totals.lost),
            voided: sum(|totals| totals.voided),
            spooled: self.rows(),
        }
    }

    /// The lanes, in order of priority.
    pub fn lanes(&self) -> impl Iterator<Item = LaneInfo> {
        self.lanes.iter().map(|lane| LaneInfo {
            name: lane.settings.name.clone(),
            bytes: lane.log.bytes_on_disk(),
            max_bytes: lane.settings.max_bytes,
            batches_waiting: lane.waiting.values().map(VecDeque::len).sum(),
        })
    }

    /// The canonical text of a schema that a batch here uses.
    pub fn schema(&self, id: SchemaId) -> Option<&str> {
        self.schemas.get(&id).map(String::as_str)
    }

    /// How far the stream is numbered.
    pub fn head(&self, stream: &StreamName) -> Mark {
        self.sequences.get(stream).map(|sequence| sequence.head).unwrap_or_default()
    }

    /// How far the stream was acknowledged as committed.
    pub fn freed(&self, stream: &StreamName) -> Mark {
        self.sequences.get(stream).map(|sequence| sequence.freed).unwrap_or_default()
    }

    /// Whether the batch has a number and is not freed.
    pub fn holds(&self, stream: &StreamName, seq: Seq) -> bool {
        self.find(stream, seq).is_some()
    }

    /// The lane and stream of what has no number yet, each once: lane by lane, the longest waiting first.
    pub fn waiting(&self) -> Vec<(usize, &StreamName)> {
        let mut waiting = Vec::new();
        for (index, lane) in self.lanes.iter().enumerate() {
            let mut streams = lane
                .waiting
                .iter()
                .filter_map(|(stream, batches)| batches.front().map(|first| (first.place.group, stream)))
                .collect::<Vec<_>>();
            streams.sort_by_key(|(group, _)| *group);
            waiting.extend(streams.into_iter().map(|(_, stream)| (index, stream)));
        }
        waiting
    }

    /// Streams with numbered batches above `freed`, and their last number.
    pub fn numbered(&self) -> impl Iterator<Item = (&StreamName, Mark)> {
        self.sequences.iter().filter(|(_, s)| !s.numbered.is_empty()).map(|(stream, s)| (stream, s.head))
    }

    /// Writes one cut of a lane as one record and syncs it. An empty one only moves the cut position.
    ///
    /// # Errors
    /// `Full` when it does not fit and the lane refuses; then nothing has happened to the cut.
    pub fn append(
        &mut self,
        lane: usize,
        cut: Position,
        batches: &[CutBatch],
        schemas: &[StreamSchema],
        now_us: i64,
    ) -> Result<(), SpoolError> {
        for schema in schemas {
            self.schemas.entry(schema.id()).or_insert_with(|| schema.canonical().to_owned());
        }
        let payload = record::group(cut, batches);
        let ids = batches.iter().map(|batch| batch.schema).collect::<Vec<_>>();
        let appended = loop {
            match self.put(lane, record::GROUP, &payload, &ids, false) {
                Err(SpoolError::Full(name)) => {
                    let drops = self.lanes[lane].settings.on_full == OnFull::DropOldest;
                    if !drops || !self.drop_oldest(lane, now_us)? {
                        return Err(SpoolError::Full(name));
                    }
                }
                other => break other?,
            }
        };
        self.lanes[lane].log.sync()?;
        self.lanes[lane].cut = cut;
        self.admit(lane, appended.position, batches);
        Ok(())
    }

    /// Numbers the oldest waiting batches of one stream in a lane, up to `bytes_max` and at least one, and syncs the
    /// numbers; the bytes may leave when this returns.
    ///
    /// # Errors
    /// `Full` when even the reserve is used up: acks must free something first.
    pub fn number(
        &mut self,
        lane: usize,
        stream: &StreamName,
        bytes_max: usize,
    ) -> Result<Vec<SealedBatch>, SpoolError> {
        let mut chosen = Vec::new();
        let mut bytes = 0;
        for waiting in self.lanes[lane].waiting.get(stream).into_iter().flatten() {
            if !chosen.is_empty() && bytes + waiting.bytes > bytes_max {
                break;
            }
            bytes += waiting.bytes;
            chosen.push(waiting.clone());
        }
        let mut sealed = Vec::new();
        for waiting in chosen {
            let before = self.head(stream);
            let batch = match self.read(waiting.place)? {
                Some(batch) => batch.number(&self.settings.edge, self.id, before.seq.next(), before.crc),
                None => {
                    // It rotted before it had a number: a void batch says so in the sequence.
                    SealedBatch::void(self.header(&waiting, before), "rotted on the edge's disk", 0)
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
            if let Some(queue) = self.lanes[lane].waiting.get_mut(stream) {
                queue.pop_front();
            }
            if rotted {
                self.put_void(&batch, false)?;
            }
            sealed.push(batch);
        }
        self.sync_numbers(lane)?;
        Ok(sealed)
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
                sealed.push(void);
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
            return Ok(void.clone());
        }
        let waiting =
            Waiting { place: numbered.place, stream: stream.clone(), rows: 0, bytes: 0, min_ts: 0, max_ts: 0 };
        let lane = numbered.place.lane;
        let void = SealedBatch::void(self.header(&waiting, previous), reason, numbered.mark.crc);
        self.put_void(&void, kept)?;
        self.lanes[lane].log.sync()?;
        Ok(void)
    }

    /// Records a void batch in the lane of the batch whose number it has, and moves its rows to the totals.
    fn put_void(&mut self, void: &SealedBatch, kept: bool) -> Result<(), SpoolError> {
        let header = void.header();
        let (_, numbered) = self.find(&header.stream, header.seq).expect("a void batch has a number that is held");
        let (lane, rows) = (numbered.place.lane, u64::from(numbered.rows));
        let totals = &mut self.lanes[lane].totals;
        if kept {
            totals.voided += rows;
        } else {
            totals.lost += rows;
        }
        let payload = record::with_totals(*totals, void.bytes());
        self.put(lane, record::VOID, &payload, &[], true)?;
        self.set_void(void.clone());
        Ok(())
    }

    /// Whether a mark names a batch of this spool's own history; false also when that cannot be told any more.
    pub fn is_own(&self, stream: &StreamName, mark: Mark) -> bool {
        let Some(sequence) = self.sequences.get(stream) else { return mark.seq.0 == 0 };
        if mark.seq == sequence.freed.seq {
            return mark.seq.0 == 0 || mark.crc == sequence.freed.crc;
        }
        self.find(stream, mark.seq).is_some_and(|(_, numbered)| {
            mark.crc == numbered.mark.crc || numbered.void.as_ref().is_some_and(|void| void.crc() == mark.crc)
        })
    }

    /// Frees a stream up to `mark`, if its CRC is our own; returns whether anything was freed.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn free(&mut self, stream: &StreamName, mark: Mark) -> Result<bool, SpoolError> {
        if !self.is_own(stream, mark) {
            return Ok(false);
        }
        let Some(sequence) = self.sequences.get_mut(stream) else { return Ok(false) };
        let mut touched = Vec::new();
        while let Some(numbered) = sequence.numbered.pop_front_if(|numbered| numbered.mark.seq <= mark.seq) {
            sequence.freed = numbered.mark;
            self.lanes[numbered.place.lane].totals.freed += u64::from(numbered.rows);
            release(&mut self.lanes[numbered.place.lane].live, numbered.place.group);
            if !touched.contains(&numbered.place.lane) {
                touched.push(numbered.place.lane);
            }
        }
        let freed = sequence.freed;
        for &lane in &touched {
            // Not worth a sync of its own: if it is forgotten, the next `positions` says it again.
            let payload = record::with_totals(self.lanes[lane].totals, &record::freed(stream, freed));
            match self.put(lane, record::FREED, &payload, &[], true) {
                Ok(_) | Err(SpoolError::Full(_)) => {}
                Err(error) => return Err(error),
            }
            self.free_segments(lane)?;
        }
        Ok(!touched.is_empty())
    }

    /// Syncs and marks all lanes; for an idle or closing spool.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn mark(&mut self) -> Result<(), SpoolError> {
        self.lanes.iter_mut().try_for_each(|lane| lane.log.mark().map_err(SpoolError::from))
    }

    /// The numbers are on disk before the bytes leave: a crash in between must not give a number two contents.
    fn sync_numbers(&mut self, lane: usize) -> Result<(), SpoolError> {
        self.lanes[lane].log.sync()?; // numbered before sent
        Ok(())
    }

    fn find(&self, stream: &StreamName, seq: Seq) -> Option<(Mark, &Numbered)> {
        let sequence = self.sequences.get(stream)?;
        let index = usize::try_from(seq.0.checked_sub(sequence.freed.seq.0 + 1)?).ok()?;
        let previous = index.checked_sub(1).map_or(sequence.freed, |before| sequence.numbered[before].mark);
        sequence.numbered.get(index).map(|numbered| (previous, numbered))
    }

    fn header(&self, waiting: &Waiting, before: Mark) -> BatchHeader {
        BatchHeader {
            edge: self.settings.edge.clone(),
            spool: self.id,
            stream: waiting.stream.clone(),
            seq: before.seq.next(),
            rows: 0,
            schema: losses::schema().id(),
            min_ts: waiting.min_ts,
            max_ts: waiting.max_ts,
            watermark: wire::sealed::NO_WATERMARK,
            agent: self.settings.agent.clone(),
            configuration: self.settings.configuration,
            previous_crc: before.crc,
            void: None,
        }
    }

    fn read(&mut self, place: Place) -> Result<Option<CutBatch>, SpoolError> {
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
        let batches = match record.kind {
            record::GROUP => record::read_group(payload).map(|(_, batches)| batches),
            record::DROPPED => record::read_dropped(place.lane, payload).map(|dropped| vec![dropped.losses]),
            _ => None,
        };
        let Some(batches) = batches else { return Ok(None) };
        let batch = batches.get(place.index as usize).cloned();
        // Nothing is kept of a record with one batch: it will not be asked for again soon.
        self.read_last = (batches.len() > 1).then_some((place.lane, place.group, batches));
        Ok(batch)
    }

    /// Appends a record, and before it what its segment still lacks: the state, and the schemas it uses.
    fn put(
        &mut self,
        lane: usize,
        kind: u8,
        payload: &[u8],
        ids: &[SchemaId],
        control: bool,
    ) -> Result<Appended, SpoolError> {
        let texts = |id: &SchemaId| self.schemas.get(id).map_or(0, |text| text.len() + 64);
        let needed = payload.len() + ids.iter().map(texts).sum::<usize>();
        // Only the first record of a segment needs it.
        let state = self.lanes[lane].log.starts_segment(needed).then(|| self.state(lane));
        let schemas = &self.schemas;
        let lane = &mut self.lanes[lane];
        let name = &lane.settings.name;
        let full = |error| match error {
            AppendError::Full => SpoolError::Full(name.clone()),
            other => SpoolError::Append(other),
        };
        if let Some(state) = state {
            match lane.log.start_segment() {
                Ok(()) => {
                    lane.log.append_control(record::STATE, &state).map_err(full)?;
                }
                Err(AppendError::Full) if control => {}
                Err(error) => return Err(full(error)),
            }
        }
        if lane.schemas.0 != lane.log.newest_segment() {
            lane.schemas = (lane.log.newest_segment(), Vec::new());
        }
        for id in ids {
            if let Some(text) = schemas.get(id).filter(|_| !lane.schemas.1.contains(id)) {
                lane.log.append_control(record::SCHEMA, text.as_bytes()).map_err(full)?;
                lane.schemas.1.push(*id);
            }
        }
        if control { lane.log.append_control(kind, payload) } else { lane.log.append(kind, payload) }.map_err(full)
    }

    fn state(&self, lane: usize) -> Vec<u8> {
        let heads = self.sequences.iter().map(|(stream, s)| (stream, Heads { head: s.head, freed: s.freed }));
        let mut out = record::with_totals(self.lanes[lane].totals, &self.lanes[lane].cut.0.to_le_bytes());
        let json = serde_json::to_vec(&heads.collect::<HashMap<_, _>>()).expect("names and numbers are JSON");
        out.extend(json);
        out
    }

    fn admit(&mut self, lane: usize, position: Position, batches: &[CutBatch]) {
        for (index, batch) in batches.iter().enumerate() {
            self.lanes[lane].waiting.entry(batch.stream.clone()).or_default().push_back(Waiting {
                place: Place { lane, group: position.0, index: index as u32 },
                stream: batch.stream.clone(),
                rows: batch.rows,
                bytes: batch.body.len() + 256,
                min_ts: batch.min_ts,
                max_ts: batch.max_ts,
            });
        }
        if !batches.is_empty() {
            *self.lanes[lane].live.entry(position.0).or_default() += batches.len() as u32;
        }
    }

    fn free_segments(&mut self, lane: usize) -> Result<(), SpoolError> {
        let lane = &mut self.lanes[lane];
        let until = lane.live.first_key_value().map_or(lane.log.end(), |(group, _)| Position(*group));
        if until > lane.log.start() && lane.log.start() != lane.log.newest_segment() {
            // What says that they are not needed must outlive the segments.
            lane.log.sync()?;
            lane.log.free_before(until)?;
        }
        Ok(())
    }

    fn forget(&mut self, lane: usize, places: &[Place]) {
        let lane = &mut self.lanes[lane];
        let gone = places.iter().collect::<HashSet<_>>();
        lane.waiting.values_mut().for_each(|batches| batches.retain(|waiting| !gone.contains(&waiting.place)));
        places.iter().for_each(|place| release(&mut lane.live, place.group));
    }

    fn set_void(&mut self, void: SealedBatch) {
        let sequence = self.sequences.get_mut(&void.header().stream);
        let numbered = sequence.and_then(|s| s.numbered.iter_mut().find(|n| n.mark.seq == void.header().seq));
        if let Some(numbered) = numbered {
            numbered.rows = 0;
            numbered.void = Some(void);
        }
    }
}

fn release(live: &mut BTreeMap<u64, u32>, group: u64) {
    if let Some(left) = live.get_mut(&group) {
        *left -= 1;
        if *left == 0 {
            live.remove(&group);
        }
    }
}

#[cfg(test)]
mod tests;
