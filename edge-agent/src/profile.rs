//! `edge-agent profile`: reads history and proposes checks, as TOML to paste, with how many of its readings each would have
//! caught.
//!
//! A row of the CSV (gzipped or not) becomes the JSON object that its columns say, as `weir replay` sends it, and is decoded
//! and converted as the source's messages are. Ranges and steps are the inner 99.9 % rounded outward to two digits of their
//! width, so some true readings lie outside: all proposals flag. What each catches is counted by the agent's own checks, over
//! the rows in the order of the file. All readings are held in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use serde_json::{Map, Value as Json};
use wire::FieldType;

use crate::config::{
    Allowed, Duplicates, FieldCheck, FieldSettings, Number, Settings, SourceSettings, Span, StreamSettings, TimePlace,
};
use crate::decode::{Decoder, Reading, Value};
use crate::validate::{Judge, Outcome, Quality};

/// A text or a whole number with more values than this is no list of allowed ones.
const ALLOWED_MAX: usize = 12;
/// The part of the values, steps and runs that is taken for usual.
const USUAL: f64 = 0.999;

/// History, decoded.
struct History {
    readings: Vec<Reading>,
    rejected: usize,
}

/// What the proposals would have caught, by the words of `quality` and `duplicate`, `absent`.
type Caught = BTreeMap<String, usize>;

/// Proposes checks for the stream of a source, the first unless it is named. `topic` makes each row's topic, with columns in
/// braces, when the source takes something from it.
///
/// # Errors
/// When the file or the configuration is not what it should be.
pub fn profile(settings: &Settings, source: Option<&str>, topic: Option<&str>, file: &Path) -> anyhow::Result<String> {
    let sources = settings.source.iter().filter(|one| source.is_none_or(|name| one.name() == name));
    let source = sources.filter_map(|source| match source {
        SourceSettings::Mqtt(mqtt) => Some(mqtt),
        SourceSettings::Host(_) => None,
    });
    let source = source.into_iter().next().context("find a source with a mapping in the configuration")?;
    if source.map.ts == TimePlace::Arrival {
        bail!("the source `{}` takes the time from the arrival, which history does not have", source.name);
    }
    let stream = &settings.stream[&source.stream];
    let decoder = Decoder::new(&source.map, source.readings.as_ref(), stream);
    let history = read(file, topic, &decoder, &Judge::new(stream))?;
    if history.readings.is_empty() {
        bail!("no row of {} is a reading of the source `{}`; does it need --topic?", file.display(), source.name);
    }
    let mut proposed = StreamSettings::of_fields(stream.fields.clone());
    proposed.lateness = stream.lateness;
    propose(&mut proposed, &history.readings);
    let caught = caught(&proposed, &history.readings);
    Ok(text(source.stream.as_str(), &proposed, &history, &caught, file))
}

fn read(file: &Path, topic: Option<&str>, decoder: &Decoder, judge: &Judge) -> anyhow::Result<History> {
    let opened = File::open(file).with_context(|| format!("open {}", file.display()))?;
    let gzipped = file.extension().is_some_and(|extension| extension == "gz");
    let reader: Box<dyn Read> = if gzipped { Box::new(MultiGzDecoder::new(opened)) } else { Box::new(opened) };
    let mut reader = csv::Reader::from_reader(reader);
    let header = reader.headers().context("read the header of the CSV")?.clone();
    let mut history = History { readings: Vec::new(), rejected: 0 };
    let mut out = Vec::new();
    for record in reader.into_records() {
        let record = record.context("read a row of the CSV")?;
        let row = header.iter().zip(record.iter()).map(|(name, text)| (name.to_owned(), json(text)));
        let row = row.collect::<Map<String, Json>>();
        let topic = topic.map_or(Ok(String::new()), |template| fill(template, &row))?;
        decoder.decode(&topic, &Bytes::from(serde_json::to_vec(&row)?), 0, &mut out);
        for reading in out.drain(..) {
            match reading.map(|mut reading| judge.convert(&mut reading).map(|()| reading)) {
                Ok(Ok(reading)) => history.readings.push(reading),
                _ => history.rejected += 1,
            }
        }
    }
    Ok(history)
}

