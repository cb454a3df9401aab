//! Whether an errand goes on: each step of it is a beat, and one without a beat for too long is given up.
//!
//! How long an errand takes says nothing: a merge of a gigabyte takes minutes, a store that hangs takes for ever. It is
//! given up by being dropped, so it has to be one that may be dropped at any moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Steps of errands, counted. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Pulse(Arc<AtomicU64>);

/// The errand was given up.
#[derive(Debug, thiserror::Error)]
#[error("nothing was heard of it for {0:?}: it is given up")]
pub(super) struct Silent(pub(super) Duration);

impl Pulse {
    /// The errand has done something.
    pub(super) fn beat(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// What comes of an errand, unless there is no beat for `patience`, at most twice as long.
    ///
    /// # Errors
    /// Those of the errand, and [`Silent`].
    pub(super) async fn heard<T, E: From<Silent>>(
        &self,
        patience: Duration,
        errand: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let mut errand = std::pin::pin!(errand);
        let mut beats = self.0.load(Ordering::Relaxed);
        loop {
            if let Ok(done) = tokio::time::timeout(patience, &mut errand).await {
                return done;
            }
            let now = self.0.load(Ordering::Relaxed);
            if now == beats {
                return Err(Silent(patience).into());
            }
            beats = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_errand_ends_by_itself_or_when_it_is_silent_for_too_long() {
        let (pulse, patience) = (Pulse::default(), Duration::from_millis(500));
        let slow = async {
            for _ in 0..100 {
                tokio::time::sleep(Duration::from_millis(10)).await;
                pulse.beat();
            }
            Ok::<_, Box<dyn std::error::Error>>(7)
        };
        assert_eq!(pulse.heard(patience, slow).await.unwrap(), 7);
        let stuck = async {
            pulse.beat();
            std::future::pending::<Result<(), Box<dyn std::error::Error>>>().await
        };
        let error = pulse.heard(patience, stuck).await.unwrap_err();
        assert!(error.to_string().contains("given up"), "{error}");
    }
}
