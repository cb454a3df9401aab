//! Sessions that a late row makes longer, joins, or begins; and those that do not end.

use super::limits::{Stage, at, limits};
use super::{Row, SECOND, START, words};

const VIEW: &str = "CREATE MATERIALIZED VIEW kept WITH (lateness = '1 minute') AS SELECT device, window_start, window_end, \
                    count(*) AS n FROM SESSION(traffic, ts, device, '2 minutes', '1 hour') GROUP BY 1, 2, 3";
/// What is told of the windows of each revision: when it ended, whose session it was, since when, and of how many rows.
const TOLD: &str = "SELECT right(CAST(view_window AS TEXT), 9), view_revision, device, right(CAST(window_start AS TEXT), 9), n \
                    FROM kept_changes WHERE view_window = view_end";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_row_makes_sessions_longer_joins_them_and_begins_others() {
    let mut kept = Stage::new(VIEW, limits()).await;
    // d0 at 0:00, 0:01 and 0:05; d1 with it at 0:01.
    for seconds in [&[0, 60][..], &[60], &[300]] {
        kept.arrive(0, seconds, at(300));
    }
    kept.settle(at(300)).await;
    let mut told = vec!["00:03:00Z | 1 | d0 | 00:00:00Z | 2", "00:03:00Z | 1 | d1 | 00:01:00Z | 1"];
    assert_eq!(kept.numbers(TOLD).await, told);
    kept.arrive(0, &[3_000], at(3_000));
    kept.settle(at(3_000)).await;
    told.push("00:07:00Z | 1 | d0 | 00:05:00Z | 1");
    assert_eq!(kept.numbers(TOLD).await, told);
    // Two minutes after a row is not within two minutes.
    kept.arrive(1, &[180], at(3_000));
    kept.settle(at(3_000)).await;
    told.insert(2, "00:05:00Z | 1 | d0 | 00:03:00Z | 1");
    assert_eq!(kept.numbers(TOLD).await, told);
    // One joins all three, behind a restart: what ended at 0:03 is d1's alone, and at 0:05 nothing has ended.
    kept.arrive(1, &[179, 185], at(3_000));
    kept.runner = None;
    kept.city.restart();
    kept.arrive(2, &[299], at(3_000));
    kept.settle(at(3_000)).await;
    let shown = "SELECT right(CAST(window_end AS TEXT), 9), device, right(CAST(window_start AS TEXT), 9), n FROM";
    let asked = format!(
        "{shown} (SELECT device, window_start, window_end, count(*) AS n FROM SESSION(traffic, ts, device, '2 minutes', \
         '1 hour') GROUP BY 1, 2, 3) q WHERE window_end < '2024-01-01T00:30:00Z'"
    );
    let batch = ["00:05:05Z | d1 | 00:03:05Z | 1", "00:07:00Z | d0 | 00:00:00Z | 6", "00:03:00Z | d1 | 00:01:00Z | 1"];
    let mut batch = batch.map(str::to_owned).to_vec();
    batch.sort();
    assert_eq!(kept.numbers(&asked).await, batch);
    let told = [
        "00:03:00Z | 1 | d0 | 00:00:00Z | 2",
        "00:03:00Z | 1 | d1 | 00:01:00Z | 1",
        "00:03:00Z | 2 | d1 | 00:01:00Z | 1",
        "00:05:00Z | 1 | d0 | 00:03:00Z | 1",
        "00:05:00Z | 2 | null | null | null",
        "00:05:05Z | 1 | d1 | 00:03:05Z | 1",
        "00:07:00Z | 1 | d0 | 00:05:00Z | 1",
        "00:07:00Z | 2 | d0 | 00:00:00Z | 6",
    ];
    assert_eq!(kept.numbers(TOLD).await, told);
    // The last of all is over when an edge says so, though no row comes behind it.
    let last = Row { ts: START + 4_000 * SECOND, device: "d0".to_owned(), value: None, text: None };
    let told_by = Some(START + 9_000 * SECOND);
    kept.city.arrive(&words::stream("traffic"), 3, &[last], told_by, at(9_000).wall_us);
    kept.settle(at(9_000)).await;
    let last = ["00:52:00Z | 1 | d0 | 00:50:00Z | 1", "01:08:40Z | 1 | d0 | 01:06:40Z | 1"];
    assert_eq!(kept.numbers(TOLD).await, [&told[..], &last].concat());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_does_not_end_is_told_in_pieces_and_one_late_row_changes_few_of_them() {
    let mut kept = Stage::new(VIEW, limits()).await;
    // A reading a minute for six hours from 0:30 on, but for the one of 1:10.
    for minute in (30..390).filter(|minute| *minute != 70) {
        kept.arrive(0, &[minute * 60], at(minute * 60));
        if minute % 7 == 0 {
            kept.settle(at(minute * 60)).await;
        }
    }
    kept.settle(at(390 * 60)).await;
    let first = |revision: &str, rest: &[&str]| {
        let all = rest.iter().map(|piece| (*piece).to_owned());
        all.map(|piece| piece.replace('R', revision)).collect::<Vec<_>>()
    };
    let pieces = [
        "01:11:00Z | 1 | d0 | 00:30:00Z | 40",
        "03:01:00Z | 1 | d0 | 01:11:00Z | 109",
        "04:01:00Z | 1 | d0 | 03:00:00Z | 60",
        "05:01:00Z | 1 | d0 | 04:00:00Z | 60",
        "06:01:00Z | 1 | d0 | 05:00:00Z | 60",
    ];
    assert_eq!(kept.numbers(TOLD).await, first("1", &pieces));
    // Now it has gone on since 0:30, for an hour and more at 2:00.
    kept.arrive(1, &[70 * 60], at(390 * 60));
    kept.settle(at(390 * 60)).await;
    let told = [
        pieces[0],
        "01:11:00Z | 2 | null | null | null",
        "02:01:00Z | 1 | d0 | 00:30:00Z | 90",
        pieces[1],
        "03:01:00Z | 2 | d0 | 02:00:00Z | 60",
        pieces[2],
        pieces[3],
        pieces[4],
    ];
    assert_eq!(kept.numbers(TOLD).await, told);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_asked_by_their_names_and_null_is_one() {
    let sql = "CREATE MATERIALIZED VIEW kept AS SELECT road, device, window_end, count(*) AS n FROM SESSION(traffic, ts, \
               (road, device), '2 minutes', '1 hour') GROUP BY 1, 2, 3";
    let mut kept = Stage::new(sql, limits()).await;
    let arrive = |kept: &Stage, minute: i64, rows: &[(&str, Option<&str>)]| {
        let row = |(device, road): &(&str, Option<&str>)| Row {
            ts: START + minute * 60 * SECOND,
            device: (*device).to_owned(),
            value: None,
            text: road.map(str::to_owned),
        };
        let rows: Vec<Row> = rows.iter().map(row).collect();
        kept.city.arrive(&words::stream("traffic"), 0, &rows, Some(rows[0].ts), at(minute * 60).wall_us);
    };
    let (all, none) = ([("d0", Some("a")), ("d0", None), ("d1", Some("a"))], [("d0", Some("b"))]);
    for (minute, rows) in [(0, &none[..]), (1, &all), (2, &all[1..]), (5, &none), (9, &none)] {
        arrive(&kept, minute, rows);
        kept.settle(at(minute * 60)).await;
    }
    let told = "SELECT right(CAST(view_window AS TEXT), 9), view_revision, road, device, n FROM kept_changes \
                WHERE view_window IS NOT NULL";
    let expected = [
        "00:02:00Z | 1 | b | d0 | 1",
        "00:03:00Z | 1 | a | d0 | 1",
        "00:04:00Z | 1 | a | d1 | 2",
        "00:04:00Z | 1 | null | d0 | 2",
        "00:07:00Z | 1 | b | d0 | 1",
    ];
    assert_eq!(kept.numbers(told).await, expected);
}
