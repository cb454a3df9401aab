//! The door for edges: `POST /v1/edges/{edge}/batches`, `GET /v1/edges/{edge}/positions`, and `/health`, `/ready`,
//! `/metrics`. The doors for other senders are in [`write`], that of commands for edges in [`commands`].
//!
//! An edge may write as itself with its token, and nobody else may: an unknown edge and a wrong token get the same
//! answer. Bodies, rows and decoded bytes have limits. Checksums and Arrow bodies are checked here, on blocking
//! threads, before the ingest thread sees a batch. A full queue is answered 429, and so is a request for which the
//! bytes of those that are in here already leave no room. What unpacks to much goes to the ingest thread in parts. A body
//! may be one Zstandard frame: it says how many bytes it unpacks to, and gets room for them before it is unpacked.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use parking_lot::RwLock;
use subtle::ConstantTimeEq;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use wire::request::{self, ENCODING, Frame, Origins, frames};
use wire::schema::SchemaId;
use wire::{
    Acks, BATCH_DECODED_BYTES_MAX, EdgeId, RefusedAnswer, RefusedRequest, SealedBatch, SpoolId, StreamAck, StreamSchema,
};

use crate::class::{ByClass, Class};
use crate::commands::Commands;
use crate::config::{EdgeSettings, WriteSettings};
use crate::ingest::request::Arrived;
use crate::ingest::{Job, Jobs, RETRY_AFTER_MS, Reply};
use crate::metrics::{Metrics, Tally};
use crate::own_names::OwnNames;

mod commands;
mod write;

/// Schemas that are remembered between requests; above it the oldest way is open: send them again.
const SCHEMAS_MAX: usize = 10_000;
/// Spools of one `positions` request.
const SPOOLS_MAX: usize = 64;
/// Room for requests is counted in units of so many bytes.
const ROOM_UNIT: usize = 1 << 10;
/// How long the body of a request may take.
const BODY_MAX: Duration = Duration::from_secs(60);
/// Decoded rows of one request that are in memory at a time; a batch may have as much.
const PART_BYTES: usize = BATCH_DECODED_BYTES_MAX;

/// What the routes share.
#[derive(Debug)]
pub(crate) struct Door {
    pub(crate) edges: Vec<EdgeSettings>,
    pub(crate) commands: Arc<Commands>,
    pub(crate) write: WriteSettings,
    pub(crate) request_bytes_max: usize,
    /// Room for the bodies of requests that are in here, in units of [`ROOM_UNIT`].
    pub(crate) room: Arc<Semaphore>,
    /// Room for decoded rows, in the same units.
    pub(crate) decoded: Arc<Semaphore>,
    /// Places in the queue of the ingest thread.
    pub(crate) places: ByClass<Arc<Semaphore>>,
    /// Requests that are unpacked, checked or decoded at a time: two for each processor, so that a large one
    /// does not hold up small ones. More would not be faster, and leave nothing to the ingest thread and to alerts.
    pub(crate) reading: Arc<Semaphore>,
    pub(crate) jobs: Jobs,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) own_names: OwnNames,
    pub(crate) ready: AtomicBool,
    pub(crate) schemas: RwLock<HashMap<SchemaId, Arc<StreamSchema>>>,
    pub(crate) origins: RwLock<Origins>,
}

/// The routes.
pub(crate) fn router(door: Arc<Door>) -> Router {
    Router::new()
        .route("/v1/edges/{edge}/batches", post(batches))
        .route("/v1/edges/{edge}/positions", get(positions))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .merge(commands::routes())
        .merge(write::routes())
        .with_state(door)
}

/// In InfluxDB's words for its clients, which ask for JSON.
async fn health(headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if accept.contains("application/json") {
        let words =
            serde_json::json!({ "name": "influxdb", "message": "ready for queries and writes", "status": "pass" });
        return Json(words).into_response();
    }
    "ok\n".into_response()
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
    answer(&door, take_batches(&door, &edge, &headers, body).await)
}

async fn positions(
    State(door): State<Arc<Door>>,
    Path(edge): Path<String>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    answer(&door, give_positions(&door, &edge, &headers, query.as_deref().unwrap_or_default()).await)
}

