//! An MQTT broker within the process, for the demo and for small sites: rumqttd, MQTT 5, and 3.1.1 on a port of its own.
//!
//! It keeps sessions and queues in memory: messages that are in it when the process ends are gone. Who is not among its
//! [`Guests`] does not come in; who is may publish and hear everything. It ends with the process.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rumqttd::{Broker, Config, ConnectionSettings, RouterConfig, ServerSettings};

const SEGMENT_BYTES: usize = 64 << 20;
const SEGMENTS: usize = 4;
const PAYLOAD_BYTES_MAX: usize = 1 << 20;
const IN_FLIGHT_MAX: usize = 1_000;
const START_MAX: Duration = Duration::from_secs(5);

/// Who may come in: names and their passwords; everybody when there are none to be told apart.
pub(crate) type Guests = Option<HashMap<String, String>>;

/// Where it listens, and to whom.
#[derive(Debug)]
pub(crate) struct BrokerPlace {
    /// What it is called in logs.
    pub(crate) name: &'static str,
    /// MQTT 5.
    pub(crate) listen: SocketAddr,
    /// MQTT 3.1.1.
    pub(crate) listen_v4: Option<SocketAddr>,
    pub(crate) guests: Guests,
    pub(crate) connections_max: usize,
}

/// Starts the broker and waits until it answers. Blocks.
///
/// # Errors
/// When an address is taken.
pub(crate) fn start(place: BrokerPlace) -> anyhow::Result<()> {
    let BrokerPlace { name, listen, listen_v4, guests, connections_max } = place;
    // rumqttd only logs that it could not bind: try it first, so that the user is told.
    for listen in std::iter::once(listen).chain(listen_v4) {
        drop(TcpListener::bind(listen).with_context(|| format!("listen on {listen} for the MQTT broker"))?);
    }
    let server = |listen| {
        let connections = ConnectionSettings {
            connection_timeout_ms: 5_000,
            max_payload_size: PAYLOAD_BYTES_MAX,
            max_inflight_count: IN_FLIGHT_MAX,
            auth: guests.clone(),
            external_auth: None,
            dynamic_filters: true,
        };
        let server =
            ServerSettings { name: name.to_owned(), listen, tls: None, next_connection_delay_ms: 1, connections };
        HashMap::from([(name.to_owned(), server)])
    };
    let config = Config {
        id: 0,
        router: RouterConfig {
            max_connections: connections_max,
            max_outgoing_packet_count: 200,
            max_segment_size: SEGMENT_BYTES,
            max_segment_count: SEGMENTS,
            ..RouterConfig::default()
        },
        v4: listen_v4.map(server),
        v5: Some(server(listen)),
        ws: None,
        cluster: None,
        console: None,
        bridge: None,
        prometheus: None,
        metrics: None,
    };
    std::thread::Builder::new()
        .name("mqtt-broker".to_owned())
        .spawn(move || {
            if let Err(error) = Broker::new(config).start() {
                tracing::error!(%error, "the MQTT broker ended");
            }
        })
        .context("start the MQTT broker")?;
    let started = Instant::now();
    for listen in std::iter::once(listen).chain(listen_v4) {
        while TcpStream::connect(listen).is_err() {
            if started.elapsed() > START_MAX {
                bail!("the MQTT broker does not answer on {listen}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(())
}
