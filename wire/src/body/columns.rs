//! Body format 2: columns in the order of the schema, without names and types, which the schema id stands for.
//!
//! ```text
//! body: decoded varint (bytes that the columns take in memory) | packed varint
//!       | columns (packed = 0), or one Zstandard frame of columns, which are `packed` bytes
//! column: head u8 | bit map of rows, 1 where there is a value (head bit 6) | values that are not null
//! head: bits 0-5 of the type, below | bit 6 some are null | bit 7 all are null, and nothing follows
//! timestamp, int64: bits 0-3 and values as in `integers`; timestamps stand on the smallest event time of the batch
//! float64: bits 0-3 and values as in `integers`, bits 4-5 decimal places k: the value is that integer divided by 10^k;
//!          k = 3: k u8 follows the bit map; bits 0-1 = 3: the 8 bytes of each value, all lowest ones first
//! bool: one bit each, from the lowest on
//! text, binary: bits 0-1 and values as in `texts`
//! ```
//! What is null has no value of its own; everything else comes back bit by bit: a float is written as an integer only if
//! the division gives the same bits. A body of few rows is packed by bits and left as it is: many of them are compressed
//! together, by request. Limits: rows and decoded bytes of a batch; nothing is given memory beyond what `decoded` says.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type, TimestampMicrosecondType};
use arrow_array::{
    Array, ArrayRef, BinaryArray, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use arrow_buffer::{BooleanBuffer, Buffer, NullBuffer, OffsetBuffer, ScalarBuffer};

use super::integers::{self, Layout};
use super::texts::{self, Room};
use super::{BodyError, Frame};
use crate::bytes::{Reader, put_varint};
use crate::schema::{FieldType, StreamSchema};
use crate::{BATCH_DECODED_BYTES_MAX, BATCH_ROWS_MAX, zip};

const SOME_NULL: u8 = 1 << 6;
const ALL_NULL: u8 = 1 << 7;
const RAW_FLOATS: u8 = 3;
/// Decimal places in the head; the last means that they follow.
const PLACES_SHIFT: u8 = 4;
const PLACES_FOLLOW: u8 = 3;
const POWERS: [f64; 10] = [1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9];
/// Up to it floats hold every integer.
const EXACT_MAX: f64 = 9_007_199_254_740_992.0;
/// With so many rows Zstandard always finds more than bits do.
const PACKED_ROWS: usize = 256;
/// With so few bytes it never does.
const PACKED_BYTES: usize = 256;

pub(super) fn encode(rows: &RecordBatch, min_ts: i64) -> Result<Vec<u8>, BodyError> {
    let decoded = rows.columns().iter().map(memory).collect::<Result<Vec<_>, _>>()?.iter().sum();
    if decoded > BATCH_DECODED_BYTES_MAX as u64 {
        return Err(BodyError::TooLarge(decoded));
    }
    let plain = (rows.num_rows() < PACKED_ROWS).then(|| columns(rows, min_ts, Layout::Bits)).transpose()?;
    if let Some(plain) = plain.as_ref().filter(|plain| plain.len() < PACKED_BYTES) {
        return Ok(body(decoded, 0, plain));
    }
    let bytes = columns(rows, min_ts, Layout::Bytes)?;
    let frame = zip::pack(&bytes).map_err(|_| BodyError::Columns("Zstandard has no memory"))?;
    Ok(match plain {
        Some(plain) if plain.len() <= frame.len() => body(decoded, 0, &plain),
        _ => body(decoded, bytes.len(), &frame),
    })
}

fn body(decoded: u64, packed: usize, bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(bytes.len() + 12);
    put_varint(&mut body, decoded);
    put_varint(&mut body, packed as u64);
    body.extend_from_slice(bytes);
    body
}

/// A body without a frame, however many rows there are.
#[cfg(test)]
pub(super) fn plain(rows: &RecordBatch, min_ts: i64, layout: Layout) -> Vec<u8> {
    let decoded = rows.columns().iter().map(|column| memory(column).expect("a column of a stream")).sum();
    body(decoded, 0, &columns(rows, min_ts, layout).expect("columns of a stream"))
}

/// The most that decoding a column may need: its arrays, and its texts once more on their way.
fn memory(column: &ArrayRef) -> Result<u64, BodyError> {
    let rows = column.len();
    let texts = |offsets: &[i32]| {
        let bytes = (offsets[rows] - offsets[0]) as usize;
        4 * (rows + 1) + 2 * bytes
    };
    let values = match kind(column)? {
        FieldType::Float64 | FieldType::Int64 | FieldType::Timestamp => 8 * rows,
        FieldType::Bool => rows.div_ceil(8),
        FieldType::Text => texts(column.as_string::<i32>().value_offsets()),
        FieldType::Binary => texts(column.as_binary::<i32>().value_offsets()),
    };
    Ok((values + rows.div_ceil(8)) as u64)
}

fn kind(column: &ArrayRef) -> Result<FieldType, BodyError> {
    FieldType::from_arrow(column.data_type()).ok_or(BodyError::Columns("a type that no stream has"))
}

fn columns(rows: &RecordBatch, min_ts: i64, layout: Layout) -> Result<Vec<u8>, BodyError> {
    let mut out = Vec::with_capacity(16 * rows.num_rows());
    for column in rows.columns() {
        put_column(column, min_ts, layout, &mut out)?;
    }
    Ok(out)
}

fn put_column(column: &ArrayRef, min_ts: i64, layout: Layout, out: &mut Vec<u8>) -> Result<(), BodyError> {
    let kind = kind(column)?;
    let at = out.len();
    out.push(0);
    let mut head = 0;
    if column.null_count() == column.len() {
        out[at] = ALL_NULL;
        return Ok(());
    }
    if let Some(nulls) = column.nulls().filter(|nulls| nulls.null_count() > 0) {
        head = SOME_NULL;
        put_bools(nulls.iter(), out);
    }
    head |= match kind {
        FieldType::Timestamp => {
            let times = column.as_primitive::<TimestampMicrosecondType>();
            integers::put_headless(&present(times, times.values()), min_ts, layout, out)
        }
        FieldType::Int64 => {
            let numbers = column.as_primitive::<Int64Type>();
            integers::put_headless(&present(numbers, numbers.values()), 0, layout, out)
        }
        FieldType::Float64 => {
            let floats = column.as_primitive::<Float64Type>();
            put_floats(&present(floats, floats.values()), layout, out)
        }
        FieldType::Bool => {
            put_bools(column.as_boolean().iter().flatten(), out);
            0
        }
        FieldType::Text => {
            let texts = column.as_string::<i32>().iter().flatten().map(str::as_bytes).collect::<Vec<_>>();
            texts::put(&texts, layout, out)
        }
        FieldType::Binary => texts::put(&column.as_binary::<i32>().iter().flatten().collect::<Vec<_>>(), layout, out),
    };
    out[at] = head;
    Ok(())
}

/// The values that are not null.
fn present<T: Copy>(column: &dyn Array, values: &[T]) -> Vec<T> {
    match column.nulls() {
        Some(nulls) => nulls.valid_indices().map(|index| values[index]).collect(),
        None => values.to_vec(),
    }
}

fn put_bools(bools: impl Iterator<Item = bool>, out: &mut Vec<u8>) {
    let begin = out.len();
    for (at, bit) in bools.enumerate() {
        if at % 8 == 0 {
            out.push(0);
        }
        out[begin + at / 8] |= u8::from(bit) << (at % 8);
    }
}

fn put_floats(floats: &[f64], layout: Layout, out: &mut Vec<u8>) -> u8 {
    let Some((places, integers)) = decimal(floats) else {
        let bits = floats.iter().map(|float| float.to_bits()).collect::<Vec<_>>();
        integers::put_planes(&bits, 8, out);
        return RAW_FLOATS;
    };
    let places = places as u8;
    if places >= PLACES_FOLLOW {
        out.push(places);
    }
    places.min(PLACES_FOLLOW) << PLACES_SHIFT | integers::put_headless(&integers, 0, layout, out)
}

/// The fewest decimal places with which all floats are integers, and those; none when some are not, bit by bit.
fn decimal(floats: &[f64]) -> Option<(usize, Vec<i64>)> {
    let integers = |power: &f64| {
        let integer = |float: &f64| {
            let integer = (float * power).round();
            let exact = integer.abs() <= EXACT_MAX && (integer as i64 as f64 / power).to_bits() == float.to_bits();
            exact.then_some(integer as i64)
        };
        floats.iter().map(integer).collect::<Option<Vec<_>>>()
    };
    POWERS.iter().enumerate().find_map(|(places, power)| Some((places, integers(power)?)))
}

/// What the body says of its size, and the rest of it.
fn sizes(body: &[u8]) -> Result<(u64, usize, &[u8]), BodyError> {
    let mut reader = Reader(body);
    Ok((reader.varint()?, reader.len()?, reader.0))
}

/// What decoding takes at most, the unpacked columns included.
pub(super) fn decoded_bytes(body: &[u8]) -> Option<u64> {
    let (decoded, packed, _) = sizes(body).ok()?;
    Some(decoded.saturating_add(packed as u64))
}

pub(super) fn decode(body: &[u8], frame: Frame, schema: &StreamSchema) -> Result<RecordBatch, BodyError> {
    let (decoded, packed, bytes) = sizes(body)?;
    let most = decoded.max(packed as u64);
    if most > BATCH_DECODED_BYTES_MAX as u64 {
        return Err(BodyError::TooLarge(most));
    }
    let rows = frame.rows as usize;
    if rows > BATCH_ROWS_MAX {
        return Err(BodyError::TooManyRows(rows));
    }
    let unpacked;
    let mut reader = Reader(bytes);
    if packed > 0 {
        unpacked = zip::unpack(bytes, packed).map_err(|_| BodyError::Columns("the frame does not unpack"))?;
        reader = Reader(&unpacked);
    }
    let mut room = Room(decoded);
    let mut columns = Vec::with_capacity(schema.arrow().fields().len());
    for field in schema.arrow().fields() {
        let kind = FieldType::from_arrow(field.data_type()).ok_or(BodyError::Columns("a type that no stream has"))?;
        columns.push(take_column(&mut reader, kind, rows, frame.min_ts, &mut room)?);
    }
    if !reader.0.is_empty() {
        return Err(BodyError::Columns("bytes follow the columns"));
    }
    // A column that may have no nulls is the only thing left that can be wrong.
    RecordBatch::try_new(Arc::clone(schema.arrow()), columns).map_err(|_| BodyError::EventTime)
}

fn take_column(
    reader: &mut Reader<'_>,
    kind: FieldType,
    rows: usize,
    min_ts: i64,
    room: &mut Room,
) -> Result<ArrayRef, BodyError> {
    let head = reader.byte()?;
    room.take(rows.div_ceil(8))?;
    let nulls = match head {
        _ if head & ALL_NULL != 0 => Some(NullBuffer::new_null(rows)),
        _ if head & SOME_NULL != 0 => Some(NullBuffer::new(take_bools(reader, rows)?)),
        _ => None,
    };
    let count = rows - nulls.as_ref().map_or(0, NullBuffer::null_count);
    let head = head & !(ALL_NULL | SOME_NULL);
    let fixed = |room: &mut Room| room.take(8 * rows);
    Ok(match kind {
        FieldType::Timestamp => {
            fixed(room)?;
            let values = integers_of(reader, head, count, min_ts)?;
            let times = TimestampMicrosecondArray::new(spread(values, nulls.as_ref()), nulls);
            Arc::new(times.with_timezone("UTC"))
        }
        FieldType::Int64 => {
            fixed(room)?;
            let values = integers_of(reader, head, count, 0)?;
            Arc::new(Int64Array::new(spread(values, nulls.as_ref()), nulls))
        }
        FieldType::Float64 => {
            fixed(room)?;
            let values = take_floats(reader, head, count)?;
            Arc::new(Float64Array::new(spread(values, nulls.as_ref()), nulls))
        }
        FieldType::Bool => {
            room.take(rows.div_ceil(8))?;
            let bools = take_bools(reader, count)?;
            match nulls {
                None => Arc::new(BooleanArray::new(bools, None)),
                Some(nulls) => {
                    let mut bools = bools.iter();
                    let bools = nulls.iter().map(|valid| valid && bools.next().unwrap_or(false));
                    Arc::new(BooleanArray::new(bools.collect(), Some(nulls)))
                }
            }
        }
        FieldType::Text => {
            let (offsets, bytes) = take_texts(reader, head, count, rows, nulls.as_ref(), room)?;
            let texts = StringArray::try_new(offsets, bytes, nulls);
            Arc::new(texts.map_err(|_| BodyError::Columns("a text is not UTF-8"))?)
        }
        FieldType::Binary => {
            let (offsets, bytes) = take_texts(reader, head, count, rows, nulls.as_ref(), room)?;
            Arc::new(BinaryArray::new(offsets, bytes, nulls))
        }
    })
}

/// None are left when all are null: then nothing was written.
fn integers_of(reader: &mut Reader<'_>, head: u8, count: usize, origin: i64) -> Result<Vec<i64>, BodyError> {
    if count == 0 { Ok(Vec::new()) } else { integers::take_headless(reader, head, count, origin) }
}

fn take_floats(reader: &mut Reader<'_>, head: u8, count: usize) -> Result<Vec<f64>, BodyError> {
    if count == 0 {
        return Ok(Vec::new());
    }
    if head & RAW_FLOATS == RAW_FLOATS {
        return Ok(integers::take_planes(reader, count, 8)?.into_iter().map(f64::from_bits).collect());
    }
    let places = match head >> PLACES_SHIFT {
        PLACES_FOLLOW => reader.byte()?,
        places => places,
    };
    let power = POWERS.get(usize::from(places)).ok_or(BodyError::Columns("too many decimal places"))?;
    let integers = integers::take_headless(reader, head, count, 0)?;
    Ok(integers.into_iter().map(|integer| integer as f64 / power).collect())
}

fn take_bools(reader: &mut Reader<'_>, count: usize) -> Result<BooleanBuffer, BodyError> {
    let bytes = reader.take(count.div_ceil(8))?;
    Ok(BooleanBuffer::new(Buffer::from(bytes), 0, count))
}

/// Values at the rows that are not null.
fn spread<T: arrow_buffer::ArrowNativeType>(values: Vec<T>, nulls: Option<&NullBuffer>) -> ScalarBuffer<T> {
    let Some(nulls) = nulls else { return values.into() };
    let mut all = vec![T::default(); nulls.len()];
    nulls.valid_indices().zip(values).for_each(|(index, value)| all[index] = value);
    all.into()
}

fn take_texts(
    reader: &mut Reader<'_>,
    head: u8,
    count: usize,
    rows: usize,
    nulls: Option<&NullBuffer>,
    room: &mut Room,
) -> Result<(OffsetBuffer<i32>, Buffer), BodyError> {
    room.take(4 * (rows + 1))?;
    let mut offsets = Vec::with_capacity(rows + 1);
    let mut bytes = Vec::new();
    let mut valid = nulls.map(NullBuffer::valid_indices);
    if count > 0 {
        texts::take(reader, head, count, room, |text| {
            // Nulls in front of it are empty. A row that is not null is at hand: there are `count` of them.
            let row = valid.as_mut().map_or(offsets.len(), |valid| valid.next().unwrap_or(offsets.len()));
            offsets.resize(row + 1, bytes.len() as i32);
            bytes.extend_from_slice(text);
        })?;
    }
    offsets.resize(rows + 1, bytes.len() as i32);
    Ok((OffsetBuffer::new(offsets.into()), bytes.into()))
}
