//! The log's own contract, over the real disk and over the simulated one.

use segment_log::sim::SimLayer;
use segment_log::{AppendError, Disk, FileLayer, OpenError, Options, Position, ReadError, Reader, SegmentLog};
use std::path::Path;

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
