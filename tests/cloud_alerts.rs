//! Alerts of the cloud, with real processes: rules by HTTP, server-sent events through kill -9, targets that hang, a broker, and
//! an edge that raises the same alert.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use wire::{FieldType, StreamField, StreamSchema};

use crate::doors_limits::resident;
use crate::harness::{Answer, Chain, Cloud, EDGE, Edge, Mosquitto, Sender, TOKEN, mqtt_source, publish};
use crate::listener::Listener;
use crate::load::seeded;
use crate::process::{PATIENCE, POLL};

pub(crate) const RULE: &str = "on = \"field\"\nwhen = \"n > 100\"\nmessage = \"{{ device }} has {{ n }}\"\n\
                    severity = \"critical\"\ntopic = \"alerts/{device}/high\"\n";

fn schema() -> Arc<StreamSchema> {
    let field = StreamField { name: "n".parse().unwrap(), kind: FieldType::Int64 };
    Arc::new(StreamSchema::new(vec![field]).unwrap())
}

fn now_us() -> i64 {
    chrono::Utc::now().timestamp_micros()
}

/// Readings of now: device and value, a microsecond apart.
fn readings(all: &[(&str, i64)]) -> RecordBatch {
    let from = now_us();
    readings_at((from..).zip(all).map(|(ts, (device, n))| (ts, *device, *n)).collect())
}

/// Readings: time, device and value.
fn readings_at(all: Vec<(i64, &str, i64)>) -> RecordBatch {
    let ts = TimestampMicrosecondArray::from_iter_values(all.iter().map(|(ts, ..)| *ts));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(ts.with_timezone("UTC")),
        Arc::new(StringArray::from_iter_values(all.iter().map(|(_, device, _)| device))),
        Arc::new(Int64Array::from_iter_values(all.iter().map(|(.., n)| *n))),
        Arc::new(StringArray::from_iter_values(all.iter().map(|_| "good"))),
    ];
    RecordBatch::try_new(schema().arrow().clone(), columns).unwrap()
}

/// A sender of readings that sends until it is taken.
pub(crate) struct Readings {
    sender: Sender,
    chain: Chain,
}

impl Readings {
    pub(crate) fn to(cloud: &Cloud) -> Self {
        Self { sender: Sender::to(cloud), chain: Chain::new("field", schema()) }
    }

    pub(crate) async fn send(&mut self, all: &[(&str, i64)]) {
        self.send_batch(&readings(all)).await;
    }

    async fn send_batch(&mut self, rows: &RecordBatch) {
        let batch = self.chain.seal(rows);
        let begun = Instant::now();
        while !matches!(self.sender.send(&schema(), std::slice::from_ref(&batch)).await, Answer::Acks(_)) {
            assert!(begun.elapsed() < PATIENCE, "the batch is not taken");
            tokio::time::sleep(POLL).await;
        }
    }
}

pub(crate) async fn request(cloud: &Cloud, method: &str, path: &str, body: &str) -> (u16, Value) {
    let client = reqwest::Client::builder().timeout(PATIENCE).build().unwrap();
    let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
    let answer = client.request(method, format!("{}{path}", cloud.http)).body(body.to_owned()).send().await.unwrap();
    let status = answer.status().as_u16();
    (status, serde_json::from_str(&answer.text().await.unwrap()).unwrap_or_default())
}

pub(crate) async fn put(cloud: &Cloud, name: &str, text: &str) {
    let (status, answer) = request(cloud, "PUT", &format!("/v1/rules/{name}"), text).await;
    assert_eq!(status, 200, "{answer}");
}

/// Device and transition of the next change.
async fn word(listener: &mut Listener) -> String {
    let data = &listener.next().await["data"];
    format!("{} {}", data["device"].as_str().unwrap_or("-"), data["transition"].as_str().unwrap())
}

