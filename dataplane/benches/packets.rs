//! What each step costs: `cargo bench -p esplane-dataplane [-- FILTER]`.
//!
//! For work on the code: quick to build, one window of 64 packets a sample, `fastest` is the figure to compare. The
//! figures to quote are those of `esplane bench`, which knows the core's clock and the peers'.

#[path = "../../gateway/src/bench/scene.rs"]
mod scene;

use divan::{
    Bencher,
    counter::{BytesCount, ItemsCount},
};
use esplane_api::{AeadSuite, IpPrefix, SelectorPair, WindowSize};
use esplane_dataplane::{
    Aead, Inbound, Outbound, OuterHeaders,
    replay::ReplayWindow,
    spd::{Decision, Rule, Spd},
    wire::Flow,
};
use scene::{PACKETS, Scene, Setting, Size};
use std::{cell::RefCell, hint::black_box, net::Ipv4Addr};

fn main() {
    divan::main();
}

/// Size of the inner packets (0 is IMIX), and number of SAs.
const OF_ONE_FLOW: [(usize, usize); 4] = [(64, 1), (256, 1), (1400, 1), (0, 1)];
const OF_MANY_FLOWS: [(usize, usize); 9] = [
    (64, 1),
    (256, 1),
    (1400, 1),
    (0, 1),
    (64, 10),
    (64, 64),
    (64, 1_000),
    (64, 10_000),
    (64, 100_000),
];

/// The scene, and the inner bytes of one of its windows.
fn scene((bytes, sas): (usize, usize), many_flows: bool) -> (Scene, BytesCount) {
    let size = if bytes == 0 {
        Size::Imix
    } else {
        Size::Bytes(bytes)
    };
    let setting = Setting {
        suite: AeadSuite::Aes128Gcm16,
        sas,
        size,
        headers: if many_flows {
            OuterHeaders::Written
        } else {
            OuterHeaders::ByKernel
        },
        many_flows,
    };
    let window_bytes = size.mean() * PACKETS as f64;
    (
        Scene::new(Aead::detect(), setting),
        BytesCount::new(window_bytes as u64),
    )
}

fn outbound(bencher: Bencher, (scene, bytes): (Scene, BytesCount)) {
    let (scene, mut outbound) = (RefCell::new(scene), Outbound::new(PACKETS));
    bencher
        .counter(ItemsCount::new(PACKETS))
        .counter(bytes)
        .with_inputs(|| scene.borrow_mut().fill())
        .bench_local_values(|()| scene.borrow_mut().outbound(&mut outbound));
    scene.borrow().check();
}

fn inbound(bencher: Bencher, (scene, bytes): (Scene, BytesCount)) {
    let (scene, mut sender) = (RefCell::new(scene), Outbound::new(PACKETS));
    let mut inbound = Inbound::new(PACKETS);
    bencher
        .counter(ItemsCount::new(PACKETS))
        .counter(bytes)
        .with_inputs(|| scene.borrow_mut().fill_sealed(&mut sender))
        .bench_local_values(|()| scene.borrow_mut().inbound(&mut inbound));
    scene.borrow().check();
}

#[divan::bench(args = OF_ONE_FLOW, sample_size = 1, sample_count = 20_000)]
fn esp_encap(bencher: Bencher, of: (usize, usize)) {
    outbound(bencher, scene(of, false));
}

#[divan::bench(args = OF_ONE_FLOW, sample_size = 1, sample_count = 20_000)]
fn esp_decap(bencher: Bencher, of: (usize, usize)) {
    inbound(bencher, scene(of, false));
}

#[divan::bench(args = OF_MANY_FLOWS, sample_size = 1, sample_count = 20_000)]
fn outbound_path(bencher: Bencher, of: (usize, usize)) {
    outbound(bencher, scene(of, true));
}

#[divan::bench(args = OF_MANY_FLOWS, sample_size = 1, sample_count = 20_000)]
fn inbound_path(bencher: Bencher, of: (usize, usize)) {
    inbound(bencher, scene(of, true));
}

/// Keys: 16 are hot, 65,536 at random are not.
#[divan::bench(args = [16, 65_536], consts = [100_000, 1_000_000], sample_size = 1, sample_count = 5_000)]
fn route_lookup<const PREFIXES: u32>(bencher: Bencher, keys: usize) {
    let mut state = 1_u64;
    let mut random = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 32) as u32
    };
    let networks: Vec<(u32, u8)> = (0..PREFIXES)
        .map(|number| (random(), [24, 24, 24, 22, 20, 16][number as usize % 6]))
        .collect();
    let spd = Spd::new(networks.iter().map(|(address, length)| Rule {
        selectors: SelectorPair::to(IpPrefix::truncated(
            Ipv4Addr::from_bits(*address).into(),
            *length,
        )),
        priority: 0,
        decision: Decision::Discard,
    }));
    let keys: Vec<u32> = (0..keys)
        .map(|_| networks[random() as usize % networks.len()].0)
        .collect();
    let Some(mut flow) = Flow::parse(&PLAIN) else {
        panic!("a plain packet is not understood")
    };
    let mut at = 0;
    bencher
        .counter(ItemsCount::new(256_usize))
        .with_inputs(|| {
            at += 256;
            at
        })
        .bench_local_values(|at| {
            for index in at..at + 256 {
                flow.destination = Ipv4Addr::from_bits(keys[index & (keys.len() - 1)]).into();
                black_box(spd.decide(&flow));
            }
        });
}

/// An IPv4 header and a UDP header.
const PLAIN: [u8; 28] = {
    let mut packet = [0; 28];
    (packet[0], packet[3], packet[9]) = (0x45, 28, 17);
    packet
};

#[divan::bench(sample_size = 1, sample_count = 20_000)]
fn replay(bencher: Bencher) {
    let window = ReplayWindow::new(WindowSize::DEFAULT, 0);
    let mut first = 1;
    bencher
        .counter(ItemsCount::new(PACKETS))
        .with_inputs(|| {
            first += PACKETS as u64;
            first
        })
        .bench_local_values(|first| {
            for number in first..first + PACKETS as u64 {
                black_box(window.check(number).and_then(|()| window.commit(number))).ok();
            }
        });
}
