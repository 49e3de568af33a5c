//! Any bytes at all, and more than one would expect: nothing panics, nothing is left undecided.

mod common;
use common::*;
use esplane_api::*;
use esplane_dataplane::*;
use proptest::prelude::*;

/// Bytes that begin like something known, so that they get past the first check.
fn packets() -> impl Strategy<Value = Vec<u8>> {
    let noise = proptest::collection::vec(any::<u8>(), 0..200);
    (noise, 0..8u8).prop_map(|(mut bytes, like)| {
        let known: &[(usize, &[u8])] = match like {
            0 => &[
                (0, &[0x45, 0]),
                (8, &[64, 50]),
                (20, &0x1000u32.to_be_bytes()),
            ],
            1 => &[
                (0, &[0x45, 0]),
                (6, &[0, 0, 64, 17]),
                (28, &0x1000u32.to_be_bytes()),
            ],
            2 => &[(0, &[0x60]), (6, &[50, 64]), (40, &0x1000u32.to_be_bytes())],
            3 => &[(0, &[0x60]), (6, &[44, 64])],
            4 => &[(0, &[0x60]), (6, &[0, 64])],
            5 => &[(0, &0x1000u32.to_be_bytes())],
            6 => &[(0, &[0; 4])],
            _ => &[],
        };
        for (at, value) in known {
            if let Some(place) = bytes.get_mut(*at..at + value.len()) {
                place.copy_from_slice(value);
            }
        }
        // A length that is right more often than chance would have it.
        let length = (bytes.len() as u16).to_be_bytes();
        match bytes.first().map(|first| first >> 4) {
            Some(4) if bytes.len() >= 4 => bytes[2..4].copy_from_slice(&length),
            Some(6) if bytes.len() >= 40 => {
                let length = (bytes.len() as u16 - 40).to_be_bytes();
                bytes[4..6].copy_from_slice(&length);
            }
            _ => {}
        }
        bytes
    })
}

fn scenes() -> impl Strategy<Value = Scene> {
    (any::<bool>(), any::<bool>(), any::<bool>(), 0..3usize).prop_map(|(udp, v6, kernel, suite)| {
        Scene {
            udp,
            outer_v6: v6,
            suite: AeadSuite::ALL[suite],
            local: vec!["0.0.0.0/0", "::/0"],
            remote: vec!["0.0.0.0/0", "::/0"],
            headers: if kernel {
                OuterHeaders::ByKernel
            } else {
                OuterHeaders::Written
            },
            ..Scene::default()
        }
    })
}

