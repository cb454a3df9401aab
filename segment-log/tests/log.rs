//! The log's own contract, over the real disk and over the simulated one.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

use std::path::Path;
use std::sync::mpsc;

use segment_log::sim::{Random, SimLayer};
use segment_log::{
    AppendError, Damage, Disk, FileLayer, LayerFile, OpenError, Options, Position, ReadError, Reader, Reason,
    SegmentLog, SyncError,
};

const SMALL: Options = Options { segment_bytes: 4096, max_bytes: 64 << 10, reserve_bytes: 256 };

fn read_all<L: FileLayer>(reader: &mut Reader<L>) -> Vec<(Position, u8, Vec<u8>)> {
    let mut records = Vec::new();
    while let Some(record) = reader.next().unwrap() {
        records.push((record.position, record.kind, record.payload.to_vec()));
    }
    records
}

fn payload(number: u64) -> Vec<u8> {
    let length = (number * 37 % 300) as usize;
    (0..length).map(|i| (number as usize * 7 + i) as u8).collect()
}

fn fill_and_reopen<L: FileLayer>(layer: L, directory: &Path) {
    let mut expected = Vec::new();
    let (mut log, opening) = SegmentLog::open(layer.clone(), directory, SMALL).unwrap();
    assert_eq!((opening.start, opening.end), (Position(0), Position(0)));
    let mut follower = log.reader(Position(0)).unwrap();
    let mut followed = Vec::new();
    for number in 0..200u64 {
        let kind = 1 + (number % 255) as u8;
        let appended = log.append(kind, &payload(number)).unwrap();
        expected.push((appended.position, kind, payload(number)));
        if number % 7 == 0 {
            assert_eq!(log.sync().unwrap(), log.end());
            followed.extend(read_all(&mut follower));
            assert_eq!(followed, expected);
        }
    }
    log.mark().unwrap();
    let (id, end) = (log.id(), log.end());
    log.mark().unwrap();
    assert_eq!(log.end(), end, "a second mark writes nothing");
    assert!(matches!(SegmentLog::open(layer.clone(), directory, SMALL), Err(OpenError::Locked(_))));
    drop(log);

    let (log, opening) = SegmentLog::open(layer.clone(), directory, SMALL).unwrap();
    assert_eq!((log.id(), log.end(), opening.torn_tail), (id, end, None));
    assert_eq!(opening.incidents, []);
    assert_eq!(read_all(&mut log.reader(Position(0)).unwrap()), expected);
    let (at, ..) = expected[100];
    assert_eq!(read_all(&mut log.reader(at).unwrap()), expected[100..]);
}

#[test]
fn what_was_appended_is_read_back_in_order_from_the_real_disk() {
    let directory = tempfile::tempdir().unwrap();
    fill_and_reopen(Disk, &directory.path().join("made/with/parents"));
}

#[test]
fn what_was_appended_is_read_back_in_order_from_the_simulated_disk() {
    fill_and_reopen(SimLayer::new(), Path::new("/var/lib/log"));
}

fn open(layer: &SimLayer) -> SegmentLog<SimLayer> {
    SegmentLog::open(layer.clone(), "/log", SMALL).unwrap().0
}

