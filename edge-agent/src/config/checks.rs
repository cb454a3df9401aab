//! What a failed check does, and the words of checks in a configuration.

use std::fmt;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer};
use wire::FieldType;

use super::{FieldSettings, StreamSettings};
use crate::decode::Value;

/// What happens to a reading that fails a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes to quarantine.
    Reject,
    /// It is stored, and its `quality` says why it is suspect.
    Flag,
}

/// The checks of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FieldCheck {
    /// A value of another type than the field's; flagged, the field is null.
    Type,
    Required,
    Min,
    Max,
    MaxStep,
    StuckAfter,
    Allowed,
}

/// The checks of a whole reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamCheck {
    MaxAge,
    MaxFuture,
    InOrder,
}

/// What becomes of readings of one device and one event time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Duplicates {
    /// All are stored.
    #[default]
    All,
    /// The first; those that repeat it are counted.
    First,
    /// The last that comes within `duplicates_within`: so long each reading waits.
    Last,
}

/// How the readings that a silent device owes are made up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fill {
    /// The value before the gap.
    Last,
    /// On the line between the values around the gap; what is no number as `last`.
    Linear,
}

/// Names in `expected_every_of`: each is compared with the device of each reading.
const EXPECTED_OF_MAX: usize = 100;

/// A value that a field may have.
#[derive(Debug, Clone, PartialEq)]
pub struct Allowed(pub Value);

impl FieldSettings {
    /// What failing a check does: `type`, `required`, `min` and `max` reject, the others flag, unless told otherwise.
    pub fn verdict(&self, check: FieldCheck) -> Verdict {
        let rejects = matches!(check, FieldCheck::Type | FieldCheck::Required | FieldCheck::Min | FieldCheck::Max);
        verdict(&self.reject, &self.flag, check, rejects)
    }

    fn has(&self, check: FieldCheck) -> bool {
        match check {
            FieldCheck::Type => true,
            FieldCheck::Required => self.required,
            FieldCheck::Min => self.min.is_some(),
            FieldCheck::Max => self.max.is_some(),
            FieldCheck::MaxStep => self.max_step.is_some(),
            FieldCheck::StuckAfter => self.stuck_after.is_some(),
            FieldCheck::Allowed => !self.allowed.is_empty(),
        }
    }

    pub(super) fn check_checks(&self) -> Result<(), String> {
        let numeric = matches!(self.kind, FieldType::Float64 | FieldType::Int64);
        let bounds = (self.min, self.max);
        if bounds != (None, None) && !numeric {
            return Err("min and max are for numbers".to_owned());
        }
        if [self.min, self.max].into_iter().flatten().any(super::Number::is_nan) {
            return Err("min and max must be numbers, not nan".to_owned());
        }
        if let (Some(min), Some(max)) = bounds
            && min > max
        {
            return Err("min is above max".to_owned());
        }
        if let Some(step) = self.max_step
            && (!numeric || step.is_nan() || step < super::Number::Int(0))
        {
            return Err("max_step is a number from 0, and for numbers".to_owned());
        }
        if self.stuck_after.is_some_and(|span| span.0.is_zero()) {
            return Err("stuck_after must be more than 0".to_owned());
        }
        let right = |allowed: &Allowed| {
            matches!(
                (&allowed.0, self.kind),
                (Value::Float(_) | Value::Int(_), FieldType::Float64)
                    | (Value::Int(_), FieldType::Int64)
                    | (Value::Bool(_), FieldType::Bool)
                    | (Value::Text(_), FieldType::Text)
            )
        };
        if let Some(Allowed(wrong)) = self.allowed.iter().find(|allowed| !right(allowed)) {
            return Err(format!("allowed has {wrong:?}, and the type is {}", self.kind));
        }
        check_lists(&self.reject, &self.flag, |check| self.has(check))?;
        self.conversion().map(|_| ())
    }
}

impl StreamSettings {
    /// What failing a check does: `max_age` rejects, the others flag, unless told otherwise.
    pub fn verdict(&self, check: StreamCheck) -> Verdict {
        verdict(&self.reject, &self.flag, check, check == StreamCheck::MaxAge)
    }

