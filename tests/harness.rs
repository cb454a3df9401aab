//! The parts of a test: `weir cloud` as a process that can be killed, and a sender that keeps the rules of an edge.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use serde_json::Value;
use wire::request::{KIND_BATCH, KIND_SCHEMA, push_frame};
use wire::sealed::NO_WATERMARK;
use wire::{Acks, CutBatch, FieldType, Mark, RefusedRequest, SealedBatch, Seq, SpoolId, StreamField, StreamSchema};

/// How long a process may take until it answers.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
pub(crate) const EDGE: &str = "gw-test";
pub(crate) const TOKEN: &str = "a-token-of-the-tests";

/// A port that was free a moment ago. A process that is restarted has to keep its port, so it cannot be 0.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// `weir cloud`, a process.
#[derive(Debug)]
pub(crate) struct Cloud {
    config: PathBuf,
    log: PathBuf,
    child: Option<Child>,
    pub(crate) http: String,
    client: reqwest::Client,
}

impl Cloud {
    /// A node with its WAL in `directory/name` and its tables in `directory/tables`. `more` is added to its
    /// configuration.
    pub(crate) async fn start(directory: &Path, name: &str, more: &str) -> Self {
        let port = free_port();
        let tables = directory.join("tables");
        std::fs::create_dir_all(&tables).unwrap();
        let config = directory.join(format!("{name}.toml"));
        let text = format!(
            "data_dir = \"{}\"\n[store]\nurl = \"file://{}\"\n[listen]\nhttp = \"127.0.0.1:{port}\"\n\
             postgres = \"127.0.0.1:0\"\n[[edge]]\nid = \"{EDGE}\"\ntoken = \"{TOKEN}\"\n{more}",
            directory.join(name).display(),
            tables.canonicalize().unwrap().display(),
        );
        std::fs::write(&config, text).unwrap();
        let log = directory.join(format!("{name}.log"));
        let http = format!("http://127.0.0.1:{port}");
        let mut cloud = Self { config, log, child: None, http, client: reqwest::Client::new() };
        cloud.run();
        cloud.wait().await;
        cloud
    }

