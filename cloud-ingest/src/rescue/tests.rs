use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{BinaryArray, BooleanArray};
use wire::schema::{RESCUED, StreamSchema};

use super::*;

mod again;

fn field(name: &str, kind: FieldType) -> StreamField {
    StreamField { name: name.parse().unwrap(), kind }
}

fn provenance() -> Provenance {
    let (edge, spool) = ("gw-1".parse().unwrap(), SpoolId([0xab; 16]));
    Provenance { edge, spool, seq: Seq(7), received_at_us: 1_700_000_000_000_000 }
}

/// A batch of three rows with these fields.
fn batch(fields: &[(&str, FieldType, ArrayRef)], quality: [Option<&str>; 3]) -> RecordBatch {
    let schema =
        StreamSchema::new(fields.iter().map(|(name, kind, _)| field(name, *kind)).collect()).unwrap().arrow().clone();
    let ts = TimestampMicrosecondArray::from(vec![1, 2, 3]).with_timezone("UTC");
    let mut columns: Vec<ArrayRef> = vec![Arc::new(ts), Arc::new(StringArray::from(vec!["a", "b", "c"]))];
    columns.extend(fields.iter().map(|(_, _, column)| column.clone()));
    columns.push(Arc::new(quality.into_iter().collect::<StringArray>()));
    RecordBatch::try_new(schema, columns).unwrap()
}

fn text(batch: &RecordBatch, column: &str) -> Vec<Option<String>> {
    batch.column_by_name(column).unwrap().as_string::<i32>().iter().map(|v| v.map(str::to_owned)).collect()
}

fn some(values: [&str; 3]) -> Vec<Option<String>> {
    values.iter().map(|value| Some((*value).to_owned())).collect()
}

const ALL_GOOD: [Option<&str>; 3] = [Some("good"); 3];

#[test]
fn a_batch_that_fits_shares_its_columns() {
    let floats: ArrayRef = Arc::new(Float64Array::from(vec![Some(1.0), None, Some(-0.0)]));
    let input = batch(&[("x", FieldType::Float64, floats.clone())], ALL_GOOD);
    let output = rescue(&input, &provenance(), &[field("x", FieldType::Float64)]);
    assert_eq!(output.schema(), row_schema(&[field("x", FieldType::Float64)]));
    for name in [TS, DEVICE, "x", QUALITY] {
        let (before, after) = (input.column_by_name(name).unwrap(), output.column_by_name(name).unwrap());
        assert!(Arc::ptr_eq(before, after), "{name}");
    }
    assert_eq!(text(&output, "_edge"), some(["gw-1"; 3]));
    assert_eq!(text(&output, "_spool"), some(["abababababababababababababababab"; 3]));
    assert_eq!(output.column_by_name("_seq").unwrap().as_primitive::<Int64Type>().values(), &[7, 7, 7]);
    assert_eq!(text(&output, RESCUED), vec![None; 3]);
}

#[test]
fn what_the_batch_lacks_is_null() {
    let input = batch(&[], ALL_GOOD);
    let fields = [field("x", FieldType::Float64), field("y", FieldType::Binary)];
    let output = rescue(&input, &provenance(), &fields);
    assert_eq!(output.column_by_name("x").unwrap().null_count(), 3);
    assert_eq!(output.column_by_name("y").unwrap().null_count(), 3);
    assert_eq!(text(&output, QUALITY), some(["good"; 3]));
}

