//! Alertmanager, played by a server that keeps what it is pushed: what fires is pushed again until it is resolved.

use std::sync::atomic::AtomicU16;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Json, Router};
use chrono::DateTime;
use serde_json::Value;

use super::*;
use crate::publish::alertmanager;

const EVERY: Duration = Duration::from_millis(30);

/// The requests that it got, and what it answers.
#[derive(Debug, Default)]
struct Fake {
    got: Mutex<Vec<Vec<Value>>>,
    status: AtomicU16,
}

impl Fake {
    async fn start() -> (Arc<Self>, url::Url) {
        let fake = Arc::new(Self { status: AtomicU16::new(200), ..Self::default() });
        let take = |State(fake): State<Arc<Self>>, Json(alerts): Json<Vec<Value>>| async move {
            fake.got.lock().push(alerts);
            StatusCode::from_u16(fake.status.load(Ordering::SeqCst)).unwrap()
        };
        let router = Router::new().route("/api/v2/alerts", post(take)).with_state(Arc::clone(&fake));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        (fake, url)
    }

    /// Waits until requests from now on are as they should be; gives the last.
    async fn until(&self, what: &str, is: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let from = self.got.lock().len();
        until(what, || self.got.lock()[from..].iter().any(|alerts| is(alerts))).await;
        self.got.lock()[from..].iter().rfind(|alerts| is(alerts)).cloned().unwrap()
    }

    /// Waits for so many parts of turns from now on. A request of one alert is a change, which may have waited.
    async fn parts(&self, count: usize) -> Vec<Vec<Value>> {
        let from = self.got.lock().len();
        let parts = || self.got.lock()[from..].iter().filter(|alerts| alerts.len() > 1).cloned().collect::<Vec<_>>();
        until("it is pushed again", || parts().len() >= count).await;
        parts()
    }

    /// Waits for so many requests from now on.
    async fn next(&self, count: usize) -> Vec<Vec<Value>> {
        let from = self.got.lock().len();
        until("it is pushed again", || self.got.lock().len() >= from + count).await;
        self.got.lock()[from..].to_vec()
    }
}

fn device(alert: &Value) -> &str {
    alert["labels"]["device"].as_str().unwrap()
}

fn micros_of(alert: &Value, key: &str) -> i64 {
    DateTime::parse_from_rfc3339(alert[key].as_str().unwrap()).unwrap().timestamp_micros()
}

fn are(devices: &[&str]) -> impl Fn(&[Value]) -> bool {
    let expected: BTreeSet<String> = devices.iter().map(|device| (*device).to_owned()).collect();
    move |alerts| alerts.iter().map(|alert| device(alert).to_owned()).collect::<BTreeSet<_>>() == expected
}

impl Node {
    /// Tells an Alertmanager, and what fires again each [`EVERY`].
    fn tells(&self, url: url::Url) -> Arc<Mutex<TargetStatus>> {
        let timeout = Duration::from_secs(5);
        let settings = TargetSettings {
            name: "manager".to_owned(),
            kind: TargetKind::Alertmanager { url, timeout, attempts: 1_000 },
            topic: TopicFilter::parse("#").unwrap(),
            severities: Vec::new(),
            max_age: Duration::from_secs(3_600),
        };
        let Way::Alertmanager(request) = settings.kind.clone().way() else { unreachable!("it is one") };
        let status = Arc::new(Mutex::new(TargetStatus { name: settings.name.clone(), ..TargetStatus::default() }));
        let (engine, sink) = (Arc::clone(&self.engine), Arc::clone(&self.gate) as _);
        let place = Place::new(settings, engine, sink, Arc::clone(self.alerts.hub()), Arc::clone(&status));
        let firing = Firing(self.alerts.commands.clone());
        tokio::spawn(alertmanager::run(request, place, (firing, EVERY), self.token.clone()));
        status
    }

