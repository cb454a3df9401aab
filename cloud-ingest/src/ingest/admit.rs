//! Admission: what becomes of each batch of a request, and what of it is appended to the WAL.
//!
//! A batch at fault is refused from its bytes alone. One that needs a table, a field, or another look at the log (rule 3:
//! no gap and no fork is answered without) waits for the errand. The others are judged by their sequence, and taken if
//! there is room for them: for readings as long as that leaves what is kept for views and alerts ([`Budget`]), and nobody
//! takes room while someone who goes before waits for it.
//!
//! [`Budget`]: crate::class::Budget

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use arrow_array::RecordBatch;
use segment_log::{AppendError, FileLayer};
use wire::schema::{StreamField, is_cloud_stream};
use wire::{EdgeId, FIELDS_MAX, RefusedRequest, StreamName};

use super::errand::{Subject, Ticket};
use super::request::{Arrived, Outcome, Request};
use super::stream::Accepted;
use super::{Fault, Ingest, RETRY_AFTER_MS};
use crate::alias;
use crate::class::{ByClass, Class};
use crate::delta::TableSnapshot;
use crate::own_names;
use crate::sequencer::Verdict;

/// A stream may have so many times what is free of memory and WAL: alone four fifths of all, one of two that are stuck
/// four ninths.
const SHARE: usize = 4;
/// Of a row in hot: spool, number, arrival and what is rescued, with their offsets.
const PROVENANCE_BYTES: usize = 64;
/// Who finds no room tries again within this time; those behind take none until then.
pub(super) const HUNGRY: Duration = Duration::from_secs(10);

/// Until when those who found no room wait for it.
#[derive(Debug, Default)]
pub(super) struct Hungry {
    until: ByClass<Option<Instant>>,
    told: Option<Instant>,
}

impl Hungry {
    /// Whether someone who goes before this class waits.
    fn before(&self, class: Class, now: Instant) -> bool {
        class.before().any(|before| self.until[before].is_some_and(|until| until > now))
    }

    fn waits(&mut self, class: Class, now: Instant) {
        self.until[class] = Some(now + HUNGRY);
    }

    /// Says so when it is alerts that are pushed back, not each time.
    fn tell(&mut self, class: Class, now: Instant) {
        if class == Class::Alerts && self.told.is_none_or(|told| told + HUNGRY <= now) {
            self.told = Some(now);
            tracing::error!(
                "no room for alerts: what is kept for them in memory or in the write-ahead log is full, because their \
                 tables take no commits"
            );
        }
    }

    fn fed(&mut self, class: Class) {
        self.until[class] = None;
    }
}

impl<L: FileLayer> Ingest<L> {
    /// Takes the batches of a request one after the other; stops at one for which the store must be looked at.
    pub(super) fn admit(
        &mut self,
        request: &mut Request,
        staged: &mut BTreeSet<StreamName>,
    ) -> Result<Option<Ticket>, Fault> {
        while let Some((arrived, looked)) = request.next() {
            let outcome = match self.admit_batch(&arrived, looked, staged)? {
                Outcome::Look(fields) if self.may_park(request.class()) => {
                    let ticket =
                        self.ask(request.class(), Subject::Stream(arrived.batch.header().stream.clone()), &fields);
                    request.put_back(arrived);
                    return Ok(Some(ticket));
                }
                Outcome::Look(_) => pushed_back(&arrived.batch.header().stream),
                other => other,
            };
            request.count(&arrived, outcome);
        }
        Ok(None)
    }

