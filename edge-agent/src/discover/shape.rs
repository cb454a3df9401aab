//! What payloads look like: their format, and where names, times and values stand in them.
//!
//! Looked at are JSON and CBOR objects and arrays of them, SenML in both, lines of the Influx protocol, CSV with a header or
//! without, the births of Sparkplug B, and payloads that are one number. Numbers become `float64`: a sensor that says 21 now says 21.5 later. Limits: [`DEPTH_MAX`] levels,
//! [`FIELDS_MAX`] places.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use chrono::{DateTime, NaiveDateTime};
use serde_json::{Map, Value};

use crate::config::Settings;
use crate::decode::{Decoder, cbor_as_json, sparkplug_defined};

/// Levels of objects within objects that become fields.
const DEPTH_MAX: usize = 4;
/// Fields of one stream.
const FIELDS_MAX: usize = 200;
/// Above this a float has no room for each whole number.
const EXACT_MAX: u64 = 1 << 53;

/// Names of members that say which device it is.
const DEVICES: [&str; 8] = ["device", "device_id", "deviceid", "dev_eui", "deveui", "id", "report_id", "sensor"];
/// Names of members that say when, the best first.
const TIMES: [&str; 11] = [
    "ts",
    "time",
    "timestamp",
    "datetime",
    "date_time",
    "observed_at",
    "dateobservedto",
    "dateobserved",
    "time_ms",
    "created_at",
    "last_seen",
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Json,
    Cbor,
    Senml,
    SenmlCbor,
    Influx,
    Csv,
    Sparkplug,
    Raw,
}

impl Format {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Senml => "senml",
            Self::SenmlCbor => "senml_cbor",
            Self::Influx => "influx",
            Self::Cbor => "cbor",
            Self::Csv => "csv",
            Self::Sparkplug => "sparkplug",
            Self::Raw => "raw",
        }
    }
}

/// One message: its readings, as JSON has them.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) format: Format,
    readings: Vec<Value>,
    table: Option<Table>,
}

/// How CSV is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) delimiter: char,
    /// Names for its columns, when the payload has none.
    pub(super) header: Option<Vec<String>>,
}

/// What a payload is, or what it seems to be when it cannot be written down here.
pub(super) fn look(topic: &str, payload: &Bytes) -> Result<Found, &'static str> {
    let found = |format, readings| Ok(Found { format, readings, table: None });
    if topic.starts_with("spBv1.0/") {
        let metrics = sparkplug_defined(topic, payload).ok_or("Sparkplug B without metrics, or damaged")?;
        let metrics = Value::Object(metrics.into_iter().collect());
        return found(Format::Sparkplug, vec![Value::Object(Map::from_iter([("metrics".to_owned(), metrics)]))]);
    }
    match serde_json::from_slice(payload) {
        Ok(Value::Array(records)) if is_senml(&records) => found(Format::Senml, records),
        Ok(Value::Array(readings)) if readings.iter().any(Value::is_object) => found(Format::Json, readings),
        Ok(object @ Value::Object(_)) => found(Format::Json, vec![object]),
        Ok(number @ Value::Number(_)) => {
            found(Format::Raw, vec![Value::Object(Map::from_iter([("value".to_owned(), number)]))])
        }
        Ok(_) => Err("JSON, but neither an object nor a number"),
        Err(_) => {
            let text = std::str::from_utf8(payload).ok();
            if let Some(lines) = text.and_then(lines) {
                return found(Format::Influx, lines);
            }
            if let Some((table, readings)) = text.and_then(table) {
                return Ok(Found { format: Format::Csv, readings, table: Some(table) });
            }
            match cbor_as_json(payload, DEPTH_MAX + 2) {
                _ if decodes("senml_cbor", payload) => found(Format::SenmlCbor, Vec::new()),
                Some(object @ Value::Object(_)) => found(Format::Cbor, vec![object]),
                Some(Value::Array(readings)) if readings.iter().any(Value::is_object) => found(Format::Cbor, readings),
                _ => Err("of no format that is known here"),
            }
        }
    }
}

