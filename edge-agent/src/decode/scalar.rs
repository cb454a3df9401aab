//! A value as a message has it, before it has the type of its field.

use std::borrow::Cow;
use std::ops::Range;

/// A value at a place.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Scalar<'a> {
    /// Null, or nothing there.
    Null,
    Bool(bool),
    Int(i64),
    /// Above what an i64 holds.
    Unsigned(u64),
    Float(f64),
    Text(Cow<'a, str>),
    /// A time that the format itself defines, µs since 1970 UTC.
    Time(i64),
    Object,
    Array,
}

/// Longest text that is read as a number or a time. A text of the message may stand in each of its readings: without a limit
/// it would be read as often.
pub(super) const NUMBER_BYTES_MAX: usize = 512;

/// A fault of a document: reason and detail.
pub(super) type Fault = (&'static str, String);

/// What a format finds in a message.
#[derive(Debug)]
pub(super) struct Record<'a> {
    pub(super) span: Range<usize>,
    /// What the `*` of `readings` stand for.
    pub(super) keys: &'a [String],
    /// In the order of the places that are asked for.
    pub(super) slots: Result<Vec<Scalar<'a>>, Fault>,
}

impl Scalar<'_> {
    pub(super) fn reborrow(&self) -> Scalar<'_> {
        match self {
            Scalar::Text(text) => Scalar::Text(Cow::Borrowed(text)),
            Scalar::Null => Scalar::Null,
            Scalar::Bool(value) => Scalar::Bool(*value),
            Scalar::Int(value) => Scalar::Int(*value),
            Scalar::Unsigned(value) => Scalar::Unsigned(*value),
            Scalar::Float(value) => Scalar::Float(*value),
            Scalar::Time(us) => Scalar::Time(*us),
            Scalar::Object => Scalar::Object,
            Scalar::Array => Scalar::Array,
        }
    }

    /// For people.
    pub(super) fn describe(&self) -> String {
        match self {
            Scalar::Null => "null".to_owned(),
            Scalar::Bool(value) => format!("{value}"),
            Scalar::Int(value) => format!("{value}"),
            Scalar::Unsigned(value) => format!("{value}"),
            Scalar::Float(value) => format!("{value}"),
            Scalar::Text(text) => format!("the text {:?}", text.chars().take(80).collect::<String>()),
            Scalar::Time(us) => format!("the time {us} µs"),
            Scalar::Object => "an object".to_owned(),
            Scalar::Array => "an array".to_owned(),
        }
    }

    /// As a float, when it is a number.
    pub(super) fn number(&self) -> Option<f64> {
        match self {
            Scalar::Int(value) => Some(*value as f64),
            Scalar::Unsigned(value) => Some(*value as f64),
            Scalar::Float(value) => Some(*value),
            Scalar::Time(us) => Some(*us as f64),
            _ => None,
        }
    }
}
