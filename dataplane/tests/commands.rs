//! What control planes may ask for, and what they are refused.

mod common;
use common::*;
use esplane_api::*;
use esplane_dataplane::*;

const OTHER: TunnelId = TunnelId(2);

/// Applies to west and expects a refusal that leaves everything as it was.
fn refused(west: &mut Gateway, commands: Vec<SaCommand>) -> CommandError {
    let before = (west.writer.sas(), west.writer.tunnels());
    let tables = west.writer.tables();
    let error = west.writer.apply(NOW, commands).unwrap_err();
    assert_eq!((west.writer.sas(), west.writer.tunnels()), before);
    assert!(std::sync::Arc::ptr_eq(&tables, &west.writer.tables()));
    error
}

#[test]
fn every_impossible_command_is_refused_with_what_would_be_right() {
    let scene = Scene::default();
    let (mut west, _) = scene.build();
    let install = |params| vec![SaCommand::Install(params)];
    let inbound = || SaParams {
        tunnel: TUNNEL,
        ..scene.inbound(spi(0x3000), 9)
    };
    west.apply(install(inbound()));
    let unknown = SaParams {
        tunnel: OTHER,
        ..scene.outbound(spi(0x2000), 2)
    };
    let zero = SaParams {
        sequence: SequenceStart {
            first: 0,
            reserved_until: None,
        },
        ..scene.outbound(spi(0x2000), 2)
    };
    let nowhere = SaParams {
        path: OuterPath::new(ip("0.0.0.0"), ip("192.0.2.2"), None).unwrap(),
        ..scene.outbound(spi(0x2000), 2)
    };
    let blind = SaParams {
        selectors: Vec::new(),
        ..scene.inbound(spi(0x4000), 2)
    };
    let mut foreign = scene.tunnel_of_west();
    foreign.policies[0].action = PolicyAction::Protect(OTHER);
    let mut greedy = scene.tunnel_of_west();
    greedy.id = OTHER;
    for policy in &mut greedy.policies {
        policy.action = PolicyAction::Protect(OTHER);
    }
    let out = |number| sa_id(Direction::Outbound, number);
    let activate = |number| SaCommand::Activate {
        tunnel: TUNNEL,
        spi: spi(number),
    };
    let retire = SaCommand::Retire {
        tunnel: TUNNEL,
        spi: spi(0x1000),
    };
    let move_to = |tunnel, remote: &str| {
        vec![SaCommand::MoveEndpoint {
            tunnel,
            remote: remote.parse().unwrap(),
        }]
    };
    for (commands, said) in [
        (
            install(unknown),
            "tunnel #2 is not defined; define it first",
        ),
        (install(zero), "cannot start at sequence number 0; use 1 to"),
        (install(nowhere), "has no local address"),
        (install(blind), "give at least one pair"),
        (
            install(inbound()),
            "0x00003000 already belongs to tunnel #1",
        ),
        (
            install(scene.outbound(spi(0x1000), 5)),
            "is already installed; remove it first",
        ),
        (
            install(scene.outbound(spi(0x2000), 1)),
            "its key is that of the outbound SA 0x00001000",
        ),
        (
            install(scene.outbound(spi(0x2000), 9)),
            "its key is that of the inbound SA 0x00003000",
        ),
        (
            install(scene.inbound(spi(0x4000), 1)),
            "its key is that of the outbound SA 0x00001000",
        ),
        (
            vec![SaCommand::DefineTunnel(foreign)],
            "protects with tunnel #2; put it into that tunnel",
        ),
        (
            vec![SaCommand::DefineTunnel(greedy)],
            "tunnels #1 and #2 both claim 10.1.0.0/16 === 10.2.0.0/16",
        ),
        (
            vec![SaCommand::RemoveTunnel(OTHER)],
            "tunnel #2 is not defined",
        ),
        (
            vec![SaCommand::Remove(out(0x7777))],
            "outbound SA 0x00007777 of tunnel #1 is not installed",
        ),
        (
            vec![SaCommand::Remove(sa_id(Direction::Inbound, 0x7777))],
            "is not installed",
        ),
        (vec![activate(0x7777)], "is not installed"),
        (
            vec![retire, activate(0x1000)],
            "is retired and never sends again",
        ),
        (move_to(OTHER, "192.0.2.9:1"), "tunnel #2 is not defined"),
        (move_to(TUNNEL, "0.0.0.0:1"), "names no single host"),
        (
            vec![SaCommand::ExtendSequence {
                sa: sa_id(Direction::Inbound, 0x3000),
                reserved_until: 9,
            }],
            "does not send; name an outbound SA",
        ),
    ] {
        let error = refused(&mut west, commands).to_string();
        assert!(error.contains(said), "{error}\nshould say: {said}");
    }
}

