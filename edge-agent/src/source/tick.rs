//! The time as entries of the journal, so that what the pipeline does while nothing comes depends on the journal alone.
//!
//! Only when the configuration has something that goes by it (`expected_every`, `duplicates = "last"`), and seldom. A full
//! journal gets none: then what the pipeline waits for waits, too.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::entry::Entry;
use crate::journal::{JournalSender, TryAppendError};

/// Writes until the token is cancelled or the journal has ended.
pub async fn run(every: Duration, mut journal: JournalSender, token: CancellationToken) {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = token.cancelled() => return,
        }
        match journal.try_append(&Entry::Tick { now_us: journal.now_us() }) {
            Ok(_) | Err(TryAppendError::Full) => {}
            Err(TryAppendError::Closed(_)) => return,
        }
    }
}
