//! Another configuration, and crashes at every moment of it: what the lanes have equals a run of the journal without any.

use std::collections::BTreeMap;

use arrow_array::ArrayRef;
use arrow_cast::cast;
use arrow_cast::display::array_value_to_string;
use arrow_schema::DataType;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use wire::{CutBatch, StreamSchema};

use super::*;

pub(super) type Rows = BTreeMap<String, Vec<String>>;

/// One of 64 configurations.
fn configuration(directory: &Path, which: u8) -> Settings {
    let has = |bit: u8, text: &'static str| if which & (1 << bit) > 0 { text } else { "" };
    let max = if which & 1 > 0 { 80 } else { 1_000 };
    let source = |name: &str| {
        format!(
            "[[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\ntopics = [\"#\"]\nstream = \"{name}\"\n[source.map]\n\
             device = \"/d\"\nts = {{ at = \"/ts\", format = \"epoch_s\" }}\nv = \"/v\"\n"
        )
    };
    let other = "[stream.t.fields]\nv = { type = \"int64\" }\n[stream.t.window.4s]\nsize = \"4s\"\n";
    let text = format!(
        "[edge]\nid = \"e\"\ndata_dir = {directory:?}\n[cloud]\nurls = [\"http://127.0.0.1:9\"]\ntoken = \"t\"\n[clock]\ntrust = \"always\"\n{}{}{other}\
         [stream.s]\nlateness = \"{}\"\nreopen_within = \"60s\"\n{}\n[stream.s.fields]\nv = {{ type = \"int64\", max = {max} }}\n\
         [stream.s.window.stays]\nsize = \"7s\"\n{}{}{}\
         [[rule]]\nname = \"high\"\non = \"s\"\nwhen = \"v > {}\"\n[cut]\nseal_min = \"1ms\"\nseal_max = \"1ms\"\n",
        source("s"),
        if which & 2 > 0 { source("t") } else { String::new() },
        if which & 4 > 0 { "3s" } else { "9s" },
        has(3, "duplicates = \"last\"\nduplicates_within = \"5s\""),
        has(4, "[stream.s.window.comes]\nsize = \"5s\"\n"),
        if which & 1 > 0 { "[stream.s.window.is]\nsize = \"10s\"\n" } else { "[stream.s.window.is]\ngap = \"4s\"\n" },
        has(5, "[[lane]]\nname = \"other\"\nstreams = [\"s\", \"s_is\"]\n"),
        if which & 16 > 0 { 40 } else { 60 },
    );
    Settings::parse(&text).unwrap()
}

pub(super) fn add(rows: &mut Rows, stream: &StreamName, batch: &arrow_array::RecordBatch) {
    let plain = |column: &ArrayRef| match column.data_type() {
        DataType::Timestamp(..) => cast(column, &DataType::Int64).unwrap(),
        _ => Arc::clone(column),
    };
    let columns = batch.columns().iter().map(plain).collect::<Vec<_>>();
    let value = |column: &ArrayRef, row| array_value_to_string(column, row).unwrap();
    let row = |row| columns.iter().map(|column| value(column, row)).collect::<Vec<_>>().join(" ");
    rows.entry(stream.to_string()).or_default().extend((0..batch.num_rows()).map(row));
}

/// All rows of the spool of a data directory.
pub(super) fn spooled(directory: &Path, settings: &Settings) -> Rows {
    let settings = super::super::super::spool_settings(settings);
    let (mut spool, damage) = Spool::open(&Disk, &spool_directory(directory), settings, SpoolId([0; 16])).unwrap();
    assert!(damage.is_empty(), "{damage:?}");
    let mut rows = Rows::new();
    loop {
        let Some((lane, stream)) = spool.waiting().first().map(|(lane, stream)| (*lane, (*stream).clone())) else {
            return rows;
        };
        for batch in spool.number(lane, &stream, usize::MAX).unwrap() {
            let schema = StreamSchema::parse(spool.schema(batch.header().schema).unwrap()).unwrap();
            add(&mut rows, &stream, &batch.decode(&schema).unwrap());
        }
    }
}

