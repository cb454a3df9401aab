//! `weir bench soak`: everything at once for a while, checked every second.
//!
//! Spools send sealed batches (now and then one twice, as after a lost ack) into two streams while the cloud commits,
//! checkpoints, compacts, retires and vacuums, and analysts ask. Every second:
//!
//! - of each device of `soak`, the rows that SQL sees are a whole number of batches from the first on, not fewer than were
//!   acknowledged before the question and not more than were sent when its answer came: by count, sum, greatest number and
//!   a sum of hashes;
//! - two mentions of a stream in one statement see one state, and `latest('soak')` is what an aggregate says;
//! - of `short`, which keeps a day, the young rows are exact likewise, and no old row is there twice;
//! - the process stays within `--rss-max-mb`.
//!
//! At the end every row that was sent is in the tables once, or was retired; and so again after a restart.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use serde_json::{Map, Value, json};
use wire::sealed::NO_WATERMARK;
use wire::{CutBatch, DAY_US, FieldType, SpoolId, StreamField, StreamSchema};

use super::Common;
use super::ingest::Sender;
use super::parts::{Cloud, Directory, PATIENCE, POLL, free_port};
use crate::sql;

/// Small commits and merges, everything that looks after tables within seconds, and little memory.
const BUSY: &str = "[commit]\nmax_age = \"500ms\"\n[hot]\nmax_bytes = \"128MiB\"\n\
    [query]\nmax_bytes = \"256MiB\"\nlatest_memory = \"16MiB\"\n\
    [compact]\nmin_files = 4\ncpu_share = 0.5\nmemory_bytes = \"64MiB\"\n\
    [lake]\ncheckpoint_commits = 20\nevery = \"2s\"\nvacuum_every = \"5s\"\n[stream.short]\nkeep = \"1d\"\n";
/// Every so many requests one is sent again.
const AGAIN_EVERY: u64 = 10;
/// Past what `short` keeps.
const OLD_US: i64 = 10 * DAY_US;
/// A hash of a row: its number times this, modulo a prime.
const HASH: &str = "(n * 48271) % 2147483647";
/// What analysts ask meanwhile; the answers are not compared.
const ANALYSTS: [&str; 4] = [
    "SELECT time_bucket('1 second', ts) AS b, device, avg(n) AS a, count(DISTINCT n % 1000) AS d FROM soak GROUP BY 1, 2 ORDER BY 1, 2",
    "SELECT a.device, count(*) AS c FROM soak a JOIN short b ON a.n = b.n GROUP BY 1",
    "SELECT * FROM soak ORDER BY ts DESC, device LIMIT 100",
    "SELECT device, approx_percentile(n, 0.5) AS m, last(n, ts) AS l FROM soak WHERE n % 7 = 3 GROUP BY 1",
];

/// Options of `weir bench soak`.
#[derive(Debug, clap::Args)]
pub(crate) struct SoakBench {
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Spools that send at the same time
    #[arg(long, default_value_t = 3)]
    spools: usize,
    /// Rows a second of `soak`, of all spools together; `short` gets twice as many
    #[arg(long, default_value_t = 5_000)]
    rate: u64,
    #[arg(long, default_value_t = 100)]
    batch_rows: u64,
    /// More memory than this is a failure, MB
    #[arg(long, default_value_t = 1_000.0)]
    rss_max_mb: f64,
    #[command(flatten)]
    common: Common,
}

/// Batches of each stream that one spool has sent, and those of both that were acknowledged.
#[derive(Debug, Default)]
struct Sent {
    sent: AtomicU64,
    acknowledged: AtomicU64,
}

/// What is checked against.
struct Expected {
    spools: Vec<Sent>,
    batch_rows: u64,
    stop: AtomicBool,
}

/// What was seen.
#[derive(Debug, Default)]
struct Seen {
    checks: u64,
    slowest: Duration,
    rss_mb: Vec<f64>,
}

