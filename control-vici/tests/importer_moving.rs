//! The nonce rule and addresses: MOBIKE, NATs, restarts of Esplane and of charon, gaps.

mod common;
use Direction::{Inbound, Outbound};
use common::*;
use esplane_api::*;
use esplane_control_vici::{importer::*, vici::*, xfrm::*};
use std::{net::SocketAddr, time::Duration};

/// charon's `update_sa`: what it reads of an SA, DELSA, NEWSA with what it has read, both ways in turn.
fn mobike(end: &mut End, of: &Negotiated, new_address: &str, copies_counters: bool) {
    for direction in [Inbound, Outbound] {
        let old = end.sa(of, direction);
        let mut moved = end.sadb.sas[&old.key].clone();
        if !copies_counters {
            (moved.sequence_sent, moved.sequence_received) = (0, 0);
        }
        let age = end.ages.get(&old.key.spi).copied();
        match direction {
            Inbound => moved.key.destination = ip(new_address),
            Outbound => moved.source = ip(new_address),
        }
        end.delete_key(old.key);
        if let Some(age) = age {
            end.ages.insert(old.key.spi, age);
        }
        end.add_sa(moved);
    }
    end.address = ip(new_address);
}

#[test]
fn mobike_keeps_counting_and_loses_nothing() {
    for copies_counters in [true, false] {
        for esn in [true, false] {
            let of = Negotiated {
                esn,
                ..Negotiated::new(1)
            };
            let mut world = World::with(&of);
            for address in ["192.0.2.77", "192.0.2.78", "192.0.2.77", "192.0.2.1"] {
                for _ in 0..5 {
                    world.talk();
                }
                mobike(&mut world.west, &of, address, copies_counters);
                world.west.check();
                world.talk();
                assert!(world.nothing_held());
                let sas = world.west.writer.sas();
                assert!(
                    sas.iter().all(|sa| sa.path.local() == ip(address)),
                    "{sas:?}"
                );
            }
            assert_eq!(world.west.importer.children().len(), 1);
            let asked = &world.west.asked;
            assert!(asked.is_empty(), "nothing is unknown: {asked:?}");
        }
    }
}

#[test]
fn what_arrives_between_delsa_and_newsa_of_a_mobike_is_taken() {
    let of = Negotiated::new(1);
    let mut world = World::with(&of);
    let packet = world.east.seal(&inner(Side::East, 900)).unwrap();
    let old = world.west.sa(&of, Inbound);
    world.west.delete_key(old.key);
    assert_eq!(world.west.open(&packet), Ok(inner(Side::East, 900)));
    assert!(
        world.west.open(&packet).is_err(),
        "the window is the same one"
    );
    // No NEWSA: it was the end after all.
    world.west.later(Duration::from_secs(1));
    let late = world.east.seal(&inner(Side::East, 901)).unwrap();
    assert!(world.west.open(&late).is_err());
}

#[test]
fn a_restart_goes_on_far_behind_what_was_sent_and_takes_nothing_twice() {
    for esn in [true, false] {
        let of = Negotiated {
            esn,
            ..Negotiated::new(1)
        };
        let mut world = World::with(&of);
        for _ in 0..20 {
            world.talk();
        }
        let replayed = world.west.seal(&inner(Side::West, 777)).unwrap();
        assert!(world.east.open(&replayed).is_ok());
        world.east.second(); // what was received is stored
        for _ in 0..3 {
            for side in [Side::West, Side::East] {
                let end = world.end(side);
                let stored = end.sadb.sas[&end.sa(&of, Outbound).key].sequence_sent;
                end.restart(&[&of]);
                let sas = end.writer.sas();
                let sender = sas.iter().find(|sa| sa.id.direction == Outbound).unwrap();
                assert!(sender.active && sender.sequence > stored + (1 << 22));
                assert!(end.asked.is_empty());
            }
            assert!(
                world.east.open(&replayed).is_err(),
                "a replay over a restart"
            );
            for _ in 0..5 {
                world.talk(); // seal() watches that no number comes twice
            }
            assert!(world.nothing_held());
        }
    }
}

