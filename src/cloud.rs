//! `weir cloud --config FILE`: ingest and SQL in one process.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use cloud_ingest::{Cloud, CloudHandle, Settings};
use query::serve::{Reader, Readers};
use query::{Engine, EngineSettings};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::embedded::{Embedded, Running};
use crate::tables::NodeTables;

/// Arguments of `weir cloud`.
#[derive(Debug, clap::Args)]
pub(crate) struct CloudArguments {
    /// Configuration, as in configs/cloud.toml
    #[arg(long)]
    config: PathBuf,
}

/// A cloud that runs in this process.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) http: SocketAddr,
    pub(crate) postgres: SocketAddr,
    cloud: CloudHandle,
}

impl Node {
    /// Waits until it has stopped, after its token was cancelled: what is hot is committed.
    pub(crate) async fn stopped(self) {
        self.cloud.stopped().await;
    }
}

/// Runs until SIGINT or SIGTERM.
pub(crate) async fn cloud(arguments: CloudArguments) -> anyhow::Result<()> {
    let mut settings = Settings::load(&arguments.config)?;
    let agent = Embedded::prepare(&arguments.config, &mut settings)?;
    let token = CancellationToken::new();
    let node = start(settings, token.clone()).await?;
    // Whatever happens to the agent, what is hot is committed.
    let mut agent = match agent {
        None => None,
        Some(agent) => match agent.start(node.http).await {
            Ok(agent) => Some(agent),
            Err(error) => {
                token.cancel();
                node.stopped().await;
                return Err(error);
            }
        },
    };
    let ended = tokio::select! {
        signal = stop_signal() => {
            if let Some(agent) = agent {
                agent.stop().await;
            }
            signal
        }
        error = Running::ended(&mut agent) => Err(error),
    };
    tracing::info!("stopping: what is hot is committed");
    token.cancel();
    node.stopped().await;
    ended
}

/// Starts ingest and the doors of SQL.
pub(crate) async fn start(settings: Settings, token: CancellationToken) -> anyhow::Result<Node> {
    let readers: Vec<Reader> = settings
        .reader
        .iter()
        .map(|reader| Reader { name: reader.name.clone(), password: reader.password.clone() })
        .collect();
    if readers.is_empty() {
        tracing::warn!("no [[reader]] is set: only callers on this machine may ask");
    }
    if settings.edge.is_empty() {
        tracing::warn!("no [[edge]] is set: nobody may write");
    }
    let postgres = settings.listen.postgres;
    let limits = EngineSettings {
        memory_bytes_max: settings.query.max_bytes.bytes(),
        timeout: settings.query.timeout.0,
        json_rows_max: settings.query.json_rows,
        gapfill_rows_max: settings.query.gapfill_rows,
        latest_bytes_max: settings.query.latest_memory.bytes(),
        ..EngineSettings::default()
    };
    let cloud = Cloud::open(settings).await.context("start the cloud")?;
    let tables = Arc::new(NodeTables(cloud.catalogue()));
    let engine = Arc::new(Engine::new(tables, limits).context("start the engine")?);
    let readers = Readers::new(readers);
    let listener = TcpListener::bind(postgres).await.with_context(|| format!("listen on {postgres} for Postgres"))?;
    let postgres = listener.local_addr()?;
    tracing::info!(%postgres, "psql may connect");
    let door = query::serve::postgres::serve(listener, Arc::clone(&engine), readers.clone(), token.clone());
    tokio::spawn(async move {
        if let Err(error) = door.await {
            tracing::error!(%error, "the postgres door ended");
        }
    });
    let questions = query::serve::http::router(engine, readers);
    let cloud = cloud.listen(questions, token).await?;
    tracing::info!(http = %cloud.http, "ready");
    Ok(Node { http: cloud.http, postgres, cloud })
}

/// Returns at SIGINT or SIGTERM.
pub(crate) async fn stop_signal() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    tokio::select! {
        _ = term.recv() => {}
        interrupted = tokio::signal::ctrl_c() => interrupted.context("listen for SIGINT")?,
    }
    Ok(())
}
