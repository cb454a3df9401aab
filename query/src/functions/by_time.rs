//! `first(v, ts)` and `last(v, ts)`: the value at the earliest and at the latest instant of a group.
//!
//! Rows without `ts` do not count; a row without a value does, so `last` is NULL when the latest row has none. At equal
//! instants a value wins over none, then the smaller value for `first` and the greater for `last`. So the answer depends
//! on the rows alone, and not on their order or on how they were spread.
//!
//! State of a group: the value, and the instant as int64 (in the unit of `ts`), NULL before the first row.

use std::cmp::Ordering;
use std::sync::Arc;

use arrow::compute::cast;
use arrow::datatypes::{ArrowNativeTypeOp, ArrowPrimitiveType, DataType, Field, FieldRef, Int64Type};
use arrow_array::builder::{Int64Builder, PrimitiveBuilder};
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, BooleanArray, downcast_primitive};
use arrow_select::filter::prep_null_mask_filter;
use datafusion::common::{Result, ScalarValue, internal_err, plan_err};
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::utils::{AggregateOrderSensitivity, format_state_name};
use datafusion::logical_expr::{
    Accumulator, AggregateUDFImpl, EmitTo, GroupsAccumulator, ReversedUDAF, Signature, Volatility,
};

use super::one_group::OneGroup;

/// Which end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum End {
    First,
    Last,
}

impl End {
    /// Whether what compares so to the one at hand takes its place.
    fn wins(self, ordering: Ordering) -> bool {
        ordering == if self == Self::First { Ordering::Less } else { Ordering::Greater }
    }
}

/// One of the two functions.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct ByTime {
    end: End,
    signature: Signature,
}

impl ByTime {
    pub(super) fn new(end: End) -> Self {
        Self { end, signature: Signature::user_defined(Volatility::Immutable) }
    }

    fn groups(&self, value: &DataType) -> Result<Box<dyn Groups>> {
        macro_rules! primitive {
            ($t:ty, $end:expr, $kind:expr) => {
                Box::new(Ends::<Primitive<$t>>::new($end, $kind)) as Box<dyn Groups>
            };
        }
        let end = self.end;
        Ok(downcast_primitive! {
            value => (primitive, end, value),
            _ => Box::new(Ends::<Any>::new(end, value)),
        })
    }
}

/// Instants as they are compared: integers in the unit of the column.
pub(super) fn instant_type(kind: &DataType) -> Result<DataType> {
    use DataType::{
        Date32, Date64, Int8, Int16, Int32, Int64, LargeUtf8, Null, Timestamp, UInt8, UInt16, UInt32, Utf8, Utf8View,
    };
    match kind {
        Timestamp(..) | Date32 | Date64 => Ok(kind.clone()),
        Int8 | Int16 | Int32 | Int64 | UInt8 | UInt16 | UInt32 | Null => Ok(Int64),
        Utf8 | LargeUtf8 | Utf8View => Ok(Timestamp(arrow::datatypes::TimeUnit::Microsecond, Some("UTC".into()))),
        other => plan_err!("a timestamp is needed here, and not {other}"),
    }
}

/// Instants as int64.
pub(super) fn instants(ts: &ArrayRef) -> Result<ArrayRef> {
    Ok(match ts.data_type() {
        DataType::Date32 => cast(&cast(ts, &DataType::Int32)?, &DataType::Int64)?,
        _ => cast(ts, &DataType::Int64)?,
    })
}

impl AggregateUDFImpl for ByTime {
    fn name(&self) -> &str {
        match self.end {
            End::First => "first",
            End::Last => "last",
        }
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arguments: &[DataType]) -> Result<Vec<DataType>> {
        match arguments {
            [value, ts] => Ok(vec![value.clone(), instant_type(ts)?]),
            _ => plan_err!("{} takes a value and a timestamp: {}(speed, ts)", self.name(), self.name()),
        }
    }

    fn return_type(&self, arguments: &[DataType]) -> Result<DataType> {
        Ok(arguments[0].clone())
    }

    fn state_fields(&self, arguments: StateFieldsArgs) -> Result<Vec<FieldRef>> {
        let value = arguments.return_field.data_type().clone();
        Ok(vec![
            Arc::new(Field::new(format_state_name(arguments.name, "value"), value, true)),
            Arc::new(Field::new(format_state_name(arguments.name, "ts"), DataType::Int64, true)),
        ])
    }

    fn accumulator(&self, arguments: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        refuse_distinct(&arguments)?;
        self.groups(arguments.return_field.data_type())?.one_group()
    }

