//! `GET /v1/alerts/stream?topic=…&severity=…`: changes as server-sent events.
//!
//! The id of an event is the sequence of its change. Who comes again with `Last-Event-ID` (or `?after=`) gets everything behind
//! it, from memory or from the stream, each once and in order. Who is slow is waited for by its own connection alone,
//! which ends when nothing can be written to it for long (`serve::tls`).

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures::stream;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Hub, Told};
use crate::alerts::episode::Severity;
use crate::alerts::topic::TopicFilter;
use crate::places::Place;

/// Changes that are taken at a time.
const PAGE: usize = 256;
/// Bytes that are written at a time, but for the last event.
const WRITE_BYTES: usize = 256 << 10;
/// After the stream could not be asked.
const RETRY: Duration = Duration::from_secs(1);
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// What comes so soon after a write is written together, when many listen: waking a subscriber costs some µs, and this bounds
/// it to some tenths of a core. A few are told each change at once.
const GATHER_EACH: Duration = Duration::from_micros(20);
const GATHER_MAX: Duration = Duration::from_millis(250);

/// What somebody subscribed to.
#[derive(Debug, Clone)]
pub struct Subscription {
    pub topic: TopicFilter,
    /// All when there is none.
    pub severities: Vec<Severity>,
    /// The last that it has.
    pub after: i64,
}

impl Subscription {
    pub(crate) fn wants(&self, told: &Told) -> bool {
        told.only.is_none() && self.is_about(&told.topic, told.severity)
    }

    /// Whether it is for what is told on a topic.
    pub(crate) fn is_about(&self, topic: &str, severity: Severity) -> bool {
        (self.severities.is_empty() || self.severities.contains(&severity)) && self.topic.matches(topic)
    }
}

struct Follower {
    hub: Arc<Hub>,
    subscription: Subscription,
    page: std::vec::IntoIter<Arc<Told>>,
    wrote: Option<Instant>,
    token: CancellationToken,
    _place: Place,
}

impl Follower {
    /// What is to be written next: events that are wanted, or a word that keeps the connection open; none when the node stops.
    async fn next(&mut self) -> Option<Bytes> {
        let mut changed = self.hub.changed();
        let silent = Instant::now() + KEEP_ALIVE;
        if let Some(wrote) = self.wrote {
            let gather = GATHER_EACH.saturating_mul(u32::try_from(self.hub.subscribers()).unwrap_or(u32::MAX));
            tokio::select! {
                () = self.token.cancelled() => return None,
                () = tokio::time::sleep_until(wrote + gather.min(GATHER_MAX)) => {}
            }
        }
        loop {
            if let Some(events) = self.wanted() {
                self.wrote = Some(Instant::now());
                return Some(events);
            }
            // Marked as seen first: what comes while it is asked is seen then, or wakes.
            changed.mark_unchanged();
            let page = tokio::select! {
                () = self.token.cancelled() => return None,
                page = self.hub.after(self.subscription.after, PAGE) => page,
            };
            let wait = match page {
                Ok(page) if !page.is_empty() => {
                    self.page = page.into_iter();
                    continue;
                }
                Ok(_) => silent,
                Err(error) => {
                    tracing::warn!(%error, "a subscriber cannot catch up yet");
                    Instant::now() + RETRY
                }
            };
            tokio::select! {
                () = self.token.cancelled() => return None,
                gone = changed.changed() => gone.ok()?,
                () = tokio::time::sleep_until(wait.min(silent)) => {
                    if Instant::now() >= silent {
                        return Some(Bytes::from_static(b":\n\n"));
                    }
                }
            }
        }
    }

    /// Of what was taken, what is wanted.
    fn wanted(&mut self) -> Option<Bytes> {
        let mut one: Option<Bytes> = None;
        let mut all = BytesMut::new();
        for told in self.page.by_ref() {
            self.subscription.after = told.sequence;
            if !self.subscription.wants(&told) {
                continue;
            }
            match one.take() {
                None if all.is_empty() => one = Some(told.frame.clone()),
                None => all.extend_from_slice(&told.frame),
                Some(first) => {
                    all.extend_from_slice(&first);
                    all.extend_from_slice(&told.frame);
                }
            }
            if all.len() >= WRITE_BYTES {
                break;
            }
        }
        one.or_else(|| (!all.is_empty()).then(|| all.freeze()))
    }
}

/// The answer to a subscriber, who keeps the place as long as it listens.
pub(crate) fn answer(hub: Arc<Hub>, subscription: Subscription, token: CancellationToken, place: Place) -> Response {
    let page = Vec::new().into_iter();
    let follower = Follower { hub, subscription, page, wrote: None, token, _place: place };
    let events = stream::unfold(follower, |mut follower| async move {
        let events = follower.next().await?;
        Some((Ok::<_, Infallible>(events), follower))
    });
    let kind = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-cache")];
    (kind, Body::from_stream(events)).into_response()
}
