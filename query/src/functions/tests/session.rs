use std::collections::BTreeMap;

use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::physical_plan::displayable;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::functions::session::Silence;

#[tokio::test]
async fn rows_that_come_within_the_gap_are_one_session() {
    let t = "(SELECT d, arrow_cast(1704103200000000 + s * 60000000, 'Timestamp(Microsecond, None)') AS ts FROM (VALUES ('a', 0), ('a', 4), \
             ('a', 9), ('a', 9), ('b', 2), (NULL, 3), (NULL, 7), ('a', NULL), ('a', 13)) AS q(d, s))";
    let all = ["a|10:00:00|10:09:00|2", "a|10:09:00|10:18:00|3", "b|10:02:00|10:07:00|1", "NULL|10:03:00|10:12:00|2"];
    for gap in ["INTERVAL '5 minutes'", "'5 minutes'", "'5 minutes', '2 hours'"] {
        for called in ["", " AS s", " s(d, ts, window_start, window_end)"] {
            let select = "SELECT d, CAST(window_start AS TIME), CAST(window_end AS TIME), count(*) FROM";
            // A row that comes a gap after another is not of its session.
            check(&format!("{select} SESSION({t}, ts, d, {gap}){called} GROUP BY 1, 2, 3 ORDER BY 1, 2"), &all).await;
        }
    }
    let two = "(SELECT 'a' AS d, v AS e, TIMESTAMP '2024-01-01T10:00:00' AS ts FROM (VALUES (1), (2), (1)) AS q(v))";
    for (keys, sessions) in [("(d, e)", "2"), ("(d)", "1"), ("d", "1"), ("session.e", "2")] {
        check(
            &format!(
                "SELECT count(*) FROM (SELECT DISTINCT d, window_start, {} FROM session({two}, ts, {keys}, '1 second')) q",
                if keys == "(d)" || keys == "d" { "1" } else { "e" }
            ),
            &[sessions],
        )
        .await;
    }
}

#[tokio::test]
async fn a_session_that_does_not_end_is_cut() {
    // A reading an hour, for three days from 20:30 on; and one day that is over before it has lasted a day.
    let of = |device: &str, hours: i64| {
        format!(
            "SELECT '{device}' AS device, arrow_cast(1704141000000000 + h * 3600000000, 'Timestamp(Microsecond, None)') AS ts FROM \
             (SELECT unnest(range(0, {hours})) AS h) AS r"
        )
    };
    let t = format!("({} UNION ALL {})", of("always", 72), of("short", 24));
    check(
        &format!(
            "SELECT device, window_start, window_end, count(*) FROM SESSION({t}, ts, device, '2 hours') GROUP BY 1, 2, 3 ORDER BY 1, 2"
        ),
        &[
            "always|2024-01-01T20:30:00|2024-01-03T01:30:00|28",
            "always|2024-01-03T00:30:00|2024-01-04T01:30:00|24",
            "always|2024-01-04T00:30:00|2024-01-04T21:30:00|20",
            "short|2024-01-01T20:30:00|2024-01-02T21:30:00|24",
        ],
    )
    .await;
}

/// Without some of its rows a session would be several.
#[tokio::test]
async fn a_volatile_condition_leaves_rows_out_of_sessions_and_not_out_of_what_they_are_made_of() {
    let t = "(SELECT 'a' AS device, arrow_cast(1704103200000000 + m * 60000000, 'Timestamp(Microsecond, None)') AS ts FROM \
             (SELECT unnest(range(0, 600)) AS m) AS r)";
    let session = format!("SESSION({t}, ts, device, '90 seconds')");
    for sessions in [
        format!("{session} WHERE random() < 0.5"),
        format!("{session} AS s WHERE s.device = 'a' AND random() < 0.5"),
        format!(
            "(SELECT device, window_start FROM {session}) AS q WHERE CAST(random() AS TEXT) < '0.5' OR device = 'b'"
        ),
    ] {
        check(&format!("SELECT count(DISTINCT window_start) FROM {sessions}"), &["1"]).await;
        let some = format!("SELECT count(*) BETWEEN 100 AND 500 FROM {sessions}");
        check(&some, &["true"]).await;
    }
}

