//! Alerts by HTTP: a webhook with a signature, and Alertmanager's API.
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
use crate::alerts::episodes::Transition;
use crate::clock::now_us;

const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// Where, and how.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) url: Url,
    pub(crate) secret: Option<hmac::Key>,
    pub(crate) timeout: Duration,
    pub(crate) attempts: u32,
    pub(crate) alertmanager: bool,
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

/// Tells one target until the token ends it.
pub(crate) async fn run(request: Request, mut place: Place, token: CancellationToken) {
    let client =
        reqwest::Client::builder().timeout(request.timeout).redirect(reqwest::redirect::Policy::none()).build();
    let client = match client {
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
    if request.alertmanager && !told.firing && told.transition != Transition::Resolved.word() {
        // Its labels may be those of another alert that fires by now, which its end would end.
        place.delivered(told, token).await;
        return Some(());
    }
    let mut wait = BACKOFF_MIN;
    for attempt in 1.. {
        let body = match request.alertmanager {
            true => Bytes::from([b"[", &told.pushed[..], b"]"].concat()),
            false => told.body.clone(),
        };
        let kind = if request.alertmanager { "application/json" } else { "application/cloudevents+json" };
        let mut post = client.post(request.url.clone()).header("content-type", kind);
        if let Some(key) = &request.secret {
            post = post.header("x-weir-signature", signature(key, now_us() / 1_000_000, &body));
        }
        let sent = tokio::select! {
            () = token.cancelled() => return None,
            sent = post.body(body).send() => sent,
        };
        let error = match sent {
            Ok(answer) if answer.status().is_success() => {
                place.delivered(told, token).await;
                return Some(());
            }
            Ok(answer) => {
                let status = answer.status();
                let again = status.is_server_error()
                    || matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS);
                if !again {
                    place.dead(told, &format!("it answered {status}"), token).await;
                    return Some(());
                }
                format!("it answered {status}")
            }
            // Without the address: it may hold a secret.
            Err(error) => error.without_url().to_string(),
        };
        if attempt >= request.attempts {
            place.dead(told, &format!("{error}, the last of {attempt} attempts"), token).await;
            return Some(());
        }
        place.retried(&error);
        pause(jittered(wait), token).await?;
        wait = (2 * wait).min(BACKOFF_MAX);
    }
    Some(())
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
