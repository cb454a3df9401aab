mod crash;
mod formats;

use std::collections::BTreeMap;

use arrow_array::cast::AsArray;
use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use wire::FieldType;

use super::*;
use crate::entry::Delivery;

const ARRIVAL: i64 = 1_700_000_000_000_000;

fn settings(more: &str) -> Settings {
    let text = format!(
        "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n\
         [[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\ntopics = [\"#\"]\nstream = \"s\"\n[source.map]\n\
         device = \"topic:1\"\nts = {{ at = \"/ts\", format = \"epoch_s\" }}\nv = \"/v\"\n\
         [stream.s]\nlateness = \"3s\"\nreopen_within = \"30s\"\nmax_age = \"10d\"\n\
         [stream.s.fields]\nv = {{ type = \"int64\", min = 0, max = 1000, required = true }}\n\
         [stream.s.window.10s]\nsize = \"10s\"\n{more}"
    );
    Settings::parse(&text).unwrap()
}

/// With these keys of the stream, and of its field.
fn judging(stream: &str, field: &str) -> Settings {
    judging_in(stream, field, "")
}

fn judging_in(stream: &str, field: &str, more: &str) -> Settings {
    let text = format!(
        "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n\
         [[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\ntopics = [\"#\"]\nstream = \"s\"\n[source.map]\n\
         device = \"topic:1\"\nts = {{ at = \"/ts\", format = \"epoch_s\" }}\nv = \"/v\"\n\
         [stream.s]\nlateness = \"3s\"\nreopen_within = \"30s\"\n{stream}\n\
         [stream.s.fields]\nv = {{ type = \"int64\", {field} }}\n\
         [stream.s.window.10s]\nsize = \"10s\"\n\
         [stream.s.window.hop]\nsize = \"6s\"\nevery = \"2s\"\nby = \"all\"\naggregates = [\"p99\", \"stddev\"]\n\
         [stream.s.window.visit]\ngap = \"3s\"\naggregates = [\"first\", \"p50\", \"stddev\", \"rate\"]\n\
         [stream.s.window.part]\nsize = \"8s\"\nby = [\"device\", \"v\"]\naggregates = [\"sum\", \"p99\"]\n{more}"
    );
    Settings::parse(&text).unwrap()
}

/// A reading so many seconds before the arrival, which is `passed` seconds after [`ARRIVAL`].
fn reading_of(device: &str, second: i64, v: i64, passed: i64) -> Entry {
    let mut entry = message(format!("{{\"ts\":{},\"v\":{v}}}", ARRIVAL / 1_000_000 + second));
    if let Entry::Message(message) = &mut entry {
        message.topic = format!("t/{device}");
        message.arrival_us = ARRIVAL + passed * 1_000_000;
    }
    entry
}

/// Of each row of a stream: seconds since the arrival, device, and these columns.
fn short(rows: &BTreeMap<String, Vec<String>>, stream: &str, columns: &[&str]) -> Vec<String> {
    let short = |row: &String| {
        let row = serde_json::from_str::<serde_json::Value>(row).unwrap();
        let ts = chrono::DateTime::parse_from_rfc3339(row["ts"].as_str().unwrap()).unwrap().timestamp();
        let rest = columns.iter().map(|column| row[*column].to_string().replace('"', ""));
        let first = [(ts - ARRIVAL / 1_000_000).to_string(), row["device"].as_str().unwrap().to_owned()];
        first.into_iter().chain(rest).collect::<Vec<_>>().join(" ")
    };
    rows.get(stream).map(|rows| rows.iter().map(short).collect()).unwrap_or_default()
}

fn apply_all(settings: &Settings, entries: &[Entry]) -> (BTreeMap<String, Vec<String>>, Counters) {
    let mut pipeline = start(settings);
    for (n, entry) in entries.iter().enumerate() {
        pipeline.apply(Position(n as u64), Position(n as u64 + 1), entry);
    }
    (rows(settings, &pipeline.cut().unwrap()), pipeline.counters().clone())
}

fn tick(passed: i64) -> Entry {
    Entry::Tick { now_us: ARRIVAL + passed * 1_000_000 }
}

