//! An operator with a working strongSwan follows the report literally, until it says ready.
//!
//! The connections and SAs are those of `vici/recorded` (charon 5.9.8); the files and the kernel are written here.

use super::{settings::Settings, *};
use crate::{
    importer::{ImportName, ImportSettings},
    vici::{CharonStats, CharonVersion, ChildSa, Facts, IkeSa, Mark, Names, Packet, PacketReader},
    xfrm::{SaKey, XfrmCipher, XfrmMode, XfrmSa},
};
use esplane_api::{Limits, Spi};

const RECORDED: &[u8] = include_bytes!("../vici/recorded/charon-5.9.8-commands.bin");
/// As most people have it: nothing said that VICI would not tell.
const SWANCTL_CONF: &str = "connections {
  site {
    children {
      net {
        local_ts = 10.1.0.0/24
        esp_proposals = aes256gcm16-ecp256-esn
      }
      web {
        esp_proposals = aes128-sha256-ecp256, aes128gcm16
        mode = tunnel
      }
    }
  }
  six : defaults {
    children {
      v6 { hw_offload = auto
        inactivity = 1h
      }
    }
  }
}
";

/// All that charon 5.9.8 had, over a kernel that shows its SAs without marks and a policy each way.
fn survey() -> Survey {
    let names = Names::from_files("", "http 80/tcp\n");
    let mut facts = Facts::new(&names);
    let (mut connections, mut sas) = (Vec::new(), Vec::new());
    let mut reader = PacketReader::default();
    reader.push(RECORDED);
    while let Some(packet) = reader.next_packet().unwrap() {
        match packet {
            Packet::Event(name, message) if name == "list-conn" => {
                connections.extend(facts.list_conn(&message));
            }
            // The first of the two dumps.
            Packet::Event(name, message) if name == "list-sa" && sas.len() < 2 => {
                sas.extend(facts.list_sa(&message));
            }
            _ => {}
        }
    }
    let children: Vec<&ChildSa> = sas.iter().flat_map(|ike: &IkeSa| &ike.children).collect();
    let kernel_sas = children
        .iter()
        .flat_map(|child| kernel_sas(child, None))
        .collect();
    let kernel_policies = children.iter().flat_map(|child| [child.reqid; 3]).collect();
    Survey {
        version: CharonVersion {
            daemon: "charon-systemd".into(),
            version: "5.9.8".into(),
            release: "6.1.0-35-amd64".into(),
        },
        stats: CharonStats {
            running: "3 hours".into(),
            ike_sas: 2,
            half_open: 0,
            plugins: vec![
                "kernel-netlink".into(),
                "socket-default".into(),
                "vici".into(),
            ],
        },
        connections,
        kernel_sas: Looked::Found(kernel_sas),
        kernel_policies: Looked::Found(kernel_policies),
        sas,
        swanctl_conf: file(SWANCTL_CONF),
        strongswan_conf: Looked::Found(Settings::default()),
        kernel_esp: Looked::Found(EspSupport {
            v4: true,
            v6: true,
            xfrm: true,
        }),
        lockdown: Looked::Found(Lockdown::None),
        preloaded: Looked::Found(false),
        udp_ports: Looked::Found(vec![500, 4500]),
        mark: ImportSettings::MARK,
        way: None,
        only: vec![name("site", "net")],
        names,
    }
}

fn name(connection: &str, child: &str) -> ImportName {
    ImportName {
        connection: connection.to_owned(),
        child: Some(child.to_owned()),
    }
}

fn file(text: &str) -> Looked<Settings> {
    Looked::Found(Settings::parse("swanctl.conf", text, &mut |_, _| Vec::new()).unwrap())
}

fn kernel_sas(child: &ChildSa, mark: Option<Mark>) -> [XfrmSa; 2] {
    [child.spi_in, child.spi_out].map(|spi| XfrmSa {
        key: SaKey {
            destination: "192.0.2.1".parse().unwrap(),
            spi: spi.unwrap(),
            mark: mark.map_or((0, 0), |mark| (mark.value, mark.mask)),
        },
        source: "192.0.2.2".parse().unwrap(),
        reqid: child.reqid,
        mode: XfrmMode::Tunnel,
        mark,
        if_id: None,
        direction: None,
        cipher: XfrmCipher::Larval,
        esn: false,
        window_packets: 32,
        encap: None,
        soft: Limits::default(),
        hard: Limits::default(),
        sequence_sent: 0,
        sequence_received: 0,
        packets: 0,
        bytes: 0,
        added_unix_seconds: 0,
    })
}

