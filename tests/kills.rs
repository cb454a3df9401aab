//! Processes are killed with -9 under load, and nothing is lost, doubled or invented.
//!
//! A publisher numbers its messages and never sends one twice. What the broker acknowledged must be stored, what is
//! stored must have been sent, no number may be twice, values must be equal, and windows must equal a recomputation.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event, MqttOptions};
use tokio::task::JoinHandle;

use crate::harness::{Cloud, Edge, Mosquitto, mqtt_source};
use crate::process::{PATIENCE, POLL};
use crate::proxy::Proxy;

const DEVICES: u64 = 20;
/// Messages go in bursts, so that a kill finds some that are journalled and not acknowledged.
const BURST: u64 = 8;
const PAUSE_BETWEEN_BURSTS: Duration = Duration::from_millis(2);

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

/// The value that goes with a number.
fn value(number: u64) -> f64 {
    (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f64 / 16.0
}

#[derive(Debug, Default)]
struct Ledger {
    next: AtomicU64,
    acknowledged: Mutex<HashSet<u64>>,
}

/// Publishes numbered messages until it is told to stop. After a broken connection it goes on with new numbers.
#[derive(Debug)]
struct Load {
    ledger: Arc<Ledger>,
    stop: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Load {
    fn start(port: u16) -> Self {
        let ledger = Arc::new(Ledger::default());
        let stop = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(publish(port, Arc::clone(&ledger), Arc::clone(&stop)));
        Self { ledger, stop, task }
    }

    async fn finish(self) -> Arc<Ledger> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
        self.ledger
    }
}

async fn publish(port: u16, ledger: Arc<Ledger>, stop: Arc<AtomicBool>) {
    let mut connection = 0;
    while !stop.load(Ordering::Relaxed) {
        connection += 1;
        let mut options = MqttOptions::new(format!("load-{connection}"), "127.0.0.1", port);
        options.set_keep_alive(Duration::from_secs(30)).set_clean_start(true);
        let (client, mut events) = AsyncClient::new(options, 100);
        let sent = Arc::new(Mutex::new(HashMap::<u16, u64>::new()));
        // Numbers in the order of sending; packet ids are given in that order, too.
        let queued = Arc::new(Mutex::new(std::collections::VecDeque::<u64>::new()));
        let sender = tokio::spawn({
            let (ledger, stop, queued) = (Arc::clone(&ledger), Arc::clone(&stop), Arc::clone(&queued));
            async move {
                while !stop.load(Ordering::Relaxed) {
                    let number = ledger.next.fetch_add(1, Ordering::Relaxed);
                    let body = format!(
                        "{{\"n\":{number},\"d\":\"dev-{}\",\"ts\":{},\"v\":{}}}",
                        number % DEVICES,
                        now_ms(),
                        value(number)
                    );
                    queued.lock().unwrap().push_back(number);
                    if client.publish("load/a", QoS::AtLeastOnce, false, body).await.is_err() {
                        return;
                    }
                    if number % BURST == 0 {
                        tokio::time::sleep(PAUSE_BETWEEN_BURSTS).await;
                    }
                }
                client.disconnect().await.ok();
            }
        });
        loop {
            match tokio::time::timeout(Duration::from_secs(10), events.poll()).await {
                Ok(Ok(Event::Outgoing(rumqttc::Outgoing::Publish(id)))) => {
                    let number = queued.lock().unwrap().pop_front().expect("every publish was queued");
                    sent.lock().unwrap().insert(id, number);
                }
                Ok(Ok(Event::Incoming(Packet::PubAck(ack)))) => {
                    if let Some(number) = sent.lock().unwrap().remove(&ack.pkid) {
                        ledger.acknowledged.lock().unwrap().insert(number);
                    }
                }
                Ok(Ok(_)) => {}
                Ok(Err(_)) | Err(_) => break,
            }
        }
        sender.abort();
    }
}

fn stream(url: &str) -> String {
    mqtt_source(url, "load/+", "load", LOAD)
}

const LOAD: &str = r#"
[source.map]
device = "/d"
ts = { at = "/ts", format = "epoch_ms" }
n = "/n"
v = "/v"
[stream.load]
lateness = "2s"
[stream.load.fields]
n = { type = "int64", min = 0 }
v = { type = "float64" }
[stream.load.window.1s]
size = "1s"
"#;

async fn stage(directory: &Path) -> Option<(Mosquitto, Cloud, Edge)> {
    let broker = Mosquitto::start(directory)?;
    let (cloud, edge) = cloud_and_edge(directory, broker.port).await;
    Some((broker, cloud, edge))
}

async fn cloud_and_edge(directory: &Path, broker_port: u16) -> (Cloud, Edge) {
    let cloud = Cloud::start(directory, "a", "[commit]\nmax_age = \"2s\"\n").await;
    let url = format!("mqtt://127.0.0.1:{broker_port}");
    let edge = Edge::start(directory, &cloud, &stream(&url)).await;
    (cloud, edge)
}

/// What the tests promise of the broker's acknowledgements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broker {
    /// It kept what it acknowledged.
    Kept,
    /// It was killed with -9, rolled back to what it saved last, and may have lost some of it.
    Killed,
}

