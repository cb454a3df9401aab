//! `weir tables|compact|retype|vacuum|verify`: the tables of a configuration's store, looked at and kept in shape by hand.
//!
//! They work on the store itself, with or without a cloud that runs on it: whatever they change is an entry of a table's
//! log, made by compare-and-swap, and a running cloud goes on from there.

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use chrono::{DateTime, SecondsFormat};
use cloud_ingest::compact::{Compactor, Merged, Pace, small_files};
use cloud_ingest::delta::{DeltaTable, last_compaction};
use cloud_ingest::retype::{self, Retyped};
use cloud_ingest::store::{Store, list_streams};
use cloud_ingest::verify::{Report, verify};
use cloud_ingest::{Settings, open_store, vacuum};
use futures::{StreamExt, TryStreamExt};
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use wire::{FieldName, FieldType, StreamName};

/// Tables that are opened at a time.
const AT_ONCE: usize = 8;

/// Where the tables are.
#[derive(Debug, clap::Args)]
pub(crate) struct At {
    /// Configuration of the cloud, as in configs/cloud.toml
    #[arg(long)]
    config: PathBuf,
}

impl At {
    fn open(&self) -> anyhow::Result<(Settings, Store)> {
        let settings = Settings::load(&self.config)?;
        let store = open_store(&settings)?;
        Ok((settings, store))
    }
}

