//! The importer: facts of charon and the kernel in, commands for the dataplane out. Pure: no socket, no clock.
//!
//! ```text
//!   ViciEvent ──▶ charon.rs   names, selectors, states ─┐
//!                                                       ▼
//!   XfrmEvent ──▶ kernel.rs   SAs, keys ──────────▶ place.rs  which SA belongs to which tunnel
//!                                                       │
//!                                                       ▼            what each tunnel should hold,
//!   SaEvent ────▶ feedback.rs, demand.rs            settle.rs ─────▶ and what it holds (tunnel.rs)
//!                     │                                 │ numbers first            │ the difference
//!                     ▼                                 ▼                          ▼
//!                 XfrmRequest, ViciRequest          reserve.rs ──XfrmRequest   SaCommand…
//! ```
//!
//! Nothing here reacts to an event as such. Facts are noted, and then the tunnels they concern are brought in line with all facts
//! there are, so that the same facts lead to the same tunnels in whatever order they came. That order is not ours to
//! choose: charon's word and the kernel's come by two sockets, and one overtakes the other.
//!
//! # What holds at every moment
//!
//! | law | how |
//! |---|---|
//! | what arrives can be opened | an inbound SA is installed as soon as the kernel has it, by its reqid and ends before charon tells of it; it stays until its DELSA, and half a second longer while charon has its child |
//! | what is sent can be opened | the oldest outbound SA sends until its DELSA: the peer deletes its inbound half later |
//! | except | one that charon has forgotten, or whose peer has already sent with a newer IKE_SA, gives way to any other |
//! | no number is used twice | `numbers.rs` |
//! | no SA is used by two | only what carries the inert mark is imported, and a CHILD_SA whole or not at all |
//! | a list of commands is never refused | and if one is, what the dataplane has stays known, and the others go on |
//!
//! A tunnel is what CHILD_SAs of one connection, child name, reqid and peer identity have in common: it outlives rekeying,
//! reauthentication (make-before-break, too) and MOBIKE. charon gives one reqid to all CHILD_SAs with the same selectors and
//! marks, also of several peers; those have tunnels of their own, and the newest gets the packets, as on Linux.
//!
//! # What charon and the kernel were found to do
//!
//! Read in strongSwan 5.9 and 6.0 and in Linux 6.1; what was seen running stands in the tests as a story.
//!
//! * **MOBIKE** (`kernel_netlink_ipsec.c`, `update_sa`): GETSA, GETAE, DELSA, NEWSA with the counters that were read. A number we store in
//!   between is lost there, so we store again when the NEWSA comes.
//! * **A hard EXPIRE**, the kernel's or ours, removes an SA without a DELSA (`xfrm_user.c`, `xfrm_add_sa_expire`).
//! * **Traps with `policies = no`**: charon notes a trap with its reqid in its own table and skips the kernel (`child_sa.c`, `install_policies`),
//!   so nothing of the kernel's fires. An ACQUIRE finds a trap by its reqid alone (`trap_manager.c`, `acquire`), and VICI tells no trap's
//!   reqid. Hence `initiate` by name: see `demand.rs`.
//! * **Last use**: charon takes it from policies, of which there are none. `inactivity` ends children that carry packets, and VICI tells nobody
//!   that it is set; what can be seen is a child that ends in use, and that is said.
//! * **Limits in bytes and packets** are looked at by the kernel when it uses an SA itself. Those in seconds run on its own timer.

mod charon;
mod demand;
mod engine;
mod feedback;
mod kernel;
mod notice;
mod numbers;
mod output;
mod place;
mod reserve;
mod settings;
mod settle;
mod status;
mod tunnel;

pub use engine::Importer;
pub use notice::{ChildLabel, ImportEvent, ImportNotice, SaProblem, Severity};
pub use output::{ChildStatus, ImportOutput, ImportedSa};
pub use settings::{Database, ImportName, ImportSettings};
