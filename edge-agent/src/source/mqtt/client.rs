//! rumqttc for MQTT 5 and 3.1.1 behind one face.
//!
//! Fixed here: manual acknowledgements, a kept session unless said otherwise, no topic aliases (topics would look empty), and the largest
//! incoming packet that the protocol knows: what is too long is quarantined, not refused, because a broker that may not
//! send a message drops it (MQTT 5) or is disconnected by it for ever (3.1.1).

use bytes::Bytes;
use rumqttc::{TlsConfiguration, Transport, v5};

use crate::config::{MqttSettings, MqttVersion};

/// The largest packet of the protocol.
const PACKET_BYTES_MAX: u32 = 268_435_455;
/// Requests, above all acknowledgements, that wait for the next turn of the event loop.
const REQUESTS: usize = 4_096;
/// Publications without an acknowledgement: alerts only. rumqttc keeps 200 bytes for each that might be: 13 MB with its own
/// limit.
const PUBLISHED_MAX: u16 = 16;
/// How long a connection may take to be made.
const CONNECT_TIMEOUT_S: u64 = 10;

/// The sending half.
pub(crate) enum Client {
    V4(rumqttc::AsyncClient),
    V5(v5::AsyncClient),
}

/// The receiving half.
pub(crate) enum EventLoop {
    V4(Box<rumqttc::EventLoop>),
    V5(Box<v5::EventLoop>),
}

/// A message as the client library gives it: what an acknowledgement needs.
#[derive(Debug)]
pub(crate) enum Publish {
    V4(rumqttc::Publish),
    V5(v5::mqttbytes::v5::Publish),
}

/// What came from the broker.
pub(crate) enum Event {
    Connected {
        session_present: bool,
    },
    Message(Publish),
    /// From now on the broker keeps what is published for this client.
    Subscribed,
    /// One more filter is unsubscribed.
    Unsubscribed,
    /// The broker has a publication, or refuses it.
    Acknowledged {
        refused: Option<String>,
    },
    /// A subscription, or its end, was refused.
    Refused(String),
    Lost(String),
    Other,
}

/// Why a connection cannot be tried.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("read certificate {path}")]
    Read { path: std::path::PathBuf, source: std::io::Error },
}

pub(super) fn new(settings: &MqttSettings, client: &str) -> Result<(Client, EventLoop), TlsError> {
    with_session(settings, client, false)
}

/// One of which the broker keeps nothing: what is published while it is not connected passes it by.
pub(crate) fn without_session(settings: &MqttSettings, client: &str) -> Result<(Client, EventLoop), TlsError> {
    with_session(settings, client, true)
}

fn with_session(settings: &MqttSettings, client: &str, clean: bool) -> Result<(Client, EventLoop), TlsError> {
    let transport = transport(settings)?;
    Ok(match settings.version {
        MqttVersion::V311 => {
            let (client, events) = rumqttc::AsyncClient::new(options_v4(settings, client, transport, clean), REQUESTS);
            let mut events = Box::new(events);
            events.network_options.set_connection_timeout(CONNECT_TIMEOUT_S).set_tcp_nodelay(true);
            (Client::V4(client), EventLoop::V4(events))
        }
        MqttVersion::V5 => {
            let (client, events) = v5::AsyncClient::new(options_v5(settings, client, transport, clean), REQUESTS);
            (Client::V5(client), EventLoop::V5(Box::new(events)))
        }
    })
}

/// Connects once with a clean session, which makes the broker forget the one that it keeps.
pub(super) async fn end_session(settings: &MqttSettings, client: &str) -> Result<(), String> {
    let transport = transport(settings).map_err(|error| error.to_string())?;
    let (sender, mut events) = match settings.version {
        MqttVersion::V311 => {
            let (client, events) = rumqttc::AsyncClient::new(options_v4(settings, client, transport, true), 8);
            (Client::V4(client), EventLoop::V4(Box::new(events)))
        }
        MqttVersion::V5 => {
            let (client, events) = v5::AsyncClient::new(options_v5(settings, client, transport, true), 8);
            (Client::V5(client), EventLoop::V5(Box::new(events)))
        }
    };
    loop {
        match events.next().await {
            Event::Connected { .. } => break,
            Event::Lost(reason) => return Err(reason),
            _ => {}
        }
    }
    sender.disconnect();
    while !matches!(events.next().await, Event::Lost(_)) {}
    Ok(())
}

fn options_v4(settings: &MqttSettings, client: &str, transport: Transport, clean: bool) -> rumqttc::MqttOptions {
    let (host, port) = address(settings);
    let mut options = rumqttc::MqttOptions::new(client, host, port);
    options.set_transport(transport).set_keep_alive(settings.keep_alive.0).set_clean_session(clean);
    options.set_inflight(PUBLISHED_MAX);
    options.set_manual_acks(true).set_max_packet_size(PACKET_BYTES_MAX as usize, 1 << 16);
    if let Some(username) = &settings.username {
        options.set_credentials(username, settings.password.as_deref().unwrap_or_default());
    }
    options
}

