//! A gateway whose clock is wrong: what comes waits in the journal, gets its time, and comes out the same after a crash.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use wire::{CutBatch, StreamSchema};

use super::change::{Rows, add, spooled};
use super::*;
use crate::agent::reload::tests::until;
use crate::clock::tests::{Made, S, TRUE_US};
use crate::clock::{EARLIEST_US, Mark};

const YEARS: i64 = 10 * 366 * 86_400 * S;

/// The source `s` is stamped by its arrival; `own` has its own times, and a limit to how old they are.
fn configured(directory: &Path, clock: &str, more: &str) -> Settings {
    Settings::parse(&format!(
        "[edge]\nid = \"e\"\ndata_dir = {directory:?}\n[cloud]\nurls = [\"http://127.0.0.1:9\"]\ntoken = \"t\"\n\
         [clock]\n{clock}\n[cut]\nseal_min = \"1ms\"\nseal_max = \"1ms\"\nseal_away = \"1ms\"\n\
         [[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\ntopics = [\"#\"]\nmax_payload = \"16KiB\"\nstream = \"s\"\n\
         [source.map]\ndevice = \"const:d\"\nv = \"/v\"\n[stream.s.fields]\nv = {{ type = \"int64\" }}\n\
         [stream.s.window.10s]\nsize = \"10s\"\n\
         [[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\ntopics = [\"#\"]\nmax_payload = \"16KiB\"\nstream = \"own\"\n\
         [source.map]\ndevice = \"const:d\"\nts = {{ at = \"/ts\", format = \"epoch_us\" }}\nv = \"/v\"\n\
         [stream.own]\nmax_age = \"1d\"\n[stream.own.fields]\nv = {{ type = \"int64\" }}\n{more}"
    ))
    .unwrap()
}

impl Driven {
    fn clock(&self) -> &crate::clock::Clock {
        self.engine.parts.journal.clock()
    }

    /// A message that comes now.
    fn comes(&mut self, source: &str, payload: &str) {
        let payload = Payload::Whole(Bytes::copy_from_slice(payload.as_bytes()));
        let (topic, arrival_us) = ("t".to_owned(), self.sender.now_us());
        let message = Message { source: source.to_owned(), topic, payload, arrival_us, delivery: None };
        let ticket = self.sender.try_append(&Entry::Message(message)).unwrap();
        let mut durable = self.sender.durable();
        self.runtime.block_on(durable.wait_for(|durable| *durable >= ticket)).unwrap();
    }

    /// The clock is looked at, and what is new is journalled.
    fn look(&mut self) {
        let mut synced = self.engine.parts.journal.synced();
        synced.borrow_and_update();
        if let Some(mark) = self.clock().look() {
            self.engine.parts.journal.tell(&Entry::Clock(mark));
            let told = async { tokio::time::timeout(Duration::from_secs(20), synced.changed()).await };
            self.runtime.block_on(told).expect("it is journalled").unwrap();
        }
    }

    /// The cloud answers with the time.
    fn hear(&mut self, true_us: i64) {
        let now_us = self.clock().monotonic_us();
        self.clock().heard(true_us.div_euclid(S), now_us - S / 100, now_us + S / 100);
        self.look();
    }

    /// Turns as long as something is done.
    fn turns(&mut self) {
        let position = |engine: &Engine| (engine.parts.pipeline.position(), engine.parts.pipeline.pending_rows());
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until {
            let before = position(&self.engine);
            self.engine.turn().unwrap();
            if position(&self.engine) == before && before.1 == 0 {
                return;
            }
            std::thread::yield_now();
        }
        panic!("it goes on and on");
    }
}

/// `ts`, `v` and `quality` of the rows of a stream.
fn rows(spooled: &Rows, stream: &str) -> Vec<(i64, i64, String)> {
    let row = |row: &String| {
        let cells = row.split(' ').collect::<Vec<_>>();
        (cells[0].parse().unwrap(), cells[2].parse().unwrap(), cells[3].to_owned())
    };
    spooled.get(stream).map(|rows| rows.iter().map(row).collect()).unwrap_or_default()
}

