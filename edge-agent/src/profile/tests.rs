use super::*;

const CONFIG: &str = r#"
[edge]
id = "e"
data_dir = "x"
[cloud]
urls = ["http://h"]
token = "t"
[[source]]
kind = "mqtt"
url = "mqtt://h"
topics = ["t/+"]
stream = "s"
[source.map]
device = "topic:1"
ts = { at = "/time", format = "epoch_s" }
heat = "/heat"
state = "/state"
"#;
const STREAM: &str = r#"
[stream.s.fields]
heat = { type = "float64", unit = "°F", store_unit = "°C" }
state = { type = "text" }
"#;

/// Two devices each minute, one spike, one repeat, one silence, one value that stays, one row that is no reading.
fn history() -> String {
    let mut csv = "time,id,heat,state\n".to_owned();
    for minute in 0..2_000_i64 {
        for device in ["a", "b"] {
            if device == "b" && (500..520).contains(&minute) {
                continue;
            }
            let heat = match minute {
                1_000 => 5_000,
                1_500..1_560 => 50,
                _ => 50 + (minute * 7) % 20,
            };
            let state = if minute % 2 == 0 { "on" } else { "off" };
            writeln!(csv, "{},{device},{heat},{state}", 1_600_000_000 + minute * 60).unwrap();
        }
    }
    // The newest of `a` once more.
    csv + "1600119940,a,63,off\n1600119940,a,warm,off\n"
}

#[test]
fn what_is_proposed_can_be_pasted_and_catches_what_it_says() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("history.csv");
    std::fs::write(&file, history()).unwrap();
    let settings = Settings::parse(&format!("{CONFIG}{STREAM}")).unwrap();
    let text = profile(&settings, None, Some("t/{id}"), &file).unwrap();
    let has = |part: &str| assert!(text.contains(part), "no `{part}` in\n{text}");
    has(
        "# 3981 readings of 2 devices in history.csv, 2020-09-13 to 2020-09-14; 1 rows are no readings, the first one for wrong_type: ",
    );
    has("expected_every = \"1m\"");
    has("# absent: 1 times");
    has("duplicates = \"first\"    # 1 readings");
    has("unit = \"°F\", store_unit = \"°C\"");
    has("max 2, max_step 4");
    has("allowed = [\"off\", \"on\"]");
    has("# state: required 0, allowed 0");
    Settings::parse(&format!("{CONFIG}{text}")).unwrap();

    let gzipped = directory.path().join("history.csv.gz");
    let mut encoder = flate2::write::GzEncoder::new(File::create(&gzipped).unwrap(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, history().as_bytes()).unwrap();
    encoder.finish().unwrap();
    let again = profile(&settings, Some("s"), Some("t/{id}"), &gzipped).unwrap();
    assert_eq!(again.replace("csv.gz", "csv"), text);

    let error = profile(&settings, None, None, &file).unwrap_err().to_string();
    assert!(error.contains("--topic"), "{error}");
    let error = profile(&settings, Some("other"), None, &file).unwrap_err().to_string();
    assert!(error.contains("find a source"), "{error}");
}
