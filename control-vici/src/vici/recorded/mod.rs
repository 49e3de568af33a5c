//! What charon 5.9.8 (Debian 12) really sent, read again. Two connections: `site` over IPv4 with four children, among
//! them one with marks and interface ids, one of ICMP only, one on demand; `six` over IPv6 in UDP. They came up, `net`
//! and the IKE_SA were rekeyed, `web` was terminated, then `site`.

use super::*;
use std::time::Duration;

const EVENTS_TOLD: &[u8] = include_bytes!("charon-5.9.8-events.bin");
const ANSWERS: &[u8] = include_bytes!("charon-5.9.8-commands.bin");
const OUTCOMES: &[u8] = include_bytes!("charon-5.9.8-controls.bin");

fn names() -> Names {
    Names::from_files("", "http 80/tcp\n")
}

/// Every packet of a recording.
fn packets(bytes: &[u8]) -> Vec<Packet> {
    let mut reader = PacketReader::default();
    reader.push(bytes);
    let packets: Vec<_> = std::iter::from_fn(|| reader.next_packet().unwrap()).collect();
    assert!(!reader.is_within_packet());
    packets
}

/// All messages of one event.
fn messages(bytes: &[u8], event: &str) -> Vec<Message> {
    let packets = packets(bytes).into_iter();
    let messages = packets.filter_map(|packet| match packet {
        Packet::Event(name, message) if name == event => Some(message),
        _ => None,
    });
    messages.collect()
}

fn texts<T: ToString>(items: &[T]) -> String {
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    items.join(" ")
}

#[test]
fn every_packet_is_written_again_as_it_came() {
    for bytes in [EVENTS_TOLD, ANSWERS, OUTCOMES] {
        let written: Vec<u8> = packets(bytes)
            .iter()
            .flat_map(|packet| packet.encode().unwrap())
            .collect();
        assert_eq!(written, bytes);
    }
}

#[test]
fn the_life_of_two_connections_is_understood_event_by_event() {
    let names = names();
    let mut facts = Facts::new(&names);
    let mut story = Vec::new();
    for packet in packets(EVENTS_TOLD) {
        let Packet::Event(name, message) = packet else {
            continue;
        };
        story.push(match facts.event(&name, &message).unwrap() {
            ViciEvent::IkeUpDown { up, ike } => format!("ike {} {up}", ike.name),
            ViciEvent::ChildUpDown { up, ike } => {
                let [child] = &ike.children[..] else {
                    panic!("one child");
                };
                format!("child {}/{} {up} {:?}", ike.name, child.name, child.state)
            }
            ViciEvent::ChildRekey { ike, old, new } => {
                assert!(ike.children.is_empty());
                assert_eq!(
                    (old.state, new.state),
                    (ChildState::Replaced, ChildState::Installed)
                );
                assert!(old.reqid == new.reqid && old.spi_in != new.spi_in);
                format!("child {}/{} rekeyed", ike.name, new.name)
            }
            ViciEvent::IkeRekey { old, new } => {
                assert!(old.name == new.name && old.unique_id != new.unique_id);
                format!("ike {} rekeyed", old.name)
            }
            other => panic!("{other:?}"),
        });
    }
    assert_eq!(facts.problems, []);
    let expected = [
        "ike site true",
        "child site/net true Installed",
        "child site/web true Installed",
        "child site/ping true Installed",
        "child site/host true Installed",
        "ike six true",
        "child six/v6 true Installed",
        "child site/net rekeyed",
        "ike site rekeyed",
        "child site/web false Leaving",
        "ike site false",
        "child site/ping false Installed",
        "child site/host false Installed",
        "child site/net false Installed",
    ];
    let (mut story, mut expected) = (story, expected.map(str::to_owned).to_vec());
    // charon ends the children of an IKE_SA in no order of its own, and says that they go while they are installed.
    story[10..].sort();
    expected[10..].sort();
    assert_eq!(story, expected);
}

