//! Alerts and rules, as people are shown them.

use super::RuleStatus;
use super::episode::{Phase, Quiet};
use super::episodes::Episodes;
use super::rule::{Kind, Rule, RuleError};

/// What is told of a rule.
pub(crate) fn status_of(name: &str, rule: Result<&Rule, &RuleError>, configured: bool) -> RuleStatus {
    let (state, reason) = match &rule {
        Ok(_) => ("runs", None),
        Err(RuleError::Waits(reason) | RuleError::Busy(reason)) => ("waits", Some(reason.clone())),
        Err(RuleError::Refused(reason)) => ("refused", Some(reason.clone())),
    };
    let kind = rule.ok().map(|rule| match rule.kind {
        Kind::Rows(_) => "rows",
        Kind::Statement { .. } => "statement",
        Kind::Absent { .. } => "absent",
    });
    let hash = rule.map(|rule| rule.policy.hash.clone()).unwrap_or_default();
    RuleStatus { name: name.to_owned(), state, reason, kind, hash, configured, failed: 0, refused: 0, last_error: None }
}

/// The alerts that are open, the worst first.
pub(crate) fn open(episodes: &Episodes) -> serde_json::Value {
    let mut open: Vec<_> = episodes.open().filter(|episode| episode.phase != Phase::Resolved).collect();
    open.sort_by(|one, other| other.severity.cmp(&one.severity).then_with(|| one.id.cmp(&other.id)));
    let shown = open.into_iter().take(10_000).map(|episode| {
        let labels = serde_json::from_str::<serde_json::Value>(&episode.labels).unwrap_or_default();
        serde_json::json!({
            "id": episode.id,
            "rule": episode.rule,
            "state": episode.phase.word(),
            "quiet": episode.quiet.map(Quiet::word),
            "severity": episode.severity.word(),
            "device": episode.device,
            "labels": labels,
            "message": episode.message,
            "topic": episode.topic,
            "value": episode.value,
            "from_us": episode.from,
            "acknowledged_by": episode.acknowledged.as_ref().map(|by| &by.by),
            "assigned_to": episode.assigned,
            "aliases": episode.aliases,
            "raised_by": episode.raised.keys().collect::<Vec<_>>(),
        })
    });
    shown.collect::<Vec<_>>().into()
}
