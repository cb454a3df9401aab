-- The last two hours of each detector, every quarter of an hour: for rules that compare now with a moment ago.
CREATE MATERIALIZED VIEW speed_lately AS
SELECT window_start, device, avg(value) AS mean, last_value(value ORDER BY ts) AS latest, count(*) AS n
FROM HOP(speed, ts, INTERVAL '15 minutes', INTERVAL '2 hours')
GROUP BY window_start, device
