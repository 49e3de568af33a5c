//! Pure ESP (RFC 4303) in tunnel mode: batches of packets in, batches of packets out. No I/O, no
//! clock, no thread, and after construction no allocation and no lock.
//!
//! # The path of a packet
//!
//! ```text
//!      clear packets                                                      clear packets
//!            │ 1, 2: a driver fills a Batch        8: a driver takes Forward'ed ones ▲
//!            ▼                                                                      │
//!   ┌──────────────────┐                                         ┌─────────────────────┐
//!   │ 3 classify       │ outbound.rs, wire/                      │ 7 finish            │ inbound.rs
//!   │   addresses,     │ malformed ──▶ Drop                      │   selectors, ECN,   │ tunnel.rs
//!   │   protocol, ports│                                         │   surplus cut off   │
//!   ├──────────────────┤                                         ├─────────────────────┤
//!   │ 4 look up        │ spd.rs                                  │ 6 commit, strip     │ replay.rs,
//!   │   policy, tunnel,│ ──▶ Drop, Bypass, Hold                  │   take the number,  │ esp/decap.rs
//!   │   SA that sends  │                                         │   padding           │
//!   ├──────────────────┤                                         ├─────────────────────┤
//!   │ 5 sequence       │ sequence.rs, usage.rs                   │ 6 authenticate,     │ aead/
//!   │   numbers for the│ none left ──▶ Drop                      │   decrypt           │ whole chunk, one call
//!   │   run of one SA  │                                         ├─────────────────────┤
//!   ├──────────────────┤                                         │ 5 sequence          │ sequence.rs,
//!   │ 6 crypt          │ esp/encap.rs, aead/                     │   infer, *check*    │ replay.rs
//!   │   whole chunk,   │                                         ├─────────────────────┤
//!   │   one call       │                                         │ 4 look up: SPI      │ sad.rs
//!   ├──────────────────┤                                         ├─────────────────────┤
//!   │ 7 finish         │ tunnel.rs                               │ 3 classify: ESP,    │ inbound.rs, wire/
//!   │   outer headers  │                                         │   control, keepalive│ ──▶ Control
//!   └──────────────────┘                                         └─────────────────────┘
//!            │ 8: a driver takes Forward'ed ones   1, 2: a driver fills a Batch ▲
//!            ▼                                                                 │
//!       ESP packets ═══════════════════════════════════════════════════▶ ESP packets
//! ```
//!
//! Packets stay where the driver put them: headers grow into the frame's headroom, trailer and ICV
//! into its tailroom ([`batch`]). Every packet leaves with a [`Verdict`]; what is dropped is
//! counted under one [`DropReason`](esplane_api::DropReason) in the worker's [`Report`].
//!
//! A forged packet changes nothing: until its ICV is known to be right, inbound only looks. The
//! types of [`esp::decap`] make that order the only one that compiles.
//!
//! # Who owns what
//!
//! | | owns | shared how |
//! |---|---|---|
//! | [`TableWriter`], one on the control side | tunnels, policies, SAs | carries out `SaCommand`s as a whole or not at all |
//! | [`Tables`], a snapshot | SAD, SPD, senders | immutable, in an `Arc`; one per batch and worker |
//! | [`sad::InboundSa`], [`sad::OutboundSa`] | key, window or counter, usage | by all snapshots; what changes is an atomic |
//! | [`Outbound`], [`Inbound`], one per worker | scratch memory | not at all |
//! | [`Batch`] | the packets | not at all; in place |
//! | [`Report`] | events and drops | not at all; the worker hands it over |
//!
//! # Where a key lives
//!
//! `KeyMaterial` comes in with `SaCommand::Install`, is expanded into the SA's [`AeadKey`] and
//! wiped. The `AeadKey` lives as long as the last snapshot that holds its SA, and is wiped with it.
//! What is remembered of a removed key is a hash under a secret of this process, together with its
//! counter or window: installed again, it goes on where it was. That,
//! [`sequence::SequenceCounter`], and the refusal to install one key twice keep the invariant: **no
//! (key, IV) pair is ever used twice.**
//!
//! # Where the cycles go
//!
//! Core cycles of one packet of 64 inner bytes, AES-128-GCM in UDP over IPv4, one SA, everything in the cache, on a Zen 5 core with
//! AVX-512. Rows are differences between lines of `esplane bench` (`aead-seal`, `esp-encap` less that, `route-lookup`, …):
//! minima over windows of 64 packets, good for a few cycles:
//!
//! | step | out | in |
//! |---|---|---|
//! | AEAD: five blocks, as the trailer makes 64 bytes 68 | 30 | 30 |
//! | classify; number or window; ESP header and trailer, written or taken off; the driver's record, verdict; selectors inbound | 30 | 40 |
//! | look up the route (a destination of its own for each packet; in a row of one flow it is 0), outer IP and UDP header | 36 | 14 |
//! | all | 96 | 84 |
//!
//! What is paid once a run of packets with one SA and so vanishes above: reserving numbers, lifetimes and counters. Locked
//! instructions of a run are one outbound and one inbound (two more for each further 32 numbers), and two more where another worker
//! counts without a lock (`usage.rs`). Packets of several SAs in turn pay it each, and for memory: nine cache lines inbound (SPI, two
//! of the SA's record, window, five of the key; one more where a window moves on by 32 numbers), a dozen outbound. Against that, the
//! packets of one SA are one run wherever they stand among the 64 that go through the steps together, and records, counters and keys
//! are asked for before they are needed. What remains is instructions: with everything in the cache, 64 SAs in turn cost nearly as
//! much as 10,000. Locked instructions are not gathered: between other work, most of their time is hidden.
//!
//! | SAs in turn, 64 bytes | out | in |
//! |---|---|---|
//! | 1 | 96 | 84 |
//! | 10 | 137 | 126 |
//! | 1,000 | 186 | 184 |
//! | 10,000 | 183 | 190 |
//! | 100,000 | 257 | 314 |
//!
//! (`esplane bench`, means of the minima of two runs. Beyond 10,000 medians are much higher, 440 and 600 at 100,000: a minimum is a
//! window whose records were in a nearer cache. Long packets use up to 25 lines of a key, 11 of them for sums that save them instructions:
//! IMIX costs 150 and 149 with one SA, 285 and 392 with 10,000 in turn.)
//!
//! # Where we deviate, and why
//!
//! | clause | what we do |
//! |---|---|
//! | RFC 4303 §3.4.3 anti-replay may be disabled | never: there is no parameter for it |
//! | RFC 4303 §3.3.3 counting starts at 1 | also above, for a key that goes on after a restart |
//! | RFC 4303 §3.4.1 reassembly before ESP | the kernel's work behind sockets; refused where we read outer headers ourselves |
//! | RFC 4303 Appendix A3 resynchronisation | after 64 failures in a row, one packet of a chunk, four high halves: bounded work for an attacker |
//! | RFC 4301 §5.1.2 inner TTL | untouched: whoever forwards the packet to or from us has decremented it, or will |
//! | RFC 4301 §5.1.2.2 flow label | zero in outer IPv6 |
//! | RFC 4301 §4.4.1 selectors by ICMP type and name | not supported; protocol and ports are |
//! | RFC 4301 §4.4.2.1 hard lifetime | may be exceeded by one run of packets per worker |
//! | RFC 2675 jumbograms, transport mode, AH | not supported |

pub mod aead;
mod arena;
mod atomic;
pub mod batch;
pub mod esp;
mod inbound;
mod outbound;
mod outer;
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
pub use arena::{Arena, Memory};
pub use batch::{Batch, HEADROOM_BYTES, Outer, PacketBuf, TAILROOM_BYTES, Verdict};
pub use inbound::Inbound;
pub use outbound::Outbound;
pub use report::{EVENTS_MAX, Report};
pub use tables::{CommandError, CommandProblem, OuterHeaders, Settings, TableWriter, Tables};
pub use tunnel::max_inner_bytes;
