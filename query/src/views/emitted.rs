//! What a view has emitted of each window: its highest revision, and a digest of its rows, to tell whether an answer says
//! anything new.
//!
//! It is remembered for the newest windows, within a number of them; for older ones, and after a restart, it is read from the
//! view's own stream. A digest does not depend on the order of rows, and takes floats that agree in their first 12 digits
//! for equal: sums in another order differ in the last ones.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type, TimestampMicrosecondType};
use arrow_array::{Array, ArrayRef};
use arrow_schema::DataType;

use super::intervals::Intervals;

/// Bits of a float's mantissa that do not count.
const LOOSE_BITS: u32 = 12;

/// The last word about a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) revision: i64,
    /// None when it has no rows.
    pub(crate) digest: Option<Digest>,
}

/// Of a set of rows. See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Digest {
    rows: u64,
    sums: [u64; 2],
}

impl Digest {
    /// Adds a row of these columns.
    pub(crate) fn add(&mut self, columns: &[ArrayRef], row: usize) {
        self.rows += 1;
        for (salt, sum) in self.sums.iter_mut().enumerate() {
            let mut hasher = DefaultHasher::new();
            salt.hash(&mut hasher);
            columns.iter().for_each(|column| value(column, row, &mut hasher));
            *sum = sum.wrapping_add(hasher.finish());
        }
    }
}

fn value(column: &ArrayRef, row: usize, hasher: &mut DefaultHasher) {
    if column.is_null(row) {
        return hasher.write_u8(0);
    }
    hasher.write_u8(1);
    match column.data_type() {
        DataType::Float64 => loose(column.as_primitive::<Float64Type>().value(row)).hash(hasher),
        DataType::Int64 => column.as_primitive::<Int64Type>().value(row).hash(hasher),
        DataType::Timestamp(..) => column.as_primitive::<TimestampMicrosecondType>().value(row).hash(hasher),
        DataType::Boolean => column.as_boolean().value(row).hash(hasher),
        DataType::Utf8 => column.as_string::<i32>().value(row).hash(hasher),
        DataType::Binary => column.as_binary::<i32>().value(row).hash(hasher),
        // No stream has a column of another type.
        _ => {}
    }
}

/// The bits of a float that count.
fn loose(value: f64) -> u64 {
    if value == 0.0 { 0 } else { value.to_bits().wrapping_add(1 << (LOOSE_BITS - 1)) >> LOOSE_BITS }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Emitted {
    told: BTreeMap<i64, Told>,
    /// Where nothing has been told but what is known here.
    complete: Intervals,
    windows_max: usize,
}

impl Emitted {
    /// Nothing is known yet.
    pub(crate) fn new(windows_max: usize) -> Self {
        Self { told: BTreeMap::new(), complete: Intervals::default(), windows_max }
    }

    /// The times of these of which the stream has to be asked.
    pub(crate) fn unknown(&self, windows: &Intervals) -> Intervals {
        windows.without(&self.complete)
    }

    /// These without an end, when nothing is known of what comes after them.
    pub(crate) fn to_the_end(&self, windows: &Intervals) -> Option<Intervals> {
        let (from, _) = windows.iter().next_back()?;
        let mut open = windows.clone();
        open.insert(from, i64::MAX);
        (self.unknown(&open) == open).then_some(open)
    }

    /// What the stream has of these times, all of it.
    pub(crate) fn learn(&mut self, windows: &Intervals, told: impl IntoIterator<Item = (i64, Told)>) {
        self.told.extend(told);
        self.complete.add(windows);
    }

    /// What was told of these windows, which are known.
    pub(crate) fn within(&self, windows: &Intervals) -> BTreeMap<i64, Told> {
        let of = |(from, to): (i64, i64)| self.told.range(from..to).map(|(start, told)| (*start, *told));
        windows.iter().flat_map(of).collect()
    }

    /// Whether something is known to have been told of a window.
    pub(crate) fn has(&self, start: i64) -> bool {
        self.told.contains_key(&start)
    }

    /// A window was told.
    pub(crate) fn tell(&mut self, start: i64, told: Told) {
        self.told.insert(start, told);
    }

    /// Forgets the oldest windows beyond what may be remembered.
    pub(crate) fn trim(&mut self) {
        let mut first = None;
        while self.told.len() > self.windows_max {
            self.told.pop_first();
            first = self.told.first_key_value().map(|(start, _)| *start);
        }
        if let Some(first) = first {
            self.complete.remove(i64::MIN, first);
        }
        self.complete.keep_last(self.windows_max);
    }

    /// Memory, bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.told.len() * (size_of::<i64>() + size_of::<Told>()) * 2
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{Float64Array, StringArray};

    use super::*;

    fn digest(rows: &[(f64, &str)]) -> Digest {
        let columns: Vec<ArrayRef> = vec![
            Arc::new(rows.iter().map(|(float, _)| Some(*float)).collect::<Float64Array>()),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|(_, text)| *text))),
        ];
        let mut digest = Digest::default();
        (0..rows.len()).for_each(|row| digest.add(&columns, row));
        digest
    }

    #[test]
    fn equal_rows_have_one_digest_in_any_order() {
        let one = digest(&[(0.1 + 0.2, "a"), (5.0, "b")]);
        assert_eq!(one, digest(&[(5.0, "b"), (0.3, "a")]));
        assert_eq!(digest(&[(0.0, "")]), digest(&[(-0.0, "")]));
        for other in [&[(0.3, "a")][..], &[(0.300_000_1, "a"), (5.0, "b")], &[(0.3, "b"), (5.0, "a")], &[]] {
            assert_ne!(one, digest(other), "{other:?}");
        }
        assert_ne!(digest(&[(1.0, "a"), (1.0, "a")]), digest(&[(1.0, "a")]));
    }

    #[test]
    fn what_is_forgotten_is_not_known() {
        let mut emitted = Emitted::new(2);
        let all = Intervals::of(i64::MIN, i64::MAX);
        assert_eq!(emitted.unknown(&all), all);
        emitted.learn(&all, []);
        for start in [10, 20, 30] {
            emitted.tell(start, Told { revision: 1, digest: None });
        }
        assert!(emitted.unknown(&all).is_empty());
        assert_eq!(emitted.within(&Intervals::of(15, 30)).into_keys().collect::<Vec<_>>(), [20]);
        emitted.trim();
        assert_eq!(emitted.unknown(&all), Intervals::of(i64::MIN, 20));
        assert_eq!(emitted.within(&Intervals::of(0, 40)).into_keys().collect::<Vec<_>>(), [20, 30]);
    }
}
