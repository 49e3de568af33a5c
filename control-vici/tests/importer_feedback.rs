//! What goes back: counters, limits, sequence numbers, packets that ask for a tunnel; and refusals.

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

fn expirations(end: &End) -> Vec<(Spi, bool)> {
    let told = end.told.iter();
    told.filter_map(|request| match request {
        XfrmRequest::Expire { key, hard } => Some((key.spi, *hard)),
        _ => None,
    })
    .collect()
}

#[test]
fn what_was_carried_stands_in_the_kernel() {
    let of = Negotiated::new(1);
    let mut world = World::with(&of);
    for _ in 0..10 {
        world.talk();
    }
    for side in [Side::West, Side::East] {
        let end = world.end(side);
        end.second();
        for direction in [Inbound, Outbound] {
            let sa = &end.sadb.sas[&end.sa(&of, direction).key];
            assert_eq!(
                (sa.packets, sa.bytes),
                (11, 11 * 32),
                "{side:?} {direction}"
            );
        }
        let inbound = &end.sadb.sas[&end.sa(&of, Inbound).key];
        assert_eq!(inbound.sequence_received, 11);
        let stores = end.told.len();
        end.second();
        assert_eq!(end.told.len(), stores, "nothing new, nothing stored");
        // A restart, and a MOBIKE's new installation, count on.
        end.restart(&[&of]);
    }
    world.talk();
    world.west.second();
    let sa = &world.west.sadb.sas[&world.west.sa(&of, Outbound).key];
    assert_eq!((sa.packets, sa.bytes), (12, 12 * 32));
}

#[test]
fn a_moved_sa_counts_on() {
    let of = Negotiated::new(1);
    let mut world = World::with(&of);
    world.talk();
    world.west.second();
    let key = world.west.sa(&of, Outbound).key;
    let mut moved = world.west.sadb.sas[&key].clone();
    moved.source = ip("192.0.2.9");
    world.west.delete_key(key);
    world.west.add_sa(moved);
    world.talk();
    world.west.second();
    assert_eq!(world.west.sadb.sas[&key].packets, 3);
}

#[test]
fn limits_in_bytes_and_packets_reach_charon_as_the_kernel_would_tell_them() {
    let of = Negotiated::new(1);
    let mut world = World::new();
    for side in [Side::West, Side::East] {
        let end = world.end(side);
        end.start();
        end.add(&of, Inbound);
        let mut sa = end.sa(&of, Outbound);
        sa.soft.packets = Some(3);
        sa.hard.packets = Some(6);
        sa.soft.seconds = Some(1); // the kernel's own timer sees to those
        end.add_sa(sa);
        end.child_up(&of);
    }
    for _ in 0..4 {
        world.talk();
    }
    let spi = world.west.sa(&of, Outbound).key.spi;
    let events: Vec<SaEvent> = world.west.report.events().to_vec();
    for event in events.iter().chain(&events) {
        world.west.event(*event);
    }
    world.west.second();
    assert_eq!(expirations(&world.west), [(spi, false)], "once");
    // A restart does not begin to count anew.
    world.west.restart(&[&of]);
    world.west.report.clear();
    world.talk();
    let events: Vec<SaEvent> = world.west.report.events().to_vec();
    for event in events {
        world.west.event(event);
    }
    assert_eq!(
        expirations(&world.west).len(),
        2,
        "told again after a restart"
    );
    for _ in 0..2 {
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.talk()));
    }
    let events: Vec<SaEvent> = world.west.report.events().to_vec();
    for event in events {
        world.west.event(event);
    }
    assert_eq!(expirations(&world.west).last(), Some(&(spi, true)));
}

#[test]
fn a_hard_expire_of_the_kernel_is_the_end_of_an_sa() {
    let of = Negotiated::new(1);
    let mut world = World::with(&of);
    let key = world.west.sa(&of, Outbound).key;
    world.west.xfrm(XfrmEvent::Expired { key, hard: false });
    assert!(world.west.sender().is_some());
    world.west.sadb.sas.remove(&key);
    world.west.xfrm(XfrmEvent::Expired { key, hard: true });
    assert_eq!(world.west.sender(), None);
}

