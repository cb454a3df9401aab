//! From the bytes of a message to readings, each with its event time, its device and its values.
//!
//! One bad reading never rejects its neighbours. What cannot be read comes back as [`Rejected`] with a stable reason, a
//! detail for people, and its bytes. Pure: the arrival is an argument. Limits: [`READINGS_MAX`] readings in a message,
//! [`DEVICE_BYTES_MAX`] bytes in a device's name, [`TEXT_BYTES_MAX`] of text in all readings of a message.

mod cbor;
mod csv;
mod influx;
mod json;
mod scalar;
mod senml;
mod sparkplug;
#[cfg(test)]
pub(crate) mod tests;
mod time;
mod tree;
mod when;

use std::ops::Range;

use bytes::Bytes;
use wire::FieldType;

pub(crate) use self::cbor::as_json as cbor_as_json;
use self::scalar::{Fault, NUMBER_BYTES_MAX, Record, Scalar};
use self::sparkplug::Sparkplug;
pub(crate) use self::sparkplug::defined as sparkplug_defined;
pub use self::sparkplug::{Births, Command};
pub use self::time::TimeReader;
use self::when::Filter;
use crate::config::{Decoding, FieldCheck, Format, Place, Pointer, StreamSettings, TimePlace, Verdict};

/// Readings in one message; a message with more is rejected whole.
pub const READINGS_MAX: usize = 65_536;
/// Longest name of a device.
pub const DEVICE_BYTES_MAX: usize = 256;

/// Text in all readings of a message, those that are rejected included: one of its texts may stand in each field of each
/// reading.
pub const TEXT_BYTES_MAX: usize = 32 << 20;

const WRONG_TYPE: &str = "wrong_type";
const NOT_FINITE: &str = "not_finite";

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
    /// The places of those that are None because they were of another type, where that flags.
    pub untyped: Vec<usize>,
    /// Where it stands in the payload.
    pub span: Range<usize>,
}

/// What is no reading.
#[derive(Debug, Clone, PartialEq)]
pub struct Rejected {
    /// A stable word: `not_utf8`, `malformed`, `empty`, `too_many`, `no_readings`, `no_device`, `bad_device`,
    /// `no_time`, `bad_time`, `wrong_type`, `too_large`, `not_finite`; of CSV `no_column`, `wrong_columns`; of SenML `bad_name`,
    /// `bad_base`, `bad_version`, `must_understand`, `two_values`; of Sparkplug `bad_topic`, `compressed`,
    /// `too_many_metrics`, `unknown_alias`; and those of the checks.
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
    Key(usize),
    Constant(String),
}

#[derive(Debug)]
struct FieldReader {
    name: String,
    kind: FieldType,
    origin: Option<Origin>,
    /// Whether a value of another type is null, and not the end of its reading.
    flags_type: bool,
}

/// Reads the messages of one source: a format finds values, the mapping makes readings of them.
#[derive(Debug)]
pub struct Decoder {
    reader: Reader,
    mapping: Mapping,
}

/// A format.
#[derive(Debug)]
enum Reader {
    Json(json::Scan),
    Cbor(cbor::Scan),
    Senml(senml::Packs),
    Influx(influx::Lines),
    Csv(csv::Lines),
    Raw,
    Sparkplug(Box<Sparkplug>),
}

/// What readings are made of.
#[derive(Debug)]
struct Mapping {
    device: Origin,
    /// None: the arrival.
    ts: Option<(Origin, TimeReader)>,
    fields: Vec<FieldReader>,
    filter: Filter,
    /// The format knows text alone, as CSV does: it is read as what the field is.
    text_only: bool,
}

/// A fault of one reading, with its device when that is known.
type ReadingFault = (&'static str, String, Option<String>);

/// One message, on its way.
struct Arrived<'a> {
    topic: &'a str,
    payload: &'a Bytes,
    arrival_us: i64,
    out: &'a mut Vec<Result<Reading, Rejected>>,
    filtered: u64,
    /// Bytes of text that the readings may still have.
    room: usize,
}

