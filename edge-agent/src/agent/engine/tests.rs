mod change;
mod clock;
mod disk;
mod forerun;
mod links;
mod torn;

use std::os::unix::fs::symlink;

use tokio::runtime::Runtime;
use wire::Mark;

use super::super::Recovered;
use super::*;
use crate::clock::{Machine, Time};
use crate::config::Settings;
use crate::entry::{Message, Payload};
use crate::uplink::link::Link;
use crate::uplink::state::Failure;

const PATIENCE: Duration = Duration::from_secs(60);
/// How long a full journal is given to have room again.
const FULL_PATIENCE: Duration = Duration::from_millis(500);

/// An engine that is driven turn by turn; its cloud does not answer.
struct Driven {
    engine: Engine,
    sender: JournalSender,
    /// The engine's requests run on it.
    runtime: Runtime,
}

fn settings(directory: &Path, more: &str) -> Settings {
    Settings::parse(&text(directory, more)).unwrap()
}

fn text(directory: &Path, more: &str) -> String {
    format!(
        "[edge]\nid = \"e\"\ndata_dir = {directory:?}\n[cloud]\nurls = [\"http://127.0.0.1:9\"]\ntoken = \"t\"\n\
         [[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\ntopics = [\"#\"]\nstream = \"s\"\nmax_payload = \"16KiB\"\n\
         [source.map]\ndevice = \"const:d\"\nv = \"/v\"\n[stream.s.fields]\nv = {{ type = \"int64\" }}\n\
         [clock]\ntrust = \"always\"\n[cut]\nseal_min = \"1ms\"\nseal_max = \"1ms\"\nseal_away = \"1ms\"\n{more}"
    )
}

fn start(settings: &Settings) -> Driven {
    start_by(settings, Box::new(Machine::new()))
}

fn start_by(settings: &Settings, time: Box<dyn Time>) -> Driven {
    // Another test may have done it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = Runtime::new().unwrap();
    let cloud = CloudClient::new(&settings.cloud, &settings.edge.id).unwrap();
    let recovered = Recovered::open(settings, time).unwrap();
    // It closes at once: tests give orders themselves.
    let (_, orders) = mpsc::channel(1);
    let (parts, _) = recovered.into_parts(settings, cloud, Arc::default(), orders);
    let sender = parts.journal.sender();
    Driven { engine: Engine::new(parts, runtime.handle().clone()), sender, runtime }
}

impl Driven {
    /// A message of the source `s`; false when the journal is full.
    fn message(&mut self, payload: &str) -> bool {
        let payload = Payload::Whole(Bytes::copy_from_slice(payload.as_bytes()));
        let (topic, arrival_us) = ("t".to_owned(), 1_700_000_000_000_000);
        let message = Message { source: "s".to_owned(), topic, payload, arrival_us, delivery: None };
        let Ok(ticket) = self.sender.try_append(&Entry::Message(message)) else { return false };
        let mut durable = self.sender.durable();
        let (begun, journal) = (Instant::now(), &self.engine.parts.journal);
        self.runtime.block_on(async {
            while *durable.borrow_and_update() < ticket {
                let patience = if journal.is_full() { FULL_PATIENCE } else { PATIENCE };
                if begun.elapsed() > patience {
                    return false;
                }
                let _ = tokio::time::timeout(Duration::from_millis(10), durable.changed()).await;
            }
            true
        })
    }

    /// Turns until all that is journalled is cut.
    fn settle(&mut self) {
        loop {
            self.engine.turn().unwrap();
            let parts = &self.engine.parts;
            let all = parts.pipeline.position() >= *parts.journal.synced().borrow();
            if (all || parts.snapshot.needed) && self.engine.next.is_none() && parts.pipeline.pending_rows() == 0 {
                return;
            }
        }
    }

    fn status(&mut self) -> Status {
        self.engine.publish();
        self.engine.parts.status.lock().clone()
    }

    /// A number for a batch of the stream `s`, as if it were being sent; returns its mark.
    fn number(&mut self) -> Mark {
        assert!(self.message("{\"v\":1}"));
        self.settle();
        let (stream, lane) = ("s".parse().unwrap(), 1);
        let sent = self.engine.parts.spool.number(lane, &stream, usize::MAX).unwrap();
        let last = sent.last().unwrap();
        Mark { seq: last.header().seq, crc: last.crc() }
    }

