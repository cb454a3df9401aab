//! All alerts: what rows, edges and people do to them. Pure and deterministic: takes the time, and gives changes in order.
//!
//! - A row older than the newest of its label set changes nothing here: what it means is found in the table (`late`).
//! - What an edge raises is a candidate. Candidates of one rule (name and hash) and label set whose intervals meet within `for`
//!   and lateness are one alert. One origin's next episode is always another alert. A candidate that meets an alert which has
//!   ended only extends the record; when its own end does not follow within [`SETTLE_US`] the alert fires again.
//! - What happened longer than the horizon ago is a backfill: recorded, nobody is told, and it fires in earnest when a row of
//!   the present still holds.
//! - Nobody is told while a silence holds or another alert inhibits it; when that is over and it still fires, it is told then.
//! - Time between two ticks counts at most [`STEP_US`], so that a clock that is set repeats nothing and ends nothing; what a
//!   rule saw by that clock is moved with it. Of the time that a node was away as much counts towards `keep_firing_for`.
//! - A rule that is there and cannot run ends nothing: what it raised stays as it was.
//! - What only edges raise that are not heard any more is marked stale, and goes on until somebody ends it (`stale`, `people`).

mod change;
mod ended;
mod late;
mod merge;
mod people;
mod quiet;
mod seen;
mod stale;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

pub(crate) use self::change::{Change, Subject, Transition};
pub(crate) use self::late::Stretch;
pub(crate) use self::people::Unknown;
use super::episode::{CLOUD, Episode, Phase, Policy, Quiet, Raised};
use super::silence::Silence;
use crate::links::event::LinkEvent;

/// Of the time between two ticks at most this counts.
pub(crate) const STEP_US: i64 = 60_000_000;
/// How long the end of a candidate is waited for when its alert has ended already.
const SETTLE_US: i64 = 10_000_000;

/// Which rule, as its text is: name and hash.
pub(crate) type RuleKey = (String, String);

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Episodes {
    horizon: i64,
    policies: BTreeMap<String, Arc<Policy>>,
    open: BTreeMap<RuleKey, HashMap<String, Episode>>,
    /// The last that ended, by rule and label set, the oldest first in the queues. An edge that was away tells of several at once,
    /// before the rows that they are about.
    ended: HashMap<(RuleKey, String), VecDeque<Episode>>,
    ended_order: VecDeque<(RuleKey, String)>,
    silences: BTreeMap<String, Silence>,
    sequence: i64,
    now: i64,
    /// How long was listened, µs; `told` of an alert by that.
    heard: i64,
    /// Rules that are there, and do not run now.
    waiting: BTreeSet<RuleKey>,
    /// Alerts that did not begin because their rule has too many, by rule.
    refused: BTreeMap<String, u64>,
    /// Alerts of edges that may begin, and that found no room.
    room: usize,
    turned_away: u64,
    out: Vec<Change>,
}

impl Episodes {
    /// With nothing seen, behind this sequence.
    pub(crate) fn new(horizon: i64, sequence: i64, now: i64) -> Self {
        Self {
            horizon,
            policies: BTreeMap::new(),
            open: BTreeMap::new(),
            ended: HashMap::new(),
            ended_order: VecDeque::new(),
            silences: BTreeMap::new(),
            sequence,
            now,
            heard: 0,
            waiting: BTreeSet::new(),
            refused: BTreeMap::new(),
            room: merge::OPEN_MAX,
            turned_away: 0,
            out: Vec::new(),
        }
    }

    /// Takes back what a stopped node had. Its own clock counts on from `at`, when it was told or cleared.
    pub(crate) fn restore(&mut self, episode: Episode) {
        let key = (episode.rule.clone(), episode.hash.clone());
        // Times by which something is due are distances from what was listened.
        let mut episode = episode;
        let listened = |at: i64| -(self.now - at).clamp(0, i64::MAX / 2);
        (episode.told_at, episode.clear_at) = (listened(episode.told_at), listened(episode.clear_at).max(-STEP_US));
        episode.unsettled_at = episode.unsettled_at.map(|_| self.heard);
        episode.lingers = episode.lingers.map(|_| self.heard);
        if episode.phase == Phase::Resolved && !episode.is_raised() {
            self.keep_ended(key, episode);
        } else {
            self.open.entry(key).or_default().insert(episode.labels.clone(), episode);
        }
    }

    pub(crate) fn restore_silence(&mut self, silence: Silence) {
        self.silences.insert(silence.id.clone(), silence);
    }

    /// Rules that are there, and do not run now: their alerts stay.
    pub(crate) fn wait_for(&mut self, rules: BTreeSet<RuleKey>) {
        self.waiting = rules;
    }

