//! Esplane's own key exchange: a Noise handshake and SA turnover as a sans-IO state machine.
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
