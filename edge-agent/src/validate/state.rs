//! What is remembered of a stream's devices as bytes, exact, and back.
//!
//! Version 1, little-endian (`str16` is a u16 length and UTF-8; `number` is 0 u8, or 1 u8 | i64, or 2 u8 | f64; `value` is a
//! `number`, or 3 u8 | bool u8, or 4 u8 | length u32 and UTF-8):
//! ```text
//! version u8 = 1 | memory? u8 | shape str16 | judged u64 | devices u32
//!   | (device str16 | used u64 | newest i64 | heard i64 | absent u8
//!      | seen u32 | (ts i64 | number*)* | (run? u8 [ value u64 | since i64 ])* | values u16 | value*)*
//! hold? u8 | fields u16 (name str16)* | readings u32 | (clock i64 | source str16 | device str16 | ts i64 | quality str16 | values u16 | value*)*
//! ```
//! The shape says which fields are remembered: of another shape nothing is taken over but who was heard and when.

use bytes::{Buf, Bytes};
use wire::FieldType;

use super::hold::{Held, Hold};
use super::memory::{Device, Memory, Run, Seen};
use super::{Judge, Reading};
use crate::config::Number;
use crate::decode::Value;

const VERSION: u8 = 1;

/// Why a state is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the state of the checks is of another version or cut short")]
pub struct StateError;

impl Judge {
    /// Whether there is anything to write.
    pub fn remembers(&self) -> bool {
        self.memory.is_some() || self.hold.is_some()
    }

    /// Appends the state.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.push(VERSION);
        out.push(u8::from(self.memory.is_some()));
        if let Some(memory) = &self.memory {
            put_text(out, &memory.shape());
            out.extend(memory.judged.to_le_bytes());
            out.extend((memory.devices.len() as u32).to_le_bytes());
            let mut devices = memory.devices.iter().collect::<Vec<_>>();
            devices.sort_by_key(|(name, _)| *name);
            for (name, device) in devices {
                put_text(out, name);
                put_device(out, device);
            }
        }
        out.push(u8::from(self.hold.is_some()));
        if let Some(hold) = &self.hold {
            out.extend((self.fields.len() as u16).to_le_bytes());
            self.fields.iter().for_each(|(name, _)| put_text(out, name.as_str()));
            out.extend((hold.order.len() as u32).to_le_bytes());
            for (clock, device, ts) in &hold.order {
                let Some(held) = hold.held.get(&(device.clone(), *ts)) else { continue };
                out.extend(clock.to_le_bytes());
                put_text(out, &held.source);
                put_text(out, device);
                out.extend(ts.to_le_bytes());
                put_text(out, &held.quality);
                put_values(out, &held.reading.values);
            }
        }
    }

    /// Takes over a state, as far as the settings still have a place for it. Readings that waited and need not wait any
    /// more are due at once; of fields that are no more their values are forgotten.
    ///
    /// # Errors
    /// When the bytes are no state; then nothing is taken over.
    pub fn restore(&mut self, bytes: &Bytes) -> Result<(), StateError> {
        let state = read(&mut bytes.clone()).ok_or(StateError)?;
        if let (Some(mine), Some((shape, judged, devices))) = (&mut self.memory, state.memory) {
            let same = shape == mine.shape();
            mine.judged = judged;
            for (name, mut device) in devices {
                if !same {
                    device.seen.clear();
                    device.runs = vec![None; mine.stuck.len()];
                    device.last = Vec::new();
                }
                mine.devices.insert(name, device);
            }
        }
        if !state.held.is_empty() {
            let hold = self.hold.get_or_insert_with(|| Hold::new(0, 0));
            for (clock, mut held) in state.held {
                let values = self.fields.iter().map(|(name, kind)| {
                    let at = state.fields.iter().position(|was| was == name.as_str())?;
                    held.reading.values.get(at).cloned().flatten().filter(|value| kind_of(value) == *kind)
                });
                held.reading.values = values.collect();
                hold.put(held, clock);
            }
        }
        Ok(())
    }
}

fn kind_of(value: &Value) -> FieldType {
    match value {
        Value::Float(_) => FieldType::Float64,
        Value::Int(_) => FieldType::Int64,
        Value::Bool(_) => FieldType::Bool,
        Value::Text(_) => FieldType::Text,
    }
}

impl Memory {
    /// Which fields are remembered, in which order; of all fields a hash, for they may be many.
    fn shape(&self) -> String {
        let name = |field: usize| self.fields[field].0.as_str();
        let steps = self.steps.iter().map(|step| name(step.field)).collect::<Vec<_>>().join(",");
        let stuck = self.stuck.iter().map(|stuck| name(stuck.field)).collect::<Vec<_>>().join(",");
        let fields = self.fields.iter().map(|(name, kind)| format!("{name} {kind}")).collect::<Vec<_>>().join(",");
        format!("{steps};{stuck};{}", crc32c::crc32c(fields.as_bytes()))
    }
}

type ReadMemory = (String, u64, Vec<(String, Device)>);

struct State {
    memory: Option<ReadMemory>,
    fields: Vec<String>,
    held: Vec<(i64, Held)>,
}

