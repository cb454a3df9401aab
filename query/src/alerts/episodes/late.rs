//! What rows say in the order of event time takes the place of what was found of them as they came.
//!
//! For a label set, over a stretch of event time, there are the intervals of the ordered run (`history`) and the alerts that are
//! known. Intervals that meet what stays of an alert whatever comes late ([`Episode::stays`]: above all what people were told)
//! are that alert, and it lasts as long as all of them together; so may several alerts become one, of which the first goes on
//! and the others are its aliases. Intervals that meet none are alerts of their own, told when they are not too old. Of an
//! alert of which nothing stays, the end becomes that of the interval that begins with it; when there is none, it is dropped. What was
//! not read by the stretch is left alone; when all was, rows that come next go on from where the ordered run stands.
//!
//! So the alerts of a label set are always its intervals in the order of event time together with the intervals that people were
//! told, those that meet being one.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::super::episode::{CLOUD, Episode, Phase, Policy, Raised, Watch, id as id_of};
use super::super::history::{Found, Ordered};
use super::{Episodes, RuleKey, Transition};

/// What was read in the order of event time, µs, the end not included. `whole` when it was read to its newest row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) from: i64,
    pub(crate) to: i64,
    pub(crate) whole: bool,
}

/// What belongs together.
#[derive(Debug)]
struct Group {
    from: i64,
    to: i64,
    /// Of its last part: what begins with it is the same, even if that has no length.
    begin: i64,
    found: Vec<Found>,
    known: Vec<Episode>,
}

impl Group {
    fn meets(&self, from: i64, to: i64) -> bool {
        from < self.to && self.from < to || from == self.begin || from == self.from
    }
}

impl Episode {
    /// What of it stays, whatever comes late: what people were told of it, or did to it, and what edges say.
    fn stays(&self) -> Option<(i64, i64)> {
        let end = |to: Option<i64>, open: i64| to.unwrap_or(open);
        let told = self.told_as.or(self.told.then(|| (self.from, end(self.to, self.from))));
        let by_hand =
            (self.acknowledged.is_some() || self.assigned.is_some()).then(|| (self.from, end(self.to, self.from)));
        let ended_by_hand = self.ended_by_hand.map(|at| (self.from, at.max(self.from)));
        let edges = self.raised.iter().filter(|(origin, _)| *origin != CLOUD);
        let edges = edges.map(|(_, raised)| (raised.from, end(raised.to, i64::MAX)));
        edges
            .chain(told)
            .chain(by_hand)
            .chain(ended_by_hand)
            .reduce(|one, other| (one.0.min(other.0), one.1.max(other.1)))
    }

    /// People are told of it, as it is now: of what still fires the beginning alone.
    pub(super) fn is_told_as(&mut self) {
        let now = (self.from, self.to.unwrap_or(self.from));
        self.told_as = self.told_as.into_iter().chain([now]).reduce(hull);
    }

    /// Event times in which the cloud's own rule says that it fires.
    pub(crate) fn own(&self) -> Option<(i64, Option<i64>)> {
        self.raised.get(CLOUD).map(|raised| (raised.from, raised.to))
    }
}

impl Episodes {
    /// Whether a row lies in an alert that says so already, so that it says nothing new.
    pub(crate) fn knows(&self, policy: &Policy, labels: &str, from: i64, to: i64) -> bool {
        let key = (policy.name.clone(), policy.hash.clone());
        let open = self.open.get(&key).and_then(|open| open.get(labels));
        let open = open.filter(|episode| episode.watch.as_ref().is_none_or(|watch| watch.clear.is_none()));
        let mut ended = self.ended_of(&key, labels);
        let is_within = |episode: &Episode| {
            episode.own().is_some_and(|(begin, end)| begin <= from && end.is_none_or(|end| to < end))
        };
        open.is_some_and(is_within) || ended.any(is_within)
    }

