//! A long life: peers move, die, come back, and are reconfigured.

mod common;
use common::*;
use esplane_api::{AeadSuite, SelectorPair, Spi, TunnelId};
use esplane_control_noise::{
    ConfigError, Engine, Initiate, KemPolicy, NoticeEvent, PeerConfig, PeerState,
};

fn connected(adjust: impl Fn(usize, &mut PeerConfig)) -> World {
    let mut world = World::pair(1, adjust);
    world.initiate(0);
    world.run_for(seconds(5));
    assert!(world.is_established());
    world
}

fn config_of(node: usize) -> PeerConfig {
    let (first, second) = ordered_secrets();
    let key = if node == 0 { second } else { first };
    peer_config(
        TUNNEL,
        if node == 0 { "east" } else { "west" },
        &key,
        Some(address(1 - node)),
    )
}

#[test]
fn a_peer_that_moves_is_followed_by_its_esp() {
    let mut world = connected(|_, _| {});
    let moved = "198.51.100.7:61000".parse().unwrap();
    world.nodes[1].address = moved;
    let first = world.send_data(1);
    world.run_for(ms(50));
    assert_eq!(world.status(0).endpoint, Some(moved));
    let second = world.send_data(0);
    world.run_for(ms(50));
    world.assert_delivered(&[(1, first), (0, second)]);
    assert!(
        world.nodes[0]
            .has_notice(|event| matches!(event, NoticeEvent::Moved { to, .. } if *to == moved))
    );
    // Handshakes go there as well.
    world.initiate(0);
    world.run_for(seconds(1));
    assert_eq!((world.status(0).rekeys, world.status(1).rekeys), (1, 1));
    world.assert_keys_match();
}

#[test]
fn a_peer_that_moves_is_followed_by_its_handshake() {
    for initiator in 0..2 {
        let mut world = connected(|_, _| {});
        let moved = "[2001:db8::7]:61000".parse().unwrap();
        world.nodes[1].address = moved;
        if initiator == 0 {
            // It is looked for where it was, in vain, until it speaks.
            world.initiate(0);
            world.run_for(seconds(3));
            assert_eq!(world.status(0).rekeys, 0);
        }
        world.initiate(1);
        world.run_for(seconds(10));
        assert_eq!(
            world.status(0).endpoint,
            Some(moved),
            "initiator {initiator}"
        );
        world.assert_keys_match();
        let numbers = [(0, world.send_data(0)), (1, world.send_data(1))];
        world.run_for(seconds(1));
        world.assert_delivered(&numbers);
    }
}

#[test]
fn a_peer_that_lost_its_memory_is_asked_and_the_tunnel_heals() {
    for initiate in [Initiate::OnDemand, Initiate::AtStart] {
        let mut world = connected(|_, _| {});
        let mut config = config_of(1);
        config.initiate = initiate;
        world.restart(1, node_config(ordered_secrets().1, 99), vec![config]);
        let start = world.now;
        while world.now < start + seconds(30) {
            world.send_data(0); // one way only: the peer has no SA to answer with
            world.run_for(ms(500));
        }
        assert!(world.is_established());
        world.assert_keys_match();
        let noticed =
            world.nodes[0].has_notice(|event| matches!(event, NoticeEvent::Silent { .. }));
        assert_eq!(noticed, initiate == Initiate::OnDemand);
        let number = world.send_data(0);
        world.run_for(seconds(1));
        world.assert_delivered(&[(0, number)]);
    }
}

#[test]
fn a_peer_that_only_listens_is_not_taken_for_dead() {
    let mut world = connected(|_, _| {});
    let start = world.now;
    while world.now < start + seconds(200) {
        world.send_data(0);
        world.run_for(seconds(1));
    }
    assert_eq!(world.status(0).state, PeerState::Established);
    assert_eq!(world.count_sent(1), 1, "its dummies were answer enough");
}

#[test]
fn a_dead_peer_is_noticed_only_by_who_sends() {
    let mut world = connected(|_, _| {});
    world.filter = Box::new(|packet, _| packet.from != address(1));
    world.run_for(seconds(100));
    assert_eq!(
        world.status(0).state,
        PeerState::Established,
        "nobody asked"
    );
    let start = world.now;
    while world.now < start + seconds(20) {
        world.send_data(0);
        world.run_for(seconds(1));
    }
    assert_eq!(world.status(0).state, PeerState::Silent);
    assert!(world.count_sent(1) > 1);
    world.filter = Box::new(|_, _| true);
    world.run_for(seconds(20));
    assert!(world.is_established());
    world.assert_keys_match();
}

#[test]
fn dead_peer_detection_can_be_switched_off() {
    let mut world = connected(|_, peer| peer.dead_after_seconds = None);
    world.filter = Box::new(|packet, _| packet.from != address(1));
    let start = world.now;
    while world.now < start + seconds(100) {
        world.send_data(0);
        world.run_for(seconds(1));
    }
    assert_eq!(
        (world.status(0).state, world.count_sent(1)),
        (PeerState::Established, 1)
    );
}

