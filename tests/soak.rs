//! `weir bench soak`, for a short while: it checks itself.

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
