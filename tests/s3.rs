//! Tables on S3, a server process of its own: moto, from the Python that WEIR_PYTHON names.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::harness::{Answer, Chain, Cloud, Sender, load_rows, load_schema};
use crate::load::{a_moment, seeded};
use crate::process::{PATIENCE, POLL, Process, free_port};
use crate::proxy::{Harm, Link, Proxy, Way};

const KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test")];
const QUICK: &str = "[commit]\nmax_age = \"300ms\"\n";

struct Moto {
    _process: Process,
    port: u16,
}

impl Moto {
    /// None, and a word about it, when it is not installed.
    async fn start(directory: &Path) -> Option<Self> {
        let python = std::env::var("WEIR_PYTHON").unwrap_or_default();
        if !Command::new(&python).args(["-c", "import moto.server"]).output().is_ok_and(|found| found.status.success())
        {
            println!("left out: WEIR_PYTHON names no Python with moto");
            return None;
        }
        let port = free_port();
        let arguments = ["-m", "moto.server", "-H", "127.0.0.1", "-p", &port.to_string()];
        let mut process = Process::new("moto", Path::new(&python), &arguments, directory);
        process.start();
        let (client, started) = (reqwest::Client::new(), Instant::now());
        let made = || client.put(format!("http://127.0.0.1:{port}/weir")).send();
        while !made().await.is_ok_and(|answer| answer.status().is_success()) {
            process.check(started, "does not answer");
            tokio::time::sleep(POLL).await;
        }
        Some(Self { _process: process, port })
    }
}

fn store(port: u16) -> String {
    format!(
        "url = \"s3://weir/tables\"\ns3 = {{ endpoint = \"http://127.0.0.1:{port}\", region = \"us-east-1\", allow_http = true }}"
    )
}

/// A sender that sends until all is durable, and what it has sent.
struct Numbers {
    chain: Chain,
    rows: i64,
    pushed_back: u64,
}

impl Numbers {
    fn new() -> Self {
        Self { chain: Chain::new("load", load_schema()), rows: 0, pushed_back: 0 }
    }

    async fn send(&mut self, cloud: &Cloud, count: usize) {
        let batch = self.chain.seal(&load_rows(self.rows, count));
        self.rows += count as i64;
        let (sender, started) = (Sender::to(cloud), Instant::now());
        loop {
            match sender.send(&self.chain.schema, std::slice::from_ref(&batch)).await {
                Answer::Acks(acks) if acks.acks[0].durable.seq >= batch.header().seq => return,
                Answer::Acks(acks) => panic!("{acks:?}"),
                _ => self.pushed_back += 1,
            }
            assert!(started.elapsed() < 2 * PATIENCE, "batch {} is not taken", batch.header().seq);
            tokio::time::sleep(POLL).await;
        }
    }

    async fn check(&self, cloud: &Cloud) {
        let rows = cloud
            .sql("SELECT count(*) AS n, count(DISTINCT n) AS d, coalesce(sum(n), 0) AS s FROM load")
            .await
            .unwrap();
        let sum = self.rows * (self.rows - 1) / 2;
        assert_eq!(rows[0], serde_json::json!({ "n": self.rows, "d": self.rows, "s": sum }));
    }

