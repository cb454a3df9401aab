//! Texts of alerts: messages, and texts with places.
//!
//! A message is a minijinja template over the values of one row, its labels, and the words of its rule, and reaches nothing
//! else: there is no loader and no second template, nothing is escaped, and [`FUEL`] and [`MESSAGE_BYTES_MAX`] end it. What a value
//! holds is text and is never read as a template. Of the language it has `{{ … }}`, `{% if … %}`, comparisons, `+ - /` and the
//! filters of [`environment`]: nothing by which a short template makes a long text in memory (no `*`, `~`, loops or widths).
//!
//! A topic, and a label, has places as at the edge: `"alerts/traffic/{device}/congestion"`; `{{` and `}}` are braces. A value is at
//! most [`VALUE_BYTES_MAX`] bytes; in a topic it is one level ([`super::topic::level`]).

use std::collections::BTreeMap;
use std::io::Write;

use minijinja::{AutoEscape, Environment, UndefinedBehavior, filters};
use serde_json::Value;

use super::topic::{self, TOPIC_BYTES_MAX};

/// Longest message as it is written, and as it comes out.
pub(crate) const MESSAGE_BYTES_MAX: usize = 4_096;
/// Steps that one message may take.
const FUEL: u64 = 10_000;
/// Of a value within a text; the rest is left out.
const VALUE_BYTES_MAX: usize = 256;

/// What goes into the places: the row's values and labels, and `rule`, `stream`, `severity`, `id`.
pub(crate) type Words = BTreeMap<String, Value>;

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message(String);

pub(crate) fn environment() -> Environment<'static> {
    let mut environment = Environment::empty();
    environment.add_filter("abs", filters::abs);
    environment.add_filter("default", filters::default);
    environment.add_filter("float", filters::float);
    environment.add_filter("int", filters::int);
    environment.add_filter("length", filters::length);
    environment.add_filter("lower", filters::lower);
    environment.add_filter("round", filters::round);
    environment.add_filter("times", |value: f64, factor: f64| value * factor);
    environment.add_filter("trim", filters::trim);
    environment.add_filter("upper", filters::upper);
    environment.add_test("defined", minijinja::tests::is_defined);
    environment.add_test("none", minijinja::tests::is_none);
    environment.set_fuel(Some(FUEL));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment
}

/// Refuses what could make a long text out of a short one.
pub(crate) fn within_bounds(text: &str) -> Result<(), String> {
    let mut rest = text;
    while let Some(at) = rest.find("{{").into_iter().chain(rest.find("{%")).chain(rest.find("{#")).min() {
        let (opening, inside) = rest[at..].split_at(2);
        if opening == "{#" {
            rest = inside.split_once("#}").map_or("", |(_, after)| after);
            continue;
        }
        if opening == "{%" {
            let word = inside.trim_start_matches(['-', '+', ' ', '\t', '\r', '\n']);
            let word = &word[..word.find(|letter: char| !letter.is_ascii_alphabetic()).unwrap_or(word.len())];
            if !["if", "elif", "else", "endif"].contains(&word) {
                return Err(format!("message: `{{% {word:.20} %}}` is not for messages, `{{% if %}}` is"));
            }
        }
        let closing = if opening == "{{" { "}}" } else { "%}" };
        let (mut quote, mut escaped, mut end) = (None, false, inside.len());
        for (index, letter) in inside.char_indices() {
            match quote {
                Some(_) if escaped => escaped = false,
                Some(_) if letter == '\\' => escaped = true,
                Some(open) if letter == open => quote = None,
                Some(_) => {}
                None if inside[index..].starts_with(closing) => {
                    end = index + closing.len();
                    break;
                }
                None if matches!(letter, '\'' | '"') => quote = Some(letter),
                None if matches!(letter, '*' | '~' | '{' | '[') => {
                    return Err(format!("message: `{letter}` is not for messages; `| times(3.6)` multiplies"));
                }
                None => {}
            }
        }
        rest = &inside[end..];
    }
    Ok(())
}

