//! Keys are replaced while traffic flows; nobody may notice.

use crate::seconds;
use esplane_api::Direction;
use esplane_control_noise::RekeyPolicy;
use esplane_tests::sim::{GatewayId, World};

/// Ten rekeys under load in both directions. On a network that loses nothing, Esplane loses nothing:
/// a rekey that drops one packet a tunnel is an outage ten times an hour for a thousand tunnels.
#[test]
fn ten_rekeys_under_load_lose_nothing() {
    let (mut world, berlin, oslo) = World::pair(11, |_, peer| peer.rekey.seconds = 10);
    world.flow(berlin, oslo, 100, seconds(120));
    world.flow(oslo, berlin, 70, seconds(120));
    world.run(seconds(125));
    world.assert_nothing_lost();
    assert!(
        world[berlin].peer("oslo").rekeys >= 10,
        "{:?}",
        world[berlin].peer("oslo")
    );
    world.assert_nothing_dropped();
    assert!(
        world.laws.esp_packets() >= 120 * 170,
        "the laws have been watching"
    );
}

/// With an SA for each worker (RFC 9611) the same holds, and each worker's packets carry its SPI.
#[test]
fn workers_with_sas_of_their_own_rekey_together_and_lose_nothing() {
    let (mut world, berlin, oslo) = World::pair(17, |gateway, peer| {
        peer.rekey.seconds = 10;
        peer.parallel_sas = if gateway == GatewayId(0) { 3 } else { 4 };
    });
    world.flow(berlin, oslo, 100, seconds(60));
    world.flow(oslo, berlin, 70, seconds(60));
    world.run(seconds(65));
    world.assert_nothing_lost();
    world.assert_nothing_dropped();
    assert!(world[berlin].peer("oslo").rekeys >= 5);
    for gateway in [berlin, oslo] {
        let sas = world[gateway].node.table_writer().sas();
        let sending = sas
            .iter()
            .filter(|sa| sa.id.direction == Direction::Outbound);
        let packets: Vec<u64> = sending.map(|sa| sa.statistics.packets).collect();
        assert_eq!(packets.len(), 3, "no more than both want: {sas:#?}");
        assert!(packets.iter().all(|packets| *packets > 0), "{packets:?}");
    }
}

/// Old SAs go away: after hours of rekeying there are as many as after the first.
#[test]
fn old_keys_do_not_pile_up() {
    let (mut world, berlin, oslo) = World::pair(12, |_, peer| peer.rekey.seconds = 30);
    world.flow(berlin, oslo, 2, seconds(3600));
    world.run(seconds(3600));
    assert!(world[berlin].peer("oslo").rekeys >= 100);
    for gateway in [berlin, oslo] {
        let sas = world[gateway].node.table_writer().sas();
        assert!(sas.len() <= 6, "{} SAs at the end: {sas:#?}", sas.len());
    }
    world.assert_nothing_lost();
}

/// Limits in packets and bytes ask for new keys too, on whichever end reaches them first.
#[test]
fn keys_are_replaced_after_so_many_packets_or_bytes() {
    let limits = [
        RekeyPolicy {
            packets: Some(500),
            ..RekeyPolicy::default()
        },
        RekeyPolicy {
            bytes: Some(300_000),
            ..RekeyPolicy::default()
        },
    ];
    for (seed, rekey) in (13..).zip(limits) {
        let (mut world, berlin, oslo) = World::pair(seed, |gateway, peer| {
            if gateway == GatewayId(0) {
                peer.rekey = rekey;
            }
        });
        world.flow(berlin, oslo, 100, seconds(60));
        world.flow(oslo, berlin, 100, seconds(60));
        world.run(seconds(65));
        let rekeys = world[berlin].peer("oslo").rekeys;
        assert!(
            (8..=40).contains(&rekeys),
            "{rekey:?} led to {rekeys} rekeys"
        );
        world.assert_nothing_lost();
        world.assert_nothing_dropped();
    }
}

/// Traffic in one direction only, as of a backup or a video stream: the silent end must keep up all the same.
#[test]
fn one_way_traffic_is_rekeyed_without_loss() {
    for (seed, forth) in [(15, true), (16, false)] {
        let (mut world, berlin, oslo) = World::pair(seed, |_, peer| peer.rekey.seconds = 10);
        let (from, to) = if forth {
            (berlin, oslo)
        } else {
            (oslo, berlin)
        };
        // Berlin has called first, so that both directions of "who initiated" are told.
        world.assert_connected(berlin, oslo);
        world.flow(from, to, 100, seconds(60));
        world.run(seconds(65));
        world.assert_nothing_lost();
        assert!(
            world[from]
                .peer(if forth { "oslo" } else { "berlin" })
                .rekeys
                >= 4
        );
    }
}
