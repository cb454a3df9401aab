//! Tables are kept in shape while processes are killed at every step of it, and while others read them: on a disk and on S3.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use arrow::array::{Array, AsArray, RecordBatch};
use cloud_ingest::delta::{DeltaTable, TableSnapshot};
use cloud_ingest::failpoint;
use cloud_ingest::rescue::{Provenance, rescue};
use cloud_ingest::store::Store;
use object_store::ObjectStoreExt;
use wire::{Mark, SealedBatch, Seq, SpoolId, StreamName};

use crate::harness::{Answer, Chain, Cloud, Sender, load_rows, load_schema};
use crate::place::{KEYS, Place, on_each_place};
use crate::process::{PATIENCE, POLL, Process};

on_each_place!(
    a_compaction_and_a_vacuum_that_are_killed_anywhere_lose_and_double_nothing,
    people_see_what_tables_consist_of_and_what_would_be_deleted,
    a_cloud_that_ends_at_any_step_of_commit_and_upkeep_loses_and_doubles_nothing,
    others_read_the_tables_while_they_are_committed_to_compacted_and_vacuumed,
    what_is_damaged_in_a_log_is_named_by_its_object,
    of_a_stream_that_may_have_so_many_bytes_the_newest_rows_stay,
    who_compacts_by_hand_beside_a_cloud_that_does_loses_and_doubles_nothing,
    the_past_is_the_same_while_files_are_merged_and_deleted,
);

const BATCH_ROWS: i64 = 10;

fn load() -> StreamName {
    "load".parse().unwrap()
}

/// A place with the table `load`, and a configuration that names it.
pub(crate) struct Lake {
    pub(crate) place: Place,
    store: Store,
    table: DeltaTable,
    spool: SpoolId,
    batches: u64,
}

impl Lake {
    pub(crate) async fn new(place: Place) -> Self {
        let wal = place.directory().join("a");
        let text = format!("data_dir = \"{}\"\n[store]\n{}\n", wal.display(), place.settings());
        std::fs::write(place.directory().join("cloud.toml"), text).unwrap();
        let store = place.store();
        let table = DeltaTable::create(&store, &load(), load_schema().fields()).await.unwrap();
        Self { place, store, table, spool: SpoolId([3; 16]), batches: 0 }
    }

    pub(crate) async fn commit(&mut self, batches: u64) {
        for _ in 0..batches {
            let rows = load_rows(self.batches as i64 * BATCH_ROWS, BATCH_ROWS as usize);
            self.commit_rows(&rows).await;
        }
    }

    pub(crate) async fn commit_rows(&mut self, rows: &RecordBatch) {
        self.batches += 1;
        let seq = Seq(self.batches);
        let edge = "gw-test".parse().unwrap();
        let provenance = Provenance { edge, spool: self.spool, seq, received_at_us: 0 };
        let fields = self.table.reload().await.unwrap().fields;
        let rows = rescue(rows, &provenance, &fields);
        let mark = Mark { seq, crc: self.batches as u32 };
        self.table.commit(&[rows], &[(self.spool, seq, mark)]).await.unwrap();
    }

    fn config(&self) -> PathBuf {
        self.place.directory().join("cloud.toml")
    }

    pub(crate) fn weir(&self, arguments: &[&str]) -> Process {
        self.place.weir(arguments, &self.config())
    }

    /// Runs `weir`; whether it succeeds, and all that it says.
    pub(crate) fn run(&self, arguments: &[&str]) -> (bool, String) {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(arguments)
            .args(["--config", self.config().to_str().unwrap()])
            .envs(KEYS)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
        (output.status.success(), text)
    }

    /// Opens the table as a new process would, and checks that all rows are there once.
    pub(crate) async fn check(&self) -> TableSnapshot {
        let table = DeltaTable::open(&self.store, &load()).await.unwrap().unwrap();
        let snapshot = table.snapshot();
        assert_eq!(numbers(&snapshot).await, self.expected());
        assert_eq!(snapshot.txn[&self.spool].seq, Seq(self.batches));
        snapshot
    }

    pub(crate) fn expected(&self) -> Vec<i64> {
        (0..self.batches as i64 * BATCH_ROWS).collect()
    }
}

