//! What the uplink does next: pure, driven by events, `now_ms` is an argument.
//!
//! Each stream has at most one request in flight, so its batches arrive in order; streams go in parallel. Nothing is
//! sent to a node before it has answered `positions`. `durable` counts for the node that said it and is forgotten on a
//! move; what may be freed is only what a node calls committed. An answer tells only of the stream that it answers, so the
//! node is asked about all at least every [`ASK_MAX_MS`] while anything waits, whatever else is sent. A stream that is
//! pushed back waits alone; a network error moves to the next address, after a wait that doubles up to
//! [`BACKOFF_MAX_MS`]. The caller gives the jitter.

use std::collections::HashMap;

use wire::{Acks, Mark, Seq, SpoolId, StreamName};

/// The first wait after an error, before jitter.
pub const BACKOFF_MIN_MS: u64 = 100;
/// The longest wait after errors, before jitter.
pub const BACKOFF_MAX_MS: u64 = 30_000;
/// What is sent and not committed: the node is asked about it after so long without an answer, then after twice as long…
pub const ASK_MIN_MS: u64 = 1_000;
/// …and at least this often.
pub const ASK_MAX_MS: u64 = 15_000;
/// After this long on another address the preferred one is tried again.
pub const RETURN_MS: u64 = 300_000;

/// How a request ended, when not with acks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// No answer, 5xx, 401 or 403: nothing changes but the time of the next try.
    Link,
    /// The node waits for another number of this stream.
    Gap { expected: Seq },
    /// 429: this stream waits.
    PushedBack { retry_after_ms: u64 },
    /// 409 forked: the caller starts a new spool.
    Forked,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Ask the address for its positions.
    Positions { url: usize, epoch: u64 },
    /// Send the numbered batches of the stream from `from` on, and when there are none, number waiting ones.
    Send { url: usize, epoch: u64, stream: StreamName, from: Seq },
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
    /// Counts moves and forgettings: an answer of an earlier epoch says nothing about the present node.
    epoch: u64,
    moved_ms: u64,
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
}

impl Uplink {
    /// For `urls` addresses in order of preference, at least one.
    pub fn new(spool: SpoolId, urls: usize) -> Self {
        Self {
            spool,
            urls: urls.max(1),
            url: 0,
            epoch: 0,
            moved_ms: 0,
            node: None,
            asking: false,
            ask_at_ms: 0,
            ask_wait_ms: ASK_MIN_MS,
            ask_by_ms: None,
            failures: 0,
            not_before_ms: 0,
            chains: HashMap::new(),
        }
    }

