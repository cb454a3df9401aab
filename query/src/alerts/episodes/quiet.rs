//! Why nobody is told of an alert: silences, and other alerts that inhibit it.

use std::collections::HashMap;

use super::super::episode::{Episode, Phase, Quiet};
use super::super::silence::Labels;
use super::Episodes;

impl Episodes {
    /// Why nobody is to be told now. `firing` keeps what was found of rules that inhibit, for one moment.
    pub(super) fn quiet(
        &self,
        episode: &Episode,
        now: i64,
        firing: &mut HashMap<String, Vec<Labels>>,
    ) -> Option<Quiet> {
        let policy = self.policies.get(&episode.rule).filter(|policy| policy.hash == episode.hash);
        let inhibited_by = policy.map_or(&[][..], |policy| &policy.inhibited_by);
        if self.silences.is_empty() && inhibited_by.is_empty() {
            return None;
        }
        let labels = read(&episode.labels);
        if self.silences.values().any(|silence| silence.holds(&episode.rule, &labels, now)) {
            return Some(Quiet::Silenced);
        }
        let inhibits = |name: &String| {
            let others = firing.entry(name.clone()).or_insert_with(|| self.firing(name));
            others.iter().any(|other| agree(other, &labels))
        };
        inhibited_by.iter().any(inhibits).then_some(Quiet::Inhibited)
    }

    /// What fires, somebody was told of, and nothing keeps quiet now.
    pub(crate) fn told_now(&self, now: i64) -> Vec<Episode> {
        let mut firing = HashMap::new();
        let is_told = |episode: &&Episode| {
            episode.phase == Phase::Firing
                && episode.told
                && episode.quiet.is_none()
                && self.quiet(episode, now, &mut firing).is_none()
        };
        self.open().filter(is_told).cloned().collect()
    }

    /// The labels of the alerts of a rule that fire.
    fn firing(&self, name: &str) -> Vec<Labels> {
        let of_rule = self.open.range((name.to_owned(), String::new())..).take_while(|(key, _)| key.0 == name);
        let open = of_rule.flat_map(|(_, open)| open.values());
        let fires = |episode: &&Episode| episode.phase == Phase::Firing && episode.quiet != Some(Quiet::Backfill);
        open.filter(fires).map(|episode| read(&episode.labels)).collect()
    }
}

fn read(labels: &str) -> Labels {
    serde_json::from_str(labels).unwrap_or_default()
}

/// Whether no label that both have says something else.
fn agree(one: &Labels, other: &Labels) -> bool {
    one.iter().all(|(name, value)| other.get(name).is_none_or(|same| same == value))
}
