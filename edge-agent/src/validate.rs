//! The checks that a reading must pass to be stored in its table; what fails goes to quarantine.
//!
//! Required, min and max of each field; event time not before 2000, not more than a day ahead of the arrival (DESIGN.md,
//! rule 9), and not older at its arrival than the stream's `max_age`. Each limit itself passes. Whole numbers are compared
//! exactly; NaN, which no decoder gives, is within no limits. Pure.

use wire::{FieldName, TS_FUTURE_MAX_US, TS_MIN_US};

use crate::config::{Number, StreamSettings};
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
    min: Option<Number>,
    max: Option<Number>,
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
                Some(Value::Float(value)) => Number::Float(*value),
                Some(Value::Int(value)) => Number::Int(*value),
                _ => continue,
            };
            if let Some(min) = field.min.filter(|min| number < *min || number.is_nan()) {
                return Err(("below_min", format!("{} is {number}, below {min}", field.name)));
            }
            if let Some(max) = field.max.filter(|max| number > *max || number.is_nan()) {
                return Err(("above_max", format!("{} is {number}, above {max}", field.name)));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::config::Settings;
    use crate::decode::Decoder;

    const DAY_US: i64 = 86_400_000_000;

    fn settings(stream: &str, fields: &str) -> Settings {
        let text = format!(
            "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n\
             [[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\ntopics = [\"t\"]\nstream = \"s\"\n\
             [source.map]\ndevice = \"const:d\"\nts = \"/t\"\nv = \"/v\"\n\
             [stream.s]\n{stream}\n[stream.s.fields]\nv = {{ {fields} }}\n"
        );
        Settings::parse(&text).unwrap()
    }

    fn checks(stream: &str, fields: &str) -> Checks {
        Checks::new(settings(stream, fields).stream.values().next().unwrap())
    }

    fn us(text: &str) -> i64 {
        chrono::DateTime::parse_from_rfc3339(text).unwrap().timestamp_micros()
    }

    /// The reason that a value is rejected for.
    fn of_value(fields: &str, value: Option<Value>) -> Result<(), &'static str> {
        let now = us("2026-01-01T00:00:00Z");
        let reading = Reading { ts: now, device: "d".to_owned(), values: vec![value], span: 0..0 };
        checks("", fields).check(&reading, now).map_err(|(reason, _)| reason)
    }

    #[test]
    fn a_float_passes_at_its_limits_and_not_beyond() {
        let check = |fields: &str, value: f64, expected| {
            let fields = format!("type = \"float64\", {fields}");
            assert_eq!(of_value(&fields, Some(Value::Float(value))), expected, "{fields}: {value}");
        };
        let (below, above) = (Err("below_min"), Err("above_max"));
        check("min = 0, max = 200", 0.0, Ok(()));
        check("min = 0, max = 200", 200.0, Ok(()));
        check("min = 0, max = 200", -5e-324, below);
        check("min = 0, max = 200", 200.0_f64.next_up(), above);
        check("min = 0.1", 0.1, Ok(()));
        check("min = 0.1", 0.1_f64.next_down(), below);
        check("min = 0", -0.0, Ok(()));
        check("min = -0.0", 0.0, Ok(()));
        check("min = -0.0", -0.0, Ok(()));
        check("min = -0.0", -1e-300, below);
        check("max = -0.0", 0.0, Ok(()));
        check("min = 0", f64::INFINITY, Ok(()));
        check("max = 200", f64::INFINITY, above);
        check("min = 0", f64::NEG_INFINITY, below);
        check("min = 0", f64::NAN, below);
        check("max = 0", f64::NAN, above);
        check("required = true", f64::NAN, Ok(()));
        check("min = -inf, max = inf", f64::MAX, Ok(()));
        check("max = 9007199254740993", 9_007_199_254_740_994.0, above);
    }

    #[test]
    fn an_int_is_compared_exactly() {
        let check = |fields: &str, value: i64, expected| {
            let fields = format!("type = \"int64\", {fields}");
            assert_eq!(of_value(&fields, Some(Value::Int(value))), expected, "{fields}: {value}");
        };
        let (below, above) = (Err("below_min"), Err("above_max"));
        check("min = 3, max = 3", 3, Ok(()));
        check("min = 3, max = 3", 2, below);
        check("min = 3, max = 3", 4, above);
        check("min = 9007199254740993", 9_007_199_254_740_993, Ok(()));
        check("min = 9007199254740993", 9_007_199_254_740_992, below);
        check("max = 9007199254740993", 9_007_199_254_740_994, above);
        check("max = 9223372036854775806", i64::MAX, above);
        check("max = 9223372036854775807", i64::MAX, Ok(()));
        check("min = -9223372036854775808", i64::MIN, Ok(()));
        check("min = -9223372036854775807", i64::MIN, below);
        check("max = 9.223372036854776e18", i64::MAX, Ok(()));
        check("min = 9.223372036854776e18", i64::MAX, below);
        check("min = -0.0", 0, Ok(()));
        check("min = -0.0", -1, below);
        check("min = 0.5", 0, below);
        check("min = 0.5", 1, Ok(()));
        check("max = 1e3", 1_000, Ok(()));
        check("max = 1e3", 1_001, above);
        check("min = -inf, max = inf", i64::MIN, Ok(()));
    }

    #[test]
    fn what_is_required_must_be_there_and_the_rest_need_not() {
        let payload = |payload: &str, fields: &str| {
            let settings = settings("", fields);
            let decoding = settings.source[0].decoding().unwrap();
            let stream = settings.stream.values().next().unwrap();
            let mut out = Vec::new();
            let payload = Bytes::copy_from_slice(payload.as_bytes());
            let now = us("2026-01-01T00:00:00Z");
            Decoder::new(&decoding, stream).decode("t", &payload, now, &mut out);
            match out.pop().unwrap() {
                Ok(reading) => Checks::new(stream).check(&reading, now).map_err(|(reason, _)| reason),
                Err(rejected) => Err(rejected.reason),
            }
        };
        let check = |rest: &str, fields: &str, expected| {
            let text = format!("{{\"t\":\"2026-01-01T00:00:00Z\"{rest}}}");
            assert_eq!(payload(&text, fields), expected, "{rest} {fields}");
        };
        let required = "type = \"int64\", required = true, min = 1";
        let free = "type = \"int64\", min = 1";
        check("", required, Err("missing"));
        check(",\"v\":null", required, Err("missing"));
        check("", free, Ok(()));
        check(",\"v\":null", free, Ok(()));
        check(",\"v\":1", required, Ok(()));
        check(",\"v\":0", required, Err("below_min"));
        check(",\"v\":\"1\"", required, Err("wrong_type"));
        check(",\"v\":1.5", required, Err("wrong_type"));
        check(",\"v\":9223372036854775808", required, Err("wrong_type"));
        check(",\"v\":true", free, Err("wrong_type"));
        check(",\"v\":[1]", free, Err("wrong_type"));
        check(",\"v\":\"\"", "type = \"text\", required = true", Ok(()));
        check(",\"v\":false", "type = \"bool\", required = true", Ok(()));
    }

    #[test]
    fn event_times_pass_at_their_limits_and_not_beyond() {
        let now = us("2026-03-01T12:00:00Z");
        let check = |stream: &str, ts: i64, expected: Result<(), &'static str>| {
            let reading = Reading { ts, device: "d".to_owned(), values: vec![None], span: 0..0 };
            let result = checks(stream, "type = \"int64\"").check(&reading, now);
            assert_eq!(result.map_err(|(reason, _)| reason), expected, "{stream} {ts}");
        };
        check("", us("1999-12-31T23:59:59.999999Z"), Err("before_2000"));
        check("", us("2000-01-01T00:00:00Z"), Ok(()));
        check("", i64::MIN, Err("before_2000"));
        check("", now + DAY_US, Ok(()));
        check("", now + DAY_US + 1, Err("in_future"));
        check("", i64::MAX, Err("in_future"));
        check("max_age = \"1h\"", now - DAY_US / 24, Ok(()));
        check("max_age = \"1h\"", now - DAY_US / 24 - 1, Err("too_old"));
        check("max_age = \"1h\"", now + DAY_US, Ok(()));
        check("max_age = \"0s\"", now, Ok(()));
        check("max_age = \"36500d\"", us("1999-12-31T23:59:59.999999Z"), Err("before_2000"));
    }
}
