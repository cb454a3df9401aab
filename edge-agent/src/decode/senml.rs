//! SenML packs (RFC 8428), JSON and CBOR alike: records are resolved, so that each has its full name, unit and absolute
//! time, and become readings one by one, or those of one time together ([`Spread`]).
//!
//! Times below 2^28 are relative to the arrival. A record without a value and without a sum only carries base fields. What is
//! wrong with one record rejects that record; a wrong base field, an unknown version, or a field that must be understood
//! (its label ends with `_`) rejects the pack, because all that follows would be resolved wrongly. Limits: base names and
//! base units of [`DEVICE_BYTES_MAX`] bytes.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

use super::scalar::{Fault, Record, Scalar};
use super::tree::{Members, too_many};
use super::{DEVICE_BYTES_MAX, READINGS_MAX, cbor, json};
use crate::config::{Pointer, Spread};

/// The version of RFC 8428; a pack of a later one must not be used.
const VERSION: f64 = 10.0;
/// Times from here on are since 1970 UTC.
const ABSOLUTE_FROM: f64 = 268_435_456.0;

/// One place that is wanted.
#[derive(Debug)]
enum Place {
    Name,
    Unit,
    Value,
    Sum,
    Time,
    UpdateTime,
    Values(String),
}

/// Reads packs.
#[derive(Debug)]
pub(super) struct Packs {
    places: Vec<Place>,
    spread: Option<Spread>,
    cbor: bool,
}

/// A record with nothing left to resolve.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Resolved<'a> {
    pub(super) name: String,
    base_name: String,
    own_name: String,
    pub(super) unit: Option<String>,
    /// µs since 1970 UTC.
    pub(super) time: i64,
    /// Of `v`, `vs`, `vb` or `vd`; null when there is only a sum.
    pub(super) value: Scalar<'a>,
    sum: Option<f64>,
    update_time: Option<f64>,
}

/// Where a record stands, and what it says or what is wrong with it.
type Placed<'a> = (Range<usize>, Result<Resolved<'a>, Fault>);

/// What the records so far have said for those that follow.
#[derive(Default)]
struct Base {
    name: String,
    time: Number,
    unit: Option<String>,
    value: Option<f64>,
    sum: Option<f64>,
}

/// The labels of one record.
#[derive(Default)]
struct Labels<'a> {
    name: Option<String>,
    unit: Option<String>,
    value: Option<Scalar<'a>>,
    sum: Option<f64>,
    time: Number,
    update_time: Option<f64>,
}

/// Times are whole numbers or fractions; whole ones stay exact.
#[derive(Clone, Copy, Default)]
struct Number {
    us: i64,
    seconds: f64,
}

/// What is wrong with a record, or with all that follows.
enum Wrong {
    Record(Fault),
    Pack(Fault),
}

impl Packs {
    pub(super) fn new(places: &[Pointer], spread: Option<Spread>, cbor: bool) -> Self {
        let place = |pointer: &Pointer| match pointer.0[0].as_str() {
            "name" => Place::Name,
            "unit" => Place::Unit,
            "sum" => Place::Sum,
            "time" => Place::Time,
            "update_time" => Place::UpdateTime,
            "values" => Place::Values(pointer.0.get(1).cloned().unwrap_or_default()),
            _ => Place::Value,
        };
        Self { places: places.iter().map(place).collect(), spread, cbor }
    }