/// `n` of all rows of a version, whatever type it has there, in order.
pub(crate) async fn numbers(snapshot: &TableSnapshot) -> Vec<i64> {
    let store = snapshot.log_store.object_store(None);
    let mut numbers = Vec::new();
    for file in snapshot.files.iter() {
        let path = object_store::path::Path::from_url_path(&file.path).unwrap();
        let read = async || store.get(&path).await?.bytes().await;
        let bytes = read().await.unwrap_or_else(|error| panic!("{}: {error}", file.path));
        let reader = datafusion::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap();
        for batch in reader.build().unwrap() {
            let batch = batch.unwrap();
            let column = arrow::compute::cast(batch.column_by_name("n").unwrap(), &arrow::datatypes::DataType::Int64);
            let column = column.unwrap();
            assert_eq!(column.null_count(), 0, "{}", file.path);
            numbers.extend(column.as_primitive::<arrow::datatypes::Int64Type>().values());
        }
    }
    numbers.sort_unstable();
    numbers
}

/// What statements and outside readers may still hold is younger.
const YOUNG: Duration = Duration::from_secs(10);

async fn a_compaction_and_a_vacuum_that_are_killed_anywhere_lose_and_double_nothing(place: Place) {
    let mut lake = Lake::new(place).await;
    let mut killed = 0;
    let steps =
        ["compact.planned", "compact.merging", "compact.file", "compact.done", "log.before_put", "log.after_put"];
    let of_files = ["store.staged@1", "store.named@1", "store.staged@2", "store.named@2"].map(str::to_owned);
    let of_files = of_files.into_iter().filter(|_| lake.place.server().is_none());
    let passes = if lake.place.server().is_some() { &[1][..] } else { &[1, 2] };
    let of_steps = steps.iter().flat_map(|place| passes.iter().map(move |pass| format!("{place}@{pass}")));
    let places = of_steps.chain(of_files);
    for place in places.collect::<Vec<_>>() {
        lake.commit(9).await;
        let before = lake.check().await;
        let mut compact = lake.weir(&["compact"]);
        compact.set_variables(&[("WEIR_FAILPOINT", &place)]);
        compact.start();
        killed += u32::from(!compact.succeeds());
        lake.check().await;
        // A version that somebody holds is as it was.
        assert_eq!(numbers(&before).await, lake.expected(), "{place}");
        // It goes on: the commits of the next round, and a compaction that is not killed.
        compact.set_variables(&[]);
        compact.start();
        assert!(compact.succeeds(), "{}", compact.log_tail());
        assert_eq!(lake.check().await.files.len(), 1, "{place}");
    }
    // A single merge is planned, written and put once.
    let (at_least, rounds) = if lake.place.server().is_none() { (10, 4) } else { (6, 1) };
    assert!(killed >= at_least, "only {killed} were killed");

    // On S3 all of them go with one request.
    for pass in 1..=rounds {
        lake.place.age(Duration::ZERO).await;
        let mut vacuum = lake.weir(&["vacuum", "load"]);
        let place = format!("delete.between@{pass}");
        vacuum.set_variables(&[("WEIR_FAILPOINT", &place)]);
        vacuum.start();
        assert!(!vacuum.succeeds(), "{place}: {}", vacuum.log_tail());
        lake.check().await;
    }
    let mut vacuum = lake.weir(&["vacuum"]);
    vacuum.start();
    assert!(vacuum.succeeds(), "{}", vacuum.log_tail());
    lake.check().await;
    let left = lake.place.names("load", "_date=2024-01-01").await;
    assert_eq!(left.len(), 1, "what killed processes left behind is gone: {left:?}");
    let mut verify = lake.weir(&["verify"]);
    verify.start();
    assert!(verify.succeeds(), "{}", verify.log_tail());
}

