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
//! | `frames.rs` | one worker's queues of both sides, over one memory |
//! | `umem.rs`, `ring.rs`, `socket.rs` | that memory, the four rings of a queue, one queue's socket |
//! | `program.rs` | the programs: `../assembly.rs` makes them of their texts, `../bpf.rs` loads them |
//! | `ethernet.rs`, `next_hops.rs` | headers that the kernel would write, and what it knows that they must say |
//! | `side.rs`, `outer.rs`, `inner.rs` | what both drivers have in common, and the two |
//! | `beside.rs` | the kernel's drivers beside them |
//!
//! # From ring to ring
//!
//! A packet stays in the frame in which it came: it is sealed or opened there, headers are written before it, and the frame
//! leaves by the other side's ring. All queues of a worker share one memory for that (XDP_SHARED_UMEM, Linux 5.10), cut in two:
//! frames for what leaves and frames for what arrives, so that neither direction takes the other's.
//!
//! ```text
//!            fill ring ──▶ NIC fills it ──▶ rx ring of one side
//!               ▲                              │
//!          spare frames                  packet of a batch: checked, sealed or opened in place
//!               ▲                              │
//!      completion ring ◀── NIC sends it ◀── tx ring of the other side
//!               ▲                              │
//!               └──────────────────── dropped, held, for the control side, or sent by the kernel's sockets
//! ```
//!
//! A batch counts its frames (`Batch::lent`, in the dataplane): each is spare, a packet's or away, and what is told twice or was
//! never the batch's is refused. Where one side is the kernel's, its driver reads into spare frames and writes out of packets'. What
//! was held while a tunnel had no SA leaves by the sockets.
//!
//! What a copy on the way in and another on the way out would cost, on a Zen 5, minima over windows of 4096 packets, frames of
//! a ring of 8 MiB:
//!
//! | | 64 bytes | 576 bytes | 1400 bytes |
//! |---|---|---|---|
//! | read where it lies | 3 ns | 11 ns | 22 ns |
//! | copied in, read there | 8 ns | 19 ns | 35 ns |
//! | and copied out | 12 ns | 27 ns | 48 ns |
//!
//! On virtual interfaces, where the kernel copies as well and needs microseconds a packet, this can hardly be seen.
//!
//! # Why these programs are text
//!
//! `rbpf` assembles them at start. `aya` would load what clang or a nightly compiler made, and then a fresh machine needs
//! one of those; 70 lines of assembly that verifier and tests check packet class by packet class need neither.

mod beside;
mod ethernet;
mod frames;
mod inner;
mod next_hops;
mod outer;
mod program;
mod ring;
mod side;
mod socket;
mod umem;

pub use frames::{Frames, Queue, WorkerQueues};
pub use inner::XdpInner;
pub use next_hops::{HopsReader, NextHop, NextHops, next_hops};
pub use outer::XdpOuter;
pub use program::{Steering, Taken, XdpMode};
pub use socket::{XdpSocket, queues_of};

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
    /// As above, of the tunnels' interface.
    #[error(
        "the tunnels' interface has an MTU of {mtu}; beside AF_XDP up to {} are taken: lower it, or leave all to the kernel",
        umem::MTU_MAX
    )]
    InnerMtu {
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
