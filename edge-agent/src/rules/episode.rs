//! What one row does to the alerts of its device: they begin, fire and end.

use sha2::{Digest, Sha256};

use super::expression::Row;
use super::input::{Alert, Kept};
use super::rule::{Condition, Rule, hex};
use super::template::Filling;
use super::{Transition, Turn, When};

/// One row's way past the rules.
pub(super) struct Pass<'p> {
    pub(super) stream: &'p str,
    pub(super) horizon: i64,
    pub(super) row: Row<'p>,
    pub(super) when: When,
    pub(super) out: &'p mut Vec<Transition>,
}

impl Pass<'_> {
    /// What the row means for one rule; `at` is where the device's alerts of this rule begin.
    pub(super) fn judge(&mut self, index: usize, kept: &mut Kept, alerts: &mut Vec<Alert>, at: usize) {
        let Condition::When { when, until } = &kept.rule.condition else { return };
        let own = at..at + alerts[at..].iter().take_while(|alert| alert.rule == index).count();
        let holds = when.test(&self.row).unwrap_or_else(|_| {
            kept.totals.failed += 1;
            None
        });
        if own.is_empty() && holds != Some(true) {
            return;
        }
        let found = if kept.rule.labels_of_the_device && !own.is_empty() {
            own.start
        } else {
            let labels = self.labels(&kept.rule);
            match alerts[own.clone()].binary_search_by(|alert| alert.labels.as_str().cmp(&labels)) {
                Ok(found) => own.start + found,
                Err(_) if holds != Some(true) => return,
                Err(place) => return self.begin(index, kept, alerts, own.start + place, Some(labels)),
            }
        };
        let alert = &mut alerts[found];
        if !alert.firing {
            match holds {
                Some(true) if self.when.to.saturating_sub(alert.from) >= kept.rule.hold => self.fire(kept, alert),
                Some(false) => {
                    alerts.remove(found);
                    kept.alerts -= 1;
                }
                _ => {}
            }
            return;
        }
        let ends = match until {
            None => holds == Some(false),
            Some(until) => {
                let until = until.test(&self.row).unwrap_or_else(|_| {
                    kept.totals.failed += 1;
                    None
                });
                until == Some(true) && holds != Some(true)
            }
        };
        if ends {
            let alert = alerts.remove(found);
            self.end(kept, alert);
        } else if !alert.announced && holds == Some(true) && !self.is_old(self.when.to) {
            self.fire(kept, alert);
        }
    }

    fn is_old(&self, ts: i64) -> bool {
        self.when.arrival.saturating_sub(ts) > self.horizon
    }

    fn labels(&self, rule: &Rule) -> String {
        let with = self.filling(rule, "");
        let labels = rule.labels.iter().map(|(label, text)| (label.clone(), text.fill(&with).into()));
        serde_json::Value::Object(labels.collect()).to_string()
    }

    fn filling<'f>(&'f self, rule: &'f Rule, id: &'f str) -> Filling<'f> {
        Filling { row: self.row, ts: self.when.to, rule: &rule.name, severity: rule.severity.word(), id }
    }

    /// An alert begins: pending, or firing at once.
    pub(super) fn begin(
        &mut self,
        index: usize,
        kept: &mut Kept,
        alerts: &mut Vec<Alert>,
        at: usize,
        labels: Option<String>,
    ) {
        if kept.alerts >= kept.rule.max_instances {
            kept.totals.refused += 1;
            return;
        }
        kept.alerts += 1;
        let labels = labels.unwrap_or_else(|| self.labels(&kept.rule));
        let from = self.when.from;
        alerts.insert(at, Alert { rule: index, labels, from, ..Alert::default() });
        if self.when.to.saturating_sub(from) >= kept.rule.hold {
            self.fire(kept, &mut alerts[at]);
        }
    }

    pub(super) fn fire(&mut self, kept: &mut Kept, alert: &mut Alert) {
        let old = self.is_old(self.when.to);
        if alert.firing && old {
            return;
        }
        alert.firing = true;
        alert.announced = !old;
        if alert.id.is_empty() {
            alert.id = id(&kept.rule, self.row.device, &alert.labels, alert.from);
        }
        *if old { &mut kept.totals.backfilled } else { &mut kept.totals.fired } += 1;
        let with = self.filling(&kept.rule, &alert.id);
        let topic = kept.rule.topic.as_ref().filter(|_| !old).map(|topic| topic.fill_topic(&with));
        let command = kept.rule.command.as_ref().filter(|_| !old).map(|command| command.fill(&with));
        let message = kept.rule.message.fill(&with);
        (alert.ts, alert.message, alert.topic, alert.command) = (self.when.to, message, topic, command);
        let turn = if old { Turn::Backfill } else { Turn::Firing };
        let transition = self.transition(&kept.rule, alert, turn, None);
        self.out.push(transition);
    }

    pub(super) fn end(&mut self, kept: &mut Kept, alert: Alert) {
        kept.alerts -= 1;
        *if alert.announced { &mut kept.totals.resolved } else { &mut kept.totals.backfilled } += 1;
        let turn = if alert.announced { Turn::Resolved } else { Turn::Backfill };
        let transition = self.transition(&kept.rule, &alert, turn, Some(self.when.from));
        self.out.push(transition);
    }

    fn transition(&self, rule: &Rule, alert: &Alert, turn: Turn, to: Option<i64>) -> Transition {
        Transition {
            ts: self.when.to,
            device: self.row.device.to_owned(),
            rule: rule.name.clone(),
            rule_hash: hex(&rule.hash.0),
            id: alert.id.clone(),
            turn,
            severity: rule.severity.word(),
            stream: self.stream.to_owned(),
            labels: alert.labels.clone(),
            message: rule.message.fill(&self.filling(rule, &alert.id)),
            from: alert.from,
            to: to.map(|to| to.max(alert.from)),
            topic: alert.topic.clone(),
            command: alert.command.clone(),
        }
    }
}

/// The identity of an episode: from the rule's hash, the device, the labels and the beginning.
fn id(rule: &Rule, device: &str, labels: &str, from: i64) -> String {
    let mut hash = Sha256::new();
    hash.update(rule.hash.0);
    for text in [device, labels] {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    hash.update(from.to_le_bytes());
    let mut id = [0; 16];
    id.copy_from_slice(&hash.finalize()[..16]);
    hex(&id)
}