async fn check(cloud: &Cloud, edge: &mut Edge, ledger: &Ledger, broker: Broker) -> serde_json::Value {
    let acknowledged = ledger.acknowledged.lock().unwrap().clone();
    assert!(acknowledged.len() > 500, "the load did not get through: {}", acknowledged.len());
    let started = Instant::now();
    // A node that takes over knows the table with its first batch.
    let stored = async || match cloud.sql("SELECT count(*) AS n FROM load").await {
        Ok(rows) => rows[0]["n"].as_i64().unwrap(),
        Err(_) => 0,
    };
    while broker == Broker::Kept && stored().await < acknowledged.len() as i64 {
        assert!(started.elapsed() < PATIENCE, "not all arrives: {:#}", edge.status().await);
        tokio::time::sleep(POLL).await;
    }
    let status = edge.drained().await;
    let journalled = status["sources"][0]["journalled"].as_i64().unwrap();
    assert_eq!(
        cloud.integer("SELECT count(*) FROM load").await,
        journalled,
        "what was acknowledged to the broker is stored"
    );
    let rows = cloud.sql("SELECT n, v, device FROM load ORDER BY n").await.unwrap();
    let sent = ledger.next.load(Ordering::Relaxed);
    let mut stored = HashSet::new();
    for row in &rows {
        let number = row["n"].as_u64().unwrap();
        // A broker that was rolled back sends again what it had queued, as if it were new: no client can tell.
        assert!(stored.insert(number) || broker == Broker::Killed, "{number} is stored twice");
        assert!(number < sent, "{number} was never sent");
        assert_eq!(row["v"].as_f64().unwrap(), value(number), "value of {number}");
        assert_eq!(row["device"], format!("dev-{}", number % DEVICES));
    }
    let lost: Vec<_> = acknowledged.difference(&stored).collect();
    assert!(broker == Broker::Killed || lost.is_empty(), "{} acknowledged messages are missing: {lost:?}", lost.len());
    assert_eq!(status["quarantined"], serde_json::json!({}), "nothing good belongs in quarantine");
    println!("{} stored, {} redelivered", stored.len(), status["sources"][0]["redelivered"]);
    check_windows(cloud).await;
    status
}

/// Every window row of the highest revision equals what its readings give, and closed windows are all there.
async fn check_windows(cloud: &Cloud) {
    let expected = "SELECT device, date_trunc('second', ts) AS start, count(*) AS c, sum(n) AS s \
                    FROM load WHERE quality = 'good' GROUP BY 1, 2";
    let windows = "SELECT device, window_start AS start, count AS c, n_sum AS s, \
                   row_number() OVER (PARTITION BY device, window_start ORDER BY revision DESC) AS place FROM load_1s";
    let wrong = cloud
        .sql(&format!(
            "SELECT w.device, w.start, w.c, e.c AS expected FROM ({windows}) w LEFT JOIN ({expected}) e \
             ON w.device = e.device AND w.start = e.start \
             WHERE w.place = 1 AND (e.c IS NULL OR w.c <> e.c OR w.s <> e.s) ORDER BY 2 LIMIT 5"
        ))
        .await
        .unwrap();
    assert!(wrong.is_empty(), "windows differ from a recomputation: {wrong:?}");
    let missing = cloud
        .integer(&format!(
            "SELECT count(*) FROM ({expected}) e LEFT JOIN load_1s w ON w.device = e.device AND w.window_start = e.start \
             WHERE w.device IS NULL AND e.start < (SELECT max(ts) - INTERVAL '10 seconds' FROM load)"
        ))
        .await;
    assert_eq!(missing, 0, "closed windows are missing");
}

