//! A table as it was at a version, or at a moment.
//!
//! It is read from the log, as long as that reaches back; rows can be read as long as the files of that version are
//! kept. What it says of the past does not change: a version never does, and a moment must be over for [`SETTLED`]: the time of
//! an entry is set before the entry is there, and some stores tell it in whole seconds.

use std::time::Duration;

use chrono::{DateTime, Utc};
use object_store::ObjectStoreExt;
use object_store::path::Path;
use wire::StreamName;

use super::{TableError, TableSnapshot};

/// How long a moment must be over, so that no entry of before it can still come.
const SETTLED: Duration = Duration::from_secs(5);

/// A state of the past.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    Version(u64),
    /// The last version that was there then, µs since 1970 UTC.
    Time(i64),
}

impl TableSnapshot {
    /// The table as it was.
    ///
    /// # Errors
    /// When the log does not reach back so far, or not so far ahead.
    pub async fn past(&self, stream: &StreamName, moment: Moment) -> Result<Self, TableError> {
        let gone = |detail: String| TableError::Past { stream: stream.clone(), detail };
        let version = match moment {
            Moment::Version(version) => version,
            Moment::Time(us) => self.version_at(us).await.map_err(gone)?,
        };
        if version > self.version {
            return Err(gone(format!("there is no version {version} yet, the newest is {}", self.version)));
        }
        let past = Self::load(stream, &self.log_store, Some(version)).await;
        past.map_err(|error| gone(format!("version {version} cannot be read: {}", crate::errors::chain(&error))))
    }

    /// The last version whose entry was there at this moment. Entries are written in order, and cleaned away from the
    /// oldest on, so a few looks at the log find it.
    async fn version_at(&self, us: i64) -> Result<u64, String> {
        let time = DateTime::from_timestamp_micros(us).ok_or("this time is out of range")?;
        if time > Utc::now() - SETTLED {
            return Err(format!("{time} is not over for {SETTLED:?} yet: what was there then may still come to light"));
        }
        let oldest = || format!("the log does not reach back to {time}");
        let mut found = None;
        let (mut low, mut high) = (0, self.version + 1);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.written_at(middle).await.map_err(|error| format!("{}: {error}", oldest()))? {
                Some(written) if written > time => high = middle,
                written => {
                    found = written.map(|_| middle);
                    low = middle + 1;
                }
            }
        }
        found.ok_or_else(oldest)
    }

    /// When the entry of a version was written; none when it is cleaned away.
    async fn written_at(&self, version: u64) -> Result<Option<DateTime<Utc>>, object_store::Error> {
        let path = Path::from(format!("_delta_log/{version:020}.json"));
        match self.log_store.object_store(None).head(&path).await {
            Ok(entry) => Ok(Some(entry.last_modified)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
