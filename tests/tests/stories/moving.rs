//! Peers whose address changes: laptops, lorries, and every second office behind a consumer line.

use crate::seconds;
use esplane_control_noise::NoticeEvent;
use esplane_tests::sim::{GatewayId, World};
use std::{collections::BTreeSet, net::SocketAddr};

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

/// Two gateways whose workers have SAs and ports of their own: 20001 and 20002, of which a NAT makes others.
fn with_worker_ports(seed: u64, nat_shift: u16) -> (World, GatewayId, GatewayId) {
    let mut world = World::new(seed);
    let mut specs: Vec<_> = (0..2).map(|index| world.spec(index)).collect();
    let known = specs.clone();
    for (index, spec) in specs.iter_mut().enumerate() {
        spec.worker_ports = vec![20_001, 20_002];
        let other = 1 - index;
        let network = format!("10.{}.0.0/16", other + 1);
        let network6 = format!("fd00:{}::/32", other + 1);
        let mut peer = known[other].as_peer(other as u32 + 1, &[&network, &network6]);
        peer.parallel_sas = 3;
        peer.rekey.seconds = 10;
        spec.peers.push(peer);
    }
    let ids: Vec<_> = specs.into_iter().map(|spec| world.start(spec)).collect();
    for id in &ids {
        world[*id].nat_shift = nat_shift;
    }
    (world, ids[0], ids[1])
}

/// Whither this gateway's peer has moved, as its operator was told.
fn moves(world: &World, gateway: GatewayId) -> Vec<SocketAddr> {
    let notices = world[gateway].notices.iter();
    notices
        .filter_map(|notice| match notice.event {
            NoticeEvent::Moved { to, .. } => Some(to),
            _ => None,
        })
        .collect()
}

/// Several ports of one peer, behind a NAT or not, over rekeys: the other end answers to the first, and sees nobody move.
#[test]
fn ports_of_workers_move_nobody() {
    for nat_shift in [0, 30_000] {
        let (mut world, berlin, oslo) = with_worker_ports(44, nat_shift);
        world.flow(berlin, oslo, 100, seconds(30));
        world.flow(oslo, berlin, 70, seconds(30));
        world.run(seconds(35));
        world.assert_nothing_lost();
        world.assert_nothing_dropped();
        assert!(world[berlin].peer("oslo").rekeys >= 2);
        for (gateway, peer) in [(berlin, oslo), (oslo, berlin)] {
            let (home, there) = (world[gateway].address, world[peer].address);
            let sent = world.network.capture.iter();
            let sent = sent.filter(|datagram| datagram.from.ip() == home.ip());
            let (ports, to): (BTreeSet<u16>, BTreeSet<SocketAddr>) = sent
                .map(|datagram| (datagram.from.port(), datagram.to))
                .unzip();
            let own = [20_001 + nat_shift, 20_002 + nat_shift];
            assert_eq!(ports, BTreeSet::from([home.port(), own[0], own[1]]));
            assert_eq!(to, BTreeSet::from([there]), "answers go to the first port");
            assert_eq!(moves(&world, gateway), []);
        }
    }
}

/// The peer moves while all its ports are in use: whichever packet comes first leads to the new address, the fallback SA's to the
/// right port there. Nothing that it sends is lost, nobody shakes hands for it, and the ports of workers move nobody afterwards.
#[test]
fn a_peer_that_sends_from_several_ports_may_move() {
    let (mut world, berlin, oslo) = with_worker_ports(45, 30_000);
    world.assert_connected(berlin, oslo);
    world.flow(oslo, berlin, 50, seconds(5));
    world.run(seconds(1));
    world[oslo].address = elsewhere();
    world.run(seconds(1));
    world.flow(berlin, oslo, 50, seconds(3));
    world.run(seconds(5));
    world.assert_nothing_lost();
    assert_eq!(world[berlin].peer("oslo").endpoint, Some(elsewhere()));
    let moves = moves(&world, berlin);
    assert!(moves.len() <= 2, "{moves:?}");
    assert!(moves.iter().all(|to| to.ip() == elsewhere().ip()));
}

/// A NAT gives the first port another number: the next packet of the fallback SA says so.
#[test]
fn a_nat_that_renumbers_the_first_port_is_followed() {
    let (mut world, berlin, oslo) = with_worker_ports(46, 30_000);
    world.assert_connected(berlin, oslo);
    let handshakes = world[berlin].peer("oslo").handshakes;
    let mut renumbered = world[oslo].address;
    renumbered.set_port(61_000);
    world[oslo].address = renumbered;
    world.flow(oslo, berlin, 50, seconds(3));
    world.run(seconds(1));
    world.flow(berlin, oslo, 50, seconds(2));
    world.run(seconds(4));
    world.assert_nothing_lost();
    assert_eq!(moves(&world, berlin), [renumbered]);
    assert_eq!(world[berlin].peer("oslo").handshakes, handshakes);
}

/// A peer that knows nothing of several SAs is sent to from one port.
#[test]
fn a_peer_with_one_sa_sees_one_port() {
    let mut world = World::new(47);
    let mut specs: Vec<_> = (0..2).map(|index| world.spec(index)).collect();
    let known = specs.clone();
    specs[0].worker_ports = vec![20_001, 20_002];
    for (index, spec) in specs.iter_mut().enumerate() {
        let other = 1 - index;
        let networks = [
            format!("10.{}.0.0/16", other + 1),
            format!("fd00:{}::/32", other + 1),
        ];
        let mut peer = known[other].as_peer(other as u32 + 1, &[&networks[0], &networks[1]]);
        peer.parallel_sas = if index == 0 { 3 } else { 1 };
        spec.peers.push(peer);
    }
    let ids: Vec<_> = specs.into_iter().map(|spec| world.start(spec)).collect();
    let (berlin, oslo) = (ids[0], ids[1]);
    world.flow(berlin, oslo, 50, seconds(5));
    world.flow(oslo, berlin, 50, seconds(5));
    world.run(seconds(6));
    world.assert_nothing_lost();
    let homes = [world[berlin].address, world[oslo].address];
    let capture = &world.network.capture;
    assert!(
        capture
            .iter()
            .all(|datagram| homes.contains(&datagram.from))
    );
}
