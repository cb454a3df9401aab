//! The one task that owns the links: wakes when something is told, a hop has ended, or a link is changed. It takes what was told in
//! order, writes which hops that means, and only then does them. It stops with the token.
//!
//! Events for topics and webhooks go into the sequence of alerts in their order, and are done when they are durable there. A
//! command is carried by a task of its own until it is answered or its time is over; so many at a time that are not are
//! [`OPEN_MAX`], and then what follows waits in the sequence. What is older than [`LATE_US`] when a node comes back is passed
//! over, and counted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use wire::rate::Allowance;
use wire::{Command, StreamSchema};

use super::board::{Board, LinkStatus};
use super::link::{Heard, Hop, HopTo, Link, Refused};
use super::log::{self, Outcome, Row, Since};
use super::{Carried, Courier};
use crate::alerts::{Alerts, wait_for_hub};
use crate::clock::now_us;
use crate::engine::Engine;
use crate::publish::target::pause;
use crate::publish::{Hub, Told};
use crate::sink::{Sink, SinkError};

/// Events that are taken at a time.
const PAGE: usize = 64;
/// Hops that have begun and not ended.
const OPEN_MAX: usize = 4_096;
/// What was decided longer ago is nothing to act on, µs.
const LATE_US: i64 = 3_600_000_000;
const WAIT_MIN: Duration = Duration::from_millis(50);
const WAIT_MAX: Duration = Duration::from_secs(5);

/// What is asked of the task.
#[derive(Debug)]
pub(super) enum Change {
    Put { link: Box<Link>, reply: oneshot::Sender<()> },
    Delete { name: String, reply: oneshot::Sender<()> },
}

/// A link that runs.
#[derive(Debug)]
struct Running {
    link: Link,
    /// The sequence behind which it listens.
    since: i64,
    allowance: Allowance,
}

/// A hop at its end.
type End = (Arc<Hop>, Outcome, String);

/// See the module.
#[derive(Debug)]
pub(super) struct Runner {
    engine: Arc<Engine>,
    sink: Arc<dyn Sink>,
    alerts: Arc<Alerts>,
    courier: Arc<dyn Courier>,
    board: Arc<Board>,
    links: BTreeMap<String, Running>,
    changes: mpsc::Receiver<Change>,
    /// The sequence up to which all was looked at.
    position: i64,
    /// Hops of what is behind the position, of the run before.
    known: BTreeSet<String>,
    ended: (mpsc::Sender<End>, mpsc::Receiver<End>),
    open: usize,
    schema: Arc<StreamSchema>,
    token: CancellationToken,
}

impl Runner {
    pub(super) fn new(
        engine: Arc<Engine>,
        sink: Arc<dyn Sink>,
        alerts: Arc<Alerts>,
        courier: Arc<dyn Courier>,
        links: Vec<(Result<Link, Box<Refused>>, bool)>,
        changes: mpsc::Receiver<Change>,
    ) -> Self {
        let board = Arc::clone(engine.links());
        let mut running = BTreeMap::new();
        for (link, configured) in links {
            match link {
                Ok(link) => {
                    board.put(status_of(&link, configured));
                    running.insert(link.name().to_owned(), runs(link, i64::MAX));
                }
                Err(refused) => {
                    let Refused { settings, reason } = *refused;
                    tracing::warn!(link = settings.name, reason, "a link does not run");
                    let (state, reason) = ("refused", Some(reason));
                    let (name, from, when) = (settings.name, settings.from, settings.when);
                    board.put(LinkStatus { name, state, reason, from, when, configured, ..LinkStatus::default() });
                }
            }
        }
        Self {
            engine,
            sink,
            alerts,
            courier,
            board,
            links: running,
            changes,
            position: 0,
            known: BTreeSet::new(),
            ended: mpsc::channel(OPEN_MAX),
            open: 0,
            schema: log::schema(),
            token: CancellationToken::new(),
        }
    }

    fn hub(&self) -> &Arc<Hub> {
        self.alerts.hub()
    }

    /// Until the token ends it.
    pub(super) async fn run(mut self, token: CancellationToken) {
        self.token = token;
        // None: the node stops.
        let _ = self.work().await;
    }

    async fn work(&mut self) -> Option<()> {
        self.begin().await?;
        let token = self.token.clone();
        let mut changed = self.hub().changed();
        loop {
            self.end().await?;
            changed.mark_unchanged();
            let has_room = self.open < OPEN_MAX;
            if has_room && !self.links.is_empty() && self.take().await? {
                continue;
            }
            tokio::select! {
                () = token.cancelled() => break,
                Some(change) = self.changes.recv() => self.change(change).await?,
                Some(end) = self.ended.1.recv() => self.note(vec![end]).await?,
                told = changed.changed(), if has_room => told.ok()?,
            }
        }
        // A file that is changed while the node is away is not about what was looked at already.
        self.mark().await
    }

