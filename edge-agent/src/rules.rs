//! Rules over readings, windows and silence: when an alert begins, fires and ends. Pure and deterministic; time is what the
//! rows and the journal's entries say.
//!
//! An alert is of one rule, device and labels. It is *pending* from the first row whose `when` is true, *firing* when that
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
//! of a stream, `max_instances` of a rule; what does not fit is counted. State as bytes: `rules/state.rs`.

pub mod expression;
mod rule;
mod state;
mod template;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};
use wire::{FieldType, StreamName};

use self::expression::{Columns, Row};
use self::rule::{Condition, Rule, hex};
pub use self::rule::{RULES_MAX, RuleHash};
pub use self::state::StateError;
use self::template::Filling;
use crate::config::{Settings, SourceSettings};
use crate::decode::Value;
use crate::source::host;
use crate::window;

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

/// Where a row comes in: a stream or window stream that some rule is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InputId(usize);

/// When a row happened, and when it came.
#[derive(Debug, Clone, Copy)]
pub struct When {
    /// Event time in µs; a reading begins and ends at once.
    pub from: i64,
    pub to: i64,
    /// Of the journal's entry.
    pub arrival: i64,
}

/// An alert that is pending or fires.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Alert {
    rule: usize,
    /// JSON.
    labels: String,
    firing: bool,
    /// Whether it was ever more than a backfill.
    announced: bool,
    from: i64,
    /// Set when it fires.
    id: String,
    topic: Option<String>,
}

#[derive(Debug, Default)]
struct Device {
    /// Event time of its newest row.
    last: i64,
    /// When it was last heard, by the clock of [`Rules::tick`].
    heard: i64,
    /// Of its newest row, the columns that some rule wants.
    previous: Vec<Option<Value>>,
    /// By rule, then labels.
    alerts: Vec<Alert>,
}

/// A rule with what belongs to it.
#[derive(Debug)]
struct Kept {
    rule: Rule,
    totals: RuleTotals,
    alerts: usize,
}

#[derive(Debug)]
struct Input {
    name: StreamName,
    columns: Columns,
    /// Columns whose values of the row before are kept.
    previous: Vec<usize>,
    lateness: i64,
    rules: Vec<Kept>,
    devices: BTreeMap<String, Device>,
    newest: i64,
    looked: Looked,
    devices_refused: u64,
}

