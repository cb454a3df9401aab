//! One entry of a table's log: read from its JSON lines, and written as them. Pure.
//!
//! Only what Weir needs is read: files that come and go, transactions, and whether the table itself was changed
//! (`metaData`, `protocol`), after which it is opened anew. Lines of other kinds are left alone. What is written follows
//! the Delta protocol, reader version 1 and writer version 2: `commitInfo` first, then transactions, removed files, added
//! files, one JSON object a line. Statistics of a file are `numRecords`, and bounds and nulls of `ts` and `device`; times
//! in them are to the microsecond. Those of other writers end at the millisecond, rounded down, which is made up for.
//! The tag [`CRC`] of an added file is the CRC32C of its bytes, eight hexadecimal digits.

use std::sync::Arc;

use bytes::Bytes;
use chrono::{DateTime, NaiveDate, SecondsFormat};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use wire::DataFile;
use wire::schema::{DATE, DEVICE, TS};

/// Longer names of devices do not become statistics.
const DEVICE_BYTES_MAX: usize = 256;
/// What a bound in whole milliseconds may have lost.
const ROUNDED_US: i64 = 999;
/// The tag that says what the bytes of a file are.
pub(super) const CRC: &str = "weir.crc32c";

/// Why an entry of a log is not understood.
#[derive(Debug, thiserror::Error)]
pub enum EntryError {
    #[error("its JSON")]
    Json(#[from] serde_json::Error),
    #[error("file {path}: {detail}")]
    File { path: String, detail: &'static str },
}

/// What one entry changes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) added: Vec<DataFile>,
    /// Paths.
    pub(super) removed: Vec<String>,
    /// `appId` and version.
    pub(super) transactions: Vec<(String, i64)>,
    /// Its columns or its protocol are others from here on.
    pub(super) changes_table: bool,
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow)]
    add: Option<AddLine<'a>>,
    remove: Option<PathLine>,
    txn: Option<TransactionLine>,
    #[serde(rename = "metaData", borrow)]
    metadata: Option<&'a serde_json::value::RawValue>,
    #[serde(borrow)]
    protocol: Option<&'a serde_json::value::RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AddLine<'a> {
    path: String,
    partition_values: std::collections::HashMap<String, Option<String>>,
    size: u64,
    modification_time: i64,
    stats: Option<String>,
    tags: Option<std::collections::HashMap<String, Option<String>>>,
    #[serde(borrow)]
    deletion_vector: Option<&'a serde_json::value::RawValue>,
}

#[derive(Deserialize)]
struct PathLine {
    path: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TransactionLine {
    app_id: String,
    version: i64,
}

impl Entry {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, EntryError> {
        let mut entry = Self::default();
        for line in bytes.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty()) {
            let line: Line<'_> = serde_json::from_slice(line)?;
            if let Some(add) = line.add {
                let date = add.partition_values.get(DATE).and_then(Option::as_deref);
                let vector = add.deletion_vector.is_some();
                let stats = add.stats.as_deref();
                let file = data_file(add.path, date, add.size, add.modification_time, stats, vector)?;
                let crc = add.tags.as_ref().and_then(|tags| crc_of(tags.get(CRC)?.as_deref()?));
                entry.added.push(DataFile { crc, ..file });
            }
            if let Some(remove) = line.remove {
                entry.removed.push(remove.path);
            }
            if let Some(transaction) = line.txn {
                entry.transactions.push((transaction.app_id, transaction.version));
            }
            entry.changes_table |= line.metadata.is_some() || line.protocol.is_some();
        }
        Ok(entry)
    }
}

/// The value of the tag [`CRC`]; one that is none says nothing.
pub(super) fn crc_of(tag: &str) -> Option<u32> {
    u32::from_str_radix(tag, 16).ok()
}