    /// Takes what the ordered run says of a label set. `known` are its alerts in the record that have ended, as they are now.
    pub(crate) fn reconcile(
        &mut self,
        policy: &Policy,
        (labels, stretch): (&str, Stretch),
        ordered: Ordered,
        known: Vec<Episode>,
        now: i64,
    ) {
        let key = (policy.name.clone(), policy.hash.clone());
        let open = self.open.get_mut(&key).and_then(|open| open.remove(labels));
        let (mut pending, firing) = match open {
            Some(open) if open.phase == Phase::Pending => (Some(open), None),
            other => (None, other),
        };
        let mut all: Vec<Episode> = firing.into_iter().chain(self.ended_of(&key, labels).cloned()).collect();
        for episode in known {
            if !all.iter().any(|at_hand| at_hand.id == episode.id) {
                all.push(episode);
            }
        }
        let is_read = |episode: &Episode| {
            episode.from < stretch.to && (episode.is_raised() || episode.to.is_none_or(|to| to >= stretch.from))
        };
        let (all, beyond): (Vec<Episode>, Vec<Episode>) = all.into_iter().partition(is_read);
        let ids: BTreeSet<String> = all.iter().chain(&beyond).map(|episode| episode.id.clone()).collect();
        for episode in beyond.into_iter().filter(|episode| episode.phase != Phase::Resolved || episode.is_raised()) {
            self.put(key.clone(), episode);
        }
        let Ordered { mut found, mut open } = ordered;
        cut(&mut found, &mut open, &all, stretch);
        let (groups, withdrawn) = together(found, all);
        for mut episode in withdrawn {
            self.forget(&key, &episode);
            episode.watch = None;
            self.record(Transition::Dropped, episode.from, now, false, &mut episode);
        }
        // What was pending fired and ended: it is recorded anew, with the same id, behind this.
        let has_ended = |pending: &mut Episode| {
            let mut found = groups.iter().flat_map(|group| &group.found);
            found.any(|found| found.alert.from == pending.from && found.alert.to.is_some())
        };
        if let Some(mut over) = pending.take_if(has_ended) {
            over.watch = None;
            self.record(Transition::Dropped, over.from, now, false, &mut over);
        }
        let mut goes_on = stretch.whole;
        for group in groups {
            let is_open = group.found.iter().any(|found| found.alert.to.is_none());
            if group.known.iter().any(|known| known.ended_by_hand.is_some()) {
                // Somebody ended it: what is found there belongs to it, and changes nothing.
                goes_on &= !is_open;
                group.known.into_iter().for_each(|known| self.put(key.clone(), known));
                continue;
            }
            let watch = open.as_ref().filter(|_| is_open).and_then(|open| open.watch.clone());
            let begun = group.found.first().map(|found| found.alert.from);
            let lasted = pending.take_if(|pending| is_open && Some(pending.from) == begun);
            self.settle(policy, &key, (group, lasted), (watch, stretch), &ids, now);
        }
        if goes_on {
            self.go_on(policy, &key, (labels, pending), open, now);
        } else if let Some(pending) = pending {
            self.put(key, pending);
        }
    }

