//! Alerts while what carries them is killed or away: what a broker retains, and a plan of alerts through kill -9 of the broker,
//! the edge and a subscriber. And the measurement of alerts, at a small size.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::{Duration, Instant};

use rand::Rng;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event};
use serde_json::Value;

use crate::harness::{Cloud, Edge, Mosquitto, mqtt_source, publish};
use crate::listener::Listener;
use crate::load::seeded;
use crate::process::{PATIENCE, POLL};
use crate::proxy::{Link, Proxy};

const MAP: &str = "[source.map]\ndevice = \"topic:1\"\nn = \"/n\"\n[stream.field.fields]\nn = { type = \"int64\" }\n";

async fn request(cloud: &Cloud, method: &str, path: &str, body: &str) -> Value {
    let client = reqwest::Client::builder().timeout(PATIENCE).build().unwrap();
    let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
    let answer = client.request(method, format!("{}{path}", cloud.http)).body(body.to_owned()).send().await.unwrap();
    let (status, text) = (answer.status(), answer.text().await.unwrap());
    assert!(status.is_success(), "{text}");
    serde_json::from_str(&text).unwrap_or_default()
}

/// What a broker retains under a filter: the device of the alert by topic.
async fn retained(broker: &Mosquitto, filter: &str) -> BTreeMap<String, String> {
    let (client, mut events) = AsyncClient::new(broker.client(&format!("r{}", rand::random::<u32>())), 100);
    client.subscribe(filter, QoS::AtLeastOnce).await.unwrap();
    let mut found = BTreeMap::new();
    // What is retained comes before the answer to what is asked behind it.
    client.subscribe("nothing/else", QoS::AtMostOnce).await.unwrap();
    let mut answers = 0;
    while answers < 2 {
        match tokio::time::timeout(PATIENCE, events.poll()).await.unwrap().unwrap() {
            Event::Incoming(Packet::SubAck(_)) => answers += 1,
            Event::Incoming(Packet::Publish(message)) if message.retain => {
                let alert: Value = serde_json::from_slice(&message.payload).unwrap();
                let topic = String::from_utf8(message.topic.to_vec()).unwrap();
                found.insert(topic, alert["data"]["device"].as_str().unwrap().to_owned());
            }
            _ => {}
        }
    }
    found
}

