//! What tunnel mode does to outer and inner headers, and packets that others published.

mod common;
use common::*;
use esplane_api::*;
use esplane_dataplane::*;

#[test]
fn an_outer_ipv4_header_is_complete() {
    let (mut west, _) = Scene::default().build();
    let packet = ipv4(ip("10.1.0.1"), ip("10.2.0.1"), 1, 0xb8 | 2, &[0; 8]);
    let outer = west.sealed(&packet);
    assert_eq!(outer.len(), 20 + 8 + 8 + 28 + 2 + 2 + 16);
    assert_eq!(outer[0], 0x45);
    assert_eq!(outer[1], 0xb8 | 2, "DSCP and ECN are the inner packet's");
    assert_eq!(outer[2..4], (outer.len() as u16).to_be_bytes());
    assert_eq!((outer[6], outer[7]), (0, 0), "no flag, no offset");
    assert_eq!((outer[8], outer[9]), (64, 50));
    assert_eq!(ipv4_checksum(&outer), 0, "a right checksum sums to zero");
    assert_eq!(outer[12..20], [192, 0, 2, 1, 192, 0, 2, 2]);
    assert_eq!(outer[20..24], 0x1000u32.to_be_bytes());
    assert_eq!(outer[24..28], 1u32.to_be_bytes());
    assert_eq!(outer[28..36], 1u64.to_be_bytes(), "the IV is the number");
    let next = west.sealed(&packet);
    assert_ne!(next[4..6], outer[4..6], "another identification");
}

#[test]
fn an_outer_ipv6_header_is_complete_and_its_udp_checksum_right() {
    let scene = Scene {
        outer_v6: true,
        udp: true,
        ..Scene::default()
    };
    let (mut west, _) = scene.build();
    let packet = ipv6(
        ip("2001:db8:1::1"),
        ip("2001:db8:2::1"),
        17,
        0xb9,
        &udp(1, 2, 5),
    );
    let outer = west.sealed(&packet);
    assert_eq!((outer[0], outer[1]), (0x6b, 0x90));
    assert_eq!(outer[4..6], (outer.len() as u16 - 40).to_be_bytes());
    assert_eq!((outer[6], outer[7]), (17, 64));
    assert_eq!(outer[40..44], [0x11, 0x94, 0x11, 0x95]);
    assert_eq!(outer[44..46], outer[4..6]);
    // RFC 8200 §8.1: pseudo-header and datagram, checksum included, sum to all ones.
    let mut sum: u32 = 17 + (outer.len() as u32 - 40);
    for word in outer[8..].chunks(2) {
        sum += u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0));
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    assert_eq!(sum, 0xffff);
}

#[test]
fn udp_over_ipv4_has_no_checksum() {
    let scene = Scene {
        udp: true,
        ..Scene::default()
    };
    let outer = scene.build().0.sealed(&inner(false, 10));
    assert_eq!(outer[9], 17);
    assert_eq!(outer[24..26], (outer.len() as u16 - 20).to_be_bytes());
    assert_eq!(outer[26..28], [0, 0], "RFC 3948 §2.1");
}

#[test]
fn the_kernel_is_told_what_it_writes() {
    let scene = Scene {
        udp: true,
        headers: OuterHeaders::ByKernel,
        df: DfPolicy::Set,
        ..Scene::default()
    };
    let (mut west, _) = scene.build();
    let packet = ipv4(ip("10.1.0.1"), ip("10.2.0.1"), 1, 0x2e, &[]);
    let (verdict, data, outer) = west.send(&[packet]).remove(0);
    assert_eq!(verdict, Verdict::Forward);
    assert_eq!(data[..4], 0x1000u32.to_be_bytes(), "data starts at ESP");
    let expected = Outer {
        local: ip("192.0.2.1"),
        remote: "192.0.2.2:4501".parse().unwrap(),
        local_port: 4500,
        udp: true,
        tos: 0x2e,
        df: true,
    };
    assert_eq!(outer, expected);
}

