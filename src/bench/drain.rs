//! `weir bench drain`: a backlog goes to a cloud that was away, while live data flows.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::Common;
use super::parts::{Cloud, Directory, Edge, PATIENCE, POLL, free_port, mosquitto};
use super::path::{message, now_us, source};
use super::times::Times;
use crate::publish::{BrokerAddress, Publisher};
use crate::sql;

/// A paced publisher looks at the clock so often.
const PACE: Duration = Duration::from_millis(2);

/// Options of `weir bench drain`.
#[derive(Debug, clap::Args)]
pub(crate) struct DrainBench {
    /// Readings that wait when the cloud comes back
    #[arg(long, default_value_t = 1_000_000)]
    backlog: u64,
    /// Live readings a second, before and during the draining
    #[arg(long, default_value_t = 1_000)]
    rate: u64,
    /// How long live data flows before the cloud goes, to know what is usual
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    #[command(flatten)]
    common: Common,
}

/// A publisher at a steady rate.
struct Live {
    /// When each was due: a publisher that is held up must not make things look fresher.
    due: UnboundedReceiver<Instant>,
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<u64>>,
    latencies: Times,
    /// How long the questions took that look for them: no latency is found to be shorter.
    questions: Times,
    visible: u64,
}

impl Live {
    fn start(address: &BrokerAddress, first: u64, rate: u64) -> anyhow::Result<Self> {
        let (times, due) = mpsc::unbounded_channel();
        let (stop, address) = (CancellationToken::new(), address.clone());
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut publisher = Publisher::connect(&address, "weir-bench-live");
            let started = Instant::now();
            for number in 0.. {
                let due = started + Duration::from_secs_f64(number as f64 / rate as f64);
                while Instant::now() < due {
                    tokio::time::sleep(PACE).await;
                }
                if stopped.is_cancelled() {
                    break;
                }
                let (topic, payload) = message(first + number, now_us());
                times.send(due).ok();
                publisher.publish(topic, payload).await?;
            }
            publisher.finish().await
        });
        Ok(Self { due, stop, task, latencies: Times::new(), questions: Times::new(), visible: 0 })
    }

    /// Asks, and keeps how long that took.
    async fn asked<T>(&mut self, question: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        let started = Instant::now();
        let answer = question.await;
        self.questions.add(started.elapsed());
        answer
    }

    /// So many were in the answer that came now; they come in their order. Those due before `since` do not count.
    async fn seen(&mut self, count: u64, answered: Instant, since: Option<Instant>) {
        while self.visible < count {
            let Some(due) = self.due.recv().await else { return };
            if since.is_some_and(|since| due >= since) {
                self.latencies.add(answered - due);
            }
            self.visible += 1;
        }
    }

    /// Stops the publisher; returns how many it published.
    async fn stop(&mut self) -> anyhow::Result<u64> {
        self.stop.cancel();
        (&mut self.task).await.context("publish")?
    }

    fn report(&self) -> Value {
        let mut report = self.latencies.report();
        report["question_p50"] = self.questions.ms(0.5).into();
        report["question_p99"] = self.questions.ms(0.99).into();
        report
    }
}

/// Rows of the backlog and live rows behind it that are visible: `backlog` numbers from `first` on.
async fn visible(cloud: &Cloud, first: u64, backlog: u64) -> anyhow::Result<(u64, u64)> {
    let behind = first + backlog;
    let statement = format!(
        "SELECT count(*) FILTER (WHERE n >= {first} AND n < {behind}) AS backlog, \
         count(*) FILTER (WHERE n >= {behind}) AS live FROM load"
    );
    // Until the node has seen its first batch there is no table.
    let rows = sql::rows(&cloud.http, &statement).await.unwrap_or_default();
    let number = |name: &str| rows.first().and_then(|row| row.get(name)?.as_u64()).unwrap_or(0);
    Ok((number("backlog"), number("live")))
}

