use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::*;

const HEAD: &str = r#"
[edge]
id = "gw-1"
data_dir = "x"
[cloud]
urls = ["http://127.0.0.1:7300"]
token = "secret"
"#;
const TRAFFIC: &str = r#"
[[source]]
kind = "mqtt"
url = "mqtt://127.0.0.1:1883"
topics = ["city/traffic/+"]
stream = "traffic"
[source.map]
device = "topic:2"
ts = { at = "/TIMESTAMP", format = "%Y-%m-%dT%H:%M:%S", zone = "Europe/Copenhagen" }
speed = "/avgSpeed"
[stream.traffic.fields]
speed = { type = "float64", min = 0 }
count = { type = "int64" }
[stream.traffic.window.5m]
size = "5m"
"#;

#[test]
fn the_shipped_configuration_is_right() {
    let settings = Settings::parse(include_str!("../../../configs/edge.toml")).unwrap();
    assert!(matches!(&settings.source[0], SourceSettings::Mqtt(mqtt) if mqtt.stream.as_str() == "traffic"));
}

/// Those of docs/field-engineer.md, one behind the other; the last one writes the fields of the one before anew.
#[test]
fn the_configurations_of_the_docs_are_right() {
    let docs = include_str!("../../../docs/field-engineer.md");
    let blocks = docs.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect::<Vec<_>>();
    let [identity, source, judged] = blocks[..] else { panic!("{} of them", blocks.len()) };
    let identity = identity.replace("[cloud]", "data_dir = \"x\"\n[cloud]");
    let settings = Settings::parse(&format!("{identity}{source}")).unwrap();
    assert_eq!(settings.stream.len(), 1);
    let (source, _) = source.split_once("[stream.counts.fields]").unwrap();
    let settings = Settings::parse(&format!("{identity}{source}{judged}")).unwrap();
    assert_eq!((settings.rule.len(), settings.publisher().is_ok()), (1, true));
}

#[test]
fn columns_keep_the_order_of_the_file_and_names_come_from_the_streams() {
    let settings = Settings::parse(&format!("{HEAD}{TRAFFIC}")).unwrap();
    let stream = settings.stream.values().next().unwrap();
    let names = stream.fields.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>();
    assert_eq!(names, ["speed", "count"]);
    let SourceSettings::Mqtt(mqtt) = &settings.source[0] else { panic!() };
    assert_eq!(mqtt.client(&settings.edge.id, 0), "weir-gw-1-traffic");
    assert_eq!(mqtt.client(&settings.edge.id, 1), "weir-gw-1-traffic-2");
    assert_eq!(mqtt.map.device, Some(Place::Topic(2)));
    let lanes = settings.lanes();
    assert_eq!(lanes.iter().map(|lane| lane.name.as_str()).collect::<Vec<_>>(), ["first", "rest"]);
    assert_eq!(
        lanes[0].streams.iter().map(StreamName::as_str).collect::<Vec<_>>(),
        ["quarantine", "losses", "alerts", "traffic_5m"]
    );
}

