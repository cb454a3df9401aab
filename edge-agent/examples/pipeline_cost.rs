//! What it costs to bring a journalled message to sealed rows: decode, checks, windows and cuts, without a disk: JSON with
//! seconds per million messages (by the wall, of one thread).
//!
//! `cargo run --profile gateway -p edge-agent --example pipeline_cost [STREAM.toml]`. Messages of about 120 bytes as the
//! city's sensors send them, 449 of them every five minutes, one thread, a cut at 8,192 rows. The file holds other settings of
//! `[stream.traffic]` than those below. The best of five runs, for the machine may have other work.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::Context;
use bytes::Bytes;
use edge_agent::config::Settings;
use edge_agent::entry::{Entry, Message, Payload};
use edge_agent::pipeline::Pipeline;
use segment_log::Position;

const MESSAGES: usize = 400_000;
const DEVICES: usize = 449;
const RUNS: usize = 5;
/// 2014-08-01T12:00:00Z, in µs.
const BEGIN_US: i64 = 1_406_894_400_000_000;
const SOURCE: &str = r#"
[edge]
id = "gw"
data_dir = "unused"
[cloud]
urls = ["http://127.0.0.1:7300"]
token = "unused"
[[source]]
kind = "mqtt"
url = "mqtt://127.0.0.1:1883"
topics = ["city/traffic/+"]
stream = "traffic"
format = "json"
[source.map]
device = "topic:2"
ts = { at = "/TIMESTAMP", format = "%Y-%m-%dT%H:%M:%S", zone = "UTC" }
avg_speed = "/avgSpeed"
vehicle_count = "/vehicleCount"
"#;
const STREAM: &str = r#"
[stream.traffic]
lateness = "30m"
[stream.traffic.fields]
avg_speed = { type = "float64", min = 0, max = 200 }
vehicle_count = { type = "int64", min = 0 }
[stream.traffic.window.5m]
size = "5m"
"#;

#[allow(clippy::print_stdout, reason = "its answer")]
fn main() -> anyhow::Result<()> {
    let stream = match std::env::args_os().nth(1) {
        Some(file) => std::fs::read_to_string(file).context("read the stream's settings")?,
        None => STREAM.to_owned(),
    };
    let settings = Settings::parse(&format!("{SOURCE}{stream}")).map_err(anyhow::Error::msg)?;
    let entries = (0..MESSAGES).map(message).collect::<Vec<_>>();
    let (mut best, mut rows) = (f64::INFINITY, 0);
    for _ in 0..RUNS {
        let mut pipeline = Pipeline::new(&settings, Position(0), &BTreeMap::new());
        let mut batches = 0_u64;
        let begun = Instant::now();
        for (index, entry) in entries.iter().enumerate() {
            pipeline.apply(Position(index as u64), Position(index as u64 + 1), entry);
            if pipeline.pending_rows() >= 8_192 {
                let cut = pipeline.cut()?;
                batches +=
                    cut.lanes.iter().flat_map(|lane| &lane.batches).map(|batch| u64::from(batch.rows)).sum::<u64>();
            }
        }
        best = best.min(begun.elapsed().as_secs_f64() * 1e6 / MESSAGES as f64);
        rows = batches;
    }
    println!(r#"{{"messages":{MESSAGES},"rows_sealed":{rows},"seconds_per_million":{best:.3}}}"#);
    Ok(())
}

fn message(n: usize) -> Entry {
    let (device, round) = (158_000 + n % DEVICES, (n / DEVICES) as i64);
    let arrival_us = BEGIN_US + round * 300_000_000;
    let time = chrono::DateTime::from_timestamp_micros(arrival_us).unwrap_or_default().format("%Y-%m-%dT%H:%M:%S");
    let (speed, count) = (20 + n * 13 % 90, n * 31 % 60);
    let payload = format!(
        "{{\"status\":\"OK\",\"avgSpeed\":{speed},\"TIMESTAMP\":\"{time}\",\"REPORT_ID\":{device},\
         \"vehicleCount\":{count},\"avgMeasuredTime\":66}}"
    );
    Entry::Message(Message {
        source: "traffic".into(),
        topic: format!("city/traffic/{device}"),
        payload: Payload::Whole(Bytes::from(payload)),
        arrival_us,
        delivery: None,
    })
}