/// What a run of the journal without crashes gives.
fn expected(directory: &Path, first: &Settings, all: &BTreeMap<u64, Settings>) -> Rows {
    let options = segment_log::Options { segment_bytes: 16 << 20, max_bytes: 1 << 30, reserve_bytes: 4 << 10 };
    let (journal, _) = crate::journal::OpenJournal::open(directory.join("journal"), options).unwrap();
    let mut reader = journal.reader(Position(0)).unwrap();
    let mut pipeline = Pipeline::new(first, Position(0), &BTreeMap::new());
    let (mut in_force, mut rows) = (first.version, Rows::new());
    let mut take = |pipeline: &mut Pipeline| {
        for lane in pipeline.cut().unwrap().lanes {
            for batch in &lane.batches {
                let schema = lane.schemas.iter().find(|schema| schema.id() == batch.schema).unwrap();
                add(&mut rows, &batch.stream, &CutBatch::decode(batch, schema).unwrap());
            }
        }
    };
    while let Some(record) = reader.next().unwrap() {
        let entry = Entry::read(Bytes::copy_from_slice(record.payload)).unwrap();
        pipeline.apply(record.position, record.next, &entry);
        if let Entry::Configured { version, .. } = entry
            && version != in_force
        {
            in_force = version;
            pipeline.end_for(record.position, &all[&version]);
            take(&mut pipeline);
            pipeline = pipeline.changed(&all[&version], &BTreeMap::new()).unwrap();
        }
    }
    take(&mut pipeline);
    rows
}

impl Driven {
    pub(super) fn put(&mut self, entry: &Entry) {
        let ticket = self.sender.try_append(entry).unwrap();
        let mut durable = self.sender.durable();
        self.runtime.block_on(durable.wait_for(|durable| *durable >= ticket)).unwrap();
    }

    fn configure(&mut self, settings: &Settings) {
        self.put(&super::super::super::configured(settings));
    }

    fn order(&mut self, settings: &Settings) {
        let sources = self.engine.parts.sources.clone();
        self.engine.obey(Order { settings: settings.clone(), cloud: None, sources }).unwrap();
    }

    /// A cut of which only one lane got its part when the power went.
    fn half_a_cut(&mut self, lane: usize) {
        let parts = &mut self.engine.parts;
        while let Some(record) = parts.reader.next().unwrap() {
            let (position, next) = (record.position, record.next);
            let entry = Entry::read(Bytes::copy_from_slice(record.payload)).unwrap();
            if matches!(entry, Entry::Configured { .. }) {
                return;
            }
            parts.pipeline.apply(position, next, &entry);
        }
        if !parts.pipeline.may_cut() || self.engine.next.is_some() || !self.engine.held.is_empty() {
            return;
        }
        let cut = parts.pipeline.cut().unwrap();
        if let Some(lane_cut) = cut.lanes.get(lane)
            && !lane_cut.batches.is_empty()
        {
            parts.spool.append(lane, cut.position, &lane_cut.batches, &lane_cut.schemas, 0).unwrap();
        }
    }
}

