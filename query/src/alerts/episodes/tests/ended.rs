//! Alerts that people end, and those of edges that are not heard any more.

use std::collections::HashMap;

use super::*;

fn told(stage: &mut Stage) -> Vec<(String, String)> {
    let one = |change: &Change| {
        let Subject::Alert(alert) = &change.subject else { panic!() };
        (alert.id.clone(), format!("{}{}", change.transition.word(), if change.told { "!" } else { "" }))
    };
    stage.episodes.take().iter().map(one).collect()
}

fn later(id: &str, from_s: i64, ts_s: i64) -> Candidate {
    Candidate { ts: NOW + ts_s * S, ..candidate(id, "gw", from_s, None) }
}

#[test]
fn what_somebody_has_ended_is_opened_by_its_edge_alone() {
    let rule = policy(|_| {});
    let mut stage = Stage::new(&[&rule]);
    stage.episodes.candidate(&candidate("aa", "gw", 0, None), stage.now);
    assert_eq!(stage.words(), ["firing!"]);
    assert!(stage.episodes.resolve("nonsense", "eva", "", stage.now).is_err());
    stage.now += 100 * S;
    stage.episodes.resolve("aa", "eva", "the gateway was stolen", stage.now).unwrap();
    let changes = stage.episodes.take();
    assert_eq!((changes[0].transition, changes[0].told, changes.len()), (Transition::Resolved, true, 1));
    assert_eq!(changes[0].actor.as_deref(), Some("eva"));
    assert!(stage.episodes.resolve("aa", "eva", "", stage.now).is_err(), "it has ended");
    // What is older belongs to it, from whomever.
    stage.episodes.candidate(&later("aa", 0, 50), stage.now);
    stage.see(&rule, 60, true);
    stage.tick(20);
    assert!(stage.words().is_empty());
    // Over a restart, too.
    stage.restarted(&changes, &[&rule]);
    stage.see(&rule, 70, true);
    assert!(stage.words().is_empty());
    // The edge says of this very one, later, that it fires.
    stage.episodes.candidate(&later("aa", 0, 150), stage.now);
    assert_eq!(told(&mut stage), [("aa".to_owned(), "firing!".to_owned())]);
    stage.episodes.candidate(&candidate("aa", "gw", 0, Some(160)), stage.now);
    assert_eq!(told(&mut stage), [("aa".to_owned(), "resolved!".to_owned())]);
    // Its next one is another.
    stage.episodes.candidate(&candidate("bb", "gw", 170, None), stage.now);
    stage.episodes.resolve("bb", "eva", "", NOW + 180 * S).unwrap();
    stage.episodes.candidate(&candidate("cc", "gw", 190, None), stage.now);
    let ids: Vec<String> = told(&mut stage).into_iter().map(|(id, _)| id).collect();
    assert_eq!(ids, ["bb", "bb", "cc"]);
}

#[test]
fn what_a_rule_still_finds_after_somebody_has_ended_it_is_another_alert() {
    let rule = policy(|_| {});
    let mut stage = Stage::new(&[&rule]);
    stage.see(&rule, 0, true);
    let first = stage.episodes.open().next().unwrap().id.clone();
    stage.now += 100 * S;
    stage.episodes.resolve(&first, "eva", "", stage.now).unwrap();
    stage.see(&rule, 99, true);
    assert_eq!(stage.words(), ["firing!", "resolved!"]);
    stage.see(&rule, 101, true);
    let next = told(&mut stage);
    assert!(next.len() == 1 && next[0].0 != first && next[0].1 == "firing!", "{next:?}");
}

#[test]
fn an_alert_of_a_silent_edge_is_marked_and_goes_on() {
    let rule = policy(|_| {});
    let mut stage = Stage::new(&[&rule]);
    stage.episodes.candidate(&candidate("aa", "gw", 0, None), stage.now);
    stage.see_as(&rule, "e", NOW, true, 1.0, None);
    assert_eq!(stage.words(), ["firing!", "firing!"]);
    assert_eq!(stage.episodes.edges(), BTreeSet::from(["gw".to_owned()]));
    let heard = |at: i64| HashMap::from([("gw".to_owned(), at)]);
    stage.episodes.mark_stale(&heard(NOW), NOW - S, stage.now);
    assert!(stage.words().is_empty());
    stage.episodes.mark_stale(&heard(NOW), NOW + S, stage.now);
    assert_eq!(stage.words(), ["stale!"]);
    stage.episodes.mark_stale(&heard(NOW), NOW + 2 * S, stage.now);
    assert!(stage.words().is_empty(), "once");
    let open = || stage.episodes.open().map(|alert| (alert.stale, alert.phase));
    assert!(open().all(|(_, phase)| phase == Phase::Firing) && open().filter(|(stale, _)| *stale).count() == 1);
    stage.episodes.mark_stale(&heard(NOW + 3 * S), NOW + 2 * S, stage.now);
    assert_eq!(stage.words(), ["heard!"]);
    // Never heard since the node listens.
    stage.episodes.mark_stale(&HashMap::new(), NOW + 2 * S, stage.now);
    assert_eq!(stage.words(), ["stale!"]);
    // The cloud sees it, too.
    stage.see(&rule, 4, true);
    stage.episodes.mark_stale(&HashMap::new(), NOW + 2 * S, stage.now);
    assert_eq!(stage.words(), ["merged", "heard!"]);
}
