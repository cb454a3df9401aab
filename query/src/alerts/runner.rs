//! The one task that owns the alerts: wakes when a table moves on, a statement answers, a person says something, or a second has
//! passed; decides, writes what it decided, and only then goes on. It stops with the token, having written how far it has read.
//!
//! Streams are followed from a recorded position ([`crate::follow`]): each row is looked at once. A stream that no rule was on
//! before begins with what comes next. The stream `alerts`, which edges send, is always followed.

mod follow;
mod late;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_schema::SchemaRef;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use wire::{StreamName, StreamSchema};

use self::follow::same_columns;
use self::late::Again;
use super::claims;
use super::episode::Episode;
use super::episodes::{Episodes, RuleKey, Unknown};
use super::late::Done;
use super::log::{self, Read};
use super::metrics::Counts;
use super::order::Newest;
use super::rule::{Kind, Rule, RuleError};
use super::shown::{self, Opened, Page};
use super::silence::Silence;
use super::statement::{self, Answer};
use super::store::Loaded;
use super::{RuleStatus, Word};
use crate::clock::now_us;
use crate::engine::Engine;
use crate::links::event::LinkEvent;
use crate::publish::Hub;
use crate::sink::{Sink, SinkError};

const TICK: Duration = Duration::from_secs(1);
/// Where a stream was read to is written so often when nothing is decided.
const MARK_EVERY: Duration = Duration::from_secs(60);
/// Statements of rules that are asked at a time.
const ASKED_MAX: usize = 2;
/// So often it is looked which edges are silent.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// A rule that could not be understood for now is tried again.
const AGAIN: Duration = Duration::from_secs(10);
/// The machine's clock was set when it is so far from where it should be, µs.
const CLOCK_US: i64 = 2_000_000;
const WAIT_MIN: Duration = Duration::from_millis(50);
const WAIT_MAX: Duration = Duration::from_secs(5);

/// What is asked of the task.
#[derive(Debug)]
pub(crate) enum Command {
    Put {
        rule: Box<Rule>,
        reply: oneshot::Sender<()>,
    },
    Delete {
        name: String,
        reply: oneshot::Sender<()>,
    },
    Open {
        page: Page,
        reply: oneshot::Sender<Opened>,
    },
    /// What fires, for who tells it again.
    Firing {
        reply: oneshot::Sender<Vec<Episode>>,
    },
    Silences {
        reply: oneshot::Sender<serde_json::Value>,
    },
    Say {
        id: String,
        word: Word,
        by: String,
        note: String,
        reply: oneshot::Sender<Result<(), Unknown>>,
    },
    Silence {
        silence: Silence,
        reply: oneshot::Sender<Result<(), Unknown>>,
    },
    Unsilence {
        id: String,
        by: String,
        reply: oneshot::Sender<Result<(), Unknown>>,
    },
    /// A link tells something; answered with its sequence.
    Event {
        event: Box<LinkEvent>,
        reply: oneshot::Sender<i64>,
    },
}

/// A rule in the task.
#[derive(Debug)]
struct Kept {
    rule: Result<Arc<Rule>, RuleError>,
    loaded: Loaded,
    /// When its statement is due, and whether it is asked now.
    due: Instant,
    /// Not before then it is understood again.
    retry: Option<Instant>,
    asked: bool,
    failed: u64,
}

/// A stream that is followed.
#[derive(Debug, Default)]
struct Followed {
    newest: Newest,
    /// Its columns when all of its rules were last seen to be about these.
    columns: Option<SchemaRef>,
}

/// How far it looks back, µs, and how much it remembers, as [`super::AlertSettings`] has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) horizon: i64,
    pub(crate) late_max: i64,
    /// Rows of one stretch.
    pub(crate) late_rows_max: u64,
    pub(crate) stale_after: i64,
    pub(crate) devices_max: usize,
}