#[test]
fn a_flagged_reading_is_stored_with_its_reasons() {
    let settings = judging("in_order = true", "max_step = 5");
    let entries = [reading_of("a", 0, 1, 0), reading_of("a", 50, 9, 0), reading_of("a", 1, 1, 0)];
    let (rows, counters) = apply_all(&settings, &entries);
    assert_eq!(short(&rows, "s", &["v", "quality"]), ["0 a 1 good", "50 a 9 step:v", "1 a 1 out_of_order,step:v,late"]);
    let totals = counters.streams[&own_name("s")];
    assert_eq!((totals.rows, totals.flagged, totals.late), (3, 2, 1));
}

#[test]
fn of_duplicates_the_first_or_the_last_is_kept_and_all_are_counted() {
    let entries = [
        reading_of("a", 0, 1, 0),
        reading_of("a", 0, 2, 2),
        reading_of("b", 0, 3, 3),
        reading_of("a", 1, 4, 4),
        tick(8),
        reading_of("a", 0, 5, 9),
        tick(12),
        tick(16),
        reading_of("a", 0, 6, 20),
    ];
    let check = |duplicates: &str, expected: &[&str], waiting: u64, duplicate: u64| {
        let (rows, counters) = apply_all(&judging(&format!("duplicates = \"{duplicates}\""), ""), &entries);
        assert_eq!(short(&rows, "s", &["v", "quality"]), expected, "{duplicates}");
        let totals = counters.sources["s"];
        assert_eq!((totals.waiting, totals.duplicate), (waiting, duplicate));
        assert_eq!(totals.read, totals.accepted + totals.quarantined + totals.duplicate + totals.waiting);
    };
    let all = ["0 a 1 good", "0 a 2 good", "0 b 3 good", "1 a 4 good", "0 a 5 good", "0 a 6 good"];
    check("all", &all, 0, 0);
    check("first", &["0 a 1 good", "0 b 3 good", "1 a 4 good"], 0, 3);
    check("last", &["0 a 5 good", "0 b 3 good", "1 a 4 good"], 1, 2);
}

#[test]
fn a_silent_device_is_absent_by_event_time_or_by_listening_and_comes_back() {
    let settings = judging("expected_every = \"4s\"", "");
    let (rows, _) = apply_all(
        &settings,
        &[
            reading_of("a", 0, 1, 0),
            reading_of("b", 0, 1, 0),
            // The watermark is at 9: more than 8 behind b.
            reading_of("a", 12, 1, 0),
            reading_of("b", 13, 1, 0),
        ],
    );
    let columns = ["state", "expected_every_s"];
    assert_eq!(short(&rows, "s_absent", &columns), ["4 b absent 4.0", "13 b back 4.0"]);
    let ticks = (1..=12).map(tick);
    let (rows, _) = apply_all(&settings, &[reading_of("a", 0, 1, 0)].into_iter().chain(ticks).collect::<Vec<_>>());
    assert_eq!(short(&rows, "s_absent", &columns), ["4 a absent 4.0"], "once");
    let (rows, _) = apply_all(&settings, &[reading_of("a", 0, 1, 0), tick(1), tick(500_000), tick(500_001)]);
    assert_eq!(short(&rows, "s_absent", &columns), [""; 0], "the agent did not run, or the clock was set");
}

#[test]
fn a_device_that_is_expected_by_name_is_absent_though_it_was_never_heard() {
    let settings = judging("expected_every = \"4s\"\nexpected_every_of = { \"x\" = \"2s\", \"y-*\" = \"2s\" }", "");
    let columns = ["state", "expected_every_s", "last_ts"];
    let run = |more: Vec<Entry>| {
        let (rows, _) = apply_all(&settings, &(1..=12).map(tick).chain(more).collect::<Vec<_>>());
        short(&rows, "s_absent", &columns)
    };
    // It was listened to from the first tick on; who `y-*` are nobody knows.
    assert_eq!(run(Vec::new()), ["6 x absent 2.0 null"]);
    assert_eq!(run(vec![reading_of("x", 12, 1, 12)])[1..], ["12 x back 2.0 2023-11-14T22:13:32+00:00"]);
}