impl SoakBench {
    pub(super) async fn run(self) -> anyhow::Result<Value> {
        ensure!(self.spools > 0 && self.batch_rows > 0 && self.rate > 0, "nothing to send");
        let directory = Directory::new(&self.common)?;
        let port = free_port()?;
        let cloud = Cloud::start_with(&directory.0, port, BUSY).await?;
        let spools = (0..self.spools).map(|_| Sent::default()).collect();
        let expected = Arc::new(Expected { spools, batch_rows: self.batch_rows, stop: AtomicBool::new(false) });
        let mut senders = tokio::task::JoinSet::new();
        let pause = Duration::from_secs_f64((self.batch_rows * self.spools as u64) as f64 / self.rate as f64);
        for spool in 0..self.spools {
            senders.spawn(send(cloud.http.clone(), spool, Arc::clone(&expected), pause));
        }
        let mut analysts = tokio::task::JoinSet::new();
        for _ in 0..2 {
            analysts.spawn(ask(cloud.http.clone(), Arc::clone(&expected)));
        }
        let checked = self.watch(&cloud, &expected).await;
        expected.stop.store(true, Ordering::Relaxed);
        let mut asked = 0;
        while let Some(done) = analysts.join_next().await {
            asked += done??;
        }
        while let Some(done) = senders.join_next().await {
            done??;
        }
        let seen = checked?;
        let retired = at_rest(&cloud, &expected).await?;
        let metrics = cloud.metrics().await?;
        drop(cloud);
        let started = Instant::now();
        let cloud = Cloud::start_with(&directory.0, port, BUSY).await?;
        let restart_ms = started.elapsed().as_millis() as u64;
        whole(&cloud.http, &expected).await.context("after a restart")?;
        for done in ["commits", "compactions", "checkpoints", "rows_retired", "rows_duplicate"] {
            ensure!(metrics.get(done)? > 0, "no {done}: nothing was tried; let it run longer");
        }
        let step = seen.rss_mb.len().div_ceil(10).max(1);
        Ok(json!({
            "seconds": self.seconds,
            "rows": 3 * expected.sent_rows(),
            "rows_retired": retired,
            "rows_sent_twice": metrics.get("rows_duplicate")?,
            "rows_pushed_back": metrics.get("rows_pushed_back")?,
            "checks": seen.checks,
            "slowest_check_ms": seen.slowest.as_millis() as u64,
            "statements_of_analysts": asked,
            "commits": metrics.get("commits")?,
            "compactions": metrics.get("compactions")?,
            "checkpoints": metrics.get("checkpoints")?,
            "rss_mb": seen.rss_mb.iter().step_by(step).chain(seen.rss_mb.last()).collect::<Vec<_>>(),
            "restart_ms": restart_ms,
        }))
    }

    /// Checks after each second.
    async fn watch(&self, cloud: &Cloud, expected: &Expected) -> anyhow::Result<Seen> {
        let (started, mut seen) = (Instant::now(), Seen::default());
        let mut ticks = tokio::time::interval(Duration::from_secs(1));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while started.elapsed() < Duration::from_secs(self.seconds) {
            ticks.tick().await;
            // A table is there with its first batch.
            if expected.spools.iter().all(|spool| spool.acknowledged.load(Ordering::SeqCst) > 0) {
                let begun = Instant::now();
                check(&cloud.http, expected).await.with_context(|| format!("after {:?}", started.elapsed()))?;
                seen.checks += 1;
                seen.slowest = seen.slowest.max(begun.elapsed());
            }
            let rss = cloud.part.memory_mb("VmRSS")?;
            ensure!(rss <= self.rss_max_mb, "the cloud takes {rss} MB after {:?}", started.elapsed());
            seen.rss_mb.push(rss);
        }
        ensure!(seen.checks > 0, "nothing was checked");
        Ok(seen)
    }
}

impl Expected {
    fn sent_rows(&self) -> u64 {
        self.spools.iter().map(|spool| spool.sent.load(Ordering::SeqCst) * self.batch_rows).sum()
    }

    fn acknowledged(&self) -> Vec<u64> {
        self.spools.iter().map(|spool| spool.acknowledged.load(Ordering::SeqCst) * self.batch_rows).collect()
    }