/// The lines of CSV as objects. Some cell must be a number, or any text with a comma were a table.
fn table(text: &str) -> Option<(Table, Vec<Value>)> {
    [',', ';', '\t'].into_iter().find_map(|delimiter| {
        let mut reader = csv::ReaderBuilder::new();
        let reader = reader.delimiter(delimiter as u8).has_headers(false).from_reader(text.as_bytes());
        let mut lines = reader.into_records().collect::<Result<Vec<_>, _>>().ok()?;
        let is_number = |cell: &str| cell.trim().parse::<f64>().is_ok();
        let first = lines.first().filter(|first| first.len() > 1 && first.len() <= FIELDS_MAX)?;
        let names = first.iter().map(str::to_owned).collect::<Vec<_>>();
        let is_header = lines.len() > 1 && names.iter().all(|name| !name.is_empty() && !is_number(name));
        let names = match is_header {
            true => names,
            false => (1..=names.len()).map(|column| format!("column_{column}")).collect(),
        };
        if is_header {
            lines.remove(0);
        }
        if !lines.iter().flatten().any(is_number) {
            return None;
        }
        let value = |cell: &str| match cell.parse::<f64>() {
            _ if cell.is_empty() => Value::Null,
            _ if matches!(cell, "true" | "false") => (cell == "true").into(),
            Ok(number) => number.into(),
            Err(_) => cell.into(),
        };
        let reading =
            |line: &csv::StringRecord| names.iter().cloned().zip(line.iter().map(value)).collect::<Map<_, _>>();
        let readings = lines.iter().map(|line| reading(line).into()).collect();
        Some((Table { delimiter, header: (!is_header).then_some(names) }, readings))
    })
}

/// Whether these are the records of a pack.
fn is_senml(records: &[Value]) -> bool {
    const LABELS: [&str; 16] =
        ["bn", "bt", "bu", "bv", "bs", "bver", "n", "u", "v", "vs", "vb", "vd", "s", "t", "ut", "l"];
    let is_record = |record: &Value| {
        record.as_object().is_some_and(|record| record.keys().all(|key| LABELS.contains(&key.as_str())))
    };
    let names = records.iter().any(|record| record.get("n").or(record.get("bn")).is_some_and(Value::is_string));
    names && records.iter().all(is_record)
}

/// Whether the agent's own decoder makes readings of it and rejects none.
fn decodes(format: &str, payload: &Bytes) -> bool {
    let text = format!(
        "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n[[source]]\nkind = \"mqtt\"\n\
         url = \"mqtt://h\"\ntopics = [\"#\"]\nstream = \"s\"\nformat = \"{format}\"\n[source.map]\ndevice = \"topic:0\"\n\
         ts = \"arrival\"\n[stream.s.fields]\n"
    );
    let Ok(settings) = Settings::parse(&text) else { return false };
    let Some(decoding) = settings.source[0].decoding() else { return false };
    let mut out = Vec::new();
    let stream = &settings.stream[settings.source[0].stream()];
    Decoder::new(&decoding, stream).decode("t", payload, 0, &mut out);
    !out.is_empty() && out.iter().all(Result::is_ok)
}

/// The lines of the Influx protocol as objects of tags, fields and time; none when one of them is none.
fn lines(text: &str) -> Option<Vec<Value>> {
    if !decodes("influx", &Bytes::copy_from_slice(text.as_bytes())) {
        return None;
    }
    text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')).map(line).collect()
}

/// A good line, roughly: names with escapes are left to the person who reads the configuration.
fn line(line: &str) -> Option<Value> {
    let mut parts = line.trim().split(' ').filter(|part| !part.is_empty());
    let (name, fields) = (parts.next()?, parts.next()?);
    let value = |text: &str| match text {
        "t" | "T" | "true" | "True" | "TRUE" | "f" | "F" | "false" | "False" | "FALSE" => Value::Bool(true),
        text if text.starts_with('"') => Value::from(text),
        _ => Value::from(1.5),
    };
    let pairs = |text: &str, value: &dyn Fn(&str) -> Value| {
        let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
        pairs.map(|(name, text)| (name.to_owned(), value(text))).collect::<Map<_, _>>()
    };
    let mut object = Map::new();
    if let Some((_, tags)) = name.split_once(',') {
        object.insert("tags".to_owned(), pairs(tags, &|text| Value::from(text)).into());
    }
    object.insert("fields".to_owned(), pairs(fields, &value).into());
    Some(object.into())
}

