//! Alerts that only edges raise which are not heard any more: nobody knows whether they still hold.

use std::collections::{BTreeSet, HashMap};

use super::super::episode::{CLOUD, Episode, Phase};
use super::{Episodes, RuleKey, Transition};

impl Episodes {
    /// The edges that raise alerts.
    pub(crate) fn edges(&self) -> BTreeSet<String> {
        let raised = self.open().flat_map(|episode| episode.raised.iter());
        raised
            .filter(|(origin, raised)| *origin != CLOUD && raised.to.is_none())
            .map(|(edge, _)| edge.clone())
            .collect()
    }

    /// Marks what is raised by edges alone that were heard before `since` last, and takes the mark from others.
    pub(crate) fn mark_stale(&mut self, heard: &HashMap<String, i64>, since: i64, now: i64) {
        let is_silent = |edge: &str| heard.get(edge).is_none_or(|heard| *heard < since);
        let is_stale = |episode: &Episode| {
            let mut open = episode.raised.iter().filter(|(_, raised)| raised.to.is_none()).peekable();
            episode.phase == Phase::Firing
                && open.peek().is_some()
                && open.all(|(origin, _)| origin != CLOUD && is_silent(origin))
        };
        let mut other: Vec<(RuleKey, String)> = Vec::new();
        for (key, open) in &self.open {
            let changed = open.values().filter(|episode| episode.stale != is_stale(episode));
            other.extend(changed.map(|episode| (key.clone(), episode.labels.clone())));
        }
        other.sort();
        for (key, labels) in other {
            let Some(mut episode) = self.open.get_mut(&key).and_then(|open| open.remove(&labels)) else { continue };
            episode.stale = !episode.stale;
            let transition = if episode.stale { Transition::Stale } else { Transition::Heard };
            let told = episode.told && self.quiet(&episode, now, &mut HashMap::new()).is_none();
            self.record(transition, now, now, told, &mut episode);
            self.put(key, episode);
        }
    }
}
