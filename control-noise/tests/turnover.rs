//! Make before break: SAs come and go, and no packet is lost by it.

mod common;
use common::*;
use esplane_api::{Direction, DropReason, LifetimeUnit, SaEvent, SaId};
use esplane_control_noise::{Initiate, NoticeEvent, PeerState, RekeyPolicy};

fn rekeying_every(seconds: u32) -> impl Fn(usize, &mut esplane_control_noise::PeerConfig) {
    move |_, peer| {
        peer.rekey = RekeyPolicy {
            seconds,
            bytes: None,
            packets: None,
        };
        peer.initiate = Initiate::AtStart;
    }
}

#[test]
fn rekeying_by_time_loses_nothing() {
    for seed in 0..8 {
        let mut world = World::pair(seed, rekeying_every(2));
        let sent = world.talk_until(seconds(1030), ms(7));
        world.run_for(seconds(1));
        world.assert_delivered(&sent);
        world.assert_keys_match();
        let rekeys = world.status(0).rekeys;
        assert!(
            (13..=17).contains(&rekeys),
            "seed {seed}: {rekeys} rekeys in 30 s"
        );
        assert_eq!(world.status(1).rekeys, rekeys);
    }
}

#[test]
fn an_sa_for_each_worker_rekeys_with_all_others_and_loses_nothing() {
    // What either end offers need not be the same; each uses no more than it offers itself.
    for (seed, [west, east]) in (60..).zip([[4, 4], [4, 1], [1, 4], [2, 16]]) {
        let mut world = World::pair(seed, |node, peer| {
            rekeying_every(2)(node, peer);
            peer.parallel_sas = [west, east][node];
        });
        world.esp_faults.delay_ms = (5, 60);
        let sent = world.talk_until(seconds(1030), ms(7));
        world.run_for(seconds(1));
        world.assert_delivered(&sent);
        world.assert_keys_match();
        assert!(world.status(0).rekeys >= 12, "{west} and {east}");
        for node in &world.nodes {
            assert_eq!(node.tunnels[&TUNNEL].outbound.len(), west.min(east).into());
        }
        for (node, offers) in [(0, west), (1, east)] {
            let inbound = world.nodes[node].tunnels[&TUNNEL].inbound.len();
            assert!(
                inbound.is_multiple_of(offers.into()),
                "whole generations: {inbound}"
            );
        }
    }
}

#[test]
fn rekeying_every_second_keeps_the_number_of_sas_bounded() {
    let mut world = World::pair(20, rekeying_every(1));
    let sent = world.talk_until(seconds(1060), ms(20));
    world.run_for(seconds(1));
    world.assert_delivered(&sent);
    for node in &world.nodes {
        assert!(
            node.most_inbound <= 6,
            "{} inbound SAs at once",
            node.most_inbound
        );
    }
}

#[test]
fn rekeying_on_a_bad_network_loses_no_packet_that_the_network_did_not_lose() {
    for seed in 0..15 {
        let mut world = World::pair(seed, rekeying_every(5));
        world.handshake_faults = Faults {
            lose_percent: 30,
            double_percent: 20,
            delay_ms: (5, 400),
        };
        world.esp_faults = Faults {
            lose_percent: 0,
            double_percent: 20,
            delay_ms: (5, 400),
        };
        // Dummies are lost as well: they carry the confirmation.
        let mut dice = Dice::new(seed + 99);
        world.filter = Box::new(move |packet, _| !(packet.is_dummy() && dice.chance(30)));
        let sent = world.talk_until(seconds(1060), ms(50));
        world.run_for(seconds(5));
        world.assert_delivered(&sent);
        assert!(world.is_established(), "seed {seed}");
        assert!(
            world.status(0).rekeys >= 3,
            "seed {seed}: {} rekeys",
            world.status(0).rekeys
        );
    }
}

#[test]
fn a_very_bad_network_still_ends_in_agreement() {
    for seed in 0..15 {
        let mut world = World::pair(seed, |node, peer| {
            rekeying_every(10)(node, peer);
            peer.dead_after_seconds = None;
        });
        let faults = Faults {
            lose_percent: 50,
            double_percent: 30,
            delay_ms: (1, 1500),
        };
        (world.handshake_faults, world.esp_faults) = (faults, faults);
        world.talk_until(seconds(1120), ms(500));
        (world.handshake_faults, world.esp_faults) = (Faults::NONE, Faults::NONE);
        world.run_for(seconds(30));
        let sent = world.talk_until(seconds(1200), ms(100));
        world.run_for(seconds(5));
        world.assert_delivered(&sent);
        assert!(world.is_established(), "seed {seed}");
    }
}

