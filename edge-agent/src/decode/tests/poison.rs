//! Payloads that no device should send: each becomes rows of `quarantine` with the right reason and its bytes; nothing
//! panics, and what little bytes can be made to cost is bounded.

mod cases;

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use arrow_array::cast::AsArray;
use segment_log::Position;

use self::cases::Poison;
use super::formats::bytes;
use super::sparkplug::{Is, metric, payload};
use super::*;
use crate::entry::{Entry, Message, Payload};
use crate::pipeline::Pipeline;

/// A payload takes less, also in a build that is not optimised, on a machine that has other things to do.
const LONGEST: Duration = Duration::from_secs(20);

/// Payloads of one mapping.
struct Group {
    format: &'static str,
    map: &'static str,
    topic: &'static str,
    cases: &'static [Poison],
}

const EACH: &str = "device = \"topic:0\"\nf = \"/f\"\ni = \"/i\"\nb = \"/b\"\nt = \"/t/0/x\"";
const JUDGED: &str = "device = \"/d\"\nts = \"/ts\"\nf = \"/f\"\ni = \"/i\"\nb = \"/b\"\nt = \"/t\"";
const COUNTED: &str =
    "device = \"/d\"\nts = { at = \"/ts\", format = \"epoch_s\" }\nf = \"/f\"\ni = \"/i\"\nb = \"/b\"\nt = \"/t\"";
const PACK: &str = "device = \"/name\"\nts = \"/time\"\nf = \"/value\"";
const LINES: &str = "device = \"/tags/x\"\nts = \"/time\"\nf = \"/fields/f\"";
const COLUMNS: &str = "device = \"/d\"\nf = \"/f\"\ni = \"/i\"\nb = \"/b\"\nt = \"/t\"";
const BIRTHS: &str = "device = \"/id\"\nts = \"/time\"\nf = \"/metrics/f\"\ni = \"/metrics/i\"";

fn groups() -> Vec<Group> {
    let group = |format, map, cases| Group { format, map, topic: "t", cases };
    let births = |cases| Group { topic: "spBv1.0/g/NBIRTH/n", ..group("sparkplug", BIRTHS, cases) };
    vec![
        group("json", EACH, cases::JSON_BROKEN),
        group("json", JUDGED, cases::JSON_JUDGED),
        group("senml", PACK, cases::SENML),
        group("senml", PACK, cases::SENML_RESOLVED),
        group("cbor", EACH, cases::CBOR_BROKEN),
        group("cbor", COUNTED, cases::CBOR_JUDGED),
        group("senml_cbor", PACK, cases::SENML_CBOR),
        group("influx", LINES, cases::INFLUX),
        group("influx", LINES, cases::INFLUX_JUDGED),
        group("csv", "device = \"topic:0\"\nf = \"/f\"", cases::CSV_BROKEN),
        group("csv", COLUMNS, cases::CSV_JUDGED),
        group("raw", "device = \"topic:0\"\nf = \"/value\"", cases::RAW),
        births(cases::SPARKPLUG),
        births(cases::SPARKPLUG_JUDGED),
    ]
}

fn settings(format: &str, map: &str) -> Settings {
    let text = text(&format!("format = \"{format}\""), map);
    Settings::parse(&text.replace("\"float64\" }", "\"float64\", min = -1e9, max = 1e9 }")).unwrap()
}

/// A message of the source `s`.
pub(super) fn message(topic: &str, payload: Bytes) -> Entry {
    let payload = Payload::Whole(payload);
    Entry::Message(Message { source: "s".into(), topic: topic.into(), payload, arrival_us: ARRIVAL, delivery: None })
}

/// What the pipeline makes of a payload: how many rows of the stream, and reason and bytes of each row of quarantine.
fn through_the_pipeline(settings: &Settings, topic: &str, payload: &[u8]) -> (usize, Vec<(String, Vec<u8>)>) {
    let mut pipeline = Pipeline::new(settings, Position(0), &BTreeMap::new());
    pipeline.apply(Position(0), Position(1), &message(topic, Bytes::copy_from_slice(payload)));
    let totals = pipeline.counters().sources["s"];
    assert_eq!(
        totals.read,
        totals.accepted + totals.quarantined + totals.duplicate + totals.waiting + totals.filtered,
        "{totals:?}"
    );
    let (mut rows, mut rejected) = (0, Vec::new());
    for lane in &pipeline.cut().unwrap().lanes {
        for batch in &lane.batches {
            let schema = lane.schemas.iter().find(|schema| schema.id() == batch.schema).unwrap();
            let decoded = batch.decode(schema).unwrap();
            if batch.stream.as_str() != "quarantine" {
                rows += decoded.num_rows();
                continue;
            }
            let reasons = decoded.column_by_name("reason").unwrap().as_string::<i32>();
            let payloads = decoded.column_by_name("payload").unwrap().as_binary::<i32>();
            rejected.extend(
                reasons
                    .iter()
                    .zip(payloads)
                    .map(|(reason, payload)| (reason.unwrap().to_owned(), payload.unwrap_or_default().to_vec())),
            );
        }
    }
    assert_eq!((rows as u64, rejected.len() as u64), (totals.accepted, totals.quarantined));
    (rows, rejected)
}

