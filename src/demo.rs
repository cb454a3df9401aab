//! `weir demo`: the whole path in one process. A broker, a simulated city, this machine's own readings, an edge agent, and
//! the cloud with SQL; data stay in the directory, and the next start goes on from them.
//!
//! The city knows what it has published ([`city::Truth`]). With `--seconds` the demo ends by itself, compares SQL with
//! that truth once everything is committed, and fails when they differ. It stops from left to right, after an error
//! too: city, agent, cloud.

mod city;
mod verdict;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use edge_agent::agent::{self, AgentHandle};
use tokio_util::sync::CancellationToken;

use self::city::{City, SPEED_MAX, Truth};
use crate::broker::{self, BrokerPlace};
use crate::cloud::{self, Node};
use crate::publish::{BrokerAddress, Publisher};

/// Arguments of `weir demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct DemoArguments {
    /// Where everything is kept; a second start goes on from it
    #[arg(long, default_value = "weir-demo")]
    data_dir: PathBuf,
    /// Road sensors of the city
    #[arg(long, default_value_t = 300)]
    sensors: usize,
    /// Stop after so long, and compare what SQL answers with what was published
    #[arg(long)]
    seconds: Option<u64>,
    /// A broker of your own, mqtt://host:port, in place of the built-in one
    #[arg(long)]
    url: Option<BrokerAddress>,
    /// HTTP is at this port; Postgres, MQTT and the agent are 2, 3 and 10 above it
    #[arg(long, default_value_t = 7300, value_parser = clap::value_parser!(u16).range(1..=65_525))]
    first_port: u16,
    /// Take free ports in place of those
    #[arg(long)]
    free_ports: bool,
}

/// Each sensor reports so often.
const INTERVAL: Duration = Duration::from_secs(2);
/// How often the city looks at its clock.
const STEP: Duration = Duration::from_millis(50);
/// A line about how it goes.
const NEWS_EVERY: Duration = Duration::from_secs(20);
/// How long the agent may take to reach the broker.
const CONNECT_MAX: Duration = Duration::from_secs(30);
/// How long what was published may take to be committed at the end.
const DRAIN_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
const EDGE: &str = "demo";

#[derive(Debug, Clone, Copy)]
struct Ports {
    http: u16,
    flight_sql: u16,
    postgres: u16,
    broker: u16,
    admin: u16,
}

impl Ports {
    fn from(first: u16) -> Self {
        Self { http: first, flight_sql: first + 1, postgres: first + 2, broker: first + 3, admin: first + 10 }
    }

    fn free() -> anyhow::Result<Self> {
        // All held at once, so that they differ.
        let held = [(); 5].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
        let [http, flight_sql, postgres, broker, admin] =
            held.map(|held| held.and_then(|held| Ok(held.local_addr()?.port())));
        Ok(Self { http: http?, flight_sql: flight_sql?, postgres: postgres?, broker: broker?, admin: admin? })
    }

    fn check(self, with_broker: bool) -> anyhow::Result<()> {
        let names = [
            (self.http, "HTTP"),
            (self.flight_sql, "Flight SQL"),
            (self.postgres, "Postgres"),
            (self.admin, "the agent"),
            (self.broker, "MQTT"),
        ];
        for (port, name) in &names[..names.len() - usize::from(!with_broker)] {
            if let Err(error) = TcpListener::bind((Ipv4Addr::LOCALHOST, *port)) {
                bail!("port {port} for {name} cannot be used: {error}; stop what has it, or use --free-ports");
            }
        }
        Ok(())
    }
}