#[test]
fn wrong_configurations_say_what_is_wrong() {
    let check = |from: &str, to: &str, expected: &str| {
        let text = format!("{HEAD}{TRAFFIC}");
        assert!(text.contains(from), "{from}");
        let error = Settings::parse(&text.replacen(from, to, 1)).unwrap_err();
        assert!(error.contains(expected), "{to}: {error}");
        assert!(error.contains("line "), "{to}: {error}");
    };
    check("data_dir", "data_dri", "did you mean `data_dir`?");
    check("topics = ", "topic = ", "did you mean `topics`?");
    check("kind = \"mqtt\"", "kind = \"mqqt\"", "mqtt");
    check("urls = [\"http://127.0.0.1:7300\"]", "urls = []", "at least one");
    check("token = \"secret\"", "", "no token");
    check("mqtt://127.0.0.1:1883", "http://127.0.0.1:1883", "mqtt://host:1883");
    check("mqtt://127.0.0.1:1883", "mqtt://a:b@127.0.0.1:1883", "not into the url");
    check("city/traffic/+", "city/traff+", "no topic filter");
    check("city/traffic/+", "city/#/x", "no topic filter");
    check("city/traffic/+", "$share/g/x", "set `share`");
    check("topics = ", "connections = 2\ntopics = ", "need `share`");
    check("stream = \"traffic\"", "stream = \"other\"", "no [stream.other]");
    check("device = \"topic:2\"", "", "no `device`");
    check("device = \"topic:2\"", "device = \"topic:two\"", "names no place");
    check("device = \"topic:2\"", "device = \"REPORT_ID\"", "names no place");
    check("speed = \"/avgSpeed\"", "sped = \"/avgSpeed\"", "did you mean `speed`?");
    check("speed = \"/avgSpeed\"", "quality = \"/q\"", "reserved");
    check("speed = { type", "_speed = { type", "reserved");
    check("speed = { type = \"float64\"", "speed = { type = \"float\"", "float64");
    check("speed = { type = \"float64\"", "speed = { type = \"text\"", "for numbers");
    check("min = 0", "min = 2, max = 1", "min is above max");
    check("min = 0", "min = 9007199254740993, max = 9007199254740992", "min is above max");
    check("min = 0", "max = nan", "not nan");
    check("min = 0", "min = \"0\"", "a number");
    check("min = 0", "unit = \"kmph\"", "did you mean `kmh`?");
    check("min = 0", "unit = \"km/h\", store_unit = \"°C\"", "speed: km/h and °C do not measure the same");
    check("min = 0", "store_unit = \"m/s\"", "in what do the values come");
    check("type = \"int64\"", "type = \"int64\", unit = \"km/h\", store_unit = \"m/s\"", "make the type float64");
    check("type = \"int64\"", "type = \"bool\", unit = \"km/h\"", "units are for numbers");
    check("Europe/Copenhagen", "Copenhagen", "no time zone");
    check(", zone = \"Europe/Copenhagen\"", "", "add zone");
    check("format = \"%Y", "format = \"%!", "strftime");
    check(
        "[stream.traffic.fields]",
        "[stream.traffic]\nwindows_max_bytes = \"2GiB\"\n[stream.traffic.fields]",
        "to 1GiB",
    );
    check(
        "[stream.traffic.fields]",
        "[stream.traffic]\nwindows_max_bytes = \"9B\"\n[stream.traffic.fields]",
        "from 1MiB",
    );
    check("size = \"5m\"", "size = \"0s\"", "1 ms to 366 days");
    check("size = \"5m\"", "size = \"5m\"\nevery = \"6m\"", "at most size");
    check("size = \"5m\"", "size = \"5m\"\nevery = \"100ms\"", "make every longer");
    check("size = \"5m\"", "size = \"5m\"\ngap = \"5m\"", "neither size nor every");
    check("size = \"5m\"", "size = \"5m\"\nby = [\"lane\"]", "`lane` must be a field");
    check("size = \"5m\"", "size = \"5m\"\nby = \"road\"", "or a list of fields");
    check("size = \"5m\"", "size = \"5m\"\naggregates = [\"p90\"]", "p95");
    check("size = \"5m\"", "size = \"5m\"\naggregates = [\"min\", \"min\"]", "min twice");
    check("min = 0", "max_step = -1", "a number from 0");
    check("min = 0", "stuck_after = \"0s\"", "more than 0");
    check("min = 0", "allowed = [\"a\"]", "allowed has");
    check("min = 0", "flag = [\"max\"]", "names max, which is not set");
    check(
        "min = 0",
        "max_step = 1, reject = [\"max_step\"], flag = [\"max_step\"]",
        "max_step is in reject and in flag",
    );
    check(
        "[stream.traffic.fields]",
        "[stream.traffic]\nfill = \"last\"\n[stream.traffic.fields]",
        "need expected_every",
    );
    check("[stream.traffic.fields]", "[stream.traffic]\nreject = [\"in_order\"]\n[stream.traffic.fields]", "not set");
    check(
        "[stream.traffic.fields]",
        "[stream.traffic]\nabsent_afer = \"1s\"\n[stream.traffic.fields]",
        "`absent_after`?",
    );
    check("size = \"5m\"", "size = \"five\"", "no duration");
    check("[stream.traffic.window.5m]", "[stream.traffic.window.5-m]", "not a name");
    check("[edge]", "[journal]\nsegment_bytes = \"1GiB\"\n[edge]", "two times");
    check("[edge]", "[cut]\nrows = 0\n[edge]", "[cut] rows");
    check("topics = ", "max_payload = \"8MiB\"\ntopics = ", "a quarter");
    let large = "max_payload = \"17MiB\"\ntopics = ";
    let text = format!("[journal]\nsegment_bytes = \"68MiB\"\n{HEAD}{TRAFFIC}").replace("topics = ", large);
    assert!(Settings::parse(&text).unwrap_err().contains("at most 16 MiB"));
    Settings::parse(&text.replace("17MiB", "16MiB")).unwrap();
}

