//! Devices that are silent: when they count as absent and as back, and the readings that are made up for them.
//!
//! How often a device sends is `expected_every`, or what `expected_every_of` has for its name.
//!
//! A device is absent when the stream's watermark has passed its newest event time by more than `absent_after`, or when the
//! agent has listened for so long without hearing it. Time in which the agent did not run is not listened time, and a step
//! of the gateway's clock counts for little, so neither a restart nor NTP makes devices absent. It is back with a reading
//! that ends both. Each is told once. A device that `expected_every_of` names without a `*` is expected from the start on, and
//! is absent also when it was never heard.
//!
//! A reading that ends a gap brings what is made up: multiples of `expected_every` behind the reading before it, at most
//! `fill_steps`. A line is drawn only over a gap that it fills: half a line would end in the air.

use std::cmp::Reverse;

use wire::{FieldType, StreamField, StreamSchema};

use super::memory::{Memory, NEVER};
use crate::config::{Fill, StreamSettings};
use crate::decode::{Reading, Value};

/// `<stream>_absent`, a stream of its own and no rows among readings: those are counted and averaged. `ts` of `absent` is
/// when the next reading should have come (of a device that was never heard: when it was missed, and there is no `last_ts`),
/// of `back` that of the reading that came.
pub fn absent_schema() -> StreamSchema {
    let fields =
        [("state", FieldType::Text), ("last_ts", FieldType::Timestamp), ("expected_every_s", FieldType::Float64)];
    let field =
        |(name, kind): (&str, FieldType)| StreamField { name: name.parse().expect("own names are valid"), kind };
    StreamSchema::new(fields.map(field).to_vec()).expect("own schemas are valid")
}

/// When devices of a stream are silent for too long.
#[derive(Debug)]
pub(super) struct Gaps {
    every: Interval,
    /// Of devices with intervals of their own: by name with `*`, those with most letters first.
    every_of: Vec<(String, Interval)>,
    fill: Option<(Fill, i64)>,
    /// No device is absent before the watermark and the clock are here.
    due: (i64, i64),
}

/// How often a device sends, and after what silence it is absent.
#[derive(Debug, Clone, Copy)]
struct Interval {
    every_us: i64,
    after_us: i64,
}

/// A device became absent, or came back.
#[derive(Debug, Clone, PartialEq)]
pub struct Absence {
    pub device: String,
    /// `absent` or `back`.
    pub state: &'static str,
    /// Absent: when its next reading should have come; far in the future for one that was never heard. Back: the event
    /// time of the reading that came.
    pub ts: i64,
    /// Its newest event time before; [`i64::MIN`] when there is none.
    pub last_ts: i64,
    /// How often it should send.
    pub every_us: i64,
}

impl Gaps {
    pub(super) fn new(stream: &StreamSettings) -> Option<Self> {
        let usual_us = stream.expected_every?.micros();
        let usual_after_us = stream.absent_after.map_or(usual_us.saturating_mul(2), |after| after.micros());
        // Who sends less often is waited for in proportion.
        let interval = |every_us: i64| Interval {
            every_us,
            after_us: (every_us as f64 * (usual_after_us as f64 / usual_us as f64)) as i64,
        };
        let of = stream.expected_every_of.iter();
        let mut every_of = of.map(|(name, every)| (name.clone(), interval(every.micros()))).collect::<Vec<_>>();
        let letters = |name: &str| name.chars().filter(|letter| *letter != '*').count();
        every_of.sort_by_key(|(name, _)| Reverse(letters(name)));
        let fill = stream.fill.map(|fill| (fill, i64::from(stream.fill_steps)));
        let every = Interval { every_us: usual_us, after_us: usual_after_us };
        Some(Self { every, every_of, fill, due: (i64::MIN, i64::MIN) })
    }

    fn of(&self, device: &str) -> Interval {
        self.every_of.iter().find(|(name, _)| is_like(name, device)).map_or(self.every, |(_, interval)| *interval)
    }

