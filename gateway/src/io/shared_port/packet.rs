//! A datagram as it came over the network: checked as the kernel checks its own copy.

use crate::io::offload::checksum;
use esplane_dataplane::batch::Outer;
use std::{
    net::{IpAddr, SocketAddr},
    ops::Range,
};

const IPV4_HEADER_BYTES: usize = 20;
const IPV6_HEADER_BYTES: usize = 40;
const UDP_HEADER_BYTES: usize = 8;
const UDP: u8 = 17;

/// Finds the payload of a UDP datagram in an IP packet, which may have padding behind it. `None` if lengths
/// contradict each other, if it is a fragment, or if a checksum is wrong; UDP's is not looked at if `trusted`: the
/// card has checked it, or the packet has not left this machine.
pub(super) fn parse(packet: &[u8], trusted: bool) -> Option<(Outer, Range<usize>)> {
    let ip = match packet.first()? >> 4 {
        4 => ipv4(packet)?,
        6 => ipv6(packet)?,
        _ => return None,
    };
    let udp = packet.get(ip.payload.clone())?;
    let header = udp.first_chunk::<UDP_HEADER_BYTES>()?;
    let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    let bytes = usize::from(word(4));
    let datagram = udp.get(..bytes)?;
    // RFC 768: zero is none. RFC 8200 §8.1: IPv6 has one.
    let checked = match word(6) {
        0 => packet[0] >> 4 == 4,
        _ if trusted => true,
        _ => {
            let ipv4 = packet[0] >> 4 == 4;
            let sum = checksum::pseudo(packet, ipv4, UDP, bytes);
            checksum::is_right(checksum::add(sum, datagram))
        }
    };
    if !checked || bytes < UDP_HEADER_BYTES {
        return None;
    }
    let outer = Outer {
        local: ip.destination,
        remote: SocketAddr::new(ip.source, word(0)),
        local_port: word(2),
        udp: true,
        tos: ip.tos,
        df: ip.df,
    };
    let start = ip.payload.start;
    Some((outer, start + UDP_HEADER_BYTES..start + bytes))
}

struct Ip {
    source: IpAddr,
    destination: IpAddr,
    tos: u8,
    df: bool,
    payload: Range<usize>,
}

fn ipv4(packet: &[u8]) -> Option<Ip> {
    let header = packet.first_chunk::<IPV4_HEADER_BYTES>()?;
    let header_bytes = usize::from(header[0] & 0x0f) * 4;
    let total_bytes = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let whole = packet.get(..header_bytes)?;
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
    if header_bytes < IPV4_HEADER_BYTES
        || total_bytes < header_bytes
        || total_bytes > packet.len()
        || fragment
        || header[9] != UDP
        || !checksum::is_right(checksum::add(0, whole))
    {
        return None;
    }
    let address =
        |at: usize| IpAddr::from([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    Some(Ip {
        source: address(12),
        destination: address(16),
        tos: header[1],
        df: header[6] & 0x40 != 0,
        payload: header_bytes..total_bytes,
    })
}

fn ipv6(packet: &[u8]) -> Option<Ip> {
    let header = packet.first_chunk::<IPV6_HEADER_BYTES>()?;
    let end = IPV6_HEADER_BYTES + usize::from(u16::from_be_bytes([header[4], header[5]]));
    if header[6] != UDP || end > packet.len() {
        return None;
    }
    let address = |at: usize| {
        let octets: [u8; 16] = std::array::from_fn(|index| header[at + index]);
        IpAddr::from(octets)
    };
    Some(Ip {
        source: address(8),
        destination: address(24),
        tos: header[0] << 4 | header[1] >> 4,
        df: false,
        payload: IPV6_HEADER_BYTES..end,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A datagram with right checksums, its payload `esp!`.
    fn datagram(ipv6: bool) -> Vec<u8> {
        let mut packet = if ipv6 {
            let mut header = vec![0x6b, 0x90, 0, 0, 0, 12, 17, 64];
            header.extend([1; 16]);
            header.extend([2; 16]);
            header
        } else {
            let mut header = vec![0x45, 0xb9, 0, 32, 0, 7, 0x40, 0, 64, 17, 0, 0];
            header.extend([192, 0, 2, 1, 192, 0, 2, 2]);
            let sum = checksum::of(checksum::add(0, &header));
            header[10..12].copy_from_slice(&sum);
            header
        };
        let at = packet.len();
        packet.extend([0xee, 0x48, 0x11, 0x94, 0, 12, 0, 0]);
        packet.extend(b"esp!");
        let sum = checksum::pseudo(&packet, !ipv6, UDP, 12);
        let sum = checksum::never_zero(checksum::add(sum, &packet[at..]));
        packet[at + 6..at + 8].copy_from_slice(&sum);
        packet
    }

    #[test]
    fn a_whole_datagram_shows_where_it_came_from_and_its_payload() {
        for (ipv6, local, remote) in [
            (false, "192.0.2.2", "192.0.2.1:61000"),
            (
                true,
                "202:202:202:202:202:202:202:202",
                "[101:101:101:101:101:101:101:101]:61000",
            ),
        ] {
            let mut packet = datagram(ipv6);
            packet.extend([0; 6]); // Ethernet's padding
            let (outer, payload) = parse(&packet, false).unwrap();
            assert_eq!(&packet[payload], b"esp!");
            assert_eq!(outer.local.to_string(), local);
            assert_eq!(outer.remote.to_string(), remote);
            assert_eq!((outer.local_port, outer.udp), (4500, true));
            assert_eq!((outer.tos, outer.df), (0xb9, !ipv6));
        }
    }

    #[test]
    fn no_bit_may_be_wrong_but_those_that_the_checksums_leave_out() {
        for ipv6 in [false, true] {
            let good = datagram(ipv6);
            let original = parse(&good, false);
            for bit in 0..good.len() * 8 {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                let parsed = parse(&bad, false);
                // IPv6's own header has no checksum: traffic class, flow label and hop limit may be anything.
                let free = ipv6 && matches!(bit / 8, 0..=3 | 7) && parsed.is_some();
                let zero_udp_sum = false;
                assert!(
                    parsed.is_none() || free || zero_udp_sum,
                    "bit {bit}: {parsed:?} {original:?}"
                );
            }
        }
    }

    #[test]
    fn a_datagram_without_checksum_is_fine_over_ipv4_alone() {
        for ipv6 in [false, true] {
            let mut packet = datagram(ipv6);
            let at = packet.len() - 6;
            packet[at..at + 2].fill(0);
            assert_eq!(parse(&packet, false).is_some(), !ipv6);
            assert_eq!(parse(&packet, true).is_some(), !ipv6);
            packet[at] = 1;
            assert!(parse(&packet, false).is_none() && parse(&packet, true).is_some());
        }
    }

    #[test]
    fn nothing_cut_short_is_read_past_its_end() {
        for ipv6 in [false, true] {
            let packet = datagram(ipv6);
            for bytes in 0..packet.len() {
                assert!(parse(&packet[..bytes], true).is_none(), "{bytes}");
            }
        }
    }
}
