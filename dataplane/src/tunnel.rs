//! Step 7: what tunnel mode does to headers (RFC 4301 §5.1.2): the outer IP and UDP header
//! outbound, ECN inbound.
//!
//! | outer field | from |
//! |---|---|
//! | DSCP | the inner packet (RFC 4301 §5.1.2.1) |
//! | ECN | the inner packet: normal mode of RFC 6040 §4.1 |
//! | DF | [`DfPolicy`]; never for outer IPv6 |
//! | TTL, hop limit | 64 |
//! | IPv4 identification | low half of the sequence number: differs between fragments in flight (RFC 6864 §4.3) |
//! | UDP checksum | zero over IPv4 (RFC 3948 §2.1); computed over IPv6, where receivers refuse zero unless told otherwise (RFC 8200 §8.1) |

use crate::{
    Outer, PacketBuf,
    esp::encap,
    wire::{checksum, ipv4, ipv6, protocol, udp},
};
use esplane_api::{AeadSuite, DfPolicy, DropReason, OuterPath};
use std::net::IpAddr;

/// Time to live of every outer header.
const TTL: u8 = 64;
/// The longest outer header: IPv6 and UDP.
const OUTER_BYTES_MAX: usize = ipv6::HEADER_BYTES + udp::HEADER_BYTES;
/// The most that the length fields of IP can say.
const IP_PACKET_BYTES_MAX: usize = u16::MAX as usize;

/// The largest inner packet that leaves unfragmented through a path of `outer_mtu` bytes.
pub fn max_inner_bytes(outer_mtu: usize, path: &OuterPath, _suite: AeadSuite) -> usize {
    // All suites have the same sizes of IV and ICV.
    encap::payload_bytes_within(outer_mtu.saturating_sub(outer_bytes(path)))
}

/// Bytes of outer IP and UDP header.
fn outer_bytes(path: &OuterPath) -> usize {
    let ip_bytes = if path.remote().is_ipv4() {
        ipv4::HEADER_BYTES
    } else {
        ipv6::HEADER_BYTES
    };
    ip_bytes
        + if path.encap().is_some() {
            udp::HEADER_BYTES
        } else {
            0
        }
}

/// The outer side of one tunnel's packets, prepared when the table is made.
#[derive(Clone, Debug)]
pub struct OuterHeader {
    path: OuterPath,
    /// Of every packet; what differs is zero or false.
    prepared: Outer,
    copies_df: bool,
    /// IP and UDP header; what differs from packet to packet is zero.
    template: [u8; OUTER_BYTES_MAX],
    bytes: usize,
}

impl OuterHeader {
    /// For a path.
    pub fn new(path: OuterPath, df: DfPolicy) -> Self {
        let is_v4 = path.remote().is_ipv4();
        let mut header = Self {
            path,
            // RFC 4301 §8.1
            prepared: Outer {
                local: path.local(),
                remote: path.remote_socket(),
                local_port: path.encap().map_or(0, |encap| encap.local_port),
                udp: path.encap().is_some(),
                tos: 0,
                df: is_v4 && df == DfPolicy::Set,
            },
            copies_df: is_v4 && df == DfPolicy::Copy,
            template: [0; OUTER_BYTES_MAX],
            bytes: outer_bytes(&path),
        };
        let above = if path.encap().is_some() {
            protocol::UDP
        } else {
            protocol::ESP
        };
        let template = &mut header.template;
        let ip_bytes = match (path.local(), path.remote()) {
            (IpAddr::V4(local), IpAddr::V4(remote)) => {
                (template[0], template[8], template[9]) = (0x45, TTL, above);
                template[12..16].copy_from_slice(&local.octets());
                template[16..20].copy_from_slice(&remote.octets());
                ipv4::HEADER_BYTES
            }
            (local, remote) => {
                (template[0], template[6], template[7]) = (0x60, above, TTL);
                template[8..24].copy_from_slice(&octets(local));
                template[24..40].copy_from_slice(&octets(remote));
                ipv6::HEADER_BYTES
            }
        };
        if let Some(encap) = path.encap() {
            template[ip_bytes..ip_bytes + 2].copy_from_slice(&encap.local_port.to_be_bytes());
            template[ip_bytes + 2..ip_bytes + 4].copy_from_slice(&encap.remote_port.to_be_bytes());
        }
        header
    }

    /// The path.
    pub fn path(&self) -> &OuterPath {
        &self.path
    }

    /// Bytes it takes before the ESP header.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether an inner packet of this length gives an outer packet that IP can carry.
    pub fn can_carry(&self, payload_bytes: usize) -> bool {
        self.bytes + encap::sealed_bytes(payload_bytes) <= IP_PACKET_BYTES_MAX
    }

    /// Tells the driver what it needs to know of a packet, given its inner header.
    #[inline]
    pub fn fill(&self, outer: &mut Outer, tos: u8, inner_df: bool) {
        *outer = self.prepared;
        outer.tos = tos;
        outer.df |= inner_df && self.copies_df;
    }

