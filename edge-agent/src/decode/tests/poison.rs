//! Payloads that no device should send: nothing panics, nothing takes for ever, and each comes back as readings, as
//! rejections, or as filtered.

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::formats::bytes;
use super::sparkplug::{Is, metric, payload};
use super::*;

/// A payload takes less, also in a build that is not optimised, on a machine that has other things to do.
const LONGEST: Duration = Duration::from_secs(20);

struct Case {
    format: &'static str,
    source: &'static str,
    map: &'static str,
    topic: &'static str,
    good: Vec<Vec<u8>>,
    bad: Vec<Vec<u8>>,
}

const EACH: &str = "device = \"topic:0\"\nf = \"/f\"\ni = \"/i\"\nb = \"/b\"\nt = \"/t/0/x\"";

fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

fn hex(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| bytes(text)).collect()
}

/// `open` so often, and perhaps as often the other.
fn deep(open: &str, close: &str) -> Vec<Vec<u8>> {
    [10, 63, 64, 65, 127, 128, 129, 100_000]
        .into_iter()
        .flat_map(|levels| [open.repeat(levels), format!("{}1{}", open.repeat(levels), close.repeat(levels))])
        .map(String::into_bytes)
        .collect()
}

/// CBOR within CBOR.
fn deep_cbor(open: &[u8]) -> Vec<Vec<u8>> {
    [1, 62, 63, 64, 65, 66, 1_000, 500_000]
        .into_iter()
        .map(|levels| [&open.repeat(levels)[..], &[1]].concat())
        .collect()
}

