//! Alerts on the local broker, within milliseconds, cloud or no cloud: retained while they fire, cleared when they end.
//!
//! The engine offers what rules found ([`Outbox::offer`]) and never waits; a task of its own brings it to the broker at
//! QoS 1. The promise is *at least once, with a stable id*: after a connection is made, and after a restart, everything that
//! fires is published again, and what ended lately is cleared again.
//!
//! What a restart applies again is told apart in `publish/replay.rs`; what actuators are told is kept in
//! `publish/commands.rs` and goes the same way, never retained.
//!
//! Limits: `queue` publications wait, then the oldest go, which is counted; what fires is not lost by that.

mod commands;
mod replay;

use std::collections::{BTreeMap, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use rand::Rng;
use serde::Serialize;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use self::commands::Commands;
pub use self::replay::Replay;
use crate::config::{MqttSettings, RuleSettings, Settings};
use crate::rules::{Transition, Turn};
use crate::source::mqtt::TlsError;
use crate::source::mqtt::client::{self, Event};

/// Publications that wait, unless configured.
const QUEUE_MAX: usize = 10_000;
/// Ends that are published again after a new connection or at the end of a replay.
const ENDED_MAX: usize = 1_000;
/// After a lost connection.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// What is queued at a stop gets so long.
const STOP_WITHIN: Duration = Duration::from_millis(500);

/// What the publisher tells about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PublisherStatus {
    pub connected: bool,
    /// Handed to the broker since the start, repetitions included.
    pub published: u64,
    /// Given up because the queue was full, or too many topics were commanded.
    pub dropped: u64,
    pub waiting: usize,
    /// Commands among those published.
    pub commands: u64,
    /// Commands that a newer one replaced while they waited for their turn.
    pub commands_replaced: u64,
    pub last_error: Option<String>,
}

#[derive(Debug, Clone)]
struct Publication {
    topic: String,
    /// Empty: the retained one goes.
    payload: Bytes,
    retain: bool,
}

/// What waits for the broker.
#[derive(Debug)]
pub struct Outbox {
    edge: String,
    queue_max: usize,
    inner: Mutex<Inner>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    queue: VecDeque<Publication>,
    /// What the broker is to retain.
    firing: BTreeMap<String, Bytes>,
    /// What it is to retain no longer; the last of them.
    ended: VecDeque<String>,
    commands: Commands,
    status: PublisherStatus,
}

impl Outbox {
    /// An empty one.
    pub fn new(edge: String, queue_max: usize) -> Self {
        Self { edge, queue_max, inner: Mutex::new(Inner::default()), wake: Notify::new() }
    }

    /// One for the rules of the settings, with the broker; none when no rule has anything to tell.
    pub fn of(settings: &Settings) -> Option<(MqttSettings, Arc<Self>)> {
        let broker = settings.publisher().ok().filter(|_| settings.rule.iter().any(RuleSettings::is_told))?;
        let queue_max = settings.publish.as_ref().and_then(|publish| publish.queue);
        let queue_max = queue_max.map_or(QUEUE_MAX, |queue| queue as usize);
        Some((broker, Arc::new(Self::new(settings.edge.id.to_string(), queue_max))))
    }

    /// Takes what became of an alert.
    pub fn offer(&self, alert: &Transition) {
        let inner = &mut *self.inner.lock();
        inner.commands.offer(alert);
        if let Some(topic) = &alert.topic {
            self.publish(inner, topic, alert);
        }
        self.wake.notify_one();
    }

    fn publish(&self, inner: &mut Inner, topic: &String, alert: &Transition) {
        let payload = self.payload(alert);
        inner.ended.retain(|ended| ended != topic);
        let publication = |payload, retain| Publication { topic: topic.clone(), payload, retain };
        match alert.turn {
            Turn::Firing => {
                inner.firing.insert(topic.clone(), payload.clone());
                inner.queue.push_back(publication(payload, true));
            }
            Turn::Resolved => {
                inner.firing.remove(topic);
                if inner.ended.len() == ENDED_MAX {
                    inner.ended.pop_front();
                }
                inner.ended.push_back(topic.clone());
                inner.queue.push_back(publication(payload, false));
                inner.queue.push_back(publication(Bytes::new(), true));
            }
            Turn::Backfill => return,
        }
        while inner.queue.len() > self.queue_max {
            inner.queue.pop_front();
            inner.status.dropped += 1;
        }
    }

