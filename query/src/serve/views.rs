//! `GET /v1/views/{view}/stream?after=…`: what a view says, as server-sent events; `GET /v1/views/targets`: who else is told.
//!
//! One event for each append to `<view>_changes` ([`appends`]). Who comes again with `Last-Event-ID` (or `?after=`) gets each append
//! behind it once; who names none begins with what comes, and with `?after=start` at the first row.
//!
//! Everybody gets what a question to `<view>_changes` would show, in the same lane and within the same limits. A subscriber
//! has one page of appends in memory at a time and is waited for by its own connection alone, which ends when nothing can be
//! written to it for long (`serve::tls`).

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{ConnectInfo, Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use futures::{Stream, stream};
use serde::Deserialize;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use wire::StreamName;

use super::http::admit;
use crate::engine::Engine;
use crate::places::{Place, Places};
use crate::publish::appends::{self, Follower, Read};
use crate::publish::views::ViewTargets;
use crate::serve::Readers;
use crate::views::changes;

/// Subscribers at one time.
const SUBSCRIBERS_MAX: usize = 256;
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Where one begins who wants all of it.
const START: &str = "start";

#[derive(Debug, Clone)]
struct Shared {
    engine: Arc<Engine>,
    readers: Readers,
    targets: Arc<ViewTargets>,
    places: Places,
    token: CancellationToken,
}

/// The routes of this door. The server must give `ConnectInfo<SocketAddr>`.
pub fn router(engine: Arc<Engine>, targets: Arc<ViewTargets>, readers: Readers, token: CancellationToken) -> Router {
    let places = Places::new(SUBSCRIBERS_MAX);
    Router::new()
        .route("/v1/views/{view}/stream", get(subscribe))
        .route("/v1/views/targets", get(told_of))
        .with_state(Shared { engine, readers, targets, places, token })
}

/// Who is told, and how it fares: for readers of everything.
async fn told_of(
    State(door): State<Shared>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
) -> Response {
    match admit(&door.readers, peer, &headers) {
        Ok(caller) if caller.scope().is_none() => Json(door.targets.statuses()).into_response(),
        Ok(_) => {
            let error = "who is told of views is for readers who see everything";
            (StatusCode::FORBIDDEN, Json(json!({ "error": error }))).into_response()
        }
        Err(refused) => refused,
    }
}

/// What may stand behind `/stream?`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wishes {
    after: Option<String>,
}

async fn subscribe(
    State(door): State<Shared>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    Path(view): Path<String>,
    wishes: Result<Query<Wishes>, QueryRejection>,
    headers: HeaderMap,
) -> Response {
    let told = |status: StatusCode, error: String| (status, Json(json!({ "error": error }))).into_response();
    let caller = match admit(&door.readers, peer, &headers) {
        Ok(caller) => caller,
        Err(refused) => return refused,
    };
    let wishes = match wishes {
        Ok(Query(wishes)) => wishes,
        Err(error) => return told(StatusCode::BAD_REQUEST, error.body_text()),
    };
    let (true, Ok(name)) = (door.engine.views().has(&view), view.parse::<StreamName>()) else {
        return told(StatusCode::NOT_FOUND, format!("no view `{view:.80}`; GET /v1/views tells which there are"));
    };
    let Ok(changes) = changes(&name) else {
        return told(StatusCode::NOT_FOUND, format!("view `{view:.80}` has no stream"));
    };
    let last = headers.get("last-event-id").map(|last| last.to_str().unwrap_or_default().to_owned());
    let read = match last.or(wishes.after).as_deref() {
        Some(START) => Ok(Read::new()),
        Some(id) => match appends::read_id(id) {
            Some(read) => Ok(read),
            None => return told(StatusCode::BAD_REQUEST, "the last event is named by its id, or `start`".to_owned()),
        },
        None => appends::newest(&door.engine, &changes).await,
    };
    let read = match read {
        Ok(read) => read,
        Err(error) => return told(StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
    };
    let Some(place) = door.places.take(peer.ip()) else {
        let error =
            format!("{SUBSCRIBERS_MAX} listen to views already, or half of them from this address: try again later");
        return told(StatusCode::SERVICE_UNAVAILABLE, error);
    };
    let follower = Follower::new((door.engine, caller), (view, changes), read, door.token);
    Sse::new(events(follower, place)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

/// What is written to a subscriber, who keeps the place as long as it listens.
fn events(follower: Follower, place: Place) -> impl Stream<Item = Result<Event, Infallible>> + Send {
    stream::unfold((follower, place), |(mut follower, place)| async move {
        let append = follower.next().await?;
        Some((Ok(Event::default().id(append.id).event("change").data(append.data)), (follower, place)))
    })
}
