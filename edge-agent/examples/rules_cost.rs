//! What rules cost: 300 of them over one source, readings through the whole pipeline, with and without the rules; and one
//! condition by row and by Arrow's kernels. JSON.
//!
//! `cargo run --release -p edge-agent --example rules_cost`. One thread. 450 devices, rules as the design shows them, some
//! with prev, `for`, `until` and CASE; few alerts fire, as in life. `core` is the share of a core at 10,000 readings/s.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use arrow_array::{BooleanArray, Float64Array};
use bytes::Bytes;
use edge_agent::config::Settings;
use edge_agent::decode::Value;
use edge_agent::entry::{Entry, Message, Payload};
use edge_agent::pipeline::Pipeline;
use edge_agent::rules::Rules;
use edge_agent::rules::expression::{Columns, Expression, Row};
use segment_log::Position;
use wire::FieldType;

const RULES: usize = 300;
const READINGS: u64 = 200_000;
const PER_SECOND: u64 = 10_000;
const DEVICES: u64 = 450;
/// 2014-08-01T12:00:00Z, in µs.
const BEGIN_US: i64 = 1_406_894_400_000_000;

fn settings(rules: usize) -> anyhow::Result<Settings> {
    let mut text = r#"
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
map = { device = "topic:2", ts = "arrival", avg_speed = "/avgSpeed", vehicle_count = "/vehicleCount" }
[stream.traffic]
lateness = "30s"
fields = { avg_speed = { type = "float64", min = 0, max = 200 }, vehicle_count = { type = "int64", min = 0 } }
"#
    .to_owned();
    for n in 0..rules {
        let condition = match n % 6 {
            0 => format!("when = \"avg_speed < {} AND vehicle_count > {}\"\nfor = \"1s\"", n % 20, 10 + n % 40),
            1 => format!("when = \"avg_speed > {}\"\nuntil = \"avg_speed < 90\"", 110 + n % 90),
            2 => format!("when = \"abs(avg_speed - prev(avg_speed)) > {}\"", 100 + n % 90),
            3 => format!("when = \"vehicle_count BETWEEN {} AND 1000 OR avg_speed IS NULL\"", 60 + n % 90),
            4 => format!("when = \"CASE WHEN vehicle_count > 50 THEN avg_speed ELSE 0 END > {}\"", 111 + n % 50),
            _ => format!("when = \"vehicle_count * 3 + 2 > avg_speed * {} AND device <> 'd7'\"", 5 + n % 50),
        };
        text += &format!(
            "[[rule]]\nname = \"rule-{n}\"\non = \"traffic\"\n{condition}\ntopic = \"alerts/{n}/{{device}}\"\n"
        );
    }
    Settings::parse(&text).map_err(anyhow::Error::msg)
}

#[allow(clippy::print_stdout, reason = "its answer")]
fn main() -> anyhow::Result<()> {
    let (with, without) = (settings(RULES)?, settings(0)?);
    let before = resident()?;
    let kept = (0..10).map(|_| Rules::new(&with)).collect::<Result<Vec<_>, _>>().map_err(anyhow::Error::msg)?;
    let bytes_per_rule = (resident()?.saturating_sub(before)) / (kept.len() * RULES) as u64;
    let (plain_ns, none) = run(&without)?;
    let (ns, alerts) = run(&with)?;
    if none > 0 || alerts == 0 {
        bail!("{none} alerts without rules, {alerts} with them");
    }
    let core = ns * PER_SECOND as f64 / 1e9;
    let rule_ns = (ns - plain_ns) / RULES as f64;
    let (row_ns, kernel_ns, arrays_ns) = one_condition()?;
    println!(
        r#"{{"rules":{RULES},"readings":{READINGS},"devices":{DEVICES},"alerts":{alerts},"ns_per_reading":{ns:.0},"ns_per_reading_without_rules":{plain_ns:.0},"ns_per_rule":{rule_ns:.1},"core":{core:.3},"bytes_per_idle_rule":{bytes_per_rule},"row_ns":{row_ns:.1},"kernels_ns":{kernel_ns:.1},"kernels_and_arrays_ns":{arrays_ns:.1}}}"#
    );
    Ok(())
}