#[test]
fn devices_that_send_in_another_interval_are_expected_in_theirs() {
    let of =
        "expected_every_of = { \"slow-*\" = \"40s\", \"slow-1*\" = \"20s\", \"*-quick\" = \"1s\", \"b\" = \"2s\" }";
    let devices = ["a", "b", "slow-2", "slow-17", "b-quick"];
    let run = |more: &str| {
        let settings = judging(&format!("expected_every = \"4s\"\n{of}\n{more}"), "");
        assert_eq!(settings.tick_every(), Some(std::time::Duration::from_secs(1)));
        let entries = devices.iter().map(|device| reading_of(device, 0, 1, 0)).chain((1..=100).map(tick));
        let (rows, _) = apply_all(&settings, &entries.collect::<Vec<_>>());
        let mut rows = short(&rows, "s_absent", &["state", "expected_every_s"]);
        rows.sort();
        rows
    };
    let all =
        ["1 b-quick absent 1.0", "2 b absent 2.0", "20 slow-17 absent 20.0", "4 a absent 4.0", "40 slow-2 absent 40.0"];
    assert_eq!(run(""), all);
    // Three times as long: 120 s of the slow ones are not over.
    assert_eq!(run("absent_after = \"12s\""), all[..4]);
    // What is owed by a device goes by its own interval.
    let settings = judging(&format!("expected_every = \"4s\"\nfill = \"last\"\n{of}"), "");
    let entries = [
        reading_of("b", 0, 1, 0),
        reading_of("b", 6, 1, 0),
        reading_of("slow-2", 0, 1, 0),
        reading_of("slow-2", 50, 1, 0),
    ];
    let (rows, _) = apply_all(&settings, &entries);
    let filled = short(&rows, "s", &["quality"]);
    let expected = ["0 b good", "2 b imputed", "4 b imputed", "6 b good", "0 slow-2 good", "50 slow-2 good"];
    assert_eq!(filled, expected);
}

#[test]
fn gaps_are_filled_with_rows_that_say_so_and_that_no_window_counts() {
    let entries =
        [reading_of("a", 0, 10, 0), reading_of("a", 10, 20, 0), reading_of("a", 13, 20, 0), reading_of("a", 99, 7, 0)];
    let check = |fill: &str, expected: &[&str], count: &str| {
        let (rows, counters) = apply_all(&judging(&format!("expected_every = \"2s\"\n{fill}"), ""), &entries);
        assert_eq!(short(&rows, "s", &["v", "quality"]), expected, "{fill}");
        assert_eq!(short(&rows, "s_10s", &["count"])[0], count, "{fill}");
        let imputed = expected.iter().filter(|row| row.ends_with("imputed")).count() as u64;
        assert_eq!((counters.streams[&own_name("s")].imputed, counters.sources["s"].read), (imputed, 4));
    };
    let line = [
        "0 a 10 good",
        "2 a 12 imputed",
        "4 a 14 imputed",
        "6 a 16 imputed",
        "8 a 18 imputed",
        "10 a 20 good",
        "13 a 20 good",
        "99 a 7 good",
    ];
    check("fill = \"linear\"", &line, "0 a 1");
    check("fill = \"linear\"\nfill_in_windows = true", &line, "0 a 5");
    let last = [
        "0 a 10 good",
        "2 a 10 imputed",
        "4 a 10 imputed",
        "10 a 20 good",
        "13 a 20 good",
        "15 a 20 imputed",
        "17 a 20 imputed",
        "99 a 7 good",
    ];
    check("fill = \"last\"\nfill_steps = 2", &last, "0 a 1");
}

fn message(payload: impl Into<Bytes>) -> Entry {
    Entry::Message(Message {
        source: "s".into(),
        topic: "t/dev".into(),
        payload: Payload::Whole(payload.into()),
        arrival_us: ARRIVAL,
        delivery: None,
    })
}

fn start(settings: &Settings) -> Pipeline {
    Pipeline::new(settings, Position(0), &BTreeMap::new())
}

