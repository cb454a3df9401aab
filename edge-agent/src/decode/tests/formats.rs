use super::*;

/// What came of a message, each as text.
fn shown(source: &str, map: &str, payload: impl AsRef<[u8]>) -> Vec<String> {
    let mut decoder = decoder(source, map);
    let mut out = Vec::new();
    let payload = Bytes::copy_from_slice(payload.as_ref());
    let filtered = decoder.decode("city/traffic/d7", &payload, ARRIVAL, &mut out);
    let mut texts = out.iter().map(show).collect::<Vec<_>>();
    if filtered > 0 {
        texts.push(format!("{filtered} filtered"));
    }
    texts
}

pub(super) fn show(result: &Result<Reading, Rejected>) -> String {
    match result {
        Err(rejected) => rejected.reason.to_owned(),
        Ok(reading) => {
            let value = |value: &Option<Value>| match value {
                None => "-".to_owned(),
                Some(Value::Float(value)) => format!("{value:?}"),
                Some(Value::Int(value)) => value.to_string(),
                Some(Value::Bool(value)) => value.to_string(),
                Some(Value::Text(value)) => value.clone(),
            };
            let values = reading.values.iter().map(value).collect::<Vec<_>>().join(" ");
            format!("{} +{} {values}", reading.device, reading.ts - ARRIVAL)
        }
    }
}

#[test]
fn csv_has_its_columns_from_the_configuration_or_the_first_line() {
    let map = "device = \"/id\"\nf = \"/speed\"\ni = \"/n\"\nb = \"/on\"\nt = \"/note\"";
    let with = |options: &str, text: &str| shown(&format!("format = \"csv\"\noptions = {{ {options} }}"), map, text);
    let head = "id,speed,n,on,note\n";
    let check = |text: &str, expected: &[&str]| assert_eq!(with("", &format!("{head}{text}")), expected, "{text}");
    check("a,1.5,2,true,x\nb,,,,\n", &["a +0 1.5 2 true x", "b +0 - - - -"]);
    check("a,1.5,2,true,\"x, \"\"y\"\"\nz\"\r\n", &["a +0 1.5 2 true x, \"y\"\nz"]);
    check("a,1.5,2,true,\"\"", &["a +0 1.5 2 true "]);
    check("a,x,2,true,x\n\n\nb,2,3,false,y", &["wrong_type", "b +0 2.0 3 false y"]);
    check("a,1,2\nb,2,3,false,y,z\nc,1,1,true,k", &["wrong_columns", "wrong_columns", "c +0 1.0 1 true k"]);
    check("a,1,2,true,\"x\" y\nc,1,1,true,k", &["malformed", "c +0 1.0 1 true k"]);
    check("a,NaN,2,true,x\na,inf,2,true,x", &["wrong_type", "wrong_type"]);
    check("", &["empty"]);
    assert_eq!(with("", "id,speed,n,on\na,1,1,true"), ["no_column"]);
    assert_eq!(with("", "\u{feff}id,speed,n,on,note\na,1,1,true,"), ["a +0 1.0 1 true -"]);
    let semicolons = "delimiter = \";\", quote = \"'\", header = [\"note\", \"id\", \"speed\", \"n\", \"on\"]";
    assert_eq!(with(semicolons, "'a;b';d;-1;7;false"), ["d +0 -1.0 7 false a;b"]);
}

