//! People with a packet generator and a recording. Whatever they send changes nothing and earns them no
//! larger answer than what they paid.

use crate::seconds;
use esplane_api::DropReason;
use esplane_tests::sim::{Datagram, GatewayId, Random, World};
use std::{net::SocketAddr, time::Duration};

/// A tunnel with ten rekeys' worth of recorded traffic, now quiet.
fn after_a_session(seed: u64) -> (World, GatewayId, GatewayId) {
    let (mut world, berlin, oslo) = World::pair(seed, |_, peer| peer.rekey.seconds = 30);
    world.flow(berlin, oslo, 30, seconds(100));
    world.flow(oslo, berlin, 30, seconds(100));
    world.run(seconds(105));
    world.assert_nothing_lost();
    (world, berlin, oslo)
}

fn attacker(random: &mut Random) -> SocketAddr {
    SocketAddr::from((
        [203, 0, 113, random.number() as u8],
        1024 + random.below(60_000) as u16,
    ))
}

/// Every datagram of a whole session once more, from its true sender's address and from another: every
/// single one is dropped with a name, and the tunnel has not moved by a bit.
#[test]
fn a_recorded_session_is_worth_nothing() {
    let (mut world, berlin, oslo) = after_a_session(61);
    let recording: Vec<Datagram> = world.network.capture.clone();
    for from_truth in [true, false] {
        for victim in [berlin, oslo] {
            let to = world[victim].address;
            let (state, drops) = (world[victim].state(), total(&world, victim));
            let replays: Vec<_> = recording
                .iter()
                .filter(|datagram| datagram.to == to)
                .collect();
            for datagram in &replays {
                let from = if from_truth {
                    datagram.from
                } else {
                    "203.0.113.9:4500".parse().unwrap()
                };
                world.inject(from, victim, &datagram.payload);
            }
            assert_eq!(world[victim].state(), state);
            assert_eq!(
                total(&world, victim) - drops,
                replays.len() as u64,
                "{:?}",
                world[victim].all_drops()
            );
        }
    }
    world.assert_nothing_twice();
    world.assert_connected(berlin, oslo);
    let drops = world.drops();
    for reason in [
        DropReason::ReplayDuplicate,
        DropReason::UnknownSpi,
        DropReason::HandshakeReplayed,
    ] {
        assert!(drops[reason] > 0, "no {reason} among {drops:?}");
    }
}

/// A gateway's own datagrams thrown back at it: neither its handshakes nor its ESP may convince it of anything.
#[test]
fn reflected_packets_are_nobodys() {
    let (mut world, berlin, oslo) = after_a_session(62);
    let (own, peer) = (world[berlin].address, world[oslo].address);
    let state = world[berlin].state();
    let reflections: Vec<_> = world
        .network
        .capture
        .iter()
        .filter(|datagram| datagram.from == own)
        .cloned()
        .collect();
    let drops = total(&world, berlin);
    for datagram in &reflections {
        world.inject(peer, berlin, &datagram.payload);
    }
    assert_eq!(world[berlin].state(), state);
    assert_eq!(total(&world, berlin) - drops, reflections.len() as u64);
    world.assert_connected(berlin, oslo);
}

/// A hundred thousand packets of noise and of damaged recordings, from everywhere, in half a minute.
#[test]
fn a_storm_of_garbage_changes_nothing_and_is_not_amplified() {
    let (mut world, berlin, oslo) = after_a_session(63);
    let recording = world.network.capture.clone();
    let sent_before = world.network.capture.len();
    let state = world[berlin].state();
    let drops = total(&world, berlin);
    let mut random = Random::new(63);
    let mut injected_bytes = 0;
    for round in 0..1000 {
        for _ in 0..100 {
            let garbage = garbage(&mut random, &recording);
            injected_bytes += garbage.len();
            let from = if random.chance(0.5) {
                world[oslo].address
            } else {
                attacker(&mut random)
            };
            world.inject(from, berlin, &garbage);
        }
        if round % 100 == 0 {
            assert_eq!(world[berlin].state(), state);
        }
        world.run(Duration::from_millis(5));
    }
    assert_eq!(world[berlin].state(), state);
    assert_eq!(
        total(&world, berlin) - drops,
        100_000,
        "every packet has a named drop: {:?}",
        world.drops()
    );
    let answered: usize = world.network.capture[sent_before..]
        .iter()
        .map(|datagram| datagram.payload.len())
        .sum();
    assert!(
        answered <= injected_bytes,
        "{answered} bytes for {injected_bytes}"
    );
    world.assert_connected(berlin, oslo);
    world.assert_nothing_lost();
}

/// Each single datagram of an unauthenticated sender is answered with no more bytes than it had, whatever
/// prefix of a true handshake it is.
#[test]
fn no_answer_is_longer_than_its_question() {
    let (mut world, _, oslo) = after_a_session(64);
    let recording = world.network.capture.clone();
    let mut random = Random::new(64);
    let to = world[oslo].address;
    for datagram in recording
        .iter()
        .filter(|datagram| datagram.to == to && datagram.carries.is_none())
    {
        for length in 0..=datagram.payload.len() {
            let from = attacker(&mut random);
            let sent_before = world.network.capture.len();
            world.inject(from, oslo, &datagram.payload[..length]);
            let answer: usize = world.network.capture[sent_before..]
                .iter()
                .map(|d| d.payload.len())
                .sum();
            assert!(answer <= length, "{answer} bytes in answer to {length}");
        }
    }
}

/// Noise, or a recorded datagram with some bytes changed, cut off, or grown.
fn garbage(random: &mut Random, recording: &[Datagram]) -> Vec<u8> {
    if random.chance(0.3) {
        let length = random.below(300);
        let mut noise = random.bytes(length);
        if random.chance(0.5) && length >= 5 {
            noise[..4].fill(0); // the non-ESP marker
            noise[4] = random.below(6) as u8;
        }
        return noise;
    }
    let mut payload = recording[random.below(recording.len())].payload.clone();
    match random.below(4) {
        0 => payload.truncate(random.below(payload.len())),
        1 => payload.extend([0; 4]),
        _ => {
            for _ in 0..=random.below(4) {
                let at = random.below(payload.len());
                payload[at] ^= 1 << random.below(8);
            }
        }
    }
    payload
}

/// All drops, the expected ones included.
fn total(world: &World, gateway: GatewayId) -> u64 {
    world[gateway]
        .all_drops()
        .iter()
        .map(|(_, count)| count)
        .sum()
}
