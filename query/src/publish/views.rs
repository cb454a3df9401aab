//! Somebody outside who is told what a view says, by MQTT or a webhook: `[[views.publish]]`.
//!
//! An event for each append of the view, in order, as a CloudEvent; QoS 1 and not retained on a broker, `POST` with a signature to
//! a webhook. Each target is one task with a place of its own in the view's stream, which it writes into `view_deliveries`: at
//! least once, also across a crash; (view, window, revision) of its rows tells repeats. It reads the stream when it is ready for
//! more, so whoever hangs or is gone is waited for by nobody, and catches up from the tables. One that is new begins with what
//! comes; with the first row when the view is newer than it. What it never takes is a row `dead` there, with the place.

use std::sync::Arc;
use std::time::Duration;

use arrow_array::cast::AsArray;
use arrow_array::{ArrayRef, RecordBatch, StringArray, TimestampMicrosecondArray};
use bytes::Bytes;
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wire::schema::{QUALITY, SEQ, SPOOL, TS, own};
use wire::{StreamName, StreamSchema};

use super::appends::{self, Append, Follower, Read};
use super::mqtt::{self, Backoff, Broker, Connection};
use super::target::{self, TargetKind, Way, pause};
use super::webhook::{self, CLOUD_EVENT, Request};
use crate::caller::{Caller, Door};
use crate::clock::now_us;
use crate::engine::{Engine, QueryError, VIEWS_LANE};
use crate::sink::Sink;
use crate::views::changes;

/// Its place is written so often at most.
const NOTE_EVERY: Duration = Duration::from_secs(1);
/// How soon is looked again for a view that is not there, or a place that could not be read.
const AGAIN: Duration = Duration::from_secs(1);
/// The place of who has nothing yet.
const START: &str = "start";

/// One who is told.
#[derive(Debug, Clone)]
pub struct ViewTargetSettings {
    pub name: String,
    pub view: StreamName,
    pub kind: TargetKind,
    /// Of MQTT.
    pub topic: String,
}

/// What a target counts since the node started.
#[derive(Debug, Clone, Serialize)]
pub struct ViewTargetStatus {
    pub name: String,
    pub view: String,
    /// The last append that it has, or that was given up.
    pub place: Option<String>,
    pub delivered: u64,
    pub retried: u64,
    pub dead: u64,
    pub last_error: Option<String>,
}

/// All who are told.
#[derive(Debug, Default)]
pub struct ViewTargets(Vec<Arc<Mutex<ViewTargetStatus>>>);

impl ViewTargets {
    /// Starts a task for each. They end with the token.
    pub fn start(
        engine: &Arc<Engine>,
        sink: &Arc<dyn Sink>,
        targets: Vec<ViewTargetSettings>,
        token: &CancellationToken,
    ) -> Arc<Self> {
        let start = |settings: ViewTargetSettings| {
            let way = settings.kind.clone().way();
            let feed = Feed::new(settings, Arc::clone(engine), Arc::clone(sink), token.clone());
            let status = Arc::clone(&feed.status);
            match way {
                // The configuration refuses Alertmanager for views.
                Way::Http(request) | Way::Alertmanager(request) => tokio::spawn(by_http(feed, request)),
                Way::Mqtt(broker) => tokio::spawn(by_mqtt(feed, broker)),
            };
            status
        };
        Arc::new(Self(targets.into_iter().map(start).collect()))
    }

    /// The targets as they stand.
    pub fn statuses(&self) -> Vec<ViewTargetStatus> {
        self.0.iter().map(|status| status.lock().clone()).collect()
    }
}

/// What one target is told, and how far it has it.
struct Feed {
    settings: ViewTargetSettings,
    engine: Arc<Engine>,
    sink: Arc<dyn Sink>,
    status: Arc<Mutex<ViewTargetStatus>>,
    schema: Arc<StreamSchema>,
    /// None until it was found.
    read: Option<Read>,
    follower: Option<Follower>,
    /// When its place was written last, and whether that is where it is.
    noted: (Instant, bool),
    token: CancellationToken,
}

impl Feed {
    fn new(settings: ViewTargetSettings, engine: Arc<Engine>, sink: Arc<dyn Sink>, token: CancellationToken) -> Self {
        let status = ViewTargetStatus {
            name: settings.name.clone(),
            view: settings.view.to_string(),
            place: None,
            delivered: 0,
            retried: 0,
            dead: 0,
            last_error: None,
        };
        let (status, schema) = (Arc::new(Mutex::new(status)), Arc::new(own::view_deliveries()));
        let noted = (Instant::now(), true);
        Self { settings, engine, sink, status, schema, read: None, follower: None, noted, token }
    }