/// Answers to people, given when what they asked for is written.
#[derive(Debug)]
enum Reply {
    Said(oneshot::Sender<Result<(), Unknown>>),
    Done(oneshot::Sender<()>),
    Event(oneshot::Sender<i64>, i64),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Runner {
    engine: Arc<Engine>,
    sink: Arc<dyn Sink>,
    hub: Arc<Hub>,
    limits: Limits,
    /// When it was last looked which edges are silent.
    looked: Instant,
    loaded: Vec<Loaded>,
    statuses: Arc<Mutex<BTreeMap<String, RuleStatus>>>,
    counts: Arc<Counts>,
    commands: mpsc::Receiver<Command>,
    rules: BTreeMap<String, Kept>,
    followed: BTreeMap<StreamName, Followed>,
    read: Read,
    again: Again,
    schema: Arc<StreamSchema>,
    replies: Vec<Reply>,
    marked: Instant,
    /// Positions moved since they were written.
    moved: bool,
    /// The machine's time when it was last looked at, and since when it was listened by that clock.
    now: i64,
    at: Instant,
    listening: i64,
    streams: usize,
}

impl Runner {
    pub(crate) fn new(
        (engine, sink, hub): (Arc<Engine>, Arc<dyn Sink>, Arc<Hub>),
        limits: Limits,
        loaded: Vec<Loaded>,
        (statuses, counts): (Arc<Mutex<BTreeMap<String, RuleStatus>>>, Arc<Counts>),
        commands: mpsc::Receiver<Command>,
    ) -> Self {
        let now = now_us();
        Self {
            engine,
            sink,
            hub,
            limits,
            looked: Instant::now(),
            loaded,
            statuses,
            counts,
            commands,
            rules: BTreeMap::new(),
            followed: BTreeMap::new(),
            read: Read::default(),
            again: Again::default(),
            schema: log::schema(),
            replies: Vec::new(),
            marked: Instant::now(),
            moved: false,
            now,
            at: Instant::now(),
            listening: now,
            streams: 0,
        }
    }

    /// Until the token ends it.
    pub(crate) async fn run(mut self, token: CancellationToken) {
        let Some(mut episodes) = self.recover(&token).await else { return };
        for loaded in std::mem::take(&mut self.loaded) {
            let rule = Rule::compile(&self.engine, loaded.settings.clone()).await.map(Arc::new);
            if let Err(error) = &rule {
                tracing::warn!(rule = loaded.settings.name, reason = %error, "a rule does not run");
            }
            self.keep(loaded, rule);
        }
        self.govern(&mut episodes);
        self.clock(&mut episodes);
        self.hub.open(episodes.sequence(), episodes.open());
        let mut changed = self.engine.tables().changed();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (answered, mut answers) = mpsc::channel(ASKED_MAX);
        let (judged, mut judgements) = mpsc::channel::<Done>(1);
        self.follow(&mut episodes).await;
        loop {
            if self.write(&mut episodes, &token).await.is_none() {
                return;
            }
            tokio::select! {
                () = token.cancelled() => break,
                Some(command) = self.commands.recv() => {
                    self.command(command, &mut episodes);
                    // A rule that somebody was told of begins with the very next row.
                    self.follow(&mut episodes).await;
                }
                Some(answer) = answers.recv() => self.answered(&answer, &mut episodes),
                Some(done) = judgements.recv() => self.judged(done, &mut episodes).await,
                told = changed.changed() => {
                    if told.is_err() {
                        break;
                    }
                    self.follow(&mut episodes).await;
                }
                _ = tick.tick() => {
                    let now = self.clock(&mut episodes);
                    episodes.tick(now);
                    self.look_for_silent_edges(&mut episodes, now);
                    self.counts.set(&episodes);
                    self.wait_no_longer(&mut episodes).await;
                    self.ask(&answered);
                    self.judge_again(&episodes, &judged);
                    if self.moved && self.marked.elapsed() >= MARK_EVERY {
                        episodes.mark(now);
                    }
                }
            }
        }
        if self.moved {
            episodes.mark(now_us());
            self.write_once(&mut episodes).await;
        }
    }

    /// The machine's time. When its clock was set, or the machine slept, what is measured by it is moved along, and it is
    /// listened anew.
    fn clock(&mut self, episodes: &mut Episodes) -> i64 {
        let passed = i64::try_from(self.at.elapsed().as_micros()).unwrap_or(i64::MAX);
        let (machine, expected) = (now_us(), self.now.saturating_add(passed));
        (self.now, self.at) = (machine, Instant::now());
        let set_by = machine.saturating_sub(expected);
        if set_by.saturating_abs() > CLOCK_US {
            tracing::warn!(set_by_s = set_by / 1_000_000, "the clock was set");
            episodes.clock_was_set(set_by);
            self.listening = machine;
        }
        machine
    }