    async fn id_of(&self, device: &str) -> String {
        let open = self.alerts.open(everything()).await.unwrap().alerts;
        let alert = open.iter().find(|alert| alert["device"] == device).unwrap();
        alert["id"].as_str().unwrap().to_owned()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fires_is_pushed_again_until_it_is_resolved_also_over_an_acknowledgement_a_restart_and_failures() {
    let (fake, url) = Fake::start().await;
    let node = Node::start();
    node.alerts.put("high", HIGH).await.unwrap();
    let status = node.tells(url.clone());
    node.arrive(&[(0, "a", "north", 200.0), (0, "b", "north", 200.0)]);
    let before = now_us();
    let first = fake.until("both are pushed again", are(&["a", "b"])).await;
    for alert in &first {
        let labels = &alert["labels"];
        assert_eq!((&labels["alertname"], &labels["severity"]), (&"high".into(), &"warning".into()), "{alert}");
        assert_eq!((&labels["road"], &labels["stream"]), (&"north".into(), &"traffic".into()), "{alert}");
        assert!(micros_of(alert, "startsAt") <= before, "{alert}");
    }
    let ends = |alerts: &[Value]| alerts.iter().map(|alert| micros_of(alert, "endsAt")).min().unwrap();
    let later = fake.until("again", are(&["a", "b"])).await;
    assert!(ends(&later) > ends(&first) && ends(&later) > before);

    node.alerts.say(&node.id_of("a").await, Word::Acknowledge, "eva", "").await.unwrap();
    fake.until("what is acknowledged is pushed on", are(&["a", "b"])).await;

    // A failed turn is another's: nothing is given up, and nothing written.
    fake.status.store(503, Ordering::SeqCst);
    fake.next(3).await;
    until("the status says so", || status.lock().last_error.is_some()).await;
    fake.status.store(200, Ordering::SeqCst);
    fake.until("it goes on", are(&["a", "b"])).await;
    until("and that, too", || status.lock().last_error.is_none()).await;
    assert_eq!(status.lock().dead, 0);
    assert_eq!(node.texts("SELECT count(*) FROM alert_deliveries WHERE state = 'dead'").await, ["0"]);

    let node = node.restarted().await;
    node.tells(url);
    fake.until("after a restart", are(&["a", "b"])).await;

    // One alone is pushed by a change, and from now on the only change is its end.
    let (id, from) = (node.id_of("a").await, fake.got.lock().len());
    node.alerts.say(&id, Word::Resolve, "eva", "").await.unwrap();
    let resolved = now_us();
    until("its end is pushed", || fake.got.lock()[from..].iter().any(|alerts| are(&["a"])(alerts))).await;
    let end = fake.got.lock()[from..].iter().find(|alerts| are(&["a"])(alerts)).cloned().unwrap();
    assert!(micros_of(&end[0], "endsAt") <= resolved, "{end:?}");
    for alerts in fake.next(5).await {
        assert!(are(&["b"])(&alerts), "{alerts:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_silenced_or_inhibited_is_pushed_no_more_and_what_is_much_goes_in_parts() {
    let (fake, url) = Fake::start().await;
    let node = Node::start();
    node.alerts.put("outage", &HIGH.replace("> 100", "> 500")).await.unwrap();
    node.alerts.put("high", &format!("inhibited_by = [\"outage\"]\n{HIGH}")).await.unwrap();
    let devices: Vec<String> = (0..1_201).map(|n| format!("d{n}")).collect();
    node.arrive(&devices.iter().map(|device| (0, device.as_str(), "north", 200.0)).collect::<Vec<_>>());
    node.until_recorded("SELECT count(*) FROM alert_log WHERE transition = 'firing' AND told", &["1201"]).await;
    // It was not there before: its place is now, and all that it hears is what fires.
    node.tells(url);
    let parts = fake.parts(3).await[..3].to_vec();
    assert_eq!(parts.iter().map(Vec::len).collect::<Vec<_>>(), [500, 500, 201]);
    let found: BTreeSet<&str> = parts.iter().flatten().map(device).collect();
    assert_eq!(found.len(), 1_201);

    let silence = |labels: &[(&str, &str)]| Silence {
        id: "s".to_owned(),
        rule: None,
        labels: labels.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect(),
        from: now_us(),
        until: now_us() + 3_600 * S,
        every: None,
        last: now_us() + 3_600 * S,
        by: "eva".to_owned(),
        note: String::new(),
    };
    node.alerts.silence(silence(&[("device", "d1*")])).await.unwrap();
    // The last part of a turn that was asked since; of one that was asked before, it has another number.
    let left = devices.iter().filter(|device| !device.starts_with("d1")).count() % 500;
    fake.until("silenced ones are left out", |alerts| alerts.len() == left).await;
    for alerts in fake.parts(4).await {
        assert!(alerts.iter().all(|alert| !device(alert).starts_with("d1")), "{alerts:?}");
    }
    node.alerts.unsilence("s", "eva").await.unwrap();
    fake.until("they are pushed again", |alerts| alerts.iter().any(|alert| device(alert).starts_with("d1"))).await;
    // Both rules fire on it, and the one inhibits the other.
    node.arrive(&[(1, "d7", "north", 600.0)]);
    fake.until("the outage is pushed", |alerts| alerts.iter().any(|alert| alert["labels"]["alertname"] == "outage"))
        .await;
    fake.parts(3).await;
    for alerts in fake.parts(4).await {
        let of_it = alerts.iter().filter(|alert| device(alert) == "d7");
        assert!(of_it.into_iter().all(|alert| alert["labels"]["alertname"] == "outage"), "{alerts:?}");
    }
}
