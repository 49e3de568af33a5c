//! What is imported and what is not, and how tunnels of several peers and children keep apart.

mod common;
use Direction::{Inbound, Outbound};
use common::*;
use esplane_api::*;
use esplane_control_vici::{importer::*, vici::*, xfrm::*};
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
fn each_unfit_sa_is_named_once_with_what_to_do() {
    let mark = ImportSettings::MARK;
    type Change = fn(&mut XfrmSa);
    let unfit: [(Change, &str); 7] = [
        (|sa| sa.mark = None, "mark_in_sa = yes"),
        (
            |sa| {
                sa.mark = Some(Mark {
                    value: 42,
                    mask: 0xffff_ffff,
                })
            },
            "0x00dead00",
        ),
        (
            |sa| sa.cipher = XfrmCipher::Unsupported("cbc(aes)/hmac(sha256)".into()),
            "cbc(aes)/hmac(sha256)",
        ),
        (
            |sa| sa.cipher = XfrmCipher::Concealed(AeadSuite::Aes128Gcm16),
            "lockdown",
        ),
        (|sa| sa.mode = XfrmMode::Transport, "ipcomp = no"),
        (|sa| sa.mode = XfrmMode::Other(4), "XFRM 4"),
        (
            |sa| {
                sa.encap = Some(XfrmEncap {
                    source_port: 4500,
                    destination_port: 0,
                })
            },
            "port 0",
        ),
    ];
    for (change, hint) in unfit {
        let of = Negotiated::new(1);
        let mut end = started();
        for direction in [Inbound, Outbound] {
            let mut sa = end.sa(&of, direction);
            change(&mut sa);
            end.add_sa(sa.clone());
            end.xfrm(XfrmEvent::Installed(sa));
        }
        assert!(
            end.notices.iter().all(|notice| notice.child.is_none()),
            "whose it is, charon says"
        );
        end.child_up(&of);
        end.child_up(&of);
        end.kernel_snapshot();
        let texts: Vec<String> = (end.notices.iter())
            .filter(|notice| notice.severity() == Severity::Error)
            .map(ToString::to_string)
            .collect();
        assert_eq!(texts.len(), 2, "once for each SA: {texts:#?}");
        for text in &texts {
            assert!(
                text.contains(hint) && text.contains("child `site/net` #1"),
                "{text}"
            );
        }
        assert!(
            end.writer.tunnels().is_empty(),
            "its packets are left to the kernel"
        );
        assert!(end.importer.routes().is_empty());
        assert!(
            !end.told
                .iter()
                .any(|told| matches!(told, XfrmRequest::Store { .. })),
            "not ours to write to"
        );
        let status = &end.importer.children()[0];
        assert!(
            status.tunnel.is_none()
                && status
                    .sas
                    .iter()
                    .all(|sa| !sa.installed && sa.problem.is_some())
        );
        assert!(end.settings.database == Database::Kernel { inert: mark });
    }
}

#[test]
fn unfit_children_are_named() {
    type Change = fn(&mut ChildSa);
    let unfit: [(Change, &str); 4] = [
        (|child| child.mode = "TRANSPORT".into(), "mode = tunnel"),
        (|child| child.mode = "BEET".into(), "beet mode"),
        (|child| child.protocol = "AH".into(), "uses AH"),
        (|child| child.local_ts.clear(), "no traffic selectors"),
    ];
    for (change, hint) in unfit {
        let of = Negotiated::new(1);
        let mut end = started();
        end.add(&of, Inbound);
        end.add(&of, Outbound);
        let mut child = end.child(&of);
        change(&mut child);
        let ike = end.ike(&of, vec![child]);
        end.vici(ViciEvent::ChildUpDown { up: true, ike });
        assert_eq!(
            end.notice_texts().matches(hint).count(),
            2,
            "{}",
            end.notice_texts()
        );
        assert!(end.writer.tunnels().is_empty());
    }
}

#[test]
fn one_unfit_sa_leaves_the_others_alone() {
    let (fit, unfit) = (
        Negotiated::new(1),
        Negotiated {
            reqid: 2,
            child: "old",
            networks: (vec!["10.1.0.0/16"], vec!["10.9.0.0/16"]),
            ..Negotiated::new(2)
        },
    );
    let mut world = World::with(&fit);
    for direction in [Inbound, Outbound] {
        let mut sa = world.west.sa(&unfit, direction);
        sa.cipher = XfrmCipher::Unsupported("cbc(aes)/hmac(sha1)".into());
        world.west.add_sa(sa);
    }
    world.west.child_up(&unfit);
    world.talk();
    assert_eq!(
        world.west.importer.routes(),
        ["10.2.0.0/16".parse().unwrap()]
    );
}

#[test]
fn sas_that_are_not_charons_are_left_alone_and_unmentioned() {
    let mut end = started();
    let mut foreign = end.sa(&Negotiated::new(7), Outbound);
    foreign.mark = None;
    foreign.reqid = 0;
    end.add_sa(foreign);
    end.add(&Negotiated::new(8), Outbound); // marked, and nobody's
    end.child_up(&Negotiated::new(1));
    assert!(
        end.notices
            .iter()
            .all(|notice| notice.severity() == Severity::Info)
    );
    assert!(end.writer.sas().is_empty());
}

#[test]
fn only_what_is_named_is_imported() {
    let settings = ImportSettings {
        only: vec![ImportName {
            connection: "site".into(),
            child: Some("net".into()),
        }],
        ..ImportSettings::default()
    };
    let other = Negotiated {
        child: "lab",
        reqid: 2,
        networks: (vec!["10.1.0.0/16"], vec!["10.7.0.0/16"]),
        ..Negotiated::new(2)
    };
    let mut end = End::with(Side::West, settings);
    end.start();
    end.establish(&Negotiated::new(1));
    end.establish(&other);
    assert_eq!(end.writer.tunnels().len(), 1);
    assert_eq!(end.writer.tunnels()[0].name, "site/net");
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
fn selectors_that_cannot_be_held_to_are_named() {
    let of = Negotiated::new(1);
    let mut end = started();
    end.add(&of, Inbound);
    end.add(&of, Outbound);
    let mut child = end.child(&of);
    let left_out = Names::default()
        .selector("10.1.0.0/16[icmp/8(0)]")
        .unwrap_err();
    child.unsupported_ts.push(left_out);
    let ike = end.ike(&of, vec![child]);
    for _ in 0..2 {
        end.vici(ViciEvent::ChildUpDown {
            up: true,
            ike: ike.clone(),
        });
    }
    let texts = end.notice_texts();
    assert_eq!(
        texts
            .matches("no packets are carried for 10.1.0.0/16[icmp/8(0)]")
            .count(),
        1,
        "{texts}"
    );
    assert!(end.sender().is_some(), "the rest is carried");
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

#[test]
fn half_a_child_is_not_imported() {
    // mark_in_sa = yes was forgotten: the kernel would take what arrives.
    let of = Negotiated::new(1);
    for unfit_first in [true, false] {
        let mut end = started();
        let mut inbound = end.sa(&of, Inbound);
        inbound.mark = None;
        if unfit_first {
            end.add_sa(inbound.clone());
        }
        end.add(&of, Outbound);
        if !unfit_first {
            end.child_up(&of);
            end.add_sa(inbound);
        }
        end.child_up(&of);
        assert!(end.writer.sas().is_empty());
        let texts = end.notice_texts();
        assert_eq!(texts.matches("mark_in_sa = yes").count(), 1, "{texts}");
        assert_eq!(texts.matches("half a tunnel").count(), 1, "{texts}");
    }
}
