//! A node whose store is down and whose memory is full: readings wait, views and alerts go on, and in the end all is there once.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use wire::SealedBatch;
use wire::request::{KIND_BATCH, KIND_SCHEMA, push_frame};

use crate::cloud_alerts::{RULE, Readings, listening, put, request};
use crate::harness::{Answer, Chain, Cloud, EDGE, Sender, TOKEN, load_rows, load_schema};
use crate::process::{PATIENCE, POLL};

/// Commits wait until there is pressure.
const SMALL: &str = "[commit]\nmax_age = \"1h\"\n[hot]\nmax_bytes = \"128MiB\"\n\
                     [wal]\nsegment_bytes = \"34MiB\"\nmax_bytes = \"1GiB\"\n";
/// An alert about the node itself.
const PRESSED: &str = "sql = \"SELECT class AS device FROM system.pressure WHERE class = 'readings' AND hot_free_bytes < 4096\"\n\
                       every = \"1s\"\nmessage = \"no room for readings\"\nseverity = \"critical\"\ntopic = \"alerts/node/pressed\"\n";
/// Each can take four fifths of what the others have left.
const STREAMS: usize = 12;

/// A sender of one stream that keeps what is not taken.
struct Flood {
    chain: Chain,
    rows: i64,
    refused: Option<SealedBatch>,
}

impl Flood {
    fn new(index: usize) -> Self {
        Self { chain: Chain::new(&format!("load{index}"), load_schema()), rows: 0, refused: None }
    }

    /// Sends so many rows; whether they were taken. Those that were not are sent by [`Flood::settle`].
    async fn send(&mut self, sender: &Sender, count: usize) -> bool {
        assert!(self.refused.is_none());
        let before = self.chain.clone();
        let batch = self.chain.seal(&load_rows(self.rows, count));
        match sender.send(&self.chain.schema, std::slice::from_ref(&batch)).await {
            Answer::Acks(_) => self.rows += count as i64,
            Answer::Refused(wire::RefusedRequest::PushedBack { .. }) if count > 1 => {
                self.chain = before;
                return false;
            }
            Answer::Refused(wire::RefusedRequest::PushedBack { .. }) => {
                (self.refused, self.rows) = (Some(batch), self.rows + 1);
                return false;
            }
            other => panic!("{other:?}"),
        }
        true
    }

    /// Sends smaller and smaller batches until not even one row is taken; whether any was.
    async fn fill(&mut self, sender: &Sender) -> bool {
        let (before, mut count) = (self.rows, 50_000);
        loop {
            while self.send(sender, count).await {
                assert!(self.rows < 10_000_000, "it is never pushed back");
            }
            if count == 1 {
                return self.rows > before + 1;
            }
            count = (count / 8).max(1);
        }
    }

    /// Sends what was refused until it is taken.
    async fn settle(&mut self, sender: &Sender) {
        let Some(batch) = self.refused.take() else { return };
        let begun = Instant::now();
        while !matches!(sender.send(&self.chain.schema, std::slice::from_ref(&batch)).await, Answer::Acks(_)) {
            assert!(begun.elapsed() < PATIENCE, "{} is not taken when the store is back", self.chain.stream);
            tokio::time::sleep(POLL).await;
        }
    }
}

/// Takes the store away: where the tables were there is a file.
fn take_away(directory: &Path) {
    std::fs::rename(directory.join("tables"), directory.join("away")).unwrap();
    std::fs::write(directory.join("tables"), "gone").unwrap();
}

fn bring_back(directory: &Path) {
    std::fs::remove_file(directory.join("tables")).unwrap();
    std::fs::rename(directory.join("away"), directory.join("tables")).unwrap();
}

