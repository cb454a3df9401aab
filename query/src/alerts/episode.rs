//! What an alert is: one episode of a rule and a label set, whoever raises it.
//!
//! *Pending* from the first row that holds, *firing* when that has lasted for `for`, *resolved* by a newer row that does not
//! hold, with `keep_firing_for` when that has lasted, too. The cloud's rules and every edge are *origins*: each raises and
//! lowers the alert by itself, and it fires while one of them says so. Its id is that of the origin that was first; those of
//! the others are aliases. Words and ids are those of the edge (`edge-agent/src/rules`): id = hash of the rule's hash, device,
//! labels and beginning, so edge and cloud mostly give the same one.

use std::collections::BTreeMap;

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

use super::order::Moment;
use super::template::{Message, Places, Words};

/// The origin that the cloud's own rules are.
pub(crate) const CLOUD: &str = "weir";
/// Ids of one alert that are kept, beside its own.
pub(crate) const ALIASES_MAX: usize = 16;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Info,
    #[default]
    Warning,
    Critical,
}

impl Severity {
    /// The word in rows and messages.
    pub fn word(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }

    /// The severity of this word.
    pub fn of(word: &str) -> Option<Self> {
        [Self::Info, Self::Warning, Self::Critical].into_iter().find(|severity| severity.word() == word)
    }
}

/// Where an alert stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    Pending,
    Firing,
    Resolved,
}

impl Phase {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Firing => "firing",
            Self::Resolved => "resolved",
        }
    }
}

/// Why nobody is told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Quiet {
    /// It was found too long after it happened.
    Backfill,
    Silenced,
    Inhibited,
}

impl Quiet {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Backfill => "backfill",
            Self::Silenced => "silenced",
            Self::Inhibited => "inhibited",
        }
    }
}

/// Somebody has taken it on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Acknowledged {
    pub(crate) by: String,
    pub(crate) note: String,
    pub(crate) at: i64,
    pub(crate) severity: Severity,
    pub(crate) value: Option<f64>,
}

/// What the rows say of a label set, before they raise it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Watch {
    /// Event times, µs: of the first row that held, and of the newest.
    pub(crate) from: i64,
    pub(crate) last: i64,
    pub(crate) firing: bool,
    /// The first row that did not hold, while the alert is kept firing.
    pub(crate) clear: Option<i64>,
    /// Of the newest row, when its window was revised.
    #[serde(default)]
    pub(crate) revision: i64,
}

impl Watch {
    /// The clock that its times are of was set by so much.
    pub(crate) fn shift(&mut self, by: i64) {
        self.from = self.from.saturating_add(by);
        self.last = self.last.saturating_add(by);
        self.clear = self.clear.map(|clear| clear.saturating_add(by));
    }
}

/// What one origin says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Raised {
    pub(crate) id: String,
    pub(crate) from: i64,
    pub(crate) to: Option<i64>,
    /// Event time of what made it fire.
    #[serde(default)]
    pub(crate) fired: i64,
}

/// One alert, from its beginning to its end. Times are µs since 1970 UTC.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Episode {
    pub(crate) id: String,
    pub(crate) rule: String,
    pub(crate) hash: String,
    pub(crate) stream: String,
    /// A JSON object, its keys in order.
    pub(crate) labels: String,
    pub(crate) device: Option<String>,
    pub(crate) phase: Phase,
    /// Whether somebody was told that it fires.
    pub(crate) told: bool,
    pub(crate) quiet: Option<Quiet>,
    pub(crate) severity: Severity,
    pub(crate) value: Option<f64>,
    pub(crate) from: i64,
    pub(crate) to: Option<i64>,
    pub(crate) message: String,
    pub(crate) topic: String,
    pub(crate) acknowledged: Option<Acknowledged>,
    pub(crate) assigned: Option<String>,
    pub(crate) watch: Option<Watch>,
    pub(crate) raised: BTreeMap<String, Raised>,
    pub(crate) aliases: Vec<String>,
    /// By the node's clock: when it was last told, and when `watch.clear` began.
    pub(crate) told_at: i64,
    pub(crate) clear_at: i64,
    /// When it ended while an origin still raises it: that one's end is waited for.
    pub(crate) unsettled_at: Option<i64>,
    /// Since when it is kept firing, `keep_firing_for`, because the edge that raised it says that it has ended.
    #[serde(default)]
    pub(crate) lingers: Option<i64>,
    /// Somebody ended it then: what is older belongs to it, what is newer is another.
    #[serde(default)]
    pub(crate) ended_by_hand: Option<i64>,
    /// Only edges raise it, and none of them was heard for long.
    #[serde(default)]
    pub(crate) stale: bool,
    /// What people were told of its beginnings and ends, from the first to the last.
    #[serde(default)]
    pub(crate) told_as: Option<(i64, i64)>,
    /// It turned out to be one with this alert.
    #[serde(default)]
    pub(crate) merged_into: Option<String>,
}

