//! Alerts on a broker: one message for each change at QoS 1, on the alert's topic. What a topic retains is what fires on it: the
//! alert that was told last; when that has ended the worst of the others, which is published once more; and nothing when no alert
//! fires there. That holds for ends that are too old to be told, too.
//!
//! Payloads are CloudEvents. A change counts as delivered when the broker has acknowledged it. After a lost connection what was
//! on its way is published again: at least once, with a stable id. What the broker refuses, or what so many connections were
//! lost over, is a dead letter.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Packet, PubAckReason};
use rumqttc::v5::{AsyncClient, Event, EventLoop, MqttOptions};
use rumqttc::{Outgoing, Transport};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::Told;
use super::target::{Due, Place, jittered, pause};
use crate::alerts::episodes::Transition;

/// Messages on their way at a time.
const IN_FLIGHT_MAX: u16 = 16;
const REQUESTS: usize = 256;
const KEEP_ALIVE: Duration = Duration::from_secs(30);
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
const FAREWELL: Duration = Duration::from_millis(500);

/// A broker, as whom, and who is told there.
pub(crate) struct Broker {
    pub(crate) host: String,
    pub(crate) port: u16,
    /// TCP, or TLS over it.
    pub(crate) transport: Transport,
    pub(crate) client_id: String,
    pub(crate) credentials: Option<(String, String)>,
    /// Connections that may be lost over one message.
    pub(crate) attempts: u32,
}

impl std::fmt::Debug for Broker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Broker").field("host", &self.host).field("port", &self.port).finish_non_exhaustive()
    }
}

impl Broker {
    /// A connection that is on its way.
    pub(crate) fn connect(&self) -> Connection {
        let mut options = MqttOptions::new(&self.client_id, &self.host, self.port);
        options.set_keep_alive(KEEP_ALIVE).set_clean_start(true).set_outgoing_inflight_upper_limit(IN_FLIGHT_MAX);
        options.set_transport(self.transport.clone());
        if let Some((username, password)) = &self.credentials {
            options.set_credentials(username, password);
        }
        let (client, events) = AsyncClient::new(options, REQUESTS);
        let (sender, line) = watch::channel(Line::default());
        Connection { client, line, turning: tokio::spawn(turn(events, sender)), sent: 0, refused: 0 }
    }
}

/// One connection to a broker, with one message on its way at a time.
#[derive(Debug)]
pub(crate) struct Connection {
    client: AsyncClient,
    line: watch::Receiver<Line>,
    turning: JoinHandle<()>,
    sent: usize,
    refused: usize,
}

/// How long is waited before the next connection: twice as long after each that never stood.
#[derive(Debug)]
pub(crate) struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(BACKOFF_MIN)
    }
}

impl Backoff {
    /// Waits after a connection was lost; whether it `stood`. None when the node stops.
    pub(crate) async fn pause(&mut self, stood: bool, token: &CancellationToken) -> Option<()> {
        if stood {
            self.0 = BACKOFF_MIN;
        }
        let wait = self.0;
        self.0 = (2 * wait).min(BACKOFF_MAX);
        pause(jittered(wait), token).await
    }
}

/// How a message fared.
#[derive(Debug)]
pub(crate) enum Fate {
    Taken,
    /// The broker will never take it, and why.
    Refused(String),
    /// With the connection.
    Lost,
}

impl Connection {
    /// Waits until it stands; false when it was lost before. None when the node stops.
    pub(crate) async fn stands(&mut self, token: &CancellationToken) -> Option<bool> {
        is_lost(&mut self.line, |line| line.connected, token).await.map(|lost| !lost)
    }

    /// Waits until it is lost. None when the node stops.
    pub(crate) async fn lost(&self, token: &CancellationToken) -> Option<()> {
        is_lost(&mut self.line.clone(), |_| false, token).await.map(drop)
    }

