//! The state of the rules as bytes, exact, and back.
//!
//! Version 1, little-endian (`text` is a u32 length and UTF-8); what is in brackets is in version 2 alone, which is written when
//! some input is of windows that are not by device:
//! ```text
//! version u8 = 1 or 2 | last_arrival i64 | heard i64 | inputs u16 | input* | gone u32 | transition*
//! input:      name text | [by u16 | text*] | newest i64 | looked heard i64, watermark i64 | devices_refused u64
//!             | columns u16 | (name text | kind u8)* | rules u16 | rule* | devices u32 | device*
//! rule:       hash [16] | name text | severity u8 | fired u64 | resolved u64 | backfilled u64 | failed u64 | refused u64
//! device:     name text, or group text | [device? text] | last i64 | heard i64 | value for each column | alerts u16 | alert*
//! alert:      rule u16 | labels text | flags u8 (1 firing, 2 announced) | from i64 | id text | ts i64 | message text
//!             | topic? text | command? (topic, firing text | resolved? text | every i64)
//! value:      0 | 1 f64 | 2 i64 | 3 u8 | 4 text           topic?: 0 u8, or 1 u8 and what it is
//! transition: ts i64 | device, rule, rule hash, id text | turn u8 | severity u8 | stream, labels, message text
//!             | from i64 | to? i64 | topic? text | command?
//! ```
//! A rule is found again by its hash. What fires and has no rule any more ends with the next entry of the journal: somebody
//! was told that it fires. So does what fires over windows that are grouped by something else now.

use bytes::{Buf, Bytes};
use wire::FieldType;

use super::input::{Alert, Device, Input, Looked};
use super::rule::hex;
use super::{Command, RuleHash, RuleTotals, Rules, Transition, Turn};
use crate::config::Severity;
use crate::decode::Value;

const VERSION: u8 = 1;
const VERSION_WITH_GROUPS: u8 = 2;

/// The bytes are no state of this version, or cut short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the state of the rules is of another version or cut short")]
pub struct StateError;

impl Rules {
    /// Appends the state. What was not taken ([`Rules::take`]) is not in it.
    pub fn write(&self, out: &mut Vec<u8>) {
        let grouped = self.inputs.iter().any(|input| !input.by.is_empty());
        out.push(if grouped { VERSION_WITH_GROUPS } else { VERSION });
        out.extend(self.last_arrival.to_le_bytes());
        out.extend(self.heard.to_le_bytes());
        out.extend((self.inputs.len() as u16).to_le_bytes());
        for input in &self.inputs {
            put_input(out, input, grouped);
        }
        out.extend((self.gone.len() as u32).to_le_bytes());
        self.gone.iter().for_each(|gone| put_transition(out, gone));
    }

    /// Takes over a state.
    ///
    /// # Errors
    /// When the bytes are none; then nothing is taken over.
    pub fn restore(&mut self, bytes: &Bytes) -> Result<(), StateError> {
        let bytes = &mut bytes.clone();
        let saved = Saved::read(bytes).ok_or(StateError)?;
        (self.last_arrival, self.heard, self.gone) = (saved.last_arrival, saved.heard, saved.gone);
        for input in saved.inputs {
            match self.inputs.iter_mut().find(|own| own.name.as_str() == input.name) {
                Some(own) => own.restore(input, &mut self.gone),
                None => end_all(&input, &mut self.gone),
            }
        }
        Ok(())
    }
}

impl Input {
    fn restore(&mut self, saved: SavedInput, gone: &mut Vec<Transition>) {
        (self.newest, self.looked, self.devices_refused) = (saved.newest, saved.looked, saved.devices_refused);
        let rule = |hash: RuleHash| self.rules.iter().position(|kept| kept.rule.hash == hash);
        let rules = saved.rules.iter().map(|saved| rule(saved.hash)).collect::<Vec<_>>();
        for (own, saved) in rules.iter().zip(&saved.rules) {
            if let Some(own) = own {
                self.rules[*own].totals = saved.totals;
            }
        }
        let column = |(name, kind): &(String, FieldType)| {
            self.columns
                .find(name)
                .filter(|(index, own)| own == kind && self.previous.contains(index))
                .map(|(index, _)| index)
        };
        let columns = saved.columns.iter().map(column).collect::<Vec<_>>();
        let length = self.previous.last().map_or(0, |last| last + 1);
        // Version 1 was of devices, whatever its windows were grouped by.
        if !saved.by.as_ref().map_or(self.by.iter().all(|by| by == "*"), |by| *by == self.by) {
            return end_all(&saved, gone);
        }
        for (key, device) in &saved.devices {
            let mut own =
                Device { name: device.name.clone(), last: device.last, heard: device.heard, ..Device::default() };
            own.previous.resize(length, None);
            for (column, value) in columns.iter().zip(&device.values) {
                if let Some(column) = column {
                    own.previous[*column].clone_from(value);
                }
            }
            for alert in &device.alerts {
                match rules.get(alert.rule).copied().flatten() {
                    Some(rule) => {
                        self.rules[rule].alerts += 1;
                        own.alerts.push(Alert { rule, ..alert.clone() });
                    }
                    None => end(&saved, key, device, alert, gone),
                }
            }
            own.alerts.sort_by(|one, other| (one.rule, &one.labels).cmp(&(other.rule, &other.labels)));
            self.devices.insert(key.clone(), own);
        }
    }
}

