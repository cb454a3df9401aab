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
        let directory = std::env::temp_dir().join(format!("weir-alerts-{:032x}", rand::random::<u128>()));
        Self::over(city, directory)
    }

    fn over(city: Arc<City>, directory: PathBuf) -> Self {
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
            directory: None,
            horizon: Duration::from_secs(3_600),
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
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_that_would_feed_itself_through_views_is_refused() {
    let node = Node::start();
    let views = Caller::node().with_rights(Arc::new([Right::Views]));
    for create in [
        "CREATE MATERIALIZED VIEW a AS SELECT ts, rule, sequence FROM alert_log",
        "CREATE MATERIALIZED VIEW b AS SELECT ts, rule, sequence FROM a",
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
