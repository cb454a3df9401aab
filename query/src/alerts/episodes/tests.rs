use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::episode::{Candidate, Says, Seen, Severity};
use super::super::template::{Message, Places, Words};
use super::*;

mod ended;
pub(in super::super) mod late;

const S: i64 = 1_000_000;
const HORIZON: i64 = 3_600 * S;
/// 2026-01-01.
const NOW: i64 = 1_767_225_600 * S;

fn policy(change: impl FnOnce(&mut Policy)) -> Arc<Policy> {
    let mut policy = plain("high");
    change(&mut policy);
    Arc::new(policy)
}

fn plain(name: &str) -> Policy {
    Policy {
        name: name.to_owned(),
        hash: "00".repeat(16),
        stream: "s".to_owned(),
        hold: 0,
        keep: 0,
        slack: 0,
        severity: Severity::Warning,
        repeat_every: None,
        inhibited_by: Vec::new(),
        worse_by: None,
        instances_max: 1_000,
        by_clock: false,
        message: Message::parse("{{ rule }}: {{ device }}", None).unwrap(),
        topic: Places::parse(USUAL_TOPIC, None).unwrap(),
    }
}

struct Stage {
    episodes: Episodes,
    now: i64,
}

impl Stage {
    fn new(policies: &[&Arc<Policy>]) -> Self {
        let mut episodes = Episodes::new(HORIZON, 0, NOW);
        let policies = policies.iter().map(|policy| (policy.name.clone(), Arc::clone(policy)));
        episodes.govern(policies.collect(), NOW);
        Self { episodes, now: NOW }
    }

    fn see_as(&mut self, policy: &Policy, device: &str, ts: i64, holds: bool, value: f64, severity: Option<Severity>) {
        let labels = format!("{{\"device\":\"{device}\"}}");
        let seen = Seen {
            labels: &labels,
            device: Some(device),
            says: if holds { Says::Holds } else { Says::Not },
            from: ts,
            moment: (ts, 0),
            severity,
            value: Some(value),
            values: &Words::new,
        };
        self.episodes.see(policy, &seen, self.now);
    }

    fn see(&mut self, policy: &Policy, at_s: i64, holds: bool) {
        self.see_as(policy, "d", NOW + at_s * S, holds, 1.0, None);
    }

    fn tick(&mut self, seconds: i64) {
        for _ in 0..seconds {
            self.now += S;
            self.episodes.tick(self.now);
        }
    }

    /// What was decided since it was last asked: `told` ones with a mark.
    fn words(&mut self) -> Vec<String> {
        let word = |change: &Change| format!("{}{}", change.transition.word(), if change.told { "!" } else { "" });
        self.episodes.take().iter().map(word).collect()
    }

    /// As after a crash: from what was recorded.
    fn restarted(&mut self, changes: &[Change], policies: &[&Arc<Policy>]) {
        let mut last: BTreeMap<String, Episode> = BTreeMap::new();
        for change in changes {
            if let Subject::Alert(alert) = &change.subject {
                last.insert(alert.id.clone(), Episode::clone(alert));
                if change.transition == Transition::Dropped || alert.merged_into.is_some() {
                    last.remove(&alert.id);
                }
            }
        }
        let sequence = changes.last().map_or(0, |change| change.sequence);
        self.episodes = Episodes::new(HORIZON, sequence, self.now);
        last.into_values().for_each(|episode| self.episodes.restore(episode));
        let policies = policies.iter().map(|policy| (policy.name.clone(), Arc::clone(policy)));
        self.episodes.govern(policies.collect(), self.now);
    }
}

fn candidate(id: &str, edge: &str, from_s: i64, to_s: Option<i64>) -> Candidate {
    Candidate {
        edge: edge.to_owned(),
        id: id.to_owned(),
        rule: "high".to_owned(),
        hash: "00".repeat(16),
        stream: "s".to_owned(),
        labels: "{\"device\":\"d\"}".to_owned(),
        device: Some("d".to_owned()),
        severity: Severity::Warning,
        message: "from the edge".to_owned(),
        backfill: false,
        ts: NOW + to_s.unwrap_or(from_s) * S,
        from: NOW + from_s * S,
        to: to_s.map(|to| NOW + to * S),
    }
}

