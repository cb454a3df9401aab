//! Links, with real processes: from a reading at one edge to an actuator at another, to topics and webhooks, through kill -9 of the
//! cloud and of the edge.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::Rng;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::cloud_alerts::{Got, RULE, Readings, listening, put, request, serve};
use crate::harness::{Cloud, Edge, Mosquitto, mqtt_source, publish};
use crate::load::seeded;
use crate::process::{PATIENCE, POLL};

const OTHER: (&str, &str) = ("gw-018", "the-token-of-the-other");

fn with_other_edge(more: &str) -> String {
    format!("[commit]\nmax_age = \"1s\"\n[[edge]]\nid = \"{}\"\ntoken = \"{}\"\n{more}", OTHER.0, OTHER.1)
}

/// The other edge, beside a broker of its own, that may be told a plan.
async fn other_edge(directory: &Path, cloud: &Cloud, broker: &Mosquitto, rate: &str) -> Edge {
    let map = "[source.map]\ndevice = \"topic:1\"\nn = \"/n\"\n[stream.signals.fields]\nn = { type = \"int64\" }\n";
    let command = format!(
        "[[command]]\nname = \"plan\"\npublish = {{ topic = \"city/{{device}}/plan\" }}\ndevices = [\"s-*\"]\nrate = \"{rate}\"\n"
    );
    let source = mqtt_source(&broker.url(), "signals/#", "signals", &format!("{map}{command}"));
    Edge::start_as(directory, OTHER, &[&cloud.http], &source).await
}

/// What actuators are told: topic, payload, and when it came, µs since 1970.
type Told = Arc<Mutex<Vec<(String, String, i64)>>>;

/// Takes all that comes on `city/#`, for ever.
async fn actuators(broker: &Mosquitto) -> Told {
    let told = Told::default();
    let (client, mut events) = AsyncClient::new(broker.client("actuators"), 100);
    client.subscribe("city/#", QoS::AtLeastOnce).await.unwrap();
    while !matches!(events.poll().await.unwrap(), Event::Incoming(Packet::SubAck(_))) {}
    let all = Arc::clone(&told);
    tokio::spawn(async move {
        let _client = client;
        while let Ok(event) = events.poll().await {
            if let Event::Incoming(Packet::Publish(message)) = event {
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                let at = chrono::Utc::now().timestamp_micros();
                all.lock().unwrap().push((text(&message.topic), text(&message.payload), at));
            }
        }
    });
    told
}

async fn link(cloud: &Cloud, name: &str, text: &str) -> (u16, Value) {
    request(cloud, "PUT", &format!("/v1/links/{name}"), text).await
}

