//! A store on S3 that fails, is slow, or away.

use std::sync::Arc;
use std::time::Instant;

use arrow::array::{Int64Array, RecordBatch};
use object_store::ObjectStoreExt;
use rand::Rng;

use crate::harness::{Answer, Chain, Cloud, Sender, load_rows, load_schema};
use crate::lake::Lake;
use crate::load::{a_moment, seeded};
use crate::place::{KEYS, Place, S3Server, s3_settings};
use crate::process::{PATIENCE, POLL, Process};
use crate::proxy::{Harm, Link, Proxy, Way};

const QUICK: &str = "[commit]\nmax_age = \"300ms\"\n";

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
    let Some(server) = S3Server::start(directory.path()).await else { return };
    let proxy = Proxy::to(server.port).await;
    let mut cloud = Cloud::start_on(directory.path(), "a", &s3_settings(proxy.port), &KEYS, QUICK).await;
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
    let Some(server) = S3Server::start(directory.path()).await else { return };
    let proxy = Proxy::to(server.port).await;
    let more =
        format!("{QUICK}[hot]\nmax_bytes = \"128MiB\"\n[wal]\nsegment_bytes = \"34MiB\"\nmax_bytes = \"300MiB\"\n");
    let cloud = Cloud::start_on(directory.path(), "a", &s3_settings(proxy.port), &KEYS, &more).await;
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
    let Some(server) = S3Server::start(directory.path()).await else { return };
    let proxy = Proxy::to(server.port).await;
    let cloud = Cloud::start_on(directory.path(), "a", &s3_settings(proxy.port), &KEYS, QUICK).await;
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

/// A merge of more than one part: S3 keeps the parts of an upload that nobody completes or gives up, and shows them nowhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_merge_that_fails_leaves_no_parts_in_the_bucket() {
    let Some(place) = Place::on_s3().await else { return };
    let mut lake = Lake::new(place).await;
    let mut random = seeded();
    for _ in 0..2 {
        let rows = load_rows(0, 900_000);
        let mut columns = rows.columns().to_vec();
        // They do not compress.
        columns[2] = Arc::new(Int64Array::from_iter_values((0..900_000).map(|_| random.random())));
        lake.commit_rows(&RecordBatch::try_new(rows.schema(), columns).unwrap()).await;
    }
    let server = lake.place.server().unwrap();
    let (objects, path) =
        (lake.place.table("load"), lake.place.names("load", "_date=2024-01-01").await[1].as_str().into());
    // As files of a writer that says no checksums: what is damaged shows in the middle of a merge.
    for version in 1..=2 {
        let entry = format!("_delta_log/{version:020}.json").as_str().into();
        let said = objects.get(&entry).await.unwrap().bytes().await.unwrap();
        let unsaid = std::str::from_utf8(&said).unwrap().lines().map(|line| {
            let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
            line.get_mut("add").and_then(|add| add.as_object_mut()?.remove("tags"));
            line.to_string()
        });
        objects.put(&entry, unsaid.collect::<Vec<_>>().join("\n").into()).await.unwrap();
    }
    let good = objects.get(&path).await.unwrap().bytes().await.unwrap();
    let mut bad = good.to_vec();
    let at = bad.len() / 8 * 7;
    // More than a page: within one, what does not compress would be other values.
    bad[at..at + (256 << 10)].fill(0xff);
    objects.put(&path, bad.into()).await.unwrap();
    server.requests().await;
    let (ok, text) = lake.run(&["compact"]);
    assert!(!ok && text.contains("left out"), "{text}");
    let requests = server.requests().await;
    assert_eq!((&requests["POST"], &requests["DELETE"]), (&1.into(), &1.into()), "an upload is begun, and given up");
    assert_eq!(server.uploads().await, 0);
    // What is killed cannot give up anything: a rule of the bucket does, as docs/lake.md says. It is in nobody's way.
    objects.put(&path, good.into()).await.unwrap();
    let mut compact = lake.weir(&["compact"]);
    compact.set_variables(&[("WEIR_FAILPOINT", "compact.merging@200")]);
    compact.start();
    assert!(!compact.succeeds());
    assert_eq!(server.uploads().await, 1);
    compact.set_variables(&[]);
    compact.start();
    assert!(compact.succeeds(), "{}", compact.log_tail());
    let (_, text) = lake.run(&["tables", "--json"]);
    assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap()["rows"], 1_800_000);
}
