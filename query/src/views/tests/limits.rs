//! What is too much for a view, alone: it waits, or is divided, and the rest goes on. And clocks that are set.

use super::*;

/// A view of rows that a test deals out, and its runner.
pub(super) struct Stage {
    pub(super) city: Arc<City>,
    pub(super) engine: Arc<Engine>,
    pub(super) view: Arc<View>,
    pub(super) runner: Option<Runner>,
    limits: RunLimits,
}

impl Stage {
    pub(super) async fn new(sql: &str, limits: RunLimits) -> Self {
        let city = City::new();
        city.create(&words::stream("traffic"), words::traffic_fields());
        city.create(&words::stream("sensors_revisions"), words::revision_fields());
        let engine = engine(&city);
        let view = Arc::new(view(&engine, sql).await.unwrap());
        Self { city, engine, view, runner: None, limits }
    }

    /// Rows of `traffic` at these seconds, each of a device of its own.
    pub(super) fn arrive(&self, edge: u8, seconds: &[i64], now: Moment) {
        let row = |(index, second): (usize, &i64)| Row {
            ts: START + second * SECOND,
            device: format!("d{index}"),
            value: Some(index as f64),
            text: None,
        };
        let rows: Vec<Row> = seconds.iter().enumerate().map(row).collect();
        let last = rows.iter().map(|row| row.ts).max();
        self.city.arrive(&words::stream("traffic"), edge, &rows, last, now.wall_us);
    }

    async fn round(&mut self, now: Moment) -> Round {
        let runner = match &mut self.runner {
            Some(runner) => runner,
            None => {
                let sink = Arc::new(city::Handle(Arc::clone(&self.city)));
                let (engine, view) = (Arc::clone(&self.engine), Arc::clone(&self.view));
                let settled = Arc::new(|_: &StreamName| None);
                let runner = Runner::open(engine, sink, view, settled, self.limits.clone(), now).await.unwrap();
                self.runner.insert(runner)
            }
        };
        runner.round(now).await.unwrap()
    }

    /// Rounds until nothing more is due.
    pub(super) async fn settle(&mut self, now: Moment) {
        for _ in 0..100 {
            if self.round(now).await == Round::Done {
                return;
            }
        }
        panic!("it never ends");
    }

    pub(super) async fn numbers(&self, sql: &str) -> Vec<String> {
        let plan = self.engine.plan_for_view(sql).await.unwrap().plan().clone();
        texts(&self.engine.ask("a test", plan, States::new(), LIMITS).await.unwrap().rows)
    }

    fn reason(&self) -> String {
        self.runner.as_ref().and_then(|runner| runner.progress().reason()).unwrap_or_default()
    }
}

pub(super) fn limits() -> RunLimits {
    RunLimits {
        rows_max: 100_000,
        bytes_max: 64 << 20,
        windows_max: 1_000,
        partials_bytes_max: 1 << 20,
        record_every_us: 0,
    }
}

