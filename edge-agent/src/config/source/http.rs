//! Messages that come as HTTP requests: `POST /ingest/{source}`.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use wire::StreamName;

use super::{MapSettings, max_payload};
use crate::config::decoding::{Format, FormatOptions, Readings, When};
use crate::config::{Size, Span};

/// A door for devices and for servers that call webhooks. Sources with the same `listen` share it.
#[derive(Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpSettings {
    /// The last level of the path, and the column `source` of quarantine; the name of the stream unless set.
    #[serde(default)]
    pub name: String,
    /// Loopback unless set; port 0 takes a free one.
    #[serde(default = "listen")]
    pub listen: SocketAddr,
    /// `Authorization: Bearer …`; needed unless it listens on loopback.
    #[serde(default)]
    pub token: Option<String>,
    /// A file whose first line is the token; instead of `token`.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
    /// A larger body, also after it is unpacked, is refused with 413.
    #[serde(default = "max_payload")]
    pub max_payload: Size,
    /// How long a body may take to come, and then the journal to store it.
    #[serde(default = "timeout")]
    pub timeout: Span,
    pub stream: StreamName,
    #[serde(default)]
    pub format: Format,
    /// As of an MQTT source.
    #[serde(default)]
    pub readings: Option<Readings>,
    #[serde(default)]
    pub when: When,
    #[serde(default)]
    pub options: FormatOptions,
    #[serde(default)]
    pub map: MapSettings,
}

impl fmt::Debug for HttpSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("HttpSettings");
        shown.field("name", &self.name).field("listen", &self.listen).field("stream", &self.stream);
        shown.finish_non_exhaustive()
    }
}

fn listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7311))
}

fn timeout() -> Span {
    Span(Duration::from_secs(30))
}

impl HttpSettings {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.name.contains(['/', '?', '#', '%']) {
            return Err(format!("`{}` is a level of a path: give the source a plain `name`", self.name));
        }
        match (&self.token, &self.token_file) {
            (Some(_), Some(_)) => Err("it has both token and token_file: leave one out".to_owned()),
            (Some(token), None) if token.is_empty() => Err("token is empty".to_owned()),
            (None, None) if !self.listen.ip().is_loopback() => {
                Err(format!("{} can be reached from outside: set token or token_file", self.listen))
            }
            _ if self.timeout.0.is_zero() => Err("timeout is zero".to_owned()),
            _ => Ok(()),
        }
    }
}
