//! What waits for the cloud: one log per lane, in which a cut is one record, or several of which the last one counts, and so
//! atomic.
//!
//! Promises (rules 1 and 2): a batch has no number until it is first sent, and the number is synced before its bytes
//! leave; one number never has two contents; a numbered batch that rots becomes a void batch of the same number; what
//! is freed was acknowledged with a CRC of our own. What a policy drops has no number and becomes a row of `losses`
//! in the same record that drops it. A failed sync is final: the caller stops the process.
//!
//! The path of a batch: [`Spool::append`] here, `number.rs` when it is sent, `free.rs` when it is committed; `drop.rs`,
//! `room.rs`, `fork.rs` and `recover.rs` are the other ways. All write through `put.rs`.
//!
//! The lane logs lie in `<spool>/<id>/<lane>`; `<spool>/id` names the id in force. The records are in `spool/record.rs`.
//! A lane that the settings no longer have is opened behind the others and drained; it gets no new cuts. Memory: what waits
//! takes no more than a 512th of what the lanes may take on disk (`spool/queue.rs`), and each batch that is sent and not
//! committed about 100 bytes; bodies stay on disk.

mod append;
mod change;
mod drop;
mod export;
mod fork;
mod free;
mod losses;
mod number;
mod put;
mod queue;
mod record;
mod recover;
mod room;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::path::{Path, PathBuf};

use segment_log::{
    AppendError, Damage, FileLayer, FreeError, OpenError, Options, Position, ReadError, SegmentLog, SyncError,
};
use serde::{Deserialize, Serialize};
use wire::{CutBatch, EdgeId, Mark, SchemaId, SealedBatch, Seq, SpoolId, StreamName};

use self::queue::Queues;
use self::record::Place;
pub use crate::config::OnFull;

/// Kept in each lane for numbers, acks and losses when the lane is full.
const RESERVE_BYTES: u64 = 64 << 10;
/// What a sealed batch takes beside its body, about.
const BATCH_OVERHEAD: usize = 256;

/// One lane, highest priority first in [`SpoolSettings::lanes`].
#[derive(Debug, Clone)]
pub struct LaneSettings {
    /// Also the name of its directory.
    pub name: String,
    pub max_bytes: u64,
    pub segment_bytes: u64,
    pub on_full: OnFull,
    /// What [`OnFull::Thin`] drops; all else it keeps.
    pub raw: BTreeSet<StreamName>,
    /// What waits for longer without a number is dropped.
    pub max_age_us: Option<i64>,
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

impl SpoolError {
    /// Whether there was no room, in a lane or on the disk: a state, which passes.
    pub fn is_full(&self) -> bool {
        let full =
            |error: &io::Error| matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        match self {
            Self::Full(_) | Self::Open(OpenError::Marker { source: AppendError::Full, .. }) => true,
            Self::Open(OpenError::Io { source, .. }) | Self::Io { source, .. } => full(source),
            _ => false,
        }
    }
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
    /// Rows of `losses` that the spool itself has made, less those that it took back: came = sealed + made.
    pub made: i64,
    /// Of all cuts: freed + lost + voided + spooled - made.
    pub cut: u64,
}

/// One lane, for status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneInfo {
    pub name: String,
    pub bytes: u64,
    pub max_bytes: u64,
    /// Since the start, or the last fork.
    pub bytes_written: u64,
    pub batches_waiting: usize,
}

/// What a lane has counted: in each record that changes it, so a torn tail takes both or neither.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Totals {
    freed: u64,
    lost: u64,
    voided: u64,
    made: i64,
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
    /// Where the cut stood that brought it, and its index there: `place` may have changed since. Batches of a stream wait in
    /// this order.
    came: (u64, u32),
    sealed_us: i64,
}

impl Waiting {
    fn new(place: Place, batch: &CutBatch, came: (u64, u32), sealed_us: i64) -> Self {
        Self {
            place,
            stream: batch.stream.clone(),
            rows: batch.rows,
            bytes: batch.body.len() + BATCH_OVERHEAD,
            min_ts: batch.min_ts,
            max_ts: batch.max_ts,
            came,
            sealed_us,
        }
    }
}

