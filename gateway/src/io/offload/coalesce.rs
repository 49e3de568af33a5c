//! From packets to super-packets: which neighbours of one flow the kernel may take as one.
//!
//! Packets are looked at in order and end up in groups; the groups are written in the order of their first
//! packets. A packet joins the open group of its flow, or opens a new one:
//!
//! ```text
//!   packets   A1  B1  A2  a   A3  ?   A4      A, B: flows; a: a pure ACK of A; ?: no TCP or UDP
//!   groups   [A1      A2]                     closed by a
//!                [B1]                         closed by ?
//!                        [a] [A3]             closed by ?
//!                                [?] [A4]
//! ```
//!
//! So no packet overtakes another of its flow, and none overtakes what belongs to no known flow. A packet joins only
//! if splitting the group again gives back the very same packets (but for the identification of
//! atomic IPv4 datagrams, which means nothing: RFC 6864 §4).

use super::{
    HEADERS_MAX, IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, Kind, TCP, TCP_ACK, TCP_CHECKSUM_AT,
    TCP_PSH, UDP, UDP_CHECKSUM_AT, VNET_BYTES, VnetHeader, checksum, set_u16, u16_at, u32_at,
};
use arrayvec::ArrayVec;

/// Packets in one super-packet: what every kernel takes of UDP.
pub(in crate::io) const SEGMENTS_MAX: usize = 64;
/// Bytes of one super-packet: what an IPv4 header can say.
const BYTES_MAX: usize = u16::MAX as usize;
/// Groups that packets may still join. One more closes the oldest.
const OPEN_MAX: usize = 16;

/// Room for the headers of a super-packet, the one for the kernel included.
pub(in crate::io) type SuperHeader = ArrayVec<u8, { VNET_BYTES + HEADERS_MAX }>;

/// Packets that are written together.
#[derive(Clone, Debug)]
pub(in crate::io) struct Group {
    /// Their indices, in order. The first one's headers are those of all.
    pub(in crate::io) members: ArrayVec<u16, SEGMENTS_MAX>,
    shape: Option<Shape>,
    /// Bytes of it as one packet.
    bytes: usize,
    /// What the next one must say.
    next_number: u32,
    next_id: u16,
    /// Whether the last one has TCP's PSH flag.
    push: bool,
    open: bool,
}

/// What matters of a packet's headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    ipv4: bool,
    tcp: bool,
    transport: usize,
    headers: usize,
    /// Bytes of its payload.
    payload: usize,
}

/// What a packet is to the others.
enum Role {
    /// Of a flow, and may be one of many.
    Member(Shape),
    /// Of a flow, and stays alone.
    Alone(Shape),
    /// Of no flow we could tell: nothing overtakes it.
    Unknown,
}

/// Sorts packets into groups.
#[derive(Debug)]
pub(in crate::io) struct Coalescer {
    tcp: bool,
    udp: bool,
    groups: Vec<Group>,
    /// Which groups are open, oldest first.
    open: ArrayVec<usize, OPEN_MAX>,
}

impl Coalescer {
    /// For what the kernel takes.
    pub(in crate::io) fn new(tcp: bool, udp: bool) -> Self {
        Self {
            tcp,
            udp,
            groups: Vec::new(),
            open: ArrayVec::new(),
        }
    }

    /// Forgets all packets.
    pub(in crate::io) fn clear(&mut self) {
        self.groups.clear();
        self.open.clear();
    }

    /// The groups, in the order in which to write them.
    pub(in crate::io) fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Adds the next packet; `data` gives the bytes of this one and of all before.
    pub(in crate::io) fn add<'a>(&mut self, index: u16, data: impl Fn(u16) -> &'a [u8]) {
        let packet = data(index);
        let (shape, joins) = match self.role(packet) {
            Role::Member(shape) => (shape, true),
            Role::Alone(shape) => (shape, false),
            Role::Unknown => {
                self.open.clear();
                self.groups.push(Group::of(index, packet, None, false));
                return;
            }
        };
        let flow = self.open.iter().position(|group| {
            let group = &self.groups[*group];
            group.is_of_flow(data(group.members[0]), packet, &shape)
        });
        if let Some(at) = flow {
            let group = &mut self.groups[self.open[at]];
            if joins && group.takes(data(group.members[0]), packet, &shape) {
                group.push(index, packet, &shape);
                if !group.open {
                    self.open.remove(at);
                }
                return;
            }
            self.open.remove(at);
        }
        let group = Group::of(index, packet, Some(shape), joins);
        if group.open {
            if self.open.is_full() {
                self.open.remove(0);
            }
            self.open.push(self.groups.len());
        }
        self.groups.push(group);
    }

    fn role(&self, packet: &[u8]) -> Role {
        let Some(shape) = Shape::parse(packet) else {
            return Role::Unknown;
        };
        let wanted = if shape.tcp { self.tcp } else { self.udp };
        if wanted && shape.payload > 0 && shape.is_plain(packet) && shape.adds_up(packet) {
            Role::Member(shape)
        } else {
            Role::Alone(shape)
        }
    }
}

