//! What travels between the rooms of Weir: ids, schema rules, sealed batches, acks, and the contract for hot data.
//!
//! Everything here is a value or a pure function; nothing opens a file or a socket. The edge and the cloud
//! both stand on this crate, so a format that changes here changes its version byte.

pub mod ack;
pub mod basic;
mod body;
mod bytes;
pub mod cold;
pub mod command;
pub mod hot;
pub mod ids;
pub mod line;
pub mod named;
pub mod rate;
pub mod reference;
pub mod request;
pub mod schema;
pub mod sealed;
pub mod written;
mod zip;

pub use ack::{Acks, Mark, PositionsAnswer, Refusal, RefusedAnswer, RefusedRequest, StreamAck};
pub use cold::{DataFile, DataFiles};
pub use command::{Command, CommandReply, CommandsAnswer, Handed};
pub use ids::{EdgeId, FieldName, NameError, Seq, SpoolId, StreamName};
pub use rate::{Allowance, Rate};
pub use schema::{FieldType, SchemaId, StreamField, StreamSchema};
pub use sealed::{BodyFormat, CutBatch, SealedBatch};

/// Most rows in one sealed batch.
pub const BATCH_ROWS_MAX: usize = 65_536;
/// Most bytes that the columns of one batch may take once decoded.
pub const BATCH_DECODED_BYTES_MAX: usize = 64 << 20;
/// Most bytes of one sealed batch as it travels.
pub const BATCH_BYTES_MAX: usize = 32 << 20;
/// Most different event-time dates in one batch: a commit opens one Parquet writer per date.
pub const BATCH_DATES_MAX: usize = 64;
/// Most fields of one stream, the common columns not counted.
pub const FIELDS_MAX: usize = 512;
/// Earliest event time that is stored: 2000-01-01T00:00:00Z, in microseconds.
pub const TS_MIN_US: i64 = 946_684_800_000_000;
/// Latest event time that is stored, counted from now: one day, in microseconds.
pub const TS_FUTURE_MAX_US: i64 = 86_400_000_000;
/// Microseconds in a day.
pub const DAY_US: i64 = 86_400_000_000;
