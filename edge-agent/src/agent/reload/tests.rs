use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use arrow_array::cast::AsArray;
use arrow_array::types::{Int64Type, TimestampMicrosecondType};
use segment_log::Disk;
use wire::{SpoolId, StreamSchema};

use super::super::{AgentHandle, Status, spool_directory, spool_settings, start};
use super::*;
use crate::spool::Spool;

/// Event time of message `n` is so many ms after the first.
const STEP_MS: u64 = 100;
const FIRST_MS: u64 = 1_700_000_000_000;

/// The file that the agent has at its `n`th reload.
fn file(directory: &Path, n: usize) -> String {
    let has = |has: bool, text: &str| if has { text.to_owned() } else { String::new() };
    let http = |name: &str| {
        format!(
            "[[source]]\nkind = \"http\"\nname = \"{name}\"\nlisten = \"127.0.0.1:0\"\nstream = \"s\"\n[source.map]\n\
             device = \"const:d\"\nts = {{ at = \"/ts\", format = \"epoch_ms\" }}\nv = \"/v\"\n"
        )
    };
    let lines = format!(
        "[[source]]\nkind = \"file\"\nname = \"lines\"\npath = {:?}\npoll = \"50ms\"\nstream = \"t\"\n[source.map]\n\
         device = \"const:d\"\nv = \"/v\"\n",
        directory.join("lines")
    );
    format!(
        "[edge]\nid = \"e\"\ndata_dir = {:?}\n[admin]\nlisten = \"127.0.0.1:0\"\n[cloud]\nurls = [\"http://127.0.0.1:9\"]\n\
         token = \"t\"\n[clock]\ntrust = \"always\"\n{}{}{}[stream.t.fields]\nv = {{ type = \"int64\" }}\n[stream.s]\nlateness = \"0s\"\n[stream.s.fields]\n\
         v = {{ type = \"int64\", max = {} }}\n[stream.s.window.1s]\nsize = \"1s\"\n{}",
        directory.join("data"),
        http("in"),
        has(n % 3 == 1, &http("other")),
        has(n.is_multiple_of(2), &lines),
        1_000_000 + n,
        has(n % 4 > 1, "[stream.s.window.2s]\nsize = \"2s\"\n"),
    )
}

pub(in crate::agent) async fn until(handle: &AgentHandle, what: &str, is: impl Fn(&Status) -> bool) -> Status {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        let status = handle.status();
        if is(&status) {
            return status;
        }
        assert!(tokio::time::Instant::now() < deadline, "{what}: {status:#?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn begin(directory: &Path, text: &str, token: &CancellationToken) -> AgentHandle {
    // Another test may have done it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let path = directory.join("edge.toml");
    std::fs::write(&path, text).unwrap();
    start(Settings::load(&path).unwrap(), token.clone()).await.unwrap()
}

/// Posts messages and writes lines until it is told to stop; returns how many.
async fn publish(url: String, lines: std::path::PathBuf, stop: Arc<AtomicBool>) -> u64 {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let mut file = std::fs::File::create(lines).unwrap();
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) {
        // Each seventh is at most what a later file allows.
        let v = if n % 7 == 6 { 1_000_010 } else { n };
        let body = format!("{{\"ts\":{},\"v\":{v}}}", FIRST_MS + n * STEP_MS);
        let answer = client.post(&url).body(body).send().await.unwrap();
        assert_eq!(answer.status(), 200, "message {n}");
        writeln!(file, "{{\"v\":{n}}}").unwrap();
        n += 1;
    }
    n
}

