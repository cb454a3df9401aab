//! What was decided about alerts, on its way to whoever wants to know: [`sse`], [`mqtt`], [`webhook`],
//! [`alertmanager`].
//!
//! The newest changes lie in one ring in memory, already as text; who is further behind reads the stream `alert_log`. Everyone
//! who listens has a place of its own in the sequence and takes what is next when it is ready: there is no queue for anyone, so
//! nobody slows anybody, and who was away catches up. Those who catch up ask for large pages in the lane of the rules, [`TURNS`]
//! at a time and first come, first served; a page that was read serves all who stand within it, so that a crowd costs little
//! more than one. What is in the ring waits for none of that. A change is in the ring after it is durable.

pub(crate) mod alertmanager;
pub(crate) mod appends;
pub mod mqtt;
pub mod sse;
pub mod target;
pub mod views;
pub mod webhook;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use chrono::{DateTime, SecondsFormat};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Semaphore, watch};

use self::alertmanager::Pushed;
use crate::alerts::episode::{Episode, Phase, Severity};
use crate::alerts::episodes::{Change, Subject};
use crate::alerts::log;
use crate::engine::{Engine, QueryError};
use crate::links::event::LinkEvent;
use crate::places::{Place, Places};

/// Changes that are kept in memory.
const RING_MAX: usize = 10_000;
/// Bytes of them.
const RING_BYTES_MAX: usize = 64 << 20;
/// Pages that are read from the stream at a time; the other places of the lane are for rules.
const TURNS: usize = 2;
/// Changes of such a page, and its bytes; pages that are kept for others.
const PAGE_MAX: usize = 1_024;
const PAGE_BYTES_MAX: usize = 2 << 20;
const PAGES_MAX: usize = 8;

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
    /// As a server-sent event, whose data is `body`.
    pub(crate) frame: Bytes,
    /// A CloudEvent, as JSON.
    pub body: Bytes,
    /// For Alertmanager, which is told of alerts alone.
    pub(crate) pushed: Option<Pushed>,
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
        let (frame, body) = frame(change, &event(change, alert));
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
            frame,
            body,
            pushed: Some(Pushed::new(alert)),
        }
    }

    fn of_link(change: &Change, event: &LinkEvent) -> Self {
        let (frame, body) = frame(change, &event.body(change.sequence, time(change.at)));
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
            frame,
            body,
            pushed: None,
        }
    }

    fn bytes(&self) -> usize {
        self.frame.len() + self.pushed.as_ref().map_or(0, Pushed::bytes) + self.topic.len() + 200
    }
}

/// RFC 3339, UTC.
fn time(us: i64) -> Option<String> {
    DateTime::from_timestamp_micros(us).map(|time| time.to_rfc3339_opts(SecondsFormat::AutoSi, true))
}

/// A CloudEvent whose data has the names of what the edge publishes.
fn event(change: &Change, alert: &Episode) -> String {
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
            "stale": alert.stale,
            "aliases": alert.aliases,
            "acknowledged_by": alert.acknowledged.as_ref().map(|by| &by.by),
            "assigned_to": alert.assigned,
            "actor": change.actor,
            "note": change.note,
        },
    });
    text.to_string()
}

/// A server-sent event, and the part of it that is its data. JSON has no line breaks.
fn frame(change: &Change, body: &str) -> (Bytes, Bytes) {
    let head = format!("id: {}\nevent: {}\ndata: ", change.sequence, change.transition.word());
    let frame = Bytes::from([&head, body, "\n\n"].concat());
    let body = frame.slice(head.len()..head.len() + body.len());
    (frame, body)
}

#[derive(Debug)]
struct Ring {
    told: VecDeque<Arc<Told>>,
    bytes: usize,
    /// Every change above it that is told is in the ring.
    above: i64,
}

/// What was read from the stream: all that is told behind `above`, up to `upto`.
#[derive(Debug)]
struct Page {
    above: i64,
    upto: i64,
    told: Vec<Arc<Told>>,
}

impl Page {
    fn behind(&self, sequence: i64, count: usize) -> Vec<Arc<Told>> {
        let at = self.told.partition_point(|told| told.sequence <= sequence);
        self.told.iter().skip(at).take(count).cloned().collect()
    }
}

/// See the module.
#[derive(Debug)]
pub struct Hub {
    engine: Arc<Engine>,
    ring: RwLock<Ring>,
    /// What fires and somebody was told of: by topic and id.
    fires: RwLock<HashMap<String, BTreeMap<String, Severity>>>,
    newest: watch::Sender<i64>,
    turns: Semaphore,
    pages: Mutex<VecDeque<Arc<Page>>>,
    places: Places,
}

