//! What comes in without an edge agent in front of it: from the bytes of other systems' protocols to batches of streams.
//!
//! Pure: no clock, no disk, no socket. A door reads its protocol ([`line`], [`otlp`]) and puts rows into [`rows::Gathering`],
//! which makes batches within the limits; what cannot be a row becomes one of `quarantine`. The batches have no number yet:
//! the single writer gives it when it admits them (`ingest/write.rs`).

pub(crate) mod line;
pub(crate) mod otlp;
pub mod rows;

use sha2::{Digest, Sha256};
use wire::named;
use wire::schema::own;
use wire::{EdgeId, TS_FUTURE_MAX_US, TS_MIN_US};

use self::rows::{Cell, Gathering, Maker, RowsError};
use crate::own_names::OwnNames;
use crate::repeats::WriteId;

/// Rejections that an answer tells, the others are counted.
const TOLD_MAX: usize = 10;
/// `detail` is for people.
const DETAIL_BYTES_MAX: usize = 1_000;
/// Names that an answer tells how they were changed.
const RENAMED_MAX: usize = 20;

/// What of a request was not taken as it is: for the answer.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// Rows that go into their streams.
    pub(crate) rows: u64,
    /// Those that go into `quarantine`.
    pub(crate) rejected: u64,
    /// The first of them: a line's number, and why.
    pub(crate) reasons: Vec<(usize, String)>,
    /// Names that are others here.
    pub(crate) renamed: Vec<(String, String)>,
    /// Rows that have the time of their arrival: the same request again would be other rows.
    pub(crate) by_arrival: bool,
}

impl Told {
    fn rename(&mut self, from: &str, to: &str) {
        if from != to && self.renamed.len() < RENAMED_MAX && !self.renamed.iter().any(|(known, _)| known == from) {
            self.renamed.push((from.to_owned(), to.to_owned()));
        }
    }
}

/// Where a request comes from, as `quarantine` shows it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin<'a> {
    pub(crate) edge: &'a EdgeId,
    pub(crate) own_names: &'a OwnNames,
    /// The protocol.
    pub(crate) source: &'static str,
    /// What the sender calls the place that it writes to.
    pub(crate) topic: &'a str,
    pub(crate) arrival_us: i64,
}

/// A part of a request that is no row of its stream.
struct Rejected<'a> {
    /// Of the line, or of what has none.
    number: usize,
    stream: Option<&'a str>,
    reason: &'static str,
    detail: &'a str,
    payload: &'a [u8],
}

/// Where a door gathers its rows.
pub(crate) fn gathering(source: &str, bytes_max: usize) -> Gathering {
    let agent = format!("weir {} {source}", env!("CARGO_PKG_VERSION"));
    let mut rows = Gathering::new(Maker { agent, configuration: 0 }, bytes_max);
    rows.declare(named::stream(own::QUARANTINE), own::quarantine());
    rows
}

fn reject(rows: &mut Gathering, told: &mut Told, origin: Origin<'_>, rejected: &Rejected<'_>) -> Result<(), RowsError> {
    told.rejected += 1;
    if told.reasons.len() < TOLD_MAX {
        told.reasons.push((rejected.number, rejected.detail.to_owned()));
    }
    let detail = &rejected.detail[..rejected.detail.floor_char_boundary(DETAIL_BYTES_MAX)];
    let payload_bytes = i64::try_from(rejected.payload.len()).unwrap_or(i64::MAX);
    let fields = own::quarantine();
    let cells = [
        rejected.stream.map(Cell::Text),
        Some(Cell::Text(origin.source)),
        Some(Cell::Text(origin.topic)),
        Some(Cell::Text(rejected.reason)),
        Some(Cell::Text(detail)),
        Some(Cell::Bytes(rejected.payload)),
        Some(Cell::Int(payload_bytes)),
    ];
    let cells = fields.fields().iter().zip(cells).filter_map(|(field, cell)| Some((&field.name, cell?)));
    rows.add(&named::stream(own::QUARANTINE), origin.arrival_us, None, cells)
}

/// Whether a time can be stored, in the words that the edge uses.
fn check_time(ts: i64, arrival_us: i64) -> Result<(), (&'static str, String)> {
    let shown = |us| chrono::DateTime::from_timestamp_micros(us).map_or_else(|| format!("{us} µs"), |t| t.to_rfc3339());
    if ts < TS_MIN_US {
        return Err(("before_2000", format!("its time is {}; is the precision right?", shown(ts))));
    }
    if ts > arrival_us.saturating_add(TS_FUTURE_MAX_US) {
        return Err(("in_future", format!("its time is {}; is the precision right?", shown(ts))));
    }
    Ok(())
}

/// A hash of what makes two requests the same.
pub(crate) fn request_id(parts: &[&[u8]]) -> WriteId {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    WriteId(hash.finalize()[..16].try_into().expect("a SHA-256 has 32 bytes"))
}