/// A number when the text is one as JSON writes it; null when it is empty; otherwise text.
fn json(text: &str) -> Json {
    match serde_json::from_str(text) {
        _ if text.is_empty() => Json::Null,
        Ok(Json::Number(number)) => Json::Number(number),
        _ => Json::String(text.to_owned()),
    }
}

fn fill(template: &str, row: &Map<String, Json>) -> anyhow::Result<String> {
    let (mut topic, mut rest) = (String::new(), template);
    while let Some((before, after)) = rest.split_once('{') {
        let (column, after) = after.split_once('}').ok_or_else(|| anyhow!("`{template}`: a {{ without }}"))?;
        topic.push_str(before);
        match row.get(column) {
            Some(Json::String(text)) => topic.push_str(text),
            Some(value) => topic.push_str(&value.to_string()),
            None => bail!("the topic names the column `{column}`, which the file does not have"),
        }
        rest = after;
    }
    Ok(topic + rest)
}

/// The readings of each device, by event time.
fn by_device(readings: &[Reading]) -> BTreeMap<&str, Vec<&Reading>> {
    let mut devices = BTreeMap::<&str, Vec<&Reading>>::new();
    readings.iter().for_each(|reading| devices.entry(&reading.device).or_default().push(reading));
    devices.values_mut().for_each(|readings| readings.sort_by_key(|reading| reading.ts));
    devices
}

fn quantile(numbers: &mut [f64], q: f64) -> Option<f64> {
    numbers.sort_by(f64::total_cmp);
    numbers.get((q * numbers.len().checked_sub(1)? as f64).round() as usize).copied()
}

fn propose(stream: &mut StreamSettings, readings: &[Reading]) {
    let devices = by_device(readings);
    let pairs = || devices.values().flat_map(|readings| readings.windows(2));
    let mut intervals = pairs().map(|pair| (pair[1].ts - pair[0].ts) as f64).filter(|us| *us > 0.0).collect::<Vec<_>>();
    if intervals.len() < pairs().count() {
        stream.duplicates = Duplicates::First;
    }
    if let (Some(usual), Some(long)) = (quantile(&mut intervals, 0.5), quantile(&mut intervals, 0.99)) {
        let every = whole(usual);
        stream.absent_after = (long > 2.0 * every.0.as_micros() as f64).then(|| whole(long));
        stream.expected_every = Some(every);
    }
    stream.in_order = devices.len() < readings.len();
    stream.devices_max = stream.devices_max.max(devices.len());
    for index in 0..stream.fields.len() {
        let values = || readings.iter().filter_map(|reading| reading.values[index].as_ref());
        let field = &mut stream.fields[index].1;
        field.required = values().count() == readings.len();
        if matches!(field.kind, FieldType::Text) {
            let distinct = values().filter_map(|value| if let Value::Text(text) = value { Some(text) } else { None });
            let distinct = distinct.collect::<BTreeSet<_>>();
            if distinct.len() <= ALLOWED_MAX {
                field.allowed = distinct.into_iter().map(|text| Allowed(Value::Text(text.clone()))).collect();
            }
            continue;
        }
        if field.kind == FieldType::Bool {
            continue;
        }
        let mut numbers = values().filter_map(float).collect::<Vec<_>>();
        let (Some(low), Some(high)) = (quantile(&mut numbers, 1.0 - USUAL), quantile(&mut numbers, USUAL)) else {
            continue;
        };
        let unit = digit(high - low);
        // What is never negative is so for a reason.
        let low = if low >= 0.0 && low < high - low { 0.0 } else { (low / unit).floor() * unit };
        field.min = Some(number(low, field.kind));
        field.max = Some(number((high / unit).ceil() * unit, field.kind));
        let step = |pair: &[&Reading]| {
            let (from, to) = (pair[0].values[index].as_ref()?, pair[1].values[index].as_ref()?);
            Some((float(to)? - float(from)?).abs())
        };
        let mut steps = pairs().filter_map(step).collect::<Vec<_>>();
        field.max_step = quantile(&mut steps, USUAL)
            .filter(|step| *step > 0.0)
            .map(|step| number((step / digit(step)).ceil() * digit(step), field.kind));
        let mut runs = devices.values().flat_map(|readings| runs(readings, index)).collect::<Vec<_>>();
        let every = stream.expected_every.map_or(0.0, |every| every.0.as_micros() as f64);
        field.stuck_after = quantile(&mut runs, USUAL).filter(|us| *us > every).map(|us| whole(us * 1.000_001));
    }
    for (_, field) in &mut stream.fields {
        field.flag = flags(field);
    }
}