fn end_all(input: &SavedInput, gone: &mut Vec<Transition>) {
    for (key, device) in &input.devices {
        device.alerts.iter().for_each(|alert| end(input, key, device, alert, gone));
    }
}

/// The end of an alert whose rule or group is no longer there.
fn end(input: &SavedInput, key: &str, device: &SavedDevice, alert: &Alert, gone: &mut Vec<Transition>) {
    let Some(rule) = input.rules.get(alert.rule).filter(|_| alert.firing) else { return };
    gone.push(Transition {
        ts: device.last,
        device: device.name.as_deref().unwrap_or(key).to_owned(),
        rule: rule.name.clone(),
        rule_hash: hex(&rule.hash.0),
        id: alert.id.clone(),
        turn: if alert.announced { Turn::Resolved } else { Turn::Backfill },
        severity: rule.severity.word(),
        stream: input.name.clone(),
        labels: alert.labels.clone(),
        message: format!("{}: the rule is no longer configured as it was", rule.name),
        from: alert.from,
        to: Some(device.last.max(alert.from)),
        topic: alert.topic.clone(),
        command: alert.command.clone(),
    });
}

#[derive(Debug)]
struct Saved {
    last_arrival: i64,
    heard: i64,
    inputs: Vec<SavedInput>,
    gone: Vec<Transition>,
}

#[derive(Debug)]
struct SavedInput {
    name: String,
    /// None in version 1.
    by: Option<Vec<String>>,
    newest: i64,
    looked: Looked,
    devices_refused: u64,
    columns: Vec<(String, FieldType)>,
    rules: Vec<SavedRule>,
    devices: Vec<(String, SavedDevice)>,
}

#[derive(Debug)]
struct SavedRule {
    hash: RuleHash,
    name: String,
    severity: Severity,
    totals: RuleTotals,
}

#[derive(Debug)]
struct SavedDevice {
    name: Option<String>,
    last: i64,
    heard: i64,
    values: Vec<Option<Value>>,
    /// Their rules are those of the state.
    alerts: Vec<Alert>,
}

impl Saved {
    fn read(bytes: &mut Bytes) -> Option<Self> {
        let grouped = match bytes.try_get_u8().ok()? {
            VERSION => false,
            VERSION_WITH_GROUPS => true,
            _ => return None,
        };
        let (last_arrival, heard) = (take_i64(bytes)?, take_i64(bytes)?);
        let inputs = bytes.try_get_u16_le().ok()?;
        let inputs = (0..inputs).map(|_| take_input(bytes, grouped)).collect::<Option<_>>()?;
        let gone = bytes.try_get_u32_le().ok()?;
        let gone = (0..gone).map(|_| take_transition(bytes)).collect::<Option<_>>()?;
        bytes.is_empty().then_some(Self { last_arrival, heard, inputs, gone })
    }
}

fn put_input(out: &mut Vec<u8>, input: &Input, grouped: bool) {
    put_text(out, input.name.as_str());
    if grouped {
        out.extend((input.by.len() as u16).to_le_bytes());
        input.by.iter().for_each(|by| put_text(out, by));
    }
    for value in [input.newest, input.looked.heard, input.looked.watermark] {
        out.extend(value.to_le_bytes());
    }
    out.extend(input.devices_refused.to_le_bytes());
    out.extend((input.previous.len() as u16).to_le_bytes());
    let names = input.columns.names().collect::<Vec<_>>();
    for column in &input.previous {
        put_text(out, names[*column]);
        out.push(input.columns.find(names[*column]).map_or(0, |(_, kind)| kind_byte(kind)));
    }
    out.extend((input.rules.len() as u16).to_le_bytes());
    for kept in &input.rules {
        out.extend(kept.rule.hash.0);
        put_text(out, &kept.rule.name);
        out.push(severity_byte(kept.rule.severity));
        let totals = kept.totals;
        for total in [totals.fired, totals.resolved, totals.backfilled, totals.failed, totals.refused] {
            out.extend(total.to_le_bytes());
        }
    }
    out.extend((input.devices.len() as u32).to_le_bytes());
    for (name, device) in &input.devices {
        put_text(out, name);
        if grouped {
            put_some_text(out, device.name.as_deref());
        }
        out.extend(device.last.to_le_bytes());
        out.extend(device.heard.to_le_bytes());
        for column in &input.previous {
            put_value(out, device.previous.get(*column).and_then(Option::as_ref));
        }
        out.extend((device.alerts.len() as u16).to_le_bytes());
        for alert in &device.alerts {
            out.extend((alert.rule as u16).to_le_bytes());
            put_text(out, &alert.labels);
            out.push(u8::from(alert.firing) | u8::from(alert.announced) << 1);
            out.extend(alert.from.to_le_bytes());
            put_text(out, &alert.id);
            out.extend(alert.ts.to_le_bytes());
            put_text(out, &alert.message);
            put_some_text(out, alert.topic.as_deref());
            put_command(out, alert.command.as_ref());
        }
    }
}

