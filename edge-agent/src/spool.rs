//! What waits for the cloud: one log per lane, in which a cut is one record and so atomic.
//!
//! Promises (rules 1 and 2): a batch has no number until it is first sent, and the number is synced before its bytes
//! leave; one number never has two contents; a numbered batch that rots becomes a void batch of the same number; what
//! is freed was acknowledged with a CRC of our own. What a policy drops has no number and becomes a row of `losses`
//! in the same record that drops it. A failed sync is final: the caller stops the process.
//!
//! The lane logs lie in `<spool>/<id>/<lane>`; `<spool>/id` names the id in force. The records are in `spool/record.rs`.
//! Memory: about 100 bytes for each batch that waits; bodies stay on disk.

mod losses;
mod record;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use segment_log::{
    AppendError, Appended, Damage, FileLayer, FreeError, LayerFile, OpenError, Options, Position, ReadError,
    SegmentLog, SyncError,
};
use serde::{Deserialize, Serialize};
use wire::sealed::BatchHeader;
use wire::{CutBatch, EdgeId, Mark, SchemaId, SealedBatch, Seq, SpoolId, StreamName, StreamSchema};

use self::record::Place;

/// Kept in each lane for numbers, acks and losses when the lane is full.
const RESERVE_BYTES: u64 = 64 << 10;
/// Batches that one `dropped` record names at most, so that it fits in the reserve.
const DROPPED_MAX: usize = 512;