#[test]
fn simultaneous_rekeys_are_resolved_without_loss() {
    for offset in [0, 3, 9, 10, 11, 19, 20, 21, 40] {
        let mut world = World::pair(offset, rekeying_every(600));
        world.run_for(seconds(5));
        let mut sent = Vec::new();
        for (first, second) in [(0, 1), (1, 0)] {
            world.initiate(first);
            sent.extend(world.talk_until(world.now + ms(offset), ms(1)));
            world.initiate(second);
            sent.extend(world.talk_until(world.now + seconds(20), ms(3)));
            world.assert_keys_match();
        }
        world.run_for(seconds(1));
        world.assert_delivered(&sent);
    }
}

#[test]
fn rekeying_by_packets_is_asked_for_by_the_initiator_alone() {
    let mut world = World::pair(21, |_, peer| {
        peer.rekey = RekeyPolicy {
            seconds: 600,
            bytes: None,
            packets: Some(500),
        };
    });
    world.initiate(0);
    world.run_for(seconds(1));
    let sent = world.talk_until(seconds(1030), ms(10));
    world.run_for(seconds(1));
    world.assert_delivered(&sent);
    let rekeys = world.status(0).rekeys;
    assert!(
        (5..=6).contains(&rekeys),
        "{rekeys} rekeys for 3000 packets each way"
    );
    let from_west = world
        .log
        .iter()
        .filter(|(_, packet)| packet.kind() == 1 && packet.from == address(1));
    assert_eq!(from_west.count(), 0);
}

#[test]
fn rekeying_by_bytes_is_asked_for_by_the_responder_when_the_initiator_does_not() {
    let mut world = World::pair(22, |_, _| {});
    world.initiate(0);
    world.run_for(seconds(1));
    let spi = world.nodes[1].tunnels[&TUNNEL].active.unwrap();
    let sa = SaId {
        tunnel: TUNNEL,
        direction: Direction::Outbound,
        spi,
    };
    world.event(
        1,
        SaEvent::SoftExpired {
            sa,
            unit: LifetimeUnit::Bytes,
        },
    );
    assert_eq!(world.count_sent(1), 1, "the initiator has precedence");
    world.run_for(seconds(5));
    assert_eq!(world.count_sent(1), 2);
    assert_eq!((world.status(0).rekeys, world.status(1).rekeys), (1, 1));
    // An event about an SA that is gone means nothing.
    world.event(
        1,
        SaEvent::SoftExpired {
            sa,
            unit: LifetimeUnit::Bytes,
        },
    );
    world.event(
        1,
        SaEvent::HardExpired {
            sa,
            unit: LifetimeUnit::Bytes,
        },
    );
    world.run_for(seconds(5));
    assert_eq!(world.count_sent(1), 2);
    assert!(world.is_established());
}

#[test]
fn an_sa_without_numbers_left_is_replaced_at_once() {
    let mut world = World::pair(23, |_, _| {});
    world.initiate(0);
    world.run_for(seconds(1));
    for node in 0..2 {
        let before = world.status(0).rekeys;
        let spi = world.nodes[node].tunnels[&TUNNEL].active.unwrap();
        let sa = SaId {
            tunnel: TUNNEL,
            direction: Direction::Outbound,
            spi,
        };
        world.event(node, SaEvent::SequenceExhausted { sa });
        world.run_for(ms(100));
        assert_eq!(world.status(0).rekeys, before + 1);
    }
}

#[test]
fn the_hard_limit_ends_the_pair_and_the_next_packet_makes_another() {
    let mut world = World::pair(24, |_, _| {});
    world.initiate(0);
    world.run_for(seconds(1));
    for node in 0..2 {
        let spi = *world.nodes[node].tunnels[&TUNNEL]
            .inbound
            .keys()
            .next()
            .unwrap();
        let sa = SaId {
            tunnel: TUNNEL,
            direction: Direction::Inbound,
            spi,
        };
        world.event(
            node,
            SaEvent::HardExpired {
                sa,
                unit: LifetimeUnit::Packets,
            },
        );
        assert!(
            world.nodes[node].tunnels[&TUNNEL].outbound.is_empty(),
            "never in clear, never beyond the limit"
        );
        assert_eq!(world.status(node).state, PeerState::Idle);
        assert!(world.nodes[node].has_notice(|event| *event == NoticeEvent::Expired));
    }
    let number = world.send_data(1);
    world.run_for(seconds(1));
    world.assert_delivered(&[(1, number)]);
}

