//! The doors of alerts: rules, what fires, what people say of it, silences, and the stream of changes.
//!
//! | | |
//! |---|---|
//! | `GET /v1/rules`, `GET`, `PUT`, `DELETE /v1/rules/{name}` | rules; a `PUT` takes TOML or JSON |
//! | `POST /v1/rules/check`, `POST /v1/rules/test?from=…&to=…` | whether a rule can run; what it would have found |
//! | `GET /v1/alerts?limit=…&after=…` | what is open, the worst first; a header `link` with `rel="next"` when there is more |
//! | `POST /v1/alerts/{id}/ack`, `assign`, `comment`, `resolve` | JSON with `note`, `to`, `by` |
//! | `GET`, `POST /v1/silences`, `DELETE /v1/silences/{id}` | JSON with `rule`, `labels`, `from`, `until`, `every`, `last`, `note` |
//! | `GET /v1/alerts/stream?topic=…&severity=…&after=…` | changes as server-sent events |
//! | `GET /v1/targets` | who is told, and how far |
//!
//! A rule sees every row, so alerts are for readers without a scope. Who changes rules needs the right `rules`; who speaks about
//! alerts, or silences them, the right `alerts`. A caller on this machine has both while no reader is set.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{ConnectInfo, Path, Query, State};
use axum::http::header::LINK;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use chrono::DateTime;
use serde::Deserialize;
use serde_json::json;
use wire::written::Span;

use crate::alerts::silence::Silence;
use crate::alerts::{
    AlertError, Alerts, OPEN_MAX, Opened, Page, RULE_BYTES_MAX, RuleSettings, Severity, TopicFilter, Word, wait_for_hub,
};
use crate::caller::{Caller, Right};
use crate::clock::now_us;
use crate::publish::sse::{self, Subscription};
use crate::serve::Readers;
use crate::serve::http::admit;

/// Longest text that a person may say, bytes.
const NOTE_BYTES_MAX: usize = 4_096;

#[derive(Debug, Clone)]
struct Shared {
    alerts: Arc<Alerts>,
    readers: Readers,
}

/// The routes of this door. The server must give `ConnectInfo<SocketAddr>`.
pub fn router(alerts: Arc<Alerts>, readers: Readers) -> Router {
    Router::new()
        .route("/v1/rules", get(rules))
        .route("/v1/rules/check", post(check))
        .route("/v1/rules/test", post(test))
        .route("/v1/rules/{name}", get(rule).put(put).delete(remove))
        .route("/v1/alerts", get(open))
        .route("/v1/alerts/stream", get(stream))
        .route("/v1/alerts/{id}/{word}", post(say))
        .route("/v1/silences", get(silences).post(silence))
        .route("/v1/silences/{id}", delete(unsilence))
        .route("/v1/targets", get(targets))
        .layer(axum::extract::DefaultBodyLimit::max(RULE_BYTES_MAX))
        .with_state(Shared { alerts, readers })
}

pub(super) fn told(status: StatusCode, error: &str) -> Response {
    (status, Json(json!({ "error": error }))).into_response()
}

fn refused(error: &AlertError) -> Response {
    let status = match error {
        AlertError::Invalid(_) => StatusCode::BAD_REQUEST,
        AlertError::NotFound(_) => StatusCode::NOT_FOUND,
        AlertError::Failed(_) => StatusCode::SERVICE_UNAVAILABLE,
    };
    told(status, &error.to_string())
}

pub(super) fn answer<T: serde::Serialize>(done: Result<T, AlertError>) -> Response {
    match done {
        Ok(done) => Json(done).into_response(),
        Err(error) => refused(&error),
    }
}

pub(super) type Peer = ConnectInfo<SocketAddr>;

impl Shared {
    #[expect(clippy::result_large_err, reason = "the error is the response that is sent")]
    fn reader(&self, peer: &Peer, headers: &HeaderMap) -> Result<Caller, Response> {
        seeing_all(&self.readers, peer, headers)
    }

    #[expect(clippy::result_large_err, reason = "the error is the response that is sent")]
    fn with(&self, right: Right, peer: &Peer, headers: &HeaderMap) -> Result<Caller, Response> {
        having(right, &self.readers, peer, headers)
    }
}

/// Who may see alerts, and what is made of them.
#[expect(clippy::result_large_err, reason = "the error is the response that is sent")]
pub(super) fn seeing_all(readers: &Readers, peer: &Peer, headers: &HeaderMap) -> Result<Caller, Response> {
    let caller = admit(readers, peer.0, headers)?;
    if caller.scope().is_some() {
        let error = "alerts are for readers without a scope: a rule sees every row";
        return Err(told(StatusCode::FORBIDDEN, error));
    }
    Ok(caller)
}