#[test]
fn a_value_that_does_not_fit_is_kept_as_json() {
    let cases: Vec<(FieldType, FieldType, ArrayRef, [Option<&str>; 3])> = vec![
        (
            FieldType::Int64,
            FieldType::Bool,
            Arc::new(Int64Array::from(vec![Some(5), None, Some(i64::MAX)])),
            [Some("5"), None, Some("9223372036854775807")],
        ),
        (
            FieldType::Bool,
            FieldType::Float64,
            Arc::new(BooleanArray::from(vec![Some(true), None, Some(false)])),
            [Some("true"), None, Some("false")],
        ),
        (
            FieldType::Text,
            FieldType::Float64,
            Arc::new(StringArray::from(vec![Some("a\"b"), None, Some("")])),
            [Some("\"a\\\"b\""), None, Some("\"\"")],
        ),
        (
            FieldType::Binary,
            FieldType::Float64,
            Arc::new(BinaryArray::from(vec![Some(&[0u8, 255][..]), None, Some(&[])])),
            [Some("\"00ff\""), None, Some("\"\"")],
        ),
    ];
    for (kind, stored, column, expected) in cases {
        let input = batch(&[("x", kind, column)], [Some("good"), Some("late"), Some("late,max:x")]);
        let output = rescue(&input, &provenance(), &[field("x", stored)]);
        assert_eq!(output.column_by_name("x").unwrap().null_count(), 3, "{kind}");
        let objects = expected.map(|value| value.map(|value| format!("{{\"x\":{value}}}")));
        assert_eq!(text(&output, RESCUED), objects, "{kind}");
        assert_eq!(text(&output, QUALITY), some(["type:x", "late", "late,max:x,type:x"]), "{kind}");
    }
}

#[test]
fn a_float_that_is_not_finite_never_reaches_its_column() {
    let floats: ArrayRef = Arc::new(Float64Array::from(vec![Some(f64::NAN), Some(2.5), Some(f64::NEG_INFINITY)]));
    let more: ArrayRef = Arc::new(Float64Array::from(vec![Some(f64::INFINITY), None, Some(1.0)]));
    let input = batch(
        &[("x", FieldType::Float64, floats), ("y", FieldType::Float64, more)],
        [None, Some("good"), Some("late")],
    );
    let fields = [field("x", FieldType::Float64), field("y", FieldType::Float64)];
    let output = rescue(&input, &provenance(), &fields);
    let x = output.column_by_name("x").unwrap().as_primitive::<Float64Type>().clone();
    assert_eq!(x.iter().collect::<Vec<_>>(), [None, Some(2.5), None]);
    assert!(x.values().iter().all(|value| value.is_finite()));
    assert_eq!(output.column_by_name("y").unwrap().null_count(), 2);
    assert_eq!(text(&output, QUALITY), some(["nonfinite:x,nonfinite:y", "good", "late,nonfinite:x"]));
    let objects = [Some(r#"{"x":"NaN","y":"Infinity"}"#.to_owned()), None, Some(r#"{"x":"-Infinity"}"#.to_owned())];
    assert_eq!(text(&output, RESCUED), objects);
}

#[test]
fn a_nan_below_a_null_is_no_value() {
    let nulls = NullBuffer::from(vec![true, false, true]);
    let floats: ArrayRef = Arc::new(Float64Array::new(vec![1.0, f64::NAN, 2.0].into(), Some(nulls)));
    let output = rescue(
        &batch(&[("x", FieldType::Float64, floats)], ALL_GOOD),
        &provenance(),
        &[field("x", FieldType::Float64)],
    );
    assert_eq!(text(&output, QUALITY), some(["good"; 3]));
    assert_eq!(text(&output, RESCUED), vec![None; 3]);
}

#[test]
fn a_value_of_a_field_that_the_table_has_not_is_kept_and_good() {
    let values: ArrayRef = Arc::new(Float64Array::from(vec![Some(1.5), None, Some(f64::NAN)]));
    let output = rescue(&batch(&[("new", FieldType::Float64, values)], ALL_GOOD), &provenance(), &[]);
    assert_eq!(text(&output, QUALITY), some(["good", "good", "good"]));
    let objects = [Some(r#"{"new":1.5}"#.to_owned()), None, Some(r#"{"new":"NaN"}"#.to_owned())];
    assert_eq!(text(&output, RESCUED), objects);
}

#[test]
fn a_float_that_is_not_finite_says_so_in_a_column_of_another_type_too() {
    let values: ArrayRef = Arc::new(Float64Array::from(vec![1.5, f64::NAN, 2.5]));
    let output =
        rescue(&batch(&[("x", FieldType::Float64, values)], ALL_GOOD), &provenance(), &[field("x", FieldType::Int64)]);
    assert_eq!(text(&output, QUALITY), some(["type:x", "nonfinite:x", "type:x"]));
}

#[test]
fn no_rows_are_no_rows() {
    let input = batch(&[], ALL_GOOD).slice(0, 0);
    assert_eq!(rescue(&input, &provenance(), &[field("x", FieldType::Text)]).num_rows(), 0);
}
