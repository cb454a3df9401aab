//! `POST /v1/sql`: a statement in, rows out as JSON, NDJSON, CSV or an Arrow stream, by `Accept`.
//!
//! The body is the statement itself, or `{"sql": "…"}` as JSON. NDJSON, CSV and Arrow are streamed; JSON, an array of
//! objects, has a row limit. The first rows are computed before the status is sent, so that most errors have one.
//! Errors are `{"error": …, "hint": …}`. `?as_of=` asks every stream as of a version of its own or a moment, `?lane=` runs
//! the statement in another of the reader's lanes.
//!
//! `GET /v1/queries`: what runs and ran, `DELETE /v1/queries/{id}`: ends one. `GET /v1/streams`: the names of the tables.
//! `GET /v1/views`: the views that are kept.

use std::net::SocketAddr;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::csv::WriterBuilder as CsvBuilder;
use arrow::ipc::writer::StreamWriter;
use arrow::json::writer::{JsonArray, LineDelimited, WriterBuilder as JsonBuilder};
use arrow_schema::{ArrowError, SchemaRef};
use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{ConnectInfo, Path, Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use datafusion::execution::SendableRecordBatchStream;
use futures::{StreamExt, stream};
use serde_json::json;

use crate::as_of::AsOf;
use crate::caller::{Caller, Door};
use crate::engine::{Engine, QueryError, SQL_BYTES_MAX};
use crate::names;
use crate::serve::Readers;

/// Names the statement, for `DELETE /v1/queries/{id}`.
const QUERY_ID: HeaderName = HeaderName::from_static("x-weir-query");
/// JSON quoting can make a statement longer than it is.
const BODY_BYTES_MAX: usize = 2 * SQL_BYTES_MAX;

#[derive(Debug, Clone)]
struct Shared {
    engine: Arc<Engine>,
    readers: Readers,
}

/// The routes of this door. The server must give `ConnectInfo<SocketAddr>`.
pub fn router(engine: Arc<Engine>, readers: Readers) -> Router {
    Router::new()
        .route("/v1/sql", post(sql))
        .route("/v1/streams", get(streams))
        .route("/v1/views", get(views))
        .route("/v1/queries", get(queries))
        .route("/v1/queries/{id}", delete(cancel))
        .layer(axum::extract::DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(Shared { engine, readers })
}

/// Answers a question that the door itself puts.
async fn own(door: &Shared, peer: SocketAddr, headers: &HeaderMap, statement: &str) -> Response {
    let caller = match admit(&door.readers, peer, headers) {
        Ok(caller) => caller,
        Err(refused) => return refused,
    };
    let asked = Question { statement, as_of: None, format: Format::Json };
    answer(&door.engine, &caller, asked).await.unwrap_or_else(|error| refuse(&error))
}

async fn streams(
    State(door): State<Shared>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
) -> Response {
    let statement = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public' ORDER BY 1";
    own(&door, peer, &headers, statement).await
}

async fn queries(
    State(door): State<Shared>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
) -> Response {
    own(&door, peer, &headers, "SELECT * FROM system.queries").await
}

async fn views(State(door): State<Shared>, ConnectInfo(peer): ConnectInfo<SocketAddr>, headers: HeaderMap) -> Response {
    own(&door, peer, &headers, "SELECT * FROM system.views").await
}

async fn cancel(
    State(door): State<Shared>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    Path(id): Path<u64>,
    headers: HeaderMap,
) -> Response {
    match admit(&door.readers, peer, &headers) {
        Err(refused) => refused,
        Ok(caller) if door.engine.cancel(id, &caller) => StatusCode::NO_CONTENT.into_response(),
        Ok(_) => {
            let error = json!({ "error": format!("no statement {id} of yours runs") });
            (StatusCode::NOT_FOUND, Json(error)).into_response()
        }
    }
}

/// What may stand behind `/v1/sql?`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Wishes {
    as_of: Option<String>,
    lane: Option<String>,
}

async fn sql(
    State(door): State<Shared>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    wishes: Result<Query<Wishes>, QueryRejection>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let caller = match admit(&door.readers, peer, &headers) {
        Ok(caller) => caller,
        Err(refused) => return refused,
    };
    let Some(format) = Format::wanted(&headers) else {
        let message =
            "Accept: one of application/json, application/x-ndjson, text/csv, application/vnd.apache.arrow.stream";
        return (StatusCode::NOT_ACCEPTABLE, Json(json!({ "error": message }))).into_response();
    };
    let invalid = |message: String| refuse(&QueryError::Invalid { message });
    let wishes = match wishes {
        Ok(Query(wishes)) => wishes,
        Err(error) => return invalid(error.body_text()),
    };
    let statement = match statement(&headers, &body) {
        Ok(statement) => statement,
        Err(message) => return invalid(message),
    };
    let as_of = match wishes.as_of.as_deref().map(AsOf::parse).transpose() {
        Ok(as_of) => as_of,
        Err(error) => return refuse(&error),
    };
    let caller = match wishes.lane.map_or(Ok(caller.clone()), |lane| caller.in_lane(&lane)) {
        Ok(caller) => caller,
        Err(message) => return invalid(message),
    };
    let asked = Question { statement: &statement, as_of, format };
    answer(&door.engine, &caller, asked).await.unwrap_or_else(|error| refuse(&error))
}

/// Name and password by HTTP Basic when readers are set; otherwise a caller on this machine.
#[expect(clippy::result_large_err, reason = "the error is the response that is sent")]
pub(super) fn admit(readers: &Readers, peer: SocketAddr, headers: &HeaderMap) -> Result<Caller, Response> {
    if let Some(caller) = readers.accept_unnamed(peer.ip(), Door::Http) {
        return Ok(caller);
    }
    let named =
        headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(wire::basic::credentials);
    if let Some((name, password)) = named
        && let Some(reader) = readers.accept(&name, &password)
    {
        return Ok(reader.at(Door::Http));
    }
    let message = if readers.are_set() {
        "name and password of a reader are needed (HTTP Basic)"
    } else {
        "no reader is set, so only this machine may ask: add a [[reader]] to the configuration"
    };
    let challenge = [(header::WWW_AUTHENTICATE, "Basic realm=\"weir\"")];
    Err((StatusCode::UNAUTHORIZED, challenge, Json(json!({ "error": message }))).into_response())
}

fn statement(headers: &HeaderMap, body: &[u8]) -> Result<String, String> {
    let text = std::str::from_utf8(body).map_err(|_| "the body is not UTF-8".to_owned())?;
    let is_json = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.starts_with("application/json"));
    if !is_json && !text.trim_start().starts_with('{') {
        return Ok(text.to_owned());
    }
    let json: serde_json::Value =
        serde_json::from_str(text).map_err(|error| format!("the body is no JSON: {error}"))?;
    json["sql"].as_str().map(str::to_owned).ok_or_else(|| "the body needs a text `sql`".to_owned())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Json,
    NdJson,
    Csv,
    Arrow,
}

