//! The doors of links.
//!
//! | | |
//! |---|---|
//! | `GET /v1/links` | how they stand |
//! | `GET`, `PUT`, `DELETE /v1/links/{name}` | one; a `PUT` takes TOML or JSON |
//!
//! A link hears every alert, so it is for readers without a scope; who changes one needs the right `links`. Webhooks and edges are
//! named in the configuration alone, so that nobody sends anything anywhere else by this door.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;

use super::alerts::{Peer, answer, having, seeing_all, told};
use crate::caller::Right;
use crate::links::{LINK_BYTES_MAX, Links};
use crate::serve::Readers;

#[derive(Debug, Clone)]
struct Shared {
    links: Arc<Links>,
    readers: Readers,
}

/// The routes of this door. The server must give `ConnectInfo<SocketAddr>`.
pub fn router(links: Arc<Links>, readers: Readers) -> Router {
    Router::new()
        .route("/v1/links", get(all))
        .route("/v1/links/{name}", get(one).put(put).delete(remove))
        .layer(axum::extract::DefaultBodyLimit::max(LINK_BYTES_MAX))
        .with_state(Shared { links, readers })
}

async fn all(State(door): State<Shared>, peer: Peer, headers: HeaderMap) -> Response {
    match seeing_all(&door.readers, &peer, &headers) {
        Ok(_) => Json(door.links.all()).into_response(),
        Err(refused) => refused,
    }
}

async fn one(State(door): State<Shared>, peer: Peer, Path(name): Path<String>, headers: HeaderMap) -> Response {
    if let Err(refused) = seeing_all(&door.readers, &peer, &headers) {
        return refused;
    }
    match door.links.all().into_iter().find(|link| link.name == name) {
        Some(status) => Json(json!({ "link": status, "text": door.links.text(&name).await })).into_response(),
        None => told(StatusCode::NOT_FOUND, "there is no such link"),
    }
}

async fn put(
    State(door): State<Shared>,
    peer: Peer,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: String,
) -> Response {
    match having(Right::Links, &door.readers, &peer, &headers) {
        Ok(_) => answer(door.links.put(&name, &body).await),
        Err(refused) => refused,
    }
}

async fn remove(State(door): State<Shared>, peer: Peer, Path(name): Path<String>, headers: HeaderMap) -> Response {
    match having(Right::Links, &door.readers, &peer, &headers) {
        Ok(_) => answer(door.links.delete(&name).await),
        Err(refused) => refused,
    }
}
