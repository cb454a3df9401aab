//! The MQTT broker of a small site, as it is configured.

use std::net::SocketAddr;

use serde::Deserialize;

/// A broker in the same process. Edges come in with their tokens, readers who see everything with their passwords.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BrokerSettings {
    /// MQTT 5.
    pub listen: SocketAddr,
    /// MQTT 3.1.1.
    pub listen_v4: Option<SocketAddr>,
    /// Connections at one time.
    #[serde(default = "connections")]
    pub connections: usize,
}

fn connections() -> usize {
    100
}

impl BrokerSettings {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.connections == 0 {
            return Err("[broker] connections must be at least 1".to_owned());
        }
        if self.listen_v4 == Some(self.listen) {
            return Err("[broker] listen_v4 must be another address than listen".to_owned());
        }
        if self.listen.port() == 0 || self.listen_v4.is_some_and(|listen| listen.port() == 0) {
            return Err("[broker] listen needs a port".to_owned());
        }
        Ok(())
    }
}
