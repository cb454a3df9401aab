//! People's door, over HTTP: what they say of alerts, silences, and who listens.

use std::net::SocketAddr;

use axum::Router;
use axum::extract::connect_info::MockConnectInfo;
use serde_json::{Value, json};

use super::*;
use crate::serve::{Reader, Readers, alerts};

const SEVERE: &str = "sql = \"SELECT device, road, speed, CASE WHEN speed > 300 THEN 'critical' ELSE 'warning' END AS severity \
                      FROM traffic WHERE speed > 100\"\n";

/// The door of a node, for who comes from an address.
struct Door(String);

impl Door {
    async fn open(node: &Node, from: &str, readers: Readers) -> Self {
        let peer: SocketAddr = format!("{from}:1").parse().unwrap();
        let router: Router = alerts::router(Arc::clone(&node.alerts), readers).layer(MockConnectInfo(peer));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self(url)
    }

    async fn of(node: &Node) -> Self {
        Self::open(node, "127.0.0.1", Readers::default()).await
    }

    async fn ask(&self, method: reqwest::Method, path: &str, body: &str) -> (u16, Value) {
        let asked = reqwest::Client::new().request(method, format!("{}{path}", self.0)).body(body.to_owned());
        let answer = asked.send().await.unwrap();
        (answer.status().as_u16(), serde_json::from_str(&answer.text().await.unwrap()).unwrap_or_default())
    }

    async fn get(&self, path: &str) -> Value {
        let (status, answer) = self.ask(reqwest::Method::GET, path, "").await;
        assert_eq!(status, 200, "{answer}");
        answer
    }

