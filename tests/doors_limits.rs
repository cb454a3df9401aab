//! What the doors bear: hostile statements and bytes, readers that stop reading, many connections; cancelling, lanes, time
//! travel, rights, and TLS.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::doors::{ask, stage, stage_with};
use crate::harness::{Answer, Chain, Cloud, Sender, load_rows, load_schema};
use crate::process::{PATIENCE, POLL};

const CROSS: &str =
    "SELECT sum(a.v * b.w) FROM generate_series(1, 1000000000) AS a(v), generate_series(1, 1000) AS b(w)";

async fn text(cloud: &Cloud, statement: &str) -> (u16, String) {
    let (status, body) = ask(cloud, "application/json", Some("right"), statement).await;
    (status, String::from_utf8_lossy(&body).into_owned())
}

/// Memory of the process that is resident, bytes.
pub(crate) fn resident(cloud: &Cloud) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", cloud.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
}

/// It is answered before all of it has come, and the connection ends: a client that still writes may find it closed.
async fn too_long_a_statement_is_refused(cloud: &Cloud) {
    let statement = "SELECT '".to_owned() + &"x".repeat(10 << 20) + "'";
    let request = reqwest::Client::new().post(format!("{}/v1/sql", cloud.http)).basic_auth("analyst", Some("right"));
    match request.body(statement).send().await {
        Ok(answer) => assert_eq!(answer.status().as_u16(), 413),
        Err(error) => assert!(error.is_request(), "{error:?}"),
    }
    assert_eq!(text(cloud, "SELECT count(*) AS n FROM load").await, (200, r#"[{"n":100}]"#.to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_statements_end_in_an_error_and_others_are_served() {
    let directory = tempfile::tempdir().unwrap();
    let limits =
        "[query]\ntimeout = \"5s\"\nmax_bytes = \"128MiB\"\nstatement_bytes = \"64MiB\"\nresult_rows = 5000000\n";
    let cloud = stage_with(directory.path(), limits).await;
    let before = resident(&cloud);
    let joins: String = (0..1_000).map(|at| format!(" JOIN load t{at} ON t{at}.n = load.n")).collect();
    let many_unions = "SELECT 1 ".to_owned() + &"UNION ALL SELECT 1 ".repeat(40_000);
    let statements: Vec<(String, u16, &str)> = vec![
        ("SELECT '".to_owned() + &"x".repeat(3 << 19) + "'", 400, "bytes"),
        (format!("SELECT count(*) FROM load{joins}"), 0, ""),
        (many_unions, 400, "words and operators"),
        (format!("SELECT {}1{}", "(".repeat(100_000), ")".repeat(100_000)), 400, ""),
        (CROSS.to_owned(), 503, "more memory than is set aside"),
        ("SELECT array_agg(v) FROM generate_series(1, 1000000000) AS a(v)".to_owned(), 0, ""),
        ("SELECT count(DISTINCT v * 7) FROM generate_series(1, 1000000000) AS a(v)".to_owned(), 0, ""),
        ("SELECT nothing FROM load".to_owned(), 400, "no column"),
        ("SELECT * FROM nowhere".to_owned(), 400, "no table"),
        ("DELETE FROM load".to_owned(), 400, ""),
        ("\0\u{1}\u{feff}".to_owned(), 400, ""),
        (String::new(), 400, ""),
    ];
    too_long_a_statement_is_refused(&cloud).await;
    for (statement, expected, words) in statements {
        let shown: String = statement.chars().take(60).collect();
        let started = Instant::now();
        let (status, answer) = text(&cloud, &statement).await;
        let took = started.elapsed();
        let right = if expected == 0 { (400..600).contains(&status) || status == 200 } else { status == expected };
        assert!(right && answer.contains(words), "{shown}: {status} {answer}");
        assert!(took < Duration::from_secs(30), "{shown}: {took:?}");
        let (status, answer) = text(&cloud, "SELECT count(*) AS n FROM load").await;
        assert_eq!((status, answer.as_str()), (200, r#"[{"n":100}]"#), "after {shown}");
        println!("{shown}: {took:?}, {} MiB", resident(&cloud) >> 20);
    }
    let grown = resident(&cloud).saturating_sub(before);
    assert!(grown < 700 << 20, "{} MiB more than before", grown >> 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_idle_connections_hold_up_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = stage(directory.path()).await;
    let http: u16 = cloud.http.rsplit(':').next().unwrap().parse().unwrap();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut idle = Vec::new();
    for port in [http, cloud.flight_sql, cloud.postgres] {
        for _ in 0..20 {
            let bytes: Vec<u8> = (0..2_000).flat_map(|_| random().to_le_bytes()).collect();
            let mut socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(90))).unwrap();
            socket.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
            // It may hang up in the middle.
            let _ = socket.write_all(&bytes);
            let _ = socket.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            let ended = socket.read_to_end(&mut answer);
            let quiet = matches!(&ended, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock);
            assert!(!quiet, "port {port} neither answers nor hangs up");
            assert!(answer.len() < 1 << 20);
        }
        for _ in 0..340 {
            // Those above the limit are closed; the others stay.
            idle.extend(TcpStream::connect(("127.0.0.1", port)));
        }
    }
    assert!(idle.len() >= 1_000, "{} connections", idle.len());
    let (status, answer) = text(&cloud, "SELECT count(*) AS n FROM load").await;
    assert_eq!((status, answer.as_str()), (200, r#"[{"n":100}]"#));
    println!("{} idle connections, {} MiB", idle.len(), resident(&cloud) >> 20);
    // Who has said nothing for a while has lost its place, and others are let in.
    for (port, words) in
        [(cloud.postgres, SSL_REQUEST), (cloud.flight_sql, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")]
    {
        let started = Instant::now();
        while !answers(port, words) {
            assert!(started.elapsed() < PATIENCE, "port {port} lets nobody in");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    drop(idle);
}

/// How a client of Postgres asks for TLS.
const SSL_REQUEST: &[u8] = &[0, 0, 0, 8, 4, 210, 22, 47];

/// Whether a door says anything to this.
fn answers(port: u16, words: &[u8]) -> bool {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket.write_all(words).is_ok() && socket.read(&mut [0; 1]).is_ok_and(|read| read == 1)
}

/// A header may announce a gigabyte; nobody waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_announced_too_large_is_refused_before_it_comes() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = stage(directory.path()).await;
    let mut socket = TcpStream::connect(("127.0.0.1", cloud.postgres)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut startup = vec![0, 0, 0, 0, 0, 3, 0, 0];
    startup.extend_from_slice(b"user\0somebody\0database\0weir\0\0");
    let length = u32::try_from(startup.len()).unwrap();
    startup[..4].copy_from_slice(&length.to_be_bytes());
    socket.write_all(&startup).unwrap();
    // It asks who this is.
    let mut kind = [0];
    socket.read_exact(&mut kind).unwrap();
    assert_eq!(kind, *b"R");
    socket.write_all(&[b'p', 0x3f, 0xff, 0xff, 0x00, b'S']).unwrap();
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.contains("54000") && answer.contains("a message has at most"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_stops_reading_loses_its_statement_and_nobody_else_does() {
    let directory = tempfile::tempdir().unwrap();
    let lanes = "[query]\ntimeout = \"4s\"\n[[query.lane]]\nname = \"default\"\nrunning = 2\nwaiting = 2\n\
                 [[query.lane]]\nname = \"dashboard\"\n";
    let cloud = stage_with(directory.path(), lanes).await;
    let long = "SELECT v, v AS w FROM generate_series(1, 1000000000) AS a(v)";
    let client = reqwest::Client::new();
    let mut stuck = Vec::new();
    for _ in 0..2 {
        let request = client.post(format!("{}/v1/sql", cloud.http)).header("accept", "application/x-ndjson");
        stuck.push(request.basic_auth("analyst", Some("right")).body(long).send().await.unwrap());
    }
    let before = resident(&cloud);
    // Both places of its lane are taken; those of another are not.
    let quick = client.post(format!("{}/v1/sql?lane=dashboard", cloud.http)).basic_auth("quick", Some("right"));
    let answer =
        quick.header("accept", "application/json").body("SELECT count(*) AS n FROM load").send().await.unwrap();
    assert_eq!(answer.json::<Value>().await.unwrap(), json!([{"n": 100}]));
    let denied = client.post(format!("{}/v1/sql?lane=dashboard", cloud.http)).basic_auth("analyst", Some("right"));
    let denied = denied.body("SELECT 1").send().await.unwrap();
    assert_eq!(denied.status(), 400);
    // One more waits until a stuck one's time is over.
    let started = Instant::now();
    let (status, answer) = text(&cloud, "SELECT count(*) AS n FROM load").await;
    assert_eq!((status, answer.as_str()), (200, r#"[{"n":100}]"#));
    println!("waited {:?}; {} MiB more", started.elapsed(), resident(&cloud).saturating_sub(before) >> 20);
    assert!(resident(&cloud).saturating_sub(before) < 200 << 20);
    for answer in stuck {
        assert!(answer.bytes().await.is_err(), "it ended as if it were whole");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_is_found_and_ended_by_its_id() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = stage(directory.path()).await;
    let client = reqwest::Client::new();
    let asking = tokio::spawn({
        let request = client.post(format!("{}/v1/sql", cloud.http)).basic_auth("analyst", Some("right"));
        async move { request.body(CROSS).send().await.unwrap() }
    });
    let started = Instant::now();
    let id = loop {
        let seen = "SELECT id FROM system.queries WHERE state = 'running' AND text LIKE '%a.v * b.w%' AND text NOT LIKE '%LIKE%'";
        let (_, rows) = text(&cloud, seen).await;
        if let Some(id) = serde_json::from_str::<Value>(&rows).unwrap()[0]["id"].as_u64() {
            break id;
        }
        assert!(started.elapsed() < PATIENCE);
        tokio::time::sleep(POLL).await;
    };
    let delete = |name: &str, id: u64| {
        client.delete(format!("{}/v1/queries/{id}", cloud.http)).basic_auth(name.to_owned(), Some("right")).send()
    };
    assert_eq!(delete("few", id).await.unwrap().status(), 404, "somebody else's");
    assert_eq!(delete("analyst", id).await.unwrap().status(), 204);
    let ended = asking.await.unwrap();
    assert_eq!(ended.status(), 409);
    assert!(ended.text().await.unwrap().contains("cancelled"));
    assert_eq!(delete("analyst", id).await.unwrap().status(), 404);
    let (_, rows) = text(&cloud, &format!("SELECT state, door FROM system.queries WHERE id = {id}")).await;
    assert_eq!(rows, r#"[{"state":"cancelled","door":"http"}]"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_past_answers_the_same_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"1ms\"\n").await;
    let (mut chain, sender) = (Chain::new("load", load_schema()), Sender::to(&cloud));
    let mut seen = Vec::new();
    for commit in 0..4 {
        let batch = chain.seal(&load_rows(commit * 10, 10));
        assert!(matches!(sender.send(&chain.schema, &[batch]).await, Answer::Acks(_)));
        let files = format!("SELECT count(*) AS n FROM system.ingest WHERE committed = {}", commit + 1);
        let started = Instant::now();
        while cloud.integer(&files).await == 0 {
            assert!(started.elapsed() < PATIENCE);
        }
        let version = cloud.integer("SELECT version FROM system.streams").await;
        let now = chrono::Utc::now().format("%Y-%m-%dT%H:%M:%S%.6fZ").to_string();
        seen.push((version, (commit + 1) * 10, now));
        // Times of versions are told apart by the file system's clock, whose ticks are some milliseconds long.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let last = seen.last().unwrap().2.clone();
    let started = Instant::now();
    while cloud.sql(&format!("SELECT count(*) FROM load FOR SYSTEM_TIME AS OF '{last}'")).await.is_err() {
        assert!(started.elapsed() < PATIENCE, "the newest moment is never over");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let client = reqwest::Client::new();
    let as_of = async |as_of: &str, statement: &str| {
        let request = client.post(format!("{}/v1/sql?as_of={as_of}", cloud.http));
        let answer = request.header("accept", "application/json").body(statement.to_owned()).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    for (version, rows, time) in seen {
        let count = format!("[{{\"n\":{rows}}}]");
        let statement = "SELECT count(load.n) AS n FROM load";
        assert_eq!(as_of(&version.to_string(), statement).await, (200, count.clone()));
        assert_eq!(as_of(&time, statement).await, (200, count.clone()), "as of {time}");
        let by_version = format!("SELECT count(*) FROM load FOR VERSION AS OF {version}");
        assert_eq!(cloud.integer(&by_version).await, rows);
        let by_time = format!("SELECT count(*) FROM load FOR SYSTEM_TIME AS OF '{time}'");
        assert_eq!(cloud.integer(&by_time).await, rows);
    }
    for (wrong, words) in [
        ("99", "no version 99"),
        ("1999-01-01T00:00:00Z", "does not reach back"),
        ("2200-01-01T00:00:00Z", "not over for 5s yet"),
        (&*chrono::Utc::now().format("%Y-%m-%dT%H:%M:%S%.6fZ").to_string(), "not over for 5s yet"),
        ("yesterday", "a version (a number) or a moment"),
    ] {
        let (status, answer) = as_of(wrong, "SELECT count(*) FROM load").await;
        assert!(status >= 400 && answer.contains(words), "{wrong}: {status} {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_door_speaks_tls_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name).display().to_string();
    let (certificate, key) = (file("cloud.crt"), file("cloud.key"));
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout", &key, "-out", &certificate])
        .output();
    if !made.is_ok_and(|made| made.status.success()) {
        println!("left out: openssl is not installed");
        return;
    }
    let tls = format!("[listen.tls]\ncertificate = \"{certificate}\"\nkey = \"{key}\"\n");
    let cloud = Cloud::start_tls(directory.path(), &tls, &certificate).await;
    let rows = cloud.sql("SELECT 1 AS one").await.unwrap();
    assert_eq!(rows[0]["one"], 1);
    let plain = cloud.http.replace("https://", "http://");
    assert!(reqwest::Client::new().get(format!("{plain}/health")).send().await.is_err());
    let psql = |mode: &str| {
        Command::new("psql")
            .arg(format!(
                "host=localhost port={} user=me dbname=weir sslmode={mode} sslrootcert={certificate}",
                cloud.postgres
            ))
            .args(["-At", "-c", "SELECT 1"])
            .output()
    };
    match psql("verify-full") {
        Ok(output) => {
            assert_eq!(String::from_utf8_lossy(&output.stdout), "1\n", "{}", String::from_utf8_lossy(&output.stderr));
            let refused = psql("disable").unwrap();
            let words = String::from_utf8_lossy(&refused.stderr).into_owned();
            assert!(!refused.status.success() && words.contains("TLS only"), "{words}");
        }
        Err(_) => println!("left out: psql is not installed"),
    }
    flight_over_tls(&cloud, Path::new(&certificate));
}

fn flight_over_tls(cloud: &Cloud, certificate: &Path) {
    let python = std::env::var("WEIR_PYTHON").unwrap_or_default();
    let script = format!(
        "import adbc_driver_flightsql.dbapi as d\n\
         c = d.connect('grpc+tls://localhost:{}', db_kwargs={{'adbc.flight.sql.client_option.tls_root_certs': open('{}').read()}}, autocommit=True)\n\
         k = c.cursor(); k.execute('SELECT 1'); print(k.fetchone()[0])",
        cloud.flight_sql,
        certificate.display()
    );
    match Command::new(&python).args(["-c", &script]).output() {
        Ok(output) if !String::from_utf8_lossy(&output.stderr).contains("No module named") => {
            assert_eq!(String::from_utf8_lossy(&output.stdout), "1\n", "{}", String::from_utf8_lossy(&output.stderr));
        }
        _ => println!("left out: WEIR_PYTHON names no Python with adbc_driver_flightsql"),
    }
}

/// The script says what is asked and what must come back.
#[tokio::test(flavor = "multi_thread")]
async fn adbc_sqlalchemy_and_copy_answer_and_catalogues_are_told() {
    let python = std::env::var("WEIR_PYTHON").unwrap_or_default();
    let needs = "import adbc_driver_flightsql, sqlalchemy, psycopg, pandas";
    if !Command::new(&python).args(["-c", needs]).output().is_ok_and(|found| found.status.success()) {
        println!("left out: WEIR_PYTHON names no Python with adbc_driver_flightsql, sqlalchemy, psycopg and pandas");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let cloud = stage(directory.path()).await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/analyst_clients.py");
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/clients");
    let (postgres, flight_sql) = (cloud.postgres.to_string(), cloud.flight_sql.to_string());
    let output = Command::new(&python).args([script, &postgres, &flight_sql, "right", fixtures]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.ends_with("ok\n"), "{text}{}", String::from_utf8_lossy(&output.stderr));
}