    /// The rules that run from now on. Alerts of others end, but for those that wait.
    pub(crate) fn govern(&mut self, policies: BTreeMap<String, Arc<Policy>>, now: i64) {
        self.refused.retain(|name, _| policies.contains_key(name));
        self.policies = policies;
        let gone: Vec<RuleKey> = self.open.keys().filter(|key| !self.is_governed(key)).cloned().collect();
        for key in gone {
            let Some(alerts) = self.open.remove(&key) else { continue };
            let mut alerts = alerts.into_values().collect::<Vec<_>>();
            alerts.sort_by(|one, other| one.labels.cmp(&other.labels));
            for mut episode in alerts {
                let Some(watch) = episode.watch.take() else {
                    self.put(key.clone(), episode);
                    continue;
                };
                if watch.firing {
                    episode.message = format!("{}: the rule is no longer configured as it was", episode.rule);
                    self.lower(&mut episode, CLOUD, watch.last, watch.last, now);
                } else if episode.phase == Phase::Pending {
                    self.record(Transition::Dropped, watch.last, now, false, &mut episode);
                    continue;
                }
                self.put(key.clone(), episode);
            }
        }
    }

    fn is_governed(&self, key: &RuleKey) -> bool {
        self.waiting.contains(key) || self.policies.get(&key.0).is_some_and(|policy| policy.hash == key.1)
    }

    /// The machine's clock was set by so much: what was seen by it is moved along.
    pub(crate) fn clock_was_set(&mut self, by: i64) {
        for (key, open) in &mut self.open {
            if self.policies.get(&key.0).is_some_and(|policy| policy.by_clock && policy.hash == key.1) {
                open.values_mut().filter_map(|episode| episode.watch.as_mut()).for_each(|watch| watch.shift(by));
            }
        }
    }

    /// Alerts of a rule that did not begin because it has too many.
    pub(crate) fn refused(&self, rule: &str) -> u64 {
        self.refused.get(rule).copied().unwrap_or_default()
    }

    /// The alerts of a rule that are open, by their labels.
    pub(crate) fn open_of(&self, policy: &Policy) -> Option<&HashMap<String, Episode>> {
        self.open.get(&(policy.name.clone(), policy.hash.clone())).filter(|open| !open.is_empty())
    }

    /// Every alert that is open.
    pub(crate) fn open(&self) -> impl Iterator<Item = &Episode> {
        self.open.values().flat_map(HashMap::values)
    }

    pub(crate) fn silences(&self) -> impl Iterator<Item = &Silence> {
        self.silences.values()
    }

    /// The rules that there are.
    pub(crate) fn policies(&self) -> impl Iterator<Item = (&String, &Arc<Policy>)> {
        self.policies.iter()
    }

    /// Of the last change.
    pub(crate) fn sequence(&self) -> i64 {
        self.sequence
    }