impl Shape {
    /// `None` unless both headers are whole and agree with the length, and nothing lies between them.
    fn parse(packet: &[u8]) -> Option<Self> {
        let ipv4 = match packet.first()? >> 4 {
            4 => true,
            6 => false,
            _ => return None,
        };
        let (transport, protocol, length) = if ipv4 {
            let fixed = packet.first_chunk::<IPV4_HEADER_BYTES>()?;
            // No options; no fragment, no reserved bit; a header checksum that we may write anew.
            let simple = fixed[0] == 0x45 && u16_at(fixed, 6) & 0xbfff == 0;
            if !simple || !checksum::is_right(checksum::add(0, fixed)) {
                return None;
            }
            (IPV4_HEADER_BYTES, fixed[9], u16_at(fixed, 2).into())
        } else {
            let fixed = packet.first_chunk::<IPV6_HEADER_BYTES>()?;
            let length = IPV6_HEADER_BYTES + usize::from(u16_at(fixed, 4));
            (IPV6_HEADER_BYTES, fixed[6], length)
        };
        if length != packet.len() {
            return None;
        }
        let header = &packet[transport..];
        let header_bytes = match protocol {
            TCP => usize::from(header.first_chunk::<20>()?[12] >> 4) * 4,
            UDP if usize::from(u16_at(header.first_chunk::<8>()?, 4)) == header.len() => 8,
            _ => return None,
        };
        let least = if protocol == TCP { 20 } else { 8 };
        (header_bytes >= least && header_bytes <= header.len()).then(|| Self {
            ipv4,
            tcp: protocol == TCP,
            transport,
            headers: transport + header_bytes,
            payload: header.len() - header_bytes,
        })
    }

    /// Whether nothing in the transport header is about this packet alone.
    fn is_plain(&self, packet: &[u8]) -> bool {
        let header = &packet[self.transport..];
        if self.tcp {
            header[12] & 0x0f == 0 && header[13] & !TCP_PSH == TCP_ACK
        } else {
            u16_at(header, UDP_CHECKSUM_AT) != 0 // zero: none, and it should stay so
        }
    }

    /// Whether the transport checksum is right: the kernel will not look at it again.
    fn adds_up(&self, packet: &[u8]) -> bool {
        let data = &packet[self.transport..];
        checksum::is_right(checksum::add(self.pseudo(packet, data.len()), data))
    }

    fn pseudo(&self, packet: &[u8], bytes: usize) -> u64 {
        let protocol = if self.tcp { TCP } else { UDP };
        checksum::pseudo(packet, self.ipv4, protocol, bytes)
    }

    fn number(&self, packet: &[u8]) -> u32 {
        if self.tcp {
            u32_at(packet, self.transport + 4)
        } else {
            0
        }
    }

    fn has_push(&self, packet: &[u8]) -> bool {
        self.tcp && packet[self.transport + 13] & TCP_PSH != 0
    }
}

impl Group {
    fn of(index: u16, packet: &[u8], shape: Option<Shape>, joins: bool) -> Self {
        let mut group = Self {
            members: ArrayVec::new(),
            shape,
            bytes: packet.len(),
            next_number: 0,
            next_id: 0,
            push: false,
            open: false,
        };
        group.members.push(index);
        if let (Some(shape), true) = (shape, joins) {
            group.open = true;
            group.note(packet, &shape);
        }
        group
    }

    /// Whether a packet is of the same flow as the group's `first` one.
    fn is_of_flow(&self, first: &[u8], packet: &[u8], shape: &Shape) -> bool {
        let Some(ours) = &self.shape else {
            return false;
        };
        let addresses = if shape.ipv4 { 12..20 } else { 8..40 };
        let ports = shape.transport..shape.transport + 4;
        (ours.ipv4, ours.tcp) == (shape.ipv4, shape.tcp)
            && first[addresses.clone()] == packet[addresses]
            && first[ports.clone()] == packet[ports]
    }

