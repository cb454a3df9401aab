//! Views that run for ever, in a cloud that is killed: what they show is what their questions give.

use std::collections::HashSet;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use rand::Rng;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event};
use serde_json::Value;
use tokio::net::TcpListener;
use wire::RefusedRequest;

use crate::cloud_alerts::{Got, serve};
use crate::harness::{Answer, Chain, Cloud, Mosquitto, Sender, TOKEN, load_rows, load_schema};
use crate::listener::Listener;
use crate::load::{a_moment, seeded};
use crate::process::{PATIENCE, POLL, Process};

/// Rows of a second each: 1,000 rows of `load` a second of event time.
const BY_SECOND: &str = "SELECT time_bucket('1 second', ts) AS b, device, count(*) AS rows, sum(n) AS s, avg(n) AS a FROM load GROUP BY 1, 2";
const ODD: &str = "SELECT ts, device, n * 2 AS twice FROM load WHERE n % 2 = 1";

/// Sends rows until the node has them, through its deaths.
async fn deliver(cloud: &mut Cloud, chain: &mut Chain, first: i64, count: usize) {
    let batch = chain.seal(&load_rows(first, count));
    let schema = load_schema();
    let started = Instant::now();
    loop {
        if let Answer::Acks(_) = Sender::to(cloud).send(&schema, std::slice::from_ref(&batch)).await {
            return;
        }
        assert!(started.elapsed() < PATIENCE, "the batch is not taken");
        tokio::time::sleep(POLL).await;
    }
}

async fn sorted(cloud: &Cloud, statement: &str) -> Vec<String> {
    let rows = cloud.sql(statement).await.unwrap();
    let mut rows: Vec<String> = rows.iter().map(Value::to_string).collect();
    rows.sort();
    rows
}

