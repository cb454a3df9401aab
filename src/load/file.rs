//! The files that `weir load` reads: their columns with types, and their rows.
//!
//! Types of a CSV or NDJSON are those that all of its values have: int64, else float64, else bool (NDJSON), else text. A
//! number is one as JSON writes it, so `007` is text; an empty cell of a CSV is null. Of Parquet, integers, floats, texts,
//! times, dates and bytes are what they are, decimals are float64, everything else is its text.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type, Int64Type, TimestampMicrosecondType};
use cloud_ingest::doors::rows::Cell;
use flate2::read::MultiGzDecoder;
use indexmap::IndexMap;
use indicatif::ProgressBar;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use wire::FieldType;

/// Rows that are decoded at a time.
const PARQUET_ROWS: usize = 8_192;
/// A line of NDJSON, or a row of a CSV, at most.
const LINE_BYTES_MAX: u64 = 16 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Csv,
    Json,
    Parquet,
}

/// A file whose bytes and columns are known.
#[derive(Debug)]
pub(super) struct Input {
    path: PathBuf,
    format: Format,
    is_gzip: bool,
    /// In order; those of which all values are null are text.
    pub(super) columns: Vec<(String, FieldType)>,
    /// SHA-256 of the file as it lies there.
    pub(super) hash: [u8; 32],
    bytes: u64,
}

/// What a row of a file is.
#[derive(Debug)]
pub(super) enum Found<'a> {
    /// A value for each column.
    Row(&'a [Option<Cell<'a>>]),
    Bad {
        detail: String,
        payload: Vec<u8>,
    },
}

/// Reads a file, and keeps a hash of what was read.
struct Hashed<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        Ok(count)
    }
}

impl Input {
    /// Reads all of it once.
    pub(super) fn survey(path: &Path, bar: &ProgressBar) -> anyhow::Result<Self> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let is_gzip = name.ends_with(".gz");
        let format = match name.trim_end_matches(".gz").rsplit('.').next().unwrap_or_default() {
            "csv" => Format::Csv,
            "ndjson" | "jsonl" => Format::Json,
            "parquet" if !is_gzip => Format::Parquet,
            _ => bail!("the name must end in .parquet, or in .csv, .ndjson or .jsonl with .gz or not"),
        };
        let file = File::open(path).context("open it")?;
        let bytes = file.metadata().context("open it")?.len();
        bar.set_length(bytes);
        bar.set_message("reading");
        let mut input = Self { path: path.to_owned(), format, is_gzip, columns: Vec::new(), hash: [0; 32], bytes };
        let mut file = Hashed { inner: bar.wrap_read(file), hash: Sha256::new() };
        input.columns = match format {
            Format::Csv => csv_columns(unpacked(&mut file, is_gzip))?,
            Format::Json => json_columns(unpacked(&mut file, is_gzip))?,
            Format::Parquet => parquet_columns(path)?,
        };
        std::io::copy(&mut file, &mut std::io::sink()).context("read it")?;
        input.hash = file.hash.finalize().into();
        Ok(input)
    }

    /// For people.
    pub(super) fn name(&self) -> String {
        self.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// Reads all rows, in order.
    pub(super) fn rows(
        &self,
        bar: &ProgressBar,
        each: &mut dyn FnMut(Found<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        bar.set_length(self.bytes);
        bar.set_position(0);
        bar.set_message("loading");
        let file = bar.wrap_read(File::open(&self.path).context("open it")?);
        match self.format {
            Format::Csv => self.csv_rows(unpacked(file, self.is_gzip), each),
            Format::Json => self.json_rows(unpacked(file, self.is_gzip), each),
            Format::Parquet => self.parquet_rows(bar, each),
        }
    }

    fn csv_rows<'r>(
        &self,
        reader: Box<dyn Read + 'r>,
        each: &mut dyn FnMut(Found<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut reader = csv_reader(reader);
        reader.byte_headers().context("read the header of the CSV")?;
        let mut record = csv::ByteRecord::new();
        while reader.read_byte_record(&mut record).context("read a row of the CSV")? {
            let bad = |detail: String| {
                let payload = record.iter().collect::<Vec<_>>().join(&b","[..]);
                Found::Bad { detail, payload }
            };
            if record.len() != self.columns.len() {
                each(bad(format!("{} cells under {} columns", record.len(), self.columns.len())))?;
                continue;
            }
            let cells = self.columns.iter().zip(record.iter()).map(|((_, kind), cell)| {
                let text = std::str::from_utf8(cell).ok()?;
                Some(csv_cell(text, *kind))
            });
            match cells.collect::<Option<Vec<_>>>() {
                Some(cells) => each(Found::Row(&cells))?,
                None => each(bad("a cell is not UTF-8".to_owned()))?,
            }
        }
        Ok(())
    }

    fn json_rows<'r>(
        &self,
        reader: Box<dyn Read + 'r>,
        each: &mut dyn FnMut(Found<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for_each_line(reader, &mut |line| {
            let row = match serde_json::from_slice::<Map<String, Value>>(line) {
                Ok(row) => row,
                Err(error) => {
                    return each(Found::Bad { detail: format!("no JSON object: {error}"), payload: line.to_vec() });
                }
            };
            // What is not a text here and has to be one there.
            let texts: Vec<Option<String>> =
                self.columns.iter().map(|(name, kind)| as_text(row.get(name), *kind)).collect();
            let cells = self.columns.iter().zip(&texts).map(|((name, kind), text)| {
                let text = text.as_deref().map(Cell::Text);
                text.or_else(|| json_cell(row.get(name)?, *kind))
            });
            let cells: Vec<_> = cells.collect();
            each(Found::Row(&cells))
        })
    }

    fn parquet_rows(
        &self,
        bar: &ProgressBar,
        each: &mut dyn FnMut(Found<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let builder = parquet_builder(&self.path)?;
        let all = builder.metadata().file_metadata().num_rows().max(1) as u64;
        let mut done = 0;
        for batch in builder.with_batch_size(PARQUET_ROWS).build().context("read the Parquet file")? {
            let batch = batch.context("read rows of the Parquet file")?;
            let columns = self.columns.iter().zip(batch.columns());
            let columns: Vec<ArrayRef> =
                columns.map(|((_, kind), column)| as_kind(column, *kind)).collect::<anyhow::Result<_>>()?;
            for row in 0..batch.num_rows() {
                let cells: Vec<_> = self
                    .columns
                    .iter()
                    .zip(&columns)
                    .map(|((_, kind), column)| arrow_cell(column, *kind, row))
                    .collect();
                each(Found::Row(&cells))?;
            }
            done += batch.num_rows() as u64;
            bar.set_position((u128::from(self.bytes) * u128::from(done) / u128::from(all)) as u64);
        }
        Ok(())
    }
}

fn unpacked<'r>(file: impl Read + 'r, is_gzip: bool) -> Box<dyn Read + 'r> {
    if is_gzip { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) }
}