    fn groups_accumulator_supported(&self, arguments: AccumulatorArgs) -> bool {
        !arguments.is_distinct
    }

    fn create_groups_accumulator(&self, arguments: AccumulatorArgs) -> Result<Box<dyn GroupsAccumulator>> {
        Ok(self.groups(arguments.return_field.data_type())?.many_groups())
    }

    fn order_sensitivity(&self) -> AggregateOrderSensitivity {
        AggregateOrderSensitivity::Insensitive
    }

    fn reverse_expr(&self) -> ReversedUDAF {
        ReversedUDAF::Identical
    }
}

/// A condition that is false where it is NULL.
pub(super) fn known(condition: &BooleanArray) -> BooleanArray {
    if condition.null_count() == 0 { condition.clone() } else { prep_null_mask_filter(condition) }
}

/// DISTINCT says nothing about these aggregates: it is refused rather than ignored.
pub(super) fn refuse_distinct(arguments: &AccumulatorArgs) -> Result<()> {
    if arguments.is_distinct {
        return plan_err!("DISTINCT has no meaning in {}", arguments.name);
    }
    Ok(())
}

/// An accumulator of many groups, before its kind of values is forgotten.
trait Groups {
    fn one_group(self: Box<Self>) -> Result<Box<dyn Accumulator>>;
    fn many_groups(self: Box<Self>) -> Box<dyn GroupsAccumulator>;
}

impl<V: Values> Groups for Ends<V> {
    fn one_group(self: Box<Self>) -> Result<Box<dyn Accumulator>> {
        Ok(Box::new(OneGroup::new(*self)?))
    }

    fn many_groups(self: Box<Self>) -> Box<dyn GroupsAccumulator> {
        self
    }
}

/// One value per group.
trait Values: Clone + Send + Sync + 'static {
    fn new(kind: &DataType) -> Self;
    fn resize(&mut self, groups: usize);
    fn set(&mut self, group: usize, values: &ArrayRef, row: usize) -> Result<()>;
    /// How the value of a row compares to that of a group; NULL, and a group without a row, are the least for `last`
    /// and the greatest for `first`: the caller asks only when both are values.
    fn compare(&self, group: usize, values: &ArrayRef, row: usize) -> Result<Ordering>;
    fn is_null(&self, group: usize) -> bool;
    fn take(&mut self, emit: EmitTo) -> Result<ArrayRef>;
    fn size(&self) -> usize;
}

struct Primitive<T: ArrowPrimitiveType> {
    kind: DataType,
    values: Vec<Option<T::Native>>,
}

impl<T: ArrowPrimitiveType> Clone for Primitive<T> {
    fn clone(&self) -> Self {
        Self { kind: self.kind.clone(), values: self.values.clone() }
    }
}

impl<T: ArrowPrimitiveType> Values for Primitive<T> {
    fn new(kind: &DataType) -> Self {
        Self { kind: kind.clone(), values: Vec::new() }
    }

    fn resize(&mut self, groups: usize) {
        self.values.resize(groups, None);
    }

    fn set(&mut self, group: usize, values: &ArrayRef, row: usize) -> Result<()> {
        let values = values.as_primitive::<T>();
        self.values[group] = values.is_valid(row).then(|| values.value(row));
        Ok(())
    }

    fn compare(&self, group: usize, values: &ArrayRef, row: usize) -> Result<Ordering> {
        let value = values.as_primitive::<T>().value(row);
        Ok(self.values[group].map_or(Ordering::Greater, |held| value.compare(held)))
    }

    fn is_null(&self, group: usize) -> bool {
        self.values[group].is_none()
    }

    fn take(&mut self, emit: EmitTo) -> Result<ArrayRef> {
        let taken = emit.take_needed(&mut self.values);
        let mut builder = PrimitiveBuilder::<T>::with_capacity(taken.len()).with_data_type(self.kind.clone());
        taken.into_iter().for_each(|value| builder.append_option(value));
        Ok(Arc::new(builder.finish()))
    }

    fn size(&self) -> usize {
        self.values.capacity() * size_of::<Option<T::Native>>()
    }
}

/// Values of any other type.
#[derive(Clone)]
struct Any {
    none: ScalarValue,
    values: Vec<ScalarValue>,
    bytes: usize,
}

impl Values for Any {
    fn new(kind: &DataType) -> Self {
        Self { none: ScalarValue::try_from(kind).unwrap_or(ScalarValue::Null), values: Vec::new(), bytes: 0 }
    }

