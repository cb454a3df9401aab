use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

const T: &str = "(VALUES ('a', TIMESTAMP '2024-01-01T00:01:00', 1.0), ('a', TIMESTAMP '2024-01-01T00:01:30', 3.0), \
                 ('a', TIMESTAMP '2024-01-01T00:04:00', 8.0), ('b', TIMESTAMP '2024-01-01T00:02:00', 5.0)) t(device, ts, v)";
const WHERE: &str = "WHERE ts >= TIMESTAMP '2024-01-01T00:00:00' AND ts < TIMESTAMP '2024-01-01T00:05:30'";

/// Bucket as minutes, so that rows are short.
async fn filled(select: &str, rest: &str, expected: &[&str]) {
    let sql = format!(
        "SELECT device, date_part('minute', b) AS m, x FROM \
         (SELECT device, time_bucket_gapfill('1 minute', ts) AS b, {select} AS x FROM {T} {rest}) ORDER BY device, m"
    );
    check(&sql, expected).await;
}

#[tokio::test]
async fn gaps_are_null_and_can_be_filled() {
    let rest = format!("{WHERE} GROUP BY device, b");
    let nulls = [
        "a|0|NULL", "a|1|2.0", "a|2|NULL", "a|3|NULL", "a|4|8.0", "a|5|NULL", "b|0|NULL", "b|1|NULL", "b|2|5.0",
        "b|3|NULL", "b|4|NULL", "b|5|NULL",
    ];
    filled("avg(v)", &rest, &nulls).await;
    filled("avg(v)", &format!("{WHERE} GROUP BY 1, 2"), &nulls).await;
    filled(
        "locf(avg(v))",
        &rest,
        &[
            "a|0|NULL", "a|1|2.0", "a|2|2.0", "a|3|2.0", "a|4|8.0", "a|5|8.0", "b|0|NULL", "b|1|NULL", "b|2|5.0",
            "b|3|5.0", "b|4|5.0", "b|5|5.0",
        ],
    )
    .await;
    filled(
        "interpolate(avg(v))",
        &rest,
        &[
            "a|0|NULL", "a|1|2.0", "a|2|4.0", "a|3|6.0", "a|4|8.0", "a|5|NULL", "b|0|NULL", "b|1|NULL", "b|2|5.0",
            "b|3|NULL", "b|4|NULL", "b|5|NULL",
        ],
    )
    .await;
    filled(
        "coalesce(count(*), 0)",
        &rest,
        &["a|0|0", "a|1|2", "a|2|0", "a|3|0", "a|4|1", "a|5|0", "b|0|0", "b|1|0", "b|2|1", "b|3|0", "b|4|0", "b|5|0"],
    )
    .await;
    // Several in one list, around expressions, and the same twice.
    filled(
        "locf(max(v) * 2) - locf(min(v)) + locf(max(v) * 2) * 0",
        &rest,
        &[
            "a|0|NULL", "a|1|5.0", "a|2|5.0", "a|3|5.0", "a|4|8.0", "a|5|8.0", "b|0|NULL", "b|1|NULL", "b|2|5.0",
            "b|3|5.0", "b|4|5.0", "b|5|5.0",
        ],
    )
    .await;
    // A group that HAVING leaves out is a gap.
    filled(
        "locf(avg(v))",
        &format!("{rest} HAVING count(*) > 1"),
        &["a|0|NULL", "a|1|2.0", "a|2|2.0", "a|3|2.0", "a|4|2.0", "a|5|2.0"],
    )
    .await;
}