#[test]
fn dont_fragment_follows_the_tunnels_policy() {
    let mut with_df = inner(false, 10);
    with_df[6] = 0x40;
    for (df, packet, expected) in [
        (DfPolicy::Clear, &with_df, 0),
        (DfPolicy::Set, &inner(false, 10), 0x40),
        (DfPolicy::Copy, &with_df, 0x40),
        (DfPolicy::Copy, &inner(false, 10), 0),
        (DfPolicy::Copy, &inner(true, 10), 0),
    ] {
        let scene = Scene {
            df,
            ..Scene::default()
        };
        assert_eq!(scene.build().0.sealed(packet)[6], expected, "{df:?}");
    }
}

/// RFC 6040 §4.2, figure 4; `None` is the drop.
#[test]
fn congestion_marks_survive_decapsulation() {
    const NOT: u8 = 0;
    const ECT1: u8 = 1;
    const ECT0: u8 = 2;
    const CE: u8 = 3;
    let table = [
        (NOT, [Some(NOT), Some(NOT), Some(NOT), None]),
        (ECT0, [Some(ECT0), Some(ECT0), Some(ECT1), Some(CE)]),
        (ECT1, [Some(ECT1), Some(ECT1), Some(ECT1), Some(CE)]),
        (CE, [Some(CE), Some(CE), Some(CE), Some(CE)]),
    ];
    for v6 in [false, true] {
        for (inner_ecn, row) in table {
            for (outer_ecn, expected) in [NOT, ECT0, ECT1, CE].into_iter().zip(row) {
                let (mut west, mut east) = Scene::default().build();
                let tos = 0xb8 | inner_ecn;
                let packet = if v6 {
                    ipv6(ip("2001:db8:1::1"), ip("2001:db8:2::1"), 58, tos, &[0; 8])
                } else {
                    ipv4(ip("10.1.0.1"), ip("10.2.0.1"), 1, tos, &[0; 8])
                };
                let mut sealed = west.sealed(&packet);
                assert_eq!(sealed[1] & 3, inner_ecn, "RFC 6040 §4.1: copied outwards");
                sealed[1] = outer_ecn; // a router, which also clears the DSCP
                let (verdict, data) = east.receive_one(&sealed);
                let Some(expected) = expected else {
                    assert_eq!(verdict, Verdict::Drop(DropReason::CongestionLost));
                    continue;
                };
                assert_eq!(verdict, Verdict::Forward);
                if v6 {
                    assert_eq!(data[0] << 4 | data[1] >> 4, 0xb8 | expected);
                } else {
                    assert_eq!(data[1], 0xb8 | expected, "the inner DSCP stays");
                    assert_eq!(ipv4_checksum(&data), 0);
                }
            }
        }
    }
}

#[test]
fn padding_against_traffic_analysis_is_cut_off() {
    let scene = Scene::default();
    let (_, mut east) = scene.build();
    let forger = Forger::new(&scene, 0x1000, 1);
    for (number, v6) in [(1, false), (2, true)] {
        let packet = inner(v6, 30);
        let stuffed = [&packet[..], &[0x77; 500]].concat();
        assert_eq!(
            east.receive_one(&forger.packet(number, &stuffed)),
            (Verdict::Forward, packet)
        );
    }
}

#[test]
fn any_amount_of_right_padding_is_accepted() {
    let scene = Scene::default();
    let (_, mut east) = scene.build();
    let forger = Forger::new(&scene, 0x1000, 1);
    let packet = inner(false, 2); // 30 bytes: with 254 of padding and 2 of trailer a multiple of four
    let padding: Vec<u8> = (1..=254).collect();
    let right = [&packet[..], &padding, &[254, 4]].concat();
    assert_eq!(
        east.receive_one(&in_ipv4(&forger.esp(1, &right[..right.len()])))
            .0,
        Verdict::Drop(DropReason::EspTruncated),
        "286 is no multiple of four"
    );
    let packet = inner(false, 0);
    let right = [&packet[..], &padding, &[254, 4]].concat();
    assert_eq!(
        east.receive_one(&in_ipv4(&forger.esp(1, &right))),
        (Verdict::Forward, packet.clone())
    );
    let longer_than_the_packet = [&[0x45, 0][..], &[9, 4]].concat();
    let (verdict, _) = east.receive_one(&in_ipv4(&forger.esp(2, &longer_than_the_packet)));
    assert_eq!(verdict, Verdict::Drop(DropReason::BadPadding));
}

