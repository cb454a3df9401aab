//! Windows over event time, for each device or another group: tumbling, hopping, or sessions (`window/session.rs`).
//!
//! A tumbling or hopping window begins at a multiple of `every` since 1970 UTC. The stream's watermark is its newest event
//! time minus `lateness`, and never falls; a window closes when the watermark reaches its end, with revision 1. A later row
//! re-opens exactly its windows, whose next results have a higher revision. A row more than `reopen_within` behind the
//! watermark enters no window ([`Late::Late`]). `first` and `last` go by event time, of equal times by order of arrival;
//! nulls count in `count` alone; the sum of int64 is null when it does not fit. Quantiles are within 1 % (`window/sketch.rs`).
//!
//! One reading from the future, which checks allow up to a day ahead, moves the watermark for its whole stream.
//!
//! Pure and deterministic. At most [`WINDOWS_MAX`] results are held for a stream, and `windows_max_bytes` of them, looked at
//! after each message: then the oldest windows are closed early, and the oldest closed ones are given up, and rows for them
//! are late. What counts is what is held, not what the machine needs for it, so a restart changes nothing. State as bytes:
//! `window/state.rs`.

mod aggregate;
mod group;
mod session;
mod sketch;
mod state;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use wire::schema::SchemaError;
use wire::{FieldType, StreamField, StreamName, StreamSchema};

use self::aggregate::{Aggregate, Wants};
use self::group::Grouping;
use self::session::Sessions;
pub use self::state::StateError;
use crate::config::{AggregateKind, By, StreamSettings, WindowSettings};
use crate::decode::{Reading, Value};

/// Results (window and device) that are held for a stream, open and closed ones together.
pub const WINDOWS_MAX: usize = 200_000;

/// Whether a row was in time for its windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Late {
    Good,
    Late,
}

/// A result.
#[derive(Debug, Clone, PartialEq)]
pub struct WindowRow {
    /// Which of the stream's windows, in the order of the settings.
    pub window: usize,
    /// `*` when the row stands for several.
    pub device: String,
    /// Which group it is of, when that is more than its device.
    pub group: Option<String>,
    /// µs since 1970 UTC; the end is not in the window.
    pub start: i64,
    pub end: i64,
    pub count: i64,
    /// The fields that it is grouped by, then the aggregates, in the order of [`schema`].
    pub values: Vec<Option<Value>>,
    pub revision: i64,
}

/// By group.
type Devices = BTreeMap<String, Aggregate>;

/// How a window is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Tumbling when both are the same.
    Hopping {
        size: i64,
        every: i64,
    },
    Session {
        gap: i64,
    },
}

/// One window of the settings.
#[derive(Debug)]
struct Window {
    name: String,
    kind: Kind,
    by: Grouping,
    aggregates: Vec<AggregateKind>,
    wants: Wants,
    kinds: Vec<FieldType>,
    /// By start. Each is closed or open; closed ones have a revision above 0.
    results: BTreeMap<i64, Devices>,
    /// Below, all is closed. Starts of windows; ends of sessions.
    closed_before: i64,
    /// Closed results that have changed since; not of sessions.
    changed: BTreeSet<(i64, String)>,
    /// Windows that start below were given up for want of room; rows before it, of sessions.
    given_up_before: i64,
    sessions: Sessions,
}

/// The windows of one stream.
#[derive(Debug)]
pub struct Windows {
    lateness: i64,
    reopen_within: i64,
    kinds: Vec<FieldType>,
    names: Vec<String>,
    windows: Vec<Window>,
    newest: i64,
    held: Held,
    held_max: Held,
}

/// Results, and what they count as.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Held {
    results: usize,
    bytes: usize,
}

/// The columns of a window's stream.
///
/// # Errors
/// When two would have one name.
pub fn schema(stream: &StreamSettings, window: &WindowSettings) -> Result<StreamSchema, SchemaError> {
    let field = |name: String, kind| StreamField { name: name.parse().expect("checked with the settings"), kind };
    let mut fields = vec![
        field("window_start".to_owned(), FieldType::Timestamp),
        field("window_end".to_owned(), FieldType::Timestamp),
        field("count".to_owned(), FieldType::Int64),
    ];
    if let By::Fields { fields: by, .. } = &window.by {
        for name in by {
            let kind = stream.fields.iter().find(|(field, _)| field == name).map(|(_, settings)| settings.kind);
            fields.push(field(name.to_string(), kind.expect("checked with the settings")));
        }
    }
    for (name, settings) in &stream.fields {
        for aggregate in &window.aggregates {
            if let Some(kind) = aggregate.of(settings.kind) {
                fields.push(field(format!("{name}_{}", aggregate.suffix()), kind));
            }
        }
    }
    fields.push(field("revision".to_owned(), FieldType::Int64));
    StreamSchema::new(fields)
}

