//! What the journal has told of the clock, followed entry by entry: from arrivals to the time. Pure; part of the pipeline's
//! state.
//!
//! Behind a mark that waits nothing may be applied before a later one of the journal resolves it ([`Told::resolves`]): the
//! first that knows the time or gives up, or the first of another boot. A journal without marks goes by its arrivals.

use serde::{Deserialize, Serialize};

use super::{BootId, Mark, Trust};
use crate::entry::Entry;

/// Steps that are remembered; older ones are taken together.
const STEPS_MAX: usize = 16;
/// A shorter one is none that ages are counted by.
const STEP_MIN_US: i64 = 1_000_000;

/// How the time of what is applied came to be known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Known {
    /// It was when it came.
    #[default]
    Then,
    /// It is not, and what comes must wait.
    NotYet,
    /// It was not when it came.
    Later,
    /// It never was.
    Never,
}

/// The known time went forward: so late it was, by so much it went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    pub before_us: i64,
    pub by_us: i64,
}

/// See the module's documentation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    last: Option<Mark>,
    known: Known,
    correction_us: i64,
    /// When it was first waited for in this boot, by the monotonic clock.
    since_us: i64,
    /// Of what came last while it was known.
    latest_us: i64,
    steps: Vec<Step>,
}

impl Told {
    /// Follows an entry; the corrected time of one that has a time.
    pub fn follow(&mut self, entry: &Entry) -> Option<i64> {
        let arrival_us = match entry {
            Entry::Message(message) | Entry::Line { message, .. } => message.arrival_us,
            Entry::Tick { now_us } => *now_us,
            Entry::Clock(mark) => {
                self.mark(*mark);
                return None;
            }
            _ => return None,
        };
        let now_us = self.corrected(arrival_us);
        if matches!(self.known, Known::Then | Known::Later) {
            self.latest_us = now_us;
        }
        Some(now_us)
    }

    /// The time of an arrival.
    pub fn corrected(&self, arrival_us: i64) -> i64 {
        arrival_us.saturating_add(self.correction_us)
    }

    /// Whether nothing behind the last mark may be applied yet.
    pub fn waits(&self) -> bool {
        self.known == Known::NotYet
    }

    /// Whether a later mark of the journal says what is waited for.
    pub fn resolves(&self, later: &Mark) -> bool {
        later.trust != Trust::Waiting || self.last.is_none_or(|last| last.boot != later.boot)
    }

    /// Goes on by what a later mark says.
    pub fn resolve(&mut self, later: &Mark) {
        let Some(last) = self.last.filter(|_| self.waits()) else { return };
        if last.boot != later.boot {
            // What the run guessed itself.
            (self.known, self.correction_us) = (Known::Never, last.correction_us);
            return;
        }
        self.correction_us = later.offset_us().saturating_sub(last.base_us());
        self.known = if later.trust.is_known() { Known::Later } else { Known::Never };
    }

    /// The times that are given out are not known to be right, and never were.
    pub fn is_guess(&self) -> bool {
        self.known == Known::Never
    }

    /// They are right, but were not known when it came.
    pub fn is_afterthought(&self) -> bool {
        self.known == Known::Later
    }

    /// The time at a moment of a boot; None when it is not known, or the newest mark is of another boot.
    pub fn known_us(&self, boot: BootId, monotonic_us: i64) -> Option<i64> {
        let last = self.last.filter(|last| last.boot == boot && last.trust.is_known());
        last.map(|last| monotonic_us.saturating_add(last.offset_us()))
    }

    /// The newest mark.
    pub fn last(&self) -> Option<&Mark> {
        self.last.as_ref()
    }

    /// When something came last while the time was known; 0 before.
    pub fn latest_us(&self) -> i64 {
        self.latest_us
    }

    /// Since when it is waited for in the boot of the last mark, by the monotonic clock.
    pub fn since_us(&self) -> i64 {
        self.since_us
    }

    /// By how much the known time went forward, and when.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    fn mark(&mut self, mark: Mark) {
        let before = self.last.replace(mark).filter(|last| last.boot == mark.boot);
        if let Some(before) = before.filter(|last| last.trust.is_known() && mark.trust.is_known()) {
            let by_us = mark.offset_us().saturating_sub(before.offset_us());
            if by_us >= STEP_MIN_US {
                let before_us = mark.monotonic_us.saturating_add(before.offset_us());
                self.steps.push(Step { before_us, by_us });
            }
            if self.steps.len() > STEPS_MAX {
                // What is older than either seems younger then, never older.
                let oldest = self.steps.remove(0);
                self.steps[0].by_us = self.steps[0].by_us.saturating_add(oldest.by_us);
                self.steps[0].before_us = self.steps[0].before_us.max(oldest.before_us);
            }
        }
        if before.is_none() {
            self.since_us = mark.monotonic_us;
        }
        self.correction_us = mark.correction_us;
        self.known = match mark.trust {
            Trust::Waiting => Known::NotYet,
            Trust::Nobody => Known::Never,
            _ => Known::Then,
        };
    }
}
