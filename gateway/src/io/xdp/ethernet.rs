//! The headers that the kernel would write or read: Ethernet and, outside, IP and UDP.
#![forbid(unsafe_code)]

use super::{super::offload::checksum, next_hops::NextHop};
use esplane_dataplane::{
    Outer,
    wire::{Ipv4, Ipv6, Udp, protocol},
};
use std::{
    net::{IpAddr, SocketAddr},
    ops::Range,
};

/// Bytes of an Ethernet header.
pub(super) const ETHERNET_BYTES: usize = 14;
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const IPV4_BYTES: usize = 20;
const IPV6_BYTES: usize = 40;
const UDP_BYTES: usize = 8;
const TCP: u8 = 6;
/// Time to live of outer packets, like the dataplane's.
const TTL: u8 = 64;

/// Reads a frame of the public side: its outer side, and where its ESP packet lies. `None`: no such frame.
pub(super) fn open_outer(frame: &[u8]) -> Option<(Outer, Range<usize>)> {
    let whole = frame.get(ETHERNET_BYTES..)?;
    let (local, remote, tos, above, payload): (IpAddr, IpAddr, _, _, _) = match frame[12..14] {
        [0x08, 0x00] => {
            let ip = Ipv4::parse(whole).filter(|ip| !ip.is_fragment())?;
            // The program lets no options pass. Nothing else protects the address we may follow a peer to.
            if !checksum::is_right(checksum::add(0, &whole[..IPV4_BYTES])) {
                return None;
            }
            let (local, remote) = (ip.destination().into(), ip.source().into());
            (local, remote, ip.tos(), ip.protocol(), ip.payload())
        }
        [0x86, 0xdd] => {
            let ip = Ipv6::parse(whole)?;
            let upper = ip.upper().filter(|upper| !upper.is_fragment)?;
            let (local, remote) = (ip.destination().into(), ip.source().into());
            (
                local,
                remote,
                ip.traffic_class(),
                upper.protocol,
                upper.payload,
            )
        }
        _ => return None,
    };
    let (port, data) = match above {
        protocol::ESP => (0, payload),
        protocol::UDP => {
            let udp = Udp::parse(payload)?;
            (udp.source_port(), udp.payload())
        }
        _ => return None,
    };
    let mut outer = Outer::NONE;
    (outer.local, outer.remote) = (local, SocketAddr::new(remote, port));
    (outer.udp, outer.tos) = (above == protocol::UDP, tos);
    // Both are slices of `frame`.
    let start = data.as_ptr().addr() - frame.as_ptr().addr();
    Some((outer, start..start + data.len()))
}

/// Bytes of the headers before an ESP packet that leaves by `outer`, Ethernet not counted.
pub(super) fn outer_bytes(outer: &Outer) -> usize {
    let ip = if outer.remote.is_ipv4() {
        IPV4_BYTES
    } else {
        IPV6_BYTES
    };
    ip + if outer.udp { UDP_BYTES } else { 0 }
}