#[test]
fn what_came_in_1970_gets_its_time_when_the_cloud_says_it_also_after_a_kill() {
    for (word, quality) in [("correct", "good"), ("flag", "clock:corrected")] {
        let directory = tempfile::tempdir().unwrap();
        let settings = configured(directory.path(), &format!("on_untrusted = \"{word}\""), "");
        let made = Made::new(12 * S);
        let mut driven = start_by(&settings, Box::new(made.clone()));
        driven.comes("s", "{\"v\":1}");
        driven.comes("own", &format!("{{\"ts\":{TRUE_US},\"v\":2}}"));
        driven.turns();
        let status = driven.status();
        assert!(status.streams.iter().all(|stream| stream.totals.rows == 0), "it waits");
        assert!(status.problems[0].contains("waits in the journal, for 30 s more"), "{:?}", status.problems);
        driven.stop();
        made.pass(7 * S);
        let mut driven = start_by(&settings, Box::new(made.clone()));
        driven.comes("s", "{\"v\":3}");
        driven.turns();
        driven.hear(TRUE_US + 7 * S);
        driven.comes("s", "{\"v\":4}");
        driven.turns();
        assert_eq!((driven.status().problems.len(), driven.status().quarantined.len()), (1, 0), "the machine is off");
        driven.stop();
        let spooled = spooled(directory.path(), &settings);
        let found = rows(&spooled, "s");
        let is = |found: &(i64, i64, String), ts: i64, v: i64, word: &str| {
            assert!((found.0 - ts).abs() <= 600_000 && found.1 == v && found.2 == word, "{found:?}");
        };
        is(&found[0], TRUE_US, 1, quality);
        is(&found[1], TRUE_US + 7 * S, 3, quality);
        is(&found[2], TRUE_US + 7 * S, 4, "good");
        assert_eq!(found[1].0, found[2].0, "no time passed");
        assert_eq!(rows(&spooled, "own"), [(TRUE_US, 2, "good".to_owned())]);
    }
}

#[test]
fn with_nobody_to_ask_it_goes_on_after_the_wait_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let settings = configured(directory.path(), "wait = \"2s\"", "");
    let made = Made::new(12 * S);
    let mut driven = start_by(&settings, Box::new(made.clone()));
    driven.comes("s", "{\"v\":1}");
    // Years ahead of what the gateway can guess, and right; and one that no device can mean.
    driven.comes("own", &format!("{{\"ts\":{TRUE_US},\"v\":2}}"));
    driven.comes("own", &format!("{{\"ts\":{},\"v\":3}}", TRUE_US + 10 * YEARS));
    made.pass(2 * S);
    driven.look();
    driven.comes("s", "{\"v\":4}");
    driven.turns();
    let status = driven.status();
    assert!(status.problems[0].contains("have quality `clock`"), "{:?}", status.problems);
    assert_eq!(status.quarantined, BTreeMap::from([("in_future".to_owned(), 1)]));
    // Later somebody comes.
    driven.hear(TRUE_US);
    driven.comes("s", "{\"v\":5}");
    driven.turns();
    driven.stop();
    let spooled = spooled(directory.path(), &settings);
    let found = rows(&spooled, "s");
    let (word, at) = ("clock".to_owned(), EARLIEST_US);
    assert_eq!(found[..2], [(at, 1, word.clone()), (at + 2 * S, 4, word)]);
    assert!((found[2].0 - TRUE_US).abs() <= 600_000 && found[2].2 == "good", "{found:?}");
    assert_eq!(rows(&spooled, "own"), [(TRUE_US, 2, "good".to_owned())]);
}

#[test]
fn a_full_journal_is_told_the_time_all_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let settings = configured(directory.path(), "", "[journal]\nsegment_bytes = \"64KiB\"\nmax_bytes = \"128KiB\"\n");
    let made = Made::new(12 * S);
    let mut driven = start_by(&settings, Box::new(made.clone()));
    let payload = format!("{{\"v\":1,\"x\":\"{}\"}}", "x".repeat(8 << 10));
    for _ in 0..12 {
        assert!(driven.message(&payload));
    }
    // To the last byte.
    while driven.message("{\"v\":1}") {}
    assert!(driven.engine.parts.journal.is_full());
    driven.turns();
    assert_eq!(driven.status().rows.sealed, 0);
    made.pass(30 * S);
    driven.look();
    let until = Instant::now() + Duration::from_secs(20);
    while driven.engine.parts.journal.is_full() {
        assert!(Instant::now() < until, "what would let it go on finds no room");
        driven.turns();
    }
    assert!(driven.status().rows.sealed > 0);
    driven.stop();
}

