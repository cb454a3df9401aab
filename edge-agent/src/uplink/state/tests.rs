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
    uplink.next(now_ms, [candidate(&traffic(), head, waiting)].into_iter())
}

fn candidate(stream: &StreamName, head: u64, waiting: bool) -> Candidate<'_> {
    Candidate { lane: 0, stream, head: Seq(head), waiting, live: false }
}

fn send(from: u64) -> impl Fn(&Action) -> bool {
    move |action| matches!(action, Action::Send { from: sent, .. } if sent.0 == from)
}

#[track_caller]
fn expect(action: Action, wanted: impl Fn(&Action) -> bool) -> u64 {
    assert!(wanted(&action), "{action:?}");
    match action {
        Action::Positions { epoch, .. } | Action::Send { epoch, .. } => epoch,
        Action::Wait { .. } | Action::Probe { .. } => u64::MAX,
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
    let mut uplink = Uplink::new(SPOOL, urls, Link::new(1 << 20, &[None]));
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
    let quiet = traffic();
    let (mut asked, mut head) = (Vec::new(), 0);
    for now_ms in (0..40_000).step_by(100) {
        // One stream always has something in flight; the other is durable and waits for its commit.
        let candidates = [candidate(&busy, head, true), candidate(&quiet, 10, false)];
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
            other => panic!("{other:?}"),
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
    let candidates = [candidate(&other, 3, false)];
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

#[test]
fn the_preferred_address_is_returned_to_when_it_answers() {
    let mut uplink = ready(2, 0);
    let epoch = expect(next(&mut uplink, 0, 1, false), send(1));
    uplink.failed(Some(&traffic()), epoch, &Failure::Link, 0, 1.0);
    let epoch = expect(next(&mut uplink, 100, 1, false), positions(1));
    uplink.acked(None, epoch, &acks("b", 0, 0));
    let epoch = expect(next(&mut uplink, 100, 1, false), send(1));
    uplink.acked(Some(&traffic()), epoch, &acks("b", 1, 1));
    let probe = |action: &Action| *action == Action::Probe { url: 0 };
    let mut now_ms = RETURN_MIN_MS;
    // It does not answer: what is sent meanwhile goes on, and it is asked less and less often.
    for wait_ms in [60_000, 120_000, 240_000, RETURN_MAX_MS, RETURN_MAX_MS] {
        assert_eq!(uplink.next(now_ms - 1, std::iter::empty()), Action::Wait { until_ms: now_ms });
        expect(uplink.next(now_ms, std::iter::empty()), probe);
        let head = uplink.turn;
        let epoch = expect(next(&mut uplink, now_ms, head, true), send(head));
        uplink.acked(Some(&traffic()), epoch, &acks("b", head, head));
        uplink.probed(false, now_ms);
        now_ms += wait_ms;
    }
    expect(uplink.next(now_ms, std::iter::empty()), probe);
    uplink.probed(true, now_ms);
    let epoch = expect(next(&mut uplink, now_ms, 9, true), positions(0));
    uplink.acked(None, epoch, &acks("a", 0, 0));
    // It tells its positions and takes nothing: the next return is as far away as the last.
    let epoch = expect(next(&mut uplink, now_ms, 9, true), send(1));
    uplink.failed(Some(&traffic()), epoch, &Failure::Link, now_ms, 1.0);
    assert_eq!(uplink.return_at_ms, now_ms + RETURN_MAX_MS);
}

#[test]
fn lanes_go_by_priority_and_streams_of_a_lane_take_turns() {
    let mut uplink = ready(1, 0);
    uplink.link = Link::new(16 << 10, &[None, None]);
    let names = ["a", "b", "alerts"].map(|name| name.parse::<StreamName>().unwrap());
    let mut order = Vec::new();
    for _ in 0..4 {
        let candidates = names.iter().enumerate().map(|(at, stream)| Candidate {
            lane: usize::from(at < 2),
            stream,
            head: Seq(0),
            waiting: at < 2 || order.len() == 2,
            live: false,
        });
        let Action::Send { stream, lane, bytes_max, epoch, .. } = uplink.next(0, candidates.clone()) else {
            panic!("nothing is sent")
        };
        uplink.link.sent(lane, bytes_max);
        if lane == 1 {
            assert_eq!(uplink.next(0, candidates), Action::Wait { until_ms: ASK_MAX_MS }, "no room for another");
        }
        uplink.link.landed(lane, bytes_max, 1.0, true, 0);
        let mut answer = acks("n", 0, 0);
        answer.node = "a".into();
        uplink.acked(Some(&stream), epoch, &answer);
        order.push(stream.to_string());
    }
    assert_eq!(order, ["a", "b", "alerts", "a"]);
}
