//! What it costs to decode and check a message, without journal, windows and rows: JSON with ns per message.
//!
//! `cargo run --release -p edge-agent --example decode_cost`. Messages of about 120 bytes as the city's sensors send them,
//! with the mapping of the design, one thread. All must be accepted, or the number means nothing.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, bail};
use bytes::Bytes;
use edge_agent::config::Settings;
use edge_agent::decode::Decoder;
use edge_agent::validate::{Judge, Quality};

const MESSAGES: usize = 1_000_000;
/// Different ones, so that no branch is learnt by heart; few enough to stay in the cache, as a message just read does.
const DIFFERENT: usize = 1_000;
/// 2014-08-01T12:00:00Z, in µs.
const ARRIVAL_US: i64 = 1_406_894_400_000_000;
const SETTINGS: &str = r#"
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
ts = { at = "/TIMESTAMP", format = "%Y-%m-%dT%H:%M:%S", zone = "Europe/Copenhagen" }
avg_speed = "/avgSpeed"
vehicle_count = "/vehicleCount"
[stream.traffic]
lateness = "30m"
[stream.traffic.fields]
avg_speed = { type = "float64", min = 0, max = 200 }
vehicle_count = { type = "int64", min = 0 }
"#;

#[allow(clippy::print_stdout, reason = "its answer")]
fn main() -> anyhow::Result<()> {
    let settings = Settings::parse(SETTINGS).map_err(anyhow::Error::msg)?;
    let decoding = settings.source.first().and_then(|source| source.decoding()).context("no source")?;
    let stream = settings.stream.values().next().context("no stream")?;
    let (mut decoder, mut judge) = (Decoder::new(&decoding, stream), Judge::new(stream));
    let mut quality = Quality::default();
    let messages = (0..DIFFERENT).map(message).collect::<Vec<_>>();
    let bytes = messages.iter().map(|(_, payload)| payload.len()).sum::<usize>() / DIFFERENT;
    let mut out = Vec::new();
    let (mut accepted, begun) = (0, Instant::now());
    for (topic, payload) in messages.iter().cycle().take(MESSAGES) {
        decoder.decode(topic, payload, ARRIVAL_US, &mut out);
        for mut reading in out.drain(..).flatten() {
            accepted += usize::from(judge.judge(&mut reading, ARRIVAL_US, 0, ARRIVAL_US, &mut quality).is_ok());
            black_box(reading);
        }
    }
    let took = begun.elapsed();
    if accepted != MESSAGES {
        bail!("{accepted} of {MESSAGES} were accepted");
    }
    let ns = took.as_nanos() / MESSAGES as u128;
    println!(r#"{{"messages":{MESSAGES},"payload_bytes":{bytes},"ns_per_message":{ns}}}"#);
    Ok(())
}

fn message(n: usize) -> (String, Bytes) {
    let device = 158_000 + n * 7 % 449;
    let (hour, minute, speed, count) = (n % 12, n * 5 % 60, 20 + n * 13 % 90, n * 31 % 60);
    let payload = format!(
        "{{\"status\":\"OK\",\"avgSpeed\":{speed},\"TIMESTAMP\":\"2014-08-01T{hour:02}:{minute:02}:00\",\
         \"REPORT_ID\":{device},\"vehicleCount\":{count},\"avgMeasuredTime\":66}}"
    );
    (format!("city/traffic/{device}"), Bytes::from(payload))
}
