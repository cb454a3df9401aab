//! The door for edges: `POST /v1/edges/{edge}/batches`, `GET /v1/edges/{edge}/positions`, and `/health`, `/ready`,
//! `/metrics`.
//!
//! An edge may write as itself with its token, and nobody else may: an unknown edge and a wrong token get the same
//! answer. Bodies, rows and decoded bytes have limits. Checksums and Arrow bodies are checked here, on blocking
//! threads, before the ingest thread sees a batch. A full queue is answered 429.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use parking_lot::RwLock;
use subtle::ConstantTimeEq;
use tokio::sync::oneshot;
use wire::request::{Frame, frames};
use wire::schema::SchemaId;
use wire::{Acks, EdgeId, RefusedRequest, SealedBatch, SpoolId, StreamName, StreamSchema};

use crate::config::EdgeSettings;
use crate::ingest::{Arrived, Job};
use crate::metrics::Metrics;

/// Schemas that are remembered between requests; above it the oldest way is open: send them again.
const SCHEMAS_MAX: usize = 10_000;
/// Spools of one `positions` request.
const SPOOLS_MAX: usize = 64;
const RETRY_AFTER_MS: u64 = 500;

/// What the routes share.
#[derive(Debug)]
pub(crate) struct Door {
    pub(crate) edges: Vec<EdgeSettings>,
    pub(crate) request_bytes_max: usize,
    pub(crate) jobs: SyncSender<Job>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) ready: AtomicBool,
    pub(crate) schemas: RwLock<HashMap<SchemaId, Arc<StreamSchema>>>,
}

/// The routes.
pub(crate) fn router(door: Arc<Door>) -> Router {
    Router::new()
        .route("/v1/edges/{edge}/batches", post(batches))
        .route("/v1/edges/{edge}/positions", get(positions))
        .route("/health", get(|| async { "ok\n" }))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .with_state(door)
}

async fn ready(State(door): State<Arc<Door>>) -> Response {
    if door.ready.load(Ordering::Relaxed) {
        "ready\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "starting or stopping\n").into_response()
    }
}

async fn metrics(State(door): State<Arc<Door>>) -> String {
    door.metrics.text()
}

async fn batches(State(door): State<Arc<Door>>, Path(edge): Path<String>, headers: HeaderMap, body: Body) -> Response {
    answer(take_batches(&door, &edge, &headers, body).await)
}

async fn positions(
    State(door): State<Arc<Door>>,
    Path(edge): Path<String>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    answer(give_positions(&door, &edge, &headers, query.as_deref().unwrap_or_default()).await)
}

