//! What the uplink does next: pure, driven by events, `now_ms` is an argument.
//!
//! Each stream has at most one request in flight, so its batches arrive in order; streams go in parallel. Nothing is
//! sent to a node before it has answered `positions`. `durable` counts for the node that said it and is forgotten on a
//! move; what may be freed is only what a node calls committed. An answer tells only of the stream that it answers, so the
//! node is asked about all at least every [`ASK_MAX_MS`] while anything waits, whatever else is sent. A stream that is
//! pushed back waits alone; a network error moves to the next address, after a wait that doubles up to
//! [`BACKOFF_MAX_MS`]. Away from the preferred address, that one is asked for its positions beside all else, and is
//! returned to only when it answers. The caller gives the jitter. Lanes go by priority; within a lane the stream that was
//! sent longest ago goes first.

use std::collections::HashMap;

use wire::{Acks, Mark, Seq, SpoolId, StreamName};

use super::link::Link;

/// The first wait after an error, before jitter.
pub const BACKOFF_MIN_MS: u64 = 100;
/// The longest wait after errors, before jitter.
pub const BACKOFF_MAX_MS: u64 = 10_000;
/// What is sent and not committed: the node is asked about it after so long without an answer, then after twice as long…
pub const ASK_MIN_MS: u64 = 1_000;
/// …and at least this often.
pub const ASK_MAX_MS: u64 = 15_000;
/// After this long on another address the preferred one is asked whether it is back, then after twice as long…
pub const RETURN_MIN_MS: u64 = 30_000;
/// …and at least this often.
pub const RETURN_MAX_MS: u64 = 300_000;

/// How a request ended, when not with acks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// No answer, 5xx, 401 or 403: nothing changes but the time of the next try.
    Link,
    /// The node waits for another number of this stream.
    Gap { expected: Seq },
    /// 429: this stream waits.
    PushedBack { retry_after_ms: u64 },
    /// 412 or 415: the same goes again at once, in a form that the node can read.
    Form,
    /// 409 forked: the caller starts a new spool.
    Forked,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Ask the address for its positions.
    Positions { url: usize, epoch: u64 },
    /// Ask the preferred address, which is not the present one, whether it answers; nothing waits for it.
    Probe { url: usize },
    /// Send the numbered batches of the stream from `from` on, and when there are none, number waiting ones of the lane.
    Send { url: usize, epoch: u64, stream: StreamName, from: Seq, lane: usize, bytes_max: usize },
    /// Nothing before this moment, or before the next event.
    Wait { until_ms: u64 },
}

#[derive(Debug, Default, Clone)]
struct Chain {
    /// On the present node.
    durable: Seq,
    in_flight: bool,
    not_before_ms: u64,
    /// Counts requests; 0 before its first.
    turn: u64,
}

/// What a stream has for the cloud.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// 0 goes first.
    pub lane: usize,
    pub stream: &'a StreamName,
    /// The last number given.
    pub head: Seq,
    /// Whether batches without a number wait.
    pub waiting: bool,
    /// Whether one of these has come since batches of the stream were chosen last.
    pub live: bool,
}

/// The state of the uplink.
#[derive(Debug)]
pub struct Uplink {
    spool: SpoolId,
    urls: usize,
    url: usize,
    /// Counts moves and forgettings: an answer of an earlier epoch says nothing about the present node.
    epoch: u64,
    /// When the preferred address is asked, and how long that wait was.
    return_at_ms: u64,
    return_wait_ms: u64,
    probing: bool,
    /// The node that has told its positions.
    node: Option<String>,
    asking: bool,
    /// When to ask again what is committed, and how long that wait was.
    ask_at_ms: u64,
    ask_wait_ms: u64,
    /// When to ask all the same, though requests are in flight and put `ask_at_ms` off. None while nothing waits.
    ask_by_ms: Option<u64>,
    failures: u32,
    not_before_ms: u64,
    chains: HashMap<StreamName, Chain>,
    turn: u64,
    /// How much may be under way.
    pub link: Link,
}

impl Uplink {
    /// For `urls` addresses in order of preference, at least one.
    pub fn new(spool: SpoolId, urls: usize, link: Link) -> Self {
        Self {
            spool,
            urls: urls.max(1),
            url: 0,
            epoch: 0,
            return_at_ms: 0,
            return_wait_ms: RETURN_MIN_MS,
            probing: false,
            node: None,
            asking: false,
            ask_at_ms: 0,
            ask_wait_ms: ASK_MIN_MS,
            ask_by_ms: None,
            failures: 0,
            not_before_ms: 0,
            chains: HashMap::new(),
            turn: 0,
            link,
        }
    }

