mod formats;
mod fuzz;
mod poison;
mod senml;
mod shipped;
pub(crate) mod sparkplug;

use super::*;
use crate::config::Settings;

/// Data sets that are no part of the repository: where `WEIR_SHARED_DATA` says, or beside it. None, and a word about it,
/// where there are none.
pub(crate) fn shared_data() -> Option<std::path::PathBuf> {
    let beside = || std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    match std::env::var_os("WEIR_SHARED_DATA") {
        // Who says where it is wants it to be looked at.
        Some(path) => Some(path.into()),
        None => Some(beside()).filter(|path| path.is_dir()).or_else(|| {
            println!("left out: no shared data; WEIR_SHARED_DATA says where they are");
            None
        }),
    }
}

const ARRIVAL: i64 = 1_700_000_000_000_000;

fn text(source: &str, map: &str) -> String {
    format!(
        "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n\
         [[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\ntopics = [\"#\"]\nstream = \"s\"\n{source}\n[source.map]\n{map}\n\
         [stream.s.fields]\nf = {{ type = \"float64\" }}\ni = {{ type = \"int64\" }}\nb = {{ type = \"bool\" }}\n\
         t = {{ type = \"text\" }}\n"
    )
}

fn decoder(source: &str, map: &str) -> Decoder {
    let settings = Settings::parse(&text(source, map)).unwrap();
    Decoder::new(&settings.source[0].decoding().unwrap(), settings.stream.values().next().unwrap())
}