/// A batch with a number. `mark.crc` is that of the chain: of the batch that was numbered first.
#[derive(Debug, Clone)]
struct Numbered {
    place: Place,
    mark: Mark,
    rows: u32,
    bytes: usize,
    void: Option<Box<SealedBatch>>,
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
    waiting: Queues,
    /// Where the log ended when batches of the stream were chosen last: what has come since is live.
    chosen: HashMap<StreamName, Position>,
    /// The losses that were written last, and in which hour: as long as they wait, those that follow join them.
    losses: Option<(Place, i64)>,
    totals: Totals,
    /// All that were ever cut for this lane.
    rows: u64,
    /// How many batches of each segment are still needed.
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
    /// Whether what is appended has an age.
    knows_clock: bool,
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
            knows_clock: true,
            schemas: HashMap::new(),
            read_last: None,
            settings,
        };
        // Void batches and losses carry it.
        let losses = losses::schema();
        spool.schemas.insert(losses.id(), losses.canonical().to_owned());
        let mut incidents = Vec::new();
        let mut found = recover::Found::default();
        for (index, lane) in spool.settings.lanes.clone().into_iter().enumerate() {
            let options =
                Options { segment_bytes: lane.segment_bytes, max_bytes: lane.max_bytes, reserve_bytes: RESERVE_BYTES };
            let (mut log, opening) = SegmentLog::open(layer.clone(), path.join(&lane.name), options)?;
            put::keep_spare(&mut log, &lane, &path)?;
            for damage in opening.incidents {
                incidents.push(Incident { lane: lane.name.clone(), damage });
            }
            let schemas = (log.newest_segment(), Vec::new());
            spool.lanes.push(Lane {
                settings: lane,
                log,
                cut: Position(0),
                waiting: Queues::new(index),
                chosen: HashMap::new(),
                losses: None,
                totals: Totals::default(),
                rows: 0,
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
        let waiting = self.lanes.iter().flat_map(|lane| lane.waiting.streams());
        let numbered = self.sequences.values().flat_map(|s| &s.numbered);
        waiting.map(|(_, queue)| queue.rows).sum::<u64>() + numbered.map(|batch| u64::from(batch.rows)).sum::<u64>()
    }

    /// Rows of each stream that are in the spool, numbered or not.
    pub fn rows_of_streams(&self) -> HashMap<&StreamName, u64> {
        let waiting = self.lanes.iter().flat_map(|lane| lane.waiting.streams());
        let waiting = waiting.map(|(stream, queue)| (stream, queue.rows));
        let numbered = self.sequences.iter();
        let numbered =
            numbered.flat_map(|(stream, s)| s.numbered.iter().map(move |batch| (stream, u64::from(batch.rows))));
        let mut rows = HashMap::new();
        waiting.chain(numbered).for_each(|(stream, count)| *rows.entry(stream).or_default() += count);
        rows
    }

    /// Where all rows that ever came here are now.
    pub fn rows_counted(&self) -> RowCounts {
        let sum = |value: fn(&Totals) -> u64| self.lanes.iter().map(|lane| value(&lane.totals)).sum();
        let made = self.lanes.iter().map(|lane| lane.totals.made).sum();
        RowCounts {
            freed: sum(|totals| totals.freed),
            lost: sum(|totals| totals.lost),
            voided: sum(|totals| totals.voided),
            spooled: self.rows(),
            made,
            cut: self.lanes.iter().map(|lane| lane.rows).sum(),
        }
    }

    /// The lanes, in order of priority.
    pub fn lanes(&self) -> impl Iterator<Item = LaneInfo> {
        self.lanes.iter().map(|lane| LaneInfo {
            name: lane.settings.name.clone(),
            bytes: lane.log.bytes_on_disk(),
            max_bytes: lane.settings.max_bytes,
            bytes_written: lane.log.counters().bytes_written,
            batches_waiting: lane.waiting.streams().map(|(_, queue)| queue.batches).sum(),
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
            let mut streams = lane.waiting.streams().map(|(stream, queue)| (queue.first(), stream)).collect::<Vec<_>>();
            streams.sort_by_key(|(group, _)| *group);
            waiting.extend(streams.into_iter().map(|(_, stream)| (index, stream)));
        }
        waiting
    }

    /// Whether a batch waits that has come since batches of its stream were chosen for sending.
    pub fn has_live(&self) -> bool {
        let mut waiting = self
            .lanes
            .iter()
            .enumerate()
            .flat_map(|(index, lane)| lane.waiting.streams().map(move |one| (index, one.0)));
        waiting.any(|(lane, stream)| self.is_live(lane, stream))
    }

    /// The same of one stream in a lane.
    pub fn is_live(&self, lane: usize, stream: &StreamName) -> bool {
        let lane = &self.lanes[lane];
        let came = |queue: &queue::Queue| lane.chosen.get(stream).is_none_or(|until| queue.newest() >= until.0);
        lane.waiting.of(stream).is_some_and(came)
    }

    /// Streams with numbered batches above `freed`, the lane of the last, and its number.
    pub fn numbered(&self) -> impl Iterator<Item = (usize, &StreamName, Mark)> {
        let streams = self.sequences.iter();
        streams.filter_map(|(stream, s)| s.numbered.back().map(|last| (last.place.lane, stream, s.head)))
    }

    /// Whether the time that it is given is known to be right; what is appended when it is not has no age.
    pub fn know_clock(&mut self, knows: bool) {
        self.knows_clock = knows;
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

    fn forget(&mut self, lane: usize, places: &[Place]) -> Result<(), SpoolError> {
        for place in places {
            if self.lanes[lane].take(None, *place)?.is_some() {
                self.lanes[lane].release(*place);
            }
        }
        Ok(())
    }
}

impl<L: FileLayer> Lane<L> {
    /// Takes a batch out of those that wait; its place is still held.
    fn take(&mut self, stream: Option<&StreamName>, place: Place) -> Result<Option<Waiting>, SpoolError> {
        self.waiting.take(&self.log, stream, place).map_err(SpoolError::Read)
    }

    /// The segment of this place is needed once more.
    fn hold(&mut self, place: Place) {
        if let Some(segment) = self.log.segment_of(Position(place.group)) {
            *self.live.entry(segment.0).or_default() += 1;
        }
    }

    /// What stood here needs its segment no more.
    fn release(&mut self, place: Place) {
        let Some(segment) = self.log.segment_of(Position(place.group)) else { return };
        if let Some(left) = self.live.get_mut(&segment.0) {
            *left -= 1;
            if *left == 0 {
                self.live.remove(&segment.0);
            }
        }
    }
}

#[cfg(test)]
mod tests;
