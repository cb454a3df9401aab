//! Windows that are asked more than once are not read again: their rows are taken away, and they go on.

use super::limits::{Stage, at, limits};
use super::*;
use crate::engine::{Question, Ready};
use crate::views::intervals::Intervals;
use crate::views::view::READY_ROWS_MAX;

const COUNTED: &str = "AS SELECT time_bucket('1 minute', ts) AS b, count(*) AS n, avg(speed) AS v, max(speed) AS most FROM traffic \
                       WHERE speed >= 0 GROUP BY 1 HAVING count(*) > 1";

const HOPPED: &str = "AS SELECT window_start AS b, count(*) AS n, avg(speed) AS v, max(speed) AS most FROM \
                      HOP(traffic, ts, '1 minute', '3 minutes') WHERE speed >= 0 GROUP BY 1 HAVING count(*) > 1";

/// Windows, and how often each was told, with what in the end.
async fn told(stage: &Stage) -> Vec<String> {
    let told = "SELECT view_window, view_revision, n, v, most FROM (SELECT *, max(view_revision) OVER (PARTITION BY view_window) AS \
                last FROM kept_changes WHERE view_window IS NOT NULL) AS q WHERE view_revision = last";
    stage.numbers(told).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_window_with_late_rows_only_these_are_read() {
    let mut kept = Stage::new(&format!("CREATE MATERIALIZED VIEW kept {COUNTED}"), limits()).await;
    kept.arrive(0, &[0, 1, 2], at(60));
    kept.arrive(0, &[60, 61, 120], at(120));
    kept.settle(at(120)).await;
    // The first late row: all rows of its window are read once more, and never again.
    kept.arrive(1, &[3], at(121));
    kept.settle(at(121)).await;
    kept.city.forget(&words::stream("traffic"));
    for second in 4..30 {
        kept.arrive(1, &[second], at(122));
        kept.settle(at(122)).await;
    }
    // A row of a window that is not held is all that is left of it.
    kept.arrive(1, &[62, 63, 64], at(123));
    kept.settle(at(123)).await;
    let expected = ["2024-01-01T00:00:00Z | 28 | 30 | 0.1 | 2.0", "2024-01-01T00:01:00Z | 2 | 3 | 1.0 | 2.0"];
    assert_eq!(told(&kept).await, expected);
    // After a restart nothing is held.
    kept.runner = None;
    kept.arrive(1, &[30, 31], at(124));
    kept.settle(at(124)).await;
    assert_eq!(told(&kept).await[0], "2024-01-01T00:00:00Z | 29 | 28 | 0.03571428571428571 | 1.0");
}

/// A row comes to each of its windows, and to no other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_open_windows_that_overlap_only_new_rows_are_read() {
    let mut kept =
        Stage::new(&format!("CREATE MATERIALIZED VIEW kept WITH (emit = 'update') {HOPPED}"), limits()).await;
    kept.arrive(0, &[0, 1], at(1));
    kept.settle(at(1)).await;
    kept.city.forget(&words::stream("traffic"));
    kept.arrive(0, &[2, 3], at(3));
    kept.settle(at(3)).await;
    let starts = ["2023-12-31T23:58:00Z", "2023-12-31T23:59:00Z", "2024-01-01T00:00:00Z"];
    assert_eq!(told(&kept).await, starts.map(|start| format!("{start} | 2 | 4 | 0.5 | 1.0")));
    // The first has closed, and what comes behind it is not its own.
    kept.arrive(0, &[4, 60], at(61));
    kept.settle(at(61)).await;
    let told = told(&kept).await;
    assert_eq!(told[0], format!("{} | 3 | 5 | 0.4 | 1.0", starts[0]));
    for (told, start) in told[1..].iter().zip(&starts[1..]) {
        assert_eq!(*told, format!("{start} | 3 | 6 | 0.5 | 1.0"));
    }
    assert_eq!(told.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_an_open_window_that_is_told_only_new_rows_are_read() {
    let sql = format!("CREATE MATERIALIZED VIEW kept WITH (emit = 'update') {COUNTED}");
    let mut kept = Stage::new(&sql, limits()).await;
    kept.arrive(0, &[0, 1], at(1));
    kept.settle(at(1)).await;
    kept.city.forget(&words::stream("traffic"));
    kept.arrive(0, &[2, 3], at(3));
    kept.settle(at(3)).await;
    assert_eq!(told(&kept).await, ["2024-01-01T00:00:00Z | 2 | 4 | 0.5 | 1.0"]);
    // Also when it closes.
    kept.arrive(0, &[4, 60], at(61));
    kept.settle(at(61)).await;
    assert_eq!(told(&kept).await, ["2024-01-01T00:00:00Z | 3 | 5 | 0.4 | 1.0"]);
    // What came in files alone is not taken in: the window is read whole.
    kept.arrive(0, &[5, 6, 7], at(62));
    kept.city.commit(0);
    kept.city.compact();
    kept.city.lose_grace();
    kept.settle(at(62)).await;
    assert_eq!(told(&kept).await[0], "2024-01-01T00:00:00Z | 4 | 6 | 0.6666666666666666 | 2.0");
}

const HELD: &str = "s.device = t.device AND t.ts >= s.valid_from AND (s.valid_to IS NULL OR t.ts < s.valid_to)";

/// What rows are joined with is read when it changes, and the windows that it changes are read anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_rows_with_what_held_of_their_device_only_new_ones_are_read() {
    let sql = format!(
        "CREATE MATERIALIZED VIEW kept WITH (emit = 'update') AS SELECT time_bucket('1 minute', t.ts) AS b, count(*) AS n, \
         avg(speed + s.most) AS v, max(s.most) AS most FROM traffic t JOIN sensors_history s ON {HELD} GROUP BY 1"
    );
    let mut kept = Stage::new(&sql, limits()).await;
    kept.city.revise("d0", 10.0, None);
    kept.city.revise("d1", 20.0, None);
    kept.arrive(0, &[0, 1], at(1));
    kept.arrive(0, &[60], at(61));
    kept.settle(at(61)).await;
    let expected = ["2024-01-01T00:00:00Z | 1 | 2 | 15.5 | 20.0", "2024-01-01T00:01:00Z | 1 | 1 | 10.0 | 10.0"];
    assert_eq!(told(&kept).await, expected);
    // A late row: the first is read once more. Then nothing of what was there is needed any more.
    kept.arrive(1, &[2], at(62));
    kept.settle(at(62)).await;
    kept.city.forget(&words::stream("traffic"));
    kept.arrive(1, &[3, 4, 5], at(63));
    kept.settle(at(63)).await;
    assert_eq!(told(&kept).await[0], "2024-01-01T00:00:00Z | 3 | 5 | 14.4 | 20.0");
    // From the second minute on another number holds: the first stays.
    kept.city.revise("d0", 30.0, Some(START + MINUTE));
    kept.arrive(1, &[61, 62, 6], at(64));
    kept.settle(at(64)).await;
    let expected = ["2024-01-01T00:00:00Z | 3 | 5 | 14.4 | 20.0", "2024-01-01T00:01:00Z | 2 | 2 | 25.5 | 30.0"];
    assert_eq!(told(&kept).await, expected);
}

/// A reference table comes in the order of its revisions, and what comes of states in none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_that_came_from_a_join_is_made_above_states() {
    let sql = format!(
        "CREATE MATERIALIZED VIEW kept WITH (emit = 'update') AS SELECT b, count(*) AS n, max(v) AS v, max(most) AS most FROM \
         (SELECT *, row_number() OVER (PARTITION BY b, device ORDER BY valid_from) AS r FROM (SELECT time_bucket('1 minute', t.ts) \
         AS b, s.device, s.valid_from, s.most, max(speed) AS v FROM traffic t JOIN sensors_history s ON {HELD} GROUP BY 1, 2, 3, 4)) \
         WHERE r = 1 GROUP BY 1"
    );
    let mut kept = Stage::new(&sql, limits()).await;
    for device in ["d0", "d1", "d2"] {
        kept.city.revise(device, 1.0, None);
        kept.city.revise(device, 2.0, Some(START + 30 * SECOND));
    }
    kept.arrive(0, &[40, 41, 42], at(42));
    kept.settle(at(42)).await;
    kept.arrive(1, &[2, 1, 0], at(44));
    kept.settle(at(44)).await;
    assert_eq!(told(&kept).await, ["2024-01-01T00:00:00Z | 2 | 3 | 2.0 | 1.0"]);
}