fn options_v5(settings: &MqttSettings, client: &str, transport: Transport, clean: bool) -> v5::MqttOptions {
    let (host, port) = address(settings);
    let mut options = v5::MqttOptions::new(client, host, port);
    options.set_transport(transport).set_keep_alive(settings.keep_alive.0).set_clean_start(clean);
    options.set_session_expiry_interval(Some(if clean { 0 } else { u32::MAX }));
    options.set_manual_acks(true).set_receive_maximum(Some(settings.receive_maximum));
    options.set_outgoing_inflight_upper_limit(PUBLISHED_MAX);
    options.set_max_packet_size(Some(PACKET_BYTES_MAX)).set_connection_timeout(CONNECT_TIMEOUT_S);
    let mut network = options.network_options();
    network.set_tcp_nodelay(true);
    options.set_network_options(network);
    if let Some(username) = &settings.username {
        options.set_credentials(username, settings.password.as_deref().unwrap_or_default());
    }
    options
}

fn address(settings: &MqttSettings) -> (&str, u16) {
    let default = if settings.url.scheme() == "mqtts" { 8883 } else { 1883 };
    let host = settings.url.host_str().unwrap_or_default();
    (host.trim_matches(['[', ']']), settings.url.port().unwrap_or(default))
}

fn transport(settings: &MqttSettings) -> Result<Transport, TlsError> {
    if settings.url.scheme() != "mqtts" {
        return Ok(Transport::Tcp);
    }
    let read =
        |path: &std::path::PathBuf| std::fs::read(path).map_err(|source| TlsError::Read { path: path.clone(), source });
    let client_auth = match (&settings.cert_file, &settings.key_file) {
        (Some(cert), Some(key)) => Some((read(cert)?, read(key)?)),
        _ => None,
    };
    Ok(match &settings.ca_file {
        Some(ca) => Transport::tls_with_config(TlsConfiguration::Simple { ca: read(ca)?, alpn: None, client_auth }),
        None => Transport::tls_with_default_config(),
    })
}

impl EventLoop {
    pub(crate) async fn next(&mut self) -> Event {
        match self {
            Self::V4(events) => {
                use rumqttc::{Event as Raw, Packet, SubscribeReasonCode};
                match events.poll().await {
                    Ok(Raw::Incoming(Packet::ConnAck(answer))) => {
                        Event::Connected { session_present: answer.session_present }
                    }
                    Ok(Raw::Incoming(Packet::Publish(publish))) => Event::Message(Publish::V4(publish)),
                    Ok(Raw::Incoming(Packet::SubAck(answer)))
                        if answer.return_codes.contains(&SubscribeReasonCode::Failure) =>
                    {
                        Event::Refused("not authorised, or no valid filter".to_owned())
                    }
                    Ok(Raw::Incoming(Packet::SubAck(_))) => Event::Subscribed,
                    Ok(Raw::Incoming(Packet::UnsubAck(_))) => Event::Unsubscribed,
                    Ok(Raw::Incoming(Packet::PubAck(_))) => Event::Acknowledged { refused: None },
                    Ok(_) => Event::Other,
                    Err(error) => {
                        // What was read from the old connection would be taken for the next one's.
                        events.state.events.clear();
                        Event::Lost(error.to_string())
                    }
                }
            }
            Self::V5(events) => {
                use v5::mqttbytes::v5::{Packet, PubAckReason, SubscribeReasonCode, UnsubAckReason};
                match events.poll().await {
                    Ok(v5::Event::Incoming(Packet::ConnAck(answer))) => {
                        Event::Connected { session_present: answer.session_present }
                    }
                    Ok(v5::Event::Incoming(Packet::Publish(publish))) => Event::Message(Publish::V5(publish)),
                    Ok(v5::Event::Incoming(Packet::SubAck(answer))) => {
                        let refused = |code: &&SubscribeReasonCode| !matches!(code, SubscribeReasonCode::Success(_));
                        match answer.return_codes.iter().find(refused) {
                            Some(code) => Event::Refused(format!("{code:?}")),
                            None => Event::Subscribed,
                        }
                    }
                    Ok(v5::Event::Incoming(Packet::PubAck(answer))) => {
                        let taken =
                            matches!(answer.reason, PubAckReason::Success | PubAckReason::NoMatchingSubscribers);
                        Event::Acknowledged { refused: (!taken).then(|| format!("{:?}", answer.reason)) }
                    }
                    Ok(v5::Event::Incoming(Packet::UnsubAck(answer))) => {
                        use UnsubAckReason::{NoSubscriptionExisted, Success};
                        match answer.reasons.iter().find(|reason| !matches!(reason, Success | NoSubscriptionExisted)) {
                            Some(reason) => Event::Refused(format!("unsubscribe: {reason:?}")),
                            None => Event::Unsubscribed,
                        }
                    }
                    Ok(_) => Event::Other,
                    Err(error) => {
                        events.state.events.clear();
                        Event::Lost(error.to_string())
                    }
                }
            }
        }
    }
}

