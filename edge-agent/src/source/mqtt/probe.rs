//! A look at a broker beside the agent: a client of its own that hears for some seconds, and of which the broker keeps
//! nothing, however it ends.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::client::{self, Client, Event, EventLoop};
use crate::config::MqttSettings;

/// What was heard.
#[derive(Debug, Default)]
pub struct Heard {
    /// Whether the broker took the subscriptions.
    pub subscribed: bool,
    /// What was published meanwhile.
    pub messages: Vec<(String, Bytes)>,
    /// What the broker had kept: it tells what was, and not that anybody sends.
    pub retained: Vec<(String, Bytes)>,
    /// Why it ended early.
    pub error: Option<String>,
}

/// Connects as `client`, which must be nobody else's id, and hears the topics for so long, or so many messages. Of those that the
/// broker had kept at most as many more.
pub async fn hear(settings: &MqttSettings, client: &str, within: Duration, messages_max: usize) -> Heard {
    // Without its group: a shared subscription would take messages from the agent.
    let settings = MqttSettings { share: None, ..settings.clone() };
    let mut heard = Heard::default();
    let (sender, mut events) = match client::without_session(&settings, client) {
        Ok(made) => made,
        Err(error) => return Heard { error: Some(error.to_string()), ..heard },
    };
    let until = Instant::now() + within;
    while heard.messages.len() < messages_max {
        let event = match tokio::time::timeout_at(until, events.next()).await {
            Ok(event) => event,
            Err(_) => {
                if !heard.subscribed {
                    heard.error = Some("it does not answer".to_owned());
                }
                break;
            }
        };
        match event {
            Event::Connected { .. } => sender.subscribe(&settings.filters()),
            Event::Subscribed => heard.subscribed = true,
            Event::Message(publish) => {
                let heard = if publish.retain() { &mut heard.retained } else { &mut heard.messages };
                if heard.len() < messages_max {
                    heard.push((publish.topic(), publish.payload().clone()));
                }
                sender.acknowledge(&publish);
            }
            Event::Refused(reason) => {
                heard.error = Some(format!("subscription refused: {reason}"));
                break;
            }
            Event::Lost(reason) => {
                heard.error = Some(reason);
                break;
            }
            Event::Unsubscribed | Event::Acknowledged { .. } | Event::Other => {}
        }
    }
    if heard.subscribed {
        leave(&sender, &mut events).await;
    }
    heard
}

/// Connects as `client`, which must be nobody else's id, and goes again.
///
/// # Errors
/// Why the broker does not take it, for people.
pub async fn reach(settings: &MqttSettings, client: &str, within: Duration) -> Result<(), String> {
    let (sender, mut events) = client::without_session(settings, client).map_err(|error| error.to_string())?;
    let connected = async {
        loop {
            match events.next().await {
                Event::Connected { .. } => return Ok(()),
                Event::Refused(reason) | Event::Lost(reason) => return Err(reason),
                _ => {}
            }
        }
    };
    tokio::time::timeout(within, connected).await.unwrap_or_else(|_| Err("it does not answer".to_owned()))?;
    leave(&sender, &mut events).await;
    Ok(())
}

/// Says goodbye, when there is still somebody to say it to.
async fn leave(sender: &Client, events: &mut EventLoop) {
    sender.disconnect();
    let left = async { while !matches!(events.next().await, Event::Lost(_)) {} };
    let _ = tokio::time::timeout(Duration::from_secs(2), left).await;
}
