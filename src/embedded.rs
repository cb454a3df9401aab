//! An edge agent within `weir cloud`, for sources that are reached from the cloud itself: a broker of sites without a
//! gateway, a directory of files.
//!
//! It is the agent as it runs on a gateway, with journal, checks, windows, rules and spool, in `data_dir/agent`; its uplink is
//! this process's own HTTP door, with a token that is made anew at each start. So nothing is promised less, and nothing is
//! there twice. It starts when the cloud listens and stops before it. Its configuration is read once: another one takes a
//! restart.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use anyhow::{Context, anyhow, ensure};
use cloud_ingest::Settings;
use cloud_ingest::config::EdgeSettings;
use edge_agent::agent::{self, AgentError};
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;
use toml::{Table, Value};

/// An agent that is configured and does not run yet.
#[derive(Debug)]
pub(crate) struct Embedded {
    settings: edge_agent::config::Settings,
    token: String,
}

/// An agent that runs.
#[derive(Debug)]
pub(crate) struct Running {
    agent: JoinHandle<Result<(), AgentError>>,
    token: CancellationToken,
}

impl Embedded {
    /// Reads the agent's configuration, if there is to be one, and lets it in as an edge.
    pub(crate) fn prepare(config: &Path, settings: &mut Settings) -> anyhow::Result<Option<Self>> {
        let Some(agent) = &settings.agent else { return Ok(None) };
        let path = config.parent().unwrap_or(Path::new(".")).join(&agent.config);
        let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let data_dir = settings.data_dir.join("agent");
        let token = format!("{:032x}", rand::random::<u128>());
        let read = completed(&text, &data_dir).and_then(|text| edge_agent::config::Settings::parse(&text));
        let agent = read.map_err(|error| anyhow!("{}: {error}", path.display()))?;
        let id = agent.edge.id.clone();
        ensure!(
            settings.edge.iter().all(|edge| edge.id != id),
            "[agent] is edge `{id}`, and so is an [[edge]]: one of them needs another id"
        );
        settings.edge.push(EdgeSettings { id, token: token.clone() });
        Ok(Some(Self { settings: agent, token }))
    }

    /// Starts it, when the cloud listens at this address.
    pub(crate) async fn start(mut self, http: SocketAddr) -> anyhow::Result<Running> {
        let ip = match http.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
            ip => ip,
        };
        let url = format!("http://{}", SocketAddr::new(ip, http.port()));
        self.settings.cloud.urls = vec![url.parse().context("address of the cloud's own door")?];
        self.settings.cloud.token = Some(self.token);
        let token = CancellationToken::new();
        let agent = agent::start(self.settings, token.clone()).await.context("start [agent]")?;
        tracing::info!(admin = %agent.admin, "the agent in this process runs");
        Ok(Running { agent: tokio::spawn(agent.stopped()), token })
    }
}

impl Running {
    /// Stops it; what is not sent yet is in its spool.
    pub(crate) async fn stop(self) {
        self.token.cancel();
        if let Err(error) = end(self.agent.await) {
            tracing::error!(%error, "the agent in this process did not end well; its journal has what it had");
        }
    }

    /// Waits until it ends by itself, which it must not; for ever when there is none.
    pub(crate) async fn ended(running: &mut Option<Self>) -> anyhow::Error {
        let Some(running) = running else { return std::future::pending().await };
        let why = end((&mut running.agent).await).err().unwrap_or_else(|| anyhow!("it stopped by itself"));
        why.context("the agent in this process ended")
    }
}

fn end(ended: Result<Result<(), AgentError>, JoinError>) -> anyhow::Result<()> {
    Ok(ended??)
}

/// The configuration with what an agent in this process does not say for itself.
fn completed(text: &str, data_dir: &Path) -> Result<String, String> {
    let mut table = text.parse::<Table>().map_err(|error| wire::written::with_nearest_key(&error.to_string()))?;
    if table.contains_key("cloud") {
        return Err("[cloud] has no meaning here: this agent sends to the process that it runs in".to_owned());
    }
    // The address and the token are known when the cloud listens.
    let cloud = Table::from_iter([
        ("urls".to_owned(), Value::from(vec!["http://127.0.0.1"])),
        ("token".to_owned(), Value::from("made at the start")),
    ]);
    table.insert("cloud".to_owned(), cloud.into());
    let edge = table.get_mut("edge").and_then(Value::as_table_mut).ok_or("[edge] with an id is missing")?;
    if edge.insert("data_dir".to_owned(), data_dir.display().to_string().into()).is_some() {
        return Err("edge.data_dir has no meaning here: this agent keeps its data in the cloud's data_dir".to_owned());
    }
    toml::to_string(&table).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_agent_cannot_know_is_added_and_must_not_be_said() {
        let data_dir = Path::new("/d/agent");
        let text = "[edge]\nid = \"roof\"\n[[source]]\nkind = \"host\"\n";
        let settings = edge_agent::config::Settings::parse(&completed(text, data_dir).unwrap()).unwrap();
        assert_eq!((settings.edge.id.as_str(), settings.edge.data_dir.as_path()), ("roof", data_dir));
        let check = |text: &str, expected: &str| {
            let error = completed(text, data_dir).unwrap_err();
            assert!(error.contains(expected), "{error}");
        };
        check("[edge]\nid = \"roof\"\ndata_dir = \"x\"", "edge.data_dir has no meaning");
        check("[edge]\nid = \"roof\"\n[cloud]\ntoken = \"t\"", "[cloud] has no meaning");
        check("[admin]\n", "[edge] with an id is missing");
    }
}
