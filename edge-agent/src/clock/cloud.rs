//! The cloud's time, from the dates of its answers. Pure.
//!
//! A date is a whole second that lay between question and answer, so each answer bounds the time from both sides; what all of
//! the last ones agree on is better than any of them. Two clocks drift apart, by [`DRIFT`] at most: what is known ages. When
//! an answer agrees with none before it, it is another node or a clock that was set: it begins anew.

use super::EARLIEST_US;

/// One part in so many.
const DRIFT: i64 = 10_000;

/// From the monotonic time to the cloud's: at least and at most; and when it was heard last.
#[derive(Debug, Default)]
pub(super) struct CloudTime {
    range: Option<(i64, i64)>,
    at_us: i64,
}

impl CloudTime {
    /// An answer had the date; it was asked and had answered at these monotonic times. A cloud that stands before 2024 is
    /// not listened to.
    pub(super) fn heard(&mut self, date_s: i64, asked_us: i64, answered_us: i64) {
        let date_us = date_s.saturating_mul(1_000_000);
        if date_us < EARLIEST_US {
            return;
        }
        let heard = (date_us.saturating_sub(answered_us), date_us.saturating_add(1_000_000).saturating_sub(asked_us));
        let both = self.range(answered_us).map(|(least, most)| (least.max(heard.0), most.min(heard.1)));
        self.range = Some(both.filter(|(least, most)| least <= most).unwrap_or(heard));
        self.at_us = answered_us;
    }

    /// From the monotonic time to the cloud's, and at most how wrong that is.
    pub(super) fn offset_us(&self, monotonic_us: i64) -> Option<(i64, i64)> {
        let (least, most) = self.range(monotonic_us)?;
        let half = most.saturating_sub(least) / 2;
        Some((least + half, half))
    }

    fn range(&self, monotonic_us: i64) -> Option<(i64, i64)> {
        let drift = monotonic_us.saturating_sub(self.at_us).max(0) / DRIFT;
        self.range.map(|(least, most)| (least.saturating_sub(drift), most.saturating_add(drift)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATE_S: i64 = 1_800_000_000;
    const OFFSET_US: i64 = DATE_S * 1_000_000 + 123_456;

    /// An answer of a cloud that is right, which was on its way for so long each time.
    fn answer(cloud: &mut CloudTime, asked_us: i64, there_us: i64, back_us: i64) {
        let date_s = (asked_us + there_us + OFFSET_US).div_euclid(1_000_000);
        cloud.heard(date_s, asked_us, asked_us + there_us + back_us);
    }

    #[test]
    fn many_answers_know_more_than_one() {
        let mut cloud = CloudTime::default();
        assert_eq!(cloud.offset_us(0), None);
        answer(&mut cloud, 5_000_000, 40_000, 2_000);
        let (offset, error) = cloud.offset_us(5_042_000).unwrap();
        assert!((offset - OFFSET_US).abs() <= error && error <= 521_000, "half a second and half of the way");
        for turn in 1..50 {
            let asked = 5_000_000 + turn * 1_037_000;
            answer(&mut cloud, asked, 2_000, 2_000);
            let (offset, error) = cloud.offset_us(asked).unwrap();
            assert!((offset - OFFSET_US).abs() <= error + 1, "{turn}");
        }
        let (_, error) = cloud.offset_us(60_000_000).unwrap();
        assert!(error < 100_000, "{error}");
        let (_, later) = cloud.offset_us(10_060_000_000).unwrap();
        assert!(later > error + 900_000, "what is known ages: {later}");
    }

    #[test]
    fn a_cloud_that_was_set_is_heard_anew_and_one_of_1970_never() {
        let mut cloud = CloudTime::default();
        answer(&mut cloud, 0, 1_000, 1_000);
        cloud.heard(DATE_S + 3_600, 10_000_000, 10_001_000);
        let (offset, error) = cloud.offset_us(10_001_000).unwrap();
        assert!((offset - (DATE_S + 3_590) * 1_000_000).abs() <= error + 1_000_000 && error < 600_000);
        let before = cloud.offset_us(20_000_000);
        cloud.heard(15, 10_002_000, 10_003_000);
        assert_eq!(cloud.offset_us(20_000_000), before);
    }
}