#[test]
fn the_width_of_numbers_cannot_change_under_one_key() {
    let (mut west, _) = Scene::default().build();
    let narrow = Scene {
        esn: Esn::Off,
        ..Scene::default()
    };
    let commands = vec![
        SaCommand::Remove(sa_id(Direction::Outbound, 0x1000)),
        SaCommand::Install(narrow.outbound(spi(0x1000), 1)),
    ];
    let error = refused(&mut west, commands);
    assert_eq!(
        (error.index, error.problem),
        (1, CommandProblem::EsnChanged)
    );
}

#[test]
fn a_key_never_changes_its_direction() {
    let scene = Scene::default();
    let (mut west, mut east) = scene.build();
    for (gateway, direction, turned) in [
        (
            &mut west,
            Direction::Outbound,
            scene.inbound(spi(0x1000), 1),
        ),
        (
            &mut east,
            Direction::Inbound,
            scene.outbound(spi(0x1000), 1),
        ),
    ] {
        gateway.apply(vec![SaCommand::Remove(sa_id(direction, 0x1000))]);
        let error = refused(gateway, vec![SaCommand::Install(turned)]);
        assert_eq!(error.problem, CommandProblem::KeyUsedOtherWay);
    }
}

#[test]
fn a_list_is_carried_out_as_a_whole_or_not_at_all() {
    let scene = Scene::default();
    let (mut west, _) = scene.build();
    let error = refused(
        &mut west,
        vec![
            SaCommand::Install(scene.outbound(spi(0x2000), 2)),
            SaCommand::ExtendSequence {
                sa: sa_id(Direction::Outbound, 0x2000),
                reserved_until: 5,
            },
            SaCommand::Remove(sa_id(Direction::Outbound, 0x1000)),
            SaCommand::RemoveTunnel(OTHER),
        ],
    );
    assert_eq!(
        error.to_string(),
        "command 4 (remove tunnel): tunnel #2 is not defined; define it first"
    );
    west.sealed(&inner(false, 1)); // still sends
}

#[test]
fn a_route_may_wander_between_tunnels_in_any_order() {
    let scene = Scene::default();
    let (mut west, _) = scene.build();
    let mut heir = scene.tunnel_of_west();
    heir.id = OTHER;
    for policy in &mut heir.policies {
        policy.action = PolicyAction::Protect(OTHER);
    }
    let mut without = scene.tunnel_of_west();
    without.policies.clear();
    west.apply(vec![
        SaCommand::DefineTunnel(heir),
        SaCommand::DefineTunnel(without),
    ]);
    assert_eq!(west.send(&[inner(false, 1)])[0].0, Verdict::Hold(OTHER));
}

#[test]
fn without_an_sa_packets_are_held_and_one_is_asked_for() {
    let scene = Scene::default();
    let mut west = Gateway::new(scene.headers);
    west.apply(vec![SaCommand::DefineTunnel(scene.tunnel_of_west())]);
    for (verdict, data, _) in west.send(&[inner(false, 1), inner(false, 1)]) {
        assert_eq!((verdict, data), (Verdict::Hold(TUNNEL), inner(false, 1)));
    }
    assert_eq!(west.report.events(), [SaEvent::SaNeeded { tunnel: TUNNEL }]);
    let mut batch = Batch::new(1, 512);
    let tables = west.writer.tables();
    assert!(
        !west
            .outbound
            .dummy(&tables, TUNNEL, &mut batch, &mut west.report)
    );
    assert!(batch.is_empty());
}

#[test]
fn a_policy_may_let_packets_pass_in_clear() {
    let scene = Scene::default();
    let (mut west, _) = scene.build();
    let mut tunnel = scene.tunnel_of_west();
    tunnel.policies.push(Policy {
        selectors: pair("10.1.0.0/16", "10.2.0.9[udp/53]"),
        action: PolicyAction::Bypass,
        priority: 0,
    });
    west.apply(vec![SaCommand::DefineTunnel(tunnel)]);
    assert_eq!(west.send(&[inner(false, 1)])[0].0, Verdict::Bypass);
}

fn spi_of(packet: &[u8]) -> u32 {
    u32::from_be_bytes(packet[20..24].try_into().unwrap())
}