/// Nanoseconds for a reading through the pipeline, and the rows of alerts.
fn run(settings: &Settings) -> anyhow::Result<(f64, usize)> {
    let mut pipeline = Pipeline::new(settings, Position(0), &BTreeMap::new());
    let (mut alerts, mut took) = (0, 0.0);
    for group in 0..READINGS / PER_SECOND {
        let first = group * PER_SECOND;
        let entries = (first..first + PER_SECOND).map(message).collect::<Vec<_>>();
        let begun = Instant::now();
        for (n, entry) in (first..).zip(&entries) {
            pipeline.apply(Position(n), Position(n + 1), entry);
            black_box(pipeline.take_alerts());
        }
        let cut = pipeline.cut()?;
        took += begun.elapsed().as_secs_f64();
        let batches = cut.lanes.iter().flat_map(|lane| &lane.batches);
        alerts +=
            batches.filter(|batch| batch.stream.as_str() == "alerts").map(|batch| batch.rows as usize).sum::<usize>();
    }
    Ok((took * 1e9 / READINGS as f64, alerts))
}

fn message(n: u64) -> Entry {
    let (speed, count) = (20 + n * 7_919 % 91, n * 104_729 % 60);
    let payload = format!("{{\"status\":\"OK\",\"avgSpeed\":{speed},\"vehicleCount\":{count},\"avgMeasuredTime\":66}}");
    Entry::Message(Message {
        source: "traffic".to_owned(),
        topic: format!("city/traffic/d{}", n % DEVICES),
        payload: Payload::Whole(Bytes::from(payload)),
        arrival_us: BEGIN_US + (n * 1_000_000 / PER_SECOND) as i64,
        delivery: None,
    })
}

/// `avg_speed < 20 AND vehicle_speed > 10` for one row: compiled; as three kernels on arrays that are there; with the arrays.
fn one_condition() -> anyhow::Result<(f64, f64, f64)> {
    const TIMES: u32 = 1_000_000;
    let columns = ["a", "b"].map(|name| (name.to_owned(), FieldType::Float64));
    let expression = Expression::parse("a < 20.0 AND b > 10.0", &Columns::new(columns))?;
    let timed = |each: &dyn Fn(u32) -> bool| {
        let begun = Instant::now();
        let yes = (0..TIMES).filter(|n| black_box(each(black_box(*n)))).count();
        black_box(yes);
        begun.elapsed().as_secs_f64() * 1e9 / f64::from(TIMES)
    };
    let row = timed(&|n| {
        let values = [Some(Value::Float(f64::from(n % 40))), Some(Value::Float(f64::from(n % 20)))];
        expression.test(&Row { device: "d", values: &values, previous: &[] }) == Ok(Some(true))
    });
    let constant = |value| Arc::new(Float64Array::new_scalar(value));
    let (twenty, ten) = (constant(20.0), constant(10.0));
    let kernels = |a: &Float64Array, b: &Float64Array| {
        let both = [arrow_ord::cmp::lt(a, twenty.as_ref()), arrow_ord::cmp::gt(b, ten.as_ref())];
        let [Ok(one), Ok(two)] = both else { return false };
        // What AND costs at least.
        BooleanArray::new(one.values() & two.values(), None).value(0)
    };
    let (a, b) = (Float64Array::from(vec![15.0]), Float64Array::from(vec![15.0]));
    let there = timed(&|_| kernels(&a, &b));
    let made =
        timed(&|n| kernels(&Float64Array::from(vec![f64::from(n % 40)]), &Float64Array::from(vec![f64::from(n % 20)])));
    Ok((row, there, made))
}

/// Bytes in memory (Linux).
fn resident() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").context("read /proc/self/statm")?;
    let pages = text.split(' ').nth(1).context("no second number")?;
    Ok(pages.parse::<u64>().context("no number")? * 4_096)
}