    /// The next append; what was given before is done with. None when the node stops.
    async fn next(&mut self) -> Option<Append> {
        loop {
            let follower = match &mut self.follower {
                Some(follower) => follower,
                None => {
                    let follower = self.follow().await?;
                    self.follower.insert(follower)
                }
            };
            let (last, is_noted) = self.noted;
            let next = tokio::select! {
                next = follower.next() => next,
                () = tokio::time::sleep_until(last + NOTE_EVERY), if !is_noted => {
                    self.note("delivered", None).await?;
                    continue;
                }
            };
            match next {
                Some(append) => return Some(append),
                None if self.token.is_cancelled() => return None,
                // The view was dropped; one of its name may come.
                None => self.follower = None,
            }
        }
    }

    /// Waits until the view is there, and finds the place in what it says.
    async fn follow(&mut self) -> Option<Follower> {
        let name = self.settings.view.to_string();
        let changes = changes(&self.settings.view).ok()?;
        let caller = Caller::new("weir", Door::Node, None, Arc::new([VIEWS_LANE.to_owned()]));
        if self.read.is_none() {
            let found = loop {
                match self.found(&caller, &changes).await {
                    Ok(found) => break found,
                    Err(error) => {
                        tracing::warn!(target = self.settings.name, %error, "cannot find where it stood");
                        pause(AGAIN, &self.token).await?;
                    }
                }
            };
            self.stands_at(found);
            self.noted.1 = false;
            self.note("delivered", None).await?;
        }
        while !self.engine.views().has(&name) {
            pause(AGAIN, &self.token).await?;
        }
        let read = self.read.clone().unwrap_or_default();
        Some(Follower::new((Arc::clone(&self.engine), caller), (name, changes), read, self.token.clone()))
    }

    /// The place that it wrote, of each spool of this node's the last; else the end of what the view says.
    async fn found(&self, caller: &Caller, changes: &StreamName) -> Result<Read, QueryError> {
        let stream = stream();
        let mut found: Option<Read> = None;
        if self.engine.tables().cold(&stream).is_some() {
            let (target, view) = (self.settings.name.replace('\'', "''"), &self.settings.view);
            let asked = format!(
                "SELECT last_value(place ORDER BY {SEQ}) AS place FROM {stream} WHERE target = '{target}' AND view = '{view}' \
                 GROUP BY {SPOOL}"
            );
            for rows in self.engine.rows_as(caller, &asked, usize::MAX).await? {
                for place in rows.column(0).as_string::<i32>().iter().flatten() {
                    let found = found.get_or_insert_default();
                    for (spool, seq) in appends::read_id(place).unwrap_or_default() {
                        let known = found.entry(spool).or_default();
                        *known = seq.max(*known);
                    }
                }
            }
        }
        match found {
            Some(found) => Ok(found),
            None => appends::newest(&self.engine, changes).await,
        }
    }

    fn stands_at(&mut self, read: Read) {
        self.status.lock().place = Some(if read.is_empty() { START.to_owned() } else { appends::id(&read) });
        self.read = Some(read);
    }

    /// It has this append. None when the node stops.
    async fn delivered(&mut self, append: &Append) -> Option<()> {
        self.stands_at(appends::read_id(&append.id)?);
        {
            let mut status = self.status.lock();
            status.delivered += 1;
            status.last_error = None;
        }
        self.noted.1 = false;
        if self.noted.0.elapsed() >= NOTE_EVERY { self.note("delivered", None).await } else { Some(()) }
    }

    /// It will never take it. None when the node stops.
    async fn dead(&mut self, append: &Append, reason: &str) -> Option<()> {
        tracing::error!(target = self.settings.name, place = append.id, reason, "what a view says is given up");
        self.stands_at(appends::read_id(&append.id)?);
        {
            let mut status = self.status.lock();
            status.dead += 1;
            status.last_error = Some(reason.to_owned());
        }
        self.note("dead", Some(reason)).await
    }