fn answer(door: &Door, outcome: Result<Acks, RefusedAnswer>) -> Response {
    match outcome {
        Ok(acks) => Json(acks).into_response(),
        Err(answer) => refuse(door, answer),
    }
}

fn refuse(door: &Door, answer: RefusedAnswer) -> Response {
    let refused = &answer.refused;
    door.metrics.refuse(refused.kind());
    let status = StatusCode::from_u16(refused.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let retry = match refused {
        RefusedRequest::PushedBack { retry_after_ms, .. } => Some(retry_after_ms.div_ceil(1_000)),
        RefusedRequest::NotReady { .. } => Some(1),
        _ => None,
    };
    let mut response = (status, Json(answer)).into_response();
    if let Some(seconds) = retry {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
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

async fn take_batches(door: &Arc<Door>, edge: &str, headers: &HeaderMap, body: Body) -> Result<Acks, RefusedAnswer> {
    let edge = authorize(door, edge, headers)?;
    let bytes_max = door.request_bytes_max;
    let is_packed = is_packed(headers)?;
    // Held until the answer is known.
    let _room = room(door, length(headers).unwrap_or(bytes_max))?;
    let body = whole(body, bytes_max).await?;
    let unpacked_len = if is_packed { Some(unpacked_len(&body)?) } else { None };
    let _more_room = unpacked_len.map(|len| room(door, len)).transpose()?;
    let reader = Arc::clone(door);
    let reading = on_a_thread(door, move || {
        let body = match unpacked_len {
            None => body,
            Some(len) => request::unpack(&body, len).ok_or_else(not_packed)?,
        };
        read(&reader, &edge, body).map(|batches| parts(batches, PART_BYTES))
    });
    let mut parts = reading.await??.into_iter();
    let mut all = Acks::default();
    for part in parts.by_ref() {
        match take_part(door, part).await {
            Ok(acks) => merge(&mut all, acks),
            Err(RefusedAnswer { refused, acks }) => {
                merge(&mut all, acks.map(|acks| *acks).unwrap_or_default());
                push_back(door, parts);
                return Err(RefusedAnswer { refused, acks: Some(Box::new(all)) });
            }
        }
        if !all.refused.is_empty() {
            // What follows a refused batch would be a gap.
            break;
        }
    }
    push_back(door, parts);
    Ok(all)
}

/// All of a body, if it comes in time and is not too large.
async fn whole(body: Body, bytes_max: usize) -> Result<Bytes, RefusedRequest> {
    let body = tokio::time::timeout(BODY_MAX, to_bytes(body, bytes_max)).await.map_err(|_| {
        let detail = format!("the body did not come within {} s", BODY_MAX.as_secs());
        RefusedRequest::Damaged { detail }
    })?;
    body.map_err(|error| {
        let too_large =
            std::error::Error::source(&error).is_some_and(|cause| cause.to_string().contains("length limit"));
        if too_large {
            RefusedRequest::TooLarge { bytes_max }
        } else {
            RefusedRequest::Damaged { detail: "the body broke off".to_owned() }
        }
    })
}

/// The later answer of a sequence counts.
fn merge(all: &mut Acks, later: Acks) {
    let is_new = |ack: &StreamAck| !later.acks.iter().any(|new| (new.spool, &new.stream) == (ack.spool, &ack.stream));
    all.acks.retain(is_new);
    all.acks.extend(later.acks);
    all.refused.extend(later.refused);
    all.node = later.node;
}

/// Counts the rows of parts that the ingest thread never saw.
fn push_back(door: &Door, parts: impl Iterator<Item = Part>) {
    for (_, part) in parts {
        count_back(door, &tally_of(&part));
    }
}

fn count_back(door: &Door, tally: &ByClass<Tally>) {
    for (class, tally) in tally.iter() {
        door.metrics.came_in(class, tally);
    }
}

/// The rows of a part by class, all pushed back.
fn tally_of(part: &[Checked]) -> ByClass<Tally> {
    let mut tally = ByClass::<Tally>::default();
    for (batch, _) in part {
        tally[class_of(batch)].pushed_back += u64::from(batch.header().rows);
    }
    tally
}

fn class_of(batch: &SealedBatch) -> Class {
    Class::of(&batch.header().edge, &batch.header().stream)
}

/// Works on a request when it is its turn.
async fn on_a_thread<T: Send + 'static>(
    door: &Door,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, RefusedRequest> {
    let turn = Arc::clone(&door.reading).acquire_owned().await.map_err(|_| unreadable())?;
    let working = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        work()
    });
    working.await.map_err(|_| unreadable())
}

fn unreadable() -> RefusedRequest {
    RefusedRequest::NotReady { detail: "the request could not be read".to_owned() }
}

/// A batch that is undamaged, and its schema.
type Checked = (SealedBatch, Arc<StreamSchema>);
/// Some of the batches of a request, and how much they take once decoded.
type Part = (usize, Vec<Checked>);

/// The batches of a request in parts that take at most so much once decoded, or one batch each: rows that repeat unpack
/// to a hundred times their size.
fn parts(batches: Vec<Checked>, bytes_max: usize) -> Vec<Part> {
    let mut parts = Vec::<Part>::new();
    for checked in batches {
        let bytes = checked.0.decoded_bytes();
        match parts.last_mut() {
            Some((all, part)) if *all + bytes <= bytes_max => {
                *all += bytes;
                part.push(checked);
            }
            _ => parts.push((bytes, vec![checked])),
        }
    }
    parts
}

async fn take_part(door: &Arc<Door>, (bytes, part): Part) -> Result<Acks, RefusedAnswer> {
    let units = u32::try_from(bytes.div_ceil(ROOM_UNIT)).unwrap_or(u32::MAX);
    // Waits for its turn: the body is here already, and counted.
    let room = Arc::clone(&door.decoded).acquire_many_owned(units).await;
    let _room = room.map_err(|_| RefusedRequest::NotReady { detail: "the node stops".to_owned() })?;
    let stream = part[0].0.header().stream.clone();
    let (tally, class) = (tally_of(&part), part.iter().map(|(batch, _)| class_of(batch)).max());
    let class = class.unwrap_or(Class::Readings);
    let decode = |(batch, schema): Checked| Arrived { rows: batch.decode(&schema), batch, schema };
    let batches = on_a_thread(door, move || part.into_iter().map(decode).collect()).await?;
    let full = || {
        count_back(door, &tally);
        RefusedRequest::PushedBack { stream, retry_after_ms: RETRY_AFTER_MS }
    };
    ask(door, class, |reply, _place| Job::Batches { class, batches, reply, _place }, full).await
}

/// Room for so many bytes of requests.
pub(crate) fn room_of(bytes: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new((bytes / ROOM_UNIT).min(Semaphore::MAX_PERMITS)))
}

