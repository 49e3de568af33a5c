//! Outer sides of a chunk of packets: the slots of the batch in which they lie, and, inbound, the outer headers that
//! we read ourselves ([`crate::OuterHeaders::Written`]).

use crate::{
    Arena, Outer, PacketBuf,
    wire::{Ipv4, Ipv6, Udp, ipv4, protocol, u16_at, u32_at, u64_at, udp},
};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

/// What plain packets have before ESP: IPv4 without options, and UDP.
const PLAIN_BYTES: usize = ipv4::HEADER_BYTES + udp::HEADER_BYTES;

/// A chunk's view of the slots of a batch.
pub(crate) struct OuterSides<'b> {
    slots: &'b mut [Outer],
    /// Where the chunk's own begin, one for each packet.
    own: usize,
    /// Addresses and ports of the last plain packet, and its slot.
    last: (u64, u32, u16),
}

impl<'b> OuterSides<'b> {
    /// Of a chunk whose first packet may write slot `own`.
    pub fn new(slots: &'b mut [Outer], own: usize) -> Self {
        Self {
            slots,
            own,
            last: (0, 0, u16::MAX),
        }
    }

    /// Of one packet, but for TOS and DF, which the packet knows.
    #[inline]
    pub fn of(&self, packet: &PacketBuf) -> &Outer {
        self.slots
            .get(usize::from(packet.outer_at))
            .unwrap_or(&Outer::NONE)
    }

    /// Writes the slot of the chunk's packet `at`, and answers its number.
    #[inline]
    pub fn set(&mut self, at: usize, outer: Outer) -> u16 {
        let number = self.own + at;
        if let Some(slot) = self.slots.get_mut(number) {
            *slot = outer;
        }
        number as u16
    }

    /// Takes outer IP and UDP header off packet `at` and notes what they say. Answers whether there was UDP; `None` where
    /// they are malformed, a fragment (RFC 4303 §3.4.1), or of another protocol.
    #[inline]
    pub fn take_off(
        &mut self,
        arena: &Arena<'_>,
        at: usize,
        packet: &mut PacketBuf,
    ) -> Option<bool> {
        let whole = arena.get(packet.data_range())?;
        if self.take_off_plain(whole, at, packet) {
            return Some(true);
        }
        self.take_off_any(whole, at, packet)
    }

    /// For what nearly all packets have; `false`, and nothing changed, for all others.
    #[inline]
    fn take_off_plain(&mut self, whole: &[u8], at: usize, packet: &mut PacketBuf) -> bool {
        let Some(fixed) = whole.first_chunk::<PLAIN_BYTES>() else {
            return false;
        };
        let total_bytes = usize::from(u16_at(fixed, 2));
        let udp_bytes = usize::from(u16_at(fixed, ipv4::HEADER_BYTES + 4));
        let is_plain = fixed[0] == 0x45
            && fixed[9] == protocol::UDP
            && u16_at(fixed, 6) & 0x3fff == 0
            && total_bytes <= whole.len()
            && udp_bytes >= udp::HEADER_BYTES
            && ipv4::HEADER_BYTES + udp_bytes <= total_bytes;
        if !is_plain {
            return false;
        }
        let (addresses, ports) = (u64_at(fixed, 12), u32_at(fixed, ipv4::HEADER_BYTES));
        if (self.last.0, self.last.1) != (addresses, ports) || self.last.2 == u16::MAX {
            let source = Ipv4Addr::from_bits((addresses >> 32) as u32);
            let outer = Outer {
                local: Ipv4Addr::from_bits(addresses as u32).into(),
                remote: SocketAddrV4::new(source, (ports >> 16) as u16).into(),
                local_port: ports as u16,
                udp: true,
                ..Outer::NONE
            };
            self.last = (addresses, ports, self.set(at, outer));
        }
        packet.outer_at = self.last.2;
        (packet.outer_tos, packet.outer_df) = (fixed[1], false);
        let start = packet.data_range().start;
        let end = start + ipv4::HEADER_BYTES + udp_bytes; // within the packet, as checked
        packet.set_edges((start + PLAIN_BYTES) as u32, end as u32);
        true
    }

    #[cold]
    fn take_off_any(&mut self, whole: &[u8], at: usize, packet: &mut PacketBuf) -> Option<bool> {
        let (outer, before, behind) = read(whole)?;
        packet.outer_at = self.set(at, outer);
        (packet.outer_tos, packet.outer_df) = (outer.tos, false);
        packet
            .grow(-(before as i32), -(behind as i32))
            .then_some(outer.udp)
    }
}

/// What the outer headers of any packet say, how long they are, and how much lies behind what they carry.
fn read(whole: &[u8]) -> Option<(Outer, usize, usize)> {
    let (local, remote, tos, above, payload) = match whole.first()? >> 4 {
        4 => {
            let ip = Ipv4::parse(whole).filter(|ip| !ip.is_fragment())?;
            let (local, remote) = (ip.destination().into(), ip.source().into());
            (local, remote, ip.tos(), ip.protocol(), ip.payload())
        }
        6 => {
            let ip = Ipv6::parse(whole)?;
            let upper = ip.upper().filter(|upper| !upper.is_fragment)?;
            let (local, remote) = (ip.destination().into(), ip.source().into());
            let tos = ip.traffic_class();
            (local, remote, tos, upper.protocol, upper.payload)
        }
        _ => return None,
    };
    let (port, local_port, data) = match above {
        protocol::ESP => (0, 0, payload),
        protocol::UDP => {
            let udp = Udp::parse(payload)?;
            (udp.source_port(), udp.destination_port(), udp.payload())
        }
        _ => return None,
    };
    let outer = Outer {
        local,
        remote: SocketAddr::new(remote, port),
        local_port,
        udp: above == protocol::UDP,
        tos,
        df: false,
    };
    // Both are parts of one slice.
    let before = data.as_ptr().addr().checked_sub(whole.as_ptr().addr())?;
    let behind = whole.len().checked_sub(before + data.len())?;
    Some((outer, before, behind))
}