async fn people_see_what_tables_consist_of_and_what_would_be_deleted(place: Place) {
    let mut lake = Lake::new(place).await;
    lake.commit(20).await;
    let run = |arguments: &[&str]| lake.run(arguments);
    if let Some(server) = lake.place.server() {
        server.requests().await;
    }
    let (ok, text) = run(&["tables", "--json"]);
    assert!(ok, "{text}");
    if let Some(server) = lake.place.server() {
        // The tables, and of each its log: where the newest checkpoint is, and what comes after it, twice.
        let requests = server.requests().await;
        assert_eq!(requests, serde_json::json!({ "LIST": 2, "GET": 1 + 2 * 21 }));
    }
    let row: serde_json::Value = serde_json::from_str(&text).unwrap();
    let expected = serde_json::json!({
        "table": "load", "files": 20, "rows": 200, "small_files": 20, "version": 20, "bytes": row["bytes"],
        "oldest": "2024-01-01T00:00:00Z", "newest": "2024-01-01T00:00:00Z", "compacted": null,
    });
    assert_eq!(row, expected);
    let (ok, text) = run(&["compact", "nothing"]);
    assert!(!ok && text.contains("no table nothing"), "{text}");
    let (ok, text) = run(&["compact", "load"]);
    assert!(ok && text.contains("load: 20 files"), "{text}");
    let (_, text) = run(&["tables"]);
    assert!(text.starts_with("table") && text.contains("small files") && !text.contains(" - "), "{text}");
    let (ok, text) = run(&["vacuum", "--dry-run"]);
    assert!(ok && text.contains("would delete 0 files") && text.contains("1 in use, 20 in their grace"), "{text}");
    lake.place.age(Duration::ZERO).await;
    let (ok, text) = run(&["vacuum", "--dry-run"]);
    assert!(ok && text.contains("would delete 20 files") && text.contains("load/_date=2024-01-01/part-"), "{text}");
    assert_eq!(lake.check().await.files.len(), 1);
    let file = lake.check().await.files.iter().next().unwrap().path.as_str().into();
    lake.place.table("load").put(&file, "nothing of the kind".into()).await.unwrap();
    let (ok, text) = run(&["verify"]);
    assert!(!ok && text.contains("1 damaged") && text.contains("merged-"), "{text}");
}

async fn what_is_damaged_in_a_log_is_named_by_its_object(place: Place) {
    let mut lake = Lake::new(place).await;
    lake.commit(4).await;
    cloud_ingest::delta::checkpoint(&load(), &lake.check().await).await.unwrap();
    lake.commit(3).await;
    let (ok, text) = lake.run(&["verify"]);
    assert!(ok && text.contains("8 entries, 7 files, 70 rows") && text.contains("0 damaged"), "{text}");
    let objects = lake.place.table("load");
    // Of before the checkpoint, the checkpoint itself, and one that everybody has to read.
    for (name, is_open) in [("2.json", true), ("4.checkpoint.parquet", false), ("6.json", false)] {
        let (number, kind) = name.split_once('.').unwrap();
        let name = format!("_delta_log/{:020}.{kind}", number.parse::<u64>().unwrap());
        let path = name.as_str().into();
        let good = objects.get(&path).await.unwrap().bytes().await.unwrap();
        let mut bad = good.to_vec();
        let middle = bad.len() / 2;
        bad[middle..middle + 8].fill(0xff);
        objects.put(&path, bad.into()).await.unwrap();
        let (ok, text) = lake.run(&["verify"]);
        assert!(!ok && text.contains(&name), "{name}: {text}");
        let is_told = if is_open { "70 rows" } else { "its files are not read" };
        assert!(text.contains(is_told), "{name}: {text}");
        objects.put(&path, good.into()).await.unwrap();
    }
    assert!(lake.run(&["verify"]).0);
    objects.delete(&format!("_delta_log/{:020}.json", 5).as_str().into()).await.unwrap();
    let (ok, text) = lake.run(&["verify"]);
    assert!(!ok && text.contains("the entry before it is missing"), "{text}");
}

/// Small commits, checkpoints, merges, all within moments; fewer where each takes some requests.
pub(crate) fn busy(place: &Place) -> String {
    let (age, commits, every) = if place.server().is_some() { ("400ms", 5, "3s") } else { ("50ms", 3, "1s") };
    format!(
        "[commit]\nmax_age = \"{age}\"\n[compact]\nmin_files = 2\ncpu_share = 1.0\n[lake]\ncheckpoint_commits = {commits}\n\
         every = \"{every}\"\nvacuum_every = \"{every}\"\ngrace = \"1h\"\nlog_keep = \"1h\"\n"
    )
}

/// Sends rows until it is told to stop, whatever becomes of the cloud.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    rows: Arc<AtomicI64>,
    task: tokio::task::JoinHandle<()>,
}

impl Load {
    pub(crate) fn start(cloud: &Cloud) -> Self {
        Self::of(cloud, "load", Duration::from_millis(5))
    }

