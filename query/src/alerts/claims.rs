//! What edges claim: rows of the stream `alerts`, as candidates. Whatever an edge sends, its texts are as long as ours.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::TimestampMicrosecondType;
use arrow_array::{Array, RecordBatch};
use arrow_schema::{Schema, SchemaRef};
use wire::StreamName;
use wire::schema::{EDGE, own};

use super::episode::{Candidate, Severity};
use super::rows::LABELS_MAX;
use super::template::shorten;
use super::topic::label;

/// The stream of them.
pub(crate) fn stream() -> StreamName {
    own::ALERTS.parse().expect("own names are valid")
}

/// All columns that a candidate is made of.
pub(crate) fn columns(schema: &SchemaRef) -> SchemaRef {
    let own = own::alerts();
    let wanted = |name: &str| own.arrow().index_of(name).is_ok() || name == EDGE;
    let fields = schema.fields().iter().filter(|field| wanted(field.name())).cloned().collect::<Vec<_>>();
    Arc::new(Schema::new(fields))
}

/// What edges say in rows of `alerts`.
pub(crate) fn read(rows: &RecordBatch) -> Vec<Candidate> {
    let text = |name: &str, row: usize| {
        let column = rows.column_by_name(name)?.as_string_opt::<i32>()?;
        column.is_valid(row).then(|| label(column.value(row)).into_owned())
    };
    let long = |name: &str, row: usize| {
        let column = rows.column_by_name(name)?.as_string_opt::<i32>()?;
        column.is_valid(row).then(|| column.value(row))
    };
    let time = |name: &str, row: usize| {
        let column = rows.column_by_name(name)?.as_primitive_opt::<TimestampMicrosecondType>()?;
        column.is_valid(row).then(|| column.value(row))
    };
    let candidate = |row: usize| {
        let device = text("device", row);
        let sent: BTreeMap<String, serde_json::Value> = serde_json::from_str(long("labels", row)?).unwrap_or_default();
        let mut labels: BTreeMap<String, serde_json::Value> = sent.into_iter().take(LABELS_MAX).map(as_label).collect();
        if let Some(device) = &device {
            labels.insert("device".to_owned(), device.as_str().into());
        }
        let ts = time("ts", row)?;
        Some(Candidate {
            edge: text(EDGE, row)?,
            id: text("alert_id", row)?,
            rule: text("rule", row)?,
            hash: text("rule_hash", row).unwrap_or_default(),
            stream: text("stream", row).unwrap_or_default(),
            labels: serde_json::to_string(&labels).ok()?,
            device,
            severity: text("severity", row).and_then(|word| Severity::of(&word)).unwrap_or_default(),
            message: shorten(long("message", row).unwrap_or_default()),
            backfill: text("state", row).as_deref() == Some("backfill"),
            ts,
            from: time("from_ts", row).unwrap_or(ts),
            to: time("to_ts", row),
        })
    };
    (0..rows.num_rows()).filter_map(candidate).collect()
}

fn as_label((name, value): (String, serde_json::Value)) -> (String, serde_json::Value) {
    use serde_json::Value;
    let value = match value {
        Value::String(text) => Value::String(label(&text).into_owned()),
        nested @ (Value::Array(_) | Value::Object(_)) => Value::String(label(&nested.to_string()).into_owned()),
        plain => plain,
    };
    (label(&name).into_owned(), value)
}
