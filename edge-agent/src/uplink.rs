//! From the spool to the cloud: `state` decides what goes and `link` how much, and neither knows sockets or clock; `http`
//! carries.

pub mod http;
pub mod link;
pub mod state;
mod upload;
