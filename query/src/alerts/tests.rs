//! The task of alerts over tables in memory: what is put in whole, what is judged, and what is shown.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use arrow_array::RecordBatch;
use async_trait::async_trait;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use wire::schema::own;
use wire::{FieldType, StreamField, StreamName, StreamSchema};

use super::rule::caller;
use super::*;
use crate::caller::{Caller, Right};
use crate::clock::now_us;
use crate::engine::EngineSettings;
use crate::lanes::LaneSettings;
use crate::sink::SinkError;
use crate::views::ViewSettings;
use crate::views::tests::city::{self, City, Row};

mod alertmanager;
mod doors;
mod late;

const S: i64 = 1_000_000;
const PATIENCE: Duration = Duration::from_secs(60);
const HIGH: &str = "sql = \"SELECT device, road, speed FROM traffic WHERE speed > 100\"\n";

/// Appends to the city's tables, when the gate is open.
#[derive(Debug)]
struct Gate {
    city: city::Handle,
    open: watch::Sender<bool>,
    waiting: AtomicUsize,
}

#[async_trait]
impl Sink for Gate {
    async fn append(
        &self,
        stream: &StreamName,
        schema: &Arc<StreamSchema>,
        rows: RecordBatch,
    ) -> Result<(), SinkError> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.open.subscribe().wait_for(|open| *open).await.unwrap();
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        self.city.append(stream, schema, rows).await
    }
}

/// A node with alerts, its tables in memory.
struct Node {
    city: Arc<City>,
    gate: Arc<Gate>,
    engine: Arc<Engine>,
    alerts: Arc<Alerts>,
    token: CancellationToken,
    directory: PathBuf,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.token.cancel();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn name(text: &str) -> StreamName {
    text.parse().unwrap()
}

impl Node {
    fn start() -> Self {
        let city = City::new();
        let field = |name: &str, kind| StreamField { name: name.parse().unwrap(), kind };
        city.create(&name("traffic"), vec![field("speed", FieldType::Float64), field("road", FieldType::Text)]);
        city.create(&name(own::ALERT_LOG), own::alert_log().fields().to_vec());
        city.create(&name(own::ALERT_DELIVERIES), own::alert_deliveries().fields().to_vec());
        city.create(&name(own::LINK_LOG), own::link_log().fields().to_vec());
        let directory = std::env::temp_dir().join(format!("weir-alerts-{:032x}", rand::random::<u128>()));
        Self::over(city, directory)
    }

    fn over(city: Arc<City>, directory: PathBuf) -> Self {
        Self::with(city, directory, None)
    }

    /// Another one over the same tables, when the task of this one has ended.
    async fn restarted(mut self) -> Self {
        let (city, directory) = (Arc::clone(&self.city), std::mem::take(&mut self.directory));
        self.token.cancel();
        until("the task ends", || self.alerts.commands.is_closed()).await;
        city.restart();
        Self::over(city, directory)
    }

    fn with(city: Arc<City>, directory: PathBuf, rules: Option<PathBuf>) -> Self {
        let handle = city::Handle(Arc::clone(&city));
        let lanes = vec![LaneSettings { threads: 1, running: 8, ..LaneSettings::default() }];
        let settings = EngineSettings { lanes, ..EngineSettings::default() };
        let engine = Arc::new(Engine::new(Arc::new(handle.clone()), settings).unwrap());
        let gate = Arc::new(Gate { city: handle, open: watch::Sender::new(true), waiting: AtomicUsize::new(0) });
        let token = CancellationToken::new();
        let views = ViewSettings::in_directory(&directory.join("views"));
        engine.keep_views(Arc::clone(&gate) as _, views, token.clone()).unwrap();
        let settings = AlertSettings {
            data_dir: directory.clone(),
            directory: rules,
            horizon: Duration::from_secs(3_600),
            late_max: Duration::from_secs(86_400),
            late_rows_max: 20_000,
            stale_after: Duration::from_secs(3_600),
            devices_max: 1_000,
            subscribers_max: 100,
            targets: Vec::new(),
        };
        std::fs::create_dir_all(&directory).unwrap();
        let alerts = Alerts::start(Arc::clone(&engine), Arc::clone(&gate) as _, settings, token.clone()).unwrap();
        Self { city, gate, engine, alerts, token, directory }
    }

