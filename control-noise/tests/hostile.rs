//! What strangers, vandals and replays get: a named drop, and nothing else.

mod common;
use blake2::{
    Blake2s256, Blake2sMac,
    digest::{Digest, KeyInit, Mac, consts::U16},
};
use common::*;
use esplane_api::DropReason;
use esplane_control_noise::{LoadPolicy, NoticeEvent, PublicKey, Severity};
use std::net::SocketAddr;

/// Where the test's own packets come from.
fn vandal() -> SocketAddr {
    "203.0.113.9:666".parse().unwrap()
}

/// Writes the MAC1 that anyone can compute who knows the receiver's public key. `behind` it come that
/// many bytes: MAC2 of an initiation.
fn forge_mac1(receiver: PublicKey, datagram: &mut [u8], behind: usize) {
    let key = Blake2s256::new()
        .chain_update(b"esplane 1 mac1")
        .chain_update(receiver.as_bytes())
        .finalize();
    let at = datagram.len() - behind - 16;
    let mut mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(&key).unwrap();
    Mac::update(&mut mac, &datagram[4..at]);
    datagram[at..at + 16].copy_from_slice(&mac.finalize().into_bytes());
}

/// An initiation of the right form and MAC1, and nothing in it that decrypts.
fn forged_initiation(receiver: PublicKey, number: u32) -> Vec<u8> {
    let mut datagram = vec![0; 195];
    datagram[4..8].copy_from_slice(b"Espl");
    datagram[8..12].copy_from_slice(&[1, 1, 0, 191]);
    datagram[12..16].copy_from_slice(&number.to_be_bytes());
    for (at, byte) in datagram[24..163].iter_mut().enumerate() {
        *byte = at as u8 ^ number as u8 | 1;
    }
    forge_mac1(receiver, &mut datagram, 16);
    datagram
}

/// Two nodes with a tunnel, and everything quiet.
fn connected() -> World {
    let mut world = World::pair(1, |_, _| {});
    world.initiate(0);
    world.run_for(seconds(10));
    assert!(world.is_established());
    world
}

/// Panics unless the node drops the datagram for this reason and that is all that happens.
fn assert_dropped(
    world: &mut World,
    node: usize,
    from: SocketAddr,
    datagram: &[u8],
    reason: DropReason,
) {
    let (before, dropped, sent) = (
        world.fingerprint(node),
        world.drops(node, reason),
        world.log.len(),
    );
    world.deliver_handshake(node, from, datagram);
    assert_eq!(world.drops(node, reason), dropped + 1, "{reason}");
    assert_eq!(world.fingerprint(node), before, "{reason} changes nothing");
    assert_eq!(world.log.len(), sent, "{reason} is not answered");
}

#[test]
fn garbage_and_every_truncation_is_malformed() {
    let mut world = connected();
    let (one, two) = (world.last_sent(0, 1), world.last_sent(1, 2));
    for length in 4..one.len() {
        assert_dropped(
            &mut world,
            1,
            address(0),
            &one[..length],
            DropReason::HandshakeMalformed,
        );
    }
    for length in 4..two.len() {
        assert_dropped(
            &mut world,
            0,
            address(1),
            &two[..length],
            DropReason::HandshakeMalformed,
        );
    }
    let mut longer = one.clone();
    longer.push(0);
    assert_dropped(
        &mut world,
        1,
        address(0),
        &longer,
        DropReason::HandshakeMalformed,
    );
    for byte in [4, 8, 10, 11, 16, 23] {
        let mut damaged = one.clone();
        damaged[byte] ^= 0x40;
        assert_dropped(
            &mut world,
            1,
            address(0),
            &damaged,
            DropReason::HandshakeMalformed,
        );
    }
    assert_dropped(
        &mut world,
        1,
        vandal(),
        &[0; 2000],
        DropReason::HandshakeMalformed,
    );
}

#[test]
fn an_ike_message_on_the_same_port_is_malformed() {
    let mut world = connected();
    // RFC 7296 §3.1: SPIs, next payload SA, version 2.0, IKE_SA_INIT, initiator, message 0, length.
    let mut ike = vec![
        0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0, 33, 0x20, 34, 8, 0, 0, 0, 0, 0,
        0, 0, 28,
    ];
    assert_dropped(
        &mut world,
        1,
        vandal(),
        &ike,
        DropReason::HandshakeMalformed,
    );
    ike[4..8].copy_from_slice(b"Espl"); // even with an SPI that looks like us
    ike[9] = 1;
    assert_dropped(
        &mut world,
        1,
        vandal(),
        &ike,
        DropReason::HandshakeMalformed,
    );
}

