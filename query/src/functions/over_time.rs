//! Aggregates over the course of a value in time: `delta`, `increase` and `rate` of `(v, ts)`, and the time-weighted
//! average, `time_weighted_avg(v, ts [, 'locf' | 'linear'])` or `time_weight('locf' | 'linear', ts, v)`.
//!
//! The points of a group are its rows that have both a value and a `ts`, in order of `ts`; of several at one instant the
//! greatest value counts. With points (t1, v1) … (tn, vn):
//! - `delta`: vn - v1.
//! - `increase`, of a counter that may begin anew from 0: the sum over i of vi - v(i-1), or of vi where vi < v(i-1).
//! - `rate`: increase / (tn - t1), per second (per 1 when `ts` is an integer). Nothing is extrapolated.
//! - the average weighted by time: the integral over t1 … tn divided by tn - t1; between points the value stays as it was
//!   (`locf`, the default) or runs in a straight line (`linear`).
//!
//! With one point the average is its value, the others are NULL; with none all are. Results are float64.
//!
//! A reset between two points shows only when they are put in order, and the rows of a group come from many places in any
//! order: so a group keeps all its points, 16 bytes each, counted in the statement's memory. `delta` keeps two.
//!
//! State of a group: a list of instants (int64, in the unit of `ts`), and a list of values as long.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, FieldRef, Float64Type, Int64Type, TimeUnit};
use arrow_array::builder::{Float64Builder, ListBuilder, PrimitiveBuilder};
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, ArrowPrimitiveType, BooleanArray};
use datafusion::common::{Result, ScalarValue, internal_err, plan_err};
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::utils::{AggregateOrderSensitivity, format_state_name};
use datafusion::logical_expr::{
    Accumulator, AggregateUDFImpl, EmitTo, GroupsAccumulator, ReversedUDAF, Signature, Volatility,
};
use datafusion::physical_expr::expressions::Literal;

use super::by_time::{instant_type, instants, refuse_distinct};
use super::one_group::OneGroup;

const DAY_S: f64 = 86_400.0;

/// One of the functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Course {
    Delta,
    Increase,
    Rate,
    /// `(v, ts [, method])`
    TimeWeightedAvg,
    /// `(method, ts, v)`
    TimeWeight,
}

impl Course {
    fn value_at(self) -> usize {
        if self == Self::TimeWeight { 2 } else { 0 }
    }

    fn method_at(self) -> Option<usize> {
        match self {
            Self::TimeWeightedAvg => Some(2),
            Self::TimeWeight => Some(0),
            _ => None,
        }
    }
}

/// What a group's points become.
#[derive(Debug, Clone, Copy)]
enum Answer {
    Delta,
    Increase,
    /// With the number of units of `ts` in a second.
    Rate(f64),
    Locf,
    Linear,
}

/// The aggregate.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct OverTime {
    course: Course,
    signature: Signature,
}

impl OverTime {
    pub(super) fn new(course: Course) -> Self {
        Self { course, signature: Signature::user_defined(Volatility::Immutable) }
    }

    fn points(&self, arguments: &AccumulatorArgs) -> Result<Points> {
        refuse_distinct(arguments)?;
        let answer = match self.course {
            Course::Delta => Answer::Delta,
            Course::Increase => Answer::Increase,
            Course::Rate => Answer::Rate(units_per_second(arguments.expr_fields[1].data_type())),
            Course::TimeWeight | Course::TimeWeightedAvg => {
                let method = self.course.method_at().and_then(|at| arguments.exprs.get(at));
                match method.map(|method| method.downcast_ref::<Literal>().map(Literal::value)) {
                    None => Answer::Locf,
                    Some(Some(ScalarValue::Utf8(Some(method)))) if method.eq_ignore_ascii_case("locf") => Answer::Locf,
                    Some(Some(ScalarValue::Utf8(Some(method)))) if method.eq_ignore_ascii_case("linear") => {
                        Answer::Linear
                    }
                    _ => return plan_err!("{}: the method is 'locf' or 'linear'", self.name()),
                }
            }
        };
        Ok(Points { answer, value_at: self.course.value_at(), groups: Vec::new(), bytes: 0 })
    }
}