#[test]
fn influx_lines_are_read_with_their_types_and_escapes() {
    let map = "device = \"/tags/id\"\nts = \"/time\"\nf = \"/fields/f\"\ni = \"/fields/i\"\nb = \"/fields/b\"\nt = \"/fields/t\"";
    let second = ARRIVAL / 1_000_000;
    let with = |precision: &str, text: &str| {
        shown(&format!("format = \"influx\"\noptions = {{ precision = \"{precision}\" }}"), map, text)
    };
    let check = |text: &str, expected: &[&str]| assert_eq!(with("s", text), expected, "{text}");
    check(&format!("m,id=a f=1.5,i=2i,b=t,t=\"x\" {}", second + 1), &["a +1000000 1.5 2 true x"]);
    check("m,id=a f=1", &["a +0 1.0 - - -"]);
    check("m,id=a i=7u,b=FALSE,f=-1.5e3\n\n# no line\nm,id=b f=2\r\n", &["a +0 -1500.0 7 false -", "b +0 2.0 - - -"]);
    check(
        "m\\,\\ x,id=a\\ b\\=c\\,d t=\"a, b=\\\"c\\\" \\\\ \\n\nd\",f=1",
        &["a b=c,d +0 1.0 - - a, b=\"c\" \\ \\n\nd"],
    );
    check("m,id=a i=18446744073709551615u", &["wrong_type"]);
    check("m f=1", &["no_device"]);
    check(
        "m,id=a\nm,id=a f=NaN\nm,id=a f=\nm,id=a f=1 soon\nm,id=b f=1",
        &["malformed", "malformed", "malformed", "malformed", "b +0 1.0 - - -"],
    );
    check("m,id=a t=\"open\nm,id=b f=1", &["malformed", "b +0 1.0 - - -"]);
    check("m,id=a f=1 9223372036854775807", &["malformed"]);
    check("", &["empty"]);
    assert_eq!(with("ns", &format!("m,id=a f=1 {}", ARRIVAL * 1_000 + 2_999)), ["a +2 1.0 - - -"]);
    assert_eq!(with("us", &format!("m,id=a f=1 {}", ARRIVAL + 2)), ["a +2 1.0 - - -"]);
    assert_eq!(with("ms", &format!("m,id=a f=1 {}", ARRIVAL / 1_000 + 2)), ["a +2000 1.0 - - -"]);
}

#[test]
fn raw_is_one_value() {
    let check = |map: &str, payload: &[u8], expected: &str| {
        assert_eq!(
            shown("format = \"raw\"", &format!("device = \"topic:2\"\n{map} = \"/value\""), payload),
            [expected]
        );
    };
    check("f", b" 21.5\n", "d7 +0 21.5 - - -");
    check("f", b"21,5", "wrong_type");
    check("f", b"", "wrong_type");
    check("f", b"1e999", "wrong_type");
    check("i", b"-7", "d7 +0 - -7 - -");
    check("b", b"true", "d7 +0 - - true -");
    check("t", b"ON", "d7 +0 - - - ON");
    check("t", b"\xff", "not_utf8");
}

#[test]
fn cbor_is_read_by_pointers_as_json_is() {
    let map = "device = \"/d\"\nf = \"/f\"\ni = \"/i\"\nb = \"/x/1\"\nt = \"/t\"";
    let check = |hex: &str, expected: &[&str]| {
        assert_eq!(shown("format = \"cbor\"", map, bytes(hex)), expected, "{hex}");
    };
    // {"d": "a", "f": 1.5, "i": -2, "x": [null, true], "t": "é"}
    check("a5 6164 6161 6166 f93e00 6169 21 6178 82f6f5 6174 62c3a9", &["a +0 1.5 -2 true é"]);
    // The same with lengths that are not known before, a tag, a double, a key that is a number.
    check("bf 6164 7f6161ff 6166 c1fb3ff8000000000000 07 f4 6178 9ff6f5ff ff", &["a +0 1.5 - true -"]);
    check("a2 6164 42beef 6166 fa3fc00000", &["beef +0 1.5 - - -"]);
    check("82 a16164 6161 a16164 6162", &["a +0 - - - -", "b +0 - - - -"]);
    check("a2 6164 6161 6166 f97e00", &["not_finite"]);
    check("a2 6164 6161 6166 f97c00", &["not_finite"]);
    check("a2 6164 6161 6169 1bffffffffffffffff", &["wrong_type"]);
    check("a2 6164 6161 6169 3b7fffffffffffffff", &["a +0 - -9223372036854775808 - -"]);
    check("80", &["empty"]);
    check("01", &["no_device"]);
    check("a1 6164 6161 00", &["malformed"]);
    check("a1 6164 61ff", &["not_utf8"]);
}

