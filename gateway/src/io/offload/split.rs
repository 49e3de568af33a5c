//! From one super-packet to the packets that a network card would have made of it.

use super::{
    IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, Kind, TCP, TCP_CHECKSUM_AT, TCP_CWR, TCP_FIN, TCP_PSH,
    UDP, UDP_CHECKSUM_AT, VnetHeader, checksum, set_u16, u16_at, u32_at,
};

/// A super-packet that is being split: what is known of it, and how far it is.
#[derive(Clone, Copy, Debug)]
pub(in crate::io) struct Split {
    tcp: bool,
    ipv4: bool,
    /// Where the TCP or UDP header starts.
    transport: usize,
    /// Where the payload starts.
    headers: usize,
    /// Payload of each packet but the last.
    segment: usize,
    /// Bytes of the super-packet.
    bytes: usize,
    /// Payload bytes in the packets made so far.
    done: usize,
    /// How many those are.
    made: usize,
    /// How many are still to be made.
    left: usize,
}

impl Split {
    /// Checks all that making the packets relies on. `None` if the bytes are no such super-packet.
    pub(in crate::io) fn new(vnet: &VnetHeader, packet: &[u8]) -> Option<Self> {
        let kind = vnet.kind?;
        let tcp = kind != Kind::Udp;
        let ipv4 = match (packet.first()? >> 4, kind) {
            (4, Kind::Tcp4 | Kind::Udp) => true,
            (6, Kind::Tcp6 | Kind::Udp) => false,
            _ => return None,
        };
        let transport = transport_at(packet, ipv4, if tcp { TCP } else { UDP })?;
        if vnet.needs_checksum && usize::from(vnet.checksum_start) != transport {
            return None;
        }
        let header = packet.get(transport..)?;
        let header_bytes = if tcp {
            usize::from(header.get(12)? >> 4) * 4
        } else {
            8
        };
        let least = if tcp { 20 } else { 8 };
        let segment = usize::from(vnet.segment_bytes);
        // What an IP header can say: IPv6 does not count itself.
        let longest = usize::from(u16::MAX) + if ipv4 { 0 } else { IPV6_HEADER_BYTES };
        if header_bytes < least
            || header.len() < header_bytes
            || segment == 0
            || packet.len() > longest
        {
            return None;
        }
        let payload = header.len() - header_bytes;
        Some(Self {
            tcp,
            ipv4,
            transport,
            headers: transport + header_bytes,
            segment,
            bytes: packet.len(),
            done: 0,
            made: 0,
            left: payload.div_ceil(segment).max(1),
        })
    }

    /// How many packets are still to be made.
    pub(in crate::io) fn left(&self) -> usize {
        self.left
    }

    /// The length of the longest packet still to be made.
    pub(in crate::io) fn longest(&self) -> usize {
        self.bytes.min(self.headers + self.segment)
    }

    /// Makes the next packet of `packet`, the super-packet; answers its length. `None` once all are made, or
    /// if `frame` is shorter than [`Split::longest`].
    pub(in crate::io) fn next(&mut self, packet: &[u8], frame: &mut [u8]) -> Option<usize> {
        let from = self.headers + self.done;
        let to = self.bytes.min(from + self.segment);
        let payload = packet.get(from..to)?;
        let bytes = self.headers + payload.len();
        let out = frame.get_mut(..bytes)?;
        if self.left == 0 {
            return None;
        }
        out[..self.headers].copy_from_slice(&packet[..self.headers]);
        out[self.headers..].copy_from_slice(payload);
        self.write_ip(out);
        if self.tcp {
            self.write_tcp(out);
        } else {
            self.write_udp(out);
        }
        self.done += payload.len();
        self.made += 1;
        self.left -= 1;
        Some(bytes)
    }

    fn write_ip(&self, out: &mut [u8]) {
        let bytes = out.len();
        if self.ipv4 {
            set_u16(out, 2, bytes);
            let id = u16_at(out, 4).wrapping_add(self.made as u16);
            set_u16(out, 4, id.into());
            set_u16(out, 10, 0);
            let sum = checksum::add(0, &out[..self.transport]);
            out[10..12].copy_from_slice(&checksum::of(sum));
        } else {
            set_u16(out, 4, bytes - IPV6_HEADER_BYTES);
        }
    }

    fn write_tcp(&self, out: &mut [u8]) {
        let header = &mut out[self.transport..];
        let number = u32_at(header, 4).wrapping_add(self.done as u32);
        header[4..8].copy_from_slice(&number.to_be_bytes());
        if self.left > 1 {
            header[13] &= !(TCP_FIN | TCP_PSH); // both are about the end of the data
        }
        if self.made > 0 {
            header[13] &= !TCP_CWR; // RFC 3168 §6.1.2: said once
        }
        set_u16(header, TCP_CHECKSUM_AT, 0);
        let sum = self.transport_sum(out, TCP);
        let at = self.transport + TCP_CHECKSUM_AT;
        out[at..at + 2].copy_from_slice(&checksum::of(sum));
    }

    fn write_udp(&self, out: &mut [u8]) {
        let bytes = out.len() - self.transport;
        set_u16(out, self.transport + 4, bytes);
        let at = self.transport + UDP_CHECKSUM_AT;
        set_u16(out, at, 0);
        let sum = self.transport_sum(out, UDP);
        out[at..at + 2].copy_from_slice(&checksum::never_zero(sum));
    }

    fn transport_sum(&self, out: &[u8], protocol: u8) -> u64 {
        let data = &out[self.transport..];
        checksum::add(checksum::pseudo(out, self.ipv4, protocol, data.len()), data)
    }
}

/// Where the TCP or UDP header starts; `None` in fragments and where something else lies between.
fn transport_at(packet: &[u8], ipv4: bool, protocol: u8) -> Option<usize> {
    if ipv4 {
        let fixed = packet.first_chunk::<IPV4_HEADER_BYTES>()?;
        let bytes = usize::from(fixed[0] & 0x0f) * 4;
        let whole = u16_at(fixed, 6) & 0x3fff == 0; // neither more fragments nor an offset
        (bytes >= IPV4_HEADER_BYTES && whole && fixed[9] == protocol).then_some(bytes)
    } else {
        let fixed = packet.first_chunk::<IPV6_HEADER_BYTES>()?;
        (fixed[6] == protocol).then_some(IPV6_HEADER_BYTES)
    }
}

/// Finishes the checksum of a packet that the kernel has left half done: its field holds the sum of the pseudo
/// header. `false` if the header points outside the packet.
pub(in crate::io) fn finish_checksum(vnet: &VnetHeader, packet: &mut [u8]) -> bool {
    if !vnet.needs_checksum {
        return true;
    }
    let start = usize::from(vnet.checksum_start);
    let at = start + usize::from(vnet.checksum_offset);
    if packet.len() < at + 2 {
        return false;
    }
    let sum = checksum::add(0, &packet[start..]);
    packet[at..at + 2].copy_from_slice(&checksum::never_zero(sum));
    true
}
