use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{
    ArrayRef, Date32Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray, new_null_array,
};
use arrow_schema::SchemaRef;
use async_trait::async_trait;
use chrono::{DateTime, NaiveDate};
use datafusion::datasource::physical_plan::FileScanConfig;
use datafusion::datasource::source::DataSourceExec;
use deltalake_core::kernel::{DataType as DeltaType, PrimitiveType};
use deltalake_core::operations::create::CreateBuilder;
use tokio::sync::watch;
use wire::hot::{HotAnswer, HotError, HotRows, HotRun, HotSource};
use wire::schema::{FieldType, StreamField, table_schema};
use wire::{DAY_US, DataFile, DataFiles, Mark, Seq, SpoolId, StreamName};

use super::*;
use crate::caller::Door;
use crate::catalog::{ColdTable, SpoolFacts, TablesError};
use crate::cold::PagesExec;

mod limits;
mod scope;

pub(crate) use scope::reader;

const ROWS: usize = 10;
/// Batches of one Delta commit.
const BATCHES_PER_COMMIT: usize = 4;
const COMMITS: usize = 5;
const BATCHES: usize = COMMITS * BATCHES_PER_COMMIT;
/// Older versions than this many behind are answered `Stale`.
const GRACE: usize = 1;

/// The table `traffic` with a new state at every question: batch after batch arrives hot, and is committed later.
#[derive(Debug)]
pub(crate) struct Traffic {
    dir: PathBuf,
    versions: Vec<ColdTable>,
    batches: Vec<RecordBatch>,
    arrived: AtomicUsize,
    /// Batches that arrive between two questions.
    step: AtomicUsize,
    stale: AtomicUsize,
    /// How long the catalogue holds up who asks it, ms.
    hold_ms: AtomicU64,
}