/// Who may do something about them.
#[expect(clippy::result_large_err, reason = "the error is the response that is sent")]
pub(super) fn having(right: Right, readers: &Readers, peer: &Peer, headers: &HeaderMap) -> Result<Caller, Response> {
    let caller = seeing_all(readers, peer, headers)?;
    if caller.may(right) {
        return Ok(caller);
    }
    let error = format!("`{}` may not: its [[reader]] needs rights = [\"{right}\"]", caller.name());
    Err(told(StatusCode::FORBIDDEN, &error))
}

async fn rules(State(door): State<Shared>, peer: Peer, headers: HeaderMap) -> Response {
    match door.reader(&peer, &headers) {
        Ok(_) => Json(door.alerts.rules()).into_response(),
        Err(refused) => refused,
    }
}

async fn targets(State(door): State<Shared>, peer: Peer, headers: HeaderMap) -> Response {
    match door.reader(&peer, &headers) {
        Ok(_) => Json(door.alerts.targets()).into_response(),
        Err(refused) => refused,
    }
}

async fn rule(State(door): State<Shared>, peer: Peer, Path(name): Path<String>, headers: HeaderMap) -> Response {
    if let Err(refused) = door.reader(&peer, &headers) {
        return refused;
    }
    let status = door.alerts.rules().into_iter().find(|rule| rule.name == name);
    match status {
        Some(status) => Json(json!({ "rule": status, "text": door.alerts.text(&name).await })).into_response(),
        None => told(StatusCode::NOT_FOUND, "there is no such rule"),
    }
}

async fn put(
    State(door): State<Shared>,
    peer: Peer,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: String,
) -> Response {
    match door.with(Right::Rules, &peer, &headers) {
        Ok(_) => answer(door.alerts.put(&name, &body).await),
        Err(refused) => refused,
    }
}

async fn remove(State(door): State<Shared>, peer: Peer, Path(name): Path<String>, headers: HeaderMap) -> Response {
    match door.with(Right::Rules, &peer, &headers) {
        Ok(_) => answer(door.alerts.delete(&name).await),
        Err(refused) => refused,
    }
}

/// The rules of a body: a file of them, or one.
fn read(body: &str) -> Result<Vec<RuleSettings>, String> {
    if body.contains("[[rule]]") {
        RuleSettings::parse_file(body)
    } else {
        RuleSettings::parse("rule", body).map(|rule| vec![rule])
    }
}

async fn check(State(door): State<Shared>, peer: Peer, headers: HeaderMap, body: String) -> Response {
    if let Err(refused) = door.with(Right::Rules, &peer, &headers) {
        return refused;
    }
    let rules = match read(&body) {
        Ok(rules) => rules,
        Err(error) => return told(StatusCode::BAD_REQUEST, &error),
    };
    let mut found = Vec::new();
    for rule in rules {
        let name = rule.name.clone();
        found.push(match door.alerts.check(rule).await {
            Ok(status) => json!({ "name": name, "rule": status }),
            Err(error) => json!({ "name": name, "error": error.to_string() }),
        });
    }
    Json(found).into_response()
}

/// An interval of event time, RFC 3339.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Interval {
    from: String,
    to: String,
}

fn moment(text: &str) -> Result<i64, String> {
    let plain = format!("{text}T00:00:00Z");
    let text = if text.len() == 10 { &plain } else { text };
    let time = DateTime::parse_from_rfc3339(text);
    time.map(|time| time.timestamp_micros())
        .map_err(|_| format!("`{text:.80}` is no moment: write it as 2026-01-31, or 2026-01-31T12:00:00Z"))
}

async fn test(
    State(door): State<Shared>,
    peer: Peer,
    interval: Result<Query<Interval>, QueryRejection>,
    headers: HeaderMap,
    body: String,
) -> Response {
    if let Err(refused) = door.with(Right::Rules, &peer, &headers) {
        return refused;
    }
    let bounds = interval
        .map_err(|error| error.body_text())
        .and_then(|Query(interval)| Ok((moment(&interval.from)?, moment(&interval.to)?, read(&body)?)));
    let (from, to, rules) = match bounds {
        Ok(bounds) => bounds,
        Err(error) => return told(StatusCode::BAD_REQUEST, &error),
    };
    let mut found = Vec::new();
    for rule in rules {
        let name = rule.name.clone();
        found.push(match door.alerts.trial(rule, from, to).await {
            Ok(trial) => json!({ "name": name, "found": trial }),
            Err(error) => json!({ "name": name, "error": error.to_string() }),
        });
    }
    Json(found).into_response()
}