/// Whether a view of this question can be computed from states.
async fn has_states(select: &str) -> bool {
    let city = City::new();
    city.create(&words::stream("traffic"), words::traffic_fields());
    city.create(&words::stream("weather"), words::weather_fields());
    city.create(&words::stream("sensors_revisions"), words::revision_fields());
    let sql = format!("CREATE MATERIALIZED VIEW kept AS {select}");
    let view = view(&engine(&city), &sql).await;
    view.unwrap_or_else(|error| panic!("{select}: {error}")).parts.is_some()
}

#[tokio::test]
async fn states_are_of_one_aggregation_over_rows_of_one_table() {
    const BUCKET: &str = "time_bucket('1 minute', ts)";
    for (select, expected) in [
        (format!("SELECT {BUCKET} AS b, count(*) AS n, avg(speed) AS v FROM traffic GROUP BY 1"), true),
        (format!("SELECT {BUCKET} AS b, device, max(speed * 2) AS v FROM traffic WHERE speed > 3 GROUP BY 1, 2"), true),
        (
            format!(
                "SELECT b, max(n) AS n FROM (SELECT {BUCKET} AS b, device, count(*) AS n FROM traffic GROUP BY 1, 2) q GROUP BY 1"
            ),
            true,
        ),
        (
            format!(
                "SELECT time_bucket('1 minute', t.ts) AS b, s.most, count(*) AS n FROM traffic t LEFT JOIN sensors_history s \
                 ON {HELD} GROUP BY 1, 2"
            ),
            true,
        ),
        (
            format!(
                "SELECT t.ts AS b, t.n, s.most FROM (SELECT {BUCKET} AS ts, device, count(*) AS n FROM traffic GROUP BY 1, 2) t \
                 JOIN sensors_history s ON {HELD}"
            ),
            true,
        ),
        // Of aggregates that want an order, part of the rows says nothing.
        (format!("SELECT {BUCKET} AS b, last_value(speed ORDER BY ts) AS v FROM traffic GROUP BY 1"), false),
        (
            format!(
                "SELECT {BUCKET} AS b, count(*) AS n, string_agg(road, ',' ORDER BY ts) AS r FROM traffic GROUP BY 1"
            ),
            false,
        ),
        // Of a row of another table, too.
        (
            format!(
                "SELECT t.b, t.n, w.warm FROM (SELECT {BUCKET} AS b, count(*) AS n FROM traffic GROUP BY 1) t JOIN \
                 (SELECT {BUCKET} AS b, max(temperature) AS warm FROM weather GROUP BY 1) w ON w.b = t.b"
            ),
            false,
        ),
        (
            format!(
                "SELECT b, count(*) AS n FROM (SELECT {BUCKET} AS b FROM traffic UNION ALL SELECT {BUCKET} AS b FROM weather) q \
                 GROUP BY 1"
            ),
            false,
        ),
        // A row is one of several by what is around it.
        (
            format!(
                "SELECT b, count(*) AS n FROM (SELECT {BUCKET} AS b, row_number() OVER (PARTITION BY {BUCKET} ORDER BY speed) AS r \
                 FROM traffic) q WHERE r < 3 GROUP BY 1"
            ),
            false,
        ),
        (
            "SELECT window_start AS b, count(*) AS n FROM HOP(traffic, ts, '1 minute', '5 minutes') GROUP BY 1"
                .to_owned(),
            true,
        ),
        // What comes through a HOP is told by windows that do not overlap.
        (
            "SELECT time_bucket('1 hour', ts) AS b, max(n) AS n FROM (SELECT ts, window_start, count(*) AS n FROM HOP(traffic, ts, \
             '1 minute', '5 minutes') GROUP BY ts, window_start) GROUP BY 1"
                .to_owned(),
            false,
        ),
        // States of a slot are not those of the windows that its rows lie in.
        (
            "SELECT window_start AS b, max(v) AS v FROM HOP((SELECT ts, device, max(speed) AS v FROM traffic GROUP BY ts, device), \
             ts, '1 minute', '5 minutes') GROUP BY 1"
                .to_owned(),
            false,
        ),
        (
            "SELECT window_end AS b, count(*) AS n FROM SESSION(traffic, ts, device, '1 minute') GROUP BY 1".to_owned(),
            false,
        ),
        ("SELECT ts, device, speed FROM traffic".to_owned(), false),
    ] {
        assert_eq!(has_states(&select).await, expected, "{select}");
    }
}

