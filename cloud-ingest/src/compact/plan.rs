//! Which small files of a date are merged next. Pure.
//!
//! Files are taken smallest first, as long as the next is not much larger than all before it together, so that a byte is
//! written again only when it comes into a file at least half as large again: a day of 1,440 small commits is written
//! about five times, and a late row does not rewrite its day. While a date is still filled, [`Rules::min_files`] have to
//! come together; when it is over and quiet, two will do.

use std::collections::HashSet;
use std::sync::Arc;

use wire::{DAY_US, DataFile, DataFiles};

/// A file is taken if it is at most so many times as large as those before it together.
const GROWTH: u64 = 2;
/// A date is over so long after its end, when nothing has come for it for so long either.
const OVER_AFTER_US: i64 = DAY_US;
const QUIET_MS: i64 = 3_600_000;
/// Most files of one merge.
pub(crate) const INPUTS_MAX: usize = 128;

/// How files are chosen; see `CompactSettings`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    pub(crate) file_bytes: u64,
    pub(crate) small_bytes: u64,
    pub(crate) min_files: usize,
}

/// The merge of a table that gets rid of most files. `left_out` are paths.
pub(crate) fn next_merge(
    files: &DataFiles,
    rules: Rules,
    left_out: &HashSet<String>,
    now_us: i64,
) -> Option<Vec<Arc<DataFile>>> {
    let merges = files.dates().filter_map(|(date, files)| {
        let past = (i64::from(date) + 1) * DAY_US + OVER_AFTER_US < now_us;
        // A backlog fills old dates, too.
        let quiet = files.iter().all(|file| file.modified_ms + QUIET_MS < now_us / 1_000);
        merge_of(files, past && quiet, rules, left_out)
    });
    merges.max_by_key(Vec::len)
}

fn merge_of(
    files: &[Arc<DataFile>],
    over: bool,
    rules: Rules,
    left_out: &HashSet<String>,
) -> Option<Vec<Arc<DataFile>>> {
    let mut small: Vec<&Arc<DataFile>> =
        files.iter().filter(|file| file.bytes < rules.small_bytes && !left_out.contains(&file.path)).collect();
    small.sort_by_key(|file| file.bytes);
    let (mut chosen, mut bytes, mut full) = (Vec::new(), 0, false);
    for file in small {
        if chosen.len() == INPUTS_MAX || (!chosen.is_empty() && bytes + file.bytes > rules.file_bytes) {
            full = true;
            break;
        }
        if !chosen.is_empty() && file.bytes > GROWTH * bytes {
            break;
        }
        bytes += file.bytes;
        chosen.push(Arc::clone(file));
    }
    let enough = if over || full { 2 } else { rules.min_files };
    (chosen.len() >= enough.max(2)).then_some(chosen)
}

/// Small files of a table: those that a merge would like to have.
pub fn small_files(files: &DataFiles, small_bytes: u64) -> usize {
    files
        .dates()
        .map(|(_, files)| files.iter().filter(|file| file.bytes < small_bytes).count())
        .filter(|n| *n > 1)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { file_bytes: 1_000, small_bytes: 500, min_files: 4 };

    fn files(date: i32, sizes: &[u64]) -> Vec<Arc<DataFile>> {
        let file = |(index, bytes): (usize, &u64)| {
            let path = format!("{date}-{index}");
            let (rows, modified_ms) = (Some(*bytes), 0);
            Arc::new(DataFile {
                path,
                date,
                bytes: *bytes,
                rows,
                modified_ms,
                ts: None,
                device: None,
                device_nulls: None,
                crc: None,
            })
        };
        sizes.iter().enumerate().map(file).collect()
    }

    fn check(sizes: &[u64], over: bool, expected: &[u64]) {
        let chosen = merge_of(&files(1, sizes), over, RULES, &HashSet::new()).unwrap_or_default();
        assert_eq!(chosen.iter().map(|file| file.bytes).collect::<Vec<_>>(), expected, "{sizes:?} {over}");
    }

    #[test]
    fn small_files_are_merged_when_enough_of_a_size_are_there() {
        check(&[10, 10, 10], false, &[]);
        check(&[10, 10, 10, 10], false, &[10, 10, 10, 10]);
        check(&[10, 10, 10], true, &[10, 10, 10]);
        check(&[10], true, &[]);
        // A large one is not written again for a few small ones.
        check(&[400, 10, 10], true, &[10, 10]);
        check(&[400, 10, 10, 10, 10], false, &[10, 10, 10, 10]);
        check(&[10, 15, 40, 100, 300], true, &[10, 15, 40, 100, 300]);
        check(&[10, 400], true, &[]);
        // Those that are large enough stay as they are.
        check(&[500, 600, 10], true, &[]);
        // A full file is written even when few make it.
        check(&[400, 400, 400], false, &[400, 400]);
    }

    #[test]
    fn a_day_of_small_commits_is_written_few_times() {
        let (mut written, mut added, mut here) = (0, 0, Vec::<u64>::new());
        for _ in 0..1_440 {
            here.push(10);
            added += 10;
            let rules = Rules { file_bytes: 1 << 20, small_bytes: 1 << 19, min_files: 8 };
            while let Some(merge) = merge_of(&files(1, &here), false, rules, &HashSet::new()) {
                for file in &merge {
                    let at = here.iter().position(|bytes| *bytes == file.bytes).unwrap();
                    here.swap_remove(at);
                }
                let merged = merge.iter().map(|file| file.bytes).sum();
                here.push(merged);
                written += merged;
            }
            assert!(here.len() < 40, "{here:?}");
        }
        assert!(written < 6 * added, "{added} bytes were written again as {written}");
    }

    #[test]
    fn the_date_with_most_to_win_comes_first_and_files_that_cannot_be_read_are_left_out() {
        let all = DataFiles::default().with([files(1, &[10, 10]), files(2, &[10; 5])].concat(), &[]);
        let now = 10 * DAY_US;
        let merge = next_merge(&all, RULES, &HashSet::new(), now).unwrap();
        assert_eq!((merge.len(), merge[0].date), (5, 2));
        let bad = (0..4).map(|index| format!("2-{index}")).collect();
        assert_eq!(next_merge(&all, RULES, &bad, now).unwrap()[0].date, 1);
        // A backlog comes for the first day.
        let late =
            |at_ms| DataFile { path: "1-2".to_owned(), modified_ms: at_ms, ..files(1, &[10])[0].as_ref().clone() };
        let filled = all.with([Arc::new(late(now / 1_000))], &[]);
        assert_eq!(next_merge(&filled, RULES, &bad, now), None);
        let quiet = all.with([Arc::new(late(now / 1_000 - QUIET_MS - 1))], &[]);
        assert_eq!(next_merge(&quiet, RULES, &bad, now).map(|merge| merge.len()), Some(3));
        // Days that are still filled wait for more.
        assert_eq!(next_merge(&all, RULES, &bad, 2 * DAY_US), None);
        assert_eq!(small_files(&all, 11), 7);
    }
}
