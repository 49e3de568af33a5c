//! What is wrong, where, and what would be right.

use super::*;

/// The text behind the head, with `«` before the value at fault, and a phrase of the report.
const WRONG_VALUES: &[(&str, &str)] = &[
    // Form.
    ("«colour: red\n", "unknown key `colour`; known here: name"),
    ("«lisen: 1\n", "did you mean `listen`?"),
    ("«name: again\n", "a second time; keep one"),
    ("workers: «{ a: 1 }\n", "a single value is expected"),
    ("peers: «3\n", "a list is expected here; write [A, B]"),
    ("peers:\n- «3\n", "keys with values are expected"),
    ("install_routes: «perhaps\n", "true or false"),
    ("route_metric: «many\n", "a whole number"),
    ("route_metric: «-1\n", "a whole number"),
    ("route_metric: «4294967296\n", "use 0 to 4294967295"),
    ("state_dir: «\"oops\n", "quote"),
    ("install_routes: «[\n", "a single value"),
    ("---\n«name: second\n", "a second YAML document"),
    ("state_dir: «*nowhere\n", "no anchor"),
    // The node.
    (
        "listen: «4500\n",
        "no ADDRESS:PORT; write one such as [::]:4500",
    ),
    ("listen: «0.0.0.0:0\n", "port 0 cannot be used"),
    ("listen: «example.net:4500\n", "no ADDRESS:PORT"),
    ("workers: «0\n", "use auto or 1 to 256"),
    ("workers: «all\n", "use auto or"),
    ("worker_ports: «none\n", "use auto or 1 to 65521"),
    ("worker_ports: «65522\n", "use auto or 1 to 65521"),
    ("worker_ports: «4490\n", "all listen on 4500"),
    (
        "worker_ports: «auto\n$PEER parallel_sas: 1 }\n",
        "give one `parallel_sas: 2` or more",
    ),
    ("api: { listen: «localhost }\n", "no ADDRESS:PORT"),
    ("api: { socket: «esplane.sock }\n", "an absolute path"),
    ("api: { «port: 1 }\n", "unknown key `port`"),
    (
        "log: { level: «loud }\n",
        "use off, error, warn, info, debug, trace",
    ),
    ("log: { format: «xml }\n", "use human, json"),
    // strongSwan.
    ("strongswan: { «kernel: 1 }\n", "unknown key `kernel`"),
    ("strongswan: { mode: «charon }\n", "use kernel, preload"),
    ("strongswan: { vici: «charon.vici }\n", "an absolute path"),
    (
        "strongswan: { socket: «/run/x.sock }\n",
        "only `mode: preload` has this socket",
    ),
    (
        "strongswan: { mark: «dead }\n",
        "no mark; write what swanctl.conf has",
    ),
    ("strongswan: { mark: «0x00/0xff }\n", "choose another"),
    ("strongswan: { port: «0 }\n", "use 1 to 65535"),
    (
        "listen: «0.0.0.0:4500\nstrongswan: {}\n",
        "charon has port 4500, where its tunnels' ESP arrives; peers and static SAs need another",
    ),
    (
        "strongswan: { port: «4501 }\n",
        "write `listen: \"[::]:4502\"`",
    ),
    // Peers.
    (
        "peers:\n- { public_key: $2, «routes: [10.2.0.0/16] }\n",
        "the key `name` is missing",
    ),
    (
        "peers:\n- { name: «a b, public_key: $2, routes: [10.2.0.0/16] }\n",
        "letters, digits",
    ),
    (
        "peers:\n- { name: p, public_key: «c2hvcnQ=, routes: [10.2.0.0/16] }\n",
        "44 characters",
    ),
    (
        "peers:\n- { name: p, public_key: «$1, routes: [10.2.0.0/16] }\n",
        "this node's own public key",
    ),
    (
        "peers:\n- { name: p, public_key: $2, routes: «[] }\n",
        "without routes carries nothing",
    ),
    (
        "peers:\n- { name: p, public_key: $2, routes: [«10.2.0.1/16] }\n",
        "write 10.2.0.0/16",
    ),
    (
        "peers:\n- { name: p, public_key: $2, routes: [10.2.0.0/16, «10.3/16] }\n",
        "such as 10.1.0.0/16",
    ),
    (
        "peers:\n- { name: p, public_key: $2, routes: [10.2.0.0/16, «10.2.0.0/16] }\n",
        "leads to `p` already (line 5)",
    ),
    (
        "peers:\n- { name: p, public_key: $2, routes: [«10.1.0.1/32] }\n",
        "this node's own address",
    ),
    (
        "$PEER endpoint: «192.0.2.1 }\n",
        "ADDRESS:PORT or NAME:PORT",
    ),
    ("$PEER endpoint: «192.0.2.300:4500 }\n", "no endpoint"),
    ("$PEER endpoint: «192.0.2.1:0 }\n", "nothing can be sent to"),
    (
        "$PEER endpoint: «\"[::]:4500\" }\n",
        "nothing can be sent to",
    ),
    ("$PEER endpoint: «host_:99999 }\n", "no endpoint"),
    (
        "peers:\n- { name: p, public_key: $2, routes: [10.0.0.0/8], endpoint: «10.1.3.4:4500 }\n",
        "for what comes from 10.1.0.0/16, and inside that, too: ESP would run in circles",
    ),
    (
        "peers:\n- { name: p, public_key: $2, routes: [«\"::/0\"] }\n",
        "`interface.addresses` names none; add this node's address in such a network, as `fd01::1/64`",
    ),
    (
        "$PEER psk_file: «no.psk }\n",
        "does not exist; make one with `esplane genpsk`",
    ),
    ("$PEER psk_file: «open.key }\n", "chmod 600"),
    ("$PEER psk_file: «text.key }\n", "holds no pre-shared key"),
    ("$PEER suites: «[] }\n", "name at least one"),
    (
        "$PEER suites: [«aes128cbc] }\n",
        "use aes128gcm16, aes256gcm16 or",
    ),
    (
        "$PEER suites: [aes128gcm16, «aes128gcm16] }\n",
        "a second time",
    ),
    ("$PEER kem: «kyber }\n", "use mlkem768, mlkem512, off"),
    ("$PEER initiate: «now }\n", "use start, demand"),
    ("$PEER initiate: «start }\n", "add its `endpoint`"),
    ("$PEER keepalive_seconds: «0 }\n", "use 1 to 3600"),
    ("$PEER dead_after_seconds: «1 }\n", "use 3 to 3600"),
    ("$PEER rekey: {seconds: «0} }\n", "use 1 to 86400"),
    ("$PEER rekey: {«minutes: 5} }\n", "unknown key `minutes`"),
    ("$PEER esn: «64 }\n", "true or false"),
    ("$PEER window_packets: «16 }\n", "use 32 to 65536"),
    ("$PEER window_packets: «99999999999 }\n", "use 32 to 65536"),
    ("$PEER parallel_sas: «0 }\n", "use 1 to 16"),
    ("$PEER parallel_sas: «17 }\n", "use 1 to 16"),
    ("$PEER df: «keep }\n", "use clear, set, copy"),
    (
        "$PEER }\n- { name: «p, public_key: $3, routes: [10.3.0.0/16] }\n",
        "the name of the tunnel in line 5",
    ),
    (
        "$PEER }\n- { name: q, public_key: «$2, routes: [10.3.0.0/16] }\n",
        "the peer in line 5 has this public key",
    ),
    (
        "$PEER }\n- { name: q, public_key: $3, routes: [«10.2.0.0/16] }\n",
        "leads to `p` already (line 5)",
    ),
    // Static SAs.
    ("$SA local: «\"::1\" }\n", "different address families"),
    ("$SA local: «here }\n", "write an IPv4 or IPv6 address"),
    (
        "$SA udp: {local_port: «4501} }\n",
        "the port of `listen`, 4500",
    ),
    ("$SA udp: {remote_port: «0} }\n", "use 1 to 65535"),
    (
        "$SA lifetime: «{soft: {bytes: 2}, hard: {bytes: 1}} }\n",
        "at most that",
    ),
    (
        "$SA lifetime: «{hard: {packets: 0}} }\n",
        "before its first packet",
    ),
    (
        "$SA selectors: [{local: 10.1.0.0/16, remote: «ten}] }\n",
        "such as",
    ),
    (
        "$SA selectors: [{local: 10.1.0.0/16, remote: «\"2001:db8::/32\"}] }\n",
        "different address families",
    ),
    (
        "$SA }\n- { name: «s, remote: 192.0.2.3, suite: aes128gcm16, inbound: {spi: 0x1002, key: $B}, outbound: {spi: 0x1, key: $A}, routes: [10.8.0.0/16] }\n",
        "the name of the tunnel in line 5",
    ),
    (
        "static_sas:\n- { name: s, remote: «0.0.0.0, suite: aes128gcm16, inbound: {spi: 0x1001, key: $A}, outbound: {spi: 0x2001, key: $B}, routes: [10.9.0.0/16] }\n",
        "unicast address",
    ),
    (
        "static_sas:\n- { name: s, remote: «10.1.0.9, suite: aes128gcm16, inbound: {spi: 0x1001, key: $A}, outbound: {spi: 0x2001, key: $B}, routes: [10.0.0.0/8] }\n",
        "ESP would run in circles",
    ),
    (
        "static_sas:\n- { name: s, remote: 192.0.2.2, suite: «3des, inbound: {spi: 0x1001, key: $A}, outbound: {spi: 0x2001, key: $B}, routes: [10.9.0.0/16] }\n",
        "no AEAD suite",
    ),
    (
        "static_sas:\n- { name: s, remote: 192.0.2.2, suite: aes128gcm16, inbound: {spi: «255, key: $A}, outbound: {spi: 0x2001, key: $B}, routes: [10.9.0.0/16] }\n",
        "is reserved",
    ),
    (
        "static_sas:\n- { name: s, remote: 192.0.2.2, suite: aes128gcm16, inbound: {spi: 0x1001, key: «a1b2}, outbound: {spi: 0x2001, key: $B}, routes: [10.9.0.0/16] }\n",
        "takes 20 bytes (key 16 and salt 4), got 2",
    ),
    (
        "static_sas:\n- { name: s, remote: 192.0.2.2, suite: aes128gcm16, inbound: {spi: 0x1001, key: «$Ax}, outbound: {spi: 0x2001, key: $B}, routes: [10.9.0.0/16] }\n",
        "hexadecimal digits; aes128gcm16 takes 40",
    ),
    (
        "static_sas:\n- { name: s, remote: 192.0.2.2, suite: aes128gcm16, inbound: {spi: «0x1001}, outbound: {spi: 0x2001, key: $B}, routes: [10.9.0.0/16] }\n",
        "add `key_file: …`",
    ),
    (
        "static_sas:\n- { name: s, remote: 192.0.2.2, suite: aes128gcm16, inbound: {spi: 0x1001, key: $A, key_file: «sa.key}, outbound: {spi: 0x2001, key: $B}, routes: [10.9.0.0/16] }\n",
        "keep one",
    ),
    (
        "static_sas:\n- { name: s, remote: 192.0.2.2, suite: aes128gcm16, inbound: {spi: 0x1001, key_file: «open.key}, outbound: {spi: 0x2001, key: $B}, routes: [10.9.0.0/16] }\n",
        "mode 0640",
    ),
    (
        "static_sas:\n- { name: s, remote: 192.0.2.2, suite: aes128gcm16, inbound: {spi: 0x1001, key: $A}, outbound: {spi: 0x2001, key: «$A}, routes: [10.9.0.0/16] }\n",
        "both directions have the same key",
    ),
    (
        "static_sas:\n- { name: «s, remote: 192.0.2.2, suite: aes128gcm16, inbound: {spi: 0x1001, key: $A}, outbound: {spi: 0x2001, key: $B} }\n",
        "carries nothing",
    ),
    (
        "$SA }\n- { name: t, remote: 192.0.2.3, suite: aes128gcm16, inbound: {spi: «0x1001, key: $B}, outbound: {spi: 0x2002, key: $A}, routes: [10.8.0.0/16] }\n",
        "the inbound SA in line 5 has the SPI 0x00001001",
    ),
    (
        "$SA }\n- { name: t, remote: 192.0.2.3, suite: aes128gcm16, inbound: {spi: 0x1002, key: $A}, outbound: {spi: «0x2002, key: $B}, routes: [10.8.0.0/16] }\n",
        "the same nonces would be used twice",
    ),
];

