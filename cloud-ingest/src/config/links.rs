//! Links as they are configured.

use std::path::PathBuf;

use serde::Deserialize;

/// What holds for all links.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinksSettings {
    /// TOML files of `[[link]]`.
    pub directory: Option<PathBuf>,
    /// Commands that wait for one edge; one more is refused.
    pub commands_waiting: usize,
}

impl Default for LinksSettings {
    fn default() -> Self {
        Self { directory: None, commands_waiting: 64 }
    }
}

impl LinksSettings {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.commands_waiting == 0 || self.commands_waiting > 500 {
            return Err("[links] commands_waiting must be from 1 to 500".to_owned());
        }
        Ok(())
    }
}
