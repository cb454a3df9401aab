//! What can be set of views that run for ever: where their definitions are, how many, and what they may take.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use wire::written::{Size, Span};

/// Limits of all views of a node, and of the lane that they ask in.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ViewsSettings {
    /// A directory of `.sql` files, a view each.
    pub directory: Option<PathBuf>,
    pub max: usize,
    /// Bytes of one definition.
    pub definition_bytes: Size,
    /// Shortest time between two looks at what is new.
    pub pause: Span,
    /// Rows and bytes of one answer; a piece of history that has more is asked in smaller ones.
    pub answer_rows: usize,
    pub answer_bytes: Size,
    /// Windows of each view whose last word is remembered.
    pub windows: usize,
    /// How often a view that has nothing to say writes down how far it has read.
    pub record_every: Span,
    /// Of the lane: questions at a time, and of each its time and memory; and the lane's threads.
    pub running: usize,
    pub timeout: Span,
    pub statement_bytes: Size,
    pub threads: usize,
}

impl Default for ViewsSettings {
    fn default() -> Self {
        Self {
            directory: None,
            max: 64,
            definition_bytes: Size(64 << 10),
            pause: Span(Duration::from_millis(50)),
            answer_rows: 1_000_000,
            answer_bytes: Size(256 << 20),
            windows: 100_000,
            record_every: Span(Duration::from_secs(60)),
            running: 2,
            timeout: Span(Duration::from_secs(60)),
            statement_bytes: Size(256 << 20),
            threads: 1,
        }
    }
}

impl ViewsSettings {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.running == 0 || self.threads == 0 {
            return Err("[views] running and threads must be at least 1".to_owned());
        }
        if self.pause.0 < Duration::from_millis(1) {
            return Err("[views] pause must be at least 1ms".to_owned());
        }
        if self.answer_rows < 1_000 {
            return Err("[views] answer_rows must be at least 1000".to_owned());
        }
        Ok(())
    }
}