#[tokio::test]
async fn what_makes_no_sessions_is_refused() {
    let session = session(1);
    readings(&session, "t", &[], 1);
    for (arguments, word) in [
        ("t, ts, device, '0 seconds'", "and positive"),
        ("t, ts, device, '1 month'", "days and shorter"),
        ("t, ts, device, 'soon'", "days and shorter"),
        ("t, ts, device, '2 days'", "longer than the cut"),
        ("t, ts, device, '2 days', '4000 days'", "longer than the cut"),
        ("t, ts, device, v", "not constant"),
        ("t, ts, device", "SESSION takes a table"),
        ("t, ts, device, '1 hour', '1 day', 'UTC'", "SESSION takes a table"),
        ("t, ts, upper(device), '1 hour'", "SESSION takes a table"),
        ("t, ts, 'device', '1 hour'", "SESSION takes a table"),
        ("t", "SESSION takes a table"),
        ("t, v, device, '1 minute'", "no timestamp"),
        ("t, ts, nothing, '1 minute'", "nothing"),
        ("(SELECT ts, device, n AS window_end FROM t), ts, device, '1 minute'", "this table has one"),
    ] {
        match batches(&session, &format!("SELECT * FROM SESSION({arguments})")).await {
            Ok(rows) => panic!("{arguments}: {rows:?}"),
            Err(error) => assert!(error.to_string().contains(word), "{arguments}: {error}"),
        }
    }
}

/// 2000-01-03, from which buckets are counted.
const MONDAY: i64 = 946_857_600;

/// Rows that come in bursts, a few of them without a time.
fn some(random: &mut StdRng, count: usize) -> Vec<Reading> {
    let mut at = 600;
    let reading = |_| {
        at += [0, 0, 1, 2, 3, 5, 9, 40][random.random_range(0..8)];
        Reading {
            device: [Some("a"), Some("b"), None][random.random_range(0..3)],
            second: (!random.random_bool(0.05)).then_some(at),
            value: None,
            number: Some(random.random_range(0..100)),
        }
    };
    let mut rows: Vec<Reading> = (0..count).map(reading).collect();
    for _ in 0..count {
        let (one, other) = (random.random_range(0..count), random.random_range(0..count));
        rows.swap(one, other);
    }
    rows
}

/// The first and the last row of the session of a row among those of its key, in seconds, found the slow way.
fn session_of(at: i64, times: &[i64], gap: i64, cut: i64) -> (i64, i64) {
    // As far as one comes from row to row, to both sides.
    let (mut first, mut last) = (at, at);
    while let Some(before) = times.iter().filter(|time| **time < first && first - **time < gap).min() {
        first = *before;
    }
    while let Some(after) = times.iter().filter(|time| **time > last && **time - last < gap).max() {
        last = *after;
    }
    // Beginnings of buckets from when it has lasted one.
    let bucket = |time: i64| (time - MONDAY).div_euclid(cut);
    let cuts = |time: i64| (bucket(time) - bucket(first + cut - 1)).max(0);
    let own = times.iter().filter(|time| (first..=last).contains(*time) && cuts(**time) == cuts(at));
    own.clone().min().zip(own.max()).map_or((at, at), |(start, last)| (*start, *last))
}

#[test]
fn what_a_row_changes_and_what_tells_a_session_lies_within_reach() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let (mut moved, mut far) = (0, 0);
    for _ in 0..3_000 {
        let gap = random.random_range(1..6);
        let cut = gap + random.random_range(0..12);
        let silence = Silence::new(gap * 1_000_000, cut * 1_000_000).unwrap();
        let reach = silence.reach_us() / 1_000_000;
        let mut at = MONDAY + random.random_range(0..50);
        let count = random.random_range(2..40);
        let mut times = vec![at];
        for _ in 1..count {
            at += random.random_range(0..gap + 2);
            times.push(at);
        }
        let sessions = |times: &[i64]| -> BTreeMap<i64, (i64, usize)> {
            let mut ends = BTreeMap::new();
            for time in times {
                let (start, last) = session_of(*time, times, gap, cut);
                ends.entry(last + gap).or_insert((start, 0)).1 += 1;
            }
            ends
        };
        let all = sessions(&times);
        let from = random.random_range(times[0]..=times[count - 1]);
        let to = from + random.random_range(1..20);
        let (since, until) = silence.rows((from * 1_000_000, to * 1_000_000));
        let known: Vec<i64> =
            times.iter().copied().filter(|time| (since..until).contains(&(time * 1_000_000))).collect();
        let known = sessions(&known);
        assert_eq!(
            known.range(from..to).collect::<Vec<_>>(),
            all.range(from..to).collect::<Vec<_>>(),
            "seed {seed}: [{from}, {to}) {gap} {cut} {times:?}"
        );
        let new = times.remove(random.random_range(0..count));
        let before = sessions(&times);
        let is_moved = |end: &i64| before.get(end) != all.get(end);
        for end in before.keys().chain(all.keys()).filter(|end| is_moved(end)) {
            assert!((new..new + reach).contains(end), "seed {seed}: {new} moved {end}: {gap} {cut} {times:?}");
            (moved, far) = (moved + 1, far + usize::from(end - new > cut + gap));
        }
    }
    assert!(moved > 3_000 && far > 100, "{moved} moved, {far} of them far");
}

