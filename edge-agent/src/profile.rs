//! `edge-agent profile`: reads history and proposes checks, as TOML to paste, with how many of its readings each would have
//! caught.
//!
//! A row of a CSV (gzipped or not) becomes the JSON object that its columns say, as `weir replay` sends it, or stays a line
//! when the source reads CSV; a line of any other file is a message as it is. Each is decoded and converted as the source's
//! messages are. Ranges, steps, gaps and times of staying the same are those of 99.9 %, rounded outward, so some true readings lie
//! outside: all proposals flag. What each catches is counted by the agent's own checks, over the rows in the order of the
//! file. All readings are held in memory, and with them nothing is written.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use serde_json::{Map, Value as Json};
use wire::FieldType;

use crate::config::{
    Allowed, Decoding, Duplicates, FieldCheck, FieldSettings, Format, Number, Settings, Span, StreamSettings, TimePlace,
};
use crate::decode::{Decoder, Reading, Value};
use crate::validate::{Judge, Outcome, Quality};

/// A text or a whole number with more values than this is no list of allowed ones.
const ALLOWED_MAX: usize = 12;
/// The part of values, steps, intervals and times of staying the same that is taken for usual.
const USUAL: f64 = 0.999;
/// The part of the devices that are taken for sound.
const DEVICES: f64 = 0.9;
/// A value that stays the same for more than this part of the history is not proposed to be stuck.
const STUCK_PART: f64 = 10.0;
/// Readings that are remembered of all devices together.
const REMEMBERED_MAX: usize = 500_000;

/// History, decoded.
struct History {
    readings: Vec<Reading>,
    rejected: usize,
    /// Why the first of them was rejected.
    reason: Option<String>,
}

/// What the proposals would have caught, by the words of `quality` and `duplicate`, `absent`.
type Caught = BTreeMap<String, usize>;

/// Proposes checks for the stream of a source, the first unless it is named. `topic` makes each row's topic, with columns in
/// braces, when the source takes something from it.
///
/// # Errors
/// When the file or the configuration is not what it should be.
pub fn profile(settings: &Settings, source: Option<&str>, topic: Option<&str>, file: &Path) -> anyhow::Result<String> {
    let mut sources = settings.source.iter().filter(|one| source.is_none_or(|name| one.name() == name));
    let found = sources.find_map(|source| Some((source, source.decoding()?)));
    let (source, decoding) = found.context("find a source with a mapping in the configuration")?;
    if decoding.map.ts == TimePlace::Arrival {
        bail!("the source `{}` takes the time from the arrival, which history does not have", source.name());
    }
    let stream = &settings.stream[source.stream()];
    let history = read(file, topic, &decoding, stream)?;
    if history.readings.is_empty() {
        let why = history.reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
        bail!(
            "no row of {} is a reading of the source `{}`{why}; does it need --topic?",
            file.display(),
            source.name()
        );
    }
    let mut proposed = StreamSettings::of_fields(stream.fields.clone());
    proposed.lateness = stream.lateness;
    propose(&mut proposed, &history.readings);
    let caught = caught(&proposed, &history.readings);
    Ok(text(source.stream().as_str(), &proposed, &history, &caught, file))
}