/// Rows as text, by stream.
fn rows(settings: &Settings, cut: &Cut) -> BTreeMap<String, Vec<String>> {
    let mut all = BTreeMap::<String, Vec<String>>::new();
    for lane in &cut.lanes {
        for batch in &lane.batches {
            let schema = lane.schemas.iter().find(|schema| schema.id() == batch.schema).unwrap();
            let rows = batch.decode(schema).unwrap();
            let texts = quarantine::as_json(&rows).into_iter().map(|row| String::from_utf8(row).unwrap());
            all.entry(batch.stream.to_string()).or_default().extend(texts);
        }
    }
    assert_eq!(cut.lanes.len(), settings.lanes().len());
    all
}

fn one(entry: Entry) -> (BTreeMap<String, Vec<String>>, Counters) {
    let settings = settings("");
    let mut pipeline = start(&settings);
    pipeline.apply(Position(0), Position(1), &entry);
    (rows(&settings, &pipeline.cut().unwrap()), pipeline.counters().clone())
}

#[test]
fn bad_input_is_quarantined_with_its_reason_and_loses_nothing_else() {
    let second = ARRIVAL / 1_000_000;
    let check = |payload: &[u8], reasons: &[&str], good: usize| {
        let (rows, counters) = one(message(payload.to_vec()));
        let quarantine = rows.get("quarantine").cloned().unwrap_or_default();
        let reason = |row: &String| serde_json::from_str::<serde_json::Value>(row).unwrap()["reason"].clone();
        let shown = quarantine.iter().map(reason).collect::<Vec<_>>();
        assert_eq!(shown, reasons, "{}", String::from_utf8_lossy(&payload[..payload.len().min(100)]));
        assert_eq!(rows.get("s").map_or(0, Vec::len), good);
        let totals = counters.sources["s"];
        assert_eq!(totals.read, totals.accepted + totals.quarantined);
        assert_eq!((totals.accepted, totals.quarantined), (good as u64, reasons.len() as u64));
    };
    let reading = |v: &str| format!("{{\"ts\":{second},\"v\":{v}}}");
    check(reading("5").as_bytes(), &[], 1);
    check(b"{\"ts\":", &["malformed"], 0);
    check(b"\xff\xfe", &["not_utf8"], 0);
    check(reading("NaN").as_bytes(), &["malformed"], 0);
    check(reading("1e400").as_bytes(), &["malformed"], 0);
    check(reading("\"5\"").as_bytes(), &["wrong_type"], 0);
    check(reading("-1").as_bytes(), &["below_min"], 0);
    check(reading("1001").as_bytes(), &["above_max"], 0);
    check(reading("null").as_bytes(), &["missing"], 0);
    check(b"{\"ts\":0,\"v\":1}", &["before_2000"], 0);
    check(b"{\"ts\":7258118400,\"v\":1}", &["in_future"], 0);
    check(format!("{{\"ts\":{},\"v\":1}}", second - 11 * 86_400).as_bytes(), &["too_old"], 0);
    check("[".repeat(200).as_bytes(), &["malformed"], 0);
    let many = format!("[{},{},{},7]", reading("1"), reading("x"), reading("2"));
    check(many.as_bytes(), &["malformed"], 0);
    let many = format!("[{},{},{},7]", reading("1"), reading("\"x\""), reading("2"));
    check(many.as_bytes(), &["wrong_type", "no_time"], 2);
}

#[test]
fn an_oversized_payload_is_quarantined_by_its_head() {
    let mut entry = message("");
    if let Entry::Message(message) = &mut entry {
        message.payload = Payload::Oversized { head: Bytes::from_static(b"head"), len: 64 << 20, crc: 0xabcd };
    }
    let (rows, _) = one(entry);
    let row = &rows["quarantine"][0];
    assert!(row.contains("too_large") && row.contains("67108864") && row.contains("0000abcd"), "{row}");
}

/// A pipeline whose stream has four texts from one place.
fn texts(max_payload: &str) -> (Settings, Pipeline) {
    let text = format!(
        "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n\
         [journal]\nsegment_bytes = \"64MiB\"\n\
         [[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\ntopics = [\"#\"]\nstream = \"s\"\n\
         max_payload = \"{max_payload}\"\nreadings = \"/r\"\n[source.map]\ndevice = \"const:d\"\n\
         a = \"message:/x\"\nb = \"message:/x\"\nc = \"/y\"\n[stream.s.fields]\n\
         a = {{ type = \"text\" }}\nb = {{ type = \"text\" }}\nc = {{ type = \"text\" }}\n\
         [stream.s.window.10s]\nsize = \"10s\"\n"
    );
    let settings = Settings::parse(&text).unwrap();
    let pipeline = start(&settings);
    (settings, pipeline)
}

