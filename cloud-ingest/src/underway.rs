//! Rewrites of a table that are under way: files that nothing names yet, and that vacuum must leave alone.
//!
//! A rewrite that takes hours names its files in one entry of the log, at its end. Until then an object `_underway/<name>` in
//! the table's directory, written anew every [`EVERY`], says when it began (its text, µs since 1970 UTC). While one of them is
//! younger than [`ALIVE`], no file is too old that was written since the rewrite began. What a killed process leaves is
//! no longer alive after that time, and vacuum deletes it. Times are those of the store against this machine's clock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

use crate::delta::file::new_name;

/// Where they are; Delta's readers look into no directory with such a name.
const DIRECTORY: &str = "_underway";
/// How often a rewrite says that it goes on.
const EVERY: Duration = Duration::from_secs(300);
/// So long after it has said so it counts as dead; files are kept as long after they were written, at least.
const ALIVE: Duration = Duration::from_secs(3_600);

/// A rewrite of this process.
#[derive(Debug)]
pub(crate) struct Underway {
    store: Arc<dyn ObjectStore>,
    path: Path,
    began: DateTime<Utc>,
    told: Instant,
}

impl Underway {
    /// One begins now: before its first file is written.
    ///
    /// # Errors
    /// When the store does not take it.
    pub(crate) async fn begin(store: Arc<dyn ObjectStore>) -> Result<Self, object_store::Error> {
        let path = Path::from(format!("{DIRECTORY}/{}", new_name()));
        let underway = Self { store, path, began: Utc::now(), told: Instant::now() };
        underway.put().await?;
        Ok(underway)
    }

    async fn put(&self) -> Result<(), object_store::Error> {
        self.store.put(&self.path, self.began.timestamp_micros().to_string().into()).await?;
        Ok(())
    }

    /// It goes on. To be called often.
    ///
    /// # Errors
    /// When the store does not take it.
    pub(crate) async fn goes_on(&mut self) -> Result<(), object_store::Error> {
        if self.told.elapsed() >= EVERY {
            self.put().await?;
            self.told = Instant::now();
        }
        Ok(())
    }

    /// It has ended.
    pub(crate) async fn end(self) {
        if let Err(error) = self.store.delete(&self.path).await {
            tracing::debug!(path = %self.path, %error, "a note of a rewrite stays for vacuum");
        }
    }
}

/// Since when a rewrite is under way, of the oldest that is alive; and those that are dead.
///
/// # Errors
/// When the store does not answer.
pub(crate) async fn found(
    store: &Arc<dyn ObjectStore>,
) -> Result<(Option<DateTime<Utc>>, Vec<Path>), object_store::Error> {
    let (mut oldest, mut dead) = (None, Vec::new());
    let notes: Vec<_> = store.list(Some(&Path::from(DIRECTORY))).try_collect().await?;
    for note in notes {
        if note.last_modified < Utc::now() - ALIVE {
            dead.push(note.location);
            continue;
        }
        let text = match store.get(&note.location).await {
            Ok(text) => text.bytes().await?,
            // It has ended meanwhile; its entry is in the log that is read after this.
            Err(object_store::Error::NotFound { .. }) => continue,
            Err(error) => return Err(error),
        };
        let began = std::str::from_utf8(&text).ok().and_then(|text| text.parse().ok());
        // One that does not say since when might be as old as any file.
        let began = began.and_then(DateTime::from_timestamp_micros).unwrap_or(DateTime::UNIX_EPOCH);
        oldest = Some(oldest.map_or(began, |known: DateTime<Utc>| known.min(began)));
    }
    Ok((oldest, dead))
}
