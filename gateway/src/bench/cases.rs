//! What is measured. Each case prepares a window outside of the measured time and runs it within.
//!
//! | name | one packet goes through |
//! |---|---|
//! | `aead-seal`, `aead-open` | the AEAD alone, a run of 64 packets a call |
//! | `esp-encap`, `esp-decap` | + classification, numbers or window, ESP header and trailer, counters; one flow |
//! | `outbound-path`, `inbound-path` | + route look-up for each packet, outer IP and UDP header; selector check |
//! | `loop` | `outbound-path` and `inbound-path` on one core |
//! | `route-lookup` | the SPD alone |
//! | `replay` | the anti-replay window alone, check and commit |
//! | `handshake` | (not a packet) one whole handshake, both ends |

use super::{
    measure::{Clock, Measured},
    scene::{PACKETS, Scene, Setting, Size},
};
use esplane_api::{AeadSuite, Esn, IpPrefix, Now, SaEvent, SelectorPair, TunnelId, WindowSize};
use esplane_control_noise::{
    Engine, Initiate, LoadPolicy, NodeConfig, Output, PeerConfig, StaticSecretKey,
};
use esplane_dataplane::{
    Aead, AeadKey, Arena, HEADROOM_BYTES, Inbound, Outbound, OuterHeaders,
    aead::{Job, Keyed},
    replay::ReplayWindow,
    spd::{Decision, Rule, Spd},
    wire::Flow,
};
use std::{
    hint::black_box,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Barrier,
    thread,
};

/// One line of the result.
pub struct Case {
    pub name: &'static str,
    /// What no other field says.
    pub variant: String,
    pub size: Option<Size>,
    pub suite: Option<AeadSuite>,
    pub sas: usize,
    pub workers: usize,
    pub measure: Benchmark,
}

const SIZES: [Size; 8] = [
    Size::Bytes(64),
    Size::Bytes(128),
    Size::Bytes(256),
    Size::Bytes(512),
    Size::Bytes(1024),
    Size::Bytes(1400),
    Size::Bytes(8960),
    Size::Imix,
];
const SMALL: Size = Size::Bytes(64);
const AES128: AeadSuite = AeadSuite::Aes128Gcm16;

/// What a case does.
type Benchmark = Box<dyn Fn(Aead, &Clock) -> Measured>;
/// A benchmark of whole packets.
type OfPackets = fn(&Clock, Scene) -> Measured;

/// All of them, in the order of the table.
pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, open) in [("aead-seal", false), ("aead-open", true)] {
        for suite in AeadSuite::ALL {
            let sizes: &[Size] = if suite == AES128 {
                &SIZES
            } else {
                &[SMALL, Size::Bytes(1400)]
            };
            for size in sizes {
                let size = *size;
                let measure =
                    Box::new(move |aead, clock: &Clock| aead_alone(aead, clock, suite, size, open));
                cases.push(Case {
                    name,
                    variant: String::new(),
                    size: Some(size),
                    suite: Some(suite),
                    sas: 1,
                    workers: 1,
                    measure,
                });
            }
        }
    }
    let by_kernel = OuterHeaders::ByKernel;
    let written = OuterHeaders::Written;
    let paths: [(&'static str, OuterHeaders, bool, OfPackets); 5] = [
        ("esp-encap", by_kernel, false, outbound),
        ("esp-decap", by_kernel, false, inbound),
        ("outbound-path", written, true, outbound),
        ("inbound-path", written, true, inbound),
        ("loop", written, true, there_and_back),
    ];
    for (name, headers, many_flows, of_packets) in paths {
        let mut of = |suite, size, sas| {
            cases.push(path(
                name,
                of_packets,
                Setting {
                    suite,
                    sas,
                    size,
                    headers,
                    many_flows,
                },
            ))
        };
        SIZES.into_iter().for_each(|size| of(AES128, size, 1));
        of(AeadSuite::Aes256Gcm16, SMALL, 1);
        of(AeadSuite::Aes256Gcm16, Size::Bytes(1400), 1);
        if many_flows {
            of(AES128, SMALL, 10);
            of(AES128, SMALL, 1_000);
            of(AES128, SMALL, 10_000);
            of(AES128, Size::Imix, 10_000);
            of(AES128, SMALL, 100_000);
        }
    }
    for (name, of_packets) in [
        ("outbound-path", outbound as OfPackets),
        ("inbound-path", inbound_beside_another),
    ] {
        for size in [SMALL, Size::Bytes(1400)] {
            let setting = Setting {
                suite: AES128,
                sas: 1,
                size,
                headers: written,
                many_flows: true,
            };
            let measure =
                Box::new(move |aead, clock: &Clock| two_workers(aead, clock, setting, of_packets));
            cases.push(Case {
                name,
                variant: "one SA, shared".to_owned(),
                size: Some(size),
                suite: Some(AES128),
                sas: 1,
                workers: 2,
                measure,
            });
        }
    }
    for prefixes in [100_000, 1_000_000] {
        for random in [false, true] {
            let keys = if random { "random" } else { "hot" };
            let variant = format!("{keys} keys, {prefixes} IPv4 networks");
            cases.push(small("route-lookup", variant, move |clock| {
                route_lookup::<u32>(clock, prefixes, random)
            }));
        }
    }
    let variant = "random keys, 200000 IPv6 networks".to_owned();
    cases.push(small("route-lookup", variant, |clock| {
        route_lookup::<u128>(clock, 200_000, true)
    }));
    cases.push(small("replay", "in order".to_owned(), replay));
    cases.push(small(
        "handshake",
        "IKpsk2 + ML-KEM-768, both ends".to_owned(),
        handshake,
    ));
    cases
}

