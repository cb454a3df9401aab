//! `histogram(v, min, max, n)`: how many values lie in each of n equal parts of [min, max), as a list of n + 2 counts:
//! the first counts what is below min, the last what is max and above. NULL values do not count; a group without a
//! value is NULL. As Timescale has it.
//!
//! State of a group: the list.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, FieldRef, Float64Type, Int64Type};
use arrow_array::builder::{Int64Builder, ListBuilder};
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, BooleanArray};
use datafusion::common::{Result, ScalarValue, internal_err, plan_err};
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::utils::{AggregateOrderSensitivity, format_state_name};
use datafusion::logical_expr::{
    Accumulator, AggregateUDFImpl, EmitTo, GroupsAccumulator, ReversedUDAF, Signature, TypeSignature, Volatility,
};
use datafusion::physical_expr::expressions::Literal;

use super::by_time::refuse_distinct;
use super::one_group::OneGroup;

/// Parts of one histogram.
const PARTS_MAX: i64 = 10_000;

/// The aggregate.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Histogram {
    signature: Signature,
}

impl Histogram {
    pub(super) fn new() -> Self {
        use DataType::{Float64, Int64};
        let exact = TypeSignature::Exact(vec![Float64, Float64, Float64, Int64]);
        Self { signature: Signature::new(exact, Volatility::Immutable) }
    }

    fn counts(arguments: &AccumulatorArgs) -> Result<Counts> {
        refuse_distinct(arguments)?;
        let constant = |at: usize| {
            let literal = arguments.exprs.get(at).and_then(|expression| expression.downcast_ref::<Literal>());
            literal.map(Literal::value)
        };
        let (min, max, parts) = match (constant(1), constant(2), constant(3)) {
            (
                Some(ScalarValue::Float64(Some(min))),
                Some(ScalarValue::Float64(Some(max))),
                Some(ScalarValue::Int64(Some(parts))),
            ) => (*min, *max, *parts),
            _ => return plan_err!("histogram: min, max and the number of parts are constants"),
        };
        if !(1..=PARTS_MAX).contains(&parts) {
            return plan_err!("histogram: the number of parts is between 1 and {PARTS_MAX}, not {parts}");
        }
        // Also when one of them is no number.
        if !(min < max && min.is_finite() && max.is_finite()) {
            return plan_err!("histogram: {min} is not below {max}");
        }
        Ok(Counts { min, max, parts: parts as usize, groups: Vec::new(), bytes: 0 })
    }
}

fn list_field() -> Field {
    Field::new_list_field(DataType::Int64, true)
}

impl AggregateUDFImpl for Histogram {
    fn name(&self) -> &str {
        "histogram"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::List(Arc::new(list_field())))
    }

    fn state_fields(&self, arguments: StateFieldsArgs) -> Result<Vec<FieldRef>> {
        Ok(vec![Arc::new(Field::new_list(format_state_name(arguments.name, "counts"), list_field(), true))])
    }

    fn accumulator(&self, arguments: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        Ok(Box::new(OneGroup::new(Self::counts(&arguments)?)?))
    }

    fn groups_accumulator_supported(&self, arguments: AccumulatorArgs) -> bool {
        !arguments.is_distinct
    }

    fn create_groups_accumulator(&self, arguments: AccumulatorArgs) -> Result<Box<dyn GroupsAccumulator>> {
        Ok(Box::new(Self::counts(&arguments)?))
    }

    fn order_sensitivity(&self) -> AggregateOrderSensitivity {
        AggregateOrderSensitivity::Insensitive
    }

    fn reverse_expr(&self) -> ReversedUDAF {
        ReversedUDAF::Identical
    }
}

/// The counts of each group, none before its first value.
#[derive(Clone)]
struct Counts {
    min: f64,
    max: f64,
    parts: usize,
    groups: Vec<Vec<i64>>,
    /// Of the inner vectors.
    bytes: usize,
}

impl Counts {
    fn part(&self, value: f64) -> usize {
        if value < self.min {
            return 0;
        }
        if value < self.max {
            let part = (value - self.min) / (self.max - self.min) * self.parts as f64;
            // What rounding lifts over the edge stays below it.
            return (part as usize).min(self.parts - 1) + 1;
        }
        self.parts + 1
    }

    fn counts(&mut self, group: usize) -> &mut Vec<i64> {
        let counts = &mut self.groups[group];
        if counts.is_empty() {
            *counts = vec![0; self.parts + 2];
            self.bytes += counts.capacity() * size_of::<i64>();
        }
        counts
    }

    fn take(&mut self, emit: EmitTo) -> ArrayRef {
        let taken = emit.take_needed(&mut self.groups);
        self.bytes -= taken.iter().map(|counts| counts.capacity() * size_of::<i64>()).sum::<usize>().min(self.bytes);
        let mut lists = ListBuilder::new(Int64Builder::new());
        for counts in taken {
            lists.values().append_slice(&counts);
            lists.append(!counts.is_empty());
        }
        Arc::new(lists.finish())
    }
}

impl GroupsAccumulator for Counts {
    fn update_batch(
        &mut self,
        values: &[ArrayRef],
        groups: &[usize],
        filter: Option<&BooleanArray>,
        total: usize,
    ) -> Result<()> {
        self.groups.resize(total, Vec::new());
        let values = values[0].as_primitive::<Float64Type>();
        for (row, &group) in groups.iter().enumerate() {
            let counts = filter.is_none_or(|filter| filter.is_valid(row) && filter.value(row));
            if counts && values.is_valid(row) {
                let part = self.part(values.value(row));
                self.counts(group)[part] += 1;
            }
        }
        Ok(())
    }

    fn evaluate(&mut self, emit: EmitTo) -> Result<ArrayRef> {
        Ok(self.take(emit))
    }

    fn state(&mut self, emit: EmitTo) -> Result<Vec<ArrayRef>> {
        Ok(vec![self.take(emit)])
    }

    fn merge_batch(&mut self, states: &[ArrayRef], groups: &[usize], total: usize) -> Result<()> {
        let [state] = states else {
            return internal_err!("the state of a histogram is one list");
        };
        self.groups.resize(total, Vec::new());
        let lists = state.as_list::<i32>();
        for (row, &group) in groups.iter().enumerate() {
            if lists.is_valid(row) {
                let more = lists.value(row);
                let more = more.as_primitive::<Int64Type>();
                self.counts(group).iter_mut().zip(more.values()).for_each(|(count, more)| *count += more);
            }
        }
        Ok(())
    }

    fn convert_to_state(&self, values: &[ArrayRef], filter: Option<&BooleanArray>) -> Result<Vec<ArrayRef>> {
        let rows = values[0].len();
        let mut each = Self { groups: Vec::new(), bytes: 0, ..*self };
        each.update_batch(values, &(0..rows).collect::<Vec<_>>(), filter, rows)?;
        each.state(EmitTo::All)
    }

    fn size(&self) -> usize {
        self.bytes + self.groups.capacity() * size_of::<Vec<i64>>()
    }
}
