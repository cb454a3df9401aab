//! What a backlog costs at a start: JSON with the seconds to open a spool and the peak of the process's memory, in MiB.
//!
//! `cargo run --release -p edge-agent --example spool_memory -- fill DIR BATCHES`, then the same with `open DIR`, in a
//! process of its own. One lane and one stream, cuts of one batch of 16 rows, as a quiet gateway writes them through an outage;
//! every third is sent at once (its number lies in the log, and it is not committed) when `fill` gets `numbers` as well.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use arrow_array::{Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use edge_agent::spool::{LaneSettings, OnFull, Spool, SpoolSettings};
use segment_log::{Disk, Position};
use wire::{CutBatch, FieldType, SpoolId, StreamField, StreamSchema};

const ROWS: usize = 16;
const NOW_US: i64 = 1_700_000_000_000_000;

fn settings() -> anyhow::Result<SpoolSettings> {
    let lane = LaneSettings {
        name: "rest".to_owned(),
        max_bytes: 8 << 30,
        segment_bytes: 16 << 20,
        on_full: OnFull::Refuse,
        raw: BTreeSet::new(),
        max_age_us: None,
    };
    Ok(SpoolSettings { edge: "gw".parse()?, agent: "example".to_owned(), configuration: 1, lanes: vec![lane] })
}

fn schema() -> anyhow::Result<StreamSchema> {
    Ok(StreamSchema::new(vec![StreamField { name: "speed".parse()?, kind: FieldType::Float64 }])?)
}

fn batch(schema: &StreamSchema, n: u64) -> anyhow::Result<CutBatch> {
    let ts = (0..ROWS).map(|row| NOW_US + (n as i64 * ROWS as i64 + row as i64) * 1_000).collect::<Vec<_>>();
    let devices = (0..ROWS).map(|row| format!("sensor-{:03}", (n as usize * ROWS + row) % 449)).collect::<Vec<_>>();
    let rows = RecordBatch::try_new(
        schema.arrow().clone(),
        vec![
            Arc::new(TimestampMicrosecondArray::from(ts).with_timezone("UTC")),
            Arc::new(StringArray::from(devices)),
            Arc::new((0..ROWS).map(|row| Some((n as f64 + row as f64).sqrt())).collect::<Float64Array>()),
            Arc::new(StringArray::from(vec!["good"; ROWS])),
        ],
    )?;
    Ok(CutBatch::seal("traffic".parse()?, schema, &rows, NOW_US, "example", 1)?)
}

#[allow(clippy::print_stdout, reason = "its answer")]
fn main() -> anyhow::Result<()> {
    let arguments = std::env::args().skip(1).collect::<Vec<_>>();
    let [what, directory, rest @ ..] = arguments.as_slice() else { bail!("fill DIR BATCHES [numbers] | open DIR") };
    let begun = Instant::now();
    let (mut spool, incidents) = Spool::open(&Disk, Path::new(directory), settings()?, SpoolId([7; 16]))?;
    let opened_s = begun.elapsed().as_secs_f64();
    if what == "fill" {
        let schema = schema()?;
        let batches = rest.first().context("how many batches")?.parse::<u64>()?;
        let stream = "traffic".parse()?;
        for n in 1..=batches {
            spool.append(0, Position(n), &[batch(&schema, n)?], std::slice::from_ref(&schema), NOW_US)?;
            if rest.len() > 1 && n % 3 == 0 {
                spool.number(0, &stream, 1)?;
            }
        }
        spool.mark()?;
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mib = |name: &str| {
        let kib =
            status.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
        kib.unwrap_or_default() / 1024.0
    };
    let waiting = spool.lanes().map(|lane| lane.batches_waiting).sum::<usize>();
    println!(
        "{}",
        serde_json::json!({
            "batches_waiting": waiting, "rows": spool.rows(), "incidents": incidents.len(),
            "open_s": (opened_s * 1e3).round() / 1e3, "peak_mib": mib("VmHWM:").round(), "now_mib": mib("VmRSS:").round(),
        })
    );
    Ok(())
}
