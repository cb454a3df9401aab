//! A load of numbered messages, and what must be true of it in the end.
//!
//! A publisher numbers its messages and never sends one twice. What the broker acknowledged must be stored, what is
//! stored must have been sent, no number may be twice, values must be equal, and windows must equal a recomputation. The
//! same goes for lines in a file, which count as acknowledged when they are written, and for requests, when they are
//! answered with 200.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event, MqttOptions};
use tokio::task::JoinHandle;

use crate::harness::{Cloud, Edge, mqtt_source};
use crate::process::{PATIENCE, POLL};

const DEVICES: u64 = 20;
/// Messages go in bursts, so that a kill finds some that are journalled and not acknowledged.
const BURST: u64 = 8;
const PAUSE_BETWEEN_BURSTS: Duration = Duration::from_millis(2);
/// Between groups of lines, and between requests.
const PAUSE_BETWEEN_LINES: Duration = Duration::from_millis(10);
/// Values above it are flagged, a few of a hundred.
const FLAGGED_ABOVE: f64 = 1e6;

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

/// The value that goes with a number.
pub(crate) fn value(number: u64) -> f64 {
    (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f64 / 16.0
}

/// What was sent, and what of it the broker acknowledged.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    next: AtomicU64,
    acknowledged: Mutex<HashSet<u64>>,
}

