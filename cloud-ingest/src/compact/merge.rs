//! The rows of several files, each in order of device and time, as one sequence in that order.
//!
//! Of each file one row group is held as it was read, and one batch decoded; what is given out is gathered from runs of
//! rows that follow each other in one file. Rows that are equal come in the order of the files. A file whose rows are
//! not in order, or whose columns are not those of the table, is an error that names it, never rows in a wrong place. So is
//! one whose bytes are not those that the log says: what it holds would be whole again in the file that takes its place.

use std::cmp::Ordering;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::TimestampMicrosecondType;
use arrow_array::{Array, RecordBatch, RecordBatchOptions, StringArray, TimestampMicrosecondArray, new_null_array};
use arrow_schema::SchemaRef;
use arrow_select::concat::concat_batches;
use arrow_select::interleave::interleave_record_batch;
use deltalake_core::logstore::ObjectStoreRef;
use futures::{FutureExt, TryStreamExt};
use object_store::path::Path;
use parquet::arrow::ParquetRecordBatchStreamBuilder;
use parquet::arrow::async_reader::ParquetRecordBatchStream;
use parquet::errors::ParquetError;
use wire::DataFile;
use wire::schema::{DEVICE, TS};

use super::object::ObjectReader;
use super::{CompactError, Pace, Progress};

/// Rows decoded, and given out, at a time.
const BATCH_ROWS: usize = 8_192;
/// Runs of at least so many rows on average are copied as they are.
const LONG_RUN: usize = 16;

/// One file that is read.
struct Input {
    path: String,
    stream: ParquetRecordBatchStream<ObjectReader>,
    /// In the table's columns.
    batch: RecordBatch,
    device: StringArray,
    ts: TimestampMicrosecondArray,
    row: usize,
    /// Where `batch` stands in [`Merge::sources`], once rows of it were taken.
    source: Option<usize>,
}

impl Input {
    fn key(&self, row: usize) -> (Option<&str>, i64) {
        (self.device.is_valid(row).then(|| self.device.value(row)), self.ts.value(row))
    }

    fn rows(&self) -> usize {
        self.batch.num_rows()
    }

    fn read_error(&self, source: ParquetError) -> CompactError {
        CompactError::Read { path: self.path.clone(), source }
    }

    /// Decodes the next batch. False at the end of the file.
    async fn fill(&mut self, schema: &SchemaRef) -> Result<bool, CompactError> {
        let last = self.rows().checked_sub(1).map(|row| (self.key(row).0.map(str::to_owned), self.key(row).1));
        let batch = loop {
            // The decoder trusts what it reads, and may panic on what is damaged.
            let next = AssertUnwindSafe(self.stream.try_next()).catch_unwind().await;
            let next = next.unwrap_or_else(|_| Err(ParquetError::General("its pages make no sense".to_owned())));
            let next = next.map_err(|source| self.read_error(source))?;
            let Some(batch) = next else { return Ok(false) };
            if batch.num_rows() > 0 {
                break batch;
            }
        };
        self.batch =
            in_columns(&batch, schema).map_err(|detail| CompactError::Columns { path: self.path.clone(), detail })?;
        self.device = self.batch.column_by_name(DEVICE).expect("the table has it").as_string().clone();
        let ts = self.batch.column_by_name(TS).expect("the table has it");
        self.ts = ts.as_primitive::<TimestampMicrosecondType>().clone();
        (self.row, self.source) = (0, None);
        let follows = last.is_none_or(|(device, ts)| (device.as_deref(), ts) <= self.key(0));
        if !follows || !(1..self.rows()).all(|row| self.key(row - 1) <= self.key(row)) {
            return Err(CompactError::Unsorted { path: self.path.clone() });
        }
        Ok(true)
    }

