//! Rot and torn tails, on exact images: each byte of the tail cut, each bit of a small log flipped,
//! files lost. A wrong record is never read, and damage is reported with its exact range.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

use std::path::{Path, PathBuf};

use segment_log::sim::{Random, SimLayer};
use segment_log::{
    Damage, Disk, FileLayer, LayerFile, OpenError, Opening, Options, Position, ReadError, Reason, SegmentLog,
};

const DIRECTORY: &str = "/log";
const OPTIONS: Options = Options { segment_bytes: 512, max_bytes: 64 << 10, reserve_bytes: 0 };
const SEGMENT_HEADER: u64 = 48;
const RECORD_HEADER: u64 = 25;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    position: u64,
    next: u64,
    /// The `synced_to` that the record carries.
    synced_to: u64,
    /// None for a marker.
    payload: Option<Vec<u8>>,
}

/// A log as it was written, and where everything in it lies.
struct Image {
    layer: SimLayer,
    entries: Vec<Entry>,
    firsts: Vec<u64>,
}

fn segment(first: u64) -> PathBuf {
    Path::new(DIRECTORY).join(format!("{first:020}.seg"))
}

fn bytes(layer: &SimLayer, path: &Path) -> Vec<u8> {
    let file = layer.open(path).unwrap();
    let mut bytes = vec![0; file.size().unwrap() as usize];
    assert_eq!(file.read_at(&mut bytes, 0).unwrap(), bytes.len());
    bytes
}

/// Appends `count` records with a sync after each third, so some are proven and some are not.
fn image(count: u64, marked: bool) -> Image {
    let layer = SimLayer::new();
    let (mut log, _) = SegmentLog::open(layer.clone(), DIRECTORY, OPTIONS).unwrap();
    let mut entries = Vec::new();
    let mut firsts = vec![0];
    let mut synced_to = 0;
    for number in 0..count {
        let payload: Vec<u8> = (0..number * 29 % 83).map(|i| (number * 13 + i) as u8).collect();
        let appended = log.append(1, &payload).unwrap();
        if appended.new_segment && appended.position.0 > 0 {
            firsts.push(appended.position.0);
        }
        let (position, next) = (appended.position.0, appended.next.0);
        entries.push(Entry { position, next, synced_to, payload: Some(payload) });
        if number % 3 == 2 {
            synced_to = log.sync().unwrap().0;
        }
    }
    log.sync().unwrap();
    if marked {
        let position = log.end().0;
        log.mark().unwrap();
        entries.push(Entry { position, next: log.end().0, synced_to: position, payload: None });
    }
    drop(log);
    Image { layer, entries, firsts }
}

impl Image {
    fn end(&self) -> u64 {
        self.entries.last().unwrap().next
    }

    /// The file and offset of a position.
    fn place(&self, position: u64) -> (PathBuf, usize) {
        let first = *self.firsts.iter().rev().find(|first| **first <= position).unwrap();
        (segment(first), (SEGMENT_HEADER + position - first) as usize)
    }

    /// What opening must say and keep when just these entries are bad.
    fn expected(&self, bad: impl Fn(&Entry) -> bool) -> (Vec<Damage>, Vec<&Entry>, u64) {
        let intact = |entry: &&Entry| !bad(entry);
        let synced_to = self.entries.iter().filter(intact).map(|entry| entry.synced_to).max().unwrap_or(0);
        let torn = self.entries.iter().find(|entry| bad(entry) && entry.next > synced_to);
        // All records end where a sync may have been, so none lies across `synced_to`.
        let end = torn.map_or(self.end(), |entry| entry.position);
        let mut incidents: Vec<Damage> = Vec::new();
        for entry in self.entries.iter().filter(|entry| bad(entry) && entry.next <= end) {
            let (from, to) = (Position(entry.position), Position(entry.next));
            match incidents.last_mut() {
                Some(last) if last.to == from && !self.firsts.contains(&from.0) => last.to = to,
                _ => incidents.push(Damage { from, to, reason: Reason::Record }),
            }
        }
        (incidents, self.entries.iter().filter(intact).filter(|entry| entry.next <= end).collect(), end)
    }

