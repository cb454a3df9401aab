use std::collections::BTreeMap;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::config::Settings;

const SECOND: i64 = 1_000_000;

fn settings(more: &str) -> StreamSettings {
    let text = format!(
        "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n\
         [[source]]\nkind = \"host\"\n[stream.s]\n{more}\n[stream.s.fields]\n\
         speed = {{ type = \"float64\" }}\ncars = {{ type = \"int64\" }}\nstate = {{ type = \"text\" }}\n\
         [stream.s.window.10s]\nsize = \"10s\"\n"
    );
    Settings::parse(&text).unwrap().stream.into_values().next().unwrap()
}

fn windows(settings: &StreamSettings) -> Windows {
    Windows::new(&"s".parse().unwrap(), settings)
}

fn reading(second: f64, device: &str, speed: f64, cars: i64) -> Reading {
    Reading {
        ts: (second * SECOND as f64) as i64,
        device: device.to_owned(),
        values: vec![Some(Value::Float(speed)), Some(Value::Int(cars)), Some(Value::Text(format!("{cars}")))],
        untyped: Vec::new(),
        span: 0..0,
    }
}

fn results(rows: &[WindowRow]) -> Vec<(i64, &str, i64, i64)> {
    rows.iter().map(|row| (row.start / SECOND, row.device.as_str(), row.count, row.revision)).collect()
}

/// The places of the fields that its rows carry.
fn fields_of(by: &Grouping) -> &[usize] {
    if let Grouping::Fields { fields, .. } = by { fields } else { &[] }
}

#[test]
fn a_window_closes_when_the_watermark_reaches_its_end() {
    let mut windows = windows(&settings("lateness = \"5s\""));
    windows.add(&reading(1.0, "a", 1.0, 1));
    windows.add(&reading(9.999, "a", 3.0, 2));
    windows.add(&reading(14.999, "b", 5.0, 3));
    assert_eq!(windows.advance(), []);
    windows.add(&reading(15.0, "b", 6.0, 4));
    let rows = windows.advance();
    assert_eq!(results(&rows), [(0, "a", 2, 1)]);
    let float = |value| Some(Value::Float(value));
    let int = |value| Some(Value::Int(value));
    let expected = [float(1.0), float(3.0), float(2.0), float(4.0), float(1.0), float(3.0)];
    assert_eq!(rows[0].values[..6], expected);
    assert_eq!(rows[0].values[6..12], [int(1), int(2), float(1.5), int(3), int(1), int(2)]);
    assert_eq!(rows[0].values[12..], [Some(Value::Text("1".into())), Some(Value::Text("2".into()))]);
    let settings = settings("");
    let window = settings.windows(&"s".parse().unwrap())[0].1;
    assert_eq!(schema(&settings, window).unwrap().fields().len(), 3 + rows[0].values.len() + 1);
}

#[test]
fn a_late_row_reopens_exactly_its_window() {
    let mut windows = windows(&settings("lateness = \"0s\"\nreopen_within = \"60s\""));
    for second in [1.0, 12.0, 25.0] {
        windows.add(&reading(second, "a", second, 1));
    }
    assert_eq!(results(&windows.advance()), [(0, "a", 1, 1), (10, "a", 1, 1)]);
    assert_eq!(windows.add(&reading(0.5, "a", 9.0, 1)), Late::Good);
    assert_eq!(windows.add(&reading(2.0, "b", 9.0, 1)), Late::Good);
    let rows = windows.advance();
    assert_eq!(results(&rows), [(0, "a", 2, 2), (0, "b", 1, 1)]);
    assert_eq!(rows[0].values[4], Some(Value::Float(9.0)), "first goes by event time");
    assert_eq!(windows.advance(), []);
}

