//! Where the buckets of `time_bucket` begin. Pure: instants in, instants out, all in microseconds since the epoch.
//!
//! Buckets tile the time line without holes: `start(t)` is the beginning of the bucket that holds t, `start(t) <= t`,
//! `start` never falls when t grows, and `start(start(t)) == start(t)`. The optimizer counts on all three.
//!
//! A width is a number of months, or a number of microseconds. Without an origin buckets of months begin with the
//! January of 2000, all others with Monday 2000-01-03, as Timescale has it.
//!
//! With a time zone the grid lies on the wall clock there. A beginning that the clock jumps over is the moment of the
//! jump. An hour that the clock shows twice has buckets of its own the second time if the width fits into it; a wider
//! bucket is longer by that hour.

use chrono::{DateTime, Datelike, NaiveDate, Offset, TimeZone};
use chrono_tz::Tz;

const DAY_US: i64 = 86_400_000_000;
/// Monday 2000-01-03, 00:00.
pub(super) const MONDAY_US: i64 = 10_959 * DAY_US;
/// How far a stretch of one offset is looked for, days. Beyond it a new stretch begins.
const STRETCH_DAYS: i64 = 400;
/// Longest time that a clock is set back, microseconds.
const SET_BACK_MAX_US: i64 = DAY_US;

/// Width of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd)]
pub(crate) enum Width {
    Micros(i64),
    Months(i64),
}

impl Width {
    /// From the parts of an INTERVAL; None when it is not positive, or mixes months with shorter units.
    pub(crate) fn new(months: i32, days: i32, nanos: i64) -> Option<Self> {
        if months != 0 {
            return (months > 0 && days == 0 && nanos == 0).then_some(Self::Months(i64::from(months)));
        }
        if nanos % 1_000 != 0 {
            return None;
        }
        let us = i64::from(days).checked_mul(DAY_US)?.checked_add(nanos / 1_000)?;
        (us > 0).then_some(Self::Micros(us))
    }
}

/// The grid on one clock.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd)]
struct Grid {
    width: Width,
    /// Where a bucket of microseconds begins; what buckets of months are shifted by.
    origin_us: i64,
    /// Months since the year 0 at which a bucket of months begins.
    origin_month: i64,
}

impl Grid {
    fn floor(&self, local: i64) -> Option<i64> {
        match self.width {
            Width::Micros(width) => {
                let buckets = local.checked_sub(self.origin_us)?.div_euclid(width);
                buckets.checked_mul(width)?.checked_add(self.origin_us)
            }
            Width::Months(width) => {
                let month = month_of(local.checked_sub(self.origin_us)?)?;
                let first = (month - self.origin_month).div_euclid(width) * width + self.origin_month;
                month_start(first)?.checked_add(self.origin_us)
            }
        }
    }

    /// The beginning after this one.
    fn next(&self, start: i64) -> Option<i64> {
        match self.width {
            Width::Micros(width) => start.checked_add(width),
            Width::Months(width) => {
                let month = month_of(start.checked_sub(self.origin_us)?)?;
                month_start(month.checked_add(width)?)?.checked_add(self.origin_us)
            }
        }
    }

    fn wider_than(&self, us: i64) -> bool {
        match self.width {
            Width::Micros(width) => width > us,
            Width::Months(_) => true,
        }
    }
}

fn month_of(local: i64) -> Option<i64> {
    let date = DateTime::from_timestamp_micros(local)?;
    Some(i64::from(date.year()) * 12 + i64::from(date.month0()))
}

fn month_start(month: i64) -> Option<i64> {
    let year = i32::try_from(month.div_euclid(12)).ok()?;
    let date = NaiveDate::from_ymd_opt(year, month.rem_euclid(12) as u32 + 1, 1)?;
    Some(date.and_hms_opt(0, 0, 0)?.and_utc().timestamp_micros())
}

/// A stretch of time with one offset from UTC: `from <= t < to`.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    from: i64,
    to: i64,
    offset: i64,
    /// Offset just before `from`.
    before: i64,
}

/// Buckets of one width, origin and zone. It remembers what it learnt about the zone, so use one for many instants.
#[derive(Debug, Clone)]
pub(crate) struct Buckets {
    grid: Grid,
    zone: Option<Tz>,
    stretches: Vec<Stretch>,
    last: usize,
}

impl PartialEq for Buckets {
    fn eq(&self, other: &Self) -> bool {
        self.grid == other.grid && self.zone == other.zone
    }
}

impl Eq for Buckets {}

impl std::hash::Hash for Buckets {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.grid.hash(state);
        self.zone.hash(state);
    }
}