#[test]
fn a_successor_takes_over_when_it_is_told_to_or_when_its_predecessor_goes() {
    let scene = Scene::default();
    let (mut west, _) = scene.build();
    let mut sends_with = |commands| {
        west.apply(commands);
        spi_of(&west.sealed(&inner(false, 1)))
    };
    let activate = |number| SaCommand::Activate {
        tunnel: TUNNEL,
        spi: spi(number),
    };
    let retire = |number| SaCommand::Retire {
        tunnel: TUNNEL,
        spi: spi(number),
    };
    assert_eq!(
        sends_with(vec![SaCommand::Install(scene.outbound(spi(0x2000), 2))]),
        0x1000
    );
    assert_eq!(
        sends_with(vec![SaCommand::Install(scene.outbound(spi(0x3000), 3))]),
        0x1000
    );
    assert_eq!(sends_with(vec![activate(0x3000)]), 0x3000);
    assert_eq!(
        sends_with(vec![retire(0x3000)]),
        0x1000,
        "the oldest one standing by"
    );
    assert_eq!(
        sends_with(vec![SaCommand::Remove(sa_id(Direction::Outbound, 0x1000))]),
        0x2000
    );
    west.apply(vec![retire(0x2000)]);
    assert_eq!(west.send(&[inner(false, 1)])[0].0, Verdict::Hold(TUNNEL));
    assert_eq!(
        west.writer.sas().len(),
        2,
        "retired ones keep their counters"
    );
    west.apply(vec![SaCommand::Install(scene.outbound(spi(0x4000), 4))]);
    assert_eq!(spi_of(&west.sealed(&inner(false, 1))), 0x4000);
}

#[test]
fn a_worker_sends_with_an_sa_of_its_own_and_all_others_with_the_fallback() {
    let scene = Scene::default();
    let (mut west, mut east) = scene.build();
    let of_worker = |number, key, worker| SaParams {
        worker: Some(worker),
        ..scene.outbound(spi(number), key)
    };
    for (number, key) in [(0x2000, 2), (0x3000, 3), (0x4000, 4)] {
        let inbound = scene.inbound(spi(number), key);
        east.apply(vec![SaCommand::Install(inbound)]);
    }
    let mut send_with = |commands: Vec<SaCommand>| {
        west.apply(commands);
        [0, 1, 2, 3].map(|worker| {
            west.outbound = Outbound::new(64).of_worker(worker);
            let sealed = west.sealed(&inner(false, 1));
            assert_eq!(east.receive_one(&sealed).0, Verdict::Forward);
            spi_of(&sealed)
        })
    };
    let install = |params| vec![SaCommand::Install(params)];
    let fallback = 0x1000;
    assert_eq!(
        send_with(install(of_worker(0x2000, 2, 1))),
        [fallback, 0x2000, fallback, fallback]
    );
    // A successor stands by for its own worker, and takes over there alone.
    assert_eq!(
        send_with(install(of_worker(0x3000, 3, 1))),
        [fallback, 0x2000, fallback, fallback]
    );
    let activate = SaCommand::Activate {
        tunnel: TUNNEL,
        spi: spi(0x3000),
    };
    assert_eq!(
        send_with(vec![activate]),
        [fallback, 0x3000, fallback, fallback]
    );
    assert_eq!(
        send_with(install(of_worker(0x4000, 4, 3))),
        [fallback, 0x3000, fallback, 0x4000]
    );
    let remove = |number| SaCommand::Remove(sa_id(Direction::Outbound, number));
    assert_eq!(
        send_with(vec![remove(0x3000), remove(0x4000)]),
        [fallback, 0x2000, fallback, fallback]
    );
    // Without a fallback the others have nothing.
    west.apply(vec![remove(fallback)]);
    for (worker, verdict) in [
        (0, Verdict::Hold(TUNNEL)),
        (1, Verdict::Forward),
        (2, Verdict::Hold(TUNNEL)),
    ] {
        west.outbound = Outbound::new(64).of_worker(worker);
        assert_eq!(west.send(&[inner(false, 1)])[0].0, verdict);
    }
}

