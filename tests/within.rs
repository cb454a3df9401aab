//! An edge agent within the cloud: sites without a gateway.

use std::net::SocketAddr;

use crate::harness::{Cloud, Mosquitto, mqtt_source, publish};
use crate::process::{PATIENCE, POLL, free_port};

const STREAM: &str = "[source.map]\ndevice = \"topic:1\"\nts = { at = \"/t\", format = \"epoch_ms\" }\nn = \"/n\"\n\
                      [stream.readings.fields]\nn = { type = \"int64\", min = 0 }\n";
/// 2024-01-01T00:00:00Z
const START_MS: i64 = 1_704_067_200_000;

/// The broker of the demo, in this process: it keeps what a client that was there has not acknowledged.
fn broker(port: u16) {
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let connections = rumqttd::ConnectionSettings {
        connection_timeout_ms: 60_000,
        max_payload_size: 1 << 20,
        max_inflight_count: 100,
        auth: None,
        external_auth: None,
        dynamic_filters: true,
    };
    let server = rumqttd::ServerSettings {
        name: "v5".to_owned(),
        listen: address,
        tls: None,
        next_connection_delay_ms: 1,
        connections,
    };
    let config = rumqttd::Config {
        router: rumqttd::RouterConfig {
            max_connections: 100,
            max_outgoing_packet_count: 200,
            max_segment_size: 10 << 20,
            max_segment_count: 10,
            ..Default::default()
        },
        v5: Some(std::collections::HashMap::from([("v5".to_owned(), server)])),
        ..Default::default()
    };
    std::thread::spawn(move || rumqttd::Broker::new(config).start().expect("the broker runs until the test ends"));
}

fn messages(from: i64, count: i64) -> Vec<(String, Vec<u8>)> {
    let message = |n: i64| (format!("site/d{}", n % 3), format!("{{\"t\":{},\"n\":{n}}}", START_MS + n).into_bytes());
    (from..from + count).map(message).collect()
}

async fn start(directory: &std::path::Path, url: &str) -> Cloud {
    let admin = free_port();
    let source = mqtt_source(url, "site/+", "readings", STREAM);
    let text = format!(
        "[edge]\nid = \"roof\"\n[clock]\ntrust = \"always\"\n[admin]\nlisten = \"127.0.0.1:{admin}\"\n{source}"
    );
    std::fs::write(directory.join("agent.toml"), text).unwrap();
    let cloud = Cloud::start(directory, "a", "[commit]\nmax_age = \"300ms\"\n[agent]\nconfig = \"agent.toml\"\n").await;
    let started = std::time::Instant::now();
    let client = reqwest::Client::new();
    while !client
        .get(format!("http://127.0.0.1:{admin}/ready"))
        .send()
        .await
        .is_ok_and(|answer| answer.status().is_success())
    {
        assert!(started.elapsed() < PATIENCE, "the agent is not ready");
        tokio::time::sleep(POLL).await;
    }
    cloud
}

async fn wait_for(cloud: &Cloud, count: i64) {
    let started = std::time::Instant::now();
    let counted = || async {
        let rows = cloud.sql("SELECT count(*) AS n, count(DISTINCT n) AS d FROM readings").await;
        rows.ok().and_then(|rows| Some((rows[0]["n"].as_i64()?, rows[0]["d"].as_i64()?)))
    };
    while counted().await.is_none_or(|(n, _)| n < count) {
        assert!(started.elapsed() < PATIENCE, "{:?} of {count}", counted().await);
        tokio::time::sleep(POLL).await;
    }
    assert_eq!(counted().await, Some((count, count)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_is_read_without_a_gateway() {
    let directory = tempfile::tempdir().unwrap();
    let port = free_port();
    broker(port);
    let url = format!("mqtt://127.0.0.1:{port}");
    let mut cloud = start(directory.path(), &url).await;
    let client = || rumqttc::v5::MqttOptions::new("test", "127.0.0.1", port);
    let mut all = messages(0, 200);
    all.push(("site/d1".to_owned(), b"no json".to_vec()));
    publish(client(), all).await;
    wait_for(&cloud, 200).await;
    let rows = cloud.sql("SELECT DISTINCT _edge, quality FROM readings").await.unwrap();
    assert_eq!(rows, [serde_json::json!({ "_edge": "roof", "quality": "good" })]);
    assert!(directory.path().join("a/agent").is_dir());
    // SIGTERM: the agent first, then the cloud, which commits.
    cloud.stop();
    cloud.run();
    cloud.wait().await;
    wait_for(&cloud, 200).await;
    assert_eq!(cloud.integer("SELECT count(*) FROM quarantine").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_when_both_are_killed_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let mut cloud = start(directory.path(), &broker.url()).await;
    for round in 0..8 {
        let sending = publish(broker.client("test"), messages(round * 500, 500));
        let killing = async {
            crate::load::a_moment(&mut crate::load::seeded()).await;
            cloud.kill();
            cloud.run();
        };
        tokio::join!(sending, killing);
    }
    cloud.wait().await;
    wait_for(&cloud, 4_000).await;
}
