//! Views against their questions, asked in batch: random questions over random rows, late, twice and out of order, from
//! many edges, with commits, compactions, restarts and lost answers in between.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arrow_array::RecordBatch;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use wire::StreamName;

use super::definition::{Command, Definition, Emit};
use super::run::{Round, RunLimits, Runner};
use super::shape::Kept;
use super::view::View;
use super::watermark::Moment;
use crate::engine::{Engine, EngineSettings, QueryError, States};
use crate::lanes::LaneSettings;
use crate::references;

pub(crate) mod city;
mod limits;
mod parts;
mod refused;
mod sessions;
mod statements;
mod words;

use city::{Arrival, City, Row};

const SECOND: i64 = 1_000_000;
const MINUTE: i64 = 60 * SECOND;
/// 2024-01-01T00:00:00Z
const START: i64 = 1_704_067_200 * SECOND;
const CASES: usize = 250;
const LIMITS: [usize; 2] = [100_000, 64 << 20];

fn limits(random: &mut StdRng) -> RunLimits {
    RunLimits {
        rows_max: 100_000,
        bytes_max: 64 << 20,
        // Sometimes so few that what was told must be read again.
        windows_max: [1, 3, 10_000][random.random_range(0..3)],
        partials_bytes_max: [0, 2_000, 1 << 20][random.random_range(0..3)],
        record_every_us: 2 * MINUTE,
    }
}

fn engine(city: &Arc<City>) -> Arc<Engine> {
    let lanes = vec![LaneSettings { threads: 1, running: 4, ..LaneSettings::default() }];
    let settings = EngineSettings { lanes, ..EngineSettings::default() };
    Arc::new(Engine::new(Arc::new(city::Handle(Arc::clone(city))), settings).unwrap())
}

/// The view of this statement, over streams and reference tables.
async fn view(engine: &Engine, sql: &str) -> Result<View, QueryError> {
    let look = |name: &str, plan: &_| references::known(engine.tables().as_ref(), name, plan);
    View::of(engine, definition(sql), &look).await
}

fn definition(sql: &str) -> Definition {
    let dialect = datafusion::sql::sqlparser::dialect::GenericDialect {};
    let sql = crate::as_of::name(&dialect, sql).unwrap();
    match Command::parse(&dialect, &sql) {
        Ok(Some(Command::Create { definition, .. })) => *definition,
        other => panic!("{sql}: {other:?}"),
    }
}