#[test]
fn a_row_too_far_behind_enters_no_window() {
    let mut windows = windows(&settings("lateness = \"10s\"\nreopen_within = \"20s\""));
    windows.add(&reading(100.0, "a", 1.0, 1));
    assert_eq!(windows.watermark(), 90 * SECOND);
    assert_eq!(windows.add(&reading(69.999, "a", 1.0, 1)), Late::Late);
    assert_eq!(windows.add(&reading(70.0, "a", 1.0, 1)), Late::Good);
    assert_eq!(results(&windows.advance()), [(70, "a", 1, 1)]);
}

#[test]
fn what_does_not_fit_is_null() {
    let mut windows = windows(&settings("lateness = \"0s\""));
    for _ in 0..2 {
        windows.add(&reading(1.0, "a", f64::MAX, i64::MAX));
    }
    windows.add(&Reading {
        ts: 10 * SECOND,
        device: "a".into(),
        values: vec![None, None, None],
        untyped: Vec::new(),
        span: 0..0,
    });
    windows.add(&reading(20.0, "a", 1.0, 1));
    let rows = windows.advance();
    assert_eq!((rows[0].values[3].clone(), rows[0].values[9].clone()), (None, None), "sums");
    assert_eq!(rows[0].values[6], Some(Value::Int(i64::MAX)));
    assert_eq!((rows[1].count, rows[1].values.iter().flatten().count()), (1, 0), "nulls count in count alone");
}

#[test]
fn the_oldest_windows_go_when_there_are_too_many() {
    let mut windows = windows(&settings("lateness = \"0s\"\nreopen_within = \"1h\""));
    windows.held_max.results = 3;
    for device in ["a", "b", "c", "d", "e"] {
        windows.add(&reading(1.0, device, 1.0, 1));
    }
    assert_eq!(windows.advance().len(), 5, "closed early");
    assert_eq!(windows.add(&reading(2.0, "a", 1.0, 1)), Late::Late);
    assert_eq!(windows.add(&reading(12.0, "a", 1.0, 1)), Late::Good);
    assert_eq!(windows.held.results, 1);
}

/// A row whose text takes so many bytes.
fn long(second: f64, device: &str, bytes: usize) -> Reading {
    let mut row = reading(second, device, 1.0, 1);
    row.values[2] = Some(Value::Text("x".repeat(bytes)));
    row
}

#[test]
fn the_oldest_windows_go_when_they_hold_too_many_bytes() {
    let mut windows = windows(&settings("lateness = \"0s\"\nreopen_within = \"1h\"\nwindows_max_bytes = \"1MiB\""));
    for second in [1.0, 11.0, 21.0] {
        windows.add(&long(second, "a", 150 << 10));
    }
    // First and last: 900 KiB. Those of the newest window are another 150 KiB longer now.
    assert_eq!(results(&windows.advance()), [(0, "a", 1, 1), (10, "a", 1, 1)]);
    windows.add(&long(22.0, "a", 300 << 10));
    assert_eq!(results(&windows.advance()), [], "what goes first was closed already");
    assert_eq!(windows.add(&reading(2.0, "a", 1.0, 1)), Late::Late, "the oldest is given up");
    assert_eq!(windows.add(&reading(12.0, "a", 1.0, 1)), Late::Good, "the one behind it is not");
    windows.add(&long(23.0, "b", 800 << 10));
    let rows = windows.advance();
    assert_eq!(results(&rows), [(10, "a", 2, 2), (20, "a", 2, 1), (20, "b", 1, 1)], "closed early");
    assert_eq!(rows[1].values[13], Some(Value::Text("x".repeat(300 << 10))), "and whole");
    assert_eq!(windows.held, Held::default());
}

