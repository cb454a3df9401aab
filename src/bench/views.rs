//! `weir bench views`: what a view costs that follows a stream, beside asking its question again.
//!
//! A stream `load` has some history; then it gets `rate` rows a second, for `seconds`, while so many views follow it that count
//! and average by windows of event time (a row each millisecond). What views cost is the CPU time of the cloud with them less
//! that without. Each second it is looked how many rows the last view is behind. At the end each view must show what its question
//! gives, for all windows that have closed. Then nothing comes for a while, and then rows of another stream only: what views cost
//! that have nothing to do. The curves are of one view: seconds that it computed for a million new rows, by the rows that
//! were there before, and by the length of its windows; the latter of a view, too, that tells its open windows each second.
//! With `--python` Bytewax, Pathway and Flink answer the question over the same rows, and must agree with the view
//! (`views/peers.py`).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use wire::{BATCH_ROWS_MAX, SpoolId};

use super::Common;
use super::ingest::{Sender, committed, cut, cut_of, schema};
use super::parts::{Cloud, Directory, PATIENCE, POLL, free_port};
use crate::sql;

/// Requests in a second.
const BEATS: u64 = 10;
/// Batches of history in one request.
const IN_REQUEST: u64 = 8;
const WINDOW: &str = "10 seconds";
const FINAL: &str = "final";
const WINDOW_S: &str = "10";
const PEERS: &str = include_str!("views/peers.py");
const SETTINGS: &str = "[commit]\nmax_age = \"10s\"\n[views]\nmax = 1000\n";
/// How often a question is asked again, to measure it.
const ASKED: u32 = 5;

/// Options of `weir bench views`.
#[derive(Debug, clap::Args)]
pub(crate) struct ViewsBench {
    /// Rows a second
    #[arg(long, default_value_t = 50_000)]
    rate: u64,
    /// How long each measurement lasts
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Views over one stream
    #[arg(long, default_value_t = 100)]
    views: usize,
    /// Rows before the views are made; the curve begins with a sixteenth of it
    #[arg(long, default_value_t = 8_000_000)]
    history: u64,
    /// A Python with pyarrow, and with any of bytewax, pathway and apache-flink: the same question over the same rows beside the
    /// view's answers. Where they cannot be installed together: several times, each with its own
    #[arg(long)]
    python: Vec<PathBuf>,
    /// Rows that the peers get
    #[arg(long, default_value_t = 1_000_000)]
    peer_rows: u64,
    #[command(flatten)]
    common: Common,
}

/// A cloud with a stream and views over it.
struct Stage {
    cloud: Cloud,
    sender: Sender,
    other: Sender,
    /// Rows of a batch, and batches that were sent.
    batch_rows: usize,
    sent: u64,
}

/// What following cost.
struct Followed {
    rows: u64,
    cpu_s: f64,
    computed_s: f64,
    /// The most rows that a view was behind, in the first half of the time and in the second.
    behind: [u64; 2],
}

impl ViewsBench {
    pub(super) async fn run(self) -> anyhow::Result<Value> {
        let batch_rows = usize::try_from(self.rate / BEATS)?;
        ensure!((1..=BATCH_ROWS_MAX).contains(&batch_rows), "a rate of {BEATS} to {} rows", BATCH_ROWS_MAX * 10);
        ensure!(self.seconds > 0 && self.views > 0, "nothing to measure");
        let directory = Directory::new(&self.common)?;
        let mut steady = Vec::new();
        for views in [0, 1, self.views] {
            let mut stage = self.stage(&directory.0, batch_rows, self.history, views, (FINAL, WINDOW)).await?;
            let followed = self.follow(&mut stage, views).await?;
            stage.check(views, WINDOW).await?;
            let rerun_cpu_s = stage.rerun().await?;
            let idle_cpu_s = stage.pass(Duration::from_secs(self.seconds), false).await?;
            let other_cpu_s = stage.pass(Duration::from_secs(self.seconds), true).await?;
            let peak_rss_mb = stage.cloud.part.memory_mb("VmHWM")?;
            steady.push((views, followed, rerun_cpu_s, [idle_cpu_s, other_cpu_s], peak_rss_mb));
        }
        let mut by_history = Vec::new();
        for history in [self.history / 16, self.history / 4, self.history] {
            let mut stage = self.stage(&directory.0, batch_rows, history, 1, (FINAL, WINDOW)).await?;
            by_history.push(json!({ "rows": history, "computed_s_per_million": self.per_million(&mut stage).await? }));
        }
        let mut by_window = json!({});
        for emit in [FINAL, "update"] {
            let mut curve = Vec::new();
            for window in ["1 second", "10 seconds", "100 seconds", "1000 seconds"] {
                let mut stage = self.stage(&directory.0, batch_rows, self.history / 16, 1, (emit, window)).await?;
                curve.push(json!({ "window": window, "computed_s_per_million": self.per_million(&mut stage).await? }));
            }
            by_window[emit] = curve.into();
        }
        let peers = self.peers(&directory.0, batch_rows).await?;
        let seconds = self.seconds as f64;
        let alone_s = steady[0].1.cpu_s;
        let told = steady.iter().map(|(views, followed, rerun_cpu_s, [idle, other], peak_rss_mb)| {
            let cost_s = followed.cpu_s - alone_s;
            let each_s = cost_s / (*views).max(1) as f64;
            json!({
                "views": views,
                "rows": followed.rows,
                "cloud_cpu_cores": followed.cpu_s / seconds,
                "views_cpu_cores": cost_s / seconds,
                "rows_per_second_and_core_of_a_view": (*views > 0).then(|| followed.rows as f64 / each_s),
                "rerun_cpu_s": rerun_cpu_s,
                "share_of_a_rerun_each_second": (*views > 0).then(|| each_s / seconds / rerun_cpu_s),
                "computed_s": followed.computed_s,
                "rows_behind_max": followed.behind,
                "idle_cpu_cores": idle / seconds,
                "idle_cpu_cores_while_another_stream_goes_on": other / seconds,
                "cloud_peak_rss_mb": peak_rss_mb,
            })
        });
        Ok(json!({
            "rate": self.rate,
            "history_rows": self.history,
            "steady": told.collect::<Vec<_>>(),
            "by_history": by_history,
            "by_window": by_window,
            "peers": peers,
        }))
    }

