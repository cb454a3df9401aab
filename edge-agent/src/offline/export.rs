//! `edge-agent spool export`: the rows that the cloud has not committed, as Parquet files, one for each stream.
//!
//! A stream whose schema has grown has all columns that it ever had, null where a row is older. Where a column has changed
//! its type the later rows go to a file of their own, `<stream>-2.parquet`: nothing is converted. A file is written under
//! another name and gets its own when it is whole and synced; one that is there already is never replaced. Rows are in the
//! order in which they came. Memory: one batch, and a row group of at most 8 MiB.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use arrow_array::{RecordBatch, new_null_array};
use arrow_schema::{Field, Schema, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::properties::WriterProperties;
use parquet::schema::types::ColumnPath;
use segment_log::FileLayer;
use wire::{CutBatch, SchemaId, StreamName, StreamSchema};

use crate::spool::{Spool, SpoolError};

/// What a writer may hold before it begins another row group.
const GROUP_BYTES: usize = 8 << 20;
const GROUP_ROWS: usize = 1 << 17;

/// What was written.
#[derive(Debug, Default)]
pub(super) struct Exported {
    pub(super) files: Vec<(PathBuf, u64)>,
    /// Batches that cannot be read, or whose schema is not there.
    pub(super) left_out: u64,
}

/// Writes all; `progress` hears of each batch's rows.
pub(super) fn write<L: FileLayer>(
    spool: &mut Spool<L>,
    out: &Path,
    mut progress: impl FnMut(&StreamName, u64),
) -> anyhow::Result<Exported> {
    fs::create_dir_all(out).with_context(|| format!("make {}", out.display()))?;
    let mut exported = Exported::default();
    for stream in spool.streams() {
        let mut files = files_of(spool, &stream, out)?;
        exported.left_out += spool.each(&stream, |spool, batch| {
            progress(&stream, u64::from(batch.rows));
            match decode(spool, &batch) {
                Some((schema, rows)) => put(&mut files, schema, &rows).map(|()| true),
                None => Ok(false),
            }
        })?;
        for file in files {
            exported.files.push(file.finish()?);
        }
    }
    if !exported.files.is_empty() {
        File::open(out).and_then(|directory| directory.sync_all()).context("sync the directory of the export")?;
    }
    Ok(exported)
}

fn schema_of<L: FileLayer>(spool: &Spool<L>, id: SchemaId) -> Option<StreamSchema> {
    spool.schema(id).and_then(|text| StreamSchema::parse(text).ok())
}

fn decode<L: FileLayer>(spool: &Spool<L>, batch: &CutBatch) -> Option<(SchemaId, RecordBatch)> {
    let schema = schema_of(spool, batch.schema)?;
    Some((batch.schema, batch.decode(&schema).ok()?))
}

fn put(files: &mut [StreamFile], schema: SchemaId, rows: &RecordBatch) -> anyhow::Result<()> {
    let file = files.iter_mut().find(|file| file.schemas.contains(&schema));
    file.context("a schema that was not there before")?.write(rows)
}

/// The files that a stream needs, by a first look at all its batches.
fn files_of<L: FileLayer>(spool: &mut Spool<L>, stream: &StreamName, out: &Path) -> anyhow::Result<Vec<StreamFile>> {
    let mut kinds = Vec::<(Vec<SchemaId>, Schema)>::new();
    spool.each(stream, |spool, batch| {
        if kinds.iter().all(|(schemas, _)| !schemas.contains(&batch.schema))
            && let Some(schema) = schema_of(spool, batch.schema)
        {
            let fields = schema.arrow();
            match kinds.iter_mut().find_map(|(schemas, kind)| Some((schemas, together(kind, fields)?, kind))) {
                Some((schemas, merged, kind)) => {
                    schemas.push(batch.schema);
                    *kind = merged;
                }
                None => kinds.push((vec![batch.schema], fields.as_ref().clone())),
            }
        }
        Ok::<_, SpoolError>(true)
    })?;
    let named = kinds.into_iter().enumerate().map(|(index, (schemas, schema))| {
        let name = match index {
            0 => format!("{stream}.parquet"),
            index => format!("{stream}-{}.parquet", index + 1),
        };
        StreamFile::begin(out.join(name), schemas, Arc::new(schema))
    });
    named.collect()
}

/// The columns of both, the new ones before `quality`, which stays the last; none when a column has two types.
fn together(one: &Schema, other: &Schema) -> Option<Schema> {
    let mut fields = one.fields().iter().cloned().collect::<Vec<_>>();
    for field in other.fields() {
        match one.field_with_name(field.name()) {
            Ok(known) if known.data_type() != field.data_type() => return None,
            Ok(_) => {}
            Err(_) => {
                let last = fields.len().saturating_sub(1);
                fields.insert(last, Arc::new(Field::clone(field).with_nullable(true)));
            }
        }
    }
    Some(Schema::new(fields))
}

/// One file that is being written.
struct StreamFile {
    path: PathBuf,
    /// Its name until it is whole.
    unfinished: PathBuf,
    schemas: Vec<SchemaId>,
    schema: SchemaRef,
    writer: ArrowWriter<File>,
    rows: u64,
}

impl StreamFile {
    fn begin(path: PathBuf, schemas: Vec<SchemaId>, schema: SchemaRef) -> anyhow::Result<Self> {
        if path.try_exists()? {
            bail!("{} is there already: export to another directory", path.display());
        }
        let unfinished = path.with_extension("parquet.unfinished");
        let file = File::create(&unfinished).with_context(|| format!("make {}", unfinished.display()))?;
        let ts = ColumnPath::from(wire::schema::TS);
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?))
            .set_max_row_group_row_count(Some(GROUP_ROWS))
            .set_column_dictionary_enabled(ts.clone(), false)
            .set_column_encoding(ts, Encoding::DELTA_BINARY_PACKED)
            .build();
        let options = ArrowWriterOptions::new().with_properties(properties).with_skip_arrow_metadata(true);
        let writer = ArrowWriter::try_new_with_options(file, Arc::clone(&schema), options)?;
        Ok(Self { path, unfinished, schemas, schema, writer, rows: 0 })
    }

    fn write(&mut self, rows: &RecordBatch) -> anyhow::Result<()> {
        let column = |field: &Arc<Field>| {
            let column = rows.column_by_name(field.name()).cloned();
            column.unwrap_or_else(|| new_null_array(field.data_type(), rows.num_rows()))
        };
        let columns = self.schema.fields().iter().map(column).collect();
        self.writer.write(&RecordBatch::try_new(Arc::clone(&self.schema), columns)?)?;
        self.rows += rows.num_rows() as u64;
        if self.writer.in_progress_size() > GROUP_BYTES {
            self.writer.flush()?;
        }
        Ok(())
    }

    fn finish(self) -> anyhow::Result<(PathBuf, u64)> {
        let file = self.writer.into_inner().with_context(|| format!("write {}", self.unfinished.display()))?;
        file.sync_all().with_context(|| format!("sync {}", self.unfinished.display()))?;
        fs::rename(&self.unfinished, &self.path).with_context(|| format!("name {}", self.path.display()))?;
        Ok((self.path, self.rows))
    }
}