/// What is given up depends on the rows alone: not on where a snapshot was taken.
#[test]
fn the_bound_in_bytes_is_the_same_whatever_the_restarts() {
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut given_up = 0;
    for _ in 0..40 {
        let settings = settings("lateness = \"7s\"\nreopen_within = \"60s\"");
        let most = random.random_range(2_000..20_000);
        let empty = || {
            let mut windows = windows(&settings);
            windows.held_max.bytes = most;
            windows
        };
        let (mut one, mut two) = (empty(), empty());
        let mut now = 0.0;
        for _ in 0..300 {
            now += random.random_range(0.0..0.9);
            let row = long(
                f64::max(now - random.random_range(0.0..70.0), 0.0),
                ["a", "b", "c"][random.random_range(0..3)],
                random.random_range(0..2_000),
            );
            let in_reach = row.ts >= one.watermark().saturating_sub(one.reopen_within);
            let late = one.add(&row);
            given_up += usize::from(late == Late::Late && in_reach);
            assert_eq!(late, two.add(&row));
            assert_eq!(one.advance(), two.advance());
            assert_eq!(one.held, two.held);
            assert!(one.held.bytes <= most, "{:?} {most}", one.held);
            if random.random_bool(0.1) {
                let mut bytes = Vec::new();
                two.write(&mut bytes);
                two = empty();
                two.restore(&Bytes::from(bytes)).unwrap();
            }
        }
        let results = one.windows.iter().flat_map(|window| window.results.values());
        let mut held = Held::default();
        results.for_each(|devices| held.take(devices));
        assert_eq!(one.held, held);
    }
    assert!(given_up > 100, "{given_up}");
}

/// Rows in random order, some very late; snapshots at random points change nothing; the last revision of each window is
/// what a recomputation over the rows that were in time gives.
#[test]
fn windows_equal_a_recomputation_whatever_the_order_and_the_restarts() {
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..60 {
        let settings = settings("lateness = \"7s\"\nreopen_within = \"40s\"");
        let (mut windows_one, mut windows_two) = (windows(&settings), windows(&settings));
        let mut last: BTreeMap<(i64, String), WindowRow> = BTreeMap::new();
        let mut in_time: BTreeMap<(i64, String), Vec<Reading>> = BTreeMap::new();
        let mut now = 0.0;
        for _ in 0..400 {
            now += random.random_range(0.0..0.6);
            let back =
                if random.random_bool(0.1) { random.random_range(0.0..80.0) } else { random.random_range(0.0..9.0) };
            let device = ["a", "b", "c"][random.random_range(0..3)];
            let row = reading(f64::max(now - back, 0.0), device, random.random_range(-50.0..50.0), random.random());
            let late = windows_one.add(&row);
            assert_eq!(late, windows_two.add(&row));
            if late == Late::Good {
                in_time.entry((row.ts / (10 * SECOND), row.device.clone())).or_default().push(row);
            }
            let rows = windows_one.advance();
            assert_eq!(rows, windows_two.advance());
            for row in rows {
                let key = (row.start / (10 * SECOND), row.device.clone());
                let before = last.insert(key, row.clone()).map_or(0, |row| row.revision);
                assert_eq!(row.revision, before + 1);
            }
            if random.random_bool(0.05) {
                let mut bytes = Vec::new();
                windows_two.write(&mut bytes);
                windows_two = windows(&settings);
                windows_two.restore(&Bytes::from(bytes)).unwrap();
            }
        }
        windows_one.add(&reading(now + 1_000.0, "end", 0.0, 0));
        for row in windows_one.advance() {
            last.insert((row.start / (10 * SECOND), row.device.clone()), row);
        }
        assert_eq!(last.keys().collect::<Vec<_>>(), in_time.keys().collect::<Vec<_>>());
        for (key, rows) in in_time {
            let result = &last[&key];
            let speeds = rows.iter().map(|row| match row.values[0] {
                Some(Value::Float(speed)) => speed,
                _ => panic!(),
            });
            assert_eq!(result.count, rows.len() as i64);
            assert_eq!(result.values[0], speeds.clone().reduce(f64::min).map(Value::Float));
            assert_eq!(result.values[1], speeds.clone().reduce(f64::max).map(Value::Float));
            assert_eq!(result.values[3], Some(Value::Float(speeds.clone().fold(0.0, |sum, speed| sum + speed))));
            let first = rows.iter().min_by_key(|row| row.ts).unwrap();
            let newest = rows.iter().max_by_key(|row| row.ts).unwrap();
            assert_eq!(result.values[4], first.values[0]);
            assert_eq!(result.values[5], newest.values[0]);
        }
    }
}

