//! How long things took in a measurement, each to a thousandth.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// What takes longer counts as this, µs.
const LONGEST_US: u64 = 600_000_000;

/// Times, of which quantiles are told.
#[derive(Debug)]
pub(super) struct Times(Histogram<u64>);

impl Times {
    pub(super) fn new() -> Self {
        Self(Histogram::new_with_bounds(1, LONGEST_US, 3).expect("these bounds are valid"))
    }

    pub(super) fn add(&mut self, time: Duration) {
        self.add_us(micros(time));
    }

    pub(super) fn add_us(&mut self, us: u64) {
        self.0.saturating_record(us);
    }

    pub(super) fn add_all(&mut self, others: &Self) {
        self.0.add(&others.0).expect("all have the same bounds");
    }

    pub(super) fn clear(&mut self) {
        self.0.reset();
    }

    pub(super) fn count(&self) -> u64 {
        self.0.len()
    }

    /// A quantile, ms.
    pub(super) fn ms(&self, quantile: f64) -> f64 {
        self.0.value_at_quantile(quantile) as f64 / 1_000.0
    }

    /// Quantiles in ms, and how many there were.
    pub(super) fn report(&self) -> Value {
        json!({
            "p50": self.ms(0.5), "p99": self.ms(0.99), "p99.5": self.ms(0.995), "p99.9": self.ms(0.999),
            "max": self.0.max() as f64 / 1_000.0, "count": self.count(),
        })
    }
}

impl<'a> FromIterator<&'a Duration> for Times {
    fn from_iter<I: IntoIterator<Item = &'a Duration>>(times: I) -> Self {
        let mut all = Self::new();
        times.into_iter().for_each(|time| all.add(*time));
        all
    }
}

pub(super) fn micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}
