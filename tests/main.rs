//! End to end: a real cloud process, real sockets, kill -9, real data. One binary.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test stops at what it does not expect, and prints its seed"
)]

mod alert_faults;
mod alerts;
mod asking;
mod bad_input;
mod cloud_alerts;
mod commands;
mod comments;
mod demo;
mod differential;
mod disk_full;
mod doors;
mod doors_limits;
mod embedded_broker;
mod faults;
mod field;
mod forks;
mod fusion;
mod harness;
mod kills;
mod known_failures;
mod lake;
mod links;
mod listener;
mod load;
mod loading;
mod network;
mod operators_day;
mod place;
mod pressure;
mod process;
mod proxy;
mod real_data;
mod references;
mod retype;
mod rules;
mod s3;
mod slt;
mod soak;
mod sources;
mod views;
mod within;
mod write;
