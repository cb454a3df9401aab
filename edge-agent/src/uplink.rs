//! From the spool to the cloud. The decisions are in `uplink/state.rs`, which knows neither sockets nor clock.

pub mod state;
