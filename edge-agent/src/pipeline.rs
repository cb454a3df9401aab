//! The middle of the path: from journalled entries to rows in lanes. Pure and deterministic: the same entries in the
//! same order give the same rows, which is what makes recovery exact (rule 1).
//!
//! [`Pipeline::apply`] takes an entry with its position; [`Pipeline::cut`] takes all rows so far, lane by lane.
//! [`Pipeline::snapshot`], taken when no row is pending, holds windows, counters and redelivery lists. After a crash the
//! entries behind the snapshot are applied again, and a lane takes only rows of entries at or behind its own position.
//! What goes by time when nothing comes (readings that wait, silent devices) goes by `judging.rs`' clock. Arrivals are corrected
//! by what the journal tells of the clock; while [`Pipeline::waits_for_clock`], the caller looks ahead for the entry that
//! resolves it ([`Pipeline::resolve_clock`]) before it applies another.
//! What does not decode or fails a check becomes a row of `quarantine`; so does what would not fit into a batch, or into the
//! one record that a lane gets at a cut: input alone never makes a cut fail. What rules find in readings and windows
//! becomes a row of `alerts`.

mod alerts;
mod change;
mod counters;
mod judging;
mod output;
mod quarantine;
mod snapshot;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use segment_log::Position;
use wire::schema::own;
use wire::sealed::CutError;
use wire::{CutBatch, Seq, SpoolId, StreamName, StreamSchema};

pub use self::counters::{Counters, SourceTotals, StreamTotals};
use self::output::{Cell, Output};
pub use self::snapshot::{SnapshotError, known_to_sources};
use crate::clock::{Mark, Told};
use crate::config::{Decoding, OnUntrusted, REST_LANE, Settings, SourceSettings, StreamSettings};
use crate::decode::{Command, Decoder, Reading, Rejected, Value};
use crate::entry::{Entry, Message, Payload};
use crate::places::Places;
use crate::redelivery::Lists;
use crate::rules::{InputId, Rules, Transition};
use crate::source::host;
use crate::validate::{Judge, Outcome, Quality, absent_schema};
use crate::window::{self, Late, WindowRow, Windows};

/// The version of this agent, in every batch.
pub const AGENT_VERSION: &str = concat!("weir ", env!("CARGO_PKG_VERSION"));
/// `quality` of a row with nothing against it.
const GOOD: &str = "good";
/// `quality` of a result of a window without its texts, which are too long.
const TOO_LARGE: &str = "too_large";
/// `quality` of a row that came too late for its windows (rule 5).
const LATE: &str = "late";
/// `quality` of a row that was made up for a gap.
const IMPUTED: &str = "imputed";
/// `quality` of a row that is stamped by its arrival, when the time was not known, and never came to be…
const CLOCK: &str = "clock";
/// …or was known only later.
const CLOCK_CORRECTED: &str = "clock:corrected";

/// One cut: for each lane what it gets; all entries before `position` are in it.
#[derive(Debug)]
pub struct Cut {
    pub position: Position,
    pub lanes: Vec<LaneCut>,
}

/// What one lane gets: batches, and the schemas that they use.
#[derive(Debug, Default)]
pub struct LaneCut {
    pub batches: Vec<CutBatch>,
    pub schemas: Vec<StreamSchema>,
}

/// One source's way through the middle.
#[derive(Debug)]
struct Source {
    decoder: Decoder,
    stream: usize,
}

/// A configured stream.
#[derive(Debug)]
struct Stream {
    name: StreamName,
    judge: Judge,
    windows: Windows,
    fill_in_windows: bool,
    output: usize,
    /// Why a reading went to quarantine last, since the start.
    last_error: Option<String>,
    /// The output of its absent devices.
    absent_output: Option<usize>,
    /// The outputs of its windows, in the order of the settings.
    window_outputs: Vec<usize>,
    /// Where its readings, its absent devices and those windows meet rules.
    rules: Option<InputId>,
    absent_rules: Option<InputId>,
    window_rules: Vec<Option<InputId>>,
    /// The reading that was accepted last, for people; not part of the state.
    last: Option<Reading>,
}