    /// Rows of this stream, with so much time between two batches.
    fn of(cloud: &Cloud, stream: &'static str, pause: Duration) -> Self {
        let (stop, rows) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
        let sender = Sender::to(cloud);
        let task = tokio::spawn({
            let (stop, rows) = (Arc::clone(&stop), Arc::clone(&rows));
            async move {
                let mut chain = Chain::new(stream, load_schema());
                let mut waiting: Vec<SealedBatch> = Vec::new();
                while !stop.load(Ordering::Relaxed) || !waiting.is_empty() {
                    if waiting.is_empty() {
                        let first = rows.load(Ordering::SeqCst);
                        waiting.push(chain.seal(&load_rows(first, BATCH_ROWS as usize)));
                        rows.store(first + BATCH_ROWS, Ordering::SeqCst);
                    }
                    match sender.send(&chain.schema, &waiting).await {
                        Answer::Acks(_) => {
                            waiting.clear();
                            tokio::time::sleep(pause).await;
                        }
                        Answer::Refused(refused) => {
                            assert!(!format!("{refused:?}").contains("Forked"), "{refused:?}");
                            tokio::time::sleep(POLL).await;
                        }
                        Answer::None => tokio::time::sleep(POLL).await,
                    }
                }
            }
        });
        Self { stop, rows, task }
    }

    /// All rows that were sent, durable.
    pub(crate) async fn finish(self) -> i64 {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
        self.rows.load(Ordering::SeqCst)
    }
}

pub(crate) async fn until(cloud: &Cloud, counter: &str, at_least: u64) {
    let started = Instant::now();
    while cloud.counter(counter).await < at_least {
        assert!(started.elapsed() < PATIENCE, "{counter} does not come to {at_least}");
        tokio::time::sleep(POLL).await;
    }
}

async fn a_cloud_that_ends_at_any_step_of_commit_and_upkeep_loses_and_doubles_nothing(place: Place) {
    let mut cloud = place.cloud(&format!("{}[stream.gone]\nkeep = \"1d\"\n", busy(&place))).await;
    let (load, gone) = (Load::start(&cloud), Load::of(&cloud, "gone", Duration::from_millis(200)));
    let _aging = place.aging(YOUNG);
    until(&cloud, "weir_cloud_compactions_total", 1).await;
    cloud.kill();
    let (mut ended, on_s3) = (0, place.server().is_some());
    let places = failpoint::NAMES.iter().filter(|name| !name.starts_with("retype"));
    let places = places.filter(|name| !on_s3 || !name.starts_with("store"));
    let (passes, at_least) = if on_s3 { (&[2][..], 10) } else { (&[1, 2, 3, 5][..], 48) };
    for place in places.flat_map(|place| passes.iter().map(move |pass| format!("{place}@{pass}"))) {
        cloud.end_at(Some(&place));
        cloud.run();
        let started = Instant::now();
        while !cloud.has_ended() {
            assert!(started.elapsed() < PATIENCE, "{place} is never passed");
            tokio::time::sleep(POLL).await;
        }
        ended += 1;
    }
    cloud.end_at(None);
    cloud.run();
    cloud.wait().await;
    let rows = load.finish().await;
    let found =
        cloud.sql("SELECT count(*) AS c, count(distinct n) AS d, min(n) AS a, max(n) AS z FROM load").await.unwrap();
    assert_eq!(serde_json::Value::Array(found), serde_json::json!([{ "c": rows, "d": rows, "a": 0, "z": rows - 1 }]));
    assert!(ended >= at_least, "{ended}");
    let sent = gone.finish().await;
    assert!(sent > 0);
    // All its rows are past their time. None comes back.
    let started = Instant::now();
    while cloud.integer("SELECT count(*) FROM gone").await > 0 {
        assert!(started.elapsed() < PATIENCE, "rows stay that are past their time");
        tokio::time::sleep(POLL).await;
    }
    until(&cloud, "weir_cloud_files_vacuumed_total", 1).await;
    let mut verify = place.weir(&["verify"], cloud.config());
    verify.start();
    assert!(verify.succeeds(), "{}", verify.log_tail());
}

