use bytes::Bytes;

use super::*;
use crate::config::Settings;
use crate::decode::Decoder;

const DAY_US: i64 = 86_400_000_000;

fn settings(stream: &str, fields: &str) -> Settings {
    let text = format!(
        "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n\
         [[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\ntopics = [\"t\"]\nstream = \"s\"\n\
         [source.map]\ndevice = \"const:d\"\nts = \"/t\"\nv = \"/v\"\n\
         [stream.s]\n{stream}\n[stream.s.fields]\nv = {{ {fields} }}\n"
    );
    Settings::parse(&text).unwrap()
}

fn checks(stream: &str, fields: &str) -> Checks {
    Checks::new(settings(stream, fields).stream.values().next().unwrap())
}

fn us(text: &str) -> i64 {
    chrono::DateTime::parse_from_rfc3339(text).unwrap().timestamp_micros()
}

/// The reason that a value is rejected for.
fn of_value(fields: &str, value: Option<Value>) -> Result<(), &'static str> {
    let now = us("2026-01-01T00:00:00Z");
    let reading = Reading { ts: now, device: "d".to_owned(), values: vec![value], untyped: Vec::new(), span: 0..0 };
    checks("", fields).check(&reading, now, &mut Quality::default()).map_err(|(reason, _)| reason)
}

#[test]
fn a_float_passes_at_its_limits_and_not_beyond() {
    let check = |fields: &str, value: f64, expected| {
        let fields = format!("type = \"float64\", {fields}");
        assert_eq!(of_value(&fields, Some(Value::Float(value))), expected, "{fields}: {value}");
    };
    let (below, above) = (Err("below_min"), Err("above_max"));
    check("min = 0, max = 200", 0.0, Ok(()));
    check("min = 0, max = 200", 200.0, Ok(()));
    check("min = 0, max = 200", -5e-324, below);
    check("min = 0, max = 200", 200.0_f64.next_up(), above);
    check("min = 0.1", 0.1, Ok(()));
    check("min = 0.1", 0.1_f64.next_down(), below);
    check("min = 0", -0.0, Ok(()));
    check("min = -0.0", 0.0, Ok(()));
    check("min = -0.0", -0.0, Ok(()));
    check("min = -0.0", -1e-300, below);
    check("max = -0.0", 0.0, Ok(()));
    check("min = 0", f64::INFINITY, Ok(()));
    check("max = 200", f64::INFINITY, above);
    check("min = 0", f64::NEG_INFINITY, below);
    check("min = 0", f64::NAN, below);
    check("max = 0", f64::NAN, above);
    check("required = true", f64::NAN, Ok(()));
    check("min = -inf, max = inf", f64::MAX, Ok(()));
    check("max = 9007199254740993", 9_007_199_254_740_994.0, above);
}

#[test]
fn an_int_is_compared_exactly() {
    let check = |fields: &str, value: i64, expected| {
        let fields = format!("type = \"int64\", {fields}");
        assert_eq!(of_value(&fields, Some(Value::Int(value))), expected, "{fields}: {value}");
    };
    let (below, above) = (Err("below_min"), Err("above_max"));
    check("min = 3, max = 3", 3, Ok(()));
    check("min = 3, max = 3", 2, below);
    check("min = 3, max = 3", 4, above);
    check("min = 9007199254740993", 9_007_199_254_740_993, Ok(()));
    check("min = 9007199254740993", 9_007_199_254_740_992, below);
    check("max = 9007199254740993", 9_007_199_254_740_994, above);
    check("max = 9223372036854775806", i64::MAX, above);
    check("max = 9223372036854775807", i64::MAX, Ok(()));
    check("min = -9223372036854775808", i64::MIN, Ok(()));
    check("min = -9223372036854775807", i64::MIN, below);
    check("max = 9.223372036854776e18", i64::MAX, Ok(()));
    check("min = 9.223372036854776e18", i64::MAX, below);
    check("min = -0.0", 0, Ok(()));
    check("min = -0.0", -1, below);
    check("min = 0.5", 0, below);
    check("min = 0.5", 1, Ok(()));
    check("max = 1e3", 1_000, Ok(()));
    check("max = 1e3", 1_001, above);
    check("min = -inf, max = inf", i64::MIN, Ok(()));
}

