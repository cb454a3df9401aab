//! `weir`: the one binary for people.

mod cloud;
mod publish;
mod replay;
mod sql;
mod tables;

use clap::Parser;
use tracing_subscriber::EnvFilter;

#[derive(Debug, Parser)]
#[command(
    version,
    about = "Sensor streams from gateways at the edge to SQL in the cloud, with nothing lost on the way"
)]
enum Command {
    /// Take batches from edges, keep them, and answer SQL
    Cloud(cloud::CloudArguments),
    /// Ask one SQL statement
    Sql(sql::SqlArguments),
    /// Publish a file of history as live MQTT messages
    Replay(replay::ReplayArguments),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new("warn,weir=info,cloud_ingest=info,query=info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    // Another provider may be compiled in, too; a process needs one.
    rustls::crypto::ring::default_provider().install_default().ok();
    match Command::parse() {
        Command::Cloud(arguments) => cloud::cloud(arguments).await,
        Command::Sql(arguments) => sql::sql(arguments).await,
        Command::Replay(arguments) => replay::replay(arguments).await,
    }
}
