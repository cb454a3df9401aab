//! `edge-agent discover`: hears a broker for some seconds and writes a configuration to begin with.
//!
//! Messages whose topics have as many levels and whose payloads have the same names become one source and one stream: a
//! level that differs becomes `+` and names the device, a member that looks like a time becomes `ts`, every other scalar
//! becomes a field. What is no JSON object, or an array of them, is told in a comment. The result is one that
//! `edge-agent check` takes; a person still has to look at it. Pure from the messages on.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use chrono::{DateTime, NaiveDateTime};
use serde_json::Value;
use wire::{FieldName, StreamName};

use crate::config::{Settings, SourceSettings};
use crate::source::mqtt::probe::hear;

/// Messages that are looked at.
const MESSAGES_MAX: usize = 20_000;
/// Levels of objects within objects that become fields.
const DEPTH_MAX: usize = 4;
/// Fields of one stream.
const FIELDS_MAX: usize = 200;
/// Topics that are shown of what is no JSON.
const OTHERS_MAX: usize = 20;

/// Arguments of `discover`.
#[derive(Debug, clap::Args)]
pub struct DiscoverArguments {
    /// Broker, mqtt://host:1883 or mqtts://host:8883
    #[arg(long)]
    url: String,
    #[arg(long)]
    username: Option<String>,
    #[arg(long)]
    password: Option<String>,
    /// What to hear
    #[arg(long, default_value = "#")]
    topic: String,
    #[arg(long, default_value_t = 10)]
    seconds: u64,
}

/// The configuration as text.
///
/// # Errors
/// When the broker cannot be heard, or nothing came.
pub async fn discover(arguments: &DiscoverArguments) -> anyhow::Result<String> {
    let broker = broker(arguments);
    let any = format!(
        "{}{broker}topics = [{}]\nstream = \"any\"\n[source.map]\ndevice = \"topic:0\"\n[stream.any.fields]\nv = {{ type = \"text\" }}\n",
        head(),
        quoted(&arguments.topic)
    );
    let mut settings = Settings::parse(&any).map_err(anyhow::Error::msg)?;
    let Some(SourceSettings::Mqtt(mqtt)) = settings.source.pop() else { bail!("no broker") };
    let client = format!("weir-discover-{}", std::process::id());
    let heard = hear(&mqtt, &client, Duration::from_secs(arguments.seconds), MESSAGES_MAX).await;
    if let Some(error) = heard.error.filter(|_| heard.messages.is_empty()) {
        bail!("{}: {error}", arguments.url);
    }
    if heard.messages.is_empty() {
        bail!("nothing came on {} within {} s", arguments.topic, arguments.seconds);
    }
    let text = write(&broker, &heard.messages);
    Settings::parse(&text).map_err(anyhow::Error::msg).context("read what was written")?;
    Ok(text)
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn head() -> &'static str {
    "[edge]\nid = \"gw-001\"                   # who this gateway is\ndata_dir = \"/var/lib/weir\"\n\n[cloud]\n\
     urls = [\"http://127.0.0.1:7300\"]\ntoken = \"change-me\"\n\n"
}

/// The beginning of each source.
fn broker(arguments: &DiscoverArguments) -> String {
    let mut text = format!("[[source]]\nkind = \"mqtt\"\nurl = {}\n", quoted(&arguments.url));
    for (key, value) in [("username", &arguments.username), ("password", &arguments.password)] {
        if let Some(value) = value {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{key} = {}", quoted(value));
        }
    }
    text
}

/// What the values at one place were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Kinds {
    int: bool,
    float: bool,
    bool: bool,
    text: bool,
}

impl Kinds {
    fn add(&mut self, value: &Value) {
        match value {
            Value::Number(number) if number.is_i64() => self.int = true,
            Value::Number(_) => self.float = true,
            Value::Bool(_) => self.bool = true,
            Value::String(_) => self.text = true,
            _ => {}
        }
    }

    /// One type that takes most; what does not fit goes to quarantine, which a person sees.
    fn name(self) -> &'static str {
        match self {
            Self { text: true, .. } => "text",
            Self { bool: true, .. } => "bool",
            Self { float: true, .. } => "float64",
            _ => "int64",
        }
    }
}