    /// What it tells now.
    pub fn status(&self) -> PublisherStatus {
        let inner = self.inner.lock();
        PublisherStatus {
            waiting: inner.queue.len() + inner.commands.waiting(),
            dropped: inner.status.dropped + inner.commands.refused,
            commands_replaced: inner.commands.replaced,
            ..inner.status.clone()
        }
    }

    fn payload(&self, alert: &Transition) -> Bytes {
        let time = |us: i64| {
            chrono::DateTime::from_timestamp_micros(us)
                .map(|time| time.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true))
        };
        let labels = serde_json::from_str::<serde_json::Value>(&alert.labels).unwrap_or_default();
        let text = serde_json::json!({
            "id": alert.id,
            "rule": alert.rule,
            "state": alert.turn.word(),
            "severity": alert.severity,
            "edge": self.edge,
            "stream": alert.stream,
            "device": alert.device,
            "labels": labels,
            "message": alert.message,
            "ts": time(alert.ts),
            "from": time(alert.from),
            "to": alert.to.and_then(time),
        });
        Bytes::from(text.to_string())
    }

    /// A new connection: the broker may have forgotten, and what was on its way may be lost.
    fn all_again(&self) {
        let inner = &mut *self.inner.lock();
        let again = |topic: &String, payload: &Bytes| Publication {
            topic: topic.clone(),
            payload: payload.clone(),
            retain: true,
        };
        let mut queue = inner.ended.iter().map(|topic| again(topic, &Bytes::new())).collect::<VecDeque<_>>();
        queue.extend(inner.firing.iter().map(|(topic, payload)| again(topic, payload)));
        queue.append(&mut inner.queue);
        inner.queue = queue;
        inner.commands.all_again();
    }

    /// Hands over what the client takes; what finds no room goes with its next event. Returns when a command that was held
    /// back may go.
    fn flush(&self, client: &client::Client) -> Option<Instant> {
        let Inner { queue, commands, status, .. } = &mut *self.inner.lock();
        while let Some(first) = queue.front() {
            if !client.publish(&first.topic, first.payload.clone(), first.retain) {
                return None;
            }
            queue.pop_front();
            status.published += 1;
        }
        commands.flush(Instant::now(), |topic, word| {
            let sent = client.publish(topic, word.clone(), false);
            status.published += u64::from(sent);
            status.commands += u64::from(sent);
            sent
        })
    }

    fn connected(&self, connected: bool, error: Option<String>) {
        let status = &mut self.inner.lock().status;
        (status.connected, status.last_error) = (connected, error);
    }
}

/// Brings an outbox to a broker until the token ends it.
///
/// # Errors
/// When the certificates cannot be used.
pub async fn run(settings: MqttSettings, outbox: &Outbox, token: CancellationToken) -> Result<(), TlsError> {
    let id = settings.client_id.clone().unwrap_or_else(|| format!("weir-{}-alerts", outbox.edge));
    let (client, mut events) = client::without_session(&settings, &id)?;
    let (mut connected, mut failures) = (false, 0_u32);
    // When a command that was held back may go.
    let mut due = None::<Instant>;
    while !token.is_cancelled() {
        let event = {
            let mut next = pin!(events.next());
            loop {
                let wait = due.map_or(Duration::MAX, |due| due.saturating_duration_since(Instant::now()));
                tokio::select! {
                    event = &mut next => break event,
                    () = outbox.wake.notified(), if connected => due = outbox.flush(&client),
                    () = tokio::time::sleep(wait), if connected && due.is_some() => due = outbox.flush(&client),
                    () = token.cancelled() => break Event::Other,
                }
            }
        };
        match event {
            Event::Connected { .. } => {
                tracing::info!(client = id, "alerts: connected to the broker");
                (connected, failures) = (true, 0);
                outbox.connected(true, None);
                outbox.all_again();
            }
            Event::Lost(reason) => {
                if connected || failures == 0 {
                    tracing::warn!(client = id, reason, "alerts: no connection to the broker");
                }
                connected = false;
                outbox.connected(false, Some(reason));
                let wait = (BACKOFF_MIN * 2_u32.pow(failures.min(10))).min(BACKOFF_MAX);
                failures += 1;
                let wait = wait.mul_f64(rand::rng().random_range(0.5..=1.0));
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = token.cancelled() => {}
                }
            }
            _ => {}
        }
        due = if connected { outbox.flush(&client) } else { None };
    }
    // What is handed over is written with the next turns; then the farewell.
    if connected {
        client.disconnect();
        let _ =
            tokio::time::timeout(STOP_WITHIN, async { while !matches!(events.next().await, Event::Lost(_)) {} }).await;
    }
    outbox.connected(false, None);
    Ok(())
}

