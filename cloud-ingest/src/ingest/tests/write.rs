//! What the doors of a node were sent: exactly once over power cuts, a damaged WAL, and a table that cannot be opened.

use wire::schema::own;
use wire::{FieldName, named};

use super::*;
use crate::doors::rows::{Cell, Gathered};
use crate::doors::{gathering, request_id};
use crate::ingest::write::{Writing, Written};
use crate::repeats::WriteId;

/// A request that may be sent again and again.
struct Sent {
    batches: Vec<(WriteId, Gathered)>,
    durable: bool,
}

/// Request `n`: rows of one or two streams, their field now an integer and now a float.
fn request(n: u64, streams: &[&str]) -> Sent {
    let mut rows = gathering("test", 1 << 20);
    let field: FieldName = named::field("v");
    for stream in &streams[..1 + (n as usize) % streams.len()] {
        for row in 0..rows_of(n) {
            let value = if (n + row).is_multiple_of(5) { Cell::Int(n as i64) } else { Cell::Float(n as f64) };
            let ts = TS_MIN_US + (n * 1_000 + row) as i64;
            rows.add(&named::stream(stream), ts, Some("d"), [(&field, value)].into_iter()).unwrap();
        }
    }
    let id = |(index, batch): (usize, Gathered)| {
        (request_id(&[&n.to_le_bytes(), &index.to_le_bytes(), streams[0].as_bytes()]), batch)
    };
    Sent { batches: rows.finish().unwrap().into_iter().enumerate().map(id).collect(), durable: false }
}

impl Sent {
    fn rows(&self, stream: &StreamName) -> u64 {
        let of = self.batches.iter().filter(|(_, batch)| batch.cut.stream == *stream);
        of.map(|(_, batch)| u64::from(batch.cut.rows)).sum()
    }

    fn send(&mut self, node: &mut Node) -> Result<Option<Written>, Fault> {
        let (reply, mut answered) = oneshot::channel();
        let _place = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let batches = self.batches.iter().cloned().map(|(id, batch)| (Some(id), batch)).collect();
        let writing = Box::new(Writing::new("gw".parse().unwrap(), batches, reply));
        node.jobs.send(Job::Write { writing, _place }).unwrap();
        loop {
            node.ingest.turn()?;
            match answered.try_recv() {
                Ok(Ok(written)) => {
                    let all = self.batches.iter().map(|(_, batch)| u64::from(batch.cut.rows)).sum::<u64>();
                    assert_eq!(written.rows + written.repeated, all);
                    self.durable = true;
                    return Ok(Some(written));
                }
                Ok(Err(RefusedRequest::PushedBack { .. })) => return Ok(None),
                Ok(Err(other)) => panic!("{other}"),
                Err(_) => {}
            }
        }
    }
}

/// Rows that readers see.
fn shown(node: &Node, layer: &SimLayer, stream: &str) -> u64 {
    let Some(state) = node.catalogue.state(&stream.parse().unwrap()) else { return 0 };
    let HotAnswer::Rows(parts) = state.hot.answer(state.snapshot.version, state.snapshot.version) else {
        panic!("the newest version is always answered for");
    };
    let hot = parts.iter().map(|part| part.rows.num_rows() as u64).sum::<u64>();
    hot + rows_on_disk(layer, &stream.parse().unwrap(), &state.snapshot).unwrap_or(0)
}

const STREAMS: [&str; 2] = ["traffic", "noise"];

fn check(node: &Node, layer: &SimLayer, requests: &[Sent]) {
    for stream in STREAMS {
        let name = stream.parse().unwrap();
        let sum = |durable: bool| {
            requests.iter().filter(|sent| sent.durable || !durable).map(|sent| sent.rows(&name)).sum::<u64>()
        };
        let shown = shown(node, layer, stream);
        assert!((sum(true)..=sum(false)).contains(&shown), "{stream}: {shown} of {}..={}", sum(true), sum(false));
    }
}

#[test]
fn what_a_door_took_is_there_once_after_power_cuts_and_repetitions() {
    let mut repeated = 0;
    for (_, mut random) in seeds(60) {
        let layer = machine();
        let mut requests: Vec<Sent> = Vec::new();
        for _ in 0..5 {
            layer.fail_after(random.below(250));
            let node = sim_store(&layer).ok().and_then(|store| Node::start(&layer, settings("/a"), store).ok());
            if let Some(mut node) = node {
                check(&node, &layer, &requests);
                for _ in 0..8 {
                    if requests.is_empty() || random.one_in(2) {
                        requests.push(request(requests.len() as u64, &STREAMS));
                    }
                    // One that was answered as likely as one that was not.
                    let index = random.below(requests.len() as u64) as usize;
                    match requests[index].send(&mut node) {
                        Ok(written) => repeated += written.map_or(0, |written| written.repeated),
                        Err(_) => break,
                    }
                }
            }
            layer.power_cut(&mut random);
        }
        layer.fail_after(u64::MAX);
        let mut node = Node::start(&layer, settings("/a"), sim_store(&layer).unwrap()).unwrap();
        for sent in &mut requests {
            assert!(sent.send(&mut node).unwrap().is_some());
        }
        check(&node, &layer, &requests);
        node.drain();
        drop(node);
        // From the log of repeats alone: the WAL has nothing any more.
        let mut node = Node::start(&layer, settings("/a"), sim_store(&layer).unwrap()).unwrap();
        for sent in &mut requests {
            assert_eq!(sent.send(&mut node).unwrap().unwrap().rows, 0);
        }
        node.drain();
        check(&node, &layer, &requests);
    }
    assert!(repeated > 0);
}

