//! IPv4 (RFC 791).

use super::u16_at;
use std::net::Ipv4Addr;

/// Bytes of a header without options.
pub const HEADER_BYTES: usize = 20;

/// One whole packet, fragment or not.
#[derive(Clone, Copy, Debug)]
pub struct Ipv4<'a> {
    fixed: &'a [u8; HEADER_BYTES],
    payload: &'a [u8],
    total_bytes: usize,
}

impl<'a> Ipv4<'a> {
    /// Refuses another version, and lengths that contradict each other or the bytes there are.
    /// Bytes behind the packet are cut off. The header checksum is not looked at: ESP protects
    /// inner packets, and whoever receives the packet in the end checks it.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let fixed = bytes.first_chunk::<HEADER_BYTES>()?;
        let header_bytes = usize::from(fixed[0] & 0x0f) * 4;
        let total_bytes = usize::from(u16_at(fixed, 2));
        if fixed[0] >> 4 != 4 || header_bytes < HEADER_BYTES {
            return None;
        }
        Some(Self {
            fixed,
            payload: bytes.get(header_bytes..total_bytes)?,
            total_bytes,
        })
    }

    /// Header and payload.
    pub fn total_bytes(&self) -> usize {
        self.total_bytes
    }

    /// The header with its options.
    pub fn header_bytes(&self) -> usize {
        self.total_bytes - self.payload.len()
    }

    /// DSCP and ECN.
    pub fn tos(&self) -> u8 {
        self.fixed[1]
    }

    /// Don't Fragment.
    pub fn df(&self) -> bool {
        self.fixed[6] & 0x40 != 0
    }

    /// Whether it is a part of a larger packet.
    pub fn is_fragment(&self) -> bool {
        u16_at(self.fixed, 6) & 0x3fff != 0
    }

    /// Its place in the larger packet, in units of eight bytes.
    pub fn fragment_offset(&self) -> u16 {
        u16_at(self.fixed, 6) & 0x1fff
    }

    /// The protocol of the payload.
    pub fn protocol(&self) -> u8 {
        self.fixed[9]
    }

    /// Where it comes from.
    pub fn source(&self) -> Ipv4Addr {
        let [.., a, b, c, d, _, _, _, _] = *self.fixed;
        Ipv4Addr::new(a, b, c, d)
    }

    /// Where it goes.
    pub fn destination(&self) -> Ipv4Addr {
        let [.., a, b, c, d] = *self.fixed;
        Ipv4Addr::new(a, b, c, d)
    }

    /// What follows the header.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}
