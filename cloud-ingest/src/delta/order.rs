//! The order of rows in a table's files: by date, then device, then time; equal ones in order of arrival.
//!
//! Sensors send in order and are few against their rows, so this counts rows per (date, device), puts each row into
//! its place, and sorts within a device only where its times are not in order already. When there are too many
//! (date, device) pairs for that, it compares.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use arrow_array::cast::AsArray;
use arrow_array::types::TimestampMicrosecondType;
use arrow_array::{Array, RecordBatch};
use wire::schema::{DEVICE, TS};

const DAY_US: i64 = 86_400_000_000;
/// Most (date, device) pairs per row for which counting is worth its table.
const PAIRS_PER_ROW_MAX: usize = 4;

/// Where a row of the input is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Row {
    ts: i64,
    pub(super) batch: u32,
    pub(super) row: u32,
}

/// All rows in order, and the range of each date.
#[derive(Debug, Default)]
pub(super) struct Order {
    pub(super) rows: Vec<Row>,
    /// (days since 1970, its rows), in order.
    pub(super) dates: Vec<(i32, Range<usize>)>,
}

/// The UTC date of a time, in days since 1970.
fn date_of(ts: i64) -> i32 {
    ts.div_euclid(DAY_US) as i32
}

/// The order of the rows of these batches, which have `ts` and `device`.
pub(super) fn order(batches: &[RecordBatch]) -> Order {
    let total: usize = batches.iter().map(RecordBatch::num_rows).sum();
    let devices = rank_devices(batches);
    let dates = rank_dates(batches);
    let pairs = devices.count * dates.len();
    let mut rows = Vec::with_capacity(total);
    let mut pair_of = Vec::with_capacity(total);
    let mut rank_of_row = devices.rank_of_row.iter();
    for (batch, columns) in batches.iter().enumerate() {
        let (mut day, mut day_index) = (i32::MIN, 0);
        for (row, ts) in times(columns).iter().enumerate() {
            if date_of(*ts) != day {
                day = date_of(*ts);
                day_index = dates[&day];
            }
            let rank = *rank_of_row.next().expect("each row was ranked") as usize;
            pair_of.push(day_index * devices.count + rank);
            rows.push(Row { ts: *ts, batch: batch as u32, row: row as u32 });
        }
    }
    let rows = if pairs <= total.saturating_mul(PAIRS_PER_ROW_MAX).max(1024) {
        place_by_count(&rows, &pair_of, pairs)
    } else {
        place_by_comparison(rows, pair_of)
    };
    Order { dates: date_ranges(&rows), rows }
}

fn times(batch: &RecordBatch) -> &[i64] {
    let column = batch.column_by_name(TS).expect("rows of a table have ts");
    column.as_primitive::<TimestampMicrosecondType>().values()
}

struct Devices {
    count: usize,
    /// Rank of each row's device, null first, over all batches.
    rank_of_row: Vec<u32>,
}

fn rank_devices(batches: &[RecordBatch]) -> Devices {
    let mut seen: HashMap<Option<&str>, u32> = HashMap::new();
    let mut number_of_row = Vec::with_capacity(batches.iter().map(RecordBatch::num_rows).sum());
    for batch in batches {
        let column = batch.column_by_name(DEVICE).expect("rows of a table have device").as_string::<i32>();
        let mut last: Option<(Option<&str>, u32)> = None;
        for row in 0..column.len() {
            let device = column.is_valid(row).then(|| column.value(row));
            let number = match last {
                Some((same, number)) if same == device => number,
                _ => {
                    let fresh = seen.len() as u32;
                    *seen.entry(device).or_insert(fresh)
                }
            };
            last = Some((device, number));
            number_of_row.push(number);
        }
    }
    let mut names: Vec<(Option<&str>, u32)> = seen.into_iter().collect();
    names.sort_unstable();
    let mut rank_of_number = vec![0; names.len()];
    for (rank, (_, number)) in names.iter().enumerate() {
        rank_of_number[*number as usize] = rank as u32;
    }
    for number in &mut number_of_row {
        *number = rank_of_number[*number as usize];
    }
    Devices { count: names.len(), rank_of_row: number_of_row }
}

