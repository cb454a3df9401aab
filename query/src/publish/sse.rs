//! `GET /v1/alerts/stream?topic=…&severity=…`: changes as server-sent events.
//!
//! The id of an event is the sequence of its change. Who comes again with `Last-Event-ID` (or `?after=`) gets everything behind
//! it, from memory or from the stream, each once and in order. Who is slow is waited for by its own connection alone.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, stream};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::{Hub, Told};
use crate::alerts::episode::Severity;
use crate::alerts::topic::TopicFilter;

/// Changes that are taken at a time.
const PAGE: usize = 64;
/// After the stream could not be asked.
const RETRY: Duration = Duration::from_secs(1);
const KEEP_ALIVE: Duration = Duration::from_secs(15);

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
        told.only.is_none()
            && (self.severities.is_empty() || self.severities.contains(&told.severity))
            && self.topic.matches(&told.topic)
    }
}

struct Follower {
    hub: Arc<Hub>,
    subscription: Subscription,
    page: std::vec::IntoIter<Arc<Told>>,
    token: CancellationToken,
    _place: OwnedSemaphorePermit,
}

impl Follower {
    /// The next change that is wanted; none when the node stops.
    async fn next(&mut self) -> Option<Arc<Told>> {
        let mut changed = self.hub.changed();
        loop {
            for told in self.page.by_ref() {
                self.subscription.after = told.sequence;
                if self.subscription.wants(&told) {
                    return Some(told);
                }
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
                Ok(_) => Duration::MAX,
                Err(error) => {
                    tracing::warn!(%error, "a subscriber cannot catch up yet");
                    RETRY
                }
            };
            tokio::select! {
                () = self.token.cancelled() => return None,
                gone = changed.changed() => gone.ok()?,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }
}

/// The changes of a subscription, for ever.
fn follow(
    hub: Arc<Hub>,
    subscription: Subscription,
    token: CancellationToken,
    place: OwnedSemaphorePermit,
) -> impl Stream<Item = Arc<Told>> + Send {
    let follower = Follower { hub, subscription, page: Vec::new().into_iter(), token, _place: place };
    stream::unfold(follower, |mut follower| async move {
        let told = follower.next().await?;
        Some((told, follower))
    })
}

/// The answer to a subscriber, who keeps the place as long as it listens.
pub(crate) fn answer(
    hub: Arc<Hub>,
    subscription: Subscription,
    token: CancellationToken,
    place: OwnedSemaphorePermit,
) -> Response {
    use futures::StreamExt;
    let events = follow(hub, subscription, token, place).map(|told| {
        let text = String::from_utf8_lossy(&told.body).into_owned();
        Ok::<_, Infallible>(Event::default().id(told.sequence.to_string()).event(told.transition).data(text))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}
