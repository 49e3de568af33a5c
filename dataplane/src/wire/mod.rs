//! Views of headers. Each checks the lengths once, when it is made, and cannot panic afterwards.
//!
//! | file | reads |
//! |---|---|
//! | `ipv4.rs`, `ipv6.rs` | IP headers; IPv6 extension headers up to the upper protocol |
//! | `udp.rs` | UDP headers |
//! | `esp.rs` | ESP header, and its sizes |
//! | `checksum.rs` | the Internet checksum, whole and incremental |
//!
//! [`Flow`] is what the SPD and the selectors want to know of an inner packet, whatever its family.

pub mod checksum;
pub mod esp;
pub mod ipv4;
pub mod ipv6;
pub mod udp;

pub use esp::Esp;
pub use ipv4::Ipv4;
pub use ipv6::Ipv6;
pub use udp::Udp;

use std::{array, net::IpAddr};

/// Protocol numbers (IANA) that the dataplane itself knows.
pub mod protocol {
    /// IPv4 within IP or ESP.
    pub const IPV4: u8 = 4;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 within IP or ESP.
    pub const IPV6: u8 = 41;
    /// ESP.
    pub const ESP: u8 = 50;
    /// Nothing follows; in ESP a dummy packet (RFC 4303 §2.6).
    pub const NO_NEXT_HEADER: u8 = 59;
}

/// An inner packet as selectors see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it goes.
    pub destination: IpAddr,
    /// The protocol above IP and its extension headers.
    pub protocol: u8,
    /// Source and destination port, where the protocol has them and the packet shows them.
    pub ports: Option<(u16, u16)>,
    /// Type of Service or Traffic Class.
    pub tos: u8,
    /// Don't Fragment; never set in IPv6.
    pub df: bool,
    /// Length by its own header; what lies behind is no part of it.
    pub total_bytes: usize,
}

impl Flow {
    /// Of a whole IP packet. `None` if it is none, or its lengths contradict each other.
    #[inline]
    pub fn parse(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => {
                let ip = Ipv4::parse(packet)?;
                Some(Self {
                    source: ip.source().into(),
                    destination: ip.destination().into(),
                    protocol: ip.protocol(),
                    // RFC 4301 §4.4.1.1: later fragments show no ports.
                    ports: (ip.fragment_offset() == 0)
                        .then(|| ports(ip.protocol(), ip.payload()))
                        .flatten(),
                    tos: ip.tos(),
                    df: ip.df(),
                    total_bytes: ip.total_bytes(),
                })
            }
            6 => {
                let ip = Ipv6::parse(packet)?;
                let upper = ip.upper()?;
                Some(Self {
                    source: ip.source().into(),
                    destination: ip.destination().into(),
                    protocol: upper.protocol,
                    ports: ports(upper.protocol, upper.payload),
                    tos: ip.traffic_class(),
                    df: false,
                    total_bytes: ip.total_bytes(),
                })
            }
            _ => None,
        }
    }

    /// The same, as far as it needs no look-up; its key is no flow's.
    pub fn head(&self) -> Head {
        Head {
            key: FlowKey::NONE,
            tos: self.tos,
            df: self.df,
            total_bytes: self.total_bytes,
            next_header: self.next_header(),
        }
    }

    /// What ESP calls it: 4 or 41.
    pub fn next_header(&self) -> u8 {
        if self.source.is_ipv4() {
            protocol::IPV4
        } else {
            protocol::IPV6
        }
    }
}

/// The plain parts of a packet, read without taking it apart: enough to see that it belongs to the same flow as the
/// one before, which saves the whole look-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Equal for two packets only if every selector sees both alike.
    pub key: FlowKey,
    /// Type of Service or Traffic Class.
    pub tos: u8,
    /// Don't Fragment; never set in IPv6.
    pub df: bool,
    /// Length by its own header.
    pub total_bytes: usize,
    /// What ESP calls it: 4 or 41.
    pub next_header: u8,
}

/// Addresses, protocol and ports.
#[derive(Clone, Copy, Debug, Eq)]
pub struct FlowKey([u64; 5]);

impl FlowKey {
    /// No flow's.
    pub(crate) const NONE: Self = Self([0; 5]);

