//! The log's clean-up: entries and checkpoints that no version within the log's keep needs.
//!
//! To build a version one needs a checkpoint at or below it and the entries in between. So the newest checkpoint is
//! looked for that is older than everything within the keep, and what is older than that checkpoint goes, oldest first:
//! while an entry is there, all behind it are. The newest checkpoint and what follows it always stay.

use std::time::Duration;

use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStoreExt};
use wire::ids::StreamName;

use super::{LogStoreRef, TableError, TableSnapshot};
use crate::failpoint;

/// An object of the log, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Entry,
    Checkpoint,
    Other,
}

/// The version in a name of the log, and what it is of.
fn parse(path: &Path) -> Option<(u64, Kind)> {
    let (version, rest) = path.filename()?.split_at_checked(20)?;
    let version = version.parse().ok()?;
    Some(match rest {
        ".json" => (version, Kind::Entry),
        ".checkpoint.parquet" => (version, Kind::Checkpoint),
        _ if rest.starts_with('.') => (version, Kind::Other),
        _ => return None,
    })
}

/// The objects of a table's log with their versions, oldest first.
pub(super) async fn list(
    stream: &StreamName,
    log_store: &LogStoreRef,
) -> Result<Vec<(u64, Kind, ObjectMeta)>, TableError> {
    let store = log_store.object_store(None);
    let listed = store.list(Some(&Path::from("_delta_log"))).try_collect::<Vec<_>>().await;
    let listed = listed.map_err(|error| TableError::delta(stream, error.into()))?;
    let mut objects: Vec<_> = listed
        .into_iter()
        .filter_map(|meta| parse(&meta.location).map(|(version, kind)| (version, kind, meta)))
        .collect();
    objects.sort_by(|a, b| (a.0, &a.2.location).cmp(&(b.0, &b.2.location)));
    Ok(objects)
}

/// Versions of the log's entries that were made since, with the time that the store gives them.
pub(crate) async fn entries_since(
    stream: &StreamName,
    snapshot: &TableSnapshot,
    since: DateTime<Utc>,
) -> Result<Vec<u64>, TableError> {
    let objects = list(stream, &snapshot.log_store).await?;
    let recent = objects.iter().filter(|(_, kind, meta)| *kind == Kind::Entry && meta.last_modified >= since);
    Ok(recent.map(|(version, ..)| *version).collect())
}

/// What of the log may go.
fn old(objects: &[(u64, Kind, ObjectMeta)], newest: u64, cutoff: DateTime<Utc>) -> &[(u64, Kind, ObjectMeta)] {
    let first_kept = objects
        .iter()
        .find(|(_, kind, meta)| *kind == Kind::Entry && meta.last_modified >= cutoff)
        .map_or(newest, |(version, ..)| version.saturating_sub(1));
    let checkpoints = objects.iter().filter(|(_, kind, _)| *kind == Kind::Checkpoint).map(|(version, ..)| *version);
    let base = checkpoints.filter(|version| *version <= first_kept).max().unwrap_or(0);
    let end = objects.iter().position(|(version, _, meta)| *version >= base || meta.last_modified >= cutoff);
    &objects[..end.unwrap_or(objects.len())]
}

/// Removes what is older than the log is kept; how many objects went. `progress` is told after each.
///
/// # Errors
/// When the store does not answer; what is left goes the next time.
pub(crate) async fn clean(
    stream: &StreamName,
    snapshot: &TableSnapshot,
    keep: Duration,
    progress: &(dyn Fn() + Send + Sync),
) -> Result<usize, TableError> {
    let objects = list(stream, &snapshot.log_store).await?;
    let store = snapshot.log_store.object_store(None);
    let mut gone = 0;
    for (_, _, meta) in old(&objects, snapshot.version, Utc::now() - keep) {
        match store.delete(&meta.location).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => gone += 1,
            Err(error) => return Err(TableError::delta(stream, error.into())),
        }
        progress();
        failpoint::reach("delete.between");
    }
    Ok(gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log by names and the hours since each was written; what is left of it.
    fn check(log: &[(&str, i64)], keep_hours: i64, expected: &[&str]) {
        let now = DateTime::UNIX_EPOCH + chrono::Duration::hours(10_000);
        let meta = |name: &str, age: i64| ObjectMeta {
            location: Path::from(format!("_delta_log/{name}")),
            last_modified: now - chrono::Duration::hours(age),
            size: 1,
            e_tag: None,
            version: None,
        };
        let named = |short: &str| {
            let (number, rest) = short.split_once('.').unwrap();
            format!("{:020}.{}", number.parse::<u64>().unwrap(), rest.replace("ckpt", "checkpoint.parquet"))
        };
        let objects: Vec<_> = log
            .iter()
            .map(|(short, age)| meta(&named(short), *age))
            .map(|meta| parse(&meta.location).map(|(version, kind)| (version, kind, meta)).unwrap())
            .collect();
        let newest = objects.iter().map(|(version, ..)| *version).max().unwrap();
        let gone = old(&objects, newest, now - chrono::Duration::hours(keep_hours)).len();
        let left: Vec<&str> = log[gone..].iter().map(|(short, _)| *short).collect();
        assert_eq!(left, expected, "{log:?}");
    }

    #[test]
    fn what_a_version_within_the_keep_needs_stays() {
        let log = [("0.json", 9), ("1.json", 8), ("2.ckpt", 7), ("2.json", 7), ("3.json", 6), ("4.json", 2)];
        // Version 3 was the newest five hours ago: it needs the checkpoint at 2.
        check(&log, 5, &["2.ckpt", "2.json", "3.json", "4.json"]);
        check(&log, 1, &["2.ckpt", "2.json", "3.json", "4.json"]);
        check(&log, 8, &["0.json", "1.json", "2.ckpt", "2.json", "3.json", "4.json"]);
        // Without a checkpoint everything is needed.
        check(&[("0.json", 9), ("1.json", 8)], 1, &["0.json", "1.json"]);
        // A checkpoint of the newest version is its own base, and stays.
        check(&[("0.json", 9), ("1.json", 8), ("2.ckpt", 7), ("2.json", 7)], 1, &["2.ckpt", "2.json"]);
        // A checkpoint that is newer than the keep helps nobody who asks for an older version.
        check(
            &[("0.json", 9), ("1.json", 8), ("2.json", 3), ("3.ckpt", 1), ("3.json", 1)],
            4,
            &["0.json", "1.json", "2.json", "3.ckpt", "3.json"],
        );
        // Old checkpoints go with their entries.
        let log =
            [("0.json", 9), ("1.ckpt", 8), ("1.json", 8), ("2.json", 8), ("3.ckpt", 7), ("3.json", 7), ("4.json", 0)];
        check(&log, 2, &["3.ckpt", "3.json", "4.json"]);
    }

    #[test]
    fn names_that_are_not_of_the_log_are_left_alone() {
        for name in ["_last_checkpoint", "00000000000000000001", "0000000000000000000x.json", "tmp.json"] {
            assert_eq!(parse(&Path::from(format!("_delta_log/{name}"))), None, "{name}");
        }
        let compacted = Path::from("_delta_log/00000000000000000001.00000000000000000003.compacted.json");
        assert_eq!(parse(&compacted), Some((1, Kind::Other)));
    }
}
