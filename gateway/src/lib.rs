//! The Esplane daemon and command line as a library.

pub mod cli;
pub mod config;
pub mod demo;
pub mod http;
pub mod keys;
pub mod netlink;
pub mod show;
pub mod status;
pub mod telemetry;
