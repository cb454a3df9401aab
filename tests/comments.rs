//! What people say of tables and columns is kept in the table, and shown to everybody.

use serde_json::{Value, json};

use crate::harness::{Answer, Chain, Cloud, Sender, load_rows, load_schema};

async fn with_rows(directory: &std::path::Path, more: &str) -> Cloud {
    let cloud = Cloud::start(directory, "a", more).await;
    let mut chain = Chain::new("load", load_schema());
    let batch = chain.seal(&load_rows(0, 3));
    assert!(matches!(Sender::to(&cloud).send(&chain.schema, &[batch]).await, Answer::Acks(_)));
    cloud
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_said_of_columns_is_kept_in_the_table_and_shown() {
    let directory = tempfile::tempdir().unwrap();
    let mut cloud = with_rows(directory.path(), "[lake]\nevery = \"1s\"\n").await;
    for statement in [
        "COMMENT ON TABLE load IS 'numbers that say which row it is'",
        "COMMENT ON COLUMN public.load.n IS 'it''s the row [1]'",
        "COMMENT ON COLUMN load.device IS 'seven of them'",
        "COMMENT ON COLUMN load.quality IS 'gone'",
        "COMMENT ON COLUMN load.quality IS NULL",
    ] {
        assert_eq!(cloud.sql(statement).await.unwrap(), Vec::<Value>::new(), "{statement}");
    }
    let columns = "SELECT name, position, type, unit, description, since IS NOT NULL AS dated FROM system.columns \
                   WHERE stream = 'load' AND name IN ('ts', 'device', 'n', 'quality') ORDER BY position";
    let expected = json!([
        { "name": "ts", "position": 1, "type": "timestamp", "unit": null, "description": null, "dated": true },
        { "name": "device", "position": 2, "type": "text", "unit": null, "description": "seven of them", "dated": true },
        { "name": "n", "position": 3, "type": "int64", "unit": "1", "description": "it's the row [1]", "dated": true },
        { "name": "quality", "position": 4, "type": "text", "unit": null, "description": null, "dated": true },
    ]);
    assert_eq!(Value::Array(cloud.sql(columns).await.unwrap()), expected);
    let refused = [
        ("COMMENT ON TABLE nothing IS 'x'", "no table `nothing`"),
        ("COMMENT ON COLUMN load.nothing IS 'x'", "load has no column nothing"),
        ("COMMENT ON COLUMN n IS 'x'", "names a table and a column"),
        ("COMMENT ON SCHEMA public IS 'x'", "not on SCHEMA"),
        ("COMMENT ON TABLE system.streams IS 'x'", "of schema public"),
    ];
    for (statement, words) in refused {
        let error = cloud.sql(statement).await.unwrap_err().to_string();
        assert!(error.contains(words), "{statement}: {error}");
    }
    let long = format!("COMMENT ON TABLE load IS '{}'", "x".repeat(4_097));
    assert!(cloud.sql(&long).await.unwrap_err().to_string().contains("at most 4096 bytes"));
    // It is in the table: after a crash, for another type, and for readers that are not ours.
    cloud.kill();
    cloud.run();
    cloud.wait().await;
    assert_eq!(Value::Array(cloud.sql(columns).await.unwrap()), expected);
    let table = cloud.sql("SELECT description FROM system.streams WHERE name = 'load'").await.unwrap();
    assert_eq!(table[0]["description"], "numbers that say which row it is");
    postgres_knows(&cloud);
    others_know(directory.path());
}

fn psql(cloud: &Cloud, statement: &str) -> Option<String> {
    let port = cloud.postgres.to_string();
    let mut psql = std::process::Command::new("psql");
    let psql = psql.args(["-h", "127.0.0.1", "-p", &port, "-U", "local", "-d", "weir", "-At", "-c", statement]);
    let output = psql.output().ok()?;
    assert!(output.status.success(), "{statement}: {}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

/// By the functions that clients of PostgreSQL ask.
fn postgres_knows(cloud: &Cloud) {
    let question = "SELECT a.attname, pg_catalog.col_description(a.attrelid, a.attnum), \
                    pg_catalog.obj_description(c.oid, 'pg_class') FROM pg_catalog.pg_attribute a \
                    JOIN pg_catalog.pg_class c ON c.oid = a.attrelid WHERE c.relname = 'load' AND a.attname = 'n'";
    let Some(told) = psql(cloud, question) else {
        println!("left out: psql is not installed");
        return;
    };
    assert_eq!(told.trim(), "n|it's the row [1]|numbers that say which row it is");
    assert_eq!(psql(cloud, "COMMENT ON COLUMN load.n IS 'the row [1]'").unwrap().trim(), "COMMENT");
    let unit = psql(cloud, "SELECT description FROM system.columns WHERE stream = 'load' AND unit = '1'").unwrap();
    assert_eq!(unit.trim(), "the row [1]");
}

fn others_know(directory: &std::path::Path) {
    const READ: &str = r#"
import sys, deltalake
table = deltalake.DeltaTable(sys.argv[1])
assert table.metadata().description == "numbers that say which row it is", table.metadata()
notes = {field.name: field.metadata for field in table.schema().fields}
assert notes["n"]["comment"].endswith("the row [1]"), notes
"#;
    let Ok(python) = std::env::var("WEIR_PYTHON") else {
        println!("left out: WEIR_PYTHON names no Python with deltalake");
        return;
    };
    let table = directory.join("tables/load");
    let output = std::process::Command::new(python).args(["-c", READ, table.to_str().unwrap()]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_reader_who_may_says_something() {
    let directory = tempfile::tempdir().unwrap();
    let readers =
        "[[reader]]\nname = \"a\"\npassword = \"pa\"\n[[reader]]\nname = \"k\"\npassword = \"pk\"\ncomment = true\n";
    let cloud = with_rows(directory.path(), readers).await;
    let say = async |name: &str, password: &str| {
        let client = reqwest::Client::new().post(format!("{}/v1/sql", cloud.http)).basic_auth(name, Some(password));
        let answer = client.body("COMMENT ON COLUMN load.n IS 'x [m]'").send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    let (status, text) = say("a", "pa").await;
    assert_eq!(status, 403, "{text}");
    assert!(text.contains("`a` may not comment on tables"), "{text}");
    let (status, text) = say("k", "pk").await;
    assert_eq!(status, 200, "{text}");
}