impl Drop for Traffic {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Batch `index`: one row a minute, all on day `index` after the epoch's day 19,000.
fn batch(schema: &SchemaRef, index: usize) -> RecordBatch {
    let day = 19_000 + index as i64;
    let ts = (0..ROWS as i64).map(|row| day * DAY_US + row * 60_000_000);
    let columns: Vec<ArrayRef> = schema
        .fields()
        .iter()
        .map(|field| match field.name().as_str() {
            "ts" => Arc::new(TimestampMicrosecondArray::from_iter_values(ts.clone()).with_timezone("UTC")) as ArrayRef,
            "device" => Arc::new(StringArray::from_iter_values((0..ROWS).map(|row| device(index, row)))),
            "vehicle_count" => Arc::new(Int64Array::from_iter_values((0..ROWS).map(|row| (index * ROWS + row) as i64))),
            "_date" => Arc::new(Date32Array::from_value(day as i32, ROWS)),
            // Even batches come from one edge, odd ones from the other.
            "_edge" => Arc::new(StringArray::from_iter_values((0..ROWS).map(|_| ["gw-1", "other"][index % 2]))),
            "_spool" => Arc::new(StringArray::from_iter_values((0..ROWS).map(|_| SpoolId([1; 16]).to_string()))),
            "_seq" => Arc::new(Int64Array::from_value(index as i64 + 1, ROWS)),
            _ => new_null_array(field.data_type(), ROWS),
        })
        .collect();
    RecordBatch::try_new(Arc::clone(schema), columns).unwrap()
}

/// Two devices, and in the last commit two others.
fn device(index: usize, row: usize) -> String {
    let kind = if index < BATCHES - BATCHES_PER_COMMIT { 'd' } else { 'e' };
    format!("{kind}{}", row % 2)
}

fn delta_type(kind: &arrow_schema::DataType) -> DeltaType {
    DeltaType::Primitive(match kind {
        arrow_schema::DataType::Utf8 => PrimitiveType::String,
        arrow_schema::DataType::Int64 => PrimitiveType::Long,
        arrow_schema::DataType::Date32 => PrimitiveType::Date,
        arrow_schema::DataType::Timestamp(..) => PrimitiveType::Timestamp,
        other => panic!("no such column here: {other}"),
    })
}

/// The files of a table that delta-rs has written, as its log describes them.
pub(crate) fn data_files(table: &deltalake_core::DeltaTable) -> DataFiles {
    let snapshot = table.snapshot().unwrap().snapshot().clone();
    let log = snapshot.log_data();
    let files = log.iter().map(|file| {
        let stats: serde_json::Value = serde_json::from_str(&file.stats().unwrap()).unwrap();
        let text = |which: &str, column: &str| Some(stats[which][column].as_str()?.to_owned());
        let us = |which: &str| Some(DateTime::parse_from_rfc3339(&text(which, "ts")?).unwrap().timestamp_micros());
        let date = file.partition_values_map()["_date"].clone().unwrap().parse::<NaiveDate>().unwrap();
        Arc::new(DataFile {
            path: file.path().into_owned(),
            date: (date - NaiveDate::default()).num_days() as i32,
            bytes: file.size() as u64,
            rows: stats["numRecords"].as_u64(),
            modified_ms: file.modification_time(),
            ts: us("minValues").zip(us("maxValues").map(|last| last + 1_000)),
            device: text("minValues", "device").zip(text("maxValues", "device")),
            device_nulls: None,
            crc: None,
        })
    });
    DataFiles::default().with(files.collect::<Vec<_>>(), &[])
}

/// What the files hold after so many commits.
fn committed(commits: usize) -> HashMap<SpoolId, Mark> {
    let seq = Seq((commits * BATCHES_PER_COMMIT) as u64);
    HashMap::from([(SpoolId([1; 16]), Mark { seq, crc: 0 })])
}

impl Traffic {
    /// With `arrived` batches, and `step` more at every question.
    pub(crate) async fn new(arrived: usize, step: usize) -> Arc<Self> {
        let dir = std::env::temp_dir().join(format!("weir-query-{:032x}", rand::random::<u128>()));
        std::fs::create_dir_all(&dir).unwrap();
        let field = StreamField { name: "vehicle_count".parse().unwrap(), kind: FieldType::Int64 };
        let schema: SchemaRef = Arc::new(table_schema(&[field]));
        let mut create = CreateBuilder::new().with_location(dir.to_str().unwrap()).with_partition_columns(["_date"]);
        for column in schema.fields() {
            create = create.with_column(column.name(), delta_type(column.data_type()), column.is_nullable(), None);
        }
        let mut table = create.await.unwrap();
        let batches: Vec<RecordBatch> = (0..BATCHES).map(|index| batch(&schema, index)).collect();
        let cold = |table: &deltalake_core::DeltaTable| ColdTable {
            version: table.version().unwrap(),
            log_store: table.log_store(),
            files: data_files(table),
            txn: Arc::new(committed(table.version().unwrap() as usize)),
            description: None,
            schema: Arc::clone(&schema),
        };
        let mut versions = vec![cold(&table)];
        for commit in batches.chunks(BATCHES_PER_COMMIT) {
            table = table.write(commit.to_vec()).await.unwrap();
            versions.push(cold(&table));
        }
        let (arrived, step) = (AtomicUsize::new(arrived), AtomicUsize::new(step));
        Arc::new(Self { dir, versions, batches, arrived, step, stale: AtomicUsize::new(0), hold_ms: AtomicU64::new(0) })
    }

    /// How many batches are there now; then the state moves on.
    fn now(&self) -> usize {
        self.arrived.fetch_add(self.step.load(Ordering::SeqCst), Ordering::SeqCst).min(BATCHES)
    }