fn units_per_second(kind: &DataType) -> f64 {
    match kind {
        DataType::Timestamp(TimeUnit::Nanosecond, _) => 1e9,
        DataType::Timestamp(TimeUnit::Microsecond, _) => 1e6,
        DataType::Timestamp(TimeUnit::Millisecond, _) | DataType::Date64 => 1e3,
        DataType::Date32 => 1.0 / DAY_S,
        _ => 1.0,
    }
}

impl AggregateUDFImpl for OverTime {
    fn name(&self) -> &str {
        match self.course {
            Course::Delta => "delta",
            Course::Increase => "increase",
            Course::Rate => "rate",
            Course::TimeWeightedAvg => "time_weighted_avg",
            Course::TimeWeight => "time_weight",
        }
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arguments: &[DataType]) -> Result<Vec<DataType>> {
        let number = |kind: &DataType| match kind {
            kind if kind.is_numeric() || kind.is_null() => Ok(DataType::Float64),
            other => plan_err!("{}: {other} is no number", self.name()),
        };
        match (self.course, arguments) {
            (Course::TimeWeight, [_, ts, value]) => Ok(vec![DataType::Utf8, instant_type(ts)?, number(value)?]),
            (Course::TimeWeight, _) => plan_err!("time_weight takes a method, a timestamp and a value"),
            (Course::TimeWeightedAvg, [value, ts, _]) => Ok(vec![number(value)?, instant_type(ts)?, DataType::Utf8]),
            (_, [value, ts]) => Ok(vec![number(value)?, instant_type(ts)?]),
            _ => plan_err!("{} takes a value and a timestamp: {}(v, ts)", self.name(), self.name()),
        }
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::Float64)
    }

    fn state_fields(&self, arguments: StateFieldsArgs) -> Result<Vec<FieldRef>> {
        let list = |name: &str, kind| {
            Arc::new(Field::new_list(format_state_name(arguments.name, name), Field::new_list_field(kind, true), true))
        };
        Ok(vec![list("ts", DataType::Int64), list("value", DataType::Float64)])
    }

    fn accumulator(&self, arguments: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        Ok(Box::new(OneGroup::new(self.points(&arguments)?)?))
    }

    fn groups_accumulator_supported(&self, arguments: AccumulatorArgs) -> bool {
        !arguments.is_distinct
    }

    fn create_groups_accumulator(&self, arguments: AccumulatorArgs) -> Result<Box<dyn GroupsAccumulator>> {
        Ok(Box::new(self.points(&arguments)?))
    }

    fn order_sensitivity(&self) -> AggregateOrderSensitivity {
        AggregateOrderSensitivity::Insensitive
    }

    fn reverse_expr(&self) -> ReversedUDAF {
        ReversedUDAF::Identical
    }
}

type Point = (i64, f64);

/// The points of each group.
#[derive(Clone)]
struct Points {
    answer: Answer,
    value_at: usize,
    groups: Vec<Vec<Point>>,
    /// Of the inner vectors.
    bytes: usize,
}

impl Points {
    fn resize(&mut self, groups: usize) {
        self.groups.resize(groups, Vec::new());
    }

    fn push(&mut self, group: usize, point: Point) {
        let points = &mut self.groups[group];
        let before = points.capacity();
        points.push(point);
        self.bytes += (points.capacity() - before) * size_of::<Point>();
        // Only the ends count: of a pair in order, and a third, the one between goes.
        if matches!(self.answer, Answer::Delta) && points.len() > 2 {
            in_order(points);
            points.drain(1..points.len().saturating_sub(1).max(1));
        }
    }

    fn take(&mut self, emit: EmitTo) -> Vec<Vec<Point>> {
        let taken = emit.take_needed(&mut self.groups);
        self.bytes -= taken.iter().map(|points| points.capacity() * size_of::<Point>()).sum::<usize>().min(self.bytes);
        taken
    }
}

/// Sorts points by instant; of several at one the greatest stays.
fn in_order(points: &mut Vec<Point>) {
    points.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
    points.dedup_by_key(|point| point.0);
}

