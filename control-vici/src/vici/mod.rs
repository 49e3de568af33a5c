//! VICI, charon's control protocol: what it tells, and what it can be asked.
//!
//! ```text
//!   client.rs     run(): connects, dumps, follows, begins again   ViciEvent ─▶, ◀─ ViciRequest
//!   channel.rs    one connection: command and answer, events
//!   ──────────────────────────────────────────────────────────    a unix socket above, pure below
//!   packet.rs     bytes ─▶ Packet       message.rs  Message: values, lists, sections
//!   facts.rs      Message ─▶ model.rs   selector.rs charon's traffic selectors
//! ```
//!
//! The codec is our own. There is no crate `vici`; of those there are, `rsvici` 0.1.5 loses bytes when a read is
//! cancelled (so it cannot stand in a `select!`), allocates whatever length the peer names, and spins at the end of
//! file; all three lie in the part that would be used, its serde layer turns unknown keys and lists of one into
//! special cases, and what remains is shorter than the mending. `rustici` is LGPL. VICI has eight packet types
//! and six elements.

mod channel;
mod client;

mod facts;
mod message;
mod model;
mod packet;
#[cfg(test)]
mod recorded;
mod selector;

pub use channel::{Channel, DEFAULT_SOCKET, ViciError};
pub use client::{ViciSettings, run};
pub use facts::{EVENTS, FactError, FactProblem, Facts, charon_stats, charon_version};
pub use message::{EncodeError, Message, MessageError, MessageProblem, Value};
pub use model::{
    CharonStats, CharonVersion, ChildSa, ChildState, Connection, ConnectionChild, IkeSa, Mark,
    Trap, ViciEvent, ViciRequest,
};
pub use packet::{Packet, PacketError, PacketReader};
pub use selector::{Names, SelectorProblem, SelectorTextError};
