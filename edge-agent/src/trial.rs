//! What becomes of one message, step by step, for people who write a mapping: `edge-agent try`.
//!
//! The same decoder, checks and rules as in the pipeline, with nothing remembered: a Sparkplug alias is known only when the
//! message is a birth, no row is late, and no alert is there already. Reads and writes nothing.

use std::fmt::Write;

use bytes::Bytes;
use chrono::{DateTime, SecondsFormat};

use crate::config::{Decoding, Settings, SourceSettings, StreamSettings, Unit};
use crate::decode::{Decoder, Reading, Rejected, Value};
use crate::rules::{Of, Rules, Turn, Verdict, When};
use crate::validate::{Judge, Outcome, Quality};

/// Bytes of a payload that are shown.
const SHOWN_BYTES: usize = 200;

/// What each source that would get the message makes of it.
///
/// # Errors
/// When no source would get it.
pub fn explain(
    settings: &Settings,
    source: Option<&str>,
    topic: Option<&str>,
    payload: Bytes,
    now_us: i64,
) -> Result<String, String> {
    let mut text = String::new();
    for candidate in settings.source.iter().filter(|candidate| source.is_none_or(|name| name == candidate.name())) {
        let Some(decoding) = candidate.decoding() else { continue };
        let of_filter = match candidate {
            SourceSettings::Mqtt(mqtt)
                if topic.is_some_and(|t| !mqtt.topics.iter().any(|filter| matches(filter, t))) =>
            {
                continue;
            }
            SourceSettings::Mqtt(mqtt) => mqtt.topics.first().map(|filter| filter.replace(['+', '#'], "example")),
            _ => None,
        };
        let topic = topic.map(str::to_owned).or(of_filter).unwrap_or_else(|| candidate.name().to_owned());
        let stream = settings.stream.get(candidate.stream()).ok_or("a source has no stream")?;
        let rules = Rules::new(settings)?;
        let on = Trial { source: candidate, stream, judge: Judge::new(stream), rules, settings, now_us };
        on.one(&mut text, &decoding, &topic, &payload);
    }
    if text.is_empty() {
        let names = settings.source.iter().map(SourceSettings::name).collect::<Vec<_>>().join(", ");
        return Err(format!("no source gets this message; there are {names}"));
    }
    Ok(text)
}

/// One source's way through the middle.
struct Trial<'t> {
    settings: &'t Settings,
    source: &'t SourceSettings,
    stream: &'t StreamSettings,
    judge: Judge,
    rules: Rules,
    now_us: i64,
}

