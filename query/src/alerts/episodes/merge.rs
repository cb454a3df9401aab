//! What edges raise: candidates of alerts that others may have raised, too.

use std::collections::HashMap;

use super::super::episode::{CLOUD, Candidate, Episode, Phase, Quiet, Raised};
use super::super::template::{Places, Words};
use super::{Episodes, Transition, USUAL_TOPIC};

/// Alerts that are open at a time when an edge raises another: whoever has a token may name as many rules and devices as it likes.
pub(super) const OPEN_MAX: usize = 100_000;

impl Episodes {
    /// Counts what is open, before edges are heard; how many of their alerts found no room until now.
    pub(crate) fn make_room(&mut self) -> u64 {
        self.room = OPEN_MAX.saturating_sub(self.open.values().map(HashMap::len).sum());
        self.turned_away
    }

    /// What an edge says.
    pub(crate) fn candidate(&mut self, candidate: &Candidate, now: i64) {
        let key = (candidate.rule.clone(), candidate.hash.clone());
        let slack = self.policies.get(&key.0).filter(|policy| policy.hash == key.1).map_or(0, |policy| policy.slack);
        let open = self.open.get_mut(&key).and_then(|open| open.remove(&candidate.labels));
        let of_origin = |episode: &Episode| episode.raised.get(&candidate.edge).map(|raised| raised.id.clone());
        let fits = |episode: &Episode| match of_origin(episode) {
            // An edge's next episode is another alert.
            Some(id) => id == candidate.id,
            None => {
                episode.meets(candidate.from, candidate.to, slack)
                    && episode.ended_by_hand.is_none_or(|at| candidate.ts <= at)
            }
        };
        let mut episode = match open {
            Some(episode) if fits(&episode) || episode.phase == Phase::Pending => episode,
            Some(mut episode) if of_origin(&episode).is_some() => {
                // Its end was lost on the way: what it says now is something else.
                let edge = candidate.edge.clone();
                let to = episode.raised.get(&edge).and_then(|raised| raised.to).unwrap_or(candidate.from);
                let keep = self.policies.get(&key.0).map_or(0, |policy| policy.keep);
                episode.lingers = episode.lingers.filter(|_| candidate.from < to.saturating_add(keep));
                self.lower(&mut episode, &edge, to, candidate.ts, now);
                if episode.is_raised() {
                    episode.raised.remove(&edge);
                    episode
                } else {
                    self.keep_ended(key.clone(), episode);
                    of_candidate(candidate)
                }
            }
            // It is about a time before the one that is open.
            Some(episode) => {
                self.put(key.clone(), episode);
                self.tell_of_the_past(candidate, now);
                return;
            }
            None => match self.take_fitting(&(key.clone(), candidate.labels.clone()), candidate, fits) {
                Some(episode) => episode,
                None if self.room == 0 => {
                    self.turned_away += 1;
                    return;
                }
                None => {
                    self.room -= 1;
                    of_candidate(candidate)
                }
            },
        };
        let known = episode.raised.get(&candidate.edge).filter(|raised| raised.id == candidate.id).cloned();
        if episode.raised.is_empty() && episode.watch.is_some() {
            // Pending by rows of the cloud; the edge says what it knows.
            (episode.message, episode.severity) = (candidate.message.clone(), candidate.severity);
            episode.from = episode.from.min(candidate.from);
        }
        if candidate.severity > episode.severity && episode.phase == Phase::Firing {
            episode.severity = candidate.severity;
        }
        if episode.topic.is_empty() {
            episode.topic = self.topic_of(candidate, &episode.id);
        }
        match (known, candidate.to) {
            (None, None) => {
                let ts = if candidate.backfill { i64::MIN } else { candidate.ts };
                self.raise(&mut episode, &candidate.edge, &candidate.id, candidate.from, (ts, now));
            }
            (None, Some(to)) => {
                // Nothing was heard of its beginning: both are told, or neither.
                let ts = if candidate.backfill { i64::MIN } else { candidate.ts };
                let ended = episode.phase == Phase::Resolved;
                if ended || episode.phase == Phase::Firing {
                    let raised =
                        Raised { id: candidate.id.clone(), from: candidate.from, to: Some(to), fired: candidate.from };
                    episode.alias(&candidate.id);
                    episode.raised.insert(candidate.edge.clone(), raised);
                    self.record(Transition::Merged, candidate.ts, now, false, &mut episode);
                } else {
                    self.raise(&mut episode, &candidate.edge, &candidate.id, candidate.from, (ts, now));
                    self.has_ended_at_the_edge(&mut episode, candidate, to, now);
                }
            }
            (Some(Raised { to: None, .. }), Some(to)) => {
                self.has_ended_at_the_edge(&mut episode, candidate, to, now);
            }
            // A backfill that the edge now finds in the present.
            (Some(Raised { to: None, .. }), None)
                if episode.quiet == Some(Quiet::Backfill) && !candidate.backfill && !self.is_old(candidate.ts, now) =>
            {
                self.tell(&mut episode, Transition::Firing, (candidate.ts, now));
            }
            // Somebody ended it, and the edge says later that it fires, or when it ended for the edge.
            (Some(Raised { to: Some(_), .. }), None) if episode.ended_by_hand.is_some_and(|at| candidate.ts > at) => {
                episode.ended_by_hand = None;
                let raised = Raised { id: candidate.id.clone(), from: candidate.from, to: None, fired: candidate.from };
                episode.raised.insert(candidate.edge.clone(), raised);
                (episode.phase, episode.to) = (Phase::Firing, None);
                self.tell(&mut episode, Transition::Firing, (candidate.ts, now));
            }
            (Some(Raised { to: Some(known), .. }), Some(to)) if episode.ended_by_hand.is_some() && known != to => {
                let raised =
                    Raised { id: candidate.id.clone(), from: candidate.from, to: Some(to), fired: candidate.from };
                episode.raised.insert(candidate.edge.clone(), raised);
                self.record(Transition::Merged, candidate.ts, now, false, &mut episode);
            }
            _ => {}
        }
        self.put(key, episode);
    }