#[test]
fn a_dump_is_read_to_the_last_field() {
    let names = names();
    let mut facts = Facts::new(&names);
    let dump = messages(ANSWERS, "list-sa");
    let sas: Vec<IkeSa> = dump.iter().filter_map(|sa| facts.list_sa(sa)).collect();
    assert_eq!(facts.problems, []);
    let [six, site] = &sas[..2] else {
        panic!("two IKE_SAs");
    };
    assert_eq!(
        (six.name.as_str(), six.state.as_str()),
        ("six", "ESTABLISHED")
    );
    assert_eq!(six.local, Some("[2001:db8::1]:4500".parse().unwrap()));
    assert_eq!(six.remote, Some("[2001:db8::2]:4500".parse().unwrap()));
    assert_eq!((six.nat_local, six.nat_remote), (false, true));
    assert_eq!(six.local_id, "berlin.example");
    assert_eq!(texts(&six.children[0].local_ts), "10.1.0.0/24 fd00:80::/64");
    assert_eq!(
        texts(&six.children[0].selectors()),
        "10.1.0.0/24 === 10.2.0.0/24 fd00:80::/64 === fd00:81::/64"
    );
    assert!(six.children[0].udp_encap);

    let [net, web, ping, host] = &site.children[..] else {
        panic!("four children");
    };
    assert_eq!((net.name.as_str(), net.unique_id, net.reqid), ("net", 6, 1));
    assert_eq!(net.algorithm, "AES_GCM_16-256");
    assert_eq!((net.esn, net.udp_encap), (true, false));
    assert_eq!(
        (net.mode.as_str(), net.protocol.as_str()),
        ("TUNNEL", "ESP")
    );
    assert_eq!(net.spi_in.unwrap().get(), 0xc000_60b3);
    assert_eq!(net.spi_out.unwrap().get(), 0xd000_4d5c);
    assert_eq!(net.rekey_in, Some(Duration::from_secs(1714)));
    assert_eq!(net.expires_in, Some(Duration::from_secs(1980)));
    assert_eq!((net.mark_in, net.if_ids), (None, (None, None)));

    let mark = |mask| {
        Some(Mark {
            value: 0xdead00,
            mask,
        })
    };
    assert_eq!(
        (web.mark_in, web.mark_out),
        (mark(u32::MAX), mark(0xffff_ff00))
    );
    assert_eq!(web.if_ids, (Some(66), Some(67)));
    assert_eq!(
        texts(&web.local_ts),
        "10.1.0.0/24[tcp/80] 10.1.0.0/24[udp/1000-2000]"
    );

    assert_eq!(ping.algorithm, "AES_CBC-128/HMAC_SHA2_256_128");
    assert!(ping.local_ts.is_empty() && ping.remote_ts.is_empty());
    assert!(texts(&ping.unsupported_ts).contains("`10.1.0.0/24[icmp/8]` names ICMP types"));

    assert_eq!(
        (host.mode.as_str(), host.algorithm.as_str()),
        ("TRANSPORT", "CHACHA20_POLY1305")
    );
    assert_eq!((host.rekey_in, host.expires_in), (None, None));
}

#[test]
fn loaded_connections_and_traps_are_read() {
    let names = names();
    let mut facts = Facts::new(&names);
    let loaded = messages(ANSWERS, "list-conn");
    let loaded: Vec<_> = loaded
        .iter()
        .filter_map(|conn| facts.list_conn(conn))
        .collect();
    let shown: Vec<_> = loaded
        .iter()
        .map(|conn| (&*conn.name, conn.children.len()))
        .collect();
    assert_eq!(shown, [("site", 4), ("six", 1)]);
    assert_eq!(loaded[0].version, "IKEv2");
    assert_eq!(loaded[0].remote_addrs, ["192.0.2.2"]);
    let host = &loaded[0].children[3];
    assert_eq!((host.mode.as_str(), host.rekey_time), ("TRANSPORT", None));
    assert_eq!(host.local_ts, ["dynamic"]);
    assert_eq!(loaded[0].children[1].local_ts[0], "10.1.0.0/24[tcp/http]");
    assert_eq!(
        loaded[0].children[0].rekey_time,
        Some(Duration::from_secs(1800))
    );

    let [trap] = &messages(ANSWERS, "list-policy")[..] else {
        panic!("one trap");
    };
    let trap = facts.list_policy(trap).unwrap();
    assert_eq!((trap.ike.as_str(), trap.child.as_str()), ("site", "host"));
    assert_eq!(texts(&trap.remote_ts), "192.0.2.2/32");
    assert_eq!(facts.problems, []);
}