    /// The next action. `candidates` are the streams that have something to send or not committed, most urgent first: for
    /// each the last number given, and whether batches without a number wait.
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
            return Action::Positions { url: self.url, epoch: self.epoch };
        }
        let mut candidates = candidates.peekable();
        if candidates.peek().is_none() {
            self.ask_by_ms = None;
            return Action::Wait { until_ms: u64::MAX };
        }
        let ask_by_ms = *self.ask_by_ms.get_or_insert(now_ms + ASK_MAX_MS);
        if now_ms >= ask_by_ms && !self.asking {
            return self.ask(now_ms);
        }
        let mut until_ms = if self.asking { u64::MAX } else { ask_by_ms };
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
            (self.ask_wait_ms, self.ask_at_ms) = (ASK_MIN_MS, now_ms + ASK_MIN_MS);
            let (url, epoch, from) = (self.url, self.epoch, chain.durable.next());
            return Action::Send { url, epoch, stream: stream.clone(), from };
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
            (Failure::Forked, _) => {}
            _ => {
                let wait = (BACKOFF_MIN_MS << self.failures.min(16)).min(BACKOFF_MAX_MS);
                self.failures = self.failures.saturating_add(1);
                self.not_before_ms = now_ms + wait / 2 + (wait as f64 / 2.0 * jitter.clamp(0.0, 1.0)) as u64;
                self.move_to((self.url + 1) % self.urls, now_ms);
            }
        }
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
        self.url = url;
        self.moved_ms = now_ms;
        self.forget();
    }

    fn forget(&mut self) {
        self.epoch += 1;
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

    fn send(from: u64) -> impl Fn(&Action) -> bool {
        move |action| matches!(action, Action::Send { from: sent, .. } if sent.0 == from)
    }

    #[track_caller]
    fn expect(action: Action, wanted: impl Fn(&Action) -> bool) -> u64 {
        assert!(wanted(&action), "{action:?}");
        match action {
            Action::Positions { epoch, .. } | Action::Send { epoch, .. } => epoch,
            Action::Wait { .. } => u64::MAX,
        }
    }

    fn positions(at: usize) -> impl Fn(&Action) -> bool {
        move |action| matches!(action, Action::Positions { url, .. } if *url == at)
    }

    fn wait(until: u64) -> impl Fn(&Action) -> bool {
        move |action| *action == Action::Wait { until_ms: until }
    }

    /// An uplink that knows its node.
    fn ready(urls: usize, durable: u64) -> Uplink {
        let mut uplink = Uplink::new(SPOOL, urls);
        let epoch = expect(next(&mut uplink, 0, 10, true), positions(0));
        uplink.acked(None, epoch, &acks("a", durable, 0));
        uplink
    }

    #[test]
    fn positions_come_first_and_one_request_of_a_stream_at_a_time() {
        let mut uplink = ready(1, 1);
        let epoch = expect(next(&mut uplink, 0, 3, false), send(2));
        expect(next(&mut uplink, 0, 3, true), wait(ASK_MAX_MS));
        assert_eq!(uplink.acked(Some(&traffic()), epoch, &acks("a", 3, 2))[0].1.seq, Seq(2));
        expect(next(&mut uplink, 0, 3, false), wait(ASK_MIN_MS));
    }

    #[test]
    fn what_is_not_committed_is_asked_about_less_and_less_often() {
        let mut uplink = ready(1, 10);
        expect(uplink.next(0, std::iter::empty()), wait(u64::MAX));
        let mut now_ms = 0;
        for gap in [0, 2_000, 4_000, 8_000, ASK_MAX_MS, ASK_MAX_MS] {
            if gap > 0 {
                expect(next(&mut uplink, now_ms, 10, false), wait(now_ms + gap));
            }
            now_ms += gap;
            let epoch = expect(next(&mut uplink, now_ms, 10, false), positions(0));
            uplink.acked(None, epoch, &acks("a", 10, 0));
        }
    }

    #[test]
    fn a_quiet_stream_is_asked_about_while_another_one_sends() {
        let mut uplink = ready(1, 10);
        let busy: StreamName = "busy".parse().unwrap();
        let (mut asked, mut head) = (Vec::new(), 0);
        for now_ms in (0..40_000).step_by(100) {
            // One stream always has something in flight; the other is durable and waits for its commit.
            let candidates = [(&busy, Seq(head), true), (&traffic(), Seq(10), false)];
            match uplink.next(now_ms, candidates.into_iter()) {
                Action::Send { epoch, stream, .. } => {
                    assert_eq!(stream, busy);
                    head += 1;
                    let mut answer = acks("a", head, 0);
                    answer.acks[0].stream = busy.clone();
                    uplink.acked(Some(&busy), epoch, &answer);
                }
                Action::Positions { epoch, .. } => {
                    asked.push(now_ms);
                    uplink.acked(None, epoch, &acks("a", 10, 0));
                }
                Action::Wait { until_ms } => panic!("waits until {until_ms}"),
            }
        }
        assert_eq!(asked, [ASK_MAX_MS, 2 * ASK_MAX_MS]);
    }

    #[test]
    fn it_is_asked_while_a_request_is_in_flight_and_once_only() {
        let mut uplink = ready(1, 10);
        expect(next(&mut uplink, 0, 10, true), send(11));
        expect(next(&mut uplink, 1, 11, false), wait(ASK_MAX_MS));
        expect(next(&mut uplink, ASK_MAX_MS, 11, false), positions(0));
        expect(next(&mut uplink, ASK_MAX_MS + 1, 11, false), wait(u64::MAX));
    }

    #[test]
    fn what_was_only_durable_on_one_node_is_sent_to_the_next() {
        let mut uplink = ready(2, 10);
        let epoch = expect(next(&mut uplink, 0, 10, true), send(11));
        uplink.failed(Some(&traffic()), epoch, &Failure::Link, 0, 1.0);
        expect(next(&mut uplink, 0, 10, true), wait(BACKOFF_MIN_MS));
        let epoch = expect(next(&mut uplink, 100, 10, true), positions(1));
        uplink.acked(None, epoch, &acks("b", 0, 0));
        expect(next(&mut uplink, 100, 10, true), send(1));
    }

    #[test]
    fn a_late_answer_of_the_old_node_frees_and_changes_nothing_else() {
        let mut uplink = ready(2, 4);
        let other: StreamName = "other".parse().unwrap();
        let first = expect(next(&mut uplink, 0, 10, true), send(5));
        let candidates = [(&other, Seq(3), false)];
        let second = expect(uplink.next(0, candidates.into_iter()), send(1));
        assert_eq!(first, second);
        uplink.failed(Some(&other), second, &Failure::Link, 0, 1.0);
        expect(next(&mut uplink, 100, 10, true), wait(u64::MAX));
        let committed = uplink.acked(Some(&traffic()), first, &acks("a", 10, 7));
        assert_eq!(committed[0].1.seq, Seq(7));
        let epoch = expect(next(&mut uplink, 100, 10, true), positions(1));
        uplink.failed(Some(&traffic()), first, &Failure::Link, 100, 1.0);
        uplink.acked(None, epoch, &acks("b", 7, 7));
        expect(next(&mut uplink, 100, 10, true), send(8));
    }

    #[test]
    fn another_node_behind_the_same_address_is_asked_what_it_has() {
        let mut uplink = ready(1, 8);
        let epoch = expect(next(&mut uplink, 0, 10, true), send(9));
        uplink.acked(Some(&traffic()), epoch, &acks("b", 10, 0));
        let epoch = expect(next(&mut uplink, 0, 10, true), positions(0));
        uplink.acked(None, epoch, &acks("b", 2, 0));
        expect(next(&mut uplink, 0, 10, true), send(3));
    }

    #[test]
    fn a_node_that_tells_positions_and_takes_nothing_is_asked_less_and_less_often() {
        let mut uplink = ready(1, 8);
        let mut now_ms = 0;
        for gap in [100, 200, 400, 800] {
            let epoch = expect(next(&mut uplink, now_ms, 10, false), send(9));
            assert_eq!(uplink.committed(&acks("a", 8, 3))[0].1.seq, Seq(3));
            uplink.failed(Some(&traffic()), epoch, &Failure::Link, now_ms, 1.0);
            expect(next(&mut uplink, now_ms, 10, false), wait(now_ms + gap));
            now_ms += gap;
            let epoch = expect(next(&mut uplink, now_ms, 10, false), positions(0));
            uplink.acked(None, epoch, &acks("a", 8, 3));
        }
        let epoch = expect(next(&mut uplink, now_ms, 10, false), send(9));
        uplink.acked(Some(&traffic()), epoch, &acks("a", 10, 3));
        let epoch = expect(next(&mut uplink, now_ms, 10, true), send(11));
        uplink.failed(Some(&traffic()), epoch, &Failure::Link, now_ms, 1.0);
        expect(next(&mut uplink, now_ms, 11, false), wait(now_ms + BACKOFF_MIN_MS));
    }

    #[test]
    fn a_gap_is_filled_from_the_number_that_is_expected() {
        let mut uplink = ready(1, 7);
        let epoch = expect(next(&mut uplink, 0, 9, false), send(8));
        uplink.failed(Some(&traffic()), epoch, &Failure::Gap { expected: Seq(4) }, 0, 0.0);
        let epoch = expect(next(&mut uplink, 0, 9, false), send(4));
        uplink.failed(Some(&traffic()), epoch, &Failure::PushedBack { retry_after_ms: 50 }, 0, 0.0);
        expect(next(&mut uplink, 0, 9, false), wait(50));
        expect(next(&mut uplink, 50, 9, false), send(4));
    }
}
