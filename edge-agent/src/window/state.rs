//! The state of a stream's windows as bytes, exact, and back.
//!
//! Version 2, little-endian (`str16` is a u16 length and UTF-8):
//! ```text
//! version u8 = 2 | newest i64 | fields u16 | (name str16 | kind u8)* | windows u16
//! then each window: name str16 | size i64 (of a session its gap) | shape str16 | closed_before i64 | given_up_before i64
//!                   | wants u8 (1 spread, 2 sketch, 4 points) | results u32
//!                   | (start i64 | group str16 | count i64 | revision i64 | newest i64 | field* | extra*)*
//! float: count i64 | min f64 | max f64 | sum f64 | ends     int: count i64 | min i64 | max i64 | sum i128 | ends
//! other: ends                                               ends: 0 u8, or 1 u8 | first ts i64, value | last ts, value
//! extra, if any is wanted: count i64 | mean f64 | squares f64 | zero u64 | (buckets u32 (i32 | u64)*) negative, positive
//!                   | points u32 (ts i64 | 1 u8 i64, or 2 u8 f64)*
//! ```
//! Version 1 knew tumbling windows by device alone: it had no shape, wants, newest and extra. The shape says kind and group.
//! Nothing is open to change between two entries: [`super::Windows::advance`] has been called.

use std::collections::BTreeMap;

use bytes::{Buf, Bytes};
use wire::FieldType;

use super::aggregate::{Aggregate, Ends, Extra, Field, Wants};
use super::group::Grouping;
use super::sketch::Sketch;
use super::{Kind, Value, Window, WindowRow, Windows};
use crate::config::Number;

const VERSION: u8 = 2;

/// Why a state is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    #[error("the stream has other fields now")]
    Fields,
    #[error("the state is of another version or cut short")]
    Short,
}

