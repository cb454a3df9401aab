//! `[listen]`: where the doors are, how many come in at a time, and their certificate.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;

/// Addresses; port 0 takes a free one.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ListenSettings {
    pub http: SocketAddr,
    pub flight_sql: SocketAddr,
    pub postgres: SocketAddr,
    /// Connections to the HTTP port at one time.
    pub http_connections: usize,
    pub flight_sql_connections: usize,
    pub postgres_connections: usize,
    pub tls: Option<TlsSettings>,
}

/// The certificate of the doors; a door with it speaks TLS only.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSettings {
    /// PEM: the chain, and the private key.
    pub certificate: PathBuf,
    pub key: PathBuf,
    #[serde(default = "all_doors")]
    pub doors: Vec<DoorName>,
}

/// A door, by its name in `[listen]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DoorName {
    Http,
    FlightSql,
    Postgres,
}

fn all_doors() -> Vec<DoorName> {
    vec![DoorName::Http, DoorName::FlightSql, DoorName::Postgres]
}

impl Default for ListenSettings {
    fn default() -> Self {
        let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Self {
            http: local(7300),
            flight_sql: local(7301),
            postgres: local(7302),
            http_connections: 4_096,
            flight_sql_connections: 256,
            postgres_connections: 256,
            tls: None,
        }
    }
}

impl ListenSettings {
    pub(super) fn check(&self) -> Result<(), String> {
        let connections = [
            ("http_connections", self.http_connections),
            ("flight_sql_connections", self.flight_sql_connections),
            ("postgres_connections", self.postgres_connections),
        ];
        if let Some((key, _)) = connections.iter().find(|(_, connections)| *connections == 0) {
            return Err(format!("[listen] {key} must be at least 1"));
        }
        Ok(())
    }
}
