//! What clients call or show that PostgreSQL has: its version, its settings, sizes in words.

use std::sync::Arc;

use arrow_array::StringArray;
use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_schema::DataType;
use datafusion::common::{ScalarValue, plan_err};
use datafusion::logical_expr::{ColumnarValue, ScalarUDF, Volatility, create_udf};

/// The version of PostgreSQL whose catalogue is shown.
const SERVER_VERSION: &str = "16.6";
const SERVER_VERSION_NUM: &str = "160006";

/// Every one of these functions.
pub(super) fn all() -> [ScalarUDF; 5] {
    // No type of these names, and no column with a sequence.
    let type_of = unknown("to_regtype", 1, DataType::Int32);
    let sequence_of = unknown("pg_get_serial_sequence", 2, DataType::Utf8);
    [version(), current_setting(), size_pretty(), type_of, sequence_of]
}

/// What drivers read the server's version from: SQLAlchemy takes no other name than PostgreSQL's.
fn version() -> ScalarUDF {
    let text = format!("PostgreSQL {SERVER_VERSION} (Weir {})", env!("CARGO_PKG_VERSION"));
    let answer = move |_: &[ColumnarValue]| Ok(ColumnarValue::Scalar(ScalarValue::Utf8(Some(text.clone()))));
    create_udf("version", Vec::new(), DataType::Utf8, Volatility::Immutable, Arc::new(answer))
}

/// `pg_size_pretty(bytes)`: in the largest unit that leaves 10 or more, as PostgreSQL rounds.
fn size_pretty() -> ScalarUDF {
    let answer = |arguments: &[ColumnarValue]| {
        let [bytes] = arguments else { return plan_err!("pg_size_pretty takes one number") };
        let array = bytes.to_array(1)?;
        let words: StringArray = array.as_primitive::<Int64Type>().iter().map(|bytes| bytes.map(size)).collect();
        Ok(match bytes {
            ColumnarValue::Array(_) => ColumnarValue::Array(Arc::new(words)),
            ColumnarValue::Scalar(_) => ColumnarValue::Scalar(ScalarValue::try_from_array(&words, 0)?),
        })
    };
    create_udf("pg_size_pretty", vec![DataType::Int64], DataType::Utf8, Volatility::Immutable, Arc::new(answer))
}

/// Bytes as PostgreSQL writes them.
fn size(bytes: i64) -> String {
    const UNITS: [&str; 6] = ["bytes", "kB", "MB", "GB", "TB", "PB"];
    let (mut amount, mut unit) = (bytes as f64, 0);
    while amount.abs() >= 10_240.0 && unit + 1 < UNITS.len() {
        amount /= 1_024.0;
        unit += 1;
    }
    format!("{} {}", amount.round(), UNITS[unit])
}

/// A function of texts that knows of nothing.
fn unknown(name: &str, texts: usize, kind: DataType) -> ScalarUDF {
    let null = ScalarValue::try_from(&kind).unwrap_or(ScalarValue::Null);
    let answer = move |_: &[ColumnarValue]| Ok(ColumnarValue::Scalar(null.clone()));
    create_udf(name, vec![DataType::Utf8; texts], kind, Volatility::Stable, Arc::new(answer))
}

/// The settings that drivers ask for, and that are the same for everybody.
pub(super) fn fixed(name: &str) -> Option<&'static str> {
    Some(match name {
        "server_version" => SERVER_VERSION,
        "server_version_num" => SERVER_VERSION_NUM,
        "server_encoding" | "client_encoding" => "UTF8",
        "search_path" => "public",
        "timezone" | "time_zone" => "UTC",
        "datestyle" => "ISO, MDY",
        "intervalstyle" => "postgres",
        "standard_conforming_strings" | "integer_datetimes" | "transaction_read_only" => "on",
        "default_transaction_read_only" => "on",
        "transaction_isolation" | "transaction_isolation_level" | "default_transaction_isolation" => "read committed",
        "lock_timeout" => "0",
        "max_identifier_length" => "63",
        "application_name" => "",
        _ => return None,
    })
}

/// `current_setting('name')`: as `SHOW` has it, and null where that has none.
fn current_setting() -> ScalarUDF {
    let answer = |arguments: &[ColumnarValue]| {
        let name = match arguments {
            [ColumnarValue::Scalar(name)] => name.try_as_str().flatten().map(str::to_lowercase),
            _ => None,
        };
        let value = name.and_then(|name| fixed(&name)).map(str::to_owned);
        Ok(ColumnarValue::Scalar(ScalarValue::Utf8(value)))
    };
    create_udf("current_setting", vec![DataType::Utf8], DataType::Utf8, Volatility::Stable, Arc::new(answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_as_postgresql_writes_them() {
        // `SELECT pg_size_pretty(n)` in PostgreSQL 15.
        let expected = [
            (0, "0 bytes"),
            (10_239, "10239 bytes"),
            (10_240, "10 kB"),
            (10_752, "11 kB"),
            (10_485_247, "10239 kB"),
            (10_485_760, "10 MB"),
            (1_099_511_627_776, "1024 GB"),
        ];
        for (bytes, words) in expected {
            assert_eq!(size(bytes), words, "{bytes}");
        }
    }
}
