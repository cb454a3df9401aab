use arrow_array::{
    ArrayRef, BinaryArray, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;

use super::*;
use crate::schema::{FieldType, StreamField};

const KINDS: [FieldType; 6] =
    [FieldType::Float64, FieldType::Int64, FieldType::Bool, FieldType::Text, FieldType::Timestamp, FieldType::Binary];

fn runs(few: usize) -> usize {
    std::env::var("WEIR_FUZZ_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(few)
}

fn rng() -> StdRng {
    let seed = std::env::var("WEIR_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| rand::rng().random());
    println!("WEIR_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

fn schema(kinds: &[FieldType]) -> StreamSchema {
    let field = |(n, kind): (usize, &FieldType)| StreamField { name: format!("f{n}").parse().unwrap(), kind: *kind };
    StreamSchema::new(kinds.iter().enumerate().map(field).collect()).unwrap()
}

fn batch(schema: &StreamSchema, ts: Vec<i64>, mut columns: Vec<ArrayRef>, texts: [ArrayRef; 2]) -> RecordBatch {
    let [device, quality] = texts;
    columns.splice(0..0, [Arc::new(TimestampMicrosecondArray::from(ts).with_timezone("UTC")) as ArrayRef, device]);
    columns.push(quality);
    RecordBatch::try_new(schema.arrow().clone(), columns).unwrap()
}

fn rows_of(column: ArrayRef, kind: FieldType) -> (StreamSchema, RecordBatch) {
    let n = column.len();
    let text = |text| Arc::new(StringArray::from(vec![text; n])) as ArrayRef;
    let schema = schema(&[kind]);
    let ts = (0..n as i64).map(|n| TS_MIN_US + n).collect();
    let rows = batch(&schema, ts, vec![column], [text("d"), text("good")]);
    (schema, rows)
}

fn frame(rows: &RecordBatch) -> Frame {
    let min_ts = check(rows).unwrap().0;
    Frame { format: BodyFormat::Columns, rows: rows.num_rows() as u32, min_ts }
}

/// Equal, and floats bit by bit: a NaN is not equal to itself, and zeros of both signs are.
#[track_caller]
fn expect_same(back: &RecordBatch, rows: &RecordBatch) {
    assert_eq!(back.schema(), rows.schema());
    for (back, column) in back.columns().iter().zip(rows.columns()) {
        let Some(floats) = column.as_primitive_opt::<arrow_array::types::Float64Type>() else {
            assert_eq!(back, column);
            continue;
        };
        let bits = |floats: &Float64Array| floats.iter().map(|float| float.map(f64::to_bits)).collect::<Vec<_>>();
        assert_eq!(bits(back.as_primitive()), bits(floats));
    }
}

#[track_caller]
fn comes_back(schema: &StreamSchema, rows: &RecordBatch) -> usize {
    let frame = frame(rows);
    let body = encode(rows, frame.min_ts).unwrap();
    let back = decode(&body, frame, schema).unwrap();
    expect_same(&back, rows);
    assert!(decoded_bytes(&body, frame.format) > 0);
    body.len()
}

#[test]
fn floats_come_back_bit_by_bit() {
    let strange = [
        0.0,
        -0.0,
        f64::NAN,
        -f64::NAN,
        f64::from_bits(0x7ff0_0000_0000_0001),
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::MIN_POSITIVE,
        f64::from_bits(1),
        f64::MAX,
        0.1 + 0.2,
        9_007_199_254_740_993.0,
        -9_007_199_254_740_992.0,
        1e300,
        0.000_000_001,
    ];
    for &one in &strange {
        for n in [1, 2, 300] {
            let floats = (0..n).map(|n| if n == 0 { one } else { 21.5 });
            let (schema, rows) = rows_of(Arc::new(Float64Array::from_iter_values(floats)), FieldType::Float64);
            comes_back(&schema, &rows);
        }
    }
    let (schema, rows) = rows_of(Arc::new(Float64Array::from(strange.to_vec())), FieldType::Float64);
    comes_back(&schema, &rows);
}

#[test]
fn every_type_comes_back_with_and_without_nulls() {
    let texts = [Some(""), None, Some("ä"), Some("good"), Some(""), None, None, Some("x7"), Some("x8")];
    let numbers = [Some(i64::MIN), None, Some(i64::MAX), Some(0), Some(-1), None, None, Some(7), Some(8)];
    for nulls in ["some", "none", "all"] {
        for repeat in [1, 50] {
            let keep = |n: usize| match nulls {
                "some" => Some(n),
                _ => None,
            };
            let text = |n: usize| match nulls {
                "all" => None,
                _ => keep(n).map_or(Some(texts[n].unwrap_or("no")), |n| texts[n]),
            };
            let number = |n: usize| match nulls {
                "all" => None,
                _ => keep(n).map_or(Some(numbers[n].unwrap_or(5)), |n| numbers[n]),
            };
            let all = (0..texts.len()).cycle().take(texts.len() * repeat);
            for kind in KINDS {
                let column: ArrayRef = match kind {
                    FieldType::Float64 => {
                        Arc::new(all.clone().map(|n| number(n).map(|n| n as f64 / 10.0)).collect::<Float64Array>())
                    }
                    FieldType::Int64 => Arc::new(all.clone().map(number).collect::<Int64Array>()),
                    FieldType::Bool => {
                        Arc::new(all.clone().map(|n| number(n).map(|n| n % 2 == 0)).collect::<BooleanArray>())
                    }
                    FieldType::Text => Arc::new(all.clone().map(text).collect::<StringArray>()),
                    FieldType::Timestamp => {
                        Arc::new(all.clone().map(number).collect::<TimestampMicrosecondArray>().with_timezone("UTC"))
                    }
                    FieldType::Binary => {
                        Arc::new(all.clone().map(|n| text(n).map(str::as_bytes)).collect::<BinaryArray>())
                    }
                };
                let (schema, rows) = rows_of(column, kind);
                comes_back(&schema, &rows);
                // As the pipeline cuts them.
                comes_back(&schema, &rows.slice(1, rows.num_rows() - 2));
            }
        }
    }
}

fn random_rows(rng: &mut StdRng) -> (StreamSchema, RecordBatch) {
    let kinds = (0..rng.random_range(0..6)).map(|_| KINDS[rng.random_range(0..KINDS.len())]).collect::<Vec<_>>();
    let schema = schema(&kinds);
    let n = match rng.random_range(0..10) {
        0 => 1,
        1 => rng.random_range(250..1_000),
        _ => rng.random_range(1..60),
    };
    let step = [1, 1_000, 1_000_000, 300_000_000][rng.random_range(0..4)];
    let ts = (0..n as i64).map(|n| TS_MIN_US + (n + rng.random_range(0..3)) * step).collect();
    let columns = kinds.iter().map(|kind| random_column(rng, *kind, n)).collect();
    let texts = [random_column(rng, FieldType::Text, n), random_column(rng, FieldType::Text, n)];
    let rows = batch(&schema, ts, columns, texts);
    (schema, rows)
}

fn random_column(rng: &mut StdRng, kind: FieldType, n: usize) -> ArrayRef {
    let nulls = [0.0, 0.0, 0.2, 1.0][rng.random_range(0..4)];
    let spread = [1, 2, 40, 1_000_000, i64::MAX][rng.random_range(0..5)];
    let places = 10_f64.powi(rng.random_range(0..11));
    let shape = rng.random_range(0..4);
    let mut next = || (!rng.random_bool(nulls)).then(|| rng.random_range(-(spread / 2)..=spread / 2));
    let mut numbers = Vec::new();
    for _ in 0..n {
        numbers.push(next());
    }
    let float = |n: i64| match shape {
        0 => f64::from_bits(n as u64),
        1 => (n as f64).sqrt(),
        _ => n as f64 / places,
    };
    let text = |n: i64| match shape {
        0 => String::new(),
        1 => format!("sensor-{:03}", n.rem_euclid(1_000)),
        2 => n.to_string(),
        _ => "ü".repeat(n.rem_euclid(7) as usize),
    };
    match kind {
        FieldType::Float64 => Arc::new(numbers.into_iter().map(|n| n.map(float)).collect::<Float64Array>()),
        FieldType::Int64 => Arc::new(numbers.into_iter().collect::<Int64Array>()),
        FieldType::Bool => Arc::new(numbers.into_iter().map(|n| n.map(|n| n > 0)).collect::<BooleanArray>()),
        FieldType::Text => Arc::new(numbers.into_iter().map(|n| n.map(text)).collect::<StringArray>()),
        FieldType::Timestamp => {
            Arc::new(numbers.into_iter().collect::<TimestampMicrosecondArray>().with_timezone("UTC"))
        }
        FieldType::Binary => {
            let bytes = numbers.into_iter().map(|n| n.map(|n| text(n).into_bytes())).collect::<Vec<_>>();
            Arc::new(bytes.iter().map(Option::as_deref).collect::<BinaryArray>())
        }
    }
}

#[test]
fn random_rows_come_back() {
    let mut rng = rng();
    for _ in 0..runs(2_000) / 5 {
        let (schema, rows) = random_rows(&mut rng);
        comes_back(&schema, &rows);
    }
}

/// An error or rows, never a panic, and never more memory than the body says.
#[test]
fn hostile_bodies_of_columns_are_refused_or_read() {
    let mut rng = rng();
    let mut read = 0;
    for run in 0..runs(5_000) {
        let (schema, rows) = random_rows(&mut rng);
        let mut frame = frame(&rows);
        let mut body = if rng.random_bool(0.5) {
            encode(&rows, frame.min_ts).unwrap().to_vec()
        } else {
            // What lies under the frame, or no mutation would get there.
            let layout = if rng.random_bool(0.5) { integers::Layout::Bits } else { integers::Layout::Bytes };
            columns::plain(&rows, frame.min_ts, layout)
        };
        match rng.random_range(0..8) {
            0 => body = (0..rng.random_range(0..200)).map(|_| rng.random()).collect(),
            1 => body.truncate(rng.random_range(0..=body.len())),
            2 => body.extend((0..rng.random_range(1..20)).map(|_| rng.random::<u8>())),
            3 => frame.rows = [0, 1, frame.rows + 1, 65_536, u32::MAX][rng.random_range(0..5)],
            4 => frame.min_ts = rng.random(),
            _ => {}
        }
        for _ in 0..rng.random_range(0..4) {
            if !body.is_empty() {
                let at = rng.random_range(0..body.len());
                body[at] = [rng.random(), 0, 0xff, body[at] ^ 1 << rng.random_range(0..8)][rng.random_range(0..4)];
            }
        }
        let body = Bytes::from(body);
        let said = decoded_bytes(&body, frame.format);
        if let Ok(back) = decode(&body, frame, &schema) {
            read += 1;
            assert_eq!(back.num_rows(), frame.rows as usize, "run {run}");
            let buffers = back.columns().iter().flat_map(|column| column.to_data().buffers().to_vec());
            let bytes = buffers.map(|buffer| buffer.len()).sum::<usize>();
            assert!(bytes <= said, "run {run}: {bytes} of {said}");
        }
    }
    assert!(read > 0, "some are harmless");
}

#[test]
fn a_body_that_claims_too_much_gets_no_memory() {
    let (schema, rows) =
        rows_of(Arc::new(Int64Array::from_iter_values((0..1_000).map(|n| n * n % 97))), FieldType::Int64);
    let frame = frame(&rows);
    let body = encode(&rows, frame.min_ts).unwrap();
    let mut reader = crate::bytes::Reader(&body);
    let (decoded, packed) = (reader.varint().unwrap(), reader.varint().unwrap());
    assert!(packed > 0, "a frame");
    let with = |decoded: u64, packed: u64| {
        let mut body = Vec::new();
        crate::bytes::put_varint(&mut body, decoded);
        crate::bytes::put_varint(&mut body, packed);
        body.extend_from_slice(reader.0);
        let body = Bytes::from(body);
        (decode(&body, frame, &schema), decoded_bytes(&body, frame.format))
    };
    expect_same(&with(decoded, packed).0.unwrap(), &rows);
    for (decoded, packed) in [(8 << 30, packed), (decoded, 8 << 30), (u64::MAX, u64::MAX)] {
        let (answer, bytes) = with(decoded, packed);
        assert!(matches!(answer, Err(BodyError::TooLarge(_))), "{answer:?}");
        assert_eq!(bytes, BATCH_DECODED_BYTES_MAX);
    }
    assert!(with(decoded / 3, packed).0.unwrap_err().to_string().contains("more than the body says"));
    assert!(with(decoded, packed - 1).0.is_err() && with(decoded, packed + 1).0.is_err());
    // A constant text and many rows: a few bytes that unpack to a thousand times as much.
    let (schema, rows) = rows_of(Arc::new(StringArray::from(vec!["x".repeat(900); 65_536])), FieldType::Text);
    assert!(matches!(encode(&rows, TS_MIN_US), Err(BodyError::TooLarge(_))), "more than a batch may have");
    let (_, rows) = rows_of(Arc::new(StringArray::from(vec!["x".repeat(9); 65_536])), FieldType::Text);
    assert!(comes_back(&schema, &rows) < 400);
}

#[test]
fn what_sensors_send_takes_few_bytes() {
    let numbers = |n: usize, of: fn(usize) -> f64| Arc::new(Float64Array::from_iter_values((0..n).map(of))) as ArrayRef;
    let device =
        |n: usize| Arc::new(StringArray::from_iter_values((0..n).map(|n| format!("gw-{:02}", n % 10)))) as ArrayRef;
    let good = |n: usize| Arc::new(StringArray::from(vec!["good"; n])) as ArrayRef;
    let bytes = |n: usize| {
        let schema = schema(&[FieldType::Float64]);
        let ts = (0..n as i64).map(|n| TS_MIN_US + n / 10 * 60_000_000).collect();
        let rows = batch(&schema, ts, vec![numbers(n, |n| 20.0 + (n * 7 % 13) as f64 / 10.0)], [device(n), good(n)]);
        comes_back(&schema, &rows)
    };
    assert!(bytes(10) < 40, "{}", bytes(10));
    assert!(bytes(1_000) < 300, "{}", bytes(1_000));
}
