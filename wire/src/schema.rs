//! The schema of a stream as it travels, and the columns of its table.
//!
//! A schema is a list of fields in order. Its canonical text is one line per field, `name type`, the first being
//! `ts timestamp` and the second `device text`; the last is `quality text`. The schema id is the first 16 bytes of
//! the SHA-256 of that text, so equal ids mean equal schemas on every node. All columns but `ts` may be null.
//!
//! A table has the stream's columns, then provenance (`_edge`, `_spool`, `_seq`, `_received_at`), then `_rescued`,
//! and is partitioned by `_date`, the UTC date of `ts`.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use arrow_schema::{DataType, Field, Schema, SchemaRef, TimeUnit};
use sha2::{Digest, Sha256};

use crate::FIELDS_MAX;
use crate::ids::{FieldName, StreamName};

/// Event time, µs since 1970 UTC.
pub const TS: &str = "ts";
/// The device that measured.
pub const DEVICE: &str = "device";
/// `good`, or the reasons why a row is suspect, separated by commas.
pub const QUALITY: &str = "quality";
/// The partition column.
pub const DATE: &str = "_date";
/// Provenance: the edge that sent the row.
pub const EDGE: &str = "_edge";
/// Provenance: the spool that the row came from.
pub const SPOOL: &str = "_spool";
/// Provenance: the batch within (spool, stream).
pub const SEQ: &str = "_seq";
/// Provenance: when the node that answers wrote the batch to its WAL.
pub const RECEIVED_AT: &str = "_received_at";
/// JSON object of values that do not fit their column.
pub const RESCUED: &str = "_rescued";

/// The types a field may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FieldType {
    Float64,
    Int64,
    Bool,
    Text,
    /// µs since 1970, UTC. Used by Weir's own streams (window bounds).
    Timestamp,
    /// Bytes as they came. Used by `quarantine`.
    Binary,
}

impl FieldType {
    /// The Arrow type of a column of this type.
    pub fn arrow(self) -> DataType {
        match self {
            Self::Float64 => DataType::Float64,
            Self::Int64 => DataType::Int64,
            Self::Bool => DataType::Boolean,
            Self::Text => DataType::Utf8,
            Self::Timestamp => timestamp_type(),
            Self::Binary => DataType::Binary,
        }
    }

    /// The field type whose column has this Arrow type.
    pub fn from_arrow(data_type: &DataType) -> Option<Self> {
        match data_type {
            DataType::Float64 => Some(Self::Float64),
            DataType::Int64 => Some(Self::Int64),
            DataType::Boolean => Some(Self::Bool),
            DataType::Utf8 => Some(Self::Text),
            DataType::Timestamp(TimeUnit::Microsecond, Some(_)) => Some(Self::Timestamp),
            DataType::Binary => Some(Self::Binary),
            _ => None,
        }
    }
}

impl fmt::Display for FieldType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Float64 => "float64",
            Self::Int64 => "int64",
            Self::Bool => "bool",
            Self::Text => "text",
            Self::Timestamp => "timestamp",
            Self::Binary => "binary",
        })
    }
}

impl FromStr for FieldType {
    type Err = SchemaError;
    fn from_str(text: &str) -> Result<Self, SchemaError> {
        Ok(match text {
            "float64" => Self::Float64,
            "int64" => Self::Int64,
            "bool" => Self::Bool,
            "text" => Self::Text,
            "timestamp" => Self::Timestamp,
            "binary" => Self::Binary,
            other => return Err(SchemaError::Type(other.chars().take(80).collect())),
        })
    }
}

/// Timestamp in µs, UTC: the type of `ts`.
pub fn timestamp_type() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))
}

/// Identity of a schema: the first 16 bytes of the SHA-256 of its canonical text.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SchemaId(pub [u8; 16]);

impl fmt::Debug for SchemaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Why a schema is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchemaError {
    #[error("`{0}` is not a field type: float64, int64, bool, text")]
    Type(String),
    #[error("a schema begins with `ts timestamp` and `device text` and ends with `quality text`")]
    Common,
    #[error("field {0:?} is twice in the schema")]
    Twice(String),
    #[error("{0} fields are more than the {FIELDS_MAX} that a stream may have")]
    TooMany(usize),
    #[error("line `{0}` of the schema is not `name type`")]
    Line(String),
    #[error(transparent)]
    Name(#[from] crate::ids::NameError),
}

/// One user field of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamField {
    pub name: FieldName,
    pub kind: FieldType,
}

