//! What charon's process and Esplane say to each other over the unix socket.
//!
//! ```text
//!   Hello Join… State… Ready          on connecting: who, which sockets, what is kept for Esplane
//!   Request ─▶  ◀─ Keep, Drop, Answer  one netlink message each way; what is to outlive Esplane comes first
//!             ◀─ Sync,  Kept ─▶        everything before is kept
//! ```
//!
//! A frame is its length, its kind, an id, a payload; both ends are on one machine, so numbers are in
//! its byte order. This file belongs to two crates: `esplane-preload` and, by its path, `esplane-control-vici`.

/// Bytes before the payload.
pub const HEAD_BYTES: usize = 16;
/// More than any message of netlink's.
pub const MAX_BYTES: usize = 1 << 17;
/// What both ends must agree on.
pub const VERSION: u64 = 1;

/// What a frame says, and what its id and payload are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The first of all; id: the version. Payload: eight bytes that name this process among all that ever connect.
    Hello = 1,
    /// A socket is open, or subscribes; id: which. Payload: its groups, 32 bits.
    Join = 2,
    /// What Esplane once gave to keep; id: as given. Payload: as given.
    State = 3,
    /// That was all.
    Ready = 4,
    /// A netlink message of charon's; id: the socket.
    Request = 5,
    /// Answers `Sync`; id: as given.
    Kept = 6,
    /// To be kept in place of what has this id.
    Keep = 16,
    /// No longer to be kept; id: which.
    Drop = 17,
    /// To be answered with `Kept`; id: any.
    Sync = 18,
    /// A netlink message for charon; id: the socket.
    Answer = 19,
}

impl Kind {
    fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::Hello,
            2 => Self::Join,
            3 => Self::State,
            4 => Self::Ready,
            5 => Self::Request,
            6 => Self::Kept,
            16 => Self::Keep,
            17 => Self::Drop,
            18 => Self::Sync,
            19 => Self::Answer,
            _ => return None,
        })
    }
}

/// Appends a frame.
pub fn write(into: &mut Vec<u8>, kind: Kind, id: u64, payload: &[u8]) {
    let length = (HEAD_BYTES + payload.len()) as u32;
    into.extend_from_slice(&length.to_ne_bytes());
    into.extend_from_slice(&(kind as u32).to_ne_bytes());
    into.extend_from_slice(&id.to_ne_bytes());
    into.extend_from_slice(payload);
}

/// One frame, borrowed from what was received.
#[derive(Clone, Copy)]
pub struct Frame<'a> {
    /// What it says.
    pub kind: Kind,
    /// See [`Kind`].
    pub id: u64,
    /// See [`Kind`].
    pub payload: &'a [u8],
    /// How many bytes of the stream it took.
    pub bytes: usize,
}

/// Not what the other end says: another version, or another program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadFrame;

/// The first frame of the stream; `None` until all of it is there.
pub fn read(stream: &[u8]) -> Result<Option<Frame<'_>>, BadFrame> {
    let Some(head) = stream.get(..HEAD_BYTES) else {
        return Ok(None);
    };
    let number =
        |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let bytes = number(0) as usize;
    if !(HEAD_BYTES..=MAX_BYTES).contains(&bytes) {
        return Err(BadFrame);
    }
    let kind = Kind::from_number(number(4)).ok_or(BadFrame)?;
    let Some(payload) = stream.get(HEAD_BYTES..bytes) else {
        return Ok(None);
    };
    let mut id = [0; 8];
    id.copy_from_slice(&head[8..16]);
    Ok(Some(Frame {
        kind,
        id: u64::from_ne_bytes(id),
        payload,
        bytes,
    }))
}
