//! An MQTT publisher that knows when everything it sent was acknowledged: for the demo, `replay` and `bench`.
//!
//! QoS 1 over MQTT 5. [`Publisher::publish`] waits while too many messages are without a PUBACK, and
//! [`Publisher::finish`] returns when every one has it. A connection that breaks ends it with an error: a publisher
//! that resent would hide what the pipeline does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use rumqttc::Outgoing;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event, MqttOptions};
use tokio::sync::watch;
use tokio::task::JoinHandle;

const UNACKNOWLEDGED_MAX: u64 = 1_000;
const REQUESTS_QUEUED_MAX: usize = 200;
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// Where a broker is: `mqtt://host:port`.
#[derive(Debug, Clone)]
pub(crate) struct BrokerAddress {
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl std::str::FromStr for BrokerAddress {
    type Err = anyhow::Error;
    fn from_str(text: &str) -> anyhow::Result<Self> {
        let rest = text.strip_prefix("mqtt://").ok_or_else(|| anyhow!("`{text}` is not mqtt://host:port"))?;
        let rest = rest.trim_end_matches('/');
        let (host, port) = rest.rsplit_once(':').unwrap_or((rest, "1883"));
        if host.is_empty() {
            bail!("`{text}` names no host");
        }
        Ok(Self { host: host.to_owned(), port: port.parse().with_context(|| format!("read the port of `{text}`"))? })
    }
}

/// One connection that publishes.
#[derive(Debug)]
pub(crate) struct Publisher {
    client: AsyncClient,
    sent: u64,
    acknowledged: watch::Receiver<u64>,
    connection: JoinHandle<anyhow::Result<()>>,
}

impl Publisher {
    /// Starts a connection; errors of it come with the next call.
    pub(crate) fn connect(broker: &BrokerAddress, client_id: &str) -> Self {
        let mut options = MqttOptions::new(client_id, &broker.host, broker.port);
        options.set_keep_alive(KEEP_ALIVE).set_clean_start(true);
        let (client, mut events) = AsyncClient::new(options, REQUESTS_QUEUED_MAX);
        let (counted, acknowledged) = watch::channel(0_u64);
        let total = Arc::new(AtomicU64::new(0));
        let connection = tokio::spawn(async move {
            loop {
                match events.poll().await.context("publish over MQTT")? {
                    Event::Incoming(Packet::PubAck(_)) => {
                        counted.send_replace(total.fetch_add(1, Ordering::Relaxed) + 1);
                    }
                    Event::Incoming(Packet::Disconnect(reason)) => bail!("the broker ended the connection: {reason:?}"),
                    Event::Outgoing(Outgoing::Disconnect) => return Ok(()),
                    _ => {}
                }
            }
        });
        Self { client, sent: 0, acknowledged, connection }
    }

    /// Sends one message; waits while too many are without an answer.
    pub(crate) async fn publish(&mut self, topic: String, payload: Vec<u8>) -> anyhow::Result<()> {
        self.wait_for(self.sent.saturating_sub(UNACKNOWLEDGED_MAX)).await?;
        if self.client.publish(topic, QoS::AtLeastOnce, false, payload).await.is_err() {
            return Err(self.ended().await);
        }
        self.sent += 1;
        Ok(())
    }

    /// Waits until all that was sent is acknowledged by the broker, and says how many that is.
    pub(crate) async fn finish(mut self) -> anyhow::Result<u64> {
        self.wait_for(self.sent).await?;
        self.client.disconnect().await.context("disconnect")?;
        self.connection.await??;
        Ok(self.sent)
    }

    async fn wait_for(&mut self, acknowledged: u64) -> anyhow::Result<()> {
        if *self.acknowledged.borrow() >= acknowledged {
            return Ok(());
        }
        if self.acknowledged.wait_for(|count| *count >= acknowledged).await.is_err() {
            return Err(self.ended().await);
        }
        Ok(())
    }

    /// Why the connection is no more.
    async fn ended(&mut self) -> anyhow::Error {
        match (&mut self.connection).await {
            Ok(Err(reason)) => reason,
            Ok(Ok(())) => anyhow!("the connection to the broker is closed"),
            Err(panicked) => panicked.into(),
        }
    }
}