fn run(seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let full = path.join("snapshot.new");
    let first = configuration(path, 0);
    let mut all = BTreeMap::from([(first.version, first.clone())]);
    let mut settings = first.clone();
    let mut driven = start(&settings);
    let mut second = 1_700_000_000;
    for _ in 0..80 {
        match random.random_range(0..20) {
            0..10 => {
                second += random.random_range(0..3);
                let ts = second - random.random_range(0..6);
                let (v, device) = (random.random_range(0..100), random.random_range(0..2));
                let payload = format!("{{\"ts\":{ts},\"v\":{v},\"d\":\"{device}\"}}");
                let source = if random.random_bool(0.7) { "s" } else { "t" };
                driven.put(&Entry::Message(Message {
                    source: source.to_owned(),
                    topic: "t".to_owned(),
                    payload: Payload::Whole(payload.into()),
                    arrival_us: second * 1_000_000,
                    delivery: None,
                }));
            }
            10..14 => drop(driven.engine.turn().unwrap()),
            14..17 => {
                if random.random_bool(0.4) {
                    // The snapshot that belongs to it finds no room.
                    let _ = std::fs::remove_file(&full);
                    symlink("/dev/full", &full).unwrap();
                }
                settings = configuration(path, random.random_range(0..64));
                all.insert(settings.version, settings.clone());
                let first = random.random_bool(0.5);
                if first {
                    driven.order(&settings);
                }
                driven.configure(&settings);
                if !first {
                    driven.order(&settings);
                }
            }
            // A snapshot is due whenever none is in the way, or only with another configuration.
            17 => driven.engine.parts.journal_bytes_max = if random.random_bool(0.5) { 0 } else { 1 << 30 },
            crash => {
                if random.random_bool(0.3) {
                    driven.half_a_cut(random.random_range(0..3));
                }
                driven.stop();
                if crash == 18 {
                    settings = configuration(path, random.random_range(0..64));
                    all.insert(settings.version, settings.clone());
                }
                driven = start(&settings);
            }
        }
    }
    let _ = std::fs::remove_file(&full);
    driven.engine.no_snapshot = None;
    // Behind a marker that a stop leaves there is no position to wait for.
    driven.put(&Entry::Tick { now_us: second * 1_000_000 });
    driven.settle();
    assert_eq!(driven.status().configuration.version, settings.version, "seed {seed}");
    assert_eq!(driven.status().incidents, [""; 0], "seed {seed}");
    driven.stop();
    let (mut found, mut wanted) = (spooled(path, &settings), expected(path, &first, &all));
    for rows in [&mut found, &mut wanted] {
        rows.values_mut().for_each(|rows| rows.sort());
    }
    for (stream, wanted) in &wanted {
        let found = found.get(stream).cloned().unwrap_or_default();
        let missing = wanted.iter().filter(|row| !found.contains(row)).collect::<Vec<_>>();
        let more = found.iter().filter(|row| !wanted.contains(row)).collect::<Vec<_>>();
        assert_eq!(*wanted, found, "seed {seed}, {stream}: missing {missing:#?}, more {more:#?}");
    }
    assert_eq!(found, wanted, "seed {seed}");
}

#[test]
fn crashes_in_the_middle_of_other_configurations_lose_nothing_and_repeat_nothing() {
    let first = rand::rng().random_range(0..1 << 40);
    for seed in first..first + 6 {
        run(seed);
    }
}

#[test]
fn a_full_lane_is_made_larger_by_the_configuration_that_waits_behind_it() {
    let directory = tempfile::tempdir().unwrap();
    let lane = |mib: u32| {
        format!(
            "[[lane]]\nname = \"rest\"\nstreams = []\nmax_bytes = \"{mib}MiB\"\n[[rule]]\nname = \"r\"\non = \"s\"\n\
             when = \"v > 5\"\n"
        )
    };
    let mut driven = start(&settings(directory.path(), &lane(48)));
    let next = settings(directory.path(), &lane(96));
    assert!(driven.message("{\"v\":1}"));
    driven.engine.read().unwrap();
    // As if the lane had no room.
    let cut = driven.engine.parts.pipeline.cut().unwrap();
    driven.engine.held_position = cut.position;
    driven.engine.held = cut.lanes.into_iter().enumerate().filter(|(_, lane)| !lane.batches.is_empty()).collect();
    assert!(driven.status().problems.iter().any(|problem| problem.starts_with("rules stand still")));
    driven.configure(&next);
    driven.order(&next);
    let rest = |status: &Status| status.lanes.iter().find(|lane| lane.name == "rest").unwrap().bytes_max;
    assert_eq!((rest(&driven.status()), driven.status().configuration.version == next.version), (96 << 20, false));
    driven.settle();
    assert_eq!((driven.status().configuration.version, driven.status().rows.spooled), (next.version, 1));
    assert_eq!(driven.status().problems, [""; 0]);
    driven.stop();
}