/// How often a process is killed in one test; more on demand.
fn kills() -> u32 {
    std::env::var("WEIR_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(20)
}

fn seeded() -> StdRng {
    let seed = std::env::var("WEIR_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
    println!("WEIR_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

async fn a_moment(random: &mut StdRng) {
    // The moment of the kill is what is random here; nothing is waited for.
    tokio::time::sleep(Duration::from_millis(random.random_range(50..700))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_when_the_edge_agent_is_killed() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    // Every other time the agent's last acknowledgements do not arrive, so the broker sends those messages again.
    let proxy = Proxy::to(broker.port).await;
    let (cloud, mut edge) = cloud_and_edge(directory.path(), proxy.port).await;
    let load = Load::start(broker.port);
    for round in 0..kills() {
        a_moment(&mut random).await;
        if round % 2 == 0 {
            proxy.lose();
            a_moment(&mut random).await;
        }
        edge.kill();
        proxy.cut();
        edge.run();
    }
    edge.wait().await;
    proxy.lose();
    a_moment(&mut random).await;
    proxy.cut();
    edge.wait().await;
    a_moment(&mut random).await;
    let status = check(&cloud, &mut edge, &*load.finish().await, Broker::Kept).await;
    assert!(status["sources"][0]["redelivered"].as_u64() > Some(0), "nothing was redelivered: nothing was tried");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_when_the_cloud_is_killed() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let Some((broker, mut cloud, mut edge)) = stage(directory.path()).await else { return };
    let load = Load::start(broker.port);
    for _ in 0..kills() {
        a_moment(&mut random).await;
        cloud.kill();
        cloud.run();
    }
    cloud.wait().await;
    check(&cloud, &mut edge, &*load.finish().await, Broker::Kept).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_when_both_are_killed_and_the_broker_restarts() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let Some((mut broker, mut cloud, mut edge)) = stage(directory.path()).await else { return };
    let load = Load::start(broker.port);
    for round in 0..kills() {
        a_moment(&mut random).await;
        edge.kill();
        cloud.kill();
        if round % 4 == 3 {
            broker.stop();
            broker.run();
        }
        cloud.run();
        edge.run();
    }
    cloud.wait().await;
    edge.wait().await;
    check(&cloud, &mut edge, &*load.finish().await, Broker::Kept).await;
}

/// What the first node called durable and had not committed is sent to the second, and the first, when it comes back,
/// finds in the tables what it need not commit.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_when_another_node_takes_over() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let slow = "[commit]\nmax_age = \"2s\"\n";
    let mut first = Cloud::start(directory.path(), "a", slow).await;
    let second = Cloud::start(directory.path(), "b", slow).await;
    let stream = stream(&broker.url());
    let mut edge = Edge::start_with(directory.path(), &[&first, &second], &stream).await;
    let load = Load::start(broker.port);
    for _ in 0..4 {
        a_moment(&mut random).await;
    }
    first.kill();
    for _ in 0..4 {
        a_moment(&mut random).await;
    }
    first.run();
    first.wait().await;
    a_moment(&mut random).await;
    let status = check(&second, &mut edge, &*load.finish().await, Broker::Kept).await;
    assert!(status["uplink"]["url"].as_str().unwrap().starts_with(&second.http), "{status:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_to_a_broker_that_is_killed_is_stored_and_nothing_is_invented() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let Some((mut broker, cloud, mut edge)) = stage(directory.path()).await else { return };
    let load = Load::start(broker.port);
    for _ in 0..5 {
        a_moment(&mut random).await;
        a_moment(&mut random).await;
        broker.kill();
        broker.run();
    }
    a_moment(&mut random).await;
    let ledger = load.finish().await;
    check(&cloud, &mut edge, &ledger, Broker::Killed).await;
}
