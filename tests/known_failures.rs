//! Failures that users of other agents have reported, one test for each: what failed there does not fail here.
//!
//! The numbers are those of the issues in influxdata/telegraf, vectordotdev/vector, nanomq/nanomq and
//! eclipse-mosquitto/mosquitto.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, RngCore};
use reqwest::StatusCode;
use serde_json::Value;

use crate::harness::{Cloud, Edge, Mosquitto, publish};
use crate::load::{Broker, Load, check, seeded};
use crate::process::{PATIENCE, POLL};
use crate::proxy::{Harm, Link, Proxy, Way};
use crate::sources::{cloud, send, stream, whole};

/// How long an agent may take for what it should do at once.
const SOON: Duration = Duration::from_secs(15);

struct Stage {
    broker: Mosquitto,
    cloud: Cloud,
    edge: Edge,
    directory: tempfile::TempDir,
}

impl Stage {
    async fn set() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let broker = Mosquitto::start(directory.path())?;
        let cloud = cloud(directory.path()).await;
        let edge = Edge::start(directory.path(), &cloud, &config(&broker)).await;
        Some(Self { broker, cloud, edge, directory })
    }

    /// Sends these numbers in groups, each of which becomes a record of its own in the spool.
    async fn spool(&mut self, groups: &[Range<u64>]) {
        for numbers in groups {
            let before = spooled(&self.edge.status().await);
            send(&self.broker, numbers.clone()).await;
            until(&mut self.edge, "all of it is in the spool", |status| {
                spooled(status) >= before + (numbers.end - numbers.start)
            })
            .await;
        }
    }

    async fn cloud_is_back(&mut self) {
        self.cloud.run();
        self.cloud.wait().await;
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("edge")
    }

    async fn numbers(&self) -> Vec<u64> {
        let rows = self.cloud.sql("SELECT n FROM field ORDER BY n").await.unwrap_or_default();
        rows.iter().map(|row| row["n"].as_u64().unwrap()).collect()
    }
}

/// Groups are cut at once, also while the cloud is away.
const CUT: &str = "[cut]\nseal_max = \"100ms\"\nseal_away = \"100ms\"\n";

fn config(broker: &Mosquitto) -> String {
    format!("{CUT}{}", stream(&broker.url(), ""))
}

fn spooled(status: &Value) -> u64 {
    status["rows"]["spooled"].as_u64().unwrap()
}

/// Waits until the status is so; returns it.
async fn until(edge: &mut Edge, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    let started = Instant::now();
    loop {
        if let Some(status) = edge.try_status().await {
            if is_so(&status) {
                return status;
            }
            assert!(started.elapsed() < PATIENCE, "not yet: {what}: {status:#}");
        }
        edge.check(started, what);
        tokio::time::sleep(POLL).await;
    }
}

/// Segments of a log, oldest first.
fn segments(log: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(log).unwrap().map(|entry| entry.unwrap().path());
    let mut segments: Vec<_> = entries.filter(|path| path.extension().is_some_and(|name| name == "seg")).collect();
    segments.sort();
    segments
}

/// The logs of a data directory: the journal, and the lanes of its spool.
fn logs(data: &Path) -> (PathBuf, Vec<PathBuf>) {
    let spool = data.join("spool");
    let id = std::fs::read_to_string(spool.join("id")).unwrap();
    let lanes = std::fs::read_dir(spool.join(id.trim())).unwrap().map(|entry| entry.unwrap().path());
    (data.join("journal"), lanes.filter(|path| path.is_dir()).collect())
}

fn lane(data: &Path, name: &str) -> PathBuf {
    let (_, lanes) = logs(data);
    lanes.into_iter().find(|lane| lane.ends_with(name)).unwrap()
}

/// Bytes before a record's payload, and before the first record: see the layout in the log's documentation.
const RECORD_HEAD: usize = 25;
const SEGMENT_HEAD: usize = 48;

