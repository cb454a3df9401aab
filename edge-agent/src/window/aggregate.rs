//! The running aggregates of one window and device, and what they count as in memory.

use wire::FieldType;

use crate::decode::{Reading, Value};

/// The aggregates of a field: suffix of the column, and its type.
pub(super) fn columns(kind: FieldType) -> &'static [(&'static str, FieldType)] {
    use FieldType::{Bool, Float64, Int64, Text};
    match kind {
        Float64 => &[
            ("min", Float64),
            ("max", Float64),
            ("avg", Float64),
            ("sum", Float64),
            ("first", Float64),
            ("last", Float64),
        ],
        Int64 => &[("min", Int64), ("max", Int64), ("avg", Float64), ("sum", Int64), ("first", Int64), ("last", Int64)],
        Bool => &[("first", Bool), ("last", Bool)],
        _ => &[("first", Text), ("last", Text)],
    }
}

/// What a result counts as, besides its device, its fields and their texts. A number of its own and no size of a type: what
/// is given up must not depend on the machine.
const RESULT_BYTES: usize = 160;
/// What each field counts as.
const FIELD_BYTES: usize = 96;

/// All fields of one window and device.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Aggregate {
    pub(super) count: i64,
    /// 0 while it is open.
    pub(super) revision: i64,
    pub(super) fields: Vec<Field>,
}

/// One field. `min`, `max`, `sum` are there for numbers only.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Field {
    Float { count: i64, min: f64, max: f64, sum: f64, ends: Option<Ends<f64>> },
    Int { count: i64, min: i64, max: i64, sum: i128, ends: Option<Ends<i64>> },
    Other { ends: Option<Ends<Value>> },
}

/// The first and the last value by event time.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Ends<T> {
    pub(super) first: (i64, T),
    pub(super) last: (i64, T),
}

impl<T: Clone> Ends<T> {
    fn add(this: &mut Option<Self>, ts: i64, value: &T) {
        match this {
            None => *this = Some(Self { first: (ts, value.clone()), last: (ts, value.clone()) }),
            Some(ends) => {
                if ts < ends.first.0 {
                    ends.first = (ts, value.clone());
                }
                if ts >= ends.last.0 {
                    ends.last = (ts, value.clone());
                }
            }
        }
    }
}

impl Field {
    fn text_bytes(&self) -> usize {
        let text = |value: &Value| if let Value::Text(text) = value { text.len() } else { 0 };
        match self {
            Self::Other { ends: Some(ends) } => text(&ends.first.1) + text(&ends.last.1),
            _ => 0,
        }
    }
}

impl Aggregate {
    pub(super) fn new(kinds: &[FieldType]) -> Self {
        let field = |kind: &FieldType| match kind {
            FieldType::Float64 => {
                Field::Float { count: 0, min: f64::INFINITY, max: f64::NEG_INFINITY, sum: 0.0, ends: None }
            }
            FieldType::Int64 => Field::Int { count: 0, min: i64::MAX, max: i64::MIN, sum: 0, ends: None },
            _ => Field::Other { ends: None },
        };
        Self { count: 0, revision: 0, fields: kinds.iter().map(field).collect() }
    }

    /// What it counts as with the name of its device: a function of what it holds.
    pub(super) fn bytes(&self, device: &str) -> usize {
        let texts = self.fields.iter().map(Field::text_bytes).sum::<usize>();
        RESULT_BYTES + device.len() + self.fields.len() * FIELD_BYTES + texts
    }

    pub(super) fn add(&mut self, reading: &Reading) {
        self.count += 1;
        for (field, value) in self.fields.iter_mut().zip(&reading.values) {
            let Some(value) = value else { continue };
            match (field, value) {
                (Field::Float { count, min, max, sum, ends }, Value::Float(value)) => {
                    *count += 1;
                    *min = min.min(*value);
                    *max = max.max(*value);
                    *sum += value;
                    Ends::add(ends, reading.ts, value);
                }
                (Field::Int { count, min, max, sum, ends }, Value::Int(value)) => {
                    *count += 1;
                    *min = (*min).min(*value);
                    *max = (*max).max(*value);
                    *sum += i128::from(*value);
                    Ends::add(ends, reading.ts, value);
                }
                (Field::Other { ends }, value) => Ends::add(ends, reading.ts, value),
                // A value of another type than its field does not come out of the decoder.
                _ => {}
            }
        }
    }

    /// In the order of [`columns`] for each field.
    pub(super) fn values(&self) -> Vec<Option<Value>> {
        let mut values = Vec::new();
        for field in &self.fields {
            match field {
                Field::Float { count, min, max, sum, ends: Some(ends) } => {
                    let average = sum / *count as f64;
                    // A sum of finite numbers may still be infinite, and infinity is no reading.
                    let finite = |value: f64| value.is_finite().then_some(Value::Float(value));
                    values.extend([finite(*min), finite(*max), finite(average), finite(*sum)]);
                    values.extend([finite(ends.first.1), finite(ends.last.1)]);
                }
                Field::Int { count, min, max, sum, ends: Some(ends) } => {
                    let average = *sum as f64 / *count as f64;
                    values.extend([Some(Value::Int(*min)), Some(Value::Int(*max)), Some(Value::Float(average))]);
                    values.push(i64::try_from(*sum).ok().map(Value::Int));
                    values.extend([Some(Value::Int(ends.first.1)), Some(Value::Int(ends.last.1))]);
                }
                Field::Other { ends: Some(ends) } => {
                    values.extend([Some(ends.first.1.clone()), Some(ends.last.1.clone())]);
                }
                Field::Float { .. } | Field::Int { .. } => values.extend([const { None }; 6]),
                Field::Other { .. } => values.extend([None, None]),
            }
        }
        values
    }
}