    /// A group becomes one alert.
    fn settle(
        &mut self,
        policy: &Policy,
        key: &RuleKey,
        (group, pending): (Group, Option<Episode>),
        (watch, stretch): (Option<Watch>, Stretch),
        ids: &BTreeSet<String>,
        now: i64,
    ) {
        let Group { found, mut known, .. } = group;
        // What stays goes on, the first of it.
        known.sort_by_key(|known| (known.stays().is_none(), known.from));
        // What of it had ended before the stretch is as it was.
        let own = known.iter().filter_map(|known| known.raised.get(CLOUD));
        let before = own.filter(|own| own.to.is_some_and(|to| to < stretch.from)).min_by_key(|own| own.from).cloned();
        let mut all = known.into_iter().chain(pending);
        let Some(mut first) = all.next() else {
            return self.is_new(policy, key, (&found, ids), watch, now);
        };
        let was = first.clone();
        for mut other in all {
            if other.phase == Phase::Pending {
                other.watch = None;
                self.record(Transition::Dropped, other.from, now, false, &mut other);
                continue;
            }
            other.aliases.iter().chain([&other.id]).for_each(|id| first.alias(id));
            for (origin, raised) in std::mem::take(&mut other.raised) {
                first.raised.entry(origin).or_insert(raised);
            }
            first.acknowledged = first.acknowledged.take().or(other.acknowledged.take());
            first.assigned = first.assigned.take().or(other.assigned.take());
            let stays = other.stays().into_iter().chain(first.stays()).reduce(hull);
            first.told_as = stays.filter(|_| first.told || other.told);
            self.forget(key, &other);
            let is_told = other.told && other.phase == Phase::Firing;
            (other.phase, other.watch, other.merged_into) = (Phase::Resolved, None, Some(first.id.clone()));
            let end = other.from;
            other.to.get_or_insert(end);
            let transition = if is_told { Transition::Resolved } else { Transition::Merged };
            self.record(transition, other.from, now, is_told, &mut other);
        }
        let stays = first.stays();
        let own = found.first().map(|begun| {
            let to = if found.iter().any(|found| found.alert.to.is_none()) {
                None
            } else {
                found.iter().filter_map(|found| found.alert.to).max()
            };
            Raised { id: begun.alert.id.clone(), from: begun.alert.from, to, fired: begun.fired }
        });
        let own = match (before, own) {
            (Some(before), Some(own)) => Some(Raised { to: own.to, ..before }),
            (before, own) => before.or(own),
        };
        if let Some(own) = &own {
            first.raised.insert(CLOUD.to_owned(), own.clone());
        } else if let Some(raised) = first.raised.get_mut(CLOUD) {
            // What people were told, and never was.
            raised.from = stays.map_or(raised.from, |(from, _)| from);
            raised.to = Some(raised.from);
        }
        let parts = || first.raised.values().map(|raised| (raised.from, raised.to.unwrap_or(i64::MAX))).chain(stays);
        let (from, to) = parts().reduce(hull).unwrap_or((first.from, first.from));
        let is_raised = first.is_raised();
        first.from = from;
        if stretch.whole {
            let clear = |watch: &Option<Watch>| watch.as_ref().and_then(|watch| watch.clear);
            if clear(&first.watch) != clear(&watch) {
                first.clear_at = self.heard;
            }
            first.watch = watch;
        }
        let newest = first.watch.as_ref().map_or(to, |watch| watch.last);
        match (was.phase, is_raised) {
            (Phase::Pending, _) => {
                let Some(own) = own else { return };
                (first.severity, first.value) = (found[0].alert.severity, found[0].alert.value);
                first.message.clone_from(&found[0].alert.message);
                first.topic.clone_from(&found[0].alert.topic);
                self.raise(&mut first, CLOUD, &own.id, own.from, (newest, now));
            }
            (Phase::Resolved, true) => {
                (first.phase, first.to, first.unsettled_at) = (Phase::Firing, None, None);
                self.forget(key, &was);
                self.tell(&mut first, Transition::Firing, (newest, now));
            }
            (Phase::Firing, false) => {
                (first.phase, first.to, first.stale) = (Phase::Resolved, Some(to), false);
                let told = first.told;
                self.record(Transition::Resolved, to, now, told, &mut first);
            }
            _ => {
                if first.phase == Phase::Resolved {
                    first.to = Some(to);
                }
                let mut before = was;
                if let (Some(before), Some(watch)) = (&mut before.watch, &first.watch) {
                    (before.last, before.revision) = (watch.last, watch.revision);
                }
                if first != before {
                    self.record(Transition::Merged, newest, now, false, &mut first);
                }
            }
        }
        self.put(key.clone(), first);
    }

    /// It meets none that is known, of which these are the ids.
    fn is_new(
        &mut self,
        policy: &Policy,
        key: &RuleKey,
        (found, ids): (&[Found], &BTreeSet<String>),
        watch: Option<Watch>,
        now: i64,
    ) {
        let Some(begun) = found.first() else { return };
        let is_open = found.iter().any(|found| found.alert.to.is_none());
        if is_open && self.open.get(key).map_or(0, HashMap::len) >= policy.instances_max {
            *self.refused.entry(policy.name.clone()).or_default() += 1;
            return;
        }
        let mut alert = begun.alert.clone();
        let from = alert.from;
        // One that began then, and turned out to have begun earlier, keeps the id.
        while ids.contains(&alert.id) {
            alert.id = id_of(&policy.hash, Some(&alert.id), &alert.labels, from);
        }
        let id = alert.id.clone();
        let mut episode = Episode { phase: Phase::Pending, told: false, told_as: None, quiet: None, to: None, ..alert };
        episode.raised =
            BTreeMap::from([(CLOUD.to_owned(), Raised { id: id.clone(), from, to: None, fired: begun.fired })]);
        let newest = watch.as_ref().map_or(begun.fired, |watch| watch.last);
        // Before it is recorded: a restart goes on from there.
        (episode.watch, episode.clear_at) = (watch, self.heard);
        self.raise(&mut episode, CLOUD, &id, from, (newest, now));
        if let Some(to) = found.iter().filter_map(|found| found.alert.to).max().filter(|_| !is_open) {
            self.lower(&mut episode, CLOUD, to, to, now);
        }
        self.put(key.clone(), episode);
    }

