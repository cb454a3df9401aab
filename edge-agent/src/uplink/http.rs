//! Requests to the cloud over HTTP: positions, and batches with their schemas in front.
//!
//! Connections are kept, until a request gets no answer in time: then the link may have died without a word, and with it
//! every connection that is kept, and each would cost one more timeout. So all are given up, and the next request makes a
//! new one. A request with batches has time as long as its bytes go on going (`upload.rs`). Redirects are not followed; an answer is read up to 4 MiB. Every answer becomes acks or a [`Failure`] with a
//! text for people. The token is sent and never shown.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::DateTime;
use parking_lot::Mutex;
use reqwest::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, DATE, HeaderMap, HeaderValue};
use reqwest::{Certificate, Client, RequestBuilder, StatusCode, redirect};
use url::Url;
use wire::request::ENCODING;
use wire::{Acks, CommandReply, CommandsAnswer, EdgeId, RefusedAnswer, RefusedRequest, SchemaId, SealedBatch, SpoolId};

use super::parcel::{Nodes, Parcel};
use super::state::Failure;
use super::upload::Upload;
use crate::clock::Clock;
use crate::config::CloudSettings;

/// The longest answer that is read.
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// The longest wait for a connection.
const CONNECT_MAX: Duration = Duration::from_secs(10);
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// No request goes for longer than its bytes need at this rate, even if they never stand still.
const CRAWL_BYTES_PER_S: u64 = 1 << 10;
/// When a node that pushes back does not say for how long.
const RETRY_AFTER_MS: u64 = 1_000;

/// A request that was not taken as a whole.
#[derive(Debug)]
pub struct Failed {
    pub failure: Failure,
    /// Why, for people.
    pub text: String,
    /// Of what the node took of it all the same.
    pub acks: Option<Box<Acks>>,
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("read {path}")]
    Read { path: std::path::PathBuf, source: std::io::Error },
    #[error("the token has characters that no HTTP header can carry")]
    Token,
    #[error("make the HTTP client")]
    Client(#[from] reqwest::Error),
}

/// Speaks to the cloud's addresses.
#[derive(Debug, Clone)]
pub struct CloudClient {
    connections: Arc<Mutex<Connections>>,
    /// Makes a client, which has no connections yet.
    parts: Arc<ClientParts>,
    urls: Vec<Url>,
    edge: EdgeId,
    nodes: Arc<Mutex<Nodes>>,
    /// Hears what time it is.
    clock: Option<Arc<Clock>>,
}

/// The connections that are kept.
#[derive(Debug)]
struct Connections {
    client: Client,
    /// How often they were given up.
    given_up: u64,
}

/// What a client is made of.
#[derive(Debug)]
struct ClientParts {
    headers: HeaderMap,
    timeout: Duration,
    certificates: Option<Vec<Certificate>>,
}

impl ClientParts {
    fn client(&self) -> reqwest::Result<Client> {
        let mut builder = Client::builder()
            .default_headers(self.headers.clone())
            .timeout(self.timeout)
            .connect_timeout(self.timeout.min(CONNECT_MAX))
            .tcp_nodelay(true)
            // A connection whose other end is gone says nothing: it is asked while it is idle, and closed when what was sent
            // is not acknowledged by the other kernel.
            .tcp_keepalive(KEEP_ALIVE)
            .tcp_keepalive_interval(KEEP_ALIVE)
            .tcp_keepalive_retries(3)
            .tcp_user_timeout(self.timeout)
            .redirect(redirect::Policy::none());
        if let Some(certificates) = &self.certificates {
            builder = builder.tls_certs_only(certificates.clone());
        }
        builder.build()
    }
}

