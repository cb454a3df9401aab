//! The windows of a view: which expressions make them, and where they begin and end. Pure.
//!
//! `time_bucket(width, ts …)`, `date_bin(width, ts [, origin])` and `date_trunc(part, ts)` of the event time all cut the
//! time line into windows without holes, so one kind of grid serves the three. Those of `HOP` are some buckets long, and one
//! begins with each. Whether the grid and the function agree is looked at in every row that a view gets (`run/windows.rs`).
//!
//! A window is known by its slot: the bucket that it begins with. What a view must ask and has told are sets of slots, each as
//! the stretch of time from its beginning to that of the next. Only [`Grid::touched`], [`Grid::rows`], [`Grid::until`] and
//! [`Grid::closing`] know that a window may be longer than its slot.

use datafusion::common::ScalarValue;
use datafusion::logical_expr::Expr;
use datafusion::logical_expr::expr::ScalarFunction;

use super::intervals::Intervals;
use crate::functions::bucket_grid::{Buckets, Width};
use crate::functions::hop::Windows;
use crate::functions::time_bucket;

/// See the module. Equal grids have equal windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Grid(Windows);

impl From<Buckets> for Grid {
    fn from(buckets: Buckets) -> Self {
        Self(Windows { buckets, hops: 1 })
    }
}

impl From<Windows> for Grid {
    fn from(windows: Windows) -> Self {
        Self(windows)
    }
}

impl Grid {
    /// The windows that a function makes, when it is one of the three and all but the event time is constant. The
    /// argument that is the event time is the second of each.
    pub(crate) fn of(function: &ScalarFunction) -> Option<Self> {
        let arguments = &function.args;
        let constant = |index: usize| time_bucket::constant(arguments.get(index)?);
        match (function.func.name(), arguments.len()) {
            ("time_bucket", _) => time_bucket::grid(arguments).map(Self::from),
            ("date_bin", 2 | 3) => {
                let width = time_bucket::interval(&constant(0)?)?;
                let width = Width::new(width.months, width.days, width.nanoseconds)?;
                let origin = match arguments.len() {
                    2 => 0,
                    _ => time_bucket::instant(&constant(2)?)?,
                };
                let whole_months = !matches!(width, Width::Months(_)) || origin == 0;
                Buckets::new(width, None, Some(origin), (0, 0)).filter(|_| whole_months).map(Self::from)
            }
            ("date_trunc", 2) => {
                let part = constant(0)?;
                let (months, days, us) = match part.try_as_str()??.to_lowercase().as_str() {
                    "year" => (12, 0, 0),
                    "quarter" => (3, 0, 0),
                    "month" => (1, 0, 0),
                    "week" => (0, 7, 0),
                    "day" => (0, 1, 0),
                    "hour" => (0, 0, 3_600_000_000),
                    "minute" => (0, 0, 60_000_000),
                    "second" => (0, 0, 1_000_000),
                    "millisecond" => (0, 0, 1_000),
                    _ => return None,
                };
                Buckets::new(Width::new(months, days, us * 1_000)?, None, None, (0, 0)).map(Self::from)
            }
            _ => None,
        }
    }

    /// Seconds, for pieces of time of a view that has no windows.
    pub(crate) fn seconds() -> Self {
        Buckets::new(Width::Micros(1_000_000), None, None, (0, 0)).expect("a second is a width").into()
    }

    /// The argument of such a function that is the event time.
    pub(crate) fn time(function: &ScalarFunction) -> Option<&Expr> {
        function.args.get(1)
    }

    /// Whether a row may lie in more than one window.
    pub(crate) fn hops(&self) -> bool {
        self.0.hops > 1
    }

    /// Its slots, as windows: what stands in the stream of a view at the time that its window begins.
    pub(crate) fn slots(&self) -> Self {
        Self(Windows { hops: 1, ..self.0.clone() })
    }

    /// The slot of this instant. Instants that none holds, beyond all dates, stand for themselves.
    pub(crate) fn slot(&mut self, at: i64) -> (i64, i64) {
        let start = self.0.buckets.start(at).unwrap_or(at);
        (start, self.next(start))
    }

    fn next(&mut self, start: i64) -> i64 {
        self.0.buckets.next(start).unwrap_or(i64::MAX)
    }

    /// The slots of all windows that hold one of these instants, the last included.
    pub(crate) fn touched(&mut self, first: i64, last: i64) -> (i64, i64) {
        (self.0.holding(first).map_or(first, |(first, _)| first), self.slot(last).1)
    }

    /// Where the window that begins here ends.
    pub(crate) fn until(&mut self, start: i64) -> i64 {
        self.0.end(start).unwrap_or(i64::MAX)
    }

    /// The times of the rows of windows with these whole slots.
    pub(crate) fn rows(&mut self, slots: &Intervals) -> Intervals {
        let mut rows = Intervals::default();
        for (from, to) in slots.iter() {
            let last = (to < i64::MAX).then(|| self.slot(to.saturating_sub(1)).0);
            rows.insert(from, last.map_or(i64::MAX, |last| self.until(last)));
        }
        rows
    }

    /// Windows that begin before this have ended when it is this late.
    pub(crate) fn closing(&mut self, now: i64) -> i64 {
        self.touched(now, now).0
    }

    /// The first `count` slots of a set of whole slots, as a set; a stretch without end counts as one.
    pub(crate) fn first(&mut self, slots: &Intervals, count: usize) -> Intervals {
        let (mut first, mut left) = (Intervals::default(), count.max(1));
        for (from, to) in slots.iter() {
            let mut end = from;
            while left > 0 && end < to {
                end = if end == i64::MIN { to } else { self.next(end).min(to) };
                left -= 1;
            }
            first.insert(from, end);
            if left == 0 {
                break;
            }
        }
        first
    }
}

/// A text or an INTERVAL as microseconds, when it is neither months nor negative: of options such as `lateness`.
pub(crate) fn span_us(text: &str) -> Option<i64> {
    let parts = time_bucket::interval(&ScalarValue::Utf8(Some(text.to_owned())))?;
    match Width::new(parts.months, parts.days, parts.nanoseconds) {
        Some(Width::Micros(us)) => Some(us),
        Some(Width::Months(_)) => None,
        None => (parts.months == 0 && parts.days == 0 && parts.nanoseconds == 0).then_some(0),
    }
}
