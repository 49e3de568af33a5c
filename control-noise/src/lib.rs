//! Esplane's own key exchange: a Noise handshake and SA turnover as a sans-IO state machine.
//!
//! ```text
//!    datagrams behind the      what tunnels     DNS, reload,       the clock
//!      non-ESP marker      SaEvent  carried       operator
//!            │                │        │             │                │
//!  ┌─────────▼────────────────▼────────▼─────────────▼────────────────▼─────────┐
//!  │ Engine   handle_datagram  _event  _activity  set_peers, initiate  _timeout │
//!  │    │                                                                       │
//!  │  wire ─▶ cookie ─▶ ratelimit ─▶ handshake ─▶ peer                          │
//!  │  read    MAC1,2    load         Noise, KEM   attempt · turnover · liveness │
//!  └─────────┬────────────────┬────────┬─────────────┬────────────────┬─────────┘
//!            ▼                ▼        ▼             ▼                ▼
//!       Output::Send      Commands  SendDummy     Notice        poll_timeout
//! ```
//!
//! The engine has no socket, no clock and no random source: datagrams, events and the time come in by
//! `handle_…` calls, all randomness grows from [`NodeConfig::seed`], and what is to be done comes out
//! of [`Engine::poll_output`]. So a test replays any moment of any day, byte by byte.
//!
//! ```
//! use esplane_api::{Now, SaEvent, SelectorPair, TunnelId};
//! use esplane_control_noise::*;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let ours = StaticSecretKey::generate([1; 32]); // 32 bytes from the operating system
//! let theirs = StaticSecretKey::generate([2; 32]).public_key();
//! let mut engine = Engine::new(NodeConfig {
//!     private_key: ours,
//!     listen_port: 4500,
//!     local: None,
//!     worker_ports: vec![],
//!     seed: [3; 32], // and 32 more
//!     reserved_spis: vec![],
//!     under_load: LoadPolicy::default(),
//! })?;
//! let peer = PeerConfig {
//!     endpoint: Some("192.0.2.2:4500".parse()?),
//!     selectors: vec![SelectorPair::to("10.2.0.0/16".parse()?)],
//!     ..PeerConfig::new(TunnelId(1), "west", theirs)
//! };
//! let now = Now::default();
//! engine.set_peers(now, vec![peer])?;
//! assert!(matches!(engine.poll_output(), Some(Output::Commands(_)))); // the tunnel's definition
//! engine.handle_event(now, SaEvent::SaNeeded { tunnel: TunnelId(1) }); // a packet waits
//! assert!(matches!(engine.poll_output(), Some(Output::Send { .. }))); // message 1
//! # Ok(())
//! # }
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `engine.rs`, `context.rs` | [`Engine`], [`Output`]; what all peers share |
//! | `config.rs`, `keys.rs`, `notice.rs` | what it is told, the keys' text form, what it tells the operator |
//! | `wire.rs` | every foreign byte: messages and their payloads |
//! | `cookie.rs`, `ratelimit.rs` | what a stranger must show, and how much of it is looked at |
//! | `handshake.rs`, `kem.rs`, `random.rs` | one handshake as types, ML-KEM, the seeded generator |
//! | `peer.rs` | one peer: `initiator.rs`, `responder.rs`, and the SAs' `parameters.rs` |
//! | `turnover.rs`, `liveness.rs`, `timers.rs` | make before break, who is still there, every duration |
//!
//! `tests/` runs engines against each other in a world with a seeded network and a dataplane that
//! refuses whatever a real one would.
#![doc = include_str!("protocol.md")]
#![forbid(unsafe_code)]

mod config;
mod context;
mod cookie;
mod engine;
mod handshake;
mod kem;
mod keys;
mod liveness;
mod notice;
mod peer;
mod random;
mod ratelimit;
mod timers;
mod turnover;
mod wire;

pub use config::{
    ConfigError, Initiate, KemPolicy, LoadPolicy, NodeConfig, PeerConfig, RekeyPolicy,
};
pub use engine::{Engine, Output, PeerState, PeerStatus};
pub use keys::{KEY_BYTES, KeyTextError, PresharedKey, PublicKey, StaticSecretKey};
pub use notice::{Disagreement, Notice, NoticeEvent, PeerLabel, Severity};