    /// Publishes at QoS 1 and waits for the acknowledgement. None when the node stops.
    pub(crate) async fn publish(
        &mut self,
        (topic, payload, retain): Message,
        token: &CancellationToken,
    ) -> Option<Fate> {
        if self.client.publish(topic, QoS::AtLeastOnce, retain, payload).await.is_err() {
            return Some(Fate::Lost);
        }
        self.sent += 1;
        let sent = self.sent;
        if is_lost(&mut self.line, |line| line.acknowledged >= sent, token).await? {
            return Some(Fate::Lost);
        }
        let line = self.line.borrow();
        let fate = if line.refused > self.refused { Fate::Refused(line.reason.clone()) } else { Fate::Taken };
        self.refused = line.refused;
        Some(fate)
    }

    /// Ends it when all that was sent is acknowledged; the farewell may be lost.
    pub(crate) async fn close(self) {
        let _ = self.client.try_disconnect();
        let _ = tokio::time::timeout(FAREWELL, self.turning).await;
    }

    /// Of one that was lost: whether it stood, and why it is no more.
    pub(crate) fn end(self) -> (bool, String) {
        self.turning.abort();
        let Line { connected, lost, .. } = self.line.borrow().clone();
        (connected, lost.unwrap_or_default())
    }
}

/// What is to be done at the broker.
#[derive(Debug, Clone)]
enum Step {
    Tell(Arc<Told>),
    /// What this topic retains is made what fires on it; and an end that was told then counts as delivered.
    Retain(String, Option<Arc<Told>>),
}

/// Topic, payload, whether it is retained.
pub(crate) type Message = (String, Bytes, bool);

impl Step {
    /// The steps of changes, in order. An end is told, then what was retained is put right; what people say of an alert that
    /// has ended changes nothing about what is retained.
    fn of(due: Due) -> VecDeque<Self> {
        let mut steps: VecDeque<Self> = due.past.into_iter().map(|topic| Self::Retain(topic, None)).collect();
        for told in due.told {
            let end = is_end(&told).then(|| Self::Retain(told.topic.clone(), Some(Arc::clone(&told))));
            steps.push_back(Self::Tell(told));
            steps.extend(end);
        }
        steps
    }

    /// None when the node stops.
    async fn message(&self, place: &Place, token: &CancellationToken) -> Option<Message> {
        Some(match self {
            Self::Tell(told) => (told.topic.clone(), told.body.clone(), told.firing),
            Self::Retain(topic, _) => {
                let fires = place.fires_on(topic, token).await?;
                (topic.clone(), fires.map_or_else(Bytes::new, |told| told.body.clone()), true)
            }
        })
    }
}

/// What was just given up is not delivered with the next step.
fn given_up(steps: &mut VecDeque<Step>) {
    if let Some(Step::Retain(_, end)) = steps.front_mut() {
        *end = None;
    }
}

fn is_end(told: &Told) -> bool {
    !told.firing && told.transition == Transition::Resolved.word()
}

/// What one connection has come to.
#[derive(Debug, Clone, Default)]
struct Line {
    connected: bool,
    acknowledged: usize,
    /// Of these so many were refused; why the last was.
    refused: usize,
    reason: String,
    /// Why it is no more.
    lost: Option<String>,
}

/// Turns the connection's wheel until it ends; a future of `poll` that is dropped half way might lose what it had read.
async fn turn(mut events: EventLoop, line: watch::Sender<Line>) {
    let lost = loop {
        match events.poll().await {
            Ok(Event::Incoming(Packet::ConnAck(_))) => line.send_modify(|line| line.connected = true),
            Ok(Event::Incoming(Packet::PubAck(answer))) => match answer.reason {
                PubAckReason::Success | PubAckReason::NoMatchingSubscribers => {
                    line.send_modify(|line| line.acknowledged += 1);
                }
                PubAckReason::NotAuthorized | PubAckReason::TopicNameInvalid | PubAckReason::PayloadFormatInvalid => {
                    line.send_modify(|line| {
                        (line.acknowledged, line.refused) = (line.acknowledged + 1, line.refused + 1);
                        line.reason = format!("the broker refused it: {:?}", answer.reason);
                    })
                }
                reason => break format!("the broker cannot take it now: {reason:?}"),
            },
            Ok(Event::Incoming(Packet::Disconnect(reason))) => break format!("the broker ended it: {reason:?}"),
            Ok(Event::Outgoing(Outgoing::Disconnect)) => break "it was ended".to_owned(),
            Ok(_) => {}
            Err(error) => break error.to_string(),
        }
    };
    line.send_modify(|line| line.lost = Some(lost));
}

