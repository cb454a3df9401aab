//! An operator's day: the readings of the city of Aarhus with accidents planted by hand, 600 times faster than they came,
//! through Mosquitto, two edges and a cloud to a subscriber by server-sent events and one by MQTT, while each of these is killed
//! with -9. Every alert of the plan, and every one that the readings themselves explain, is told to each subscriber once and in
//! time, and no other; the lake has what was sent, and the view is its SELECT.
//!
//! *Times.* The day is moved so that its last reading is of now. Event time is what readings say, so `for`, `keep_firing_for`,
//! `lateness` and `absent` are minutes of the day, whatever the pace; only what the wall measures is not: ages (`alert_horizon`
//! and `horizon` are longer than the day here, else its morning would be history), and how often a rule is asked (each second, ten
//! minutes of the day). At 600x a second of the wall is ten minutes of the day, so *in time* is counted by the wall, as for an
//! operator: from when the broker has acknowledged the reading that decides, or what is down is back, to the subscriber.
//!
//! *Outages* are at most [`DOWN_STEPS`] steps of the day, for which the view's lateness waits; while a part starts again the day
//! stands still, so that a slow machine changes nothing about what is late. The broker is killed while readings are sent, and
//! forgets what it had not saved: these are sent again, as a gateway does, and the edges know repeats by sensor and time. Before
//! it is killed all earlier ones are in the lake: what Mosquitto loses is not what is tried here.
//!
//! *Not here:* clocks that are set. A process cannot be given another clock without root or libfaketime; see `clock` in
//! edge-agent and the tests of `episodes` in query (`a_clock_that_is_set…`), which take the time as an argument.
//!
//! `WEIR_DAY=whole` replays all 24 hours, `WEIR_DAY_SPEED` sets the pace, `WEIR_SEED` the moments of the kills.

mod expected;
mod plan;
mod subscribers;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event, MqttOptions};
use serde_json::Value;

use self::expected::{Alert, Alerts, expected};
use self::plan::{Day, PLAN, Reading, STEP_US, Told};
use self::subscribers::Subscriber;
use crate::cloud_alerts::{put, request};
use crate::harness::{Cloud, EDGE, Edge, Mosquitto, TOKEN, mqtt_source};
use crate::load::seeded;
use crate::process::{PATIENCE, POLL};
use crate::real_data::aarhus;

const EDGES: [(&str, &str); 2] = [("gw-a", "a-token-of-gw-a"), ("gw-b", "a-token-of-gw-b")];
/// For so many steps a part stays away at most.
const DOWN_STEPS: u32 = 4;
/// See the module. A debug build on a machine that does other things, too.
const IN_TIME: Duration = Duration::from_secs(15);

const CONGESTION: &str =
    "on = \"traffic\"\nwhen = \"avg_speed < 10 AND vehicle_count >= 2\"\nuntil = \"avg_speed > 25\"\nfor = \"10m\"\n";
/// By name. The first runs at the edges, too.
const RULES: [(&str, &str, &str); 3] = [
    ("congestion", CONGESTION, "severity = \"critical\"\n"),
    (
        "slow_district",
        "sql = \"SELECT device, speed FROM district_5m_changes WHERE speed < 15\"\nfor = \"15m\"\nkeep_firing_for = \"20m\"\n",
        "",
    ),
    ("silent", "on = \"traffic\"\nabsent = \"90m\"\nevery = \"1s\"\n", ""),
];
const DISTRICTS: &str = "SELECT time_bucket('5 minutes', t.ts) AS begins, d.district AS device, avg(t.avg_speed) AS speed, \
    count(*) AS n FROM traffic t JOIN sensors_history d ON d.device = t.device AND t.ts >= d.valid_from \
    AND (d.valid_to IS NULL OR t.ts < d.valid_to) GROUP BY 1, 2";

/// What an edge takes of its half of the city.
fn edge_configuration(broker: &Mosquitto, id: &str) -> String {
    let map = format!(
        "[source.map]\ndevice = \"topic:2\"\nts = {{ at = \"/ts\", format = \"epoch_ms\" }}\navg_speed = \"/avg_speed\"\n\
         vehicle_count = \"/vehicle_count\"\n[stream.traffic]\nlateness = \"5m\"\nduplicates = \"first\"\nremember = 400\n\
         [stream.traffic.fields]\navg_speed = {{ type = \"float64\", min = 0 }}\n\
         vehicle_count = {{ type = \"int64\", min = 0 }}\n[alerts]\nalert_horizon = \"2d\"\n\
         [[rule]]\nname = \"congestion\"\n{CONGESTION}topic = \"local/{{device}}\"\n"
    );
    mqtt_source(&broker.url(), &format!("city/{id}/+"), "traffic", &map)
}