/// Writes the lines where the report says, as an operator would.
fn follow(text: &str, report: &Report) -> String {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let mut additions: Vec<(usize, &Addition)> = report
        .children
        .iter()
        .filter_map(|child| child.add.as_ref())
        .map(|add| {
            let place = add.place.as_ref().expect("a place in the file");
            let (file, line) = place.rsplit_once(':').unwrap();
            assert_eq!(file, "swanctl.conf");
            (line.parse().unwrap(), add)
        })
        .collect();
    // From the end, so that the lines before keep their numbers.
    additions.sort_by_key(|(line, _)| std::cmp::Reverse(*line));
    for (begins, add) in additions {
        let mut depth = 0;
        let ends = (begins - 1..lines.len())
            .find(|&at| {
                depth += lines[at].matches('{').count();
                depth -= lines[at].matches('}').count();
                depth == 0
            })
            .unwrap();
        let (at, _) = lines[ends].match_indices('}').next().unwrap();
        let rest = lines[ends].split_off(at);
        let added = add.lines.iter().cloned().chain([rest]);
        lines.splice(ends + 1..ends + 1, added);
    }
    lines.join("\n")
}

fn child<'a>(report: &'a Report, name: &str) -> &'a ChildReport {
    report
        .children
        .iter()
        .find(|child| child.child == name)
        .unwrap()
}

fn about<'a>(child: &'a ChildReport, topic: &str) -> &'a Finding {
    child
        .findings
        .iter()
        .find(|finding| finding.topic == topic)
        .unwrap_or_else(|| panic!("nothing on {topic}: {child:?}"))
}

#[test]
fn a_working_strongswan_is_led_to_the_takeover() {
    let mut survey = survey();
    survey.only = vec![name("site", "net"), name("six", "v6"), name("site", "web")];

    // 1. As it is: lines are missing, and which.
    let report = check(&survey);
    assert!(!report.ready && report.mode == "kernel");
    let net = child(&report, "net");
    assert_eq!(net.state, ChildVerdict::Change);
    let add = net.add.as_ref().unwrap();
    assert_eq!(add.place.as_deref(), Some("swanctl.conf:4"));
    assert_eq!(
        add.lines,
        [
            "policies = no",
            "mark_in = 0x00dead00/0xffffffff",
            "mark_out = 0x00dead00/0xffffffff",
            "mark_in_sa = yes"
        ]
    );
    let v6 = child(&report, "v6").add.as_ref().unwrap();
    assert_eq!(v6.lines[4..], ["hw_offload = no", "inactivity = 0"]);
    assert!(
        about(child(&report, "v6"), "inactivity")
            .text
            .contains("now `inactivity = 1h` at swanctl.conf:17")
    );
    // Negotiated with what Esplane has; that others are allowed is said, not demanded.
    assert_eq!(
        about(child(&report, "web"), "algorithm").verdict,
        Verdict::Ok
    );

    // 2. The lines are written: now only the SAs are from before.
    survey.swanctl_conf = file(&follow(SWANCTL_CONF, &report));
    let report = check(&survey);
    assert_eq!(
        child(&report, "net").state,
        ChildVerdict::OldSas,
        "{report}"
    );
    assert_eq!(child(&report, "v6").state, ChildVerdict::OldSas, "{report}");
    assert!(child(&report, "net").add.is_none());
    let commands = report
        .steps
        .iter()
        .flat_map(|step| step.lines.clone())
        .collect::<Vec<_>>();
    let fresh = commands
        .iter()
        .position(|line| line == "swanctl --initiate --ike site --child net")
        .unwrap();
    assert_eq!(commands[fresh + 1], "swanctl --terminate --child-id 6");
    let load = commands
        .iter()
        .position(|line| line == "swanctl --load-conns")
        .unwrap();
    let esplane = commands
        .iter()
        .position(|line| line == "strongswan:")
        .unwrap();
    assert!(load < esplane && esplane < fresh, "{report}");

    // 3. Fresh SAs beside the old ones: only those have to end.
    let mut fresh = survey.sas[1].children[0].clone();
    (fresh.unique_id, fresh.reqid) = (20, 9);
    fresh.spi_in = Some(Spi::new(0xc100_0001).unwrap());
    fresh.spi_out = Some(Spi::new(0xc100_0002).unwrap());
    let Looked::Found(sas) = &mut survey.kernel_sas else {
        panic!("found");
    };
    sas.extend(kernel_sas(&fresh, Some(ImportSettings::MARK)));
    survey.sas[1].children.push(fresh);
    let report = check(&survey);
    let text = report.to_string();
    assert!(
        !text.contains("--initiate --ike site --child net"),
        "{text}"
    );
    assert!(text.contains("swanctl --terminate --child-id 6"), "{text}");

    // 4. They have.
    survey.only = vec![name("site", "net")];
    survey.sas[1].children.retain(|child| child.unique_id == 20);
    let report = check(&survey);
    assert!(report.ready && report.steps.is_empty(), "{report}");
    let sas = about(child(&report, "net"), "SAs");
    assert_eq!(
        sas.text,
        "#20 is in the kernel, which does not use it itself"
    );
}