    /// Finds where the run before stopped, and does what that has begun.
    async fn begin(&mut self) -> Option<()> {
        let token = self.token.clone();
        let newest = wait_for_hub(self.alerts.hub(), &token).await?;
        let found = loop {
            match log::recover(&self.engine).await {
                Ok(found) => break found,
                Err(error) => {
                    tracing::error!(%error, "the record of links cannot be read: no link runs until it can");
                    pause(WAIT_MAX, &token).await?;
                }
            }
        };
        // With a record of alerts that begins anew all is new.
        self.position = found.position.filter(|position| *position <= newest).unwrap_or(newest);
        for (name, running) in &mut self.links {
            running.since = found.since.links.get(name).copied().unwrap_or(newest).min(newest);
        }
        self.known = found.known;
        if self.since() != found.since {
            self.mark().await?;
        }
        let open: Vec<Arc<Hop>> = found.open.into_iter().map(Arc::new).collect();
        if !open.is_empty() {
            tracing::info!(hops = open.len(), "links go on with what the run before has begun");
        }
        open.iter().for_each(|hop| self.board.begun(&hop.link));
        self.act(open, true).await
    }

    fn since(&self) -> Since {
        Since { links: self.links.iter().map(|(name, running)| (name.clone(), running.since)).collect() }
    }

    /// Writes which links there are, when there is, or was, one.
    async fn mark(&mut self) -> Option<()> {
        let known = self.engine.tables().cold(&log::stream()).is_some();
        if self.links.is_empty() && !known {
            return Some(());
        }
        self.write(&[Row::Mark { since: self.since(), at: now_us() }]).await
    }

    async fn change(&mut self, change: Change) -> Option<()> {
        let newest = self.hub().newest();
        let reply = match change {
            Change::Put { link, reply } => {
                if self.links.is_empty() {
                    self.position = newest;
                }
                self.board.put(status_of(&link, false));
                self.links.insert(link.name().to_owned(), runs(*link, newest));
                reply
            }
            Change::Delete { name, reply } => {
                self.links.remove(&name);
                self.board.remove(&name);
                reply
            }
        };
        self.mark().await?;
        // Who asked may be gone.
        let _ = reply.send(());
        Some(())
    }

    /// Takes what was told next; whether there was something.
    async fn take(&mut self) -> Option<bool> {
        let newest = self.hub().newest();
        let page = match self.hub().after(self.position, PAGE).await {
            Ok(page) => page,
            Err(error) => {
                tracing::warn!(%error, "links cannot catch up yet");
                pause(Duration::from_secs(1), &self.token).await?;
                return Some(true);
            }
        };
        let Some(last) = page.last().map(|told| told.sequence) else {
            // What nobody is told has its places, too.
            self.position = self.position.max(newest);
            self.board.behind(0);
            return Some(false);
        };
        let (mut rows, mut begun) = (Vec::new(), Vec::new());
        for told in &page {
            self.look(told, &mut rows, &mut begun);
        }
        self.position = last;
        self.board.behind(newest - last);
        if !rows.is_empty() {
            self.write(&rows).await?;
        }
        for row in &rows {
            if let Row::Hop { hop, outcome, answer, at } = row {
                match outcome {
                    Outcome::Begun => self.board.begun(&hop.link),
                    _ => self.board.ended(&hop.link, false, *outcome, answer, *at),
                }
            }
        }
        self.act(begun, false).await?;
        Some(true)
    }

    /// What one event means: rows, and of these the hops that are to be done.
    fn look(&mut self, told: &Told, rows: &mut Vec<Row>, begun: &mut Vec<Arc<Hop>>) {
        let hears =
            |running: &Running| told.only.is_none() && running.since < told.sequence && running.link.hears(&told.topic);
        if !self.links.values().any(hears) {
            return;
        }
        let now = now_us();
        if now.saturating_sub(told.at) > LATE_US {
            return self.board.missed(1);
        }
        let heard = Heard::new(told);
        for running in self.links.values_mut().filter(|running| hears(running)) {
            let hop = match running.link.hop(&heard) {
                Ok(None) => continue,
                Ok(Some(hop)) => Arc::new(hop),
                Err(error) => {
                    self.board.failed(running.link.name(), &error);
                    continue;
                }
            };
            if self.known.contains(&hop.id) {
                continue;
            }
            let (outcome, answer) = if hop.is_too_far() {
                (Outcome::Refused, "the alert has come through too many links")
            } else if !running.allowance.take(Instant::now()) {
                (Outcome::RateLimited, "")
            } else {
                begun.push(Arc::clone(&hop));
                (Outcome::Begun, "")
            };
            rows.push(Row::Hop { hop, outcome, answer: answer.to_owned(), at: now });
        }
    }