#[tokio::test]
async fn where_it_begins_and_ends() {
    let count = async |bucket: &str, rest: &str, expected: &str| {
        let sql = format!("SELECT count(*) FROM (SELECT {bucket} AS b, avg(v) FROM {T} {rest} GROUP BY b)");
        check(&sql, &[expected]).await;
    };
    let minute = "time_bucket_gapfill('1 minute', ts)";
    count(minute, WHERE, "6").await;
    count(minute, "WHERE ts BETWEEN '2024-01-01T00:00:00' AND '2024-01-01T00:05:00'", "6").await;
    count(minute, "WHERE ts > '2023-12-31T23:59:59' AND '2024-01-01T00:05:00' > ts AND v > 0", "6").await;
    let explicit =
        "time_bucket_gapfill('1 minute', ts, TIMESTAMP '2024-01-01T00:00:00', TIMESTAMP '2024-01-01T00:10:00')";
    count(explicit, "", "10").await;
    // Arguments win over WHERE; what is outside of them stays.
    count(explicit, "WHERE ts >= '2024-01-01T00:04:00'", "10").await;
    let late = "time_bucket_gapfill('1 minute', ts, TIMESTAMP '2024-01-01T00:10:00', TIMESTAMP '2024-01-01T00:12:00')";
    count(late, "", "5").await;
    // Without other keys the range comes also when nothing was read.
    count(minute, "WHERE ts >= '2025-01-01T00:00:00' AND ts < '2025-01-01T01:00:00'", "60").await;
    let now = "WHERE ts >= now() - INTERVAL '1 hour' AND ts < now()";
    let rows = rows_in(&session(1), &format!("SELECT {minute} AS b, count(*) FROM {T} {now} GROUP BY b")).await;
    assert!(rows.len() == 60 || rows.len() == 61, "{rows:?}");
    check(
        &format!("SELECT device, {minute} AS b FROM {T} WHERE ts >= '2025-01-01' AND ts < '2025-01-02' GROUP BY 1, 2"),
        &[],
    )
    .await;
}

#[tokio::test]
async fn days_of_a_zone_are_23_and_25_hours() {
    let sql = "SELECT b, n FROM (SELECT time_bucket_gapfill('1 day', ts, 'Europe/Berlin') AS b, count(*) AS n \
               FROM (VALUES (TIMESTAMP '2024-03-30T12:00:00Z')) t(ts) \
               WHERE ts >= '2024-03-29T23:00:00' AND ts < '2024-04-01T22:00:00' GROUP BY b) ORDER BY b";
    check(sql, &["2024-03-29T23:00:00|1", "2024-03-30T23:00:00|NULL", "2024-03-31T22:00:00|NULL"]).await;
}

#[tokio::test]
async fn inside_other_queries() {
    let inner = format!(
        "SELECT time_bucket_gapfill('1 minute', ts) AS b, device, locf(last(v, ts)) AS v FROM {T} {WHERE} GROUP BY b, device"
    );
    check(&format!("WITH g AS ({inner}) SELECT count(*), count(v) FROM g"), &["12|9"]).await;
    check(&format!("SELECT count(*) FROM ({inner}) WHERE device = 'b'"), &["6"]).await;
    check(&format!("SELECT count(*) FROM ({inner}) WHERE v > 6"), &["2"]).await;
    check(&format!("SELECT (SELECT max(v) FROM ({inner}))"), &["8.0"]).await;
    check(&format!("SELECT count(*) FROM ({inner} UNION ALL {inner})"), &["24"]).await;
    let windowed = format!(
        "SELECT device, time_bucket_gapfill('2 minutes', ts) AS b, locf(sum(v)) AS s, \
         row_number() OVER (PARTITION BY device ORDER BY time_bucket_gapfill('2 minutes', ts)) AS n \
         FROM {T} {WHERE} GROUP BY 1, 2"
    );
    check(
        &format!("SELECT device, n, s FROM ({windowed}) ORDER BY device, n"),
        &["a|1|4.0", "a|2|4.0", "a|3|8.0", "b|1|NULL", "b|2|5.0", "b|3|5.0"],
    )
    .await;
}

#[tokio::test]
async fn what_cannot_be_told_is_refused() {
    let minute = "time_bucket_gapfill('1 minute', ts)";
    refused(&format!("SELECT {minute} AS b FROM {T} GROUP BY b"), "where to begin").await;
    refused(&format!("SELECT {minute} AS b FROM {T} WHERE ts > '2024-01-01' GROUP BY b"), "where to begin").await;
    refused(&format!("SELECT {minute} FROM {T}"), "GROUP BY").await;
    refused(&format!("SELECT locf(v) FROM {T}"), "SELECT list").await;
    refused(&format!("SELECT locf(avg(v)) FROM {T} GROUP BY device"), "SELECT list").await;
    refused(&format!("SELECT {minute} + INTERVAL '1 hour' AS b FROM {T} {WHERE} GROUP BY b"), "alone").await;
    refused(&format!("SELECT {minute} AS b, interpolate(max(device)) FROM {T} {WHERE} GROUP BY b"), "no number").await;
    // In one series, and in many together.
    let long = "WHERE ts >= '2024-01-01' AND ts < '2024-01-31'";
    refused(&format!("SELECT {minute} AS b FROM {T} {long} GROUP BY b"), "more than 10000 buckets").await;
    let days = "WHERE ts >= '2024-01-01' AND ts < '2024-01-05'";
    check(&format!("SELECT count(*) FROM (SELECT {minute} AS b FROM {T} {days} GROUP BY b)"), &["5760"]).await;
    refused(&format!("SELECT {minute} AS b, device FROM {T} {days} GROUP BY b, device"), "more than 10000 rows").await;
}