impl CloudClient {
    /// For the addresses of the settings.
    ///
    /// # Errors
    /// When certificates cannot be read or the token cannot be sent.
    pub fn new(settings: &CloudSettings, edge: &EdgeId) -> Result<Self, ClientError> {
        let token = settings.token.as_deref().unwrap_or_default();
        let mut value = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| ClientError::Token)?;
        value.set_sensitive(true);
        let mut certificates = None;
        if let Some(path) = &settings.ca_file {
            let pem = std::fs::read(path).map_err(|source| ClientError::Read { path: path.clone(), source })?;
            certificates = Some(Certificate::from_pem_bundle(&pem)?);
        }
        let headers = HeaderMap::from_iter([(AUTHORIZATION, value)]);
        let parts = Arc::new(ClientParts { headers, timeout: settings.timeout.0, certificates });
        let connections = Arc::new(Mutex::new(Connections { client: parts.client()?, given_up: 0 }));
        let nodes = Arc::default();
        Ok(Self { connections, parts, urls: settings.urls.clone(), edge: edge.clone(), nodes, clock: None })
    }

    /// The same; the clock hears what time it is from each answer with acks.
    #[must_use]
    pub fn with_clock(self, clock: Arc<Clock>) -> Self {
        Self { clock: Some(clock), ..self }
    }

    /// The addresses, in order of preference.
    pub fn urls(&self) -> &[Url] {
        &self.urls
    }

    /// How the first address answers a question for a spool that nobody has: its status, and the `Date` of the answer.
    ///
    /// # Errors
    /// Why there was no answer, for people.
    pub async fn look(&self, spool: SpoolId) -> Result<(StatusCode, Option<String>), String> {
        let mut address = self.address(0, "positions");
        address.set_query(Some(&format!("spool={spool}")));
        let client = self.connections.lock().client.clone();
        let response = client.get(address).send().await.map_err(|error| causes(&error))?;
        let date = response.headers().get(DATE).and_then(|date| date.to_str().ok());
        Ok((response.status(), date.map(str::to_owned)))
    }

    /// What the node has of this spool.
    ///
    /// # Errors
    /// When it does not answer with acks.
    pub async fn positions(&self, url: usize, spool: SpoolId) -> Result<Acks, Failed> {
        let mut address = self.address(url, "positions");
        address.set_query(Some(&format!("spool={spool}")));
        let answered = self.ask(|client| client.get(address)).await?;
        self.acks(&answered)
    }

    /// The commands of a node behind the number `after` of its `run`; waits for one, at most so long.
    ///
    /// # Errors
    /// Why there is no answer, for people.
    pub async fn commands(&self, url: usize, run: &str, after: u64, wait: Duration) -> Result<CommandsAnswer, String> {
        let mut address = self.address(url, "commands");
        let after = after.to_string();
        let wait_ms = wait.as_millis().to_string();
        address.query_pairs_mut().extend_pairs([("run", run), ("after", &after), ("wait_ms", &wait_ms)]);
        let asked = self.ask(|client| client.get(address).timeout(wait + self.parts.timeout)).await;
        let answered = asked.map_err(|failed| failed.text)?;
        if answered.status != StatusCode::OK {
            return Err(answered.shown());
        }
        serde_json::from_slice(&answered.text).map_err(|error| format!("an answer that is none: {error}"))
    }

    /// Says what became of a command. Whether the node still wanted to know makes no difference.
    ///
    /// # Errors
    /// Why it was not heard, for people.
    pub async fn answer_command(&self, url: usize, id: &str, reply: &CommandReply) -> Result<(), String> {
        let address = self.address(url, &format!("commands/{id}"));
        let answered = self.ask(|client| client.post(address).json(reply)).await.map_err(|failed| failed.text)?;
        match answered.status {
            StatusCode::OK | StatusCode::GONE => Ok(()),
            _ => Err(answered.shown()),
        }
    }

    /// Batches and their schemas (canonical texts), as a request to a node.
    pub fn parcel(&self, url: usize, schemas: &[(SchemaId, &str)], batches: &[SealedBatch]) -> Parcel {
        self.nodes.lock().parcel(url, schemas, batches)
    }

    /// Sends a request of [`Self::parcel`] to the node that it is for.
    ///
    /// # Errors
    /// When the node does not answer with acks.
    pub async fn send(&self, url: usize, parcel: Parcel) -> Result<Acks, Failed> {
        let body = parcel.body.clone();
        let bytes = body.len() as u64;
        let longest = self.parts.timeout + Duration::from_secs(bytes / CRAWL_BYTES_PER_S);
        let upload = Upload::new(self.parts.timeout);
        let given_up = self.connections.lock().given_up;
        let asked = self.ask(|client| {
            let request = client.post(self.address(url, "batches")).timeout(longest);
            let request = request.header(CONTENT_LENGTH, bytes).body(upload.body(body));
            if parcel.packed { request.header(CONTENT_ENCODING, ENCODING) } else { request }
        });
        let answered = tokio::select! {
            answered = asked => answered?,
            () = upload.stalled() => {
                self.give_up(given_up);
                let text = format!("no answer, and no byte of {bytes} has gone, within {:?}", self.parts.timeout);
                return Err(link(text));
            }
        };
        let status = answered.status;
        let again = {
            let mut nodes = self.nodes.lock();
            match status {
                StatusCode::OK => {
                    nodes.taken(url, &parcel);
                    false
                }
                StatusCode::PRECONDITION_FAILED => nodes.unknown(url, &parcel),
                StatusCode::UNSUPPORTED_MEDIA_TYPE => nodes.unreadable(url, &parcel),
                _ => false,
            }
        };
        if again {
            let text = format!("{status}: it is sent again in another form");
            return Err(Failed { failure: Failure::Form, text, acks: None });
        }
        self.acks(&answered)
    }

    async fn ask(&self, request: impl FnOnce(&Client) -> RequestBuilder) -> Result<Answered, Failed> {
        let (request, given_up) = {
            let connections = self.connections.lock();
            (request(&connections.client), connections.given_up)
        };
        let asked_us = self.clock.as_ref().map(|clock| clock.monotonic_us());
        match exchange(request).await {
            Ok(answered) => Ok(Answered { asked_us, ..answered }),
            Err(error) => {
                if error.is_timeout() {
                    self.give_up(given_up);
                }
                Err(link(causes(&error)))
            }
        }
    }

    /// What the node says; the clock hears when it said so.
    fn acks(&self, answered: &Answered) -> Result<Acks, Failed> {
        let answer = answer(answered.status, &answered.text);
        if let (Some(clock), Some(asked_us), Some(date_s), Ok(_)) =
            (&self.clock, answered.asked_us, answered.date_s, &answer)
        {
            // The date was written before the body.
            let since_us = i64::try_from(answered.answered_at.elapsed().as_micros()).unwrap_or(i64::MAX);
            clock.heard(date_s, asked_us, clock.monotonic_us().saturating_sub(since_us));
        }
        answer
    }

    /// Gives up the connections of then; those that a request still waits on live until it ends.
    fn give_up(&self, then: u64) {
        let mut connections = self.connections.lock();
        if connections.given_up != then {
            return;
        }
        match self.parts.client() {
            Ok(client) => *connections = Connections { client, given_up: then + 1 },
            // Slower, and right all the same.
            Err(error) => tracing::warn!(%error, "connections that may be dead are kept"),
        }
    }

    fn address(&self, url: usize, what: &str) -> Url {
        let mut address = self.urls[url].clone();
        let base = address.path().trim_end_matches('/').to_owned();
        address.set_path(&format!("{base}/v1/edges/{}/{what}", self.edge));
        address
    }
}

