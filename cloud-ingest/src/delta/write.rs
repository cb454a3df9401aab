//! Rows of a commit into files, one per date, sorted by device and time. All of it runs on a thread where computing may
//! take long. One file is open at a time.

use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::SchemaRef;
use arrow_select::interleave::interleave;
use deltalake_core::logstore::ObjectStoreRef;
use wire::DataFile;

use super::file::{FileWriter, PART, writer_properties};
use super::order::{Row, order};
use super::{RowsError, TableSnapshot};
use crate::rescue::row_schema;

/// Rows gathered at a time on their way into a file.
const CHUNK_ROWS: usize = 65_536;

/// Writes rows into files of the table, synced; they are part of it only when they are committed.
pub(super) async fn write_rows(snapshot: &TableSnapshot, rows: &[RecordBatch]) -> Result<Vec<DataFile>, RowsError> {
    if rows.iter().all(|batch| batch.num_rows() == 0) {
        return Ok(Vec::new());
    }
    let schema = row_schema(&snapshot.fields);
    if let Some(batch) = rows.iter().find(|batch| batch.schema_ref() != &schema) {
        return Err(RowsError::Schema(format!("rows with {:?} for a table with {schema:?}", batch.schema_ref())));
    }
    let rows = rows.to_vec();
    let store = snapshot.log_store.object_store(None);
    let runtime = tokio::runtime::Handle::current();
    let write = move || runtime.block_on(write_files(&store, &schema, &rows));
    tokio::task::spawn_blocking(write).await.map_err(|error| RowsError::Thread(error.to_string()))?
}

async fn write_files(
    store: &ObjectStoreRef,
    schema: &SchemaRef,
    rows: &[RecordBatch],
) -> Result<Vec<DataFile>, RowsError> {
    let properties = writer_properties(schema);
    let order = order(rows);
    let mut files = Vec::with_capacity(order.dates.len());
    for (date, range) in order.dates {
        let mut writer = FileWriter::create(store, schema, &properties, date, PART)?;
        for chunk in order.rows[range].chunks(CHUNK_ROWS) {
            writer.write(&gather(schema, rows, chunk)?).await?;
        }
        files.push(writer.close().await?);
    }
    Ok(files)
}

/// These rows of the batches, in this order, as one batch.
fn gather(schema: &SchemaRef, batches: &[RecordBatch], rows: &[Row]) -> Result<RecordBatch, arrow_schema::ArrowError> {
    let places: Vec<(usize, usize)> = rows.iter().map(|row| (row.batch as usize, row.row as usize)).collect();
    let gather_column = |index: usize| {
        let parts: Vec<&dyn arrow_array::Array> = batches.iter().map(|batch| batch.column(index).as_ref()).collect();
        interleave(&parts, &places)
    };
    let columns = (0..schema.fields().len()).map(gather_column).collect::<Result<Vec<ArrayRef>, _>>()?;
    RecordBatch::try_new(schema.clone(), columns)
}
