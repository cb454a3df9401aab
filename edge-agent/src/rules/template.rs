//! Texts with places: `"{device}: {avg_speed} km/h"`. `{{` and `}}` are braces.
//!
//! A place is a column of the stream, or `device`, `ts`, `rule`, `severity`, `id`. NULL is written as NULL. In a topic a
//! value loses `/`, `+`, `#` and the NUL, which would make other levels of it; in a command's payload quotes, backslashes and
//! control characters. A value is at most [`VALUE_BYTES_MAX`] bytes.

use std::fmt::Write;

use super::expression::{Columns, Row};
use crate::decode::Value;

/// Of a value within a text; the rest of it is left out.
pub(super) const VALUE_BYTES_MAX: usize = 256;

/// A text with its places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Template(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Column(usize),
    Device,
    Ts,
    Rule,
    Severity,
    Id,
}

/// What goes into the places.
#[derive(Debug, Clone, Copy)]
pub(super) struct Filling<'f> {
    pub(super) row: Row<'f>,
    /// Event time, µs since 1970 UTC.
    pub(super) ts: i64,
    pub(super) rule: &'f str,
    pub(super) severity: &'static str,
    pub(super) id: &'f str,
}

impl Template {
    /// Reads a text. `columns` is None where a row is not at hand.
    pub(super) fn parse(text: &str, columns: Option<&Columns>) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            plain.push_str(&rest[..at]);
            let brace = &rest[at..];
            if brace.starts_with("{{") || brace.starts_with("}}") {
                plain.push_str(&brace[..1]);
                rest = &brace[2..];
                continue;
            }
            let Some((name, after)) = brace.strip_prefix('{').and_then(|inner| inner.split_once('}')) else {
                return Err(format!("`{text}`: a place is written {{name}}, and a brace {{{{ or }}}}"));
            };
            if !plain.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut plain)));
            }
            parts.push(match name {
                "device" => Part::Device,
                "ts" => Part::Ts,
                "rule" => Part::Rule,
                "severity" => Part::Severity,
                "id" => Part::Id,
                name => {
                    let Some(columns) = columns else {
                        return Err(format!(
                            "`{text}`: {{{name}}} has no value here; device, ts, rule, severity and id have"
                        ));
                    };
                    let Some((index, _)) = columns.find(name) else {
                        let known = columns.names().collect::<Vec<_>>().join(", ");
                        return Err(format!("`{text}`: {{{name}}} is none of {known}, device, ts, rule, severity, id"));
                    };
                    Part::Column(index)
                }
            });
            rest = after;
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            parts.push(Part::Text(plain));
        }
        Ok(Self(parts))
    }

    /// Whether each device, or each alert, has a text of its own.
    pub(super) fn tells_devices_apart(&self) -> bool {
        self.0.iter().any(|part| matches!(part, Part::Device | Part::Id))
    }

    pub(super) fn has_id(&self) -> bool {
        self.0.contains(&Part::Id)
    }

    pub(super) fn has_rule(&self) -> bool {
        self.0.contains(&Part::Rule)
    }

    /// The columns that it shows.
    pub(super) fn columns(&self) -> impl Iterator<Item = usize> {
        self.0.iter().filter_map(|part| if let Part::Column(index) = part { Some(*index) } else { None })
    }

    /// Whether nothing in it depends on a row but the device.
    pub(super) fn is_of_the_device(&self) -> bool {
        !self.0.iter().any(|part| matches!(part, Part::Column(_) | Part::Ts | Part::Id))
    }

    pub(super) fn fill(&self, with: &Filling<'_>) -> String {
        self.fill_without(with, |_| false)
    }

    /// As a topic: values are one level, or a part of one.
    pub(super) fn fill_topic(&self, with: &Filling<'_>) -> String {
        self.fill_without(with, |letter| matches!(letter, '/' | '+' | '#' | '\0'))
    }

    /// As what an actuator is told: a value stays the one value, whatever a device sends.
    pub(super) fn fill_payload(&self, with: &Filling<'_>) -> String {
        self.fill_without(with, |letter| matches!(letter, '"' | '\'' | '\\') || letter.is_control())
    }

    fn fill_without(&self, with: &Filling<'_>, not: impl Fn(char) -> bool + Copy) -> String {
        let mut out = String::new();
        for part in &self.0 {
            match part {
                Part::Text(text) => out.push_str(text),
                place => out.push_str(&value(place, with).replace(not, "_")),
            }
        }
        out
    }
}

fn value(place: &Part, with: &Filling<'_>) -> String {
    let mut text = match place {
        Part::Text(text) => text.clone(),
        Part::Device => with.row.device.to_owned(),
        Part::Ts => time(with.ts),
        Part::Rule => with.rule.to_owned(),
        Part::Severity => with.severity.to_owned(),
        Part::Id => with.id.to_owned(),
        Part::Column(index) => {
            let mut text = String::new();
            // Writing to a string cannot fail.
            let _ = match with.row.values.get(*index).and_then(Option::as_ref) {
                None => write!(text, "NULL"),
                Some(Value::Float(value)) => write!(text, "{value}"),
                Some(Value::Int(value)) => write!(text, "{value}"),
                Some(Value::Bool(value)) => write!(text, "{value}"),
                Some(Value::Text(value)) => write!(text, "{value}"),
            };
            text
        }
    };
    text.truncate(text.floor_char_boundary(VALUE_BYTES_MAX));
    text
}

/// RFC 3339, UTC.
pub(super) fn time(us: i64) -> String {
    let time = chrono::DateTime::from_timestamp_micros(us);
    time.map_or_else(|| us.to_string(), |time| time.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true))
}
