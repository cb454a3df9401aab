//! `weir bench commit`: what the last of many commits costs against the first, with compaction and checkpoints beside it.
//!
//! One table, one small batch a commit, in this process and without a WAL: so that only the table is measured. Then the
//! table is opened as a new process would, and compacted whole.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use cloud_ingest::compact::{Compactor, Merged};
use cloud_ingest::config::CompactSettings;
use cloud_ingest::delta::{DeltaTable, checkpoint};
use cloud_ingest::rescue::{Provenance, rescue};
use cloud_ingest::store::Store;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use wire::{FieldType, Mark, Seq, SpoolId, StreamField, StreamName, StreamSchema};

use super::Common;
use super::ingest::{noise, noise_fields};
use super::parts::Directory;
use super::times::Times;

/// 2026-01-01T00:00:00Z
const START_US: i64 = 1_767_225_600_000_000;
const CHECKPOINT_COMMITS: u64 = 100;

/// Options of `weir bench commit`.
#[derive(Debug, clap::Args)]
pub(crate) struct CommitBench {
    #[arg(long, default_value_t = 10_000)]
    commits: u64,
    /// Rows of one commit
    #[arg(long, default_value_t = 500)]
    rows: usize,
    /// Commits of one day of event time
    #[arg(long, default_value_t = 1_440)]
    commits_per_day: u64,
    /// Merge small files only at the end
    #[arg(long)]
    no_compaction: bool,
    /// Columns of random numbers beside, which nothing makes smaller
    #[arg(long, default_value_t = 0)]
    noise: usize,
    #[command(flatten)]
    common: Common,
}

impl CommitBench {
    pub(super) async fn run(self) -> anyhow::Result<Value> {
        let directory = Directory::new(&self.common)?;
        let url = url(&directory)?;
        let store = Store::open(&url)?;
        let stream: StreamName = "load".parse()?;
        let schema = schema(self.noise)?;
        let mut table = DeltaTable::create(&store, &stream, schema.fields()).await?;
        let spool = SpoolId([7; 16]);
        let mut times = Vec::new();
        let (mut memory, mut merges) = (Vec::new(), 0_u64);
        let compactor = Compactor::new(&CompactSettings { cpu_share: 1.0, ..CompactSettings::default() });
        for number in 1..=self.commits {
            let rows = self.batch(&schema, spool, number)?;
            let mark = Mark { seq: Seq(number), crc: number as u32 };
            let started = Instant::now();
            let snapshot = table.commit(&[rows], &[(spool, Seq(number), mark)]).await?;
            times.push(started.elapsed());
            if number % CHECKPOINT_COMMITS == 0 {
                checkpoint(&stream, &snapshot).await?;
                memory.push(memory_mb("VmRSS")?);
            }
            while !self.no_compaction
                && let Some(inputs) = compactor.choose(&table.snapshot().files)
            {
                compactor.merge(&mut table, inputs, &|_| {}).await?;
                merges += 1;
            }
        }
        let files = table.snapshot().files.len();
        drop(table);
        let started = Instant::now();
        let table = DeltaTable::open(&Store::open(&url)?, &stream).await?.context("open the table")?;
        let open_ms = millis(started.elapsed());
        let expected = self.commits * self.rows as u64;
        ensure!(table.snapshot().files.rows() == expected, "rows are missing");
        let compaction = compact_all(table).await?;
        let thousand = (times.len() / 10).clamp(1, 1_000);
        Ok(json!({
            "commits": self.commits,
            "rows_per_commit": self.rows,
            "first_ms": times[..thousand].iter().collect::<Times>().report(),
            "last_ms": times[times.len() - thousand..].iter().collect::<Times>().report(),
            "merges": merges,
            "files": files,
            "rss_mb": memory.iter().step_by(memory.len().div_ceil(10).max(1)).chain(memory.last()).collect::<Vec<_>>(),
            "open_ms": open_ms,
            "compaction_at_end": compaction,
        }))
    }

    fn batch(&self, schema: &StreamSchema, spool: SpoolId, number: u64) -> anyhow::Result<RecordBatch> {
        let rows = self.rows as i64;
        let step_us = 86_400_000_000 / self.commits_per_day.max(1) as i64;
        let first = START_US + number as i64 * step_us;
        let numbers = || 0..rows;
        let mut columns: Vec<ArrayRef> = vec![
            Arc::new(
                TimestampMicrosecondArray::from_iter_values(numbers().map(|row| first + row * step_us / rows))
                    .with_timezone("UTC"),
            ),
            Arc::new(StringArray::from_iter_values(numbers().map(|row| format!("road-{:04}", row * 7 % 500)))),
            Arc::new(Float64Array::from_iter_values(
                numbers().map(|row| ((row * 37 + number as i64) % 1_200) as f64 / 10.0),
            )),
            Arc::new(Int64Array::from_iter_values(numbers().map(|row| (row * 11 + number as i64) % 40))),
        ];
        let mut random = StdRng::seed_from_u64(number);
        for _ in 0..self.noise {
            columns.push(noise(&mut random, self.rows));
        }
        columns.push(Arc::new(StringArray::from_iter_values(numbers().map(|_| "good"))));
        let rows = RecordBatch::try_new(schema.arrow().clone(), columns)?;
        let provenance = Provenance { edge: "bench".parse()?, spool, seq: Seq(number), received_at_us: first };
        Ok(rescue(&rows, &provenance, schema.fields()))
    }
}

/// Merges all that can be merged, on one core; how fast.
async fn compact_all(mut table: DeltaTable) -> anyhow::Result<Value> {
    let settings = CompactSettings { cpu_share: 1.0, min_files: 2, ..CompactSettings::default() };
    let compactor = Compactor::new(&settings);
    let (started, mut bytes, mut rows_merged) = (Instant::now(), 0, 0);
    while let Some(inputs) = compactor.choose(&table.snapshot().files) {
        if let Merged::Done { bytes_in, rows, .. } = compactor.merge(&mut table, inputs, &|_| {}).await? {
            bytes += bytes_in;
            rows_merged += rows;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    Ok(json!({
        "input_bytes": bytes,
        "rows": rows_merged,
        "seconds": seconds,
        "input_mb_per_second": bytes as f64 / 1e6 / seconds,
        "rows_per_second": rows_merged as f64 / seconds,
        "files": table.snapshot().files.len(),
        "bytes_per_row": table.snapshot().files.bytes() as f64 / table.snapshot().files.rows().max(1) as f64,
        "peak_rss_mb": memory_mb("VmHWM")?,
    }))
}

fn url(directory: &Directory) -> anyhow::Result<String> {
    Ok(format!("file://{}", directory.0.to_str().context("a path in UTF-8")?))
}

fn schema(noise: usize) -> anyhow::Result<StreamSchema> {
    let fields = [("speed", FieldType::Float64), ("vehicles", FieldType::Int64)];
    let fields = fields.map(|(name, kind)| Ok(StreamField { name: name.parse()?, kind }));
    let fields = fields.into_iter().chain(noise_fields(noise));
    Ok(StreamSchema::new(fields.collect::<anyhow::Result<Vec<_>>>()?)?)
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e5).round() / 100.0
}

/// A value of this process's `/proc/self/status` in MB.
fn memory_mb(name: &str) -> anyhow::Result<f64> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find(|line| line.starts_with(name)).context("read the memory")?;
    let kib: f64 = line.split_whitespace().nth(1).context("read the memory")?.parse()?;
    Ok((kib * 1_024.0 / 1e5).round() / 10.0)
}