#[test]
fn a_state_of_other_fields_is_not_taken_and_its_closed_windows_stay_closed() {
    let mut one = windows(&settings("lateness = \"0s\""));
    one.add(&reading(5.0, "a", 1.0, 1));
    one.add(&reading(15.0, "a", 1.0, 1));
    one.advance();
    let mut bytes = Vec::new();
    one.write(&mut bytes);
    let mut fewer = settings("lateness = \"0s\"");
    fewer.fields.pop();
    let mut other = windows(&fewer);
    assert_eq!(other.restore(&Bytes::from(bytes.clone())), Err(StateError::Fields));
    assert_eq!(other.add(&reading(6.0, "a", 1.0, 1)), Late::Late, "its result is out already");
    assert_eq!(other.add(&reading(16.0, "a", 1.0, 1)), Late::Late, "a part of this window was forgotten");
    assert_eq!(other.add(&reading(21.0, "a", 1.0, 1)), Late::Good);
    for cut in 0..bytes.len() {
        let mut windows = windows(&settings(""));
        assert!(windows.restore(&Bytes::copy_from_slice(&bytes[..cut])).is_err(), "{cut}");
        assert_eq!(
            (windows.held, windows.watermark()),
            (Held::default(), i64::MIN),
            "{cut}: nothing is taken of a part"
        );
    }
}

#[test]
fn a_window_of_another_shape_begins_where_nothing_was_told() {
    let mut before = windows(&settings("lateness = \"0s\""));
    before.add(&reading(5.0, "a", 1.0, 1));
    before.add(&reading(12.0, "a", 1.0, 1));
    before.advance();
    let mut bytes = Vec::new();
    before.write(&mut bytes);
    let check = |keys: &str, late_to: f64| {
        let text = format!(
            "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n[[source]]\n\
             kind = \"host\"\n[stream.s]\nlateness = \"0s\"\n[stream.s.fields]\nspeed = {{ type = \"float64\" }}\n\
             cars = {{ type = \"int64\" }}\nstate = {{ type = \"text\" }}\n[stream.s.window.10s]\n{keys}\n"
        );
        let settings = Settings::parse(&text).unwrap().stream.into_values().next().unwrap();
        let mut after = windows(&settings);
        after.restore(&Bytes::from(bytes.clone())).unwrap();
        assert_eq!(after.add(&reading(late_to - 0.1, "a", 1.0, 1)), Late::Late, "{keys}");
        assert_eq!(after.add(&reading(late_to, "a", 1.0, 1)), Late::Good, "{keys}");
    };
    check("size = \"20s\"", 20.0);
    check("size = \"10s\"\nby = \"all\"", 20.0);
    check("size = \"10s\"\naggregates = [\"stddev\"]", 20.0);
    check("gap = \"5s\"", 17.0);
}

/// Windows of all kinds over the same rows.
const KINDS: &str = r#"lateness = "7s"
reopen_within = "40s"
[stream.s.window.plain]
size = "10s"
aggregates = ["min", "max", "avg", "sum", "first", "last", "stddev", "p50", "p95", "p99", "increase", "rate"]
[stream.s.window.hop]
size = "10s"
every = "3s"
aggregates = ["last", "stddev", "p50", "increase"]
[stream.s.window.visit]
gap = "4s"
aggregates = ["min", "max", "avg", "sum", "first", "last", "stddev", "p50", "p95", "p99", "increase", "rate"]
[stream.s.window.city]
gap = "1s"
by = "all"
aggregates = ["avg"]
[stream.s.window.road]
size = "20s"
by = ["device", "state"]
aggregates = ["sum", "p99"]
[stream.s.window.state]
gap = "2s"
by = ["state", "cars"]
aggregates = ["rate", "min"]
"#;

