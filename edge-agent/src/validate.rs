//! The checks that a reading must pass to be stored in its table; what fails goes to quarantine.
//!
//! Required, min and max of each field; event time not before 2000, not more than a day ahead of the arrival (DESIGN.md,
//! rule 9), and not older at its arrival than the stream's `max_age`. Pure.

use wire::{FieldName, TS_FUTURE_MAX_US, TS_MIN_US};

use crate::config::StreamSettings;
use crate::decode::{Reading, Value};

/// The checks of one stream.
#[derive(Debug)]
pub struct Checks {
    max_age_us: Option<i64>,
    fields: Vec<FieldCheck>,
}

#[derive(Debug)]
struct FieldCheck {
    name: FieldName,
    required: bool,
    min: Option<f64>,
    max: Option<f64>,
}

impl Checks {
    /// Those that the settings name.
    pub fn new(stream: &StreamSettings) -> Self {
        let fields = stream.fields.iter().map(|(name, field)| FieldCheck {
            name: name.clone(),
            required: field.required,
            min: field.min,
            max: field.max,
        });
        Self { max_age_us: stream.max_age.map(|age| age.micros()), fields: fields.collect() }
    }

    /// # Errors
    /// The reason (`before_2000`, `in_future`, `too_old`, `missing`, `below_min`, `above_max`) and a detail for people.
    pub fn check(&self, reading: &Reading, arrival_us: i64) -> Result<(), (&'static str, String)> {
        let time = |us| chrono::DateTime::from_timestamp_micros(us).map_or_else(|| us.to_string(), |t| t.to_rfc3339());
        if reading.ts < TS_MIN_US {
            return Err(("before_2000", format!("its time is {}", time(reading.ts))));
        }
        if reading.ts > arrival_us.saturating_add(TS_FUTURE_MAX_US) {
            return Err(("in_future", format!("its time is {}, and it came {}", time(reading.ts), time(arrival_us))));
        }
        if let Some(max_age_us) = self.max_age_us
            && arrival_us.saturating_sub(reading.ts) > max_age_us
        {
            return Err(("too_old", format!("its time is {}, and it came {}", time(reading.ts), time(arrival_us))));
        }
        for (field, value) in self.fields.iter().zip(&reading.values) {
            let number = match value {
                None if field.required => return Err(("missing", format!("{} is required", field.name))),
                Some(Value::Float(value)) => *value,
                Some(Value::Int(value)) => *value as f64,
                _ => continue,
            };
            if let Some(min) = field.min.filter(|min| number < *min) {
                return Err(("below_min", format!("{} is {number}, below {min}", field.name)));
            }
            if let Some(max) = field.max.filter(|max| number > *max) {
                return Err(("above_max", format!("{} is {number}, above {max}", field.name)));
            }
        }
        Ok(())
    }
}
