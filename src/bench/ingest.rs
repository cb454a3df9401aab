//! `weir bench cloud`: how many rows a second one cloud process makes durable.
//!
//! Each connection is a spool of its own that sends requests of a few batches and waits for the durable ack. Rows are
//! made beforehand (ts, device, three fields, quality: six columns), so the sender costs little more than numbering.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{bail, ensure};
use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use wire::request::{KIND_BATCH, KIND_SCHEMA, push_frame};
use wire::sealed::NO_WATERMARK;
use wire::{Acks, CutBatch, EdgeId, FieldType, Mark, SpoolId, StreamField, StreamSchema};

use super::Common;
use super::acks::Analyst;
use super::parts::{Cloud, Directory, EDGE, PATIENCE, POLL, TOKEN};
use super::times::Times;
use crate::sql;

const DEVICES: usize = 500;
/// 2026-01-01T00:00:00Z
const START_US: i64 = 1_767_225_600_000_000;

/// Options of `weir bench cloud`.
#[derive(Debug, clap::Args)]
pub(crate) struct CloudBench {
    #[arg(long, default_value_t = 30_000_000)]
    rows: u64,
    #[arg(long, default_value_t = 4)]
    connections: u64,
    #[arg(long, default_value_t = 8_192)]
    batch_rows: usize,
    /// Batches in one request
    #[arg(long, default_value_t = 8)]
    request_batches: usize,
    /// Somebody asks one question after the other meanwhile
    #[arg(long)]
    analyst: bool,
    #[command(flatten)]
    common: Common,
}

impl CloudBench {
    pub(super) async fn run(self) -> anyhow::Result<Value> {
        let directory = Directory::new(&self.common)?;
        let cloud = Cloud::start(&directory.0).await?;
        let schema = schema()?;
        let per_connection = self.rows.div_ceil(self.connections * self.batch_rows as u64);
        ensure!(self.connections > 0 && self.batch_rows > 0 && self.request_batches > 0, "nothing to send");
        // All rows differ, so they are made on all cores before the clock starts.
        let makers = (0..self.connections).map(|connection| {
            let (schema, rows) = (Arc::clone(&schema), self.batch_rows);
            tokio::task::spawn_blocking(move || {
                let batches =
                    (0..per_connection).map(|number| cut(&schema, connection * per_connection + number, rows));
                batches.collect::<anyhow::Result<Vec<_>>>()
            })
        });
        let makers = makers.collect::<Vec<_>>();
        let mut prepared = Vec::new();
        for made in makers {
            prepared.push(made.await??);
        }
        let analyst = self.analyst.then(|| Analyst::start(&cloud));
        let started = Instant::now();
        let mut tasks = tokio::task::JoinSet::new();
        for batches in prepared {
            let mut sender = Sender::new(Arc::clone(&schema), SpoolId(rand::random()))?;
            let (http, in_request) = (cloud.http.clone(), self.request_batches);
            tasks.spawn(async move {
                let mut acks = Times::new();
                for batches in batches.chunks(in_request) {
                    let sent = Instant::now();
                    sender.send(&http, batches).await?;
                    acks.add(sent.elapsed());
                }
                anyhow::Ok((sender.bytes, acks))
            });
        }
        let (mut bytes, mut acks) = (0, Times::new());
        while let Some(sent) = tasks.join_next().await {
            let (of_one, acks_of_one) = sent??;
            bytes += of_one;
            acks.add_all(&acks_of_one);
        }
        let durable_s = started.elapsed().as_secs_f64();
        let questions = match analyst {
            Some(analyst) => Some(analyst.end().await?.report()),
            None => None,
        };
        let rows = per_connection * self.connections * self.batch_rows as u64;
        let found = sql::integer(&cloud.http, "SELECT count(*) FROM load").await?;
        ensure!(found == rows, "{rows} rows were acknowledged and {found} are there");
        let committed = committed(&cloud, rows).await?;
        let found = sql::integer(&cloud.http, "SELECT count(*) FROM load").await?;
        ensure!(found == rows, "{rows} rows were committed and {found} are there");
        let million = rows as f64 / 1e6;
        Ok(json!({
            "rows": rows,
            "durable_s": durable_s,
            "rows_per_second": (rows as f64 / durable_s).round(),
            "ack_ms": acks.report(),
            "questions_ms": questions,
            "all_committed_s": started.elapsed().as_secs_f64(),
            "cloud_cpu_s_per_million_rows": committed / million,
            "cloud_peak_rss_mb": cloud.part.memory_mb("VmHWM")?,
            "wire_bytes_per_row": bytes as f64 / rows as f64,
            "delta_bytes_per_row": cloud.table_bytes("load")? as f64 / rows as f64,
        }))
    }
}

/// Waits until everything is in the table; the CPU-seconds until then.
pub(super) async fn committed(cloud: &Cloud, rows: u64) -> anyhow::Result<f64> {
    let started = Instant::now();
    loop {
        let done = cloud.metrics().await?.get("rows_committed")?;
        if done >= rows {
            return cloud.part.cpu_seconds();
        }
        ensure!(started.elapsed() < PATIENCE, "{done} of {rows} rows are committed");
        tokio::time::sleep(POLL).await;
    }
}

