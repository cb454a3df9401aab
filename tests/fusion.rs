//! A reader that asks without pause while commits happen never misses a row and never sees one twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::harness::{Answer, Chain, Cloud, Sender, load_rows, load_schema};

const COMMITS: u64 = 1_000;
/// As many questions at least: who commits goes before who asks.
const ASKED: u32 = 30;
const EXECUTIONS: u32 = 1_000;

/// Sends rows in order, ten at a time, until it is finished.
struct Load {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicI64>,
    acknowledged: Arc<AtomicI64>,
    task: JoinHandle<()>,
}

impl Load {
    /// Runs, and the first rows are acknowledged.
    async fn start(cloud: &Cloud) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (sent, acknowledged) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicI64::new(0)));
        let task = tokio::spawn({
            let (stop, sender, mut chain) = (Arc::clone(&stop), Sender::to(cloud), Chain::new("load", load_schema()));
            let (sent, acknowledged) = (Arc::clone(&sent), Arc::clone(&acknowledged));
            async move {
                while !stop.load(Ordering::Relaxed) {
                    let first = sent.load(Ordering::SeqCst);
                    let batch = chain.seal(&load_rows(first, 10));
                    sent.store(first + 10, Ordering::SeqCst);
                    let answer = sender.send(&chain.schema, &[batch]).await;
                    assert!(matches!(answer, Answer::Acks(_)), "{answer:?}");
                    acknowledged.store(first + 10, Ordering::SeqCst);
                }
            }
        });
        let load = Self { stop, sent, acknowledged, task };
        while load.acknowledged() == 0 {
            tokio::task::yield_now().await;
        }
        load
    }

    fn sent(&self) -> i64 {
        self.sent.load(Ordering::SeqCst)
    }

    fn acknowledged(&self) -> i64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    async fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
    }
}

/// One statement, parsed once at the Postgres door: the protocol by hand, as a client library may parse again unseen.
struct Prepared {
    socket: TcpStream,
}

impl Prepared {
    async fn new(port: u16, statement: &str) -> Self {
        let mut prepared = Self { socket: TcpStream::connect(("127.0.0.1", port)).await.unwrap() };
        let startup = b"\0\x03\0\0user\0reader\0database\0weir\0\0";
        prepared.socket.write_all(&[&(startup.len() as u32 + 4).to_be_bytes()[..], startup].concat()).await.unwrap();
        prepared.rows().await;
        let parse = format!("once\0{statement}\0\0\0");
        prepared.push(b'P', parse.as_bytes()).await;
        prepared
    }

    async fn push(&mut self, kind: u8, body: &[u8]) {
        let length = (body.len() as u32 + 4).to_be_bytes();
        self.socket.write_all(&[&[kind][..], &length, body].concat()).await.unwrap();
    }

    /// Executes it with one parameter, as text; the integers of the one row that it gives.
    async fn execute(&mut self, parameter: &str) -> Vec<i64> {
        let length = (parameter.len() as u32).to_be_bytes();
        let bind = [b"\0once\0\0\0\0\x01", &length[..], parameter.as_bytes(), b"\0\0"].concat();
        self.push(b'B', &bind).await;
        self.push(b'E', b"\0\0\0\0\0").await;
        self.push(b'S', b"").await;
        let mut rows = self.rows().await;
        assert_eq!(rows.len(), 1, "{rows:?}");
        rows.remove(0)
    }

    /// Rows of integers until the door is ready again.
    async fn rows(&mut self) -> Vec<Vec<i64>> {
        let mut rows = Vec::new();
        loop {
            let kind = self.socket.read_u8().await.unwrap();
            let mut body = vec![0; self.socket.read_u32().await.unwrap() as usize - 4];
            self.socket.read_exact(&mut body).await.unwrap();
            match kind {
                b'D' => rows.push(integers(&body)),
                b'E' => panic!("{}", String::from_utf8_lossy(&body).replace('\0', " ")),
                b'Z' => return rows,
                _ => {}
            }
        }
    }
}

/// The columns of a row, which are integers as text.
fn integers(row: &[u8]) -> Vec<i64> {
    let mut rest = &row[2..];
    let mut found = Vec::new();
    while let Some((length, more)) = rest.split_first_chunk() {
        let (text, more) = more.split_at(u32::from_be_bytes(*length) as usize);
        found.push(std::str::from_utf8(text).unwrap().parse().unwrap());
        rest = more;
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn no_row_is_missing_or_doubled_while_commits_happen() {
    let directory = tempfile::tempdir().unwrap();
    // Every tick commits; nothing stays hot for long.
    let cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"1ms\"\n").await;
    let load = Load::start(&cloud).await;
    let statement = "SELECT (SELECT count(*) FROM load) AS left_rows, count(*) AS right_rows, sum(n) AS total, \
                     (SELECT count(*) FROM load a JOIN load b ON a.n = b.n) AS joined FROM load";
    let (mut before, mut asked) = (0, 0);
    while asked < ASKED || cloud.counter("weir_cloud_commits_total").await < COMMITS {
        let least = load.acknowledged();
        let row = cloud.sql(statement).await.unwrap().remove(0);
        let most = load.sent();
        let count = row["right_rows"].as_i64().unwrap();
        assert!(least <= count && count <= most, "{least} acknowledged, {count} seen, {most} sent");
        assert!(count >= before, "{count} after {before}");
        assert_eq!(row["left_rows"], row["right_rows"], "one statement, two states");
        assert_eq!(row["joined"], row["right_rows"], "the two sides of a self-join differ");
        assert_eq!(row["total"].as_i64().unwrap(), count * (count - 1) / 2, "other rows than the first {count}");
        (before, asked) = (count, asked + 1);
    }
    load.finish().await;
    println!("{asked} statements over {} commits", cloud.counter("weir_cloud_commits_total").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_prepared_once_sees_fresh_rows_while_commits_happen() {
    let directory = tempfile::tempdir().unwrap();
    // Not every tick: a thousand questions about a thousand files take long.
    let cloud = Cloud::start(directory.path(), "a", "[commit]\nmax_age = \"1s\"\n").await;
    let load = Load::start(&cloud).await;
    let mut statement =
        Prepared::new(cloud.postgres, "SELECT count(*), sum(n), (SELECT max(n) FROM load) FROM load WHERE n >= $1")
            .await;
    let (mut before, mut fresh) = (0, 0);
    let commits = cloud.counter("weir_cloud_commits_total").await;
    for execution in 0..EXECUTIONS {
        let least = load.acknowledged();
        let row = statement.execute("0").await;
        let most = load.sent();
        let count = row[0];
        assert!(least <= count && count <= most, "{execution}: {least} acknowledged, {count} seen, {most} sent");
        assert!(count >= before, "{execution}: {count} after {before}");
        assert_eq!(row, [count, count * (count - 1) / 2, count - 1], "{execution}");
        fresh += u32::from(count > before);
        before = count;
    }
    load.finish().await;
    let commits = cloud.counter("weir_cloud_commits_total").await - commits;
    println!("{fresh} of {EXECUTIONS} executions saw new rows, over {commits} commits");
    assert!(fresh > EXECUTIONS / 20 && commits > 5, "nothing new came meanwhile: nothing was tried");
}