#[test]
fn charon_says_who_it_is() {
    let answers: Vec<Message> = packets(ANSWERS)
        .into_iter()
        .filter_map(|packet| match packet {
            Packet::Response(message) => Some(message),
            _ => None,
        })
        .collect();
    let version = charon_version(&answers[0]);
    assert_eq!(
        (version.daemon.as_str(), version.version.as_str()),
        ("charon", "5.9.8")
    );
    let stats = charon_stats(&answers[1]);
    assert!(
        stats
            .plugins
            .iter()
            .any(|plugin| plugin == "kernel-netlink")
    );
    assert_eq!((stats.running.as_str(), stats.ike_sas), ("38 seconds", 0));
}

/// What other charons may send: keys that came later, keys that are not there yet, and nonsense.
#[test]
fn other_charons_are_understood_and_nonsense_is_named() {
    let names = names();
    let child = Message::new()
        .with("uniqueid", 7)
        .with("reqid", 1)
        .with("state", "FROBNICATING")
        .with("mode", "TUNNEL")
        .with("per-cpu-sas", "yes")
        .with("spi-in", "c0ffee01")
        .with("rekey-time", -5)
        .with_list("local-ts", ["10.1.0.0/16"])
        .with_section("later", Message::new().with("key", "value"));
    let broken = child.clone().with("spi-out", "zzz");
    let sa = Message::new()
        .with("uniqueid", 1)
        .with("local-host", "%any")
        .with("remote-host", "192.0.2.2")
        .with_section(
            "child-sas",
            Message::new()
                .with_section("net", child)
                .with_section("bad", broken),
        );
    let mut facts = Facts::new(&names);
    let sa = facts
        .list_sa(&Message::new().with_section("site", sa))
        .unwrap();
    assert_eq!(
        (sa.local, sa.remote),
        (None, Some("192.0.2.2:500".parse().unwrap()))
    );
    let [net] = &sa.children[..] else {
        panic!("the broken child is left out");
    };
    // No `name`, as long ago: the section's.
    assert_eq!((net.name.as_str(), net.state), ("net", ChildState::Leaving));
    assert_eq!(net.rekey_in, Some(Duration::ZERO));
    assert_eq!(
        facts.problems[0].to_string(),
        "charon's `list-sa`, `site.child-sas.bad.spi-out`: is `zzz`, not an SPI in hexadecimal"
    );

    let mut facts = Facts::new(&names);
    assert_eq!(
        facts.event("ike-updown", &Message::new().with("up", "yes")),
        None
    );
    assert!(facts.problems[0].to_string().contains("is missing"));
    let nameless = Message::new().with_section("site", Message::new());
    assert_eq!(facts.event("child-updown", &nameless), None);
    assert!(
        facts.problems[1]
            .to_string()
            .contains("`site.uniqueid`: is missing")
    );
}

#[test]
fn an_update_tells_the_new_ends() {
    let names = names();
    let mut facts = Facts::new(&names);
    let old = Message::new()
        .with("uniqueid", 3)
        .with("local-host", "192.0.2.1")
        .with("local-port", 500)
        .with("remote-host", "192.0.2.2")
        .with("remote-port", 500);
    let update = Message::new()
        .with("local-host", "192.0.2.9")
        .with("local-port", 4500)
        .with("remote-host", "192.0.2.2")
        .with("remote-port", 4500)
        .with_section("(unnamed)", old);
    let Some(ViciEvent::IkeUpdate(ike)) = facts.event("ike-update", &update) else {
        panic!("an update");
    };
    assert_eq!(ike.local, Some("192.0.2.9:4500".parse().unwrap()));
    assert_eq!(ike.remote, Some("192.0.2.2:4500".parse().unwrap()));
    assert_eq!(ike.name, "(unnamed)");
}