/// A spool that sends its batches in order, and waits until they are durable.
#[derive(Debug)]
pub(super) struct Sender {
    pub(super) schema: Arc<StreamSchema>,
    client: reqwest::Client,
    edge: EdgeId,
    spool: SpoolId,
    last: Mark,
    /// The newest request.
    body: Vec<u8>,
    pub(super) bytes: u64,
}

impl Sender {
    pub(super) fn new(schema: Arc<StreamSchema>, spool: SpoolId) -> anyhow::Result<Self> {
        let (client, edge) = (reqwest::Client::new(), EDGE.parse::<EdgeId>()?);
        Ok(Self { schema, client, edge, spool, last: Mark::default(), body: Vec::new(), bytes: 0 })
    }

    /// One request.
    pub(super) async fn send(&mut self, cloud: &str, batches: &[CutBatch]) -> anyhow::Result<()> {
        let mut body = Vec::new();
        push_frame(&mut body, KIND_SCHEMA, self.schema.canonical().as_bytes());
        for cut in batches {
            let batch = cut.number(&self.edge, self.spool, self.last.seq.next(), self.last.crc);
            self.last = Mark { seq: batch.header().seq, crc: batch.crc() };
            push_frame(&mut body, KIND_BATCH, batch.bytes());
        }
        self.bytes += body.len() as u64;
        self.body = body;
        self.send_again(cloud).await
    }

    /// The newest request once more, as after an ack that was lost.
    pub(super) async fn send_again(&self, cloud: &str) -> anyhow::Result<()> {
        let url = format!("{cloud}/v1/edges/{EDGE}/batches");
        loop {
            let response = self.client.post(&url).bearer_auth(TOKEN).body(self.body.clone()).send().await?;
            let status = response.status();
            if status == reqwest::StatusCode::TOO_MANY_REQUESTS {
                // What was accepted of it is a duplicate the next time.
                tokio::time::sleep(POLL).await;
                continue;
            }
            let text = response.text().await?;
            if !status.is_success() {
                bail!("up to batch {}: {text}", self.last.seq);
            }
            let acks: Acks = serde_json::from_str(&text)?;
            ensure!(acks.acks.iter().any(|ack| ack.durable == self.last), "not durable: {text}");
            return Ok(());
        }
    }
}

pub(super) fn schema() -> anyhow::Result<Arc<StreamSchema>> {
    noisy_schema(0)
}

/// With so many columns of noise.
pub(super) fn noisy_schema(noise: usize) -> anyhow::Result<Arc<StreamSchema>> {
    let fields = [("speed", FieldType::Float64), ("vehicles", FieldType::Int64), ("occupancy", FieldType::Float64)];
    let fields = fields.map(|(name, kind)| Ok(StreamField { name: name.parse()?, kind }));
    let fields = fields.into_iter().chain(noise_fields(noise));
    Ok(Arc::new(StreamSchema::new(fields.collect::<anyhow::Result<Vec<_>>>()?)?))
}

/// Columns of random numbers, which nothing makes smaller.
pub(super) fn noise_fields(count: usize) -> impl Iterator<Item = anyhow::Result<StreamField>> {
    (1..=count).map(|number| Ok(StreamField { name: format!("noise_{number}").parse()?, kind: FieldType::Float64 }))
}

/// What is in one of them.
pub(super) fn noise(random: &mut StdRng, rows: usize) -> ArrayRef {
    Arc::new(Float64Array::from_iter_values((0..rows).map(|_| random.random::<f64>())))
}

/// Rows of `load`: another number, other rows.
pub(super) fn cut(schema: &StreamSchema, number: u64, rows: usize) -> anyhow::Result<CutBatch> {
    cut_of("load", schema, number, rows)
}

/// The same of another stream.
pub(super) fn cut_of(stream: &str, schema: &StreamSchema, number: u64, rows: usize) -> anyhow::Result<CutBatch> {
    let mut random = StdRng::seed_from_u64(number);
    let first = START_US + number as i64 * rows as i64 * 1_000;
    let rounded = |value: f64| (value * 10.0).round() / 10.0;
    let mut columns: Vec<ArrayRef> = vec![
        Arc::new(
            TimestampMicrosecondArray::from_iter_values((0..rows as i64).map(|row| first + row * 1_000))
                .with_timezone("UTC"),
        ),
        Arc::new(StringArray::from_iter_values(
            (0..rows).map(|_| format!("road-{:04}", random.random_range(0..DEVICES))),
        )),
        Arc::new(Float64Array::from_iter_values((0..rows).map(|_| rounded(random.random_range(0.0..120.0))))),
        Arc::new(Int64Array::from_iter_values((0..rows).map(|_| random.random_range(0..40)))),
        Arc::new(Float64Array::from_iter_values((0..rows).map(|_| rounded(random.random_range(0.0..100.0))))),
    ];
    let noisy = schema.fields().len() - columns[2..].len();
    columns.extend((0..noisy).map(|_| noise(&mut random, rows)));
    columns.push(Arc::new(StringArray::from_iter_values((0..rows).map(|_| "good"))));
    let rows = RecordBatch::try_new(schema.arrow().clone(), columns)?;
    Ok(CutBatch::seal(stream.parse()?, schema, &rows, NO_WATERMARK, "bench", 0)?)
}
