//! The parts of a test: Mosquitto, `weir cloud` and an edge agent as processes that can be killed, and a sender that keeps
//! the rules of an edge without being one.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event, MqttOptions};
use serde_json::Value;
use wire::request::{KIND_BATCH, KIND_SCHEMA, push_frame};
use wire::sealed::NO_WATERMARK;
use wire::{Acks, CutBatch, FieldType, Mark, RefusedRequest, SealedBatch, Seq, SpoolId, StreamField, StreamSchema};

use crate::process::{PATIENCE, POLL, Process, free_port};

pub(crate) const EDGE: &str = "gw-test";
pub(crate) const TOKEN: &str = "a-token-of-the-tests";

/// `weir cloud`, a process.
#[derive(Debug)]
pub(crate) struct Cloud {
    process: Process,
    pub(crate) http: String,
    pub(crate) postgres: u16,
    pub(crate) flight_sql: u16,
    config: PathBuf,
    /// The configuration.
    text: String,
    client: reqwest::Client,
}

impl Cloud {
    /// A node with its WAL in `directory/name` and its tables in `directory/tables`. `more` is added to its
    /// configuration.
    pub(crate) async fn start(directory: &Path, name: &str, more: &str) -> Self {
        let tables = directory.join("tables");
        std::fs::create_dir_all(&tables).unwrap();
        let store = format!("url = \"file://{}\"", tables.canonicalize().unwrap().display());
        Self::start_on(directory, name, &store, &[], more).await
    }

    /// A node that speaks TLS, as `tls` says, with this certificate.
    pub(crate) async fn start_tls(directory: &Path, tls: &str, certificate: &str) -> Self {
        let trusted = reqwest::Certificate::from_pem(&std::fs::read(certificate).unwrap()).unwrap();
        let client = reqwest::Client::builder().tls_certs_only([trusted]).build().unwrap();
        let tables = directory.join("tables");
        std::fs::create_dir_all(&tables).unwrap();
        let store = format!("url = \"file://{}\"", tables.canonicalize().unwrap().display());
        Self::start_at("https", client, directory, "a", (&store, &[]), tls, "").await
    }