/// Arguments of `weir tables`.
#[derive(Debug, clap::Args)]
pub(crate) struct TablesArguments {
    #[command(flatten)]
    at: At,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

/// Arguments of `weir compact`.
#[derive(Debug, clap::Args)]
pub(crate) struct CompactArguments {
    /// One table; all unless set
    table: Option<StreamName>,
    #[command(flatten)]
    at: At,
    /// Part of one core, above 0 and at most 1
    #[arg(long, default_value_t = 1.0)]
    cpu_share: f64,
}

/// Arguments of `weir retype`.
#[derive(Debug, clap::Args)]
pub(crate) struct RetypeArguments {
    /// The table
    table: StreamName,
    /// Its column
    column: FieldName,
    /// float64, int64, bool or text
    #[arg(value_name = "TYPE")]
    kind: FieldType,
    #[command(flatten)]
    at: At,
    /// Part of one core, above 0 and at most 1
    #[arg(long, default_value_t = 1.0)]
    cpu_share: f64,
}

/// Arguments of `weir vacuum`.
#[derive(Debug, clap::Args)]
pub(crate) struct VacuumArguments {
    /// One table; all unless set
    table: Option<StreamName>,
    #[command(flatten)]
    at: At,
    /// Say what would be deleted, and delete nothing
    #[arg(long)]
    dry_run: bool,
}

/// Arguments of `weir verify`.
#[derive(Debug, clap::Args)]
pub(crate) struct VerifyArguments {
    /// One table; all unless set
    table: Option<StreamName>,
    #[command(flatten)]
    at: At,
}

/// Shows what each table consists of.
pub(crate) async fn tables(arguments: TablesArguments) -> anyhow::Result<()> {
    let (settings, store) = arguments.at.open()?;
    let streams = list_streams(&store).await?;
    let store = &store;
    let opened = streams.into_iter().map(|stream| async move {
        DeltaTable::open(store, &stream).await.with_context(|| format!("open table {stream}"))
    });
    let opened: Vec<Option<DeltaTable>> = futures::stream::iter(opened).buffered(AT_ONCE).try_collect().await?;
    let rows: Vec<Value> = opened.iter().flatten().map(|table| row(&settings, table)).collect();
    if arguments.json {
        rows.iter().for_each(|row| print(&row.to_string()));
    } else {
        print_table(&rows);
    }
    Ok(())
}

fn row(settings: &Settings, table: &DeltaTable) -> Value {
    let snapshot = table.snapshot();
    let files = &snapshot.files;
    json!({
        "table": table.stream().as_str(),
        "files": files.len(),
        "rows": files.rows(),
        "bytes": files.bytes(),
        "small_files": small_files(files, settings.compact.small_bytes.0),
        "version": snapshot.version,
        "oldest": files.iter().map(|file| file.earliest_us()).min().and_then(time),
        "newest": files.iter().map(|file| file.latest_us()).max().and_then(time),
        "compacted": last_compaction(files).and_then(|ms| time(ms * 1_000)),
    })
}

/// Merges small files until there is nothing to win.
pub(crate) async fn compact(arguments: CompactArguments) -> anyhow::Result<()> {
    ensure!(arguments.cpu_share > 0.0 && arguments.cpu_share <= 1.0, "--cpu-share is above 0 and at most 1");
    let (mut settings, store) = arguments.at.open()?;
    settings.compact.cpu_share = arguments.cpu_share;
    // Who asks for it does not wait for more to come.
    settings.compact.min_files = 2;
    let mut bad = 0;
    for mut table in open_tables(&store, arguments.table).await? {
        let stream = table.stream().clone();
        let mut compactor = Compactor::new(&settings.compact);
        let (files, bytes) = (table.snapshot().files.len(), table.snapshot().files.bytes());
        let started = std::time::Instant::now();
        while let Some(inputs) = compactor.choose(&table.snapshot().files) {
            let rows = inputs.iter().filter_map(|file| file.rows).sum();
            let bar = bar(rows, &format!("{stream}: {} files", inputs.len()))?;
            let merged = compactor.merge(&mut table, inputs, &|rows| bar.inc(rows)).await;
            bar.finish_and_clear();
            match merged {
                Ok(Merged::Done { .. } | Merged::Overtaken) => {}
                Err(error) => {
                    let Some(path) = error.bad_file().map(str::to_owned) else { return Err(error.into()) };
                    print(&format!("{stream}: left out: {:#}", anyhow::Error::from(error)));
                    compactor.leave_out(&path);
                    bad += 1;
                }
            }
        }
        let now = table.snapshot().files;
        print(&format!(
            "{stream}: {files} files, {} -> {} files, {} in {:.1} s",
            HumanBytes(bytes),
            now.len(),
            HumanBytes(now.bytes()),
            started.elapsed().as_secs_f64()
        ));
    }
    if bad > 0 {
        bail!("{bad} files cannot be compacted; `weir verify` says more");
    }
    Ok(())
}

/// Gives a column another type, and looks at every row again.
pub(crate) async fn retype(arguments: RetypeArguments) -> anyhow::Result<()> {
    ensure!(arguments.cpu_share > 0.0 && arguments.cpu_share <= 1.0, "--cpu-share is above 0 and at most 1");
    let (_, store) = arguments.at.open()?;
    let (column, kind) = (&arguments.column, arguments.kind);
    for mut table in open_tables(&store, Some(arguments.table)).await? {
        let stream = table.stream().clone();
        let bar = bar(table.snapshot().files.rows(), &format!("{stream}.{column}: {kind}"))?;
        let started = std::time::Instant::now();
        let mut pace = Pace::new(arguments.cpu_share);
        let retyped = retype::retype(&mut table, column, kind, &mut pace, &|rows| bar.inc(rows)).await;
        bar.finish_and_clear();
        match retyped? {
            Retyped::Same => print(&format!("{stream}.{column} is {kind}: nothing to do")),
            Retyped::Done { files, rows, values_before, values_after } => print(&format!(
                "{stream}.{column} is {kind} now: {} of {} rows have a value, {} before; {files} files in {:.1} s",
                HumanCount(values_after),
                HumanCount(rows),
                HumanCount(values_before),
                started.elapsed().as_secs_f64()
            )),
        }
    }
    Ok(())
}

/// Deletes what nothing names any more.
pub(crate) async fn vacuum(arguments: VacuumArguments) -> anyhow::Result<()> {
    let (settings, store) = arguments.at.open()?;
    for mut table in open_tables(&store, arguments.table).await? {
        let stream = table.stream().clone();
        let plan = vacuum::plan(&store, &mut table, settings.lake.grace.0, &|| {}).await?;
        if arguments.dry_run {
            for (path, bytes) in &plan.unused {
                print(&format!("{stream}/{path}  {}", HumanBytes(*bytes)));
            }
            for (path, bytes) in &plan.staged {
                print(&format!("{}  {}", path.display(), HumanBytes(*bytes)));
            }
        }
        let what = format!("{} files, {}", plan.files(), HumanBytes(plan.bytes()));
        let kept = format!("{} in use, {} in their grace", plan.in_use, plan.kept);
        if arguments.dry_run {
            print(&format!("{stream}: would delete {what}; {kept}"));
            continue;
        }
        let bar = bar(plan.files() as u64, stream.as_str())?;
        let gone = vacuum::delete(&table, &plan, &|| bar.inc(1)).await;
        bar.finish_and_clear();
        print(&format!("{stream}: {} of {what} deleted; {kept}", gone?));
    }
    Ok(())
}

/// Reads everything, and names what is damaged.
pub(crate) async fn verify_tables(arguments: VerifyArguments) -> anyhow::Result<()> {
    let (_, store) = arguments.at.open()?;
    let mut damaged = 0;
    for stream in chosen(&store, arguments.table).await? {
        let bar = bar(0, stream.as_str())?;
        let report = verify(&store, &stream, &|bytes| bar.set_length(bytes), &|bytes| bar.inc(bytes)).await;
        bar.finish_and_clear();
        match report {
            Ok(Report { entries, files, rows, bytes, damage }) => {
                damaged += damage.len();
                damage.iter().for_each(|damage| print(&format!("{stream}: {}: {}", damage.what, damage.detail)));
                let (rows, bytes) = (HumanCount(rows), HumanBytes(bytes));
                print(&format!(
                    "{stream}: {entries} entries, {files} files, {rows} rows, {bytes} read; {} damaged",
                    damage.len()
                ));
            }
            Err(error) => {
                damaged += 1;
                print(&format!("{stream}: the table cannot be opened: {:#}", anyhow::Error::from(error)));
            }
        }
    }
    if damaged > 0 {
        bail!("{damaged} files or entries are damaged");
    }
    Ok(())
}

/// The table that was named, which has to be there, or all.
async fn chosen(store: &Store, table: Option<StreamName>) -> anyhow::Result<Vec<StreamName>> {
    let all = list_streams(store).await?;
    match table {
        None => Ok(all),
        Some(table) if all.contains(&table) => Ok(vec![table]),
        Some(table) => bail!("there is no table {table}; `weir tables` shows those that are"),
    }
}

async fn open_tables(store: &Store, table: Option<StreamName>) -> anyhow::Result<Vec<DeltaTable>> {
    let mut tables = Vec::new();
    for stream in chosen(store, table).await? {
        let opened = DeltaTable::open(store, &stream).await.with_context(|| format!("open table {stream}"))?;
        tables.extend(opened);
    }
    Ok(tables)
}

fn bar(length: u64, what: &str) -> anyhow::Result<ProgressBar> {
    let bar = ProgressBar::new(length);
    bar.set_style(ProgressStyle::with_template("{msg}  {wide_bar} {percent}%  {elapsed}, {eta} to go")?);
    bar.set_message(what.to_owned());
    Ok(bar)
}

fn time(us: i64) -> Option<String> {
    DateTime::from_timestamp_micros(us).map(|time| time.to_rfc3339_opts(SecondsFormat::Secs, true))
}

fn print_table(rows: &[Value]) {
    const TITLES: [&str; 9] =
        ["table", "files", "rows", "bytes", "small_files", "version", "oldest", "newest", "compacted"];
    let cell = |row: &Value, title: &str| match &row[title] {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Number(number) if title == "bytes" => HumanBytes(number.as_u64().unwrap_or(0)).to_string(),
        Value::Number(number) if title == "rows" => HumanCount(number.as_u64().unwrap_or(0)).to_string(),
        other => other.to_string(),
    };
    let mut lines = vec![TITLES.map(|title| title.replace('_', " "))];
    lines.extend(rows.iter().map(|row| TITLES.map(|title| cell(row, title))));
    let widths: Vec<usize> =
        (0..TITLES.len()).map(|at| lines.iter().map(|line| line[at].chars().count()).max().unwrap_or(0)).collect();
    for line in lines {
        let cells = line.iter().zip(&widths).enumerate().map(|(at, (cell, width))| {
            // Numbers to the right, under each other.
            if (1..=5).contains(&at) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        print(cells.collect::<Vec<_>>().join("  ").trim_end());
    }
}

#[allow(clippy::print_stdout, reason = "the answer")]
fn print(text: &str) {
    println!("{text}");
}
