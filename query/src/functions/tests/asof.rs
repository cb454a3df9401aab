use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

const A: &str = "a AS (SELECT * FROM (VALUES ('x', 1, 10), ('x', 5, 11), ('x', 9, 12), ('y', 3, 13), ('z', 1, 14), \
                 (NULL, 3, 15), ('x', NULL, 16)) a(k, t, v))";
const B: &str = "b AS (SELECT * FROM (VALUES ('x', 1, 100), ('x', 4, 101), ('x', 6, 102), ('y', 4, 103), (NULL, 1, 104), \
                 ('x', NULL, 105)) b(k, t, w))";

async fn joined(join: &str, expected: &[&str]) {
    check(&format!("WITH {A}, {B} SELECT a.v, w FROM a {join} ORDER BY a.v"), expected).await;
}

#[tokio::test]
async fn every_direction_and_every_way_to_write_it() {
    let left = ["10|100", "11|101", "12|102", "13|NULL", "14|NULL", "15|NULL", "16|NULL"];
    joined("ASOF JOIN b MATCH_CONDITION (a.t >= b.t) ON a.k = b.k", &left).await;
    joined("ASOF JOIN b MATCH_CONDITION (b.t <= a.t) ON b.k = a.k", &left).await;
    joined("ASOF JOIN b MATCH_CONDITION (a.t >= b.t) USING (k)", &left).await;
    joined("ASOF LEFT JOIN b ON a.k = b.k AND a.t >= b.t", &left).await;
    joined("asof left outer join b USING (k, t)", &left).await;
    let inner = &left[..3];
    joined("ASOF JOIN b ON a.k = b.k AND a.t >= b.t", inner).await;
    joined("ASOF INNER JOIN b ON a.t >= b.t AND a.k = b.k", inner).await;
    joined("ASOF JOIN b USING (k, t)", inner).await;
    joined("ASOF JOIN b ON a.k = b.k AND a.t > b.t", &["11|101", "12|102"]).await;
    joined("ASOF JOIN b ON a.k = b.k AND a.t <= b.t", &["10|100", "11|102", "13|103"]).await;
    joined("ASOF JOIN b ON a.k = b.k AND a.t < b.t", &["10|101", "11|102", "13|103"]).await;
    // Without keys: the row of any key.
    joined(
        "ASOF JOIN (SELECT t, max(w) AS w FROM b WHERE k IS NOT NULL GROUP BY t) b ON a.t >= b.t",
        &["10|100", "11|103", "12|102", "13|100", "14|100", "15|100"],
    )
    .await;
    // Expressions, and types that are brought together.
    joined("ASOF JOIN b ON upper(a.k) = upper(b.k) AND a.t::double >= b.t + 1", &["11|101", "12|102"]).await;
}

#[tokio::test]
async fn among_other_joins_subqueries_and_ctes() {
    let sql = |from: &str| format!("WITH {A}, {B}, c AS (SELECT 'x' AS k, 2 AS t, 7 AS u) {from}");
    check(
        &sql(
            "SELECT a.v, w, u FROM a ASOF JOIN b ON a.k = b.k AND a.t >= b.t ASOF JOIN c ON a.k = c.k AND a.t >= c.t \
               ORDER BY v",
        ),
        &["11|101|7", "12|102|7"],
    )
    .await;
    check(&sql("SELECT a.v, w, u FROM a JOIN c ON a.k = c.k ASOF JOIN b ON a.k = b.k AND a.t >= b.t WHERE a.v > 10 ORDER BY v"),
        &["11|101|7", "12|102|7"]).await;
    check(
        &sql("SELECT a.v, w, u FROM a ASOF JOIN b ON a.k = b.k AND a.t >= b.t JOIN c ON a.k = c.k ORDER BY v"),
        &["10|100|7", "11|101|7", "12|102|7"],
    )
    .await;
    check(
        &sql("SELECT q.v, q.w FROM (SELECT a.v, b.w FROM a ASOF JOIN b ON a.k = b.k AND a.t >= b.t) q WHERE q.w = 101"),
        &["11|101"],
    )
    .await;
    check(
        &sql("SELECT v FROM a WHERE v IN (SELECT a.v FROM a ASOF JOIN b USING (k, t)) ORDER BY v"),
        &["10", "11", "12"],
    )
    .await;
    check(
        &sql("SELECT a.v, s.w FROM a ASOF JOIN (SELECT k, t, w FROM b WHERE w <> 101) s ON a.k = s.k AND a.t >= s.t \
               ORDER BY v"),
        &["10|100", "11|100", "12|102"],
    )
    .await;
    check(&sql("SELECT x.v, y.v FROM a x ASOF JOIN a y ON x.k = y.k AND x.t > y.t ORDER BY 1"), &["11|10", "12|11"])
        .await;
    check(&sql("SELECT * FROM a ASOF JOIN b USING (k, t) ORDER BY v"), &["x|1|10|100", "x|5|11|101", "x|9|12|102"])
        .await;
    check(&sql("SELECT count(*) FROM a ASOF JOIN b USING (k, t) UNION ALL SELECT count(*) FROM a ASOF LEFT JOIN b USING (k, t) ORDER BY 1"),
        &["3", "7"]).await;
}