/// The columns of a stream: `ts`, `device`, the fields in order, `quality`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamSchema {
    fields: Vec<StreamField>,
    canonical: Arc<str>,
    id: SchemaId,
    arrow: SchemaRef,
}

impl StreamSchema {
    /// A schema of these fields.
    ///
    /// # Errors
    /// When a name comes twice or there are more than [`FIELDS_MAX`].
    pub fn new(fields: Vec<StreamField>) -> Result<Self, SchemaError> {
        if fields.len() > FIELDS_MAX {
            return Err(SchemaError::TooMany(fields.len()));
        }
        let mut seen = HashSet::new();
        if let Some(twice) = fields.iter().find(|field| !seen.insert(field.name.as_str())) {
            return Err(SchemaError::Twice(twice.name.to_string()));
        }
        let mut canonical = String::from("ts timestamp\ndevice text\n");
        let mut arrow = vec![Field::new(TS, timestamp_type(), false), Field::new(DEVICE, DataType::Utf8, true)];
        for field in &fields {
            canonical.push_str(&format!("{} {}\n", field.name, field.kind));
            arrow.push(Field::new(field.name.as_str(), field.kind.arrow(), true));
        }
        canonical.push_str("quality text\n");
        arrow.push(Field::new(QUALITY, DataType::Utf8, true));
        let mut id = [0; 16];
        id.copy_from_slice(&Sha256::digest(canonical.as_bytes())[..16]);
        Ok(Self { fields, canonical: canonical.into(), id: SchemaId(id), arrow: Arc::new(Schema::new(arrow)) })
    }

    /// Reads a canonical text back.
    ///
    /// # Errors
    /// When the text is not one that [`StreamSchema::canonical`] gives.
    pub fn parse(canonical: &str) -> Result<Self, SchemaError> {
        let lines: Vec<&str> = canonical.strip_suffix('\n').ok_or(SchemaError::Common)?.split('\n').collect();
        let [first, second, middle @ .., last] = lines.as_slice() else {
            return Err(SchemaError::Common);
        };
        if (*first, *second, *last) != ("ts timestamp", "device text", "quality text") {
            return Err(SchemaError::Common);
        }
        let fields = middle
            .iter()
            .map(|line| {
                let (name, kind) =
                    line.split_once(' ').ok_or_else(|| SchemaError::Line(line.chars().take(80).collect()))?;
                Ok(StreamField { name: name.parse()?, kind: kind.parse()? })
            })
            .collect::<Result<Vec<_>, SchemaError>>()?;
        Self::new(fields)
    }

    /// The user's fields, in order.
    pub fn fields(&self) -> &[StreamField] {
        &self.fields
    }

    /// The text that the id is a hash of and that travels.
    pub fn canonical(&self) -> &str {
        &self.canonical
    }

    /// Its id.
    pub fn id(&self) -> SchemaId {
        self.id
    }

    /// The Arrow schema of a batch: `ts`, `device`, fields, `quality`.
    pub fn arrow(&self) -> &SchemaRef {
        &self.arrow
    }
}

/// The Arrow schema of a table whose user fields are `fields`: the stream's columns, provenance, `_rescued`, `_date`.
pub fn table_schema(fields: &[StreamField]) -> Schema {
    let mut columns = vec![Field::new(TS, timestamp_type(), false), Field::new(DEVICE, DataType::Utf8, true)];
    columns.extend(fields.iter().map(|field| Field::new(field.name.as_str(), field.kind.arrow(), true)));
    columns.extend(provenance_fields());
    columns.push(Field::new(DATE, DataType::Date32, true));
    Schema::new(columns)
}

/// `quality`, provenance and `_rescued`: the columns after the user's fields, without the partition column.
pub fn provenance_fields() -> [Field; 6] {
    [
        Field::new(QUALITY, DataType::Utf8, true),
        Field::new(EDGE, DataType::Utf8, true),
        Field::new(SPOOL, DataType::Utf8, true),
        Field::new(SEQ, DataType::Int64, true),
        Field::new(RECEIVED_AT, timestamp_type(), true),
        Field::new(RESCUED, DataType::Utf8, true),
    ]
}

/// Weir's own streams, with the schema each always has.
pub mod own {
    use super::{FieldType, StreamField, StreamSchema};