#[tokio::test]
async fn a_plan_is_ready_when_all_that_it_reads_are_streams() {
    let city = City::new();
    city.create(&words::stream("traffic"), words::traffic_fields());
    city.create(&words::stream("weather"), words::weather_fields());
    let engine = engine(&city);
    for (select, expected) in [
        ("SELECT ts, speed FROM traffic", true),
        ("SELECT ts, speed FROM traffic WHERE speed > (SELECT avg(temperature) FROM weather)", true),
        ("SELECT ts, device FROM latest('traffic')", false),
    ] {
        let plan = engine.plan_for_view(select).await.unwrap().plan().clone();
        let ready = Ready::of(&engine, "a test", plan).await.unwrap();
        assert_eq!(ready.is_some(), expected, "{select}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_many_rows_is_planned_for_all_threads() {
    let sql =
        "CREATE MATERIALIZED VIEW kept AS SELECT time_bucket('1 hour', ts) AS b, count(*) AS n FROM traffic GROUP BY 1";
    let kept = Stage::new(sql, limits()).await;
    let stream = words::stream("traffic");
    let is_ready = async || {
        let frozen = kept.engine.newest().take(kept.engine.tables().as_ref(), &stream).await.unwrap();
        let states = States::from([(stream.clone(), frozen)]);
        let window = Intervals::of(START, START + 60 * MINUTE);
        matches!(kept.view.asked_of(&window, &states).unwrap(), Question::Ready(_))
    };
    kept.arrive(0, &vec![1; READY_ROWS_MAX as usize], at(1));
    // Of another hour, which does not count.
    kept.arrive(0, &[4_000], at(4_000));
    assert!(is_ready().await);
    kept.arrive(0, &[2], at(2));
    assert!(!is_ready().await);
}
