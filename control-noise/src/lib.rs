//! Esplane's own key exchange: a Noise handshake and SA turnover as a sans-IO state machine.
#![forbid(unsafe_code)]

mod config;
mod engine;
mod keys;
mod notice;

pub use config::{
    ConfigError, Initiate, KemPolicy, LoadPolicy, NodeConfig, PeerConfig, RekeyPolicy,
};
pub use engine::{Engine, Output, PeerState, PeerStatus};
pub use keys::{KEY_BYTES, KeyTextError, PresharedKey, PublicKey, StaticSecretKey};
pub use notice::{Disagreement, Notice, NoticeEvent, PeerLabel, Severity};
