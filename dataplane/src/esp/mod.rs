//! Step 6: what lies between an inner packet and its ESP packet (RFC 4303).

pub mod decap;
pub mod encap;

use crate::{
    aead::{Job, NONCE_BYTES},
    outbound::CHUNK_PACKETS,
};
use arrayvec::ArrayVec;
use esplane_api::{Esn, Spi};
use std::ops::Range;

/// What is left to the AEAD of a chunk of packets.
pub type Jobs<'k> = ArrayVec<Job<'k>, CHUNK_PACKETS>;

/// The AEAD's view of one ESP packet.
#[inline]
fn job<'k>(
    key: &'k crate::AeadKey,
    salt: [u8; 4],
    iv: [u8; 8],
    (spi, esn, number): (Spi, Esn, u64),
    payload: Range<usize>,
) -> Job<'k> {
    // RFC 4106 §4, RFC 7634 §2: salt ‖ IV
    let nonce: [u8; NONCE_BYTES] = {
        let ([a, b, c, d], [e, f, g, h, i, j, k, l]) = (salt, iv);
        [a, b, c, d, e, f, g, h, i, j, k, l]
    };
    let (aad, aad_bytes) = associated_data(spi, esn, number);
    Job {
        key,
        nonce,
        aad,
        aad_bytes,
        payload,
        ok: false,
    }
}

/// SPI and sequence number, all 64 bits of it with ESN (RFC 4106 §5, RFC 7634 §2.1). Put together in registers: bytes
/// stored one by one and read back as a vector make a CPU wait.
#[inline]
fn associated_data(spi: Spi, esn: Esn, number: u64) -> ([u8; 16], u8) {
    // As they lie in memory, read as little-endian words: the high half of the number comes first.
    let spi = u64::from(u32::from_le_bytes(spi.get().to_be_bytes()));
    let number = u64::from_le_bytes(number.to_be_bytes());
    let (first, second, bytes) = match esn {
        Esn::On => (spi | number << 32, number >> 32, 12),
        Esn::Off => (spi | (number >> 32) << 32, 0, 8),
    };
    let both = u128::from(first) | u128::from(second) << 64;
    (both.to_le_bytes(), bytes)
}
