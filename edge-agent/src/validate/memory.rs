//! What is remembered of each device between its readings: its newest event time, a few recent readings for repeats and
//! steps, since when a value stays the same, and when it was heard.
//!
//! At most `devices_max` devices; then the quarter of them that was silent longest is forgotten, but for those that
//! `expected_every_of` names: these are known before they are ever heard. The last `remember` event
//! times of a device are known; what is older is taken for new and has no neighbours. A reading that fails `max_step` is
//! remembered all the same: when the value has moved for good, the second reading there is right. A reading that comes out
//! of order is judged by both its neighbours, and neither begins nor ends a time of being stuck. A function of the readings
//! and the configuration alone. State as bytes: `validate/state.rs`.

use std::collections::{HashMap, HashSet};

use wire::{FieldName, FieldType};

use super::{Fault, Quality};
use crate::config::{Duplicates, FieldCheck, Number, StreamCheck, StreamSettings, Verdict};
use crate::decode::{Reading, Value};

/// Of texts no more is kept for filling.
pub(super) const TEXT_BYTES_MAX: usize = 256;

/// The newest event time of a device that was never heard.
pub(super) const NEVER: i64 = i64::MIN;

/// The devices of one stream.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) devices: HashMap<String, Device>,
    /// Readings judged so far: the clock by which devices are forgotten.
    pub(super) judged: u64,
    pub(super) steps: Vec<Step>,
    pub(super) stuck: Vec<Stuck>,
    pub(super) fields: Vec<(FieldName, FieldType)>,
    devices_max: usize,
    /// Devices that are expected by name.
    named: HashSet<String>,
    remember: usize,
    first_only: bool,
    /// Whether recent readings are kept.
    remembers: bool,
    in_order: Option<Verdict>,
    /// Whether the newest values are kept.
    keeps_values: bool,
}

#[derive(Debug)]
pub(super) struct Step {
    pub(super) field: usize,
    limit: Number,
    verdict: Verdict,
}

#[derive(Debug)]
pub(super) struct Stuck {
    pub(super) field: usize,
    after_us: i64,
    verdict: Verdict,
}

/// One device.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Device {
    /// [`Memory::judged`] at its last reading.
    pub(super) used: u64,
    /// Its newest event time.
    pub(super) newest: i64,
    /// By event time; of equal ones the last that came is last.
    pub(super) seen: Vec<Seen>,
    /// For each of [`Memory::stuck`].
    pub(super) runs: Vec<Option<Run>>,
    /// The agent's listening time at its last reading.
    pub(super) heard: i64,
    pub(super) absent: bool,
    /// The values of its newest reading, when they are kept.
    pub(super) last: Vec<Option<Value>>,
}

/// A reading, as far as its neighbours need it: a number for each of [`Memory::steps`].
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Seen {
    pub(super) ts: i64,
    pub(super) numbers: Vec<Option<Number>>,
}

/// A value and the first event time at which it was there.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Run {
    /// The number's bits; of a text its length and CRC.
    pub(super) value: u64,
    pub(super) since: i64,
}

/// What a device's reading was to those before.
#[derive(Debug, PartialEq)]
pub(super) enum Heard {
    /// It repeats the event time of one that is remembered, and only the first is wanted.
    Repeat,
    /// The newest of its device, whose newest before is this, if there was one.
    Newest { before: Option<(i64, Vec<Option<Value>>)> },
    /// There is a newer one.
    Older,
}

impl Memory {
    /// None when nothing of the settings needs it.
    pub(super) fn new(stream: &StreamSettings) -> Option<Self> {
        let fields = || stream.fields.iter().enumerate();
        let steps = fields().filter_map(|(field, (_, settings))| {
            let verdict = settings.verdict(FieldCheck::MaxStep);
            settings.max_step.map(|limit| Step { field, limit, verdict })
        });
        let stuck = fields().filter_map(|(field, (_, settings))| {
            let verdict = settings.verdict(FieldCheck::StuckAfter);
            settings.stuck_after.map(|span| Stuck { field, after_us: span.micros(), verdict })
        });
        let steps = steps.collect::<Vec<_>>();
        let first_only = stream.duplicates == Duplicates::First;
        let memory = Self {
            devices: HashMap::new(),
            judged: 0,
            remembers: first_only || !steps.is_empty(),
            steps,
            stuck: stuck.collect(),
            fields: stream.fields.iter().map(|(name, field)| (name.clone(), field.kind)).collect(),
            devices_max: stream.devices_max,
            named: stream.expected_devices().map(str::to_owned).collect(),
            remember: stream.remember,
            first_only,
            in_order: stream.in_order.then(|| stream.verdict(StreamCheck::InOrder)),
            keeps_values: stream.fill.is_some(),
        };
        let needed = memory.remembers || !memory.stuck.is_empty() || memory.in_order.is_some();
        (needed || stream.expected_every.is_some()).then_some(memory)
    }