/// A proposal comes from history that has faults, too: it flags.
fn flags(field: &FieldSettings) -> Vec<FieldCheck> {
    let set = [
        (FieldCheck::Required, field.required),
        (FieldCheck::Min, field.min.is_some()),
        (FieldCheck::Max, field.max.is_some()),
    ];
    set.into_iter().filter(|(_, set)| *set).map(|(check, _)| check).collect()
}

/// How long each value stayed the same, in µs.
fn runs(readings: &[&Reading], index: usize) -> Vec<f64> {
    let same = |one: &&Reading, other: &&Reading| one.values[index] == other.values[index];
    let with_value = readings.iter().copied().filter(|reading| reading.values[index].is_some()).collect::<Vec<_>>();
    with_value.chunk_by(same).map(|run| (run[run.len() - 1].ts - run[0].ts) as f64).collect()
}

fn float(value: &Value) -> Option<f64> {
    match value {
        Value::Float(value) => Some(*value),
        Value::Int(value) => Some(*value as f64),
        _ => None,
    }
}

/// The second digit of a width: what is rounded to.
fn digit(width: f64) -> f64 {
    if width > 0.0 { 10_f64.powf(width.log10().floor() - 1.0) } else { 1.0 }
}

fn number(value: f64, kind: FieldType) -> Number {
    if kind == FieldType::Int64 || value.fract() == 0.0 {
        return Number::Int(value.round() as i64);
    }
    // 0.30000000000000004 is what the division leaves.
    Number::Float(format!("{value:.10}").parse().unwrap_or(value))
}

/// Whole seconds, minutes or hours, whichever loses less than a tenth.
fn whole(us: f64) -> Span {
    let seconds = (us / 1e6).ceil().max(1.0);
    let unit = [86_400.0, 3_600.0, 60.0].into_iter().find(|unit| seconds >= 10.0 * unit || seconds % unit == 0.0);
    let unit = unit.unwrap_or(1.0);
    Span(Duration::from_secs(((seconds / unit).ceil() * unit) as u64))
}

fn written(span: Span) -> String {
    let seconds = span.0.as_secs();
    let units = [(86_400, "d"), (3_600, "h"), (60, "m")];
    let unit = units.into_iter().find(|(unit, _)| seconds % unit == 0).unwrap_or((1, "s"));
    format!("\"{}{}\"", seconds / unit.0, unit.1)
}

/// Judged by the agent's own checks, in the order of the file.
fn caught(stream: &StreamSettings, readings: &[Reading]) -> Caught {
    let mut judge = Judge::new(stream);
    let (mut caught, mut quality) = (Caught::new(), Quality::default());
    let mut newest = i64::MIN;
    let mut count = |word: &str, most: usize| *caught.entry(word.to_owned()).or_default() += most;
    // They are in the unit that is kept already.
    for reading in readings {
        newest = newest.max(reading.ts);
        let watermark = newest.saturating_sub(stream.lateness.micros());
        match judge.judge_converted(reading, reading.ts, 0, watermark, &mut quality) {
            Ok(Outcome::Repeat) => count("duplicate", 1),
            Ok(Outcome::Keep { .. }) => {
                quality.as_str().split(',').filter(|word| !word.is_empty()).for_each(|word| count(word, 1));
            }
            Err((reason, _)) => count(reason, 1),
        }
        count("absent", judge.absent(watermark, 0).len());
    }
    caught
}