impl Trial<'_> {
    fn one(mut self, text: &mut String, decoding: &Decoding, topic: &str, payload: &Bytes) {
        let mut decoder = Decoder::new(decoding, self.stream);
        let mut out = Vec::new();
        let filtered = decoder.decode(topic, payload, self.now_us, &mut out);
        let (name, to, format, bytes) = (self.source.name(), self.source.stream(), decoding.format, payload.len());
        line(text, format_args!("source {name}: {format}, topic {topic}, {bytes} bytes, to stream {to}"));
        for (index, result) in out.iter_mut().enumerate() {
            match result {
                Ok(reading) => self.decoded(text, index + 1, reading),
                Err(rejected) => {
                    let of = rejected.device.as_ref().map(|device| format!(" of device {device}")).unwrap_or_default();
                    line(text, format_args!("reading {}{of}: not decoded", index + 1));
                    quarantined(text, rejected.reason, &rejected.detail, &shown(rejected));
                }
            }
        }
        if filtered > 0 {
            line(text, format_args!("{filtered} filtered: not what `when` or the mapping asks for"));
        }
        for command in decoder.take_commands() {
            line(text, format_args!("asks for a birth: {}", command.topic));
        }
    }

    fn decoded(&mut self, text: &mut String, number: usize, reading: &mut Reading) {
        line(text, format_args!("reading {number}: device {}, ts {}", reading.device, time(reading.ts)));
        let before = reading.values.clone();
        let mut quality = Quality::default();
        // The watermark of nothing: no device is absent.
        let judged = self.judge.judge(reading, self.now_us, 0, i64::MIN, &mut quality);
        for (((name, field), was), is) in self.stream.fields.iter().zip(&before).zip(&reading.values) {
            let unit = |unit: Option<Unit>| unit.map(|unit| format!(" {unit}")).unwrap_or_default();
            let converted =
                if was == is { String::new() } else { format!(" = {}{}", shown_value(is), unit(field.store_unit)) };
            line(text, format_args!("  {name} {} = {}{}{converted}", field.kind, shown_value(was), unit(field.unit)));
        }
        match judged {
            Err((reason, detail)) => return quarantined(text, reason, &detail, ""),
            Ok(Outcome::Repeat) => return line(text, format_args!("  checks: repeats one before it, no row")),
            Ok(Outcome::Keep { .. }) => {}
        }
        let found = match quality.as_str() {
            "" => "passed".to_owned(),
            words => format!("suspect, quality {words}"),
        };
        let waits = if self.judge.waits { ", when it has waited for one that repeats it" } else { "" };
        line(text, format_args!("  checks: {found}, a row of {}{waits}", self.source.stream()));
        self.windows(text, reading.ts);
        self.alerts(text, reading);
    }

    fn windows(&self, text: &mut String, ts: i64) {
        for (window, settings) in self.stream.windows(self.source.stream()) {
            let line = |out: &mut String, what: String| line(out, format_args!("  window {window}: {what}"));
            if let Some(last) = settings.last_start(ts) {
                let (size, every) = (settings.size.micros(), settings.every_us());
                let more = (last - ts + size - 1) / every;
                let more =
                    if more > 0 { format!(", and {more} before it that it lies in, too") } else { String::new() };
                line(text, format!("{} to {}{more}", time(last), time(last + size)));
            } else {
                line(text, "a session".to_owned());
            }
            for rule in self.settings.rule.iter().filter(|rule| rule.on == window) {
                line(text, format!("rule {} judges it when it closes", rule.name));
            }
        }
    }

    /// What each rule on the stream says, and which alerts begin and end.
    fn alerts(&mut self, text: &mut String, reading: &Reading) {
        let Some(input) = self.rules.input(self.source.stream()) else { return };
        for (rule, hold_us, verdict) in self.rules.verdicts(input, &reading.device, &reading.values) {
            let says = match verdict {
                Verdict::True if hold_us > 0 => format!("true; fires when it stays so for {} s", hold_us as f64 / 1e6),
                Verdict::True => "true".to_owned(),
                Verdict::False => "false".to_owned(),
                Verdict::Null => "null, which changes nothing".to_owned(),
                Verdict::Fails(why) => format!("fails, which changes nothing: {why}"),
                Verdict::OfSilence => "is about silence, not about a message".to_owned(),
            };
            line(text, format_args!("  rule {rule}: {says}"));
        }
        let when = When { from: reading.ts, to: reading.ts, arrival: self.now_us };
        self.rules.row(input, Of::device(&reading.device), when, &reading.values);
        for alert in self.rules.take() {
            let (word, severity, rule, message) = (alert.turn.word(), alert.severity, &alert.rule, &alert.message);
            line(text, format_args!("  alert {word}: {severity} {rule}: {message:?}, labels {}", alert.labels));
            if alert.turn == Turn::Backfill {
                line(text, format_args!("    too old to act on: recorded, not published"));
            }
            if let Some(topic) = &alert.topic {
                line(text, format_args!("    published on {topic}"));
            }
            if let Some(command) = &alert.command {
                let payload =
                    if alert.turn == Turn::Resolved { command.resolved.as_ref() } else { Some(&command.firing) };
                if let Some(payload) = payload {
                    line(text, format_args!("    command to {}: {payload}", command.topic));
                }
            }
        }
    }
}

fn shown_value(value: &Option<Value>) -> String {
    match value {
        None => "null".to_owned(),
        Some(Value::Float(value)) => format!("{value:?}"),
        Some(Value::Int(value)) => value.to_string(),
        Some(Value::Bool(value)) => value.to_string(),
        Some(Value::Text(value)) => format!("{value:?}"),
    }
}

fn quarantined(text: &mut String, reason: &str, detail: &str, payload: &str) {
    line(text, format_args!("  quarantine: {reason}: {detail}"));
    if !payload.is_empty() {
        line(text, format_args!("  payload: {payload}"));
    }
}

