//! How tunnels of several peers and children keep apart.

mod common;
use Direction::{Inbound, Outbound};
use common::*;
use esplane_api::*;
use esplane_control_vici::{vici::*, xfrm::*};
use std::time::Duration;

fn started() -> End {
    let mut end = End::new(Side::West);
    end.start();
    end
}

/// Another peer's SA or child: other addresses and identity, other SPIs.
fn of_peer(end: &End, of: &Negotiated, peer: u8) -> (XfrmSa, XfrmSa, IkeSa) {
    let address = ip(&format!("198.51.100.{peer}"));
    let (mut inbound, mut outbound) = (end.sa(of, Inbound), end.sa(of, Outbound));
    inbound.source = address;
    outbound.key.destination = address;
    let mut ike = end.ike(of, vec![end.child(of)]);
    ike.remote.as_mut().unwrap().set_ip(address);
    ike.remote_id = format!("peer{peer}");
    ike.unique_id = u32::from(peer);
    (inbound, outbound, ike)
}

fn bring_up(end: &mut End, of: &Negotiated, peer: u8) {
    let (inbound, outbound, ike) = of_peer(end, of, peer);
    end.add_sa(inbound);
    end.add_sa(outbound);
    end.vici(ViciEvent::ChildUpDown { up: true, ike });
}

/// Where a packet would be sent.
fn destination(end: &mut End, packet: &[u8]) -> std::net::IpAddr {
    let sealed = end.seal(packet).unwrap();
    std::net::IpAddr::from(<[u8; 4]>::try_from(&sealed[16..20]).unwrap())
}

#[test]
fn larval_sas_wait_and_then_are_ours_to_receive_with() {
    let of = Negotiated::new(1);
    let mut end = started();
    let mut larval = end.sa(&of, Inbound);
    larval.cipher = XfrmCipher::Larval;
    larval.mark = None;
    end.xfrm(XfrmEvent::Snapshot(vec![larval.clone()]));
    end.xfrm(XfrmEvent::Installed(larval));
    assert!(end.writer.sas().is_empty() && end.notice_texts().matches("imported").count() == 0);
    end.establish(&of);
    assert_eq!(end.installed(Inbound).len(), 1);
    assert!(end.sender().is_some());
}

#[test]
fn duplicate_and_late_events_change_nothing() {
    let of = Negotiated::new(1);
    let mut world = World::with(&of);
    let before = format!("{:?}", world.west.writer.sas());
    for direction in [Inbound, Outbound] {
        let sa = world.west.sadb.sas[&world.west.sa(&of, direction).key].clone();
        world.west.xfrm(XfrmEvent::Installed(sa));
    }
    world.west.child_up(&of);
    world.west.charon_snapshot(&[&of]);
    let never = world.west.sa(&Negotiated::new(99), Inbound).key;
    world.west.xfrm(XfrmEvent::Removed(never));
    world.west.xfrm(XfrmEvent::Expired {
        key: never,
        hard: true,
    });
    world.west.xfrm(XfrmEvent::Reply(XfrmReply {
        key: never,
        done: true,
        sequence_sent: Some(5),
    }));
    world.west.child_down(&Negotiated::new(99));
    assert_eq!(format!("{:?}", world.west.writer.sas()), before);
    world.talk();
}

#[test]
fn an_spi_that_is_used_again_has_its_new_key() {
    let of = Negotiated::new(1);
    let mut end = started();
    end.establish(&of);
    for direction in [Inbound, Outbound] {
        let mut again = end.sa(&of, direction);
        let seed = 0x77 + direction as u8;
        again.cipher =
            XfrmCipher::Aead(KeyMaterial::new(AeadSuite::Aes256Gcm16, &[seed; 36]).unwrap());
        end.sadb.sas.insert(again.key, again.clone());
        end.xfrm(XfrmEvent::Installed(again)); // its DELSA was lost
    }
    let sas = end.writer.sas();
    assert_eq!(sas.len(), 2);
    assert!(
        sas.iter().all(|sa| sa.suite == AeadSuite::Aes256Gcm16),
        "{sas:?}"
    );
}

#[test]
fn make_before_break_reauthentication_loses_nothing() {
    let old = Negotiated::new(1);
    let new = Negotiated {
        ike: 2,
        ..Negotiated::new(2)
    };
    let mut world = World::with(&old);
    for side in [Side::West, Side::East] {
        world.end(side).add(&new, Inbound);
        world.talk();
    }
    for side in [Side::East, Side::West] {
        world.end(side).add(&new, Outbound);
        world.talk();
        world.end(side).child_up(&new);
        world.end(side).check_oldest_sends();
    }
    for side in [Side::East, Side::West] {
        world.end(side).child_down(&old);
        world.talk();
        world.end(side).delete(&old, Outbound);
        world.talk();
    }
    for side in [Side::East, Side::West] {
        world.end(side).delete(&old, Inbound);
        world.talk();
        assert_eq!(
            world.end(side).importer.children().len(),
            1,
            "one tunnel all the time"
        );
    }
    assert!(world.nothing_held());
}

