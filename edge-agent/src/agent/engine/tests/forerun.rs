//! A lane that refuses is full, and the other lanes go on.

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use wire::{CutBatch, StreamSchema};

use super::change::{Rows, add};
use super::*;
use crate::publish::Outbox;
use crate::rules::Turn;

const SECOND: i64 = 1_700_000_000;

fn refusing(directory: &Path, more: &str) -> Settings {
    let text = format!(
        "[edge]\nid = \"e\"\ndata_dir = {directory:?}\n[cloud]\nurls = [\"http://127.0.0.1:9\"]\ntoken = \"t\"\n\
         [clock]\ntrust = \"always\"\n[[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\ntopics = [\"#\"]\nstream = \"s\"\n\
         max_payload = \"1MiB\"\n[source.map]\ndevice = \"/d\"\nts = {{ at = \"/ts\", format = \"epoch_s\" }}\nv = \"/v\"\n\
         text = \"/text\"\n[stream.s]\nlateness = \"2s\"\n[stream.s.fields]\nv = {{ type = \"int64\" }}\n\
         text = {{ type = \"text\" }}\n[stream.s.window.4s]\nsize = \"4s\"\n\
         [[rule]]\nname = \"high\"\non = \"s\"\nwhen = \"v > 60\"\ntopic = \"a/{{device}}\"\n\
         [[rule]]\nname = \"mean\"\non = \"s_4s\"\nwhen = \"v_avg > 55\"\ntopic = \"m/{{device}}\"\n\
         [cut]\nseal_min = \"1ms\"\nseal_max = \"1ms\"\nseal_away = \"1ms\"\n\
         [[lane]]\nname = \"rest\"\nstreams = []\nmax_bytes = \"32MiB\"\non_full = \"refuse\"\n{more}"
    );
    Settings::parse(&text).unwrap()
}

