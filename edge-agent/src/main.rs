//! `edge-agent`: Weir's agent for gateways.

use std::io::IsTerminal;
use std::str::FromStr;

use anyhow::Context;
use clap::Parser;
use edge_agent::command::{EdgeCommand, execute};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// What is logged when `RUST_LOG` says nothing.
const USUAL_LOG: &str = "warn,edge_agent=info";

#[derive(Debug, Parser)]
#[command(version, about = "Collects, checks and windows sensor streams at the edge, and loses nothing on the way")]
struct Arguments {
    #[command(subcommand)]
    command: EdgeCommand,
}

fn main() -> anyhow::Result<()> {
    // `RUST_LOG` has targets and levels; telling spans apart by regular expressions would be half a megabyte of binary.
    let wanted = std::env::var("RUST_LOG").unwrap_or_default();
    let filter = Targets::from_str(if wanted.is_empty() { USUAL_LOG } else { &wanted }).context("read RUST_LOG")?;
    // In a journal or a file colours are noise: journalctl would show no line that has one.
    let colours = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_ansi(colours).with_writer(std::io::stderr);
    tracing_subscriber::registry().with(filter).with(lines).init();
    // Another provider may be compiled in, too; a process needs one.
    rustls::crypto::ring::default_provider().install_default().ok();
    let arguments = Arguments::parse();
    // A gateway has few cores and little memory: two workers carry network and timers, disk and decoding have threads.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(execute(arguments.command))
}