#[test]
fn numbers_are_extended_before_they_run_out() {
    let of = Negotiated {
        esn: false,
        ..Negotiated::new(1)
    };
    let mut world = World::with(&of);
    let key = world.west.sa(&of, Outbound).key;
    let sas = world.west.writer.sas();
    let id = sas
        .iter()
        .find(|sa| sa.id.direction == Outbound)
        .unwrap()
        .id;
    let mut stored = world.west.sadb.sas[&key].sequence_sent;
    for _ in 0..20 {
        world.west.event(SaEvent::SequenceLow {
            sa: id,
            next: stored / 2,
        });
        let now = world.west.sadb.sas[&key].sequence_sent;
        assert_eq!(now, stored + (1 << 22));
        stored = now;
        world.talk();
    }
    // Two events before the kernel's answer are one request.
    world.west.slow_kernel = true;
    let told = world.west.told.len();
    world.west.event(SaEvent::SequenceLow { sa: id, next: 1 });
    world.west.event(SaEvent::SequenceLow { sa: id, next: 1 });
    assert_eq!(world.west.told.len(), told + 1);
    // The answer is lost: it is asked again.
    world.west.replies.clear();
    world.west.later(Duration::from_secs(3));
    assert_eq!(world.west.told.len(), told + 2);
    world.west.answer_one();
    world.talk();
}

#[test]
fn a_connection_to_the_kernel_that_fails_with_an_answer_under_way_costs_time_and_nothing_else() {
    for stored in [true, false] {
        let of = Negotiated::new(1);
        let mut world = World::new();
        world.east.start();
        world.east.establish(&of);
        let west = &mut world.west;
        west.start();
        west.slow_kernel = true;
        west.establish(&of);
        assert_eq!((west.sender(), west.replies.len()), (None, 1));
        // The request may have reached the kernel or not; the answer never comes. Then everything is told anew.
        west.replies.clear();
        let key = west.sa(&of, Outbound).key;
        if !stored {
            west.sadb.sas.get_mut(&key).unwrap().sequence_sent = 0;
        }
        west.slow_kernel = false;
        west.kernel_snapshot();
        west.later(Duration::from_secs(3));
        assert_eq!(west.sender(), Some(key.spi));
        let used_until = west.sadb.sas[&key].sequence_sent;
        world.talk();
        // The same while further numbers are asked for.
        let west = &mut world.west;
        west.slow_kernel = true;
        let sa = west.writer.sas().iter().find(|sa| sa.active).unwrap().id;
        west.event(SaEvent::SequenceLow { sa, next: 1 });
        west.replies.clear();
        if !stored {
            west.sadb.sas.get_mut(&key).unwrap().sequence_sent = used_until;
        }
        west.slow_kernel = false;
        west.kernel_snapshot();
        west.later(Duration::from_secs(3));
        assert!(west.sadb.sas[&key].sequence_sent > used_until);
        world.talk();
        assert!(world.nothing_held());
    }
}

#[test]
fn an_sa_whose_numbers_come_to_an_end_asks_for_a_successor_in_time() {
    let of = Negotiated {
        esn: false,
        ..Negotiated::new(1)
    };
    let mut end = started();
    end.add(&of, Inbound);
    let mut sa = end.sa(&of, Outbound);
    sa.sequence_sent = u64::from(u32::MAX) - (5 << 22);
    end.add_sa(sa.clone());
    end.child_up(&of);
    let id = end
        .writer
        .sas()
        .iter()
        .find(|sa| sa.id.direction == Outbound)
        .unwrap()
        .id;
    end.event(SaEvent::SequenceLow {
        sa: id,
        next: u64::from(u32::MAX) - 100,
    });
    assert_eq!(expirations(&end), [(sa.key.spi, false)]);
    end.event(SaEvent::SequenceExhausted { sa: id });
    assert_eq!(expirations(&end)[1..], [(sa.key.spi, true)]);
    // Started again with nothing left: not installed, and charon is asked.
    end.restart(&[&of]);
    assert_eq!(end.sender(), None);
    assert_eq!(end.asked, [ViciRequest::RekeyChild { unique_id: 1 }]);
    assert!(
        !end.notice_texts().contains("nothing tells"),
        "they are known: used up"
    );
}