    /// What has changed since it was last asked.
    pub(crate) fn take(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.out)
    }

    /// A change that is only a place in the sequence.
    pub(crate) fn mark(&mut self, now: i64) {
        self.push(Transition::Position, now, now, false, Subject::Position, None, None);
    }

    /// A link tells something; its sequence.
    pub(crate) fn event(&mut self, event: LinkEvent, now: i64) -> i64 {
        let (by, id) = (Some(format!("link {}", event.link)), Some(event.id.clone()));
        self.push(Transition::Event, now, now, true, Subject::Event(Box::new(event)), by, id);
        self.sequence
    }

    /// Where an alert belongs after something happened to it.
    fn put(&mut self, key: RuleKey, episode: Episode) {
        match episode.phase {
            Phase::Pending if episode.watch.is_none() => {}
            Phase::Resolved if !episode.is_raised() => self.keep_ended(key, episode),
            _ => {
                self.open.entry(key).or_default().insert(episode.labels.clone(), episode);
            }
        }
    }

    fn is_old(&self, ts: i64, now: i64) -> bool {
        now.saturating_sub(ts) > self.horizon
    }

    /// An origin says that it fires.
    fn raise(&mut self, episode: &mut Episode, origin: &str, id: &str, from: i64, (ts, now): (i64, i64)) {
        episode.alias(id);
        let known = episode.raised.get(origin).filter(|raised| raised.id == id && raised.to.is_none());
        let fired = known.map_or(ts, |raised| raised.fired);
        episode.raised.insert(origin.to_owned(), Raised { id: id.to_owned(), from, to: None, fired });
        episode.lingers = None;
        match episode.phase {
            Phase::Pending => {
                episode.phase = Phase::Firing;
                episode.quiet = if self.is_old(ts, now) { Some(Quiet::Backfill) } else { None };
                self.tell(episode, Transition::Firing, (ts, now));
            }
            Phase::Firing if episode.quiet == Some(Quiet::Backfill) && !self.is_old(ts, now) => {
                episode.from = episode.from.min(from);
                self.tell(episode, Transition::Firing, (ts, now));
            }
            Phase::Firing => {
                episode.from = episode.from.min(from);
                self.record(Transition::Merged, ts, now, false, episode);
            }
            Phase::Resolved => {
                episode.unsettled_at = Some(self.heard);
                self.record(Transition::Merged, ts, now, false, episode);
            }
        }
    }

    /// An origin says that it no longer fires.
    fn lower(&mut self, episode: &mut Episode, origin: &str, to: i64, ts: i64, now: i64) {
        if let Some(raised) = episode.raised.get_mut(origin) {
            raised.to = Some(to.max(raised.from));
        }
        if episode.is_raised() {
            self.record(Transition::Merged, ts, now, false, episode);
            return;
        }
        let end = episode.raised.values().filter_map(|raised| raised.to).max().unwrap_or(to);
        let ended_before = episode.phase == Phase::Resolved;
        (episode.phase, episode.to, episode.unsettled_at) = (Phase::Resolved, Some(end), None);
        episode.stale = false;
        let told = episode.told && !ended_before;
        let transition = if ended_before { Transition::Merged } else { Transition::Resolved };
        self.record(transition, ts, now, told, episode);
    }

    /// Tells that it fires, unless nobody is to be told.
    fn tell(&mut self, episode: &mut Episode, transition: Transition, (ts, now): (i64, i64)) {
        episode.quiet = if episode.quiet == Some(Quiet::Backfill) && self.is_old(ts, now) {
            Some(Quiet::Backfill)
        } else {
            self.quiet(episode, now, &mut HashMap::new())
        };
        let told = episode.quiet.is_none();
        if told {
            (episode.told, episode.told_at) = (true, self.heard);
        }
        self.record(transition, ts, now, told, episode);
    }

    /// Time passes: what is kept, repeated, or was not told and now may be.
    pub(crate) fn tick(&mut self, now: i64) {
        self.heard += now.saturating_sub(self.now).clamp(0, STEP_US);
        self.now = now;
        self.silences.retain(|_, silence| !silence.is_over(now));
        let (mut due, mut firing) = (Vec::new(), HashMap::new());
        for (key, open) in &self.open {
            let policy = self.policies.get(&key.0).filter(|policy| policy.hash == key.1);
            for episode in open.values() {
                let kept = episode.watch.as_ref().is_some_and(|watch| watch.clear.is_some())
                    && policy.is_some_and(|policy| self.heard - episode.clear_at >= policy.keep);
                let lingered =
                    episode.lingers.is_some_and(|since| self.heard - since >= policy.map_or(0, |policy| policy.keep));
                let unsettled = episode.unsettled_at.is_some_and(|since| self.heard - since >= SETTLE_US);
                let quiet = episode.phase == Phase::Firing
                    && (episode.quiet == Some(Quiet::Silenced)
                        || episode.quiet == Some(Quiet::Inhibited) && policy.is_some())
                    && self.quiet(episode, now, &mut firing).is_none();
                let repeat = episode.phase == Phase::Firing
                    && episode.quiet.is_none()
                    && episode.told
                    && episode.acknowledged.is_none()
                    && policy
                        .and_then(|policy| policy.repeat_every)
                        .is_some_and(|every| self.heard - episode.told_at >= every);
                if kept || lingered || unsettled || quiet || repeat {
                    due.push((key.clone(), episode.labels.clone(), [kept, lingered, unsettled, quiet]));
                }
            }
        }
        due.sort_by(|one, other| (&one.0, &one.1).cmp(&(&other.0, &other.1)));
        for (key, labels, [kept, lingered, unsettled, quiet]) in due {
            let Some(mut episode) = self.open.get_mut(&key).and_then(|open| open.remove(&labels)) else { continue };
            if kept {
                let clear = episode.watch.take().and_then(|watch| watch.clear).unwrap_or(now);
                self.lower(&mut episode, CLOUD, clear, clear, now);
            } else if lingered {
                self.ends_lingering(&mut episode, now);
            } else if unsettled {
                episode.unsettled_at = None;
                (episode.phase, episode.to) = (Phase::Firing, None);
                self.tell(&mut episode, Transition::Firing, (now, now));
            } else if quiet {
                self.tell(&mut episode, Transition::Firing, (now, now));
            } else {
                self.tell(&mut episode, Transition::Repeated, (now, now));
            }
            self.put(key, episode);
        }
        self.open.retain(|_, open| !open.is_empty());
    }

    fn record(&mut self, transition: Transition, ts: i64, now: i64, told: bool, episode: &mut Episode) {
        if told {
            episode.is_told_as();
        }
        let ts = if ts == i64::MIN { episode.from } else { ts };
        let subject = self.as_recorded(episode, now);
        self.push(transition, ts, now, told, subject, None, None);
    }

    /// With moments instead of what was listened since, so that they mean something to the next start.
    fn as_recorded(&self, episode: &Episode, now: i64) -> Subject {
        let mut episode = Box::new(episode.clone());
        episode.told_at = now - (self.heard - episode.told_at);
        episode.clear_at = now - (self.heard - episode.clear_at);
        Subject::Alert(episode)
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of a row, put together here alone")]
    fn push(
        &mut self,
        transition: Transition,
        ts: i64,
        at: i64,
        told: bool,
        subject: Subject,
        actor: Option<String>,
        note: Option<String>,
    ) {
        self.sequence += 1;
        self.out.push(Change { sequence: self.sequence, transition, ts, at, told, actor, note, subject });
    }
}

/// Where an alert is told when its rule says nothing of it.
pub(crate) const USUAL_TOPIC: &str = "alerts/{stream}/{device}/{rule}";
