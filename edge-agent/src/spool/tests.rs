use std::sync::{Arc, LazyLock};

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use segment_log::LayerFile;
use segment_log::sim::{Random, SimLayer};
use wire::{FieldType, StreamField, StreamSchema};

use super::*;

mod lanes;

const DIRECTORY: &str = "/spool";
const NOW_US: i64 = 1_700_000_000_000_000;

fn schema() -> StreamSchema {
    StreamSchema::new(vec![StreamField { name: "speed".parse().unwrap(), kind: FieldType::Float64 }]).unwrap()
}

/// About a kilobyte, of which nothing can be packed away: the sizes of lanes stand on it.
fn cut_batch(stream: &str, value: f64) -> CutBatch {
    static DEVICE: LazyLock<String> = LazyLock::new(|| {
        (0..1_300_u32).map(|n| char::from(b'0' + (crc32c::crc32c(&n.to_le_bytes()) % 64) as u8)).collect()
    });
    cut_batch_of(&DEVICE, stream, value)
}

fn cut_batch_of(device: &str, stream: &str, value: f64) -> CutBatch {
    let rows = RecordBatch::try_new(
        schema().arrow().clone(),
        vec![
            Arc::new(TimestampMicrosecondArray::from(vec![NOW_US]).with_timezone("UTC")),
            Arc::new(StringArray::from(vec![device])),
            Arc::new(Float64Array::from(vec![value])),
            Arc::new(StringArray::from(vec!["good"])),
        ],
    )
    .unwrap();
    CutBatch::seal(stream.parse().unwrap(), &schema(), &rows, NOW_US, "test", 1).unwrap()
}

fn settings(on_full: OnFull) -> SpoolSettings {
    let lane = |name: &str| LaneSettings {
        name: name.into(),
        max_bytes: 512 << 10,
        segment_bytes: 128 << 10,
        on_full,
        raw: BTreeSet::from([traffic()]),
        max_age_us: None,
    };
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

/// What waits of a stream in the lane `rest`, in its order.
fn waiting(spool: &mut Spool<SimLayer>, stream: &StreamName) -> Vec<Waiting> {
    let Lane { waiting, log, .. } = &mut spool.lanes[1];
    let mut all = Vec::new();
    let visit = |waiting| {
        all.push(waiting);
        true
    };
    waiting.walk(log, stream, (u64::MAX, false), visit).unwrap();
    all
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
    assert!(spool.waiting().is_empty());
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
    let counts = spool.rows_counted();
    assert!(counts.lost > 0);
    let kept = waiting(&mut spool, &traffic()).len() as u64;
    let losses = spool.number(1, &"losses".parse().unwrap(), usize::MAX).unwrap();
    let told = losses.iter().map(|batch| {
        let rows = batch.decode(&losses::schema()).unwrap();
        rows.column(5).as_primitive::<Int64Type>().values().iter().sum::<i64>() as u64
    });
    assert_eq!(kept + told.sum::<u64>(), 3_000, "what is not kept is told");
    drop(spool);
    assert_eq!(open(&layer, OnFull::DropOldest).rows_counted(), counts, "a restart neither loses nor repeats");

    let mut spool = open(&SimLayer::new(), OnFull::Refuse);
    let batch = cut_batch("traffic", 0.0);
    let full =
        (1..=3_000).find_map(|n| spool.append(1, Position(n), std::slice::from_ref(&batch), &[schema()], NOW_US).err());
    assert!(matches!(full, Some(SpoolError::Full(lane)) if lane == "rest"));
}

/// The seeds of a test: `POWER_CUT_SEEDS=2000` tries more, `POWER_CUT_SEED=17` only one.
fn seeds(usual: u64) -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    number("POWER_CUT_SEED").map_or(0..number("POWER_CUT_SEEDS").unwrap_or(usual), |seed| seed..seed + 1)
}

