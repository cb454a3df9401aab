//! What was decided about alerts, on its way to whoever wants to know: [`sse`], [`mqtt`], [`webhook`].
//!
//! The newest changes lie in one ring in memory, already as text; who is further behind reads the stream `alert_log`. Everyone
//! who listens has a place of its own in the sequence and takes what is next when it is ready: there is no queue for anyone, so
//! nobody slows anybody, and who was away catches up. Those who catch up ask one after the other, in the lane of the rules, so
//! that many of them take no more than one. A change is in the ring after it is durable.

pub mod mqtt;
pub mod sse;
pub mod target;
pub mod webhook;

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use chrono::{DateTime, SecondsFormat};
use parking_lot::RwLock;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::alerts::episode::{Episode, Phase, Severity};
use crate::alerts::episodes::{Change, Subject};
use crate::alerts::log;
use crate::engine::{Engine, QueryError};
use crate::links::event::LinkEvent;

/// Changes that are kept in memory.
const RING_MAX: usize = 10_000;
/// Bytes of them.
const RING_BYTES_MAX: usize = 64 << 20;

/// A change that subscribers are told.
#[derive(Debug)]
pub struct Told {
    pub sequence: i64,
    pub topic: String,
    pub severity: Severity,
    /// The word of what happened.
    pub transition: &'static str,
    pub id: String,
    pub firing: bool,
    /// Links that it has come through.
    pub(crate) hops: u32,
    /// The one target that is told; everyone who listens when there is none.
    pub(crate) only: Option<String>,
    /// When it was decided, µs since 1970 UTC.
    pub at: i64,
    /// A CloudEvent, as JSON.
    pub body: Bytes,
    /// The alert as Alertmanager wants it.
    pub(crate) pushed: Bytes,
}

impl Told {
    pub(crate) fn new(change: &Change) -> Option<Self> {
        if !change.told {
            return None;
        }
        match &change.subject {
            Subject::Alert(alert) => Some(Self::of_alert(change, alert)),
            Subject::Event(event) => Some(Self::of_link(change, event)),
            Subject::Silence(_) | Subject::Position => None,
        }
    }

    fn of_alert(change: &Change, alert: &Episode) -> Self {
        Self {
            sequence: change.sequence,
            topic: alert.topic.clone(),
            severity: alert.severity,
            transition: change.transition.word(),
            id: alert.id.clone(),
            firing: alert.phase == Phase::Firing,
            hops: 0,
            only: None,
            at: change.at,
            body: event(change, alert),
            pushed: pushed(alert),
        }
    }

    fn of_link(change: &Change, event: &LinkEvent) -> Self {
        Self {
            sequence: change.sequence,
            topic: event.topic.clone(),
            severity: event.severity,
            transition: change.transition.word(),
            id: event.id.clone(),
            firing: false,
            hops: event.hops,
            only: event.only.clone(),
            at: change.at,
            body: event.body(change.sequence, time(change.at)),
            // Alertmanager is told of alerts alone.
            pushed: Bytes::new(),
        }
    }

    fn bytes(&self) -> usize {
        self.body.len() + self.pushed.len() + self.topic.len() + 200
    }
}

/// RFC 3339, UTC.
fn time(us: i64) -> Option<String> {
    DateTime::from_timestamp_micros(us).map(|time| time.to_rfc3339_opts(SecondsFormat::AutoSi, true))
}

/// A CloudEvent whose data has the names of what the edge publishes.
fn event(change: &Change, alert: &Episode) -> Bytes {
    let labels = serde_json::from_str::<serde_json::Value>(&alert.labels).unwrap_or_default();
    let text = serde_json::json!({
        "specversion": "1.0",
        "id": format!("{}/{}", alert.id, change.sequence),
        "source": "weir/alerts",
        "type": format!("weir.alert.{}", change.transition.word()),
        "subject": alert.topic,
        "time": time(change.at),
        "datacontenttype": "application/json",
        "data": {
            "id": alert.id,
            "transition": change.transition.word(),
            "sequence": change.sequence,
            "rule": alert.rule,
            "state": log::state(change.transition, alert),
            "severity": alert.severity.word(),
            "stream": alert.stream,
            "device": alert.device,
            "labels": labels,
            "message": alert.message,
            "value": alert.value,
            "ts": time(change.ts),
            "from": time(alert.from),
            "to": alert.to.and_then(time),
            "aliases": alert.aliases,
            "acknowledged_by": alert.acknowledged.as_ref().map(|by| &by.by),
            "assigned_to": alert.assigned,
            "actor": change.actor,
            "note": change.note,
        },
    });
    Bytes::from(text.to_string())
}