    /// An answer to a request of the stream that began now.
    fn answer(&self, stream: &str, failure: Failure) -> Answer {
        let stream: StreamName = stream.parse().unwrap();
        let spool = &self.engine.parts.spool;
        let (freed, spool) = (spool.freed(&stream).seq, spool.id());
        let result = Err(Failed { failure, text: "no".to_owned(), acks: None });
        let of = Of { stream: Some(stream), epoch: 0, spool, freed, lane: 1, bytes: 0, probe: false };
        Answer { of, elapsed: Duration::ZERO, result }
    }

    /// An answer to the question where the cloud stands.
    fn stands(&self) -> Answer {
        let of = Of { stream: None, freed: Seq(0), ..self.answer("s", Failure::Link).of };
        Answer { of, elapsed: Duration::ZERO, result: Ok(Acks::default()) }
    }

    fn answered(&mut self, answer: Answer) {
        self.engine.in_flight += 1;
        self.engine.answered(answer).unwrap();
    }

    fn stop(self) {
        self.engine.parts.journal.stop();
    }
}

#[test]
fn what_the_cloud_refused_is_told_until_it_takes_something() {
    let directory = tempfile::tempdir().unwrap();
    let mut driven = start(&settings(directory.path(), ""));
    let pushed = Failure::PushedBack { retry_after_ms: 1 };
    driven.answered(driven.answer("s", pushed));
    for _ in 0..2 {
        assert_eq!(driven.status().uplink.last_error.as_deref(), Some("no"));
        driven.answered(driven.stands());
    }
    let taken = Answer { result: Ok(Acks::default()), ..driven.answer("s", Failure::Link) };
    driven.answered(taken);
    assert_eq!(driven.status().uplink.last_error, None);
    // What the question itself was refused for ends with its answer.
    let refused = Answer { result: driven.answer("s", Failure::Link).result, ..driven.stands() };
    driven.answered(refused);
    assert_eq!(driven.status().uplink.last_error.as_deref(), Some("no"));
    driven.answered(driven.stands());
    assert_eq!(driven.status().uplink.last_error, None);
    driven.stop();
}

#[test]
fn a_small_journal_is_freed_before_it_is_full() {
    let directory = tempfile::tempdir().unwrap();
    let more = "[journal]\nsegment_bytes = \"64KiB\"\nmax_bytes = \"128KiB\"\n";
    let mut driven = start(&settings(directory.path(), more));
    let payload = format!("{{\"v\":1,\"x\":\"{}\"}}", "x".repeat(8 << 10));
    for message in 0..100 {
        assert!(driven.message(&payload), "message {message} finds no room");
        driven.settle();
    }
    driven.stop();
}

#[test]
fn windows_that_are_larger_than_the_journal_do_not_fill_it() {
    let directory = tempfile::tempdir().unwrap();
    let more = "[journal]\nsegment_bytes = \"64KiB\"\nmax_bytes = \"128KiB\"\n";
    let mut driven = start(&settings(directory.path(), more));
    driven.engine.parts.snapshot.bytes = 64 << 20;
    let payload = format!("{{\"v\":1,\"x\":\"{}\"}}", "x".repeat(8 << 10));
    while driven.message(&payload) {}
    assert!(driven.engine.parts.journal.is_full());
    let until = Instant::now() + Duration::from_secs(5);
    while !driven.message("{}") {
        assert!(Instant::now() < until, "a full journal waits for a snapshot that is never due");
        driven.settle();
    }
    driven.stop();
}

#[test]
fn a_snapshot_that_finds_no_room_leaves_the_old_one_and_is_tried_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut driven = start(&settings(directory.path(), ""));
    let file = || std::fs::read(directory.path().join("snapshot")).unwrap();
    let before = file();
    assert!(driven.message("{\"v\":1}"));
    driven.settle();
    symlink("/dev/full", directory.path().join("snapshot.new")).unwrap();
    driven.engine.snapshot().unwrap();
    assert_eq!(file(), before);
    assert_eq!(driven.engine.parts.snapshot.position, Position(0));
    assert!(driven.status().problems[0].contains("no room for a snapshot"), "{:?}", driven.status().problems);
    driven.engine.snapshot().unwrap();
    assert_ne!(file(), before);
    assert_eq!(driven.status().problems, [""; 0]);
    driven.stop();
}