/// What happens to a cut that does not fit in its lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFull {
    /// The pipeline waits; the journal fills, and then the sources are not acknowledged.
    Refuse,
    /// The oldest batches without a number go, and are counted in `losses`.
    DropOldest,
}

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
    waiting: VecDeque<Waiting>,
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
    rows_lost: u64,
    rows_freed: u64,
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
        let id = settle_id(layer, directory, fresh)?;
        let mut spool = Self {
            id,
            lanes: Vec::new(),
            sequences: HashMap::new(),
            schemas: HashMap::new(),
            rows_lost: 0,
            rows_freed: 0,
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
            let path = directory.join(id.to_string()).join(&lane.name);
            let (log, opening) = SegmentLog::open(layer.clone(), path, options)?;
            for damage in opening.incidents {
                incidents.push(Incident { lane: lane.name.clone(), damage });
            }
            let schemas = (log.newest_segment(), Vec::new());
            let cut = Position(0);
            spool.lanes.push(Lane {
                settings: lane,
                log,
                cut,
                waiting: VecDeque::new(),
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

    /// Rows that are in the spool, numbered or not.
    pub fn rows(&self) -> u64 {
        let waiting = self.lanes.iter().flat_map(|lane| &lane.waiting).map(|batch| u64::from(batch.rows));
        let numbered = self.sequences.values().flat_map(|s| &s.numbered).map(|batch| u64::from(batch.rows));
        waiting.sum::<u64>() + numbered.sum::<u64>()
    }

    /// Rows freed by an ack, and rows dropped by a policy, since opening.
    pub fn rows_freed_and_lost(&self) -> (u64, u64) {
        (self.rows_freed, self.rows_lost)
    }

    /// Bytes on disk of a lane.
    pub fn bytes_on_disk(&self, lane: usize) -> u64 {
        self.lanes[lane].log.bytes_on_disk()
    }

    /// The canonical text of a schema that a batch here uses.
    pub fn schema(&self, id: SchemaId) -> Option<&str> {
        self.schemas.get(&id).map(String::as_str)
    }

    /// How far the stream is numbered.
    pub fn head(&self, stream: &StreamName) -> Mark {
        self.sequences.get(stream).map(|sequence| sequence.head).unwrap_or_default()
    }

    /// The lane and stream of what has no number yet, first come first, lane by lane.
    pub fn waiting(&self) -> impl Iterator<Item = (usize, &StreamName)> {
        self.lanes.iter().enumerate().flat_map(|(index, lane)| lane.waiting.iter().map(move |w| (index, &w.stream)))
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
        for waiting in self.lanes[lane].waiting.iter().filter(|waiting| waiting.stream == *stream) {
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
            let void = batch.header().void.is_some().then(|| batch.clone());
            if void.is_some() {
                self.put(lane, record::VOID, batch.bytes(), &[], true)?;
            }
            let sequence = self.sequences.entry(stream.clone()).or_default();
            sequence.head = mark;
            let numbered = Numbered { place: waiting.place, mark, rows: waiting.rows, bytes: waiting.bytes, void };
            sequence.numbered.push_back(numbered);
            self.lanes[lane].waiting.retain(|other| other.place != waiting.place);
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
                _ => sealed.push(self.void(stream, numbered.mark.seq, "rotted on the edge's disk")?),
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
        let (previous, numbered) = self.find(stream, seq).expect("only a batch that is held is made void");
        let waiting =
            Waiting { place: numbered.place, stream: stream.clone(), rows: 0, bytes: 0, min_ts: 0, max_ts: 0 };
        let lane = numbered.place.lane;
        let void = SealedBatch::void(self.header(&waiting, previous), reason, numbered.mark.crc);
        self.put(lane, record::VOID, void.bytes(), &[], true)?;
        self.lanes[lane].log.sync()?;
        self.set_void(void.clone());
        Ok(void)
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
            self.rows_freed += u64::from(numbered.rows);
            release(&mut self.lanes[numbered.place.lane].live, numbered.place.group);
            if !touched.contains(&numbered.place.lane) {
                touched.push(numbered.place.lane);
            }
        }
        let freed = sequence.freed;
        for &lane in &touched {
            // Not worth a sync of its own: if it is forgotten, the next `positions` says it again.
            match self.put(lane, record::FREED, &record::freed(stream, freed), &[], true) {
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

    fn read(&self, place: Place) -> Result<Option<CutBatch>, SpoolError> {
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
        Ok(match record.kind {
            record::GROUP => {
                record::read_group(payload).and_then(|(_, batches)| batches.into_iter().nth(place.index as usize))
            }
            record::DROPPED => record::read_dropped(place.lane, payload).map(|(_, losses)| losses),
            _ => None,
        })
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
        let state = self.state(lane);
        let schemas = &self.schemas;
        let lane = &mut self.lanes[lane];
        let name = &lane.settings.name;
        let full = |error| match error {
            AppendError::Full => SpoolError::Full(name.clone()),
            other => SpoolError::Append(other),
        };
        let texts = |id: &SchemaId| schemas.get(id).map_or(0, |text| text.len() + 64);
        let needed = payload.len() + ids.iter().map(texts).sum::<usize>();
        if lane.log.starts_segment(needed) {
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
        let mut out = self.lanes[lane].cut.0.to_le_bytes().to_vec();
        let json = serde_json::to_vec(&heads.collect::<HashMap<_, _>>()).expect("names and numbers are JSON");
        out.extend(json);
        out
    }

    fn admit(&mut self, lane: usize, position: Position, batches: &[CutBatch]) {
        for (index, batch) in batches.iter().enumerate() {
            self.lanes[lane].waiting.push_back(Waiting {
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

    /// Drops the oldest waiting batches of the lane's first segment; losses among them are summed into the new ones, so
    /// that they pin no segment. False: nothing to drop.
    fn drop_oldest(&mut self, lane: usize, now_us: i64) -> Result<bool, SpoolError> {
        let own = wire::schema::own::LOSSES;
        let reach = self.lanes[lane].settings.segment_bytes;
        let mut victims = self.lanes[lane].waiting.iter().take(DROPPED_MAX).cloned().collect::<Vec<_>>();
        let Some(first) = victims.first().map(|waiting| waiting.place.group) else { return Ok(false) };
        victims.retain(|waiting| waiting.place.group < first.saturating_add(reach));
        if victims.iter().all(|waiting| waiting.stream.as_str() == own) {
            return Ok(false);
        }
        let mut carried = Vec::new();
        for victim in victims.iter().filter(|waiting| waiting.stream.as_str() == own) {
            let Some(earlier) = self.read(victim.place)? else { continue };
            let numbered = earlier.number(&self.settings.edge, self.id, Seq(1), 0);
            carried.extend(numbered.decode(&losses::schema()).ok());
        }
        let losses = losses::batch(&victims, &carried, &self.settings, &self.lanes[lane].settings.name, now_us)?;
        let places = victims.iter().map(|waiting| waiting.place).collect::<Vec<_>>();
        let schema = losses::schema();
        self.schemas.entry(schema.id()).or_insert_with(|| schema.canonical().to_owned());
        let payload = record::dropped(&places, &losses);
        let appended = self.put(lane, record::DROPPED, &payload, &[schema.id()], true)?;
        self.lanes[lane].log.sync()?;
        let dropped = victims.iter().filter(|waiting| waiting.stream.as_str() != own);
        self.rows_lost += dropped.map(|waiting| u64::from(waiting.rows)).sum::<u64>();
        self.forget(lane, &places);
        self.admit(lane, appended.position, std::slice::from_ref(&losses));
        self.free_segments(lane)?;
        Ok(true)
    }

    fn forget(&mut self, lane: usize, places: &[Place]) {
        let lane = &mut self.lanes[lane];
        lane.waiting.retain(|waiting| !places.contains(&waiting.place));
        places.iter().for_each(|place| release(&mut lane.live, place.group));
    }

    fn set_void(&mut self, void: SealedBatch) {
        let sequence = self.sequences.get_mut(&void.header().stream);
        let numbered = sequence.and_then(|s| s.numbered.iter_mut().find(|n| n.mark.seq == void.header().seq));
        if let Some(numbered) = numbered {
            numbered.void = Some(void);
        }
    }

    /// Reads a lane from its start. Numbers are only gathered: a stream may have moved between lanes.
    fn replay(&mut self, index: usize, found: &mut Vec<Found>) -> Result<(), SpoolError> {
        let mut reader = self.lanes[index].log.reader(self.lanes[index].log.start()).map_err(SpoolError::Read)?;
        loop {
            let record = match reader.next() {
                Ok(Some(record)) => record,
                Ok(None) => return Ok(()),
                // Reported at opening; a numbered batch in it becomes void when it is asked for.
                Err(ReadError::Damaged { .. }) => continue,
                Err(error) => return Err(SpoolError::Read(error)),
            };
            let (position, kind, payload) = (record.position, record.kind, Bytes::copy_from_slice(record.payload));
            self.replay_record(index, position, kind, payload, found);
        }
    }

    fn replay_record(&mut self, lane: usize, position: Position, kind: u8, payload: Bytes, found: &mut Vec<Found>) {
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
                if let Some((cut, batches)) = record::read_group(payload) {
                    self.lanes[lane].cut = self.lanes[lane].cut.max(cut);
                    self.admit(lane, position, &batches);
                }
            }
            record::NUMBERED => {
                if let Some((place, stream, mark)) = record::read_numbered(lane, payload) {
                    found.push(Found::Numbered(place, stream, mark));
                }
            }
            record::FREED => {
                if let Some((stream, mark)) = record::read_freed(payload) {
                    found.push(Found::Freed(stream, mark));
                }
            }
            record::DROPPED => {
                if let Some((places, losses)) = record::read_dropped(lane, payload) {
                    self.forget(lane, &places);
                    self.admit(lane, position, std::slice::from_ref(&losses));
                }
            }
            record::VOID => found.extend(SealedBatch::parse(payload).ok().map(Found::Void)),
            record::STATE if payload.len() >= 8 => {
                let (cut, json) = payload.split_at(8);
                let cut = Position(u64::from_le_bytes(cut.try_into().expect("eight bytes were split off")));
                self.lanes[lane].cut = self.lanes[lane].cut.max(cut);
                let heads = serde_json::from_slice::<HashMap<StreamName, Heads>>(json).unwrap_or_default();
                found.extend(heads.into_iter().map(|(stream, heads)| Found::Heads(stream, heads)));
            }
            _ => {}
        }
    }

    fn settle(&mut self, found: Vec<Found>) {
        let mut voids = Vec::new();
        for fact in found {
            match fact {
                Found::Heads(stream, heads) => {
                    let sequence = self.sequences.entry(stream).or_default();
                    sequence.head = later(sequence.head, heads.head);
                    sequence.freed = later(sequence.freed, heads.freed);
                }
                Found::Freed(stream, mark) => {
                    let sequence = self.sequences.entry(stream).or_default();
                    sequence.head = later(sequence.head, mark);
                    sequence.freed = later(sequence.freed, mark);
                }
                Found::Numbered(place, stream, mark) => {
                    let sequence = self.sequences.entry(stream).or_default();
                    sequence.head = later(sequence.head, mark);
                    let waiting = &mut self.lanes[place.lane].waiting;
                    let at = waiting.iter().position(|waiting| waiting.place == place);
                    let taken = at.and_then(|at| waiting.remove(at));
                    let (rows, bytes) = taken.map_or((0, 0), |waiting| (waiting.rows, waiting.bytes));
                    sequence.numbered.push_back(Numbered { place, mark, rows, bytes, void: None });
                }
                Found::Void(void) => voids.push(void),
            }
        }
        for sequence in self.sequences.values_mut() {
            sequence.numbered.make_contiguous().sort_by_key(|numbered| numbered.mark.seq);
            while let Some(freed) = sequence.numbered.pop_front_if(|n| n.mark.seq <= sequence.freed.seq) {
                release(&mut self.lanes[freed.place.lane].live, freed.place.group);
            }
        }
        voids.into_iter().for_each(|void| self.set_void(void));
    }
}

/// What replay gathers before the lanes are put together.
enum Found {
    Numbered(Place, StreamName, Mark),
    Freed(StreamName, Mark),
    Void(SealedBatch),
    Heads(StreamName, Heads),
}

fn later(one: Mark, other: Mark) -> Mark {
    if other.seq > one.seq { other } else { one }
}

fn release(live: &mut BTreeMap<u64, u32>, group: u64) {
    if let Some(left) = live.get_mut(&group) {
        *left -= 1;
        if *left == 0 {
            live.remove(&group);
        }
    }
}

/// Reads `<directory>/id`, or makes it durable with the directory.
fn settle_id<L: FileLayer>(layer: &L, directory: &Path, fresh: SpoolId) -> Result<SpoolId, SpoolError> {
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
        let temporary = directory.join("id.new");
        match layer.remove(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(&temporary, error)),
            _ => {}
        }
        let file = layer.create(&temporary).map_err(|e| io(&temporary, e))?;
        file.write_all_at(fresh.to_string().as_bytes(), 0).map_err(|e| io(&temporary, e))?;
        file.sync_data().map_err(|e| io(&temporary, e))?;
        layer.rename(&temporary, &path).map_err(|e| io(&path, e))?;
        fresh
    };
    make(&directory.join(id.to_string()))?;
    // The name `id` and the directory it points to are durable before anything is written below.
    layer.sync_dir(directory).map_err(|e| io(directory, e))?;
    Ok(id)
}

#[cfg(test)]
mod tests;