fn text(name: &str, stream: &StreamSettings, history: &History, caught: &Caught, file: &Path) -> String {
    let readings = &history.readings;
    let devices = readings.iter().map(|reading| reading.device.as_str()).collect::<BTreeSet<_>>().len();
    let file = file.file_name().unwrap_or_default().to_string_lossy();
    let times = readings.iter().map(|reading| reading.ts);
    let day = |us: Option<i64>| {
        let time = us.and_then(chrono::DateTime::from_timestamp_micros);
        time.map_or_else(String::new, |time| time.format("%Y-%m-%d").to_string())
    };
    let (first, last) = (day(times.clone().min()), day(times.max()));
    let of = |word: &str| caught.get(word).copied().unwrap_or_default();
    let mut out = format!("# {} readings of {devices} devices in {file}, {first} to {last}", readings.len());
    let _ = writeln!(out, "; {} rows are none.", history.rejected);
    let _ = writeln!(out, "# What each check would have caught is behind it; each flags until it is taken out of `flag`.");
    let _ = writeln!(out, "[stream.{name}]");
    if let Some(every) = stream.expected_every {
        let _ = writeln!(out, "expected_every = {:<8}  # absent: {} times", written(every), of("absent"));
    }
    if let Some(after) = stream.absent_after {
        let _ = writeln!(out, "absent_after = {}", written(after));
    }
    if stream.duplicates == Duplicates::First {
        let _ = writeln!(out, "duplicates = \"first\"  # {} readings", of("duplicate"));
    }
    if of("out_of_order") > 0 {
        let _ = writeln!(out, "in_order = true         # {} readings", of("out_of_order"));
    }
    let _ = writeln!(out, "[stream.{name}.fields]");
    for (field, settings) in &stream.fields {
        let (mut keys, mut counts) = (vec![format!("type = \"{}\"", settings.kind)], Vec::new());
        if let Some(unit) = settings.unit {
            keys.push(format!("unit = \"{}\"", unit.name()));
        }
        if let Some(unit) = settings.store_unit {
            keys.push(format!("store_unit = \"{}\"", unit.name()));
        }
        let mut check = |set: Option<String>, key: &str, word: &str| {
            if let Some(set) = set {
                keys.push(format!("{key} = {set}"));
                counts.push(format!("{key} {}", of(&format!("{word}:{field}"))));
            }
        };
        check(settings.required.then(|| "true".to_owned()), "required", "missing");
        check(settings.min.map(|min| min.to_string()), "min", "below_min");
        check(settings.max.map(|max| max.to_string()), "max", "above_max");
        check(settings.max_step.map(|step| step.to_string()), "max_step", "step");
        check(settings.stuck_after.map(written), "stuck_after", "stuck");
        let allowed = settings.allowed.iter().filter_map(|allowed| match &allowed.0 {
            Value::Text(text) => Some(toml::Value::String(text.clone()).to_string()),
            _ => None,
        });
        let allowed = allowed.collect::<Vec<_>>().join(", ");
        check((!allowed.is_empty()).then(|| format!("[{allowed}]")), "allowed", "not_allowed");
        let flag = settings.flag.iter().map(|check| match check {
            FieldCheck::Required => "\"required\"",
            FieldCheck::Min => "\"min\"",
            _ => "\"max\"",
        });
        let flag = flag.collect::<Vec<_>>().join(", ");
        if !flag.is_empty() {
            keys.push(format!("flag = [{flag}]"));
        }
        let _ = writeln!(out, "{field} = {{ {} }}", keys.join(", "));
        if !counts.is_empty() {
            let _ = writeln!(out, "# {field}: {}", counts.join(", "));
        }
    }
    out
}

#[cfg(test)]
mod tests;
