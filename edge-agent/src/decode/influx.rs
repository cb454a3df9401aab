//! Influx line protocol: `measurement,tag=value field=1.5,other=2i 1434055562000000000`, a reading for each line.
//!
//! A bad line never rejects its neighbours. A line without a time has that of its arrival. A line ends at a line break that
//! is not within a quoted text; of equal names the last counts. Empty lines and comments (`#`) are passed over.

use std::borrow::Cow;

use super::READINGS_MAX;
use super::scalar::{Fault, Record, Scalar};
use super::tree::too_many;
use crate::config::{Pointer, Precision};

/// One place that is wanted.
#[derive(Debug)]
enum Place {
    Measurement,
    Time,
    Tag(String),
    Field(String),
}

/// Reads lines.
#[derive(Debug)]
pub(super) struct Lines {
    places: Vec<Place>,
    precision: Precision,
}

impl Lines {
    pub(super) fn new(places: &[Pointer], precision: Precision) -> Self {
        let place = |pointer: &Pointer| match &pointer.0[..] {
            [tags, name] if tags == "tags" => Place::Tag(name.clone()),
            [_, name] => Place::Field(name.clone()),
            [time] if time == "time" => Place::Time,
            _ => Place::Measurement,
        };
        Self { places: places.iter().map(place).collect(), precision }
    }

    /// Each line of a message.
    pub(super) fn records<'a>(&self, text: &'a str, arrival_us: i64) -> Result<Vec<Record<'a>>, Fault> {
        let mut records = Vec::new();
        let mut at = 0;
        while at < text.len() {
            let start = at + (text[at..].len() - text[at..].trim_start().len());
            let rest = &text[start..];
            if rest.is_empty() {
                break;
            }
            if rest.starts_with('#') {
                at = start + rest.find('\n').unwrap_or(rest.len());
                continue;
            }
            if records.len() >= READINGS_MAX {
                return Err(too_many(records.len() + 1));
            }
            let mut line = Line { text, at: start };
            let slots = self.line(&mut line, arrival_us);
            // Where a bad line ends is not known: the next line break is the most that is given up.
            let end = match &slots {
                Ok(_) => line.at,
                Err(_) => start + rest.find('\n').unwrap_or(rest.len()),
            };
            records.push(Record { span: start..end, keys: &[], slots });
            at = end;
        }
        Ok(records)
    }

    fn line<'a>(&self, line: &mut Line<'a>, arrival_us: i64) -> Result<Vec<Scalar<'a>>, Fault> {
        let mut slots = vec![Scalar::Null; self.places.len()];
        let mut put = |wanted: &dyn Fn(&Place) -> bool, value: &Scalar<'a>| {
            for (slot, place) in slots.iter_mut().zip(&self.places) {
                if wanted(place) {
                    *slot = value.clone();
                }
            }
        };
        let measurement = line.word(&[',', ' '])?;
        put(&|place| matches!(place, Place::Measurement), &Scalar::Text(measurement));
        while line.eat(',') {
            let tag = line.word(&[',', ' ', '='])?;
            line.expect('=')?;
            let value = Scalar::Text(line.word(&[',', ' '])?);
            put(&|place| matches!(place, Place::Tag(name) if *name == tag), &value);
        }
        line.expect(' ')?;
        line.spaces();
        loop {
            let field = line.word(&[',', ' ', '='])?;
            line.expect('=')?;
            let value = line.value()?;
            put(&|place| matches!(place, Place::Field(name) if *name == field), &value);
            if !line.eat(',') {
                break;
            }
        }
        line.spaces();
        let time = match line.rest_of_line().trim() {
            "" => arrival_us,
            digits => {
                let number = digits.parse::<i64>().map_err(|_| malformed(format!("`{digits}` is no time")))?;
                let scaled = match self.precision {
                    Precision::Ns => Some(number.div_euclid(1_000)),
                    Precision::Us => Some(number),
                    Precision::Ms => number.checked_mul(1_000),
                    Precision::S => number.checked_mul(1_000_000),
                };
                scaled.ok_or_else(|| malformed(format!("the time {digits} is out of range")))?
            }
        };
        put(&|place| matches!(place, Place::Time), &Scalar::Time(time));
        Ok(slots)
    }
}