/// How many bytes the body says that it has.
fn length(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Whether the body is one Zstandard frame.
fn is_packed(headers: &HeaderMap) -> Result<bool, RefusedRequest> {
    let Some(encoding) = headers.get(header::CONTENT_ENCODING) else { return Ok(false) };
    let encoding = String::from_utf8_lossy(encoding.as_bytes());
    match encoding.trim() {
        encoding if encoding.eq_ignore_ascii_case(ENCODING) => Ok(true),
        encoding if encoding.is_empty() || encoding.eq_ignore_ascii_case("identity") => Ok(false),
        other => Err(RefusedRequest::EncodingUnknown { encoding: other.chars().take(80).collect() }),
    }
}

fn unpacked_len(packed: &[u8]) -> Result<usize, RefusedRequest> {
    let len = request::unpacked_len(packed).ok_or_else(not_packed)?;
    Ok(usize::try_from(len).unwrap_or(usize::MAX))
}

fn not_packed() -> RefusedRequest {
    RefusedRequest::Damaged { detail: "the body is no Zstandard frame that says how long it gets".to_owned() }
}

/// Takes room for so many bytes of a body.
fn room(door: &Door, bytes: usize) -> Result<OwnedSemaphorePermit, RefusedRequest> {
    let bytes_max = door.request_bytes_max;
    if bytes > bytes_max {
        return Err(RefusedRequest::TooLarge { bytes_max });
    }
    let units = u32::try_from(bytes.div_ceil(ROOM_UNIT)).unwrap_or(u32::MAX);
    let busy = |_| RefusedRequest::NotReady { detail: "too many requests at once".to_owned() };
    Arc::clone(&door.room).try_acquire_many_owned(units).map_err(busy)
}

async fn give_positions(door: &Arc<Door>, edge: &str, headers: &HeaderMap, query: &str) -> Result<Acks, RefusedAnswer> {
    authorize(door, edge, headers)?;
    let spools = query
        .split('&')
        .filter_map(|pair| pair.strip_prefix("spool="))
        .take(SPOOLS_MAX)
        .map(str::parse::<SpoolId>)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| RefusedRequest::Damaged { detail: error.to_string() })?;
    if spools.is_empty() {
        return Err(RefusedRequest::Damaged { detail: "?spool=… is missing".to_owned() }.into());
    }
    let full = || RefusedRequest::NotReady { detail: "busy".to_owned() };
    ask(door, Class::Readings, |reply, _place| Job::Positions { spools, reply, _place }, full).await
}

