//! Pure ESP: batches of packets in, batches of packets out. No I/O, no clock.
pub mod aead;
pub mod batch;
pub mod esp;
mod inbound;
mod outbound;
pub mod replay;
mod report;
pub mod sad;
pub mod sequence;
pub mod spd;
mod tables;
mod tunnel;
pub mod usage;
pub mod wire;

pub use aead::{Aead, AeadKey};
pub use batch::{Batch, HEADROOM_BYTES, Outer, PacketBuf, TAILROOM_BYTES, Verdict};
pub use inbound::Inbound;
pub use outbound::Outbound;
pub use report::Report;
pub use tables::{CommandError, CommandProblem, OuterHeaders, Settings, TableWriter, Tables};
pub use tunnel::max_inner_bytes;
