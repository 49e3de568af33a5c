//! Two engines get to know each other, and refuse whom they do not.

mod common;
use common::*;
use esplane_api::{AeadSuite, Direction, DropReason, Esn, WindowSize};
use esplane_control_noise::{
    Disagreement, Initiate, KemPolicy, NoticeEvent, PeerConfig, PeerState,
};

#[test]
fn the_first_packet_starts_a_handshake_and_is_delivered() {
    let mut world = World::pair(1, |_, _| {});
    let number = world.send_data(0);
    world.run_for(seconds(1));
    assert!(world.is_established());
    world.assert_keys_match();
    world.assert_delivered(&[(0, number)]);
    assert_eq!((world.count_sent(1), world.count_sent(2)), (1, 1));
    assert_eq!(
        (world.status(0).handshakes, world.status(1).handshakes),
        (1, 1)
    );
    assert_eq!((world.status(0).rekeys, world.status(1).rekeys), (0, 0));
}

#[test]
fn nothing_is_sent_before_it_is_needed() {
    let mut world = World::pair(2, |_, _| {});
    world.run_for(seconds(3600));
    assert!(world.log.is_empty());
    assert_eq!(world.status(0).state, PeerState::Idle);
}

#[test]
fn a_peer_that_should_be_there_at_start_is_called_at_start() {
    let mut world = World::pair(3, |node, peer| {
        peer.initiate = if node == 0 {
            Initiate::AtStart
        } else {
            Initiate::OnDemand
        };
        if node == 1 {
            peer.endpoint = None; // it learns where the other is
        }
    });
    world.run_for(seconds(1));
    assert!(world.is_established());
    assert_eq!(world.status(1).endpoint, Some(address(0)));
    let sent = world.talk_until(seconds(1010), ms(100));
    world.run_for(seconds(1));
    world.assert_delivered(&sent);
}

