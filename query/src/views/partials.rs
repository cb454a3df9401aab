//! What was computed of the rows of some windows, so that rows that come to them later are all that is left to compute.
//!
//! The states ([`Parts`]) of a slot that is held stand for all of its rows up to where the view has read. They are held for
//! windows that are asked more than once: while they are open, or because of late rows. Within a budget: what was used
//! longest ago is forgotten, and then asked from its rows. Nothing of it outlives the runner.
//!
//! [`Parts`]: crate::engine::Parts

use std::collections::BTreeMap;

use arrow_array::RecordBatch;

use super::intervals::Intervals;

/// Batches of states of a slot, before they are merged into one.
const BATCHES_MAX: usize = 8;

#[derive(Debug, Default)]
struct Slot {
    states: Vec<RecordBatch>,
    bytes: usize,
    used: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Partials {
    /// By where they begin.
    slots: BTreeMap<i64, Slot>,
    bytes: usize,
    bytes_max: usize,
    uses: u64,
}

impl Partials {
    /// None yet; of so many bytes at most.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { slots: BTreeMap::new(), bytes: 0, bytes_max, uses: 0 }
    }

    /// Where the slots begin that are held, of these times.
    pub(crate) fn held(&self, times: &Intervals) -> Vec<i64> {
        times.iter().flat_map(|(from, to)| self.slots.range(from..to).map(|(start, _)| *start)).collect()
    }

    /// The states of a slot, if it is held.
    pub(crate) fn states(&mut self, start: i64) -> Option<&[RecordBatch]> {
        self.uses += 1;
        let slot = self.slots.get_mut(&start)?;
        slot.used = self.uses;
        Some(&slot.states)
    }

    /// From now on a slot is held: these are the states of all its rows.
    pub(crate) fn hold(&mut self, start: i64, states: Vec<RecordBatch>) {
        self.forget(start);
        self.slots.insert(start, Slot::default());
        self.add(start, states);
    }

    /// The states of more rows of a slot, if it is held. True when it has so many that they should be merged.
    pub(crate) fn add(&mut self, start: i64, states: Vec<RecordBatch>) -> bool {
        self.uses += 1;
        let Some(slot) = self.slots.get_mut(&start) else { return false };
        let bytes: usize = states.iter().map(RecordBatch::get_array_memory_size).sum();
        (slot.bytes, slot.used) = (slot.bytes + bytes, self.uses);
        slot.states.extend(states.into_iter().filter(|states| states.num_rows() > 0));
        self.bytes += bytes;
        let is_many = slot.states.len() > BATCHES_MAX;
        while self.bytes > self.bytes_max {
            let oldest = self.slots.iter().min_by_key(|(_, slot)| slot.used).map(|(start, _)| *start);
            let Some(oldest) = oldest else { break };
            self.forget(oldest);
        }
        is_many && self.slots.contains_key(&start)
    }

    /// A slot is held no longer.
    pub(crate) fn forget(&mut self, start: i64) {
        self.bytes -= self.slots.remove(&start).map_or(0, |slot| slot.bytes);
    }

    /// Memory, bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{ArrayRef, Int64Array};

    use super::*;

    fn batch(rows: i64) -> RecordBatch {
        let numbers: ArrayRef = Arc::new(Int64Array::from_iter_values(0..rows));
        RecordBatch::try_from_iter([("n", numbers)]).unwrap()
    }

    #[test]
    fn what_was_used_longest_ago_is_forgotten() {
        let one = batch(10).get_array_memory_size();
        let mut partials = Partials::new(3 * one);
        for start in [30, 10, 20] {
            partials.hold(start, vec![batch(10)]);
        }
        assert_eq!(partials.held(&Intervals::of(0, 30)), [10, 20]);
        assert!(partials.states(30).is_some_and(|states| states.len() == 1));
        partials.hold(40, vec![batch(10)]);
        assert_eq!((partials.held(&Intervals::of(0, 100)), partials.bytes()), (vec![20, 30, 40], 3 * one));
        // What is more than all of it alone is not held.
        partials.hold(50, vec![batch(100)]);
        assert_eq!((partials.held(&Intervals::of(0, 100)), partials.bytes()), (vec![], 0));
        // Of a slot that is not held any more, what is new is not all.
        assert!(!partials.add(50, vec![batch(1)]) && partials.states(50).is_none());
    }

    #[test]
    fn many_are_to_be_merged_and_a_slot_without_rows_is_held() {
        let mut partials = Partials::new(usize::MAX);
        partials.hold(0, vec![batch(0)]);
        assert_eq!(partials.states(0).map(<[_]>::len), Some(0));
        let merge: Vec<bool> = (0..=BATCHES_MAX).map(|_| partials.add(0, vec![batch(1)])).collect();
        assert_eq!(merge, (0..=BATCHES_MAX).map(|index| index == BATCHES_MAX).collect::<Vec<_>>());
        partials.hold(0, vec![batch(1)]);
        assert_eq!(partials.states(0).map(<[_]>::len), Some(1));
        partials.forget(0);
        assert_eq!(partials.bytes(), 0);
    }
}