fn near(shown: &Option<Value>, expected: Option<f64>, relative: f64) {
    match (shown, expected) {
        (None, None) => {}
        (Some(Value::Float(shown)), Some(expected)) => {
            let most = relative * expected.abs() + 1e-7;
            assert!((shown - expected).abs() <= most, "{shown} for {expected}");
        }
        other => panic!("{other:?}"),
    }
}

/// What the definition says of one field's values, in order of time.
fn expected(kind: AggregateKind, values: &[(i64, f64)]) -> (Option<f64>, f64) {
    use AggregateKind::{Avg, First, Increase, Last, Max, Min, P50, P95, P99, Rate, Stddev, Sum};
    let numbers = values.iter().map(|(_, value)| *value);
    let (n, sum) = (values.len() as f64, numbers.clone().sum::<f64>());
    let quantile = |q: f64| {
        let mut sorted = numbers.clone().collect::<Vec<_>>();
        sorted.sort_by(f64::total_cmp);
        sorted[(q * (n - 1.0)).floor() as usize]
    };
    let step = |pair: &[(i64, f64)]| if pair[1].1 < pair[0].1 { pair[1].1 } else { pair[1].1 - pair[0].1 };
    let increase = (values.len() > 1).then(|| values.windows(2).map(step).sum::<f64>());
    let span = (values[values.len() - 1].0 - values[0].0) as f64 / 1e6;
    match kind {
        Min => (numbers.reduce(f64::min), 0.0),
        Max => (numbers.reduce(f64::max), 0.0),
        Avg => (Some(sum / n), 1e-9),
        Sum => (Some(sum), 1e-9),
        First => (Some(values[0].1), 0.0),
        Last => (Some(values[values.len() - 1].1), 0.0),
        Stddev => {
            let squares = numbers.map(|value| (value - sum / n).powi(2)).sum::<f64>();
            ((n > 1.0).then(|| (squares / (n - 1.0)).sqrt()), 1e-9)
        }
        P50 => (Some(quantile(0.5)), 0.0101),
        P95 => (Some(quantile(0.95)), 0.0101),
        P99 => (Some(quantile(0.99)), 0.0101),
        Increase => (increase, 1e-9),
        Rate => (increase.filter(|_| span > 0.0).map(|increase| increase / span), 1e-9),
    }
}

type Groups = BTreeMap<(usize, String), Vec<Reading>>;

/// The rows of each result: by window, group and start.
fn recomputed(windows: &Windows, groups: Groups) -> BTreeMap<(usize, String, i64), Vec<Reading>> {
    let mut results = BTreeMap::<_, Vec<Reading>>::new();
    for ((index, key), mut rows) in groups {
        rows.sort_by_key(|row| row.ts);
        match windows.windows[index].kind {
            Kind::Hopping { size, every } => {
                for row in rows {
                    let first = (row.ts - size).div_euclid(every) * every + every;
                    let starts = (0..).map(|n| first + n * every).take_while(|start| *start <= row.ts);
                    starts.for_each(|start| results.entry((index, key.clone(), start)).or_default().push(row.clone()));
                }
            }
            Kind::Session { gap } => {
                for rows in rows.chunk_by(|one, other| other.ts - one.ts < gap) {
                    results.insert((index, key.clone(), rows[0].ts), rows.to_vec());
                }
            }
        }
    }
    results
}

