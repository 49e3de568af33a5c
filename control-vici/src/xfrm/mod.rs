//! XFRM, the kernel's SA database over netlink: what it tells, and what it can be told.
//!
//! ```text
//!   model.rs     the words: XfrmSa, XfrmEvent, XfrmRequest
//!   client.rs    the kernel's sockets          bytes ─▶ XfrmEvent,  XfrmRequest ─▶ bytes
//!   message.rs   messages                      ┐
//!   sa.rs        SAs and their attributes      │ pure
//!   wire.rs      frames, attributes, numbers   ┘
//! ```
//!
//! The codec is our own. `netlink-packet-xfrm` covers the same attributes, but its types derive
//! `Debug` over keys and leave copies of them in memory; here what holds a key is wiped and prints
//! `[redacted]`. It reads and writes both sides' messages, since `kernel/` plays the other side.

pub mod client;
pub mod message;
mod model;
#[cfg(test)]
mod recorded;
pub mod sa;
pub mod wire;

pub use client::XfrmError;
pub use model::{
    Progress, SaKey, XfrmCipher, XfrmEncap, XfrmEvent, XfrmMode, XfrmReply, XfrmRequest, XfrmSa,
};
