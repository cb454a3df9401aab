use std::path::Path;

use serde_json::Value as Json;

use super::formats::bytes;
use super::*;
use crate::decode::senml::Packs;

/// The resolved twin of a pack, without what the twins of RFC 8428 leave out: data values and links.
fn resolved(payload: &[u8], cbor: bool, now_s: i64) -> Vec<Json> {
    let packs = Packs::new(&[], None, cbor);
    let records = packs.resolve(payload, now_s * 1_000_000).unwrap();
    let json = |record: &crate::decode::senml::Resolved<'_>| {
        let mut json = serde_json::Map::new();
        json.insert("n".into(), record.name.clone().into());
        json.extend(record.unit.clone().map(|unit| ("u".into(), unit.into())));
        json.insert("t".into(), (record.time as f64 / 1e6).into());
        let (label, value): (&str, Json) = match &record.value {
            Scalar::Bool(value) => ("vb", (*value).into()),
            Scalar::Text(text) => ("vs", text.to_string().into()),
            value => ("v", value.number().unwrap().into()),
        };
        json.insert(label.into(), value);
        Json::Object(json)
    };
    records.iter().map(|(_, record)| json(record.as_ref().unwrap())).collect()
}

/// Compares each pack in a directory with its twin; how many there were.
fn compare(directory: &Path) -> usize {
    let mut compared = 0;
    for number in 1..=13 {
        let read = |name: &str| std::fs::read(directory.join(format!("ex{number}.{name}"))).ok();
        let Some(twin) = read("gen.resolved.json") else { continue };
        let mut twin: Vec<Json> = serde_json::from_slice(&twin).unwrap();
        for record in &mut twin {
            let record = record.as_object_mut().unwrap();
            record.remove("l");
            // 1 and 1.0 are the same number.
            let float = |value: &mut Json| *value = value.as_f64().unwrap().into();
            record.get_mut("v").map(float);
            record.get_mut("t").map(float);
        }
        // Packs with relative times were resolved at some moment, which the twin tells.
        let now_s = twin[0]["t"].as_f64().unwrap() as i64;
        for (payload, cbor) in [(read("json"), false), (read("gen.cbor"), true)] {
            let Some(payload) = payload else { continue };
            let mut found = resolved(&payload, cbor, now_s);
            found.retain(|record| !record["n"].as_str().unwrap().ends_with("nfv-reader"));
            assert_eq!(found, twin, "ex{number} cbor {cbor}");
            compared += 1;
        }
    }
    compared
}

#[test]
fn the_examples_of_rfc_8428_resolve_to_their_twins() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/senml");
    assert_eq!(compare(&own), 6);
    if let Some(all) = shared_data() {
        assert_eq!(compare(&all.join("senml")), 14);
    }
}

const PLAIN: &str = "device = \"/name\"\nts = \"/time\"\nf = \"/value\"\nt = \"/unit\"";

fn shown(source: &str, map: &str, payload: impl AsRef<[u8]>) -> Vec<String> {
    let mut decoder = decoder(source, map);
    let mut out = Vec::new();
    let filtered = decoder.decode("t", &Bytes::copy_from_slice(payload.as_ref()), ARRIVAL, &mut out);
    let mut texts = out.iter().map(super::formats::show).collect::<Vec<_>>();
    if filtered > 0 {
        texts.push(format!("{filtered} filtered"));
    }
    texts
}