/// Writes the headers of the public side into a frame, before the ESP packet that lies behind [`ETHERNET_BYTES`] +
/// [`outer_bytes`]. `false` if our address is not of the peer's family.
#[must_use]
pub(super) fn write_outer(frame: &mut [u8], hop: &NextHop, outer: &Outer, port: u16) -> bool {
    let local = if outer.local.is_unspecified() {
        hop.source
    } else {
        outer.local
    };
    let above = if outer.udp {
        protocol::UDP
    } else {
        protocol::ESP
    };
    write_ethernet(frame, hop, outer.remote.is_ipv4());
    let whole = &mut frame[ETHERNET_BYTES..];
    let bytes = whole.len();
    let (ip_bytes, pseudo) = match (local, outer.remote.ip()) {
        (IpAddr::V4(local), IpAddr::V4(remote)) => {
            whole[..IPV4_BYTES].fill(0);
            (whole[0], whole[1]) = (0x45, outer.tos);
            whole[2..4].copy_from_slice(&(bytes as u16).to_be_bytes());
            let number = outer_bytes(outer) + 6;
            if number + 2 <= bytes {
                // RFC 6864 §4.3: differs between fragments in flight, being the sequence number's low half.
                whole.copy_within(number..number + 2, 4);
            }
            whole[6] = if outer.df { 0x40 } else { 0 };
            (whole[8], whole[9]) = (TTL, above);
            whole[12..16].copy_from_slice(&local.octets());
            whole[16..20].copy_from_slice(&remote.octets());
            let sum = checksum::of(checksum::add(0, &whole[..IPV4_BYTES]));
            whole[10..12].copy_from_slice(&sum);
            (IPV4_BYTES, None)
        }
        (IpAddr::V6(local), IpAddr::V6(remote)) => {
            whole[..IPV6_BYTES].fill(0);
            (whole[0], whole[1]) = (0x60 | outer.tos >> 4, outer.tos << 4);
            whole[4..6].copy_from_slice(&((bytes - IPV6_BYTES) as u16).to_be_bytes());
            (whole[6], whole[7]) = (above, TTL);
            whole[8..24].copy_from_slice(&local.octets());
            whole[24..40].copy_from_slice(&remote.octets());
            let datagram = bytes - IPV6_BYTES;
            (
                IPV6_BYTES,
                Some(checksum::pseudo(whole, false, protocol::UDP, datagram)),
            )
        }
        _ => return false,
    };
    if outer.udp {
        let datagram = &mut whole[ip_bytes..];
        datagram[..2].copy_from_slice(&port.to_be_bytes());
        datagram[2..4].copy_from_slice(&outer.remote.port().to_be_bytes());
        let length = datagram.len() as u16;
        datagram[4..6].copy_from_slice(&length.to_be_bytes());
        datagram[6..8].fill(0); // RFC 3948 §2.1
        if let Some(pseudo) = pseudo {
            // RFC 8200 §8.1
            let sum = checksum::never_zero(checksum::add(pseudo, datagram));
            datagram[6..8].copy_from_slice(&sum);
        }
    }
    true
}

/// Reads a frame of the private side as a router does: the IP packet, its TTL counted down, its transport checksum finished
/// if whoever sent it on this very machine left that to a network card. `None`: nothing that we could forward.
pub(super) fn open_inner(frame: &mut [u8]) -> Option<Range<usize>> {
    let whole = frame.get_mut(ETHERNET_BYTES..)?;
    let bytes = match whole.first()? >> 4 {
        4 => Ipv4::parse(whole)?.total_bytes(),
        6 => Ipv6::parse(whole)?.total_bytes(),
        _ => return None,
    };
    let packet = whole.get_mut(..bytes)?; // behind it Ethernet pads
    if !count_down(packet) {
        return None;
    }
    finish_checksum(packet);
    Some(ETHERNET_BYTES..ETHERNET_BYTES + bytes)
}

/// Writes the header of the private side into a frame, before the decrypted packet that lies behind [`ETHERNET_BYTES`], as a
/// router does. `false` if its TTL is used up.
#[must_use]
pub(super) fn write_inner(frame: &mut [u8], hop: &NextHop) -> bool {
    let ipv4 = frame[ETHERNET_BYTES] >> 4 == 4;
    write_ethernet(frame, hop, ipv4);
    count_down(&mut frame[ETHERNET_BYTES..])
}

/// Whether a router may pass the packet on: its TTL allows one hop more.
pub(super) fn may_pass(packet: &[u8]) -> bool {
    let ttl = match packet.first().map(|first| first >> 4) {
        Some(4) => packet.get(8),
        Some(6) => packet.get(7),
        _ => None,
    };
    ttl.is_some_and(|ttl| *ttl > 1)
}

/// Where a packet goes.
pub(super) fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => packet
            .get(16..)?
            .first_chunk::<4>()
            .map(|octets| (*octets).into()),
        6 => packet
            .get(24..)?
            .first_chunk::<16>()
            .map(|octets| (*octets).into()),
        _ => None,
    }
}

