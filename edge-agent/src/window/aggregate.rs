//! The running aggregates of one window and device, and what they count as in memory.

use wire::FieldType;

use super::sketch::Sketch;
use crate::config::{AggregateKind, Number};
use crate::decode::{Reading, Value};

/// What an aggregate keeps besides what each has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Wants {
    pub(super) spread: bool,
    pub(super) sketch: bool,
    pub(super) points: bool,
}

impl Wants {
    pub(super) fn of(kinds: &[AggregateKind]) -> Self {
        use AggregateKind::{Increase, P50, P95, P99, Rate, Stddev};
        let has = |wanted: &[AggregateKind]| wanted.iter().any(|kind| kinds.contains(kind));
        Self { spread: has(&[Stddev]), sketch: has(&[P50, P95, P99]), points: has(&[Increase, Rate]) }
    }

    pub(super) fn any(self) -> bool {
        self != Self::default()
    }
}

/// What a field keeps for the aggregates that need more. Unused for what is no number.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Extra {
    /// Mean, and the sum of the squared distances from it (Welford, Technometrics 1962).
    pub(super) count: i64,
    pub(super) mean: f64,
    pub(super) squares: f64,
    pub(super) sketch: Sketch,
    /// By event time, of equal ones by arrival: a late value may lie anywhere between two others.
    pub(super) points: Vec<(i64, Number)>,
}

impl Extra {
    fn add(&mut self, wants: Wants, ts: i64, number: Number) {
        let value = float(number);
        if wants.spread {
            self.count += 1;
            let distance = value - self.mean;
            self.mean += distance / self.count as f64;
            self.squares += distance * (value - self.mean);
        }
        if wants.sketch {
            self.sketch.add(value);
        }
        if wants.points {
            let at = self.points.partition_point(|point| point.0 <= ts);
            self.points.insert(at, (ts, number));
        }
    }

    /// By Chan, Golub and LeVeque (1979).
    fn merge(&mut self, other: &Self) {
        let count = self.count + other.count;
        if count > 0 {
            let distance = other.mean - self.mean;
            let part = other.count as f64 / count as f64;
            self.squares += other.squares + distance * distance * self.count as f64 * part;
            self.mean += distance * part;
            self.count = count;
        }
        self.sketch.merge(&other.sketch);
        self.points.extend_from_slice(&other.points);
        self.points.sort_by_key(|point| point.0);
    }

    fn bytes(&self) -> usize {
        EXTRA_BYTES + self.sketch.buckets() * BUCKET_BYTES + self.points.len() * POINT_BYTES
    }

    /// None of fewer than two values.
    fn increase(&self) -> Option<f64> {
        let step = |pair: &[(i64, Number)]| match (pair[0].1, pair[1].1) {
            (from, to) if to < from => float(to),
            (Number::Int(from), Number::Int(to)) => (i128::from(to) - i128::from(from)) as f64,
            (from, to) => float(to) - float(from),
        };
        (self.points.len() > 1).then(|| self.points.windows(2).map(step).sum())
    }

    fn rate(&self) -> Option<f64> {
        let span_us = self.points.last()?.0 - self.points.first()?.0;
        self.increase().filter(|_| span_us > 0).map(|increase| increase / (span_us as f64 / 1e6))
    }
}

fn float(number: Number) -> f64 {
    match number {
        Number::Int(value) => value as f64,
        Number::Float(value) => value,
    }
}

/// What a result counts as, besides its device, its fields and their texts. A number of its own and no size of a type: what
/// is given up must not depend on the machine.
const RESULT_BYTES: usize = 160;
/// What each field counts as.
const FIELD_BYTES: usize = 96;
/// What a field counts as that keeps more, with each bucket and point.
const EXTRA_BYTES: usize = 104;
const BUCKET_BYTES: usize = 24;
const POINT_BYTES: usize = 24;

