//! What is subscribed, what is still subscribed though no longer configured, and what the journal must say before.
//!
//! A kept session keeps its subscriptions, so a topic that leaves the configuration must be unsubscribed. The journal
//! knows at all times at least what the broker may have: a filter is in it before it is subscribed, and leaves it when the
//! broker has acknowledged that it is gone. Pure.

/// What is to be done at a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Change {
    /// What the journal must say before anything is subscribed, when it does not yet.
    pub(super) record: Option<Vec<String>>,
    /// What to unsubscribe, after the subscriptions: where filters overlap, twice is better than never.
    pub(super) gone: Vec<String>,
}

impl Change {
    /// From what the journal says that the broker may have to what is configured.
    pub(super) fn new(known: &[String], wanted: &[String]) -> Self {
        let gone = known.iter().filter(|filter| !wanted.contains(filter)).cloned().collect();
        let fresh = wanted.iter().filter(|filter| !known.contains(filter)).cloned().collect::<Vec<_>>();
        Self { record: (!fresh.is_empty()).then(|| [known, &fresh].concat()), gone }
    }
}
