//! What the ledger knows in all, on disk: a log of its own, `data_dir/ledger`.
//!
//! It is written before the WAL is freed and at a clean stop; after a crash what the WAL still has is counted again, as far as
//! it is newer. So each batch counts once, unless the disk was full or is damaged: then fewer are told, and nothing else
//! depends on it. When it has grown by several times what it holds, it is written anew and the old part is freed.
//! ```text
//! record, kind 1: an entry as JSON; the last of a (stream, spool) counts
//! ```

use std::path::Path;

use segment_log::{AppendError, FileLayer, FreeError, OpenError, Options, Position, ReadError, SegmentLog, SyncError};

use super::{ENTRIES_MAX, Entry, Ledger};

const KIND_ENTRY: u8 = 1;
const OPTIONS: Options = Options { segment_bytes: 128 << 10, max_bytes: 64 << 20, reserve_bytes: 4 << 10 };
/// It is written anew when it is so many times as long as what it holds, and so long at least.
const GROWTH: u64 = 4;
const LONG_BYTES: u64 = 512 << 10;

/// Why it cannot be read at the start.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    #[error("open the log of what came from whom")]
    Open(#[from] OpenError),
    #[error("read the log of what came from whom")]
    Read(#[from] ReadError),
}

/// Why it cannot be written. Final: the process has to stop.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error("append to the log of what came from whom")]
    Append(#[source] AppendError),
    #[error(transparent)]
    Sync(#[from] SyncError),
    #[error(transparent)]
    Free(#[from] FreeError),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Kept<L: FileLayer> {
    log: SegmentLog<L>,
    /// What it took to write all that there was, bytes.
    whole_bytes: u64,
}

impl<L: FileLayer> Kept<L> {
    /// Opens the log in a directory, or makes it there, and tells the ledger what it has.
    pub(crate) fn open(layer: L, directory: &Path, ledger: &Ledger) -> Result<Self, KeptError> {
        let (log, opening) = SegmentLog::open(layer, directory, OPTIONS)?;
        for incident in &opening.incidents {
            tracing::error!(?incident, "the log of the ledger is damaged: fewer rows are told than were taken");
        }
        let mut known = ledger.known.lock();
        let mut reader = log.reader(log.start())?;
        loop {
            match reader.next() {
                Ok(None) => break,
                Ok(Some(record)) if record.kind == KIND_ENTRY => {
                    match serde_json::from_slice::<Entry>(record.payload) {
                        Ok(entry) => {
                            let key = (entry.stream.clone(), entry.spool);
                            if known.in_all.len() < ENTRIES_MAX || known.in_all.contains_key(&key) {
                                known.in_all.insert(key, entry);
                            }
                        }
                        Err(error) => tracing::error!(%error, "a record of the ledger is no entry"),
                    }
                }
                Ok(Some(_)) => {}
                Err(error @ ReadError::Damaged { .. }) => {
                    tracing::error!(%error, "fewer rows are told than were taken")
                }
                Err(error) => return Err(error.into()),
            }
        }
        drop(known);
        let whole_bytes = log.end().0 - log.start().0;
        Ok(Self { log, whole_bytes })
    }

    /// Makes durable what the ledger has learnt. To be called before the WAL is freed.
    pub(crate) fn save(&mut self, ledger: &Ledger) -> Result<(), SaveError> {
        let mut known = ledger.known.lock();
        let changed = std::mem::take(&mut known.changed);
        if changed.is_empty() {
            return Ok(());
        }
        let begin = self.log.end();
        let is_long = begin.0 - self.log.start().0 > LONG_BYTES.max(GROWTH * self.whole_bytes);
        let entries: Vec<Entry> = if is_long {
            known.in_all.values().cloned().collect()
        } else {
            changed.iter().filter_map(|key| known.in_all.get(key).cloned()).collect()
        };
        drop(known);
        if !self.append(&entries)? {
            return Ok(());
        }
        self.log.sync()?;
        if is_long {
            self.free_before(begin)?;
        }
        Ok(())
    }

    /// Nothing comes any more.
    pub(crate) fn mark(&mut self) -> Result<(), SaveError> {
        Ok(self.log.mark()?)
    }

    /// False when there is no room.
    fn append(&mut self, entries: &[Entry]) -> Result<bool, SaveError> {
        for entry in entries {
            let text = serde_json::to_vec(entry).expect("an entry is plain text and numbers");
            match self.log.append(KIND_ENTRY, &text) {
                Ok(_) => {}
                Err(AppendError::Full) => {
                    tracing::warn!("the disk is full: what came from whom is told until the next start only");
                    return Ok(false);
                }
                Err(error) => return Err(SaveError::Append(error)),
            }
        }
        Ok(true)
    }

    fn free_before(&mut self, begin: Position) -> Result<(), SaveError> {
        self.whole_bytes = self.log.end().0 - begin.0;
        self.log.free_before(begin)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{ArrayRef, RecordBatch, StringArray, TimestampMicrosecondArray};
    use segment_log::sim::SimLayer;
    use wire::sealed::NO_WATERMARK;
    use wire::{CutBatch, Seq, SpoolId, StreamSchema, TS_MIN_US};

    use super::*;
    use crate::store::tests::sim_machine;

    fn open(layer: &SimLayer) -> (Kept<SimLayer>, Ledger) {
        let ledger = Ledger::default();
        (Kept::open(layer.clone(), Path::new("/ledger"), &ledger).unwrap(), ledger)
    }

    /// The header of a batch of one row.
    fn header(spool: u8, seq: u64) -> wire::sealed::BatchHeader {
        let schema = StreamSchema::new(Vec::new()).unwrap();
        let columns: Vec<ArrayRef> = vec![
            Arc::new(TimestampMicrosecondArray::from(vec![TS_MIN_US]).with_timezone("UTC")),
            Arc::new(StringArray::from(vec!["d"])),
            Arc::new(StringArray::from(vec!["good"])),
        ];
        let rows = RecordBatch::try_new(schema.arrow().clone(), columns).unwrap();
        let cut = CutBatch::seal("load".parse().unwrap(), &schema, &rows, NO_WATERMARK, "agent", 3).unwrap();
        cut.number(&"gw".parse().unwrap(), SpoolId([spool; 16]), Seq(seq), 0).header().clone()
    }

    #[test]
    fn what_came_is_known_after_a_restart_and_counts_once() {
        let layer = sim_machine();
        let (mut kept, ledger) = open(&layer);
        for seq in 1..=10 {
            ledger.take(&header(1, seq), seq as i64);
        }
        kept.save(&ledger).unwrap();
        // Not saved: it is in the WAL still, with some of before.
        ledger.take(&header(1, 11), 11);
        drop(kept);
        let (mut kept, ledger) = open(&layer);
        assert_eq!((ledger.entries()[0].batches, ledger.entries()[0].received_at_us), (10, 10));
        assert!(ledger.entries_of(&"load".parse().unwrap()).is_empty(), "nothing was heard since the start");
        ledger.recall(&header(1, 9), 9);
        ledger.take(&header(1, 10), 10);
        ledger.take(&header(1, 11), 11);
        let [entry] = &ledger.entries()[..] else { panic!("{:?}", ledger.entries()) };
        assert_eq!((entry.batches, entry.durable, entry.received_at_us), (11, Seq(11), 11));
        assert_eq!(ledger.entries_of(&"load".parse().unwrap())[0].batches, 2);
        kept.save(&ledger).unwrap();
        assert_eq!(open_again(kept, &layer).entries()[0].batches, 11);
    }

    fn open_again(kept: Kept<SimLayer>, layer: &SimLayer) -> Ledger {
        drop(kept);
        open(layer).1
    }

    #[test]
    fn the_disk_has_a_bound_however_often_it_is_saved() {
        let layer = sim_machine();
        let (mut kept, ledger) = open(&layer);
        for seq in 1..=3_000 {
            for spool in 0..5 {
                ledger.take(&header(spool, seq), 0);
            }
            kept.save(&ledger).unwrap();
        }
        assert!(kept.log.bytes_on_disk() <= 2 * LONG_BYTES, "{}", kept.log.bytes_on_disk());
        let entries = open_again(kept, &layer).entries();
        assert_eq!(entries.iter().map(|entry| entry.batches).collect::<Vec<_>>(), [3_000; 5]);
    }
}