/// Where the records of a segment lie that are not markers.
fn records(bytes: &[u8]) -> Vec<Range<usize>> {
    let (mut records, mut at) = (Vec::new(), SEGMENT_HEAD);
    while at + RECORD_HEAD <= bytes.len() && bytes[at..at + RECORD_HEAD].iter().any(|byte| *byte != 0) {
        let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
        let end = at + RECORD_HEAD + length;
        if bytes[at + RECORD_HEAD - 1] != 0 {
            records.push(at..end);
        }
        at = end;
    }
    records
}

/// Those that hold rows, or messages: more than a number or an acknowledgement.
fn large(bytes: &[u8]) -> Vec<Range<usize>> {
    records(bytes).into_iter().filter(|record| record.len() > 200).collect()
}

/// Changes the newest segment of a log that nobody has open.
fn edit_newest(log: &Path, edit: impl FnOnce(&mut Vec<u8>)) {
    let path = segments(log).pop().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    edit(&mut bytes);
    std::fs::write(&path, bytes).unwrap();
}

/// telegraf #16500: the disk buffer did not keep how far it had sent, and sent its whole write-ahead log again after every
/// restart.
#[tokio::test(flavor = "multi_thread")]
async fn telegraf_16500_a_restart_sends_nothing_again() {
    let Some(mut stage) = Stage::set().await else { return };
    let mut total = 0;
    for killed in [false, true, false] {
        send(&stage.broker, total..total + 500).await;
        total += 500;
        whole(&stage.cloud, &mut stage.edge, total as i64).await;
        if killed {
            stage.edge.kill();
        } else {
            stage.edge.stop();
        }
        stage.edge.run();
        stage.edge.wait().await;
        until(&mut stage.edge, "it knows its node", |status| status["uplink"]["node"].is_string()).await;
        stage.edge.drained().await;
        let [received, _, duplicate, _, _] = stage.cloud.check_rows().await;
        assert_eq!((received, duplicate), (total, 0), "rows that came to the door");
    }
}

/// telegraf #16314: after a while with an output that was away or slow, the disk buffer was stuck: the input answered with
/// nothing, the output sent nothing, and only emptying the buffer's directory helped, no restart.
#[tokio::test(flavor = "multi_thread")]
async fn telegraf_16314_what_was_full_goes_on_when_the_cloud_is_back() {
    let noise = noise(&mut seeded());
    let directory = tempfile::tempdir().unwrap();
    let cloud = cloud(directory.path()).await;
    let proxy = Proxy::to_cloud(&cloud).await;
    // The smallest journal and lane that there are.
    let config = format!(
        "timeout = \"2s\"\n{CUT}[journal]\nmax_bytes = \"4MiB\"\nsegment_bytes = \"2MiB\"\n\
         [[lane]]\nname = \"rest\"\nstreams = []\npriority = 9\nmax_bytes = \"32MiB\"\n\
         [[source]]\nkind = \"http\"\nname = \"push\"\nlisten = \"127.0.0.1:0\"\nmax_payload = \"512KiB\"\ntimeout = \"1s\"\n\
         stream = \"field\"\n[source.map]\ndevice = \"const:d\"\nn = \"/n\"\ntext = \"/text\"\n\
         [stream.field.fields]\nn = {{ type = \"int64\" }}\ntext = {{ type = \"text\" }}\n"
    );
    let mut edge = Edge::start_with(directory.path(), &[&proxy.http()], &config).await;
    let client = reqwest::Client::new();
    // What was taken; and what the door could not tell of, because it waited for room too long.
    let (mut next, mut taken, mut unknown) = (0, Vec::new(), Vec::new());
    let mut push = async |door: &str| {
        let status = push(&client, door, next, &noise).await;
        match status {
            StatusCode::OK => taken.push(next),
            StatusCode::SERVICE_UNAVAILABLE => unknown.push(next),
            _ => assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "what callers are told when it is full"),
        }
        next += 1;
        status == StatusCode::OK
    };
    let full = |status: &Value| status["problems"].to_string().contains("lane rest is full");
    // Away; and so slow that it takes all and its answers come when nobody waits for them any more.
    for link in [Link::Cut, Link::Held(Way::Down)] {
        proxy.set(link);
        for killed in [false, true] {
            if killed {
                edge.kill();
                edge.run();
            }
            let (at, started) = (door(&mut edge).await, Instant::now());
            // The journal alone is full for a moment now and then: it waits for a snapshot.
            while push(&at).await || !full(&edge.status().await) {
                assert!(started.elapsed() < PATIENCE, "{link:?}: it never fills: {:#}", edge.status().await);
            }
        }
        proxy.set(Link::Whole);
        // It takes messages again by itself.
        let (at, started) = (door(&mut edge).await, Instant::now());
        while !push(&at).await {
            assert!(started.elapsed() < PATIENCE, "{link:?}: it takes nothing any more: {:#}", edge.status().await);
            tokio::time::sleep(POLL).await;
        }
        let status = edge.drained().await;
        assert_eq!(status["problems"], serde_json::json!([]), "{link:?}");
    }
    let rows = cloud.sql("SELECT n FROM field ORDER BY n").await.unwrap();
    let found: Vec<_> = rows.iter().map(|row| row["n"].as_u64().unwrap()).collect();
    println!("{} taken, {} unknown, {} stored", taken.len(), unknown.len(), found.len());
    assert!(found.windows(2).all(|pair| pair[0] < pair[1]), "something is there twice");
    assert!(taken.iter().all(|n| found.binary_search(n).is_ok()), "what was taken is not there");
    assert!(found.iter().all(|n| taken.contains(n) || unknown.contains(n)), "what was refused is there");
}