    /// Opens a damaged copy and holds it against the expectation; then it must go on to work.
    fn check(&self, layer: &SimLayer, what: &str, bad: impl Fn(&Entry) -> bool, torn: Option<bool>) {
        let (incidents, kept, end) = self.expected(bad);
        let (mut log, opening) = SegmentLog::open(layer.clone(), DIRECTORY, OPTIONS).unwrap();
        let found: Vec<Damage> = opening.incidents.iter().filter(|damage| damage.from < damage.to).copied().collect();
        assert_eq!(found, incidents, "{what}");
        if let Some(torn) = torn {
            assert_eq!(opening.torn_tail.map(|tail| tail.from), torn.then_some(Position(end)), "{what}");
        }
        assert!(opening.end.0 == end || opening.end.0 == end + RECORD_HEADER, "{what}: {opening:?}, not {end}");
        let mut expected: Vec<(u64, Vec<u8>)> =
            kept.iter().filter_map(|entry| Some((entry.position, entry.payload.clone()?))).collect();
        assert_eq!(read(&log, &incidents), expected, "{what}");

        let appended = log.append(7, b"later").unwrap();
        expected.push((appended.position.0, b"later".to_vec()));
        log.sync().unwrap();
        drop(log);
        let (log, opening) = SegmentLog::open(layer.clone(), DIRECTORY, OPTIONS).unwrap();
        assert_eq!((opening.incidents, opening.torn_tail), (incidents.clone(), None), "{what}, second opening");
        assert_eq!(read(&log, &incidents), expected, "{what}, second opening");
    }
}

/// All records; the reader must report just these incidents, each once.
fn read(log: &SegmentLog<SimLayer>, incidents: &[Damage]) -> Vec<(u64, Vec<u8>)> {
    let mut reader = log.reader(log.start()).unwrap();
    let mut damages = Vec::new();
    let mut records = Vec::new();
    loop {
        match reader.next() {
            Ok(Some(record)) => records.push((record.position.0, record.payload.to_vec())),
            Ok(None) => break,
            Err(ReadError::Damaged { from, to }) => damages.push((from, to)),
            Err(other) => panic!("{other}"),
        }
    }
    let reported: Vec<_> = incidents.iter().map(|incident| (incident.from, incident.to)).collect();
    assert_eq!(damages, reported, "the reader reports what opening reports");
    records
}

#[test]
fn a_tail_cut_at_any_byte_of_the_last_three_records_is_torn_and_all_before_it_is_kept() {
    for marked in [false, true] {
        let image = image(14, marked);
        let from = image.entries[image.entries.len() - 3].position;
        for at in from..=image.end() {
            for (how, fill) in [("cut off", None), ("zeroed", Some(0)), ("overwritten", Some(0xa5))] {
                let layer = image.layer.copy();
                let (path, offset) = image.place(at.min(image.end() - 1));
                let offset = offset + (at == image.end()) as usize;
                layer
                    .edit(&path, |bytes| match fill {
                        None => bytes.truncate(offset),
                        Some(fill) => bytes[offset..].fill(fill),
                    })
                    .unwrap();
                for first in image.firsts.iter().filter(|first| **first > at) {
                    layer.remove(&segment(*first)).unwrap();
                }
                let torn = match fill {
                    Some(0xa5) => true,
                    _ => image.entries.iter().any(|entry| entry.position < at && at < entry.next),
                };
                let what = format!("{how} at {at}, marked {marked}");
                // Zeroed or cut just where trailing bytes were zero anyway, a torn tail looks empty.
                let torn = (fill == Some(0xa5) || !torn).then_some(torn);
                image.check(&layer, &what, |entry| entry.next > at, torn);
            }
        }
    }
}

#[test]
fn any_flipped_bit_costs_at_most_its_own_record_and_is_reported_below_synced_to() {
    for marked in [false, true] {
        let image = image(14, marked);
        assert!(image.firsts.len() >= 2, "several segments");
        for (index, first) in image.firsts.iter().enumerate() {
            let behind = image.firsts.get(index + 1).copied();
            let file_bytes = OPTIONS.segment_bytes;
            for bit in 0..file_bytes * 8 {
                let layer = image.layer.copy();
                layer.edit(&segment(*first), |bytes| bytes[bit as usize / 8] ^= 1 << (bit % 8)).unwrap();
                let position = (bit / 8).checked_sub(SEGMENT_HEADER).map(|offset| first + offset);
                let bad = |entry: &Entry| {
                    position.is_some_and(|at| entry.position <= at && at < entry.next)
                        && behind.is_none_or(|behind| entry.position < behind)
                };
                let blank = position.is_some_and(|at| at >= image.end()) && behind.is_none();
                let (.., end) = image.expected(bad);
                let torn = blank || end < image.end();
                image.check(&layer, &format!("bit {bit} of segment {first}"), bad, Some(torn));
            }
        }
    }
}

