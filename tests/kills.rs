//! Processes are killed with -9 under load, and nothing is lost, doubled or invented.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use edge_agent::failpoint;

use crate::harness::{Cloud, Edge, Mosquitto};
use crate::load::{Broker, Ledger, Load, a_moment, check, seeded, stream, stream_of, three_sources};
use crate::process::{PATIENCE, POLL, free_port};
use crate::proxy::Proxy;

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

/// How often a process is killed in one test, unless told otherwise.
fn kills(default: u32) -> u32 {
    std::env::var("WEIR_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_when_the_edge_agent_is_killed() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    // Every other time the agent's last acknowledgements do not arrive, so the broker sends those messages again.
    let proxy = Proxy::to(broker.port).await;
    let cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"2s\"\n").await;
    let (url, lines) = (format!("mqtt://127.0.0.1:{}", proxy.port), directory.path().join("lines.ndjson"));
    std::fs::write(&lines, "").unwrap();
    let port = free_port();
    let mut edge = Edge::start(directory.path(), &cloud, &three_sources(&url, &lines, port)).await;
    let ledger = Arc::<Ledger>::default();
    let load = Load::on(broker.port, "load/a", Arc::clone(&ledger));
    let others = [
        Load::to_file(lines, Arc::clone(&ledger)),
        Load::to_door(format!("http://127.0.0.1:{port}/ingest/door"), Arc::clone(&ledger)),
    ];
    for round in 0..kills(50) {
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
    for load in others {
        load.finish().await;
    }
    let status = check(&cloud, &mut edge, &*load.finish().await, Broker::Kept).await;
    let [_, durable, _, refused, _] = cloud.check_rows().await;
    assert_eq!((durable, refused), (cloud.stored_rows().await, 0), "what was called durable is there");
    for source in status["sources"].as_array().unwrap() {
        assert!(source["journalled"].as_u64() > Some(50), "too little of {source:#}");
    }
    assert!(status["sources"][0]["redelivered"].as_u64() > Some(0), "nothing was redelivered: nothing was tried");
}

/// At each named step of its path, at the first pass and at later ones.
#[tokio::test(flavor = "multi_thread")]
async fn an_edge_agent_that_ends_at_any_step_loses_and_doubles_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"300ms\"\n").await;
    let url = format!("mqtt://127.0.0.1:{}", broker.port);
    // Snapshots, and what they free, come with every few messages.
    let stream = stream_of(&url, "load/+", "max_payload = \"16KiB\"\n");
    let small = format!("[journal]\nmax_bytes = \"256KiB\"\nsegment_bytes = \"64KiB\"\n{stream}");
    let mut edge = Edge::start(directory.path(), &cloud, &small).await;
    let load = Load::start(broker.port);
    edge.kill();
    let places = failpoint::NAMES.iter().flat_map(|place| [1, 2, 3, 8].map(|pass| format!("{place}@{pass}")));
    for place in places {
        edge.end_at(Some(&place));
        edge.run();
        let started = Instant::now();
        while !edge.has_ended() {
            assert!(started.elapsed() < PATIENCE, "{place} is never passed");
            tokio::time::sleep(POLL).await;
        }
    }
    edge.end_at(None);
    edge.run();
    edge.wait().await;
    check(&cloud, &mut edge, &*load.finish().await, Broker::Kept).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_when_the_cloud_is_killed() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let Some((broker, mut cloud, mut edge)) = stage(directory.path()).await else { return };
    let load = Load::start(broker.port);
    for _ in 0..kills(20) {
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
    for round in 0..kills(20) {
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

/// What the first node called durable and had not committed is sent to the second. The first comes back while the edge
/// goes on there, and finds in the tables what it need not commit; then the edge comes back to it, too.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_when_another_node_takes_over() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    // The first commits only when it is stopped.
    let mut first = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"1h\"\n").await;
    let mut second = Cloud::start(directory.path(), "b", "[commit]\nmax_age = \"1s\"\n").await;
    let stream = stream(&broker.url());
    let mut edge = Edge::start_with(directory.path(), &[&first.http, &second.http], &stream).await;
    let load = Load::start(broker.port);
    while first.counter("weir_cloud_rows_durable_total").await == 0 {
        a_moment(&mut random).await;
    }
    a_moment(&mut random).await;
    assert_eq!(first.counter("weir_cloud_rows_committed_total").await, 0, "what is durable there is not committed");
    first.kill();
    while second.counter("weir_cloud_rows_committed_total").await == 0 {
        a_moment(&mut random).await;
    }
    first.run();
    first.wait().await;
    let before = second.counter("weir_cloud_rows_durable_total").await;
    for _ in 0..4 {
        a_moment(&mut random).await;
    }
    assert!(second.counter("weir_cloud_rows_durable_total").await > before, "the edge goes on with the second");
    assert_eq!(first.counter("weir_cloud_rows_received_total").await, 0, "and not with the first");
    // Back to the first, with what the second held and had not committed.
    second.kill();
    while first.counter("weir_cloud_rows_durable_total").await == 0 {
        a_moment(&mut random).await;
    }
    second.run();
    second.wait().await;
    a_moment(&mut random).await;
    let ledger = load.finish().await;
    first.stop();
    let status = check(&second, &mut edge, &ledger, Broker::Kept).await;
    assert!(status["uplink"]["url"].as_str().unwrap().starts_with(&second.http), "{status:#}");
    let stored = second.stored_rows().await;
    first.run();
    first.wait().await;
    assert_eq!(first.stored_rows().await, stored, "both nodes see the same rows");
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
