//! Compaction: small files of a date become a large one with the same rows, in order of device and time.
//!
//! The rows go from the old files to the new one in one pass ([`merge`]), within a configured memory and a configured
//! share of one core, and the swap is one entry of the log, made like every other (rule 3): it leaves the transactions
//! alone, says that no data changed, and is refused when one of the old files is not part of the table any more. So a
//! commit of rows never fails because of it, a second compactor loses, and a process that is killed leaves at most files
//! that nothing names, for vacuum. The old files stay on disk for their grace, for queries that hold an older version.
//! The rows that come out are counted against those that the log says went in.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use wire::{DataFile, DataFiles};

use self::plan::Rules;
use crate::config::CompactSettings;
use crate::delta::file::{FileWriter, MERGED, writer_properties};
use crate::delta::{CommitError, DeltaTable, FileError, Purpose, TableError};
use crate::failpoint;
use crate::rescue::row_schema;

mod merge;
mod object;
mod plan;

pub(crate) use merge::{Merge, scan};
pub use plan::small_files;

/// How often the swap is tried when the store hides its outcome.
const SWAPS_MAX: usize = 5;
/// A file may become so much larger than it should, percent, before another one is begun.
const OVERSIZE: u64 = 125;
/// Work between two pauses.
const STINT: Duration = Duration::from_millis(20);

/// Why files were not merged. Nothing of the table has changed.
#[derive(Debug, thiserror::Error)]
pub enum CompactError {
    #[error("read the file {path}")]
    Read { path: String, source: parquet::errors::ParquetError },
    #[error(
        "the bytes of the file {path} are not those that were written: their CRC32C is {got:08x}, the log says {expected:08x}"
    )]
    Bytes { path: String, expected: u32, got: u32 },
    #[error("the rows of the file {path} are not in order of device and time")]
    Unsorted { path: String },
    #[error("the file {path} does not fit its table: {detail}")]
    Columns { path: String, detail: String },
    #[error("the log says that the files of {date} have {expected} rows, and they have {got}")]
    Rows { date: String, expected: u64, got: u64 },
    #[error("bring rows together")]
    Gather(#[source] arrow_schema::ArrowError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error(transparent)]
    Table(#[from] TableError),
}

impl CompactError {
    /// The file that will not be merged the next time either.
    pub fn bad_file(&self) -> Option<&str> {
        match self {
            Self::Read { path, .. }
            | Self::Bytes { path, .. }
            | Self::Unsorted { path }
            | Self::Columns { path, .. } => Some(path),
            _ => None,
        }
    }
}

/// What a merge came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merged {
    /// The table has the new files.
    Done { files_in: usize, files_out: usize, bytes_in: u64, bytes_out: u64, rows: u64 },
    /// Others replaced or removed one of the files meanwhile.
    Overtaken,
}

/// Is told the rows that are done since it was told last: none when something else was done.
pub type Progress<'a> = &'a (dyn Fn(u64) + Send + Sync);

/// Rows are merged within this share of one core.
#[derive(Debug)]
pub struct Pace {
    share: f64,
    since: Instant,
}

impl Pace {
    /// A part of one core, above 0 and at most 1.
    pub fn new(share: f64) -> Self {
        Self { share, since: Instant::now() }
    }

    /// Pauses as long as the work since the last pause asks for.
    pub(crate) async fn breathe(&mut self) {
        let worked = self.since.elapsed();
        if worked >= STINT {
            if self.share < 1.0 {
                tokio::time::sleep(worked.mul_f64((1.0 - self.share) / self.share)).await;
            }
            self.since = Instant::now();
        }
    }
}

/// Chooses and merges.
#[derive(Debug, Clone)]
pub struct Compactor {
    settings: CompactSettings,
    /// Paths of files that cannot be merged.
    left_out: HashSet<String>,
}

impl Compactor {
    /// One that knows of no bad file.
    pub fn new(settings: &CompactSettings) -> Self {
        Self { settings: settings.clone(), left_out: HashSet::new() }
    }

    /// The files that are merged next, if there are any; all of one date.
    pub fn choose(&self, files: &DataFiles) -> Option<Vec<Arc<DataFile>>> {
        let settings = &self.settings;
        let rules = Rules {
            file_bytes: settings.file_bytes.0,
            small_bytes: settings.small_bytes.0,
            min_files: settings.min_files,
        };
        plan::next_merge(files, rules, &self.left_out, chrono::Utc::now().timestamp_micros())
    }