#[test]
fn what_is_required_must_be_there_and_the_rest_need_not() {
    let payload = |payload: &str, fields: &str| {
        let settings = settings("", fields);
        let decoding = settings.source[0].decoding().unwrap();
        let stream = settings.stream.values().next().unwrap();
        let mut out = Vec::new();
        let payload = Bytes::copy_from_slice(payload.as_bytes());
        let now = us("2026-01-01T00:00:00Z");
        Decoder::new(&decoding, stream).decode("t", &payload, now, &mut out);
        match out.pop().unwrap() {
            Ok(reading) => {
                Checks::new(stream).check(&reading, now, &mut Quality::default()).map_err(|(reason, _)| reason)
            }
            Err(rejected) => Err(rejected.reason),
        }
    };
    let check = |rest: &str, fields: &str, expected| {
        let text = format!("{{\"t\":\"2026-01-01T00:00:00Z\"{rest}}}");
        assert_eq!(payload(&text, fields), expected, "{rest} {fields}");
    };
    let required = "type = \"int64\", required = true, min = 1";
    let free = "type = \"int64\", min = 1";
    check("", required, Err("missing"));
    check(",\"v\":null", required, Err("missing"));
    check("", free, Ok(()));
    check(",\"v\":null", free, Ok(()));
    check(",\"v\":1", required, Ok(()));
    check(",\"v\":0", required, Err("below_min"));
    check(",\"v\":\"1\"", required, Err("wrong_type"));
    check(",\"v\":1.5", required, Err("wrong_type"));
    check(",\"v\":9223372036854775808", required, Err("wrong_type"));
    check(",\"v\":true", free, Err("wrong_type"));
    check(",\"v\":[1]", free, Err("wrong_type"));
    check(",\"v\":\"\"", "type = \"text\", required = true", Ok(()));
    check(",\"v\":false", "type = \"bool\", required = true", Ok(()));
}

#[test]
fn limits_are_in_the_unit_that_is_kept() {
    let check = |value: f64, expected: Result<f64, &'static str>| {
        let fields = "type = \"float64\", unit = \"°F\", store_unit = \"°C\", min = 0, max = 100";
        let checks = checks("", fields);
        let now = us("2026-01-01T00:00:00Z");
        let value = Some(Value::Float(value));
        let mut reading =
            Reading { ts: now, device: "d".to_owned(), values: vec![value], untyped: Vec::new(), span: 0..0 };
        let result = checks.convert(&mut reading).and_then(|()| checks.check(&reading, now, &mut Quality::default()));
        let result = result.map(|()| match reading.values[0] {
            Some(Value::Float(value)) => value,
            _ => panic!(),
        });
        assert_eq!(result.map_err(|(reason, _)| reason), expected);
    };
    check(32.0, Ok(0.0));
    check(212.0, Ok(100.0));
    check(31.9, Err("below_min"));
    check(f64::MAX, Err("not_finite"));
}

#[test]
fn event_times_pass_at_their_limits_and_not_beyond() {
    let now = us("2026-03-01T12:00:00Z");
    let check = |stream: &str, ts: i64, expected: Result<(), &'static str>| {
        let reading = Reading { ts, device: "d".to_owned(), values: vec![None], untyped: Vec::new(), span: 0..0 };
        let result = checks(stream, "type = \"int64\"").check(&reading, now, &mut Quality::default());
        assert_eq!(result.map_err(|(reason, _)| reason), expected, "{stream} {ts}");
    };
    check("", us("1999-12-31T23:59:59.999999Z"), Err("before_2000"));
    check("", us("2000-01-01T00:00:00Z"), Ok(()));
    check("", i64::MIN, Err("before_2000"));
    check("", now + DAY_US, Ok(()));
    check("", now + DAY_US + 1, Err("in_future"));
    check("", i64::MAX, Err("in_future"));
    check("max_age = \"1h\"", now - DAY_US / 24, Ok(()));
    check("max_age = \"1h\"", now - DAY_US / 24 - 1, Err("too_old"));
    check("max_age = \"1h\"", now + DAY_US, Ok(()));
    check("max_age = \"0s\"", now, Ok(()));
    check("max_age = \"36500d\"", us("1999-12-31T23:59:59.999999Z"), Err("before_2000"));
}

