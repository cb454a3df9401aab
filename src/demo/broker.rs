//! The demo's own MQTT broker: rumqttd within the process, on loopback, MQTT 5.
//!
//! It keeps sessions and queues in memory, so it is good for a demonstration and no proof of anything: messages that
//! are in it when the process ends are gone. Outside brokers are `--url`.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rumqttd::{Broker, Config, ConnectionSettings, RouterConfig, ServerSettings};

const SEGMENT_BYTES: usize = 64 << 20;
const SEGMENTS: usize = 4;
const PAYLOAD_BYTES_MAX: usize = 1 << 20;
const IN_FLIGHT_MAX: usize = 1_000;
const CONNECTIONS_MAX: usize = 100;
const START_MAX: Duration = Duration::from_secs(5);

/// Starts the broker and waits until it answers.
///
/// # Errors
/// When the address is taken.
pub(crate) fn start(listen: SocketAddr) -> anyhow::Result<()> {
    // rumqttd only logs that it could not bind: try it first, so that the user is told.
    drop(TcpListener::bind(listen).with_context(|| format!("listen on {listen} for the demo's MQTT broker"))?);
    let connections = ConnectionSettings {
        connection_timeout_ms: 5_000,
        max_payload_size: PAYLOAD_BYTES_MAX,
        max_inflight_count: IN_FLIGHT_MAX,
        auth: None,
        external_auth: None,
        dynamic_filters: true,
    };
    let server =
        ServerSettings { name: "demo".to_owned(), listen, tls: None, next_connection_delay_ms: 1, connections };
    let config = Config {
        id: 0,
        router: RouterConfig {
            max_connections: CONNECTIONS_MAX,
            max_outgoing_packet_count: 200,
            max_segment_size: SEGMENT_BYTES,
            max_segment_count: SEGMENTS,
            ..RouterConfig::default()
        },
        v4: None,
        v5: Some(HashMap::from([("demo".to_owned(), server)])),
        ws: None,
        cluster: None,
        console: None,
        bridge: None,
        prometheus: None,
        metrics: None,
    };
    std::thread::Builder::new()
        .name("demo-broker".to_owned())
        .spawn(move || {
            if let Err(error) = Broker::new(config).start() {
                tracing::error!(%error, "the demo's MQTT broker ended");
            }
        })
        .context("start the demo's MQTT broker")?;
    let started = Instant::now();
    while TcpStream::connect(listen).is_err() {
        if started.elapsed() > START_MAX {
            bail!("the demo's MQTT broker does not answer on {listen}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