/// The state of the middle. See the module's documentation.
#[derive(Debug)]
pub struct Pipeline {
    configuration: u64,
    /// Behind the last entry that was applied.
    position: Position,
    sources: HashMap<String, Source>,
    streams: Vec<Stream>,
    outputs: Vec<Output>,
    quarantine: usize,
    losses: usize,
    alerts: usize,
    edge: String,
    /// The longest row; a quarter of what one record of a lane takes.
    row_bytes_max: usize,
    lane_names: Vec<String>,
    rules: Rules,
    /// Of the entry that was applied last.
    to_publish: Vec<Transition>,
    counters: Counters,
    lists: Lists,
    places: Places,
    /// The highest number of each sequence whose refusal is in quarantine: a crash between journal and spool makes the
    /// cloud refuse it again.
    refused: BTreeMap<(SpoolId, StreamName), Seq>,
    /// Streams that changed their lane since the snapshot that this began with.
    moved: BTreeMap<StreamName, snapshot::Moved>,
    /// Every stream goes to the lane that the snapshot names, from which this began.
    as_stored: bool,
    pending_rows: usize,
    pending_bytes: usize,
    scratch: Vec<Result<Reading, Rejected>>,
    quality: Quality,
    clock: judging::Clock,
    /// How far the clock goes between two entries at most; 0 when nothing goes by it.
    clock_step_us: i64,
    /// The streams in which something goes by the clock.
    by_clock: Vec<usize>,
    /// What the journal told of the gateway's clock.
    told: Told,
    on_untrusted: OnUntrusted,
    /// The time of the entry that is applied.
    now_us: i64,
    /// States of checks of streams that are not configured.
    orphans: Vec<(Bytes, Bytes)>,
}

impl Pipeline {
    /// An empty one at `position`. `lanes` are the positions up to which each lane has its rows, by name.
    pub fn new(settings: &Settings, position: Position, lanes: &BTreeMap<String, Position>) -> Self {
        let lane_settings = settings.lanes();
        let mut pipeline = Self {
            configuration: settings.version,
            position,
            sources: HashMap::new(),
            streams: Vec::new(),
            outputs: Vec::new(),
            quarantine: 0,
            losses: 0,
            alerts: 0,
            edge: settings.edge.id.to_string(),
            row_bytes_max: usize::try_from(settings.lane_segment_bytes() / 4).unwrap_or(usize::MAX),
            lane_names: lane_settings.iter().map(|lane| lane.name.to_string()).collect(),
            rules: Rules::new(settings).expect("checked with the settings"),
            to_publish: Vec::new(),
            counters: Counters::default(),
            lists: Lists::default(),
            places: Places::default(),
            refused: BTreeMap::new(),
            moved: BTreeMap::new(),
            as_stored: false,
            pending_rows: 0,
            pending_bytes: 0,
            scratch: Vec::new(),
            quality: Quality::default(),
            clock: judging::Clock::default(),
            clock_step_us: settings.tick_every().map_or(0, |every| 2 * every.as_micros() as i64),
            by_clock: Vec::new(),
            told: Told::default(),
            on_untrusted: settings.clock.on_untrusted,
            now_us: 0,
            orphans: Vec::new(),
        };
        let lane_of = |stream: &StreamName| {
            let named = lane_settings.iter().position(|lane| lane.streams.contains(stream));
            let rest = || lane_settings.iter().position(|lane| lane.name.as_str() == REST_LANE);
            named.or_else(rest).expect("there is always a lane for the rest")
        };
        let mut output = |stream: StreamName, schema: StreamSchema| {
            let lane = lane_of(&stream);
            let stands = lanes.get(&pipeline.lane_names[lane]).copied().unwrap_or_default();
            pipeline.outputs.push(Output::new(stream, schema, lane, stands));
            pipeline.outputs.len() - 1
        };
        pipeline.quarantine = output(own_name(own::QUARANTINE), own::quarantine());
        pipeline.losses = output(own_name(own::LOSSES), own::losses());
        pipeline.alerts = output(own_name(own::ALERTS), own::alerts());
        let streams = streams_of(settings);
        for (name, stream) in &streams {
            let main = output(name.clone(), stream.schema());
            let windows = stream.windows(name);
            let window_rules = windows.iter().map(|(window, _)| pipeline.rules.input(window)).collect();
            let schema = |window| window::schema(stream, window).expect("checked when the settings were read");
            let window_outputs =
                windows.into_iter().map(|(window, settings)| output(window, schema(settings))).collect();
            pipeline.streams.push(Stream {
                name: name.clone(),
                judge: Judge::new(stream),
                windows: Windows::new(name, stream),
                fill_in_windows: stream.fill_in_windows,
                output: main,
                last_error: None,
                absent_output: stream.absent_stream(name).map(|absent| output(absent, absent_schema())),
                window_outputs,
                rules: pipeline.rules.input(name),
                absent_rules: stream.absent_stream(name).and_then(|absent| pipeline.rules.input(&absent)),
                window_rules,
                last: None,
            });
        }
        pipeline.add_sources(settings, &streams);
        pipeline.find_by_clock();
        pipeline
    }

