//! The door as a client meets it on the wire, with the protocol written out: no client library is at hand.

use std::net::Ipv4Addr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::engine::tests::engine;

const MINUTE: Duration = Duration::from_secs(60);

struct Client {
    socket: TcpStream,
    out: Vec<u8>,
}

/// What came until the door was ready again.
#[derive(Debug, Default, PartialEq, Eq)]
struct Answer {
    columns: Vec<String>,
    rows: Vec<Vec<Option<String>>>,
    error: Option<String>,
    /// What a COPY sent.
    copied: String,
}

impl Client {
    async fn connect(engine: Arc<crate::engine::Engine>) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let house = House { engine, readers: Readers::default(), tls: None, connections_max: 256 };
        tokio::spawn(serve(listener, house, CancellationToken::new()));
        let mut client = Self { socket: TcpStream::connect(address).await.unwrap(), out: Vec::new() };
        let startup = b"\0\x03\0\0user\0reader\0database\0weir\0\0";
        client.out.extend((startup.len() as u32 + 4).to_be_bytes());
        client.out.extend(startup);
        client.answer().await;
        client
    }

    /// Puts a message into what is sent next.
    fn push(&mut self, kind: u8, body: &[u8]) -> &mut Self {
        self.out.push(kind);
        self.out.extend((body.len() as u32 + 4).to_be_bytes());
        self.out.extend(body);
        self
    }

    /// Simple query.
    async fn ask(&mut self, sql: &str) -> Answer {
        self.push(b'Q', format!("{sql}\0").as_bytes()).answer().await
    }

    /// Parse, without a round.
    fn prepare(&mut self, name: &str, sql: &str) -> &mut Self {
        self.push(b'P', format!("{name}\0{sql}\0\0\0").as_bytes())
    }

    /// Bind with these texts as parameters, Execute, Sync.
    async fn execute(&mut self, name: &str, parameters: &[&str]) -> Answer {
        let mut body = format!("\0{name}\0\0\0").into_bytes();
        body.extend((parameters.len() as u16).to_be_bytes());
        for parameter in parameters {
            body.extend((parameter.len() as u32).to_be_bytes());
            body.extend(parameter.as_bytes());
        }
        body.extend(b"\0\0");
        self.push(b'B', &body).push(b'E', b"\0\0\0\0\0").push(b'S', b"").answer().await
    }

    /// Sends what was pushed, and reads until ReadyForQuery.
    async fn answer(&mut self) -> Answer {
        self.socket.write_all(&std::mem::take(&mut self.out)).await.unwrap();
        let mut answer = Answer::default();
        loop {
            let kind = self.socket.read_u8().await.unwrap();
            let mut body = vec![0; self.socket.read_u32().await.unwrap() as usize - 4];
            self.socket.read_exact(&mut body).await.unwrap();
            match kind {
                b'T' => answer.columns = columns(&body),
                b'D' => answer.rows.push(row(&body)),
                b'd' => answer.copied.push_str(std::str::from_utf8(&body).unwrap()),
                b'E' => answer.error = Some(String::from_utf8_lossy(&body).replace('\0', " ")),
                b'Z' => return answer,
                _ => {}
            }
        }
    }

    /// The one integer of an answer.
    async fn integer(&mut self, sql: &str) -> i64 {
        integer(&self.ask(sql).await)
    }
}

fn integer(answer: &Answer) -> i64 {
    let [row] = &answer.rows[..] else { panic!("{answer:?}") };
    row[0].as_ref().unwrap_or_else(|| panic!("{answer:?}")).parse().unwrap()
}

fn columns(mut body: &[u8]) -> Vec<String> {
    let count = u16::from_be_bytes([body[0], body[1]]);
    body = &body[2..];
    (0..count)
        .map(|_| {
            let end = body.iter().position(|byte| *byte == 0).unwrap();
            let name = String::from_utf8(body[..end].to_vec()).unwrap();
            // Table, column, type, size, modifier, format.
            body = &body[end + 1 + 18..];
            name
        })
        .collect()
}