/// All fields of one window and device.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Aggregate {
    pub(super) count: i64,
    /// 0 while it is open.
    pub(super) revision: i64,
    /// The newest event time: where a session ends.
    pub(super) newest: i64,
    pub(super) fields: Vec<Field>,
    /// One for each field, or none at all.
    pub(super) extras: Vec<Extra>,
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
    fn merge(this: &mut Option<Self>, other: Option<Self>) {
        match (this.as_mut(), other) {
            (_, None) => {}
            (None, other) => *this = other,
            (Some(mine), Some(other)) => {
                if other.first.0 < mine.first.0 {
                    mine.first = other.first;
                }
                if other.last.0 >= mine.last.0 {
                    mine.last = other.last;
                }
            }
        }
    }

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
    pub(super) fn new(kinds: &[FieldType], wants: Wants) -> Self {
        let field = |kind: &FieldType| match kind {
            FieldType::Float64 => {
                Field::Float { count: 0, min: f64::INFINITY, max: f64::NEG_INFINITY, sum: 0.0, ends: None }
            }
            FieldType::Int64 => Field::Int { count: 0, min: i64::MAX, max: i64::MIN, sum: 0, ends: None },
            _ => Field::Other { ends: None },
        };
        let extras = if wants.any() { vec![Extra::default(); kinds.len()] } else { Vec::new() };
        Self { count: 0, revision: 0, newest: i64::MIN, fields: kinds.iter().map(field).collect(), extras }
    }

    /// What it counts as with the name of its device: a function of what it holds.
    pub(super) fn bytes(&self, device: &str) -> usize {
        let texts = self.fields.iter().map(Field::text_bytes).sum::<usize>();
        let extras = self.extras.iter().map(Extra::bytes).sum::<usize>();
        RESULT_BYTES + device.len() + self.fields.len() * FIELD_BYTES + texts + extras
    }

    pub(super) fn add(&mut self, reading: &Reading, wants: Wants) {
        self.count += 1;
        self.newest = self.newest.max(reading.ts);
        for (extra, value) in self.extras.iter_mut().zip(&reading.values) {
            match value {
                Some(Value::Float(value)) => extra.add(wants, reading.ts, Number::Float(*value)),
                Some(Value::Int(value)) => extra.add(wants, reading.ts, Number::Int(*value)),
                _ => {}
            }
        }
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

    /// Takes over the rows of another, and leaves its revision.
    pub(super) fn merge(&mut self, other: Self) {
        self.count += other.count;
        self.newest = self.newest.max(other.newest);
        self.extras.iter_mut().zip(&other.extras).for_each(|(mine, other)| mine.merge(other));
        for (mine, other) in self.fields.iter_mut().zip(other.fields) {
            match (mine, other) {
                (
                    Field::Float { count, min, max, sum, ends },
                    Field::Float { count: c, min: least, max: most, sum: s, ends: e },
                ) => {
                    (*count, *min, *max, *sum) = (*count + c, min.min(least), max.max(most), *sum + s);
                    Ends::merge(ends, e);
                }
                (
                    Field::Int { count, min, max, sum, ends },
                    Field::Int { count: c, min: least, max: most, sum: s, ends: e },
                ) => {
                    (*count, *min, *max, *sum) = (*count + c, (*min).min(least), (*max).max(most), *sum + s);
                    Ends::merge(ends, e);
                }
                (Field::Other { ends }, Field::Other { ends: e }) => Ends::merge(ends, e),
                // Both are of one stream, and its fields have one type each.
                _ => {}
            }
        }
    }

    /// Of each field what its type has of these, in their order.
    pub(super) fn values(&self, kinds: &[AggregateKind]) -> Vec<Option<Value>> {
        let mut values = Vec::new();
        for (index, field) in self.fields.iter().enumerate() {
            let extra = self.extras.get(index);
            let of_field = kinds.iter().filter(|kind| !matches!(field, Field::Other { .. }) || is_end(**kind));
            values.extend(of_field.map(|kind| field.value(*kind, extra)));
        }
        values
    }
}

fn is_end(kind: AggregateKind) -> bool {
    matches!(kind, AggregateKind::First | AggregateKind::Last)
}

/// A sum of finite numbers may still be infinite, and infinity is no reading.
fn finite(value: f64) -> Option<Value> {
    value.is_finite().then_some(Value::Float(value))
}

impl Field {
    fn value(&self, kind: AggregateKind, extra: Option<&Extra>) -> Option<Value> {
        use AggregateKind as Kind;
        let extra = || extra.filter(|_| self.count() > 0);
        match kind {
            Kind::Stddev => {
                let extra = extra().filter(|extra| extra.count > 1)?;
                return finite((extra.squares / (extra.count - 1) as f64).sqrt());
            }
            Kind::P50 => return self.quantile(0.5, extra()?),
            Kind::P95 => return self.quantile(0.95, extra()?),
            Kind::P99 => return self.quantile(0.99, extra()?),
            Kind::Increase => return extra()?.increase().and_then(finite),
            Kind::Rate => return extra()?.rate().and_then(finite),
            _ => {}
        }
        match self {
            Self::Float { count, min, max, sum, ends: Some(ends) } => finite(match kind {
                Kind::Min => *min,
                Kind::Max => *max,
                Kind::Avg => sum / *count as f64,
                Kind::Sum => *sum,
                Kind::First => ends.first.1,
                _ => ends.last.1,
            }),
            Self::Int { count, min, max, sum, ends: Some(ends) } => Some(match kind {
                Kind::Min => Value::Int(*min),
                Kind::Max => Value::Int(*max),
                Kind::Avg => Value::Float(*sum as f64 / *count as f64),
                Kind::Sum => return i64::try_from(*sum).ok().map(Value::Int),
                Kind::First => Value::Int(ends.first.1),
                _ => Value::Int(ends.last.1),
            }),
            Self::Other { ends: Some(ends) } if kind == Kind::First => Some(ends.first.1.clone()),
            Self::Other { ends: Some(ends) } => Some(ends.last.1.clone()),
            _ => None,
        }
    }

    fn count(&self) -> i64 {
        match self {
            Self::Float { count, .. } | Self::Int { count, .. } => *count,
            Self::Other { .. } => 0,
        }
    }

    /// Not beyond what was there.
    fn quantile(&self, q: f64, extra: &Extra) -> Option<Value> {
        let value = extra.sketch.quantile(q)?;
        match self {
            Self::Float { min, max, .. } => finite(value.clamp(*min, *max)),
            Self::Int { min, max, .. } => finite(value.clamp(*min as f64, *max as f64)),
            Self::Other { .. } => None,
        }
    }
}
