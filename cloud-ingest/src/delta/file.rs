//! One Parquet file of a table: rows of one date, in order of device and time, straight into the store.
//!
//! Zstandard; `ts` and integers DELTA_BINARY_PACKED; text and floats with dictionaries. Statistics for `ts` and `device`
//! alone, per page too: the rows are sorted by them. No bloom filter: in files that are sorted by device, bounds of row
//! groups and pages already leave at most one page to look into. Row groups are small ([`ROW_GROUP_ROWS`]), so that
//! whoever merges files holds little of each. Commits and compaction write alike. Parquet's writer puts no
//! checksum on pages, and a flipped bit may decode to another value: so the log has a CRC32C of each file as it was sent to
//! the store. The file counts when an entry of the log names it; one that is given up is removed, or left to vacuum.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::TimestampMicrosecondType;
use arrow_array::{Array, RecordBatch};
use arrow_schema::{DataType, Schema, SchemaRef};
use bytes::Bytes;
use deltalake_core::logstore::ObjectStoreRef;
use futures::FutureExt;
use futures::future::BoxFuture;
use object_store::buffered::BufWriter;
use object_store::path::Path;
use parquet::arrow::AsyncArrowWriter;
use parquet::arrow::async_writer::AsyncFileWriter;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::SortingColumn;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;
use wire::schema::{DATE, DEVICE, TS};
use wire::{DataFile, DataFiles};

use super::entry::date_text;

/// Most rows of one row group.
pub(crate) const ROW_GROUP_ROWS: usize = 262_144;
/// Most rows of one page. Who asks for one device decodes whole pages; smaller ones make files larger (8,192 in place of 20,000: by 3 %
/// of a day of 10,335 readings of six columns).
const PAGE_ROWS: usize = 8_192;
const ZSTD_LEVEL: i32 = 1;
/// What goes to the store at a time.
const PART_BYTES: usize = 8 << 20;
const PARTS_AT_ONCE: usize = 2;

/// How the name of a file begins that came with a commit, or by a change of its columns.
pub(crate) const PART: &str = "part";
/// How the name of a file begins that compaction made: so those who look at a table need not read its log.
pub(crate) const MERGED: &str = "merged";

/// When the newest of these files was merged from others, ms since 1970; none when none was.
pub fn last_compaction(files: &DataFiles) -> Option<i64> {
    let is_merged = |file: &&Arc<DataFile>| {
        let name = file.path.rsplit('/').next().unwrap_or_default();
        name.split_once('-').is_some_and(|(kind, _)| kind == MERGED)
    };
    files.iter().filter(is_merged).map(|file| file.modified_ms).max()
}

/// Why a file is not written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("write the file {path}")]
    Parquet { path: String, source: ParquetError },
}

/// A file that is being written.
pub(crate) struct FileWriter {
    path: Path,
    date: i32,
    writer: AsyncArrowWriter<Upload>,
    bounds: Bounds,
}

impl std::fmt::Debug for FileWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileWriter").field("path", &self.path).finish_non_exhaustive()
    }
}

impl FileWriter {
    /// A new file in the partition of a date. `store` is rooted at the table; `kind` is [`PART`] or [`MERGED`].
    pub(crate) fn create(
        store: &ObjectStoreRef,
        schema: &SchemaRef,
        properties: &WriterProperties,
        date: i32,
        kind: &'static str,
    ) -> Result<Self, FileError> {
        let path = Path::from(format!("{DATE}={}/{kind}-{}.zstd.parquet", date_text(date), new_name()));
        let upload = BufWriter::with_capacity(store.clone(), path.clone(), PART_BYTES);
        let upload = Upload { parts: Some(upload.with_max_concurrency(PARTS_AT_ONCE)), crc: 0 };
        let writer = AsyncArrowWriter::try_new(upload, schema.clone(), Some(properties.clone()))
            .map_err(|source| FileError::Parquet { path: path.to_string(), source })?;
        Ok(Self { path, date, writer, bounds: Bounds::default() })
    }

    /// Adds rows of this file's date, which follow those before.
    pub(crate) async fn write(&mut self, rows: &RecordBatch) -> Result<(), FileError> {
        self.bounds.take(rows);
        self.writer.write(rows).await.map_err(|source| self.failed(source))
    }

    /// How large it is, about.
    pub(crate) fn bytes(&self) -> u64 {
        (self.writer.bytes_written() + self.writer.in_progress_size()) as u64
    }

    /// Completes it: it is durable.
    pub(crate) async fn close(mut self) -> Result<DataFile, FileError> {
        if let Err(source) = self.writer.finish().await {
            return Err(self.failed(source));
        }
        let (bounds, bytes) = (self.bounds, self.writer.bytes_written() as u64);
        Ok(DataFile {
            path: self.path.to_string(),
            date: self.date,
            bytes,
            rows: Some(bounds.rows),
            modified_ms: chrono::Utc::now().timestamp_millis(),
            ts: bounds.ts,
            device: bounds.device,
            device_nulls: Some(bounds.device_nulls),
            crc: Some(self.writer.into_inner().crc),
        })
    }