/// Waits until a statement answers so.
async fn until(cloud: &Cloud, statement: &str, expected: Value) {
    let begun = Instant::now();
    loop {
        let rows = Value::from(cloud.sql(statement).await.unwrap());
        if rows == expected {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{statement}: {rows}, not {expected}");
        tokio::time::sleep(POLL).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reading_at_one_edge_is_a_command_at_another() {
    let directory = tempfile::tempdir().unwrap();
    let (one, two) = (directory.path().join("one"), directory.path().join("two"));
    [&one, &two].into_iter().for_each(|directory| std::fs::create_dir(directory).unwrap());
    let (Some(near), Some(far)) = (Mosquitto::start(&one), Mosquitto::start(&two)) else { return };
    let got: Got = Arc::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hook = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, Arc::clone(&got)));
    // It hears of no topic by itself.
    let target = format!(
        "[[alerts.publish]]\nname = \"hook\"\nkind = \"webhook\"\nurl = \"http://{hook}/\"\ntopic = \"none\"\n"
    );
    let cloud = Cloud::start(directory.path(), "a", &with_other_edge(&target)).await;
    let map = "[source.map]\ndevice = \"topic:1\"\nn = \"/n\"\n[stream.field.fields]\nn = { type = \"int64\" }\n";
    let source = mqtt_source(&near.url(), "field/#", "field", map);
    let mut sends = Edge::start(&one, &cloud, &source).await;
    let does = other_edge(&two, &cloud, &far, "100/1m").await;
    let told = actuators(&far).await;
    let send = async |device: &str, n: i64| {
        publish(near.client("p"), vec![(format!("field/{device}"), format!("{{\"n\":{n}}}").into_bytes())]).await;
    };
    send("d1", 1).await;
    sends.drained().await;
    put(&cloud, "high", RULE).await;

    let plan = "from = \"alerts/+/high\"\nwhen = \"transition == 'firing' and severity == 'critical'\"\n\
                to = { edge = \"gw-018\", command = \"plan\", device = \"s-{device}\", \
                payload = '{\"why\":\"{{ message }}\"}', timeout = \"30s\" }\n";
    let (status, answer) = link(&cloud, "plan", plan).await;
    assert_eq!((status, &answer["state"]), (200, &"runs".into()), "{answer}");
    let denied = "from = \"alerts/#\"\nto = { edge = \"gw-018\", command = \"reboot\" }\n";
    assert_eq!(link(&cloud, "denied", denied).await.0, 200);
    assert_eq!(link(&cloud, "jam", "from = \"alerts/+/high\"\nto = { topic = \"jams/{device}\" }\n").await.0, 200);
    let hooked = "from = \"jams/#\"\nto = { webhook = \"hook\", payload = \"jam at {{ device }}\" }\n";
    assert_eq!(link(&cloud, "hooked", hooked).await.0, 200);
    // What would feed itself is refused, by name.
    let loops = "from = \"jams/#\"\nto = { topic = \"alerts/{device}/high\" }\n";
    let (status, answer) = link(&cloud, "back", loops).await;
    let error = answer["error"].as_str().unwrap();
    assert!(status == 400 && error.contains("back → jam → back"), "{status} {error}");
    let elsewhere = "from = \"#\"\nto = { edge = \"nobody\", command = \"plan\" }\n";
    assert_eq!(link(&cloud, "x", elsewhere).await.0, 400);

    let mut hears = listening(&cloud, "?topic=jams/%23");
    hears.connect().await;
    let begun = Instant::now();
    send("d1", 200).await;
    while told.lock().unwrap().is_empty() {
        assert!(begun.elapsed() < PATIENCE, "nothing comes: {:#}", does.status().await["commands"]);
        tokio::time::sleep(POLL).await;
    }
    println!("from the sender at one edge to the actuator at the other: {:?}", begun.elapsed());
    let (topic, payload, _) = told.lock().unwrap()[0].clone();
    assert_eq!((topic.as_str(), payload.as_str()), ("city/s-d1/plan", "{\"why\":\"d1 has 200\"}"));
    let jam = hears.next().await;
    assert_eq!((&jam["type"], &jam["subject"]), (&"weir.link.event".into(), &"jams/d1".into()), "{jam}");
    assert_eq!((&jam["data"]["link"], &jam["data"]["hops"]), (&"jam".into(), &1.into()), "{jam}");
    assert_eq!((&jam["data"]["transition"], &jam["data"]["device"]), (&"firing".into(), &"d1".into()), "{jam}");
    while got.lock().unwrap().is_empty() {
        assert!(begun.elapsed() < PATIENCE, "the webhook hears nothing");
        tokio::time::sleep(POLL).await;
    }
    let (_, body) = got.lock().unwrap()[0].clone();
    assert_eq!((&body["data"]["payload"], &body["data"]["hops"]), (&"jam at d1".into(), &2.into()), "{body}");

    let links = "SELECT name, open, told, answered, refused, last_outcome, last_answer FROM system.links ORDER BY name";
    let row = |name: &str, counts: [i64; 3], outcome: &str, answer: Value| {
        json!({ "name": name, "open": 0, "told": counts[0], "answered": counts[1], "refused": counts[2],
                "last_outcome": outcome, "last_answer": answer })
    };
    let sequences = "SELECT sequence FROM alert_log WHERE transition = 'event' ORDER BY sequence";
    let sequence = |rows: &[Value], index: usize| rows[index]["sequence"].to_string();
    let events = cloud.sql(sequences).await.unwrap();
    let expected = json!([
        row("denied", [0, 0, 1], "refused", "the edge allows no [[command]] `reboot`".into()),
        row("hooked", [1, 0, 0], "told", sequence(&events, 1).into()),
        row("jam", [1, 0, 0], "told", sequence(&events, 0).into()),
        row("plan", [0, 1, 0], "answered", "published on city/s-d1/plan".into()),
    ]);
    until(&cloud, links, expected).await;
    let hops = "SELECT link, outcome, to_kind, to_name, hops FROM link_log WHERE hop_id IS NOT NULL AND outcome <> 'begun' ORDER BY link";
    let hop = |link: &str, outcome: &str, kind: &str, to: &str, hops: i64| json!({ "link": link, "outcome": outcome, "to_kind": kind, "to_name": to, "hops": hops });
    let expected = [
        hop("denied", "refused", "edge", "gw-018", 1),
        hop("hooked", "told", "webhook", "hook", 2),
        hop("jam", "told", "topic", "jams/d1", 1),
        hop("plan", "answered", "edge", "gw-018", 1),
    ];
    assert_eq!(cloud.sql(hops).await.unwrap(), expected);
    loop {
        let commands = does.status().await["commands"].take();
        if (&commands["done"], &commands["refused"]) == (&1.into(), &1.into()) {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{commands:#}");
        tokio::time::sleep(POLL).await;
    }
    // Who has another token fetches nothing.
    let url = format!("{}/v1/edges/{}/commands?after=0", cloud.http, OTHER.0);
    let client = reqwest::Client::new();
    for token in [crate::harness::TOKEN, ""] {
        assert_eq!(client.get(&url).bearer_auth(token).send().await.unwrap().status(), 401);
    }
    let metrics = reqwest::get(format!("{}/metrics", cloud.http)).await.unwrap().text().await.unwrap();
    for line in [
        "weir_link_hops_total{link=\"plan\",outcome=\"answered\"} 1",
        "weir_cloud_commands_total{outcome=\"answered\"} 2",
        "weir_cloud_commands_waiting 0",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line}: {metrics}");
    }
    assert_eq!(request(&cloud, "DELETE", "/v1/links/plan", "").await.0, 200);
    assert_eq!(request(&cloud, "DELETE", "/v1/links/plan", "").await.0, 404);
    assert_eq!(told.lock().unwrap().len(), 1, "once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_comes_once_and_in_time_or_is_told_to_be_lost_through_kill_9() {
    const ROUNDS: usize = 24;
    const LIMIT: Duration = Duration::from_secs(10);
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let two = directory.path().join("two");
    std::fs::create_dir(&two).unwrap();
    let Some(broker) = Mosquitto::start(&two) else { return };
    let mut cloud = Cloud::start(directory.path(), "a", &with_other_edge("")).await;
    let mut edge = other_edge(&two, &cloud, &broker, "1000/1m").await;
    let told = actuators(&broker).await;
    let mut readings = Readings::to(&cloud);
    readings.send(&[("d", 1)]).await;
    put(&cloud, "high", RULE).await;
    let text = format!(
        "from = \"alerts/+/high\"\nto = {{ edge = \"gw-018\", command = \"plan\", device = \"s-{{device}}\", timeout = \"{}s\" }}\n\
         rate = \"1000/1m\"\n",
        LIMIT.as_secs()
    );
    assert_eq!(link(&cloud, "plan", &text).await.0, 200);
    assert_eq!(link(&cloud, "tell", "from = \"alerts/+/high\"\nto = { topic = \"jams/{device}\" }\n").await.0, 200);
    for round in 0..ROUNDS {
        readings.send(&[(format!("d{round}").as_str(), 500)]).await;
        tokio::time::sleep(Duration::from_millis(random.random_range(0..120))).await;
        match random.random_range(0..3) {
            0 => {
                cloud.kill();
                cloud.run();
                cloud.wait().await;
            }
            1 => {
                edge.kill();
                edge.run();
                edge.wait().await;
            }
            _ => {}
        }
    }
    let ended = "SELECT count(*) AS n FROM link_log WHERE outcome NOT IN ('begun', 'mark')";
    until(&cloud, ended, json!([{ "n": 2 * ROUNDS }])).await;
    let hops = "SELECT l.device, l.outcome, l.answer, a.at FROM link_log l JOIN alert_log a ON a.sequence = l.cause \
                WHERE l.link = 'plan' AND l.outcome NOT IN ('begun', 'mark') ORDER BY l.cause";
    let rows = cloud.sql(hops).await.unwrap();
    assert_eq!(rows.len(), ROUNDS, "each hop has one end");
    // The last may be on their way from the broker.
    let begun = Instant::now();
    let answered = rows.iter().filter(|row| row["outcome"] == "answered").count();
    while told.lock().unwrap().len() < answered {
        assert!(begun.elapsed() < PATIENCE, "{} of {answered}", told.lock().unwrap().len());
        tokio::time::sleep(POLL).await;
    }
    let mut came = BTreeMap::<String, Vec<i64>>::new();
    for (topic, _, at) in told.lock().unwrap().iter() {
        came.entry(topic.clone()).or_default().push(*at);
    }
    let mut outcomes = BTreeMap::<String, usize>::new();
    for row in &rows {
        let (device, outcome) = (row["device"].as_str().unwrap(), row["outcome"].as_str().unwrap());
        *outcomes.entry(outcome.to_owned()).or_default() += 1;
        let times = came.remove(&format!("city/s-{device}/plan")).unwrap_or_default();
        assert!(times.len() <= 1, "{row}: it came {} times", times.len());
        match outcome {
            "answered" => assert_eq!(times.len(), 1, "{row}"),
            "timed_out" => {}
            "refused" if row["answer"].as_str().unwrap().contains("nobody knows") => {}
            _ => assert_eq!(times.len(), 0, "{row}"),
        }
        if let Some(at) = times.first() {
            let decided = chrono::DateTime::parse_from_rfc3339(row["at"].as_str().unwrap()).unwrap();
            let after = Duration::from_micros((at - decided.timestamp_micros()).max(0) as u64);
            assert!(after < LIMIT, "{row}: it came after {after:?}");
        }
    }
    println!("{outcomes:?}");
    assert!(came.is_empty(), "nobody asked for {came:?}");
    assert!(answered > ROUNDS / 2, "{outcomes:?}");
    // What was told on a topic has one place in the sequence, with one id.
    let events = "SELECT count(*) AS n, count(DISTINCT note) AS ids FROM alert_log WHERE transition = 'event'";
    assert_eq!(cloud.sql(events).await.unwrap(), [json!({ "n": ROUNDS, "ids": ROUNDS })]);
    let begun = "SELECT count(*) AS n, count(DISTINCT hop_id) AS ids FROM link_log WHERE outcome = 'begun'";
    assert_eq!(cloud.sql(begun).await.unwrap(), [json!({ "n": 2 * ROUNDS, "ids": 2 * ROUNDS })]);
}
