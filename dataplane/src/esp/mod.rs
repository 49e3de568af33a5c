//! Step 6: what lies between an inner packet and its ESP packet (RFC 4303).

pub mod decap;
pub mod encap;

use crate::{
    aead::{Job, Keyed},
    outbound::CHUNK_PACKETS,
};
use arrayvec::ArrayVec;

/// What is left to the AEAD of a chunk of packets.
pub type Jobs = ArrayVec<Job, CHUNK_PACKETS>;
/// Under which keys.
pub type Keys<'k> = ArrayVec<Keyed<'k>, CHUNK_PACKETS>;