    /// Judges a reading by those before it and remembers it.
    pub(super) fn judge(&mut self, reading: &Reading, clock_us: i64, quality: &mut Quality) -> Result<Heard, Fault> {
        self.judged += 1;
        if !self.devices.contains_key(&reading.device) {
            if self.devices.len() >= self.devices_max {
                self.forget_silent();
            }
            self.add(reading.device.clone(), clock_us);
        }
        let device = self.devices.get_mut(&reading.device).expect("it was put there");
        (device.used, device.heard) = (self.judged, clock_us);
        if self.first_only && device.seen.binary_search_by_key(&reading.ts, |seen| seen.ts).is_ok() {
            return Ok(Heard::Repeat);
        }
        let is_newest = reading.ts >= device.newest;
        if let Some(verdict) = self.in_order.filter(|_| !is_newest) {
            quality.fail(verdict, "out_of_order", None, || {
                format!("its time is {} us, and its device was at {} us already", reading.ts, device.newest)
            })?;
        }
        let mut fault = Ok(());
        if self.remembers {
            fault = check_steps(device, &self.steps, &self.fields, reading, quality);
            device.remember(reading, &self.steps, self.remember);
        }
        if !is_newest {
            return fault.map(|()| Heard::Older);
        }
        for (run, stuck) in device.runs.iter_mut().zip(&self.stuck) {
            let Some(value) = reading.values.get(stuck.field).and_then(Option::as_ref).map(bits) else { continue };
            match run {
                Some(run) if run.value == value => {
                    let for_us = reading.ts - run.since;
                    if for_us >= stuck.after_us && fault.is_ok() {
                        let name = &self.fields[stuck.field].0;
                        fault = quality.fail(stuck.verdict, "stuck", Some(name), || {
                            format!("{name} has been the same for {} s", for_us / 1_000_000)
                        });
                    }
                }
                _ => *run = Some(Run { value, since: reading.ts }),
            }
        }
        let before = (device.newest != i64::MIN).then_some(device.newest);
        device.newest = reading.ts;
        let last = if self.keeps_values && fault.is_ok() {
            std::mem::replace(&mut device.last, reading.values.iter().map(kept).collect())
        } else {
            Vec::new()
        };
        fault.map(|()| Heard::Newest { before: before.map(|ts| (ts, last)) })
    }

    /// A quarter at a time: a device that is forgotten one by one would cost a search each time.
    /// Those that are expected by name and not known yet are waited for from now on.
    pub(super) fn expect(&mut self, clock_us: i64) {
        let unknown = self.named.iter().filter(|name| !self.devices.contains_key(*name)).cloned().collect::<Vec<_>>();
        unknown.into_iter().for_each(|name| self.add(name, clock_us));
    }

    fn add(&mut self, name: String, clock_us: i64) {
        let runs = vec![None; self.stuck.len()];
        self.devices.insert(name, Device { newest: NEVER, runs, heard: clock_us, ..Device::default() });
    }

    fn forget_silent(&mut self) {
        let mut used = self.devices.values().map(|device| device.used).collect::<Vec<_>>();
        let (_, limit, _) = used.select_nth_unstable(self.devices_max / 4);
        let limit = *limit;
        let named = &self.named;
        self.devices.retain(|name, device| device.used > limit || named.contains(name));
    }
}

impl Device {
    fn remember(&mut self, reading: &Reading, steps: &[Step], most: usize) {
        let numbers = steps.iter().map(|step| reading.values.get(step.field).and_then(number)).collect();
        let at = self.seen.partition_point(|seen| seen.ts <= reading.ts);
        if self.seen.len() >= most {
            if at == 0 {
                return;
            }
            self.seen.remove(0);
            self.seen.insert(at - 1, Seen { ts: reading.ts, numbers });
        } else {
            self.seen.insert(at, Seen { ts: reading.ts, numbers });
        }
    }
}

/// Against the neighbours by event time that are remembered.
fn check_steps(
    device: &Device,
    steps: &[Step],
    fields: &[(FieldName, FieldType)],
    reading: &Reading,
    quality: &mut Quality,
) -> Result<(), Fault> {
    let at = device.seen.partition_point(|seen| seen.ts <= reading.ts);
    for (index, step) in steps.iter().enumerate() {
        let Some(value) = reading.values.get(step.field).and_then(number) else { continue };
        let known = |seen: &&Seen| seen.numbers[index].is_some();
        let neighbours = [device.seen[..at].iter().rfind(known), device.seen[at..].iter().find(known)];
        let far = neighbours.into_iter().flatten().find_map(|seen| {
            let other = seen.numbers[index]?;
            (distance(value, other) > step.limit).then_some(other)
        });
        if let Some(other) = far {
            let name = &fields[step.field].0;
            quality.fail(step.verdict, "step", Some(name), || {
                format!("{name} is {value}, and {other} beside it: more than {}", step.limit)
            })?;
        }
    }
    Ok(())
}

fn distance(one: Number, other: Number) -> Number {
    match (one, other) {
        (Number::Int(one), Number::Int(other)) => {
            i64::try_from(one.abs_diff(other)).map_or(Number::Float(one.abs_diff(other) as f64), Number::Int)
        }
        _ => Number::Float((float(one) - float(other)).abs()),
    }
}

pub(super) fn float(number: Number) -> f64 {
    match number {
        Number::Int(value) => value as f64,
        Number::Float(value) => value,
    }
}

fn number(value: &Option<Value>) -> Option<Number> {
    match value {
        Some(Value::Float(value)) => Some(Number::Float(*value)),
        Some(Value::Int(value)) => Some(Number::Int(*value)),
        _ => None,
    }
}

fn bits(value: &Value) -> u64 {
    match value {
        Value::Float(value) => value.to_bits(),
        Value::Int(value) => *value as u64,
        Value::Bool(value) => u64::from(*value),
        Value::Text(text) => (text.len() as u64) << 32 | u64::from(crc32c::crc32c(text.as_bytes())),
    }
}

fn kept(value: &Option<Value>) -> Option<Value> {
    value.clone().filter(|value| !matches!(value, Value::Text(text) if text.len() > TEXT_BYTES_MAX))
}