#[tokio::test]
async fn conditions_above_keep_their_meaning() {
    let check = async |filter: &str, expected: &[&str]| {
        let sql = format!(
            "WITH {A}, {B} SELECT a.v, w FROM a ASOF LEFT JOIN b ON a.k = b.k AND a.t >= b.t WHERE {filter} ORDER BY v"
        );
        super::check(&sql, expected).await;
    };
    check("a.k = 'x' AND a.t < 6", &["10|100", "11|101"]).await;
    check("a.t >= 5", &["11|101", "12|102"]).await;
    check("a.t = 9", &["12|102"]).await;
    check("w IS NULL AND a.k = 'y'", &["13|NULL"]).await;
    check("b.t = 4", &["11|101"]).await;
    check("a.k = 'x' AND b.t + a.t > 2 AND a.v <> 12", &["11|101"]).await;
}

#[tokio::test]
async fn what_is_no_asof_join_is_refused() {
    for (join, word) in [
        ("a ASOF JOIN b ON a.k = b.k", "exactly one comparison"),
        ("a ASOF JOIN b MATCH_CONDITION (a.k = b.k)", "exactly one comparison"),
        ("a ASOF JOIN b ON a.t >= b.t AND a.v >= b.w", "this is one more"),
        ("a ASOF JOIN b ON a.t >= b.t AND a.v = 3", "this is none"),
        ("a ASOF JOIN b ON a.t >= b.t OR a.k = b.k", "this is none"),
        ("a ASOF JOIN b", "MATCH_CONDITION"),
        ("a ASOF JOIN b USING (k, nope)", "nope"),
    ] {
        refused(&format!("WITH {A}, {B} SELECT * FROM {join}"), word).await;
    }
}

#[tokio::test]
async fn equal_times_are_told_by_the_other_columns() {
    let sql = "SELECT w, x FROM (VALUES (1, 5)) a(k, t) ASOF JOIN \
               (VALUES (1, 3, 7, 1), (1, 3, 9, 0), (1, 3, NULL, 9), (1, 2, 99, 99)) b(k, t, w, x) ON a.k = b.k AND a.t >= b.t";
    check(sql, &["9|0"]).await;
}

#[tokio::test]
async fn as_a_naive_computation_has_it() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for round in 0..12 {
        let devices = [Some("a"), Some("b"), Some("c"), Some("d"), None];
        let span = [30, 300, 30_000][random.random_range(0..3)];
        let mut table = |rows: usize| -> Vec<Reading> {
            (0..rows)
                .map(|index| Reading {
                    device: devices[random.random_range(0..5)],
                    second: random.random_bool(0.95).then(|| random.random_range(0..span)),
                    value: None,
                    number: Some(index as i64),
                })
                .collect()
        };
        let (left, right) = (table(400), table(700));
        for (op, keyed) in [(">=", true), (">", true), ("<=", true), ("<", true), (">=", false), ("<", false)] {
            let best = |row: &Reading| {
                let at = row.second?;
                let fits = right.iter().filter(|other| {
                    let Some(there) = other.second else {
                        return false;
                    };
                    let in_order = match op {
                        ">=" => at >= there,
                        ">" => at > there,
                        "<=" => at <= there,
                        _ => at < there,
                    };
                    in_order && (!keyed || row.device.is_some() && row.device == other.device)
                });
                // The nearest, then the greatest.
                fits.max_by_key(|other| (-(at - other.second.unwrap()).abs(), other.number))
            };
            let mut wanted: Vec<String> = left
                .iter()
                .map(|row| {
                    let number =
                        best(row).and_then(|row| row.number).map_or("NULL".to_owned(), |number| number.to_string());
                    format!("{}|{number}", row.number.unwrap())
                })
                .collect();
            wanted.sort();
            for partitions in [1, 2, 7] {
                let session = session(partitions);
                readings(&session, "a", &left, 3);
                readings(&session, "b", &right, 4);
                let key = if keyed { "a.device = b.device AND" } else { "" };
                let sql = format!("SELECT a.n, b.n FROM a ASOF LEFT JOIN b ON {key} a.ts {op} b.ts");
                let mut got = rows_in(&session, &sql).await;
                got.sort();
                assert_eq!(got, wanted, "round {round}, {op}, keyed {keyed}, {partitions} partitions, seed {seed}");
            }
        }
    }
}
