//! The plain parts of a packet, read without taking it apart: enough to see that it belongs to the same flow as the one
//! before, which saves the whole look-up. [`Flow`](super::Flow) looks closer.

use super::{ipv4, ipv6, protocol, u16_at, u32_at, u64_at, u128_at};

/// What every packet says of itself, whatever its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Type of Service or Traffic Class.
    pub tos: u8,
    /// Don't Fragment; never set in IPv6.
    pub df: bool,
    /// What ESP calls it: 4 or 41.
    pub next_header: u8,
    /// Length by its own header.
    pub total_bytes: usize,
}

/// Addresses, protocol and ports of a plain IPv4 packet. Equal for two packets only if every selector sees both alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyV4 {
    addresses: u64,
    above: u64,
}

/// The same of a plain IPv6 packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyV6 {
    source: u128,
    destination: u128,
    above: u64,
}

impl KeyV4 {
    /// No packet's.
    pub(crate) const NONE: Self = Self {
        addresses: 0,
        above: 0,
    };

    /// `None` for packets with options or fragmentation, of protocols without ports, and for malformed ones.
    #[inline(always)]
    pub fn parse(packet: &[u8]) -> Option<(Self, Head)> {
        let fixed = packet.first_chunk::<{ ipv4::HEADER_BYTES + 4 }>()?;
        let total_bytes = usize::from(u16_at(fixed, 2));
        let plain = fixed[0] == 0x45
            && u16_at(fixed, 6) & 0x3fff == 0
            && (fixed.len()..=packet.len()).contains(&total_bytes)
            && has_ports(fixed[9]);
        let key = Self {
            addresses: u64_at(fixed, 12),
            above: above(fixed[9], u32_at(fixed, 20)),
        };
        let head = Head {
            tos: fixed[1],
            df: fixed[6] & 0x40 != 0,
            next_header: protocol::IPV4,
            total_bytes,
        };
        plain.then_some((key, head))
    }

    pub(crate) fn ends(&self) -> (u32, u32) {
        ((self.addresses >> 32) as u32, self.addresses as u32)
    }

    pub(crate) fn above(&self) -> (u8, u16, u16) {
        protocol_and_ports(self.above)
    }
}

impl KeyV6 {
    /// No packet's.
    pub(crate) const NONE: Self = Self {
        source: 0,
        destination: 0,
        above: 0,
    };

    /// `None` for packets with extension headers, of protocols without ports, and for malformed ones.
    #[inline(always)]
    pub fn parse(packet: &[u8]) -> Option<(Self, Head)> {
        let fixed = packet.first_chunk::<{ ipv6::HEADER_BYTES + 4 }>()?;
        let total_bytes = ipv6::HEADER_BYTES + usize::from(u16_at(fixed, 4));
        let plain = fixed[0] >> 4 == 6
            && (fixed.len()..=packet.len()).contains(&total_bytes)
            && has_ports(fixed[6]);
        let key = Self {
            source: u128_at(fixed, 8),
            destination: u128_at(fixed, 24),
            above: above(fixed[6], u32_at(fixed, 40)),
        };
        let head = Head {
            tos: fixed[0] << 4 | fixed[1] >> 4,
            df: false,
            next_header: protocol::IPV6,
            total_bytes,
        };
        plain.then_some((key, head))
    }

    pub(crate) fn ends(&self) -> (u128, u128) {
        (self.source, self.destination)
    }

    pub(crate) fn above(&self) -> (u8, u16, u16) {
        protocol_and_ports(self.above)
    }
}

/// Protocol and ports in one word; the protocols that have ports are not 0.
fn above(protocol: u8, ports: u32) -> u64 {
    u64::from(protocol) << 32 | u64::from(ports)
}

fn protocol_and_ports(above: u64) -> (u8, u16, u16) {
    ((above >> 32) as u8, (above >> 16) as u16, above as u16)
}

/// TCP, UDP, DCCP, SCTP and UDP-Lite: ports are the first four bytes.
#[inline]
pub(super) fn has_ports(protocol: u8) -> bool {
    matches!(protocol, 6 | 17 | 33 | 132 | 136)
}
