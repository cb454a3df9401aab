//! Who waits when memory or log are full: readings first, then views, alerts last (decision 0019).

use serde::Deserialize;
use wire::BATCH_DECODED_BYTES_MAX;

use super::Settings;
use crate::class::{ByClass, Class};

/// Changes of alerts are written at once up to so much text.
const ALERTS_BYTES_MIN: usize = 8 << 20;
/// A batch of readings with where its rows come from.
const READINGS_BYTES_MIN: usize = BATCH_DECODED_BYTES_MAX + (16 << 20);
/// Not more than this part is kept for those before.
const KEPT_MAX: f64 = 0.5;

/// What is kept for those who go before readings.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PressureSettings {
    /// Parts of `hot.max_bytes`, of what may wait in the log for a commit, and of `query.max_bytes`.
    pub alerts: f64,
    pub views: f64,
    /// Requests that wait for the log; those of readings are `limits.requests_waiting`.
    pub alerts_waiting: usize,
    pub views_waiting: usize,
}

impl Default for PressureSettings {
    fn default() -> Self {
        Self { alerts: 0.0625, views: 0.125, alerts_waiting: 16, views_waiting: 64 }
    }
}

impl PressureSettings {
    /// The part that is kept for each class.
    pub(crate) fn kept(&self) -> ByClass<f64> {
        ByClass::new(|class| match class {
            Class::Alerts => self.alerts,
            Class::Views => self.views,
            Class::Readings => 0.0,
        })
    }

    pub(super) fn check(&self, all: &Settings) -> Result<(), String> {
        for (key, part) in [("alerts", self.alerts), ("views", self.views)] {
            if !(0.0..=KEPT_MAX).contains(&part) {
                return Err(format!("[pressure] {key} must be from 0 to {KEPT_MAX}: a part of the whole"));
            }
        }
        if self.alerts + self.views > KEPT_MAX {
            return Err(format!(
                "[pressure] alerts and views together must be at most {KEPT_MAX}: the rest is for readings"
            ));
        }
        if self.alerts_waiting == 0 || self.views_waiting == 0 {
            return Err("[pressure] alerts_waiting and views_waiting must be at least 1".to_owned());
        }
        let hot = all.hot.max_bytes.bytes();
        let part = |part: f64| (hot as f64 * part) as usize;
        if part(self.alerts) < ALERTS_BYTES_MIN {
            return Err(format!(
                "[pressure] alerts is less than 8MiB of hot.max_bytes, as much as changes of alerts may have that are written at once: set it to \
                 {:.4} at least, or more hot.max_bytes",
                ALERTS_BYTES_MIN as f64 / hot as f64
            ));
        }
        if hot - part(self.alerts + self.views) < READINGS_BYTES_MIN {
            return Err(
                "[pressure] alerts and views leave less than 80MiB of hot.max_bytes, and a batch of readings may \
                        have as much: lower them, or set more hot.max_bytes"
                    .to_owned(),
            );
        }
        Ok(())
    }
}