impl Format {
    fn wanted(headers: &HeaderMap) -> Option<Self> {
        let accept = headers.get(header::ACCEPT).map_or(Ok("*/*"), |value| value.to_str()).ok()?;
        accept.split(',').find_map(|kind| match kind.split(';').next().unwrap_or_default().trim() {
            "application/json" | "*/*" | "application/*" | "" => Some(Self::Json),
            "application/x-ndjson" | "application/jsonl" => Some(Self::NdJson),
            "text/csv" | "text/*" => Some(Self::Csv),
            "application/vnd.apache.arrow.stream" => Some(Self::Arrow),
            _ => None,
        })
    }

    fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::NdJson => "application/x-ndjson",
            Self::Csv => "text/csv; charset=utf-8",
            Self::Arrow => "application/vnd.apache.arrow.stream",
        }
    }
}

/// What is asked, as of when, and how the rows are wanted.
#[derive(Debug, Clone, Copy)]
struct Question<'a> {
    statement: &'a str,
    as_of: Option<AsOf>,
    format: Format,
}

async fn answer(engine: &Arc<Engine>, caller: &Caller, asked: Question<'_>) -> Result<Response, QueryError> {
    let running = engine.begin(caller, &engine.enter(caller).await?, asked.statement);
    let prepared = engine.prepare(&running, asked.statement, asked.as_of).await?;
    let mut rows = names::unique(engine.execute(&running, &prepared, None).await?);
    let (schema, format) = (rows.schema(), asked.format);
    let body = if format == Format::Json {
        Body::from(json_array(engine, rows).await?)
    } else {
        let first = rows.next().await.transpose().map_err(|error| engine.explain(error))?;
        streamed(format, schema, first, rows)
    };
    let headers = [(header::CONTENT_TYPE, format.content_type().to_owned()), (QUERY_ID, running.id().to_string())];
    Ok((headers, body).into_response())
}

async fn json_array(engine: &Engine, mut rows: SendableRecordBatchStream) -> Result<Vec<u8>, QueryError> {
    let mut writer = JsonBuilder::new().with_explicit_nulls(true).build::<_, JsonArray>(Vec::new());
    let rows_max = engine.settings().json_rows_max;
    let mut count = 0;
    while let Some(batch) = rows.next().await {
        let batch = batch.map_err(|error| engine.explain(error))?;
        count += batch.num_rows();
        if count > rows_max {
            let message = format!("more than {rows_max} rows: add a LIMIT, or ask for NDJSON, CSV or Arrow");
            return Err(QueryError::Invalid { message });
        }
        writer.write(&batch).map_err(unwritable)?;
    }
    writer.finish().map_err(unwritable)?;
    let body = writer.into_inner();
    Ok(if body.is_empty() { b"[]".to_vec() } else { body })
}

fn unwritable(error: ArrowError) -> QueryError {
    QueryError::Failed { message: format!("write the rows: {error}") }
}

