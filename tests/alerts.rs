//! Alerts from a reading to the broker beside the agent and to the table in the cloud, over kill -9 and without a cloud.

use std::time::{Duration, Instant};

use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event, EventLoop};
use serde_json::Value;

use crate::cloud_alerts::{RULE, Readings, put, request};
use crate::harness::{Cloud, Edge, Mosquitto, certificate, mqtt_source, publish};
use crate::process::{PATIENCE, POLL};
use crate::proxy::{Link, Proxy, Way};

fn configuration(url: &str) -> String {
    let map = "[source.map]\ndevice = \"topic:1\"\nn = \"/n\"\n[stream.field.fields]\nn = { type = \"int64\" }\n";
    let rule = "[[rule]]\nname = \"high\"\non = \"field\"\nwhen = \"n > 100\"\nmessage = \"{device} has {n}\"\n\
                severity = \"critical\"\ntopic = \"alerts/{device}/high\"\n\
                command = { topic = \"alerts/{device}/sign\", firing = \"slow\", resolved = \"clear\" }\n";
    mqtt_source(url, "field/#", "field", &format!("{map}{rule}"))
}

/// Listens to alerts.
struct Listener(#[allow(dead_code, reason = "it ends the connection")] AsyncClient, EventLoop);

impl Listener {
    async fn new(broker: &Mosquitto, id: &str) -> Self {
        let (client, mut events) = AsyncClient::new(broker.client(id), 100);
        client.subscribe("alerts/#", QoS::AtLeastOnce).await.unwrap();
        while !matches!(events.poll().await.unwrap(), Event::Incoming(Packet::SubAck(_))) {}
        Self(client, events)
    }

    /// The next alert: its topic, whether it was retained from before, and the text.
    async fn next(&mut self) -> Option<(String, bool, String)> {
        loop {
            match tokio::time::timeout(PATIENCE, self.1.poll()).await.expect("an alert comes").unwrap() {
                Event::Incoming(Packet::Publish(message)) => {
                    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                    return Some((text(&message.topic), message.retain, text(&message.payload)));
                }
                // What was asked after the retained ones were due.
                Event::Incoming(Packet::PingResp(_)) => return None,
                _ => {}
            }
        }
    }

    /// Waits for this state of an alert, and returns it. Repetitions of others are passed over.
    async fn state(&mut self, state: &str) -> Value {
        loop {
            let (topic, _, text) = self.next().await.expect("an alert");
            let Ok(alert) = serde_json::from_str::<Value>(&text) else { continue };
            if alert["state"] == state {
                assert_eq!(topic, "alerts/d1/high");
                return alert;
            }
        }
    }

    /// Waits until the sign is told this.
    async fn sign(&mut self, word: &str) {
        loop {
            let (topic, retained, text) = self.next().await.expect("a command");
            if topic == "alerts/d1/sign" && text == word {
                return assert!(!retained, "who comes later is not commanded by the past");
            }
        }
    }
}

async fn send(broker: &Mosquitto, device: &str, n: i64) {
    publish(broker.client("p"), vec![(format!("field/{device}"), format!("{{\"n\":{n}}}").into_bytes())]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alert_is_retained_while_it_fires_and_is_one_episode_over_kill_9() {
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let mut cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"1s\"\n").await;
    let mut edge = Edge::start(directory.path(), &cloud, &configuration(&broker.url())).await;
    let mut listener = Listener::new(&broker, "l").await;
    // The cloud is not needed for it.
    cloud.kill();
    send(&broker, "d2", 7).await;
    let begun = Instant::now();
    send(&broker, "d1", 200).await;
    let alert = listener.state("firing").await;
    println!("from the sender to the alert: {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(5), "milliseconds, and a busy machine");
    assert_eq!((&alert["message"], &alert["severity"]), (&"d1 has 200".into(), &"critical".into()));
    listener.sign("slow").await;
    assert_eq!(Listener::new(&broker, "late").await.state("firing").await["id"], alert["id"]);

    edge.kill();
    edge.run();
    edge.wait().await;
    assert_eq!(listener.state("firing").await, alert, "told again, as it was");
    listener.sign("slow").await;
    send(&broker, "d1", 300).await;
    send(&broker, "d1", 3).await;
    let ended = listener.state("resolved").await;
    assert_eq!((&ended["id"], &ended["from"]), (&alert["id"], &alert["from"]));
    let (topic, _, text) = listener.next().await.unwrap();
    assert_eq!((topic.as_str(), text.as_str()), ("alerts/d1/high", ""), "what was retained is taken back");
    listener.sign("clear").await;

    cloud.run();
    cloud.wait().await;
    edge.drained().await;
    let rows = cloud
        .sql("SELECT device, rule, state, alert_id, message, to_ts IS NULL AS open FROM alerts ORDER BY ts")
        .await
        .unwrap();
    let states = rows.iter().map(|row| row["state"].as_str().unwrap()).collect::<Vec<_>>();
    assert_eq!(states, ["firing", "resolved"], "{rows:#?}");
    assert!(rows.iter().all(|row| row["alert_id"] == alert["id"] && row["device"] == "d1" && row["rule"] == "high"));
    assert_eq!((&rows[0]["open"], &rows[1]["open"]), (&true.into(), &false.into()));

    // What ends while the agent does not publish is taken back by the next start.
    send(&broker, "d1", 400).await;
    let second = listener.state("firing").await;
    assert_ne!(second["id"], alert["id"]);
    edge.stop();
    edge.configure(&configuration(&broker.url()).replace("n > 100", "n > 1000"));
    edge.run();
    edge.wait().await;
    send(&broker, "d2", 7).await;
    assert_eq!(listener.state("resolved").await["id"], second["id"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cloud_that_takes_and_never_answers_slows_no_acknowledgement_and_no_alert() {
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"1s\"\n").await;
    let proxy = Proxy::to_cloud(&cloud).await;
    let url = broker.url();
    let mut edge = Edge::start_with(directory.path(), &[&proxy.http()], &configuration(&url)).await;
    let mut listener = Listener::new(&broker, "l").await;
    proxy.set(Link::Held(Way::Down));
    // Far more than the agent may leave without an acknowledgement.
    let numbers = 0..5_000;
    let messages = numbers.clone().map(|n| (format!("field/e{}", n % 5), b"{\"n\":1}".to_vec())).collect();
    let begun = Instant::now();
    publish(broker.client("many"), messages).await;
    send(&broker, "d1", 200).await;
    let alert = listener.state("firing").await;
    println!("{} readings and the alert behind them: {:?}", numbers.len(), begun.elapsed());
    let started = Instant::now();
    while edge.status().await["sources"][0]["journalled"] != numbers.len() + 1 {
        edge.check(started, "not all is acknowledged");
        tokio::time::sleep(POLL).await;
    }
    proxy.set(Link::Whole);
    edge.drained().await;
    assert_eq!(cloud.integer("SELECT count(*) FROM field").await, numbers.len() as i64 + 1);
    let rows = cloud.sql("SELECT alert_id FROM alerts").await.unwrap();
    assert_eq!(rows, [serde_json::json!({ "alert_id": alert["id"] })]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_over_tls_is_told_when_its_certificate_is_trusted_and_else_hears_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let Some((broker, secure, trusted)) = Mosquitto::start_tls(directory.path()) else { return };
    let Some((other, _)) = certificate(directory.path(), "other") else { return };
    let target = |name: &str, ca: &str| {
        format!(
            "[[alerts.publish]]\nname = \"{name}\"\nkind = \"mqtt\"\nurl = \"mqtts://127.0.0.1:{secure}\"\nca_file = \"{ca}\"\n"
        )
    };
    let targets = [target("known", &trusted), target("stranger", &other)].concat();
    let cloud = Cloud::start(directory.path(), "a", &targets).await;
    let mut listener = Listener::new(&broker, "listens").await;
    let mut readings = Readings::to(&cloud);
    readings.send(&[("d1", 1)]).await;
    put(&cloud, "high", RULE).await;
    readings.send(&[("d1", 200)]).await;
    readings.send(&[("d1", 5)]).await;
    for word in ["firing", "resolved"] {
        let (topic, _, text) = listener.next().await.unwrap();
        let event: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((topic.as_str(), &event["data"]["transition"]), ("alerts/d1/high", &word.into()));
    }
    let started = Instant::now();
    loop {
        let (_, targets) = request(&cloud, "GET", "/v1/targets", "").await;
        let of = |name: &str| targets.as_array().unwrap().iter().find(|target| target["name"] == name).unwrap().clone();
        let (known, stranger) = (of("known"), of("stranger"));
        if known["delivered"] == 2 && stranger["last_error"].as_str().is_some_and(|error| error.contains("certificate"))
        {
            assert_eq!(stranger["delivered"], 0, "{targets}");
            break;
        }
        assert!(started.elapsed() < PATIENCE, "{targets}");
        tokio::time::sleep(POLL).await;
    }
}
