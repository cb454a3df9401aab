//! What people write in configurations: durations and sizes, files that are read, and help with keys that are not known.
//!
//! `"250ms"`, `"60s"`, `"5m"`, `"24h"`, `"7d"`; `"512KiB"`, `"64MiB"`, `"8GiB"`. Edge and cloud read the same words.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer};

/// A duration as people write it: `"250ms"`, `"60s"`, `"5m"`, `"24h"`, `"7d"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

/// A size as people write it: `"512KiB"`, `"64MiB"`, `"8GiB"`, or a number of bytes with `B`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl Size {
    /// The number of bytes in memory's unit.
    pub fn bytes(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl Span {
    /// Microseconds, the unit of event time.
    pub fn micros(self) -> i64 {
        i64::try_from(self.0.as_micros()).unwrap_or(i64::MAX)
    }
}

fn number_and_unit<'a>(text: &'a str, units: &[(&str, u64)]) -> Option<u64> {
    let split: usize = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit): (&'a str, &'a str) = text.split_at(split);
    let factor = units.iter().find(|(name, _)| *name == unit.trim())?.1;
    number.parse::<u64>().ok()?.checked_mul(factor)
}

impl FromStr for Span {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let units = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
        let ms = number_and_unit(text, &units).ok_or_else(|| {
            format!("`{text}` is no duration: write it as \"250ms\", \"60s\", \"5m\", \"24h\", \"7d\"")
        })?;
        Ok(Self(Duration::from_millis(ms)))
    }
}

impl FromStr for Size {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let units = [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];
        let bytes = number_and_unit(text, &units)
            .ok_or_else(|| format!("`{text}` is no size: write it as \"512KiB\", \"64MiB\", \"8GiB\""))?;
        Ok(Self(bytes))
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Why a configuration is not used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: {message}")]
    Wrong { path: PathBuf, message: String },
}

/// Reads a file that a configuration is, or names.
///
/// # Errors
/// When it cannot be read.
pub fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

/// Reads a configuration file and parses it.
///
/// # Errors
/// When it cannot be read, or is wrong; then the text names the file.
pub fn load<T>(path: &Path, parse: impl FnOnce(&str) -> Result<T, String>) -> Result<T, ConfigError> {
    parse(&read(path)?).map_err(|message| ConfigError::Wrong { path: path.to_owned(), message })
}

/// What is said of a text that is no right configuration: toml's own words, with "did you mean" for a key that is not
/// known, and without any value that may be a secret.
pub fn with_nearest_key(error: &str) -> String {
    with_hint(&without_secrets(error))
}

/// What is said of a text that reads well and makes no sense, with the line that it is about in front where that can be
/// told: by the table that the message names, and the first word after it that is a key of that table.
pub fn with_line(text: &str, message: String) -> String {
    match line_of(text, &message) {
        Some(line) => format!("line {line}: {message}"),
        None => message,
    }
}

