//! Beside a strongSwan: what charon negotiates, Esplane carries.
//!
//! ```text
//!   charon ──VICI──▶ link.rs ──ViciEvent──▶┐             ┌──SaCommand──▶ tables
//!   kernel ──XFRM──▶   two    ─XfrmEvent──▶│ Node,       │
//!      ▲             clients  ◀─requests───│ its Importer│──ImportNotice─▶ log
//!      └── counters, EXPIRE, numbers        └─────────────┘
//!   Control ──▶ takeover.rs: which addresses the sockets listen at, routes, MTU, when ready
//! ```
//!
//! Decisions are the importer's (`esplane-control-vici`), which is pure; here are the sockets.

pub mod check;
mod link;
mod takeover;

pub(crate) use link::{Fact, Link};
pub(crate) use takeover::{Takeover, is_imported, ways};
