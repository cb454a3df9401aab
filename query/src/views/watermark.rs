//! What time it is in a stream: the minimum over edges that are not idle of what their batches carried (rule 5). Pure.
//!
//! A batch without a watermark (line protocol, `weir load`) counts with the latest event time that its edge has sent. When
//! every edge is idle, or none is known since the node started, time stands at the highest that is known, the latest row
//! of the table included. That it never goes back is the view's business (`state.rs`).

use std::collections::BTreeMap;

use crate::catalog::SpoolFacts;

/// See the module. `facts` are those of the stream; `stored` is the latest event time in its table.
pub(crate) fn of_stream<'a>(
    facts: impl Iterator<Item = &'a SpoolFacts>,
    stored: Option<i64>,
    now_us: i64,
    idle_us: i64,
) -> Option<i64> {
    // By edge: what it carried, and when it was heard last. A new spool of an edge goes on where the old one was.
    let mut edges: BTreeMap<&str, (Option<i64>, i64)> = BTreeMap::new();
    for fact in facts {
        let carried = fact.watermark.or(fact.max_ts);
        let edge = edges.entry(fact.edge.as_str()).or_insert((None, i64::MIN));
        *edge = (edge.0.max(carried), edge.1.max(fact.received_at_us));
    }
    let live = edges.values().filter(|(_, heard)| now_us.saturating_sub(*heard) < idle_us);
    live.filter_map(|(carried, _)| *carried)
        .min()
        .or_else(|| edges.values().filter_map(|(carried, _)| *carried).chain(stored).max())
}

#[cfg(test)]
mod tests {
    use wire::{Seq, SpoolId};

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
            assert_eq!(of_stream(facts.iter(), stored, 1_000, 100), expected, "{facts:?} {stored:?}");
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
}