fn cases() -> Vec<Case> {
    let json_bad = texts(&[
        "",
        " ",
        "{",
        "}",
        "[",
        "]",
        "{]",
        "[}",
        "nul",
        "tru",
        "\"",
        "\"\\",
        "\"\\u12\"",
        "\"\\ud800\"",
        "{\"f\"",
        "{\"f\":",
        "{\"f\":1",
        "{\"f\":1,",
        "{\"f\":1,}",
        "{,}",
        "[,]",
        "[1,]",
        "{\"f\":01}",
        "{\"f\":1e}",
        "{\"f\":-}",
        "{\"f\":1e999}",
        "{\"f\":NaN}",
        "{\"t\":[{\"x\":\"\\u0000\"}]}",
        "{\"f\":{}}",
        "{\"f\":[]}",
        "{\"t\":{\"0\":{\"x\":1}}}",
        "\u{feff}{}",
        "{}{}",
        "{} x",
        "// x\n{}",
        "{'f':1}",
        "{f:1}",
        "{\"f\":.5}",
        "{\"f\":+1}",
        "{\"i\":9223372036854775808}",
        "{\"i\":1e400}",
        "{\"b\":\"true\"}",
        "[[[]]]",
        "[null,1,\"x\",{}]",
    ]);
    let senml_bad = texts(&[
        "",
        "{}",
        "[",
        "[]",
        "[1]",
        "[[]]",
        "[{}]",
        "[{\"n\":1,\"v\":1}]",
        "[{\"n\":\"a\",\"v\":{}}]",
        "[{\"n\":\"a\",\"v\":[1]}]",
        "[{\"n\":\"a\",\"v\":null}]",
        "[{\"n\":\"a\",\"v\":1e999}]",
        "[{\"bn\":5,\"v\":1}]",
        "[{\"bt\":\"x\",\"n\":\"a\",\"v\":1}]",
        "[{\"bt\":1e300,\"n\":\"a\",\"v\":1}]",
        "[{\"bt\":-1e300,\"n\":\"a\",\"v\":1}]",
        "[{\"bv\":true,\"n\":\"a\",\"v\":1}]",
        "[{\"bver\":99,\"n\":\"a\",\"v\":1}]",
        "[{\"bver\":\"x\"}]",
        "[{\"bver\":-1,\"n\":\"a\",\"v\":1}]",
        "[{\"x_\":1}]",
        "[{\"n\":\"\",\"v\":1}]",
        "[{\"n\":\"\\u0000\",\"v\":1}]",
        "[{\"n\":\"a b\",\"v\":1}]",
        "[{\"n\":\"é\",\"v\":1}]",
        "[{\"n\":\"a\",\"t\":9223372036854775807,\"v\":1}]",
        "[{\"n\":\"a\",\"t\":-9223372036854775808,\"v\":1}]",
        "[{\"n\":\"a\",\"t\":true,\"v\":1}]",
        "[{\"n\":\"a\",\"s\":\"x\"}]",
        "[{\"n\":\"a\",\"ut\":{}, \"v\":1}]",
        "[{\"n\":\"a\",\"v\":1,\"vs\":\"x\"}]",
        "[{\"n\":\"a\",\"vb\":1}]",
        "[{\"n\":\"a\",\"vs\":1}]",
        "[{\"n\":\"a\",\"vd\":1}]",
        "[{\"n\":\"a\",\"v\":1}",
        "[{\"n\":\"a\",\"v\":1},",
        "[{\"n\":\"a\",\"v\":1}]]",
        "[{\"n\":\"a\",\"u\":1,\"v\":1}]",
        "[{\"bn\":\"a\",\"bv\":1e308},{\"v\":1e308}]",
        "[{\"bn\":\"a\",\"bs\":1e308},{\"s\":1e308}]",
        "null",
        "[null]",
    ]);
    let cbor_bad = hex(&[
        "",
        "ff",
        "1c",
        "1d",
        "1e",
        "1f",
        "3f",
        "5c",
        "7e",
        "9e",
        "be",
        "df",
        "fc",
        "18",
        "19ff",
        "1affffff",
        "1bffffffff",
        "5bffffffffffffffff",
        "7bffffffffffffffff",
        "9bffffffffffffffff",
        "bbffffffffffffffff",
        "9b0000000100000000",
        "5a7fffffff00",
        "7f6161",
        "7f4161ff",
        "5f6161ff",
        "5f5f4161ffff",
        "7f61ffff",
        "9f",
        "bf",
        "bfff",
        "9fff",
        "bf6161ff",
        "a1",
        "a16161",
        "a1616161ff",
        "a161c3f6",
        "82",
        "8201",
        "c1",
        "c1c1",
        "d81c",
        "a1ff01",
        "f8",
        "f818",
        "f7",
        "e0",
        "a16166f97e00",
        "a16166fb7ff0000000000000",
        "a16169fb43e0000000000000",
        "a1616162",
        "a180f6",
        "a1a0f6",
        "0000",
    ]);
    let influx_bad = texts(&[
        "m",
        "m ",
        "m f",
        "m f=",
        "m f=1 x",
        "m f=1 1 1",
        "m f=1x",
        "m f=1ii",
        "m f=i",
        "m f=u",
        "m f=-1u",
        "m f=1e999",
        "m f=nan",
        "m f=inf",
        "m f=\"",
        "m f=\"\\",
        "m f=\"\\\"",
        "m,",
        "m,x",
        "m,x=",
        "m,x= f=1",
        "m,=x f=1",
        ",x=1 f=1",
        " m f=1",
        "m  f=1",
        "m f=1,",
        "m f=1,,g=1",
        "m =1",
        "m f==1",
        "m f=t r",
        "m f=truee",
        "m\\",
        "m\\ f=1",
        "m,x=\\ f=1",
        "=",
        "\\",
        "\"",
        "#",
        "m f=0x10",
        "m f=1_000",
        "m f=99999999999999999999i",
        "m f=1 99999999999999999999",
        "m f=1 -9223372036854775808",
        "\r\n\r\n",
        "m f=1\rm f=2",
    ]);
    let csv_bad = texts(&[
        "",
        "f",
        "\n",
        "\r",
        ",",
        "\"",
        "\"\"",
        "\"f",
        "f,f",
        "f\n\"",
        "f\n\"x",
        "f\n\"x\"y",
        "f\nx\"y",
        "f\n1,2",
        "f\n,",
        "f\n\"\"\"",
        "f\n\"\"\"\"",
        "f\n1e999",
        "f\nNaN",
        "f\n-",
        "f\n0x1",
        "f\n 1",
        "f\n1 ",
        "f\n1;2",
        "f\n\u{0}",
        "f\n\u{feff}1",
        "\u{feff}",
        "g\n1",
        "F\n1",
        " f\n1",
        "f \n1",
        "f\n\n\n",
        "f\n\"1\n\"",
        "f\n\"1\"\n\"",
        "f\r1",
        "f\n1\r2",
        "f\n+1",
        "f\n.5",
        "f\n5.",
        "f\n1e",
        "f\n''",
        "f\n\"\",\"\"",
    ]);
    let mut raw_bad = texts(&[
        "",
        " ",
        "x",
        "NaN",
        "inf",
        "-inf",
        "infinity",
        "1e999",
        "-1e999",
        "1,5",
        "1.5.2",
        "--1",
        "+",
        "-",
        ".",
        "e5",
        "1e",
        "0x10",
        "1_000",
        "１",
        "1 2",
        "1\n2",
        "1;2",
        "{}",
        "[1]",
        "\"1\"",
        "null",
        "true",
        "TRUE",
        "on",
        "1%",
        "1 °C",
        "\u{0}",
        "1\u{0}",
        "\u{feff}1",
        "∞",
        "½",
        "1e-999999999",
        "9".repeat(400).as_str(),
        "0.".repeat(200).as_str(),
    ]);
    raw_bad.extend([b"\xff".to_vec(), b"1\x80".to_vec(), b"\xc0\x80".to_vec()]);
    let mut spark_bad = hex(&[
        "00",
        "01",
        "02",
        "03",
        "04",
        "05",
        "06",
        "07",
        "08",
        "0a",
        "0d",
        "09",
        "0880",
        "08ffffffffffffffffff01",
        "08ffffffffffffffffff02",
        "08ffffffffffffffffffff01",
        "12",
        "1205",
        "12ffffffffffffffffff01",
        "12ffffffff0f",
        "1200",
        "12010a",
        "12020aff",
        "12030a01ff",
        "120300",
        "12021000",
        "12021005",
        "12022200",
        "12027001",
        "12026000",
        "12036d0000",
        "12065d00000000",
        "12046a000000",
        "12025001",
        "12025aff",
        "12037a01ff",
        "1203820100",
        "12038a0100",
        "1203920100",
        "18",
        "1801",
        "1aff",
        "2201ff",
        "220353",
        "0b",
        "0c",
        "1b1c",
    ]);
    spark_bad.push(payload(Some(u64::MAX), &[metric("f", 0, u32::MAX, Is::Int(u32::MAX))]));
    spark_bad.push(payload(Some(1), &vec![metric("", 77, 0, Is::Null); 70_000]));
    let spark_map = "device = \"/id\"\nts = \"/time\"\nf = \"/metrics/f\"\ni = \"/metrics/i\"";
    let good = || texts(&["{\"f\":1.5,\"i\":2,\"b\":true,\"t\":[{\"x\":\"é\"}]}", "[{\"f\":1},{\"f\":2}]"]);
    let with = |mut bad: Vec<Vec<u8>>, more: Vec<Vec<u8>>| {
        bad.extend(more);
        bad
    };
    let nested = || with(deep("[", "]"), with(deep("{\"t\":", "}"), deep("{\"t\":[", "]}")));
    let case = |format, source, map, good, bad| Case { format, source, map, topic: "t", good, bad };
    let senml = "device = \"/name\"\nts = \"/time\"\nf = \"/value\"";
    let packs = || {
        texts(&[
            "[{\"bn\":\"a:\",\"bt\":5,\"bu\":\"V\",\"bv\":1,\"n\":\"x\",\"v\":1.5},{\"n\":\"y\",\"u\":\"é\",\"v\":2}]",
        ])
    };
    let pack = "82 a5 21 62613a 22 05 23 6156 00 6178 02 f93e00 a3 00 6179 01 62c3a9 02 02";
    let cbor = "a4 6166 f93e00 6169 02 6162 f5 6174 81a16178 62c3a9";
    let lines = "m,x=1 f=1.5,i=2i,b=t,t=\"é\" 1700000000000000000\n";
    vec![
        case("json", "", EACH, good(), with(json_bad.clone(), nested())),
        case("json", "readings = \"/*\"", "device = \"key:0\"\nf = \"/f\"", good(), with(json_bad.clone(), nested())),
        case("json", "readings = [\"/t\", \"/t/*/x\"]", EACH, good(), with(json_bad, nested())),
        case("senml", "", senml, packs(), with(senml_bad, nested())),
        case("senml_cbor", "", senml, hex(&[pack]), with(cbor_bad.clone(), deep_cbor(&[0x81]))),
        case("cbor", "", EACH, hex(&[cbor]), with(cbor_bad.clone(), with(deep_cbor(&[0x81]), deep_cbor(&[0xc1])))),
        case(
            "cbor",
            "readings = \"/t/*\"",
            "device = \"key:0\"",
            hex(&[cbor]),
            with(cbor_bad, deep_cbor(&[0xa1, 0x61, 0x74])),
        ),
        case(
            "influx",
            "",
            "device = \"/tags/x\"\nts = \"/time\"\nf = \"/fields/f\"",
            texts(&[lines]),
            with(influx_bad, vec!["m f=\"\n".repeat(20_000).into_bytes(), "m f=\\\"\n".repeat(20_000).into_bytes()]),
        ),
        case(
            "csv",
            "",
            "device = \"topic:0\"\nf = \"/f\"",
            texts(&["g,f\n\"é\"\"\",1.5\n"]),
            with(
                csv_bad,
                vec![format!("f\n{}", "\"x\n".repeat(20_000)).into_bytes(), ",".repeat(100_000).into_bytes()],
            ),
        ),
        case("raw", "", "device = \"topic:0\"\nf = \"/value\"", texts(&["21.5"]), raw_bad),
        Case {
            topic: "spBv1.0/g/NBIRTH/n",
            ..case(
                "sparkplug",
                "",
                spark_map,
                vec![payload(Some(0), &[metric("f", 1, 10, Is::Double(1.5))])],
                spark_bad,
            )
        },
    ]
}

