//! The MQTT source as operators set it up: old protocol, shared subscriptions, TLS with a password, a client id that goes.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::field::ask;
use crate::harness::{Cloud, Edge, Mosquitto, certificate, mqtt_source, publish};
use crate::process::{PATIENCE, POLL};

/// Numbers that come to `field/…`.
pub(crate) fn stream(url: &str, more: &str) -> String {
    let map = "[source.map]\ndevice = \"topic:1\"\nn = \"/n\"\n[stream.field.fields]\nn = { type = \"int64\" }\n";
    mqtt_source(url, "field/#", "field", &format!("{more}\n{map}"))
}

pub(crate) async fn send(broker: &Mosquitto, numbers: std::ops::Range<u64>) {
    let message = |n: u64| (format!("field/d{}", n % 5), format!("{{\"n\":{n}}}").into_bytes());
    publish(broker.client("p"), numbers.map(message).collect()).await;
}

/// Waits until the table has all numbers below `total`, each once.
pub(crate) async fn whole(cloud: &Cloud, edge: &mut Edge, total: i64) {
    let started = Instant::now();
    let found = async || match cloud.sql("SELECT count(*) AS n FROM field").await {
        Ok(rows) => rows[0]["n"].as_i64().unwrap(),
        Err(_) => 0,
    };
    while found().await < total {
        assert!(started.elapsed() < PATIENCE, "not all arrives: {:#}", edge.status().await);
        tokio::time::sleep(POLL).await;
    }
    edge.drained().await;
    assert_eq!(cloud.integer("SELECT count(*) FROM field").await, total);
    assert_eq!(cloud.integer("SELECT count(DISTINCT n) FROM field").await, total);
}

pub(crate) async fn cloud(directory: &Path) -> Cloud {
    Cloud::start(directory, "a", "[commit]\nmax_age = \"1s\"\n").await
}

