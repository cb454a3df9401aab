//! The Aarhus file over a real Mosquitto into separate processes, and the numbers that are known of it.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::harness::{Cloud, Edge, Mosquitto, mqtt_source};
use crate::process::{PATIENCE, POLL};

const ROWS: i64 = 323_422;
const DISTINCT: i64 = 323_296;
const VEHICLES: i64 = 1_172_544;
const LATE: i64 = 55;

/// The Aarhus file; None, and a word about it, when it is not there.
pub(crate) fn aarhus() -> Option<PathBuf> {
    let told = std::env::var_os("WEIR_SHARED_DATA").map(PathBuf::from);
    let data = told.clone().unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/data"));
    let path = data.join("aarhus/traffic_2014-08_40_sensors.csv.gz");
    if !path.exists() {
        assert_eq!(told, None, "WEIR_SHARED_DATA has no Aarhus data");
        println!("left out: no Aarhus data beside the repository");
    }
    path.exists().then_some(path)
}

const TRAFFIC: &str = r#"
[source.map]
device = "topic:2"
ts = { at = "/TIMESTAMP", format = "%Y-%m-%dT%H:%M:%S", zone = "Europe/Copenhagen" }
avg_speed = "/avgSpeed"
vehicle_count = "/vehicleCount"
avg_time = "/avgMeasuredTime"
median_time = "/medianMeasuredTime"
status = "/status"
[stream.traffic]
lateness = "30m"
[stream.traffic.fields]
avg_speed = { type = "float64", min = 0 }
vehicle_count = { type = "int64", min = 0 }
avg_time = { type = "float64" }
median_time = { type = "float64" }
status = { type = "text" }
[stream.traffic.window.5m]
size = "5m"
"#;

/// Average speed per sensor, from a plain read of the file.
fn plain_averages(path: &Path) -> HashMap<String, f64> {
    let mut text = String::new();
    flate2::read::MultiGzDecoder::new(std::fs::File::open(path).unwrap()).read_to_string(&mut text).unwrap();
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let header = reader.headers().unwrap().clone();
    let at = |name: &str| header.iter().position(|column| column == name).unwrap();
    let (speed, sensor) = (at("avgSpeed"), at("REPORT_ID"));
    let mut sums: HashMap<String, (f64, f64)> = HashMap::new();
    for record in reader.records() {
        let record = record.unwrap();
        let sum = sums.entry(record[sensor].to_owned()).or_default();
        sum.0 += record[speed].parse::<f64>().unwrap();
        sum.1 += 1.0;
    }
    sums.into_iter().map(|(sensor, (sum, count))| (sensor, sum / count)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_month_of_aarhus_arrives_whole() {
    let Some(path) = aarhus() else { return };
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let mut cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"5s\"\n").await;
    let source = mqtt_source(&broker.url(), "city/traffic/+", "traffic", TRAFFIC);
    let mut edge = Edge::start(directory.path(), &cloud, &source).await;
    let replay = tokio::process::Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["replay", "--mqtt", &broker.url(), "--topic", "city/traffic/{REPORT_ID}", "--speed", "max", "--file"])
        .arg(&path)
        .status()
        .await
        .unwrap();
    assert!(replay.success());
    let started = Instant::now();
    while cloud.integer("SELECT count(*) FROM traffic").await < ROWS {
        assert!(started.elapsed() < PATIENCE, "not all arrives: {:#}", edge.status().await);
        tokio::time::sleep(POLL).await;
    }
    let status = edge.drained().await;
    assert_eq!(status["sources"][0]["accepted"], ROWS);
    assert_eq!(status["quarantined"], serde_json::json!({}));
    let late = cloud.integer("SELECT count(*) FROM traffic WHERE quality = 'late'").await;
    assert_eq!(late, LATE, "rows that come 6.9 days late enter no window and say so");
    check(&cloud, &path).await;
    // A clean stop commits what is hot; outside readers find the tables alone.
    edge.stop();
    cloud.stop();
    outside(&directory.path().join("tables/traffic"));
    cloud.run();
    cloud.wait().await;
    check(&cloud, &path).await;
}

async fn check(cloud: &Cloud, path: &Path) {
    assert_eq!(cloud.integer("SELECT count(*) FROM traffic").await, ROWS);
    let distinct = "SELECT count(*) FROM (SELECT DISTINCT device, ts FROM traffic)";
    assert_eq!(cloud.integer(distinct).await, DISTINCT);
    assert_eq!(cloud.integer("SELECT sum(vehicle_count) FROM traffic").await, VEHICLES);
    let averages = plain_averages(path);
    let rows = cloud.sql("SELECT device, avg(avg_speed) AS a FROM traffic GROUP BY device").await.unwrap();
    assert_eq!(rows.len(), averages.len());
    for row in rows {
        let (device, average) = (row["device"].as_str().unwrap(), row["a"].as_f64().unwrap());
        assert!((averages[device] - average).abs() < 1e-9, "{device}: {average} instead of {}", averages[device]);
    }
}

/// The same numbers from Python `deltalake` and DuckDB, which know nothing of Weir.
fn outside(table: &Path) {
    let Some(python) = std::env::var_os("WEIR_PYTHON") else {
        println!("left out: WEIR_PYTHON names no Python with deltalake and duckdb");
        return;
    };
    let script = "import sys, duckdb, deltalake\n\
        t = deltalake.DeltaTable(sys.argv[1]).to_pyarrow_table()\n\
        q = 'select count(*), count(distinct (device, ts)), sum(vehicle_count) from t'\n\
        print(*duckdb.sql(q).fetchall()[0])";
    let output = Command::new(python).args(["-c", script]).arg(table).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), format!("{ROWS} {DISTINCT} {VEHICLES}"));
}

#[test]
fn ready_made_rules_are_counted_on_labelled_traffic() {
    let Some(file) = aarhus() else { return };
    let data = file.parent().and_then(Path::parent).unwrap().join("nab");
    let directory = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["bench", "nab", "--data"])
        .args([&data, Path::new("--rules"), &root.join("configs/rules/traffic.toml")])
        .args([
            Path::new("--views"),
            &root.join("configs/views"),
            Path::new("--data-dir"),
            &directory.path().join("nab"),
        ])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let result = &report["result"];
    println!("{result:#}");
    let rows: i64 = result["rows"].as_object().unwrap().values().map(|rows| rows.as_i64().unwrap()).sum();
    assert_eq!((rows, result["views"].as_object().unwrap().len()), (15_664, 2));
    let rules = result["rules"].as_object().unwrap();
    assert_eq!(rules.len(), 6);
    // Labelled windows of the three, two and two series.
    for (rule, windows) in
        [("congestion", 7), ("sudden_drop", 7), ("stuck_detector", 7), ("crowded", 3), ("slow_way", 4)]
    {
        for how in ["shipped", "held_out"] {
            assert_eq!(rules[rule][how]["windows"], windows, "{rule}");
        }
    }
    assert!(rules["silent_detector"]["not_tried"].is_string());
}