impl Hub {
    /// For so many subscribers at a time.
    pub(crate) fn new(engine: Arc<Engine>, subscribers_max: usize) -> Self {
        let ring = RwLock::new(Ring { told: VecDeque::new(), bytes: 0, above: i64::MAX });
        let (turns, places) = (Semaphore::new(TURNS), Places::new(subscribers_max));
        let (fires, pages, newest) = (RwLock::default(), Mutex::default(), watch::Sender::new(-1));
        Self { engine, ring, fires, newest, turns, pages, places }
    }

    /// A place for a subscriber at this address; None when there is none.
    pub(crate) fn place(&self, address: IpAddr) -> Option<Place> {
        self.places.take(address)
    }

    /// How many listen.
    pub(crate) fn subscribers(&self) -> usize {
        self.places.taken()
    }

    /// The node has found out where the stream ended, and what fires: from now on there are places in it.
    pub(crate) fn open<'e>(&self, sequence: i64, open: impl Iterator<Item = &'e Episode>) {
        for alert in open.filter(|alert| alert.phase == Phase::Firing && alert.told && alert.quiet.is_none()) {
            self.fires.write().entry(alert.topic.clone()).or_default().insert(alert.id.clone(), alert.severity);
        }
        self.ring.write().above = sequence;
        self.newest.send_replace(sequence);
    }

    /// Changes that are durable, and the sequence up to which that is all.
    pub(crate) fn publish(&self, changes: &[Change], sequence: i64) {
        {
            let mut ring = self.ring.write();
            for told in changes.iter().filter_map(Told::new) {
                self.note(&told);
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

    fn note(&self, told: &Told) {
        let mut fires = self.fires.write();
        if told.firing {
            fires.entry(told.topic.clone()).or_default().insert(told.id.clone(), told.severity);
        } else if let Some(on_topic) = fires.get_mut(&told.topic) {
            on_topic.remove(&told.id);
            if on_topic.is_empty() {
                fires.remove(&told.topic);
            }
        }
    }

    /// What fires on a topic now: ids with their severities.
    pub(crate) fn fires_on(&self, topic: &str) -> Vec<(String, Severity)> {
        let fires = self.fires.read();
        let on_topic = fires.get(topic).into_iter().flatten();
        on_topic.map(|(id, severity)| (id.clone(), *severity)).collect()
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
        let mut from = sequence;
        loop {
            if let Some(told) = self.in_ring(from, count) {
                return Ok(told);
            }
            let page = match self.page_at(from) {
                Some(page) => page,
                None => {
                    let Ok(_turn) = self.turns.acquire().await else { return Ok(Vec::new()) };
                    // Somebody who stood here, too, may have read it meanwhile.
                    match self.page_at(from) {
                        Some(page) => page,
                        None => self.read(from).await?,
                    }
                }
            };
            let told = page.behind(from, count);
            if !told.is_empty() || page.upto <= from {
                return Ok(told);
            }
            // Nothing was told up to there.
            from = page.upto;
        }
    }

    fn in_ring(&self, sequence: i64, count: usize) -> Option<Vec<Arc<Told>>> {
        let ring = self.ring.read();
        let at = ring.told.partition_point(|told| told.sequence <= sequence);
        (sequence >= ring.above).then(|| ring.told.iter().skip(at).take(count).cloned().collect())
    }

    fn page_at(&self, sequence: i64) -> Option<Arc<Page>> {
        let pages = self.pages.lock();
        pages.iter().find(|page| page.above <= sequence && sequence < page.upto).cloned()
    }

    /// Reads a page from the stream, and keeps it.
    async fn read(&self, above: i64) -> Result<Arc<Page>, QueryError> {
        // All of these are durable: a statement that begins now sees them.
        let newest = self.newest();
        let (changes, is_all) = match log::told_after(&self.engine, above, (PAGE_MAX, PAGE_BYTES_MAX)).await {
            // So many of the largest are more than a statement may hold.
            Err(QueryError::Memory { .. }) => {
                log::told_after(&self.engine, above, (PAGE_MAX / 64, PAGE_BYTES_MAX)).await?
            }
            read => read?,
        };
        let last = changes.last().map_or(above, |change| change.sequence);
        let told = changes.iter().filter_map(Told::new).map(Arc::new).collect();
        let page = Arc::new(Page { above, upto: if is_all { newest.max(last) } else { last }, told });
        let mut pages = self.pages.lock();
        pages.push_back(Arc::clone(&page));
        if pages.len() > PAGES_MAX {
            pages.pop_front();
        }
        Ok(page)
    }

    /// The last that was told of an alert.
    ///
    /// # Errors
    /// When the stream cannot be asked.
    pub(crate) async fn last_of(&self, id: &str) -> Result<Option<Arc<Told>>, QueryError> {
        let in_ring = self.ring.read().told.iter().rev().find(|told| told.id == id).cloned();
        if in_ring.is_some() {
            return Ok(in_ring);
        }
        Ok(log::last_told(&self.engine, id).await?.as_ref().and_then(Told::new).map(Arc::new))
    }
}