#[test]
fn a_value_of_another_type_is_null_and_flagged_where_that_is_configured() {
    let text = text("", FLAT).replace("f = { type = \"float64\" }", "f = { type = \"float64\", flag = [\"type\"] }");
    let text = text.replace("i = { type = \"int64\" }", "i = { type = \"int64\", required = true, flag = [\"type\"] }");
    let settings = Settings::parse(&text).unwrap();
    let mut decoder = Decoder::new(&settings.source[0].decoding().unwrap(), settings.stream.values().next().unwrap());
    let mut judge = crate::validate::Judge::new(settings.stream.values().next().unwrap());
    let mut check = |json: &str, expected: &str| {
        let mut found = decode(&mut decoder, format!("{{\"d\":\"x\",{json}}}").as_bytes());
        let mut quality = crate::validate::Quality::default();
        let text = match found.remove(0) {
            Err(rejected) => rejected.reason.to_owned(),
            Ok(mut reading) => match judge.judge(&mut reading, ARRIVAL, 0, i64::MIN, &mut quality) {
                Err((reason, _)) => reason.to_owned(),
                Ok(_) => format!("{} {}", formats::show(&Ok(reading)), quality.as_str()),
            },
        };
        assert_eq!(text, expected, "{json}");
    };
    check(r#""f":1.5,"i":1"#, "x +0 1.5 1 - - ");
    check(r#""f":"1.5","i":1,"t":"a""#, "x +0 - 1 - a type:f");
    check(r#""f":true,"i":"one""#, "x +0 - - - - type:f,type:i");
    check(r#""f":"1.5","i":null"#, "missing");
    check(r#""i":1,"b":"on""#, "wrong_type");
    check(r#""i":1,"f":1e300,"b":1"#, "wrong_type");
}

/// A number that is not finite is no value of its type.
#[test]
fn a_number_that_is_not_finite_is_null_and_flagged_where_that_is_configured() {
    let senml = "device = \"/name\"\nf = \"/value\"";
    let sparkplug = "device = \"/id\"\nf = \"/metrics/Temp\"";
    // Floats of two bytes: NaN and infinity.
    let cbor = |float: [u8; 2]| [b"\xa2\x61d\x61x\x61f\xf9", &float[..]].concat();
    let pack = |float: [u8; 2]| [b"\x81\xa2\x00\x61x\x02\xf9", &float[..]].concat();
    let metric =
        |value: f64| sparkplug::payload(Some(0), &[sparkplug::metric("Temp", 1, 10, sparkplug::Is::Double(value))]);
    let cases = [
        ("format = \"cbor\"", FLAT, "t", cbor([0x7e, 0])),
        ("format = \"cbor\"", FLAT, "t", cbor([0x7c, 0])),
        ("format = \"senml_cbor\"", senml, "t", pack([0x7e, 0])),
        ("format = \"sparkplug\"", sparkplug, "spBv1.0/g/NBIRTH/n", metric(f64::NAN)),
        ("format = \"raw\"", "device = \"const:x\"\nf = \"/value\"", "t", b"inf".to_vec()),
    ];
    for (source, map, topic, payload) in cases {
        for flag in [false, true] {
            let text = text(source, map);
            let text = if flag {
                text.replace("f = { type = \"float64\" }", "f = { type = \"float64\", flag = [\"type\"] }")
            } else {
                text
            };
            let settings = Settings::parse(&text).unwrap();
            let decoding = settings.source[0].decoding().unwrap();
            let mut decoder = Decoder::new(&decoding, settings.stream.values().next().unwrap());
            let mut found = Vec::new();
            decoder.decode(topic, &Bytes::copy_from_slice(&payload), ARRIVAL, &mut found);
            let of = format!("{source} {flag}: {found:?}");
            assert_eq!(found.len(), 1, "{of}");
            match (&found[0], flag) {
                (Ok(reading), true) => {
                    assert_eq!((&reading.values[0], &reading.untyped[..]), (&None, &[0][..]), "{of}")
                }
                (Err(rejected), false) => {
                    assert!(matches!(rejected.reason, "not_finite" | "wrong_type"), "{of}");
                }
                _ => panic!("{of}"),
            }
        }
    }
}

fn decode(decoder: &mut Decoder, payload: &[u8]) -> Vec<Result<Reading, Rejected>> {
    let mut out = Vec::new();
    decoder.decode("city/traffic/d7", &Bytes::copy_from_slice(payload), ARRIVAL, &mut out);
    out
}

const FLAT: &str = "device = \"/d\"\nf = \"/f\"\ni = \"/i\"\nb = \"/b\"\nt = \"/t\"";

fn reasons(results: &[Result<Reading, Rejected>]) -> Vec<&str> {
    results.iter().map(|result| result.as_ref().map_or_else(|rejected| rejected.reason, |_| "ok")).collect()
}

#[test]
fn values_have_the_type_of_their_field_or_the_reading_is_rejected() {
    let mut decoder = decoder("", FLAT);
    let mut check = |json: &str, expected: Result<[Option<Value>; 4], &str>| {
        let results = decode(&mut decoder, format!("{{\"d\":\"x\",{json}}}").as_bytes());
        let [result] = results.as_slice() else { panic!("{results:?}") };
        match expected {
            Ok(values) => assert_eq!(result.as_ref().unwrap().values, values, "{json}"),
            Err(reason) => assert_eq!(result.as_ref().unwrap_err().reason, reason, "{json} {result:?}"),
        }
    };
    let float = |value| Ok([Some(Value::Float(value)), None, None, None]);
    let int = |value| Ok([None, Some(Value::Int(value)), None, None]);
    check(r#""f":1.5"#, float(1.5));
    check(r#""f":2"#, float(2.0));
    check(r#""f":18446744073709551615"#, float(18_446_744_073_709_551_615.0));
    check(r#""f":null"#, Ok([None, None, None, None]));
    check(r#""x":1"#, Ok([None, None, None, None]));
    check(r#""f":93.33561522131723"#, float("93.33561522131723".parse().unwrap()));
    check(r#""f":-0"#, float(-0.0));
    check(r#""f":"1.5""#, Err("wrong_type"));
    check(r#""f":true"#, Err("wrong_type"));
    check(r#""f":{"x":1}"#, Err("wrong_type"));
    check(r#""f":[1]"#, Err("wrong_type"));
    check(r#""i":9007199254740993"#, int(9_007_199_254_740_993));
    check(r#""i":-9223372036854775808"#, int(i64::MIN));
    check(r#""i":9223372036854775808"#, Err("wrong_type"));
    check(r#""i":3.0"#, int(3));
    check(r#""i":3.5"#, Err("wrong_type"));
    check(r#""i":1e300"#, Err("wrong_type"));
    check(r#""b":true"#, Ok([None, None, Some(Value::Bool(true)), None]));
    check(r#""b":1"#, Err("wrong_type"));
    check(r#""t":"a\u00e9\n""#, Ok([None, None, None, Some(Value::Text("aé\n".into()))]));
    check(r#""t":5"#, Err("wrong_type"));
    check(r#""f":1,"f":2"#, float(2.0));
    check(r#""f":1,"f":null"#, Ok([None, None, None, None]));
    check(r#""f":1e400"#, Err("malformed"));
    check(r#""f":NaN"#, Err("malformed"));
    check(r#""f":Infinity"#, Err("malformed"));
    check(r#""f":-inf"#, Err("malformed"));
}

#[test]
fn what_is_no_message_is_rejected_once_with_its_bytes() {
    let mut decoder = decoder("", FLAT);
    let mut check = |payload: &[u8], reason: &str| {
        let results = decode(&mut decoder, payload);
        assert_eq!(reasons(&results), [reason], "{}", String::from_utf8_lossy(payload));
        assert_eq!(results[0].as_ref().unwrap_err().payload, payload);
    };
    check(b"", "malformed");
    check(b"{", "malformed");
    check(b"{\"d\":\"x\"", "malformed");
    check(b"{\"d\":\"x\"} trailing", "malformed");
    check(b"{'d':'x'}", "malformed");
    check(b"{\"d\":\"\xff\"}", "not_utf8");
    check(b"[]", "empty");
    check(b"5", "no_device");
    check(b"\"text\"", "no_device");
    check(b"null", "no_device");
    check(b"{}", "no_device");
    check("[".repeat(200).as_bytes(), "malformed");
    check(format!("{{\"d\":{}}}", "{\"a\":".repeat(200)).as_bytes(), "malformed");
    let many = format!("[{}]", vec!["1"; READINGS_MAX + 1].join(","));
    check(many.as_bytes(), "too_many");
    let deep = format!("{{\"d\":\"x\",\"f\":{}1{}}}", "[".repeat(200), "]".repeat(200));
    assert_eq!(reasons(&decode(&mut decoder, deep.as_bytes())), ["wrong_type"]);
}

#[test]
fn one_bad_reading_never_rejects_its_neighbours() {
    let mut decoder = decoder("", FLAT);
    let payload = br#" [ {"d":"a","i":1}, {"d":"b","i":"x"} ,7, {"i":1}, {"d":"c","i":3} ]"#;
    let results = decode(&mut decoder, payload);
    assert_eq!(reasons(&results), ["ok", "wrong_type", "no_device", "no_device", "ok"]);
    let rejected = results[1].as_ref().unwrap_err();
    assert_eq!(
        (rejected.payload.as_ref(), rejected.device.as_deref()),
        (br#"{"d":"b","i":"x"}"#.as_slice(), Some("b"))
    );
    let reading = results[4].as_ref().unwrap();
    assert_eq!(&payload[reading.span.clone()], br#"{"d":"c","i":3}"#);
}

#[test]
fn readings_may_lie_within_a_message_with_values_of_its_own() {
    let map = "device = \"message:/gateway/id\"\nts = { at = \"message:/at\", format = \"epoch_ms\" }\nt = \"/name\"\n\
               f = \"/values/1\"\ni = \"topic:3\"\nb = \"const:true\"";
    let mut decoder = decoder("readings = \"/data/list\"", map);
    let payload = br#"{"at":1500,"data":{"list":[{"name":"x","values":[1,2.5]},{"name":"y"}]},"gateway":{"id":17}}"#;
    let mut out = Vec::new();
    decoder.decode("a/b/c/42", &Bytes::from_static(payload), ARRIVAL, &mut out);
    let reading = out[0].as_ref().unwrap();
    assert_eq!((reading.ts, reading.device.as_str()), (1_500_000, "17"));
    let text = |text: &str| Some(Value::Text(text.into()));
    assert_eq!(reading.values, [Some(Value::Float(2.5)), Some(Value::Int(42)), Some(Value::Bool(true)), text("x")]);
    assert_eq!(out[1].as_ref().unwrap().values[0], None);
    out.clear();
    decoder.decode("a/b/c/x", &Bytes::from_static(payload), ARRIVAL, &mut out);
    assert_eq!(reasons(&out), ["wrong_type", "wrong_type"]);
    assert_eq!(reasons(&decode(&mut decoder, br#"{"data":{"list":5}}"#)), ["no_readings"]);
    assert_eq!(reasons(&decode(&mut decoder, br#"{"data":5}"#)), ["no_readings"]);
    assert_eq!(
        reasons(&decode(&mut decoder, br#"{"data":{"list":[{"name":"x"}]},"data":5}"#)),
        ["no_readings"],
        "the last counts"
    );
}

#[test]
fn devices_have_names_that_topics_and_people_can_bear() {
    let mut decoder = decoder("", "device = \"/d\"");
    let mut check = |json: &str, expected: Result<&str, &str>| {
        let results = decode(&mut decoder, format!("{{\"d\":{json}}}").as_bytes());
        let device = results[0].as_ref().map(|reading| reading.device.as_str()).map_err(|rejected| rejected.reason);
        assert_eq!(device, expected, "{json}");
    };
    check("\"158536\"", Ok("158536"));
    check("158536", Ok("158536"));
    check("\"straße/7\"", Ok("straße/7"));
    check("1.5", Err("bad_device"));
    check("true", Err("bad_device"));
    check("\"\"", Err("bad_device"));
    check("\"a+\"", Err("bad_device"));
    check("\"#\"", Err("bad_device"));
    check("\"a\\u0000\"", Err("bad_device"));
    check("\"a\\u0085\"", Err("bad_device"));
    check(&format!("\"{}\"", "x".repeat(257)), Err("bad_device"));
}

#[test]
fn times_are_read_as_they_are_written() {
    let check = |format: &str, json: &str, expected: Result<&str, &str>| {
        let place = if format.is_empty() { "\"/ts\"".to_owned() } else { format!("{{ at = \"/ts\", {format} }}") };
        let mut decoder = decoder("", &format!("device = \"topic:2\"\nts = {place}"));
        let results = decode(&mut decoder, format!("{{\"ts\":{json}}}").as_bytes());
        let time = results[0].as_ref().map_err(|rejected| rejected.reason).map(|reading| {
            chrono::DateTime::from_timestamp_micros(reading.ts).unwrap().format("%FT%T%.fZ").to_string()
        });
        assert_eq!(time.as_deref().map_err(|reason| *reason), expected, "{format} {json}");
    };
    check("", "\"2014-08-01T07:50:00Z\"", Ok("2014-08-01T07:50:00Z"));
    check("", "\"2014-08-01 07:50:00.1234567+02:00\"", Ok("2014-08-01T05:50:00.123456Z"));
    check("", "\"2014-08-01T07:50:00\"", Err("bad_time"));
    check("", "1406879400", Err("bad_time"));
    check("", "null", Err("no_time"));
    check("format = \"epoch_s\"", "1406879400", Ok("2014-08-01T07:50:00Z"));
    check("format = \"epoch_s\"", "1406879400.25", Ok("2014-08-01T07:50:00.250Z"));
    check("format = \"epoch_s\"", "\"1406879400\"", Ok("2014-08-01T07:50:00Z"));
    check("format = \"epoch_s\"", "-1", Ok("1969-12-31T23:59:59Z"));
    check("format = \"epoch_s\"", "1e300", Err("bad_time"));
    check("format = \"epoch_ms\"", "1406879400123", Ok("2014-08-01T07:50:00.123Z"));
    check("format = \"epoch_us\"", "1406879400123456", Ok("2014-08-01T07:50:00.123456Z"));
    check("format = \"epoch_ns\"", "1406879400123456789", Ok("2014-08-01T07:50:00.123456Z"));
    check("format = \"epoch_ns\"", "true", Err("bad_time"));
    let aarhus = "format = \"%Y-%m-%dT%H:%M:%S\", zone = \"Europe/Copenhagen\"";
    check(aarhus, "\"2014-08-01T07:50:00\"", Ok("2014-08-01T05:50:00Z"));
    check(aarhus, "\"2014-01-01T07:50:00\"", Ok("2014-01-01T06:50:00Z"));
    check(aarhus, "\"2014-10-26T02:30:00\"", Ok("2014-10-26T00:30:00Z"));
    check(aarhus, "\"2014-03-30T02:30:00\"", Err("bad_time"));
    check(aarhus, "\"2014-02-30T02:30:00\"", Err("bad_time"));
    check(aarhus, "\"yesterday\"", Err("bad_time"));
    check(aarhus, "5", Err("bad_time"));
    check("format = \"%d.%m.%Y\", zone = \"UTC\"", "\"01.08.2014\"", Ok("2014-08-01T00:00:00Z"));
    check("format = \"%Y-%m-%d %H:%M:%S %z\"", "\"2014-08-01 07:50:00 +0200\"", Ok("2014-08-01T05:50:00Z"));
}

#[test]
fn a_history_of_400_days_in_one_message_is_read() {
    let mut decoder = decoder("", "device = \"const:well\"\nts = { at = \"/h\", format = \"epoch_s\" }\nf = \"/f\"");
    let hours = (0..9_600).map(|hour| format!("{{\"h\":{},\"f\":{hour}}}", 1_600_000_000 + hour * 3_600));
    let results = decode(&mut decoder, format!("[{}]", hours.collect::<Vec<_>>().join(",")).as_bytes());
    assert_eq!(results.len(), 9_600);
    assert!(results.iter().all(Result::is_ok));
}

#[test]
fn floats_are_the_nearest_to_what_was_written() {
    let seed = rand::random::<u64>();
    println!("seed {seed}");
    let mut random = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(seed);
    let mut decoder = decoder("", FLAT);
    for _ in 0..20_000 {
        let value = f64::from_bits(rand::Rng::random(&mut random));
        if !value.is_finite() {
            continue;
        }
        let results = decode(&mut decoder, format!("{{\"d\":\"x\",\"f\":{value:e}}}").as_bytes());
        let Some(Value::Float(read)) = results[0].as_ref().unwrap().values[0] else { panic!("{value:e}") };
        assert_eq!(read.to_bits(), value.to_bits(), "{value:e}");
    }
}

#[test]
fn it_is_known_which_readings_have_the_time_of_their_arrival() {
    let check = |source: &str, map: &str, topic: &str, payload: &[u8], expected: &[bool]| {
        let (mut decoder, mut out) = (decoder(source, map), Vec::new());
        let payload = Bytes::copy_from_slice(payload);
        decoder.decode(topic, &payload, ARRIVAL, &mut out);
        assert_eq!(decoder.by_arrival(topic, &payload, ARRIVAL, &out), expected, "{source}: {out:?}");
    };
    let with_time = "device = \"/d\"\nts = { at = \"/ts\", format = \"epoch_us\" }\nf = \"/f\"";
    let json = format!("{{\"d\":\"a\",\"ts\":{ARRIVAL},\"f\":1}}");
    check("format = \"json\"", with_time, "t", json.as_bytes(), &[false]);
    check("format = \"json\"", FLAT, "t", json.as_bytes(), &[true]);
    let seconds = ARRIVAL / 1_000_000;
    let senml = "device = \"/name\"\nts = \"/time\"\nf = \"/value\"";
    let pack =
        format!("[{{\"n\":\"a\",\"v\":1}},{{\"n\":\"b\",\"t\":-5,\"v\":1}},{{\"n\":\"c\",\"t\":{seconds},\"v\":1}}]");
    check("format = \"senml\"", senml, "t", pack.as_bytes(), &[true, true, false]);
    let influx = "device = \"/tags/d\"\nts = \"/time\"\nf = \"/fields/f\"";
    let lines = format!("m,d=a f=1\nm,d=b f=1 {ARRIVAL}000\nm,d=c f=x");
    check("format = \"influx\"", influx, "t", lines.as_bytes(), &[true, false, false]);
    let bus = "device = \"/id\"\nts = \"/time\"\nf = \"/metrics/f\"";
    let metric = sparkplug::metric("f", 0, 10, sparkplug::Is::Double(1.0));
    let own = sparkplug::payload(Some(0), std::slice::from_ref(&metric));
    // The payload without its time.
    let without = own[own.iter().position(|byte| *byte == 0x12).unwrap()..].to_vec();
    check("format = \"sparkplug\"", bus, "spBv1.0/g/NBIRTH/n", &without, &[true]);
}
