//! Requests to the cloud over HTTP: positions, and batches with their schemas in front.
//!
//! Connections are kept; redirects are not followed; an answer is read up to 4 MiB. Every answer becomes
//! acks or a [`Failure`] with a text for people. The token is sent and never shown.

use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{Certificate, Client, Response, StatusCode, redirect};
use url::Url;
use wire::request::{KIND_BATCH, KIND_SCHEMA, push_frame};
use wire::{Acks, EdgeId, RefusedAnswer, RefusedRequest, SealedBatch, SpoolId};

use super::state::Failure;
use crate::config::CloudSettings;

/// The longest answer that is read.
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// The longest wait for a connection.
const CONNECT_MAX: Duration = Duration::from_secs(10);
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// On the slowest link a request has so much more time for its bytes than `timeout`.
const LINK_BYTES_PER_S_MIN: u64 = 8 << 10;
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
    client: Client,
    urls: Vec<Url>,
    edge: EdgeId,
    timeout: Duration,
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
        let mut builder = Client::builder()
            .default_headers(HeaderMap::from_iter([(AUTHORIZATION, value)]))
            .timeout(settings.timeout.0)
            .connect_timeout(settings.timeout.0.min(CONNECT_MAX))
            .tcp_nodelay(true)
            // A connection whose other end is gone says nothing: it is asked while it is idle, and closed when what was sent
            // is not acknowledged by the other kernel.
            .tcp_keepalive(KEEP_ALIVE)
            .tcp_keepalive_interval(KEEP_ALIVE)
            .tcp_keepalive_retries(3)
            .tcp_user_timeout(settings.timeout.0)
            .redirect(redirect::Policy::none());
        if let Some(path) = &settings.ca_file {
            let pem = std::fs::read(path).map_err(|source| ClientError::Read { path: path.clone(), source })?;
            builder = builder.tls_certs_only(Certificate::from_pem_bundle(&pem)?);
        }
        Ok(Self {
            client: builder.build()?,
            urls: settings.urls.clone(),
            edge: edge.clone(),
            timeout: settings.timeout.0,
        })
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
        let response = self.client.get(address).send().await.map_err(|error| causes(&error))?;
        let date = response.headers().get(reqwest::header::DATE).and_then(|date| date.to_str().ok());
        Ok((response.status(), date.map(str::to_owned)))
    }

    /// What the node has of this spool.
    ///
    /// # Errors
    /// When it does not answer with acks.
    pub async fn positions(&self, url: usize, spool: SpoolId) -> Result<Acks, Failed> {
        let mut address = self.address(url, "positions");
        address.set_query(Some(&format!("spool={spool}")));
        answer(self.client.get(address).send().await).await
    }

    /// Sends a body of [`body`].
    ///
    /// # Errors
    /// When the node does not answer with acks.
    pub async fn send(&self, url: usize, body: Bytes) -> Result<Acks, Failed> {
        let timeout = self.timeout + Duration::from_secs(body.len() as u64 / LINK_BYTES_PER_S_MIN);
        answer(self.client.post(self.address(url, "batches")).timeout(timeout).body(body).send().await).await
    }

    fn address(&self, url: usize, what: &str) -> Url {
        let mut address = self.urls[url].clone();
        let base = address.path().trim_end_matches('/').to_owned();
        address.set_path(&format!("{base}/v1/edges/{}/{what}", self.edge));
        address
    }
}

/// Schemas (canonical texts), then batches, as frames.
pub fn body(schemas: &[&str], batches: &[SealedBatch]) -> Bytes {
    let mut body = Vec::with_capacity(batches.iter().map(|batch| batch.bytes().len() + 5).sum::<usize>() + 4_096);
    schemas.iter().for_each(|schema| push_frame(&mut body, KIND_SCHEMA, schema.as_bytes()));
    batches.iter().for_each(|batch| push_frame(&mut body, KIND_BATCH, batch.bytes()));
    body.into()
}

async fn answer(response: Result<Response, reqwest::Error>) -> Result<Acks, Failed> {
    let link = |text: String| Failed { failure: Failure::Link, text, acks: None };
    let mut response = response.map_err(|error| link(causes(&error)))?;
    let status = response.status();
    let mut text = Vec::new();
    while let Some(part) = response.chunk().await.map_err(|error| link(causes(&error)))? {
        text.extend_from_slice(&part);
        if text.len() > ANSWER_BYTES_MAX {
            return Err(link(format!("{status}: an answer of more than {ANSWER_BYTES_MAX} bytes")));
        }
    }
    if status == StatusCode::OK {
        return serde_json::from_slice(&text).map_err(|error| link(format!("an answer that is none: {error}")));
    }
    let Ok(RefusedAnswer { refused, acks }) = serde_json::from_slice::<RefusedAnswer>(&text) else {
        return Err(link(format!("{status}: {}", String::from_utf8_lossy(&text[..text.len().min(200)]))));
    };
    let failure = match &refused {
        RefusedRequest::Gap { expected, .. } => Failure::Gap { expected: *expected },
        RefusedRequest::Forked { .. } => Failure::Forked,
        RefusedRequest::PushedBack { retry_after_ms, .. } => {
            Failure::PushedBack { retry_after_ms: if *retry_after_ms == 0 { RETRY_AFTER_MS } else { *retry_after_ms } }
        }
        // Schemas are in every request: a node that does not know them is not well.
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
