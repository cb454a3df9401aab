//! Body format 1: `message_len u32 LE | IPC message | IPC data`, one Arrow record batch without its schema, each buffer
//! plain or a Zstandard frame of its own. Only read.

use std::collections::HashMap;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_ipc::reader::read_record_batch;
use arrow_ipc::{CompressionType, MessageHeader, MetadataVersion, root_as_message};
use bytes::Bytes;

use super::BodyError;
use crate::bytes::Reader;
use crate::schema::StreamSchema;
use crate::{BATCH_DECODED_BYTES_MAX, BATCH_ROWS_MAX};

fn broken(reason: &str) -> BodyError {
    BodyError::Arrow(reason.to_owned())
}

/// The message, and the data behind it.
fn parts(body: &Bytes) -> Result<(&[u8], Bytes), BodyError> {
    let mut reader = Reader(body);
    let len = reader.u32().map_err(|_| broken("no message"))? as usize;
    let message = reader.take(len).map_err(|_| broken("message cut short"))?;
    Ok((message, body.slice(4 + len..)))
}

pub(super) fn decode(body: &Bytes, schema: &StreamSchema) -> Result<RecordBatch, BodyError> {
    let (message, rest) = parts(body)?;
    let message = root_as_message(message).map_err(|error| BodyError::Arrow(error.to_string()))?;
    if message.header_type() != MessageHeader::RecordBatch {
        return Err(broken("not a record batch"));
    }
    let batch = message.header_as_record_batch().ok_or_else(|| broken("not a record batch"))?;
    // Any other codec may unpack to more than it says; and whether this build knows it must not decide (rule 6).
    if batch.compression().is_some_and(|compression| compression.codec() != CompressionType::ZSTD) {
        return Err(broken("compressed with another codec than Zstandard"));
    }
    let decoded = decoded_bytes(&batch, &rest)?;
    if decoded > BATCH_DECODED_BYTES_MAX as u64 {
        return Err(BodyError::TooLarge(decoded));
    }
    if batch.length() < 0 || batch.length() as usize > BATCH_ROWS_MAX {
        return Err(BodyError::TooManyRows(batch.length().max(0) as usize));
    }
    let columns = schema.arrow().fields().len();
    if batch.nodes().map_or(0, |nodes| nodes.len()) != columns {
        return Err(broken("the body has other columns than its schema"));
    }
    if batch
        .nodes()
        .into_iter()
        .flatten()
        .any(|node| node.length() != batch.length() || node.null_count() < 0 || node.null_count() > node.length())
    {
        return Err(broken("columns of different lengths"));
    }
    let arrow = Arc::clone(schema.arrow());
    // Arrow's decoder checks offsets, UTF-8 and lengths; a panic in it on hostile bytes becomes a refusal too.
    let decode =
        || read_record_batch(&Buffer::from(rest.clone()), batch, arrow, &HashMap::new(), None, &MetadataVersion::V5);
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(decode)) {
        Ok(Ok(rows)) => Ok(rows),
        Ok(Err(error)) => Err(BodyError::Arrow(error.to_string())),
        Err(_) => Err(broken("inconsistent buffers")),
    }
}

pub(super) fn decoded_bytes_of(body: &Bytes) -> Option<u64> {
    let (message, data) = parts(body).ok()?;
    let batch = root_as_message(message).ok()?.header_as_record_batch()?;
    decoded_bytes(&batch, &data).ok()
}

/// Sums what the buffers say they take once decompressed, before any memory is given to them.
fn decoded_bytes(batch: &arrow_ipc::RecordBatch<'_>, data: &[u8]) -> Result<u64, BodyError> {
    let broken = || broken("a buffer lies outside the body");
    let compressed = batch.compression().is_some();
    let mut total = 0_u64;
    for buffer in batch.buffers().into_iter().flatten() {
        let start = usize::try_from(buffer.offset()).map_err(|_| broken())?;
        let len = usize::try_from(buffer.length()).map_err(|_| broken())?;
        let bytes = start.checked_add(len).and_then(|end| data.get(start..end)).ok_or_else(broken)?;
        let decoded = match bytes.first_chunk::<8>() {
            Some(prefix) if compressed => match i64::from_le_bytes(*prefix) {
                -1 => len as u64,
                declared => u64::try_from(declared).map_err(|_| broken())?,
            },
            _ => len as u64,
        };
        total = total.saturating_add(decoded);
    }
    Ok(total)
}