/// Waits until the view shows what its question gives.
async fn equals(cloud: &Cloud, view: &str, question: &str) {
    let started = Instant::now();
    loop {
        let (shown, asked) = (sorted(cloud, view).await, sorted(cloud, question).await);
        if shown == asked && !asked.is_empty() {
            return;
        }
        if started.elapsed() > PATIENCE {
            let state = cloud.sql("SELECT * FROM system.views").await.unwrap();
            panic!("{view}: {} rows, and {question}: {} rows; {state:#?}", shown.len(), asked.len());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// What a question of windows of a second gives of those that are closed.
fn closed(question: &str) -> String {
    format!("SELECT * FROM ({question}) AS q WHERE b < (SELECT time_bucket('1 second', max(ts)) FROM load)")
}

/// Sends a row that closes all windows before it, and waits until `by_second` shows them.
async fn closes(cloud: &mut Cloud, chain: &mut Chain, last: i64) {
    deliver(cloud, chain, last, 1).await;
    equals(cloud, "SELECT * FROM by_second", &closed(BY_SECOND)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn views_equal_their_questions_when_the_cloud_is_killed() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"300ms\"\n").await;
    let mut chain = Chain::new("load", load_schema());
    // What is there before is their past: a minute of rows, in files and hot.
    let mut next = 0;
    for _ in 0..8 {
        deliver(&mut cloud, &mut chain, next, 8_000).await;
        next += 8_000;
    }
    a_moment(&mut random).await;
    deliver(&mut cloud, &mut chain, next, 3_000).await;
    next += 3_000;
    cloud.sql(&format!("CREATE MATERIALIZED VIEW by_second AS {BY_SECOND}")).await.unwrap();
    cloud.sql(&format!("CREATE MATERIALIZED VIEW odd AS {ODD}")).await.unwrap();
    // At once, in the middle of their past; then wherever they are.
    cloud.kill();
    cloud.run();
    cloud.wait().await;
    for round in 0..8 {
        for _ in 0..random.random_range(1..4) {
            let count = random.random_range(100..1_500);
            deliver(&mut cloud, &mut chain, next, count).await;
            // Some come late, and twice.
            if random.random_bool(0.5) {
                deliver(&mut cloud, &mut chain, random.random_range(0..next), 50).await;
            }
            next += count as i64;
        }
        if round % 3 > 0 {
            a_moment(&mut random).await;
        }
        cloud.kill();
        cloud.run();
        cloud.wait().await;
    }
    closes(&mut cloud, &mut chain, next + 60_000).await;
    equals(&cloud, "SELECT * FROM odd", ODD).await;
    // Nobody was told the same revision of a window twice, and no row of the other twice.
    let twice = "SELECT count(*) FROM (SELECT view_window, view_revision, device, count(*) AS n FROM by_second_changes \
                 WHERE view_window IS NOT NULL GROUP BY 1, 2, 3 HAVING count(*) > 1) AS q";
    assert_eq!(cloud.integer(twice).await, 0);
    cloud.sql("DROP MATERIALIZED VIEW by_second").await.unwrap();
    cloud.kill();
    cloud.run();
    cloud.wait().await;
    let left = cloud.sql("SHOW MATERIALIZED VIEWS").await.unwrap();
    assert_eq!(left.len(), 1, "{left:#?}");
    let gone = cloud.sql("SELECT * FROM by_second").await.unwrap_err().to_string();
    assert!(gone.contains("no table `by_second`"), "{gone}");
}

/// The rows that a subscriber is told of, from the view's stream.
async fn told(cloud: &Cloud, view: &str) -> Vec<String> {
    let statement =
        format!("SELECT * FROM {view}_changes WHERE view_empty IS NOT TRUE OR view_window IS NOT NULL ORDER BY _seq");
    let mut rows = cloud.sql(&statement).await.unwrap();
    for row in &mut rows {
        row.as_object_mut().unwrap().retain(|name, _| !name.starts_with('_') && name != "view_position");
    }
    let mut rows: Vec<String> = rows.iter().map(Value::to_string).collect();
    rows.sort();
    rows
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_hears_each_change_of_a_view_once_through_kills() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"300ms\"\n").await;
    let mut chain = Chain::new("load", load_schema());
    deliver(&mut cloud, &mut chain, 0, 3_000).await;
    cloud.sql(&format!("CREATE MATERIALIZED VIEW by_second AS {BY_SECOND}")).await.unwrap();
    let missing = reqwest::get(format!("{}/v1/views/nobody/stream", cloud.http)).await.unwrap();
    assert_eq!(missing.status().as_u16(), 404, "{}", missing.text().await.unwrap());
    let url = format!("{}/v1/views/by_second/stream?after=start", cloud.http);
    let (mut listener, mut late) = (Listener::new(url.clone()), Listener::new(url));
    let mut heard = Vec::new();
    let hear = |change: &Value, heard: &mut Vec<String>| {
        assert_eq!(change["view"], "by_second");
        heard.extend(change["rows"].as_array().unwrap().iter().map(Value::to_string));
    };
    let mut next = 3_000;
    for _ in 0..4 {
        let count = random.random_range(1_000..2_500);
        deliver(&mut cloud, &mut chain, next, count).await;
        next += count as i64;
        hear(&listener.next().await, &mut heard);
        cloud.kill();
        cloud.run();
        cloud.wait().await;
    }
    closes(&mut cloud, &mut chain, next + 60_000).await;
    let expected = told(&cloud, "by_second").await;
    while heard.len() < expected.len() {
        hear(&listener.next().await, &mut heard);
    }
    heard.sort();
    assert_eq!(heard, expected);
    // Who comes when all is in the past gets the same.
    let mut heard = Vec::new();
    while heard.len() < expected.len() {
        hear(&late.next().await, &mut heard);
    }
    heard.sort();
    assert_eq!(heard, expected);
}

/// What somebody was told, each row once: (window, revision, device) tells repeats.
#[derive(Debug, Default)]
struct Heard {
    rows: Vec<String>,
    ids: HashSet<String>,
}

impl Heard {
    fn hear(&mut self, event: &Value) {
        assert_eq!((&event["type"], &event["data"]["view"]), (&"weir.view.change".into(), &"by_second".into()));
        if self.ids.insert(event["id"].as_str().unwrap().to_owned()) {
            self.rows.extend(event["data"]["rows"].as_array().unwrap().iter().map(Value::to_string));
        }
    }

    fn sorted(&self) -> Vec<String> {
        let mut rows = self.rows.clone();
        rows.sort();
        rows
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_and_a_webhook_are_told_each_change_of_a_view_through_kills() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let Some((mut broker, secure, ca)) = Mosquitto::start_tls(directory.path()) else { return };
    let got: Got = Arc::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hook = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, Arc::clone(&got)));
    let target = |name: &str, kind: &str, url: &str, more: &str| {
        format!(
            "[[views.publish]]\nname = \"{name}\"\nview = \"by_second\"\nkind = \"{kind}\"\nurl = \"{url}\"\n{more}\n"
        )
    };
    let targets = [
        target(
            "broker",
            "mqtt",
            &format!("mqtts://127.0.0.1:{secure}"),
            &format!("topic = \"signs/load\"\nca_file = \"{ca}\""),
        ),
        target("hook", "webhook", &format!("http://{hook}/hook"), "secret = \"s\""),
        target("refuses", "webhook", &format!("http://{hook}/nothing"), ""),
    ];
    let more = format!("[commit]\nmax_age = \"300ms\"\n{}", targets.concat());
    let mut cloud = Cloud::start(directory.path(), "a", &more).await;
    // A session that the broker keeps.
    let mut options = broker.client("listens");
    options.set_clean_start(false).set_session_expiry_interval(Some(3_600));
    let (client, mut events) = AsyncClient::new(options, 100);
    client.subscribe("signs/#", QoS::AtLeastOnce).await.unwrap();
    while !matches!(events.poll().await.unwrap(), Event::Incoming(Packet::SubAck(_))) {}
    let mut chain = Chain::new("load", load_schema());
    deliver(&mut cloud, &mut chain, 0, 3_000).await;
    // They are older than the view: they are told all of it.
    cloud.sql(&format!("CREATE MATERIALIZED VIEW by_second AS {BY_SECOND}")).await.unwrap();
    let mut next = 3_000;
    for round in 0..4 {
        let count = random.random_range(1_000..2_500);
        deliver(&mut cloud, &mut chain, next, count).await;
        next += count as i64;
        a_moment(&mut random).await;
        cloud.kill();
        if round == 1 {
            broker.stop();
            broker.run();
        }
        cloud.run();
        cloud.wait().await;
    }
    closes(&mut cloud, &mut chain, next + 60_000).await;
    let expected = told(&cloud, "by_second").await;
    let (mut at_broker, started) = (Heard::default(), Instant::now());
    while at_broker.rows.len() < expected.len() {
        assert!(started.elapsed() < PATIENCE, "{} of {} rows at the broker", at_broker.rows.len(), expected.len());
        // It was restarted.
        let Ok(event) = tokio::time::timeout(PATIENCE, events.poll()).await.expect("a message comes") else { continue };
        if let Event::Incoming(Packet::Publish(message)) = event {
            assert!(!message.retain && &message.topic[..] == b"signs/load", "{message:?}");
            at_broker.hear(&serde_json::from_slice(&message.payload).unwrap());
        }
    }
    assert_eq!(at_broker.sorted(), expected);
    let mut at_hook = Heard::default();
    loop {
        for (head, event) in got.lock().unwrap().drain(..) {
            assert!(head.contains("x-weir-signature: t="), "{head}");
            at_hook.hear(&event);
        }
        if at_hook.rows.len() >= expected.len() {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "{} of {} rows at the hook", at_hook.rows.len(), expected.len());
        tokio::time::sleep(POLL).await;
    }
    assert_eq!(at_hook.sorted(), expected);
    // What is refused is given up, each append by itself, and stands there.
    let appends =
        "SELECT count(DISTINCT _seq) FROM by_second_changes WHERE view_empty IS NOT TRUE OR view_window IS NOT NULL";
    let dead = "SELECT count(DISTINCT place) FROM view_deliveries WHERE target = 'refuses' AND state = 'dead' AND reason LIKE '%404%'";
    let started = Instant::now();
    while cloud.integer(dead).await < cloud.integer(appends).await {
        assert!(started.elapsed() < PATIENCE, "what is refused is not given up");
        tokio::time::sleep(POLL).await;
    }
    let answer = reqwest::get(format!("{}/v1/views/targets", cloud.http)).await.unwrap();
    let targets: Value = answer.json().await.unwrap();
    let refuses = targets.as_array().unwrap().iter().find(|target| target["name"] == "refuses").unwrap();
    assert!(refuses["last_error"].as_str().unwrap().contains("404"), "{targets}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_writes_what_a_view_says() {
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = Cloud::start(directory.path(), "a", "").await;
    let mut chain = Chain::new("load", load_schema());
    deliver(&mut cloud, &mut chain, 0, 3_000).await;
    cloud.sql(&format!("CREATE MATERIALIZED VIEW by_second AS {BY_SECOND}")).await.unwrap();
    // Also when the node has just begun.
    cloud.kill();
    cloud.run();
    cloud.wait().await;
    for stream in ["by_second", "by_second_changes"] {
        let mut forged = Chain::new(stream, load_schema());
        let batch = forged.seal(&load_rows(0, 10));
        let answer = Sender::to(&cloud).send(&load_schema(), &[batch]).await;
        assert!(matches!(&answer, Answer::Refused(RefusedRequest::PushedBack { .. })), "{stream}: {answer:?}");
        let write = reqwest::Client::new().post(format!("{}/api/v2/write", cloud.http)).bearer_auth(TOKEN);
        let answer = write.body(format!("{stream} n=1i\n")).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), 400, "{stream}");
    }
    assert_eq!(cloud.integer("SELECT count(*) FROM by_second_changes WHERE _edge <> 'weir'").await, 0);
    assert_eq!(cloud.integer("SELECT count(*) FROM quarantine WHERE reason = 'reserved'").await, 2);
    // The name is free again without the view.
    cloud.sql("DROP MATERIALIZED VIEW by_second").await.unwrap();
    let mut own = Chain::new("by_second", load_schema());
    let batch = own.seal(&load_rows(0, 10));
    let answer = Sender::to(&cloud).send(&load_schema(), &[batch]).await;
    assert!(matches!(answer, Answer::Acks(_)), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_view_goes_on_over_a_column_of_another_type_or_says_why_not() {
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"300ms\"\n").await;
    let mut chain = Chain::new("load", load_schema());
    deliver(&mut cloud, &mut chain, 0, 5_000).await;
    let counted = "SELECT time_bucket('1 second', ts) AS b, count(n) AS c FROM load GROUP BY 1";
    cloud.sql(&format!("CREATE MATERIALIZED VIEW counted AS {counted}")).await.unwrap();
    cloud.sql(&format!("CREATE MATERIALIZED VIEW by_second AS {BY_SECOND}")).await.unwrap();
    equals(&cloud, "SELECT * FROM counted", &closed(counted)).await;
    equals(&cloud, "SELECT * FROM by_second", &closed(BY_SECOND)).await;
    let config = cloud.config().to_str().unwrap().to_owned();
    let arguments = ["retype", "load", "n", "float64", "--config", &config];
    let mut retype = Process::weir("retype", &arguments, directory.path());
    retype.start();
    assert!(retype.succeeds(), "{}", retype.log_tail());
    let started = Instant::now();
    loop {
        let failed = "SELECT reason FROM system.views WHERE name = 'by_second' AND state = 'failed'";
        let failed = cloud.sql(failed).await.unwrap();
        if failed.first().is_some_and(|row| row["reason"].as_str().unwrap().contains("has got another type")) {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "{failed:?}");
        tokio::time::sleep(POLL).await;
    }
    // The edge has not heard of it.
    deliver(&mut cloud, &mut chain, 5_000, 5_000).await;
    equals(&cloud, "SELECT * FROM counted", &closed(counted)).await;
    cloud.kill();
    cloud.run();
    cloud.wait().await;
    deliver(&mut cloud, &mut chain, 10_000, 5_000).await;
    equals(&cloud, "SELECT * FROM counted", &closed(counted)).await;
    // What the other told is there.
    assert_eq!(cloud.integer("SELECT count(*) FROM by_second").await, 4 * 7);
}

/// The statements of docs/views.md, in their order.
fn of_the_docs() -> Vec<&'static str> {
    let block = include_str!("../docs/views.md").split("```sql").nth(1).and_then(|rest| rest.split("```").next());
    block.unwrap().split(';').map(str::trim).filter(|statement| !statement.is_empty()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_makes_views_with_the_words_of_the_docs() {
    let directory = tempfile::tempdir().unwrap();
    let files = directory.path().join("views");
    std::fs::create_dir(&files).unwrap();
    let fast = "SELECT ts, device, avg_speed FROM traffic WHERE avg_speed > 25";
    std::fs::write(files.join("fast.sql"), format!("CREATE MATERIALIZED VIEW fast AS\n{fast};\n")).unwrap();
    let more = format!(
        "[views]\ndirectory = {files:?}\n[[reader]]\nname = \"asks\"\npassword = \"pa\"\n\
         [[reader]]\nname = \"makes\"\npassword = \"pm\"\nrights = [\"views\"]\n"
    );
    let cloud = Cloud::start(directory.path(), "a", &more).await;
    let client = reqwest::Client::new();
    // Speeds of two devices, a minute apart, from 2026-05-01 on.
    let line = |minute: u64| {
        let (device, speed, at) = (minute % 2, minute % 37, 1_777_593_600 + minute * 60);
        format!("traffic,device=d{device} avg_speed={speed} {at}\n")
    };
    let lines: String = (0..600).map(line).collect();
    let write = client.post(format!("{}/api/v2/write?precision=s", cloud.http)).bearer_auth(TOKEN);
    assert!(write.body(lines).send().await.unwrap().status().is_success());

    let say = async |name: &str, password: &str, statement: &str| {
        let request = client.post(format!("{}/v1/sql", cloud.http)).basic_auth(name, Some(password));
        let answer = request.header("accept", "application/json").body(statement.to_owned()).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    let psql = |statement: &str| {
        let port = cloud.postgres.to_string();
        let arguments = ["-h", "127.0.0.1", "-p", &port, "-U", "makes", "-d", "weir", "-At", "-c", statement];
        Command::new("psql").args(arguments).env("PGPASSWORD", "pm").output().ok()
    };
    let [create, select, show, drop] = of_the_docs()[..] else { panic!("{:?}", of_the_docs()) };
    let (status, text) = say("asks", "pa", create).await;
    assert!(status == 403 && text.contains("rights = ["), "{status} {text}");
    match psql(create) {
        Some(made) => {
            let told = (String::from_utf8_lossy(&made.stdout), String::from_utf8_lossy(&made.stderr));
            assert_eq!((told.0.trim(), told.1.trim()), ("CREATE MATERIALIZED VIEW", ""));
        }
        None => {
            println!("psql is not installed: by HTTP alone");
            assert_eq!(say("makes", "pm", create).await.0, 200);
        }
    }
    let question = create.split_once(" AS\n").unwrap().1;
    let asked = format!(
        "SELECT * FROM ({question}) AS q WHERE window < (SELECT time_bucket('5 minutes', max(ts) - INTERVAL '10 minutes') \
         FROM traffic) ORDER BY window, device"
    );
    let same = async |view: &str, question: &str| {
        let started = Instant::now();
        loop {
            let (shown, asked) = (say("asks", "pa", view).await, say("asks", "pa", question).await);
            assert_eq!(asked.0, 200, "{asked:?}");
            if shown == asked && asked.1.len() > 100 {
                return;
            }
            assert!(started.elapsed() < PATIENCE, "{view}: {shown:?}\n{asked:?}");
            tokio::time::sleep(POLL).await;
        }
    };
    same(&format!("{select}, device"), &asked).await;
    same("SELECT * FROM fast ORDER BY ts", &format!("{fast} ORDER BY ts")).await;
    let (status, shown) = say("asks", "pa", show).await;
    assert!(status == 200 && shown.contains("calm_5m") && shown.contains("fast"), "{shown}");
    let (status, text) = say("asks", "pa", drop).await;
    assert_eq!(status, 403, "{text}");
    let (status, text) = say("makes", "pm", "DROP MATERIALIZED VIEW fast").await;
    assert!(status == 400 && text.contains("[views] directory"), "{status} {text}");
    let (status, text) = say("makes", "pm", drop).await;
    assert_eq!(status, 200, "{text}");
    let (status, text) = say("asks", "pa", select).await;
    assert!(status == 404 || status == 400, "{status} {text}");
}
