use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use super::*;

const T: &str = "(VALUES ('a', 1, 10.0), ('a', 3, 5.0), ('a', 2, 20.0), ('b', 1, 7.0), ('c', 1, NULL), ('d', NULL, 4.0)) \
                 t(device, ts, v)";

async fn by_device(aggregate: &str, expected: [&str; 4]) {
    let rows: Vec<String> =
        ["a", "b", "c", "d"].iter().zip(expected).map(|(device, value)| format!("{device}|{value}")).collect();
    let rows: Vec<&str> = rows.iter().map(String::as_str).collect();
    check(&format!("SELECT device, {aggregate} FROM {T} GROUP BY device ORDER BY device"), &rows).await;
}

#[tokio::test]
async fn groups_of_three_rows_one_row_and_none_that_counts() {
    by_device("first(v, ts)", ["10.0", "7.0", "NULL", "NULL"]).await;
    by_device("last(v, ts)", ["5.0", "7.0", "NULL", "NULL"]).await;
    by_device("last(device, ts)", ["a", "b", "c", "NULL"]).await;
    by_device("first(v > 6, ts)", ["true", "true", "NULL", "NULL"]).await;
    by_device("delta(v, ts)", ["-5.0", "NULL", "NULL", "NULL"]).await;
    // 10 up, then a reset to 5.
    by_device("increase(v, ts)", ["15.0", "NULL", "NULL", "NULL"]).await;
    by_device("rate(v, ts)", ["7.5", "NULL", "NULL", "NULL"]).await;
    by_device("time_weighted_avg(v, ts)", ["15.0", "7.0", "NULL", "NULL"]).await;
    by_device("time_weighted_avg(v, ts, 'linear')", ["13.75", "7.0", "NULL", "NULL"]).await;
    by_device("time_weight('LOCF', ts, v)", ["15.0", "7.0", "NULL", "NULL"]).await;
    by_device("time_weight('Linear', ts, v)", ["13.75", "7.0", "NULL", "NULL"]).await;
    by_device("histogram(v, 5, 20, 3)", ["[0, 1, 1, 0, 1]", "[0, 1, 0, 0, 0]", "NULL", "[1, 0, 0, 0, 0]"]).await;
    by_device("first(v, ts) FILTER (WHERE ts > 1)", ["20.0", "NULL", "NULL", "NULL"]).await;
    by_device("increase(v, ts) FILTER (WHERE ts > 1)", ["5.0", "NULL", "NULL", "NULL"]).await;
    by_device(
        "histogram(v, 5, 20, 3) FILTER (WHERE v < 8)",
        ["[0, 1, 0, 0, 0]", "[0, 1, 0, 0, 0]", "NULL", "[1, 0, 0, 0, 0]"],
    )
    .await;
}

#[tokio::test]
async fn without_groups_and_without_rows() {
    let all = "first(v, ts), last(v, ts), delta(v, ts), increase(v, ts), rate(v, ts), time_weighted_avg(v, ts), \
               histogram(v, 0, 10, 2)";
    check(&format!("SELECT {all} FROM {T} WHERE device = 'a'"), &["10.0|5.0|-5.0|15.0|7.5|15.0|[0, 0, 1, 2]"]).await;
    check(&format!("SELECT {all} FROM {T} WHERE false"), &["NULL|NULL|NULL|NULL|NULL|NULL|NULL"]).await;
    check(&format!("SELECT {all} FROM {T} WHERE false GROUP BY device"), &[]).await;
}

#[tokio::test]
async fn over_a_window() {
    let sql = format!(
        "SELECT ts, last(v, ts) OVER (PARTITION BY device ORDER BY ts), \
                       increase(v, ts) OVER (PARTITION BY device ORDER BY ts) FROM {T} WHERE device = 'a' ORDER BY ts"
    );
    check(&sql, &["1|10.0|NULL", "2|20.0|10.0", "3|5.0|15.0"]).await;
}

#[tokio::test]
async fn ties_are_told_by_value() {
    let t = "(VALUES (1, 3), (1, 1), (1, NULL), (1, 2)) t(ts, v)";
    check(&format!("SELECT first(v, ts), last(v, ts) FROM {t}"), &["1|3"]).await;
    check(&format!("SELECT first(v, ts), last(v, ts) FROM {t} WHERE v IS NULL"), &["NULL|NULL"]).await;
    // One instant is one point, of its greatest value.
    check(&format!("SELECT delta(v, ts), time_weighted_avg(v, ts) FROM {t}"), &["NULL|3.0"]).await;
    let counter = "(VALUES (1, 3), (2, 5), (2, 9), (3, 10)) t(ts, v)";
    check(&format!("SELECT increase(v, ts), delta(v, ts) FROM {counter}"), &["7.0|7.0"]).await;
}

#[tokio::test]
async fn rates_are_per_second_whatever_the_unit() {
    for (unit, per_second) in
        [("Second", 1), ("Millisecond", 1_000), ("Microsecond", 1_000_000), ("Nanosecond", 1_000_000_000)]
    {
        let ts = format!("arrow_cast(s * {per_second}, 'Timestamp({unit}, None)')");
        check(&format!("SELECT rate(v, {ts}) FROM (VALUES (0, 100), (10, 130), (20, 20)) t(s, v)"), &["2.5"]).await;
    }
    check("SELECT rate(v, d) * 86400 FROM (VALUES (DATE '2024-01-01', 1), (DATE '2024-01-03', 5)) t(d, v)", &["2.0"])
        .await;
}

