//! `[clock]`: when the machine's clock is believed, and what becomes of what comes before that.

use serde::Deserialize;
use wire::written::Span;

/// See `clock.rs`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClockSettings {
    pub trust: TrustSettings,
    /// How long what comes waits in the journal for a time that is known; 0 waits for none.
    pub wait: Span,
    pub on_untrusted: OnUntrusted,
    /// The machine's clock and the cloud's agree when they are not further apart.
    pub max_skew: Span,
}

impl Default for ClockSettings {
    fn default() -> Self {
        let seconds = |seconds| Span(std::time::Duration::from_secs(seconds));
        Self {
            trust: TrustSettings::default(),
            wait: seconds(30),
            on_untrusted: OnUntrusted::default(),
            max_skew: seconds(5),
        }
    }
}

/// Who says what time it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrustSettings {
    /// Whoever does first.
    #[default]
    Any,
    Ntp,
    Cloud,
    /// The machine, whatever its clock says.
    Always,
}

/// What is said of a reading that is stamped by an arrival whose time was only known later. Its time is corrected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnUntrusted {
    /// Nothing.
    #[default]
    Correct,
    /// Its `quality` is `clock:corrected`.
    Flag,
}

impl ClockSettings {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.wait.0.as_secs() > 86_400 {
            return Err("[clock] wait is at most 1d: the journal holds all that comes until then".to_owned());
        }
        if self.max_skew.0.as_secs() < 1 {
            return Err("[clock] max_skew is at least 1s: the cloud says whole seconds".to_owned());
        }
        Ok(())
    }
}
