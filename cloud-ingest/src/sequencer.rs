//! Decides what a batch is in its sequence: the next one, one that is known, one too far ahead, or another history.
//!
//! Pure: no clock, no disk. It holds one [`Sequence`] per (spool, stream). `durable` is what this node has in its WAL
//! or finds committed; `committed` is what the table's `txn` says. Invariant: `committed.seq <= durable.seq`.
//! A CRC covers its predecessor's, so a known number with another CRC, or a next batch that names another
//! predecessor, is a fork (rule 8). CRCs of numbers between the two marks, and of a bounded number before, are kept.

use std::collections::{HashMap, VecDeque};

use wire::sealed::BatchHeader;
use wire::{Mark, Seq, SpoolId};

/// How many CRCs of known batches a sequence remembers at least behind its end.
const REMEMBERED_MAX: usize = 4_096;

/// What a batch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The next one: take it.
    Accept,
    /// Known, with the same CRC as far as that is remembered.
    Duplicate,
    /// Ahead of `expected`.
    Gap { expected: Seq },
    /// Another history has this number already.
    Forked,
}

/// One (spool, stream).
#[derive(Debug, Clone, Default)]
pub struct Sequence {
    durable: Mark,
    committed: Mark,
    /// CRCs of the numbers up to `durable`, the last one at the back.
    recent: VecDeque<u32>,
}

impl Sequence {
    /// A sequence of which the table has `committed`.
    pub fn at(committed: Mark) -> Self {
        let recent = if committed.seq.0 > 0 { VecDeque::from([committed.crc]) } else { VecDeque::new() };
        Self { durable: committed, committed, recent }
    }

    /// The last batch that this node has.
    pub fn durable(&self) -> Mark {
        self.durable
    }

    /// The last batch that is in the table.
    pub fn committed(&self) -> Mark {
        self.committed
    }

    /// What this batch is; changes nothing. `crc` is the one that stands for it in the chain: a void batch of a known
    /// number has that of the batch it replaces, and the node keeps what it has.
    pub fn judge(&self, header: &BatchHeader, crc: u32) -> Verdict {
        let seq = header.seq;
        if seq.0 == 0 {
            return Verdict::Forked;
        }
        if seq == self.durable.seq.next() {
            return if header.previous_crc == self.durable.crc { Verdict::Accept } else { Verdict::Forked };
        }
        if seq > self.durable.seq {
            return Verdict::Gap { expected: self.durable.seq.next() };
        }
        match self.crc_of(seq) {
            Some(known) if known != crc => Verdict::Forked,
            _ => Verdict::Duplicate,
        }
    }

    fn crc_of(&self, seq: Seq) -> Option<u32> {
        let back = usize::try_from(self.durable.seq.0 - seq.0).ok()?;
        self.recent.len().checked_sub(back + 1).map(|index| self.recent[index])
    }

    /// The accepted batch is this sequence's last one now.
    pub fn advance(&mut self, mark: Mark) {
        debug_assert_eq!(mark.seq, self.durable.seq.next(), "judge accepts the next one only");
        self.durable = mark;
        self.recent.push_back(mark.crc);
        let uncommitted = usize::try_from(self.durable.seq.0 - self.committed.seq.0).unwrap_or(usize::MAX);
        while self.recent.len() > REMEMBERED_MAX.max(uncommitted) {
            self.recent.pop_front();
        }
    }

    /// The table has this much. When that is more than this node has (another node committed it), durable follows.
    pub fn commit(&mut self, committed: Mark) {
        if committed.seq < self.committed.seq {
            return;
        }
        if committed.seq > self.durable.seq {
            *self = Self::at(committed);
        } else {
            self.committed = committed;
        }
    }

    /// Whether the table has the same history as this node, as far as that can be told.
    pub fn agrees_with(&self, committed: Mark) -> bool {
        committed.seq > self.durable.seq
            || committed.seq.0 == 0
            || self.crc_of(committed.seq).is_none_or(|crc| crc == committed.crc)
    }
}

/// All sequences of one stream.
pub type Sequences = HashMap<SpoolId, Sequence>;

#[cfg(test)]
mod tests {
    use wire::schema::SchemaId;
    use wire::sealed::NO_WATERMARK;

    use super::*;

    fn header(seq: u64, previous_crc: u32) -> BatchHeader {
        BatchHeader {
            edge: "gw".parse().unwrap(),
            spool: SpoolId([1; 16]),
            stream: "traffic".parse().unwrap(),
            seq: Seq(seq),
            rows: 1,
            schema: SchemaId([0; 16]),
            min_ts: 0,
            max_ts: 0,
            watermark: NO_WATERMARK,
            agent: String::new(),
            configuration: 0,
            previous_crc,
            void: None,
        }
    }

    fn mark(seq: u64, crc: u32) -> Mark {
        Mark { seq: Seq(seq), crc }
    }

    /// Batches 1, 2, 3 with CRCs 11, 12, 13; 2 is committed.
    fn three() -> Sequence {
        let mut sequence = Sequence::default();
        for seq in 1..=3 {
            sequence.advance(mark(seq, 10 + seq as u32));
        }
        sequence.commit(mark(2, 12));
        sequence
    }

    #[test]
    fn every_batch_is_one_of_four() {
        let check = |seq, previous, crc, expected| {
            assert_eq!(three().judge(&header(seq, previous), crc), expected, "batch {seq} after {previous}");
        };
        check(4, 13, 14, Verdict::Accept);
        check(4, 99, 14, Verdict::Forked);
        check(5, 14, 15, Verdict::Gap { expected: Seq(4) });
        check(3, 12, 13, Verdict::Duplicate);
        check(3, 12, 99, Verdict::Forked);
        check(1, 0, 11, Verdict::Duplicate);
        check(1, 0, 99, Verdict::Forked);
        check(0, 0, 0, Verdict::Forked);
    }

    #[test]
    fn a_new_spool_begins_with_one() {
        let new = Sequence::default();
        assert_eq!(new.judge(&header(1, 0), 5), Verdict::Accept);
        assert_eq!(new.judge(&header(2, 5), 6), Verdict::Gap { expected: Seq(1) });
    }

    #[test]
    fn what_another_node_committed_is_known() {
        let mut sequence = three();
        assert!(sequence.agrees_with(mark(7, 77)));
        sequence.commit(mark(7, 77));
        assert_eq!(sequence.durable(), mark(7, 77));
        assert_eq!(sequence.judge(&header(8, 77), 1), Verdict::Accept);
        assert_eq!(sequence.judge(&header(7, 0), 77), Verdict::Duplicate);
        assert_eq!(sequence.judge(&header(7, 0), 78), Verdict::Forked);
        // Not remembered here: it is committed all the same.
        assert_eq!(sequence.judge(&header(5, 0), 1), Verdict::Duplicate);
        assert!(!three().agrees_with(mark(3, 99)));
    }

    #[test]
    fn memory_of_a_sequence_is_bounded_by_what_is_not_committed() {
        let mut sequence = Sequence::default();
        for seq in 1..=10_000 {
            sequence.advance(mark(seq, seq as u32));
            sequence.commit(mark(seq, seq as u32));
        }
        assert_eq!(sequence.recent.len(), REMEMBERED_MAX);
    }
}
