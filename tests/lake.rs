//! Tables are kept in shape while processes are killed at every step of it, and while others read them.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use arrow::array::{Array, AsArray};
use cloud_ingest::delta::{DeltaTable, TableSnapshot};
use cloud_ingest::failpoint;
use cloud_ingest::rescue::{Provenance, rescue};
use cloud_ingest::store::Store;
use wire::{Mark, SealedBatch, Seq, SpoolId, StreamName};

use crate::harness::{Answer, Chain, Cloud, Sender, load_rows, load_schema};
use crate::process::{PATIENCE, POLL, Process};

const BATCH_ROWS: i64 = 10;

fn load() -> StreamName {
    "load".parse().unwrap()
}

/// A store with the table `load`, and a configuration that names it.
pub(crate) struct Lake {
    pub(crate) directory: tempfile::TempDir,
    store: Store,
    table: DeltaTable,
    spool: SpoolId,
    batches: u64,
}

impl Lake {
    pub(crate) async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let tables = directory.path().join("tables");
        let url = format!("file://{}", tables.display());
        let text = format!("data_dir = \"{}\"\n[store]\nurl = \"{url}\"\n", directory.path().join("a").display());
        std::fs::write(directory.path().join("cloud.toml"), text).unwrap();
        let store = Store::open(&url).unwrap();
        let table = DeltaTable::create(&store, &load(), load_schema().fields()).await.unwrap();
        Self { directory, store, table, spool: SpoolId([3; 16]), batches: 0 }
    }

    pub(crate) async fn commit(&mut self, batches: u64) {
        for _ in 0..batches {
            self.batches += 1;
            let seq = Seq(self.batches);
            let rows = load_rows((self.batches as i64 - 1) * BATCH_ROWS, BATCH_ROWS as usize);
            let edge = "gw-test".parse().unwrap();
            let provenance = Provenance { edge, spool: self.spool, seq, received_at_us: 0 };
            let fields = self.table.reload().await.unwrap().fields;
            let rows = rescue(&rows, &provenance, &fields);
            let mark = Mark { seq, crc: self.batches as u32 };
            self.table.commit(&[rows], &[(self.spool, seq, mark)]).await.unwrap();
        }
    }

    pub(crate) fn weir(&self, name: &str, arguments: &[&str]) -> Process {
        let config = self.directory.path().join("cloud.toml");
        let arguments = [arguments, &["--config", config.to_str().unwrap()]].concat();
        Process::weir(name, &arguments, self.directory.path())
    }

    /// Opens the table as a new process would, and checks that all rows are there once.
    pub(crate) async fn check(&self) -> TableSnapshot {
        let table = DeltaTable::open(&self.store, &load()).await.unwrap().unwrap();
        let snapshot = table.snapshot();
        assert_eq!(numbers(&self.directory.path().join("tables/load"), &snapshot), self.expected());
        assert_eq!(snapshot.txn[&self.spool].seq, Seq(self.batches));
        snapshot
    }

    pub(crate) fn expected(&self) -> Vec<i64> {
        (0..self.batches as i64 * BATCH_ROWS).collect()
    }
}

/// `n` of all rows of a version, whatever type it has there, in order.
pub(crate) fn numbers(table: &Path, snapshot: &TableSnapshot) -> Vec<i64> {
    let mut numbers = Vec::new();
    for file in snapshot.files.iter() {
        let path = table.join(&file.path);
        let file = std::fs::File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let reader = datafusion::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
        for batch in reader.build().unwrap() {
            let batch = batch.unwrap();
            let column = arrow::compute::cast(batch.column_by_name("n").unwrap(), &arrow::datatypes::DataType::Int64);
            let column = column.unwrap();
            assert_eq!(column.null_count(), 0, "{}", path.display());
            numbers.extend(column.as_primitive::<arrow::datatypes::Int64Type>().values());
        }
    }
    numbers.sort_unstable();
    numbers
}

/// All files below a directory are a month old.
fn age(directory: &Path) {
    age_from(directory, Duration::ZERO);
}

/// All files below a directory that are as old as this are a month old. They may be deleted meanwhile.
fn age_from(directory: &Path, oldest: Duration) {
    for entry in std::fs::read_dir(directory).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            age_from(&path, oldest);
            continue;
        }
        let now = std::time::SystemTime::now();
        let Ok(modified) = path.metadata().and_then(|meta| meta.modified()) else { continue };
        if modified + oldest <= now
            && let Ok(file) = std::fs::File::options().append(true).open(&path)
        {
            file.set_modified(now - Duration::from_secs(30 * 86_400)).unwrap();
        }
    }
}