/// What may stand behind `/v1/alerts?`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Part {
    limit: Option<usize>,
    after: Option<String>,
}

async fn open(
    State(door): State<Shared>,
    peer: Peer,
    part: Result<Query<Part>, QueryRejection>,
    headers: HeaderMap,
) -> Response {
    if let Err(refused) = door.reader(&peer, &headers) {
        return refused;
    }
    let page = part.map_err(|error| error.body_text()).and_then(|Query(part)| {
        let limit = part.limit.unwrap_or(OPEN_MAX);
        if !(1..=OPEN_MAX).contains(&limit) {
            return Err(format!("limit is from 1 to {OPEN_MAX}"));
        }
        Ok(Page { after: part.after.as_deref().map(Page::place).transpose()?, limit })
    });
    let page = match page {
        Ok(page) => page,
        Err(error) => return told(StatusCode::BAD_REQUEST, &error),
    };
    let limit = page.limit;
    match door.alerts.open(page).await {
        Ok(Opened { alerts, next: None }) => Json(alerts).into_response(),
        Ok(Opened { alerts, next: Some(next) }) => {
            // Ids of edges may be anything.
            let next: String = url::form_urlencoded::byte_serialize(next.as_bytes()).collect();
            let link = format!("</v1/alerts?limit={limit}&after={next}>; rel=\"next\"");
            ([(LINK, link)], Json(alerts)).into_response()
        }
        Err(error) => refused(&error),
    }
}

/// What a person says.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    #[serde(default)]
    note: String,
    /// Who gets it.
    to: Option<String>,
    /// Who says it, where the door knows no names.
    by: Option<String>,
}

/// Who says something: the reader's own name, and where there are no readers whom it names.
fn actor(caller: &Caller, readers: &Readers, by: Option<String>) -> String {
    by.filter(|_| !readers.are_set()).unwrap_or_else(|| caller.name().to_owned())
}

