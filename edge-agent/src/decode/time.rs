//! Event times as devices write them, in µs since 1970 UTC; finer parts are cut off.

use chrono::format::{Item, Parsed, StrftimeItems, parse};
use chrono::{DateTime, LocalResult, NaiveDateTime, NaiveTime, TimeZone};
use chrono_tz::Tz;

use super::scalar::{NUMBER_BYTES_MAX, Scalar};
use crate::config::TimeFormat;

/// Reads times of one format.
#[derive(Debug)]
pub enum TimeReader {
    Rfc3339,
    Epoch { per_second: i64 },
    Written { format: String, items: Vec<Item<'static>>, zone: Option<Tz> },
}

impl TimeReader {
    /// Of this format, which was checked when it was read.
    pub fn new(format: &TimeFormat) -> Self {
        match format {
            TimeFormat::Rfc3339 => Self::Rfc3339,
            TimeFormat::Epoch { per_second } => Self::Epoch { per_second: *per_second },
            TimeFormat::Written { format, zone } => {
                let items = StrftimeItems::new(format).parse_to_owned().expect("checked when the settings were read");
                Self::Written { format: format.clone(), items, zone: *zone }
            }
        }
    }

    /// The time that a text is, for who reads none of the agent's formats.
    ///
    /// # Errors
    /// Why it is none.
    pub fn text(&self, text: &str) -> Result<i64, String> {
        self.read(&Scalar::Text(text.into())).map_err(|(_, detail)| detail)
    }

    /// The time at a place.
    pub(super) fn read(&self, value: &Scalar<'_>) -> Result<i64, (&'static str, String)> {
        if *value == Scalar::Null {
            return Err(("no_time", "nothing stands where the time should be".to_owned()));
        }
        if let Scalar::Time(us) = value {
            return Ok(*us);
        }
        let bad = |why: &str| Err(("bad_time", format!("{} is no time: {why}", value.describe())));
        if matches!(value, Scalar::Text(text) if text.len() > NUMBER_BYTES_MAX) {
            return bad("it is too long");
        }
        match (self, value) {
            (Self::Rfc3339, Scalar::Text(text)) => match DateTime::parse_from_rfc3339(text) {
                Ok(time) => Ok(time.timestamp_micros()),
                Err(_) => bad("RFC 3339 is expected, as 2026-11-21T08:30:00Z"),
            },
            (Self::Rfc3339, _) => bad("a text in RFC 3339 is expected"),
            (Self::Epoch { per_second }, value) => match epoch_us(value, *per_second) {
                Some(us) => Ok(us),
                None => bad("a number since 1970 is expected, in years that are stored"),
            },
            (Self::Written { format, items, zone }, Scalar::Text(text)) => {
                let mut parsed = Parsed::new();
                if parse(&mut parsed, text, items.iter()).is_err() {
                    return bad(&format!("{format} is expected"));
                }
                match written_us(&parsed, *zone) {
                    Ok(us) => Ok(us),
                    Err(why) => bad(why),
                }
            }
            (Self::Written { format, .. }, _) => bad(&format!("a text as {format} is expected")),
        }
    }
}

/// Integers are exact; of a fraction, what a float holds, rounded to µs.
fn epoch_us(value: &Scalar<'_>, per_second: i64) -> Option<i64> {
    match value {
        Scalar::Int(number) => {
            let us = i128::from(*number) * 1_000_000 / i128::from(per_second);
            i64::try_from(us).ok()
        }
        Scalar::Float(number) => {
            let us = (number * (1_000_000.0 / per_second as f64)).round();
            (us.abs() < 9e15).then_some(us as i64)
        }
        // Many devices write the number as text.
        Scalar::Text(text) => match text.parse::<i64>() {
            Ok(number) => epoch_us(&Scalar::Int(number), per_second),
            Err(_) => epoch_us(&Scalar::Float(text.parse().ok()?), per_second),
        },
        _ => None,
    }
}

fn written_us(parsed: &Parsed, zone: Option<Tz>) -> Result<i64, &'static str> {
    if let Ok(time) = parsed.to_datetime() {
        return Ok(time.timestamp_micros());
    }
    let incomplete = "date or time are incomplete or do not exist";
    let local = match parsed.to_naive_datetime_with_offset(0) {
        Ok(local) => local,
        // A format without an hour means midnight.
        Err(_) if parsed.hour_mod_12().is_none() && parsed.minute().is_none() => {
            NaiveDateTime::new(parsed.to_naive_date().map_err(|_| incomplete)?, NaiveTime::MIN)
        }
        Err(_) => return Err(incomplete),
    };
    match zone.ok_or("it has no offset, and no zone is configured")?.from_local_datetime(&local) {
        LocalResult::Single(time) => Ok(time.timestamp_micros()),
        LocalResult::Ambiguous(earlier, _) => Ok(earlier.timestamp_micros()),
        LocalResult::None => Err("the clocks were put forward over it"),
    }
}
