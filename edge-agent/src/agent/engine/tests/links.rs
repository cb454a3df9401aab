//! An engine and nodes in this process whose links fail in all the ways that links do.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use wire::request::{Frame, Origins, frames, unpack, unpacked_len};
use wire::{RefusedAnswer, RefusedRequest, SealedBatch, StreamAck};

use super::*;

/// What a node's link does to a request.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Harm {
    None,
    /// The connection is closed at once.
    Closed,
    /// It is accepted, and what is sent is never read: only one way is open.
    Unread,
    /// It is read, and there is no answer.
    Silent,
    /// It is taken, and the answer is lost.
    AckLost,
    /// One byte of the answer, and no more.
    Halting,
    /// The answer comes in small pieces.
    Slow,
    /// The answer comes late.
    Late,
    /// It has nothing of what came before.
    Forgetful,
    /// It does not know that a request may be packed.
    Old,
}

/// Of an answer.
const LATE: Duration = Duration::from_millis(150);

/// What all nodes have committed: their tables are the same ones.
#[derive(Debug, Default)]
struct Store {
    batches: HashMap<StreamName, Vec<SealedBatch>>,
    /// The values of stream `s`, request by request.
    requests: Vec<Vec<i64>>,
    /// Of these requests, as they came.
    bytes: usize,
}

#[derive(Debug, Clone)]
struct Node {
    address: SocketAddr,
    harm: Arc<Mutex<Harm>>,
    asked: Arc<Mutex<u64>>,
    store: Arc<Mutex<Store>>,
    origins: Arc<Mutex<Origins>>,
}