    /// Rows of `traffic`: seconds from now, device, road and speed.
    fn arrive(&self, rows: &[(i64, &str, &str, f64)]) {
        let now = now_us();
        let row = |(at, device, road, speed): &(i64, &str, &str, f64)| Row {
            ts: now + at * S,
            device: (*device).to_owned(),
            value: Some(*speed),
            text: Some((*road).to_owned()),
        };
        self.city.arrive(&name("traffic"), 1, &rows.iter().map(row).collect::<Vec<_>>(), None, now);
    }

    async fn texts(&self, sql: &str) -> Vec<String> {
        let rows = self.engine.rows_as(&caller(), sql, usize::MAX).await.unwrap();
        let text = |batch: &RecordBatch, row: usize| {
            let options = arrow_cast::display::FormatOptions::default();
            let value =
                |column| arrow_cast::display::ArrayFormatter::try_new(column, &options).unwrap().value(row).to_string();
            batch.columns().iter().map(|column| value(column)).collect::<Vec<_>>().join(" ")
        };
        rows.iter().flat_map(|batch| (0..batch.num_rows()).map(|row| text(batch, row)).collect::<Vec<_>>()).collect()
    }

    /// Waits until the record says this of alerts.
    async fn until_recorded(&self, sql: &str, expected: &[&str]) {
        let begun = Instant::now();
        loop {
            let found = self.texts(sql).await;
            if found == expected {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{found:#?}\nand not {expected:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn everything() -> Page {
    Page { after: None, limit: OPEN_MAX }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_a_rule_is_whole_though_its_caller_goes_away() {
    let node = Node::start();
    node.alerts.put("a", HIGH).await.unwrap();
    let file = |rule: &str| node.directory.join("rules").join(format!("{rule}.toml")).exists();
    let runs = |rule: &str| node.alerts.rules().iter().any(|status| status.name == rule);
    for put in [true, false] {
        // The task waits for the sink, and everything that it is asked waits for the task.
        node.gate.open.send_replace(false);
        node.arrive(&[(0, "d", if put { "put" } else { "delete" }, 200.0)]);
        until("the task waits", || node.gate.waiting.load(Ordering::SeqCst) > 0).await;
        let asking: Vec<_> = (0..2 * COMMANDS_MAX)
            .map(|_| {
                let alerts = Arc::clone(&node.alerts);
                tokio::spawn(async move { alerts.open(everything()).await })
            })
            .collect();
        until("the queue is full", || node.alerts.commands.capacity() == 0).await;
        let mut change: std::pin::Pin<Box<dyn Future<Output = ()> + Send>> = if put {
            let alerts = Arc::clone(&node.alerts);
            Box::pin(async move { drop(alerts.put("b", HIGH).await) })
        } else {
            let alerts = Arc::clone(&node.alerts);
            Box::pin(async move { drop(alerts.delete("b").await) })
        };
        let begun = Instant::now();
        while file("b") != put {
            assert!(begun.elapsed() < PATIENCE);
            tokio::select! {
                () = &mut change => panic!("nobody takes it yet"),
                () = tokio::time::sleep(Duration::from_millis(5)) => {}
            }
        }
        drop(change);
        node.gate.open.send_replace(true);
        until("file and task agree", || runs("b") == put).await;
        for asked in asking {
            asked.await.unwrap().unwrap();
        }
        // What is asked next comes behind the change: that was answered.
        node.alerts.open(everything()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_that_would_feed_itself_through_views_is_refused() {
    let node = Node::start();
    let views = Caller::node().with_rights(Arc::new([Right::Views]));
    for create in [
        "CREATE MATERIALIZED VIEW a AS SELECT ts, rule, sequence FROM alert_log",
        "CREATE MATERIALIZED VIEW b AS SELECT ts, rule, sequence FROM a",
        "CREATE MATERIALIZED VIEW l AS SELECT ts, link FROM link_log",
        "CREATE MATERIALIZED VIEW c AS SELECT ts, device, speed FROM traffic",
    ] {
        let begun = Instant::now();
        loop {
            let running = node.engine.begin(&views, &node.engine.enter(&views).await.unwrap(), create);
            let made = async {
                let prepared = node.engine.prepare(&running, create, None).await?;
                node.engine.execute(&running, &prepared, None).await.map(drop)
            };
            match made.await {
                Ok(()) => break,
                // The one below is not planned yet.
                Err(error) => assert!(begun.elapsed() < PATIENCE, "{create}: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    node.arrive(&[(0, "d", "r", 1.0)]);
    let check = async |text: &str| loop {
        let settings = RuleSettings::parse("r", text).unwrap();
        match Rule::compile(&node.engine, settings).await {
            Ok(_) => return "runs".to_owned(),
            Err(RuleError::Refused(reason)) => return reason,
            // Until the views are planned.
            Err(RuleError::Waits(_) | RuleError::Busy(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    let check = async |text: &str| tokio::time::timeout(PATIENCE, check(text)).await.expect("it is understood");
    for (text, through) in [
        ("sql = \"SELECT rule FROM alert_log\"", ""),
        ("sql = \"SELECT rule, count(*) AS n FROM alert_log GROUP BY rule\"", ""),
        ("sql = \"SELECT rule FROM latest('alert_log')\"", ""),
        ("sql = \"SELECT rule FROM system.alerts\"", ""),
        ("on = \"link_log\"\nwhen = \"outcome = 'timed_out'\"", "what links do"),
        ("sql = \"SELECT link FROM latest('link_log')\"", "what links do"),
        ("sql = \"SELECT name FROM system.links WHERE told > 3\"", "what links do"),
        ("sql = \"SELECT link, count(*) AS n FROM l GROUP BY link\"", "the view l"),
        ("on = \"alert_log\"\nabsent = \"1m\"", ""),
        ("on = \"b_changes\"\nabsent = \"1m\"", "the view b, the view a"),
        ("sql = \"SELECT rule FROM a\"", "the view a"),
        ("sql = \"SELECT rule FROM b WHERE sequence > 3\"", "the view b, the view a"),
        ("sql = \"SELECT device FROM traffic WHERE device IN (SELECT rule FROM b)\"", "the view b, the view a"),
        ("on = \"b_changes\"\nwhen = \"sequence > 3\"", "the view b, the view a"),
    ] {
        let reason = check(text).await;
        assert!(reason.contains("would feed itself") && reason.contains(through), "{text}: {reason}");
    }
    assert_eq!(check("sql = \"SELECT device FROM c WHERE speed > 3\"").await, "runs");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_open_is_shown_in_pages_and_nothing_of_it_is_left_out() {
    let node = Node::start();
    let severity = "CASE WHEN speed > 200 THEN 'critical' ELSE 'info' END AS severity";
    let rule = format!("sql = \"SELECT device, {severity} FROM traffic WHERE speed > 100\"");
    node.alerts.put("high", &rule).await.unwrap();
    let devices: Vec<String> = (0..25).map(|device| format!("d{device}")).collect();
    let rows =
        devices.iter().enumerate().map(|(n, device)| (0, device.as_str(), "r", if n % 3 == 0 { 300.0 } else { 150.0 }));
    node.arrive(&rows.collect::<Vec<_>>());
    let begun = Instant::now();
    while node.alerts.open(everything()).await.unwrap().alerts.len() < 25 {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut page = Page { after: None, limit: 4 };
    let (mut shown, mut sizes) = (Vec::new(), Vec::new());
    loop {
        let opened = node.alerts.open(page.clone()).await.unwrap();
        sizes.push(opened.alerts.len());
        shown.extend(opened.alerts);
        let Some(next) = opened.next else { break };
        page.after = Some(Page::place(&next).unwrap());
    }
    assert_eq!(sizes, [4, 4, 4, 4, 4, 4, 1]);
    let whole = node.alerts.open(everything()).await.unwrap();
    assert_eq!((shown, None), (whole.alerts.clone(), whole.next));
    let found: BTreeSet<_> = whole.alerts.iter().map(|alert| alert["device"].as_str().unwrap().to_owned()).collect();
    assert_eq!(found, devices.into_iter().collect());
    let severities: Vec<_> = whole.alerts.iter().map(|alert| alert["severity"].as_str().unwrap()).collect();
    assert!(severities.is_sorted() && severities[0] == "critical", "the worst first: {severities:?}");
    assert!(Page::place("nonsense").is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_that_catches_up_reads_the_stream_a_few_times() {
    let node = Node::start();
    node.alerts.put("high", HIGH).await.unwrap();
    for round in 0..8_i64 {
        let devices: Vec<String> = (0..200).map(|device| format!("d{device}")).collect();
        let speed = if round % 2 == 0 { 200.0 } else { 1.0 };
        node.arrive(&devices.iter().map(|device| (round - 100, device.as_str(), "a", speed)).collect::<Vec<_>>());
    }
    node.until_recorded("SELECT count(*) FROM alert_log WHERE told", &["1600"]).await;
    let node = node.restarted().await;
    let hub = Arc::clone(node.alerts.hub());
    wait_for_hub(&hub, &node.token).await.unwrap();
    let expected: Vec<i64> = {
        let texts = node.texts("SELECT sequence FROM alert_log WHERE told ORDER BY sequence").await;
        texts.iter().map(|text| text.parse().unwrap()).collect()
    };
    // Everyone stands somewhere else, and takes a little at a time.
    let crowd: Vec<_> = (0..100_usize)
        .map(|one| {
            let (hub, after) = (Arc::clone(&hub), if one % 2 == 0 { 0 } else { expected[one] });
            tokio::spawn(async move {
                let (mut at, mut got) = (after, Vec::new());
                loop {
                    let page = hub.after(at, 64).await.unwrap();
                    let Some(last) = page.last() else { return (after, got) };
                    at = last.sequence;
                    got.extend(page.iter().map(|told| told.sequence));
                }
            })
        })
        .collect();
    for one in crowd {
        let (after, got) = one.await.unwrap();
        let wanted: Vec<i64> = expected.iter().copied().filter(|sequence| *sequence > after).collect();
        assert_eq!(got, wanted);
    }
    let asked = "SELECT count(*) FROM system.queries WHERE text LIKE '%FROM alert_log WHERE told AND sequence >%'";
    let asked: usize = node.texts(asked).await[0].parse().unwrap();
    assert!(asked <= 10, "{asked} times");
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_device_calls_itself_its_topic_is_one() {
    let node = Node::start();
    node.alerts.put("high", &format!("{HIGH}topic = \"alerts/{{device}}/high\"")).await.unwrap();
    let long = ["x".repeat(65_536), format!("{}y", "x".repeat(65_535))];
    let names =
        ["+", "#", "a/b", "$SYS", "\u{0}\u{7}\n", "", "a b", "ä", "'; DROP TABLE x", "{{ device }}", "{device}"];
    let names: Vec<&str> = names.into_iter().chain(long.iter().map(String::as_str)).collect();
    node.arrive(&names.iter().map(|name| (0, *name, "r", 200.0)).collect::<Vec<_>>());
    let all = names.len().to_string();
    node.until_recorded("SELECT count(DISTINCT alert_id) FROM alert_log WHERE told", &[&all]).await;
    let told = node.alerts.hub().after(0, 100).await.unwrap();
    assert_eq!(told.len(), names.len());
    for told in &told {
        let levels: Vec<&str> = told.topic.split('/').collect();
        assert!(levels.len() == 3 && told.topic.len() < 1_000, "{:?}", told.topic);
        assert!(!told.topic.contains(['+', '#']) && !told.topic.chars().any(char::is_control), "{:?}", told.topic);
        assert!(TopicFilter::parse("alerts/+/high").unwrap().matches(&told.topic));
        // One event is one: no value ends it, or begins another.
        let frame = std::str::from_utf8(&told.frame).unwrap();
        assert_eq!(frame.matches('\n').count(), 4, "{frame}");
        let event: serde_json::Value = serde_json::from_slice(&told.body).unwrap();
        assert_eq!(event["subject"], told.topic);
    }
}

/// Rules that are anything: every one is refused with a reason or runs, and the node answers others meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_rules_of_nonsense_are_refused_or_run() {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    const PARTS: [&str; 24] = [
        "speed",
        "> 100",
        "road",
        "device",
        "AND",
        "OR",
        "(",
        ")",
        "1e308",
        "'x'",
        "NULL",
        "IS NOT NULL",
        "/ 0",
        "count(*)",
        "random()",
        "now()",
        "\u{0}",
        "-- ",
        "CASE WHEN",
        "END",
        "latest('traffic')",
        "❄",
        "speed > 100",
        "true",
    ];
    let seed = std::env::var("WEIR_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random::<u64>);
    println!("WEIR_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut nonsense = |length: usize| -> String {
        (0..length).map(|_| PARTS[random.random_range(0..PARTS.len())]).collect::<Vec<_>>().join(" ")
    };
    let mut text = String::new();
    for rule in 0..RULES_MAX {
        let own = match rule % 5 {
            0 => serde_json::json!(format!("SELECT device FROM traffic WHERE {}", nonsense(rule % 9))),
            1 => serde_json::json!(nonsense(rule % 30)),
            2 => serde_json::json!(format!("SELECT {} FROM traffic", nonsense(1 + rule % 4))),
            3 => serde_json::json!(format!("SELECT device FROM traffic WHERE speed > {rule}")),
            _ => serde_json::json!(format!("SELECT device FROM nowhere{} WHERE {}", rule % 7, nonsense(3))),
        };
        // A JSON text is one of TOML, too.
        text.push_str(&format!("[[rule]]\nname = \"r{rule}\"\nsql = {own}\n"));
    }
    let directory = std::env::temp_dir().join(format!("weir-rules-{:032x}", rand::random::<u128>()));
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("all.toml"), text).unwrap();
    let rss_kib = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    let before = rss_kib();
    let city = City::new();
    let field = |name: &str, kind| StreamField { name: name.parse().unwrap(), kind };
    city.create(&name("traffic"), vec![field("speed", FieldType::Float64), field("road", FieldType::Text)]);
    city.create(&name(own::ALERT_LOG), own::alert_log().fields().to_vec());
    let node = Node::with(
        city,
        std::env::temp_dir().join(format!("weir-alerts-{:032x}", rand::random::<u128>())),
        Some(directory.clone()),
    );
    let (mut slowest, begun) = (Duration::ZERO, Instant::now());
    while node.alerts.rules().len() < RULES_MAX {
        let asked = Instant::now();
        assert_eq!(node.texts("SELECT 1").await, ["1"]);
        slowest = slowest.max(asked.elapsed());
        assert!(begun.elapsed() < 5 * PATIENCE, "{} rules are read", node.alerts.rules().len());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("{RULES_MAX} rules in {:?}; the slowest answer meanwhile: {slowest:?}", begun.elapsed());
    assert!(slowest < Duration::from_secs(10), "{slowest:?}");
    // They begin with what comes next.
    let marked = "SELECT count(*) > 0 FROM alert_log WHERE transition = 'position'";
    node.until_recorded(marked, &["true"]).await;
    // Those that make sense find their rows.
    node.arrive(&[(0, "d", "r", 99.5)]);
    let expected: usize = (0..RULES_MAX).filter(|rule| rule % 5 == 3 && *rule < 100).count();
    let found =
        "SELECT count(*) FROM alert_log WHERE transition = 'firing' AND CAST(substr(rule, 2) AS BIGINT) % 5 = 3";
    node.until_recorded(found, &[&expected.to_string()]).await;
    for status in node.alerts.rules() {
        let is_told = status.state == "runs" || status.reason.as_ref().is_some_and(|reason| !reason.is_empty());
        assert!(is_told, "{status:?}");
    }
    let grown_mib = rss_kib().saturating_sub(before) >> 10;
    println!("{grown_mib} MiB more");
    assert!(grown_mib < 1_024, "{grown_mib} MiB more");
    std::fs::remove_dir_all(&directory).unwrap();
}