/// A question of one of the allowed shapes.
fn question(random: &mut StdRng) -> String {
    let minutes = [1, 2, 5, 7][random.random_range(0..4)];
    let window = match random.random_range(0..4) {
        0 => format!("date_bin(INTERVAL '{minutes} minutes', ts)"),
        1 => "date_trunc('minute', ts)".to_owned(),
        2 => format!("time_bucket(INTERVAL '{minutes} minutes', ts)"),
        _ => format!("time_bucket('{minutes} minutes', ts)"),
    };
    let least = random.random_range(0..40);
    let filter = if random.random_bool(0.5) { format!("WHERE speed > {least}") } else { String::new() };
    let having = match random.random_range(0..3) {
        0 => format!("HAVING count(*) < {}", random.random_range(2..6)),
        1 => format!("HAVING max(speed) >= {least}"),
        _ => String::new(),
    };
    let hops = random.random_range(1..5);
    let hop = format!("INTERVAL '{minutes} minutes', INTERVAL '{} minutes'", minutes * hops);
    let hop = match random.random_range(0..4) {
        0 => format!("{hop}, TIMESTAMP '2024-01-01T00:03:00'"),
        1 => format!("{hop}, 'Europe/Copenhagen'"),
        _ => hop,
    };
    let gap = random.random_range(1..6);
    let session = format!("INTERVAL '{gap} minutes', '{} minutes'", gap * [1, 2, 5, 300][random.random_range(0..4)]);
    let join = ["JOIN", "LEFT JOIN"][random.random_range(0..2)];
    let held = |time: &str| format!("s.valid_from <= {time} AND (s.valid_to IS NULL OR {time} < s.valid_to)");
    match random.random_range(0..29) {
        // Too much for one answer, now and then.
        17 => format!("SELECT ts, device, repeat(device, 200) AS wide, speed FROM traffic {filter}"),
        0 => format!("SELECT ts, device, speed * 2 AS twice, road FROM traffic {filter}"),
        1 => format!(
            "SELECT {window} AS b, device, count(*) AS n, sum(speed) AS s, avg(speed) AS a, max(road) AS r, \
             count(DISTINCT road) AS roads FROM traffic {filter} GROUP BY 1, 2 {having}"
        ),
        2 => format!("SELECT count(*) AS n, min(speed) AS least, {window} AS b FROM traffic {filter} GROUP BY {window} {having}"),
        3 => format!("SELECT DISTINCT {window} AS b, device, road FROM traffic {filter}"),
        4 => format!(
            "SELECT b, device, speed, road FROM (SELECT {window} AS b, device, speed, road, row_number() OVER (PARTITION BY \
             {window}, device ORDER BY ts DESC, speed DESC, road DESC) AS r FROM traffic {filter}) AS numbered WHERE r = 1"
        ),
        5 => format!(
            "SELECT t.b, t.n, w.warm FROM (SELECT {window} AS b, count(*) AS n FROM traffic {filter} GROUP BY 1) t \
             JOIN (SELECT {window} AS b, max(temperature) AS warm FROM weather GROUP BY 1) w ON w.b = t.b"
        ),
        6 => format!(
            "SELECT t.b, t.device, t.n FROM (SELECT {window} AS b, device, count(*) AS n FROM traffic {filter} GROUP BY 1, 2) t \
             LEFT JOIN (SELECT {window} AS b, device, count(*) AS n FROM weather GROUP BY 1, 2) w \
             ON w.b = t.b AND w.device = t.device WHERE w.n IS NULL"
        ),
        7 => format!(
            "SELECT b, max(v) AS v, count(*) AS n FROM (SELECT {window} AS b, speed AS v FROM traffic {filter} UNION ALL \
             SELECT {window} AS b, temperature AS v FROM weather) AS both GROUP BY b {}",
            if random.random_bool(0.5) { "HAVING max(v) < 45" } else { "" }
        ),
        8 => format!(
            "SELECT b, count(*) AS n, sum(speed) AS s FROM (SELECT {window} AS b, speed, rank() OVER (PARTITION BY {window} \
             ORDER BY speed DESC) AS r FROM traffic {filter}) AS ranked WHERE r <= 2 GROUP BY b"
        ),
        10 => format!(
            "SELECT window_start AS b, window_end, device, count(*) AS n, sum(speed) AS s FROM HOP(traffic, ts, {hop}) \
             {filter} GROUP BY 1, 2, 3 {having}"
        ),
        11 => format!(
            "SELECT b, device, n FROM (SELECT window_start AS b, device, count(*) AS n, row_number() OVER (PARTITION BY \
             window_start ORDER BY count(*) DESC, device) AS r FROM HOP(traffic, ts, {hop}) AS h {filter} GROUP BY 1, 2) q \
             WHERE r = 1"
        ),
        12 => format!(
            "SELECT t.b, t.n, w.warm FROM (SELECT window_start AS b, count(*) AS n FROM HOP(traffic, ts, {hop}) GROUP BY 1) t \
             LEFT JOIN (SELECT window_start AS b, max(temperature) AS warm FROM HOP(weather, ts, {hop}) GROUP BY 1) w \
             ON w.b = t.b"
        ),
        13 => format!("SELECT ts, device, speed, h.window_start AS b FROM hop(traffic, ts, {hop}) h {filter}"),
        14 => format!(
            "SELECT {window} AS b, max(n) AS n FROM (SELECT ts, window_start, count(*) AS n FROM HOP(traffic, ts, {hop}) \
             GROUP BY 1, 2) AS q GROUP BY 1"
        ),
        15 => format!(
            "SELECT window_start AS b, max(v) AS v, count(*) AS n FROM HOP((SELECT ts, speed AS v FROM traffic {filter} \
             UNION ALL SELECT ts, temperature AS v FROM weather), ts, {hop}) GROUP BY window_start HAVING max(v) < 45"
        ),
        18 => format!(
            "SELECT device, window_start, window_end AS b, count(*) AS n, sum(speed) AS s FROM SESSION(traffic, ts, device, \
             {session}) {filter} GROUP BY 1, 2, 3 {having}"
        ),
        19 => format!(
            "SELECT ts, device, speed, window_start, s.window_end AS b FROM session(traffic, ts, device, {session}) s {filter}"
        ),
        20 => format!(
            "SELECT window_end AS b, count(DISTINCT device) AS n, max(window_end - window_start) > INTERVAL '9 minutes' AS long \
             FROM SESSION((SELECT ts, device, road FROM traffic {filter}), ts, (device, road), {session}) GROUP BY 1"
        ),
        21 => format!(
            "SELECT b, device, speed FROM (SELECT window_end AS b, device, speed, row_number() OVER (PARTITION BY device, \
             window_end ORDER BY ts DESC, speed DESC) AS r FROM SESSION(traffic, ts, device, {session}) {filter}) q WHERE r = 1"
        ),
        22 => format!(
            "SELECT t.b, t.device, t.n, w.warm FROM (SELECT window_end AS b, device, count(*) AS n FROM SESSION(traffic, ts, \
             device, {session}) {filter} GROUP BY 1, 2) t LEFT JOIN (SELECT window_end AS b, device, max(temperature) AS warm \
             FROM SESSION(weather, ts, device, {session}) GROUP BY 1, 2) w ON w.b = t.b AND w.device = t.device"
        ),
        23 => format!(
            "SELECT window_end AS b, device, max(v) AS v, count(*) AS n FROM SESSION((SELECT ts, device, speed AS v FROM traffic \
             {filter} UNION ALL SELECT ts, device, temperature AS v FROM weather), ts, device, {session}) GROUP BY 1, 2 \
             HAVING max(v) < 45"
        ),
        // With what held of each device, below the aggregation, above it, and of windows that overlap.
        24 | 25 => format!(
            "SELECT {window} AS b, s.most, count(*) AS n, avg(speed) AS a FROM traffic t {join} sensors_history s ON \
             s.device = t.device AND {} {filter} GROUP BY 1, 2 {having}",
            held("t.ts")
        )
        .replace(", ts)", ", t.ts)"),
        28 => format!(
            "SELECT b, device, most, n FROM (SELECT {window} AS b, s.device, s.most, count(*) AS n, row_number() OVER (PARTITION BY \
             {window}, s.device ORDER BY s.valid_from) AS r FROM traffic t JOIN sensors_history s ON s.device = t.device AND {} \
             {filter} GROUP BY 1, 2, 3, s.valid_from) q WHERE r = 1",
            held("t.ts")
        )
        .replace(", ts)", ", t.ts)"),
        26 => format!(
            "SELECT q.b, q.device, q.n, s.most FROM (SELECT {window} AS b, device, count(*) AS n FROM traffic {filter} \
             GROUP BY 1, 2) q {join} sensors_history s ON s.device = q.device AND {}",
            held("q.b")
        ),
        27 => format!(
            "SELECT t.window_start AS b, s.most, count(*) AS n, max(speed) AS v FROM HOP(traffic, ts, {hop}) t {join} \
             sensors_history s ON s.device = t.device AND {} {filter} GROUP BY 1, 2 {having}",
            held("t.ts")
        ),
        9 => format!(
            "SELECT {window} AS b, sum(most) AS s, max(n) AS n FROM (SELECT ts, device, max(speed) AS most, count(*) AS n \
             FROM traffic {filter} GROUP BY ts, device) AS moments GROUP BY 1"
        ),
        _ => format!(
            "SELECT {window} AS b, count(*) AS n, sum(t.speed - w.temperature) AS d FROM traffic t JOIN weather w USING (ts, device) \
             GROUP BY 1"
        )
        .replace(", ts)", ", t.ts)"),
    }
}