async fn say(
    State(door): State<Shared>,
    peer: Peer,
    Path((id, word)): Path<(String, String)>,
    headers: HeaderMap,
    body: String,
) -> Response {
    let caller = match door.with(Right::Alerts, &peer, &headers) {
        Ok(caller) => caller,
        Err(refused) => return refused,
    };
    let said: Result<Said, _> = if body.trim().is_empty() { Ok(Said::default()) } else { serde_json::from_str(&body) };
    let said = match said {
        Ok(said) => said,
        Err(error) => return told(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    let long = |text: &str| text.len() > NOTE_BYTES_MAX;
    if long(&said.note) || said.to.as_deref().is_some_and(long) || said.by.as_deref().is_some_and(long) {
        return told(StatusCode::BAD_REQUEST, &format!("a text has at most {NOTE_BYTES_MAX} bytes"));
    }
    let word = match (word.as_str(), said.to) {
        ("ack", None) => Word::Acknowledge,
        ("assign", Some(to)) => Word::Assign(to),
        ("comment", None) => Word::Comment,
        ("resolve", None) => Word::Resolve,
        ("assign", None) => return told(StatusCode::BAD_REQUEST, "assign needs `to`"),
        ("ack" | "comment" | "resolve", Some(_)) => return told(StatusCode::BAD_REQUEST, "`to` goes with assign"),
        _ => return told(StatusCode::NOT_FOUND, "there is ack, assign, comment and resolve"),
    };
    let by = actor(&caller, &door.readers, said.by);
    answer(door.alerts.say(&id, word, &by, &said.note).await)
}

async fn silences(State(door): State<Shared>, peer: Peer, headers: HeaderMap) -> Response {
    match door.reader(&peer, &headers) {
        Ok(_) => answer(door.alerts.silences().await),
        Err(refused) => refused,
    }
}

/// A silence as it is asked for.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SilenceAsked {
    rule: Option<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    /// Now, unless said otherwise.
    from: Option<String>,
    until: String,
    /// A maintenance window comes again after so long, and for the last time before `last`.
    every: Option<Span>,
    last: Option<String>,
    #[serde(default)]
    note: String,
    by: Option<String>,
}

impl SilenceAsked {
    fn read(self, by: String, now: i64) -> Result<Silence, String> {
        let from = self.from.as_deref().map(moment).transpose()?.unwrap_or(now);
        let until = moment(&self.until)?;
        let every = self.every.map(Span::micros);
        let last = self.last.as_deref().map(moment).transpose()?;
        if until <= from || until <= now && every.is_none() {
            return Err("a silence ends after it begins, and in the future".to_owned());
        }
        if self.rule.is_none() && self.labels.is_empty() {
            return Err("a silence names a rule or labels; `*` stands for any".to_owned());
        }
        if self.labels.len() > 32 || self.labels.iter().any(|(name, text)| name.len() + text.len() > 1_000) {
            return Err("a silence has at most 32 labels of at most 1000 bytes".to_owned());
        }
        let last = match (every, last) {
            (Some(every), Some(last)) if every >= until - from => last,
            (Some(_), Some(_)) => return Err("the window is longer than the time between two".to_owned()),
            (Some(_), None) => return Err("a window that comes again needs `last`".to_owned()),
            (None, _) => until,
        };
        if self.note.len() > NOTE_BYTES_MAX {
            return Err(format!("a note has at most {NOTE_BYTES_MAX} bytes"));
        }
        let id = format!("{:032x}", rand::random::<u128>());
        Ok(Silence { id, rule: self.rule, labels: self.labels, from, until, every, last, by, note: self.note })
    }
}

async fn silence(State(door): State<Shared>, peer: Peer, headers: HeaderMap, body: String) -> Response {
    let caller = match door.with(Right::Alerts, &peer, &headers) {
        Ok(caller) => caller,
        Err(refused) => return refused,
    };
    let asked: Result<SilenceAsked, String> = serde_json::from_str(&body).map_err(|error| error.to_string());
    let silence = asked.and_then(|mut asked| {
        let by = actor(&caller, &door.readers, asked.by.take());
        asked.read(by, now_us())
    });
    let silence = match silence {
        Ok(silence) => silence,
        Err(error) => return told(StatusCode::BAD_REQUEST, &error),
    };
    let id = silence.id.clone();
    answer(door.alerts.silence(silence).await.map(|()| json!({ "id": id })))
}

async fn unsilence(State(door): State<Shared>, peer: Peer, Path(id): Path<String>, headers: HeaderMap) -> Response {
    match door.with(Right::Alerts, &peer, &headers) {
        Ok(caller) => answer(door.alerts.unsilence(&id, caller.name()).await),
        Err(refused) => refused,
    }
}

/// What may stand behind `/v1/alerts/stream?`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wishes {
    topic: Option<String>,
    severity: Option<String>,
    after: Option<i64>,
}

async fn stream(
    State(door): State<Shared>,
    peer: Peer,
    wishes: Result<Query<Wishes>, QueryRejection>,
    headers: HeaderMap,
) -> Response {
    if let Err(refused) = door.reader(&peer, &headers) {
        return refused;
    }
    let hub = Arc::clone(door.alerts.hub());
    let token = door.alerts.token().clone();
    let read = wishes.map_err(|error| error.body_text()).and_then(|Query(wishes)| {
        let topic = TopicFilter::parse(wishes.topic.as_deref().unwrap_or("#"))?;
        let words = wishes.severity.as_deref().unwrap_or_default().split(',').filter(|word| !word.is_empty());
        let severity =
            |word: &str| Severity::of(word).ok_or_else(|| format!("`{word:.80}` is none of info, warning, critical"));
        Ok((topic, words.map(severity).collect::<Result<Vec<_>, String>>()?, wishes.after))
    });
    let (topic, severities, after) = match read {
        Ok(read) => read,
        Err(error) => return told(StatusCode::BAD_REQUEST, &error),
    };
    let last = match headers.get("last-event-id").map(|value| value.to_str().ok().and_then(|text| text.parse().ok())) {
        Some(Some(last)) => Some(last),
        Some(None) => return told(StatusCode::BAD_REQUEST, "Last-Event-ID is the number of a change"),
        None => after,
    };
    let Some(place) = hub.place(peer.0.ip()) else {
        let error = "as many listen as may, or half of them from this address: [alerts] subscribers_max";
        return told(StatusCode::SERVICE_UNAVAILABLE, error);
    };
    let Some(newest) = wait_for_hub(&hub, &token).await else {
        return told(StatusCode::SERVICE_UNAVAILABLE, "the node stops");
    };
    sse::answer(
        hub,
        Subscription { topic, severities, after: last.map_or(newest, |last: i64| last.min(newest)) },
        token,
        place,
    )
}
