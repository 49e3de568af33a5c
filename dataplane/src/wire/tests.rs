use super::*;
use proptest::prelude::*;

/// A fixed IPv6 header before `rest`.
fn v6(next_header: u8, rest: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x6f, 0xf0, 0, 0, 0, rest.len() as u8, next_header, 64];
    packet.extend([1; 16]);
    packet.extend([2; 16]);
    packet.extend(rest);
    packet
}

/// A minimal IPv4 header before `rest`, with this flags-and-offset field.
fn v4(protocol: u8, flags_and_offset: u16, rest: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0xb9, 0, rest.len() as u8 + 20, 0, 0];
    packet.extend(flags_and_offset.to_be_bytes());
    packet.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend(rest);
    packet
}

const PORTS: [u8; 8] = [0x03, 0xe8, 0, 53, 0, 0, 0, 0];

#[test]
fn an_ipv4_packet_shows_addresses_protocol_ports_and_marks() {
    let flow = Flow::parse(&v4(17, 0x4000, &PORTS)).unwrap();
    assert_eq!(flow.source, IpAddr::from([10, 0, 0, 1]));
    assert_eq!(flow.destination, IpAddr::from([10, 0, 0, 2]));
    assert_eq!((flow.protocol, flow.ports), (17, Some((1000, 53))));
    assert_eq!((flow.tos, flow.df, flow.total_bytes), (0xb9, true, 28));
}

#[test]
fn contradicting_ipv4_lengths_are_refused() {
    let good = v4(17, 0, &PORTS);
    assert!(Flow::parse(&good).is_some());
    for (at, value, what) in [
        (0, 0x44, "a header shorter than 20 bytes"),
        (0, 0x4f, "options past the packet"),
        (0, 0x55, "another version"),
        (3, 29, "a total length past the bytes there are"),
        (3, 19, "a total length inside the header"),
    ] {
        let mut bad = good.clone();
        bad[at] = value;
        assert_eq!(Flow::parse(&bad), None, "{what}");
    }
    for length in 0..good.len() {
        assert_eq!(Flow::parse(&good[..length]), None);
    }
}

#[test]
fn bytes_behind_the_packet_are_no_part_of_it() {
    let mut packet = v4(17, 0, &PORTS);
    packet.extend([0xee; 18]);
    assert_eq!(Flow::parse(&packet).unwrap().total_bytes, 28);
    let mut packet = v6(17, &PORTS);
    packet.extend([0xee; 18]);
    assert_eq!(Flow::parse(&packet).unwrap().total_bytes, 48);
}

#[test]
fn later_fragments_show_no_ports() {
    assert_eq!(
        Flow::parse(&v4(17, 0x2000, &PORTS)).unwrap().ports,
        Some((1000, 53))
    );
    assert_eq!(Flow::parse(&v4(17, 0x0001, &PORTS)).unwrap().ports, None);
    let first = [&[17, 0, 0, 1, 0, 0, 0, 9], &PORTS[..]].concat();
    assert_eq!(
        Flow::parse(&v6(44, &first)).unwrap().ports,
        Some((1000, 53))
    );
    let later = [&[17, 0, 0, 9, 0, 0, 0, 9], &PORTS[..]].concat();
    let flow = Flow::parse(&v6(44, &later)).unwrap();
    assert_eq!((flow.protocol, flow.ports), (17, None));
    let ip = v6(44, &first);
    assert!(Ipv6::parse(&ip).unwrap().upper().unwrap().is_fragment);
}

#[test]
fn extension_headers_are_walked_to_the_protocol_behind() {
    let chain = [
        &[60u8, 0, 1, 4, 0, 0, 0, 0][..], // hop-by-hop, then destination options
        &[43, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], // 16 bytes of them, then routing
        &[51, 0, 0, 0, 0, 0, 0, 0],       // then authentication header
        &[6, 1, 0, 0, 0, 0, 0, 9, 0, 0, 0, 1], // of 12 bytes, then TCP
        &PORTS[..],
    ]
    .concat();
    let flow = Flow::parse(&v6(0, &chain)).unwrap();
    assert_eq!((flow.protocol, flow.ports), (6, Some((1000, 53))));
    assert_eq!(flow.tos, 0xff);
    for length in 1..36 {
        assert_eq!(
            Flow::parse(&v6(0, &chain[..length])),
            None,
            "cut at {length}"
        );
    }
}

#[test]
fn a_chain_without_end_is_refused() {
    let chain = |length: usize| {
        let mut headers = [60u8, 0, 1, 4, 0, 0, 0, 0].repeat(length);
        let last = headers.len() - 8;
        headers[last] = 17;
        headers.extend(PORTS);
        headers
    };
    assert!(Flow::parse(&v6(60, &chain(8))).is_some());
    assert_eq!(Flow::parse(&v6(60, &chain(9))), None);
}