#[test]
fn a_damaged_or_lost_identity_file_is_restored_from_the_segments_and_reported() {
    let image = image(14, true);
    let path = Path::new(DIRECTORY).join("log.id");
    let (log, _) = SegmentLog::open(image.layer.copy(), DIRECTORY, OPTIONS).unwrap();
    let id = log.id();
    let check = |layer: &SimLayer, damaged: bool| {
        let (log, opening) = SegmentLog::open(layer.clone(), DIRECTORY, OPTIONS).unwrap();
        assert_eq!((log.id(), log.end()), (id, Position(image.end())));
        let reasons: Vec<_> = opening.incidents.iter().map(|incident| incident.reason).collect();
        assert_eq!(reasons, if damaged { vec![Reason::Identity] } else { vec![] });
        drop(log);
        let (_, opening) = SegmentLog::open(layer.clone(), DIRECTORY, OPTIONS).unwrap();
        assert_eq!(opening.incidents, []);
    };
    for bit in (0..36 * 8).chain((36 * 8..8192 * 8).step_by(61)) {
        let layer = image.layer.copy();
        layer.edit(&path, |bytes| bytes[bit / 8] ^= 1 << (bit % 8)).unwrap();
        check(&layer, bit < 36 * 8);
    }
    image.layer.remove(&path).unwrap();
    check(&image.layer, true);
}

#[test]
fn a_damaged_segment_header_is_repaired_and_reported_and_costs_no_record() {
    let image = image(14, true);
    for bit in 0..SEGMENT_HEADER * 8 {
        let layer = image.layer.copy();
        layer.edit(&segment(0), |bytes| bytes[bit as usize / 8] ^= 1 << (bit % 8)).unwrap();
        let (log, opening) = SegmentLog::open(layer, DIRECTORY, OPTIONS).unwrap();
        let at = Position(0);
        assert_eq!(opening.incidents, [Damage { from: at, to: at, reason: Reason::Header }]);
        assert_eq!(read(&log, &[]).len(), 14);
    }
}

#[test]
fn a_missing_segment_in_the_middle_is_an_incident_of_its_exact_range() {
    let image = image(40, true);
    let [_, second, third, ..] = image.firsts[..] else { panic!("too few segments") };
    image.layer.remove(&segment(second)).unwrap();
    let (log, opening) = SegmentLog::open(image.layer.clone(), DIRECTORY, OPTIONS).unwrap();
    let [incident] = opening.incidents[..] else { panic!("{opening:?}") };
    assert_eq!((incident.from, incident.to), (Position(second), Position(third)));
    assert_eq!((opening.end, opening.torn_tail), (Position(image.end()), None));
    let kept = image.entries.iter().filter(|entry| entry.payload.is_some());
    let kept = kept.filter(|entry| !(second..third).contains(&entry.position)).count();
    assert_eq!(read(&log, &opening.incidents).len(), kept);
}

#[test]
fn a_segment_lost_while_the_log_is_open_is_reported_by_its_readers() {
    let image = image(40, true);
    let (log, _) = SegmentLog::open(image.layer.clone(), DIRECTORY, OPTIONS).unwrap();
    let (from, to) = (Position(image.firsts[1]), Position(image.firsts[2]));
    image.layer.remove(&segment(from.0)).unwrap();
    read(&log, &[Damage { from, to, reason: Reason::Missing }]);
}