#[test]
fn an_alert_is_pending_then_fires_then_ends() {
    let rule = policy(|policy| policy.hold = 10 * S);
    let mut stage = Stage::new(&[&rule]);
    for (at, holds, expected) in [
        (0, false, &[][..]),
        (1, true, &["pending"]),
        (5, true, &[]),
        (6, false, &["dropped"]),
        (10, true, &["pending"]),
        (19, true, &[]),
        (20, true, &["firing!"]),
        (25, true, &[]),
        // Older than the newest.
        (24, false, &[]),
        (30, false, &["resolved!"]),
        (31, false, &[]),
    ] {
        stage.see(&rule, at, holds);
        assert_eq!(stage.words(), expected, "at {at}");
    }
}

#[test]
fn a_flapping_value_is_one_alert_while_it_is_kept() {
    let rule = policy(|policy| policy.keep = 60 * S);
    let mut stage = Stage::new(&[&rule]);
    stage.see(&rule, 0, true);
    assert_eq!(stage.words(), ["firing!"]);
    for at in 1..50 {
        stage.see(&rule, at, at % 2 == 0);
    }
    let words = stage.words();
    assert!(words.iter().all(|word| word == "clearing" || word == "held"), "{words:?}");
    // By the clock, when no more rows come.
    stage.see(&rule, 51, false);
    stage.tick(59);
    assert!(!stage.words().contains(&"resolved!".to_owned()));
    stage.tick(2);
    assert_eq!(stage.words(), ["resolved!"]);
}

#[test]
fn a_clock_that_is_set_ends_and_repeats_nothing() {
    let rule = policy(|policy| (policy.keep, policy.repeat_every) = (3_000 * S, Some(3_000 * S)));
    let mut stage = Stage::new(&[&rule]);
    stage.see(&rule, 0, true);
    stage.see(&rule, 1, false);
    stage.words();
    stage.now += 86_400 * S;
    stage.episodes.tick(stage.now);
    stage.now -= 2 * 86_400 * S;
    stage.episodes.tick(stage.now);
    assert!(stage.words().is_empty());
    stage.tick(2_900);
    assert!(stage.words().is_empty());
    stage.tick(101);
    assert_eq!(stage.words().last().unwrap(), "resolved!");
}

#[test]
fn it_is_told_again_until_somebody_takes_it_on_and_when_it_gets_worse() {
    let rule = policy(|policy| (policy.repeat_every, policy.worse_by) = (Some(60 * S), Some(10.0)));
    let mut stage = Stage::new(&[&rule]);
    stage.see(&rule, 0, true);
    stage.tick(121);
    assert_eq!(stage.words(), ["firing!", "repeated!", "repeated!"]);
    let id = stage.episodes.open().next().unwrap().id.clone();
    assert!(stage.episodes.acknowledge("nonsense", "eva", "", stage.now).is_err());
    stage.episodes.acknowledge(&id, "eva", "on my way", stage.now).unwrap();
    stage.tick(200);
    stage.see_as(&rule, "d", NOW + 5 * S, true, 10.0, None);
    assert_eq!(stage.words(), ["acknowledged!"]);
    stage.see_as(&rule, "d", NOW + 6 * S, true, 11.0, None);
    assert_eq!(stage.words(), ["worse!"], "by the value");
    stage.episodes.acknowledge(&id, "eva", "", stage.now).unwrap();
    stage.see_as(&rule, "d", NOW + 7 * S, true, 11.0, Some(Severity::Critical));
    assert_eq!(stage.words(), ["acknowledged!", "worse!"], "by the severity");
    stage.see(&rule, 8, false);
    assert_eq!(stage.words(), ["resolved!"]);
    stage.episodes.comment(&id, "eva", "it was a lorry", stage.now).unwrap();
    assert_eq!(stage.words(), ["commented!"]);
}

#[test]
fn what_happened_long_ago_is_recorded_and_fires_when_the_present_says_so() {
    let rule = policy(|_| {});
    let mut stage = Stage::new(&[&rule]);
    stage.see(&rule, -7_200, true);
    assert_eq!(stage.words(), ["firing"]);
    stage.tick(2);
    stage.see(&rule, 1, true);
    assert_eq!(stage.words(), ["firing!"]);
    stage.see(&rule, 2, false);
    stage.see_as(&rule, "e", NOW - 7_200 * S, true, 1.0, None);
    stage.see_as(&rule, "e", NOW - 7_100 * S, false, 1.0, None);
    assert_eq!(stage.words(), ["resolved!", "firing", "resolved"]);
}