fn path(name: &'static str, of_packets: OfPackets, setting: Setting) -> Case {
    Case {
        name,
        variant: String::new(),
        size: Some(setting.size),
        suite: Some(setting.suite),
        sas: setting.sas,
        workers: 1,
        measure: Box::new(move |aead, clock| of_packets(clock, Scene::new(aead, setting))),
    }
}

fn small(
    name: &'static str,
    variant: String,
    measure: impl Fn(&Clock) -> Measured + 'static,
) -> Case {
    let measure = Box::new(move |_: Aead, clock: &Clock| measure(clock));
    Case {
        name,
        variant,
        size: None,
        suite: None,
        sas: 1,
        workers: 1,
        measure,
    }
}

fn outbound(clock: &Clock, scene: Scene) -> Measured {
    let (mut scene, mut outbound) = (std::cell::RefCell::new(scene), Outbound::new(PACKETS));
    let measured = clock.measure(
        PACKETS,
        || scene.borrow_mut().fill(),
        |()| scene.borrow_mut().outbound(&mut outbound),
    );
    scene.get_mut().check();
    measured
}

fn inbound(clock: &Clock, scene: Scene) -> Measured {
    let (mut scene, mut sender, mut inbound) = (
        std::cell::RefCell::new(scene),
        Outbound::new(PACKETS),
        Inbound::new(PACKETS),
    );
    let measured = clock.measure(
        PACKETS,
        || scene.borrow_mut().fill_sealed(&mut sender),
        |()| scene.borrow_mut().inbound(&mut inbound),
    );
    scene.get_mut().check();
    measured
}

/// The same while another worker shares the SA: if the machine stops this one between sealing and opening, the other
/// moves the window past its packets. Such windows do not count.
fn inbound_beside_another(clock: &Clock, scene: Scene) -> Measured {
    let (scene, mut sender, mut inbound) = (
        std::cell::RefCell::new(scene),
        Outbound::new(PACKETS),
        Inbound::new(PACKETS),
    );
    clock.measure_if(
        PACKETS,
        || scene.borrow_mut().fill_sealed(&mut sender),
        |()| scene.borrow_mut().inbound(&mut inbound),
        || scene.borrow().all_passed(),
    )
}

fn there_and_back(clock: &Clock, scene: Scene) -> Measured {
    let (mut scene, mut outbound, mut inbound) = (
        std::cell::RefCell::new(scene),
        Outbound::new(PACKETS),
        Inbound::new(PACKETS),
    );
    let measured = clock.measure(
        PACKETS,
        || scene.borrow_mut().fill(),
        |()| {
            let mut scene = scene.borrow_mut();
            scene.outbound(&mut outbound);
            scene.arrive();
            scene.inbound(&mut inbound);
        },
    );
    scene.get_mut().check();
    measured
}

