//! The vocabulary every part of Esplane speaks.
//!
//! A control plane (static keys, the HTTP API, Noise, strongSwan over VICI) turns whatever it
//! negotiated into [`SaCommand`]s; the dataplane carries them out and answers with [`SaEvent`]s.
//! Neither side knows the other: this crate is all they share. It has no I/O, no clock, no async.
//!
//! ```text
//!   control plane ──SaCommand──▶ dataplane
//!                 ◀──SaEvent────
//!
//!   SaCommand::Install(SaParams)          one SA, valid by construction
//!     ├─ SaId: TunnelId, Direction, Spi   who it is
//!     ├─ KeyMaterial: AeadSuite, key, Salt what it encrypts with
//!     ├─ OuterPath, UdpEncap              where its packets travel
//!     ├─ SelectorPair…                    which inner packets it may carry
//!     └─ Lifetime, Esn, window, sequence  how long, and how it counts
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `spi.rs` | [`Spi`], [`TunnelId`], [`Direction`], [`SaId`] |
//! | `suite.rs`, `key.rs` | [`AeadSuite`], [`KeyMaterial`] |
//! | `prefix.rs`, `selector.rs` | [`IpPrefix`], [`TrafficSelector`], [`SelectorPair`] |
//! | `path.rs` | [`OuterPath`], [`UdpEncap`], [`DfPolicy`] |
//! | `lifetime.rs` | [`Lifetime`] |
//! | `sa.rs` | [`SaParams`], [`SaPair`], [`Esn`], [`WindowSize`], [`SequenceStart`] |
//! | `policy.rs` | [`TunnelParams`], [`Policy`], [`PolicyAction`] |
//! | `command.rs`, `event.rs` | [`SaCommand`], [`SaEvent`] |
//! | `drops.rs`, `statistics.rs` | [`DropReason`], [`DropCounters`], [`SaStatus`] |
//! | `time.rs` | [`Now`] |
#![forbid(unsafe_code)]

mod command;
mod drops;
mod event;
mod key;
mod lifetime;
mod path;
mod policy;
mod prefix;
mod sa;
mod selector;
mod spi;
mod statistics;
mod suite;
mod time;

pub use command::SaCommand;
pub use drops::{DropCounters, DropReason, DropStage};
pub use event::SaEvent;
pub use key::{KeyError, KeyMaterial};
pub use lifetime::{Lifetime, LifetimeError, LifetimeUnit, Limits};
pub use path::{DfPolicy, OuterPath, PathError, UdpEncap};
pub use policy::{Policy, PolicyAction, TunnelParams};
pub use prefix::{IpPrefix, PrefixError};
pub use sa::{Esn, SaPair, SaParams, SequenceStart, WindowError, WindowSize};
pub use selector::{SelectorError, SelectorPair, TrafficSelector};
pub use spi::{Direction, SaId, Spi, SpiError, TunnelId};
pub use statistics::{SaStatistics, SaStatus, TunnelActivity, TunnelStatus};
pub use suite::{AeadSuite, SuiteError};
pub use time::Now;
