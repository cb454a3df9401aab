//! Some values of each name over the last minutes, for the lines on the status page. They are lost at a restart.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// A value is noted at most so often …
const EVERY: Duration = Duration::from_secs(5);
/// … and so many are kept: five minutes.
const SAMPLES: usize = 60;

/// Names are those of streams and their fields: as many as the configuration has.
#[derive(Debug, Default)]
pub(super) struct History(HashMap<String, (Option<Instant>, VecDeque<f64>)>);

impl History {
    /// The values of a name, the oldest first; `value` is noted when it is time to. What is not finite is not.
    pub(super) fn note(&mut self, name: &str, value: f64, now: Instant) -> Vec<f64> {
        if !self.0.contains_key(name) {
            self.0.insert(name.to_owned(), (None, VecDeque::with_capacity(SAMPLES)));
        }
        let (noted, samples) = self.0.get_mut(name).expect("it was put there");
        if value.is_finite() && noted.is_none_or(|noted| now.duration_since(noted) >= EVERY) {
            if samples.len() == SAMPLES {
                samples.pop_front();
            }
            samples.push_back(value);
            *noted = Some(now);
        }
        samples.iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_noted_now_and_then_and_the_oldest_goes() {
        let (mut history, start) = (History::default(), Instant::now());
        assert!(history.note("a", f64::NAN, start).is_empty());
        assert_eq!(history.note("a", 1.0, start), [1.0]);
        assert_eq!(history.note("a", 2.0, start + EVERY / 2), [1.0], "too soon");
        assert_eq!(history.note("b", 3.0, start), [3.0]);
        for number in 1..100_u32 {
            history.note("a", f64::from(number), start + EVERY * number);
        }
        let kept = history.note("a", 0.0, start);
        assert_eq!((kept.len(), kept[0], kept[SAMPLES - 1]), (SAMPLES, 40.0, 99.0));
    }
}