fn row(mut body: &[u8]) -> Vec<Option<String>> {
    let mut take = |count: usize| {
        let (taken, rest) = body.split_at(count);
        body = rest;
        taken
    };
    let count = u16::from_be_bytes(take(2).try_into().unwrap());
    (0..count)
        .map(|_| {
            let length = i32::from_be_bytes(take(4).try_into().unwrap());
            usize::try_from(length).ok().map(|length| String::from_utf8(take(length).to_vec()).unwrap())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_prepared_once_sees_fresh_rows_a_thousand_times() {
    let (engine, traffic) = engine(1, 0, MINUTE).await;
    let mut client = Client::connect(engine).await;
    client.prepare("count", "SELECT count(*) FROM traffic WHERE vehicle_count >= $1");
    let mut arrived = 1;
    for execution in 0..1_000 {
        if execution % 60 == 59 {
            traffic.arrive(1);
            arrived += 1;
        }
        let answer = client.execute("count", &["5"]).await;
        assert_eq!(integer(&answer), arrived * 10 - 5, "execution {execution}: {answer:?}");
    }
    assert_eq!(arrived, 17);
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_of_one_name_are_told_apart() {
    let (engine, _) = engine(1, 0, MINUTE).await;
    let mut client = Client::connect(engine).await;
    let sql = "SELECT (SELECT count(*) FROM traffic), count(*) FROM traffic";
    let answer = client.ask(sql).await;
    assert_eq!(answer.columns, ["count(*)", "count(*)_2"], "{answer:?}");
    assert_eq!(answer.rows, [[Some("10".to_owned()), Some("10".to_owned())]]);
    let prepared = client.prepare("", sql).execute("", &[]).await;
    assert_eq!(prepared.rows, answer.rows, "{prepared:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subquery_is_answered_as_it_stands() {
    let (engine, _) = engine(1, 0, MINUTE).await;
    let mut client = Client::connect(engine).await;
    assert_eq!(client.integer("SELECT (SELECT max(traffic.vehicle_count) FROM traffic)").await, 9);
    assert_eq!(client.integer("SELECT (SELECT max(public.traffic.vehicle_count) FROM public.traffic) AS n").await, 9);
    assert_eq!(client.integer("SELECT (SELECT max(a.v) FROM generate_series(1, 3) AS a(v))").await, 3);
    let correlated = "SELECT (SELECT max(b.vehicle_count) FROM traffic b WHERE b.device = a.device) AS n \
                      FROM traffic a WHERE a.vehicle_count = 0";
    assert_eq!(client.integer(correlated).await, 8);
    let many = client.ask("SELECT (SELECT vehicle_count FROM traffic) AS n").await;
    assert!(many.error.is_some(), "{many:?}");
    let parameter = client.prepare("", "SELECT (SELECT max(vehicle_count) FROM traffic WHERE device = $1)");
    assert_eq!(integer(&parameter.execute("", &["d0"]).await), 8);
    // The catalogue's questions are still answered as psql asks them.
    let tables = "SELECT c.relname, (SELECT d.description FROM pg_catalog.pg_description d WHERE d.objoid = c.oid) \
                  FROM pg_catalog.pg_class c WHERE c.relname = 'traffic'";
    let answer = client.ask(tables).await;
    assert_eq!(answer.rows, [[Some("traffic".to_owned()), None]], "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_time_limit_is_shown() {
    let (engine, _) = engine(1, 0, MINUTE).await;
    let answer = Client::connect(engine).await.ask("SHOW statement_timeout").await;
    assert_eq!(answer.rows, [[Some("1min".to_owned())]], "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn functions_and_joins_of_time_answer_here_too() {
    // Six batches of ten rows and two devices, a day each from 2022-01-08: four cold, two hot.
    let (engine, _traffic) = engine(6, 0, MINUTE).await;
    let mut client = Client::connect(engine).await;
    for (sql, expected) in [
        ("SELECT count(*), min(ts) = max(ts) - INTERVAL '1 minute' FROM latest('traffic')", ["2", "t"].as_slice()),
        ("SELECT vehicle_count FROM latest('traffic') WHERE device = 'd1'", &["59"]),
        ("SELECT count(b.ts) FROM traffic a ASOF LEFT JOIN traffic b ON a.device = b.device AND a.ts > b.ts", &["58"]),
        (
            "SELECT count(*) FROM traffic a ASOF JOIN traffic b MATCH_CONDITION (a.ts >= b.ts) ON a.device = b.device",
            &["60"],
        ),
        ("SELECT last(vehicle_count, ts) FROM traffic WHERE device = 'd0'", &["58"]),
    ] {
        let answer = client.ask(sql).await;
        assert_eq!(answer.error, None, "{sql}");
        let values: Vec<&str> = answer.rows[0].iter().map(|value| value.as_deref().unwrap_or("NULL")).collect();
        assert_eq!(values, expected, "{sql}");
    }
    let sql = "SELECT count(*) FROM (SELECT time_bucket_gapfill('1 day', ts) AS b, count(*) FROM traffic \
               WHERE ts >= $1 AND ts < $2 GROUP BY b)";
    client.prepare("gaps", sql);
    let answer = client.execute("gaps", &["2022-01-01 00:00:00+00", "2022-01-31 00:00:00+00"]).await;
    assert_eq!((answer.error, answer.rows), (None, vec![vec![Some("30".to_owned())]]));
}

#[tokio::test(flavor = "multi_thread")]
async fn copy_sends_rows_and_ends_well() {
    let (engine, _) = engine(1, 0, MINUTE).await;
    let mut client = Client::connect(engine).await;
    let sql = "COPY (SELECT vehicle_count, device, quality FROM traffic ORDER BY 1 LIMIT 2) TO STDOUT";
    assert_eq!(client.ask(sql).await.copied, "0\td0\t\\N\n1\td1\t\\N\n");
    let csv = client.ask(&format!("{sql} WITH (FORMAT csv, HEADER)")).await;
    assert_eq!(csv.copied, "vehicle_count,device,quality\n0,d0,\n1,d1,\n");
    let table = client.ask("COPY traffic (vehicle_count) TO STDOUT CSV").await;
    assert_eq!(table.copied.lines().count(), 10, "{table:?}");
    let refused = client.ask("COPY traffic FROM STDIN").await;
    assert!(refused.error.unwrap().contains("25006"));
    let failed = client.ask("COPY (SELECT 1 / (vehicle_count - 5) FROM traffic) TO STDOUT").await;
    assert!(failed.error.unwrap().contains("22012"));
    assert_eq!(client.integer("SELECT count(*) FROM traffic").await, 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_have_their_class() {
    let (engine, _) = engine(1, 0, MINUTE).await;
    let mut client = Client::connect(engine).await;
    for (sql, code) in [
        ("SELECT * FROM trafic", "42P01"),
        ("SELECT devise FROM traffic", "42703"),
        ("SELEC 1", "42601"),
        ("DROP TABLE traffic", "25006"),
        ("INSERT INTO traffic (device) VALUES ('x')", "25006"),
        ("SELECT 1 / 0", "22012"),
        ("SELECT CAST('x' AS INT)", "22P02"),
        ("SELECT nosuch(1)", "42883"),
        ("SHOW nosuch", "42704"),
        ("SET weir.lane = 'fast'", "42501"),
    ] {
        let answer = client.ask(sql).await;
        let error = answer.error.unwrap_or_else(|| panic!("{sql}: {:?}", answer.rows));
        assert!(error.contains(&format!("C{code}")), "{sql}: {error}");
    }
    assert!(client.ask("SET weir.lane = 'default'").await.error.is_none());
    assert_eq!(client.ask("SHOW weir.lane").await.rows, [[Some("default".to_owned())]]);
    let told =
        client.ask("SELECT door, state FROM system.queries WHERE text LIKE '%nosuch(1)%' AND state = 'failed'").await;
    assert_eq!(told.rows, [[Some("postgres".to_owned()), Some("failed".to_owned())]], "{told:?}");
}
