//! The checks that a reading must pass to be stored in its table; what fails goes to quarantine, or is stored with a
//! `quality` that says why it is suspect.
//!
//! Event time not before 2000, not more than a day ahead of the arrival (DESIGN.md, rule 9), `max_age` and `max_future` at
//! its arrival; required, min, max and allowed values of each field; and by what is remembered of its device
//! (`validate/memory.rs`): repeats, order, steps, values that are stuck, gaps (`validate/gaps.rs`). Each limit itself passes.
//! Whole numbers are compared exactly; NaN, which no decoder gives, is within no limits. What comes in another unit than it
//! is kept in is converted first, and checked as it is kept. Pure. A stream that asks for none of it remembers nothing.

mod gaps;
mod hold;
mod memory;
mod state;
#[cfg(test)]
mod tests;

use wire::{FieldName, FieldType, TS_FUTURE_MAX_US, TS_MIN_US};

use self::gaps::Gaps;
pub use self::gaps::{Absence, absent_schema};
pub use self::hold::{Held, Hold};
use self::memory::{Heard, Memory};
pub use self::state::StateError;
use crate::config::{Conversion, Duplicates, FieldCheck as Word, Number, StreamCheck, StreamSettings, Verdict};
use crate::decode::{Reading, Value};

/// Why a reading is rejected: a stable word (`before_2000`, `in_future`, `too_old`, `not_finite`, `missing`, `below_min`,
/// `above_max`, `not_allowed`, `type`, `step`, `stuck`, `out_of_order`), and a detail for people.
pub type Fault = (&'static str, String);

/// What is suspect about a reading: the words of a [`Fault`], with `:field` where it is one, comma-separated.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Quality(String);

impl Quality {
    /// Empty when nothing is.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Takes the text, leaving nothing.
    pub fn take(&mut self) -> String {
        std::mem::take(&mut self.0)
    }

    /// Adds a word.
    pub fn note(&mut self, word: &str) {
        if !self.0.is_empty() {
            self.0.push(',');
        }
        self.0.push_str(word);
    }

    fn fail(
        &mut self,
        verdict: Verdict,
        reason: &'static str,
        field: Option<&FieldName>,
        detail: impl FnOnce() -> String,
    ) -> Result<(), Fault> {
        if verdict == Verdict::Reject {
            return Err((reason, detail()));
        }
        self.note(reason);
        if let Some(field) = field {
            self.0.push(':');
            self.0.push_str(field.as_str());
        }
        Ok(())
    }
}

/// What becomes of a reading that no check rejected.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    /// It is one more; `back` when its device was absent, and what is made up for the gap that it ends.
    Keep { back: Option<Absence>, made_up: Vec<Reading> },
    /// It repeats one that is kept.
    Repeat,
}

/// All that judges the readings of one stream.
#[derive(Debug)]
pub struct Judge {
    checks: Checks,
    memory: Option<Memory>,
    gaps: Option<Gaps>,
    /// Whether a reading waits for one that repeats it (`duplicates = "last"`), and where.
    pub waits: bool,
    pub hold: Option<Hold>,
    fields: Vec<(FieldName, FieldType)>,
}

impl Judge {
    /// What the settings ask for, with nothing remembered.
    pub fn new(stream: &StreamSettings) -> Self {
        let waits = stream.duplicates == Duplicates::Last;
        let hold = || Hold::new(stream.duplicates_within.micros(), stream.devices_max);
        Self {
            checks: Checks::new(stream),
            memory: Memory::new(stream),
            gaps: Gaps::new(stream),
            waits,
            hold: waits.then(hold),
            fields: stream.fields.iter().map(|(name, field)| (name.clone(), field.kind)).collect(),
        }
    }

    /// Judges a reading and remembers it. `clock_us` is the agent's listening time. `quality` is what is found, of an
    /// earlier reading nothing stays.
    ///
    /// # Errors
    /// Why it is rejected.
    pub fn judge(
        &mut self,
        reading: &mut Reading,
        arrival_us: i64,
        clock_us: i64,
        watermark: i64,
        quality: &mut Quality,
    ) -> Result<Outcome, Fault> {
        self.checks.convert(reading)?;
        self.judge_converted(reading, arrival_us, clock_us, watermark, quality)
    }

    /// Brings a reading into the units that are kept.
    ///
    /// # Errors
    /// As [`Checks::convert`].
    pub fn convert(&self, reading: &mut Reading) -> Result<(), Fault> {
        self.checks.convert(reading)
    }

    /// As [`Judge::judge`], of a reading that is in the units that are kept already.
    ///
    /// # Errors
    /// Why it is rejected.
    pub fn judge_converted(
        &mut self,
        reading: &Reading,
        arrival_us: i64,
        clock_us: i64,
        watermark: i64,
        quality: &mut Quality,
    ) -> Result<Outcome, Fault> {
        quality.0.clear();
        self.checks.check(reading, arrival_us, quality)?;
        let mut outcome = Outcome::Keep { back: None, made_up: Vec::new() };
        let Some(memory) = &mut self.memory else { return Ok(outcome) };
        let before = match memory.judge(reading, clock_us, quality)? {
            Heard::Repeat => return Ok(Outcome::Repeat),
            Heard::Newest { before } => before,
            Heard::Older => None,
        };
        if let (Some(gaps), Outcome::Keep { back, made_up }) = (&mut self.gaps, &mut outcome) {
            if let Some((ts, values)) = &before {
                *made_up = gaps.fill((*ts, values), reading);
            }
            *back = gaps.heard(memory, reading, before.map(|(ts, _)| ts), watermark);
        }
        Ok(outcome)
    }