impl Node {
    fn start(runtime: &Runtime, store: &Arc<Mutex<Store>>, harm: Harm) -> Self {
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let (harm, asked) = (Arc::new(Mutex::new(harm)), Arc::default());
        let node = Self { address, harm, asked, store: Arc::clone(store), origins: Arc::default() };
        let serving = node.clone();
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serving.clone().serve(stream));
            }
        });
        node
    }

    fn set(&self, harm: Harm) {
        *self.harm.lock() = harm;
    }

    /// One connection; ends when its link is cut, and when the other end closes it.
    async fn serve(self, mut stream: TcpStream) -> Option<()> {
        let mut buffer = Vec::new();
        loop {
            let unread = *self.harm.lock() == Harm::Unread;
            while unread && *self.harm.lock() == Harm::Unread {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let head = loop {
                if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                    break at + 4;
                }
                if stream.read_buf(&mut buffer).await.ok()? == 0 {
                    return None;
                }
            };
            let text = String::from_utf8_lossy(&buffer[..head]).to_lowercase();
            let length = text.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
            // On a small link every header counts.
            let names = text.lines().skip(1).filter_map(|line| Some(line.split_once(':')?.0));
            let known = ["host", "authorization", "content-length", "content-encoding", "accept"];
            assert!(names.clone().all(|name| known.contains(&name)), "{text}");
            while buffer.len() < head + length {
                if stream.read_buf(&mut buffer).await.ok()? == 0 {
                    return None;
                }
            }
            let mut body = Bytes::copy_from_slice(&buffer[head..head + length]);
            buffer.drain(..head + length);
            *self.asked.lock() += 1;
            let harm = *self.harm.lock();
            if harm == Harm::Closed {
                return None;
            }
            if harm == Harm::Silent {
                std::future::pending::<()>().await;
            }
            let is_packed = text.contains("content-encoding: zstd\r\n");
            if is_packed {
                body = unpack(&body, unpacked_len(&body).unwrap() as usize).unwrap();
            }
            if harm == Harm::Forgetful {
                *self.origins.lock() = Origins::default();
            }
            let (status, answer) = match harm {
                Harm::Old if is_packed => ("415 Unsupported Media Type", String::new()),
                _ => self.take(body, length),
            };
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{answer}", answer.len());
            match harm {
                Harm::AckLost => return None,
                Harm::Halting => {
                    stream.write_all(b"H").await.ok()?;
                    std::future::pending::<()>().await;
                }
                Harm::Slow => {
                    // About 40 of them, a millisecond or two apart: well within the time of a request.
                    for piece in answer.as_bytes().chunks(8) {
                        stream.write_all(piece).await.ok()?;
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
                Harm::Late => {
                    tokio::time::sleep(LATE).await;
                    stream.write_all(answer.as_bytes()).await.ok()?;
                }
                _ => stream.write_all(answer.as_bytes()).await.ok()?,
            }
        }
    }

    fn take(&self, body: Bytes, bytes: usize) -> (&'static str, String) {
        let store = &mut *self.store.lock();
        let mut values = Vec::new();
        for frame in frames(body).unwrap() {
            let bytes = match frame {
                Frame::Schema(_) => continue,
                Frame::Batch(bytes) => bytes,
                Frame::Rest(origin, rest) => match self.origins.lock().whole(&"e".parse().unwrap(), origin, &rest) {
                    Some(bytes) => bytes,
                    None => return ("412 Precondition Failed", String::new()),
                },
            };
            let batch = SealedBatch::parse(bytes).unwrap();
            self.origins.lock().learn(&batch);
            let (stream, seq) = (batch.header().stream.clone(), batch.header().seq);
            let taken = store.batches.entry(stream.clone()).or_default();
            let expected = Seq(taken.len() as u64 + 1);
            if seq > expected {
                let refused = RefusedRequest::Gap { spool: batch.header().spool, stream, expected, got: seq };
                return ("409 Conflict", serde_json::to_string(&RefusedAnswer::from(refused)).unwrap());
            }
            if seq < expected {
                assert_eq!(taken[seq.0 as usize - 1], batch, "one number, two contents");
                continue;
            }
            values.extend(Self::values(&batch));
            taken.push(batch);
        }
        if !values.is_empty() {
            store.requests.push(values);
            store.bytes += bytes;
        }
        let ack = |(stream, batches): (&StreamName, &Vec<SealedBatch>)| {
            let last = batches.last()?;
            let mark = Mark { seq: last.header().seq, crc: last.crc() };
            Some(StreamAck { spool: last.header().spool, stream: stream.clone(), durable: mark, committed: mark })
        };
        let acks = store.batches.iter().filter_map(ack).collect();
        let acks = Acks { node: self.address.to_string(), acks, refused: Vec::new() };
        ("200 OK", serde_json::to_string(&acks).unwrap())
    }

    fn values(batch: &SealedBatch) -> Vec<i64> {
        if batch.header().stream.as_str() != "s" {
            return Vec::new();
        }
        let schema = settings(Path::new("unused"), "").stream[&batch.header().stream].schema();
        let rows = batch.decode(&schema).unwrap();
        arrow_array::cast::AsArray::as_primitive::<arrow_array::types::Int64Type>(rows.column(2)).values().to_vec()
    }
}

/// An engine whose clouds are these nodes; a request may take 300 ms.
fn linked(directory: &Path, nodes: &[&Node], more: &str) -> Driven {
    start(&Settings::parse(&linked_text(directory, nodes, more)).unwrap())
}

fn linked_text(directory: &Path, nodes: &[&Node], more: &str) -> String {
    let urls = nodes.iter().map(|node| format!("\"http://{}\"", node.address)).collect::<Vec<_>>().join(", ");
    text(directory, more)
        .replace("\"http://127.0.0.1:9\"", &urls)
        .replace("token = \"t\"", "token = \"t\"\ntimeout = \"300ms\"\nrequest_bytes = \"4KiB\"")
}

impl Driven {
    /// Turns until something holds; no turn waits for the network.
    #[track_caller]
    fn turn_until(&mut self, what: &str, mut holds: impl FnMut(&mut Self) -> bool) {
        let never = CancellationToken::new();
        let mut synced = self.engine.parts.journal.synced();
        let until = Instant::now() + Duration::from_secs(60);
        while !holds(self) {
            assert!(Instant::now() < until, "in a minute not: {what}; {:?}", self.status());
            let wait = self.engine.turn().unwrap();
            self.engine.wait(&mut synced, &never, wait.min(Duration::from_millis(20)));
        }
    }

    fn values(&mut self, values: std::ops::Range<i64>) {
        for value in values {
            assert!(self.message(&format!("{{\"v\":{value}}}")));
            self.settle();
        }
    }

    #[track_caller]
    fn drain(&mut self) {
        self.turn_until("drained", |driven| driven.status().drained);
        let rows = self.status().rows;
        assert_eq!((rows.sealed, rows.lost, rows.voided), (rows.committed, 0, 0), "{rows:?}");
    }
}

/// All values once, in whatever order.
#[track_caller]
fn expect_once(store: &Mutex<Store>, until: i64, of: &str) {
    let mut values = store.lock().requests.concat();
    values.sort_unstable();
    assert_eq!(values, (0..until).collect::<Vec<_>>(), "{of}");
}

#[test]
fn whatever_a_link_does_all_arrives_once_when_it_is_well() {
    for harm in [Harm::Closed, Harm::Unread, Harm::Silent, Harm::AckLost, Harm::Halting, Harm::Slow] {
        let (directory, helper, store) = (tempfile::tempdir().unwrap(), Runtime::new().unwrap(), Arc::default());
        let node = Node::start(&helper, &store, Harm::None);
        let mut driven = linked(directory.path(), &[&node], "");
        driven.values(0..5);
        driven.turn_until("the node is known", |driven| driven.engine.parts.uplink.node().0.is_some());
        node.set(harm);
        driven.values(5..20);
        if harm != Harm::Slow {
            driven.turn_until("it is noticed", |driven| driven.engine.last_error.is_some());
            // Without a link all goes on up to the spool.
            driven.values(20..25);
            let status = driven.status();
            assert!(status.rows.sealed == 25 && status.rows.spooled > 0, "{harm:?}: {status:?}");
            node.set(Harm::None);
            driven.values(25..30);
        } else {
            driven.values(20..30);
        }
        driven.drain();
        expect_once(&store, 30, &format!("{harm:?}"));
        driven.stop();
    }
}

#[test]
fn a_link_that_flaps_loses_and_doubles_nothing() {
    let (directory, helper, store) = (tempfile::tempdir().unwrap(), Runtime::new().unwrap(), Arc::default());
    let node = Node::start(&helper, &store, Harm::None);
    let mut driven = linked(directory.path(), &[&node], "");
    let harms = [Harm::AckLost, Harm::None, Harm::Closed, Harm::None, Harm::Halting, Harm::AckLost];
    for round in 0..12 {
        node.set(harms[round % harms.len()]);
        let asked = *node.asked.lock();
        let value = round as i64 * 3;
        driven.values(value..value + 3);
        driven.turn_until("the node was asked", |_| *node.asked.lock() > asked);
    }
    node.set(Harm::None);
    driven.drain();
    expect_once(&store, 36, "flapping");
    driven.stop();
}

#[test]
fn the_next_address_takes_over_and_the_preferred_one_gets_back() {
    for harm in [Harm::Closed, Harm::Unread, Harm::Silent, Harm::AckLost] {
        let (directory, helper, store) = (tempfile::tempdir().unwrap(), Runtime::new().unwrap(), Arc::default());
        let nodes = [harm, Harm::None].map(|harm| Node::start(&helper, &store, harm));
        let mut driven = linked(directory.path(), &[&nodes[0], &nodes[1]], "");
        driven.values(0..10);
        driven.drain();
        let node = |driven: &Driven| driven.engine.parts.uplink.node().1;
        if harm != Harm::AckLost {
            assert_eq!(node(&driven), 1, "{harm:?}");
        }
        // It is asked beside all else, and left alone as long as it does not answer.
        driven.engine.started -= Duration::from_secs(31);
        let asked = *nodes[0].asked.lock();
        driven.values(10..20);
        driven.drain();
        assert_eq!(node(&driven), 1, "{harm:?}");
        driven.turn_until("it has not answered", |driven| driven.engine.in_flight == 0);
        nodes[0].set(Harm::None);
        driven.engine.started -= Duration::from_secs(301);
        driven.turn_until("the preferred one is back", |driven| driven.engine.parts.uplink.node().1 == 0);
        driven.values(20..30);
        driven.drain();
        assert!(*nodes[0].asked.lock() > asked, "{harm:?}");
        expect_once(&store, 30, &format!("{harm:?}"));
        driven.stop();
    }
}

#[test]
fn what_comes_after_an_outage_is_sent_before_the_backlog() {
    let (directory, helper, store) = (tempfile::tempdir().unwrap(), Runtime::new().unwrap(), Arc::default());
    let node = Node::start(&helper, &store, Harm::Closed);
    let lanes = "[[lane]]\nname = \"urgent\"\nstreams = [\"quarantine\"]\npriority = 1\n";
    let mut driven = linked(directory.path(), &[&node], lanes);
    driven.values(0..300);
    let backlog = driven.status().lanes.iter().map(|lane| lane.batches_waiting).sum::<u64>();
    assert!(backlog > 250, "{backlog} batches");
    node.set(Harm::None);
    let requests = |store: &Mutex<Store>| store.lock().requests.len();
    driven.turn_until("the backlog drains", |_| requests(&store) > 1);
    for live in 300..305 {
        let before = requests(&store);
        assert!(driven.message(&format!("{{\"v\":{live}}}")));
        driven.turn_until("it has arrived", |_| store.lock().requests.concat().contains(&live));
        let store = store.lock();
        let at = store.requests.iter().position(|values| values.contains(&live)).unwrap();
        assert!(at <= before + 2, "{live} was in request {at}, and {before} were there when it came");
        assert!(store.requests.concat().len() < 300, "nothing of the backlog was left");
    }
    driven.drain();
    expect_once(&store, 305, "live");
    driven.stop();
}

#[test]
fn a_lane_with_a_bandwidth_keeps_to_it_and_the_others_do_not_wait() {
    let (directory, helper, store) = (tempfile::tempdir().unwrap(), Runtime::new().unwrap(), Arc::default());
    let node = Node::start(&helper, &store, Harm::Closed);
    let lanes = "[[lane]]\nname = \"rest\"\nstreams = []\npriority = 9\nbandwidth = \"512B\"\n";
    let mut driven = linked(directory.path(), &[&node], lanes);
    driven.values(0..60);
    node.set(Harm::None);
    let begun = Instant::now();
    driven.turn_until("some of it has arrived", |_| store.lock().requests.concat().len() > 10);
    // Payloads that do not decode go into another lane.
    assert!(driven.message("no JSON"));
    let quarantine = "quarantine".parse().unwrap();
    driven.turn_until("it has arrived", |_| store.lock().batches.contains_key(&quarantine));
    assert!(store.lock().requests.concat().len() < 60, "it waited for the lane behind it");
    driven.drain();
    let bytes = store.lock().bytes;
    assert!(bytes > 2 * 512, "{bytes} bytes");
    let least = Duration::from_secs_f64((bytes as f64 - 2.0 * 512.0) / 512.0);
    assert!(begun.elapsed() >= least, "{bytes} bytes in {:?}", begun.elapsed());
    driven.stop();
}

#[test]
fn a_node_without_memory_or_of_another_time_gets_requests_that_it_can_read() {
    for harm in [Harm::Forgetful, Harm::Old] {
        let (directory, helper, store) = (tempfile::tempdir().unwrap(), Runtime::new().unwrap(), Arc::default());
        let node = Node::start(&helper, &store, harm);
        let mut driven = linked(directory.path(), &[&node], "");
        // Without an answer they become many in one request, which is then packed.
        node.set(Harm::Closed);
        driven.values(0..30);
        node.set(harm);
        driven.drain();
        for value in 30..35 {
            driven.values(value..value + 1);
            driven.drain();
        }
        expect_once(&store, 35, &format!("{harm:?}"));
        driven.stop();
    }
}

#[test]
fn a_slow_link_gets_larger_batches() {
    const VALUES: i64 = 100;
    const EVERY: Duration = Duration::from_millis(5);
    let batches = |harm| {
        let (directory, helper, store) = (tempfile::tempdir().unwrap(), Runtime::new().unwrap(), Arc::default());
        let node = Node::start(&helper, &store, harm);
        // As configs/edge.toml has it.
        let text = linked_text(directory.path(), &[&node], "").replace("seal_away = \"1ms\"", "seal_away = \"10s\"");
        let mut driven = start(&Settings::parse(&text).unwrap());
        driven.turn_until("the node is known", |driven| driven.engine.parts.uplink.node().0.is_some());
        for value in 0..VALUES {
            let (begun, mut turns) = (Instant::now(), 0);
            assert!(driven.message(&format!("{{\"v\":{value}}}")));
            driven.turn_until("the next one is due", |_| {
                turns += 1;
                turns > 2 && begun.elapsed() >= EVERY
            });
        }
        driven.drain();
        expect_once(&store, VALUES, &format!("{harm:?}"));
        driven.stop();
        store.lock().batches[&"s".parse().unwrap()].len()
    };
    let (fast, slow) = (batches(Harm::None), batches(Harm::Late));
    assert!(2 * slow < fast, "{fast} batches, {slow} on a slow link");
}