#[test]
fn two_children_with_the_same_selectors_share_a_tunnel_and_the_oldest_sends() {
    // Both ends initiated at the same time: two CHILD_SAs of one name, one reqid.
    let (first, second) = (Negotiated::new(1), Negotiated::new(2));
    let mut world = World::with(&first);
    for side in [Side::West, Side::East] {
        world.end(side).establish(&second);
    }
    for side in [Side::West, Side::East] {
        world.end(side).check_oldest_sends();
        assert_eq!(world.end(side).writer.tunnels().len(), 1);
    }
    world.talk();
    for side in [Side::West, Side::East] {
        for direction in [Outbound, Inbound] {
            world.end(side).delete(&first, direction);
        }
        world.end(side).child_down(&first);
    }
    world.talk();
    assert!(world.nothing_held());
}

#[test]
fn peers_that_share_a_reqid_have_tunnels_of_their_own_and_the_newest_gets_the_packets() {
    let (first, second) = (Negotiated::new(1), Negotiated::new(2));
    let mut end = started();
    bring_up(&mut end, &first, 1);
    assert_eq!(
        destination(&mut end, &inner(Side::West, 1)),
        ip("198.51.100.1")
    );
    bring_up(&mut end, &second, 2);
    assert_eq!(end.writer.tunnels().len(), 2);
    assert_eq!(
        destination(&mut end, &inner(Side::West, 2)),
        ip("198.51.100.2"),
        "as on Linux"
    );
    let names: Vec<String> = end
        .importer
        .children()
        .into_iter()
        .map(|child| child.name)
        .collect();
    assert_eq!(names, ["site/net", "site/net#2"]);
    // A rekey of the first stays with the first, before charon tells.
    let (inbound, outbound, _) = of_peer(&end, &Negotiated::new(3), 1);
    end.add_sa(inbound);
    end.add_sa(outbound);
    let tunnels: Vec<TunnelId> = (end.writer.sas().iter())
        .filter(|sa| sa.path.remote() == ip("198.51.100.1"))
        .map(|sa| sa.id.tunnel)
        .collect();
    assert_eq!(tunnels.len(), 4);
    assert!(tunnels.windows(2).all(|two| two[0] == two[1]));
    // The second goes: the first gets the packets again.
    let (inbound, outbound, ike) = of_peer(&end, &second, 2);
    end.delete_key(inbound.key);
    end.delete_key(outbound.key);
    end.vici(ViciEvent::ChildUpDown { up: false, ike });
    end.later(Duration::from_secs(1));
    assert_eq!(
        end.writer.tunnels().len(),
        1,
        "{:#?}",
        end.importer.children()
    );
    assert_eq!(
        destination(&mut end, &inner(Side::West, 3)),
        ip("198.51.100.1")
    );
}

#[test]
fn road_warriors_come_and_go() {
    let mut end = started();
    let addresses: Vec<String> = (0..40)
        .map(|number| format!("10.3.0.{}/32", number + 1))
        .collect();
    let leaked: Vec<&'static str> = addresses.into_iter().map(|text| &*text.leak()).collect();
    let warriors: Vec<Negotiated> = (0..40)
        .map(|number| Negotiated {
            reqid: 10 + number,
            ike: 10 + number,
            connection: "rw",
            networks: (vec!["0.0.0.0/0"], vec![leaked[number as usize]]),
            ..Negotiated::new(10 + number)
        })
        .collect();
    for (number, warrior) in warriors.iter().enumerate() {
        bring_up(&mut end, warrior, number as u8 + 1);
    }
    assert_eq!(end.importer.routes().len(), 40);
    let names: std::collections::BTreeSet<String> = end
        .importer
        .children()
        .into_iter()
        .map(|child| child.name)
        .collect();
    assert_eq!(names.len(), 40, "no two have one name");
    let packet = udp([192, 0, 2, 99], [10, 3, 0, 17], 53, b"answer");
    assert_eq!(destination(&mut end, &packet), ip("198.51.100.17"));
    for (number, warrior) in warriors.iter().enumerate() {
        let (inbound, outbound, ike) = of_peer(&end, warrior, number as u8 + 1);
        end.vici(ViciEvent::ChildUpDown {
            up: false,
            ike: ike.clone(),
        });
        end.vici(ViciEvent::IkeUpDown { up: false, ike });
        end.delete_key(inbound.key);
        end.delete_key(outbound.key);
    }
    assert!(end.writer.tunnels().is_empty() && end.importer.routes().is_empty());
}