fn rank_dates(batches: &[RecordBatch]) -> BTreeMap<i32, usize> {
    let mut dates = BTreeSet::new();
    for batch in batches {
        let mut last = None;
        for ts in times(batch) {
            let date = date_of(*ts);
            if last != Some(date) {
                dates.insert(date);
                last = Some(date);
            }
        }
    }
    dates.into_iter().enumerate().map(|(index, date)| (date, index)).collect()
}

fn place_by_count(rows: &[Row], pair_of: &[usize], pairs: usize) -> Vec<Row> {
    let mut ends = vec![0usize; pairs + 1];
    for pair in pair_of {
        ends[pair + 1] += 1;
    }
    for pair in 1..=pairs {
        ends[pair] += ends[pair - 1];
    }
    // `ends[pair]` is where the pair begins now, and where it ends when all rows are in place.
    let mut placed = vec![Row::default(); rows.len()];
    for (row, pair) in rows.iter().zip(pair_of) {
        placed[ends[*pair]] = *row;
        ends[*pair] += 1;
    }
    let mut start = 0;
    for end in &ends[..pairs] {
        let run = &mut placed[start..*end];
        if !run.is_sorted_by_key(|row| row.ts) {
            run.sort_by_key(|row| row.ts);
        }
        start = *end;
    }
    placed
}

fn place_by_comparison(rows: Vec<Row>, pair_of: Vec<usize>) -> Vec<Row> {
    let mut keyed: Vec<(usize, Row)> = pair_of.into_iter().zip(rows).collect();
    keyed.sort_by_key(|(pair, row)| (*pair, row.ts));
    keyed.into_iter().map(|(_, row)| row).collect()
}

fn date_ranges(rows: &[Row]) -> Vec<(i32, Range<usize>)> {
    let mut ranges: Vec<(i32, Range<usize>)> = Vec::new();
    for run in rows.chunk_by(|a, b| date_of(a.ts) == date_of(b.ts)) {
        let start = ranges.last().map_or(0, |(_, range)| range.end);
        ranges.push((date_of(run[0].ts), start..start + run.len()));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{ArrayRef, StringArray, TimestampMicrosecondArray};

    use super::*;

    fn batch(rows: &[(i64, Option<&str>)]) -> RecordBatch {
        let ts = TimestampMicrosecondArray::from_iter_values(rows.iter().map(|(ts, _)| *ts)).with_timezone("UTC");
        let device: StringArray = rows.iter().map(|(_, device)| *device).collect();
        RecordBatch::try_from_iter([(TS, Arc::new(ts) as ArrayRef), (DEVICE, Arc::new(device))]).unwrap()
    }

    #[test]
    fn rows_are_ordered_by_date_device_time_and_arrival() {
        let seed: u64 = 4711;
        let mut random = segment_log::sim::Random::new(seed);
        for (devices, days) in [(3, 2), (5000, 60)] {
            let names: Vec<String> = (0..devices).map(|device| format!("d{device}")).collect();
            let mut inputs: Vec<Vec<(i64, Option<&str>)>> = vec![vec![]];
            for _ in 0..4 {
                let rows = (0..500).map(|_| {
                    let ts = random.below(days) as i64 * DAY_US - DAY_US + random.below(50) as i64;
                    let device = random.below(devices + 1) as usize;
                    (ts, names.get(device).map(String::as_str))
                });
                inputs.push(rows.collect());
            }
            let batches: Vec<RecordBatch> = inputs.iter().map(|rows| batch(rows)).collect();
            let mut expected: Vec<(i32, Option<&str>, i64, usize, usize)> = Vec::new();
            for (batch, rows) in inputs.iter().enumerate() {
                expected.extend(rows.iter().enumerate().map(|(row, (ts, d))| (date_of(*ts), *d, *ts, batch, row)));
            }
            expected.sort_unstable();
            let got = order(&batches);
            let places: Vec<_> = got.rows.iter().map(|row| (row.batch as usize, row.row as usize)).collect();
            assert_eq!(places, expected.iter().map(|e| (e.3, e.4)).collect::<Vec<_>>(), "seed {seed}");
            for (date, range) in &got.dates {
                assert!(expected[range.clone()].iter().all(|e| e.0 == *date));
            }
            assert_eq!(got.dates.last().unwrap().1.end, 2000);
        }
    }
}
