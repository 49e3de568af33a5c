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
    Outer,
    esp::encap,
    wire::{
        checksum,
        esp::{self, BEFORE_PAYLOAD_BYTES},
        ipv4, ipv6, protocol, udp,
    },
};
use esplane_api::{AeadSuite, DfPolicy, DropReason, OuterPath, Spi};
use std::net::IpAddr;

/// Time to live of every outer header.
const TTL: u8 = 64;
/// The longest outer header: IPv6 and UDP.
const OUTER_BYTES_MAX: usize = V6_UDP;
/// Bytes of outer headers and ESP header, at most: a cache line.
pub const BEFORE_BYTES: usize = OUTER_BYTES_MAX + BEFORE_PAYLOAD_BYTES;

/// Bytes of each kind of outer headers; they tell the kinds apart.
pub const BY_KERNEL: usize = 0;
/// IPv4 alone.
pub const V4: usize = ipv4::HEADER_BYTES;
/// IPv4 and UDP.
pub const V4_UDP: usize = ipv4::HEADER_BYTES + udp::HEADER_BYTES;
/// IPv6 alone.
pub const V6: usize = ipv6::HEADER_BYTES;
/// IPv6 and UDP.
pub const V6_UDP: usize = ipv6::HEADER_BYTES + udp::HEADER_BYTES;
/// The most that the length fields of IP can say.
const IP_PACKET_BYTES_MAX: usize = u16::MAX as usize;

/// The largest inner packet that leaves unfragmented through a path of `outer_mtu` bytes.
pub fn max_inner_bytes(outer_mtu: usize, path: &OuterPath, _suite: AeadSuite) -> usize {
    // All suites have the same sizes of IV and ICV.
    encap::payload_bytes_within(outer_mtu.saturating_sub(outer_bytes(path)))
}

/// Bytes of outer IP and UDP header.
fn outer_bytes(path: &OuterPath) -> usize {
    match (path.remote().is_ipv4(), path.encap().is_some()) {
        (true, false) => V4,
        (true, true) => V4_UDP,
        (false, false) => V6,
        (false, true) => V6_UDP,
    }
}

/// All that lies before the payload of one tunnel's packets, prepared when the table is made.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct OuterHeader {
    /// IP, UDP and ESP header; what differs from packet to packet is zero. They end where this ends, as in a packet they
    /// end where the payload begins: so all kinds are written alike.
    template: [u8; BEFORE_BYTES],
    /// Checksum of the template's IPv4 header, not folded yet.
    template_sum: u32,
    bytes: u16,
    /// The largest inner packet that IP can still carry.
    payload_bytes_max: u16,
    copies_df: bool,
    /// Of every packet; what differs is zero or false.
    prepared: Outer,
    path: OuterPath,
}

/// What differs between outer headers of one tunnel.
#[derive(Clone, Copy, Debug)]
pub struct Outside {
    /// The sequence number.
    pub number: u64,
    /// From the first header to the ICV.
    pub total_bytes: usize,
    /// Type of Service or Traffic Class.
    pub tos: u8,
    /// Don't Fragment.
    pub df: bool,
}

impl OuterHeader {
    /// For a path, and the SPI of what is sent along it.
    pub fn new(path: OuterPath, df: DfPolicy, spi: Spi) -> Self {
        let is_v4 = path.remote().is_ipv4();
        let udp = path.encap().is_some();
        let bytes = outer_bytes(&path);
        let mut template = [0; BEFORE_BYTES];
        template[OUTER_BYTES_MAX..][..4].copy_from_slice(&spi.get().to_be_bytes());
        let place = &mut template[OUTER_BYTES_MAX - bytes..OUTER_BYTES_MAX];
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
        let template_sum = checksum::add(0, ip) as u32; // ten words of 16 bits, or twenty
        if let Some(encap) = path.encap() {
            ports[..2].copy_from_slice(&encap.local_port.to_be_bytes());
            ports[2..4].copy_from_slice(&encap.remote_port.to_be_bytes());
        }
        Self {
            template,
            bytes: bytes as u16,
            payload_bytes_max: encap::payload_bytes_within(IP_PACKET_BYTES_MAX - bytes) as u16,
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
    #[inline]
    pub fn bytes(&self) -> usize {
        self.bytes.into()
    }

    /// Whether an inner packet of this length gives an outer packet that IP can carry.
    #[inline]
    pub fn can_carry(&self, payload_bytes: usize) -> bool {
        payload_bytes <= self.payload_bytes_max.into()
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

    /// Writes what lies before a payload: the ESP header, and `HEADERS` bytes of outer headers before it. The rest of
    /// `before` is nobody's. What sums up the sealed packet is left to [`OuterHeader::sum_up`].
    #[inline]
    pub fn write<const HEADERS: usize>(&self, before: &mut [u8; BEFORE_BYTES], outside: Outside) {
        let Outside {
            number,
            total_bytes,
            tos,
            df,
        } = outside;
        *before = self.template;
        let (ip, total_bytes) = (OUTER_BYTES_MAX - HEADERS, total_bytes as u16);
        if HEADERS == V4 || HEADERS == V4_UDP {
            let (identification, flags) = (number as u16, u16::from(df) << 14);
            let words = [u16::from(tos), total_bytes, identification, flags];
            let sum = words.into_iter().map(u32::from).sum::<u32>() + self.template_sum;
            let [a, b, c, d] = words.map(u64::from);
            put(before, ip, (0x4500 | a) << 48 | b << 32 | c << 16 | d);
            [before[ip + 10], before[ip + 11]] = checksum::finish_short(sum).to_be_bytes();
        }
        if HEADERS == V6 || HEADERS == V6_UDP {
            let payload_bytes = u64::from(total_bytes) - ipv6::HEADER_BYTES as u64;
            let next_header = if HEADERS == V6 {
                protocol::ESP
            } else {
                protocol::UDP
            };
            let fixed = u64::from(next_header) << 8 | u64::from(TTL);
            put(
                before,
                ip,
                0x6 << 60 | u64::from(tos) << 52 | payload_bytes << 16 | fixed,
            );
        }
        if HEADERS == V4_UDP || HEADERS == V6_UDP {
            let bytes = total_bytes - (HEADERS - udp::HEADER_BYTES) as u16;
            let at = OUTER_BYTES_MAX - udp::HEADER_BYTES + 4;
            [before[at], before[at + 1]] = bytes.to_be_bytes();
        }
        // RFC 4303 §2.2: the low half of the number. RFC 4106 §3.1, RFC 7634 §2: any IV that never comes twice; the number
        // never does.
        let low = &mut before[OUTER_BYTES_MAX + 4..][..4];
        low.copy_from_slice(&(number as u32).to_be_bytes());
        put(before, OUTER_BYTES_MAX + esp::HEADER_BYTES, number);
    }

    /// Whether [`OuterHeader::sum_up`] has anything to do.
    #[inline]
    pub fn has_sum(&self) -> bool {
        self.bytes() == V6_UDP
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
}

#[inline]
fn put(before: &mut [u8; BEFORE_BYTES], at: usize, value: u64) {
    before[at..at + 8].copy_from_slice(&value.to_be_bytes());
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