#[test]
fn halves_are_what_they_are() {
    let check = |hex: &str, expected: &str| {
        let texts = shown("format = \"cbor\"", "device = \"topic:0\"\nf = \"/f\"", bytes(&format!("a1 6166 f9{hex}")));
        assert_eq!(texts, [format!("city +0 {expected} - - -")], "{hex}");
    };
    check("0000", "0.0");
    check("8000", "-0.0");
    check("3c00", "1.0");
    check("7bff", "65504.0");
    check("0001", "5.960464477539063e-8");
    check("03ff", "6.097555160522461e-5");
    check("0400", "6.103515625e-5");
    check("c400", "-4.0");
    check("3555", "0.333251953125");
}

pub(super) fn bytes(hex: &str) -> Vec<u8> {
    let digits = hex.bytes().filter(u8::is_ascii_hexdigit).collect::<Vec<_>>();
    let digit = |byte: u8| char::from(byte).to_digit(16).unwrap() as u8;
    digits.chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

#[test]
fn one_message_may_carry_several_devices() {
    let check = |readings: &str, map: &str, json: &str, expected: &[&str]| {
        assert_eq!(shown(&format!("readings = {readings}"), map, json), expected, "{json}");
    };
    let by_key = "device = \"key:0\"\nf = \"/f\"\ni = \"message:/i\"";
    check(
        "\"/*\"",
        "device = \"key:0\"\nf = \"/f\"",
        r#"{"a":{"f":1},"b/c":{"f":2}}"#,
        &["a +0 1.0 - - -", "b/c +0 2.0 - - -"],
    );
    check(
        "\"/d/*\"",
        by_key,
        r#" {"i":7,"d":{"a":{"f":1},"b":[{"f":2},{"f":3}]}} "#,
        &["a +0 1.0 7 - -", "b +0 2.0 7 - -", "b +0 3.0 7 - -"],
    );
    check(
        "\"/d/*/samples\"",
        by_key,
        r#"{"d":{"a":{"samples":[{"f":1},{"f":2}]},"b":{"x":1},"c":{"samples":[{"f":3}]}}}"#,
        &["a +0 1.0 - - -", "a +0 2.0 - - -", "c +0 3.0 - - -"],
    );
    check(
        "[\"/x\", \"/y\"]",
        "device = \"/d\"",
        r#"{"y":[{"d":"b"}],"x":[{"d":"a"}]}"#,
        &["a +0 - - - -", "b +0 - - - -"],
    );
    check("[\"/x\", \"/y\"]", "device = \"/d\"", r#"{"y":[{"d":"b"}]}"#, &["b +0 - - - -"]);
    check("[\"/x\", \"/y\"]", "device = \"/d\"", r#"{"z":1}"#, &["no_readings"]);
    check("[\"/x\", \"/y\"]", "device = \"/d\"", r#"{"x":5,"y":[]}"#, &["no_readings"]);
    check("[\"/x\", \"/y\"]", "device = \"/d\"", r#"{"x":[]}"#, &["empty"]);
    check("\"/*\"", by_key, r#"{"a":{"f":1}"#, &["malformed"]);
    check("\"/*\"", by_key, "{}", &["no_readings"]);
    let many = format!("{{{}}}", (0..=READINGS_MAX).map(|n| format!("\"{n}\":{{}}")).collect::<Vec<_>>().join(","));
    check("\"/*\"", by_key, &many, &["too_many"]);
    let cbor = bytes("a2 6161 a16166 01 6162 a16166 02");
    assert_eq!(shown("format = \"cbor\"\nreadings = \"/*\"", by_key, cbor), ["a +0 1.0 - - -", "b +0 2.0 - - -"]);
}

#[test]
fn what_is_not_meant_is_filtered() {
    let check = |when: &str, json: &str, expected: &[&str]| {
        assert_eq!(shown(&format!("when = {when}"), FLAT, json), expected, "{when} {json}");
    };
    let good: &[&str] = &["x +0 - - - -"];
    let not: &[&str] = &["1 filtered"];
    check("{ at = \"/type\", is = \"traffic\" }", r#"{"d":"x","type":"traffic"}"#, good);
    check("{ at = \"/type\", is = \"traffic\" }", r#"{"d":"x","type":"noise"}"#, not);
    check("{ at = \"/type\", is = \"traffic\" }", r#"{"type":"noise"}"#, not);
    check("{ at = \"/type\", is = \"traffic\" }", r#"{"d":"x"}"#, not);
    check("{ at = \"/type\", is = \"traffic\" }", r#"{"d":"x","type""#, &["malformed"]);
    check("{ at = \"/type\", is_not = \"traffic\" }", r#"{"d":"x"}"#, good);
    check("{ at = \"/v\", is = 2 }", r#"{"d":"x","v":2.0}"#, good);
    check("{ at = \"/v\", is = 2 }", r#"{"d":"x","v":"2"}"#, good);
    check("{ at = \"/v\", is = true }", r#"{"d":"x","v":true}"#, good);
    check("{ at = \"/v\", is = true }", r#"{"d":"x","v":1}"#, not);
    check("{ at = \"/v\", any_of = [\"a\", 3] }", r#"{"d":"x","v":3}"#, good);
    check("{ at = \"/v\", any_of = [\"a\", 3] }", r#"{"d":"x","v":4}"#, not);
    check("{ at = \"/v\", above = 2 }", r#"{"d":"x","v":2}"#, not);
    check("{ at = \"/v\", above = 2 }", r#"{"d":"x","v":2.1}"#, good);
    check("{ at = \"/v\", below = 2 }", r#"{"d":"x","v":-1}"#, good);
    check("{ at = \"/v\", exists = true }", r#"{"d":"x","v":null}"#, not);
    check("{ at = \"/v\", exists = false }", r#"{"d":"x","v":null}"#, good);
    check("{ at = \"topic:2\", is = \"d7\" }", r#"{"d":"x"}"#, good);
    check("{ at = \"topic:2\", is = \"d8\" }", r#"{"d":"x"}"#, not);
    let both = "[{ at = \"/v\", above = 1 }, { at = \"/v\", below = 3 }]";
    check(both, r#"[{"d":"a","v":1},{"d":"b","v":2},{"d":"c","v":3}]"#, &["b +0 - - - -", "2 filtered"]);
}

#[test]
fn settings_that_no_message_could_meet_are_refused() {
    let check = |source: &str, map: &str, expected: &str| {
        let error = Settings::parse(&text(source, map)).unwrap_err();
        assert!(error.contains(expected), "{source} {map}: {error}");
    };
    check("format = \"influx\"", "device = \"/tag/id\"", "/tags/…");
    check("format = \"influx\"\nreadings = \"/x\"", "device = \"topic:0\"", "readings has no meaning");
    check("format = \"csv\"\noptions = { header = [\"a\"] }", "device = \"/b\"", "as the header has it");
    check("format = \"csv\"\noptions = { delimiter = \"\\\"\" }", "device = \"/b\"", "two different ASCII");
    check("format = \"csv\"\noptions = { precision = \"ms\" }", "device = \"/b\"", "`precision` has no meaning");
    check("options = { presicion = \"ms\" }", "device = \"/b\"", "did you mean `precision`?");
    check("format = \"raw\"", "device = \"/v\"", "/value");
    check("format = \"raw\"", "device = \"message:/v\"", "has no meaning");
    check("format = \"senml\"", "device = \"/name\"\nf = \"/values/t\"", "options.spread");
    check("format = \"sparkplug\"", "device = \"/Temperature\"", "/metrics/…");
    check("", "device = \"key:0\"", "there is none");
    check("readings = \"/*\"", "device = \"key:1\"", "there is none");
    check("when = { at = \"/x\", iss = 1 }", "device = \"/d\"", "unknown field `iss`");
    check("when = { at = \"/x\" }", "device = \"/d\"", "a condition has one of");
    check("when = { at = \"/x\", is = 1, below = 2 }", "device = \"/d\"", "a condition has one of");
    check("readings = []", "device = \"/d\"", "names no place");
    check("format = \"jsno\"", "device = \"/d\"", "unknown variant");
}
