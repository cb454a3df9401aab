//! The processes of a measurement, and what the system says about them.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::Common;

pub(super) const EDGE: &str = "bench";
pub(super) const TOKEN: &str = "of-the-bench";
/// How long a process may take to start, to stop, or to drain.
pub(super) const PATIENCE: Duration = Duration::from_secs(300);
pub(super) const POLL: Duration = Duration::from_millis(20);
/// `_SC_CLK_TCK` of Linux, the unit of times in `/proc/<pid>/stat`.
const TICKS_PER_SECOND: f64 = 100.0;

/// A directory that is removed at the end.
#[derive(Debug)]
pub(super) struct Directory(pub(super) PathBuf);

impl Directory {
    pub(super) fn new(common: &Common) -> anyhow::Result<Self> {
        let path = common.data_dir.clone();
        let path = path.unwrap_or_else(|| std::env::temp_dir().join(format!("weir-bench-{}", std::process::id())));
        std::fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self(path.canonicalize()?))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "the bench's data stay there");
        }
    }
}

/// A child process, killed when it is dropped.
#[derive(Debug)]
pub(super) struct Part {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Part {
    fn start(name: &'static str, program: &Path, arguments: &[&str], directory: &Path) -> anyhow::Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let out = std::fs::File::create(&log)?;
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        Ok(Self { name, child, log })
    }

    fn check(&mut self, since: Instant) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended with {status}:\n{}", self.name, std::fs::read_to_string(&self.log).unwrap_or_default());
        }
        ensure!(since.elapsed() < PATIENCE, "{} takes too long", self.name);
        Ok(())
    }

    /// User and system time since its start.
    pub(super) fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let after_name = text.rsplit_once(')').context("read the process's times")?.1;
        let mut fields = after_name.split_whitespace().skip(11);
        let mut next = || fields.next().and_then(|field| field.parse::<f64>().ok()).context("read the process's times");
        Ok((next()? + next()?) / TICKS_PER_SECOND)
    }

    /// A value of `/proc/<pid>/status` in MB, such as `VmHWM`.
    pub(super) fn memory_mb(&self, name: &str) -> anyhow::Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = text.lines().find(|line| line.starts_with(name)).context("read the process's memory")?;
        let kib: f64 = line.split_whitespace().nth(1).context("read the process's memory")?.parse()?;
        Ok((kib * 1_024.0 / 1e5).round() / 10.0)
    }

    /// Bytes that it had written to the block device.
    pub(super) fn disk_bytes(&self) -> anyhow::Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/io", self.child.id()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: ")).context("read the process's io")?;
        Ok(line.trim().parse()?)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // It may have ended; either way it is gone afterwards.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(super) fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

async fn until_ready(part: &mut Part, url: &str) -> anyhow::Result<()> {
    let (client, started) = (reqwest::Client::new(), Instant::now());
    while !client.get(url).send().await.is_ok_and(|answer| answer.status().is_success()) {
        part.check(started)?;
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// `weir cloud`.
#[derive(Debug)]
pub(super) struct Cloud {
    pub(super) part: Part,
    pub(super) http: String,
    pub(super) flight_sql: u16,
    tables: PathBuf,
}

impl Cloud {
    /// Defaults, but for a commit age of 10 s so that a measurement includes its commits.
    pub(super) async fn start(directory: &Path) -> anyhow::Result<Self> {
        Self::start_at(directory, free_port()?).await
    }

    /// The same at this port; again, when it has been there.
    pub(super) async fn start_at(directory: &Path, port: u16) -> anyhow::Result<Self> {
        Self::start_with(directory, port, "[commit]\nmax_age = \"10s\"\n").await
    }

    /// Defaults, but for what is set here.
    pub(super) async fn start_with(directory: &Path, port: u16, more: &str) -> anyhow::Result<Self> {
        let data = directory.join("cloud");
        let config = directory.join("cloud.toml");
        let flight_sql = free_port()?;
        let text = format!(
            "data_dir = {:?}\n[listen]\nhttp = \"127.0.0.1:{port}\"\nflight_sql = \"127.0.0.1:{flight_sql}\"\npostgres = \"127.0.0.1:0\"\n\
             {more}[[edge]]\nid = \"{EDGE}\"\ntoken = \"{TOKEN}\"\n",
            data.display().to_string()
        );
        std::fs::write(&config, text)?;
        let weir = std::env::current_exe()?;
        let arguments = ["cloud", "--config", config.to_str().context("a path in UTF-8")?];
        let mut part = Part::start("cloud", &weir, &arguments, directory)?;
        let http = format!("http://127.0.0.1:{port}");
        until_ready(&mut part, &format!("{http}/ready")).await?;
        Ok(Self { part, http, flight_sql, tables: data.join("tables") })
    }

    pub(super) async fn metrics(&self) -> anyhow::Result<Metrics> {
        Ok(Metrics(reqwest::get(format!("{}/metrics", self.http)).await?.text().await?))
    }

    /// Where a table is.
    pub(super) fn table(&self, stream: &str) -> PathBuf {
        self.tables.join(stream)
    }

    /// Bytes of a table's Parquet files.
    pub(super) fn table_bytes(&self, stream: &str) -> anyhow::Result<u64> {
        let mut bytes = 0;
        let mut directories = vec![self.table(stream)];
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(&directory)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    directories.push(entry.path());
                } else if entry.path().extension().is_some_and(|extension| extension == "parquet") {
                    bytes += entry.metadata()?.len();
                }
            }
        }
        Ok(bytes)
    }
}