#[test]
fn next_header_and_inner_version_must_agree() {
    let scene = Scene::default();
    let (_, mut east) = scene.build();
    let forger = Forger::new(&scene, 0x1000, 1);
    let lie = forger.esp(1, &padded(&inner(false, 10), 41));
    assert_eq!(
        east.receive_one(&in_ipv4(&lie)).0,
        Verdict::Drop(DropReason::DecryptedMalformed)
    );
}

#[test]
fn outer_fragments_and_foreign_protocols_are_refused() {
    let (mut west, mut east) = Scene::default().build();
    let malformed = Verdict::Drop(DropReason::OuterMalformed);
    for tamper in [
        |packet: &mut Vec<u8>| packet[6] = 0x20, // more fragments
        |packet: &mut Vec<u8>| packet[7] = 1,    // an offset
        |packet: &mut Vec<u8>| packet[9] = 6,    // TCP
        |packet: &mut Vec<u8>| packet[0] = 0x75, // version 7
        |packet: &mut Vec<u8>| packet.clear(),
    ] {
        let mut sealed = west.sealed(&inner(false, 10));
        tamper(&mut sealed);
        assert_eq!(east.receive_one(&sealed).0, malformed);
    }
}

#[test]
fn bytes_behind_the_outer_packet_do_no_harm() {
    for udp in [false, true] {
        let scene = Scene {
            udp,
            ..Scene::default()
        };
        let (mut west, mut east) = scene.build();
        let mut sealed = west.sealed(&inner(false, 1));
        sealed.extend([0xee; 7]); // an Ethernet driver's padding
        assert_eq!(
            east.receive_one(&sealed),
            (Verdict::Forward, inner(false, 1))
        );
    }
}

#[test]
fn control_messages_are_handed_over_behind_their_marker() {
    for headers in [OuterHeaders::Written, OuterHeaders::ByKernel] {
        let scene = Scene {
            udp: true,
            headers,
            ..Scene::default()
        };
        let (_, mut east) = scene.build();
        for message in [&b"hello"[..], b""] {
            let payload = [&[0; 4], message].concat();
            let (packet, outer) = match headers {
                OuterHeaders::Written => (in_udp(&payload), Outer::NONE),
                OuterHeaders::ByKernel => (payload, scene.outer_at_east()),
            };
            let received = east.receive([(packet.as_slice(), outer)]).remove(0);
            assert_eq!(
                received,
                (Verdict::Control, message.to_vec(), scene.outer_at_east())
            );
        }
    }
}

#[test]
fn without_udp_a_zero_spi_is_no_marker() {
    let (_, mut east) = Scene::default().build();
    let (verdict, _) = east.receive_one(&in_ipv4(&[0; 40]));
    assert_eq!(verdict, Verdict::Drop(DropReason::ReservedSpi));
}