fn write_ethernet(frame: &mut [u8], hop: &NextHop, ipv4: bool) {
    frame[..6].copy_from_slice(&hop.to);
    frame[6..12].copy_from_slice(&hop.from);
    frame[12..14].copy_from_slice(if ipv4 { &IPV4 } else { &IPV6 });
}

/// RFC 1812 §5.3.1, RFC 8200 §3: one hop less. `false`, and nothing changed, if none is left.
fn count_down(packet: &mut [u8]) -> bool {
    if !may_pass(packet) {
        return false;
    }
    if packet[0] >> 4 == 6 {
        packet[7] -= 1;
        return true;
    }
    packet[8] -= 1;
    // RFC 1141: the word with the TTL is 0x0100 less, so the checksum is 0x0100 more, with the carry around.
    let sum = u32::from(u16::from_be_bytes([packet[10], packet[11]])) + 0x0100;
    let sum = (sum + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    true
}

/// A packet from this very machine may carry the sum of the pseudo header where its checksum belongs; a network card would
/// have finished it. Whatever else is there is not ours to mend.
fn finish_checksum(packet: &mut [u8]) {
    let ipv4 = packet[0] >> 4 == 4;
    let (start, above, whole) = if ipv4 {
        let header = usize::from(packet[0] & 0x0f) * 4;
        (
            header,
            packet[9],
            u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff == 0,
        )
    } else {
        (IPV6_BYTES, packet[6], true)
    };
    let at = match above {
        TCP => start + 16,
        protocol::UDP => start + 6,
        _ => return,
    };
    if !whole || packet.len() < at + 2 {
        return;
    }
    let pseudo = checksum::pseudo(packet, ipv4, above, packet.len() - start);
    if packet[at..at + 2] != checksum::fold(pseudo).to_ne_bytes() {
        return;
    }
    let sum = checksum::add(0, &packet[start..]);
    // One in 65,536 finished ones looks unfinished; it adds up together with the pseudo header.
    let with_pseudo = checksum::add(pseudo, &packet[start..]);
    if !checksum::is_right(with_pseudo) {
        packet[at..at + 2].copy_from_slice(&checksum::never_zero(sum));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hop(source: &str) -> NextHop {
        NextHop {
            from: [2, 0, 0, 0, 0, 1],
            to: [2, 0, 0, 0, 0, 2],
            source: source.parse().unwrap(),
            mtu: 1500,
        }
    }

    fn there(remote: &str, udp: bool) -> Outer {
        Outer {
            remote: remote.parse().unwrap(),
            udp,
            tos: 0xb9,
            df: true,
            ..Outer::NONE
        }
    }

    #[test]
    fn what_is_written_outside_is_read_again() {
        let esp: Vec<u8> = (1..=99).collect();
        for (source, remote) in [
            ("192.0.2.1", "192.0.2.2:4500"),
            ("2001:db8::1", "[2001:db8::2]:4500"),
        ] {
            for udp in [true, false] {
                let outer = there(remote, udp);
                let mut frame = vec![0xee; ETHERNET_BYTES + outer_bytes(&outer) + esp.len()];
                let start = frame.len() - esp.len();
                frame[start..].copy_from_slice(&esp);
                assert!(write_outer(&mut frame, &hop(source), &outer, 4501));
                assert_eq!(frame[..12], [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
                frame.resize(frame.len() + 7, 0); // padding
                let (read, at) = open_outer(&frame).unwrap();
                assert_eq!(frame[at], esp[..], "{remote} {udp}");
                assert_eq!(
                    (read.local.to_string(), read.tos, read.udp),
                    (remote_of(remote), 0xb9, udp)
                );
                assert_eq!(read.remote.ip().to_string(), source);
                assert_eq!(read.remote.port(), if udp { 4501 } else { 0 });
            }
        }
    }

    fn remote_of(socket: &str) -> String {
        socket.parse::<SocketAddr>().unwrap().ip().to_string()
    }

    #[test]
    fn a_damaged_outer_header_is_refused() {
        let outer = there("192.0.2.2:4500", false);
        let mut frame = vec![0; ETHERNET_BYTES + outer_bytes(&outer) + 40];
        assert!(write_outer(&mut frame, &hop("192.0.2.1"), &outer, 4500));
        assert!(open_outer(&frame).is_some());
        frame[ETHERNET_BYTES + 13] ^= 1; // in the source address
        assert!(open_outer(&frame).is_none());
        for bytes in 0..frame.len() {
            let _ = open_outer(&frame[..bytes]); // and no shorter one panics
            let _ = open_inner(&mut frame.clone()[..bytes]);
        }
    }

    #[test]
    fn a_peer_of_the_other_family_is_refused() {
        let outer = there("[2001:db8::2]:4500", true);
        let mut frame = vec![0; ETHERNET_BYTES + outer_bytes(&outer) + 40];
        assert!(!write_outer(&mut frame, &hop("192.0.2.1"), &outer, 4500));
    }

    /// UDP from 10.1.0.2 to 10.2.0.2 with its checksum unfinished, in a frame.
    fn unfinished(ttl: u8) -> Vec<u8> {
        let mut packet = vec![0u8; 20 + 8 + 11];
        (packet[0], packet[8], packet[9]) = (0x45, ttl, protocol::UDP);
        packet[3] = 39;
        packet[12..20].copy_from_slice(&[10, 1, 0, 2, 10, 2, 0, 2]);
        packet[20..26].copy_from_slice(&[0, 7, 0, 7, 0, 19]);
        packet[28..].copy_from_slice(b"some bytes!");
        let header = checksum::of(checksum::add(0, &packet[..20]));
        packet[10..12].copy_from_slice(&header);
        let half = checksum::fold(checksum::pseudo(&packet, true, protocol::UDP, 19)).to_ne_bytes();
        packet[26..28].copy_from_slice(&half);
        let mut frame = vec![0; ETHERNET_BYTES];
        frame.extend(packet);
        frame.resize(60, 0);
        frame
    }

    fn adds_up(packet: &[u8]) -> bool {
        let pseudo = checksum::pseudo(packet, true, protocol::UDP, packet.len() - 20);
        checksum::is_right(checksum::add(0, &packet[..20]))
            && checksum::is_right(checksum::add(pseudo, &packet[20..]))
    }

    #[test]
    fn a_forwarded_packet_has_one_hop_less_and_right_checksums() {
        let mut frame = unfinished(64);
        let at = open_inner(&mut frame).unwrap();
        let packet = frame[at].to_vec();
        assert_eq!((packet.len(), packet[8]), (39, 63));
        assert!(adds_up(&packet));
        let mut out = vec![0; ETHERNET_BYTES + packet.len()];
        out[ETHERNET_BYTES..].copy_from_slice(&packet);
        assert!(write_inner(&mut out, &hop("10.2.0.1")));
        assert!(adds_up(&out[ETHERNET_BYTES..]) && out[ETHERNET_BYTES + 8] == 62);
        assert_eq!(destination(&packet), Some([10, 2, 0, 2].into()));
    }

    #[test]
    fn a_finished_checksum_stays_even_a_wrong_one() {
        for damage in [0, 1] {
            let mut frame = unfinished(64);
            open_inner(&mut frame).unwrap();
            frame[ETHERNET_BYTES + 30] ^= damage;
            let before = frame[ETHERNET_BYTES + 26..][..2].to_vec();
            open_inner(&mut frame).unwrap();
            assert_eq!(frame[ETHERNET_BYTES + 26..][..2], before[..]);
        }
    }

    #[test]
    fn a_ttl_that_is_used_up_goes_no_further() {
        assert!(
            open_inner(&mut unfinished(1)).is_none() && open_inner(&mut unfinished(0)).is_none()
        );
        assert!(open_inner(&mut unfinished(2)).is_some());
    }
}
