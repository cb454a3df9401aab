//! `weir retype`: a column of a table gets another type, and every row is looked at again (decision 0013).
//!
//! Each file is read and written anew, row by row in the same order, within the memory of one row group, while commits go
//! on. What fits the new type goes into the column, also what had to wait in `_rescued`; what does not goes out of it
//! ([`refit`], which is what hot rows and the WAL meet, too). One entry of the log then changes the column and puts the new
//! files into the place of all old ones. It is compare-and-swap: when others were faster, only what they added is
//! written, what they took away is forgotten, and it is tried again. Transactions stay as they are, so no batch is taken
//! twice. A process that is killed leaves the table as it was, and files that nothing names, for vacuum; or as it shall be.
//! While it runs it says so ([`crate::underway`]), or vacuum would take the first files before the last are written.
//!
//! It knows no node: a node that runs on the store sees the entry when it commits next, or looks next. Weir's own
//! streams keep their types, and so do timestamps and bytes, which only Weir itself writes.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use arrow_array::{Array, RecordBatch};
use wire::schema::{FieldType, StreamField, is_own_stream};
use wire::{DataFile, FieldName, StreamName};

use crate::compact::{CompactError, Merge, Pace, Progress};
use crate::delta::file::{FileWriter, PART, writer_properties};
use crate::delta::{CommitError, DeltaTable, FileError, TableError, TableSnapshot, date_text};
use crate::failpoint;
use crate::rescue::{refit, row_schema};
use crate::underway::Underway;

/// How often the entry is tried on a newer version.
const TRIES_MAX: usize = 200;

/// Why a column keeps its type.
#[derive(Debug, thiserror::Error)]
pub enum RetypeError {
    #[error("{0} is a stream of Weir's own: its columns keep the types that Weir writes")]
    Own(StreamName),
    #[error("{stream} has no field {column}; its fields are: {fields}")]
    NoField { stream: StreamName, column: FieldName, fields: String },
    #[error("{column} is {kind}, which only Weir itself writes: it keeps its type")]
    Fixed { column: FieldName, kind: FieldType },
    #[error("a field is float64, int64, bool or text, not {0}")]
    Kind(FieldType),
    #[error("others commit to {0} all the time: nothing has changed; try again")]
    Busy(StreamName),
    #[error("the log says that a file of {date} has {expected} rows, and it has {got}: see `weir verify`")]
    Rows { date: String, expected: u64, got: u64 },
    #[error(transparent)]
    Read(#[from] CompactError),
    #[error(transparent)]
    Write(#[from] FileError),
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error(transparent)]
    Table(#[from] TableError),
}

/// What it came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retyped {
    /// The column has the type. Values are those that are in it.
    Done { files: usize, rows: u64, values_before: u64, values_after: u64 },
    /// It had it before.
    Same,
}

/// A file of the table, written anew.
#[derive(Debug)]
struct Written {
    /// None for a file without rows.
    file: Option<DataFile>,
    values_before: u64,
    values_after: u64,
}

/// Gives a column another type. `progress` is told the rows that are done since it was told last. It may be dropped at any
/// moment.
///
/// # Errors
/// See [`RetypeError`]; what was written for it is left to vacuum.
pub async fn retype(
    table: &mut DeltaTable,
    column: &FieldName,
    kind: FieldType,
    pace: &mut Pace,
    progress: Progress<'_>,
) -> Result<Retyped, RetypeError> {
    let stream = table.stream().clone();
    check(&stream, kind)?;
    failpoint::reach("retype.planned");
    if with_kind(&table.snapshot(), &stream, column, kind)?.is_none() {
        return Ok(Retyped::Same);
    }
    let failed = |error: object_store::Error| TableError::delta(&stream, error.into());
    let store = table.snapshot().log_store.object_store(None);
    let mut underway = Underway::begin(store).await.map_err(failed)?;
    let mut work = Work { stream: &stream, pace, underway: &mut underway, progress };
    let retyped = swap(table, column, kind, &mut work).await;
    underway.end().await;
    retyped
}

/// How a rewrite goes on: within its share of a core, and telling so.
struct Work<'a> {
    stream: &'a StreamName,
    pace: &'a mut Pace,
    underway: &'a mut Underway,
    progress: Progress<'a>,
}

