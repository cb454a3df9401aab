//! Reference tables: what holds now, what held then, and joins of readings with both.

use std::path::Path;
use std::process::Command;

use crate::harness::{Cloud, EDGE, TOKEN};

fn load(cloud: &Cloud, directory: &Path, text: &str, more: &[&str]) -> String {
    let file = directory.join("sensors.csv");
    std::fs::write(&file, text).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args([
            "load",
            "--reference",
            file.to_str().unwrap(),
            "--key",
            "REPORT_ID",
            "--url",
            &cloud.http,
            "--edge",
            EDGE,
        ])
        .args(more)
        .env("WEIR_TOKEN", TOKEN)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reading_is_joined_with_what_was_true_then() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"300ms\"\n").await;
    let first = "REPORT_ID,road,limit\n7,Ringvejen,80\n8,Havnegade,50\n";
    assert!(load(&cloud, directory.path(), first, &[]).contains("2 rows loaded into sensors_revisions"));
    assert!(load(&cloud, directory.path(), first, &[]).contains("nothing to do"));
    let now = "SELECT device, road, \"limit\", revision FROM sensors ORDER BY device";
    let row = |device: &str, road: &str, limit: i64, revision: i64| serde_json::json!({ "device": device, "road": road, "limit": limit, "revision": revision });
    assert_eq!(cloud.sql(now).await.unwrap(), [row("7", "Ringvejen", 80, 1), row("8", "Havnegade", 50, 1)]);
    // A limit changed in 2024, and a road is new.
    let second = "REPORT_ID,road,limit\n7,Ringvejen,60\n9,Skovvej,40\n";
    load(&cloud, directory.path(), second, &["--valid-from", "2024-06-01"]);
    let expected = [row("7", "Ringvejen", 60, 2), row("8", "Havnegade", 50, 1), row("9", "Skovvej", 40, 1)];
    assert_eq!(cloud.sql(now).await.unwrap(), expected);
    let history = cloud.sql("SELECT \"limit\", CAST(valid_from AS text) AS since, CAST(valid_to AS text) AS until FROM sensors_history WHERE device = '7' ORDER BY revision").await.unwrap();
    assert_eq!(history.len(), 2);
    let starts = |row: usize, column: &str, text: &str| {
        history[row][column].as_str().is_some_and(|found| found.starts_with(text))
    };
    assert!(
        starts(0, "since", "2000-01-01") && starts(0, "until", "2024-06-01") && starts(1, "since", "2024-06-01"),
        "{history:?}"
    );
    assert!(history[1]["until"].is_null(), "{history:?}");
    // One known for good: what is loaded without a time holds from then on.
    load(&cloud, directory.path(), "REPORT_ID,road,limit\n8,Havnegade,30\n", &[]);

    let lines = "traffic,device=7 speed=70 1704067200\ntraffic,device=7 speed=70 1719792000\ntraffic,device=8 speed=45 1719792000\ntraffic,device=10 speed=1 1719792000\n";
    let client = reqwest::Client::new();
    let sent = client
        .post(format!("{}/api/v2/write?precision=s", cloud.http))
        .bearer_auth(TOKEN)
        .body(lines)
        .send()
        .await
        .unwrap();
    assert_eq!(sent.status(), 204);
    let then = "SELECT t.device, s.\"limit\", t.speed > s.\"limit\" AS too_fast FROM traffic t LEFT JOIN sensors_history s \
                ON s.device = t.device AND t.ts >= s.valid_from AND (s.valid_to IS NULL OR t.ts < s.valid_to) ORDER BY t.device, t.ts";
    let joined = [
        serde_json::json!({ "device": "10", "limit": null, "too_fast": null }),
        serde_json::json!({ "device": "7", "limit": 80, "too_fast": false }),
        serde_json::json!({ "device": "7", "limit": 60, "too_fast": true }),
        serde_json::json!({ "device": "8", "limit": 50, "too_fast": false }),
    ];
    assert_eq!(cloud.sql(then).await.unwrap(), joined);
    let of_now = cloud.sql("SELECT \"limit\" FROM sensors WHERE device = '8'").await.unwrap();
    assert_eq!(of_now, [serde_json::json!({ "limit": 30 })]);
    // Its past is asked of its history; a table of the node's past would be answered as of now.
    for past in ["SELECT * FROM sensors FOR VERSION AS OF 1", "SELECT * FROM sensors_history FOR VERSION AS OF 1"] {
        let refused = cloud.sql(past).await.unwrap_err().to_string();
        assert!(refused.contains("is a reference table: what held when is in its history"), "{refused}");
    }
    let names = cloud
        .sql("SELECT table_name, table_type FROM information_schema.tables WHERE table_schema = 'public' ORDER BY 1")
        .await
        .unwrap();
    let names: Vec<_> =
        names.iter().map(|row| (row["table_name"].as_str().unwrap(), row["table_type"].as_str().unwrap())).collect();
    let expected = [
        ("sensors", "VIEW"),
        ("sensors_history", "VIEW"),
        ("sensors_revisions", "BASE TABLE"),
        ("traffic", "BASE TABLE"),
    ];
    assert_eq!(names, expected);
}
