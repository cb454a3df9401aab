//! Windows that were too much for the lane of views when they were asked alone: they rest, and the others go on.
//!
//! They stay dirty, so a restart asks them again like any other. Here is only when each is tried next: after a second, then
//! twice as long each time, and never sooner than ten times as long as the last try took, so that a view gives them a tenth
//! of its time at most. Pure; times are of a clock that only goes on.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::engine::QueryError;
use crate::views::intervals::Intervals;

/// Of one view. When more are too much, it is not the windows.
const WINDOWS_MAX: usize = 64;
const REST_FIRST_US: i64 = 1_000_000;
const REST_LAST_US: i64 = 600_000_000;
/// Of the time that a try took.
const REST_TIMES: i64 = 10;

/// One of them.
#[derive(Debug)]
struct Resting {
    tries: u32,
    until_us: i64,
    why: String,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Aside {
    /// By where they begin.
    windows: BTreeMap<i64, Resting>,
    /// Until when none is tried.
    until_us: i64,
}

impl Aside {
    /// One that was too much alone; false when there are too many.
    pub(super) fn add(&mut self, start: i64, error: &QueryError, took: Duration, now_us: i64) -> bool {
        let tries = self.windows.get(&start).map_or(0, |resting| resting.tries);
        if tries == 0 && self.windows.len() >= WINDOWS_MAX {
            return false;
        }
        let took_us = i64::try_from(took.as_micros()).unwrap_or(i64::MAX);
        let cost = took_us.saturating_mul(REST_TIMES + 1);
        let rest =
            REST_FIRST_US.checked_shl(tries).map_or(REST_LAST_US, |rest| rest.clamp(REST_FIRST_US, REST_LAST_US));
        let until_us = now_us.saturating_add(rest.max(cost));
        self.until_us = self.until_us.max(now_us.saturating_add(cost));
        // A shift by more would come round again.
        let tries = (tries + 1).min(30);
        self.windows.insert(start, Resting { tries, until_us, why: error.to_string() });
        true
    }

    /// Those that are not to be tried yet.
    pub(super) fn resting(&self, now_us: i64) -> Vec<i64> {
        let rests = |(_, resting): &(&i64, &Resting)| now_us < resting.until_us.max(self.until_us);
        self.windows.iter().filter(rests).map(|(start, _)| *start).collect()
    }

    /// The first of these that was too much.
    pub(super) fn first_in(&self, windows: &Intervals) -> Option<i64> {
        self.windows.keys().copied().find(|start| windows.contains(*start))
    }

    /// Forgets those that need not be asked any more.
    pub(super) fn keep(&mut self, is_left: impl Fn(i64) -> bool) {
        self.windows.retain(|start, _| is_left(*start));
    }

    /// What people should know.
    pub(super) fn told(&self) -> Option<String> {
        let (start, resting) = self.windows.first_key_value()?;
        let at = chrono::DateTime::from_timestamp_micros(*start).unwrap_or_default();
        let count = self.windows.len();
        Some(format!(
            "{count} windows are too much for the lane of views, and are tried again now and then while others go on; \
             that of {at}: {}",
            resting.why
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_rest_longer_each_time_and_longer_than_they_cost() {
        let (mut aside, short) = (Aside::default(), Duration::from_millis(1));
        let error = QueryError::TooMuch { message: "too much".to_owned() };
        let mut now = 0;
        let mut rests = Vec::new();
        for _ in 0..40 {
            assert!(aside.add(7, &error, short, now));
            let until = aside.windows[&7].until_us;
            assert_eq!((aside.resting(until - 1), aside.resting(until)), (vec![7], vec![]));
            rests.push((until - now) / REST_FIRST_US);
            now = until;
        }
        assert_eq!((&rests[..4], rests[39]), (&[1, 2, 4, 8][..], 600));
        // While one rests after a long try, none is tried.
        assert!(aside.add(9, &error, Duration::from_secs(60), now));
        assert_eq!(aside.resting(now + 659_000_000), [7, 9]);
        assert_eq!(aside.resting(now + 660_000_000), Vec::<i64>::new());
        assert_eq!((aside.first_in(&Intervals::of(8, 10)), aside.first_in(&Intervals::of(10, 20))), (Some(9), None));
        assert!(aside.told().is_some_and(|told| told.starts_with("2 windows") && told.ends_with("too much")));
        aside.keep(|start| start == 9);
        assert_eq!(aside.windows.len(), 1);
        let many = (100..).take(WINDOWS_MAX).map(|start| aside.add(start, &error, short, now)).collect::<Vec<_>>();
        assert_eq!(many.iter().filter(|added| **added).count(), WINDOWS_MAX - 1);
    }
}