impl Windows {
    /// Those of the settings, empty.
    pub fn new(stream: &StreamName, settings: &StreamSettings) -> Self {
        let names = settings.fields.iter().map(|(name, _)| name.to_string()).collect::<Vec<_>>();
        let kinds = settings.fields.iter().map(|(_, field)| field.kind).collect::<Vec<_>>();
        let window = |(name, window): (StreamName, &WindowSettings)| Window {
            name: name.to_string(),
            kind: match window.gap {
                Some(gap) => Kind::Session { gap: gap.micros() },
                None => Kind::Hopping { size: window.size.micros(), every: window.every_us() },
            },
            by: Grouping::new(&window.by, &names),
            aggregates: window.aggregates.clone(),
            wants: Wants::of(&window.aggregates),
            kinds: kinds.clone(),
            results: BTreeMap::new(),
            closed_before: i64::MIN,
            changed: BTreeSet::new(),
            given_up_before: i64::MIN,
            sessions: Sessions::default(),
        };
        let windows = settings.windows(stream).into_iter().map(window).collect();
        Self {
            lateness: settings.lateness.micros(),
            reopen_within: settings.reopen_within.micros(),
            kinds,
            names,
            windows,
            newest: i64::MIN,
            held: Held::default(),
            held_max: Held { results: WINDOWS_MAX, bytes: settings.windows_max_bytes.bytes() },
        }
    }

    /// The newest event time minus `lateness`; `i64::MIN` before the first row.
    pub fn watermark(&self) -> i64 {
        if self.newest == i64::MIN { i64::MIN } else { self.newest.saturating_sub(self.lateness) }
    }

    /// Adds a row to its windows.
    pub fn add(&mut self, reading: &Reading) -> Late {
        self.newest = self.newest.max(reading.ts);
        if reading.ts < self.watermark().saturating_sub(self.reopen_within) {
            return Late::Late;
        }
        let mut late = Late::Good;
        for window in &mut self.windows {
            let other;
            let key = match window.by {
                Grouping::Device => &reading.device,
                _ => {
                    other = window.by.key(reading);
                    &other
                }
            };
            let added = match window.kind {
                Kind::Hopping { size, every } => window.add(size, every, key, reading, &mut self.held),
                Kind::Session { gap } => window.add_to_session(gap, key, reading, &mut self.held),
            };
            if added == Late::Late {
                late = Late::Late;
            }
        }
        late
    }

    /// The results that are due: windows that the watermark has passed, and closed ones that have changed.
    pub fn advance(&mut self) -> Vec<WindowRow> {
        let watermark = self.watermark();
        let mut rows = Vec::new();
        if watermark == i64::MIN {
            return rows;
        }
        let keep_from = watermark.saturating_sub(self.reopen_within);
        for (index, window) in self.windows.iter_mut().enumerate() {
            let Kind::Hopping { size, every } = window.kind else {
                rows.extend(window.close_sessions(index, watermark, keep_from, &mut self.held));
                continue;
            };
            // Starts below it have an end that the watermark has reached.
            let due_before = watermark.saturating_sub(size).div_euclid(every).saturating_add(1).saturating_mul(every);
            window.close_before(due_before, index, &mut rows);
            while let Some(entry) = window.results.first_entry() {
                if entry.key().saturating_add(size) > keep_from || *entry.key() >= window.closed_before {
                    break;
                }
                self.held.give_up(&entry.remove());
            }
        }
        while self.held.results > self.held_max.results || self.held.bytes > self.held_max.bytes {
            if !self.make_room(&mut rows) {
                break;
            }
        }
        rows
    }

