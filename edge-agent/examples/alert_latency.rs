//! From a published reading to its alert on the local broker, at a steady rate and without a cloud. JSON, times in ms.
//!
//! `cargo run --release -p edge-agent --example alert_latency -- [RATE] [SECONDS] [GROUP_WAIT]`, by default 10000 20 1ms. Needs
//! Mosquitto. Each hundredth message is of a device whose alert begins or ends with it. A reading's event time is when it was
//! handed to its publisher, and an alert carries the event time of the reading that made it: the difference is the way through
//! both clients, the broker twice, journal, pipeline and outbox. Publisher, agent and listener share this process.

use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use chrono::DateTime;
use edge_agent::agent;
use edge_agent::config::Settings;
use edge_agent::source::now_us;
use rumqttc::{AsyncClient, Event, EventLoop, MqttOptions, Packet, QoS};
use tokio_util::sync::CancellationToken;

/// Each of so many messages makes an alert begin or end.
const PROBE_EVERY: u64 = 100;
const PROBES: u64 = 10;
const DEVICES: u64 = 500;
/// What comes in the first second is not counted: connections are made.
const WARM_UP: Duration = Duration::from_secs(1);
const PACE: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_secs(30);

struct Broker(Child, u16);

impl Broker {
    fn start(directory: &Path) -> anyhow::Result<Self> {
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let config = directory.join("mosquitto.conf");
        let text = format!(
            "listener {port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\nmax_inflight_messages 0\n\
             set_tcp_nodelay true\n"
        );
        std::fs::write(&config, text)?;
        let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/usr/local/sbin";
        let child = Command::new("mosquitto").env("PATH", path).arg("-c").arg(&config).spawn();
        let broker = Self(child.context("start Mosquitto")?, port);
        let begun = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            ensure!(begun.elapsed() < PATIENCE, "Mosquitto does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(broker)
    }

    fn client(&self, id: &str) -> (AsyncClient, EventLoop) {
        let mut options = MqttOptions::new(id, "127.0.0.1", self.1);
        options.set_inflight(2_000);
        let (client, mut events) = AsyncClient::new(options, 1_000);
        events.network_options.set_tcp_nodelay(true);
        (client, events)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // It is ending anyway.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn settings(directory: &Path, port: u16, group_wait: &str) -> anyhow::Result<Settings> {
    let text = format!(
        "[edge]\nid = \"gw\"\ndata_dir = {:?}\n[admin]\nlisten = \"127.0.0.1:0\"\n\
         [clock]\ntrust = \"always\"\n[cloud]\nurls = [\"http://127.0.0.1:9\"]\n\
         token = \"t\"\n[journal]\ngroup_wait = \"{group_wait}\"\n[[source]]\nkind = \"mqtt\"\nurl = \"mqtt://127.0.0.1:{port}\"\n\
         topics = [\"field/#\"]\nstream = \"field\"\nmap = {{ device = \"topic:1\", ts = {{ at = \"/ts\", format = \
         \"epoch_us\" }}, v = \"/v\" }}\n[stream.field]\nlateness = \"10s\"\nfields = {{ v = {{ type = \"float64\" }} }}\n\
         [[rule]]\nname = \"high\"\non = \"field\"\nwhen = \"v > 100\"\nmessage = \"{{device}}: {{v}}\"\n\
         topic = \"alerts/{{device}}/high\"\n",
        directory.join("edge").display().to_string(),
    );
    Settings::parse(&text).map_err(anyhow::Error::msg)
}

#[allow(clippy::print_stdout, reason = "its answer")]
#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = std::env::args().skip(1).collect::<Vec<_>>();
    let number = |index: usize, default: u64| arguments.get(index).map_or(Ok(default), |text| text.parse::<u64>());
    let (rate, seconds) = (number(0, 10_000)?, number(1, 20)?);
    let group_wait = arguments.get(2).map_or("1ms", String::as_str);
    let directory = tempfile::tempdir()?;
    let broker = Broker::start(directory.path())?;
    let token = CancellationToken::new();
    let agent = agent::start(settings(directory.path(), broker.1, group_wait)?, token.clone()).await?;
    let ready = |status: &agent::Status| {
        status.sources.iter().all(|source| source.connected)
            && !status.sources.is_empty()
            && status.publisher.as_ref().is_some_and(|publisher| publisher.connected)
    };
    let begun = Instant::now();
    while !ready(&agent.status()) {
        ensure!(begun.elapsed() < PATIENCE, "the agent does not connect");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (listener, mut alerts) = broker.client("listener");
    listener.subscribe("alerts/#", QoS::AtLeastOnce).await?;
    while !matches!(alerts.poll().await?, Event::Incoming(Packet::SubAck(_))) {}
    let publisher = tokio::spawn(publish(broker.client("publisher"), rate, seconds));

    let expected = rate * seconds / PROBE_EVERY;
    let counted_from = now_us() + WARM_UP.as_micros() as i64;
    let (mut came, mut times) = (0, Vec::new());
    while came < expected {
        let event = tokio::time::timeout(PATIENCE, alerts.poll()).await;
        let Event::Incoming(Packet::Publish(alert)) = event.with_context(|| format!("{came} of {expected}"))?? else {
            continue;
        };
        let now = now_us();
        // What is cleared has no payload.
        let Ok(alert) = serde_json::from_slice::<serde_json::Value>(&alert.payload) else { continue };
        let ts =
            alert["ts"].as_str().and_then(|ts| DateTime::parse_from_rfc3339(ts).ok()).context("an alert has a ts")?;
        came += 1;
        if ts.timestamp_micros() >= counted_from {
            times.push(now - ts.timestamp_micros());
        }
    }
    let published_s = publisher.await??;
    let status = agent.status();
    token.cancel();
    agent.stopped().await?;
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize] as f64 / 1e3;
    println!(
        "{}",
        serde_json::json!({
            "rate": rate, "achieved": (rate * seconds) as f64 / published_s, "seconds": seconds, "group_wait": group_wait,
            "alerts": times.len(), "p50_ms": at(0.5), "p90_ms": at(0.9), "p99_ms": at(0.99), "p999_ms": at(0.999),
            "max_ms": at(1.0), "journal_syncs": status.journal.syncs,
        })
    );
    Ok(())
}

/// Returns how long it took.
async fn publish((client, mut events): (AsyncClient, EventLoop), rate: u64, seconds: u64) -> anyhow::Result<f64> {
    let total = rate * seconds;
    let acknowledged = tokio::spawn(async move {
        let mut open = total;
        while open > 0 {
            open -= u64::from(matches!(events.poll().await?, Event::Incoming(Packet::PubAck(_))));
        }
        anyhow::Ok(())
    });
    let begun = Instant::now();
    for number in 0..total {
        while begun.elapsed().as_secs_f64() < number as f64 / rate as f64 {
            tokio::time::sleep(PACE).await;
        }
        let probe = number / PROBE_EVERY;
        let (device, v) = if number % PROBE_EVERY == 0 {
            (format!("probe-{}", probe % PROBES), if (probe / PROBES).is_multiple_of(2) { 200 } else { 20 })
        } else {
            (format!("road-{}", number % DEVICES), 50)
        };
        let payload = format!("{{\"ts\":{},\"v\":{v},\"vehicles\":7,\"occupancy\":12.5,\"status\":\"OK\"}}", now_us());
        client.publish(format!("field/{device}"), QoS::AtLeastOnce, false, payload).await?;
    }
    let took = begun.elapsed().as_secs_f64();
    acknowledged.await??;
    Ok(took)
}