/// Where the only source takes messages.
pub(crate) async fn door(edge: &mut Edge) -> String {
    let status = until(edge, "the door is open", |status| status["sources"][0]["address"].is_string()).await;
    format!("http://{}/ingest/push", status["sources"][0]["address"].as_str().unwrap())
}

/// Text of which the messages are made, so many pieces of it one after another that no batch has one twice: it cannot be
/// compressed well.
const PIECE_BYTES: usize = 400 << 10;
const PIECES: usize = 16;

pub(crate) fn noise(random: &mut StdRng) -> String {
    let mut noise = vec![0; PIECE_BYTES * PIECES];
    random.fill_bytes(&mut noise);
    noise.iter_mut().for_each(|byte| *byte = b'0' + (*byte & 31));
    String::from_utf8(noise).unwrap()
}

pub(crate) async fn push(client: &reqwest::Client, door: &str, n: u64, noise: &str) -> StatusCode {
    let piece = n as usize % PIECES;
    let text = &noise[piece * PIECE_BYTES..][..PIECE_BYTES];
    client.post(door).body(format!("{{\"n\":{n},\"text\":\"{text}\"}}")).send().await.unwrap().status()
}

/// telegraf #18528: a corrupt write-ahead log made the program panic at every start, with all its other inputs and outputs.
#[tokio::test(flavor = "multi_thread")]
async fn telegraf_18528_a_damaged_spool_costs_what_is_damaged_and_no_more() {
    let Some(mut stage) = Stage::set().await else { return };
    stage.cloud.stop();
    stage.spool(&[0..100, 100..200, 200..300, 300..400]).await;
    stage.edge.kill();
    edit_newest(&lane(&stage.data(), "rest"), |bytes| {
        let groups = large(bytes);
        let middle = groups[groups.len() / 2].clone();
        bytes[(middle.start + middle.end) / 2] ^= 0x10;
    });
    stage.edge.run();
    stage.cloud_is_back().await;
    stage.edge.wait().await;
    send(&stage.broker, 400..500).await;
    let status = until(&mut stage.edge, "all is sent", |status| status["drained"] == true).await;
    let found = stage.numbers().await;
    let lost: Vec<_> = (0..500).filter(|n| found.binary_search(n).is_err()).collect();
    println!("{} lost: {:#}", lost.len(), status["incidents"]);
    assert!(!lost.is_empty(), "nothing was damaged: nothing was tried");
    assert_eq!(found.len() + lost.len(), 500, "something is there twice");
    assert_eq!(lost[lost.len() - 1] - lost[0] + 1, lost.len() as u64, "more than one group is lost");
    assert!(lost.len() <= 200, "more is lost than was damaged");
    assert!(!status["incidents"].as_array().unwrap().is_empty(), "and nobody is told");
}

