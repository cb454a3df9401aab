//! `weir bench acks`: from when a request was due to its durable ack, at a steady rate: as usual, while somebody asks one
//! question after the other, and while what was written before is compacted.
//!
//! A table of many small files is made first, without compaction. Then the node is started again with it, so that it has
//! much to merge, as fast as its share of a core allows.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use wire::{CutBatch, SpoolId};

use super::Common;
use super::ingest::{Sender, committed, cut, schema};
use super::parts::{Cloud, Directory, PATIENCE, POLL, free_port};
use super::times::Times;
use crate::sql;

/// Rows of a request of the table that is made first.
const FIRST_ROWS: usize = 65_536;
/// Small files.
const SMALL_FILES: &str = "[commit]\nmax_age = \"200ms\"\n";
const NO_COMPACTION: &str = "[compact]\nenabled = false\n";
const COMPACTED: &str = "compacted_bytes_in";
/// What an analyst asks: all rows, by device and hour.
const QUESTION: &str =
    "SELECT device, date_trunc('hour', ts) AS hour, avg(speed), max(vehicles), count(*) FROM load GROUP BY 1, 2";

/// Options of `weir bench acks`.
#[derive(Debug, clap::Args)]
pub(crate) struct AcksBench {
    /// Rows that are there before
    #[arg(long, default_value_t = 30_000_000)]
    history: u64,
    /// Rows a second while it is measured
    #[arg(long, default_value_t = 100_000)]
    rate: u64,
    /// Rows of a request
    #[arg(long, default_value_t = 1_000)]
    batch_rows: usize,
    /// How long each measurement lasts
    #[arg(long, default_value_t = 15)]
    seconds: u64,
    #[command(flatten)]
    common: Common,
}

/// Somebody who asks one question after the other until it is ended.
#[derive(Debug)]
pub(super) struct Analyst {
    stop: CancellationToken,
    task: tokio::task::JoinHandle<anyhow::Result<Times>>,
}

impl Analyst {
    pub(super) fn start(cloud: &Cloud) -> Self {
        let (stop, http) = (CancellationToken::new(), cloud.http.clone());
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut times = Times::new();
            while !stopped.is_cancelled() {
                let asked = Instant::now();
                match sql::rows(&http, QUESTION).await {
                    Ok(_) => times.add(asked.elapsed()),
                    // Until the first rows come there is no table.
                    Err(_) if times.count() == 0 => tokio::time::sleep(POLL).await,
                    Err(error) => return Err(error),
                }
            }
            Ok(times)
        });
        Self { stop, task }
    }

    /// How long the questions took.
    pub(super) async fn end(self) -> anyhow::Result<Times> {
        self.stop.cancel();
        self.task.await?
    }
}

impl AcksBench {
    pub(super) async fn run(self) -> anyhow::Result<Value> {
        ensure!(self.rate > 0 && self.batch_rows > 0 && self.seconds > 0, "nothing to send");
        let (directory, port) = (Directory::new(&self.common)?, free_port()?);
        let settings = format!("{SMALL_FILES}{NO_COMPACTION}");
        let cloud = Cloud::start_with(&directory.0, port, &settings).await?;
        let schema = schema()?;
        let mut sender = Sender::new(Arc::clone(&schema), SpoolId(rand::random()))?;
        let mut number = 0;
        while number * (FIRST_ROWS as u64) < self.history {
            sender.send(&cloud.http, &[cut(&schema, number, FIRST_ROWS)?]).await?;
            number += 1;
        }
        let history = number * FIRST_ROWS as u64;
        committed(&cloud, history).await?;
        let files = sql::integer(&cloud.http, "SELECT count(*) FROM system.files WHERE stream = 'load'").await?;

        // Rows behind those of the table's: batches of another size have other numbers.
        let mut next = history.div_ceil(self.batch_rows as u64);
        let usual = self.steady(&cloud, &mut sender, &mut next).await?;
        let analyst = Analyst::start(&cloud);
        let beside_analyst = self.steady(&cloud, &mut sender, &mut next).await?;
        let questions = analyst.end().await?;
        drop(cloud);

        let cloud = Cloud::start_with(&directory.0, port, SMALL_FILES).await?;
        let started = Instant::now();
        let beside_compaction = self.steady(&cloud, &mut sender, &mut next).await?;
        // It is counted when it is done.
        while cloud.metrics().await?.get(COMPACTED)? == 0 {
            ensure!(started.elapsed() < PATIENCE, "nothing is compacted");
            tokio::time::sleep(POLL).await;
        }
        let (compacted, compaction_s) = (cloud.metrics().await?.get(COMPACTED)?, started.elapsed().as_secs_f64());
        let rows = history + 3 * self.requests() * self.batch_rows as u64;
        let found = sql::integer(&cloud.http, "SELECT count(*) FROM load").await?;
        ensure!(found == rows, "{rows} rows were acknowledged and {found} are there");
        Ok(json!({
            "history_rows": history,
            "history_files": files,
            "rate": self.rate,
            "usual_ms": usual.report(),
            "beside_an_analyst_ms": beside_analyst.report(),
            "questions_ms": questions.report(),
            "beside_compaction_ms": beside_compaction.report(),
            "compaction": { "input_mb": compacted as f64 / 1e6, "done_after_s": compaction_s },
            "cloud_peak_rss_mb": cloud.part.memory_mb("VmHWM")?,
        }))
    }

    /// Of one measurement.
    fn requests(&self) -> u64 {
        (self.rate * self.seconds).div_ceil(self.batch_rows as u64)
    }

    /// Requests at the rate; how long each took from when it was due.
    async fn steady(&self, cloud: &Cloud, sender: &mut Sender, next: &mut u64) -> anyhow::Result<Times> {
        let numbers = *next..*next + self.requests();
        *next = numbers.end;
        let cut = |number| cut(&sender.schema, number, self.batch_rows);
        let batches: Vec<CutBatch> = numbers.map(cut).collect::<anyhow::Result<_>>()?;
        let each = Duration::from_secs_f64(self.batch_rows as f64 / self.rate as f64);
        let (mut times, mut due) = (Times::new(), Instant::now());
        for batch in &batches {
            tokio::time::sleep_until(due.into()).await;
            sender.send(&cloud.http, std::slice::from_ref(batch)).await?;
            times.add(due.elapsed());
            due += each;
        }
        Ok(times)
    }
}
