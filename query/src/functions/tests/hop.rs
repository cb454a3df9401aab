use datafusion::physical_plan::displayable;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

#[tokio::test]
async fn a_row_comes_once_in_each_window_that_holds_it() {
    let t = "(SELECT arrow_cast(ts, 'Timestamp(Microsecond, Some(\"UTC\"))') AS ts, v FROM (VALUES \
             (TIMESTAMP '2024-01-01T00:07:00', 1), (NULL, 2), (TIMESTAMP '2024-01-01T00:05:00', 3)) AS q(ts, v))";
    let windows = ["2023-12-31T23:55:00Z|2024-01-01T00:10:00Z", "2024-01-01T00:00:00Z|2024-01-01T00:15:00Z"];
    let last = "2024-01-01T00:05:00Z|2024-01-01T00:20:00Z";
    let all = [windows[0], windows[1], last].map(|window| format!("{window}|4|2"));
    let all = all.each_ref().map(String::as_str);
    for hop in ["INTERVAL '5 minutes', INTERVAL '15 minutes'", "'5 minutes', '15 minutes', 'UTC'"] {
        let select = "SELECT window_start, window_end, sum(v), count(*) FROM";
        check(&format!("{select} HOP({t}, ts, {hop}) GROUP BY 1, 2 ORDER BY 1"), &all).await;
        check(&format!("{select} hop({t}, ts, {hop}) AS h GROUP BY h.window_start, 2 ORDER BY h.window_start"), &all)
            .await;
    }
    // Windows of months, and days of another clock: that of 2024-03-31 has 23 hours.
    let one = "(SELECT TIMESTAMP '2024-03-31T12:00:00Z' AS ts)";
    check(
        &format!("SELECT window_start, window_end FROM HOP({one}, ts, '1 month', '2 months') ORDER BY 1"),
        &["2024-02-01T00:00:00|2024-04-01T00:00:00", "2024-03-01T00:00:00|2024-05-01T00:00:00"],
    )
    .await;
    check(
        &format!("SELECT window_start, window_end FROM HOP({one}, ts, '1 day', '2 days', 'Europe/Berlin') ORDER BY 1"),
        &["2024-03-29T23:00:00|2024-03-31T22:00:00", "2024-03-30T23:00:00|2024-04-01T22:00:00"],
    )
    .await;
}

#[tokio::test]
async fn what_makes_no_windows_is_refused() {
    let session = session(1);
    readings(&session, "t", &[], 1);
    for (arguments, word) in [
        ("t, ts, '5 minutes', '7 minutes'", "not a whole number of hops"),
        ("t, ts, '5 minutes', '1 minute'", "not a whole number of hops"),
        ("t, ts, '1 month', '30 days'", "not a whole number of hops"),
        ("t, ts, '1 second', '1001 seconds'", "1001 windows, and may lie in 1000"),
        ("t, ts, '0 seconds', '1 second'", "a width is"),
        ("t, ts, '5 minutes'", "HOP takes a table"),
        ("t", "HOP takes a table"),
        ("t, v, '1 minute', '5 minutes'", "no timestamp"),
        ("t, ts + INTERVAL '1 hour', '1 minute', '5 minutes'", "HOP takes a table"),
        ("t, ts, device, '5 minutes'", "not constant"),
        ("(SELECT ts, n AS window_end FROM t), ts, '1 minute', '5 minutes'", "this table has one"),
    ] {
        match batches(&session, &format!("SELECT * FROM HOP({arguments})")).await {
            Ok(rows) => panic!("{arguments}: {rows:?}"),
            Err(error) => assert!(error.to_string().contains(word), "{arguments}: {error}"),
        }
    }
}

/// Some seconds from 10 minutes on, a few of them without a time.
fn some(random: &mut StdRng, count: usize) -> Vec<Reading> {
    let reading = |_| Reading {
        device: [Some("a"), Some("b"), None][random.random_range(0..3)],
        second: (!random.random_bool(0.05)).then(|| random.random_range(600..1_200)),
        value: None,
        number: Some(random.random_range(0..100)),
    };
    (0..count).map(reading).collect()
}