    /// What is pending, or nothing, is as the ordered run says.
    fn go_on(
        &mut self,
        policy: &Policy,
        key: &RuleKey,
        (labels, pending): (&str, Option<Episode>),
        open: Option<Episode>,
        now: i64,
    ) {
        let watch = open.as_ref().and_then(|open| open.watch.clone()).filter(|watch| !watch.firing);
        let fires = self.open.get(key).is_some_and(|open| open.contains_key(labels));
        let mut pending = pending;
        let is_over = |pending: &mut Episode| fires || watch.as_ref().is_none_or(|watch| watch.from != pending.from);
        if let Some(mut over) = pending.take_if(is_over) {
            over.watch = None;
            self.record(Transition::Dropped, over.from, now, false, &mut over);
        }
        if let Some(firing) = self.open.get_mut(key).and_then(|open| open.get_mut(labels)) {
            // Raised by edges, or by rows: then it has its watch.
            if firing.watch.as_ref().is_none_or(|watch| !watch.firing) {
                firing.watch = watch;
            }
            return;
        }
        match (pending, watch, open) {
            (Some(mut pending), watch, _) => {
                pending.watch = watch;
                self.put(key.clone(), pending);
            }
            (None, Some(_), Some(mut open)) if self.open.get(key).map_or(0, HashMap::len) < policy.instances_max => {
                self.record(Transition::Pending, open.from, now, false, &mut open);
                self.put(key.clone(), open);
            }
            (None, _, _) => {}
        }
    }
}

/// Where the ordered run was left while it fired, the alert that is known says how it goes on; and one that was ended by the
/// clock, while it was kept firing, has ended.
fn cut(found: &mut [Found], open: &mut Option<Episode>, known: &[Episode], stretch: Stretch) {
    let Some(last) = found.last_mut().filter(|found| found.alert.to.is_none()) else { return };
    let from = last.alert.from;
    if !stretch.whole {
        let same = known.iter().filter_map(Episode::own).find(|(begin, _)| *begin == from);
        last.alert.to = same.and_then(|(_, to)| to);
        return;
    }
    let Some(clear) = open.as_ref().and_then(|open| open.watch.as_ref()?.clear) else { return };
    let mut met =
        known.iter().filter(|known| known.own().is_some() && known.to.is_none_or(|to| from < to || from == known.from));
    if met.clone().next().is_some() && met.all(|known| known.own().is_some_and(|(_, to)| to.is_some())) {
        (last.alert.to, *open) = (Some(clear.max(from)), None);
    }
}

fn hull(one: (i64, i64), other: (i64, i64)) -> (i64, i64) {
    (one.0.min(other.0), one.1.max(other.1))
}

/// Intervals and alerts that belong together, in order of time; and the alerts that there are none for.
fn together(found: Vec<Found>, known: Vec<Episode>) -> (Vec<Group>, Vec<Episode>) {
    enum Part {
        Found(Box<Found>),
        Known(Box<Episode>),
    }
    let mut parts: Vec<(i64, i64, Part)> = Vec::new();
    let mut loose = Vec::new();
    for found in found {
        parts.push((found.alert.from, found.alert.to.unwrap_or(i64::MAX), Part::Found(Box::new(found))));
    }
    for known in known {
        match known.stays() {
            Some((from, to)) => parts.push((from, to, Part::Known(Box::new(known)))),
            None => loose.push(known),
        }
    }
    parts.sort_by_key(|(from, to, _)| (*from, *to));
    let mut groups: Vec<Group> = Vec::new();
    for (from, to, part) in parts {
        if !groups.last().is_some_and(|group| group.meets(from, to)) {
            groups.push(Group { from, to, begin: from, found: Vec::new(), known: Vec::new() });
        }
        let Some(group) = groups.last_mut() else { continue };
        (group.to, group.begin) = (group.to.max(to), from);
        match part {
            Part::Found(found) => group.found.push(*found),
            Part::Known(known) => group.known.push(*known),
        }
    }
    loose.sort_by_key(|known| known.from);
    let mut withdrawn = Vec::new();
    for known in loose {
        // Its id says when it began: what begins at another time is another alert.
        let begins = |group: &&mut Group| group.found.first().is_some_and(|found| found.alert.from == known.from);
        match groups.iter_mut().find(begins) {
            Some(group) => group.known.push(known),
            None => withdrawn.push(known),
        }
    }
    (groups, withdrawn)
}
