//! Stories of two control planes in one node: what is strongSwan's goes to the importer, the rest does not.

use super::*;
use esplane_api::{AeadSuite, Direction, KeyMaterial, LifetimeUnit, Limits, Spi, TrafficSelector};
use esplane_control_noise::{LoadPolicy, NodeConfig, StaticSecretKey};
use esplane_control_vici::{
    importer::ImportSettings,
    vici::{ChildSa, ChildState, IkeSa},
    xfrm::{SaKey, XfrmCipher, XfrmMode, XfrmReply, XfrmSa},
};
use esplane_dataplane::{Aead, OuterHeaders, Settings};
use std::net::IpAddr;

const HERE: &str = "192.0.2.1";
const THERE: &str = "192.0.2.2";

fn node() -> Node {
    let engine = Engine::new(NodeConfig {
        private_key: StaticSecretKey::generate([1; 32]),
        listen_port: 4501,
        local: None,
        seed: [2; 32],
        worker_ports: Vec::new(),
        reserved_spis: Vec::new(),
        under_load: LoadPolicy::default(),
    });
    let settings = Settings {
        outer_headers: OuterHeaders::ByKernel,
    };
    let tables = TableWriter::new(settings, Aead::portable());
    Node::new(engine.unwrap(), tables).with_importer(Importer::new(ImportSettings::default()))
}

