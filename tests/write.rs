//! The doors for senders without an agent, asked as Telegraf, curl and an OpenTelemetry collector ask them.

use std::io::Write;
use std::time::{Duration, Instant};

use flate2::Compression;
use flate2::write::GzEncoder;
use rand::Rng;
use reqwest::{Response, StatusCode};

use crate::harness::{Cloud, EDGE, TOKEN};
use crate::load::{a_moment, seeded};
use crate::process::{PATIENCE, POLL};

const QUICK: &str = "[commit]\nmax_age = \"300ms\"\n";
/// 2024-01-01T00:00:00Z
const START_S: i64 = 1_704_067_200;

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
    packed.write_all(text).unwrap();
    packed.finish().unwrap()
}

struct Door<'a> {
    cloud: &'a Cloud,
    client: reqwest::Client,
}

impl<'a> Door<'a> {
    fn of(cloud: &'a Cloud) -> Self {
        // A refusal of a long body ends its connection, and the next request must not take that for a good one.
        let client = reqwest::Client::builder().timeout(PATIENCE).pool_max_idle_per_host(0).build().unwrap();
        Self { cloud, client }
    }

    fn post(&self, path: &str) -> reqwest::RequestBuilder {
        self.client.post(format!("{}{path}", self.cloud.http))
    }

    /// As Telegraf's influxdb_v2 writes.
    async fn v2(&self, precision: &str, lines: impl Into<Vec<u8>>) -> Response {
        let path = format!("/api/v2/write?org=o&bucket=b&precision={precision}");
        let request = self.post(&path).header("authorization", format!("Token {TOKEN}"));
        request.header("content-encoding", "gzip").body(gzip(&lines.into())).send().await.unwrap()
    }

