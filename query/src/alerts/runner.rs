//! The one task that owns the alerts: wakes when a table moves on, a statement answers, a person says something, or a second has
//! passed; decides, writes what it decided, and only then goes on. It stops with the token, having written how far it has read.
//!
//! Streams are followed from a recorded position ([`crate::follow`]): each row is looked at once. A stream that no rule was on
//! before begins with what comes next. The stream `alerts`, which edges send, is always followed.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use arrow_select::concat::concat_batches;
use futures::TryStreamExt;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use wire::{StreamName, StreamSchema};

use super::claims;
use super::episodes::{Episodes, Unknown};
use super::log::{self, Positions};
use super::rows::{FreshRows, Newest};
use super::rule::{Kind, Rule, RuleError};
use super::shown;
use super::silence::Silence;
use super::statement::{self, Answer};
use super::store::Loaded;
use super::{RuleStatus, Word, now_us};
use crate::engine::Engine;
use crate::follow::{Position, behind};
use crate::fused_table::Frozen;
use crate::publish::Hub;
use crate::sink::{Sink, SinkError};

const TICK: Duration = Duration::from_secs(1);
/// Where a stream was read to is written so often when nothing is decided.
const MARK_EVERY: Duration = Duration::from_secs(60);
/// Statements of rules that are asked at a time.
const ASKED_MAX: usize = 2;
/// Rows of batches that are looked at together.
const ROWS_TOGETHER: usize = 16_384;
const WAIT_MIN: Duration = Duration::from_millis(50);
const WAIT_MAX: Duration = Duration::from_secs(5);

/// What is asked of the task.
#[derive(Debug)]
pub(crate) enum Command {
    Put { rule: Box<Rule>, reply: oneshot::Sender<()> },
    Delete { name: String, reply: oneshot::Sender<()> },
    Open { reply: oneshot::Sender<serde_json::Value> },
    Silences { reply: oneshot::Sender<serde_json::Value> },
    Say { id: String, word: Word, by: String, note: String, reply: oneshot::Sender<Result<(), Unknown>> },
    Silence { silence: Silence, reply: oneshot::Sender<Result<(), Unknown>> },
    Unsilence { id: String, by: String, reply: oneshot::Sender<Result<(), Unknown>> },
}

/// A rule in the task.
#[derive(Debug)]
struct Kept {
    rule: Result<Arc<Rule>, RuleError>,
    loaded: Loaded,
    /// When its statement is due, and whether it is asked now.
    due: Instant,
    asked: bool,
    failed: u64,
}

/// A stream that is followed.
#[derive(Debug, Default)]
struct Followed {
    newest: Newest,
}

/// Answers to people, given when what they asked for is written.
#[derive(Debug)]
enum Reply {
    Said(oneshot::Sender<Result<(), Unknown>>),
    Done(oneshot::Sender<()>),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Runner {
    engine: Arc<Engine>,
    sink: Arc<dyn Sink>,
    hub: Arc<Hub>,
    horizon: i64,
    devices_max: usize,
    loaded: Vec<Loaded>,
    statuses: Arc<Mutex<BTreeMap<String, RuleStatus>>>,
    commands: mpsc::Receiver<Command>,
    rules: BTreeMap<String, Kept>,
    followed: BTreeMap<StreamName, Followed>,
    positions: Positions,
    schema: Arc<StreamSchema>,
    replies: Vec<Reply>,
    marked: Instant,
    /// Positions moved since they were written.
    moved: bool,
    /// The time, never back; and when the node began to listen.
    now: i64,
    at: Instant,
    listening: i64,
    streams: usize,
}

impl Runner {
    pub(crate) fn new(
        (engine, sink, hub): (Arc<Engine>, Arc<dyn Sink>, Arc<Hub>),
        (horizon, devices_max): (i64, usize),
        loaded: Vec<Loaded>,
        statuses: Arc<Mutex<BTreeMap<String, RuleStatus>>>,
        commands: mpsc::Receiver<Command>,
    ) -> Self {
        let now = now_us();
        Self {
            engine,
            sink,
            hub,
            horizon,
            devices_max,
            loaded,
            statuses,
            commands,
            rules: BTreeMap::new(),
            followed: BTreeMap::new(),
            positions: Positions::new(),
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
        self.hub.open(episodes.sequence());
        let mut changed = self.engine.tables().changed();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (answered, mut answers) = mpsc::channel(ASKED_MAX);
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
                told = changed.changed() => {
                    if told.is_err() {
                        break;
                    }
                    self.follow(&mut episodes).await;
                }
                _ = tick.tick() => {
                    let now = self.clock();
                    episodes.tick(now);
                    self.wait_no_longer(&mut episodes).await;
                    self.ask(&answered);
                    if self.moved && self.marked.elapsed() >= MARK_EVERY {
                        episodes.mark(now);
                    }
                }
            }
        }
        if self.moved {
            episodes.mark(self.clock());
            self.write_once(&mut episodes).await;
        }
    }