#[test]
fn without_the_file_the_kernel_tells_and_silence_is_not_called_fine() {
    let mut survey = survey();
    survey.swanctl_conf = Looked::Unknown("/etc/swanctl/swanctl.conf: not found".into());
    let report = check(&survey);
    let net = child(&report, "net");
    assert_eq!(net.state, ChildVerdict::Change);
    assert!(
        about(net, "policies")
            .text
            .contains("3 in the kernel for #6"),
        "{net:?}"
    );
    let add = net.add.as_ref().unwrap();
    assert_eq!(
        (add.section.as_str(), &add.place),
        ("connections.site.children.net", &None)
    );
    assert!(add.lines.contains(&"mark_in_sa = yes".to_owned()));

    // charon shows the mark either way; the kernel shows whether mark_in_sa was given.
    survey.sas[1].children[0].mark_in = Some(ImportSettings::MARK);
    let report = check(&survey);
    assert!(
        about(child(&report, "net"), "marks")
            .text
            .contains("mark_in_sa is missing"),
        "{report}"
    );

    // Not up, not in the file.
    survey.sas.clear();
    let report = check(&survey);
    let net = child(&report, "net");
    assert_eq!(net.state, ChildVerdict::Unknown);
    for topic in ["policies", "marks", "algorithm"] {
        assert_eq!(about(net, topic).verdict, Verdict::Unknown, "{topic}");
    }
    assert!(
        !report.ready && about(net, "marks").text.contains("--swanctl-conf"),
        "{report}"
    );
}

#[test]
fn sas_that_this_kernel_does_not_have_are_no_good_sign() {
    let mut survey = survey();
    survey.swanctl_conf = file(&follow(SWANCTL_CONF, &check(&survey)));
    survey.kernel_sas = Looked::Found(Vec::new());
    survey.kernel_policies = Looked::Found(Vec::new());
    let report = check(&survey);
    assert!(!report.ready);
    assert!(
        about(child(&report, "net"), "SAs")
            .text
            .contains("charon's network namespace"),
        "{report}"
    );

    survey.kernel_sas = Looked::Unknown("Operation not permitted".into());
    let report = check(&survey);
    assert_eq!(
        about(child(&report, "net"), "SAs").verdict,
        Verdict::Unknown
    );
    assert!(!report.ready);
}

