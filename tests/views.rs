//! Views that run for ever, in a cloud that is killed: what they show is what their questions give.

use std::time::Instant;

use rand::Rng;
use serde_json::Value;

use crate::harness::{Answer, Chain, Cloud, Sender, load_rows, load_schema};
use crate::load::{a_moment, seeded};
use crate::process::{PATIENCE, POLL};

/// Rows of a second each: 1,000 rows of `load` a second of event time.
const BY_SECOND: &str = "SELECT time_bucket('1 second', ts) AS b, device, count(*) AS rows, sum(n) AS s, avg(n) AS a FROM load GROUP BY 1, 2";
const ODD: &str = "SELECT ts, device, n * 2 AS twice FROM load WHERE n % 2 = 1";

/// Sends rows until the node has them, through its deaths.
async fn deliver(cloud: &mut Cloud, chain: &mut Chain, first: i64, count: usize) {
    let batch = chain.seal(&load_rows(first, count));
    let schema = load_schema();
    let started = Instant::now();
    loop {
        if let Answer::Acks(_) = Sender::to(cloud).send(&schema, std::slice::from_ref(&batch)).await {
            return;
        }
        assert!(started.elapsed() < PATIENCE, "the batch is not taken");
        tokio::time::sleep(POLL).await;
    }
}

async fn sorted(cloud: &Cloud, statement: &str) -> Vec<String> {
    let rows = cloud.sql(statement).await.unwrap();
    let mut rows: Vec<String> = rows.iter().map(Value::to_string).collect();
    rows.sort();
    rows
}

/// Waits until the view shows what its question gives.
async fn equals(cloud: &Cloud, view: &str, question: &str) {
    let started = Instant::now();
    loop {
        let (shown, asked) = (sorted(cloud, view).await, sorted(cloud, question).await);
        if shown == asked && !asked.is_empty() {
            return;
        }
        if started.elapsed() > PATIENCE {
            let state = cloud.sql("SELECT * FROM system.views").await.unwrap();
            panic!("{view}: {} rows, and {question}: {} rows; {state:#?}", shown.len(), asked.len());
        }
        tokio::time::sleep(POLL).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn views_equal_their_questions_when_the_cloud_is_killed() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"300ms\"\n").await;
    let mut chain = Chain::new("load", load_schema());
    deliver(&mut cloud, &mut chain, 0, 3_000).await;
    // What was there before is their past.
    cloud.sql(&format!("CREATE MATERIALIZED VIEW by_second AS {BY_SECOND}")).await.unwrap();
    cloud.sql(&format!("CREATE MATERIALIZED VIEW odd AS {ODD}")).await.unwrap();
    let mut next = 3_000;
    for round in 0..6 {
        for _ in 0..random.random_range(1..4) {
            let count = random.random_range(100..1_500);
            deliver(&mut cloud, &mut chain, next, count).await;
            // Some come late, and twice.
            if random.random_bool(0.5) {
                deliver(&mut cloud, &mut chain, random.random_range(0..next), 50).await;
            }
            next += count as i64;
        }
        if round % 2 == 0 {
            a_moment(&mut random).await;
        }
        cloud.kill();
        cloud.run();
        cloud.wait().await;
    }
    // Closes all windows before it.
    let last = next + 60_000;
    deliver(&mut cloud, &mut chain, last, 1).await;
    let open =
        format!("SELECT * FROM ({BY_SECOND}) AS q WHERE b < (SELECT time_bucket('1 second', max(ts)) FROM load)");
    equals(&cloud, "SELECT * FROM by_second", &open).await;
    equals(&cloud, "SELECT * FROM odd", ODD).await;
    // Nobody was told the same revision of a window twice, and no row of the other twice.
    let twice = "SELECT count(*) FROM (SELECT view_window, view_revision, device, count(*) AS n FROM by_second_changes \
                 WHERE view_window IS NOT NULL GROUP BY 1, 2, 3 HAVING count(*) > 1) AS q";
    assert_eq!(cloud.integer(twice).await, 0);
    cloud.sql("DROP MATERIALIZED VIEW by_second").await.unwrap();
    cloud.kill();
    cloud.run();
    cloud.wait().await;
    let left = cloud.sql("SHOW MATERIALIZED VIEWS").await.unwrap();
    assert_eq!(left.len(), 1, "{left:#?}");
    let gone = cloud.sql("SELECT * FROM by_second").await.unwrap_err().to_string();
    assert!(gone.contains("no table `by_second`"), "{gone}");
}
