//! For sources that cannot wait: what comes while the journal is full is counted, and told to it when it has room, at the
//! latest when the source stops ([`Entry::Missed`]). A kill, or a journal that has no room at the stop either, loses the
//! count.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;

use super::SourceState;
use crate::entry::{Entry, Message, Payload};
use crate::journal::{Closed, JournalSender, TryAppendError};

/// How long a stop waits for the journal to take what was missed.
const MISSED_WITHIN: Duration = Duration::from_secs(2);

/// Messages that the journal had no room for.
#[derive(Debug)]
struct Count {
    messages: u64,
    bytes: u64,
    first_us: i64,
    last_us: i64,
}

/// Gives messages to the journal, now or never.
#[derive(Debug)]
pub(super) struct Giver {
    source: String,
    journal: JournalSender,
    missed: Option<Count>,
}

impl Giver {
    pub(super) fn new(source: String, journal: JournalSender) -> Self {
        Self { source, journal, missed: None }
    }

    /// Gives a message that has just come, or counts it.
    pub(super) fn give(&mut self, payload: Bytes, state: &SourceState) -> Result<(), Closed> {
        let (arrival_us, bytes) = (self.journal.now_us(), payload.len() as u64);
        if let Some(count) = &self.missed {
            match self.journal.try_append(&count.entry(&self.source)) {
                Ok(_) => {
                    self.missed = None;
                    *state.last_error.lock() = None;
                }
                Err(TryAppendError::Full) => {}
                Err(TryAppendError::Closed(closed)) => return Err(closed),
            }
        }
        let entry = Entry::Message(Message {
            source: self.source.clone(),
            topic: String::new(),
            payload: Payload::Whole(payload),
            arrival_us,
            delivery: None,
        });
        match self.journal.try_append(&entry) {
            Ok(_) => {
                state.received.fetch_add(1, Ordering::Relaxed);
                state.last_arrival_us.store(arrival_us, Ordering::Relaxed);
            }
            Err(TryAppendError::Full) => {
                let none = Count { messages: 0, bytes: 0, first_us: arrival_us, last_us: 0 };
                let count = self.missed.get_or_insert(none);
                count.messages += 1;
                count.bytes += bytes;
                count.last_us = arrival_us;
                state.error("the journal is full: readings are counted and not kept".to_owned());
            }
            Err(TryAppendError::Closed(closed)) => return Err(closed),
        }
        Ok(())
    }

    /// At the stop: tells what was missed.
    pub(super) async fn finish(mut self) {
        let Some(count) = self.missed.take() else { return };
        let entry = count.entry(&self.source);
        // The journal may have room by now, or get it: the pipeline still reads.
        let told = tokio::time::timeout(MISSED_WITHIN, async {
            let ticket = self.journal.append(&entry).await.ok()?;
            self.journal.durable().wait_for(|durable| *durable >= ticket).await.ok().map(|_| ())
        });
        if told.await != Ok(Some(())) {
            tracing::warn!(source = self.source, ?count, "the journal has no room: this count is lost");
        }
    }
}

impl Count {
    fn entry(&self, source: &str) -> Entry {
        let Self { messages, bytes, first_us, last_us } = *self;
        Entry::Missed { source: source.to_owned(), messages, bytes, first_us, last_us }
    }
}