#[test]
fn what_esplane_does_not_carry_is_named() {
    let mut survey = survey();
    survey.only = vec![name("site", "host"), name("site", "ping")];
    let report = check(&survey);
    assert_eq!(child(&report, "host").state, ChildVerdict::Left);
    assert!(
        about(child(&report, "host"), "mode")
            .text
            .contains("transport")
    );
    let ping = child(&report, "ping");
    let selectors = about(ping, "selectors");
    assert!(
        selectors
            .text
            .starts_with("`10.1.0.0/24[icmp/8]`, `10.2.0.0/24[icmp/8]` names ICMP types"),
        "{selectors:?}"
    );
    let algorithm = about(ping, "algorithm");
    assert!(
        algorithm
            .text
            .contains("AES_CBC-128/HMAC_SHA2_256_128 for #8"),
        "{algorithm:?}"
    );
    assert!(algorithm.text.contains("ask there first"));
    let lines = &ping.add.as_ref().unwrap().lines;
    assert!(
        lines.contains(&"esp_proposals = aes256gcm16, aes128gcm16".to_owned()),
        "{lines:?}"
    );

    let ah = SWANCTL_CONF.replace(
        "esp_proposals = aes256gcm16-ecp256-esn",
        "ah_proposals = sha256\nipcomp = yes",
    );
    survey.swanctl_conf = file(&ah);
    survey.only = vec![name("site", "net")];
    let report = check(&survey);
    let add = child(&report, "net").add.as_ref().unwrap();
    assert_eq!(add.remove, ["the line `ah_proposals` at swanctl.conf:6"]);
    assert!(add.lines.contains(&"ipcomp = no".to_owned()));
    survey.only = vec![name("site", "host")];
    assert!(
        check(&survey).steps[0]
            .text
            .contains("nothing to take over")
    );
}

#[test]
fn other_marks_and_halves_are_not_the_mark() {
    let mut survey = survey();
    let with = |lines: &str| file(&SWANCTL_CONF.replace("local_ts = 10.1.0.0/24", lines));
    survey.swanctl_conf = with("policies = no\nmark_in = %unique\nmark_out = 14593280");
    let report = check(&survey);
    let net = child(&report, "net");
    assert!(
        about(net, "marks")
            .text
            .contains("not %unique at swanctl.conf:6"),
        "{report}"
    );
    let lines = &net.add.as_ref().unwrap().lines;
    // 14593280 is 0x00dead00, with the full mask that charon assumes.
    assert_eq!(
        lines[..],
        ["mark_in = 0x00dead00/0xffffffff", "mark_in_sa = yes"]
    );

    survey.swanctl_conf = with("policies = no\nmark_in = 0xdead00\nmark_out = 0xdead00/0xffffffff");
    let report = check(&survey);
    let net = child(&report, "net");
    assert_eq!(net.add.as_ref().unwrap().lines, ["mark_in_sa = yes"]);
    assert!(
        about(net, "marks")
            .text
            .contains("decrypts what comes in, and drops it")
    );
}

#[test]
fn a_network_with_the_peer_inside_is_told_with_what_it_means() {
    let mut survey = survey();
    survey.connections[0].children[0].remote_ts = vec!["0.0.0.0/0".into()];
    let report = check(&survey);
    let text = about(child(&report, "net"), "routes").text.clone();
    assert!(
        text.contains("lies in 0.0.0.0/0, so Esplane leads packets there by their source"),
        "{text}"
    );

    survey.connections[0].children[0].local_ts = vec!["0.0.0.0/0".into()];
    let report = check(&survey);
    let text = about(child(&report, "net"), "routes").text.clone();
    assert!(
        text.contains("and ours in 0.0.0.0/0, so Esplane sets no route"),
        "{text}"
    );
}

#[test]
fn a_peer_that_calls_us_is_waited_for() {
    let mut survey = survey();
    survey.connections[0].remote_addrs = vec!["%any".into()];
    let report = check(&survey);
    let last = report
        .steps
        .iter()
        .find(|step| step.text.contains("call again"))
        .unwrap();
    assert_eq!(last.lines, ["swanctl --terminate --child-id 6"]);
    assert!(!report.to_string().contains("--initiate"), "{report}");
}

