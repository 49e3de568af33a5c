//! How tunnels come up.

use crate::seconds;
use esplane_api::DropReason;
use esplane_control_noise::{Initiate, KemPolicy, LoadPolicy, PeerState};
use esplane_tests::sim::{GatewayId, Weather, World};
use std::time::Duration;

/// A tunnel that nobody uses costs nothing; the first packet brings it up and is not lost by doing so:
/// or else every first connection after a quiet night would begin with a timeout.
#[test]
fn the_first_packet_brings_the_tunnel_up_and_arrives() {
    let (mut world, berlin, oslo) = World::pair(1, |_, _| {});
    world.run(seconds(60));
    assert!(
        world.network.capture.is_empty(),
        "nobody has sent anything yet"
    );
    let first = world.send(berlin, oslo);
    world.run(seconds(1));
    assert!(world.has_arrived(first));
    assert_eq!(world[berlin].peer("oslo").state, PeerState::Established);
    assert_eq!(world[oslo].peer("berlin").state, PeerState::Established);
    world.assert_connected(berlin, oslo);
    world.assert_nothing_lost();
    world.assert_nothing_dropped();
    assert_eq!(world[berlin].peer("oslo").handshakes, 1);
}

/// A burst before the tunnel is up is held, in order and bounded, not dropped.
#[test]
fn packets_that_come_before_the_keys_wait_for_them() {
    let (mut world, berlin, oslo) = World::pair(2, |_, _| {});
    for _ in 0..50 {
        world.send(berlin, oslo);
    }
    world.run(seconds(1));
    world.assert_nothing_lost();
    world.assert_nothing_dropped();
}

/// Whoever wants its tunnels up before the first packet says so; both ends may.
#[test]
fn a_tunnel_comes_up_at_start_when_told_to() {
    let (mut world, berlin, oslo) = World::pair(3, |_, peer| peer.initiate = Initiate::AtStart);
    world.run(seconds(5));
    assert_eq!(world[berlin].peer("oslo").state, PeerState::Established);
    assert_eq!(world[oslo].peer("berlin").state, PeerState::Established);
}

/// Both hosts speak at the same moment, as at the end of a power cut. Both ends must resolve the
/// crossing handshakes the same way, whatever the seed, and lose nothing.
#[test]
fn both_ends_initiate_at_once() {
    for seed in 0..20 {
        let (mut world, berlin, oslo) = World::pair(seed, |_, _| {});
        world.network.weather.delay = Duration::from_millis(1 + 20 * seed);
        world.send(berlin, oslo);
        world.send(oslo, berlin);
        world.run(seconds(5));
        world.assert_nothing_lost();
        world.flow(berlin, oslo, 20, seconds(5));
        world.flow(oslo, berlin, 20, seconds(5));
        world.run(seconds(10));
        world.assert_nothing_lost();
        let handshakes =
            world[berlin].peer("oslo").handshakes + world[oslo].peer("berlin").handshakes;
        assert!(
            handshakes <= 4,
            "seed {seed}: {handshakes} handshakes: the ends do not agree which one counts"
        );
    }
}

/// Three sites, each with a tunnel to each other: nothing is mixed up. (The world itself checks that
/// every packet comes out at the network it was sent to.)
#[test]
fn three_gateways_form_a_mesh() {
    let (mut world, ids) = World::mesh(5, 3, |_, _| {});
    for from in &ids {
        for to in ids.iter().filter(|to| *to != from) {
            world.flow(*from, *to, 25, seconds(10));
        }
    }
    world.run(seconds(15));
    assert_eq!(world.ledger.delivered.len(), 6 * 250);
    world.assert_nothing_lost();
    world.assert_nothing_dropped();
}

/// Behind a NAT only one end can be reached: the other must come to it, and does.
#[test]
fn an_end_without_an_endpoint_waits_to_be_called() {
    let (mut world, berlin, oslo) = World::pair(6, |gateway, peer| {
        if gateway == GatewayId(1) {
            peer.endpoint = None;
        }
    });
    world.send(berlin, oslo);
    world.run(seconds(2));
    world.assert_connected(oslo, berlin);
    world.assert_nothing_lost();
}

/// IPv6's smallest MTU is 1280 bytes, which leaves 1232 for UDP. With ML-KEM-512 handshakes fit, and
/// so no firewall that drops fragments is in the way.
#[test]
fn a_handshake_fits_the_smallest_mtu_with_ml_kem_512() {
    let (mut world, berlin, oslo) = World::pair(7, |_, peer| peer.kem = KemPolicy::MlKem512);
    world.network.weather.payload_bytes_max = 1280 - 40 - 8;
    world.send(berlin, oslo);
    world.run(seconds(2));
    assert_eq!(world[oslo].peer("berlin").state, PeerState::Established);
    assert!(
        world
            .network
            .capture
            .iter()
            .all(|datagram| datagram.payload.len() <= 1232 || datagram.carries.is_some())
    );
}

/// A node under load asks strangers to show that they are where they say they are. A true peer does so
/// without its user noticing more than one round trip.
#[test]
fn a_node_under_load_lets_in_who_shows_a_cookie() {
    let mut world = World::new(8);
    let (mut berlin, mut oslo) = (world.spec(0), world.spec(1));
    let (as_oslo, as_berlin) = (
        oslo.as_peer(2, &["10.2.0.0/16", "fd00:2::/32"]),
        berlin.as_peer(1, &["10.1.0.0/16", "fd00:1::/32"]),
    );
    berlin.peers.push(as_oslo);
    oslo.peers.push(as_berlin);
    oslo.under_load = LoadPolicy {
        cookies_above: 1,
        ..LoadPolicy::default()
    };
    let (berlin, oslo) = (world.start(berlin), world.start(oslo));
    // Two other initiations in the same second put it under load.
    world.send(berlin, oslo);
    world.run(seconds(1));
    for _ in 0..2 {
        world.restart(berlin);
        world.send(berlin, oslo);
        world.run(Duration::from_millis(100));
    }
    world.run(seconds(20));
    let asked = world[oslo].node.handshake_drops()[DropReason::HandshakeCookieNeeded];
    assert!(asked > 0, "never asked for a cookie: {:?}", world.drops());
    world.assert_connected(berlin, oslo);
}

/// A handshake survives a link that loses every third datagram.
#[test]
fn a_tunnel_comes_up_over_a_terrible_link() {
    for seed in 0..10 {
        let (mut world, berlin, oslo) =
            World::pair(100 + seed, |_, peer| peer.initiate = Initiate::AtStart);
        world.network.weather = Weather {
            loss: 0.33,
            ..Weather::ROUGH
        };
        world.run(seconds(60));
        assert_eq!(
            world[berlin].peer("oslo").state,
            PeerState::Established,
            "seed {seed}"
        );
        assert_eq!(
            world[oslo].peer("berlin").state,
            PeerState::Established,
            "seed {seed}"
        );
    }
}
