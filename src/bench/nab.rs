//! `weir bench nab`: how good ready-made rules are, by the labelled traffic of the Numenta Anomaly Benchmark.
//!
//! A cloud gets the series as the streams `speed`, `occupancy` and `travel_time`, each file a device, with the ready-made views in
//! its `[views] directory`; then each rule runs over this history as `weir rules test` does. It says:
//!
//! - *right*: an alert that fired within a labelled window of its series, its first and last moment included; every other one
//!   is wrong, also one that began before the window and still fired in it.
//! - *precision*: right alerts of all. *Recall*: windows in which the rule fired at least once, of all of the series on its
//!   stream. *F1*: their harmonic mean. Without alerts there is no precision, and F1 is 0 when none was right.
//!
//! `shipped` is the rule as it stands in its file. `held_out` says how good such a rule is on a road that it was not fitted to: for
//! each series all numbers in `when` and `until` are multiplied by the one factor of [`FACTORS`] that gives the best F1 on the
//! *other* series of the stream, and the rule so made is counted on this one. A rule of a stream with one series has none.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::Common;
use super::parts::{Cloud, Directory, PATIENCE, POLL, TOKEN, free_port};
use crate::sql;

const LABELS: &str = "combined_windows.json";
const FACTORS: [f64; 11] = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0];
/// Windows that the last row of a stream leaves open: two hours of them, a quarter of an hour apart.
const OPEN_WINDOWS: u64 = 8;
const QUIET: Duration = Duration::from_secs(2);
/// Beginnings of file names, and the streams of these files.
const STREAMS: [(&str, &str); 3] = [("TravelTime_", "travel_time"), ("occupancy_", "occupancy"), ("speed_", "speed")];

/// Options of `weir bench nab`.
#[derive(Debug, clap::Args)]
pub(crate) struct NabBench {
    /// Directory of the CSV files of realTraffic, and combined_windows.json
    #[arg(long)]
    data: PathBuf,
    #[arg(long, default_value = "configs/rules/traffic.toml")]
    rules: PathBuf,
    /// Directory of views that the rules are about
    #[arg(long, default_value = "configs/views")]
    views: PathBuf,
    #[command(flatten)]
    common: Common,
}

/// One file.
#[derive(Debug)]
struct Series {
    name: String,
    stream: &'static str,
    rows: usize,
    /// Labelled, µs; both ends belong to it.
    windows: Vec<(i64, i64)>,
}

/// What came of a rule on some series.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Score {
    alerts: usize,
    right: usize,
    windows: usize,
    found: usize,
}

impl Score {
    fn of(fired: &[i64], windows: &[(i64, i64)]) -> Self {
        let within = |at: i64, (from, to): &(i64, i64)| (*from..=*to).contains(&at);
        Self {
            alerts: fired.len(),
            right: fired.iter().filter(|at| windows.iter().any(|window| within(**at, window))).count(),
            windows: windows.len(),
            found: windows.iter().filter(|window| fired.iter().any(|at| within(*at, window))).count(),
        }
    }

    fn and(self, other: Self) -> Self {
        Self {
            alerts: self.alerts + other.alerts,
            right: self.right + other.right,
            windows: self.windows + other.windows,
            found: self.found + other.found,
        }
    }

    fn precision(self) -> Option<f64> {
        (self.alerts > 0).then(|| self.right as f64 / self.alerts as f64)
    }

    fn recall(self) -> Option<f64> {
        (self.windows > 0).then(|| self.found as f64 / self.windows as f64)
    }

    fn f1(self) -> f64 {
        match (self.precision(), self.recall()) {
            (Some(precision), Some(recall)) if precision + recall > 0.0 => {
                2.0 * precision * recall / (precision + recall)
            }
            _ => 0.0,
        }
    }

    fn shown(self) -> Value {
        let round = |share: f64| (share * 1_000.0).round() / 1_000.0;
        json!({
            "alerts": self.alerts,
            "right": self.right,
            "windows": self.windows,
            "windows_found": self.found,
            "precision": self.precision().map(round),
            "recall": self.recall().map(round),
            "f1": round(self.f1()),
        })
    }
}

/// When a rule fired, by series.
type Fired = BTreeMap<String, Vec<i64>>;

