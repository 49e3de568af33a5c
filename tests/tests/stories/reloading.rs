//! The configuration changes while the daemon runs.

use crate::seconds;
use esplane_api::{DropReason, IpPrefix, SelectorPair};
use esplane_control_noise::PeerConfig;
use esplane_tests::sim::{GatewayId, World};

fn reload(
    world: &mut World,
    gateway: GatewayId,
    change: impl FnOnce(&mut Vec<PeerConfig>),
) -> Result<(), String> {
    let mut peers = world[gateway].spec.peers.clone();
    change(&mut peers);
    let result = world.with_node(gateway, |now, node| node.set_peers(now, peers));
    result.map_err(|error| error.to_string())
}

fn route(text: &str) -> SelectorPair {
    SelectorPair::to(text.parse::<IpPrefix>().unwrap())
}

/// A network is added to a peer under traffic: it becomes reachable, and the tunnels of other peers do not even shake hands again.
#[test]
fn a_new_route_is_carried_and_other_peers_notice_nothing() {
    let (mut world, ids) = World::mesh(71, 3, |_, _| {});
    let [berlin, oslo, quito] = ids[..] else {
        unreachable!()
    };
    world.assert_connected(berlin, oslo);
    world.assert_connected(berlin, quito);
    let (inside, new) = ("10.1.0.5".parse().unwrap(), "10.9.0.5".parse().unwrap());
    let early = world.send_between(berlin, inside, oslo, new);
    assert_eq!(world.drops()[DropReason::NoPolicy], 1);
    world.flow(berlin, quito, 50, seconds(20));
    world.flow(berlin, oslo, 50, seconds(20));
    world.run(seconds(5));
    reload(&mut world, berlin, |peers| {
        peers[0].selectors.push(route("10.9.0.0/16"))
    })
    .unwrap();
    let late = world.send_between(berlin, inside, oslo, new);
    world.run(seconds(20));
    assert!(!world.has_arrived(early) && world.has_arrived(late));
    assert_eq!(world[berlin].peer("quito").handshakes, 1);
    world.ledger.sent.remove(&early);
    world.assert_nothing_lost();
}

/// A peer is removed: its packets are refused in both directions from that moment.
#[test]
fn a_removed_peer_is_cut_off() {
    let (mut world, berlin, oslo) = World::pair(72, |_, _| {});
    world.assert_connected(berlin, oslo);
    reload(&mut world, berlin, |peers| peers.clear()).unwrap();
    let (outward, inward) = (world.send(berlin, oslo), world.send(oslo, berlin));
    world.run(seconds(30));
    assert!(!world.has_arrived(outward) && !world.has_arrived(inward));
    assert_eq!(world.drops()[DropReason::NoPolicy], 1);
    assert!(world.drops()[DropReason::UnknownSpi] >= 1);
    assert!(world[berlin].node.table_writer().sas().is_empty());
}

/// A reload with a mistake in it changes nothing, however many good changes come with it.
#[test]
fn a_failed_reload_leaves_everything_as_it_was() {
    let (mut world, berlin, oslo) = World::pair(73, |_, _| {});
    world.assert_connected(berlin, oslo);
    let state = world[berlin].state();
    let error = reload(&mut world, berlin, |peers| {
        peers[0].selectors.push(route("10.9.0.0/16"));
        let mut twin = peers[0].clone();
        twin.id.0 += 1;
        twin.name = "twin".to_owned();
        twin.selectors = vec![route("10.10.0.0/16")];
        peers.push(twin); // the same public key
    })
    .unwrap_err();
    assert!(error.contains("twin") && error.contains("oslo"), "{error}");
    assert_eq!(world[berlin].state(), state);
    world.assert_connected(berlin, oslo);
    world.assert_nothing_lost();
}