/// Rows as sorted texts.
fn texts(rows: &[RecordBatch]) -> Vec<String> {
    let mut texts = Vec::new();
    for batch in rows {
        let format = arrow::util::display::FormatOptions::default().with_null("null");
        let columns: Vec<_> = batch
            .columns()
            .iter()
            .map(|column| arrow::util::display::ArrayFormatter::try_new(column, &format).unwrap())
            .collect();
        for row in 0..batch.num_rows() {
            let values: Vec<String> = columns.iter().map(|column| column.value(row).to_string()).collect();
            texts.push(values.join(" | "));
        }
    }
    texts.sort();
    texts
}

struct Case {
    random: StdRng,
    city: Arc<City>,
    engine: Arc<Engine>,
    now: i64,
    /// What the clock on the wall is wrong by.
    skew: i64,
    view: Option<Arc<View>>,
    runner: Option<Runner>,
    /// Rows that were compared, and how often.
    checked: usize,
    checks: usize,
    /// What arrives while the view is at work.
    meanwhile: Vec<Arrival>,
}

impl Case {
    fn new(seed: u64) -> Self {
        let city = City::new();
        let engine = engine(&city);
        let (traffic, weather) = (words::stream("traffic"), words::stream("weather"));
        city.create(&traffic, words::traffic_fields());
        city.create(&weather, words::weather_fields());
        city.create(&words::stream("sensors_revisions"), words::revision_fields());
        let random = StdRng::seed_from_u64(seed);
        Self {
            random,
            city,
            engine,
            now: START,
            skew: 0,
            view: None,
            runner: None,
            checked: 0,
            checks: 0,
            meanwhile: Vec::new(),
        }
    }

