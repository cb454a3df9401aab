//! A reader that asks without pause while commits happen never misses a row and never sees one twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use crate::harness::{Answer, Chain, Cloud, Sender, load_rows, load_schema};

const COMMITS: u64 = 1_000;

#[tokio::test(flavor = "multi_thread")]
async fn no_row_is_missing_or_doubled_while_commits_happen() {
    let directory = tempfile::tempdir().unwrap();
    // Every tick commits; nothing stays hot for long.
    let cloud = Arc::new(Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"1ms\"\n").await);
    let stop = Arc::new(AtomicBool::new(false));
    let (sent, acknowledged) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicI64::new(0)));
    let load = tokio::spawn({
        let (cloud, stop) = (Arc::clone(&cloud), Arc::clone(&stop));
        let (sent, acknowledged) = (Arc::clone(&sent), Arc::clone(&acknowledged));
        async move {
            let (sender, mut chain) = (Sender::to(&cloud), Chain::new("load", load_schema()));
            while !stop.load(Ordering::Relaxed) {
                let first = sent.load(Ordering::SeqCst);
                let batch = chain.seal(&load_rows(first, 10));
                sent.store(first + 10, Ordering::SeqCst);
                assert!(matches!(sender.send(&chain.schema, &[batch]).await, Answer::Acks(_)));
                acknowledged.store(first + 10, Ordering::SeqCst);
            }
        }
    });
    while acknowledged.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    let statement = "SELECT (SELECT count(*) FROM load) AS left_rows, count(*) AS right_rows, sum(n) AS total, \
                     (SELECT count(*) FROM load a JOIN load b ON a.n = b.n) AS joined FROM load";
    let (mut before, mut asked) = (0, 0);
    while cloud.counter("weir_cloud_commits_total").await < COMMITS {
        let least = acknowledged.load(Ordering::SeqCst);
        let row = cloud.sql(statement).await.unwrap().remove(0);
        let most = sent.load(Ordering::SeqCst);
        let count = row["right_rows"].as_i64().unwrap();
        assert!(least <= count && count <= most, "{least} acknowledged, {count} seen, {most} sent");
        assert!(count >= before, "{count} after {before}");
        assert_eq!(row["left_rows"], row["right_rows"], "one statement, two states");
        assert_eq!(row["joined"], row["right_rows"], "the two sides of a self-join differ");
        assert_eq!(row["total"].as_i64().unwrap(), count * (count - 1) / 2, "other rows than the first {count}");
        (before, asked) = (count, asked + 1);
    }
    stop.store(true, Ordering::Relaxed);
    load.await.unwrap();
    println!("{asked} statements over {COMMITS} commits");
    assert!(asked > 20);
}