    /// How many rows from here on come before `limit`, or are equal to it if `equal`; at least one is known to.
    fn run(&self, limit: Option<(Option<&str>, i64)>, equal: bool) -> usize {
        let left = self.rows() - self.row;
        let Some(limit) = limit else { return left };
        let within = |offset: usize| match self.key(self.row + offset).cmp(&limit) {
            Ordering::Less => true,
            Ordering::Equal => equal,
            Ordering::Greater => false,
        };
        // Short runs are found at once, long ones by doubling.
        let mut step = 1;
        while step < left && within(step) {
            step *= 2;
        }
        let (mut low, mut high) = (step / 2 + 1, step.min(left));
        while low < high {
            let middle = low.midpoint(high);
            if within(middle) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        high
    }
}

/// The rows of all inputs in order.
pub(crate) struct Merge {
    schema: SchemaRef,
    inputs: Vec<Input>,
    /// Inputs that have rows left, the one that comes next at the end.
    order: Vec<usize>,
    sources: Vec<RecordBatch>,
    /// (source, first row, rows) that were taken and not given out.
    runs: Vec<(usize, usize, usize)>,
    taken: usize,
}

impl std::fmt::Debug for Merge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Merge").field("inputs", &self.inputs.len()).finish_non_exhaustive()
    }
}

impl Merge {
    /// Opens files of one table, in this order, as many as `memory_bytes` allows and at least two. How many it are is the
    /// second value. `progress` is told, of no rows yet, with each part that is read.
    pub(crate) async fn open(
        store: &ObjectStoreRef,
        schema: &SchemaRef,
        files: &[Arc<DataFile>],
        memory_bytes: u64,
        pace: &mut Pace,
        progress: Progress<'_>,
    ) -> Result<(Self, usize), CompactError> {
        let (mut inputs, mut memory) = (Vec::new(), 0);
        for file in files {
            let (input, needs) = open(store, file, pace, progress).await?;
            memory += needs;
            if inputs.len() >= 2 && memory > memory_bytes {
                break;
            }
            inputs.push(input);
        }
        let count = inputs.len();
        let mut merge = Self {
            schema: Arc::clone(schema),
            inputs,
            order: Vec::new(),
            sources: Vec::new(),
            runs: Vec::new(),
            taken: 0,
        };
        for index in 0..count {
            if merge.inputs[index].fill(schema).await? {
                merge.put_in_order(index);
            }
        }
        Ok((merge, count))
    }

    /// The next rows; `None` when there are no more.
    pub(crate) async fn next(&mut self) -> Result<Option<RecordBatch>, CompactError> {
        while self.taken < BATCH_ROWS {
            let Some(index) = self.order.pop() else { break };
            let second = self.order.last().copied();
            let input = &self.inputs[index];
            let limit = second.map(|second| self.inputs[second].key(self.inputs[second].row));
            let equal = second.is_none_or(|second| index < second);
            let rows = input.run(limit, equal).min(BATCH_ROWS - self.taken);
            self.take(index, rows);
            let input = &mut self.inputs[index];
            if input.row < input.rows() || input.fill(&self.schema).await? {
                self.put_in_order(index);
            }
        }
        if self.taken == 0 { Ok(None) } else { self.gather().map(Some) }
    }

    fn take(&mut self, index: usize, rows: usize) {
        let input = &mut self.inputs[index];
        let source = *input.source.get_or_insert_with(|| {
            self.sources.push(input.batch.clone());
            self.sources.len() - 1
        });
        self.runs.push((source, input.row, rows));
        input.row += rows;
        self.taken += rows;
    }

    fn put_in_order(&mut self, index: usize) {
        let key = |index: usize| (self.inputs[index].key(self.inputs[index].row), index);
        let at = self.order.partition_point(|other| key(*other) > key(index));
        self.order.insert(at, index);
    }

