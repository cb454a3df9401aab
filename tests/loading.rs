//! `weir load`: files into a stream, each once, also when a run is killed in the middle.

use std::fmt::Write;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, Float64Array, Int32Array, RecordBatch, StringArray, TimestampMillisecondArray};
use parquet::arrow::ArrowWriter;
use rand::Rng;

use crate::harness::{Cloud, EDGE, TOKEN};
use crate::load::seeded;
use crate::process::PATIENCE;

const QUICK: &str = "[commit]\nmax_age = \"300ms\"\n";
/// 2024-01-01T00:00:00Z
const START_S: i64 = 1_704_067_200;

fn command(cloud: &Cloud, file: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
    command.arg("load").arg(file).args(["--url", &cloud.http, "--edge", EDGE]).args(more).env("WEIR_TOKEN", TOKEN);
    command
}

/// What it says when all went well.
fn load(cloud: &Cloud, file: &Path, more: &[&str]) -> String {
    let Output { status, stdout, stderr } = command(cloud, file, more).output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

/// What it says when it does not go.
fn refused(cloud: &Cloud, file: &Path, more: &[&str], expected: &str) {
    let output = command(cloud, file, more).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains(expected), "{text}");
}

fn write(directory: &Path, name: &str, text: &str) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_each_kind_are_loaded_once() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(directory.path(), "a", QUICK).await;
    let csv = write(
        directory.path(),
        "a.csv",
        "TIMESTAMP,REPORT_ID,avgSpeed,count,code,note\n2024-01-01T00:00:00,7,56.5,3,007,\n2024-07-01 02:00:00,7,60,4,008,\"a, b\"\nnever,8,1,1,009,x\n1999-01-01T00:00:00,8,1,1,010,\n2024-01-01T00:00:00,9,2\n",
    );
    let map = [
        "--stream",
        "speeds",
        "--map",
        "ts=TIMESTAMP",
        "--map",
        "device=REPORT_ID",
        "--map",
        "avg_speed=avgSpeed",
        "--zone",
        "Europe/Copenhagen",
    ];
    let said = load(&cloud, &csv, &map);
    assert!(said.contains("5 rows loaded into speeds, 3 of them in quarantine"), "{said}");
    let said = load(&cloud, &csv, &map);
    assert!(said.contains("nothing to do, its 5 rows are there already"), "{said}");
    let rows = cloud
        .sql("SELECT CAST(ts AS text) AS ts, device, avg_speed, count, code, note, _edge FROM speeds ORDER BY ts")
        .await
        .unwrap();
    assert_eq!(rows.len(), 2, "{rows:?}");
    // Copenhagen is an hour ahead in winter and two in summer.
    assert!(
        rows[0]["ts"].as_str().unwrap().starts_with("2023-12-31T23:00:00")
            && rows[1]["ts"].as_str().unwrap().starts_with("2024-07-01T00:00:00"),
        "{rows:?}"
    );
    assert_eq!((&rows[0]["avg_speed"], &rows[0]["count"], &rows[0]["code"]), (&56.5.into(), &3.into(), &"007".into()));
    assert_eq!(
        (&rows[0]["note"], &rows[1]["note"], &rows[1]["device"]),
        (&serde_json::Value::Null, &"a, b".into(), &"7".into())
    );
    let bad = cloud.sql("SELECT reason, topic FROM quarantine ORDER BY topic").await.unwrap();
    let reasons: Vec<_> =
        bad.iter().map(|row| (row["topic"].as_str().unwrap(), row["reason"].as_str().unwrap())).collect();
    assert_eq!(reasons, [("row 3", "bad_time"), ("row 4", "before_2000"), ("row 5", "malformed")]);

    let json = write(
        directory.path(),
        "b.ndjson",
        &format!(
            "{{\"time\":{START_S},\"device\":\"d\",\"v\":1,\"ok\":true}}\n\n{{\"time\":{},\"device\":\"d\",\"v\":2.5,\"more\":{{\"a\":[1]}}}}\nno json\n",
            START_S + 1
        ),
    );
    let said = load(&cloud, &json, &["--stream", "json"]);
    assert!(said.contains("3 rows loaded into json, 1 of them in quarantine"), "{said}");
    let rows = cloud.sql("SELECT v, ok, more FROM json ORDER BY ts").await.unwrap();
    assert_eq!(rows[0], serde_json::json!({ "v": 1.0, "ok": true, "more": null }));
    assert_eq!(rows[1], serde_json::json!({ "v": 2.5, "ok": null, "more": "{\"a\":[1]}" }));

    let parquet = directory.path().join("c.parquet");
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("ts", Arc::new(TimestampMillisecondArray::from_iter_values((0..70_000).map(|n| (START_S * 1_000) + n)))),
        ("sensor", Arc::new(StringArray::from_iter_values((0..70_000).map(|n| format!("s{}", n % 9))))),
        ("n", Arc::new(Int32Array::from_iter_values(0..70_000))),
        ("Temp °C", Arc::new(Float64Array::from_iter((0..70_000).map(|n| (n % 2 == 0).then_some(f64::from(n) / 2.0))))),
    ];
    let rows = RecordBatch::try_from_iter(columns).unwrap();
    let mut writer = ArrowWriter::try_new(File::create(&parquet).unwrap(), rows.schema(), None).unwrap();
    writer.write(&rows).unwrap();
    writer.close().unwrap();
    let said = load(&cloud, &parquet, &["--stream", "cells"]);
    assert!(said.contains("70000 rows loaded into cells"), "{said}");
    let said = load(&cloud, &parquet, &["--stream", "cells"]);
    assert!(said.contains("nothing to do, its 70000 rows are there already"), "{said}");
    let rows = cloud
        .sql("SELECT count(*) AS c, count(DISTINCT n) AS d, count(temp_c) AS t, sum(temp_c) AS s FROM cells")
        .await
        .unwrap();
    assert_eq!(rows[0], serde_json::json!({ "c": 70_000, "d": 70_000, "t": 35_000, "s": 612_482_500.0 }));

    refused(&cloud, &csv, &["--stream", "speeds"], "Say --map device=COLUMN");
    refused(
        &cloud,
        &csv,
        &["--stream", "speeds", "--map", "device=Report"],
        "no column `Report`; there are TIMESTAMP, REPORT_ID",
    );
    refused(&cloud, &directory.path().join("d.txt"), &["--stream", "x"], "must end in .parquet");
    let mut stranger = command(&cloud, &csv, &map);
    let output = stranger.env("WEIR_TOKEN", "wrong").output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("add an [[edge]]") && !text.contains("wrong"), "{text}");
}

