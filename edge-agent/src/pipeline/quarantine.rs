//! Bad input is data (rule 6): rows of `quarantine` for what does not decode, fails a check, or was refused by the
//! cloud, and rows of `losses` for what a full journal could not take.

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type, TimestampMicrosecondType};
use arrow_array::{Array, RecordBatch};
use bytes::Bytes;
use segment_log::Position;
use wire::schema::own;
use wire::{CutBatch, FieldType, Seq, StreamSchema, TS_MIN_US};

use super::output::Cell;
use super::{GOOD, Pipeline};
use crate::decode::Rejected;
use crate::entry::{HEAD_BYTES, Message, Payload};

/// `detail` is for people.
const DETAIL_BYTES_MAX: usize = 1_000;

/// And so much of it stands in the status.
const LAST_ERROR_BYTES_MAX: usize = 200;
/// What a row takes beside its payload, at most: topic, detail, names.
const ROW_OVERHEAD: usize = 128 << 10;

/// A whole message is rejected.
pub(super) fn whole(message: &Message, reason: &'static str, detail: String) -> Rejected {
    let payload = match &message.payload {
        Payload::Whole(payload) => payload.clone(),
        Payload::Oversized { head, .. } => head.clone(),
    };
    Rejected { reason, detail, device: None, payload }
}

/// A row of quarantine.
struct Row<'a> {
    ts: i64,
    device: Option<&'a str>,
    stream: Option<&'a str>,
    source: &'a str,
    topic: &'a str,
    reason: &'a str,
    detail: &'a str,
    payload: &'a [u8],
    payload_bytes: i64,
}

impl Pipeline {
    /// `first`: no row has all of the message yet. Later rejections that have no bytes of their own do not repeat it.
    pub(super) fn reject(
        &mut self,
        position: Position,
        message: &Message,
        rejected: &Rejected,
        stream: Option<usize>,
        first: bool,
    ) {
        let totals = self.counters.source(&message.source);
        totals.read += 1;
        totals.quarantined += 1;
        self.counters.reason(rejected.reason);
        let (is_whole, payload_bytes) = match &message.payload {
            Payload::Whole(whole) => (rejected.payload.len() == whole.len(), rejected.payload.len() as i64),
            Payload::Oversized { len, .. } => (false, i64::try_from(*len).unwrap_or(i64::MAX)),
        };
        let payload = if is_whole && !first { &[] } else { rejected.payload.as_ref() };
        let stream = stream.map(|index| {
            let detail = &rejected.detail[..rejected.detail.floor_char_boundary(LAST_ERROR_BYTES_MAX)];
            self.streams[index].last_error = Some(format!("{}: {detail}", rejected.reason));
            self.streams[index].name.clone()
        });
        self.quarantine(
            position,
            &Row {
                ts: self.now_us,
                device: rejected.device.as_deref(),
                stream: stream.as_ref().map(|name| name.as_str()),
                source: &message.source,
                topic: &message.topic,
                reason: rejected.reason,
                detail: &rejected.detail,
                payload,
                payload_bytes,
            },
        );
    }

    /// The last readings of a message whose rows take too much: one row with all of the message.
    pub(super) fn reject_rest(&mut self, position: Position, message: &Message, stream: usize, readings: u64) {
        let totals = self.counters.source(&message.source);
        totals.read += readings;
        totals.quarantined += readings;
        *self.counters.reasons.entry("too_large".to_owned()).or_default() += readings;
        let stream = self.streams[stream].name.clone();
        let Payload::Whole(payload) = &message.payload else { return };
        let detail =
            format!("its rows take more than {} bytes: the last {readings} readings are here", self.row_bytes_max);
        self.quarantine(
            position,
            &Row {
                ts: self.now_us,
                device: None,
                stream: Some(stream.as_str()),
                source: &message.source,
                topic: &message.topic,
                reason: "too_large",
                detail: &detail,
                payload,
                payload_bytes: payload.len() as i64,
            },
        );
    }

    /// The rows of a batch that the cloud refused for good. They were counted as readings before.
    pub(super) fn refused_rows(&mut self, position: Position, seq: Seq, reason: &str, schema: &str, batch: &CutBatch) {
        let rows = StreamSchema::parse(schema).ok().and_then(|schema| batch.decode(&schema).ok());
        let stream = batch.stream.clone();
        let row = |ts, device, payload: &[u8], pipeline: &mut Self| {
            pipeline.quarantine(
                position,
                &Row {
                    ts,
                    device,
                    stream: Some(stream.as_str()),
                    source: "cloud",
                    topic: &format!("batch {seq}"),
                    reason: "refused",
                    detail: reason,
                    payload,
                    payload_bytes: payload.len() as i64,
                },
            );
        };
        self.counters.reason("refused");
        match rows {
            Some(rows) if stream.as_str() != own::QUARANTINE => {
                let times = rows.column(0).as_primitive::<TimestampMicrosecondType>().clone();
                let devices = rows.column(1).as_string::<i32>().clone();
                for (index, payload) in as_json(&rows).into_iter().enumerate() {
                    row(times.value(index), Some(devices.value(index)), &payload, self);
                }
            }
            // Of quarantine itself only the fact: rows that were refused once would be refused for ever.
            _ => row(batch.max_ts, None, &Bytes::new(), self),
        }
    }

