//! What a right configuration means.

use super::*;
use crate::{config::static_sas::StaticKey, ways::Ways};
use esplane_api::{Direction, IpPrefix, SequenceStart, TunnelId};
use std::{collections::BTreeSet, iter};

#[test]
fn the_example_is_valid_and_holds_every_key() {
    let home = Home::new();
    let text = include_str!("../../../examples/esplane.yaml");
    let config = home
        .config(text)
        .map_err(|error| error.to_string())
        .unwrap();
    assert_eq!(config.name, "berlin");
    assert_eq!(config.listen, "[::]:4500".parse().unwrap());
    assert_eq!(
        config.peers[0].rekey,
        RekeyPolicy::default(),
        "the comments name the defaults"
    );
    assert_eq!(
        config.static_sas[0].routes(),
        ["10.9.0.0/16".parse().unwrap()]
    );
    assert!(
        config
            .to_string()
            .contains("paris at paris.example.net:4500, 10.2.0.0/16 2001:db8:2::/48")
    );
}

#[test]
fn what_the_example_calls_a_default_is_one() {
    let home = Home::new();
    let short = home.config(&format!("{HEAD}{PEER}")).unwrap();
    let long = home
        .config(include_str!("../../../examples/esplane.yaml"))
        .unwrap();
    assert_eq!(short.listen, long.listen);
    assert_eq!(short.interface.mtu, long.interface.mtu);
    assert_eq!(
        (short.workers, short.install_routes, short.route_metric),
        (long.workers, long.install_routes, long.route_metric)
    );
    assert_eq!(
        (&short.state_dir, &short.api, short.log),
        (&long.state_dir, &long.api, long.log)
    );
    let (short, long) = (&short.peers[0], &long.peers[0]);
    assert_eq!(
        (&short.suites, short.kem, short.rekey, short.esn),
        (&long.suites, long.kem, long.rekey, long.esn)
    );
    assert_eq!(
        (short.window, short.df, short.dead_after_seconds),
        (long.window, long.df, long.dead_after_seconds)
    );
    assert_eq!(
        (short.initiate, short.keepalive_seconds),
        (Initiate::OnDemand, None)
    );
}

/// The example's section stands in comments, since it changes where everything else arrives.
#[test]
fn the_examples_strongswan_is_valid_and_what_it_calls_a_default_is_one() {
    let home = Home::new();
    let text = include_str!("../../../examples/esplane.yaml");
    let (before, section) = text.split_once("# strongswan:\n").unwrap();
    let (section, _) = section.split_once("\n\n").unwrap();
    let section: String = section
        .lines()
        .map(|line| format!("{}\n", &line[2..]))
        .collect();
    let before = before.replace("listen: \"[::]:4500\"\n", "");
    let long = home
        .config(&format!("{before}strongswan:\n{section}"))
        .unwrap();
    let short = home.config(&format!("{HEAD}strongswan:\n")).unwrap();
    assert_eq!((long.listen.port(), short.listen.port()), (4501, 4501));
    assert!(long.uses_own_port() && !short.uses_own_port() && short.uses_plain_esp());
    let (long, short) = (long.strongswan.unwrap(), short.strongswan.unwrap());
    assert_eq!(
        (&long.mode, long.mark, &long.vici),
        (&short.mode, short.mark, &short.vici)
    );
    assert_eq!(
        (long.port, long.routes, long.df),
        (short.port, short.routes, short.df)
    );
    assert_eq!(
        (long.window, short.window),
        (Some(WindowSize::DEFAULT), None)
    );
    assert_eq!(long.connections[1].child.as_deref(), Some("net"));
    let socket = Mode::Preload {
        socket: DEFAULT_XFRM_SOCKET.into(),
    };
    let preload = home
        .config(&format!("{HEAD}strongswan: {{ mode: preload }}\n"))
        .unwrap();
    assert_eq!(preload.strongswan.unwrap().mode, socket);
}

#[test]
fn of_strongswan_only_its_routes_change_while_the_daemon_runs() {
    let home = Home::new();
    let config = |section: &str| home.config(&format!("{HEAD}{section}\n")).unwrap();
    let old = config("strongswan: {}");
    assert!(
        old.restart_needed(&config("strongswan: { routes: false }"))
            .is_empty()
    );
    assert_eq!(
        old.restart_needed(&config("strongswan: { port: 4600 }")),
        ["strongswan"]
    );
    assert_eq!(
        old.restart_needed(&config("listen: \"[::]:4501\"")),
        [
            "strongswan",
            "peers or static_sas (the first one in UDP beside strongSwan)"
        ]
    );
    let with_peer = old.restart_needed(&config(&format!("strongswan: {{}}\n{PEER}")));
    assert_eq!(
        with_peer,
        ["peers or static_sas (the first one in UDP beside strongSwan)"]
    );
}