#[cfg(test)]
mod tests {
    use segment_log::Position;

    use super::*;

    pub(super) fn alert(device: &str, turn: Turn) -> Transition {
        Transition {
            ts: 1,
            device: device.to_owned(),
            rule: "r".to_owned(),
            rule_hash: String::new(),
            id: device.to_owned(),
            turn,
            severity: "warning",
            stream: "s".to_owned(),
            labels: "{}".to_owned(),
            message: String::new(),
            from: 0,
            to: None,
            topic: Some(device.to_owned()),
            command: None,
        }
    }

    /// What waits, as topic and state; `-` clears.
    fn waits(outbox: &Outbox) -> Vec<String> {
        let text = |publication: &Publication| {
            let state = serde_json::from_slice::<serde_json::Value>(&publication.payload);
            let state = state.map_or("-".to_owned(), |alert| alert["state"].as_str().unwrap().to_owned());
            format!("{} {state}", publication.topic)
        };
        outbox.inner.lock().queue.iter().map(text).collect()
    }

    fn outbox(queue_max: usize) -> Outbox {
        Outbox::new("e".to_owned(), queue_max)
    }

    #[test]
    fn what_is_applied_again_is_told_by_its_outcome() {
        let old = || [vec![alert("a", Turn::Firing)], vec![alert("a", Turn::Resolved), alert("b", Turn::Firing)]];
        let apply = |outbox: &Outbox, replay: &mut Replay| {
            for (position, found) in (1..).zip(old()) {
                replay.applied(Position(position), found, outbox, || panic!("not yet"));
            }
            assert!(waits(outbox).is_empty());
        };
        let (quiet, mut replay) = (outbox(100), Replay::new(Position(5)));
        apply(&quiet, &mut replay);
        replay.end(&quiet, || vec![alert("b", Turn::Firing)]);
        replay.end(&quiet, || panic!("once"));
        assert_eq!(waits(&quiet), ["b firing", "a resolved", "a -"]);

        // Something new came before the end was seen.
        let (busy, mut replay) = (outbox(100), Replay::new(Position(5)));
        apply(&busy, &mut replay);
        let firing = || vec![alert("b", Turn::Firing), alert("c", Turn::Firing)];
        replay.applied(Position(5), vec![alert("c", Turn::Firing)], &busy, firing);
        assert_eq!(waits(&busy), ["b firing", "a resolved", "a -", "c firing"]);
        replay.applied(Position(6), vec![alert("d", Turn::Firing)], &busy, || panic!("once"));
        assert_eq!(waits(&busy).last().unwrap(), "d firing");
    }

    #[test]
    fn a_full_queue_gives_up_the_oldest_and_what_fires_is_told_with_the_next_connection() {
        let outbox = outbox(3);
        for device in ["a", "b", "c", "d"] {
            outbox.offer(&alert(device, Turn::Firing));
        }
        outbox.offer(&alert("b", Turn::Resolved));
        assert_eq!(waits(&outbox), ["d firing", "b resolved", "b -"]);
        assert_eq!((outbox.status().dropped, outbox.status().waiting), (3, 3));
        outbox.all_again();
        assert_eq!(waits(&outbox)[..4], ["b -", "a firing", "c firing", "d firing"]);
        outbox.offer(&alert("b", Turn::Backfill));
        assert_eq!(outbox.status().waiting, 7, "backfill is not published");
    }
}