    /// The devices that have become absent.
    pub fn absent(&mut self, watermark: i64, clock_us: i64) -> Vec<Absence> {
        match (&mut self.gaps, &mut self.memory) {
            (Some(gaps), Some(memory)) => gaps.absent(memory, watermark, clock_us),
            _ => Vec::new(),
        }
    }

    /// Whether it is known how often devices send.
    pub fn expects(&self) -> bool {
        self.gaps.is_some()
    }
}

/// The checks that look at one reading alone.
#[derive(Debug)]
pub struct Checks {
    max_age: Option<(i64, Verdict)>,
    max_future: Option<(i64, Verdict)>,
    fields: Vec<FieldCheck>,
    /// By the field's place.
    conversions: Vec<(usize, Conversion)>,
}

#[derive(Debug)]
struct FieldCheck {
    name: FieldName,
    required: Option<Verdict>,
    min: Option<(Number, Verdict)>,
    max: Option<(Number, Verdict)>,
    allowed: Option<(Vec<Value>, Verdict)>,
}

impl Checks {
    /// Those that the settings name.
    pub fn new(stream: &StreamSettings) -> Self {
        let fields = stream.fields.iter().map(|(name, field)| FieldCheck {
            name: name.clone(),
            required: field.required.then(|| field.verdict(Word::Required)),
            min: field.min.map(|min| (min, field.verdict(Word::Min))),
            max: field.max.map(|max| (max, field.verdict(Word::Max))),
            allowed: (!field.allowed.is_empty()).then(|| {
                let values = field.allowed.iter().map(|allowed| allowed.0.clone());
                (values.collect(), field.verdict(Word::Allowed))
            }),
        });
        let conversions = stream.fields.iter().enumerate().filter_map(|(index, (_, field))| {
            let conversion = field.conversion().expect("checked when the settings were read");
            conversion.map(|conversion| (index, conversion))
        });
        Self {
            max_age: stream.max_age.map(|age| (age.micros(), stream.verdict(StreamCheck::MaxAge))),
            max_future: stream.max_future.map(|ahead| (ahead.micros(), stream.verdict(StreamCheck::MaxFuture))),
            fields: fields.collect(),
            conversions: conversions.collect(),
        }
    }

    /// Brings the values into the units that are kept.
    ///
    /// # Errors
    /// `not_finite` and a detail, when a value leaves what a float holds.
    pub fn convert(&self, reading: &mut Reading) -> Result<(), Fault> {
        for (index, conversion) in &self.conversions {
            if let Some(Some(Value::Float(value))) = reading.values.get_mut(*index) {
                let converted = conversion.apply(*value);
                if !converted.is_finite() {
                    let name = &self.fields[*index].name;
                    return Err(("not_finite", format!("{name} is {value}, too large for its unit")));
                }
                *value = converted;
            }
        }
        Ok(())
    }

    /// Adds to `quality` what is suspect.
    ///
    /// # Errors
    /// Why it is rejected.
    pub fn check(&self, reading: &Reading, arrival_us: i64, quality: &mut Quality) -> Result<(), Fault> {
        let time = |us| chrono::DateTime::from_timestamp_micros(us).map_or_else(|| us.to_string(), |t| t.to_rfc3339());
        let detail = || format!("its time is {}, and it came {}", time(reading.ts), time(arrival_us));
        if reading.ts < TS_MIN_US {
            return Err(("before_2000", format!("its time is {}", time(reading.ts))));
        }
        if reading.ts > arrival_us.saturating_add(TS_FUTURE_MAX_US) {
            return Err(("in_future", detail()));
        }
        if let Some((_, verdict)) = self.max_future.filter(|(most, _)| reading.ts.saturating_sub(arrival_us) > *most) {
            quality.fail(verdict, "in_future", None, detail)?;
        }
        if let Some((_, verdict)) = self.max_age.filter(|(most, _)| arrival_us.saturating_sub(reading.ts) > *most) {
            quality.fail(verdict, "too_old", None, detail)?;
        }
        for (place, (field, value)) in self.fields.iter().zip(&reading.values).enumerate() {
            let number = match value {
                // Something stood there.
                None if reading.untyped.contains(&place) => {
                    quality.fail(Verdict::Flag, "type", Some(&field.name), String::new)?;
                    continue;
                }
                None => {
                    if let Some(verdict) = field.required {
                        quality
                            .fail(verdict, "missing", Some(&field.name), || format!("{} is required", field.name))?;
                    }
                    continue;
                }
                Some(Value::Float(value)) => Some(Number::Float(*value)),
                Some(Value::Int(value)) => Some(Number::Int(*value)),
                Some(_) => None,
            };
            if let Some(number) = number {
                if let Some((min, verdict)) = field.min.filter(|(min, _)| number < *min || number.is_nan()) {
                    let detail = || format!("{} is {number}, below {min}", field.name);
                    quality.fail(verdict, "below_min", Some(&field.name), detail)?;
                }
                if let Some((max, verdict)) = field.max.filter(|(max, _)| number > *max || number.is_nan()) {
                    let detail = || format!("{} is {number}, above {max}", field.name);
                    quality.fail(verdict, "above_max", Some(&field.name), detail)?;
                }
            }
            if let (Some((allowed, verdict)), Some(value)) = (&field.allowed, value)
                && !allowed.iter().any(|one| is_same(one, value))
            {
                let detail = || format!("{} is {value:?}, which is not allowed", field.name);
                quality.fail(*verdict, "not_allowed", Some(&field.name), detail)?;
            }
        }
        Ok(())
    }
}

/// A whole number in a configuration means the float, too.
fn is_same(allowed: &Value, value: &Value) -> bool {
    match (allowed, value) {
        (Value::Int(allowed), Value::Float(value)) => Number::Int(*allowed) == Number::Float(*value),
        _ => allowed == value,
    }
}
