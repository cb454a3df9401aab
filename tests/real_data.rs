//! A month of the city of Aarhus through the door, the WAL and the tables, and the numbers that are known of it.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use wire::{FieldType, Seq, StreamField, StreamSchema};

use crate::harness::{Chain, Cloud, Sender};

const ROWS: usize = 323_422;
const DISTINCT: i64 = 323_296;
const VEHICLES: i64 = 1_172_544;

struct Reading {
    ts: i64,
    device: String,
    speed: f64,
    vehicles: i64,
}

fn aarhus() -> Option<Vec<Reading>> {
    let path =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/data/aarhus/traffic_2014-08_40_sensors.csv.gz");
    if !path.exists() {
        println!("left out: no Aarhus data beside the repository");
        return None;
    }
    let mut text = String::new();
    flate2::read::MultiGzDecoder::new(std::fs::File::open(path).unwrap()).read_to_string(&mut text).unwrap();
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let header = reader.headers().unwrap().clone();
    let at = |name: &str| header.iter().position(|column| column == name).unwrap();
    let columns = (at("TIMESTAMP"), at("REPORT_ID"), at("avgSpeed"), at("vehicleCount"));
    let readings = reader.records().map(|record| {
        let record = record.unwrap();
        // August in Denmark is UTC+2 throughout.
        let local = chrono::NaiveDateTime::parse_from_str(&record[columns.0], "%Y-%m-%dT%H:%M:%S").unwrap();
        Reading {
            ts: (local.and_utc().timestamp() - 7_200) * 1_000_000,
            device: record[columns.1].to_owned(),
            speed: record[columns.2].parse().unwrap(),
            vehicles: record[columns.3].parse().unwrap(),
        }
    });
    Some(readings.collect())
}

fn schema() -> Arc<StreamSchema> {
    let fields = [("avg_speed", FieldType::Float64), ("vehicle_count", FieldType::Int64)];
    let fields = fields.map(|(name, kind)| StreamField { name: name.parse().unwrap(), kind });
    Arc::new(StreamSchema::new(fields.to_vec()).unwrap())
}

fn rows(readings: &[Reading]) -> RecordBatch {
    let ts = TimestampMicrosecondArray::from_iter_values(readings.iter().map(|reading| reading.ts));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(ts.with_timezone("UTC")),
        Arc::new(StringArray::from_iter_values(readings.iter().map(|reading| &reading.device))),
        Arc::new(Float64Array::from_iter_values(readings.iter().map(|reading| reading.speed))),
        Arc::new(Int64Array::from_iter_values(readings.iter().map(|reading| reading.vehicles))),
        Arc::new(StringArray::from_iter_values(readings.iter().map(|_| "good"))),
    ];
    RecordBatch::try_new(schema().arrow().clone(), columns).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_month_of_aarhus_arrives_whole() {
    let Some(readings) = aarhus() else { return };
    assert_eq!(readings.len(), ROWS);
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = Cloud::start(directory.path(), "a", "").await;
    let (sender, mut chain) = (Sender::to(&cloud), Chain::new("traffic", schema()));
    let batches: Vec<_> = readings.chunks(8_192).map(|part| chain.seal(&rows(part))).collect();
    for part in batches.chunks(8) {
        sender.send(&chain.schema, part).await.marks();
    }
    check(&cloud, &readings).await;
    // A clean stop commits what is hot; outside readers find the tables alone.
    cloud.stop();
    outside(&directory.path().join("tables/traffic"));
    cloud.run();
    cloud.wait().await;
    assert_eq!(sender.positions(chain.spool).await.marks().1, Seq(batches.len() as u64));
    check(&cloud, &readings).await;
}

async fn check(cloud: &Cloud, readings: &[Reading]) {
    assert_eq!(cloud.integer("SELECT count(*) FROM traffic").await, ROWS as i64);
    let distinct = "SELECT count(*) FROM (SELECT DISTINCT device, ts FROM traffic)";
    assert_eq!(cloud.integer(distinct).await, DISTINCT);
    assert_eq!(cloud.integer("SELECT sum(vehicle_count) FROM traffic").await, VEHICLES);
    let mut sums: HashMap<&str, (f64, f64)> = HashMap::new();
    for reading in readings {
        let sum = sums.entry(&reading.device).or_default();
        *sum = (sum.0 + reading.speed, sum.1 + 1.0);
    }
    let rows = cloud.sql("SELECT device, avg(avg_speed) AS a FROM traffic GROUP BY device").await.unwrap();
    assert_eq!(rows.len(), sums.len());
    for row in rows {
        let (device, average) = (row["device"].as_str().unwrap(), row["a"].as_f64().unwrap());
        let (sum, count) = sums[device];
        assert!((sum / count - average).abs() < 1e-9, "{device}: {average} instead of {}", sum / count);
    }
    let day = "SELECT count(*) FROM traffic WHERE ts >= '2014-08-10' AND ts < '2014-08-11'";
    let in_day = readings.iter().filter(|r| (1_407_628_800..1_407_715_200).contains(&(r.ts / 1_000_000))).count();
    assert_eq!(cloud.integer(day).await, in_day as i64);
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
