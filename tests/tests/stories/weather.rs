//! Networks as they are.

use crate::seconds;
use esplane_api::DropReason;
use esplane_control_noise::PeerState;
use esplane_tests::sim::{Weather, World};

/// 5 % lost, 2 % twice, 10 % out of order, and a rekey every 15 seconds: what the network loses is lost, all
/// else arrives, and nothing arrives twice. The only drops are the network's own duplicates.
#[test]
fn a_rough_network_costs_only_what_it_loses_itself() {
    for seed in 21..26 {
        let (mut world, berlin, oslo) = World::pair(seed, |_, peer| peer.rekey.seconds = 15);
        world.assert_connected(berlin, oslo);
        world.network.weather = Weather::ROUGH;
        world.flow(berlin, oslo, 100, seconds(90));
        world.flow(oslo, berlin, 100, seconds(90));
        world.run(seconds(95));
        world.assert_nothing_lost();
        assert!(!world.network.lost.is_empty() && world[berlin].peer("oslo").rekeys >= 4);
        for (reason, count) in world
            .drops()
            .iter()
            .filter(|(reason, _)| !reason.is_expected())
        {
            let by_duplication = matches!(
                reason,
                DropReason::ReplayDuplicate
                    | DropReason::HandshakeReplayed
                    | DropReason::HandshakeUnexpected
            );
            assert!(
                count == 0 || by_duplication,
                "seed {seed}: {count} x {reason}: {}",
                reason.meaning()
            );
        }
        assert!(world.drops()[DropReason::ReplayDuplicate] > 0);
    }
}

/// The cable is cut for five minutes. Nothing leaves in clear, what waits is bounded, the operator is
/// told, and once the cable is back traffic flows again by itself.
#[test]
fn a_cut_cable_heals() {
    let (mut world, berlin, oslo) = World::pair(27, |_, peer| peer.rekey.seconds = 60);
    world.assert_connected(berlin, oslo);
    world.network.weather = Weather::CUT;
    world.flow(berlin, oslo, 20, seconds(300));
    world.flow(oslo, berlin, 20, seconds(300));
    world.run(seconds(300));
    assert_ne!(
        world[berlin].peer("oslo").state,
        PeerState::Established,
        "nobody has answered for minutes"
    );
    assert!(
        !world[berlin].notices.is_empty(),
        "the operator was told nothing"
    );
    world.network.weather = Weather::FAIR;
    world.flow(berlin, oslo, 20, seconds(60));
    world.run(seconds(60));
    world.assert_connected(berlin, oslo);
    world.assert_nothing_twice();
}

/// The peer is not there at all: the packet that wants to go to it is dropped with a reason, never sent in clear.
#[test]
fn traffic_to_an_absent_peer_stays_inside() {
    let (mut world, berlin, oslo) = World::pair(28, |_, _| {});
    world.network.weather = Weather::CUT;
    world.flow(berlin, oslo, 50, seconds(120));
    world.run(seconds(180));
    assert!(world.ledger.delivered.is_empty() && world.ledger.sent.len() == 6000);
    assert_eq!(
        world.laws.esp_packets(),
        0,
        "nothing could have been sealed"
    );
    // Few and spaced handshakes, not one for each packet.
    let handshakes = world.network.capture.len();
    assert!(
        (2..200).contains(&handshakes),
        "{handshakes} datagrams to a peer that does not answer"
    );
}