/// Text that does not get shorter.
fn noise(bytes: usize) -> String {
    let mut random = StdRng::seed_from_u64(7);
    (0..bytes).map(|_| char::from(random.random_range(b'#'..b'['))).collect()
}

#[test]
fn no_payload_makes_a_cut_that_does_not_fit() {
    let check = |max_payload: &str, payload: Vec<u8>, good: usize, bad: usize, rows: usize| {
        let (settings, mut pipeline) = texts(max_payload);
        pipeline.apply(Position(0), Position(1), &message(payload));
        let totals = pipeline.counters().sources["s"];
        assert_eq!((totals.accepted, totals.quarantined, totals.read), (good as u64, bad as u64, (good + bad) as u64));
        let cut = pipeline.cut().unwrap();
        let segment = settings.lane_segment_bytes() as usize;
        let mut seen = BTreeMap::new();
        for lane in &cut.lanes {
            let bytes = lane.batches.iter().map(|batch| batch.body.len() + 512).sum::<usize>();
            assert!(bytes < segment - (1 << 20), "{bytes} bytes in a lane of {segment}");
            for batch in &lane.batches {
                let schema = lane.schemas.iter().find(|schema| schema.id() == batch.schema).unwrap();
                batch.decode(schema).unwrap();
                *seen.entry(batch.stream.to_string()).or_default() += batch.rows as usize;
            }
        }
        let seen = |stream: &str| seen.get(stream).copied().unwrap_or(0);
        assert_eq!((seen("s"), seen("quarantine")), (good, rows));
    };
    let with = |x: &str, readings: &str| format!("{{\"x\":\"{x}\",\"r\":[{readings}]}}").into_bytes();
    let many = |readings: usize| vec!["{}"; readings].join(",");
    check("16MiB", with("x", "{}"), 1, 0, 0);
    // One long value, twice in its row.
    check("16MiB", with(&noise(8 << 20), "{}"), 1, 0, 0);
    check("16MiB", with(&"x".repeat(10 << 20), "{}"), 0, 1, 1);
    // A text of the message in each of its rows: 60,000 times 2 KiB.
    check("1MiB", with(&noise(1 << 10), &many(60_000)), 2_032, 57_968, 1);
    // 60 GB of readings.
    check("1MiB", with(&noise(500 << 10), &many(60_000)), 5, 59_995, 1);
    // What was journalled when more was allowed.
    check("1MiB", vec![b'x'; 15 << 20], 0, 1, 1);
    check("1MiB", vec![b'x'; 80 << 20], 0, 1, 1);
}

#[test]
fn a_result_of_a_window_that_is_too_long_goes_without_its_texts() {
    let (settings, mut pipeline) = texts("1MiB");
    // First and last of three texts, each of which fits.
    let payload = |x: &str, y: &str| format!("{{\"x\":\"{x}\",\"r\":[{{\"y\":\"{y}\"}}]}}").into_bytes();
    let long = noise(1_300_000);
    for (n, (x, y)) in [(long.as_str(), "y"), ("x", long.as_str()), (long.as_str(), "y")].into_iter().enumerate() {
        pipeline.apply(Position(n as u64), Position(n as u64 + 1), &message(payload(x, y)));
    }
    let mut late = message(payload("x", "y"));
    if let Entry::Message(message) = &mut late {
        message.arrival_us += 3_600_000_000;
    }
    pipeline.apply(Position(3), Position(4), &late);
    let rows = rows(&settings, &pipeline.cut().unwrap());
    let row: serde_json::Value = serde_json::from_str(&rows["s_10s"][0]).unwrap();
    assert_eq!((&row["quality"], &row["count"]), (&"too_large".into(), &3.into()));
    assert!(row["a_first"].is_null());
}

