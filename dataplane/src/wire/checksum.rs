//! The Internet checksum (RFC 1071), whole and incremental (RFC 1624).

use std::net::IpAddr;

/// One's complement sum of `bytes` as big-endian 16-bit words, added to `sum`; not folded yet.
pub fn add(sum: u64, bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(2);
    let odd = words
        .remainder()
        .first()
        .map_or(0, |last| u64::from(*last) << 8);
    words.fold(sum + odd, |sum, word| {
        sum + u64::from(u16::from_be_bytes([word[0], word[1]]))
    })
}

/// Folds a sum into the checksum.
#[inline]
pub fn finish(sum: u64) -> u16 {
    // 64 bits become 33, 17 and more, 17, 16.
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// The same for the sum of a header, which is far below 2^32.
#[inline]
pub fn finish_short(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// Checksum after one 16-bit word has changed (RFC 1624 §3, equation 3).
pub fn update(checksum: u16, old: u16, new: u16) -> u16 {
    finish(u64::from(!checksum) + u64::from(!old) + u64::from(new))
}

/// The sum over a pseudo-header: RFC 768 for IPv4, RFC 8200 §8.1 for IPv6.
pub fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, bytes: usize) -> u64 {
    let start = u64::from(protocol) + (bytes as u64 & 0xffff) + (bytes as u64 >> 16);
    [source, destination]
        .iter()
        .fold(start, |sum, address| match address {
            IpAddr::V4(v4) => add(sum, &v4.octets()),
            IpAddr::V6(v6) => add(sum, &v6.octets()),
        })
}