#[test]
fn records_are_readings_with_base_values_and_relative_times() {
    let check =
        |json: &str, expected: &[&str]| assert_eq!(shown("format = \"senml\"", PLAIN, json), expected, "{json}");
    check(
        r#"[{"bn":"a:","bv":10,"n":"x","v":1.5},{"n":"y","v":-1,"t":-2}]"#,
        &["a:x +0 11.5 - - -", "a:y +-2000000 9.0 - - -"],
    );
    check(r#"[{"n":"a","u":"Cel","v":1,"t":0.25}]"#, &["a +250000 1.0 - - Cel"]);
    check(r#"[{"bu":"V","n":"a","v":1},{"n":"b","u":"A","v":1}]"#, &["a +0 1.0 - - V", "b +0 1.0 - - A"]);
    check(r#"[{"n":"a","v":1,"t":1700000001}]"#, &["a +1000000 1.0 - - -"]);
    check(r#"[{"n":"a","v":1,"t":268435455}]"#, &["a +268435455000000 1.0 - - -"]);
    check(r#"[{"bn":"a","bt":1700000000},{"v":1,"t":-5},{"v":2}]"#, &["a +-5000000 1.0 - - -", "a +0 2.0 - - -"]);
    check(r#"[{"bn":"a"}]"#, &["empty"]);
    check("[]", &["empty"]);
    check("{}", &["malformed"]);
    check(r#"[5,{"n":"a","v":1}]"#, &["malformed", "a +0 1.0 - - -"]);
    check(r#"[{"n":"a","v":"1"},{"n":"b","v":1}]"#, &["wrong_type", "b +0 1.0 - - -"]);
    check(r#"[{"bn":"a:","n":"x","v":"1"},{"n":"y","v":1}]"#, &["wrong_type", "a:y +0 1.0 - - -"]);
    check(r#"[{"n":"a","v":1,"vb":true}]"#, &["two_values"]);
    check(r#"[{"n":"a","v":1,"x_":true},{"n":"b","v":1,"x":true}]"#, &["must_understand", "b +0 1.0 - - -"]);
    check(r#"[{"bver":11,"n":"a","v":1}]"#, &["bad_version"]);
    check(r#"[{"bver":10,"n":"a","v":1}]"#, &["a +0 1.0 - - -"]);
    check(r#"[{"n":"a","v":1},{"bt":"now","n":"b","v":1}]"#, &["bad_base"]);
    check(r#"[{"v":1}]"#, &["bad_name"]);
    check(r#"[{"n":"a b","v":1}]"#, &["bad_name"]);
    check(r#"[{"n":"-a","v":1}]"#, &["bad_name"]);
    check(r#"[{"n":"a","v":1,"t":1e300}]"#, &["wrong_type"]);
    let sums = "device = \"/name\"\nf = \"/sum\"";
    assert_eq!(
        shown("format = \"senml\"", sums, r#"[{"bs":100,"n":"a","s":5},{"n":"b","v":1}]"#),
        ["a +0 105.0 - - -", "b +0 100.0 - - -",]
    );
    // [{-2: "a:", 0: "x", 2: 1.5, 4: true}], and data of three bytes as base64url.
    let cbor = bytes("81 a3 21 62613a 00 6178 02 f93e00");
    assert_eq!(shown("format = \"senml_cbor\"", PLAIN, cbor), ["a:x +0 1.5 - - -"]);
    let data = bytes("81 a2 00 6161 08 43fbff00");
    let text = "device = \"/name\"\nt = \"/value\"";
    assert_eq!(shown("format = \"senml_cbor\"", text, data), ["a +0 - - - -_8A"]);
}

#[test]
fn records_of_one_time_become_one_reading() {
    let by_name =
        "device = \"/name\"\nts = \"/time\"\nf = \"/values/temperature\"\nt = \"/values/label\"\nb = \"/values/open\"";
    let spread = "format = \"senml\"\noptions = { spread = \"name\" }";
    let json = r#"[{"bn":"d1/","n":"temperature","v":25.2},{"n":"label","vs":"hall"},{"n":"open","vb":false},{"n":"other","v":1},
        {"n":"temperature","v":25.3,"t":-1},{"bn":"d2/","n":"temperature","v":12},{"n":"temperature","v":13}]"#;
    assert_eq!(
        shown(spread, by_name, json),
        ["d1 +0 25.2 - false hall", "d1 +-1000000 25.3 - - -", "d2 +0 12.0 - - -", "d2 +0 13.0 - - -", "1 filtered",]
    );
    assert_eq!(shown(spread, by_name, r#"[{"bn":"d1/","n":"other","v":1}]"#), ["1 filtered"]);
    let by_unit = "device = \"/name\"\nts = \"/time\"\nf = \"/values/lon\"\nt = \"/values/x\"";
    let spread = "format = \"senml\"\noptions = { spread = \"unit\" }";
    let json = r#"[{"bn":"d","bu":"%RH","v":20},{"v":24.5,"u":"lon"},{"v":60.5,"u":"lat"}]"#;
    assert_eq!(shown(spread, by_unit, json), ["d +0 24.5 - - -", "2 filtered"]);
}
