//! What Esplane's cross-crate tests are made of.
//!
//! ```text
//!   tests/*.rs         stories: one scenario each, why an operator cares, what must hold
//!     └─ sim/          a world for them: clock, network, gateways, traffic, and its laws
//!   bin/fuzz-smoke.rs  a bounded run over every target of…
//!     └─ fuzz/         one function per parser of foreign bytes; tests/fuzz/ hands the same
//!                      functions to cargo-fuzz
//! ```
//!
//! Nothing here reads a clock or opens a socket: a story that fails fails again, at the same packet.
#![forbid(unsafe_code)]

pub mod fuzz;
pub mod sim;