pub(crate) fn listening(cloud: &Cloud, query: &str) -> Listener {
    Listener::new(format!("{}/v1/alerts/stream{query}", cloud.http))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_misses_nothing_and_hears_nothing_twice_through_kill_9_of_the_cloud() {
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"1s\"\n").await;
    let mut readings = Readings::to(&cloud);
    readings.send(&[("d0", 1)]).await;
    let (status, answer) = request(&cloud, "PUT", "/v1/rules/high", &RULE.replace("n >", "nn >")).await;
    assert_eq!(status, 400, "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("nn"), "{answer}");
    put(&cloud, "high", RULE).await;
    let mut listener = listening(&cloud, "?topic=alerts/%2B/high&severity=critical");
    listener.connect().await;
    // Who has heard nothing yet comes back without an id.
    let mut other = listening(&cloud, "?topic=alerts/d7/%23&after=0");
    other.connect().await;
    let begun = Instant::now();
    readings.send(&[("d1", 200)]).await;
    let first = listener.next().await;
    println!("from the sender to the subscriber: {:?}", begun.elapsed());
    assert_eq!(first["data"]["message"], "d1 has 200");
    assert_eq!((&first["type"], &first["subject"]), (&"weir.alert.firing".into(), &"alerts/d1/high".into()));
    for round in 0..6 {
        let device = format!("d{}", 2 + round);
        // Decided, and perhaps not heard: the cloud is killed at once.
        readings.send(&[(device.as_str(), 500)]).await;
        cloud.kill();
        cloud.run();
        cloud.wait().await;
        readings.send(&[(device.as_str(), 5)]).await;
        assert_eq!(word(&mut listener).await, format!("{device} firing"));
        assert_eq!(word(&mut listener).await, format!("{device} resolved"));
    }
    assert_eq!([word(&mut other).await, word(&mut other).await], ["d7 firing", "d7 resolved"]);
    // From the stream itself, for who was not there at all.
    let mut late = listening(&cloud, "?after=0");
    let mut all = Vec::new();
    for _ in 0..13 {
        all.push(word(&mut late).await);
    }
    let rows =
        cloud.sql("SELECT device, transition, sequence FROM alert_log WHERE told ORDER BY sequence").await.unwrap();
    let recorded =
        rows.iter().map(|row| format!("{} {}", row["device"].as_str().unwrap(), row["transition"].as_str().unwrap()));
    assert_eq!(all, recorded.collect::<Vec<_>>());
    let sequences = cloud.sql("SELECT count(*) AS n, count(DISTINCT sequence) AS d FROM alert_log").await.unwrap();
    assert_eq!(sequences[0]["n"], sequences[0]["d"]);

    // An acknowledgement is a row with a name, and the alert is known after the restart.
    let id = first["data"]["id"].as_str().unwrap();
    let said = json!({ "by": "eva", "note": "on my way" }).to_string();
    let (status, answer) = request(&cloud, "POST", &format!("/v1/alerts/{id}/ack"), &said).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(word(&mut listener).await, "d1 acknowledged");
    let (_, open) = request(&cloud, "GET", "/v1/alerts", "").await;
    assert_eq!((open.as_array().unwrap().len(), &open[0]["acknowledged_by"]), (1, &"eva".into()), "{open}");
    let open = cloud.sql("SELECT alert_id, device, state FROM system.alerts").await.unwrap();
    assert_eq!(open, [json!({ "alert_id": id, "device": "d1", "state": "firing" })]);
    let rows = cloud.sql("SELECT actor, note FROM alert_log WHERE transition = 'acknowledged'").await.unwrap();
    assert_eq!(rows, [json!({ "actor": "eva", "note": "on my way" })]);
}

/// What a webhook got: the head of each request, and its body.
pub(crate) type Got = Arc<Mutex<Vec<(String, Value)>>>;

/// Takes what is posted; what is posted to `/nothing` is refused.
pub(crate) async fn serve(listener: TcpListener, got: Got) {
    loop {
        let (mut socket, _) = listener.accept().await.unwrap();
        let got = Arc::clone(&got);
        tokio::spawn(async move {
            let mut request = Vec::new();
            loop {
                let mut part = [0; 8_192];
                let count = socket.read(&mut part).await.unwrap_or(0);
                request.extend(&part[..count]);
                let text = String::from_utf8_lossy(&request).to_lowercase();
                let length = text.split_once("content-length: ").and_then(|(_, rest)| rest.split_once("\r\n"));
                let length = length.and_then(|(length, _)| length.parse::<usize>().ok());
                if let (Some((head, _)), Some(length)) = (text.split_once("\r\n\r\n"), length)
                    && request.len() >= head.len() + 4 + length
                {
                    let refused = head.contains("/nothing");
                    if !refused {
                        let body = serde_json::from_slice(&request[head.len() + 4..]).unwrap();
                        got.lock().unwrap().push((head.to_owned(), body));
                    }
                    let status = if refused { "404 Not Found" } else { "200 OK" };
                    let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                    // The other side may be gone.
                    drop(socket.write_all(answer.as_bytes()).await);
                    return;
                }
                if count == 0 {
                    return;
                }
            }
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_hangs_holds_up_no_other_and_gets_everything_when_it_answers() {
    let directory = tempfile::tempdir().unwrap();
    let got: Got = Arc::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let good = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, Arc::clone(&got)));
    // Takes connections and never answers.
    let hanging = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = hanging.local_addr().unwrap();
    let held = tokio::spawn(async move {
        let mut all = Vec::new();
        loop {
            all.push(hanging.accept().await.unwrap());
        }
    });
    let target = |name: &str, kind: &str, url: String, more: &str| {
        format!("[[alerts.publish]]\nname = \"{name}\"\nkind = \"{kind}\"\nurl = \"{url}\"\n{more}\n")
    };
    let targets = [
        target("hangs", "webhook", format!("http://{address}/hook"), "timeout = \"300ms\"\nattempts = 1000"),
        target("good", "webhook", format!("http://{good}/hook"), "secret = \"s3cret\""),
        target("manager", "alertmanager", format!("http://{good}"), ""),
        target("refuses", "webhook", format!("http://{good}/nothing"), ""),
    ];
    let mut cloud = Cloud::start(directory.path(), "a", &targets.concat()).await;
    let mut readings = Readings::to(&cloud);
    readings.send(&[("d0", 1)]).await;
    put(&cloud, "high", RULE).await;
    let begun = Instant::now();
    for n in 0..20 {
        readings.send(&[(format!("d{n}").as_str(), 200)]).await;
    }
    while got.lock().unwrap().len() < 40 {
        assert!(begun.elapsed() < PATIENCE, "{} of 40", got.lock().unwrap().len());
        tokio::time::sleep(POLL).await;
    }
    println!("20 alerts to two targets beside one that hangs: {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(20));
    let mut of_kind: BTreeMap<bool, Vec<Value>> = BTreeMap::new();
    for (headers, body) in got.lock().unwrap().iter() {
        let signed = headers.contains("x-weir-signature");
        assert_eq!(signed, body.is_object());
        of_kind.entry(signed).or_default().push(body.clone());
    }
    let time = |text: &Value| chrono::DateTime::parse_from_rfc3339(text.as_str().unwrap()).unwrap().timestamp_micros();
    for alert in of_kind[&false].iter().flat_map(|body| body.as_array().unwrap()) {
        let labels = &alert["labels"];
        assert_eq!((&labels["alertname"], &labels["severity"]), (&"high".into(), &"critical".into()), "{alert}");
        assert_eq!((&labels["stream"], labels["device"].is_string()), (&"field".into(), true), "{alert}");
        let (starts, ends) = (time(&alert["startsAt"]), time(&alert["endsAt"]));
        assert!(starts <= now_us() && ends > now_us() + 60_000_000, "it ends while it fires: {alert}");
    }
    let devices = of_kind[&true].iter().map(|body| body["data"]["device"].as_str().unwrap().to_owned());
    assert_eq!(
        devices.collect::<Vec<_>>(),
        (0..20).map(|n| format!("d{n}")).collect::<Vec<_>>(),
        "in order, each once"
    );
    // What is refused is a dead letter.
    let dead = "SELECT count(*) FROM alert_deliveries WHERE target = 'refuses' AND state = 'dead'";
    while cloud.integer(dead).await < 20 {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(POLL).await;
    }
    let metrics = reqwest::get(format!("{}/metrics", cloud.http)).await.unwrap().text().await.unwrap();
    for line in ["weir_alert_dead_total{target=\"refuses\"} 20", "weir_alert_rules{state=\"runs\"} 1"] {
        assert!(metrics.lines().any(|found| found == line), "{line}: {metrics}");
    }
    // The place of each target is known after kill -9, and the one that hung gets all of it.
    let place = "SELECT coalesce(max(sequence), 0) FROM alert_deliveries WHERE target = 'good'";
    let last = cloud.integer("SELECT max(sequence) FROM alert_log WHERE told").await;
    while cloud.integer(place).await < last {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(POLL).await;
    }
    cloud.kill();
    held.abort();
    drop(held.await);
    got.lock().unwrap().clear();
    let listener = TcpListener::bind(address).await.unwrap();
    tokio::spawn(serve(listener, Arc::clone(&got)));
    cloud.run();
    cloud.wait().await;
    let begun = Instant::now();
    let is_plain = |(head, body): &&(String, Value)| !head.contains("x-weir-signature") && body.is_object();
    let first = |got: &Got| got.lock().unwrap().iter().filter(is_plain).count();
    while first(&got) < 20 {
        assert!(begun.elapsed() < PATIENCE, "{} of 20", first(&got));
        tokio::time::sleep(POLL).await;
    }
    let (_, targets) = request(&cloud, "GET", "/v1/targets", "").await;
    assert_eq!((&targets[1]["name"], &targets[1]["behind"]), (&"good".into(), &0.into()), "{targets}");
}

#[tokio::test(flavor = "multi_thread")]
async fn edge_and_cloud_raise_one_alert_and_the_broker_retains_it_while_it_fires() {
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let target = format!(
        "[commit]\nmax_age = \"1s\"\n[[alerts.publish]]\nname = \"broker\"\nkind = \"mqtt\"\nurl = \"{}\"\ntopic = \"city/#\"\n",
        broker.url()
    );
    let cloud = Cloud::start(directory.path(), "a", &target).await;
    let map = "[source.map]\ndevice = \"topic:1\"\nn = \"/n\"\n[stream.field.fields]\nn = { type = \"int64\" }\n";
    let rule = "[[rule]]\nname = \"high\"\non = \"field\"\nwhen = \"n > 100\"\ntopic = \"local/{device}/high\"\n";
    let source = mqtt_source(&broker.url(), "field/#", "field", &format!("{map}{rule}"));
    let mut edge = Edge::start(directory.path(), &cloud, &source).await;
    let send = async |n: i64| {
        publish(broker.client("p"), vec![("field/d1".to_owned(), format!("{{\"n\":{n}}}").into_bytes())]).await;
    };
    send(1).await;
    edge.drained().await;
    // The same words: the same rule.
    put(&cloud, "high", "on = \"field\"\nwhen = \"n > 100\"\ntopic = \"city/{device}/high\"\n").await;
    let (client, mut events) = AsyncClient::new(broker.client("l"), 100);
    client.subscribe("city/#", QoS::AtLeastOnce).await.unwrap();
    while !matches!(events.poll().await.unwrap(), Event::Incoming(Packet::SubAck(_))) {}
    let mut next = async || loop {
        let event = tokio::time::timeout(PATIENCE, events.poll()).await.expect("a message comes").unwrap();
        if let Event::Incoming(Packet::Publish(message)) = event {
            assert_eq!(&message.topic[..], b"city/d1/high");
            return serde_json::from_slice::<Value>(&message.payload).ok();
        }
    };
    send(200).await;
    let firing = next().await.unwrap();
    assert_eq!(firing["type"], "weir.alert.firing");
    // Both have raised it.
    let begun = Instant::now();
    loop {
        let (_, open) = request(&cloud, "GET", "/v1/alerts", "").await;
        if open[0]["raised_by"].as_array().is_some_and(|by| by.len() == 2) {
            assert_eq!(open.as_array().unwrap().len(), 1, "{open}");
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{open}");
        tokio::time::sleep(POLL).await;
    }
    // A rule about what edges raise changes nothing about it.
    put(&cloud, "grave", "on = \"alerts\"\nwhen = \"severity = 'critical'\"\n").await;
    send(3).await;
    let resolved = next().await.unwrap();
    assert_eq!((&resolved["type"], &resolved["data"]["id"]), (&"weir.alert.resolved".into(), &firing["data"]["id"]));
    assert_eq!(next().await, None, "what was retained is taken back");
    let ids = cloud.integer("SELECT count(DISTINCT alert_id) FROM alert_log WHERE rule = 'high'").await;
    let told = cloud.integer("SELECT count(*) FROM alert_log WHERE told").await;
    assert_eq!((ids, told), (1, 2));
    edge.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_alert_is_recorded_once_and_delivered_through_kill_9_at_any_moment() {
    const DEVICES: usize = 50;
    const ROUNDS: usize = 20;
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let got: Got = Arc::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, Arc::clone(&got)));
    let target = format!(
        "[commit]\nmax_age = \"1s\"\n[[alerts.publish]]\nname = \"all\"\nkind = \"webhook\"\nurl = \"http://{address}/\"\n"
    );
    let mut cloud = Cloud::start(directory.path(), "a", &target).await;
    let mut readings = Readings::to(&cloud);
    readings.send(&[("d0", 1)]).await;
    put(&cloud, "high", RULE).await;
    let devices: Vec<String> = (0..DEVICES).map(|device| format!("d{device}")).collect();
    // Between two kills some are sent, and others while the node is away.
    let mut pace = StdRng::seed_from_u64(random.random());
    let sending = tokio::spawn(async move {
        for _ in 0..ROUNDS {
            for value in [500, 5] {
                tokio::time::sleep(Duration::from_millis(pace.random_range(0..150))).await;
                readings.send(&devices.iter().map(|device| (device.as_str(), value)).collect::<Vec<_>>()).await;
            }
        }
    });
    let mut kills = 0;
    while !sending.is_finished() {
        tokio::time::sleep(Duration::from_millis(random.random_range(0..700))).await;
        cloud.kill();
        cloud.run();
        cloud.wait().await;
        kills += 1;
    }
    sending.await.unwrap();
    let begun = Instant::now();
    let resolved = "SELECT count(*) FROM alert_log WHERE transition = 'resolved'";
    while cloud.integer(resolved).await < (DEVICES * ROUNDS) as i64 {
        assert!(begun.elapsed() < PATIENCE, "{} resolved", cloud.integer(resolved).await);
        tokio::time::sleep(POLL).await;
    }
    println!("{kills} times killed");
    assert!(kills > 0);
    let rows = "SELECT transition, count(*) AS n, count(DISTINCT alert_id) AS ids FROM alert_log \
                WHERE alert_id IS NOT NULL GROUP BY transition ORDER BY transition";
    let all = DEVICES * ROUNDS;
    let expected = ["firing", "resolved"].map(|word| json!({ "transition": word, "n": all, "ids": all }));
    assert_eq!(cloud.sql(rows).await.unwrap(), expected);
    let sequences = cloud.sql("SELECT count(*) AS n, count(DISTINCT sequence) AS d FROM alert_log").await.unwrap();
    assert_eq!(sequences[0]["n"], sequences[0]["d"]);
    // Delivered: each at least once, and repeats have the id of the first.
    let ids = |got: &Got| {
        let all = got.lock().unwrap();
        all.iter().map(|(_, body)| body["id"].as_str().unwrap().to_owned()).collect::<BTreeSet<_>>()
    };
    while ids(&got).len() < 2 * all {
        assert!(begun.elapsed() < PATIENCE, "{} of {}", ids(&got).len(), 2 * all);
        tokio::time::sleep(POLL).await;
    }
    println!("{} deliveries of {} changes", got.lock().unwrap().len(), 2 * all);
    let rows = cloud.sql("SELECT alert_id, sequence FROM alert_log WHERE told").await.unwrap();
    let recorded = rows.iter().map(|row| format!("{}/{}", row["alert_id"].as_str().unwrap(), row["sequence"]));
    assert_eq!(ids(&got), recorded.collect::<BTreeSet<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_edge_sends_late_is_an_alert_once() {
    let directory = tempfile::tempdir().unwrap();
    let more = "[commit]\nmax_age = \"1s\"\n[alerts]\nhorizon = \"10m\"\n";
    let mut cloud = Cloud::start(directory.path(), "a", more).await;
    let mut edge = Readings::to(&cloud);
    edge.send(&[("d0", 1)]).await;
    put(&cloud, "high", RULE).await;
    let mut listener = listening(&cloud, "?after=0");
    listener.connect().await;
    edge.send(&[("d1", 1)]).await;
    // The link was down: what was measured before comes now, some of it too late for anybody to be told.
    let before = |seconds: i64| now_us() - seconds * 1_000_000;
    let backlog = [(3_600, 700), (3_000, 1), (60, 500), (30, 2)];
    let backlog: Vec<_> = backlog.into_iter().map(|(seconds, n)| (before(seconds), "d1", n)).collect();
    edge.send_batch(&readings_at(backlog.clone())).await;
    assert_eq!(word(&mut listener).await, "d1 firing");
    assert_eq!(word(&mut listener).await, "d1 resolved");
    let rows = "SELECT state, told, count(*) AS n, count(DISTINCT alert_id) AS ids FROM alert_log \
                WHERE alert_id IS NOT NULL AND device = 'd1' GROUP BY state, told ORDER BY state";
    let expected = [("backfill", false, 2), ("firing", true, 1), ("resolved", true, 1)]
        .map(|(state, told, n)| json!({ "state": state, "told": told, "n": n, "ids": 1 }));
    assert_eq!(cloud.sql(rows).await.unwrap(), expected);
    // By another way once more, through a kill, and behind it something that is new.
    edge.send_batch(&readings_at(backlog)).await;
    cloud.kill();
    cloud.run();
    cloud.wait().await;
    edge.send_batch(&readings_at(vec![(before(20), "d2", 1), (before(40), "d2", 900), (before(35), "d2", 1)])).await;
    assert_eq!(word(&mut listener).await, "d2 firing");
    assert_eq!(word(&mut listener).await, "d2 resolved");
    edge.send_batch(&readings_at(vec![(before(25), "d2", 901)])).await;
    assert_eq!(word(&mut listener).await, "d2 firing");
    assert_eq!(word(&mut listener).await, "d2 resolved");
    assert_eq!(cloud.sql(rows).await.unwrap(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_device_stays_silent_over_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"1s\"\n").await;
    let mut readings = Readings::to(&cloud);
    readings.send(&[("d1", 1)]).await;
    put(&cloud, "silent", "on = \"field\"\nabsent = \"3s\"\nevery = \"1s\"\n").await;
    let mut listener = listening(&cloud, "?after=0");
    assert_eq!(word(&mut listener).await, "d1 firing");
    cloud.kill();
    cloud.run();
    cloud.wait().await;
    // It is asked some times, first before the node can know, then when it does.
    let asked = "SELECT count(*) FROM system.queries WHERE text LIKE 'SELECT CAST(\"device\"%' AND state = 'done'";
    let begun = Instant::now();
    while cloud.integer(asked).await < 5 {
        assert!(begun.elapsed() < PATIENCE, "{} times", cloud.integer(asked).await);
        tokio::time::sleep(POLL).await;
    }
    let recorded = "SELECT count(*) FROM alert_log WHERE alert_id IS NOT NULL";
    assert_eq!(cloud.integer(recorded).await, 1, "only that it fires");
    readings.send(&[("d1", 1)]).await;
    assert_eq!(word(&mut listener).await, "d1 resolved");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edge_is_silent_when_none_of_its_devices_is_heard() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(directory.path(), "a", "").await;
    let mut readings = Readings::to(&cloud);
    readings.send(&[("d1", 1), ("d2", 1)]).await;
    put(&cloud, "silent", "on = \"field\"\nabsent = \"3s\"\nby = [\"_edge\"]\nevery = \"1s\"\n").await;
    let mut listener = listening(&cloud, "?after=0");
    let fires = listener.next().await;
    assert_eq!((&fires["data"]["transition"], &fires["data"]["labels"]), (&json!("firing"), &json!({ "_edge": EDGE })));
    // One of them is enough.
    readings.send(&[("d2", 1)]).await;
    let ends = listener.next().await;
    assert_eq!((&ends["data"]["transition"], &ends["data"]["id"]), (&json!("resolved"), &fires["data"]["id"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_has_a_token_writes_no_decisions() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(directory.path(), "a", "").await;
    let mut chain = Chain::new("alert_log", schema());
    let forged = chain.seal(&readings(&[("d1", 1)]));
    let Answer::Acks(acks) = Sender::to(&cloud).send(&schema(), &[forged]).await else { panic!() };
    assert!(acks.refused.len() == 1 && acks.refused[0].reason.contains("the cloud alone"), "{acks:?}");
    let streams = cloud.sql("SELECT name FROM system.streams").await.unwrap();
    assert!(!streams.contains(&json!({ "name": "alert_log" })), "{streams:?}");
    // By the doors of others it is another stream.
    let lines = "alert_log sequence=99i,alert_id=\"a\",state=\"firing\"\n";
    let write = reqwest::Client::new().post(format!("{}/api/v2/write", cloud.http)).bearer_auth(TOKEN);
    assert!(write.body(lines).send().await.unwrap().status().is_success());
    let streams = cloud.sql("SELECT name FROM system.streams").await.unwrap();
    assert!(!streams.contains(&json!({ "name": "alert_log" })), "{streams:?}");
    assert!(streams.contains(&json!({ "name": "alert_log_" })), "{streams:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_alerts_wait_for_a_target_that_hangs_and_for_nobody_else() {
    const ALERTS: usize = 10_000;
    let directory = tempfile::tempdir().unwrap();
    let hanging = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = hanging.local_addr().unwrap();
    let held = tokio::spawn(async move {
        let mut all = Vec::new();
        loop {
            all.push(hanging.accept().await.unwrap());
        }
    });
    let got: Got = Arc::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let good = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, Arc::clone(&got)));
    let target = |name: &str, url: String, more: &str| {
        format!("[[alerts.publish]]\nname = \"{name}\"\nkind = \"webhook\"\nurl = \"{url}\"\n{more}\n")
    };
    let targets = [
        target("hangs", format!("http://{address}/hook"), "timeout = \"300ms\"\nattempts = 1000"),
        target("good", format!("http://{good}/hook"), ""),
    ];
    let cloud = Cloud::start(directory.path(), "a", &targets.concat()).await;
    let mut readings = Readings::to(&cloud);
    readings.send(&[("d", 1)]).await;
    put(&cloud, "high", RULE).await;
    let mut heard = listening(&cloud, "?after=0");
    heard.connect().await;
    let before = resident(&cloud) >> 20;
    let devices: Vec<String> = (0..ALERTS).map(|n| format!("d{n}")).collect();
    let begun = Instant::now();
    readings.send(&devices.iter().map(|device| (device.as_str(), 200)).collect::<Vec<_>>()).await;
    for _ in 0..ALERTS {
        assert_eq!(heard.next().await["data"]["transition"], "firing");
    }
    println!("{ALERTS} alerts to a listener beside a target that hangs: {:?}", begun.elapsed());
    assert!(begun.elapsed() < PATIENCE);
    // The other target goes on, in order, while this one has none of them; all are counted, and none is held in memory for it.
    let enough = 1_000;
    let from = told_in_order(&got, enough, begun).await;
    let behind = cloud.counter("weir_alert_behind{target=\"hangs\"}").await;
    assert!(behind >= ALERTS as u64, "{behind} behind");
    while cloud.counter("weir_alert_retried_total{target=\"hangs\"}").await == 0 {
        assert!(begun.elapsed() < PATIENCE, "it was not tried again");
        tokio::time::sleep(POLL).await;
    }
    assert_eq!(cloud.counter("weir_alert_delivered_total{target=\"hangs\"}").await, 0);
    let grown = (resident(&cloud) >> 20).saturating_sub(before);
    println!("{grown} MiB more than before them");
    assert!(grown < 400, "{grown} MiB");
    // What comes next is told at once.
    let asked = Instant::now();
    readings.send(&[("d0", 5)]).await;
    assert_eq!(heard.next().await["data"]["transition"], "resolved");
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    // It answers: it gets them from where it stood, each in order.
    held.abort();
    drop(held.await);
    let late: Got = Arc::default();
    tokio::spawn(serve(TcpListener::bind(address).await.unwrap(), Arc::clone(&late)));
    let begun = Instant::now();
    let first = told_in_order(&late, enough, begun).await;
    assert_eq!(first, from, "it begins with another than the one that it hung at");
}

/// Waits until a target has got so many alerts, each once and in order; the sequence of the first.
async fn told_in_order(got: &Got, enough: usize, begun: Instant) -> i64 {
    while got.lock().unwrap().len() < enough {
        assert!(begun.elapsed() < 2 * PATIENCE, "{} of {enough}", got.lock().unwrap().len());
        tokio::time::sleep(POLL).await;
    }
    let told: Vec<i64> =
        got.lock().unwrap().iter().map(|(_, body)| body["data"]["sequence"].as_i64().unwrap()).collect();
    assert!(told.windows(2).all(|pair| pair[0] < pair[1]), "out of order, or twice");
    told[0]
}