proptest! {
    #[test]
    fn no_bytes_make_outbound_panic_and_what_leaves_can_be_opened(
        scene in scenes(),
        packets in proptest::collection::vec(packets(), 1..70),
    ) {
        let (mut west, mut east) = scene.build();
        let outer = match scene.headers {
            OuterHeaders::ByKernel => scene.outer_at_east(),
            OuterHeaders::Written => Outer::NONE,
        };
        for (packet, (verdict, data, _)) in packets.iter().zip(west.send(&packets)) {
            match verdict {
                Verdict::Forward => {
                    let received = east.receive([(data.as_slice(), outer)]).remove(0);
                    prop_assert_eq!(received.0, Verdict::Forward);
                    prop_assert!(packet.starts_with(&received.1));
                }
                Verdict::Drop(reason) => {
                    prop_assert_eq!(reason, DropReason::InnerMalformed);
                    prop_assert_eq!(&data, packet);
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }

    #[test]
    fn no_bytes_make_inbound_panic_or_pass(
        scene in scenes(),
        packets in proptest::collection::vec(packets(), 1..70),
        udp in any::<bool>(),
    ) {
        let (_, mut east) = scene.build();
        let outer = Outer { udp, ..scene.outer_at_east() };
        for (verdict, ..) in east.receive(packets.iter().map(|packet| (packet.as_slice(), outer))) {
            prop_assert!(matches!(verdict, Verdict::Drop(_) | Verdict::Control));
        }
        prop_assert_eq!(east.status(Direction::Inbound).sequence, 0);
    }

    /// A peer that has the key and no manners.
    #[test]
    fn no_decrypted_bytes_make_inbound_panic(
        scene in scenes(),
        payloads in proptest::collection::vec(packets(), 1..40),
        next_header in prop_oneof![Just(4u8), Just(41), Just(59), any::<u8>()],
        trailer in any::<Option<u8>>(),
    ) {
        let scene = Scene { headers: OuterHeaders::ByKernel, ..scene };
        let (_, mut east) = scene.build();
        let forger = Forger::new(&scene, 0x1000, 1);
        let sealed: Vec<_> = (1..)
            .zip(&payloads)
            .map(|(number, payload)| {
                let mut encrypted = padded(payload, next_header);
                if let Some(trailer) = trailer {
                    let at = encrypted.len() - 2;
                    encrypted[at] = trailer;
                }
                forger.esp(number, &encrypted)
            })
            .collect();
        let outer = scene.outer_at_east();
        for (verdict, data, _) in east.receive(sealed.iter().map(|esp| (esp.as_slice(), outer))) {
            match verdict {
                Verdict::Forward => prop_assert!(payloads.iter().any(|payload| payload.starts_with(&data))),
                Verdict::Drop(reason) => prop_assert!(matches!(
                    reason,
                    DropReason::BadPadding
                        | DropReason::DummyPacket
                        | DropReason::UnsupportedNextHeader
                        | DropReason::DecryptedMalformed
                )),
                other => prop_assert!(false, "{:?}", other),
            }
        }
        prop_assert_eq!(east.status(Direction::Inbound).statistics.packets, payloads.len() as u64);
    }

    /// The chunks in which a worker goes through its batch show in nothing.
    #[test]
    fn chunks_of_any_size_give_the_same_packets(
        sizes in proptest::collection::vec(0usize..300, 1..150),
        chunk in 1usize..64,
    ) {
        let scene = Scene::default();
        let packets: Vec<_> = sizes.iter().map(|size| inner(size % 3 == 0, *size)).collect();
        let (mut one, mut east_of_one) = scene.build();
        let (mut other, mut east_of_other) = scene.build();
        other.outbound = Outbound::new(chunk);
        east_of_other.inbound = Inbound::new(chunk);
        let (sent, sent_in_chunks) = (one.send(&packets), other.send(&packets));
        prop_assert_eq!(&sent, &sent_in_chunks);
        let at_east = |(_, data, _): &(Verdict, Vec<u8>, Outer)| data.clone();
        let sealed: Vec<_> = sent.iter().map(at_east).collect();
        let all = || sealed.iter().map(|packet| (packet.as_slice(), Outer::NONE));
        prop_assert_eq!(east_of_one.receive(all()), east_of_other.receive(all()));
    }
}

#[test]
fn ten_thousand_sas_live_side_by_side() {
    const TUNNELS: u32 = 5_000;
    let scene = Scene::default();
    let network = |number: u32| format!("10.{}.{}.0/24", 100 + number / 256, number % 256);
    let mut west = Gateway::new(scene.headers);
    let mut commands = Vec::new();
    for number in 0..TUNNELS {
        let id = TunnelId(number);
        commands.push(SaCommand::DefineTunnel(TunnelParams {
            id,
            policies: vec![Policy {
                selectors: pair("10.1.0.0/16", &network(number)),
                action: PolicyAction::Protect(id),
                priority: 0,
            }],
            ..scene.tunnel_of_west()
        }));
        let key = |direction: u8| {
            let mut bytes = [direction; 20];
            bytes[..4].copy_from_slice(&number.to_be_bytes());
            KeyMaterial::new(scene.suite, &bytes).unwrap()
        };
        commands.push(SaCommand::Install(SaParams {
            tunnel: id,
            key: key(1),
            ..scene.outbound(spi(0x1000 + number), 1)
        }));
        commands.push(SaCommand::Install(SaParams {
            tunnel: id,
            key: key(2),
            window: WindowSize::new(64).unwrap(),
            ..scene.inbound(spi(0x1000_0000 + number), 1)
        }));
    }
    west.apply(commands);
    assert_eq!(west.writer.sas().len(), 10_000);

    let packets: Vec<_> = (0..TUNNELS)
        .step_by(7)
        .map(|number| {
            let host = ip(&network(number).replace("0/24", "9"));
            ipv4(ip("10.1.0.7"), host, 1, 0, &[])
        })
        .collect();
    for (number, (verdict, data, _)) in (0..TUNNELS).step_by(7).zip(west.send(&packets)) {
        assert_eq!(verdict, Verdict::Forward);
        assert_eq!(data[20..24], (0x1000 + number).to_be_bytes());
    }
    // One more negotiation among thousands leaves the others as they are.
    west.apply(vec![SaCommand::Remove(SaId {
        tunnel: TunnelId(14),
        direction: Direction::Outbound,
        spi: spi(0x1000 + 14),
    })]);
    let verdicts: Vec<_> = west
        .send(&packets[1..4])
        .into_iter()
        .map(|(verdict, ..)| verdict)
        .collect();
    assert_eq!(
        verdicts,
        [
            Verdict::Forward,
            Verdict::Hold(TunnelId(14)),
            Verdict::Forward
        ]
    );
}

/// Four workers receive overlapping shares of one SA's packets: each arrives exactly once.
#[test]
fn many_workers_receive_each_packet_of_one_sa_exactly_once() {
    let scene = Scene {
        window: 4096,
        ..Scene::default()
    };
    let (mut west, east) = scene.build();
    let sealed: Vec<_> = (0..600)
        .map(|size| west.sealed(&inner(false, size)))
        .collect();
    let tables = east.writer.tables();
    let arrived: Vec<Vec<usize>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4usize)
            .map(|worker| {
                let (tables, sealed) = (&tables, &sealed);
                scope.spawn(move || {
                    let (mut inbound, mut report) = (Inbound::new(64), Report::new());
                    let mut mine = Vec::new();
                    for turn in 0..sealed.len() / 20 {
                        let first = (turn + worker * 7) * 20 % sealed.len();
                        let mut batch = Batch::new(20, 2048);
                        for packet in &sealed[first..first + 20] {
                            assert!(batch.push(packet, Outer::NONE));
                        }
                        inbound.process(tables, &mut batch, &mut report);
                        for (at, packet) in batch.packets().iter().enumerate() {
                            if packet.verdict == Verdict::Forward {
                                mine.push(first + at);
                                assert_eq!(batch.data(at), inner(false, first + at));
                            }
                        }
                    }
                    mine
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap())
            .collect()
    });
    let mut arrived = arrived.concat();
    arrived.sort_unstable();
    assert_eq!(arrived, (0..600).collect::<Vec<_>>());
}