#[test]
fn a_password_may_lie_in_a_file_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let (file, secret) = (directory.path().join("edge.toml"), directory.path().join("password"));
    std::fs::write(&secret, "s3cret\nnot this\n").unwrap();
    let keys = format!("username = \"u\"\npassword_file = {secret:?}\n");
    let publish = format!("[publish]\nurl = \"mqtt://b\"\n{keys}");
    let text = format!("{HEAD}{TRAFFIC}{publish}").replace("topics = ", &(keys + "topics = "));
    std::fs::write(&file, &text).unwrap();
    let settings = Settings::load(&file).unwrap();
    let SourceSettings::Mqtt(mqtt) = &settings.source[0] else { panic!("{:?}", settings.source) };
    assert_eq!(mqtt.password.as_deref(), Some("s3cret"));
    assert_eq!(settings.publisher().unwrap().password.as_deref(), Some("s3cret"));
    assert!(!format!("{settings:?}").contains("s3cret") && !settings.text.contains("s3cret"));
    std::fs::remove_file(&secret).unwrap();
    let error = Settings::load(&file).unwrap_err().to_string();
    assert!(error.contains("password"), "{error}");
    let both = text.replace("username = ", "password = \"x\"\nusername = ");
    assert!(Settings::parse(&both).unwrap_err().contains("both password and password_file"));
}

#[test]
fn no_secret_is_shown() {
    let text = format!("{HEAD}{TRAFFIC}").replace("topics = ", "username = \"u\"\npassword = \"secret\"\ntopics = ");
    assert!(!format!("{:?}", Settings::parse(&text).unwrap()).contains("secret"));
}

#[test]
fn what_is_right_and_may_not_be_meant_is_said() {
    let check = |more: &str, from: &str, to: &str, expected: &str| {
        let text = format!("{HEAD}{TRAFFIC}{more}").replace(from, to);
        let warnings = Settings::parse(&text).unwrap().warnings().join("\n");
        assert_eq!(warnings.is_empty(), expected.is_empty(), "{warnings}");
        assert!(warnings.contains(expected), "{warnings}");
    };
    check("", "", "", "");
    check("", "http://127.0.0.1:7300", "http://cloud:7300", "in the clear");
    check("[journal]\nmax_bytes = \"511MiB\"\n", "", "", "raise journal.max_bytes");
    check("[journal]\nmax_bytes = \"512MiB\"\n", "", "", "");
    check("[journal]\nmax_bytes = \"64MiB\"\n", "[stream.traffic.window.5m]\nsize = \"5m\"", "", "");
    let told = "[[rule]]\nname = \"slow\"\non = \"traffic\"\nwhen = \"speed < 5\"\ntopic = \"a/{device}\"\n";
    check(
        told,
        "",
        "",
        "(slow) stand still when a lane with on_full = \"refuse\" is full (first, rest), and then the journal",
    );
    check(told, "topic = \"a/{device}\"\n", "", "");
    let lane = |name: &str, streams: &str| {
        let size = "max_bytes = \"64MiB\"\non_full = \"drop_oldest\"";
        format!("[[lane]]\nname = \"{name}\"\nstreams = [{streams}]\npriority = 1\n{size}\n")
    };
    let all = ["traffic_5m", "quarantine", "losses", "alerts"].map(|stream| format!("\"{stream}\"")).join(", ");
    check(&format!("{told}{}{}", lane("urgent", &all), lane("rest", "")), "", "", "");
    check("", "topic:2", "topic:3", "[[source]] `traffic`: \"topic:3\": the levels of `city/traffic/+` are 0 to 2");
    check("", "type = \"int64\"", "type = \"int64\", required = true", "`count` is required and map does not name it");
    check("", "city/traffic/+", "city/#", "");
    let lane = "[[lane]]\nname = \"a\"\nstreams = [\"traffic_5m\", \"alerts\", \"trafic\"]\n";
    check(lane, "", "", "[[lane]] `a`: nothing fills the stream `trafic`; did you mean `traffic`?");
    check(lane, "trafic\"", "traffic\"", "");
}

#[test]
fn the_lane_for_the_rest_keeps_what_is_not_said_of_it() {
    let more =
        "[[lane]]\nname = \"rest\"\nstreams = []\non_full = \"drop_oldest\"\n[[lane]]\nname = \"a\"\nstreams = []\n";
    let lanes = Settings::parse(&format!("{HEAD}{TRAFFIC}{more}")).unwrap().lanes();
    let lanes = lanes.iter().map(|lane| (lane.name.as_str(), lane.max_bytes() >> 20)).collect::<Vec<_>>();
    assert_eq!(lanes, [("first", 256), ("a", 256), ("rest", 4_096)]);
}