fn now(seconds: u64) -> Now {
    Now {
        monotonic: Duration::from_secs(seconds),
        unix: Duration::from_secs(1_800_000_000 + seconds),
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// As the kernel tells it: inert, for its mark is no packet's.
fn sa(spi: u32, from: &str, to: &str) -> XfrmSa {
    let mark = ImportSettings::MARK;
    let key = KeyMaterial::new(AeadSuite::Aes128Gcm16, &[(spi >> 8) as u8; 20]).unwrap();
    XfrmSa {
        key: SaKey {
            destination: ip(to),
            spi: Spi::new(spi).unwrap(),
            mark: (mark.value, mark.mask),
        },
        source: ip(from),
        reqid: 1,
        mode: XfrmMode::Tunnel,
        mark: Some(mark),
        if_id: None,
        direction: None,
        cipher: XfrmCipher::Aead(key),
        esn: false,
        window_packets: 32,
        encap: None,
        soft: Limits::default(),
        hard: Limits::default(),
        sequence_sent: 0,
        sequence_received: 0,
        packets: 0,
        bytes: 0,
        added_unix_seconds: 1_800_000_000,
    }
}

fn ike() -> IkeSa {
    let network = |text: &str| -> TrafficSelector { text.parse().unwrap() };
    IkeSa {
        name: "gw".to_owned(),
        unique_id: 1,
        state: "ESTABLISHED".to_owned(),
        local: Some(format!("{HERE}:500").parse().unwrap()),
        remote: Some(format!("{THERE}:500").parse().unwrap()),
        local_id: "here".to_owned(),
        remote_id: "there".to_owned(),
        nat_local: false,
        nat_remote: false,
        children: vec![ChildSa {
            name: "net".to_owned(),
            unique_id: 1,
            reqid: 1,
            state: ChildState::Installed,
            mode: "TUNNEL".to_owned(),
            protocol: "ESP".to_owned(),
            udp_encap: false,
            spi_in: Spi::new(0x1001).ok(),
            spi_out: Spi::new(0x2001).ok(),
            mark_in: Some(ImportSettings::MARK),
            mark_out: Some(ImportSettings::MARK),
            if_ids: (None, None),
            algorithm: "AES_GCM_16-128".to_owned(),
            esn: false,
            local_ts: vec![network("10.1.0.0/16")],
            remote_ts: vec![network("10.2.0.0/16")],
            unsupported_ts: Vec::new(),
            rekey_in: None,
            expires_in: None,
        }],
    }
}

/// Does what the kernel would about each request; answers everything else.
fn carry_out(node: &mut Node, at: Now) -> Vec<Action> {
    let mut rest = Vec::new();
    while let Some(action) = node.poll_action() {
        match action {
            Action::Xfrm(XfrmRequest::Store { key, progress }) => {
                let reply = XfrmReply {
                    key,
                    done: true,
                    sequence_sent: progress.sent,
                };
                node.handle_xfrm(at, XfrmEvent::Reply(reply));
            }
            other => rest.push(other),
        }
    }
    rest
}

fn carrying() -> Node {
    let mut node = node();
    node.handle_xfrm(now(0), XfrmEvent::Snapshot(Vec::new()));
    node.handle_vici(now(0), ViciEvent::Snapshot(Vec::new()));
    node.handle_xfrm(now(1), XfrmEvent::Installed(sa(0x1001, THERE, HERE)));
    node.handle_xfrm(now(1), XfrmEvent::Installed(sa(0x2001, HERE, THERE)));
    let up = ViciEvent::ChildUpDown {
        up: true,
        ike: ike(),
    };
    node.handle_vici(now(1), up);
    carry_out(&mut node, now(1));
    node
}

#[test]
fn what_charon_has_negotiated_is_carried_and_goes_with_its_sas() {
    let mut node = carrying();
    let sas = node.table_writer().sas();
    assert_eq!(sas.len(), 2, "{sas:?}");
    assert!(sas.iter().all(|sa| sa.active && is_imported(sa.id.tunnel)));
    let children = node.children();
    assert_eq!((children[0].name.as_str(), children.len()), ("gw/net", 1));
    assert_eq!(children[0].tunnel, Some(sas[0].id.tunnel));
    assert_eq!(node.imported_routes(), ["10.2.0.0/16".parse().unwrap()]);

    for key in [sa(0x2001, HERE, THERE).key, sa(0x1001, THERE, HERE).key] {
        node.handle_xfrm(now(2), XfrmEvent::Removed(key));
    }
    let down = ViciEvent::ChildUpDown {
        up: false,
        ike: ike(),
    };
    node.handle_vici(now(2), down);
    while let Some(at) = node
        .poll_timeout()
        .filter(|at| *at < Duration::from_secs(60))
    {
        let at = Now {
            monotonic: at,
            ..now(2)
        };
        node.handle_timeout(at);
        carry_out(&mut node, at);
    }
    assert!(node.table_writer().sas().is_empty() && node.imported_routes().is_empty());
}

#[test]
fn a_limit_of_an_imported_sa_is_charons_business() {
    let mut node = carrying();
    let sas = node.table_writer().sas();
    let sender = sas
        .iter()
        .find(|sa| sa.id.direction == Direction::Outbound)
        .unwrap();
    let event = SaEvent::SoftExpired {
        sa: sender.id,
        unit: LifetimeUnit::Bytes,
    };
    node.handle_event(now(2), event);
    let asked = carry_out(&mut node, now(2));
    let expired = |action: &Action| matches!(action, Action::Xfrm(XfrmRequest::Expire { key, hard: false }) if key.spi == sender.id.spi);
    assert!(asked.iter().any(expired), "{asked:?}");
}

#[test]
fn what_the_tables_refuse_is_told_of_the_child_and_changes_nothing_else() {
    let mut node = node();
    // A static SA has the inbound SPI that charon will choose.
    let tunnel = TunnelId(1);
    let taken = esplane_api::SaParams {
        tunnel,
        direction: Direction::Inbound,
        spi: Spi::new(0x1001).unwrap(),
        key: KeyMaterial::new(AeadSuite::Aes128Gcm16, &[9; 20]).unwrap(),
        esn: esplane_api::Esn::Off,
        window: esplane_api::WindowSize::DEFAULT,
        path: esplane_api::OuterPath::new(ip(HERE), ip("192.0.2.9"), None).unwrap(),
        selectors: vec![esplane_api::SelectorPair::to(
            "10.9.0.0/16".parse().unwrap(),
        )],
        lifetime: esplane_api::Lifetime::UNLIMITED,
        sequence: esplane_api::SequenceStart::FRESH,
        worker: None,
    };
    let outbound = esplane_api::SaParams {
        direction: Direction::Outbound,
        spi: Spi::new(0x3001).unwrap(),
        key: KeyMaterial::new(AeadSuite::Aes128Gcm16, &[8; 20]).unwrap(),
        ..taken.clone()
    };
    let params = TunnelParams {
        id: tunnel,
        name: "lab".to_owned(),
        policies: Vec::new(),
        roaming: false,
        df: esplane_api::DfPolicy::Clear,
    };
    let pair = SaPair {
        inbound: taken,
        outbound,
    };
    node.change_static(now(0), &[], vec![(params, pair)])
        .unwrap();
    node.handle_xfrm(now(0), XfrmEvent::Snapshot(vec![sa(0x1001, THERE, HERE)]));
    node.handle_vici(now(0), ViciEvent::Snapshot(vec![ike()]));
    let told = carry_out(&mut node, now(0));
    let refused = |action: &Action| matches!(action, Action::ImportNotice(notice) if notice.to_string().contains("refused"));
    assert!(told.iter().any(refused), "{told:?}");
    let sas = node.table_writer().sas();
    assert!(
        sas.iter().all(|sa| sa.id.tunnel == tunnel) && sas.len() == 2,
        "{sas:?}"
    );
}
