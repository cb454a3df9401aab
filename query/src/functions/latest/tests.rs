//! `latest` against rows that are compared one by one, while batches arrive and are committed, compacted and taken away.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use arrow::datatypes::{Int64Type, TimestampMicrosecondType};
use arrow_array::cast::AsArray;
use arrow_array::{Date32Array, Int64Array, StringArray, TimestampMicrosecondArray, new_null_array};
use deltalake_core::DeltaTable;
use deltalake_core::kernel::{DataType as DeltaType, PrimitiveType};
use deltalake_core::operations::create::CreateBuilder;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use wire::DAY_US;
use wire::hot::{HotAnswer, HotError, HotRows, HotSource};
use wire::schema::{FieldType, StreamField, table_schema};

use super::*;
use crate::as_of::AsOf;
use crate::catalog::{ColdTable, SpoolFacts, TablesError};
use crate::engine::tests::{data_files, reader};
use crate::engine::{Engine, EngineSettings};

const DAY: i64 = 19_000;

/// A row as the model has it: device, ts, _received_at, _spool, _seq, v.
type Row = (Option<String>, i64, i64, String, i64, i64);

/// A batch, and the version that holds it, if one does.
#[derive(Debug, Clone)]
struct Batch {
    rows: Vec<Row>,
    version: Option<u64>,
}

#[derive(Debug)]
struct State {
    versions: Vec<ColdTable>,
    batches: Vec<Batch>,
    /// Days that were taken away, and at which version.
    gone: Vec<(i64, u64)>,
    /// The version that statements are pinned to.
    at: u64,
}

/// A stream `readings` that is written by hand.
#[derive(Debug)]
struct World {
    dir: PathBuf,
    schema: SchemaRef,
    table: tokio::sync::Mutex<Option<DeltaTable>>,
    state: Mutex<State>,
    asked: AtomicUsize,
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl World {
    async fn new() -> Arc<Self> {
        let dir = std::env::temp_dir().join(format!("weir-latest-{:032x}", rand::random::<u128>()));
        std::fs::create_dir_all(&dir).unwrap();
        let field = StreamField { name: "v".parse().unwrap(), kind: FieldType::Int64 };
        let schema: SchemaRef = Arc::new(table_schema(&[field]));
        let mut create = CreateBuilder::new().with_location(dir.to_str().unwrap()).with_partition_columns(["_date"]);
        for column in schema.fields() {
            let kind = match column.data_type() {
                arrow_schema::DataType::Utf8 => PrimitiveType::String,
                arrow_schema::DataType::Int64 => PrimitiveType::Long,
                arrow_schema::DataType::Date32 => PrimitiveType::Date,
                _ => PrimitiveType::Timestamp,
            };
            create = create.with_column(column.name(), DeltaType::Primitive(kind), column.is_nullable(), None);
        }
        let table = create.await.unwrap();
        let first = Self::cold(&table, &schema);
        let state = State { versions: vec![first], batches: Vec::new(), gone: Vec::new(), at: 0 };
        let (table, state) = (tokio::sync::Mutex::new(Some(table)), Mutex::new(state));
        Arc::new(Self { dir, schema, table, state, asked: AtomicUsize::new(0) })
    }

    fn cold(table: &DeltaTable, schema: &SchemaRef) -> ColdTable {
        ColdTable {
            version: table.version().unwrap(),
            log_store: table.log_store(),
            files: data_files(table),
            txn: Arc::default(),
            description: None,
            schema: Arc::clone(schema),
        }
    }

    fn record_batch(&self, rows: &[Row]) -> RecordBatch {
        let columns = self.schema.fields().iter().map(|field| match field.name().as_str() {
            "device" => Arc::new(rows.iter().map(|row| row.0.as_deref()).collect::<StringArray>()) as ArrayRef,
            "ts" => {
                Arc::new(TimestampMicrosecondArray::from_iter_values(rows.iter().map(|row| row.1)).with_timezone("UTC"))
            }
            "_received_at" => {
                Arc::new(TimestampMicrosecondArray::from_iter_values(rows.iter().map(|row| row.2)).with_timezone("UTC"))
            }
            "_spool" => Arc::new(StringArray::from_iter_values(rows.iter().map(|row| &row.3))),
            "_seq" => Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| row.4))),
            "v" => Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| row.5))),
            "_date" => Arc::new(Date32Array::from_iter_values(rows.iter().map(|row| row.1.div_euclid(DAY_US) as i32))),
            _ => new_null_array(field.data_type(), rows.len()),
        });
        RecordBatch::try_new(Arc::clone(&self.schema), columns.collect()).unwrap()
    }

    fn arrive(&self, rows: Vec<Row>) {
        self.state.lock().batches.push(Batch { rows, version: None });
    }

    async fn change<F>(&self, change: impl FnOnce(DeltaTable) -> F) -> u64
    where
        F: Future<Output = DeltaTable>,
    {
        let mut held = self.table.lock().await;
        let table = change(held.take().unwrap()).await;
        let cold = Self::cold(&table, &self.schema);
        *held = Some(table);
        let mut state = self.state.lock();
        let version = cold.version;
        // An operation that found nothing to do made no version.
        while state.versions.len() as u64 <= version {
            state.versions.push(cold.clone());
        }
        version
    }

    /// Commits all that waits, each batch as files of its own.
    async fn commit(&self) {
        let waiting: Vec<usize> = {
            let state = self.state.lock();
            (0..state.batches.len()).filter(|index| state.batches[*index].version.is_none()).collect()
        };
        let batches: Vec<RecordBatch> = {
            let state = self.state.lock();
            waiting.iter().map(|index| self.record_batch(&state.batches[*index].rows)).collect()
        };
        if batches.is_empty() {
            return;
        }
        let version = self.change(async |table| table.write(batches).await.unwrap()).await;
        let mut state = self.state.lock();
        for index in waiting {
            state.batches[index].version = Some(version);
        }
    }

    async fn compact(&self) {
        self.change(async |table| table.optimize().await.unwrap().0).await;
    }

    async fn remove_day(&self, day: i64) {
        let date = chrono::DateTime::from_timestamp_micros(day * DAY_US).unwrap().format("%Y-%m-%d");
        let predicate = format!("_date = '{date}'");
        let version = self.change(async |table| table.delete().with_predicate(predicate).await.unwrap().0).await;
        self.state.lock().gone.push((day, version));
    }

    /// The newest row of each device, for a statement at this version.
    fn expected(&self) -> Vec<String> {
        let state = self.state.lock();
        let mut newest: BTreeMap<Option<String>, &Row> = BTreeMap::new();
        for batch in &state.batches {
            let committed = batch.version.filter(|version| *version <= state.at);
            for row in &batch.rows {
                let day = row.1.div_euclid(DAY_US);
                let gone =
                    |version: u64| state.gone.iter().any(|(gone, at)| *gone == day && version < *at && *at <= state.at);
                if committed.is_some_and(gone) {
                    continue;
                }
                let held = newest.entry(row.0.clone()).or_insert(row);
                let age = |row: &Row| (row.1, row.2, row.3.clone(), row.4, row.5);
                if age(row) > age(held) {
                    *held = row;
                }
            }
        }
        newest
            .into_values()
            .map(|row| format!("{:?}|{}|{}|{}|{}|{}", row.0, row.1, row.2, row.3, row.4, row.5))
            .collect()
    }
}

