//! What Alertmanager is told, by its API v2: `POST /api/v2/alerts` with an array of alerts.
//!
//! Alertmanager ends what is past its `endsAt`. So what fires has one that lies [`FIRES_FOR`] turns ahead, and all of it is pushed
//! again each turn, of [`REFRESH_EVERY`], as Prometheus does; what was resolved is pushed with its end. Which alerts fire is asked
//! of the task that owns them: a restart, an acknowledgement, or a place that is far behind changes nothing. What is silenced or
//! inhibited is refreshed no more, and Alertmanager ends it.
//!
//! A request has at most [`REQUEST_MAX`] alerts. One that fails is not repeated and nothing of it is recorded: the next turn is
//! another. Without an answer the rest of a turn is left out, too, so that it costs one timeout. Changes and turns go out one
//! after the other: no turn that was asked before an alert was resolved comes after its end.

use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::sse::Subscription;
use super::target::{Place, Status};
use super::webhook::{self, Fate, Request};
use super::{Told, time};
use crate::alerts::Firing;
use crate::alerts::episode::{Episode, Phase};
use crate::alerts::episodes::Transition;
use crate::clock::now_us;

/// So often what fires is pushed again.
pub(crate) const REFRESH_EVERY: Duration = Duration::from_secs(60);
/// Turns after which Alertmanager ends what it was not told again.
const FIRES_FOR: u32 = 4;
/// Alerts of one request.
const REQUEST_MAX: usize = 500;
const JSON: &str = "application/json";

/// An alert as Alertmanager wants it.
#[derive(Debug, Clone)]
pub(crate) struct Pushed {
    /// A JSON object without its last brace: `endsAt` follows.
    head: Bytes,
    from: i64,
    /// None while it fires.
    to: Option<i64>,
}

impl Pushed {
    pub(crate) fn new(alert: &Episode) -> Self {
        let mut labels = serde_json::Map::new();
        let own: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&alert.labels).unwrap_or_default();
        for (name, value) in own {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            labels.insert(name, text.into());
        }
        for (name, text) in
            [("alertname", &*alert.rule), ("severity", alert.severity.word()), ("stream", &*alert.stream)]
        {
            labels.insert(name.to_owned(), text.into());
        }
        let mut head = serde_json::json!({
            "labels": labels,
            "annotations": { "summary": alert.message, "weir_id": alert.id },
            "startsAt": time(alert.from),
        })
        .to_string();
        head.pop();
        Self { head: Bytes::from(head), from: alert.from, to: alert.to.filter(|_| alert.phase == Phase::Resolved) }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.head.len()
    }

    /// With an end so long after now while it fires, and after its beginning, which a wrong clock may have put ahead.
    fn write(&self, now: i64, fires_for: i64, body: &mut String) {
        let to = self.to.unwrap_or_else(|| now.max(self.from).saturating_add(fires_for));
        body.push_str(&String::from_utf8_lossy(&self.head));
        body.push_str(&format!(",\"endsAt\":\"{}\"}}", time(to).unwrap_or_default()));
    }
}

/// Alerts as the body of a request.
fn body<'p>(alerts: impl Iterator<Item = &'p Pushed>, now: i64, every: Duration) -> Bytes {
    let fires_for = i64::try_from((every * FIRES_FOR).as_micros()).unwrap_or(i64::MAX);
    let mut body = String::new();
    for alert in alerts {
        body.push(if body.is_empty() { '[' } else { ',' });
        alert.write(now, fires_for, &mut body);
    }
    body.push(']');
    Bytes::from(body)
}

/// Tells one Alertmanager until the token ends it, and what fires again each `every`.
pub(crate) async fn run(
    request: Request,
    mut place: Place,
    (firing, every): (Firing, Duration),
    token: CancellationToken,
) {
    let client = match webhook::client(&request) {
        Ok(client) => client,
        Err(error) => return tracing::error!(target = place.name(), %error, "no HTTP client"),
    };
    if place.find(&token).await.is_none() {
        return;
    }
    let (subscription, status) = (place.subscription().clone(), place.status());
    let mut turns = Turns { client, request, firing, every, subscription, status, due: Instant::now() };
    loop {
        let due = {
            let mut next = pin!(place.next(&token));
            loop {
                tokio::select! {
                    due = &mut next => break due,
                    () = tokio::time::sleep_until(turns.due) => turns.turn(&token).await,
                }
            }
        };
        let Some(due) = due else { return };
        for told in due.told {
            if turns.due <= Instant::now() {
                turns.turn(&token).await;
            }
            if turns.deliver(&told, &mut place, &token).await.is_none() {
                return;
            }
        }
    }
}

/// What one Alertmanager is told again, and when next.
struct Turns {
    client: reqwest::Client,
    request: Request,
    firing: Firing,
    every: Duration,
    subscription: Subscription,
    status: Status,
    due: Instant,
}

impl Turns {
    /// Until it is taken, or given up. None when the node stops.
    async fn deliver(&self, told: &Told, place: &mut Place, token: &CancellationToken) -> Option<()> {
        // The labels of what neither fires nor was resolved may be those of another alert by now, which its end would end.
        let is_meant = told.firing || told.transition == Transition::Resolved.word();
        let Some(pushed) = told.pushed.as_ref().filter(|_| is_meant) else {
            place.delivered(told, token).await;
            return Some(());
        };
        let body = body(std::iter::once(pushed), now_us(), self.every);
        let retried = |error: &str| place.retried(error);
        match webhook::post(&self.client, &self.request, (JSON, body), &retried, token).await? {
            Fate::Taken => place.delivered(told, token).await,
            Fate::GivenUp(reason) => place.dead(told, &reason, token).await,
        }
        Some(())
    }

    /// Pushes what fires and is wanted.
    async fn turn(&mut self, token: &CancellationToken) {
        self.due = Instant::now() + self.every;
        let asked = tokio::select! {
            () = token.cancelled() => return,
            // Its task waits as long as nothing can be written.
            asked = tokio::time::timeout(self.request.timeout, self.firing.ask()) => asked,
        };
        let Ok(Some(firing)) = asked else {
            return tracing::warn!(
                target = self.status.lock().name,
                "what fires is not known now: it is not told again"
            );
        };
        let wanted = firing.iter().filter(|alert| self.subscription.is_about(&alert.topic, alert.severity));
        let wanted: Vec<Pushed> = wanted.map(Pushed::new).collect();
        for part in wanted.chunks(REQUEST_MAX) {
            let body = body(part.iter(), now_us(), self.every);
            let Some(sent) = webhook::once(&self.client, &self.request, (JSON, body), token).await else { return };
            let mut status = self.status.lock();
            let Err(failed) = sent else {
                status.last_error = None;
                continue;
            };
            tracing::warn!(target = status.name, error = failed.error, "what fires is not told again this time");
            status.last_error = Some(failed.error);
            if failed.again {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
