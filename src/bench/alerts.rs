//! `weir bench alerts`: from a reading at an edge to the alert at a subscriber of the cloud, what many rules cost, and many
//! subscribers. Every alert of the plan must come, each once, before numbers are shown.
//!
//! - `edge`: publisher, Mosquitto, edge agent, cloud, one subscriber. Of the readings of each second ten begin an alert; the
//!   time of a reading is when it was due, so that a publisher that is held up makes nothing look faster. Windows of a second,
//!   of one device each an alert, are measured from when the edge's watermark could have closed them.
//! - `rules`: batches to a cloud at a steady rate, without rules and with many row rules; user and system time of the cloud.
//! - `subscribers`: many listen to every alert, from when it was decided to when each of them has read it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use futures::StreamExt;
use memchr::memmem::Finder;
use parking_lot::RwLock;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use wire::sealed::NO_WATERMARK;
use wire::{CutBatch, SpoolId, StreamSchema};

use super::Common;
use super::ingest::{self, Sender};
use super::parts::{Cloud, Directory, Edge, PATIENCE, free_port, mosquitto};
use super::path::{message, now_us, source};
use super::times::{Times, micros};
use crate::publish::{BrokerAddress, Publisher};

/// A reading of so many begins an alert: its number is a multiple. Those in the middle end it.
const EACH: u64 = 1_000;
/// Of the sender of batches.
const ROUNDS_PER_SECOND: u64 = 10;
const PACE: Duration = Duration::from_millis(2);
const WINDOWS: &str = "[stream.load.window.1s]\nsize = \"1s\"\n";

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Measure {
    Edge,
    Rules,
    Subscribers,
}

/// Options of `weir bench alerts`.
#[derive(Debug, clap::Args)]
pub(crate) struct AlertsBench {
    /// All of them unless set
    #[arg(long, value_enum)]
    measure: Vec<Measure>,
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Readings a second at the edge
    #[arg(long, default_value_t = 10_000)]
    rate: u64,
    #[arg(long, default_value_t = 1_000)]
    rules: u64,
    /// Rows a second through the rules
    #[arg(long, default_value_t = 100_000)]
    rows: u64,
    #[arg(long, default_value_t = 10_000)]
    subscribers: u64,
    /// Alerts a second for all subscribers
    #[arg(long, default_value_t = 100)]
    events: u64,
    #[command(flatten)]
    common: Common,
}

impl AlertsBench {
    pub(super) async fn run(self) -> anyhow::Result<Value> {
        let mut result = json!({});
        for measure in [Measure::Edge, Measure::Rules, Measure::Subscribers] {
            if !self.measure.is_empty() && !self.measure.contains(&measure) {
                continue;
            }
            let (name, found) = match measure {
                Measure::Edge => ("edge", self.edge().await?),
                Measure::Rules => ("rules", self.rules().await?),
                Measure::Subscribers => ("subscribers", self.subscribers().await?),
            };
            result[name] = found;
        }
        Ok(result)
    }

