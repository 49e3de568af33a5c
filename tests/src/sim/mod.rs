//! A world of gateways that stories happen in.
//!
//! ```text
//!   hosts of 10.1.0.0/16                                             hosts of 10.2.0.0/16
//!         │ clear                                                          ▲ clear
//!         ▼                                                                │
//!   ┌─ Gateway ──────────────┐      ┌─ Network ─────────────┐      ┌─ Gateway ──────────────┐
//!   │ Outbound ──▶ ESP       │ ───▶ │ loses, duplicates,    │ ───▶ │ Inbound ──▶ clear      │
//!   │ Node: Noise + tables   │ ◀─── │ delays, reorders, MTU │ ◀─── │ Node: Noise + tables   │
//!   └────────────────────────┘      └──────────┬────────────┘      └────────────────────────┘
//!                                              ▼ every datagram
//!                                       Laws: no byte in clear, no (SPI, IV) twice
//! ```
//!
//! The gateways are the real [`Node`](esplane_gateway::node::Node) and the real dataplane; only
//! sockets, threads and clocks are replaced. Everything random comes from one seed.
//!
//! | file | holds |
//! |---|---|
//! | `world.rs` | [`World`]: the clock, the order of events, the traffic and its ledger |
//! | `gateway.rs` | [`Gateway`]: one node with its hold queue |
//! | `network.rs` | [`Network`]: what happens to a datagram on its way |
//! | `laws.rs` | [`Laws`]: what must hold in every story, checked on every datagram |
//! | `random.rs` | [`Random`]: seeded numbers |

mod gateway;
mod laws;
mod network;
mod packet;
mod random;
mod world;

pub use gateway::{Gateway, GatewayId, GatewaySpec};
pub use laws::Laws;
pub use network::{Datagram, Network, Weather};
pub use packet::{MARKER, inner_packet, number_of};
pub use random::Random;
pub use world::{Ledger, World};
