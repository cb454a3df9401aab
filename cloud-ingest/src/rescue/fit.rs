//! Which values fit a column of another type. Pure.
//!
//! A value fits when the column can hold it and give it back. An integer fits a float column that holds it exactly, a float
//! without a fraction fits an integer column, every number and truth value fits a text column, and a text fits a column
//! that the text is a value of (`12.50`, `true`). A truth value is no number and a number is none. No value of another type
//! fits a timestamp or bytes, and a float that is not finite fits nothing. What is given back is the value, not its
//! spelling: `5.30` becomes 5.3.
//!
//! Everything is judged by what it is in JSON, so that a value which waits in `_rescued` fits like the one that came: a
//! timestamp there is its number of µs, bytes are hexadecimal. A float without a fraction is written like the integer, in
//! JSON and in text, so that it makes no difference in which of the two columns it was before.

use std::borrow::Cow;
use std::sync::Arc;

use arrow_array::builder::{BooleanBuilder, Float64Builder, Int64Builder, StringBuilder};
use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type, TimestampMicrosecondType};
use arrow_array::{ArrayRef, new_null_array};
use serde_json::Number;
use serde_json::value::{RawValue, to_raw_value};
use wire::schema::FieldType;

/// Integers below, either way, are floats of their own, and no other is rounded to them.
const EXACT_MAX: f64 = 9_007_199_254_740_992.0;
/// The first float above all integers of 64 bits.
const INTEGERS_END: f64 = 9_223_372_036_854_775_808.0;

/// A value, of whatever column it is.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Given<'a> {
    Float(f64),
    Int(i64),
    Bool(bool),
    Text(Cow<'a, str>),
}

impl<'a> Given<'a> {
    /// A value of a column, which is not null; none of a type that no column of ours has.
    pub(super) fn of(column: &'a ArrayRef, row: usize) -> Option<Self> {
        Some(match FieldType::from_arrow(column.data_type())? {
            FieldType::Float64 => Self::Float(column.as_primitive::<Float64Type>().value(row)),
            FieldType::Int64 => Self::Int(column.as_primitive::<Int64Type>().value(row)),
            FieldType::Bool => Self::Bool(column.as_boolean().value(row)),
            FieldType::Text => Self::Text(column.as_string::<i32>().value(row).into()),
            FieldType::Timestamp => Self::Int(column.as_primitive::<TimestampMicrosecondType>().value(row)),
            FieldType::Binary => {
                let bytes = column.as_binary::<i32>().value(row);
                Self::Text(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into())
            }
        })
    }

    /// A value of `_rescued`; none of one that was never put there.
    pub(super) fn of_json(raw: &'a RawValue) -> Option<Self> {
        let text = raw.get();
        match text.as_bytes().first()? {
            b'"' => serde_json::from_str::<String>(text).ok().map(|text| Self::Text(text.into())),
            b't' | b'f' => text.parse().ok().map(Self::Bool),
            // By the standard library, which reads every float as the one that was written.
            _ => text.parse().map(Self::Int).or_else(|_| text.parse().map(Self::Float)).ok(),
        }
    }

    /// As it stands in `_rescued`.
    pub(super) fn json(&self) -> Box<RawValue> {
        let raw = match self {
            Self::Float(value) if value.is_nan() => to_raw_value("NaN"),
            Self::Float(value) if value.is_infinite() && *value > 0.0 => to_raw_value("Infinity"),
            Self::Float(value) if value.is_infinite() => to_raw_value("-Infinity"),
            Self::Float(value) => self.int().map_or_else(|| to_raw_value(value), |whole| to_raw_value(&whole)),
            Self::Int(value) => to_raw_value(value),
            Self::Bool(value) => to_raw_value(value),
            Self::Text(text) => to_raw_value(text),
        };
        raw.expect("numbers and text are JSON")
    }

    pub(super) fn is_finite(&self) -> bool {
        !matches!(self, Self::Float(value) if !value.is_finite())
    }