fn aead_alone(aead: Aead, clock: &Clock, suite: AeadSuite, size: Size, open: bool) -> Measured {
    let secret = (&vec![7; suite.key_bytes()][..], [7; 4]);
    let Ok(key) = AeadKey::new(aead, suite, secret, Esn::On) else {
        panic!("a key of the right length is refused")
    };
    let keys = [Keyed {
        key: &key,
        end: PACKETS,
    }];
    let frame = (HEADROOM_BYTES + size.largest() + 64).next_multiple_of(64);
    let mut memory = vec![0xa5; frame * PACKETS];
    let jobs: Vec<Job> = (0..PACKETS)
        .map(|index| {
            let start = index * frame + HEADROOM_BYTES;
            memory[start - 8..start].copy_from_slice(&(index as u64).to_be_bytes());
            Job {
                start: start as u32,
                bytes: size.of(index) as u32,
                ..Job::default()
            }
        })
        .collect();
    let done = std::cell::Cell::new(aead.seal(&mut Arena::over(&mut memory), &keys, &jobs));
    let (sealed, memory) = (memory.clone(), std::cell::RefCell::new(memory));
    let measured = clock.measure(
        PACKETS,
        || {
            if open {
                memory.borrow_mut().copy_from_slice(&sealed)
            }
        },
        |()| {
            let mut memory = memory.borrow_mut();
            let arena = &mut Arena::over(black_box(&mut memory));
            done.set(if open {
                aead.open(arena, &keys, black_box(&jobs))
            } else {
                aead.seal(arena, &keys, black_box(&jobs))
            });
        },
    );
    assert!(
        done.get().has_all(0..PACKETS),
        "the AEAD refuses what it has sealed"
    );
    measured
}

/// Two threads work with one SA at the same time; each measures while the other works.
fn two_workers(aead: Aead, clock: &Clock, setting: Setting, of_packets: OfPackets) -> Measured {
    let shared = Scene::new(aead, setting);
    let (west, east) = (shared.west, shared.east);
    let begin = Barrier::new(2);
    let one = || {
        let mut scene = Scene::new(aead, setting);
        (scene.west, scene.east) = (west.clone(), east.clone());
        begin.wait();
        of_packets(clock, scene)
    };
    let [a, b] = thread::scope(|scope| {
        let other = scope.spawn(one);
        let mine = one();
        [mine, other.join().unwrap_or(mine)]
    });
    let together = |a: f64, b: f64| 1.0 / (1.0 / a + 1.0 / b);
    clock.measured(together(a.ns, b.ns), together(a.median_ns, b.median_ns))
}

/// A family whose addresses are numbers.
trait Family: Copy {
    /// Lengths as the Internet has them.
    const LENGTHS: [u8; 6];
    fn random(numbers: &mut Random) -> Self;
    fn address(self) -> IpAddr;
}

impl Family for u32 {
    const LENGTHS: [u8; 6] = [24, 24, 24, 22, 20, 16];

    fn random(numbers: &mut Random) -> Self {
        numbers.next() as u32
    }

    fn address(self) -> IpAddr {
        Ipv4Addr::from_bits(self).into()
    }
}

impl Family for u128 {
    const LENGTHS: [u8; 6] = [48, 48, 48, 44, 40, 32];

    /// Within 2000::/12, as the registries' networks are.
    fn random(numbers: &mut Random) -> Self {
        let (high, low) = (numbers.next() >> 12, numbers.next());
        0x2 << 124 | u128::from(high) << 64 | u128::from(low)
    }

    fn address(self) -> IpAddr {
        Ipv6Addr::from_bits(self).into()
    }
}