#[tokio::test]
async fn what_makes_no_sense_is_refused() {
    refused(&format!("SELECT last(v) FROM {T}"), "takes a value and a timestamp").await;
    refused(&format!("SELECT last(v, device > 'a') FROM {T}"), "timestamp is needed").await;
    refused(&format!("SELECT last(DISTINCT v, ts) FROM {T}"), "DISTINCT").await;
    refused(&format!("SELECT rate(device, ts) FROM {T}"), "no number").await;
    refused(&format!("SELECT time_weighted_avg(v, ts, 'cubic') FROM {T}"), "'locf' or 'linear'").await;
    refused(&format!("SELECT histogram(v, 5, 5, 3) FROM {T}"), "not below").await;
    refused(&format!("SELECT histogram(v, 5, 6, 0) FROM {T}"), "number of parts").await;
    refused(&format!("SELECT histogram(v, 5, 6, 1000000000) FROM {T}"), "number of parts").await;
    refused(&format!("SELECT histogram(v, v, 6, 3) FROM {T}"), "constants").await;
}

#[tokio::test]
async fn approx_percentile_is_known_by_its_short_name() {
    let t = "(SELECT value::double AS v FROM generate_series(1, 1000))";
    let long = rows_in(&session(1), &format!("SELECT approx_percentile_cont(v, 0.95) FROM {t}")).await;
    let short = rows_in(&session(1), &format!("SELECT approx_percentile(v, 0.95) FROM {t}")).await;
    assert_eq!(short, long);
    let value: f64 = short[0].parse().unwrap();
    assert!((940.0..960.0).contains(&value), "{value}");
}

/// The course of a group's points, computed as the definition reads.
fn naive(rows: &[&Reading]) -> String {
    let mut points: BTreeMap<i64, f64> = BTreeMap::new();
    for row in rows {
        if let (Some(second), Some(value)) = (row.second, row.value) {
            let held = points.entry(second).or_insert(value);
            *held = held.max(value);
        }
    }
    let points: Vec<(i64, f64)> = points.into_iter().collect();
    let at =
        |pick: fn(&[&Reading], i64) -> Option<f64>, second: Option<i64>| second.and_then(|second| pick(rows, second));
    let seconds = || rows.iter().filter_map(|row| row.second);
    fn least(rows: &[&Reading], second: i64) -> Option<f64> {
        rows.iter().filter(|row| row.second == Some(second)).filter_map(|row| row.value).min_by(f64::total_cmp)
    }
    fn greatest(rows: &[&Reading], second: i64) -> Option<f64> {
        rows.iter().filter(|row| row.second == Some(second)).filter_map(|row| row.value).max_by(f64::total_cmp)
    }
    let first = at(least, seconds().min());
    let last = at(greatest, seconds().max());
    let (mut increase, mut area) = (0.0, 0.0);
    for pair in points.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        increase += if b.1 < a.1 { b.1 } else { b.1 - a.1 };
        area += a.1 * (b.0 - a.0) as f64;
    }
    let (mut delta, mut average) = (None, points.first().map(|point| point.1));
    let mut grown = None;
    if points.len() > 1 {
        let (a, b) = (points[0], points[points.len() - 1]);
        delta = Some(b.1 - a.1);
        average = Some(area / (b.0 - a.0) as f64);
        grown = Some(increase);
    }
    [first, last, delta, grown, average]
        .map(|value| value.map_or("NULL".to_owned(), |value| format!("{value:.6}")))
        .join("|")
}

#[tokio::test]
async fn the_same_however_rows_are_spread_and_ordered() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for round in 0..8 {
        let devices = [Some("a"), Some("b"), Some("c"), None];
        let mut rows: Vec<Reading> = (0..random.random_range(1..600))
            .map(|_| Reading {
                device: devices[random.random_range(0..4)],
                second: random.random_bool(0.95).then(|| random.random_range(0..200)),
                value: random.random_bool(0.9).then(|| f64::from(random.random_range(-50..50))),
                number: None,
            })
            .collect();
        let mut groups: BTreeMap<String, Vec<&Reading>> = BTreeMap::new();
        for row in &rows {
            groups.entry(row.device.unwrap_or("NULL").to_owned()).or_default().push(row);
        }
        let mut expected: Vec<String> =
            groups.iter().map(|(device, rows)| format!("{device}|{}", naive(rows))).collect();
        expected.sort();
        for partitions in [1, 2, 7] {
            rows.shuffle(&mut random);
            let session = session(partitions);
            readings(&session, "t", &rows, partitions + 1);
            let sql = "SELECT device, first(v, ts), last(v, ts), delta(v, ts), increase(v, ts), time_weighted_avg(v, ts) \
                       FROM t GROUP BY device";
            let mut got: Vec<String> = Vec::new();
            for row in rows_in(&session, sql).await {
                let mut values = row.split('|');
                let device = values.next().unwrap().to_owned();
                let values: Vec<String> = values
                    .map(|value| value.parse::<f64>().map_or("NULL".to_owned(), |value| format!("{value:.6}")))
                    .collect();
                got.push(format!("{device}|{}", values.join("|")));
            }
            got.sort();
            assert_eq!(got, expected, "round {round}, {partitions} partitions, seed {seed}");
        }
    }
}
