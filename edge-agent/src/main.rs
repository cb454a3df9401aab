//! `edge-agent`: Weir's agent for gateways.

use clap::Parser;
use edge_agent::command::{EdgeCommand, execute};
use tracing_subscriber::EnvFilter;

#[derive(Debug, Parser)]
#[command(version, about = "Collects, checks and windows sensor streams at the edge, and loses nothing on the way")]
struct Arguments {
    #[command(subcommand)]
    command: EdgeCommand,
}

fn main() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn,edge_agent=info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    // Another provider may be compiled in, too; a process needs one.
    rustls::crypto::ring::default_provider().install_default().ok();
    let arguments = Arguments::parse();
    // A gateway has few cores and little memory: two workers carry network and timers, disk and decoding have threads.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(execute(arguments.command))
}
