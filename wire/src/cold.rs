//! What the cold half of a table is made of: its data files at one version, by date.
//!
//! A [`DataFiles`] is immutable and cheap to clone; a commit makes the next one by copying only the dates it touches, so
//! that its cost does not grow with the table's history. Paths are as they stand in the table's log: relative to the
//! table, percent-encoded. Bounds hold for every row of a file and may be wider than its rows.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use crate::DAY_US;

/// One Parquet file of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFile {
    /// As in the log.
    pub path: String,
    /// Its partition, in days since 1970.
    pub date: i32,
    pub bytes: u64,
    /// None when its writer did not say.
    pub rows: Option<u64>,
    /// When it was written, ms since 1970.
    pub modified_ms: i64,
    /// First and last event time, µs since 1970.
    pub ts: Option<(i64, i64)>,
    /// First and last device; none, too, when all are null or a name is very long.
    pub device: Option<(String, String)>,
    /// Rows without a device, if that is known.
    pub device_nulls: Option<u64>,
    /// CRC32C of all of its bytes; none when its writer did not say.
    pub crc: Option<u32>,
}

impl DataFile {
    /// No row is later, µs since 1970.
    pub fn latest_us(&self) -> i64 {
        self.ts.map_or_else(|| (i64::from(self.date) + 1) * DAY_US - 1, |(_, last)| last)
    }

    /// No row is earlier, µs since 1970.
    pub fn earliest_us(&self) -> i64 {
        self.ts.map_or_else(|| i64::from(self.date) * DAY_US, |(first, _)| first)
    }
}

/// The files of a table at one version.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DataFiles {
    by_date: Arc<BTreeMap<i32, Arc<Vec<Arc<DataFile>>>>>,
    count: usize,
    bytes: u64,
    rows: u64,
}

impl DataFiles {
    /// These files without `removed`, by path, and with `added`.
    #[must_use]
    pub fn with(&self, added: impl IntoIterator<Item = Arc<DataFile>>, removed: &[Arc<DataFile>]) -> Self {
        let mut next = self.clone();
        let dates = Arc::make_mut(&mut next.by_date);
        let mut gone: BTreeMap<i32, HashSet<&str>> = BTreeMap::new();
        for file in removed {
            gone.entry(file.date).or_default().insert(&file.path);
        }
        for (date, paths) in gone {
            let Some(files) = dates.get_mut(&date) else { continue };
            Arc::make_mut(files).retain(|file| {
                let stays = !paths.contains(file.path.as_str());
                if !stays {
                    next.count -= 1;
                    next.bytes -= file.bytes;
                    next.rows -= file.rows.unwrap_or(0);
                }
                stays
            });
            if files.is_empty() {
                dates.remove(&date);
            }
        }
        for file in added {
            next.count += 1;
            next.bytes += file.bytes;
            next.rows += file.rows.unwrap_or(0);
            Arc::make_mut(dates.entry(file.date).or_default()).push(file);
        }
        next
    }

    /// All files, in order of date.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<DataFile>> {
        self.by_date.values().flat_map(|files| files.iter())
    }

    /// The dates that have files, with these, in order.
    pub fn dates(&self) -> impl DoubleEndedIterator<Item = (i32, &[Arc<DataFile>])> {
        self.by_date.iter().map(|(date, files)| (*date, files.as_slice()))
    }

    /// The file of a date and path.
    pub fn find(&self, date: i32, path: &str) -> Option<&Arc<DataFile>> {
        self.by_date.get(&date)?.iter().find(|file| file.path == path)
    }

    /// Whether all of these are here.
    pub fn hold(&self, files: &[Arc<DataFile>]) -> bool {
        let mut dates: BTreeMap<i32, HashSet<&str>> = BTreeMap::new();
        for date in files.iter().map(|file| file.date) {
            dates.entry(date).or_insert_with(|| {
                let known = self.by_date.get(&date).map_or(&[][..], |files| files.as_slice());
                known.iter().map(|file| file.path.as_str()).collect()
            });
        }
        files.iter().all(|file| dates[&file.date].contains(file.path.as_str()))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Rows of all files whose writers said how many.
    pub fn rows(&self) -> u64 {
        self.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, date: i32, bytes: u64) -> Arc<DataFile> {
        let path = path.to_owned();
        let (rows, ts, device) = (Some(bytes * 2), None, None);
        Arc::new(DataFile { path, date, bytes, rows, modified_ms: 0, ts, device, device_nulls: None, crc: None })
    }

    fn paths(files: &DataFiles) -> Vec<&str> {
        files.iter().map(|file| file.path.as_str()).collect()
    }

    #[test]
    fn a_version_stays_as_it_was_when_the_next_one_is_made() {
        let first = DataFiles::default().with([file("b", 2, 10), file("a", 1, 5), file("c", 2, 1)], &[]);
        let second = first.with([file("d", 3, 7)], &[file("b", 2, 10), file("a", 1, 5)]);
        assert_eq!(paths(&first), ["a", "b", "c"]);
        assert_eq!((first.len(), first.bytes(), first.rows()), (3, 16, 32));
        assert_eq!(paths(&second), ["c", "d"]);
        assert_eq!((second.len(), second.bytes(), second.rows()), (2, 8, 16));
        assert_eq!(second.dates().map(|(date, files)| (date, files.len())).collect::<Vec<_>>(), [(2, 1), (3, 1)]);
        assert!(first.hold(&[file("b", 2, 10), file("c", 2, 1)]) && !second.hold(&[file("b", 2, 10)]));
        assert!(!first.hold(&[file("x", 9, 1)]) && second.find(3, "d").is_some());
    }

    #[test]
    fn a_file_that_is_not_there_is_not_removed_twice() {
        let files = DataFiles::default().with([file("a", 1, 5)], &[]);
        let gone = files.with([], &[file("a", 1, 5), file("a", 1, 5)]);
        assert_eq!((gone.len(), gone.bytes(), gone.is_empty()), (0, 0, true));
        assert_eq!(gone.with([], &[file("a", 1, 5)]), DataFiles::default());
    }
}
