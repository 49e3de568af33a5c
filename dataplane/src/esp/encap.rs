//! Outbound: puts ESP header, IV, padding and trailer around an inner packet, in place.

use super::{Jobs, job};
use crate::{
    PacketBuf,
    aead::ICV_BYTES,
    sad::OutboundSa,
    wire::esp::{BEFORE_PAYLOAD_BYTES, HEADER_BYTES, TRAILER_BYTES},
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
pub fn has_room(packet: &PacketBuf, payload_bytes: usize, outer_bytes: usize) -> bool {
    let behind = sealed_bytes(payload_bytes) - BEFORE_PAYLOAD_BYTES;
    packet.headroom() >= outer_bytes + BEFORE_PAYLOAD_BYTES
        && packet.data_bytes() + packet.tailroom() >= behind
}

/// Writes everything but the ciphertext and answers what remains for the AEAD to do. The packet's
/// data becomes the whole ESP packet. `None` if its frame has no room ([`has_room`]).
pub fn encap<'k>(
    arena: &mut [u8],
    packet: &mut PacketBuf,
    sa: &'k OutboundSa,
    number: u64,
    payload_bytes: usize,
    next_header: u8,
    jobs: &mut Jobs<'k>,
) -> Option<()> {
    let grown = sealed_bytes(payload_bytes) - BEFORE_PAYLOAD_BYTES;
    let back = grown as i32 - packet.data_bytes() as i32;
    if !packet.grow(BEFORE_PAYLOAD_BYTES as i32, back) {
        return None;
    }
    let at = packet.data_range();
    let (header, rest) = arena
        .get_mut(at.clone())?
        .split_first_chunk_mut::<BEFORE_PAYLOAD_BYTES>()?;

    // RFC 4303 §2.1, §2.2: SPI and the low half of the number.
    header[..4].copy_from_slice(&sa.id.spi.get().to_be_bytes());
    header[4..HEADER_BYTES].copy_from_slice(&(number as u32).to_be_bytes());
    // RFC 4106 §3.1, RFC 7634 §2: any IV that never comes twice; the number never does.
    let iv = number.to_be_bytes();
    header[HEADER_BYTES..].copy_from_slice(&iv);

    // RFC 4303 §2.4: padding 1, 2, 3, …
    let padding = padding_bytes(payload_bytes);
    let trailer = rest.get_mut(payload_bytes..payload_bytes + padding + TRAILER_BYTES)?;
    for (place, value) in trailer.iter_mut().zip(1..=padding as u8) {
        *place = value;
    }
    trailer[padding] = padding as u8;
    trailer[padding + 1] = next_header;

    let payload = at.start + BEFORE_PAYLOAD_BYTES..at.end - ICV_BYTES;
    let numbered = (sa.id.spi, sa.sequence.esn(), number);
    jobs.push(job(&sa.key, sa.salt, iv, numbered, payload));
    Some(())
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