    /// A cloud with history and views that have read it.
    async fn stage(
        &self,
        directory: &Path,
        batch_rows: usize,
        history: u64,
        views: usize,
        (emit, window): (&str, &str),
    ) -> anyhow::Result<Stage> {
        let own = directory.join("stage");
        if own.exists() {
            std::fs::remove_dir_all(&own)?;
        }
        std::fs::create_dir(&own)?;
        let cloud = Cloud::start_with(&own, free_port()?, SETTINGS).await?;
        let [sender, other] = [(); 2].map(|()| Sender::new(schema()?, SpoolId(rand::random())));
        let mut stage = Stage { cloud, sender: sender?, other: other?, batch_rows, sent: 0 };
        let batches = history.div_ceil(batch_rows as u64).max(1);
        while stage.sent < batches {
            stage.send(IN_REQUEST.min(batches - stage.sent)).await?;
        }
        for view in 0..views {
            let view = format!("CREATE MATERIALIZED VIEW v{view} WITH (emit = '{emit}') AS {}", question(window));
            sql::rows(&stage.cloud.http, &view).await?;
        }
        stage.caught_up(views).await?;
        Ok(stage)
    }

    /// Sends at the rate, and waits until every view has seen all of it.
    async fn follow(&self, stage: &mut Stage, views: usize) -> anyhow::Result<Followed> {
        let (cpu_s, computed_s) = (stage.cloud.part.cpu_seconds()?, stage.computed_s().await?);
        let (began, sent) = (Instant::now(), stage.sent);
        let mut behind = [0; 2];
        for beat in 0..self.seconds * BEATS {
            stage.send(1).await?;
            if views > 0 && beat % BEATS == BEATS - 1 {
                let half = &mut behind[usize::from(beat >= self.seconds * BEATS / 2)];
                *half = (*half).max(stage.rows_behind().await?);
            }
            let next = Duration::from_millis(1_000 / BEATS * (beat + 1));
            tokio::time::sleep(next.saturating_sub(began.elapsed())).await;
        }
        stage.caught_up(views).await?;
        Ok(Followed {
            rows: (stage.sent - sent) * stage.batch_rows as u64,
            cpu_s: stage.cloud.part.cpu_seconds()? - cpu_s,
            computed_s: stage.computed_s().await? - computed_s,
            behind,
        })
    }

    /// What others answer over the rows that a view has told of, and what they cost. Windows that the view has not closed
    /// are theirs alone.
    async fn peers(&self, directory: &Path, batch_rows: usize) -> anyhow::Result<Value> {
        if self.python.is_empty() {
            return Ok(Value::Null);
        }
        let stage = self.stage(directory, batch_rows, self.peer_rows, 1, (FINAL, WINDOW)).await?;
        let rows = stage.sent * batch_rows as u64;
        committed(&stage.cloud, rows).await?;
        let shown = "SELECT arrow_cast(b, 'Int64') AS b, n, speed, most FROM v0 ORDER BY b";
        let shown = sql::rows(&stage.cloud.http, shown).await?;
        let mut told = json!({});
        let all = ["bytewax", "pathway", "pyflink"].into_iter();
        for (peer, python) in all.flat_map(|peer| self.python.iter().map(move |python| (peer, python))) {
            if told.get(peer).is_some() {
                continue;
            }
            let output = tokio::process::Command::new(python)
                .args(["-c", PEERS])
                .arg(stage.cloud.table("load"))
                .args([WINDOW_S, peer])
                .output()
                .await
                .with_context(|| format!("start {}", python.display()))?;
            ensure!(output.status.success(), "{peer} failed: {}", String::from_utf8_lossy(&output.stderr));
            let text = String::from_utf8_lossy(&output.stdout);
            let answer: Value =
                serde_json::from_str(text.lines().last().unwrap_or_default()).context("read its answer")?;
            let (Some(windows), Some(cpu_s)) = (answer["windows"].as_array(), answer["cpu_s"].as_f64()) else {
                continue;
            };
            ensure!(answer["rows"] == rows, "{peer} got {} of {rows} rows", answer["rows"]);
            ensure!(!shown.is_empty() && windows.len() >= shown.len(), "{peer}: {} windows", windows.len());
            for (ours, theirs) in shown.iter().zip(windows) {
                let (mean, their_mean) = (ours["speed"].as_f64(), theirs[2].as_f64());
                let is_near = mean.zip(their_mean).is_some_and(|(one, other)| (one - other).abs() <= 1e-9 * one.abs());
                let same = ours["b"] == theirs[0] && ours["n"] == theirs[1] && ours["most"] == theirs[3] && is_near;
                ensure!(same, "{peer} answers {theirs}, and the view {ours:?}");
            }
            let a_second = (rows as f64 / cpu_s).round();
            told[peer] = json!({ "rows": rows, "cpu_s": cpu_s, "rows_per_second_and_core": a_second });
        }
        Ok(told)
    }

