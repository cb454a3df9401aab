//! Alerts and rules, as people are shown them.

use std::cmp::Reverse;

use super::RuleStatus;
use super::episode::{Episode, Phase, Quiet, Severity};
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
    RuleStatus {
        name: name.to_owned(),
        state,
        reason,
        kind,
        hash,
        configured,
        failed: 0,
        refused: 0,
        unjudged: 0,
        last_error: None,
    }
}

/// Alerts of one answer at most.
pub const OPEN_MAX: usize = 10_000;

/// Which alerts are asked for: so many behind a place, the worst first and then by id.
#[derive(Debug, Clone)]
pub struct Page {
    pub after: Option<(Severity, String)>,
    pub limit: usize,
}

impl Page {
    /// Reads a place as [`Opened::next`] writes it.
    ///
    /// # Errors
    /// For people.
    pub fn place(text: &str) -> Result<(Severity, String), String> {
        let place = text.split_once(':').and_then(|(word, id)| Some((Severity::of(word)?, id.to_owned())));
        place.ok_or_else(|| format!("after: `{text:.80}` is no place in the list; take it from the answer before"))
    }
}

/// Alerts that are open, as JSON, and the place behind them when there are more.
#[derive(Debug)]
pub struct Opened {
    pub alerts: Vec<serde_json::Value>,
    pub next: Option<String>,
}

/// A page of the alerts that are open.
pub(crate) fn open(episodes: &Episodes, page: &Page) -> Opened {
    let place = |episode: &Episode| (Reverse(episode.severity), episode.id.clone());
    let after = page.after.clone().map(|(severity, id)| (Reverse(severity), id));
    let is_behind = |episode: &&Episode| after.as_ref().is_none_or(|after| place(episode) > *after);
    let mut open: Vec<&Episode> =
        episodes.open().filter(|episode| episode.phase != Phase::Resolved).filter(is_behind).collect();
    let has_more = open.len() > page.limit;
    if has_more {
        open.select_nth_unstable_by_key(page.limit, |episode| place(episode));
        open.truncate(page.limit);
    }
    open.sort_by_cached_key(|episode| place(episode));
    let last = open.last().filter(|_| has_more);
    let next = last.map(|episode| format!("{}:{}", episode.severity.word(), episode.id));
    Opened { alerts: open.into_iter().map(shown).collect(), next }
}

fn shown(episode: &Episode) -> serde_json::Value {
    let labels = serde_json::from_str::<serde_json::Value>(&episode.labels).unwrap_or_default();
    serde_json::json!({
        "id": episode.id,
        "rule": episode.rule,
        "state": episode.phase.word(),
        "quiet": episode.quiet.map(Quiet::word),
        "stale": episode.stale,
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
}