impl Client {
    /// At QoS 1. Retained messages come with a new subscription only, where the protocol can say so.
    pub(super) fn subscribe(&self, filters: &[String]) {
        let sent = match self {
            Self::V4(client) => {
                let filter = |filter: &String| rumqttc::SubscribeFilter::new(filter.clone(), rumqttc::QoS::AtLeastOnce);
                client.try_subscribe_many(filters.iter().map(filter)).is_ok()
            }
            Self::V5(client) => {
                use v5::mqttbytes::QoS;
                use v5::mqttbytes::v5::{Filter, RetainForwardRule};
                let filter = |path: &String| {
                    let mut filter = Filter::new(path.clone(), QoS::AtLeastOnce);
                    filter.retain_forward_rule = RetainForwardRule::OnNewSubscribe;
                    filter
                };
                client.try_subscribe_many(filters.iter().map(filter)).is_ok()
            }
        };
        if !sent {
            tracing::error!("no room to subscribe: nothing comes until the next connection");
        }
    }

    /// One packet for each filter, and so one [`Event::Unsubscribed`]. False: there was no room for all.
    pub(super) fn unsubscribe(&self, filters: &[String]) -> bool {
        filters.iter().all(|filter| match self {
            Self::V4(client) => client.try_unsubscribe(filter.clone()).is_ok(),
            Self::V5(client) => client.try_unsubscribe(filter.clone()).is_ok(),
        })
    }

    /// False: no room; again after the next turn.
    pub(super) fn acknowledge(&self, publish: &Publish) -> bool {
        match (self, publish) {
            (Self::V4(client), Publish::V4(publish)) => client.try_ack(publish).is_ok(),
            (Self::V5(client), Publish::V5(publish)) => client.try_ack(publish).is_ok(),
            _ => unreachable!("a client gets messages of its own version"),
        }
    }

    /// At QoS 1. False: no room; again after the next turn.
    pub(crate) fn publish(&self, topic: &str, payload: Bytes, retain: bool) -> bool {
        match self {
            Self::V4(client) => client.try_publish(topic, rumqttc::QoS::AtLeastOnce, retain, payload).is_ok(),
            Self::V5(client) => {
                client.try_publish(topic.to_owned(), v5::mqttbytes::QoS::AtLeastOnce, retain, payload).is_ok()
            }
        }
    }

    /// At QoS 0, once at most. False: no room.
    pub(super) fn tell(&self, topic: &str, payload: Vec<u8>) -> bool {
        match self {
            Self::V4(client) => client.try_publish(topic, rumqttc::QoS::AtMostOnce, false, payload).is_ok(),
            Self::V5(client) => {
                client.try_publish(topic.to_owned(), v5::mqttbytes::QoS::AtMostOnce, false, payload).is_ok()
            }
        }
    }

    pub(crate) fn disconnect(&self) {
        match self {
            Self::V4(client) => drop(client.try_disconnect()),
            Self::V5(client) => drop(client.try_disconnect()),
        }
    }
}

impl Publish {
    /// 0 at QoS 0.
    pub(super) fn packet_id(&self) -> u16 {
        match self {
            Self::V4(publish) => publish.pkid,
            Self::V5(publish) => publish.pkid,
        }
    }

    pub(super) fn dup(&self) -> bool {
        match self {
            Self::V4(publish) => publish.dup,
            Self::V5(publish) => publish.dup,
        }
    }

    /// Whether the broker had it before the subscription. Of one that comes by a subscription that was there, brokers say no.
    pub(super) fn retain(&self) -> bool {
        match self {
            Self::V4(publish) => publish.retain,
            Self::V5(publish) => publish.retain,
        }
    }

    pub(super) fn payload(&self) -> &Bytes {
        match self {
            Self::V4(publish) => &publish.payload,
            Self::V5(publish) => &publish.payload,
        }
    }

    pub(super) fn topic(&self) -> String {
        match self {
            Self::V4(publish) => publish.topic.clone(),
            // The lossy reading goes character by character.
            Self::V5(publish) => match std::str::from_utf8(&publish.topic) {
                Ok(topic) => topic.to_owned(),
                Err(_) => String::from_utf8_lossy(&publish.topic).into_owned(),
            },
        }
    }

    /// Keeps what an acknowledgement needs: topic and payload hold on to all that was read from the network with them.
    pub(super) fn forget_content(&mut self) {
        match self {
            Self::V4(publish) => (publish.topic, publish.payload) = (String::new(), Bytes::new()),
            Self::V5(publish) => (publish.topic, publish.payload) = (Bytes::new(), Bytes::new()),
        }
    }

    /// CRC32C of topic, 0x00 and payload.
    pub(super) fn crc(&self) -> u32 {
        let topic = match self {
            Self::V4(publish) => publish.topic.as_bytes(),
            Self::V5(publish) => publish.topic.as_ref(),
        };
        crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(topic), &[0]), self.payload())
    }
}
