//! From the spool to the cloud: `state` decides and knows neither sockets nor clock; `http` carries.

pub mod http;
pub mod state;
