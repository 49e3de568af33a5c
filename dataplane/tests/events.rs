//! What control planes are told: first packets, peers that move, lifetimes that end.

mod common;
use common::*;
use esplane_api::*;
use esplane_dataplane::*;
use std::time::Duration;

#[test]
fn the_first_authentic_packet_is_told_once() {
    let scene = Scene::default();
    let (mut west, mut east) = scene.build();
    let mut bad = west.sealed(&inner(false, 1));
    bad[50] ^= 1;
    east.receive_one(&bad);
    assert_eq!(east.report.events(), []);
    let sa = sa_id(Direction::Inbound, 0x1000);
    for expected in [&[SaEvent::FirstReceived { sa }][..], &[], &[]] {
        let sealed = west.sealed(&inner(false, 1));
        east.receive_one(&sealed);
        let told: Vec<_> = east.report.drain_events().collect();
        assert_eq!(told, expected);
    }
}

#[test]
fn dummies_keep_a_tunnel_alive_and_are_no_data() {
    let (mut west, mut east) = Scene::default().build();
    let mut batch = Batch::new(2, 512);
    let tables = west.writer.tables();
    for _ in 0..2 {
        assert!(
            west.outbound
                .dummy(&tables, TUNNEL, &mut batch, &mut west.report)
        );
    }
    assert!(
        !west
            .outbound
            .dummy(&tables, TUNNEL, &mut batch, &mut west.report),
        "the batch is full"
    );
    for at in 0..2 {
        assert_eq!(
            east.receive_one(batch.data(at)).0,
            Verdict::Drop(DropReason::DummyPacket)
        );
    }
    let (sent, received) = (west.writer.activity()[0], east.writer.activity()[0]);
    assert_eq!(sent.sent_data_packets, 0);
    assert_eq!(
        (received.received_data_packets, received.received_packets),
        (0, 2)
    );
    assert_eq!(east.report.drops.unexpected(), 0);
}

#[test]
fn a_tunnel_follows_its_peer_only_by_its_newest_authentic_packet() {
    let scene = Scene {
        roaming: true,
        udp: true,
        ..Scene::default()
    };
    let (mut west, mut east) = scene.build();
    // East sends back to where west was.
    let back = SaParams {
        direction: Direction::Outbound,
        path: scene.east_path(),
        ..scene.inbound(spi(0x9000), 5)
    };
    east.apply(vec![SaCommand::Install(back)]);
    let moved = |mut packet: Vec<u8>| {
        packet[12..16].copy_from_slice(&[198, 51, 100, 7]);
        packet[20..22].copy_from_slice(&61_000u16.to_be_bytes());
        packet
    };
    let old = west.sealed(&inner(false, 1));
    let stay = west.sealed(&inner(false, 1));
    let new = west.sealed(&inner(false, 1));
    east.receive_one(&stay);
    east.report.clear();
    east.receive_one(&moved(old)); // late, from elsewhere: says nothing
    let mut forged = moved(new.clone());
    forged[60] ^= 1;
    east.receive_one(&forged);
    assert_eq!(east.report.events(), []);
    east.receive_one(&moved(new));
    let remote = "198.51.100.7:61000".parse().unwrap();
    assert_eq!(
        east.report.events(),
        [SaEvent::EndpointMoved {
            tunnel: TUNNEL,
            remote
        }]
    );

    east.report.clear();
    let before = east.status(Direction::Outbound).sequence;
    east.apply(vec![SaCommand::MoveEndpoint {
        tunnel: TUNNEL,
        remote,
    }]);
    assert!(
        (east.writer.sas().iter()).all(|sa| sa.path.remote_socket() == remote),
        "status shows where the peer is now"
    );
    let answer = ipv4(ip("10.2.0.9"), ip("10.1.0.7"), 1, 0, &[]);
    let (_, data, outer) = east.send(&[answer]).remove(0);
    assert_eq!(outer.remote, remote);
    assert_eq!(data[16..20], [198, 51, 100, 7]);
    assert_eq!(east.status(Direction::Outbound).sequence, before + 1);
    east.receive_one(&moved(west.sealed(&inner(false, 1))));
    assert_eq!(east.report.events(), [], "it is where we send to");
    // Whoever believes it back where it was is told at once, though nothing has changed for the peer.
    let before = "192.0.2.1:4500".parse().unwrap();
    east.apply(vec![SaCommand::MoveEndpoint {
        tunnel: TUNNEL,
        remote: before,
    }]);
    let told = [SaEvent::EndpointMoved {
        tunnel: TUNNEL,
        remote,
    }];
    for _ in 0..2 {
        east.receive_one(&moved(west.sealed(&inner(false, 1))));
        assert_eq!(east.report.drain_events().collect::<Vec<_>>(), told);
    }
}

#[test]
fn lifetimes_ask_for_a_successor_and_then_end_both_ends() {
    let limits = |packets| Limits {
        packets: Some(packets),
        ..Limits::NONE
    };
    let scene = Scene {
        lifetime: Lifetime::new(limits(5), limits(8)).unwrap(),
        ..Scene::default()
    };
    let (mut west, mut east) = scene.build();
    let unit = LifetimeUnit::Packets;
    for gateway_turn in 0..3 {
        for (_, data, _) in west
            .send(&vec![inner(false, 1); 4])
            .iter()
            .filter(|(verdict, ..)| *verdict == Verdict::Forward)
        {
            assert_eq!(east.receive_one(data).0, Verdict::Forward);
        }
        let sa = |direction| sa_id(direction, 0x1000);
        let expected = |direction| match gateway_turn {
            1 => vec![
                SaEvent::SoftExpired {
                    sa: sa(direction),
                    unit,
                },
                SaEvent::HardExpired {
                    sa: sa(direction),
                    unit,
                },
            ],
            // As long as packets want to use it, it is told.
            2 if direction == Direction::Outbound => vec![SaEvent::HardExpired {
                sa: sa(direction),
                unit,
            }],
            _ => vec![],
        };
        let told: Vec<_> = west.report.drain_events().collect();
        assert_eq!(told, expected(Direction::Outbound), "turn {gateway_turn}");
        let told = east
            .report
            .drain_events()
            .filter(|event| !matches!(event, SaEvent::FirstReceived { .. }));
        assert_eq!(
            told.collect::<Vec<_>>(),
            expected(Direction::Inbound),
            "turn {gateway_turn}"
        );
    }
    assert_eq!(west.drops(DropReason::OutboundLifetimeExpired), 4);
    assert_eq!(west.status(Direction::Outbound).statistics.packets, 8);
}

#[test]
fn seconds_are_counted_by_ticks() {
    let limits = |seconds| Limits {
        seconds: Some(seconds),
        ..Limits::NONE
    };
    let scene = Scene {
        lifetime: Lifetime::new(limits(60), limits(90)).unwrap(),
        ..Scene::default()
    };
    let (mut west, _) = scene.build();
    let sa = sa_id(Direction::Outbound, 0x1000);
    let unit = LifetimeUnit::Seconds;
    let mut tick = |seconds| west.writer.tick(NOW.after(Duration::from_secs(seconds)));
    assert_eq!(tick(59), []);
    assert_eq!(tick(60), [SaEvent::SoftExpired { sa, unit }]);
    assert_eq!(tick(89), []);
    assert_eq!(tick(90), [SaEvent::HardExpired { sa, unit }]);
    let (verdict, ..) = west.send(&[inner(false, 1)]).remove(0);
    assert_eq!(verdict, Verdict::Drop(DropReason::OutboundLifetimeExpired));
}