#[test]
fn a_backlog_does_not_age_by_a_clock_that_jumps_ten_years() {
    let lane = "[[lane]]\nname = \"rest\"\nstreams = []\nmax_age = \"1h\"\n";
    for (trust, synchronised) in [("always", false), ("any", true), ("any", false)] {
        let directory = tempfile::tempdir().unwrap();
        let settings = configured(directory.path(), &format!("trust = \"{trust}\""), lane);
        let made = Made::new(TRUE_US);
        made.synchronise(true);
        let mut driven = start_by(&settings, Box::new(made.clone()));
        driven.comes("s", "{\"v\":1}");
        driven.turns();
        let lost = |driven: &mut Driven| {
            while driven.engine.drop_aged().unwrap() {}
            driven.status().rows.lost
        };
        made.synchronise(synchronised);
        made.set(TRUE_US + YEARS);
        driven.look();
        assert_eq!(lost(&mut driven), 0, "{trust}: before the pipeline knows");
        driven.comes("s", "{\"v\":2}");
        driven.turns();
        assert_eq!(lost(&mut driven), 0, "{trust}");
        driven.stop();
        // A start reads the ages from the disk.
        let mut driven = start_by(&settings, Box::new(made.clone()));
        driven.turns();
        assert_eq!(lost(&mut driven), 0, "{trust}: after a start");
        made.set(made.wall() - YEARS);
        driven.look();
        driven.comes("s", "{\"v\":3}");
        driven.turns();
        assert_eq!(lost(&mut driven), 0, "{trust}: and back");
        driven.stop();
    }
}

#[test]
fn what_is_really_old_goes_also_after_a_step() {
    let lane = "[[lane]]\nname = \"rest\"\nstreams = []\nmax_age = \"1h\"\n";
    let directory = tempfile::tempdir().unwrap();
    let settings = configured(directory.path(), "trust = \"always\"", lane);
    let made = Made::new(TRUE_US);
    let mut driven = start_by(&settings, Box::new(made.clone()));
    driven.comes("s", "{\"v\":1}");
    driven.turns();
    made.pass(1_800 * S);
    made.set(TRUE_US + YEARS);
    driven.look();
    made.pass(1_700 * S);
    driven.comes("s", "{\"v\":2}");
    driven.turns();
    assert!(!driven.engine.drop_aged().unwrap());
    assert_eq!(driven.status().rows.lost, 0);
    made.pass(200 * S);
    driven.turns();
    assert!(!driven.engine.drop_aged().unwrap());
    assert_eq!(driven.status().rows.lost, 1, "the first, which has waited for more than an hour");
    driven.stop();
}

#[test]
fn an_hour_back_and_forth_makes_no_reading_late_that_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let settings = configured(directory.path(), "", "");
    let made = Made::new(TRUE_US);
    made.synchronise(true);
    let mut driven = start_by(&settings, Box::new(made.clone()));
    for (v, set) in [(1, 0), (2, -3_600 * S), (3, 0), (4, YEARS), (5, 0)] {
        made.pass(S);
        made.set(TRUE_US + v * S + set);
        made.synchronise(set == 0);
        driven.look();
        driven.comes("s", &format!("{{\"v\":{v}}}"));
    }
    driven.turns();
    driven.stop();
    let wanted = (1..=5).map(|v| (TRUE_US + v * S, v, "good".to_owned())).collect::<Vec<_>>();
    assert_eq!(rows(&spooled(directory.path(), &settings), "s"), wanted);
}

/// What a run of the journal without crashes gives.
fn expected(directory: &Path, settings: &Settings) -> Rows {
    let options = segment_log::Options { segment_bytes: 16 << 20, max_bytes: 1 << 30, reserve_bytes: 4 << 10 };
    let (journal, _) = crate::journal::OpenJournal::open(directory.join("journal"), options).unwrap();
    let (mut entries, mut reader) = (Vec::new(), journal.reader(Position(0)).unwrap());
    while let Some(record) = reader.next().unwrap() {
        let entry = Entry::read(Bytes::copy_from_slice(record.payload)).unwrap();
        entries.push((record.position, record.next, entry));
    }
    let mut pipeline = Pipeline::new(settings, Position(0), &BTreeMap::new());
    for (at, (position, next, entry)) in entries.iter().enumerate() {
        if pipeline.waits_for_clock() {
            let clock = |(_, _, entry): &(Position, Position, Entry)| match entry {
                Entry::Clock(mark) => Some(*mark),
                _ => None,
            };
            let mut marks: Vec<Mark> = entries[at..].iter().filter_map(clock).collect();
            marks.reverse();
            while !marks.pop().is_none_or(|mark| pipeline.resolve_clock(&mark)) {}
        }
        if pipeline.waits_for_clock() {
            break;
        }
        pipeline.apply(*position, *next, entry);
    }
    let mut rows = Rows::new();
    for lane in pipeline.cut().unwrap().lanes {
        for batch in &lane.batches {
            let schema: &StreamSchema = lane.schemas.iter().find(|schema| schema.id() == batch.schema).unwrap();
            add(&mut rows, &batch.stream, &CutBatch::decode(batch, schema).unwrap());
        }
    }
    rows
}

#[test]
fn random_clocks_and_crashes_give_what_a_run_without_crashes_gives() {
    let seed = rand::random::<u64>();
    println!("seed {seed}");
    for round in 0..10 {
        run(seed.wrapping_add(round));
    }
}