    /// Some rows of an edge: most of now, some late, some twice.
    fn arrive(&mut self) {
        let stream = words::stream(if self.random.random_bool(0.7) { "traffic" } else { "weather" });
        let edge = self.random.random_range(0..4_u8);
        let mut rows: Vec<Row> = Vec::new();
        for _ in 0..self.random.random_range(1..8) {
            let late = if self.random.random_bool(0.15) { 40 * MINUTE } else { MINUTE };
            rows.push(Row {
                ts: self.now - self.random.random_range(0..late) / (10 * SECOND) * (10 * SECOND),
                device: format!("d{}", self.random.random_range(0..3)),
                value: (!self.random.random_bool(0.1)).then(|| f64::from(self.random.random_range(0..200)) / 4.0),
                text: (!self.random.random_bool(0.2)).then(|| format!("road {}", self.random.random_range(0..3))),
            });
            if self.random.random_bool(0.1) {
                rows.push(rows[0].clone());
            }
        }
        let watermark = self.random.random_bool(0.8).then(|| self.now - self.random.random_range(0..30) * SECOND);
        let arrival = Arrival { stream, edge, rows, watermark, now: self.moment().wall_us };
        if self.random.random_bool(0.3) {
            return self.meanwhile.push(arrival);
        }
        let Arrival { stream, edge, rows, watermark, now } = arrival;
        self.city.arrive(&stream, edge, &rows, watermark, now);
    }

    /// What holds of a device from now on, from another time on, or for ever.
    fn revise(&mut self) {
        let (device, most) = (self.random.random_range(0..3), f64::from(self.random.random_range(0..5)));
        let from = self.random.random_bool(0.8).then(|| self.now + self.random.random_range(-30..5) * MINUTE);
        self.city.revise(&format!("d{device}"), most, from);
    }

    fn moment(&self) -> Moment {
        Moment { wall_us: self.now + self.skew, since_us: self.now }
    }

    async fn open(&mut self) {
        let Some(view) = self.view.clone() else { return };
        let mut limits = limits(&mut self.random);
        if view.definition.select.contains("repeat") {
            limits.bytes_max = 20_000;
        }
        let settled = Arc::new(|_: &StreamName| None);
        let sink = Arc::new(city::Handle(Arc::clone(&self.city)));
        let runner = Runner::open(Arc::clone(&self.engine), sink, view, settled, limits, self.moment()).await;
        self.runner = runner.map_err(|error| assert!(error.to_string().contains("a test says"), "{error}")).ok();
    }

    async fn step(&mut self) {
        match self.random.random_range(0..18) {
            0..7 => self.arrive(),
            17 => self.revise(),
            16 => self.skew = self.random.random_range(-60..60) * MINUTE,
            7..9 => self.now += self.random.random_range(0..4 * MINUTE),
            9 => self.city.commit(self.random.random_range(0..4)),
            10 => self.city.compact(),
            // kill -9, also in the middle of an append.
            11 => {
                self.runner = None;
                self.city.restart();
            }
            12 => self.city.fail_after(self.random.random_range(0..3)),
            _ => {
                self.round().await;
            }
        }
    }