#[test]
fn an_overlap_of_old_and_new_keys_loses_nothing() {
    let scene = Scene::default();
    let (mut west, mut east) = scene.build();
    let straggler = west.sealed(&inner(false, 1));
    east.apply(vec![SaCommand::Install(scene.inbound(spi(0x2000), 2))]);
    west.apply(vec![
        SaCommand::Install(scene.outbound(spi(0x2000), 2)),
        SaCommand::Activate {
            tunnel: TUNNEL,
            spi: spi(0x2000),
        },
    ]);
    let newer = west.sealed(&inner(false, 2));
    for packet in [newer, straggler] {
        assert_eq!(east.receive_one(&packet).0, Verdict::Forward);
    }
    // What an SA that is gone has carried stays with its tunnel.
    east.apply(vec![SaCommand::Remove(sa_id(Direction::Inbound, 0x1000))]);
    west.apply(vec![SaCommand::Remove(sa_id(Direction::Outbound, 0x1000))]);
    let newest = west.sealed(&inner(false, 3));
    assert_eq!(east.receive_one(&newest).0, Verdict::Forward);
    assert_eq!(west.writer.activity()[0].sent_data_packets, 3);
    assert_eq!(east.writer.activity()[0].received_data_packets, 3);
    let first = |number| SaEvent::FirstReceived {
        sa: sa_id(Direction::Inbound, number),
    };
    assert_eq!(east.report.events(), [first(0x2000), first(0x1000)]);
}

#[test]
fn status_names_everything_and_nothing_secret() {
    let (mut west, _) = Scene::default().build();
    west.sealed(&inner(false, 10));
    assert_eq!(west.writer.tunnels()[0].name, "east");
    let status = west.status(Direction::Outbound);
    assert!(status.active && status.sequence == 1 && status.statistics.bytes == 38);
    assert!(
        !west.writer.uses_inbound_spi(spi(0x1000)),
        "outbound SPIs are the peer's"
    );
}

/// Tunnels come, go and change their routes in random order; the tables always decide as tables made at once from what
/// is defined would. Without SAs a packet is held for its tunnel, which tells where it would have gone.
#[test]
fn routes_that_wandered_decide_as_if_they_had_always_been_there() {
    let mut seed = 9_u64;
    let mut random = move |bound: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    };
    let scene = Scene::default();
    let (mut west, _) = scene.build();
    west.apply(vec![SaCommand::RemoveTunnel(TUNNEL)]);
    let mut defined: Vec<TunnelParams> = Vec::new(); // in order of definition
    for _ in 0..400 {
        let mut wanted = defined.clone();
        let mut commands = Vec::new();
        for _ in 0..=random(3) {
            let id = TunnelId(random(6) as u32);
            let known = wanted.iter().position(|tunnel| tunnel.id == id);
            if random(3) == 0 {
                if let Some(at) = known {
                    wanted.remove(at);
                    commands.push(SaCommand::RemoveTunnel(id));
                }
                continue;
            }
            let policies = (0..random(4))
                .map(|_| Policy {
                    selectors: pair(
                        ["0.0.0.0/0", "10.9.0.0/16", "10.9.1.0/24"][random(3) as usize],
                        [
                            "10.0.0.0/8",
                            "10.1.0.0/16",
                            "10.1.2.0/24",
                            "10.1.2.3/32",
                            "0.0.0.0/0",
                        ][random(5) as usize],
                    ),
                    action: PolicyAction::Protect(id),
                    priority: random(3) as u32,
                })
                .collect();
            let params = TunnelParams {
                id,
                name: id.to_string(),
                policies,
                roaming: false,
                df: DfPolicy::Clear,
            };
            match known {
                Some(at) => wanted[at] = params.clone(),
                None => wanted.push(params.clone()),
            }
            commands.push(SaCommand::DefineTunnel(params));
        }
        let mut fresh = Gateway::new(scene.headers);
        let all = wanted.iter().cloned().map(SaCommand::DefineTunnel);
        let accepted = fresh.writer.apply(NOW, all.collect()).is_ok();
        assert_eq!(west.writer.apply(NOW, commands).is_ok(), accepted);
        if !accepted {
            continue; // both tunnels want the same; nothing has changed
        }
        defined = wanted;
        let packets: Vec<_> = ["10.1.2.3", "10.1.2.4", "10.1.3.1", "10.2.0.1", "9.9.9.9"]
            .into_iter()
            .flat_map(|to| ["10.9.1.1", "10.9.2.1", "10.8.1.1"].map(|from| (from, to)))
            .map(|(from, to)| ipv4(ip(from), ip(to), 17, 0, &[0; 8]))
            .collect();
        let verdicts = |gateway: &mut Gateway| {
            let sent = gateway.send(&packets).into_iter();
            sent.map(|(verdict, ..)| verdict).collect::<Vec<_>>()
        };
        assert_eq!(verdicts(&mut west), verdicts(&mut fresh));
    }
    assert!(!defined.is_empty());
}