#[test]
fn outbound_spis_that_two_peers_chose_alike_are_told_apart() {
    let (first, second) = (
        Negotiated::new(1),
        Negotiated {
            reqid: 2,
            child: "lab",
            networks: (vec!["10.1.0.0/16"], vec!["10.7.0.0/16"]),
            ..Negotiated::new(2)
        },
    );
    let mut end = started();
    bring_up(&mut end, &first, 1);
    let spi = end.sa(&first, Outbound).key.spi;
    let (inbound, mut outbound, mut ike) = of_peer(&end, &second, 2);
    outbound.key.spi = spi;
    ike.children[0].spi_out = Some(spi);
    end.add_sa(inbound);
    end.add_sa(outbound);
    end.vici(ViciEvent::ChildUpDown { up: true, ike });
    let lab = udp([10, 1, 0, 1], [10, 7, 0, 1], 53, b"?");
    assert_eq!(destination(&mut end, &lab), ip("198.51.100.2"));
    assert_eq!(
        destination(&mut end, &inner(Side::West, 1)),
        ip("198.51.100.1")
    );
}

#[test]
fn traffic_selectors_become_policies_and_routes() {
    let of = Negotiated {
        networks: (
            vec!["10.1.0.0/16", "10.4.0.0/24[tcp]", "2001:db8:1::/48"],
            vec![
                "10.2.0.5-10.2.0.6",
                "10.8.0.0/16[tcp/443-444]",
                "2001:db8:2::/48",
            ],
        ),
        ..Negotiated::new(1)
    };
    let mut end = started();
    end.establish(&of);
    let policies = &end.writer.tunnels()[0].policies;
    assert_eq!(policies.len(), 2 * 2 + 1, "every pair of one family");
    let routes: Vec<String> = end
        .importer
        .routes()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        routes,
        [
            "10.2.0.5/32",
            "10.2.0.6/32",
            "10.8.0.0/16",
            "2001:db8:2::/48"
        ]
    );
    let verdict = |end: &mut End, destination, port| {
        let sent = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            end.seal(&udp([10, 1, 0, 1], destination, port, b"x"))
        }));
        sent.is_ok()
    };
    assert!(verdict(&mut end, [10, 2, 0, 5], 53));
    assert!(!verdict(&mut end, [10, 2, 0, 7], 53), "outside the range");
    assert!(!verdict(&mut end, [10, 8, 0, 7], 443), "UDP, not TCP");
}

#[test]
fn a_rekey_that_narrows_changes_policies_when_it_sends_and_what_is_taken_at_once() {
    let old = Negotiated::new(1);
    let new = Negotiated {
        networks: (vec!["10.1.0.0/16"], vec!["10.2.0.0/24"]),
        ..Negotiated::new(2)
    };
    let mut world = World::with(&old);
    for side in [Side::West, Side::East] {
        world.end(side).add(&new, Inbound);
    }
    for side in [Side::West, Side::East] {
        world.end(side).add(&new, Outbound);
        world.end(side).child_rekey(&old, &new);
        world.talk();
    }
    assert_eq!(
        world.west.importer.routes(),
        ["10.2.0.0/16".parse().unwrap()]
    );
    for side in [Side::West, Side::East] {
        world.end(side).delete(&old, Outbound);
        world.talk();
    }
    assert_eq!(
        world.west.importer.routes(),
        ["10.2.0.0/24".parse().unwrap()]
    );
    assert!(world.nothing_held());
}

#[test]
fn a_peer_that_restarted_is_answered_with_its_new_sas_before_the_old_ones_go() {
    // East lost everything and came back; west's charon has not noticed (no INITIAL_CONTACT) and keeps the old SAs.
    let old = Negotiated::new(1);
    let new = Negotiated {
        ike: 2,
        ..Negotiated::new(2)
    };
    let mut world = World::with(&old);
    world.east = End::new(Side::East);
    world.east.start();
    world.west.establish(&new);
    world.east.establish(&new);
    world.west.check_oldest_sends();
    let hello = world.east.seal(&inner(Side::East, 100)).unwrap();
    assert!(world.west.open(&hello).is_ok());
    let events: Vec<SaEvent> = world.west.report.events().to_vec();
    assert!(
        events
            .iter()
            .any(|event| matches!(event, SaEvent::FirstReceived { .. })),
        "{events:?}"
    );
    for event in events {
        world.west.event(event);
    }
    world.talk();
    assert!(world.nothing_held());
}

#[test]
fn a_rekey_within_one_ike_sa_is_not_hurried_by_the_peers_first_packet() {
    let (old, new) = (Negotiated::new(1), Negotiated::new(2));
    let mut world = World::with(&old);
    for direction in [Inbound, Outbound] {
        world.west.add(&new, direction);
    }
    world.west.child_rekey(&old, &new);
    let sas = world.west.writer.sas();
    let spi = world.west.sa(&new, Inbound).key.spi;
    let sa = sas.iter().find(|sa| sa.id.spi == spi).unwrap().id;
    world.west.event(SaEvent::FirstReceived { sa });
    world.west.check_oldest_sends();
}
