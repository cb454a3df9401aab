//! What rows mean, as they come: what begins, is pending, fires, is kept firing and ends.

use std::collections::HashMap;

use super::super::episode::{CLOUD, Episode, Phase, Policy, Quiet, Says, Seen, Severity, Watch, id};
use super::{Episodes, RuleKey, Transition};

impl Episodes {
    /// What a row means for one rule. Whether it is in order: one that is not changes nothing, and is to be judged from the table.
    pub(crate) fn see(&mut self, policy: &Policy, seen: &Seen<'_>, now: i64) -> bool {
        let key = (policy.name.clone(), policy.hash.clone());
        let mut open = self.open.get_mut(&key).and_then(|open| open.remove(seen.labels));
        if let Some(mut episode) = open.take() {
            if !self.is_in_order(policy, &mut episode, seen) {
                self.put(key, episode);
                return false;
            }
            open = self.unless_it_has_ended(policy, &key, episode, seen, now);
        }
        let mut episode = match open {
            Some(episode) => episode,
            None if seen.says != Says::Holds || self.is_before_an_end_by_hand(&key, seen) => return true,
            None if self.has_ended_too_soon(policy, &key, seen) => return false,
            None => match self.found_again(&key, policy, seen) {
                Some(episode) => episode,
                None => {
                    if self.open.get(&key).map_or(0, HashMap::len) >= policy.instances_max {
                        *self.refused.entry(policy.name.clone()).or_default() += 1;
                        return true;
                    }
                    Episode::new(policy, seen)
                }
            },
        };
        if let Some(watch) = &mut episode.watch {
            (watch.last, watch.revision) = seen.moment;
        }
        let fires = episode.watch.as_ref().is_some_and(|watch| watch.firing);
        match seen.says {
            Says::Holds => self.holds(policy, &mut episode, seen, now),
            Says::Not => self.holds_not(policy, &mut episode, seen, now),
            Says::Lapses if !fires => self.holds_not(policy, &mut episode, seen, now),
            Says::Ends if fires => self.holds_not(policy, &mut episode, seen, now),
            Says::Lapses | Says::Ends | Says::Neither => {}
        }
        self.put(key, episode);
        true
    }

    /// Not older than the newest, and of one moment those that hold are last.
    fn is_in_order(&self, policy: &Policy, episode: &mut Episode, seen: &Seen<'_>) -> bool {
        let Some(watch) = &mut episode.watch else { return true };
        let newest = (watch.last, watch.revision);
        if policy.by_clock {
            // The clock was set back while nobody looked.
            if seen.to() < watch.last {
                watch.shift(seen.to() - watch.last);
            }
            return true;
        }
        let is_last = matches!(seen.says, Says::Holds | Says::Neither);
        seen.moment > newest || seen.moment == newest && is_last
    }

    /// A row that holds after it has not for `keep_firing_for` belongs to the next alert.
    fn unless_it_has_ended(
        &mut self,
        policy: &Policy,
        key: &RuleKey,
        mut episode: Episode,
        seen: &Seen<'_>,
        now: i64,
    ) -> Option<Episode> {
        let clear = episode.watch.as_ref().and_then(|watch| watch.clear).filter(|clear| {
            let kept = seen.from.saturating_sub(*clear) >= policy.keep;
            kept && seen.says == Says::Holds && !policy.by_clock
        });
        let Some(clear) = clear else { return Some(episode) };
        episode.watch = None;
        self.lower(&mut episode, CLOUD, clear, seen.from, now);
        self.put(key.clone(), episode);
        self.open.get_mut(key).and_then(|open| open.remove(seen.labels))
    }

    fn holds(&mut self, policy: &Policy, episode: &mut Episode, seen: &Seen<'_>, now: i64) {
        let severity = seen.severity.unwrap_or(policy.severity);
        let is_new = episode.watch.is_none();
        let watch = episode.watch.get_or_insert(Watch {
            from: seen.from,
            last: seen.to(),
            firing: false,
            clear: None,
            revision: seen.moment.1,
        });
        if !watch.firing {
            if seen.to().saturating_sub(watch.from) < policy.hold {
                if is_new && episode.phase == Phase::Pending {
                    self.record(Transition::Pending, seen.to(), now, false, episode);
                }
                return;
            }
            watch.firing = true;
            let from = watch.from;
            let id = id(&policy.hash, seen.device, seen.labels, from);
            let worst = if episode.raised.is_empty() { severity } else { severity.max(episode.severity) };
            (episode.severity, episode.value) = (worst, seen.value);
            let words = policy.words(&episode.id, severity, seen);
            if episode.raised.is_empty() || episode.topic.is_empty() {
                (episode.message, episode.topic) = (policy.message.fill(&words), policy.topic.fill_topic(&words));
            }
            self.raise(episode, CLOUD, &id, from, (seen.to(), now));
            return;
        }
        if watch.clear.take().is_some() {
            self.record(Transition::Held, seen.to(), now, false, episode);
        }
        let rose = severity > episode.severity;
        // The worst of the episode: who hears of severe alerts alone hears of their end, too.
        (episode.severity, episode.value) = (severity.max(episode.severity), seen.value.or(episode.value));
        if episode.phase != Phase::Firing {
            return;
        }
        if episode.quiet == Some(Quiet::Backfill) && !self.is_old(seen.to(), now) {
            self.fill(policy, episode, severity, seen);
            self.tell(episode, Transition::Firing, (seen.to(), now));
        } else if rose || episode.is_worse(policy) {
            self.fill(policy, episode, severity, seen);
            episode.acknowledged = None;
            self.tell(episode, Transition::Worse, (seen.to(), now));
        }
    }

    fn fill(&self, policy: &Policy, episode: &mut Episode, severity: Severity, seen: &Seen<'_>) {
        episode.message = policy.message.fill(&policy.words(&episode.id, severity, seen));
    }

    fn holds_not(&mut self, policy: &Policy, episode: &mut Episode, seen: &Seen<'_>, now: i64) {
        let Some(watch) = &mut episode.watch else { return };
        if !watch.firing {
            episode.watch = None;
            if episode.phase == Phase::Pending {
                // Put nowhere: it never was an alert.
                self.record(Transition::Dropped, seen.to(), now, false, episode);
            }
            return;
        }
        if policy.keep <= 0 {
            let to = seen.from;
            episode.watch = None;
            self.lower(episode, CLOUD, to, seen.to(), now);
            return;
        }
        match watch.clear {
            None => {
                watch.clear = Some(seen.from);
                episode.clear_at = self.heard;
                self.record(Transition::Clearing, seen.to(), now, false, episode);
            }
            Some(clear) if seen.to().saturating_sub(clear) >= policy.keep => {
                episode.watch = None;
                self.lower(episode, CLOUD, clear, seen.to(), now);
            }
            Some(_) => {}
        }
    }
}
