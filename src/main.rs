//! `weir`: the one binary for people.

mod city;
mod publish;
mod replay;
mod sql;

use clap::Parser;

#[derive(Debug, Parser)]
#[command(
    version,
    about = "Sensor streams from gateways at the edge to SQL in the cloud, with nothing lost on the way"
)]
enum Command {
    /// Ask one SQL statement
    Sql(sql::SqlArguments),
    /// Publish a file of history as live MQTT messages
    Replay(replay::ReplayArguments),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    rustls::crypto::ring::default_provider().install_default().ok();
    match Command::parse() {
        Command::Sql(arguments) => sql::sql(arguments).await,
        Command::Replay(arguments) => replay::replay(arguments).await,
    }
}
