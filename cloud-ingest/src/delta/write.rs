//! Rows into Parquet files, one per date, sorted by device and time.
//!
//! Zstandard; `ts` and integers DELTA_BINARY_PACKED; text and floats with dictionaries. Statistics for `ts` and
//! `device` alone, per page too: the rows are sorted by them. One file is open at a time; its encoded rows wait in
//! memory until it is closed. All of it runs on a thread where computing may take long.

use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::{DataType, Schema, SchemaRef};
use arrow_select::interleave::interleave;
use buoyant_kernel::expressions::Scalar;
use buoyant_kernel::table_properties::DataSkippingNumIndexedCols;
use deltalake_core::DeltaTableError;
use deltalake_core::datafile::writer::{PartitionWriter, PartitionWriterConfig};
use deltalake_core::kernel::Add;
use deltalake_core::logstore::ObjectStoreRef;
use indexmap::IndexMap;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::metadata::SortingColumn;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;
use wire::schema::{DATE, DEVICE, TS};

use super::TableSnapshot;
use super::order::{Row, order};
use crate::rescue::row_schema;

/// Rows gathered at a time on their way into a file.
const CHUNK_ROWS: usize = 65_536;
const ZSTD_LEVEL: i32 = 1;

/// Writes rows into files of the table, synced; they are part of it only when their adds are committed.
pub(super) async fn write_rows(snapshot: &TableSnapshot, rows: &[RecordBatch]) -> Result<Vec<Add>, DeltaTableError> {
    if rows.iter().all(|batch| batch.num_rows() == 0) {
        return Ok(Vec::new());
    }
    let schema = row_schema(&snapshot.fields);
    if let Some(batch) = rows.iter().find(|batch| batch.schema_ref() != &schema) {
        let msg = format!("rows with {:?} for a table with {schema:?}", batch.schema_ref());
        return Err(DeltaTableError::SchemaMismatch { msg });
    }
    let rows = rows.to_vec();
    let store = snapshot.log_store.object_store(None);
    let runtime = tokio::runtime::Handle::current();
    let write = move || runtime.block_on(write_files(&store, &schema, &rows));
    tokio::task::spawn_blocking(write).await.map_err(|error| DeltaTableError::Generic(error.to_string()))?
}

async fn write_files(
    store: &ObjectStoreRef,
    schema: &SchemaRef,
    rows: &[RecordBatch],
) -> Result<Vec<Add>, DeltaTableError> {
    let properties = writer_properties(schema);
    let order = order(rows);
    let mut adds = Vec::with_capacity(order.dates.len());
    for (date, range) in order.dates {
        let partition = IndexMap::from([(DATE.to_owned(), Scalar::Date(date))]);
        let config = PartitionWriterConfig::try_new(
            schema.clone(),
            partition,
            Some(properties.clone()),
            None,
            None,
            None,
            None,
        )?;
        let statistics = vec![TS.to_owned(), DEVICE.to_owned()];
        let columns = DataSkippingNumIndexedCols::NumColumns(0);
        let mut writer = PartitionWriter::try_with_config(store.clone(), config, columns, Some(statistics))?;
        for chunk in order.rows[range].chunks(CHUNK_ROWS) {
            let gathered = gather(schema, rows, chunk)?;
            if let Err(error) = writer.write(&gathered).await {
                // What is staged is removed; the first error is the one to tell.
                let _ = writer.abort().await;
                return Err(error);
            }
        }
        adds.extend(writer.close().await?);
    }
    Ok(adds)
}

/// These rows of the batches, in this order, as one batch.
fn gather(schema: &SchemaRef, batches: &[RecordBatch], rows: &[Row]) -> Result<RecordBatch, DeltaTableError> {
    let places: Vec<(usize, usize)> = rows.iter().map(|row| (row.batch as usize, row.row as usize)).collect();
    let gather_column = |index: usize| {
        let parts: Vec<&dyn arrow_array::Array> = batches.iter().map(|batch| batch.column(index).as_ref()).collect();
        interleave(&parts, &places)
    };
    let columns = (0..schema.fields().len()).map(gather_column).collect::<Result<Vec<ArrayRef>, _>>()?;
    Ok(RecordBatch::try_new(schema.clone(), columns)?)
}

fn writer_properties(schema: &Schema) -> WriterProperties {
    let zstd = ZstdLevel::try_new(ZSTD_LEVEL).expect("the level is one of Zstandard's");
    let index = |name| schema.index_of(name).expect("every table has it") as i32;
    let by = |name| SortingColumn { column_idx: index(name), descending: false, nulls_first: true };
    let mut properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(zstd))
        .set_statistics_enabled(EnabledStatistics::None)
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