/// What no codec makes smaller, much.
fn noise(random: &mut StdRng) -> String {
    let mut bytes = vec![0_u8; 2 << 20];
    random.fill(&mut bytes[..]);
    bytes
        .into_iter()
        .map(|byte| {
            char::from(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+/"[usize::from(byte % 64)])
        })
        .collect()
}

fn entry(random: &mut StdRng, second: i64, v: i64, text: &str) -> Entry {
    let from = random.random_range(0..text.len() / 2);
    let text = &text[from..from + (384 << 10)];
    let payload = format!("{{\"ts\":{second},\"v\":{v},\"d\":\"{}\",\"text\":\"{text}\"}}", second % 2);
    let (source, topic, arrival_us) = ("s".to_owned(), "t".to_owned(), second * 1_000_000);
    Entry::Message(Message { source, topic, payload: Payload::Whole(payload.into()), arrival_us, delivery: None })
}

impl Driven {
    fn publishes(&mut self) -> Arc<Outbox> {
        let outbox = Arc::new(Outbox::new("e".to_owned(), 10_000));
        self.engine.parts.outbox = Some(Arc::clone(&outbox));
        outbox
    }

    fn is_ahead(&self) -> bool {
        let at = self.engine.parts.pipeline.position();
        self.engine.forerunner.as_ref().is_some_and(|runner| runner.pipeline.position() > at)
    }

    /// What a forerunner holds beside the pipeline's state: what is pending up to a batch and a message, and a cut of each lane
    /// that became full under it.
    fn is_bounded(&self) -> bool {
        let Some(runner) = &self.engine.forerunner else { return true };
        let lanes = runner.held.iter().map(|(_, lane, _)| lane).collect::<BTreeSet<_>>().len();
        let bytes = runner.pipeline.pending_bytes();
        lanes == runner.held.len() && bytes <= PENDING_BYTES_MAX + (1 << 20)
    }

    /// The cloud commits what waits in a lane.
    fn commit(&mut self, lane: usize, rows: &mut Rows) {
        let spool = &mut self.engine.parts.spool;
        loop {
            let waits = spool.waiting().into_iter().find(|(of, _)| *of == lane);
            let Some(stream) = waits.map(|(_, stream)| stream.clone()) else { return };
            for batch in spool.number(lane, &stream, usize::MAX).unwrap() {
                let schema = StreamSchema::parse(spool.schema(batch.header().schema).unwrap()).unwrap();
                add(rows, &stream, &batch.decode(&schema).unwrap());
                spool.free(&stream, Mark { seq: batch.header().seq, crc: batch.crc() }).unwrap();
            }
        }
    }

    fn is_done(&self) -> bool {
        let parts = &self.engine.parts;
        let all = parts.pipeline.position() >= *parts.journal.synced().borrow();
        all && self.engine.held.is_empty() && parts.pipeline.pending_rows() == 0 && parts.spool.waiting().is_empty()
    }
}

#[test]
fn rules_go_on_while_the_lane_of_the_readings_refuses_until_the_journal_is_full() {
    let directory = tempfile::tempdir().unwrap();
    let mut random = StdRng::seed_from_u64(1);
    let text = noise(&mut random);
    let journal = "[journal]\nmax_bytes = \"64MiB\"\nsegment_bytes = \"16MiB\"\n";
    let mut driven = start(&refusing(directory.path(), journal));
    let outbox = driven.publishes();
    let mut second = SECOND;
    while driven.engine.held.is_empty() {
        second += 1;
        driven.put(&entry(&mut random, second, 1, &text));
        driven.engine.turn().unwrap();
    }
    let until = driven.engine.parts.pipeline.position();
    assert_eq!((driven.status().firing.len(), outbox.status().waiting), (0, 0));
    driven.put(&entry(&mut random, second + 1, 99, &text));
    let begun = Instant::now();
    while driven.engine.parts.spool.rows_of_streams().get(&"alerts".parse::<StreamName>().unwrap()) != Some(&1) {
        driven.engine.turn().unwrap();
        assert!(begun.elapsed() < PATIENCE, "{:#?}", driven.status());
    }
    let status = driven.status();
    assert_eq!((status.firing.len(), outbox.status().waiting), (1, 1), "it fires, and is told");
    assert_eq!(driven.engine.parts.pipeline.position(), until, "what was refused is not passed over");
    assert_eq!(status.problems, ["lane rest is full"]);
    let rows = status.rows;
    assert_eq!(rows.sealed, rows.committed + rows.spooled + rows.lost, "{rows:?}");

    // What is not taken no rule sees.
    let last = format!("{{\"ts\":{second},\"v\":99,\"d\":\"x\",\"text\":\"{}\"}}", &text[..512 << 10]);
    while driven.message(&last) {
        driven.engine.turn().unwrap();
    }
    driven.engine.turn().unwrap();
    let problems = driven.status().problems;
    assert!(problems.iter().any(|problem| problem.contains("until that lane has room, as nothing")), "{problems:?}");
    driven.stop();
}

/// Fills and frees at random moments, and crashes: every row comes once, as in a run in which no lane is ever full; and
/// without crashes each alert is told once.
#[test]
fn a_lane_that_was_full_ends_with_the_rows_of_one_that_never_was() {
    let first = rand::rng().random_range(0..1 << 40);
    let mut ahead = 0;
    for seed in first..first + 6 {
        ahead += run(seed, seed % 2 == 0);
    }
    assert!(ahead > 20, "the other lanes went ahead in {ahead} turns only");
}

fn run(seed: u64, crashes: bool) -> usize {
    println!("seed {seed}, crashes: {crashes}");
    let mut random = StdRng::seed_from_u64(seed);
    let text = noise(&mut random);
    let directory = tempfile::tempdir().unwrap();
    let settings = refusing(directory.path(), "");
    let mut calm = Pipeline::new(&settings, Position(0), &BTreeMap::new());
    let (mut told, mut found, mut ahead) = (0, Rows::new(), 0);
    let mut driven = start(&settings);
    let mut outbox = driven.publishes();
    let mut second = SECOND;
    for n in 0..240 {
        second += random.random_range(0..2);
        let v = random.random_range(0..100);
        let entry = entry(&mut random, second, v, &text);
        driven.put(&entry);
        calm.apply(Position(n), Position(n + 1), &entry);
        told += calm.take_alerts().iter().map(|alert| 1 + usize::from(alert.turn == Turn::Resolved)).sum::<usize>();
        if random.random_bool(0.7) {
            driven.engine.turn().unwrap();
        }
        ahead += usize::from(driven.is_ahead());
        assert!(driven.is_bounded(), "seed {seed}");
        if random.random_bool(0.05) {
            driven.commit(0, &mut found);
        }
        if random.random_bool(0.004) {
            driven.commit(1, &mut found);
        }
        if crashes && random.random_bool(0.03) {
            driven.stop();
            driven = start(&settings);
            outbox = driven.publishes();
        }
    }
    let begun = Instant::now();
    while !driven.is_done() {
        driven.engine.turn().unwrap();
        (0..2).for_each(|lane| driven.commit(lane, &mut found));
        assert!(begun.elapsed() < PATIENCE, "seed {seed}: {:#?}", driven.status());
    }
    let status = driven.status();
    assert_eq!(status.problems, [""; 0], "seed {seed}");
    assert_eq!(status.rows.sealed, status.rows.committed, "seed {seed}: {:?}", status.rows);
    if !crashes {
        assert_eq!(outbox.status().waiting, told, "seed {seed}");
    }
    driven.stop();
    let mut wanted = Rows::new();
    for lane in calm.cut().unwrap().lanes {
        for batch in &lane.batches {
            let schema = lane.schemas.iter().find(|schema| schema.id() == batch.schema).unwrap();
            add(&mut wanted, &batch.stream, &CutBatch::decode(batch, schema).unwrap());
        }
    }
    for rows in [&mut found, &mut wanted] {
        rows.values_mut().for_each(|rows| rows.sort());
    }
    for (stream, wanted) in &wanted {
        assert!(found.get(stream) == Some(wanted), "seed {seed}, {stream}: {} rows", found[stream].len());
    }
    assert_eq!(found.len(), wanted.len(), "seed {seed}");
    ahead
}
