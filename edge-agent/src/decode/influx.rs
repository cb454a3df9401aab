//! Influx line protocol as readings: what is wanted of each line. The lines themselves are read by [`wire::line`].
//!
//! A line without a time has that of its arrival; of equal names the last counts.

use wire::line::{FieldValue, Lines as WireLines, Part, Precision};

use super::READINGS_MAX;
use super::scalar::{Fault, Record, Scalar};
use super::tree::too_many;
use crate::config::Pointer;

/// One place that is wanted.
#[derive(Debug)]
enum Place {
    Measurement,
    Time,
    Tag(String),
    Field(String),
}

/// Reads lines.
#[derive(Debug)]
pub(super) struct Lines {
    places: Vec<Place>,
    precision: Precision,
}

impl Lines {
    pub(super) fn new(places: &[Pointer], precision: Precision) -> Self {
        let place = |pointer: &Pointer| match &pointer.0[..] {
            [tags, name] if tags == "tags" => Place::Tag(name.clone()),
            [_, name] => Place::Field(name.clone()),
            [time] if time == "time" => Place::Time,
            _ => Place::Measurement,
        };
        Self { places: places.iter().map(place).collect(), precision }
    }

    /// Each line of a message.
    pub(super) fn records<'a>(&self, text: &'a str, arrival_us: i64) -> Result<Vec<Record<'a>>, Fault> {
        let mut records = Vec::new();
        let mut lines = WireLines::new(text, self.precision);
        loop {
            let mut slots = vec![Scalar::Null; self.places.len()];
            let Some(line) = lines.next(|part| self.put(part, &mut slots)) else { return Ok(records) };
            if records.len() >= READINGS_MAX {
                return Err(too_many(records.len() + 1));
            }
            let slots = match line.time {
                Ok(time) => {
                    let time = Scalar::Time(time.unwrap_or(arrival_us));
                    self.fill(&mut slots, |place| matches!(place, Place::Time), &time);
                    Ok(slots)
                }
                Err(error) => Err(("malformed", error.0)),
            };
            records.push(Record { span: line.span, keys: &[], slots });
        }
    }

    fn put<'a>(&self, part: Part<'a>, slots: &mut [Scalar<'a>]) {
        match part {
            Part::Measurement(text) => {
                self.fill(slots, |place| matches!(place, Place::Measurement), &Scalar::Text(text));
            }
            Part::Tag(tag, value) => {
                self.fill(slots, |place| matches!(place, Place::Tag(name) if *name == tag), &Scalar::Text(value));
            }
            Part::Field(field, value) => {
                let value = match value {
                    FieldValue::Bool(value) => Scalar::Bool(value),
                    FieldValue::Int(value) => Scalar::Int(value),
                    FieldValue::Unsigned(value) => Scalar::Unsigned(value),
                    FieldValue::Float(value) => Scalar::Float(value),
                    FieldValue::Text(value) => Scalar::Text(value),
                };
                self.fill(slots, |place| matches!(place, Place::Field(name) if *name == field), &value);
            }
        }
    }

    fn fill<'a>(&self, slots: &mut [Scalar<'a>], wanted: impl Fn(&Place) -> bool, value: &Scalar<'a>) {
        for (slot, place) in slots.iter_mut().zip(&self.places) {
            if wanted(place) {
                *slot = value.clone();
            }
        }
    }
}