    fn resize(&mut self, groups: usize) {
        self.bytes += groups.saturating_sub(self.values.len()) * self.none.size();
        self.values.resize(groups, self.none.clone());
    }

    fn set(&mut self, group: usize, values: &ArrayRef, row: usize) -> Result<()> {
        let mut value = ScalarValue::try_from_array(values, row)?;
        // What it points to may be a whole batch.
        value.compact();
        self.bytes = self.bytes + value.size() - self.values[group].size().min(self.bytes);
        self.values[group] = value;
        Ok(())
    }

    fn compare(&self, group: usize, values: &ArrayRef, row: usize) -> Result<Ordering> {
        let value = ScalarValue::try_from_array(values, row)?;
        value.try_cmp(&self.values[group])
    }

    fn is_null(&self, group: usize) -> bool {
        self.values[group].is_null()
    }

    fn take(&mut self, emit: EmitTo) -> Result<ArrayRef> {
        let taken = emit.take_needed(&mut self.values);
        let freed: usize = taken.iter().map(ScalarValue::size).sum();
        self.bytes = self.bytes.saturating_sub(freed);
        if taken.is_empty() {
            return Ok(arrow_array::new_empty_array(&self.none.data_type()));
        }
        ScalarValue::iter_to_array(taken)
    }

    fn size(&self) -> usize {
        self.bytes
    }
}

/// The end of each group.
#[derive(Clone)]
struct Ends<V> {
    end: End,
    values: V,
    /// None before the first row.
    instants: Vec<Option<i64>>,
}

impl<V: Values> Ends<V> {
    fn new(end: End, kind: &DataType) -> Self {
        Self { end, values: V::new(kind), instants: Vec::new() }
    }

    fn update(
        &mut self,
        values: &ArrayRef,
        ts: &ArrayRef,
        groups: &[usize],
        filter: Option<&BooleanArray>,
        total: usize,
    ) -> Result<()> {
        self.instants.resize(total, None);
        self.values.resize(total);
        let ts = ts.as_primitive::<Int64Type>();
        for (row, &group) in groups.iter().enumerate() {
            if ts.is_null(row) || filter.is_some_and(|filter| !(filter.is_valid(row) && filter.value(row))) {
                continue;
            }
            let at = ts.value(row);
            let wins = match self.instants[group] {
                None => true,
                Some(held) if held == at => match (values.is_null(row), self.values.is_null(group)) {
                    (true, _) => false,
                    (false, true) => true,
                    (false, false) => self.end.wins(self.values.compare(group, values, row)?),
                },
                Some(held) => self.end.wins(at.cmp(&held)),
            };
            if wins {
                self.instants[group] = Some(at);
                self.values.set(group, values, row)?;
            }
        }
        Ok(())
    }
}

impl<V: Values> GroupsAccumulator for Ends<V> {
    fn update_batch(
        &mut self,
        values: &[ArrayRef],
        groups: &[usize],
        filter: Option<&BooleanArray>,
        total: usize,
    ) -> Result<()> {
        let [value, ts] = values else {
            return internal_err!("first and last have two arguments");
        };
        self.update(value, &instants(ts)?, groups, filter, total)
    }

    fn evaluate(&mut self, emit: EmitTo) -> Result<ArrayRef> {
        emit.take_needed(&mut self.instants);
        self.values.take(emit)
    }

    fn state(&mut self, emit: EmitTo) -> Result<Vec<ArrayRef>> {
        let mut instants = Int64Builder::new();
        emit.take_needed(&mut self.instants).into_iter().for_each(|at| instants.append_option(at));
        Ok(vec![self.values.take(emit)?, Arc::new(instants.finish())])
    }

    fn merge_batch(&mut self, states: &[ArrayRef], groups: &[usize], total: usize) -> Result<()> {
        let [value, ts] = states else {
            return internal_err!("the state of first and last has two columns");
        };
        self.update(value, ts, groups, None, total)
    }

    fn convert_to_state(&self, values: &[ArrayRef], filter: Option<&BooleanArray>) -> Result<Vec<ArrayRef>> {
        let [value, ts] = values else {
            return internal_err!("first and last have two arguments");
        };
        let mut ts = instants(ts)?;
        if let Some(filter) = filter {
            let left_out = arrow::compute::not(&known(filter))?;
            ts = arrow::compute::nullif(&ts, &left_out)?;
        }
        Ok(vec![Arc::clone(value), ts])
    }

    fn size(&self) -> usize {
        self.instants.capacity() * size_of::<Option<i64>>() + self.values.size()
    }
}