/// What a cloud counts.
#[derive(Debug)]
pub(super) struct Metrics(String);

impl Metrics {
    pub(super) fn get(&self, name: &str) -> anyhow::Result<u64> {
        let start = format!("weir_cloud_{name}_total ");
        let value = self.0.lines().find_map(|line| line.strip_prefix(&start)?.parse().ok());
        value.with_context(|| format!("the cloud does not count {name}"))
    }
}

/// Mosquitto with persistence and without limits on what it queues.
pub(super) fn mosquitto(directory: &Path) -> anyhow::Result<(Part, u16)> {
    let places = ["/usr/sbin/mosquitto", "/usr/local/sbin/mosquitto", "/usr/bin/mosquitto"].map(Path::new);
    let program = places.into_iter().find(|path| path.exists());
    let program = program.context("this measurement needs Mosquitto: apt install mosquitto")?;
    let port = free_port()?;
    let data = directory.join("mosquitto");
    std::fs::create_dir(&data)?;
    let config = directory.join("mosquitto.conf");
    let user = std::env::var("USER").unwrap_or_else(|_| "root".into());
    let text = format!(
        "listener {port} 127.0.0.1\nallow_anonymous true\npersistence true\npersistence_location {}/\n\
         max_queued_messages 0\nmax_inflight_messages 0\nuser {user}\n",
        data.display()
    );
    std::fs::write(&config, text)?;
    let mut part = Part::start("mosquitto", program, &["-c", config.to_str().context("a path in UTF-8")?], directory)?;
    let started = Instant::now();
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        part.check(started)?;
        std::thread::sleep(POLL);
    }
    Ok((part, port))
}

/// An edge agent.
#[derive(Debug)]
pub(super) struct Edge {
    pub(super) part: Part,
    admin: String,
    client: reqwest::Client,
}

impl Edge {
    pub(super) async fn start(directory: &Path, common: &Common, cloud: &str, more: &str) -> anyhow::Result<Self> {
        let mut edge = Self::spawn(directory, common, cloud, more)?;
        until_ready(&mut edge.part, &format!("{}/ready", edge.admin)).await?;
        Ok(edge)
    }

    /// The same, not waited for.
    pub(super) fn spawn(directory: &Path, common: &Common, cloud: &str, more: &str) -> anyhow::Result<Self> {
        let port = free_port()?;
        let config = directory.join("edge.toml");
        let text = format!(
            "[edge]\nid = \"{EDGE}\"\ndata_dir = {:?}\n[admin]\nlisten = \"127.0.0.1:{port}\"\n\
             [clock]\ntrust = \"always\"\n[cloud]\nurls = [\"{cloud}\"]\ntoken = \"{TOKEN}\"\n{more}",
            directory.join("edge").display().to_string(),
        );
        std::fs::write(&config, text)?;
        let config = config.to_str().context("a path in UTF-8")?;
        let part = match &common.edge_agent {
            Some(program) => Part::start("edge", program, &["run", "--config", config], directory)?,
            None => Part::start("edge", &std::env::current_exe()?, &["edge", "run", "--config", config], directory)?,
        };
        Ok(Self { part, admin: format!("http://127.0.0.1:{port}"), client: reqwest::Client::new() })
    }

    pub(super) async fn status(&self) -> anyhow::Result<Value> {
        Ok(self.client.get(format!("{}/status", self.admin)).send().await?.json().await?)
    }

    /// Waits until all that it has is committed.
    pub(super) async fn drained(&mut self) -> anyhow::Result<Value> {
        let started = Instant::now();
        loop {
            let status = self.status().await?;
            if status["drained"] == true {
                return Ok(status);
            }
            self.part.check(started)?;
            tokio::time::sleep(POLL).await;
        }
    }
}
