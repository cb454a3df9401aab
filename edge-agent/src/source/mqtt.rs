//! Topics of a broker, MQTT 5 or 3.1.1, at QoS 1 with a session that the broker keeps.
//!
//! A PUBACK is sent when the message is in the journal on disk, in the order of arrival, on the connection that brought
//! the message. A redelivery that the journal has is acknowledged and dropped ([`crate::redelivery`]). Each connection
//! subscribes again, because a broker may keep a session and forget its subscriptions; after a new session only when the
//! journal says that it is new. Topics that left the configuration are unsubscribed (`subscriptions.rs`). When the journal
//! has no room this stops reading: the broker waits, and after a long while closes the connection, which is then made
//! again.
//!
//! The state of a connection has one owner, [`Connection::run`]; it ends by its token or with the journal.

pub(crate) mod client;
pub mod probe;
mod subscriptions;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rand::Rng;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use self::client::TlsError;
use self::client::{Client, Event, EventLoop, Publish};
use self::subscriptions::Change;
use super::SourceState;
use crate::config::MqttSettings;
use crate::entry::HEAD_BYTES;
use crate::entry::{Delivery, Entry, Message, Payload};
use crate::journal::{Closed, JournalSender, Ticket};
use crate::redelivery;

/// The first wait after a lost connection, before jitter.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// The longest wait.
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// A drained client that hears nothing for so long has nothing more to get.
const DRAINED_AFTER: Duration = Duration::from_secs(2);
/// A drained client unsubscribes after so long also when messages still come: its topics are busy.
const DRAIN_MAX: Duration = Duration::from_secs(60);

/// What a connection is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Subscribe, and take messages until the token ends it.
    Collect,
    /// The client id is no longer configured: take what the broker still holds for it, unsubscribe, end the session.
    Drain,
}

/// One connection to a broker.
#[derive(Debug)]
pub struct Connection {
    pub settings: MqttSettings,
    /// Fixed for ever: the broker keeps a session for it.
    pub client: String,
    pub journal: JournalSender,
    /// What the journal has of this client.
    pub known: redelivery::Client,
    pub state: Arc<SourceState>,
    pub task: Task,
}

/// What waits for the journal, in the order of arrival.
#[derive(Debug)]
struct Pending {
    ticket: Ticket,
    publish: Publish,
}

/// The state of one run.
struct Run {
    connection: Connection,
    client: Client,
    /// Of the present connection only: a PUBACK of an old one could name another message.
    pending: VecDeque<Pending>,
    /// Subscribe when this is durable.
    subscribe_after: Option<Ticket>,
    /// What the broker has and the configuration has not, and how many of it are not yet acknowledged as unsubscribed.
    gone: Vec<String>,
    gone_waits: usize,
    connected: bool,
    /// Of a client that is drained: since when it is connected, when it last heard something, and whether it has
    /// unsubscribed, so that nothing new comes.
    connected_at: Instant,
    heard_at: Instant,
    unsubscribed: bool,
    failures: u32,
}

/// How a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    More,
    /// A client that is drained has heard nothing for long enough.
    Quiet,
}

impl Connection {
    /// Runs until the token is cancelled, the client is drained, or the journal has ended.
    ///
    /// # Errors
    /// When the certificates cannot be used.
    pub async fn run(self, token: CancellationToken) -> Result<(), TlsError> {
        let (client, mut events) = client::new(&self.settings, &self.client)?;
        let mut durable = self.journal.durable();
        let drain = self.task == Task::Drain;
        let now = Instant::now();
        let mut run = Run {
            connection: self,
            client,
            pending: VecDeque::new(),
            subscribe_after: None,
            gone: Vec::new(),
            gone_waits: 0,
            connected: false,
            connected_at: now,
            heard_at: now,
            unsubscribed: false,
            failures: 0,
        };
        while !token.is_cancelled() {
            match run.turn(&mut events, &mut durable, &token).await {
                Ok(Turn::More) => {}
                Ok(Turn::Quiet) if !run.unsubscribed => run.unsubscribe(),
                Ok(Turn::Quiet) => {
                    run.forget(&mut events).await;
                    break;
                }
                Err(Closed) => break,
            }
        }
        if !drain {
            run.client.disconnect();
            // One more turn writes it; a broker that does not listen any more is no matter.
            let _ = tokio::time::timeout(Duration::from_millis(200), events.next()).await;
        }
        run.show(false);
        Ok(())
    }
}