    /// What was taken, as one batch.
    fn gather(&mut self) -> Result<RecordBatch, CompactError> {
        let slice = |(source, first, rows): &(usize, usize, usize)| self.sources[*source].slice(*first, *rows);
        let gathered = if let [run] = &self.runs[..] {
            Ok(slice(run))
        } else if self.taken >= LONG_RUN * self.runs.len() {
            let slices: Vec<RecordBatch> = self.runs.iter().map(slice).collect();
            concat_batches(&self.schema, &slices)
        } else {
            let sources: Vec<&RecordBatch> = self.sources.iter().collect();
            let places =
                self.runs.iter().flat_map(|(source, first, rows)| (*first..first + rows).map(|row| (*source, row)));
            interleave_record_batch(&sources, &places.collect::<Vec<_>>())
        };
        self.runs.clear();
        self.sources.clear();
        self.inputs.iter_mut().for_each(|input| input.source = None);
        self.taken = 0;
        gathered.map_err(CompactError::Gather)
    }
}

/// A file before its first batch, and the memory that reading it takes.
async fn open(
    store: &ObjectStoreRef,
    file: &DataFile,
    pace: &mut Pace,
    progress: Progress<'_>,
) -> Result<(Input, u64), CompactError> {
    let failed = |source| CompactError::Read { path: file.path.clone(), source };
    let place = Path::from_url_path(&file.path).map_err(|error| failed(ParquetError::External(Box::new(error))))?;
    let reader = ObjectReader { store: store.clone(), path: place, bytes: file.bytes };
    if let Some(expected) = file.crc {
        let got = reader.checksum(pace, progress).await.map_err(failed)?;
        if got != expected {
            return Err(CompactError::Bytes { path: file.path.clone(), expected, got });
        }
    }
    let builder = ParquetRecordBatchStreamBuilder::new(reader).await.map_err(failed)?;
    let groups = builder.metadata().row_groups();
    let compressed = groups.iter().map(|group| group.compressed_size()).max().unwrap_or(0);
    let decoded = groups.iter().map(|group| group.total_byte_size() / group.num_rows().max(1)).max().unwrap_or(0);
    // Text that a dictionary makes small is large again when it is decoded; nothing says how large.
    let memory = compressed + 4 * decoded * BATCH_ROWS as i64;
    let stream = builder.with_batch_size(BATCH_ROWS).build().map_err(failed)?;
    let nothing = RecordBatch::new_empty(Arc::new(arrow_schema::Schema::empty()));
    let (device, ts) = (StringArray::new_null(0), TimestampMicrosecondArray::new_null(0));
    let path = file.path.clone();
    Ok((Input { path, stream, batch: nothing, device, ts, row: 0, source: None }, u64::try_from(memory).unwrap_or(0)))
}

/// Reads all of one file, as a merge would; `each` gets its rows in the table's columns.
pub(crate) async fn scan(
    store: &ObjectStoreRef,
    schema: &SchemaRef,
    file: &DataFile,
    each: &mut (dyn FnMut(&RecordBatch) + Send),
) -> Result<(), CompactError> {
    let (mut input, _) = open(store, file, &mut Pace::new(1.0), &|_| {}).await?;
    while input.fill(schema).await? {
        each(&input.batch);
    }
    Ok(())
}

/// Rows of a file in the table's columns: those that it was written without are null.
fn in_columns(rows: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch, String> {
    let stored = rows.schema();
    if let Some(unknown) = stored.fields().iter().find(|field| schema.index_of(field.name()).is_err()) {
        return Err(format!("the table has no column {}", unknown.name()));
    }
    let columns = schema.fields().iter().map(|field| match rows.column_by_name(field.name()) {
        Some(column) if column.data_type() == field.data_type() => Ok(Arc::clone(column)),
        Some(column) => {
            Err(format!("column {} is {}, the table's is {}", field.name(), column.data_type(), field.data_type()))
        }
        None if field.is_nullable() => Ok(new_null_array(field.data_type(), rows.num_rows())),
        None => Err(format!("it has no column {}", field.name())),
    });
    let options = RecordBatchOptions::new().with_row_count(Some(rows.num_rows()));
    RecordBatch::try_new_with_options(Arc::clone(schema), columns.collect::<Result<_, _>>()?, &options)
        .map_err(|error| error.to_string())
}