/// What may be killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Edge(usize),
    Cloud,
    Broker,
    Subscriber(usize),
}

const PARTS: [Part; 6] =
    [Part::Edge(0), Part::Edge(1), Part::Cloud, Part::Broker, Part::Subscriber(0), Part::Subscriber(1)];

/// All that runs.
struct City {
    broker: Mosquitto,
    cloud: Cloud,
    edges: Vec<Edge>,
    subscribers: [Subscriber; 2],
}

impl City {
    /// kill -9.
    fn kill(&mut self, part: Part) {
        match part {
            Part::Edge(index) => self.edges[index].kill(),
            Part::Cloud => self.cloud.kill(),
            Part::Broker => self.broker.kill(),
            Part::Subscriber(index) => self.subscribers[index].kill(),
        }
    }

    async fn run(&mut self, part: Part) {
        match part {
            Part::Edge(index) => {
                self.edges[index].run();
                self.edges[index].wait().await;
            }
            Part::Cloud => {
                self.cloud.run();
                self.cloud.wait().await;
            }
            Part::Broker => {
                self.broker.run();
                for edge in &mut self.edges {
                    edge.wait().await;
                }
            }
            Part::Subscriber(index) => self.subscribers[index].run(),
        }
    }

    /// Waits until so many readings are in the lake and everybody has heard what was decided.
    async fn settled(&self, sent: usize) {
        let begun = Instant::now();
        loop {
            let stored = self.cloud.integer("SELECT count(*) FROM traffic").await as usize;
            // Until the first alert there is no record of them.
            let told = self.cloud.sql("SELECT count(*) AS n FROM alert_log WHERE told").await;
            let told = told.map_or(0, |rows| rows[0]["n"].as_u64().unwrap() as usize);
            let heard = self.subscribers.each_ref().map(Subscriber::count);
            if stored == sent && heard == [told; 2] {
                return;
            }
            assert!(stored <= sent, "{stored} of {sent} are stored");
            assert!(begun.elapsed() < PATIENCE, "{stored} of {sent} are stored, {heard:?} of {told} heard");
            tokio::time::sleep(POLL).await;
        }
    }
}

/// Topic and payload.
fn message(reading: &Reading, half: usize) -> (String, Vec<u8>) {
    let Reading { device, ts, speed, vehicles } = reading;
    let payload = format!("{{\"ts\":{},\"avg_speed\":{speed},\"vehicle_count\":{vehicles}}}", ts / 1_000);
    (format!("city/{}/{device}", EDGES[half].0), payload.into_bytes())
}

/// Publishes at QoS 1; whether the broker has acknowledged all.
async fn publish(options: MqttOptions, messages: &[(String, Vec<u8>)]) -> bool {
    let (client, mut events) = AsyncClient::new(options, messages.len() + 2);
    for (topic, payload) in messages {
        client.try_publish(topic, QoS::AtLeastOnce, false, payload.clone()).unwrap();
    }
    let mut open = messages.len();
    while open > 0 {
        match tokio::time::timeout(PATIENCE, events.poll()).await {
            Ok(Ok(Event::Incoming(Packet::PubAck(_)))) => open -= 1,
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return false,
        }
    }
    client.try_disconnect().unwrap();
    while events.poll().await.is_ok() {}
    true
}

/// When what was sent, and when something was away.
#[derive(Debug, Default)]
struct Diary {
    /// Newest event time of each step, and when all of it was acknowledged.
    sent: Vec<(i64, Instant)>,
    away: Vec<(Part, Instant, Instant)>,
}

impl Diary {
    /// How late somebody heard what a reading of this time decided; and whether anything was away meanwhile.
    fn delay(&self, decided_by: i64, heard: Instant) -> (Duration, bool) {
        let sent = self.sent.iter().find(|(ts, _)| *ts >= decided_by).expect("it was sent").1;
        let mut since = sent;
        for (_, from, to) in &self.away {
            if *from <= heard && *to >= sent {
                since = since.max(*to);
            }
        }
        (heard.saturating_duration_since(since), since > sent)
    }
}