    /// Writes its place. None when the node stops.
    async fn note(&mut self, state: &str, reason: Option<&str>) -> Option<()> {
        let text = |value: Option<&str>| Arc::new(StringArray::from(vec![value])) as ArrayRef;
        let place = self.status.lock().place.clone();
        let columns = self.schema.arrow().fields().iter().map(|field| match field.name().as_str() {
            TS => Arc::new(TimestampMicrosecondArray::from(vec![now_us()]).with_timezone("UTC")) as ArrayRef,
            QUALITY => text(Some("good")),
            "target" => text(Some(&self.settings.name)),
            "view" => text(Some(self.settings.view.as_str())),
            "state" => text(Some(state)),
            "place" => text(place.as_deref()),
            "reason" => text(reason),
            _ => text(None),
        });
        let columns = columns.collect();
        let rows =
            RecordBatch::try_new(Arc::clone(self.schema.arrow()), columns).expect("the columns are the schema's");
        let (stream, name) = (stream(), &self.settings.name);
        let wrote = target::write(self.sink.as_ref(), (&stream, &self.schema), rows, name, &self.token).await?;
        if let Err(error) = wrote {
            self.status.lock().last_error = Some(error.to_string());
        }
        self.noted = (Instant::now(), true);
        Some(())
    }

    /// A CloudEvent.
    fn event(&self, append: &Append) -> Bytes {
        let (view, data) = (self.settings.view.as_str(), &append.data);
        let id = json!(format!("{view}/{}", append.id));
        Bytes::from(format!(
            "{{\"specversion\":\"1.0\",\"id\":{id},\"source\":\"weir/views\",\"type\":\"weir.view.change\",\"subject\":\"{view}\",\
             \"datacontenttype\":\"application/json\",\"data\":{data}}}"
        ))
    }
}

fn stream() -> StreamName {
    own::VIEW_DELIVERIES.parse().expect("own names are valid")
}

fn retried(status: &Mutex<ViewTargetStatus>, error: &str) {
    let mut status = status.lock();
    status.retried += 1;
    status.last_error = Some(error.to_owned());
}

/// Tells a webhook until the node stops.
async fn by_http(mut feed: Feed, request: Request) {
    let client = match webhook::client(&request) {
        Ok(client) => client,
        Err(error) => return tracing::error!(target = feed.settings.name, %error, "no HTTP client"),
    };
    while let Some(append) = feed.next().await {
        let (body, status, token) = (feed.event(&append), Arc::clone(&feed.status), feed.token.clone());
        let fate =
            webhook::post(&client, &request, (CLOUD_EVENT, body), &|error| retried(&status, error), &token).await;
        let noted = match fate {
            Some(webhook::Fate::Taken) => feed.delivered(&append).await,
            Some(webhook::Fate::GivenUp(reason)) => feed.dead(&append, &reason).await,
            None => None,
        };
        if noted.is_none() {
            return;
        }
    }
}

/// Tells a broker until the node stops.
async fn by_mqtt(mut feed: Feed, broker: Broker) {
    let (mut backoff, mut waiting, mut lost_over) = (Backoff::default(), None, 0);
    while !feed.token.is_cancelled() {
        let mut connection = broker.connect();
        if session(&mut connection, &mut feed, &mut waiting, &mut lost_over).await.is_none() {
            return connection.close().await;
        }
        let (stood, error) = connection.end();
        retried(&feed.status, &error);
        if lost_over >= broker.attempts
            && let Some(append) = waiting.take()
        {
            lost_over = 0;
            let reason = format!("{error}, the last of {} attempts", broker.attempts);
            if feed.dead(&append, &reason).await.is_none() {
                return;
            }
        }
        tracing::warn!(target = feed.settings.name, error, "no connection to the broker");
        if backoff.pause(stood, &feed.token).await.is_none() {
            return;
        }
    }
}

/// One connection. None when the node stops, and Some when it is lost; `waiting` was on its way then, and over it `lost_over`
/// connections were lost.
async fn session(
    connection: &mut Connection,
    feed: &mut Feed,
    waiting: &mut Option<Append>,
    lost_over: &mut u32,
) -> Option<()> {
    let token = feed.token.clone();
    if !connection.stands(&token).await? {
        return Some(());
    }
    loop {
        let append = match waiting.take() {
            Some(append) => append,
            None => tokio::select! {
                append = feed.next() => append?,
                lost = connection.lost(&token) => return lost,
            },
        };
        *lost_over += 1;
        let message = (feed.settings.topic.clone(), feed.event(&append), false);
        match connection.publish(message, &token).await? {
            mqtt::Fate::Lost => {
                *waiting = Some(append);
                return Some(());
            }
            mqtt::Fate::Taken => feed.delivered(&append).await?,
            mqtt::Fate::Refused(reason) => feed.dead(&append, &reason).await?,
        }
        *lost_over = 0;
    }
}