/// Appends until the log is full; the positions behind the records.
fn fill(log: &mut SegmentLog<SimLayer>, payload: &[u8]) -> Vec<Position> {
    let mut ends = Vec::new();
    loop {
        match log.append(1, payload) {
            Ok(appended) => ends.push(appended.next),
            Err(AppendError::Full) => break ends,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_log_at_its_cap_is_full_and_goes_on_when_something_was_freed() {
    let layer = SimLayer::new();
    let mut log = open(&layer);
    let ends = fill(&mut log, &[5; 100]);
    assert_eq!(log.bytes_on_disk(), SMALL.max_bytes);
    assert!(matches!(log.append(1, &[5; 100]), Err(AppendError::Full)), "still full");
    log.sync().unwrap();
    let freed = log.free_before(ends[40]).unwrap();
    assert_eq!((freed, log.bytes_on_disk()), (SMALL.segment_bytes, SMALL.max_bytes - freed));
    assert!(log.start() > Position(0) && log.start() <= ends[40]);
    let appended = log.append(2, b"on it goes").unwrap();
    assert_eq!((appended.position, appended.new_segment), (*ends.last().unwrap(), true));
    log.sync().unwrap();
    let start = log.start();
    assert_eq!(read_all(&mut log.reader(start).unwrap()).last().unwrap().2, b"on it goes");
}

#[test]
fn a_full_disk_is_like_the_cap_and_control_records_still_fit() {
    let layer = SimLayer::new();
    let mut log = open(&layer);
    layer.set_capacity(8192 + 3 * SMALL.segment_bytes);
    let ordinary = fill(&mut log, &[5; 100]).len();
    assert_eq!(log.bytes_on_disk(), 3 * SMALL.segment_bytes);
    let mut control = 0;
    while log.append_control(2, &[6; 39]).is_ok() {
        control += 1;
    }
    assert!(control >= SMALL.reserve_bytes / 64, "{control} control records in the reserve");
    log.mark().unwrap();
    drop(log);
    layer.power_cut(&mut Random::new(1));
    let mut log = open(&layer);
    assert_eq!(read_all(&mut log.reader(Position(0)).unwrap()).len(), ordinary + control as usize);
    assert!(matches!(log.append(1, &[5; 100]), Err(AppendError::Full)));
    layer.set_capacity(u64::MAX);
    assert!(log.append(1, &[5; 100]).unwrap().new_segment);
}

#[test]
fn a_spare_is_opened_on_a_full_disk_and_what_is_freed_is_the_next_one() {
    let layer = SimLayer::new();
    let mut log = open(&layer);
    assert!(!log.start_segment_in_spare().unwrap(), "nobody asked for one");
    log.keep_spare().unwrap();
    // Another name for the same file, as a power cut may leave it, is let go.
    drop(log);
    layer.set_capacity(8192 + 2 * SMALL.segment_bytes);
    let mut log = open(&layer);
    log.keep_spare().unwrap();
    fill(&mut log, &[5; 100]);
    assert_eq!(log.bytes_on_disk(), SMALL.segment_bytes);
    for round in 0..4 {
        assert!(matches!(log.start_segment(), Err(AppendError::Full)), "{round}");
        assert!(log.start_segment_in_spare().unwrap(), "{round}");
        assert!(!log.start_segment_in_spare().unwrap(), "{round}: there is only one");
        let first = log.append(1, &[round; 100]).unwrap();
        assert!(first.new_segment, "{round}");
        fill(&mut log, &[7; 100]);
        log.sync().unwrap();
        log.free_before(first.position).unwrap();
        layer.power_cut(&mut Random::new(u64::from(round)));
        log = open(&layer);
        let read = read_all(&mut log.reader(log.start()).unwrap());
        assert_eq!((log.start(), &read[0].2[..]), (first.position, &[round; 100][..]), "{round}: nothing of before");
        log.keep_spare().unwrap();
    }
    log.give_spare_back().unwrap();
    assert!(!log.start_segment_in_spare().unwrap());
    log.start_segment().unwrap();
}

#[test]
fn control_records_leave_the_reserve_alone_while_there_is_other_room() {
    let layer = SimLayer::new();
    let mut log = open(&layer);
    while log.newest_segment() == Position(0) {
        log.append_control(2, &[6; 39]).unwrap();
    }
    assert!(log.newest_segment().0 + SMALL.reserve_bytes + 64 <= SMALL.segment_bytes);
}

#[test]
fn a_failed_sync_is_final_for_the_log() {
    let layer = SimLayer::new();
    let mut log = open(&layer);
    log.append(1, b"kept").unwrap();
    let synced = log.sync().unwrap();
    log.append(1, b"perhaps").unwrap();
    layer.fail_sync_after(0);
    assert!(matches!(log.sync(), Err(SyncError::Io { .. })));
    assert!(matches!(log.sync(), Err(SyncError::Poisoned)), "never tried again");
    assert!(matches!(log.mark(), Err(SyncError::Poisoned)));
    assert!(matches!(log.append(1, b"no"), Err(AppendError::Failed(SyncError::Poisoned))));
    assert!(matches!(log.start_segment(), Err(AppendError::Failed(SyncError::Poisoned))));
    assert!(log.free_before(synced).is_err());
    assert_eq!(log.synced(), synced);
    assert_eq!(read_all(&mut log.reader(Position(0)).unwrap()).len(), 1, "readers see what was synced");
}

#[test]
fn a_record_must_fit_a_segment_and_must_not_be_a_marker() {
    let mut log = open(&SimLayer::new());
    let max = SMALL.payload_bytes_max();
    assert!(matches!(log.append(1, &vec![0; max + 1]), Err(AppendError::TooLarge { .. })));
    assert!(matches!(log.append(0, b"marker"), Err(AppendError::ReservedKind)));
    assert_eq!(log.end(), Position(0));
    log.append(1, &vec![0; max]).unwrap();
    assert!(log.append(1, &vec![0; max]).unwrap().new_segment);
    for (segment_bytes, max_bytes, reserve_bytes) in [(100, 1000, 10), (4096, 4096, 0), (4096, 65536, 4000)] {
        let options = Options { segment_bytes, max_bytes, reserve_bytes };
        assert!(matches!(SegmentLog::open(SimLayer::new(), "/log", options), Err(OpenError::Options(_))));
    }
}

#[test]
fn an_owner_can_begin_each_segment_with_its_own_records() {
    let layer = SimLayer::new();
    let mut log = open(&layer);
    let (mut known_in, mut starts) = (None, 0);
    for number in 0..100u64 {
        let batch = vec![3; 200 + (number % 90) as usize];
        if log.starts_segment(batch.len()) {
            log.start_segment().unwrap();
        }
        if known_in != Some(log.newest_segment()) {
            assert_eq!(log.append(1, b"schema").unwrap().position, log.newest_segment());
            known_in = Some(log.newest_segment());
            starts += 1;
        }
        assert!(!log.append(2, &batch).unwrap().new_segment);
    }
    log.start_segment().unwrap();
    let newest = log.newest_segment();
    log.start_segment().unwrap();
    assert_eq!(log.newest_segment(), newest, "an empty segment is not left for another");
    log.sync().unwrap();
    let schemas = read_all(&mut log.reader(Position(0)).unwrap()).iter().filter(|record| record.1 == 1).count();
    assert!(schemas == starts && starts > 5);
}

#[test]
fn a_reader_sees_only_what_is_synced_and_goes_on_when_asked_again() {
    let mut log = open(&SimLayer::new());
    let mut reader = log.reader(Position(0)).unwrap();
    log.append(1, b"one").unwrap();
    assert_eq!(reader.next().unwrap(), None);
    log.sync().unwrap();
    assert_eq!(reader.next().unwrap().unwrap().payload, b"one");
    assert_eq!(reader.next().unwrap(), None);
    log.mark().unwrap();
    assert_eq!(reader.next().unwrap(), None, "a marker is no record");
    log.append(1, b"two").unwrap();
    log.start_segment().unwrap();
    log.append(1, b"three").unwrap();
    log.sync().unwrap();
    assert_eq!(reader.next().unwrap().unwrap().payload, b"two");
    assert_eq!(reader.next().unwrap().unwrap().payload, b"three");
    assert_eq!(reader.next().unwrap(), None);
    assert_eq!(reader.position(), log.synced());
    let beyond = Position(log.end().0 + 1);
    assert!(matches!(log.reader(beyond), Err(ReadError::BeyondEnd { at, .. }) if at == beyond));
}

#[test]
fn reading_what_was_freed_is_an_error_of_its_own_and_nothing_unsynced_is_freed() {
    let mut log = open(&SimLayer::new());
    let mut reader = log.reader(Position(0)).unwrap();
    for _ in 0..100 {
        log.append(1, &[4; 100]).unwrap();
    }
    assert_eq!(log.free_before(log.end()).unwrap(), 0, "nothing is synced yet");
    log.sync().unwrap();
    assert!(reader.next().unwrap().is_some());
    let freed = log.free_before(log.end()).unwrap();
    assert!(freed > 0 && freed.is_multiple_of(SMALL.segment_bytes));
    assert_eq!(log.start(), log.newest_segment(), "the newest segment stays");
    let start = log.start();
    assert!(matches!(reader.next(), Err(ReadError::Freed { start: told, .. }) if told == start));
    assert!(matches!(log.reader(Position(0)), Err(ReadError::Freed { .. })));
    assert!(!read_all(&mut log.reader(start).unwrap()).is_empty());
}

#[test]
fn positions_go_on_after_everything_was_freed() {
    let layer = SimLayer::new();
    let mut log = open(&layer);
    log.append(1, b"gone").unwrap();
    log.start_segment().unwrap();
    log.sync().unwrap();
    log.free_before(log.end()).unwrap();
    let end = log.end();
    drop(log);
    layer.power_cut(&mut Random::new(3));
    let (mut log, opening) = SegmentLog::open(layer, "/log", SMALL).unwrap();
    assert_eq!((opening.start, opening.end, opening.incidents), (end, end, vec![]));
    assert_eq!(log.append(1, b"next").unwrap().position, end);
}

/// The last record rots after everything was synced; what opening makes of it.
fn rot_in_the_last_record(mark: bool) -> (Vec<Damage>, Option<Damage>, Damage) {
    let layer = SimLayer::new();
    let mut log = open(&layer);
    log.append(1, b"first").unwrap();
    log.sync().unwrap();
    let last = log.append(1, b"last").unwrap();
    log.sync().unwrap();
    if mark {
        log.mark().unwrap();
    }
    drop(log);
    let path = Path::new("/log/00000000000000000000.seg");
    layer.edit(path, |bytes| bytes[48 + last.next.0 as usize - 1] ^= 1).unwrap();
    let (_, opening) = SegmentLog::open(layer, "/log", SMALL).unwrap();
    let damage = Damage { from: last.position, to: last.next, reason: Reason::Record };
    (opening.incidents, opening.torn_tail, damage)
}

#[test]
fn a_marker_tells_rot_in_the_last_record_from_a_torn_tail() {
    let (incidents, torn_tail, damage) = rot_in_the_last_record(true);
    assert_eq!((incidents, torn_tail), (vec![damage], None));
    let (incidents, torn_tail, damage) = rot_in_the_last_record(false);
    assert_eq!((incidents, torn_tail), (vec![], Some(damage)));
}

#[test]
fn one_sync_is_one_write_and_is_counted() {
    let layer = SimLayer::new();
    let mut log = open(&layer);
    let changes = layer.changes();
    for _ in 0..30 {
        log.append(1, &[1; 75]).unwrap();
    }
    assert_eq!(layer.changes(), changes, "appending touches no file");
    log.sync().unwrap();
    assert_eq!(layer.changes(), changes + 2, "one write, one sync");
    log.sync().unwrap();
    assert_eq!(layer.changes(), changes + 2, "nothing new, nothing to do");
    let counters = log.counters();
    assert_eq!((counters.syncs, counters.bytes_written, counters.records_appended), (1, 3000, 30));
}

#[test]
fn large_unsynced_amounts_are_written_early_and_read_back() {
    let directory = tempfile::tempdir().unwrap();
    let options = Options { segment_bytes: 8 << 20, max_bytes: 64 << 20, reserve_bytes: 0 };
    let (mut log, _) = SegmentLog::open(Disk, directory.path(), options).unwrap();
    for number in 0..40u8 {
        log.append(1, &vec![number; 600_000]).unwrap();
    }
    assert!(log.counters().bytes_written > 15 << 20, "before any sync");
    log.sync().unwrap();
    let mut reader = log.reader(Position(0)).unwrap();
    for number in 0..40u8 {
        assert_eq!(reader.next().unwrap().unwrap().payload, vec![number; 600_000]);
    }
    assert_eq!(reader.next().unwrap(), None);
}

#[test]
fn a_reader_in_another_thread_follows_across_segments_while_the_log_frees_behind_it() {
    let directory = tempfile::tempdir().unwrap();
    let (mut log, _) = SegmentLog::open(Disk, directory.path(), SMALL).unwrap();
    let mut reader = log.reader(Position(0)).unwrap();
    let (synced, wake) = mpsc::channel::<()>();
    let (done, progress) = mpsc::channel::<Position>();
    let follower = std::thread::spawn(move || {
        let mut count = 0u64;
        while wake.recv().is_ok() {
            while let Some(record) = reader.next().unwrap() {
                assert_eq!(record.payload, payload(count));
                count += 1;
            }
            done.send(reader.position()).unwrap();
        }
        count
    });
    for number in 0..3000u64 {
        while matches!(log.append(1, &payload(number)), Err(AppendError::Full)) {
            log.sync().unwrap();
            synced.send(()).unwrap();
            log.free_before(progress.recv().unwrap()).unwrap();
        }
        if number % 50 == 0 {
            log.sync().unwrap();
            synced.send(()).unwrap();
            log.free_before(progress.recv().unwrap()).unwrap();
        }
    }
    log.sync().unwrap();
    synced.send(()).unwrap();
    drop(synced);
    assert_eq!(follower.join().unwrap(), 3000);
    assert!(log.start() > Position(0));
}

#[test]
fn each_log_has_its_own_id() {
    assert_ne!(open(&SimLayer::new()).id(), open(&SimLayer::new()).id());
}

#[test]
fn segments_are_preallocated() {
    let layer = SimLayer::new();
    let _log = open(&layer);
    let size = layer.open(Path::new("/log/00000000000000000000.seg")).unwrap().size().unwrap();
    assert_eq!(size, SMALL.segment_bytes);
}

/// The disk lost the tail, and the owner knows that it was there.
#[test]
fn a_log_that_skips_never_gives_a_position_twice() {
    let layer = SimLayer::new();
    let mut log = open(&layer);
    log.append(1, b"kept").unwrap();
    log.sync().unwrap();
    let end = log.end();
    assert_eq!(log.skip_to(end).unwrap(), None, "it ends there");
    for (skips, bytes) in [(1, 1), (2, 100), (3, 10_000)] {
        let end = log.end();
        let target = Position(end.0 + bytes);
        let missing = log.skip_to(target).unwrap().unwrap();
        assert_eq!((missing.from, missing.to), (end, target));
        let appended = log.append(2, b"new").unwrap();
        assert!(appended.position >= target, "{appended:?}");
        log.sync().unwrap();
        drop(log);
        let (again, opening) = SegmentLog::open(layer.clone(), "/log", SMALL).unwrap();
        log = again;
        assert_eq!(opening.torn_tail, None);
        let last = opening.incidents.last().unwrap();
        assert_eq!((last.from, last.to), (end, target), "the next opening tells, too");
        let mut reader = log.reader(Position(0)).unwrap();
        let (mut records, mut damaged) = (Vec::new(), 0);
        loop {
            match reader.next() {
                Ok(Some(record)) => records.push(record.payload.to_vec()),
                Ok(None) => break,
                Err(ReadError::Damaged { .. }) => damaged += 1,
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!((damaged, opening.incidents.len(), records.len()), (skips, skips, 1 + skips));
        assert_eq!(
            (records.first().unwrap().as_slice(), records.last().unwrap().as_slice()),
            (&b"kept"[..], &b"new"[..])
        );
    }
}
