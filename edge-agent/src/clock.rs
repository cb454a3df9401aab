//! What time it is when the machine's clock may be wrong (rule 10, decision 0007).
//!
//! Arrivals carry a time of the agent's own ([`Clock::now_us`]): the monotonic clock and a number that is fixed for the boot, so
//! that it never steps, whatever is done to the machine's clock. How far that is from the truth is an entry of the journal, a
//! [`Mark`]: at the start, and whenever it is known anew. Until it is known ([`Trust`]) the pipeline reads no further than the
//! mark that says so, at most for `wait`; then all that came is corrected by what came to be known. So what the pipeline does
//! depends on the journal alone.
//!
//! The machine's clock is believed when the kernel calls it synchronised, or when it agrees with what the cloud answers
//! (`clock/cloud.rs`); when it does not agree, the cloud's time is. It is never set from here. `clock/keeper.rs` decides, and
//! is pure; the marks are followed by [`Told`]. One task looks once a second ([`keep`]), and ends by its token.

mod cloud;
mod keeper;
mod machine;
#[cfg(test)]
pub(crate) mod tests;
mod told;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use self::cloud::CloudTime;
use self::keeper::Keeper;
pub use self::machine::Machine;
pub use self::told::{Step, Told};
use crate::config::ClockSettings;
use crate::entry::Entry;
use crate::journal::Journal;

/// A distance of clocks in words: "63.0 s ahead", or "behind".
pub fn ahead(seconds: f64) -> String {
    format!("{:.1} s {}", seconds.abs(), if seconds < 0.0 { "behind" } else { "ahead" })
}

/// No machine that runs this stands before 2024.
pub const EARLIEST_US: i64 = 1_704_067_200_000_000;
/// How often the machine's clock is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A boot of the machine.
pub type BootId = [u8; 16];

/// Who says what time it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Trust {
    /// Nobody yet: it is waited for.
    Waiting = 0,
    /// Nobody, and it was waited long enough.
    Nobody = 1,
    /// The kernel calls the machine's clock synchronised.
    Ntp = 2,
    /// The cloud's answers.
    Cloud = 3,
    /// The configuration: whatever the machine's clock says.
    Always = 4,
}

impl Trust {
    /// As written in the journal.
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::Waiting, Self::Nobody, Self::Ntp, Self::Cloud, Self::Always]
            .into_iter()
            .find(|trust| *trust as u8 == byte)
    }

    /// Whether the time is known.
    pub fn is_known(self) -> bool {
        !matches!(self, Self::Waiting | Self::Nobody)
    }
}

/// What an entry of the journal says of the clock: from here on, in this boot, `correction_us` is to be added to arrivals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    pub boot: BootId,
    /// Since the boot.
    pub monotonic_us: i64,
    /// What an arrival at this moment carries.
    pub arrival_us: i64,
    pub correction_us: i64,
    /// The corrected time is at most so far off, when it is known.
    pub error_us: i64,
    pub trust: Trust,
}

impl Mark {
    /// From the monotonic time to what arrivals carry.
    fn base_us(&self) -> i64 {
        self.arrival_us.saturating_sub(self.monotonic_us)
    }

    /// From the monotonic time to the corrected one.
    fn offset_us(&self) -> i64 {
        self.base_us().saturating_add(self.correction_us)
    }
}

/// What a machine says of the time.
pub trait Time: Debug + Send + Sync {
    /// Since the boot, also while the machine slept.
    fn monotonic_us(&self) -> i64;
    /// µs since 1970 UTC.
    fn wall_us(&self) -> i64;
    /// None when it does not say.
    fn is_synchronised(&self) -> Option<bool>;
    fn boot(&self) -> BootId;
}

/// One look at a machine.
#[derive(Debug, Clone, Copy)]
struct Look {
    monotonic_us: i64,
    wall_us: i64,
    is_synchronised: bool,
}

impl Look {
    fn at(time: &dyn Time) -> Self {
        let is_synchronised = time.is_synchronised() == Some(true);
        Self { monotonic_us: time.monotonic_us(), wall_us: time.wall_us(), is_synchronised }
    }

    /// From the monotonic time to the machine's.
    fn offset_us(&self) -> i64 {
        self.wall_us.saturating_sub(self.monotonic_us)
    }
}

/// The agent's clock. See the module's documentation.
#[derive(Debug)]
pub struct Clock {
    time: Box<dyn Time>,
    /// What arrivals carry is the monotonic time and this.
    base_us: i64,
    state: Mutex<State>,
    /// The cloud said the time, which nobody had said before.
    heard: Notify,
}

#[derive(Debug)]
struct State {
    keeper: Keeper,
    cloud: CloudTime,
    /// The machine's clock was told to be off.
    is_off: bool,
}

