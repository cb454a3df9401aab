//! `weir bench readers`: what a reader waits for. A year of one device out of many (point), the newest row of each of many
//! devices, and of one (`latest`), and how fast rows leave as Arrow through Flight SQL.
//!
//! The stream `year` has a reading of each device every `step` for 365 days; `many` has one row of each of its devices in the
//! table and newer ones of some of them hot. Answers are checked: numbers of rows, and that a newest row is one.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow::ipc::reader::StreamReader;
use arrow_flight::sql::client::FlightSqlServiceClient;
use futures::TryStreamExt;
use serde_json::{Value, json};
use tonic::transport::Endpoint;
use wire::sealed::NO_WATERMARK;
use wire::{CutBatch, DAY_US, FieldType, SpoolId, StreamField, StreamSchema};

use super::Common;
use super::ingest::{Sender, committed};
use super::parts::{Cloud, Directory, free_port};
use super::times::Times;
use crate::sql;

const DAYS: i64 = 365;
/// 2025-01-01T00:00:00Z
const START_US: i64 = 1_735_689_600_000_000;
const BATCH_ROWS: i64 = 8_192;
const IN_REQUEST: usize = 8;
/// Commits soon, in few commits…
const COMMITS: &str = "[commit]\nmax_age = \"5s\"\nmax_bytes = \"1GiB\"\n";
/// …and keeps what comes hot.
const KEEPS_HOT: &str = "[commit]\nmax_age = \"7d\"\n";

/// Options of `weir bench readers`.
#[derive(Debug, clap::Args)]
pub(crate) struct ReadersBench {
    /// Devices of the year
    #[arg(long, default_value_t = 100)]
    devices: i64,
    /// Readings of a device in a day
    #[arg(long, default_value_t = 144)]
    per_day: i64,
    /// Devices whose newest rows are asked for
    #[arg(long, default_value_t = 100_000)]
    latest_devices: i64,
    /// How often each question about one device is asked
    #[arg(long, default_value_t = 500)]
    repeat: usize,
    #[command(flatten)]
    common: Common,
}

impl ReadersBench {
    pub(super) async fn run(self) -> anyhow::Result<Value> {
        ensure!(self.devices > 0 && self.per_day > 0 && self.latest_devices > 0 && self.repeat > 0, "nothing to ask");
        let directory = Directory::new(&self.common)?;
        let port = free_port()?;
        let cloud = Cloud::start_with(&directory.0, port, COMMITS).await?;
        let schema = schema()?;
        let rows = self.devices * self.per_day * DAYS;
        let mut sender = Sender::new(Arc::clone(&schema), SpoolId(rand::random()))?;
        send(&cloud, &mut sender, "year", 0..rows, |number| self.of_year(number)).await?;
        let mut sender = Sender::new(Arc::clone(&schema), SpoolId(rand::random()))?;
        let of_many = |number: i64| (START_US + number, format!("device-{number:07}"));
        send(&cloud, &mut sender, "many", 0..self.latest_devices, of_many).await?;
        committed(&cloud, (rows + self.latest_devices) as u64).await?;
        drop(cloud);
        let cloud = Cloud::start_with(&directory.0, port, KEEPS_HOT).await?;
        let hot = self.latest_devices.min(BATCH_ROWS);
        let newer = |number: i64| (START_US + DAY_US + number, format!("device-{number:07}"));
        send(&cloud, &mut sender, "many", 0..hot, newer).await?;

        let point = |index: i64| {
            let device = index * 37 % self.devices;
            format!(
                "SELECT count(*) AS c, avg(speed) AS a, max(vehicles) AS m FROM year WHERE device = 'road-{device:05}'"
            )
        };
        let expected = (self.per_day * DAYS) as u64;
        let point = self.each(&cloud, point, |row| row["c"].as_u64() == Some(expected)).await?;
        let one = |index: i64| {
            let device = index * 7_919 % self.latest_devices;
            format!("SELECT device, ts, speed, vehicles FROM latest('many') WHERE device = 'device-{device:07}'")
        };
        let one = self.each(&cloud, one, |row| row["device"].is_string()).await?;
        let mut whole = Vec::new();
        for _ in 0..=20 {
            let begun = Instant::now();
            let found = arrow_rows(&cloud.http, "SELECT device, ts, speed, vehicles FROM latest('many')").await?;
            whole.push(begun.elapsed());
            ensure!(found as i64 == self.latest_devices, "{found} newest rows of {} devices", self.latest_devices);
        }
        // The first one may read the table.
        whole.remove(0);
        let mut out = Vec::new();
        for _ in 0..3 {
            let begun = Instant::now();
            let found = flight_rows(cloud.flight_sql, "SELECT ts, device, speed, vehicles FROM year").await?;
            out.push((found as f64 / begun.elapsed().as_secs_f64()).round());
            ensure!(found as i64 == rows, "{found} rows of {rows} came");
        }
        Ok(json!({
            "rows": rows,
            "files": sql::integer(&cloud.http, "SELECT count(*) FROM system.files WHERE stream = 'year'").await?,
            "point_ms": point.report(),
            "latest_one_ms": one.report(),
            "latest_whole_ms": whole.iter().collect::<Times>().report(),
            "latest_devices": self.latest_devices,
            "arrow_out_rows_per_second": out,
            "cloud_peak_rss_mb": cloud.part.memory_mb("VmHWM")?,
        }))
    }