/// The stream `s` with these keys and fields, and what a row of readings comes to: quality, or the reason in brackets.
fn judged(stream: &str, fields: &str, rows: &[(f64, &str, Option<f64>)]) -> Vec<String> {
    let settings = settings(stream, fields);
    let mut judge = Judge::new(settings.stream.values().next().unwrap());
    let mut quality = Quality::default();
    let begin = us("2026-01-01T00:00:00Z");
    let one = |(second, device, value): &(f64, &str, Option<f64>)| {
        let ts = begin + (second * 1e6) as i64;
        let mut reading = Reading {
            ts,
            device: (*device).to_owned(),
            values: vec![value.map(Value::Float)],
            untyped: Vec::new(),
            span: 0..0,
        };
        match judge.judge(&mut reading, begin, 0, i64::MIN, &mut quality) {
            Ok(Outcome::Repeat) => "repeat".to_owned(),
            Ok(Outcome::Keep { .. }) => quality.as_str().to_owned(),
            Err((reason, _)) => format!("[{reason}]"),
        }
    };
    rows.iter().map(one).collect()
}

#[test]
fn each_check_flags_or_rejects_as_it_is_told() {
    let check = |stream: &str, fields: &str, rows: &[(f64, &str, Option<f64>)], expected: &[&str]| {
        assert_eq!(judged(stream, &format!("type = \"float64\", {fields}"), rows), expected, "{stream} {fields}");
    };
    let some =
        |values: &[f64]| values.iter().enumerate().map(|(n, value)| (n as f64, "d", Some(*value))).collect::<Vec<_>>();
    check("", "min = 0, flag = [\"min\"]", &some(&[-1.0, 0.0]), &["below_min:v", ""]);
    check("", "max = 0, flag = [\"max\"]", &some(&[1.0]), &["above_max:v"]);
    check("", "required = true, flag = [\"required\"]", &[(0.0, "d", None)], &["missing:v"]);
    check("", "allowed = [1, 2.5]", &some(&[1.0, 2.5, 2.0]), &["", "", "not_allowed:v"]);
    check("", "allowed = [1], reject = [\"allowed\"]", &some(&[1.0, 2.0]), &["", "[not_allowed]"]);
    check("", "max_step = 2", &some(&[1.0, 3.0, 5.5, 5.5]), &["", "", "step:v", ""]);
    check("", "max_step = 2, reject = [\"max_step\"]", &some(&[1.0, 9.0, 9.5]), &["", "[step]", ""]);
    check("", "max_step = 2, max = 8, flag = [\"max\"]", &some(&[1.0, 9.0]), &["", "above_max:v,step:v"]);
    check("", "stuck_after = \"2s\"", &some(&[1.0, 1.0, 1.0, 1.0, 2.0]), &["", "", "stuck:v", "stuck:v", ""]);
    let stuck = "stuck_after = \"2s\", reject = [\"stuck_after\"]";
    check("", stuck, &some(&[1.0, 1.0, 1.0, 1.0, 2.0]), &["", "", "[stuck]", "[stuck]", ""]);
    check("max_future = \"1s\"", "", &some(&[1.0, 1.0, 1.0]), &["", "", "in_future"]);
    check("max_future = \"1s\"\nreject = [\"max_future\"]", "", &some(&[1.0, 1.0, 1.0]), &["", "", "[in_future]"]);
    check("max_age = \"1s\"", "", &[(-2.0, "d", None)], &["[too_old]"]);
    check("max_age = \"1s\"\nflag = [\"max_age\"]", "", &[(-2.0, "d", None)], &["too_old"]);
    let disorder = [(5.0, "d", None), (4.0, "d", None), (1.0, "e", None), (5.0, "d", None), (3.0, "d", None)];
    check("in_order = true", "", &disorder, &["", "out_of_order", "", "", "out_of_order"]);
    let rejected = ["", "[out_of_order]", "", "", "[out_of_order]"];
    check("in_order = true\nreject = [\"in_order\"]", "", &disorder, &rejected);
    let repeats = [(1.0, "d", None), (1.0, "e", None), (2.0, "d", None), (1.0, "d", None), (2.0, "d", None)];
    check("duplicates = \"first\"", "", &repeats, &["", "", "", "repeat", "repeat"]);
    check("duplicates = \"all\"", "", &repeats, &["", "", "", "", ""]);
    check("duplicates = \"first\"\nremember = 1", "", &repeats, &["", "", "", "", "repeat"]);
}

