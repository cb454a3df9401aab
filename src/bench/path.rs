//! `weir bench path` and `weir bench freshness`: publisher, Mosquitto, edge agent and cloud, each a process.

use std::time::{Duration, Instant};

use anyhow::ensure;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::Common;
use super::parts::{Cloud, Directory, Edge, PATIENCE, POLL, Part, mosquitto};
use super::times::Times;
use crate::publish::{BrokerAddress, Publisher};
use crate::sql;

/// Idle this long before its memory is read.
const IDLE: Duration = Duration::from_secs(3);
/// A paced publisher looks at the clock so often.
const PACE: Duration = Duration::from_millis(2);
const DEVICES: u64 = 500;

const STREAM: &str = r#"
[[source]]
kind = "mqtt"
url = "mqtt://127.0.0.1:{port}"
topics = ["city/traffic/+"]
stream = "load"
[source.map]
device = "topic:2"
ts = { at = "/ts", format = "epoch_us" }
n = "/n"
speed = "/speed"
vehicles = "/vehicles"
occupancy = "/occupancy"
[stream.load]
lateness = "10s"
[stream.load.fields]
n = { type = "int64" }
speed = { type = "float64", min = 0, max = 200 }
vehicles = { type = "int64", min = 0 }
occupancy = { type = "float64", min = 0, max = 100 }
"#;

/// Options of `weir bench path`.
#[derive(Debug, clap::Args)]
pub(crate) struct PathBench {
    /// Publish for so long…
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// …or until so many messages are published
    #[arg(long)]
    messages: Option<u64>,
    /// Messages a second; as many as the broker takes unless set
    #[arg(long)]
    rate: Option<u64>,
    #[command(flatten)]
    common: Common,
}

/// Options of `weir bench freshness`.
#[derive(Debug, clap::Args)]
pub(crate) struct FreshnessBench {
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    #[arg(long, default_value_t = 5_000)]
    rate: u64,
    #[command(flatten)]
    common: Common,
}

/// All processes.
struct Stage {
    broker: Part,
    broker_address: BrokerAddress,
    cloud: Cloud,
    edge: Edge,
    _directory: Directory,
}

impl Stage {
    async fn new(common: &Common) -> anyhow::Result<Self> {
        let directory = Directory::new(common)?;
        let (broker, port) = mosquitto(&directory.0)?;
        let cloud = Cloud::start(&directory.0).await?;
        let edge = Edge::start(&directory.0, common, &cloud.http, &source(port)).await?;
        let broker_address = BrokerAddress { host: "127.0.0.1".to_owned(), port };
        Ok(Self { broker, broker_address, cloud, edge, _directory: directory })
    }
}

/// The configuration of the source and its stream, of a broker at this port.
pub(super) fn source(port: u16) -> String {
    STREAM.replace("{port}", &port.to_string())
}

/// About 120 bytes.
pub(super) fn message(number: u64, now_us: i64) -> (String, Vec<u8>) {
    let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let (speed, vehicles, occupancy) = (mixed % 1_200, mixed % 37, mixed % 1_000);
    let device = number % DEVICES;
    let payload = format!(
        "{{\"ts\":{now_us},\"n\":{number},\"sensor\":\"road-{device:04}\",\"speed\":{}.{},\"vehicles\":{vehicles},\
         \"occupancy\":{}.{},\"status\":\"OK\"}}",
        speed / 10,
        speed % 10,
        occupancy / 10,
        occupancy % 10
    );
    (format!("city/traffic/road-{device:04}"), payload.into_bytes())
}

pub(super) fn now_us() -> i64 {
    edge_agent::source::now_us()
}