impl Decoder {
    /// For a source that is read like this.
    pub fn new(decoding: &Decoding, stream: &StreamSettings) -> Self {
        let (mut of_reading, mut of_message) = (Vec::<Pointer>::new(), Vec::<Pointer>::new());
        let slot = |wanted: &mut Vec<Pointer>, pointer: &Pointer| {
            wanted.iter().position(|other| other == pointer).unwrap_or_else(|| {
                wanted.push(pointer.clone());
                wanted.len() - 1
            })
        };
        let mut origin = |place: &Place| match place {
            Place::Reading(pointer) => Origin::Reading(slot(&mut of_reading, pointer)),
            Place::Message(pointer) => Origin::Message(slot(&mut of_message, pointer)),
            Place::Topic(level) => Origin::Topic(*level),
            Place::Key(level) => Origin::Key(*level),
            Place::Constant(text) => Origin::Constant(text.clone()),
        };
        let map = &decoding.map;
        let device = map.device.as_ref().map_or(Origin::Constant(String::new()), &mut origin);
        let ts = match &map.ts {
            TimePlace::Arrival => None,
            TimePlace::At(place, format) => Some((origin(place), TimeReader::new(format))),
        };
        let filter = Filter::new(&decoding.when, &mut origin);
        let field = |(name, field): &(wire::FieldName, crate::config::FieldSettings)| FieldReader {
            name: name.to_string(),
            kind: field.kind,
            flags_type: field.verdict(FieldCheck::Type) == Verdict::Flag,
            origin: map.fields.iter().find(|(mapped, _)| mapped == name).map(|(_, place)| origin(place)),
        };
        let fields = stream.fields.iter().map(field).collect();
        let (readings, options) = (decoding.readings.as_ref(), &decoding.options);
        let reader = match decoding.format {
            Format::Json => Reader::Json(json::Scan::new(readings, &of_message, &of_reading)),
            Format::Cbor => Reader::Cbor(cbor::Scan::new(readings, &of_message, &of_reading)),
            Format::Senml => Reader::Senml(senml::Packs::new(&of_reading, options.spread, false)),
            Format::SenmlCbor => Reader::Senml(senml::Packs::new(&of_reading, options.spread, true)),
            Format::Influx => Reader::Influx(influx::Lines::new(&of_reading, options.precision.unwrap_or_default())),
            Format::Csv => Reader::Csv(csv::Lines::new(&of_reading, options)),
            Format::Raw => Reader::Raw,
            Format::Sparkplug => Reader::Sparkplug(Box::new(Sparkplug::new(&of_reading, options))),
        };
        let text_only = matches!(decoding.format, Format::Csv | Format::Raw);
        Self { reader, mapping: Mapping { device, ts, fields, filter, text_only } }
    }

    /// Appends the readings of a message and its rejections, and returns how many readings were filtered: one of the three
    /// there always is. A filtered message without readings is one.
    pub fn decode(
        &mut self,
        topic: &str,
        payload: &Bytes,
        arrival_us: i64,
        out: &mut Vec<Result<Reading, Rejected>>,
    ) -> u64 {
        let mut message = Arrived { topic, payload, arrival_us, out, filtered: 0, room: TEXT_BYTES_MAX };
        if let Err((reason, detail)) = self.read(&mut message) {
            let payload = payload.clone();
            message.out.push(Err(Rejected { reason, detail, device: None, payload }));
        }
        message.filtered
    }

    /// Which of the readings that [`Decoder::decode`] has just made of a message have their time from its arrival.
    pub fn by_arrival(
        &mut self,
        topic: &str,
        payload: &Bytes,
        arrival_us: i64,
        readings: &[Result<Reading, Rejected>],
    ) -> Vec<bool> {
        let ts = |reading: &Result<Reading, Rejected>| reading.as_ref().map_or(0, |reading| reading.ts);
        match (&self.mapping.ts, &self.reader) {
            (None, _) => vec![true; readings.len()],
            // Some of their times are relative to it. They remember nothing: one that comes a moment later says which.
            (Some(_), Reader::Senml(_) | Reader::Influx(_)) => {
                let mut later = Vec::new();
                self.decode(topic, payload, arrival_us.saturating_add(1), &mut later);
                readings.iter().zip(&later).map(|(now, later)| ts(now) != ts(later)).collect()
            }
            (Some(_), Reader::Sparkplug(_)) => readings.iter().map(|reading| ts(reading) == arrival_us).collect(),
            _ => vec![false; readings.len()],
        }
    }

    /// What births have told; None for formats that remember nothing.
    pub fn births(&self) -> Option<&Births> {
        match &self.reader {
            Reader::Sparkplug(sparkplug) => Some(&sparkplug.births),
            _ => None,
        }
    }