/// Replays the day and kills the parts one after another, so often in all.
async fn replay(city: &mut City, day: &Day, speed: f64, kills: usize, random: &mut StdRng) -> Diary {
    let half: BTreeMap<&str, usize> =
        day.districts.keys().enumerate().map(|(index, device)| (device.as_str(), index % 2)).collect();
    let mut parts: Vec<Part> = Vec::new();
    while parts.len() < kills {
        let mut all = PARTS;
        all.shuffle(random);
        parts.extend(all);
    }
    // The first and the last steps are quiet, and each part is back before the next one goes.
    let room = (day.steps.len() - 8) / kills;
    assert!(room > DOWN_STEPS as usize + 2, "{kills} kills are too many");
    let moments: BTreeMap<usize, Part> = (0..kills)
        .map(|kill| (4 + kill * room + random.random_range(0..room - DOWN_STEPS as usize - 1), parts[kill]))
        .collect();
    let pace = Duration::from_secs_f64(STEP_US as f64 / 1e6 / speed);
    let (mut diary, mut away, mut known, mut due) = (Diary::default(), None, BTreeSet::new(), Instant::now());
    for (index, step) in day.steps.iter().enumerate().skip(1) {
        let messages: Vec<_> =
            step.readings.iter().map(|reading| message(reading, half[reading.device.as_str()])).collect();
        let part = moments.get(&index).copied();
        if part == Some(Part::Broker) {
            city.settled(day.steps[0].readings.len() + known.len()).await;
        }
        due = (due + pace).max(Instant::now());
        tokio::time::sleep_until(due.into()).await;
        let options = city.broker.client("sensors");
        match part {
            None => assert!(publish(options, &messages).await, "the broker is there"),
            Some(part) => {
                let within = Duration::from_micros(random.random_range(0..60_000));
                let (whole, begun) = tokio::join!(publish(options, &messages), async {
                    tokio::time::sleep(within).await;
                    city.kill(part);
                    Instant::now()
                });
                println!("step {index}: {part:?} is killed after {within:?}");
                if part == Part::Broker {
                    city.run(part).await;
                    diary.away.push((part, begun, Instant::now()));
                    assert!(publish(city.broker.client("sensors"), &messages).await, "the broker is back");
                } else {
                    assert!(whole, "the broker is there");
                    away = Some((part, begun, random.random_range(0..=DOWN_STEPS)));
                }
            }
        }
        known.extend(step.readings.iter().map(|reading| (reading.device.as_str(), reading.ts)));
        diary.sent.push((step.ts, Instant::now()));
        if part == Some(Part::Broker) {
            city.settled(day.steps[0].readings.len() + known.len()).await;
        }
        if let Some((part, begun, left)) = away.take() {
            if left == 0 {
                city.run(part).await;
                diary.away.push((part, begun, Instant::now()));
            } else {
                away = Some((part, begun, left - 1));
            }
        }
    }
    diary
}

/// Loads the districts, and makes view and rules once the streams are there.
async fn prepare(city: &mut City, day: &Day, directory: &Path) {
    let lines = day.districts.iter().map(|(device, district)| format!("{device},{district}\n"));
    let file = directory.join("sensors.csv");
    std::fs::write(&file, format!("REPORT_ID,district\n{}", lines.collect::<String>())).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["load", "--reference", file.to_str().unwrap(), "--key", "REPORT_ID", "--edge", EDGE, "--url"])
        .arg(&city.cloud.http)
        .env("WEIR_TOKEN", TOKEN)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let before = &day.steps[0].readings;
    let half = |device: &str| day.districts.keys().position(|known| known == device).unwrap() % 2;
    let messages: Vec<_> = before.iter().map(|reading| message(reading, half(&reading.device))).collect();
    assert!(publish(city.broker.client("sensors"), &messages).await);
    let begun = Instant::now();
    while city.cloud.sql("SELECT count(*) AS n FROM traffic").await.map_or(0, |rows| rows[0]["n"].as_u64().unwrap())
        < before.len() as u64
    {
        assert!(begun.elapsed() < PATIENCE, "the first readings do not come");
        tokio::time::sleep(POLL).await;
    }
    let view = format!("CREATE MATERIALIZED VIEW district_5m WITH (lateness = '40 minutes') AS {DISTRICTS}");
    city.cloud.sql(&view).await.unwrap();
    for (name, what, more) in RULES {
        put(&city.cloud, name, &format!("{what}{more}topic = \"alerts/{{device}}/{name}\"\n")).await;
    }
}