impl Ledger {
    /// All numbers below this one were given out.
    pub(crate) fn sent(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    fn next(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn acknowledge(&self, number: u64) {
        self.acknowledged.lock().unwrap().insert(number);
    }

    pub(crate) fn acknowledged(&self) -> HashSet<u64> {
        self.acknowledged.lock().unwrap().clone()
    }
}

/// Publishes numbered messages until it is told to stop. After a broken connection it goes on with new numbers.
#[derive(Debug)]
pub(crate) struct Load {
    ledger: Arc<Ledger>,
    stop: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Load {
    pub(crate) fn start(port: u16) -> Self {
        Self::on(port, "load/a", Arc::default())
    }

    /// Several may share a ledger: each number goes to one of their topics.
    pub(crate) fn on(port: u16, topic: &'static str, ledger: Arc<Ledger>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(publish(port, topic, Arc::clone(&ledger), Arc::clone(&stop)));
        Self { ledger, stop, task }
    }

    /// Lines that are added to a file, now and then in two pieces.
    pub(crate) fn to_file(path: PathBuf, ledger: Arc<Ledger>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(write_lines(path, Arc::clone(&ledger), Arc::clone(&stop)));
        Self { ledger, stop, task }
    }

    /// Requests to a door, one after another. What became of one without an answer is not known; it is not sent again.
    pub(crate) fn to_door(url: String, ledger: Arc<Ledger>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(post(url, Arc::clone(&ledger), Arc::clone(&stop)));
        Self { ledger, stop, task }
    }

    /// All numbers below this one were given out.
    pub(crate) fn sent(&self) -> u64 {
        self.ledger.sent()
    }

    pub(crate) async fn finish(self) -> Arc<Ledger> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
        self.ledger
    }
}

fn message(number: u64) -> String {
    let (device, value) = (number % DEVICES, value(number));
    format!("{{\"n\":{number},\"d\":\"dev-{device}\",\"ts\":{},\"v\":{value}}}", now_ms())
}

async fn write_lines(path: PathBuf, ledger: Arc<Ledger>, stop: Arc<AtomicBool>) {
    let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..BURST {
            let number = ledger.next();
            let line = format!("{}\n", message(number));
            let (head, tail) = line.split_at(if number.is_multiple_of(5) { 10 } else { 0 });
            file.write_all(head.as_bytes()).unwrap();
            file.write_all(tail.as_bytes()).unwrap();
            ledger.acknowledge(number);
        }
        tokio::time::sleep(PAUSE_BETWEEN_LINES).await;
    }
}

async fn post(url: String, ledger: Arc<Ledger>, stop: Arc<AtomicBool>) {
    let client = reqwest::Client::new();
    while !stop.load(Ordering::Relaxed) {
        let number = ledger.next();
        if client.post(&url).body(message(number)).send().await.is_ok_and(|answer| answer.status().is_success()) {
            ledger.acknowledge(number);
        }
        tokio::time::sleep(PAUSE_BETWEEN_LINES).await;
    }
}

async fn publish(port: u16, topic: &'static str, ledger: Arc<Ledger>, stop: Arc<AtomicBool>) {
    let mut connection = 0;
    while !stop.load(Ordering::Relaxed) {
        connection += 1;
        let mut options = MqttOptions::new(format!("{topic}-{connection}"), "127.0.0.1", port);
        options.set_keep_alive(Duration::from_secs(30)).set_clean_start(true);
        let (client, mut events) = AsyncClient::new(options, 100);
        let sent = Arc::new(Mutex::new(HashMap::<u16, u64>::new()));
        // Numbers in the order of sending; packet ids are given in that order, too.
        let queued = Arc::new(Mutex::new(std::collections::VecDeque::<u64>::new()));
        let sender = tokio::spawn({
            let (ledger, stop, queued) = (Arc::clone(&ledger), Arc::clone(&stop), Arc::clone(&queued));
            async move {
                while !stop.load(Ordering::Relaxed) {
                    let number = ledger.next();
                    queued.lock().unwrap().push_back(number);
                    if client.publish(topic, QoS::AtLeastOnce, false, message(number)).await.is_err() {
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
                        ledger.acknowledge(number);
                    }
                }
                Ok(Ok(_)) => {}
                Ok(Err(_)) | Err(_) => break,
            }
        }
        sender.abort();
    }
}

/// Configuration of an edge that takes the load.
pub(crate) fn stream(url: &str) -> String {
    stream_of(url, "load/+", "")
}

/// The same for one topic; `source` is added to its source.
pub(crate) fn stream_of(url: &str, topic: &str, source: &str) -> String {
    format!("{}{STREAM}", mqtt_source(url, topic, "load", &format!("{source}{MAP}")))
}

/// The load by MQTT, from a file, and through a door at this port.
pub(crate) fn three_sources(url: &str, file: &Path, port: u16) -> String {
    let mqtt = mqtt_source(url, "load/+", "load", MAP);
    let file = file.display();
    format!(
        "{mqtt}[[source]]\nkind = \"file\"\nname = \"lines\"\npath = \"{file}\"\npoll = \"50ms\"\nstream = \"load\"\n{MAP}\
         [[source]]\nkind = \"http\"\nname = \"door\"\nlisten = \"127.0.0.1:{port}\"\nstream = \"load\"\n{MAP}{STREAM}"
    )
}

const MAP: &str = r#"
[source.map]
device = "/d"
ts = { at = "/ts", format = "epoch_ms" }
n = "/n"
v = "/v"
"#;

const STREAM: &str = r#"
[stream.load]
lateness = "2s"
[stream.load.fields]
n = { type = "int64", min = 0 }
v = { type = "float64", max = 1e6, flag = ["max"] }
[stream.load.window.1s]
size = "1s"
[stream.load.window.2s]
size = "2s"
every = "1s"
[stream.load.window.busy]
gap = "25ms"
"#;

/// What the tests promise of the broker's acknowledgements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broker {
    /// It kept what it acknowledged.
    Kept,
    /// It was killed with -9, rolled back to what it saved last, and may have lost some of it.
    Killed,
}

/// Waits until all is stored and committed, and checks it.
pub(crate) async fn check(cloud: &Cloud, edge: &mut Edge, ledger: &Ledger, broker: Broker) -> serde_json::Value {
    let acknowledged = ledger.acknowledged();
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
    let sources = status["sources"].as_array().unwrap();
    let journalled = sources.iter().map(|source| source["journalled"].as_i64().unwrap()).sum::<i64>();
    assert_eq!(
        cloud.integer("SELECT count(*) FROM load").await,
        journalled,
        "what was acknowledged to the broker is stored"
    );
    let rows = cloud.sql("SELECT n, v, device, quality FROM load ORDER BY n").await.unwrap();
    let sent = ledger.sent();
    let mut stored = HashSet::new();
    for row in &rows {
        let number = row["n"].as_u64().unwrap();
        // A broker that was rolled back sends again what it had queued, as if it were new: no client can tell.
        assert!(stored.insert(number) || broker == Broker::Killed, "{number} is stored twice");
        assert!(number < sent, "{number} was never sent");
        assert_eq!(row["v"].as_f64().unwrap(), value(number), "value of {number}");
        assert_eq!(row["device"], format!("dev-{}", number % DEVICES));
        let quality = if value(number) > FLAGGED_ABOVE { "above_max:v" } else { "good" };
        assert_eq!(row["quality"], quality, "of {number}");
    }
    let lost: Vec<_> = acknowledged.difference(&stored).collect();
    assert!(broker == Broker::Killed || lost.is_empty(), "{} acknowledged messages are missing: {lost:?}", lost.len());
    assert_eq!(status["quarantined"], serde_json::json!({}), "nothing good belongs in quarantine");
    println!("{} stored, {} redelivered", stored.len(), status["sources"][0]["redelivered"]);
    check_windows(cloud).await;
    cloud.check_rows().await;
    status
}

/// What the definitions of the windows say of the readings: device, start, last reading, count and sum of numbers.
const TUMBLING: &str = "SELECT device, date_trunc('second', ts) AS start, max(ts) AS last, count(*) AS c, sum(n) AS s FROM load GROUP BY 1, 2";
const HOPPING: &str = "SELECT device, start, max(ts) AS last, count(*) AS c, sum(n) AS s FROM (SELECT device, ts, n, \
    date_trunc('second', ts) - back.span AS start \
    FROM load, (VALUES (INTERVAL '0 seconds'), (INTERVAL '1 second')) AS back(span)) GROUP BY 1, 2";
const SESSIONS: &str = "SELECT device, min(ts) AS start, max(ts) AS last, count(*) AS c, sum(n) AS s FROM (SELECT *, \
    sum(begins) OVER (PARTITION BY device ORDER BY ts, n) AS session FROM (SELECT device, ts, n, \
    CASE WHEN ts - lag(ts) OVER (PARTITION BY device ORDER BY ts, n) < INTERVAL '25 milliseconds' THEN 0 ELSE 1 END \
    AS begins FROM load)) GROUP BY device, session";

/// The highest revision of every window result equals what its readings give, and closed windows are all there.
async fn check_windows(cloud: &Cloud) {
    for (table, expected) in [("load_1s", TUMBLING), ("load_2s", HOPPING), ("load_busy", SESSIONS)] {
        let told = format!(
            "SELECT device, window_start AS start, count AS c, n_sum AS s, \
             row_number() OVER (PARTITION BY device, window_start ORDER BY revision DESC) AS place FROM {table}"
        );
        // One of count 0 was taken back. The newest may have rows that are not told yet. A session may last as long as the
        // load: then there is no table.
        let told = match cloud.sql(&format!("SELECT count(*) FROM {table}")).await {
            Ok(_) => format!("SELECT * FROM ({told}) WHERE place = 1 AND c > 0"),
            Err(_) => "SELECT device, ts AS start, n AS c, n AS s FROM load WHERE false".to_owned(),
        };
        let differ = format!(
            "SELECT w.device, w.start, w.c, e.start AS due, e.c AS expected FROM ({told}) w FULL JOIN ({expected}) e \
             ON w.device = e.device AND w.start = e.start \
             WHERE (w.c IS NULL OR e.c IS NULL OR w.c <> e.c OR w.s <> e.s) \
             AND coalesce(e.last, w.start) < (SELECT max(ts) - INTERVAL '10 seconds' FROM load) ORDER BY 2 LIMIT 5"
        );
        let wrong = cloud.sql(&differ).await.unwrap();
        assert!(wrong.is_empty(), "windows of {table} differ from a recomputation: {wrong:?}");
    }
}

/// A seed of its own, printed, or the one that is set.
pub(crate) fn seeded() -> StdRng {
    let seed = std::env::var("WEIR_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
    println!("WEIR_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

pub(crate) async fn a_moment(random: &mut StdRng) {
    // The moment of the kill is what is random here; nothing is waited for.
    tokio::time::sleep(Duration::from_millis(random.random_range(50..700))).await;
}