    /// Takes one entry: `position` is its own, `next` lies behind it.
    pub fn apply(&mut self, position: Position, next: Position, entry: &Entry) {
        self.position = next;
        self.to_publish.clear();
        self.lists.apply(entry);
        self.places.apply(entry);
        debug_assert!(!self.told.waits(), "it waits for the clock");
        let now = self.told.follow(entry);
        if let Some(now) = now {
            self.now_us = now;
            self.rules.tick(now);
        }
        match entry {
            Entry::Message(message) | Entry::Line { message, .. } => {
                self.advance_clock(position, self.now_us);
                self.message(position, message);
            }
            Entry::Tick { .. } => self.advance_clock(position, self.now_us),
            Entry::Clock(_) => {}
            // The caller goes on with a pipeline of the new configuration: `change.rs`.
            Entry::Configured { .. } => {}
            Entry::Session { .. } | Entry::Forgotten { .. } | Entry::Subscribed { .. } => {}
            Entry::Refused { spool, seq, reason, schema, batch } => {
                let key = (*spool, batch.stream.clone());
                if self.refused.get(&key).is_none_or(|highest| highest < seq) {
                    self.refused.insert(key, *seq);
                    self.refused_rows(position, *seq, reason, schema, batch);
                }
            }
            Entry::Missed { source, messages, bytes, first_us, last_us } => {
                let span = (self.told.corrected(*first_us), self.told.corrected(*last_us));
                self.missed(position, source, *messages, *bytes, span);
            }
        }
        if now.is_some() {
            self.rules.look_for_silence();
            self.write_alerts(position);
        }
    }

    /// The journal is damaged before `next`: what was there is lost, which the counters say.
    pub fn damaged(&mut self, from: Position, next: Position) {
        self.position = next;
        self.counters.journal_bytes_damaged += next.0 - from.0;
    }

    /// Whether what comes next may not be applied before it is known what time it is.
    pub fn waits_for_clock(&self) -> bool {
        self.told.waits()
    }

    /// Goes on when a later entry of the journal says what time it was; false when this one does not.
    pub fn resolve_clock(&mut self, later: &Mark) -> bool {
        let resolves = self.told.resolves(later);
        if resolves {
            self.told.resolve(later);
        }
        resolves
    }

    /// What the journal told of the clock up to [`Pipeline::position`].
    pub fn told(&self) -> &Told {
        &self.told
    }

    /// Behind the last entry that was applied.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Whether a restart from the snapshot that this began with would find every stream in its lane. If not, nothing may be
    /// cut before there is a new one.
    pub fn as_stored(&self) -> bool {
        self.as_stored
    }

    /// Rows that wait for a cut.
    pub fn pending_rows(&self) -> usize {
        self.pending_rows
    }

    /// About what they take in memory.
    pub fn pending_bytes(&self) -> usize {
        self.pending_bytes
    }

    /// Whether rows may be cut. A lane may be ahead of this pipeline, which an older snapshot brought here, or which another
    /// one has overtaken: what such a lane has is not pending, so it gets no record, and the others get all up to here. After
    /// streams have moved between lanes nothing is cut before all entries are applied again that some lane has already: the
    /// next move could not tell which of them has what.
    pub fn may_cut(&self) -> bool {
        let is_ahead = |output: &Output| output.skip_before > self.position;
        self.may_cut_to_change() && (self.moved.is_empty() || !self.outputs.iter().any(is_ahead))
    }

    /// Takes all pending rows; [`Pipeline::may_cut`] must hold.
    ///
    /// # Errors
    /// When Arrow cannot encode them, which no input brings about.
    pub fn cut(&mut self) -> Result<Cut, CutError> {
        debug_assert!(self.may_cut_to_change(), "a cut that a restart could not tell from none");
        let mut lanes = Vec::new();
        lanes.resize_with(self.lane_names.len(), LaneCut::default);
        for output in &mut self.outputs {
            let batches = output.cut(AGENT_VERSION, self.configuration)?;
            if !batches.is_empty() {
                lanes[output.lane].batches.extend(batches);
                lanes[output.lane].schemas.push(output.schema().clone());
            }
        }
        (self.pending_rows, self.pending_bytes) = (0, 0);
        // What lies behind the old lane's position is still to come, and is there.
        self.moved.retain(|_, moved| moved.has > self.position.0);
        Ok(Cut { position: self.position, lanes })
    }

