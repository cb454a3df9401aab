//! What a restart applies again from the journal, told apart from what is new.
//!
//! What the run before applied was perhaps published by it, so it is not published turn by turn: entries below the journal's
//! end at the start are of the run before. When they are applied, what fires then is published, and so is the end of what
//! ended among them. Limit: [`ENDED_MAX`] ends.

use std::collections::BTreeMap;

use segment_log::Position;

use super::{ENDED_MAX, Outbox};
use crate::rules::{Transition, Turn};

/// Tells what a restart applies again from what is new.
#[derive(Debug)]
pub struct Replay {
    /// The journal's end at the start.
    until: Position,
    over: bool,
    /// What ended, by the topic that was told.
    ended: BTreeMap<String, Transition>,
}

impl Replay {
    /// All entries below `until` are of the run before.
    pub fn new(until: Position) -> Self {
        Self { until, over: false, ended: BTreeMap::new() }
    }

    /// What the entry at `position` brought about. `firing` is asked once, when the last old entry is applied.
    pub fn applied(
        &mut self,
        position: Position,
        found: Vec<Transition>,
        outbox: &Outbox,
        firing: impl FnOnce() -> Vec<Transition>,
    ) {
        if self.over || position >= self.until {
            let begun = found.iter().map(|alert| alert.id.as_str()).collect::<Vec<_>>();
            self.end(outbox, || firing().into_iter().filter(|alert| !begun.contains(&alert.id.as_str())).collect());
            return found.iter().for_each(|alert| outbox.offer(alert));
        }
        for alert in found {
            let command = || alert.command.as_ref().map(|command| &command.topic);
            let Some(topic) = alert.topic.as_ref().or_else(command).cloned() else { continue };
            match alert.turn {
                Turn::Resolved if self.ended.len() < ENDED_MAX => drop(self.ended.insert(topic, alert)),
                Turn::Firing => drop(self.ended.remove(&topic)),
                _ => {}
            }
        }
    }

    /// The journal has nothing more: all old entries are applied.
    pub fn end(&mut self, outbox: &Outbox, firing: impl FnOnce() -> Vec<Transition>) {
        if !std::mem::replace(&mut self.over, true) {
            // In this order an actuator that something still commands is not let go in between.
            firing().iter().for_each(|alert| outbox.offer(alert));
            std::mem::take(&mut self.ended).values().for_each(|alert| outbox.offer(alert));
        }
    }
}
