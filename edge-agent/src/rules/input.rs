//! What the rules remember of one stream or window stream: its devices, their last row, and their alerts.
//!
//! [`columns_of`] is the one place that knows what rules can be on.

use std::collections::BTreeMap;

use wire::{FieldType, StreamName, StreamSchema};

use super::expression::Columns;
use super::rule::{Rule, hex};
use super::{Command, RuleTotals, Transition, Turn};
use crate::config::{Settings, SourceSettings};
use crate::decode::Value;
use crate::source::host;
use crate::validate::absent_schema;
use crate::window;

/// An alert that is pending or fires.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Alert {
    pub(super) rule: usize,
    /// JSON.
    pub(super) labels: String,
    pub(super) firing: bool,
    /// Whether it was ever more than a backfill.
    pub(super) announced: bool,
    pub(super) from: i64,
    /// What follows is set when it fires.
    pub(super) id: String,
    pub(super) ts: i64,
    pub(super) message: String,
    pub(super) topic: Option<String>,
    pub(super) command: Option<Command>,
}

#[derive(Debug, Default)]
pub(super) struct Device {
    /// Event time of its newest row.
    pub(super) last: i64,
    /// When it was last heard, by the clock of [`Rules::tick`].
    pub(super) heard: i64,
    /// Of its newest row, the columns that some rule wants.
    pub(super) previous: Vec<Option<Value>>,
    /// By rule, then labels.
    pub(super) alerts: Vec<Alert>,
}

/// A rule with what belongs to it.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) rule: Rule,
    pub(super) totals: RuleTotals,
    pub(super) alerts: usize,
}

#[derive(Debug)]
pub(super) struct Input {
    pub(super) name: StreamName,
    pub(super) columns: Columns,
    /// Columns whose values of the row before are kept.
    pub(super) previous: Vec<usize>,
    pub(super) lateness: i64,
    pub(super) rules: Vec<Kept>,
    pub(super) devices: BTreeMap<String, Device>,
    pub(super) newest: i64,
    pub(super) looked: Looked,
    /// The shortest silence that some rule is on; asked with every entry.
    pub(super) absent_min: Option<i64>,
    pub(super) devices_refused: u64,
}

/// When silence was last looked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Looked {
    pub(super) heard: i64,
    pub(super) watermark: i64,
}

/// The columns of what a rule is on, how late its rows may come, and whether it is windows.
pub(super) fn columns_of(settings: &Settings, on: &StreamName) -> Result<(Columns, i64, bool), String> {
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
        if let Some((_, window)) = stream.windows(name).into_iter().find(|(window, _)| window == on) {
            let schema = window::schema(stream, window).map_err(|error| error.to_string())?;
            return Ok((without_times(&schema), stream.lateness.micros(), true));
        }
        if stream.absent_stream(name).is_some_and(|absent| absent == *on) {
            return Ok((without_times(&absent_schema()), stream.lateness.micros(), false));
        }
    }
    let known = settings.stream.iter().flat_map(|(name, stream)| {
        let windows = stream.windows(name).into_iter().map(|(window, _)| window.to_string());
        let absent = stream.absent_stream(name).map(|absent| absent.to_string());
        std::iter::once(name.to_string()).chain(windows).chain(absent)
    });
    Err(format!("there is no stream `{on}`; there are {}", known.collect::<Vec<_>>().join(", ")))
}

/// The bounds of a window are its event time, and not asked about; so with when a device was heard last.
fn without_times(schema: &StreamSchema) -> Columns {
    let fields = schema.fields().iter().filter(|field| field.kind != FieldType::Timestamp);
    Columns::new(fields.map(|field| (field.name.to_string(), field.kind)))
}

impl Input {
    pub(super) fn new(name: StreamName, columns: Columns, lateness: i64) -> Self {
        Self {
            name,
            columns,
            previous: Vec::new(),
            lateness,
            rules: Vec::new(),
            devices: BTreeMap::new(),
            newest: i64::MIN,
            looked: Looked { heard: 0, watermark: i64::MIN },
            absent_min: None,
            devices_refused: 0,
        }
    }

    pub(super) fn watermark(&self) -> i64 {
        if self.newest == i64::MIN { i64::MIN } else { self.newest.saturating_sub(self.lateness) }
    }

    /// Forgets an eighth of the devices without alerts, those that were silent longest. False: there is none.
    pub(super) fn forget_some(&mut self) -> bool {
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

    /// What was told when an alert fired.
    pub(super) fn as_it_stands(&self, device: &str, alert: &Alert) -> Transition {
        let rule = &self.rules[alert.rule].rule;
        Transition {
            ts: alert.ts,
            device: device.to_owned(),
            rule: rule.name.clone(),
            rule_hash: hex(&rule.hash.0),
            id: alert.id.clone(),
            turn: Turn::Firing,
            severity: rule.severity.word(),
            stream: self.name.to_string(),
            labels: alert.labels.clone(),
            message: alert.message.clone(),
            from: alert.from,
            to: None,
            topic: alert.topic.clone(),
            command: alert.command.clone(),
        }
    }
}