/// vector #16231: after network errors and a restart the buffer found its last record behind the position that it had
/// noted, waited there for ever, and not even its HTTP server came up.
#[tokio::test(flavor = "multi_thread")]
async fn vector_16231_a_log_that_ends_before_what_was_noted_is_told_and_goes_on() {
    log_ends_early(false).await;
}

/// The same after a clean stop, whose snapshot stands at the end of the journal.
#[tokio::test(flavor = "multi_thread")]
async fn vector_16231_a_journal_that_ends_before_its_snapshot_is_told_and_goes_on() {
    log_ends_early(true).await;
}

async fn log_ends_early(stopped: bool) {
    let mut random = seeded();
    let Some(mut stage) = Stage::set().await else { return };
    let proxy = Proxy::to_cloud(&stage.cloud).await;
    stage.edge.stop();
    let mut edge = Edge::start_with(stage.directory.path(), &[&proxy.http()], &config(&stage.broker)).await;
    proxy.harm(Harm::CutAnswers, &mut random);
    send(&stage.broker, 0..1_000).await;
    until(&mut edge, "something is committed", |status| status["rows"]["committed"].as_u64() > Some(0)).await;
    proxy.heal();
    proxy.set(Link::Cut);
    send(&stage.broker, 1_000..1_200).await;
    until(&mut edge, "all is in the spool", |status| {
        status["sources"][0]["journalled"] == 1_200 && status["journal"]["lag_bytes"] == 0 && spooled(status) >= 200
    })
    .await;
    if stopped {
        edge.stop();
    } else {
        edge.kill();
    }
    // The disk lied: the last records of every log are not there.
    let (journal, lanes) = logs(&stage.data());
    for log in lanes.iter().chain([&journal]) {
        edit_newest(log, |bytes| {
            if let Some(last) = records(bytes).pop() {
                bytes[last.start..].fill(0);
            }
        });
    }
    edge.run();
    proxy.cut();
    edge.wait().await;
    send(&stage.broker, 1_200..1_300).await;
    let started = Instant::now();
    let newest = "SELECT count(*) FROM field WHERE n >= 1200";
    while stage.cloud.integer(newest).await < 100 {
        assert!(started.elapsed() < PATIENCE, "what is new does not arrive: {:#}", edge.status().await);
        tokio::time::sleep(POLL).await;
    }
    // Counters of messages that the journal has lost are lost with them.
    until(&mut edge, "all is sent", |status| status["drained"] == true).await;
    let found = stage.numbers().await;
    assert!(found.windows(2).all(|pair| pair[0] < pair[1]), "something is there twice");
    println!("{} of 1300 are there", found.len());
    // Of each log one record is lost, and the spool's last is of the 200 that came behind the cut.
    assert!(found.len() >= 1_100, "more is lost than the disk has lost");
}

