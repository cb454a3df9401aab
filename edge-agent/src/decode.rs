//! From the bytes of a message to readings, each with its event time, its device and its values.
//!
//! One bad reading never rejects its neighbours. What cannot be read comes back as [`Rejected`] with a stable reason, a
//! detail for people, and its bytes. Pure: the arrival is an argument. Limits: [`READINGS_MAX`] readings in a message,
//! [`DEVICE_BYTES_MAX`] bytes in a device's name, [`TEXT_BYTES_MAX`] of text in all readings of a message.

mod json;
#[cfg(test)]
mod tests;
mod time;

use std::ops::Range;

use bytes::Bytes;
use wire::FieldType;

use self::json::{Scalar, Scan};
use self::time::TimeReader;
use crate::config::{MapSettings, Place, Pointer, StreamSettings, TimePlace};

/// Readings in one message; a message with more is rejected whole.
pub const READINGS_MAX: usize = 65_536;
/// Longest name of a device.
pub const DEVICE_BYTES_MAX: usize = 256;

/// Text in all readings of a message: one of its texts may stand in each field of each reading.
pub const TEXT_BYTES_MAX: usize = 32 << 20;

/// A value of a field.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Float(f64),
    Int(i64),
    Bool(bool),
    Text(String),
}

/// One reading.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// Event time, µs since 1970 UTC.
    pub ts: i64,
    pub device: String,
    /// In the order of the stream's fields; what is null or missing is None.
    pub values: Vec<Option<Value>>,
    /// Where it stands in the payload.
    pub span: Range<usize>,
}

/// What is no reading.
#[derive(Debug, Clone, PartialEq)]
pub struct Rejected {
    /// A stable word: `not_utf8`, `malformed`, `empty`, `too_many`, `no_readings`, `no_device`, `bad_device`,
    /// `no_time`, `bad_time`, `wrong_type`, `too_large`; and those of the checks.
    pub reason: &'static str,
    /// What was there, for people.
    pub detail: String,
    pub device: Option<String>,
    /// The reading's own bytes, or all of the message when they cannot be told.
    pub payload: Bytes,
}

/// Where a value is taken from, resolved.
#[derive(Debug)]
enum Origin {
    Reading(usize),
    Message(usize),
    Topic(usize),
    Constant(String),
}

#[derive(Debug)]
struct FieldReader {
    name: String,
    kind: FieldType,
    origin: Option<Origin>,
}

/// Reads the messages of one source.
#[derive(Debug)]
pub struct Decoder {
    scan: Scan,
    device: Origin,
    /// None: the arrival.
    ts: Option<(Origin, TimeReader)>,
    fields: Vec<FieldReader>,
}

