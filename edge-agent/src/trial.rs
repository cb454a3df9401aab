//! What becomes of one message, step by step, for people who write a mapping: `edge-agent try`.
//!
//! The same decoder and checks as in the pipeline, with nothing remembered: a Sparkplug alias is known only when the message
//! is a birth, and no row is late. Reads and writes nothing.

use std::fmt::Write;

use bytes::Bytes;
use chrono::{DateTime, SecondsFormat};

use crate::config::{Decoding, Settings, SourceSettings, StreamSettings};
use crate::decode::{Decoder, Reading, Rejected, Value};
use crate::validate::Checks;

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
        one(&mut text, candidate, stream, &decoding, &topic, &payload, now_us);
    }
    if text.is_empty() {
        let names = settings.source.iter().map(SourceSettings::name).collect::<Vec<_>>().join(", ");
        return Err(format!("no source gets this message; there are {names}"));
    }
    Ok(text)
}

fn one(
    text: &mut String,
    source: &SourceSettings,
    stream: &StreamSettings,
    decoding: &Decoding,
    topic: &str,
    payload: &Bytes,
    now_us: i64,
) {
    let mut decoder = Decoder::new(decoding, stream);
    let checks = Checks::new(stream);
    let mut out = Vec::new();
    let filtered = decoder.decode(topic, payload, now_us, &mut out);
    let (name, format, bytes) = (source.name(), decoding.format, payload.len());
    line(text, format_args!("source {name}: {format}, topic {topic}, {bytes} bytes, to stream {}", source.stream()));
    for (index, result) in out.iter().enumerate() {
        match result {
            Ok(reading) => accepted(text, index + 1, source, stream, &checks, reading, now_us),
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

fn accepted(
    text: &mut String,
    number: usize,
    source: &SourceSettings,
    stream: &StreamSettings,
    checks: &Checks,
    reading: &Reading,
    now_us: i64,
) {
    line(text, format_args!("reading {number}: device {}, ts {}", reading.device, time(reading.ts)));
    for ((name, field), value) in stream.fields.iter().zip(&reading.values) {
        let value = match value {
            None => "null".to_owned(),
            Some(Value::Float(value)) => format!("{value:?}"),
            Some(Value::Int(value)) => value.to_string(),
            Some(Value::Bool(value)) => value.to_string(),
            Some(Value::Text(value)) => format!("{value:?}"),
        };
        line(text, format_args!("  {name} {} = {value}", field.kind));
    }
    if let Err((reason, detail)) = checks.check(reading, now_us) {
        return quarantined(text, reason, &detail, "");
    }
    line(text, format_args!("  checks: passed, a row of {}", source.stream()));
    for (window, settings) in stream.windows(source.stream()) {
        let size = settings.size.micros();
        let start = reading.ts.div_euclid(size) * size;
        line(text, format_args!("  window {window}: {} to {}", time(start), time(start + size)));
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