impl Episode {
    /// One that a row begins, pending.
    pub(crate) fn new(policy: &Policy, seen: &Seen<'_>) -> Self {
        Self {
            rule: policy.name.clone(),
            hash: policy.hash.clone(),
            stream: policy.stream.clone(),
            labels: seen.labels.to_owned(),
            device: seen.device.map(str::to_owned),
            value: seen.value,
            ..Self::begun(
                id(&policy.hash, seen.device, seen.labels, seen.from),
                seen.severity.unwrap_or(policy.severity),
                seen.from,
            )
        }
    }

    /// One of this id, pending, of which nothing else is known yet.
    pub(crate) fn begun(id: String, severity: Severity, from: i64) -> Self {
        Self {
            id,
            rule: String::new(),
            hash: String::new(),
            stream: String::new(),
            labels: String::new(),
            device: None,
            phase: Phase::Pending,
            told: false,
            quiet: None,
            severity,
            value: None,
            from,
            to: None,
            message: String::new(),
            topic: String::new(),
            acknowledged: None,
            assigned: None,
            watch: None,
            raised: BTreeMap::new(),
            aliases: Vec::new(),
            told_at: 0,
            clear_at: 0,
            unsettled_at: None,
            lingers: None,
            ended_by_hand: None,
            stale: false,
            told_as: None,
            merged_into: None,
        }
    }

    /// Whether some origin still raises it, or did a moment ago.
    pub(crate) fn is_raised(&self) -> bool {
        self.lingers.is_some() || self.raised.values().any(|raised| raised.to.is_none())
    }

    /// Whether an interval of event time meets its own, with so much between them.
    pub(crate) fn meets(&self, from: i64, to: Option<i64>, slack: i64) -> bool {
        let end = if self.is_raised() { i64::MAX } else { self.to.unwrap_or(i64::MAX) };
        from <= end.saturating_add(slack) && self.from <= to.unwrap_or(i64::MAX).saturating_add(slack)
    }

    /// How far an interval of event time is from its own; 0 when they meet.
    pub(crate) fn distance(&self, from: i64, to: i64) -> i64 {
        let end = self.to.unwrap_or(i64::MAX);
        from.saturating_sub(end).max(self.from.saturating_sub(to)).max(0)
    }

    pub(crate) fn is_called(&self, id: &str) -> bool {
        self.id == id || self.aliases.iter().any(|alias| alias == id)
    }

    /// Another id of it.
    pub(crate) fn alias(&mut self, id: &str) {
        if !self.is_called(id) && self.aliases.len() < ALIASES_MAX {
            self.aliases.push(id.to_owned());
        }
    }

    /// Whether it is now worse than when it was acknowledged.
    pub(crate) fn is_worse(&self, policy: &Policy) -> bool {
        let Some(known) = &self.acknowledged else { return false };
        let by_value = match (policy.worse_by, self.value, known.value) {
            (Some(by), Some(value), Some(known)) if by >= 0.0 => value >= known + by,
            (Some(by), Some(value), Some(known)) => value <= known + by,
            _ => false,
        };
        by_value || self.severity > known.severity
    }
}