    async fn round(&mut self) -> Option<Round> {
        if self.runner.is_none() {
            self.open().await;
        }
        let runner = self.runner.as_mut()?;
        let waiting = self.meanwhile.len();
        self.city.arrive_meanwhile(std::mem::take(&mut self.meanwhile));
        let now = Moment { wall_us: self.now + self.skew, since_us: self.now };
        let round = runner.round(now).await;
        self.meanwhile = self.city.arrive_meanwhile(Vec::new());
        match round {
            // What came in the middle of it the view has not seen yet.
            Ok(_) if self.meanwhile.len() < waiting => Some(Round::More),
            Ok(round) => {
                self.check(round).await;
                Some(round)
            }
            Err(error) => {
                assert!(error.to_string().contains("a test says"), "{error}");
                self.runner = None;
                None
            }
        }
    }

    /// The view shows of closed windows what its question gives.
    async fn check(&mut self, round: Round) {
        let (Some(view), Some(runner)) = (self.view.clone(), self.runner.as_mut()) else { return };
        let (watermark, closed) = (runner.progress().watermark, runner.closed());
        let Some(table) = self.city.schema(&view.changes) else { return };
        let shown = view.columns.plan(&view.changes, &table).unwrap();
        let shown = self.engine.ask("shown", shown, States::new(), LIMITS).await.unwrap().rows;
        let asked = self.engine.ask("asked", view.plan.clone(), States::new(), LIMITS).await.unwrap().rows;
        let (mut shown, mut asked) = (texts(&shown), texts(&asked));
        match &view.shape.kept {
            Kept::Rows { .. } => {
                if round == Round::More {
                    // While its past is read it shows a part, and nothing twice.
                    let mut left = asked.clone();
                    for row in &shown {
                        let at = left.iter().position(|known| known == row);
                        left.remove(at.unwrap_or_else(|| panic!("{}: too much: {row}", view.definition.text)));
                    }
                    return;
                }
            }
            Kept::Windows { column, .. } => {
                // No window is told before it has ended.
                if let (Emit::Final, Some(watermark)) = (view.definition.emit, watermark) {
                    let limit = watermark - view.definition.lateness_us;
                    let early = format!("SELECT ts FROM kept_changes WHERE arrow_cast(view_end, 'Int64') > {limit}");
                    assert_eq!(self.texts(&early).await, Vec::<String>::new(), "{}", view.definition.text);
                }
                let only = |rows: &mut Vec<String>| {
                    rows.retain(|row| closed.contains(words::time(row.split(" | ").nth(*column).unwrap())));
                };
                only(&mut asked);
                only(&mut shown);
            }
        }
        self.checked += asked.len();
        self.checks += 1;
        assert_eq!(shown, asked, "{}", view.definition.text);
    }

    /// The answer to a question, as sorted texts.
    async fn texts(&self, sql: &str) -> Vec<String> {
        let plan = self.engine.plan_for_view(sql).await.unwrap().plan().clone();
        texts(&self.engine.ask("a test", plan, States::new(), LIMITS).await.unwrap().rows)
    }