/// Cuts the power at random points. What was handed out for sending must come again with the same bytes, and each cut
/// that was accepted is there once.
#[test]
fn after_a_power_cut_no_number_has_two_contents() {
    for seed in seeds(60) {
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

/// Text that no compression makes shorter.
fn noise(random: &mut Random, bytes: usize) -> String {
    (0..bytes).map(|_| char::from(b'!' + random.below(94) as u8)).collect()
}

/// A tick closes the windows of so many devices that what comes out takes more than a segment of 16 MiB.
#[test]
fn a_cut_of_more_than_a_segment_goes_to_the_lane_as_one() {
    let layer = SimLayer::new();
    let mut wide = settings(OnFull::Refuse);
    (wide.lanes[1].segment_bytes, wide.lanes[1].max_bytes) = (16 << 20, 128 << 20);
    let open = || Spool::open(&layer, Path::new(DIRECTORY), wide.clone(), SpoolId([7; 16])).unwrap().0;
    let (mut random, stream) = (Random::new(1), "traffic_5m".parse::<StreamName>().unwrap());
    let (batches, rows) = (13_u64, 8_000);
    let batch = |random: &mut Random| {
        let devices = (0..rows).map(|_| noise(random, 240)).collect::<Vec<_>>();
        let columns = RecordBatch::try_new(
            schema().arrow().clone(),
            vec![
                Arc::new(TimestampMicrosecondArray::from(vec![NOW_US; rows]).with_timezone("UTC")),
                Arc::new(StringArray::from(devices)),
                Arc::new(Float64Array::from(vec![1.0; rows])),
                Arc::new(StringArray::from(vec!["good"; rows])),
            ],
        );
        CutBatch::seal(stream.clone(), &schema(), &columns.unwrap(), NOW_US, "test", 1).unwrap()
    };
    let all = (0..batches).map(|_| batch(&mut random)).collect::<Vec<_>>();
    assert!(all.iter().map(|batch| batch.body.len()).sum::<usize>() > 17 << 20);
    let mut spool = open();
    spool.append(1, Position(10), &all, &[schema()], NOW_US).unwrap();
    for _ in 0..2 {
        assert_eq!((spool.rows(), spool.cut_position(1)), (batches * rows as u64, Position(10)));
        drop(spool);
        spool = open();
    }
    let sent = spool.number(1, &stream, usize::MAX).unwrap();
    let rows_sent = sent.iter().map(|batch| batch.decode(&schema()).unwrap().num_rows()).sum::<usize>();
    assert_eq!(rows_sent as u64, batches * rows as u64);
}

/// Cuts of several records, over segments, with crashes anywhere in them and in lanes that have no room for them.
#[test]
fn a_cut_of_several_records_is_there_as_a_whole_or_not() {
    const BATCHES: u64 = 14;
    let mut whole = 0;
    for seed in seeds(60) {
        let mut random = Random::new(seed);
        let layer = SimLayer::new();
        let batches = (0..BATCHES).map(|n| {
            let stream = if n % 3 == 0 { "other" } else { "traffic" };
            cut_batch_of(&noise(&mut Random::new(seed * 100 + n), 9_000), stream, n as f64)
        });
        let batches = batches.collect::<Vec<_>>();
        let mut cut = 0;
        for _ in 0..5 {
            let mut spool = open(&layer, OnFull::Refuse);
            let of = format!("seed {seed}, cut {cut}");
            assert!(spool.cut_position(1).0 >= cut, "{of}: a cut was forgotten");
            cut = spool.cut_position(1).0;
            let counts = spool.rows_counted();
            assert_eq!(counts.freed + counts.spooled, cut * BATCHES, "{of}: {counts:?}");
            assert_eq!((counts.cut, counts.lost), (cut * BATCHES, 0), "{of}");
            layer.fail_after(random.below(90));
            for _ in 0..12 {
                match spool.append(1, Position(cut + 1), &batches, &[schema()], NOW_US) {
                    Ok(()) => cut += 1,
                    Err(error) if error.is_full() => whole += 1,
                    Err(_) => break,
                }
                for stream in ["other", "traffic"].map(|name| name.parse::<StreamName>().unwrap()) {
                    let bytes_max = random.below(200_000) as usize;
                    let Ok(sent) = spool.number(1, &stream, bytes_max) else { break };
                    if let Some(last) = sent.last().filter(|_| random.one_in(2)) {
                        let mark = Mark { seq: last.header().seq, crc: last.crc() };
                        let _ = spool.free(&stream, mark);
                    }
                }
            }
            drop(spool);
            layer.power_cut(&mut random);
        }
    }
    assert!(whole > 0, "no lane was ever full");
}

#[test]
fn groups_of_the_version_before_are_read() {
    let layer = SimLayer::new();
    let mut spool = open(&layer, OnFull::Refuse);
    append(&mut spool, 10, 1.0);
    let mut payload = record::group(Position(20), NOW_US, 2, &[cut_batch("traffic", 2.0)]);
    // It did not tell the rows.
    payload.drain(17..25);
    payload[0] = 2;
    let schema = schema().id();
    spool.put(1, record::GROUP, &payload, &[schema], false).unwrap();
    spool.mark().unwrap();
    drop(spool);
    let mut spool = open(&layer, OnFull::Refuse);
    assert_eq!((spool.rows(), spool.rows_counted().cut, spool.cut_position(1)), (2, 2, Position(20)));
    append(&mut spool, 30, 3.0);
    drop(spool);
    let counts = open(&layer, OnFull::Refuse).rows_counted();
    assert_eq!((counts.spooled, counts.cut, counts.lost), (3, 3, 0));
}

/// Rule 6 after rule 8: what stood in damaged records is lost, and counted.
#[test]
fn rows_that_rot_before_they_have_a_number_are_counted_as_lost() {
    let layer = SimLayer::new();
    let mut spool = open(&layer, OnFull::Refuse);
    (1..=30).for_each(|n| append(&mut spool, n, n as f64));
    let sent = spool.number(1, &traffic(), 2_000).unwrap();
    spool.free(&traffic(), Mark { seq: Seq(1), crc: sent[0].crc() }).unwrap();
    let places = waiting(&mut spool, &traffic()).iter().map(|one| one.place).collect::<Vec<_>>();
    (31..=33).for_each(|n| append(&mut spool, n, n as f64));
    spool.mark().unwrap();
    let before = spool.rows_counted();
    let (path, at) = spool.lanes[1].log.file_of(Position(places[4].group)).unwrap();
    drop(spool);
    let file = layer.open(&path).unwrap();
    file.write_all_at(&[0xff; 4], at + 60).unwrap();
    file.sync_data().unwrap();
    let open = || Spool::open(&layer, Path::new(DIRECTORY), settings(OnFull::Refuse), SpoolId([7; 16])).unwrap();
    let (mut spool, incidents) = open();
    assert_eq!(incidents.len(), 1);
    let counts = spool.rows_counted();
    assert_eq!(counts.freed + counts.spooled + counts.lost, 33, "{counts:?}");
    assert_eq!((counts.cut, counts.lost, counts.spooled), (33, 1, before.spooled - 1));
    append(&mut spool, 34, 34.0);
    spool.put_state(1).unwrap();
    spool.mark().unwrap();
    drop(spool);
    // The next start finds it counted, and not twice.
    let (mut spool, _) = open();
    let counts = spool.rows_counted();
    assert_eq!((counts.cut, counts.lost, counts.spooled), (34, 1, before.spooled));
    let rest = spool.number(1, &traffic(), usize::MAX).unwrap();
    assert_eq!(rest.len() as u64, counts.spooled - (sent.len() as u64 - 1));
}

/// A block of batches that wait is read from the disk again, and a part of it cannot be.
#[test]
fn what_rots_while_it_waits_becomes_void_and_keeps_its_neighbours() {
    let layer = SimLayer::new();
    let mut spool = open(&layer, OnFull::Refuse);
    (1..=40).for_each(|n| append(&mut spool, n, n as f64));
    let place = waiting(&mut spool, &traffic())[8].place;
    // The blocks at the end are asked for last.
    let last = waiting(&mut spool, &traffic()).last().cloned().unwrap().place;
    assert!(place.group < last.group);
    let (path, at) = spool.lanes[1].log.file_of(Position(place.group)).unwrap();
    layer.open(&path).unwrap().write_all_at(&[0xff; 4], at + 60).unwrap();
    let sent = spool.number(1, &traffic(), usize::MAX).unwrap();
    assert_eq!(sent.len(), 40);
    assert_eq!(sent.iter().filter(|batch| batch.header().void.is_some()).count(), 1);
    let counts = spool.rows_counted();
    assert_eq!((counts.spooled, counts.lost, counts.cut), (39, 1, 40), "{counts:?}");
    spool.mark().unwrap();
    drop(spool);
    let (spool, _) = Spool::open(&layer, Path::new(DIRECTORY), settings(OnFull::Refuse), SpoolId([7; 16])).unwrap();
    let counts = spool.rows_counted();
    assert_eq!((counts.spooled, counts.lost, counts.cut), (39, 1, 40), "{counts:?}");
}

#[test]
fn counts_survive_restarts_and_a_torn_tail() {
    for seed in seeds(40) {
        let mut random = Random::new(seed);
        let layer = SimLayer::new();
        let mut cut = 0;
        for _ in 0..4 {
            let mut spool = open(&layer, OnFull::Refuse);
            let counts = spool.rows_counted();
            cut = cut.max(spool.cut_position(1).0);
            assert_eq!(counts.freed + counts.spooled + counts.voided, cut, "seed {seed}: {counts:?}");
            layer.fail_after(random.below(80));
            for _ in 0..40 {
                let batch = cut_batch("traffic", cut as f64);
                if spool.append(1, Position(cut + 1), &[batch], &[schema()], NOW_US).is_err() {
                    break;
                }
                cut += 1;
                if random.one_in(3) && spool.number(1, &traffic(), usize::MAX).is_err() {
                    break;
                }
                let sequence = &spool.sequences.get(&traffic());
                let marks = sequence.map(|s| s.numbered.iter().map(|n| n.mark).collect::<Vec<_>>()).unwrap_or_default();
                if random.one_in(9) && !marks.is_empty() && spool.void(&traffic(), marks[0].seq, "refused").is_err() {
                    break;
                }
                if random.one_in(3) && !marks.is_empty() {
                    let mark = marks[random.below(marks.len() as u64) as usize];
                    if spool.free(&traffic(), mark).is_err() {
                        break;
                    }
                }
            }
            cut = 0;
            drop(spool);
            layer.power_cut(&mut random);
        }
    }
}

#[test]
fn a_lane_that_is_no_longer_configured_is_drained() {
    let layer = SimLayer::new();
    append(&mut open(&layer, OnFull::Refuse), 10, 1.0);
    let mut fewer = settings(OnFull::Refuse);
    fewer.lanes.pop();
    let (mut spool, _) = Spool::open(&layer, Path::new(DIRECTORY), fewer, SpoolId([7; 16])).unwrap();
    assert_eq!(spool.waiting(), [(1, &traffic())]);
    assert_eq!(spool.number(1, &traffic(), usize::MAX).unwrap().len(), 1);
}

#[test]
fn when_another_directory_has_the_same_batches_all_of_them_may_be_there() {
    let layer = SimLayer::new();
    let mut spool = open(&layer, OnFull::Refuse);
    (1..=3).for_each(|n| append(&mut spool, n * 10, n as f64));
    spool.number(1, &traffic(), 1).unwrap();
    let (mut forked, _) = spool.fork(&layer, Path::new(DIRECTORY), SpoolId([8; 16]), None).unwrap();
    for batch in forked.number(1, &traffic(), usize::MAX).unwrap() {
        assert_eq!(batch.decode(&schema()).unwrap().column(3).as_string::<i32>().value(0), "forked");
    }
}

#[test]
fn a_fork_keeps_what_is_not_committed_and_flags_what_may_be_there() {
    let layer = SimLayer::new();
    let mut spool = open(&layer, OnFull::Refuse);
    (1..=5).for_each(|n| append(&mut spool, n * 10, n as f64));
    let first = spool.number(1, &traffic(), 1).unwrap();
    spool.free(&traffic(), Mark { seq: Seq(1), crc: first[0].crc() }).unwrap();
    spool.number(1, &traffic(), 1).unwrap();
    spool.number(1, &traffic(), 1).unwrap();
    let before = spool.rows_counted();
    let fresh = SpoolId([8; 16]);
    let (forked, _) = spool.fork(&layer, Path::new(DIRECTORY), fresh, Some(&|_| Seq(2))).unwrap();
    drop(spool);
    let spool = forked;
    assert_eq!(spool.rows_counted(), before);
    drop(spool);
    let mut spool = open(&layer, OnFull::Refuse);
    assert_eq!((spool.id(), spool.cut_position(1)), (fresh, Position(50)));
    assert_eq!(spool.rows_counted(), before, "after a restart");
    let sent = spool.number(1, &traffic(), usize::MAX).unwrap();
    let seen = sent.iter().map(|batch| {
        let rows = batch.decode(&schema()).unwrap();
        let quality = rows.column(3).as_string::<i32>().value(0).to_owned();
        (rows.column(2).as_primitive::<arrow_array::types::Float64Type>().value(0), quality)
    });
    // The newest goes first: 5 was committed, 4 has the number 2.
    let expected = [(1.0, "good"), (2.0, "good"), (3.0, "good"), (4.0, "forked")];
    assert_eq!(seen.collect::<Vec<_>>(), expected.map(|(value, quality)| (value, quality.to_owned())));
    assert_eq!(sent[0].header().seq, Seq(1));
}

#[test]
fn a_fork_without_room_leaves_the_old_spool_as_it_was() {
    let layer = SimLayer::new();
    let mut spool = open(&layer, OnFull::Refuse);
    (1..=5).for_each(|n| append(&mut spool, n * 10, n as f64));
    let sent = spool.number(1, &traffic(), 1).unwrap();
    let fresh = SpoolId([8; 16]);
    // Each of the two lanes has a segment of 128 KiB and 8 KiB beside it: room for none, for one, for all but a part.
    for (n, capacity_kib) in [0, 272, 300, 420, 540].into_iter().enumerate() {
        layer.set_capacity(capacity_kib << 10);
        let error = spool.fork(&layer, Path::new(DIRECTORY), SpoolId([n as u8; 16]), Some(&|_| Seq(0))).unwrap_err();
        assert!(error.is_full(), "{capacity_kib} KiB: {error:?}");
        assert_eq!(spool.again(&traffic(), Seq(1), usize::MAX).unwrap(), sent);
    }
    layer.set_capacity(u64::MAX);
    let (forked, _) = spool.fork(&layer, Path::new(DIRECTORY), fresh, Some(&|_| Seq(0))).unwrap();
    assert_eq!((forked.rows(), forked.id()), (5, fresh));
}

#[test]
fn a_fork_of_a_full_lane_finds_room_and_drops_nothing() {
    for on_full in [OnFull::Refuse, OnFull::DropOldest] {
        let layer = SimLayer::new();
        let mut spool = open(&layer, on_full);
        // As full as it gets without a drop; seven fit into a segment, and of groups of three only two.
        let mut random = Random::new(7);
        for cut in 0.. {
            let device = (0..10_000).map(|_| char::from(b'!' + random.below(94) as u8)).collect::<String>();
            let batch = cut_batch_of(&device, "traffic", 1.0);
            // One that drops keeps a segment free.
            let most = if on_full == OnFull::Refuse { 512 << 10 } else { 384 << 10 };
            if spool.lanes[1].log.bytes_on_disk() >= most && spool.lanes[1].log.starts_segment(9 << 10) {
                break;
            }
            spool.append(1, Position(cut), &[batch], &[schema()], NOW_US).unwrap();
        }
        let before = spool.rows_counted();
        let (forked, _) = spool.fork(&layer, Path::new(DIRECTORY), SpoolId([8; 16]), Some(&|_| Seq(0))).unwrap();
        assert_eq!(forked.rows_counted(), before);
    }
}

/// However much waits, and whatever was asked of it.
#[test]
fn a_backlog_is_not_in_memory_batch_by_batch() {
    const BATCHES: u64 = 240;
    let layer = SimLayer::new();
    let mut spool = open(&layer, OnFull::Refuse);
    (1..=BATCHES).for_each(|n| append(&mut spool, n, n as f64));
    for of in ["as it came", "after a start", "after a look at all"] {
        if of == "after a start" {
            drop(spool);
            spool = open(&layer, OnFull::Refuse);
        }
        let (here, most) = spool.lanes[1].waiting.here();
        assert!(here <= most && most < BATCHES as usize / 10, "{of}: {here} of {most}");
        assert_eq!(waiting(&mut spool, &traffic()).len(), BATCHES as usize, "{of}");
    }
}

#[test]
fn a_crash_in_a_fork_leaves_the_old_spool_or_the_new_one_whole() {
    for seed in seeds(60) {
        let mut random = Random::new(seed);
        let layer = SimLayer::new();
        let mut spool = open(&layer, OnFull::Refuse);
        (1..=6).for_each(|n| append(&mut spool, n, n as f64));
        spool.number(1, &traffic(), 1).unwrap();
        layer.fail_after(random.below(40));
        let _ = spool.fork(&layer, Path::new(DIRECTORY), SpoolId([8; 16]), Some(&|_| Seq(0)));
        drop(spool);
        layer.power_cut(&mut random);
        let spool = open(&layer, OnFull::Refuse);
        assert_eq!((spool.rows(), spool.cut_position(1)), (6, Position(6)), "seed {seed}");
    }
}