    /// What was counted, over all restarts.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Redeliveries never reach the journal; the sources tell them here, for the next snapshot.
    pub fn set_redelivered(&mut self, source: &str, messages: u64) {
        self.counters.source(source).redelivered = messages;
    }

    /// What decoders ask to be published, by source: requests for births, which a replay of the journal brings about again.
    /// The caller publishes what comes of new entries, and may drop the rest: what is needed is asked for again.
    pub fn take_commands(&mut self) -> Vec<(String, Command)> {
        let of = |(name, source): (&String, &mut Source)| {
            source.decoder.take_commands().into_iter().map(|command| (name.clone(), command)).collect::<Vec<_>>()
        };
        self.sources.iter_mut().flat_map(of).collect()
    }

    /// What is known of the brokers' deliveries up to [`Pipeline::position`].
    pub fn lists(&self) -> &Lists {
        &self.lists
    }

    /// The reading of a stream that was accepted last since the start, and its fields.
    pub fn last(&self, stream: &StreamName) -> Option<(&Reading, &StreamSchema)> {
        let stream = self.streams.iter().find(|known| known.name == *stream)?;
        Some((stream.last.as_ref()?, self.outputs[stream.output].schema()))
    }

    /// How far the journal is in each file up to [`Pipeline::position`].
    pub fn places(&self) -> &Places {
        &self.places
    }

    /// The streams with their watermarks (µs), and the rows that wait for a cut.
    pub fn streams(&self) -> impl Iterator<Item = (&StreamName, i64, usize)> {
        self.outputs.iter().map(|output| (&output.stream, output.watermark, output.rows()))
    }

    /// Why a reading of a stream went to quarantine last, since the start.
    pub fn last_error(&self, stream: &StreamName) -> Option<&str> {
        self.streams.iter().find(|known| known.name == *stream).and_then(|stream| stream.last_error.as_deref())
    }

    fn add_sources(&mut self, settings: &Settings, streams: &BTreeMap<StreamName, StreamSettings>) {
        let index = |name: &StreamName| self.streams.iter().position(|stream| stream.name == *name);
        let mut sources = HashMap::new();
        for source in &settings.source {
            let Some(stream) = index(source.stream()) else { continue };
            let stream_settings = &streams[source.stream()];
            let own = || Decoding { map: host::map(), ..Decoding::default() };
            let decoder = Decoder::new(&source.decoding().unwrap_or_else(own), stream_settings);
            sources.insert(source.name().to_owned(), Source { decoder, stream });
        }
        self.sources = sources;
    }

    fn message(&mut self, position: Position, message: &Message) {
        self.counters.source(&message.source).journalled += 1;
        let Some(source) = self.sources.get_mut(&message.source) else {
            let rejected =
                quarantine::whole(message, "unknown_source", "no [[source]] has this name any more".to_owned());
            return self.reject(position, message, &rejected, None, true);
        };
        let stream = source.stream;
        let payload = match &message.payload {
            Payload::Whole(payload) => payload,
            Payload::Oversized { len, crc, .. } => {
                let detail = format!("{len} bytes are more than max_payload; crc32c {crc:08x}");
                let rejected = quarantine::whole(message, "too_large", detail);
                return self.reject(position, message, &rejected, Some(stream), true);
            }
        };
        let mut readings = std::mem::take(&mut self.scratch);
        // `kept`: a row of quarantine has all of the message.
        let (mut taken, mut rest, mut kept) = (0, 0, false);
        let filtered = source.decoder.decode(&message.topic, payload, self.now_us, &mut readings);
        let suspect = match (self.told.is_guess(), self.told.is_afterthought(), self.on_untrusted) {
            (true, ..) => Some(CLOCK),
            (_, true, OnUntrusted::Flag) => Some(CLOCK_CORRECTED),
            _ => None,
        };
        let by_arrival =
            suspect.map(|word| (source.decoder.by_arrival(&message.topic, payload, self.now_us, &readings), word));
        let totals = self.counters.source(&message.source);
        totals.read += filtered;
        totals.filtered += filtered;
        for (index, reading) in readings.drain(..).enumerate() {
            // A short text of the message may stand in each of its rows.
            if taken > self.row_bytes_max {
                rest += 1;
                continue;
            }
            let judged = reading.and_then(|mut reading| match self.judge(position, stream, &mut reading, &mut taken) {
                Ok(outcome) => Ok((reading, outcome)),
                Err((reason, detail)) => {
                    let payload = payload.slice(reading.span);
                    Err(Rejected { reason, detail, device: Some(reading.device), payload })
                }
            });
            match judged {
                Ok((reading, Outcome::Keep { .. })) => {
                    if let Some((by_arrival, word)) = &by_arrival
                        && by_arrival[index]
                    {
                        self.quality.note(word);
                    }
                    self.keep(position, message, stream, reading);
                }
                Ok((_, Outcome::Repeat)) => {
                    let totals = self.counters.source(&message.source);
                    totals.read += 1;
                    totals.duplicate += 1;
                }
                Err(rejected) => {
                    taken += rejected.payload.len() + rejected.detail.len() + message.topic.len();
                    self.reject(position, message, &rejected, Some(stream), !kept);
                    kept |= rejected.payload.len() == payload.len();
                }
            }
        }
        self.scratch = readings;
        if rest > 0 {
            self.reject_rest(position, message, stream, rest);
        }
        self.close_windows(position, stream);
        self.absences(position, stream);
    }