#[test]
fn a_peer_reaches_control_noise_as_it_is_written() {
    let home = Home::new();
    let config = home
        .config(&format!("{HEAD}{PEER_WITH}endpoint: \"[2001:db8::1]:4500\", psk_file: good.psk, kem: off, initiate: start, keepalive_seconds: 25, rekey: {{seconds: 7}}, esn: off, window_packets: 64, df: copy, suites: [aes256gcm16] }}\n"))
        .unwrap();
    let ids = TunnelIds::default().assign(config.tunnel_names());
    let peers = config.noise_peers(&ids, |_| panic!("an address needs no DNS"));
    let peer = &peers[0];
    assert_eq!((peer.id, peer.name.as_str()), (TunnelId(1), "p"));
    assert_eq!(peer.public_key.to_string(), public(2));
    assert!(peer.psk.is_some());
    assert_eq!(peer.endpoint, Some("[2001:db8::1]:4500".parse().unwrap()));
    assert_eq!(
        peer.selectors,
        [SelectorPair::to("10.2.0.0/16".parse().unwrap())]
    );
    assert_eq!(
        (peer.kem, peer.initiate, peer.esn),
        (KemPolicy::Off, Initiate::AtStart, Esn::Off)
    );
    assert_eq!(
        (peer.rekey.seconds, peer.rekey.bytes),
        (7, RekeyPolicy::default().bytes)
    );
    assert_eq!(
        (peer.window.packets(), peer.df, peer.keepalive_seconds),
        (64, DfPolicy::Copy, Some(25))
    );
    assert_eq!(peer.suites, [AeadSuite::Aes256Gcm16]);
}

#[test]
fn a_peer_known_by_name_only_gets_its_address_from_dns() {
    let home = Home::new();
    let config = home
        .config(&format!(
            "{HEAD}{PEER_WITH}endpoint: vpn.example.net:500 }}\n"
        ))
        .unwrap();
    let ids = TunnelIds::default().assign(config.tunnel_names());
    assert_eq!(config.noise_peers(&ids, |_| None)[0].endpoint, None);
    let resolved = "192.0.2.7:500".parse().unwrap();
    assert_eq!(
        config.noise_peers(&ids, |peer| (peer.name == "p").then_some(resolved))[0].endpoint,
        Some(resolved)
    );
}

#[test]
fn a_static_sa_becomes_a_tunnel_and_two_sas() {
    let home = Home::new();
    let config = home
        .config(&format!(
            "{HEAD}{}",
            SA_WITH.replace("key: $A", "key_file: sa.key")
                + "local: 192.0.2.1, udp: {}, esn: off, lifetime: {hard: {seconds: 60}} }\n"
        ))
        .unwrap();
    let sa = &config.static_sas[0];
    let tunnel = sa.tunnel_params(TunnelId(7));
    assert_eq!(
        (tunnel.name.as_str(), tunnel.roaming, tunnel.policies.len()),
        ("s", false, 1)
    );
    let reserved = SequenceStart {
        first: 5,
        reserved_until: Some(1000),
    };
    let pair = sa.sa_pair(TunnelId(7), reserved);
    assert_eq!(pair.inbound.key.dangerous_key(), [0x7f; 16]);
    assert_eq!(pair.outbound.key.dangerous_salt(), [0xb2; 4]);
    assert_eq!(
        (pair.inbound.direction, pair.outbound.direction),
        (Direction::Inbound, Direction::Outbound)
    );
    assert_eq!(
        (pair.inbound.sequence, pair.outbound.sequence),
        (SequenceStart::FRESH, reserved)
    );
    assert_eq!(
        pair.outbound.path.remote_socket(),
        "192.0.2.2:4500".parse().unwrap()
    );
    assert_eq!(pair.outbound.lifetime.hard().seconds, Some(60));
    assert!(
        !format!("{config:?}").contains("127, 127"),
        "Debug shows no secret"
    );
}

#[test]
fn a_network_may_hold_the_peer_itself_where_ours_are_known() {
    let home = Home::new();
    let everything = "peers:\n- { name: p, public_key: $2, endpoint: 192.0.2.1:4500, routes: [0.0.0.0/0, 10.2.0.0/16] }\n";
    let config = home.config(&format!("{HEAD}{everything}")).unwrap();
    let ways = Ways::configured(&config, &[], iter::empty());
    let prefix = |text: &str| -> IpPrefix { text.parse().unwrap() };
    let by_source = BTreeSet::from([(prefix("10.1.0.0/16"), IpPrefix::ALL_V4)]);
    assert_eq!(ways.by_source, by_source);
    assert_eq!(Vec::from_iter(ways.routes.keys()), [&prefix("10.2.0.0/16")]);
    // Found by its name later.
    let found = iter::once("10.2.3.4".parse().unwrap());
    let ways = Ways::configured(&config, &[], found);
    assert!(ways.routes.is_empty() && ways.by_source.len() == 2);
}