fn check(decoder: &mut Decoder, case: &Case, payload: &[u8]) -> bool {
    let mut out = Vec::new();
    let begun = Instant::now();
    let payload = Bytes::copy_from_slice(payload);
    let filtered = decoder.decode(case.topic, &payload, ARRIVAL, &mut out);
    let shown = || format!("{}: {:?}", case.format, String::from_utf8_lossy(&payload[..payload.len().min(80)]));
    assert!(begun.elapsed() < LONGEST, "{}", shown());
    assert!(!out.is_empty() || filtered > 0, "{}", shown());
    for reading in out.iter().flatten() {
        assert!(payload.get(reading.span.clone()).is_some(), "{}", shown());
        let finite = |value: &Option<Value>| !matches!(value, Some(Value::Float(value)) if !value.is_finite());
        assert!(reading.values.iter().all(finite), "{}", shown());
    }
    out.iter().all(Result::is_ok)
}

#[test]
fn bad_payloads_come_back_as_readings_or_rejections() {
    for case in cases() {
        let mut decoder = decoder(&format!("format = \"{}\"\n{}", case.format, case.source), case.map);
        for payload in &case.good {
            if case.source.is_empty() {
                assert!(check(&mut decoder, &case, payload), "{}", case.format);
            }
            // Cut short at each byte.
            (0..payload.len()).for_each(|end| _ = check(&mut decoder, &case, &payload[..end]));
        }
        assert!(case.bad.len() >= 40, "{} has {} cases", case.format, case.bad.len());
        case.bad.iter().for_each(|payload| _ = check(&mut decoder, &case, payload));
    }
}

#[test]
fn good_payloads_with_bytes_changed_come_back_as_readings_or_rejections() {
    let seed = rand::random::<u64>();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for case in cases() {
        let mut decoder = decoder(&format!("format = \"{}\"\n{}", case.format, case.source), case.map);
        for _ in 0..1_000 {
            let mut payload = case.good[random.random_range(0..case.good.len())].clone();
            for _ in 0..random.random_range(1..6) {
                let at = random.random_range(0..payload.len());
                match random.random_range(0..4) {
                    0 => payload[at] = random.random(),
                    1 => payload.insert(at, random.random()),
                    2 if payload.len() > 1 => drop(payload.remove(at)),
                    _ => payload[at] ^= 1 << random.random_range(0..8),
                }
            }
            check(&mut decoder, &case, &payload);
        }
    }
}
