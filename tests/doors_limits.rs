//! What the doors bear: hostile statements and bytes, readers that stop reading, many connections; cancelling, lanes, time
//! travel, rights, and TLS.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::asking::{DOORS, Refused, at};
use crate::doors::{ask, stage, stage_open_with, stage_with};
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

/// A statement, the words of its refusal, and the codes by which programs know it: HTTP's status, gRPC's, and the SQLSTATE.
/// Without words it may be answered, too.
type Hostile = (String, &'static str, [&'static str; 3]);

const ANY: [&str; 3] = [""; 3];
const INVALID: [&str; 3] = ["400", "invalid argument", "C42"];
const MEMORY: [&str; 3] = ["503", "resource", "C53200"];

fn hostile_statements() -> Vec<Hostile> {
    let joins: String = (0..1_000).map(|at| format!(" JOIN load t{at} ON t{at}.n = load.n")).collect();
    let nested = format!("SELECT {}1{}", "(".repeat(100_000), ")".repeat(100_000));
    let sort = "SELECT count(r) FROM (SELECT row_number() OVER (ORDER BY s) AS r FROM (SELECT \
                rpad(CAST(v * 7919 % 1000003 AS TEXT), 100, 'x') AS s FROM generate_series(1, 10000000) AS a(v)) AS p) AS q";
    let unknown = ["400", "entity was not found", "C42703"];
    let writes = ["400", "permission", "C25006"];
    let say = |statement: &str, words, codes| (statement.to_owned(), words, codes);
    let mut all = vec![
        // Doors take no more than a few MB: refused, or hung up on.
        say(&("SELECT '".to_owned() + &"x".repeat(10 << 20) + "'"), "?", ANY),
        say(&("SELECT '".to_owned() + &"x".repeat(3 << 19) + "'"), "bytes", INVALID),
        say(&format!("SELECT count(*) FROM load{joins}"), "", ANY),
        say(&("SELECT 1 ".to_owned() + &"UNION ALL SELECT 1 ".repeat(40_000)), "words and operators", INVALID),
        say(&nested, "", ANY),
        say(CROSS, "more memory than is set aside", MEMORY),
        say("SELECT array_agg(v) FROM generate_series(1, 1000000000) AS a(v)", "", ANY),
        say("SELECT count(DISTINCT v * 7) FROM generate_series(1, 1000000000) AS a(v)", "", ANY),
        // Sorting spills to disk, where it has so much room.
        say(sort, "spill_bytes", MEMORY),
        say("SELECT nothing FROM load", "no column", unknown),
        say("SELECT * FROM nowhere", "no table", ["400", "entity was not found", "C42P01"]),
        say("SELECT nothing(n) FROM load", "nothing", INVALID),
        say("SELEC 1", "SELEC", ["400", "invalid argument", "C42601"]),
        say("\u{1}\u{feff}", "?", ANY),
    ];
    for write in [
        "DELETE FROM load",
        "UPDATE load SET n = 0",
        "INSERT INTO load VALUES (1)",
        "DROP TABLE load",
        "TRUNCATE load",
        "CREATE TABLE mine AS SELECT 1",
        "CREATE EXTERNAL TABLE mine STORED AS CSV LOCATION '/etc/passwd'",
        "COPY load TO '/tmp/x.csv'",
    ] {
        all.push(say(write, "?", ANY));
    }
    all.push(say("DELETE FROM load", "questions only", writes));
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_statements_end_in_an_error_at_every_door_and_others_are_served() {
    let directory = tempfile::tempdir().unwrap();
    let limits = "[query]\ntimeout = \"5s\"\nmax_bytes = \"128MiB\"\nstatement_bytes = \"64MiB\"\nspill_bytes = \"32MiB\"\nresult_rows = 5000000\n";
    let cloud = stage_open_with(directory.path(), limits).await;
    let before = resident(&cloud);
    for (statement, words, codes) in hostile_statements() {
        let shown: String = statement.chars().take(60).collect();
        for (door, code) in DOORS.iter().zip(codes) {
            let started = Instant::now();
            let answer = at(door, &cloud).await.ask(&statement).await;
            let took = started.elapsed();
            match answer {
                Ok(rows) => assert!(words.is_empty(), "{door}: {shown}: {} rows", rows.len()),
                Err(Refused(text)) => {
                    let told = text.contains(words.trim_end_matches('?')) && text.contains(code);
                    assert!(told, "{door}: {shown}: {text}");
                }
            }
            assert!(took < Duration::from_secs(30), "{door}: {shown}: {took:?}");
            for served in DOORS {
                let rows = at(served, &cloud).await.ask("SELECT count(*) AS n FROM load").await.unwrap();
                assert_eq!(rows, [["100"]], "{served} after {shown}");
            }
            println!("{door}: {shown}: {took:?}, {} MiB", resident(&cloud) >> 20);
        }
    }
    let grown = resident(&cloud).saturating_sub(before);
    assert!(grown < 700 << 20, "{} MiB more than before", grown >> 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_idle_connections_hold_up_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let cloud = stage(directory.path()).await;
    let http: u16 = cloud.http.rsplit(':').next().unwrap().parse().unwrap();
    let mut idle = Vec::new();
    for port in [http, cloud.flight_sql, cloud.postgres] {
        garbage(port);
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

/// Twenty clients who say nothing that a port knows: each gets an answer, or is hung up on.
pub(crate) fn garbage(port: u16) {
    let mut random = StdRng::seed_from_u64(port.into());
    for _ in 0..20 {
        let mut bytes = vec![0; 16_000];
        random.fill(&mut bytes[..]);
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

/// Two who read nothing hold both places of their lane until their time is over; who asks in another lane does not wait.
#[tokio::test(flavor = "multi_thread")]
async fn who_stops_reading_at_any_door_loses_its_statement_and_nobody_else_does() {
    let directory = tempfile::tempdir().unwrap();
    let lanes = "[query]\ntimeout = \"4s\"\n[[query.lane]]\nname = \"default\"\nrunning = 2\nwaiting = 2\n\
                 [[query.lane]]\nname = \"dashboard\"\n";
    let cloud = stage_open_with(directory.path(), lanes).await;
    let long = "SELECT v, v AS w FROM generate_series(1, 1000000000) AS a(v)";
    let (running, before) = ("SELECT count(*) FROM system.queries WHERE state = 'running'", resident(&cloud));
    let quick = async |statement: &str| {
        let request = reqwest::Client::new().post(format!("{}/v1/sql?lane=dashboard", cloud.http));
        let answer = request.header("accept", "application/json").body(statement.to_owned()).send().await.unwrap();
        answer.json::<Value>().await.unwrap()[0].clone()
    };
    for door in DOORS {
        let stuck = [at(door, &cloud).await.stall(long).await, at(door, &cloud).await.stall(long).await];
        let started = Instant::now();
        // They, and the one that asks.
        while quick(running).await != json!({ "count(*)": 3 }) {
            assert!(started.elapsed() < PATIENCE, "{door}: they do not run");
            tokio::time::sleep(POLL).await;
        }
        assert_eq!(quick("SELECT count(*) AS n FROM load").await, json!({ "n": 100 }));
        let rows = at(door, &cloud).await.ask("SELECT count(*) FROM load").await.unwrap();
        assert_eq!(rows, [["100"]], "{door}: one more waits until a stuck one's time is over");
        let grown = resident(&cloud).saturating_sub(before);
        println!("{door}: waited {:?}; {} MiB more", started.elapsed(), grown >> 20);
        assert!(grown < 200 << 20, "{door}");
        drop(stuck);
        while quick(running).await != json!({ "count(*)": 1 }) {
            assert!(started.elapsed() < PATIENCE, "{door}: they go on");
            tokio::time::sleep(POLL).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_has_the_lanes_that_are_set_for_it_and_an_answer_that_broke_off_does_not_look_whole() {
    let directory = tempfile::tempdir().unwrap();
    let lanes = "[query]\ntimeout = \"1s\"\n[[query.lane]]\nname = \"dashboard\"\n";
    let cloud = stage_with(directory.path(), lanes).await;
    let client = reqwest::Client::new();
    let ask = |name: &'static str, statement: &str| {
        let request = client.post(format!("{}/v1/sql?lane=dashboard", cloud.http)).basic_auth(name, Some("right"));
        request.header("accept", "application/json").body(statement.to_owned()).send()
    };
    let answer = ask("quick", "SELECT count(*) AS n FROM load").await.unwrap();
    assert_eq!(answer.json::<Value>().await.unwrap(), json!([{"n": 100}]));
    assert_eq!(ask("analyst", "SELECT 1").await.unwrap().status(), 400);
    let long = "SELECT v, v AS w FROM generate_series(1, 1000000000) AS a(v)";
    let request = client.post(format!("{}/v1/sql", cloud.http)).header("accept", "application/x-ndjson");
    let answer = request.basic_auth("analyst", Some("right")).body(long).send().await.unwrap();
    assert!(answer.bytes().await.is_err(), "it ended as if it were whole");
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
