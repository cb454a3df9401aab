//! Influx line protocol: `measurement,tag=value field=1.5,other=2i 1434055562000000000`, a point for each line.
//!
//! The one reader of it, for the edge's sources and the cloud's door. A bad line never rejects its neighbours. A line ends at
//! a line break that is not within a quoted text. Empty lines and comments (`#`) are passed over. The parts of a line are
//! handed out as they are read, borrowed where nothing is escaped, so that who wants three of fifty fields keeps three. A
//! number ends in `i` or `u`, or is a float; the protocol has no NaN and no infinity.

use std::borrow::Cow;
use std::ops::Range;

use serde::Deserialize;

/// The unit of a point's time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    #[default]
    Ns,
    Us,
    Ms,
    S,
}

impl Precision {
    /// A time in this unit as µs since 1970; none when it is out of range.
    pub fn micros(self, time: i64) -> Option<i64> {
        match self {
            Self::Ns => Some(time.div_euclid(1_000)),
            Self::Us => Some(time),
            Self::Ms => time.checked_mul(1_000),
            Self::S => time.checked_mul(1_000_000),
        }
    }
}

/// The value of a field.
#[derive(Debug, Clone, PartialEq)]
pub enum FieldValue<'a> {
    Bool(bool),
    Int(i64),
    /// Above what an i64 holds.
    Unsigned(u64),
    Float(f64),
    Text(Cow<'a, str>),
}

/// A part of a line, in the order in which they stand there; equal names may come twice, then the last counts.
#[derive(Debug, Clone, PartialEq)]
pub enum Part<'a> {
    Measurement(Cow<'a, str>),
    Tag(Cow<'a, str>, Cow<'a, str>),
    Field(Cow<'a, str>, FieldValue<'a>),
}

/// Why a line is none, for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct LineError(pub String);

/// One line that is neither empty nor a comment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Its bytes in the text. Where a bad line ends is not known: the next line break is the most that is given up.
    pub span: Range<usize>,
    /// Counted from 1.
    pub number: usize,
    /// Its time in µs since 1970, when it has one.
    pub time: Result<Option<i64>, LineError>,
}

/// The lines of a text, one after the other.
#[derive(Debug)]
pub struct Lines<'a> {
    text: &'a str,
    precision: Precision,
    at: usize,
    /// Line breaks before `at`.
    breaks: usize,
}

impl<'a> Lines<'a> {
    /// The lines of this text, whose times have this unit.
    pub fn new(text: &'a str, precision: Precision) -> Self {
        Self { text, precision, at: 0, breaks: 0 }
    }

    /// Reads the next line and hands its parts out. Those of a line that turns out to be bad were handed out for nothing.
    pub fn next(&mut self, mut part: impl FnMut(Part<'a>)) -> Option<Line> {
        loop {
            let rest = &self.text[self.at..];
            let start = self.at + (rest.len() - rest.trim_start().len());
            self.move_to(start);
            let rest = &self.text[start..];
            if rest.is_empty() {
                return None;
            }
            let end_of_line = start + rest.find('\n').unwrap_or(rest.len());
            if rest.starts_with('#') {
                self.move_to(end_of_line);
                continue;
            }
            let number = self.breaks + 1;
            let mut cursor = Cursor { text: self.text, at: start };
            let time = cursor.line(self.precision, &mut part);
            let end = if time.is_ok() { cursor.at } else { end_of_line };
            self.move_to(end);
            return Some(Line { span: start..end, number, time });
        }
    }

    fn move_to(&mut self, at: usize) {
        self.breaks += self.text.as_bytes()[self.at..at].iter().filter(|byte| **byte == b'\n').count();
        self.at = at;
    }
}

struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

fn malformed<T>(detail: impl Into<String>) -> Result<T, LineError> {
    Err(LineError(detail.into()))
}

impl<'a> Cursor<'a> {
    fn line(&mut self, precision: Precision, part: &mut impl FnMut(Part<'a>)) -> Result<Option<i64>, LineError> {
        let measurement = self.word(&[',', ' '])?;
        part(Part::Measurement(measurement));
        while self.eat(',') {
            let tag = self.word(&[',', ' ', '='])?;
            self.expect('=')?;
            let value = self.word(&[',', ' '])?;
            part(Part::Tag(tag, value));
        }
        self.expect(' ')?;
        self.spaces();
        loop {
            let field = self.word(&[',', ' ', '='])?;
            self.expect('=')?;
            let value = self.value()?;
            part(Part::Field(field, value));
            if !self.eat(',') {
                break;
            }
        }
        self.spaces();
        match self.rest_of_line().trim() {
            "" => Ok(None),
            digits => {
                let number =
                    digits.parse::<i64>().map_err(|_| LineError(format!("`{}` is no time", clipped(digits))))?;
                match precision.micros(number) {
                    None => malformed(format!("the time {digits} is out of range")),
                    time => Ok(time),
                }
            }
        }
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn eat(&mut self, expected: char) -> bool {
        let there = self.rest().starts_with(expected);
        self.at += if there { expected.len_utf8() } else { 0 };
        there
    }

    fn expect(&mut self, expected: char) -> Result<(), LineError> {
        if self.eat(expected) {
            return Ok(());
        }
        malformed(format!("`{expected}` is expected at byte {}", self.at))
    }

    fn spaces(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start_matches(' ').len();
    }

    /// A name, up to one of these characters; a backslash makes the character after it a part of the name.
    fn word(&mut self, ends: &[char]) -> Result<Cow<'a, str>, LineError> {
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
            return malformed(format!("a name is expected at byte {}", self.at));
        }
        self.at += end;
        Ok(if escapes { unescape(&rest[..end], &[',', '=', ' ', '\\']).into() } else { rest[..end].into() })
    }