/// RFC 7634 Appendix A: a whole packet of ESP with ChaCha20-Poly1305.
#[test]
fn the_packet_of_rfc_7634_opens_to_the_one_it_was_made_of() {
    #[rustfmt::skip]
    let sealed = [
        0x45, 0x00, 0x00, 0x8c, 0x23, 0x45, 0x00, 0x00, 0x40, 0x32, 0xde, 0x5b, 0xcb, 0x00, 0x71, 0x99,
        0xcb, 0x00, 0x71, 0x05, 0x01, 0x02, 0x03, 0x04, 0x00, 0x00, 0x00, 0x05, 0x10, 0x11, 0x12, 0x13,
        0x14, 0x15, 0x16, 0x17, 0x24, 0x03, 0x94, 0x28, 0xb9, 0x7f, 0x41, 0x7e, 0x3c, 0x13, 0x75, 0x3a,
        0x4f, 0x05, 0x08, 0x7b, 0x67, 0xc3, 0x52, 0xe6, 0xa7, 0xfa, 0xb1, 0xb9, 0x82, 0xd4, 0x66, 0xef,
        0x40, 0x7a, 0xe5, 0xc6, 0x14, 0xee, 0x80, 0x99, 0xd5, 0x28, 0x44, 0xeb, 0x61, 0xaa, 0x95, 0xdf,
        0xab, 0x4c, 0x02, 0xf7, 0x2a, 0xa7, 0x1e, 0x7c, 0x4c, 0x4f, 0x64, 0xc9, 0xbe, 0xfe, 0x2f, 0xac,
        0xc6, 0x38, 0xe8, 0xf3, 0xcb, 0xec, 0x16, 0x3f, 0xac, 0x46, 0x9b, 0x50, 0x27, 0x73, 0xf6, 0xfb,
        0x94, 0xe6, 0x64, 0xda, 0x91, 0x65, 0xb8, 0x28, 0x29, 0xf6, 0x41, 0xe0, 0x76, 0xaa, 0xa8, 0x26,
        0x6b, 0x7f, 0xb0, 0xf7, 0xb1, 0x1b, 0x36, 0x99, 0x07, 0xe1, 0xad, 0x43,
    ];
    #[rustfmt::skip]
    let plain = [
        0x45, 0x00, 0x00, 0x54, 0xa6, 0xf2, 0x00, 0x00, 0x40, 0x01, 0xe7, 0x78, 0xc6, 0x33, 0x64, 0x05,
        0xc0, 0x00, 0x02, 0x05, 0x08, 0x00, 0x5b, 0x7a, 0x3a, 0x08, 0x00, 0x00, 0x55, 0x3b, 0xec, 0x10,
        0x00, 0x07, 0x36, 0x27, 0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0d, 0x0e, 0x0f, 0x10, 0x11, 0x12, 0x13,
        0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f, 0x20, 0x21, 0x22, 0x23,
        0x24, 0x25, 0x26, 0x27, 0x28, 0x29, 0x2a, 0x2b, 0x2c, 0x2d, 0x2e, 0x2f, 0x30, 0x31, 0x32, 0x33,
        0x34, 0x35, 0x36, 0x37,
    ];
    let key_and_salt: Vec<u8> = (0x80..=0xa3).collect();
    let scene = Scene {
        suite: AeadSuite::ChaCha20Poly1305,
        esn: Esn::Off,
        local: vec!["198.51.100.0/24"],
        remote: vec!["192.0.2.0/24"],
        ..Scene::default()
    };
    let mut params = scene.inbound(spi(0x0102_0304), 1);
    params.key = KeyMaterial::new(scene.suite, &key_and_salt).unwrap();
    let mut east = Gateway::new(OuterHeaders::Written);
    east.apply(vec![
        SaCommand::DefineTunnel(scene.tunnel_of_east()),
        SaCommand::Install(params),
    ]);
    assert_eq!(
        east.receive_one(&sealed),
        (Verdict::Forward, plain.to_vec())
    );
}

#[test]
fn the_largest_inner_packet_fills_the_outer_mtu_and_one_more_byte_does_not_fit() {
    for outer_v6 in [false, true] {
        for udp in [false, true] {
            let scene = Scene {
                outer_v6,
                udp,
                ..Scene::default()
            };
            let (mut west, _) = scene.build();
            for mtu in 1280..1300 {
                let largest = max_inner_bytes(mtu, &scene.west_path(), scene.suite);
                assert!(west.sealed(&inner(false, largest - 28)).len() <= mtu);
                assert!(west.sealed(&inner(false, largest - 27)).len() > mtu);
            }
        }
    }
    let path = Scene::default().west_path();
    assert_eq!(max_inner_bytes(0, &path, AeadSuite::Aes128Gcm16), 0);
    assert_eq!(max_inner_bytes(1500, &path, AeadSuite::Aes128Gcm16), 1446);
}

#[test]
fn what_ip_cannot_carry_is_refused() {
    let (mut west, _) = Scene::default().build();
    let (verdict, ..) = west.send(&[inner(false, 65_507)]).remove(0);
    assert_eq!(verdict, Verdict::Drop(DropReason::InnerTooBig));
    assert_eq!(west.status(Direction::Outbound).sequence, 0);
}
