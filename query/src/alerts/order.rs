//! New rows of a stream in the order of event time, and which of them come late: behind a newer one of their label set.
//!
//! A row's *moment* is the end of what it is about, and its revision, so that a revised window comes behind the one it revises.
//! Of rows of one moment those that hold come last. What is newest is kept in memory only: of a label set that was not seen
//! since the node listens every row counts as late that is older than what the stream had been read to then. So a row that
//! is not late is in order, always; a late one may be, and is judged from the table like the others (`late`).

use std::collections::{HashMap, HashSet};
use std::hash::RandomState;

use arrow_array::cast::AsArray;
use arrow_array::types::{Int64Type, TimestampMicrosecondType};
use arrow_array::{Array, BooleanArray, RecordBatch};
use datafusion::common::Result;
use wire::schema::TS;

use super::rows::RowRule;
use crate::views;

const WINDOW_START: &str = "window_start";
const WINDOW_END: &str = "window_end";
const REVISION: &str = "revision";

/// End in event time, µs, and revision.
pub(crate) type Moment = (i64, i64);

/// New rows of a stream, with their event times.
#[derive(Debug)]
pub(crate) struct NewRows {
    pub(crate) batch: RecordBatch,
    /// A reading begins and ends at once, a window at its bounds.
    pub(crate) times: Vec<(i64, i64)>,
    pub(crate) moments: Vec<Moment>,
    /// By their moments; empty when they are in order as they are.
    order: Vec<u32>,
}

impl NewRows {
    pub(crate) fn new(batch: RecordBatch) -> Self {
        let time = |name: &str| batch.column_by_name(name)?.as_primitive_opt::<TimestampMicrosecondType>();
        // Windows of edges, and of views.
        let start = time(WINDOW_START).or_else(|| time(views::WINDOW));
        let end = time(WINDOW_END).or_else(|| time(views::END));
        let ts = time(TS);
        let number = |name: &str| batch.column_by_name(name)?.as_primitive_opt::<Int64Type>();
        let revision = number(REVISION).or_else(|| number(views::REVISION));
        let at = |column: Option<&arrow_array::PrimitiveArray<TimestampMicrosecondType>>, row: usize| {
            column.filter(|column| column.is_valid(row)).map(|column| column.value(row))
        };
        let times: Vec<(i64, i64)> = (0..batch.num_rows())
            .map(|row| {
                let ts = at(ts, row).unwrap_or(0);
                let to = at(end, row).unwrap_or(ts);
                (at(start, row).unwrap_or(ts).min(to), to)
            })
            .collect();
        let revised = |row: usize| revision.filter(|revision| revision.is_valid(row)).map_or(0, |all| all.value(row));
        let moments: Vec<Moment> = times.iter().enumerate().map(|(row, (_, to))| (*to, revised(row))).collect();
        let mut order = Vec::new();
        if !moments.is_sorted() {
            order = (0..moments.len() as u32).collect();
            order.sort_by_key(|row| moments[*row as usize]);
        }
        Self { batch, times, moments, order }
    }

    /// The rows by their moments.
    pub(crate) fn in_order(&self) -> impl Iterator<Item = usize> {
        (0..self.batch.num_rows()).map(|at| self.order.get(at).map_or(at, |row| *row as usize))
    }

    /// The newest event time of them.
    pub(crate) fn last(&self) -> i64 {
        self.moments.iter().map(|(to, _)| *to).max().unwrap_or(0)
    }
}

/// Which rows are in the order of their label sets.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) fresh: BooleanArray,
}

impl Order {
    /// Of rows that all are.
    pub(crate) fn whole(rows: usize) -> Self {
        Self { fresh: BooleanArray::from(vec![true; rows]) }
    }
}

/// The newest moment of each label set of a stream, by what tells them apart.
#[derive(Debug, Clone, Default)]
pub(crate) struct Newest {
    of: HashMap<String, Sets>,
    state: RandomState,
}

#[derive(Debug, Clone)]
struct Sets {
    newest: HashMap<u64, Moment>,
    /// Label sets that are not there may have had rows before this.
    floor: Moment,
}

