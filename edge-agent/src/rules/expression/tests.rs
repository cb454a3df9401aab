use super::*;

fn columns() -> Columns {
    let columns = [
        ("i", FieldType::Int64),
        ("j", FieldType::Int64),
        ("x", FieldType::Float64),
        ("y", FieldType::Float64),
        ("b", FieldType::Bool),
        ("s", FieldType::Text),
        ("window_start", FieldType::Timestamp),
    ];
    Columns::new(columns.map(|(name, kind)| (name.to_owned(), kind)))
}

fn values() -> Vec<Option<Value>> {
    vec![
        Some(Value::Int(7)),
        None,
        Some(Value::Float(2.5)),
        Some(Value::Float(f64::NAN)),
        Some(Value::Bool(true)),
        Some(Value::Text("on".to_owned())),
        None,
    ]
}

#[test]
fn a_row_is_evaluated_as_sql_says() {
    let (values, previous) = (values(), [Some(Value::Int(5)), None, None, None, None, None, None]);
    let row = Row { device: "dev", values: &values, previous: &previous };
    let check = |text: &str, expected: Answer<Value>| {
        let expression = Expression::parse(text, &columns()).unwrap_or_else(|refusal| panic!("{text}: {refusal}"));
        // As texts: NaN is to be equal to itself here.
        assert_eq!(format!("{:?}", expression.value(&row)), format!("{expected:?}"), "{text}");
    };
    let (int, float) = (|value| Ok(Some(Value::Int(value))), |value| Ok(Some(Value::Float(value))));
    let (yes, no, null) = (Ok(Some(Value::Bool(true))), Ok(Some(Value::Bool(false))), Ok(None));
    check("i + 2 * 3", int(13));
    check("I / 2", int(3));
    check("-i % 4", int(-3));
    check("i / 2.0", float(3.5));
    check("9223372036854775807 + 1", int(i64::MIN));
    check("-9223372036854775808", int(i64::MIN));
    check("i / 0", Err(Failed::DivideByZero));
    check("(-9223372036854775808 + i - i) / -1", Err(Failed::Overflow));
    check("abs(-9223372036854775808 + i - 7)", Err(Failed::Overflow));
    check("j / 0", null.clone());
    check("x / 0", float(f64::INFINITY));
    check("abs(-x)", float(2.5));
    check("y > 1e300", yes.clone());
    check("y = y", yes.clone());
    check("0.0 = -0.0", yes.clone());
    check("j > 1", null.clone());
    check("j > 1 AND i < 0", no.clone());
    check("j > 1 OR i > 0", yes.clone());
    check("i > 0 OR i / 0 = 1", yes.clone());
    check("i < 0 AND i / 0 = 1", no.clone());
    check("i > 0 AND i / 0 = 1", Err(Failed::DivideByZero));
    check("NOT j > 1", null.clone());
    check("j IS NULL AND x IS NOT NULL", yes.clone());
    check("(j > 1) IS UNKNOWN", yes.clone());
    check("b IS NOT TRUE", no.clone());
    check("i BETWEEN 7 AND 7.5", yes.clone());
    check("i NOT BETWEEN 1 AND 6", yes.clone());
    check("j BETWEEN 1 AND 6", null.clone());
    check("i IN (1, 7)", yes.clone());
    check("i NOT IN (1, 2)", yes.clone());
    check("i IN (1, j)", null.clone());
    check("j IN (1)", null.clone());
    check("s IN ('on', 'off')", yes.clone());
    check("s < 'oo'", yes.clone());
    check("device = 'dev'", yes.clone());
    check("CASE WHEN j > 1 THEN 1 WHEN x > 2 THEN 2 ELSE 3 END", int(2));
    check("CASE i WHEN 7 THEN 'a' WHEN 1 / 0 THEN 'b' END", Ok(Some(Value::Text("a".to_owned()))));
    check("CASE j WHEN 1 / 0 THEN 1 ELSE 2.0 END", float(2.0));
    check("CASE WHEN b THEN NULL ELSE 1 END", null.clone());
    check("i - prev(i)", int(2));
    check("x - prev(x)", null.clone());
    check("i > x", yes);
    check("\"i\" = 8 OR s = 'it''s'", no);
}

#[test]
fn what_is_not_understood_is_refused_with_its_place() {
    let check = |text: &str, expected: &str| {
        let error = Expression::parse(text, &columns()).expect_err(text).to_string();
        assert!(error.contains(expected), "{text}: {error}");
    };
    check("i > 1 AND z < 2", "at its character 11: there is no column `z`; did you mean");
    check("i >\n  upper(s)", "in its line 2, at character 3: this function is not understood");
    check("i > 1 and s like 'a%'", "at its character 11: this is not understood; understood are columns");
    check("i = NULL", "at its character 5: NULL stands only in IS NULL");
    check("s > 1", "at its character 5: this is int64, and what it goes with is text");
    check("i + b > 1", "at its character 1: `+` goes between numbers, not int64 and bool");
    check("i AND b", "at its character 1: a condition belongs here, and this is int64");
    check("i > 1 j", "at its character 7: `j` does not belong");
    check("i >", "Expected");
    check("'open", "Unterminated string literal at Line: 1, Column: 1");
    check("window_start IS NULL", "a timestamp cannot be looked at");
    check("i IN (SELECT 1)", "at its character 1: this is not understood");
    check("prev(i + 1) > 1", "prev is of a column");
    check("prev(device) = 'x'", "no column `device`");
    check("abs(i, j) > 1", "abs has one argument");
    check("lag(i) OVER () > 1", "not understood");
    check("9223372036854775808 > i", "beyond int64");
    check("1e999 > x", "no number");
    check("-(-9223372036854775808) > i", "no negative");
    check("i > CAST(s AS INT)", "at its character 10: this is not understood");
    check("CASE WHEN b THEN NULL END", "has no type");
    check("`i` > 1", "at its character 1: a name stands as it is");
    check("i || j", "`||` is not understood");
    check("i IN (1, CASE WHEN b THEN 2 END)", "at its character 1: CASE does not stand within IN");
    check("i IN ()", "Expected: an expression");
    check("x'ff' = s", "not understood");
}

#[test]
fn depth_and_size_are_bounded() {
    let refused = |text: &str, expected: &str| {
        let error = Expression::parse(text, &columns()).expect_err("too much").to_string();
        assert!(error.contains(expected), "{error}");
    };
    refused(
        &format!("{}i > 1{}", "(".repeat(1_500), ")".repeat(1_500)),
        "at its character 13: parentheses and CASE nest",
    );
    refused(
        &format!("{}i > 1{}", "NOT (".repeat(13), ")".repeat(13)),
        "at its character 65: parentheses and CASE nest",
    );
    refused(&format!("{}i >{}", "NOT (".repeat(12), ")".repeat(12)), "Expected");
    refused(&format!("i{} > 1", "+i".repeat(1_500)), "deeper than");
    refused(&format!("{}b", "NOT ".repeat(1_000)), "does not belong");
    refused(&format!("i IN ({}1)", "1,".repeat(1_200)), "more than 1000 parts");
    refused(&format!("i{}", " ".repeat(5_000)), "more than the 4096");
    let nested = (0..6).fold("i".to_owned(), |inner, _| format!("(CASE {inner} WHEN 1 THEN 2 END)"));
    refused(&nested, "more than 1000 parts");
    // A long chain is one level.
    let chain = format!("b{}", " AND b".repeat(600));
    let (values, none) = (values(), []);
    let row = Row { device: "", values: &values, previous: &none };
    assert_eq!(Expression::parse(&chain, &columns()).unwrap().test(&row), Ok(Some(true)));
}