    /// Whether this row says that exactly the first rows of a spool are there; how many.
    fn prefix(&self, row: &Map<String, Value>) -> anyhow::Result<u64> {
        let number = |name: &str| row.get(name).and_then(Value::as_u64).with_context(|| format!("{row:?}"));
        let count = number("c")?;
        ensure!(count % self.batch_rows == 0, "a part of a batch is seen: {row:?}");
        let hashes: u64 = (0..count).map(|n| n * 48_271 % 2_147_483_647).sum();
        let same = number("s")? == count * (count - 1) / 2 && number("z")? == count - 1 && number("h")? == hashes;
        ensure!(same, "other rows than the first {count}: {row:?}");
        Ok(count)
    }

    /// Rows of each spool, each of which has to lie within what was acknowledged before and what is sent now.
    fn check(&self, what: &str, rows: &[Map<String, Value>], least: &[u64]) -> anyhow::Result<()> {
        ensure!(rows.len() == self.spools.len(), "{what}: {} of {} devices", rows.len(), self.spools.len());
        for row in rows {
            let device = row["device"].as_str().and_then(|name| name.strip_prefix('s')?.parse::<usize>().ok());
            let device = device.with_context(|| format!("{what}: {row:?}"))?;
            let count = self.prefix(row).context(what.to_owned())?;
            let most = self.spools[device].sent.load(Ordering::SeqCst) * self.batch_rows;
            ensure!(
                least[device] <= count && count <= most,
                "{what}: {} acknowledged, {count} seen, {most} sent of device s{device}",
                least[device]
            );
        }
        Ok(())
    }
}

fn exact(table: &str) -> String {
    format!("SELECT device, count(*) AS c, sum(n) AS s, max(n) AS z, sum({HASH}) AS h FROM {table} GROUP BY device")
}

async fn check(url: &str, expected: &Expected) -> anyhow::Result<()> {
    let least = expected.acknowledged();
    expected.check("soak", &sql::rows(url, &exact("soak")).await?, &least)?;
    let least = expected.acknowledged();
    let young = "(SELECT * FROM short WHERE ts > now() - INTERVAL '1 hour')";
    expected.check("short, young", &sql::rows(url, &exact(young)).await?, &least)?;
    let differ = "SELECT count(*) FROM (SELECT device, max(n) AS n, max(ts) AS ts FROM soak GROUP BY device) a \
                  FULL JOIN latest('soak') b ON a.device = b.device AND a.n = b.n AND a.ts = b.ts \
                  WHERE a.n IS NULL OR b.n IS NULL";
    ensure!(sql::integer(url, differ).await? == 0, "latest('soak') is not the newest");
    let states = "SELECT abs((SELECT count(*) FROM soak) - (SELECT count(*) FROM soak WHERE n >= 0))";
    ensure!(sql::integer(url, states).await? == 0, "one statement saw two states of soak");
    let twice = "SELECT count(*) FROM (SELECT device, n FROM short WHERE ts < now() - INTERVAL '2 days' \
                 GROUP BY 1, 2 HAVING count(*) > 1)";
    ensure!(sql::integer(url, twice).await? == 0, "old rows of short are there twice");
    Ok(())
}

/// When everything is committed and what is old has gone: all rows once. Rows that were retired.
async fn at_rest(cloud: &Cloud, expected: &Expected) -> anyhow::Result<u64> {
    // Of `short` each row twice: once young, once old.
    let (started, rows) = (Instant::now(), 3 * expected.sent_rows());
    loop {
        let metrics = cloud.metrics().await?;
        let old = "SELECT count(*) FROM short WHERE ts < now() - INTERVAL '2 days'";
        let (committed, old) = (metrics.get("rows_committed")?, sql::integer(&cloud.http, old).await?);
        let (retired, all_old) = (metrics.get("rows_retired")?, expected.sent_rows());
        // It is counted after the rows have gone.
        if committed == rows && old == 0 && retired == all_old {
            whole(&cloud.http, expected).await?;
            return Ok(retired);
        }
        ensure!(committed <= rows, "{committed} rows are committed, and {rows} were sent");
        ensure!(retired <= all_old, "{retired} rows were retired of {all_old}");
        ensure!(
            started.elapsed() < PATIENCE,
            "{committed} of {rows} rows are committed, {retired} of {all_old} old ones retired, {old} are there",
        );
        tokio::time::sleep(POLL).await;
    }
}

