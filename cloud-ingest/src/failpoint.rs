//! The places of this crate where a test ends the process: [`segment_log::failpoint`].

/// Every place there is.
pub const NAMES: [&str; 16] = [
    "store.staged",
    "store.named",
    "log.before_put",
    "log.after_put",
    "compact.planned",
    "compact.merging",
    "compact.file",
    "compact.done",
    "retain.planned",
    "retype.planned",
    "retype.writing",
    "retype.file",
    "retype.done",
    "checkpoint.before",
    "checkpoint.after",
    "delete.between",
];

/// Ends the process if this place was named.
pub(crate) fn reach(name: &'static str) {
    debug_assert!(NAMES.contains(&name), "{name}");
    segment_log::failpoint::reach(name);
}
