//! When nobody wants to be told: silences, which have an end, and maintenance windows, which come again.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Labels of an alert, read.
pub(crate) type Labels = BTreeMap<String, serde_json::Value>;

/// Which alerts, and when. Times are µs since 1970 UTC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Silence {
    pub(crate) id: String,
    /// A pattern: `*` stands for any characters.
    pub(crate) rule: Option<String>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) from: i64,
    pub(crate) until: i64,
    /// A maintenance window comes again after so long, and ends for ever at `last`.
    pub(crate) every: Option<i64>,
    pub(crate) last: i64,
    pub(crate) by: String,
    pub(crate) note: String,
}

impl Silence {
    /// Whether nothing of it is to come.
    pub(crate) fn is_over(&self, now: i64) -> bool {
        now >= if self.every.is_some() { self.last } else { self.until }
    }

    /// Whether it holds for this alert now.
    pub(crate) fn holds(&self, rule: &str, labels: &Labels, now: i64) -> bool {
        if now < self.from || self.is_over(now) {
            return false;
        }
        let within = match self.every {
            Some(every) if every > 0 => (now - self.from) % every < self.until - self.from,
            _ => true,
        };
        if !within || self.rule.as_ref().is_some_and(|pattern| !fits(pattern, rule)) {
            return false;
        }
        self.labels.iter().all(|(name, pattern)| match labels.get(name) {
            Some(serde_json::Value::String(text)) => fits(pattern, text),
            Some(other) => fits(pattern, &other.to_string()),
            None => false,
        })
    }
}

/// Whether a text is what a pattern means; `*` stands for any characters.
pub(crate) fn fits(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("a*", "abc", true),
            ("*c", "abc", true),
            ("a*c", "abbc", true),
            ("a*b*c", "a1b2c", true),
            ("a*b*c", "a1c2b", false),
            ("abc", "abc", true),
            ("abc", "abcd", false),
            ("a*a", "a", false),
        ] {
            assert_eq!(fits(pattern, text), expected, "{pattern} {text}");
        }
    }
}