#[test]
fn what_the_wal_no_longer_has_is_still_known_after_a_power_cut() {
    let layer = machine();
    let start = || Node::start(&layer, settings("/a"), sim_store(&layer).unwrap()).unwrap();
    let mut node = start();
    let mut requests: Vec<Sent> = (0..300).map(|n| request(n, &["traffic"])).collect();
    for sent in &mut requests {
        assert!(sent.send(&mut node).unwrap().is_some());
    }
    node.drain();
    let mut replay = node.ingest.wal.replay().unwrap();
    let Some(crate::wal::Found::Batch(oldest)) = replay.next().unwrap() else { panic!("the newest segment stays") };
    assert!(oldest.batch.header().seq.0 > 100, "only {} left the wal", oldest.batch.header().seq);
    drop(node);
    layer.power_cut(&mut Random::new(7));
    let mut node = start();
    for sent in &mut requests {
        assert_eq!(sent.send(&mut node).unwrap().unwrap().rows, 0);
    }
}

fn patient(directory: &str) -> Settings {
    let mut settings = settings(directory);
    settings.commit.max_age = Span(Duration::from_secs(3_600));
    settings
}

#[test]
fn what_follows_a_damaged_part_of_the_wal_is_kept() {
    let layer = machine();
    let start = |settings| Node::start(&layer, settings, sim_store(&layer).unwrap()).unwrap();
    let mut node = start(patient("/a"));
    let mut requests: Vec<Sent> = (0..4).map(|n| request(n, &["traffic"])).collect();
    for sent in &mut requests[..3] {
        assert!(sent.send(&mut node).unwrap().is_some());
    }
    node.ingest.wal.mark().unwrap();
    drop(node);
    let WriteId(id) = requests[1].batches[0].0;
    let segment = layer.list(Path::new("/a/wal")).unwrap().into_iter().find(|name| name.ends_with(".seg")).unwrap();
    let mut found = false;
    layer
        .edit(&Path::new("/a/wal").join(segment), |bytes| {
            if let Some(at) = bytes.windows(16).position(|window| window == id) {
                (bytes[at], found) = (!bytes[at], true);
            }
        })
        .unwrap();
    assert!(found);
    let traffic = "traffic".parse().unwrap();
    let rows = |indices: &[usize]| indices.iter().map(|index| requests[*index].rows(&traffic)).sum::<u64>();
    let (kept, with_next) = (rows(&[0, 2]), rows(&[0, 2, 3]));
    for _ in 0..2 {
        // The second time the void batch is there already.
        let node = start(patient("/a"));
        assert_eq!(shown(&node, &layer, "traffic"), kept);
    }
    let mut node = start(settings("/a"));
    assert!(requests[3].send(&mut node).unwrap().is_some());
    node.drain();
    assert_eq!(shown(&node, &layer, "traffic"), with_next);
}

#[test]
fn rows_whose_table_cannot_be_opened_wait_in_the_wal() {
    let layer = machine();
    let start = |settings| Node::start(&layer, settings, sim_store(&layer).unwrap()).unwrap();
    let mut node = start(settings("/a"));
    let (mut first, mut second) = (request(1, &["bad"]), request(2, &["bad"]));
    assert!(first.send(&mut node).unwrap().is_some());
    node.drain();
    drop(node);
    let mut node = start(patient("/a"));
    assert!(second.send(&mut node).unwrap().is_some());
    drop(node);
    let log = Path::new("/tables/bad/_delta_log/00000000000000000000.json");
    let mut kept = Vec::new();
    layer
        .edit(log, |bytes| {
            kept = bytes.to_vec();
            bytes.fill(b'x');
        })
        .unwrap();
    let mut node = start(settings("/a"));
    assert!(request(3, &["bad"]).send(&mut node).unwrap().is_none(), "its numbers are not known");
    for n in 0..200 {
        assert!(request(n, &["traffic"]).send(&mut node).unwrap().is_some());
    }
    node.drain();
    assert!(node.ingest.wal.bytes() > 0);
    drop(node);
    layer.edit(log, |bytes| bytes.copy_from_slice(&kept)).unwrap();
    let mut node = start(settings("/a"));
    let bad = "bad".parse().unwrap();
    assert_eq!(shown(&node, &layer, "bad"), first.rows(&bad) + second.rows(&bad));
    assert!(request(3, &["bad"]).send(&mut node).unwrap().is_some());
    node.drain();
    let all = first.rows(&bad) + second.rows(&bad) + request(3, &["bad"]).rows(&bad);
    assert_eq!(shown(&node, &layer, "bad"), all);
}

#[test]
fn a_request_is_taken_whole_or_not_at_all() {
    let layer = machine();
    let mut settings = patient("/a");
    settings.hot.max_bytes = Size(64 << 10);
    let mut node = Node::start(&layer, settings, sim_store(&layer).unwrap()).unwrap();
    let mut requests: Vec<Sent> = (0..2_000).map(|n| request(2 * n + 1, &STREAMS)).collect();
    let full = requests.iter_mut().position(|sent| sent.send(&mut node).unwrap().is_none()).expect("it becomes full");
    check(&node, &layer, &requests[..full]);
    let name = |stream: &str| stream.parse::<StreamName>().unwrap();
    let sum = |stream| requests[..full].iter().map(|sent| sent.rows(&name(stream))).sum::<u64>();
    for stream in STREAMS {
        assert_eq!(shown(&node, &layer, stream), sum(stream), "nothing of what was pushed back is there");
    }
    assert_eq!(
        node.ingest.metrics.rows_pushed_back.get(),
        requests[full].batches.iter().map(|(_, batch)| u64::from(batch.cut.rows)).sum::<u64>()
    );
    assert!(node.catalogue.state(&name(own::QUARANTINE)).is_none());
}