impl Windows {
    /// Appends the state.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.push(VERSION);
        out.extend(self.newest.to_le_bytes());
        out.extend((self.kinds.len() as u16).to_le_bytes());
        for (name, kind) in self.names.iter().zip(&self.kinds) {
            put_text(out, name);
            out.push(kind_byte(*kind));
        }
        out.extend((self.windows.len() as u16).to_le_bytes());
        for window in &self.windows {
            put_text(out, &window.name);
            out.extend(window.size().to_le_bytes());
            put_text(out, &window.shape(&self.names));
            out.extend(window.closed_before.to_le_bytes());
            out.extend(window.given_up_before.to_le_bytes());
            out.push(wants_byte(window.wants));
            let results = window.results.values().map(|devices| devices.len()).sum::<usize>();
            out.extend((results as u32).to_le_bytes());
            for (start, devices) in &window.results {
                for (device, aggregate) in devices {
                    out.extend(start.to_le_bytes());
                    put_text(out, device);
                    out.extend(aggregate.count.to_le_bytes());
                    out.extend(aggregate.revision.to_le_bytes());
                    out.extend(aggregate.newest.to_le_bytes());
                    aggregate.fields.iter().for_each(|field| put_field(out, field));
                    aggregate.extras.iter().for_each(|extra| put_extra(out, extra));
                }
            }
        }
    }

    /// Takes over a state. A window that the settings no longer have is left out. Of one that they have with another size,
    /// group, or aggregates that need what was not kept, and of all when the fields have changed, only the newest event time is
    /// taken over, and rows that may belong to results which are told already ([`Windows::close_what_ends`]) are late: a result
    /// of a part of their rows would stand above the whole one.
    ///
    /// # Errors
    /// When the fields have changed, or the bytes are no state; then nothing is taken over.
    pub fn restore(&mut self, bytes: &Bytes) -> Result<(), StateError> {
        let state = self.read(&mut bytes.clone()).ok_or(StateError::Short)?;
        self.newest = state.newest;
        let Some(windows) = state.windows else {
            for window in self.windows.iter_mut().filter(|_| state.newest != i64::MIN) {
                window.begin_behind(state.newest);
            }
            return Err(StateError::Fields);
        };
        for mut restored in windows {
            let Some(window) = self.windows.iter_mut().find(|window| window.name == restored.name) else { continue };
            let same = window.size() == restored.size && window.shape(&self.names) == restored.shape;
            if !same || restored.wants != window.wants {
                if state.newest != i64::MIN {
                    window.begin_behind(state.newest);
                }
                continue;
            }
            restored.results.values().for_each(|devices| self.held.take(devices));
            window.results = std::mem::take(&mut restored.results);
            (window.closed_before, window.given_up_before) = (restored.closed_before, restored.given_up_before);
            if let Kind::Session { gap } = window.kind {
                window.index_sessions(gap);
            }
        }
        Ok(())
    }

    /// Closes the windows that [`Windows::restore`] would not take over into `next`: these are their last results.
    pub fn close_what_ends(&mut self, next: Option<&Self>) -> Vec<WindowRow> {
        let mut rows = Vec::new();
        let next = next.filter(|next| next.names == self.names && next.kinds == self.kinds);
        for (index, window) in self.windows.iter_mut().enumerate() {
            let shape = window.shape(&self.names);
            let goes_on = |other: &Window| {
                let same = other.name == window.name && other.size() == window.size() && other.wants == window.wants;
                same && other.shape(&self.names) == shape
            };
            if next.is_some_and(|next| next.windows.iter().any(goes_on)) {
                continue;
            }
            match window.kind {
                Kind::Hopping { .. } => window.close_before(i64::MAX, index, &mut rows),
                Kind::Session { .. } => {
                    while window.sessions.first_end().is_some() {
                        window.give_up_session(index, &mut self.held, &mut rows);
                    }
                }
            }
        }
        rows
    }

    fn read(&self, bytes: &mut Bytes) -> Option<State> {
        let version = bytes.try_get_u8().ok()?;
        if !(1..=VERSION).contains(&version) {
            return None;
        }
        let newest = bytes.try_get_i64_le().ok()?;
        let fields = bytes.try_get_u16_le().ok()?;
        let mut same = usize::from(fields) == self.kinds.len();
        for index in 0..usize::from(fields) {
            let (name, kind) = (take_text(bytes)?, bytes.try_get_u8().ok()?);
            same = same && self.names[index] == name && kind_byte(self.kinds[index]) == kind;
        }
        if !same {
            return Some(State { newest, windows: None });
        }
        let mut windows = Vec::new();
        for _ in 0..bytes.try_get_u16_le().ok()? {
            let (name, size) = (take_text(bytes)?, bytes.try_get_i64_le().ok()?);
            let shape = if version == 1 { TUMBLING.to_owned() } else { take_text(bytes)? };
            let (closed_before, given_up_before) = (bytes.try_get_i64_le().ok()?, bytes.try_get_i64_le().ok()?);
            let wants = if version == 1 { Wants::default() } else { wants_of(bytes.try_get_u8().ok()?) };
            let mut results = BTreeMap::<i64, BTreeMap<String, Aggregate>>::new();
            for _ in 0..bytes.try_get_u32_le().ok()? {
                let start = bytes.try_get_i64_le().ok()?;
                let group = take_text(bytes)?;
                let (count, revision) = (bytes.try_get_i64_le().ok()?, bytes.try_get_i64_le().ok()?);
                let newest = if version == 1 { i64::MIN } else { bytes.try_get_i64_le().ok()? };
                let fields = self.kinds.iter().map(|kind| take_field(bytes, *kind)).collect::<Option<_>>()?;
                let extras = if wants.any() { self.kinds.len() } else { 0 };
                let extras = (0..extras).map(|_| take_extra(bytes)).collect::<Option<_>>()?;
                let aggregate = Aggregate { count, revision, newest, fields, extras };
                results.entry(start).or_default().insert(group, aggregate);
            }
            let window = Restored { name, size, shape, wants, closed_before, given_up_before, results };
            windows.push(window);
        }
        Some(State { newest, windows: Some(windows) })
    }
}

/// A state that was read whole; without windows when they are of other fields.
struct State {
    newest: i64,
    windows: Option<Vec<Restored>>,
}