    async fn wait_until_committed(&self) {
        let started = Instant::now();
        let durable = self.cloud.counter("weir_cloud_rows_durable_total").await;
        while self.cloud.counter("weir_cloud_rows_committed_total").await < durable {
            assert!(started.elapsed() < PATIENCE, "not committed");
            tokio::time::sleep(POLL).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn telegraf_and_curl_write_lines_that_sql_sees_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(directory.path(), "a", QUICK).await;
    let door = Door::of(&cloud);
    // What Telegraf's influxdb output does first.
    let created = door.post("/query").basic_auth(EDGE, Some(TOKEN)).body("q=CREATE+DATABASE+%22telegraf%22").send();
    let created = created.await.unwrap();
    assert_eq!(created.status(), StatusCode::OK);
    assert_eq!(created.json::<serde_json::Value>().await.unwrap()["results"][0]["statement_id"], 0);
    let ping = door.client.get(format!("{}/ping", cloud.http)).send().await.unwrap();
    assert_eq!(ping.status(), StatusCode::NO_CONTENT);
    assert!(ping.headers()["x-influxdb-version"].to_str().unwrap().starts_with("1.8"));
    let health = door.client.get(format!("{}/health", cloud.http)).header("accept", "application/json").send();
    assert_eq!(health.await.unwrap().json::<serde_json::Value>().await.unwrap()["status"], "pass");

    let lines = format!("cpu,host=web-1,cpu=cpu0 usage_idle=93.5,procs=12i {START_S}000000000\n");
    let v1 = door.post("/write?db=telegraf&rp=autogen").basic_auth(EDGE, Some(TOKEN)).body(lines).send().await.unwrap();
    assert_eq!(v1.status(), StatusCode::NO_CONTENT);
    let named = format!("/write?db=telegraf&precision=s&u={EDGE}&p={TOKEN}");
    let v1 = door.post(&named).body(format!("cpu,host=web-2,cpu=cpu0 usage_idle=1,procs=3i {START_S}")).send();
    assert_eq!(v1.await.unwrap().status(), StatusCode::NO_CONTENT);
    let v2 = door.v2("ms", format!("Room\\ Temp,sensor=°1 °C=21.5,ok=t,note=\"a \\\"b\\\"\" {START_S}000\n")).await;
    assert_eq!(v2.status(), StatusCode::NO_CONTENT);
    assert_eq!(v2.headers()["weir-renamed"], "C=c, Room Temp=room_temp");

    let rows =
        cloud.sql("SELECT device, cpu, usage_idle, procs, quality, _edge FROM cpu ORDER BY device").await.unwrap();
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[0]["device"], "web-1");
    assert_eq!(
        (&rows[0]["cpu"], &rows[0]["usage_idle"], &rows[0]["procs"]),
        (&"cpu0".into(), &93.5.into(), &12.into())
    );
    assert_eq!((&rows[1]["quality"], &rows[1]["_edge"]), (&"good".into(), &EDGE.into()));
    let room = cloud.sql("SELECT device, c, ok, note FROM room_temp").await.unwrap();
    assert_eq!(room[0]["device"], "sensor=°1");
    assert_eq!((&room[0]["c"], &room[0]["ok"], &room[0]["note"]), (&21.5.into(), &true.into(), &"a \"b\"".into()));
    // The same rows when they are in files.
    door.wait_until_committed().await;
    let committed =
        cloud.sql("SELECT device, cpu, usage_idle, procs, quality, _edge FROM cpu ORDER BY device").await.unwrap();
    assert_eq!(rows, committed);
    assert_eq!(cloud.check_rows().await, [3, 3, 0, 0, 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_lines_are_answered_and_quarantined_and_other_types_are_rescued() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(directory.path(), "a", QUICK).await;
    let door = Door::of(&cloud);
    let lines = format!("m,host=a v=1 {START_S}\nm,host=a v=\nm,host=b v=2 {START_S}\nm,host=a v=3 1\n");
    let partial = door.v2("s", lines.clone()).await;
    assert_eq!(partial.status(), StatusCode::BAD_REQUEST);
    let answer: serde_json::Value = partial.json().await.unwrap();
    assert_eq!((&answer["code"], &answer["line"]), (&"invalid".into(), &2.into()), "{answer}");
    assert!(answer["message"].as_str().unwrap().starts_with("partial write: line 2: "), "{answer}");
    // Telegraf drops what is answered so, but who sends it again makes nothing twice.
    assert_eq!(door.v2("s", lines).await.status(), StatusCode::BAD_REQUEST);
    assert_eq!(cloud.integer("SELECT count(*) FROM m").await, 2);
    let bad = cloud
        .sql(
            "SELECT reason, source, topic, stream, arrow_cast(payload, 'Utf8') AS line FROM quarantine ORDER BY reason",
        )
        .await
        .unwrap();
    assert_eq!(bad.len(), 2, "{bad:?}");
    assert_eq!((&bad[0]["reason"], &bad[1]["reason"]), (&"before_2000".into(), &"malformed".into()));
    assert_eq!(
        (&bad[1]["line"], &bad[1]["topic"], &bad[1]["stream"]),
        (&"m,host=a v=".into(), &"o/b".into(), &"m".into())
    );
    // v is a float: the integer fits, and the text is not lost.
    assert_eq!(door.v2("s", format!("m,host=c v=7i {START_S}\nm,host=d v=\"x\" {START_S}\n")).await.status(), 204);
    for _ in 0..2 {
        let rescued = cloud
            .sql("SELECT device, v, quality, _rescued FROM m WHERE _rescued IS NOT NULL ORDER BY device")
            .await
            .unwrap();
        assert_eq!(rescued.len(), 1);
        assert_eq!((&rescued[0]["quality"], &rescued[0]["_rescued"]), (&"type:v".into(), &"{\"v\":\"x\"}".into()));
        let fits = cloud.sql("SELECT v, quality FROM m WHERE device = 'c'").await.unwrap();
        assert_eq!(fits, [serde_json::json!({ "v": 7.0, "quality": "good" })]);
        door.wait_until_committed().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_token_or_sends_too_much_is_refused_and_nothing_is_stored() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(directory.path(), "a", &format!("{QUICK}[write]\nmax_bytes = \"1MiB\"\n")).await;
    let door = Door::of(&cloud);
    let line = format!("m v=1 {START_S}000000000");
    for request in [
        door.post("/write"),
        door.post("/write?u=gw-test&p=wrong"),
        door.post(&format!("/write?u=other&p={TOKEN}")),
        door.post("/write").basic_auth(EDGE, Some("wrong")),
        door.post("/api/v2/write").header("authorization", "Token wrong"),
        door.post("/api/v2/write").header("authorization", "Token "),
        door.post("/api/v2/write").bearer_auth(""),
        door.post("/v1/metrics"),
        door.post("/query?q=CREATE+DATABASE+x"),
    ] {
        let answer = request.body(line.clone()).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
        assert!(answer.headers().contains_key("www-authenticate"));
        assert!(!answer.text().await.unwrap().contains(TOKEN));
    }
    let check = async |body: Vec<u8>, encoding: &str, expected: u16| {
        let request = || door.post("/api/v2/write").bearer_auth(TOKEN).header("content-encoding", encoding);
        // Who is refused while it still sends may see its connection end before it sees the answer.
        let started = std::time::Instant::now();
        let answer = loop {
            match request().body(body.clone()).send().await {
                Ok(answer) => break answer,
                Err(error) => {
                    assert!(expected == 413 && error.is_request() && started.elapsed() < PATIENCE, "{error:?}");
                }
            }
        };
        assert_eq!(answer.status().as_u16(), expected, "{}", answer.text().await.unwrap());
    };
    check(vec![b'x'; 2 << 20], "identity", 413).await;
    // A bomb: 100 MB in 100 kB.
    check(gzip(&vec![b' '; 100 << 20]), "gzip", 413).await;
    check(b"no gzip".to_vec(), "gzip", 400).await;
    check(line.clone().into_bytes(), "br", 415).await;
    // Each row has another field: a megabyte of lines would be a table of gigabytes.
    let wide: String = (0..40_000).map(|n| format!("w f{}=1 {START_S}000000000\n", n % 500)).collect();
    check(wide.into_bytes(), "identity", 413).await;
    let wrong = door.post("/api/v2/write?precision=weeks").bearer_auth(TOKEN).body(line).send().await.unwrap();
    assert_eq!(wrong.status(), StatusCode::BAD_REQUEST);
    let select = door.post("/query?q=SELECT+1").bearer_auth(TOKEN).send().await.unwrap();
    assert_eq!(select.status(), StatusCode::BAD_REQUEST);
    assert_eq!((cloud.stored_rows().await, cloud.check_rows().await), (0, [0; 5]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_comes_again_is_stored_once_also_after_a_commit_and_a_kill() {
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = Cloud::start(directory.path(), "a", QUICK).await;
    let lines = format!("m,host=a v=1 {START_S}\nn,host=a v=1i {START_S}\n");
    for _ in 0..2 {
        assert_eq!(Door::of(&cloud).v2("s", lines.clone()).await.status(), 204);
    }
    assert_eq!(cloud.check_rows().await, [4, 2, 2, 0, 0]);
    Door::of(&cloud).wait_until_committed().await;
    for _ in 0..2 {
        cloud.kill();
        cloud.run();
        cloud.wait().await;
        assert_eq!(Door::of(&cloud).v2("s", lines.clone()).await.status(), 204);
        assert_eq!(cloud.check_rows().await, [2, 0, 2, 0, 0]);
    }
    // Without a time a line is another reading each time it comes.
    for _ in 0..2 {
        assert_eq!(Door::of(&cloud).v2("s", "m,host=b v=1").await.status(), 204);
    }
    assert_eq!((cloud.integer("SELECT count(*) FROM m").await, cloud.integer("SELECT count(*) FROM n").await), (3, 1));
}

/// Numbered lines of two measurements; each request is sent until it is answered.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_at_the_doors_when_the_cloud_is_killed() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = Cloud::start(directory.path(), "a", QUICK).await;
    let http = cloud.http.clone();
    let (stop, mut stopped) = tokio::sync::watch::channel(false);
    let mut senders = tokio::task::JoinSet::new();
    for sender in 0..3_i64 {
        let (http, stopped) = (http.clone(), stopped.clone());
        senders.spawn(async move {
            let client = reqwest::Client::builder().timeout(Duration::from_secs(5)).build().unwrap();
            let (mut count, mut again) = (0_i64, 0);
            while !*stopped.borrow() {
                let line = |n: i64| {
                    format!("{},host=s{sender} n={n}i {}\n", ["odd", "even"][(n % 2) as usize], START_S * 1_000 + n)
                };
                let lines: String = (count..count + 20).map(line).collect();
                count += 20;
                loop {
                    let request = client.post(format!("{http}/api/v2/write?precision=ms")).bearer_auth(TOKEN);
                    match request.body(lines.clone()).send().await {
                        Ok(answer) if answer.status() == StatusCode::NO_CONTENT => break,
                        Ok(answer) => assert!(answer.status() == 429 || answer.status() == 503, "{answer:?}"),
                        Err(_) => {}
                    }
                    again += 1;
                    tokio::time::sleep(POLL).await;
                }
            }
            (count, again)
        });
    }
    for _ in 0..random.random_range(12..16) {
        a_moment(&mut random).await;
        cloud.kill();
        cloud.run();
    }
    cloud.wait().await;
    a_moment(&mut random).await;
    stop.send(true).unwrap();
    stopped.changed().await.ok();
    let ended = senders.join_all().await;
    let (count, again) = ended.iter().fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
    assert!(count > 500 && again > 0, "{count} lines, {again} repetitions");
    for _ in 0..2 {
        let all = cloud.integer("SELECT (SELECT count(*) FROM odd) + (SELECT count(*) FROM even)").await;
        let distinct = "SELECT (SELECT count(DISTINCT (device || '/' || n)) FROM odd) + (SELECT count(DISTINCT (device || '/' || n)) FROM even)";
        assert_eq!((all, cloud.integer(distinct).await), (count, count));
        Door::of(&cloud).wait_until_committed().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn new_fields_appear_and_old_senders_and_old_names_still_land() {
    let directory = tempfile::tempdir().unwrap();
    let more = format!("{QUICK}[stream.m.alias]\nspeed = \"avg_speed\"\n");
    let mut cloud = Cloud::start(directory.path(), "a", &more).await;
    let send = async |cloud: &Cloud, device: &str, fields: &str| {
        let line = format!("m,host={device} {fields} {START_S}");
        assert_eq!(Door::of(cloud).v2("s", line).await.status(), StatusCode::NO_CONTENT);
    };
    send(&cloud, "a", "speed=1").await;
    Door::of(&cloud).wait_until_committed().await;
    send(&cloud, "b", "avg_speed=2,heavy=3i").await;
    // As sent before the table had `heavy`, and by one that sends both names.
    send(&cloud, "c", "speed=4").await;
    send(&cloud, "d", "avg_speed=5,speed=6").await;
    let row = |device: &str, avg_speed: f64, more: &[(&str, f64)]| {
        let mut row = serde_json::json!({ "device": device, "avg_speed": avg_speed, "heavy": null, "speed": null });
        more.iter().for_each(|(name, value)| {
            row[name] = if *name == "heavy" { (*value as i64).into() } else { (*value).into() }
        });
        row
    };
    let expected =
        [row("a", 1.0, &[]), row("b", 2.0, &[("heavy", 3.0)]), row("c", 4.0, &[]), row("d", 5.0, &[("speed", 6.0)])];
    let rows = "SELECT device, avg_speed, heavy, speed FROM m ORDER BY device";
    assert_eq!(cloud.sql(rows).await.unwrap(), expected);
    // From the WAL, then from files.
    cloud.kill();
    cloud.run();
    cloud.wait().await;
    assert_eq!(cloud.sql(rows).await.unwrap(), expected);
    let started = Instant::now();
    while cloud.counter("weir_cloud_hot_bytes").await > 0 {
        assert!(started.elapsed() < PATIENCE);
        tokio::time::sleep(POLL).await;
    }
    assert_eq!(cloud.sql(rows).await.unwrap(), expected);
}

/// Protobuf by hand: what a collector sends, whatever library made it.
mod protobuf {
    fn varint(mut value: u64, out: &mut Vec<u8>) {
        while value >= 0x80 {
            out.push(value as u8 | 0x80);
            value >>= 7;
        }
        out.push(value as u8);
    }

    /// A message, a text.
    pub(super) fn bytes(field: u64, body: impl AsRef<[u8]>) -> Vec<u8> {
        let mut out = Vec::new();
        varint(field << 3 | 2, &mut out);
        varint(body.as_ref().len() as u64, &mut out);
        out.extend_from_slice(body.as_ref());
        out
    }

    pub(super) fn fixed64(field: u64, value: u64) -> Vec<u8> {
        let mut out = Vec::new();
        varint(field << 3 | 1, &mut out);
        out.extend_from_slice(&value.to_le_bytes());
        out
    }
}

/// An ExportMetricsServiceRequest: gauges of one host, a value each second.
fn gauge(name: &str, host: &str, values: &[f64]) -> Vec<u8> {
    use protobuf::{bytes, fixed64};
    let text = |key: &str, value: &str| [bytes(1, key), bytes(2, bytes(1, value))].concat();
    let points = values.iter().enumerate().map(|(second, value)| {
        let nanos = (START_S as u64 + second as u64) * 1_000_000_000;
        bytes(1, [fixed64(3, nanos), fixed64(4, value.to_bits()), bytes(7, text("core", "0"))].concat())
    });
    let metric = [bytes(1, name), bytes(3, "Cel"), bytes(5, points.collect::<Vec<_>>().concat())].concat();
    let resource = bytes(1, bytes(1, text("host.name", host)));
    bytes(1, [resource, bytes(2, bytes(2, metric))].concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_writes_metrics_that_sql_sees_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(directory.path(), "a", QUICK).await;
    let door = Door::of(&cloud);
    let export = async |body: Vec<u8>, token: &str| {
        let request = door.post("/v1/metrics").header("content-type", "application/x-protobuf");
        request.bearer_auth(token).header("content-encoding", "gzip").body(gzip(&body)).send().await.unwrap()
    };
    let request = gauge("system.cpu.temperature", "host-1", &[41.5, 42.0, 43.25]);
    let answer = export(request.clone(), TOKEN).await;
    assert_eq!(answer.status(), StatusCode::OK);
    // Nothing of it was refused: an empty ExportMetricsServiceResponse.
    assert_eq!(answer.bytes().await.unwrap().len(), 0);
    let seen = "SELECT device, core, unit, CAST(ts AS TEXT) AS ts, value FROM system_cpu_temperature ORDER BY ts";
    let rows = [("2024-01-01T00:00:00Z", 41.5), ("2024-01-01T00:00:01Z", 42.0), ("2024-01-01T00:00:02Z", 43.25)];
    let expected: Vec<serde_json::Value> = rows
        .iter()
        .map(|(ts, value)| {
            serde_json::json!({ "device": "host-1", "core": "0", "unit": "Cel", "ts": ts, "value": value })
        })
        .collect();
    assert_eq!(cloud.sql(seen).await.unwrap(), expected);
    // A collector that has lost the answer sends it again.
    assert_eq!(export(request, TOKEN).await.status(), StatusCode::OK);
    door.wait_until_committed().await;
    assert_eq!(cloud.sql(seen).await.unwrap(), expected, "from files, and once");
    assert_eq!(export(gauge("other", "host-1", &[1.0]), "another").await.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(export(b"\xff\xff".to_vec(), TOKEN).await.status(), StatusCode::BAD_REQUEST);
    assert_eq!(cloud.stored_rows().await, 3);
}
