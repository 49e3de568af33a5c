//! VICI, charon's control protocol: what it tells, and what it can be asked.

mod message;
mod model;
mod packet;
mod selector;

pub use message::{EncodeError, Message, MessageError, MessageProblem, Value};
pub use model::{
    ChildSa, ChildState, Connection, ConnectionChild, IkeSa, Mark, Trap, ViciEvent, ViciRequest,
};
pub use packet::{Packet, PacketError, PacketReader};
pub use selector::{Names, SelectorProblem, SelectorTextError};
