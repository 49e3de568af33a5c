//! Messages of the key exchange from anybody.

use crate::sim::Random;
use esplane_api::{IpPrefix, Now, SelectorPair, TunnelId};
use esplane_control_noise::{Engine, LoadPolicy, NodeConfig, Output, PeerConfig, StaticSecretKey};
use std::{net::SocketAddr, sync::LazyLock};

/// The four zero bytes before every handshake message (RFC 3948 §2.2).
const NON_ESP_MARKER_BYTES: usize = 4;
const MAC_BYTES: usize = 16;

/// What the targets must not refuse.
static GENUINE: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| [first_seeds(), answer_seeds()].concat());

/// To a node that waits: no SA, and no answer longer than the question.
pub fn handshake_first(message: &[u8]) {
    let (mut berlin, _) = engines();
    check(&mut berlin, message);
}

/// To a node that has asked and waits for the answer.
pub fn handshake_answer(message: &[u8]) {
    let (mut berlin, _) = engines();
    berlin.initiate(now(), TunnelId(2));
    while berlin.poll_output().is_some() {}
    check(&mut berlin, message);
}

fn check(engine: &mut Engine, message: &[u8]) {
    // MAC2 is looked at under load only.
    let without_mac2 = |message: &[u8]| message[..message.len().saturating_sub(MAC_BYTES)].to_vec();
    let genuine = GENUINE
        .iter()
        .any(|seed| without_mac2(seed) == without_mac2(message));
    let dropped = |engine: &Engine| engine.drops().iter().map(|(_, count)| count).sum::<u64>();
    let dropped_before = dropped(engine);
    engine.handle_datagram(now(), address(3), message);
    let outputs: Vec<_> = std::iter::from_fn(|| engine.poll_output()).collect();
    if genuine {
        return;
    }
    assert_eq!(
        dropped(engine),
        dropped_before + 1,
        "a forged message must be dropped by name"
    );
    for output in outputs {
        match output {
            Output::Send { datagram, .. } => {
                assert!(datagram.len() <= message.len() + NON_ESP_MARKER_BYTES)
            }
            Output::Notice(_) => {}
            output => panic!("a forged message led to {output:?}"),
        }
    }
}

/// Two engines that know each other, the same each time.
fn engines() -> (Engine, Engine) {
    let mut random = Random::new(7);
    let keys = [(); 2].map(|()| StaticSecretKey::generate(random.bytes32()));
    let publics = keys.each_ref().map(StaticSecretKey::public_key);
    let mut engine = |own: usize, other: usize| {
        let mut engine = Engine::new(NodeConfig {
            private_key: keys[own].clone(),
            listen_port: 4500,
            local: None,
            seed: random.bytes32(),
            worker_ports: Vec::new(),
            reserved_spis: Vec::new(),
            under_load: LoadPolicy::default(),
        })
        .expect("a valid node");
        let network: IpPrefix = format!("10.{other}.0.0/16").parse().expect("a network");
        let peer = PeerConfig {
            endpoint: Some(address(other as u8)),
            selectors: vec![SelectorPair::to(network)],
            ..PeerConfig::new(TunnelId(other as u32 + 1), "peer", publics[other])
        };
        engine.set_peers(now(), vec![peer]).expect("a valid peer");
        while engine.poll_output().is_some() {}
        engine
    };
    (engine(0, 1), engine(1, 0))
}

fn now() -> Now {
    Now {
        monotonic: std::time::Duration::from_secs(1000),
        unix: std::time::Duration::from_secs(1_893_456_000),
    }
}

fn address(host: u8) -> SocketAddr {
    ([192, 0, 2, host], 4500).into()
}

/// A true initiation for the waiting node.
pub(super) fn first_seeds() -> Vec<Vec<u8>> {
    let (_, mut oslo) = engines();
    oslo.initiate(now(), TunnelId(1));
    messages(&mut oslo)
}

/// A true answer to the asking node.
pub(super) fn answer_seeds() -> Vec<Vec<u8>> {
    let (mut berlin, mut oslo) = engines();
    berlin.initiate(now(), TunnelId(2));
    for message in messages(&mut berlin) {
        oslo.handle_datagram(now(), address(0), &message);
    }
    messages(&mut oslo)
}

fn messages(engine: &mut Engine) -> Vec<Vec<u8>> {
    std::iter::from_fn(|| engine.poll_output())
        .filter_map(|output| match output {
            Output::Send { datagram, .. } => {
                datagram.get(NON_ESP_MARKER_BYTES..).map(<[u8]>::to_vec)
            }
            _ => None,
        })
        .collect()
}