impl Run {
    /// One event of the broker; meanwhile acknowledgements go out as the journal becomes durable.
    async fn turn(
        &mut self,
        events: &mut EventLoop,
        durable: &mut watch::Receiver<Ticket>,
        token: &CancellationToken,
    ) -> Result<Turn, Closed> {
        let drains = self.connection.task == Task::Drain;
        let state = Arc::clone(&self.connection.state);
        let event = {
            // It is kept over acknowledgements: dropping it would end a connection that is just being made.
            let mut next = pin!(events.next());
            loop {
                tokio::select! {
                    // Most events are there already: the others are not even asked then, and what they would do is done
                    // after each event (`acknowledge`, `tell`, the caller's look at the token).
                    biased;
                    event = &mut next => break event,
                    changed = durable.changed() => {
                        changed.map_err(|_| Closed)?;
                        self.acknowledge(*durable.borrow_and_update());
                    }
                    // Only while it waits for the broker: a message that was taken is never given up.
                    () = tokio::time::sleep_until(self.quiet_at().into()), if drains && self.connected => {
                        self.heard_at = Instant::now();
                        if self.pending.is_empty() || !self.unsubscribed {
                            return Ok(Turn::Quiet);
                        }
                    }
                    () = state.commanded.notified(), if self.connected && !drains => self.tell(),
                    () = token.cancelled() => return Ok(Turn::More),
                }
            }
        };
        match event {
            Event::Connected { session_present } => self.connected(session_present).await?,
            Event::Message(publish) => self.message(publish, token).await?,
            Event::Subscribed => {
                self.failures = 0;
                self.show(true);
            }
            Event::Unsubscribed => self.filter_gone(token).await?,
            Event::Refused(reason) => {
                tracing::error!(client = %self.connection.client, reason, "the broker refused a subscription");
                self.connection.state.error(format!("subscription refused: {reason}"));
            }
            Event::Acknowledged { .. } | Event::Other => {}
            Event::Lost(reason) => {
                self.lost(reason);
                let wait = (BACKOFF_MIN * 2_u32.pow(self.failures.min(16))).min(BACKOFF_MAX);
                self.failures += 1;
                let wait = wait.mul_f64(rand::rng().random_range(0.5..=1.0));
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = token.cancelled() => {}
                }
            }
        }
        self.acknowledge(*durable.borrow());
        if self.connected && !drains {
            self.tell();
        }
        Ok(Turn::More)
    }

    /// Publishes what the pipeline asks for. What finds no room is asked for again.
    fn tell(&self) {
        let state = &self.connection.state;
        for command in state.take_commands() {
            let sent = self.client.tell(&command.topic, command.payload);
            state.commands_sent.fetch_add(u64::from(sent), Ordering::Relaxed);
            tracing::info!(source = %self.connection.settings.name, topic = command.topic, sent, "asked for a birth");
        }
    }

    /// When a client that is drained has waited long enough for something more.
    fn quiet_at(&self) -> Instant {
        let quiet = self.heard_at + DRAINED_AFTER;
        if self.unsubscribed { quiet } else { quiet.min(self.connected_at + DRAIN_MAX) }
    }

    async fn connected(&mut self, session_present: bool) -> Result<(), Closed> {
        self.pending.clear();
        (self.connected_at, self.heard_at) = (Instant::now(), Instant::now());
        let Connection { settings, client, known, journal, state, task } = &mut self.connection;
        state.connects.fetch_add(1, Ordering::Relaxed);
        *state.last_error.lock() = None;
        tracing::info!(%client, session_present, "connected to the broker");
        let resumed = session_present && known.session > 0;
        let mut after = 0;
        if !resumed {
            known.session += 1;
            known.list.clear();
            known.filters.clear();
            let entry = Entry::Session { client: client.clone(), session: known.session, resumed };
            // Before the first message of the new session, or an old entry might be taken for it after a crash.
            after = journal.append(&entry).await?;
        }
        if *task == Task::Drain {
            self.subscribe_after = Some(after);
            self.show(true);
            return Ok(());
        }
        let Change { record, gone } = Change::new(&known.filters, &settings.filters());
        if let Some(filters) = record {
            known.filters.clone_from(&filters);
            after = journal.append(&Entry::Subscribed { client: client.clone(), filters }).await?;
        }
        (self.gone, self.gone_waits) = (gone, 0);
        self.subscribe_after = Some(after);
        Ok(())
    }

    /// The broker has acknowledged one more of what is no longer configured; after the last the journal says so.
    async fn filter_gone(&mut self, token: &CancellationToken) -> Result<(), Closed> {
        self.gone_waits = self.gone_waits.saturating_sub(1);
        if self.gone_waits > 0 || self.gone.is_empty() {
            return Ok(());
        }
        let Connection { settings, client, known, journal, .. } = &mut self.connection;
        let entry = Entry::Subscribed { client: client.clone(), filters: settings.filters() };
        tokio::select! {
            ticket = journal.append(&entry) => ticket?,
            // The next start unsubscribes again.
            () = token.cancelled() => return Ok(()),
        };
        known.filters = settings.filters();
        tracing::info!(%client, filters = ?std::mem::take(&mut self.gone), "unsubscribed: no longer configured");
        Ok(())
    }

    /// A source is connected when it is subscribed: before that the broker keeps nothing for it. A client that is drained
    /// is not the source's connection.
    fn show(&mut self, connected: bool) {
        self.connected = connected;
        if self.connection.task == Task::Collect {
            self.connection.state.connected.store(connected, Ordering::Relaxed);
        }
    }

    fn lost(&mut self, reason: String) {
        if self.connected || self.failures == 0 {
            tracing::warn!(client = %self.connection.client, reason, "no connection to the broker");
        }
        self.connection.state.error(reason);
        self.show(false);
        self.pending.clear();
        self.subscribe_after = None;
    }

    async fn message(&mut self, mut publish: Publish, token: &CancellationToken) -> Result<(), Closed> {
        let Connection { settings, client, known, journal, state, task } = &mut self.connection;
        let arrival_us = journal.now_us();
        if *task == Task::Drain {
            self.heard_at = Instant::now();
        }
        state.last_arrival_us.store(arrival_us, Ordering::Relaxed);
        let id = publish.packet_id();
        let (mut delivery, mut crc) = (None, 0);
        if id != 0 {
            crc = publish.crc();
            if let Some(ticket) = known.list.recognise(id, publish.dup(), crc) {
                state.redelivered.fetch_add(1, Ordering::Relaxed);
                state.received.fetch_add(1, Ordering::Relaxed);
                publish.forget_content();
                self.pending.push_back(Pending { ticket, publish });
                return Ok(());
            }
            let (client, session) = (client.clone(), known.session);
            delivery = Some(Delivery { client, session, packet_id: id, dup: publish.dup(), crc });
        }
        let payload = publish.payload();
        let payload = if payload.len() as u64 > settings.max_payload.0 {
            let head = payload.slice(..HEAD_BYTES.min(payload.len()));
            Payload::Oversized { head, len: payload.len() as u64, crc: crc32c::crc32c(payload) }
        } else {
            Payload::Whole(payload.clone())
        };
        let entry = Entry::Message(Message {
            source: settings.name.clone(),
            topic: publish.topic(),
            payload,
            arrival_us,
            delivery,
        });
        let ticket = tokio::select! {
            ticket = journal.append(&entry) => ticket?,
            // Not acknowledged: the broker sends it again.
            () = token.cancelled() => return Ok(()),
        };
        state.received.fetch_add(1, Ordering::Relaxed);
        if id != 0 {
            known.list.add(id, publish.dup(), crc, ticket);
            publish.forget_content();
            self.pending.push_back(Pending { ticket, publish });
        }
        Ok(())
    }

    /// Sends what is due: all whose journal record is durable, in the order of arrival.
    fn acknowledge(&mut self, durable: Ticket) {
        if self.subscribe_after.is_some_and(|after| after <= durable) {
            self.subscribe_after = None;
            if self.connection.task == Task::Collect {
                self.client.subscribe(&self.connection.settings.filters());
                self.gone_waits = self.gone.len();
                if !self.client.unsubscribe(&self.gone) {
                    // The next connection tries it again.
                    self.gone.clear();
                }
            }
        }
        while let Some(front) = self.pending.front() {
            // A full request channel empties with the next turn.
            if front.ticket > durable || !self.client.acknowledge(&front.publish) {
                break;
            }
            self.pending.pop_front();
        }
    }

    fn unsubscribe(&mut self) {
        let Connection { settings, known, .. } = &self.connection;
        let own = known.filters.iter().cloned();
        let others = settings.filters().into_iter().filter(|filter| !known.filters.contains(filter));
        // When they do not go out, the session's end does the same.
        self.client.unsubscribe(&own.chain(others).collect::<Vec<_>>());
        self.unsubscribed = true;
    }

    /// Ends the session at the broker, and then in the journal.
    async fn forget(&mut self, events: &mut EventLoop) {
        self.client.disconnect();
        while !matches!(tokio::time::timeout(DRAINED_AFTER, events.next()).await, Ok(Event::Lost(_)) | Err(_)) {}
        if let Err(error) = client::end_session(&self.connection.settings, &self.connection.client).await {
            tracing::warn!(client = %self.connection.client, error, "the session was not ended; the next start tries again");
            return;
        }
        let entry = Entry::Forgotten { client: self.connection.client.clone() };
        if self.connection.journal.append(&entry).await.is_ok() {
            tracing::info!(client = %self.connection.client, "drained and forgotten");
        }
    }
}
