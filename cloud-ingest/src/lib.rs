//! The cloud side of Weir: takes sealed batches from edges, keeps them in a WAL, and commits them to Delta tables.

pub mod delta;
pub mod rescue;
pub mod store;
