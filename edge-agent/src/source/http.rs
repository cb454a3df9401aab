//! Messages that come as HTTP requests: `POST /ingest/{source}`, from devices and from servers that call webhooks.
//!
//! 200 says that the message is in the journal on disk. Anything else says that it is not, or (503) that this is not
//! known: a caller that sends again may then be stored twice, because a request has nothing to be recognised by. While
//! the journal is full the answer is 429 with `Retry-After`, and nothing is kept.
//!
//! The topic of a message is the source's name, the levels of the path behind it, and the values of the query in their
//! order, so `device = "topic:1"` takes `17` from `/ingest/lora/17` as from `/ingest/lora?device=17`; a `/` within a value
//! is written `%2F`. A body is at most `max_payload`, unpacked if it is gzip. Bodies that are being read take at most
//! [`BODY_BYTES_MAX`], or two of the largest; further requests wait for room. Connections are limited, too (`door.rs`).

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io::Read;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use parking_lot::Mutex;
use subtle::ConstantTimeEq;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::SourceState;
use crate::config::HttpSettings;
use crate::door::{Limited, Silence};
use crate::entry::{Entry, Message, Payload};
use crate::journal::{JournalSender, TryAppendError};

/// What bodies may take that are being read.
const BODY_BYTES_MAX: u64 = 8 << 20;
/// A permit stands for so many bytes.
const PERMIT_BYTES: u64 = 1 << 10;
/// Connections at one time, of all doors together.
const CONNECTIONS_MAX: usize = 256;
/// A connection on which nothing moves for so long ends, or for twice the longest `timeout` of the door's sources: no shorter
/// than a request that waits for its body and for the journal.
const SILENCE: Duration = Duration::from_secs(60);
/// How often an address that is taken is tried again.
const BIND_RETRY: Duration = Duration::from_secs(2);
/// How long a stop waits for requests that have begun.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// One source behind a door.
#[derive(Debug)]
pub struct Push {
    pub settings: HttpSettings,
    pub journal: JournalSender,
    pub state: Arc<SourceState>,
}

/// Places for the connections of all doors.
#[derive(Debug, Clone)]
pub struct Places(Arc<Semaphore>);

impl Default for Places {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(CONNECTIONS_MAX)))
    }
}

/// One address, and the sources behind it, which may change while it is open.
#[derive(Debug)]
pub struct Door {
    sources: Mutex<BTreeMap<String, Arc<Source>>>,
    places: Places,
    silence: Silence,
    /// Where it listens, once it does.
    address: Mutex<Option<SocketAddr>>,
}

/// What a request needs of its source.
#[derive(Debug)]
struct Source {
    settings: HttpSettings,
    /// None when the source has been taken out.
    journal: Mutex<Option<JournalSender>>,
    state: Arc<SourceState>,
    room: Semaphore,
}

/// Why a message was not taken; the text is the answer's body.
#[derive(Debug)]
struct Refused(StatusCode, &'static str);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let mut response = (self.0, format!("{}\n", self.1)).into_response();
        let headers = response.headers_mut();
        match self.0 {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}

impl Door {
    /// Without sources, and not open yet.
    pub fn new(places: Places) -> Self {
        Self { sources: Mutex::default(), places, silence: Silence::new(SILENCE), address: Mutex::default() }
    }

    /// Opens the way to a source.
    pub fn put(&self, push: Push) {
        self.silence.at_least(push.settings.timeout.0.saturating_mul(2));
        let bytes = BODY_BYTES_MAX.max(push.settings.max_payload.0.saturating_mul(2));
        let room = Semaphore::new((bytes / PERMIT_BYTES) as usize);
        let Push { settings, journal, state } = push;
        let source = Arc::new(Source { settings, journal: Mutex::new(Some(journal)), state, room });
        let address = self.address.lock();
        if address.is_some() {
            source.opened(*address);
        }
        self.sources.lock().insert(source.settings.name.clone(), source);
    }

    /// Takes a source out: nothing is journalled for it after this. Whether others are left.
    pub fn remove(&self, name: &str) -> bool {
        let mut sources = self.sources.lock();
        if let Some(source) = sources.remove(name) {
            *source.journal.lock() = None;
            source.state.connected.store(false, Ordering::Relaxed);
        }
        !sources.is_empty()
    }

    /// Serves the address until the token is cancelled.
    pub async fn run(self: Arc<Self>, listen: SocketAddr, token: CancellationToken) {
        let Some(listener) = self.bind(listen, &token).await else { return };
        let address = listener.local_addr().ok();
        {
            let mut opened = self.address.lock();
            *opened = address;
            self.sources.lock().values().for_each(|source| source.opened(address));
        }
        tracing::info!(address = ?address, "takes messages over HTTP");
        let router = Router::new()
            .route("/ingest/{*path}", post(ingest))
            .layer(axum::extract::DefaultBodyLimit::disable())
            .with_state(Arc::clone(&self));
        let ends = token.clone().cancelled_owned();
        let listener = Limited { listener, places: Arc::clone(&self.places.0), silence: self.silence.clone() };
        let served = axum::serve(listener, router).with_graceful_shutdown(ends);
        let late = async {
            token.cancelled().await;
            tokio::time::sleep(STOP_WITHIN).await;
        };
        tokio::select! {
            served = served => {
                if let Err(error) = served {
                    tracing::error!(%listen, %error, "the door for messages ended");
                }
            }
            () = late => {}
        }
        self.sources.lock().values().for_each(|source| source.state.connected.store(false, Ordering::Relaxed));
    }

    async fn bind(&self, listen: SocketAddr, token: &CancellationToken) -> Option<TcpListener> {
        let mut told = false;
        loop {
            let error = match TcpListener::bind(listen).await {
                Ok(listener) => return Some(listener),
                Err(error) => error,
            };
            if !told {
                tracing::error!(%listen, %error, "no door for messages; it is tried again");
                told = true;
            }
            let tell = |source: &Arc<Source>| source.state.error(format!("listen on {listen}: {error}"));
            self.sources.lock().values().for_each(tell);
            tokio::select! {
                () = tokio::time::sleep(BIND_RETRY) => {}
                () = token.cancelled() => return None,
            }
        }
    }
}

async fn ingest(
    State(door): State<Arc<Door>>,
    Path(path): Path<String>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<&'static str, Refused> {
    let name = path.split('/').next().unwrap_or_default();
    let source = door.sources.lock().get(name).cloned();
    let source = source.ok_or(Refused(StatusCode::NOT_FOUND, "there is no http source of this name"))?;
    if !source.admits(&headers) {
        return Err(Refused(StatusCode::UNAUTHORIZED, "the token is missing or wrong"));
    }
    let within = source.settings.timeout.0;
    let body = tokio::time::timeout(within, source.body(&headers, body))
        .await
        .map_err(|_| Refused(StatusCode::REQUEST_TIMEOUT, "the body did not come in time"))??;
    source.store(topic(&path, query.as_deref()), body).await
}

/// The levels of the path, then the values of the query.
fn topic(path: &str, query: Option<&str>) -> String {
    let mut topic = path.trim_end_matches('/').to_owned();
    for (_, value) in url::form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
        topic.push('/');
        topic.push_str(&value.replace('/', "%2F"));
    }
    topic
}