/// What a rule says of its alerts.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Policy {
    pub(crate) name: String,
    /// Changes with what decides when an alert begins and ends, and which it is.
    pub(crate) hash: String,
    pub(crate) stream: String,
    /// `for`, `keep_firing_for`, and what may lie between what two origins call one alert, µs.
    pub(crate) hold: i64,
    pub(crate) keep: i64,
    pub(crate) slack: i64,
    pub(crate) severity: Severity,
    pub(crate) repeat_every: Option<i64>,
    pub(crate) inhibited_by: Vec<String>,
    pub(crate) worse_by: Option<f64>,
    pub(crate) instances_max: usize,
    /// Whether its rows are as old as the question, so that the machine's clock is their event time.
    pub(crate) by_clock: bool,
    pub(crate) message: Message,
    pub(crate) topic: Places,
}

impl Policy {
    /// What the message and the topic of an alert are made of.
    pub(crate) fn words(&self, id: &str, severity: Severity, seen: &Seen<'_>) -> Words {
        let mut words = (seen.values)();
        for (name, text) in
            [("rule", &*self.name), ("stream", &*self.stream), ("severity", severity.word()), ("id", id)]
        {
            words.insert(name.to_owned(), text.into());
        }
        if let Ok(labels) = serde_json::from_str::<serde_json::Map<_, _>>(seen.labels) {
            for (name, value) in &labels {
                words.entry(name.clone()).or_insert_with(|| value.clone());
            }
            words.insert("labels".to_owned(), labels.into());
        }
        if let Some(device) = seen.device {
            words.insert("device".to_owned(), device.into());
        }
        words
    }
}

/// What a row says of its label set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Says {
    Holds,
    /// It does not hold, and ends.
    Not,
    /// It does not hold: what is pending never was, what fires goes on until its end is said.
    Lapses,
    /// Nobody knows whether it holds, and what fires ends.
    Ends,
    Neither,
}

/// A row, as far as one rule is concerned.
pub(crate) struct Seen<'s> {
    pub(crate) labels: &'s str,
    pub(crate) device: Option<&'s str>,
    pub(crate) says: Says,
    /// Event time: a reading begins and ends at once.
    pub(crate) from: i64,
    pub(crate) moment: Moment,
    /// Where the row says another one than the rule.
    pub(crate) severity: Option<Severity>,
    pub(crate) value: Option<f64>,
    /// The row's values, made when they are needed.
    pub(crate) values: &'s dyn Fn() -> Words,
}

impl Seen<'_> {
    /// Its end in event time, µs.
    pub(crate) fn to(&self) -> i64 {
        self.moment.0
    }
}

/// What an edge says of an alert of its own.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) edge: String,
    pub(crate) id: String,
    pub(crate) rule: String,
    pub(crate) hash: String,
    pub(crate) stream: String,
    pub(crate) labels: String,
    pub(crate) device: Option<String>,
    pub(crate) severity: Severity,
    pub(crate) message: String,
    /// The edge found it too late to act on.
    pub(crate) backfill: bool,
    pub(crate) ts: i64,
    pub(crate) from: i64,
    pub(crate) to: Option<i64>,
}

/// The identity of an alert, as at the edge: from the rule's hash (32 hexadecimal digits), the device, the labels without the
/// device, and the beginning.
pub(crate) fn id(hash: &str, device: Option<&str>, labels: &str, from: i64) -> String {
    let mut digest = Context::new(&SHA256);
    let bytes: Option<Vec<u8>> =
        (0..hash.len() / 2).map(|at| u8::from_str_radix(hash.get(2 * at..2 * at + 2)?, 16).ok()).collect();
    digest.update(&bytes.unwrap_or_default());
    let mut labels: BTreeMap<String, serde_json::Value> = serde_json::from_str(labels).unwrap_or_default();
    if device.is_some() {
        labels.remove("device");
    }
    let labels = serde_json::to_string(&labels).unwrap_or_default();
    for text in [device.unwrap_or_default(), &labels] {
        digest.update(&(text.len() as u64).to_le_bytes());
        digest.update(text.as_bytes());
    }
    digest.update(&from.to_le_bytes());
    digest.finish().as_ref()[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}