impl Message {
    /// Reads a message; `known` are the words that it may use, when they are known.
    ///
    /// # Errors
    /// Why it is none, for people.
    pub(crate) fn parse(text: &str, known: Option<&[String]>) -> Result<Self, String> {
        if text.len() > MESSAGE_BYTES_MAX {
            return Err(format!("message: more than {MESSAGE_BYTES_MAX} bytes"));
        }
        within_bounds(text)?;
        let environment = environment();
        let template =
            environment.template_from_named_str("message", text).map_err(|error| format!("message: {error}"))?;
        if let Some(known) = known {
            for word in template.undeclared_variables(false) {
                if !known.contains(&word) {
                    let nearest = known.iter().min_by_key(|name| strsim::levenshtein(name, &word));
                    let hint = nearest.map(|name| format!("; did you mean `{name}`?")).unwrap_or_default();
                    return Err(format!("message: `{word}` is no value of its rows{hint}"));
                }
            }
        }
        Ok(Self(text.to_owned()))
    }

    /// The message of a row. One that fails says so, and what its rule is.
    pub(crate) fn fill(&self, words: &Words) -> String {
        let (text, filled) = self.filled(words);
        match filled {
            Ok(()) => text,
            Err(_) if text.len() >= MESSAGE_BYTES_MAX => text,
            Err(error) => {
                let rule = words.get("rule").and_then(Value::as_str).unwrap_or_default();
                format!("{rule} (its message fails: {})", error.kind())
            }
        }
    }

    /// The text of these words, if it is whole.
    ///
    /// # Errors
    /// When it fails, or is too long.
    pub(crate) fn whole(&self, words: &Words) -> Result<String, String> {
        let (text, filled) = self.filled(words);
        match filled {
            Ok(()) => Ok(text),
            Err(_) if text.len() >= MESSAGE_BYTES_MAX => Err(format!("more than {MESSAGE_BYTES_MAX} bytes")),
            Err(error) => Err(error.to_string()),
        }
    }

    fn filled(&self, words: &Words) -> (String, Result<(), minijinja::Error>) {
        let mut out = Limited(Vec::new());
        let filled = environment()
            .template_from_named_str("message", &self.0)
            .and_then(|template| template.render_captured_to(short(words), &mut out).map(drop));
        (String::from_utf8_lossy(&out.0).into_owned(), filled)
    }
}

/// A message that somebody else has made.
pub(crate) fn shorten(message: &str) -> String {
    message[..message.floor_char_boundary(MESSAGE_BYTES_MAX)].to_owned()
}

/// Values as far as texts have them.
pub(crate) fn short(words: &Words) -> Words {
    let cut = |value: &Value| match value {
        Value::String(text) => Value::String(text[..text.floor_char_boundary(VALUE_BYTES_MAX)].to_owned()),
        other => other.clone(),
    };
    words.iter().map(|(name, value)| (name.clone(), cut(value))).collect()
}