    /// The readings of a pack, and how many of its records have nothing that the mapping asks for.
    pub(super) fn records<'a>(&self, payload: &'a [u8], arrival_us: i64) -> Result<(Vec<Record<'a>>, u64), Fault> {
        let resolved = self.resolve(payload, arrival_us)?;
        let Some(spread) = self.spread else {
            let record = |(span, resolved): Placed<'a>| Record {
                span,
                keys: &[],
                slots: resolved.map(|resolved| self.places.iter().map(|place| resolved.at(place)).collect()),
            };
            return Ok((resolved.into_iter().map(record).collect(), 0));
        };
        let (mut records, mut filtered) = (Vec::<Record<'a>>::new(), 0);
        let mut groups = HashMap::new();
        for (span, resolved) in resolved {
            let resolved = match resolved {
                Ok(resolved) => resolved,
                Err(fault) => {
                    records.push(Record { span, keys: &[], slots: Err(fault) });
                    continue;
                }
            };
            let (name, value_name) = match spread {
                Spread::Name => (&resolved.base_name, Some(&resolved.own_name)),
                Spread::Unit => (&resolved.name, resolved.unit.as_ref()),
            };
            let wanted = |place: &Place| matches!(place, Place::Values(wanted) if Some(wanted) == value_name);
            let Some(slot) = self.places.iter().position(wanted) else {
                filtered += 1;
                continue;
            };
            let fresh = |records: &mut Vec<Record<'a>>| {
                let device = match spread {
                    Spread::Name => name.strip_suffix([':', '/']).unwrap_or(name),
                    Spread::Unit => name,
                };
                let first = |place: &Place| match place {
                    Place::Name => Scalar::Text(device.to_owned().into()),
                    Place::Time => Scalar::Time(resolved.time),
                    _ => Scalar::Null,
                };
                let slots = Ok(self.places.iter().map(first).collect());
                // Its records may lie apart, so it has no bytes of its own.
                records.push(Record { span: 0..payload.len(), keys: &[], slots });
                records.len() - 1
            };
            let key = (name.clone(), resolved.time);
            let mut group = *groups.entry(key.clone()).or_insert_with(|| fresh(&mut records));
            // The same value twice at one time: both are readings.
            let taken = |record: &Record<'_>| record.slots.as_ref().is_ok_and(|slots| slots[slot] != Scalar::Null);
            if taken(&records[group]) {
                group = fresh(&mut records);
                groups.insert(key, group);
            }
            if let Ok(slots) = &mut records[group].slots {
                for (slot, place) in slots.iter_mut().zip(&self.places) {
                    if wanted(place) {
                        *slot = resolved.value.clone();
                    }
                }
            }
        }
        Ok((records, filtered))
    }

    /// The records of a pack with their places in it, resolved.
    pub(super) fn resolve<'a>(&self, payload: &'a [u8], arrival_us: i64) -> Result<Vec<Placed<'a>>, Fault> {
        let text =
            if self.cbor { "" } else { std::str::from_utf8(payload).map_err(|e| ("not_utf8", e.to_string()))? };
        let members = |at: &Range<usize>| if self.cbor { cbor::members(payload, at) } else { json::members(text, at) };
        let scalar = |at: &Range<usize>| match self.cbor {
            true => cbor::scalar(payload, at),
            false => json::scalar(&text[at.clone()]).ok_or(("malformed", "number out of range".to_owned())),
        };
        let whole = match self.cbor {
            true => cbor::whole(payload)?,
            false => json::trimmed(text),
        };
        let Members::Array(spans) = members(&whole)? else {
            return Err(("malformed", "a SenML pack is an array of records".to_owned()));
        };
        if spans.len() > READINGS_MAX {
            return Err(too_many(spans.len()));
        }
        let mut base = Base::default();
        let mut resolved = Vec::new();
        for span in spans {
            let record = match members(&span)? {
                Members::Object(entries) => base.record(entries, &scalar, arrival_us, self.cbor),
                _ => Err(Wrong::Record(("malformed", "a SenML record is an object".to_owned()))),
            };
            match record {
                Ok(Some(record)) => resolved.push((span, Ok(record))),
                Ok(None) => {}
                Err(Wrong::Record(fault)) => resolved.push((span, Err(fault))),
                Err(Wrong::Pack(fault)) => return Err(fault),
            }
        }
        Ok(resolved)
    }
}

