//! The edge side of Weir, as far as it stands: the spool that keeps sealed batches until the lake has them, and the
//! decisions of the uplink. Sources, journal, decoding and the binary come next.

pub mod spool;
pub mod uplink;