#[test]
fn another_version_is_named_as_such() {
    let mut world = connected();
    let mut message = world.last_sent(0, 1);
    message[9] = 2;
    assert_dropped(
        &mut world,
        1,
        address(0),
        &message,
        DropReason::HandshakeVersion,
    );
}

#[test]
fn who_does_not_know_our_key_gets_no_answer() {
    let mut world = connected();
    for (node, kind) in [(0, 1), (1, 2)] {
        let good = world.last_sent(node, kind);
        let mac1 = good.len() - if kind == 1 { 32 } else { 16 };
        for byte in [24, 100, mac1, mac1 + 15] {
            let mut damaged = good.clone();
            damaged[byte] ^= 1;
            assert_dropped(
                &mut world,
                1 - node,
                address(node),
                &damaged,
                DropReason::HandshakeBadMac,
            );
        }
    }
}

#[test]
fn our_own_message_reflected_is_not_for_us() {
    let mut world = connected();
    let (one, two) = (world.last_sent(0, 1), world.last_sent(1, 2));
    assert_dropped(&mut world, 0, address(1), &one, DropReason::HandshakeBadMac);
    assert_dropped(&mut world, 1, address(0), &two, DropReason::HandshakeBadMac);
}

#[test]
fn a_forged_initiation_does_not_decrypt() {
    let mut world = connected();
    let key = world.nodes[1].engine.public_key();
    assert_dropped(
        &mut world,
        1,
        vandal(),
        &forged_initiation(key, 1),
        DropReason::HandshakeDecryptFailed,
    );
    // One that was real until somebody changed where the answer goes, and made the MAC right again.
    world.initiate(0);
    let mut message = world.last_sent(0, 1);
    message[12] ^= 1;
    forge_mac1(key, &mut message, 16);
    assert_dropped(
        &mut world,
        1,
        address(0),
        &message,
        DropReason::HandshakeDecryptFailed,
    );
}

#[test]
fn a_forged_answer_does_not_disturb_the_handshake_it_is_for() {
    let mut world = World::pair(2, |_, _| {});
    world.filter = Box::new(|packet, _| packet.kind() != 2);
    world.initiate(0);
    world.run_for(ms(50));
    let real = world.last_sent(1, 2);
    let mut forged = real.clone();
    forged[60] ^= 1;
    forge_mac1(world.nodes[0].engine.public_key(), &mut forged, 0);
    assert_dropped(
        &mut world,
        0,
        vandal(),
        &forged,
        DropReason::HandshakeDecryptFailed,
    );
    world.filter = Box::new(|_, _| true);
    world.deliver_handshake(0, address(1), &real);
    world.run_for(ms(100));
    assert!(world.is_established(), "the real one is still welcome");
    world.assert_keys_match();
}

#[test]
fn a_stranger_is_named_and_not_answered() {
    let mut world = connected();
    let stranger = secret(77);
    let node = world.add(node_config(stranger.clone(), 3));
    let peer = peer_config(TUNNEL, "victim", &ordered_secrets().1, Some(address(1)));
    world.set_peers(node, vec![peer]);
    world.initiate(node);
    let message = world.last_sent(node, 1);
    assert_dropped(
        &mut world,
        1,
        address(node),
        &message,
        DropReason::HandshakeUnknownPeer,
    );
    let key = stranger.public_key().to_string();
    assert!(
        world.nodes[1].notice_texts().contains(&key),
        "the operator can copy it"
    );
    // However many there are, the log is not flooded.
    for _ in 0..5 {
        world.deliver_handshake(1, address(node), &message);
    }
    let strangers = |event: &NoticeEvent| matches!(event, NoticeEvent::Stranger { .. });
    assert_eq!(
        world.nodes[1]
            .notices
            .iter()
            .filter(|notice| strangers(&notice.event))
            .count(),
        1
    );
}