    /// Goes on from what [`Decoder::births`] was.
    pub fn restore(&mut self, births: Births) {
        if let Reader::Sparkplug(sparkplug) = &mut self.reader {
            sparkplug.restore(births);
        }
    }

    /// What should be published because of the messages since the last call: Sparkplug's requests for births.
    pub fn take_commands(&mut self) -> Vec<Command> {
        match &mut self.reader {
            Reader::Sparkplug(sparkplug) => sparkplug.take_commands(),
            _ => Vec::new(),
        }
    }

    /// A fault is that of the whole message, of which nothing was taken.
    fn read(&mut self, message: &mut Arrived<'_>) -> Result<(), Fault> {
        let Self { reader, mapping } = self;
        let payload = message.payload;
        let (records, filtered) = match reader {
            Reader::Json(scan) => return read_json(scan, mapping, message),
            Reader::Cbor(scan) => {
                let found = scan.message(payload)?;
                if found.several {
                    some(found.readings.len())?;
                }
                for (span, keys) in found.readings {
                    let slots = scan.reading(&payload[span.clone()]);
                    mapping.take(message, &found.slots, Record { span, keys: &keys, slots });
                }
                return Ok(());
            }
            Reader::Senml(packs) => packs.records(payload, message.arrival_us)?,
            Reader::Influx(lines) => (lines.records(utf8(payload)?, message.arrival_us)?, 0),
            Reader::Csv(lines) => (lines.records(utf8(payload)?)?, 0),
            Reader::Raw => {
                let value = Scalar::Text(utf8(payload)?.trim().into());
                // Each place of the mapping is the one that there is.
                let slots = Ok(vec![value]);
                (vec![Record { span: 0..payload.len(), keys: &[], slots }], 0)
            }
            Reader::Sparkplug(sparkplug) => {
                let records = sparkplug.records(message.topic, payload, message.arrival_us)?;
                let filtered = u64::from(records.is_empty());
                (records, filtered)
            }
        };
        message.filtered += filtered;
        if filtered == 0 {
            some(records.len())?;
        }
        for record in records {
            mapping.take(message, &[], record);
        }
        Ok(())
    }
}

fn read_json(scan: &json::Scan, mapping: &Mapping, message: &mut Arrived<'_>) -> Result<(), Fault> {
    let text = utf8(message.payload)?;
    let found = scan.message(text)?;
    let Some(readings) = found.readings else {
        let record = Record { span: 0..text.len(), keys: &[], slots: Ok(found.reading) };
        mapping.take(message, &found.slots, record);
        return Ok(());
    };
    some(readings.len())?;
    for (span, keys) in readings {
        let slots = scan.reading(&text[span.clone()]);
        mapping.take(message, &found.slots, Record { span, keys: &keys, slots });
    }
    Ok(())
}

/// There must be readings, and not too many.
fn some(readings: usize) -> Result<(), Fault> {
    match readings {
        0 => Err(("empty", "a message of no readings".to_owned())),
        1..=READINGS_MAX => Ok(()),
        _ => Err(tree::too_many(readings)),
    }
}

fn utf8(payload: &[u8]) -> Result<&str, Fault> {
    std::str::from_utf8(payload).map_err(|error| ("not_utf8", error.to_string()))
}

impl Mapping {
    /// Makes a reading of what was found, or a rejection, or passes it over.
    fn take(&self, message: &mut Arrived<'_>, of_message: &[Scalar<'_>], record: Record<'_>) {
        let span = record.span.clone();
        let mut room = message.room;
        let reading = match record.slots {
            Ok(slots) => {
                let found = Found { slots: &slots, of_message, keys: record.keys, message };
                self.reading(&found, span.clone(), &mut room)
            }
            Err((reason, detail)) => Err((reason, detail, None)),
        };
        message.room = room;
        match reading {
            Ok(Some(reading)) => message.out.push(Ok(reading)),
            Ok(None) => message.filtered += 1,
            Err((reason, detail, device)) => {
                let payload = message.payload.slice(span);
                message.out.push(Err(Rejected { reason, detail, device, payload }));
            }
        }
    }

    /// None when it is filtered. `room`: bytes of text that it may have.
    fn reading(
        &self,
        found: &Found<'_>,
        span: Range<usize>,
        room: &mut usize,
    ) -> Result<Option<Reading>, ReadingFault> {
        if !self.filter.passes(found) {
            return Ok(None);
        }
        let device = device_name(&found.at(&self.device)).map_err(|(reason, detail)| (reason, detail, None))?;
        let known = |fault: Fault| (fault.0, fault.1, Some(device.clone()));
        let ts = match &self.ts {
            None => found.message.arrival_us,
            Some((origin, time)) => time.read(&found.at(origin)).map_err(known)?,
        };
        let (mut values, mut untyped) = (Vec::with_capacity(self.fields.len()), Vec::new());
        for (place, field) in self.fields.iter().enumerate() {
            values.push(match &field.origin {
                None => None,
                Some(origin) => {
                    let from_text = self.text_only || is_text(origin);
                    match field.value(&found.at(origin), from_text, room) {
                        Err((WRONG_TYPE | NOT_FINITE, _)) if field.flags_type => {
                            untyped.push(place);
                            None
                        }
                        value => value.map_err(known)?,
                    }
                }
            });
        }
        Ok(Some(Reading { ts, device, values, untyped, span }))
    }
}