    /// Messages that never reached the journal.
    pub(super) fn missed(&mut self, position: Position, source: &str, messages: u64, bytes: u64, span: (i64, i64)) {
        self.counters.source(source).missed += messages;
        let stream = self.sources.get(source).map(|source| self.streams[source.stream].name.to_string());
        let edge = self.edge.clone();
        let output = &mut self.outputs[self.losses];
        self.counters.stream(&output.stream).rows += 1;
        if position < output.skip_before {
            return;
        }
        let before = output.bytes();
        let number = |value: u64| Cell::Int(i64::try_from(value).unwrap_or(i64::MAX));
        let cells = [
            Cell::Text(stream.as_deref().unwrap_or(source)),
            Cell::Text("journal"),
            Cell::Text("journal_full"),
            number(messages),
            number(bytes),
            Cell::Time(span.0.max(TS_MIN_US)),
            Cell::Time(span.1.max(TS_MIN_US)),
        ];
        output.push(span.1.max(TS_MIN_US), Some(&edge), cells.into_iter(), GOOD);
        self.pending_rows += 1;
        self.pending_bytes += output.bytes() - before;
    }

    fn quarantine(&mut self, position: Position, row: &Row<'_>) {
        let output = &mut self.outputs[self.quarantine];
        self.counters.stream(&output.stream).rows += 1;
        if position < output.skip_before {
            return;
        }
        let before = output.bytes();
        let detail = &row.detail[..row.detail.floor_char_boundary(DETAIL_BYTES_MAX)];
        // One that was journalled when the configuration allowed more.
        let too_large = row.payload.len() > self.row_bytes_max.saturating_sub(ROW_OVERHEAD);
        let whole = || format!("{detail}; of {} bytes, crc32c {:08x}", row.payload.len(), crc32c::crc32c(row.payload));
        let with_crc = too_large.then(whole);
        let detail = with_crc.as_deref().unwrap_or(detail);
        let payload = if too_large { &row.payload[..HEAD_BYTES.min(row.payload.len())] } else { row.payload };
        let cells = [
            row.stream.map_or(Cell::Null, Cell::Text),
            Cell::Text(row.source),
            Cell::Text(row.topic),
            Cell::Text(row.reason),
            Cell::Text(detail),
            Cell::Bytes(payload),
            Cell::Int(row.payload_bytes),
        ];
        // A clock before 2000 must not make the row itself unstorable.
        output.push(row.ts.max(TS_MIN_US), row.device, cells.into_iter(), GOOD);
        self.pending_rows += 1;
        self.pending_bytes += output.bytes() - before;
    }
}

/// Each row as a JSON object of its values that are not null.
pub(super) fn as_json(rows: &RecordBatch) -> Vec<Vec<u8>> {
    let schema = rows.schema();
    let object = |row: usize| {
        let fields = schema.fields().iter().zip(rows.columns());
        let values = fields.filter(|(_, column)| column.is_valid(row));
        let values = values.map(|(field, column)| (field.name().clone(), json(column.as_ref(), row)));
        serde_json::to_vec(&values.collect::<serde_json::Map<_, _>>()).expect("values of a row are JSON")
    };
    (0..rows.num_rows()).map(object).collect()
}

/// A value that is not null; times as RFC 3339, bytes as text as far as they are.
fn json(column: &dyn Array, row: usize) -> serde_json::Value {
    match FieldType::from_arrow(column.data_type()) {
        Some(FieldType::Float64) => column.as_primitive::<Float64Type>().value(row).into(),
        Some(FieldType::Int64) => column.as_primitive::<Int64Type>().value(row).into(),
        Some(FieldType::Bool) => column.as_boolean().value(row).into(),
        Some(FieldType::Text) => column.as_string::<i32>().value(row).into(),
        Some(FieldType::Timestamp) => {
            let us = column.as_primitive::<TimestampMicrosecondType>().value(row);
            chrono::DateTime::from_timestamp_micros(us).map(|time| time.to_rfc3339()).into()
        }
        Some(FieldType::Binary) => String::from_utf8_lossy(column.as_binary::<i32>().value(row)).into(),
        None => serde_json::Value::Null,
    }
}