async fn ask(
    door: &Door,
    class: Class,
    job: impl FnOnce(Reply, OwnedSemaphorePermit) -> Job,
    full: impl FnOnce() -> RefusedRequest,
) -> Result<Acks, RefusedAnswer> {
    let gone = || RefusedRequest::NotReady { detail: "the node stops".to_owned() };
    let Ok(place) = Arc::clone(&door.places[class]).try_acquire_owned() else { return Err(full().into()) };
    let (reply, answered) = oneshot::channel();
    door.jobs.send(job(reply, place)).map_err(|_| gone())?;
    answered.await.map_err(|_| gone())?
}

/// Frames, checksums and schemas: everything about a request that needs no state but known schemas.
fn read(door: &Door, edge: &EdgeId, body: Bytes) -> Result<Vec<Checked>, RefusedRequest> {
    let damaged = |detail: String| RefusedRequest::Damaged { detail };
    let mut checked = Vec::new();
    let mut own = HashMap::<SchemaId, Arc<StreamSchema>>::new();
    for frame in frames(body).map_err(|error| damaged(error.to_string()))? {
        match frame {
            Frame::Schema(text) => {
                let text = std::str::from_utf8(&text).map_err(|error| damaged(error.to_string()))?;
                let schema = StreamSchema::parse(text).map_err(|error| damaged(error.to_string()))?;
                let mut schemas = door.schemas.write();
                if schemas.len() >= SCHEMAS_MAX {
                    schemas.clear();
                }
                let schema = Arc::new(schema);
                own.insert(schema.id(), Arc::clone(&schema));
                schemas.insert(schema.id(), schema);
            }
            Frame::Batch(bytes) => {
                let batch = SealedBatch::parse(bytes).map_err(|error| damaged(error.to_string()))?;
                check_edge(&batch, edge)?;
                learn(door, &batch);
                checked.push(with_schema(door, &own, batch)?);
            }
            Frame::Rest(origin, rest) => {
                let unknown = || RefusedRequest::OriginUnknown { origin: origin.0 };
                let bytes = door.origins.read().whole(edge, origin, &rest).ok_or_else(unknown)?;
                // Also when the origin is another of the same name: the checksum covers it.
                let batch = SealedBatch::parse(bytes).map_err(|_| unknown())?;
                check_edge(&batch, edge)?;
                checked.push(with_schema(door, &own, batch)?);
            }
        }
    }
    Ok(checked)
}

fn check_edge(batch: &SealedBatch, edge: &EdgeId) -> Result<(), RefusedRequest> {
    let own = &batch.header().edge;
    if own == edge { Ok(()) } else { Err(RefusedRequest::Unauthorized { edge: own.to_string() }) }
}

fn learn(door: &Door, batch: &SealedBatch) {
    if !door.origins.read().knows(batch) {
        door.origins.write().learn(batch);
    }
}

/// `own`: the schemas of the request.
fn with_schema(
    door: &Door,
    own: &HashMap<SchemaId, Arc<StreamSchema>>,
    batch: SealedBatch,
) -> Result<Checked, RefusedRequest> {
    let id = batch.header().schema;
    let schema = own.get(&id).cloned().or_else(|| door.schemas.read().get(&id).cloned());
    let schema = schema.ok_or_else(|| RefusedRequest::SchemaUnknown { schema: format!("{id:?}") })?;
    Ok((batch, schema))
}

#[cfg(test)]
mod tests;
