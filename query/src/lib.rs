//! SQL over what arrived a moment ago and years of history, in one statement.
//!
//! A table is Delta files and hot rows behind one frozen state ([`fused_table`]); [`engine`] plans a statement once
//! and pins its tables each time it runs; [`serve`] are the doors. Hot rows come through the contract in
//! `wire::hot`, and cold ones from Delta snapshots that [`catalog::Tables`] hands out; nothing here writes but through [`sink`]. `functions` has
//! what people who work with time series expect beside DataFusion's own.

pub mod alerts;
pub mod as_of;
mod breadth;
pub mod caller;
pub mod catalog;
mod clock;
mod cold;
mod columns;
pub mod engine;
mod execution;
pub mod follow;
mod functions;
pub mod fused_table;
mod groups;
pub mod lanes;
pub mod links;
mod memory;
mod names;
mod places;
pub mod publish;
mod pushdown;
mod references;
mod remark;
pub mod scope;
pub mod serve;
pub mod sink;
pub mod statements;
mod system;
mod uncounted;
pub mod views;
mod volatile;

pub use alerts::Alerts;
pub use as_of::AsOf;
pub use caller::{Caller, Door, Right};
pub use catalog::{ClassFacts, ColdTable, SpoolFacts, Tables, TablesError};
pub use engine::{Engine, EngineSettings, Prepared, QueryError};
pub use follow::Position;
pub use lanes::LaneSettings;
pub use links::Links;
pub use remark::{ColumnNote, Remark};
pub use scope::Scope;
pub use sink::{Sink, SinkError};
pub use views::ViewSettings;
