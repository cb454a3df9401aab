//! Alerts on a broker: one message for each change at QoS 1, on the alert's topic, retained while the alert fires and cleared
//! when it has ended.
//!
//! Payloads are CloudEvents. A change counts as delivered when the broker has acknowledged it. After a lost connection what was
//! on its way is published again: at least once, with a stable id.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event, EventLoop, MqttOptions};
use tokio_util::sync::CancellationToken;

use super::Told;
use super::target::{Place, jittered, pause};

/// Messages on their way at a time.
const IN_FLIGHT_MAX: u16 = 16;
const REQUESTS: usize = 256;
const KEEP_ALIVE: Duration = Duration::from_secs(30);
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// A broker, as whom, and who is told there.
pub(crate) struct Broker {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) client_id: String,
    pub(crate) credentials: Option<(String, String)>,
}

impl Broker {
    fn connect(&self) -> (AsyncClient, EventLoop) {
        let mut options = MqttOptions::new(&self.client_id, &self.host, self.port);
        options.set_keep_alive(KEEP_ALIVE).set_clean_start(true).set_outgoing_inflight_upper_limit(IN_FLIGHT_MAX);
        if let Some((username, password)) = &self.credentials {
            options.set_credentials(username, password);
        }
        AsyncClient::new(options, REQUESTS)
    }
}

/// The messages of one change: topic, payload, whether it is retained. An end is told, then what was retained is taken back.
fn messages(told: &Told) -> Vec<(String, Bytes, bool)> {
    match told.firing {
        true => vec![(told.topic.clone(), told.body.clone(), true)],
        false => vec![(told.topic.clone(), told.body.clone(), false), (told.topic.clone(), Bytes::new(), true)],
    }
}

/// Tells one broker until the token ends it.
pub(crate) async fn run(broker: Broker, mut place: Place, token: CancellationToken) {
    if place.find(&token).await.is_none() {
        return;
    }
    let mut wait = BACKOFF_MIN;
    // A page is done when all of it is acknowledged; a lost connection begins it again.
    let mut page: VecDeque<Arc<Told>> = VecDeque::new();
    while !token.is_cancelled() {
        let (client, mut events) = broker.connect();
        match session(&client, &mut events, &mut page, &mut place, &token).await {
            Ok(()) => {
                // What was acknowledged is told; the farewell may be lost.
                let _ = client.try_disconnect();
                let _ =
                    tokio::time::timeout(Duration::from_millis(500), async { while events.poll().await.is_ok() {} })
                        .await;
                return;
            }
            Err((connected, error)) => {
                if connected {
                    wait = BACKOFF_MIN;
                }
                place.retried(&error);
                tracing::warn!(target = place.name(), error, "no connection to the broker");
                if pause(jittered(wait), &token).await.is_none() {
                    return;
                }
                wait = (2 * wait).min(BACKOFF_MAX);
            }
        }
    }
}

/// One connection. Ok when the node stops; else whether there was one, and why it ended.
async fn session(
    client: &AsyncClient,
    events: &mut EventLoop,
    page: &mut VecDeque<Arc<Told>>,
    place: &mut Place,
    token: &CancellationToken,
) -> Result<(), (bool, String)> {
    let mut connected = false;
    loop {
        let event = tokio::select! {
            () = token.cancelled() => return Ok(()),
            event = events.poll() => event.map_err(|error| (connected, error.to_string()))?,
        };
        if matches!(event, Event::Incoming(Packet::ConnAck(_))) {
            connected = true;
            break;
        }
    }
    loop {
        if page.is_empty() {
            // Keep-alives go on while nothing is to be told.
            let next = tokio::select! {
                next = place.next(token) => Some(next),
                event = events.poll() => {
                    event.map_err(|error| (connected, error.to_string()))?;
                    None
                }
            };
            match next {
                Some(Some(next)) => page.extend(next),
                Some(None) => return Ok(()),
                None => continue,
            }
        }
        let Some(told) = page.front().cloned() else { continue };
        let mut open = 0_usize;
        for (topic, payload, retain) in messages(&told) {
            let sent = client.try_publish(topic, QoS::AtLeastOnce, retain, payload);
            sent.map_err(|error| (connected, error.to_string()))?;
            open += 1;
        }
        while open > 0 {
            let event = tokio::select! {
                () = token.cancelled() => return Ok(()),
                event = events.poll() => event.map_err(|error| (connected, error.to_string()))?,
            };
            match event {
                Event::Incoming(Packet::PubAck(_)) => open -= 1,
                Event::Incoming(Packet::Disconnect(reason)) => return Err((connected, format!("{reason:?}"))),
                _ => {}
            }
        }
        page.pop_front();
        place.delivered(&told, token).await;
    }
}