/// A file as the log describes it, but for its tags.
pub(super) fn data_file(
    path: String,
    date: Option<&str>,
    bytes: u64,
    modified_ms: i64,
    stats: Option<&str>,
    deletion_vector: bool,
) -> Result<DataFile, EntryError> {
    if deletion_vector {
        // Its rows are not all rows of the table, and nothing here would leave them out.
        return Err(EntryError::File { path, detail: "it has a deletion vector" });
    }
    let Some(date) = date.and_then(|date| date.parse::<NaiveDate>().ok()) else {
        return Err(EntryError::File { path, detail: "it has no _date" });
    };
    // Statistics that cannot be read are as good as none.
    let stats: Stats = stats.and_then(|stats| serde_json::from_str(stats).ok()).unwrap_or_default();
    let date = date.to_epoch_days();
    let bound = |values: &Bounds| values.ts.as_deref().and_then(micros);
    let ts = bound(&stats.min_values).zip(bound(&stats.max_values));
    let ts = ts.map(|((first, _), (last, whole_ms))| (first, if whole_ms { last + ROUNDED_US } else { last }));
    let device = stats.min_values.device.zip(stats.max_values.device);
    let device_nulls = stats.null_count.and_then(|nulls| nulls.device);
    Ok(DataFile { path, date, bytes, rows: stats.num_records, modified_ms, ts, device, device_nulls, crc: None })
}

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Stats {
    num_records: Option<u64>,
    min_values: Bounds,
    max_values: Bounds,
    #[serde(skip_serializing_if = "Option::is_none")]
    null_count: Option<Nulls>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Bounds {
    #[serde(skip_serializing_if = "Option::is_none")]
    ts: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Nulls {
    ts: Option<u64>,
    device: Option<u64>,
}

/// A time of statistics in µs, and whether it ends at the millisecond.
fn micros(text: &str) -> Option<(i64, bool)> {
    let us = DateTime::parse_from_rfc3339(text).ok()?.timestamp_micros();
    let digits = text.split_once('.').map_or(0, |(_, rest)| rest.bytes().take_while(u8::is_ascii_digit).count());
    Some((us, digits < 6))
}

fn written(us: i64) -> Option<String> {
    DateTime::from_timestamp_micros(us).map(|time| time.to_rfc3339_opts(SecondsFormat::Micros, true))
}

fn stats_of(file: &DataFile) -> Stats {
    let (first, last) = file.ts.unzip();
    let short = file.device.clone().filter(|(a, b)| a.len().max(b.len()) <= DEVICE_BYTES_MAX);
    let (device_first, device_last) = short.unzip();
    Stats {
        num_records: file.rows,
        min_values: Bounds { ts: first.and_then(written), device: device_first },
        max_values: Bounds { ts: last.and_then(written), device: device_last },
        null_count: file.device_nulls.map(|nulls| Nulls { ts: Some(0), device: Some(nulls) }),
    }
}

/// What an entry says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Rows of batches.
    Append,
    /// The same rows in other files.
    Compact,
    /// Rows that are too old, or too many.
    Retain,
}

impl Purpose {
    /// As the log has it, with its parameters.
    fn operation(self) -> (&'static str, Value) {
        match self {
            Self::Append => ("WRITE", json!({ "mode": "Append", "partitionBy": format!("[\"{DATE}\"]") })),
            Self::Compact => ("OPTIMIZE", json!({ "predicate": "[]", "zOrderBy": "[]" })),
            Self::Retain => ("DELETE", json!({ "predicate": "[\"retention\"]" })),
        }
    }
}

/// The lines of an entry.
#[derive(Debug)]
pub(super) struct Lines(String);

impl Lines {
    pub(super) fn new(purpose: Purpose, now_ms: i64, base: u64) -> Self {
        let (operation, parameters) = purpose.operation();
        Self::of(operation, parameters, purpose == Purpose::Append, now_ms, base)
    }

    /// An entry that changes the table itself.
    pub(super) fn of(operation: &str, parameters: Value, blind: bool, now_ms: i64, base: u64) -> Self {
        let mut lines = Self(String::new());
        lines.push(&json!({ "commitInfo": {
            "timestamp": now_ms,
            "operation": operation,
            "operationParameters": parameters,
            "readVersion": base,
            "isBlindAppend": blind,
            "engineInfo": concat!("weir/", env!("CARGO_PKG_VERSION")),
        }}));
        lines
    }

    pub(super) fn push(&mut self, line: &Value) {
        if !self.0.is_empty() {
            self.0.push('\n');
        }
        self.0.push_str(&line.to_string());
    }

    pub(super) fn transaction(&mut self, app_id: &str, version: i64, now_ms: i64) {
        self.push(&json!({ "txn": { "appId": app_id, "version": version, "lastUpdated": now_ms } }));
    }

    pub(super) fn add(&mut self, file: &DataFile, data_change: bool) {
        let stats = serde_json::to_string(&stats_of(file)).expect("statistics are plain text and numbers");
        let mut line = json!({ "add": {
            "path": file.path,
            "partitionValues": partition(file.date),
            "size": file.bytes,
            "modificationTime": file.modified_ms,
            "dataChange": data_change,
            "stats": stats,
        }});
        if let Some(crc) = file.crc {
            line["add"]["tags"] = json!({ CRC: format!("{crc:08x}") });
        }
        self.push(&line);
    }

    pub(super) fn remove(&mut self, file: &DataFile, data_change: bool, now_ms: i64) {
        self.push(&json!({ "remove": {
            "path": file.path,
            "deletionTimestamp": now_ms,
            "dataChange": data_change,
            "extendedFileMetadata": true,
            "partitionValues": partition(file.date),
            "size": file.bytes,
        }}));
    }

    pub(super) fn into_bytes(self) -> Bytes {
        self.0.into()
    }
}

fn partition(date: i32) -> Value {
    json!({ DATE: date_text(date) })
}

/// `2024-06-01`.
pub(crate) fn date_text(date: i32) -> String {
    NaiveDate::from_epoch_days(date).unwrap_or_default().to_string()
}

/// The files of an entry, shared.
pub(super) fn shared(files: Vec<DataFile>) -> Vec<Arc<DataFile>> {
    files.into_iter().map(Arc::new).collect()
}

// Statistics name the columns as the table does.
const _: () = assert!(matches!((TS.as_bytes(), DEVICE.as_bytes()), (b"ts", b"device")));

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> DataFile {
        DataFile {
            path: "_date=2024-06-01/part-1.zstd.parquet".to_owned(),
            date: 19_875,
            bytes: 321,
            rows: Some(3),
            modified_ms: 5,
            ts: Some((1_717_200_000_000_001, 1_717_200_000_123_456)),
            device: Some(("a \"quoted\" one".to_owned(), "ß".to_owned())),
            device_nulls: Some(1),
            crc: Some(0x00c0_ffee),
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut lines = Lines::new(Purpose::Compact, 7, 1);
        lines.transaction("spool", 9, 7);
        lines.remove(&file(), false, 7);
        lines.add(&file(), false);
        let bytes = lines.into_bytes();
        let entry = Entry::parse(&bytes).unwrap();
        assert_eq!(entry.added, [file()]);
        assert_eq!(entry.removed, [file().path]);
        assert_eq!(entry.transactions, [("spool".to_owned(), 9)]);
        assert!(!entry.changes_table);
        let text = std::str::from_utf8(&bytes).unwrap();
        assert_eq!(text.matches("\"dataChange\":false").count(), 2);
        assert_eq!(text.matches("\"tags\":{\"weir.crc32c\":\"00c0ffee\"}").count(), 1);
        assert!(text.starts_with("{\"commitInfo\""));
    }

    #[test]
    fn bounds_of_other_writers_are_never_too_narrow() {
        let check = |stats: &str, expected| {
            let file = data_file("p".to_owned(), Some("2024-06-01"), 1, 0, Some(stats), false).unwrap();
            assert_eq!(file.ts, expected, "{stats}");
        };
        let base = 1_717_200_000_000_000;
        let bounds =
            |a: &str, b: &str| format!("{{\"minValues\":{{\"ts\":\"{a}\"}},\"maxValues\":{{\"ts\":\"{b}\"}}}}");
        check(&bounds("2024-06-01T00:00:00Z", "2024-06-01T00:00:00Z"), Some((base, base + 999)));
        check(&bounds("2024-06-01T00:00:00.100Z", "2024-06-01T00:00:00.200Z"), Some((base + 100_000, base + 200_999)));
        check(&bounds("2024-06-01T00:00:00.000001Z", "2024-06-01T00:00:00.000002Z"), Some((base + 1, base + 2)));
        check(&bounds("2024-06-01T02:00:00.000001+02:00", "2024-06-01T00:00:00.000002Z"), Some((base + 1, base + 2)));
        check("{}", None);
        check("no JSON", None);
    }

    #[test]
    fn what_cannot_be_read_whole_is_refused() {
        let check = |line: &str, expected: &str| {
            let error = Entry::parse(line.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(expected), "{line}: {error}");
        };
        let add = |more: &str, date: &str| {
            let rest = "\"size\":1,\"modificationTime\":0,\"dataChange\":true";
            format!("{{\"add\":{{\"path\":\"x\",\"partitionValues\":{{{date}}},{rest}{more}}}}}")
        };
        check(&add(",\"deletionVector\":{\"storageType\":\"u\"}", "\"_date\":\"2024-06-01\""), "deletion vector");
        check(&add("", ""), "no _date");
        check(&add("", "\"_date\":null"), "no _date");
        check("{\"add\":", "JSON");
        assert!(Entry::parse(add(",\"deletionVector\":null", "\"_date\":\"2024-06-01\"").as_bytes()).is_ok());
        // Tags of others, and what is no checksum, say nothing.
        for tags in ["null", "{\"INSERTION_TIME\":\"1\"}", "{\"weir.crc32c\":null}", "{\"weir.crc32c\":\"none\"}"] {
            let entry = Entry::parse(add(&format!(",\"tags\":{tags}"), "\"_date\":\"2024-06-01\"").as_bytes()).unwrap();
            assert_eq!(entry.added[0].crc, None, "{tags}");
        }
        assert!(Entry::parse(b"{\"metaData\":{}}\n\n{\"cdc\":{}}").unwrap().changes_table);
    }
}