    /// The next action. `candidates` are the streams that have something to send or not committed.
    pub fn next<'a>(&mut self, now_ms: u64, candidates: impl Iterator<Item = Candidate<'a>>) -> Action {
        if now_ms < self.not_before_ms {
            return Action::Wait { until_ms: self.not_before_ms };
        }
        let idle = !self.chains.values().any(|chain| chain.in_flight);
        if self.node.is_none() {
            if self.asking || !idle {
                return Action::Wait { until_ms: u64::MAX };
            }
            self.asking = true;
            self.ask_by_ms = Some(now_ms + ASK_MAX_MS);
            return Action::Positions { url: self.url, epoch: self.epoch };
        }
        let away = self.url != 0 && !self.probing;
        if away && now_ms >= self.return_at_ms {
            self.probing = true;
            return Action::Probe { url: 0 };
        }
        let return_ms = if away { self.return_at_ms } else { u64::MAX };
        let mut candidates = candidates.collect::<Vec<_>>();
        if candidates.is_empty() {
            self.ask_by_ms = None;
            return Action::Wait { until_ms: return_ms };
        }
        let ask_by_ms = *self.ask_by_ms.get_or_insert(now_ms + ASK_MAX_MS);
        if now_ms >= ask_by_ms && !self.asking {
            return self.ask(now_ms);
        }
        let mut until_ms = if self.asking { u64::MAX } else { ask_by_ms }.min(return_ms);
        candidates.sort_by_key(|one| (one.lane, self.chains.get(one.stream).map_or(0, |chain| chain.turn)));
        let mut sharing = HashMap::new();
        for one in &candidates {
            let chain = self.chains.entry(one.stream.clone()).or_default();
            let ready = chain.in_flight || one.waiting || one.head > chain.durable;
            *sharing.entry(one.lane).or_insert(0) += usize::from(ready && now_ms >= chain.not_before_ms);
        }
        for Candidate { lane, stream, head, waiting, live } in candidates {
            let chain = self.chains.entry(stream.clone()).or_default();
            if chain.in_flight || (head <= chain.durable && !waiting) {
                continue;
            }
            if now_ms < chain.not_before_ms {
                until_ms = until_ms.min(chain.not_before_ms);
                continue;
            }
            let bytes_max = match self.link.room(lane, sharing[&lane], live, now_ms) {
                Ok(bytes_max) => bytes_max,
                Err(later_ms) => {
                    until_ms = until_ms.min(later_ms);
                    continue;
                }
            };
            self.turn += 1;
            (chain.in_flight, chain.turn) = (true, self.turn);
            (self.ask_wait_ms, self.ask_at_ms) = (ASK_MIN_MS, now_ms + ASK_MIN_MS);
            let (url, epoch, from) = (self.url, self.epoch, chain.durable.next());
            return Action::Send { url, epoch, stream: stream.clone(), from, lane, bytes_max };
        }
        // A node commits in its own time and says so only when it is asked.
        if idle && !self.asking {
            if now_ms >= self.ask_at_ms {
                return self.ask(now_ms);
            }
            until_ms = until_ms.min(self.ask_at_ms);
        }
        Action::Wait { until_ms }
    }

    fn ask(&mut self, now_ms: u64) -> Action {
        self.ask_wait_ms = (self.ask_wait_ms * 2).min(ASK_MAX_MS);
        self.ask_at_ms = now_ms + self.ask_wait_ms;
        self.ask_by_ms = Some(now_ms + ASK_MAX_MS);
        self.asking = true;
        Action::Positions { url: self.url, epoch: self.epoch }
    }

    /// The node answered with acks, to `positions` (`sent` is none) or to a request of one stream; `epoch` is that of the
    /// action. Returns what is committed, for the spool to free if the CRC is its own: that is true whoever says it.
    pub fn acked(&mut self, sent: Option<&StreamName>, epoch: u64, acks: &Acks) -> Vec<(StreamName, Mark)> {
        let committed = self.committed(acks);
        self.landed(sent);
        if epoch != self.epoch {
            return committed;
        }
        // That a node tells its positions after a failure is no sign that it takes anything.
        if sent.is_some() || self.node.is_some() {
            self.failures = 0;
        }
        if sent.is_some() && self.url == 0 {
            self.return_wait_ms = RETURN_MIN_MS;
        }
        if self.node.as_ref() != Some(&acks.node) {
            // At the start; or another node answers behind the same address, and what the old one holds counts for
            // nothing here.
            let known = self.node.is_some();
            self.forget();
            if known && sent.is_some() {
                return committed;
            }
            self.node = Some(acks.node.clone());
        }
        let spool = self.spool;
        for ack in acks.acks.iter().filter(|ack| ack.spool == spool) {
            let chain = self.chains.entry(ack.stream.clone()).or_default();
            chain.durable = chain.durable.max(ack.durable.seq).max(ack.committed.seq);
        }
        committed
    }

    /// What acks that came with a failure call committed; nothing else of them counts, for the node is left.
    pub fn committed(&self, acks: &Acks) -> Vec<(StreamName, Mark)> {
        let own = acks.acks.iter().filter(|ack| ack.spool == self.spool);
        own.map(|ack| (ack.stream.clone(), ack.committed)).collect()
    }

    /// A request was not taken; `sent` is its stream, none for `positions`. `jitter` is in [0, 1].
    pub fn failed(&mut self, sent: Option<&StreamName>, epoch: u64, failure: &Failure, now_ms: u64, jitter: f64) {
        self.landed(sent);
        if epoch != self.epoch {
            return;
        }
        let chain = sent.map(|stream| self.chains.entry(stream.clone()).or_default());
        match (failure, chain) {
            (Failure::Gap { expected }, Some(chain)) => chain.durable = Seq(expected.0.saturating_sub(1)),
            (Failure::PushedBack { retry_after_ms }, Some(chain)) => {
                chain.not_before_ms = now_ms.saturating_add(*retry_after_ms);
            }
            (Failure::Forked | Failure::Form, _) => {}
            _ => {
                let wait = (BACKOFF_MIN_MS << self.failures.min(16)).min(BACKOFF_MAX_MS);
                self.failures = self.failures.saturating_add(1);
                self.not_before_ms = now_ms + wait / 2 + (wait as f64 / 2.0 * jitter.clamp(0.0, 1.0)) as u64;
                self.move_to((self.url + 1) % self.urls, now_ms);
            }
        }
    }

    /// The preferred address has answered, or not.
    pub fn probed(&mut self, answers: bool, now_ms: u64) {
        self.probing = false;
        if self.url == 0 {
            return;
        }
        if answers {
            self.move_to(0, now_ms);
        } else {
            self.return_later(now_ms);
        }
    }

    fn return_later(&mut self, now_ms: u64) {
        self.return_at_ms = now_ms + self.return_wait_ms;
        self.return_wait_ms = (self.return_wait_ms * 2).min(RETURN_MAX_MS);
    }

    /// Whether a request of the stream has no answer yet: what it sent may be there or not.
    pub fn is_in_flight(&self, stream: &StreamName) -> bool {
        self.chains.get(stream).is_some_and(|chain| chain.in_flight)
    }

    /// The node that answers, once it has told its positions, and the index of its address.
    pub fn node(&self) -> (Option<&str>, usize) {
        (self.node.as_deref(), self.url)
    }

    /// A new spool took the place of the forked one: its sequences begin anew.
    pub fn restart(&mut self, spool: SpoolId) {
        self.spool = spool;
        self.forget();
    }

    /// There are other addresses now, so many; what the old ones hold counts for nothing.
    pub fn readdress(&mut self, urls: usize, now_ms: u64) {
        (self.urls, self.failures, self.not_before_ms) = (urls.max(1), 0, 0);
        self.move_to(0, now_ms);
    }

    fn landed(&mut self, sent: Option<&StreamName>) {
        match sent {
            Some(stream) => self.chains.entry(stream.clone()).or_default().in_flight = false,
            None => self.asking = false,
        }
    }

    fn move_to(&mut self, url: usize, now_ms: u64) {
        if url != self.url {
            self.link.forget();
            if self.url == 0 {
                self.return_later(now_ms);
            }
        }
        self.url = url;
        self.forget();
    }

    fn forget(&mut self) {
        self.epoch += 1;
        self.node = None;
        self.chains.values_mut().for_each(|chain| chain.durable = Seq(0));
    }
}

#[cfg(test)]
mod tests;