    /// The rows of one revision of a window are those of one append.
    async fn tells_each_revision_once(&self) {
        let told = "SELECT view_window FROM kept_changes WHERE view_window IS NOT NULL GROUP BY view_window, view_revision \
                    HAVING count(DISTINCT _spool || ' ' || CAST(_seq AS TEXT)) > 1";
        let plan = self.engine.plan_for_view(told).await.unwrap().plan().clone();
        let told = self.engine.ask("told twice", plan, States::new(), LIMITS).await.unwrap().rows;
        assert_eq!(texts(&told), Vec::<String>::new());
        // And each says something else than the one before it.
        let Some(view) = self.view.as_ref().filter(|view| matches!(view.shape.kept, Kept::Windows { .. })) else {
            return;
        };
        let columns: Vec<&str> = view.columns.stored_names().collect();
        if columns.contains(&"window_end") {
            let other = "SELECT view_window FROM kept_changes WHERE view_end <> window_end";
            assert_eq!(self.texts(other).await, Vec::<String>::new());
        }
        let told = format!(
            "SELECT view_window, view_revision, {} FROM kept_changes WHERE view_window IS NOT NULL",
            columns.join(", ")
        );
        let plan = self.engine.plan_for_view(&told).await.unwrap().plan().clone();
        let told = self.engine.ask("what was told", plan, States::new(), LIMITS).await.unwrap().rows;
        let mut revisions: BTreeMap<(String, i64), Vec<String>> = BTreeMap::new();
        for row in texts(&told) {
            let mut parts = row.splitn(3, " | ");
            let window = parts.next().unwrap().to_owned();
            let revision = parts.next().unwrap().parse().unwrap();
            revisions.entry((window, revision)).or_default().push(parts.next().unwrap().to_owned());
        }
        for ((window, revision), rows) in &revisions {
            let before = revisions.get(&(window.clone(), revision - 1));
            assert!(before.is_some() == (*revision > 1), "{window}: no revision before {revision}");
            assert!(before != Some(rows), "{window}: {revision} says nothing new: {rows:?}");
        }
    }

    /// All that has come is told: nothing is left to do.
    async fn settle(&mut self) {
        self.city.fail_after(usize::MAX);
        for _ in 0..200 {
            if self.round().await == Some(Round::Done) {
                return;
            }
        }
        panic!("it never ends");
    }
}

async fn case(seed: u64) -> (usize, usize, &'static str) {
    let mut case = Case::new(seed);
    let select = question(&mut case.random);
    let (lateness, update) = (case.random.random_range(0..6), case.random.random_bool(0.3));
    let emit = if update { "update" } else { "final" };
    let sql = format!(
        "CREATE MATERIALIZED VIEW kept WITH (lateness = '{lateness} minutes', emit = '{emit}', every = '1s', idle = '90s') AS {select}"
    );
    let sql = sql.replace("'0 minutes'", "'0s'");
    let (begin, steps) = (case.random.random_range(0..20), case.random.random_range(20..40));
    for step in 0..steps {
        if step == begin {
            let view = view(&case.engine, &sql).await;
            case.view = Some(Arc::new(view.unwrap_or_else(|error| panic!("{sql}: {error}"))));
        }
        case.step().await;
    }
    // A last row, a day later, closes everything.
    case.now += 24 * 60 * MINUTE;
    for stream in ["traffic", "weather"] {
        let row = Row { ts: case.now, device: "d0".to_owned(), value: Some(1.0), text: None };
        case.city.arrive(&words::stream(stream), 0, &[row], Some(case.now), case.now);
    }
    case.settle().await;
    case.runner = None;
    case.city.restart();
    case.settle().await;
    case.tells_each_revision_once().await;
    (case.checked, case.checks, emit)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_view_equals_its_question() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seed: u64 = number("WEIR_SEED").unwrap_or_else(rand::random);
    let cases = number("WEIR_VIEW_CASES").map_or(CASES, |cases| cases as usize);
    println!("WEIR_SEED={seed} WEIR_VIEW_CASES={cases}");
    let next = Arc::new(AtomicUsize::new(0));
    let mut workers = Vec::new();
    for _ in 0..2 {
        let next = Arc::clone(&next);
        workers.push(tokio::spawn(async move {
            let (mut checked, mut checks) = (BTreeMap::<&str, usize>::new(), 0);
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= cases {
                    return (checked, checks);
                }
                let own = seed.wrapping_add(index as u64);
                let done = tokio::spawn(case(own)).await;
                let (rows, times, emit) = done.unwrap_or_else(|_| panic!("alone: WEIR_SEED={own} WEIR_VIEW_CASES=1"));
                *checked.entry(emit).or_default() += rows;
                checks += times;
            }
        }));
    }
    let mut all = 0;
    for worker in workers {
        let (checked, checks) = worker.await.unwrap();
        println!("compared {checks} times; rows: {checked:?}");
        all += checks;
        assert!(cases < 100 || checked.values().all(|rows| *rows > cases), "too little was compared: {checked:?}");
    }
    assert!(cases < CASES || all >= 1_000, "compared {all} times only");
}
