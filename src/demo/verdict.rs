//! What SQL answers against what the city published: sensor by sensor, and reason by reason of the quarantine.
//!
//! Asked when nothing is on its way any more, so that what is there twice shows as well as what is missing.

use anyhow::{Context, bail};
use serde_json::{Map, Value};

use super::city::Truth;
use crate::sql;

/// Differences that are shown one by one.
const SHOWN_MAX: usize = 10;

/// The comparison in words.
///
/// # Errors
/// When SQL does not answer, or not what was published.
pub(crate) async fn compare(url: &str, truth: &Truth) -> anyhow::Result<String> {
    let found = found(url).await.context("ask what has arrived")?;
    let differences = differences(truth, &found);
    let text = table(truth, &found);
    if differences.is_empty() {
        return Ok(text);
    }
    let shown = differences.iter().take(SHOWN_MAX).map(|line| format!("\n{line}")).collect::<String>();
    let more = match differences.len().saturating_sub(SHOWN_MAX) {
        0 => String::new(),
        count => format!("\nand {count} more"),
    };
    bail!("SQL does not answer what was published:\n{text}{shown}{more}");
}

/// What SQL says, as if it had been published.
async fn found(url: &str) -> anyhow::Result<Truth> {
    let mut found = Truth::default();
    let sensors = "SELECT device, count(*) AS n, coalesce(sum(vehicles), 0) AS vehicles FROM traffic GROUP BY device";
    for row in rows_of(url, "traffic", sensors).await? {
        found.add_readings(text(&row, "device")?, number(&row, "n")?, number(&row, "vehicles")?);
    }
    let reasons = "SELECT reason, count(*) AS n FROM quarantine WHERE source = 'traffic' GROUP BY reason";
    for row in rows_of(url, "quarantine", reasons).await? {
        found.add_quarantined(text(&row, "reason")?, number(&row, "n")?);
    }
    Ok(found)
}

/// A table that has no rows yet is not there.
async fn rows_of(url: &str, table: &str, statement: &str) -> anyhow::Result<Vec<Map<String, Value>>> {
    let there = format!(
        "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public' AND table_name = '{table}'"
    );
    if sql::integer(url, &there).await? == 0 {
        return Ok(Vec::new());
    }
    sql::rows(url, statement).await
}

fn text<'a>(row: &'a Map<String, Value>, column: &str) -> anyhow::Result<&'a str> {
    row.get(column).and_then(Value::as_str).with_context(|| format!("no text `{column}`: {row:?}"))
}

fn number(row: &Map<String, Value>, column: &str) -> anyhow::Result<u64> {
    row.get(column).and_then(Value::as_u64).with_context(|| format!("no number `{column}`: {row:?}"))
}

fn table(truth: &Truth, found: &Truth) -> String {
    let readings = |truth: &Truth| truth.sensors.values().map(|tally| tally.readings).sum::<u64>();
    let vehicles = |truth: &Truth| truth.sensors.values().map(|tally| tally.vehicles).sum::<u64>();
    let quarantined = |truth: &Truth| truth.quarantined.values().sum::<u64>();
    let line = |name: &str, expected: u64, found: u64| format!("\n{name:<26}{expected:>14}{found:>14}");
    [
        format!("{:<26}{:>14}{:>14}", "", "published", "SQL says"),
        line("sensors", truth.sensors.len() as u64, found.sensors.len() as u64),
        line("readings in `traffic`", readings(truth), readings(found)),
        line("vehicles counted", vehicles(truth), vehicles(found)),
        line("readings in `quarantine`", quarantined(truth), quarantined(found)),
    ]
    .concat()
}

/// A line for each sensor and each reason that is not as published.
fn differences(truth: &Truth, found: &Truth) -> Vec<String> {
    let mut lines = Vec::new();
    let sensors = truth.sensors.keys().chain(found.sensors.keys().filter(|name| !truth.sensors.contains_key(*name)));
    for name in sensors {
        let of = |truth: &Truth| truth.sensors.get(name).copied().unwrap_or_default();
        let (expected, found) = (of(truth), of(found));
        if expected != found {
            lines.push(format!(
                "{name}: {} readings with {} vehicles published, {} with {} found",
                expected.readings, expected.vehicles, found.readings, found.vehicles
            ));
        }
    }
    let reasons =
        truth.quarantined.keys().chain(found.quarantined.keys().filter(|name| !truth.quarantined.contains_key(*name)));
    for reason in reasons {
        let of = |truth: &Truth| truth.quarantined.get(reason).copied().unwrap_or_default();
        if of(truth) != of(found) {
            lines.push(format!("quarantine, {reason}: {} published, {} found", of(truth), of(found)));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_the_totals_hide_is_a_difference() {
        let truth = |sensors: &[(&str, u64, u64)], reasons: &[(&str, u64)]| {
            let mut truth = Truth::default();
            sensors.iter().for_each(|(name, readings, vehicles)| truth.add_readings(name, *readings, *vehicles));
            reasons.iter().for_each(|(reason, count)| truth.add_quarantined(reason, *count));
            truth
        };
        let published = truth(&[("a", 2, 10), ("b", 3, 10)], &[("malformed", 1), ("above_max", 2)]);
        let check = |found: Truth, expected: usize| assert_eq!(differences(&published, &found).len(), expected);
        check(published.clone(), 0);
        check(truth(&[("a", 3, 10), ("b", 2, 10)], &[("malformed", 1), ("above_max", 2)]), 2);
        check(truth(&[("a", 2, 9), ("b", 3, 11)], &[("malformed", 1), ("above_max", 2)]), 2);
        check(truth(&[("a", 2, 10), ("c", 3, 10)], &[("malformed", 1), ("above_max", 2)]), 2);
        check(truth(&[("a", 2, 10), ("b", 3, 10)], &[("malformed", 2), ("above_max", 1)]), 2);
        check(truth(&[("a", 2, 10), ("b", 3, 10)], &[("malformed", 1), ("no_time", 2)]), 2);
    }
}