/// vector #17644: after a reset of the host a buffer with a damaged place sent the program into a loop that used a whole
/// core, and did not end when it was told to.
#[tokio::test(flavor = "multi_thread")]
async fn vector_17644_damage_in_every_log_neither_spins_nor_hinders_a_stop() {
    let Some(mut stage) = Stage::set().await else { return };
    stage.cloud.stop();
    stage.spool(&[0..200, 200..400, 400..600]).await;
    stage.edge.kill();
    let (journal, lanes) = logs(&stage.data());
    for log in lanes.iter().chain([&journal]) {
        edit_newest(log, |bytes| {
            let records = if log.ends_with("journal") { records(bytes) } else { large(bytes) };
            if let Some(record) = records.get(records.len() / 2) {
                bytes[record.clone()].fill(0);
            }
        });
    }
    stage.edge.run();
    stage.edge.wait().await;
    let before = stage.edge.cpu_seconds();
    // A while in which nothing is due: the measurement is of this while.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let used = stage.edge.cpu_seconds() - before;
    println!("{used} CPU-seconds in 2 s");
    // A loop without a wait would use one of these seconds at the least.
    assert!(used < 0.2, "it spins: {used} CPU-seconds");
    let started = Instant::now();
    stage.edge.stop();
    assert!(started.elapsed() < SOON, "it stops after {:?}", started.elapsed());
    stage.cloud_is_back().await;
    stage.edge.run();
    stage.edge.wait().await;
    send(&stage.broker, 600..700).await;
    until(&mut stage.edge, "all is sent", |status| status["drained"] == true).await;
    let found = stage.numbers().await;
    assert!(found.windows(2).all(|pair| pair[0] < pair[1]), "something is there twice");
    assert!((600..700).all(|n| found.binary_search(&n).is_ok()), "what came afterwards is there");
    println!("{} of 700 are there", found.len());
    assert!(found.len() >= 300, "more is lost than was damaged");
}

/// vector #25570: a crash between the deletion of a buffer file that was sent and the note of it made every later start
/// fail, because the reader was to begin in a file that was gone.
#[tokio::test(flavor = "multi_thread")]
async fn vector_25570_a_kill_while_segments_are_freed_is_recovered() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"300ms\"\n").await;
    // Segments as small as they can be, so that they go all the time.
    let small = "[journal]\nmax_bytes = \"4MiB\"\nsegment_bytes = \"200KiB\"\n";
    let source = crate::load::stream_of(&broker.url(), "load/+", "max_payload = \"4KiB\"\n");
    let mut edge = Edge::start(directory.path(), &cloud, &format!("{small}{source}")).await;
    let load = Load::start(broker.port);
    let journal = directory.path().join("edge").join("journal");
    for _ in 0..8 {
        let (oldest, started) = (segments(&journal)[0].clone(), Instant::now());
        while oldest.exists() {
            edge.check(started, "no segment is freed");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_micros(random.random_range(0..3_000))).await;
        edge.kill();
        edge.run();
        edge.wait().await;
    }
    check(&cloud, &mut edge, &*load.finish().await, Broker::Kept).await;
}

/// vector #26198: readings that were valid one by one were all dropped, and acknowledged, because together they were more
/// than a record of the buffer may hold.
#[tokio::test(flavor = "multi_thread")]
async fn vector_26198_messages_with_as_many_readings_as_a_batch_holds_are_kept_whole() {
    // A message is never split by a cut: one more than this is told and kept in quarantine, as a whole.
    const MOST: u64 = 65_536;
    let directory = tempfile::tempdir().unwrap();
    let Some(broker) = Mosquitto::start(directory.path()) else { return };
    let cloud = cloud(directory.path()).await;
    let more = "max_payload = \"4MiB\"\nreadings = \"/all\"";
    let mut edge = Edge::start(directory.path(), &cloud, &stream(&broker.url(), more)).await;
    let (mut messages, mut first) = (Vec::new(), 0);
    for count in [5, MOST, 40_000, MOST, 40_000, 5] {
        let numbers: Vec<_> = (first..first + count).map(|n| format!("{{\"n\":{n}}}")).collect();
        messages.push(("field/d".to_owned(), format!("{{\"all\":[{}]}}", numbers.join(",")).into_bytes()));
        first += count;
    }
    let too_many = format!("{{\"all\":[{}]}}", vec!["{\"n\":7}"; MOST as usize + 1].join(","));
    messages.push(("field/d".to_owned(), too_many.clone().into_bytes()));
    let mut options = broker.client("p");
    options.set_max_packet_size(Some(16 << 20));
    publish(options, messages).await;
    whole(&cloud, &mut edge, first as i64).await;
    assert_eq!(edge.status().await["quarantined"], serde_json::json!({ "too_many": 1 }));
    let kept = cloud.sql("SELECT * FROM quarantine").await.unwrap();
    assert_eq!((kept.len(), &kept[0]["reason"]), (1, &serde_json::json!("too_many")));
    let hex = kept[0]["payload"].as_str().unwrap();
    assert_eq!(hex.trim_start_matches("\\x").len(), too_many.len() * 2, "all of it is kept");
}