    fn value(&mut self) -> Result<FieldValue<'a>, LineError> {
        if self.eat('"') {
            return self.quoted();
        }
        let rest = self.rest();
        let end = rest.find([',', ' ', '\n', '\r']).unwrap_or(rest.len());
        self.at += end;
        let text = &rest[..end];
        let wrong = || LineError(format!("`{}` is no value", clipped(text)));
        Ok(match text {
            "t" | "T" | "true" | "True" | "TRUE" => FieldValue::Bool(true),
            "f" | "F" | "false" | "False" | "FALSE" => FieldValue::Bool(false),
            _ if text.ends_with('i') => FieldValue::Int(text[..text.len() - 1].parse().map_err(|_| wrong())?),
            _ if text.ends_with('u') => {
                let number = text[..text.len() - 1].parse::<u64>().map_err(|_| wrong())?;
                i64::try_from(number).map_or(FieldValue::Unsigned(number), FieldValue::Int)
            }
            // The protocol knows no NaN and no infinity, which Rust would read.
            _ if text.contains(|c: char| !matches!(c, '0'..='9' | '+' | '-' | '.' | 'e' | 'E')) => return Err(wrong()),
            _ => FieldValue::Float(text.parse::<f64>().ok().filter(|number| number.is_finite()).ok_or_else(wrong)?),
        })
    }

    fn quoted(&mut self) -> Result<FieldValue<'a>, LineError> {
        let rest = self.rest();
        let (mut escaped, mut escapes) = (false, false);
        for (index, character) in rest.char_indices() {
            if character == '"' && !escaped {
                self.at += index + 1;
                let text = &rest[..index];
                return Ok(FieldValue::Text(if escapes { unescape(text, &['"', '\\']).into() } else { text.into() }));
            }
            escaped = character == '\\' && !escaped;
            escapes |= escaped;
        }
        malformed("a quoted text does not end")
    }

    fn rest_of_line(&mut self) -> &'a str {
        let rest = self.rest();
        let end = rest.find('\n').unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }
}

fn clipped(text: &str) -> String {
    text.chars().take(80).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Number, time, parts.
    type Read = (usize, Result<Option<i64>, String>, Vec<String>);

    fn read(text: &str) -> Vec<Read> {
        let mut lines = Lines::new(text, Precision::Ns);
        let mut found = Vec::new();
        loop {
            let mut parts = Vec::new();
            let line = lines.next(|part| {
                parts.push(match part {
                    Part::Measurement(name) => name.into_owned(),
                    Part::Tag(name, value) => format!("{name}:{value}"),
                    Part::Field(name, value) => format!("{name}={value:?}"),
                });
            });
            let Some(line) = line else { return found };
            found.push((line.number, line.time.map_err(|error| error.0), parts));
        }
    }

    #[test]
    fn lines_have_numbers_and_bad_ones_give_up_no_more_than_themselves() {
        let text = "# a comment\n\ncpu,host=a v=1.5,n=2i 1000\nbad\nm s=\"two\nlines\",b=t\nx y=1e999\nz,a\\ b=c\\,d f=18446744073709551615u 5000\n";
        let found = read(text);
        let numbers: Vec<usize> = found.iter().map(|(number, _, _)| *number).collect();
        assert_eq!(numbers, [3, 4, 5, 7, 8]);
        assert_eq!((&found[0].1, &found[4].1), (&Ok(Some(1)), &Ok(Some(5))));
        assert_eq!(found[0].2, ["cpu", "host:a", "v=Float(1.5)", "n=Int(2)"]);
        assert!(found[1].1.is_err() && found[3].1.is_err(), "{found:?}");
        assert_eq!(found[2].2, ["m", "s=Text(\"two\\nlines\")", "b=Bool(true)"]);
        assert_eq!(found[4].2, ["z", "a b:c,d", "f=Unsigned(18446744073709551615)"]);
    }

    #[test]
    fn times_have_the_unit_that_is_said() {
        let check =
            |precision: Precision, time, expected| assert_eq!(precision.micros(time), expected, "{precision:?}");
        check(Precision::Ns, -1, Some(-1));
        check(Precision::Us, 7, Some(7));
        check(Precision::Ms, 7, Some(7_000));
        check(Precision::S, 7, Some(7_000_000));
        check(Precision::S, i64::MAX, None);
    }
}