#[test]
fn both_ends_calling_at_once_make_one_tunnel() {
    for seed in 0..20 {
        let mut world = World::pair(seed, |_, peer| peer.initiate = Initiate::AtStart);
        world.run_for(seconds(5));
        assert!(world.is_established(), "seed {seed}");
        world.assert_keys_match();
        // The lower key goes first: it is the only one that is answered.
        assert_eq!(world.count_sent(2), 1, "seed {seed}");
        assert_eq!(world.drops(0, DropReason::HandshakeUnexpected), 1);
        assert_eq!(world.nodes[0].tunnels[&TUNNEL].inbound.len(), 1);
        assert_eq!(world.nodes[1].tunnels[&TUNNEL].inbound.len(), 1);
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_seed_others() {
    let bytes = |seed| {
        let mut world = World::pair(seed, |_, _| {});
        world.initiate(0);
        world.run_for(seconds(1));
        (world.last_sent(0, 1), world.last_sent(1, 2))
    };
    assert_eq!(bytes(7), bytes(7));
    assert_ne!(bytes(7).0[24..56], bytes(8).0[24..56], "the ephemeral key");
}

#[test]
fn every_suite_width_and_kem_that_both_ends_have_works() {
    for suite in AeadSuite::ALL {
        for esn in [Esn::On, Esn::Off] {
            for kem in [KemPolicy::MlKem768, KemPolicy::MlKem512, KemPolicy::Off] {
                let mut world = World::pair(4, |_, peer| {
                    (peer.suites, peer.esn, peer.kem) = (vec![suite], esn, kem);
                    (peer.psk, peer.window) = (psk(9), WindowSize::new(1024).unwrap());
                });
                world.initiate(1);
                world.run_for(seconds(1));
                world.assert_keys_match();
                let status = world.status(0);
                assert_eq!(
                    (status.suite, status.kem, status.has_psk),
                    (Some(suite), kem, true)
                );
                assert_eq!(status.peer_window_packets, Some(1024));
                let sas = &world.nodes[0].tunnels[&TUNNEL];
                let inbound = &sas.inbound.values().next().unwrap().params;
                assert_eq!((inbound.esn, inbound.direction), (esn, Direction::Inbound));
                assert_eq!(
                    (inbound.key.suite(), inbound.window.packets()),
                    (suite, 1024)
                );
                assert_eq!(inbound.selectors.len(), 1);
            }
        }
    }
}

/// Message sizes as the crate's documentation tells them: UDP payload, marker included.
#[test]
fn handshakes_have_the_size_that_is_written_down_and_no_answer_is_larger() {
    for (kem, initiation, response) in [
        (KemPolicy::MlKem768, 1379, 1197),
        (KemPolicy::MlKem512, 995, 877),
        (KemPolicy::Off, 195, 109),
    ] {
        let mut world = World::pair(5, |_, peer| peer.kem = kem);
        world.initiate(0);
        world.run_for(seconds(1));
        let (one, two) = (world.last_sent(0, 1).len(), world.last_sent(1, 2).len());
        assert_eq!((one, two), (initiation, response), "{kem}");
        assert!(two <= one, "an answer must not amplify");
    }
}

#[test]
fn the_end_with_the_lower_key_decides_the_suite_whoever_asks() {
    let (gcm, chacha) = (AeadSuite::Aes256Gcm16, AeadSuite::ChaCha20Poly1305);
    for initiator in 0..2 {
        let mut world = World::pair(6, |node, peer| {
            peer.suites = if node == 0 {
                vec![chacha, gcm]
            } else {
                vec![AeadSuite::Aes128Gcm16, gcm, chacha]
            };
        });
        world.initiate(initiator);
        world.run_for(seconds(1));
        assert_eq!(world.status(0).suite, Some(chacha));
        world.assert_keys_match();
    }
}

type Adjustment = Box<dyn Fn(usize, &mut PeerConfig)>;

#[test]
fn ends_that_are_configured_differently_say_so_on_both_sides_and_make_no_tunnel() {
    let kems = [KemPolicy::MlKem768, KemPolicy::MlKem512, KemPolicy::Off];
    let mut cases: Vec<(Disagreement, Adjustment)> = vec![
        (
            Disagreement::Esn,
            Box::new(|node, peer| peer.esn = if node == 0 { Esn::On } else { Esn::Off }),
        ),
        (
            Disagreement::Suites,
            Box::new(|node, peer| peer.suites = vec![AeadSuite::ALL[node]]),
        ),
    ];
    for (one, other) in [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)] {
        cases.push((
            Disagreement::Kem,
            Box::new(move |node, peer| peer.kem = kems[if node == 0 { one } else { other }]),
        ));
    }
    for (what, adjust) in cases {
        let mut world = World::pair(7, adjust);
        world.send_data(0);
        let before = world.fingerprint(1).0;
        world.run_for(seconds(10));
        for node in 0..2 {
            assert!(
                world.nodes[node].has_notice(|event| *event == NoticeEvent::Disagreement(what)),
                "{what:?}"
            );
            assert_eq!(
                world.drops(node, DropReason::HandshakeSettings),
                1,
                "{what:?}"
            );
            assert!(world.nodes[node].tunnels[&TUNNEL].inbound.is_empty());
        }
        assert_eq!(world.fingerprint(1).0, before);
        assert_eq!(
            world.count_sent(1),
            1,
            "a refusal is not asked again at once"
        );
        assert_eq!(world.status(0).state, PeerState::Unreachable);
    }
}

#[test]
fn another_pre_shared_key_is_noticed_by_both() {
    for (one, other) in [(psk(1), psk(2)), (psk(1), None), (None, psk(2))] {
        let mut world = World::pair(8, |node, peer| {
            peer.psk = if node == 0 {
                one.clone()
            } else {
                other.clone()
            }
        });
        world.send_data(0);
        world.run_for(seconds(120));
        assert!(!world.is_established());
        assert!(world.drops(0, DropReason::HandshakeDecryptFailed) > 0);
        assert!(
            world.nodes[0]
                .notice_texts()
                .contains("same pre-shared key"),
            "{}",
            world.nodes[0].notice_texts()
        );
        assert!(
            world.nodes[1]
                .notice_texts()
                .contains("pre-shared keys differ")
        );
        assert!(world.nodes[0].tunnels[&TUNNEL].inbound.is_empty());
        assert!(
            world.nodes[1].tunnels[&TUNNEL].inbound.is_empty(),
            "unconfirmed SAs go"
        );
        assert!(world.nodes[1].tunnels[&TUNNEL].outbound.is_empty());
    }
}

#[test]
fn a_pre_shared_key_gives_other_keys_than_none() {
    let key = |psk| {
        let mut world = World::pair(9, |_, peer| peer.psk = Clone::clone(&psk));
        world.initiate(0);
        world.run_for(seconds(1));
        world.nodes[0].tunnels[&TUNNEL].outbound[0].key.clone()
    };
    assert!(!key(None).same_secret(&key(psk(1))));
    assert!(!key(psk(2)).same_secret(&key(psk(1))));
    assert!(key(psk(1)).same_secret(&key(psk(1))));
}

#[test]
fn a_peer_without_an_address_waits_for_one() {
    let mut world = World::pair(10, |_, peer| peer.endpoint = None);
    let number = world.send_data(0);
    world.run_for(seconds(60));
    assert!(world.log.is_empty());
    assert!(world.nodes[0].has_notice(|event| *event == NoticeEvent::NoEndpoint));
    let now = world.time(0);
    world.nodes[0].engine.set_endpoint(now, TUNNEL, address(1)); // DNS has answered
    world.carry_out(0);
    world.run_for(seconds(1));
    world.assert_delivered(&[(0, number)]);
}

#[test]
fn a_peer_that_does_not_answer_is_given_up_and_asked_again_with_the_next_packet() {
    let mut world = World::pair(11, |_, _| {});
    world.filter = Box::new(|_, _| false);
    world.send_data(0);
    world.run_for(seconds(300));
    let attempts = world.count_sent(1);
    assert!((8..=12).contains(&attempts), "{attempts} in 90 s");
    assert_eq!(
        (world.status(0).state, world.status(0).failures),
        (PeerState::Unreachable, 1)
    );
    assert!(world.nodes[0].has_notice(|event| matches!(
        event,
        NoticeEvent::NoAnswer {
            retrying: false,
            ..
        }
    )));
    assert_eq!(
        world.nodes[0].engine.poll_timeout(),
        None,
        "nothing is left to do"
    );
    world.filter = Box::new(|_, _| true);
    let number = world.send_data(0);
    world.run_for(seconds(1));
    world.assert_delivered(&[(0, number)]);
}

#[test]
fn a_peer_that_should_be_there_at_start_is_asked_for_ever_but_slowly() {
    let mut world = World::pair(12, |node, peer| {
        peer.initiate = if node == 0 {
            Initiate::AtStart
        } else {
            Initiate::OnDemand
        };
    });
    world.filter = Box::new(|_, _| false);
    world.run_for(seconds(3600));
    let attempts = world.count_sent(1);
    assert!((95..=130).contains(&attempts), "{attempts} in an hour");
    assert_eq!(world.status(0).state, PeerState::Unreachable);
    world.filter = Box::new(|_, _| true);
    world.run_for(seconds(40));
    assert!(world.is_established());
}

#[test]
fn a_slow_link_gets_its_handshake_all_the_same() {
    let mut world = World::pair(13, |_, peer| peer.initiate = Initiate::AtStart);
    world.handshake_faults.delay_ms = (900, 900); // a round trip of 1.8 s, longer than the first repetitions wait
    world.esp_faults.delay_ms = (900, 900);
    world.run_for(seconds(20));
    assert!(world.is_established());
    world.assert_keys_match();
}

#[test]
fn a_lost_answer_is_asked_for_again() {
    let mut world = World::pair(14, |_, _| {});
    let mut answers = 0;
    world.filter = Box::new(move |packet, _| {
        answers += u32::from(packet.kind() == 2);
        packet.kind() != 2 || answers > 3
    });
    let number = world.send_data(0);
    world.run_for(seconds(20));
    world.assert_delivered(&[(0, number)]);
    world.assert_keys_match();
    assert_eq!(world.count_sent(1), 4);
    assert_eq!(
        world.nodes[1].tunnels[&TUNNEL].inbound.len(),
        1,
        "unanswered ones are gone"
    );
}
