//! What goes in at west comes out at east, byte by byte, in every combination of families, suites,
//! number widths, encapsulations and ways to hand over outer headers.

mod common;
use common::*;
use esplane_api::*;
use esplane_dataplane::*;

fn every_scene() -> Vec<Scene> {
    let mut scenes = Vec::new();
    for suite in AeadSuite::ALL {
        for esn in [Esn::On, Esn::Off] {
            for outer_v6 in [false, true] {
                for udp in [false, true] {
                    for headers in [OuterHeaders::ByKernel, OuterHeaders::Written] {
                        scenes.push(Scene {
                            suite,
                            esn,
                            outer_v6,
                            udp,
                            headers,
                            ..Scene::default()
                        });
                    }
                }
            }
        }
    }
    scenes
}

#[test]
fn every_combination_carries_both_families() {
    for scene in every_scene() {
        let (mut west, mut east) = scene.build();
        let packets: Vec<_> = [false, true]
            .into_iter()
            .flat_map(|v6| [0, 1, 2, 3, 100, 1372].map(|size| inner(v6, size)))
            .collect();
        let sent = west.send(&packets);
        assert!(
            sent.iter()
                .all(|(verdict, ..)| *verdict == Verdict::Forward),
            "{scene:?}"
        );
        let outer = match scene.headers {
            OuterHeaders::ByKernel => scene.outer_at_east(),
            OuterHeaders::Written => Outer::NONE,
        };
        let received = east.receive(sent.iter().map(|(_, data, _)| (data.as_slice(), outer)));
        for (packet, (verdict, data, outer)) in packets.iter().zip(received) {
            assert_eq!((verdict, &data), (Verdict::Forward, packet), "{scene:?}");
            assert_eq!(outer, scene.outer_at_east(), "{scene:?}");
        }
        let (sent, got) = (
            west.status(Direction::Outbound),
            east.status(Direction::Inbound),
        );
        assert_eq!((sent.statistics.packets, sent.sequence), (12, 12));
        assert_eq!(sent.statistics, got.statistics);
    }
}

#[test]
fn every_size_arrives_as_it_was() {
    for scene in [
        Scene::default(),
        Scene {
            suite: AeadSuite::ChaCha20Poly1305,
            udp: true,
            outer_v6: true,
            ..Scene::default()
        },
    ] {
        let (mut west, mut east) = scene.build();
        for sizes in (0..1600usize).collect::<Vec<_>>().chunks(100) {
            let packets: Vec<_> = sizes.iter().map(|size| inner(false, *size)).collect();
            let sent = west.send(&packets);
            let received = east.receive(
                sent.iter()
                    .map(|(_, data, _)| (data.as_slice(), Outer::NONE)),
            );
            for (packet, (verdict, data, _)) in packets.iter().zip(received) {
                assert_eq!((verdict, &data), (Verdict::Forward, packet));
            }
        }
    }
}