/// vector #18336: a record of which only the beginning had reached the file before a kill stopped the output for good,
/// while the input went on taking.
#[tokio::test(flavor = "multi_thread")]
async fn vector_18336_half_a_record_at_the_end_stops_nothing() {
    half_a_record_of_the_truth().await;
    let Some(mut stage) = Stage::set().await else { return };
    stage.cloud.stop();
    stage.spool(&[0..100, 100..200]).await;
    stage.edge.kill();
    let (journal, lanes) = logs(&stage.data());
    for log in lanes.iter().chain([&journal]) {
        edit_newest(log, |bytes| {
            // The head of a record like the last one, which says that 1,024 bytes follow, and none of them.
            let Some(last) = records(bytes).pop() else { return };
            let mut head = bytes[last.start..last.start + RECORD_HEAD].to_vec();
            head[4..8].copy_from_slice(&1_024_u32.to_le_bytes());
            bytes[last.end..last.end + RECORD_HEAD].copy_from_slice(&head);
            bytes[last.end + RECORD_HEAD..].fill(0);
        });
    }
    stage.edge.run();
    stage.cloud_is_back().await;
    stage.edge.wait().await;
    send(&stage.broker, 200..300).await;
    whole(&stage.cloud, &mut stage.edge, 300).await;
}