#[tokio::test(flavor = "multi_thread")]
async fn two_connections_share_a_subscription_over_mqtt_3_1_1() {
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let cloud = cloud(directory.path()).await;
    let shared = "version = \"3.1.1\"\nconnections = 2\nshare = \"weir\"";
    let mut edge = Edge::start(directory.path(), &cloud, &stream(&broker.url(), shared)).await;
    send(&broker, 0..500).await;
    edge.kill();
    edge.run();
    edge.wait().await;
    send(&broker, 500..1_000).await;
    whole(&cloud, &mut edge, 1_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_id_that_is_no_longer_configured_is_drained_and_ended() {
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let cloud = cloud(directory.path()).await;
    let mut edge = Edge::start(directory.path(), &cloud, &stream(&broker.url(), "client_id = \"old\"")).await;
    send(&broker, 0..10).await;
    whole(&cloud, &mut edge, 10).await;
    edge.stop();
    send(&broker, 10..30).await;
    edge.configure(&stream(&broker.url(), "client_id = \"new\""));
    edge.run();
    edge.wait().await;
    whole(&cloud, &mut edge, 30).await;
    // The broker keeps the old session until it is ended.
    let started = Instant::now();
    loop {
        let mut asking = broker.client("old");
        asking.set_clean_start(false);
        let (_client, mut events) = AsyncClient::new(asking, 10);
        match events.poll().await {
            Ok(Event::Incoming(Packet::ConnAck(answer))) if !answer.session_present => break,
            _ => {}
        }
        assert!(started.elapsed() < PATIENCE, "the old session stays");
        // Whoever asks takes the client's connection away: not too often.
        tokio::time::sleep(POLL * 200).await;
    }
    send(&broker, 30..40).await;
    whole(&cloud, &mut edge, 40).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_with_tls_and_a_password_is_reached_and_a_wrong_password_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    let Some((ca, key)) = certificate(directory.path(), "broker") else { return };
    let passwords = Command::new("mosquitto_passwd").args(["-b", "-c", &at("passwords"), "weir", "right"]).output();
    if !passwords.is_ok_and(|made| made.status.success()) {
        println!("left out: mosquitto_passwd is not installed");
        return;
    }
    let doors = format!("allow_anonymous false\npassword_file {}\ncertfile {ca}\nkeyfile {key}\n", at("passwords"));
    let Some(broker) = Mosquitto::start_with(directory.path(), &doors) else { return };
    let cloud = cloud(directory.path()).await;
    let url = format!("mqtts://127.0.0.1:{}", broker.port);
    let source = |password: &str| {
        let login = format!("username = \"weir\"\npassword = \"{password}\"\nca_file = \"{ca}\"");
        stream(&url, &login)
    };
    let mut edge = Edge::start(directory.path(), &cloud, &source("right")).await;
    edge.stop();
    // Nobody sends, which is what is told by who was let in.
    let login = ["discover", "--url", &url, "--seconds", "1", "--username", "weir", "--password"];
    for (more, expected) in [
        (&["right", "--ca-file", &ca][..], "nothing came on #"),
        (&["right"], "certificate"),
        (&["wrong", "--ca-file", &ca], "NotAuthorized"),
    ] {
        let said = ask(&[&login[..], more].concat()).await;
        assert!(said.contains(expected), "{more:?}: {said}");
    }
    edge.configure(&source("wrong"));
    edge.run();
    let started = Instant::now();
    loop {
        if let Some(status) = edge.try_status().await
            && let Some(error) = status["sources"][0]["last_error"].as_str()
        {
            assert!(!error.contains("wrong"), "a secret in an error");
            break;
        }
        assert!(started.elapsed() < PATIENCE, "a wrong password is not told");
        tokio::time::sleep(POLL).await;
    }
}

/// What a source of numbers may become while they come.
fn becoming(url: &str, number: usize) -> String {
    // Filters that overlap would bring a message twice.
    let (topics, format, at) = match number % 3 {
        0 => ("\"field/#\"", "raw\"", "/value"),
        1 => ("\"field/#\", \"other/#\"", "csv\"\noptions = { header = [\"n\"] }", "/n"),
        // Of which a number alone has no `n`.
        _ => ("\"more/+\", \"field/#\"", "json\"", "/n"),
    };
    let device = ["topic:1", "topic:0"][number / 3 % 2];
    format!(
        "[[source]]\nkind = \"mqtt\"\nname = \"field\"\nurl = \"{url}\"\ntopics = [{topics}]\nstream = \"field\"\nformat = \"{format}\n\
         [source.map]\ndevice = \"{device}\"\nn = \"{at}\"\n[stream.field.fields]\nn = {{ type = \"int64\", required = true }}\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn other_topics_maps_and_formats_by_sighup_lose_nothing_that_comes_meanwhile() {
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let broker = Arc::new(broker);
    let cloud = cloud(directory.path()).await;
    let mut edge = Edge::start(directory.path(), &cloud, &becoming(&broker.url(), 0)).await;
    let stop = Arc::new(AtomicBool::new(false));
    let load = tokio::spawn({
        let (broker, stop) = (Arc::clone(&broker), Arc::clone(&stop));
        async move {
            let mut next = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let message = |n: u64| (format!("field/d{}", n % 5), n.to_string().into_bytes());
                publish(broker.client("p"), (next..next + 50).map(message).collect()).await;
                next += 50;
            }
            next
        }
    });
    // Without another file: what makes it read is the signal alone.
    let reloads = async |edge: &Edge| edge.status().await["configuration"]["reloads"].as_u64().unwrap();
    let (before, started) = (reloads(&edge).await, Instant::now());
    edge.hang_up();
    while reloads(&edge).await == before {
        edge.check(started, "SIGHUP is not heard");
        tokio::time::sleep(POLL).await;
    }
    for number in 1..=12 {
        let before = edge.status().await;
        edge.configure(&becoming(&broker.url(), number));
        edge.hang_up();
        let started = Instant::now();
        loop {
            let status = edge.status().await;
            let other = status["configuration"]["version"] != before["configuration"]["version"];
            let read = |status: &serde_json::Value| status["sources"][0]["journalled"].as_u64().unwrap_or(0);
            if other && status["sources"][0]["connected"] == true && read(&status) > read(&before) + 100 {
                assert_eq!(status["configuration"]["last_error"], serde_json::Value::Null);
                break;
            }
            edge.check(started, &format!("configuration {number} does not count: {status:#}"));
            tokio::time::sleep(POLL).await;
        }
    }
    stop.store(true, Ordering::Relaxed);
    let total = load.await.unwrap() as i64;
    let started = Instant::now();
    // What one format cannot read is in quarantine, with its bytes.
    let kept = "SELECT n FROM field";
    let refused = "SELECT CAST(CAST(payload AS VARCHAR) AS BIGINT) AS n FROM quarantine";
    let numbers = async |statement: &str| match cloud.sql(statement).await {
        Ok(rows) => rows.iter().map(|row| row["n"].as_i64().unwrap()).collect::<Vec<_>>(),
        Err(_) => Vec::new(),
    };
    let (rows, quarantined) = loop {
        let found = (numbers(kept).await, numbers(refused).await);
        if (found.0.len() + found.1.len()) as i64 >= total {
            break found;
        }
        edge.check(started, &format!("{} and {} of {total}", found.0.len(), found.1.len()));
        tokio::time::sleep(POLL).await;
    };
    edge.drained().await;
    println!("{} rows, {} in quarantine", rows.len(), quarantined.len());
    let all = rows.iter().chain(&quarantined).copied().collect::<BTreeSet<_>>();
    assert!(all.iter().copied().eq(0..total), "something is lost");
    let mut each = rows.iter().chain(&quarantined).copied().collect::<Vec<_>>();
    each.sort_unstable();
    let twice = each.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| pair[0]).collect::<Vec<_>>();
    assert_eq!(twice, [0; 0], "something is there twice");
    assert!(rows.len() > 500 && quarantined.len() > 100, "nothing was tried");
    assert!(cloud.integer("SELECT count(*) FROM field WHERE device = 'field'").await > 0, "the map never changed");
}

/// A device that speaks Modbus over TCP: its holding registers are 0, 1, 2, …, each by its address, times ten.
async fn modbus(listener: TcpListener) {
    async fn answer(mut stream: TcpStream) -> std::io::Result<()> {
        loop {
            // Transaction, protocol 0, length; then unit, function, address and count.
            let mut asked = [0; 12];
            stream.read_exact(&mut asked).await?;
            let (address, count) =
                (u16::from_be_bytes([asked[8], asked[9]]), u16::from_be_bytes([asked[10], asked[11]]));
            let values =
                (address..address + count).flat_map(|register| (register * 10).to_be_bytes()).collect::<Vec<_>>();
            let mut told = asked[..4].to_vec();
            told.extend((values.len() as u16 + 3).to_be_bytes());
            told.extend([asked[6], asked[7], values.len() as u8]);
            told.extend(values);
            stream.write_all(&told).await?;
        }
    }
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(answer(stream));
    }
}