#[test]
fn a_kernel_that_does_not_store_is_named_and_asked_again() {
    let of = Negotiated::new(1);
    let mut end = started();
    end.sadb.broken = true;
    end.establish(&of);
    assert_eq!(end.sender(), None, "never without the kernel's word");
    end.later(Duration::from_secs(10));
    let texts = end.notice_texts();
    assert_eq!(texts.matches("did not store").count(), 1, "{texts}");
    end.sadb.broken = false;
    end.later(Duration::from_secs(3));
    assert!(end.sender().is_some());
}

// ---- on demand

fn trap(of: &Negotiated) -> Trap {
    Trap {
        ike: of.connection.into(),
        child: of.child.into(),
        mode: "TUNNEL".into(),
        local_ts: vec![of.networks.0[0].parse().unwrap()],
        remote_ts: vec![of.networks.1[0].parse().unwrap()],
    }
}

#[test]
fn packets_ask_for_a_tunnel_and_wait_for_it() {
    let of = Negotiated::new(1);
    let mut world = World::new();
    world.west.start();
    world.east.start();
    world.west.vici(ViciEvent::Traps(vec![trap(&of)]));
    assert_eq!(
        world.west.importer.routes(),
        ["10.2.0.0/16".parse().unwrap()]
    );
    assert!(world.west.importer.children()[0].on_demand);
    assert!(world.west.seal(&inner(Side::West, 100)).is_none());
    let events: Vec<SaEvent> = world.west.report.events().to_vec();
    assert!(
        matches!(events[..], [SaEvent::SaNeeded { .. }]),
        "{events:?}"
    );
    for event in events.iter().chain(&events).chain(&events) {
        world.west.event(*event);
    }
    let initiate = ViciRequest::Initiate {
        ike: "site".into(),
        child: "net".into(),
    };
    assert_eq!(world.west.asked, [initiate], "once while charon is at it");
    // No answer from the peer; the next packet asks again, not at once.
    let ended = |done| ViciEvent::InitiateEnded {
        ike: "site".into(),
        child: "net".into(),
        done,
    };
    world.west.vici(ended(false));
    assert!(world.west.notice_texts().contains("could not negotiate"));
    world.west.event(events[0]);
    assert_eq!(world.west.asked.len(), 1);
    world.west.later(Duration::from_secs(6));
    world.west.event(events[0]);
    assert_eq!(world.west.asked.len(), 2);
    // It comes up: what waited goes.
    world.east.establish(&of);
    world.west.establish(&of);
    world.west.vici(ended(true));
    world.talk();
    assert!(world.nothing_held());
    // It goes: the trap and its route stay, nothing leaves in clear.
    for direction in [Inbound, Outbound] {
        world.west.delete(&of, direction);
    }
    world.west.child_down(&of);
    world.west.later(Duration::from_secs(10));
    assert_eq!(world.west.writer.tunnels().len(), 1);
    assert_eq!(world.west.importer.routes().len(), 1);
    world.west.report.clear();
    assert!(world.west.seal(&inner(Side::West, 101)).is_none());
    let events: Vec<SaEvent> = world.west.report.events().to_vec();
    world.west.event(events[0]);
    assert_eq!(world.west.asked.len(), 3);
    // It is taken out of the configuration.
    world.west.vici(ViciEvent::Traps(Vec::new()));
    assert!(world.west.writer.tunnels().is_empty() && world.west.importer.routes().is_empty());
}

