//! `weir replay`: a file of history as live messages. Each row of a CSV or line of NDJSON becomes one JSON message.
//!
//! `.gz` is read as it is. `{COLUMN}` in the topic is replaced by the row's value. Numbers of a CSV stay numbers,
//! everything else is text. `--speed max` sends as fast as the broker acknowledges; `--speed 60x` keeps the distances
//! of the rows' times, divided by 60, and waits for none that goes backwards.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use flate2::read::MultiGzDecoder;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use crate::publish::{BrokerAddress, Publisher};

/// Arguments of `weir replay`.
#[derive(Debug, clap::Args)]
pub(crate) struct ReplayArguments {
    /// CSV or NDJSON file, .gz or not
    #[arg(long)]
    file: PathBuf,
    /// Broker, mqtt://host:port
    #[arg(long)]
    mqtt: BrokerAddress,
    /// Topic; {COLUMN} is replaced by the row's value
    #[arg(long)]
    topic: String,
    /// max, or a factor such as 60x
    #[arg(long, default_value = "max")]
    speed: Speed,
    /// Column with the time of a row, for a factor
    #[arg(long, default_value = "TIMESTAMP")]
    time: String,
    /// Stop after this many rows
    #[arg(long)]
    rows: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
enum Speed {
    Max,
    Factor(f64),
}

impl std::str::FromStr for Speed {
    type Err = anyhow::Error;
    fn from_str(text: &str) -> anyhow::Result<Self> {
        if text == "max" {
            return Ok(Self::Max);
        }
        let factor = text.strip_suffix('x').and_then(|number| number.parse::<f64>().ok());
        match factor {
            Some(factor) if factor.is_finite() && factor > 0.0 => Ok(Self::Factor(factor)),
            _ => bail!("`{text}` is neither `max` nor a factor such as `60x`"),
        }
    }
}

type Rows = Box<dyn Iterator<Item = anyhow::Result<Map<String, Value>>>>;

/// Replays a file and waits until the broker has acknowledged every message.
pub(crate) async fn replay(arguments: ReplayArguments) -> anyhow::Result<()> {
    let file_bytes =
        std::fs::metadata(&arguments.file).with_context(|| format!("open {}", arguments.file.display()))?.len();
    let bar = ProgressBar::new(file_bytes);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {percent}%  {msg}  {elapsed}, {eta} to go")?);
    let rows = open(&arguments.file, &bar)?;
    let mut publisher = Publisher::connect(&arguments.mqtt, &format!("weir-replay-{}", std::process::id()));
    let mut pace = None;
    let started = Instant::now();
    let mut sent = 0_u64;
    for row in rows.take(arguments.rows.map_or(usize::MAX, |rows| rows as usize)) {
        let row = row?;
        if let Speed::Factor(factor) = arguments.speed {
            wait_for_turn(&row, &arguments.time, factor, &mut pace).await?;
        }
        let topic = fill(&arguments.topic, &row)?;
        publisher.publish(topic, serde_json::to_vec(&row)?).await?;
        sent += 1;
        if sent.is_multiple_of(1_000) {
            bar.set_message(format!("{sent} messages"));
        }
    }
    let acknowledged = publisher.finish().await?;
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    eprintln!(
        "{acknowledged} messages acknowledged by the broker in {seconds:.1} s ({:.0}/s)",
        acknowledged as f64 / seconds
    );
    Ok(())
}

fn open(path: &Path, bar: &ProgressBar) -> anyhow::Result<Rows> {
    let file = bar.wrap_read(File::open(path).with_context(|| format!("open {}", path.display()))?);
    let gzipped = path.extension().is_some_and(|extension| extension == "gz");
    let reader: Box<dyn Read> = if gzipped { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().trim_end_matches(".gz");
    if name.ends_with(".csv") {
        csv_rows(reader)
    } else if name.ends_with(".ndjson") || name.ends_with(".jsonl") {
        Ok(Box::new(
            BufReader::new(reader).lines().map(|line| {
                serde_json::from_str(&line.context("read a line")?).context("read a line as a JSON object")
            }),
        ))
    } else {
        bail!("{}: the name must end in .csv, .ndjson or .jsonl, with .gz or not", path.display())
    }
}

fn csv_rows(reader: Box<dyn Read>) -> anyhow::Result<Rows> {
    let mut reader = csv::Reader::from_reader(reader);
    let header = reader.headers().context("read the header of the CSV")?.clone();
    Ok(Box::new(reader.into_records().map(move |record| {
        let record = record.context("read a row of the CSV")?;
        Ok(header.iter().zip(record.iter()).map(|(name, text)| (name.to_owned(), csv_value(text))).collect())
    })))
}

/// A number when the text is one as JSON writes it; null when it is empty; otherwise text.
fn csv_value(text: &str) -> Value {
    match text {
        "" => Value::Null,
        text => match serde_json::from_str(text) {
            Ok(Value::Number(number)) => Value::Number(number),
            _ => Value::String(text.to_owned()),
        },
    }
}

fn fill(template: &str, row: &Map<String, Value>) -> anyhow::Result<String> {
    let mut topic = String::with_capacity(template.len() + 16);
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('{') {
        let (column, after) = after.split_once('}').ok_or_else(|| anyhow!("`{template}`: a {{ without }}"))?;
        topic.push_str(before);
        match row.get(column) {
            Some(Value::String(text)) => topic.push_str(text),
            Some(value) => topic.push_str(&value.to_string()),
            None => bail!("the topic names the column `{column}`, the file has {:?}", row.keys().collect::<Vec<_>>()),
        }
        rest = after;
    }
    topic.push_str(rest);
    Ok(topic)
}

async fn wait_for_turn(
    row: &Map<String, Value>,
    column: &str,
    factor: f64,
    pace: &mut Option<(Instant, f64)>,
) -> anyhow::Result<()> {
    let time = row.get(column).ok_or_else(|| anyhow!("no column `{column}`: name the row's time with --time"))?;
    let seconds = seconds_of(time).ok_or_else(|| anyhow!("`{time}` in `{column}` is no time"))?;
    let (started, first) = *pace.get_or_insert((Instant::now(), seconds));
    let due = started + Duration::from_secs_f64(((seconds - first) / factor).max(0.0));
    tokio::time::sleep_until(due.into()).await;
    Ok(())
}

/// Seconds since 1970 of a row's time: a number of seconds, or a date and time, its zone ignored (only distances count).
fn seconds_of(time: &Value) -> Option<f64> {
    let text = match time {
        Value::Number(number) => return number.as_f64(),
        Value::String(text) => text,
        _ => return None,
    };
    ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f"]
        .iter()
        .find_map(|format| chrono::NaiveDateTime::parse_and_remainder(text, format).ok())
        .map(|(time, _)| time.and_utc().timestamp_micros() as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Map<String, Value> {
        [("id", csv_value("7")), ("name", csv_value("a b")), ("none", csv_value(""))]
            .map(|(name, value)| (name.to_owned(), value))
            .into_iter()
            .collect()
    }

    #[test]
    fn values_of_a_csv_keep_their_kind() {
        assert_eq!(serde_json::to_string(&row()).unwrap(), r#"{"id":7,"name":"a b","none":null}"#);
        assert_eq!(csv_value("007"), Value::String("007".into()));
        assert_eq!(csv_value("true"), Value::String("true".into()));
    }

    #[test]
    fn the_topic_takes_values_of_the_row() {
        assert_eq!(fill("city/{id}/x", &row()).unwrap(), "city/7/x");
        assert!(fill("city/{nope}", &row()).unwrap_err().to_string().contains("nope"));
        assert!(fill("city/{id", &row()).is_err());
    }

    #[test]
    fn distances_of_times_are_read() {
        let at = |text: &str| seconds_of(&Value::String(text.into())).unwrap();
        assert_eq!(at("2014-08-01T07:55:00") - at("2014-08-01T07:50:00"), 300.0);
        assert_eq!(at("2014-08-01 07:50:00.5Z") - at("2014-08-01T07:50:00"), 0.5);
        assert!(seconds_of(&Value::Null).is_none());
    }
}
