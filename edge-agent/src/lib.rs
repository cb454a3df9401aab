//! The edge side of Weir. The path, in order: `source` → `journal` → `decode` → `validate` → `window` → `pipeline` →
//! `spool` → `uplink`; `agent` wires it, `admin` shows it.

pub mod config;
pub mod entry;
pub mod spool;
pub mod uplink;
