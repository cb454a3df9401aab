//! `weir bench queries`: statements over the readings of a file, repeated with other devices and days, beside DuckDB and
//! chDB on the same Parquet files.
//!
//! Half of the rows are committed, the other half hot; then all are committed, and the peers read the table's files.
//! Answers are compared before times are shown. Copy k of the file has `k` million added to its devices' numbers, and
//! 31 * (k mod 4) days to its times.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use chrono::NaiveDateTime;
use flate2::read::MultiGzDecoder;
use serde_json::{Map, Value, json};
use wire::sealed::NO_WATERMARK;
use wire::{CutBatch, DAY_US, FieldType, SpoolId, StreamField, StreamSchema};

use super::Common;
use super::ingest::{Sender, committed};
use super::parts::{Cloud, Directory, free_port};
use crate::sql;

const PEERS: &str = include_str!("queries/peers.py");
const BATCH_ROWS: usize = 8_192;
const TABLE: &str = "traffic";
/// What a cloud is told that commits soon, in few commits…
const COMMITS: &str =
    "[commit]\nmax_age = \"10s\"\nmax_bytes = \"4GiB\"\n[hot]\nmax_bytes = \"4GiB\"\n[wal]\nmax_bytes = \"8GiB\"\n";
/// …and one that keeps what comes hot.
const KEEPS_HOT: &str =
    "[commit]\nmax_age = \"7d\"\nmax_bytes = \"4GiB\"\n[hot]\nmax_bytes = \"4GiB\"\n[wal]\nmax_bytes = \"8GiB\"\n";
/// Answers of different engines differ by the order in which they add; that of a sketch by its error.
const SAME: f64 = 1e-9;
const SAME_SKETCH: f64 = 0.05;