/// Waits until a broker retains these: topics with devices.
async fn until_retained(broker: &Mosquitto, filter: &str, expected: &[(&str, &str)]) {
    let expected: BTreeMap<String, String> =
        expected.iter().map(|(topic, device)| ((*topic).to_owned(), (*device).to_owned())).collect();
    let begun = Instant::now();
    loop {
        let found = retained(broker, filter).await;
        if found == expected {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{found:?} is retained, and not {expected:?}");
        tokio::time::sleep(POLL).await;
    }
}

fn target(url: &str, more: &str) -> String {
    format!(
        "[commit]\nmax_age = \"1s\"\n[[alerts.publish]]\nname = \"broker\"\nkind = \"mqtt\"\nurl = \"{url}\"\ntopic = \"city/#\"\n{more}"
    )
}

async fn send(broker: &Mosquitto, readings: &[(&str, i64)]) {
    let message = |(device, n): &(&str, i64)| (format!("field/{device}"), format!("{{\"n\":{n}}}").into_bytes());
    publish(broker.client("p"), readings.iter().map(message).collect()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_retains_what_fires_on_it_and_an_old_end_clears_it() {
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let proxy = Proxy::to(broker.port).await;
    let url = format!("mqtt://127.0.0.1:{}", proxy.port);
    let cloud = Cloud::start(directory.path(), "a", &target(&url, "max_age = \"2s\"\nattempts = 1000\n")).await;
    let mut edge = Edge::start(directory.path(), &cloud, &mqtt_source(&broker.url(), "field/#", "field", MAP)).await;
    send(&broker, &[("d1", 1)]).await;
    edge.drained().await;
    // Both devices share a topic, and one has one of its own.
    request(&cloud, "PUT", "/v1/rules/all", "on = \"field\"\nwhen = \"n > 100\"\ntopic = \"city/all\"\n").await;
    request(&cloud, "PUT", "/v1/rules/one", "on = \"field\"\nwhen = \"n > 100\"\ntopic = \"city/{device}\"\n").await;
    send(&broker, &[("d1", 200)]).await;
    until_retained(&broker, "city/#", &[("city/all", "d1"), ("city/d1", "d1")]).await;
    send(&broker, &[("d2", 200)]).await;
    until_retained(&broker, "city/#", &[("city/all", "d2"), ("city/d1", "d1"), ("city/d2", "d2")]).await;
    // The one that ends takes nothing from the other; what was told last ends, and the other stands there.
    send(&broker, &[("d2", 2)]).await;
    until_retained(&broker, "city/#", &[("city/all", "d1"), ("city/d1", "d1")]).await;
    // It ends, and another begins, while the broker cannot be reached for longer than max_age.
    proxy.set(Link::Cut);
    send(&broker, &[("d1", 3), ("d3", 200)]).await;
    let ended =
        "SELECT count(*) FROM alert_log WHERE told AND (device = 'd1' AND transition = 'resolved' OR device = 'd3')";
    let begun = Instant::now();
    while cloud.integer(ended).await < 4 {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(POLL).await;
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    proxy.set(Link::Whole);
    until_retained(&broker, "city/#", &[("city/all", "d3"), ("city/d3", "d3")]).await;
    let targets = request(&cloud, "GET", "/v1/targets", "").await;
    assert_eq!((&targets[0]["missed"], &targets[0]["dead"]), (&4.into(), &0.into()), "{targets}");
    edge.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_alert_of_the_plan_comes_through_kill_9_of_broker_edge_and_subscriber() {
    const DEVICES: i64 = 20;
    const ROUNDS: i64 = 9;
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let Some(mut broker) = Mosquitto::start(directory.path()) else { return };
    let cloud = Cloud::start(directory.path(), "a", &target(&broker.url(), "attempts = 1000\n")).await;
    let source = mqtt_source(&broker.url(), "field/#", "field", MAP);
    let mut edge = Edge::start(directory.path(), &cloud, &source).await;
    send(&broker, &[("d0", 1)]).await;
    edge.drained().await;
    let rule = "on = \"field\"\nwhen = \"n > 100\"\ntopic = \"city/{device}\"\nmessage = \"{{ n }}\"\n";
    request(&cloud, "PUT", "/v1/rules/high", rule).await;
    let listening = format!("{}/v1/alerts/stream?topic=city/%23", cloud.http);
    let mut listener = Listener::new(listening.clone());
    listener.connect().await;
    // By SSE: what each event was, by its id.
    let mut heard: BTreeMap<String, (String, String, String)> = BTreeMap::new();
    let mut told = BTreeSet::new();
    let mut sent = 1;
    for round in 0..ROUNDS {
        for value in [1_000 + round, 5] {
            // In one order for each device; the broker has them all before anything is killed, and the edge has them on disk.
            let names: Vec<String> = (0..DEVICES).map(|device| format!("d{device}")).collect();
            send(&broker, &names.iter().map(|name| (name.as_str(), value)).collect::<Vec<_>>()).await;
            sent += DEVICES;
            let begun = Instant::now();
            while edge.status().await["sources"][0]["journalled"].as_i64().unwrap_or(0) < sent {
                edge.check(begun, "not all is journalled");
                tokio::time::sleep(POLL).await;
            }
            tokio::time::sleep(Duration::from_millis(random.random_range(0..60))).await;
            match (round + value) % 3 {
                0 => {
                    broker.kill();
                    tokio::time::sleep(Duration::from_millis(random.random_range(0..400))).await;
                    broker.run();
                    // It may have forgotten that the edge listens: what is published before that is lost.
                    edge.wait().await;
                }
                1 => {
                    edge.kill();
                    edge.run();
                    edge.wait().await;
                    // Counters are kept with the snapshot: from here they are counted anew.
                    edge.drained().await;
                    sent = edge.status().await["sources"][0]["journalled"].as_i64().unwrap();
                }
                _ => {
                    let last = listener.last.clone();
                    listener = Listener::new(listening.clone());
                    listener.last = last;
                }
            }
            let transition = if value > 100 { "firing" } else { "resolved" };
            for _ in 0..DEVICES {
                let event = listener.next().await;
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                let data = &event["data"];
                let one = (text(&data["device"]), text(&data["transition"]), text(&data["message"]));
                assert_eq!((one.1.as_str(), one.2.as_str()), (transition, (1_000 + round).to_string().as_str()));
                assert!(heard.insert(text(&event["id"]), one.clone()).is_none(), "{one:?} came twice");
                assert!(told.insert(one));
            }
        }
    }
    let all = (DEVICES * ROUNDS) as usize;
    assert_eq!(heard.len(), 2 * all, "every alert of the plan");
    let counted = "SELECT transition, count(*) AS n, count(DISTINCT alert_id) AS ids FROM alert_log \
                   WHERE alert_id IS NOT NULL GROUP BY transition ORDER BY transition";
    let expected = ["firing", "resolved"].map(|word| serde_json::json!({ "transition": word, "n": all, "ids": all }));
    assert_eq!(cloud.sql(counted).await.unwrap(), expected, "none without data behind it");
    // The broker has everything that it was there for, at least once, and retains what fires.
    send(&broker, &[("d3", 500)]).await;
    until_retained(&broker, "city/#", &[("city/d3", "d3")]).await;
    let targets = request(&cloud, "GET", "/v1/targets", "").await;
    let delivered = targets[0]["delivered"].as_u64().unwrap();
    assert!(delivered > 2 * all as u64 && targets[0]["dead"] == 0, "{targets}");
    edge.stop();
}

#[test]
fn alerts_are_measured() {
    let directory = tempfile::tempdir().unwrap();
    let is_there = ["/usr/sbin/mosquitto", "/usr/local/sbin/mosquitto", "/usr/bin/mosquitto"]
        .iter()
        .any(|path| std::path::Path::new(path).exists());
    let small = [
        "--seconds",
        "5",
        "--rate",
        "1000",
        "--rules",
        "20",
        "--rows",
        "2000",
        "--subscribers",
        "40",
        "--events",
        "10",
    ];
    let measures: &[&str] = if is_there { &["edge", "rules", "subscribers"] } else { &["rules", "subscribers"] };
    for measure in measures {
        let data = directory.path().join(measure);
        let output = Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(["bench", "alerts", "--measure", measure, "--data-dir", data.to_str().unwrap()])
            .args(small)
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{measure}: {told}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        println!("{:#}", report["result"]);
        assert!(report["result"][measure].is_object(), "{report:#}");
    }
}
