//! Rows that come late: after all have come, the alerts are those of the ordered run together with what people were told.

use super::super::super::history::Ordered;
use super::super::super::late::{Late, Task};
use super::super::late::Stretch;
use super::*;
use crate::follow::Position;

const LABELS: &str = "{\"device\":\"d\"}";

/// Beginning, end, and since when it does not hold while it is kept firing; s.
type Interval = (i64, Option<i64>, Option<i64>);

/// What a rule means, written down once more: intervals of rows in order.
pub(crate) fn ordered(rows: &[(i64, bool)], hold: i64, keep: i64) -> Vec<Interval> {
    let mut rows = rows.to_vec();
    rows.sort_unstable();
    let (mut found, mut begun, mut open): (Vec<Interval>, Option<i64>, bool) = (Vec::new(), None, false);
    for (ts, holds) in rows {
        if open {
            let (_, end, clear) = found.last_mut().unwrap();
            let has_ended = clear.filter(|clear| ts - *clear >= keep);
            match (holds, has_ended) {
                (true, None) => *clear = None,
                (false, None) if keep == 0 => (*end, *clear, open) = (Some(ts), None, false),
                (false, None) => *clear = clear.or(Some(ts)),
                (_, Some(at)) => (*end, *clear, open) = (Some(at), None, false),
            }
            if open || !holds {
                continue;
            }
            begun = None;
        }
        begun = if holds { begun.or(Some(ts)) } else { None };
        if let Some(from) = begun.filter(|from| ts - from >= hold) {
            found.push((from, None, None));
            (begun, open) = (None, true);
        }
    }
    found
}

/// Intervals together with what people were told, those that meet being one. What was told and has no end yet is its beginning.
pub(crate) fn expected(found: &[Interval], told: &[(i64, Option<i64>)]) -> Vec<Interval> {
    let told = told.iter().map(|(from, to)| (*from, Some(to.unwrap_or(*from)), None));
    let mut all: Vec<Interval> = found.iter().copied().chain(told).collect();
    let end = |to: Option<i64>| to.unwrap_or(i64::MAX);
    all.sort_by_key(|(from, to, _)| (*from, end(*to)));
    let mut groups: Vec<(Interval, i64)> = Vec::new();
    for (from, to, clear) in all {
        match groups.last_mut() {
            Some((group, begin)) if from < end(group.1) || from == *begin || from == group.0 => {
                (group.1, group.2) = (group.1.zip(to).map(|(one, other)| one.max(other)), group.2.or(clear));
                *begin = from;
            }
            _ => groups.push(((from, to, clear), from)),
        }
    }
    groups.into_iter().map(|(group, _)| group).collect()
}

/// What people were told of each alert, with what became one with it: from the first beginning to the last end.
pub(crate) fn told<'c>(changes: impl Iterator<Item = (bool, &'c Episode)>) -> BTreeMap<String, (i64, i64)> {
    let mut told: BTreeMap<String, (i64, i64)> = BTreeMap::new();
    let add = |told: &mut BTreeMap<String, (i64, i64)>, id: &str, (from, to): (i64, i64)| {
        let all = told.entry(id.to_owned()).or_insert((from, to));
        *all = (all.0.min(from), all.1.max(to));
    };
    for (is_told, alert) in changes {
        if is_told {
            add(&mut told, &alert.id, (alert.from, alert.to.unwrap_or(alert.from)));
        }
        if let Some(into) = &alert.merged_into
            && let Some(own) = told.remove(&alert.id)
        {
            add(&mut told, into, own);
        }
    }
    told
}

/// Whether alerts are as expected: one that is kept firing may have been ended by the clock.
pub(crate) fn is_as(expected: &[Interval], known: &[(i64, Option<i64>)]) -> bool {
    expected.len() == known.len()
        && expected.iter().zip(known).all(|((from, to, clear), (known_from, known_to))| {
            let ended_by_clock = to.is_none() && known_to.is_some_and(|to| clear.is_some_and(|clear| to >= clear));
            from == known_from && (to == known_to || ended_by_clock)
        })
}

struct Rows {
    stage: Stage,
    policy: Arc<Policy>,
    table: Vec<(i64, bool)>,
    newest: i64,
    late: Option<Late>,
    changes: Vec<Change>,
}

impl Rows {
    fn new(stage: Stage, policy: &Arc<Policy>) -> Self {
        let policy = Arc::clone(policy);
        Self { stage, policy, table: Vec::new(), newest: i64::MIN, late: None, changes: Vec::new() }
    }

