//! The simulated disk is only worth something if it really loses what was not synced, in every way,
//! and never what was.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

use std::collections::BTreeSet;
use std::path::Path;

use segment_log::sim::{Random, SimLayer};
use segment_log::{FileLayer, LayerFile};

const FILE: &str = "/file";

fn content(layer: &SimLayer, path: &str) -> Option<Vec<u8>> {
    let file = layer.open(Path::new(path)).ok()?;
    let mut bytes = vec![0; file.size().unwrap() as usize];
    assert_eq!(file.read_at(&mut bytes, 0).unwrap(), bytes.len());
    Some(bytes)
}

/// A durable file of four sectors of ones.
fn layer() -> SimLayer {
    let layer = SimLayer::new();
    let file = layer.create(Path::new(FILE)).unwrap();
    file.write_all_at(&[1; 2048], 0).unwrap();
    file.sync_data().unwrap();
    layer.sync_dir(Path::new("/")).unwrap();
    layer
}

/// All that may be left of the disk after `work` and a power cut.
fn outcomes<T: Ord>(work: impl Fn(&SimLayer), look: impl Fn(&SimLayer) -> T) -> BTreeSet<T> {
    let outcome = |seed| {
        let layer = layer();
        work(&layer);
        layer.power_cut(&mut Random::new(seed));
        look(&layer)
    };
    (0..500).map(outcome).collect()
}

#[test]
fn synced_bytes_and_names_survive_and_unsynced_ones_may_each_be_lost() {
    let synced = outcomes(
        |layer| {
            let file = layer.open(Path::new(FILE)).unwrap();
            file.write_all_at(&[2; 1024], 512).unwrap();
            file.sync_data().unwrap();
        },
        |layer| content(layer, FILE).unwrap(),
    );
    assert_eq!(synced.len(), 1);
    assert_eq!(synced.first().unwrap()[512..1536], [2; 1024]);

    let unsynced = outcomes(
        |layer| layer.open(Path::new(FILE)).unwrap().write_all_at(&[2; 1024], 512).unwrap(),
        |layer| {
            let bytes = content(layer, FILE).unwrap();
            assert!(bytes[..512] == [1; 512] && bytes[1536..] == [1; 512], "neighbours are not touched");
            (bytes[512], bytes[1023], bytes[1024], bytes[1535])
        },
    );
    for whole in [(1, 1, 1, 1), (2, 2, 2, 2), (1, 1, 2, 2), (2, 2, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1)] {
        assert!(unsynced.contains(&whole), "{whole:?}, not in {unsynced:?}");
    }

    let names = outcomes(
        |layer| {
            layer.create(Path::new("/new")).unwrap();
            layer.remove(Path::new(FILE)).unwrap();
        },
        |layer| (content(layer, "/new").is_some(), content(layer, FILE).is_some()),
    );
    assert_eq!(names.len(), 4, "each change of a name happens or not: {names:?}");

    let renamed = outcomes(
        |layer| layer.rename(Path::new(FILE), Path::new("/new")).unwrap(),
        |layer| (content(layer, "/new").is_some(), content(layer, FILE).is_some()),
    );
    assert_eq!(renamed, BTreeSet::from([(true, false), (false, true)]), "a rename happens or not");
}

#[test]
fn bytes_of_a_failed_sync_stay_readable_look_clean_and_are_lost() {
    let left = outcomes(
        |layer| {
            let file = layer.open(Path::new(FILE)).unwrap();
            file.write_all_at(&[2; 512], 0).unwrap();
            layer.fail_sync_after(0);
            assert!(file.sync_data().is_err());
            assert_eq!(content(layer, FILE).unwrap()[..512], [2; 512]);
            file.sync_data().unwrap();
        },
        |layer| content(layer, FILE).unwrap()[..512].to_vec(),
    );
    assert_eq!(left, BTreeSet::from([vec![1; 512]]));
}

#[test]
fn nothing_answers_without_power_and_old_handles_stay_dead() {
    let layer = layer();
    let file = layer.open(Path::new(FILE)).unwrap();
    layer.fail_after(1);
    file.write_all_at(b"in time", 0).unwrap();
    assert!(file.write_all_at(b"too late", 0).is_err());
    assert!(!layer.powered() && layer.open(Path::new(FILE)).is_err() && file.sync_data().is_err());
    layer.power_cut(&mut Random::new(1));
    assert!(layer.powered() && file.size().is_err() && content(&layer, FILE).is_some());
}
