//! Vacuum: files in a table's directory that nothing names any more.
//!
//! A file is deleted when all of this is so: it is not part of the table at its newest version, it was written longer ago
//! than the grace, and no entry of the log that was made within the grace names it, be it as added or as removed. So
//! whoever holds a version that was current within the grace finds its files: queries under way, and those that ask for
//! an older version. What is left are files that compaction and retention replaced, those of commits that lost, and what
//! a killed process had staged. Files are listed before the log is read: one that comes into the table later is young.
//! A rewrite that is under way ([`crate::underway`]) keeps what was written since it began. Times are those of the store against this machine's clock; logs are kept as long as the grace at least.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use chrono::Utc;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use wire::schema::DATE;

use crate::delta::{DeltaTable, TableError, entries_since, named_files};
use crate::failpoint;
use crate::store::Store;
use crate::underway;

/// Entries of a log that are read at a time.
const READS_AT_ONCE: usize = 16;

/// What a vacuum would delete.
#[derive(Debug, Default)]
pub struct VacuumPlan {
    /// Data files, relative to the table, with their bytes.
    pub unused: Vec<(Path, u64)>,
    /// Files on this machine that were being written when their process died, with their bytes.
    pub staged: Vec<(PathBuf, u64)>,
    /// Files of the table.
    pub in_use: usize,
    /// Files that are not, and stay for their grace.
    pub kept: usize,
}

impl VacuumPlan {
    /// Bytes that it would free.
    pub fn bytes(&self) -> u64 {
        self.unused.iter().map(|(_, bytes)| bytes).chain(self.staged.iter().map(|(_, bytes)| bytes)).sum()
    }

    /// Files that it would delete.
    pub fn files(&self) -> usize {
        self.unused.len() + self.staged.len()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.files() == 0
    }
}

/// Finds out what nothing names any more. The table is read anew. `progress` is told after each object or entry.
///
/// # Errors
/// When the store does not answer, or an entry of the log is not understood: nothing may be deleted then.
pub async fn plan(
    store: &Store,
    table: &mut DeltaTable,
    grace: Duration,
    progress: &(dyn Fn() + Send + Sync),
) -> Result<VacuumPlan, TableError> {
    let stream = table.stream().clone();
    let failed = |error: object_store::Error| TableError::delta(&stream, error.into());
    let since = Utc::now() - grace;
    let objects = table.snapshot().log_store.object_store(None);
    let (rewriting_since, dead) = underway::found(&objects).await.map_err(failed)?;
    let young = rewriting_since.map_or(since, |began| began.min(since));
    let listed =
        objects.list(None).inspect(|_| progress()).try_filter(|meta| std::future::ready(is_data(&meta.location)));
    let listed: Vec<_> = listed.try_collect().await.map_err(failed)?;
    let staged = store.staged(&stream, young.into());

    let snapshot = table.reload().await?;
    let recent = entries_since(&stream, &snapshot, since).await?;
    let named = futures::stream::iter(recent.into_iter().map(Ok));
    let named = named.map_ok(|version| named_files(&stream, &snapshot.log_store, version));
    let named = named.try_buffer_unordered(READS_AT_ONCE).inspect(|_| progress());
    let named: Vec<Vec<String>> = named.try_collect().await?;
    let place = |path: &str| Path::from_url_path(path).unwrap_or_else(|_| Path::from(path));
    let named: HashSet<Path> = named.iter().flatten().map(|path| place(path)).collect();
    let in_use: HashSet<Path> = snapshot.files.iter().map(|file| place(&file.path)).collect();

    let mut plan = VacuumPlan { staged, ..VacuumPlan::default() };
    plan.unused.extend(dead.into_iter().map(|note| (note, 0)));
    for meta in listed {
        if in_use.contains(&meta.location) {
            plan.in_use += 1;
        } else if meta.last_modified >= young || named.contains(&meta.location) {
            plan.kept += 1;
        } else {
            plan.unused.push((meta.location, meta.size));
        }
    }
    Ok(plan)
}

/// Only what a writer of this table would have made: a Parquet file in a partition.
fn is_data(path: &Path) -> bool {
    let mut parts = path.parts();
    let partition = parts.next().is_some_and(|part| part.as_ref().starts_with(DATE) && part.as_ref().contains('='));
    partition && path.extension() == Some("parquet")
}

/// Deletes what a plan names; how many files went. `progress` is told after each.
///
/// # Errors
/// When the store refuses; what is left is found again.
pub async fn delete(
    table: &DeltaTable,
    plan: &VacuumPlan,
    progress: &(dyn Fn() + Send + Sync),
) -> Result<usize, TableError> {
    let store = table.snapshot().log_store.object_store(None);
    let mut gone = 0;
    let unused: Vec<_> = plan.unused.iter().map(|(path, _)| Ok(path.clone())).collect();
    // On S3 a thousand at a time.
    let mut deleted = store.delete_stream(futures::stream::iter(unused).boxed());
    while let Some(one) = deleted.next().await {
        match one {
            Ok(_) => gone += 1,
            // Somebody else was faster.
            Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(TableError::delta(table.stream(), error.into())),
        }
        progress();
        failpoint::reach("delete.between");
    }
    for (path, _) in &plan.staged {
        match std::fs::remove_file(path) {
            Ok(()) => gone += 1,
            Err(error) => tracing::debug!(path = %path.display(), %error, "a staged file stays"),
        }
        progress();
    }
    Ok(gone)
}
