//! The cloud side of Weir: takes sealed batches from edges, keeps them in a WAL, and commits them to Delta tables.

pub mod catalog;
pub mod cloud;
pub mod config;
pub mod delta;
pub mod hot;
mod http;
mod ingest;
pub mod ledger;
pub mod metrics;
pub mod rescue;
pub mod sequencer;
pub mod store;
pub mod wal;

pub use catalog::{Catalogue, TableState};
pub use cloud::{Cloud, CloudHandle};
pub use config::Settings;
pub use delta::past::Moment;
