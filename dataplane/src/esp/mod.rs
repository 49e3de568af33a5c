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
    let spi = u128::from(spi.get()) << 96;
    match esn {
        Esn::On => ((spi | u128::from(number) << 32).to_be_bytes(), 12),
        Esn::Off => ((spi | u128::from(number as u32) << 64).to_be_bytes(), 8),
    }
}
