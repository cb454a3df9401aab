//! The state of a stream's windows as bytes, exact, and back.
//!
//! Version 1, little-endian (`str16` is a u16 length and UTF-8):
//! ```text
//! version u8 = 1 | newest i64 | fields u16 | (name str16 | kind u8)* | windows u16
//! then each window: name str16 | size i64 | closed_before i64 | given_up_before i64 | results u32
//!                   | (start i64 | device str16 | count i64 | revision i64 | field*)*
//! float: count i64 | min f64 | max f64 | sum f64 | ends     int: count i64 | min i64 | max i64 | sum i128 | ends
//! other: ends                                               ends: 0 u8, or 1 u8 | first ts i64, value | last ts, value
//! ```
//! Nothing is open to change between two entries: [`super::Windows::advance`] has been called.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{Buf, Bytes};
use wire::FieldType;

use super::aggregate::{Aggregate, Ends, Field};
use super::{Value, Window, Windows};

const VERSION: u8 = 1;

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
            for value in [window.size, window.closed_before, window.given_up_before] {
                out.extend(value.to_le_bytes());
            }
            let results = window.results.values().map(|devices| devices.len()).sum::<usize>();
            out.extend((results as u32).to_le_bytes());
            for (start, devices) in &window.results {
                for (device, aggregate) in devices {
                    out.extend(start.to_le_bytes());
                    put_text(out, device);
                    out.extend(aggregate.count.to_le_bytes());
                    out.extend(aggregate.revision.to_le_bytes());
                    aggregate.fields.iter().for_each(|field| put_field(out, field));
                }
            }
        }
    }

    /// Takes over a state. Windows that the settings no longer have, or have with another size, are left out. When the
    /// fields have changed only the watermark is taken over, and rows of windows that may be closed already are late: a
    /// result of a part of their rows would stand above the whole one.
    ///
    /// # Errors
    /// When the fields have changed, or the bytes are no state; then nothing is taken over.
    pub fn restore(&mut self, bytes: &Bytes) -> Result<(), StateError> {
        let state = self.read(&mut bytes.clone()).ok_or(StateError::Short)?;
        self.newest = state.newest;
        let Some(windows) = state.windows else {
            let watermark = self.watermark();
            for window in self.windows.iter_mut().filter(|_| watermark != i64::MIN) {
                let first = watermark.div_euclid(window.size) * window.size + window.size;
                (window.closed_before, window.given_up_before) = (first, first);
            }
            return Err(StateError::Fields);
        };
        for restored in windows {
            let same = |window: &&mut Window| window.name == restored.name && window.size == restored.size;
            if let Some(window) = self.windows.iter_mut().find(same) {
                restored.results.values().for_each(|devices| self.held.take(devices));
                *window = restored;
            }
        }
        Ok(())
    }

    fn read(&self, bytes: &mut Bytes) -> Option<State> {
        if bytes.try_get_u8().ok()? != VERSION {
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
            let mut window = Window {
                name: take_text(bytes)?,
                size: bytes.try_get_i64_le().ok()?,
                closed_before: bytes.try_get_i64_le().ok()?,
                given_up_before: bytes.try_get_i64_le().ok()?,
                results: BTreeMap::new(),
                changed: BTreeSet::new(),
            };
            for _ in 0..bytes.try_get_u32_le().ok()? {
                let start = bytes.try_get_i64_le().ok()?;
                let device = take_text(bytes)?;
                let aggregate = Aggregate {
                    count: bytes.try_get_i64_le().ok()?,
                    revision: bytes.try_get_i64_le().ok()?,
                    fields: self.kinds.iter().map(|kind| take_field(bytes, *kind)).collect::<Option<_>>()?,
                };
                window.results.entry(start).or_default().insert(device, aggregate);
            }
            windows.push(window);
        }
        Some(State { newest, windows: Some(windows) })
    }
}

/// A state that was read whole; without windows when they are of other fields.
struct State {
    newest: i64,
    windows: Option<Vec<Window>>,
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
