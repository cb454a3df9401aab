use super::*;

fn written(messages: &[(String, Bytes)]) -> (String, Settings) {
    let text = write("[[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\n", messages);
    match Settings::parse(&text) {
        Ok(settings) => (text, settings),
        Err(error) => panic!("{error}\n{text}"),
    }
}

fn check(messages: &[(&str, &str)], expected: &[&str]) {
    let messages = messages.iter().map(|(topic, payload)| ((*topic).to_owned(), Bytes::from((*payload).to_owned())));
    let (text, _) = written(&messages.collect::<Vec<_>>());
    for expected in expected {
        assert!(text.contains(expected), "{expected}\n{text}");
    }
}

/// The configuration, and what it makes of the messages.
fn heard(messages: Vec<(String, Bytes)>, readings: u64, left: u64) -> String {
    let (text, settings) = written(&messages);
    let found = tried(&settings, &messages);
    assert!(found == Tried { readings, rejected: 0, left }, "{text}\n{found:?}");
    text
}

#[test]
fn topics_and_shapes_become_sources_that_check_takes() {
    let reading = r#"{"TIMESTAMP":"2014-08-01T07:50:00","avgSpeed":56,"a":{"b/c":true},"REPORT_ID":"x"}"#;
    check(
        &[("city/traffic/1", reading), ("city/traffic/2", &reading.replace("56", "56.5"))],
        &[
            "topics = [\"city/traffic/+\"]",
            "device = \"topic:2\"",
            "ts = { at = \"/TIMESTAMP\", format = \"%Y-%m-%dT%H:%M:%S\", zone = \"UTC\" }",
            "avgspeed = \"/avgSpeed\"",
            "avgspeed = { type = \"float64\" }",
            "a_b_1c = \"/a/b~1c\"",
            "report_id = { type = \"text\" }",
            "[stream.city_traffic.fields]",
        ],
    );
    check(
        &[("a", r#"[{"id":7,"time":1700000000123,"quality":1,"_x":2}]"#), ("a", "21.5"), ("b\u{7}", "x")],
        &[
            "device = \"/id\"",
            "format = \"epoch_ms\"",
            "field_quality = \"/quality\"",
            "# a: 1 messages are left out: raw",
            "# b\\u{7}: 1 messages are left out: of no format",
        ],
    );
}

#[test]
fn each_message_of_the_written_topics_is_read_once() {
    let messages = |all: &[(&str, &str)]| {
        all.iter().map(|(topic, payload)| ((*topic).to_owned(), Bytes::from((*payload).to_owned()))).collect()
    };
    // Two shapes under one pattern: a member tells them apart.
    let plug = r#"{"Time":"2024-01-01T00:00:00","ENERGY":{"Power":3}}"#;
    let climate = r#"{"Time":"2024-01-01T00:00:00","AM2301":{"Temperature":21}}"#;
    let all =
        [("tele/a/SENSOR", plug), ("tele/b/SENSOR", plug), ("tele/c/SENSOR", climate), ("tele/d/SENSOR", climate)];
    let text = heard(messages(&all), 4, 0);
    for expected in ["when = { at = \"/ENERGY\", exists = true }", "when = { at = \"/AM2301\", exists = true }"] {
        assert!(text.contains(expected), "{expected}\n{text}");
    }
    assert_eq!(text.matches("topics = [\"tele/+/SENSOR\"]").count(), 2, "{text}");
    // Another format: the topics are listed, and each is read as what it is.
    let text = heard(messages(&[("h/a", r#"{"v":1}"#), ("h/b", r#"{"v":2}"#), ("h/c", "21.5")]), 3, 0);
    let raw = "topics = [\"h/c\"]\nstream = \"h_c\"\nformat = \"raw\"\n[source.map]\ndevice = \"topic:1\"";
    assert!(text.contains(raw), "{text}");
    assert!(text.contains("topics = [\"h/a\", \"h/b\"]") && text.contains("topics = [\"h/c\"]"), "{text}");
    // Words at the end that come again and again are quantities.
    let raw = [("x/1/temp", "21"), ("x/2/temp", "22.5"), ("x/1/hum", "50"), ("x/2/hum", "51")];
    let text = heard(messages(&raw), 4, 0);
    assert!(text.contains("topics = [\"x/+/temp\"]") && text.contains("[stream.x_hum.fields]"), "{text}");
    let text = heard(messages(&[("i", "cpu,host=a busy=1.5,idle=2i,on=t 1700000000000000000")]), 1, 0);
    assert!(text.contains("host = \"/tags/host\"") && text.contains("on = \"/fields/on\""), "{text}");
}

#[test]
fn tables_cbor_and_births_become_sources_too() {
    let all = |all: &[(&str, &[u8])]| {
        all.iter().map(|(topic, payload)| ((*topic).to_owned(), Bytes::copy_from_slice(payload))).collect::<Vec<_>>()
    };
    let shows = |text: &str, expected: &[&str]| {
        expected.iter().for_each(|expected| assert!(text.contains(expected), "{expected}\n{text}"));
    };
    let table = "id;time;level;open\na;2024-01-01T00:00:00Z;1.5;true\nb;2024-01-01T00:00:01Z;2;\n";
    let text = heard(all(&[("w/x", table.as_bytes()), ("w/y", table.as_bytes())]), 4, 0);
    shows(
        &text,
        &["format = \"csv\"\noptions = { delimiter = \";\" }", "device = \"/id\"", "level = { type = \"float64\" }"],
    );
    shows(
        &text,
        &["ts = { at = \"/time\", format = \"rfc3339\" }", "open = { type = \"bool\" }", "topics = [\"w/+\"]"],
    );
    let text = heard(all(&[("m/1", b"1,on,2.5"), ("m/2", b"7,off,3")]), 2, 0);
    shows(
        &text,
        &["options = { header = [\"column_1\", \"column_2\", \"column_3\"] }", "column_2 = { type = \"text\" }"],
    );
    shows(&text, &["device = \"topic:1\"", "column_3 = \"/column_3\""]);
    check(&[("t", "a text, with a comma")], &["# t: 1 messages are left out: of no format"]);

    // {"id": "d", "v": 1.5, "in": {"t": 20}}, and two of them in an array.
    let one = b"\xa3\x62id\x61d\x61v\xf9\x3e\x00\x62in\xa1\x61t\x14";
    let two = [&b"\x82"[..], one, one].concat();
    let text = heard(all(&[("c/1", one), ("c/2", &two)]), 3, 0);
    shows(&text, &["format = \"cbor\"", "in_t = \"/in/t\"", "device = \"topic:1\"", "v = { type = \"float64\" }"]);

    use crate::decode::tests::sparkplug::{Is, metric, payload};
    let metrics = [
        metric("bdSeq", 0, 8, Is::Long(1)),
        metric("Node Control/Rebirth", 0, 11, Is::Bool(false)),
        metric("Temp/Inlet", 1, 10, Is::Double(20.5)),
        metric("Count", 2, 7, Is::Int(1)),
    ];
    let device = payload(Some(1), &[metric("On", 3, 11, Is::Bool(true)), metric("Blob", 4, 17, Is::Other(16))]);
    let data = payload(Some(2), &[metric("", 1, 0, Is::Double(21.0))]);
    let messages = all(&[
        ("spBv1.0/g/NBIRTH/n", &payload(Some(0), &metrics)),
        ("spBv1.0/g/DBIRTH/n/d", &device),
        ("spBv1.0/g/NDATA/n", &data),
        ("spBv1.0/STATE/host", b"{}"),
    ]);
    let text = heard(messages, 3, 1);
    shows(&text, &["topics = [\"spBv1.0/#\"]", "format = \"sparkplug\"", "device = \"/id\"\nts = \"/time\""]);
    shows(&text, &["temp_inlet = \"/metrics/Temp~1Inlet\"", "temp_inlet = { type = \"float64\" }"]);
    shows(&text, &["count = { type = \"int64\" }", "on = { type = \"bool\" }", "[stream.sparkplug.fields]"]);
    assert!(!text.contains("Rebirth") && !text.contains("bdseq") && !text.contains("blob"), "{text}");
    let (text, _) = written(&all(&[("spBv1.0/g/NDATA/n", &data)]));
    shows(&text, &["# Sparkplug B without a birth", "kind = \"host\""]);
}

#[test]
fn real_payloads_are_decoded_by_what_is_written() {
    let Some(data) = crate::decode::tests::shared_data() else { return };
    let telemetry = std::fs::read_to_string(data.join("tasmota/telemetry.ndjson")).unwrap();
    // Some devices write their offset: they are told apart from those that do not.
    let topic = |index: usize, line: &str| match line.contains("+01:00") || line.contains("+02:00") {
        true => "tele/new/SENSOR".to_owned(),
        false => format!("tele/plug{}/SENSOR", index % 3),
    };
    let lines = telemetry.lines().enumerate();
    let tasmota = lines.map(|(index, line)| (topic(index, line), Bytes::from(line.to_owned()))).collect::<Vec<_>>();
    let count = tasmota.len() as u64;
    let text = heard(tasmota, count, 0);
    assert!(text.contains("topics = [\"tele/new/SENSOR\"]") && text.contains("# /Uptime is now of one type"), "{text}");
    assert_eq!(text.matches("ts = { at = \"/Time\"").count(), 2, "{text}");
    let file = |name: &str| Bytes::from(std::fs::read(data.join(name)).unwrap());
    let ngsi = ["ngsi/TrafficFlowObserved.example.json", "ngsi/TrafficFlowObserved.example-normalized.json"];
    for (name, ts) in ngsi.iter().zip(["/dateObservedTo", "/dateObservedTo/value"]) {
        let text = heard(vec![("ngsi/traffic".to_owned(), file(name))], 1, 0);
        assert!(text.contains(&format!("ts = {{ at = \"{ts}\"")) && text.contains("device = \"/id\""), "{text}");
    }
    // The twin of number 7 leaves its data out, number 11 has values of two types, 13 has none.
    for number in [1, 2, 3, 4, 5, 6, 8, 9, 10, 12] {
        let resolved =
            serde_json::from_slice::<Vec<serde_json::Value>>(&file(&format!("senml/ex{number}.gen.resolved.json")));
        let payload = file(&format!("senml/ex{number}.json"));
        let text = heard(vec![("senml".to_owned(), payload)], resolved.unwrap().len() as u64, 0);
        assert!(text.contains("format = \"senml\"") && text.contains("device = \"/name\""), "{number}: {text}");
    }
    let text = heard(vec![("cbor".to_owned(), file("senml/ex3.gen.cbor"))], 7, 0);
    assert!(text.contains("format = \"senml_cbor\""), "{text}");
}

#[test]
fn whatever_is_sent_the_result_is_a_configuration() {
    check(&[("only", "text")], &["kind = \"host\""]);
    check(&[("host/x", "{}"), ("host/y", "{}")], &["[stream.stream_host.fields]"]);
    check(&[("", r#"{"":1,"/":2,"~":3,"ü":4,"\"'\n":5}"#)], &[]);
    check(&[("a/b", r#"{"ts":1}"#), ("a_b", r#"{"ts":1}"#), ("a/b/", r#"{"Ts":"x"}"#)], &[]);
    let deep = format!("{}1{}", r#"{"a":"#.repeat(100), "}".repeat(100));
    check(&[("d", &deep)], &[]);
    let names = (0..300).map(|n| format!("\"f{n}\":{n}")).collect::<Vec<_>>().join(",");
    check(&[("many", &format!("{{{names}}}"))], &[]);
    check(&[("$share/x", r#"{"v":1}"#), ("long/x", &format!("{{\"{}\":1}}", "n".repeat(300)))], &[]);
}