fn route_lookup<A: Family>(clock: &Clock, prefixes: u32, random: bool) -> Measured {
    const LOOKUPS: usize = 256;
    let mut numbers = Random(1);
    let addresses: Vec<A> = (0..prefixes).map(|_| A::random(&mut numbers)).collect();
    let spd = Spd::new(addresses.iter().enumerate().map(|(number, address)| Rule {
        selectors: SelectorPair::to(IpPrefix::truncated(
            address.address(),
            A::LENGTHS[number % A::LENGTHS.len()],
        )),
        priority: 0,
        decision: Decision::Discard,
    }));
    let mut packet = [0; 28];
    (packet[0], packet[3], packet[9]) = (0x45, 28, 17);
    let Some(mut flow) = Flow::parse(&packet) else {
        panic!("a plain packet is not understood")
    };
    flow.source = addresses[0].address();
    let keys: usize = if random { 1 << 16 } else { 16 };
    let keys: Vec<A> = (0..keys)
        .map(|_| addresses[numbers.next() as usize % addresses.len()])
        .collect();
    let mut at = 0;
    clock.measure(
        LOOKUPS,
        || {
            at += LOOKUPS;
            at
        },
        |at| {
            for index in at..at + LOOKUPS {
                flow.destination = keys[index & (keys.len() - 1)].address();
                black_box(spd.decide(&flow));
            }
        },
    )
}

fn replay(clock: &Clock) -> Measured {
    let window = ReplayWindow::new(WindowSize::DEFAULT, 0);
    let mut next = 1;
    clock.measure(
        PACKETS,
        || {
            next += PACKETS as u64;
            next
        },
        |first| {
            for number in first..first + PACKETS as u64 {
                black_box(
                    window
                        .check(number)
                        .and_then(|()| window.commit(number))
                        .is_ok(),
                );
            }
        },
    )
}

/// From the first message to the proof that both ends have the keys.
fn handshake(clock: &Clock) -> Measured {
    let engine =
        |seed: u8, own: &StaticSecretKey, peer: &StaticSecretKey, remote: Option<SocketAddr>| {
            let node = NodeConfig {
                private_key: own.clone(),
                listen_port: 4500,
                local: None,
                seed: [seed; 32],
                worker_ports: Vec::new(),
                reserved_spis: Vec::new(),
                under_load: LoadPolicy::default(),
            };
            let mut config = PeerConfig::new(TunnelId(1), "peer", peer.public_key());
            config.selectors = vec![SelectorPair::to(IpPrefix::ALL_V4)];
            config.endpoint = remote;
            config.initiate = Initiate::OnDemand;
            let Ok(mut engine) = Engine::new(node) else {
                panic!("the benchmark's own node is refused")
            };
            let set = engine.set_peers(now(), vec![config]);
            assert!(set.is_ok(), "the benchmark's own peer is refused: {set:?}");
            while engine.poll_output().is_some() {}
            engine
        };
    let (Ok(a), Ok(b)) = (
        StaticSecretKey::from_bytes([1; 32]),
        StaticSecretKey::from_bytes([2; 32]),
    ) else {
        panic!("the benchmark's own keys are refused")
    };
    let (at_a, at_b): (SocketAddr, SocketAddr) = (
        (Ipv4Addr::new(192, 0, 2, 1), 4500).into(),
        (Ipv4Addr::new(192, 0, 2, 2), 4500).into(),
    );
    clock.measure(
        1,
        || (engine(1, &a, &b, Some(at_b)), engine(2, &b, &a, Some(at_a))),
        |(mut initiator, mut responder)| {
            initiator.handle_event(
                now(),
                SaEvent::SaNeeded {
                    tunnel: TunnelId(1),
                },
            );
            deliver(&mut initiator, &mut responder, at_a);
            deliver(&mut responder, &mut initiator, at_b);
            assert_eq!(
                initiator.peers()[0].handshakes,
                1,
                "the handshake must succeed"
            );
        },
    )
}

fn now() -> Now {
    Now::default().after(std::time::Duration::from_secs(1_700_000_000))
}

fn deliver(from: &mut Engine, to: &mut Engine, source: SocketAddr) {
    while let Some(output) = from.poll_output() {
        if let Output::Send { datagram, .. } = output
            && let Some(message) = datagram.get(4..)
        {
            to.handle_datagram(now(), source, message);
        }
    }
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}