#[test]
fn a_step_is_between_neighbours_by_event_time() {
    let fields = "type = \"float64\", max_step = 2";
    let rows = [
        (0.0, "d", Some(0.0)),
        (10.0, "d", Some(10.0)),
        (0.0, "e", Some(50.0)),
        // Between 0 and 10 s: two steps of 5; beside the newest, and in front of all.
        (5.0, "d", Some(5.0)),
        (9.0, "d", Some(9.0)),
        (-1.0, "d", Some(1.0)),
        (-2.0, "d", Some(8.0)),
        (11.0, "d", None),
        (12.0, "d", Some(11.0)),
    ];
    assert_eq!(judged("", fields, &rows), ["", "step:v", "", "step:v", "step:v", "", "step:v", "", ""]);
}

#[test]
fn what_is_late_neither_begins_nor_ends_being_stuck() {
    let fields = "type = \"float64\", stuck_after = \"10s\"";
    let rows =
        [(0.0, "d", Some(1.0)), (6.0, "d", Some(1.0)), (3.0, "d", Some(2.0)), (8.0, "d", None), (10.0, "d", Some(1.0))];
    assert_eq!(judged("", fields, &rows), ["", "", "", "", "stuck:v"]);
}

#[test]
fn the_device_that_was_silent_longest_is_forgotten() {
    let devices = ["a", "b", "c", "d"].map(|device| (1.0, device, None));
    let rows = devices.into_iter().chain([(1.0, "a", None), (1.0, "e", None), (1.0, "a", None), (1.0, "b", None)]);
    let judged = judged("duplicates = \"first\"\ndevices_max = 4", "type = \"float64\"", &rows.collect::<Vec<_>>());
    // `b` and `c` were silent longest when `e` came.
    assert_eq!(judged, ["", "", "", "", "repeat", "", "repeat", ""]);
}

#[test]
fn a_state_that_is_cut_short_is_not_taken() {
    let settings = settings(
        "duplicates = \"last\"\nexpected_every = \"1s\"\nfill = \"linear\"",
        "type = \"float64\", max_step = 1, stuck_after = \"1s\"",
    );
    let stream = settings.stream.values().next().unwrap();
    let mut judge = Judge::new(stream);
    let ts = us("2026-01-01T00:00:00Z");
    for step in 0..3 {
        let value = Some(Value::Float(f64::from(step)));
        let ts = ts + i64::from(step);
        let mut reading = Reading { ts, device: "d".to_owned(), values: vec![value], untyped: Vec::new(), span: 0..0 };
        judge.judge(&mut reading, ts, 7, 0, &mut Quality::default()).unwrap();
        judge.hold.as_mut().unwrap().put(Held { source: "s".into(), reading, quality: "x".into() }, 7);
    }
    let mut bytes = Vec::new();
    judge.write(&mut bytes);
    for cut in 0..bytes.len() {
        let part = bytes::Bytes::copy_from_slice(&bytes[..cut]);
        assert_eq!(Judge::new(stream).restore(&part), Err(StateError), "{cut}");
    }
    let mut again = Judge::new(stream);
    again.restore(&bytes::Bytes::from(bytes.clone())).unwrap();
    let mut twice = Vec::new();
    again.write(&mut twice);
    assert_eq!(twice, bytes);
}