impl Buckets {
    /// Buckets from an origin, an instant, shifted by months (buckets of months only) and microseconds.
    /// None when one of them is out of range, or months shift a grid without months.
    pub(crate) fn new(width: Width, zone: Option<Tz>, origin: Option<i64>, shift: (i64, i64)) -> Option<Self> {
        let (shift_months, shift_us) = shift;
        let origin = match (origin, zone) {
            (Some(us), Some(zone)) => Some(us.checked_add(offset(zone, us)?)?),
            (origin, _) => origin,
        };
        let grid = match width {
            Width::Micros(_) if shift_months != 0 => return None,
            Width::Micros(_) => {
                Grid { width, origin_us: origin.unwrap_or(MONDAY_US).checked_add(shift_us)?, origin_month: 0 }
            }
            Width::Months(_) => Grid {
                width,
                origin_us: shift_us,
                origin_month: origin.map_or(Some(2_000 * 12), month_of)?.checked_add(shift_months)?,
            },
        };
        Some(Self { grid, zone, stretches: Vec::new(), last: 0 })
    }

    /// The beginning of the bucket that holds this instant; None when it is out of range.
    pub(crate) fn start(&mut self, ts: i64) -> Option<i64> {
        if self.zone.is_none() {
            return self.grid.floor(ts);
        }
        let mut at = ts;
        loop {
            let stretch = self.stretch(at)?;
            let floor = self.grid.floor(at.checked_add(stretch.offset)?)?;
            let start = floor - stretch.offset;
            let set_back = stretch.before - stretch.offset;
            if start >= stretch.from {
                let repeated = floor < stretch.from + stretch.before;
                if !(repeated && self.grid.wider_than(set_back)) {
                    return Some(start);
                }
            } else if set_back < 0 && floor >= stretch.from + stretch.before {
                return Some(stretch.from);
            }
            at = stretch.from - 1;
        }
    }

    /// The beginning of the bucket after the one that begins here; None when it is out of range.
    pub(crate) fn next(&mut self, start: i64) -> Option<i64> {
        if self.zone.is_none() {
            return self.grid.next(start);
        }
        let offset = self.stretch(start)?.offset;
        let guess = self.grid.next(self.grid.floor(start.checked_add(offset)?)?)?.checked_sub(offset)?;
        if guess > start && self.start(guess)? == guess && self.start(guess - 1)? == start {
            return Some(guess);
        }
        let (mut inside, mut beyond) = (start, guess.max(start).checked_add(2 * SET_BACK_MAX_US)?);
        while beyond - inside > 1 {
            let middle = inside + (beyond - inside) / 2;
            if self.start(middle)? > start {
                beyond = middle;
            } else {
                inside = middle;
            }
        }
        Some(beyond)
    }

    /// The beginning of the bucket so many before the one that begins here; None when it is out of range.
    pub(crate) fn before(&mut self, start: i64, count: u32) -> Option<i64> {
        match (self.zone, self.grid.width) {
            (None, Width::Micros(width)) => start.checked_sub(width.checked_mul(i64::from(count))?),
            _ => (0..count).try_fold(start, |at, _| self.start(at.checked_sub(1)?)),
        }
    }

    /// The beginning of the bucket so many behind the one that begins here; None when it is out of range.
    pub(crate) fn after(&mut self, start: i64, count: u32) -> Option<i64> {
        match (self.zone, self.grid.width) {
            (None, Width::Micros(width)) => start.checked_add(width.checked_mul(i64::from(count))?),
            _ => (0..count).try_fold(start, |at, _| self.next(at)),
        }
    }

    fn stretch(&mut self, ts: i64) -> Option<Stretch> {
        let holds = |stretch: &Stretch| stretch.from <= ts && ts < stretch.to;
        if let Some(stretch) = self.stretches.get(self.last).copied().filter(|stretch| holds(stretch)) {
            return Some(stretch);
        }
        if let Some(index) = self.stretches.iter().position(holds) {
            self.last = index;
            return Some(self.stretches[index]);
        }
        let zone = self.zone?;
        let here = offset(zone, ts)?;
        let (mut from, mut to) = (ts, ts);
        let mut before = here;
        for _ in 0..STRETCH_DAYS {
            before = offset(zone, from - DAY_US)?;
            if before != here {
                from = change(zone, from - DAY_US, from)?;
                before = offset(zone, from - 1)?;
                break;
            }
            from -= DAY_US;
        }
        for _ in 0..STRETCH_DAYS {
            if offset(zone, to + DAY_US)? != here {
                to = change(zone, to, to + DAY_US)?;
                break;
            }
            to += DAY_US;
        }
        let stretch = Stretch { from, to, offset: here, before };
        self.last = self.stretches.len();
        self.stretches.push(stretch);
        Some(stretch)
    }
}

/// Offset from UTC of a zone at an instant, microseconds.
fn offset(zone: Tz, us: i64) -> Option<i64> {
    let utc = DateTime::from_timestamp_micros(us)?.naive_utc();
    Some(i64::from(zone.offset_from_utc_datetime(&utc).fix().local_minus_utc()) * 1_000_000)
}

/// The first instant of the offset that holds at `to`, if it is the only change after `from`.
fn change(zone: Tz, from: i64, to: i64) -> Option<i64> {
    let after = offset(zone, to)?;
    let (mut old, mut new) = (from, to);
    while new - old > 1 {
        let middle = old + (new - old) / 2;
        if offset(zone, middle)? == after {
            new = middle;
        } else {
            old = middle;
        }
    }
    Some(new)
}

#[cfg(test)]
mod tests;
