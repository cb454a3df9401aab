//! From the spool to the cloud: `state` decides what goes and `link` how much, and neither knows sockets or clock; `parcel`
//! makes requests of it, and `http` carries them.

pub mod http;
pub mod link;
pub mod parcel;
pub mod state;
mod upload;
