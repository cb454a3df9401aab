//! What the uplink does next: pure, driven by events, `now_ms` is an argument.
//!
//! Each stream has at most one request in flight, so its batches arrive in order; streams go in parallel. Nothing is
//! sent to a node before it has answered `positions`. `durable` counts for the node that said it and is forgotten on a
//! move; what may be freed is only what a node calls committed. A stream that is pushed back waits alone; a network
//! error moves to the next address, after a wait that doubles up to [`BACKOFF_MAX_MS`]. The caller gives the jitter.

use std::collections::HashMap;

use wire::{Acks, Mark, Seq, SpoolId, StreamName};

/// The first wait after an error, before jitter.
pub const BACKOFF_MIN_MS: u64 = 100;
/// The longest wait after errors, before jitter.
pub const BACKOFF_MAX_MS: u64 = 30_000;
/// After this long on another address the preferred one is tried again.
pub const RETURN_MS: u64 = 300_000;

/// How a request ended, when not with acks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// No answer, 5xx, 401 or 403: nothing changes but the time of the next try.
    Link,
    /// The node waits for another number of this stream.
    Gap { expected: Seq },
    /// The node does not know a schema: the same batches again, with schemas.
    SchemaUnknown,
    /// 429: this stream waits.
    PushedBack { retry_after_ms: u64 },
    /// 409 forked: the caller starts a new spool.
    Forked,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Ask the address for its positions.
    Positions { url: usize },
    /// Send the numbered batches of the stream from `from` on, and when there are none, number waiting ones.
    Send { url: usize, stream: StreamName, from: Seq },
    /// Nothing before this moment, or before the next event.
    Wait { until_ms: u64 },
}

#[derive(Debug, Default, Clone)]
struct Chain {
    /// On the present node.
    durable: Seq,
    in_flight: bool,
    not_before_ms: u64,
}

/// The state of the uplink.
#[derive(Debug)]
pub struct Uplink {
    spool: SpoolId,
    urls: usize,
    url: usize,
    moved_ms: u64,
    /// The node that has told its positions.
    node: Option<String>,
    asking: bool,
    failures: u32,
    not_before_ms: u64,
    chains: HashMap<StreamName, Chain>,
}

impl Uplink {
    /// For `urls` addresses in order of preference, at least one.
    pub fn new(spool: SpoolId, urls: usize) -> Self {
        Self {
            spool,
            urls: urls.max(1),
            url: 0,
            moved_ms: 0,
            node: None,
            asking: false,
            failures: 0,
            not_before_ms: 0,
            chains: HashMap::new(),
        }
    }

    /// The next action. `candidates` are the streams that have something to send, most urgent first: for each the
    /// last number given, and whether batches without a number wait.
    pub fn next<'a>(&mut self, now_ms: u64, candidates: impl Iterator<Item = (&'a StreamName, Seq, bool)>) -> Action {
        if now_ms < self.not_before_ms {
            return Action::Wait { until_ms: self.not_before_ms };
        }
        let idle = !self.chains.values().any(|chain| chain.in_flight);
        if self.url != 0 && idle && now_ms.saturating_sub(self.moved_ms) >= RETURN_MS {
            self.move_to(0, now_ms);
        }
        if self.node.is_none() {
            if self.asking || !idle {
                return Action::Wait { until_ms: u64::MAX };
            }
            self.asking = true;
            return Action::Positions { url: self.url };
        }
        let mut until_ms = u64::MAX;
        for (stream, head, waiting) in candidates {
            let chain = self.chains.entry(stream.clone()).or_default();
            if chain.in_flight || (head <= chain.durable && !waiting) {
                continue;
            }
            if now_ms < chain.not_before_ms {
                until_ms = until_ms.min(chain.not_before_ms);
                continue;
            }
            chain.in_flight = true;
            return Action::Send { url: self.url, stream: stream.clone(), from: chain.durable.next() };
        }
        Action::Wait { until_ms }
    }

    /// The node answered with acks, to `positions` (`sent` is none) or to a request of one stream. Returns what is
    /// committed, for the spool to free if the CRC is its own.
    pub fn acked(&mut self, sent: Option<&StreamName>, acks: &Acks) -> Vec<(StreamName, Mark)> {
        self.failures = 0;
        match sent {
            Some(stream) => self.landed(stream),
            None => {
                self.asking = false;
                self.forget();
                self.node = Some(acks.node.clone());
            }
        }
        if self.node.as_ref() != Some(&acks.node) {
            // Another node answers behind the same address: what the old one holds counts for nothing here.
            self.forget();
        }
        let mine = acks.acks.iter().filter(|ack| ack.spool == self.spool);
        mine.map(|ack| {
            if self.node.is_some() {
                let chain = self.chains.entry(ack.stream.clone()).or_default();
                chain.durable = chain.durable.max(ack.durable.seq).max(ack.committed.seq);
            }
            (ack.stream.clone(), ack.committed)
        })
        .collect()
    }

    /// A request ended without acks; `sent` is its stream, none for `positions`. `jitter` is in [0, 1].
    pub fn failed(&mut self, sent: Option<&StreamName>, failure: &Failure, now_ms: u64, jitter: f64) {
        match sent {
            Some(stream) => self.landed(stream),
            None => self.asking = false,
        }
        let chain = sent.map(|stream| self.chains.entry(stream.clone()).or_default());
        match (failure, chain) {
            (Failure::Gap { expected }, Some(chain)) => chain.durable = Seq(expected.0.saturating_sub(1)),
            (Failure::PushedBack { retry_after_ms }, Some(chain)) => {
                chain.not_before_ms = now_ms.saturating_add(*retry_after_ms);
            }
            (Failure::SchemaUnknown, Some(_)) | (Failure::Forked, _) => {}
            _ => {
                let wait = (BACKOFF_MIN_MS << self.failures.min(16)).min(BACKOFF_MAX_MS);
                self.failures = self.failures.saturating_add(1);
                self.not_before_ms = now_ms + wait / 2 + (wait as f64 / 2.0 * jitter.clamp(0.0, 1.0)) as u64;
                self.move_to((self.url + 1) % self.urls, now_ms);
            }
        }
    }

    /// A new spool took the place of the forked one: its sequences begin anew.
    pub fn restart(&mut self, spool: SpoolId) {
        self.spool = spool;
        self.forget();
    }

    fn landed(&mut self, stream: &StreamName) {
        self.chains.entry(stream.clone()).or_default().in_flight = false;
    }

    fn move_to(&mut self, url: usize, now_ms: u64) {
        self.url = url;
        self.moved_ms = now_ms;
        self.forget();
    }

    fn forget(&mut self) {
        self.node = None;
        self.chains.values_mut().for_each(|chain| chain.durable = Seq(0));
    }
}

