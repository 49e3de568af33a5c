//! NIC mode: packets past the kernel's network stack, over AF_XDP.
//!
//! ```text
//!   NIC queue n ─▶ XDP program ──── ESP, ESP in UDP for one of our addresses ────▶ socket.rs ─▶ outer.rs ─▶ worker
//!                  (outer.bpf)      all else: the kernel, as ever                  rx ring
//!   NIC queue n ◀──────────────────────────────────────────────────────────────── tx ring  ◀─ outer.rs ◀─ worker
//!                                   no next hop known yet, larger than the MTU: the kernel's sockets
//! ```
//!
//! The private side is the same with `inner.bpf` and `inner.rs`: taken is what the kernel would route into the
//! tunnel interface; what it has to answer for (TTL used up, larger than the tunnel's MTU, its own addresses) stays with it.
//!
//! | file | holds |
//! |---|---|
//! | `umem.rs`, `ring.rs`, `socket.rs` | memory shared with the kernel, the four rings over it, one queue's socket |
//! | `program.rs` | the programs: `../assembly.rs` makes them of their texts, `../bpf.rs` loads them |
//! | `ethernet.rs`, `next_hops.rs` | headers that the kernel would write, and what it knows that they must say |
//! | `outer.rs`, `inner.rs` | the two drivers |
//! | `beside.rs`, `leftovers.rs` | the kernel's drivers beside them, and what leaves by those |
//!
//! # One copy each way, and why
//!
//! Packets are copied between the kernel's frames and the batch, headers being written on the way: in from the ring that they
//! came by, out to the ring that they leave by. Nothing would stop a frame from going from one ring to the other but this: a
//! [`Batch`]'s arena is one `&mut [u8]`, of which outbound, inbound and the AEAD take the ranges they need, and memory into
//! which the kernel writes meanwhile, be it into other frames, cannot be one. In bounds that is sound, each packet would be a
//! slice of its own, in every signature of the dataplane down to the AEAD's kernels, which today check a run of jobs against one
//! arena. All drivers would pay for that; and what only this one would save is small, the bytes being those that the AEAD reads
//! next or wrote last. Measured on a Zen 5, minima over windows of 4096 packets, frames of a ring of 8 MiB:
//!
//! | | 64 bytes | 576 bytes | 1400 bytes |
//! |---|---|---|---|
//! | read where it lies | 3 ns | 11 ns | 22 ns |
//! | copied in, read there | 8 ns | 19 ns | 35 ns |
//! | and copied out | 12 ns | 27 ns | 48 ns |
//!
//! On virtual interfaces, where the kernel copies as well and needs microseconds a packet, this cannot be seen: `perf` finds 0.3 % of
//! a worker's time in `memcpy`, 92 % in the kernel. In the topology of `tests/compare` 64-byte packets pass at 0.36 Mpps; at 0.41 Mpps through a
//! forwarder of a hundred lines over one UMEM, made for this measurement, that encrypts nothing and copies nothing (medians of four
//! interleaved rounds). A card that takes ten million packets a second a core would show more.
//!
//! # Why these programs are text
//!
//! `rbpf` assembles them at start. `aya` would load what clang or a nightly compiler made, and then a fresh machine needs
//! one of those; 70 lines of assembly that verifier and tests check packet class by packet class need neither.
//!
//! [`Batch`]: esplane_dataplane::Batch

mod beside;
mod ethernet;
mod inner;
mod leftovers;
mod next_hops;
mod outer;
mod program;
mod ring;
mod socket;
mod umem;

pub use inner::XdpInner;
pub use next_hops::{HopsReader, NextHop, NextHops, next_hops};
pub use outer::XdpOuter;
pub use program::{Steering, Taken, XdpMode};
pub use socket::{XdpSocket, queues_of};

use leftovers::Leftovers;
use std::io;

/// Why an interface cannot be used with AF_XDP.
#[derive(Debug, thiserror::Error)]
pub enum XdpError {
    /// A system call.
    #[error("cannot {doing} for AF_XDP on `{interface}`: {source}{}", hint(source))]
    Kernel {
        /// What was tried.
        doing: &'static str,
        /// Where.
        interface: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The verifier did not like a program of ours.
    #[error("a bug: the kernel refuses the XDP program for `{interface}`: {source}\n{log}")]
    Verifier {
        /// Where.
        interface: String,
        /// What the kernel said.
        source: io::Error,
        /// At length.
        log: String,
    },
    /// A program of ours is no program.
    #[error(transparent)]
    Assembly(#[from] super::assembly::AssemblyError),
    /// Frames are pages at most.
    #[error(
        "`{interface}` has an MTU of {mtu}; AF_XDP takes up to {} here: lower it, or leave this side to the kernel",
        umem::MTU_MAX
    )]
    Mtu {
        /// Where.
        interface: String,
        /// What it is.
        mtu: u32,
    },
    /// More queues than there are.
    #[error("`{interface}` has {there} queues, not {wanted}; use {there} or fewer, or `auto`")]
    Queues {
        /// Where.
        interface: String,
        /// How many it has.
        there: u32,
        /// How many were asked for.
        wanted: u32,
    },
}

/// All queues, each time beginning with another, so that a busy one cannot starve the rest.
fn in_turn<'a>(
    queues: &'a mut [XdpSocket],
    turn: &mut usize,
) -> impl Iterator<Item = &'a mut XdpSocket> {
    *turn = turn.wrapping_add(1);
    let (last, first) = queues.split_at_mut(*turn % queues.len().max(1));
    first.iter_mut().chain(last)
}

fn hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "; this needs root, or the capabilities NET_ADMIN, NET_RAW and BPF"
        }
        Some(libc::EBUSY) => {
            "; another program uses this queue or has its XDP program there (`ip link show` tells)"
        }
        Some(libc::EAFNOSUPPORT) => "; this kernel is built without AF_XDP (CONFIG_XDP_SOCKETS)",
        Some(libc::ENOMEM | libc::ENOBUFS) => {
            "; too little memory may be locked: raise `ulimit -l`, or grant the capability IPC_LOCK"
        }
        _ => "",
    }
}

fn failed(doing: &'static str, interface: &str, source: io::Error) -> XdpError {
    XdpError::Kernel {
        doing,
        interface: interface.to_owned(),
        source,
    }
}