fn shown(rejected: &Rejected) -> String {
    let head = &rejected.payload[..rejected.payload.len().min(SHOWN_BYTES)];
    let more = if head.len() < rejected.payload.len() { " …" } else { "" };
    match std::str::from_utf8(head) {
        Ok(text) => format!("{text:?}{more}"),
        Err(_) => format!("{}{more}", head.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")),
    }
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("a text takes all");
}

fn time(us: i64) -> String {
    let time = DateTime::from_timestamp_micros(us);
    time.map_or_else(|| us.to_string(), |time| time.to_rfc3339_opts(SecondsFormat::AutoSi, true))
}

/// Whether a subscription to `filter` brings this topic.
pub(crate) fn matches(filter: &str, topic: &str) -> bool {
    let mut levels = topic.split('/');
    for part in filter.split('/') {
        match (part, levels.next()) {
            ("#", _) => return true,
            ("+", Some(_)) => {}
            (part, Some(level)) if part == level => {}
            _ => return false,
        }
    }
    levels.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: &str = include_str!("../../configs/edge.toml");
    /// 2014-08-01T12:00:00Z.
    const NOW_US: i64 = 1_406_894_400_000_000;

    fn explained(topic: Option<&str>, payload: &str) -> Result<String, String> {
        let settings = Settings::parse(SETTINGS).unwrap();
        explain(&settings, None, topic, Bytes::copy_from_slice(payload.as_bytes()), NOW_US)
    }

    #[test]
    fn the_docs_show_what_is_said() {
        let docs = include_str!("../../docs/field-engineer.md");
        let message = docs.split("printf '").nth(1).and_then(|rest| rest.split('\'').next()).unwrap();
        let settings = Settings::parse(SETTINGS).unwrap();
        // 2026-11-21T08:00:00Z.
        let (payload, now_us) = (Bytes::from_static(message.as_bytes()), 1_795_248_000_000_000);
        let said = explain(&settings, None, Some("city/traffic/158324"), payload, now_us).unwrap();
        assert!(docs.contains(said.trim_end()), "{said}");
    }

    #[test]
    fn each_step_of_a_good_reading_is_shown() {
        let json = r#"{"TIMESTAMP":"2014-08-01T07:53:00","avgSpeed":56,"vehicleCount":7}"#;
        let text = explained(Some("city/traffic/158324"), json).unwrap();
        assert_eq!(
            text,
            "source traffic: json, topic city/traffic/158324, 66 bytes, to stream traffic\n\
             reading 1: device 158324, ts 2014-08-01T05:53:00Z\n  avg_speed float64 = 56.0\n  vehicle_count int64 = 7\n  \
             checks: passed, a row of traffic\n  window traffic_5m: 2014-08-01T05:50:00Z to 2014-08-01T05:55:00Z\n"
        );
    }

    #[test]
    fn units_flags_and_windows_of_each_kind_are_shown() {
        let text = "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n\
                    [[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\ntopics = [\"t/+\"]\nstream = \"s\"\n\
                    [source.map]\ndevice = \"topic:1\"\nts = { at = \"/ts\", format = \"epoch_s\" }\nv = \"/v\"\n\
                    [stream.s]\nduplicates = \"first\"\n[stream.s.fields]\n\
                    v = { type = \"float64\", unit = \"°F\", store_unit = \"°C\", max = 40, flag = [\"max\"] }\n\
                    [stream.s.window.hop]\nsize = \"10s\"\nevery = \"4s\"\n[stream.s.window.visit]\ngap = \"5s\"\n";
        let settings = Settings::parse(text).unwrap();
        let payload = r#"[{"ts":1406894402,"v":212},{"ts":1406894402,"v":32}]"#;
        let text = explain(&settings, None, Some("t/a"), payload.into(), NOW_US).unwrap();
        let lines = text.lines().collect::<Vec<_>>();
        assert_eq!(
            lines[1..],
            [
                "reading 1: device a, ts 2014-08-01T12:00:02Z",
                "  v float64 = 212.0 °F = 100.0 °C",
                "  checks: suspect, quality above_max:v, a row of s",
                "  window s_hop: 2014-08-01T12:00:00Z to 2014-08-01T12:00:10Z, and 1 before it that it lies in, too",
                "  window s_visit: a session",
                "reading 2: device a, ts 2014-08-01T12:00:02Z",
                "  v float64 = 32.0 °F = 0.0 °C",
                "  checks: repeats one before it, no row",
            ]
        );
    }

    #[test]
    fn what_rules_say_and_which_alerts_begin_is_shown() {
        let text = "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n\
                    [[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\ntopics = [\"t/+\"]\nstream = \"s\"\n\
                    [source.map]\ndevice = \"topic:1\"\nts = { at = \"/ts\", format = \"epoch_s\" }\nv = \"/v\"\n\
                    [stream.s]\n[stream.s.fields]\nv = { type = \"float64\" }\n[stream.s.window.\"1m\"]\nsize = \"1m\"\n\
                    [[rule]]\nname = \"high\"\non = \"s\"\nwhen = \"v > 100\"\nmessage = \"{device}: {v}\"\n\
                    topic = \"alerts/{device}/high\"\n\
                    [[rule]]\nname = \"long\"\non = \"s\"\nwhen = \"v > 50\"\nfor = \"5m\"\nmessage = \"\"\n\
                    [[rule]]\nname = \"jump\"\non = \"s\"\nwhen = \"v - prev(v) > 10\"\nmessage = \"\"\n\
                    [[rule]]\nname = \"still\"\non = \"s\"\nabsent = \"1m\"\nmessage = \"\"\n\
                    [[rule]]\nname = \"few\"\non = \"s_1m\"\nwhen = \"count < 3\"\nmessage = \"\"\n";
        let settings = Settings::parse(text).unwrap();
        let payload = r#"[{"ts":1406894402,"v":101},{"ts":1406894403,"v":1}]"#;
        let text = explain(&settings, None, Some("t/a"), payload.into(), NOW_US).unwrap();
        let lines = text.lines().filter(|line| !line.contains("checks")).collect::<Vec<_>>();
        assert_eq!(
            lines[3..],
            [
                "  window s_1m: 2014-08-01T12:00:00Z to 2014-08-01T12:01:00Z",
                "  window s_1m: rule few judges it when it closes",
                "  rule high: true",
                "  rule long: true; fires when it stays so for 300 s",
                "  rule jump: null, which changes nothing",
                "  rule still: is about silence, not about a message",
                "  alert firing: warning high: \"a: 101\", labels {}",
                "    published on alerts/a/high",
                "reading 2: device a, ts 2014-08-01T12:00:03Z",
                "  v float64 = 1.0",
                "  window s_1m: 2014-08-01T12:00:00Z to 2014-08-01T12:01:00Z",
                "  window s_1m: rule few judges it when it closes",
                "  rule high: false",
                "  rule long: false",
                "  rule jump: false",
                "  rule still: is about silence, not about a message",
                "  alert resolved: warning high: \"a: 1\", labels {}",
                "    published on alerts/a/high",
            ]
        );
    }

    #[test]
    fn what_goes_to_quarantine_is_shown_with_its_reason() {
        let check = |payload: &str, expected: &str| {
            let text = explained(None, payload).unwrap();
            assert!(text.contains(expected), "{text}");
        };
        check("{\"TIMESTAMP\"", "quarantine: malformed: ");
        check("{\"TIMESTAMP\"", "payload: \"{\\\"TIMESTAMP\\\"\"");
        check(
            r#"{"TIMESTAMP":"2014-08-01T07:53:00","avgSpeed":1e3,"vehicleCount":7}"#,
            "quarantine: above_max: avg_speed is",
        );
        check(r#"{"TIMESTAMP":"2014-08-01T07:53:00","avgSpeed":"x"}"#, "reading 1 of device example: not decoded");
    }

    #[test]
    fn a_message_that_no_source_gets_is_an_error() {
        assert!(explained(Some("city/noise/1"), "{}").unwrap_err().contains("no source gets this message"));
        let check = |filter: &str, topic: &str, expected: bool| {
            assert_eq!(matches(filter, topic), expected, "{filter} {topic}")
        };
        check("a/+/c", "a/b/c", true);
        check("a/+/c", "a/b/c/d", false);
        check("a/#", "a", true);
        check("a/#", "a/b/c", true);
        check("#", "a", true);
        check("a/+", "a", false);
        check("a", "a/b", false);
    }
}
