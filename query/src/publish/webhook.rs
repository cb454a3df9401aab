//! What is told by HTTP: `POST` to a webhook, with a signature. [`super::alertmanager`] has what differs there.
//!
//! A webhook gets `POST` with a CloudEvent as `application/cloudevents+json`. With a secret it has
//! `x-weir-signature: t=<unix seconds>,v1=<hex>`: the HMAC-SHA256 of `<t>.<body>`. Taken is what is answered with 2xx. 408, 429, 5xx
//! and no answer are tried again, with a backoff that doubles; what is refused otherwise, or too often, is a row of
//! `alert_deliveries` with state `dead`. A redirect is not followed.

use std::time::Duration;

use bytes::Bytes;
use reqwest::StatusCode;
use ring::hmac;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::Told;
use super::target::{Place, jittered, pause};
use crate::clock::now_us;

const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// Where, and how.
pub(crate) struct Request {
    pub(crate) url: Url,
    pub(crate) secret: Option<hmac::Key>,
    pub(crate) timeout: Duration,
    pub(crate) attempts: u32,
}

impl std::fmt::Debug for Request {
    /// Without the address: it may hold a secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request").field("attempts", &self.attempts).finish_non_exhaustive()
    }
}

/// The value of `x-weir-signature`.
pub(crate) fn signature(key: &hmac::Key, seconds: i64, body: &[u8]) -> String {
    let mut context = hmac::Context::with_key(key);
    context.update(format!("{seconds}.").as_bytes());
    context.update(body);
    let tag = context.sign();
    let hex: String = tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("t={seconds},v1={hex}")
}

/// The kind of a body that is a CloudEvent.
pub(crate) const CLOUD_EVENT: &str = "application/cloudevents+json";

/// How a body fared.
#[derive(Debug)]
pub(crate) enum Fate {
    Taken,
    /// Why it will never be.
    GivenUp(String),
}

/// A client that follows no redirect.
pub(crate) fn client(request: &Request) -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder().timeout(request.timeout).redirect(reqwest::redirect::Policy::none()).build()
}

/// Tells one target until the token ends it.
pub(crate) async fn run(request: Request, mut place: Place, token: CancellationToken) {
    let client = match client(&request) {
        Ok(client) => client,
        Err(error) => return tracing::error!(target = place.name(), %error, "no HTTP client"),
    };
    if place.find(&token).await.is_none() {
        return;
    }
    while let Some(due) = place.next(&token).await {
        for told in due.told {
            if deliver(&client, &request, &told, &mut place, &token).await.is_none() {
                return;
            }
        }
    }
}

/// Until it is taken, or given up. None when the node stops.
async fn deliver(
    client: &reqwest::Client,
    request: &Request,
    told: &Told,
    place: &mut Place,
    token: &CancellationToken,
) -> Option<()> {
    let body = (CLOUD_EVENT, told.body.clone());
    match post(client, request, body, &|error| place.retried(error), token).await? {
        Fate::Taken => place.delivered(told, token).await,
        Fate::GivenUp(reason) => place.dead(told, &reason, token).await,
    }
    Some(())
}

/// Posts a body until it is taken, or given up; `retried` hears why it is posted again. None when the node stops.
pub(crate) async fn post(
    client: &reqwest::Client,
    request: &Request,
    (kind, body): (&str, Bytes),
    retried: &(dyn Fn(&str) + Sync),
    token: &CancellationToken,
) -> Option<Fate> {
    let mut wait = BACKOFF_MIN;
    for attempt in 1.. {
        let Err(Failed { error, again }) = once(client, request, (kind, body.clone()), token).await? else {
            return Some(Fate::Taken);
        };
        if !again {
            return Some(Fate::GivenUp(error));
        }
        if attempt >= request.attempts {
            return Some(Fate::GivenUp(format!("{error}, the last of {attempt} attempts")));
        }
        retried(&error);
        pause(jittered(wait), token).await?;
        wait = (2 * wait).min(BACKOFF_MAX);
    }
    None
}

/// Why a body was not taken, and whether it may be another time.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) error: String,
    pub(crate) again: bool,
}

/// Posts a body once. None when the node stops.
pub(crate) async fn once(
    client: &reqwest::Client,
    request: &Request,
    (kind, body): (&str, Bytes),
    token: &CancellationToken,
) -> Option<Result<(), Failed>> {
    let mut post = client.post(request.url.clone()).header("content-type", kind);
    if let Some(key) = &request.secret {
        post = post.header("x-weir-signature", signature(key, now_us() / 1_000_000, &body));
    }
    let sent = tokio::select! {
        () = token.cancelled() => return None,
        sent = post.body(body).send() => sent,
    };
    Some(match sent {
        Ok(answer) if answer.status().is_success() => Ok(()),
        Ok(answer) => {
            let status = answer.status();
            let again = status.is_server_error()
                || matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS);
            Err(Failed { error: format!("it answered {status}"), again })
        }
        // Without the address: it may hold a secret.
        Err(error) => Err(Failed { error: error.without_url().to_string(), again: true }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_what_others_compute() {
        // printf '1700000000.{"a":1}' | openssl dgst -sha256 -hmac secret
        let key = hmac::Key::new(hmac::HMAC_SHA256, b"secret");
        let expected = "t=1700000000,v1=49f24e537407743fa4a0242bb63b94b9a47ee99cbbe071ccd8a22550ae411686";
        assert_eq!(signature(&key, 1_700_000_000, b"{\"a\":1}"), expected);
    }
}