    pub(crate) fn arrive(&self, batches: usize) {
        self.arrived.fetch_add(batches, Ordering::SeqCst);
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Handle(pub(crate) Arc<Traffic>);

#[async_trait]
impl HotSource for Handle {
    async fn hot(&self, _: &StreamName, at: u64) -> Result<HotAnswer, HotError> {
        let now = self.0.now();
        let (at, committed) = (at as usize, now / BATCHES_PER_COMMIT);
        if at + GRACE < committed {
            self.0.stale.fetch_add(1, Ordering::SeqCst);
            return Ok(HotAnswer::Stale(committed as u64));
        }
        let first = at * BATCHES_PER_COMMIT;
        let rows = (first..now.max(first)).map(|index| {
            let run = HotRun { spool: SpoolId([1; 16]), seq: Seq(index as u64 + 1), start: 0, rows: ROWS };
            HotRows::new(self.0.batches[index].clone(), vec![run])
        });
        Ok(HotAnswer::Rows(rows.collect()))
    }
}

#[async_trait]
impl Tables for Handle {
    fn streams(&self) -> Vec<StreamName> {
        vec!["traffic".parse().unwrap()]
    }

    fn cold(&self, stream: &StreamName) -> Option<ColdTable> {
        std::thread::sleep(Duration::from_millis(self.0.hold_ms.load(Ordering::SeqCst)));
        (stream.as_str() == "traffic").then(|| self.0.versions[self.0.now() / BATCHES_PER_COMMIT].clone())
    }

    async fn reload(&self, _: &StreamName, at_least: u64) -> Result<ColdTable, TablesError> {
        Ok(self.0.versions[at_least as usize].clone())
    }

    async fn cold_as_of(&self, stream: &StreamName, as_of: AsOf) -> Result<ColdTable, TablesError> {
        let AsOf::Version(version) = as_of else { panic!("asked as of {as_of}") };
        let missing = || TablesError { stream: stream.clone(), detail: format!("there is no version {version}") };
        self.0.versions.get(version as usize).cloned().ok_or_else(missing)
    }

    fn spools(&self) -> Vec<SpoolFacts> {
        let facts = |edge: &str, spool: u8| SpoolFacts {
            stream: "traffic".parse().unwrap(),
            edge: edge.parse().unwrap(),
            spool: SpoolId([spool; 16]),
            rows: 10,
            batches: 1,
            received_at_us: 1,
            max_ts: None,
            watermark: None,
            durable: Seq(1),
            committed: Seq(0),
            agent: "test".to_owned(),
            configuration: 1,
        };
        vec![facts("gw-1", 1), facts("other", 2)]
    }

    fn changed(&self) -> watch::Receiver<u64> {
        watch::channel(0).1
    }

    fn hot(&self) -> Arc<dyn HotSource> {
        Arc::new(self.clone())
    }
}

/// An engine over `traffic` as [`Traffic::new`] makes it.
pub(crate) async fn engine(arrived: usize, step: usize, timeout: Duration) -> (Arc<Engine>, Arc<Traffic>) {
    let traffic = Traffic::new(arrived, step).await;
    // More places than any test takes: what is dropped keeps its own until it pauses.
    let lanes = vec![LaneSettings { timeout, running: 64, ..LaneSettings::default() }];
    let settings = EngineSettings { lanes, ..EngineSettings::default() };
    (Arc::new(Engine::new(Arc::new(Handle(Arc::clone(&traffic))), settings).unwrap()), traffic)
}

/// A statement of the node itself.
pub(crate) async fn begin(engine: &Engine) -> Arc<Running> {
    begin_as(engine, &Caller::node()).await
}

pub(crate) async fn begin_as(engine: &Engine, caller: &Caller) -> Arc<Running> {
    engine.begin(caller, &engine.enter(caller).await.unwrap(), "a statement")
}

const MINUTE: Duration = Duration::from_secs(60);

async fn numbers(engine: &Engine, sql: &str) -> Vec<i64> {
    let rows = engine.rows(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    let batch = &rows[0];
    batch.columns().iter().map(|column| column.as_primitive::<Int64Type>().value(0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_mention_of_a_table_in_one_statement_sees_the_same_state() {
    let statements = [
        "SELECT (SELECT count(*) FROM traffic) AS a, (SELECT count(*) FROM traffic) AS b",
        "WITH a AS (SELECT count(*) n FROM traffic), b AS (SELECT count(*) n FROM traffic) SELECT a.n, b.n FROM a, b",
        "SELECT min(n), max(n) FROM (SELECT count(*) n FROM traffic UNION ALL SELECT count(*) FROM traffic)",
        "SELECT count(*) AS n, (SELECT count(*) FROM traffic) AS m FROM traffic a JOIN traffic b USING (vehicle_count)",
        "SELECT count(*) AS n, (SELECT count(*) FROM traffic) AS m FROM traffic \
         WHERE vehicle_count IN (SELECT vehicle_count FROM traffic)",
    ];
    for sql in statements {
        let (engine, _traffic) = engine(0, 1, MINUTE).await;
        let mut before = -1;
        for _ in 0..6 {
            let counts = numbers(&engine, sql).await;
            assert_eq!(counts[0], counts[1], "{sql}");
            assert!(counts[0] >= before, "{sql}: {} after {before}", counts[0]);
            assert_eq!(counts[0] % ROWS as i64, 0, "{sql}");
            before = counts[0];
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_was_overtaken_is_loaded_again() {
    let (engine, traffic) = engine(1, 2 * BATCHES_PER_COMMIT + 1, MINUTE).await;
    assert_eq!(numbers(&engine, "SELECT count(*) FROM traffic").await, [(BATCHES * ROWS) as i64]);
    assert!(traffic.stale.load(Ordering::SeqCst) > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prepared_statement_sees_fresh_rows_each_time() {
    let (engine, traffic) = engine(1, 0, MINUTE).await;
    let prepared = engine.prepare(&begin(&engine).await, "SELECT count(*) FROM traffic", None).await.unwrap();
    for arrived in 1..10 {
        let mut rows = engine.execute(&begin(&engine).await, &prepared, None).await.unwrap();
        let count = rows.next().await.unwrap().unwrap().column(0).as_primitive::<Int64Type>().value(0);
        assert_eq!(count, (arrived * ROWS) as i64);
        traffic.arrive(1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_and_columns_hold_on_both_halves() {
    // Six batches: four cold, two hot; batch i is day 19,000 + i (2022-01-08 is 19,000).
    let (engine, _traffic) = engine(6, 0, MINUTE).await;
    let cases = [
        ("SELECT count(*) FROM traffic", 60),
        ("SELECT count(*) FROM traffic WHERE ts >= '2022-01-10T00:00:00Z'", 40),
        ("SELECT count(*) FROM traffic WHERE ts < '2022-01-09T00:05:00Z'", 15),
        ("SELECT count(*) FROM traffic WHERE _date = DATE '2022-01-13'", 10),
        ("SELECT count(*) FROM traffic WHERE _date = DATE '2022-01-08'", 10),
        ("SELECT count(*) FROM traffic WHERE device = 'd1' AND vehicle_count >= 30", 15),
        ("SELECT sum(vehicle_count) FROM traffic", 59 * 60 / 2),
    ];
    for (sql, expected) in cases {
        assert_eq!(numbers(&engine, sql).await, [expected], "{sql}");
    }
    let rows = engine.rows("SELECT * FROM traffic").await.unwrap();
    let names: Vec<String> = rows[0].schema().fields().iter().map(|field| field.name().clone()).collect();
    assert_eq!(names[..4], ["ts", "device", "vehicle_count", "quality"]);
    assert_eq!(names.last().unwrap(), "_date");
}

/// Delta files that the plan of a statement reads.
async fn files(engine: &Engine, sql: &str) -> usize {
    let prepared = engine.prepare(&begin(engine).await, sql, None).await.unwrap();
    let (state, caller) = (engine.session().state(), Caller::node());
    let (tables, views) = (engine.tables().as_ref(), engine.views.as_ref());
    let view = View { tables, statements: &engine.statements, views, links: &engine.links, caller: &caller };
    let pinned = pin(LogicalPlan::clone(prepared.plan()), &state, view).await.unwrap();
    let mut plans = vec![state.create_physical_plan(&pinned).await.unwrap()];
    let mut files = 0;
    while let Some(plan) = plans.pop() {
        let scan = plan.downcast_ref::<DataSourceExec>().and_then(|scan| scan.data_source().downcast_ref());
        files += scan.map_or(0, |scan: &FileScanConfig| scan.file_groups.iter().map(|group| group.len()).sum());
        files += plan.downcast_ref::<PagesExec>().map_or(0, PagesExec::files);
        plans.extend(plan.children().into_iter().cloned());
    }
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_leaves_out_files() {
    // All is cold: one file for each of twenty days, 2022-01-08 to 2022-01-27.
    let (engine, _) = engine(BATCHES, 0, MINUTE).await;
    for (filter, expected) in [
        ("true", 20),
        ("_date = DATE '2022-01-10'", 1),
        ("_date >= DATE '2022-01-25'", 3),
        ("ts >= '2022-01-25T00:00:00Z'", 3),
        ("ts >= '2022-01-24T00:09:30Z'", 3),
        ("ts BETWEEN '2022-01-09T00:00:00Z' AND '2022-01-09T23:00:00Z'", 1),
        ("device = 'e1'", 4),
        ("device = 'e1' AND ts < '2022-01-25T00:00:00Z'", 1),
    ] {
        let sql = format!("SELECT max(vehicle_count) FROM traffic WHERE {filter}");
        assert_eq!(files(&engine, &sql).await, expected, "{sql}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_that_change_something_are_refused() {
    let (engine, _traffic) = engine(1, 0, MINUTE).await;
    for sql in [
        "INSERT INTO traffic SELECT * FROM traffic",
        "CREATE TABLE other AS SELECT 1",
        "DROP TABLE traffic",
        "COPY traffic TO 'traffic.csv'",
        "SET datafusion.execution.batch_size = 1",
    ] {
        let error = engine.rows(sql).await.unwrap_err();
        assert!(matches!(error, QueryError::ReadOnly { .. }), "{sql}: {error:?}");
    }
    // What only sounds like it.
    let error = engine.rows("SELECT \"DML not supported: \"()").await.unwrap_err();
    assert!(matches!(error, QueryError::Invalid { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_function_cannot_read_is_the_fault_of_who_asked() {
    let (engine, _traffic) = engine(1, 0, MINUTE).await;
    for sql in ["SELECT ST_AsText(ST_GeomFromText('nonsense'))", "SELECT CAST(device AS BIGINT) FROM traffic"] {
        let error = engine.rows(sql).await.unwrap_err();
        assert!(matches!(error, QueryError::Invalid { .. }), "{sql}: {error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn misspelt_names_get_a_hint() {
    let (engine, _traffic) = engine(1, 0, MINUTE).await;
    let table = engine.rows("SELECT * FROM trafic").await.unwrap_err();
    assert!(matches!(table, QueryError::UnknownTable { .. }), "{table:?}");
    assert_eq!(table.hint(), Some("did you mean `traffic`?"));
    let column = engine.rows("SELECT vehicle_cuont FROM traffic").await.unwrap_err();
    assert!(matches!(column, QueryError::UnknownColumn { .. }), "{column:?}");
    assert_eq!(column.hint(), Some("did you mean `vehicle_count`?"));
    let nowhere = engine.rows("SELECT nope").await.unwrap_err();
    assert!(matches!(nowhere, QueryError::UnknownColumn { .. }), "{nowhere:?}");
    assert!(nowhere.hint().unwrap().contains("FROM"), "{nowhere:?}");
    assert!(matches!(engine.rows("SELEC 1").await.unwrap_err(), QueryError::Syntax { .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_of_one_name_are_told_apart() {
    let (engine, _) = engine(1, 0, MINUTE).await;
    let check = async |sql: &str, expected: &[&str]| {
        let rows = engine.rows(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        let names: Vec<String> = rows[0].schema().fields().iter().map(|field| field.name().clone()).collect();
        assert_eq!(names, expected, "{sql}");
    };
    check("SELECT (SELECT count(*) FROM traffic), count(*) FROM traffic", &["count(*)", "count(*)_2"]).await;
    check("SELECT count(*), count(*), 1 AS one, 2 AS one FROM traffic", &["count(*)", "count(*)_2", "one", "one_2"])
        .await;
    check("SELECT device, device FROM traffic ORDER BY device LIMIT 1", &["device", "device_2"]).await;
    // A cast has the name of what it casts, which is sorted by.
    check(
        "SELECT CAST(vehicle_count AS TEXT), count(*) FROM traffic GROUP BY vehicle_count ORDER BY vehicle_count",
        &["CAST(vehicle_count AS TEXT)", "count(*)"],
    )
    .await;
    check("SELECT DISTINCT device, device FROM traffic ORDER BY device", &["device", "device_2"]).await;
    check(
        "SELECT device AS n, count(*), count(*) FROM traffic GROUP BY n ORDER BY n",
        &["n", "count(*)", "count(*)_2"],
    )
    .await;
    check("SELECT b.*, device FROM (SELECT device FROM traffic) b", &["device", "device_2"]).await;
    check("SELECT device, b.* FROM (SELECT device FROM traffic) b", &["device_2", "device"]).await;
    check(
        "SELECT sum(vehicle_count) OVER (), sum(vehicle_count) OVER () FROM traffic LIMIT 1",
        &[
            "sum(traffic.vehicle_count) ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING",
            "sum(traffic.vehicle_count) ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING_2",
        ],
    )
    .await;
    let counts = numbers(&engine, "SELECT (SELECT count(*) FROM traffic), count(*) FROM traffic").await;
    assert_eq!(counts, [10, 10]);
}

async fn integer_as(engine: &Engine, caller: &Caller, sql: &str) -> i64 {
    let rows = engine.rows_as(caller, sql, usize::MAX).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    let batch = rows.iter().find(|batch| batch.num_rows() > 0).unwrap();
    batch.column(0).as_primitive::<Int64Type>().value(0)
}

async fn text_as(engine: &Engine, caller: &Caller, sql: &str) -> String {
    let rows = engine.rows_as(caller, sql, usize::MAX).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    arrow::util::pretty::pretty_format_batches(&rows).unwrap().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_analyze_tells_files_and_rows_of_both_halves() {
    // Eight batches in eight files, and two that are hot; the filter leaves the last two files and all that is hot.
    let (engine, _traffic) = engine(10, 0, MINUTE).await;
    let sql = "EXPLAIN ANALYZE SELECT device FROM traffic WHERE ts >= '2022-01-14T00:00:00Z'";
    let told = text_as(&engine, &Caller::node(), sql).await;
    let line = |half: &str| told.lines().find(|line| line.contains(half)).unwrap_or_else(|| panic!("{half}: {told}"));
    let cold = line("ColdRows");
    assert!(cold.contains("version=2, files_read=2, files_pruned=6") && cold.contains("output_rows=20"), "{told}");
    let hot = line("HotRows");
    assert!(hot.contains("rows=20, rows_pruned=0") && hot.contains("output_rows=20"), "{told}");
    // Of what is hot, batches whose times the filter leaves out.
    let later = "EXPLAIN ANALYZE SELECT device FROM traffic WHERE ts >= '2022-01-17T00:00:00Z'";
    let told = text_as(&engine, &Caller::node(), later).await;
    let line = |half: &str| told.lines().find(|line| line.contains(half)).unwrap_or_else(|| panic!("{half}: {told}"));
    assert!(line("HotRows").contains("rows=10, rows_pruned=10"), "{told}");
    // Though nothing is read.
    let none = "EXPLAIN ANALYZE SELECT device FROM traffic WHERE ts >= '2030-01-01T00:00:00Z'";
    let told = text_as(&engine, &Caller::node(), none).await;
    assert!(told.contains("version=2, files_read=0, files_pruned=8"), "{told}");
    assert!(told.contains("HotRows: rows=0, rows_pruned=20"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_rows_in_files_that_are_grouped_by_device_no_text_is_made() {
    let (engine, _traffic) = engine(10, 0, MINUTE).await;
    let question = |device: &str, more: &str| {
        format!(
            "SELECT {device} AS d, count(*) AS c, max(vehicle_count) AS m, min(ts) AS t FROM traffic {more} GROUP BY d ORDER BY d LIMIT 9"
        )
    };
    let questions = [
        ("", true),
        ("WHERE vehicle_count % 3 = 1", true),
        ("WHERE vehicle_count > 1000000", true),
        ("WHERE vehicle_count > 20 AND ts >= '2022-01-10T00:05:00Z'", false),
        ("WHERE ts >= '2022-01-10T00:05:00Z'", false),
        ("WHERE device < 'd2'", false),
    ];
    for (more, by_indices) in questions {
        let sql = question("device", more);
        let plan = text_as(&engine, &Caller::node(), &format!("EXPLAIN {sql}")).await;
        assert_eq!(plan.contains("devices=all"), by_indices, "{plan}");
        assert_eq!(plan.matches("GroupsExec").count(), 2, "one of each half: {plan}");
        let expected = text_as(&engine, &Caller::node(), &question("concat(device, '')", more)).await;
        assert_eq!(text_as(&engine, &Caller::node(), &sql).await, expected, "{sql}");
    }
    // What else looks at the device looks at its text.
    let sql = "SELECT device, max(device) AS m FROM traffic GROUP BY device";
    let plan = text_as(&engine, &Caller::node(), &format!("EXPLAIN {sql}")).await;
    assert!(plan.contains("GroupsExec") && !plan.contains("devices=all"), "{plan}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_of_the_past_answers_the_same_for_ever() {
    let (engine, traffic) = engine(9, 0, MINUTE).await;
    let as_of = async |sql: &str, whole: Option<AsOf>| {
        let running = begin(&engine).await;
        let prepared = engine.prepare(&running, sql, whole).await?;
        let mut stream = engine.execute(&running, &prepared, None).await?;
        Ok::<i64, QueryError>(stream.next().await.unwrap().unwrap().column(0).as_primitive::<Int64Type>().value(0))
    };
    for _ in 0..3 {
        for version in 0..3 {
            let rows = (version as usize * BATCHES_PER_COMMIT * ROWS) as i64;
            let sql = format!("SELECT count(traffic.ts) FROM traffic FOR VERSION AS OF {version}");
            assert_eq!(as_of(&sql, None).await.unwrap(), rows);
            assert_eq!(as_of("SELECT count(*) FROM traffic", Some(AsOf::Version(version))).await.unwrap(), rows);
        }
        traffic.arrive(3);
    }
    let between = "SELECT (SELECT count(*) FROM traffic FOR VERSION AS OF 2) - (SELECT count(*) FROM traffic FOR VERSION AS OF 1)";
    assert_eq!(as_of(between, None).await.unwrap(), (BATCHES_PER_COMMIT * ROWS) as i64);
    let newest = "SELECT max(l.vehicle_count) FROM latest('traffic') l JOIN traffic ON l.ts = traffic.ts";
    let last = |version: usize| (version * BATCHES_PER_COMMIT * ROWS - 1) as i64;
    assert_eq!(as_of(newest, Some(AsOf::Version(1))).await.unwrap(), last(1));
    assert_eq!(
        as_of("SELECT max(latest.vehicle_count) FROM latest('traffic')", Some(AsOf::Version(2))).await.unwrap(),
        last(2)
    );
    let none = as_of("SELECT count(*) FROM traffic FOR VERSION AS OF 99", None).await.unwrap_err();
    assert!(none.to_string().contains("no version 99"), "{none}");
}