/// Rule, and sensor or district, of an event.
fn key(data: &Value) -> (String, String) {
    (data["rule"].as_str().unwrap().to_owned(), data["device"].as_str().unwrap().to_owned())
}

fn micros(time: &Value) -> Option<i64> {
    time.as_str().map(|text| chrono::DateTime::parse_from_rfc3339(text).unwrap().timestamp_micros())
}

/// What was told of one alert after the other, by its sequence, and when it was heard.
type Changes<'a> = BTreeMap<i64, (&'a Value, Instant)>;

/// What one subscriber has heard is what is expected: each alert begins and ends once, at its times, in time.
fn check_heard(subscriber: &Subscriber, expected: &Alerts, diary: &Diary) {
    let heard = subscriber.heard.lock().unwrap();
    // By rule and device: ids in the order of their sequence, each with its changes.
    let mut told: BTreeMap<(String, String), Changes<'_>> = BTreeMap::new();
    for (event, at) in heard.events.values() {
        let data = &event["data"];
        told.entry(key(data)).or_default().insert(data["sequence"].as_i64().unwrap(), (data, *at));
    }
    let names: BTreeSet<(String, String)> =
        expected.keys().map(|(rule, device)| ((*rule).to_owned(), device.clone())).collect();
    let nobody: Vec<_> = told.iter().filter(|(key, _)| !names.contains(key)).collect();
    assert!(nobody.is_empty(), "{}: told without data behind it: {nobody:#?}", subscriber.name);
    let mut ids = BTreeSet::new();
    let (mut quiet, mut held_up) = (Vec::new(), Vec::new());
    for ((rule, device), alerts) in expected {
        let who = format!("{} {rule} of {device}", subscriber.name);
        let told = told.remove(&((*rule).to_owned(), device.clone())).unwrap_or_default();
        let changes: Vec<_> = told.values().collect();
        let words: Vec<&str> = changes.iter().map(|(data, _)| data["transition"].as_str().unwrap()).collect();
        let due: Vec<&str> =
            alerts.iter().flat_map(|alert| [Some("firing"), alert.to.map(|_| "resolved")]).flatten().collect();
        assert_eq!(words, due, "{who}: {alerts:#?} {changes:#?}");
        for (alert, changes) in alerts.iter().zip(changes.chunks(2)) {
            let id = changes[0].0["id"].as_str().unwrap();
            assert!(ids.insert(id.to_owned()), "{who}: two alerts have the id {id}");
            assert!(changes.iter().all(|(data, _)| data["id"] == id), "{who}: {changes:#?}");
            for ((data, at), decided_by) in changes.iter().zip([Some(alert.fires_by), alert.ends_by]) {
                check_times(&who, rule, data, alert);
                let (delay, disturbed) = diary.delay(decided_by.unwrap(), *at);
                assert!(delay < IN_TIME, "{who}: {delay:?} late: {data:#}");
                if disturbed { &mut held_up } else { &mut quiet }.push(delay);
            }
        }
    }
    for (what, delays) in [("undisturbed", &mut quiet), ("behind a kill", &mut held_up)] {
        delays.sort();
        let at = |share: usize| delays.get(delays.len() * share / 100).or(delays.last());
        println!(
            "{}: {} {what}: p50 {:?}, p95 {:?}, max {:?}",
            subscriber.name,
            delays.len(),
            at(50),
            at(95),
            delays.last()
        );
    }
    println!("{}: {} repeats", subscriber.name, heard.repeats);
}

/// A rule that is asked knows the wall's time alone.
fn check_times(who: &str, rule: &str, data: &Value, alert: &Alert) {
    if rule != "silent" && data["transition"] == "resolved" {
        assert_eq!((micros(&data["from"]), micros(&data["to"])), (Some(alert.from), alert.to), "{who}: {data:#}");
    }
}