#[test]
fn a_start_on_a_full_disk_goes_on_unless_lanes_have_changed() {
    let directory = tempfile::tempdir().unwrap();
    let fill = || symlink("/dev/full", directory.path().join("snapshot.new")).unwrap();
    start(&settings(directory.path(), "")).stop();
    fill();
    let mut driven = start(&settings(directory.path(), ""));
    assert!(driven.message("{\"v\":1}"));
    driven.settle();
    assert_eq!(driven.status().rows.spooled, 1);
    driven.stop();
    // The stream moved: a crash after its first cut would find it in no lane, or in two.
    let mut driven = start(&settings(directory.path(), "[[lane]]\nname = \"other\"\nstreams = [\"s\"]\n"));
    assert!(driven.message("{\"v\":2}"));
    fill();
    driven.settle();
    let needed = driven.engine.parts.snapshot;
    driven.engine.no_snapshot = Some(("held back".to_owned(), Instant::now() + Duration::from_secs(60)));
    driven.settle();
    assert_eq!((needed.needed, driven.status().rows.spooled), (true, 1));
    driven.engine.no_snapshot = None;
    driven.settle();
    driven.settle();
    assert_eq!(driven.status().rows.spooled, 2);
    driven.stop();
}

#[test]
fn several_answers_of_one_fork_fork_once() {
    let directory = tempfile::tempdir().unwrap();
    let mut driven = start(&settings(directory.path(), ""));
    driven.number();
    let old = driven.engine.parts.spool.id();
    let answers = ["s", "quarantine", "losses"].map(|stream| driven.answer(stream, Failure::Forked));
    answers.into_iter().for_each(|answer| driven.answered(answer));
    assert_ne!(driven.engine.parts.spool.id(), old);
    assert_eq!(driven.status().incidents.len(), 1, "{:?}", driven.status().incidents);
    driven.stop();
}

#[test]
fn a_cloud_that_lost_what_it_committed_gets_the_rest_in_a_new_spool() {
    let directory = tempfile::tempdir().unwrap();
    let mut driven = start(&settings(directory.path(), ""));
    let (stream, first) = ("s".parse().unwrap(), driven.number());
    let second = driven.number();
    // An older answer that comes after the commit is no loss.
    let late = driven.answer("s", Failure::Gap { expected: first.seq });
    driven.engine.parts.spool.free(&stream, first).unwrap();
    driven.answered(late);
    let old = driven.engine.parts.spool.id();
    assert_eq!(driven.status().incidents, [""; 0]);
    let gap = driven.answer("s", Failure::Gap { expected: first.seq });
    driven.engine.known.insert(stream.clone(), second.seq);
    driven.answered(gap);
    assert_ne!(driven.engine.parts.spool.id(), old);
    let status = driven.status();
    assert!(status.incidents[0].contains("lost batches 1 to 1 of s"), "{:?}", status.incidents);
    assert_eq!((status.rows.committed, status.rows.spooled), (1, 1));
    let spool = &mut driven.engine.parts.spool;
    let schema = settings(directory.path(), "").stream[&stream].schema();
    let batch = spool.number(1, &stream, usize::MAX).unwrap().remove(0);
    assert_eq!(batch.header().seq, Seq(1));
    let rows = batch.decode(&schema).unwrap();
    let quality = rows.columns().last().unwrap();
    assert_eq!(arrow_array::cast::AsArray::as_string::<i32>(quality).value(0), "good", "the cloud does not have it");
    driven.stop();
}

#[test]
fn nothing_is_sent_while_a_new_spool_finds_no_room() {
    let directory = tempfile::tempdir().unwrap();
    let mut driven = start(&settings(directory.path(), ""));
    driven.number();
    let old = driven.engine.parts.spool.id();
    driven.engine.forking = Some(Instant::now() + Duration::from_secs(60));
    // One that would ask at once.
    driven.engine.parts.uplink = Uplink::new(old, 1, Link::new(1 << 20, &[None, None]));
    let before = driven.engine.in_flight;
    driven.engine.go_on_forking().unwrap();
    driven.engine.send().unwrap();
    assert_eq!((driven.engine.in_flight, driven.engine.parts.spool.id()), (before, old));
    assert!(driven.status().problems[0].contains("nothing is sent"), "{:?}", driven.status().problems);
    let answer = driven.answer("s", Failure::Forked);
    driven.answered(answer);
    assert_eq!(driven.status().incidents, [""; 0], "it is known already");
    driven.engine.forking = Some(Instant::now());
    driven.engine.turn().unwrap();
    assert_ne!(driven.engine.parts.spool.id(), old);
    assert_eq!(driven.status().problems, [""; 0]);
    driven.stop();
}