impl Newest {
    /// Which rows are not older than the newest of their label set; they are seen with that. Label sets that are new may have
    /// had rows up to `read`.
    ///
    /// # Errors
    /// When what tells them apart cannot be computed.
    pub(crate) fn see(&mut self, rows: &NewRows, rule: &RowRule, sets_max: usize, read: i64) -> Result<Order> {
        let identities = rule.identities(rows, &self.state)?;
        let floor = (read, i64::MIN);
        let sets = self.of.entry(rule.identity_name.clone());
        let sets = sets.or_insert_with(|| Sets { newest: HashMap::new(), floor });
        let mut fresh = vec![false; identities.len()];
        for row in rows.in_order() {
            let (identity, moment) = (identities[row], rows.moments[row]);
            if let Some(newest) = sets.newest.get_mut(&identity) {
                fresh[row] = moment >= *newest;
                *newest = moment.max(*newest);
                continue;
            }
            if sets.newest.len() >= sets_max {
                sets.forget();
            }
            fresh[row] = moment >= sets.floor;
            if sets.newest.len() < sets_max {
                sets.newest.insert(identity, moment.max(sets.floor));
            }
        }
        Ok(Order { fresh: fresh.into() })
    }

    /// Only of these.
    pub(crate) fn keep(&mut self, names: &HashSet<&str>) {
        self.of.retain(|name, _| names.contains(name.as_str()));
    }
}

impl Sets {
    /// Forgets the half that was silent longest.
    fn forget(&mut self) {
        let mut all: Vec<Moment> = self.newest.values().copied().collect();
        let middle = all.len() / 2;
        if middle == 0 {
            return;
        }
        let (_, bound, _) = all.select_nth_unstable(middle);
        let bound = *bound;
        self.newest.retain(|_, moment| *moment >= bound);
        self.floor = self.floor.max(bound);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{ArrayRef, Int64Array, TimestampMicrosecondArray};

    use super::*;

    const HOUR: i64 = 3_600_000_000;

    fn times(columns: &[(&str, Option<i64>)]) -> (i64, i64) {
        let column = |value: &Option<i64>| Arc::new(TimestampMicrosecondArray::from(vec![*value])) as ArrayRef;
        let columns = columns.iter().map(|(name, value)| (*name, column(value), true));
        NewRows::new(RecordBatch::try_from_iter_with_nullable(columns).unwrap()).times[0]
    }

    /// By its beginning alone an hour is old as soon as it is over: its alerts would be history, and nobody told.
    #[test]
    fn a_window_lasts_from_its_start_to_its_end_whoever_made_it() {
        let ts = (TS, Some(7 * HOUR));
        assert_eq!(times(&[ts]), (7 * HOUR, 7 * HOUR));
        for (start, end) in [(WINDOW_START, WINDOW_END), (views::WINDOW, views::END)] {
            assert_eq!(times(&[ts, (start, Some(7 * HOUR)), (end, Some(8 * HOUR))]), (7 * HOUR, 8 * HOUR));
            // A view of single rows has the columns, and nothing in them.
            assert_eq!(times(&[ts, (start, None), (end, None)]), (7 * HOUR, 7 * HOUR));
        }
    }

    #[test]
    fn a_revised_window_comes_behind_the_one_that_it_revises_whoever_made_it() {
        for (end, revision) in [(WINDOW_END, REVISION), (views::END, views::REVISION)] {
            let time = |ts: [i64; 3]| Arc::new(TimestampMicrosecondArray::from_iter_values(ts)) as ArrayRef;
            let revisions = Arc::new(Int64Array::from(vec![2, 1, 1])) as ArrayRef;
            let columns = [(TS, time([7, 7, 6])), (end, time([8, 8, 7])), (revision, revisions)];
            let rows = NewRows::new(RecordBatch::try_from_iter(columns).unwrap());
            assert_eq!(rows.moments, [(8, 2), (8, 1), (7, 1)]);
            assert_eq!(rows.in_order().collect::<Vec<_>>(), [2, 1, 0]);
        }
    }
}
