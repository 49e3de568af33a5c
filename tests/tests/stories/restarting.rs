//! Machines lose power.

use crate::seconds;
use esplane_tests::sim::World;

/// A peer restarts and has forgotten all keys. Its neighbour goes on sending with them; the tunnel must come
/// back by itself, without anybody logging in anywhere.
#[test]
fn a_peer_restarts_and_its_neighbour_keeps_sending() {
    let (mut world, berlin, oslo) = World::pair(31, |_, _| {});
    world.assert_connected(berlin, oslo);
    world.restart(oslo);
    world.flow(berlin, oslo, 20, seconds(120));
    world.run(seconds(60));
    let later = world.send(berlin, oslo);
    world.run(seconds(1));
    assert!(
        world.has_arrived(later),
        "no way back after a minute; drops: {:?}",
        world.drops()
    );
    world.assert_nothing_twice();
    world.assert_connected(oslo, berlin);
}

/// A peer restarts and speaks first: its new handshake replaces the old keys at once.
#[test]
fn a_peer_restarts_and_speaks_first() {
    let (mut world, berlin, oslo) = World::pair(32, |_, _| {});
    world.assert_connected(berlin, oslo);
    world.restart(oslo);
    let first = world.send(oslo, berlin);
    world.run(seconds(2));
    assert!(world.has_arrived(first));
    let answer = world.send(berlin, oslo);
    world.run(seconds(1));
    assert!(
        world.has_arrived(answer),
        "berlin answers with the old keys"
    );
    world.assert_nothing_lost();
}

/// Both restart, as after a power cut, with hosts on both sides that never stopped sending.
#[test]
fn both_peers_restart() {
    for seed in 33..38 {
        let (mut world, berlin, oslo) = World::pair(seed, |_, _| {});
        world.assert_connected(berlin, oslo);
        world.restart(berlin);
        world.restart(oslo);
        world.flow(berlin, oslo, 20, seconds(30));
        world.flow(oslo, berlin, 20, seconds(30));
        world.run(seconds(40));
        world.assert_connected(berlin, oslo);
        world.assert_nothing_twice();
    }
}

/// Restarts over and over, under traffic: no IV is used twice (the world's law), nothing comes out twice, and
/// the SAs of dead incarnations do not pile up on the neighbour.
#[test]
fn a_peer_restarts_over_and_over() {
    let (mut world, berlin, oslo) = World::pair(38, |_, _| {});
    world.flow(berlin, oslo, 20, seconds(350));
    world.flow(oslo, berlin, 20, seconds(350));
    for _ in 0..15 {
        world.run(seconds(20));
        world.restart(oslo);
    }
    world.run(seconds(60));
    world.assert_connected(berlin, oslo);
    world.assert_nothing_twice();
    let sas = world[berlin].node.table_writer().sas().len();
    assert!(sas <= 8, "{sas} SAs on the neighbour");
}
