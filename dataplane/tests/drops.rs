//! Every reason for a drop that lies with the dataplane, provoked on purpose.

mod common;
use common::*;
use esplane_api::*;
use esplane_dataplane::*;
use std::collections::BTreeSet;

/// A reason, what provokes it, and the verdict that came of it.
type Story = (DropReason, fn() -> Gateway);

/// Reasons that only the gateway's drivers and queues can meet.
const NOT_OURS: [DropReason; 9] = [
    DropReason::InnerOverrun,
    DropReason::OuterOverrun,
    DropReason::BypassUnavailable,
    DropReason::HoldQueueFull,
    DropReason::HoldTimeout,
    DropReason::TransmitFailed,
    DropReason::TransmitQueueFull,
    DropReason::DeliverFailed,
    DropReason::ReceiveTruncated,
];

const STORIES: &[Story] = &[
    (DropReason::InnerMalformed, || west_sends(&[0x45; 19])),
    (DropReason::NoPolicy, || {
        west_sends(&ipv4(ip("10.1.0.1"), ip("10.9.0.1"), 1, 0, &[]))
    }),
    (DropReason::LinkLocal, || {
        west_sends(&ipv6(ip("fe80::1"), ip("ff02::16"), 58, 0, &[0; 8]))
    }),
    (DropReason::PolicyDiscard, || {
        let scene = Scene::default();
        let (mut west, _) = scene.build();
        let mut tunnel = scene.tunnel_of_west();
        tunnel.policies.push(Policy {
            selectors: pair("10.1.0.0/16", "10.2.0.9"),
            action: PolicyAction::Discard,
            priority: 10,
        });
        west.apply(vec![SaCommand::DefineTunnel(tunnel)]);
        west.send(&[inner(false, 10)]);
        west
    }),
    (DropReason::SequenceExhausted, || {
        let sequence = SequenceStart {
            first: u64::from(u32::MAX),
            reserved_until: None,
        };
        let scene = Scene {
            esn: Esn::Off,
            sequence,
            ..Scene::default()
        };
        let (mut west, _) = scene.build();
        west.send(&[inner(false, 10), inner(false, 10)]);
        west
    }),
    (DropReason::OutboundLifetimeExpired, || {
        let (mut west, _) = limited_to_one_packet().build();
        west.send(&[inner(false, 10), inner(false, 10)]);
        west
    }),
    (DropReason::InnerTooBig, || {
        let (mut west, _) = Scene::default().build();
        let mut batch = Batch::new(1, 256);
        let packet = inner(false, 36);
        let end = 256 - 19; // one byte too few for trailer and ICV
        let at = end - packet.len()..end;
        batch.push_placed(0..256, at, Outer::NONE);
        batch.data_mut(0).copy_from_slice(&packet);
        let tables = west.writer.tables();
        west.outbound.process(&tables, &mut batch, &mut west.report);
        west
    }),
    (DropReason::OuterMalformed, || {
        east_receives(|_, sealed| sealed.truncate(19))
    }),
    (DropReason::EspTruncated, || {
        let (_, mut east) = Scene::default().build();
        let forged = in_ipv4(&[0, 0, 0x10, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
        east.receive_one(&forged);
        east
    }),
    (DropReason::ReservedSpi, || {
        let (_, mut east) = Scene::default().build();
        east.receive_one(&in_ipv4(&[0, 0, 0, 255, 0, 0, 0, 1]));
        east
    }),
    (DropReason::Keepalive, || {
        let (_, mut east) = Scene::default().build();
        east.receive_one(&in_udp(&[0xff]));
        east
    }),
    (DropReason::UnknownSpi, || {
        east_receives(|_, sealed| sealed[20] ^= 1)
    }),
    (DropReason::EncapMismatch, || {
        east_receives(|_, sealed| *sealed = in_udp(&sealed[20..]))
    }),
    (DropReason::InboundLifetimeExpired, || {
        let (mut west, mut east) = limited_to_one_packet().build();
        let forger = Forger::new(&limited_to_one_packet(), 0x1000, 1);
        east.receive_one(&west.sealed(&inner(false, 10)));
        east.receive_one(&forger.packet(2, &inner(false, 10)));
        east
    }),
    (DropReason::ReplayTooOld, || {
        let scene = Scene {
            esn: Esn::Off,
            ..Scene::default()
        };
        let (_, mut east) = scene.build();
        let forger = Forger::new(&scene, 0x1000, 1);
        east.receive_one(&forger.packet(5000, &inner(false, 10)));
        east.receive_one(&forger.packet(5000 - 4096, &inner(false, 10)));
        east
    }),
    (DropReason::ReplayDuplicate, || {
        let (mut west, mut east) = Scene::default().build();
        let sealed = west.sealed(&inner(false, 10));
        east.receive_one(&sealed);
        east.receive_one(&sealed);
        east
    }),
    (DropReason::AuthenticationFailed, || {
        east_receives(|_, sealed| sealed[40] ^= 1)
    }),
    (DropReason::BadPadding, || {
        east_decrypts(&[&inner(false, 2)[..], &[1, 2, 3, 3, 4, 4]].concat())
    }),
    (DropReason::DummyPacket, || east_decrypts(&[1, 2, 2, 59])),
    (DropReason::UnsupportedNextHeader, || {
        east_decrypts(&padded(&[0; 20], 6))
    }),
    (DropReason::DecryptedMalformed, || {
        east_decrypts(&padded(&[0x45; 19], 4))
    }),
    (DropReason::SelectorMismatch, || {
        east_decrypts(&padded(&ipv4(ip("10.9.0.1"), ip("10.2.0.1"), 1, 0, &[]), 4))
    }),
    (DropReason::CongestionLost, || {
        east_receives(|_, sealed| sealed[1] |= 3)
    }),
];

fn west_sends(packet: &[u8]) -> Gateway {
    let (mut west, _) = Scene::default().build();
    west.send(&[packet.to_vec()]);
    west
}

/// One packet from west, tampered with on the way.
fn east_receives(tamper: fn(&mut Gateway, &mut Vec<u8>)) -> Gateway {
    let (mut west, mut east) = Scene::default().build();
    let mut sealed = west.sealed(&inner(false, 10));
    tamper(&mut west, &mut sealed);
    east.receive_one(&sealed);
    east
}

/// One authentic packet with this inside.
fn east_decrypts(encrypted: &[u8]) -> Gateway {
    let scene = Scene::default();
    let (_, mut east) = scene.build();
    let esp = Forger::new(&scene, 0x1000, 1).esp(1, encrypted);
    east.receive_one(&in_ipv4(&esp));
    east
}

fn limited_to_one_packet() -> Scene {
    let one = Limits {
        packets: Some(1),
        ..Limits::NONE
    };
    Scene {
        lifetime: Lifetime::new(Limits::NONE, one).unwrap(),
        ..Scene::default()
    }
}

#[test]
fn each_story_is_dropped_for_its_reason_and_counted_once() {
    for (reason, story) in STORIES {
        let gateway = story();
        let counted: Vec<_> = gateway
            .report
            .drops
            .iter()
            .filter(|(_, count)| *count > 0)
            .collect();
        assert_eq!(counted, [(*reason, 1)]);
    }
}

#[test]
fn every_reason_of_the_dataplane_has_its_story() {
    let told: BTreeSet<_> = STORIES.iter().map(|(reason, _)| *reason).collect();
    let ours: BTreeSet<_> = DropReason::ALL
        .iter()
        .copied()
        .filter(|reason| reason.stage() != DropStage::Handshake && !NOT_OURS.contains(reason))
        .collect();
    assert_eq!(told, ours);
}

#[test]
fn a_drop_leaves_its_neighbours_alone() {
    let (mut west, mut east) = Scene::default().build();
    let mut sealed: Vec<_> = (0..9)
        .map(|size| west.sealed(&inner(false, size)))
        .collect();
    sealed[1][40] ^= 1; // authentication
    sealed[4] = sealed[3].clone(); // duplicate within the batch
    sealed[7].truncate(10); // outer header
    let received = east.receive(sealed.iter().map(|packet| (packet.as_slice(), Outer::NONE)));
    for (at, (verdict, data, _)) in received.into_iter().enumerate() {
        match at {
            1 => assert_eq!(verdict, Verdict::Drop(DropReason::AuthenticationFailed)),
            4 => assert_eq!(verdict, Verdict::Drop(DropReason::ReplayDuplicate)),
            7 => assert_eq!(verdict, Verdict::Drop(DropReason::OuterMalformed)),
            _ => assert_eq!((verdict, data), (Verdict::Forward, inner(false, at))),
        }
    }
}

#[test]
fn a_verdict_given_before_stands() {
    let (mut west, _) = Scene::default().build();
    let mut batch = Batch::new(1, 2048);
    assert!(batch.push(&inner(false, 10), Outer::NONE));
    batch.packets_mut()[0].verdict = Verdict::Drop(DropReason::ReceiveTruncated);
    let tables = west.writer.tables();
    west.outbound.process(&tables, &mut batch, &mut west.report);
    assert_eq!(
        batch.packets()[0].verdict,
        Verdict::Drop(DropReason::ReceiveTruncated)
    );
    assert_eq!(west.status(Direction::Outbound).sequence, 0);
}
