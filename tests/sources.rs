//! The MQTT source as operators set it up: old protocol, shared subscriptions, TLS with a password, a client id that goes.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event};

use crate::harness::{Cloud, Edge, Mosquitto, mqtt_source, publish};
use crate::process::{PATIENCE, POLL};

/// Numbers that come to `field/…`.
pub(crate) fn stream(url: &str, more: &str) -> String {
    let map = "[source.map]\ndevice = \"topic:1\"\nn = \"/n\"\n[stream.field.fields]\nn = { type = \"int64\" }\n";
    mqtt_source(url, "field/#", "field", &format!("{more}\n{map}"))
}

pub(crate) async fn send(broker: &Mosquitto, numbers: std::ops::Range<u64>) {
    let message = |n: u64| (format!("field/d{}", n % 5), format!("{{\"n\":{n}}}").into_bytes());
    publish(broker.client("p"), numbers.map(message).collect()).await;
}

/// Waits until the table has all numbers below `total`, each once.
pub(crate) async fn whole(cloud: &Cloud, edge: &mut Edge, total: i64) {
    let started = Instant::now();
    let found = async || match cloud.sql("SELECT count(*) AS n FROM field").await {
        Ok(rows) => rows[0]["n"].as_i64().unwrap(),
        Err(_) => 0,
    };
    while found().await < total {
        assert!(started.elapsed() < PATIENCE, "not all arrives: {:#}", edge.status().await);
        tokio::time::sleep(POLL).await;
    }
    edge.drained().await;
    assert_eq!(cloud.integer("SELECT count(*) FROM field").await, total);
    assert_eq!(cloud.integer("SELECT count(DISTINCT n) FROM field").await, total);
}

pub(crate) async fn cloud(directory: &Path) -> Cloud {
    Cloud::start(directory, "a", "[commit]\nmax_age = \"1s\"\n").await
}

#[tokio::test(flavor = "multi_thread")]
async fn two_connections_share_a_subscription_over_mqtt_3_1_1() {
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let cloud = cloud(directory.path()).await;
    let shared = "version = \"3.1.1\"\nconnections = 2\nshare = \"weir\"";
    let mut edge = Edge::start(directory.path(), &cloud, &stream(&broker.url(), shared)).await;
    send(&broker, 0..500).await;
    edge.kill();
    edge.run();
    edge.wait().await;
    send(&broker, 500..1_000).await;
    whole(&cloud, &mut edge, 1_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_id_that_is_no_longer_configured_is_drained_and_ended() {
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let cloud = cloud(directory.path()).await;
    let mut edge = Edge::start(directory.path(), &cloud, &stream(&broker.url(), "client_id = \"old\"")).await;
    send(&broker, 0..10).await;
    whole(&cloud, &mut edge, 10).await;
    edge.stop();
    send(&broker, 10..30).await;
    edge.configure(&stream(&broker.url(), "client_id = \"new\""));
    edge.run();
    edge.wait().await;
    whole(&cloud, &mut edge, 30).await;
    // The broker keeps the old session until it is ended.
    let started = Instant::now();
    loop {
        let mut asking = broker.client("old");
        asking.set_clean_start(false);
        let (_client, mut events) = AsyncClient::new(asking, 10);
        match events.poll().await {
            Ok(Event::Incoming(Packet::ConnAck(answer))) if !answer.session_present => break,
            _ => {}
        }
        assert!(started.elapsed() < PATIENCE, "the old session stays");
        // Whoever asks takes the client's connection away: not too often.
        tokio::time::sleep(POLL * 200).await;
    }
    send(&broker, 30..40).await;
    whole(&cloud, &mut edge, 40).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_with_tls_and_a_password_is_reached_and_a_wrong_password_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"])
        .args(["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"])
        .args(["-keyout", &at("key.pem"), "-out", &at("ca.pem")])
        .output();
    let passwords = Command::new("mosquitto_passwd").args(["-b", "-c", &at("passwords"), "weir", "right"]).output();
    if !made.is_ok_and(|made| made.status.success()) || !passwords.is_ok_and(|made| made.status.success()) {
        println!("left out: openssl or mosquitto_passwd is not installed");
        return;
    }
    let doors = format!(
        "allow_anonymous false\npassword_file {}\ncertfile {}\nkeyfile {}\n",
        at("passwords"),
        at("ca.pem"),
        at("key.pem")
    );
    let Some(broker) = Mosquitto::start_with(directory.path(), &doors) else { return };
    let cloud = cloud(directory.path()).await;
    let url = format!("mqtts://127.0.0.1:{}", broker.port);
    let source = |password: &str| {
        let login = format!("username = \"weir\"\npassword = \"{password}\"\nca_file = \"{}\"", at("ca.pem"));
        stream(&url, &login)
    };
    let mut edge = Edge::start(directory.path(), &cloud, &source("right")).await;
    edge.stop();
    edge.configure(&source("wrong"));
    edge.run();
    let started = Instant::now();
    loop {
        if let Some(status) = edge.try_status().await
            && let Some(error) = status["sources"][0]["last_error"].as_str()
        {
            assert!(!error.contains("wrong"), "a secret in an error");
            break;
        }
        assert!(started.elapsed() < PATIENCE, "a wrong password is not told");
        tokio::time::sleep(POLL).await;
    }
}
