//! `weir bench soak` and `weir bench views`, for a short while: they check themselves.

use std::process::Command;

#[test]
fn everything_at_once_stays_exact() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("soak");
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["bench", "soak", "--seconds", "20", "--rate", "3000", "--data-dir", data.to_str().unwrap()])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    println!("{:#}", report["result"]);
    assert!(report["result"]["checks"].as_u64().unwrap() >= 3, "{report:#}");
}

/// `weir bench views`, at a small size: it checks that views equal their questions.
#[test]
fn what_views_cost_is_measured() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("views");
    let size = ["--rate", "2000", "--seconds", "1", "--views", "3", "--history", "16000"];
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["bench", "views", "--data-dir", data.to_str().unwrap()])
        .args(size)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    println!("{:#}", report["result"]);
    let steady = report["result"]["steady"].as_array().unwrap();
    assert_eq!(steady.iter().map(|run| run["views"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 3]);
    assert!(steady.iter().all(|run| run["rows"] == 2_000 && run["rerun_cpu_s"].is_number()), "{report:#}");
}
