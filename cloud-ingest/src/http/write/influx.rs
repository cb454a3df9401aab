//! What clients of InfluxDB 1 and 2 ask, and the answers that they understand.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use wire::EdgeId;

use super::{Door, Parameters, Refused, Text, add_error, add_headers, add_renamed, now_us, sender, take};
use crate::doors::rows::Gathering;
use crate::doors::{self, Origin, Told};
use crate::http::whole;

/// What clients of InfluxDB read to know whom they talk to: the one whose protocol this is.
const INFLUX_VERSION: &str = concat!("1.8-weir-", env!("CARGO_PKG_VERSION"));

pub(super) async fn write_v1(
    State(door): State<Arc<Door>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let outcome = write(&door, query.as_deref(), &headers, body).await;
    answer_lines(&door, outcome, |_, message, _| json!({ "error": message }))
}

pub(super) async fn write_v2(
    State(door): State<Arc<Door>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let outcome = write(&door, query.as_deref(), &headers, body).await;
    answer_lines(&door, outcome, |code, message, line| match line {
        None => json!({ "code": code, "message": message }),
        Some(line) => json!({ "code": code, "message": message, "line": line }),
    })
}

async fn write(door: &Arc<Door>, query: Option<&str>, headers: &HeaderMap, body: Body) -> Result<Told, Refused> {
    let parameters = Parameters::read(query);
    let edge = sender(door, headers, &parameters)?;
    let precision = parameters.precision()?;
    let text = Text::read(door, headers, body, door.write.max_bytes.bytes()).await?;
    let (devices, place, own_names) = (door.write.device.clone(), parameters.place, door.own_names.clone());
    let read = move |body: &[u8], edge: &EdgeId, rows: &mut Gathering| {
        let origin = Origin { edge, own_names: &own_names, source: "line", topic: &place, arrival_us: now_us() };
        let told = doors::line::read(body, precision, &devices, origin, rows)?;
        Ok((told, format!("line {precision:?} {place}")))
    };
    take(door, edge, "line", text, read).await
}

fn answer_lines(
    door: &Door,
    outcome: Result<Told, Refused>,
    body: impl FnOnce(&str, &str, Option<usize>) -> serde_json::Value,
) -> Response {
    let told = match outcome {
        Ok(told) => told,
        Err(refused) => {
            let (code, kind) = refused.code();
            door.metrics.refuse(kind);
            let message = refused.to_string();
            let mut response = (refused.status(), axum::Json(body(code, &message, None))).into_response();
            add_headers(&mut response, &refused, &message);
            return response;
        }
    };
    let mut response = match told.reasons.first() {
        None => StatusCode::NO_CONTENT.into_response(),
        Some((line, reason)) => {
            let all = told.rows + told.rejected;
            // Telegraf looks for these words, and does not send what is named again.
            let message = format!(
                "partial write: line {line}: {reason}; {} of {all} lines are in quarantine, the others are stored dropped={}",
                told.rejected, told.rejected
            );
            let mut response =
                (StatusCode::BAD_REQUEST, axum::Json(body("invalid", &message, Some(*line)))).into_response();
            add_error(&mut response, &message);
            response
        }
    };
    add_renamed(&mut response, &told);
    response
        .headers_mut()
        .insert(HeaderName::from_static("x-influxdb-version"), HeaderValue::from_static(INFLUX_VERSION));
    response
}

pub(super) async fn ping(RawQuery(query): RawQuery) -> Response {
    let version = [(HeaderName::from_static("x-influxdb-version"), HeaderValue::from_static(INFLUX_VERSION))];
    let verbose = query.is_some_and(|query| query.contains("verbose=true") || query.contains("verbose=1"));
    if verbose {
        return (version, axum::Json(json!({ "version": INFLUX_VERSION }))).into_response();
    }
    (StatusCode::NO_CONTENT, version).into_response()
}

/// Telegraf makes its database before it writes. Here every stream has its table when its first row comes.
pub(super) async fn query(
    State(door): State<Arc<Door>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Response {
    const STATEMENT_BYTES_MAX: usize = 64 << 10;
    let outcome = async {
        sender(&door, &headers, &Parameters::read(query.as_deref()))?;
        let body = whole(body, STATEMENT_BYTES_MAX).await?;
        let of_address = query.as_deref().unwrap_or_default().as_bytes();
        let pairs = url::form_urlencoded::parse(of_address).chain(url::form_urlencoded::parse(&body));
        let statement = pairs.filter(|(name, _)| name == "q").map(|(_, value)| value.into_owned()).next();
        let statement = statement.ok_or_else(|| Refused::Wrong("missing required parameter \"q\"".to_owned()))?;
        let mut words = statement.split_whitespace();
        let is = |word: Option<&str>, wanted: &str| word.is_some_and(|word| word.eq_ignore_ascii_case(wanted));
        if is(words.next(), "create") && is(words.next(), "database") {
            return Ok(());
        }
        let what = "Weir answers SQL at /v1/sql, over Postgres and over Flight; here only CREATE DATABASE is known";
        Err(Refused::Wrong(what.to_owned()))
    };
    match outcome.await {
        Ok(()) => axum::Json(json!({ "results": [{ "statement_id": 0 }] })).into_response(),
        Err(refused) => answer_lines(&door, Err(refused), |_, message, _| json!({ "error": message })),
    }
}