#[derive(Debug, Clone)]
struct Handle(Arc<World>);

#[async_trait]
impl HotSource for Handle {
    async fn hot(&self, _: &StreamName, at: u64) -> Result<HotAnswer, HotError> {
        self.0.asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let state = self.0.state.lock();
        let above = state.batches.iter().filter(|batch| batch.version.is_none_or(|version| version > at));
        Ok(HotAnswer::Rows(above.map(|batch| HotRows::new(self.0.record_batch(&batch.rows), Vec::new())).collect()))
    }
}

#[async_trait]
impl Tables for Handle {
    fn streams(&self) -> Vec<StreamName> {
        vec!["readings".parse().unwrap()]
    }

    fn cold(&self, stream: &StreamName) -> Option<ColdTable> {
        let state = self.0.state.lock();
        (stream.as_str() == "readings").then(|| state.versions[state.at as usize].clone())
    }

    async fn reload(&self, _: &StreamName, at_least: u64) -> Result<ColdTable, TablesError> {
        Ok(self.0.state.lock().versions[at_least as usize].clone())
    }

    async fn cold_as_of(&self, stream: &StreamName, _: AsOf) -> Result<ColdTable, TablesError> {
        Err(TablesError { stream: stream.clone(), detail: "nobody asks".to_owned() })
    }

    fn spools(&self) -> Vec<SpoolFacts> {
        Vec::new()
    }

    fn changed(&self) -> tokio::sync::watch::Receiver<u64> {
        tokio::sync::watch::channel(0).1
    }

    fn hot(&self) -> Arc<dyn HotSource> {
        Arc::new(self.clone())
    }
}

fn engine(world: &Arc<World>, latest_bytes_max: usize) -> Engine {
    let settings = EngineSettings { latest_bytes_max, ..EngineSettings::default() };
    Engine::new(Arc::new(Handle(Arc::clone(world))), settings).unwrap()
}

