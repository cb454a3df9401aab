//! Alerts that have ended and may still be extended, by who was slower: an edge, or the cloud's own rule. Of a label set there are
//! several, because an edge that was away tells of several at once, before the rows that they are about.

use std::collections::BTreeMap;

use super::super::episode::{CLOUD, Candidate, Episode, Phase, Policy, Seen, id};
use super::{Episodes, RuleKey, Transition};

/// Of all rules, and of one rule and label set.
const ENDED_MAX: usize = 10_000;
const ENDED_EACH_MAX: usize = 8;

impl Episodes {
    pub(super) fn is_before_an_end_by_hand(&self, key: &RuleKey, seen: &Seen<'_>) -> bool {
        self.ended_of(key, seen.labels).filter_map(|ended| ended.ended_by_hand).any(|at| seen.to() <= at)
    }

    /// It was ended by the clock, and by event time it goes on.
    pub(super) fn has_ended_too_soon(&self, policy: &Policy, key: &RuleKey, seen: &Seen<'_>) -> bool {
        if policy.keep <= 0 || policy.by_clock {
            return false;
        }
        let ended = self.ended_of(key, seen.labels).filter(|ended| ended.ended_by_hand.is_none());
        let mut ends = ended.filter_map(|ended| ended.raised.get(CLOUD)?.to);
        ends.any(|end| seen.from < end.saturating_add(policy.keep))
    }

    /// Those of a label set that are at hand, the one that ended first before the others.
    pub(super) fn ended_of(&self, key: &RuleKey, labels: &str) -> impl Iterator<Item = &Episode> {
        self.ended.get(&(key.clone(), labels.to_owned())).into_iter().flatten()
    }

    /// An alert that ended by others, and that this row belongs to.
    pub(super) fn found_again(&mut self, key: &RuleKey, policy: &Policy, seen: &Seen<'_>) -> Option<Episode> {
        let key = (key.clone(), seen.labels.to_owned());
        let ended = self.ended.get(&key)?;
        let belongs = |ended: &Episode| {
            let is_open_to_rows = !ended.raised.contains_key(CLOUD) && ended.ended_by_hand.is_none();
            is_open_to_rows && ended.meets(seen.from, Some(seen.to()), policy.slack)
        };
        let candidates = ended.iter().enumerate().filter(|(_, ended)| belongs(ended));
        let nearest = candidates.min_by_key(|(_, ended)| ended.distance(seen.from, seen.to()))?.0;
        self.take_ended(&key, nearest)
    }

    /// One that had ended, by its place among those of its label set.
    fn take_ended(&mut self, key: &(RuleKey, String), at: usize) -> Option<Episode> {
        let all = self.ended.get_mut(key)?;
        let found = all.remove(at);
        if all.is_empty() {
            self.ended.remove(key);
        }
        found
    }

    /// Of those that have ended the one that the candidate is about: of its id, else the nearest that fits.
    pub(super) fn take_fitting(
        &mut self,
        key: &(RuleKey, String),
        candidate: &Candidate,
        fits: impl Fn(&Episode) -> bool,
    ) -> Option<Episode> {
        let ended = self.ended.get(key)?.iter().enumerate().filter(|(_, ended)| fits(ended));
        let to = candidate.to.unwrap_or(candidate.from);
        let far = |ended: &Episode| (!ended.is_called(&candidate.id), ended.distance(candidate.from, to));
        let nearest = ended.min_by_key(|(_, ended)| far(ended))?.0;
        self.take_ended(key, nearest)
    }

    pub(super) fn keep_ended(&mut self, key: RuleKey, mut episode: Episode) {
        let watch = episode.watch.take().filter(|watch| !watch.firing);
        let key = (key, episode.labels.clone());
        // What was pending by rows stays so, as an alert of its own.
        if let Some(watch) = watch {
            let id = id(&episode.hash, episode.device.as_deref(), &episode.labels, watch.from);
            let mut next = Episode {
                id,
                phase: Phase::Pending,
                told: false,
                quiet: None,
                from: watch.from,
                to: None,
                acknowledged: None,
                assigned: None,
                raised: BTreeMap::new(),
                aliases: Vec::new(),
                told_as: None,
                watch: Some(watch),
                ..episode.clone()
            };
            self.record(Transition::Pending, next.from, self.now, false, &mut next);
            self.open.entry(key.0.clone()).or_default().insert(next.labels.clone(), next);
        }
        let all = self.ended.entry(key.clone()).or_default();
        // Late rows make one of before anew: it is known already, or has its place between the others.
        if let Some(known) = all.iter_mut().find(|known| known.id == episode.id) {
            *known = episode;
            return;
        }
        let place = all.partition_point(|known| known.to <= episode.to);
        all.insert(place, episode);
        if all.len() > ENDED_EACH_MAX {
            all.pop_front();
        } else {
            self.ended_order.push_back(key);
        }
        while self.ended_order.len() > ENDED_MAX {
            if let Some(oldest) = self.ended_order.pop_front() {
                self.take_ended(&oldest, 0);
            }
        }
    }

    /// It is none of those that have ended any more.
    pub(super) fn forget(&mut self, key: &RuleKey, episode: &Episode) {
        let place = (key.clone(), episode.labels.clone());
        let known = self.ended.get(&place).and_then(|ended| ended.iter().position(|known| known.id == episode.id));
        if let Some(at) = known {
            self.take_ended(&place, at);
        }
    }
}