/// The plan's own word about what is expected: a second opinion on it.
fn check_plan(day: &Day, expected: &Alerts) {
    let mut planned = 0;
    for accident in PLAN {
        let (from, to) = (day.at(accident.from), day.at(accident.to));
        let begins = |alert: &&Alert| (from - STEP_US..to).contains(&alert.from);
        let of = |rule: &str| expected.get(&(rule_name(rule), accident.of.to_owned())).into_iter().flatten();
        let found: Vec<_> = RULES.iter().map(|(rule, ..)| (*rule, of(rule).filter(begins).count())).collect();
        let due: Vec<_> =
            RULES.iter().map(|(rule, ..)| (*rule, usize::from(accident.told == Told::Once(rule)))).collect();
        assert_eq!(found, due, "{accident:?}");
        planned += usize::from(accident.told != Told::Nothing);
    }
    let all: usize = expected.values().map(Vec::len).sum();
    println!("{all} alerts: {planned} of the plan, the others in the readings as they are: ");
    for ((rule, device), alerts) in expected {
        println!("  {rule} {device}: {}", alerts.len());
    }
}

fn rule_name(rule: &str) -> &'static str {
    RULES.iter().find(|(name, ..)| *name == rule).expect("it is one of them").0
}

/// The record of decisions: what every alert came to, and by whom it was raised.
async fn check_record(cloud: &Cloud, expected: &Alerts, from_before: bool) {
    const LAST: &str = "SELECT detail FROM alert_log WHERE sequence IN (SELECT max(sequence) FROM alert_log \
                        WHERE alert_id IS NOT NULL AND state <> 'pending' GROUP BY alert_id)";
    let begun = Instant::now();
    let alerts = loop {
        let rows = cloud.sql(LAST).await.unwrap();
        let alerts: Vec<Value> =
            rows.iter().map(|row| serde_json::from_str(row["detail"].as_str().unwrap()).unwrap()).collect();
        // An edge may say later than the cloud's own rule that it is over.
        let is_settled = |alert: &Value| {
            let raised = alert["raised"].as_object().unwrap();
            alert["phase"] != "resolved" || raised.values().all(|raised| !raised["to"].is_null())
        };
        if alerts.iter().all(is_settled) {
            break alerts;
        }
        assert!(begun.elapsed() < PATIENCE, "{alerts:#?}");
        tokio::time::sleep(POLL).await;
    };
    let fired: Vec<&Value> = alerts.iter().filter(|alert| alert["phase"] != "pending").collect();
    assert_eq!(fired.len(), expected.values().map(Vec::len).sum::<usize>(), "{fired:#?}");
    for alert in &fired {
        let raised: Vec<&String> = alert["raised"].as_object().unwrap().keys().collect();
        let by_both = alert["rule"] == "congestion";
        assert_eq!(raised.len(), if by_both { 2 } else { 1 }, "raised by {raised:?}: {alert:#}");
        assert_eq!(alert["told"], true, "{alert:#}");
    }
    let mut aliased = fired.iter().filter(|alert| alert["aliases"] != serde_json::json!([]));
    if from_before {
        let first = aliased.next().expect("the edge knew of the first one before the cloud's rule was there");
        assert_eq!(first["device"], "195658", "{first:#}");
    }
    println!("{} alerts have other ids, too", aliased.count() + usize::from(from_before));
    let sequences = cloud.sql("SELECT count(*) AS n, count(DISTINCT sequence) AS d FROM alert_log").await.unwrap();
    assert_eq!(sequences[0]["n"], sequences[0]["d"]);
    let (_, open) = request(cloud, "GET", "/v1/alerts", "").await;
    let open: BTreeSet<_> =
        open.as_array().unwrap().iter().filter(|alert| alert["state"] == "firing").map(key).collect();
    let due = expected.iter().filter(|(_, alerts)| alerts.iter().any(|alert| alert.to.is_none()));
    assert_eq!(open, due.map(|((rule, device), _)| ((*rule).to_owned(), device.clone())).collect());
}

