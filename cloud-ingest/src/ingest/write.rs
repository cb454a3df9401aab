//! Batches that this node's own doors made: numbered, appended and shown by the single writer like those of edges.
//!
//! The node is their edge, and its WAL is the only place that has them until they are committed. So a request is taken
//! whole or not at all: first every table is there, has the fields and has room, then each batch gets the next number of
//! the doors' spool in its stream and is appended, all under one sync. A batch whose id was seen lately is there already. At
//! recovery a number that the disk lost is filled with a void batch, so that what follows it is kept, and a stream whose
//! table cannot be opened keeps its place in the WAL until the next start: nobody else could send it again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use segment_log::{AppendError, FileLayer};
use tokio::sync::oneshot;
use wire::ids::OWN_EDGE;
use wire::schema::StreamField;
use wire::{EdgeId, Mark, RefusedRequest, SealedBatch, StreamName};

use super::admit::{hot_bytes, lacks};
use super::errand::{Subject, Ticket};
use super::stream::{Accepted, Stream};
use super::{Fault, Ingest, RETRY_AFTER_MS};
use crate::alias::{self, Aliases};
use crate::class::Class;
use crate::doors::rows::Gathered;
use crate::metrics::Tally;
use crate::repeats::WriteId;
use crate::wal::Replayed;

/// What the record and the header of a batch take beside its body, at most.
const AROUND_BYTES: usize = 1 << 10;

pub(crate) type WriteReply = oneshot::Sender<Result<Written, RefusedRequest>>;

/// What became of a request of a door: rows that are durable now, and those that were before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Written {
    pub(crate) rows: u64,
    pub(crate) repeated: u64,
}

/// A request of a door.
#[derive(Debug)]
pub(crate) struct Writing {
    /// That of the batch which goes last: it is taken whole.
    class: Class,
    edge: EdgeId,
    batches: Vec<(Option<WriteId>, Gathered)>,
    looked: Option<Result<(), String>>,
    written: Written,
    back: Option<RefusedRequest>,
    reply: WriteReply,
}

impl Writing {
    /// A batch without an id is never taken for one that was seen before.
    pub(crate) fn new(edge: EdgeId, batches: Vec<(Option<WriteId>, Gathered)>, reply: WriteReply) -> Self {
        let class = batches.iter().map(|(_, batch)| Class::of(&edge, &batch.cut.stream)).max();
        let class = class.unwrap_or(Class::Readings);
        Self { class, edge, batches, looked: None, written: Written::default(), back: None, reply }
    }

    pub(crate) fn class(&self) -> Class {
        self.class
    }

    /// Bytes that it adds to the WAL.
    pub(super) fn wal_bytes(&self) -> usize {
        self.batches.iter().map(|(_, batch)| batch.cut.body.len() + AROUND_BYTES).sum()
    }

    /// The looks that it waited for are over.
    pub(super) fn looked(&mut self, outcome: Result<(), String>) {
        self.looked = Some(outcome);
    }

    fn push_back(&mut self, stream: &StreamName) {
        let refused = RefusedRequest::PushedBack { stream: stream.clone(), retry_after_ms: RETRY_AFTER_MS };
        self.back.get_or_insert(refused);
    }

    /// The fields that each stream must have.
    fn wanted<'a>(
        &self,
        aliases: impl Fn(&StreamName) -> Option<&'a Aliases>,
    ) -> BTreeMap<StreamName, Vec<StreamField>> {
        let mut wanted = BTreeMap::<_, Vec<StreamField>>::new();
        for (_, batch) in &self.batches {
            let fields = wanted.entry(batch.cut.stream.clone()).or_default();
            for field in &*alias::fields(aliases(&batch.cut.stream), batch.schema.fields()) {
                if !fields.iter().any(|known| known.name == field.name) {
                    fields.push(field.clone());
                }
            }
        }
        wanted
    }
}

impl<L: FileLayer> Ingest<L> {
    /// Takes a request of a door whole, or says what it has to wait for.
    pub(super) fn admit_write(
        &mut self,
        writing: &mut Writing,
        staged: &mut BTreeSet<StreamName>,
    ) -> Result<Option<Vec<Ticket>>, Fault> {
        let (seen, batches): (Vec<_>, Vec<_>) = std::mem::take(&mut writing.batches)
            .into_iter()
            .partition(|(id, _)| id.is_some_and(|id| self.repeats.contains(id)));
        writing.batches = batches;
        writing.written.repeated += seen.iter().map(|(_, batch)| u64::from(batch.cut.rows)).sum::<u64>();
        let wanted = writing.wanted(|name| self.aliases(name));
        let bytes = writing.batches.iter().map(|(_, batch)| hot_bytes(&batch.rows, &writing.edge)).sum::<usize>();
        let (wal_bytes, looked) = (writing.wal_bytes(), writing.looked.take());
        if let Some(stream) = wanted.keys().find(|stream| self.held.contains_key(*stream)) {
            writing.push_back(stream);
            return Ok(None);
        }
        let missing = wanted
            .iter()
            .filter(|(name, fields)| self.streams.get(*name).is_none_or(|stream| lacks(&stream.snapshot, fields)));
        let missing: Vec<_> = missing.map(|(name, fields)| (name.clone(), fields.clone())).collect();
        if let Some((name, _)) = missing.first() {
            if looked.is_some() || !self.may_park(writing.class) {
                tracing::warn!(stream = %name, ?looked, "stream is pushed back");
                writing.push_back(name);
                return Ok(None);
            }
            let ask = |(name, fields): (StreamName, Vec<StreamField>)| {
                self.ask(writing.class, Subject::Stream(name), &fields)
            };
            return Ok(Some(missing.into_iter().map(ask).collect()));
        }
        if let Some(stream) = wanted.keys().find(|stream| !self.has_room(stream, writing.class, bytes, wal_bytes)) {
            writing.push_back(stream);
            return Ok(None);
        }
        for (id, batch) in std::mem::take(&mut writing.batches) {
            if !self.append_own(&writing.edge, id, &batch)? {
                writing.push_back(&batch.cut.stream);
                writing.batches.push((id, batch));
                continue;
            }
            writing.written.rows += u64::from(batch.cut.rows);
            staged.insert(batch.cut.stream.clone());
        }
        Ok(None)
    }