    /// Alerts of edges that were not heard for long are marked. Before the node has listened for as long, it does not know.
    fn look_for_silent_edges(&mut self, episodes: &mut Episodes, now: i64) {
        let since = now.saturating_sub(self.limits.stale_after);
        if self.looked.elapsed() < LOOK_EVERY.min(Duration::from_micros(self.limits.stale_after.unsigned_abs()))
            || self.listening > since
        {
            return;
        }
        self.looked = Instant::now();
        let edges = episodes.edges();
        if edges.is_empty() {
            return;
        }
        let mut heard: HashMap<String, i64> = HashMap::new();
        for facts in self.engine.tables().spools() {
            if edges.contains(facts.edge.as_str()) {
                let last = heard.entry(facts.edge.as_str().to_owned()).or_insert(facts.received_at_us);
                *last = facts.received_at_us.max(*last);
            }
        }
        episodes.mark_stale(&heard, since, now);
    }

    async fn recover(&mut self, token: &CancellationToken) -> Option<Episodes> {
        loop {
            let now = now_us();
            match log::recover(&self.engine, now).await {
                Ok(found) => {
                    let (episodes, read) = found.into_episodes(self.limits.horizon, now);
                    self.read = read;
                    return Some(episodes);
                }
                Err(error) => {
                    tracing::error!(%error, "the record of alerts cannot be read: no rule runs until it can");
                    tokio::select! {
                        () = token.cancelled() => return None,
                        () = tokio::time::sleep(WAIT_MAX) => {}
                    }
                }
            }
        }
    }

    fn keep(&mut self, loaded: Loaded, rule: Result<Arc<Rule>, RuleError>) {
        let name = loaded.settings.name.clone();
        let configured = loaded.configured;
        let status = shown::status_of(&name, rule.as_deref(), configured);
        let hash = loaded.settings.hash();
        self.statuses.lock().insert(name.clone(), RuleStatus { hash, ..status });
        // Whether its columns are still those of its stream is seen when that is followed.
        if let Ok(Kind::Rows(rows)) = rule.as_ref().map(|rule| &rule.kind)
            && let Some(followed) = self.followed.get_mut(&rows.stream)
        {
            followed.columns = None;
        }
        let retry = rule.is_err().then(|| Instant::now() + AGAIN);
        self.rules.insert(name, Kept { rule, loaded, due: Instant::now(), retry, asked: false, failed: 0 });
    }

    /// The rules have changed.
    fn govern(&mut self, episodes: &mut Episodes) {
        let runs = |kept: &Kept| kept.rule.as_ref().ok().map(|rule| Arc::clone(&rule.policy));
        let policies = self.rules.iter().filter_map(|(name, kept)| Some((name.clone(), runs(kept)?)));
        // A rule that cannot run now has not gone.
        let waiting: BTreeSet<RuleKey> = self
            .rules
            .iter()
            .filter(|(_, kept)| kept.rule.is_err())
            .map(|(name, kept)| (name.clone(), kept.loaded.settings.hash()))
            .collect();
        let keep =
            episodes.policies().filter(|(name, policy)| waiting.contains(&((*name).clone(), policy.hash.clone())));
        let keep: Vec<_> = keep.map(|(name, policy)| (name.clone(), Arc::clone(policy))).collect();
        let policies = keep.into_iter().chain(policies).collect();
        episodes.wait_for(waiting);
        episodes.govern(policies, self.now);
        // What nobody follows any more is not read again from where it was left; a rule that cannot run yet goes on.
        let mut followed: HashSet<StreamName> = HashSet::from([claims::stream()]);
        let mut any = false;
        for kept in self.rules.values() {
            match (&kept.rule, &kept.loaded.settings.on) {
                (Ok(rule), _) => {
                    if let Kind::Rows(rows) = &rule.kind {
                        followed.insert(rows.stream.clone());
                    }
                }
                (Err(_), Some(on)) => {
                    followed.insert(on.clone());
                }
                (Err(RuleError::Busy(_) | RuleError::Waits(_)), None) => any = true,
                (Err(_), _) => {}
            }
        }
        if !any {
            self.read.positions.retain(|stream, _| followed.contains(stream));
            self.followed.retain(|stream, _| followed.contains(stream));
            self.read.newest.retain(|stream, _| followed.contains(stream));
            self.read.late.retain(|stream, _| followed.contains(stream));
        }
        self.streams = self.engine.tables().streams().len();
    }

