//! Windows that are asked more than once are not read again: their rows are taken away, and they go on.

use super::limits::{Stage, at, limits};
use super::*;

const COUNTED: &str = "AS SELECT time_bucket('1 minute', ts) AS b, count(*) AS n, avg(speed) AS v, max(speed) AS most FROM traffic \
                       WHERE speed >= 0 GROUP BY 1 HAVING count(*) > 1";

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
