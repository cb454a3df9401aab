//! Tumbling windows over event time, for each device: count, and min, max, avg, sum, first, last of each field.
//!
//! A window begins at a multiple of its size since 1970 UTC. The stream's watermark is its newest event time minus
//! `lateness`, and never falls; a window closes when the watermark reaches its end, with revision 1. A later row re-opens
//! exactly its window, whose next result has a higher revision. A row more than `reopen_within` behind the watermark
//! enters no window ([`Late::Late`]). `first` and `last` go by event time, of equal times by order of arrival; nulls count
//! in `count` alone; the sum of int64 is null when it does not fit.
//!
//! One reading from the future, which checks allow up to a day ahead, moves the watermark for its whole stream.
//!
//! Pure and deterministic. At most [`WINDOWS_MAX`] results are held for a stream, and `windows_max_bytes` of them, looked at
//! after each message: then the oldest windows are closed early, and the oldest closed ones are given up, and rows for them
//! are late. What counts is what is held, not what the machine needs for it, so a restart changes nothing. State as bytes:
//! `window/state.rs`.

mod aggregate;
mod state;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use wire::{FieldType, StreamField, StreamName, StreamSchema};

use self::aggregate::Aggregate;
pub use self::state::StateError;
use crate::config::StreamSettings;
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
    pub device: String,
    /// µs since 1970 UTC; the end is not in the window.
    pub start: i64,
    pub end: i64,
    pub count: i64,
    /// The aggregates, in the order of [`schema`].
    pub values: Vec<Option<Value>>,
    pub revision: i64,
}

type Devices = BTreeMap<String, Aggregate>;

/// One window of the settings.
#[derive(Debug)]
struct Window {
    name: String,
    size: i64,
    /// By start. Each is closed or open; closed ones have a revision above 0.
    results: BTreeMap<i64, Devices>,
    /// Below, all is closed. Starts of windows.
    closed_before: i64,
    /// Closed results that have changed since.
    changed: BTreeSet<(i64, String)>,
    /// Windows that start below were given up for want of room.
    given_up_before: i64,
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
pub fn schema(stream: &StreamSettings) -> StreamSchema {
    let field = |name: String, kind| StreamField { name: name.parse().expect("checked with the settings"), kind };
    let mut fields = vec![
        field("window_start".to_owned(), FieldType::Timestamp),
        field("window_end".to_owned(), FieldType::Timestamp),
        field("count".to_owned(), FieldType::Int64),
    ];
    for (name, settings) in &stream.fields {
        for (suffix, kind) in aggregate::columns(settings.kind) {
            fields.push(field(format!("{name}_{suffix}"), *kind));
        }
    }
    fields.push(field("revision".to_owned(), FieldType::Int64));
    StreamSchema::new(fields).expect("checked with the settings")
}

impl Windows {
    /// Those of the settings, empty.
    pub fn new(stream: &StreamName, settings: &StreamSettings) -> Self {
        let window = |(name, window): (StreamName, &crate::config::WindowSettings)| Window {
            name: name.to_string(),
            size: window.size.micros(),
            results: BTreeMap::new(),
            closed_before: i64::MIN,
            changed: BTreeSet::new(),
            given_up_before: i64::MIN,
        };
        Self {
            lateness: settings.lateness.micros(),
            reopen_within: settings.reopen_within.micros(),
            kinds: settings.fields.iter().map(|(_, field)| field.kind).collect(),
            names: settings.fields.iter().map(|(name, _)| name.to_string()).collect(),
            windows: settings.windows(stream).into_iter().map(window).collect(),
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
            let start = reading.ts.div_euclid(window.size) * window.size;
            if start < window.given_up_before {
                late = Late::Late;
                continue;
            }
            let devices = window.results.entry(start).or_default();
            if !devices.contains_key(&reading.device) {
                let aggregate = Aggregate::new(&self.kinds);
                self.held.results += 1;
                self.held.bytes += aggregate.bytes(&reading.device);
                devices.insert(reading.device.clone(), aggregate);
            }
            let aggregate = devices.get_mut(&reading.device).expect("it was put there");
            let before = aggregate.bytes(&reading.device);
            aggregate.add(reading);
            self.held.bytes = self.held.bytes + aggregate.bytes(&reading.device) - before;
            if start < window.closed_before {
                window.changed.insert((start, reading.device.clone()));
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
            // Starts below it have an end that the watermark has reached.
            let due_before = (watermark.div_euclid(window.size)) * window.size;
            window.close_before(due_before, index, &mut rows);
            while let Some(entry) = window.results.first_entry() {
                if entry.key().saturating_add(window.size) > keep_from || *entry.key() >= window.closed_before {
                    break;
                }
                self.held.give_up(&entry.remove());
            }
        }
        while self.held.results > self.held_max.results || self.held.bytes > self.held_max.bytes {
            self.make_room(&mut rows);
        }
        rows
    }

    /// Gives up the oldest window of all, and closes it before if it is open.
    fn make_room(&mut self, rows: &mut Vec<WindowRow>) {
        let oldest = |window: &Window| window.results.first_key_value().map(|(start, _)| start + window.size);
        let windows = self.windows.iter_mut().enumerate();
        let first = windows.filter_map(|(index, window)| oldest(window).map(|end| (end, index, window)));
        let Some((end, index, window)) = first.min_by_key(|(end, index, _)| (*end, *index)) else { return };
        window.close_before(end, index, rows);
        window.given_up_before = end;
        if let Some((_, devices)) = window.results.pop_first() {
            self.held.give_up(&devices);
        }
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
    /// Emits what is due when all windows that start below `before` are closed.
    fn close_before(&mut self, before: i64, index: usize, rows: &mut Vec<WindowRow>) {
        let mut emit = |start: i64, device: &String, aggregate: &mut Aggregate| {
            aggregate.revision += 1;
            rows.push(WindowRow {
                window: index,
                device: device.clone(),
                start,
                end: start + self.size,
                count: aggregate.count,
                values: aggregate.values(),
                revision: aggregate.revision,
            });
        };
        for (start, device) in std::mem::take(&mut self.changed) {
            let aggregate = self.results.get_mut(&start).and_then(|devices| devices.get_mut(&device));
            if let Some(aggregate) = aggregate {
                emit(start, &device, aggregate);
            }
        }
        if before > self.closed_before {
            for (start, devices) in self.results.range_mut(self.closed_before..before) {
                devices.iter_mut().for_each(|(device, aggregate)| emit(*start, device, aggregate));
            }
            self.closed_before = before;
        }
    }
}