/// The record that truly came next, cut off behind each of its bytes.
async fn half_a_record_of_the_truth() {
    /// Of the lane's record; of the journal's, which holds one message, each.
    const CUTS: usize = 12;
    let mut random = seeded();
    let Some(mut stage) = Stage::set().await else { return };
    stage.cloud.stop();
    stage.spool(std::slice::from_ref(&(0..100))).await;
    stage.edge.kill();
    let (data, before) = (stage.data(), stage.directory.path().join("before"));
    let copy = |from: &Path, to: &Path| {
        std::fs::remove_dir_all(to).ok();
        assert!(std::process::Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
    };
    copy(&data, &before);
    let (journal, _) = logs(&data);
    let log = lane(&data, "rest");
    let written = |log: &Path| std::fs::read(segments(log).pop().unwrap()).unwrap();
    let (journal_before, lane_before) = (records(&written(&journal)).len(), large(&written(&log)).len());
    stage.edge.run();
    stage.edge.wait().await;
    stage.spool(std::slice::from_ref(&(100..200))).await;
    stage.edge.kill();
    let (journal_after, lane_after) = (written(&journal), written(&log));
    let journal_next = records(&journal_after)[journal_before..].to_vec();
    // A crash while the journal writes: nothing of the spool is newer.
    let messages =
        journal_next.iter().find(|record| journal_after[(*record).clone()].windows(4).any(|at| at == b"\"n\":"));
    let message = messages.expect("messages came").clone();
    let mut cuts = (0..CUTS).map(|_| (journal.clone(), random.random_range(message.clone()))).collect::<Vec<_>>();
    let batch = large(&lane_after)[lane_before].clone();
    cuts.extend((0..CUTS).map(|_| (log.clone(), random.random_range(batch.clone()))));
    let after = stage.directory.path().join("after");
    copy(&data, &after);
    for (log, cut) in cuts {
        let of_journal = log == journal;
        copy(if of_journal { &before } else { &after }, &data);
        let path = segments(&log).pop().unwrap();
        let whole = if of_journal { &journal_after } else { &lane_after };
        let mut torn = whole.clone();
        torn[cut..].fill(0);
        std::fs::write(path, torn).unwrap();
        stage.edge.run();
        // What was not in the journal was not acknowledged; what was is in the lane, or gets there again.
        let there = if of_journal { 100 } else { 200 };
        let all = |status: &Value| spooled(status) >= there && status["journal"]["lag_bytes"] == 0;
        let status = until(&mut stage.edge, "what was there is in the spool", all).await;
        assert_eq!(status["incidents"], serde_json::json!([]), "cut at {cut} of {log:?}");
        assert!(of_journal || spooled(&status) == 200, "cut at {cut} of {log:?}: {status:#}");
        stage.edge.kill();
    }
}

/// nanomq #2432: cached messages were deleted before they were sent, so those on their way were lost when the link died
/// during the resending without a FIN or RST.
#[tokio::test(flavor = "multi_thread")]
async fn nanomq_2432_a_link_that_dies_silently_while_a_backlog_is_sent_loses_nothing() {
    const BACKLOG: u64 = 1_000;
    let Some(mut stage) = Stage::set().await else { return };
    stage.edge.stop();
    let proxy = Proxy::to_cloud(&stage.cloud).await;
    // Small requests, so that the backlog takes many.
    let config = format!("timeout = \"2s\"\nrequest_bytes = \"1KiB\"\n{}", config(&stage.broker));
    stage.edge = Edge::start_with(stage.directory.path(), &[&proxy.http()], &config).await;
    proxy.set(Link::Cut);
    let groups: Vec<_> = (0..BACKLOG).step_by(100).map(|first| first..first + 100).collect();
    stage.spool(&groups).await;
    let (mut before, mut tried) = (0, 0);
    while before < BACKLOG as usize && tried < 3 {
        proxy.cut();
        let started = Instant::now();
        // Until some more of it is there, and by far not all.
        while stage.numbers().await.len() <= before {
            assert!(started.elapsed() < PATIENCE, "nothing arrives: {:#}", stage.edge.status().await["uplink"]);
        }
        proxy.set(Link::Lost(Way::Both));
        before = stage.numbers().await.len();
        println!("{before} of {BACKLOG} are there");
        tried += usize::from(before < BACKLOG as usize);
        let error = |status: &Value| status["uplink"]["last_error"].as_str().is_some_and(|text| text.contains("time"));
        until(&mut stage.edge, "the silence is noticed", |status| error(status) || spooled(status) == 0).await;
    }
    assert!(tried > 0, "all of it went at once: nothing was tried");
    proxy.cut();
    whole(&stage.cloud, &mut stage.edge, BACKLOG as i64).await;
}

/// nanomq #2423: what was cached while the link was down stayed there after it was back, until some new message came.
#[tokio::test(flavor = "multi_thread")]
async fn nanomq_2423_a_backlog_is_sent_when_the_cloud_is_back_though_nothing_new_comes() {
    let Some(mut stage) = Stage::set().await else { return };
    send(&stage.broker, 0..10).await;
    whole(&stage.cloud, &mut stage.edge, 10).await;
    stage.cloud.stop();
    stage.spool(std::slice::from_ref(&(10..20))).await;
    stage.cloud_is_back().await;
    let started = Instant::now();
    whole(&stage.cloud, &mut stage.edge, 20).await;
    println!("after {} ms", started.elapsed().as_millis());
    assert!(started.elapsed() < SOON, "after {:?}", started.elapsed());
}

/// mosquitto #769: what was published after a restart of the broker did not reach a client with a persistent session that
/// had not come back yet.
#[tokio::test(flavor = "multi_thread")]
async fn mosquitto_769_what_came_after_the_broker_restarted_and_before_the_agent_did_arrives() {
    let Some(mut stage) = Stage::set().await else { return };
    send(&stage.broker, 0..50).await;
    whole(&stage.cloud, &mut stage.edge, 50).await;
    for (first, killed) in [(50, false), (100, true)] {
        if killed {
            stage.edge.kill();
        } else {
            stage.edge.stop();
        }
        stage.broker.stop();
        stage.broker.run();
        send(&stage.broker, first..first + 50).await;
        stage.edge.run();
        stage.edge.wait().await;
        whole(&stage.cloud, &mut stage.edge, first as i64 + 50).await;
    }
}
