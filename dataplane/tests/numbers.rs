//! Sequence numbers from end to end: extended ones across 2^32, resynchronisation, exhaustion,
//! reservations, and that no (key, IV) pair is ever used twice.

mod common;
use common::*;
use esplane_api::*;
use esplane_dataplane::*;
use proptest::prelude::*;
use std::{
    collections::{HashMap, HashSet},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    thread,
};

const HALF: u64 = 1 << 32;

fn start(first: u64, reserved_until: Option<u64>) -> SequenceStart {
    SequenceStart {
        first,
        reserved_until,
    }
}

fn iv(esp: &[u8]) -> u64 {
    u64::from_be_bytes(esp[8..16].try_into().unwrap())
}

#[test]
fn extended_numbers_cross_two_to_the_thirty_two_both_ways() {
    let scene = Scene {
        sequence: start(HALF - 40, None),
        ..Scene::default()
    };
    let (mut west, mut east) = scene.build();
    // East has followed so far.
    let forger = Forger::new(&scene, 0x1000, 1);
    let earlier = forger.packet(HALF - 5000, &inner(false, 1));
    assert_eq!(east.receive_one(&earlier).0, Verdict::Forward);

    let mut sealed: Vec<_> = (0..80)
        .map(|size| west.sealed(&inner(false, size)))
        .collect();
    sealed.reverse(); // newest first: the old high half must be inferred for the late ones
    let received = east.receive(sealed.iter().map(|packet| (packet.as_slice(), Outer::NONE)));
    for (at, (verdict, data, _)) in received.into_iter().enumerate() {
        assert_eq!((verdict, data), (Verdict::Forward, inner(false, 79 - at)));
    }
    assert_eq!(east.status(Direction::Inbound).sequence, HALF + 39);
    assert_eq!(west.status(Direction::Outbound).sequence, HALF + 39);
}

/// Seeded; the dataplane works SA by SA, and nobody can tell.
#[test]
fn packets_of_many_sas_keep_their_places_and_each_sa_its_order() {
    const SITES: [&str; 5] = [
        "10.2.0.0/24",
        "10.2.1.0/24",
        "10.2.2.0/24",
        "10.2.3.0/24",
        "10.2.4.0/24",
    ];
    /// What the last site may be sent.
    const LIMIT: u64 = 5;
    let (mut west, mut east) = (
        Gateway::new(OuterHeaders::Written),
        Gateway::new(OuterHeaders::Written),
    );
    for (site, remote) in (0_u32..).zip(SITES) {
        let hard = Limits {
            packets: (site == 4).then_some(LIMIT),
            ..Limits::NONE
        };
        let scene = Scene {
            local: vec!["10.1.0.0/16"],
            remote: vec![remote],
            lifetime: Lifetime::new(Limits::NONE, hard).unwrap(),
            ..Scene::default()
        };
        let (tunnel, spi, key) = (TunnelId(site + 1), spi(0x1000 + site), site as u8 + 1);
        let own = |mut params: TunnelParams| {
            params.id = tunnel;
            params.name = format!("site-{site}");
            for policy in &mut params.policies {
                policy.action = PolicyAction::Protect(tunnel);
            }
            SaCommand::DefineTunnel(params)
        };
        let path = OuterPath::new(ip("192.0.2.1"), ip(&format!("192.0.2.{}", 10 + site)), None);
        west.apply(vec![
            own(scene.tunnel_of_west()),
            SaCommand::Install(SaParams {
                tunnel,
                path: path.unwrap(),
                ..scene.outbound(spi, key)
            }),
        ]);
        east.apply(vec![
            own(scene.tunnel_of_east()),
            SaCommand::Install(SaParams {
                tunnel,
                lifetime: Lifetime::UNLIMITED,
                ..scene.inbound(spi, key)
            }),
        ]);
    }

    let (mut seed, mut numbers) = (7_u32, [0_u64; 5]);
    for packets in [64, 3, 1, 130] {
        let mut random = |below: u32| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 16) % below
        };
        let sites: Vec<usize> = (0..packets).map(|_| random(5) as usize).collect();
        let sent: Vec<Vec<u8>> = sites
            .iter()
            .map(|site| {
                let (source, destination) = (ip("10.1.0.1"), ip(&format!("10.2.{site}.9")));
                let payload = udp(1000, 53, random(300) as usize);
                ipv4(source, destination, 17, random(64) as u8 * 4, &payload)
            })
            .collect();
        let sealed = west.send(&sent);
        for ((site, inner), (verdict, data, outer)) in sites.iter().zip(&sent).zip(&sealed) {
            let number = &mut numbers[*site];
            if *site == 4 && *number == LIMIT {
                let late = Verdict::Drop(DropReason::OutboundLifetimeExpired);
                assert_eq!(*verdict, late);
                continue;
            }
            *number += 1;
            assert_eq!(*verdict, Verdict::Forward);
            assert_eq!(
                (&data[16..20], data[1]),
                (&[192, 0, 2, 10 + *site as u8][..], inner[1])
            );
            assert_eq!(
                (outer.remote.ip(), outer.tos),
                (ip(&format!("192.0.2.{}", 10 + site)), inner[1])
            );
            assert_eq!(data[20..24], (0x1000 + *site as u32).to_be_bytes());
            assert_eq!(iv(&data[20..]), *number);
        }
        // Each comes twice in a row, and the first one counts.
        let arriving: Vec<_> = sealed
            .iter()
            .zip(&sent)
            .filter(|((verdict, ..), _)| *verdict == Verdict::Forward)
            .collect();
        let twice = arriving.iter().flat_map(|sealed| [sealed, sealed]);
        let received = east.receive(twice.map(|((_, data, _), _)| (data.as_slice(), Outer::NONE)));
        for ((_, inner), both) in arriving.into_iter().zip(received.chunks(2)) {
            assert_eq!((both[0].0, &both[0].1), (Verdict::Forward, inner));
            let late = Verdict::Drop(DropReason::ReplayDuplicate);
            assert_eq!(both[1].0, late);
        }
    }
    assert_eq!(numbers[4], LIMIT);
}

