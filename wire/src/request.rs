//! The body of `POST /v1/edges/{edge}/batches`: frames one after another.
//!
//! ```text
//! frame: kind u8 (1 schema, 2 batch) | length u32 LE | payload
//!      | kind u8 = 3 (rest of a batch) | length varint | origin u32 LE | rest
//! schema payload: canonical text, whose hash is its id; comes before the first batch that uses it
//! batch payload: a sealed batch
//! rest: a sealed batch without its origin (see [`SealedBatch::split`]), whose CRC32C is given
//! ```
//! The first two kinds, with the same payloads, are the records of the cloud's WAL. Schemas and origins that the node has
//! taken before need not be sent again: a node that does not have them answers `schema_unknown` or `origin_unknown`, and gets
//! the request whole. Nothing stands on what is kept: the checksum of a batch covers its origin, so what does not belong together is
//! found out, and answered as an origin that is not known. The whole body may be one Zstandard frame, `Content-Encoding: zstd`, which says
//! how many bytes it unpacks to.

use std::collections::HashMap;

use bytes::{Buf, Bytes};

use crate::bytes::{Reader, put_varint};
use crate::ids::EdgeId;
use crate::{SealedBatch, zip};

/// Frame and record kind of a schema's canonical text.
pub const KIND_SCHEMA: u8 = 1;
/// Frame and record kind of a sealed batch.
pub const KIND_BATCH: u8 = 2;
/// Frame kind of a batch without its origin.
pub const KIND_REST: u8 = 3;
/// `Content-Encoding` of a packed body.
pub const ENCODING: &str = "zstd";
/// Below it, what a frame has around its content is more than what it saves.
const PACK_BYTES_MIN: usize = 300;
/// Origins that are kept; above it the oldest way is open: send them again.
const ORIGINS_MAX: usize = 10_000;

/// Why a body is not a row of frames.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("the request is cut short")]
    Short,
    #[error("frame kind {0} is not known")]
    Kind(u8),
}

/// Names an origin to an end that has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OriginId(pub u32);

impl OriginId {
    /// Of these bytes.
    pub fn of(origin: &[u8]) -> Self {
        Self(crc32c::crc32c(origin))
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    Schema(Bytes),
    Batch(Bytes),
    Rest(OriginId, Bytes),
}

/// Appends a frame to a body.
pub fn push_frame(body: &mut Vec<u8>, kind: u8, payload: &[u8]) {
    body.push(kind);
    body.extend((payload.len() as u32).to_le_bytes());
    body.extend_from_slice(payload);
}

/// Appends a batch whose origin the other end has.
pub fn push_rest(body: &mut Vec<u8>, origin: OriginId, rest: &[u8]) {
    body.push(KIND_REST);
    put_varint(body, rest.len() as u64 + 4);
    body.extend(origin.0.to_le_bytes());
    body.extend_from_slice(rest);
}

/// Splits a body into its frames, without copying.
///
/// # Errors
/// When the body is cut short or has an unknown frame; nothing of it is then used.
pub fn frames(mut body: Bytes) -> Result<Vec<Frame>, FrameError> {
    let mut frames = Vec::new();
    while !body.is_empty() {
        let mut reader = Reader(&body);
        let kind = reader.byte().map_err(|_| FrameError::Short)?;
        let len = match kind {
            KIND_SCHEMA | KIND_BATCH => reader.u32().map(|len| len as usize),
            KIND_REST => reader.len(),
            other => return Err(FrameError::Kind(other)),
        };
        let len = len.map_err(|_| FrameError::Short)?;
        let left = reader.0.len();
        if left < len {
            return Err(FrameError::Short);
        }
        body.advance(body.len() - left);
        let mut payload = body.split_to(len);
        frames.push(match kind {
            KIND_SCHEMA => Frame::Schema(payload),
            KIND_BATCH => Frame::Batch(payload),
            _ if len < 4 => return Err(FrameError::Short),
            _ => Frame::Rest(OriginId(payload.get_u32_le()), payload),
        });
    }
    Ok(frames)
}

/// A body as one Zstandard frame, when that is smaller by a tenth.
pub fn pack(body: &[u8]) -> Option<Bytes> {
    let mut packed = (body.len() >= PACK_BYTES_MIN).then(|| zip::pack(body).ok())??;
    // It was made for bytes that do not pack, and is held until it is answered.
    packed.shrink_to_fit();
    (packed.len() < body.len() - body.len() / 10).then(|| packed.into())
}

/// How many bytes a packed body says that it has; none when it does not say.
pub fn unpacked_len(packed: &[u8]) -> Option<u64> {
    zip::unpacked_len(packed)
}

/// The body that was packed; `len` is what [`unpacked_len`] gave, for which the caller has room. None when it is damaged.
pub fn unpack(packed: &[u8], len: usize) -> Option<Bytes> {
    Some(zip::unpack(packed, len).ok()?.into())
}

/// The origins of batches that a node has taken, by edge: one edge cannot stand on what another has sent.
#[derive(Debug, Default)]
pub struct Origins(HashMap<(EdgeId, OriginId), Bytes>);

impl Origins {
    /// Whether nothing can be learnt of a batch.
    pub fn knows(&self, batch: &SealedBatch) -> bool {
        batch.split().is_none_or(|(origin, _)| {
            let key = (batch.header().edge.clone(), OriginId::of(&origin));
            self.0.get(&key).is_some_and(|known| *known == origin)
        })
    }

