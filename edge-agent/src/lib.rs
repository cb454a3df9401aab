//! The agent that runs on a gateway: from brokers and sensors, over a journal and a spool on disk, to the cloud.

pub mod spool;
pub mod uplink;