    /// Time and device of a row: day by day, device by device.
    fn of_year(&self, number: i64) -> (i64, String) {
        let per_day = self.devices * self.per_day;
        let (day, device, step) = (number / per_day, number % per_day / self.per_day, number % self.per_day);
        (START_US + day * DAY_US + step * DAY_US / self.per_day, format!("road-{device:05}"))
    }

    /// How long each of many questions takes; each has one row, a right one.
    async fn each(
        &self,
        cloud: &Cloud,
        question: impl Fn(i64) -> String,
        right: impl Fn(&serde_json::Map<String, Value>) -> bool,
    ) -> anyhow::Result<Times> {
        let client = reqwest::Client::new();
        let mut times = Vec::new();
        // The first few are not counted.
        for index in 0..self.repeat + 5 {
            let question = question(index as i64);
            let begun = Instant::now();
            let request = client.post(format!("{}/v1/sql", cloud.http)).header("accept", "application/json");
            let answer = request.body(question.clone()).send().await?.error_for_status()?.bytes().await?;
            times.push(begun.elapsed());
            let rows: Vec<serde_json::Map<String, Value>> = serde_json::from_slice(&answer)?;
            ensure!(rows.len() == 1 && right(&rows[0]), "{question}: {rows:?}");
        }
        Ok(times.iter().skip(5).collect())
    }
}

async fn send(
    cloud: &Cloud,
    sender: &mut Sender,
    stream: &str,
    numbers: std::ops::Range<i64>,
    row: impl Fn(i64) -> (i64, String),
) -> anyhow::Result<()> {
    let starts: Vec<i64> = numbers.clone().step_by(BATCH_ROWS as usize).collect();
    for starts in starts.chunks(IN_REQUEST) {
        let batches = starts.iter().map(|start| {
            let of_batch = *start..(start + BATCH_ROWS).min(numbers.end);
            cut(&sender.schema, stream, of_batch.map(|number| (number, row(number))))
        });
        sender.send(&cloud.http, &batches.collect::<anyhow::Result<Vec<_>>>()?).await?;
    }
    Ok(())
}

fn schema() -> anyhow::Result<Arc<StreamSchema>> {
    let fields = [("speed", FieldType::Float64), ("vehicles", FieldType::Int64)];
    let fields = fields.map(|(name, kind)| Ok(StreamField { name: name.parse()?, kind }));
    Ok(Arc::new(StreamSchema::new(fields.into_iter().collect::<anyhow::Result<Vec<_>>>()?)?))
}

fn cut(
    schema: &StreamSchema,
    stream: &str,
    rows: impl Iterator<Item = (i64, (i64, String))>,
) -> anyhow::Result<CutBatch> {
    let rows: Vec<(i64, (i64, String))> = rows.collect();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(TimestampMicrosecondArray::from_iter_values(rows.iter().map(|(_, (ts, _))| *ts)).with_timezone("UTC")),
        Arc::new(StringArray::from_iter_values(rows.iter().map(|(_, (_, device))| device))),
        Arc::new(Float64Array::from_iter_values(rows.iter().map(|(number, _)| (number * 37 % 1_200) as f64 / 10.0))),
        Arc::new(Int64Array::from_iter_values(rows.iter().map(|(number, _)| number * 11 % 40))),
        Arc::new(StringArray::from_iter_values(rows.iter().map(|_| "good"))),
    ];
    let rows = RecordBatch::try_new(schema.arrow().clone(), columns)?;
    Ok(CutBatch::seal(stream.parse()?, schema, &rows, NO_WATERMARK, "bench", 0)?)
}

async fn arrow_rows(http: &str, statement: &str) -> anyhow::Result<usize> {
    let request = reqwest::Client::new().post(format!("{http}/v1/sql"));
    let request = request.header("accept", "application/vnd.apache.arrow.stream").body(statement.to_owned());
    let body = request.send().await?.error_for_status()?.bytes().await?;
    let mut rows = 0;
    for batch in StreamReader::try_new(std::io::Cursor::new(body), None)? {
        rows += batch?.num_rows();
    }
    Ok(rows)
}

async fn flight_rows(port: u16, statement: &str) -> anyhow::Result<usize> {
    let channel = Endpoint::new(format!("http://127.0.0.1:{port}"))?.connect().await?;
    let mut client = FlightSqlServiceClient::new(channel);
    let info = client.execute(statement.to_owned(), None).await?;
    let ticket = info.endpoint.first().and_then(|endpoint| endpoint.ticket.clone()).context("no ticket")?;
    let mut batches = client.do_get(ticket).await?;
    let mut rows = 0;
    while let Some(batch) = batches.try_next().await? {
        rows += batch.num_rows();
    }
    Ok(rows)
}