/// Tumbling, hopping and session windows by device, by all and by fields, with every aggregate: whatever the order of the
/// rows and the restarts, the last revisions are what the definitions say of the rows that were in time.
#[test]
fn windows_of_all_kinds_equal_a_recomputation_whatever_the_order_and_the_restarts() {
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let settings = settings(KINDS);
    let (mut taken_back, mut revised) = (0, 0);
    for _ in 0..25 {
        let (mut one, mut two) = (windows(&settings), windows(&settings));
        let mut last: BTreeMap<(usize, String, i64), WindowRow> = BTreeMap::new();
        let mut groups = Groups::new();
        let mut now = 0.0;
        let mut take = |last: &mut BTreeMap<(usize, String, i64), WindowRow>, rows: Vec<WindowRow>, one: &Windows| {
            for row in rows {
                let fields = fields_of(&one.windows[row.window].by).len();
                let key = format!("{} {:?}", row.device, &row.values[..fields]);
                taken_back += usize::from(row.count == 0);
                revised += usize::from(row.revision > 1);
                let before = last.insert((row.window, key, row.start), row.clone()).map_or(0, |row| row.revision);
                assert_eq!(row.revision, before + 1, "{row:?}");
            }
        };
        for _ in 0..300 {
            now += random.random_range(0.0..0.9);
            let back =
                if random.random_bool(0.2) { random.random_range(0.0..60.0) } else { random.random_range(0.0..9.0) };
            let device = ["a", "b", "c"][random.random_range(0..3)];
            let (cars, speed) = (random.random_range(-2..3), random.random_range(-50.0..50.0));
            let mut row = reading(f64::max(now - back, 0.0), device, speed, cars);
            row.values[2] = [None, Some(Value::Text("x;:".into()))][random.random_range(0..2)].clone();
            let late = one.add(&row);
            assert_eq!(late, two.add(&row));
            if late == Late::Good {
                for (index, window) in one.windows.iter().enumerate() {
                    let fields =
                        fields_of(&window.by).iter().map(|field| row.values[*field].clone()).collect::<Vec<_>>();
                    let alone = matches!(window.by, Grouping::Device | Grouping::Fields { device: true, .. });
                    let key = format!("{} {fields:?}", if alone { device } else { "*" });
                    groups.entry((index, key)).or_default().push(row.clone());
                }
            }
            let rows = one.advance();
            assert_eq!(rows, two.advance());
            assert_eq!(one.held, two.held);
            take(&mut last, rows, &one);
            if random.random_bool(0.05) {
                let mut bytes = Vec::new();
                two.write(&mut bytes);
                two = windows(&settings);
                two.restore(&Bytes::from(bytes)).unwrap();
            }
        }
        one.add(&reading(now + 1_000.0, "end", 0.0, 0));
        let rows = one.advance();
        take(&mut last, rows, &one);
        last.retain(|_, row| row.count > 0);
        let results = recomputed(&one, groups);
        assert_eq!(last.keys().collect::<Vec<_>>(), results.keys().collect::<Vec<_>>());
        for (key, rows) in results {
            let result = &last[&key];
            let window = &one.windows[key.0];
            assert_eq!(result.count, rows.len() as i64);
            let end = match window.kind {
                Kind::Hopping { size, .. } => result.start + size,
                Kind::Session { gap } => rows[rows.len() - 1].ts + gap,
            };
            assert_eq!(result.end, end);
            let speeds = rows.iter().map(|row| match row.values[0] {
                Some(Value::Float(speed)) => (row.ts, speed),
                _ => panic!(),
            });
            let speeds = speeds.collect::<Vec<_>>();
            for (kind, shown) in window.aggregates.iter().zip(&result.values[fields_of(&window.by).len()..]) {
                let (expected, relative) = expected(*kind, &speeds);
                near(shown, expected, relative);
            }
        }
        assert_eq!(one.held, held_of(&one));
    }
    assert!(taken_back > 20 && revised > 200, "{taken_back} {revised}");
}

fn held_of(windows: &Windows) -> Held {
    let mut held = Held::default();
    windows.windows.iter().flat_map(|window| window.results.values()).for_each(|devices| held.take(devices));
    held
}