    /// `looked` says how the look ended that this batch waited for.
    fn admit_batch(
        &mut self,
        arrived: &Arrived,
        looked: Option<Result<(), String>>,
        staged: &mut BTreeSet<StreamName>,
    ) -> Result<Outcome, Fault> {
        let header = arrived.batch.header();
        let name = &header.stream;
        // First of all, and from the bytes alone: a batch at fault makes no table and every node refuses it.
        let rows = match &arrived.rows {
            Ok(rows) => rows,
            Err(error) => return Ok(Outcome::Refused(error.to_string())),
        };
        if is_cloud_stream(name) {
            return Ok(Outcome::Refused(own_names::refusal(name)));
        }
        if self.catalogue.own_names().has(name) {
            tracing::warn!(stream = %name, edge = %header.edge, "an edge's stream is called as a view or its results: it is pushed back");
            return Ok(pushed_back(name));
        }
        if let Some(Err(reason)) = &looked {
            tracing::warn!(stream = %name, reason, "stream is pushed back");
            return Ok(pushed_back(name));
        }
        // A void batch has no rows, so its schema says nothing about the table.
        let fields = if header.void.is_some() { &[] } else { arrived.schema.fields() };
        let fields = &*alias::fields(self.aliases(name), fields);
        let Some(stream) = self.streams.get_mut(name) else { return Ok(Outcome::Look(fields.to_vec())) };
        if looked.is_none() && lacks(&stream.snapshot, fields) {
            return Ok(Outcome::Look(fields.to_vec()));
        }
        match stream.judge(&arrived.batch) {
            Verdict::Accept => {}
            Verdict::Duplicate => return Ok(Outcome::Duplicate),
            // Another node may have committed meanwhile: look before saying no (rule 3).
            Verdict::Gap { .. } | Verdict::Forked if looked.is_none() => return Ok(Outcome::Look(Vec::new())),
            Verdict::Gap { expected } => {
                let (spool, stream, got) = (header.spool, name.clone(), header.seq);
                return Ok(Outcome::Back(RefusedRequest::Gap { spool, stream, expected, got }));
            }
            Verdict::Forked => {
                let (spool, stream, at) = (header.spool, name.clone(), header.seq);
                return Ok(Outcome::Back(RefusedRequest::Forked { spool, stream, at }));
            }
        }
        let class = Class::of(&header.edge, name);
        if !self.has_room(name, class, hot_bytes(rows, &header.edge), arrived.batch.bytes().len()) {
            return Ok(pushed_back(name));
        }
        let received_at_us = chrono::Utc::now().timestamp_micros();
        let wal_from = match self.wal.append(&arrived.batch, &arrived.schema, received_at_us, None) {
            Ok(position) => position,
            Err(AppendError::Full) => return Ok(pushed_back(name)),
            Err(AppendError::TooLarge { max, .. }) => {
                return Ok(Outcome::Back(RefusedRequest::TooLarge { bytes_max: max }));
            }
            Err(error) => return Err(Fault::Append(error)),
        };
        self.noted.push((header.clone(), received_at_us));
        let accepted = Accepted { batch: &arrived.batch, schema: &arrived.schema, rows, received_at_us, wal_from };
        if let Some(stream) = self.streams.get_mut(name) {
            let chunk = stream.accept(accepted);
            stream.hot.push(chunk);
            staged.insert(name.clone());
        }
        Ok(Outcome::Durable)
    }

    /// Whether there is room for a batch of a class in memory and WAL, and in its stream's share of each. A stream may have
    /// so much of what is free ([`SHARE`] times) that some always is: one that cannot commit is pushed back alone.
    pub(super) fn has_room(&mut self, name: &StreamName, class: Class, bytes: usize, wal_bytes: usize) -> bool {
        let now = Instant::now();
        let Some(stream) = self.streams.get(name) else { return false };
        if self.carry.as_ref().is_some_and(|carry| carry.stream == *name) || self.hungry.before(class, now) {
            return false;
        }
        let (mut hot, mut live, mut largest) = (ByClass::<usize>::default(), ByClass::<usize>::default(), 0);
        for stream in self.streams.values() {
            let wal_bytes = stream.hot.wal_bytes();
            hot[stream.class] += stream.hot.bytes();
            live[stream.class] += wal_bytes;
            largest = wal_bytes.max(largest);
        }
        let (hot_free, live_budget) = (self.hot_budget().free(class, &hot), self.live_budget());
        let wal_free = live_budget.free(class, &live);
        let in_share =
            stream.hot.bytes() + bytes <= SHARE * hot_free && stream.hot.wal_bytes() + wal_bytes <= SHARE * wal_free;
        // A segment for the batch itself, and one for those that share its sync; alerts go without the latter.
        let segments = if class == Class::Alerts { 1 } else { 2 };
        let reserve = self.carry_room(largest)
            + segments * self.settings.wal.segment_bytes.bytes()
            + live_budget.kept_from(class);
        let fits =
            bytes <= hot_free && self.wal.bytes() as usize + wal_bytes + reserve <= self.settings.wal.max_bytes.bytes();
        if in_share && fits {
            self.hungry.fed(class);
            return true;
        }
        // One that has more than its share waits for its own table, and nobody is to wait for that.
        if !fits && stream.hot.bytes() <= SHARE * hot_free && stream.hot.wal_bytes() <= SHARE * wal_free {
            self.hungry.waits(class, now);
        }
        self.hungry.tell(class, now);
        false
    }
}

/// Decoded bytes of rows with where they come from, as they will be in hot.
pub(super) fn hot_bytes(rows: &RecordBatch, edge: &EdgeId) -> usize {
    rows.get_array_memory_size() + rows.num_rows() * (PROVENANCE_BYTES + edge.as_str().len())
}

fn pushed_back(stream: &StreamName) -> Outcome {
    Outcome::Back(RefusedRequest::PushedBack { stream: stream.clone(), retry_after_ms: RETRY_AFTER_MS })
}

/// Whether the table could have fields that it does not have.
pub(super) fn lacks(snapshot: &TableSnapshot, fields: &[StreamField]) -> bool {
    let known = |field: &StreamField| snapshot.fields.iter().any(|known| known.name == field.name);
    snapshot.fields.len() < FIELDS_MAX && !fields.iter().all(known)
}