fn malformed(detail: impl Into<String>) -> Fault {
    ("malformed", detail.into())
}

struct Line<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Line<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn eat(&mut self, expected: char) -> bool {
        let there = self.rest().starts_with(expected);
        self.at += if there { expected.len_utf8() } else { 0 };
        there
    }

    fn expect(&mut self, expected: char) -> Result<(), Fault> {
        if self.eat(expected) {
            return Ok(());
        }
        Err(malformed(format!("`{expected}` is expected at byte {}", self.at)))
    }

    fn spaces(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start_matches(' ').len();
    }

    /// A name, up to one of these characters; a backslash makes the character after it a part of the name.
    fn word(&mut self, ends: &[char]) -> Result<Cow<'a, str>, Fault> {
        let rest = self.rest();
        let (mut escaped, mut escapes, mut end) = (false, false, rest.len());
        for (index, character) in rest.char_indices() {
            if character == '\n' || (!escaped && ends.contains(&character)) {
                end = index;
                break;
            }
            escaped = character == '\\' && !escaped;
            escapes |= escaped;
        }
        if end == 0 {
            return Err(malformed(format!("a name is expected at byte {}", self.at)));
        }
        self.at += end;
        Ok(if escapes { unescape(&rest[..end], &[',', '=', ' ', '\\']).into() } else { rest[..end].into() })
    }

    fn value(&mut self) -> Result<Scalar<'a>, Fault> {
        if self.eat('"') {
            return self.quoted();
        }
        let rest = self.rest();
        let end = rest.find([',', ' ', '\n', '\r']).unwrap_or(rest.len());
        self.at += end;
        let text = &rest[..end];
        let wrong = || malformed(format!("`{}` is no value", text.chars().take(80).collect::<String>()));
        Ok(match text {
            "t" | "T" | "true" | "True" | "TRUE" => Scalar::Bool(true),
            "f" | "F" | "false" | "False" | "FALSE" => Scalar::Bool(false),
            _ if text.ends_with('i') => Scalar::Int(text[..text.len() - 1].parse().map_err(|_| wrong())?),
            _ if text.ends_with('u') => {
                let number = text[..text.len() - 1].parse::<u64>().map_err(|_| wrong())?;
                i64::try_from(number).map_or(Scalar::Unsigned(number), Scalar::Int)
            }
            // The protocol knows no NaN and no infinity, which Rust would read.
            _ if text.contains(|c: char| !matches!(c, '0'..='9' | '+' | '-' | '.' | 'e' | 'E')) => return Err(wrong()),
            _ => Scalar::Float(text.parse::<f64>().ok().filter(|number| number.is_finite()).ok_or_else(wrong)?),
        })
    }

    fn quoted(&mut self) -> Result<Scalar<'a>, Fault> {
        let rest = self.rest();
        let (mut escaped, mut escapes) = (false, false);
        for (index, character) in rest.char_indices() {
            if character == '"' && !escaped {
                self.at += index + 1;
                let text = &rest[..index];
                return Ok(Scalar::Text(if escapes { unescape(text, &['"', '\\']).into() } else { text.into() }));
            }
            escaped = character == '\\' && !escaped;
            escapes |= escaped;
        }
        Err(malformed("a quoted text does not end"))
    }

    fn rest_of_line(&mut self) -> &'a str {
        let rest = self.rest();
        let end = rest.find('\n').unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }
}

/// A backslash before one of these characters goes; any other stays.
fn unescape(text: &str, special: &[char]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match characters.peek() {
            Some(next) if character == '\\' && special.contains(next) => out.extend(characters.next()),
            _ => out.push(character),
        }
    }
    out
}