/// Nothing is under way: what is there is what was sent.
async fn whole(url: &str, expected: &Expected) -> anyhow::Result<()> {
    check(url, expected).await?;
    let rows = expected.sent_rows();
    for table in ["soak", "short"] {
        let found = sql::integer(url, &format!("SELECT count(*) FROM {table}")).await?;
        ensure!(found == rows, "{table}: {rows} rows were acknowledged, {found} are there");
        let distinct = format!("SELECT count(*) FROM (SELECT DISTINCT device, n FROM {table})");
        ensure!(sql::integer(url, &distinct).await? == rows, "{table}: rows are there twice");
    }
    Ok(())
}

/// One spool: batch after batch of `soak`, and the same rows of `short`, each of them there once young and once old.
async fn send(url: String, spool: usize, expected: Arc<Expected>, pause: Duration) -> anyhow::Result<()> {
    let schema = schema()?;
    let mut soak = Sender::new(Arc::clone(&schema), SpoolId(rand::random()))?;
    let mut short = Sender::new(Arc::clone(&schema), SpoolId(rand::random()))?;
    let (started, of_spool) = (Instant::now(), &expected.spools[spool]);
    let mut number = 0;
    while !expected.stop.load(Ordering::Relaxed) {
        let numbers = number * expected.batch_rows..(number + 1) * expected.batch_rows;
        let now = chrono::Utc::now().timestamp_micros();
        of_spool.sent.store(number + 1, Ordering::SeqCst);
        soak.send(&url, &[cut(&schema, "soak", spool, numbers.clone(), &[now])?]).await?;
        short.send(&url, &[cut(&schema, "short", spool, numbers, &[now, now - OLD_US])?]).await?;
        if number % AGAIN_EVERY == spool as u64 % AGAIN_EVERY {
            soak.send_again(&url).await?;
            short.send_again(&url).await?;
        }
        number += 1;
        of_spool.acknowledged.store(number, Ordering::SeqCst);
        tokio::time::sleep_until((started + pause * u32::try_from(number)?).into()).await;
    }
    Ok(())
}

/// Asks without pause; how often.
async fn ask(url: String, expected: Arc<Expected>) -> anyhow::Result<u64> {
    let mut asked = 0;
    while !expected.stop.load(Ordering::Relaxed) {
        // Before the first batch there is no table.
        if expected.acknowledged().contains(&0) {
            tokio::time::sleep(POLL).await;
            continue;
        }
        let statement = ANALYSTS[rand::random_range(0..ANALYSTS.len())];
        sql::rows(&url, statement).await.context(statement)?;
        asked += 1;
    }
    Ok(asked)
}

fn schema() -> anyhow::Result<Arc<StreamSchema>> {
    let fields = vec![StreamField { name: "n".parse()?, kind: FieldType::Int64 }];
    Ok(Arc::new(StreamSchema::new(fields)?))
}

/// The rows of these numbers, a microsecond apart, from each of these moments on.
fn cut(
    schema: &StreamSchema,
    stream: &str,
    spool: usize,
    numbers: Range<u64>,
    since: &[i64],
) -> anyhow::Result<CutBatch> {
    let count = since.len() * numbers.clone().count();
    let of_all = || since.iter().flat_map(|since| numbers.clone().map(move |n| (since, n as i64)));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(
            TimestampMicrosecondArray::from_iter_values(of_all().map(|(since, n)| since + n - numbers.start as i64))
                .with_timezone("UTC"),
        ),
        Arc::new(StringArray::from_iter_values(std::iter::repeat_n(format!("s{spool}"), count))),
        Arc::new(Int64Array::from_iter_values(of_all().map(|(_, n)| n))),
        Arc::new(StringArray::from_iter_values(std::iter::repeat_n("good", count))),
    ];
    let rows = RecordBatch::try_new(schema.arrow().clone(), columns)?;
    Ok(CutBatch::seal(stream.parse()?, schema, &rows, NO_WATERMARK, "bench", 0)?)
}
