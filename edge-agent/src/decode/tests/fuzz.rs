//! Payloads of each format, changed at random: whatever comes, the decoder and the pipeline behind it keep their promises.
//!
//! `WEIR_FUZZ_RUNS` payloads for each format (2,000 unless set; the merge runs 100,000). The seed is printed, and
//! `WEIR_FUZZ_SEED` repeats it; what fails is made as small as it goes before it is shown. A payload with an outcome that was
//! not seen before becomes a seed itself, which leads deeper than chance. Of a payload: it is decoded twice with the same
//! result, in good time; there is a reading, a rejection or something filtered; readings have the types of their fields,
//! finite numbers and bytes within the message; reasons are known. Of the pipeline: the counters balance with each message,
//! and each cut has as many rows as were counted, in batches that read back by their schema.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use segment_log::Position;

use super::formats::bytes;
use super::poison::{is_hex, message, poison_of};
use super::sparkplug::{Is, metric, payload};
use super::*;
use crate::pipeline::Pipeline;

const RUNS: usize = 2_000;
const PAYLOAD_BYTES: usize = 4 << 10;
const SEEDS: usize = 4_000;
const RUNS_PER_CUT: usize = 256;
/// A payload of that size takes microseconds; a machine with other things to do may stand still for a while.
const LONGEST: Duration = Duration::from_secs(5);
/// Also of gateways with a wrong clock: 1970, before it, and the year 9999.
const ARRIVALS: [i64; 4] = [ARRIVAL, 0, -1, 253_402_300_799_999_999];

/// Every reason that the decoders document.
const REASONS: &[&str] = &[
    "not_utf8",
    "malformed",
    "empty",
    "too_many",
    "no_readings",
    "no_device",
    "bad_device",
    "no_time",
    "bad_time",
    "wrong_type",
    "too_large",
    "not_finite",
    "no_column",
    "wrong_columns",
    "bad_name",
    "bad_base",
    "bad_version",
    "must_understand",
    "two_values",
    "bad_topic",
    "compressed",
    "too_many_metrics",
    "unknown_alias",
];

/// What is fuzzed: a format with the mappings that lead through its code.
struct Target {
    format: &'static str,
    /// Keys of the source, and its map.
    mappings: &'static [(&'static str, &'static str)],
    topics: &'static [&'static str],
    good: Vec<Vec<u8>>,
    /// What payloads of the format are made of.
    tokens: Vec<Vec<u8>>,
}

/// A message as it is tried.
#[derive(Clone)]
struct Tried {
    topic: &'static str,
    payload: Vec<u8>,
    arrival_us: i64,
}

/// One mapping, ready.
struct Mapped {
    settings: Settings,
    pipeline: Pipeline,
    position: u64,
}

const FLAT: &str = "device = \"/d\"\nts = \"/ts\"\nf = \"/f\"\ni = \"/i\"\nb = \"/b\"\nt = \"/t\"";
const NESTED: &str = "device = \"message:/d\"\nts = { at = \"/ts\", format = \"epoch_ms\" }\nf = \"/x/0\"\ni = \"/x/1\"\nt = \"message:/t\"";
const SPREAD: &str = "device = \"key:0\"\nf = \"/f\"\ni = \"/x/y\"\nt = \"key:0\"\nb = \"message:/b\"";
const JSON_MAPPINGS: &[(&str, &str)] = &[
    ("", FLAT),
    ("readings = \"/r\"", NESTED),
    ("readings = [\"/*\", \"/r/*/x\"]", SPREAD),
    (
        "when = [{ at = \"/f\", above = 1 }, { at = \"/t\", is_not = \"no\" }]",
        "device = \"topic:0\"\nts = { at = \"/ts\", format = \"%Y-%m-%d %H:%M:%S\", zone = \"Europe/Copenhagen\" }\nf = \"/f\"\nt = \"/t\"",
    ),
];
const PACKS: &[(&str, &str)] = &[
    ("", "device = \"/name\"\nts = \"/time\"\nf = \"/value\"\nt = \"/unit\"\ni = \"/sum\""),
    ("options = { spread = \"name\" }", "device = \"/name\"\nts = \"/time\"\nf = \"/values/x\"\nb = \"/values/y\""),
    ("options = { spread = \"unit\" }", "device = \"/name\"\nts = \"/time\"\nf = \"/values/V\"\nt = \"/values/A\""),
];

fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

/// Words, and what is between words.
fn words(words: &str) -> Vec<Vec<u8>> {
    let between = [" ", "\n", "\r", "\t", "\0", "\u{feff}", "é"];
    words.split(' ').chain(between).map(|word| word.as_bytes().to_vec()).chain([vec![0xff], vec![0xc3]]).collect()
}

fn hexes(words: &str) -> Vec<Vec<u8>> {
    words.split(' ').map(bytes).collect()
}

fn json() -> Target {
    let good = texts(&[
        r#"{"d":"x","ts":"2023-11-14T00:00:00Z","f":1.5,"i":2,"b":true,"t":"é\n"}"#,
        r#"[{"d":"x","ts":"2023-11-14T00:00:00Z","f":1},{"d":7,"ts":"2023-11-14 00:00:00","f":2e3}]"#,
        r#"{"d":"x","t":"y","r":[{"ts":1700000000000,"x":[1,2]},{"ts":1700000000001,"x":[-1.5,null]}],"b":false}"#,
        r#"{"a":{"f":1,"x":{"y":3}},"b":[{"f":2},{"f":3}],"r":{"k":{"x":[{"f":1}]},"l":{"x":{"f":-0}}}}"#,
        r#"{"ts":"2023-10-29 02:30:00","f":2,"t":"\ud83d\ude00"}"#,
    ]);
    let tokens = words(
        r#"{ } [ ] , : " \ \u \ud800 null true false 1e308 1e999 -0 9223372036854775807 -9223372036854775808 18446744073709551616 "d": "ts": "f": "r": "x": {"f":1} [[ """#,
    );
    Target { format: "json", mappings: JSON_MAPPINGS, topics: &["t", ""], good, tokens }
}

fn senml() -> Target {
    let good = texts(&[
        r#"[{"bn":"a:","bt":1700000000,"bu":"V","bv":1,"n":"x","v":1.5},{"n":"y","u":"A","vb":true}]"#,
        r#"[{"bn":"urn:dev/1","n":"x","v":1},{"n":"y","t":-5,"vs":"z","ut":3},{"n":"z","vd":"aGk","s":4,"bs":1}]"#,
        r#"[{"bver":10,"bn":"a","v":1,"u":"A"},{"t":1,"v":2,"u":"V"},{"t":1,"v":3,"u":"V"}]"#,
    ]);
    let tokens = words(
        r#""bn": "bt": "bu": "bv": "bs": "bver": "n": "u": "v": "vs": "vb": "vd": "s": "t": "ut": "x_": { } [ ] , null 1e308 268435456 -1e12 9223372036854 true "x""#,
    );
    Target { format: "senml", mappings: PACKS, topics: &["t"], good, tokens }
}

const CBOR_TOKENS: &str = r#"80 81 9f a0 a1 bf ff f6 f5 f97e00 fb7ff0000000000000 1bffffffffffffffff 3bffffffffffffffff 9bffffffffffffffff bb0000000100000000 7f 5f 6164 627473 6166 6172 6178 c1 d818 20 21 22 23 00 02 06 40 60"#;

fn senml_cbor() -> Target {
    let good = [
        "82 a5 21 62613a 22 1a6553f100 23 6156 00 6178 02 f93e00 a3 00 6179 01 6141 04 f5",
        "81 a3 21 6161 02 01 08 42beef",
    ];
    let good = good.iter().map(|text| bytes(text)).collect();
    Target { format: "senml_cbor", mappings: PACKS, topics: &["t"], good, tokens: hexes(CBOR_TOKENS) }
}

