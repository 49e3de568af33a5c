//! The Internet checksum (RFC 1071): sums are kept in the machine's byte order, which the ones'
//! complement does not mind (§2 B), and folded at the end.

use super::{IPV4_HEADER_BYTES, IPV6_HEADER_BYTES};

/// Adds `bytes` to a sum. All but the last bytes added must be of even length.
pub(in crate::io) fn add(sum: u64, bytes: &[u8]) -> u64 {
    // Four lanes that do not wait for each other; what overflows eight bytes is kept beside them.
    let mut lanes = [0u128; 4];
    let (chunks, rest) = bytes.as_chunks::<32>();
    for chunk in chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk.as_chunks::<8>().0) {
            *lane += u128::from(u64::from_ne_bytes(*word));
        }
    }
    let lanes: u128 = lanes.iter().sum();
    // 2^64 and 2^32 are both 1 here: halves may be added to each other.
    let lanes = halves(lanes as u64) + halves((lanes >> 64) as u64);
    let (pairs, odd) = rest.as_chunks::<2>();
    let rest = pairs
        .iter()
        .map(|pair| u64::from(u16::from_ne_bytes(*pair)))
        .sum::<u64>();
    // RFC 1071 §4.1: an odd byte is padded with zero.
    let odd = odd
        .first()
        .map_or(0, |byte| u64::from(u16::from_ne_bytes([*byte, 0])));
    sum + lanes + rest + odd
}

fn halves(sum: u64) -> u64 {
    (sum & 0xffff_ffff) + (sum >> 32)
}

/// Sixteen bits of a sum: the end-around carries.
pub(in crate::io) fn fold(sum: u64) -> u16 {
    let mut sum = halves(halves(sum));
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The sum of the pseudo header (RFC 9293 §3.1, RFC 8200 §8.1) of a packet whose IP header is whole and
/// has no extension.
pub(in crate::io) fn pseudo(packet: &[u8], ipv4: bool, protocol: u8, bytes: usize) -> u64 {
    let addresses = if ipv4 {
        &packet[12..IPV4_HEADER_BYTES]
    } else {
        &packet[8..IPV6_HEADER_BYTES]
    };
    let in_order = |value: u16| u64::from(value.to_be());
    add(0, addresses) + in_order(u16::from(protocol)) + in_order(bytes as u16)
}

/// The checksum that goes with a sum.
pub(in crate::io) fn of(sum: u64) -> [u8; 2] {
    (!fold(sum)).to_ne_bytes()
}

/// The same where zero means "none": ones' complement has two zeros (RFC 768).
pub(in crate::io) fn never_zero(sum: u64) -> [u8; 2] {
    match of(sum) {
        [0, 0] => [0xff, 0xff],
        other => other,
    }
}

/// Whether bytes that contain their own checksum add up.
pub(in crate::io) fn is_right(sum: u64) -> bool {
    fold(sum) == 0xffff
}