#[test]
fn a_restart_right_after_a_mobike_that_lost_a_store_uses_nothing_twice() {
    // charon reads the counter, we store a further reservation and use it, charon puts the older one back; killed.
    let of = Negotiated::new(1);
    let mut world = World::with(&of);
    let key = world.west.sa(&of, Outbound).key;
    let read = world.west.sadb.sas[&key].clone();
    let sas = world.west.writer.sas();
    let sa = sas
        .iter()
        .find(|sa| sa.id.direction == Outbound)
        .unwrap()
        .id;
    world.west.event(SaEvent::SequenceLow { sa, next: 2 });
    assert!(world.west.sadb.sas[&key].sequence_sent > read.sequence_sent);
    world.west.sadb.sas.insert(key, read.clone());
    world.west.restart(&[&of]);
    let sas = world.west.writer.sas();
    let first = sas
        .iter()
        .find(|sa| sa.id.direction == Outbound)
        .unwrap()
        .sequence;
    assert!(
        first > read.sequence_sent + (1 << 26),
        "behind the lost reservation"
    );
    world.talk();
}

#[test]
fn an_sa_of_unknown_past_is_not_used_and_charon_is_asked_to_rekey() {
    let (old, new) = (Negotiated::new(1), Negotiated::new(2));
    let mut world = World::with(&old);
    world.talk();
    // The kernel's copy was reset while nobody looked.
    let key = world.west.sa(&old, Outbound).key;
    world.west.sadb.sas.get_mut(&key).unwrap().sequence_sent = 0;
    world.west.restart(&[&old]);
    assert_eq!(world.west.asked, [ViciRequest::RekeyChild { unique_id: 1 }]);
    assert!(world.west.notice_texts().contains("asking charon to rekey"));
    assert_eq!(world.west.sender(), None);
    assert_eq!(world.west.installed(Inbound).len(), 1, "receiving goes on");
    assert!(world.west.seal(&inner(Side::West, 500)).is_none(), "held");
    // It is asked again, not every second.
    for _ in 0..29 {
        world.west.second();
    }
    assert_eq!(world.west.asked.len(), 1);
    world.west.second();
    world.west.second();
    assert_eq!(world.west.asked.len(), 2);
    // The successor sends at once, though the old one is in the kernel still.
    world.east.add(&new, Inbound);
    world.east.add(&new, Outbound);
    world.west.add(&new, Inbound);
    world.west.add(&new, Outbound);
    world.talk();
    assert!(world.nothing_held());
    world.west.child_rekey(&old, &new);
    world.talk();
    assert!(world.nothing_held());
}

#[test]
fn without_charon_a_rekey_is_asked_for_through_the_kernel() {
    let of = Negotiated::new(1);
    let mut end = End::new(Side::West);
    end.kernel_snapshot();
    end.charon_snapshot(&[&of]);
    end.vici(ViciEvent::Lost);
    let born_before = end.sa(&of, Outbound);
    end.sadb.sas.insert(born_before.key, born_before.clone());
    end.kernel_snapshot();
    assert_eq!(end.asked, []);
    let expected = XfrmRequest::Expire {
        key: born_before.key,
        hard: false,
    };
    assert!(end.told.contains(&expected), "{:?}", end.told);
}

#[test]
fn a_gap_in_the_kernels_messages_is_made_up_for_by_a_full_list() {
    let (old, new) = (Negotiated::new(1), Negotiated::new(2));
    let mut world = World::with(&old);
    // A whole rekey is missed by west.
    world.east.add(&new, Inbound);
    world.east.add(&new, Outbound);
    for direction in [Inbound, Outbound] {
        let (gone, came) = (
            world.west.sa(&old, direction),
            world.west.sa(&new, direction),
        );
        world.west.sadb.sas.remove(&gone.key);
        world.west.sadb.sas.insert(came.key, came);
    }
    world.west.ages.clear();
    world.west.kernel_snapshot();
    world.talk();
    assert!(world.nothing_held());
    assert!(
        world.west.asked.is_empty(),
        "negotiated while we looked on: nobody else has sent with it"
    );
    // The same list again changes nothing.
    let before = format!("{:?}", world.west.writer.sas());
    world.west.kernel_snapshot();
    assert_eq!(format!("{:?}", world.west.writer.sas()), before);
    world.talk();
}

