//! `weir`: the one binary for people.

mod bench;
mod broker;
mod cloud;
mod demo;
mod embedded;
mod lake;
mod links;
mod load;
mod publish;
mod replay;
mod rules;
mod sink;
mod sql;
mod tables;

use std::io::IsTerminal;

use clap::Parser;
use edge_agent::command::EdgeCommand;
use tracing_subscriber::EnvFilter;

#[derive(Debug, Parser)]
#[command(
    version,
    about = "Sensor streams from gateways at the edge to SQL in the cloud, with nothing lost on the way"
)]
enum Command {
    /// A city, an edge agent and the cloud on this machine, to look at
    Demo(demo::DemoArguments),
    /// Collect on this machine, as `edge-agent` does on a gateway
    #[command(subcommand)]
    Edge(EdgeCommand),
    /// Take batches from edges, keep them, and answer SQL
    Cloud(cloud::CloudArguments),
    /// Ask one SQL statement
    Sql(sql::SqlArguments),
    /// Try rules of alerts before they run
    #[command(subcommand)]
    Rules(rules::RulesCommand),
    /// Show what each table consists of
    Tables(lake::TablesArguments),
    /// Merge small files of tables into large ones
    Compact(lake::CompactArguments),
    /// Give a column of a table another type, and take in what had to wait for it
    Retype(lake::RetypeArguments),
    /// Delete files of tables that nothing names any more
    Vacuum(lake::VacuumArguments),
    /// Read every entry and every file of tables, and name what is damaged
    Verify(lake::VerifyArguments),
    /// Measure on this machine, as JSON
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Load files of history into a stream, each exactly once
    Load(Box<load::LoadArguments>),
    /// Publish a file of history as live MQTT messages
    Replay(replay::ReplayArguments),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let command = Command::parse();
    // The demo speaks for itself; a service's log says what changes.
    let usual = match command {
        Command::Demo(_) => "error,rumqttd=off",
        _ => "warn,weir=info,cloud_ingest=info,query=info,edge_agent=info",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(usual));
    // In a journal or a file colours are noise: journalctl would show no line that has one.
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    // Another provider may be compiled in, too; a process needs one.
    rustls::crypto::ring::default_provider().install_default().ok();
    match command {
        Command::Demo(arguments) => demo::demo(arguments).await,
        Command::Edge(command) => edge_agent::command::execute(command).await,
        Command::Cloud(arguments) => cloud::cloud(arguments).await,
        Command::Sql(arguments) => sql::sql(arguments).await,
        Command::Rules(command) => rules::rules(command).await,
        Command::Tables(arguments) => lake::tables(arguments).await,
        Command::Compact(arguments) => lake::compact(arguments).await,
        Command::Retype(arguments) => lake::retype(arguments).await,
        Command::Vacuum(arguments) => lake::vacuum(arguments).await,
        Command::Verify(arguments) => lake::verify_tables(arguments).await,
        Command::Bench(command) => bench::bench(command).await,
        Command::Load(arguments) => load::load(*arguments).await,
        Command::Replay(arguments) => replay::replay(arguments).await,
    }
}
