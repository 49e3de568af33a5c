//! Stories of super-packets, over packets made by hand and checksums computed the slow way.

use super::{
    coalesce::Coalescer,
    split::{Split, finish_checksum},
    *,
};

mod packets;
use packets::*;

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