#[test]
fn thousands_of_damaged_ranges_are_reported_within_bounds_and_all_other_records_are_read() {
    let options = Options { segment_bytes: 1 << 20, max_bytes: 8 << 20, reserve_bytes: 0 };
    let layer = SimLayer::new();
    let (mut log, _) = SegmentLog::open(layer.clone(), DIRECTORY, options).unwrap();
    let appended: Vec<_> = (0..10_000u16).map(|number| log.append(1, &number.to_le_bytes()).unwrap()).collect();
    log.mark().unwrap();
    drop(log);
    let damaged = appended.iter().step_by(2);
    layer
        .edit(&segment(0), |bytes| {
            damaged.clone().for_each(|record| bytes[(SEGMENT_HEADER + record.next.0) as usize - 1] ^= 1)
        })
        .unwrap();
    let (log, opening) = SegmentLog::open(layer, DIRECTORY, options).unwrap();
    let exact: Vec<Damage> =
        damaged.map(|record| Damage { from: record.position, to: record.next, reason: Reason::Record }).collect();
    assert_eq!((opening.incidents.len(), &opening.incidents[..4095]), (4096, &exact[..4095]));
    assert_eq!(opening.incidents[4095].to, exact.last().unwrap().to);
    let read: Vec<u64> = read(&log, &exact).iter().map(|(position, _)| *position).collect();
    assert!(read.iter().eq(appended.iter().skip(1).step_by(2).map(|record| &record.position.0)));
}

#[test]
fn a_segment_of_another_log_or_from_another_place_is_never_read() {
    let image = image(40, true);
    let first = image.firsts[1];
    let elsewhere = bytes(&image.layer, &segment(image.firsts[0]));
    let foreign = bytes(&self::image(40, true).layer, &segment(first));
    for strange in [elsewhere, foreign] {
        let layer = image.layer.copy();
        layer.edit(&segment(first), |bytes| *bytes = strange).unwrap();
        let (log, opening) = SegmentLog::open(layer, DIRECTORY, OPTIONS).unwrap();
        let damaged: Vec<_> = opening.incidents.iter().filter(|damage| damage.from < damage.to).collect();
        let [damage] = damaged[..] else { panic!("{opening:?}") };
        assert_eq!((damage.from.0, damage.to.0), (first, image.firsts[2]));
        read(&log, &[*damage]);
    }
}

#[test]
fn a_directory_without_its_segments_or_of_another_version_is_refused() {
    let open = |layer: &SimLayer| SegmentLog::open(layer.clone(), DIRECTORY, OPTIONS).map(|(_, opening)| opening);
    let image = image(40, true);
    let identity = Path::new(DIRECTORY).join("log.id");

    let layer = image.layer.copy();
    image.firsts.iter().for_each(|first| layer.remove(&segment(*first)).unwrap());
    assert!(matches!(open(&layer), Err(OpenError::NoSegments(_))));

    let layer = image.layer.copy();
    layer.remove(&identity).unwrap();
    for first in &image.firsts {
        layer.edit(&segment(*first), |bytes| bytes[0] ^= 1).unwrap();
    }
    assert!(matches!(open(&layer), Err(OpenError::Unidentified(_))));

    let layer = image.layer.copy();
    let set_version = |bytes: &mut Vec<u8>, sum_at: usize| {
        bytes[8] = 2;
        let sum = crc32c::crc32c(&bytes[..sum_at]);
        bytes[sum_at..sum_at + 4].copy_from_slice(&sum.to_le_bytes());
    };
    layer.edit(&segment(image.firsts[1]), |bytes| set_version(bytes, 44)).unwrap();
    assert!(matches!(open(&layer), Err(OpenError::Version { version: 2, .. })));

    let layer = image.layer.copy();
    layer.edit(&identity, |bytes| set_version(bytes, 32)).unwrap();
    assert!(matches!(open(&layer), Err(OpenError::Version { version: 2, .. })));
}

/// Rot in the last synced record, a torn one behind it, and one that proves the sync behind that.
fn rotten_and_torn() -> (SimLayer, Damage, Vec<(u64, Vec<u8>)>) {
    let layer = SimLayer::new();
    let options = Options { segment_bytes: 8192, ..OPTIONS };
    let (mut log, _) = SegmentLog::open(layer.clone(), DIRECTORY, options).unwrap();
    let mut appended = Vec::new();
    for number in 0..4u8 {
        appended.push(log.append(1, &[number; 700]).unwrap());
        if number < 2 {
            log.sync().unwrap();
        }
    }
    log.sync().unwrap();
    drop(log);
    for bad in [1, 2] {
        let offset = (SEGMENT_HEADER + appended[bad].position.0 + 100) as usize;
        layer.edit(&segment(0), |bytes| bytes[offset] ^= 4).unwrap();
    }
    let (from, to) = (appended[1].position, appended[2].position);
    (layer, Damage { from, to, reason: Reason::Record }, vec![(0, vec![0; 700])])
}