#[test]
fn no_error_shows_a_secret() {
    let check = |from: &str, to: &str, says: &str| {
        let text = format!("{HEAD}{TRAFFIC}");
        assert!(text.contains(from), "{from}");
        let error = Settings::parse(&text.replacen(from, to, 1)).unwrap_err();
        assert!(!error.contains("4711") && error.contains(says), "{to}: {error}");
    };
    let token = "token = \"secret\"";
    check(token, "token = 4711", "expected a string");
    check(token, "token = 4711.5", "expected a string");
    check(token, "token = [\"4711\"]", "expected a string");
    check(token, "token = s4711", "line 7");
    check(token, "token = \"s4711", "line 7");
    check(token, "token = \"\"\"\nx\n4711\\q\"\"\"", "line 9");
    check(token, "tokn = \"4711\"", "did you mean `token`?");
    check(token, "token = \"a\"\ntoken = \"4711\"", "duplicate key");
    check(token, "token = \"a\", x = \"4711\"", "line 7");
    check("topics = ", "password = 4711\ntopics = ", "expected a string");
    check("topics = ", "pasword = \"4711\"\ntopics = ", "did you mean `password`?");
    check("topics = ", "username = \"u\"\npassword = \"4711\ntopics = ", "line 13");
    check("http://127.0.0.1:7300", "http://u:4711@h", "user or a password");
    check("http://127.0.0.1:7300", "ftp://u:4711@h", "user or a password");
    check("http://127.0.0.1:7300", "http://u:4711@h:x", "no address");
    check("mqtt://127.0.0.1:1883", "mqtt://u:4711@h:x", "no address");
    check("mqtt://127.0.0.1:1883", "http://u:4711@h", "not into the url");
    // What is no secret is shown, as it helps.
    let error = Settings::parse(&format!("{HEAD}{TRAFFIC}").replace("\"float64\"", "4812")).unwrap_err();
    assert!(error.contains("speed = { type = 4812") && error.contains("^"), "{error}");
}

/// What serde says that it expects in place of `zzz`.
fn expected(text: &str) -> Vec<String> {
    let error = toml::from_str::<Settings>(text).unwrap_err().to_string();
    let at = error.find("`zzz`, expected ").unwrap_or_else(|| panic!("{text}: {error}"));
    error[at..].split('`').skip(3).step_by(2).map(str::to_owned).collect()
}

#[test]
fn the_shipped_configuration_shows_every_key() {
    let shipped = include_str!("../../../configs/edge.toml");
    // From a header to the next one; commented out or not.
    let section = |header: &str| {
        let is_header = |line: &&str| line.trim_start_matches("# ").starts_with('[');
        let lines = shipped.lines().skip_while(|line| !line.trim_start_matches("# ").starts_with(header));
        let lines = lines.enumerate().take_while(|(index, line)| *index == 0 || !is_header(line));
        lines.map(|(_, line)| line).collect::<Vec<_>>().join("\n")
    };
    let check = |header: &str, keys: Vec<String>| {
        let section = section(header);
        assert!(!section.is_empty(), "configs/edge.toml has no {header}");
        for key in keys {
            let written = |line: &str| {
                let line = line.trim_start_matches("# ");
                line.starts_with(&format!("{key} = ")) || line.contains(&format!(" {key} = "))
            };
            // A table of its own has its own header.
            let table = format!("{}.{key}", header.trim_matches(['[', ']']));
            let has_header = shipped.contains(&format!("[{table}]")) || shipped.contains(&format!("[{table}."));
            assert!(section.lines().any(written) || has_header, "{header} does not show `{key}`");
        }
    };
    let mut tables = expected("zzz = 1");
    tables.retain(|table| match table.as_str() {
        "edge" | "admin" | "cloud" | "journal" | "cut" | "clock" | "alerts" | "publish" => {
            check(&format!("[{table}]"), expected(&format!("[{table}]\nzzz = 1")));
            false
        }
        _ => true,
    });
    assert_eq!(tables, ["source", "stream", "rule", "command", "lane"], "a table is not looked at here");
    check("[[rule]]", expected("[[rule]]\nzzz = 1"));
    check("[rule.command]", expected("[[rule]]\nname = \"r\"\non = \"s\"\ncommand = { zzz = 1 }"));
    check("[[command]]", expected("[[command]]\nzzz = 1"));
    check("[command.publish]", expected("[[command]]\nname = \"c\"\npublish = { zzz = 1 }"));
    check("[[lane]]", expected("[[lane]]\nzzz = 1"));
    check("[stream.traffic]", expected("[stream.s]\nzzz = 1"));
    check("[stream.traffic.fields]", expected("[stream.s.fields]\nv = { zzz = 1 }"));
    check("[stream.traffic.window.5m]", expected("[stream.s.window.w]\nzzz = 1"));
    let kinds = expected("[[source]]\nkind = \"zzz\"");
    for kind in &kinds {
        let at = shipped.find(&format!("kind = \"{kind}\"")).unwrap_or_else(|| panic!("no source of kind `{kind}`"));
        let source = &shipped[at..];
        let source = &source[..source.find("\n[").unwrap_or(source.len())];
        let source = &source[..source.find("\n# [[source]]").unwrap_or(source.len())];
        for key in expected(&format!("[[source]]\nkind = \"{kind}\"\nzzz = 1")) {
            let written = |line: &str| {
                line.trim_start_matches("# ").starts_with(&format!("{key} = "))
                    || line.contains(&format!("{key} = ")) && line.starts_with("# ")
                    || line.contains(&key) && line.contains("as above")
                    || line.starts_with(&format!("# [[source.{key}]]"))
            };
            let table = source.lines().any(written) || shipped[at..].contains(&format!("[source.{key}]"));
            assert!(table, "the source of kind `{kind}` does not show `{key}`");
        }
    }
}