#[test]
fn a_persistent_keepalive_is_an_authenticated_packet() {
    let mut world = connected(|node, peer| peer.keepalive_seconds = (node == 1).then_some(20));
    let before = world.log.len();
    world.run_for(seconds(201));
    let sent = &world.log[before..];
    assert_eq!(sent.len(), 10);
    assert!(
        sent.iter()
            .all(|(_, packet)| packet.is_dummy() && packet.from == address(1))
    );
}

#[test]
fn a_clock_that_is_set_back_does_not_stop_rekeying() {
    let mut world = connected(|_, _| {});
    world.nodes[0].unix_offset = -7200;
    for rekeys in 1..4 {
        world.initiate(0);
        world.run_for(seconds(20));
        assert_eq!(
            (world.status(0).rekeys, world.status(1).rekeys),
            (rekeys, rekeys)
        );
    }
}

#[test]
fn a_node_that_restarts_with_an_old_clock_is_told_what_to_check() {
    let mut world = connected(|_, _| {});
    world.nodes[0].unix_offset = -7200;
    world.restart(0, node_config(ordered_secrets().0, 98), vec![config_of(0)]);
    world.send_data(0);
    world.run_for(seconds(10));
    assert!(world.nodes[1].notice_texts().contains("check its clock"));
    // The other end may still call.
    world.initiate(1);
    world.run_for(seconds(10));
    world.assert_keys_match();
}

#[test]
fn a_reload_that_changes_nothing_does_nothing() {
    let mut world = connected(|_, _| {});
    let before = world.fingerprint(0);
    world.set_peers(0, vec![config_of(0)]);
    assert_eq!(world.fingerprint(0), before);
    world.run_for(seconds(10));
    assert_eq!(world.count_sent(1), 1);
}

#[test]
fn a_reload_with_other_routes_keeps_the_sas_and_renews_them_without_loss() {
    let mut world = connected(|_, _| {});
    let mut config = config_of(0);
    config
        .selectors
        .push(SelectorPair::to("10.99.0.0/16".parse().unwrap()));
    let mut sent = world.talk_until(world.now + seconds(1), ms(5));
    world.set_peers(0, vec![config]);
    assert_eq!(world.nodes[0].definitions[&TUNNEL], 2);
    sent.extend(world.talk_until(world.now + seconds(5), ms(5)));
    world.run_for(seconds(1));
    world.assert_delivered(&sent);
    assert_eq!(world.status(0).rekeys, 1);
    let sas = &world.nodes[0].tunnels[&TUNNEL];
    assert_eq!(sas.outbound[0].selectors.len(), 2);
}

#[test]
fn a_reload_with_another_key_or_secret_or_cipher_ends_the_sas() {
    let changes: [fn(&mut PeerConfig); 4] = [
        |peer| peer.psk = psk(5),
        |peer| peer.suites = vec![AeadSuite::ChaCha20Poly1305],
        |peer| peer.kem = KemPolicy::Off,
        |peer| peer.public_key = secret(55).public_key(),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut world = connected(|_, _| {});
        let mut config = config_of(0);
        change(&mut config);
        world.set_peers(0, vec![config]);
        let sas = &world.nodes[0].tunnels[&TUNNEL];
        assert!(sas.inbound.is_empty() && sas.outbound.is_empty());
        assert_eq!(world.status(0).state, PeerState::Idle);
        let mut other = config_of(1);
        change(&mut other);
        if number < 3 {
            world.set_peers(1, vec![other]);
            let sent = world.send_data(0);
            world.run_for(seconds(5));
            world.assert_delivered(&[(0, sent)]);
        }
    }
}

#[test]
fn a_reload_without_a_peer_removes_its_tunnel_and_its_handshakes() {
    let mut world = connected(|_, _| {});
    let answer_to_nobody = world.last_sent(1, 1 + 1);
    world.initiate(0);
    world.set_peers(0, Vec::new());
    assert!(world.nodes[0].tunnels.is_empty());
    assert_eq!(world.nodes[0].engine.poll_timeout(), None);
    assert!(world.nodes[0].engine.peers().is_empty());
    world.deliver_handshake(0, address(1), &answer_to_nobody);
    world.set_peers(0, vec![config_of(0)]);
    let number = world.send_data(0);
    world.run_for(seconds(5));
    world.assert_delivered(&[(0, number)]);
}

