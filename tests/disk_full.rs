//! A disk that is full under the whole agent, with each policy of its lanes: one that refuses says so and waits, one that drops
//! goes on, nothing that was acknowledged is lost without a word, and all is as before when there is room.
//!
//! The disk is a small one in memory, which only root can make; elsewhere this is left out, and says so.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use reqwest::StatusCode;

use crate::harness::Edge;
use crate::known_failures::{door, noise, push};
use crate::load::seeded;
use crate::process::{PATIENCE, POLL};
use crate::sources::cloud;

/// A disk of so many MiB; None, and a word about it, when it cannot be made.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: &Path, mib: u64) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let size = format!("size={mib}m");
        let made = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "weir-test"]).arg(at).output();
        if !made.is_ok_and(|made| made.status.success()) {
            println!("left out: a disk of {mib} MiB cannot be mounted here");
            return None;
        }
        Some(Self(at.to_owned()))
    }

    /// Takes all of the room that is left, but so many bytes.
    fn fill(&self, but: u64) {
        let space = Command::new("df").args(["--output=avail", "-B1"]).arg(&self.0).output().unwrap().stdout;
        let left: u64 = String::from_utf8(space).unwrap().lines().last().unwrap().trim().parse().unwrap();
        std::fs::write(self.0.join("ballast"), vec![1; left.saturating_sub(but) as usize]).unwrap();
    }

    fn free(&self) {
        std::fs::remove_file(self.0.join("ballast")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}

async fn fills(policy: &str) {
    let noise = noise(&mut seeded());
    let directory = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(&directory.path().join("edge"), 192) else { return };
    let mut cloud = cloud(directory.path()).await;
    let config = format!(
        "[cut]\nseal_max = \"100ms\"\nseal_away = \"100ms\"\n[journal]\nmax_bytes = \"16MiB\"\nsegment_bytes = \"2MiB\"\n\
         [[lane]]\nname = \"rest\"\nstreams = []\npriority = 9\nmax_bytes = \"96MiB\"\non_full = \"{policy}\"\n\
         [[source]]\nkind = \"http\"\nname = \"push\"\nlisten = \"127.0.0.1:0\"\nmax_payload = \"512KiB\"\ntimeout = \"1s\"\n\
         stream = \"field\"\n[source.map]\ndevice = \"const:d\"\nn = \"/n\"\ntext = \"/text\"\n\
         [stream.field.fields]\nn = {{ type = \"int64\" }}\ntext = {{ type = \"text\" }}\n"
    );
    let mut edge = Edge::start(directory.path(), &cloud, &config).await;
    let client = reqwest::Client::new();
    let (mut next, mut taken, mut unknown) = (0_u64, Vec::new(), 0_u64);
    let mut give = async |door: &str| {
        let status = push(&client, door, next, &noise).await;
        match status {
            StatusCode::OK => taken.push(next),
            StatusCode::SERVICE_UNAVAILABLE => unknown += 1,
            _ => assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "{policy}"),
        }
        next += 1;
        status == StatusCode::OK
    };
    cloud.stop();
    let mut at = door(&mut edge).await;
    for _ in 0..20 {
        assert!(give(&at).await, "{policy}: there is room");
    }
    disk.fill(3 << 20);
    let started = Instant::now();
    if policy == "refuse" {
        // Until it takes nothing, for longer than one look.
        let mut refused = 0;
        while refused < 20 {
            refused = if give(&at).await { 0 } else { refused + 1 };
            edge.check(started, &format!("it never fills: {:#}", edge.status().await));
            tokio::time::sleep(POLL).await;
        }
        let status = edge.status().await;
        println!("{} taken, then {}", status["sources"][0]["journalled"], status["problems"]);
        assert_ne!(status["problems"], serde_json::json!([]), "nobody is told");
    } else {
        // What is new is taken, and what is old goes, though nothing on the disk gives way.
        let mut lost = 0;
        while lost == 0 {
            give(&at).await;
            edge.check(started, &format!("{policy}: nothing is dropped: {:#}", edge.status().await));
            lost = edge.status().await["rows"]["lost"].as_u64().unwrap();
        }
    }
    // A kill while it is full, too.
    edge.kill();
    edge.run();
    at = door(&mut edge).await;
    // Perhaps the start found room for one.
    while !give(&at).await && policy != "refuse" {
        edge.check(started, &format!("{policy}: it takes nothing after a kill: {:#}", edge.status().await));
        tokio::time::sleep(POLL).await;
    }

    disk.free();
    let started = Instant::now();
    let mut again = 0;
    while again < 10 {
        again += u64::from(give(&at).await);
        assert!(started.elapsed() < PATIENCE, "{policy}: it does not go on: {:#}", edge.status().await);
        tokio::time::sleep(POLL).await;
    }
    cloud.run();
    cloud.wait().await;
    let status = edge.drained().await;
    assert_eq!(status["problems"], serde_json::json!([]), "{policy}");
    let found = cloud.sql("SELECT n FROM field ORDER BY n").await.unwrap();
    let found = found.iter().map(|row| row["n"].as_u64().unwrap()).collect::<Vec<_>>();
    let lost = match cloud.sql("SELECT coalesce(sum(rows), 0) AS n FROM losses WHERE stream = 'field'").await {
        Ok(rows) => rows[0]["n"].as_u64().unwrap(),
        // It has never lost anything.
        Err(_) => 0,
    };
    println!("{policy}: {} taken, {unknown} unknown, {} stored, {lost} in losses", taken.len(), found.len());
    assert!(found.windows(2).all(|pair| pair[0] < pair[1]), "{policy}: something is there twice");
    let missing = taken.iter().filter(|n| found.binary_search(n).is_err()).count() as u64;
    assert!(missing <= lost && lost <= missing + unknown, "{policy}: {missing} are missing, {lost} are told");
    match policy {
        "refuse" => assert_eq!((missing, lost), (0, 0), "what was taken is not there"),
        _ => assert!(missing > 0 && found.last() == taken.last(), "{policy}: the newest is not there"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told_and_left_by_itself_with_each_policy() {
    for policy in ["refuse", "drop_oldest", "thin"] {
        fills(policy).await;
    }
}