#[test]
fn a_silence_keeps_quiet_and_what_still_fires_behind_it_is_told() {
    let rule = policy(|policy| policy.repeat_every = Some(10 * S));
    let mut stage = Stage::new(&[&rule]);
    let silence = Silence {
        id: "s".to_owned(),
        rule: Some("hi*".to_owned()),
        labels: BTreeMap::from([("device".to_owned(), "d*".to_owned())]),
        from: NOW,
        until: NOW + 100 * S,
        every: None,
        last: NOW + 100 * S,
        by: "eva".to_owned(),
        note: String::new(),
    };
    stage.episodes.silence(silence.clone(), NOW).unwrap();
    stage.see(&rule, 0, true);
    stage.see_as(&rule, "x", NOW, true, 1.0, None);
    assert_eq!(stage.words(), ["silence", "firing", "firing!"]);
    stage.see_as(&rule, "x", NOW + 1, false, 1.0, None);
    stage.tick(99);
    assert_eq!(stage.words(), ["resolved!"]);
    stage.tick(1);
    assert_eq!(stage.words(), ["firing!"]);
    stage.see(&rule, 200, false);
    assert_eq!(stage.words(), ["resolved!"]);
    // A window of ten seconds each minute.
    let window = Silence {
        from: stage.now,
        until: stage.now + 10 * S,
        every: Some(60 * S),
        last: stage.now + 1_000 * S,
        ..silence
    };
    stage.episodes.silence(window, stage.now).unwrap();
    stage.words();
    stage.tick(65);
    stage.see(&rule, 300, true);
    assert_eq!(stage.words(), ["firing"]);
    stage.see(&rule, 301, false);
    assert_eq!(stage.words(), ["resolved"], "nobody was told that it fires");
    stage.tick(20);
    stage.see(&rule, 302, true);
    assert_eq!(stage.words(), ["firing!"]);
}

#[test]
fn one_that_is_inhibited_waits_for_the_other() {
    let whole = policy(|policy| policy.name = "outage".to_owned());
    let one = policy(|policy| policy.inhibited_by = vec!["outage".to_owned()]);
    let mut stage = Stage::new(&[&whole, &one]);
    stage.see(&whole, 0, true);
    stage.see(&one, 1, true);
    // Of another device: the labels say something else.
    stage.see_as(&one, "e", NOW + S, true, 1.0, None);
    assert_eq!(stage.words(), ["firing!", "firing", "firing!"]);
    stage.see(&whole, 2, false);
    stage.tick(1);
    assert_eq!(stage.words(), ["resolved!", "firing!"]);
}

#[test]
fn edge_and_cloud_raise_one_alert() {
    let rule = policy(|policy| policy.slack = 30 * S);
    // The edge first, then the cloud.
    let mut stage = Stage::new(&[&rule]);
    stage.episodes.candidate(&candidate("aa", "gw", 0, None), stage.now);
    stage.see(&rule, 0, true);
    assert_eq!(stage.words(), ["firing!", "merged"]);
    let alert = stage.episodes.open().next().unwrap();
    assert_eq!((alert.id.as_str(), alert.aliases.len(), alert.raised.len()), ("aa", 1, 2));
    let alias = alert.aliases[0].clone();
    stage.episodes.acknowledge(&alias, "eva", "", stage.now).unwrap();
    stage.see(&rule, 10, false);
    stage.episodes.candidate(&candidate("aa", "gw", 0, Some(10)), stage.now);
    assert_eq!(stage.words(), ["acknowledged!", "merged", "resolved!"]);
    // Sent again: nothing.
    stage.episodes.candidate(&candidate("aa", "gw", 0, Some(10)), stage.now);
    assert!(stage.words().is_empty());

    // The cloud is through before the edge's rows come.
    let mut stage = Stage::new(&[&rule]);
    stage.see(&rule, 0, true);
    stage.see(&rule, 10, false);
    stage.episodes.candidate(&candidate("aa", "gw", 0, None), stage.now);
    stage.episodes.candidate(&candidate("aa", "gw", 0, Some(12)), stage.now);
    assert_eq!(stage.words(), ["firing!", "resolved!", "merged", "merged"]);
    // The edge's next one is another alert.
    stage.episodes.candidate(&candidate("bb", "gw", 13, None), stage.now);
    assert_eq!(stage.words(), ["firing!"]);

    // The edge was through before the cloud's rows came; within one batch the end is known.
    let mut stage = Stage::new(&[&rule]);
    stage.episodes.candidate(&candidate("aa", "gw", 0, Some(10)), stage.now);
    assert_eq!(stage.words(), ["firing!", "resolved!"]);
    stage.see(&rule, 0, true);
    stage.see(&rule, 10, false);
    stage.see(&rule, 11, true);
    assert_eq!(stage.words(), ["merged", "merged", "firing!"]);
}