#[test]
fn a_replayed_initiation_is_recognised() {
    let mut world = connected();
    let first = world.last_sent(0, 1);
    assert_dropped(
        &mut world,
        1,
        address(0),
        &first,
        DropReason::HandshakeReplayed,
    );
    let replayed = |event: &NoticeEvent| matches!(event, NoticeEvent::Replayed { .. });
    assert!(
        !world.nodes[1].has_notice(replayed),
        "networks double packets, nobody need care"
    );
    world.initiate(0);
    world.run_for(seconds(1));
    assert_dropped(
        &mut world,
        1,
        vandal(),
        &first,
        DropReason::HandshakeReplayed,
    );
    assert!(world.nodes[1].has_notice(replayed));
}

#[test]
fn a_replayed_answer_belongs_to_no_handshake() {
    let mut world = connected();
    let answer = world.last_sent(1, 2);
    assert_dropped(
        &mut world,
        0,
        address(1),
        &answer,
        DropReason::HandshakeUnexpected,
    );
    world.initiate(0);
    assert_dropped(
        &mut world,
        0,
        address(1),
        &answer,
        DropReason::HandshakeUnexpected,
    );
    world.run_for(seconds(1));
    world.assert_keys_match();
}

#[test]
fn a_replay_to_a_node_that_has_forgotten_costs_it_one_answer_and_breaks_nothing() {
    let mut world = connected();
    let old = world.last_sent(0, 1);
    let (_, second) = ordered_secrets();
    let peer = peer_config(TUNNEL, "east", &ordered_secrets().0, Some(address(0)));
    world.restart(1, node_config(second, 50), vec![peer]);
    world.deliver_handshake(1, vandal(), &old);
    let sas = &world.nodes[1].tunnels[&TUNNEL];
    assert_eq!(
        (sas.inbound.len(), sas.outbound.len()),
        (1, 0),
        "it is not used before it is confirmed"
    );
    let number = world.send_data(1);
    world.run_for(seconds(10));
    world.assert_delivered(&[(1, number)]);
    world.run_for(seconds(30));
    assert_eq!(
        world.nodes[1].tunnels[&TUNNEL].inbound.len(),
        1,
        "what the replay left is gone"
    );
    world.assert_keys_match();
}

#[test]
fn under_load_a_cookie_is_asked_for_and_the_peer_that_shows_it_gets_in() {
    let (first, second) = ordered_secrets();
    let mut world = World::new(3);
    let under_load = LoadPolicy {
        cookies_above: 20,
        at_most: 1000,
        per_source: 10,
        per_source_burst: 100,
    };
    world.add(node_config(first.clone(), 1));
    let mut busy = node_config(second.clone(), 2);
    busy.under_load = under_load;
    world.add(busy);
    world.set_peers(
        0,
        vec![peer_config(TUNNEL, "east", &second, Some(address(1)))],
    );
    world.set_peers(1, vec![peer_config(TUNNEL, "west", &first, None)]);
    for number in 0..40 {
        let source = SocketAddr::new([198, 51, 100, number].into(), 1000);
        let flood = forged_initiation(second.public_key(), number.into());
        let before = world.log.len();
        world.deliver_handshake(1, source, &flood);
        for (_, reply) in &world.log[before..] {
            assert_eq!(
                (reply.kind(), reply.to),
                (3, source),
                "a cookie, to where it came from"
            );
        }
    }
    assert_eq!(world.drops(1, DropReason::HandshakeDecryptFailed), 20);
    assert_eq!(world.drops(1, DropReason::HandshakeCookieNeeded), 20);
    assert_eq!(
        world.last_sent(1, 3).len(),
        80,
        "less than half of the smallest initiation"
    );
    assert!(world.nodes[1].has_notice(|event| matches!(event, NoticeEvent::UnderLoad { .. })));

    let number = world.send_data(0);
    world.run_for(ms(100));
    world.assert_delivered(&[(0, number)]);
    assert_eq!(world.drops(1, DropReason::HandshakeCookieNeeded), 21);
    assert_eq!(
        world.count_sent(1),
        2,
        "the same initiation twice, then with the cookie"
    );

    // The cookie is worth nothing from elsewhere, nor under another message.
    world.initiate(0);
    let message = world.last_sent(0, 1);
    let from_elsewhere = world.drops(1, DropReason::HandshakeCookieNeeded);
    world.deliver_handshake(1, vandal(), &message);
    assert_eq!(
        world.drops(1, DropReason::HandshakeCookieNeeded),
        from_elsewhere + 1
    );
    world.run_for(seconds(10));
    assert_eq!(
        world.drops(1, DropReason::HandshakeCookieNeeded),
        from_elsewhere + 1,
        "it went through at once"
    );
    assert!(world.nodes[1].has_notice(|event| matches!(event, NoticeEvent::LoadOver)));
}