impl NabBench {
    pub(super) async fn run(self) -> anyhow::Result<Value> {
        let directory = Directory::new(&self.common)?;
        let views = self.views.canonicalize().with_context(|| format!("open {}", self.views.display()))?;
        // The series have been over for years: no edge is to be waited for.
        let settings = format!("[commit]\nmax_age = \"10s\"\n[views]\ndirectory = {:?}\n", views.display().to_string());
        let cloud = Cloud::start_with(&directory.0, free_port()?, &settings).await?;
        let mut all = Vec::new();
        for (file, windows) in labels(&self.data)? {
            all.push(load(&cloud, &self.data, &file, windows).await?);
        }
        let views = settled(&cloud).await?;
        let text = std::fs::read_to_string(&self.rules).with_context(|| format!("read {}", self.rules.display()))?;
        let file: toml::Table = text.parse().with_context(|| format!("read {}", self.rules.display()))?;
        let mut rules = serde_json::Map::new();
        for rule in file.get("rule").and_then(toml::Value::as_array).context("a file of [[rule]]")? {
            let rule = rule.as_table().context("[[rule]] is a table")?;
            let name = rule.get("name").and_then(toml::Value::as_str).context("a rule has a name")?;
            rules.insert(name.to_owned(), judge(&cloud, rule, &all).await?);
        }
        let series =
            all.iter().map(|series| (series.name.clone(), json!(series.rows))).collect::<serde_json::Map<_, _>>();
        Ok(json!({ "rows": series, "views": views, "rules": rules }))
    }
}

/// Files with their labelled windows.
fn labels(data: &Path) -> anyhow::Result<BTreeMap<String, Vec<(i64, i64)>>> {
    let path = data.join(LABELS);
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let labels: BTreeMap<String, Vec<(String, String)>> =
        serde_json::from_str(&text).with_context(|| format!("read {}", path.display()))?;
    let read = |(file, windows): (String, Vec<(String, String)>)| {
        let file = file.rsplit('/').next().unwrap_or_default().to_owned();
        let windows = windows.iter().map(|(from, to)| Ok((micros(from)?, micros(to)?)));
        Ok((file, windows.collect::<anyhow::Result<Vec<_>>>()?))
    };
    labels.into_iter().map(read).collect()
}

fn micros(text: &str) -> anyhow::Result<i64> {
    let time = chrono::NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S%.f");
    Ok(time.with_context(|| format!("read the time `{text}`"))?.and_utc().timestamp_micros())
}

/// Sends a file as line protocol; its name is the device.
async fn load(cloud: &Cloud, data: &Path, file: &str, windows: Vec<(i64, i64)>) -> anyhow::Result<Series> {
    let stream = STREAMS.iter().find(|(begin, _)| file.starts_with(begin)).map(|(_, stream)| *stream);
    let stream = stream.with_context(|| format!("{file} is of none of the streams"))?;
    let name = file.trim_end_matches(".csv").to_owned();
    let mut reader = csv::Reader::from_path(data.join(file)).with_context(|| format!("open {file}"))?;
    let (mut lines, mut rows) = (String::new(), 0);
    for record in reader.records() {
        let record = record.with_context(|| format!("read {file}"))?;
        let (ts, value) = (micros(&record[0])?, record[1].parse::<f64>().with_context(|| format!("read {file}"))?);
        lines.push_str(&format!("{stream},device={name} value={value:?} {ts}\n"));
        rows += 1;
    }
    let url = format!("{}/api/v2/write?precision=us", cloud.http);
    let answer = reqwest::Client::new().post(url).bearer_auth(TOKEN).body(lines).send().await?;
    ensure!(answer.status().is_success(), "{file}: {}", answer.text().await?);
    Ok(Series { name, stream, rows, windows })
}

/// Waits until every view has told what has closed, and says nothing new for a while; how many rows each has told.
async fn settled(cloud: &Cloud) -> anyhow::Result<Value> {
    const VIEWS: &str =
        "SELECT name, state, reason, dirty_windows, backfill_to, rows_out FROM system.views ORDER BY name";
    let (begun, mut quiet_since, mut before) = (Instant::now(), Instant::now(), Vec::new());
    loop {
        let views = sql::rows(&cloud.http, VIEWS).await?;
        let is_done = |view: &serde_json::Map<String, Value>| {
            let open = view["dirty_windows"].as_u64().is_some_and(|dirty| dirty <= OPEN_WINDOWS);
            view["state"] == "running" && view["backfill_to"].is_null() && view["rows_out"] != 0 && open
        };
        if views != before || !views.iter().all(is_done) {
            quiet_since = Instant::now();
        }
        if quiet_since.elapsed() >= QUIET {
            let told = views
                .iter()
                .map(|view| (view["name"].as_str().unwrap_or_default().to_owned(), view["rows_out"].clone()));
            return Ok(told.collect::<serde_json::Map<_, _>>().into());
        }
        ensure!(begun.elapsed() < PATIENCE, "the views do not settle: {views:?}");
        before = views;
        tokio::time::sleep(POLL).await;
    }
}