/// All that a reading can be made of.
struct Found<'a> {
    slots: &'a [Scalar<'a>],
    of_message: &'a [Scalar<'a>],
    keys: &'a [String],
    message: &'a Arrived<'a>,
}

impl Found<'_> {
    fn at<'a>(&'a self, origin: &'a Origin) -> Scalar<'a> {
        match origin {
            Origin::Reading(slot) => self.slots[*slot].reborrow(),
            Origin::Message(slot) => self.of_message[*slot].reborrow(),
            Origin::Topic(level) => {
                self.message.topic.split('/').nth(*level).map_or(Scalar::Null, |text| Scalar::Text(text.into()))
            }
            Origin::Key(level) => self.keys.get(*level).map_or(Scalar::Null, |key| Scalar::Text(key.as_str().into())),
            Origin::Constant(text) => Scalar::Text(text.as_str().into()),
        }
    }
}

/// Topics, keys and constants are text, whatever the field's type is.
fn is_text(origin: &Origin) -> bool {
    matches!(origin, Origin::Topic(_) | Origin::Key(_) | Origin::Constant(_))
}

fn device_name(value: &Scalar<'_>) -> Result<String, Fault> {
    let name = match value {
        Scalar::Text(text) if text.len() > DEVICE_BYTES_MAX => {
            return Err(("bad_device", format!("its name has more than {DEVICE_BYTES_MAX} bytes")));
        }
        Scalar::Null => return Err(("no_device", "nothing stands where its name should be".to_owned())),
        Scalar::Text(text) => text.to_string(),
        Scalar::Int(number) => number.to_string(),
        Scalar::Unsigned(number) => number.to_string(),
        other => return Err(("bad_device", format!("its name is {}", other.describe()))),
    };
    let wrong = if name.is_empty() {
        "its name is empty"
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
    fn value(&self, value: &Scalar<'_>, from_text: bool, room: &mut usize) -> Result<Option<Value>, Fault> {
        let wrong = || Err((WRONG_TYPE, format!("{} should be {} and is {}", self.name, self.kind, value.describe())));
        Ok(Some(match (self.kind, value) {
            (_, Scalar::Null) => return Ok(None),
            (FieldType::Float64 | FieldType::Int64, Scalar::Float(value)) if !value.is_finite() => {
                return Err((NOT_FINITE, format!("{} is {value}", self.name)));
            }
            (FieldType::Float64, Scalar::Float(value)) => Value::Float(*value),
            (FieldType::Float64, Scalar::Int(value)) => Value::Float(*value as f64),
            (FieldType::Float64, Scalar::Unsigned(value)) => Value::Float(*value as f64),
            (FieldType::Int64, Scalar::Int(value) | Scalar::Time(value)) => Value::Int(*value),
            // 3.0 is a whole number, however it is written; from 2^53 on a float does not say which one.
            (FieldType::Int64, Scalar::Float(value))
                if value.fract() == 0.0 && value.abs() < 9_007_199_254_740_992.0 =>
            {
                Value::Int(*value as i64)
            }
            (FieldType::Bool, Scalar::Bool(value)) => Value::Bool(*value),
            (FieldType::Text, Scalar::Text(text)) => {
                let left = room.checked_sub(text.len());
                *room = left
                    .ok_or_else(|| ("too_large", format!("more than {TEXT_BYTES_MAX} bytes of text in a message")))?;
                Value::Text(text.to_string())
            }
            // What is longer is no number.
            (_, Scalar::Text(text)) if text.len() > NUMBER_BYTES_MAX => return wrong(),
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
