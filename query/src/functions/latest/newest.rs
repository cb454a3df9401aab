//! The newest row of each device, out of files and batches in any order.
//!
//! Newest is the greatest (`ts`, `_received_at`, `_spool`, `_seq`), NULL being the least; of several rows that are equal in
//! all four (one batch told a device twice at one instant) the greatest by its columns from left to right. This is a total
//! order on what rows say, so the answer depends on the rows alone.
//!
//! A file is read twice: first those five columns of all rows, then all columns of the rows that won. Rows that lose later
//! stay in memory until [`Newest::finish`] copies the winners together.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::sync::Arc;

use arrow::compute::{cast, interleave_record_batch};
use arrow::datatypes::{DataType, Int64Type, SchemaRef, TimestampMicrosecondType};
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use datafusion::common::{HashMap, Result, exec_datafusion_err, exec_err};
use datafusion::datasource::listing::PartitionedFile;
use datafusion::datasource::physical_plan::parquet::{DefaultParquetFileReaderFactory, ParquetFileReaderFactory};
use datafusion::object_store::ObjectStore;
use datafusion::object_store::path::Path;
use datafusion::parquet::arrow::ProjectionMask;
use datafusion::parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, RowSelection};
use datafusion::parquet::arrow::async_reader::{AsyncFileReader, ParquetRecordBatchStreamBuilder};
use datafusion::parquet::file::metadata::PageIndexPolicy;
use datafusion::physical_plan::metrics::ExecutionPlanMetricsSet;
use futures::TryStreamExt;
use wire::DAY_US;
use wire::schema::{DEVICE, RECEIVED_AT, SEQ, SPOOL, TS};

use super::super::asof::exec::greater;
use crate::cold::typed;
use crate::fused_table::hot_columns;

const ORDER: [&str; 5] = [TS, DEVICE, RECEIVED_AT, SPOOL, SEQ];

/// What tells which of two rows is newer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Age {
    ts: Option<i64>,
    received_at: Option<i64>,
    spool: Option<Box<str>>,
    seq: Option<i64>,
}

/// The columns of a batch that tell it.
pub(super) struct Ages {
    ts: TimestampMicrosecondArray,
    pub(super) device: StringArray,
    received_at: TimestampMicrosecondArray,
    spool: StringArray,
    seq: Int64Array,
}

impl Ages {
    pub(super) fn of(rows: &RecordBatch) -> Result<Self> {
        let column = |name: &str, kind: &DataType| -> Result<ArrayRef> {
            let column = rows.column_by_name(name).ok_or_else(|| exec_datafusion_err!("rows have no column {name}"))?;
            Ok(if column.data_type() == kind { Arc::clone(column) } else { cast(column, kind)? })
        };
        let instant = wire::schema::timestamp_type();
        Ok(Self {
            ts: column(TS, &instant)?.as_primitive::<TimestampMicrosecondType>().clone(),
            device: column(DEVICE, &DataType::Utf8)?.as_string::<i32>().clone(),
            received_at: column(RECEIVED_AT, &instant)?.as_primitive::<TimestampMicrosecondType>().clone(),
            spool: column(SPOOL, &DataType::Utf8)?.as_string::<i32>().clone(),
            seq: column(SEQ, &DataType::Int64)?.as_primitive::<Int64Type>().clone(),
        })
    }

    pub(super) fn len(&self) -> usize {
        self.ts.len()
    }

    pub(super) fn device(&self, row: usize) -> Option<&str> {
        self.device.is_valid(row).then(|| self.device.value(row))
    }

    pub(super) fn age(&self, row: usize) -> Age {
        Age {
            ts: self.ts.is_valid(row).then(|| self.ts.value(row)),
            received_at: self.received_at.is_valid(row).then(|| self.received_at.value(row)),
            spool: self.spool.is_valid(row).then(|| self.spool.value(row).into()),
            seq: self.seq.is_valid(row).then(|| self.seq.value(row)),
        }
    }

    /// How a row compares to an age, looking only as far as it must.
    pub(super) fn compare(&self, row: usize, age: &Age) -> Ordering {
        let ts = self.ts.is_valid(row).then(|| self.ts.value(row));
        ts.cmp(&age.ts).then_with(|| self.age(row).cmp(age))
    }
}

/// The winner of a device.
#[derive(Debug, Clone)]
struct Winner {
    age: Age,
    /// Where it lies: a batch, and a row of it.
    place: (usize, usize),
}