    async fn committed(&self, cloud: &Cloud) {
        let started = Instant::now();
        loop {
            let (_, committed) = Sender::to(cloud).positions(self.chain.spool).await.marks();
            if committed == self.chain.last.seq {
                return;
            }
            assert!(started.elapsed() < 2 * PATIENCE, "{committed} of {} committed", self.chain.last.seq);
            tokio::time::sleep(POLL).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_on_s3_that_fails_loses_and_doubles_nothing() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let Some(moto) = Moto::start(directory.path()).await else { return };
    let proxy = Proxy::to(moto.port).await;
    let mut cloud = Cloud::start_on(directory.path(), "a", &store(proxy.port), &KEYS, QUICK).await;
    let mut numbers = Numbers::new();
    numbers.send(&cloud, 100).await;
    numbers.committed(&cloud).await;
    numbers.check(&cloud).await;
    for harm in [Harm::FailAnswers, Harm::CutAnswers] {
        proxy.harm(harm, &mut random);
        for _ in 0..30 {
            numbers.send(&cloud, 50).await;
            a_moment(&mut random).await;
        }
        let before = proxy.heal();
        assert!(before > 0, "nothing was harmed: nothing was tried");
        numbers.committed(&cloud).await;
        numbers.check(&cloud).await;
    }
    // Away, then slow, then killed while it is away.
    proxy.set(Link::Cut);
    for _ in 0..5 {
        numbers.send(&cloud, 50).await;
    }
    proxy.cut();
    proxy.set(Link::Held(Way::Down));
    for _ in 0..5 {
        numbers.send(&cloud, 50).await;
    }
    proxy.set(Link::Whole);
    numbers.committed(&cloud).await;
    numbers.check(&cloud).await;
    numbers.send(&cloud, 50).await;
    cloud.kill();
    cloud.run();
    cloud.wait().await;
    numbers.send(&cloud, 50).await;
    numbers.committed(&cloud).await;
    numbers.check(&cloud).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_down_fills_what_is_set_and_then_pushes_back() {
    let directory = tempfile::tempdir().unwrap();
    let Some(moto) = Moto::start(directory.path()).await else { return };
    let proxy = Proxy::to(moto.port).await;
    let more =
        format!("{QUICK}[hot]\nmax_bytes = \"128MiB\"\n[wal]\nsegment_bytes = \"34MiB\"\nmax_bytes = \"300MiB\"\n");
    let cloud = Cloud::start_on(directory.path(), "a", &store(proxy.port), &KEYS, &more).await;
    let mut numbers = Numbers::new();
    numbers.send(&cloud, 1_000).await;
    numbers.committed(&cloud).await;
    proxy.cut();
    proxy.set(Link::Cut);
    let batch = 50_000;
    while numbers.pushed_back == 0 {
        let sealed = numbers.chain.clone();
        let rows = load_rows(numbers.rows, batch);
        let mut next = sealed.clone();
        let sealed = next.seal(&rows);
        match Sender::to(&cloud).send(&numbers.chain.schema, &[sealed]).await {
            Answer::Acks(_) => (numbers.chain, numbers.rows) = (next, numbers.rows + batch as i64),
            Answer::Refused(wire::RefusedRequest::PushedBack { .. }) => numbers.pushed_back += 1,
            other => panic!("{other:?}"),
        }
        assert!(numbers.rows < 20_000_000, "it is never pushed back");
    }
    assert!(cloud.counter("weir_cloud_hot_bytes").await <= 128 << 20);
    assert!(cloud.counter("weir_cloud_wal_bytes").await <= 300 << 20);
    proxy.set(Link::Whole);
    numbers.send(&cloud, batch).await;
    numbers.committed(&cloud).await;
    numbers.check(&cloud).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retype_on_s3_that_fails_beside_commits_keeps_every_value() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let Some(moto) = Moto::start(directory.path()).await else { return };
    let proxy = Proxy::to(moto.port).await;
    let cloud = Cloud::start_on(directory.path(), "a", &store(proxy.port), &KEYS, QUICK).await;
    let mut numbers = Numbers::new();
    for _ in 0..5 {
        numbers.send(&cloud, 50).await;
        numbers.committed(&cloud).await;
    }
    let config = cloud.config().to_str().unwrap().to_owned();
    for harm in [None, Some(Harm::FailAnswers), Some(Harm::CutAnswers)] {
        for kind in ["text", "float64", "int64"] {
            if let Some(harm) = harm {
                proxy.harm(harm, &mut random);
            }
            let arguments = ["retype", "load", "n", kind, "--config", &config];
            let mut retype = Process::weir("retype", &arguments, directory.path()).with(&KEYS);
            retype.start();
            for _ in 0..5 {
                numbers.send(&cloud, 20).await;
            }
            // It may give up where the store fails too often; then nothing has changed, or all of it.
            if !retype.succeeds() {
                assert!(harm.is_some(), "{}", retype.log_tail());
                proxy.heal();
                retype.start();
                assert!(retype.succeeds(), "{}", retype.log_tail());
            }
            proxy.heal();
            // The node sees the type with its next commit.
            numbers.send(&cloud, 20).await;
            numbers.committed(&cloud).await;
        }
        numbers.check(&cloud).await;
    }
}
