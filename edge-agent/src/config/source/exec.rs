//! A command whose lines are messages.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use wire::StreamName;

use super::{MapSettings, max_payload};
use crate::config::decoding::{Format, FormatOptions, Readings, When};
use crate::config::{Size, Span};

/// A program that runs as long as the agent; each line of its output is a message.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecSettings {
    #[serde(default)]
    pub name: String,
    /// The program and its arguments; no shell reads them.
    pub command: Vec<String>,
    /// Where it runs; where the agent does, unless set.
    #[serde(default)]
    pub directory: Option<PathBuf>,
    /// The longest wait before it is started again; the first is a second, or this if it is shorter.
    #[serde(default = "restart_max")]
    pub restart_max: Span,
    /// How long it may take to end after SIGTERM.
    #[serde(default = "stop_within")]
    pub stop_within: Span,
    /// A longer line goes to quarantine: its head, its length and its checksum.
    #[serde(default = "max_payload")]
    pub max_payload: Size,
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

fn restart_max() -> Span {
    Span(Duration::from_secs(60))
}

fn stop_within() -> Span {
    Span(Duration::from_secs(2))
}

impl ExecSettings {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.command.first().is_none_or(String::is_empty) {
            return Err("command is empty: write [\"/path/to/program\", \"argument\"]".to_owned());
        }
        if self.restart_max.0 < Duration::from_millis(10) {
            return Err("restart_max is less than 10 ms".to_owned());
        }
        Ok(())
    }
}
