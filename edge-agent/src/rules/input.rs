//! What the rules remember of one stream or window stream: its devices, their last row, and their alerts.
//!
//! [`origin_of`] is the one place that knows what rules can be on.

use std::collections::BTreeMap;

use wire::{FieldType, StreamName, StreamSchema};

use super::expression::Columns;
use super::rule::{Rule, hex};
use super::{Command, RuleTotals, Transition, Turn};
use crate::config::{By, Settings, SourceSettings, Span};
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

/// What is known of a device, or of a group of windows.
#[derive(Debug, Default)]
pub(super) struct Device {
    /// Of a group: the device of its rows.
    pub(super) name: Option<String>,
    /// Event time of its newest row.
    pub(super) last: i64,
    /// When it was last heard, by the clock of [`Rules::tick`].
    pub(super) heard: i64,
    /// Of its newest row, the columns that some rule wants.
    pub(super) previous: Vec<Option<Value>>,
    /// By rule, then labels.
    pub(super) alerts: Vec<Alert>,
}

impl Device {
    /// The device of its rows; without a name of its own what it is known by.
    pub(super) fn name_or<'k>(&'k self, key: &'k str) -> &'k str {
        self.name.as_deref().unwrap_or(key)
    }
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
    /// What its rows stand for: nothing but their device, `*`, or fields.
    pub(super) by: Vec<String>,
    /// Columns whose values of the row before are kept.
    pub(super) previous: Vec<usize>,
    pub(super) lateness: i64,
    pub(super) rules: Vec<Kept>,
    /// By device, or by group.
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

/// What a rule is on.
pub(super) struct Origin {
    pub(super) columns: Columns,
    /// How late its rows may come, µs.
    pub(super) lateness: i64,
    /// What its windows are grouped by; None of what is no windows.
    pub(super) by: Option<By>,
}

pub(super) fn origin_of(settings: &Settings, on: &StreamName) -> Result<Origin, String> {
    let origin = |columns, lateness: Span, by| Origin { columns, lateness: lateness.micros(), by };
    if on.as_str() == "host" && settings.source.iter().any(|source| matches!(source, SourceSettings::Host(_))) {
        let host = host::stream_settings();
        let fields = host.fields.iter().map(|(name, field)| (name.to_string(), field.kind));
        return Ok(origin(Columns::new(fields), host.lateness, None));
    }
    for (name, stream) in &settings.stream {
        if name == on {
            let fields = stream.fields.iter().map(|(name, field)| (name.to_string(), field.kind));
            return Ok(origin(Columns::new(fields), stream.lateness, None));
        }
        if let Some((_, window)) = stream.windows(name).into_iter().find(|(window, _)| window == on) {
            let schema = window::schema(stream, window).map_err(|error| error.to_string())?;
            return Ok(origin(without_times(&schema), stream.lateness, Some(window.by.clone())));
        }
        if stream.absent_stream(name).is_some_and(|absent| absent == *on) {
            return Ok(origin(without_times(&absent_schema()), stream.lateness, None));
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
    pub(super) fn new(name: StreamName, columns: Columns, lateness: i64, by: Option<&By>) -> Self {
        let by = match by {
            None | Some(By::Device) => Vec::new(),
            Some(By::All) => vec!["*".to_owned()],
            Some(By::Fields { device, fields }) => {
                let device = device.then(|| "device".to_owned());
                device.into_iter().chain(fields.iter().map(ToString::to_string)).collect()
            }
        };
        Self {
            name,
            columns,
            by,
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
