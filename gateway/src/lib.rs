//! The Esplane daemon and command line as a library.
//!
//! ```text
//!   private network                                                     public network
//!   ────────────────┐        ┌──────────────────────────┐        ┌────────────────────
//!     io/tun.rs     │──────▶ │ worker.rs   (one a core) │ ─────▶ │ io/outer.rs
//!                   │ ◀──────│  dataplane, hold.rs      │ ◀───── │  udp.rs, raw_esp.rs
//!   ────────────────┘        └────▲──────────────┬──────┘        └────────────────────
//!                          tables │              │ events, handshake messages
//!                            ┌────┴──────────────▼──────┐
//!                            │ control/    (one task)   │──▶ network.rs, netlink/   routes, addresses
//!                            │  node.rs: control-noise, │──▶ reservation.rs         state that outlives us
//!                            │   control-vici           │──▶ strongswan/            charon, the kernel's SAs
//!                            └────▲──────────────▲──────┘──▶ telemetry/             log, metrics
//!                                 │              │
//!                        config/, SIGHUP      http/ ◀── show.rs, Prometheus
//! ```
//!
//! `nic/` puts AF_XDP in front of the drivers where the configuration asks for it, `daemon.rs` opens and closes it all, `aead.rs` says with which implementation packets are sealed; `demo/` runs two of it against each other, `bench/`
//! measures the packet path in memory.

pub mod aead;
pub mod bench;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod daemon;
pub mod demo;
pub mod hold;
pub mod http;
pub mod io;
pub mod keys;
pub mod netlink;
pub mod network;
pub mod nic;
pub mod node;
pub mod reservation;
pub mod resolver;
pub mod show;
pub mod status;
pub mod strongswan;
pub mod telemetry;
mod ways;
pub mod worker;
