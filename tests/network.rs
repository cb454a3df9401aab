//! The link between a live edge and a real cloud fails in every way a link does: cut both ways, one way, only the
//! answers lost, flapping, half-open. Nothing is lost or doubled, and what is sent afterwards arrives within a bounded
//! time.

use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;

use crate::harness::{Cloud, Edge, Mosquitto, mqtt_source, publish};
use crate::load::{Broker, Load, a_moment, check, seeded, stream, stream_of};
use crate::process::{PATIENCE, POLL};
use crate::proxy::{Link, Proxy, Way};

const COMMIT: &str = "[commit]\nmax_age = \"1s\"\n";
/// `cloud.timeout` of the edges here: how long a request that nobody answers is waited for.
const TIMEOUT: Duration = Duration::from_secs(2);
/// From the end of a short outage until something new is in the cloud: a request that still waits, the wait after it
/// (these outages are too short for one of more than 3.2 s), and a machine that has other things to do.
const RECOVERS: Duration = Duration::from_secs(2 + 4 + 4);

struct Stage {
    random: StdRng,
    cloud: Cloud,
    proxy: Proxy,
    edge: Edge,
    load: Load,
    _broker: Mosquitto,
    _directory: tempfile::TempDir,
}

impl Stage {
    async fn set() -> Option<Self> {
        let random = seeded();
        let directory = tempfile::tempdir().unwrap();
        let broker = Mosquitto::start(directory.path())?;
        let cloud = Cloud::start(directory.path(), "a", COMMIT).await;
        let proxy = Proxy::to_cloud(&cloud).await;
        // It stands behind the table [cloud], with which the head ends.
        let more = format!("timeout = \"{}s\"\n{}", TIMEOUT.as_secs(), stream(&broker.url()));
        let edge = Edge::start_with(directory.path(), &[&proxy.http()], &more).await;
        let load = Load::start(broker.port);
        let mut stage = Self { random, cloud, proxy, edge, load, _broker: broker, _directory: directory };
        stage.recovered().await;
        Some(stage)
    }

    async fn moments(&mut self, count: u32) {
        for _ in 0..count {
            a_moment(&mut self.random).await;
        }
    }

    /// Waits until something that is sent from now on is in the cloud; returns how long that took.
    async fn recovered(&mut self) -> Duration {
        let (started, sent) = (Instant::now(), self.load.sent());
        arrives(&self.cloud, &mut self.edge, &format!("SELECT count(*) FROM load WHERE n >= {sent}")).await;
        started.elapsed()
    }

    /// The link is whole again: the edge is soon, too.
    async fn heals(&mut self) {
        let took = self.recovered().await;
        println!("recovered after {} ms", took.as_millis());
        assert!(took < RECOVERS, "the edge needs {took:?} after the link is back");
    }

    /// Stops the load, and checks that all is there once.
    async fn check(mut self) {
        check(&self.cloud, &mut self.edge, &*self.load.finish().await, Broker::Kept).await;
        let [_, durable, _, refused, _] = self.cloud.check_rows().await;
        assert_eq!((durable, refused), (self.cloud.stored_rows().await, 0));
    }
}

/// Waits until the statement gives more than 0.
async fn arrives(cloud: &Cloud, edge: &mut Edge, statement: &str) {
    let started = Instant::now();
    loop {
        let rows = cloud.sql(statement).await.unwrap_or_default();
        if rows.first().and_then(|row| row.as_object()?.values().next()?.as_i64()) > Some(0) {
            return;
        }
        assert!(started.elapsed() < PATIENCE, "nothing arrives: {:#}", edge.status().await["uplink"]);
        tokio::time::sleep(POLL).await;
    }
}