#[test]
fn a_kernel_without_esp_is_led_to_mode_b() {
    let mut survey = survey();
    survey.kernel_esp = Looked::Found(EspSupport {
        v4: false,
        v6: false,
        xfrm: true,
    });
    survey.sas.clear();
    let report = check(&survey);
    assert_eq!((report.mode.as_str(), report.ready), ("preload", false));
    let text = report.to_string();
    for needed in [
        "LD_PRELOAD=",
        "install_routes = no",
        "mode: preload",
        "systemctl restart strongswan",
    ] {
        assert!(text.contains(needed), "{needed} is missing:\n{text}");
    }
    assert!(!text.contains("mark_in"), "{text}");

    survey.preloaded = Looked::Found(true);
    survey.strongswan_conf = file("charon {\n install_routes = no\n}");
    let report = check(&survey);
    assert!(report.ready, "{report}");

    // Asked for the kernel all the same, it says what is wrong with it.
    survey.way = Some(Way::Kernel);
    let report = check(&survey);
    let esp = report
        .host
        .iter()
        .find(|it| it.topic == "kernel ESP")
        .unwrap();
    assert!(esp.verdict == Verdict::Missing && esp.text.contains("esp4"));
}

#[test]
fn what_is_wrong_with_the_host_is_said_with_the_way_out() {
    let mut survey = survey();
    survey.way = Some(Way::Kernel);
    survey.lockdown = Looked::Found(Lockdown::Confidentiality);
    survey.stats.plugins = vec!["kernel-libipsec".into(), "kernel-netlink".into()];
    survey.version.version = "5.9.1".into();
    survey.udp_ports = Looked::Found(vec![500]);
    survey.strongswan_conf =
        file("charon {\n port_nat_t = 4501\n}\ncharon-systemd {\n port_nat_t = 4502\n}");
    let report = check(&survey);
    for (topic, verdict, says) in [
        ("lockdown", Verdict::Missing, "zeros in place of keys"),
        ("keys", Verdict::Missing, "kernel-libipsec { load = no }"),
        ("version", Verdict::Note, "older than 5.9.8"),
        // charon-systemd's own section counts for charon-systemd.
        ("port 4502", Verdict::Missing, "strongswan: {port: 4502}"),
    ] {
        let finding = report
            .host
            .iter()
            .find(|it| it.topic == topic)
            .expect(topic);
        assert!(
            finding.verdict == verdict && finding.text.contains(says),
            "{finding:?}"
        );
    }
    assert!(
        report.steps[0].text.contains("keys, lockdown, port 4502"),
        "{report}"
    );
    // Without being told, it takes the way that works.
    survey.way = None;
    assert_eq!(check(&survey).mode, "preload");
}

#[test]
fn what_only_some_have_to_know_is_a_note() {
    let mut survey = survey();
    let about_interface =
        |survey: &Survey| check(survey).host.iter().any(|it| it.topic == "interface");
    assert!(about_interface(&survey));
    for line in ["interfaces_ignore = lo, esp0", "interfaces_use = eth0"] {
        survey.strongswan_conf = file(&format!("charon {{\n {line}\n}}"));
        assert!(!about_interface(&survey), "{line}");
    }
    let report = check(&survey);
    assert!(
        child(&report, "net")
            .findings
            .iter()
            .all(|it| it.topic != "routes")
    );
    survey.connections[0].children[0]
        .remote_ts
        .push("0.0.0.0/0".into());
    let report = check(&survey);
    let routes = about(child(&report, "net"), "routes");
    assert!(
        routes.verdict == Verdict::Note && routes.text.contains("lies in 0.0.0.0/0"),
        "{routes:?}"
    );
}

#[test]
fn an_empty_charon_is_told_to_load() {
    let mut survey = survey();
    survey.connections.clear();
    survey.sas.clear();
    let report = check(&survey);
    assert!(!report.ready);
    assert_eq!(report.steps[0].lines, ["swanctl --load-all"]);
}

#[test]
fn a_name_that_is_not_loaded_is_answered_with_those_that_are() {
    let mut survey = survey();
    survey.only = vec![name("site", "nte")];
    let report = check(&survey);
    assert!(!report.ready);
    assert_eq!(
        report.steps[0].lines,
        ["site/net", "site/web", "site/ping", "site/host", "six/v6"]
    );
}

#[test]
fn programs_get_the_same_in_json() {
    let json = serde_json::to_value(check(&survey())).unwrap();
    assert_eq!(json["ready"], false);
    assert_eq!(json["children"][0]["state"], "change");
    assert_eq!(json["children"][0]["add"]["lines"][0], "policies = no");
    assert_eq!(json["host"][0]["verdict"], "ok");
}