#[test]
fn a_message_of_an_unknown_source_is_kept() {
    let mut entry = message("{}");
    if let Entry::Message(message) = &mut entry {
        message.source = "gone".into();
    }
    let (rows, counters) = one(entry);
    assert!(rows["quarantine"][0].contains("unknown_source"));
    assert_eq!(counters.sources["gone"].quarantined, 1);
}

#[test]
fn a_history_of_400_days_becomes_batches_of_64_dates() {
    let mut settings = settings("");
    settings.stream.values_mut().for_each(|stream| stream.max_age = None);
    let mut pipeline = start(&settings);
    let hours = (0..9_600).map(|hour| format!("{{\"ts\":{},\"v\":1}}", 1_600_000_000 + hour * 3_600));
    let entry = message(format!("[{}]", hours.collect::<Vec<_>>().join(",")));
    pipeline.apply(Position(0), Position(1), &entry);
    let cut = pipeline.cut().unwrap();
    let batches = cut.lanes[1].batches.iter().map(|batch| batch.rows).collect::<Vec<_>>();
    assert_eq!(batches.iter().sum::<u32>(), 9_600);
    assert!(batches.len() >= 7, "{batches:?}");
}

#[test]
fn the_rows_of_a_refused_batch_go_to_quarantine_once() {
    let settings = settings("");
    let mut pipeline = start(&settings);
    pipeline.apply(Position(0), Position(1), &message(format!("{{\"ts\":{},\"v\":7}}", ARRIVAL / 1_000_000)));
    let cut = pipeline.cut().unwrap();
    let (batch, schema) = (cut.lanes[1].batches[0].clone(), cut.lanes[1].schemas[0].canonical().to_owned());
    let (spool, seq, reason) = (SpoolId([1; 16]), Seq(1), "why".to_owned());
    let entry = Entry::Refused { spool, seq, reason, schema, batch };
    pipeline.apply(Position(1), Position(2), &entry);
    pipeline.apply(Position(2), Position(3), &entry);
    let rows = rows(&settings, &pipeline.cut().unwrap());
    assert_eq!(rows["quarantine"].len(), 1);
    let row = &rows["quarantine"][0];
    assert!(row.contains(r#""reason":"refused""#) && row.contains(r#""detail":"why""#), "{row}");
    assert!(row.contains(r#"\"device\":\"dev\""#) && row.contains(r#"\"v\":7"#), "its values are kept: {row}");
}

#[test]
fn what_a_full_journal_missed_is_a_row_of_losses() {
    let (rows, counters) =
        one(Entry::Missed { source: "s".into(), messages: 7, bytes: 70, first_us: ARRIVAL, last_us: ARRIVAL + 5 });
    let row = &rows["losses"][0];
    assert!(row.contains(r#""reason":"journal_full""#) && row.contains(r#""rows":7"#), "{row}");
    assert_eq!(counters.sources["s"].missed, 7);
}

#[test]
fn the_schema_of_a_window_stream_has_what_its_rows_have() {
    let settings = settings("");
    let mut pipeline = start(&settings);
    for (n, second) in [0, 5, 20].into_iter().enumerate() {
        let entry = message(format!("{{\"ts\":{},\"v\":4}}", ARRIVAL / 1_000_000 - 100 + second));
        pipeline.apply(Position(n as u64), Position(n as u64 + 1), &entry);
    }
    let cut = pipeline.cut().unwrap();
    let batch = cut.lanes[0].batches.iter().find(|batch| batch.stream.as_str() == "s_10s").unwrap();
    let schema = cut.lanes[0].schemas.iter().find(|schema| schema.id() == batch.schema).unwrap();
    let rows = batch.decode(schema).unwrap();
    let names = schema.fields().iter().map(|field| field.name.as_str()).collect::<Vec<_>>();
    let expected =
        ["window_start", "window_end", "count", "v_min", "v_max", "v_avg", "v_sum", "v_first", "v_last", "revision"];
    assert_eq!(names, expected);
    assert_eq!(schema.fields()[5].kind, FieldType::Float64);
    let count = rows.column(4).as_primitive::<arrow_array::types::Int64Type>();
    assert_eq!(count.values().as_ref(), [2]);
}
