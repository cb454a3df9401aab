use std::time::Duration;

use arrow_array::{Int64Array, TimestampMicrosecondArray};
use arrow_schema::{DataType, Field, Schema};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use wire::TS_MIN_US;
use wire::schema::timestamp_type;

use super::*;

const SPOOLS: [SpoolId; 2] = [SpoolId([1; 16]), SpoolId([2; 16])];

/// Rows that say which batch they are of.
fn chunk(spool: usize, seq: u64, rows: usize, day: i64) -> Chunk {
    let schema =
        Schema::new(vec![Field::new("ts", timestamp_type(), false), Field::new("batch", DataType::Int64, false)]);
    let ts = TimestampMicrosecondArray::from_value(TS_MIN_US + day * DAY_US, rows).with_timezone("UTC");
    let batch = Int64Array::from_value((spool as i64) << 32 | seq as i64, rows);
    let rows = RecordBatch::try_new(Arc::new(schema), vec![Arc::new(ts), Arc::new(batch)]).unwrap();
    let mark = Mark { seq: Seq(seq), crc: seq as u32 };
    let wal = InWal { from: Position(seq * 100), bytes: rows.num_rows() };
    Chunk::new(rows, SPOOLS[spool], mark, wal, Instant::now())
}

/// (spool, seq) of every row of an answer, sorted; and runs must tell the same.
fn numbers(answer: HotAnswer) -> Vec<i64> {
    let HotAnswer::Rows(parts) = answer else { panic!("stale") };
    let mut numbers = Vec::new();
    for part in parts {
        let batches = part.rows.column(1).as_primitive::<arrow_array::types::Int64Type>();
        let mut at = 0;
        for run in &part.runs {
            assert_eq!(run.start, at);
            let spool = SPOOLS.iter().position(|spool| *spool == run.spool).unwrap();
            for row in at..at + run.rows {
                assert_eq!(batches.value(row), (spool as i64) << 32 | run.seq.0 as i64);
            }
            at += run.rows;
        }
        assert_eq!(at, part.rows.num_rows());
        numbers.extend(batches.values());
    }
    numbers.sort_unstable();
    numbers
}

#[test]
fn small_batches_are_merged_and_still_told_apart() {
    let mut hot = HotSet::new(0);
    for seq in 1..=3_000_u64 {
        hot.push(chunk((seq % 2) as usize, seq.div_ceil(2), 10, 0));
    }
    assert!(hot.chunks.len() < 60, "{} chunks", hot.chunks.len());
    assert_eq!(numbers(hot.answer(0, 0)).len(), 30_000);
}

#[test]
fn a_commit_takes_whole_batches_in_order_up_to_its_dates() {
    let mut hot = HotSet::new(0);
    for seq in 1..=100 {
        hot.push(chunk(0, seq, 1, seq as i64));
    }
    let taking = hot.take(64, usize::MAX);
    let [(spool, first, last)] = taking.marks[..] else { panic!("{:?}", taking.marks) };
    assert_eq!((spool, first), (SPOOLS[0], Seq(1)));
    let rows: usize = taking.rows.iter().map(RecordBatch::num_rows).sum();
    assert_eq!(rows as u64, last.seq.0);
    assert!(last.seq.0 <= 64 && last.seq.0 > 32, "{last:?}");
}

/// Pushes, commits by this node and others, and expiries at random: for every version that is answered, the answer
/// and what was committed at that version are together every batch, once.
#[test]
fn every_answered_version_is_whole() {
    let seed = rand::random::<u64>();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..60 {
        let mut hot = HotSet::new(0);
        let mut next = [1_u64; 2];
        let mut committed_at = vec![[0_u64; 2]];
        let mut all = Vec::new();
        for _ in 0..200 {
            let newest = committed_at.len() as u64 - 1;
            match random.random_range(0..12) {
                0..=7 => {
                    let spool = random.random_range(0..2);
                    let rows = random.random_range(0..40);
                    hot.push(chunk(spool, next[spool], rows, 0));
                    all.extend(std::iter::repeat_n((spool as i64) << 32 | next[spool] as i64, rows));
                    next[spool] += 1;
                }
                8 | 9 => {
                    let mut marks = *committed_at.last().unwrap();
                    if random.random_bool(0.7) {
                        let taking = hot.take(64, random.random_range(1..20_000));
                        // Batches that arrive while the commit is under way.
                        hot.push(chunk(0, next[0], 3, 0));
                        all.extend([next[0] as i64; 3]);
                        next[0] += 1;
                        for (spool, first, last) in taking.marks {
                            let spool = SPOOLS.iter().position(|known| *known == spool).unwrap();
                            assert_eq!(first.0, marks[spool] + 1);
                            marks[spool] = last.seq.0;
                        }
                    } else {
                        for spool in 0..2 {
                            marks[spool] = random.random_range(marks[spool]..next[spool]);
                        }
                    }
                    committed_at.push(marks);
                    let until = Instant::now() + Duration::from_secs(if random.random() { 0 } else { 100 });
                    let seq = |spool: &SpoolId| Seq(marks[SPOOLS.iter().position(|known| known == spool).unwrap()]);
                    hot.committed(newest + 1, seq, until);
                }
                10 => {
                    hot.expire(Instant::now());
                }
                _ => {
                    hot.shorten_grace(random.random_range(0..20_000));
                }
            }
            let newest = committed_at.len() as u64 - 1;
            // Each look at all versions costs much, and what is wrong stays wrong for a while.
            if !random.random_ratio(1, 8) {
                continue;
            }
            for (version, marks) in committed_at.iter().enumerate() {
                let answer = hot.answer(version as u64, newest);
                if let HotAnswer::Stale(to) = answer {
                    assert!((version as u64) < newest, "the newest version is always answered");
                    assert_eq!(to, newest);
                    continue;
                }
                let mut together = numbers(answer);
                let is_cold = |number: &i64| (number & 0xffff_ffff) as u64 <= marks[(number >> 32) as usize];
                together.extend(all.iter().copied().filter(is_cold));
                together.sort_unstable();
                let mut expected = all.clone();
                expected.sort_unstable();
                assert_eq!(together, expected, "version {version} of {newest}");
            }
        }
    }
}

/// Files were compacted while a commit is under way: nothing is hot that was not, and what the commit took stays apart.
#[test]
fn a_version_without_new_rows_leaves_hot_rows_and_a_commit_under_way_alone() {
    let mut hot = HotSet::new(0);
    for seq in 1..=4 {
        hot.push(chunk(0, seq, 10, 0));
    }
    let taken = hot.take(64, usize::MAX);
    assert_eq!(taken.rows.len(), 4);
    hot.committed(1, |_| Seq(0), Instant::now() + Duration::from_secs(60));
    for seq in 5..=12 {
        hot.push(chunk(0, seq, 10, 0));
    }
    for at in [0, 1] {
        assert_eq!(numbers(hot.answer(at, 1)).len(), 120);
    }
    hot.committed(2, |_| Seq(4), Instant::now() + Duration::from_secs(60));
    // A chunk that was merged over the end of what was committed would be cut, and older versions not be answered.
    for (at, rows) in [(0, 120), (1, 120), (2, 80)] {
        assert_eq!(numbers(hot.answer(at, 2)).len(), rows, "version {at}");
    }
}