/// Whatever stands in the file, it is read or refused; what is read can be used.
#[test]
fn a_configuration_changed_at_random_is_used_or_refused() {
    const VALUES: &[&str] = &[
        "\"\"",
        "0",
        "-1",
        "9223372036854775807",
        "1e308",
        "nan",
        "\"x\"",
        "[]",
        "{}",
        "[\"\"]",
        "true",
        "\"0s\"",
        "\"1ns\"",
        "\"99999999999999999999h\"",
        "\"18446744073709551615s\"",
        "\"18446744073709551615TiB\"",
        "\"99999999999GiB\"",
        "\"0B\"",
        "\"/*/*\"",
        "\"/\"",
        "\"key:99\"",
        "\"topic:18446744073709551616\"",
        "\"message:\"",
        "\"const:\"",
        "\"%\"",
        "\"é\"",
        "{ at = \"/t\", format = \"%\" }",
        "{ at = \"/t\", format = \"epoch_ns\" }",
        "\"json\"",
        "\"csv\"",
        "\"sparkplug\"",
    ];
    let seed = rand::random::<u64>();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let shipped = include_str!("../../../configs/edge.toml").replace("\n# ", "\n");
    let shipped = shipped.lines().collect::<Vec<_>>();
    let own = format!("{HEAD}{TRAFFIC}");
    let own = own.lines().collect::<Vec<_>>();
    let mut read = 0;
    for _ in 0..3_000 {
        let mut lines = own.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
        for _ in 0..random.random_range(1..4) {
            let at = random.random_range(0..lines.len());
            match random.random_range(0..4) {
                0 => drop(lines.remove(at)),
                1 => lines.insert(at, (*shipped.choose(&mut random).unwrap()).to_owned()),
                2 => lines.swap(at, random.random_range(0..own.len()).min(at)),
                _ => {
                    if let Some((key, _)) = lines[at].clone().split_once('=') {
                        lines[at] = format!("{key}= {}", VALUES.choose(&mut random).unwrap());
                    }
                }
            }
        }
        let text = lines.join("\n");
        let used = std::panic::catch_unwind(|| {
            let Ok(settings) = Settings::parse(&text) else { return false };
            settings.warnings();
            crate::pipeline::Pipeline::new(&settings, segment_log::Position(0), &std::collections::BTreeMap::new());
            true
        });
        read += usize::from(used.unwrap_or_else(|_| panic!("panicked with\n{text}")));
    }
    assert!((100..2_900).contains(&read), "{read} were right");
}

#[test]
fn a_clock_is_trusted_as_the_configuration_says() {
    let read = |clock: &str| Settings::parse(&format!("{HEAD}{TRAFFIC}[clock]\n{clock}"));
    let unset = read("").unwrap().clock;
    assert_eq!(
        unset,
        read("trust = \"any\"\nwait = \"30s\"\non_untrusted = \"correct\"\nmax_skew = \"5s\"").unwrap().clock
    );
    let check = |clock: &str, expected: &str| {
        let error = read(clock).unwrap_err();
        assert!(error.contains(expected), "{clock}: {error}");
    };
    check("trust = \"npt\"", "ntp");
    check("wiat = \"1s\"", "did you mean `wait`?");
    check("wait = \"2d\"", "at most 1d");
    check("max_skew = \"500ms\"", "at least 1s");
    check("on_untrusted = \"drop\"", "flag");
}
