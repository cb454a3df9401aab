//! The rows of `losses` for batches that a lane's policy drops: one row per stream.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Int64Type, TimestampMicrosecondType};
use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use wire::schema::own;
use wire::sealed::NO_WATERMARK;
use wire::{CutBatch, StreamSchema};

use super::{SpoolError, SpoolSettings, Waiting};

pub(super) fn schema() -> StreamSchema {
    own::losses()
}

/// Losses join those before them of the same hour, so that days without the cloud are not a row a second.
pub(super) const JOIN_US: i64 = 3_600_000_000;
/// Why rows went: the lane was full…
pub(super) const LANE_FULL: &str = "lane_full";
/// …or they waited for longer than its `max_age`.
pub(super) const TOO_OLD: &str = "too_old";
/// …or the disk does not give them back.
pub(super) const ROTTED: &str = "rotted";

/// In place of a stream's name, which has no braces: losses that could not be read any more.
const UNREADABLE: &str = "{unreadable}";

/// What is lost of one stream: rows, bytes, first and last event time.
struct Lost {
    rows: i64,
    bytes: i64,
    from_ts: i64,
    to_ts: i64,
}

pub(super) fn batch(
    victims: &[Waiting],
    carried: &[RecordBatch],
    unreadable: usize,
    settings: &SpoolSettings,
    (lane, reason): (&str, &str),
    now_us: i64,
) -> Result<CutBatch, SpoolError> {
    let mut lost: BTreeMap<(String, String), Lost> = BTreeMap::new();
    let none = || Lost { rows: 0, bytes: 0, from_ts: i64::MAX, to_ts: i64::MIN };
    // Losses that stood in what is dropped are lost rows already counted: they are summed into the new ones.
    for earlier in carried {
        let (streams, reasons) = (earlier.column(2).as_string::<i32>(), earlier.column(4).as_string::<i32>());
        let number = |column: usize, row: usize| earlier.column(column).as_primitive::<Int64Type>().value(row);
        let time =
            |column: usize, row: usize| earlier.column(column).as_primitive::<TimestampMicrosecondType>().value(row);
        for row in 0..earlier.num_rows() {
            let entry = lost.entry((streams.value(row).to_owned(), reasons.value(row).to_owned())).or_insert_with(none);
            entry.rows += number(5, row);
            entry.bytes += number(6, row);
            entry.from_ts = entry.from_ts.min(time(7, row));
            entry.to_ts = entry.to_ts.max(time(8, row));
        }
    }
    for victim in victims.iter().filter(|victim| victim.stream.as_str() != own::LOSSES) {
        let entry = lost.entry((victim.stream.to_string(), reason.to_owned())).or_insert_with(none);
        entry.rows += i64::from(victim.rows);
        entry.bytes += victim.bytes as i64;
        entry.from_ts = entry.from_ts.min(victim.min_ts);
        entry.to_ts = entry.to_ts.max(victim.max_ts);
    }
    if unreadable > 0 {
        let span = victims.iter().fold((i64::MAX, i64::MIN), |s, v| (s.0.min(v.min_ts), s.1.max(v.max_ts)));
        let key = (UNREADABLE.to_owned(), "losses_unreadable".to_owned());
        lost.entry(key).or_insert(Lost { rows: 0, bytes: 0, from_ts: span.0, to_ts: span.1 });
    }
    let count = lost.len();
    let text = |value: &str| Arc::new(StringArray::from(vec![value; count])) as ArrayRef;
    let number =
        |value: fn(&Lost) -> i64| Arc::new(lost.values().map(value).map(Some).collect::<Int64Array>()) as ArrayRef;
    let time = |values: Vec<i64>| Arc::new(TimestampMicrosecondArray::from(values).with_timezone("UTC")) as ArrayRef;
    let streams = lost.keys().map(|(stream, _)| Some(stream.as_str())).collect::<StringArray>();
    let reasons = lost.keys().map(|(_, reason)| Some(reason.as_str())).collect::<StringArray>();
    let schema = schema();
    let rows = RecordBatch::try_new(
        schema.arrow().clone(),
        vec![
            // A clock before 2000 must not make the loss itself unstorable.
            time(vec![now_us.max(wire::TS_MIN_US); count]),
            text(settings.edge.as_str()),
            Arc::new(streams),
            text(lane),
            Arc::new(reasons),
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
