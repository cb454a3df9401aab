//! Two edges of one spool: a data directory that was copied, and one that was restored from earlier.
//!
//! What either of them took is stored at least once. A number that is there twice is so because nobody could tell whether
//! it was there, and then all but one of its rows say `forked`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rand::rngs::StdRng;

use crate::harness::{Cloud, Edge, Mosquitto};
use crate::load::{Ledger, Load, a_moment, seeded, stream_of, value};
use crate::process::{PATIENCE, POLL};

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// How the edge ends before its directory is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Stopped,
    Killed,
}

/// What the edges share.
struct Stage {
    broker: Mosquitto,
    cloud: Cloud,
    ledger: Arc<Ledger>,
    directory: tempfile::TempDir,
}

/// The source of one of the edges: its own client and topic.
fn source(broker: &Mosquitto, name: &str) -> String {
    stream_of(&broker.url(), &format!("load/{name}"), &format!("client_id = \"{name}\"\n"))
}

impl Stage {
    /// Cloud and edge are down: of what the edge has, part is committed, part was never sent.
    async fn set(random: &mut StdRng, end: End) -> Option<(Self, Edge)> {
        let directory = tempfile::tempdir().unwrap();
        let broker = Mosquitto::start(directory.path())?;
        let mut cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"300ms\"\n").await;
        let mut edge = Edge::start(directory.path(), &cloud, &source(&broker, "first")).await;
        let ledger = Arc::<Ledger>::default();
        let load = Load::on(broker.port, "load/first", Arc::clone(&ledger));
        while cloud.counter("weir_cloud_commits_total").await == 0 {
            a_moment(random).await;
        }
        cloud.kill();
        a_moment(random).await;
        load.finish().await;
        let started = Instant::now();
        let taken = ledger.acknowledged().len() as u64;
        while edge.status().await["sources"][0]["journalled"].as_u64() < Some(taken) {
            assert!(started.elapsed() < PATIENCE, "not all is taken");
            tokio::time::sleep(POLL).await;
        }
        match end {
            End::Stopped => edge.stop(),
            End::Killed => edge.kill(),
        }
        Some((Self { broker, cloud, ledger, directory }, edge))
    }

    /// The data directory, and where a copy of it is run.
    fn paths(&self) -> (PathBuf, PathBuf) {
        (self.directory.path().join("edge"), self.directory.path().join("copy").join("edge"))
    }

    async fn cloud_is_back(&mut self) {
        self.cloud.run();
        self.cloud.wait().await;
    }

    /// The copy, with a client and a topic of its own.
    async fn start_copy(&self) -> Edge {
        Edge::start(&self.directory.path().join("copy"), &self.cloud, &source(&self.broker, "b")).await
    }

    fn load(&self, topic: &'static str) -> Load {
        Load::on(self.broker.port, topic, Arc::clone(&self.ledger))
    }

    async fn check(&self, edges: [&mut Edge; 2]) {
        let acknowledged = self.ledger.acknowledged();
        let started = Instant::now();
        while self.cloud.integer("SELECT count(DISTINCT n) FROM load").await < acknowledged.len() as i64 {
            assert!(started.elapsed() < PATIENCE, "not all arrives");
            tokio::time::sleep(POLL).await;
        }
        let mut forks = Vec::new();
        for edge in edges {
            let status = edge.drained().await;
            assert_eq!(status["quarantined"], serde_json::json!({}), "nothing good belongs in quarantine");
            forks.extend(incidents(&status));
        }
        println!("{forks:?}");
        assert!(!forks.is_empty(), "no incident says that the spool is forked");
        let mut stored = HashMap::<u64, Vec<bool>>::new();
        for row in self.cloud.sql("SELECT n, v, quality FROM load").await.unwrap() {
            let number = row["n"].as_u64().unwrap();
            assert_eq!(row["v"].as_f64().unwrap(), value(number), "value of {number}");
            stored.entry(number).or_default().push(row["quality"].as_str().unwrap().contains("forked"));
        }
        let missing: Vec<_> = acknowledged.iter().filter(|number| !stored.contains_key(number)).collect();
        assert!(missing.is_empty(), "{} acknowledged messages are missing: {missing:?}", missing.len());
        let sent = self.ledger.sent();
        assert!(stored.keys().all(|number| *number < sent), "a number that was never sent");
        let twice = stored.values().filter(|rows| rows.len() > 1).count();
        let hidden: Vec<_> =
            stored.iter().filter(|(_, rows)| rows.iter().filter(|forked| !**forked).count() > 1).collect();
        let flagged = stored.values().flatten().filter(|forked| **forked).count();
        println!("{} stored, {twice} of them twice, {flagged} rows flagged", stored.len());
        assert!(hidden.is_empty(), "{} of {twice} are there twice and none says so", hidden.len());
        // What came after the copy was made is known to be new.
        assert!(flagged < stored.len() / 2, "{flagged} of {} rows are flagged", stored.len());
        self.cloud.check_rows().await;
    }
}

fn incidents(status: &serde_json::Value) -> Vec<String> {
    let incidents = status["incidents"].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned());
    incidents.filter(|text| text.contains("is forked")).collect()
}

async fn forked(edges: &[&Edge]) {
    let started = Instant::now();
    loop {
        for edge in edges {
            if edge.try_status().await.is_some_and(|status| !incidents(&status).is_empty()) {
                return;
            }
        }
        assert!(started.elapsed() < PATIENCE, "the fork is not noticed");
        tokio::time::sleep(POLL).await;
    }
}

async fn side_by_side(end: End) {
    let mut random = seeded();
    let Some((mut stage, mut edge)) = Stage::set(&mut random, end).await else { return };
    let (data, copied) = stage.paths();
    copy(&data, &copied);
    edge.configure(&source(&stage.broker, "a"));
    edge.run();
    // What the broker still holds for the first client goes to the original.
    edge.wait().await;
    let mut other = stage.start_copy().await;
    let loads = [stage.load("load/a"), stage.load("load/b")];
    stage.cloud_is_back().await;
    forked(&[&edge, &other]).await;
    for _ in 0..8 {
        a_moment(&mut random).await;
    }
    for load in loads {
        load.finish().await;
    }
    stage.check([&mut edge, &mut other]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copied_data_directory_beside_its_original_loses_nothing() {
    side_by_side(End::Stopped).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_copied_after_a_crash_beside_its_original_loses_nothing() {
    side_by_side(End::Killed).await;
}

/// The copy goes on after the original has sent and freed all that both have.
async fn restored(end: End) {
    let mut random = seeded();
    let Some((mut stage, mut edge)) = Stage::set(&mut random, end).await else { return };
    let (data, copied) = stage.paths();
    copy(&data, &copied);
    stage.cloud_is_back().await;
    edge.configure(&source(&stage.broker, "a"));
    edge.run();
    edge.wait().await;
    let load = stage.load("load/a");
    for _ in 0..4 {
        a_moment(&mut random).await;
    }
    load.finish().await;
    edge.drained().await;
    edge.stop();
    let mut old = stage.start_copy().await;
    let load = stage.load("load/b");
    forked(&[&old]).await;
    for _ in 0..8 {
        a_moment(&mut random).await;
    }
    load.finish().await;
    // And the one that was replaced comes back, to a spool that has ended.
    edge.run();
    edge.wait().await;
    stage.check([&mut edge, &mut old]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_restored_from_earlier_loses_nothing() {
    restored(End::Stopped).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_restored_from_a_crash_loses_nothing() {
    restored(End::Killed).await;
}
