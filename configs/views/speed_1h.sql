-- What each detector said in an hour: for rules about one that is stuck, and for charts. `device` tells alerts apart.
CREATE MATERIALIZED VIEW speed_1h AS
SELECT time_bucket('1 hour', ts) AS begins, device, avg(value) AS mean, min(value) AS lowest, max(value) AS highest, count(*) AS n
FROM speed
GROUP BY 1, 2