async fn asked(engine: &Engine, sql: &str) -> Vec<String> {
    told(engine.rows(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}")))
}

fn told(batches: Vec<RecordBatch>) -> Vec<String> {
    let mut told = Vec::new();
    for batch in batches {
        let column = |name: &str| batch.column_by_name(name).unwrap();
        for row in 0..batch.num_rows() {
            let device = column("device").as_string::<i32>();
            let device = device.is_valid(row).then(|| device.value(row).to_owned());
            let us = |name: &str| column(name).as_primitive::<TimestampMicrosecondType>().value(row);
            let int = |name: &str| column(name).as_primitive::<Int64Type>().value(row);
            let spool = column("_spool").as_string::<i32>().value(row);
            told.push(format!("{device:?}|{}|{}|{spool}|{}|{}", us("ts"), us("_received_at"), int("_seq"), int("v")));
        }
    }
    told.sort();
    told
}

const ALL: &str = "SELECT * FROM latest('readings')";
/// The same question in other words.
const DISTINCT: &str = "SELECT DISTINCT ON (device) * FROM readings ORDER BY device, ts DESC";

/// What a reader is answered whose scope has every row.
async fn asked_in_scope(engine: &Engine, sql: &str) -> Vec<String> {
    told(engine.rows_as(&reader(None, Some("v >= 0")), sql, usize::MAX).await.unwrap())
}

fn row(device: &str, ts: i64, received_at: i64, seq: i64, v: i64) -> Row {
    (Some(device.to_owned()), DAY * DAY_US + ts, received_at, "s".to_owned(), seq, v)
}

#[tokio::test(flavor = "multi_thread")]
async fn late_rows_lose_and_ties_are_told_in_order() {
    let world = World::new().await;
    let engine = engine(&world, 1 << 24);
    assert_eq!(asked(&engine, ALL).await, Vec::<String>::new());
    world.arrive(vec![row("a", 10, 1, 1, 1), row("b", 5, 1, 1, 2)]);
    world.arrive(vec![row("a", 9, 2, 2, 3), row("b", 5, 2, 2, 4)]);
    let check = async |expected: [i64; 2]| {
        let values = engine.rows("SELECT v FROM latest('readings') ORDER BY device").await.unwrap();
        assert_eq!(values[0].column(0).as_primitive::<Int64Type>().values(), &expected);
        assert_eq!(asked(&engine, ALL).await, world.expected());
    };
    check([1, 4]).await;
    world.commit().await;
    world.state.lock().at = 1;
    check([1, 4]).await;
    // Late, and then a tie with a greater value in the same batch.
    world.arrive(vec![row("b", 4, 9, 9, 5), row("a", 10, 1, 2, 6), row("a", 10, 1, 2, 7)]);
    check([7, 4]).await;
    world.commit().await;
    world.state.lock().at = 2;
    check([7, 4]).await;
    let one = asked(&engine, "SELECT * FROM latest('readings') WHERE device = 'a'").await;
    assert_eq!(one, world.expected()[..1]);
    assert_eq!(
        asked(&engine, "SELECT * FROM latest('readings') WHERE device IN ('b', 'c') AND v < 3").await,
        Vec::<String>::new()
    );
    let both = "SELECT count(*) AS n FROM latest('readings') l JOIN readings r ON l.device = r.device AND l.ts = r.ts AND l.v = r.v";
    let rows = engine.rows(both).await.unwrap();
    assert_eq!(rows[0].column(0).as_primitive::<Int64Type>().value(0), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn newer_versions_read_only_what_was_added() {
    let world = World::new().await;
    let engine = engine(&world, 1 << 24);
    let read = |what: &std::sync::atomic::AtomicU64| what.load(std::sync::atomic::Ordering::Relaxed);
    let cache = Arc::clone(engine.latest_cache());
    for seq in 0..5 {
        world.arrive(vec![row("a", seq, seq, seq, seq)]);
        world.commit().await;
        let version = world.state.lock().versions.len() as u64 - 1;
        world.state.lock().at = version;
        assert_eq!(asked(&engine, ALL).await, world.expected());
        assert_eq!(asked(&engine, ALL).await, world.expected());
    }
    assert_eq!((read(&cache.rebuilt), read(&cache.files)), (1, 5));
    world.compact().await;
    let version = world.state.lock().versions.len() as u64 - 1;
    world.state.lock().at = version;
    assert_eq!(asked(&engine, ALL).await, world.expected());
    assert_eq!((read(&cache.rebuilt), read(&cache.files)), (1, 5));
    // Back in time, between appends: nothing is read; before what was taken away: everything is.
    world.state.lock().at = 3;
    assert_eq!(asked(&engine, ALL).await, world.expected());
    assert_eq!(read(&cache.rebuilt), 1);
    world.remove_day(DAY).await;
    let version = world.state.lock().versions.len() as u64 - 1;
    world.state.lock().at = version;
    assert_eq!(asked(&engine, ALL).await, Vec::<String>::new());
    assert_eq!(read(&cache.rebuilt), 2);
    world.state.lock().at = 3;
    assert_eq!(asked(&engine, ALL).await, world.expected());
    assert_eq!(read(&cache.rebuilt), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_takes_a_newest_row_away_makes_a_table_be_read_anew() {
    let world = World::new().await;
    let engine = engine(&world, 1 << 24);
    let rebuilt = || engine.latest_cache().rebuilt.load(std::sync::atomic::Ordering::Relaxed);
    let of_day =
        |device: &str, day: i64| (Some(device.to_owned()), (DAY + day) * DAY_US, day, "s".to_owned(), day, day);
    let check = async |expected: u64| {
        let newest = world.state.lock().versions.len() as u64 - 1;
        world.state.lock().at = newest;
        assert_eq!(asked(&engine, ALL).await, world.expected());
        assert_eq!(rebuilt(), expected);
    };
    for (day, devices) in [(0, vec!["a", "b"]), (1, vec!["a", "b", "silent since"]), (2, vec!["a", "b"])] {
        world.arrive(devices.into_iter().map(|device| of_day(device, day)).collect());
        world.commit().await;
        check(1).await;
    }
    // Everybody has a later row.
    world.remove_day(DAY).await;
    check(1).await;
    // Who was pinned before it was taken away sees the same newest rows.
    world.state.lock().at = 3;
    assert_eq!((asked(&engine, ALL).await, rebuilt()), (world.expected(), 1));
    world.remove_day(DAY + 1).await;
    check(2).await;
    assert_eq!(world.expected().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_told() {
    let world = World::new().await;
    world.arrive((0..2_000).map(|device| row(&format!("device-{device}"), 1, 1, 1, 1)).collect());
    world.commit().await;
    world.state.lock().at = 1;
    let error = engine(&world, 50_000).rows(ALL).await.unwrap_err();
    assert!(error.to_string().contains("latest_memory"), "{error}");
    assert_eq!(engine(&world, 10_000_000).rows(ALL).await.unwrap()[0].num_rows(), 2_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_question_in_other_words_is_answered_from_what_is_kept() {
    let world = World::new().await;
    world.arrive(vec![row("a", 10, 1, 1, 1), row("b", 5, 1, 1, 2), row("a", 20, 1, 1, 3), row("b", 7, 1, 1, 4)]);
    world.commit().await;
    world.state.lock().at = 1;
    let check = async |question: &str, from_kept: bool, expected: &[i64]| {
        let engine = engine(&world, 1 << 24);
        let rows = engine.rows(question).await.unwrap_or_else(|error| panic!("{question}: {error}"));
        let values: Vec<i64> =
            rows.iter().flat_map(|batch| batch.column(0).as_primitive::<Int64Type>().values().to_vec()).collect();
        assert_eq!(values, expected, "{question}");
        let read = engine.latest_cache().rebuilt.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(read == 1, from_kept, "{question}");
    };
    let at = |us: i64| format!("arrow_cast({}, 'Timestamp(Microsecond, Some(\"UTC\"))')", DAY * DAY_US + us);
    check("SELECT DISTINCT ON (device) v FROM readings ORDER BY device, ts DESC", true, &[3, 4]).await;
    check("SELECT DISTINCT ON (r.device) r.v + 1 FROM readings AS r ORDER BY r.device DESC, r.ts DESC", true, &[5, 4])
        .await;
    let newest = "(SELECT DISTINCT ON (device) * FROM readings WHERE device <> 'b' ORDER BY device, ts DESC)";
    check(&format!("SELECT sum(v) FROM {newest} AS n"), true, &[3]).await;
    let since = format!("SELECT DISTINCT ON (device) v FROM readings WHERE ts >= {} ORDER BY device, ts DESC", at(8));
    check(&since, true, &[3]).await;
    // Other questions.
    let until = format!("SELECT DISTINCT ON (device) v FROM readings WHERE ts < {} ORDER BY device, ts DESC", at(20));
    check(&until, false, &[1, 4]).await;
    check("SELECT DISTINCT ON (device) v FROM readings ORDER BY device, ts", false, &[1, 2]).await;
    check("SELECT DISTINCT ON (device) v FROM readings WHERE v < 3 ORDER BY device, ts DESC", false, &[1, 2]).await;
    check("SELECT DISTINCT ON (device) v FROM readings ORDER BY device, v", false, &[1, 2]).await;
    check("SELECT DISTINCT ON (device) v FROM readings ORDER BY device, ts DESC, v", false, &[3, 4]).await;
    let related = "SELECT DISTINCT ON (device) v FROM readings r \
                   WHERE EXISTS (SELECT 1 FROM (VALUES (1), (2)) AS l(most) WHERE l.most = r.v) ORDER BY device, ts DESC";
    check(related, false, &[1, 2]).await;
    // What does not fit is read from the table.
    let small = engine(&world, 10);
    assert!(small.rows(ALL).await.is_err());
    assert_eq!(asked(&small, DISTINCT).await, world.expected());
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_streams_get_a_hint() {
    let world = World::new().await;
    let engine = engine(&world, 1 << 20);
    let error = engine.rows("SELECT * FROM latest('reading')").await.unwrap_err();
    assert_eq!(error.hint(), Some("did you mean `readings`?"), "{error}");
    let error = engine.rows("SELECT * FROM latest(5)").await.unwrap_err();
    assert!(error.to_string().contains("in quotes"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn as_a_naive_computation_has_it() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for round in 0..6 {
        let world = World::new().await;
        let engine = engine(&world, 1 << 24);
        let mut seq = 0;
        for step in 0..30 {
            match random.random_range(0..10) {
                0..5 => {
                    seq += 1;
                    let rows = (0..random.random_range(1..30)).map(|_| {
                        let device = random.random_bool(0.95).then(|| format!("d{}", random.random_range(0..8)));
                        let ts = (DAY + random.random_range(0..3)) * DAY_US + random.random_range(0..20);
                        let (received_at, spool) = (seq / 3, format!("s{}", random.random_range(0..2)));
                        (device, ts, received_at, spool, random.random_range(0..3), random.random_range(0..1_000))
                    });
                    let rows = rows.collect();
                    world.arrive(rows);
                }
                5..8 => world.commit().await,
                8 => world.compact().await,
                _ => {
                    world.commit().await;
                    world.remove_day(DAY + random.random_range(0..3)).await;
                }
            }
            let newest = world.state.lock().versions.len() as u64 - 1;
            world.state.lock().at = newest - random.random_range(0..3).min(newest);
            let told = || format!("round {round}, step {step}, seed {seed}");
            assert_eq!(asked(&engine, ALL).await, world.expected(), "{}", told());
            assert_eq!(asked(&engine, DISTINCT).await, world.expected(), "{}", told());
            assert_eq!(asked_in_scope(&engine, ALL).await, world.expected(), "{}", told());
            let one = asked(&engine, "SELECT * FROM latest('readings') WHERE device = 'd3'").await;
            let of_one: Vec<String> =
                world.expected().into_iter().filter(|row| row.starts_with("Some(\"d3\")")).collect();
            assert_eq!(one, of_one, "{}", told());
        }
    }
}

/// 100,000 devices, cold and hot. Prints what it took; `--release` gives the numbers of BENCHMARKS.md.
#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_devices() {
    let world = World::new().await;
    let devices = 100_000;
    for seq in 0..2 {
        world.arrive((0..devices).map(|device| row(&format!("device-{device:06}"), seq, seq, seq, seq)).collect());
    }
    world.commit().await;
    world.state.lock().at = 1;
    world.arrive((0..8_192).map(|device| row(&format!("device-{device:06}"), 5, 5, 5, 5)).collect());
    let engine = engine(&world, 256 << 20);
    let begun = Instant::now();
    let rows = engine.rows(ALL).await.unwrap();
    println!("first {:?}", begun.elapsed());
    assert_eq!(rows.iter().map(RecordBatch::num_rows).sum::<usize>(), devices as usize);
    let mut whole: Vec<Duration> = Vec::new();
    let mut one: Vec<Duration> = Vec::new();
    for index in 0..50 {
        let begun = Instant::now();
        engine.rows("SELECT device, ts, v FROM latest('readings')").await.unwrap();
        whole.push(begun.elapsed());
        let sql = format!("SELECT * FROM latest('readings') WHERE device = 'device-{:06}'", index * 1_999);
        let begun = Instant::now();
        let rows = engine.rows(&sql).await.unwrap();
        one.push(begun.elapsed());
        assert_eq!(rows[0].num_rows(), 1);
    }
    whole.sort();
    one.sort();
    println!("whole p50 {:?} max {:?}; one p50 {:?} max {:?}", whole[25], whole[49], one[25], one[49]);
}