#[test]
fn a_stream_and_a_lane_tell_their_rate_lag_and_last_error() {
    let directory = tempfile::tempdir().unwrap();
    let mut driven = start(&settings(directory.path(), ""));
    let lane = driven.status().lanes[1].bytes_written;
    assert!(driven.message("{\"v\":1}") && driven.message("{\"v\":\"x\"}") && driven.message("{\"v\":2}"));
    driven.settle();
    // As if that had taken six seconds.
    driven.engine.rates.back_date(Duration::from_secs(6));
    let status = driven.status();
    let stream = status.streams.iter().find(|stream| stream.name == "s").unwrap();
    assert!(stream.rate > 0.0 && stream.uncommitted == 2, "{stream:?}");
    assert!(stream.last_error.as_ref().unwrap().starts_with("wrong_type: "), "{stream:?}");
    let behind = (driven.engine.parts.journal.clock().best_us() - stream.watermark_us.unwrap()) as f64 / 1e6;
    assert!((stream.lag_s.unwrap() - behind).abs() < 60.0, "{stream:?}");
    let quarantine = status.streams.iter().find(|stream| stream.name == "quarantine").unwrap();
    assert!(quarantine.rate > 0.0 && quarantine.rate < stream.rate, "{quarantine:?}");
    assert_eq!((quarantine.uncommitted, quarantine.lag_s), (1, None));
    assert!(status.lanes[1].bytes_written > lane && status.lanes[1].rate > 0.0, "{:?}", status.lanes);
    let metrics = crate::metrics::render(&status);
    assert!(metrics.contains("weir_edge_stream_rows_uncommitted{stream=\"s\"} 2"), "{metrics}");
    driven.stop();
}

#[test]
fn a_node_that_nobody_knows_is_asked_for_its_birth_once_also_over_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let more = "[[source]]\nkind = \"mqtt\"\nname = \"bus\"\nurl = \"mqtt://h\"\ntopics = [\"spBv1.0/#\"]\nstream = \"s\"\n\
                format = \"sparkplug\"\nmax_payload = \"16KiB\"\n[source.map]\ndevice = \"/id\"\nv = \"/metrics/v\"\n";
    let settings = settings(directory.path(), more);
    let asked = |driven: &Driven| {
        let (_, bus) = driven.engine.parts.sources.iter().find(|(name, _)| name == "bus").unwrap();
        bus.take_commands().into_iter().map(|command| command.topic).collect::<Vec<_>>()
    };
    let mut driven = start(&settings);
    for _ in 0..2 {
        // A time, and nothing else.
        let payload = Payload::Whole(Bytes::from_static(&[8, 1]));
        let (source, topic, arrival_us) = ("bus".to_owned(), "spBv1.0/g/NDATA/n".to_owned(), 1_700_000_000_000_000);
        let message = Entry::Message(Message { source, topic, payload, arrival_us, delivery: None });
        let ticket = driven.sender.try_append(&message).unwrap();
        let mut durable = driven.sender.durable();
        driven.runtime.block_on(durable.wait_for(|durable| *durable >= ticket)).unwrap();
    }
    driven.settle();
    assert_eq!(asked(&driven), ["spBv1.0/g/NCMD/n"]);
    driven.stop();
    for at_once in [false, true] {
        let mut driven = start(&settings);
        if !at_once {
            driven.settle();
        }
        assert!(driven.message("{\"v\":1}"));
        driven.settle();
        assert_eq!(asked(&driven), [""; 0], "the run before has asked: {at_once}");
        driven.stop();
    }
}

/// All files below a directory but those of the spool.
fn files(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for path in std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
        match path.is_dir() {
            true if path.ends_with("spool") => {}
            true => all.extend(files(&path)),
            false => all.push((path.clone(), std::fs::read(&path).unwrap())),
        }
    }
    all
}

/// Rule 6: the rows of entries that the disk lost are in the spool all the same.
#[test]
fn a_lost_tail_of_the_journal_leaves_the_counts_of_rows_in_balance() {
    let directory = tempfile::tempdir().unwrap();
    let settings = settings(directory.path(), "");
    let mut driven = start(&settings);
    driven.message("{\"v\":1}");
    driven.settle();
    driven.stop();
    let before = files(directory.path());
    let mut driven = start(&settings);
    driven.message("{\"v\":2}");
    driven.settle();
    driven.stop();
    for (path, bytes) in before {
        std::fs::write(path, bytes).unwrap();
    }
    let mut driven = start(&settings);
    driven.message("{\"v\":3}");
    driven.settle();
    let status = driven.status();
    assert!(status.incidents.iter().any(|incident| incident.contains("the disk lost")), "{:?}", status.incidents);
    let rows = status.rows;
    assert_eq!((rows.spooled, rows.sealed), (3, 3), "{rows:?}");
    driven.stop();
}
