//! The demo, as a newcomer starts it: it compares what SQL answers with what its city published, and fails by itself.

use std::path::Path;
use std::process::Command;

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
    // Some of the usual ports may be taken already; one of them certainly is now.
    let _held = std::net::TcpListener::bind("127.0.0.1:7300");
    let directory = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["demo", "--seconds", "1", "--data-dir"])
        .arg(directory.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("--free-ports"), "{text}");
}
