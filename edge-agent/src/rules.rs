//! Rules over readings, windows and silence: when an alert begins, fires and ends. Pure and deterministic; time is what the
//! rows and the journal's entries say.
//!
//! An alert is of one rule, device and labels; of windows that are grouped by fields each group is as a device of its own, and
//! the values that it is grouped by are labels. It is *pending* from the first row whose `when` is true, *firing* when that
//! has lasted for `for`, and *resolved* by the first row whose `when` is false, or with `until` by one where that is true and
//! `when` is not. A row of a window lasts from its start to its end, a reading is a moment. NULL, and a row that fails,
//! change nothing: such a row does not say. A row older than the newest of its device changes nothing either. Only what
//! fires and resolves becomes a row of `alerts`; an alert that was found longer than `alert_horizon` after it happened is a
//! `backfill`, and fires in earnest when a row of the present still finds it.
//!
//! A device is absent when it is silent by event time (its newest row is `absent` behind the stream's watermark), or by the
//! clock that [`Rules::tick`] moves: the arrival of the journal's entries, of whose distance at most [`LISTEN_STEP_US`]
//! counts, so that neither a stopped agent nor a clock that was set makes a device silent. What nobody has ever heard is
//! not missed.
//!
//! Devices are remembered once for all rules of a stream, an alert only while it is pending or fires. Limits: `devices_max`
//! of a stream, `max_instances` of a rule; what does not fit is counted. What a row does to an alert: `rules/episode.rs`; what
//! is remembered of a stream: `rules/input.rs`, as bytes: `rules/state.rs`.

mod episode;
pub mod expression;
mod input;
mod rule;
mod state;
mod template;
#[cfg(test)]
mod tests;

use wire::StreamName;

use self::episode::Pass;
use self::expression::Row;
use self::input::{Device, Input, Kept, Looked, Origin, origin_of};
use self::rule::{Condition, Rule};
pub use self::rule::{RULES_MAX, RuleHash};
pub use self::state::StateError;
use crate::config::Settings;
use crate::decode::Value;

/// Of the time between two entries at most this counts as listened.
pub const LISTEN_STEP_US: i64 = 60_000_000;
/// How often silence is looked for, by the clock.
const LOOK_EVERY_US: i64 = 1_000_000;

/// What became of an alert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    Firing,
    Resolved,
    /// It fired, or ended without ever having fired in earnest, too long ago to act on.
    Backfill,
}

impl Turn {
    /// The word in rows and messages.
    pub fn word(self) -> &'static str {
        match self {
            Self::Firing => "firing",
            Self::Resolved => "resolved",
            Self::Backfill => "backfill",
        }
    }
}

/// A row of `alerts`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transition {
    /// Event time, µs since 1970 UTC.
    pub ts: i64,
    pub device: String,
    pub rule: String,
    pub rule_hash: String,
    /// The same for all of one episode.
    pub id: String,
    pub turn: Turn,
    pub severity: &'static str,
    pub stream: String,
    /// A JSON object.
    pub labels: String,
    pub message: String,
    /// Event time of the episode; its end is not known while it fires.
    pub from: i64,
    pub to: Option<i64>,
    /// Where it is published; None for what is only recorded.
    pub topic: Option<String>,
    /// What an actuator is told by it.
    pub command: Option<Command>,
}

impl Transition {
    /// Whether anybody but the cloud is told.
    pub fn is_told(&self) -> bool {
        self.topic.is_some() || self.command.is_some()
    }
}

/// What an actuator is told while an alert fires and when it has ended, filled in from the row that made it fire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    pub topic: String,
    pub firing: String,
    pub resolved: Option<String>,
    /// To one topic not more often.
    pub every_us: i64,
}

/// What a rule counted since the data directory was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct RuleTotals {
    pub fired: u64,
    pub resolved: u64,
    pub backfilled: u64,
    /// Rows that made an expression fail.
    pub failed: u64,
    /// Alerts that did not begin because of `max_instances`.
    pub refused: u64,
}

/// A rule as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleStatus<'r> {
    pub name: &'r str,
    pub pending: usize,
    pub firing: usize,
    pub totals: RuleTotals,
}

/// What one rule says of a row by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    True,
    False,
    /// NULL: it changes nothing.
    Null,
    /// Why its expression fails on the row, which changes nothing.
    Fails(String),
    /// It is about silence, and not about rows.
    OfSilence,
}

/// Where a row comes in: a stream or window stream that some rule is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InputId(usize);

/// Whose row it is.
#[derive(Debug, Clone, Copy)]
pub struct Of<'r> {
    pub device: &'r str,
    /// Which group of windows, when that is more than its device: a text of its own for each.
    pub group: Option<&'r str>,
}

impl<'r> Of<'r> {
    /// One that stands for its device.
    pub fn device(device: &'r str) -> Self {
        Self { device, group: None }
    }
}