impl PathBench {
    pub(super) async fn run(self) -> anyhow::Result<Value> {
        let mut stage = Stage::new(&self.common).await?;
        tokio::time::sleep(IDLE).await;
        let idle_mb = stage.edge.part.memory_mb("VmRSS")?;
        let idle_cpu_s = stage.edge.part.cpu_seconds()?;
        let mut publisher = Publisher::connect(&stage.broker_address, "weir-bench");
        let started = Instant::now();
        let ends = started + Duration::from_secs(self.seconds);
        let mut bytes = 0;
        let mut number = 0;
        while self.messages.map_or_else(|| Instant::now() < ends, |messages| number < messages) {
            let (topic, payload) = message(number, now_us());
            bytes += payload.len() as u64;
            publisher.publish(topic, payload).await?;
            number += 1;
            while self.rate.is_some_and(|rate| number as f64 > started.elapsed().as_secs_f64() * rate as f64) {
                tokio::time::sleep(PACE).await;
            }
        }
        let published = publisher.finish().await?;
        let published_s = started.elapsed().as_secs_f64();
        let mut visible = 0;
        while visible < published {
            ensure!(
                started.elapsed() < Duration::from_secs(self.seconds) + PATIENCE,
                "{visible} of {published} arrived"
            );
            visible = sql::integer(&stage.cloud.http, "SELECT count(*) FROM load").await.unwrap_or(0);
            tokio::time::sleep(POLL).await;
        }
        let visible_s = started.elapsed().as_secs_f64();
        let status = stage.edge.drained().await?;
        let cloud_cpu_s = stage.cloud.part.cpu_seconds()?;
        let distinct = sql::integer(&stage.cloud.http, "SELECT count(DISTINCT n) FROM load").await?;
        let count = sql::integer(&stage.cloud.http, "SELECT count(*) FROM load").await?;
        ensure!(
            (count, distinct) == (published, published),
            "{published} published, {count} rows, {distinct} different"
        );
        let (million, rows) = (published as f64 / 1e6, published as f64);
        Ok(json!({
            "messages": published,
            "json_bytes_per_message": bytes as f64 / rows,
            "published_s": published_s,
            "published_per_second": (rows / published_s).round(),
            "all_visible_s": visible_s,
            "visible_per_second": (rows / visible_s).round(),
            "edge_cpu_s_per_million": (stage.edge.part.cpu_seconds()? - idle_cpu_s) / million,
            "cloud_cpu_s_per_million": cloud_cpu_s / million,
            "broker_cpu_s_per_million": stage.broker.cpu_seconds()? / million,
            "edge_rss_idle_mb": idle_mb,
            "edge_peak_rss_mb": stage.edge.part.memory_mb("VmHWM")?,
            "cloud_peak_rss_mb": stage.cloud.part.memory_mb("VmHWM")?,
            "wire_bytes_per_row": status["uplink"]["bytes_sent"].as_f64().unwrap_or(0.0) / rows,
            "edge_disk_bytes_per_row": stage.edge.part.disk_bytes()? as f64 / rows,
            "edge_journal_syncs": status["journal"]["syncs"],
            "delta_bytes_per_row": stage.cloud.table_bytes("load")? as f64 / rows,
        }))
    }
}

impl FreshnessBench {
    /// One question after the other asks for the newest number; every message up to it became visible at the latest when
    /// the answer was there. So the time of a question is part of the result.
    pub(super) async fn run(self) -> anyhow::Result<Value> {
        let stage = Stage::new(&self.common).await?;
        let total = self.rate * self.seconds;
        let (times, mut published) = mpsc::unbounded_channel();
        let address = stage.broker_address.clone();
        let rate = self.rate;
        let publisher = tokio::spawn(async move {
            let mut publisher = Publisher::connect(&address, "weir-bench");
            let started = Instant::now();
            for number in 0..total {
                // Its time is when it was due: a publisher that is held up must not make things look fresher.
                let due = started + Duration::from_secs_f64(number as f64 / rate as f64);
                while Instant::now() < due {
                    tokio::time::sleep(PACE).await;
                }
                let (topic, payload) = message(number, now_us());
                times.send(due).ok();
                publisher.publish(topic, payload).await?;
            }
            publisher.finish().await
        });
        let (mut latencies, mut questions) = (Times::new(), Times::new());
        let mut visible = 0;
        let started = Instant::now();
        while visible < total {
            ensure!(started.elapsed() < Duration::from_secs(self.seconds) + PATIENCE, "{visible} of {total} arrived");
            let asked = Instant::now();
            let Ok(newest) = sql::integer(&stage.cloud.http, "SELECT max(n) AS n FROM load").await else {
                // Before the first message there is no table.
                tokio::time::sleep(POLL).await;
                continue;
            };
            let answered = Instant::now();
            questions.add(answered - asked);
            while visible <= newest {
                let Some(sent) = published.recv().await else { break };
                latencies.add(answered - sent);
                visible += 1;
            }
        }
        let published = publisher.await??;
        let count = sql::integer(&stage.cloud.http, "SELECT count(*) FROM load").await?;
        ensure!(count == published, "{published} published, {count} rows");
        Ok(json!({
            "messages": published,
            "rate": self.rate,
            "freshness_ms": latencies.report(),
            "question_ms": questions.report(),
        }))
    }
}
