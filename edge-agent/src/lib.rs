//! The edge side of Weir. The path, in order: `source` → `journal` → `decode` → `validate` → `window` → `rules` →
//! `pipeline` → `spool` → `uplink`; `agent` wires it, `publish` tells alerts to the local broker, `remote` does what the cloud commands, `admin` shows it, `trial`
//! explains it for one message.

pub mod admin;
pub mod agent;
pub mod clock;
pub mod command;
pub mod config;
pub mod decode;
pub mod discover;
pub mod doctor;
mod door;
pub mod entry;
pub mod failpoint;
pub mod journal;
pub mod metrics;
pub mod notify;
pub mod offline;
pub mod pipeline;
pub mod places;
pub mod profile;
pub mod publish;
pub mod redelivery;
pub mod remote;
pub mod rules;
pub mod source;
pub mod spool;
pub mod trial;
pub mod uplink;
pub mod validate;
pub mod window;