    /// Whether a packet of the same flow may join: it differs from the `first` one in nothing but what
    /// splitting writes anew.
    fn takes(&self, first: &[u8], packet: &[u8], shape: &Shape) -> bool {
        let Some(ours) = &self.shape else {
            return false;
        };
        let same = |from: usize, to: usize| first[from..to] == packet[from..to];
        let at = shape.transport;
        let fits = ours.headers == shape.headers
            && shape.payload <= ours.payload
            && self.bytes + shape.payload <= BYTES_MAX
            && !self.members.is_full();
        let ip = if shape.ipv4 {
            // TOS; DF, TTL, protocol; and the identification counts up, or means nothing.
            let atomic = packet[6] & 0x40 != 0;
            same(0, 2) && same(6, 10) && (atomic || u16_at(packet, 4) == self.next_id)
        } else {
            same(0, 4) && same(6, 8) // traffic class, flow label; protocol, hop limit
        };
        // Acknowledgement and header length; window; urgent pointer, options. Flags were looked at before.
        let tcp = || {
            shape.number(packet) == self.next_number
                && same(at + 8, at + 13)
                && same(at + 14, at + 16)
                && same(at + 18, shape.headers)
        };
        fits && ip && (!shape.tcp || tcp())
    }

    fn push(&mut self, index: u16, packet: &[u8], shape: &Shape) {
        self.members.push(index);
        self.bytes += shape.payload;
        self.note(packet, shape);
    }

    /// What follows from its newest packet.
    fn note(&mut self, packet: &[u8], shape: &Shape) {
        self.next_number = shape.number(packet).wrapping_add(shape.payload as u32);
        self.next_id = u16_at(packet, 4).wrapping_add(1);
        self.push = shape.has_push(packet);
        let shorter = self.shape.is_some_and(|ours| shape.payload < ours.payload);
        self.open = !self.push && !shorter;
    }

    /// Where each member's payload starts, if there are several.
    pub(in crate::io) fn payload_at(&self) -> Option<usize> {
        let several = self.members.len() > 1;
        self.shape.filter(|_| several).map(|shape| shape.headers)
    }

    /// The headers of all members as one packet, made from the `first` one; `None` if that one is alone.
    pub(in crate::io) fn super_header(&self, first: &[u8]) -> Option<SuperHeader> {
        let shape = self.shape.filter(|_| self.members.len() > 1)?;
        let mut headers: ArrayVec<u8, HEADERS_MAX> = ArrayVec::new();
        headers
            .try_extend_from_slice(&first[..shape.headers])
            .ok()?;
        let (at, bytes) = (shape.transport, self.bytes - shape.transport);
        if shape.ipv4 {
            set_u16(&mut headers, 2, self.bytes);
            set_u16(&mut headers, 10, 0);
            let sum = checksum::add(0, &headers[..at]);
            headers[10..12].copy_from_slice(&checksum::of(sum));
        } else {
            set_u16(&mut headers, 4, self.bytes - IPV6_HEADER_BYTES);
        }
        let (kind, checksum_at) = match (shape.tcp, shape.ipv4) {
            (true, true) => (Kind::Tcp4, TCP_CHECKSUM_AT),
            (true, false) => (Kind::Tcp6, TCP_CHECKSUM_AT),
            (false, _) => (Kind::Udp, UDP_CHECKSUM_AT),
        };
        if !shape.tcp {
            set_u16(&mut headers, at + 4, bytes);
        } else if self.push {
            headers[at + 13] |= TCP_PSH;
        }
        // Half done, as the kernel wants it: the sum of the pseudo header.
        let half = checksum::fold(shape.pseudo(first, bytes)).to_ne_bytes();
        headers[at + checksum_at..at + checksum_at + 2].copy_from_slice(&half);
        let vnet = VnetHeader {
            needs_checksum: true,
            kind: Some(kind),
            header_bytes: shape.headers as u16,
            segment_bytes: shape.payload as u16,
            checksum_start: at as u16,
            checksum_offset: checksum_at as u16,
        };
        let mut all = SuperHeader::new();
        all.try_extend_from_slice(&vnet.to_bytes()).ok()?;
        all.try_extend_from_slice(&headers).ok()?;
        Some(all)
    }
}