impl Base {
    /// Takes the base fields of a record, and resolves it; None when it has nothing else.
    fn record<'a>(
        &mut self,
        entries: Vec<(String, Range<usize>)>,
        scalar: &impl Fn(&Range<usize>) -> Result<Scalar<'a>, Fault>,
        arrival_us: i64,
        cbor: bool,
    ) -> Result<Option<Resolved<'a>>, Wrong> {
        let mut labels = Labels::default();
        // A fault of the record's own fields waits until its base fields are read: those that follow stand on them.
        let mut fault = None;
        for (label, at) in entries {
            let value = scalar(&at).map_err(Wrong::Pack)?;
            if !self.take(&label, &value)? {
                let data = matches!(label.as_str(), "vd" | "8");
                let result = labels.take(&label, if cbor && data { base64url(value) } else { value });
                fault = fault.or(result.err());
            }
        }
        if let Some(fault) = fault {
            return Err(Wrong::Record(fault));
        }
        let number = labels.value.as_ref().is_none_or(|value| value.number().is_some());
        let sum = match (self.sum, labels.sum) {
            (None, None) => None,
            (base, own) => Some(base.unwrap_or(0.0) + own.unwrap_or(0.0)),
        };
        let value = match (labels.value, self.value) {
            (None, _) => Scalar::Null,
            (Some(value), Some(base)) if number => Scalar::Float(base + value.number().unwrap_or(0.0)),
            (Some(value), _) => value,
        };
        if value == Scalar::Null && labels.sum.is_none() {
            return Ok(None);
        }
        let name = format!("{}{}", self.name, labels.name.as_deref().unwrap_or_default());
        let wrong_name = |reason: &str| {
            let shown = name.chars().take(80).collect::<String>();
            Err(Wrong::Record(("bad_name", format!("the name {shown:?} {reason}"))))
        };
        let good = |c: char| c.is_ascii_alphanumeric() || "-:./_".contains(c);
        if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            return wrong_name("does not begin with a letter or a digit");
        }
        if !name.chars().all(good) {
            return wrong_name("has characters other than letters, digits, and - : . / _");
        }
        let seconds = self.time.seconds + labels.time.seconds;
        let us = self.time.us.checked_add(labels.time.us);
        let us = if seconds < ABSOLUTE_FROM { us.and_then(|us| us.checked_add(arrival_us)) } else { us };
        // Beyond ±292,000 years.
        let Some(time) = us.filter(|_| seconds.abs() < 9e12) else {
            return Err(Wrong::Record(("bad_time", format!("{seconds} is no time"))));
        };
        Ok(Some(Resolved {
            name,
            base_name: self.name.clone(),
            own_name: labels.name.unwrap_or_default(),
            unit: labels.unit.or_else(|| self.unit.clone()),
            time,
            value,
            sum,
            update_time: labels.update_time,
        }))
    }

    /// Whether a label is one of these, which is then taken.
    fn take(&mut self, label: &str, value: &Scalar<'_>) -> Result<bool, Wrong> {
        let wrong = |_| Wrong::Pack(("bad_base", format!("{label} is {}", value.describe())));
        match label {
            "bn" | "-2" => self.name = short(value).map_err(wrong)?,
            "bt" | "-3" => self.time = Number::of(value).map_err(wrong)?,
            "bu" | "-4" => self.unit = Some(short(value).map_err(wrong)?),
            "bv" | "-5" => self.value = Some(number(value).map_err(wrong)?),
            "bs" | "-6" => self.sum = Some(number(value).map_err(wrong)?),
            "bver" | "-1" => match value.number() {
                Some(version) if version <= VERSION => {}
                _ => return Err(Wrong::Pack(("bad_version", format!("bver is {}", value.describe())))),
            },
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl<'a> Labels<'a> {
    fn take(&mut self, label: &str, value: Scalar<'a>) -> Result<(), Fault> {
        let wrong = |value: &Scalar<'_>| ("wrong_type", format!("{label} is {}", value.describe()));
        let of = match label {
            "n" | "0" => return text(&value).map(|name| self.name = Some(name)).map_err(|()| wrong(&value)),
            "u" | "1" => return text(&value).map(|unit| self.unit = Some(unit)).map_err(|()| wrong(&value)),
            "s" | "5" => return number(&value).map(|sum| self.sum = Some(sum)).map_err(|()| wrong(&value)),
            "t" | "6" => return Number::of(&value).map(|time| self.time = time).map_err(|()| wrong(&value)),
            "ut" | "7" => return number(&value).map(|at| self.update_time = Some(at)).map_err(|()| wrong(&value)),
            "v" | "2" => value.number().is_some(),
            "vs" | "3" | "vd" | "8" => matches!(value, Scalar::Text(_)),
            "vb" | "4" => matches!(value, Scalar::Bool(_)),
            _ if label.ends_with('_') => {
                return Err(("must_understand", format!("the field {label:?} must be understood and is not")));
            }
            _ => return Ok(()),
        };
        if !of {
            return Err(wrong(&value));
        }
        if self.value.is_some() {
            return Err(("two_values", "a record has one of v, vs, vb, vd".to_owned()));
        }
        self.value = Some(value);
        Ok(())
    }
}

impl<'a> Resolved<'a> {
    fn at(&self, place: &Place) -> Scalar<'a> {
        match place {
            Place::Name => Scalar::Text(self.name.clone().into()),
            Place::Unit => self.unit.clone().map_or(Scalar::Null, |unit| Scalar::Text(unit.into())),
            Place::Value => self.value.clone(),
            Place::Sum => self.sum.map_or(Scalar::Null, Scalar::Float),
            Place::Time => Scalar::Time(self.time),
            Place::UpdateTime => self.update_time.map_or(Scalar::Null, Scalar::Float),
            Place::Values(_) => Scalar::Null,
        }
    }
}

impl Number {
    fn of(value: &Scalar<'_>) -> Result<Self, ()> {
        let seconds = number(value)?;
        let us = match value {
            Scalar::Int(whole) => whole.checked_mul(1_000_000),
            _ => (seconds.abs() < 9e12).then_some((seconds * 1e6).round() as i64),
        };
        Ok(Self { us: us.ok_or(())?, seconds })
    }
}

fn number(value: &Scalar<'_>) -> Result<f64, ()> {
    value.number().filter(|number| number.is_finite()).ok_or(())
}

/// A text that each record that follows has, too.
fn short(value: &Scalar<'_>) -> Result<String, ()> {
    text(value).ok().filter(|text| text.len() <= DEVICE_BYTES_MAX).ok_or(())
}

fn text(value: &Scalar<'_>) -> Result<String, ()> {
    match value {
        Scalar::Text(text) => Ok(Cow::to_string(text)),
        _ => Err(()),
    }
}

/// Data of CBOR, which come as hex, as JSON has them: base64url without padding.
fn base64url(value: Scalar<'_>) -> Scalar<'_> {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let Scalar::Text(hex) = &value else { return value };
    let nibble = |digit: u8| char::from(digit).to_digit(16).unwrap_or(0);
    let bits = hex.bytes().map(nibble).collect::<Vec<_>>();
    // Three nibbles are two digits.
    let digits = bits.chunks(3).flat_map(|chunk| {
        let at = |index: usize| chunk.get(index).copied().unwrap_or(0);
        let number = at(0) << 8 | at(1) << 4 | at(2);
        let digit = |bits: u32| char::from(DIGITS[(bits & 63) as usize]);
        let second = (chunk.len() > 1).then(|| digit(number));
        std::iter::once(digit(number >> 6)).chain(second)
    });
    Scalar::Text(digits.collect::<String>().into())
}
