//! The agent's own door: `/` (a page for people), `/health`, `/ready`, `/metrics` (Prometheus) and `/status` (JSON). It tells and changes nothing.

mod page;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse};
use axum::routing::get;
use axum::{Json, Router};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::agent::Status;
use crate::door::{Limited, Silence};
use crate::metrics;

/// Connections at one time.
const CONNECTIONS_MAX: usize = 64;
/// All answers come at once: a connection on which nothing moves for so long ends.
const SILENCE: Duration = Duration::from_secs(60);

/// Serves until the token is cancelled.
pub async fn serve(listener: TcpListener, status: Arc<Mutex<Status>>, token: CancellationToken) {
    let router = Router::new()
        .route("/", get(shown))
        .route("/health", get(async || "ok\n"))
        .route("/ready", get(ready))
        .route("/metrics", get(prometheus))
        .route("/status", get(async |State(status): State<Arc<Mutex<Status>>>| Json(status.lock().clone())))
        .with_state(status);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let listener = Limited { listener, places, silence: Silence::new(SILENCE) };
    let served = axum::serve(listener, router).with_graceful_shutdown(token.cancelled_owned()).await;
    if let Err(error) = served {
        tracing::error!(%error, "the admin door ended");
    }
}

/// Ready: the engine runs and every source is connected.
async fn ready(State(status): State<Arc<Mutex<Status>>>) -> impl IntoResponse {
    let status = status.lock();
    let missing = status.sources.iter().find(|source| !source.connected).map(|source| source.name.clone());
    match missing {
        _ if status.spool.is_empty() => (StatusCode::SERVICE_UNAVAILABLE, "starting\n".to_owned()),
        Some(name) => (StatusCode::SERVICE_UNAVAILABLE, format!("source `{name}` is not connected\n")),
        None => (StatusCode::OK, "ready\n".to_owned()),
    }
}

/// Nothing in it runs or is fetched: what a device may have written stays text.
async fn shown(State(status): State<Arc<Mutex<Status>>>) -> impl IntoResponse {
    let policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'";
    let status = status.lock().clone();
    ([(header::CONTENT_SECURITY_POLICY, policy)], Html(page::render(&status, status.clock.time_us)))
}

async fn prometheus(State(status): State<Arc<Mutex<Status>>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics::render(&status.lock()))
}
