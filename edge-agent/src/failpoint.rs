//! The places of this crate where a test ends the process: [`segment_log::failpoint`].

/// Every place there is, in the order of the path.
pub const NAMES: [&str; 13] = [
    "journal.append",
    "journal.synced",
    "spool.append",
    "spool.cut",
    "number.put",
    "number.synced",
    "send.begun",
    "send.answered",
    "free.put",
    "free.done",
    "snapshot.written",
    "snapshot.named",
    "journal.freed",
];

/// Ends the process if this place was named.
pub(crate) fn reach(name: &'static str) {
    debug_assert!(NAMES.contains(&name), "{name}");
    segment_log::failpoint::reach(name);
}