/// Rows by readers that are not ours, of the newest version that each finds.
const READERS: &str = r#"
import json, os, sys, deltalake, duckdb, polars, pyarrow.dataset
path, options = sys.argv[1], json.loads(sys.argv[3])
try:
    import duckdb_extensions
    duckdb_extensions.import_extension("delta")
    duckdb.sql("LOAD delta")
    delta_scan = True
except ImportError:
    delta_scan = False
seen, versions = -1, set()
for _ in range(int(sys.argv[2])):
    table = deltalake.DeltaTable(path, storage_options=options)
    dataset = table.to_pyarrow_dataset()
    read = dataset.to_table(columns=["n"]).column("n").to_pylist()
    assert sorted(read) == list(range(len(read))), (table.version(), len(read), len(set(read)))
    assert len(read) >= seen, (seen, len(read))
    # Where DuckDB's own reader of Delta is not, and in S3 (for which it takes a second extension), its reader of Parquet.
    if delta_scan and not options:
        rows, distinct, last = duckdb.sql(f"SELECT count(*), count(distinct n), max(n) FROM delta_scan('{path}')").fetchone()
        assert rows == distinct == last + 1 >= len(read), (rows, distinct, last, len(read))
    elif not options and table.file_uris():
        counted = duckdb.sql(f"SELECT count(*), count(distinct n) FROM read_parquet({table.file_uris()!r})").fetchone()
        assert counted == (len(read), len(read)), counted
    of_polars = polars.scan_delta(path, version=table.version(), storage_options=options or None).select(polars.len(), polars.col("n").n_unique().alias("distinct"))
    assert of_polars.collect().row(0) == (len(read), len(read)), of_polars.collect()
    seen = len(read)
    versions.add(table.version())
    if table.version() > 3:
        earlier = deltalake.DeltaTable(path, version=table.version() - 3, storage_options=options).to_pyarrow_dataset().to_table(columns=["n"])
        assert sorted(earlier.column("n").to_pylist()) == list(range(earlier.num_rows))
print(len(versions), seen, "delta_scan" if delta_scan else "", flush=True)
# Their threads may be at work still, and end the interpreter badly when it waits for them.
os._exit(0)
"#;

async fn others_read_the_tables_while_they_are_committed_to_compacted_and_vacuumed(place: Place) {
    let Ok(python) = std::env::var("WEIR_PYTHON") else {
        println!("left out: WEIR_PYTHON names no Python with deltalake, duckdb and polars");
        return;
    };
    let cloud = place.cloud(&busy(&place)).await;
    let _aging = place.aging(YOUNG);
    let load = Load::start(&cloud);
    until(&cloud, "weir_cloud_compactions_total", 2).await;
    assert!(cloud.integer("SELECT count(*) FROM latest('load')").await > 0);
    let (table, options) = place.address("load");
    let rounds = if place.server().is_some() { "5" } else { "15" };
    let reader = tokio::task::spawn_blocking(move || {
        std::process::Command::new(python).args(["-c", READERS, &table, rounds, &options]).output().unwrap()
    });
    let output = reader.await.unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let text = String::from_utf8(output.stdout).unwrap();
    let versions: u32 = text.split_whitespace().next().unwrap().parse().unwrap();
    assert!(versions > 3, "the table did not move: {text}");
    let rows = load.finish().await;
    assert_eq!(cloud.integer("SELECT count(*) FROM load").await, rows);
    assert!(cloud.counter("weir_cloud_compactions_total").await > 2);
    until(&cloud, "weir_cloud_files_vacuumed_total", 1).await;
    // What `latest` kept of files that were compacted since, and what it has anew of this version.
    let differ = "SELECT count(*) FROM (SELECT device, max(ts) AS ts FROM load GROUP BY device) AS a \
                  FULL JOIN (SELECT device, ts FROM latest('load')) AS b ON a.device = b.device AND a.ts = b.ts \
                  WHERE a.ts IS NULL OR b.ts IS NULL";
    assert_eq!(cloud.integer(differ).await, 0);
}

/// All rows are there once, and none is gone since: how many.
async fn whole(cloud: &Cloud, before: i64) -> i64 {
    let counts = "SELECT count(*) AS c, count(distinct n) AS d, coalesce(max(n) + 1, 0) AS z FROM load";
    let row = cloud.sql(counts).await.unwrap().remove(0);
    let count = row["c"].as_i64().unwrap();
    assert_eq!(row, serde_json::json!({ "c": count, "d": count, "z": count }));
    assert!(count >= before, "{count} after {before}");
    count
}