#[test]
fn an_sa_that_lost_its_high_half_finds_it_again() {
    let scene = Scene::default();
    let (_, mut east) = scene.build();
    let forger = Forger::new(&scene, 0x1000, 1);
    assert_eq!(
        east.receive_one(&forger.packet(10, &inner(false, 1))).0,
        Verdict::Forward
    );
    // A long outage: more than 2^32 packets were lost, three times over.
    let first = 3 * HALF + 1000;
    let mut failed = 0;
    for number in first.. {
        match east.receive_one(&forger.packet(number, &inner(false, 1))).0 {
            Verdict::Drop(DropReason::AuthenticationFailed) => failed += 1,
            Verdict::Forward => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(failed, 64);
    assert_eq!(east.status(Direction::Inbound).sequence, first + 64);
    let next = forger.packet(first + 65, &inner(false, 1));
    assert_eq!(east.receive_one(&next).0, Verdict::Forward);
}

#[test]
fn an_inbound_sa_goes_on_where_it_is_told() {
    let scene = Scene::default();
    let forger = Forger::new(&scene, 0x1000, 1);
    let mut east = Gateway::new(scene.headers);
    let received = 3 * HALF + 1000; // before a restart
    east.apply(vec![
        SaCommand::DefineTunnel(scene.tunnel_of_east()),
        SaCommand::Install(SaParams {
            sequence: start(received + 1, None),
            ..scene.inbound(spi(0x1000), 1)
        }),
    ]);
    let (verdict, _) = east.receive_one(&forger.packet(received, &inner(false, 1)));
    assert_eq!(verdict, Verdict::Drop(DropReason::ReplayTooOld));
    let next = forger.packet(received + 1, &inner(false, 1));
    assert_eq!(east.receive_one(&next).0, Verdict::Forward);
}

#[test]
fn resynchronisation_is_bounded() {
    let scene = Scene::default();
    let (_, mut east) = scene.build();
    let forger = Forger::new(&scene, 0x1000, 1);
    for number in 0..200 {
        let too_far = forger.packet(6 * HALF + 5000 + number, &inner(false, 1));
        let (verdict, _) = east.receive_one(&too_far);
        assert_eq!(verdict, Verdict::Drop(DropReason::AuthenticationFailed));
    }
}

#[test]
fn a_flood_of_forgeries_changes_nothing_but_its_own_counter() {
    for suite in AeadSuite::ALL {
        let scene = Scene {
            suite,
            roaming: true,
            ..Scene::default()
        };
        let (mut west, mut east) = scene.build();
        let genuine: Vec<_> = (0..3)
            .map(|size| west.sealed(&inner(false, size)))
            .collect();
        assert_eq!(east.receive_one(&genuine[2]).0, Verdict::Forward);
        east.report.clear();
        let before = east.status(Direction::Inbound);

        let stranger = Forger::new(&scene, 0x1000, 99);
        for number in [1, 2, 3, 4, 5000, HALF - 1, HALF, 3 * HALF].repeat(20) {
            let mut forged = stranger.packet(number, &inner(false, 8));
            forged[15] = 77; // from elsewhere
            let (verdict, data) = east.receive_one(&forged);
            assert!(
                matches!(
                    verdict,
                    Verdict::Drop(
                        DropReason::AuthenticationFailed
                            | DropReason::ReplayDuplicate
                            | DropReason::ReplayTooOld
                    )
                ),
                "{verdict:?}"
            );
            assert_eq!(data.len(), forged.len() - 20, "nothing was taken off");
        }
        let after = east.status(Direction::Inbound);
        assert_eq!(after.sequence, before.sequence);
        assert_eq!(after.statistics.packets, before.statistics.packets);
        assert_eq!(after.statistics.authentication_failures, 80);
        assert_eq!(east.report.events(), []);
        // What was still to come does come.
        for (size, packet) in genuine[..2].iter().enumerate() {
            assert_eq!(
                east.receive_one(packet),
                (Verdict::Forward, inner(false, size))
            );
        }
    }
}

#[test]
fn the_first_number_is_one_and_zero_is_too_old() {
    let scene = Scene {
        esn: Esn::Off,
        ..Scene::default()
    };
    let (_, mut east) = scene.build();
    let forger = Forger::new(&scene, 0x1000, 1);
    let (verdict, _) = east.receive_one(&forger.packet(0, &inner(false, 1)));
    assert_eq!(verdict, Verdict::Drop(DropReason::ReplayTooOld));
    assert_eq!(
        east.receive_one(&forger.packet(1, &inner(false, 1))).0,
        Verdict::Forward
    );
}

#[test]
fn exhausted_numbers_stop_the_sa_and_are_told() {
    let scene = Scene {
        esn: Esn::Off,
        sequence: start(u64::from(u32::MAX) - 1, None),
        ..Scene::default()
    };
    let (mut west, _) = scene.build();
    let packets = vec![inner(false, 1); 5];
    let verdicts: Vec<_> = west
        .send(&packets)
        .into_iter()
        .map(|(verdict, ..)| verdict)
        .collect();
    let exhausted = Verdict::Drop(DropReason::SequenceExhausted);
    assert_eq!(
        verdicts,
        [
            Verdict::Forward,
            Verdict::Forward,
            exhausted,
            exhausted,
            exhausted
        ]
    );
    let sa = sa_id(Direction::Outbound, 0x1000);
    assert_eq!(west.report.events(), [SaEvent::SequenceExhausted { sa }]);
    assert_eq!(west.status(Direction::Outbound).statistics.packets, 2);
}

#[test]
fn a_reservation_asks_in_time_and_is_never_passed() {
    let scene = Scene {
        sequence: start(101, Some(110)),
        ..Scene::default()
    };
    let (mut west, _) = scene.build();
    let sa = sa_id(Direction::Outbound, 0x1000);
    for _ in 0..5 {
        west.sealed(&inner(false, 1));
    }
    assert_eq!(west.report.events(), []);
    west.sealed(&inner(false, 1));
    assert_eq!(
        west.report.events(),
        [SaEvent::SequenceLow { sa, next: 107 }]
    );
    let verdicts = west.send(&vec![inner(false, 1); 7]);
    let sent = verdicts
        .iter()
        .filter(|(verdict, ..)| *verdict == Verdict::Forward);
    assert_eq!(sent.count(), 4);
    assert_eq!(west.drops(DropReason::SequenceExhausted), 3);
    assert_eq!(west.status(Direction::Outbound).sequence, 110);

    west.report.clear();
    west.apply(vec![SaCommand::ExtendSequence {
        sa,
        reserved_until: 200,
    }]);
    west.sealed(&inner(false, 1));
    assert_eq!(west.report.events(), []);
}

#[test]
fn a_key_goes_on_where_it_was_when_it_is_installed_again() {
    let scene = Scene {
        sequence: start(1, Some(1000)),
        headers: OuterHeaders::ByKernel,
        ..Scene::default()
    };
    let (mut west, mut east) = scene.build();
    let first = west.sealed(&inner(false, 1));
    assert_eq!(iv(&first), 1);
    let outer = scene.outer_at_east();
    assert_eq!(
        east.receive([(first.as_slice(), outer)])[0].0,
        Verdict::Forward
    );

    // A reload takes both SAs away and brings them back.
    west.apply(vec![
        SaCommand::Remove(sa_id(Direction::Outbound, 0x1000)),
        SaCommand::Install(scene.outbound(spi(0x1000), 1)),
    ]);
    east.apply(vec![SaCommand::Remove(sa_id(Direction::Inbound, 0x1000))]);
    east.apply(vec![SaCommand::Install(scene.inbound(spi(0x1000), 1))]);
    assert_eq!(iv(&west.sealed(&inner(false, 1))), 2);
    assert_eq!(
        east.receive([(first.as_slice(), outer)])[0].0,
        Verdict::Drop(DropReason::ReplayDuplicate),
        "the window is remembered too"
    );

    // Under another SPI it is still the same key.
    west.apply(vec![
        SaCommand::RemoveTunnel(TUNNEL),
        SaCommand::DefineTunnel(scene.tunnel_of_west()),
        SaCommand::Install(scene.outbound(spi(0x2000), 1)),
    ]);
    assert_eq!(iv(&west.sealed(&inner(false, 1))), 3);
}

#[test]
fn a_window_of_another_size_forgets_nothing() {
    let scene = Scene::default();
    let (mut west, mut east) = scene.build();
    let sealed: Vec<_> = (0..3).map(|_| west.sealed(&inner(false, 1))).collect();
    assert_eq!(east.receive_one(&sealed[1]).0, Verdict::Forward);
    let smaller = Scene {
        window: 64,
        ..scene
    };
    east.apply(vec![
        SaCommand::Remove(sa_id(Direction::Inbound, 0x1000)),
        SaCommand::Install(smaller.inbound(spi(0x1000), 1)),
    ]);
    let old = Verdict::Drop(DropReason::ReplayTooOld);
    assert_eq!(east.receive_one(&sealed[1]).0, old);
    assert_eq!(east.receive_one(&sealed[2]).0, Verdict::Forward);
}

/// What a control plane may do to the keys of one tunnel, sensible or not.
#[derive(Clone, Debug)]
enum Move {
    Install {
        spi: u32,
        key: u8,
        first: u64,
        reserved: Option<u64>,
    },
    Remove(u32),
    Retire(u32),
    Activate(u32),
    Extend(u32, u64),
    Redefine,
    Send(usize),
    Dummy,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let spi = || 0x1000u32..0x1003;
    let install = (spi(), 1u8..4, 1u64..30, proptest::option::of(1u64..60));
    let one = prop_oneof![
        4 => install.prop_map(|(spi, key, first, reserved)| Move::Install { spi, key, first, reserved }),
        2 => spi().prop_map(Move::Remove),
        1 => spi().prop_map(Move::Retire),
        1 => spi().prop_map(Move::Activate),
        1 => (spi(), 1u64..100).prop_map(|(spi, until)| Move::Extend(spi, until)),
        1 => Just(Move::Redefine),
        6 => (1usize..9).prop_map(Move::Send),
        1 => Just(Move::Dummy),
    ];
    proptest::collection::vec(one, 1..60)
}

proptest! {
    #[test]
    fn no_key_and_iv_are_ever_used_twice(moves in moves()) {
        let scene = Scene { headers: OuterHeaders::ByKernel, ..Scene::default() };
        let mut west = Gateway::new(scene.headers);
        west.apply(vec![SaCommand::DefineTunnel(scene.tunnel_of_west())]);
        let mut key_of = HashMap::new();
        let mut used = HashSet::new();
        for step in moves {
            let id = |spi| sa_id(Direction::Outbound, spi);
            let command = match step {
                Move::Install { spi: number, key, first, reserved } => {
                    let params = SaParams {
                        sequence: start(first, reserved),
                        ..scene.outbound(spi(number), key)
                    };
                    if west.writer.apply(NOW, vec![SaCommand::Install(params)]).is_ok() {
                        key_of.insert(number, key);
                    }
                    continue;
                }
                Move::Remove(number) => vec![SaCommand::Remove(id(number))],
                Move::Retire(number) => vec![SaCommand::Retire { tunnel: TUNNEL, spi: spi(number) }],
                Move::Activate(number) => vec![SaCommand::Activate { tunnel: TUNNEL, spi: spi(number) }],
                Move::Extend(number, reserved_until) => {
                    vec![SaCommand::ExtendSequence { sa: id(number), reserved_until }]
                }
                Move::Redefine => vec![
                    SaCommand::RemoveTunnel(TUNNEL),
                    SaCommand::DefineTunnel(scene.tunnel_of_west()),
                ],
                Move::Send(packets) => {
                    for (verdict, esp, _) in west.send(&vec![inner(false, 4); packets]) {
                        if verdict == Verdict::Forward {
                            let spi = u32::from_be_bytes(esp[..4].try_into().unwrap());
                            prop_assert!(used.insert((key_of[&spi], iv(&esp))), "key {}, IV {}", key_of[&spi], iv(&esp));
                        }
                    }
                    continue;
                }
                Move::Dummy => {
                    let mut batch = Batch::new(1, 512);
                    let tables = west.writer.tables();
                    if west.outbound.dummy(&tables, TUNNEL, &mut batch, &mut west.report) {
                        let esp = batch.data(0);
                        let spi = u32::from_be_bytes(esp[..4].try_into().unwrap());
                        prop_assert!(used.insert((key_of[&spi], iv(esp))));
                    }
                    continue;
                }
            };
            let _refused = west.writer.apply(NOW, command);
        }
    }
}

/// Three workers, each with snapshots of different age, while the control side takes the SA away
/// and brings it back.
#[test]
fn workers_with_old_snapshots_share_no_number_with_new_ones() {
    let scene = Scene {
        headers: OuterHeaders::ByKernel,
        sequence: start(1, Some(1 << 40)),
        ..Scene::default()
    };
    let (mut west, _) = scene.build();
    let shared = Mutex::new(west.writer.tables());
    let done = AtomicBool::new(false);
    let rounds = AtomicU32::new(0);
    let used = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let (mut outbound, mut report) = (Outbound::new(64), Report::new());
                let mut mine = Vec::new();
                while !done.load(Relaxed) {
                    let tables = shared.lock().unwrap().clone();
                    rounds.fetch_add(1, Relaxed);
                    for _ in 0..5 {
                        let mut batch = Batch::new(16, 512);
                        while batch.push(&inner(false, 4), Outer::NONE) {}
                        outbound.process(&tables, &mut batch, &mut report);
                        let sent =
                            (0..16).filter(|at| batch.packets()[*at].verdict == Verdict::Forward);
                        mine.extend(sent.map(|at| iv(batch.data(at))));
                    }
                }
                used.lock().unwrap().extend(mine);
            });
        }
        while rounds.load(Relaxed) < 300 {
            west.apply(vec![
                SaCommand::Remove(sa_id(Direction::Outbound, 0x1000)),
                SaCommand::Install(scene.outbound(spi(0x1000), 1)),
            ]);
            *shared.lock().unwrap() = west.writer.tables();
            thread::yield_now();
        }
        done.store(true, Relaxed);
    });
    let used = used.into_inner().unwrap();
    assert!(!used.is_empty());
    assert_eq!(used.iter().collect::<HashSet<_>>().len(), used.len());
}