/// The devices of a set of rows, and which is which.
#[derive(Debug, Clone, Default)]
pub(super) struct Devices {
    named: HashMap<Box<str>, u32>,
    nameless: Option<u32>,
    count: u32,
    bytes: usize,
}

impl Devices {
    pub(super) fn get(&self, device: Option<&str>) -> Option<usize> {
        let found = match device {
            Some(device) => self.named.get(device).copied(),
            None => self.nameless,
        };
        found.map(|index| index as usize)
    }

    fn get_or_add(&mut self, device: Option<&str>) -> usize {
        if let Some(found) = self.get(device) {
            return found;
        }
        let index = self.count;
        self.count += 1;
        match device {
            Some(device) => {
                // The text, its pointer and length, the number, and the room that a hash table keeps free.
                self.bytes += device.len() + 48;
                self.named.insert(device.into(), index);
            }
            None => self.nameless = Some(index),
        }
        index as usize
    }

    pub(super) fn len(&self) -> usize {
        self.count as usize
    }
}

/// Takes rows in and keeps the newest of each device.
#[derive(Debug)]
pub(super) struct Newest {
    schema: SchemaRef,
    devices: Devices,
    /// One per device.
    winners: Vec<Winner>,
    batches: Vec<RecordBatch>,
    /// Most bytes of devices, winners and batches together.
    bytes_max: usize,
}

/// The newest row of each device: row `i` is that of device `i`.
#[derive(Debug)]
pub(super) struct Rows {
    pub(super) rows: RecordBatch,
    pub(super) devices: Devices,
    pub(super) ages: Vec<Age>,
}

impl Rows {
    /// Memory that they hold.
    pub(super) fn bytes(&self) -> usize {
        self.rows.get_array_memory_size() + self.devices.bytes + self.ages.len() * (size_of::<Age>() + 40)
    }

    /// Whether one of them is of one of these dates, days since 1970.
    pub(super) fn lie_on(&self, dates: &HashSet<i64>) -> bool {
        let is_there = |age: &Age| age.ts.is_none_or(|ts| dates.contains(&ts.div_euclid(DAY_US)));
        !dates.is_empty() && self.ages.iter().any(is_there)
    }
}

impl Newest {
    pub(super) fn new(schema: SchemaRef, bytes_max: usize) -> Self {
        Self { schema, devices: Devices::default(), winners: Vec::new(), batches: Vec::new(), bytes_max }
    }

    /// From what was known before, whose rows have these columns already.
    pub(super) fn from(known: &Rows, rows: RecordBatch, bytes_max: usize) -> Self {
        let winners = known.ages.iter().enumerate();
        let winners = winners.map(|(row, age)| Winner { age: age.clone(), place: (0, row) }).collect();
        let devices = known.devices.clone();
        Self { schema: rows.schema(), devices, winners, batches: vec![rows], bytes_max }
    }

    /// Takes in a batch whole.
    pub(super) fn add(&mut self, rows: RecordBatch) -> Result<()> {
        let ages = Ages::of(&rows)?;
        let batch = self.batches.len();
        self.batches.push(rows);
        for row in 0..ages.len() {
            let index = self.devices.get_or_add(ages.device(row));
            let Some(winner) = self.winners.get_mut(index) else {
                self.winners.push(Winner { age: ages.age(row), place: (batch, row) });
                continue;
            };
            let newer = match ages.compare(row, &winner.age) {
                Ordering::Equal => greater(&self.batches[batch], row, &self.batches[winner.place.0], winner.place.1),
                ordering => ordering == Ordering::Greater,
            };
            if newer {
                *winner = Winner { age: ages.age(row), place: (batch, row) };
            }
        }
        self.check()
    }

    /// Takes in a file of the table.
    pub(super) async fn add_file(&mut self, store: &Arc<dyn ObjectStore>, path: &Path, bytes: u64) -> Result<()> {
        let metrics = ExecutionPlanMetricsSet::new();
        let files = DefaultParquetFileReaderFactory::new(Arc::clone(store));
        let open = || -> Result<Box<dyn AsyncFileReader>> {
            Ok(files.create_reader(0, PartitionedFile::new(path.to_string(), bytes), None, &metrics)?)
        };
        let mut reader = open()?;
        let options = ArrowReaderOptions::new().with_page_index_policy(PageIndexPolicy::Optional);
        let metadata = ArrowReaderMetadata::load_async(&mut reader, options).await?;
        let rows = self.newer_in(ParquetRecordBatchStreamBuilder::new_with_metadata(reader, metadata.clone())).await?;
        if rows.is_empty() {
            return Ok(());
        }
        let total = usize::try_from(metadata.metadata().file_metadata().num_rows()).unwrap_or(0);
        let selection = RowSelection::from_consecutive_ranges(rows.into_iter().map(|row| row..row + 1), total);
        let builder =
            ParquetRecordBatchStreamBuilder::new_with_metadata(open()?, metadata).with_row_selection(selection);
        let mut batches = builder.build()?;
        while let Some(batch) = batches.try_next().await? {
            self.add(hot_columns(&typed(&batch, &self.schema)?, &self.schema)?)?;
        }
        Ok(())
    }