/// One piece of body for each batch. An error in the middle breaks the body off: the client sees it is not whole.
fn streamed(format: Format, schema: SchemaRef, first: Option<RecordBatch>, rows: SendableRecordBatchStream) -> Body {
    let rows = stream::iter(first.map(Ok)).chain(rows);
    let encoder = match Encoder::new(format, &schema) {
        Ok(encoder) => encoder,
        Err(error) => return Body::from_stream(stream::iter([Err::<Bytes, _>(error)])),
    };
    Body::from_stream(stream::unfold(Some((encoder, rows)), |state| async move {
        let (mut encoder, mut rows) = state?;
        Some(match rows.next().await {
            Some(Ok(batch)) => match encoder.write(&batch) {
                Ok(bytes) => (Ok(bytes), Some((encoder, rows))),
                Err(error) => (Err(error), None),
            },
            Some(Err(error)) => (Err(ArrowError::ExternalError(Box::new(error))), None),
            None => (encoder.finish(), None),
        })
    }))
}

enum Encoder {
    NdJson,
    Csv { header: Option<SchemaRef> },
    Arrow(Box<StreamWriter<Vec<u8>>>),
}

impl Encoder {
    fn new(format: Format, schema: &SchemaRef) -> Result<Self, ArrowError> {
        Ok(match format {
            Format::Arrow => Self::Arrow(Box::new(StreamWriter::try_new(Vec::new(), schema)?)),
            Format::Csv => Self::Csv { header: Some(Arc::clone(schema)) },
            Format::Json | Format::NdJson => Self::NdJson,
        })
    }

    fn write(&mut self, batch: &RecordBatch) -> Result<Bytes, ArrowError> {
        match self {
            Self::NdJson => {
                let mut writer = JsonBuilder::new().with_explicit_nulls(true).build::<_, LineDelimited>(Vec::new());
                writer.write(batch)?;
                Ok(writer.into_inner().into())
            }
            Self::Csv { header } => {
                let mut out = Vec::new();
                CsvBuilder::new().with_header(header.take().is_some()).build(&mut out).write(batch)?;
                Ok(out.into())
            }
            Self::Arrow(writer) => {
                writer.write(batch)?;
                Ok(std::mem::take(writer.get_mut()).into())
            }
        }
    }

    fn finish(self) -> Result<Bytes, ArrowError> {
        match self {
            Self::Csv { header: Some(schema) } => {
                let mut out = Vec::new();
                CsvBuilder::new().with_header(true).build(&mut out).write(&RecordBatch::new_empty(schema))?;
                Ok(out.into())
            }
            Self::NdJson | Self::Csv { header: None } => Ok(Bytes::new()),
            Self::Arrow(mut writer) => {
                writer.finish()?;
                Ok(std::mem::take(writer.get_mut()).into())
            }
        }
    }
}

fn refuse(error: &QueryError) -> Response {
    let status = match error {
        QueryError::Syntax { .. }
        | QueryError::UnknownTable { .. }
        | QueryError::UnknownColumn { .. }
        | QueryError::ReadOnly { .. }
        | QueryError::Invalid { .. } => StatusCode::BAD_REQUEST,
        QueryError::Denied { .. } => StatusCode::FORBIDDEN,
        QueryError::Timeout { .. } => StatusCode::REQUEST_TIMEOUT,
        QueryError::Cancelled => StatusCode::CONFLICT,
        QueryError::TooMuch { .. } => StatusCode::PAYLOAD_TOO_LARGE,
        QueryError::Busy { .. } => StatusCode::TOO_MANY_REQUESTS,
        QueryError::Memory { .. } => StatusCode::SERVICE_UNAVAILABLE,
        QueryError::Failed { .. } => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let mut body = json!({ "error": error.to_string() });
    if let Some(hint) = error.hint() {
        body["hint"] = hint.into();
    }
    let mut response = (status, Json(body)).into_response();
    if matches!(error, QueryError::Busy { .. } | QueryError::Memory { .. }) {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn every_column_of_an_object_has_a_name_of_its_own() {
        let (engine, _) = crate::engine::tests::engine(1, 0, std::time::Duration::from_secs(60)).await;
        for (sql, expected) in [
            ("SELECT (SELECT count(*) FROM traffic), count(*) FROM traffic", json!({"count(*)": 10, "count(*)_2": 10})),
            ("SELECT a.v, b.v FROM (SELECT 1 AS v) a, (SELECT 2 AS v) b", json!({"v": 1, "v_2": 2})),
        ] {
            for format in [Format::Json, Format::NdJson] {
                let asked = Question { statement: sql, as_of: None, format };
                let response = answer(&engine, &Caller::node(), asked).await.unwrap();
                let body = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
                let rows: serde_json::Value = serde_json::from_slice(&body).unwrap();
                assert_eq!(if rows.is_array() { &rows[0] } else { &rows }, &expected, "{sql}");
            }
        }
    }
}