/// Options of `weir bench queries`.
#[derive(Debug, clap::Args)]
pub(crate) struct QueriesBench {
    /// Readings as CSV, .gz or not, with the columns of the Aarhus data
    #[arg(long)]
    file: PathBuf,
    /// Statements, each behind a line `-- [name]`
    #[arg(long)]
    queries: PathBuf,
    #[arg(long, default_value_t = 22)]
    copies: i64,
    /// How often each statement is asked; the first time does not count
    #[arg(long, default_value_t = 8)]
    repeat: usize,
    /// A Python with duckdb and chdb
    #[arg(long)]
    python: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

/// A reading of the file.
struct Reading {
    ts: i64,
    device: i64,
    numbers: [i64; 4],
    status: String,
}

impl QueriesBench {
    pub(super) async fn run(self) -> anyhow::Result<Value> {
        let queries = queries(&std::fs::read_to_string(&self.queries).context("read the statements")?)?;
        let readings = readings(&self.file)?;
        let total = readings.len() as u64 * self.copies as u64;
        let directory = Directory::new(&self.common)?;
        let port = free_port()?;
        let schema = schema()?;
        let mut rows = Copies { readings: &readings, copies: self.copies, next: 0 };
        let mut sender = Sender::new(Arc::clone(&schema), SpoolId(rand::random()))?;

        let cloud = Cloud::start_with(&directory.0, port, COMMITS).await?;
        let half = total / 2;
        let sent = rows.send(&mut sender, &cloud, half).await?;
        committed(&cloud, sent).await?;
        drop(cloud);
        let cloud = Cloud::start_with(&directory.0, port, KEEPS_HOT).await?;
        rows.send(&mut sender, &cloud, total).await?;
        let half_hot = ask(&cloud, &queries, self.repeat).await?;
        let rss_hot_mb = cloud.part.memory_mb("VmRSS")?;
        drop(cloud);
        // What was hot is read from the log again, and committed.
        let cloud = Cloud::start_with(&directory.0, port, COMMITS).await?;
        committed(&cloud, total - sent).await?;
        let all_cold = ask(&cloud, &queries, self.repeat).await?;
        ensure!(sql::integer(&cloud.http, "SELECT count(*) FROM traffic").await? == total, "rows are missing");
        let table = cloud.table(TABLE);
        let bytes = cloud.table_bytes(TABLE)?;
        drop(cloud);
        let peers = match &self.python {
            Some(python) => peers(python, &table, &self.queries, self.repeat)?,
            None => Map::new(),
        };
        let mut report = Map::new();
        for (name, _) in &queries {
            let (hot, cold) = (&half_hot[name], &all_cold[name]);
            compare(name, "all cold", &hot.rows, &cold.rows)?;
            let mut times = json!({ "half_hot_ms": hot.times(), "all_cold_ms": cold.times() });
            for (peer, answers) in &peers {
                let answer = answers.get(name).context("a peer left a statement out")?;
                compare(name, peer, &hot.rows, answer["rows"].as_array().context("rows of a peer")?)?;
                times[format!("{peer}_ms")] = answer["ms"].clone();
            }
            report.insert(name.clone(), times);
        }
        let ratio = |ours: &str| {
            let logs = report.values().map(|times| {
                let best = |which: &str| times[which]["p50"].as_f64();
                Some((best(ours)? / best("duckdb_ms")?).ln())
            });
            let logs = logs.collect::<Option<Vec<_>>>()?;
            Some((logs.iter().sum::<f64>() / logs.len() as f64).exp())
        };
        Ok(json!({
            "rows": total,
            "table_bytes_per_row": bytes as f64 / total as f64,
            "cloud_rss_half_hot_mb": rss_hot_mb,
            "half_hot_by_duckdb": ratio("half_hot_ms"),
            "all_cold_by_duckdb": ratio("all_cold_ms"),
            "queries": report,
        }))
    }
}

/// Names and statements.
fn queries(text: &str) -> anyhow::Result<Vec<(String, String)>> {
    let mut queries = Vec::new();
    for part in text.split("-- [").skip(1) {
        let (name, statement) = part.split_once(']').context("a name ends with ]")?;
        queries.push((name.to_owned(), statement.trim().trim_end_matches(';').to_owned()));
    }
    ensure!(!queries.is_empty(), "there is no statement");
    Ok(queries)
}

fn readings(path: &Path) -> anyhow::Result<Vec<Reading>> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let file: Box<dyn Read> = match path.extension().is_some_and(|extension| extension == "gz") {
        true => Box::new(MultiGzDecoder::new(file)),
        false => Box::new(file),
    };
    let mut csv = csv::Reader::from_reader(BufReader::new(file));
    let header = csv.headers()?.clone();
    let at = |name: &str| header.iter().position(|column| column == name).with_context(|| format!("no column {name}"));
    let (ts, device, status) = (at("TIMESTAMP")?, at("REPORT_ID")?, at("status")?);
    let numbers = [at("avgSpeed")?, at("vehicleCount")?, at("avgMeasuredTime")?, at("medianMeasuredTime")?];
    let mut readings = Vec::new();
    for record in csv.records() {
        let record = record?;
        let number = |at: usize| record[at].parse::<i64>().with_context(|| format!("{:?}", &record[at]));
        readings.push(Reading {
            ts: record[ts].parse::<NaiveDateTime>()?.and_utc().timestamp_micros(),
            device: number(device)?,
            numbers: [number(numbers[0])?, number(numbers[1])?, number(numbers[2])?, number(numbers[3])?],
            status: record[status].to_owned(),
        });
    }
    Ok(readings)
}

fn schema() -> anyhow::Result<Arc<StreamSchema>> {
    let field = |name: &str, kind| anyhow::Ok(StreamField { name: name.parse()?, kind });
    let numbers = ["avg_speed", "vehicle_count", "avg_time", "median_time"].map(|name| field(name, FieldType::Int64));
    let fields = numbers.into_iter().chain([field("status", FieldType::Text)]).collect::<anyhow::Result<Vec<_>>>()?;
    Ok(Arc::new(StreamSchema::new(fields)?))
}

/// All copies, month by month, in order of arrival.
struct Copies<'a> {
    readings: &'a [Reading],
    copies: i64,
    next: u64,
}

/// Copies of one month.
const MONTHS: i64 = 4;

impl Copies<'_> {
    /// The reading of this number, and what its copy adds to device and time.
    fn at(&self, number: u64) -> (&Reading, i64, i64) {
        let (readings, mut left) = (self.readings.len() as u64, number);
        for month in 0..MONTHS {
            let copies = (month..self.copies).step_by(MONTHS as usize).count() as u64;
            if left < copies * readings {
                let copy = month + (left % copies) as i64 * MONTHS;
                return (&self.readings[(left / copies) as usize], copy * 1_000_000, month * 31 * DAY_US);
            }
            left -= copies * readings;
        }
        unreachable!("the caller knows how many there are")
    }

    /// Sends until so many are sent, in whole batches but for the last of all; how many that are.
    async fn send(&mut self, sender: &mut Sender, cloud: &Cloud, until: u64) -> anyhow::Result<u64> {
        let total = self.readings.len() as u64 * self.copies as u64;
        while self.next < until {
            let mut batches = Vec::new();
            while self.next < until && batches.len() < 8 {
                let numbers = self.next..(self.next + BATCH_ROWS as u64).min(total);
                self.next = numbers.end;
                let rows = numbers.map(|number| self.at(number)).collect::<Vec<_>>();
                batches.push(cut(&sender.schema, &rows)?);
            }
            sender.send(&cloud.http, &batches).await?;
        }
        Ok(self.next)
    }
}