fn answer(outcome: Result<Acks, RefusedRequest>) -> Response {
    match outcome {
        Ok(acks) => Json(acks).into_response(),
        Err(refused) => {
            let status = StatusCode::from_u16(refused.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            let retry = match &refused {
                RefusedRequest::PushedBack { retry_after_ms, .. } => Some(retry_after_ms.div_ceil(1_000)),
                RefusedRequest::NotReady { .. } => Some(1),
                _ => None,
            };
            let mut response = (status, Json(refused)).into_response();
            if let Some(seconds) = retry {
                response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            }
            response
        }
    }
}

fn authorize(door: &Door, edge: &str, headers: &HeaderMap) -> Result<EdgeId, RefusedRequest> {
    let shown: String = edge.chars().take(80).collect();
    let unauthorized = || RefusedRequest::Unauthorized { edge: shown.clone() };
    let token = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .ok_or_else(unauthorized)?;
    door.edges
        .iter()
        .find(|known| known.id.as_str() == edge)
        .filter(|known| known.token.as_bytes().ct_eq(token.as_bytes()).into())
        .map(|known| known.id.clone())
        .ok_or_else(unauthorized)
}

async fn take_batches(door: &Arc<Door>, edge: &str, headers: &HeaderMap, body: Body) -> Result<Acks, RefusedRequest> {
    let edge = authorize(door, edge, headers)?;
    let bytes_max = door.request_bytes_max;
    let body = to_bytes(body, bytes_max).await.map_err(|error| {
        let too_large =
            std::error::Error::source(&error).is_some_and(|cause| cause.to_string().contains("length limit"));
        if too_large {
            RefusedRequest::TooLarge { bytes_max }
        } else {
            RefusedRequest::Damaged { detail: "the body broke off".to_owned() }
        }
    })?;
    let reader = Arc::clone(door);
    let batches = tokio::task::spawn_blocking(move || read(&reader, &edge, body))
        .await
        .map_err(|_| RefusedRequest::NotReady { detail: "the request could not be read".to_owned() })??;
    let Some(first) = batches.first().map(|arrived| arrived.batch.header().stream.clone()) else {
        return Ok(Acks::default());
    };
    ask(door, Some(first), |reply| Job::Batches { batches, reply }).await
}

async fn give_positions(
    door: &Arc<Door>,
    edge: &str,
    headers: &HeaderMap,
    query: &str,
) -> Result<Acks, RefusedRequest> {
    authorize(door, edge, headers)?;
    let spools = query
        .split('&')
        .filter_map(|pair| pair.strip_prefix("spool="))
        .take(SPOOLS_MAX)
        .map(str::parse::<SpoolId>)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| RefusedRequest::Damaged { detail: error.to_string() })?;
    if spools.is_empty() {
        return Err(RefusedRequest::Damaged { detail: "?spool=… is missing".to_owned() });
    }
    ask(door, None, |reply| Job::Positions { spools, reply }).await
}

async fn ask(
    door: &Door,
    stream: Option<StreamName>,
    job: impl FnOnce(oneshot::Sender<Result<Acks, RefusedRequest>>) -> Job,
) -> Result<Acks, RefusedRequest> {
    let gone = || RefusedRequest::NotReady { detail: "the node stops".to_owned() };
    let (reply, answered) = oneshot::channel();
    match (door.jobs.try_send(job(reply)), stream) {
        (Ok(()), _) => answered.await.map_err(|_| gone())?,
        (Err(TrySendError::Full(_)), Some(stream)) => {
            Err(RefusedRequest::PushedBack { stream, retry_after_ms: RETRY_AFTER_MS })
        }
        (Err(TrySendError::Full(_)), None) => Err(RefusedRequest::NotReady { detail: "busy".to_owned() }),
        (Err(TrySendError::Disconnected(_)), _) => Err(gone()),
    }
}

/// Frames, checksums, schemas, rows: everything about a request that needs no state but known schemas.
fn read(door: &Door, edge: &EdgeId, body: Bytes) -> Result<Vec<Arrived>, RefusedRequest> {
    let damaged = |detail: String| RefusedRequest::Damaged { detail };
    let mut arrived = Vec::new();
    for frame in frames(body).map_err(|error| damaged(error.to_string()))? {
        match frame {
            Frame::Schema(text) => {
                let text = std::str::from_utf8(&text).map_err(|error| damaged(error.to_string()))?;
                let schema = StreamSchema::parse(text).map_err(|error| damaged(error.to_string()))?;
                let mut schemas = door.schemas.write();
                if schemas.len() >= SCHEMAS_MAX {
                    schemas.clear();
                }
                schemas.insert(schema.id(), Arc::new(schema));
            }
            Frame::Batch(bytes) => {
                let batch = SealedBatch::parse(bytes).map_err(|error| damaged(error.to_string()))?;
                if batch.header().edge != *edge {
                    return Err(RefusedRequest::Unauthorized { edge: batch.header().edge.to_string() });
                }
                let id = batch.header().schema;
                let schema = door.schemas.read().get(&id).cloned();
                let schema = schema.ok_or_else(|| RefusedRequest::SchemaUnknown { schema: format!("{id:?}") })?;
                let rows = batch.decode(&schema);
                arrived.push(Arrived { batch, schema, rows });
            }
        }
    }
    Ok(arrived)
}
