//! VICI, charon's control protocol: what it tells, and what it can be asked.

mod model;

pub use model::{
    ChildSa, ChildState, Connection, ConnectionChild, IkeSa, Mark, Trap, ViciEvent, ViciRequest,
};
