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
    let mut nonce = [0; NONCE_BYTES];
    nonce[..4].copy_from_slice(&salt); // RFC 4106 §4, RFC 7634 §2: salt ‖ IV
    nonce[4..].copy_from_slice(&iv);
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

/// SPI and sequence number, all 64 bits of it with ESN (RFC 4106 §5, RFC 7634 §2.1).
fn associated_data(spi: Spi, esn: Esn, number: u64) -> ([u8; 16], u8) {
    let mut aad = [0; 16];
    aad[..4].copy_from_slice(&spi.get().to_be_bytes());
    match esn {
        Esn::On => {
            aad[4..12].copy_from_slice(&number.to_be_bytes());
            (aad, 12)
        }
        Esn::Off => {
            aad[4..8].copy_from_slice(&(number as u32).to_be_bytes());
            (aad, 8)
        }
    }
}