    /// The stream of what could not be accepted, and why.
    pub const QUARANTINE: &str = "quarantine";
    /// The stream of what a policy dropped, and how much.
    pub const LOSSES: &str = "losses";
    /// The stream of what rules found.
    pub const ALERTS: &str = "alerts";
    /// The stream of what the cloud decided about alerts, in order.
    pub const ALERT_LOG: &str = "alert_log";
    /// The stream of what was delivered to whom, and what was not.
    pub const ALERT_DELIVERIES: &str = "alert_deliveries";
    /// The stream of who was told what views say, and what they never took.
    pub const VIEW_DELIVERIES: &str = "view_deliveries";
    /// The stream of which agent sealed which batches.
    pub const BATCH_ORIGINS: &str = "batch_origins";
    /// The stream of what links have done.
    pub const LINK_LOG: &str = "link_log";

    fn schema(fields: &[(&str, FieldType)]) -> StreamSchema {
        let fields = fields
            .iter()
            .map(|(name, kind)| StreamField { name: name.parse().expect("own names are valid"), kind: *kind })
            .collect();
        StreamSchema::new(fields).expect("own schemas are valid")
    }

    /// `quarantine`: `ts` is the arrival, `device` what could be read of it.
    pub fn quarantine() -> StreamSchema {
        schema(&[
            ("stream", FieldType::Text),
            ("source", FieldType::Text),
            ("topic", FieldType::Text),
            ("reason", FieldType::Text),
            ("detail", FieldType::Text),
            ("payload", FieldType::Binary),
            ("payload_bytes", FieldType::Int64),
        ])
    }

    /// `losses`: `ts` is the moment of the loss; `rows` of `stream` with event times in [from_ts, to_ts].
    pub fn losses() -> StreamSchema {
        schema(&[
            ("stream", FieldType::Text),
            ("lane", FieldType::Text),
            ("reason", FieldType::Text),
            ("rows", FieldType::Int64),
            ("bytes", FieldType::Int64),
            ("from_ts", FieldType::Timestamp),
            ("to_ts", FieldType::Timestamp),
        ])
    }

    /// `alerts`: an episode of a rule and a device fired or ended at `ts`; rows of one episode have one `alert_id`. `state`
    /// is `firing`, `resolved`, or `backfill` for what was found too late to act on; `to_ts` is null until it has ended.
    /// `labels` is a JSON object; `rule_hash` changes with what the rule means.
    pub fn alerts() -> StreamSchema {
        schema(&[
            ("rule", FieldType::Text),
            ("rule_hash", FieldType::Text),
            ("alert_id", FieldType::Text),
            ("state", FieldType::Text),
            ("severity", FieldType::Text),
            ("stream", FieldType::Text),
            ("labels", FieldType::Text),
            ("message", FieldType::Text),
            ("from_ts", FieldType::Timestamp),
            ("to_ts", FieldType::Timestamp),
        ])
    }

    /// `alert_log`: a change of an alert, or of a silence, at event time `ts`; `at` is when the cloud decided it, and `sequence`
    /// its place among all of them. `told` says whether it went to subscribers, `quiet` why not. `detail` is the alert behind
    /// the change as JSON, from which a restarted node goes on; `position` (of the last row of a batch) how far each stream had
    /// been read by then.
    pub fn alert_log() -> StreamSchema {
        schema(&[
            ("sequence", FieldType::Int64),
            ("transition", FieldType::Text),
            ("state", FieldType::Text),
            ("alert_id", FieldType::Text),
            ("rule", FieldType::Text),
            ("rule_hash", FieldType::Text),
            ("severity", FieldType::Text),
            ("stream", FieldType::Text),
            ("labels", FieldType::Text),
            ("message", FieldType::Text),
            ("topic", FieldType::Text),
            ("value", FieldType::Float64),
            ("told", FieldType::Bool),
            ("quiet", FieldType::Text),
            ("actor", FieldType::Text),
            ("note", FieldType::Text),
            ("at", FieldType::Timestamp),
            ("from_ts", FieldType::Timestamp),
            ("to_ts", FieldType::Timestamp),
            ("aliases", FieldType::Text),
            ("detail", FieldType::Text),
            ("position", FieldType::Text),
        ])
    }

    /// `view_deliveries`: how far `target` has what `view` says (`state` is `delivered`), or the append up to that `place` that it
    /// never took (`dead`). A place is as in the ids of `/v1/views/{view}/stream`.
    pub fn view_deliveries() -> StreamSchema {
        schema(&[
            ("target", FieldType::Text),
            ("view", FieldType::Text),
            ("state", FieldType::Text),
            ("place", FieldType::Text),
            ("reason", FieldType::Text),
        ])
    }