/// What the values at one place were.
#[derive(Debug, Clone, Default)]
struct Values {
    count: u64,
    number: bool,
    fraction: bool,
    whole_and_large: bool,
    bool: bool,
    text: bool,
    /// How the time is written, if all of them are times written so.
    time: Option<&'static str>,
}

impl Values {
    fn add(&mut self, at: &str, value: &Value) {
        match value {
            Value::Number(number) => {
                self.number = true;
                self.fraction |= number.is_f64();
                self.whole_and_large |= number.as_i64().is_some_and(|number| number.unsigned_abs() > EXACT_MAX);
            }
            Value::Bool(_) => self.bool = true,
            Value::String(_) => self.text = true,
            _ => {}
        }
        let time = time(at, value);
        self.time = time.filter(|_| self.count == 0 || self.time == time);
        self.count += 1;
    }

    fn join(&mut self, other: &Self) {
        self.time = other.time.filter(|_| self.count == 0 || self.time == other.time);
        self.count += other.count;
        self.number |= other.number;
        self.fraction |= other.fraction;
        self.whole_and_large |= other.whole_and_large;
        self.bool |= other.bool;
        self.text |= other.text;
    }

    /// The type that takes all of them, if there is one.
    fn kind(&self) -> Option<&'static str> {
        match self {
            Self { text: true, number: false, bool: false, .. } => Some("text"),
            Self { number: true, whole_and_large: true, fraction: false, text: false, bool: false, .. } => {
                Some("int64")
            }
            Self { number: true, text: false, bool: false, .. } => Some("float64"),
            Self { bool: true, number: false, text: false, .. } => Some("bool"),
            _ => None,
        }
    }
}

/// What the payloads of some topics have in common.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) format: Format,
    pub(super) messages: u64,
    /// Of CSV.
    pub(super) table: Option<Table>,
    readings: u64,
    /// By JSON pointer.
    places: BTreeMap<String, Values>,
    /// The members of the outermost objects, and how many readings have each.
    members: BTreeMap<String, u64>,
}

impl Shape {
    pub(super) fn of(format: Format) -> Self {
        Self { format, messages: 0, table: None, readings: 0, places: BTreeMap::new(), members: BTreeMap::new() }
    }

    pub(super) fn add(&mut self, found: Found) {
        self.messages += 1;
        self.table = found.table.or(self.table.take());
        if self.format == Format::SenmlCbor {
            self.place("/value", &Value::from(1.5));
        }
        for reading in found.readings {
            self.readings += 1;
            match self.format {
                Format::Senml => self.record(&reading),
                Format::Json | Format::Cbor | Format::Csv => {
                    for member in reading.as_object().into_iter().flat_map(Map::keys) {
                        if self.members.len() < FIELDS_MAX || self.members.contains_key(member) {
                            *self.members.entry(member.clone()).or_default() += 1;
                        }
                    }
                    self.walk(&reading, &mut String::new(), 0);
                }
                _ => self.walk(&reading, &mut String::new(), 0),
            }
        }
    }

    fn record(&mut self, record: &Value) {
        for (label, at) in [("v", "/value"), ("vs", "/value"), ("vb", "/value"), ("vd", "/value"), ("s", "/sum")] {
            if let Some(value) = record.get(label) {
                self.place(at, value);
            }
        }
        if record.get("u").or(record.get("bu")).is_some() {
            self.place("/unit", &Value::from(""));
        }
    }

    fn walk(&mut self, value: &Value, at: &mut String, depth: usize) {
        match value {
            Value::Object(members) if depth < DEPTH_MAX => {
                for (name, value) in members {
                    let len = at.len();
                    at.push_str(&pointer(name));
                    self.walk(value, at, depth + 1);
                    at.truncate(len);
                }
            }
            Value::Object(_) | Value::Array(_) | Value::Null => {}
            _ => self.place(at, value),
        }
    }

    fn place(&mut self, at: &str, value: &Value) {
        if self.places.len() < FIELDS_MAX || self.places.contains_key(at) {
            self.places.entry(at.to_owned()).or_default().add(at, value);
        }
    }

