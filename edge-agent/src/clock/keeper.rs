//! Decides what time it is. Pure: a look at the machine, and what the cloud's answers say, are arguments.
//!
//! What was known once in a boot stays known: the monotonic clock goes on. So a machine's clock that is set while the agent
//! runs counts only when NTP or the cloud say the same; until then the agent counts on.

use super::{BootId, EARLIEST_US, Look, Mark, Told, Trust};
use crate::config::{ClockSettings, TrustSettings};

/// A known time that differs from what was known by less is the same.
const SAME_US: i64 = 250_000;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Keeper {
    pub(super) settings: ClockSettings,
    boot: BootId,
    base_us: i64,
    /// From the monotonic time to the true one, as far as it is known.
    offset_us: i64,
    error_us: i64,
    trust: Trust,
    /// Since when it is waited for, by the monotonic clock.
    since_us: i64,
    /// A machine's clock that stands before this is wrong: so late it was already.
    floor_us: i64,
    /// From the monotonic time to that, at the start.
    floor_offset_us: i64,
    pub(super) steps: u64,
}

impl Keeper {
    /// For a run that begins in this boot, behind a journal that has told this.
    pub(super) fn begin(settings: ClockSettings, boot: BootId, look: Look, told: &Told) -> (Self, Mark) {
        let same = told.last().filter(|last| last.boot == boot);
        let floor_us = told.latest_us().max(EARLIEST_US);
        let mut keeper = Self {
            settings,
            boot,
            // With the base of the run before its last mark is right here, too, when there is no room for another.
            base_us: same.map_or(look.offset_us(), Mark::base_us),
            offset_us: 0,
            error_us: 0,
            trust: same.map_or(Trust::Waiting, |last| last.trust),
            since_us: same.map_or(look.monotonic_us, |_| told.since_us()),
            floor_us,
            floor_offset_us: floor_us.saturating_sub(look.monotonic_us),
            steps: 0,
        };
        keeper.offset_us = same.map_or_else(|| keeper.guess(look), Mark::offset_us);
        keeper.error_us = same.map_or(0, |last| last.error_us);
        let mark = keeper.look(look, None).unwrap_or_else(|| keeper.mark(look));
        keeper.steps = 0;
        (keeper, mark)
    }

    pub(super) fn trust(&self) -> Trust {
        self.trust
    }

    pub(super) fn offset_us(&self) -> i64 {
        self.offset_us
    }

    /// How much longer it is waited; None when it is not.
    pub(super) fn waits_us(&self, monotonic_us: i64) -> Option<i64> {
        let waited = monotonic_us.saturating_sub(self.since_us);
        (self.trust == Trust::Waiting).then(|| self.settings.wait.micros().saturating_sub(waited).max(0))
    }

    /// What is new. `cloud`: from the monotonic time to the cloud's, and at most how wrong that is.
    pub(super) fn look(&mut self, look: Look, cloud: Option<(i64, i64)>) -> Option<Mark> {
        let (offset_us, error_us, trust, same_us) = match self.known(look, cloud) {
            Some(known) => known,
            None if self.trust.is_known() => return None,
            None if self.waits_us(look.monotonic_us).is_some_and(|left| left > 0) => return None,
            // Also when the machine's clock was set since, by whomever.
            None => (self.guess(look), 0, Trust::Nobody, SAME_US),
        };
        let differs = offset_us.saturating_sub(self.offset_us).saturating_abs() > same_us;
        if self.trust.is_known() == trust.is_known() && self.trust != Trust::Waiting && !differs {
            // Not told: it says the same.
            self.trust = trust;
            return None;
        }
        (self.offset_us, self.error_us, self.trust) = (offset_us, error_us, trust);
        self.steps += 1;
        Some(self.mark(look))
    }

    /// What somebody says who is asked: the offset, its error, who, and what of it may differ without being news.
    fn known(&self, look: Look, cloud: Option<(i64, i64)>) -> Option<(i64, i64, Trust, i64)> {
        let asked = self.settings.trust;
        let (machine_us, skew_us) = (look.offset_us(), self.settings.max_skew.micros());
        if asked == TrustSettings::Always {
            return Some((machine_us, 0, Trust::Always, SAME_US));
        }
        let possible = look.wall_us >= EARLIEST_US;
        if possible && look.is_synchronised && asked != TrustSettings::Cloud {
            return Some((machine_us, 0, Trust::Ntp, SAME_US));
        }
        let (cloud_us, error_us) = cloud.filter(|_| asked != TrustSettings::Ntp)?;
        let apart_us = machine_us.saturating_sub(cloud_us).saturating_abs();
        if possible && apart_us.saturating_sub(error_us) <= skew_us {
            // It agrees, and goes on more smoothly than dates of whole seconds.
            return Some((machine_us, skew_us.saturating_add(error_us), Trust::Cloud, SAME_US));
        }
        Some((cloud_us, error_us, Trust::Cloud, skew_us.saturating_add(error_us)))
    }

    /// Without anybody: the machine's clock, when it may be right; else it goes on from the last time that was known.
    fn guess(&self, look: Look) -> i64 {
        if look.wall_us >= self.floor_us.saturating_sub(self.settings.max_skew.micros()).max(EARLIEST_US) {
            look.offset_us()
        } else {
            self.floor_offset_us
        }
    }

    fn mark(&self, look: Look) -> Mark {
        Mark {
            boot: self.boot,
            monotonic_us: look.monotonic_us,
            arrival_us: look.monotonic_us.saturating_add(self.base_us),
            correction_us: self.offset_us.saturating_sub(self.base_us),
            error_us: self.error_us,
            trust: self.trust,
        }
    }
}
