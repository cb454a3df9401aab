//! The doors of SQL as people use them: formats, hints, passwords, and what is refused. `psql` when it is installed.

use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use crate::harness::{Answer, Chain, Cloud, Sender, load_rows, load_schema};
use crate::process::{PATIENCE, POLL};

const READERS: &str = "[[reader]]\nname = \"analyst\"\npassword = \"right\"\n";
const FEW: &str = "[[reader]]\nname = \"few\"\npassword = \"right\"\nscope = \"n < 10\"\nedges = [\"gw-*\"]\n";

/// A cloud with a hundred rows of `load`, and a reader for all of them and one for the first ten.
pub(crate) async fn stage(directory: &std::path::Path) -> Cloud {
    filled(Cloud::start(directory, "a", &format!("{READERS}{FEW}")).await).await
}

/// The same with more of configuration, and a reader `quick` for the lane `dashboard`, if there is one.
pub(crate) async fn stage_with(directory: &std::path::Path, more: &str) -> Cloud {
    let quick = "[[reader]]\nname = \"quick\"\npassword = \"right\"\nlanes = [\"dashboard\"]\n";
    let quick = if more.contains("dashboard") { quick } else { "" };
    filled(Cloud::start(directory, "a", &format!("{more}{READERS}{quick}")).await).await
}

/// The same without readers: whoever is on this machine may ask.
pub(crate) async fn stage_open(directory: &std::path::Path) -> Cloud {
    stage_open_with(directory, "").await
}

/// The same with more of configuration.
pub(crate) async fn stage_open_with(directory: &std::path::Path, more: &str) -> Cloud {
    filled(Cloud::start(directory, "a", more).await).await
}

/// The same with all rows in files.
pub(crate) async fn stage_cold(directory: &std::path::Path) -> Cloud {
    let cloud = stage_open_with(directory, "[commit]\nmax_age = \"1ms\"\n[hot]\ngrace = \"0s\"\n").await;
    let started = Instant::now();
    while cloud.integer("SELECT rows FROM system.streams").await < 100 {
        assert!(started.elapsed() < PATIENCE, "nothing is committed");
        tokio::time::sleep(POLL).await;
    }
    cloud
}

async fn filled(cloud: Cloud) -> Cloud {
    let mut chain = Chain::new("load", load_schema());
    let batch = chain.seal(&load_rows(0, 100));
    assert!(matches!(Sender::to(&cloud).send(&chain.schema, &[batch]).await, Answer::Acks(_)));
    cloud
}

/// Status and body of a question.
pub(crate) async fn ask(cloud: &Cloud, accept: &str, password: Option<&str>, statement: &str) -> (u16, Vec<u8>) {
    let client = reqwest::Client::new();
    let mut request = client.post(format!("{}/v1/sql", cloud.http)).header("accept", accept).body(statement.to_owned());
    if let Some(password) = password {
        request = request.basic_auth("analyst", Some(password));
    }
    let response = request.send().await.unwrap();
    (response.status().as_u16(), response.bytes().await.unwrap().to_vec())
}

