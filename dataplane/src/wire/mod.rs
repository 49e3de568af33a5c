//! Views of headers. Each checks the lengths once, when it is made, and cannot panic afterwards.
//!
//! | file | reads |
//! |---|---|
//! | `ipv4.rs`, `ipv6.rs` | IP headers; IPv6 extension headers up to the upper protocol |
//! | `udp.rs` | UDP headers |
//! | `esp.rs` | ESP header, and its sizes |
//! | `head.rs` | a quick look at plain packets |
//! | `checksum.rs` | the Internet checksum, whole and incremental |
//!
//! [`Flow`] is what the SPD and the selectors want to know of an inner packet, whatever its family.

pub mod checksum;
pub mod esp;
mod head;
pub mod ipv4;
pub mod ipv6;
pub mod udp;

pub use esp::Esp;
pub use head::{Head, KeyV4, KeyV6};
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

    /// The same, as far as no look-up needs it.
    pub fn head(&self) -> Head {
        Head {
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

fn ports(protocol: u8, payload: &[u8]) -> Option<(u16, u16)> {
    if !head::has_ports(protocol) {
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

fn u128_at<const N: usize>(header: &[u8; N], at: usize) -> u128 {
    u128::from_be_bytes(array::from_fn(|i| header[at + i]))
}

#[cfg(test)]
mod tests;