fn take_input(bytes: &mut Bytes, grouped: bool) -> Option<SavedInput> {
    let name = take_text(bytes)?;
    let by = |bytes: &mut Bytes| (0..bytes.try_get_u16_le().ok()?).map(|_| take_text(bytes)).collect::<Option<_>>();
    let by = if grouped { Some(by(bytes)?) } else { None };
    let newest = take_i64(bytes)?;
    let looked = Looked { heard: take_i64(bytes)?, watermark: take_i64(bytes)? };
    let devices_refused = bytes.try_get_u64_le().ok()?;
    let columns = bytes.try_get_u16_le().ok()?;
    let column = |bytes: &mut Bytes| Some((take_text(bytes)?, take_kind(bytes)?));
    let columns = (0..columns).map(|_| column(bytes)).collect::<Option<Vec<_>>>()?;
    let rules = bytes.try_get_u16_le().ok()?;
    let rules = (0..rules).map(|_| take_rule(bytes)).collect::<Option<_>>()?;
    let mut devices = Vec::new();
    for _ in 0..bytes.try_get_u32_le().ok()? {
        let key = take_text(bytes)?;
        let name = if grouped { take_some_text(bytes)? } else { None };
        let (last, heard) = (take_i64(bytes)?, take_i64(bytes)?);
        let values = columns.iter().map(|_| take_value(bytes)).collect::<Option<_>>()?;
        let alerts = bytes.try_get_u16_le().ok()?;
        let alerts = (0..alerts).map(|_| take_alert(bytes)).collect::<Option<_>>()?;
        devices.push((key, SavedDevice { name, last, heard, values, alerts }));
    }
    Some(SavedInput { name, by, newest, looked, devices_refused, columns, rules, devices })
}

fn take_rule(bytes: &mut Bytes) -> Option<SavedRule> {
    let mut hash = [0; 16];
    bytes.try_copy_to_slice(&mut hash).ok()?;
    let (name, severity) = (take_text(bytes)?, take_severity(bytes)?);
    let mut total = || bytes.try_get_u64_le().ok();
    let totals =
        RuleTotals { fired: total()?, resolved: total()?, backfilled: total()?, failed: total()?, refused: total()? };
    Some(SavedRule { hash: RuleHash(hash), name, severity, totals })
}

fn take_alert(bytes: &mut Bytes) -> Option<Alert> {
    let rule = usize::from(bytes.try_get_u16_le().ok()?);
    let labels = take_text(bytes)?;
    let flags = bytes.try_get_u8().ok()?;
    let (firing, announced) = (flags & 1 != 0, flags & 2 != 0);
    let (from, id, ts, message) = (take_i64(bytes)?, take_text(bytes)?, take_i64(bytes)?, take_text(bytes)?);
    let (topic, command) = (take_some_text(bytes)?, take_command(bytes)?);
    Some(Alert { rule, labels, firing, announced, from, id, ts, message, topic, command })
}

fn put_transition(out: &mut Vec<u8>, transition: &Transition) {
    out.extend(transition.ts.to_le_bytes());
    for text in [&transition.device, &transition.rule, &transition.rule_hash, &transition.id] {
        put_text(out, text);
    }
    out.push(match transition.turn {
        Turn::Firing => 0,
        Turn::Resolved => 1,
        Turn::Backfill => 2,
    });
    let severity = [Severity::Info, Severity::Warning, Severity::Critical].into_iter();
    out.push(severity.filter(|severity| severity.word() == transition.severity).map(severity_byte).next().unwrap_or(1));
    for text in [&transition.stream, &transition.labels, &transition.message] {
        put_text(out, text);
    }
    out.extend(transition.from.to_le_bytes());
    out.push(u8::from(transition.to.is_some()));
    out.extend(transition.to.map(i64::to_le_bytes).into_iter().flatten());
    put_some_text(out, transition.topic.as_deref());
    put_command(out, transition.command.as_ref());
}

