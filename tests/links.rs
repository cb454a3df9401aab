//! What a bad link or a wrong configuration does to what is on its way: it waits, and arrives once.

use std::time::Instant;

use crate::harness::{Cloud, Edge, Mosquitto, TOKEN, mqtt_source, publish};
use crate::load::{Broker, Load, a_moment, check, seeded, stream};
use crate::process::{PATIENCE, POLL};
use crate::proxy::{Harm, Proxy};

const COMMIT: &str = "[commit]\nmax_age = \"1s\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_token_for_a_while_is_told_and_loses_nothing() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let mut cloud = Cloud::start(directory.path(), "a", COMMIT).await;
    let mut edge = Edge::start(directory.path(), &cloud, &stream(&broker.url())).await;
    let load = Load::start(broker.port);
    a_moment(&mut random).await;
    cloud.stop();
    cloud.expect_token("another-token");
    cloud.run();
    cloud.wait().await;
    let started = Instant::now();
    let complains = |status: &serde_json::Value| {
        let error = status["uplink"]["last_error"].as_str().unwrap_or_default();
        assert!(!error.contains(TOKEN), "a secret in an error: {error}");
        error.contains("no valid token")
    };
    let mut status = edge.status().await;
    while !complains(&status) {
        assert!(started.elapsed() < PATIENCE, "a wrong token is not told: {:#}", status["uplink"]);
        tokio::time::sleep(POLL).await;
        status = edge.status().await;
    }
    // It goes on taking what comes, and keeps it.
    let before = status["sources"][0]["journalled"].as_u64().unwrap();
    loop {
        a_moment(&mut random).await;
        status = edge.status().await;
        assert!(complains(&status), "{:#}", status["uplink"]);
        assert_eq!(status["quarantined"], serde_json::json!({}), "a refusal of the caller says nothing of the rows");
        if status["sources"][0]["journalled"].as_u64().unwrap() > before + 200 {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "nothing more is taken");
    }
    assert_eq!(cloud.check_rows().await, [0; 5], "nothing was taken with a wrong token");
    cloud.stop();
    cloud.expect_token(TOKEN);
    cloud.run();
    cloud.wait().await;
    for _ in 0..8 {
        a_moment(&mut random).await;
    }
    let status = check(&cloud, &mut edge, &*load.finish().await, Broker::Kept).await;
    assert_eq!(status["uplink"]["last_error"], serde_json::Value::Null);
}

/// A load on its way through a proxy that does this harm.
async fn over_a_bad_link(harm: Harm) {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let cloud = Cloud::start(directory.path(), "a", COMMIT).await;
    let proxy = Proxy::to_cloud(&cloud).await;
    let mut edge = Edge::start_with(directory.path(), &[&proxy.http()], &stream(&broker.url())).await;
    let load = Load::start(broker.port);
    proxy.harm(harm, &mut random);
    for _ in 0..16 {
        a_moment(&mut random).await;
    }
    let harmed = proxy.heal();
    println!("{harmed} pieces were harmed");
    assert!(harmed >= 5, "too little was tried: {harmed}");
    check(&cloud, &mut edge, &*load.finish().await, Broker::Kept).await;
    let [_, durable, _, refused, _] = cloud.check_rows().await;
    assert_eq!(refused, 0, "damage on the way is no fault of a batch");
    assert_eq!(durable, cloud.stored_rows().await, "rows that were called durable, and rows that are there");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_damaged_on_the_way_lose_and_double_nothing() {
    over_a_bad_link(Harm::FlipRequests).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_break_off_lose_and_double_nothing() {
    over_a_bad_link(Harm::CutAnswers).await;
}

/// Streams that an edge sends side by side, each with so many messages.
const STREAMS: usize = 12;
const MESSAGES: usize = 400;

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pushed_back_waits_at_the_edge_and_arrives_once() {
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    // Of the requests that come at once most find no place.
    let narrow = format!("{COMMIT}[limits]\nrequests_waiting = 1\n");
    let cloud = Cloud::start(directory.path(), "a", &narrow).await;
    let streams = (0..STREAMS).map(|index| {
        let map = format!(
            "[source.map]\ndevice = \"topic:1\"\nn = \"/n\"\n[stream.s{index}.fields]\nn = {{ type = \"int64\" }}\n"
        );
        mqtt_source(&broker.url(), &format!("s{index}/+"), &format!("s{index}"), &map)
    });
    let mut edge = Edge::start(directory.path(), &cloud, &streams.collect::<String>()).await;
    let messages = (0..MESSAGES)
        .flat_map(|n| (0..STREAMS).map(move |index| (format!("s{index}/d"), format!("{{\"n\":{n}}}").into_bytes())));
    publish(broker.client("p"), messages.collect()).await;
    let started = Instant::now();
    while cloud.stored_rows().await < (STREAMS * MESSAGES) as u64 {
        assert!(started.elapsed() < PATIENCE, "not all arrives: {:#}", edge.status().await);
        tokio::time::sleep(POLL).await;
    }
    let status = edge.drained().await;
    assert_eq!(status["quarantined"], serde_json::json!({}), "a refusal of the moment says nothing of the rows");
    let counts = cloud.check_rows().await;
    println!("received, durable, duplicate, refused, pushed back: {counts:?}");
    assert!(counts[4] > 0, "nothing was pushed back: nothing was tried");
    assert_eq!((counts[1], counts[3]), (cloud.stored_rows().await, 0));
    for index in 0..STREAMS {
        let found =
            cloud.sql(&format!("SELECT count(*) AS c, count(DISTINCT n) AS d, sum(n) AS s FROM s{index}")).await;
        let expected = serde_json::json!({ "c": MESSAGES, "d": MESSAGES, "s": MESSAGES * (MESSAGES - 1) / 2 });
        assert_eq!(found.unwrap(), [expected], "s{index}");
    }
}
