//! The body of `POST /v1/edges/{edge}/batches`: frames one after another.
//!
//! ```text
//! frame: kind u8 (1 schema, 2 batch) | length u32 LE | payload
//! schema payload: canonical text, whose hash is its id; comes before the first batch that uses it
//! batch payload: a sealed batch
//! ```
//! The same two kinds, with the same payloads, are the records of the cloud's WAL.

use bytes::{Buf, Bytes};

/// Frame and record kind of a schema's canonical text.
pub const KIND_SCHEMA: u8 = 1;
/// Frame and record kind of a sealed batch.
pub const KIND_BATCH: u8 = 2;

/// Why a body is not a row of frames.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("the request is cut short")]
    Short,
    #[error("frame kind {0} is not known")]
    Kind(u8),
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    Schema(Bytes),
    Batch(Bytes),
}

/// Appends a frame to a body.
pub fn push_frame(body: &mut Vec<u8>, kind: u8, payload: &[u8]) {
    body.push(kind);
    body.extend((payload.len() as u32).to_le_bytes());
    body.extend_from_slice(payload);
}

/// Splits a body into its frames, without copying.
///
/// # Errors
/// When the body is cut short or has an unknown frame; nothing of it is then used.
pub fn frames(mut body: Bytes) -> Result<Vec<Frame>, FrameError> {
    let mut frames = Vec::new();
    while !body.is_empty() {
        if body.len() < 5 {
            return Err(FrameError::Short);
        }
        let kind = body.get_u8();
        let len = body.get_u32_le() as usize;
        if body.len() < len {
            return Err(FrameError::Short);
        }
        let payload = body.split_to(len);
        frames.push(match kind {
            KIND_SCHEMA => Frame::Schema(payload),
            KIND_BATCH => Frame::Batch(payload),
            other => return Err(FrameError::Kind(other)),
        });
    }
    Ok(frames)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_and_every_cut_is_noticed() {
        let mut body = Vec::new();
        push_frame(&mut body, KIND_SCHEMA, b"abc");
        push_frame(&mut body, KIND_BATCH, b"");
        let whole = frames(Bytes::from(body.clone())).unwrap();
        assert_eq!(whole, [Frame::Schema(Bytes::from_static(b"abc")), Frame::Batch(Bytes::new())]);
        for cut in (1..body.len()).filter(|cut| *cut != 8) {
            assert_eq!(frames(Bytes::copy_from_slice(&body[..cut])), Err(FrameError::Short), "{cut}");
        }
        assert_eq!(frames(Bytes::from_static(&[9, 0, 0, 0, 0])), Err(FrameError::Kind(9)));
    }
}
