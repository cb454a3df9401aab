//! Views as people make them: by statement, over each other and over reference tables, kept on disk.

use std::time::{Duration, Instant, SystemTime};

use futures::TryStreamExt;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::caller::{Caller, Door, Right};
use crate::engine::QueryError;
use crate::views::ViewSettings;

const PATIENCE: Duration = Duration::from_secs(60);

fn caller(may: bool) -> Caller {
    let rights: Arc<[Right]> = if may { Arc::new([Right::Views]) } else { Arc::new([]) };
    Caller::new("somebody", Door::Http, None, Arc::new([])).with_rights(rights)
}

async fn ask(engine: &Engine, caller: &Caller, sql: &str) -> Result<Vec<RecordBatch>, QueryError> {
    let running = engine.begin(caller, &engine.enter(caller).await?, sql);
    let prepared = engine.prepare(&running, sql, None).await?;
    let rows = engine.execute(&running, &prepared, None).await?;
    rows.try_collect().await.map_err(|error| engine.explain(error))
}

/// Waits until both give the same rows, and some.
async fn equal(city: &City, engine: &Engine, shown: &str, asked: &str) {
    let mut changed = city.changes();
    let began = Instant::now();
    loop {
        let view = ask(engine, &caller(false), shown).await.map(|rows| texts(&rows)).unwrap_or_default();
        let question = texts(&ask(engine, &caller(false), asked).await.unwrap());
        if view == question && !view.is_empty() {
            return;
        }
        if began.elapsed() > PATIENCE {
            let told = texts(&ask(engine, &caller(false), "SELECT * FROM system.views").await.unwrap());
            panic!("{shown}:\n{view:#?}\n{asked}:\n{question:#?}\n{told:#?}");
        }
        let _ = tokio::time::timeout(Duration::from_millis(100), changed.changed()).await;
    }
}

struct Stage {
    city: Arc<City>,
    engine: Arc<Engine>,
    token: CancellationToken,
    kept: std::path::PathBuf,
}

impl Stage {
    fn new() -> Self {
        let city = City::new();
        city.create(&words::stream("traffic"), words::traffic_fields());
        city.create(&words::stream("weather"), words::weather_fields());
        city.create(&words::stream("sensors_revisions"), words::revision_fields());
        let kept = std::env::temp_dir().join(format!("weir-kept-{:032x}", rand::random::<u128>()));
        Self { engine: engine(&city), city, token: CancellationToken::new(), kept }.start()
    }

    fn start(self) -> Self {
        let sink = Arc::new(city::Handle(Arc::clone(&self.city)));
        self.engine.keep_views(sink, ViewSettings::in_directory(&self.kept), self.token.clone()).unwrap();
        self
    }

    /// As after a kill -9.
    fn restart(mut self) -> Self {
        self.token.cancel();
        self.city.restart();
        (self.engine, self.token) = (engine(&self.city), CancellationToken::new());
        self.start()
    }

    /// A row of `traffic` at this minute, and time goes on to it.
    fn arrive(&self, minute: i64, device: &str, speed: f64) {
        let ts = START + minute * MINUTE;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_micros() as i64;
        let row = Row { ts, device: device.to_owned(), value: Some(speed), text: None };
        self.city.arrive(&words::stream("traffic"), 0, &[row], Some(ts), now);
    }

