//! The door of commands: an edge fetches its own with its token, and says what became of each (`wire::command`).

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use wire::command::COMMAND_ANSWER_BYTES_MAX;
use wire::{CommandReply, CommandsAnswer, RefusedRequest};

use super::{Door, authorize, refuse, whole};

/// Bytes of an answer, as JSON: each of its own may be an escape of six.
const REPLY_BYTES_MAX: usize = 6 * COMMAND_ANSWER_BYTES_MAX + 256;

pub(super) fn routes() -> Router<Arc<Door>> {
    Router::new().route("/v1/edges/{edge}/commands", get(fetch)).route("/v1/edges/{edge}/commands/{id}", post(reply))
}

/// What may stand behind `commands?`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wishes {
    #[serde(default)]
    run: String,
    #[serde(default)]
    after: u64,
    #[serde(default)]
    wait_ms: u64,
}

async fn fetch(
    State(door): State<Arc<Door>>,
    Path(edge): Path<String>,
    wishes: Result<Query<Wishes>, QueryRejection>,
    headers: HeaderMap,
) -> Response {
    match give(&door, &edge, wishes, &headers).await {
        Ok(answer) => Json(answer).into_response(),
        Err(refused) => refuse(&door, refused.into()),
    }
}

async fn give(
    door: &Door,
    edge: &str,
    wishes: Result<Query<Wishes>, QueryRejection>,
    headers: &HeaderMap,
) -> Result<CommandsAnswer, RefusedRequest> {
    let edge = authorize(door, edge, headers)?;
    let Query(wishes) = wishes.map_err(|error| RefusedRequest::Damaged { detail: error.body_text() })?;
    let fetched = door.commands.fetch(&edge, &wishes.run, wishes.after, Duration::from_millis(wishes.wait_ms)).await;
    fetched.map_err(|error| RefusedRequest::NotReady { detail: error.to_string() })
}

async fn reply(
    State(door): State<Arc<Door>>,
    Path((edge, id)): Path<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    match take(&door, &edge, &id, &headers, body).await {
        Ok(true) => Json(serde_json::json!({})).into_response(),
        Ok(false) => {
            let gone = serde_json::json!({ "error": "nobody waits for it: it is answered, or its time is over" });
            (StatusCode::GONE, Json(gone)).into_response()
        }
        Err(refused) => refuse(&door, refused.into()),
    }
}

async fn take(door: &Door, edge: &str, id: &str, headers: &HeaderMap, body: Body) -> Result<bool, RefusedRequest> {
    let edge = authorize(door, edge, headers)?;
    let body = whole(body, REPLY_BYTES_MAX).await?;
    let reply: CommandReply =
        serde_json::from_slice(&body).map_err(|error| RefusedRequest::Damaged { detail: error.to_string() })?;
    let reply = if reply.ok { CommandReply::done(reply.answer) } else { CommandReply::refused(reply.answer) };
    Ok(door.commands.reply(&edge, id, reply))
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderValue, header};
    use wire::Command;

    use super::super::tests::{EDGE, door};
    use super::*;
    use crate::commands::Ended;

    fn bearing(token: &str) -> HeaderMap {
        let value = HeaderValue::from_str(&format!("Bearer {token}")).unwrap();
        HeaderMap::from_iter([(header::AUTHORIZATION, value)])
    }

    fn wishes(wait_ms: u64) -> Result<Query<Wishes>, QueryRejection> {
        Ok(Query(Wishes { run: String::new(), after: 0, wait_ms }))
    }

    #[tokio::test]
    async fn commands_are_for_whom_has_the_token_of_that_edge() {
        let (door, _) = door();
        let commands = Arc::clone(&door.commands);
        let command = Command { id: "1".to_owned(), name: "plan".to_owned(), device: None, payload: String::new() };
        let asked = tokio::spawn(async move { commands.ask(EDGE, command, Duration::from_secs(60)).await });
        tokio::task::yield_now().await;
        let reply = || Body::from("{\"ok\":true,\"answer\":\"yes\"}");
        for headers in [bearing("o"), bearing(""), HeaderMap::new()] {
            let unauthorized = |refused: RefusedRequest| matches!(refused, RefusedRequest::Unauthorized { .. });
            assert!(unauthorized(give(&door, EDGE, wishes(0), &headers).await.unwrap_err()));
            assert!(unauthorized(take(&door, EDGE, "1", &headers, reply()).await.unwrap_err()));
        }
        let others = give(&door, "other", wishes(0), &bearing("o")).await.unwrap();
        assert!(others.commands.is_empty());
        assert!(!take(&door, "other", "1", &bearing("o"), reply()).await.unwrap());
        let own = give(&door, EDGE, wishes(60_000), &bearing("t")).await.unwrap();
        assert_eq!(own.commands.len(), 1);
        let long = Body::from(vec![b' '; REPLY_BYTES_MAX + 1]);
        let too_large = take(&door, EDGE, "1", &bearing("t"), long).await.unwrap_err();
        assert!(matches!(too_large, RefusedRequest::TooLarge { .. }));
        assert!(take(&door, EDGE, "1", &bearing("t"), Body::from("what")).await.is_err());
        assert!(take(&door, EDGE, "1", &bearing("t"), reply()).await.unwrap());
        assert_eq!(asked.await.unwrap(), Ended::Answered(CommandReply::done("yes")));
    }
}
