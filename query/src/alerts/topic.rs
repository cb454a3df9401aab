//! Topics as MQTT has them: levels between `/`; in a filter `+` stands for one level, and `#` at the end for all that follow.

use std::borrow::Cow;

use ring::digest::{SHA256, digest};

/// Longest topic in bytes.
pub(crate) const TOPIC_BYTES_MAX: usize = 1_000;
/// Longest level that is made of a value, in bytes.
pub(crate) const LEVEL_BYTES_MAX: usize = 128;
/// Longest value of a label, in bytes.
const LABEL_BYTES_MAX: usize = 256;
/// Of what was cut: what tells it from others that begin like it.
const MARK_BYTES: usize = 9;

/// What somebody subscribed to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicFilter(Vec<String>);

impl TopicFilter {
    /// Reads a filter.
    ///
    /// # Errors
    /// Why it is none, for people.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.len() > TOPIC_BYTES_MAX || text.chars().any(char::is_control) {
            return Err(format!("a topic has from 1 to {TOPIC_BYTES_MAX} bytes and no control characters"));
        }
        let levels: Vec<&str> = text.split('/').collect();
        for (index, level) in levels.iter().enumerate() {
            let alone = *level == "+" || *level == "#" && index + 1 == levels.len();
            if !alone && level.contains(['+', '#']) {
                return Err(format!("`{text}`: `+` is a whole level, and `#` the whole last one"));
            }
        }
        Ok(Self(levels.into_iter().map(str::to_owned).collect()))
    }

    /// Its levels.
    pub(crate) fn levels(&self) -> &[String] {
        &self.0
    }

    /// Whether a topic is among those that are meant.
    pub fn matches(&self, topic: &str) -> bool {
        let mut levels = topic.split('/');
        for filter in &self.0 {
            match (filter.as_str(), levels.next()) {
                // `a/#` means `a`, too.
                ("#", _) => return true,
                ("+", Some(_)) => {}
                (own, Some(level)) if own == level => {}
                _ => return false,
            }
        }
        levels.next().is_none()
    }
}

/// A value as one level, or a part of one: whatever a device sends makes no other levels, and no wildcard.
pub(crate) fn level(value: &str) -> String {
    let unsafe_in_topics = |letter: char| matches!(letter, '+' | '#' | '/') || letter.is_control();
    let clean = value.replace(unsafe_in_topics, "_");
    if clean.is_empty() {
        return "_".to_owned();
    }
    if clean.len() <= LEVEL_BYTES_MAX { clean } else { cut(&clean, value, LEVEL_BYTES_MAX) }
}

/// A value as a label: what is longer than [`LABEL_BYTES_MAX`] keeps its beginning, and a mark of all of it.
pub(crate) fn label(value: &str) -> Cow<'_, str> {
    if value.len() <= LABEL_BYTES_MAX { value.into() } else { cut(value, value, LABEL_BYTES_MAX).into() }
}

fn cut(text: &str, whole: &str, bytes_max: usize) -> String {
    let kept = &text[..text.floor_char_boundary(bytes_max - MARK_BYTES)];
    let mark = digest(&SHA256, whole.as_bytes());
    let mark: String = mark.as_ref()[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{kept}~{mark}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_mean_what_mqtt_means() {
        for (filter, topic, expected) in [
            ("alerts/traffic/+/congestion", "alerts/traffic/d1/congestion", true),
            ("alerts/traffic/+/congestion", "alerts/traffic/d1/d2/congestion", false),
            ("alerts/traffic/+/congestion", "alerts/traffic/d1/other", false),
            ("alerts/#", "alerts/a/b", true),
            ("alerts/#", "alerts", true),
            ("alerts/#", "alertsx/a", false),
            ("#", "anything/at/all", true),
            ("+", "a", true),
            ("+", "a/b", false),
            ("a/+", "a/", true),
            ("a/b", "a/b", true),
            ("a/b", "a", false),
            ("a", "a/b", false),
        ] {
            assert_eq!(TopicFilter::parse(filter).unwrap().matches(topic), expected, "{filter} {topic}");
        }
        for wrong in ["", "a+/b", "#/a", "a/b#", "a\u{0}", "a\nb", &"x".repeat(65_536)] {
            assert!(TopicFilter::parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_value_is_one_level_whatever_it_is() {
        assert_eq!(level("a/b+c#d\u{0}e\nf"), "a_b_c_d_e_f");
        assert_eq!(level(""), "_");
        let long = level(&"x".repeat(65_536));
        assert_eq!(long.len(), LEVEL_BYTES_MAX);
        assert_ne!(long, level(&"x".repeat(65_535)), "two that begin alike stay two");
        assert!(level(&"é".repeat(40_000)).len() <= LEVEL_BYTES_MAX);
        assert_eq!(label("a/b"), "a/b");
        assert_eq!(label(&"x".repeat(65_536)).len(), LABEL_BYTES_MAX);
        assert_ne!(label(&"x".repeat(65_536)), label(&"x".repeat(65_535)));
    }
}
