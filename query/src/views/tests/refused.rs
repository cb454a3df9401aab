//! What cannot be kept is refused with the reason.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_kept_is_refused_with_the_reason() {
    let city = City::new();
    city.create(&words::stream("traffic"), words::traffic_fields());
    city.create(&words::stream("weather"), words::weather_fields());
    let engine = engine(&city);
    for (select, words) in [
        ("SELECT count(*) AS n FROM traffic", "rows of all times"),
        ("SELECT device, max(speed) AS m FROM traffic GROUP BY 1", "rows of all times"),
        ("SELECT device, speed FROM traffic", "add `ts`"),
        ("SELECT max(speed) AS m FROM traffic GROUP BY time_bucket('5 minutes', ts)", "must tell the window"),
        ("SELECT ts, now() AS n FROM traffic", "another answer each time"),
        (
            "SELECT time_bucket('5 minutes', ts) AS b, random() AS n FROM traffic GROUP BY 1, 2",
            "another answer each time",
        ),
        ("SELECT ts, speed FROM traffic ORDER BY ts", "no order"),
        ("SELECT ts, speed FROM traffic LIMIT 5", "no LIMIT"),
        (
            "SELECT t.ts, t.speed, w.temperature FROM traffic t JOIN weather w ON w.device = t.device",
            "rows of all times",
        ),
        (
            "SELECT a.b, a.n FROM (SELECT time_bucket('5 minutes', ts) AS b, count(*) AS n FROM traffic GROUP BY 1) a \
             JOIN (SELECT time_bucket('1 minute', ts) AS b, count(*) AS n FROM weather GROUP BY 1) c ON a.b = c.b",
            "windows of one size",
        ),
        ("SELECT ts, speed - (SELECT avg(speed) FROM traffic) AS d FROM traffic", "question within a question"),
        ("SELECT ts, speed FROM traffic WHERE device IN (SELECT device FROM weather)", "question within a question"),
        ("SELECT ts, speed, avg(speed) OVER (PARTITION BY device ORDER BY ts) AS a FROM traffic", "rows of all times"),
        (
            "SELECT time_bucket('5 minutes', ts) AS b, device, count(*) AS n FROM traffic GROUP BY ROLLUP (time_bucket('5 minutes', ts), device)",
            "ROLLUP",
        ),
        ("SELECT time_bucket('5 minutes', ts) AS b, array_agg(road) AS l FROM traffic GROUP BY 1", "order of rows"),
        (
            "SELECT time_bucket('5 minutes', ts) AS b, array_agg(road ORDER BY ts) AS l FROM traffic GROUP BY 1",
            "no stream can store",
        ),
        ("SELECT time_bucket('5 minutes', ts) AS view_b, count(*) AS n FROM traffic GROUP BY 1", "Weir's own"),
        ("SELECT 1 AS one", "follows a stream"),
        ("SELECT name FROM system.streams", "cannot be followed"),
        ("SELECT ts, device FROM latest('traffic')", "cannot be followed"),
        ("SELECT ts, device FROM traffic FOR VERSION AS OF 0", "cannot be followed"),
        ("SELECT DISTINCT ON (device) ts, device FROM traffic", "DISTINCT ON"),
        ("SELECT DISTINCT device FROM traffic", "rows of all times"),
        // A row of one minute moves those of all others of its hour.
        (
            "SELECT time_bucket('1 minute', ts) AS b, count(*) AS n FROM (SELECT ts, row_number() OVER (PARTITION BY \
             time_bucket('1 hour', ts) ORDER BY speed) AS r FROM traffic) AS q WHERE r < 4 GROUP BY 1",
            "that this is partitioned by",
        ),
        (
            "SELECT time_bucket('1 minute', ts) AS b, row_number() OVER (PARTITION BY time_bucket('1 hour', ts)) AS r, \
             row_number() OVER (PARTITION BY time_bucket('2 hours', ts)) AS s FROM traffic",
            "windows of one size",
        ),
        (
            "SELECT t.ts, t.r, w.temperature FROM (SELECT ts, row_number() OVER (PARTITION BY time_bucket('1 hour', ts)) AS r \
             FROM traffic) t JOIN weather w ON w.ts = t.ts",
            "rows of all times",
        ),
        ("SELECT ts FROM traffic UNION ALL SELECT ts FROM weather", "must tell the window"),
        (
            "SELECT window_end, count(*) AS n FROM HOP(traffic, ts, INTERVAL '1 minute', INTERVAL '5 minutes') GROUP BY 1",
            "rows of all times",
        ),
        ("SELECT window_start FROM HOP(traffic, ts, '1 minute', '90 seconds')", "not a whole number of hops"),
        ("SELECT window_start FROM HOP(traffic, ts, '5 minutes', '1 minute')", "not a whole number of hops"),
        ("SELECT window_start FROM HOP(traffic, ts, '1 second', '1 hour')", "may lie in 1000"),
        ("SELECT window_start FROM HOP(traffic, speed, '1 minute', '5 minutes')", "no timestamp"),
        ("SELECT window_start FROM HOP(traffic, ts, '1 minute')", "HOP takes a table"),
        // A time that is not the row's own.
        (
            "SELECT window_start, count(*) AS n FROM HOP((SELECT max(ts) AS ts, time_bucket('1 hour', ts) AS h FROM traffic \
             GROUP BY 2), ts, '1 minute', '5 minutes') GROUP BY 1",
            "event time of a stream",
        ),
        (
            "SELECT window_start, count(*) AS n FROM HOP((SELECT ts, device FROM (SELECT ts, device, row_number() OVER \
             (PARTITION BY time_bucket('1 hour', ts)) AS r FROM traffic) q WHERE r < 4), ts, '1 minute', '5 minutes') GROUP BY 1",
            "event time of a stream",
        ),
        // Each side of the join may be in another of the windows of one moment.
        (
            "SELECT a.window_start AS b, count(*) AS n FROM HOP(traffic, ts, '1 minute', '5 minutes') a \
             JOIN HOP(weather, ts, '1 minute', '5 minutes') w ON a.ts = w.ts AND a.device = w.device GROUP BY 1",
            "rows of all times",
        ),
        (
            "SELECT t.b, w.n FROM (SELECT window_start AS b, count(*) AS n FROM HOP(traffic, ts, '1 minute', '5 minutes') GROUP BY 1) t \
             JOIN (SELECT time_bucket('1 minute', ts) AS b, count(*) AS n FROM weather GROUP BY 1) w ON w.b = t.b",
            "windows of one size",
        ),
        // Sessions that begin together do not end together, and a row moves the others of its session.
        (
            "SELECT device, window_start, count(*) AS n FROM SESSION(traffic, ts, device, '5 minutes') GROUP BY 1, 2",
            "window_end of SESSION",
        ),
        ("SELECT ts, device FROM SESSION(traffic, ts, device, '5 minutes')", "window_end of SESSION"),
        (
            "SELECT time_bucket('1 hour', ts) AS b, max(window_end) AS e FROM SESSION(traffic, ts, device, '5 minutes') GROUP BY 1",
            "window_end of SESSION",
        ),
        (
            "SELECT window_end, row_number() OVER (PARTITION BY device ORDER BY ts) AS r FROM SESSION(traffic, ts, device, '5 minutes')",
            "rows of all times",
        ),
        (
            "SELECT window_end FROM SESSION((SELECT max(ts) AS ts, time_bucket('1 hour', ts) AS h FROM traffic GROUP BY 2), ts, h, '1 minute')",
            "event time of a stream",
        ),
        (
            "SELECT window_end FROM SESSION((SELECT ts AS ts, device FROM SESSION(traffic, ts, device, '5 minutes')), ts, device, '1 hour')",
            "event time of a stream",
        ),
        (
            "SELECT t.b, w.n FROM (SELECT window_end AS b, count(*) AS n FROM SESSION(traffic, ts, device, '5 minutes') GROUP BY 1) t \
             JOIN (SELECT window_end AS b, count(*) AS n FROM SESSION(weather, ts, device, '6 minutes') GROUP BY 1) w ON w.b = t.b",
            "windows of one size",
        ),
        ("SELECT nothing FROM traffic", "no column"),
        ("SELECT ts FROM nowhere", "no table"),
    ] {
        let sql = format!("CREATE MATERIALIZED VIEW v AS {select}");
        let error = view(&engine, &sql).await.expect_err(select).to_string();
        assert!(error.contains(words), "{select}: {error}");
    }
}
