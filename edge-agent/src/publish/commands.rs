//! What actuators are told: for each topic the newest word, not more often than its rule allows.
//!
//! Several alerts may command one topic, a siren for all doors: it is told of an end when the last of them has ended. What
//! comes within `every` of the word before waits, and a newer one takes its place, so an actuator always ends up with the
//! newest. Pure; `now` is an argument. Limit: [`TOPICS_MAX`] topics are remembered; of those that no alert commands any more
//! the ones that were told longest ago go first, and a command that finds no room is counted.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::rules::{Transition, Turn};

/// Topics that are remembered.
const TOPICS_MAX: usize = 10_000;

#[derive(Debug)]
struct Actuator {
    /// The alerts that command it.
    alerts: BTreeSet<String>,
    newest: Bytes,
    waits: bool,
    told: Option<Instant>,
    every: Duration,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Commands {
    actuators: BTreeMap<String, Actuator>,
    /// Words that a newer one replaced before they went.
    pub(super) replaced: u64,
    pub(super) refused: u64,
}

impl Commands {
    /// Takes what became of an alert.
    pub(super) fn offer(&mut self, alert: &Transition) {
        let Some(command) = &alert.command else { return };
        if !self.actuators.contains_key(&command.topic) {
            if self.actuators.len() >= TOPICS_MAX && !self.forget_one() {
                self.refused += 1;
                return;
            }
            let every = Duration::from_micros(u64::try_from(command.every_us).unwrap_or_default());
            let fresh = Actuator { alerts: BTreeSet::new(), newest: Bytes::new(), waits: false, told: None, every };
            self.actuators.insert(command.topic.clone(), fresh);
        }
        let actuator = self.actuators.get_mut(&command.topic).expect("it was put there");
        let word = match alert.turn {
            Turn::Firing => {
                actuator.alerts.insert(alert.id.clone());
                Some(&command.firing)
            }
            Turn::Resolved => {
                actuator.alerts.remove(&alert.id);
                command.resolved.as_ref().filter(|_| actuator.alerts.is_empty())
            }
            Turn::Backfill => None,
        };
        let Some(word) = word else { return };
        self.replaced += u64::from(actuator.waits && actuator.newest != word.as_bytes());
        actuator.newest = Bytes::copy_from_slice(word.as_bytes());
        actuator.waits = true;
    }

    /// A new connection: what was on its way may be lost.
    pub(super) fn all_again(&mut self) {
        self.actuators
            .values_mut()
            .filter(|actuator| actuator.told.is_some())
            .for_each(|actuator| actuator.waits = true);
    }

    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        self.actuators.values().filter(|actuator| actuator.waits).count()
    }

    /// Hands all that may go now to `tell`, until that has no room. Returns when the next may go.
    pub(super) fn flush(&mut self, now: Instant, mut tell: impl FnMut(&str, &Bytes) -> bool) -> Option<Instant> {
        let mut next = None::<Instant>;
        for (topic, actuator) in self.actuators.iter_mut().filter(|(_, actuator)| actuator.waits) {
            let due = actuator.told.map_or(now, |told| told + actuator.every);
            if due <= now {
                if !tell(topic, &actuator.newest) {
                    return next;
                }
                (actuator.waits, actuator.told) = (false, Some(now));
            } else {
                next = Some(next.map_or(due, |next| next.min(due)));
            }
        }
        next
    }

    fn forget_one(&mut self) -> bool {
        let idle = self.actuators.iter().filter(|(_, actuator)| actuator.alerts.is_empty() && !actuator.waits);
        let oldest = idle.min_by_key(|(_, actuator)| actuator.told).map(|(topic, _)| topic.clone());
        oldest.is_some_and(|topic| self.actuators.remove(&topic).is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publish::tests::alert;
    use crate::rules::Command;

    /// Commands at moments of their own; what goes comes out as `topic word`.
    struct Hand(Commands, Instant);

    impl Hand {
        fn new() -> Self {
            Self(Commands::default(), Instant::now())
        }

        fn offer(&mut self, id: &str, topic: &str, turn: Turn) {
            let command = Command {
                topic: topic.to_owned(),
                firing: format!("on {id}"),
                resolved: Some("off".to_owned()),
                every_us: 10_000_000,
            };
            self.0.offer(&Transition { command: Some(command), ..alert(id, turn) });
        }

        fn at(&mut self, seconds: u64) -> (Vec<String>, Option<u64>) {
            let mut told = Vec::new();
            let next = self.0.flush(self.1 + Duration::from_secs(seconds), |topic, word| {
                told.push(format!("{topic} {}", std::str::from_utf8(word).unwrap()));
                true
            });
            (told, next.map(|next| (next - self.1).as_secs()))
        }
    }

    #[test]
    fn a_topic_gets_the_newest_word_and_not_more_often_than_allowed() {
        let mut hand = Hand::new();
        hand.offer("a", "x", Turn::Firing);
        hand.offer("b", "y", Turn::Firing);
        assert_eq!(hand.at(0), (vec!["x on a".to_owned(), "y on b".to_owned()], None));
        hand.offer("a", "x", Turn::Resolved);
        assert_eq!(hand.at(1), (vec![], Some(10)));
        hand.offer("a2", "x", Turn::Firing);
        hand.offer("a2", "x", Turn::Resolved);
        assert_eq!(hand.at(9), (vec![], Some(10)));
        assert_eq!(hand.at(10), (vec!["x off".to_owned()], None));
        assert_eq!(hand.0.replaced, 2, "the first off, and on a2");
        assert_eq!(hand.at(30), (vec![], None));
        hand.0.all_again();
        assert_eq!(hand.at(31).0, ["x off", "y on b"]);
    }

    #[test]
    fn an_actuator_of_several_alerts_is_let_go_by_the_last() {
        let mut hand = Hand::new();
        hand.offer("a", "siren", Turn::Firing);
        hand.offer("b", "siren", Turn::Firing);
        assert_eq!(hand.at(0).0, ["siren on b"]);
        hand.offer("a", "siren", Turn::Resolved);
        assert_eq!(hand.at(20), (vec![], None));
        hand.offer("b", "siren", Turn::Resolved);
        assert_eq!(hand.at(20).0, ["siren off"]);
    }

    #[test]
    fn topics_are_bounded_and_those_that_are_commanded_stay() {
        let mut hand = Hand::new();
        for n in 0..TOPICS_MAX {
            hand.offer(&format!("{n}"), &format!("{n}"), Turn::Firing);
        }
        hand.offer("more", "more", Turn::Firing);
        assert_eq!((hand.0.refused, hand.at(0).0.len()), (1, TOPICS_MAX));
        hand.offer("7", "7", Turn::Resolved);
        hand.at(20);
        hand.offer("more", "more", Turn::Firing);
        assert_eq!((hand.0.refused, hand.at(30).0), (1, vec!["more on more".to_owned()]));
        assert!(!hand.0.actuators.contains_key("7"));
    }

    #[test]
    fn what_finds_no_room_waits() {
        let mut hand = Hand::new();
        hand.offer("a", "x", Turn::Firing);
        assert_eq!(hand.0.flush(hand.1, |_, _| false), None);
        assert_eq!(hand.0.waiting(), 1);
        assert_eq!(hand.at(0).0, ["x on a"]);
    }
}