/// Runs until Ctrl-C, SIGTERM, or the end of `--seconds`.
pub(crate) async fn demo(arguments: DemoArguments) -> anyhow::Result<()> {
    let ports = if arguments.free_ports { Ports::free()? } else { Ports::from(arguments.first_port) };
    ports.check(arguments.url.is_none())?;
    let data_dir = &arguments.data_dir;
    std::fs::create_dir_all(data_dir).with_context(|| format!("make {}", data_dir.display()))?;
    let data_dir = data_dir.canonicalize()?;
    let broker = match &arguments.url {
        Some(address) => address.clone(),
        None => {
            let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, ports.broker));
            broker::start(BrokerPlace { name: "demo", listen, listen_v4: None, guests: None, connections_max: 100 })?;
            BrokerAddress { host: Ipv4Addr::LOCALHOST.to_string(), port: ports.broker }
        }
    };
    let is_new = !data_dir.join("edge").exists();
    let place = Place { token: token(&data_dir)?, data_dir, ports, broker, is_new };
    let stop_cloud = CancellationToken::new();
    let node = cloud::start(cloud_settings(&place)?, stop_cloud.clone()).await?;
    // Whatever happens from here on, it stops in order: city, agent, cloud.
    let ended = with_agent(&place, &arguments, &node).await;
    stop_cloud.cancel();
    node.stopped().await;
    say(&ended?);
    say(&format!("stopped; `weir demo` with the same --data-dir ({}) goes on from here", place.data_dir.display()));
    Ok(())
}

/// Where a run happens.
#[derive(Debug)]
struct Place {
    data_dir: PathBuf,
    token: String,
    ports: Ports,
    broker: BrokerAddress,
    /// No agent ran here before.
    is_new: bool,
}

async fn with_agent(place: &Place, arguments: &DemoArguments, node: &Node) -> anyhow::Result<String> {
    let stop_agent = CancellationToken::new();
    let agent = agent::start(edge_settings(place)?, stop_agent.clone()).await?;
    let ended = with_city(place, arguments, node, &agent).await;
    stop_agent.cancel();
    let stopped = agent.stopped().await.context("stop the edge agent");
    match (ended, stopped) {
        (Err(error), Err(also)) => Err(error.context(format!("{also:#}; and before that"))),
        (ended, stopped) => stopped.and(ended),
    }
}

