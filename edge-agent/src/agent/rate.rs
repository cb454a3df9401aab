//! So many a second, over some seconds, from totals.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Rates are over about so long.
const SPAN: Duration = Duration::from_secs(5);

/// The last known totals of each name.
#[derive(Debug, Default)]
pub(super) struct Rates(HashMap<String, (Instant, u64, f64)>);

impl Rates {
    /// The rate of a total that is `total` now.
    pub(super) fn of(&mut self, name: &str, total: u64, now: Instant) -> f64 {
        let Some((since, before, rate)) = self.0.get_mut(name) else {
            self.0.insert(name.to_owned(), (now, total, 0.0));
            return 0.0;
        };
        let elapsed = now.duration_since(*since);
        if elapsed >= SPAN {
            *rate = total.saturating_sub(*before) as f64 / elapsed.as_secs_f64();
            (*since, *before) = (now, total);
        }
        (*rate * 10.0).round() / 10.0
    }

    /// For tests: all totals are from so long ago.
    #[cfg(test)]
    pub(super) fn back_date(&mut self, by: Duration) {
        self.0.values_mut().for_each(|(since, ..)| *since -= by);
    }
}