/// What the agent tells of the clock.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ClockStatus {
    /// Who says what time it is; None while nobody does.
    pub by: Option<Trust>,
    /// While it is waited for: how much longer at most.
    pub waits_s: Option<f64>,
    /// By which the agent goes, µs since 1970 UTC.
    pub time_us: i64,
    /// How far the machine's clock is ahead of the one by which the agent goes.
    pub machine_ahead_s: f64,
    /// How far the machine's clock is ahead of the cloud's, and at most how wrong that is; None before the first answer.
    pub skew_s: Option<f64>,
    pub skew_error_s: Option<f64>,
    /// Whether that is more than `max_skew`.
    pub is_off: bool,
    /// How often the time was known anew since the start.
    pub steps: u64,
}

impl Default for Clock {
    /// The machine's, as it is.
    fn default() -> Self {
        let settings = ClockSettings { trust: crate::config::TrustSettings::Always, ..ClockSettings::default() };
        Self::begin(Box::new(Machine::new()), settings, &Told::default()).0
    }
}

impl Clock {
    /// A run begins behind a journal that has told this; also returns what the journal must be told before all else.
    pub fn begin(time: Box<dyn Time>, settings: ClockSettings, told: &Told) -> (Self, Mark) {
        let (keeper, mark) = Keeper::begin(settings, time.boot(), Look::at(&*time), told);
        let state = Mutex::new(State { keeper, cloud: CloudTime::default(), is_off: false });
        (Self { time, base_us: mark.base_us(), state, heard: Notify::new() }, mark)
    }

    /// What an arrival carries now.
    pub fn now_us(&self) -> i64 {
        self.time.monotonic_us().saturating_add(self.base_us)
    }

    /// For [`Clock::heard`].
    pub fn monotonic_us(&self) -> i64 {
        self.time.monotonic_us()
    }

    /// The time as far as it is known.
    pub fn best_us(&self) -> i64 {
        self.time.monotonic_us().saturating_add(self.state.lock().keeper.offset_us())
    }

    /// The time that a journal has told; None when it has told none that is known.
    pub fn told_us(&self, told: &Told) -> Option<i64> {
        told.known_us(self.time.boot(), self.time.monotonic_us())
    }

    /// An answer of the cloud has this date (s since 1970 UTC); it was asked and had answered at these monotonic times.
    pub fn heard(&self, date_s: i64, asked_us: i64, answered_us: i64) {
        let mut state = self.state.lock();
        state.cloud.heard(date_s, asked_us, answered_us);
        if !state.keeper.trust().is_known() {
            self.heard.notify_one();
        }
    }

    /// Other settings.
    pub fn change(&self, settings: ClockSettings) {
        self.state.lock().keeper.settings = settings;
    }

    /// What is new of the time; it counts when it is journalled.
    pub fn look(&self) -> Option<Mark> {
        let look = Look::at(&*self.time);
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let heard = state.cloud.offset_us(look.monotonic_us);
        if let Some((cloud_us, error_us)) = heard {
            let ahead_us = look.offset_us().saturating_sub(cloud_us);
            let is_off = ahead_us.saturating_abs().saturating_sub(error_us) > state.keeper.settings.max_skew.micros();
            if std::mem::replace(&mut state.is_off, is_off) != is_off {
                let ahead_s = seconds(ahead_us);
                if is_off {
                    tracing::warn!(
                        ahead_s,
                        "the machine's clock is not the cloud's: start NTP (timedatectl set-ntp true)"
                    );
                } else {
                    tracing::info!(ahead_s, "the machine's clock agrees with the cloud's again");
                }
            }
        }
        let mark = state.keeper.look(look, heard);
        if let Some(mark) = &mark {
            tracing::info!(trust = ?mark.trust, correction_s = seconds(mark.correction_us), "the time is known anew");
        }
        mark
    }

    /// What is known now.
    pub fn status(&self) -> ClockStatus {
        let look = Look::at(&*self.time);
        let state = self.state.lock();
        let keeper = &state.keeper;
        let heard = state.cloud.offset_us(look.monotonic_us);
        ClockStatus {
            by: keeper.trust().is_known().then_some(keeper.trust()),
            waits_s: keeper.waits_us(look.monotonic_us).map(seconds),
            time_us: look.monotonic_us.saturating_add(keeper.offset_us()),
            machine_ahead_s: seconds(look.offset_us().saturating_sub(keeper.offset_us())),
            skew_s: heard.map(|(cloud_us, _)| seconds(look.offset_us().saturating_sub(cloud_us))),
            skew_error_s: heard.map(|(_, error_us)| seconds(error_us)),
            is_off: state.is_off,
            steps: keeper.steps,
        }
    }
}

fn seconds(us: i64) -> f64 {
    (us / 1_000) as f64 / 1e3
}

/// Looks at the machine's clock and tells the journal what is new, until the token is cancelled.
pub async fn keep(journal: Arc<Journal>, token: CancellationToken) {
    let clock = Arc::clone(journal.clock());
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            _ = looks.tick() => {}
            () = clock.heard.notified() => {}
            () = token.cancelled() => return,
        }
        if let Some(mark) = clock.look() {
            journal.tell(&Entry::Clock(mark));
        }
    }
}