struct Restored {
    name: String,
    size: i64,
    shape: String,
    wants: Wants,
    closed_before: i64,
    given_up_before: i64,
    results: BTreeMap<i64, BTreeMap<String, Aggregate>>,
}

/// The shape of a tumbling window by device.
const TUMBLING: &str = "";

impl Window {
    fn size(&self) -> i64 {
        match self.kind {
            Kind::Hopping { size, .. } => size,
            Kind::Session { gap } => gap,
        }
    }

    /// What else must be the same for its results to mean the same.
    fn shape(&self, names: &[String]) -> String {
        let mut shape = match self.kind {
            Kind::Hopping { size, every } if size == every => TUMBLING.to_owned(),
            Kind::Hopping { every, .. } => format!("every {every}"),
            Kind::Session { .. } => "session".to_owned(),
        };
        match &self.by {
            Grouping::Device => {}
            Grouping::All => shape.push_str(" by all"),
            Grouping::Fields { device, fields } => {
                let names = fields.iter().map(|field| names[*field].as_str()).collect::<Vec<_>>().join(",");
                // A hash, for the names of many fields may be longer than a text here.
                shape.push_str(&format!(" by {device} {:08x}", crc32c::crc32c(names.as_bytes())));
            }
        }
        shape
    }

    /// Rows of windows that may be closed already are late.
    fn begin_behind(&mut self, newest: i64) {
        let first = match self.kind {
            Kind::Hopping { every, .. } => newest.div_euclid(every) * every + every,
            Kind::Session { gap } => newest.saturating_add(gap),
        };
        (self.closed_before, self.given_up_before) = (first, first);
    }
}

fn wants_byte(wants: Wants) -> u8 {
    u8::from(wants.spread) | u8::from(wants.sketch) << 1 | u8::from(wants.points) << 2
}

fn wants_of(byte: u8) -> Wants {
    Wants { spread: byte & 1 > 0, sketch: byte & 2 > 0, points: byte & 4 > 0 }
}

fn put_extra(out: &mut Vec<u8>, extra: &Extra) {
    out.extend(extra.count.to_le_bytes());
    out.extend(extra.mean.to_le_bytes());
    out.extend(extra.squares.to_le_bytes());
    out.extend(extra.sketch.zero.to_le_bytes());
    for buckets in [&extra.sketch.negative, &extra.sketch.positive] {
        out.extend((buckets.len() as u32).to_le_bytes());
        for (bucket, count) in buckets {
            out.extend(bucket.to_le_bytes());
            out.extend(count.to_le_bytes());
        }
    }
    out.extend((extra.points.len() as u32).to_le_bytes());
    for (ts, number) in &extra.points {
        out.extend(ts.to_le_bytes());
        match number {
            Number::Int(value) => {
                out.push(1);
                out.extend(value.to_le_bytes());
            }
            Number::Float(value) => {
                out.push(2);
                out.extend(value.to_le_bytes());
            }
        }
    }
}

fn take_extra(bytes: &mut Bytes) -> Option<Extra> {
    let (count, mean) = (bytes.try_get_i64_le().ok()?, bytes.try_get_f64_le().ok()?);
    let (squares, zero) = (bytes.try_get_f64_le().ok()?, bytes.try_get_u64_le().ok()?);
    let mut buckets = || {
        let count = bytes.try_get_u32_le().ok()?;
        let bucket = |bytes: &mut Bytes| Some((bytes.try_get_i32_le().ok()?, bytes.try_get_u64_le().ok()?));
        (0..count).map(|_| bucket(bytes)).collect::<Option<BTreeMap<_, _>>>()
    };
    let sketch = Sketch { negative: buckets()?, zero, positive: buckets()? };
    let mut points = Vec::new();
    for _ in 0..bytes.try_get_u32_le().ok()? {
        let ts = bytes.try_get_i64_le().ok()?;
        points.push((
            ts,
            match bytes.try_get_u8().ok()? {
                1 => Number::Int(bytes.try_get_i64_le().ok()?),
                _ => Number::Float(bytes.try_get_f64_le().ok()?),
            },
        ));
    }
    Some(Extra { count, mean, squares, sketch, points })
}

