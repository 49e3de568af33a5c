//! Stories of super-packets, over packets made by hand and checksums computed the slow way.

use super::{
    coalesce::Coalescer,
    split::{Split, finish_checksum},
    *,
};

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const CWR: u8 = 0x80;

/// Seeded, so that a failure comes again (splitmix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % sides as u64) as usize
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.roll(256) as u8).collect()
    }
}

/// What a packet is made from.
#[derive(Clone, Copy, Debug)]
struct Recipe {
    ipv4: bool,
    tcp: bool,
    /// Bytes of TCP options.
    options: usize,
    df: bool,
    id: u16,
    number: u32,
    flags: u8,
    source_port: u16,
}

const TCP4: Recipe = Recipe {
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
fn kinds() -> Vec<Recipe> {
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
    fn headers(&self) -> usize {
        self.transport() + if self.tcp { 20 + self.options } else { 8 }
    }

    fn transport(&self) -> usize {
        if self.ipv4 { 20 } else { 40 }
    }

    fn kind(&self) -> Kind {
        match (self.tcp, self.ipv4) {
            (true, true) => Kind::Tcp4,
            (true, false) => Kind::Tcp6,
            (false, _) => Kind::Udp,
        }
    }

    /// The packet around this payload; complete.
    fn packet(&self, payload: &[u8]) -> Vec<u8> {
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
    fn super_packet(&self, payload: &[u8], segment: usize) -> (VnetHeader, Vec<u8>) {
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
fn slow_checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn transport_of(packet: &[u8]) -> usize {
    if packet[0] >> 4 == 4 { 20 } else { 40 }
}

fn pseudo_header(packet: &[u8]) -> Vec<u8> {
    let at = transport_of(packet);
    let (addresses, protocol) = if at == 20 {
        (&packet[12..20], packet[9])
    } else {
        (&packet[8..40], packet[6])
    };
    let bytes = (packet.len() - at) as u32;
    [addresses, &bytes.to_be_bytes(), &[0, 0, 0, protocol]].concat()
}

fn is_tcp(packet: &[u8]) -> bool {
    packet[if packet[0] >> 4 == 4 { 9 } else { 6 }] == 6
}

/// Where the transport checksum is.
fn checksum_at(packet: &[u8]) -> usize {
    transport_of(packet) + if is_tcp(packet) { 16 } else { 6 }
}

/// Writes both checksums.
fn complete(packet: &mut [u8]) {
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
fn assert_complete(packet: &[u8]) {
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

fn split_all(vnet: &VnetHeader, packet: &[u8]) -> Vec<Vec<u8>> {
    let mut split = Split::new(vnet, packet).expect("a super-packet");
    let (mut packets, mut frame) = (Vec::new(), vec![0xaa; split.longest()]);
    let announced = split.left();
    while let Some(bytes) = split.next(packet, &mut frame) {
        packets.push(frame[..bytes].to_vec());
    }
    assert_eq!((packets.len(), split.left()), (announced, 0));
    packets
}

/// Which packets go together and, if they are several, what they are as one.
type Coalesced = (Vec<usize>, Option<(VnetHeader, Vec<u8>)>);

fn coalesce_all(packets: &[Vec<u8>]) -> Vec<Coalesced> {
    let mut coalescer = Coalescer::new(true, true);
    for index in 0..packets.len() {
        coalescer.add(index as u16, |index| &packets[usize::from(index)]);
    }
    let whole = |group: &coalesce::Group| {
        let members: Vec<usize> = group
            .members
            .iter()
            .map(|index| usize::from(*index))
            .collect();
        let together = group.super_header(&packets[members[0]]).map(|header| {
            let (vnet, headers) = header.split_first_chunk().expect("a vnet header");
            let mut bytes = headers.to_vec();
            for member in &members {
                bytes.extend_from_slice(&packets[*member][group.payload_at().unwrap()..]);
            }
            (VnetHeader::parse(vnet).expect("a known kind"), bytes)
        });
        (members, together)
    };
    coalescer.groups().iter().map(whole).collect()
}

fn groups(packets: &[Vec<u8>]) -> Vec<Vec<usize>> {
    let all = coalesce_all(packets).into_iter();
    all.map(|(members, _)| members).collect()
}

#[test]
fn each_packet_of_a_super_packet_stands_by_itself() {
    for recipe in kinds() {
        let recipe = Recipe {
            flags: ACK | PSH | FIN | CWR,
            ..recipe
        };
        for (payload, segment) in [
            (1, 1),
            (2, 1),
            (1000, 1000),
            (1001, 1000),
            (9999, 37),
            (60_000, 1360),
        ] {
            let payload = Dice(payload as u64).bytes(payload);
            let (vnet, whole) = recipe.super_packet(&payload, segment);
            let packets = split_all(&vnet, &whole);
            let mut joined = Vec::new();
            for (index, packet) in packets.iter().enumerate() {
                assert_complete(packet);
                let (last, start) = (index + 1 == packets.len(), recipe.transport());
                if recipe.ipv4 {
                    assert_eq!(u16_at(packet, 4), recipe.id.wrapping_add(index as u16));
                }
                if recipe.tcp {
                    let number = recipe.number.wrapping_add(joined.len() as u32);
                    assert_eq!(u32_at(packet, start + 4), number);
                    let at_the_end = if last { PSH | FIN } else { 0 };
                    let at_the_start = if index == 0 { CWR } else { 0 };
                    assert_eq!(packet[start + 13], ACK | at_the_end | at_the_start);
                }
                let bytes = packet.len() - recipe.headers();
                assert!(bytes == segment || last && bytes <= segment);
                joined.extend_from_slice(&packet[recipe.headers()..]);
            }
            assert_eq!(joined, payload, "{recipe:?}");
        }
    }
}

#[test]
fn what_was_split_coalesces_to_the_same_bytes() {
    let mut dice = Dice(1);
    for round in 0..400 {
        let kinds = kinds();
        let recipe = Recipe {
            df: dice.roll(2) == 0,
            id: dice.roll(65_536) as u16,
            number: dice.0 as u32,
            flags: [ACK, ACK | PSH][dice.roll(2)],
            ..kinds[dice.roll(kinds.len())]
        };
        let segment = 1 + dice.roll(1400);
        let bytes = segment + 1 + dice.roll(segment * 63);
        let payload = dice.bytes(bytes.min(65_000));
        let (vnet, whole) = recipe.super_packet(&payload, segment);
        let packets = split_all(&vnet, &whole);
        let coalesced = coalesce_all(&packets);
        assert_eq!(coalesced.len(), 1, "round {round}: {recipe:?}");
        let (back, bytes) = coalesced[0].1.as_ref().expect("several packets");
        assert_eq!((back, bytes), (&vnet, &whole), "round {round}: {recipe:?}");
    }
}

/// Any mixture of flows, disturbed in any byte: no packet is lost, doubled or changed, none overtakes another
/// of its flow, and none overtakes what is of no flow.
#[test]
fn what_was_coalesced_splits_to_the_same_packets_in_order() {
    let mut dice = Dice(2);
    let mut together = 0;
    for round in 0..400 {
        let packets = mixture(&mut dice);
        let mut seen = vec![false; packets.len()];
        let (mut latest, mut written): (Vec<(Vec<u8>, usize)>, usize) = (Vec::new(), 0);
        for (members, whole) in coalesce_all(&packets) {
            if let Some((vnet, whole)) = whole {
                together += members.len();
                let again = split_all(&vnet, &whole);
                assert_eq!(again.len(), members.len());
                for (member, again) in members.iter().zip(again) {
                    assert_eq!(
                        without_atomic_id(&packets[*member]),
                        without_atomic_id(&again),
                        "round {round}"
                    );
                }
            }
            for member in members {
                assert!(!std::mem::replace(&mut seen[member], true));
                written += 1;
                let flow = flow(&packets[member]);
                if flow.is_empty() {
                    assert!(seen[..member].iter().all(|seen| *seen) && written == member + 1);
                }
                match latest.iter_mut().find(|(known, _)| *known == flow) {
                    Some((_, last)) => {
                        assert!(*last < member, "round {round}: {last} before {member}");
                        *last = member;
                    }
                    None => latest.push((flow, member)),
                }
            }
        }
        assert!(seen.iter().all(|seen| *seen));
    }
    assert!(together > 5000, "only {together} packets were coalesced");
}

/// Segments of several flows in turn; now and then something else, or a byte changed.
fn mixture(dice: &mut Dice) -> Vec<Vec<u8>> {
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
fn flow(packet: &[u8]) -> Vec<u8> {
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
fn without_atomic_id(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}

/// The drawing at the top of `coalesce.rs`.
#[test]
fn the_order_of_a_flow_and_of_the_unknown_is_kept() {
    let a = |number: u32, bytes: usize| {
        let recipe = Recipe {
            number,
            id: number as u16,
            ..TCP4
        };
        recipe.packet(&vec![1; bytes])
    };
    let b1 = Recipe {
        source_port: 7,
        ..TCP4
    }
    .packet(&[2; 100]);
    let unknown = [&[0x45, 0, 0, 28, 0, 0, 0, 0, 64, 1][..], &[0; 18]].concat(); // ICMP
    let packets = [
        a(0, 100),
        b1,
        a(100, 100),
        a(200, 0),
        a(200, 100),
        unknown,
        a(300, 100),
    ];
    let expected = [vec![0, 2], vec![1], vec![3], vec![4], vec![5], vec![6]];
    assert_eq!(groups(&packets), expected);
}

#[test]
fn a_packet_that_differs_in_anything_stays_out() {
    type Change = (&'static str, fn(&Recipe, &mut Vec<u8>));
    const TCP: fn(&Recipe) -> usize = Recipe::transport;
    let changes: [Change; 16] = [
        ("tos or flow label", |_, packet| packet[1] ^= 1),
        ("hop limit", |recipe, packet| {
            packet[if recipe.ipv4 { 8 } else { 7 }] -= 1
        }),
        ("identification", |recipe, packet| {
            if recipe.ipv4 {
                packet[5] ^= 1
            } else {
                packet[3] ^= 1
            }
        }),
        ("don't fragment", |recipe, packet| {
            if recipe.ipv4 {
                packet[6] ^= 0x40
            } else {
                packet[2] ^= 1
            }
        }),
        ("a fragment", |recipe, packet| {
            if recipe.ipv4 {
                packet[6] |= 0x20
            } else {
                packet[6] = 44
            }
        }),
        ("source port", |recipe, packet| packet[TCP(recipe) + 1] ^= 1),
        ("destination port", |recipe, packet| {
            packet[TCP(recipe) + 3] ^= 1
        }),
        ("gap", |recipe, packet| packet[TCP(recipe) + 7] ^= 1),
        ("acknowledgement", |recipe, packet| {
            packet[TCP(recipe) + 11] ^= 1
        }),
        ("reserved flag", |recipe, packet| {
            packet[TCP(recipe) + 12] ^= 1
        }),
        ("FIN", |recipe, packet| packet[TCP(recipe) + 13] |= FIN),
        ("CWR", |recipe, packet| packet[TCP(recipe) + 13] |= CWR),
        ("window", |recipe, packet| packet[TCP(recipe) + 15] ^= 1),
        ("urgent pointer", |recipe, packet| {
            packet[TCP(recipe) + 19] ^= 1
        }),
        ("option", |recipe, packet| packet[TCP(recipe) + 20] ^= 1),
        ("longer", |_, packet| packet.extend_from_slice(&[0; 2])),
    ];
    for ipv4 in [true, false] {
        let first = Recipe {
            ipv4,
            df: false,
            ..TCP4
        };
        let second = Recipe {
            id: first.id + 1,
            number: first.number + 100,
            ..first
        };
        let pair = |second: Vec<u8>| [first.packet(&[1; 100]), second];
        assert_eq!(groups(&pair(second.packet(&[2; 100]))), [vec![0, 1]]);
        for (what, change) in changes {
            let mut packet = second.packet(&[2; 100]);
            change(&second, &mut packet);
            let bytes = packet.len();
            set_u16(
                &mut packet,
                if ipv4 { 2 } else { 4 },
                if ipv4 { bytes } else { bytes - 40 },
            );
            if what == "a fragment" {
                packet[10..12].fill(0);
                let sum = slow_checksum(&packet[..20]);
                if ipv4 {
                    packet[10..12].copy_from_slice(&sum.to_be_bytes());
                }
            } else {
                complete(&mut packet);
            }
            assert_eq!(groups(&pair(packet)), [vec![0], vec![1]], "{what}");
        }
    }
}

#[test]
fn a_wrong_or_missing_checksum_is_delivered_as_it_came() {
    for recipe in kinds() {
        let next = Recipe {
            id: recipe.id + 1,
            number: recipe.number + 100,
            ..recipe
        };
        for (payload_too, missing) in [(true, false), (false, false), (false, true)] {
            let mut packet = next.packet(&[2; 100]);
            let at = if payload_too {
                packet.len() - 1
            } else {
                checksum_at(&packet)
            };
            match missing {
                true => packet[at..at + 2].fill(0),
                false => packet[at] ^= 0x10,
            }
            let packets = [recipe.packet(&[1; 100]), packet];
            assert_eq!(groups(&packets), [vec![0], vec![1]], "{recipe:?}");
        }
    }
}

#[test]
fn a_super_packet_has_no_more_packets_and_bytes_than_the_kernel_takes() {
    for (bytes, most) in [(100, 64), (1360, 48)] {
        let packets: Vec<Vec<u8>> = (0..130u16)
            .map(|index| {
                let recipe = Recipe {
                    tcp: false,
                    id: index,
                    ..TCP4
                };
                recipe.packet(&vec![index as u8; bytes])
            })
            .collect();
        assert_eq!(groups(&packets)[0].len(), most);
        assert_eq!(groups(&packets)[1].len(), most);
    }
}

#[test]
fn a_half_done_checksum_is_finished() {
    for recipe in kinds() {
        for bytes in [0, 1, 2, 333, 1400] {
            let payload = Dice(bytes as u64).bytes(bytes);
            let (vnet, mut packet) = recipe.super_packet(&payload, 1);
            let vnet = VnetHeader { kind: None, ..vnet };
            assert!(finish_checksum(&vnet, &mut packet));
            assert_complete(&packet);
        }
    }
    let nowhere = VnetHeader {
        needs_checksum: true,
        checksum_start: 20,
        checksum_offset: 16,
        ..VnetHeader::default()
    };
    assert!(!finish_checksum(&nowhere, &mut [0; 37]));
    assert!(finish_checksum(&VnetHeader::default(), &mut []));
}

#[test]
fn what_is_no_super_packet_is_refused() {
    let (vnet, packet) = TCP4.super_packet(&[1; 3000], 1000);
    assert!(Split::new(&vnet, &packet).is_some());
    let vnets = [
        VnetHeader { kind: None, ..vnet },
        VnetHeader {
            kind: Some(Kind::Tcp6),
            ..vnet
        },
        VnetHeader {
            kind: Some(Kind::Udp),
            ..vnet
        },
        VnetHeader {
            segment_bytes: 0,
            ..vnet
        },
        VnetHeader {
            checksum_start: 24,
            ..vnet
        },
    ];
    for vnet in vnets {
        assert!(Split::new(&vnet, &packet).is_none(), "{vnet:?}");
    }
    for (at, value) in [
        (0, 0x44),
        (0, 0x46),
        (0, 0x65),
        (6, 0x20),
        (9, 17),
        (32, 0x40),
    ] {
        let mut packet = packet.clone();
        packet[at] = value;
        assert!(
            Split::new(&vnet, &packet).is_none(),
            "byte {at} = {value:#x}"
        );
    }
    for bytes in 0..TCP4.headers() {
        assert!(
            Split::new(&vnet, &packet[..bytes]).is_none(),
            "{bytes} bytes"
        );
    }
    let mut unasked = vnet.to_bytes();
    unasked[1] = 3; // UFO
    assert_eq!(VnetHeader::parse(&unasked), None);
}

#[test]
fn arbitrary_bytes_harm_nothing() {
    let mut dice = Dice(3);
    let kinds = kinds();
    let mut frame = [0; 2048];
    let mut coalescer = Coalescer::new(true, true);
    for _ in 0..20_000 {
        let recipe = &kinds[dice.roll(kinds.len())];
        let payload = dice.roll(200);
        let (vnet, mut packet) = recipe.super_packet(&vec![0; payload], 1 + dice.roll(100));
        let mut vnet = vnet.to_bytes();
        for _ in 0..dice.roll(4) {
            vnet[dice.roll(VNET_BYTES)] = dice.roll(256) as u8;
        }
        for _ in 0..dice.roll(8) {
            let at = dice.roll(packet.len());
            packet[at] = dice.roll(256) as u8;
        }
        packet.truncate(dice.roll(packet.len() * 2));
        coalescer.clear();
        for index in 0..3 {
            coalescer.add(index, |_| &packet);
        }
        let Some(vnet) = VnetHeader::parse(&vnet) else {
            continue;
        };
        if let Some(mut split) = Split::new(&vnet, &packet) {
            let mut made = 0;
            while split.next(&packet, &mut frame).is_some() {
                made += 1;
            }
            assert!(made <= packet.len());
        }
        finish_checksum(&vnet, &mut packet);
    }
}
