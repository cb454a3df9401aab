//! A table as it was at a version, or at a moment.
//!
//! It is read from the log, as long as that reaches back; rows can be read as long as the files of that version are
//! kept. What it says of the past does not change: a version never does, and a moment must be over.

use std::sync::Arc;

use deltalake_core::DeltaTable as CoreTable;
use deltalake_core::table::state::DeltaTableState;
use wire::StreamName;

use super::{Marks, TableError, TableSnapshot};

/// A state of the past.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    Version(u64),
    /// The last version that was there then, µs since 1970 UTC.
    Time(i64),
}

impl TableSnapshot {
    /// The table as it was; it knows no transactions and cannot be committed to.
    ///
    /// # Errors
    /// When the log does not reach back so far, or not so far ahead.
    pub async fn past(&self, stream: &StreamName, moment: Moment) -> Result<Self, TableError> {
        let gone = |detail: String| TableError::Past { stream: stream.clone(), detail };
        let state = match moment {
            Moment::Version(version) if version > self.version => {
                return Err(gone(format!("there is no version {version} yet, the newest is {}", self.version)));
            }
            Moment::Version(version) => DeltaTableState::try_new(&self.log_store, Some(version))
                .await
                .map_err(|error| gone(format!("version {version} cannot be read: {error}")))?,
            Moment::Time(us) => self.at(us).await.map_err(gone)?,
        };
        Self::new(stream, state, self.log_store.clone(), Arc::new(Marks::new()))
    }

    async fn at(&self, us: i64) -> Result<DeltaTableState, String> {
        let time = chrono::DateTime::from_timestamp_micros(us).ok_or("this time is out of range")?;
        if time > chrono::Utc::now() {
            return Err(format!("{time} is not over yet"));
        }
        let mut table = CoreTable::new(self.log_store.clone());
        table.state = Some(self.state.clone());
        table.load_with_datetime(time).await.map_err(|error| format!("{time} cannot be read: {error}"))?;
        let state = table.state.ok_or("the table has no state")?;
        // Before the first version that the log still has, the first one stands for all.
        let oldest = || format!("the log does not reach back to {time}");
        let path = object_store::path::Path::from(format!("_delta_log/{:020}.json", state.version()));
        let entry = object_store::ObjectStoreExt::head(&self.log_store.object_store(None), &path).await;
        match entry {
            Ok(entry) if entry.last_modified <= time => Ok(state),
            Ok(_) => Err(oldest()),
            Err(error) => Err(format!("{}: {error}", oldest())),
        }
    }
}
