//! Reference tables: what things are, not what they measured, with their history.
//!
//! A table `sensors` is the stream `sensors_revisions`: each load adds a row for each thing that it has, `device` is the
//! key, `ts` the same for all, `valid_from` null unless it was said. What a reader sees follows from that: a revision holds
//! from `valid_from`; without it, from when it was received, and the first one of a thing from ever; and until the next.

use crate::ids::{NameError, StreamName};

/// Ends the name of the stream.
const REVISIONS: &str = "_revisions";
/// Since when a revision holds; null for "since it came".
pub const VALID_FROM: &str = "valid_from";

/// The stream of a reference table's revisions.
///
/// # Errors
/// When the name becomes too long.
pub fn revisions(table: &StreamName) -> Result<StreamName, NameError> {
    format!("{table}{REVISIONS}").parse()
}