#[cfg(test)]
mod tests {
    use wire::StreamAck;

    use super::*;

    const SPOOL: SpoolId = SpoolId([7; 16]);

    fn traffic() -> StreamName {
        "traffic".parse().unwrap()
    }

    fn acks(node: &str, durable: u64, committed: u64) -> Acks {
        let mark = |seq| Mark { seq: Seq(seq), crc: seq as u32 };
        let (durable, committed) = (mark(durable), mark(committed));
        let ack = StreamAck { spool: SPOOL, stream: traffic(), durable, committed };
        Acks { node: node.into(), acks: vec![ack], refused: vec![] }
    }

    fn next(uplink: &mut Uplink, now_ms: u64, head: u64, waiting: bool) -> Action {
        uplink.next(now_ms, [(&traffic(), Seq(head), waiting)].into_iter())
    }

    fn send(url: usize, from: u64) -> Action {
        Action::Send { url, stream: traffic(), from: Seq(from) }
    }

    #[test]
    fn positions_come_first_and_one_request_of_a_stream_at_a_time() {
        let mut uplink = Uplink::new(SPOOL, 1);
        assert_eq!(next(&mut uplink, 0, 3, false), Action::Positions { url: 0 });
        uplink.acked(None, &acks("a", 1, 0));
        assert_eq!(next(&mut uplink, 0, 3, false), send(0, 2));
        assert_eq!(next(&mut uplink, 0, 3, true), Action::Wait { until_ms: u64::MAX });
        assert_eq!(uplink.acked(Some(&traffic()), &acks("a", 3, 2))[0].1.seq, Seq(2));
        assert_eq!(next(&mut uplink, 0, 3, false), Action::Wait { until_ms: u64::MAX });
    }

    #[test]
    fn what_was_only_durable_on_one_node_is_sent_to_the_next() {
        let mut uplink = Uplink::new(SPOOL, 2);
        next(&mut uplink, 0, 10, false);
        uplink.acked(None, &acks("a", 10, 0));
        assert_eq!(next(&mut uplink, 0, 10, true), send(0, 11));
        uplink.failed(Some(&traffic()), &Failure::Link, 0, 1.0);
        assert_eq!(next(&mut uplink, 0, 10, true), Action::Wait { until_ms: BACKOFF_MIN_MS });
        assert_eq!(next(&mut uplink, 100, 10, true), Action::Positions { url: 1 });
        uplink.acked(None, &acks("b", 0, 0));
        assert_eq!(next(&mut uplink, 100, 10, true), send(1, 1));
    }

    #[test]
    fn a_gap_is_filled_from_the_number_that_is_expected() {
        let mut uplink = Uplink::new(SPOOL, 1);
        next(&mut uplink, 0, 9, false);
        uplink.acked(None, &acks("a", 7, 0));
        assert_eq!(next(&mut uplink, 0, 9, false), send(0, 8));
        uplink.failed(Some(&traffic()), &Failure::Gap { expected: Seq(4) }, 0, 0.0);
        assert_eq!(next(&mut uplink, 0, 9, false), send(0, 4));
        uplink.failed(Some(&traffic()), &Failure::PushedBack { retry_after_ms: 50 }, 0, 0.0);
        assert_eq!(next(&mut uplink, 0, 9, false), Action::Wait { until_ms: 50 });
        assert_eq!(next(&mut uplink, 50, 9, false), send(0, 4));
    }
}
