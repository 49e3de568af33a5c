//! Peers whose address changes: laptops, lorries, and every second office behind a consumer line.

use crate::seconds;
use esplane_tests::sim::World;
use std::net::SocketAddr;

fn elsewhere() -> SocketAddr {
    "198.51.100.77:61000".parse().unwrap()
}

/// A peer gets another address in the middle of traffic. Its next authentic packet says so; nobody
/// shakes hands again, and nothing that it sends is lost.
#[test]
fn traffic_follows_a_peer_that_moves() {
    let (mut world, berlin, oslo) = World::pair(41, |_, _| {});
    world.assert_connected(berlin, oslo);
    let handshakes = world[berlin].peer("oslo").handshakes;
    world[oslo].address = elsewhere();
    world.flow(oslo, berlin, 20, seconds(5));
    world.run(seconds(1));
    world.flow(berlin, oslo, 20, seconds(4));
    world.run(seconds(10));
    world.assert_nothing_lost();
    assert_eq!(world[berlin].peer("oslo").endpoint, Some(elsewhere()));
    assert_eq!(world[berlin].peer("oslo").handshakes, handshakes);
}

/// Moving back and forth, with a rekey from the new place: the handshake follows too.
#[test]
fn a_peer_that_moves_keeps_its_tunnel_over_rekeys() {
    let (mut world, berlin, oslo) = World::pair(42, |_, peer| peer.rekey.seconds = 10);
    let home = world[oslo].address;
    world.assert_connected(berlin, oslo);
    for place in [elsewhere(), home, elsewhere()] {
        world[oslo].address = place;
        world.send(oslo, berlin);
        world.run(seconds(1));
        world.flow(berlin, oslo, 20, seconds(25));
        world.flow(oslo, berlin, 20, seconds(25));
        world.run(seconds(30));
        world.assert_nothing_lost();
        assert_eq!(world[berlin].peer("oslo").endpoint, Some(place));
    }
}

/// An eavesdropper sends a true packet again from his own address: it is a replay, and moves nobody. Nor does
/// a damaged one.
#[test]
fn a_replayed_or_forged_packet_moves_nobody() {
    let (mut world, berlin, oslo) = World::pair(43, |_, _| {});
    world.assert_connected(berlin, oslo);
    let before = world[berlin].state();
    let recorded: Vec<_> = world
        .network
        .capture
        .iter()
        .filter(|d| d.from == world[oslo].address)
        .cloned()
        .collect();
    for datagram in recorded {
        world.inject(elsewhere(), berlin, &datagram.payload);
        let mut damaged = datagram.payload;
        *damaged.last_mut().unwrap() ^= 1;
        world.inject(elsewhere(), berlin, &damaged);
    }
    world.run(seconds(1));
    assert_eq!(world[berlin].state(), before);
    world.assert_connected(berlin, oslo);
    assert!(
        !world
            .network
            .capture
            .iter()
            .any(|d| d.to == elsewhere() && !d.payload.starts_with(&[0; 4]))
    );
}