    /// A device was heard; `before` is its newest event time before. Returns that it is back, if it is.
    pub(super) fn heard(
        &mut self,
        memory: &mut Memory,
        reading: &Reading,
        before: Option<i64>,
        watermark: i64,
    ) -> Option<Absence> {
        let Interval { every_us, after_us } = self.of(&reading.device);
        let device = memory.devices.get_mut(&reading.device)?;
        let until = device.newest.saturating_add(after_us);
        if device.absent && watermark > until {
            return None;
        }
        let due = (until, device.heard.saturating_add(after_us));
        self.due = (self.due.0.min(due.0), self.due.1.min(due.1));
        let last_ts = before.unwrap_or(device.newest);
        std::mem::take(&mut device.absent).then(|| Absence {
            device: reading.device.clone(),
            state: "back",
            ts: reading.ts,
            last_ts,
            every_us,
        })
    }

    /// The devices that have become absent, those first that were silent first.
    pub(super) fn absent(&mut self, memory: &mut Memory, watermark: i64, clock_us: i64) -> Vec<Absence> {
        if watermark <= self.due.0 && clock_us <= self.due.1 {
            return Vec::new();
        }
        memory.expect(clock_us);
        self.due = (i64::MAX, i64::MAX);
        let mut absences = Vec::new();
        for (name, device) in memory.devices.iter_mut().filter(|(_, device)| !device.absent) {
            let Interval { every_us, after_us } = self.of(name);
            let newest = if device.newest == NEVER { i64::MAX } else { device.newest };
            let until = (newest.saturating_add(after_us), device.heard.saturating_add(after_us));
            if watermark > until.0 || clock_us > until.1 {
                device.absent = true;
                let last_ts = device.newest;
                let ts = newest.saturating_add(every_us);
                let device = name.clone();
                absences.push(Absence { device, state: "absent", ts, last_ts, every_us });
            } else {
                self.due = (self.due.0.min(until.0), self.due.1.min(until.1));
            }
        }
        absences.sort_by(|one, other| (one.last_ts, &one.device).cmp(&(other.last_ts, &other.device)));
        absences
    }

    /// What is made up between a device's reading and the one before it.
    pub(super) fn fill(&self, before: (i64, &[Option<Value>]), reading: &Reading) -> Vec<Reading> {
        let Some((fill, steps_max)) = self.fill else { return Vec::new() };
        let (between, every_us) = (reading.ts - before.0, self.of(&reading.device).every_us);
        // What comes half an interval late is late, and leaves no gap.
        let missing = (between - 1 - every_us / 2).div_euclid(every_us);
        if missing < 1 || (fill == Fill::Linear && missing > steps_max) {
            return Vec::new();
        }
        let made_up = |step: i64| {
            let ts = before.0 + step * every_us;
            let part = (ts - before.0) as f64 / between as f64;
            let pairs = before.1.iter().zip(&reading.values);
            let values =
                pairs.map(|(from, to)| if fill == Fill::Linear { on_line(from, to, part) } else { from.clone() });
            Reading { ts, device: reading.device.clone(), values: values.collect(), untyped: Vec::new(), span: 0..0 }
        };
        (1..=missing.min(steps_max)).map(made_up).collect()
    }
}

/// Whether a name with `*` for any letters is this one.
fn is_like(name: &str, device: &str) -> bool {
    let Some((first, rest)) = name.split_once('*') else { return name == device };
    let Some(mut left) = device.strip_prefix(first) else { return false };
    let mut parts = rest.split('*').collect::<Vec<_>>();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        let Some(at) = left.find(part) else { return false };
        left = &left[at + part.len()..];
    }
    left.ends_with(last)
}

fn on_line(from: &Option<Value>, to: &Option<Value>, part: f64) -> Option<Value> {
    match (from, to) {
        (Some(Value::Float(from)), Some(Value::Float(to))) => {
            // Not from + (to - from) * part: the difference of two floats may be infinite.
            Some(Value::Float(from * (1.0 - part) + to * part))
        }
        (Some(Value::Int(from)), Some(Value::Int(to))) => {
            let distance = i128::from(*to) - i128::from(*from);
            let value = i128::from(*from) + (distance as f64 * part).round() as i128;
            i64::try_from(value).ok().map(Value::Int)
        }
        (Some(Value::Float(_) | Value::Int(_)), _) => None,
        (other, _) => other.clone(),
    }
}