/// When silence was last looked for.
#[derive(Debug, Clone, Copy)]
struct Looked {
    heard: i64,
    watermark: i64,
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
            let (columns, lateness, on_windows) =
                columns_of(settings, &rule.on).map_err(|text| format!("{here}: {text}"))?;
            if on_windows && lateness >= rules.horizon {
                return Err(format!("{here}: its windows close later than alert_horizon: all would be backfill"));
            }
            let known = rules.inputs.iter().position(|input| input.name == rule.on);
            let input = known.unwrap_or_else(|| {
                rules.inputs.push(Input::new(rule.on.clone(), columns, lateness));
                rules.inputs.len() - 1
            });
            let input = &mut rules.inputs[input];
            let read = Rule::new(rule, &input.columns, on_windows)?;
            for column in read.previous() {
                if !input.previous.contains(&column) {
                    input.previous.push(column);
                }
            }
            if let Some(topic) = rule
                .topic
                .as_ref()
                .filter(|_| read.topic.as_ref().is_some_and(|topic| !topic.has_rule() && !topic.has_id()))
                && settings.rule[..index].iter().any(|other| other.topic.as_ref() == Some(topic))
            {
                return Err(format!("{here} topic: another rule has `{topic}`, too; put {{rule}} into it"));
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

    /// A row: its values in the order of the input's columns.
    pub fn row(&mut self, input: InputId, device: &str, when: When, values: &[Option<Value>]) {
        let input = &mut self.inputs[input.0];
        input.newest = input.newest.max(when.to);
        if !input.devices.contains_key(device) {
            if input.devices.len() >= self.devices_max && !input.forget_some() {
                input.devices_refused += 1;
                return;
            }
            let fresh = Device { last: i64::MIN, ..Device::default() };
            input.devices.insert(device.to_owned(), fresh);
        }
        let watermark = input.watermark();
        let entry = input.devices.get_mut(device).expect("it was put there");
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

    /// Looks for devices that have fallen silent; after the rows of an entry.
    pub fn look_for_silence(&mut self) {
        for input in &mut self.inputs {
            let least = input.rules.iter().filter_map(|kept| match kept.rule.condition {
                Condition::Absent(absent) => Some(absent),
                Condition::When { .. } => None,
            });
            let Some(least) = least.min() else { continue };
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

    /// What is published and fires: id, and its row as it would be written now.
    pub fn firing(&self) -> Vec<Transition> {
        let mut all = Vec::new();
        for input in &self.inputs {
            for (device, entry) in &input.devices {
                for alert in entry.alerts.iter().filter(|alert| alert.announced && alert.topic.is_some()) {
                    all.push(input.as_it_stands(device, entry, alert, Turn::Firing));
                }
            }
        }
        all
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

/// The columns of what a rule is on, how late its rows may come, and whether it is windows.
fn columns_of(settings: &Settings, on: &StreamName) -> Result<(Columns, i64, bool), String> {
    if on.as_str() == "host" && settings.source.iter().any(|source| matches!(source, SourceSettings::Host(_))) {
        let host = host::stream_settings();
        let fields = host.fields.iter().map(|(name, field)| (name.to_string(), field.kind));
        return Ok((Columns::new(fields), host.lateness.micros(), false));
    }
    for (name, stream) in &settings.stream {
        if name == on {
            let fields = stream.fields.iter().map(|(name, field)| (name.to_string(), field.kind));
            return Ok((Columns::new(fields), stream.lateness.micros(), false));
        }
        if stream.windows(name).iter().any(|(window, _)| window == on) {
            let schema = window::schema(stream);
            // The bounds of a window are its event time.
            let fields = schema.fields().iter().filter(|field| field.kind != FieldType::Timestamp);
            let columns = Columns::new(fields.map(|field| (field.name.to_string(), field.kind)));
            return Ok((columns, stream.lateness.micros(), true));
        }
    }
    let known = settings.stream.iter().flat_map(|(name, stream)| {
        let windows = stream.windows(name).into_iter().map(|(window, _)| window.to_string());
        std::iter::once(name.to_string()).chain(windows)
    });
    Err(format!("there is no stream `{on}`; there are {}", known.collect::<Vec<_>>().join(", ")))
}

impl Input {
    fn new(name: StreamName, columns: Columns, lateness: i64) -> Self {
        Self {
            name,
            columns,
            previous: Vec::new(),
            lateness,
            rules: Vec::new(),
            devices: BTreeMap::new(),
            newest: i64::MIN,
            looked: Looked { heard: 0, watermark: i64::MIN },
            devices_refused: 0,
        }
    }

    fn watermark(&self) -> i64 {
        if self.newest == i64::MIN { i64::MIN } else { self.newest.saturating_sub(self.lateness) }
    }

    /// Forgets an eighth of the devices without alerts, those that were silent longest. False: there is none.
    fn forget_some(&mut self) -> bool {
        let mut quiet = self.devices.iter().filter(|(_, device)| device.alerts.is_empty());
        let mut quiet =
            quiet.by_ref().map(|(name, device)| (device.heard, device.last, name.clone())).collect::<Vec<_>>();
        let many = quiet.len().div_ceil(8);
        quiet.sort_unstable();
        quiet.truncate(many);
        for (_, _, name) in &quiet {
            self.devices.remove(name);
        }
        !quiet.is_empty()
    }

    /// An alert whose row is not at hand.
    fn as_it_stands(&self, device: &str, entry: &Device, alert: &Alert, turn: Turn) -> Transition {
        let rule = &self.rules[alert.rule].rule;
        Transition {
            ts: entry.last,
            device: device.to_owned(),
            rule: rule.name.clone(),
            rule_hash: hex(&rule.hash.0),
            id: alert.id.clone(),
            turn,
            severity: rule.severity.word(),
            stream: self.name.to_string(),
            labels: alert.labels.clone(),
            message: format!("{}: {device}", rule.name),
            from: alert.from,
            to: None,
            topic: alert.topic.clone(),
        }
    }
}

/// One row's way past the rules.
struct Pass<'p> {
    stream: &'p str,
    horizon: i64,
    row: Row<'p>,
    when: When,
    out: &'p mut Vec<Transition>,
}

impl Pass<'_> {
    /// What the row means for one rule; `at` is where the device's alerts of this rule begin.
    fn judge(&mut self, index: usize, kept: &mut Kept, alerts: &mut Vec<Alert>, at: usize) {
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
    fn begin(&mut self, index: usize, kept: &mut Kept, alerts: &mut Vec<Alert>, at: usize, labels: Option<String>) {
        if kept.alerts >= kept.rule.max_instances {
            kept.totals.refused += 1;
            return;
        }
        kept.alerts += 1;
        let labels = labels.unwrap_or_else(|| self.labels(&kept.rule));
        let from = self.when.from;
        let alert =
            Alert { rule: index, labels, firing: false, announced: false, from, id: String::new(), topic: None };
        alerts.insert(at, alert);
        if self.when.to.saturating_sub(from) >= kept.rule.hold {
            self.fire(kept, &mut alerts[at]);
        }
    }

    fn fire(&mut self, kept: &mut Kept, alert: &mut Alert) {
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
        alert.topic = kept.rule.topic.as_ref().map(|topic| topic.fill_topic(&with)).filter(|_| !old);
        let turn = if old { Turn::Backfill } else { Turn::Firing };
        let transition = self.transition(&kept.rule, alert, turn, None);
        self.out.push(transition);
    }

    fn end(&mut self, kept: &mut Kept, alert: Alert) {
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