fn run(seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let directory = tempfile::tempdir().unwrap();
    let settings = configured(directory.path(), "on_untrusted = \"flag\"", "");
    let made = Made::new(random.random_range(0..2 * TRUE_US));
    let mut true_us = TRUE_US;
    let mut driven = start_by(&settings, Box::new(made.clone()));
    for v in 0..60 {
        let passed = random.random_range(0..12 * S);
        made.pass(passed);
        true_us += passed;
        match random.random_range(0..20) {
            0..8 => {
                let source = if random.random_bool(0.7) { "s" } else { "own" };
                driven.comes(source, &format!("{{\"v\":{v},\"ts\":{}}}", true_us - random.random_range(0..20 * S)));
            }
            8..12 => drop(driven.engine.turn().unwrap()),
            12 => driven.look(),
            13 => made.set(random.random_range(0..2 * TRUE_US)),
            14 => {
                made.set(true_us);
                made.synchronise(true);
                driven.look();
            }
            15 => driven.hear(true_us),
            // A snapshot whenever it may be.
            16 => driven.engine.parts.journal_bytes_max = 0,
            crash => {
                driven.stop();
                if crash == 19 {
                    made.reboot(random.random_range(0..2 * TRUE_US));
                }
                driven = start_by(&settings, Box::new(made.clone()));
            }
        }
        if made.wall() != true_us {
            made.synchronise(false);
        }
    }
    driven.hear(true_us);
    driven.comes("s", "{\"v\":1000}");
    driven.turns();
    assert_eq!(driven.status().incidents, [""; 0], "seed {seed}");
    driven.stop();
    let (mut found, mut wanted) = (spooled(directory.path(), &settings), expected(directory.path(), &settings));
    for rows in [&mut found, &mut wanted] {
        rows.values_mut().for_each(|rows| rows.sort());
        rows.retain(|_, rows| !rows.is_empty());
    }
    assert_eq!(found, wanted, "seed {seed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_of_1970_learns_the_time_from_its_cloud_and_tells_how_far_it_is_off() {
    // Another test may have done it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let directory = tempfile::tempdir().unwrap();
    let date = chrono::DateTime::from_timestamp_micros(TRUE_US).unwrap().to_rfc2822().replace("+0000", "GMT");
    let answer = move || std::future::ready(([("date", date.clone())], "{\"node\":\"n\",\"acks\":[]}"));
    let app = axum::Router::new()
        .route("/v1/edges/{edge}/positions", axum::routing::get(answer.clone()))
        .route("/v1/edges/{edge}/batches", axum::routing::post(answer));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let cloud = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    std::fs::write(directory.path().join("lines"), "{\"v\":7}\n").unwrap();
    let settings = Settings::parse(&format!(
        "[edge]\nid = \"e\"\ndata_dir = {:?}\nstop_within = \"1s\"\n[admin]\nlisten = \"127.0.0.1:0\"\n\
         [cloud]\nurls = [\"http://{cloud}\"]\ntoken = \"t\"\n[[source]]\nkind = \"file\"\npath = {:?}\nstream = \"s\"\n\
         [source.map]\ndevice = \"const:d\"\nv = \"/v\"\n[stream.s.fields]\nv = {{ type = \"int64\" }}\n",
        directory.path().join("data"),
        directory.path().join("lines"),
    ))
    .unwrap();
    let (made, token) = (Made::new(12 * S), CancellationToken::new());
    let handle = super::super::super::start_by(settings, Box::new(made.clone()), token.clone()).await.unwrap();
    let of_s = |status: &Status| status.streams.iter().find(|stream| stream.name == "s").cloned().unwrap_or_default();
    let status = until(&handle, "a row", |status| of_s(status).totals.rows == 1 && status.clock.is_off).await;
    assert_eq!(status.clock.by, Some(crate::clock::Trust::Cloud));
    let ts = chrono::DateTime::parse_from_rfc3339(&of_s(&status).last[1].value).unwrap().timestamp_micros();
    assert!((ts - TRUE_US).abs() < 2 * S, "{ts}");
    let skew_s = status.clock.skew_s.unwrap();
    assert!((skew_s + ((TRUE_US - 12 * S) / S) as f64).abs() < 2.0, "{skew_s}");
    assert!(status.problems.iter().any(|problem| problem.contains("start NTP")), "{:?}", status.problems);
    assert!(crate::metrics::render(&status).contains("weir_edge_clock_skew_seconds -1795"));
    // Somebody sets it.
    made.set(TRUE_US);
    let status =
        until(&handle, "it is right", |status| !status.clock.is_off && status.clock.machine_ahead_s == 0.0).await;
    assert_eq!(status.problems, [""; 0]);
    token.cancel();
    handle.stopped().await.unwrap();
}