    fn seen<'s>(labels: &'s str, ts: i64, holds: bool) -> Seen<'s> {
        Seen {
            labels,
            device: Some("d"),
            says: if holds { Says::Holds } else { Says::Not },
            from: NOW + ts * S,
            moment: (NOW + ts * S, 0),
            severity: None,
            value: Some(1.0),
            values: &Words::new,
        }
    }

    fn arrive(&mut self, ts: i64, holds: bool) {
        self.table.push((ts, holds));
        let at = NOW + ts * S;
        let is_late = if ts < self.newest {
            !holds || !self.stage.episodes.knows(&self.policy, LABELS, at, at)
        } else {
            self.newest = ts;
            !self.stage.episodes.see(&self.policy, &Self::seen(LABELS, ts, holds), self.stage.now)
        };
        if is_late {
            let key = (self.policy.name.clone(), self.policy.hash.clone());
            let devices = Some(BTreeSet::from(["d".to_owned()]));
            let late = Late { from: at, to: at, rules: BTreeSet::from([key]), devices, rows: 1 };
            match &mut self.late {
                Some(known) => known.add(late),
                None => self.late = Some(late),
            }
        }
    }

    /// As the task does, with parts of this length, s.
    fn judge(&mut self, mut part: impl FnMut() -> i64) {
        let Some(late) = self.late.take() else { return };
        self.note();
        let policy = Arc::clone(&self.policy);
        let ended = |alert: &Episode| alert.phase == Phase::Resolved && !alert.is_raised();
        let recorded: Vec<Episode> = self.last().into_values().filter(ended).collect();
        let open = self.stage.episodes.open_of(&policy).into_iter().flat_map(HashMap::values);
        let open = open.filter(|open| open.own().is_some() || open.watch.is_some()).cloned().collect();
        let newest = NOW + self.newest * S;
        let stream = "s".parse().unwrap();
        let task =
            Task { stream, late, rules: Vec::new(), rows_max: u64::MAX, position: Position::default(), newest, open };
        let start = task.late.begins(std::iter::once(&*policy));
        let (mut known, mut history, mut from) = (HashMap::new(), None, start);
        self.table.sort_unstable();
        let (history, stretch) = loop {
            let to = from.max(NOW) + part() * S;
            let within = recorded.iter().filter(|alert| alert.from < to && alert.to.is_some_and(|to| to >= from));
            known.extend(within.map(|alert| (alert.id.clone(), alert.clone())));
            let mut ordered = history.take().unwrap_or_else(|| task.history(&policy, start, &known));
            let read = self.table.iter().filter(|(ts, _)| (from..to).contains(&(NOW + ts * S)));
            read.for_each(|(ts, holds)| ordered.see(&policy, &Self::seen(LABELS, *ts, *holds)));
            let whole = to > newest;
            if whole || to > task.late.to && task.agrees(&policy, &ordered, to, &known) {
                break (ordered, Stretch { from: start, to: if whole { i64::MAX } else { to }, whole });
            }
            (history, from) = (Some(ordered), to);
        };
        let ordered = history.finish().remove(LABELS).unwrap_or_else(Ordered::default);
        let known = known.into_values().collect();
        self.stage.episodes.reconcile(&policy, (LABELS, stretch), ordered, known, self.stage.now);
    }

    fn restart(&mut self) {
        self.note();
        self.stage.restarted(&self.changes, &[&Arc::clone(&self.policy)]);
    }

    /// Whoever listens hears of each alert that it fires, then that it has ended, and so on.
    fn is_told_in_turn(&self) -> bool {
        let mut fires: BTreeMap<&str, bool> = BTreeMap::new();
        self.changes.iter().filter(|change| change.told).all(|change| {
            let Subject::Alert(alert) = &change.subject else { return false };
            let fires = fires.entry(&alert.id).or_default();
            match change.transition {
                Transition::Firing => !std::mem::replace(fires, true),
                Transition::Resolved => std::mem::replace(fires, false),
                _ => *fires,
            }
        })
    }

    fn note(&mut self) {
        self.changes.extend(self.stage.episodes.take());
    }

    /// The alerts of the record, as they are now.
    fn last(&self) -> BTreeMap<String, Episode> {
        let mut last = BTreeMap::new();
        for change in &self.changes {
            let Subject::Alert(alert) = &change.subject else { continue };
            last.insert(alert.id.clone(), Episode::clone(alert));
            if change.transition == Transition::Dropped || alert.merged_into.is_some() {
                last.remove(&alert.id);
            }
        }
        last
    }

    fn known(&self) -> Vec<(i64, Option<i64>)> {
        let fired = self.last().into_values().filter(|alert| alert.phase != Phase::Pending);
        let seconds = |at: i64| (at - NOW) / S;
        let mut known: Vec<_> = fired.map(|alert| (seconds(alert.from), alert.to.map(seconds))).collect();
        known.sort_by_key(|(from, to)| (*from, to.unwrap_or(i64::MAX)));
        known
    }

    fn told(&self) -> Vec<(i64, Option<i64>)> {
        let alerts = self.changes.iter().filter_map(|change| match &change.subject {
            Subject::Alert(alert) => Some((change.told, &**alert)),
            _ => None,
        });
        let seconds = |at: i64| (at - NOW) / S;
        told(alerts).into_values().map(|(from, to)| (seconds(from), Some(seconds(to)))).collect()
    }
}