#[test]
fn a_gap_during_a_mobike_resets_nothing() {
    let of = Negotiated::new(1);
    let mut world = World::with(&of);
    world.talk();
    for direction in [Inbound, Outbound] {
        let key = world.west.sa(&of, direction).key;
        let mut moved = world.west.sadb.sas.remove(&key).unwrap();
        match direction {
            Inbound => moved.key.destination = ip("192.0.2.50"),
            Outbound => moved.source = ip("192.0.2.50"),
        }
        moved.sequence_sent = 0;
        world.west.sadb.sas.insert(moved.key, moved);
    }
    world.west.address = ip("192.0.2.50");
    world.west.kernel_snapshot();
    world.talk();
    assert!(world.nothing_held() && world.west.asked.is_empty());
}

#[test]
fn charon_restarts_and_its_orphans_give_way() {
    let (old, new) = (
        Negotiated::new(1),
        Negotiated {
            ike: 1,
            ..Negotiated::new(2)
        },
    );
    let mut world = World::with(&old);
    // Killed: its SAs stay in the kernel, and are carried on.
    world.west.vici(ViciEvent::Lost);
    assert!(world.west.notice_texts().contains("charon is gone"));
    world.talk();
    world.west.charon_snapshot(&[]);
    world.talk();
    assert!(world.nothing_held());
    // It negotiates anew, and counts reqids from 1 again.
    world.east.add(&new, Inbound);
    world.east.add(&new, Outbound);
    world.east.child_up(&new);
    world.west.establish(&new);
    let sender = world.west.sender();
    assert_eq!(
        sender,
        Some(world.west.sa(&new, Outbound).key.spi),
        "the peer may have dropped the old one"
    );
    world.talk();
    assert!(world.nothing_held());
}

#[test]
fn a_charon_that_was_killed_counts_from_one_again_and_is_not_mistaken_for_the_old_one() {
    let old = Negotiated::new(1);
    let new = Negotiated {
        unique_id: 1,
        ..Negotiated::new(2)
    };
    let other = Negotiated {
        unique_id: 2,
        child: "lab",
        networks: (vec!["10.1.0.0/16"], vec!["10.7.0.0/16"]),
        ..Negotiated::new(3) // with the reqid that `net` had
    };
    for found_empty in [true, false] {
        let mut world = World::with(&old);
        world.west.vici(ViciEvent::Lost);
        if found_empty {
            world.west.charon_snapshot(&[]);
        }
        for direction in [Inbound, Outbound] {
            world.west.add(&other, direction);
            world.west.add(&new, direction);
            world.east.add(&new, direction);
        }
        let (new, other) = (&new, &other);
        world.east.child_up(new);
        if found_empty {
            world.west.child_up(new);
            world.west.child_up(other);
        } else {
            world.west.charon_snapshot(&[new, other]);
        }
        // East was restarted too: it has nothing of the old ones.
        world.east.delete(&old, Inbound);
        world.east.delete(&old, Outbound);
        world.east.later(Duration::from_secs(1));
        world.talk();
        assert!(world.nothing_held());
        let children = world.west.importer.children();
        let names: Vec<&str> = children.iter().map(|child| child.name.as_str()).collect();
        assert_eq!(names, ["site/lab", "site/net"]);
        let sas_of = |at: usize| -> Vec<Option<u32>> {
            children[at].sas.iter().map(|sa| sa.unique_id).collect()
        };
        assert_eq!(sas_of(0), [Some(2), Some(2)]);
        assert!(world.west.asked.is_empty());
    }
}

#[test]
fn charon_stops_in_order_and_everything_goes() {
    let of = Negotiated::new(1);
    let mut world = World::with(&of);
    assert_eq!(
        world.west.importer.routes(),
        ["10.2.0.0/16".parse().unwrap()]
    );
    world.west.delete(&of, Inbound);
    world.west.delete(&of, Outbound);
    world.west.vici(ViciEvent::Lost);
    world.west.later(Duration::from_secs(1));
    assert!(world.west.writer.tunnels().is_empty());
    assert!(world.west.importer.routes().is_empty());
    assert!(world.west.importer.children().is_empty());
}

