//! An aggregate over all rows as one over a single group: a statement without GROUP BY, or a window.

use std::fmt;

use arrow_array::{Array, ArrayRef};
use datafusion::common::{Result, ScalarValue};
use datafusion::logical_expr::{Accumulator, EmitTo, GroupsAccumulator};

/// Wraps the accumulator of many groups. It is copied to be asked: a window asks again after every row.
pub(super) struct OneGroup<G>(G);

impl<G> fmt::Debug for OneGroup<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OneGroup")
    }
}

impl<G: GroupsAccumulator + Clone> OneGroup<G> {
    /// The one group is there from the beginning, also when no row comes.
    pub(super) fn new(mut groups: G) -> Result<Self> {
        let none = groups.clone().state(EmitTo::All)?;
        groups.merge_batch(&none, &[], 1)?;
        Ok(Self(groups))
    }
}

fn rows(values: &[ArrayRef]) -> Vec<usize> {
    vec![0; values.first().map_or(0, |values| values.len())]
}

impl<G: GroupsAccumulator + Clone + Sync + 'static> Accumulator for OneGroup<G> {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        self.0.update_batch(values, &rows(values), None, 1)
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        ScalarValue::try_from_array(&self.0.clone().evaluate(EmitTo::All)?, 0)
    }

    fn size(&self) -> usize {
        self.0.size()
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        let states = self.0.clone().state(EmitTo::All)?;
        states.iter().map(|state| ScalarValue::try_from_array(state, 0)).collect()
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        self.0.merge_batch(states, &rows(states), 1)
    }
}
