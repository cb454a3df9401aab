//! What an operator must be told of a day, worked out from the readings that were sent, by the words of the manual and
//! without any code of Weir.

use std::collections::BTreeMap;

use super::plan::{Day, MINUTE_US, Reading, STEP_US};

/// One alert. Event times, µs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Alert {
    pub(super) from: i64,
    pub(super) to: Option<i64>,
    /// Of the reading, or of the windows' watermark, that decided that it fires, and that it has ended.
    pub(super) fires_by: i64,
    pub(super) ends_by: Option<i64>,
}

/// By rule, and sensor or district.
pub(super) type Alerts = BTreeMap<(&'static str, String), Vec<Alert>>;

/// How long a window waits: the view's lateness behind that of the edges.
pub(super) const WINDOW_WAITS_US: i64 = 45 * MINUTE_US;
const ABSENT_US: i64 = 90 * MINUTE_US;

/// What one row says of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Says {
    Holds,
    Between,
    Not,
}

/// Alerts of rows in order, each from a start to an end: one begins when it has held for `hold`, and ends when it has not held
/// for `keep`.
fn alerts(rows: impl Iterator<Item = (i64, i64, Says)>, hold: i64, keep: i64) -> Vec<Alert> {
    let (mut all, mut since, mut clear) = (Vec::<Alert>::new(), None, None);
    for (start, end, says) in rows {
        let open = all.last_mut().filter(|alert| alert.to.is_none());
        match (open, says) {
            (None, Says::Holds) => {
                let from = *since.get_or_insert(start);
                if end - from >= hold {
                    all.push(Alert { from, to: None, fires_by: end, ends_by: None });
                    (since, clear) = (None, None);
                }
            }
            (None, _) => since = None,
            (Some(_), Says::Holds) => clear = None,
            (Some(_), Says::Between) => {}
            (Some(alert), Says::Not) => {
                let begun = clear.is_some();
                let from = *clear.get_or_insert(start);
                if keep == 0 || begun && end - from >= keep {
                    (alert.to, alert.ends_by) = (Some(from), Some(end));
                    clear = None;
                }
            }
        }
    }
    all
}

/// Everything that is told of the day.
pub(super) fn expected(day: &Day) -> Alerts {
    let mut found = Alerts::new();
    let mut of_device: BTreeMap<&str, Vec<&Reading>> = BTreeMap::new();
    for reading in day.distinct() {
        let rows = of_device.entry(&reading.device).or_default();
        // What is older than the newest of its device says nothing.
        if rows.last().is_none_or(|newest| newest.ts < reading.ts) {
            rows.push(reading);
        }
    }
    for (device, rows) in &of_device {
        let says = |row: &&Reading| match (row.speed < 10.0 && row.vehicles >= 2, row.speed > 25.0) {
            (true, _) => Says::Holds,
            (false, true) => Says::Not,
            (false, false) => Says::Between,
        };
        // A condition that lapses ends what has not fired yet, and `alerts` knows no other ending of that.
        let congested = alerts(rows.iter().map(|row| (row.ts, row.ts, says(row))), 10 * MINUTE_US, 0);
        found.insert(("congestion", (*device).to_owned()), congested);
        found.insert(("silent", (*device).to_owned()), silences(device, rows));
    }
    for (district, windows) in windows(day, of_device.values().flatten()) {
        let says = |speed: &f64| if *speed < 15.0 { Says::Holds } else { Says::Not };
        let rows = windows.iter().map(|(start, speed)| (*start, start + STEP_US, says(speed)));
        let mut slow = alerts(rows, 15 * MINUTE_US, 20 * MINUTE_US);
        for alert in &mut slow {
            // Decided when the watermark has passed the window's end.
            alert.fires_by += WINDOW_WAITS_US;
            alert.ends_by = alert.ends_by.map(|ts| ts + WINDOW_WAITS_US);
        }
        found.insert(("slow_district", district.to_owned()), slow);
    }
    found.retain(|_, alerts| !alerts.is_empty());
    found
}

/// It is asked once a second of the wall: what lasts only a little longer than it must may pass unseen.
fn silences(device: &str, rows: &[&Reading]) -> Vec<Alert> {
    let mut all = Vec::new();
    for pair in rows.windows(2) {
        let (last, next) = (pair[0].ts, pair[1].ts);
        assert!(!(85..140).contains(&((next - last) / MINUTE_US)), "{device} is silent for a time that proves nothing");
        if next - last > ABSENT_US {
            let fires_by = last + ABSENT_US + STEP_US;
            all.push(Alert { from: last, to: Some(next), fires_by, ends_by: Some(next) });
        }
    }
    all
}

/// The mean speed in windows of five minutes that have closed by the end of the day, by district.
fn windows<'r>(day: &Day, rows: impl Iterator<Item = &'r &'r Reading>) -> BTreeMap<&'static str, BTreeMap<i64, f64>> {
    let closed = day.steps.last().unwrap().ts - WINDOW_WAITS_US;
    let mut sums: BTreeMap<(&str, i64), (f64, f64)> = BTreeMap::new();
    for row in rows {
        let window = row.ts.div_euclid(STEP_US) * STEP_US;
        if window + STEP_US <= closed {
            let sum = sums.entry((day.districts[&row.device], window)).or_default();
            (sum.0, sum.1) = (sum.0 + row.speed, sum.1 + 1.0);
        }
    }
    let mut windows: BTreeMap<&str, BTreeMap<i64, f64>> = BTreeMap::new();
    for ((district, window), (sum, count)) in sums {
        windows.entry(district).or_default().insert(window, sum / count);
    }
    windows
}