/// Takes so much and then fails.
struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let room = MESSAGE_BYTES_MAX - self.0.len();
        if room == 0 {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        let taken = room.min(bytes.len());
        self.0.extend(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A text with places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Places(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Place(String),
}

impl Places {
    /// Reads a text.
    ///
    /// # Errors
    /// When a brace is not closed, or a place names none of `known`.
    pub(crate) fn parse(text: &str, known: Option<&[String]>) -> Result<Self, String> {
        if text.len() > TOPIC_BYTES_MAX {
            return Err(format!("a text of more than {TOPIC_BYTES_MAX} bytes"));
        }
        let (mut parts, mut plain, mut rest) = (Vec::new(), String::new(), text);
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
            if let Some(known) = known.filter(|known| !known.iter().any(|word| word == name)) {
                return Err(format!("`{text}`: {{{name}}} is none of {}", known.join(", ")));
            }
            if !plain.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut plain)));
            }
            parts.push(Part::Place(name.to_owned()));
            rest = after;
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            parts.push(Part::Text(plain));
        }
        Ok(Self(parts))
    }

    /// What its places name.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|part| match part {
            Part::Place(name) => Some(&**name),
            Part::Text(_) => None,
        })
    }

    /// As a text.
    pub(crate) fn fill(&self, words: &Words) -> String {
        self.fill_with(words, |value| value[..value.floor_char_boundary(VALUE_BYTES_MAX)].to_owned())
    }

    /// As a topic.
    pub(crate) fn fill_topic(&self, words: &Words) -> String {
        let mut topic = self.fill_with(words, topic::level);
        topic.truncate(topic.floor_char_boundary(TOPIC_BYTES_MAX));
        topic
    }

    fn fill_with(&self, words: &Words, shape: impl Fn(&str) -> String) -> String {
        let mut out = String::new();
        for part in &self.0 {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Place(name) => match words.get(name) {
                    None | Some(Value::Null) => out.push_str(&shape("NULL")),
                    Some(Value::String(text)) => out.push_str(&shape(text)),
                    Some(other) => out.push_str(&shape(&other.to_string())),
                },
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn words(pairs: &[(&str, Value)]) -> Words {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect()
    }

    fn message(text: &str, words: &Words) -> String {
        Message::parse(text, None).unwrap().fill(words)
    }

    #[test]
    fn a_message_shows_the_values_of_its_row() {
        let words = words(&[("device", json!("d<1>")), ("speed", json!(12.25)), ("rule", json!("slow"))]);
        assert_eq!(message("{{ device }}: {{ speed | round(1) }} km/h", &words), "d<1>: 12.3 km/h");
        assert_eq!(message("{% if speed < 20 %}slow{% endif %}", &words), "slow");
        assert_eq!(message("{{ nothing }}", &words), "");
    }

    #[test]
    fn code_in_a_value_is_text() {
        let evil = "{{ 7 * 7 }}{% for x in range(9) %}x{% endfor %}'; DROP TABLE traffic; --";
        let words = words(&[("device", json!(evil)), ("rule", json!("r"))]);
        assert_eq!(message("{{ device }}", &words), evil);
        assert_eq!(Places::parse("{device}", None).unwrap().fill(&words), evil);
        let topic = Places::parse("a/{device}/b", None).unwrap().fill_topic(&words);
        assert_eq!(topic.split('/').count(), 3, "{topic}");
    }

    #[test]
    fn a_message_that_does_not_end_is_ended() {
        let device = words(&[("device", json!("x".repeat(200)))]);
        let long = message(&"{{ device }}".repeat(300), &device);
        assert_eq!(long.len(), MESSAGE_BYTES_MAX);
        assert!(message("{{ device / 2 }}", &device).contains("its message fails"));
        let huge = words(&[("device", json!("x".repeat(65_536)))]);
        assert_eq!(message("{{ device }}", &huge).len(), VALUE_BYTES_MAX);
        for wrong in [
            "{{ device",
            "{% include 'other' %}",
            "{% import 'x' as y %}",
            "{%- for a in device %}{% endfor %}",
            "{% set x = device %}",
            "{{ device * 100000000 }}",
            "{{ '}}' * 100000000 }}",
            "{{ '\\'' * 100000000 }}",
            "{{ device ~ device }}",
            "{{ {'a': {}} or device * 9 }}",
            "{{ device | indent(99999999999999) }}",
            "{{ '%s' | format(device) }}",
            "{{ device | replace('a', device) }}",
            &"x".repeat(5_000),
        ] {
            let read = Message::parse(wrong, None);
            assert!(read.as_ref().is_err() || read.unwrap().fill(&device).contains("fails"), "{wrong:.40}");
        }
        assert_eq!(
            message("** {{ 2 | times(3.5) }} ** {# * #}{% if device is defined %}~{% endif %}", &device),
            "** 7.0 ** ~"
        );
    }

    #[test]
    fn a_word_that_is_not_known_is_refused() {
        let known = ["device".to_owned(), "avg_speed".to_owned()];
        let error = Message::parse("{{ avg_sped }}", Some(&known)).unwrap_err();
        assert!(error.contains("did you mean `avg_speed`?"), "{error}");
        assert!(Message::parse("{% if avg_speed > 2 %}{{ device | upper }}{% endif %}", Some(&known)).is_ok());
        assert!(Places::parse("a/{lane}", Some(&known)).is_err());
        assert!(Places::parse("a/{device", Some(&known)).is_err());
        assert_eq!(Places::parse("a{{b}}", Some(&known)).unwrap().fill(&Words::new()), "a{b}");
    }
}