/// When a row happened, and when it came.
#[derive(Debug, Clone, Copy)]
pub struct When {
    /// Event time in µs; a reading begins and ends at once.
    pub from: i64,
    pub to: i64,
    /// Of the journal's entry.
    pub arrival: i64,
}

/// All rules. See the module's documentation.
#[derive(Debug)]
pub struct Rules {
    inputs: Vec<Input>,
    horizon: i64,
    devices_max: usize,
    last_arrival: i64,
    /// How long the agent has listened, in µs.
    heard: i64,
    /// Of rules that are no longer configured: they end with the next entry.
    gone: Vec<Transition>,
    out: Vec<Transition>,
}

impl Rules {
    /// Those of the settings, with nothing seen.
    ///
    /// # Errors
    /// What is not understood, for people.
    pub fn new(settings: &Settings) -> Result<Self, String> {
        let mut rules = Self {
            inputs: Vec::new(),
            horizon: settings.alerts.alert_horizon.micros(),
            devices_max: settings.alerts.devices_max as usize,
            last_arrival: i64::MIN,
            heard: 0,
            gone: Vec::new(),
            out: Vec::new(),
        };
        if settings.rule.len() > RULES_MAX {
            return Err(format!("{} [[rule]] are more than {RULES_MAX}", settings.rule.len()));
        }
        for (index, rule) in settings.rule.iter().enumerate() {
            let here = format!("[[rule]] `{}`", rule.name);
            if rule.name.is_empty() || rule.name.len() > 63 || rule.name.contains(['{', '}', '\n']) {
                return Err(format!("{here}: a name has from 1 to 63 characters, without braces"));
            }
            if settings.rule[..index].iter().any(|other| other.name == rule.name) {
                return Err(format!("two [[rule]] are called `{}`", rule.name));
            }
            let Origin { columns, lateness, by } =
                origin_of(settings, &rule.on).map_err(|text| format!("{here}: {text}"))?;
            if by.is_some() && lateness >= rules.horizon {
                return Err(format!("{here}: its windows close later than alert_horizon: all would be backfill"));
            }
            let known = rules.inputs.iter().position(|input| input.name == rule.on);
            let input = known.unwrap_or_else(|| {
                rules.inputs.push(Input::new(rule.on.clone(), columns, lateness, by.as_ref()));
                rules.inputs.len() - 1
            });
            let input = &mut rules.inputs[input];
            let read = Rule::new(rule, &input.columns, by.as_ref())?;
            for column in read.previous() {
                if !input.previous.contains(&column) {
                    input.previous.push(column);
                }
            }
            let alike = read.topic.as_ref().is_some_and(|topic| !topic.has_rule() && !topic.has_id());
            if let Some(topic) = rule.topic.as_ref().filter(|_| alike)
                && settings.rule[..index].iter().any(|other| other.topic.as_ref() == Some(topic))
            {
                return Err(format!("{here} topic: another rule has `{topic}`, too; put {{rule}} into it"));
            }
            if let Condition::Absent(absent) = read.condition {
                input.absent_min = Some(input.absent_min.map_or(absent, |least| least.min(absent)));
            }
            input.rules.push(Kept { rule: read, totals: RuleTotals::default(), alerts: 0 });
        }
        for input in &mut rules.inputs {
            input.previous.sort_unstable();
        }
        Ok(rules)
    }

    /// The input of a stream or window stream that some rule is on.
    pub fn input(&self, stream: &StreamName) -> Option<InputId> {
        self.inputs.iter().position(|input| input.name == *stream).map(InputId)
    }

    /// An entry of the journal came at this time by the gateway's clock, µs since 1970 UTC.
    pub fn tick(&mut self, arrival: i64) {
        self.out.append(&mut self.gone);
        if self.last_arrival != i64::MIN {
            self.heard += arrival.saturating_sub(self.last_arrival).clamp(0, LISTEN_STEP_US);
        }
        self.last_arrival = arrival;
    }

    /// When the last entry came, by the gateway's clock.
    pub fn now(&self) -> i64 {
        self.last_arrival
    }

    /// A row: its values in the order of the input's columns.
    pub fn row(&mut self, input: InputId, of: Of<'_>, when: When, values: &[Option<Value>]) {
        let (device, key) = (of.device, of.group.unwrap_or(of.device));
        let input = &mut self.inputs[input.0];
        input.newest = input.newest.max(when.to);
        if !input.devices.contains_key(key) {
            if input.devices.len() >= self.devices_max && !input.forget_some() {
                input.devices_refused += 1;
                return;
            }
            let name = of.group.map(|_| device.to_owned());
            input.devices.insert(key.to_owned(), Device { name, last: i64::MIN, ..Device::default() });
        }
        let watermark = input.watermark();
        let entry = input.devices.get_mut(key).expect("it was put there");
        entry.heard = self.heard;
        let in_order = when.to >= entry.last;
        entry.last = entry.last.max(when.to);
        let mut pass = Pass {
            stream: input.name.as_str(),
            horizon: self.horizon,
            row: Row { device, values, previous: &entry.previous },
            when,
            out: &mut self.out,
        };
        let mut at = 0;
        for (index, kept) in input.rules.iter_mut().enumerate() {
            while entry.alerts.get(at).is_some_and(|alert| alert.rule < index) {
                at += 1;
            }
            match &kept.rule.condition {
                Condition::Absent(absent) => {
                    let here = entry.alerts.get(at).is_some_and(|alert| alert.rule == index);
                    if here && watermark.saturating_sub(entry.last) < *absent {
                        let alert = entry.alerts.remove(at);
                        pass.end(kept, alert);
                    }
                }
                Condition::When { .. } if !in_order => {}
                Condition::When { .. } => pass.judge(index, kept, &mut entry.alerts, at),
            }
        }
        if in_order && !input.previous.is_empty() {
            entry.previous.clear();
            entry.previous.resize(values.len().min(input.previous.last().map_or(0, |last| last + 1)), None);
            for column in &input.previous {
                if let (Some(kept), Some(value)) = (entry.previous.get_mut(*column), values.get(*column)) {
                    kept.clone_from(value);
                }
            }
        }
    }