#[test]
fn a_reload_that_is_wrong_changes_nothing_and_names_who_is_wrong() {
    let mut world = connected(|_, _| {});
    let own = ordered_secrets().0;
    let third = |change: fn(&mut PeerConfig)| {
        let mut peer = peer_config(TunnelId(3), "north", &secret(33), Some(address(7)));
        change(&mut peer);
        peer
    };
    let cases: Vec<(PeerConfig, &[&str])> = vec![
        (third(|peer| peer.id = TUNNEL), &["`east`", "`north`", "#1"]),
        (
            third(|peer| peer.name = "east".into()),
            &["two peers", "`east`"],
        ),
        (
            third(|peer| peer.public_key = ordered_secrets().1.public_key()),
            &["`east`", "`north`", "same public key"],
        ),
        (
            peer_config(TunnelId(3), "mirror", &own, None),
            &["`mirror`", "own public key"],
        ),
        (
            third(|peer| peer.selectors = config_of(0).selectors),
            &["`east`", "`north`", "10.1.0.0/16"],
        ),
        (
            third(|peer| peer.selectors.clear()),
            &["`north`", "no routes"],
        ),
        (
            third(|peer| peer.suites.clear()),
            &["`north`", "aes128gcm16"],
        ),
        (
            third(|peer| peer.suites = vec![AeadSuite::Aes128Gcm16; 2]),
            &["`north`", "aes128gcm16 twice"],
        ),
        (
            third(|peer| peer.endpoint = Some("0.0.0.0:4500".parse().unwrap())),
            &["`north`", "0.0.0.0:4500"],
        ),
        (
            third(|peer| peer.endpoint = Some("192.0.2.1:0".parse().unwrap())),
            &["`north`", "192.0.2.1:0"],
        ),
        (
            third(|peer| peer.rekey.seconds = 0),
            &["`north`", "rekey seconds is 0", "at least 1"],
        ),
        (
            third(|peer| peer.rekey.packets = Some(0)),
            &["`north`", "rekey packets"],
        ),
        (
            third(|peer| peer.keepalive_seconds = Some(0)),
            &["`north`", "keepalive"],
        ),
        (
            third(|peer| peer.dead_after_seconds = Some(1)),
            &["`north`", "dead after", "at least 3"],
        ),
    ];
    for (wrong, words) in cases {
        let before = world.fingerprint(0);
        let now = world.time(0);
        let mut changed = config_of(0);
        changed.psk = psk(1); // must not count either
        let error: ConfigError = world.nodes[0]
            .engine
            .set_peers(now, vec![changed, wrong])
            .unwrap_err();
        for word in words {
            assert!(error.to_string().contains(word), "{error}");
        }
        assert!(world.nodes[0].engine.poll_output().is_none());
        assert_eq!(world.fingerprint(0), before);
    }
}

#[test]
fn a_node_that_could_never_work_is_not_made() {
    let mut config = node_config(secret(1), 1);
    config.listen_port = 0;
    assert_eq!(Engine::new(config).err(), Some(ConfigError::ListenPort));
    let mut config = node_config(secret(1), 1);
    config.under_load.per_source = 0;
    assert_eq!(
        Engine::new(config).err(),
        Some(ConfigError::LoadPolicy("per_source"))
    );
}

#[test]
fn debug_output_holds_no_secret() {
    let config = node_config(secret(0x61), 0x62);
    let text = format!("{config:?}");
    assert!(text.contains("[redacted]"), "{text}");
    assert!(
        !text.contains("97, 97") && !text.contains("98, 98"),
        "{text}"
    );
}

#[test]
fn inbound_spis_avoid_those_of_static_sas() {
    // With this seed the first SPI is known; reserving it must give another.
    let first_spi = |reserved: Vec<Spi>| {
        let (first, second) = ordered_secrets();
        let mut world = World::new(1);
        let mut config = node_config(first, 1);
        config.reserved_spis = reserved;
        world.add(config);
        world.add(node_config(second, 2));
        world.set_peers(0, vec![config_of(0)]);
        world.set_peers(1, vec![config_of(1)]);
        world.initiate(0);
        world.run_for(seconds(1));
        *world.nodes[0].tunnels[&TUNNEL]
            .inbound
            .keys()
            .next()
            .unwrap()
    };
    let usual = first_spi(Vec::new());
    assert_eq!(usual, first_spi(Vec::new()));
    assert_ne!(usual, first_spi(vec![usual]));
}

#[test]
fn one_node_serves_many_peers_each_with_its_own_keys() {
    let mut world = World::new(9);
    let hub = secret(200);
    world.add(node_config(hub.clone(), 1));
    let mut peers = Vec::new();
    for number in 1..=20 {
        let spoke = secret(number);
        world.add(node_config(spoke.clone(), number + 1));
        let mut peer = peer_config(
            TunnelId(number.into()),
            &format!("spoke {number}"),
            &spoke,
            None,
        );
        peer.selectors = vec![SelectorPair::to(
            format!("10.{number}.0.0/16").parse().unwrap(),
        )];
        peers.push(peer);
    }
    world.set_peers(0, peers);
    for node in 1..=20 {
        let mut config = peer_config(TUNNEL, "hub", &hub, Some(address(0)));
        config.initiate = Initiate::AtStart;
        world.set_peers(node, vec![config]);
    }
    world.run_for(seconds(5));
    for (status, node) in world.nodes[0].engine.peers().iter().zip(1..) {
        assert_eq!(
            (status.state, status.endpoint),
            (PeerState::Established, Some(address(node)))
        );
    }
    world.run_for(seconds(1500)); // two rekeys each
    for status in world.nodes[0].engine.peers() {
        assert!(status.rekeys >= 2, "{status:?}");
        assert_eq!((status.failures, status.state), (0, PeerState::Established));
    }
}
