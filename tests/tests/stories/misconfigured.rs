//! Two administrators, two files, one of them wrong. Nothing may leave in clear, and the drop says what is wrong.

use crate::seconds;
use esplane_api::{AeadSuite, DropReason, Esn};
use esplane_control_noise::{KemPolicy, PeerConfig, PresharedKey};
use esplane_tests::sim::{GatewayId, World};

/// Traffic for a minute between two ends of which one is configured with `wrong`. Returns the world for a look.
fn minute_with(seed: u64, wrong: impl Fn(&mut PeerConfig)) -> World {
    let (mut world, berlin, oslo) = World::pair(seed, |gateway, peer| {
        if gateway == GatewayId(0) {
            wrong(peer);
        }
    });
    world.flow(berlin, oslo, 5, seconds(60));
    world.flow(oslo, berlin, 5, seconds(60));
    world.run(seconds(70));
    assert!(world.ledger.delivered.is_empty(), "packets came through");
    assert_eq!(
        world.laws.esp_packets(),
        0,
        "somebody sealed packets without an agreement"
    );
    world
}

fn psk(fill: u8) -> Option<PresharedKey> {
    Some(PresharedKey::generate([fill; 32]))
}

#[test]
fn different_preshared_keys_never_connect() {
    let (mut world, berlin, oslo) =
        World::pair(51, |gateway, peer| peer.psk = psk(gateway.0 as u8));
    world.flow(berlin, oslo, 5, seconds(60));
    world.run(seconds(70));
    assert!(world.ledger.delivered.is_empty());
    assert!(
        world.drops()[DropReason::HandshakeDecryptFailed] > 0,
        "{:?}",
        world.drops()
    );
}

#[test]
fn a_preshared_key_on_one_end_only_never_connects() {
    let world = minute_with(52, |peer| peer.psk = psk(7));
    assert!(
        world.drops()[DropReason::HandshakeDecryptFailed] > 0,
        "{:?}",
        world.drops()
    );
}

#[test]
fn the_same_preshared_key_connects() {
    let (mut world, berlin, oslo) = World::pair(53, |_, peer| peer.psk = psk(7));
    world.assert_connected(berlin, oslo);
    assert!(world[berlin].peer("oslo").has_psk);
}

/// Post-quantum on one end only: nobody is talked down to less than he asked for.
#[test]
fn different_kems_never_connect() {
    for kem in [KemPolicy::Off, KemPolicy::MlKem512] {
        let world = minute_with(54, |peer| peer.kem = kem);
        assert!(
            world.drops()[DropReason::HandshakeSettings] > 0,
            "{kem}: {:?}",
            world.drops()
        );
    }
}

#[test]
fn different_sequence_number_widths_never_connect() {
    let world = minute_with(55, |peer| peer.esn = Esn::Off);
    assert!(
        world.drops()[DropReason::HandshakeSettings] > 0,
        "{:?}",
        world.drops()
    );
}

#[test]
fn no_common_suite_never_connects() {
    let (mut world, berlin, oslo) = World::pair(56, |gateway, peer| {
        peer.suites = vec![[AeadSuite::Aes128Gcm16, AeadSuite::ChaCha20Poly1305][gateway.0]];
    });
    world.flow(berlin, oslo, 5, seconds(60));
    world.run(seconds(70));
    assert!(world.ledger.delivered.is_empty());
    assert!(
        world.drops()[DropReason::HandshakeSettings] > 0,
        "{:?}",
        world.drops()
    );
}

/// One common suite among several is found, whatever the order of preference.
#[test]
fn the_common_suite_is_found() {
    for suite in AeadSuite::ALL {
        let (mut world, berlin, oslo) = World::pair(57, |gateway, peer| {
            if gateway == GatewayId(0) {
                peer.suites = vec![suite];
            }
        });
        world.assert_connected(berlin, oslo);
        assert_eq!(world[berlin].peer("oslo").suite, Some(suite));
        assert_eq!(world[oslo].peer("berlin").suite, Some(suite));
    }
}

/// A peer that sends from networks which are not its own: authentic, and dropped all the same. Otherwise any branch office
/// could pretend to be any other.
#[test]
fn a_peer_may_not_speak_for_networks_of_others() {
    let (mut world, berlin, oslo) = World::pair(58, |_, _| {});
    world.assert_connected(berlin, oslo);
    let spoofed = world.send_between(
        berlin,
        "10.77.0.1".parse().unwrap(),
        oslo,
        "10.2.0.5".parse().unwrap(),
    );
    world.run(seconds(1));
    assert!(!world.has_arrived(spoofed));
    assert_eq!(
        world.drops()[DropReason::SelectorMismatch],
        1,
        "{:?}",
        world.drops()
    );
}

/// A host sends to where no peer is: dropped by name, and no handshake with anybody.
#[test]
fn a_packet_that_no_policy_covers_stays_inside() {
    let (mut world, berlin, oslo) = World::pair(59, |_, _| {});
    world.send_between(
        berlin,
        "10.1.0.5".parse().unwrap(),
        oslo,
        "10.200.0.5".parse().unwrap(),
    );
    world.run(seconds(5));
    assert_eq!(world.drops()[DropReason::NoPolicy], 1);
    assert!(world.network.capture.is_empty());
}