/// A rule over all series that it is about.
async fn judge(cloud: &Cloud, rule: &toml::Table, all: &[Series]) -> anyhow::Result<Value> {
    let on = rule.get("on").and_then(toml::Value::as_str).unwrap_or_default();
    // A view has the name of its stream and a little more.
    let of: Vec<&Series> =
        all.iter().filter(|series| on == series.stream || on.starts_with(&format!("{}_", series.stream))).collect();
    let Some(fired) = fired(cloud, rule).await? else {
        return Ok(json!({ "not_tried": "it does not look at one row at a time" }));
    };
    ensure!(!of.is_empty(), "no series is of `{on}`");
    let score = |fired: &Fired, series: &Series| {
        Score::of(fired.get(&series.name).map(Vec::as_slice).unwrap_or_default(), &series.windows)
    };
    let shipped = of.iter().fold(Score::default(), |sum, series| sum.and(score(&fired, series)));
    let mut fitted = Vec::new();
    for factor in FACTORS {
        fitted.push((factor, self::fired(cloud, &scaled(rule, factor)).await?.unwrap_or_default()));
    }
    let (mut held_out, mut chosen) = (Score::default(), serde_json::Map::new());
    for series in of.iter().filter(|_| of.len() > 1) {
        let elsewhere = |fired: &Fired| {
            let others = of.iter().filter(|other| other.name != series.name);
            others.fold(Score::default(), |sum, other| sum.and(score(fired, other))).f1()
        };
        // Of equally good ones that which is nearest to the rule as it is.
        let best = fitted.iter().min_by(|one, other| {
            let far = |factor: f64| factor.ln().abs();
            elsewhere(&other.1).total_cmp(&elsewhere(&one.1)).then(far(one.0).total_cmp(&far(other.0)))
        });
        let (factor, fired) = best.context("there are factors")?;
        held_out = held_out.and(score(fired, series));
        chosen.insert(series.name.clone(), json!(factor));
    }
    Ok(
        json!({ "on": on, "series": of.len(), "shipped": shipped.shown(), "held_out": held_out.shown(), "factors": chosen }),
    )
}

/// When it fires; None when it cannot be tried over history.
async fn fired(cloud: &Cloud, rule: &toml::Table) -> anyhow::Result<Option<Fired>> {
    if rule.contains_key("absent") {
        return Ok(None);
    }
    let file = toml::Table::from_iter([("rule".to_owned(), toml::Value::Array(vec![rule.clone().into()]))]);
    let url = format!("{}/v1/rules/test?from=2000-01-01&to=2100-01-01", cloud.http);
    let answer = reqwest::Client::new().post(url).body(toml::to_string(&file)?).send().await?;
    let (status, text) = (answer.status(), answer.text().await?);
    ensure!(status.is_success(), "{text}");
    let found: Value = serde_json::from_str(&text)?;
    if let Some(error) = found[0]["error"].as_str() {
        bail!("{error}");
    }
    let found = &found[0]["found"];
    let mut fired = Fired::new();
    let alerts = found["alerts"].as_array().context("alerts of the trial")?;
    ensure!(found["fired"] == json!(alerts.len()) && found["rows"] != 0, "not all is shown: {}", found["fired"]);
    for alert in alerts {
        let device = alert["labels"]["device"].as_str().context("an alert has a device")?;
        fired.entry(device.to_owned()).or_default().push(alert["fired"].as_i64().context("an alert has a time")?);
    }
    Ok(Some(fired))
}

/// The rule with all numbers in its conditions multiplied.
fn scaled(rule: &toml::Table, factor: f64) -> toml::Table {
    let mut rule = rule.clone();
    for key in ["when", "until"] {
        if let Some(toml::Value::String(text)) = rule.get_mut(key) {
            *text = scaled_text(text, factor);
        }
    }
    rule
}

fn scaled_text(text: &str, factor: f64) -> String {
    let is_word = |letter: char| letter.is_alphanumeric() || matches!(letter, '_' | '.');
    let mut scaled = String::with_capacity(text.len() + 8);
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let end = rest.find(|letter| is_word(letter) != is_word(first)).unwrap_or(rest.len());
        let (word, behind) = rest.split_at(end);
        match word.parse::<f64>() {
            Ok(number) if word.starts_with(|letter: char| letter.is_ascii_digit()) => {
                scaled.push_str(&format!("{}", number * factor));
            }
            _ => scaled.push_str(word),
        }
        rest = behind;
    }
    scaled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_condition_are_scaled_and_names_are_not() {
        assert_eq!(scaled_text("value < 30", 0.5), "value < 15");
        assert_eq!(scaled_text("latest<0.5*mean_2 AND n >= 4", 2.0), "latest<1*mean_2 AND n >= 8");
        assert_eq!(scaled_text("", 2.0), "");
    }

    #[test]
    fn an_alert_is_right_when_it_fires_within_a_window() {
        let windows = [(10, 20), (30, 40), (50, 60)];
        let score = Score::of(&[10, 15, 25, 40], &windows);
        assert_eq!(score, Score { alerts: 4, right: 3, windows: 3, found: 2 });
        assert_eq!((score.precision(), score.recall()), (Some(0.75), Some(2.0 / 3.0)));
        assert!((score.f1() - 12.0 / 17.0).abs() < 1e-12);
        let nothing = Score::of(&[], &windows);
        assert_eq!((nothing.precision(), nothing.recall(), nothing.f1()), (None, Some(0.0), 0.0));
    }
}
