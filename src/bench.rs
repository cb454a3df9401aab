//! `weir bench`: measurements of separate processes on this machine, as JSON. Answers are checked before numbers are shown.
//!
//! CPU-seconds are user and system time of a process from its start (`/proc/<pid>/stat`), peak RSS is `VmHWM`, bytes to
//! disk are `write_bytes` of `/proc/<pid>/io`. Every report names commit, date, machine and command.

mod acks;
mod alerts;
mod commit;
mod drain;
mod ingest;
mod nab;
mod parts;
mod path;
mod queries;
mod readers;
mod recover;
mod soak;
mod start;
mod times;
mod views;

use std::path::PathBuf;

use anyhow::Context;
use serde_json::{Value, json};

/// The commit that this binary was built from; `build.rs` reads it.
const COMMIT: &str = env!("WEIR_COMMIT");

/// What is measured.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum BenchCommand {
    /// The cloud alone: sealed batches from several connections, durable acks
    Cloud(ingest::CloudBench),
    /// From a request to its durable ack at a steady rate: as usual, beside an analyst, beside compaction
    Acks(acks::AcksBench),
    /// Many small commits to one table: the last against the first, memory, opening, compaction
    Commit(commit::CommitBench),
    /// The whole path: publisher, Mosquitto, edge agent, cloud; nothing lost
    Path(path::PathBench),
    /// From published to visible in SQL, at a steady rate
    Freshness(path::FreshnessBench),
    /// A backlog to a cloud that was away, while live data flows
    Drain(drain::DrainBench),
    /// From the agent's start to its first reading on disk in the spool
    Start(start::StartBench),
    /// Statements over half hot and all cold tables, beside DuckDB and chDB
    Queries(queries::QueriesBench),
    /// One device over a year, the newest rows of many devices, rows out as Arrow
    Readers(readers::ReadersBench),
    /// From the start of a cloud that was killed to its first answer, by the size of its WAL
    Recover(recover::RecoverBench),
    /// Views that follow a stream: their cost beside asking again, their lag, the curve of their work
    Views(views::ViewsBench),
    /// From a reading to its alert, many rules, many subscribers
    Alerts(alerts::AlertsBench),
    /// Ready-made rules over the labelled traffic of the Numenta Anomaly Benchmark: precision and recall
    Nab(nab::NabBench),
    /// Load, commits, compaction, retention, vacuum and questions together, checked every second
    Soak(soak::SoakBench),
}

/// Options of every measurement.
#[derive(Debug, clap::Args)]
pub(crate) struct Common {
    /// Where the processes keep their data; it must not be there, and is removed at the end. A temporary place unless set
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// The edge agent's binary; `weir edge` unless set
    #[arg(long)]
    edge_agent: Option<PathBuf>,
}

/// Measures and prints.
pub(crate) async fn bench(command: BenchCommand) -> anyhow::Result<()> {
    let result = match command {
        BenchCommand::Cloud(bench) => bench.run().await?,
        BenchCommand::Acks(bench) => bench.run().await?,
        BenchCommand::Commit(bench) => bench.run().await?,
        BenchCommand::Path(bench) => bench.run().await?,
        BenchCommand::Freshness(bench) => bench.run().await?,
        BenchCommand::Drain(bench) => bench.run().await?,
        BenchCommand::Start(bench) => bench.run()?,
        BenchCommand::Queries(bench) => bench.run().await?,
        BenchCommand::Readers(bench) => bench.run().await?,
        BenchCommand::Recover(bench) => bench.run().await?,
        BenchCommand::Views(bench) => bench.run().await?,
        BenchCommand::Alerts(bench) => bench.run().await?,
        BenchCommand::Nab(bench) => bench.run().await?,
        BenchCommand::Soak(bench) => bench.run().await?,
    };
    let report = json!({
        "command": std::env::args().skip(1).collect::<Vec<_>>().join(" "),
        "commit": COMMIT,
        "date": chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
        "machine": machine(),
        "build": if cfg!(debug_assertions) { "debug" } else { "release" },
        "result": result,
    });
    print(&serde_json::to_string_pretty(&report).context("write the report")?);
    Ok(())
}

fn machine() -> Value {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|pair| pair.1));
    json!({ "cpu": model, "cores": std::thread::available_parallelism().map_or(0, usize::from) })
}

#[allow(clippy::print_stdout, reason = "the report")]
fn print(text: &str) {
    println!("{text}");
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    #[test]
    fn the_commit_is_that_of_the_build() {
        let root = env!("CARGO_MANIFEST_DIR");
        let Ok(git) = Command::new("git").args(["-C", root, "rev-parse", "--show-toplevel", "HEAD"]).output() else {
            return;
        };
        let text = String::from_utf8(git.stdout).unwrap();
        let head = match text.lines().collect::<Vec<_>>()[..] {
            [top, head] if top == root => &head[..12],
            _ => "unknown",
        };
        assert_eq!(super::COMMIT, head);
    }
}
