//! CSV (RFC 4180): a reading for each line. The columns are named by the configuration, or by the first line.
//!
//! Values are text that must read as the type of their field; an empty cell that is not quoted is null. A line with more or
//! fewer cells than columns is rejected alone. Empty lines are passed over. Of columns with the same name the last counts.

use std::borrow::Cow;
use std::ops::Range;

use super::READINGS_MAX;
use super::scalar::{Fault, Record, Scalar};
use super::tree::too_many;
use crate::config::{FormatOptions, Pointer};

/// Columns of a message.
const COLUMNS_MAX: usize = 4_096;

/// Reads lines.
#[derive(Debug)]
pub(super) struct Lines {
    header: Option<Vec<String>>,
    delimiter: u8,
    quote: u8,
    places: Vec<String>,
}

/// A line: what it holds and where.
struct Line<'a> {
    cells: Vec<Scalar<'a>>,
    span: Range<usize>,
}

impl Lines {
    pub(super) fn new(places: &[Pointer], options: &FormatOptions) -> Self {
        let places = places.iter().map(|pointer| pointer.0.first().cloned().unwrap_or_default()).collect();
        let ascii = |set: Option<char>, default: u8| set.and_then(|set| u8::try_from(set).ok()).unwrap_or(default);
        let (delimiter, quote) = (ascii(options.delimiter, b','), ascii(options.quote, b'"'));
        Self { header: options.header.clone(), delimiter, quote, places }
    }

    /// Each line of a message, without the header.
    pub(super) fn records<'a>(&self, text: &'a str) -> Result<Vec<Record<'a>>, Fault> {
        // Spreadsheets begin with a byte order mark.
        let mut at = if text.starts_with('\u{feff}') { '\u{feff}'.len_utf8() } else { 0 };
        let header = match &self.header {
            Some(header) => header.clone(),
            None => {
                let line = self.next(text, &mut at).ok_or(("empty", "no header and no line".to_owned()))?;
                let Line { cells, .. } = line.map_err(|(fault, _)| fault)?;
                let name = |cell| if let Scalar::Text(name) = cell { name.into_owned() } else { String::new() };
                cells.into_iter().map(name).collect()
            }
        };
        let columns = self.places.iter().map(|place| header.iter().rposition(|name| name == place)).collect::<Vec<_>>();
        if let Some(missing) = columns.iter().position(Option::is_none) {
            return Err(("no_column", format!("the header has no `{}`", self.places[missing])));
        }
        let mut records = Vec::new();
        while let Some(line) = self.next(text, &mut at) {
            if records.len() >= READINGS_MAX {
                return Err(too_many(records.len() + 1));
            }
            let (slots, span) = match line {
                Ok(Line { mut cells, span }) if cells.len() == header.len() => {
                    let cell = |column: &Option<usize>| column.map_or(Scalar::Null, |column| cells[column].clone());
                    let slots = columns.iter().map(cell).collect();
                    cells.clear();
                    (Ok(slots), span)
                }
                Ok(Line { cells, span }) => {
                    let detail = format!("{} cells in a table of {} columns", cells.len(), header.len());
                    (Err(("wrong_columns", detail)), span)
                }
                Err((fault, span)) => (Err(fault), span),
            };
            records.push(Record { span, keys: &[], slots });
        }
        Ok(records)
    }

    /// The next line that is not empty. A bad one is given up to its line break.
    fn next<'a>(&self, text: &'a str, at: &mut usize) -> Option<Result<Line<'a>, (Fault, Range<usize>)>> {
        let bytes = text.as_bytes();
        while matches!(bytes.get(*at), Some(b'\r' | b'\n')) {
            *at += 1;
        }
        let start = *at;
        if start >= bytes.len() {
            return None;
        }
        let mut cells = Vec::new();
        loop {
            match self.cell(text, at) {
                Ok(cell) if cells.len() < COLUMNS_MAX => cells.push(cell),
                result => {
                    let detail = result.err().unwrap_or_else(|| format!("more than {COLUMNS_MAX} cells"));
                    *at = start + text[start..].find('\n').unwrap_or(text.len() - start);
                    return Some(Err((("malformed", detail), start..*at)));
                }
            }
            match bytes.get(*at) {
                Some(byte) if *byte == self.delimiter => *at += 1,
                _ => return Some(Ok(Line { cells, span: start..*at })),
            }
        }
    }

    fn cell<'a>(&self, text: &'a str, at: &mut usize) -> Result<Scalar<'a>, String> {
        let bytes = text.as_bytes();
        if bytes.get(*at) != Some(&self.quote) {
            let ends = |byte: &u8| *byte == self.delimiter || matches!(byte, b'\r' | b'\n');
            let len = bytes[*at..].iter().position(ends).unwrap_or(bytes.len() - *at);
            let cell = &text[*at..*at + len];
            *at += len;
            return Ok(if cell.is_empty() { Scalar::Null } else { Scalar::Text(Cow::Borrowed(cell)) });
        }
        let start = *at + 1;
        let (mut end, mut doubled) = (start, false);
        loop {
            let quote = bytes[end..].iter().position(|byte| *byte == self.quote);
            end += quote.ok_or("a quoted cell does not end")?;
            if bytes.get(end + 1) != Some(&self.quote) {
                break;
            }
            doubled = true;
            end += 2;
        }
        *at = end + 1;
        if !matches!(bytes.get(*at), None | Some(b'\r' | b'\n')) && bytes.get(*at) != Some(&self.delimiter) {
            return Err(format!("something follows a quoted cell at byte {at}"));
        }
        let cell = &text[start..end];
        let quote = char::from(self.quote);
        Ok(Scalar::Text(match doubled {
            true => Cow::Owned(cell.replace(&format!("{quote}{quote}"), &quote.to_string())),
            false => Cow::Borrowed(cell),
        }))
    }
}