/// Takes some hundred decisions at random; the rows that came, and whether they came in order.
fn run(random: &mut StdRng) -> (Rows, i64, i64) {
    let (hold, keep) = (random.random_range(0..3) * 4, random.random_range(0..3) * 4);
    let policy = policy(|policy| (policy.hold, policy.keep) = (hold * S, keep * S));
    let mut stage = Stage::new(&[&policy]);
    // Some of it happened too long ago for anybody to be told.
    stage.now += random.random_range(0..2) * (HORIZON + random.random_range(-20..100) * S);
    stage.episodes.tick(stage.now);
    let mut rows = Rows::new(stage, &policy);
    let (mut ts, mut all, bias) = (0, Vec::new(), random.random_range(0.2..0.8));
    for _ in 0..random.random_range(1..40) {
        ts += random.random_range(1..5);
        all.push((ts, random.random_bool(bias)));
    }
    let reach = [0, 2, 30][random.random_range(0..3)];
    let mut coming: Vec<(i64, (i64, bool))> =
        all.iter().map(|row| (row.0 + random.random_range(0..=reach), *row)).collect();
    for _ in 0..random.random_range(0..3) {
        let (at, row) = coming[random.random_range(0..coming.len())];
        coming.push((at + random.random_range(0..30), row));
    }
    coming.sort_by_key(|(at, _)| *at);
    for (_, (ts, holds)) in coming {
        rows.arrive(ts, holds);
        match random.random_range(0..20) {
            0..4 => rows.judge(|| random.random_range(1..60)),
            4 => rows.restart(),
            5 => rows.stage.tick(random.random_range(1..8)),
            _ => {}
        }
    }
    rows.judge(|| random.random_range(1..60));
    rows.note();
    (rows, hold, keep)
}

