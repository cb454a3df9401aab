//! A crash in the middle of a write, behind each byte of what truly came next (vector #18336).

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

use super::*;

fn copy(from: &Path, to: &Path) {
    std::fs::remove_dir_all(to).ok();
    assert!(Command::new("cp").args(["-a", "--sparse=always"]).args([from, to]).status().unwrap().success());
}

fn newest(log: &Path) -> PathBuf {
    let files = std::fs::read_dir(log).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|end| end == "seg")).max().unwrap()
}

#[test]
fn whatever_part_of_the_next_records_is_on_disk_the_start_goes_on_behind_the_one_before() {
    let directory = tempfile::tempdir().unwrap();
    let [work, before, after] = ["work", "before", "after"].map(|name| directory.path().join(name));
    std::fs::create_dir(&work).unwrap();
    let settings = settings(&work, "[journal]\nmax_bytes = \"4MiB\"\nsegment_bytes = \"64KiB\"\n");
    let add = |driven: &mut Driven, value: i64| {
        assert!(driven.message(&format!("{{\"v\":{value}}}")));
        driven.settle();
    };
    for (value, kept) in [(1, &before), (2, &after)] {
        let mut driven = start(&settings);
        add(&mut driven, value);
        driven.stop();
        copy(&work, kept);
    }
    let spool = std::fs::read_to_string(work.join("spool/id")).unwrap();
    let lane = Path::new("spool").join(spool.trim()).join("rest");
    // While the journal is written the spool has nothing of it; the lane is written when the journal has all.
    for (log, around, least) in [(Path::new("journal"), &before, 1), (&lane, &after, 2)] {
        let [old, new] = [&before, &after].map(|kept| std::fs::read(newest(&kept.join(log))).unwrap());
        let differs = |at: &usize| old.get(*at).copied().unwrap_or(0) != new[*at];
        let (first, last) = ((0..new.len()).find(differs).unwrap(), (0..new.len()).rfind(differs).unwrap());
        let mut found = BTreeSet::new();
        for cut in first..=last {
            copy(around, &work);
            let mut torn = new.clone();
            torn[cut..].fill(0);
            std::fs::write(newest(&work.join(log)), torn).unwrap();
            let mut driven = start(&settings);
            driven.settle();
            let there = driven.status();
            assert_eq!(there.incidents, [""; 0], "{log:?} at {cut} of {first} to {last}");
            assert!((least..=2).contains(&there.rows.spooled), "{log:?} at {cut}: {:?}", there.rows);
            found.insert(there.rows.spooled);
            if cut % 8 == 0 {
                add(&mut driven, 3);
                assert_eq!(driven.status().rows.spooled, there.rows.spooled + 1, "{log:?} at {cut}");
            }
            driven.stop();
        }
        println!("{log:?}: {} cuts", last - first + 1);
        assert!(found.iter().copied().eq(least..=2), "{log:?}: {found:?}");
    }
}
