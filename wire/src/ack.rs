//! What the cloud answers to an edge, as JSON.
//!
//! An ack says what is true (rule 2): `durable` is in this node's WAL, fsynced; `committed` is in the Delta table.
//! Each carries the CRC of the batch it names, so an edge can tell its own history from a copy's. An edge frees up
//! to `committed`, and only when the CRC is its own.

use serde::{Deserialize, Serialize};

use crate::ids::{Seq, SpoolId, StreamName};

/// A place in a sequence: the last number, and the CRC of that batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Mark {
    pub seq: Seq,
    pub crc: u32,
}

/// How far one (spool, stream) is on the node that answers. Invariant: `committed <= durable`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamAck {
    pub spool: SpoolId,
    pub stream: StreamName,
    pub durable: Mark,
    pub committed: Mark,
}

/// A batch that no node will ever take. The edge makes it void and keeps its rows in `quarantine`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub spool: SpoolId,
    pub stream: StreamName,
    pub seq: Seq,
    pub reason: String,
}

/// 200: the acks of every sequence that the request touched, and what of it was refused or pushed back.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Acks {
    /// Identity of the node: `durable` counts for it alone.
    pub node: String,
    pub acks: Vec<StreamAck>,
    #[serde(default)]
    pub refused: Vec<Refusal>,
}

/// Answer of `GET /v1/edges/{edge}/positions`.
pub type PositionsAnswer = Acks;

/// What a request that was not taken is answered with; the status is in the comment of each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "error", rename_all = "snake_case")]
pub enum RefusedRequest {
    /// 400
    #[error("the request is damaged: {detail}")]
    Damaged { detail: String },
    /// 401
    #[error("no valid token for edge `{edge}`")]
    Unauthorized { edge: String },
    /// 409
    #[error("{stream}: batch {got} was sent, {expected} is the next of spool {spool}")]
    Gap { spool: SpoolId, stream: StreamName, expected: Seq, got: Seq },
    /// 409
    #[error("{stream}: spool {spool} was forked at batch {at}")]
    Forked { spool: SpoolId, stream: StreamName, at: Seq },
    /// 412
    #[error("a schema is not known: {schema}")]
    SchemaUnknown { schema: String },
    /// 412
    #[error("an origin is not known: {origin:08x}")]
    OriginUnknown { origin: u32 },
    /// 413
    #[error("the request has more than {bytes_max} bytes")]
    TooLarge { bytes_max: usize },
    /// 415
    #[error("a request is sent as it is or as zstd, not as `{encoding}`")]
    EncodingUnknown { encoding: String },
    /// 429
    #[error("{stream}: no room for now")]
    PushedBack { stream: StreamName, retry_after_ms: u64 },
    /// 503
    #[error("not ready: {detail}")]
    NotReady { detail: String },
}

/// The body of every answer but 200: why, and how far the sequences are that the request touched all the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedAnswer {
    #[serde(flatten)]
    pub refused: RefusedRequest,
    /// Batches in front of the one that was not taken may have been.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acks: Option<Box<Acks>>,
}

impl From<RefusedRequest> for RefusedAnswer {
    fn from(refused: RefusedRequest) -> Self {
        Self { refused, acks: None }
    }
}

impl RefusedRequest {
    /// The value of `error` in the answer.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Damaged { .. } => "damaged",
            Self::Unauthorized { .. } => "unauthorized",
            Self::Gap { .. } => "gap",
            Self::Forked { .. } => "forked",
            Self::SchemaUnknown { .. } => "schema_unknown",
            Self::OriginUnknown { .. } => "origin_unknown",
            Self::TooLarge { .. } => "too_large",
            Self::EncodingUnknown { .. } => "encoding_unknown",
            Self::PushedBack { .. } => "pushed_back",
            Self::NotReady { .. } => "not_ready",
        }
    }

    /// The HTTP status of this answer.
    pub fn status(&self) -> u16 {
        match self {
            Self::Damaged { .. } => 400,
            Self::Unauthorized { .. } => 401,
            Self::Gap { .. } | Self::Forked { .. } => 409,
            Self::SchemaUnknown { .. } | Self::OriginUnknown { .. } => 412,
            Self::TooLarge { .. } => 413,
            Self::EncodingUnknown { .. } => 415,
            Self::PushedBack { .. } => 429,
            Self::NotReady { .. } => 503,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_survive_json() {
        let acks = Acks {
            node: "a".into(),
            acks: vec![StreamAck {
                spool: SpoolId([7; 16]),
                stream: "traffic".parse().unwrap(),
                durable: Mark { seq: Seq(5), crc: 9 },
                committed: Mark::default(),
            }],
            refused: vec![],
        };
        let text = serde_json::to_string(&acks).unwrap();
        assert_eq!(serde_json::from_str::<Acks>(&text).unwrap(), acks);
        let gap = RefusedRequest::Gap {
            spool: SpoolId([7; 16]),
            stream: "traffic".parse().unwrap(),
            expected: Seq(3),
            got: Seq(5),
        };
        let text = serde_json::to_string(&gap).unwrap();
        assert_eq!(serde_json::from_str::<RefusedRequest>(&text).unwrap(), gap);
        assert_eq!(gap.status(), 409);
        assert!(text.contains(&format!("\"error\":\"{}\"", gap.kind())));
        // Of an older node, and with acks, which an older edge passes over.
        let alone = serde_json::from_str::<RefusedAnswer>(&text).unwrap();
        assert_eq!(alone, gap.clone().into());
        let answer = RefusedAnswer { refused: gap.clone(), acks: Some(Box::new(acks)) };
        let text = serde_json::to_string(&answer).unwrap();
        assert_eq!(serde_json::from_str::<RefusedAnswer>(&text).unwrap(), answer);
        assert_eq!(serde_json::from_str::<RefusedRequest>(&text).unwrap(), gap);
    }
}
