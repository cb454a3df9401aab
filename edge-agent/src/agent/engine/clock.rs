//! What the engine does while it is not known what time it is: it looks ahead for who says it, and lets nothing age.
//!
//! Ages go by what the pipeline was told, so that a step of the clock and what undoes it in ages come together.

use segment_log::{Disk, ReadError, Reader};

use super::{ENTRIES_PER_TURN, Engine, EngineError};
use crate::entry::Entry;
use crate::journal::Journal;
use crate::pipeline::Pipeline;
use crate::spool::Spool;

/// Reads on where a pipeline waits, for what time it was.
#[derive(Debug, Default)]
pub(super) struct ClockAhead(Option<Reader<Disk>>);

impl ClockAhead {
    /// None when it is found, else whether there may be more to look at.
    pub(super) fn find(&mut self, journal: &Journal, pipeline: &mut Pipeline) -> Result<Option<bool>, EngineError> {
        let ahead = match &mut self.0 {
            Some(ahead) => ahead,
            none => none.insert(journal.reader(pipeline.position())?),
        };
        for _ in 0..ENTRIES_PER_TURN {
            match ahead.next() {
                Ok(Some(record)) => {
                    if Entry::read_clock(record.payload).is_some_and(|mark| pipeline.resolve_clock(&mark)) {
                        self.0 = None;
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
}

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
}

/// The time for what is sealed now; the spool knows whether it is right.
pub(super) fn tell_spool(spool: &mut Spool<Disk>, journal: &Journal, pipeline: &Pipeline) -> i64 {
    let clock = journal.clock();
    let known_us = clock.told_us(pipeline.told());
    spool.know_clock(known_us.is_some());
    known_us.unwrap_or_else(|| clock.best_us())
}