/// `(ts in ms, the int64 of this column)` of each row of a stream, in order.
fn rows(spool: &mut Spool<Disk>, stream: &str, column: &str) -> Vec<(u64, i64)> {
    let stream = stream.parse().unwrap();
    let mut rows = Vec::new();
    loop {
        let lane = spool.waiting().into_iter().find(|(_, waiting)| **waiting == stream).map(|(lane, _)| lane);
        let Some(lane) = lane else { break };
        for batch in spool.number(lane, &stream, usize::MAX).unwrap() {
            let schema = StreamSchema::parse(spool.schema(batch.header().schema).unwrap()).unwrap();
            let batch = batch.decode(&schema).unwrap();
            let ts = batch.column_by_name("ts").unwrap().as_primitive::<TimestampMicrosecondType>().clone();
            let values = batch.column_by_name(column).unwrap().as_primitive::<Int64Type>();
            rows.extend(ts.values().iter().zip(values.values()).map(|(ts, value)| (*ts as u64 / 1_000, *value)));
        }
    }
    rows.sort_unstable();
    rows
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_reloads_under_load_lose_nothing_and_repeat_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (path, token) = (directory.path(), CancellationToken::new());
    let handle = begin(path, &file(path, 0), &token).await;
    let status = until(&handle, "the door", |status| status.sources.iter().any(|s| s.address.is_some())).await;
    let url = format!("http://{}/ingest/in", status.sources[0].address.unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let publisher = tokio::spawn(publish(url, path.join("lines"), Arc::clone(&stop)));
    for n in 1..=20 {
        let before = handle.status().sources[0].received;
        until(&handle, "messages", |status| status.sources[0].received >= before + 40).await;
        if n % 4 == 3 {
            std::fs::write(path.join("edge.toml"), file(path, n).replace("[stream.s.fields]", "[stream.s.feilds]"))
                .unwrap();
            let refused = handle.status().configuration.refused;
            handle.reload().notify_one();
            let status = until(&handle, "refused", |status| status.configuration.refused > refused).await;
            let error = status.configuration.last_error.unwrap();
            assert!(error.contains("feilds") && error.contains("fields"), "{error}");
            assert_eq!(status.configuration.reloads as usize, n - 1);
        }
        std::fs::write(path.join("edge.toml"), file(path, n)).unwrap();
        let version = Settings::parse(&file(path, n)).unwrap().version;
        handle.reload().notify_one();
        let sources = 1 + usize::from(n % 3 == 1) + usize::from(n % 2 == 0);
        let taken = |status: &Status| {
            let configuration = &status.configuration;
            let file = configuration.reloads as usize == n && configuration.last_error.is_none();
            // The engine shows the pipeline and the sources as soon as it has them, each in its turn.
            file && configuration.version == version && status.sources.len() == sources
        };
        until(&handle, "taken over", taken).await;
    }
    stop.store(true, Ordering::Relaxed);
    let posted = publisher.await.unwrap();
    let read = |name: &str, status: &Status| {
        status.sources.iter().find(|source| source.name == name).map_or(0, |source| source.totals.read)
    };
    let status = until(&handle, "all", |s| read("in", s) == posted && read("lines", s) == posted).await;
    assert_eq!(status.sources[0].connects, 0);
    token.cancel();
    handle.stopped().await.unwrap();

    let last = Settings::parse(&file(path, 20)).unwrap();
    let data = path.join("data");
    let (mut spool, _) = Spool::open(&Disk, &spool_directory(&data), spool_settings(&last), SpoolId([0; 16])).unwrap();
    let taken = rows(&mut spool, "s", "v");
    let quarantined = status.quarantined["above_max"];
    // A file allows the larger ones from the tenth on: before, each is in quarantine, behind, each is a row.
    assert_eq!(taken.len() as u64 + quarantined, posted);
    let times = taken.iter().map(|(ts, _)| *ts).collect::<Vec<_>>();
    let wanted = (0..posted).filter(|n| n % 7 != 6 || n / 7 >= quarantined).map(|n| FIRST_MS + n * STEP_MS);
    assert_eq!(times, wanted.collect::<Vec<_>>());
    assert!(quarantined > 0 && quarantined < posted / 7, "{quarantined} of {posted}");
    let lines =
        rows(&mut spool, "t", "v").into_iter().map(|(_, v)| v as u64).collect::<std::collections::BTreeSet<_>>();
    assert_eq!((lines.len() as u64, lines.last().copied()), (posted, Some(posted - 1)));
    // The window that was there all the time, computed again.
    let mut windows = BTreeMap::<u64, i64>::new();
    times.iter().for_each(|ts| *windows.entry(ts / 1_000 * 1_000).or_default() += 1);
    windows.pop_last();
    assert_eq!(rows(&mut spool, "s_1s", "count"), windows.into_iter().collect::<Vec<_>>());
    // The one that came and went: no window twice, and none with more than there was.
    let two = rows(&mut spool, "s_2s", "count");
    assert!(two.windows(2).all(|pair| pair[0].0 < pair[1].0) && two.len() > 10, "{two:?}");
    assert!(two.iter().all(|(_, count)| *count <= 20) && two.iter().filter(|(_, count)| *count >= 17).count() > 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_taken_over_when_it_has_changed_and_not_what_needs_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let (path, token) = (directory.path(), CancellationToken::new());
    let handle = begin(path, &file(path, 0), &token).await;
    std::fs::write(path.join("edge.toml"), file(path, 1)).unwrap();
    until(&handle, "taken over", |status| status.configuration.reloads == 1).await;
    let next = file(path, 2).replace("id = \"e\"", "id = \"f\"") + "[journal]\ngroup_wait = \"9ms\"\n";
    std::fs::write(path.join("edge.toml"), next).unwrap();
    handle.reload().notify_one();
    let status = until(&handle, "refused", |status| status.configuration.refused == 1).await;
    let error = status.configuration.last_error.unwrap();
    assert_eq!(error, "edge.id, journal: this cannot change while the agent runs; restart it");
    token.cancel();
    handle.stopped().await.unwrap();
}
