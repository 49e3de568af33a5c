//! SAD, SPD and tunnels: one writer, immutable snapshots for the workers.
//!
//! ```text
//!   control planes                                  workers
//!     SaCommand… ──▶ TableWriter ──Arc<Tables>──▶ one snapshot per batch
//!                     state.rs: what is installed     ├─ Spd      destination → tunnel
//!                     checks, then changes a copy     ├─ tunnels  tunnel → sender (SA, outer header)
//!                     publishes it as a whole         └─ Sad      SPI → inbound SA
//!                     keys.rs: how far keys had come
//!                     carried.rs: what tunnels have carried
//!                     places.rs: tunnels by slot
//! ```
//!
//! A snapshot never changes; what does change (counters, numbers, windows) are atomics inside the
//! SAs, which all snapshots share. So a worker with an old snapshot and one with a new one still
//! take numbers from the same counter.

mod carried;
mod error;
mod keys;
mod places;
mod state;
mod writer;

pub use error::{CommandError, CommandProblem};
pub use writer::TableWriter;

use crate::{
    aead::Aead,
    sad::{OutboundSa, Sad},
    spd::{Spd, TunnelSlot},
    tunnel::OuterHeader,
};
use esplane_api::TunnelId;
use places::Places;
use rpds::RedBlackTreeMapSync as Map;
use std::sync::Arc;

/// How the dataplane hands over outer packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Who writes the outer IP and UDP headers.
    pub outer_headers: OuterHeaders,
}

/// Who writes and reads outer IP and UDP headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OuterHeaders {
    /// The kernel, behind sockets. Data starts at the ESP header or, inbound in UDP, at the UDP
    /// payload; all else is in [`crate::Batch::outer_of`].
    ByKernel,
    /// The dataplane: AF_XDP, captures, simulations. Data starts at a complete outer IPv4 or IPv6
    /// header (and UDP), with the IPv4 header checksum; the UDP checksum is zero over IPv4 and
    /// computed over IPv6.
    Written,
}

/// What the workers see: one moment's SAD, SPD and tunnels.
pub struct Tables {
    /// Each snapshot has a number of its own.
    pub(crate) number: u64,
    pub(crate) settings: Settings,
    pub(crate) aead: Aead,
    pub(crate) sad: Sad,
    pub(crate) spd: Arc<Spd>,
    /// A tunnel keeps its slot as long as it is defined.
    tunnels: Places,
    slots: Map<TunnelId, TunnelSlot>,
}

impl Tables {
    #[inline]
    pub(crate) fn tunnel(&self, slot: TunnelSlot) -> Option<&Tunnel> {
        self.tunnels.get(slot).map(|tunnel| &**tunnel)
    }

    /// What sends for the tunnel of this slot, and for this worker.
    #[inline]
    pub(crate) fn sender_of(&self, slot: TunnelSlot, worker: u16) -> Option<&Sender> {
        self.tunnel(slot)?.sender_of(worker)
    }

    pub(crate) fn tunnel_by_id(&self, id: TunnelId) -> Option<&Tunnel> {
        self.tunnel(*self.slots.get(&id)?)
    }
}

/// One tunnel as workers see it.
pub(crate) struct Tunnel {
    pub id: TunnelId,
    pub roaming: bool,
    /// What sends for workers that have nothing of their own (the fallback SA, RFC 9611 §2).
    pub sender: Option<Sender>,
    /// What sends for one worker alone, by its number; mostly none.
    pub of_workers: Box<[Option<Sender>]>,
}

impl Tunnel {
    /// What sends for this worker; without it packets are held.
    #[inline]
    pub fn sender_of(&self, worker: u16) -> Option<&Sender> {
        let own = self.of_workers.get(usize::from(worker));
        own.and_then(Option::as_ref).or(self.sender.as_ref())
    }
}

/// An outbound SA and where it sends to.
#[derive(Clone)]
pub(crate) struct Sender {
    pub header: OuterHeader,
    pub sa: Arc<OutboundSa>,
}