/// With little room all kinds stay within it, and restarts change nothing.
#[test]
fn windows_of_all_kinds_keep_within_their_bytes() {
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let settings = settings(KINDS);
    for _ in 0..20 {
        let most = random.random_range(10_000..100_000);
        let empty = || {
            let mut windows = windows(&settings);
            windows.held_max.bytes = most;
            windows
        };
        let (mut one, mut two) = (empty(), empty());
        let mut now = 0.0;
        for _ in 0..300 {
            now += random.random_range(0.0..0.9);
            let back = random.random_range(0.0..70.0);
            let device = ["a", "b", "c"][random.random_range(0..3)];
            let row =
                reading(f64::max(now - back, 0.0), device, random.random_range(-50.0..50.0), random.random_range(0..3));
            assert_eq!(one.add(&row), two.add(&row));
            assert_eq!(one.advance(), two.advance());
            assert!(one.held.bytes <= most && one.held == held_of(&one), "{:?} {most}", one.held);
            if random.random_bool(0.1) {
                let mut bytes = Vec::new();
                two.write(&mut bytes);
                two = empty();
                two.restore(&Bytes::from(bytes)).unwrap();
            }
        }
    }
}

#[test]
fn a_counter_that_falls_began_anew() {
    let settings =
        settings("lateness = \"0s\"\n[stream.s.window.count]\nsize = \"100s\"\naggregates = [\"increase\", \"rate\"]");
    let mut windows = windows(&settings);
    for (second, cars) in [(0.0, 100), (30.0, 4), (10.0, 130), (50.0, 10)] {
        windows.add(&reading(second, "a", 1.0, cars));
    }
    windows.add(&reading(200.0, "a", 1.0, 1));
    let rows = windows.advance();
    let count = rows.iter().find(|row| row.values.len() == 4).unwrap();
    // 30 to 130, 4 from anew, 6 more; in 50 s.
    assert_eq!(count.values[2..], [Some(Value::Float(40.0)), Some(Value::Float(0.8))]);
}

/// Written by an agent that knew tumbling windows alone.
#[test]
fn a_state_of_version_1_is_taken() {
    let settings = settings("lateness = \"0s\"");
    let mut bytes = vec![1];
    bytes.extend((5 * SECOND).to_le_bytes());
    bytes.extend(3_u16.to_le_bytes());
    for (name, kind) in [("speed", 1), ("cars", 2), ("state", 4)] {
        bytes.extend((name.len() as u16).to_le_bytes());
        bytes.extend_from_slice(name.as_bytes());
        bytes.push(kind);
    }
    bytes.extend(1_u16.to_le_bytes());
    bytes.extend([5, 0]);
    bytes.extend_from_slice(b"s_10s");
    for value in [10 * SECOND, 0, i64::MIN] {
        bytes.extend(value.to_le_bytes());
    }
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend(0_i64.to_le_bytes());
    bytes.extend_from_slice(&[1, 0, b'a']);
    for value in [1_i64, 0, 1] {
        bytes.extend(value.to_le_bytes());
    }
    [2.5_f64, 2.5, 2.5].iter().for_each(|value| bytes.extend(value.to_le_bytes()));
    bytes.push(1);
    for _ in 0..2 {
        bytes.extend((5 * SECOND).to_le_bytes());
        bytes.extend(2.5_f64.to_le_bytes());
    }
    bytes.extend([0; 24]);
    bytes.extend([0; 16]);
    bytes.extend([0, 0]);
    let mut windows = windows(&settings);
    windows.restore(&Bytes::from(bytes)).unwrap();
    windows.add(&reading(10.0, "a", 1.0, 1));
    let rows = windows.advance();
    assert_eq!(results(&rows), [(0, "a", 1, 1)]);
    assert_eq!(rows[0].values[0], Some(Value::Float(2.5)));
}
