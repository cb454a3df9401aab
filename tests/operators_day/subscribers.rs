//! Those who are told, by server-sent events and by MQTT: each remembers what it has heard over its own deaths, and nothing
//! else. One that is killed drops its connection without a word, as the kernel does for a process that gets kill -9.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event, MqttOptions};
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::listener::Listener;
use crate::process::POLL;

/// Events by their id, with the moment of their coming.
#[derive(Debug, Default)]
pub(super) struct Heard {
    pub(super) events: BTreeMap<String, (Value, Instant)>,
    pub(super) repeats: usize,
}

impl Heard {
    /// A repeat has the id of the first, and its words.
    fn take(&mut self, event: Value) {
        let data = &event["data"];
        let id = event["id"].as_str().unwrap().to_owned();
        assert_eq!(id, format!("{}/{}", data["id"].as_str().unwrap(), data["sequence"]));
        match self.events.get(&id) {
            Some((known, _)) => {
                assert_eq!(known, &event, "the same id says something else");
                self.repeats += 1;
            }
            None => {
                self.events.insert(id, (event, Instant::now()));
            }
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Subscriber {
    pub(super) name: &'static str,
    pub(super) heard: Arc<Mutex<Heard>>,
    alive: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Subscriber {
    pub(super) fn by_sse(url: String) -> Self {
        let heard: Arc<Mutex<Heard>> = Arc::default();
        let (alive, watched) = watch::channel(true);
        let task = tokio::spawn(sse(url, Arc::clone(&heard), watched));
        Self { name: "sse", heard, alive, task }
    }

    /// With a session that the broker keeps.
    pub(super) fn by_mqtt(mut options: MqttOptions) -> Self {
        options.set_clean_start(false).set_session_expiry_interval(Some(u32::MAX));
        let heard: Arc<Mutex<Heard>> = Arc::default();
        let (alive, watched) = watch::channel(true);
        let task = tokio::spawn(mqtt(options, Arc::clone(&heard), watched));
        Self { name: "mqtt", heard, alive, task }
    }

    pub(super) fn kill(&self) {
        self.alive.send_replace(false);
    }

    pub(super) fn run(&self) {
        self.alive.send_replace(true);
    }

    pub(super) fn count(&self) -> usize {
        assert!(!self.task.is_finished(), "the subscriber by {} has failed", self.name);
        self.heard.lock().unwrap().events.len()
    }
}

async fn sse(url: String, heard: Arc<Mutex<Heard>>, mut alive: watch::Receiver<bool>) {
    let mut listener = Listener::new(url.clone());
    loop {
        if !*alive.borrow_and_update() {
            let last = listener.last.take();
            listener = Listener::new(url.clone());
            listener.last = last;
            if alive.changed().await.is_err() {
                return;
            }
            continue;
        }
        tokio::select! {
            gone = alive.changed() => if gone.is_err() { return },
            // A day has quiet hours.
            event = tokio::time::timeout(Duration::from_secs(5), listener.next()) => {
                let Ok(event) = event else { continue };
                let before = heard.lock().unwrap().repeats;
                heard.lock().unwrap().take(event);
                assert_eq!(heard.lock().unwrap().repeats, before, "who resumes with the last id hears nothing twice");
            }
        }
    }
}

async fn mqtt(options: MqttOptions, heard: Arc<Mutex<Heard>>, mut alive: watch::Receiver<bool>) {
    loop {
        if !*alive.borrow_and_update() {
            if alive.changed().await.is_err() {
                return;
            }
            continue;
        }
        let (client, mut events) = AsyncClient::new(options.clone(), 100);
        loop {
            tokio::select! {
                gone = alive.changed() => {
                    if gone.is_err() {
                        return;
                    }
                    // What was read and not acknowledged comes again.
                    break;
                }
                event = events.poll() => match event {
                    // A broker that was killed may have forgotten it.
                    Ok(Event::Incoming(Packet::ConnAck(_))) => {
                        client.subscribe("alerts/#", QoS::AtLeastOnce).await.unwrap();
                    }
                    // What a topic retains no more comes as nothing.
                    Ok(Event::Incoming(Packet::Publish(message))) if !message.payload.is_empty() => {
                        let event: Value = serde_json::from_slice(&message.payload).unwrap();
                        assert_eq!(event["subject"].as_str().unwrap().as_bytes(), &message.topic[..]);
                        heard.lock().unwrap().take(event);
                    }
                    Ok(_) => {}
                    Err(_) => tokio::time::sleep(POLL).await,
                }
            }
        }
    }
}