    /// The time: that of the machine, and when that was set back it goes on from where it was.
    fn clock(&mut self) -> i64 {
        let passed = i64::try_from(self.at.elapsed().as_micros()).unwrap_or(0);
        let machine = now_us();
        self.now = if machine >= self.now { machine } else { self.now + passed };
        self.at = Instant::now();
        self.now
    }

    async fn recover(&mut self, token: &CancellationToken) -> Option<Episodes> {
        loop {
            let now = self.clock();
            match log::recover(&self.engine, now).await {
                Ok(found) => {
                    let (episodes, positions) = found.into_episodes(self.horizon, now);
                    self.positions = positions;
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
        self.rules.insert(name, Kept { rule, loaded, due: Instant::now(), asked: false, failed: 0 });
    }

    /// The rules have changed.
    fn govern(&mut self, episodes: &mut Episodes) {
        let runs = |kept: &Kept| kept.rule.as_ref().ok().map(|rule| Arc::clone(&rule.policy));
        let policies = self.rules.iter().filter_map(|(name, kept)| Some((name.clone(), runs(kept)?)));
        // A rule whose stream is not there yet has not gone.
        let waiting: HashSet<&String> =
            self.rules.iter().filter(|(_, kept)| kept.rule.is_err()).map(|(name, _)| name).collect();
        let keep = episodes.policies().filter(|(name, _)| waiting.contains(name));
        let keep: Vec<_> = keep.map(|(name, policy)| (name.clone(), Arc::clone(policy))).collect();
        let policies = keep.into_iter().chain(policies).collect();
        episodes.govern(policies, self.now);
        // What nobody follows any more is not read again from where it was left.
        if waiting.is_empty() {
            let mut followed: HashSet<StreamName> = HashSet::from([claims::stream()]);
            for rule in self.rules.values().filter_map(|kept| kept.rule.as_ref().ok()) {
                if let Kind::Rows(rows) = &rule.kind {
                    followed.insert(rows.stream.clone());
                }
            }
            self.positions.retain(|stream, _| followed.contains(stream));
            self.followed.retain(|stream, _| followed.contains(stream));
        }
        self.streams = self.engine.tables().streams().len();
    }

    /// Rules whose stream has come, or has other columns now.
    async fn wait_no_longer(&mut self, episodes: &mut Episodes) {
        let streams = self.engine.tables().streams().len();
        let changed = |rule: &Rule| match &rule.kind {
            Kind::Rows(rows) => self
                .engine
                .tables()
                .cold(&rows.stream)
                .is_some_and(|cold| cold.schema.fields().len() != rows.input.fields().len()),
            _ => false,
        };
        let again = |kept: &Kept| match &kept.rule {
            Ok(rule) => changed(rule),
            Err(RuleError::Waits(_)) => streams != self.streams,
            Err(RuleError::Refused(_)) => false,
        };
        let names: Vec<String> =
            self.rules.iter().filter(|(_, kept)| again(kept)).map(|(name, _)| name.clone()).collect();
        for name in &names {
            let Some(loaded) = self.rules.get(name).map(|kept| kept.loaded.clone()) else { continue };
            let waited = self.rules.get(name).is_some_and(|kept| kept.rule.is_err());
            let rule = Rule::compile(&self.engine, loaded.settings.clone()).await.map(Arc::new);
            if let (true, Ok(Kind::Rows(rows))) = (waited, rule.as_ref().map(|rule| &rule.kind)) {
                // The stream was not there before: all of it is new.
                self.positions.entry(rows.stream.clone()).or_default();
            }
            self.keep(loaded, rule);
        }
        if !names.is_empty() || streams != self.streams {
            self.govern(episodes);
        }
    }

    fn command(&mut self, command: Command, episodes: &mut Episodes) {
        let now = self.clock();
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
            Command::Open { reply } => drop(reply.send(shown::open(episodes))),
            Command::Silences { reply } => {
                let silences = episodes.silences().collect::<Vec<_>>();
                drop(reply.send(serde_json::to_value(silences).unwrap_or_default()));
            }
            Command::Say { id, word, by, note, reply } => {
                let said = match word {
                    Word::Acknowledge => episodes.acknowledge(&id, &by, &note, now),
                    Word::Assign(to) => episodes.assign(&id, &to, &by, &note, now),
                    Word::Comment => episodes.comment(&id, &by, &note, now),
                };
                self.said(said, reply);
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
        let now = self.clock();
        let Some(kept) = self.rules.get_mut(&answer.rule.policy.name) else { return };
        let current = kept.rule.as_ref().is_ok_and(|rule| Arc::ptr_eq(rule, &answer.rule));
        if !current {
            return;
        }
        kept.asked = false;
        match &answer.rows {
            Ok(rows) => statement::judge(&answer.rule, rows, episodes, now),
            Err(error) => {
                kept.failed += 1;
                let mut statuses = self.statuses.lock();
                if let Some(status) = statuses.get_mut(&answer.rule.policy.name) {
                    (status.failed, status.last_error) = (kept.failed, Some(error.to_string()));
                }
            }
        }
    }

    /// Looks at what is new in every stream that a rule is on.
    async fn follow(&mut self, episodes: &mut Episodes) {
        let mut wanted = self.wanted();
        let columns = |rule: &Arc<Rule>| match &rule.kind {
            Kind::Rows(rows) => rows.input.fields().len(),
            _ => 0,
        };
        // A stream that got a column between two rules: both are to be about the same rows.
        let differ = |rules: &Vec<Arc<Rule>>| rules.windows(2).any(|two| columns(&two[0]) != columns(&two[1]));
        if wanted.values().any(differ) {
            self.wait_no_longer(episodes).await;
            wanted = self.wanted();
        }
        for (stream, rules) in wanted {
            if let Err(error) = self.follow_one(&stream, &rules, episodes).await {
                tracing::warn!(%stream, %error, "its new rows cannot be read yet");
            }
        }
    }

    /// The streams that are followed, each with its rules; that of the edges' alerts has none.
    fn wanted(&self) -> BTreeMap<StreamName, Vec<Arc<Rule>>> {
        let mut wanted = BTreeMap::from([(claims::stream(), Vec::new())]);
        for rule in self.rules.values().filter_map(|kept| kept.rule.as_ref().ok()) {
            if let Kind::Rows(rows) = &rule.kind {
                wanted.entry(rows.stream.clone()).or_default().push(Arc::clone(rule));
            }
        }
        wanted
    }

    async fn follow_one(
        &mut self,
        stream: &StreamName,
        rules: &[Arc<Rule>],
        episodes: &mut Episodes,
    ) -> datafusion::common::Result<()> {
        let tables = Arc::clone(self.engine.tables());
        let Some(cold) = tables.cold(stream) else { return Ok(()) };
        let frozen = Frozen::take(tables.as_ref(), stream).await?;
        let shown = Position::of(&frozen);
        let known = match self.positions.get(stream) {
            Some(known) => known.clone(),
            // What edges raised is never passed over; a rule begins with what comes next.
            None if rules.is_empty() => Position::default(),
            None => {
                self.positions.insert(stream.clone(), shown);
                // Written at once: after a crash the rule begins here, too.
                let now = self.clock();
                episodes.mark(now);
                return Ok(());
            }
        };
        if known == shown {
            return Ok(());
        }
        let wanted = match rules.first().map(|rule| &rule.kind) {
            Some(Kind::Rows(rows)) => Arc::clone(&rows.input),
            _ => claims::columns(&cold.schema),
        };
        let rows = behind(&self.engine, stream, &frozen, &known, &wanted).await?;
        let rows: Vec<RecordBatch> = rows.try_collect().await?;
        let now = self.clock();
        for rows in together(&rows, &wanted)? {
            if rules.is_empty() {
                let mut claims = claims::read(&rows);
                if known == Position::default() {
                    // History from before there was a record is none of its business.
                    claims.retain(|claim| now.saturating_sub(claim.ts) <= self.horizon);
                }
                claims.iter().for_each(|claim| episodes.candidate(claim, now));
                continue;
            }
            let followed = self.followed.entry(stream.clone()).or_default();
            let fresh = FreshRows::new(rows, &mut followed.newest, self.devices_max);
            for rule in rules {
                self.judge(rule, &fresh, episodes, now);
            }
        }
        self.positions.insert(stream.clone(), shown);
        self.moved = true;
        Ok(())
    }

    fn judge(&mut self, rule: &Rule, fresh: &FreshRows, episodes: &mut Episodes, now: i64) {
        let Kind::Rows(rows) = &rule.kind else { return };
        if rows.input.fields().len() != fresh.batch.num_columns() {
            return;
        }
        let mut failed = 0;
        let judged = rows.judge((&rule.policy, &rule.labels), fresh, episodes, now, &mut failed);
        if failed > 0 || judged.is_err() {
            let mut statuses = self.statuses.lock();
            if let Some(status) = statuses.get_mut(&rule.policy.name) {
                status.failed += failed.max(1);
                status.last_error = judged.err().map(|error| error.strip_backtrace()).or(status.last_error.take());
            }
        }
    }

    /// Writes what was decided, and tells it. None when the node stops first.
    async fn write(&mut self, episodes: &mut Episodes, token: &CancellationToken) -> Option<()> {
        let changes = episodes.take();
        if !changes.is_empty() {
            for rows in log::batches(&changes, &self.positions, &self.schema) {
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
            self.hub.publish(&changes, episodes.sequence());
        }
        for reply in self.replies.drain(..) {
            match reply {
                Reply::Said(reply) => drop(reply.send(Ok(()))),
                Reply::Done(reply) => drop(reply.send(())),
            }
        }
        Some(())
    }

    /// At the end: what cannot be written now is found again by the next start.
    async fn write_once(&mut self, episodes: &mut Episodes) {
        for rows in log::batches(&episodes.take(), &self.positions, &self.schema) {
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

/// Small batches together, large ones as they are.
fn together(rows: &[RecordBatch], schema: &SchemaRef) -> datafusion::common::Result<Vec<RecordBatch>> {
    let (mut all, mut some, mut count) = (Vec::new(), Vec::new(), 0);
    for batch in rows {
        some.push(batch.clone());
        count += batch.num_rows();
        if count >= ROWS_TOGETHER {
            all.push(concat_batches(schema, &some)?);
            (some, count) = (Vec::new(), 0);
        }
    }
    if count > 0 {
        all.push(concat_batches(schema, &some)?);
    }
    Ok(all)
}
