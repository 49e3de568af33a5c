//! Outbound: puts ESP header, IV, padding and trailer around an inner packet, in place.

use crate::{
    Arena, PacketBuf,
    aead::{ICV_BYTES, Job},
    tables::Sender,
    tunnel::{BEFORE_BYTES, OuterHeader, Outside},
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
    let behind = packet.data_bytes() + packet.tailroom();
    packet.headroom() >= outer_bytes + BEFORE_PAYLOAD_BYTES
        && (behind >= payload_bytes + BEHIND_BYTES_MAX
            || behind >= sealed_bytes(payload_bytes) - BEFORE_PAYLOAD_BYTES)
}

/// Bytes of padding, trailer and ICV, at most.
const BEHIND_BYTES_MAX: usize = 3 + TRAILER_BYTES + ICV_BYTES;

/// Padding, its length, and room for the next header behind it, by padding length (RFC 4303 §2.4: padding is 1, 2, 3, …).
/// Eight bytes: the rest is overwritten by the ICV.
const TRAILERS: [[u8; 8]; 4] = [
    [0, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0],
    [1, 2, 2, 0, 0, 0, 0, 0],
    [1, 2, 3, 3, 0, 0, 0, 0],
];

/// What the packets of one run have in common.
pub(crate) struct Encap<'k> {
    header: &'k OuterHeader,
}

impl<'k> Encap<'k> {
    /// Of packets that leave with this SA.
    pub fn new(sender: &'k Sender) -> Self {
        Self {
            header: &sender.header,
        }
    }

    /// Writes everything but the ciphertext around an inner packet, with `HEADERS` bytes of outer headers, and answers what
    /// remains for the AEAD to do. The packet's data becomes the whole outer packet, which has its TOS and DF already. Its
    /// frame must have room ([`has_room`]); `None` if the arena has not.
    #[inline]
    pub fn put_around<const HEADERS: usize>(
        &self,
        arena: &mut Arena<'_>,
        packet: &mut PacketBuf,
        (payload_bytes, next_header): (usize, u8),
        number: u64,
    ) -> Option<Job> {
        let start = packet.data_range().start;
        let first = start.checked_sub(HEADERS + BEFORE_PAYLOAD_BYTES)?;
        let padding = padding_bytes(payload_bytes);
        let icv = start + payload_bytes + padding + TRAILER_BYTES;
        let outside = Outside {
            number,
            total_bytes: icv + ICV_BYTES - first,
            tos: packet.outer_tos,
            df: packet.outer_df,
        };
        // The headroom before the headers is nobody's: where there is enough, a write of fixed size does.
        if packet.headroom() >= BEFORE_BYTES {
            let before = arena.get_mut(start - BEFORE_BYTES..start)?;
            self.header
                .write::<HEADERS>(before.first_chunk_mut()?, outside);
        } else {
            self.put_before::<HEADERS>(arena.get_mut(first..start)?, outside)?;
        }
        let last = u64::from(next_header) << (8 * (padding + 1));
        let trailer = u64::from_le_bytes(TRAILERS[padding]) | last;
        let behind = arena.get_mut(start + payload_bytes..icv + ICV_BYTES)?;
        *behind.first_chunk_mut()? = trailer.to_le_bytes();
        packet.set_edges(first as u32, (icv + ICV_BYTES) as u32);

        Some(Job {
            start: start as u32,
            bytes: (icv - start) as u32,
            high: (number >> 32) as u32,
            more: 0,
        })
    }

    #[cold]
    fn put_before<const HEADERS: usize>(&self, place: &mut [u8], outside: Outside) -> Option<()> {
        let mut before = [0; BEFORE_BYTES];
        self.header.write::<HEADERS>(&mut before, outside);
        place.copy_from_slice(before.get(BEFORE_BYTES - place.len()..)?);
        Some(())
    }
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