/// Either process may be killed at any moment: the file goes on from where it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_load_that_is_killed_goes_on_and_ends_with_every_row_once() {
    let mut random = seeded();
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = Cloud::start(directory.path(), "a", QUICK).await;
    const ROWS: i64 = 400_000;
    let mut text = String::from("ts,device,n\n");
    for n in 0..ROWS {
        // From the middle on more than 64 dates, and a row here and there that has no time.
        let second = START_S + if n % 4_001 == 7 { -START_S - 5 } else { n * 60 };
        writeln!(text, "{second},d{},{n}", n % 50).unwrap();
    }
    let file = write(directory.path(), "many.csv", &text);
    let more = ["--stream", "many"];
    let (mut killed, started) = (0, Instant::now());
    for round in 0.. {
        assert!(started.elapsed() < 4 * PATIENCE, "it does not end");
        let mut child = command(&cloud, &file, &more).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Longer and longer, until it gets through. The moment is what is random here.
        tokio::time::sleep(Duration::from_millis(random.random_range(200..600) * (1 + round / 2))).await;
        if round % 3 == 2 {
            cloud.kill();
            cloud.run();
            cloud.wait().await;
        }
        if child.try_wait().unwrap().is_none() && round < 12 {
            child.kill().unwrap();
            child.wait().unwrap();
            killed += 1;
            continue;
        }
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        break;
    }
    assert!(killed > 2, "killed {killed} times: nothing was tried");
    let said = load(&cloud, &file, &more);
    assert!(said.contains("nothing to do, its 400000 rows are there already, 100 of them in quarantine"), "{said}");
    let rows = cloud.sql("SELECT count(*) AS n, count(DISTINCT n) AS d FROM many").await.unwrap();
    assert_eq!(rows[0], serde_json::json!({ "n": ROWS - 100, "d": ROWS - 100 }));
    assert_eq!(cloud.integer("SELECT count(*) FROM quarantine").await, 100);
}