async fn until(cloud: &Cloud, statement: &str, expected: i64) {
    let begun = Instant::now();
    loop {
        let found = cloud.integer(statement).await;
        if found == expected {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{statement}: {found}, not {expected}");
        tokio::time::sleep(POLL).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readings_wait_while_alerts_and_views_go_on_and_all_is_there_once() {
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = Cloud::start(directory.path(), "a", SMALL).await;
    let sender = Sender::to(&cloud);
    let mut floods: Vec<Flood> = (0..STREAMS).map(Flood::new).collect();
    for flood in &mut floods {
        assert!(flood.send(&sender, 1).await);
    }
    let mut readings = Readings::to(&cloud);
    readings.send(&[("d0", 1)]).await;
    put(&cloud, "high", RULE).await;
    let mut listener = listening(&cloud, "?after=0");
    listener.connect().await;
    readings.send(&[("d1", 200)]).await;
    let first = listener.next().await;
    assert_eq!(first["data"]["device"], "d1");
    let view = "CREATE MATERIALIZED VIEW told AS SELECT ts, transition, rule, sequence FROM alert_log";
    cloud.sql(view).await.unwrap();
    until(&cloud, "SELECT count(*) FROM told WHERE transition = 'firing'", 1).await;

    take_away(directory.path());
    let mut stuck = 0;
    for flood in &mut floods {
        stuck += usize::from(!flood.fill(&sender).await);
    }
    assert!(stuck > 0, "there is still room for a reading");
    // The rule is put now, asked each second, and this is a debug build.
    let full = Instant::now();
    put(&cloud, "pressed", PRESSED).await;
    let pressed = tokio::time::timeout(Duration::from_secs(15), listener.next()).await.expect("the alert is told");
    println!("the alert was told {:?} after its rule was put, without room for a reading", full.elapsed());
    assert_eq!((&pressed["data"]["rule"], &pressed["data"]["device"]), (&json!("pressed"), &json!("readings")));
    let fired = "SELECT count(*) FROM alert_log WHERE rule = 'pressed' AND transition = 'firing'";
    assert_eq!(cloud.integer(fired).await, 1, "it is told, and not in the record");
    // People are heard as at any time, and a view goes on.
    let (id, asked) = (first["data"]["id"].as_str().unwrap(), Instant::now());
    let said = json!({ "by": "eva", "note": "on my way" }).to_string();
    let (status, answer) = request(&cloud, "POST", &format!("/v1/alerts/{id}/ack"), &said).await;
    assert_eq!(status, 200, "{answer}");
    println!("an acknowledgement took {:?}", asked.elapsed());
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    assert_eq!(listener.next().await["data"]["transition"], "acknowledged");
    until(&cloud, "SELECT count(*) FROM told WHERE transition = 'acknowledged'", 1).await;
    // A reading is told when to come again.
    let refused = floods.iter().find(|flood| flood.refused.is_some()).unwrap();
    let mut body = Vec::new();
    push_frame(&mut body, KIND_SCHEMA, refused.chain.schema.canonical().as_bytes());
    push_frame(&mut body, KIND_BATCH, refused.refused.as_ref().unwrap().bytes());
    let post = sender.client.post(format!("{}/v1/edges/{EDGE}/batches", cloud.http)).bearer_auth(TOKEN).body(body);
    let answer = post.send().await.unwrap();
    assert_eq!((answer.status().as_u16(), &answer.headers()["retry-after"]), (429, &"1".parse().unwrap()));
    let shown =
        "SELECT class, pushed_back, hot_bytes, hot_free_bytes, wal_free_bytes FROM system.pressure ORDER BY place";
    cloud.sql(shown).await.unwrap().iter().for_each(|row| println!("{row}"));
    let order = cloud
        .sql("SELECT class, pushed_back > 0 AS waits, hot_bytes > 0 AS is_hot FROM system.pressure ORDER BY place")
        .await;
    let row = |class: &str, waits: bool| json!({ "class": class, "waits": waits, "is_hot": true });
    assert_eq!(order.unwrap(), [row("alerts", false), row("views", false), row("readings", true)]);
    assert!(cloud.counter("weir_cloud_commits_failed_total").await > 0, "the store was there");

    bring_back(directory.path());
    for flood in &mut floods {
        flood.settle(&sender).await;
    }
    cloud.check_rows().await;
    for class in ["alerts", "views", "readings"] {
        let count = async |name: &str| cloud.counter(&format!("weir_cloud_{name}{{class=\"{class}\"}}")).await;
        let received = count("received_total").await;
        let durable = count("durable_total").await;
        let others = [count("duplicate_total").await, count("refused_total").await, count("pushed_back_total").await];
        assert_eq!(received, durable + others.iter().sum::<u64>(), "{class}");
        assert!(durable > 0 && durable >= count("committed_total").await, "{class}");
    }
    cloud.stop();
    cloud.run();
    cloud.wait().await;
    for flood in &floods {
        let (stream, rows) = (&flood.chain.stream, flood.rows);
        let asked = format!("SELECT count(*) AS n, count(DISTINCT n) AS d, sum(n) AS s FROM {stream}");
        let found = cloud.sql(&asked).await.unwrap();
        assert_eq!(found[0], json!({ "n": rows, "d": rows, "s": rows * (rows - 1) / 2 }), "{stream}");
    }
    let changes = cloud.sql("SELECT count(*) AS n, count(DISTINCT sequence) AS d FROM alert_log").await.unwrap();
    assert_eq!(changes[0]["n"], changes[0]["d"]);
    assert_eq!(cloud.integer(fired).await, 1);
    until(&cloud, "SELECT count(*) FROM told WHERE transition = 'acknowledged'", 1).await;
}