    async fn edge(&self) -> anyhow::Result<Value> {
        let directory = Directory::new(&self.common)?;
        let (_broker, port) = mosquitto(&directory.0)?;
        let cloud = Cloud::start(&directory.0).await?;
        let source = source(port).replace("lateness = \"10s\"", "lateness = \"0s\"") + WINDOWS;
        let mut edge = Edge::start(&directory.0, &self.common, &cloud.http, &source).await?;
        let address = BrokerAddress { host: "127.0.0.1".to_owned(), port };
        let mut publisher = Publisher::connect(&address, "weir-bench");
        // The streams are there before there are rules on them.
        let begin = now_us();
        for number in [1, 2] {
            let (topic, payload) = message(number, begin + (number as i64 - 1) * 2_000_000);
            publisher.publish(topic, payload).await?;
        }
        edge.drained().await?;
        let high = format!("sql = \"SELECT device, n FROM load WHERE n % {EACH} = 0\"\nmessage = \"{{{{ n }}}}\"");
        put(&cloud, "high", &high).await?;
        let window = "sql = \"SELECT device, CAST(window_end AS VARCHAR) AS ends FROM load_1s WHERE device = 'road-0000'\"\n\
                      max_instances = 100000\nmessage = \"{{ ends }}\"";
        put(&cloud, "window", window).await?;
        let mut listener = Listener::new(&cloud.http).await?;
        let (rate, total) = (self.rate, self.rate * self.seconds);
        // Behind what was sent before.
        let (started, start_us) = (Instant::now() + Duration::from_secs(3), now_us() + 3_000_000);
        let publishing = tokio::spawn(async move {
            for number in 0..total {
                let due = Duration::from_secs_f64(number as f64 / rate as f64);
                while Instant::now() < started + due {
                    tokio::time::sleep(PACE).await;
                }
                // Numbers of the first of each device: what ends an alert has another number of the same device.
                let (topic, payload) = message(number, start_us + micros(due) as i64);
                publisher.publish(topic, payload).await?;
            }
            publisher.finish().await
        });
        let expected: BTreeSet<u64> = (0..total).step_by(EACH as usize).collect();
        let mut heard: BTreeSet<u64> = BTreeSet::new();
        let (mut readings, mut windows) = (Times::new(), Times::new());
        let deadline = Instant::now() + Duration::from_secs(self.seconds) + PATIENCE;
        while heard.len() < expected.len() {
            let event = tokio::time::timeout_at(deadline.into(), listener.next()).await;
            let event = event.with_context(|| format!("{} of {} alerts came", heard.len(), expected.len()))??;
            let data = &event["data"];
            if data["transition"] != "firing" {
                continue;
            }
            let late = |us: i64| u64::try_from(now_us() - us).unwrap_or(0);
            let text = data["message"].as_str().unwrap_or_default();
            if data["rule"] == "high" {
                let number: u64 = text.parse().with_context(|| format!("a number in {text:?}"))?;
                ensure!(expected.contains(&number) && heard.insert(number), "{number} was not expected, or came twice");
                readings.add_us(late(time(&data["from"])?));
            } else if let Ok(end) = time(&data["labels"]["ends"])
                && end > start_us
            {
                windows.add_us(late(end));
            }
        }
        let published = publishing.await??;
        ensure!(
            self.seconds < 5 || windows.count() >= self.seconds - 4,
            "{} windows of {} s",
            windows.count(),
            self.seconds
        );
        Ok(json!({
            "readings": published,
            "rate": self.rate,
            "alerts": heard.len(),
            "reading_to_alert_ms": readings.report(),
            "windows": windows.count(),
            "window_close_to_alert_ms": windows.report(),
            "cloud_cpu_s": cloud.part.cpu_seconds()?,
            "edge_cpu_s": edge.part.cpu_seconds()?,
        }))
    }

    async fn rules(&self) -> anyhow::Result<Value> {
        let plain = self.load(0).await?;
        let ruled = self.load(self.rules).await?;
        let core = |cpu_s: f64| (cpu_s / self.seconds as f64 * 1_000.0).round() / 1_000.0;
        Ok(json!({
            "rules": self.rules,
            "rows_per_second": self.rows,
            "cores_without_rules": core(plain.0),
            "cores_with_rules": core(ruled.0),
            "cores_of_rules": core(ruled.0 - plain.0),
            "slowest_round_ms": [plain.1, ruled.1],
            "peak_rss_mb": [plain.2, ruled.2],
        }))
    }

