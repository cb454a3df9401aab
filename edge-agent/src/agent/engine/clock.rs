//! What the engine does while it is not known what time it is: it looks ahead for who says it, and lets nothing age.
//!
//! Ages go by what the pipeline was told, so that a step of the clock and what undoes it in ages come together.

use segment_log::ReadError;

use super::{ENTRIES_PER_TURN, Engine, EngineError};
use crate::entry::Entry;

impl Engine {
    /// Nothing is too old by a clock that may be wrong.
    pub(super) fn drop_aged(&mut self) -> Result<bool, EngineError> {
        let parts = &mut self.parts;
        let told = parts.pipeline.told();
        match parts.journal.clock().told_us(told) {
            Some(now_us) => Ok(parts.spool.drop_aged(now_us, told.steps())?),
            None => Ok(false),
        }
    }

    /// Looks ahead in the journal for what time it was; None when it is found, else whether there may be more to look at.
    pub(super) fn find_clock(&mut self) -> Result<Option<bool>, EngineError> {
        let parts = &mut self.parts;
        if self.ahead.is_none() {
            self.ahead = Some(parts.journal.reader(parts.pipeline.position())?);
        }
        let Some(ahead) = &mut self.ahead else { return Ok(Some(true)) };
        for _ in 0..ENTRIES_PER_TURN {
            match ahead.next() {
                Ok(Some(record)) => {
                    let resolved =
                        Entry::read_clock(record.payload).is_some_and(|mark| parts.pipeline.resolve_clock(&mark));
                    if resolved {
                        self.ahead = None;
                        return Ok(None);
                    }
                }
                Ok(None) => return Ok(Some(false)),
                // The pipeline reports it when it comes there.
                Err(ReadError::Damaged { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Some(true))
    }

    /// The time for what is sealed now; the spool knows whether it is right.
    pub(super) fn tell_spool(&mut self) -> i64 {
        let parts = &mut self.parts;
        let clock = parts.journal.clock();
        let known_us = clock.told_us(parts.pipeline.told());
        parts.spool.know_clock(known_us.is_some());
        known_us.unwrap_or_else(|| clock.best_us())
    }
}