fn kind_byte(kind: FieldType) -> u8 {
    match kind {
        FieldType::Float64 => 1,
        FieldType::Int64 => 2,
        FieldType::Bool => 3,
        FieldType::Text => 4,
        FieldType::Timestamp => 5,
        FieldType::Binary => 6,
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    // Names and devices are shorter than 64 KiB by their own limits.
    out.extend((text.len() as u16).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn take_text(bytes: &mut Bytes) -> Option<String> {
    let len = usize::from(bytes.try_get_u16_le().ok()?);
    let text = (bytes.len() >= len).then(|| bytes.split_to(len))?;
    String::from_utf8(text.to_vec()).ok()
}

fn put_ends<T>(out: &mut Vec<u8>, ends: &Option<Ends<T>>, put: impl Fn(&mut Vec<u8>, &T)) {
    out.push(u8::from(ends.is_some()));
    if let Some(ends) = ends {
        for (ts, value) in [&ends.first, &ends.last] {
            out.extend(ts.to_le_bytes());
            put(out, value);
        }
    }
}

fn take_ends<T>(bytes: &mut Bytes, take: impl Fn(&mut Bytes) -> Option<T>) -> Option<Option<Ends<T>>> {
    if bytes.try_get_u8().ok()? == 0 {
        return Some(None);
    }
    let first = (bytes.try_get_i64_le().ok()?, take(bytes)?);
    let last = (bytes.try_get_i64_le().ok()?, take(bytes)?);
    Some(Some(Ends { first, last }))
}

fn put_field(out: &mut Vec<u8>, field: &Field) {
    match field {
        Field::Float { count, min, max, sum, ends } => {
            out.extend(count.to_le_bytes());
            [min, max, sum].iter().for_each(|value| out.extend(value.to_le_bytes()));
            put_ends(out, ends, |out, value| out.extend(value.to_le_bytes()));
        }
        Field::Int { count, min, max, sum, ends } => {
            [count, min, max].iter().for_each(|value| out.extend(value.to_le_bytes()));
            out.extend(sum.to_le_bytes());
            put_ends(out, ends, |out, value| out.extend(value.to_le_bytes()));
        }
        Field::Other { ends } => put_ends(out, ends, |out, value| match value {
            Value::Bool(value) => out.extend([1, u8::from(*value)]),
            Value::Text(text) => {
                out.push(2);
                // A text may be longer than a name.
                out.extend((text.len() as u32).to_le_bytes());
                out.extend_from_slice(text.as_bytes());
            }
            Value::Float(_) | Value::Int(_) => out.push(0),
        }),
    }
}

fn take_field(bytes: &mut Bytes, kind: FieldType) -> Option<Field> {
    Some(match kind {
        FieldType::Float64 => Field::Float {
            count: bytes.try_get_i64_le().ok()?,
            min: bytes.try_get_f64_le().ok()?,
            max: bytes.try_get_f64_le().ok()?,
            sum: bytes.try_get_f64_le().ok()?,
            ends: take_ends(bytes, |bytes| bytes.try_get_f64_le().ok())?,
        },
        FieldType::Int64 => Field::Int {
            count: bytes.try_get_i64_le().ok()?,
            min: bytes.try_get_i64_le().ok()?,
            max: bytes.try_get_i64_le().ok()?,
            sum: bytes.try_get_i128_le().ok()?,
            ends: take_ends(bytes, |bytes| bytes.try_get_i64_le().ok())?,
        },
        _ => Field::Other {
            ends: take_ends(bytes, |bytes| match bytes.try_get_u8().ok()? {
                1 => Some(Value::Bool(bytes.try_get_u8().ok()? == 1)),
                2 => {
                    let len = bytes.try_get_u32_le().ok()? as usize;
                    let text = (bytes.len() >= len).then(|| bytes.split_to(len))?;
                    String::from_utf8(text.to_vec()).ok().map(Value::Text)
                }
                _ => None,
            })?,
        },
    })
}
