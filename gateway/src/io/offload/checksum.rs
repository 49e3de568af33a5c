//! The Internet checksum (RFC 1071): sums are kept in the machine's byte order, which the ones'
//! complement does not mind (§2 B), and folded at the end.

use super::{IPV4_HEADER_BYTES, IPV6_HEADER_BYTES};

/// Adds `bytes` to a sum. All but the last bytes added must be of even length.
pub(in crate::io) fn add(sum: u64, bytes: &[u8]) -> u64 {
    let (chunks, rest) = bytes.as_chunks::<CHUNK_BYTES>();
    let chunks = if chunks.is_empty() {
        0
    } else {
        add_chunks(chunks)
    };
    let (words, rest) = rest.as_chunks::<4>();
    let words: u64 = words.iter().map(word).sum();
    let (pairs, odd) = rest.as_chunks::<2>();
    let pairs = pairs
        .first()
        .map_or(0, |pair| u64::from(u16::from_ne_bytes(*pair)));
    // RFC 1071 §4.1: an odd byte is padded with zero.
    let odd = odd
        .first()
        .map_or(0, |byte| u64::from(u16::from_ne_bytes([*byte, 0])));
    sum + chunks + words + pairs + odd
}

/// What is added at a time: wide registers hold it.
const CHUNK_BYTES: usize = 64;

/// 32 bits of data, which count as much as their two halves: 2^16 is 1 here.
fn word(bytes: &[u8; 4]) -> u64 {
    u64::from(u32::from_ne_bytes(*bytes))
}

/// Lanes that do not wait for each other; none overflows, nor does their sum, within any slice there can be of packets.
#[inline(always)]
fn add_lanes(chunks: &[[u8; CHUNK_BYTES]]) -> u64 {
    let mut lanes = [0u64; CHUNK_BYTES / 4];
    for chunk in chunks {
        for (lane, bytes) in lanes.iter_mut().zip(chunk.as_chunks::<4>().0) {
            *lane += word(bytes);
        }
    }
    lanes.iter().sum()
}

/// The same code for the widest registers that this machine has.
#[cfg(target_arch = "x86_64")]
fn add_chunks(chunks: &[[u8; CHUNK_BYTES]]) -> u64 {
    #[target_feature(enable = "avx512f")]
    fn with_avx512(chunks: &[[u8; CHUNK_BYTES]]) -> u64 {
        add_lanes(chunks)
    }
    #[target_feature(enable = "avx2")]
    fn with_avx2(chunks: &[[u8; CHUNK_BYTES]]) -> u64 {
        add_lanes(chunks)
    }
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: safe code that needs AVX-512F, which is there.
        unsafe { with_avx512(chunks) }
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: safe code that needs AVX2, which is there.
        unsafe { with_avx2(chunks) }
    } else {
        add_lanes(chunks)
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn add_chunks(chunks: &[[u8; CHUNK_BYTES]]) -> u64 {
    add_lanes(chunks)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 1071 §4.1, word by word, in network order.
    fn slow(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    #[test]
    fn every_length_and_every_width_of_register_gives_the_same_sum() {
        let bytes: Vec<u8> = (0..70_000u32)
            .map(|i| (i.wrapping_mul(0x9e37_79b9) >> 24) as u8)
            .collect();
        for length in (0..400).chain([1420, 9000, 65_535, 70_000]) {
            let (data, full) = (&bytes[..length], vec![0xff; length]);
            for data in [data, &full] {
                let sum = fold(add(0, data)).to_be();
                // Two zeros: 0 and 0xffff.
                assert_eq!(
                    u32::from(sum) % 0xffff,
                    u32::from(slow(data)) % 0xffff,
                    "{length}"
                );
                let chunks = data.as_chunks::<CHUNK_BYTES>().0;
                assert_eq!(
                    fold(add_lanes(chunks)),
                    fold(add_chunks(chunks)),
                    "{length}"
                );
            }
        }
    }
}