    /// Keeps the origin of a batch.
    pub fn learn(&mut self, batch: &SealedBatch) {
        let Some((origin, _)) = batch.split() else { return };
        if self.0.len() >= ORIGINS_MAX {
            self.0.clear();
        }
        let key = (batch.header().edge.clone(), OriginId::of(&origin));
        // Of its own memory: a slice would keep the whole request.
        self.0.insert(key, Bytes::copy_from_slice(&origin));
    }

    /// The bytes of a batch of which the rest was sent; none when its origin is not known here.
    pub fn whole(&self, edge: &EdgeId, origin: OriginId, rest: &[u8]) -> Option<Bytes> {
        let origin = self.0.get(&(edge.clone(), origin))?;
        Some([origin, rest].concat().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_and_every_cut_is_noticed() {
        let mut body = Vec::new();
        push_frame(&mut body, KIND_SCHEMA, b"abc");
        push_frame(&mut body, KIND_BATCH, b"");
        push_rest(&mut body, OriginId(7), b"xy");
        let whole = frames(Bytes::from(body.clone())).unwrap();
        let expected = [
            Frame::Schema(Bytes::from_static(b"abc")),
            Frame::Batch(Bytes::new()),
            Frame::Rest(OriginId(7), Bytes::from_static(b"xy")),
        ];
        assert_eq!(whole, expected);
        for cut in (1..body.len()).filter(|cut| ![8, 13].contains(cut)) {
            assert_eq!(frames(Bytes::copy_from_slice(&body[..cut])), Err(FrameError::Short), "{cut}");
        }
        assert_eq!(frames(Bytes::from_static(&[9, 0, 0, 0, 0])), Err(FrameError::Kind(9)));
        assert_eq!(frames(Bytes::from_static(&[3, 3, 0, 0, 0])), Err(FrameError::Short));
        assert_eq!(frames(Bytes::from_static(&[3, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1])), Err(FrameError::Short));
    }

    #[test]
    fn a_body_is_packed_when_that_pays_and_unpacks_to_no_more_than_it_says() {
        let body = b"batch after batch ".repeat(100);
        let packed = pack(&body).unwrap();
        assert!(packed.len() < 100);
        assert_eq!(unpacked_len(&packed), Some(1_800));
        assert_eq!(unpack(&packed, 1_800).unwrap(), body);
        assert_eq!(unpack(&packed, 1_799), None);
        assert_eq!(unpack(&packed, 1_801), None);
        assert_eq!(unpack(&packed[..packed.len() - 1], 1_800), None);
        assert_eq!((pack(&body[..200]), unpacked_len(b"not a frame")), (None, None));
        let noise = (0..1_000_u32).flat_map(|n| crc32c::crc32c(&n.to_le_bytes()).to_le_bytes()).collect::<Vec<_>>();
        assert_eq!(pack(&noise), None);
    }
}