/// After an outage an edge's alerts come before the readings that they are about, several of one device among them.
#[test]
fn rows_that_come_behind_several_alerts_of_an_edge_raise_none_of_them_again() {
    let rule = policy(|policy| policy.slack = 30 * S);
    for edge_first in [true, false] {
        let mut stage = Stage::new(&[&rule]);
        let episodes = [("aa", 0, 10), ("bb", 100, 110), ("cc", 130, 140)];
        let claims = |stage: &mut Stage| {
            for (id, from, to) in episodes {
                stage.episodes.candidate(&candidate(id, "gw", from, None), stage.now);
                stage.episodes.candidate(&candidate(id, "gw", from, Some(to)), stage.now);
            }
        };
        let rows = |stage: &mut Stage| {
            for (_, from, to) in episodes {
                stage.see(&rule, from, true);
                stage.see(&rule, to, false);
            }
        };
        if edge_first {
            claims(&mut stage)
        } else {
            rows(&mut stage)
        }
        let told = ["firing!", "resolved!"].repeat(episodes.len());
        assert_eq!(stage.words(), told);
        if edge_first {
            rows(&mut stage)
        } else {
            claims(&mut stage)
        }
        let again: Vec<String> = stage.words().into_iter().filter(|word| word.ends_with('!')).collect();
        assert!(again.is_empty(), "{again:?} when edge_first is {edge_first}");
    }
}

/// Edges have no `keep_firing_for`, and their alerts come before the rows: the end is not told before the cloud's rule would.
#[test]
fn what_an_edge_ends_is_kept_firing_as_the_cloud_keeps_it() {
    let rule = policy(|policy| policy.keep = 60 * S);
    let claims = |stage: &mut Stage| {
        stage.episodes.candidate(&candidate("aa", "gw", -20, None), stage.now);
        stage.episodes.candidate(&candidate("aa", "gw", -20, Some(-10)), stage.now);
    };
    // Ten seconds of the minute have passed when it is heard.
    let mut stage = Stage::new(&[&rule]);
    claims(&mut stage);
    stage.tick(49);
    assert_eq!(stage.words(), ["firing!", "merged"]);
    stage.tick(1);
    assert_eq!(stage.words(), ["resolved!"]);
    assert_eq!(stage.episodes.open().count(), 0);

    // The cloud's rows come meanwhile, and say that it goes on.
    let mut stage = Stage::new(&[&rule]);
    claims(&mut stage);
    for (at, holds) in [(-20, true), (-10, false), (0, true)] {
        stage.see(&rule, at, holds);
    }
    stage.tick(100);
    assert_eq!(stage.words(), ["firing!", "merged", "merged", "clearing", "held"]);
    stage.see(&rule, 100, false);
    stage.tick(60);
    assert_eq!(stage.words(), ["clearing", "resolved!"]);

    // The edge's next one within the minute is this alert; what came a minute later is another, and so is what was long ago.
    let mut stage = Stage::new(&[&rule]);
    claims(&mut stage);
    stage.episodes.candidate(&candidate("bb", "gw", 0, None), stage.now);
    assert_eq!(stage.words(), ["firing!", "merged", "merged", "merged"]);
    let mut stage = Stage::new(&[&rule]);
    claims(&mut stage);
    stage.episodes.candidate(&candidate("bb", "gw", 50, None), stage.now);
    assert_eq!(stage.words(), ["firing!", "merged", "resolved!", "firing!"]);
    let mut stage = Stage::new(&[&rule]);
    stage.tick(50);
    claims(&mut stage);
    assert_eq!(stage.words(), ["firing!", "resolved!"]);

    // It is kept over a restart, and by hand it ends.
    let mut stage = Stage::new(&[&rule]);
    claims(&mut stage);
    let changes = stage.episodes.take();
    stage.restarted(&changes, &[&rule]);
    stage.tick(59);
    assert!(stage.words().is_empty());
    stage.tick(1);
    assert_eq!(stage.words(), ["resolved!"]);
    stage.restarted(&changes, &[&rule]);
    stage.episodes.resolve("aa", "eva", "", stage.now).unwrap();
    stage.tick(100);
    assert_eq!(stage.words(), ["resolved!"]);
}

