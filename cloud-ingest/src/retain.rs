//! Retention: files whose rows are all older than a stream is kept, or that are too many, leave the table.
//!
//! Whole files only: nothing is written again, so a row may stay as long as the newest one in its file, at most the rest
//! of its day. Age is event time. Of too many bytes the oldest files go first. It is an entry of the log like every
//! other, which checks that each file is still part of the table; the transactions stay, so a batch whose rows have
//! left the table is known for ever. The files stay on disk for their grace: until vacuum, an older version has them.

use std::sync::Arc;

use wire::{DataFile, DataFiles};

use crate::config::{Keep, KeepSettings};
use crate::delta::{CommitError, DeltaTable, Purpose};
use crate::failpoint;

/// How often files are chosen again because the table has moved on.
const TRIES_MAX: usize = 5;

/// The files that have to go.
pub fn expired(files: &DataFiles, kept: &KeepSettings, now_us: i64) -> Vec<Arc<DataFile>> {
    let past = match kept.keep {
        Keep::Forever => i64::MIN,
        Keep::For(span) => now_us.saturating_sub(span.micros()),
    };
    let mut gone: Vec<Arc<DataFile>> = files.iter().filter(|file| file.latest_us() < past).cloned().collect();
    let mut bytes = files.bytes() - gone.iter().map(|file| file.bytes).sum::<u64>();
    let most = kept.max_bytes.map_or(u64::MAX, |size| size.0);
    if bytes > most {
        let mut oldest: Vec<&Arc<DataFile>> = files.iter().filter(|file| file.latest_us() >= past).collect();
        oldest.sort_by_key(|file| (file.latest_us(), &file.path));
        for file in oldest {
            if bytes <= most {
                break;
            }
            bytes -= file.bytes;
            gone.push(Arc::clone(file));
        }
    }
    gone
}

/// Takes from a table what has to go; the files that went.
///
/// # Errors
/// When the commit is not made; the next time finds the same files.
pub async fn retain(
    table: &mut DeltaTable,
    kept: &KeepSettings,
    now_us: i64,
) -> Result<Vec<Arc<DataFile>>, CommitError> {
    for _ in 0..TRIES_MAX {
        let gone = expired(&table.snapshot().files, kept, now_us);
        if gone.is_empty() {
            return Ok(gone);
        }
        failpoint::reach("retain.planned");
        match table.replace(Purpose::Retain, &gone, Vec::new()).await {
            Ok(_) => return Ok(gone),
            // Compaction has put others into their place.
            Err(CommitError::Gone { .. }) => drop(table.reload().await?),
            Err(error) => return Err(error),
        }
    }
    Err(CommitError::Gone { stream: table.stream().clone() })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use wire::DAY_US;

    use super::*;
    use crate::config::{Size, Span};

    fn file(path: &str, date: i32, last: Option<i64>, bytes: u64) -> Arc<DataFile> {
        let ts = last.map(|last| (i64::from(date) * DAY_US, last));
        let (path, device) = (path.to_owned(), None);
        Arc::new(DataFile { path, date, bytes, rows: None, modified_ms: 0, ts, device, device_nulls: None, crc: None })
    }

    #[test]
    fn a_file_goes_when_all_its_rows_are_past_and_the_oldest_go_when_there_is_no_room() {
        let files = [
            file("old", 1, None, 10),
            file("edge", 2, Some(3 * DAY_US - 1), 10),
            file("young", 2, Some(3 * DAY_US), 10),
            file("new", 9, None, 10),
        ];
        let files = DataFiles::default().with(files, &[]);
        let check = |keep: Keep, most: Option<u64>, expected: &[&str]| {
            let kept = KeepSettings { keep, max_bytes: most.map(Size) };
            let gone = expired(&files, &kept, 10 * DAY_US);
            assert_eq!(gone.iter().map(|file| file.path.as_str()).collect::<Vec<_>>(), expected, "{kept:?}");
        };
        let days = |days: u64| Keep::For(Span(Duration::from_secs(86_400 * days)));
        check(Keep::Forever, None, &[]);
        check(days(7), None, &["old", "edge"]);
        check(days(8), None, &["old"]);
        check(days(99_999_999), None, &[]);
        check(Keep::Forever, Some(39), &["old"]);
        check(Keep::Forever, Some(10), &["old", "edge", "young"]);
        check(days(8), Some(20), &["old", "edge"]);
        check(days(1), Some(0), &["old", "edge", "young", "new"]);
    }
}
