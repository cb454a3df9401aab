//! Commands that the cloud may have done here: `[[command]]`. What is not named is refused.

use std::time::Duration;

use serde::Deserialize;
use wire::Rate;

/// A command.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoteSettings {
    /// As links call it.
    pub name: String,
    /// What the local broker is told.
    pub publish: RemotePublish,
    /// The devices that it may be for; any when none are named. `*` stands for any characters.
    #[serde(default)]
    pub devices: Vec<String>,
    /// More often it is refused.
    #[serde(default = "rate")]
    pub rate: Rate,
}

/// What is published for a command, once.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemotePublish {
    /// With the places `{device}` and `{name}`.
    pub topic: String,
    /// With these, `{payload}` and `{id}`; what the link has written, unless set.
    #[serde(default)]
    pub payload: Option<String>,
    #[serde(default)]
    pub retain: bool,
}

fn rate() -> Rate {
    Rate { count: 10, per: Duration::from_secs(60) }
}
