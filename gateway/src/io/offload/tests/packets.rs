//! Packets made by hand, with checksums computed the slow way; nothing here knows how they are split or coalesced.

use super::super::{Kind, VnetHeader, u16_at};

pub(super) const FIN: u8 = 0x01;
pub(super) const PSH: u8 = 0x08;
pub(super) const ACK: u8 = 0x10;
pub(super) const CWR: u8 = 0x80;

/// Seeded, so that a failure comes again (splitmix64).
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % sides as u64) as usize
    }

    pub(super) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.roll(256) as u8).collect()
    }
}

/// What a packet is made from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Recipe {
    pub(super) ipv4: bool,
    pub(super) tcp: bool,
    /// Bytes of TCP options.
    pub(super) options: usize,
    pub(super) df: bool,
    pub(super) id: u16,
    pub(super) number: u32,
    pub(super) flags: u8,
    pub(super) source_port: u16,
}

pub(super) const TCP4: Recipe = Recipe {
    ipv4: true,
    tcp: true,
    options: 12,
    df: true,
    id: 0xfffe,
    number: 0xffff_f000, // wraps soon
    flags: ACK,
    source_port: 1000,
};

/// All four kinds, TCP with different options.
pub(super) fn kinds() -> Vec<Recipe> {
    let mut all = Vec::new();
    for ipv4 in [true, false] {
        for options in [0, 12, 40] {
            all.push(Recipe {
                ipv4,
                options,
                ..TCP4
            });
        }
        all.push(Recipe {
            ipv4,
            tcp: false,
            ..TCP4
        });
    }
    all
}

impl Recipe {
    pub(super) fn headers(&self) -> usize {
        self.transport() + if self.tcp { 20 + self.options } else { 8 }
    }

    pub(super) fn transport(&self) -> usize {
        if self.ipv4 { 20 } else { 40 }
    }

    pub(super) fn kind(&self) -> Kind {
        match (self.tcp, self.ipv4) {
            (true, true) => Kind::Tcp4,
            (true, false) => Kind::Tcp6,
            (false, _) => Kind::Udp,
        }
    }

    /// The packet around this payload; complete.
    pub(super) fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; self.headers()];
        packet.extend_from_slice(payload);
        let (bytes, protocol) = (packet.len(), if self.tcp { 6 } else { 17 });
        if self.ipv4 {
            packet[..2].copy_from_slice(&[0x45, 0x02]);
            packet[2..4].copy_from_slice(&(bytes as u16).to_be_bytes());
            packet[4..6].copy_from_slice(&self.id.to_be_bytes());
            packet[6] = if self.df { 0x40 } else { 0 };
            packet[8..10].copy_from_slice(&[64, protocol]);
            packet[12..20].copy_from_slice(&[10, 1, 0, 1, 10, 2, 0, 1]);
        } else {
            packet[..4].copy_from_slice(&[0x60, 0x21, 0x23, 0x45]);
            packet[4..6].copy_from_slice(&(bytes as u16 - 40).to_be_bytes());
            packet[6..8].copy_from_slice(&[protocol, 64]);
            packet[8] = 0xfd;
            packet[23] = 1;
            packet[24] = 0xfd;
            packet[39] = 2;
        }
        let header = &mut packet[self.transport()..];
        header[..2].copy_from_slice(&self.source_port.to_be_bytes());
        header[2..4].copy_from_slice(&2000u16.to_be_bytes());
        if self.tcp {
            header[4..8].copy_from_slice(&self.number.to_be_bytes());
            header[8..12].copy_from_slice(&[1, 2, 3, 4]);
            header[12..14].copy_from_slice(&[((20 + self.options) * 4) as u8, self.flags]);
            header[14..16].copy_from_slice(&[5, 6]);
            header[20..20 + self.options].fill(1);
        } else {
            let bytes = header.len() as u16;
            header[4..6].copy_from_slice(&bytes.to_be_bytes());
        }
        complete(&mut packet);
        packet
    }

    /// The super-packet as the kernel hands it over: transport checksum half done.
    pub(super) fn super_packet(&self, payload: &[u8], segment: usize) -> (VnetHeader, Vec<u8>) {
        let mut packet = self.packet(payload);
        let (at, offset) = (self.transport(), if self.tcp { 16 } else { 6 });
        packet[at + offset..at + offset + 2].fill(0);
        let half = !slow_checksum(&pseudo_header(&packet));
        packet[at + offset..at + offset + 2].copy_from_slice(&half.to_be_bytes());
        let vnet = VnetHeader {
            needs_checksum: true,
            kind: Some(self.kind()),
            header_bytes: self.headers() as u16,
            segment_bytes: segment as u16,
            checksum_start: at as u16,
            checksum_offset: offset as u16,
        };
        (vnet, packet)
    }
}

/// RFC 1071 as it is written there.
pub(super) fn slow_checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

pub(super) fn transport_of(packet: &[u8]) -> usize {
    if packet[0] >> 4 == 4 { 20 } else { 40 }
}

