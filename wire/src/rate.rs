//! How often something may happen: `"10/1m"`, ten times a minute.
//!
//! Ten at once, and from then on one each six seconds. Pure: the caller says how much time has passed.

use std::str::FromStr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Deserializer};

use crate::written::Span;

/// So often within so long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    pub count: u32,
    pub per: Duration,
}

impl FromStr for Rate {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let read = || {
            let (count, per) = text.split_once('/')?;
            let rate = Self { count: count.trim().parse().ok()?, per: per.trim().parse::<Span>().ok()?.0 };
            (rate.count > 0 && !rate.per.is_zero()).then_some(rate)
        };
        read().ok_or_else(|| format!("`{text}` is no rate: write it as \"10/1m\", ten times a minute"))
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What of a rate is left. Full at the start.
#[derive(Debug, Clone)]
pub struct Allowance {
    rate: Rate,
    /// From 0 to `rate.count`, at `at`.
    left: f64,
    at: Instant,
}

impl Allowance {
    /// All of it.
    pub fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, left: f64::from(rate.count), at: now }
    }

    /// Takes one; false when there is none.
    pub fn take(&mut self, now: Instant) -> bool {
        let count = f64::from(self.rate.count);
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + passed * count / self.rate.per.as_secs_f64()).min(count);
        self.at = now.max(self.at);
        let is_left = self.left >= 1.0;
        if is_left {
            self.left -= 1.0;
        }
        is_left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_kept_over_any_time() {
        let begun = Instant::now();
        let mut allowance = Allowance::new("3/1s".parse().unwrap(), begun);
        let mut took = |ms: u64| (0..10).filter(|_| allowance.take(begun + Duration::from_millis(ms))).count();
        assert_eq!([took(0), took(0), took(400), took(500), took(10_000), took(9_000)], [3, 0, 1, 0, 3, 0]);
    }

    #[test]
    fn what_is_no_rate_is_refused() {
        assert_eq!("10 / 1m".parse::<Rate>().unwrap(), Rate { count: 10, per: Duration::from_secs(60) });
        for wrong in ["", "10", "0/1s", "1/0s", "x/1s", "1/1", "-1/1s"] {
            assert!(wrong.parse::<Rate>().is_err(), "{wrong}");
        }
    }
}