    /// Leaves nothing of it in the store. One that is dropped does so, too, unless the process ends with it.
    pub(crate) async fn give_up(self) {
        self.writer.into_inner().give_up().await;
    }

    fn failed(&self, source: ParquetError) -> FileError {
        FileError::Parquet { path: self.path.to_string(), source }
    }
}

/// What statistics say.
#[derive(Debug, Default)]
struct Bounds {
    rows: u64,
    ts: Option<(i64, i64)>,
    device: Option<(String, String)>,
    device_nulls: u64,
}

impl Bounds {
    fn take(&mut self, rows: &RecordBatch) {
        if rows.num_rows() == 0 {
            return;
        }
        self.rows += rows.num_rows() as u64;
        let ts = rows.column_by_name(TS).expect("rows of a table have ts").as_primitive::<TimestampMicrosecondType>();
        for us in ts.values() {
            let (first, last) = self.ts.get_or_insert((*us, *us));
            (*first, *last) = ((*first).min(*us), (*last).max(*us));
        }
        let devices = rows.column_by_name(DEVICE).expect("rows of a table have device").as_string::<i32>();
        self.device_nulls += devices.null_count() as u64;
        // Sorted, nulls first: only the ends matter.
        if devices.null_count() < devices.len() {
            let (first, last) = (devices.value(devices.null_count()), devices.value(devices.len() - 1));
            let (_, known_last) = self.device.get_or_insert_with(|| (first.to_owned(), String::new()));
            if known_last.as_str() < last {
                last.clone_into(known_last);
            }
        }
    }
}

/// Parts of a file on their way into the store.
struct Upload {
    /// None when it is complete, or given up.
    parts: Option<BufWriter>,
    /// CRC32C of what was written to it.
    crc: u32,
}

impl AsyncFileWriter for Upload {
    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), ParquetError>> {
        async move {
            let upload = self.parts.as_mut().ok_or_else(over)?;
            self.crc = crc32c::crc32c_append(self.crc, &bytes);
            upload.put(bytes).await.map_err(|error| ParquetError::External(Box::new(error)))
        }
        .boxed()
    }

    fn complete(&mut self) -> BoxFuture<'_, Result<(), ParquetError>> {
        use tokio::io::AsyncWriteExt;
        async move {
            let mut upload = self.parts.take().ok_or_else(over)?;
            upload.shutdown().await.map_err(|error| ParquetError::External(Box::new(error)))
        }
        .boxed()
    }
}

fn over() -> ParquetError {
    ParquetError::General("the file is complete, or given up".to_owned())
}

impl Upload {
    async fn give_up(&mut self) {
        if let Some(mut upload) = self.parts.take()
            && let Err(error) = upload.abort().await
        {
            tracing::debug!(%error, "parts of a file stay in the store");
        }
    }
}

/// S3 keeps the parts of a file that is not completed until somebody gives it up, and shows them nowhere.
impl Drop for Upload {
    fn drop(&mut self) {
        if let Some(parts) = self.parts.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move { Self { parts: Some(parts), crc: 0 }.give_up().await });
        }
    }
}

/// A name that nobody else gives.
pub(crate) fn new_name() -> String {
    let number = || RandomState::new().build_hasher().finish();
    let time = chrono::Utc::now().timestamp_micros();
    format!("{time:016x}-{:016x}", number() ^ u64::from(std::process::id()).rotate_left(32) ^ number().rotate_left(17))
}

/// How files of a table are encoded.
pub(crate) fn writer_properties(schema: &Schema) -> WriterProperties {
    let zstd = ZstdLevel::try_new(ZSTD_LEVEL).expect("the level is one of Zstandard's");
    let index = |name| schema.index_of(name).expect("every table has it") as i32;
    let by = |name| SortingColumn { column_idx: index(name), descending: false, nulls_first: true };
    let mut properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(zstd))
        .set_statistics_enabled(EnabledStatistics::None)
        .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
        .set_data_page_row_count_limit(PAGE_ROWS)
        .set_sorting_columns(Some(vec![by(DEVICE), by(TS)]));
    for name in [TS, DEVICE] {
        properties = properties.set_column_statistics_enabled(ColumnPath::from(name), EnabledStatistics::Page);
    }
    for field in schema.fields() {
        if matches!(field.data_type(), DataType::Int64 | DataType::Timestamp(..)) {
            properties = properties
                .set_column_dictionary_enabled(ColumnPath::from(field.name().as_str()), false)
                .set_column_encoding(ColumnPath::from(field.name().as_str()), Encoding::DELTA_BINARY_PACKED);
        }
    }
    properties.build()
}