    /// Rules whose stream has come, or has other columns now.
    async fn wait_no_longer(&mut self, episodes: &mut Episodes) {
        let streams = self.engine.tables().streams().len();
        let changed = |rule: &Rule| match &rule.kind {
            Kind::Rows(rows) => {
                let cold = self.engine.tables().cold(&rows.stream);
                cold.is_some_and(|cold| !same_columns(&cold.schema, &rows.input))
            }
            _ => false,
        };
        let due = |kept: &Kept| kept.retry.is_none_or(|retry| retry <= Instant::now());
        let again = |kept: &Kept| match &kept.rule {
            Ok(rule) => due(kept) && (changed(rule) || !rule.below.holds(&self.engine)),
            // What it asks may be a view that is not planned yet.
            Err(RuleError::Waits(_)) => streams != self.streams || due(kept),
            Err(RuleError::Busy(_)) => due(kept),
            // A column may come with the next batch; what a person puts is told at once.
            Err(RuleError::Refused(_)) => kept.loaded.configured && due(kept),
        };
        let names: Vec<String> =
            self.rules.iter().filter(|(_, kept)| again(kept)).map(|(name, _)| name.clone()).collect();
        for name in &names {
            let Some(loaded) = self.rules.get(name).map(|kept| kept.loaded.clone()) else { continue };
            let waited = self.rules.get(name).is_some_and(|kept| matches!(kept.rule, Err(RuleError::Waits(_))));
            let rule = Rule::compile(&self.engine, loaded.settings.clone()).await.map(Arc::new);
            if let (Err(error), Some(kept)) = (&rule, self.rules.get_mut(name)) {
                // As it was until there is time, or what it waits for; rows of the stream wait, too.
                kept.retry = Some(Instant::now() + AGAIN);
                if matches!(error, RuleError::Busy(_)) || kept.rule.as_ref().err() == Some(error) {
                    continue;
                }
            }
            if let (true, Ok(Kind::Rows(rows))) = (waited, rule.as_ref().map(|rule| &rule.kind)) {
                // The stream was not there before: all of it is new.
                self.read.positions.entry(rows.stream.clone()).or_default();
            }
            self.keep(loaded, rule);
        }
        if !names.is_empty() || streams != self.streams {
            self.govern(episodes);
        }
    }

    fn command(&mut self, command: Command, episodes: &mut Episodes) {
        let now = self.clock(episodes);
        match command {
            Command::Put { rule, reply } => {
                let loaded = Loaded { settings: rule.settings.clone(), configured: false };
                self.keep(loaded, Ok(Arc::from(rule)));
                self.govern(episodes);
                self.replies.push(Reply::Done(reply));
            }
            Command::Delete { name, reply } => {
                self.rules.remove(&name);
                self.statuses.lock().remove(&name);
                self.govern(episodes);
                self.replies.push(Reply::Done(reply));
            }
            // Who asked may be gone.
            Command::Open { page, reply } => drop(reply.send(shown::open(episodes, &page))),
            Command::Firing { reply } => drop(reply.send(episodes.told_now(now))),
            Command::Silences { reply } => {
                let silences = episodes.silences().collect::<Vec<_>>();
                drop(reply.send(serde_json::to_value(silences).unwrap_or_default()));
            }
            Command::Say { id, word, by, note, reply } => {
                let said = match word {
                    Word::Acknowledge => episodes.acknowledge(&id, &by, &note, now),
                    Word::Assign(to) => episodes.assign(&id, &to, &by, &note, now),
                    Word::Comment => episodes.comment(&id, &by, &note, now),
                    Word::Resolve => episodes.resolve(&id, &by, &note, now),
                };
                self.said(said, reply);
            }
            Command::Event { event, reply } => {
                let sequence = episodes.event(*event, now);
                self.replies.push(Reply::Event(reply, sequence));
            }
            Command::Silence { silence, reply } => {
                let said = episodes.silence(silence, now);
                self.said(said, reply);
            }
            Command::Unsilence { id, by, reply } => {
                let said = episodes.unsilence(&id, &by, now);
                self.said(said, reply);
            }
        }
    }