#[tokio::test(flavor = "multi_thread")]
async fn http_answers_in_four_formats_and_explains_what_it_refuses() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = stage(directory.path()).await;
    let two = "SELECT n, device FROM load WHERE n < 2 ORDER BY n";
    let ok = async |accept: &str, statement: &str| {
        let (status, body) = ask(&cloud, accept, Some("right"), statement).await;
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
        body
    };
    let rows: Value = serde_json::from_slice(&ok("application/json", two).await).unwrap();
    assert_eq!(rows, json!([{"n": 0, "device": "dev-0"}, {"n": 1, "device": "dev-1"}]));
    let lines = String::from_utf8(ok("application/x-ndjson", two).await).unwrap();
    assert_eq!(
        lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["n"].clone()).collect::<Vec<_>>(),
        [0, 1]
    );
    let text = String::from_utf8(ok("text/csv", two).await).unwrap();
    assert_eq!(text.lines().collect::<Vec<_>>(), ["n,device", "0,dev-0", "1,dev-1"]);
    let arrow = ok("application/vnd.apache.arrow.stream", two).await;
    let reader = arrow::ipc::reader::StreamReader::try_new(std::io::Cursor::new(arrow), None).unwrap();
    assert_eq!(reader.map(|batch| batch.unwrap().num_rows()).sum::<usize>(), 2);
    let quoted = json!({ "sql": "SELECT count(*) AS n FROM load" }).to_string();
    let request = reqwest::Client::new().post(format!("{}/v1/sql", cloud.http)).basic_auth("analyst", Some("right"));
    let request = request.header("content-type", "application/json").header("accept", "application/json").body(quoted);
    assert_eq!(request.send().await.unwrap().json::<Value>().await.unwrap(), json!([{"n": 100}]));

    let refused = async |password: Option<&str>, statement: &str, status: u16, words: &str| {
        let (found, body) = ask(&cloud, "application/json", password, statement).await;
        let text = String::from_utf8(body).unwrap();
        assert!(found == status && text.contains(words), "{statement}: {found} {text}");
    };
    refused(None, two, 401, "error").await;
    refused(Some("wrong"), two, 401, "error").await;
    refused(Some("right"), "SELEC 1", 400, "SELEC").await;
    refused(Some("right"), "SELECT 1 FROM laod", 400, "did you mean `load`?").await;
    refused(Some("right"), "SELECT devise FROM load", 400, "did you mean `device`?").await;
    refused(Some("right"), "DROP TABLE load", 400, "questions only").await;
    refused(Some("right"), "COPY load TO '/tmp/x.csv'", 400, "questions only").await;
    refused(Some("right"), "INSERT INTO load VALUES (1)", 400, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn psql_logs_in_with_its_password_and_only_asks() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = stage(directory.path()).await;
    let psql = |password: &str, statement: &str| {
        let port = cloud.postgres.to_string();
        Command::new("psql")
            .args(["-h", "127.0.0.1", "-p", &port, "-U", "analyst", "-d", "weir", "-At", "-c", statement])
            .env("PGPASSWORD", password)
            .output()
    };
    let Ok(first) = psql("right", "SELECT count(*), sum(n) FROM load") else {
        println!("left out: psql is not installed");
        return;
    };
    let error = String::from_utf8_lossy(&first.stderr).into_owned();
    assert_eq!(String::from_utf8_lossy(&first.stdout).trim(), "100|4950", "{error}");
    let refused = |password: &str, statement: &str, words: &str| {
        let output = psql(password, statement).unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(words), "{statement}: {text}");
    };
    refused("wrong", "SELECT 1", "authentication failed");
    refused("right", "SELECT 1 FROM laod", "did you mean `load`?");
    refused("right", "DROP TABLE load", "questions only");
    refused("right", "COPY load TO '/tmp/x.csv'", "STDOUT only");
    let copied = psql("right", "COPY (SELECT n FROM load WHERE n < 3 ORDER BY n) TO STDOUT").unwrap();
    assert_eq!(String::from_utf8_lossy(&copied.stdout), "0\n1\n2\n");
    let table =
        psql("right", "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'").unwrap();
    assert_eq!(String::from_utf8_lossy(&table.stdout).trim(), "load");
    for (command, words) in [
        ("\\d", "public|load|table"),
        ("\\d load", "device|text"),
        ("\\d+ load", "n|bigint"),
        ("\\dt+", "public|load|table|"),
        ("\\d+", "system|streams|view"),
        ("\\l+", "weir|"),
        ("\\dn+", "system|"),
        ("\\du", ""),
        ("\\df", ""),
        ("\\dv", "system|queries|view"),
        ("\\dp", "load|table"),
        ("\\dT", ""),
        ("\\db", ""),
    ] {
        let output = psql("right", command).unwrap();
        let [told, error] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
        assert!(output.status.success() && error.is_empty() && told.contains(words), "{command}: {told}{error}");
    }
}

/// The script says what is asked and what must come back.
#[tokio::test(flavor = "multi_thread")]
async fn psycopg_prepares_reads_every_type_and_cancels() {
    let python = std::env::var("WEIR_PYTHON").unwrap_or_default();
    if !Command::new(&python).args(["-c", "import psycopg"]).output().is_ok_and(|found| found.status.success()) {
        println!("left out: WEIR_PYTHON names no Python with psycopg");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let cloud = stage(directory.path()).await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/postgres_client.py");
    let output = Command::new(&python).args([script, &cloud.postgres.to_string(), "right"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.ends_with("ok\n"), "{text}{}", String::from_utf8_lossy(&output.stderr));
}