#[test]
fn after_all_rows_have_come_the_alerts_are_those_of_the_ordered_run() {
    let seed = std::env::var("WEIR_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random::<u64>);
    let cases = std::env::var("WEIR_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(5_000_u64);
    println!("WEIR_SEED={seed}");
    let (mut lates, mut untold, mut merged) = (0, 0, 0);
    for case in 0..cases {
        let mut random = StdRng::seed_from_u64(seed.wrapping_add(case));
        let (rows, hold, keep) = run(&mut random);
        let found = ordered(&rows.table, hold, keep);
        let (known, told) = (rows.known(), rows.told());
        let wanted = expected(&found, &told);
        let explain = || {
            let words: Vec<String> = rows
                .changes
                .iter()
                .map(|change| {
                    let Subject::Alert(alert) = &change.subject else { return String::new() };
                    let mark = if change.told { "!" } else { "" };
                    let (from, to) = ((alert.from - NOW) / S, alert.to.map(|to| (to - NOW) / S));
                    format!("{}{mark} {} {from} {to:?} {:?}", change.transition.word(), &alert.id[..4], alert.raised)
                })
                .collect();
            format!(
                "WEIR_SEED={} for {hold} keep {keep}\n{:?}\ntold {told:?}\n{words:#?}",
                seed.wrapping_add(case),
                rows.table
            )
        };
        assert!(rows.is_told_in_turn(), "{}", explain());
        assert!(is_as(&wanted, &known), "{known:?}\nand not {wanted:?}\n{}", explain());
        lates += usize::from(rows.table.is_sorted());
        untold += usize::from(!known.is_empty() && told.is_empty());
        merged += rows.changes.iter().filter(|change| change.transition == Transition::Merged).count();
    }
    println!("{lates} in order, {untold} that nobody was told of, {merged} times another interval");
    assert!(untold > 0 && merged > 0);
}

/// As far as there are rows.
fn whole() -> i64 {
    1_000_000
}

fn stage(change: impl FnOnce(&mut Policy)) -> Rows {
    let rule = policy(change);
    Rows::new(Stage::new(&[&rule]), &rule)
}

/// What the record has of an alert that late rows found is all that a restart knows.
#[test]
fn an_alert_that_late_rows_find_goes_on_after_a_restart() {
    let mut rows = stage(|policy| policy.hold = 4 * S);
    rows.arrive(10, true);
    rows.arrive(2, true);
    rows.judge(whole);
    rows.restart();
    assert_eq!(rows.known(), [(2, None)]);
    rows.arrive(12, false);
    rows.note();
    assert_eq!((rows.known(), rows.late.is_none()), (vec![(2, Some(12))], true));
}

#[test]
fn what_nobody_was_told_is_one_alert_when_it_is_read_again_from_its_middle() {
    let mut rows = stage(|policy| policy.keep = 4 * S);
    rows.stage.tick(HORIZON / S + 100);
    for (ts, holds) in [(6, true), (8, true), (17, false), (30, false)] {
        rows.arrive(ts, holds);
    }
    rows.arrive(12, false);
    rows.judge(whole);
    rows.note();
    assert_eq!((rows.known(), rows.told()), (vec![(6, Some(12))], Vec::new()));
}

/// A stretch does not end in a row that holds no more: what follows depends on since when it has not held.
#[test]
fn what_is_kept_firing_is_read_until_it_is_clear_whether_it_goes_on() {
    let mut rows = stage(|policy| policy.keep = 4 * S);
    for ts in [1, 7, 11, 19, 21] {
        rows.arrive(ts, true);
    }
    for ts in [5, 13, 15] {
        rows.arrive(ts, false);
    }
    let mut parts = [15, 30].into_iter();
    rows.judge(|| parts.next().unwrap());
    rows.note();
    assert_eq!(rows.known(), [(1, Some(13)), (19, None)]);
}

/// Nor while something is pending of which it is not known whether it began then.
#[test]
fn what_is_pending_is_read_from_its_beginning() {
    let mut rows = stage(|policy| policy.hold = 8 * S);
    for (ts, holds) in [(0, true), (7, true), (3, false)] {
        rows.arrive(ts, holds);
    }
    let mut parts = [4, 30].into_iter();
    rows.judge(|| parts.next().unwrap());
    rows.arrive(9, true);
    rows.note();
    assert_eq!(rows.known(), []);
    rows.arrive(15, true);
    rows.note();
    assert_eq!(rows.known(), [(7, None)]);
}

/// The rows before a stretch are not read again: what they were found to say stays.
#[test]
fn what_ended_before_the_stretch_is_as_it_was() {
    let mut rows = stage(|_| {});
    rows.arrive(27, true);
    rows.arrive(41, false);
    for (ts, holds) in [(23, true), (36, false)] {
        rows.arrive(ts, holds);
    }
    rows.judge(whole);
    for (ts, holds) in [(38, false), (40, true)] {
        rows.arrive(ts, holds);
    }
    rows.judge(whole);
    rows.note();
    // From what late rows said first to the end that people were told.
    assert_eq!((rows.known(), rows.told()), (vec![(23, Some(41))], vec![(27, Some(41))]));
}

#[test]
fn what_somebody_has_ended_is_as_they_said() {
    let mut rows = stage(|_| {});
    rows.arrive(0, true);
    rows.stage.tick(20);
    let id = rows.stage.episodes.open().next().unwrap().id.clone();
    rows.stage.episodes.resolve(&id, "eva", "", rows.stage.now).unwrap();
    for (ts, holds) in [(30, false), (5, false), (7, true)] {
        rows.arrive(ts, holds);
    }
    rows.judge(whole);
    rows.note();
    assert_eq!(rows.known(), [(0, Some(20))]);
}

/// Older ones that late rows find do not take the places of those that edges may still extend.
#[test]
fn the_last_that_ended_are_at_hand_whenever_they_are_found() {
    let mut rows = stage(|_| {});
    for alert in 0..10 {
        rows.arrive(100 + 10 * alert, true);
        rows.arrive(105 + 10 * alert, false);
    }
    rows.arrive(10, true);
    rows.arrive(15, false);
    rows.judge(|| 18);
    rows.note();
    assert_eq!((rows.known()[0], rows.known().len()), ((10, Some(15)), 11));
    let key = (rows.policy.name.clone(), rows.policy.hash.clone());
    let at_hand: Vec<i64> = rows.stage.episodes.ended_of(&key, LABELS).map(|alert| (alert.from - NOW) / S).collect();
    assert_eq!(at_hand, (0..8).map(|alert| 120 + 10 * alert).collect::<Vec<_>>());
}

/// The last row of an id is what it is.
#[test]
fn what_was_pending_and_late_rows_say_fired_and_ended_is_no_dropped_alert() {
    let mut rows = stage(|policy| policy.hold = 4 * S);
    rows.arrive(10, true);
    // A row that says nothing to the rule.
    rows.newest = 20;
    rows.arrive(15, true);
    rows.arrive(16, false);
    rows.judge(whole);
    rows.note();
    assert_eq!(rows.known(), [(10, Some(16))]);
    assert_eq!(rows.changes.last().map(|change| (change.transition, change.told)), Some((Transition::Resolved, true)));
}

#[test]
fn what_people_were_told_of_several_ends_stays_from_the_first_to_the_last() {
    let mut rows = stage(|policy| policy.keep = 10 * S);
    for (ts, holds) in [(0, true), (25, false), (36, false), (40, true)] {
        rows.arrive(ts, holds);
    }
    // It did not end, and the two were one: that the first fires is told once more.
    rows.arrive(30, true);
    rows.judge(whole);
    rows.note();
    assert_eq!(rows.known(), [(0, None)]);
    rows.arrive(5, false);
    rows.arrive(15, false);
    rows.judge(whole);
    rows.note();
    assert_eq!((rows.known(), rows.is_told_in_turn()), (vec![(0, None)], true));
}

/// Late rows at the beginning of a long history read no more of it than they change.
#[test]
fn a_stretch_ends_where_all_is_as_it_was() {
    let mut rows = stage(|_| {});
    for ts in 0..50 {
        rows.arrive(10 * ts, ts % 2 == 0);
    }
    rows.note();
    let (known, before) = (rows.known(), rows.changes.len());
    rows.arrive(105, true);
    let mut parts = 0;
    rows.judge(|| {
        parts += 1;
        125
    });
    rows.note();
    assert_eq!((rows.known(), parts), (known.clone(), 1), "it lies in an alert");
    rows.arrive(112, true);
    rows.judge(|| {
        parts += 1;
        118
    });
    rows.note();
    let known: Vec<_> = known.iter().map(|known| if known.0 == 120 { (112, known.1) } else { *known }).collect();
    assert_eq!((rows.known(), parts), (known, 2));
    assert!(rows.changes.len() > before);
}

#[test]
fn what_people_were_told_stays_and_the_rest_is_as_it_was() {
    let rule = policy(|policy| policy.keep = 10 * S);
    let stage = Stage::new(&[&rule]);
    let mut rows = Rows::new(stage, &rule);
    for (ts, holds) in [(0, true), (5, false), (16, false), (20, true), (25, false), (36, false)] {
        rows.arrive(ts, holds);
    }
    rows.note();
    assert_eq!(rows.known(), [(0, Some(5)), (20, Some(25))]);
    let ids: Vec<String> = rows.last().into_keys().collect();
    // Between them it held: they were one, and the first goes on.
    rows.arrive(12, true);
    assert!(rows.late.is_some());
    let late = rows.late.clone();
    rows.judge(whole);
    rows.note();
    let last = rows.last();
    let (id, alert) = last.first_key_value().unwrap();
    assert_eq!((last.len(), rows.known()), (1, vec![(0, Some(25))]));
    assert!(alert.is_called(&ids[0]) && alert.is_called(&ids[1]) && ids.contains(id));
    assert_eq!(alert.from, NOW);
    // Nothing new comes of the same rows.
    let before = rows.changes.len();
    rows.late = late;
    rows.judge(whole);
    rows.note();
    assert_eq!(rows.changes.len(), before);
    // It was shorter, and people were told that it was not.
    rows.arrive(1, false);
    rows.arrive(11, false);
    rows.judge(whole);
    rows.note();
    assert_eq!(rows.known(), [(0, Some(25))]);
}