    /// Starts the process, which must not run.
    pub(crate) fn run(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        let log = std::fs::File::options().create(true).append(true).open(&self.log).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(["cloud", "--config"])
            .arg(&self.config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    /// Waits until it is ready.
    pub(crate) async fn wait(&self) {
        let started = Instant::now();
        while !self.ready().await {
            assert!(started.elapsed() < PATIENCE, "the cloud is not ready:\n{}", self.log_tail());
            tokio::time::sleep(POLL).await;
        }
    }

    async fn ready(&self) -> bool {
        let answer = self.client.get(format!("{}/ready", self.http)).send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        assert!(child.try_wait().unwrap().is_none(), "the cloud ended by itself:\n{}", self.log_tail());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGTERM, and waits for the end.
    pub(crate) fn stop(&mut self) {
        let mut child = self.child.take().expect("it runs");
        assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
        let started = Instant::now();
        while child.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < PATIENCE, "the cloud does not stop:\n{}", self.log_tail());
            std::thread::sleep(POLL);
        }
    }

    fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// Rows of a statement, as JSON objects.
    pub(crate) async fn sql(&self, statement: &str) -> anyhow::Result<Vec<Value>> {
        let request = self.client.post(format!("{}/v1/sql", self.http)).header("accept", "application/json");
        let response = request.body(statement.to_owned()).send().await?;
        let status = response.status();
        let text = response.text().await?;
        if !status.is_success() {
            bail!("{statement}: {text}");
        }
        serde_json::from_str(&text).with_context(|| format!("{statement}: {text}"))
    }

    /// The one integer that a statement gives.
    pub(crate) async fn integer(&self, statement: &str) -> i64 {
        let rows = self.sql(statement).await.unwrap();
        rows[0].as_object().unwrap().values().next().unwrap().as_i64().unwrap()
    }

    /// One counter of `/metrics`.
    pub(crate) async fn counter(&self, name: &str) -> u64 {
        let text = self.client.get(format!("{}/metrics", self.http)).send().await.unwrap().text().await.unwrap();
        let line = text.lines().find(|line| line.starts_with(&format!("{name} "))).expect("the counter is there");
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// The schema of the tests' stream `load`: a number that says which row it is.
pub(crate) fn load_schema() -> Arc<StreamSchema> {
    let fields = vec![StreamField { name: "n".parse().unwrap(), kind: FieldType::Int64 }];
    Arc::new(StreamSchema::new(fields).unwrap())
}

/// 2024-01-01T00:00:00Z
const START_US: i64 = 1_704_067_200_000_000;

/// Rows `first .. first + count` of the stream `load`, a millisecond apart.
pub(crate) fn load_rows(first: i64, count: usize) -> RecordBatch {
    let numbers = first..first + count as i64;
    let ts = TimestampMicrosecondArray::from_iter_values(numbers.clone().map(|n| START_US + n * 1_000));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(ts.with_timezone("UTC")),
        Arc::new(StringArray::from_iter_values(numbers.clone().map(|n| format!("dev-{}", n % 7)))),
        Arc::new(Int64Array::from_iter_values(numbers)),
        Arc::new(StringArray::from_iter_values(std::iter::repeat_n("good", count))),
    ];
    RecordBatch::try_new(load_schema().arrow().clone(), columns).unwrap()
}

/// One spool's sequence of one stream: numbers batches as an edge does.
#[derive(Debug, Clone)]
pub(crate) struct Chain {
    pub(crate) spool: SpoolId,
    pub(crate) stream: String,
    pub(crate) schema: Arc<StreamSchema>,
    pub(crate) last: Mark,
}

impl Chain {
    pub(crate) fn new(stream: &str, schema: Arc<StreamSchema>) -> Self {
        Self { spool: SpoolId(rand::random()), stream: stream.into(), schema, last: Mark::default() }
    }

    /// The next batch of the sequence.
    pub(crate) fn seal(&mut self, rows: &RecordBatch) -> SealedBatch {
        let cut = CutBatch::seal(self.stream.parse().unwrap(), &self.schema, rows, NO_WATERMARK, "test", 0).unwrap();
        let batch = cut.number(&EDGE.parse().unwrap(), self.spool, self.last.seq.next(), self.last.crc);
        self.last = Mark { seq: batch.header().seq, crc: batch.crc() };
        batch
    }
}

/// What a node answered.
#[derive(Debug)]
pub(crate) enum Answer {
    Acks(Acks),
    Refused(RefusedRequest),
    /// No answer, or not one of ours: it may have been taken or not.
    None,
}

/// Sends requests to a node.
#[derive(Debug, Clone)]
pub(crate) struct Sender {
    pub(crate) client: reqwest::Client,
    pub(crate) url: String,
    pub(crate) token: String,
}

impl Sender {
    pub(crate) fn to(cloud: &Cloud) -> Self {
        let client = reqwest::Client::builder().timeout(PATIENCE).build().unwrap();
        Self { client, url: cloud.http.clone(), token: TOKEN.into() }
    }

    pub(crate) async fn send(&self, schema: &StreamSchema, batches: &[SealedBatch]) -> Answer {
        let mut body = Vec::new();
        push_frame(&mut body, KIND_SCHEMA, schema.canonical().as_bytes());
        for batch in batches {
            push_frame(&mut body, KIND_BATCH, batch.bytes());
        }
        self.send_body(body).await
    }

    pub(crate) async fn send_body(&self, body: Vec<u8>) -> Answer {
        let request = self.client.post(format!("{}/v1/edges/{EDGE}/batches", self.url));
        read(request.bearer_auth(&self.token).body(body).send().await).await
    }

    pub(crate) async fn positions(&self, spool: SpoolId) -> Answer {
        let request = self.client.get(format!("{}/v1/edges/{EDGE}/positions?spool={spool}", self.url));
        read(request.bearer_auth(&self.token).send().await).await
    }
}

async fn read(response: reqwest::Result<reqwest::Response>) -> Answer {
    let Ok(response) = response else { return Answer::None };
    let success = response.status().is_success();
    let Ok(text) = response.text().await else { return Answer::None };
    if success {
        return serde_json::from_str(&text).map_or(Answer::None, Answer::Acks);
    }
    serde_json::from_str(&text).map_or(Answer::None, Answer::Refused)
}

impl Answer {
    /// How far the one sequence of the answer is durable and committed.
    pub(crate) fn marks(&self) -> (Seq, Seq) {
        let Self::Acks(acks) = self else { panic!("{self:?}") };
        let [ack] = &acks.acks[..] else { panic!("{acks:?}") };
        (ack.durable.seq, ack.committed.seq)
    }
}