impl Source {
    fn opened(&self, address: Option<SocketAddr>) {
        *self.state.address.lock() = address;
        *self.state.last_error.lock() = None;
        self.state.connected.store(true, Ordering::Relaxed);
    }

    fn admits(&self, headers: &HeaderMap) -> bool {
        let Some(token) = &self.settings.token else { return true };
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let given = given.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
        // The file of a token may be empty: then nobody has it.
        !token.is_empty() && bool::from(given.as_bytes().ct_eq(token.as_bytes()))
    }

    /// The whole body, unpacked.
    async fn body(&self, headers: &HeaderMap, body: Body) -> Result<Bytes, Refused> {
        const TOO_LARGE: Refused = Refused(StatusCode::PAYLOAD_TOO_LARGE, "the body is larger than max_payload");
        let limit = self.settings.max_payload.0;
        let gzip = match headers.get(header::CONTENT_ENCODING).map(|value| value.to_str().unwrap_or("?")) {
            None | Some("identity") => false,
            Some(encoding) if encoding.eq_ignore_ascii_case("gzip") => true,
            Some(_) => return Err(Refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, "only gzip is unpacked")),
        };
        let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        if length.is_some_and(|length| length > limit) {
            return Err(TOO_LARGE);
        }
        let bytes = length.unwrap_or(limit) + if gzip { limit } else { 0 };
        // At most twice `limit`, which there always is.
        let _room = self.room.acquire_many((bytes / PERMIT_BYTES).max(1) as u32).await;
        let mut taken = BytesMut::with_capacity(length.unwrap_or_default() as usize);
        let mut chunks = body.into_data_stream();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|_| Refused(StatusCode::BAD_REQUEST, "the body broke off"))?;
            if (taken.len() + chunk.len()) as u64 > limit {
                return Err(TOO_LARGE);
            }
            taken.extend_from_slice(&chunk);
        }
        if !gzip {
            return Ok(taken.freeze());
        }
        let unpacked = tokio::task::spawn_blocking(move || {
            let mut unpacked = Vec::new();
            // One byte more tells a body that is too large from one that fills the limit.
            let mut reader = flate2::read::MultiGzDecoder::new(&taken[..]).take(limit + 1);
            reader.read_to_end(&mut unpacked).map(|_| unpacked)
        });
        match unpacked.await {
            Ok(Ok(unpacked)) if unpacked.len() as u64 > limit => Err(TOO_LARGE),
            Ok(Ok(unpacked)) => Ok(unpacked.into()),
            _ => Err(Refused(StatusCode::BAD_REQUEST, "the body is not gzip")),
        }
    }

    /// Answers when the message is durable.
    async fn store(&self, topic: String, body: Bytes) -> Result<&'static str, Refused> {
        let (arrival_us, ticket, mut durable) = {
            let mut journal = self.journal.lock();
            let Some(journal) = journal.as_mut() else {
                return Err(Refused(StatusCode::SERVICE_UNAVAILABLE, "the source is being changed"));
            };
            let arrival_us = journal.now_us();
            let entry = Entry::Message(Message {
                source: self.settings.name.clone(),
                topic,
                payload: Payload::Whole(body),
                arrival_us,
                delivery: None,
            });
            let ticket = journal.try_append(&entry).map_err(|error| match error {
                TryAppendError::Full => {
                    self.state.error("the journal is full: callers are told to come again".to_owned());
                    Refused(StatusCode::TOO_MANY_REQUESTS, "the journal is full")
                }
                TryAppendError::Closed(_) => Refused(StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping"),
            })?;
            self.state.received.fetch_add(1, Ordering::Relaxed);
            (arrival_us, ticket, journal.durable())
        };
        self.state.last_arrival_us.store(arrival_us, Ordering::Relaxed);
        match tokio::time::timeout(self.settings.timeout.0, durable.wait_for(|durable| *durable >= ticket)).await {
            Ok(Ok(_)) => {
                *self.state.last_error.lock() = None;
                Ok("ok\n")
            }
            _ => Err(Refused(StatusCode::SERVICE_UNAVAILABLE, "the message may be stored later or not at all")),
        }
    }
}