/// Tells one broker until the token ends it.
pub(crate) async fn run(broker: Broker, mut place: Place, token: CancellationToken) {
    if place.find(&token).await.is_none() {
        return;
    }
    let mut backoff = Backoff::default();
    // What is not acknowledged when a connection is lost is published again.
    let mut steps: VecDeque<Step> = VecDeque::new();
    let mut lost_over = 0;
    while !token.is_cancelled() {
        let mut connection = broker.connect();
        if session(&mut connection, &mut steps, &mut place, &mut lost_over, &token).await.is_none() {
            return connection.close().await;
        }
        let (stood, error) = connection.end();
        place.retried(&error);
        if lost_over >= broker.attempts
            && let Some(step) = steps.pop_front()
        {
            let reason = format!("{error}, the last of {lost_over} attempts");
            match step {
                Step::Tell(told) => {
                    place.dead(&told, &reason, &token).await;
                    given_up(&mut steps);
                }
                Step::Retain(topic, _) => {
                    tracing::error!(target = place.name(), topic, reason, "what it retains is not put right");
                }
            }
            lost_over = 0;
        }
        tracing::warn!(target = place.name(), error, "no connection to the broker");
        if backoff.pause(stood, &token).await.is_none() {
            return;
        }
    }
}

/// One connection. None when the node stops, and Some when it is lost; `lost_over` counts those that were while the first
/// step was on its way.
async fn session(
    connection: &mut Connection,
    steps: &mut VecDeque<Step>,
    place: &mut Place,
    lost_over: &mut u32,
    token: &CancellationToken,
) -> Option<()> {
    if !connection.stands(token).await? {
        return Some(());
    }
    loop {
        if steps.is_empty() {
            tokio::select! {
                due = place.next(token) => steps.extend(Step::of(due?)),
                lost = connection.lost(token) => return lost,
            }
        }
        let Some(step) = steps.front().cloned() else { continue };
        *lost_over += 1;
        let message = step.message(place, token).await?;
        let refused = match connection.publish(message, token).await? {
            Fate::Lost => return Some(()),
            Fate::Refused(reason) => Some(reason),
            Fate::Taken => None,
        };
        *lost_over = 0;
        steps.pop_front();
        match (step, refused) {
            (Step::Tell(told), Some(reason)) => {
                place.dead(&told, &reason, token).await;
                given_up(steps);
            }
            // Counts as delivered with the next step, so that a crash in between does both again.
            (Step::Tell(told), None) if is_end(&told) => {}
            (Step::Tell(told), None) => place.delivered(&told, token).await,
            (Step::Retain(topic, end), refused) => {
                if let Some(reason) = refused {
                    tracing::error!(target = place.name(), topic, reason, "what it retains is not put right");
                }
                if let Some(told) = end {
                    place.delivered(&told, token).await;
                }
            }
        }
    }
}

/// Waits until something has come about, or the connection is lost; None when the node stops.
async fn is_lost(
    line: &mut watch::Receiver<Line>,
    come: impl Fn(&Line) -> bool,
    token: &CancellationToken,
) -> Option<bool> {
    tokio::select! {
        () = token.cancelled() => None,
        line = line.wait_for(|line| come(line) || line.lost.is_some()) => {
            // A sender that is gone has lost it, too.
            Some(line.map_or(true, |line| !come(&line)))
        }
    }
}