    async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.ask(reqwest::Method::POST, path, &body.to_string()).await
    }

    /// The id of the only alert that is open.
    async fn id(&self) -> String {
        let begun = Instant::now();
        loop {
            if let [alert] = &self.get("/v1/alerts").await.as_array().unwrap()[..] {
                return alert["id"].as_str().unwrap().to_owned();
            }
            assert!(begun.elapsed() < PATIENCE);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_people_say_of_an_alert_is_shown_and_recorded_with_their_names() {
    let node = Node::start();
    node.alerts.put("high", HIGH).await.unwrap();
    node.arrive(&[(0, "a", "north", 200.0)]);
    let door = Door::of(&node).await;
    let id = door.id().await;
    let long = "x".repeat(5_000);
    for (word, said, status) in [
        ("assign", json!({ "by": "eva" }), 400),
        ("ack", json!({ "to": "north" }), 400),
        ("comment", json!({ "note": long }), 400),
        ("comment", json!({ "text": "hello" }), 400),
        ("forget", json!({}), 404),
    ] {
        assert_eq!(door.post(&format!("/v1/alerts/{id}/{word}"), &said).await.0, status, "{word} {said}");
    }
    assert_eq!(door.post("/v1/alerts/nothing/comment", &json!({})).await.0, 404);
    for (word, said) in [
        ("assign", json!({ "to": "north", "by": "eva", "note": "yours" })),
        ("comment", json!({ "by": "ole", "note": "a lorry" })),
    ] {
        assert_eq!(door.post(&format!("/v1/alerts/{id}/{word}"), &said).await.0, 200, "{word}");
    }
    assert_eq!(door.get("/v1/alerts").await[0]["assigned_to"], "north");
    let said = json!({ "by": "eva", "note": "towed" });
    assert_eq!(door.post(&format!("/v1/alerts/{id}/resolve"), &said).await.0, 200);
    assert_eq!(door.get("/v1/alerts").await, json!([]));
    assert_eq!(door.post(&format!("/v1/alerts/{id}/resolve"), &said).await.0, 404, "it has ended");
    let recorded = "SELECT transition, actor, note, told FROM alert_log WHERE actor IS NOT NULL ORDER BY sequence";
    let expected = ["assigned eva yours true", "commented ole a lorry true", "resolved eva towed true"];
    node.until_recorded(recorded, &expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silence_holds_over_a_restart_and_what_still_fires_is_told_when_it_is_gone() {
    let node = Node::start();
    node.alerts.put("high", HIGH).await.unwrap();
    let door = Door::of(&node).await;
    let silence =
        json!({ "rule": "hi*", "labels": { "device": "a" }, "until": "2999-01-01", "by": "eva", "note": "works" });
    let (status, made) = door.post("/v1/silences", &silence).await;
    assert_eq!(status, 200, "{made}");
    let listed = door.get("/v1/silences").await;
    assert_eq!(listed.as_array().unwrap().len(), 1);
    let expected = (&made["id"], &"hi*".into(), &"eva".into(), &"works".into());
    assert_eq!((&listed[0]["id"], &listed[0]["rule"], &listed[0]["by"], &listed[0]["note"]), expected);

    let node = node.restarted().await;
    let door = Door::of(&node).await;
    assert_eq!(door.get("/v1/silences").await, listed);
    node.arrive(&[(0, "a", "north", 200.0), (0, "b", "north", 200.0)]);
    let firing = "SELECT device, told FROM alert_log WHERE transition = 'firing' ORDER BY sequence";
    let recorded = |rows: &'static str| format!("SELECT * FROM ({firing}) AS f ORDER BY {rows}");
    node.until_recorded(&recorded("device"), &["a false", "b true"]).await;

    let path = format!("/v1/silences/{}", made["id"].as_str().unwrap());
    assert_eq!(door.ask(reqwest::Method::DELETE, &path, "").await.0, 200);
    assert_eq!(door.ask(reqwest::Method::DELETE, &path, "").await.0, 404);
    assert_eq!(door.get("/v1/silences").await, json!([]));
    node.until_recorded(&recorded("device, told"), &["a false", "a true", "b true"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silence_that_could_never_hold_or_never_end_is_refused() {
    let node = Node::start();
    let door = Door::of(&node).await;
    let window = json!({ "rule": "high", "from": "2026-01-01T02:00:00Z", "until": "2026-01-01T04:00:00Z", "every": "7d", "last": "2999-01-01" });
    let changed = |key: &str, value: Value| {
        let mut window = window.clone();
        match value {
            Value::Null => drop(window.as_object_mut().unwrap().remove(key)),
            value => window[key] = value,
        }
        window
    };
    for (asked, words) in [
        (changed("last", Value::Null), "needs `last`"),
        (changed("every", json!("1h")), "longer than the time between"),
        (changed("every", Value::Null), "in the future"),
        (changed("until", json!("2026-01-01T02:00:00Z")), "ends after it begins"),
        (changed("until", json!("tomorrow")), "is no moment"),
        (changed("until", Value::Null), "until"),
        (changed("rule", Value::Null), "names a rule or labels"),
        (changed("note", json!("x".repeat(5_000))), "at most 4096 bytes"),
        (changed("labels", json!({ "device": "x".repeat(2_000) })), "at most 32 labels"),
        (changed("untill", json!("2026-01-01")), "untill"),
    ] {
        let (status, answer) = door.post("/v1/silences", &asked).await;
        let error = answer["error"].as_str().unwrap_or_default();
        assert!(status == 400 && error.contains(words), "{asked}: {status} {answer}");
    }
    assert_eq!(door.get("/v1/silences").await, json!([]));
    assert_eq!(door.post("/v1/silences", &window).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_listens_for_severe_alerts_hears_no_others() {
    let node = Node::start();
    node.alerts.put("high", SEVERE).await.unwrap();
    node.arrive(&[(0, "mild", "north", 200.0)]);
    node.until_recorded("SELECT device FROM alert_log WHERE told", &["mild"]).await;
    node.arrive(&[(1, "severe", "north", 400.0)]);
    let door = Door::of(&node).await;
    for (wanted, device) in [("critical", "severe"), ("warning", "mild"), ("info,critical", "severe")] {
        let asked = reqwest::get(format!("{}/v1/alerts/stream?after=0&severity={wanted}", door.0));
        let mut events = asked.await.unwrap();
        let first = tokio::time::timeout(PATIENCE, events.chunk()).await.unwrap().unwrap().unwrap();
        let first = String::from_utf8_lossy(&first);
        let data = first.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
        let event: Value = serde_json::from_str(data).unwrap();
        assert_eq!(event["data"]["device"], device, "{wanted}: {first}");
    }
    assert_eq!(door.ask(reqwest::Method::GET, "/v1/alerts/stream?severity=loud", "").await.0, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_has_half_of_the_places_of_the_stream() {
    let node = Node::start();
    let reader = |name: &str| Reader {
        name: name.to_owned(),
        password: "right".to_owned(),
        scope: None,
        lanes: Arc::new([]),
        rights: Arc::new([]),
    };
    let readers = Readers::new(vec![reader("eva")], Vec::new());
    let one = Door::open(&node, "192.0.2.1", readers.clone()).await;
    let other = Door::open(&node, "192.0.2.2", readers).await;
    let listens = async |door: &Door| {
        let asked = reqwest::Client::new().get(format!("{}/v1/alerts/stream", door.0)).basic_auth("eva", Some("right"));
        asked.send().await.unwrap()
    };
    let mut held = Vec::new();
    for _ in 0..50 {
        held.push(listens(&one).await);
    }
    assert!(held.iter().all(|answer: &reqwest::Response| answer.status() == 200));
    assert_eq!(listens(&one).await.status(), 503);
    assert_eq!(listens(&other).await.status(), 200);
    drop(held);
    until("its places are free", || node.alerts.hub().subscribers() == 0).await;
    assert_eq!(listens(&one).await.status(), 200);
}
