//! The Esplane daemon and command line as a library.

pub mod cli;
pub mod clock;
pub mod config;
pub mod http;
pub mod keys;
pub mod node;
pub mod show;
pub mod status;
pub mod telemetry;