async fn who_compacts_by_hand_beside_a_cloud_that_does_loses_and_doubles_nothing(place: Place) {
    let cloud = place.cloud(&busy(&place)).await;
    let _aging = place.aging(YOUNG);
    let load = Load::start(&cloud);
    until(&cloud, "weir_cloud_compactions_total", 1).await;
    let mut seen = 0;
    for _ in 0..5 {
        let hands = [&["compact"], &["compact"], &["vacuum"]].map(|arguments| {
            let mut process = place.weir(arguments, cloud.config());
            process.start();
            process
        });
        for mut process in hands {
            seen = whole(&cloud, seen).await;
            assert!(process.succeeds(), "{}", process.log_tail());
        }
    }
    let rows = load.finish().await;
    assert_eq!(whole(&cloud, seen).await, rows);
    let mut verify = place.weir(&["verify"], cloud.config());
    verify.start();
    assert!(verify.succeeds(), "{}", verify.log_tail());
}

async fn the_past_is_the_same_while_files_are_merged_and_deleted(place: Place) {
    let cloud = place.cloud(&busy(&place)).await;
    let _aging = place.aging(YOUNG);
    let load = Load::start(&cloud);
    until(&cloud, "weir_cloud_compactions_total", 1).await;
    let mut seen: Vec<(i64, serde_json::Value, Instant)> = Vec::new();
    let (mut same, mut gone, started) = (0, 0, Instant::now());
    let enough = if place.server().is_some() { 30 } else { 100 };
    while same < enough || gone == 0 || cloud.counter("weir_cloud_files_vacuumed_total").await == 0 {
        assert!(started.elapsed() < PATIENCE, "{same} answers were the same, {gone} versions are gone");
        let version = cloud.integer("SELECT version FROM system.streams WHERE name = 'load'").await;
        let ask = async |version: i64| {
            let past = "SELECT count(*) AS c, count(distinct n) AS d, sum(n) AS s FROM load FOR VERSION AS OF";
            cloud.sql(&format!("{past} {version}")).await
        };
        let asked = Instant::now();
        let answer = ask(version).await.unwrap().remove(0);
        assert_eq!(answer["c"], answer["d"]);
        seen.push((version, answer, asked));
        // The newest, the oldest, and some between.
        for (version, answer, since) in seen.iter().step_by(1 + seen.len() / 8) {
            match ask(*version).await {
                Ok(rows) => {
                    assert_eq!(rows[0], *answer, "version {version}");
                    same += 1;
                }
                // What is as old as that may be deleted; what is younger may not.
                Err(error) => {
                    assert!(since.elapsed() > YOUNG, "version {version} after {:?}: {error}", since.elapsed());
                    gone += 1;
                }
            }
        }
    }
    load.finish().await;
}

async fn of_a_stream_that_may_have_so_many_bytes_the_newest_rows_stay(place: Place) {
    // A file of a few rows has two or three KB.
    let cloud = place
        .cloud(&format!(
            "{}[stream.load]\nmax_bytes = \"12KiB\"\n",
            busy(&place).replace("min_files = 2", "enabled = false")
        ))
        .await;
    let load = Load::start(&cloud);
    until(&cloud, "weir_cloud_rows_retired_total", 5 * BATCH_ROWS as u64).await;
    let sent = load.finish().await;
    let started = Instant::now();
    let settled = "SELECT bytes <= 12 * 1024 AND hot_rows = 0 AS ok, rows FROM system.streams WHERE name = 'load'";
    loop {
        let row = cloud.sql(settled).await.unwrap().remove(0);
        if row["ok"] == true {
            assert!(row["rows"].as_i64() > Some(0), "not all of it is too much");
            break;
        }
        assert!(started.elapsed() < PATIENCE, "{row}");
        tokio::time::sleep(POLL).await;
    }
    // What is left is the end of what was sent, without a hole.
    let kept = "SELECT count(*) AS c, max(n) AS z, max(n) - min(n) + 1 AS span FROM load";
    let row = cloud.sql(kept).await.unwrap().remove(0);
    assert_eq!((&row["z"], &row["span"]), (&(sent - 1).into(), &row["c"]));
}
