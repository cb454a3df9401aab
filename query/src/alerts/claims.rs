//! What edges claim: rows of the stream `alerts`, as candidates.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::TimestampMicrosecondType;
use arrow_array::{Array, RecordBatch};
use arrow_schema::{Schema, SchemaRef};
use wire::StreamName;
use wire::schema::{EDGE, own};

use super::episode::{Candidate, Severity};

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
        column.is_valid(row).then(|| column.value(row).to_owned())
    };
    let time = |name: &str, row: usize| {
        let column = rows.column_by_name(name)?.as_primitive_opt::<TimestampMicrosecondType>()?;
        column.is_valid(row).then(|| column.value(row))
    };
    let candidate = |row: usize| {
        let device = text("device", row);
        let mut labels: BTreeMap<String, serde_json::Value> =
            serde_json::from_str(&text("labels", row)?).unwrap_or_default();
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
            message: text("message", row).unwrap_or_default(),
            backfill: text("state", row).as_deref() == Some("backfill"),
            ts,
            from: time("from_ts", row).unwrap_or(ts),
            to: time("to_ts", row),
        })
    };
    (0..rows.num_rows()).filter_map(candidate).collect()
}