#[test]
fn the_responder_does_not_send_before_the_initiator_is_known_to_receive() {
    let mut world = World::pair(25, |_, _| {});
    world.filter = Box::new(|packet, _| packet.kind() != 2); // the answer is lost
    world.initiate(0);
    world.run_for(ms(400));
    let sas = &world.nodes[1].tunnels[&TUNNEL];
    assert_eq!((sas.inbound.len(), sas.outbound.len()), (1, 0));
    let number = world.send_data(1);
    world.filter = Box::new(|_, _| true);
    world.run_for(seconds(5));
    world.assert_delivered(&[(1, number)]);
}

#[test]
fn a_lost_confirmation_is_repeated() {
    let mut world = World::pair(26, |_, _| {});
    let mut dummies = 0;
    world.filter = Box::new(move |packet, _| {
        dummies += u32::from(packet.is_dummy());
        !packet.is_dummy() || dummies > 3
    });
    world.initiate(0);
    world.run_for(seconds(5));
    assert!(world.is_established());
    world.assert_keys_match();
    assert_eq!(world.count_sent(1), 1, "no second handshake was needed");
}

#[test]
fn confirmations_that_never_arrive_lead_to_another_handshake() {
    let mut world = World::pair(27, |_, _| {});
    world.filter = Box::new(|packet, now| !packet.is_dummy() || now > seconds(1012));
    world.initiate(0);
    world.run_for(seconds(40));
    assert!(world.is_established());
    world.assert_keys_match();
    assert!(world.count_sent(1) >= 2);
}

#[test]
fn an_idle_confirmed_tunnel_is_quiet() {
    let mut world = World::pair(28, |_, _| {});
    world.initiate(0);
    world.run_for(seconds(10));
    let sent = world.log.len();
    world.run_for(seconds(500));
    assert_eq!(world.log.len(), sent);
}

#[test]
fn stragglers_are_received_for_the_grace_time_and_then_the_old_sa_goes() {
    let mut world = World::pair(29, |_, _| {});
    world.initiate(0);
    world.run_for(seconds(5));
    let old = *world.nodes[1].tunnels[&TUNNEL]
        .inbound
        .keys()
        .next()
        .unwrap();
    world.initiate(0);
    world.run_for(seconds(14));
    assert!(world.nodes[1].tunnels[&TUNNEL].inbound.contains_key(&old));
    world.run_for(seconds(3));
    assert!(!world.nodes[1].tunnels[&TUNNEL].inbound.contains_key(&old));
}

#[test]
fn a_peer_that_is_gone_for_good_leaves_no_sa_behind() {
    let mut world = World::pair(30, |_, peer| {
        peer.rekey = RekeyPolicy {
            seconds: 60,
            bytes: None,
            packets: None,
        };
    });
    world.initiate(0);
    world.run_for(seconds(5));
    world.filter = Box::new(|packet, _| packet.from != address(1));
    world.run_for(seconds(240));
    assert!(world.nodes[0].tunnels[&TUNNEL].outbound.is_empty());
    assert!(world.nodes[0].tunnels[&TUNNEL].inbound.is_empty());
    assert!(world.nodes[0].has_notice(|event| *event == NoticeEvent::Expired));
    // It comes back, and so does the tunnel.
    world.filter = Box::new(|_, _| true);
    let number = world.send_data(0);
    world.run_for(seconds(6));
    world.assert_delivered(&[(0, number)]);
}

#[test]
fn the_second_of_two_equal_answers_is_dropped() {
    let mut world = World::pair(31, |_, _| {});
    world.initiate(0);
    world.run_for(seconds(5));
    let answer = world.last_sent(1, 2);
    let before = world.fingerprint(0);
    world.deliver_handshake(0, address(1), &answer);
    assert_eq!(world.fingerprint(0), before);
    assert_eq!(world.drops(0, DropReason::HandshakeUnexpected), 1);
}

#[test]
fn both_ends_initiating_at_random_on_a_bad_network_lose_nothing() {
    for seed in 0..6 {
        let mut world = World::pair(seed, rekeying_every(2));
        world.handshake_faults = Faults {
            lose_percent: 25,
            double_percent: 20,
            delay_ms: (1, 250),
        };
        world.esp_faults = Faults {
            lose_percent: 0,
            double_percent: 10,
            delay_ms: (1, 250),
        };
        let mut network = Dice::new(seed + 7);
        world.filter = Box::new(move |packet, _| !(packet.is_dummy() && network.chance(30)));
        let mut dice = Dice::new(seed + 77);
        let mut sent = Vec::new();
        let end = world.now + seconds(30);
        while world.now < end {
            for node in 0..2 {
                if dice.chance(4) {
                    world.initiate(node);
                }
                if dice.chance(60) {
                    sent.push((node, world.send_data(node)));
                }
            }
            world.run_for(ms(20));
        }
        world.run_for(seconds(5));
        world.assert_delivered(&sent);
        assert!(world.is_established(), "seed {seed}");
    }
}