/// The payloads of a format.
pub(super) fn poison_of(format: &str) -> impl Iterator<Item = &'static str> {
    groups()
        .into_iter()
        .filter(move |group| group.format == format)
        .flat_map(|group| group.cases)
        .map(|(text, _)| *text)
}

pub(super) fn is_hex(format: &str) -> bool {
    matches!(format, "cbor" | "senml_cbor" | "sparkplug")
}

#[test]
fn each_becomes_rows_of_quarantine_with_the_right_reason() {
    let (mut counts, mut wrong) = (HashMap::<&str, usize>::new(), Vec::new());
    for Group { format, map, topic, cases } in groups() {
        let settings = settings(format, map);
        for (text, outcome) in cases {
            let payload = if is_hex(format) { bytes(text) } else { text.as_bytes().to_vec() };
            let (rows, rejected) = through_the_pipeline(&settings, topic, &payload);
            let reasons = outcome.split(' ').filter(|word| *word != "ok").collect::<Vec<_>>();
            let found = rejected.iter().map(|(reason, _)| reason.as_str()).collect::<Vec<_>>();
            if found != reasons || rows != outcome.split(' ').count() - reasons.len() {
                wrong.push(format!("{format} {text:?}: {rows} rows, {found:?}, expected {outcome}"));
            }
            // What is rejected alone is kept whole.
            let is_part = |part: &[u8]| part.is_empty() || payload.windows(part.len()).any(|window| window == part);
            assert!(rejected.iter().all(|(_, part)| is_part(part)), "{format} {text:?}");
            assert!(payload.is_empty() || rejected.iter().any(|(_, part)| !part.is_empty()), "{format} {text:?}");
            *counts.entry(format).or_default() += 1;
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(counts.len() == 8 && counts.values().all(|count| *count >= 30), "{counts:?}");
    assert!(counts.values().sum::<usize>() >= 500, "{counts:?}");
}

#[test]
fn bytes_that_are_no_text_are_rejected_whole_by_every_format_of_text() {
    let maps = [("json", EACH), ("senml", PACK), ("influx", LINES), ("csv", COLUMNS)];
    let maps = maps.into_iter().chain([("raw", "device = \"topic:0\"\nf = \"/value\"")]);
    for (format, map) in maps {
        let settings = settings(format, map);
        for poison in [&b"\xff"[..], b"1\x80", b"\xc0\x80", b"\xed\xa0\x80", b"{\"f\":1}\xf5", b"\xfe\xff\0{"] {
            let (rows, rejected) = through_the_pipeline(&settings, "t", poison);
            assert_eq!((rows, rejected), (0, vec![("not_utf8".to_owned(), poison.to_vec())]), "{format}");
        }
    }
}

/// What a payload of many bytes comes to: in good time.
fn decoded(source: &str, map: &str, topic: &str, payload: Vec<u8>) -> Vec<Result<Reading, Rejected>> {
    let mut decoder = decoder(source, map);
    let (payload, mut out) = (Bytes::from(payload), Vec::new());
    let begun = Instant::now();
    let filtered = decoder.decode(topic, &payload, ARRIVAL, &mut out);
    assert!(begun.elapsed() < LONGEST, "{source} took {:?}", begun.elapsed());
    assert!(!out.is_empty() || filtered > 0, "{source}");
    out
}

/// What the results take, beside the message.
fn taken(results: &[Result<Reading, Rejected>]) -> usize {
    let text = |value: &Option<Value>| if let Some(Value::Text(text)) = value { text.len() } else { 0 };
    let each = results.iter().map(|result| match result {
        Ok(reading) => reading.device.len() + reading.values.iter().map(text).sum::<usize>(),
        Err(rejected) => rejected.detail.len() + rejected.device.as_ref().map_or(0, String::len),
    });
    each.sum()
}

#[test]
fn what_is_nested_deep_takes_no_stack() {
    let deep = |open: &str, close: &str, levels: usize| format!("{}1{}", open.repeat(levels), close.repeat(levels));
    for levels in [10, 63, 64, 65, 127, 128, 129, 100_000] {
        for (open, close) in [("[", "]"), ("{\"t\":", "}"), ("{\"t\":[", "]}")] {
            for text in [deep(open, close, levels), open.repeat(levels)] {
                for source in ["", "readings = \"/*\"", "readings = [\"/t\", \"/t/*/x\"]"] {
                    decoded(source, EACH, "t", text.clone().into_bytes());
                }
                decoded("format = \"senml\"", PACK, "t", text.into_bytes());
            }
        }
    }
    for levels in [1, 62, 63, 64, 65, 66, 1_000, 500_000] {
        for open in [&[0x81][..], &[0xc1], &[0xa1, 0x61, 0x74], &[0x9f], &[0xbf, 0x61, 0x74]] {
            let bytes = [&open.repeat(levels)[..], &[1]].concat();
            decoded("format = \"cbor\"", EACH, "t", bytes.clone());
            decoded("format = \"cbor\"\nreadings = \"/t/*\"", "device = \"key:0\"", "t", bytes.clone());
            decoded("format = \"senml_cbor\"", PACK, "t", bytes);
        }
    }
}

#[test]
fn lines_without_an_end_are_not_read_again_and_again() {
    for line in ["m f=\"\n", "m f=\\\"\n", "m f=\"\"\n", "m\\\n", "m,x=\\ f=\"\n"] {
        decoded("format = \"influx\"", LINES, "t", line.repeat(20_000).into_bytes());
    }
    for line in ["\"x\n", "\"\"\"\n", "\"\n", ",\"\n", "\"\"x\"\n"] {
        decoded("format = \"csv\"", COLUMNS, "t", format!("d,f,i,b,t\n{}", line.repeat(20_000)).into_bytes());
    }
    decoded("format = \"csv\"", COLUMNS, "t", ",".repeat(100_000).into_bytes());
    decoded("format = \"csv\"", COLUMNS, "t", "\"".repeat(100_001).into_bytes());
}

/// One long text that each of many readings has: it may not be kept, nor read, once for each.
#[test]
fn a_long_text_of_a_message_does_not_cost_as_often_as_it_has_readings() {
    const LONG: usize = 400_000;
    const READINGS: usize = 50_000;
    let long = "7".repeat(LONG);
    let ones = vec!["1"; READINGS].join(",");
    let check = |source: &str, map: &str, payload: String, reason: &str| {
        let results = decoded(source, map, "t", payload.into_bytes());
        let last = reasons(&results).last().copied();
        assert_eq!(last.unwrap_or("filtered"), reason, "{source}");
        assert!(taken(&results) <= TEXT_BYTES_MAX + (16 << 20), "{source} takes {}", taken(&results));
    };
    let keys = format!("{{\"{long}\":[{ones}]}}");
    check("readings = \"/*\"", "device = \"topic:0\"", keys.clone(), "ok");
    check("readings = \"/*\"", "device = \"key:0\"", keys.clone(), "bad_device");
    check("readings = \"/*\"", "device = \"topic:0\"\nt = \"key:0\"", keys.clone(), "too_large");
    check(
        "readings = \"/*\"",
        "device = \"topic:0\"\nt = \"key:0\"\nb = \"/x/y\"\ni = \"key:0\"",
        keys.clone(),
        "wrong_type",
    );
    check("readings = \"/*\"\nwhen = [{ at = \"key:0\", above = 5 }]", "device = \"topic:0\"", keys, "filtered");
    let message = format!("{{\"x\":\"{long}\",\"r\":[{ones}]}}");
    let of = |map: &str| format!("device = \"topic:0\"\n{map}");
    check("readings = \"/r\"", &of("t = \"message:/x\""), message.clone(), "too_large");
    check("readings = \"/r\"", &of("ts = { at = \"message:/x\", format = \"epoch_s\" }"), message.clone(), "bad_time");
    check("readings = \"/r\"", "device = \"message:/x\"", message, "bad_device");
    let records = |base: &str| format!("[{{\"{base}\":\"{long}\"}}{}]", ",{\"v\":1}".repeat(READINGS));
    check("format = \"senml\"", PACK, records("bn"), "bad_base");
    check("format = \"senml\"", "device = \"topic:0\"\nt = \"/unit\"", records("bu"), "bad_base");
}

#[test]
fn a_long_topic_does_not_cost_as_often_as_it_has_metrics() {
    let times = (0..60_000_u64).map(|ms| {
        let mut metric = metric("f", 1, 10, Is::Double(1.0));
        metric.extend([3 << 3, 0x80 | (ms & 127) as u8, 0x80 | (ms >> 7 & 127) as u8, (ms >> 14) as u8]);
        metric
    });
    let payload = payload(Some(0), &times.collect::<Vec<_>>());
    let topic = |group: usize| format!("spBv1.0/{}/NBIRTH/n", "g".repeat(group));
    let results = decoded("format = \"sparkplug\"", BIRTHS, &topic(60_000), payload.clone());
    assert_eq!(reasons(&results), ["bad_topic"]);
    assert_eq!(decoded("format = \"sparkplug\"", BIRTHS, &topic(200), payload).len(), 60_000);
}

#[test]
fn too_many_metrics_are_rejected_whole() {
    let metrics = vec![metric("", 77, 0, Is::Null); 70_000];
    let results = decoded("format = \"sparkplug\"", BIRTHS, "spBv1.0/g/NBIRTH/n", payload(Some(1), &metrics));
    assert_eq!(reasons(&results), ["too_many"]);
}