fn link(text: String) -> Failed {
    Failed { failure: Failure::Link, text, acks: None }
}

/// An answer, whatever it says.
struct Answered {
    status: StatusCode,
    /// By the agent's clock, when it has one.
    asked_us: Option<i64>,
    /// s since 1970 UTC.
    date_s: Option<i64>,
    /// When its head had come.
    answered_at: Instant,
    text: Vec<u8>,
}

impl Answered {
    fn shown(&self) -> String {
        format!("{}: {}", self.status, String::from_utf8_lossy(&self.text[..self.text.len().min(200)]))
    }
}

/// Sends a request and reads the answer, not much further than it may be long.
async fn exchange(request: RequestBuilder) -> reqwest::Result<Answered> {
    let mut response = request.send().await?;
    let answered_at = Instant::now();
    let date = response.headers().get(DATE).and_then(|date| date.to_str().ok());
    let date_s = date.and_then(|date| DateTime::parse_from_rfc2822(date).ok()).map(|date| date.timestamp());
    let mut text = Vec::new();
    while text.len() <= ANSWER_BYTES_MAX
        && let Some(part) = response.chunk().await?
    {
        text.extend_from_slice(&part);
    }
    Ok(Answered { status: response.status(), asked_us: None, date_s, answered_at, text })
}

fn answer(status: StatusCode, text: &[u8]) -> Result<Acks, Failed> {
    if text.len() > ANSWER_BYTES_MAX {
        return Err(link(format!("{status}: an answer of more than {ANSWER_BYTES_MAX} bytes")));
    }
    if status == StatusCode::OK {
        return serde_json::from_slice(text).map_err(|error| link(format!("an answer that is none: {error}")));
    }
    let Ok(RefusedAnswer { refused, acks }) = serde_json::from_slice::<RefusedAnswer>(text) else {
        return Err(link(format!("{status}: {}", String::from_utf8_lossy(&text[..text.len().min(200)]))));
    };
    let failure = match &refused {
        RefusedRequest::Gap { expected, .. } => Failure::Gap { expected: *expected },
        RefusedRequest::Forked { .. } => Failure::Forked,
        RefusedRequest::PushedBack { retry_after_ms, .. } => {
            Failure::PushedBack { retry_after_ms: if *retry_after_ms == 0 { RETRY_AFTER_MS } else { *retry_after_ms } }
        }
        // Also `schema_unknown` of a request that had all: such a node is not well.
        _ => Failure::Link,
    };
    Err(Failed { failure, text: refused.to_string(), acks })
}

/// An error with what lies under it; reqwest's own text ends at "error sending request".
fn causes(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