/// What is stored is what was sent, each once, and the view is its SELECT.
async fn check_lake(cloud: &Cloud, day: &Day) {
    let distinct = day.distinct();
    let begun = Instant::now();
    while (cloud.integer("SELECT count(*) FROM traffic").await as usize) < distinct.len() {
        assert!(begun.elapsed() < PATIENCE, "not all of {} readings are stored", distinct.len());
        tokio::time::sleep(POLL).await;
    }
    let sums = "SELECT count(*) AS n, sum(avg_speed) AS s, sum(vehicle_count) AS v, \
                sum(avg_speed * (extract(epoch FROM ts) % 86400)) AS w FROM traffic";
    let found = cloud.sql(sums).await.unwrap();
    let seconds = |ts: i64| (ts / 1_000_000 % 86_400) as f64;
    let due = [
        ("n", distinct.len() as f64),
        ("s", distinct.iter().map(|reading| reading.speed).sum()),
        ("v", distinct.iter().map(|reading| reading.vehicles as f64).sum()),
        ("w", distinct.iter().map(|reading| reading.speed * seconds(reading.ts)).sum()),
    ];
    for (name, due) in due {
        let value = found[0][name].as_f64().unwrap();
        assert!((value - due).abs() <= due.abs() * 1e-9, "{name}: {value} instead of {due}");
    }
    let closed = (day.steps.last().unwrap().ts - expected::WINDOW_WAITS_US - STEP_US).div_euclid(STEP_US) * STEP_US;
    let until = format!("to_timestamp_micros({closed})");
    let shown = format!("SELECT begins, device, speed, n FROM district_5m WHERE begins <= {until} ORDER BY 1, 2");
    let asked = format!("SELECT * FROM ({DISTRICTS}) AS q WHERE begins <= {until} ORDER BY 1, 2");
    let begun = Instant::now();
    loop {
        let (shown, asked) = (cloud.sql(&shown).await.unwrap(), cloud.sql(&asked).await.unwrap());
        if shown == asked && !asked.is_empty() {
            println!("{} rows of the view", shown.len());
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{} rows shown, {} asked", shown.len(), asked.len());
        tokio::time::sleep(POLL).await;
    }
}

fn number<T: std::str::FromStr>(name: &str, usual: T) -> T {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_alert_of_an_operators_day_is_told_once_and_in_time() {
    let Some(file) = aarhus() else { return };
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let mut random = seeded();
    let whole = std::env::var("WEIR_DAY").is_ok_and(|text| text == "whole");
    let (hours, kills) = if whole { (("00:00", "24:00"), 18) } else { (("06:00", "12:30"), 6) };
    let sensors: PathBuf = file.with_file_name("sensors_40.csv");
    let day = Day::read(&file, &sensors, hours, chrono::Utc::now().timestamp_micros());
    let expected = expected(&day);
    check_plan(&day, &expected);

    let mut more = String::from("[commit]\nmax_age = \"2s\"\n[alerts]\nhorizon = \"2d\"\n");
    more += &format!(
        "[[alerts.publish]]\nname = \"broker\"\nkind = \"mqtt\"\nurl = \"{}\"\ntopic = \"alerts/#\"\nattempts = 1000\n",
        broker.url()
    );
    more.extend(EDGES.map(|(id, token)| format!("[[edge]]\nid = \"{id}\"\ntoken = \"{token}\"\n")));
    let cloud = Cloud::start(directory.path(), "a", &more).await;
    let mut edges: Vec<Edge> = Vec::new();
    for (id, token) in EDGES {
        let directory = directory.path().join(id);
        std::fs::create_dir(&directory).unwrap();
        let configuration = edge_configuration(&broker, id);
        edges.push(Edge::start_as(&directory, (id, token), &[&cloud.http], &configuration).await);
    }
    let subscribers = [
        Subscriber::by_sse(format!("{}/v1/alerts/stream?topic=alerts/%23&after=0", cloud.http)),
        Subscriber::by_mqtt(broker.client("control-room")),
    ];
    let mut city = City { broker, cloud, edges, subscribers };
    prepare(&mut city, &day, directory.path()).await;
    let begun = Instant::now();
    let diary = replay(&mut city, &day, number("WEIR_DAY_SPEED", 600.0), kills, &mut random).await;
    println!("{} steps in {:?}", day.steps.len(), begun.elapsed());
    check_lake(&city.cloud, &day).await;
    let told: usize = expected.values().flatten().map(|alert| 1 + usize::from(alert.to.is_some())).sum();
    let waiting = Instant::now();
    while city.subscribers.iter().any(|subscriber| subscriber.count() < told) && waiting.elapsed() < PATIENCE {
        tokio::time::sleep(POLL).await;
    }
    check_record(&city.cloud, &expected, !whole).await;
    for edge in &mut city.edges {
        let status = edge.drained().await;
        assert_eq!(status["quarantined"], serde_json::json!({}));
    }
    city.settled(day.distinct().len()).await;
    for subscriber in &city.subscribers {
        check_heard(subscriber, &expected, &diary);
    }
    let (_, targets) = request(&city.cloud, "GET", "/v1/targets", "").await;
    assert_eq!((&targets[0]["dead"], &targets[0]["missed"]), (&0.into(), &0.into()), "{targets}");
    for edge in &mut city.edges {
        edge.stop();
    }
}