    /// `alert_deliveries`: how far `target` has everything (`state` is `delivered`), the change of that `sequence` that it
    /// never took (`dead`), or `count` changes up to it that were too old when it came back (`missed`).
    pub fn alert_deliveries() -> StreamSchema {
        schema(&[
            ("target", FieldType::Text),
            ("sequence", FieldType::Int64),
            ("state", FieldType::Text),
            ("count", FieldType::Int64),
            ("alert_id", FieldType::Text),
            ("reason", FieldType::Text),
            ("body", FieldType::Text),
        ])
    }

    /// `batch_origins`: batches of `spool` in `stream` from number `from_seq` on, until the next row of both, were sealed by
    /// this version of the agent of `edge` with this configuration; `ts` is when the first of them was taken.
    pub fn batch_origins() -> StreamSchema {
        schema(&[
            ("stream", FieldType::Text),
            ("spool", FieldType::Text),
            ("from_seq", FieldType::Int64),
            ("edge", FieldType::Text),
            ("agent", FieldType::Text),
            ("configuration", FieldType::Int64),
        ])
    }

    /// `link_log`: a hop of the link `link` at `at`, begun (`outcome` is `begun`) or ended: what the event of `from_topic` with the
    /// sequence `cause` in `alert_log` has brought about. Rows of one hop have one `hop_id`; `hops` counts how many links the
    /// alert has come through. `latency_ms` is from the decision to the end. `detail` is the hop as JSON, from which a restarted
    /// node goes on; `position` (of the last row of a batch) the sequence up to which all was looked at.
    pub fn link_log() -> StreamSchema {
        schema(&[
            ("link", FieldType::Text),
            ("outcome", FieldType::Text),
            ("hop_id", FieldType::Text),
            ("hops", FieldType::Int64),
            ("from_topic", FieldType::Text),
            ("cause", FieldType::Int64),
            ("alert_id", FieldType::Text),
            ("rule", FieldType::Text),
            ("to_kind", FieldType::Text),
            ("to_name", FieldType::Text),
            ("command", FieldType::Text),
            ("payload", FieldType::Text),
            ("answer", FieldType::Text),
            ("latency_ms", FieldType::Float64),
            ("at", FieldType::Timestamp),
            ("detail", FieldType::Text),
            ("position", FieldType::Int64),
        ])
    }
}

/// Whether a name is that of a stream that Weir fills itself.
pub fn is_own_stream(stream: &StreamName) -> bool {
    matches!(stream.as_str(), own::QUARANTINE | own::LOSSES | own::ALERTS | "host") || is_cloud_stream(stream)
}

/// Whether a name is that of a stream that the cloud alone fills: nobody else may write there.
pub fn is_cloud_stream(stream: &StreamName) -> bool {
    matches!(
        stream.as_str(),
        own::ALERT_LOG | own::ALERT_DELIVERIES | own::VIEW_DELIVERIES | own::BATCH_ORIGINS | own::LINK_LOG
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(name: &str, kind: FieldType) -> StreamField {
        StreamField { name: name.parse().unwrap(), kind }
    }

    #[test]
    fn a_schema_survives_its_canonical_text() {
        let schema = StreamSchema::new(vec![field("a", FieldType::Float64), field("b", FieldType::Binary)]).unwrap();
        let back = StreamSchema::parse(schema.canonical()).unwrap();
        assert_eq!(back, schema);
        assert_eq!(back.id(), schema.id());
        assert_eq!(schema.arrow().field(2).name(), "a");
    }

    #[test]
    fn the_id_of_a_schema_never_changes() {
        let schema = StreamSchema::new(vec![field("avg_speed", FieldType::Float64)]).unwrap();
        assert_eq!(schema.canonical(), "ts timestamp\ndevice text\navg_speed float64\nquality text\n");
        assert_eq!(format!("{:?}", schema.id()), "24b235a10a6b6c7c5e51b0ff3beb8550");
    }

    #[test]
    fn what_is_no_schema_is_refused() {
        for bad in [
            "",
            "ts timestamp\n",
            "ts timestamp\ndevice text\nx\nquality text\n",
            "ts timestamp\ndevice text\nx float32\nquality text\n",
            "ts timestamp\ndevice text\nx int64\nx int64\nquality text\n",
            "ts timestamp\ndevice text\n_seq int64\nquality text\n",
            "ts timestamp\ndevice text\nquality text",
        ] {
            assert!(StreamSchema::parse(bad).is_err(), "{bad:?}");
        }
    }
}