#[test]
fn flushed_means_all_are_gone() {
    let of = Negotiated::new(1);
    let mut world = World::with(&of);
    world.west.sadb.sas.clear();
    world.west.ages.clear();
    world.west.xfrm(XfrmEvent::Flushed);
    world.west.child_down(&of);
    world.west.later(Duration::from_secs(1));
    assert!(world.west.writer.sas().is_empty());
    assert!(world.west.writer.tunnels().is_empty());
}

#[test]
fn a_peers_nat_rebinds_and_is_followed_until_charon_knows_better() {
    let old = Negotiated {
        udp: true,
        ..Negotiated::new(1)
    };
    let new = Negotiated {
        udp: true,
        ..Negotiated::new(2)
    };
    let mut world = World::with(&old);
    let tunnel = world.west.writer.tunnels()[0].id;
    let seen: SocketAddr = "192.0.2.2:61000".parse().unwrap();
    world.west.event(SaEvent::EndpointMoved {
        tunnel,
        remote: seen,
    });
    assert!(
        world
            .west
            .notice_texts()
            .contains("come from 192.0.2.2:61000")
    );
    let remotes = |end: &End| -> Vec<SocketAddr> {
        let sas = end.writer.sas().into_iter();
        sas.filter(|sa| sa.id.direction == Outbound)
            .map(|sa| sa.path.remote_socket())
            .collect()
    };
    assert_eq!(remotes(&world.west), [seen]);
    // A successor, of which charon says the old port, goes there too.
    world.west.add(&new, Inbound);
    world.west.add(&new, Outbound);
    assert_eq!(remotes(&world.west), [seen, seen]);
    // Then charon moves an SA itself.
    let key = world.west.sa(&new, Outbound).key;
    let mut moved = world.west.sadb.sas[&key].clone();
    moved.encap = Some(XfrmEncap {
        source_port: 4500,
        destination_port: 62000,
    });
    world.west.delete_key(key);
    world.west.add_sa(moved);
    assert_eq!(remotes(&world.west)[1], "192.0.2.2:62000".parse().unwrap());
    // The same event again is no news.
    let notices = world.west.notices.len();
    world.west.event(SaEvent::EndpointMoved {
        tunnel,
        remote: seen,
    });
    assert_eq!(world.west.notices.len(), notices);
}

#[test]
fn behind_a_nat_ourselves_or_without_one_nobody_is_followed() {
    for (udp, nat_local, roams) in [
        (true, false, true),
        (true, true, false),
        (false, false, false),
    ] {
        let of = Negotiated {
            udp,
            ..Negotiated::new(1)
        };
        let mut end = End::new(Side::West);
        end.start();
        end.add(&of, Inbound);
        end.add(&of, Outbound);
        let mut ike = end.ike(&of, vec![end.child(&of)]);
        ike.nat_local = nat_local;
        end.vici(ViciEvent::ChildUpDown { up: true, ike });
        let tables = end.writer.tables();
        drop(tables);
        assert_eq!(end.last_defined().roaming, roams);
    }
}

#[test]
fn in_mode_b_charon_hears_of_a_nat_from_us() {
    let settings = ImportSettings {
        database: Database::Esplane,
        ..ImportSettings::default()
    };
    let of = Negotiated {
        udp: true,
        ..Negotiated::new(1)
    };
    let mut end = End::with(Side::West, settings);
    end.start();
    // Without marks: all SAs are ours.
    for direction in [Inbound, Outbound] {
        let mut sa = end.sa(&of, direction);
        (sa.mark, sa.key.mark) = (None, (0, 0));
        end.add_sa(sa);
    }
    end.child_up(&of);
    assert!(end.sender().is_some());
    let tunnel = end.writer.tunnels()[0].id;
    let remote = "192.0.2.2:61000".parse().unwrap();
    end.event(SaEvent::EndpointMoved { tunnel, remote });
    let told = end.told.iter().any(|request| {
        matches!(request, XfrmRequest::PeerMoved { key, remote: to } if key.destination == end.address && *to == remote)
    });
    assert!(told, "{:?}", end.told);
}
