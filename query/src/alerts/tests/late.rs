//! Rows that come late, over the task and tables: whatever the order in which they come, restarts in between.

use std::collections::{BTreeMap, HashMap};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::episode::Episode;
use super::super::episodes::tests::late::{expected, is_as, ordered, told};
use super::*;
use crate::lanes::Place;

/// What is recorded of the alerts of a device, its road and whether somebody was told.
const OF: &str = "SELECT device, CASE WHEN labels LIKE '%\"road\":\"a\"%' THEN 'a' ELSE 'b' END AS road, transition, told \
                  FROM alert_log WHERE transition IN ('firing', 'resolved') ORDER BY sequence";

#[tokio::test(flavor = "multi_thread")]
async fn a_label_set_is_judged_by_its_own_time() {
    let node = Node::start();
    node.alerts.put("high", HIGH).await.unwrap();
    node.arrive(&[(-10, "d", "a", 1.0)]);
    // Older than the newest of its device, and the first of its road.
    node.arrive(&[(-20, "d", "b", 200.0), (-5, "d", "a", 300.0), (-15, "d", "b", 5.0)]);
    node.until_recorded(OF, &["d b firing true", "d b resolved true", "d a firing true"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_is_judged_in_the_order_of_its_time() {
    let node = Node::start();
    node.alerts.put("high", &format!("{HIGH}for = \"60s\"")).await.unwrap();
    node.arrive(&[(-100, "d", "a", 1.0), (-100, "e", "a", 1.0), (-100, "f", "a", 300.0), (-100, "g", "a", 1.0)]);
    node.until_recorded("SELECT count(*) FROM alert_log WHERE transition = 'pending'", &["1"]).await;
    node.arrive(&[
        // It lasts for long enough; and it does not, because of a row that comes later still.
        (-500, "d", "a", 200.0),
        (-430, "d", "a", 200.0),
        (-400, "d", "a", 5.0),
        (-500, "e", "a", 200.0),
        (-470, "e", "a", 5.0),
        (-430, "e", "a", 200.0),
        // Too long ago for anybody to be told.
        (-7_200, "g", "a", 200.0),
    ]);
    // What is pending has lasted for longer than was known.
    node.arrive(&[(-200, "f", "a", 300.0)]);
    node.arrive(&[(-7_000, "g", "a", 5.0), (-7_100, "g", "a", 200.0)]);
    let sorted = OF.replace("ORDER BY sequence", "ORDER BY device, sequence");
    let expected =
        ["d a firing true", "d a resolved true", "f a firing true", "g a firing false", "g a resolved false"];
    node.until_recorded(&sorted, &expected).await;
    let times = "SELECT round(date_part('epoch', max(to_ts) - min(from_ts))) FROM alert_log WHERE transition = 'resolved' AND device = 'd'";
    assert_eq!(node.texts(times).await, ["100.0"]);
    let states =
        "SELECT DISTINCT state, quiet FROM alert_log WHERE device = 'g' AND transition IN ('firing', 'resolved')";
    assert_eq!(node.texts(states).await, ["backfill backfill"]);
    // Sent once more by another way, and behind it something else: nothing is found twice.
    node.arrive(&[(-430, "d", "a", 200.0), (-7_100, "g", "a", 200.0)]);
    let more = [(-300, "d", "a", 200.0), (-235, "d", "a", 200.0), (-230, "d", "a", 1.0)];
    node.arrive(&more);
    let mut expected = expected.to_vec();
    expected.splice(2..2, ["d a firing true", "d a resolved true"]);
    node.until_recorded(&sorted, &expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_later_than_late_max_or_is_too_much_is_counted_and_the_next_is_judged() {
    let node = Node::start();
    node.alerts.put("high", HIGH).await.unwrap();
    node.arrive(&[(-10, "d", "a", 1.0), (-10, "e", "a", 1.0), (-10, "m", "a", 300.0)]);
    node.until_recorded(OF, &["m a firing true"]).await;
    // A day is `late_max` here, and 20,000 rows a stretch.
    node.arrive(&[(-90_000, "e", "a", 300.0), (-89_999, "e", "a", 1.0)]);
    let many: Vec<_> = (0..25_000).map(|row| (-50_000 + row, "d", "a", if row == 7 { 300.0 } else { 1.0 })).collect();
    node.arrive(&many);
    let counted = |end: &str, rows: usize| {
        let line = format!("weir_alert_late_rows_total{{end=\"{end}\"}} {rows}\n");
        node.alerts.metrics().contains(&line)
    };
    until("they are counted", || counted("too_late", 2) && counted("given_up", 25_000)).await;
    assert_eq!(node.texts("SELECT count(*) FROM alert_log WHERE alert_id IS NOT NULL").await, ["1"]);
    let rule = node.alerts.rules().into_iter().find(|rule| rule.name == "high").unwrap();
    assert_eq!(rule.unjudged, 25_002);
    assert!(rule.last_error.is_some_and(|error| error.contains("more than 20000 rows")));
    node.arrive(&[(-300, "d", "a", 200.0), (-290, "d", "a", 1.0)]);
    node.until_recorded(OF, &["m a firing true", "d a firing true", "d a resolved true"]).await;
    until("what was judged is counted", || counted("judged", 2)).await;
}

/// What is to be judged is written with the positions.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_to_be_judged_is_judged_after_a_restart() {
    let node = Node::start();
    node.alerts.put("high", HIGH).await.unwrap();
    node.arrive(&[(-10, "d", "a", 1.0), (-10, "m", "a", 300.0)]);
    node.until_recorded(OF, &["m a firing true"]).await;
    node.arrive(&[(-100, "d", "a", 200.0), (-90, "d", "a", 1.0), (0, "n", "a", 300.0)]);
    node.until_recorded(OF, &["m a firing true", "n a firing true"]).await;
    // They have been read, and are not judged before a second has passed.
    let node = node.restarted().await;
    node.until_recorded(OF, &["m a firing true", "n a firing true", "d a firing true", "d a resolved true"]).await;
}

/// Takes every place of the lane that rules ask in: nothing is asked until they are given back.
async fn hold(node: &Node) -> Vec<Arc<Place>> {
    let mut held = Vec::new();
    for _ in 0..node.engine.settings().lanes[0].running {
        held.push(node.engine.enter(&caller()).await.unwrap());
    }
    held
}

/// What is being judged is not done: a node that ends meanwhile judges it when it is back.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_being_judged_when_the_node_ends_is_judged_again() {
    let node = Node::start();
    node.alerts.put("high", HIGH).await.unwrap();
    node.arrive(&[(-10, "d", "a", 1.0), (-10, "m", "a", 300.0)]);
    node.until_recorded(OF, &["m a firing true"]).await;
    let held = hold(&node).await;
    node.arrive(&[(-100, "d", "a", 200.0), (-90, "d", "a", 1.0)]);
    until("the record is asked", || held[0].lane().waiting() == 1).await;
    // A decision, and with it how far the stream has been read.
    let before = node.alerts.hub().newest();
    node.arrive(&[(0, "n", "a", 300.0)]);
    until("it is decided", || node.alerts.hub().newest() > before).await;
    let node = node.restarted().await;
    node.until_recorded(OF, &["m a firing true", "n a firing true", "d a firing true", "d a resolved true"]).await;
}

/// Rows and decisions that come while late rows are judged are part of what comes out.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_decided_while_late_rows_are_judged_is_decided_once() {
    let node = Node::start();
    node.alerts.put("high", HIGH).await.unwrap();
    node.arrive(&[(-10, "d", "a", 300.0)]);
    node.until_recorded(OF, &["d a firing true"]).await;
    let mut held = hold(&node).await;
    let place = Arc::clone(&held[1]);
    node.arrive(&[(-20, "d", "a", 200.0), (-15, "d", "a", 1.0)]);
    until("the record is asked", || place.lane().waiting() == 1).await;
    // The record is read, and then nothing: the place that it had is taken.
    let engine = Arc::clone(&node.engine);
    let next = tokio::spawn(async move { engine.enter(&caller()).await.unwrap() });
    until("somebody waits behind it", || place.lane().waiting() == 2).await;
    drop(held.remove(0));
    held.push(next.await.unwrap());
    until("the table is asked", || place.lane().waiting() == 1).await;
    let before = node.alerts.hub().newest();
    // Its end, and ten more: more than are at hand of a label set when they have ended.
    let more = (1..=10).flat_map(|at| [(2 * at, "d", "a", 400.0), (2 * at + 1, "d", "a", 1.0)]);
    node.arrive(&[(1, "d", "a", 1.0)].into_iter().chain(more).collect::<Vec<_>>());
    until("the ends are decided", || node.alerts.hub().newest() > before).await;
    drop((held, place));
    let judged = "weir_alert_late_rows_total{end=\"judged\"} 2\n";
    until("late rows are judged", || node.alerts.metrics().contains(judged)).await;
    let expected = ["d a firing true", "d a resolved true"].repeat(12);
    node.until_recorded(OF, &expected).await;
    assert_eq!(node.texts("SELECT count(DISTINCT alert_id) FROM alert_log WHERE alert_id IS NOT NULL").await, ["12"]);
    let open = node.alerts.open(everything()).await.unwrap();
    assert!(open.alerts.is_empty(), "{open:?}");
    // Also after a restart.
    let node = node.restarted().await;
    node.arrive(&[(60, "d", "a", 400.0)]);
    node.until_recorded(OF, &[&expected[..], &["d a firing true"]].concat()).await;
}

/// Many rows are judged in parts; each part is behind the one before it.
#[tokio::test(flavor = "multi_thread")]
async fn a_stretch_of_many_rows_is_read_in_the_order_of_time() {
    let node = Node::start();
    node.alerts.put("high", HIGH).await.unwrap();
    let newest = ["d", "e", "f", "g"].map(|device| (-10, device, "a", 1.0));
    node.arrive(&[newest.as_slice(), &[(-10, "m", "a", 300.0)]].concat());
    node.until_recorded(OF, &["m a firing true"]).await;
    // Four devices, each second; one of them holds twice, long before and short.
    let holds = |second: i64| (200..400).contains(&second) || (2_000..2_100).contains(&second);
    let rows = (0..12_000).map(|row| {
        let (second, device) = (row / 4, ["d", "e", "f", "g"][row as usize % 4]);
        (second - 5_000, device, "a", if device == "d" && holds(second) { 300.0 } else { 1.0 })
    });
    // They come the last first.
    node.arrive(&rows.rev().collect::<Vec<_>>());
    let alerts = "SELECT round(date_part('epoch', to_ts - from_ts)) FROM alert_log WHERE transition = 'resolved' ORDER BY from_ts";
    node.until_recorded(alerts, &["200.0", "100.0"]).await;
}

/// The clock of one device is ahead: after a restart that does not make the rows of all others late.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_what_is_older_than_what_was_read_is_late_and_the_present_is_not() {
    let node = Node::start();
    node.alerts.put("high", HIGH).await.unwrap();
    node.arrive(&[(-10, "d", "a", 1.0), (80_000, "ahead", "a", 1.0), (-10, "e", "a", 200.0)]);
    node.until_recorded(OF, &["e a firing true"]).await;
    let node = node.restarted().await;
    // Older than what the device had said, and without an alert that is open: it is judged by its time.
    node.arrive(&[(-60, "d", "a", 200.0)]);
    node.until_recorded(OF, &["e a firing true", "d a firing true", "d a resolved true"]).await;
    node.arrive(&[(1, "d", "a", 200.0)]);
    node.until_recorded(OF, &["e a firing true", "d a firing true", "d a resolved true", "d a firing true"]).await;
    let judged = "weir_alert_late_rows_total{end=\"judged\"} 1\n";
    until("what was judged is counted", || node.alerts.metrics().contains(judged)).await;
}

/// A row: device, road, seconds, speed; and when it comes.
type Coming = (f64, usize, i64, f64);

/// Random rules over random rows, in order, disturbed, and as a backlog behind newer ones; in the table twice now and then.
struct Plan {
    rules: Vec<(String, i64, i64, f64, bool)>,
    rows: Vec<Coming>,
    roads: usize,
}

impl Plan {
    fn new(random: &mut StdRng, cases: usize) -> Self {
        let rules = (0..10).map(|rule| {
            let (hold, keep) = ([0, 0, 2, 5, 20][rule % 5], [0, 3, 8, 30][random.random_range(0..4)]);
            (format!("r{rule}"), hold, keep, random.random_range(20.0..80.0), rule < 8)
        });
        let rules = rules.collect();
        let devices = cases.div_ceil(8);
        let mut rows = Vec::new();
        for device in 0..devices {
            // Some are so old that nobody is told.
            let mut ts = if random.random_bool(0.3) { -9_000 } else { -900 };
            let (kind, length) = (device % 3, random.random_range(10..30));
            for at in 0..length {
                ts += random.random_range(1..8);
                let behind = f64::from(at) / f64::from(length);
                let comes = match kind {
                    0 => behind,
                    1 => behind + random.random_range(0.0..0.3),
                    // The last part live, and what was before it behind that.
                    _ if at > length * 2 / 3 => behind - 0.6,
                    _ => 0.5 + behind / 2.0,
                };
                let row = (comes, device, ts, random.random_range(0.0..100.0));
                rows.push(row);
                if random.random_bool(0.05) {
                    rows.push((comes + random.random_range(0.0..0.5), device, ts, row.3));
                }
            }
        }
        rows.sort_by(|one, other| one.0.total_cmp(&other.0));
        Self { rules, rows, roads: devices.div_ceil(6) }
    }

    fn text((name, hold, keep, above, by_device): &(String, i64, i64, f64, bool)) -> String {
        let labels = if *by_device { "device, road" } else { "road" };
        format!(
            "name = \"{name}\"\nsql = \"SELECT {labels}, speed FROM traffic WHERE speed > {above}\"\nfor = \"{hold}s\"\nkeep_firing_for = \"{keep}s\"\n"
        )
    }

    fn road(&self, device: usize) -> usize {
        device % self.roads
    }
}

/// Everything that a node has to say, by rule and labels: what it says now, and what people were told last.
async fn recorded(node: &Node) -> HashMap<(String, String), (Vec<(i64, Option<i64>)>, Vec<(i64, Option<i64>)>)> {
    let rows = "SELECT told, state, detail FROM alert_log WHERE alert_id IS NOT NULL ORDER BY sequence";
    let (mut last, mut changes) = (BTreeMap::new(), Vec::new());
    for row in node.texts(rows).await {
        let (is_told, rest) = row.split_once(' ').unwrap();
        let (state, detail) = rest.split_once(' ').unwrap();
        let alert: Episode = serde_json::from_str(detail).unwrap();
        changes.push((is_told == "true", alert.clone()));
        last.insert(alert.id.clone(), (state.to_owned(), alert));
    }
    let mut found: HashMap<_, (Vec<_>, Vec<_>)> = HashMap::new();
    for (id, (from, to)) in told(changes.iter().map(|(is_told, alert)| (*is_told, alert))) {
        let (_, alert): &(String, Episode) = &last[&id];
        found.entry((alert.rule.clone(), alert.labels.clone())).or_default().1.push((from, Some(to)));
    }
    for (state, alert) in last.into_values() {
        if !["pending", "dropped", "merged"].contains(&state.as_str()) {
            found.entry((alert.rule, alert.labels)).or_default().0.push((alert.from, alert.to));
        }
    }
    for (known, told) in found.values_mut() {
        known.sort_by_key(|(from, to)| (*from, to.unwrap_or(i64::MAX)));
        told.sort_unstable();
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_order_of_rows_the_alerts_are_those_of_the_ordered_run() {
    let seed = std::env::var("WEIR_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random::<u64>);
    let cases = std::env::var("WEIR_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(300);
    println!("WEIR_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let plan = Plan::new(&mut random, cases);
    let mut node = Node::start();
    for rule in &plan.rules {
        node.alerts.put(&rule.0, &Plan::text(rule)).await.unwrap();
    }
    let base = now_us() / S * S;
    let parts: Vec<&[Coming]> = plan.rows.chunks(plan.rows.len().div_ceil(16)).collect();
    for (index, part) in parts.iter().enumerate() {
        let row = |(_, device, ts, speed): &Coming| Row {
            ts: base + ts * S,
            device: format!("d{device}"),
            value: Some(*speed),
            text: Some(format!("road{}", plan.road(*device))),
        };
        let edge = random.random_range(1..4);
        node.city.arrive(&name("traffic"), edge, &part.iter().map(row).collect::<Vec<_>>(), None, base);
        if random.random_bool(0.3) {
            node.city.commit(random.random_range(0..3));
        }
        // What is judged meanwhile, and what is not, is random here; nothing is waited for.
        tokio::time::sleep(Duration::from_millis(random.random_range(0..900))).await;
        if index % 6 == 4 {
            node = node.restarted().await;
        }
    }
    // The ordered run, as `weir rules test` has it and as it is written down once more.
    let mut sets = BTreeMap::<(String, String), (Vec<_>, i64, i64)>::new();
    for (_, device, ts, speed) in &plan.rows {
        for (rule, hold, keep, above, by_device) in &plan.rules {
            let road = format!("road{}", plan.road(*device));
            let labels = match by_device {
                true => serde_json::json!({ "device": format!("d{device}"), "road": road }),
                false => serde_json::json!({ "road": road }),
            };
            let set = sets.entry((rule.clone(), labels.to_string())).or_insert((Vec::new(), hold * S, keep * S));
            set.0.push((base + ts * S, speed > above));
        }
    }
    let found: BTreeMap<_, _> =
        sets.into_iter().map(|(set, (rows, hold, keep))| (set, ordered(&rows, hold, keep))).collect();
    for rule in &plan.rules {
        let settings = RuleSettings::parse(&rule.0, &Plan::text(rule)).unwrap();
        let trial = node.alerts.trial(settings, base - 20_000 * S, base + 20_000 * S).await.unwrap();
        let mut by_set: BTreeMap<String, Vec<(i64, Option<i64>)>> = BTreeMap::new();
        for span in trial.alerts {
            by_set.entry(span.labels.to_string()).or_default().push((span.from, span.to));
        }
        for ((_, labels), found) in found.iter().filter(|((name, _), _)| *name == rule.0) {
            let mut known = by_set.remove(labels).unwrap_or_default();
            known.sort_unstable();
            let found: Vec<_> = found.iter().map(|(from, to, _)| (*from, *to)).collect();
            assert_eq!(known, found, "{rule:?} {labels}");
        }
    }
    println!("{} label sets, {} rows, {} intervals", found.len(), plan.rows.len(), found.values().flatten().count());
    assert!(found.len() >= cases);
    let begun = Instant::now();
    loop {
        let recorded = recorded(&node).await;
        let nothing = (Vec::new(), Vec::new());
        let other = found.iter().filter_map(|(set, found)| {
            let (known, told) = recorded.get(set).unwrap_or(&nothing);
            let wanted = expected(found, told);
            (!is_as(&wanted, known)).then(|| format!("{set:?}: {known:?}\nand not {wanted:?}\ntold {told:?}"))
        });
        let other: Vec<String> = other.collect();
        if other.is_empty() {
            let told: usize = recorded.values().map(|(_, told)| told.len()).sum();
            let all: usize = recorded.values().map(|(known, _)| known.len()).sum();
            println!("{all} alerts, of which {told} were told; as they are after {:?}", begun.elapsed());
            let exact = found
                .iter()
                .filter(|(set, found)| recorded.get(*set).map_or(found.is_empty(), |(known, _)| is_as(found, known)));
            println!("{} of {} label sets have the intervals of the ordered run", exact.count(), found.len());
            assert!(told > 0 && told < all);
            break;
        }
        assert!(
            begun.elapsed() < 2 * PATIENCE,
            "WEIR_SEED={seed} base {base}: {} of {} are not as they would be:\n{}",
            other.len(),
            found.len(),
            other[..other.len().min(5)].join("\n")
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let twice = "SELECT count(*) - count(DISTINCT alert_id) FROM alert_log WHERE transition = 'pending' AND told";
    assert_eq!(node.texts(twice).await, ["0"]);
}