/// Last value before a bucket of a series, or the line between its neighbours.
fn expected(rows: &[Reading], width: i64, from: i64, to: i64) -> Vec<String> {
    let mut series: BTreeMap<&str, BTreeMap<i64, Vec<f64>>> = BTreeMap::new();
    for row in rows {
        let second = row.second.unwrap();
        if (from..to).contains(&second) {
            let buckets = series.entry(row.device.unwrap()).or_default();
            buckets.entry(second.div_euclid(width) * width).or_default().extend(row.value);
        }
    }
    let mut told = Vec::new();
    for (device, buckets) in series {
        let sums: BTreeMap<i64, f64> = buckets
            .into_iter()
            .filter(|(_, values)| !values.is_empty())
            .map(|(at, values)| (at, values.iter().sum()))
            .collect();
        let mut bucket = from.div_euclid(width) * width;
        while bucket < to {
            let value = sums.get(&bucket).copied();
            let before = sums.range(..=bucket).next_back().map(|(at, sum)| (*at, *sum));
            let after = sums.range(bucket..).next().map(|(at, sum)| (*at, *sum));
            let line = value.or_else(|| {
                let ((low, a), (high, b)) = (before?, after?);
                Some(a + (b - a) * (bucket - low) as f64 / (high - low) as f64)
            });
            let text = |value: Option<f64>| value.map_or("NULL".to_owned(), |value| format!("{value:.6}"));
            told.push(format!("{device}|{bucket}|{}|{}|{}", text(value), text(before.map(|(_, sum)| sum)), text(line)));
            bucket += width;
        }
    }
    told.sort();
    told
}

#[tokio::test]
async fn as_a_naive_computation_has_it() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for round in 0..10 {
        let devices = ["a", "b", "c", "d", "e"];
        let rows: Vec<Reading> = (0..random.random_range(1..300))
            .map(|_| Reading {
                device: Some(devices[random.random_range(0..5)]),
                second: Some(random.random_range(0..3_000)),
                value: random.random_bool(0.8).then(|| f64::from(random.random_range(-50..50))),
                number: None,
            })
            .collect();
        let width = random.random_range(1..400);
        // The grid of seconds and that of time_bucket meet where the width divides their distance.
        let origin = "TIMESTAMP '2024-01-01T00:00:00Z'";
        let from = random.random_range(0..1_500);
        let to = from + random.random_range(1..1_500);
        let wanted = expected(&rows, width, from, to);
        for partitions in [1, 2, 7] {
            let session = session(partitions);
            readings(&session, "t", &rows, 3);
            // Shifted, so that the buckets begin at the epoch of the test.
            let sql = format!(
                "SELECT device, date_part('epoch', b) - date_part('epoch', {origin}), s, l, i FROM (SELECT device, \
                 time_bucket_gapfill('{width} seconds', ts) AS b, sum(v) AS s, locf(sum(v)) AS l, interpolate(sum(v)) AS i \
                 FROM (SELECT device, ts + INTERVAL '{shift} seconds' AS ts, v FROM t) \
                 WHERE ts >= {origin} + INTERVAL '{} seconds' AND ts < {origin} + INTERVAL '{} seconds' GROUP BY 1, 2)",
                from + shift(width),
                to + shift(width),
                shift = shift(width),
            );
            let mut got: Vec<String> = Vec::new();
            for row in rows_in(&session, &sql).await {
                let values: Vec<&str> = row.split('|').collect();
                let bucket = values[1].parse::<f64>().unwrap() as i64 - shift(width);
                let text = |value: &str| value.parse::<f64>().map_or("NULL".to_owned(), |value| format!("{value:.6}"));
                got.push(format!("{}|{bucket}|{}|{}|{}", values[0], text(values[2]), text(values[3]), text(values[4])));
            }
            got.sort();
            assert_eq!(got, wanted, "round {round}, {partitions} partitions, width {width}, {from}..{to}, seed {seed}");
        }
    }
}

/// Seconds from the test's first instant to the next bucket of this width.
fn shift(width: i64) -> i64 {
    let monday = 10_959 * 86_400;
    let start = START_US / 1_000_000 - monday;
    (width - start.rem_euclid(width)) % width
}