#[test]
fn a_candidate_whose_end_does_not_follow_fires_again() {
    let rule = policy(|_| {});
    let mut stage = Stage::new(&[&rule]);
    stage.see(&rule, 0, true);
    stage.see(&rule, 10, false);
    stage.episodes.candidate(&candidate("aa", "gw", 5, None), stage.now);
    assert_eq!(stage.words(), ["firing!", "resolved!", "merged"]);
    stage.tick(11);
    assert_eq!(stage.words(), ["firing!"]);
    stage.episodes.candidate(&candidate("aa", "gw", 5, Some(30)), stage.now);
    assert_eq!(stage.words(), ["resolved!"]);
}

#[test]
fn alerts_of_a_rule_that_is_gone_end() {
    let rule = policy(|_| {});
    let mut stage = Stage::new(&[&rule]);
    stage.see(&rule, 0, true);
    stage.words();
    stage.episodes.govern(BTreeMap::new(), stage.now);
    let changes = stage.episodes.take();
    assert_eq!(changes[0].transition, Transition::Resolved);
    let Subject::Alert(alert) = &changes[0].subject else { panic!() };
    assert!(alert.message.contains("no longer configured"));
}

#[test]
fn a_rule_has_so_many_alerts_and_no_more() {
    let rule = policy(|policy| policy.instances_max = 3);
    let mut stage = Stage::new(&[&rule]);
    for device in 0..10 {
        stage.see_as(&rule, &format!("d{device}"), NOW, true, 1.0, None);
    }
    assert_eq!((stage.words().len(), stage.episodes.refused("high")), (3, 7));
}

#[test]
fn edges_raise_so_many_alerts_and_no_more() {
    let mut stage = Stage::new(&[]);
    stage.episodes.room = 2;
    for device in 0..5 {
        let labels = format!("{{\"device\":\"{device}\"}}");
        stage.episodes.candidate(&Candidate { labels, ..candidate(&format!("{device}"), "gw", 0, None) }, stage.now);
    }
    assert_eq!((stage.words().len(), stage.episodes.make_room()), (2, 3));
    assert_eq!(stage.episodes.room, super::merge::OPEN_MAX - 2);
}

/// When an alert fires and ends, by the definition: from rows in order of time.
fn naive(rows: &[(i64, bool)], hold: i64) -> Vec<(i64, i64, Option<i64>)> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < rows.len() {
        if !rows[at].1 {
            at += 1;
            continue;
        }
        let run: Vec<&(i64, bool)> = rows[at..].iter().take_while(|row| row.1).collect();
        let next = rows.get(at + run.len()).map(|row| row.0);
        if let Some(fired) = run.iter().find(|row| row.0 - run[0].0 >= hold) {
            found.push((run[0].0, fired.0, next));
        }
        at += run.len();
    }
    found
}

