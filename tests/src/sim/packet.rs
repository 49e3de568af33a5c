use std::net::IpAddr;

/// Lies in every inner packet, so that a byte in clear on the wire cannot be missed.
pub const MARKER: &[u8; 16] = b"CLEAR-TEXT-HERE!";

const UDP: u8 = 17;

/// An IPv4 or IPv6 UDP packet that carries [`MARKER`], `number`, and then filler up to `bytes` in
/// all (or a little more, if that is too few).
pub fn inner_packet(source: IpAddr, destination: IpAddr, number: u64, bytes: usize) -> Vec<u8> {
    let ip_bytes = if source.is_ipv4() { 20 } else { 40 };
    let filler = bytes.saturating_sub(ip_bytes + 8 + MARKER.len() + 8);
    let mut udp = Vec::new();
    udp.extend(40_000u16.to_be_bytes());
    udp.extend(7u16.to_be_bytes());
    udp.extend(((8 + MARKER.len() + 8 + filler) as u16).to_be_bytes());
    udp.extend(0u16.to_be_bytes()); // no checksum
    udp.extend(MARKER);
    udp.extend(number.to_be_bytes());
    udp.resize(udp.len() + filler, 0x5a);
    let mut packet = ip_header(source, destination, udp.len());
    packet.extend(udp);
    packet
}

/// The number [`inner_packet`] put in, if this is such a packet.
pub fn number_of(packet: &[u8]) -> Option<u64> {
    let at = packet
        .windows(MARKER.len())
        .position(|window| window == MARKER)?
        + MARKER.len();
    Some(u64::from_be_bytes(packet.get(at..at + 8)?.try_into().ok()?))
}

fn ip_header(source: IpAddr, destination: IpAddr, payload_bytes: usize) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = vec![0x45, 0];
            header.extend((20 + payload_bytes as u16).to_be_bytes());
            header.extend([0, 0, 0, 0, 64, UDP, 0, 0]);
            header.extend(source.octets());
            header.extend(destination.octets());
            let checksum = checksum(&header);
            header[10..12].copy_from_slice(&checksum.to_be_bytes());
            header
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut header = vec![0x60, 0, 0, 0];
            header.extend((payload_bytes as u16).to_be_bytes());
            header.extend([UDP, 64]);
            header.extend(source.octets());
            header.extend(destination.octets());
            header
        }
        _ => panic!("{source} and {destination} are of different families"),
    }
}

/// The Internet checksum (RFC 1071).
fn checksum(header: &[u8]) -> u16 {
    let mut sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out() {
        for (source, destination, bytes) in [
            ("10.1.0.5", "10.2.0.5", 100),
            ("fd00:1::5", "fd00:2::5", 1400),
        ] {
            let packet = inner_packet(
                source.parse().unwrap(),
                destination.parse().unwrap(),
                77,
                bytes,
            );
            assert_eq!((packet.len(), number_of(&packet)), (bytes, Some(77)));
        }
        assert_eq!(
            number_of(b"something else altogether, and long enough"),
            None
        );
    }
}