#[test]
fn recovery_interrupted_anywhere_ends_as_if_it_had_not_been() {
    let (image, incident, kept) = rotten_and_torn();
    let options = Options { segment_bytes: 8192, ..OPTIONS };
    for seed in 0..40 {
        let mut random = Random::new(seed);
        for changes in 0.. {
            let layer = image.copy();
            layer.fail_after(changes);
            let finished = SegmentLog::open(layer.clone(), DIRECTORY, options).is_ok();
            layer.power_cut(&mut random);
            let (log, opening) = SegmentLog::open(layer, DIRECTORY, options).unwrap();
            let what = format!("seed {seed}, power gone after {changes} changes");
            let ranges: Vec<_> = opening.incidents.iter().map(|damage| (damage.from, damage.to)).collect();
            assert_eq!(ranges, [(incident.from, incident.to)], "{what}");
            assert!(opening.end >= incident.to, "{what}");
            assert_eq!(read(&log, &[incident]), kept, "{what}");
            if finished {
                break;
            }
        }
    }
}

#[test]
fn bytes_from_before_a_cut_never_come_back_even_if_blanking_them_failed_at_first() {
    let (image, incident, mut kept) = rotten_and_torn();
    let options = Options { segment_bytes: 8192, ..OPTIONS };
    // A record that ends just where the last one from before the cut begins.
    let filler = vec![9; 700 - RECORD_HEADER as usize];
    kept.push((incident.to.0 + RECORD_HEADER, filler.clone()));
    for syncs in 0.. {
        let layer = image.copy();
        layer.fail_sync_after(syncs);
        if SegmentLog::open(layer.clone(), DIRECTORY, options).is_ok() {
            break;
        }
        let (mut log, _) = SegmentLog::open(layer.clone(), DIRECTORY, options).unwrap();
        log.append(1, &filler).unwrap();
        // Where blanking came first, the end is the same; else the test would not test anything.
        assert_eq!(log.end().0, incident.to.0 + 700 + RECORD_HEADER, "after {syncs} syncs");
        log.sync().unwrap();
        layer.power_cut(&mut Random::new(syncs));
        let (log, opening) = SegmentLog::open(layer, DIRECTORY, options).unwrap();
        assert_eq!(opening.torn_tail, None, "after {syncs} syncs");
        assert_eq!(read(&log, &[incident]), kept, "after {syncs} syncs");
    }
}

#[test]
fn a_blank_segment_file_left_by_a_failed_append_hides_nothing() {
    let image = image(3, true);
    image.layer.create(&segment(image.entries[1].position)).unwrap();
    let (log, opening) = SegmentLog::open(image.layer.clone(), DIRECTORY, OPTIONS).unwrap();
    assert_eq!((opening.end, opening.torn_tail), (Position(image.end()), None));
    assert_eq!(read(&log, &[]).len(), 3);
}

/// Written once by the first version, and never again: what it reads, later versions must read.
#[test]
fn the_golden_log_of_format_version_1_is_read() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1/log");
    let scratch = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), scratch.path().join(entry.file_name())).unwrap();
    }
    let (log, opening) = SegmentLog::open(Disk, scratch.path(), OPTIONS).unwrap();
    let expected = Opening { incidents: Vec::new(), torn_tail: None, start: Position(0), end: Position(GOLDEN_END) };
    assert_eq!((log.id().to_string().as_str(), opening), (GOLDEN_ID, expected));
    let mut reader = log.reader(Position(0)).unwrap();
    for number in 0..GOLDEN_RECORDS {
        let record = reader.next().unwrap().unwrap();
        let payload: Vec<u8> = (0..number * 7).map(|i| (number * 31 + i) as u8).collect();
        assert_eq!((record.kind, record.payload), (1 + number as u8, &payload[..]));
    }
    assert_eq!(reader.next().unwrap(), None);
}

const GOLDEN_RECORDS: u64 = 16;
const GOLDEN_END: u64 = 1265;
const GOLDEN_ID: &str = "342d020094b76b2ba5fb2bf4988ef2e2";