fn read(bytes: &mut Bytes) -> Option<State> {
    if bytes.try_get_u8().ok()? != VERSION {
        return None;
    }
    let mut memory = None;
    if bytes.try_get_u8().ok()? == 1 {
        let (shape, judged) = (take_text(bytes)?, bytes.try_get_u64_le().ok()?);
        let mut parts = shape.split(';');
        let mut count = || parts.next().map(|part| part.split(',').filter(|name| !name.is_empty()).count());
        let (steps, stuck) = (count()?, count()?);
        let mut devices = Vec::new();
        for _ in 0..bytes.try_get_u32_le().ok()? {
            devices.push((take_text(bytes)?, take_device(bytes, steps, stuck)?));
        }
        memory = Some((shape, judged, devices));
    }
    let (mut fields, mut held) = (Vec::new(), Vec::new());
    if bytes.try_get_u8().ok()? == 1 {
        for _ in 0..bytes.try_get_u16_le().ok()? {
            fields.push(take_text(bytes)?);
        }
        for _ in 0..bytes.try_get_u32_le().ok()? {
            let clock = bytes.try_get_i64_le().ok()?;
            let (source, device) = (take_text(bytes)?, take_text(bytes)?);
            let ts = bytes.try_get_i64_le().ok()?;
            let quality = take_text(bytes)?;
            let reading = Reading { ts, device, values: take_values(bytes)?, untyped: Vec::new(), span: 0..0 };
            held.push((clock, Held { source, reading, quality }));
        }
    }
    Some(State { memory, fields, held })
}

fn put_device(out: &mut Vec<u8>, device: &Device) {
    out.extend(device.used.to_le_bytes());
    out.extend(device.newest.to_le_bytes());
    out.extend(device.heard.to_le_bytes());
    out.push(u8::from(device.absent));
    out.extend((device.seen.len() as u32).to_le_bytes());
    for seen in &device.seen {
        out.extend(seen.ts.to_le_bytes());
        seen.numbers.iter().for_each(|number| put_number(out, *number));
    }
    for run in &device.runs {
        out.push(u8::from(run.is_some()));
        if let Some(run) = run {
            out.extend(run.value.to_le_bytes());
            out.extend(run.since.to_le_bytes());
        }
    }
    put_values(out, &device.last);
}

fn take_device(bytes: &mut Bytes, steps: usize, stuck: usize) -> Option<Device> {
    let mut device = Device {
        used: bytes.try_get_u64_le().ok()?,
        newest: bytes.try_get_i64_le().ok()?,
        heard: bytes.try_get_i64_le().ok()?,
        absent: bytes.try_get_u8().ok()? == 1,
        ..Device::default()
    };
    for _ in 0..bytes.try_get_u32_le().ok()? {
        let ts = bytes.try_get_i64_le().ok()?;
        let numbers = (0..steps).map(|_| take_number(bytes)).collect::<Option<_>>()?;
        device.seen.push(Seen { ts, numbers });
    }
    for _ in 0..stuck {
        device.runs.push(match bytes.try_get_u8().ok()? {
            0 => None,
            _ => Some(Run { value: bytes.try_get_u64_le().ok()?, since: bytes.try_get_i64_le().ok()? }),
        });
    }
    device.last = take_values(bytes)?;
    Some(device)
}

fn put_number(out: &mut Vec<u8>, number: Option<Number>) {
    match number {
        None => out.push(0),
        Some(Number::Int(value)) => {
            out.push(1);
            out.extend(value.to_le_bytes());
        }
        Some(Number::Float(value)) => {
            out.push(2);
            out.extend(value.to_le_bytes());
        }
    }
}

fn take_number(bytes: &mut Bytes) -> Option<Option<Number>> {
    Some(match bytes.try_get_u8().ok()? {
        0 => None,
        1 => Some(Number::Int(bytes.try_get_i64_le().ok()?)),
        2 => Some(Number::Float(bytes.try_get_f64_le().ok()?)),
        _ => return None,
    })
}

fn put_values(out: &mut Vec<u8>, values: &[Option<Value>]) {
    out.extend((values.len() as u16).to_le_bytes());
    for value in values {
        match value {
            None => out.push(0),
            Some(Value::Int(value)) => put_number(out, Some(Number::Int(*value))),
            Some(Value::Float(value)) => put_number(out, Some(Number::Float(*value))),
            Some(Value::Bool(value)) => out.extend([3, u8::from(*value)]),
            Some(Value::Text(text)) => {
                out.push(4);
                out.extend((text.len() as u32).to_le_bytes());
                out.extend_from_slice(text.as_bytes());
            }
        }
    }
}

fn take_values(bytes: &mut Bytes) -> Option<Vec<Option<Value>>> {
    let value = |bytes: &mut Bytes| {
        Some(match bytes.try_get_u8().ok()? {
            0 => None,
            1 => Some(Value::Int(bytes.try_get_i64_le().ok()?)),
            2 => Some(Value::Float(bytes.try_get_f64_le().ok()?)),
            3 => Some(Value::Bool(bytes.try_get_u8().ok()? == 1)),
            4 => {
                let len = bytes.try_get_u32_le().ok()? as usize;
                let text = (bytes.len() >= len).then(|| bytes.split_to(len))?;
                Some(Value::Text(String::from_utf8(text.to_vec()).ok()?))
            }
            _ => return None,
        })
    };
    (0..bytes.try_get_u16_le().ok()?).map(|_| value(bytes)).collect()
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    // Names, devices and qualities are shorter than 64 KiB by their own limits.
    out.extend((text.len() as u16).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn take_text(bytes: &mut Bytes) -> Option<String> {
    let len = usize::from(bytes.try_get_u16_le().ok()?);
    let text = (bytes.len() >= len).then(|| bytes.split_to(len))?;
    String::from_utf8(text.to_vec()).ok()
}