fn take_transition(bytes: &mut Bytes) -> Option<Transition> {
    let ts = take_i64(bytes)?;
    let (device, rule, rule_hash, id) = (take_text(bytes)?, take_text(bytes)?, take_text(bytes)?, take_text(bytes)?);
    let turn = match bytes.try_get_u8().ok()? {
        0 => Turn::Firing,
        1 => Turn::Resolved,
        2 => Turn::Backfill,
        _ => return None,
    };
    let severity = take_severity(bytes)?.word();
    let (stream, labels, message) = (take_text(bytes)?, take_text(bytes)?, take_text(bytes)?);
    let from = take_i64(bytes)?;
    let to = if bytes.try_get_u8().ok()? == 1 { Some(take_i64(bytes)?) } else { None };
    let (topic, command) = (take_some_text(bytes)?, take_command(bytes)?);
    Some(Transition {
        ts,
        device,
        rule,
        rule_hash,
        id,
        turn,
        severity,
        stream,
        labels,
        message,
        from,
        to,
        topic,
        command,
    })
}

fn put_command(out: &mut Vec<u8>, command: Option<&Command>) {
    out.push(u8::from(command.is_some()));
    if let Some(command) = command {
        put_text(out, &command.topic);
        put_text(out, &command.firing);
        put_some_text(out, command.resolved.as_deref());
        out.extend(command.every_us.to_le_bytes());
    }
}

fn take_command(bytes: &mut Bytes) -> Option<Option<Command>> {
    Some(match bytes.try_get_u8().ok()? {
        0 => None,
        1 => Some(Command {
            topic: take_text(bytes)?,
            firing: take_text(bytes)?,
            resolved: take_some_text(bytes)?,
            every_us: take_i64(bytes)?,
        }),
        _ => return None,
    })
}

fn kind_byte(kind: FieldType) -> u8 {
    match kind {
        FieldType::Float64 => 1,
        FieldType::Int64 => 2,
        FieldType::Bool => 3,
        FieldType::Text => 4,
        FieldType::Timestamp => 5,
        FieldType::Binary => 6,
    }
}

fn take_kind(bytes: &mut Bytes) -> Option<FieldType> {
    let kinds = [FieldType::Float64, FieldType::Int64, FieldType::Bool, FieldType::Text];
    let byte = bytes.try_get_u8().ok()?;
    kinds.into_iter().find(|kind| kind_byte(*kind) == byte)
}

fn severity_byte(severity: Severity) -> u8 {
    match severity {
        Severity::Info => 0,
        Severity::Warning => 1,
        Severity::Critical => 2,
    }
}

fn take_severity(bytes: &mut Bytes) -> Option<Severity> {
    Some(match bytes.try_get_u8().ok()? {
        0 => Severity::Info,
        1 => Severity::Warning,
        2 => Severity::Critical,
        _ => return None,
    })
}

fn put_value(out: &mut Vec<u8>, value: Option<&Value>) {
    match value {
        None => out.push(0),
        Some(Value::Float(value)) => {
            out.push(1);
            out.extend(value.to_le_bytes());
        }
        Some(Value::Int(value)) => {
            out.push(2);
            out.extend(value.to_le_bytes());
        }
        Some(Value::Bool(value)) => out.extend([3, u8::from(*value)]),
        Some(Value::Text(text)) => {
            out.push(4);
            put_text(out, text);
        }
    }
}

fn take_value(bytes: &mut Bytes) -> Option<Option<Value>> {
    Some(match bytes.try_get_u8().ok()? {
        0 => None,
        1 => Some(Value::Float(bytes.try_get_f64_le().ok()?)),
        2 => Some(Value::Int(take_i64(bytes)?)),
        3 => Some(Value::Bool(bytes.try_get_u8().ok()? == 1)),
        4 => Some(Value::Text(take_text(bytes)?)),
        _ => return None,
    })
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u32).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_some_text(out: &mut Vec<u8>, text: Option<&str>) {
    out.push(u8::from(text.is_some()));
    if let Some(text) = text {
        put_text(out, text);
    }
}

fn take_i64(bytes: &mut Bytes) -> Option<i64> {
    bytes.try_get_i64_le().ok()
}

fn take_text(bytes: &mut Bytes) -> Option<String> {
    let len = bytes.try_get_u32_le().ok()? as usize;
    if bytes.len() < len {
        return None;
    }
    std::str::from_utf8(&bytes.split_to(len)).ok().map(str::to_owned)
}

fn take_some_text(bytes: &mut Bytes) -> Option<Option<String>> {
    Some(match bytes.try_get_u8().ok()? {
        0 => None,
        1 => Some(take_text(bytes)?),
        _ => return None,
    })
}