#[test]
fn a_packet_too_short_for_ports_shows_none() {
    assert_eq!(Flow::parse(&v4(6, 0, &[1, 2, 3])).unwrap().ports, None);
    assert_eq!(Flow::parse(&v6(6, &[])).unwrap().ports, None);
}

#[test]
fn udp_lengths_must_hold() {
    let datagram = [0x11, 0x94, 0x11, 0x95, 0, 10, 0, 0, 7, 8, 9];
    let udp = Udp::parse(&datagram).unwrap();
    assert_eq!(
        (udp.source_port(), udp.destination_port(), udp.payload()),
        (4500, 4501, &[7, 8][..])
    );
    for length in [7, 12] {
        let mut bad = datagram;
        bad[5] = length;
        assert!(Udp::parse(&bad).is_none());
    }
    assert!(Udp::parse(&datagram[..7]).is_none());
}

#[test]
fn an_esp_packet_has_all_its_parts() {
    for (length, right) in [
        (0, false),
        (35, false),
        (36, true),
        (37, false),
        (38, false),
        (40, true),
    ] {
        assert_eq!(
            Esp::parse(&vec![0; length]).is_some(),
            right,
            "{length} bytes"
        );
    }
}

/// RFC 1071 §3's example, and RFC 1624 §4's.
#[test]
fn checksums_as_the_rfcs_compute_them() {
    let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
    assert_eq!(checksum::finish(checksum::add(0, &bytes)), !0xddf2);
    assert_eq!(checksum::update(0xdd2f, 0x5555, 0x3285), 0x0000);
}

proptest! {
    #[test]
    fn no_bytes_make_a_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120), version in 0u8..16) {
        let mut bytes = bytes;
        if let Some(first) = bytes.first_mut() {
            *first = version << 4 | *first & 0x0f;
        }
        if let Some(flow) = Flow::parse(&bytes) {
            prop_assert!(flow.total_bytes <= bytes.len());
        }
        let _ = (Udp::parse(&bytes).map(|udp| udp.payload().len()), Esp::parse(&bytes).map(|esp| esp.iv()));
    }

    /// What the quick look says is what the thorough one says, and equal keys mean equal selectors.
    #[test]
    fn a_head_agrees_with_its_flow(
        ports in proptest::collection::vec(0u8..3, 4..12),
        protocols in [0usize..6, 0usize..6],
        hosts in [0u8..2, 0u8..2],
        flags in 0usize..4,
        cut in 0usize..3,
        v6_packets in any::<bool>(),
    ) {
        let packets: Vec<Vec<u8>> = [0, 1].map(|which| {
            let protocol = [1, 6, 17, 50, 58, 132][protocols[which]];
            let mut packet = match v6_packets {
                true => v6(protocol, &ports),
                false => v4(protocol, [0, 0x4000, 0x2000, 0x0001][flags], &ports),
            };
            let source = if v6_packets { 23 } else { 15 };
            packet[source] = hosts[which];
            packet.truncate(packet.len() - cut);
            packet
        }).into();
        let v4_keys = packets.iter().map(|packet| KeyV4::parse(packet));
        let v6_keys = packets.iter().map(|packet| KeyV6::parse(packet));
        let looked = v4_keys.zip(v6_keys).zip(packets.iter().map(|packet| Flow::parse(packet)));
        let looked: Vec<_> = looked.collect();
        for ((v4, v6), flow) in &looked {
            prop_assert!(v4.is_none() || v6.is_none());
            let Some(head) = v4.map(|v4| v4.1).or(v6.map(|v6| v6.1)) else { continue };
            let Some(flow) = flow else { return Err(TestCaseError::fail("a head without a flow")) };
            prop_assert_eq!(flow.head(), head);
        }
        let selectors = |flow: &Flow| (flow.source, flow.destination, flow.protocol, flow.ports);
        if let [(a, Some(first)), (b, Some(second))] = &looked[..] {
            let same = selectors(first) == selectors(second);
            match (a, b) {
                ((Some(a), _), (Some(b), _)) => prop_assert_eq!(a.0 == b.0, same),
                ((_, Some(a)), (_, Some(b))) => prop_assert_eq!(a.0 == b.0, same),
                _ => {}
            }
        }
    }

    #[test]
    fn an_incremental_checksum_is_the_whole_one(
        words in proptest::collection::vec(any::<u16>(), 2..20),
        at in any::<proptest::sample::Index>(),
        new in any::<u16>(),
    ) {
        let sum = |words: &[u16]| {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
            checksum::finish(checksum::add(0, &bytes))
        };
        let mut changed = words.clone();
        let at = at.index(words.len());
        changed[at] = new;
        let (updated, whole) = (checksum::update(sum(&words), words[at], new), sum(&changed));
        // 0 and 0xffff are the same number in one's complement.
        prop_assert!(updated == whole || updated ^ whole == 0xffff && [0, 0xffff].contains(&whole));
    }
}