fn csv_reader<'r>(reader: Box<dyn Read + 'r>) -> csv::Reader<Box<dyn Read + 'r>> {
    csv::ReaderBuilder::new().flexible(true).from_reader(reader)
}

/// What all values of a column are so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Kind {
    #[default]
    Null,
    Bool,
    Int,
    Float,
    Text,
}

impl Kind {
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Null, kind) | (kind, Self::Null) => kind,
            (one, other) if one == other => one,
            (Self::Int | Self::Float, Self::Int | Self::Float) => Self::Float,
            _ => Self::Text,
        }
    }

    fn field_type(self) -> FieldType {
        match self {
            Self::Bool => FieldType::Bool,
            Self::Int => FieldType::Int64,
            Self::Float => FieldType::Float64,
            Self::Null | Self::Text => FieldType::Text,
        }
    }
}

fn number(text: &str) -> Option<serde_json::Number> {
    // Cheaper than the parser for most texts.
    text.starts_with(|first: char| first == '-' || first.is_ascii_digit()).then(|| serde_json::from_str(text).ok())?
}

fn number_kind(number: &serde_json::Number) -> Kind {
    if number.is_i64() {
        Kind::Int
    } else if number.is_u64() {
        // As a float it would be another number.
        Kind::Text
    } else {
        Kind::Float
    }
}

fn csv_columns<'r>(reader: Box<dyn Read + 'r>) -> anyhow::Result<Vec<(String, FieldType)>> {
    let mut reader = csv_reader(reader);
    let header = reader.byte_headers().context("read the header of the CSV")?.clone();
    let mut kinds = vec![Kind::Null; header.len()];
    let mut record = csv::ByteRecord::new();
    while reader.read_byte_record(&mut record).context("read a row of the CSV")? {
        if record.len() != header.len() {
            continue;
        }
        for (kind, cell) in kinds.iter_mut().zip(&record) {
            let of_cell = match std::str::from_utf8(cell) {
                Ok("") => Kind::Null,
                Ok(text) if *kind != Kind::Text => number(text).map_or(Kind::Text, |number| number_kind(&number)),
                _ => Kind::Text,
            };
            *kind = kind.and(of_cell);
        }
    }
    let names = header.iter().map(|name| String::from_utf8_lossy(name).trim_start_matches('\u{feff}').to_owned());
    Ok(names.zip(kinds.into_iter().map(Kind::field_type)).collect())
}

fn csv_cell(text: &str, kind: FieldType) -> Option<Cell<'_>> {
    match kind {
        _ if text.is_empty() => None,
        FieldType::Int64 => text.parse().ok().map(Cell::Int),
        FieldType::Float64 => text.parse().ok().map(Cell::Float),
        _ => Some(Cell::Text(text)),
    }
}