/// A fault of one reading: reason, detail, and its device when that is known.
type Fault = (&'static str, String, Option<String>);

impl Decoder {
    /// For a source with this mapping; `readings` points to the array of readings in a message.
    pub fn new(map: &MapSettings, readings: Option<&Pointer>, stream: &StreamSettings) -> Self {
        let mut scan = Scan::new(readings);
        let mut origin = |place: &Place| match place {
            Place::Reading(pointer) => Origin::Reading(scan.of_reading(pointer)),
            Place::Message(pointer) => Origin::Message(scan.of_message(pointer)),
            Place::Topic(level) => Origin::Topic(*level),
            Place::Constant(text) => Origin::Constant(text.clone()),
        };
        let device = map.device.as_ref().map_or(Origin::Constant(String::new()), &mut origin);
        let ts = match &map.ts {
            TimePlace::Arrival => None,
            TimePlace::At(place, format) => Some((origin(place), TimeReader::new(format))),
        };
        let field = |(name, field): &(wire::FieldName, crate::config::FieldSettings)| FieldReader {
            name: name.to_string(),
            kind: field.kind,
            origin: map.fields.iter().find(|(mapped, _)| mapped == name).map(|(_, place)| origin(place)),
        };
        let fields = stream.fields.iter().map(field).collect();
        Self { scan, device, ts, fields }
    }

    /// Appends the readings of a message, at least one or one rejection.
    pub fn decode(&self, topic: &str, payload: &Bytes, arrival_us: i64, out: &mut Vec<Result<Reading, Rejected>>) {
        let whole = |reason, detail| Rejected { reason, detail, device: None, payload: payload.clone() };
        let text = match std::str::from_utf8(payload) {
            Ok(text) => text,
            Err(error) => return out.push(Err(whole("not_utf8", error.to_string()))),
        };
        let message = match self.scan.message(text) {
            Ok(message) => message,
            Err((reason, detail)) => return out.push(Err(whole(reason, detail))),
        };
        let spans = match message.readings {
            None => {
                let mut room = TEXT_BYTES_MAX;
                let whole = 0..payload.len();
                let reading = self.reading(topic, &message.reading, &message.slots, arrival_us, whole, &mut room);
                return out.push(reading.map_err(|(reason, detail, device)| Rejected {
                    reason,
                    detail,
                    device,
                    payload: payload.clone(),
                }));
            }
            Some(spans) if spans.is_empty() => {
                return out.push(Err(whole("empty", "an array of no readings".to_owned())));
            }
            Some(spans) if spans.len() > READINGS_MAX => {
                let detail = format!("{} readings are more than {READINGS_MAX}", spans.len());
                return out.push(Err(whole("too_many", detail)));
            }
            Some(spans) => spans,
        };
        let mut room = TEXT_BYTES_MAX;
        for span in spans {
            let slots = self.scan.reading(&text[span.clone()]);
            let reading = match slots {
                Ok(slots) => self.reading(topic, &slots, &message.slots, arrival_us, span.clone(), &mut room),
                Err((reason, detail)) => Err((reason, detail, None)),
            };
            out.push(reading.map_err(|(reason, detail, device)| Rejected {
                reason,
                detail,
                device,
                payload: payload.slice(span),
            }));
        }
    }

    fn reading(
        &self,
        topic: &str,
        reading: &[Scalar<'_>],
        message: &[Scalar<'_>],
        arrival_us: i64,
        span: Range<usize>,
        room: &mut usize,
    ) -> Result<Reading, Fault> {
        let at = |origin| value_at(origin, topic, reading, message);
        let device = device_name(&at(&self.device)).map_err(|(reason, detail)| (reason, detail, None))?;
        let known = |fault: (&'static str, String)| (fault.0, fault.1, Some(device.clone()));
        let ts = match &self.ts {
            None => arrival_us,
            Some((origin, time)) => time.read(&at(origin)).map_err(known)?,
        };
        let mut values = Vec::with_capacity(self.fields.len());
        for field in &self.fields {
            let value = match &field.origin {
                None => None,
                Some(origin) => field.value(&at(origin), is_text(origin)).map_err(known)?,
            };
            if let Some(Value::Text(text)) = &value {
                let too_large = || ("too_large", format!("more than {TEXT_BYTES_MAX} bytes of text in a message"));
                *room = room.checked_sub(text.len()).ok_or_else(too_large).map_err(known)?;
            }
            values.push(value);
        }
        Ok(Reading { ts, device, values, span })
    }
}

/// Topics and constants are text, whatever the field's type is.
fn is_text(origin: &Origin) -> bool {
    matches!(origin, Origin::Topic(_) | Origin::Constant(_))
}

fn value_at<'a>(
    origin: &'a Origin,
    topic: &'a str,
    reading: &'a [Scalar<'_>],
    message: &'a [Scalar<'_>],
) -> Scalar<'a> {
    match origin {
        Origin::Reading(slot) => reading[*slot].reborrow(),
        Origin::Message(slot) => message[*slot].reborrow(),
        Origin::Topic(level) => topic.split('/').nth(*level).map_or(Scalar::Null, |text| Scalar::Text(text.into())),
        Origin::Constant(text) => Scalar::Text(text.as_str().into()),
    }
}

fn device_name(value: &Scalar<'_>) -> Result<String, (&'static str, String)> {
    let name = match value {
        Scalar::Null => return Err(("no_device", "nothing stands where its name should be".to_owned())),
        Scalar::Text(text) => text.to_string(),
        Scalar::Int(number) => number.to_string(),
        Scalar::Unsigned(number) => number.to_string(),
        other => return Err(("bad_device", format!("its name is {}", other.describe()))),
    };
    let wrong = if name.is_empty() {
        "its name is empty"
    } else if name.len() > DEVICE_BYTES_MAX {
        "its name has more than 256 bytes"
    } else if name.contains(['+', '#']) {
        "its name has a wildcard"
    } else if name.chars().any(char::is_control) {
        "its name has control characters"
    } else {
        return Ok(name);
    };
    Err(("bad_device", wrong.to_owned()))
}

impl FieldReader {
    fn value(&self, value: &Scalar<'_>, from_text: bool) -> Result<Option<Value>, (&'static str, String)> {
        let wrong =
            || Err(("wrong_type", format!("{} should be {} and is {}", self.name, self.kind, value.describe())));
        Ok(Some(match (self.kind, value) {
            (_, Scalar::Null) => return Ok(None),
            (FieldType::Float64, Scalar::Float(value)) => Value::Float(*value),
            (FieldType::Float64, Scalar::Int(value)) => Value::Float(*value as f64),
            (FieldType::Float64, Scalar::Unsigned(value)) => Value::Float(*value as f64),
            (FieldType::Int64, Scalar::Int(value)) => Value::Int(*value),
            // 3.0 is a whole number, however it is written; from 2^53 on a float does not say which one.
            (FieldType::Int64, Scalar::Float(value))
                if value.fract() == 0.0 && value.abs() < 9_007_199_254_740_992.0 =>
            {
                Value::Int(*value as i64)
            }
            (FieldType::Bool, Scalar::Bool(value)) => Value::Bool(*value),
            (FieldType::Text, Scalar::Text(text)) => Value::Text(text.to_string()),
            (FieldType::Float64, Scalar::Text(text)) if from_text => match text.parse::<f64>() {
                Ok(value) if value.is_finite() => Value::Float(value),
                _ => return wrong(),
            },
            (FieldType::Int64, Scalar::Text(text)) if from_text => match text.parse() {
                Ok(value) => Value::Int(value),
                Err(_) => return wrong(),
            },
            (FieldType::Bool, Scalar::Text(text)) if from_text => match text.parse() {
                Ok(value) => Value::Bool(value),
                Err(_) => return wrong(),
            },
            _ => return wrong(),
        }))
    }
}
