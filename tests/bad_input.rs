//! What devices should not send, over a real broker: each is a row of quarantine with its reason, and loses nothing else.
//! And what a gateway should not do: go back to an older copy of its disk.

use std::collections::BTreeMap;
use std::path::Path;

use crate::harness::{Cloud, Edge, Mosquitto, mqtt_source, publish};

const FIELD: &str = r#"
[source.map]
device = "/d"
ts = { at = "/ts", format = "epoch_s" }
v = "/v"
[stream.field.fields]
v = { type = "float64", min = -50, max = 50, required = true }
"#;

async fn send(broker: &Mosquitto, payloads: Vec<Vec<u8>>) {
    let mut options = broker.client("bad-input");
    options.set_max_packet_size(Some(100 << 20));
    publish(options, payloads.into_iter().map(|payload| ("field/a".to_owned(), payload)).collect()).await;
}

async fn stage(directory: &Path) -> Option<(Mosquitto, Cloud, Edge)> {
    let broker = Mosquitto::start(directory)?;
    let cloud = Cloud::start(directory, "a", "[commit]\nmax_age = \"1s\"\n").await;
    let edge = Edge::start(directory, &cloud, &mqtt_source(&broker.url(), "field/#", "field", FIELD)).await;
    Some((broker, cloud, edge))
}

fn now_s() -> i64 {
    chrono::Utc::now().timestamp()
}

fn reading(device: &str, ts: i64, v: &str) -> Vec<u8> {
    format!("{{\"d\":\"{device}\",\"ts\":{ts},\"v\":{v}}}").into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_bad_message_is_quarantined_and_good_ones_go_on() {
    let directory = tempfile::tempdir().unwrap();
    let Some((broker, cloud, mut edge)) = stage(directory.path()).await else { return };
    let now = now_s();
    let mut history = (0..9_600).map(|hour| String::from_utf8(reading("well", now - hour * 3_600, "1")).unwrap());
    let history = format!("[{}]", history.by_ref().collect::<Vec<_>>().join(",")).into_bytes();
    let mut huge = reading("huge", now, "1");
    huge.resize(64 << 20, b' ');
    let deep = format!("{{\"d\":{}", "[".repeat(200)).into_bytes();
    let bad: Vec<(&str, Vec<u8>)> = vec![
        ("malformed", b"{\"d\":".to_vec()),
        ("malformed", deep),
        ("malformed", reading("a", now, "NaN")),
        ("malformed", reading("a", now, "Infinity")),
        ("malformed", reading("a", now, "1e400")),
        ("not_utf8", b"{\"d\":\"\xff\"}".to_vec()),
        ("wrong_type", reading("a", now, "\"1\"")),
        ("missing", reading("a", now, "null")),
        ("below_min", reading("a", now, "-51")),
        ("above_max", reading("a", now, "51")),
        ("bad_device", reading("a/+", now, "1")),
        ("bad_device", reading("a\\u0007", now, "1")),
        ("before_2000", reading("a", 86_400, "1")),
        ("in_future", reading("a", 7_258_118_400, "1")),
        ("too_large", huge),
    ];
    let mut expected = BTreeMap::<String, i64>::new();
    bad.iter().for_each(|(reason, _)| *expected.entry((*reason).to_owned()).or_default() += 1);
    let mut payloads = vec![reading("good", now, "1.5")];
    payloads.extend(bad.into_iter().map(|(_, payload)| payload));
    payloads.push(history);
    payloads.push(reading("good", now + 1, "2.5"));
    let sent = payloads.len() as u64;
    send(&broker, payloads).await;
    while edge.status().await["sources"][0]["journalled"] != sent {
        tokio::time::sleep(crate::process::POLL).await;
    }
    edge.drained().await;
    let rows = cloud.sql("SELECT reason, count(*) AS n FROM quarantine GROUP BY reason").await.unwrap();
    let found = rows.iter().map(|row| (row["reason"].as_str().unwrap().to_owned(), row["n"].as_i64().unwrap()));
    assert_eq!(found.collect::<BTreeMap<_, _>>(), expected);
    assert_eq!(cloud.integer("SELECT count(*) FROM field WHERE device = 'good'").await, 2);
    assert_eq!(cloud.integer("SELECT count(*) FROM field WHERE device = 'well'").await, 9_600);
    let large = "SELECT payload_bytes FROM quarantine WHERE reason = 'too_large'";
    assert_eq!(cloud.integer(large).await, 64 << 20);
    let kept = cloud.sql("SELECT encode(payload, 'hex') AS bytes FROM quarantine WHERE reason = 'not_utf8'").await;
    assert_eq!(kept.unwrap()[0]["bytes"], "7b2264223a22ff227d", "its bytes are kept");
}

fn copy(from: &Path, to: &Path) {
    assert!(std::process::Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_restored_from_an_older_disk_goes_on_in_a_new_spool() {
    let directory = tempfile::tempdir().unwrap();
    let Some((broker, cloud, mut edge)) = stage(directory.path()).await else { return };
    let now = now_s();
    let mut sent = 0;
    let mut more = |count: i64| {
        let payloads = (sent..sent + count).map(|n| reading("d", now - n, "1")).collect::<Vec<_>>();
        sent += count;
        (payloads, sent)
    };
    let arrived = async |edge: &mut Edge, total: i64| {
        while cloud.integer("SELECT count(*) FROM field").await < total {
            tokio::time::sleep(crate::process::POLL).await;
        }
        edge.drained().await
    };
    let (payloads, total) = more(50);
    send(&broker, payloads).await;
    // The table is there with the first row.
    while cloud.sql("SELECT 1 FROM field LIMIT 1").await.is_err() {
        tokio::time::sleep(crate::process::POLL).await;
    }
    let before = arrived(&mut edge, total).await;
    edge.stop();
    let (data, older) = (directory.path().join("edge"), directory.path().join("older"));
    copy(&data, &older);
    edge.run();
    edge.wait().await;
    let (payloads, total) = more(50);
    send(&broker, payloads).await;
    arrived(&mut edge, total).await;
    edge.stop();
    std::fs::remove_dir_all(&data).unwrap();
    copy(&older, &data);
    edge.run();
    edge.wait().await;
    let (payloads, total) = more(50);
    send(&broker, payloads).await;
    let after = arrived(&mut edge, total).await;
    assert_ne!(after["spool"], before["spool"]);
    assert!(after["incidents"][0].as_str().unwrap().contains("forked"), "{after:#}");
    assert_eq!(cloud.integer("SELECT count(*) FROM field").await, total);
    assert_eq!(cloud.integer("SELECT count(DISTINCT ts) FROM field").await, total);
}