/// A Sparkplug payload with one metric: its fields, each a number or text.
fn sparkplug(seq: u8, metric: &[(u8, &[u8])]) -> Vec<u8> {
    let mut fields = Vec::new();
    for (number, value) in metric {
        fields.push(*number);
        // Text and so on have their length before them.
        fields.extend((number & 7 == 2).then_some(value.len() as u8));
        fields.extend_from_slice(value);
    }
    // Time in ms, the metric, seq.
    let mut payload = vec![0x08, 0x80, 0xd0, 0x95, 0xff, 0xbc, 0x31, 0x12, fields.len() as u8];
    payload.extend(fields);
    payload.extend([0x18, seq]);
    payload
}

#[tokio::test(flavor = "multi_thread")]
async fn registers_a_programs_lines_and_sparkplug_become_tables() {
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let cloud = cloud(directory.path()).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let device = listener.local_addr().unwrap();
    tokio::spawn(modbus(listener));
    let url = broker.url();
    let sources = format!(
        r#"
[[source]]
kind = "modbus"
url = "tcp://{device}"
every = "200ms"
stream = "meter"
[[source.unit]]
id = 7
device = "meter-7"
[[source.register]]
field = "voltage"
address = 23
scale = 0.5
[[source.register]]
field = "pair"
address = 1
type = "u32"
[[source]]
kind = "exec"
command = ["sh", "-c", 'i=0; while [ $i -lt 100 ]; do echo "{{\"n\":$i,\"d\":\"p$((i % 3))\"}}"; i=$((i + 1)); done; exec sleep 600']
stream = "tally"
[source.map]
device = "/d"
n = "/n"
[[source]]
kind = "mqtt"
url = "{url}"
topics = ["spBv1.0/#"]
stream = "plant"
format = "sparkplug"
[source.map]
device = "/id"
ts = "/time"
temperature = "/metrics/Temp"
online = "/online"
[stream.meter.fields]
voltage = {{ type = "float64" }}
pair = {{ type = "int64" }}
status = {{ type = "text" }}
[stream.tally.fields]
n = {{ type = "int64" }}
[stream.plant.fields]
temperature = {{ type = "float64" }}
online = {{ type = "bool" }}
"#
    );
    let mut edge = Edge::start(directory.path(), &cloud, &sources).await;
    let double = |value: f64| value.to_le_bytes();
    // Name, alias, type and a double; then the alias and a double alone; then the death.
    let birth = sparkplug(0, &[(0x0a, b"Temp"), (0x10, &[5]), (0x20, &[10]), (0x69, &double(20.5))]);
    let data = (1..=20).map(|seq| sparkplug(seq, &[(0x10, &[5]), (0x69, &double(20.5 + f64::from(seq)))]));
    let told = std::iter::once(("spBv1.0/g/NBIRTH/n".to_owned(), birth))
        .chain(data.map(|data| ("spBv1.0/g/NDATA/n".to_owned(), data)))
        .chain([("spBv1.0/g/NDEATH/n".to_owned(), sparkplug(0, &[(0x0a, b"none"), (0x20, &[3]), (0x50, &[1])]))]);
    publish(broker.client("p"), told.collect()).await;
    let wanted = [
        ("SELECT count(*) FROM plant", 22),
        ("SELECT count(*) FROM tally", 100),
        ("SELECT least(count(*), 5) FROM meter", 5),
    ];
    for (statement, wanted) in wanted {
        let started = Instant::now();
        let count = async || {
            cloud.sql(statement).await.map(|rows| rows[0].as_object().unwrap().values().next().unwrap().as_i64())
        };
        loop {
            let found = count().await;
            if found.as_ref().is_ok_and(|found| *found >= Some(wanted)) {
                break;
            }
            edge.check(started, &format!("{statement}: {found:?}"));
            tokio::time::sleep(POLL).await;
        }
    }
    let check = async |statement: &str, expected: serde_json::Value| {
        assert_eq!(serde_json::Value::from(cloud.sql(statement).await.unwrap()), expected, "{statement}");
    };
    let meter = "SELECT DISTINCT device, voltage, pair, status, quality FROM meter";
    let registers = (10_u32 << 16) + 20;
    check(meter, serde_json::json!([{"device": "meter-7", "voltage": 115.0, "pair": registers, "status": "ok", "quality": "good"}])).await;
    let program = "SELECT device, count(*) AS lines, sum(n) AS total FROM tally GROUP BY device ORDER BY device";
    let of =
        |device: &str, lines: i64, total: i64| serde_json::json!({"device": device, "lines": lines, "total": total});
    check(program, serde_json::json!([of("p0", 34, 1683), of("p1", 33, 1617), of("p2", 33, 1650)])).await;
    let plant = "SELECT count(temperature) AS n, min(temperature) AS low, max(temperature) AS high, \
                 count(*) FILTER (WHERE online) AS born, count(*) FILTER (WHERE NOT online) AS died FROM plant WHERE device = 'g/n'";
    check(plant, serde_json::json!([{"n": 21, "low": 20.5, "high": 40.5, "born": 1, "died": 1}])).await;
    edge.stop();
}