#[test]
fn a_trap_that_changes_its_networks_is_followed_and_one_that_is_not_ours_is_not() {
    let of = Negotiated::new(1);
    let mut end = started();
    end.vici(ViciEvent::Traps(vec![trap(&of)]));
    let mut changed = trap(&of);
    changed.remote_ts = vec!["10.2.0.0/24".parse().unwrap()];
    let mut transport = trap(&of);
    (transport.child, transport.mode) = ("host".into(), "TRANSPORT".into());
    end.vici(ViciEvent::Traps(vec![changed, transport]));
    assert_eq!(end.importer.routes(), ["10.2.0.0/24".parse().unwrap()]);
    assert_eq!(end.writer.tunnels().len(), 1);
}

#[test]
fn without_charon_packets_ask_nobody_and_later_again() {
    let of = Negotiated::new(1);
    let mut end = started();
    end.vici(ViciEvent::Traps(vec![trap(&of)]));
    end.vici(ViciEvent::Lost);
    let tunnel = end.writer.tunnels()[0].id;
    end.event(SaEvent::SaNeeded { tunnel });
    assert!(end.asked.is_empty());
    end.charon_snapshot(&[]);
    end.event(SaEvent::SaNeeded { tunnel });
    assert_eq!(end.asked.len(), 1);
}

#[test]
fn events_of_others_tunnels_are_ignored() {
    let mut end = started();
    let sa = SaId {
        tunnel: TunnelId(7),
        direction: Outbound,
        spi: Spi::new(0x1000).unwrap(),
    };
    for event in [
        SaEvent::SaNeeded { tunnel: sa.tunnel },
        SaEvent::SequenceLow { sa, next: 9 },
        SaEvent::SequenceExhausted { sa },
        SaEvent::SoftExpired {
            sa,
            unit: LifetimeUnit::Bytes,
        },
        SaEvent::FirstReceived { sa },
        SaEvent::EndpointMoved {
            tunnel: sa.tunnel,
            remote: "192.0.2.9:4500".parse().unwrap(),
        },
    ] {
        end.event(event);
    }
    assert!(end.told.is_empty() && end.asked.is_empty());
}

// ---- refusals

#[test]
fn what_is_refused_is_said_and_the_rest_goes_on() {
    let first = Negotiated::new(1);
    let second = Negotiated {
        reqid: 2,
        child: "lab",
        networks: (vec!["10.1.0.0/16"], vec!["10.7.0.0/16"]),
        ..Negotiated::new(2)
    };
    let mut end = started();
    for of in [&first, &second] {
        end.add(of, Inbound);
        end.add(of, Outbound);
    }
    // Both at once; the list is refused, then one of the two alone.
    (end.refuse_next, end.slow_kernel) = (2, true);
    end.charon_snapshot(&[&first, &second]);
    assert_eq!(end.refusals.len(), 2);
    assert_eq!(end.writer.tunnels().len(), 1, "the other one");
    let texts = end.notice_texts();
    assert_eq!(texts.matches("refused its SAs").count(), 1, "{texts}");
    // Other facts: it is tried again.
    end.slow_kernel = false;
    end.answer_one();
    assert_eq!(end.writer.tunnels().len(), 2);
    let active = end
        .writer
        .sas()
        .iter()
        .filter(|sa| sa.id.direction == Outbound && sa.active)
        .count();
    assert_eq!(active, 2);
}

#[test]
fn a_child_that_ends_while_it_carries_points_to_inactivity() {
    let of = Negotiated::new(1);
    for quiet in [false, true] {
        let mut world = World::with(&of);
        world.west.second();
        if quiet {
            world.west.later(Duration::from_secs(60));
        }
        world.west.child_down(&of);
        assert_eq!(world.west.notice_texts().contains("inactivity"), !quiet);
    }
}

#[test]
fn secrets_do_not_show() {
    let of = Negotiated::new(1);
    let mut end = started();
    end.establish(&of);
    let shown = format!("{:?} {:?}", end.importer.children(), end.sa(&of, Outbound));
    assert!(
        shown.contains("redacted") && !shown.contains("03, 03"),
        "{shown}"
    );
}