/// Messages that belong together.
#[derive(Debug, Default)]
struct Group {
    topics: BTreeSet<String>,
    messages: u64,
    /// By JSON pointer.
    places: BTreeMap<String, Kinds>,
    /// How the time is written, by pointer: the last word of the values seen.
    times: BTreeMap<String, &'static str>,
}

fn write(broker: &str, messages: &[(String, Bytes)]) -> String {
    let (mut groups, mut others) = (BTreeMap::<(usize, String, String), Group>::new(), BTreeMap::<&str, u64>::new());
    for (topic, payload) in messages {
        let readings = match serde_json::from_slice(payload) {
            Ok(Value::Array(readings)) => readings,
            Ok(object @ Value::Object(_)) => vec![object],
            _ => Vec::new(),
        };
        // A topic that begins with $ is the broker's own.
        let first = readings.first().filter(|_| !topic.is_empty() && !topic.starts_with('$'));
        let Some(Value::Object(first)) = first else {
            *others.entry(topic).or_default() += 1;
            continue;
        };
        let names = first.keys().map(String::as_str).collect::<BTreeSet<_>>();
        let names = names.into_iter().collect::<Vec<_>>().join(" ");
        let levels = topic.split('/').count();
        let begins = topic.split('/').next().unwrap_or_default().to_owned();
        let group = groups.entry((levels, begins, names)).or_default();
        group.topics.insert(topic.clone());
        group.messages += 1;
        readings.iter().for_each(|reading| group.look(reading, &mut String::new(), 0));
    }
    let mut out = head().to_owned();
    let mut streams = BTreeSet::new();
    for (number, group) in groups.values().enumerate() {
        group.write(broker, number, &mut streams, &mut out);
    }
    if streams.is_empty() {
        // So that it is a configuration, and one that works.
        out.push_str("[[source]]\nkind = \"host\"\n\n");
    }
    for (topic, count) in others.iter().take(OTHERS_MAX) {
        let _ = writeln!(out, "# {}: {count} messages that are no JSON object", topic.escape_debug());
    }
    out
}

impl Group {
    fn look(&mut self, value: &Value, at: &mut String, depth: usize) {
        match value {
            Value::Object(members) if depth < DEPTH_MAX => {
                for (name, value) in members {
                    let len = at.len();
                    at.push('/');
                    at.push_str(&name.replace('~', "~0").replace('/', "~1"));
                    self.look(value, at, depth + 1);
                    at.truncate(len);
                }
            }
            Value::Object(_) | Value::Array(_) | Value::Null => {}
            _ if self.places.len() >= FIELDS_MAX && !self.places.contains_key(at) => {}
            _ => {
                self.places.entry(at.clone()).or_default().add(value);
                if let Some(written) = time(at, value) {
                    self.times.insert(at.clone(), written);
                }
            }
        }
    }

    fn write(&self, broker: &str, number: usize, streams: &mut BTreeSet<String>, out: &mut String) {
        let topics = self.topics.iter().map(|topic| topic.split('/').collect::<Vec<_>>()).collect::<Vec<_>>();
        let distinct = |level: usize| topics.iter().map(|topic| topic[level]).collect::<BTreeSet<_>>().len();
        let levels = (0..topics[0].len()).map(|level| (level, distinct(level))).collect::<Vec<_>>();
        let filter = levels.iter().map(|(level, count)| if *count == 1 { topics[0][*level] } else { "+" });
        let filter = filter.collect::<Vec<_>>().join("/");
        let fixed = levels.iter().filter(|(_, count)| *count == 1).map(|(level, _)| topics[0][*level]);
        let stream = name_of(&fixed.collect::<Vec<_>>().join("_"), "stream", number, |name| {
            let own = matches!(name, "host" | "alerts" | "quarantine" | "losses" | "system");
            !own && name.parse::<StreamName>().is_ok() && !streams.contains(name)
        });
        streams.insert(stream.clone());
        // The level with most names is that of the devices.
        let device =
            levels.iter().filter(|(_, count)| *count > 1).max_by_key(|(level, count)| (*count, usize::MAX - level));
        let by_name = || self.places.keys().find(|at| DEVICES.contains(&last(at).to_lowercase().as_str()));
        let device = match (device, by_name()) {
            (Some((level, _)), _) => format!("topic:{level}"),
            (None, Some(at)) => at.clone(),
            (None, None) => format!("topic:{}", levels.len() - 1),
        };
        let ts = self.times.iter().next();
        let _ = write!(out, "# {} messages on {} topics\n{broker}", self.messages, self.topics.len());
        let _ = writeln!(
            out,
            "topics = [{}]\nstream = \"{stream}\"\n[source.map]\ndevice = {}",
            quoted(&filter),
            quoted(&device)
        );
        match ts {
            Some((at, format)) => drop(writeln!(out, "ts = {{ at = {}, {format} }}", quoted(at))),
            None => out.push_str("ts = \"arrival\"\n"),
        }
        let mut fields = BTreeMap::new();
        for (at, kinds) in &self.places {
            if Some(at) == ts.map(|(at, _)| at) || *at == device {
                continue;
            }
            let name = name_of(at, "field", fields.len(), |name| {
                name.parse::<FieldName>().is_ok() && !fields.contains_key(name) && is_free(name)
            });
            let _ = writeln!(out, "{name} = {}", quoted(at));
            fields.insert(name, kinds.name());
        }
        let _ = writeln!(out, "\n[stream.{stream}.fields]");
        fields.iter().for_each(|(name, kind)| drop(writeln!(out, "{name} = {{ type = \"{kind}\" }}")));
        out.push('\n');
    }
}