#[test]
fn every_wrong_value_is_reported_where_it_stands_and_says_what_would_be_right() {
    let home = Home::new();
    let mut failures = Vec::new();
    for (row, phrase) in WRONG_VALUES {
        let row = row
            .replace("$PEER", PEER_WITH.trim_end())
            .replace("$SA", SA_WITH.trim_end());
        failures.extend(expect(&home, &format!("{HEAD}{row}"), phrase));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn the_node_itself_can_be_wrong_too() {
    let home = Home::new();
    let mut failures = Vec::new();
    for (text, phrase) in [
        ("«interface: {name: esp0}\n", "the key `name` is missing"),
        ("«name: node\n", "the key `interface` is missing here"),
        (
            "name: «bad name\ninterface: {name: esp0}\n",
            "cannot be a name",
        ),
        ("name: «[n]\ninterface: {name: esp0}\n", "a single value"),
        (
            "name: n\ninterface: {name: «a-very-long-name}\n",
            "1 to 15 characters",
        ),
        (
            "name: n\ninterface: {name: «a/b}\n",
            "cannot name an interface",
        ),
        (
            "name: n\ninterface: {name: «..}\n",
            "cannot name an interface",
        ),
        (
            "name: n\ninterface: {name: e, addresses: [«10.1.0.1]}\n",
            "ADDRESS/LENGTH",
        ),
        (
            "name: n\ninterface: {name: e, addresses: [«10.1.0.1/33]}\n",
            "this address family has 32 bits",
        ),
        (
            "name: n\ninterface: {name: e, addresses: [«127.0.0.1/8]}\n",
            "a unicast address",
        ),
        (
            "name: n\ninterface: {name: e, addresses: [10.1.0.1/16, «10.1.0.1/16]}\n",
            "a second time",
        ),
        (
            "name: n\ninterface: {name: e, mtu: «100}\n",
            "use auto or 576 to 9000",
        ),
        (
            "name: n\ninterface: {name: e, mtu: «1279, addresses: [\"2001:db8::1/64\"]}\n",
            "1280 to 9000",
        ),
        (
            "name: n\ninterface: {name: e}\nprivate_key_file: «none.key\n",
            "esplane keygen -o FILE",
        ),
        (
            "name: n\ninterface: {name: e}\nprivate_key_file: «open.key\n",
            "(mode 0640); run: chmod 600",
        ),
        (
            "name: n\ninterface: {name: e}\nprivate_key_file: «text.key\n",
            "holds no private key",
        ),
        (
            "name: n\ninterface: {name: e}\nprivate_key_file: «huge.key\n",
            "too large",
        ),
        (
            "name: n\ninterface: {name: e}\nprivate_key_file: «.\n",
            "no regular file",
        ),
        (
            "name: n\ninterface: {name: e}\npeers:\n- {name: «p, public_key: $2, routes: [10.2.0.0/16]}\n",
            "add `private_key_file: …`",
        ),
        ("«just a text\n", "keys with values"),
    ] {
        failures.extend(expect(&home, text, phrase));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

/// A problem stands at the mark and says the phrase; nothing shows a key.
fn expect(home: &Home, marked: &str, phrase: &str) -> Option<String> {
    let before = &marked[..marked.find('«').expect("every row has a mark")];
    let line = before.matches('\n').count() + 1;
    let column = filled(before.rsplit('\n').next().unwrap()).chars().count() + 1;
    let text = marked.replace('«', "");
    let Err(error) = home.config(&text) else {
        return Some(format!("accepted:\n{text}"));
    };
    let shown = error.to_string();
    let found = error.problems().iter().any(|problem| {
        (problem.line, problem.column) == (line, column) && problem.message.contains(phrase)
    });
    let leaked = [filled("$A"), filled("$B")]
        .iter()
        .any(|secret| shown.contains(secret));
    match found && !leaked {
        true => None,
        false => Some(format!(
            "expected {line}:{column} and `{phrase}`, no key, and got:\n{shown}"
        )),
    }
}

#[test]
fn the_report_quotes_the_line_with_a_caret_and_starts_like_a_compilers() {
    let home = Home::new();
    let error = home
        .config("name: n\ninterface: {name: e}\nworkers: many\n")
        .unwrap_err();
    let file = home.0.path().join("esplane.yaml");
    assert_eq!(
        error.to_string(),
        format!(
            "{}:3:10: `many` is not possible here; use auto or 1 to 256\n   |\n 3 | workers: many\n   |          ^^^^",
            file.display()
        )
    );
}

#[test]
fn all_wrong_values_are_reported_at_once_in_the_order_of_the_file() {
    let home = Home::new();
    let text = "name: a b\ninterface: {name: e, mtu: 1}\nlisten: x\nlog: {level: loud}\npeers:\n- {name: p, public_key: x, routes: [y]}\n";
    let error = home.config(text).unwrap_err();
    let lines: Vec<usize> = error
        .problems()
        .iter()
        .map(|problem| problem.line)
        .collect();
    assert_eq!(lines, [1, 2, 3, 4, 6, 6, 6]);
    let paths: Vec<&str> = error
        .problems()
        .iter()
        .map(|problem| problem.path.as_str())
        .collect();
    assert!(
        paths.contains(&"peers[0].routes[0]") && paths.contains(&"interface.mtu"),
        "{paths:?}"
    );
}

#[test]
fn of_a_thousand_problems_the_first_are_shown_and_all_where_that_is_asked_for() {
    let home = Home::new();
    let peers: String = (0..1500)
        .map(|number| {
            let network = format!("10.{}.{}.0/24", number / 256, number % 256);
            format!("- {{name: p{number}, public_key: x, routes: [{network}]}}\n")
        })
        .collect();
    let error = home
        .config(&format!("name: n\ninterface: {{name: e}}\npeers:\n{peers}"))
        .unwrap_err();
    assert_eq!(error.problems().len(), 1500 + 1); // and no private key
    let shown = error.to_string();
    let file = home.0.path().join("esplane.yaml").display().to_string();
    let told = |text: &str| text.lines().filter(|line| line.starts_with(&file)).count();
    assert_eq!(told(&shown), SHOWN_PROBLEMS + 1);
    assert!(
        shown.ends_with(&format!(
            "\n{file}: and 1481 more; `esplane check -c {file}` lists them all"
        )),
        "{shown}"
    );
    let all = AtLength(error).to_string();
    assert_eq!(told(&all), 1501);
    assert!(all.contains(":1503:29: ") && !all.contains("more"), "{all}");
}

#[test]
fn a_file_that_is_no_configuration_is_refused_with_the_reason() {
    let home = Home::new();
    let path = |name: &str| home.0.path().join(name);
    let refused = |name: &str, phrase: &str| {
        let error = Config::load(&path(name)).unwrap_err().to_string();
        assert!(error.contains(phrase) && error.contains(name), "{error}");
    };
    refused("nowhere.yaml", "cannot read the configuration");
    fs::create_dir(path("directory.yaml")).unwrap();
    refused("directory.yaml", "this is a directory");
    for (name, content, phrase) in [
        (
            "empty.yaml",
            &b""[..],
            "at least `name` and `interface` are needed",
        ),
        ("comments.yaml", b"# nothing\n---\n", "holds no settings"),
        (
            "latin1.yaml",
            b"name: n\n# caf\xe9\n",
            "not UTF-8 at byte 13 (line 2)",
        ),
        (
            "tab.yaml",
            b"name: n\ninterface:\n\tname: e\n",
            "spaces only",
        ),
        (
            "binary.yaml",
            b"\x7fELF\x02\x01\x01\0\0\0\0",
            "binary.yaml:1:",
        ),
    ] {
        fs::write(path(name), content).unwrap();
        refused(name, phrase);
    }
    fs::write(path("endless.yaml"), vec![b'#'; (4 << 20) + 1]).unwrap();
    refused("endless.yaml", "larger than 4 MiB");
}

#[test]
fn bombs_are_refused_before_they_go_off() {
    let home = Home::new();
    // Ten aliases of ten aliases of …: 10^9 texts if it were believed.
    let mut laughs = String::from("name: n\ninterface: {name: e}\npeers:\n- &a0 [lol]\n");
    for level in 1..10 {
        let before = format!("*a{}, ", level - 1).repeat(10);
        laughs += &format!("- &a{level} [{before}]\n");
    }
    let aliases = format!(
        "name: n\ninterface: {{name: e, addresses: [&a x, {}]}}\n",
        "*a, ".repeat(100_000)
    );
    for bomb in [
        laughs,
        aliases,
        format!("name: {}x", "[".repeat(100_000)),
        format!("name: {}", "{a: ".repeat(100_000)),
        (0..2000)
            .map(|depth| format!("{}a:\n", " ".repeat(depth)))
            .collect(),
        format!(
            "name: n\ninterface: {{name: e, addresses: [{}]}}\n",
            "x,".repeat(600_000)
        ),
        "---\n".repeat(100_000) + "name: n\n",
        format!(
            "name: n\ninterface: {{name: e}}\nlisten: {}\n",
            "9".repeat(1 << 20)
        ),
    ] {
        let error = home.config(&bomb).unwrap_err();
        assert!(error.to_string().len() < 4 << 20);
    }
}

#[test]
fn no_text_makes_the_parser_panic() {
    let home = Home::new();
    // Without key files: they are not what is tried here.
    let text = "name: n\ninterface: { name: e, mtu: 1400 }\nlisten: \"[::]:1\"\npeers:\n- { name: p, public_key: x }\n";
    for end in (0..text.len()).filter(|end| text.is_char_boundary(*end)) {
        let _ = home.config(&text[..end]);
        for strange in [
            "\0", "\u{feff}", "\u{1b}", "&", "*", "!", "%", "\r", "🦀", "\t", "? ",
        ] {
            let _ = home.config(&format!("{}{strange}{}", &text[..end], &text[end..]));
        }
    }
}