    /// Appends a batch with the next number of its sequence; false when there is no room for it after all.
    fn append_own(&mut self, edge: &EdgeId, id: Option<WriteId>, gathered: &Gathered) -> Result<bool, Fault> {
        let spool = self.repeats.spool();
        let Some(stream) = self.streams.get_mut(&gathered.cut.stream) else { return Ok(false) };
        let last = stream.sequence(spool).durable();
        let batch = gathered.cut.number(edge, spool, last.seq.next(), last.crc);
        let received_at_us = chrono::Utc::now().timestamp_micros();
        let wal_from = match self.wal.append(&batch, &gathered.schema, received_at_us, id) {
            Ok(position) => position,
            Err(AppendError::Full | AppendError::TooLarge { .. }) => return Ok(false),
            Err(error) => return Err(Fault::Append(error)),
        };
        if let Some(id) = id {
            self.repeats.insert(id, received_at_us).map_err(Fault::Append)?;
        }
        self.noted.push((batch.header().clone(), received_at_us));
        let (schema, rows) = (&gathered.schema, &gathered.rows);
        let chunk = stream.accept(Accepted { batch: &batch, schema, rows, received_at_us, wal_from });
        stream.hot.push(chunk);
        Ok(true)
    }

    /// Answers, when everything that was taken is durable and shown.
    pub(super) fn answer_write(&self, writing: Writing) {
        let Written { rows, repeated } = writing.written;
        let left = writing.batches.iter().map(|(_, batch)| u64::from(batch.cut.rows)).sum::<u64>();
        let tally = Tally { durable: rows, duplicate: repeated, refused: 0, pushed_back: left };
        // What the node writes by itself came through no door.
        if writing.edge.as_str() == OWN_EDGE {
            self.metrics.wrote(writing.class, &tally);
        } else {
            self.metrics.came_in(writing.class, &tally);
        }
        // A caller that has gone sends again, and is told that it is there.
        writing.reply.send(writing.back.map_or(Ok(writing.written), Err)).ok();
    }

    /// Remembers a batch of the doors that the WAL has. True when its stream keeps its place in the WAL, and no more of it
    /// is put back.
    pub(super) fn recall(&mut self, replayed: &Replayed) -> Result<bool, AppendError> {
        if let Some(id) = replayed.write {
            self.repeats.insert(id, replayed.received_at_us)?;
        }
        Ok(self.is_own(&replayed.batch) && self.held.contains_key(&replayed.batch.header().stream))
    }

    pub(super) fn is_own(&self, batch: &SealedBatch) -> bool {
        batch.header().spool == self.repeats.spool()
    }

    /// The table of a batch cannot be opened. One of the doors stays in the WAL; says whether it is one.
    pub(super) fn hold(&mut self, replayed: &Replayed) -> bool {
        let is_own = self.is_own(&replayed.batch);
        if is_own {
            self.held.entry(replayed.batch.header().stream.clone()).or_insert(replayed.from);
        }
        is_own
    }

    /// Numbers of the doors' spool before this batch that the disk has lost: void batches take their places, as an edge's
    /// would.
    pub(super) fn fill_gap(&mut self, replayed: &Replayed) -> Result<(), AppendError> {
        let header = replayed.batch.header();
        if !self.is_own(&replayed.batch) {
            return Ok(());
        }
        let Some(stream) = self.streams.get_mut(&header.stream) else { return Ok(()) };
        loop {
            let last = stream.sequence(header.spool).durable();
            if last.seq.next() >= header.seq {
                return Ok(());
            }
            let replaces = if last.seq.next().next() == header.seq { header.previous_crc } else { 0 };
            let mut lost = header.clone();
            (lost.seq, lost.previous_crc) = (last.seq.next(), last.crc);
            tracing::error!(stream = %header.stream, seq = %lost.seq, "rows that a door took were lost with a part of the wal");
            let batch = SealedBatch::void(lost, "lost with a part of the write-ahead log", replaces);
            let wal_from = self.wal.append(&batch, &replayed.schema, replayed.received_at_us, None)?;
            put_void(stream, &batch, replayed, wal_from);
        }
    }
}

fn put_void(stream: &mut Stream, batch: &SealedBatch, replayed: &Replayed, wal_from: segment_log::Position) {
    let (schema, received_at_us) = (Arc::clone(&replayed.schema), replayed.received_at_us);
    let rows = arrow_array::RecordBatch::new_empty(Arc::clone(schema.arrow()));
    let accepted = Accepted { batch, schema: &schema, rows: &rows, received_at_us, wal_from };
    let chunk = stream.accept(accepted);
    stream.hot.push(chunk);
    debug_assert_eq!(
        stream.sequence(batch.header().spool).durable(),
        Mark { seq: batch.header().seq, crc: batch.chain_crc() }
    );
}
