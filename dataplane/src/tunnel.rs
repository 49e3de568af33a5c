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
    /// IP and UDP header; what differs from packet to packet is zero. They end where this ends, as in a packet they end
    /// where ESP begins: so all four kinds are written alike.
    template: [u8; OUTER_BYTES_MAX],
    bytes: usize,
    /// The largest inner packet that IP can still carry.
    payload_bytes_max: usize,
    is_v4: bool,
    udp: bool,
    copies_df: bool,
    /// Checksum of the template's IPv4 header, not folded yet.
    template_sum: u64,
    /// Of every packet; what differs is zero or false.
    prepared: Outer,
    path: OuterPath,
}

impl OuterHeader {
    /// For a path.
    pub fn new(path: OuterPath, df: DfPolicy) -> Self {
        let is_v4 = path.remote().is_ipv4();
        let udp = path.encap().is_some();
        let bytes = outer_bytes(&path);
        let mut template = [0; OUTER_BYTES_MAX];
        let place = &mut template[OUTER_BYTES_MAX - bytes..];
        let above = if udp { protocol::UDP } else { protocol::ESP };
        let (ip, ports) = match (path.local(), path.remote()) {
            (IpAddr::V4(local), IpAddr::V4(remote)) => {
                let (ip, ports) = place.split_at_mut(ipv4::HEADER_BYTES);
                (ip[0], ip[8], ip[9]) = (0x45, TTL, above);
                ip[12..16].copy_from_slice(&local.octets());
                ip[16..20].copy_from_slice(&remote.octets());
                (ip, ports)
            }
            (local, remote) => {
                let (ip, ports) = place.split_at_mut(ipv6::HEADER_BYTES);
                (ip[0], ip[6], ip[7]) = (0x60, above, TTL);
                ip[8..24].copy_from_slice(&octets(local));
                ip[24..40].copy_from_slice(&octets(remote));
                (ip, ports)
            }
        };
        let template_sum = checksum::add(0, ip);
        if let Some(encap) = path.encap() {
            ports[..2].copy_from_slice(&encap.local_port.to_be_bytes());
            ports[2..4].copy_from_slice(&encap.remote_port.to_be_bytes());
        }
        Self {
            template,
            bytes,
            payload_bytes_max: encap::payload_bytes_within(IP_PACKET_BYTES_MAX - bytes),
            is_v4,
            udp,
            // RFC 4301 §8.1
            copies_df: is_v4 && df == DfPolicy::Copy,
            template_sum,
            prepared: Outer {
                local: path.local(),
                remote: path.remote_socket(),
                local_port: path.encap().map_or(0, |encap| encap.local_port),
                udp,
                tos: 0,
                df: is_v4 && df == DfPolicy::Set,
            },
            path,
        }
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
    #[inline]
    pub fn can_carry(&self, payload_bytes: usize) -> bool {
        payload_bytes <= self.payload_bytes_max
    }

    /// What the driver needs to know of its packets, but for TOS and DF.
    pub fn outer(&self) -> &Outer {
        &self.prepared
    }

    /// Whether a packet has DF outside, given its inner header's.
    #[inline]
    pub fn df(&self, inner: bool) -> bool {
        self.prepared.df | inner & self.copies_df
    }

    /// Writes the outer headers before an ESP packet, sealed or not; its data grows by them. Its frame must have room
    /// ([`encap::has_room`]); `false` if the arena has not. What sums up the sealed packet is left to
    /// [`OuterHeader::sum_up`].
    #[inline]
    #[must_use]
    pub fn write(&self, arena: &mut [u8], packet: &mut PacketBuf, number: u64) -> bool {
        let (esp, headroom) = (packet.data_range(), packet.headroom());
        let (Some(start), true) = (esp.start.checked_sub(self.bytes), self.bytes <= headroom)
        else {
            return false;
        };
        packet.set_edges(start as u32, esp.end as u32);
        let total_bytes = (esp.end - start) as u16;
        // The headroom before the headers is nobody's: where there is enough, one copy of fixed size does.
        if headroom >= OUTER_BYTES_MAX {
            let place = arena.get_mut(esp.start - OUTER_BYTES_MAX..esp.start);
            let Some(place) = place.and_then(|place| place.first_chunk_mut()) else {
                return false;
            };
            self.fill_in(
                place,
                total_bytes,
                packet.outer_tos,
                packet.outer_df,
                number,
            );
            return true;
        }
        let mut headers = [0; OUTER_BYTES_MAX];
        self.fill_in(
            &mut headers,
            total_bytes,
            packet.outer_tos,
            packet.outer_df,
            number,
        );
        let place = arena.get_mut(start..esp.start);
        place
            .map(|place| place.copy_from_slice(&headers[OUTER_BYTES_MAX - self.bytes..]))
            .is_some()
    }

    /// The template with what differs. Fields lie at fixed places, counted from where ESP begins.
    #[inline]
    fn fill_in(
        &self,
        headers: &mut [u8; OUTER_BYTES_MAX],
        total_bytes: u16,
        tos: u8,
        df: bool,
        number: u64,
    ) {
        *headers = self.template;
        match (self.is_v4, self.udp) {
            (true, true) => {
                put(headers, 4, total_bytes - ipv4::HEADER_BYTES as u16);
                self.finish_ipv4::<{ ipv4::HEADER_BYTES + udp::HEADER_BYTES }>(
                    headers,
                    total_bytes,
                    tos,
                    df,
                    number,
                );
            }
            (true, false) => {
                self.finish_ipv4::<{ ipv4::HEADER_BYTES }>(headers, total_bytes, tos, df, number);
            }
            (false, true) => {
                put(headers, 4, total_bytes - ipv6::HEADER_BYTES as u16);
                finish_ipv6::<{ ipv6::HEADER_BYTES + udp::HEADER_BYTES }>(
                    headers,
                    total_bytes,
                    tos,
                );
            }
            (false, false) => finish_ipv6::<{ ipv6::HEADER_BYTES }>(headers, total_bytes, tos),
        }
    }

    /// Whether [`OuterHeader::sum_up`] has anything to do.
    #[inline]
    pub fn has_sum(&self) -> bool {
        self.udp && !self.is_v4
    }

    /// Writes the UDP checksum over IPv6 of a sealed packet.
    pub fn sum_up(&self, whole: &mut [u8]) {
        if self.has_sum()
            && let Some(datagram) = whole.get_mut(ipv6::HEADER_BYTES..)
            && datagram.len() >= udp::HEADER_BYTES
        {
            let sum = self.udp_checksum(datagram);
            datagram[6..8].copy_from_slice(&sum.to_be_bytes());
        }
    }

    fn udp_checksum(&self, datagram: &[u8]) -> u16 {
        let (local, remote) = (self.path.local(), self.path.remote());
        let sum = checksum::pseudo_header(local, remote, protocol::UDP, datagram.len());
        match checksum::finish(checksum::add(sum, datagram)) {
            0 => 0xffff, // RFC 768: zero would say that there is none
            sum => sum,
        }
    }

    /// IPv4 begins `BEFORE` bytes before ESP.
    #[inline]
    fn finish_ipv4<const BEFORE: usize>(
        &self,
        headers: &mut [u8; OUTER_BYTES_MAX],
        total_bytes: u16,
        tos: u8,
        df: bool,
        number: u64,
    ) {
        let (identification, flags) = (number as u16, u16::from(df) << 14);
        let words = [u16::from(tos), total_bytes, identification, flags];
        let sum = words.into_iter().map(u64::from).sum::<u64>() + self.template_sum;
        headers[OUTER_BYTES_MAX - BEFORE + 1] = tos;
        put(headers, BEFORE - 2, total_bytes);
        put(headers, BEFORE - 4, identification);
        put(headers, BEFORE - 6, flags);
        put(headers, BEFORE - 10, checksum::finish(sum));
    }
}

/// IPv6 begins `BEFORE` bytes before ESP.
#[inline]
fn finish_ipv6<const BEFORE: usize>(
    headers: &mut [u8; OUTER_BYTES_MAX],
    total_bytes: u16,
    tos: u8,
) {
    put(headers, BEFORE, 0x6000 | u16::from(tos) << 4);
    put(headers, BEFORE - 4, total_bytes - ipv6::HEADER_BYTES as u16);
}

/// Writes a field that begins `before` bytes before ESP.
#[inline]
fn put(headers: &mut [u8; OUTER_BYTES_MAX], before: usize, value: u16) {
    let at = OUTER_BYTES_MAX - before;
    [headers[at], headers[at + 1]] = value.to_be_bytes();
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The ECN field, two bits (RFC 3168 §5).
mod ecn {
    pub const MASK: u8 = 0b11;
    pub const NOT_ECT: u8 = 0b00;
    pub const ECT_1: u8 = 0b01;
    pub const ECT_0: u8 = 0b10;
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
    if matches!(outer_tos & ecn::MASK, ecn::NOT_ECT | ecn::ECT_0) {
        return Ok(()); // as nearly always: the inner field stays
    }
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