pub(super) fn at(second: i64) -> Moment {
    Moment { wall_us: START + second * SECOND, since_us: second * SECOND }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_window_that_is_too_much_waits_and_the_others_go_on() {
    let sql = "CREATE MATERIALIZED VIEW kept AS SELECT time_bucket('1 minute', ts) AS b, device, count(*) AS n FROM traffic \
               GROUP BY 1, 2";
    let mut kept = Stage::new(sql, RunLimits { rows_max: 30, ..limits() }).await;
    let shown = "SELECT view_window, count(*) FROM kept_changes WHERE view_window IS NOT NULL GROUP BY 1";
    let told = |minutes: &[(i64, usize)]| {
        let text = |(minute, count): &(i64, usize)| format!("2024-01-01T00:{minute:02}:00Z | {count}");
        minutes.iter().map(text).collect::<Vec<_>>()
    };
    for minute in 0..5 {
        kept.arrive(0, &[minute * 60, minute * 60 + 1], at(300));
    }
    // The third has 40 devices more.
    kept.arrive(0, &[130; 40], at(300));
    kept.arrive(0, &[300], at(300));
    kept.settle(at(300)).await;
    assert_eq!(kept.numbers(shown).await, told(&[(0, 2), (1, 2), (3, 2), (4, 2)]));
    assert!(
        kept.reason().contains("1 windows are too much") && kept.reason().contains("00:02:00"),
        "{}",
        kept.reason()
    );
    // After a restart it is still to be asked, and the others go on.
    kept.runner = None;
    kept.city.restart();
    kept.arrive(0, &[360], at(360));
    kept.settle(at(360)).await;
    assert_eq!(kept.numbers(shown).await, told(&[(0, 2), (1, 2), (3, 2), (4, 2), (5, 1)]));
    assert!(!kept.reason().is_empty());
    // With more room it is told when it is tried again, and not before.
    kept.runner = None;
    kept.settle(at(361)).await;
    let rounds = kept.numbers("SELECT count(*) FROM kept_changes").await;
    kept.settle(at(361)).await;
    assert_eq!(kept.numbers("SELECT count(*) FROM kept_changes").await, rounds);
    kept.limits.rows_max = 100;
    kept.runner = None;
    kept.settle(at(600)).await;
    let all = told(&[(0, 2), (1, 2), (2, 40), (3, 2), (4, 2), (5, 1)]);
    assert_eq!(kept.numbers(shown).await, all);
    assert_eq!(kept.reason(), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_is_too_much_for_one_append_is_divided() {
    let sql = "CREATE MATERIALIZED VIEW kept AS SELECT ts, device, repeat('x', 1000) AS wide FROM traffic";
    let mut kept = Stage::new(sql, RunLimits { bytes_max: 30_000, ..limits() }).await;
    kept.arrive(0, &[0], at(0));
    kept.settle(at(0)).await;
    // A hundred moments in one batch, and fifty rows of one moment, which cannot be divided.
    let moments: Vec<i64> = (1..101).collect();
    kept.arrive(0, &moments, at(100));
    // While the first is told as past the next such batch waits.
    assert_eq!(kept.round(at(100)).await, Round::More);
    kept.arrive(1, &[200; 50], at(200));
    kept.arrive(0, &[300, 301], at(301));
    kept.settle(at(301)).await;
    let told = "SELECT ts FROM kept_changes WHERE view_empty IS FALSE";
    assert_eq!(kept.numbers(&told.replace("ts F", "count(*), count(DISTINCT ts) F")).await, ["103 | 103"]);
    assert!(kept.reason().contains("50 rows of 2024-01-01 00:03:20"), "{}", kept.reason());
    let appends = "SELECT count(DISTINCT _seq) FROM kept_changes WHERE view_empty IS FALSE";
    assert!(kept.numbers(appends).await[0].parse::<usize>().unwrap() >= 5);
    // And it is past it, after a restart too.
    kept.runner = None;
    kept.city.restart();
    kept.arrive(0, &[302], at(302));
    kept.settle(at(302)).await;
    assert_eq!(kept.numbers(&told.replace("ts F", "count(*) F")).await, ["104"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_one_append_has_no_room_for_takes_several() {
    let sql = "CREATE MATERIALIZED VIEW kept AS SELECT ts, repeat('x', 400000) AS wide FROM traffic";
    let mut kept = Stage::new(sql, limits()).await;
    kept.arrive(0, &[0], at(0));
    kept.settle(at(0)).await;
    // 40 MB in one batch.
    kept.arrive(0, &(1..101).collect::<Vec<_>>(), at(100));
    kept.settle(at(100)).await;
    let appends = "SELECT max(bytes) <= 33554432, sum(n), count(*) > 2 FROM (SELECT count(*) AS n, sum(octet_length(wide)) AS \
                   bytes FROM kept_changes WHERE view_empty IS FALSE GROUP BY _seq) AS q";
    assert_eq!(kept.numbers(appends).await, ["true | 101 | true"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_set_back_holds_nothing_up() {
    let sql = "CREATE MATERIALIZED VIEW kept WITH (emit = 'update', every = '1s', idle = '30s') AS \
               SELECT time_bucket('1 minute', ts) AS b, count(*) AS n FROM traffic GROUP BY 1";
    let mut kept = Stage::new(sql, limits()).await;
    let set_back = |second: i64| Moment { wall_us: at(second).wall_us - 3_600 * SECOND, ..at(second) };
    let shown = "SELECT max(n) FROM kept_changes WHERE view_window IS NOT NULL";
    kept.arrive(0, &[0, 1], at(1));
    kept.settle(at(1)).await;
    assert_eq!(kept.numbers(shown).await, ["2"]);
    // An open window is told every second, by whatever clock.
    kept.arrive(0, &[2], set_back(3));
    kept.settle(set_back(3)).await;
    assert_eq!(kept.numbers(shown).await, ["3"]);
    // Edge 0 is silent from now on: after half a minute it holds nothing back, though the clock says less than no time went.
    kept.arrive(1, &[100], set_back(4));
    kept.settle(set_back(4)).await;
    let watermark = |kept: &Stage| (kept.runner.as_ref().unwrap().progress().watermark.unwrap() - START) / SECOND;
    assert_eq!(watermark(&kept), 2);
    let progress = |kept: &Stage| kept.runner.as_ref().unwrap().progress().clone();
    assert_eq!((progress(&kept).held_by.as_deref(), progress(&kept).rows_per_second), (Some("gw-0"), None));
    kept.arrive(1, &[101], set_back(40));
    kept.settle(set_back(40)).await;
    assert_eq!(watermark(&kept), 101);
    // Three rows since it began, 39 seconds ago.
    assert_eq!((progress(&kept).held_by.as_deref(), progress(&kept).rows_per_second), (Some("gw-1"), Some(3.0 / 39.0)));
    // And a clock that jumps ahead makes nobody idle.
    kept.arrive(0, &[102], at(41));
    kept.settle(at(41)).await;
    kept.arrive(1, &[200], at(42));
    kept.settle(Moment { wall_us: at(90_000).wall_us, ..at(42) }).await;
    assert_eq!(watermark(&kept), 102);
}