    /// One whose tables are in this store.
    pub(crate) async fn start_on(
        directory: &Path,
        name: &str,
        store: &str,
        environment: &[(&'static str, &str)],
        more: &str,
    ) -> Self {
        Self::start_at("http", reqwest::Client::new(), directory, name, (store, environment), "", more).await
    }

    async fn start_at(
        scheme: &str,
        client: reqwest::Client,
        directory: &Path,
        name: &str,
        (store, environment): (&str, &[(&'static str, &str)]),
        tls: &str,
        more: &str,
    ) -> Self {
        let (port, postgres, flight_sql) = (free_port(), free_port(), free_port());
        let config = directory.join(format!("{name}.toml"));
        let text = format!(
            "data_dir = \"{}\"\n[store]\n{store}\n[listen]\nhttp = \"127.0.0.1:{port}\"\n\
             postgres = \"127.0.0.1:{postgres}\"\nflight_sql = \"127.0.0.1:{flight_sql}\"\n{tls}\
             [[edge]]\nid = \"{EDGE}\"\ntoken = \"{TOKEN}\"\n{more}",
            directory.join(name).display(),
        );
        std::fs::write(&config, &text).unwrap();
        let process =
            Process::weir(name, &["cloud", "--config", config.to_str().unwrap()], directory).with(environment);
        let http = format!("{scheme}://127.0.0.1:{port}");
        let mut cloud = Self { process, http, postgres, flight_sql, config, text, client };
        cloud.run();
        cloud.wait().await;
        cloud
    }

    /// Its process id, while it runs.
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Another token of the edge, from the next start on.
    pub(crate) fn expect_token(&self, token: &str) {
        std::fs::write(&self.config, self.text.replace(TOKEN, token)).unwrap();
    }

    /// Starts the process, which must not run.
    pub(crate) fn run(&mut self) {
        self.process.start();
    }

    /// Ends by itself at this place, from the next start on.
    pub(crate) fn end_at(&mut self, failpoint: Option<&str>) {
        let place = failpoint.map(|place| ("WEIR_FAILPOINT", place));
        self.process.set_variables(place.as_slice());
    }

    /// Whether it has ended by itself.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.process.has_ended()
    }

    /// Its configuration, for other commands on the same store.
    pub(crate) fn config(&self) -> &Path {
        &self.config
    }

    /// Waits until it is ready.
    pub(crate) async fn wait(&mut self) {
        wait_for_success(&self.client, &format!("{}/ready", self.http), &mut self.process).await;
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }

    /// SIGTERM, and waits for the end.
    pub(crate) fn stop(&mut self) {
        self.process.stop();
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

    /// Rows of all tables.
    pub(crate) async fn stored_rows(&self) -> u64 {
        let tables = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'";
        let mut rows = 0;
        for table in self.sql(tables).await.unwrap() {
            let table = table["table_name"].as_str().unwrap();
            rows += self.integer(&format!("SELECT count(*) FROM {table}")).await as u64;
        }
        rows
    }

    /// Checks that the counters of the door balance (rule 6), and returns them: received, durable, duplicate, refused,
    /// pushed back. They count from this process's start, and no request may be under way.
    pub(crate) async fn check_rows(&self) -> [u64; 5] {
        let mut counts = [0; 5];
        for (count, name) in counts.iter_mut().zip(["received", "durable", "duplicate", "refused", "pushed_back"]) {
            *count = self.counter(&format!("weir_cloud_rows_{name}_total")).await;
        }
        assert_eq!(counts[0], counts[1..].iter().sum::<u64>(), "{counts:?}");
        counts
    }

    /// One counter of `/metrics`.
    pub(crate) async fn counter(&self, name: &str) -> u64 {
        let text = self.client.get(format!("{}/metrics", self.http)).send().await.unwrap().text().await.unwrap();
        let line = text.lines().find(|line| line.starts_with(&format!("{name} "))).expect("the counter is there");
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }
}

async fn wait_for_success(client: &reqwest::Client, url: &str, process: &mut Process) {
    let started = Instant::now();
    while !client.get(url).send().await.is_ok_and(|answer| answer.status().is_success()) {
        process.check(started, "is not ready");
        tokio::time::sleep(POLL).await;
    }
}

/// An edge agent, a process.
#[derive(Debug)]
pub(crate) struct Edge {
    process: Process,
    config: PathBuf,
    /// The configuration without sources and streams.
    head: String,
    admin: String,
    client: reqwest::Client,
}

impl Edge {
    /// One that sends to `cloud`; `more` is added to its configuration: sources and streams.
    pub(crate) async fn start(directory: &Path, cloud: &Cloud, more: &str) -> Self {
        Self::start_with(directory, &[&cloud.http], more).await
    }

    /// One that sends to the first of these addresses that answers.
    pub(crate) async fn start_with(directory: &Path, urls: &[&str], more: &str) -> Self {
        Self::start_as(directory, (EDGE, TOKEN), urls, more).await
    }

    /// Another edge, with its token.
    pub(crate) async fn start_as(directory: &Path, (id, token): (&str, &str), urls: &[&str], more: &str) -> Self {
        let port = free_port();
        let config = directory.join("edge.toml");
        let head = format!(
            "[edge]\nid = \"{id}\"\ndata_dir = \"{}\"\n[admin]\nlisten = \"127.0.0.1:{port}\"\n\
             [clock]\ntrust = \"always\"\n[cloud]\nurls = {urls:?}\ntoken = \"{token}\"\n",
            directory.join("edge").display(),
        );
        let process = Process::weir("edge", &["edge", "run", "--config", config.to_str().unwrap()], directory);
        let admin = format!("http://127.0.0.1:{port}");
        let mut edge = Self { process, config, head, admin, client: reqwest::Client::new() };
        edge.configure(more);
        edge.run();
        edge.wait().await;
        edge
    }

    /// Other sources and streams, from the next start on.
    pub(crate) fn configure(&self, more: &str) {
        std::fs::write(&self.config, format!("{}{more}", self.head)).unwrap();
    }

    /// SIGHUP: it reads its configuration.
    pub(crate) fn hang_up(&self) {
        self.process.signal("HUP");
    }

    /// Starts the process, which must not run.
    pub(crate) fn run(&mut self) {
        self.process.start();
    }

    /// Ends by itself at this place, from the next start on.
    pub(crate) fn end_at(&mut self, failpoint: Option<&str>) {
        let place = failpoint.map(|place| ("WEIR_FAILPOINT", place));
        self.process.set_variables(place.as_slice());
    }

    /// Whether it has ended by itself.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.process.has_ended()
    }

    /// Waits until its sources are connected.
    pub(crate) async fn wait(&mut self) {
        wait_for_success(&self.client, &format!("{}/ready", self.admin), &mut self.process).await;
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }

    /// SIGTERM, and waits for the end.
    pub(crate) fn stop(&mut self) {
        self.process.stop();
    }

    /// Panics with its log when it has ended by itself, or when `since` is too long ago.
    pub(crate) fn check(&mut self, since: Instant, what: &str) {
        self.process.check(since, what);
    }

    /// User and system time since its start.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        self.process.cpu_seconds()
    }

    pub(crate) async fn status(&self) -> Value {
        self.try_status().await.expect("the admin door answers")
    }

    /// None while it starts.
    pub(crate) async fn try_status(&self) -> Option<Value> {
        self.client.get(format!("{}/status", self.admin)).send().await.ok()?.json().await.ok()
    }

    /// Waits until all that it has is committed, and checks that its counters balance (rule 6).
    pub(crate) async fn drained(&mut self) -> Value {
        let started = Instant::now();
        let number = |status: &Value| status["published"].as_u64().unwrap();
        let seen = number(&self.status().await);
        loop {
            let status = self.status().await;
            // One that was begun after this was asked.
            if status["drained"] == true && number(&status) >= seen + 2 {
                check_counters(&status);
                return status;
            }
            self.process.check(started, &format!("is not drained: {status:#}"));
            tokio::time::sleep(POLL).await;
        }
    }
}

fn check_counters(status: &Value) {
    for source in status["sources"].as_array().unwrap() {
        let count = |name: &str| source[name].as_u64().unwrap();
        assert_eq!(count("received"), count("journalled") + count("redelivered"), "{source:#}");
        let decided =
            count("accepted") + count("quarantined") + count("duplicate") + count("waiting") + count("filtered");
        assert_eq!(count("read"), decided, "{source:#}");
    }
    let count = |name: &str| status["rows"][name].as_u64().unwrap();
    let placed = count("committed") + count("spooled") + count("lost") + count("voided");
    assert_eq!(count("sealed"), placed, "{:#}", status["rows"]);
}

/// Mosquitto with persistence and no limits on what it queues.
#[derive(Debug)]
pub(crate) struct Mosquitto {
    process: Process,
    pub(crate) port: u16,
}

impl Mosquitto {
    /// None, and a word about it, when it is not installed.
    pub(crate) fn start(directory: &Path) -> Option<Self> {
        Self::start_with(directory, "allow_anonymous true\n")
    }

    /// `more` says who may come in, and how.
    pub(crate) fn start_with(directory: &Path, more: &str) -> Option<Self> {
        let places = ["/usr/sbin/mosquitto", "/usr/local/sbin/mosquitto", "/usr/bin/mosquitto"].map(Path::new);
        let Some(program) = places.into_iter().find(|path| path.exists()) else {
            println!("left out: Mosquitto is not installed");
            return None;
        };
        let port = free_port();
        let data = directory.join("mosquitto");
        std::fs::create_dir_all(&data).unwrap();
        let config = directory.join("mosquitto.conf");
        // As root it would give up the right to its own directory.
        let user = std::env::var("USER").unwrap_or_else(|_| "root".into());
        let text = format!(
            "listener {port} 127.0.0.1\n{more}persistence true\npersistence_location {}/\n\
             autosave_interval 1\nmax_queued_messages 0\nmax_inflight_messages 0\nuser {user}\n",
            data.display()
        );
        std::fs::write(&config, text).unwrap();
        let process = Process::new("mosquitto", program, &["-c", config.to_str().unwrap()], directory);
        let mut broker = Self { process, port };
        broker.run();
        Some(broker)
    }

    /// Another port of it speaks TLS: it, the port, and where its certificate lies. None, and a word about it, when it or
    /// openssl is not installed.
    pub(crate) fn start_tls(directory: &Path) -> Option<(Self, u16, String)> {
        let (certificate, key) = certificate(directory, "broker")?;
        let port = free_port();
        let doors = format!("allow_anonymous true\nlistener {port} 127.0.0.1\ncertfile {certificate}\nkeyfile {key}\n");
        Self::start_with(directory, &doors).map(|broker| (broker, port, certificate))
    }

    /// Starts it, and waits until it listens.
    pub(crate) fn run(&mut self) {
        self.process.start();
        let started = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            self.process.check(started, "does not listen");
            std::thread::sleep(POLL);
        }
    }

    /// kill -9: it may lose what it acknowledged.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }

    /// SIGTERM: it writes what it has.
    pub(crate) fn stop(&mut self) {
        self.process.stop();
    }

    pub(crate) fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    /// Options of a client of this broker.
    pub(crate) fn client(&self, id: &str) -> MqttOptions {
        MqttOptions::new(id, "127.0.0.1", self.port)
    }
}

/// A certificate of 127.0.0.1 that is its own authority, and its key: PEM. None, and a word about it, without openssl.
pub(crate) fn certificate(directory: &Path, name: &str) -> Option<(String, String)> {
    let at = |kind: &str| directory.join(format!("{name}.{kind}.pem")).display().to_string();
    let (certificate, key) = (at("certificate"), at("key"));
    let made = std::process::Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"])
        .args(["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"])
        .args(["-keyout", &key, "-out", &certificate])
        .output();
    if !made.is_ok_and(|made| made.status.success()) {
        println!("left out: openssl is not installed");
        return None;
    }
    Some((certificate, key))
}

/// Publishes topics and payloads at QoS 1, and waits for every acknowledgement.
pub(crate) async fn publish(options: MqttOptions, messages: Vec<(String, Vec<u8>)>) {
    let (client, mut events) = AsyncClient::new(options, 100);
    let mut open = messages.len();
    let sender = tokio::spawn(async move {
        for (topic, payload) in messages {
            client.publish(topic, QoS::AtLeastOnce, false, payload).await.unwrap();
        }
        client
    });
    while open > 0 {
        if let Event::Incoming(Packet::PubAck(_)) = events.poll().await.unwrap() {
            open -= 1;
        }
    }
    sender.await.unwrap().disconnect().await.unwrap();
    while events.poll().await.is_ok() {}
}

/// Configuration of a source that fills `stream` with what `topic` brings; `more` is the rest of the source, its map,
/// and the stream.
pub(crate) fn mqtt_source(url: &str, topic: &str, stream: &str, more: &str) -> String {
    format!("[[source]]\nkind = \"mqtt\"\nurl = \"{url}\"\ntopics = [\"{topic}\"]\nstream = \"{stream}\"\n{more}")
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
    /// Version of the agent, and of its configuration.
    pub(crate) sealed_by: (&'static str, u64),
}

impl Chain {
    pub(crate) fn new(stream: &str, schema: Arc<StreamSchema>) -> Self {
        let (spool, stream) = (SpoolId(rand::random()), stream.into());
        Self { spool, stream, schema, last: Mark::default(), sealed_by: ("test", 0) }
    }

    /// The next batch of the sequence.
    pub(crate) fn seal(&mut self, rows: &RecordBatch) -> SealedBatch {
        let (agent, configuration) = self.sealed_by;
        let stream = self.stream.parse().unwrap();
        let cut = CutBatch::seal(stream, &self.schema, rows, NO_WATERMARK, agent, configuration).unwrap();
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
