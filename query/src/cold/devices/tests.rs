use arrow_array::{ArrayRef, DictionaryArray};

use super::*;

fn batch(devices: &[Option<&str>]) -> Result<RecordBatch, ArrowError> {
    let indices: DictionaryArray<Int32Type> = devices.iter().copied().collect();
    RecordBatch::try_from_iter([("device", Arc::new(indices) as ArrayRef)])
}

fn devices(batches: &[&[Option<&str>]]) -> Option<Devices> {
    let rows = batches.iter().map(|batch| batch.len()).sum();
    Devices::of(batches.iter().map(|devices| batch(devices)), rows).unwrap()
}

fn texts(devices: &Devices, rows: &[Range<usize>]) -> Vec<(String, usize)> {
    devices.texts(rows).into_iter().map(|(device, rows)| (device.to_string(), rows)).collect()
}

#[test]
fn runs_go_on_in_the_next_batch_and_rows_of_no_device_are_of_none() {
    let (a, b, c) = ([Some("a"); 6], [Some("b"); 6], [Some("c"); 6]);
    let found = devices(&[&[None; 6], &a, &[a, b].concat(), &c]).unwrap();
    assert!(found.sorted);
    let named = |names: &[&str]| found.rows_of(&names.iter().map(ToString::to_string).collect::<Vec<_>>());
    assert_eq!(named(&["c", "a", "x", "c"]), [6..18, 24..30]);
    assert!(named(&["x"]).is_empty());
    let pieces = [7..9, 16..18, 18..20, 29..30];
    let expected = [("a", 2), ("a", 2), ("b", 2), ("c", 1)].map(|(device, rows)| (device.to_owned(), rows));
    assert_eq!(texts(&found, &pieces), expected);
    let across = [10..26, 28..29];
    let expected = [("a", 8), ("b", 6), ("c", 2), ("c", 1)].map(|(device, rows)| (device.to_owned(), rows));
    assert_eq!(texts(&found, &across), expected);
}

#[test]
fn rows_that_are_not_sorted_are_told_where_runs_are_long() {
    let (a, b) = ([Some("a"); 6], [Some("b"); 6]);
    let found = devices(&[&[b, a, b].concat(), &[None; 6], &b]).unwrap();
    assert!(!found.sorted);
    assert_eq!(found.rows_of(&["b".to_owned()]), [0..6, 12..18, 24..30]);
    assert!(devices(&[&[Some("a"), Some("b"), Some("a"), Some("b"), Some("a"), Some("b")]]).is_none());
}
