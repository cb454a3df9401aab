//! How links stand: what `system.links`, `GET /v1/links` and `/metrics` show.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use parking_lot::Mutex;
use serde::Serialize;

use super::log::Outcome;

/// A link as it stands. Counts are since the node started.
#[derive(Debug, Clone, Default, Serialize)]
pub struct LinkStatus {
    pub name: String,
    /// `runs` or `refused`.
    pub state: &'static str,
    pub reason: Option<String>,
    pub from: String,
    pub when: String,
    /// `edge`, `topic` or `webhook`; empty when it is refused.
    pub to_kind: &'static str,
    pub to: String,
    /// Whether it is from a file of the configuration, and so not changed over HTTP.
    pub configured: bool,
    /// Hops that are not at their end.
    pub open: u64,
    pub told: u64,
    pub answered: u64,
    pub refused: u64,
    pub timed_out: u64,
    pub rate_limited: u64,
    /// Events about which its condition, or its payload, failed.
    pub failed: u64,
    /// The hop that ended last: when, µs since 1970 UTC, and how.
    pub last_at: Option<i64>,
    pub last_outcome: Option<&'static str>,
    pub last_answer: Option<String>,
    pub last_error: Option<String>,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Board {
    links: Mutex<BTreeMap<String, LinkStatus>>,
    /// Changes that links have not looked at yet, and those that were too old for them.
    behind: AtomicI64,
    missed: AtomicU64,
}

impl Board {
    pub(crate) fn all(&self) -> Vec<LinkStatus> {
        self.links.lock().values().cloned().collect()
    }

    /// A link is there from now on; its counts go on.
    pub(super) fn put(&self, status: LinkStatus) {
        let mut links = self.links.lock();
        let fresh = match links.remove(&status.name) {
            None => status,
            Some(known) => {
                let LinkStatus { name, state, reason, from, when, to_kind, to, configured, .. } = status;
                LinkStatus { name, state, reason, from, when, to_kind, to, configured, ..known }
            }
        };
        links.insert(fresh.name.clone(), fresh);
    }

    pub(super) fn remove(&self, name: &str) {
        self.links.lock().remove(name);
    }

    /// A hop has begun.
    pub(super) fn begun(&self, link: &str) {
        self.of(link, |status| status.open += 1);
    }

    /// A hop has ended, which had begun or not.
    pub(super) fn ended(&self, link: &str, had_begun: bool, outcome: Outcome, answer: &str, at: i64) {
        self.of(link, |status| {
            status.open = status.open.saturating_sub(u64::from(had_begun));
            let count = match outcome {
                Outcome::Told => &mut status.told,
                Outcome::Answered => &mut status.answered,
                Outcome::Refused => &mut status.refused,
                Outcome::TimedOut => &mut status.timed_out,
                Outcome::RateLimited => &mut status.rate_limited,
                Outcome::Begun | Outcome::Mark => return,
            };
            *count += 1;
            (status.last_at, status.last_outcome) = (Some(at), Some(outcome.word()));
            status.last_answer = Some(answer.to_owned()).filter(|answer| !answer.is_empty());
        });
    }

    /// An event could not be judged.
    pub(super) fn failed(&self, link: &str, error: &str) {
        self.of(link, |status| {
            status.failed += 1;
            status.last_error = Some(error.to_owned());
        });
    }

    fn of(&self, link: &str, change: impl FnOnce(&mut LinkStatus)) {
        // One that was deleted meanwhile is shown no longer.
        if let Some(status) = self.links.lock().get_mut(link) {
            change(status);
        }
    }

    pub(super) fn behind(&self, changes: i64) {
        self.behind.store(changes.max(0), Ordering::Relaxed);
    }

    pub(super) fn missed(&self, changes: u64) {
        self.missed.fetch_add(changes, Ordering::Relaxed);
    }

    /// Every name stands here, once.
    pub(super) fn metrics(&self) -> String {
        let links = self.links.lock();
        let mut text = String::new();
        // Writing to a String cannot fail.
        let mut family = |name: &str, kind: &str, values: Vec<(String, u64)>| {
            writeln!(text, "# TYPE {name} {kind}").ok();
            for (labels, value) in values {
                writeln!(text, "{name}{labels} {value}").ok();
            }
        };
        let in_state = |state: &str| links.values().filter(|link| link.state == state).count() as u64;
        let states = ["runs", "refused"].map(|state| (format!("{{state=\"{state}\"}}"), in_state(state)));
        family("weir_links", "gauge", states.into());
        let hops = links.values().flat_map(|link| {
            let LinkStatus { told, answered, refused, timed_out, rate_limited, failed, .. } = *link;
            [
                ("told", told),
                ("answered", answered),
                ("refused", refused),
                ("timed_out", timed_out),
                ("rate_limited", rate_limited),
                ("failed", failed),
            ]
            // A name has no letter that would need an escape.
            .map(|(outcome, count)| (format!("{{link=\"{}\",outcome=\"{outcome}\"}}", link.name), count))
        });
        family("weir_link_hops_total", "counter", hops.collect());
        let open = links.values().map(|link| link.open).sum();
        family("weir_link_hops_open", "gauge", vec![(String::new(), open)]);
        let behind = u64::try_from(self.behind.load(Ordering::Relaxed)).unwrap_or_default();
        family("weir_links_behind", "gauge", vec![(String::new(), behind)]);
        let missed = self.missed.load(Ordering::Relaxed);
        family("weir_links_missed_total", "counter", vec![(String::new(), missed)]);
        text
    }
}