    /// Does hops that are in the record. Of those of the run before, `again`, some may have been told already.
    async fn act(&mut self, hops: Vec<Arc<Hop>>, again: bool) -> Option<()> {
        self.open += hops.len();
        let (told, carried): (Vec<_>, Vec<_>) = hops.into_iter().partition(|hop| hop.event().is_some());
        for hop in carried {
            let (courier, ended) = (Arc::clone(&self.courier), self.ended.0.clone());
            tokio::spawn(async move {
                let (outcome, answer) = carry(courier.as_ref(), &hop).await;
                // The task has ended when nobody takes it, and the next start does it again.
                let _ = ended.send((hop, outcome, answer)).await;
            });
        }
        if told.is_empty() {
            return Some(());
        }
        // In their order: each takes its place in the queue when it is first looked at.
        let ends = join_all(told.into_iter().map(|hop| self.tell(hop, again))).await;
        let ends: Option<Vec<End>> = ends.into_iter().collect();
        self.note(ends?).await
    }

    /// Gives an event its place in the sequence, once. None when the node stops.
    async fn tell(&self, hop: Arc<Hop>, again: bool) -> Option<End> {
        let mut unknown = again;
        while unknown {
            match crate::alerts::log::sequence_of_event(&self.engine, &hop.id).await {
                Ok(None) => unknown = false,
                Ok(Some(sequence)) => return Some((hop, Outcome::Told, sequence.to_string())),
                Err(error) => {
                    tracing::warn!(%error, "what a link has told is not known yet");
                    pause(WAIT_MAX, &self.token).await?;
                }
            }
        }
        let told = self.alerts.event(hop.event()?);
        let sequence = tokio::select! {
            () = self.token.cancelled() => return None,
            told = told => told.ok()?,
        };
        Some((hop, Outcome::Told, sequence.to_string()))
    }

    /// Hops that have ended meanwhile.
    async fn end(&mut self) -> Option<()> {
        let mut ends = Vec::new();
        while let Ok(end) = self.ended.1.try_recv() {
            ends.push(end);
        }
        self.note(ends).await
    }

    async fn note(&mut self, ends: Vec<End>) -> Option<()> {
        if ends.is_empty() {
            return Some(());
        }
        self.open -= ends.len();
        let at = now_us();
        let row = |(hop, outcome, answer): End| Row::Hop { hop, outcome, answer, at };
        let rows: Vec<Row> = ends.into_iter().map(row).collect();
        self.write(&rows).await?;
        for row in &rows {
            if let Row::Hop { hop, outcome, answer, .. } = row {
                self.board.ended(&hop.link, true, *outcome, answer, at);
            }
        }
        Some(())
    }

    /// None when the node stops first.
    async fn write(&self, rows: &[Row]) -> Option<()> {
        for rows in log::batches(rows, self.position, &self.schema) {
            let mut wait = WAIT_MIN;
            while let Err(error) = self.sink.append(&log::stream(), &self.schema, rows.clone()).await {
                if matches!(error, SinkError::Refused { .. }) {
                    // It would be refused for ever.
                    tracing::error!(%error, "what links do is not in their record");
                    break;
                }
                tracing::warn!(%error, "the record of links waits");
                pause(wait, &self.token).await?;
                wait = (2 * wait).min(WAIT_MAX);
            }
        }
        Some(())
    }
}

fn runs(link: Link, since: i64) -> Running {
    let allowance = link.allowance(Instant::now());
    Running { link, since, allowance }
}

fn status_of(link: &Link, configured: bool) -> LinkStatus {
    let (to_kind, to) = link.leads_to();
    let settings = &link.settings;
    LinkStatus {
        name: settings.name.clone(),
        state: "runs",
        from: settings.from.clone(),
        when: settings.when.clone(),
        to_kind,
        to,
        configured,
        ..LinkStatus::default()
    }
}

/// Brings a command to its edge, within what is left of its time.
async fn carry(courier: &dyn Courier, hop: &Hop) -> (Outcome, String) {
    let HopTo::Edge { edge, command, device, until } = &hop.to else {
        return (Outcome::Refused, "it is no command".to_owned());
    };
    let left = u64::try_from(until.saturating_sub(now_us())).unwrap_or(0);
    if left == 0 {
        return (Outcome::TimedOut, "its time was over before it could be sent".to_owned());
    }
    let (id, name, device, payload) = (hop.id.clone(), command.clone(), device.clone(), hop.payload.clone());
    let command = Command { id, name, device, payload };
    match courier.carry(edge, command, Duration::from_micros(left)).await {
        Carried::Answered(reply) if reply.ok => (Outcome::Answered, reply.answer),
        Carried::Answered(reply) => (Outcome::Refused, reply.answer),
        Carried::Refused(reason) => (Outcome::Refused, reason),
        Carried::TimedOut { fetched: true } => {
            (Outcome::TimedOut, "the edge has fetched it and not answered".to_owned())
        }
        Carried::TimedOut { fetched: false } => (Outcome::TimedOut, "the edge has not fetched it".to_owned()),
    }
}