    /// Up to where the results of a window are told: by `window_start`, but for those that are told again.
    pub fn complete_to(&self, window: usize) -> i64 {
        let window = &self.windows[window];
        let watermark = self.watermark();
        match window.kind {
            _ if watermark == i64::MIN => watermark,
            Kind::Hopping { size, .. } => watermark.saturating_sub(size),
            Kind::Session { gap } => {
                let open = window.sessions.first_open().unwrap_or(i64::MAX);
                watermark.saturating_sub(gap).min(open.saturating_sub(1))
            }
        }
    }

    /// Gives up the oldest window of all, and closes it before if it is open. False when there is none.
    fn make_room(&mut self, rows: &mut Vec<WindowRow>) -> bool {
        let oldest = |window: &Window| match window.kind {
            Kind::Hopping { size, .. } => window.results.first_key_value().map(|(start, _)| start + size),
            Kind::Session { .. } => window.sessions.first_end(),
        };
        let windows = self.windows.iter_mut().enumerate();
        let first = windows.filter_map(|(index, window)| oldest(window).map(|end| (end, index, window)));
        let Some((end, index, window)) = first.min_by_key(|(end, index, _)| (*end, *index)) else { return false };
        let Kind::Hopping { size, every } = window.kind else {
            window.give_up_session(index, &mut self.held, rows);
            return true;
        };
        let next = end - size + every;
        window.close_before(next, index, rows);
        window.given_up_before = next;
        if let Some((_, devices)) = window.results.pop_first() {
            self.held.give_up(&devices);
        }
        true
    }
}

impl Held {
    fn of(devices: &Devices) -> Self {
        let bytes = devices.iter().map(|(device, aggregate)| aggregate.bytes(device)).sum();
        Self { results: devices.len(), bytes }
    }

    fn take(&mut self, devices: &Devices) {
        let taken = Self::of(devices);
        (self.results, self.bytes) = (self.results + taken.results, self.bytes + taken.bytes);
    }

    fn give_up(&mut self, devices: &Devices) {
        let gone = Self::of(devices);
        (self.results, self.bytes) = (self.results - gone.results, self.bytes - gone.bytes);
    }
}

impl Window {
    /// Adds a row to all windows of this that it lies in.
    fn add(&mut self, size: i64, every: i64, key: &str, reading: &Reading, held: &mut Held) -> Late {
        let mut start = reading.ts.div_euclid(every) * every;
        while start > reading.ts.saturating_sub(size) {
            if start < self.given_up_before {
                return Late::Late;
            }
            let devices = self.results.entry(start).or_default();
            if !devices.contains_key(key) {
                let aggregate = Aggregate::new(&self.kinds, self.wants);
                held.results += 1;
                held.bytes += aggregate.bytes(key);
                devices.insert(key.to_owned(), aggregate);
            }
            let aggregate = devices.get_mut(key).expect("it was put there");
            let before = aggregate.bytes(key);
            aggregate.add(reading, self.wants);
            held.bytes = held.bytes + aggregate.bytes(key) - before;
            if start < self.closed_before {
                self.changed.insert((start, key.to_owned()));
            }
            start -= every;
        }
        Late::Good
    }

    fn row(&self, index: usize, start: i64, end: i64, key: &str, aggregate: &Aggregate) -> WindowRow {
        let (device, mut values) = self.by.parts(key);
        values.extend(aggregate.values(&self.aggregates));
        let (count, revision) = (aggregate.count, aggregate.revision);
        let group = matches!(self.by, Grouping::Fields { .. }).then(|| key.to_owned());
        WindowRow { window: index, device, group, start, end, count, values, revision }
    }

    /// Emits what is due when all windows that start below `before` are closed.
    fn close_before(&mut self, before: i64, index: usize, rows: &mut Vec<WindowRow>) {
        let Kind::Hopping { size, .. } = self.kind else { return };
        let mut due = std::mem::take(&mut self.changed).into_iter().collect::<Vec<_>>();
        if before > self.closed_before {
            for (start, devices) in self.results.range(self.closed_before..before) {
                due.extend(devices.keys().map(|device| (*start, device.clone())));
            }
            self.closed_before = before;
        }
        for (start, device) in due {
            let aggregate = self.results.get_mut(&start).and_then(|devices| devices.get_mut(&device));
            let Some(aggregate) = aggregate else { continue };
            aggregate.revision += 1;
            rows.push(self.row(index, start, start + size, &device, &self.results[&start][&device]));
        }
    }
}