/// A line of a configuration that begins a table, or sets a key.
enum Line<'a> {
    Table(&'a str),
    Key(&'a str),
    Other,
}

impl<'a> Line<'a> {
    fn read(line: &'a str) -> Self {
        let line = line.trim();
        let plain =
            |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
        let table = line.split('#').next().unwrap_or_default().trim_end();
        // A quoted part of its name may be anything; a line that begins with one is rather a part of an array.
        let named = table.trim_matches(['[', ']']).split('"').step_by(2).collect::<String>();
        if table.starts_with('[') && !table.starts_with("[\"") && table.ends_with(']') && plain(&named) {
            return Self::Table(table);
        }
        match line.split_once('=') {
            Some((key, _)) if plain(key.trim_end()) => Self::Key(key.trim_end()),
            _ => Self::Other,
        }
    }
}

/// The number, from 1, of the line that a message like "[table] key …" or "[[table]] `name`: …" is about.
fn line_of(text: &str, message: &str) -> Option<usize> {
    let start = message.find('[')?;
    let closed = start + message[start..].find(']')?;
    let end = message[closed..].find(|c| c != ']').map_or(message.len(), |at| closed + at);
    let (mut table, mut about) = (message[start..end].to_owned(), message[end..].to_owned());
    let lines = text.lines().map(Line::read).collect::<Vec<_>>();
    // Of several tables with one name it is the one that has the name in backquotes, or the only one; of several that have
    // it the last, which repeats the others.
    let name = about.trim_start().strip_prefix('`').and_then(|rest| rest.split('`').next()).map(str::to_owned);
    loop {
        let inner = format!("{}.", table.trim_matches(['[', ']']));
        let block = |first: usize| {
            let goes_on =
                |line: &Line<'_>| !matches!(line, Line::Table(other) if !other.trim_matches('[').starts_with(&inner));
            first..first + 1 + lines[first + 1..].iter().take_while(|line| goes_on(line)).count()
        };
        let is_named = |block: &std::ops::Range<usize>| {
            let quoted = name.as_ref().map(|name| format!("\"{name}\""));
            let mut written = text.lines().skip(block.start).take(block.len());
            quoted.is_none_or(|name| !table.starts_with("[[") || written.any(|line| line.contains(&name)))
        };
        let begins = |line: &Line<'_>| matches!(line, Line::Table(other) if *other == table);
        let found = (0..lines.len()).filter(|at| begins(&lines[*at])).map(block).filter(is_named).collect::<Vec<_>>();
        if let Some(block) = found.last().cloned() {
            if found.len() > 1 && name.is_none() {
                return None;
            }
            let is_key = |at: &usize, word: &str| matches!(lines[*at], Line::Key(key) if key == word);
            let no_key = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
            let key = about.split(no_key).find_map(|word| block.clone().find(|at| is_key(at, word)));
            return Some(key.unwrap_or(block.start) + 1);
        }
        // What is written as a key of the table above.
        let (above, last) = table.trim_end_matches(']').rsplit_once('.')?;
        about = format!("{last} {about}");
        table = format!("{above}]");
    }
}

/// toml shows the line of an error, and serde the value that it did not expect. Both are kept only for a line that is
/// plainly of another key.
fn without_secrets(error: &str) -> String {
    let shown = |line: &str| {
        let (number, line) = line.split_once(" | ")?;
        number.trim().parse::<u64>().is_ok().then(|| line.to_owned())
    };
    let mut lines = Vec::new();
    let mut hidden = true;
    let mut marks = false;
    for line in error.lines() {
        if let Some(source) = shown(line) {
            hidden = may_hold_secret(&source);
            marks = hidden;
            if !hidden {
                lines.push(line.to_owned());
            } else if let Some((key, _)) = line.split_once('=') {
                lines.push(format!("{}= (not shown)", key));
            }
        } else if marks && line.trim_start().starts_with('|') && line.contains('^') {
            // They would tell how long it is.
        } else if hidden && line.starts_with("invalid ") {
            lines.push(without_value(line));
        } else {
            lines.push(line.to_owned());
        }
    }
    lines.join("\n")
}

/// False only for `key = value` where no key is like one of a secret, and no address has a user.
fn may_hold_secret(line: &str) -> bool {
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '-');
    let before_equals = line.split('=').rev().skip(1);
    let mut keys = before_equals.filter_map(|text| text.split(word).rfind(|key| !key.is_empty())).peekable();
    let like = |key: &str| {
        let key = key.to_ascii_lowercase();
        ["token", "password", "secret", "key"]
            .iter()
            .any(|secret| key.contains(secret) || strsim::jaro_winkler(&key, secret) > 0.8)
    };
    keys.peek().is_none() || keys.any(like) || line.contains('@')
}

/// "invalid type: integer `7`, expected a string": without the 7.
fn without_value(message: &str) -> String {
    let Some((found, expected)) = message.split_once(", expected") else { return "a value is wrong here".to_owned() };
    let kind = found.split(['`', '"']).next().unwrap_or_default().trim_end();
    format!("{kind}, expected{expected}")
}

/// Adds "did you mean" to serde's list of expected keys, or words.
fn with_hint(message: &str) -> String {
    // The line that is shown may have quotes of its own.
    let told = ["unknown field", "unknown variant"].into_iter().find_map(|told| message.find(told));
    let Some(at) = told else { return message.to_owned() };
    let mut quoted = message[at..].split('`').skip(1).step_by(2);
    let Some(wrong) = quoted.next() else { return message.to_owned() };
    let best = quoted.map(|key| (strsim::jaro_winkler(wrong, key), key)).max_by(|a, b| a.0.total_cmp(&b.0));
    match best {
        Some((likeness, key)) if likeness > 0.7 => format!("{message}\ndid you mean `{key}`?"),
        _ => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_may_hold_a_secret_is_not_shown() {
        let check = |line: &str, message: &str, expected: &str| {
            let error =
                format!("TOML parse error at line 5, column 9\n  |\n5 | {line}\n  |         ^^^^^\n{message}\n");
            let said = with_nearest_key(&error);
            let said = said.strip_prefix("TOML parse error at line 5, column 9\n  |\n").unwrap();
            assert_eq!(said, expected, "{line}");
        };
        let kept = "5 | rows = 4711\n  |         ^^^^^\ninvalid type: integer `4711`, expected a string";
        check("rows = 4711", "invalid type: integer `4711`, expected a string", kept);
        let hidden = "invalid type: integer, expected a string";
        check(
            "token = 4711",
            "invalid type: integer `4711`, expected a string",
            &format!("5 | token = (not shown)\n{hidden}"),
        );
        check("[[reader]]", "invalid type: integer `4711`, expected a string", hidden);
        check(
            "edge = [{ id = \"a\", token = 4711 }]",
            "invalid type: integer `4711`, expected a string",
            &format!("5 | edge = (not shown)\n{hidden}"),
        );
        check("4711\\q", "missing escaped value", "missing escaped value");
        let unknown = "unknown variant `fil`, expected one of `mqtt`, `http`, `file`";
        check(
            "kind = \"fil\"",
            unknown,
            &format!("5 | kind = \"fil\"\n  |         ^^^^^\n{unknown}\ndid you mean `file`?"),
        );
        let unknown = "unknown field `tokn`, expected `id` or `token`";
        check("tokn = \"`4711\"", unknown, &format!("5 | tokn = (not shown)\n{unknown}\ndid you mean `token`?"));
    }

    #[test]
    fn a_message_gets_the_line_that_it_is_about() {
        let text = "\
[cloud]
urls = []
[[source]]
kind = \"mqtt\"
stream = \"a\"
[source.map]
speed = \"/v\"
[[source]]
stream = \"b\" # another
topics = [
]
[stream.a]
lateness = \"1m\"
fields.speed = { min = 2, max = 1 }
";
        let check = |message: &str, line: usize| {
            let said = with_line(text, message.to_owned());
            let expected = if line == 0 { message.to_owned() } else { format!("line {line}: {message}") };
            assert_eq!(said, expected);
        };
        check("[cloud] urls is empty: name at least one", 2);
        check("[cloud]: something is missing", 1);
        check("[[source]] `a`: map has no `device`", 3);
        check("[[source]] `a`: stream of it", 5);
        check("[[source]] `b`: topics is empty", 10);
        check("[[source]] `c`: topics is empty", 0);
        check("[[source]]: which one", 0);
        check("[stream.a] lateness: too long", 13);
        check("[stream.a.fields] speed: min is above max", 12);
        check("[stream.b]: the name belongs to Weir", 0);
        check("[journal] max_bytes is too little", 0);
        check("no table is named", 0);
        let nested = "[stream.t.window.5-m]: [stream.t.window]: `t_5-m` is not a name";
        assert_eq!(line_of("[stream.t.window.5-m]\nsize = 1\n", nested), Some(1));
    }

    #[test]
    fn a_file_that_is_not_there_or_wrong_is_named() {
        let path = std::env::temp_dir().join(format!("weir-written-{}", std::process::id()));
        let parse = |text: &str| text.parse::<Span>();
        assert_eq!(load(&path, parse).unwrap_err().to_string(), format!("read {}", path.display()));
        std::fs::write(&path, "soon").unwrap();
        let error = load(&path, parse).unwrap_err().to_string();
        std::fs::write(&path, "5s").unwrap();
        let span = load(&path, parse);
        std::fs::remove_file(&path).unwrap();
        assert!(error.starts_with(&format!("{}: `soon` is no duration", path.display())), "{error}");
        assert_eq!(span.unwrap(), Span(Duration::from_secs(5)));
    }
}
