//! The first minutes of a field engineer: hear a broker, take what is proposed, ask what is missing; and a policy that drops
//! says in SQL what it dropped.

use std::ops::Range;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use reqwest::StatusCode;

use crate::harness::{Cloud, Edge, Mosquitto, mqtt_source, publish};
use crate::known_failures::{door, noise, push};
use crate::load::seeded;
use crate::process::{PATIENCE, POLL};
use crate::sources::{cloud, send, whole};

/// What `weir edge …` prints.
pub(crate) async fn ask(arguments: &[&str]) -> String {
    let arguments = arguments.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    let asked = tokio::task::spawn_blocking(move || {
        Command::new(env!("CARGO_BIN_EXE_weir")).arg("edge").args(arguments).output().unwrap()
    });
    let answer = asked.await.unwrap();
    format!("{}{}", String::from_utf8_lossy(&answer.stdout), String::from_utf8_lossy(&answer.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_discover_writes_fills_a_table_and_doctor_is_content_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let broker = Arc::new(broker);
    let cloud = cloud(directory.path()).await;
    let stop = Arc::new(AtomicBool::new(false));
    let devices = tokio::spawn({
        let (broker, stop) = (Arc::clone(&broker), Arc::clone(&stop));
        async move {
            while !stop.load(Ordering::Relaxed) {
                send(&broker, 0..10).await;
            }
        }
    });
    let written = ask(&["discover", "--url", &broker.url(), "--seconds", "3"]).await;
    println!("{written}");
    let sources = &written[written.find("[[source]]").expect("a source is proposed")..];
    let mut edge = Edge::start(directory.path(), &cloud, sources).await;
    let config = directory.path().join("edge.toml").display().to_string();
    let lines = ask(&["doctor", "--config", &config]).await;
    println!("{lines}");
    for good in ["takes our subscriptions", "messages on field/+ within", "it knows edge", "a sync takes"] {
        assert!(lines.lines().any(|line| line.contains(good) && !line.contains("!!")), "{good}");
    }
    stop.store(true, Ordering::Relaxed);
    devices.await.unwrap();
    edge.drained().await;
    assert_eq!(cloud.integer("SELECT count(DISTINCT device) FROM field").await, 5);
    assert_eq!(cloud.integer("SELECT count(DISTINCT n) FROM field").await, 10);

    edge.stop();
    let log = std::fs::read_to_string(directory.path().join("edge.log")).unwrap();
    assert!(log.contains("the agent runs") && !log.contains('\u{1b}'), "colours in a file: {log}");
    edge.configure(&sources.replace("field/+", "nowhere/+"));
    let lines = ask(&["doctor", "--config", &config]).await;
    assert!(lines.lines().any(|line| line.contains("!!") && line.contains("nothing on nowhere/+")), "{lines}");
}

/// Messages of which a lane of the smallest size keeps the newest.
const MESSAGES: u64 = 320;

#[tokio::test(flavor = "multi_thread")]
async fn what_a_full_lane_drops_is_counted_in_sql() {
    let noise = noise(&mut seeded());
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = cloud(directory.path()).await;
    let config = "[cut]\nseal_max = \"100ms\"\nseal_away = \"100ms\"\n\
        [[lane]]\nname = \"rest\"\nstreams = []\nmax_bytes = \"48MiB\"\non_full = \"drop_oldest\"\n\
        [[source]]\nkind = \"http\"\nname = \"push\"\nlisten = \"127.0.0.1:0\"\nmax_payload = \"512KiB\"\nstream = \"field\"\n\
        [source.map]\ndevice = \"const:d\"\nn = \"/n\"\ntext = \"/text\"\n\
        [stream.field.fields]\nn = { type = \"int64\" }\ntext = { type = \"text\" }\n";
    let mut edge = Edge::start(directory.path(), &cloud, config).await;
    cloud.stop();
    let (at, client) = (door(&mut edge).await, reqwest::Client::new());
    for n in 0..MESSAGES {
        assert_eq!(push(&client, &at, n, &noise).await, StatusCode::OK, "a lane that drops takes what comes");
    }
    let started = Instant::now();
    while edge.status().await["sources"][0]["accepted"].as_u64() < Some(MESSAGES) {
        edge.check(started, "not all is read");
        tokio::time::sleep(POLL).await;
    }
    cloud.run();
    cloud.wait().await;
    edge.drained().await;
    let kept = cloud.integer("SELECT count(*) FROM field").await;
    let lost =
        cloud.sql("SELECT sum(rows) AS n, min(reason) AS reason FROM losses WHERE stream = 'field'").await.unwrap();
    println!("{kept} kept, lost: {lost:?}");
    assert!(kept > 0 && lost[0]["n"].as_i64() > Some(0), "nothing was dropped: nothing was tried");
    assert_eq!(kept + lost[0]["n"].as_i64().unwrap(), MESSAGES as i64);
    assert_eq!(lost[0]["reason"], "lane_full");
    // What had its number when the cloud went is kept, too.
    assert_eq!(cloud.integer("SELECT max(n) FROM field").await, MESSAGES as i64 - 1, "the newest are kept");
    assert_eq!(cloud.integer("SELECT count(DISTINCT n) FROM field").await, kept);
}

/// Readings that wait when the cloud comes back, while others go on arriving.
const BACKLOG: u64 = 1_000_000;

/// Numbers of one message: a million messages of one would be a test of the broker.
const PER_MESSAGE: u64 = 100;

/// Messages of [`PER_MESSAGE`] numbers, each with eight bytes that no codec makes less: over this link a million of them
/// take eight seconds at least.
fn many(url: &str) -> String {
    mqtt_source(
        url,
        "field/+",
        "field",
        "readings = \"/r\"\n[source.map]\ndevice = \"topic:1\"\nn = \"/n\"\nnoise = \"/x\"\n\
         [stream.field.fields]\nn = { type = \"int64\" }\nnoise = { type = \"int64\" }\n\
         [[lane]]\nname = \"rest\"\nstreams = []\nmax_bytes = \"4GiB\"\nbandwidth = \"1MiB\"\n",
    )
}

async fn publish_many(broker: &Mosquitto, numbers: Range<u64>) {
    let message = |first: u64| {
        let reading = |n: u64| format!("{{\"n\":{n},\"x\":{}}}", StdRng::seed_from_u64(n).random::<i64>());
        let readings = (first..first + PER_MESSAGE).map(reading).collect::<Vec<_>>();
        (format!("field/d{}", first % 7), format!("{{\"r\":[{}]}}", readings.join(",")).into_bytes())
    };
    publish(broker.client("p"), numbers.step_by(PER_MESSAGE as usize).map(message).collect()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_a_million_drains_while_live_data_flows() {
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let mut cloud: Cloud = cloud(directory.path()).await;
    let mut edge = Edge::start(directory.path(), &cloud, &many(&broker.url())).await;
    cloud.stop();
    for first in (0..BACKLOG).step_by(PER_MESSAGE as usize * 1_000) {
        publish_many(&broker, first..first + PER_MESSAGE * 1_000).await;
    }
    let started = Instant::now();
    while edge.status().await["rows"]["spooled"].as_u64() < Some(BACKLOG) {
        assert!(started.elapsed() < PATIENCE * 4, "not all of it is in the spool");
        tokio::time::sleep(POLL * 5).await;
    }
    cloud.run();
    cloud.wait().await;
    let mut next = BACKLOG;
    loop {
        publish_many(&broker, next..next + PER_MESSAGE).await;
        next += PER_MESSAGE;
        let asked = format!("SELECT count(*) AS old FROM field WHERE n < {BACKLOG}");
        let Ok(rows) = cloud.sql(&asked).await else { continue };
        let old = rows[0]["old"].as_u64().unwrap();
        if old == BACKLOG {
            break;
        }
        assert!(started.elapsed() < PATIENCE * 8, "the backlog does not drain: {old}");
    }
    // Numbers are given when a batch is sent.
    let overtaken = format!(
        "SELECT count(*) FROM field WHERE n < {BACKLOG} \
         AND _seq > (SELECT min(_seq) FROM field WHERE n >= {BACKLOG})"
    );
    let overtaken = cloud.integer(&overtaken).await;
    println!("{} live readings, the first of them before {overtaken} of the backlog", next - BACKLOG);
    assert!(overtaken > 0, "live readings waited for the backlog");
    whole(&cloud, &mut edge, next as i64).await;
}
