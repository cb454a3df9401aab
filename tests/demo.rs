//! The demo, as a newcomer starts it: it compares what SQL answers with what its city published, and fails by itself.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::harness::Mosquitto;
use crate::process::{PATIENCE, POLL};

fn run(data_dir: &Path) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["demo", "--seconds", "4", "--sensors", "100", "--free-ports", "--data-dir"])
        .arg(data_dir)
        .output()
        .unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}");
    text
}

/// The readings that SQL counted.
fn readings(text: &str) -> u64 {
    let line = text.lines().find(|line| line.starts_with("readings in `traffic`")).expect(text);
    line.split_whitespace().last().unwrap().parse().unwrap()
}

#[test]
fn a_second_start_goes_on_from_the_same_data() {
    let directory = tempfile::tempdir().unwrap();
    let first = run(&directory.path().join("data"));
    assert!(readings(&first) > 0);
    assert!(first.contains("psql -h 127.0.0.1"), "{first}");
    let second = run(&directory.path().join("data"));
    assert!(readings(&second) > readings(&first), "{second}");
}

#[test]
fn a_port_that_is_taken_is_named() {
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    // Those above it may be taken, too: it is the first that is tried.
    let port = held.local_addr().unwrap().port().min(65_525);
    let directory = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["demo", "--seconds", "1", "--first-port", &port.to_string(), "--data-dir"])
        .arg(directory.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{text}");
    assert!(text.contains(&format!("port {port} for HTTP")) && text.contains("--free-ports"), "{text}");
}

/// A broker that ends takes the city with it; the agent and the cloud still stop as they should.
#[test]
fn a_run_that_fails_stops_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let Some(mut broker) = Mosquitto::start(directory.path()) else { return };
    let data = directory.path().join("data");
    let mut demo = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["demo", "--sensors", "500", "--free-ports", "--url", &broker.url(), "--data-dir"])
        .arg(&data)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines();
    let line = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("/v1/sql"))).unwrap().unwrap();
    let url = line.split_whitespace().find(|word| word.starts_with("http")).unwrap().trim_end_matches("/v1/sql");
    let started = Instant::now();
    // Rows are there, and none of them is old enough to be committed.
    while !has_rows(url) {
        assert!(started.elapsed() < PATIENCE, "no rows");
        std::thread::sleep(POLL);
    }
    broker.kill();
    let output = demo.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("MQTT"), "{text}");
    let log = data.join("cloud/tables/traffic/_delta_log");
    let commits = std::fs::read_dir(&log).unwrap_or_else(|error| panic!("{}: {error}", log.display())).count();
    assert!(commits > 1, "what was hot is committed by a cloud that stops: {commits}");
}

fn has_rows(url: &str) -> bool {
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["sql", "--url", url, "--format", "csv", "SELECT count(*) AS n FROM traffic"])
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).lines().nth(1).is_some_and(|count| count != "0")
}