    /// Never chooses this file again.
    pub fn leave_out(&mut self, path: &str) {
        self.left_out.insert(path.to_owned());
    }

    /// Merges files of one date, and swaps them in the table. It may be dropped at any moment.
    ///
    /// # Errors
    /// See [`CompactError`]; what was written for it is left to vacuum.
    pub async fn merge(
        &self,
        table: &mut DeltaTable,
        mut inputs: Vec<Arc<DataFile>>,
        progress: Progress<'_>,
    ) -> Result<Merged, CompactError> {
        failpoint::reach("compact.planned");
        // Rows that are equal keep the order in which they came.
        inputs.sort_by(|a, b| (a.modified_ms, &a.path).cmp(&(b.modified_ms, &b.path)));
        let outputs = self.write(table, &mut inputs, progress).await?;
        failpoint::reach("compact.done");
        let sum = |files: &mut dyn Iterator<Item = u64>| files.sum::<u64>();
        let merged = Merged::Done {
            files_in: inputs.len(),
            files_out: outputs.len(),
            bytes_in: sum(&mut inputs.iter().map(|file| file.bytes)),
            bytes_out: sum(&mut outputs.iter().map(|file| file.bytes)),
            rows: sum(&mut outputs.iter().filter_map(|file| file.rows)),
        };
        for _ in 0..SWAPS_MAX {
            match table.replace(Purpose::Compact, &inputs, outputs.clone()).await {
                Ok(_) => return Ok(merged),
                Err(CommitError::Gone { .. }) => return Ok(Merged::Overtaken),
                Err(CommitError::Moved { .. }) => {}
                Err(error @ (CommitError::Unknown { .. } | CommitError::Store(_))) => {
                    tracing::debug!(stream = %table.stream(), %error, "whether files were swapped is looked up");
                    // The put may still come through: it is for the version that the next try is for, or for a past one.
                    let now = table.reload().await?;
                    if outputs.iter().all(|file| now.files.find(file.date, &file.path).is_some()) {
                        return Ok(merged);
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(CommitError::Moved { stream: table.stream().clone(), version: table.snapshot().version }.into())
    }

    /// The rows of all inputs in new files. Inputs that memory has no room for are taken from the list.
    async fn write(
        &self,
        table: &DeltaTable,
        inputs: &mut Vec<Arc<DataFile>>,
        progress: Progress<'_>,
    ) -> Result<Vec<DataFile>, CompactError> {
        let Some(date) = inputs.first().map(|file| file.date) else { return Ok(Vec::new()) };
        let snapshot = table.snapshot();
        let schema = row_schema(&snapshot.fields);
        let store = snapshot.log_store.object_store(None);
        let mut pace = Pace::new(self.settings.cpu_share);
        let memory_bytes = self.settings.memory_bytes.0;
        let (mut merge, count) = Merge::open(&store, &schema, inputs, memory_bytes, &mut pace, progress).await?;
        inputs.truncate(count);
        let properties = writer_properties(&schema);
        let (mut outputs, mut writer, mut rows) = (Vec::new(), None::<FileWriter>, 0);
        loop {
            let batch = match merge.next().await {
                Ok(Some(batch)) => batch,
                Ok(None) => break,
                Err(error) => {
                    if let Some(open) = writer {
                        open.give_up().await;
                    }
                    return Err(error);
                }
            };
            let mut open = match writer.take() {
                Some(open) => open,
                None => FileWriter::create(&store, &schema, &properties, date, MERGED)?,
            };
            open.write(&batch).await?;
            failpoint::reach("compact.merging");
            rows += batch.num_rows() as u64;
            progress(batch.num_rows() as u64);
            if open.bytes() > self.settings.file_bytes.0 / 100 * OVERSIZE {
                outputs.push(open.close().await?);
                failpoint::reach("compact.file");
            } else {
                writer = Some(open);
            }
            pace.breathe().await;
        }
        if let Some(open) = writer {
            outputs.push(open.close().await?);
            failpoint::reach("compact.file");
        }
        let expected = inputs.iter().map(|file| file.rows).sum::<Option<u64>>();
        match expected {
            Some(expected) if expected != rows => {
                Err(CompactError::Rows { date: crate::delta::date_text(date), expected, got: rows })
            }
            _ => Ok(outputs),
        }
    }
}

#[cfg(test)]
mod tests;
