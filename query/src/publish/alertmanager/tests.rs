use serde_json::{Value, json};

use super::*;
use crate::alerts::episode::Severity;

const S: i64 = 1_000_000;
/// 2026-01-01.
const NOW: i64 = 1_767_225_600 * S;

fn alert(from: i64, to: Option<i64>) -> Pushed {
    let mut alert = Episode::begun("ab".to_owned(), Severity::Critical, from);
    (alert.rule, alert.stream) = ("high".to_owned(), "traffic".to_owned());
    alert.labels = json!({ "device": "d1", "lane": 2, "alertname": "mine" }).to_string();
    alert.message = "d1 has \"200\"".to_owned();
    (alert.phase, alert.to) = (if to.is_some() { Phase::Resolved } else { Phase::Firing }, to);
    Pushed::new(&alert)
}

fn read(alerts: &[Pushed]) -> Vec<Value> {
    serde_json::from_slice(&body(alerts.iter(), NOW, REFRESH_EVERY)).unwrap()
}

#[test]
fn what_fires_ends_four_turns_ahead_and_what_is_resolved_at_its_end() {
    let pushed = read(&[alert(NOW - 60 * S, None), alert(NOW - 60 * S, Some(NOW - S)), alert(NOW + 3_600 * S, None)]);
    let labels =
        json!({ "alertname": "high", "severity": "critical", "stream": "traffic", "device": "d1", "lane": "2" });
    let annotations = json!({ "summary": "d1 has \"200\"", "weir_id": "ab" });
    let expected = [
        ("2025-12-31T23:59:00Z", "2026-01-01T00:04:00Z"),
        ("2025-12-31T23:59:00Z", "2025-12-31T23:59:59Z"),
        // Of a device whose clock is ahead: an end before the beginning would be refused.
        ("2026-01-01T01:00:00Z", "2026-01-01T01:04:00Z"),
    ];
    let expected = expected
        .map(|(from, to)| json!({ "labels": labels, "annotations": annotations, "startsAt": from, "endsAt": to }));
    assert_eq!(pushed, expected);
}
