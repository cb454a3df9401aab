use std::sync::Arc;

use arrow_array::{Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use segment_log::sim::{Random, SimLayer};
use wire::{FieldType, StreamField};

use super::*;

const DIRECTORY: &str = "/spool";
const NOW_US: i64 = 1_700_000_000_000_000;

fn schema() -> StreamSchema {
    StreamSchema::new(vec![StreamField { name: "speed".parse().unwrap(), kind: FieldType::Float64 }]).unwrap()
}

fn cut_batch(stream: &str, value: f64) -> CutBatch {
    let rows = RecordBatch::try_new(
        schema().arrow().clone(),
        vec![
            Arc::new(TimestampMicrosecondArray::from(vec![NOW_US]).with_timezone("UTC")),
            Arc::new(StringArray::from(vec!["d"])),
            Arc::new(Float64Array::from(vec![value])),
            Arc::new(StringArray::from(vec!["good"])),
        ],
    )
    .unwrap();
    CutBatch::seal(stream.parse().unwrap(), &schema(), &rows, NOW_US, "test", 1).unwrap()
}

fn settings(on_full: OnFull) -> SpoolSettings {
    let lane = |name: &str| LaneSettings { name: name.into(), max_bytes: 512 << 10, segment_bytes: 128 << 10, on_full };
    SpoolSettings {
        edge: "gw".parse().unwrap(),
        agent: "test".into(),
        configuration: 1,
        lanes: vec![lane("first"), lane("rest")],
    }
}

fn open(layer: &SimLayer, on_full: OnFull) -> Spool<SimLayer> {
    let (spool, incidents) = Spool::open(layer, Path::new(DIRECTORY), settings(on_full), SpoolId([7; 16])).unwrap();
    assert!(incidents.is_empty(), "{incidents:?}");
    spool
}

fn traffic() -> StreamName {
    "traffic".parse().unwrap()
}

fn append(spool: &mut Spool<SimLayer>, cut: u64, value: f64) {
    spool.append(1, Position(cut), &[cut_batch("traffic", value)], &[schema()], NOW_US).unwrap();
}

#[test]
fn numbers_go_on_and_the_same_bytes_come_again_after_a_restart() {
    let layer = SimLayer::new();
    let mut spool = open(&layer, OnFull::Refuse);
    (1..=3).for_each(|n| append(&mut spool, n * 10, n as f64));
    let sent = spool.number(1, &traffic(), 1).unwrap();
    assert_eq!(sent.len(), 1);
    drop(spool);
    let mut spool = open(&layer, OnFull::Refuse);
    assert_eq!(spool.cut_position(1), Position(30));
    assert_eq!(spool.again(&traffic(), Seq(1), usize::MAX).unwrap(), sent);
    let rest = spool.number(1, &traffic(), usize::MAX).unwrap();
    assert_eq!(rest.iter().map(|batch| batch.header().seq.0).collect::<Vec<_>>(), [2, 3]);
    assert_eq!(rest[0].header().previous_crc, sent[0].crc());
    assert_eq!(spool.waiting().count(), 0);
}

#[test]
fn an_ack_with_another_crc_frees_nothing() {
    let layer = SimLayer::new();
    let mut spool = open(&layer, OnFull::Refuse);
    append(&mut spool, 10, 1.0);
    let crc = spool.number(1, &traffic(), usize::MAX).unwrap()[0].crc();
    assert!(!spool.free(&traffic(), Mark { seq: Seq(1), crc: crc ^ 1 }).unwrap());
    assert!(!spool.free(&traffic(), Mark { seq: Seq(2), crc }).unwrap(), "more than was numbered");
    assert_eq!(spool.rows(), 1);
    assert!(spool.free(&traffic(), Mark { seq: Seq(1), crc }).unwrap());
    assert_eq!(spool.rows(), 0);
}

#[test]
fn a_void_batch_keeps_its_number_and_the_chain() {
    let layer = SimLayer::new();
    let mut spool = open(&layer, OnFull::Refuse);
    append(&mut spool, 10, 1.0);
    append(&mut spool, 20, 2.0);
    let sent = spool.number(1, &traffic(), usize::MAX).unwrap();
    spool.void(&traffic(), Seq(1), "refused").unwrap();
    spool.mark().unwrap();
    drop(spool);
    let mut spool = open(&layer, OnFull::Refuse);
    let again = spool.again(&traffic(), Seq(1), usize::MAX).unwrap();
    assert_eq!(again[0].header().void.as_ref().unwrap().replaces, sent[0].crc());
    assert_eq!(again[1], sent[1]);
}

#[test]
fn a_full_lane_drops_the_oldest_into_losses_or_refuses() {
    let layer = SimLayer::new();
    let mut spool = open(&layer, OnFull::DropOldest);
    (1..=3_000).for_each(|n| append(&mut spool, n, n as f64));
    let (_, lost) = spool.rows_freed_and_lost();
    assert!(lost > 0);
    let kept = spool.waiting().filter(|(_, stream)| stream.as_str() == "traffic").count() as u64;
    assert_eq!(kept + lost, 3_000);
    assert!(spool.waiting().any(|(_, stream)| stream.as_str() == "losses"));
    let rows = spool.rows();
    drop(spool);
    assert_eq!(open(&layer, OnFull::DropOldest).rows(), rows, "a restart neither loses nor repeats");

    let mut spool = open(&SimLayer::new(), OnFull::Refuse);
    let batch = cut_batch("traffic", 0.0);
    let full =
        (1..=3_000).find_map(|n| spool.append(1, Position(n), std::slice::from_ref(&batch), &[schema()], NOW_US).err());
    assert!(matches!(full, Some(SpoolError::Full(lane)) if lane == "rest"));
}

/// Cuts the power at random points. What was handed out for sending must come again with the same bytes, and each cut
/// that was accepted is there once.
#[test]
fn after_a_power_cut_no_number_has_two_contents() {
    for seed in 0..60 {
        let mut random = Random::new(seed);
        let layer = SimLayer::new();
        let mut sent: HashMap<u64, SealedBatch> = HashMap::new();
        let mut accepted = 0;
        for _ in 0..4 {
            let mut spool = open(&layer, OnFull::Refuse);
            assert!(spool.cut_position(1).0 >= accepted, "seed {seed}");
            let head = spool.head(&traffic()).seq.0;
            for batch in spool.again(&traffic(), Seq(1), usize::MAX).unwrap() {
                let seq = batch.header().seq.0;
                assert!(sent.get(&seq).is_none_or(|known| *known == batch), "seed {seed}: batch {seq} differs");
                sent.insert(seq, batch);
            }
            assert!(sent.keys().all(|seq| *seq <= head), "seed {seed}: a number was forgotten");
            assert_eq!(spool.rows(), spool.cut_position(1).0, "seed {seed}: one batch for each cut");
            accepted = spool.cut_position(1).0;
            layer.fail_after(random.below(60));
            loop {
                let batch = cut_batch("traffic", (accepted + 1) as f64);
                if spool.append(1, Position(accepted + 1), &[batch], &[schema()], NOW_US).is_err() {
                    break;
                }
                accepted += 1;
                if random.one_in(2) {
                    match spool.number(1, &traffic(), 1 + random.below(2_000) as usize) {
                        Ok(batches) => sent.extend(batches.into_iter().map(|b| (b.header().seq.0, b))),
                        Err(_) => break,
                    }
                }
            }
            drop(spool);
            layer.power_cut(&mut random);
        }
    }
}
