use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::{Cut, Pipeline, quarantine};
use super::*;
use crate::config::Settings;
use crate::entry::{Entry, Message, Payload};
use crate::rules::Turn;

const SECOND: i64 = 1_000_000;
const NOW: i64 = 1_700_000_000 * SECOND;
const ENTRIES: u64 = 250;

fn settings() -> Settings {
    Settings::parse(
        r#"
        [edge]
        id = "e"
        data_dir = "x"
        [cloud]
        urls = ["http://h"]
        token = "t"
        [[source]]
        kind = "mqtt"
        url = "mqtt://h"
        topics = ["t/+"]
        stream = "s"
        map = { device = "topic:1", ts = { at = "/ts", format = "epoch_s" }, v = "/v", w = "/w" }
        [stream.s]
        lateness = "5s"
        fields = { v = { type = "int64", max = 90 }, w = { type = "text" } }
        window = { 10s = { size = "10s" }, by_w = { size = "10s", by = ["w"] } }
        [alerts]
        alert_horizon = "1m"
        devices_max = 5
        [[rule]]
        name = "high"
        on = "s"
        when = "v > 60 AND v > prev(v)"
        until = "v < 30"
        topic = "high/{device}"
        [[rule]]
        name = "lasting"
        on = "s"
        when = "100 / v < 2"
        for = "5s"
        max_instances = 2
        labels = { w = "{w}" }
        topic = "lasting/{device}/{w}"
        [[rule]]
        name = "silent"
        on = "s"
        absent = "20s"
        topic = "silent/{device}"
        [[rule]]
        name = "average"
        on = "s_10s"
        when = "v_avg BETWEEN 40 AND 60 OR count < 2"
        for = "20s"
        topic = "average/{device}"
        [[rule]]
        name = "grouped"
        on = "s_by_w"
        when = "v_avg > prev(v_avg)"
        topic = "grouped/{w}"
        "#,
    )
    .unwrap()
}

fn entries(random: &mut StdRng) -> Vec<Entry> {
    let mut at = 0;
    let entry = |n: u64, random: &mut StdRng| {
        at += random.random_range(0..4);
        let back = match random.random_range(0..20) {
            0 => 200,
            1..=3 => random.random_range(0..20),
            _ => 0,
        };
        // A backlog, and then the present.
        let back = if n < 60 { back + 120 } else { back };
        let device = ["a", "b", "c", "d", "e", "f", "g"][random.random_range(0..if n % 100 < 60 { 7 } else { 3 })];
        let v = random.random_range(0..100);
        let w = ["x", "y"][random.random_range(0..2)];
        Entry::Message(Message {
            source: "s".into(),
            topic: format!("t/{device}"),
            payload: Payload::Whole(format!("{{\"ts\":{},\"v\":{v},\"w\":\"{w}\"}}", NOW / SECOND + at - back).into()),
            arrival_us: NOW + at * SECOND,
            delivery: None,
        })
    };
    let mut entry = entry;
    (0..ENTRIES).map(|n| entry(n, random)).collect()
}

/// The rows of `alerts`, as text.
fn alerts(cut: &Cut) -> Vec<String> {
    let mut all = Vec::new();
    for lane in &cut.lanes {
        for batch in lane.batches.iter().filter(|batch| batch.stream.as_str() == "alerts") {
            let schema = lane.schemas.iter().find(|schema| schema.id() == batch.schema).unwrap();
            let rows = quarantine::as_json(&batch.decode(schema).unwrap());
            all.extend(rows.into_iter().map(|row| String::from_utf8(row).unwrap()));
        }
    }
    all
}

fn apply(pipeline: &mut Pipeline, entries: &[Entry]) {
    let at = pipeline.position().0;
    pipeline.apply(Position(at), Position(at + 1), &entries[at as usize]);
}

#[test]
fn a_crash_neither_loses_nor_repeats_an_alert() {
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let settings = settings();
    let mut words = BTreeMap::<String, usize>::new();
    for _ in 0..60 {
        let entries = entries(&mut random);
        let mut calm = Pipeline::new(&settings, Position(0), &BTreeMap::new());
        let mut told = Vec::new();
        for _ in 0..ENTRIES {
            apply(&mut calm, &entries);
            told.extend(calm.take_alerts());
        }
        let expected = alerts(&calm.cut().unwrap());
        for row in &expected {
            let row = serde_json::from_str::<serde_json::Value>(row).unwrap();
            *words.entry(format!("{} {}", row["rule"], row["state"])).or_default() += 1;
        }

        // What the lane of alerts has, and up to where.
        let (mut rows, mut stands) = (Vec::new(), Position(0));
        let mut snapshot: Option<Vec<u8>> = None;
        let mut retold = Vec::new();
        let last = 'runs: loop {
            let lanes = [("first".to_owned(), stands), ("rest".to_owned(), stands)].into();
            let mut pipeline = match &snapshot {
                None => Pipeline::new(&settings, Position(0), &lanes),
                Some(bytes) => Pipeline::restore(&settings, &lanes, Bytes::from(bytes.clone())).unwrap(),
            };
            snapshot = Some(pipeline.snapshot());
            loop {
                for _ in 0..random.random_range(1..40).min(ENTRIES - pipeline.position().0) {
                    apply(&mut pipeline, &entries);
                    retold.extend(pipeline.take_alerts());
                }
                if !pipeline.may_cut() {
                    continue;
                }
                let finished = pipeline.position().0 == ENTRIES;
                if !finished && random.random_bool(0.2) {
                    continue 'runs;
                }
                let cut = pipeline.cut().unwrap();
                let found = alerts(&cut);
                if !found.is_empty() {
                    stands = cut.position;
                }
                rows.extend(found);
                if finished {
                    break 'runs pipeline;
                }
                if random.random_bool(0.3) {
                    continue 'runs;
                }
                if random.random_bool(0.3) {
                    snapshot = Some(pipeline.snapshot());
                }
            }
        };
        assert_eq!(rows, expected);
        assert_eq!(last.snapshot(), calm.snapshot(), "and what is remembered is the same");
        // Told again is told with the same id.
        let key = |alert: &Transition| (alert.id.clone(), alert.turn == Turn::Firing, alert.message.clone(), alert.ts);
        let keys = |alerts: &[Transition]| alerts.iter().map(key).collect::<BTreeSet<_>>();
        assert_eq!(keys(&retold), keys(&told));
    }
    println!("{words:?}");
    let all = ["high", "lasting", "silent", "average", "grouped"];
    let all = all.iter().flat_map(|rule| ["firing", "resolved", "backfill"].map(|word| format!("{rule:?} {word:?}")));
    let never = all.filter(|word| !words.contains_key(word)).collect::<Vec<_>>();
    assert!(never.is_empty(), "{never:?}: the entries are too tame");
}