fn cut(schema: &StreamSchema, rows: &[(&Reading, i64, i64)]) -> anyhow::Result<CutBatch> {
    let times = rows.iter().map(|(reading, _, shift)| reading.ts + shift);
    let mut columns: Vec<ArrayRef> = vec![
        Arc::new(TimestampMicrosecondArray::from_iter_values(times).with_timezone("UTC")),
        Arc::new(StringArray::from_iter_values(
            rows.iter().map(|(reading, ids, _)| (reading.device + ids).to_string()),
        )),
    ];
    for index in 0..4 {
        let numbers = rows.iter().map(|(reading, ..)| reading.numbers[index]);
        columns.push(Arc::new(Int64Array::from_iter_values(numbers)));
    }
    columns.push(Arc::new(StringArray::from_iter_values(rows.iter().map(|(reading, ..)| &reading.status))));
    columns.push(Arc::new(StringArray::from_iter_values(rows.iter().map(|_| "good"))));
    let rows = RecordBatch::try_new(schema.arrow().clone(), columns)?;
    Ok(CutBatch::seal(TABLE.parse()?, schema, &rows, NO_WATERMARK, "bench", 0)?)
}

/// What a statement answered, and how long that took each time but the first, ms.
struct Answer {
    rows: Vec<Value>,
    ms: Vec<f64>,
}

impl Answer {
    fn times(&self) -> Value {
        let mut ms = self.ms.clone();
        ms.sort_by(f64::total_cmp);
        json!({ "min": ms.first(), "p50": ms.get(ms.len() / 2), "max": ms.last() })
    }
}

async fn ask(
    cloud: &Cloud,
    queries: &[(String, String)],
    repeat: usize,
) -> anyhow::Result<std::collections::HashMap<String, Answer>> {
    let mut answers = std::collections::HashMap::new();
    for (name, statement) in queries {
        let mut answer = Answer { rows: Vec::new(), ms: Vec::new() };
        for turn in 0..=repeat {
            let started = Instant::now();
            let rows = sql::rows(&cloud.http, statement).await?;
            if turn > 0 {
                answer.ms.push(started.elapsed().as_secs_f64() * 1e3);
            }
            answer.rows = rows.into_iter().map(|row| row.into_iter().map(|(_, value)| value).collect()).collect();
        }
        answers.insert(name.clone(), answer);
    }
    Ok(answers)
}

/// By peer and statement: `rows`, and times in `ms`.
fn peers(python: &Path, table: &Path, queries: &Path, repeat: usize) -> anyhow::Result<Map<String, Value>> {
    let output = Command::new(python)
        .args(["-c", PEERS])
        .args([table, queries])
        .arg(repeat.to_string())
        .output()
        .with_context(|| format!("start {}", python.display()))?;
    ensure!(output.status.success(), "the peers failed: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).context("read what the peers answered")
}

/// Whether two answers are the same, row by row.
fn compare(name: &str, other: &str, ours: &[Value], theirs: &[Value]) -> anyhow::Result<()> {
    let allowed = if name == "p95" { SAME_SKETCH } else { SAME };
    let same = |a: &Value, b: &Value| match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => (a - b).abs() <= allowed * a.abs().max(b.abs()).max(1.0),
        _ => a == b || moment(a).is_some() && moment(a) == moment(b),
    };
    let same_row = |(a, b): (&Value, &Value)| match (a.as_array(), b.as_array()) {
        (Some(a), Some(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        _ => false,
    };
    ensure!(
        ours.len() == theirs.len() && ours.iter().zip(theirs).all(same_row),
        "{name}: {other} answers otherwise: {:?} and {:?}",
        ours.iter().take(3).collect::<Vec<_>>(),
        theirs.iter().take(3).collect::<Vec<_>>()
    );
    Ok(())
}

/// A time as text, with or without a zone: engines write UTC in different ways.
fn moment(value: &Value) -> Option<NaiveDateTime> {
    let text = value.as_str()?.trim_end_matches('Z').trim_end_matches("+00:00").replace(' ', "T");
    text.parse().ok()
}