    /// CPU-seconds of the cloud, its slowest answer in ms, and its memory.
    async fn load(&self, rules: u64) -> anyhow::Result<(f64, f64, f64)> {
        let directory = Directory::new(&self.common)?;
        let cloud = Cloud::start(&directory.0).await?;
        let mut sender = Sender::new(ingest::schema()?, SpoolId([7; 16]))?;
        sender.send(&cloud.http, &[cut(&sender.schema, &["road-0000".to_owned()], 1.0)?]).await?;
        for rule in 0..rules {
            // No road is so fast: but the planted one, for the rule that is asked for it.
            let text = format!(
                "sql = \"SELECT device, speed FROM load WHERE speed > {} AND vehicles < {}\"",
                200 + rule,
                20 + rule % 20
            );
            put(&cloud, &format!("r{rule}"), &text).await?;
        }
        let devices: Vec<String> = (0..500).map(|device| format!("road-{device:04}")).collect();
        let rows = self.rows / ROUNDS_PER_SECOND;
        let many: Vec<String> = (0..rows).map(|row| devices[row as usize % devices.len()].clone()).collect();
        let (before, started, mut slowest) = (cloud.part.cpu_seconds()?, Instant::now(), Duration::ZERO);
        for round in 0..self.seconds * ROUNDS_PER_SECOND {
            let due = Duration::from_secs_f64(round as f64 / ROUNDS_PER_SECOND as f64);
            tokio::time::sleep(due.saturating_sub(started.elapsed())).await;
            let batches =
                many.chunks(8_192).map(|part| cut(&sender.schema, part, 50.0)).collect::<anyhow::Result<Vec<_>>>()?;
            let begun = Instant::now();
            sender.send(&cloud.http, &batches).await?;
            slowest = slowest.max(begun.elapsed());
        }
        let kept_up = started.elapsed().as_secs_f64() <= self.seconds as f64 * 1.1 + 1.0;
        let cpu_s = cloud.part.cpu_seconds()? - before;
        ensure!(kept_up, "{} rows a second are more than it takes", self.rows);
        if rules > 0 {
            // One row for which every rule holds.
            sender.send(&cloud.http, &[cut(&sender.schema, &["planted".to_owned()], 1e6)?]).await?;
            let begun = Instant::now();
            while raised(&cloud.http).await? < rules {
                ensure!(begun.elapsed() < PATIENCE, "not every rule has found the row that was planted");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            let statement = "SELECT count(*) AS n FROM alert_log WHERE transition = 'firing' AND device <> 'planted'";
            ensure!(crate::sql::integer(&cloud.http, statement).await? == 0, "an alert without data behind it");
        }
        Ok((cpu_s, slowest.as_secs_f64() * 1e3, cloud.part.memory_mb("VmHWM")?))
    }

    async fn subscribers(&self) -> anyhow::Result<Value> {
        let directory = Directory::new(&self.common)?;
        let limits = format!(
            "http_connections = {}\n[alerts]\nsubscribers_max = {}\n[commit]\nmax_age = \"10s\"\n",
            self.subscribers + 500,
            self.subscribers + 10
        );
        let cloud = Cloud::start_with(&directory.0, free_port()?, &limits).await?;
        let mut sender = Sender::new(ingest::schema()?, SpoolId([7; 16]))?;
        sender.send(&cloud.http, &[cut(&sender.schema, &["road-0000".to_owned()], 1.0)?]).await?;
        put(&cloud, "high", "sql = \"SELECT device, speed FROM load WHERE speed > 200\"\nmax_instances = 100000")
            .await?;
        let idle_mb = cloud.part.memory_mb("VmRSS")?;
        let total = self.events * self.seconds;
        let all = Arc::new(Mutex::new(Times::new()));
        let (behind, decided) = (Arc::new(AtomicU64::new(0)), Arc::new(Decided::default()));
        let mut listening = Vec::new();
        for _ in 0..self.subscribers {
            let socket = subscribe(&cloud.http).await?;
            let (all, behind, decided) = (Arc::clone(&all), Arc::clone(&behind), Arc::clone(&decided));
            listening.push(tokio::spawn(async move {
                let own = listen(socket, total, decided).await?;
                behind.fetch_add(1, Ordering::Relaxed);
                let mut all = all.lock().await;
                own.into_iter().for_each(|us| all.add_us(us));
                anyhow::Ok(())
            }));
        }
        let connected_mb = cloud.part.memory_mb("VmRSS")?;
        let (before, started) = (cloud.part.cpu_seconds()?, Instant::now());
        let (http, schema, events) = (cloud.http.clone(), Arc::clone(&sender.schema), self.events);
        // On its own thread: behind thousands of listeners it would wait for its turn.
        let sending = tokio::task::spawn_blocking(move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?
                .block_on(send(&http, schema, total, events))
        });
        let sent_s = sending.await??;
        for one in listening {
            let heard = tokio::time::timeout(PATIENCE, one).await;
            let came = behind.load(Ordering::Relaxed);
            heard.with_context(|| format!("{came} of {} subscribers have all", self.subscribers))???;
        }
        let all = all.lock().await;
        ensure!(all.count() == total * self.subscribers, "{} of {}", all.count(), total * self.subscribers);
        Ok(json!({
            "subscribers": self.subscribers,
            "events": total,
            "events_per_second": total as f64 / sent_s,
            "decided_to_read_ms": all.report(),
            "cloud_cores": (cloud.part.cpu_seconds()? - before) / started.elapsed().as_secs_f64(),
            "rss_mb": { "idle": idle_mb, "connected": connected_mb, "peak": cloud.part.memory_mb("VmHWM")? },
        }))
    }
}

