//! A request of an edge on its way through the ingest thread, and what became of each of its batches.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use arrow_array::RecordBatch;
use wire::schema::StreamField;
use wire::sealed::BodyError;
use wire::{Acks, Refusal, RefusedAnswer, RefusedRequest, SealedBatch, SpoolId, StreamAck, StreamName, StreamSchema};

use super::Reply;
use crate::class::{ByClass, Class};
use crate::metrics::{Metrics, Tally};

/// A batch as the door hands it over: undamaged, its rows decoded, or the reason why they cannot be.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) batch: SealedBatch,
    pub(crate) schema: Arc<StreamSchema>,
    pub(crate) rows: Result<RecordBatch, BodyError>,
}

/// What became of a batch.
#[derive(Debug)]
pub(super) enum Outcome {
    Durable,
    Duplicate,
    /// Not taken for now, or because of the caller.
    Back(RefusedRequest),
    /// Not taken for ever, because of its bytes.
    Refused(String),
    /// Nothing yet: the store must be looked at, and the table have these fields.
    Look(Vec<StreamField>),
}

/// The batches that are left of a request, and what became of the others.
#[derive(Debug)]
pub(super) struct Request {
    /// Whose place it has: that of the batch which goes last.
    class: Class,
    reply: Reply,
    batches: VecDeque<Arrived>,
    looked: Option<Result<(), String>>,
    touched: BTreeSet<(SpoolId, StreamName)>,
    /// Sequences of which a batch was not taken: those behind it would leave a gap.
    stopped: BTreeSet<(SpoolId, StreamName)>,
    refused: Vec<Refusal>,
    back: Option<RefusedRequest>,
    tally: ByClass<Tally>,
}

impl Request {
    pub(super) fn new(class: Class, batches: Vec<Arrived>, reply: Reply) -> Self {
        Self {
            class,
            reply,
            batches: batches.into(),
            looked: None,
            touched: BTreeSet::new(),
            stopped: BTreeSet::new(),
            refused: Vec::new(),
            back: None,
            tally: ByClass::default(),
        }
    }

    pub(super) fn class(&self) -> Class {
        self.class
    }

    /// The next batch to admit, and how the look ended that it waited for.
    pub(super) fn next(&mut self) -> Option<(Arrived, Option<Result<(), String>>)> {
        loop {
            let arrived = self.batches.pop_front()?;
            let header = arrived.batch.header();
            let key = (header.spool, header.stream.clone());
            if self.stopped.contains(&key) {
                self.tally[Class::of(&header.edge, &header.stream)].pushed_back += u64::from(header.rows);
                continue;
            }
            self.touched.insert(key);
            return Some((arrived, self.looked.take()));
        }
    }

    /// Puts a batch back that waits for a look.
    pub(super) fn put_back(&mut self, arrived: Arrived) {
        self.batches.push_front(arrived);
    }

    /// The look is over.
    pub(super) fn looked(&mut self, outcome: Result<(), String>) {
        self.looked = Some(outcome);
    }

    /// Counts what became of a batch. [`Outcome::Look`] is none: it is put back.
    pub(super) fn count(&mut self, arrived: &Arrived, outcome: Outcome) {
        let header = arrived.batch.header();
        let rows = u64::from(header.rows);
        let tally = &mut self.tally[Class::of(&header.edge, &header.stream)];
        match outcome {
            Outcome::Durable => tally.durable += rows,
            Outcome::Duplicate => tally.duplicate += rows,
            Outcome::Look(_) => {}
            Outcome::Back(answer) => {
                tally.pushed_back += rows;
                self.stopped.insert((header.spool, header.stream.clone()));
                self.back.get_or_insert(answer);
            }
            Outcome::Refused(reason) => {
                tally.refused += rows;
                self.stopped.insert((header.spool, header.stream.clone()));
                let (spool, stream, seq) = (header.spool, header.stream.clone(), header.seq);
                self.refused.push(Refusal { spool, stream, seq, reason });
            }
        }
    }

    /// The sequences that it touched.
    pub(super) fn touched(&self) -> &BTreeSet<(SpoolId, StreamName)> {
        &self.touched
    }

    /// Answers, when everything that was taken is durable and shown.
    pub(super) fn answer(self, node: &str, acks: Vec<StreamAck>, metrics: &Metrics) {
        for (class, tally) in self.tally.iter() {
            metrics.came_in(class, tally);
        }
        let acks = Acks { node: node.to_owned(), acks, refused: self.refused };
        let answer = match self.back {
            None => Ok(acks),
            Some(refused) => Err(RefusedAnswer { refused, acks: Some(Box::new(acks)) }),
        };
        // A caller that has gone asks again and is told by `positions`.
        self.reply.send(answer).ok();
    }
}