/// Names of members that say which device it is.
const DEVICES: [&str; 8] = ["device", "device_id", "deviceid", "dev_eui", "deveui", "id", "report_id", "sensor"];
/// Names of members that say when.
const TIMES: [&str; 9] =
    ["ts", "time", "timestamp", "datetime", "date_time", "observed_at", "dateobserved", "time_ms", "created_at"];

fn last(at: &str) -> &str {
    at.rsplit('/').next().unwrap_or(at)
}

/// Names that a mapping or a table has already.
fn is_free(name: &str) -> bool {
    !matches!(name, "device" | "ts" | "quality")
}

/// How the time at this place is written, if it is one.
fn time(at: &str, value: &Value) -> Option<&'static str> {
    if !TIMES.contains(&last(at).to_lowercase().as_str()) {
        return None;
    }
    match value {
        Value::Number(number) => match number.as_f64()? {
            1e9..1e10 => Some("format = \"epoch_s\""),
            1e12..1e13 => Some("format = \"epoch_ms\""),
            1e15..1e16 => Some("format = \"epoch_us\""),
            1e18..1e19 => Some("format = \"epoch_ns\""),
            _ => None,
        },
        Value::String(text) if DateTime::parse_from_rfc3339(text).is_ok() => Some("format = \"rfc3339\""),
        Value::String(text) => ["%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S"]
            .iter()
            .zip(["format = \"%Y-%m-%dT%H:%M:%S\", zone = \"UTC\"", "format = \"%Y-%m-%d %H:%M:%S\", zone = \"UTC\""])
            .find(|(format, _)| NaiveDateTime::parse_from_str(text, format).is_ok())
            .map(|(_, written)| written),
        _ => None,
    }
}

/// A name as tables have it: small letters, digits and `_`; another word and a number where that is none.
fn name_of(text: &str, otherwise: &str, number: usize, is_good: impl Fn(&str) -> bool) -> String {
    let sign = |sign: char| if sign.is_ascii_alphanumeric() { sign.to_ascii_lowercase() } else { '_' };
    let name = text.trim_matches('/').chars().map(sign).collect::<String>();
    let name = name.trim_matches('_');
    // A window's fields are longer by a suffix.
    let name = &name[..name.len().min(50)];
    let tries = [name.to_owned(), format!("{otherwise}_{name}")];
    let numbered = (number..).map(|number| format!("{otherwise}_{number}"));
    tries.into_iter().chain(numbered).find(|name| is_good(name)).expect("there is always one more number")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(messages: &[(&str, &str)], expected: &[&str]) {
        let messages =
            messages.iter().map(|(topic, payload)| ((*topic).to_owned(), Bytes::from((*payload).to_owned())));
        let text = write("[[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\n", &messages.collect::<Vec<_>>());
        if let Err(error) = Settings::parse(&text) {
            panic!("{error}\n{text}");
        }
        for expected in expected {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
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
                "# a: 1 messages that are no JSON object",
                "# b\\u{7}: 1 messages",
            ],
        );
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
}