/// Makes a table (device, ts, v, n, window_start, window_end) of these rows with their sessions, found the slow way.
fn naive(session: &SessionContext, rows: &[Reading], gap: i64, cut: i64) {
    let mut of_device: BTreeMap<Option<&str>, Vec<i64>> = BTreeMap::new();
    for row in rows {
        of_device.entry(row.device).or_default().extend(row.second.map(|second| START_US / 1_000_000 + second));
    }
    let window = |row: &Reading| {
        let (start, last) = session_of(START_US / 1_000_000 + row.second?, &of_device[&row.device], gap, cut);
        Some((start, last + gap))
    };
    let windows: Vec<_> = rows.iter().map(window).collect();
    let moments = |of: &dyn Fn(&(i64, i64)) -> i64| -> ArrayRef {
        let moments = windows.iter().flatten().map(|window| Some(of(window) * 1_000_000));
        Arc::new(moments.collect::<TimestampMicrosecondArray>().with_timezone("UTC"))
    };
    let timed = || rows.iter().filter(|row| row.second.is_some());
    let ts = timed().map(|row| row.second.map(|second| START_US + second * 1_000_000));
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("device", Arc::new(timed().map(|row| row.device).collect::<StringArray>())),
        ("ts", Arc::new(ts.collect::<TimestampMicrosecondArray>().with_timezone("UTC"))),
        ("v", Arc::new(timed().map(|row| row.value).collect::<Float64Array>())),
        ("n", Arc::new(timed().map(|row| row.number).collect::<Int64Array>())),
        ("window_start", moments(&|window| window.0)),
        ("window_end", moments(&|window| window.1)),
    ];
    let batch =
        RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, column)| (name, column, true)));
    session.register_batch("naive", batch.unwrap()).unwrap();
}

#[tokio::test]
async fn sessions_and_conditions_on_them_are_those_of_a_naive_search() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut kept = 0;
    for round in 0..90 {
        let session = session([1, 2, 7][round % 3]);
        let count = random.random_range(1..400);
        let rows = some(&mut random, count);
        readings(&session, "t", &rows, 3);
        let gap = [1, 2, 4, 6, 30][random.random_range(0..5)];
        let cut = gap * [1, 2, 5, 100][random.random_range(0..4)];
        naive(&session, &rows, gap, cut);
        let last = rows.iter().filter_map(|row| row.second).max().unwrap_or(600);
        let mut conditions = vec!["true".to_owned()];
        for _ in 0..random.random_range(0..4) {
            let at = random.random_range(590..last + 20);
            let at = format!("TIMESTAMP '2024-01-01T00:00:00Z' + INTERVAL '{at} seconds'");
            let column = ["window_start", "window_end", "ts"][random.random_range(0..3)];
            let op = [">=", ">", "<", "<=", "="][random.random_range(0..5)];
            conditions.push(match random.random_range(0..6) {
                0 => format!("{at} {op} {column}"),
                1 => format!("{column} BETWEEN {at} AND {at} + INTERVAL '1 minute'"),
                2 => "device = 'a'".to_owned(),
                3 => format!("n < {}", random.random_range(0..100)),
                4 => "(device = 'b' OR n > 50)".to_owned(),
                _ => format!("{column} {op} {at}"),
            });
        }
        let filter = conditions.join(" AND ");
        let asked = |from: &str| {
            format!("SELECT device, ts, n, window_start, window_end FROM {from} WHERE {filter} ORDER BY 1, 2, 3, 4, 5")
        };
        let sessions = asked(&format!("SESSION(t, ts, device, '{gap} seconds', '{cut} seconds')"));
        let (sessions, naive) = (rows_in(&session, &sessions).await, rows_in(&session, &asked("naive")).await);
        assert_eq!(sessions, naive, "round {round}, seed {seed}: {gap} {cut} {filter}");
        kept += naive.len();
    }
    assert!(kept > 1_000, "hardly a row was left to compare: {kept}");
}