fn answer(answer: Answer, mut points: Vec<Point>) -> Option<f64> {
    in_order(&mut points);
    let (first, last) = (*points.first()?, *points.last()?);
    // As float64: the difference of two int64 may not fit one.
    let span = last.0 as f64 - first.0 as f64;
    let steps = || points.windows(2).map(|pair| (pair[0], pair[1]));
    let increase = || steps().map(|(a, b)| if b.1 < a.1 { b.1 } else { b.1 - a.1 }).sum::<f64>();
    let average = |height: fn(Point, Point) -> f64| {
        let integral: f64 = steps().map(|(a, b)| height(a, b) * (b.0 as f64 - a.0 as f64)).sum();
        integral / span
    };
    match answer {
        Answer::Locf | Answer::Linear if points.len() == 1 => Some(first.1),
        _ if points.len() == 1 => None,
        Answer::Delta => Some(last.1 - first.1),
        Answer::Increase => Some(increase()),
        Answer::Rate(units) => Some(increase() / (span / units)),
        Answer::Locf => Some(average(|a, _| a.1)),
        Answer::Linear => Some(average(|a, b| (a.1 + b.1) / 2.0)),
    }
}

impl GroupsAccumulator for Points {
    fn update_batch(
        &mut self,
        values: &[ArrayRef],
        groups: &[usize],
        filter: Option<&BooleanArray>,
        total: usize,
    ) -> Result<()> {
        self.resize(total);
        let ts = instants(&values[1])?;
        let (ts, values) = (ts.as_primitive::<Int64Type>(), values[self.value_at].as_primitive::<Float64Type>());
        for (row, &group) in groups.iter().enumerate() {
            let counts = filter.is_none_or(|filter| filter.is_valid(row) && filter.value(row));
            if counts && ts.is_valid(row) && values.is_valid(row) {
                self.push(group, (ts.value(row), values.value(row)));
            }
        }
        Ok(())
    }

    fn evaluate(&mut self, emit: EmitTo) -> Result<ArrayRef> {
        let mut answers = Float64Builder::new();
        self.take(emit).into_iter().for_each(|points| answers.append_option(answer(self.answer, points)));
        Ok(Arc::new(answers.finish()))
    }

    fn state(&mut self, emit: EmitTo) -> Result<Vec<ArrayRef>> {
        let taken = self.take(emit);
        let instants = lists::<Int64Type>(taken.iter().map(|points| points.iter().map(|point| point.0)));
        let values = lists::<Float64Type>(taken.iter().map(|points| points.iter().map(|point| point.1)));
        Ok(vec![instants, values])
    }

    fn merge_batch(&mut self, states: &[ArrayRef], groups: &[usize], total: usize) -> Result<()> {
        let [ts, values] = states else {
            return internal_err!("points have two lists");
        };
        self.resize(total);
        let (ts, values) = (ts.as_list::<i32>(), values.as_list::<i32>());
        for (row, &group) in groups.iter().enumerate() {
            if ts.is_null(row) {
                continue;
            }
            let (ts, values) = (ts.value(row), values.value(row));
            let (ts, values) = (ts.as_primitive::<Int64Type>(), values.as_primitive::<Float64Type>());
            for (at, value) in ts.values().iter().zip(values.values()) {
                self.push(group, (*at, *value));
            }
        }
        Ok(())
    }

    fn convert_to_state(&self, values: &[ArrayRef], filter: Option<&BooleanArray>) -> Result<Vec<ArrayRef>> {
        let rows = values[1].len();
        let mut each = Self { groups: Vec::new(), bytes: 0, ..*self };
        each.update_batch(values, &(0..rows).collect::<Vec<_>>(), filter, rows)?;
        each.state(EmitTo::All)
    }

    fn size(&self) -> usize {
        self.bytes + self.groups.capacity() * size_of::<Vec<Point>>()
    }
}

fn lists<T: ArrowPrimitiveType>(groups: impl Iterator<Item = impl Iterator<Item = T::Native>>) -> ArrayRef {
    let mut builder = ListBuilder::new(PrimitiveBuilder::<T>::new());
    for group in groups {
        group.for_each(|item| builder.values().append_value(item));
        builder.append(true);
    }
    Arc::new(builder.finish())
}