    /// A refusal is told at once, the rest when it is written.
    fn said(&mut self, said: Result<(), Unknown>, reply: oneshot::Sender<Result<(), Unknown>>) {
        match said {
            Ok(()) => self.replies.push(Reply::Said(reply)),
            Err(unknown) => drop(reply.send(Err(unknown))),
        }
    }

    /// Asks the statements that are due.
    fn ask(&mut self, answered: &mpsc::Sender<Answer>) {
        let (now, listening) = (self.now, self.listening);
        let asked = self.rules.values().filter(|kept| kept.asked).count();
        let mut due: Vec<&mut Kept> =
            self.rules.values_mut().filter(|kept| !kept.asked && kept.due <= Instant::now()).collect();
        due.retain(|kept| kept.rule.as_ref().is_ok_and(|rule| !matches!(rule.kind, Kind::Rows(_))));
        due.sort_by_key(|kept| kept.due);
        for kept in due.into_iter().take(ASKED_MAX.saturating_sub(asked)) {
            let Ok(rule) = &kept.rule else { continue };
            let every = match &rule.kind {
                Kind::Rows(_) => continue,
                Kind::Statement { every, .. } | Kind::Absent { every, .. } => *every,
            };
            (kept.asked, kept.due) = (true, Instant::now() + every);
            let (engine, rule, answered) = (Arc::clone(&self.engine), Arc::clone(rule), answered.clone());
            tokio::spawn(async move {
                let answer = statement::ask(&engine, rule, now, listening).await;
                // The task has ended when nobody takes it.
                drop(answered.send(answer).await);
            });
        }
    }

    fn answered(&mut self, answer: &Answer, episodes: &mut Episodes) {
        let now = self.clock(episodes);
        let Some(kept) = self.rules.get_mut(&answer.rule.policy.name) else { return };
        let current = kept.rule.as_ref().is_ok_and(|rule| Arc::ptr_eq(rule, &answer.rule));
        if !current {
            return;
        }
        kept.asked = false;
        match &answer.rows {
            Ok(rows) => {
                statement::judge(&answer.rule, rows, episodes, now);
                self.refusals(&answer.rule, episodes);
            }
            Err(error) => {
                kept.failed += 1;
                let mut statuses = self.statuses.lock();
                if let Some(status) = statuses.get_mut(&answer.rule.policy.name) {
                    (status.failed, status.last_error) = (kept.failed, Some(error.to_string()));
                }
            }
        }
    }

    /// Writes what was decided, and tells it. None when the node stops first.
    async fn write(&mut self, episodes: &mut Episodes, token: &CancellationToken) -> Option<()> {
        let changes = episodes.take();
        if !changes.is_empty() {
            for rows in log::batches(&changes, &self.to_write(), &self.schema) {
                let mut wait = WAIT_MIN;
                while let Err(error) = self.sink.append(&log::stream(), &self.schema, rows.clone()).await {
                    if matches!(error, SinkError::Refused { .. }) {
                        // It would be refused for ever. What was decided is still told.
                        tracing::error!(%error, "changes of alerts are not in their record");
                        break;
                    }
                    tracing::warn!(%error, "changes of alerts wait");
                    tokio::select! {
                        () = token.cancelled() => return None,
                        () = tokio::time::sleep(wait) => {}
                    }
                    wait = (2 * wait).min(WAIT_MAX);
                }
            }
            (self.marked, self.moved) = (Instant::now(), false);
            self.counts.add(&changes);
            self.again.note(&changes);
            self.hub.publish(&changes, episodes.sequence());
        }
        for reply in self.replies.drain(..) {
            match reply {
                Reply::Said(reply) => drop(reply.send(Ok(()))),
                Reply::Done(reply) => drop(reply.send(())),
                Reply::Event(reply, sequence) => drop(reply.send(sequence)),
            }
        }
        Some(())
    }

    /// At the end: what cannot be written now is found again by the next start.
    async fn write_once(&mut self, episodes: &mut Episodes) {
        for rows in log::batches(&episodes.take(), &self.to_write(), &self.schema) {
            let stream = log::stream();
            let append = self.sink.append(&stream, &self.schema, rows);
            let appended = tokio::time::timeout(WAIT_MAX, append).await;
            if !matches!(appended, Ok(Ok(()))) {
                tracing::info!("how far streams were read is not written: the next start looks at some rows again");
                return;
            }
        }
    }
}
