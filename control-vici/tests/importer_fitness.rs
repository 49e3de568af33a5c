//! What is imported, and what is not and why.

mod common;
use Direction::{Inbound, Outbound};
use common::*;
use esplane_api::*;
use esplane_control_vici::{importer::*, vici::*, xfrm::*};

fn started() -> End {
    let mut end = End::new(Side::West);
    end.start();
    end
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
