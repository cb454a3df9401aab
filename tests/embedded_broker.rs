//! The broker within `weir cloud`: who comes in, and what it retains of alerts.

use std::net::TcpStream;
use std::time::Instant;

use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event, EventLoop, MqttOptions};
use serde_json::Value;

use crate::cloud_alerts::{RULE, Readings, put};
use crate::doors_limits::garbage;
use crate::harness::{Cloud, EDGE, TOKEN};
use crate::process::{PATIENCE, POLL, free_port};

fn options(port: u16, id: &str, credentials: Option<(&str, &str)>) -> MqttOptions {
    let mut options = MqttOptions::new(id, "127.0.0.1", port);
    if let Some((name, password)) = credentials {
        options.set_credentials(name, password);
    }
    options
}

/// Subscribed to everything.
async fn subscribed(port: u16, id: &str) -> (AsyncClient, EventLoop) {
    let (client, mut events) = AsyncClient::new(options(port, id, Some((EDGE, TOKEN))), 100);
    client.subscribe("#", QoS::AtLeastOnce).await.unwrap();
    while !matches!(events.poll().await.unwrap(), Event::Incoming(Packet::SubAck(_))) {}
    (client, events)
}

/// The next message: topic, whether it was retained, and what it says.
async fn next(events: &mut EventLoop) -> (String, bool, Option<Value>) {
    loop {
        let event = tokio::time::timeout(PATIENCE, events.poll()).await.expect("a message comes").unwrap();
        if let Event::Incoming(Packet::Publish(message)) = event {
            let topic = String::from_utf8(message.topic.to_vec()).unwrap();
            return (topic, message.retain, serde_json::from_slice(&message.payload).ok());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_site_needs_no_other_broker() {
    let directory = tempfile::tempdir().unwrap();
    let port = free_port();
    let more = format!(
        "[broker]\nlisten = \"127.0.0.1:{port}\"\n[[alerts.publish]]\nname = \"site\"\nkind = \"mqtt\"\n\
         url = \"mqtt://127.0.0.1:{port}\"\nusername = \"{EDGE}\"\npassword = \"{TOKEN}\"\n"
    );
    let cloud = Cloud::start(directory.path(), "a", &more).await;
    // Who is not known does not come in.
    for (index, credentials) in [None, Some((EDGE, "wrong")), Some(("nobody", TOKEN))].into_iter().enumerate() {
        let (_client, mut events) = AsyncClient::new(options(port, &format!("stranger{index}"), credentials), 10);
        let answer = tokio::time::timeout(PATIENCE, events.poll()).await.expect("an answer");
        assert!(answer.is_err(), "{credentials:?}: {answer:?}");
    }
    let (_listens, mut events) = subscribed(port, "listens").await;
    let mut readings = Readings::to(&cloud);
    readings.send(&[("d1", 1)]).await;
    put(&cloud, "high", RULE).await;
    readings.send(&[("d1", 200)]).await;
    let (topic, _, alert) = next(&mut events).await;
    assert_eq!((topic.as_str(), &alert.unwrap()["type"]), ("alerts/d1/high", &"weir.alert.firing".into()));
    // Who comes later hears what fires.
    let (late, mut of_late) = subscribed(port, "late").await;
    let (topic, retained, alert) = next(&mut of_late).await;
    assert!(topic == "alerts/d1/high" && retained && alert.is_some(), "{topic} {retained}");
    readings.send(&[("d1", 5)]).await;
    let (_, _, alert) = next(&mut events).await;
    assert_eq!(alert.unwrap()["type"], "weir.alert.resolved");
    assert_eq!(next(&mut events).await.2, None, "what was retained is taken back");
    // The first that one hears who comes now is what is said then.
    let (_later, mut of_later) = subscribed(port, "later").await;
    late.publish("devices/a", QoS::AtLeastOnce, false, "1").await.unwrap();
    while next(&mut of_late).await.0 != "devices/a" {}
    assert_eq!(next(&mut of_later).await, ("devices/a".to_owned(), false, Some(1.into())));
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_idle_connections_hold_up_no_subscriber_of_the_broker() {
    let directory = tempfile::tempdir().unwrap();
    let port = free_port();
    let _cloud = Cloud::start(directory.path(), "a", &format!("[broker]\nlisten = \"127.0.0.1:{port}\"\n")).await;
    let (listens, mut events) = subscribed(port, "listens").await;
    tokio::task::spawn_blocking(move || garbage(port)).await.unwrap();
    // More than it lets in at a time. Who says nothing is hung up on.
    let idle = (0..1_000).filter_map(|_| TcpStream::connect(("127.0.0.1", port)).ok()).collect::<Vec<_>>();
    assert!(idle.len() >= 500, "{} connections", idle.len());
    listens.publish("devices/a", QoS::AtLeastOnce, false, "1").await.unwrap();
    assert_eq!(next(&mut events).await, ("devices/a".to_owned(), false, Some(1.into())));
    // The client tries again with each call.
    let (_late, mut events) = AsyncClient::new(options(port, "late", Some((EDGE, TOKEN))), 10);
    let started = Instant::now();
    while !matches!(events.poll().await, Ok(Event::Incoming(Packet::ConnAck(_)))) {
        assert!(started.elapsed() < PATIENCE, "nobody is let in");
        tokio::time::sleep(POLL).await;
    }
    drop(idle);
}
