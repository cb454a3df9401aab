//! The lines of a file.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use wire::StreamName;

use super::{MapSettings, max_payload};
use crate::config::decoding::{Format, FormatOptions, Readings, When};
use crate::config::{Size, Span};

/// A CSV or NDJSON file: each line is a message, whose topic is the file's name.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSettings {
    /// What the journal keeps the place in the file under: never change it. The name of the stream unless set.
    #[serde(default)]
    pub name: String,
    pub path: PathBuf,
    /// The file grows and is rotated; otherwise it is read once.
    #[serde(default = "follow")]
    pub follow: bool,
    /// The first line names the columns, and stands before each line in its message. Set by the ending `.csv`.
    #[serde(default)]
    header: Option<bool>,
    /// How often a growing file is looked at.
    #[serde(default = "poll")]
    pub poll: Span,
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

/// A file is not looked at more often.
const POLL_MIN: Duration = Duration::from_millis(10);

fn follow() -> bool {
    true
}

fn poll() -> Span {
    Span(Duration::from_millis(500))
}

impl FileSettings {
    /// Whether the first line stands before each.
    pub fn header(&self) -> bool {
        self.header.unwrap_or_else(|| self.path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("csv")))
    }

    pub(super) fn check(&self) -> Result<(), String> {
        if self.path.file_name().is_none() {
            return Err(format!("path: `{}` is no file", self.path.display()));
        }
        if self.path.extension().is_some_and(|ending| ending == "gz") {
            return Err("path: a packed file is not read; unpack it".to_owned());
        }
        if self.poll.0 < POLL_MIN {
            return Err(format!("poll is less than {POLL_MIN:?}"));
        }
        Ok(())
    }
}
