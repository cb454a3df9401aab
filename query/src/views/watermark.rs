//! What time it is in a stream: the minimum over edges that are not idle of what their batches carried (rule 5). Pure.
//!
//! How long an edge has been silent is measured by a clock that only goes on, from when its newest batch was first seen here:
//! [`Heard`]. The clock on the wall says it once only, of batches that were there before.
//!
//! A batch without a watermark (line protocol, `weir load`) counts with the latest event time that its edge has sent. When
//! every edge is idle, or none is known since the node started, time stands at the highest that is known, the latest row
//! of the table included. That it never goes back is the view's business (`state.rs`).

use std::collections::BTreeMap;

use wire::{SpoolId, StreamName};

use crate::catalog::SpoolFacts;

/// When something is: by the clock on the wall, which may be set, and by one that only goes on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    /// µs since 1970.
    pub(crate) wall_us: i64,
    /// µs since some beginning.
    pub(crate) since_us: i64,
}

/// When the newest batch of each spool was heard.
#[derive(Debug, Default)]
pub(crate) struct Heard(BTreeMap<StreamName, BTreeMap<SpoolId, (u64, i64)>>);

impl Heard {
    /// Looks at what is known of some spools of a stream; gives by edge what it carried, and how long it is silent, µs.
    /// A new spool of an edge goes on where the old one was.
    pub(crate) fn edges<'a>(
        &mut self,
        stream: &StreamName,
        facts: impl Iterator<Item = &'a SpoolFacts>,
        now: Moment,
    ) -> BTreeMap<&'a str, (Option<i64>, i64)> {
        let mut spools = std::mem::take(self.0.entry(stream.clone()).or_default());
        let known = self.0.entry(stream.clone()).or_default();
        let mut edges: BTreeMap<&str, (Option<i64>, i64)> = BTreeMap::new();
        for fact in facts {
            let heard = match spools.remove(&fact.spool) {
                Some((batches, heard)) if batches == fact.batches => heard,
                Some(_) => now.since_us,
                None => now.since_us.saturating_sub(now.wall_us.saturating_sub(fact.received_at_us).max(0)),
            };
            known.insert(fact.spool, (fact.batches, heard));
            let silent = now.since_us.saturating_sub(heard);
            let edge = edges.entry(fact.edge.as_str()).or_insert((None, i64::MAX));
            *edge = (edge.0.max(fact.watermark.or(fact.max_ts)), edge.1.min(silent));
        }
        edges
    }
}

/// See the module. `edges` are those of the stream, as [`Heard`] gives them; `stored` is the latest event time in its table.
pub(crate) fn of_stream(edges: &BTreeMap<&str, (Option<i64>, i64)>, stored: Option<i64>, idle_us: i64) -> Option<i64> {
    let live = edges.values().filter(|(_, silent)| *silent < idle_us);
    live.filter_map(|(carried, _)| *carried)
        .min()
        .or_else(|| edges.values().filter_map(|(carried, _)| *carried).chain(stored).max())
}

/// The edge that time in the stream waits for: of those that are not idle the one that is behind the others.
pub(crate) fn held_by(edges: &BTreeMap<&str, (Option<i64>, i64)>, idle_us: i64) -> Option<String> {
    let live = edges.iter().filter(|(_, (_, silent))| *silent < idle_us);
    let behind = live.filter_map(|(edge, (carried, _))| Some(((*carried)?, *edge))).min()?;
    Some(behind.1.to_owned())
}

#[cfg(test)]
mod tests {
    use wire::Seq;

    use super::*;

    fn fact(edge: &str, watermark: Option<i64>, max_ts: i64, heard: i64) -> SpoolFacts {
        SpoolFacts {
            stream: "s".parse().unwrap(),
            edge: edge.parse().unwrap(),
            spool: SpoolId([0; 16]),
            rows: 1,
            batches: 1,
            received_at_us: heard,
            max_ts: Some(max_ts),
            watermark,
            durable: Seq(1),
            committed: Seq(0),
            agent: String::new(),
            configuration: 0,
        }
    }

    #[test]
    fn a_silent_edge_holds_nothing_back() {
        let check = |facts: &[SpoolFacts], stored: Option<i64>, expected: Option<i64>| {
            // However the clock that only goes on began.
            for since_us in [0, 1_000, 5_000] {
                let now = Moment { wall_us: 1_000, since_us };
                let edges = Heard::default().edges(&"s".parse().unwrap(), facts.iter(), now);
                assert_eq!(of_stream(&edges, stored, 100), expected, "{facts:?} {stored:?}");
            }
        };
        check(&[], None, None);
        check(&[], Some(7), Some(7));
        let (fast, slow) = (fact("fast", Some(50), 60, 1_000), fact("slow", Some(20), 60, 950));
        check(&[fast.clone(), slow.clone()], Some(70), Some(20));
        let silent = fact("silent", Some(5), 60, 900);
        check(&[fast.clone(), slow.clone(), silent.clone()], None, Some(20));
        // All are idle.
        check(std::slice::from_ref(&silent), None, Some(5));
        check(&[silent.clone(), fact("gone", Some(9), 60, 0)], Some(8), Some(9));
        // Another spool of the same edge, and one that carries none.
        check(&[slow.clone(), fact("slow", Some(30), 60, 0)], None, Some(30));
        check(&[fast, fact("line", None, 40, 1_000)], None, Some(40));
    }

    #[test]
    fn a_clock_that_is_set_does_not_make_edges_idle_or_heard() {
        let stream = "s".parse().unwrap();
        let mut heard = Heard::default();
        let mut silent = |facts: &[SpoolFacts], wall_us: i64, since_us: i64| {
            let edges = heard.edges(&stream, facts.iter(), Moment { wall_us, since_us });
            edges.values().map(|(_, silent)| *silent).collect::<Vec<_>>()
        };
        let old = fact("a", None, 1, 900);
        assert_eq!(silent(std::slice::from_ref(&old), 1_000, 50), [100]);
        // Set back, and far ahead.
        assert_eq!(silent(std::slice::from_ref(&old), 10, 60), [110]);
        assert_eq!(silent(std::slice::from_ref(&old), 1_000_000, 70), [120]);
        let new = SpoolFacts { batches: 2, received_at_us: 3, ..old.clone() };
        assert_eq!(silent(std::slice::from_ref(&new), 3, 80), [0]);
        assert_eq!(silent(&[new], 1_000_000, 90), [10]);
        // Of the future, by a clock that was set since.
        assert_eq!(silent(&[SpoolFacts { spool: SpoolId([1; 16]), received_at_us: 99, ..old }], 5, 100), [0]);
    }
}
