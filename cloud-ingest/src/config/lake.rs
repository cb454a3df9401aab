//! What the configuration says of keeping tables in shape: checkpoints, compaction, retention, vacuum.

use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer};
use wire::StreamName;

use super::{Settings, Size, Span};
use crate::alias::Aliases;

/// The least grace of files that nothing names: longer than the longest commit.
const GRACE_MIN: Duration = Duration::from_secs(3_600);
const COMPACT_MEMORY_MIN: u64 = 64 << 20;

/// Logs and unused files.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LakeSettings {
    /// Commits between two checkpoints of a table.
    pub checkpoint_commits: u64,
    /// How long entries of a table's log are kept at least: as far back a query may name a version.
    pub log_keep: Span,
    /// How often retention and logs are looked at.
    pub every: Span,
    /// How long a file that is not part of a table any more stays, for queries that began before and for older versions.
    pub grace: Span,
    /// How often files are looked for that nothing names.
    pub vacuum_every: Span,
    /// What is done for a table is given up when its store says nothing for so long; others have their turn.
    pub patience: Span,
}

impl Default for LakeSettings {
    fn default() -> Self {
        let day = Duration::from_secs(86_400);
        Self {
            checkpoint_commits: 100,
            log_keep: Span(7 * day),
            every: Span(Duration::from_secs(600)),
            grace: Span(7 * day),
            vacuum_every: Span(day),
            patience: Span(Duration::from_secs(120)),
        }
    }
}

/// Small files into large ones.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CompactSettings {
    /// False: only `weir compact` does it.
    pub enabled: bool,
    /// How large a file becomes.
    pub file_bytes: Size,
    /// Files of this size are large enough.
    pub small_bytes: Size,
    /// So many small ones of a date are merged while it is still filled.
    pub min_files: usize,
    /// Of one core.
    pub cpu_share: f64,
    /// What all files that are merged at a time may take, compressed and decoded.
    pub memory_bytes: Size,
}

impl Default for CompactSettings {
    fn default() -> Self {
        Self {
            enabled: true,
            file_bytes: Size(512 << 20),
            small_bytes: Size(128 << 20),
            min_files: 8,
            cpu_share: 0.5,
            memory_bytes: Size(256 << 20),
        }
    }
}

/// How long rows are kept, by their event time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    Forever,
    For(Span),
}

impl FromStr for Keep {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "forever" {
            return Ok(Self::Forever);
        }
        text.parse().map(Self::For).map_err(|error| format!("{error}, or \"forever\""))
    }
}

impl<'de> Deserialize<'de> for Keep {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What is kept of streams of which nothing else is said.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeepSettings {
    pub keep: Keep,
    /// Bytes of a table's files; the oldest go first.
    pub max_bytes: Option<Size>,
}

impl Default for KeepSettings {
    fn default() -> Self {
        Self { keep: Keep::Forever, max_bytes: None }
    }
}

/// What holds for one stream, or for all that a pattern names. What is not set is as in [`KeepSettings`].
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StreamSettings {
    pub keep: Option<Keep>,
    pub max_bytes: Option<Size>,
    /// From the names that senders give to fields to those that they have here; of one stream, by its own name.
    pub alias: Aliases,
}

impl Settings {
    /// The aliases of a stream's fields.
    pub fn aliases_of(&self, stream: &StreamName) -> Option<&Aliases> {
        Some(&self.stream.get(stream.as_str())?.alias)
    }

    /// What is kept of a stream: by its own name, else by the longest pattern that fits, else by the default.
    pub fn keep_of(&self, stream: &StreamName) -> KeepSettings {
        let fitting = self.stream.iter().filter(|(pattern, _)| fits(pattern, stream.as_str()));
        let best = fitting.max_by_key(|(pattern, _)| (!pattern.contains('*'), pattern.len()));
        let own = best.map(|(_, own)| own.clone()).unwrap_or_default();
        KeepSettings {
            keep: own.keep.unwrap_or(self.retention.keep),
            max_bytes: own.max_bytes.or(self.retention.max_bytes),
        }
    }

    pub(super) fn check_lake(&self) -> Result<(), String> {
        let (lake, compact) = (&self.lake, &self.compact);
        if lake.grace.0 < GRACE_MIN {
            return Err("[lake] grace must be at least 1h: commits and queries may take that long".to_owned());
        }
        if lake.grace.0 < 2 * self.query.timeout.0 {
            return Err(
                "[lake] grace must be at least twice query.timeout: running queries read these files".to_owned()
            );
        }
        if lake.log_keep.0 < lake.grace.0 {
            return Err(
                "[lake] log_keep must be not less than lake.grace: the log says which files are in use".to_owned()
            );
        }
        if lake.patience.0.is_zero() {
            return Err("[lake] patience must be more than nothing: a store takes time to answer".to_owned());
        }
        if lake.checkpoint_commits == 0 {
            return Err("[lake] checkpoint_commits must be at least 1".to_owned());
        }
        if !(compact.cpu_share > 0.0 && compact.cpu_share <= 1.0) {
            return Err("[compact] cpu_share must be above 0 and at most 1: it is a part of one core".to_owned());
        }
        if compact.file_bytes.0 <= compact.small_bytes.0 {
            return Err("[compact] file_bytes must be more than compact.small_bytes".to_owned());
        }
        if compact.min_files < 2 {
            return Err("[compact] min_files must be at least 2".to_owned());
        }
        if compact.memory_bytes.0 < COMPACT_MEMORY_MIN {
            return Err("[compact] memory_bytes must be at least 64MiB".to_owned());
        }
        for (pattern, stream) in &self.stream {
            if pattern.contains('*') && !stream.alias.is_empty() {
                return Err(format!("[stream.\"{pattern}\".alias]: aliases are those of one stream, not of a pattern"));
            }
            if pattern.matches('*').count() > 1 {
                return Err(format!("[stream.\"{pattern}\"]: a pattern may have one `*`"));
            }
            if pattern.replacen('*', "x", 1).parse::<StreamName>().is_err() {
                return Err(format!("[stream.\"{pattern}\"] is no stream: names are lower-case letters, digits and _"));
            }
        }
        Ok(())
    }
}

fn fits(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, tail)) => name.len() >= head.len() + tail.len() && name.starts_with(head) && name.ends_with(tail),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_pattern_says_how_long_a_stream_is_kept() {
        let text = "data_dir = \"x\"\n[retention]\nkeep = \"90d\"\nmax_bytes = \"1GiB\"\n\
                    [stream.traffic]\nkeep = \"7d\"\n[stream.\"*_5m\"]\nkeep = \"forever\"\n\
                    [stream.\"traffic_*\"]\nmax_bytes = \"2GiB\"\n";
        let settings = Settings::parse(text).unwrap();
        let check = |stream: &str, keep: Keep, gib: u64| {
            let kept = settings.keep_of(&stream.parse().unwrap());
            assert_eq!((kept.keep, kept.max_bytes), (keep, Some(Size(gib << 30))), "{stream}");
        };
        let days = |days: u64| Keep::For(Span(Duration::from_secs(86_400 * days)));
        check("traffic", days(7), 1);
        check("weather", days(90), 1);
        check("weather_5m", Keep::Forever, 1);
        check("traffic_5m", days(90), 2);
    }
}
