//! Super-packets: many packets of one flow that the kernel hands over, or takes, as one.
//!
//! ```text
//!   TUN read ─▶ vnet header │ IP │ TCP │ 60,000 bytes ────── split.rs ──────▶ IP │ TCP │ 1360 bytes
//!                                                                             IP │ TCP │ 1360 bytes
//!                                                                             …
//!   TUN write ◀ vnet header │ IP │ TCP │ the payloads ◀───── coalesce.rs ──── what came out of the tunnel
//! ```
//!
//! Pure: bytes in, bytes out. Everything is bounded by the lengths of the slices; what the bytes say is
//! checked once, before they are believed. `checksum.rs` has the Internet checksum.
#![deny(unsafe_code)] // but for wide registers in the checksum

#[allow(unsafe_code)]
pub(in crate::io) mod checksum;
pub(in crate::io) mod coalesce;
pub(in crate::io) mod split;
#[cfg(test)]
mod tests;

/// Bytes of a virtio_net_hdr without the number of buffers.
pub(in crate::io) const VNET_BYTES: usize = 10;
/// IPv4 and TCP header, both with as many options as there can be.
pub(in crate::io) const HEADERS_MAX: usize = 60 + 60;

const TCP: u8 = 6;
const UDP: u8 = 17;
const IPV6_HEADER_BYTES: usize = 40;
const IPV4_HEADER_BYTES: usize = 20;
/// Where the checksum is within its header.
const TCP_CHECKSUM_AT: usize = 16;
const UDP_CHECKSUM_AT: usize = 6;
const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_ACK: u8 = 0x10;
const TCP_CWR: u8 = 0x80;

/// What a super-packet is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::io) enum Kind {
    /// TCP in IPv4.
    Tcp4,
    /// TCP in IPv6.
    Tcp6,
    /// UDP in either.
    Udp,
}

/// The virtio_net_hdr (linux/virtio_net.h) before each packet. In the byte order of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::io) struct VnetHeader {
    /// The checksum is to be finished from `checksum_start` on.
    pub(in crate::io) needs_checksum: bool,
    /// What to split, if the packet is to be split.
    pub(in crate::io) kind: Option<Kind>,
    /// Bytes of all headers: a hint.
    pub(in crate::io) header_bytes: u16,
    /// Payload bytes of each packet but the last.
    pub(in crate::io) segment_bytes: u16,
    /// Where the bytes start that the checksum covers: at the TCP or UDP header.
    pub(in crate::io) checksum_start: u16,
    /// Where the checksum is, from there.
    pub(in crate::io) checksum_offset: u16,
}

const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
const GSO_UDP: u8 = 5;
/// The first packet has TCP's CWR flag, which is in the packet anyway.
const GSO_ECN: u8 = 0x80;

impl VnetHeader {
    /// `None`: a kind that was not asked for.
    pub(in crate::io) fn parse(bytes: &[u8; VNET_BYTES]) -> Option<Self> {
        let kind = match bytes[1] & !GSO_ECN {
            GSO_NONE => None,
            GSO_TCP4 => Some(Kind::Tcp4),
            GSO_TCP6 => Some(Kind::Tcp6),
            GSO_UDP => Some(Kind::Udp),
            _ => return None,
        };
        let u16_at = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Some(Self {
            needs_checksum: bytes[0] & NEEDS_CHECKSUM != 0,
            kind,
            header_bytes: u16_at(2),
            segment_bytes: u16_at(4),
            checksum_start: u16_at(6),
            checksum_offset: u16_at(8),
        })
    }

    pub(in crate::io) fn to_bytes(self) -> [u8; VNET_BYTES] {
        let mut bytes = [0; VNET_BYTES];
        bytes[0] = if self.needs_checksum {
            NEEDS_CHECKSUM
        } else {
            0
        };
        bytes[1] = match self.kind {
            None => GSO_NONE,
            Some(Kind::Tcp4) => GSO_TCP4,
            Some(Kind::Tcp6) => GSO_TCP6,
            Some(Kind::Udp) => GSO_UDP,
        };
        let words = [
            self.header_bytes,
            self.segment_bytes,
            self.checksum_start,
            self.checksum_offset,
        ];
        for (to, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// The big-endian number at `at`; the caller has checked the length.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Writes the lower 16 bits of a length; the caller has checked that it has no more.
fn set_u16(bytes: &mut [u8], at: usize, value: usize) {
    bytes[at..at + 2].copy_from_slice(&(value as u16).to_be_bytes());
}
