//! Where the tables of a test are: a directory, or a bucket of an S3 server that is a process of its own (moto, from the
//! Python that WEIR_PYTHON names). The same tests run on both: see [`on_each_place`].

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cloud_ingest::store::Store;
use futures::TryStreamExt;
use object_store::ObjectStore;
use object_store::aws::{AmazonS3Builder, S3ConditionalPut};

use crate::harness::Cloud;
use crate::process::{POLL, Process, free_port};

/// Tests that take a [`Place`], on a disk and on S3.
macro_rules! on_each_place {
    ($($test:ident),+ $(,)?) => {
        mod on_disk {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                super::$test(crate::place::Place::on_disk()).await;
            })+
        }
        mod on_s3 {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                if let Some(place) = crate::place::Place::on_s3().await {
                    super::$test(place).await;
                }
            })+
        }
    };
}
pub(crate) use on_each_place;

/// Who may use the bucket.
pub(crate) const KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test")];

/// A place for tables, and a directory for everything else of a test.
pub(crate) struct Place {
    server: Option<S3Server>,
    directory: tempfile::TempDir,
}

impl Place {
    pub(crate) fn on_disk() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("tables")).unwrap();
        Self { server: None, directory }
    }

    /// None, and a word about it, when there is no such server.
    pub(crate) async fn on_s3() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let server = Some(S3Server::start(directory.path()).await?);
        Some(Self { server, directory })
    }

    /// For logs, configurations and WALs.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn server(&self) -> Option<&S3Server> {
        self.server.as_ref()
    }

    fn tables(&self) -> PathBuf {
        self.directory.path().join("tables").canonicalize().unwrap()
    }

    /// The keys of `[store]`.
    pub(crate) fn settings(&self) -> String {
        match &self.server {
            Some(server) => s3_settings(server.port),
            None => format!("url = \"file://{}\"", self.tables().display()),
        }
    }

    /// The store, in the process of the test.
    pub(crate) fn store(&self) -> Store {
        match &self.server {
            Some(server) => {
                let [(_, key), (_, secret)] = KEYS;
                let bucket = AmazonS3Builder::new()
                    .with_bucket_name("weir")
                    .with_endpoint(server.url())
                    .with_allow_http(true)
                    .with_access_key_id(key)
                    .with_secret_access_key(secret)
                    .with_conditional_put(S3ConditionalPut::ETagMatch);
                Store::on_objects("s3://weir/tables/".parse().unwrap(), Arc::new(bucket.build().unwrap()))
            }
            None => Store::open(&format!("file://{}", self.tables().display())).unwrap(),
        }
    }

    /// The objects of a table, rooted at it.
    pub(crate) fn table(&self, name: &str) -> Arc<dyn ObjectStore> {
        self.store().log_store(&name.parse().unwrap()).object_store(None)
    }

    /// Names of all objects of a table below a path.
    pub(crate) async fn names(&self, table: &str, below: &str) -> Vec<String> {
        let objects: Vec<_> = self.table(table).list(Some(&below.into())).try_collect().await.unwrap();
        objects.into_iter().map(|object| object.location.to_string()).collect()
    }

    /// The address of a table, and what `deltalake` and `polars` have to be told to get there, as JSON.
    pub(crate) fn address(&self, table: &str) -> (String, String) {
        let Some(server) = &self.server else {
            return (self.tables().join(table).to_str().unwrap().to_owned(), "{}".to_owned());
        };
        let mut options = serde_json::json!({ "AWS_ENDPOINT_URL": server.url(), "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true" });
        for (name, value) in KEYS {
            options[name] = value.into();
        }
        (format!("s3://weir/tables/{table}"), options.to_string())
    }

    /// A node whose tables are here.
    pub(crate) async fn cloud(&self, more: &str) -> Cloud {
        let keys = if self.server.is_some() { &KEYS[..] } else { &[] };
        Cloud::start_on(self.directory(), "a", &self.settings(), keys, more).await
    }

    /// `weir` with these arguments and a configuration, not started.
    pub(crate) fn weir(&self, arguments: &[&str], config: &Path) -> Process {
        let arguments = [arguments, &["--config", config.to_str().unwrap()]].concat();
        let process = Process::weir(arguments[0], &arguments, self.directory());
        if self.server.is_some() { process.with(&KEYS) } else { process }
    }

    /// The objects of all tables that are as old as this are a month old. They may be deleted meanwhile.
    pub(crate) async fn age(&self, oldest: Duration) {
        self.hands().age(oldest).await;
    }

    /// A month passes every few moments for what is older than that, so that vacuum and the clean-up of logs have to do while
    /// everything else goes on.
    pub(crate) fn aging(&self, oldest: Duration) -> Aging {
        let hands = self.hands();
        let pause = if self.server.is_some() { Duration::from_millis(500) } else { POLL };
        Aging(tokio::spawn(async move {
            loop {
                hands.age(oldest).await;
                tokio::time::sleep(pause).await;
            }
        }))
    }

    fn hands(&self) -> Hands {
        match &self.server {
            Some(server) => Hands::Server(server.url()),
            None => Hands::Disk(self.tables()),
        }
    }
}