    /// Rows of a file that may be winners, ascending: newer than what is known, and than the others of the file.
    async fn newer_in(&self, builder: ParquetRecordBatchStreamBuilder<Box<dyn AsyncFileReader>>) -> Result<Vec<usize>> {
        let mask = ProjectionMask::columns(builder.parquet_schema(), ORDER);
        let mut batches = builder.with_projection(mask).with_batch_size(8_192).build()?;
        // Of this file; rows that are equal in everything that tells an age are all read.
        let mut here: HashMap<Option<Box<str>>, (Age, Vec<usize>)> = HashMap::new();
        let mut first = 0;
        while let Some(batch) = batches.try_next().await? {
            let ages = Ages::of(&batch)?;
            let mut row = 0;
            while row < ages.len() {
                let device = ages.device(row);
                let known = self.devices.get(device).map(|index| &self.winners[index].age);
                // Files are sorted by device: its rows come one after the other.
                let mut best: Option<(Age, Vec<usize>)> = None;
                while row < ages.len() && ages.device(row) == device {
                    let against = best.as_ref().map(|(age, _)| age).or(known);
                    match against.map_or(Ordering::Greater, |age| ages.compare(row, age)) {
                        Ordering::Greater => best = Some((ages.age(row), vec![first + row])),
                        Ordering::Equal => match &mut best {
                            Some((_, rows)) => rows.push(first + row),
                            None => best = Some((ages.age(row), vec![first + row])),
                        },
                        Ordering::Less => {}
                    }
                    row += 1;
                }
                let Some((age, rows)) = best else {
                    continue;
                };
                let held = here.entry(device.map(Into::into)).or_insert_with(|| (age.clone(), Vec::new()));
                match age.cmp(&held.0) {
                    Ordering::Greater => *held = (age, rows),
                    Ordering::Equal => held.1.extend(rows),
                    Ordering::Less => {}
                }
                if here.len() > self.bytes_max / 64 {
                    return too_many(self.bytes_max);
                }
            }
            first += batch.num_rows();
        }
        let mut rows: Vec<usize> = here.into_values().flat_map(|(_, rows)| rows).collect();
        rows.sort_unstable();
        Ok(rows)
    }

    /// Keeps within the limit: losers go first, then the statement.
    fn check(&mut self) -> Result<()> {
        if self.bytes() <= self.bytes_max {
            return Ok(());
        }
        self.compact()?;
        if self.bytes() > self.bytes_max { too_many(self.bytes_max) } else { Ok(()) }
    }

    fn bytes(&self) -> usize {
        let rows: usize = self.batches.iter().map(RecordBatch::get_array_memory_size).sum();
        rows + self.devices.bytes + self.winners.len() * (size_of::<Winner>() + 40)
    }

    fn compact(&mut self) -> Result<()> {
        let rows = self.together()?;
        self.batches = vec![rows];
        self.winners.iter_mut().enumerate().for_each(|(row, winner)| winner.place = (0, row));
        Ok(())
    }

    fn together(&self) -> Result<RecordBatch> {
        if self.winners.is_empty() {
            return Ok(RecordBatch::new_empty(Arc::clone(&self.schema)));
        }
        let batches: Vec<&RecordBatch> = self.batches.iter().collect();
        let places: Vec<(usize, usize)> = self.winners.iter().map(|winner| winner.place).collect();
        Ok(interleave_record_batch(&batches, &places)?)
    }

    pub(super) fn finish(self) -> Result<Rows> {
        let rows = self.together()?;
        let ages = self.winners.into_iter().map(|winner| winner.age).collect();
        Ok(Rows { rows, devices: self.devices, ages })
    }
}

fn too_many<T>(bytes_max: usize) -> Result<T> {
    exec_err!(
        "latest(…) may keep {bytes_max} bytes in memory, and this stream has more devices than fit; \
         give it more (latest_memory), or ask with last(v, ts) and GROUP BY device"
    )
}
