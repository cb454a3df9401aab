//! The windows of a view: which expressions make them, and where they begin and end. Pure.
//!
//! `time_bucket(width, ts …)`, `date_bin(width, ts [, origin])` and `date_trunc(part, ts)` of the event time all cut the
//! time line into windows without holes, so one kind of grid serves the three. Those of `HOP` are some buckets long, and one
//! begins with each. Whether the grid and the function agree is looked at in every row that a view gets (`run/windows.rs`).
//!
//! A window is known by its slot: the bucket that it begins with. What a view must ask and has told are sets of slots, each as
//! the stretch of time from its beginning to that of the next. Only [`Grid::touched`], [`Grid::held`], [`Grid::rows`],
//! [`Grid::until`], [`Grid::closing`] and [`Grid::stands`] know that a window may be longer than its slot.
//!
//! The sessions of a `SESSION` begin anywhere. They are known by the moment at which they end: those that end at one moment are
//! a window, and it stands in the slot that holds the moment. So when a slot has gone by all that ended in it has closed, and
//! a row changes nothing that ended before it came.

use datafusion::common::ScalarValue;
use datafusion::logical_expr::Expr;
use datafusion::logical_expr::expr::ScalarFunction;

use super::intervals::Intervals;
use crate::functions::bucket_grid::{Buckets, Width};
use crate::functions::hop::Windows;
use crate::functions::session::Silence;
use crate::functions::time_bucket;

/// Of a gap: how much of it a slot of sessions is, and from where to where. The rows of a slot are read when it has gone by,
/// and sessions are told so much later than they end, at most.
const SLOTS_OF_GAP: i64 = 8;
const SLOT_US: [i64; 2] = [1_000_000, 60_000_000];

/// See the module. Equal grids have equal windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Grid {
    windows: Windows,
    /// What ends sessions, when windows are those.
    silence: Option<Silence>,
}

impl From<Buckets> for Grid {
    fn from(buckets: Buckets) -> Self {
        Self::from(Windows { buckets, hops: 1 })
    }
}

impl From<Windows> for Grid {
    fn from(windows: Windows) -> Self {
        Self { windows, silence: None }
    }
}

impl From<Silence> for Grid {
    fn from(silence: Silence) -> Self {
        let slot = (silence.gap_us / SLOTS_OF_GAP).clamp(SLOT_US[0], SLOT_US[1]);
        let buckets = Buckets::new(Width::Micros(slot), None, None, (0, 0)).expect("a second and more is a width");
        Self { silence: Some(silence), ..Self::from(buckets) }
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

    /// Whether the rows of some windows are rows of others, too.
    pub(crate) fn overlaps(&self) -> bool {
        self.windows.hops > 1 || self.is_sessions()
    }

    /// Whether it has the sessions of a `SESSION`.
    fn is_sessions(&self) -> bool {
        self.silence.is_some()
    }

    /// What ends the sessions that it has.
    pub(crate) fn silence(&self) -> Option<Silence> {
        self.silence
    }

    /// What the rows that a view has told stand in, at the times of its stream: the slots of windows that begin with one. Of
    /// sessions nothing but the time is known.
    pub(crate) fn slots(&self) -> Option<Self> {
        (!self.is_sessions()).then(|| Self::from(self.windows.buckets.clone()))
    }

    /// The slot of this instant. Instants that none holds, beyond all dates, stand for themselves.
    pub(crate) fn slot(&mut self, at: i64) -> (i64, i64) {
        let start = self.windows.buckets.start(at).unwrap_or(at);
        (start, self.next(start))
    }

    fn next(&mut self, start: i64) -> i64 {
        self.windows.buckets.next(start).unwrap_or(i64::MAX)
    }

    /// Whether a window may stand here.
    pub(crate) fn stands(&mut self, at: i64) -> bool {
        self.is_sessions() || self.slot(at).0 == at
    }

    /// The slots of all windows that rows at these instants change, the last included.
    pub(crate) fn touched(&mut self, first: i64, last: i64) -> (i64, i64) {
        match self.silence {
            Some(silence) => {
                // Of all rows of a slot alike.
                let last = self.slot(last).1.saturating_add(silence.reach_us());
                (self.slot(first).0, self.slot(last).1)
            }
            None => (self.windows.holding(first).map_or(first, |(first, _)| first), self.slot(last).1),
        }
    }

    /// The slots of all windows that have rows, when these are the first and the last instant of any.
    pub(crate) fn held(&mut self, first: i64, last: i64) -> (i64, i64) {
        match self.silence {
            Some(silence) => (self.slot(first).0, self.slot(last.saturating_add(silence.gap_us)).1),
            None => self.touched(first, last),
        }
    }

    /// Where the window that begins here ends. Sessions are known by their end.
    pub(crate) fn until(&mut self, start: i64) -> i64 {
        if self.is_sessions() {
            return start;
        }
        self.windows.end(start).unwrap_or(i64::MAX)
    }

    /// The times of the rows of windows with these whole slots.
    pub(crate) fn rows(&mut self, slots: &Intervals) -> Intervals {
        let mut rows = Intervals::default();
        for (from, to) in slots.iter() {
            let (from, to) = match self.silence {
                Some(silence) => silence.rows((from, to)),
                None if to < i64::MAX => {
                    let last = self.slot(to.saturating_sub(1)).0;
                    (from, self.until(last))
                }
                None => (from, to),
            };
            rows.insert(from, to);
        }
        rows
    }

    /// Windows that stand before this have ended when it is this late.
    pub(crate) fn closing(&mut self, now: i64) -> i64 {
        match self.silence {
            Some(_) => self.slot(now).0,
            None => self.touched(now, now).0,
        }
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