    /// Devices that `expected_every_of` names one by one.
    pub fn expected_devices(&self) -> impl Iterator<Item = &str> {
        self.expected_every_of.keys().map(String::as_str).filter(|name| !name.contains('*'))
    }

    pub(super) fn check_checks(&self) -> Result<(), String> {
        check_lists(&self.reject, &self.flag, |check| match check {
            StreamCheck::MaxAge => self.max_age.is_some(),
            StreamCheck::MaxFuture => self.max_future.is_some(),
            StreamCheck::InOrder => self.in_order,
        })?;
        if self.devices_max == 0 || self.devices_max > 1_000_000 {
            return Err("devices_max must be from 1 to 1000000".to_owned());
        }
        if self.remember == 0 || self.remember > 10_000 {
            return Err("remember must be from 1 to 10000".to_owned());
        }
        let every = self.expected_every.map(|every| every.micros());
        if every == Some(0) {
            return Err("expected_every must be more than 0".to_owned());
        }
        if every.is_none() && (self.absent_after.is_some() || self.fill.is_some() || !self.expected_every_of.is_empty())
        {
            return Err("absent_after, fill and expected_every_of need expected_every".to_owned());
        }
        if self.expected_every_of.len() > EXPECTED_OF_MAX {
            return Err(format!("expected_every_of has more than {EXPECTED_OF_MAX} names"));
        }
        if let Some((name, _)) =
            self.expected_every_of.iter().find(|(name, every)| name.is_empty() || every.0.is_zero())
        {
            return Err(format!("expected_every_of `{name}`: a name, and more than 0"));
        }
        if self.expected_devices().count() > self.devices_max / 4 {
            return Err("expected_every_of names more than a quarter of devices_max".to_owned());
        }
        if let (Some(every), Some(after)) = (self.expected_every, self.absent_after)
            && after.0 < every.0
        {
            return Err("absent_after is less than expected_every".to_owned());
        }
        if self.fill_steps == 0 || self.fill_steps > 10_000 {
            return Err("fill_steps must be from 1 to 10000".to_owned());
        }
        if self.fill.is_none() && self.fill_in_windows {
            return Err("fill_in_windows needs fill".to_owned());
        }
        Ok(())
    }
}

fn verdict<C: PartialEq>(reject: &[C], flag: &[C], check: C, rejects: bool) -> Verdict {
    if reject.contains(&check) || (rejects && !flag.contains(&check)) { Verdict::Reject } else { Verdict::Flag }
}

fn check_lists<C: Copy + PartialEq + fmt::Debug>(
    reject: &[C],
    flag: &[C],
    has: impl Fn(C) -> bool,
) -> Result<(), String> {
    if let Some(both) = reject.iter().find(|check| flag.contains(check)) {
        return Err(format!("{} is in reject and in flag", word(both)));
    }
    match reject.iter().chain(flag).find(|check| !has(**check)) {
        Some(check) => Err(format!("reject or flag names {}, which is not set", word(check))),
        None => Ok(()),
    }
}

/// `MaxStep` as people write it.
fn word(check: &impl fmt::Debug) -> String {
    let mut word = String::new();
    for letter in format!("{check:?}").chars() {
        if letter.is_uppercase() && !word.is_empty() {
            word.push('_');
        }
        word.extend(letter.to_lowercase());
    }
    word
}

impl<'de> Deserialize<'de> for Allowed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Written;
        impl Visitor<'_> for Written {
            type Value = Allowed;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, a number, true or false")
            }
            fn visit_bool<E: Error>(self, value: bool) -> Result<Allowed, E> {
                Ok(Allowed(Value::Bool(value)))
            }
            fn visit_i64<E: Error>(self, value: i64) -> Result<Allowed, E> {
                Ok(Allowed(Value::Int(value)))
            }
            fn visit_f64<E: Error>(self, value: f64) -> Result<Allowed, E> {
                Ok(Allowed(Value::Float(value)))
            }
            fn visit_str<E: Error>(self, value: &str) -> Result<Allowed, E> {
                Ok(Allowed(Value::Text(value.to_owned())))
            }
        }
        deserializer.deserialize_any(Written)
    }
}