    /// What each rule's `when` says of a row by itself, with the rule's name and its `for` in µs; changes nothing.
    pub fn verdicts<'a>(
        &'a self,
        input: InputId,
        device: &'a str,
        values: &'a [Option<Value>],
    ) -> impl Iterator<Item = (&'a str, i64, Verdict)> {
        let input = &self.inputs[input.0];
        let previous = input.devices.get(device).map_or(&[][..], |device| &device.previous);
        let row = Row { device, values, previous };
        input.rules.iter().map(move |Kept { rule, .. }| {
            let verdict = match &rule.condition {
                Condition::Absent(_) => Verdict::OfSilence,
                Condition::When { when, .. } => match when.test(&row) {
                    Ok(Some(true)) => Verdict::True,
                    Ok(Some(false)) => Verdict::False,
                    Ok(None) => Verdict::Null,
                    Err(error) => Verdict::Fails(error.to_string()),
                },
            };
            (rule.name.as_str(), rule.hold, verdict)
        })
    }

    /// Looks for devices that have fallen silent; after the rows of an entry.
    pub fn look_for_silence(&mut self) {
        for input in &mut self.inputs {
            let Some(least) = input.absent_min else { continue };
            let watermark = input.watermark();
            let by_clock = self.heard - input.looked.heard >= LOOK_EVERY_US.min(least);
            let by_events = watermark.saturating_sub(input.looked.watermark) >= (least / 8).max(LOOK_EVERY_US);
            if !by_clock && !by_events {
                continue;
            }
            input.looked = Looked { heard: self.heard, watermark };
            for (index, kept) in input.rules.iter_mut().enumerate() {
                let Condition::Absent(absent) = kept.rule.condition else { continue };
                for (device, entry) in &mut input.devices {
                    let unheard = self.heard - entry.heard >= absent;
                    if !unheard && watermark.saturating_sub(entry.last) < absent {
                        continue;
                    }
                    let begun = entry.last.saturating_add(absent);
                    let mut pass = Pass {
                        stream: input.name.as_str(),
                        horizon: self.horizon,
                        row: Row { device, values: &[], previous: &[] },
                        // What is not heard now is of now, whenever it was last heard.
                        when: When {
                            from: entry.last,
                            to: begun,
                            arrival: if unheard { begun } else { self.last_arrival },
                        },
                        out: &mut self.out,
                    };
                    let at = entry.alerts.partition_point(|alert| alert.rule < index);
                    match entry.alerts.get_mut(at).filter(|alert| alert.rule == index) {
                        Some(alert) if !alert.announced => pass.fire(kept, alert),
                        Some(_) => {}
                        None => pass.begin(index, kept, &mut entry.alerts, at, None),
                    }
                }
            }
        }
    }

    /// What has become of alerts since it was last asked.
    pub fn take(&mut self) -> Vec<Transition> {
        std::mem::take(&mut self.out)
    }

    /// What fires in earnest, as it was found, whether or not anybody is told.
    pub fn firing(&self) -> impl Iterator<Item = Transition> {
        self.inputs.iter().flat_map(|input| {
            input.devices.iter().flat_map(move |(key, entry)| {
                let announced = entry.alerts.iter().filter(|alert| alert.announced);
                announced.map(move |alert| input.as_it_stands(entry.name_or(key), alert))
            })
        })
    }

    /// The rules as they stand.
    pub fn status(&self) -> impl Iterator<Item = RuleStatus<'_>> {
        self.inputs.iter().flat_map(|input| {
            let mut counts = vec![(0, 0); input.rules.len()];
            for alert in input.devices.values().flat_map(|device| &device.alerts) {
                let (pending, firing) = &mut counts[alert.rule];
                *if alert.firing { firing } else { pending } += 1;
            }
            input.rules.iter().zip(counts).map(|(kept, (pending, firing))| RuleStatus {
                name: &kept.rule.name,
                pending,
                firing,
                totals: kept.totals,
            })
        })
    }
}