fn cbor() -> Target {
    let good = [
        "a6 6164 6178 627473 74323032332d31312d31345430303a30303a30305a 6166 f93e00 6169 02 6162 f5 6174 62c3a9",
        "a3 6164 6178 6174 6179 6172 82 a2 627473 1b0000018bcfe56800 6178 82 01 02 a2 627473 1b0000018bcfe56801 6178 9f 20 f6 ff",
        "bf 6161 a2 6166 01 6178 a1 6179 03 6162 82 a1 6166 fa3fc00000 a0 ff",
        "82 a1 6164 c1 7f 6178 6179 ff a1 6164 42beef",
    ];
    let good = good.iter().map(|text| bytes(text)).collect();
    Target { format: "cbor", mappings: &JSON_MAPPINGS[..3], topics: &["t"], good, tokens: hexes(CBOR_TOKENS) }
}

fn influx() -> Target {
    const MAP: &str = "device = \"/tags/x\"\nts = \"/time\"\nf = \"/fields/f\"\ni = \"/fields/i\"\nb = \"/fields/b\"\nt = \"/fields/t\"";
    let mappings: &[(&str, &str)] =
        &[("", MAP), ("options = { precision = \"s\" }", "device = \"/measurement\"\nts = \"/time\"\nt = \"/tags/x\"")];
    let good = texts(&[
        "m,x=1 f=1.5,i=2i,b=t,t=\"é\" 1700000000000000000\n",
        "m\\,n,x=a\\ b,y=2 f=-1e3,t=\"a \\\"b\\\"\nc\" 1700000000\r\n# no line\n\nm,x=c i=7u\n",
    ]);
    let tokens =
        words(r#", = \ " # i u t FALSE nan 1e999 9223372036854775808i 18446744073709551615u -9223372036854775808 \\"#);
    Target { format: "influx", mappings, topics: &["t"], good, tokens }
}

fn csv() -> Target {
    const MAP: &str = "device = \"/d\"\nf = \"/f\"\ni = \"/i\"\nb = \"/b\"\nt = \"/t\"";
    let mappings: &[(&str, &str)] = &[
        ("", MAP),
        ("options = { delimiter = \";\", quote = \"'\", header = [\"d\", \"f\", \"i\", \"b\", \"t\", \"d\"] }", MAP),
    ];
    let good = texts(&[
        "d,f,i,b,t\na,1.5,2,true,\"x, \"\"y\"\"\nz\"\r\nb,,,,\n",
        "\u{feff}t,b,i,f,d,x\n\"é\",false,-1,1e3,c,\n",
        "a;1.5;2;true;'x;''y''';b\nc;;;;;d\n",
    ]);
    let tokens = words(r#", ; " ' "" '' d f NaN 1e999 true"#);
    Target { format: "csv", mappings, topics: &["t"], good, tokens }
}

fn raw() -> Target {
    let mappings: &[(&str, &str)] = &[
        ("", "device = \"topic:0\"\nf = \"/value\""),
        ("", "device = \"/value\"\ni = \"/value\"\nt = \"topic:1\""),
        (
            "when = [{ at = \"/value\", below = 5 }]",
            "device = \"topic:0\"\nts = { at = \"/value\", format = \"epoch_s\" }\nb = \"/value\"",
        ),
    ];
    let tokens = words(r#"1 - + . e E308 inf NaN true 0x _ 9223372036854775807"#);
    Target {
        format: "raw",
        mappings,
        topics: &["t/u", "t", ""],
        good: texts(&["21.5", " -7\n", "true", "1700000000"]),
        tokens,
    }
}

fn sparkplug() -> Target {
    const MAP: &str =
        "device = \"/id\"\nts = \"/time\"\nf = \"/metrics/f\"\ni = \"/metrics/i\"\nb = \"/metrics/b\"\nt = \"/type\"";
    let mappings: &[(&str, &str)] = &[
        ("", MAP),
        (
            "options = { metrics_max = 5 }",
            "device = \"/node\"\nts = \"/time\"\nb = \"/online\"\nt = \"/group\"\nf = \"/metrics/f\"",
        ),
    ];
    let birth = payload(
        Some(0),
        &[metric("bdSeq", 0, 8, Is::Long(4)), metric("f", 1, 10, Is::Double(1.5)), metric("i", 2, 3, Is::Int(7))],
    );
    let data = payload(
        Some(1),
        &[metric("", 1, 0, Is::Double(2.5)), metric("", 2, 0, Is::Int(u32::MAX)), metric("b", 0, 11, Is::Bool(true))],
    );
    let death = payload(None, &[metric("bdSeq", 0, 8, Is::Long(4))]);
    let tokens = hexes(
        r#"08 12 1200 18 0a0166 0a0169 1001 200a 2801 3801 5001 5801 69000000000000f03f 69000000000000f87f 7001 7a0178 ffffffffffffffffff01 820100 0a056264536571 221253504256312e305f434f4d50524553534544"#,
    );
    let topics = &[
        "spBv1.0/g/NBIRTH/n",
        "spBv1.0/g/NDATA/n",
        "spBv1.0/g/DBIRTH/n/d",
        "spBv1.0/g/DDATA/n/d",
        "spBv1.0/g/DDEATH/n/d",
        "spBv1.0/g/NDEATH/n",
        "spBv1.0/g/NCMD/n",
        "spBv1.0/STATE/h",
        "spBv1.0/g/NDATA/m",
        "other",
        "spBv1.0//NBIRTH/",
    ];
    Target { format: "sparkplug", mappings, topics, good: vec![birth, data, death], tokens }
}

impl Target {
    fn mapped(&self) -> Vec<Mapped> {
        let mapped = |(source, map): &(&str, &str)| {
            let text =
                text(&format!("format = \"{}\"\n{source}", self.format), map) + "[stream.s.window.1m]\nsize = \"1m\"\n";
            let settings = Settings::parse(&text).unwrap();
            let pipeline = Pipeline::new(&settings, Position(0), &BTreeMap::new());
            Mapped { settings, pipeline, position: 0 }
        };
        self.mappings.iter().map(mapped).collect()
    }

    fn mutated(&self, random: &mut StdRng, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut payload = seeds.choose(random).unwrap().clone();
        let most = random.random_range(1..8);
        for _ in 0..random.random_range(1..=most) {
            let len = payload.len();
            let at = random.random_range(0..=len);
            let to = random.random_range(at..=len.min(at + 64));
            match random.random_range(0..10) {
                0 | 1 => payload.splice(at..at, self.tokens.choose(random).unwrap().clone()).for_each(drop),
                2 => payload.splice(at..to, self.tokens.choose(random).unwrap().clone()).for_each(drop),
                3 => payload.insert(at, random.random()),
                4 => drop(payload.drain(at..to)),
                5 => {
                    let copy = payload[at..to].to_vec();
                    let into = random.random_range(0..=len);
                    payload.splice(into..into, copy).for_each(drop);
                }
                6 => payload.truncate(at),
                7 => {
                    let other = seeds.choose(random).unwrap();
                    let from = random.random_range(0..=other.len());
                    payload.truncate(at);
                    payload.extend_from_slice(&other[from..]);
                }
                _ if at == len => {}
                8 => payload[at] ^= 1 << random.random_range(0..8),
                _ => payload[at] = random.random(),
            }
        }
        payload.truncate(PAYLOAD_BYTES);
        payload
    }
}

/// What came of messages: by that new ones are told from known ones.
type Outcome = BTreeSet<(&'static str, usize)>;

/// What the promises say of the decoder.
fn decoded(settings: &Settings, messages: &[Tried]) -> Result<Outcome, String> {
    let stream = settings.stream.values().next().unwrap();
    let make = || Decoder::new(&settings.source[0].decoding().unwrap(), stream);
    let (mut first, mut second) = (make(), make());
    let mut outcome = Outcome::new();
    for Tried { topic, payload, arrival_us } in messages {
        let payload = Bytes::copy_from_slice(payload);
        let (mut out, mut again) = (Vec::new(), Vec::new());
        let begun = Instant::now();
        let filtered = first.decode(topic, &payload, *arrival_us, &mut out);
        let took = begun.elapsed();
        let holds =
            |holds: bool, what: &str| if holds { Ok(()) } else { Err(format!("{what}: {out:?}, {filtered} filtered")) };
        holds(took < LONGEST, &format!("it took {took:?}"))?;
        holds(!out.is_empty() || filtered > 0, "nothing came of it")?;
        holds(
            second.decode(topic, &payload, *arrival_us, &mut again) == filtered && again == out,
            "another time another result",
        )?;
        holds(first.births() == second.births() && first.take_commands() == second.take_commands(), "another state")?;
        for result in &out {
            let part = match result {
                Ok(reading) => {
                    holds(payload.get(reading.span.clone()).is_some(), "bytes outside the message")?;
                    holds(!reading.device.is_empty() && reading.device.len() <= DEVICE_BYTES_MAX, "the device's name")?;
                    holds(reading.values.len() == stream.fields.len(), "as many values as fields")?;
                    for (value, (_, field)) in reading.values.iter().zip(&stream.fields) {
                        let right = match value {
                            None => true,
                            Some(Value::Float(value)) => field.kind == FieldType::Float64 && value.is_finite(),
                            Some(Value::Int(_)) => field.kind == FieldType::Int64,
                            Some(Value::Bool(_)) => field.kind == FieldType::Bool,
                            Some(Value::Text(_)) => field.kind == FieldType::Text,
                        };
                        holds(right, "the type of a field")?;
                    }
                    "ok"
                }
                Err(rejected) => {
                    holds(REASONS.contains(&rejected.reason), "a reason that is not documented")?;
                    let within = payload.as_ptr_range();
                    let ends = rejected.payload.as_ptr_range();
                    let part = rejected.payload.is_empty() || (within.start <= ends.start && ends.end <= within.end);
                    holds(part, "its bytes are not those of the message")?;
                    rejected.reason
                }
            };
            let known = outcome.iter().filter(|(reason, _)| *reason == part).count();
            outcome.insert((part, known.min(3)));
        }
        outcome.extend((filtered > 0).then_some(("filtered", 0)));
    }
    Ok(outcome)
}

impl Mapped {
    /// What the promises say of the pipeline.
    fn piped(&mut self, messages: &[Tried], cut: bool) -> Result<(), String> {
        for Tried { topic, payload, arrival_us } in messages {
            let mut entry = message(topic, Bytes::copy_from_slice(payload));
            if let crate::entry::Entry::Message(message) = &mut entry {
                message.arrival_us = *arrival_us;
            }
            self.pipeline.apply(Position(self.position), Position(self.position + 1), &entry);
            self.position += 1;
            let totals = self.pipeline.counters().sources["s"];
            if totals.read != totals.accepted + totals.quarantined + totals.duplicate + totals.waiting + totals.filtered
                || totals.journalled != self.position
            {
                return Err(format!("the counters do not balance: {totals:?}"));
            }
        }
        if !cut {
            return Ok(());
        }
        let pending = self.pipeline.pending_rows();
        let cut = self.pipeline.cut().map_err(|error| format!("the cut failed: {error}"))?;
        let mut rows = 0;
        for lane in &cut.lanes {
            for batch in &lane.batches {
                let schema = lane
                    .schemas
                    .iter()
                    .find(|schema| schema.id() == batch.schema)
                    .ok_or("a batch without its schema")?;
                let decoded = batch.decode(schema).map_err(|error| format!("a batch of {}: {error}", batch.stream))?;
                rows += decoded.num_rows();
            }
        }
        if rows != pending { Err(format!("{rows} rows of {pending}")) } else { Ok(()) }
    }
}

/// What is wrong, a panic included.
fn caught<T>(what: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(what)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(format!(
            "panicked: {}",
            text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
        ))
    })
}

/// Fewer messages, and fewer bytes of each, that fail as well.
fn minimised(mut messages: Vec<Tried>, fails: &dyn Fn(&[Tried]) -> bool) -> Vec<Tried> {
    let mut index = 0;
    while index < messages.len() && messages.len() > 1 {
        let mut fewer = messages.clone();
        fewer.remove(index);
        if fails(&fewer) { messages = fewer } else { index += 1 }
    }
    for index in 0..messages.len() {
        let mut step = messages[index].payload.len();
        while step > 0 {
            let mut at = 0;
            while at < messages[index].payload.len() {
                let mut fewer = messages.clone();
                let end = fewer[index].payload.len().min(at + step);
                fewer[index].payload.drain(at..end);
                if fails(&fewer) { messages = fewer } else { at += step }
            }
            step /= 2;
        }
    }
    messages
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

fn fuzz(target: &Target) {
    let runs = number("WEIR_FUZZ_RUNS").map_or(RUNS, |runs| runs as usize);
    let seed = number("WEIR_FUZZ_SEED").unwrap_or_else(rand::random);
    println!("WEIR_FUZZ_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let poison =
        poison_of(target.format).map(|text| if is_hex(target.format) { bytes(text) } else { text.as_bytes().to_vec() });
    let mut seeds = target.good.iter().cloned().chain(poison).collect::<Vec<_>>();
    let mut mapped = target.mapped();
    let mut seen = HashSet::new();
    for run in 0..runs {
        let which = random.random_range(0..mapped.len());
        let several = if target.format == "sparkplug" { random.random_range(1..4) } else { 1 };
        let messages = (0..several).map(|_| Tried {
            topic: target.topics.choose(&mut random).unwrap(),
            payload: target.mutated(&mut random, &seeds),
            arrival_us: if random.random_ratio(7, 8) { ARRIVAL } else { *ARRIVALS.choose(&mut random).unwrap() },
        });
        let messages = messages.collect::<Vec<_>>();
        let mapped = &mut mapped[which];
        let failed = match caught(|| decoded(&mapped.settings, &messages)) {
            Ok(outcome) => {
                if seeds.len() < SEEDS && seen.insert((which, outcome)) {
                    seeds.extend(messages.iter().map(|message| message.payload.clone()));
                }
                caught(|| mapped.piped(&messages, run % RUNS_PER_CUT == 0)).err()
            }
            Err(wrong) => Some(wrong),
        };
        if let Some(wrong) = failed {
            let fails = |messages: &[Tried]| {
                let mut fresh = target.mapped().swap_remove(which);
                caught(|| decoded(&fresh.settings, messages)).is_err()
                    || caught(|| fresh.piped(messages, true)).is_err()
            };
            let shown = minimised(messages, &fails).into_iter().map(|Tried { topic, payload, arrival_us }| {
                let hex = payload.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
                format!("{topic} at {arrival_us}: {hex} {:?}", String::from_utf8_lossy(&payload))
            });
            let shown = shown.collect::<Vec<_>>().join("\n");
            panic!("run {run} of WEIR_FUZZ_SEED={seed}, mapping {which}: {wrong}\n{shown}");
        }
    }
    mapped.iter_mut().for_each(|mapped| mapped.piped(&[], true).unwrap());
    println!("{} runs, {} outcomes", runs, seen.len());
    // A mutation that changes nothing, or everything, would find only a few.
    assert!(runs < RUNS || seen.len() >= 10, "only {} outcomes", seen.len());
}

#[test]
fn json_holds() {
    fuzz(&json());
}

#[test]
fn senml_holds() {
    fuzz(&senml());
}

#[test]
fn senml_cbor_holds() {
    fuzz(&senml_cbor());
}

#[test]
fn cbor_holds() {
    fuzz(&cbor());
}

#[test]
fn influx_holds() {
    fuzz(&influx());
}

#[test]
fn csv_holds() {
    fuzz(&csv());
}

#[test]
fn raw_holds() {
    fuzz(&raw());
}

#[test]
fn sparkplug_holds() {
    fuzz(&sparkplug());
}