#[tokio::test]
async fn conditions_go_below_as_far_as_sessions_stay_whole() {
    let session = session(1);
    readings(&session, "t", &[], 1);
    let select = "SELECT device, window_end, sum(n) FROM SESSION(t, ts, device, '1 hour', '3 hours') WHERE";
    let at = "'2024-01-01T10:00:00Z'";
    for (filter, expected, not) in [
        // 02:00, 11:00, 18:00 and 18:00:00.000001.
        (format!("window_end >= {at}"), "ts@1 >= 1704074400000000", "ts@1 <"),
        (format!("window_end < {at}"), "ts@1 < 1704103200000001", "ts@1 >="),
        (format!("window_start >= {at}"), "ts@1 >= 1704078000000000", "ts@1 <"),
        (format!("window_start <= {at}"), "ts@1 < 1704132000000001", "ts@1 >="),
        (format!("ts > {at}"), "ts@1 >= 1704078000000000", "ts@1 <"),
        (format!("ts = {at}"), "ts@1 < 1704132000000001", "ts@1 ="),
        ("device = 'a'".to_owned(), "device@0 = a", "ts@1"),
        ("n = 5".to_owned(), "", "n@2 = 5"),
        ("(device = 'a' OR n = 5)".to_owned(), "", "device@0 = a"),
    ] {
        let plan = plan(&session, &format!("{select} {filter} GROUP BY 1, 2")).await.unwrap();
        let plan = session.state().create_physical_plan(&plan).await.unwrap();
        let plan = displayable(plan.as_ref()).indent(false).to_string();
        let below = plan.split("SessionExec").nth(1).unwrap_or_else(|| panic!("{plan}"));
        let below = below.split_once('\n').map_or("", |(_, below)| below);
        let is_right =
            below.contains(expected) && !below.lines().any(|line| line.contains("FilterExec") && line.contains(not));
        assert!(is_right, "{filter}: {plan}");
    }
}

#[tokio::test]
async fn only_rows_of_a_session_that_goes_on_are_held() {
    let runtime = RuntimeEnvBuilder::new().with_memory_limit(100_000, 1.0).build_arc().unwrap();
    let config = SessionConfig::new().with_target_partitions(1).with_batch_size(64);
    let session = SessionContext::new_with_state(state(config, runtime, GAPFILL_ROWS_MAX));
    let tables: Arc<dyn Tables> = Arc::new(NoTables);
    register(&session, &tables, &Arc::new(LatestCache::new(1 << 20))).unwrap();
    let row = |second| Reading { device: Some("a"), second: Some(second), value: Some(1.0), number: Some(second) };
    readings(&session, "unordered", &(0..20_000).map(row).collect::<Vec<_>>(), 1);
    let rows = session.table("unordered").await.unwrap();
    let schema = Arc::new(rows.schema().as_arrow().clone());
    let ordered = MemTable::try_new(schema, vec![rows.collect().await.unwrap()]).unwrap();
    let order = ["device", "ts"].map(|column| datafusion::prelude::col(column).sort(true, true));
    session.register_table("t", Arc::new(ordered.with_sort_order(vec![order.to_vec()]))).unwrap();
    let select = "SELECT count(*), sum(n) FROM SESSION(t, ts, device,";
    assert_eq!(rows_in(&session, &format!("{select} '1 second')")).await, ["20000|199990000"]);
    let error = batches(&session, &format!("{select} '2 seconds')")).await.unwrap_err().to_string();
    assert!(error.contains("Session"), "{error}");
}