#[test]
fn a_forged_cookie_is_not_believed() {
    let mut world = World::pair(4, |_, _| {});
    world.filter = Box::new(|_, _| false);
    world.initiate(0);
    let mut cookie = vec![0; 80];
    cookie[4..8].copy_from_slice(b"Espl");
    cookie[8..12].copy_from_slice(&[3, 1, 0, 76]);
    cookie[12..16].copy_from_slice(&world.last_sent(0, 1)[12..16]);
    assert_dropped(
        &mut world,
        0,
        address(1),
        &cookie,
        DropReason::HandshakeDecryptFailed,
    );
    cookie[12] ^= 1;
    assert_dropped(
        &mut world,
        0,
        address(1),
        &cookie,
        DropReason::HandshakeUnexpected,
    );
}

#[test]
fn more_than_the_node_can_bear_is_dropped_without_a_word() {
    let (first, second) = ordered_secrets();
    let mut world = World::new(5);
    let mut config = node_config(first.clone(), 1);
    config.under_load = LoadPolicy {
        cookies_above: 2,
        at_most: 4,
        per_source: 1,
        per_source_burst: 1,
    };
    world.add(config);
    world.set_peers(0, vec![peer_config(TUNNEL, "west", &second, None)]);
    for number in 0..4 {
        world.deliver_handshake(0, vandal(), &forged_initiation(first.public_key(), number));
    }
    assert_eq!(world.drops(0, DropReason::HandshakeCookieNeeded), 3);
    assert_dropped(
        &mut world,
        0,
        vandal(),
        &forged_initiation(first.public_key(), 9),
        DropReason::HandshakeRateLimited,
    );
}

#[test]
fn a_peer_that_initiates_too_often_is_slowed_down_even_with_a_cookie() {
    let (first, second) = ordered_secrets();
    let mut world = World::new(6);
    world.add(node_config(first.clone(), 1));
    let mut strict = node_config(second.clone(), 2);
    strict.under_load = LoadPolicy {
        cookies_above: 1,
        at_most: 1000,
        per_source: 1,
        per_source_burst: 2,
    };
    world.add(strict);
    world.set_peers(
        0,
        vec![peer_config(TUNNEL, "east", &second, Some(address(1)))],
    );
    world.set_peers(
        1,
        vec![peer_config(TUNNEL, "west", &first, Some(address(0)))],
    );
    for _ in 0..12 {
        world.initiate(0);
        world.run_for(ms(100));
    }
    assert!(world.drops(1, DropReason::HandshakeRateLimited) > 0);
    world.run_for(seconds(20));
    assert!(world.is_established());
    world.assert_keys_match();
}

#[test]
fn nothing_that_comes_from_outside_can_make_it_panic_or_speak() {
    let mut world = connected();
    let mut dice = Dice::new(6);
    let seeds = [
        world.last_sent(0, 1),
        world.last_sent(1, 2),
        forged_initiation(world.nodes[1].engine.public_key(), 1),
    ];
    let before = world.fingerprint(1);
    let sent = world.log.len();
    for _ in 0..3000 {
        let mut message = seeds[dice.roll() as usize % seeds.len()].clone();
        for _ in 0..1 + dice.roll() % 8 {
            let at = 4 + dice.roll() as usize % (message.len() - 4);
            message[at] = dice.roll() as u8;
        }
        message.truncate(4 + dice.roll() as usize % message.len());
        world.deliver_handshake(1, vandal(), &message);
    }
    assert_eq!(world.fingerprint(1), before);
    assert_eq!(world.log.len(), sent);
    assert!(
        world.nodes[1]
            .notices
            .iter()
            .all(|notice| notice.severity() == Severity::Info)
    );
}
