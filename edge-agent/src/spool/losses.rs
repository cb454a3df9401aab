//! The rows of `losses` for batches that a lane's policy drops: one row per stream.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use wire::schema::own;
use wire::sealed::NO_WATERMARK;
use wire::{CutBatch, StreamName, StreamSchema};

use super::{SpoolError, SpoolSettings, Waiting};

pub(super) fn schema() -> StreamSchema {
    own::losses()
}

/// What is lost of one stream: rows, bytes, first and last event time.
struct Lost {
    rows: i64,
    bytes: i64,
    from_ts: i64,
    to_ts: i64,
}

pub(super) fn batch(
    victims: &[Waiting],
    settings: &SpoolSettings,
    lane: &str,
    now_us: i64,
) -> Result<CutBatch, SpoolError> {
    let mut lost: BTreeMap<&StreamName, Lost> = BTreeMap::new();
    for victim in victims {
        let entry =
            lost.entry(&victim.stream).or_insert(Lost { rows: 0, bytes: 0, from_ts: i64::MAX, to_ts: i64::MIN });
        entry.rows += i64::from(victim.rows);
        entry.bytes += victim.bytes as i64;
        entry.from_ts = entry.from_ts.min(victim.min_ts);
        entry.to_ts = entry.to_ts.max(victim.max_ts);
    }
    let count = lost.len();
    let text = |value: &str| Arc::new(StringArray::from(vec![value; count])) as ArrayRef;
    let number =
        |value: fn(&Lost) -> i64| Arc::new(lost.values().map(value).map(Some).collect::<Int64Array>()) as ArrayRef;
    let time = |values: Vec<i64>| Arc::new(TimestampMicrosecondArray::from(values).with_timezone("UTC")) as ArrayRef;
    let streams = lost.keys().map(|stream| Some(stream.as_str())).collect::<StringArray>();
    let schema = schema();
    let rows = RecordBatch::try_new(
        schema.arrow().clone(),
        vec![
            // A clock before 2000 must not make the loss itself unstorable.
            time(vec![now_us.max(wire::TS_MIN_US); count]),
            text(settings.edge.as_str()),
            Arc::new(streams),
            text(lane),
            text("lane_full"),
            number(|lost| lost.rows),
            number(|lost| lost.bytes),
            time(lost.values().map(|lost| lost.from_ts).collect()),
            time(lost.values().map(|lost| lost.to_ts).collect()),
            text("good"),
        ],
    )
    .map_err(wire::sealed::CutError::from)?;
    let stream = own::LOSSES.parse().expect("an own name is valid");
    Ok(CutBatch::seal(stream, &schema, &rows, NO_WATERMARK, &settings.agent, settings.configuration)?)
}