/// Rows of a file become messages of the source: of `.csv` the object that the columns say, or, when the source reads CSV,
/// the line with its header; of any other file each line as it is.
fn read(file: &Path, topic: Option<&str>, decoding: &Decoding, stream: &StreamSettings) -> anyhow::Result<History> {
    let opened = File::open(file).with_context(|| format!("open {}", file.display()))?;
    let gzipped = file.extension().is_some_and(|extension| extension == "gz");
    let plain = if gzipped { file.with_extension("") } else { file.to_owned() };
    let is_csv = plain.extension().is_some_and(|extension| extension == "csv");
    let reader: Box<dyn Read> = if gzipped { Box::new(MultiGzDecoder::new(opened)) } else { Box::new(opened) };
    let (mut decoder, judge) = (Decoder::new(decoding, stream), Judge::new(stream));
    let mut history = History { readings: Vec::new(), rejected: 0, reason: None };
    let mut out = Vec::new();
    let mut message = |payload: Vec<u8>, row: &dyn Fn() -> Map<String, Json>| -> anyhow::Result<()> {
        let topic = topic.map_or(Ok(String::new()), |template| fill(template, &row()))?;
        decoder.decode(&topic, &Bytes::from(payload), 0, &mut out);
        for reading in out.drain(..) {
            let reading = reading.map_err(|rejected| (rejected.reason, rejected.detail));
            match reading.and_then(|mut reading| judge.convert(&mut reading).map(|()| reading)) {
                Ok(reading) => history.readings.push(reading),
                Err((reason, detail)) => {
                    history.rejected += 1;
                    history.reason.get_or_insert_with(|| format!("{reason}: {detail}"));
                }
            }
        }
        Ok(())
    };
    if !is_csv {
        for line in BufReader::new(reader).split(b'\n') {
            let line = line.context("read a line")?;
            let row = || serde_json::from_slice(&line).unwrap_or_default();
            if !line.is_empty() {
                message(line.clone(), &row)?;
            }
        }
        return Ok(history);
    }
    let ascii = |set: Option<char>, usual: u8| set.and_then(|set| u8::try_from(set).ok()).unwrap_or(usual);
    let (delimiter, quote) = (ascii(decoding.options.delimiter, b','), ascii(decoding.options.quote, b'"'));
    let named = decoding.options.header.is_none();
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).quote(quote).has_headers(named).from_reader(reader);
    let header = match &decoding.options.header {
        Some(columns) => csv::StringRecord::from(columns.clone()),
        None => reader.headers().context("read the header of the CSV")?.clone(),
    };
    for record in reader.into_records() {
        let record = record.context("read a row of the CSV")?;
        let row = || header.iter().zip(record.iter()).map(|(name, text)| (name.to_owned(), json(text))).collect();
        let payload = if decoding.format == Format::Csv {
            let mut writer = csv::WriterBuilder::new().delimiter(delimiter).quote(quote).from_writer(Vec::new());
            if named {
                writer.write_record(&header)?;
            }
            writer.write_record(&record)?;
            writer.into_inner().map_err(|error| anyhow!("{error}"))?
        } else {
            serde_json::to_vec::<Map<String, Json>>(&row())?
        };
        message(payload, &row)?;
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
        let room = REMEMBERED_MAX / devices.len().max(1);
        stream.remember = stream.remember.max(remember(readings).min(room));
    }
    if let (Some(usual), Some(long)) = (quantile(&mut intervals, 0.5), quantile(&mut intervals, USUAL)) {
        let every = whole(usual, 10.0);
        stream.absent_after = (long > 2.0 * every.0.as_micros() as f64).then(|| whole(long, 4.0));
        stream.expected_every = Some(every);
    }
    let times = readings.iter().map(|reading| reading.ts);
    let span = times.clone().max().unwrap_or_default() - times.min().unwrap_or_default();
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
        // By device, so that one that is stuck for days does not make it usual.
        let same = devices.values().filter_map(|readings| quantile(&mut same_for(readings, index), USUAL));
        let mut same = same.collect::<Vec<_>>();
        let every = stream.expected_every.map_or(0.0, |every| every.0.as_micros() as f64);
        // What stays the same for long may do so for ever, and is no fault.
        let long = span as f64 / STUCK_PART;
        let stuck = quantile(&mut same, DEVICES).filter(|us| (every..long).contains(us));
        field.stuck_after = stuck.map(|us| whole(us + 1e6, 4.0));
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

/// For how long, at each reading, the value has been the same, in µs.
fn same_for(readings: &[&Reading], index: usize) -> Vec<f64> {
    let mut run: Option<&Reading> = None;
    let mut same = Vec::new();
    for reading in readings.iter().copied().filter(|reading| reading.values[index].is_some()) {
        let first = run.filter(|first| first.values[index] == reading.values[index]).unwrap_or(reading);
        same.push((reading.ts - first.ts) as f64);
        run = Some(first);
    }
    same
}