/// Rows in order, with late ones among them, and crashes at any moment.
#[test]
fn alerts_are_those_of_the_definition_over_restarts() {
    let seed = std::env::var("WEIR_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random::<u64>);
    println!("WEIR_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..2_000 {
        let hold = random.random_range(0..4) * 5 * S;
        let rule = policy(|policy| policy.hold = hold);
        let mut stage = Stage::new(&[&rule]);
        let (mut rows, mut ts, mut changes) = (Vec::new(), NOW, Vec::new());
        for _ in 0..random.random_range(1..60) {
            ts += random.random_range(1..8) * S;
            let holds = random.random_bool(0.6);
            rows.push((ts, holds));
            stage.see_as(&rule, "d", ts, holds, 1.0, None);
            changes.extend(stage.episodes.take());
            if random.random_bool(0.2) {
                // Seen again, as behind a position that was not written.
                stage.restarted(&changes, &[&rule]);
                stage.see_as(&rule, "d", ts, holds, 1.0, None);
                let again = stage.episodes.take();
                assert!(again.is_empty(), "{again:?}");
            }
        }
        let mut found: BTreeMap<String, (i64, i64, Option<i64>)> = BTreeMap::new();
        let mut sequence = 0;
        for change in &changes {
            assert_eq!(change.sequence, sequence + 1);
            sequence = change.sequence;
            let Subject::Alert(alert) = &change.subject else { panic!() };
            match change.transition {
                Transition::Firing => {
                    let twice = found.insert(alert.id.clone(), (alert.from, change.ts, None));
                    assert!(twice.is_none() && change.told);
                }
                Transition::Resolved => found.get_mut(&alert.id).unwrap().2 = alert.to,
                _ => assert!(!change.told),
            }
        }
        let mut found: Vec<_> = found.into_values().collect();
        found.sort_unstable();
        assert_eq!(found, naive(&rows, hold), "hold {hold}, rows {rows:?}");
    }
}

#[test]
fn a_rule_that_cannot_run_now_ends_nothing() {
    let rule = policy(|_| {});
    let mut stage = Stage::new(&[&rule]);
    stage.see(&rule, 0, true);
    let open = stage.episodes.open().next().unwrap().clone();
    // After a restart, before the rule could be understood.
    let mut episodes = Episodes::new(HORIZON, 1, NOW);
    episodes.restore(open);
    episodes.wait_for(BTreeSet::from([("high".to_owned(), rule.hash.clone())]));
    episodes.govern(BTreeMap::new(), NOW);
    assert!(episodes.take().is_empty());
    // And when it is gone.
    episodes.wait_for(BTreeSet::new());
    episodes.govern(BTreeMap::new(), NOW);
    assert_eq!(episodes.take()[0].transition, Transition::Resolved);
}

#[test]
fn what_is_asked_by_the_clock_lasts_as_long_when_the_clock_is_set() {
    const DAY: i64 = 86_400 * S;
    let rule = policy(|policy| (policy.hold, policy.by_clock) = (600 * S, true));
    let mut stage = Stage::new(&[&rule]);
    let see = |stage: &mut Stage, at: i64, holds: bool| {
        stage.now = at;
        stage.see_as(&rule, "d", at, holds, 1.0, None);
        stage.words()
    };
    assert_eq!(see(&mut stage, NOW, true), ["pending"]);
    stage.episodes.clock_was_set(DAY);
    assert!(see(&mut stage, NOW + DAY + 10 * S, true).is_empty());
    assert!(see(&mut stage, NOW + DAY + 599 * S, true).is_empty());
    assert_eq!(see(&mut stage, NOW + DAY + 600 * S, true), ["firing!"]);
    stage.episodes.clock_was_set(-2 * DAY);
    assert!(see(&mut stage, NOW - DAY + 610 * S, true).is_empty());
    assert_eq!(see(&mut stage, NOW - DAY + 620 * S, false), ["resolved!"]);
    // Set back while nobody looked: it goes on from there.
    assert_eq!(see(&mut stage, NOW, true), ["pending"]);
    assert!(see(&mut stage, NOW - DAY, true).is_empty());
    assert_eq!(see(&mut stage, NOW - DAY + 600 * S, true), ["firing!"]);
}

#[test]
fn the_time_that_a_node_was_away_ends_nothing() {
    let rule = policy(|policy| policy.keep = 600 * S);
    let mut stage = Stage::new(&[&rule]);
    stage.see(&rule, 0, true);
    stage.see(&rule, 1, false);
    let changes = stage.episodes.take();
    stage.now += 3_600 * S;
    stage.restarted(&changes, &[&rule]);
    stage.tick(500);
    assert!(stage.words().is_empty());
    // What it held for is told by rows that come late.
    stage.see(&rule, 300, true);
    assert_eq!(stage.words(), ["held"]);
}