    /// Whether half of what one has, times and devices apart, the other has, too, and the time is where and what it is there.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let own = |shape: &Self| {
            let names = shape.members.keys().map(|name| name.to_lowercase());
            let tells = |name: &String| !TIMES.contains(&name.as_str()) && !DEVICES.contains(&name.as_str());
            names.filter(tells).collect::<BTreeSet<_>>()
        };
        let (one, two) = (own(self), own(other));
        if self.format == Format::Sparkplug && other.format == Format::Sparkplug {
            return true;
        }
        self.format == other.format
            && self.table == other.table
            && self.ts() == other.ts()
            && one.intersection(&two).count() * 2 >= one.len().min(two.len())
    }

    pub(super) fn join(&mut self, other: &Self) {
        self.messages += other.messages;
        self.readings += other.readings;
        for (at, values) in &other.places {
            if self.places.len() < FIELDS_MAX || self.places.contains_key(at) {
                self.places.entry(at.clone()).or_default().join(values);
            }
        }
        other.members.iter().for_each(|(name, count)| *self.members.entry(name.clone()).or_default() += count);
    }

    pub(super) fn has(&self, member: &str) -> bool {
        self.members.contains_key(member)
    }

    /// The members that every reading has.
    pub(super) fn always(&self) -> impl Iterator<Item = &str> {
        self.members.iter().filter(|(_, count)| **count == self.readings).map(|(name, _)| name.as_str())
    }

    /// The place that names the device in each reading.
    pub(super) fn device(&self) -> Option<String> {
        match self.format {
            Format::Senml | Format::SenmlCbor => Some("/name".to_owned()),
            Format::Sparkplug => Some("/id".to_owned()),
            Format::Raw => None,
            Format::Json | Format::Cbor | Format::Csv | Format::Influx => {
                let named = |(at, values): &(&String, &Values)| {
                    values.count == self.readings && DEVICES.contains(&last(at).to_lowercase().as_str())
                };
                self.places.iter().find(named).map(|(at, _)| at.clone())
            }
        }
    }

    /// The place that says when, in each reading, and how; how is none where the format itself defines it.
    pub(super) fn ts(&self) -> Option<(String, Option<&'static str>)> {
        match self.format {
            Format::Senml | Format::SenmlCbor | Format::Influx | Format::Sparkplug => Some(("/time".to_owned(), None)),
            Format::Raw => None,
            Format::Json | Format::Cbor | Format::Csv => {
                let times = self.places.iter().filter(|(_, values)| values.count == self.readings);
                let times = times.filter_map(|(at, values)| Some((rank(at)?, at, values.time?)));
                times.min().map(|(_, at, format)| (at.clone(), Some(format)))
            }
        }
    }

    /// The places of all values, and their types; none where they are of several.
    pub(super) fn fields(&self) -> impl Iterator<Item = (&String, Option<&'static str>)> {
        self.places.iter().map(|(at, values)| (at, values.kind()))
    }
}

/// A step of a JSON pointer.
pub(super) fn pointer(member: &str) -> String {
    format!("/{}", member.replace('~', "~0").replace('/', "~1"))
}

/// The name of a place; NGSI's attributes have theirs a level above the value.
fn last(at: &str) -> &str {
    let at = at.strip_suffix("/value").filter(|rest| !rest.is_empty()).unwrap_or(at);
    at.rsplit('/').next().unwrap_or(at)
}

fn rank(at: &str) -> Option<usize> {
    let name = last(at).to_lowercase();
    TIMES.iter().position(|time| *time == name)
}

/// How the time at this place is written, if it is one.
fn time(at: &str, value: &Value) -> Option<&'static str> {
    rank(at)?;
    match value {
        Value::Number(number) => match number.as_f64()? {
            1e9..1e10 => Some("format = \"epoch_s\""),
            1e12..1e13 => Some("format = \"epoch_ms\""),
            1e15..1e16 => Some("format = \"epoch_us\""),
            1e18..1e19 => Some("format = \"epoch_ns\""),
            _ => None,
        },
        Value::String(text) if DateTime::parse_from_rfc3339(text).is_ok() => Some("format = \"rfc3339\""),
        Value::String(text) => ["%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S"]
            .iter()
            .zip(["format = \"%Y-%m-%dT%H:%M:%S\", zone = \"UTC\"", "format = \"%Y-%m-%d %H:%M:%S\", zone = \"UTC\""])
            .find(|(format, _)| NaiveDateTime::parse_from_str(text, format).is_ok())
            .map(|(_, written)| written),
        _ => None,
    }
}
