//! Long-lived static keys come to where numbers end. The IV is the number, so what is at stake is the key.

use crate::seconds;
use esplane_api::{
    AeadSuite, DfPolicy, Direction, DropReason, Esn, KeyMaterial, Lifetime, OuterPath, Policy,
    PolicyAction, SaEvent, SaPair, SaParams, SelectorPair, SequenceStart, Spi, TunnelId,
    TunnelParams, UdpEncap, WindowSize,
};
use esplane_tests::sim::{GatewayId, World};

const TUNNEL: TunnelId = TunnelId(9);
const TURN: u64 = 1 << 32;

/// Two gateways without peers, and two manually keyed SAs between them; `first` is the next number of both.
fn keyed_by_hand(seed: u64, esn: Esn, first: u64) -> (World, GatewayId, GatewayId) {
    let (mut world, berlin, oslo) = World::pair(seed, |_, _| {});
    for gateway in [berlin, oslo] {
        world.with_node(gateway, |now, node| {
            node.set_peers(now, Vec::new()).unwrap()
        });
        install(&mut world, gateway, esn, first);
    }
    (world, berlin, oslo)
}

fn install(world: &mut World, gateway: GatewayId, esn: Esn, first: u64) {
    let other = GatewayId(1 - gateway.0);
    let (local, remote) = (world[gateway].address, world[other].address);
    let encap = UdpEncap {
        local_port: local.port(),
        remote_port: remote.port(),
    };
    let network = format!("10.{}.0.0/16", other.0 + 1);
    let network6 = format!("fd00:{}::/32", other.0 + 1);
    let selectors = [network, network6]
        .map(|text| SelectorPair::to(text.parse().unwrap()))
        .to_vec();
    let sa = |direction, sender: GatewayId| SaParams {
        tunnel: TUNNEL,
        direction,
        spi: Spi::new(0x1000 + sender.0 as u32).unwrap(),
        key: KeyMaterial::new(AeadSuite::Aes128Gcm16, &[sender.0 as u8 + 1; 20]).unwrap(),
        esn,
        window: WindowSize::DEFAULT,
        path: OuterPath::new(local.ip(), remote.ip(), Some(encap)).unwrap(),
        selectors: selectors.clone(),
        lifetime: Lifetime::UNLIMITED,
        sequence: SequenceStart {
            first,
            ..SequenceStart::FRESH
        },
        worker: None,
    };
    let pair = SaPair {
        inbound: sa(Direction::Inbound, other),
        outbound: sa(Direction::Outbound, gateway),
    };
    let protect = |selectors| Policy {
        selectors,
        action: PolicyAction::Protect(TUNNEL),
        priority: 0,
    };
    let tunnel = TunnelParams {
        id: TUNNEL,
        name: "by hand".to_owned(),
        policies: selectors.clone().into_iter().map(protect).collect(),
        roaming: false,
        df: DfPolicy::Clear,
    };
    world.with_node(gateway, |now, node| {
        let known = node
            .table_writer()
            .tunnels()
            .iter()
            .any(|tunnel| tunnel.id == TUNNEL);
        let remove: &[TunnelId] = if known { &[TUNNEL] } else { &[] };
        node.change_static(now, remove, vec![(tunnel, pair)])
            .unwrap();
    });
}

/// A sender that restarts from a durable reservation skips numbers. It crosses 2^32 under traffic; the receiver,
/// which only ever sees the low half, follows.
#[test]
fn extended_numbers_cross_two_to_the_32_under_traffic() {
    // RFC 4303 Appendix A: a receiver follows leaps of less than 2^32.
    let (mut world, berlin, oslo) = keyed_by_hand(81, Esn::On, TURN / 2);
    world.send(berlin, oslo);
    world.run(seconds(1));
    install(&mut world, berlin, Esn::On, TURN - 500);
    world.flow(berlin, oslo, 100, seconds(10));
    world.run(seconds(11));
    world.assert_nothing_lost();
    world.assert_nothing_dropped();
    let sas = world[oslo].node.table_writer().sas();
    let highest = sas
        .iter()
        .find(|sa| sa.id.direction == Direction::Inbound)
        .unwrap()
        .sequence;
    assert_eq!(
        highest,
        TURN + 499,
        "500 numbers before the turn, 500 from it on"
    );
}

/// The same, on a network that swaps packets around the turn.
#[test]
fn extended_numbers_cross_in_disorder() {
    let (mut world, berlin, oslo) = keyed_by_hand(82, Esn::On, TURN / 2);
    world.send(berlin, oslo);
    world.run(seconds(1));
    install(&mut world, berlin, Esn::On, TURN - 500);
    world.network.weather = esplane_tests::sim::Weather::ROUGH;
    world.flow(berlin, oslo, 1000, seconds(1));
    world.run(seconds(2));
    world.assert_nothing_lost();
    assert!(world.network.lost.len() < 100);
}

/// 32-bit numbers end. The SA then sends nothing any more, says so, and never, ever begins again at 1.
#[test]
fn short_numbers_end_and_never_wrap() {
    let (mut world, berlin, oslo) = keyed_by_hand(83, Esn::Off, TURN - 50);
    for _ in 0..100 {
        world.send(berlin, oslo);
    }
    world.run(seconds(1));
    assert_eq!(
        world.ledger.delivered.len(),
        50,
        "numbers {} to {}",
        TURN - 50,
        TURN - 1
    );
    assert_eq!(world[berlin].drops[DropReason::SequenceExhausted], 50);
    let ended =
        |event: &SaEvent| matches!(event, SaEvent::SequenceExhausted { sa } if sa.tunnel == TUNNEL);
    assert!(
        world[berlin].ended.iter().any(ended),
        "the operator is told: {:?}",
        world[berlin].ended
    );
    assert_eq!(world.laws.esp_packets(), 50);
}