/// µs since 1970 of a text.
fn time(text: &Value) -> anyhow::Result<i64> {
    let text = text.as_str().context("a time")?;
    Ok(chrono::DateTime::parse_from_rfc3339(text).with_context(|| format!("read {text:?}"))?.timestamp_micros())
}

async fn put(cloud: &Cloud, name: &str, rule: &str) -> anyhow::Result<()> {
    let url = format!("{}/v1/rules/{name}", cloud.http);
    let begun = Instant::now();
    loop {
        let answer = reqwest::Client::new().put(&url).body(rule.to_owned()).send().await?;
        if answer.status().is_success() {
            return Ok(());
        }
        // Its stream may come in a moment.
        let told = answer.text().await?;
        ensure!(begun.elapsed() < PATIENCE, "{told}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// How many alerts have fired.
async fn raised(http: &str) -> anyhow::Result<u64> {
    let statement = "SELECT count(*) AS n FROM alert_log WHERE transition = 'firing' AND device = 'planted'";
    // Before the first decision there is no table.
    Ok(crate::sql::integer(http, statement).await.unwrap_or(0))
}

/// Rows of `load` of now, one of each device.
fn cut(schema: &StreamSchema, devices: &[String], speed: f64) -> anyhow::Result<CutBatch> {
    let (now, count) = (now_us(), devices.len());
    let columns: Vec<ArrayRef> = vec![
        Arc::new(
            TimestampMicrosecondArray::from_iter_values((0..count as i64).map(|row| now + row)).with_timezone("UTC"),
        ),
        Arc::new(StringArray::from_iter_values(devices)),
        Arc::new(Float64Array::from_value(speed, count)),
        Arc::new(Int64Array::from_value(3, count)),
        Arc::new(Float64Array::from_value(1.0, count)),
        Arc::new(StringArray::from_iter_values((0..count).map(|_| "good"))),
    ];
    let rows = RecordBatch::try_new(schema.arrow().clone(), columns)?;
    Ok(CutBatch::seal("load".parse()?, schema, &rows, NO_WATERMARK, "bench", 0)?)
}

/// One subscriber, whose events are read whole.
struct Listener {
    stream: futures::stream::BoxStream<'static, reqwest::Result<Vec<u8>>>,
    buffer: String,
}

impl Listener {
    async fn new(http: &str) -> anyhow::Result<Self> {
        let answer = reqwest::Client::new().get(format!("{http}/v1/alerts/stream")).send().await?.error_for_status()?;
        let stream = answer.bytes_stream().map(|bytes| bytes.map(Into::into)).boxed();
        Ok(Self { stream, buffer: String::new() })
    }

    async fn next(&mut self) -> anyhow::Result<Value> {
        loop {
            if let Some((event, rest)) = self.buffer.split_once("\n\n") {
                let data = event.lines().find_map(|line| line.strip_prefix("data: ")).map(str::to_owned);
                self.buffer = rest.to_owned();
                if let Some(data) = data {
                    return Ok(serde_json::from_str(&data)?);
                }
                continue;
            }
            let bytes = self.stream.next().await.context("the stream of alerts has ended")??;
            self.buffer.push_str(std::str::from_utf8(&bytes)?);
        }
    }
}

/// A connection that listens, as cheap as it can be: thousands share a machine with what they measure.
async fn subscribe(http: &str) -> anyhow::Result<TcpStream> {
    let address = http.strip_prefix("http://").context("an address")?;
    let mut socket = TcpStream::connect(address).await.context("connect a subscriber: ulimit -n may be too low")?;
    let request = format!("GET /v1/alerts/stream HTTP/1.1\r\nhost: {address}\r\n\r\n");
    socket.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    ensure!(head.starts_with("HTTP/1.1 200"), "a subscriber was told {head}");
    Ok(socket)
}

/// Rows that each begin an alert, so many a second; returns how long it took.
async fn send(http: &str, schema: Arc<StreamSchema>, total: u64, per_second: u64) -> anyhow::Result<f64> {
    let mut sender = Sender::new(schema, SpoolId([8; 16]))?;
    let started = Instant::now();
    for event in 0..total {
        let due = Duration::from_secs_f64(event as f64 / per_second as f64);
        tokio::time::sleep(due.saturating_sub(started.elapsed())).await;
        let device = format!("road-{event:06}");
        sender.send(http, &[cut(&sender.schema, &[device], 300.0)?]).await?;
    }
    Ok(started.elapsed().as_secs_f64())
}

/// When each event was decided, µs since 1970 UTC by its id: read from its text by whoever has it first. Reading it 10,000
/// times would take the cores from what is measured.
#[derive(Debug, Default)]
struct Decided(RwLock<HashMap<i64, i64>>);

impl Decided {
    fn at(&self, id: i64, event: &[u8]) -> anyhow::Result<i64> {
        const TIME: &str = "\"time\":\"";
        if let Some(at) = self.0.read().get(&id) {
            return Ok(*at);
        }
        let text = std::str::from_utf8(event)?;
        let at = text.split_once(TIME).and_then(|(_, rest)| rest.split_once('"')).context("an event has a time")?.0;
        let at = chrono::DateTime::parse_from_rfc3339(at)?.timestamp_micros();
        self.0.write().insert(id, at);
        Ok(at)
    }
}

/// Until it has so many events, each once and in order: how long each took from when it was decided, µs.
async fn listen(mut socket: TcpStream, total: u64, decided: Arc<Decided>) -> anyhow::Result<Vec<u64>> {
    const ID: &[u8] = b"id: ";
    let (end, id) = (Finder::new(b"\n\n"), Finder::new(ID));
    let total = usize::try_from(total)?;
    let mut times = Vec::with_capacity(total);
    let (mut buffer, mut last) = (Vec::with_capacity(16 << 10), 0);
    while times.len() < total {
        let count = socket.read_buf(&mut buffer).await?;
        ensure!(count > 0, "the stream of alerts has ended");
        let (now, mut read) = (now_us(), 0);
        // Lengths of chunks stand between events, and each event is whole in one.
        while let Some(length) = end.find(&buffer[read..]) {
            let event = &buffer[read..read + length];
            read += length + 2;
            let Some(at) = id.find(event) else { continue };
            let number = event[at + ID.len()..].iter().take_while(|byte| byte.is_ascii_digit());
            let id = number.fold(0_i64, |sum, digit| sum * 10 + i64::from(digit - b'0'));
            if id <= last {
                bail!("{id} behind {last}");
            }
            last = id;
            times.push(u64::try_from(now - decided.at(id, event)?).unwrap_or(0));
        }
        buffer.drain(..read);
    }
    Ok(times)
}