    /// A row of the stream; `quality` is what checks found.
    fn row(&mut self, position: Position, stream: usize, reading: &Reading, quality: &str, in_windows: bool) {
        let stream = &mut self.streams[stream];
        let late = if in_windows { stream.windows.add(reading) } else { Late::Good };
        let joined;
        let quality = match (late, quality) {
            (Late::Good, "") => GOOD,
            (Late::Good, found) => found,
            (Late::Late, "") => LATE,
            (Late::Late, found) => {
                joined = format!("{found},{LATE}");
                &joined
            }
        };
        let output = &mut self.outputs[stream.output];
        output.watermark = output.watermark.max(stream.windows.watermark());
        let totals = self.counters.stream(&output.stream);
        totals.rows += 1;
        totals.late += u64::from(late == Late::Late);
        if position < output.skip_before {
            return;
        }
        let before = output.bytes();
        output.push(reading.ts, Some(&reading.device), reading.values.iter().map(cell), quality);
        self.pending_rows += 1;
        self.pending_bytes += output.bytes() - before;
    }

    fn close_windows(&mut self, position: Position, index: usize) {
        let rows = self.streams[index].windows.advance();
        self.window_rows(position, index, rows);
    }

    fn window_rows(&mut self, position: Position, index: usize, rows: Vec<WindowRow>) {
        let stream = &self.streams[index];
        let mut complete = None;
        for row in &rows {
            let output = &mut self.outputs[stream.window_outputs[row.window]];
            if complete != Some(row.window) {
                complete = Some(row.window);
                output.watermark = output.watermark.max(stream.windows.complete_to(row.window));
            }
            self.counters.stream(&output.stream).rows += 1;
            if position < output.skip_before {
                continue;
            }
            let before = output.bytes();
            // Its texts may be of as many readings.
            let too_large = cells_bytes(&row.values) > self.row_bytes_max;
            let value = |value| match value {
                &Some(Value::Text(_)) if too_large => Cell::Null,
                value => cell(value),
            };
            let bounds = [Cell::Time(row.start), Cell::Time(row.end), Cell::Int(row.count)];
            let cells = bounds.into_iter().chain(row.values.iter().map(value)).chain([Cell::Int(row.revision)]);
            output.push(row.start, Some(&row.device), cells, if too_large { TOO_LARGE } else { GOOD });
            self.pending_rows += 1;
            self.pending_bytes += output.bytes() - before;
        }
        self.judge_windows(position, index, rows);
    }
}

/// The streams of the settings, and the agent's own.
fn streams_of(settings: &Settings) -> BTreeMap<StreamName, StreamSettings> {
    let mut streams = settings.stream.clone();
    if settings.source.iter().any(|source| matches!(source, SourceSettings::Host(_))) {
        streams.insert(own_name("host"), host::stream_settings());
    }
    streams
}

fn own_name(name: &str) -> StreamName {
    name.parse().expect("an own name is valid")
}

/// What values take in a row, about.
fn cells_bytes(values: &[Option<Value>]) -> usize {
    let bytes = |value: &Option<Value>| match value {
        Some(Value::Text(text)) => 4 + text.len(),
        _ => 8,
    };
    values.iter().map(bytes).sum()
}

fn cell(value: &Option<Value>) -> Cell<'_> {
    match value {
        None => Cell::Null,
        Some(Value::Float(value)) => Cell::Float(*value),
        Some(Value::Int(value)) => Cell::Int(*value),
        Some(Value::Bool(value)) => Cell::Bool(*value),
        Some(Value::Text(value)) => Cell::Text(value),
    }
}