async fn with_city(
    place: &Place,
    arguments: &DemoArguments,
    node: &Node,
    agent: &AgentHandle,
) -> anyhow::Result<String> {
    let url = format!("http://{}", node.http);
    let mut city = City::new(rand::random(), arguments.sensors, micros(INTERVAL), now_us());
    let mut publisher = Publisher::connect(&place.broker, &format!("weir-demo-city-{}", std::process::id()));
    connected(agent).await?;
    // From here on a run that does not end well leaves no count behind.
    let before = take_truth(&place.data_dir, place.is_new)?;
    say(&welcome(&url, node.postgres.port(), agent.admin, &place.data_dir, arguments));

    let ends = arguments.seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let stopped = run(&mut city, &mut publisher, agent, ends).await?;
    say("stopping: what is on its way is committed first; Ctrl-C does not wait for that");
    for publication in city.finish() {
        publisher.publish(publication.topic, publication.payload).await?;
    }
    publisher.finish().await?;
    let Some(mut truth) = before else {
        let why = format!(
            "not compared with what was published: an earlier run in {} was killed or failed, and its count with it",
            place.data_dir.display()
        );
        return if stopped == Stopped::ByHand { Ok(why) } else { Err(anyhow!(why)) };
    };
    truth.add(city.truth());
    keep_truth(&place.data_dir, &truth)?;
    let verdict = tokio::select! {
        drained = drained(agent, truth.messages) => match drained {
            Ok(()) => verdict::compare(&url, &truth).await,
            // What has not arrived is worth more than that it has not.
            Err(late) => match verdict::compare(&url, &truth).await {
                Ok(_) => Err(late),
                Err(differs) => Err(differs.context(late)),
            },
        },
        signal = cloud::stop_signal() => {
            signal?;
            return Ok("not compared with what was published".to_owned());
        }
    };
    match verdict {
        // Who pressed Ctrl-C did not ask for the comparison, but is told when something is missing.
        Err(error) if stopped == Stopped::ByHand => Ok(format!("{error:#}")),
        verdict => verdict,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stopped {
    ByHand,
    InTime,
}

async fn run(
    city: &mut City,
    publisher: &mut Publisher,
    agent: &AgentHandle,
    ends: Option<Instant>,
) -> anyhow::Result<Stopped> {
    let mut signal = std::pin::pin!(cloud::stop_signal());
    let mut steps = tokio::time::interval(STEP);
    let mut news = Instant::now();
    loop {
        tokio::select! {
            _ = steps.tick() => {}
            signal = &mut signal => return signal.map(|()| Stopped::ByHand),
        }
        for publication in city.step(now_us()) {
            publisher.publish(publication.topic, publication.payload).await?;
        }
        if ends.is_some_and(|ends| Instant::now() >= ends) {
            return Ok(Stopped::InTime);
        }
        if news.elapsed() >= NEWS_EVERY {
            news = Instant::now();
            let status = agent.status();
            let quarantined: u64 = status.quarantined.values().sum();
            say(&format!(
                "{} messages published, {} rows sealed at the edge, {} of them committed, {quarantined} readings in quarantine",
                city.truth().messages,
                status.rows.sealed,
                status.rows.committed
            ));
        }
    }
}

/// The city begins when the agent is subscribed: the built-in broker keeps nothing for clients that never were there.
async fn connected(agent: &AgentHandle) -> anyhow::Result<()> {
    let started = Instant::now();
    while !agent.status().sources.iter().any(|source| source.name == "traffic" && source.connected) {
        if started.elapsed() > CONNECT_MAX {
            let error = agent.status().sources.into_iter().find_map(|source| source.last_error);
            bail!("the agent does not reach the broker: {}", error.unwrap_or_else(|| "no answer".to_owned()));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// Waits until the agent has all that was published, and all that it has is committed: nothing more can come then.
/// Readings of this machine go on meanwhile, so this is true for moments.
async fn drained(agent: &AgentHandle, messages: u64) -> anyhow::Result<()> {
    let started = Instant::now();
    let seen = agent.status().published;
    loop {
        let status = agent.status();
        let of_city = status.sources.iter().find(|source| source.name == "traffic");
        let arrived = of_city.map_or(0, |source| source.totals.journalled);
        // One that was begun after this was asked.
        if arrived >= messages && status.drained && status.published >= seen + 2 {
            return Ok(());
        }
        if started.elapsed() > DRAIN_MAX {
            bail!(
                "after {} s {arrived} of {messages} messages are at the edge agent, and {} of its rows not committed",
                DRAIN_MAX.as_secs(),
                status.rows.sealed - status.rows.committed
            );
        }
        tokio::time::sleep(POLL).await;
    }
}

fn welcome(url: &str, postgres: u16, admin: SocketAddr, data_dir: &Path, arguments: &DemoArguments) -> String {
    let weir = std::env::current_exe().map_or_else(|_| "weir".to_owned(), |path| path.display().to_string());
    let broker = if arguments.url.is_some() { "your broker" } else { "its own broker" };
    format!(
        "\nWeir runs: {} road sensors publish to {broker}, an edge agent checks and windows them, the cloud answers SQL.\n\
         Data are in {}. Ctrl-C stops it. In another terminal, try:\n\n\
         {weir} sql --url {url} \"SELECT device, count(*), round(avg(speed), 1) AS speed FROM traffic GROUP BY device ORDER BY speed LIMIT 10\"\n\
         {weir} sql --url {url} \"SELECT * FROM traffic_1m ORDER BY window_start DESC, device LIMIT 10\"\n\
         {weir} sql --url {url} \"SELECT reason, count(*) FROM quarantine GROUP BY reason\"\n\
         psql -h 127.0.0.1 -p {postgres} -c \"SELECT device, ts, load_1m, cpu_percent, memory_used_bytes FROM host WHERE kind = 'machine' ORDER BY ts DESC LIMIT 5\"\n\
         curl -s {url}/v1/sql -d \"SELECT count(*) AS readings, max(ts) AS newest FROM traffic\"\n\
         curl -s http://{admin}/status\n",
        arguments.sensors,
        data_dir.display(),
    )
}

fn cloud_settings(place: &Place) -> anyhow::Result<cloud_ingest::Settings> {
    let Place { data_dir, token, ports, .. } = place;
    let text = format!(
        "data_dir = {:?}\n[listen]\nhttp = \"127.0.0.1:{}\"\nflight_sql = \"127.0.0.1:{}\"\npostgres = \"127.0.0.1:{}\"\n[commit]\nmax_age = \"10s\"\n\
         [[edge]]\nid = \"{EDGE}\"\ntoken = \"{token}\"\n",
        data_dir.join("cloud").display().to_string(),
        ports.http,
        ports.flight_sql,
        ports.postgres
    );
    cloud_ingest::Settings::parse(&text).map_err(anyhow::Error::msg)
}

fn edge_settings(place: &Place) -> anyhow::Result<edge_agent::config::Settings> {
    let Place { data_dir, token, ports, broker, .. } = place;
    let text = format!(
        "[edge]\nid = \"{EDGE}\"\ndata_dir = {:?}\n[admin]\nlisten = \"127.0.0.1:{}\"\n\
         [cloud]\nurls = [\"http://127.0.0.1:{}\"]\ntoken = \"{token}\"\n\
         [[source]]\nkind = \"mqtt\"\nurl = \"mqtt://{}:{}\"\ntopics = [\"city/traffic/+\"]\nstream = \"traffic\"\n\
         [source.map]\ndevice = \"topic:2\"\nts = {{ at = \"/ts\", format = \"epoch_us\" }}\nspeed = \"/speed\"\n\
         vehicles = \"/vehicles\"\noccupancy = \"/occupancy\"\n\
         [[source]]\nkind = \"host\"\nevery = \"5s\"\n\
         [stream.traffic]\nlateness = \"10s\"\n[stream.traffic.fields]\n\
         speed = {{ type = \"float64\", min = 0, max = {SPEED_MAX} }}\n\
         vehicles = {{ type = \"int64\", min = 0 }}\noccupancy = {{ type = \"float64\", min = 0, max = 100 }}\n\
         [stream.traffic.window.1m]\nsize = \"1m\"\n",
        data_dir.join("edge").display().to_string(),
        ports.admin,
        ports.http,
        broker.host,
        broker.port
    );
    edge_agent::config::Settings::parse(&text).map_err(anyhow::Error::msg)
}

/// The demo's own token: random, kept beside the data, for its owner only.
fn token(data_dir: &Path) -> anyhow::Result<String> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let path = data_dir.join("token");
    if let Ok(token) = std::fs::read_to_string(&path) {
        return Ok(token.trim().to_owned());
    }
    let token = format!("{:032x}", rand::random::<u128>());
    let mut file = std::fs::File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("write {}", path.display()))?;
    file.write_all(token.as_bytes())?;
    Ok(token)
}

/// What earlier runs published; None when one of them was killed. It is taken away until this run ends well.
fn take_truth(data_dir: &Path, is_new: bool) -> anyhow::Result<Option<Truth>> {
    let path = data_dir.join("truth.json");
    match std::fs::read(&path) {
        Ok(bytes) => {
            std::fs::remove_file(&path).context("take truth.json")?;
            // One that cannot be read was written by another version.
            Ok(serde_json::from_slice(&bytes).ok())
        }
        Err(_) => Ok(is_new.then(Truth::default)),
    }
}

fn keep_truth(data_dir: &Path, truth: &Truth) -> anyhow::Result<()> {
    std::fs::write(data_dir.join("truth.json"), serde_json::to_vec(truth)?).context("write truth.json")
}

fn now_us() -> i64 {
    edge_agent::source::now_us()
}

fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX)
}

#[allow(clippy::print_stdout, reason = "what the user asked to see")]
fn say(text: &str) {
    println!("{text}");
}