    /// Edges have no `keep_firing_for`: the alert is kept firing as the cloud's rule of the same words keeps it, whose rows may still
    /// be on the way. Where that has ended as late by itself, or pends, it ends at once.
    fn has_ended_at_the_edge(&mut self, episode: &mut Episode, candidate: &Candidate, to: i64, now: i64) {
        let policy = self.policies.get(&episode.rule).filter(|policy| policy.hash == episode.hash && !policy.by_clock);
        let passed = now.saturating_sub(to).max(0);
        let is_kept = policy.is_some_and(|policy| passed < policy.keep);
        let by_rows = episode.raised.get(CLOUD).and_then(|raised| raised.to).is_some_and(|end| to <= end);
        if is_kept && !by_rows && episode.phase == Phase::Firing && episode.watch.is_none() {
            episode.lingers = Some(self.heard - passed);
        }
        self.lower(episode, &candidate.edge, to, candidate.ts, now);
    }

    /// It was kept firing for long enough.
    pub(super) fn ends_lingering(&mut self, episode: &mut Episode, now: i64) {
        episode.lingers = None;
        let Some(origin) = episode.raised.keys().next().cloned() else { return };
        let to = episode.raised.values().filter_map(|raised| raised.to).max().unwrap_or(now);
        if !episode.is_raised() {
            let own = episode.raised.get(&origin).and_then(|raised| raised.to).unwrap_or(to);
            self.lower(episode, &origin, own, to, now);
        }
    }

    /// A candidate that has nothing to do with what fires now: for the record.
    fn tell_of_the_past(&mut self, candidate: &Candidate, now: i64) {
        let mut episode = of_candidate(candidate);
        episode.topic = self.topic_of(candidate, &episode.id);
        (episode.quiet, episode.phase) = (Some(Quiet::Backfill), Phase::Firing);
        let raised = Raised { id: candidate.id.clone(), from: candidate.from, to: candidate.to, fired: candidate.from };
        episode.raised.insert(candidate.edge.clone(), raised);
        if candidate.to.is_some() {
            (episode.phase, episode.to) = (Phase::Resolved, candidate.to);
        }
        let transition = if candidate.to.is_some() { Transition::Resolved } else { Transition::Firing };
        self.record(transition, candidate.ts, now, false, &mut episode);
    }

    /// The topic of what an edge raised: that of the cloud's rule of the same text, or the usual one.
    fn topic_of(&self, candidate: &Candidate, id: &str) -> String {
        let mut words = Words::new();
        let own: Words = serde_json::from_str(&candidate.labels).unwrap_or_default();
        words.extend(own);
        for (name, text) in [
            ("rule", &*candidate.rule),
            ("stream", &*candidate.stream),
            ("severity", candidate.severity.word()),
            ("id", id),
            ("device", candidate.device.as_deref().unwrap_or("_")),
        ] {
            words.insert(name.to_owned(), text.into());
        }
        match self.policies.get(&candidate.rule).filter(|policy| policy.hash == candidate.hash) {
            Some(policy) => policy.topic.fill_topic(&words),
            None => Places::parse(USUAL_TOPIC, None).map(|topic| topic.fill_topic(&words)).unwrap_or_default(),
        }
    }
}

fn of_candidate(candidate: &Candidate) -> Episode {
    Episode {
        rule: candidate.rule.clone(),
        hash: candidate.hash.clone(),
        stream: candidate.stream.clone(),
        labels: candidate.labels.clone(),
        device: candidate.device.clone(),
        message: candidate.message.clone(),
        ..Episode::begun(candidate.id.clone(), candidate.severity, candidate.from)
    }
}
