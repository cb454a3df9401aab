//! The cloud side of Weir: takes sealed batches from edges, keeps them in a WAL, and commits them to Delta tables.

pub mod alias;
pub mod catalog;
pub mod class;
pub mod cloud;
pub mod commands;
pub mod compact;
pub mod config;
pub mod delta;
pub mod doors;
mod errors;
pub mod failpoint;
pub mod hot;
mod http;
mod ingest;
pub mod ledger;
mod maintain;
pub mod metrics;
pub mod origins;
pub mod remarks;
pub mod repeats;
pub mod rescue;
pub mod retain;
pub mod retype;
pub mod sequencer;
pub mod store;
mod underway;
pub mod vacuum;
pub mod verify;
pub mod wal;
pub mod writer;

pub use catalog::{Catalogue, TableState};
pub use cloud::{Cloud, CloudHandle, open_store};
pub use commands::Commands;
pub use config::Settings;
pub use delta::past::Moment;
pub use writer::{WriteError, Writer};