pub(super) fn pseudo_header(packet: &[u8]) -> Vec<u8> {
    let at = transport_of(packet);
    let (addresses, protocol) = if at == 20 {
        (&packet[12..20], packet[9])
    } else {
        (&packet[8..40], packet[6])
    };
    let bytes = (packet.len() - at) as u32;
    [addresses, &bytes.to_be_bytes(), &[0, 0, 0, protocol]].concat()
}

pub(super) fn is_tcp(packet: &[u8]) -> bool {
    packet[if packet[0] >> 4 == 4 { 9 } else { 6 }] == 6
}

/// Where the transport checksum is.
pub(super) fn checksum_at(packet: &[u8]) -> usize {
    transport_of(packet) + if is_tcp(packet) { 16 } else { 6 }
}

/// Writes both checksums.
pub(super) fn complete(packet: &mut [u8]) {
    if packet[0] >> 4 == 4 {
        packet[10..12].fill(0);
        let sum = slow_checksum(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    let (at, start) = (checksum_at(packet), transport_of(packet));
    packet[at..at + 2].fill(0);
    let mut sum = slow_checksum(&[&pseudo_header(packet), &packet[start..]].concat());
    if sum == 0 && !is_tcp(packet) {
        sum = 0xffff;
    }
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Lengths and checksums of a packet that came out of a split.
pub(super) fn assert_complete(packet: &[u8]) {
    let start = transport_of(packet);
    if start == 20 {
        assert_eq!(u16_at(packet, 2) as usize, packet.len());
        assert_eq!(slow_checksum(&packet[..20]), 0);
    } else {
        assert_eq!(u16_at(packet, 4) as usize + 40, packet.len());
    }
    if !is_tcp(packet) {
        assert_eq!(u16_at(packet, start + 4) as usize, packet.len() - start);
        assert_ne!(u16_at(packet, start + 6), 0);
    }
    let covered = [&pseudo_header(packet), &packet[start..]].concat();
    assert_eq!(slow_checksum(&covered), 0);
}

/// Segments of several flows in turn; now and then something else, or a byte changed.
pub(super) fn mixture(dice: &mut Dice) -> Vec<Vec<u8>> {
    let kinds = kinds();
    let mut flows: Vec<Recipe> = (0..1 + dice.roll(6) as u16)
        .map(|port| Recipe {
            source_port: port,
            df: dice.roll(2) == 0,
            ..kinds[dice.roll(kinds.len())]
        })
        .collect();
    let mut packets = Vec::new();
    while packets.len() < 128 {
        let at = dice.roll(flows.len());
        for _ in 0..1 + dice.roll(12) {
            let recipe = &mut flows[at];
            let bytes = if dice.roll(12) == 0 {
                dice.roll(300)
            } else {
                300
            };
            recipe.flags = if dice.roll(20) == 0 { ACK | PSH } else { ACK };
            let mut packet = recipe.packet(&dice.bytes(bytes));
            recipe.number = recipe.number.wrapping_add(bytes as u32);
            recipe.id = recipe.id.wrapping_add(1);
            if dice.roll(25) == 0 {
                let at = dice.roll(recipe.headers());
                packet[at] ^= 1 << dice.roll(8);
                // Half of them complete again, so that not only the checksum tells.
                if dice.roll(2) == 0 && packet[0] >> 4 == recipe.packet(&[])[0] >> 4 {
                    complete(&mut packet);
                }
            }
            packets.push(packet);
        }
    }
    packets.truncate(128);
    packets
}

/// Addresses, protocol and ports, if they can be told from a well-formed packet; else nothing.
pub(super) fn flow(packet: &[u8]) -> Vec<u8> {
    let ipv4 = packet[0] >> 4 == 4;
    let start = if ipv4 { 20 } else { 40 };
    let well = match packet[0] >> 4 {
        4 => {
            packet[0] == 0x45
                && packet[6] & 0xbf == 0
                && packet[7] == 0
                && slow_checksum(&packet[..20]) == 0
                && u16_at(packet, 2) as usize == packet.len()
        }
        6 => packet.len() >= 48 && u16_at(packet, 4) as usize + 40 == packet.len(),
        _ => false,
    };
    if !well {
        return Vec::new();
    }
    let (protocol, addresses) = if ipv4 {
        (packet[9], &packet[12..20])
    } else {
        (packet[6], &packet[8..40])
    };
    let header = &packet[start..];
    let fits = match protocol {
        6 => {
            header.len() >= 20 && (20..=header.len()).contains(&(usize::from(header[12] >> 4) * 4))
        }
        17 => u16_at(header, 4) as usize == header.len(),
        _ => false,
    };
    if !fits {
        return Vec::new();
    }
    [addresses, &[protocol], &header[..4]].concat()
}

/// RFC 6864 §4: the identification of an atomic datagram means nothing.
pub(super) fn without_atomic_id(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}
