//! `weir bench recover`: how long a cloud that was killed takes until it answers again, by the size of its WAL.
//!
//! Nothing is committed before the kill, so all of the WAL has to be read. Ready means that every acknowledged row is
//! there; that is asked.

use std::sync::Arc;
use std::time::Instant;

use anyhow::ensure;
use serde_json::{Value, json};
use wire::SpoolId;

use super::Common;
use super::ingest::{Sender, cut, noisy_schema};
use super::parts::{Cloud, Directory, free_port};
use crate::sql;

const BATCH_ROWS: usize = 8_192;
const IN_REQUEST: u64 = 8;
/// What comes stays hot.
const KEEPS_HOT: &str =
    "[commit]\nmax_age = \"7d\"\nmax_bytes = \"16GiB\"\n[hot]\nmax_bytes = \"16GiB\"\n[wal]\nmax_bytes = \"32GiB\"\n";

/// Options of `weir bench recover`.
#[derive(Debug, clap::Args)]
pub(crate) struct RecoverBench {
    /// Rows in the WAL
    #[arg(long, default_value_t = 20_000_000)]
    rows: u64,
    /// Kills, one after the other
    #[arg(long, default_value_t = 3)]
    kills: usize,
    /// Columns of random numbers beside, which nothing makes smaller
    #[arg(long, default_value_t = 0)]
    noise: usize,
    #[command(flatten)]
    common: Common,
}

impl RecoverBench {
    pub(super) async fn run(self) -> anyhow::Result<Value> {
        let directory = Directory::new(&self.common)?;
        let port = free_port()?;
        let mut cloud = Cloud::start_with(&directory.0, port, KEEPS_HOT).await?;
        let schema = noisy_schema(self.noise)?;
        let mut sender = Sender::new(Arc::clone(&schema), SpoolId(rand::random()))?;
        let batches = self.rows.div_ceil(BATCH_ROWS as u64);
        let mut next = 0;
        while next < batches {
            let numbers = next..(next + IN_REQUEST).min(batches);
            next = numbers.end;
            let of_request =
                numbers.map(|number| cut(&schema, number, BATCH_ROWS)).collect::<anyhow::Result<Vec<_>>>()?;
            sender.send(&cloud.http, &of_request).await?;
        }
        let rows = batches * BATCH_ROWS as u64;
        let gigabytes = sender.bytes as f64 / 1e9;
        let mut seconds = Vec::new();
        for _ in 0..self.kills {
            drop(cloud);
            let started = Instant::now();
            cloud = Cloud::start_with(&directory.0, port, KEEPS_HOT).await?;
            seconds.push(started.elapsed().as_secs_f64());
            let found = sql::integer(&cloud.http, "SELECT count(*) FROM load").await?;
            ensure!(found == rows, "{rows} rows were acknowledged and {found} are there");
        }
        Ok(json!({
            "rows": rows,
            "wal_gb": gigabytes,
            "seconds": seconds,
            "seconds_per_gb": seconds.iter().map(|seconds| seconds / gigabytes).collect::<Vec<_>>(),
            "cloud_cpu_s_of_the_last": cloud.part.cpu_seconds()?,
            "cloud_peak_rss_mb": cloud.part.memory_mb("VmHWM")?,
        }))
    }
}