#[tokio::test]
async fn conditions_on_windows_and_times_mean_the_same_wherever_they_are_asked() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for round in 0..60 {
        let session = session([1, 2, 7][round % 3]);
        let rows = some(&mut random, 400);
        readings(&session, "t", &rows, 3);
        let hop = [1, 5, 30][random.random_range(0..3)];
        let size = hop * [1, 2, 3, 20][random.random_range(0..4)];
        let moment = |random: &mut StdRng| {
            // On the grid, or beside it.
            let second = random.random_range(500..1_300) / hop * hop + i64::from(random.random_bool(0.3));
            format!("TIMESTAMP '2024-01-01T00:{:02}:{:02}Z'", second / 60, second % 60)
        };
        let mut conditions = vec!["true".to_owned()];
        for _ in 0..random.random_range(0..4) {
            let column = ["window_start", "window_end", "ts"][random.random_range(0..3)];
            let op = [">=", ">", "<", "<=", "="][random.random_range(0..5)];
            conditions.push(match random.random_range(0..4) {
                0 => format!("{} {op} {column}", moment(&mut random)),
                1 => format!("{column} BETWEEN {} AND {}", moment(&mut random), moment(&mut random)),
                _ => format!("{column} {op} {}", moment(&mut random)),
            });
        }
        let filter = conditions.join(" AND ");
        let asked = "SELECT window_start, window_end, device, count(*), sum(n)";
        let hopped = format!(
            "{asked} FROM HOP(t, ts, '{hop} seconds', '{size} seconds') WHERE {filter} GROUP BY 1, 2, 3 ORDER BY 1, 3"
        );
        let joined = format!(
            "{asked} FROM (SELECT w.window_start, w.window_start + INTERVAL '{size} seconds' AS window_end, t.* FROM t JOIN \
             (SELECT arrow_cast(1704067200000000 + s * 1000000, 'Timestamp(Microsecond, Some(\"UTC\"))') AS window_start \
             FROM (SELECT unnest(range(0, 1500, {hop})) AS s) AS r) w ON t.ts >= w.window_start \
             AND t.ts < w.window_start + INTERVAL '{size} seconds') AS q WHERE {filter} GROUP BY 1, 2, 3 ORDER BY 1, 3"
        );
        let (hopped, joined) = (rows_in(&session, &hopped).await, rows_in(&session, &joined).await);
        assert_eq!(hopped, joined, "round {round}, seed {seed}: {hop} {size} {filter}");
    }
}

#[tokio::test]
async fn a_condition_on_windows_leaves_out_rows_before_they_come_in_any() {
    let session = session(1);
    readings(&session, "t", &[], 1);
    let hop = "SELECT window_start, count(*) FROM HOP(t, ts, '5 minutes', '15 minutes') WHERE";
    for (filter, expected) in [
        ("window_start >= '2024-01-01T05:00:00Z'", "ts@0 >= 1704085200000000"),
        ("window_start < '2024-01-01T05:00:00Z'", "ts@0 < 1704085800000000"),
        ("window_start = '2024-01-01T05:00:00Z'", "ts@0 >= 1704085200000000 AND ts@0 < 1704086100000000"),
        ("window_end > '2024-01-01T05:00:00Z'", "ts@0 >= 1704084600000000"),
        ("window_end <= '2024-01-01T05:00:00Z'", "ts@0 < 1704085200000000"),
        ("ts >= '2024-01-01T05:00:00Z'", "ts@0 >= 1704085200000000"),
    ] {
        let plan = plan(&session, &format!("{hop} {filter} GROUP BY 1")).await.unwrap();
        let plan = session.state().create_physical_plan(&plan).await.unwrap();
        let plan = displayable(plan.as_ref()).indent(false).to_string();
        let below = plan.split("HopExec").nth(1).unwrap_or_else(|| panic!("{plan}"));
        assert!(below.contains(expected), "{filter}: {plan}");
    }
}

#[tokio::test]
async fn rows_come_in_batches_however_many_windows_they_have() {
    let session = session(1);
    let mut random = StdRng::seed_from_u64(1);
    let rows = some(&mut random, 100);
    readings(&session, "t", &rows, 1);
    let batches = batches(&session, "SELECT * FROM HOP(t, ts, '1 second', '1000 seconds')").await.unwrap();
    assert!(batches.iter().all(|batch| batch.num_rows() <= 64), "more than a batch at a time");
    let timed = rows.iter().filter(|row| row.second.is_some()).count();
    assert_eq!(batches.iter().map(RecordBatch::num_rows).sum::<usize>(), 1_000 * timed);
}