/// Until it is dropped.
pub(crate) struct Aging(tokio::task::JoinHandle<()>);

impl Drop for Aging {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What makes objects old.
enum Hands {
    Disk(PathBuf),
    Server(String),
}

impl Hands {
    async fn age(&self, oldest: Duration) {
        match self {
            Self::Disk(tables) => age_files(tables, oldest),
            Self::Server(url) => {
                let url = format!("{url}/-/age?seconds={}", oldest.as_secs_f64());
                let answer = reqwest::Client::new().post(url).send().await.unwrap();
                assert!(answer.status().is_success());
            }
        }
    }
}

fn age_files(directory: &Path, oldest: Duration) {
    for entry in std::fs::read_dir(directory).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            age_files(&path, oldest);
            continue;
        }
        let now = std::time::SystemTime::now();
        let Ok(modified) = path.metadata().and_then(|meta| meta.modified()) else { continue };
        if modified + oldest <= now
            && let Ok(file) = std::fs::File::options().append(true).open(&path)
        {
            file.set_modified(now - Duration::from_secs(30 * 86_400)).unwrap();
        }
    }
}

/// The keys of `[store]` for the bucket of a server at this port.
pub(crate) fn s3_settings(port: u16) -> String {
    format!(
        "url = \"s3://weir/tables\"\ns3 = {{ endpoint = \"http://127.0.0.1:{port}\", region = \"us-east-1\", allow_http = true }}"
    )
}

/// The server, with the bucket `weir`.
pub(crate) struct S3Server {
    _process: Process,
    pub(crate) port: u16,
}

impl S3Server {
    /// None, and a word about it, when it is not installed.
    pub(crate) async fn start(directory: &Path) -> Option<Self> {
        let python = std::env::var("WEIR_PYTHON").unwrap_or_default();
        if !Command::new(&python).args(["-c", "import moto.server"]).output().is_ok_and(|found| found.status.success())
        {
            println!("left out: WEIR_PYTHON names no Python with moto");
            return None;
        }
        let port = free_port();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/s3_server.py");
        let mut process = Process::new("s3", Path::new(&python), &[script, &port.to_string()], directory);
        process.start();
        let (client, started) = (reqwest::Client::new(), Instant::now());
        let made = || client.put(format!("http://127.0.0.1:{port}/weir")).send();
        while !made().await.is_ok_and(|answer| answer.status().is_success()) {
            process.check(started, "does not answer");
            tokio::time::sleep(POLL).await;
        }
        Some(Self { _process: process, port })
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    async fn asks(&self, what: &str) -> serde_json::Value {
        let answer = reqwest::Client::new().get(format!("{}/-/{what}", self.url())).send().await.unwrap();
        answer.json().await.unwrap()
    }

    /// How many requests of each kind came since this was asked last.
    pub(crate) async fn requests(&self) -> serde_json::Value {
        self.asks("requests").await
    }

    /// Uploads in parts that are neither completed nor given up.
    pub(crate) async fn uploads(&self) -> u64 {
        self.asks("uploads").await.as_u64().unwrap()
    }
}