    /// Writes the outer headers before a sealed ESP packet. `false` if its frame has no room.
    #[must_use]
    pub fn write(&self, arena: &mut [u8], packet: &mut PacketBuf, number: u64) -> bool {
        if !packet.grow(self.bytes as i32, 0) {
            return false;
        }
        let Some(whole) = arena.get_mut(packet.data_range()) else {
            return false;
        };
        whole[..self.bytes].copy_from_slice(&self.template[..self.bytes]);
        let is_v4 = self.path.remote().is_ipv4();
        if is_v4 {
            finish_ipv4(whole, &packet.outer, number);
        } else {
            finish_ipv6(whole, packet.outer.tos);
        }
        if self.path.encap().is_some() {
            let ip_bytes = self.bytes - udp::HEADER_BYTES;
            let udp_bytes = whole.len() - ip_bytes;
            whole[ip_bytes + 4..ip_bytes + 6].copy_from_slice(&(udp_bytes as u16).to_be_bytes());
            if !is_v4 {
                let sum = self.udp_checksum(&whole[ip_bytes..]);
                whole[ip_bytes + 6..ip_bytes + 8].copy_from_slice(&sum.to_be_bytes());
            }
        }
        true
    }

    fn udp_checksum(&self, datagram: &[u8]) -> u16 {
        let (local, remote) = (self.path.local(), self.path.remote());
        let sum = checksum::pseudo_header(local, remote, protocol::UDP, datagram.len());
        match checksum::finish(checksum::add(sum, datagram)) {
            0 => 0xffff, // RFC 768: zero would say that there is none
            sum => sum,
        }
    }
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn finish_ipv4(whole: &mut [u8], outer: &Outer, number: u64) {
    let total_bytes = whole.len() as u16;
    whole[1] = outer.tos;
    whole[2..4].copy_from_slice(&total_bytes.to_be_bytes());
    whole[4..6].copy_from_slice(&(number as u16).to_be_bytes());
    whole[6] = if outer.df { 0x40 } else { 0 };
    let sum = checksum::finish(checksum::add(0, &whole[..ipv4::HEADER_BYTES]));
    whole[10..12].copy_from_slice(&sum.to_be_bytes());
}

fn finish_ipv6(whole: &mut [u8], tos: u8) {
    let payload_bytes = (whole.len() - ipv6::HEADER_BYTES) as u16;
    whole[0] = 0x60 | tos >> 4;
    whole[1] = tos << 4;
    whole[4..6].copy_from_slice(&payload_bytes.to_be_bytes());
}

/// The ECN field, two bits (RFC 3168 §5).
mod ecn {
    pub const MASK: u8 = 0b11;
    pub const NOT_ECT: u8 = 0b00;
    pub const ECT_1: u8 = 0b01;
    pub const CE: u8 = 0b11;
}

/// The inner ECN field after decapsulation (RFC 6040 §4.2, figure 4):
///
/// | inner ＼ outer | Not-ECT | ECT(0) | ECT(1) | CE |
/// |---|---|---|---|---|
/// | Not-ECT | Not-ECT | Not-ECT | Not-ECT | dropped |
/// | ECT(0) | ECT(0) | ECT(0) | ECT(1) | CE |
/// | ECT(1) | ECT(1) | ECT(1) | ECT(1) | CE |
/// | CE | CE | CE | CE | CE |
pub fn decapsulated_ecn(inner_tos: u8, outer_tos: u8) -> Result<u8, DropReason> {
    let (inner, outer) = (inner_tos & ecn::MASK, outer_tos & ecn::MASK);
    match (inner, outer) {
        (ecn::NOT_ECT, ecn::CE) => Err(DropReason::CongestionLost),
        (ecn::NOT_ECT | ecn::CE, _) => Ok(inner),
        (_, ecn::CE | ecn::ECT_1) => Ok(outer),
        _ => Ok(inner),
    }
}

/// Carries the outer ECN field over into a decrypted packet, whose checksum stays right.
#[inline]
pub fn carry_ecn(inner: &mut [u8], inner_tos: u8, outer_tos: u8) -> Result<(), DropReason> {
    let ecn = decapsulated_ecn(inner_tos, outer_tos)?;
    if ecn == inner_tos & ecn::MASK {
        return Ok(());
    }
    match inner {
        [version, tos, rest @ ..] if *version >> 4 == 4 && rest.len() >= ipv4::HEADER_BYTES - 2 => {
            let old = u16::from_be_bytes([*version, *tos]);
            *tos = *tos & !ecn::MASK | ecn;
            let new = u16::from_be_bytes([*version, *tos]);
            let sum = checksum::update(u16::from_be_bytes([rest[8], rest[9]]), old, new);
            rest[8..10].copy_from_slice(&sum.to_be_bytes());
        }
        [version, class, ..] if *version >> 4 == 6 => {
            *class = *class & !(ecn::MASK << 4) | ecn << 4
        }
        _ => {}
    }
    Ok(())
}
