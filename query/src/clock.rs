//! The machine's clock, µs since 1970 UTC: what rows, tables of the node and people are told. It may be set at any moment.

use std::time::{SystemTime, UNIX_EPOCH};

/// Now.
pub(crate) fn now_us() -> i64 {
    us(SystemTime::now())
}

/// This moment; 0 when it is before 1970.
pub(crate) fn us(time: SystemTime) -> i64 {
    i64::try_from(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros()).unwrap_or(i64::MAX)
}
