use datafusion::physical_plan::displayable;

use super::*;

async fn bucket(arguments: &str, expected: &str) {
    check(&format!("SELECT time_bucket({arguments})"), &[expected]).await;
}

#[tokio::test]
async fn widths_zones_origins_and_offsets() {
    let ts = "TIMESTAMP '2024-03-10T12:34:56'";
    bucket(&format!("'5 minutes', {ts}"), "2024-03-10T12:30:00").await;
    bucket(&format!("INTERVAL '5 minutes', {ts}"), "2024-03-10T12:30:00").await;
    bucket(&format!("'1 week', {ts}"), "2024-03-04T00:00:00").await;
    bucket(&format!("'1 month', {ts}"), "2024-03-01T00:00:00").await;
    bucket(&format!("INTERVAL '1 year', {ts}"), "2024-01-01T00:00:00").await;
    bucket(&format!("'1 day', {ts}, 'Europe/Berlin'"), "2024-03-09T23:00:00").await;
    bucket(&format!("'1 day', {ts}, TIMESTAMP '2000-01-01T06:00:00'"), "2024-03-10T06:00:00").await;
    bucket(&format!("'1 day', {ts}, '2000-01-01T18:00:00'"), "2024-03-09T18:00:00").await;
    bucket(&format!("'1 day', {ts}, INTERVAL '13 hours'"), "2024-03-09T13:00:00").await;
    bucket(&format!("'1 week', {ts}, 'Asia/Tokyo', DATE '2024-01-07', INTERVAL '2 hours'"), "2024-03-10T02:00:00")
        .await;
    bucket("'1 day', DATE '2024-03-10'", "2024-03-10T00:00:00").await;
    bucket("'1 hour', CAST(NULL AS TIMESTAMP)", "NULL").await;
    bucket(&format!("NULL, {ts}"), "NULL").await;
    bucket("'1 hour', '2024-03-10T12:34:56Z'", "2024-03-10T12:00:00Z").await;
    bucket("'1 minute', arrow_cast(-1, 'Timestamp(Nanosecond, None)')", "1969-12-31T23:59:00").await;
    bucket("'1 minute', arrow_cast(61, 'Timestamp(Second, None)')", "1970-01-01T00:01:00").await;
    // The zone of the type counts.
    bucket(
        "'1 day', arrow_cast(1710073800, 'Timestamp(Second, Some(\"Europe/Berlin\"))')",
        "2024-03-10T00:00:00+01:00",
    )
    .await;
}

#[tokio::test]
async fn what_makes_no_sense_is_refused() {
    let ts = "TIMESTAMP '2024-03-10T12:34:56'";
    for width in ["'5'", "'-5 minutes'", "'0 days'", "'1 month 2 days'", "'nonsense'", "INTERVAL '1 nanosecond'"] {
        refused(&format!("SELECT time_bucket({width}, {ts})"), "a width is").await;
    }
    refused(&format!("SELECT time_bucket('1 day', {ts}, 'Europe/Nowhere')"), "neither a time zone").await;
    refused(&format!("SELECT time_bucket('1 day', {ts}, INTERVAL '1 month')"), "does not fit").await;
    refused("SELECT time_bucket('1 day', 5)", "timestamp").await;
    refused("SELECT time_bucket('1 day')", "takes a width").await;
    refused(&format!("SELECT time_bucket(w, {ts}) FROM (VALUES ('1 day'), ('2 days')) t(w)"), "constants").await;
}

async fn physical(session: &SessionContext, sql: &str) -> String {
    let plan = plan(session, sql).await.unwrap();
    let physical = session.state().create_physical_plan(&plan).await.unwrap();
    displayable(physical.as_ref()).indent(false).to_string()
}

#[tokio::test]
async fn a_comparison_becomes_one_of_the_time_itself() {
    let session = session(1);
    readings(&session, "t", &[], 1);
    let check = async |filter: &str, expected: &str| {
        let plan = physical(&session, &format!("SELECT v FROM t WHERE {filter}")).await;
        let filter = plan.lines().find(|line| line.contains("FilterExec")).unwrap_or_else(|| panic!("{plan}"));
        assert!(filter.contains(expected), "{filter}");
        assert!(!filter.contains("time_bucket") || expected.contains("time_bucket"), "{filter}");
    };
    let hour = "time_bucket('1 hour', ts)";
    check(&format!("{hour} >= '2024-01-01T05:00:00Z'"), "ts@0 >= 1704085200000000").await;
    check(&format!("{hour} > '2024-01-01T05:00:00Z'"), "ts@0 >= 1704088800000000").await;
    check(&format!("{hour} < '2024-01-01T05:00:00Z'"), "ts@0 < 1704085200000000").await;
    check(&format!("{hour} = '2024-01-01T05:00:00Z'"), "ts@0 >= 1704085200000000 AND ts@0 < 1704088800000000").await;
    check("time_bucket('1 day', ts, 'Europe/Berlin') = '2024-03-30T23:00:00Z'", "ts@0 < 1711922400000000").await;
    // No bucket begins there: nothing is said about one instant.
    check(&format!("{hour} >= '2024-01-01T05:30:00Z'"), "time_bucket").await;
}

#[tokio::test]
async fn the_comparison_means_the_same() {
    let rows: Vec<Reading> = (0..2_000)
        .map(|index| Reading { device: None, second: Some(index * 97), value: None, number: Some(index) })
        .collect();
    let session = session(2);
    readings(&session, "t", &rows, 3);
    for filter in [">=", ">", "<", "<=", "=", "<>"] {
        for bucket in ["'2024-01-01T05:00:00Z'", "'2024-01-01T05:30:00Z'"] {
            let count = async |left: &str| {
                rows_in(&session, &format!("SELECT count(*) FROM t WHERE {left} {filter} {bucket}")).await
            };
            // An argument that is not constant hides it from the optimizer.
            let hidden = "date_bin(INTERVAL '1 hour', ts, TIMESTAMP '2000-01-03T00:00:00Z')";
            assert_eq!(count("time_bucket('1 hour', ts)").await, count(hidden).await, "{filter} {bucket}");
        }
    }
}

#[tokio::test]
async fn what_is_sorted_by_time_is_sorted_by_bucket() {
    let session = session(1);
    readings(&session, "t", &[], 1);
    let sorted = "SELECT time_bucket('1 hour', ts) AS b FROM (SELECT ts FROM t ORDER BY ts LIMIT 100) ORDER BY b";
    let plan = physical(&session, sorted).await;
    assert_eq!(plan.matches("SortExec").count(), 1, "{plan}");
}