/// Writes the files, and puts them into the place of the others.
async fn swap(
    table: &mut DeltaTable,
    column: &FieldName,
    kind: FieldType,
    work: &mut Work<'_>,
) -> Result<Retyped, RetypeError> {
    let stream = work.stream;
    let mut written: HashMap<String, Written> = HashMap::new();
    for _ in 0..TRIES_MAX {
        let snapshot = table.snapshot();
        let Some(fields) = with_kind(&snapshot, stream, column, kind)? else {
            // Ours, when an answer got lost; or somebody else's.
            let ours = |file: &DataFile| snapshot.files.find(file.date, &file.path).is_some();
            let is_ours = !written.is_empty() && written.values().filter_map(|written| written.file.as_ref()).all(ours);
            return Ok(if is_ours { told(&written) } else { Retyped::Same });
        };
        let there: HashSet<&str> = snapshot.files.iter().map(|file| file.path.as_str()).collect();
        written.retain(|path, _| there.contains(path.as_str()));
        for file in snapshot.files.iter() {
            if !written.contains_key(&file.path) {
                let anew = rewrite(&snapshot, file, &fields, column, work).await?;
                written.insert(file.path.clone(), anew);
                failpoint::reach("retype.file");
            }
        }
        failpoint::reach("retype.done");
        let files = written.values().filter_map(|written| written.file.clone()).collect();
        match table.retype(&fields, files).await {
            Ok(_) => return Ok(told(&written)),
            Err(CommitError::Moved { .. }) => {}
            Err(error @ (CommitError::Unknown { .. } | CommitError::Store(_))) => {
                tracing::debug!(%stream, %error, "whether the column has changed is looked up");
            }
            Err(error) => return Err(error.into()),
        }
        table.reload().await?;
    }
    Err(RetypeError::Busy(stream.clone()))
}

fn check(stream: &StreamName, kind: FieldType) -> Result<(), RetypeError> {
    if is_own_stream(stream) {
        return Err(RetypeError::Own(stream.clone()));
    }
    match kind {
        FieldType::Float64 | FieldType::Int64 | FieldType::Bool | FieldType::Text => Ok(()),
        FieldType::Timestamp | FieldType::Binary => Err(RetypeError::Kind(kind)),
    }
}

/// The table's fields with another type of one of them; none when it has that type.
fn with_kind(
    snapshot: &TableSnapshot,
    stream: &StreamName,
    column: &FieldName,
    kind: FieldType,
) -> Result<Option<Vec<StreamField>>, RetypeError> {
    let mut fields = snapshot.fields.to_vec();
    let Some(field) = fields.iter_mut().find(|field| field.name == *column) else {
        let names: Vec<&str> = snapshot.fields.iter().map(|field| field.name.as_str()).collect();
        let (stream, column, fields) = (stream.clone(), column.clone(), names.join(", "));
        return Err(RetypeError::NoField { stream, column, fields });
    };
    if matches!(field.kind, FieldType::Timestamp | FieldType::Binary) {
        return Err(RetypeError::Fixed { column: column.clone(), kind: field.kind });
    }
    let before = std::mem::replace(&mut field.kind, kind);
    Ok((before != kind).then_some(fields))
}

fn told(written: &HashMap<String, Written>) -> Retyped {
    let sum = |of: fn(&Written) -> u64| written.values().map(of).sum();
    Retyped::Done {
        files: written.len(),
        rows: sum(|written| written.file.as_ref().and_then(|file| file.rows).unwrap_or(0)),
        values_before: sum(|written| written.values_before),
        values_after: sum(|written| written.values_after),
    }
}

/// The rows of a file in a new one, fitted to these fields.
async fn rewrite(
    snapshot: &TableSnapshot,
    file: &Arc<DataFile>,
    fields: &[StreamField],
    column: &FieldName,
    work: &mut Work<'_>,
) -> Result<Written, RetypeError> {
    let (stored, schema) = (row_schema(&snapshot.fields), row_schema(fields));
    let store = snapshot.log_store.object_store(None);
    let (mut rows, _) =
        Merge::open(&store, &stored, std::slice::from_ref(file), u64::MAX, work.pace, work.progress).await?;
    let mut writer = FileWriter::create(&store, &schema, &writer_properties(&schema), file.date, PART)?;
    let mut written = Written { file: None, values_before: 0, values_after: 0 };
    let mut count = 0;
    while let Some(before) = rows.next().await? {
        let after = refit(&before, fields);
        written.values_before += values(&before, column);
        written.values_after += values(&after, column);
        count += after.num_rows() as u64;
        writer.write(&after).await?;
        failpoint::reach("retype.writing");
        (work.progress)(after.num_rows() as u64);
        let failed = |error: object_store::Error| TableError::delta(work.stream, error.into());
        work.underway.goes_on().await.map_err(failed)?;
        work.pace.breathe().await;
    }
    if let Some(expected) = file.rows.filter(|expected| *expected != count) {
        return Err(RetypeError::Rows { date: date_text(file.date), expected, got: count });
    }
    if count > 0 {
        written.file = Some(writer.close().await?);
    }
    Ok(written)
}

fn values(rows: &RecordBatch, column: &FieldName) -> u64 {
    rows.column_by_name(column.as_str()).map_or(0, |column| (column.len() - column.null_count()) as u64)
}

#[cfg(test)]
mod tests;
