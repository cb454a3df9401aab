//! What a reader sees whose scope is some of the rows, and what nothing tells it of the others.

use super::*;
use crate::scope::Scope;

/// A reader with this scope.
pub(crate) fn reader(edges: Option<&[&str]>, condition: Option<&str>) -> Caller {
    let edges = edges.map(|edges| edges.iter().map(|edge| (*edge).to_owned()).collect());
    let scope = Scope::new(edges, condition.map(str::to_owned)).unwrap();
    Caller::new("reader", Door::Http, Some(Arc::new(scope)), Arc::new([]))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_sees_the_rows_of_its_scope_and_no_others() {
    // Ten batches of ten rows, eight of them cold: batch i has _seq i + 1, counts 10 i to 10 i + 9, and the edge by turns.
    let (engine, _traffic) = engine(10, 0, MINUTE).await;
    let own = reader(Some(&["gw-*"]), None);
    for (sql, expected) in [
        ("SELECT count(*) FROM traffic", 50),
        ("SELECT count(*) FROM traffic WHERE _edge = 'other'", 0),
        ("SELECT count(*) FROM traffic WHERE _edge = 'other' OR true", 50),
        ("SELECT count(_edge) FROM traffic", 50),
        ("SELECT max(vehicle_count) FROM traffic", 89),
        ("SELECT min(vehicle_count) FROM traffic WHERE vehicle_count > 9", 20),
        ("SELECT count(*) FROM traffic a JOIN traffic b USING (vehicle_count)", 50),
        ("SELECT (SELECT count(*) FROM traffic)", 50),
        ("SELECT count(*) FROM traffic FOR VERSION AS OF 1", 20),
        ("SELECT count(DISTINCT _edge) FROM traffic", 1),
        ("SELECT count(*) FROM (SELECT * FROM traffic LIMIT 1000)", 50),
        ("SELECT count(*) FROM system.batches", 5),
        ("SELECT count(*) FROM system.sources WHERE edge = 'other'", 0),
        ("SELECT rows FROM system.sources WHERE name = 'vehicle_count'", 50),
        ("SELECT count(*) FROM system.edges", 1),
        ("SELECT count(*) FROM system.ingest WHERE edge = 'other'", 0),
        ("SELECT count(*) FROM system.files", 0),
        ("SELECT count(rows) FROM system.streams", 0),
        ("SELECT count(*) FROM system.streams WHERE name = 'traffic'", 1),
    ] {
        assert_eq!(integer_as(&engine, &own, sql).await, expected, "{sql}");
    }
    let all = Caller::node();
    assert_eq!(integer_as(&engine, &all, "SELECT count(*) FROM traffic").await, 100);
    for (edges, condition, expected) in [
        (None, Some("vehicle_count < 15"), 15),
        (Some(&["gw-1"][..]), Some("vehicle_count < 15"), 10),
        (Some(&["g*"][..]), Some("device = 'd0'"), 25),
        (Some(&[][..]), None, 0),
        (Some(&["gw_1"][..]), None, 0),
        // What cannot be judged is denied.
        (None, Some("site = 'north'"), 0),
        (None, Some("site = 'north' OR true"), 0),
        (None, Some("NULL"), 0),
    ] {
        let caller = reader(edges, condition);
        let count = integer_as(&engine, &caller, "SELECT count(*) FROM traffic").await;
        assert_eq!(count, expected, "{edges:?} {condition:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_errors_nor_plans_tell_of_rows_out_of_scope() {
    let (engine, _traffic) = engine(10, 0, MINUTE).await;
    // Sees the counts 0 to 9.
    let own = reader(None, Some("vehicle_count < 10"));
    // Each of these fails for whoever evaluates it for a row out of scope.
    for probe in [
        "SELECT count(*) FROM traffic WHERE 1 / (vehicle_count - 42) < 2",
        "SELECT count(*) FROM traffic WHERE CAST(concat(vehicle_count / 10, CASE WHEN vehicle_count > 9 THEN 'x' END) AS INT) = 0",
        "SELECT sum(1 / (vehicle_count - 42)) IS NULL FROM traffic",
        "SELECT count(*) FROM traffic a JOIN (SELECT 42 AS w) b ON 1 / (a.vehicle_count - b.w) < 2",
        "SELECT count(*) FROM traffic ORDER BY 1 LIMIT 1",
    ] {
        engine.rows_as(&own, probe, usize::MAX).await.unwrap_or_else(|error| panic!("{probe}: {error}"));
        if probe.contains("42") {
            engine.rows_as(&Caller::node(), probe, usize::MAX).await.expect_err("it fails for who sees all");
        }
    }
    // The newest of the rows in its scope, whichever way it asks.
    for newest in [
        "SELECT device, vehicle_count FROM latest('traffic') ORDER BY device",
        "SELECT DISTINCT ON (device) device, vehicle_count FROM traffic ORDER BY device, ts DESC",
    ] {
        let rows = engine.rows_as(&own, newest, usize::MAX).await.unwrap();
        let counts: Vec<i64> =
            rows.iter().flat_map(|batch| batch.column(1).as_primitive::<Int64Type>().values().to_vec()).collect();
        assert_eq!(counts, [8, 9], "{newest}");
    }
    for explain in ["EXPLAIN", "EXPLAIN VERBOSE", "EXPLAIN ANALYZE", "EXPLAIN ANALYZE VERBOSE"] {
        let text =
            text_as(&engine, &own, &format!("{explain} SELECT count(*) FROM traffic WHERE vehicle_count >= 0")).await;
        for secret in [
            "parquet",
            "file_groups",
            "2022-01",
            "row_groups",
            "output_rows=100",
            "output_rows=80",
            "Exact(100)",
            "Exact(80)",
        ] {
            assert!(!text.contains(secret), "{explain} tells {secret}:\n{text}");
        }
    }
    let sees = text_as(&engine, &Caller::node(), "EXPLAIN SELECT count(vehicle_count) FROM traffic").await;
    assert!(sees.contains("parquet"), "whoever sees all sees files: {sees}");
}
