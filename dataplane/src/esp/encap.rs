//! Outbound: puts ESP header, IV, padding and trailer around an inner packet, in place.

use super::job;
use crate::{
    PacketBuf,
    aead::{ICV_BYTES, Job},
    sad::OutboundSa,
    wire::esp::{BEFORE_PAYLOAD_BYTES, TRAILER_BYTES},
};

/// Bytes of padding that bring payload and trailer to a multiple of four (RFC 4303 §2.4).
const fn padding_bytes(payload_bytes: usize) -> usize {
    (payload_bytes + TRAILER_BYTES).wrapping_neg() & 3
}

/// Bytes of the ESP packet around a payload of this length.
pub const fn sealed_bytes(payload_bytes: usize) -> usize {
    BEFORE_PAYLOAD_BYTES + payload_bytes + padding_bytes(payload_bytes) + TRAILER_BYTES + ICV_BYTES
}

/// The longest payload whose ESP packet has at most `esp_bytes`.
pub const fn payload_bytes_within(esp_bytes: usize) -> usize {
    let encrypted = esp_bytes.saturating_sub(BEFORE_PAYLOAD_BYTES + ICV_BYTES) & !3;
    encrypted.saturating_sub(TRAILER_BYTES)
}

/// Whether the packet's frame has room for ESP and `outer_bytes` of headers before it.
#[inline]
pub fn has_room(packet: &PacketBuf, payload_bytes: usize, outer_bytes: usize) -> bool {
    let behind = sealed_bytes(payload_bytes) - BEFORE_PAYLOAD_BYTES;
    packet.headroom() >= outer_bytes + BEFORE_PAYLOAD_BYTES
        && packet.data_bytes() + packet.tailroom() >= behind
}

/// Padding, its length, and room for the next header behind it, by padding length (RFC 4303 §2.4: padding is 1, 2, 3, …).
/// Eight bytes: the rest is overwritten by the ICV.
const TRAILERS: [[u8; 8]; 4] = [
    [0, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0],
    [1, 2, 2, 0, 0, 0, 0, 0],
    [1, 2, 3, 3, 0, 0, 0, 0],
];

/// Writes everything but the ciphertext and answers what remains for the AEAD to do. The packet's
/// data becomes the whole ESP packet. Its frame must have room ([`has_room`]); `None` if the arena has not.
#[inline]
pub fn encap<'k>(
    arena: &mut [u8],
    packet: &mut PacketBuf,
    sa: &'k OutboundSa,
    number: u64,
    payload_bytes: usize,
    next_header: u8,
) -> Option<Job<'k>> {
    let start = packet
        .data_range()
        .start
        .checked_sub(BEFORE_PAYLOAD_BYTES)?;
    let at = start..start + sealed_bytes(payload_bytes);
    packet.set_edges(at.start as u32, at.end as u32);
    let (header, rest) = arena
        .get_mut(at.clone())?
        .split_first_chunk_mut::<BEFORE_PAYLOAD_BYTES>()?;

    // RFC 4303 §2.1, §2.2: SPI and the low half of the number.
    // RFC 4106 §3.1, RFC 7634 §2: any IV that never comes twice; the number never does.
    let spi = u128::from(sa.id.spi.get());
    let words = spi << 96 | u128::from(number as u32) << 64 | u128::from(number);
    *header = words.to_be_bytes();

    let padding = padding_bytes(payload_bytes);
    let last = u64::from(next_header) << (8 * (padding + 1));
    let trailer = u64::from_le_bytes(TRAILERS[padding]) | last;
    *rest.get_mut(payload_bytes..)?.first_chunk_mut()? = trailer.to_le_bytes();

    let payload = at.start + BEFORE_PAYLOAD_BYTES..at.end - ICV_BYTES;
    let numbered = (sa.id.spi, sa.sequence.esn(), number);
    Some(job(
        &sa.key,
        sa.salt,
        number.to_be_bytes(),
        numbered,
        payload,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payload_and_trailer_end_on_four_bytes() {
        for payload in 0..200 {
            let sealed = sealed_bytes(payload);
            let encrypted = sealed - BEFORE_PAYLOAD_BYTES - ICV_BYTES;
            assert!(encrypted.is_multiple_of(4) && encrypted >= payload + TRAILER_BYTES);
            assert!(encrypted < payload + TRAILER_BYTES + 4);
            assert!(payload_bytes_within(sealed) >= payload);
            assert!(sealed_bytes(payload_bytes_within(sealed) + 1) > sealed);
        }
    }
}