    async fn does(&self, sql: &str) {
        ask(&self.engine, &caller(true), sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    async fn refused(&self, who: &Caller, sql: &str, words: &str) {
        let error = ask(&self.engine, who, sql).await.expect_err(sql).to_string();
        assert!(error.contains(words), "{sql}: {error}");
    }
}

const BY_MINUTE: &str =
    "SELECT time_bucket('1 minute', ts) AS b, device, count(*) AS n, sum(speed) AS s FROM traffic GROUP BY 1, 2";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn views_are_made_followed_and_dropped_by_statement() {
    let mut stage = Stage::new();
    for minute in 0..90 {
        stage.arrive(minute, ["a", "b"][minute as usize % 2], minute as f64);
    }
    stage.city.commit(3);
    let create = |name: &str, select: &str| format!("CREATE MATERIALIZED VIEW {name} AS {select}");
    stage.refused(&caller(false), &create("v", BY_MINUTE), "rights = [\"views\"]").await;
    stage.refused(&caller(true), &create("traffic", BY_MINUTE), "a table already").await;
    stage.refused(&caller(true), &create("v", "SELECT count(*) AS n FROM traffic"), "all times").await;
    let long = format!("{BY_MINUTE} HAVING max(speed) > 0{}", " AND true".repeat(200));
    stage.refused(&caller(true), &create("v", &long), "definition_bytes").await;
    stage.does(&create("by_minute", BY_MINUTE)).await;
    stage.refused(&caller(true), &create("by_minute", BY_MINUTE), "there already").await;
    stage.does(&format!("CREATE MATERIALIZED VIEW IF NOT EXISTS by_minute AS {BY_MINUTE}")).await;
    // Over the other view.
    let by_hour = "SELECT time_bucket('1 hour', b) AS h, sum(n) AS n, sum(s) AS s FROM by_minute GROUP BY 1";
    stage.does(&create("by_hour", by_hour)).await;
    stage.does(&create("fast", "SELECT b, device FROM by_minute WHERE s > 40")).await;
    let closed = |select: &str| format!("SELECT * FROM ({select}) AS q WHERE b < TIMESTAMP '2024-01-01T03:20:00Z'");
    for minute in 90..200 {
        stage.arrive(minute, "a", 1.0);
    }
    // Late.
    stage.arrive(5, "b", 100.0);
    stage.arrive(201, "a", 0.0);
    let end = "SELECT * FROM by_minute WHERE b < TIMESTAMP '2024-01-01T03:20:00Z'";
    equal(&stage.city, &stage.engine, end, &closed(BY_MINUTE)).await;
    let hours = "SELECT time_bucket('1 hour', ts) AS h, count(*) AS n, sum(speed) AS s FROM traffic \
                 WHERE ts < TIMESTAMP '2024-01-01T03:00:00Z' GROUP BY 1";
    equal(&stage.city, &stage.engine, "SELECT * FROM by_hour", hours).await;
    equal(&stage.city, &stage.engine, "SELECT * FROM fast", "SELECT b, device FROM by_minute WHERE s > 40").await;
    stage.refused(&caller(true), "DROP MATERIALIZED VIEW by_minute", "reads by_minute: drop it first").await;
    stage.refused(&caller(true), "SELECT * FROM by_minute FOR VERSION AS OF 1", "view_revision").await;

    // All of them are there after a crash, and go on.
    stage = stage.restart();
    stage.arrive(3, "c", 7.0);
    stage.arrive(250, "a", 0.0);
    equal(&stage.city, &stage.engine, end, &closed(BY_MINUTE)).await;
    let hours = hours.replace("T03:00", "T04:00");
    equal(&stage.city, &stage.engine, "SELECT * FROM by_hour", &hours).await;
    stage.does("DROP MATERIALIZED VIEW fast").await;
    stage.does("DROP MATERIALIZED VIEW by_hour").await;
    stage.does("DROP MATERIALIZED VIEW by_minute").await;
    stage.does("DROP MATERIALIZED VIEW IF EXISTS by_minute").await;
    stage.refused(&caller(true), "DROP MATERIALIZED VIEW by_minute", "no view").await;
    stage.refused(&caller(true), &create("by_minute", "SELECT ts, device FROM traffic"), "another question").await;
    let left = ask(&stage.engine, &caller(false), "SHOW MATERIALIZED VIEWS").await.unwrap();
    assert_eq!(left.iter().map(RecordBatch::num_rows).sum::<usize>(), 0);
    std::fs::remove_dir_all(&stage.kept).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_later_revision_of_a_reference_table_changes_what_it_holds_for() {
    let stage = Stage::new();
    let revise = |device: &str, limit: f64, from_minute: Option<i64>| {
        stage.city.revise(device, limit, from_minute.map(|minute| START + minute * MINUTE));
    };
    revise("a", 50.0, Some(-1_000));
    let select = "SELECT time_bucket('10 minutes', t.ts) AS b, t.device, max(s.most) AS most, count(*) AS n \
                  FROM traffic t LEFT JOIN sensors_history s ON s.device = t.device AND t.ts >= s.valid_from \
                  AND (s.valid_to IS NULL OR t.ts < s.valid_to) GROUP BY 1, 2";
    for minute in 0..120 {
        stage.arrive(minute, ["a", "b"][minute as usize % 2], 1.0);
    }
    stage.does(&format!("CREATE MATERIALIZED VIEW limits AS {select}")).await;
    let closed = format!("SELECT * FROM ({select}) AS q WHERE b < TIMESTAMP '2024-01-01T01:50:00Z'");
    equal(&stage.city, &stage.engine, "SELECT * FROM limits", &closed).await;
    revise("a", 30.0, Some(60));
    equal(&stage.city, &stage.engine, "SELECT * FROM limits", &closed).await;
    revise("b", 80.0, None);
    equal(&stage.city, &stage.engine, "SELECT * FROM limits", &closed).await;
    let create = |select: &str| format!("CREATE MATERIALIZED VIEW v AS {select}");
    let current = "SELECT time_bucket('1 hour', t.ts) AS b, max(s.most) AS m FROM traffic t JOIN sensors s ON s.device = t.device GROUP BY 1";
    stage.refused(&caller(true), &create(current), "sensors_history by event time").await;
    let always = current.replace("sensors s", "sensors_history s");
    stage.refused(&caller(true), &create(&always), "joined by event time").await;
    let ends = select.replace("max(s.most)", "max(s.valid_to)");
    stage.refused(&caller(true), &create(&ends), "changes afterwards").await;
    let half = select.replace(" AND (s.valid_to IS NULL OR t.ts < s.valid_to)", "");
    stage.refused(&caller(true), &create(&half), "joined by event time").await;
    let _ = std::fs::remove_dir_all(&stage.kept);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_column_of_another_type_is_asked_again_or_said() {
    let stage = Stage::new();
    let traffic = words::stream("traffic");
    let arrive = |minutes: std::ops::Range<i64>| {
        for minute in minutes {
            let ts = START + minute * MINUTE;
            let text = ["7", "x"][minute as usize % 2].to_owned();
            let row = Row { ts, device: "a".to_owned(), value: Some(1.0), text: Some(text) };
            stage.city.arrive(&traffic, 0, &[row], Some(ts), 0);
        }
    };
    arrive(0..60);
    stage.city.commit(10);
    let select = "SELECT time_bucket('10 minutes', ts) AS b, count(road) AS n FROM traffic GROUP BY 1";
    stage.does(&format!("CREATE MATERIALIZED VIEW counted AS {select}")).await;
    stage.does(&format!("CREATE MATERIALIZED VIEW longest AS {}", select.replace("count", "max"))).await;
    stage.does("CREATE MATERIALIZED VIEW lacking AS SELECT ts, road IS NULL AS lacks FROM traffic").await;
    stage.does("CREATE MATERIALIZED VIEW speeds AS SELECT ts, speed FROM traffic").await;
    let closed = format!("SELECT * FROM ({select}) AS q WHERE b < TIMESTAMP '2024-01-01T00:50:00Z'");
    equal(&stage.city, &stage.engine, "SELECT * FROM counted", &closed).await;
    let longest = closed.replace("count", "max");
    equal(&stage.city, &stage.engine, "SELECT * FROM longest", &longest).await;
    equal(&stage.city, &stage.engine, "SELECT * FROM speeds", "SELECT ts, speed FROM traffic").await;
    stage.city.retype(&traffic, "road", &arrow_schema::DataType::Float64);
    equal(&stage.city, &stage.engine, "SELECT * FROM counted", &closed).await;
    arrive(60..80);
    let closed = closed.replace("T00:50", "T01:10");
    equal(&stage.city, &stage.engine, "SELECT * FROM counted", &closed).await;
    equal(&stage.city, &stage.engine, "SELECT * FROM speeds", "SELECT ts, speed FROM traffic").await;
    let reasons = "SELECT name, state, reason LIKE '%another type%', reason LIKE '%stay as they were%' FROM system.views \
                   WHERE name IN ('lacking', 'longest')";
    let said = "SELECT * FROM (VALUES ('lacking', 'failed', false, true), ('longest', 'failed', true, false)) AS q";
    equal(&stage.city, &stage.engine, reasons, said).await;
    // What it told is there.
    let before = ask(&stage.engine, &caller(false), "SELECT * FROM longest").await.unwrap();
    assert_eq!(before.iter().map(RecordBatch::num_rows).sum::<usize>(), 5);
    std::fs::remove_dir_all(&stage.kept).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_view_wakes_when_a_table_of_its_own_changes() {
    let stage = Stage::new();
    let (traffic, weather) = (words::stream("traffic"), words::stream("weather"));
    for minute in 0..3 {
        stage.arrive(minute, "a", 1.0);
    }
    stage.does("CREATE MATERIALIZED VIEW speeds AS SELECT ts, speed FROM traffic").await;
    stage.does("CREATE MATERIALIZED VIEW warm AS SELECT ts, temperature FROM weather").await;
    equal(&stage.city, &stage.engine, "SELECT * FROM speeds", "SELECT ts, speed FROM traffic").await;
    let (began, before) = (Instant::now(), stage.city.frozen(&traffic));
    let rounds = 60;
    for minute in 0..rounds {
        let row = Row { ts: START + minute * MINUTE, device: "a".to_owned(), value: Some(1.0), text: None };
        stage.city.arrive(&weather, 0, &[row], None, 0);
        equal(&stage.city, &stage.engine, "SELECT * FROM warm", "SELECT ts, temperature FROM weather").await;
    }
    // Once a second it looks all the same.
    let (looked, seconds) = (stage.city.frozen(&traffic) - before, began.elapsed().as_secs() as usize);
    assert!(
        looked <= seconds + 2,
        "it looked {looked} times in {seconds} s, while another table changed {rounds} times"
    );
    stage.arrive(5, "a", 1.0);
    equal(&stage.city, &stage.engine, "SELECT * FROM speeds", "SELECT ts, speed FROM traffic").await;
    std::fs::remove_dir_all(&stage.kept).unwrap();
}

#[tokio::test]
async fn a_directory_of_views_that_is_not_there_is_an_error() {
    let city = City::new();
    let missing = std::env::temp_dir().join("weir-no-such-directory");
    let settings = ViewSettings { directory: Some(missing.clone()), ..ViewSettings::in_directory(&missing) };
    let sink = Arc::new(city::Handle(Arc::clone(&city)));
    let error = engine(&city).keep_views(sink, settings, CancellationToken::new()).unwrap_err();
    assert!(error.contains("[views] directory") && error.contains("weir-no-such-directory"), "{error}");
}