fn pushed(alert: &Episode) -> Bytes {
    let mut labels = serde_json::Map::new();
    let own: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&alert.labels).unwrap_or_default();
    for (name, value) in own {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        labels.insert(name, text.into());
    }
    for (name, text) in [("alertname", &*alert.rule), ("severity", alert.severity.word()), ("stream", &*alert.stream)] {
        labels.insert(name.to_owned(), text.into());
    }
    let mut text = serde_json::json!({
        "labels": labels,
        "annotations": { "summary": alert.message, "weir_id": alert.id },
        "startsAt": time(alert.from),
    });
    if let Some(to) = alert.to.filter(|_| alert.phase == Phase::Resolved) {
        text["endsAt"] = time(to).into();
    }
    Bytes::from(text.to_string())
}

#[derive(Debug)]
struct Ring {
    told: VecDeque<Arc<Told>>,
    bytes: usize,
    /// Every change above it that is told is in the ring.
    above: i64,
}

/// See the module.
#[derive(Debug)]
pub struct Hub {
    engine: Arc<Engine>,
    ring: RwLock<Ring>,
    newest: watch::Sender<i64>,
    /// Whose turn it is to ask the stream.
    turn: Semaphore,
    places: Arc<Semaphore>,
    places_max: usize,
}

impl Hub {
    /// For so many subscribers at a time.
    pub(crate) fn new(engine: Arc<Engine>, subscribers_max: usize) -> Self {
        let ring = RwLock::new(Ring { told: VecDeque::new(), bytes: 0, above: i64::MAX });
        let places_max = subscribers_max.min(Semaphore::MAX_PERMITS);
        let (turn, places) = (Semaphore::new(1), Arc::new(Semaphore::new(places_max)));
        Self { engine, ring, newest: watch::Sender::new(-1), turn, places, places_max }
    }

    /// A place for a subscriber; None when there is none.
    pub(crate) fn place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.places).try_acquire_owned().ok()
    }

    /// How many listen.
    pub(crate) fn subscribers(&self) -> usize {
        self.places_max - self.places.available_permits()
    }

    /// The node has found out where the stream ended: from now on there are places in it.
    pub(crate) fn open(&self, sequence: i64) {
        self.ring.write().above = sequence;
        self.newest.send_replace(sequence);
    }

    /// Changes that are durable, and the sequence up to which that is all.
    pub(crate) fn publish(&self, changes: &[Change], sequence: i64) {
        {
            let mut ring = self.ring.write();
            for told in changes.iter().filter_map(Told::new) {
                ring.bytes += told.bytes();
                ring.told.push_back(Arc::new(told));
            }
            while ring.told.len() > RING_MAX || ring.bytes > RING_BYTES_MAX {
                let Some(oldest) = ring.told.pop_front() else { break };
                ring.bytes -= oldest.bytes();
                ring.above = oldest.sequence;
            }
        }
        self.newest.send_replace(sequence);
    }

    /// The sequence of the newest change; -1 before the node knows.
    pub fn newest(&self) -> i64 {
        *self.newest.borrow()
    }

    /// Told when there is something new.
    pub fn changed(&self) -> watch::Receiver<i64> {
        self.newest.subscribe()
    }

    /// The next changes behind a sequence, in order; none when there are none yet.
    ///
    /// # Errors
    /// When the stream has to be asked and cannot be.
    pub async fn after(&self, sequence: i64, count: usize) -> Result<Vec<Arc<Told>>, QueryError> {
        {
            let ring = self.ring.read();
            if sequence >= ring.above {
                let at = ring.told.partition_point(|told| told.sequence <= sequence);
                return Ok(ring.told.iter().skip(at).take(count).cloned().collect());
            }
        }
        let Ok(_turn) = self.turn.acquire().await else { return Ok(Vec::new()) };
        let changes = log::told_after(&self.engine, sequence, count).await?;
        Ok(changes.iter().filter_map(Told::new).map(Arc::new).collect())
    }
}