    #[inline]
    pub(crate) fn is_ipv4(&self) -> bool {
        self.0[4] as u8 == 4
    }

    pub(crate) fn protocol(&self) -> u8 {
        (self.0[4] >> 8) as u8
    }

    /// Source port above, destination port below.
    pub(crate) fn ports(&self) -> u32 {
        (self.0[4] >> 16) as u32
    }

    /// Source and destination, if it is IPv4.
    pub(crate) fn v4(&self) -> (u32, u32) {
        ((self.0[0] >> 32) as u32, self.0[0] as u32)
    }

    /// Source and destination, if it is IPv6.
    pub(crate) fn v6(&self) -> (u128, u128) {
        let [a, b, c, d, _] = self.0.map(u128::from);
        (a << 64 | b, c << 64 | d)
    }
}

impl PartialEq for FlowKey {
    /// Word by word in registers; derived, it would be a call of `memcmp`. Packets of one family share the last word's
    /// version, and IPv4 has nothing in the words between.
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        let differs = |at: usize| self.0[at] ^ other.0[at];
        differs(0) | differs(4) == 0
            && (self.is_ipv4() || differs(1) | differs(2) | differs(3) == 0)
    }
}

impl Head {
    /// `None` for packets with options, extension headers or fragmentation, of protocols without ports, and for malformed
    /// ones: [`Flow::parse`] looks closer.
    #[inline]
    pub fn parse(packet: &[u8]) -> Option<Self> {
        if let Some(fixed) = packet.first_chunk::<{ ipv4::HEADER_BYTES + 4 }>()
            && fixed[0] == 0x45
        {
            let total_bytes = usize::from(u16_at(fixed, 2));
            let whole = u16_at(fixed, 6) & 0x3fff == 0
                && (fixed.len()..=packet.len()).contains(&total_bytes);
            return (whole && has_ports(fixed[9])).then(|| Self {
                key: FlowKey([
                    u64_at(fixed, 12),
                    0,
                    0,
                    0,
                    above(fixed[9], u32_at(fixed, 20), 4),
                ]),
                tos: fixed[1],
                df: fixed[6] & 0x40 != 0,
                total_bytes,
                next_header: protocol::IPV4,
            });
        }
        let fixed = packet.first_chunk::<{ ipv6::HEADER_BYTES + 4 }>()?;
        let total_bytes = ipv6::HEADER_BYTES + usize::from(u16_at(fixed, 4));
        let whole = fixed[0] >> 4 == 6 && (fixed.len()..=packet.len()).contains(&total_bytes);
        (whole && has_ports(fixed[6])).then(|| Self {
            key: FlowKey([
                u64_at(fixed, 8),
                u64_at(fixed, 16),
                u64_at(fixed, 24),
                u64_at(fixed, 32),
                above(fixed[6], u32_at(fixed, 40), 6),
            ]),
            tos: fixed[0] << 4 | fixed[1] >> 4,
            df: false,
            total_bytes,
            next_header: protocol::IPV6,
        })
    }
}

/// Protocol, ports and IP version in one word.
fn above(protocol: u8, ports: u32, version: u8) -> u64 {
    u64::from(ports) << 16 | u64::from(protocol) << 8 | u64::from(version)
}

fn has_ports(protocol: u8) -> bool {
    matches!(protocol, 6 | 17 | 33 | 132 | 136)
}

/// The ports of TCP, UDP, DCCP, SCTP and UDP-Lite: the first four bytes.
fn ports(protocol: u8, payload: &[u8]) -> Option<(u16, u16)> {
    if !has_ports(protocol) {
        return None;
    }
    let [a, b, c, d] = *payload.first_chunk()?;
    Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
}

/// The big-endian 16-bit field at a fixed place of a fixed-size header.
pub(crate) fn u16_at<const N: usize>(header: &[u8; N], at: usize) -> u16 {
    u16::from_be_bytes([header[at], header[at + 1]])
}

pub(crate) fn u32_at<const N: usize>(header: &[u8; N], at: usize) -> u32 {
    u32::from_be_bytes(array::from_fn(|i| header[at + i]))
}

pub(crate) fn u64_at<const N: usize>(header: &[u8; N], at: usize) -> u64 {
    u64::from_be_bytes(array::from_fn(|i| header[at + i]))
}

#[cfg(test)]
mod tests;
