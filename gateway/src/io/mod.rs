//! Drivers: how batches of packets get in and out.
//!
//! ```text
//!        private network                                     public network
//!   ┌───────────────────────┐    ┌────────┐    ┌─────────────────────────────────────┐
//!   │ tun.rs   TunQueue     │───▶│ worker │───▶│ outer.rs    OuterSockets            │
//!   │ one queue a worker    │◀───│        │◀───│  ├─ udp.rs      UdpOuter   RFC 3948  │
//!   └───────────────────────┘    └────────┘    │  ├─ raw_esp.rs  RawEsp  protocol 50 │
//!                                              │  └─ shared_port/  beside charon     │
//!                                              └─────────────────────────────────────┘
//!   socket.rs  what both have in common; over mmsg.rs (recvmmsg and sendmmsg, straight into and
//!              from the arena; several packets as one message), gro.rs (such messages taken apart),
//!              control.rs (TOS, local address, sizes), name.rs (addresses), options.rs
//!   vnet.rs    super-packets of the TUN, which offload/ splits and coalesces
//!   assembly.rs, bpf.rs  programs in the kernel: which queue of the TUN (tun_steering.rs), which frames (xdp/)
//!   link_losses.rs  what the TUN had no room for
//!   poll.rs    sleeping until something arrives, and being woken
//! ```
//!
//! All drivers of sockets speak `OuterHeaders::ByKernel`: a packet's data starts at the UDP payload
//! or at the ESP header, and [`Outer`](esplane_dataplane::batch::Outer) says the rest.
//!
//! # Many packets at once
//!
//! Both sides speak to the kernel in super-packets where it can: a TUN with `IFF_VNET_HDR`, UDP with
//! `UDP_SEGMENT` and `UDP_GRO`. [`Driver`] and worker know nothing of it: what arrives as one is split
//! into frames, what does not fit into the batch waits in the driver, and runs of neighbours that agree leave
//! as one, gathered from their frames. Each missing offload costs one log line and speed, nothing else.
//!
//! # NIC mode
//!
//! `xdp/` drives network cards past the kernel's stack, and keeps the drivers above for what is better left to the kernel. It
//! hands packets on as sockets do, so nothing else knows of it.
#![allow(unsafe_code)] // system calls; every block argues its soundness

mod assembly;
mod bpf;
mod control;
mod gro;
mod link_losses;
mod mmsg;
mod name;
mod offload;
mod options;
pub mod outer;
pub mod poll;
pub mod raw_esp;
pub mod shared_port;
mod socket;
pub mod tun;
mod tun_steering;
pub mod udp;
mod vnet;
pub mod xdp;

pub use outer::{OuterSockets, OuterTransmitter};
pub use poll::{Waker, wait};
pub use raw_esp::{RawEsp, RawReceive};
pub use shared_port::{AddressFilter, SharedPort};
pub use tun::{TUN_QUEUE_PACKETS, TunError, TunOffloads, TunOptions, TunQueue};
pub use udp::{SocketError, UdpOffloads, UdpOuter};

use esplane_api::DropCounters;
use esplane_dataplane::batch::{Batch, HEADROOM_BYTES, TAILROOM_BYTES};
use std::{
    io,
    ops::AddAssign,
    os::fd::{BorrowedFd, RawFd},
};

/// One queue of one interface, or one set of sockets: owned by one worker, never blocking.
pub trait Driver: Send {
    /// Adds what has arrived until nothing is left or the batch is full.
    ///
    /// What arrived but cannot be used is counted in `drops`. An error means that this queue is dead
    /// (its interface was deleted, say) and will never yield anything again; passing trouble, such as
    /// an ICMP error queued on a socket, is none.
    fn receive(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> io::Result<()>;

    /// Sends every packet whose verdict is `Forward`, in order. Each is either in the answer or counted in
    /// `drops`; nothing is lost silently.
    fn transmit(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> Traffic;

    /// Gives frames back that it has taken out of this batch ([`Batch::take`]) and that have left. Most drivers take none.
    fn reclaim(&mut self, _batch: &mut Batch) {}

    /// Counts in `drops` what the kernel has thrown away since the last call, before it could be received or after it was
    /// handed over. Costs a system call a socket: for now and then, not for every batch.
    fn count_lost(&mut self, drops: &mut DropCounters);

    /// What becomes readable when something arrives.
    fn poll_descriptors(&self) -> Descriptors<'_>;
}

/// Descriptors that one driver may have.
pub const DESCRIPTORS_MAX: usize = 16;
/// The descriptors of one driver.
pub type Descriptors<'a> = arrayvec::ArrayVec<BorrowedFd<'a>, DESCRIPTORS_MAX>;

/// How much was carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Packets.
    pub packets: u64,
    /// Their bytes, as the driver saw them.
    pub bytes: u64,
}

impl Traffic {
    /// Counts one packet more.
    pub fn add(&mut self, bytes: usize) {
        self.packets += 1;
        self.bytes += bytes as u64;
    }
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

/// Frame size for inner packets of up to `inner_mtu` bytes: headroom, tailroom, what ESP adds, and
/// one byte by which a packet that is too big gives itself away. A multiple of the cache line.
///
/// Never less than 2048, for a peer's MTU may be larger than ours, and handshake messages are what they are.
pub const fn frame_bytes(inner_mtu: usize) -> usize {
    const ESP_AND_ONE: usize = 64;
    let bytes = (HEADROOM_BYTES + inner_mtu + ESP_AND_ONE + TAILROOM_BYTES).next_multiple_of(64);
    if bytes > 2048 { bytes } else { 2048 }
}

/// An arena in which a driver of sockets finds room for messages of many packets each, to receive them where they are opened.
/// Memory that nothing reaches is not backed by pages.
pub const fn receiving_arena_bytes() -> usize {
    gro::MESSAGES_MAX * gro::STRIDE_BYTES
}

/// Room for data in each frame of `batch`.
fn room_bytes(batch: &Batch) -> usize {
    batch
        .frame_bytes()
        .saturating_sub(HEADROOM_BYTES + TAILROOM_BYTES)
}

/// Turns the C convention of -1 and `errno` into a `Result`.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A descriptor as the C library wants it. Safe: using it wrongly needs `unsafe` anyway.
fn raw(descriptor: BorrowedFd<'_>) -> RawFd {
    std::os::fd::AsRawFd::as_raw_fd(&descriptor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_holds_the_packet_and_all_that_esp_adds() {
        for mtu in [576, 1280, 1420, 1500, 9000] {
            let frame = frame_bytes(mtu);
            assert!(frame.is_multiple_of(64) && frame - HEADROOM_BYTES - TAILROOM_BYTES > mtu + 40);
        }
    }
}
