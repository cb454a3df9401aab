//! JSON, geometry and H3.

use super::*;

#[tokio::test]
async fn json() {
    let t = "(VALUES ('{\"a\": {\"b\": [1, 2.5, \"x\"]}, \"n\": 7}'), (NULL), ('no json')) t(j)";
    check(&format!("SELECT json_get_int(j, 'n') FROM {t}"), &["7", "NULL", "NULL"]).await;
    check(&format!("SELECT j->>'n' FROM {t}"), &["7", "NULL", "NULL"]).await;
    check(&format!("SELECT (j->'a'->'b'->1)::double FROM {t}"), &["2.5", "NULL", "NULL"]).await;
    check(&format!("SELECT json_length(j, 'a', 'b') FROM {t}"), &["3", "NULL", "NULL"]).await;
    check(&format!("SELECT count(*) FROM {t} WHERE (j->>'n') = '7'"), &["1"]).await;
    check(&format!("SELECT count(*) FROM {t} WHERE json_contains(j, 'n')"), &["1"]).await;
}

#[tokio::test]
async fn geometry() {
    check("SELECT ST_X(ST_Point(10.2, 56.15)), ST_Y(ST_Point(10.2, 56.15))", &["10.2|56.15"]).await;
    check("SELECT ST_Distance(ST_Point(0.0, 0.0), ST_Point(3.0, 4.0))", &["5.0"]).await;
    let square = "ST_GeomFromText('POLYGON((0 0, 10 0, 10 10, 0 10, 0 0))')";
    check(
        &format!("SELECT ST_Contains({square}, ST_Point(5.0, 5.0)), ST_Contains({square}, ST_Point(15.0, 5.0))"),
        &["true|false"],
    )
    .await;
    check(
        &format!("SELECT ST_Within(ST_Point(x, 5.0), {square}) FROM (VALUES (5.0), (11.0)) t(x)"),
        &["true", "false"],
    )
    .await;
    check("SELECT ST_DWithin(ST_Point(0.0, 0.0), ST_Point(3.0, 4.0), 5), ST_DWithin(ST_Point(0.0, 0.0), ST_Point(3.0, 4.0), 4.9)",
        &["true|false"]).await;
}

#[tokio::test]
async fn metres_between_places() {
    let t = "(VALUES (10.0, 56.0, 10.0, 56.001), (NULL, 56.0, 10.0, 56.0), (10.0, 91.0, 10.0, 56.0)) t(a, b, c, d)";
    check(&format!("SELECT round(ST_DistanceSphere(a, b, c, d)) FROM {t}"), &["111.0", "NULL", "NULL"]).await;
    check(
        &format!("SELECT ST_DWithin(a, b, c, d, 112), ST_DWithin(a, b, c, d, 111) FROM {t}"),
        &["true|false", "NULL|NULL", "NULL|NULL"],
    )
    .await;
    check("SELECT round(ST_DistanceSphere(ST_Point(10.0, 56.0), ST_Point(10.0, 56.001)))", &["111.0"]).await;
    check("SELECT ST_DWithin(10, 56, 10, 57, 112000)", &["true"]).await;
    refused("SELECT ST_DWithin(1, 2, 3, 4)", "takes").await;
    refused("SELECT ST_DistanceSphere('a', 'b', 'c', 'd')", "no number").await;
}

#[tokio::test]
async fn h3_cells() {
    // From the documentation of H3.
    check("SELECT h3_to_string(h3_cell(37.3615593, -122.0553238, 5))", &["85283473fffffff"]).await;
    check("SELECT h3_from_string('85283473fffffff'), h3_resolution('85283473fffffff')", &["599686042433355775|5"])
        .await;
    check("SELECT h3_to_string(h3_parent('85283473fffffff', 4))", &["8428347ffffffff"]).await;
    check("SELECT round(h3_lat(599686042433355775), 3), round(h3_lon('85283473fffffff'), 3)", &["37.346|-121.976"])
        .await;
    check(
        "SELECT h3_distance('85283473fffffff', '85283447fffffff'), h3_distance('85283473fffffff', '85283473fffffff')",
        &["1|0"],
    )
    .await;
    check(
        "SELECT ST_Contains(ST_GeomFromText(h3_boundary(c)), ST_Point(h3_lon(c), h3_lat(c))) \
           FROM (VALUES (h3_cell(56.15, 10.2, 9))) t(c)",
        &["true"],
    )
    .await;
    check("SELECT h3_cell(NULL, 10.2, 9), h3_cell(91, 10.2, 9), h3_cell(56.15, 10.2, 16), h3_parent(1, 2), h3_lat('no cell')",
        &["NULL|NULL|NULL|NULL|NULL"]).await;
    // A child has no parent that is finer than itself.
    check("SELECT h3_parent('85283473fffffff', 6)", &["NULL"]).await;
}