async fn through(link: Link) {
    let Some(mut stage) = Stage::set().await else { return };
    for _ in 0..3 {
        stage.proxy.set(link);
        let thrown_away = stage.proxy.thrown_away();
        stage.moments(6).await;
        let nothing = stage.proxy.thrown_away() == thrown_away;
        assert_eq!(nothing, !matches!(link, Link::Lost(_)), "too little was tried, or too much");
        match link {
            // What was thrown away must not be followed by anything.
            Link::Lost(_) => stage.proxy.cut(),
            _ => stage.proxy.set(Link::Whole),
        }
        stage.heals().await;
    }
    stage.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_cut_both_ways_loses_and_doubles_nothing() {
    through(Link::Cut).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_holds_both_ways_loses_and_doubles_nothing() {
    through(Link::Held(Way::Both)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_cut_on_the_way_up_loses_and_doubles_nothing() {
    through(Link::Held(Way::Up)).await;
}

/// The node takes what comes, and no answer arrives.
#[tokio::test(flavor = "multi_thread")]
async fn a_link_cut_on_the_way_down_loses_and_doubles_nothing() {
    through(Link::Held(Way::Down)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn acks_that_are_lost_double_nothing() {
    through(Link::Lost(Way::Down)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flapping_link_loses_and_doubles_nothing() {
    let Some(mut stage) = Stage::set().await else { return };
    for _ in 0..25 {
        let link = match stage.random.random_range(0..4) {
            0 => Link::Cut,
            1 => Link::Held(Way::Up),
            2 => Link::Held(Way::Down),
            _ => Link::Held(Way::Both),
        };
        stage.proxy.set(link);
        let flap = Duration::from_millis(stage.random.random_range(5..300));
        tokio::time::sleep(flap).await;
        if stage.random.random_ratio(1, 4) {
            stage.proxy.cut();
        }
        stage.proxy.set(Link::Whole);
        let flap = Duration::from_millis(stage.random.random_range(5..300));
        tokio::time::sleep(flap).await;
    }
    // Failures in a row make the waits longer, whatever came in between: 30 s is the longest.
    println!("recovered after {} ms", stage.recovered().await.as_millis());
    stage.check().await;
}

/// A firewall has forgotten the connections: no FIN, no RST. Several streams have several connections, and each of them
/// may be silent.
#[tokio::test(flavor = "multi_thread")]
async fn half_open_connections_to_the_cloud_are_given_up() {
    let Some(mut stage) = Stage::set().await else { return };
    for _ in 0..3 {
        stage.moments(2).await;
        stage.proxy.silence();
        stage.heals().await;
    }
    stage.check().await;
}

/// The same towards the broker: keep alive tells.
#[tokio::test(flavor = "multi_thread")]
async fn a_half_open_connection_to_the_broker_is_given_up() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let cloud = Cloud::start(directory.path(), "a", COMMIT).await;
    let proxy = Proxy::to(broker.port).await;
    let url = format!("mqtt://127.0.0.1:{}", proxy.port);
    let source = stream_of(&url, "load/+", "keep_alive = \"5s\"\n");
    let mut edge = Edge::start(directory.path(), &cloud, &source).await;
    let load = Load::start(broker.port);
    a_moment(&mut random).await;
    proxy.silence();
    let (started, sent) = (Instant::now(), load.sent());
    arrives(&cloud, &mut edge, &format!("SELECT count(*) FROM load WHERE n >= {sent}")).await;
    println!("recovered after {} ms", started.elapsed().as_millis());
    assert!(started.elapsed() < Duration::from_secs(20), "twice keep_alive, and the wait before the next connection");
    check(&cloud, &mut edge, &*load.finish().await, Broker::Kept).await;
}

/// Streams that an edge sends side by side.
const STREAMS: usize = 8;

/// Each stream has had a connection of its own, and one after another would be tried.
#[tokio::test(flavor = "multi_thread")]
async fn many_half_open_connections_are_given_up_together() {
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let cloud = Cloud::start(directory.path(), "a", COMMIT).await;
    let proxy = Proxy::to_cloud(&cloud).await;
    let streams = (0..STREAMS).map(|index| {
        let map = format!(
            "[source.map]\ndevice = \"topic:1\"\nn = \"/n\"\n[stream.s{index}.fields]\nn = {{ type = \"int64\" }}\n"
        );
        mqtt_source(&broker.url(), &format!("s{index}/+"), &format!("s{index}"), &map)
    });
    let more = format!("timeout = \"{}s\"\n{}", TIMEOUT.as_secs(), streams.collect::<String>());
    let mut edge = Edge::start_with(directory.path(), &[&proxy.http()], &more).await;
    let message = |index: usize, n: u64| (format!("s{index}/d"), format!("{{\"n\":{n}}}").into_bytes());
    let all = (0..50).flat_map(|n| (0..STREAMS).map(move |index| message(index, n)));
    publish(broker.client("p"), all.collect()).await;
    edge.drained().await;
    proxy.silence();
    let started = Instant::now();
    publish(broker.client("p"), vec![message(0, 50)]).await;
    arrives(&cloud, &mut edge, "SELECT count(*) FROM s0 WHERE n = 50").await;
    println!("recovered after {} ms", started.elapsed().as_millis());
    assert!(started.elapsed() < RECOVERS, "one after another: {:?}", started.elapsed());
}