impl DrainBench {
    pub(super) async fn run(self) -> anyhow::Result<Value> {
        let directory = Directory::new(&self.common)?;
        let (_broker, port) = mosquitto(&directory.0)?;
        let address = BrokerAddress { host: "127.0.0.1".to_owned(), port };
        let cloud_port = free_port()?;
        let cloud = Cloud::start_at(&directory.0, cloud_port).await?;
        let mut edge = Edge::start(&directory.0, &self.common, &cloud.http, &source(port)).await?;

        let (mut usual, started) = (Live::start(&address, 0, self.rate)?, Instant::now());
        while started.elapsed() < Duration::from_secs(self.seconds) {
            let live = usual.asked(visible(&cloud, 0, 0)).await?.1;
            usual.seen(live, Instant::now(), Some(started)).await;
        }
        let first = usual.stop().await?;
        edge.drained().await?;
        drop(cloud);

        // The cloud is away.
        let (mut publisher, started) = (Publisher::connect(&address, "weir-bench"), Instant::now());
        for number in first..first + self.backlog {
            let (topic, payload) = message(number, now_us());
            publisher.publish(topic, payload).await?;
        }
        publisher.finish().await?;
        while edge.status().await?["rows"]["spooled"].as_u64() < Some(self.backlog) {
            ensure!(started.elapsed() < PATIENCE, "not all of it is in the spool");
            tokio::time::sleep(POLL).await;
        }
        let filled_s = started.elapsed().as_secs_f64();
        let rss_before_mb = edge.part.memory_mb("VmRSS")?;

        let cloud = Cloud::start_at(&directory.0, cloud_port).await?;
        let (mut live, back) = (Live::start(&address, first + self.backlog, self.rate)?, Instant::now());
        let (mut began, mut rss_mb, cpu_s) = (None, rss_before_mb, edge.part.cpu_seconds()?);
        loop {
            ensure!(back.elapsed() < PATIENCE, "the backlog does not drain: {:#}", edge.status().await?);
            let (backlog, live_rows) = live.asked(visible(&cloud, first, self.backlog)).await?;
            let answered = Instant::now();
            // What was due before the edge had noticed that the cloud is back says nothing of the draining.
            live.seen(live_rows, answered, began.map(|(since, _)| since)).await;
            if began.is_none() && backlog + live_rows > 0 {
                began = Some((answered, backlog));
                live.questions.clear();
            }
            rss_mb = rss_mb.max(edge.part.memory_mb("VmRSS")?);
            if backlog == self.backlog {
                break;
            }
        }
        let (began, before) = began.context("nothing was drained")?;
        let drained_s = began.elapsed().as_secs_f64();
        let cpu_s = edge.part.cpu_seconds()? - cpu_s;
        let published = live.stop().await?;
        let total = first + self.backlog + published;
        while sql::integer(&cloud.http, "SELECT count(*) FROM load").await? < total {
            ensure!(back.elapsed() < PATIENCE, "not all live rows arrive");
            tokio::time::sleep(POLL).await;
        }
        edge.drained().await?;
        let count = sql::integer(&cloud.http, "SELECT count(*) FROM load").await?;
        let distinct = sql::integer(&cloud.http, "SELECT count(DISTINCT n) FROM load").await?;
        ensure!((count, distinct) == (total, total), "{total} published, {count} rows, {distinct} different");
        Ok(json!({
            "backlog": self.backlog,
            "backlog_filled_s": filled_s,
            "noticed_after_s": (began - back).as_secs_f64(),
            "drained_s": drained_s,
            "drained_per_second": ((self.backlog - before) as f64 / drained_s).round(),
            "live_rate": self.rate,
            "live_usual_ms": usual.report(),
            "live_draining_ms": live.report(),
            "edge_cpu_s_while_draining": cpu_s,
            "edge_rss_before_mb": rss_before_mb,
            "edge_rss_draining_max_mb": rss_mb,
            "edge_peak_rss_mb": edge.part.memory_mb("VmHWM")?,
        }))
    }
}