#[test]
fn a_static_sas_own_networks_are_those_of_its_selectors() {
    let home = Home::new();
    let selectors = "selectors: [{local: 10.7.0.0/16, remote: 192.0.0.0/8}] }\n";
    let config = home.config(&format!("{HEAD}{SA_WITH}{selectors}")).unwrap();
    let ways = Ways::configured(&config, &[&config.static_sas[0]], iter::empty());
    let pair = ("10.7.0.0/16", "192.0.0.0/8");
    let pair = (pair.0.parse().unwrap(), pair.1.parse().unwrap());
    assert_eq!(ways.by_source, BTreeSet::from([pair]));
    assert_eq!(ways.routes.len(), 1);
}

#[test]
fn a_loop_is_the_operators_business_when_he_routes_himself() {
    let home = Home::new();
    let everything = "peers:\n- { name: p, public_key: $2, endpoint: \"[2001:db8::1]:4500\", routes: [\"::/0\"] }\n";
    assert!(home.config(&format!("{HEAD}{everything}")).is_err());
    let own = home.config(&format!("{HEAD}install_routes: false\n{everything}"));
    let ways = Ways::configured(&own.unwrap(), &[], iter::empty());
    assert!(ways.routes.is_empty() && ways.by_source.is_empty());
}

#[test]
fn two_tunnels_may_share_a_network_by_ports() {
    let home = Home::new();
    let ports = "selectors: [{local: 10.1.0.0/16, remote: \"10.7.0.0/16[tcp/80]\"}, {local: 10.1.0.0/16, remote: \"10.7.0.0/16[tcp/443]\"}] }\n";
    let config = home.config(&format!("{HEAD}{SA_WITH}{ports}")).unwrap();
    assert_eq!(
        config.static_sas[0].routes().len(),
        2,
        "one route to each network, however many ports"
    );
}

#[test]
fn a_reload_names_what_it_cannot_change() {
    let home = Home::new();
    let old = home.config(&format!("{HEAD}{PEER}")).unwrap();
    let live = home
        .config(&format!(
            "{HEAD}log: {{level: debug}}\ninstall_routes: false\nroute_metric: 7\n{SA_WITH} udp: {{}}}}\n"
        ))
        .unwrap();
    assert!(old.restart_needed(&live).is_empty());
    // Raw sockets are opened at start or not at all.
    let plain = home.config(&format!("{HEAD}{PEER}{SA_WITH}}}\n")).unwrap();
    assert_eq!(
        old.restart_needed(&plain),
        ["static_sas (the first one in plain ESP)"]
    );
    assert!(plain.restart_needed(&plain).is_empty());
    home.file("node.key", 0o600, &secret(9));
    let restart = home
        .config("name: other\ninterface: {name: esp1}\nprivate_key_file: node.key\nlisten: 0.0.0.0:500\nworkers: 2\nstate_dir: /tmp\napi: {listen: off}\nlog: {format: json}\n")
        .unwrap();
    assert_eq!(
        old.restart_needed(&restart),
        [
            "name",
            "private_key_file",
            "state_dir",
            "listen",
            "interface",
            "workers",
            "api",
            "log.format"
        ]
    );
}

#[test]
fn a_static_sa_with_another_key_is_another_static_sa() {
    let home = Home::new();
    let load = || {
        home.config(&format!("{HEAD}{SA_WITH}}}\n"))
            .unwrap()
            .static_sas
            .remove(0)
    };
    let (mut changed, same) = (load(), load());
    assert!(changed.same_as(&same));
    changed.outbound = StaticKey {
        key: changed.inbound.key.clone(),
        ..changed.outbound
    };
    assert!(!changed.same_as(&same));
}

#[test]
fn tunnel_numbers_stay_with_their_names_and_are_never_used_twice() {
    let first = TunnelIds::default().assign(["a", "b", "b"]);
    assert_eq!(
        (first.get("a"), first.get("b")),
        (Some(TunnelId(1)), Some(TunnelId(2)))
    );
    let second = first.assign(["c", "b"]);
    assert_eq!(
        (second.get("a"), second.get("b"), second.get("c")),
        (None, Some(TunnelId(2)), Some(TunnelId(3)))
    );
    let third = second.assign(["a"]);
    assert_eq!(
        (third.get("a"), third.name(TunnelId(4))),
        (Some(TunnelId(4)), Some("a"))
    );
}

#[test]
fn show_finds_the_api_without_reading_keys() {
    let home = Home::new();
    home.file("esplane.yaml", 0o644, "name: n\ninterface: {name: e}\nprivate_key_file: no.key\napi: {listen: off, socket: /tmp/x.sock}\n");
    let api = Config::load_api(&home.0.path().join("esplane.yaml")).unwrap();
    assert_eq!((api.listen, api.socket), (None, Some("/tmp/x.sock".into())));
}
