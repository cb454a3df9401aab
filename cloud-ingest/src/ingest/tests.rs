//! Nodes on a simulated machine, driven turn by turn: power cuts over WAL and tables together, two nodes on one store,
//! a stream that cannot commit. `INGEST_SEED=17` tries only one seed.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use arrow_array::{ArrayRef, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use segment_log::sim::{Random, SimLayer};
use tokio::runtime::Runtime;
use wire::hot::HotAnswer;
use wire::schema::{FieldType, StreamField};
use wire::sealed::NO_WATERMARK;
use wire::{CutBatch, SealedBatch, Seq, StreamSchema, TS_MIN_US};

use super::*;
use crate::config::{Size, Span};
use crate::delta::power_cut::rows_on_disk;
use crate::store::tests::{sim_machine, sim_store, sim_store_through};

mod pressure;
mod retype;
mod write;

const SEEDS: u64 = 200;
const LIVES: u64 = 4;
const STEPS: u64 = 12;
/// From this batch on a sender's rows have one field more.
const WIDER_FROM: u64 = 6;

fn seeds(count: u64) -> impl Iterator<Item = (u64, Random)> {
    let only = std::env::var("INGEST_SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    let seeds = only.map_or(1..=count, |seed| seed..=seed);
    seeds.map(|seed| {
        println!("INGEST_SEED={seed}");
        (seed, Random::new(seed))
    })
}

fn settings(directory: &str) -> Settings {
    let mut settings = Settings::parse(&format!("data_dir = \"{directory}\"")).unwrap();
    settings.commit.max_age = Span(Duration::ZERO);
    (settings.wal.segment_bytes, settings.wal.max_bytes) = (Size(16 << 10), Size(512 << 10));
    settings.write.repeats_max = 1_000;
    settings
}

fn machine() -> SimLayer {
    let layer = sim_machine();
    for directory in ["/a", "/b"] {
        layer.create_dir(Path::new(directory)).unwrap();
    }
    layer.sync_dir(Path::new("/")).unwrap();
    layer
}

fn rows_of(seq: u64) -> u64 {
    1 + seq % 3
}

/// An edge's side of one sequence.
struct Sender {
    spool: SpoolId,
    stream: StreamName,
    batches: Vec<SealedBatch>,
    /// Heard of the node that it speaks with.
    durable: u64,
    committed: u64,
    rows: fn(u64) -> u64,
}

impl Sender {
    fn new(spool: u8, stream: &str) -> Self {
        let (spool, stream) = (SpoolId([spool; 16]), stream.parse().unwrap());
        Self { spool, stream, batches: Vec::new(), durable: 0, committed: 0, rows: rows_of }
    }

    fn schema(seq: u64) -> StreamSchema {
        let names = if seq < WIDER_FROM { vec!["speed"] } else { vec!["speed", "count"] };
        let field = |name: &str| StreamField { name: name.parse().unwrap(), kind: FieldType::Float64 };
        StreamSchema::new(names.into_iter().map(field).collect()).unwrap()
    }

    /// Batch `seq`, made when it is first asked for.
    fn batch(&mut self, seq: u64) -> Arrived {
        while self.batches.len() < seq as usize {
            let seq = self.batches.len() as u64 + 1;
            let previous = self.batches.last().map_or(0, SealedBatch::crc);
            let (schema, count) = (Self::schema(seq), (self.rows)(seq));
            let ts = (0..count as i64).map(|row| TS_MIN_US + seq as i64 * 1_000 + row);
            let mut columns: Vec<ArrayRef> = vec![
                Arc::new(TimestampMicrosecondArray::from_iter_values(ts).with_timezone("UTC")),
                Arc::new(StringArray::from_iter_values((0..count).map(|row| format!("d{}", (seq ^ row) * 7_919)))),
            ];
            for _ in schema.fields() {
                let values = (0..count).map(|row| (seq * 1_000 + row) as f64);
                columns.push(Arc::new(Float64Array::from_iter_values(values)));
            }
            columns.push(Arc::new(StringArray::from(vec!["good"; count as usize])));
            let rows = RecordBatch::try_new(schema.arrow().clone(), columns).unwrap();
            let cut = CutBatch::seal(self.stream.clone(), &schema, &rows, NO_WATERMARK, "test", 1).unwrap();
            self.batches.push(cut.number(&"gw".parse().unwrap(), self.spool, Seq(seq), previous));
        }
        let (batch, schema) = (self.batches[seq as usize - 1].clone(), Arc::new(Self::schema(seq)));
        Arrived { rows: batch.decode(&schema), batch, schema }
    }

    fn heard(&mut self, answer: Result<Acks, RefusedAnswer>) {
        let (acks, refused) = match answer {
            Ok(acks) => (acks, None),
            Err(answer) => (answer.acks.map(|acks| *acks).unwrap_or_default(), Some(answer.refused)),
        };
        for ack in acks.acks.iter().filter(|ack| (ack.spool, &ack.stream) == (self.spool, &self.stream)) {
            let crc = |seq: Seq| self.batches[seq.0 as usize - 1].crc();
            assert!([ack.durable, ack.committed].iter().all(|mark| mark.seq.0 == 0 || mark.crc == crc(mark.seq)));
            // A node that another has overtaken knows less than its edge, until it looks.
            (self.durable, self.committed) =
                (self.durable.max(ack.durable.seq.0), self.committed.max(ack.committed.seq.0));
        }
        match refused {
            None | Some(RefusedRequest::PushedBack { .. } | RefusedRequest::NotReady { .. }) => {}
            Some(RefusedRequest::Gap { expected, .. }) => {
                assert!(expected.0 > self.durable, "{expected} after {} was acknowledged", self.durable);
                self.durable = expected.0 - 1;
            }
            Some(other) => panic!("{other}"),
        }
    }

    /// Sends batches from somewhere above what is committed, a repetition as often as not; or asks.
    fn step(&mut self, node: &mut Node, random: &mut Random) -> Result<(), Fault> {
        let spools = vec![self.spool];
        let answer = if random.one_in(5) {
            node.ask(|reply, _place| Job::Positions { spools, reply, _place })?
        } else {
            let from = self.durable + 1 - random.below(self.durable - self.committed + 1);
            let count = 1 + random.below(3);
            let batches = (from..from + count).map(|seq| self.batch(seq)).collect();
            node.ask(|reply, _place| Job::Batches { class: Class::Readings, batches, reply, _place })?
        };
        self.heard(answer);
        Ok(())
    }

    fn rows_up_to(&self, seq: u64) -> u64 {
        (1..=seq).map(self.rows).sum()
    }
}

/// A process. Dropping it waits for its errands, as a machine that has lost power does nothing any more.
struct Node {
    ingest: Ingest<SimLayer>,
    jobs: Jobs,
    catalogue: Arc<Catalogue>,
    _runtime: Runtime,
}

impl Node {
    fn start(layer: &SimLayer, settings: Settings, store: Store) -> Result<Self, StartError> {
        // Few threads: no errand may hold one while it waits for another.
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(2).max_blocking_threads(8).enable_time().build().unwrap();
        let (catalogue, metrics) = (Arc::new(Catalogue::default()), Arc::new(Metrics::default()));
        let handle = runtime.handle().clone();
        let opened = Ingest::open(layer.clone(), settings, store, Arc::clone(&catalogue), metrics, handle);
        let (ingest, jobs) = opened?;
        Ok(Self { ingest, jobs, catalogue, _runtime: runtime })
    }

    fn ask(
        &mut self,
        job: impl FnOnce(Reply, OwnedSemaphorePermit) -> Job,
    ) -> Result<Result<Acks, RefusedAnswer>, Fault> {
        let (reply, mut answered) = oneshot::channel();
        let place = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        self.jobs.send(job(reply, place)).unwrap();
        loop {
            self.ingest.turn()?;
            if let Ok(answer) = answered.try_recv() {
                return Ok(answer);
            }
        }
    }

    /// Last batch of a sequence in the table, and last one that readers see. No row is missing or there twice.
    fn shown(&self, sender: &Sender) -> (u64, u64) {
        let Some(state) = self.catalogue.state(&sender.stream) else { return (0, 0) };
        let committed = state.snapshot.txn.get(&sender.spool).map_or(0, |mark| mark.seq.0);
        let HotAnswer::Rows(parts) = state.hot.answer(state.snapshot.version, state.snapshot.version) else {
            panic!("the newest version is always answered for");
        };
        let runs = parts.iter().flat_map(|part| &part.runs).filter(|run| run.spool == sender.spool);
        let mut last = committed;
        for run in runs {
            last += 1;
            assert_eq!((run.seq.0, run.rows as u64), (last, (sender.rows)(last)), "committed are {committed}");
        }
        (committed, last)
    }

    /// What was acknowledged is shown, what is shown was sent, and the files have exactly what is committed.
    fn check(&self, layer: &SimLayer, senders: &[Sender]) {
        let mut rows = BTreeMap::<&StreamName, u64>::new();
        for sender in senders {
            let (committed, last) = self.shown(sender);
            let (stream, durable) = (&sender.stream, sender.durable);
            assert!(committed >= sender.committed, "{stream}: {committed} of {} committed", sender.committed);
            assert!(last >= durable, "{stream}: {last} of {durable} durable");
            assert!(last <= sender.batches.len() as u64);
            *rows.entry(&sender.stream).or_default() += sender.rows_up_to(committed);
        }
        for (stream, rows) in rows {
            let Some(state) = self.catalogue.state(stream) else { continue };
            if let Some(on_disk) = rows_on_disk(layer, stream, &state.snapshot) {
                assert_eq!(on_disk, rows, "{stream}");
            }
        }
    }

    /// Of each sender the rows are told that are committed, when nothing else is under way: each once, whenever the power was cut.
    fn check_ledger(&self, senders: &[Sender]) {
        let told = self.catalogue.ledger().entries();
        for sender in senders {
            let of_sender = told.iter().find(|entry| (entry.spool, &entry.stream) == (sender.spool, &sender.stream));
            let (rows, last) = of_sender.map_or((0, 0), |entry| (entry.rows, entry.durable.0));
            let (committed, _) = self.shown(sender);
            assert_eq!((rows, last), (sender.rows_up_to(committed), committed), "{}", sender.stream);
        }
    }

    /// Runs until everything is committed.
    fn drain(&mut self) {
        self.ingest.stopping = Some(Instant::now());
        while self.ingest.turn().unwrap() {}
        assert!(self.ingest.streams.values().all(|stream| stream.hot.is_empty()));
    }
}

fn life(layer: &SimLayer, senders: &mut [Sender], random: &mut Random, steps: u64) {
    let Ok(store) = sim_store(layer) else { return };
    let Ok(mut node) = Node::start(layer, settings("/a"), store) else { return };
    node.check(layer, senders);
    for _ in 0..steps {
        let sender = random.below(senders.len() as u64) as usize;
        if senders[sender].step(&mut node, random).is_err() {
            return;
        }
    }
    node.check(layer, senders);
}

#[test]
fn what_was_acknowledged_survives_power_cuts() {
    let mut committed = 0;
    for (_, mut random) in seeds(SEEDS) {
        let layer = machine();
        let mut senders = [Sender::new(1, "traffic"), Sender::new(2, "traffic"), Sender::new(1, "noise")];
        for _ in 0..LIVES {
            layer.fail_after(random.below(250));
            life(&layer, &mut senders, &mut random, STEPS);
            layer.power_cut(&mut random);
        }
        layer.fail_after(u64::MAX);
        let mut node = Node::start(&layer, settings("/a"), sim_store(&layer).unwrap()).unwrap();
        node.check(&layer, &senders);
        for sender in &mut senders {
            sender.step(&mut node, &mut random).unwrap();
        }
        node.drain();
        node.check(&layer, &senders);
        node.check_ledger(&senders);
        committed += senders.iter().map(|sender| node.shown(sender).0).sum::<u64>();
        drop(node);
        Node::start(&layer, settings("/a"), sim_store(&layer).unwrap()).unwrap().check_ledger(&senders);
    }
    assert!(committed > 0);
}

#[test]
fn two_nodes_with_one_store_have_every_row_once() {
    for (_, mut random) in seeds(60) {
        let layer = machine();
        let mut senders = [Sender::new(1, "traffic"), Sender::new(2, "traffic"), Sender::new(3, "traffic")];
        let mut at = [0_usize; 3];
        let start = |directory| Node::start(&layer, settings(directory), sim_store(&layer).unwrap()).unwrap();
        let mut nodes = [start("/a"), start("/b")];
        for _ in 0..60 {
            let index = random.below(3) as usize;
            if random.one_in(6) {
                // It moves: what the old node called durable says nothing about the new one.
                at[index] = 1 - at[index];
                senders[index].durable = senders[index].committed;
                if random.one_in(2) {
                    let (spools, node) = (vec![senders[index].spool], &mut nodes[at[index]]);
                    let answer = node.ask(|reply, _place| Job::Positions { spools, reply, _place }).unwrap();
                    senders[index].heard(answer);
                }
            }
            senders[index].step(&mut nodes[at[index]], &mut random).unwrap();
            for node in &nodes {
                senders.iter().for_each(|sender| {
                    node.shown(sender);
                });
            }
        }
        nodes.iter_mut().for_each(Node::drain);
        drop(nodes);
        let node = start("/b");
        let rows: u64 = senders.iter().map(|sender| sender.rows_up_to(node.shown(sender).0)).sum();
        let snapshot = node.catalogue.state(&senders[0].stream).unwrap().snapshot.clone();
        assert_eq!(rows_on_disk(&layer, &senders[0].stream, &snapshot), Some(rows));
        assert!(senders.iter().all(|sender| node.shown(sender).0 >= sender.durable));
    }
}

#[test]
fn a_table_that_cannot_be_opened_stops_only_its_own_stream() {
    let layer = machine();
    let mut senders = [Sender::new(1, "traffic"), Sender::new(1, "bad")];
    let mut random = Random::new(7);
    let start = || Node::start(&layer, settings("/a"), sim_store(&layer).unwrap()).unwrap();
    let mut node = start();
    senders.iter_mut().for_each(|sender| sender.step(&mut node, &mut random).unwrap());
    node.drain();
    drop(node);
    layer.edit(Path::new("/tables/bad/_delta_log/00000000000000000000.json"), |bytes| bytes.fill(b'x')).unwrap();
    let mut node = start();
    assert!(node.catalogue.state(&senders[1].stream).is_none());
    let [traffic, bad] = &mut senders;
    let spools = vec![traffic.spool];
    let answer = node.ask(|reply, _place| Job::Positions { spools, reply, _place }).unwrap().unwrap();
    assert_eq!(answer.acks.iter().map(|ack| &ack.stream).collect::<Vec<_>>(), [&traffic.stream]);
    let before = traffic.durable;
    let batches = vec![traffic.batch(before + 1)];
    traffic.heard(node.ask(|reply, _place| Job::Batches { class: Class::Readings, batches, reply, _place }).unwrap());
    assert_eq!(traffic.durable, before + 1);
    let batches = vec![bad.batch(bad.durable + 1)];
    let answer = node.ask(|reply, _place| Job::Batches { class: Class::Readings, batches, reply, _place }).unwrap();
    assert!(matches!(answer.unwrap_err().refused, RefusedRequest::PushedBack { .. }));
    node.drain();
}

#[test]
fn questions_for_many_tables_need_few_threads() {
    let layer = machine();
    let mut node = Node::start(&layer, settings("/a"), sim_store(&layer).unwrap()).unwrap();
    let mut senders = (0..24).map(|index| Sender::new(1, &format!("s{index}"))).collect::<Vec<_>>();
    for sender in &mut senders {
        let batches = vec![sender.batch(1)];
        sender
            .heard(node.ask(|reply, _place| Job::Batches { class: Class::Readings, batches, reply, _place }).unwrap());
    }
    let spools = vec![senders[0].spool];
    let answer = node.ask(|reply, _place| Job::Positions { spools, reply, _place }).unwrap().unwrap();
    assert_eq!(answer.acks.len(), 24);
    node.drain();
}

/// A file system whose files below one directory cannot be made, while it is shut.
#[derive(Debug, Clone)]
struct Gate {
    inner: SimLayer,
    below: &'static str,
    shut: Arc<AtomicBool>,
}

impl FileLayer for Gate {
    type File = <SimLayer as FileLayer>::File;

    fn create_dir(&self, path: &Path) -> std::io::Result<()> {
        self.inner.create_dir(path)
    }
    fn exists(&self, path: &Path) -> std::io::Result<bool> {
        self.inner.exists(path)
    }
    fn list(&self, directory: &Path) -> std::io::Result<Vec<String>> {
        self.inner.list(directory)
    }
    fn create(&self, path: &Path) -> std::io::Result<Self::File> {
        if self.shut.load(Ordering::Relaxed) && path.starts_with(self.below) {
            return Err(std::io::Error::other("the gate is shut"));
        }
        self.inner.create(path)
    }
    fn open(&self, path: &Path) -> std::io::Result<Self::File> {
        self.inner.open(path)
    }
    fn remove(&self, path: &Path) -> std::io::Result<()> {
        self.inner.remove(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
        self.inner.rename(from, to)
    }
    fn link(&self, from: &Path, to: &Path) -> std::io::Result<()> {
        self.inner.link(from, to)
    }
    fn sync_dir(&self, directory: &Path) -> std::io::Result<()> {
        self.inner.sync_dir(directory)
    }
}

#[test]
fn a_stream_that_cannot_commit_is_pushed_back_alone_and_pins_no_segments() {
    let layer = machine();
    let gate = Gate { inner: layer.clone(), below: "/tables/stuck", shut: Arc::default() };
    let open = || {
        let store = sim_store_through(gate.clone(), &layer).unwrap();
        let mut settings = settings("/a");
        settings.hot.max_bytes = Size(4 << 20);
        Node::start(&layer, settings, store).unwrap()
    };
    let mut node = open();
    let mut stuck = Sender { rows: |_| 200, ..Sender::new(1, "stuck") };
    let mut traffic = Sender { rows: |_| 200, ..Sender::new(1, "traffic") };
    let send = |sender: &mut Sender, node: &mut Node| {
        let batches = vec![sender.batch(sender.durable + 1)];
        let before = sender.durable;
        let answer = node.ask(|reply, _place| Job::Batches { class: Class::Readings, batches, reply, _place }).unwrap();
        sender.heard(answer);
        sender.durable > before
    };
    // With all of its fields.
    while stuck.durable < WIDER_FROM {
        assert!(send(&mut stuck, &mut node));
    }
    gate.shut.store(true, Ordering::Relaxed);
    while send(&mut stuck, &mut node) {
        assert!(stuck.durable < 200, "it is never pushed back");
    }
    let kept = stuck.durable;
    let stream = &node.ingest.streams[&stuck.stream];
    assert!(kept > 5, "{kept} batches, {} and {} bytes", stream.hot.bytes(), stream.hot.wal_bytes());
    // Three times what the WAL can hold.
    let wal_max = node.ingest.settings.wal.max_bytes.0;
    let (mut bytes, mut refused) = (0, 0);
    while bytes < 3 * wal_max {
        if send(&mut traffic, &mut node) {
            bytes += traffic.batches[traffic.durable as usize - 1].bytes().len() as u64;
            refused = 0;
        } else {
            refused += 1;
            let of = |stream: &Stream| (stream.hot.bytes(), stream.hot.wal_bytes(), stream.hot.wal_from());
            let streams = node.ingest.streams.values().map(of).collect::<Vec<_>>();
            let (wal, end) = (node.ingest.wal.bytes(), node.ingest.wal.end());
            assert!(refused < 100, "pushed back at {bytes} bytes: wal {wal} to {end}, streams {streams:?}");
            node.ingest.turn().unwrap();
        }
    }
    assert!(node.ingest.metrics.wal_carried.get() > 0);
    node.check(&layer, &[]);
    assert_eq!(node.shown(&stuck).1, kept);
    // Killed, and still not able to commit.
    drop(node);
    let mut node = open();
    assert_eq!(node.shown(&stuck).1, kept);
    assert!(node.shown(&traffic).1 >= traffic.durable);
    gate.shut.store(false, Ordering::Relaxed);
    node.drain();
    assert_eq!((node.shown(&stuck).0, node.shown(&traffic).0), (kept, traffic.durable));
    node.check(&layer, &[stuck, traffic]);
}
