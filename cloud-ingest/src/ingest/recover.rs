//! The start: tables are opened, and what the WAL has above their `txn` becomes hot again.
//!
//! It commits as it replays, within the memory of hot. A table that cannot be opened keeps only its own stream from
//! starting. A sequence that was carried stands in the WAL twice, the older copy perhaps without its beginning: what does
//! not follow is skipped, its number comes again further on.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use segment_log::FileLayer;

use super::admit::lacks;
use super::commit::commit_bytes_max;
use super::errand::{self, CommitEnd};
use super::stream::Accepted;
use super::{Ingest, StartError};
use crate::alias;
use crate::errors::chain;
use crate::sequencer::Verdict;
use crate::wal::{Found, Replayed};

impl<L: FileLayer> Ingest<L> {
    pub(super) fn recover(&mut self) -> Result<(), StartError> {
        let started = Instant::now();
        let tables = self.runtime.block_on(errand::list(&self.store, &BTreeSet::new()))?;
        self.adopt_all(tables);
        let mut rows = 0;
        let mut replay = self.wal.replay()?;
        while let Some(found) = replay.next()? {
            match found {
                Found::Batch(replayed) => rows += self.put_back(&replayed)?,
                Found::Damaged(range) => tracing::error!(range, "wal record lost; its edge still holds it"),
            }
        }
        tracing::info!(rows, streams = self.streams.len(), took = ?started.elapsed(), "wal replayed");
        Ok(())
    }

    /// Puts a batch back into hot if it is the next of its sequence; how many rows that were.
    fn put_back(&mut self, replayed: &Replayed) -> Result<u64, StartError> {
        let header = replayed.batch.header();
        let name = &header.stream;
        let fields = if header.void.is_some() { &[] } else { replayed.schema.fields() };
        let fields = alias::fields(self.aliases(name), fields);
        if self.recall(replayed)? {
            return Ok(0);
        }
        let verdict = self.streams.get_mut(name).map(|stream| stream.judge(&replayed.batch));
        match verdict {
            None | Some(Verdict::Accept) => {}
            Some(Verdict::Gap { .. }) if self.is_own(&replayed.batch) => {}
            Some(verdict) => {
                if verdict == Verdict::Duplicate {
                    self.catalogue.ledger().recall(header, replayed.received_at_us);
                }
                return Ok(0);
            }
        }
        let Ok(rows) = replayed.batch.decode(&replayed.schema) else {
            tracing::error!(stream = %name, seq = %header.seq, "a batch of the wal does not decode");
            return Ok(0);
        };
        let known = self.streams.get(name);
        if known.is_none_or(|stream| lacks(&stream.snapshot, &fields)) {
            let table = known.map(|stream| stream.table.clone());
            match self.runtime.block_on(errand::look(&self.store, name, table, &fields)) {
                Ok(table) => self.adopt(name, table),
                // It is not committed, so its edge still holds it; this stream alone is pushed back until its table opens.
                Err(error) => {
                    let held = self.hold(replayed);
                    tracing::error!(stream = %name, seq = %header.seq, held, reason = chain(&error), "left in the wal");
                    return Ok(0);
                }
            }
        }
        self.fill_gap(replayed)?;
        let Some(stream) = self.streams.get_mut(name) else { return Ok(0) };
        if stream.judge(&replayed.batch) != Verdict::Accept {
            return Ok(0);
        }
        let (received_at_us, wal_from) = (replayed.received_at_us, replayed.from);
        self.catalogue.ledger().take(header, received_at_us);
        let (batch, schema) = (&replayed.batch, &replayed.schema);
        let chunk = stream.accept(Accepted { batch, schema, rows: &rows, received_at_us, wal_from });
        stream.hot.push(chunk);
        let large = stream.hot.bytes() > self.settings.commit.max_bytes.bytes();
        if large || self.hot_bytes() > self.settings.hot.max_bytes.bytes() / 2 {
            let largest = self.streams.values().max_by_key(|stream| stream.hot.bytes());
            let name = largest.map_or_else(|| name.clone(), |stream| stream.name.clone());
            self.commit_now(&name)?;
        }
        Ok(u64::from(header.rows))
    }

    fn commit_now(&mut self, name: &wire::StreamName) -> Result<(), StartError> {
        let bytes_max = commit_bytes_max(&self.settings);
        let Some(stream) = self.streams.get_mut(name) else { return Ok(()) };
        let taking = stream.hot.take(self.settings.commit.max_partitions, bytes_max);
        let mut table = stream.table.clone();
        let end = self.runtime.block_on(errand::commit(&mut table, taking));
        stream.apply(table, Duration::ZERO);
        if let CommitEnd::Failed { reason } = end {
            tracing::warn!(stream = %name, reason, "commit not made while recovering; it starts again later");
            if self.hot_bytes() > self.settings.hot.max_bytes.bytes() {
                return Err(StartError::Full { stream: name.clone(), reason });
            }
        }
        Ok(())
    }
}