fn for_each_line<'r>(
    reader: Box<dyn Read + 'r>,
    each: &mut dyn FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).context("read a line")?;
        if line.is_empty() {
            return Ok(());
        }
        if line.len() as u64 == LINE_BYTES_MAX {
            bail!("a line has more than {LINE_BYTES_MAX} bytes");
        }
        let text = line.trim_ascii();
        if !text.is_empty() {
            each(text)?;
        }
    }
}

fn json_columns<'r>(reader: Box<dyn Read + 'r>) -> anyhow::Result<Vec<(String, FieldType)>> {
    let mut kinds = IndexMap::<String, Kind>::new();
    for_each_line(reader, &mut |line| {
        // A bad line is told of when the rows are read.
        let Ok(row) = serde_json::from_slice::<Map<String, Value>>(line) else { return Ok(()) };
        for (name, value) in row {
            let of_value = match &value {
                Value::Null => Kind::Null,
                Value::Bool(_) => Kind::Bool,
                Value::Number(number) => number_kind(number),
                _ => Kind::Text,
            };
            let kind = kinds.entry(name).or_default();
            *kind = kind.and(of_value);
        }
        Ok(())
    })?;
    Ok(kinds.into_iter().map(|(name, kind)| (name, kind.field_type())).collect())
}

/// A value as text where the column is text and it is none.
fn as_text(value: Option<&Value>, kind: FieldType) -> Option<String> {
    match value? {
        Value::Null | Value::String(_) => None,
        other => (kind == FieldType::Text).then(|| other.to_string()),
    }
}

fn json_cell(value: &Value, kind: FieldType) -> Option<Cell<'_>> {
    match kind {
        FieldType::Bool => value.as_bool().map(Cell::Bool),
        FieldType::Int64 => value.as_i64().map(Cell::Int),
        FieldType::Float64 => value.as_f64().map(Cell::Float),
        _ => value.as_str().map(Cell::Text),
    }
}

fn parquet_builder(path: &Path) -> anyhow::Result<ParquetRecordBatchReaderBuilder<File>> {
    let file = File::open(path).context("open it")?;
    ParquetRecordBatchReaderBuilder::try_new(file).context("read the end of the Parquet file")
}

fn parquet_columns(path: &Path) -> anyhow::Result<Vec<(String, FieldType)>> {
    let builder = parquet_builder(path)?;
    let kind = |data_type: &DataType| match data_type {
        DataType::Boolean => FieldType::Bool,
        // Above an int64 a value would become null.
        DataType::UInt64 => FieldType::Text,
        kind if kind.is_integer() => FieldType::Int64,
        kind if kind.is_floating() || kind.is_decimal() => FieldType::Float64,
        DataType::Timestamp(..) | DataType::Date32 | DataType::Date64 => FieldType::Timestamp,
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_) => {
            FieldType::Binary
        }
        _ => FieldType::Text,
    };
    Ok(builder.schema().fields().iter().map(|field| (field.name().clone(), kind(field.data_type()))).collect())
}

/// Lists and structures are their JSON.
fn as_kind(column: &ArrayRef, kind: FieldType) -> anyhow::Result<ArrayRef> {
    let wanted = kind.arrow();
    if *column.data_type() == wanted {
        return Ok(Arc::clone(column));
    }
    if column.data_type().is_nested() {
        let rows = RecordBatch::try_from_iter([("value", Arc::clone(column))])?;
        let mut out = arrow::json::LineDelimitedWriter::new(Vec::new());
        out.write(&rows)?;
        out.finish()?;
        let text = String::from_utf8(out.into_inner())?;
        let value =
            |line: &str| serde_json::from_str::<Value>(line).ok().and_then(|row| Some(row.get("value")?.to_string()));
        return Ok(Arc::new(text.lines().map(value).collect::<arrow::array::StringArray>()));
    }
    cast(column, &wanted).with_context(|| format!("read a column of {} as {kind}", column.data_type()))
}

fn arrow_cell(column: &ArrayRef, kind: FieldType, row: usize) -> Option<Cell<'_>> {
    if column.is_null(row) {
        return None;
    }
    Some(match kind {
        FieldType::Bool => Cell::Bool(column.as_boolean().value(row)),
        FieldType::Int64 => Cell::Int(column.as_primitive::<Int64Type>().value(row)),
        FieldType::Float64 => Cell::Float(column.as_primitive::<Float64Type>().value(row)),
        FieldType::Timestamp => Cell::Time(column.as_primitive::<TimestampMicrosecondType>().value(row)),
        FieldType::Binary => Cell::Bytes(column.as_binary::<i32>().value(row)),
        FieldType::Text => Cell::Text(column.as_string::<i32>().value(row)),
    })
}