/// A month passes within seconds, so that vacuum and the clean-up of logs have to do while everything else goes on.
struct Aging {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Aging {
    /// What statements and outside readers may still hold is younger.
    const YOUNG: Duration = Duration::from_secs(10);

    fn start(directory: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (directory, stopped) = (directory.join("tables"), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                age_from(&directory, Self::YOUNG);
                std::thread::sleep(POLL);
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Aging {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(std::thread::JoinHandle::join);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compaction_and_a_vacuum_that_are_killed_anywhere_lose_and_double_nothing() {
    let mut lake = Lake::new().await;
    let mut killed = 0;
    let places =
        ["compact.planned", "compact.merging", "compact.file", "compact.done", "log.before_put", "log.after_put"];
    for place in places
        .iter()
        .flat_map(|place| [format!("{place}@1"), format!("{place}@2")])
        .chain(["store.staged@1", "store.named@1", "store.staged@2", "store.named@2"].map(str::to_owned))
    {
        lake.commit(9).await;
        let before = lake.check().await;
        let mut compact = lake.weir("compact", &["compact"]);
        compact.set_variables(&[("WEIR_FAILPOINT", &place)]);
        compact.start();
        killed += u32::from(!compact.succeeds());
        lake.check().await;
        // A version that somebody holds is as it was.
        let held = numbers(&lake.directory.path().join("tables/load"), &before);
        assert_eq!(held, lake.expected(), "{place}");
        // It goes on: the commits of the next round, and a compaction that is not killed.
        compact.set_variables(&[]);
        compact.start();
        assert!(compact.succeeds(), "{}", compact.log_tail());
        assert_eq!(lake.check().await.files.len(), 1, "{place}");
    }
    // A single merge is planned, written and put once.
    assert!(killed >= 10, "only {killed} were killed");

    for pass in 1..=4 {
        age(&lake.directory.path().join("tables"));
        let mut vacuum = lake.weir("vacuum", &["vacuum", "load"]);
        let place = format!("delete.between@{pass}");
        vacuum.set_variables(&[("WEIR_FAILPOINT", &place)]);
        vacuum.start();
        assert!(!vacuum.succeeds(), "{place}: {}", vacuum.log_tail());
        lake.check().await;
    }
    let mut vacuum = lake.weir("vacuum", &["vacuum"]);
    vacuum.start();
    assert!(vacuum.succeeds(), "{}", vacuum.log_tail());
    lake.check().await;
    let left = std::fs::read_dir(lake.directory.path().join("tables/load/_date=2024-01-01")).unwrap().count();
    assert_eq!(left, 1, "what killed processes left behind is gone");
    let mut verify = lake.weir("verify", &["verify"]);
    verify.start();
    assert!(verify.succeeds(), "{}", verify.log_tail());
}

#[tokio::test(flavor = "multi_thread")]
async fn people_see_what_tables_consist_of_and_what_would_be_deleted() {
    let mut lake = Lake::new().await;
    lake.commit(20).await;
    let run = |arguments: &[&str]| {
        let config = lake.directory.path().join("cloud.toml");
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(arguments)
            .args(["--config", config.to_str().unwrap()])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
        (output.status.success(), text)
    };
    let (ok, text) = run(&["tables", "--json"]);
    assert!(ok, "{text}");
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
    age(&lake.directory.path().join("tables"));
    let (ok, text) = run(&["vacuum", "--dry-run"]);
    assert!(ok && text.contains("would delete 20 files") && text.contains("load/_date=2024-01-01/part-"), "{text}");
    assert_eq!(lake.check().await.files.len(), 1);
    let snapshot = lake.check().await;
    let file = lake.directory.path().join("tables/load").join(&snapshot.files.iter().next().unwrap().path);
    std::fs::write(&file, b"nothing of the kind").unwrap();
    let (ok, text) = run(&["verify"]);
    assert!(!ok && text.contains("1 damaged") && text.contains("part-"), "{text}");
}

/// Small commits, checkpoints, merges, all within moments.
pub(crate) const BUSY: &str = "[commit]\nmax_age = \"50ms\"\n[compact]\nmin_files = 2\ncpu_share = 1.0\n\
                    [lake]\ncheckpoint_commits = 3\nevery = \"1s\"\nvacuum_every = \"1s\"\ngrace = \"1h\"\nlog_keep = \"1h\"\n";

/// Sends rows until it is told to stop, whatever becomes of the cloud.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    rows: Arc<AtomicI64>,
    task: tokio::task::JoinHandle<()>,
}

impl Load {
    pub(crate) fn start(cloud: &Cloud) -> Self {
        Self::of(cloud, "load", Duration::ZERO)
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

#[tokio::test(flavor = "multi_thread")]
async fn a_cloud_that_ends_at_any_step_of_commit_and_upkeep_loses_and_doubles_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = Cloud::start(directory.path(), "a", &format!("{BUSY}[stream.gone]\nkeep = \"1d\"\n")).await;
    let (load, gone) = (Load::start(&cloud), Load::of(&cloud, "gone", Duration::from_millis(200)));
    let _aging = Aging::start(directory.path());
    until(&cloud, "weir_cloud_compactions_total", 1).await;
    cloud.kill();
    let mut ended = 0;
    let places = failpoint::NAMES.iter().filter(|name| !name.starts_with("retype"));
    for place in places.flat_map(|place| [1, 2, 3, 5].map(|pass| format!("{place}@{pass}"))) {
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
    assert!(ended >= 48, "{ended}");
    let sent = gone.finish().await;
    assert!(sent > 0);
    // All its rows are past their time. None comes back.
    let started = Instant::now();
    while cloud.integer("SELECT count(*) FROM gone").await > 0 {
        assert!(started.elapsed() < PATIENCE, "rows stay that are past their time");
        tokio::time::sleep(POLL).await;
    }
    until(&cloud, "weir_cloud_files_vacuumed_total", 1).await;
    let mut verify =
        Process::weir("verify", &["verify", "--config", cloud.config().to_str().unwrap()], directory.path());
    verify.start();
    assert!(verify.succeeds(), "{}", verify.log_tail());
}

/// Rows by readers that are not ours, of the newest version that each finds.
const READERS: &str = r#"
import os, sys, deltalake, duckdb, polars, pyarrow.dataset
path = sys.argv[1]
seen, versions = -1, set()
for _ in range(int(sys.argv[2])):
    table = deltalake.DeltaTable(path)
    dataset = table.to_pyarrow_dataset()
    read = dataset.to_table(columns=["n"]).column("n").to_pylist()
    assert sorted(read) == list(range(len(read))), (table.version(), len(read), len(set(read)))
    assert len(read) >= seen, (seen, len(read))
    files = table.file_uris()
    counted = duckdb.sql(f"SELECT count(*), count(distinct n) FROM read_parquet({files!r})").fetchall()[0] if files else (0, 0)
    assert counted == (len(read), len(read)), counted
    of_polars = polars.scan_delta(path, version=table.version()).select(polars.len(), polars.col("n").n_unique().alias("distinct"))
    assert of_polars.collect().row(0) == (len(read), len(read)), of_polars.collect()
    seen = len(read)
    versions.add(table.version())
    if table.version() > 3:
        earlier = deltalake.DeltaTable(path, version=table.version() - 3).to_pyarrow_dataset().to_table(columns=["n"])
        assert sorted(earlier.column("n").to_pylist()) == list(range(earlier.num_rows))
print(len(versions), seen, flush=True)
# Their threads may be at work still, and end the interpreter badly when it waits for them.
os._exit(0)
"#;

#[tokio::test(flavor = "multi_thread")]
async fn others_read_the_tables_while_they_are_committed_to_compacted_and_vacuumed() {
    let Ok(python) = std::env::var("WEIR_PYTHON") else {
        println!("left out: WEIR_PYTHON names no Python with deltalake, duckdb and polars");
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(directory.path(), "a", BUSY).await;
    let _aging = Aging::start(directory.path());
    let load = Load::start(&cloud);
    until(&cloud, "weir_cloud_compactions_total", 2).await;
    assert!(cloud.integer("SELECT count(*) FROM latest('load')").await > 0);
    let table = directory.path().join("tables/load");
    let reader = tokio::task::spawn_blocking(move || {
        std::process::Command::new(python).args(["-c", READERS, table.to_str().unwrap(), "15"]).output().unwrap()
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