    fn float(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value).filter(|value| value.is_finite()),
            Self::Int(value) => Some(*value as f64).filter(|float| *float as i128 == i128::from(*value)),
            // Digits alone are an integer, and must not be rounded.
            Self::Text(text) if !text.contains(['.', 'e', 'E']) => Self::Int(text.parse().ok()?).float(),
            Self::Text(text) => text.parse().ok().filter(|value: &f64| value.is_finite()),
            Self::Bool(_) => None,
        }
    }

    fn int(&self) -> Option<i64> {
        match self {
            Self::Int(value) => Some(*value),
            Self::Float(value) => {
                let within = (-INTEGERS_END..INTEGERS_END).contains(value) && value.fract() == 0.0;
                within.then_some(*value as i64)
            }
            Self::Text(text) => text.parse().ok().or_else(|| {
                // `12.0`; of larger ones the digits may be more than a float keeps.
                let float = text.parse::<f64>().ok().filter(|float| float.abs() < EXACT_MAX)?;
                Self::Float(float).int()
            }),
            Self::Bool(_) => None,
        }
    }

    fn bool(&self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(*value),
            Self::Text(text) => text.parse().ok(),
            Self::Float(_) | Self::Int(_) => None,
        }
    }

    fn text(&self) -> Option<Cow<'_, str>> {
        match self {
            Self::Text(text) => Some(Cow::Borrowed(text)),
            Self::Float(value) => match self.int() {
                Some(whole) => Some(whole.to_string().into()),
                None => Number::from_f64(*value).map(|number| number.to_string().into()),
            },
            Self::Int(value) => Some(value.to_string().into()),
            Self::Bool(value) => Some(value.to_string().into()),
        }
    }
}

/// A column that takes what fits it, row by row.
#[derive(Debug)]
pub(super) enum Fitting {
    Float(Float64Builder),
    Int(Int64Builder),
    Bool(BooleanBuilder),
    Text(StringBuilder),
    /// Takes nothing.
    Closed(FieldType, usize),
}

impl Fitting {
    pub(super) fn new(kind: FieldType, rows: usize) -> Self {
        match kind {
            FieldType::Float64 => Self::Float(Float64Builder::with_capacity(rows)),
            FieldType::Int64 => Self::Int(Int64Builder::with_capacity(rows)),
            FieldType::Bool => Self::Bool(BooleanBuilder::with_capacity(rows)),
            FieldType::Text => Self::Text(StringBuilder::with_capacity(rows, 0)),
            FieldType::Timestamp | FieldType::Binary => Self::Closed(kind, 0),
        }
    }

    /// Takes the next row's value if it fits; otherwise that row is null, and the answer false.
    pub(super) fn take(&mut self, given: Option<&Given<'_>>) -> bool {
        match self {
            Self::Float(floats) => {
                let value = given.and_then(Given::float);
                floats.append_option(value);
                value.is_some()
            }
            Self::Int(ints) => {
                let value = given.and_then(Given::int);
                ints.append_option(value);
                value.is_some()
            }
            Self::Bool(bools) => {
                let value = given.and_then(Given::bool);
                bools.append_option(value);
                value.is_some()
            }
            Self::Text(texts) => {
                let value = given.and_then(Given::text);
                texts.append_option(value.as_deref());
                value.is_some()
            }
            Self::Closed(_, rows) => {
                *rows += 1;
                false
            }
        }
    }

    pub(super) fn finish(self) -> ArrayRef {
        match self {
            Self::Float(mut floats) => Arc::new(floats.finish()),
            Self::Int(mut ints) => Arc::new(ints.finish()),
            Self::Bool(mut bools) => Arc::new(bools.finish()),
            Self::Text(mut texts) => Arc::new(texts.finish()),
            Self::Closed(kind, rows) => new_null_array(&kind.arrow(), rows),
        }
    }
}