    async fn per_million(&self, stage: &mut Stage) -> anyhow::Result<f64> {
        let followed = self.follow(stage, 1).await?;
        Ok(followed.computed_s / followed.rows as f64 * 1e6)
    }
}

fn question(window: &str) -> String {
    format!(
        "SELECT time_bucket('{window}', ts) AS b, count(*) AS n, avg(speed) AS speed, max(vehicles) AS most FROM load GROUP BY 1"
    )
}

impl Stage {
    async fn send(&mut self, batches: u64) -> anyhow::Result<()> {
        let schema = Arc::clone(&self.sender.schema);
        let numbers = self.sent..self.sent + batches;
        let batches = numbers.clone().map(|number| cut(&schema, number, self.batch_rows));
        self.sender.send(&self.cloud.http, &batches.collect::<anyhow::Result<Vec<_>>>()?).await?;
        self.sent = numbers.end;
        Ok(())
    }

    /// How many rows the last view is behind: they are a millisecond apart.
    async fn rows_behind(&self) -> anyhow::Result<u64> {
        let statement = "SELECT coalesce(max(behind), 0) AS behind FROM (SELECT (arrow_cast((SELECT max(ts) FROM load), 'Int64') \
                         - arrow_cast(watermark, 'Int64')) / 1000 AS behind FROM system.views) AS q";
        sql::integer(&self.cloud.http, statement).await
    }

    async fn computed_s(&self) -> anyhow::Result<f64> {
        let rows = sql::rows(&self.cloud.http, "SELECT coalesce(sum(computed_s), 0.0) AS s FROM system.views").await?;
        rows.first().and_then(|row| row["s"].as_f64()).context("read what views computed")
    }

    /// Waits until every view runs and has seen all rows.
    async fn caught_up(&mut self, views: usize) -> anyhow::Result<()> {
        let began = Instant::now();
        let running =
            "SELECT count(*) FROM system.views WHERE state = 'running' AND watermark = (SELECT max(ts) FROM load)";
        while sql::integer(&self.cloud.http, running).await? != views as u64 {
            if began.elapsed() > PATIENCE {
                let told = "SELECT name, state, reason, watermark FROM system.views LIMIT 3";
                let told = sql::rows(&self.cloud.http, told).await?;
                bail!("views do not catch up: {told:?}");
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Every view shows what its question gives for windows that have closed.
    async fn check(&self, views: usize, window: &str) -> anyhow::Result<()> {
        let columns = "b, n, round(speed, 6) AS speed, most";
        let asked = format!(
            "SELECT {columns} FROM ({}) AS q WHERE b < time_bucket('{window}', (SELECT max(ts) FROM load)) ORDER BY b",
            question(window)
        );
        let asked = sql::rows(&self.cloud.http, &asked).await?;
        for view in 0..views {
            let shown = sql::rows(&self.cloud.http, &format!("SELECT {columns} FROM v{view} ORDER BY b")).await?;
            ensure!(shown == asked, "v{view} has {} windows, and its question {}", shown.len(), asked.len());
        }
        Ok(())
    }

    /// CPU-seconds of asking the question once, from scratch.
    async fn rerun(&self) -> anyhow::Result<f64> {
        let before = self.cloud.part.cpu_seconds()?;
        for _ in 0..ASKED {
            sql::rows(&self.cloud.http, &question(WINDOW)).await?;
        }
        Ok((self.cloud.part.cpu_seconds()? - before) / f64::from(ASKED))
    }

    /// CPU-seconds of a time in which nothing comes, or small batches of another stream.
    async fn pass(&mut self, time: Duration, other: bool) -> anyhow::Result<f64> {
        let (began, before) = (Instant::now(), self.cloud.part.cpu_seconds()?);
        let mut number = self.sent * self.batch_rows as u64;
        while began.elapsed() < time {
            if other {
                let batch = cut_of("other", &self.other.schema, number, 1)?;
                self.other.send(&self.cloud.http, &[batch]).await?;
                number += 1;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(self.cloud.part.cpu_seconds()? - before)
    }
}