/// Of how many of its newest readings a device must be remembered by, so that all but one in a hundred of those that repeat
/// one in the order of the file are known.
fn remember(readings: &[Reading]) -> usize {
    let (mut devices, mut needed) = (BTreeMap::<&str, Vec<i64>>::new(), Vec::new());
    for reading in readings {
        let times = devices.entry(&reading.device).or_default();
        match times.binary_search(&reading.ts) {
            Ok(at) => needed.push((times.len() - at) as f64),
            Err(at) => times.insert(at, reading.ts),
        }
    }
    quantile(&mut needed, 0.99).map_or(0, |needed| needed as usize)
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

/// Whole seconds, or so many whole minutes, hours or days at least.
fn whole(us: f64, least: f64) -> Span {
    let seconds = (us / 1e6).ceil().max(1.0);
    let unit = [86_400.0, 3_600.0, 60.0].into_iter().find(|unit| seconds >= least * unit || seconds % unit == 0.0);
    let unit = unit.unwrap_or(1.0);
    Span(Duration::from_secs(((seconds / unit).ceil() * unit) as u64))
}

fn written(span: Span) -> String {
    let seconds = span.0.as_secs();
    let units = [(86_400, "d"), (3_600, "h"), (60, "m")];
    let unit = units.into_iter().find(|(unit, _)| seconds.is_multiple_of(*unit)).unwrap_or((1, "s"));
    format!("\"{}{}\"", seconds / unit.0, unit.1)
}

/// Judged by the agent's own checks, in the order of the file.
fn caught(stream: &StreamSettings, readings: &[Reading]) -> Caught {
    let mut judge = Judge::new(stream);
    let (mut caught, mut quality) = (Caught::new(), Quality::default());
    let (mut newest, lateness) = (i64::MIN, stream.lateness.micros());
    let mut count = |word: &str, most: usize| *caught.entry(word.to_owned()).or_default() += most;
    // They are in the unit that is kept already.
    for reading in readings {
        // As long as a row is the newest, the agent has listened up to its time when it comes.
        let before = newest.saturating_sub(lateness);
        newest = newest.max(reading.ts);
        count("absent", judge.absent(before, newest).len());
        count("late", usize::from(reading.ts < before));
        let watermark = newest.saturating_sub(lateness);
        match judge.judge_converted(reading, reading.ts, newest, watermark, &mut quality) {
            Ok(Outcome::Repeat) => count("duplicate", 1),
            Ok(Outcome::Keep { .. }) => {
                quality.as_str().split(',').filter(|word| !word.is_empty()).for_each(|word| count(word, 1));
            }
            Err((reason, _)) => count(reason, 1),
        }
        count("absent", judge.absent(watermark, newest).len());
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
    let why = history.reason.as_ref().map(|reason| format!(", the first one for {reason}")).unwrap_or_default();
    let _ = writeln!(out, "; {} rows are no readings{why}.", history.rejected);
    let _ = writeln!(
        out,
        "# Behind each check is how many of them it would have caught, in the order of the file. All of them"
    );
    let _ = writeln!(out, "# flag; required, min and max reject what fails when they are taken out of `flag`.");
    let _ = writeln!(out, "[stream.{name}]");
    let mut key = |key: String, comment: String| {
        let _ = writeln!(out, "{key:<24}# {comment}");
    };
    key(format!("lateness = {}", written(stream.lateness)), format!("as it was; {} readings are later", of("late")));
    if let Some(every) = stream.expected_every {
        key(format!("expected_every = {}", written(every)), format!("absent: {} times", of("absent")));
    }
    if let Some(after) = stream.absent_after {
        key(format!("absent_after = {}", written(after)), "one interval in a thousand is longer".to_owned());
    }
    if stream.duplicates == Duplicates::First {
        key("duplicates = \"first\"".to_owned(), format!("{} readings", of("duplicate")));
        if stream.remember > StreamSettings::default().remember {
            let comment = "a repeat is sought among so many of a device".to_owned();
            key(format!("remember = {}", stream.remember), comment);
        }
    }
    if of("out_of_order") > 0 {
        key("in_order = true".to_owned(), format!("{} readings", of("out_of_order")));
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
            let unit = settings.store_unit.or(settings.unit).map(|unit| format!(" ({unit})")).unwrap_or_default();
            let _ = writeln!(out, "# {field}{unit}: {}", counts.join(", "));
        }
    }
    out
}

#[cfg(test)]
mod tests;
