use super::*;
use crate::wire::{KeyV4, KeyV6};
use esplane_api::{IpPrefix, TrafficSelector};
use std::{
    cmp::Reverse,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

fn rule(local: &str, remote: &str, priority: u32, tunnel: u32) -> Rule {
    Rule {
        selectors: SelectorPair {
            local: local.parse().unwrap(),
            remote: remote.parse().unwrap(),
        },
        priority,
        decision: Decision::Protect(TunnelSlot(tunnel)),
    }
}

fn flow(source: &str, destination: &str, protocol: u8, ports: Option<(u16, u16)>) -> Flow {
    Flow {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        protocol,
        ports,
        tos: 0,
        df: false,
        total_bytes: 0,
    }
}

fn tunnel_of(spd: &Spd, destination: &str) -> Option<u32> {
    match spd.decide(&flow("10.0.0.1", destination, 17, Some((1, 53))))? {
        Decision::Protect(slot) => Some(slot.0),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_longest_remote_network_decides() {
    let any = "0.0.0.0/0";
    let spd = Spd::new([
        rule(any, any, 0, 0),
        rule(any, "10.1.0.0/16", 9, 1),
        rule(any, "10.1.2.0/24", 9, 2),
        rule(any, "10.1.2.3/32", 9, 3),
    ]);
    for (destination, tunnel) in [
        ("10.1.2.3", 3),
        ("10.1.2.4", 2),
        ("10.1.3.4", 1),
        ("9.9.9.9", 0),
    ] {
        assert_eq!(tunnel_of(&spd, destination), Some(tunnel), "{destination}");
    }
    assert_eq!(spd.decide(&flow("::1", "2001:db8::1", 17, None)), None);
}

#[test]
fn a_policy_that_does_not_fit_leaves_the_packet_to_a_shorter_network() {
    let spd = Spd::new([
        rule("0.0.0.0/0", "10.0.0.0/8", 0, 0),
        rule("192.168.0.0/16", "10.1.0.0/16", 0, 1),
        rule("0.0.0.0/0", "10.1.2.0/24[tcp]", 0, 2),
    ]);
    assert_eq!(tunnel_of(&spd, "10.1.2.9"), Some(0));
}

#[test]
fn among_equal_networks_priority_decides_then_order() {
    let any = "0.0.0.0/0";
    let spd = Spd::new([
        rule(any, "10.0.0.0/8", 5, 0),
        rule(any, "10.0.0.0/8[udp]", 1, 1),
        rule(any, "10.0.0.0/8[udp/53]", 1, 2),
    ]);
    assert_eq!(tunnel_of(&spd, "10.1.1.1"), Some(1));
}

#[test]
fn a_later_fragment_fits_only_where_any_port_will_do() {
    let any = "0.0.0.0/0";
    let spd = Spd::new([
        rule(any, "10.0.0.0/8[udp/53]", 0, 1),
        rule(any, "10.0.0.0/8[udp]", 1, 2),
    ]);
    let decided = |ports| spd.decide(&flow("10.0.0.1", "10.1.1.1", 17, ports));
    assert_eq!(
        decided(Some((9, 53))),
        Some(Decision::Protect(TunnelSlot(1)))
    );
    assert_eq!(decided(None), Some(Decision::Protect(TunnelSlot(2))));
}

#[test]
fn a_range_decides_over_exactly_its_addresses() {
    let spd = Spd::new([rule("0.0.0.0/0", "10.0.0.5-10.0.1.9", 0, 1)]);
    for (destination, inside) in [
        ("10.0.0.4", false),
        ("10.0.0.5", true),
        ("10.0.1.9", true),
        ("10.0.1.10", false),
    ] {
        assert_eq!(
            tunnel_of(&spd, destination).is_some(),
            inside,
            "{destination}"
        );
    }
}

#[test]
fn ipv6_networks_of_every_length() {
    let any = "::/0";
    let rules = (0..=128u8).map(|length| {
        let network = IpPrefix::truncated(
            "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff".parse().unwrap(),
            length,
        );
        rule(any, &network.to_string(), 0, u32::from(length))
    });
    let spd = Spd::new(rules);
    let decided = |destination| spd.decide(&flow("::1", destination, 6, None));
    assert_eq!(
        decided("2001:db8:ffff:ffff:ffff:ffff:ffff:ffff"),
        Some(Decision::Protect(TunnelSlot(128)))
    );
    assert_eq!(
        decided("2001:db8::1"),
        Some(Decision::Protect(TunnelSlot(32)))
    );
    assert_eq!(decided("8000::"), Some(Decision::Protect(TunnelSlot(0))));
}

/// What the SPD promises, without any structure.
fn by_the_letter(rules: &[(RulePlace, Rule)], flow: &Flow) -> Option<Decision> {
    let (source_port, destination_port) = flow.ports.unzip();
    let fits = |pair: &SelectorPair| {
        let (local, remote) = (pair.local, pair.remote);
        local.matches(flow.source, flow.protocol, source_port)
            && remote.matches(flow.destination, flow.protocol, destination_port)
    };
    let longest = |pair: &SelectorPair| {
        let networks = pair.remote.prefixes();
        let mut holding = networks
            .iter()
            .filter(|network| network.contains(flow.destination));
        holding.next().map(|network| network.length())
    };
    rules
        .iter()
        .filter(|(_, rule)| fits(&rule.selectors))
        .min_by_key(|(place, rule)| (Reverse(longest(&rule.selectors)), rule.priority, *place))
        .map(|(_, rule)| rule.decision)
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }

    /// Addresses differ in few bits, so that networks nest, meet and hold one another.
    fn address(&mut self, v4: bool) -> IpAddr {
        let crowded = |random: &mut Self, bits: u32| {
            (0..3).fold(0_u128, |all, _| all ^ 1 << random.below(u64::from(bits)))
        };
        if v4 {
            Ipv4Addr::from_bits(0x0a01_0203 ^ crowded(self, 32) as u32).into()
        } else {
            Ipv6Addr::from_bits(0x2001_0db8 << 96 ^ crowded(self, 128)).into()
        }
    }

    fn selector(&mut self, v4: bool) -> TrafficSelector {
        let mut selector = match self.below(8) {
            0 => {
                let (a, b) = (self.address(v4), self.address(v4));
                TrafficSelector::range(a.min(b), a.max(b)).unwrap()
            }
            1 if v4 => TrafficSelector::ANY_V4,
            1 => TrafficSelector::ANY_V6,
            _ => {
                let length = self.below(if v4 { 33 } else { 129 }) as u8;
                IpPrefix::truncated(self.address(v4), length).into()
            }
        };
        match self.below(6) {
            0 => selector = selector.with_protocol(17),
            1 => selector = selector.with_protocol(6),
            2 => selector = selector.with_protocol(17).with_ports(53..=60).unwrap(),
            _ => {}
        }
        selector
    }

    fn rule(&mut self) -> Rule {
        let v4 = self.below(3) > 0;
        let any = if v4 {
            TrafficSelector::ANY_V4
        } else {
            TrafficSelector::ANY_V6
        };
        let local = if self.below(2) == 0 {
            any
        } else {
            self.selector(v4)
        };
        Rule {
            selectors: SelectorPair {
                local,
                remote: self.selector(v4),
            },
            priority: self.below(3) as u32,
            decision: match self.below(8) {
                0 => Decision::Bypass,
                1 => Decision::Discard,
                _ => Decision::Protect(TunnelSlot(self.below(1000) as u32)),
            },
        }
    }

    fn flow(&mut self) -> Flow {
        let v4 = self.below(3) > 0;
        let protocol = [6, 17, 1][self.below(3) as usize];
        Flow {
            source: self.address(v4),
            destination: self.address(v4),
            protocol,
            ports: (protocol != 1 && self.below(4) > 0)
                .then(|| (self.below(99) as u16, self.below(99) as u16)),
            tos: 0,
            df: false,
            total_bytes: 0,
        }
    }
}

/// Every snapshot on the way decides as a list of all its rules would, then and later.
#[test]
fn random_changes_decide_as_a_list_of_rules_would() {
    for seed in 1..=12 {
        let mut random = Random(seed);
        let (mut writer, mut rules) = (SpdWriter::default(), Vec::new());
        let (mut snapshots, mut next) = (Vec::new(), 0);
        for _ in 0..12 {
            let goes = |random: &mut Random| random.below(5) == 0;
            let (removed, stay): (Vec<_>, Vec<_>) =
                rules.into_iter().partition(|_| goes(&mut random));
            let added: Vec<(RulePlace, Rule)> = (0..random.below(40))
                .map(|_| {
                    next += 1;
                    ((next, random.below(3) as u32), random.rule())
                })
                .collect();
            rules = stay;
            rules.extend(&added);
            writer.change(removed, added);
            snapshots.push((writer.spd(), rules.clone()));
        }
        for (step, (spd, rules)) in snapshots.iter().enumerate() {
            for _ in 0..300 {
                let flow = random.flow();
                assert_eq!(
                    spd.decide(&flow),
                    by_the_letter(rules, &flow),
                    "seed {seed}, step {step}, {flow:?}"
                );
            }
        }
    }
}

#[test]
fn without_rules_nothing_is_left_behind() {
    let mut random = Random(77);
    let rules: Vec<(RulePlace, Rule)> = (0..500).map(|at| ((at, 0), random.rule())).collect();
    let mut writer = SpdWriter::default();
    writer.change([], rules.clone());
    writer.change(rules.clone(), []);
    let spd = writer.spd();
    assert!((0..1000).all(|_| spd.decide(&random.flow()).is_none()));
    assert!(spd.v4.fib.is_empty() && spd.v6.fib.is_empty());
    writer.change([], rules.clone());
    let again = writer.spd();
    writer.change([], []);
    for _ in 0..1000 {
        let flow = random.flow();
        assert_eq!(again.decide(&flow), by_the_letter(&rules, &flow));
    }
}

/// The same packet as it is parsed in haste and as it is taken apart.
#[test]
fn a_flow_key_says_what_the_flow_says() {
    let mut v4 = [0; 28];
    (v4[0], v4[3], v4[9]) = (0x45, 28, 17);
    v4[12..24].copy_from_slice(&[10, 0, 0, 1, 10, 1, 1, 1, 0, 9, 0, 53]);
    let mut v6 = [0; 48];
    (v6[0], v6[5], v6[6], v6[8], v6[24]) = (0x60, 8, 17, 0x20, 0x20);
    (v6[23], v6[39], v6[41], v6[43]) = (1, 2, 9, 53);
    let spd = Spd::new([
        rule("10.0.0.1/32[udp/9]", "10.1.1.1/32[udp/53]", 0, 4),
        rule("2000::1/128[udp/9]", "2000::2/128[udp/53]", 0, 6),
    ]);
    let of_v4 = AnyEnds::of_v4(&KeyV4::parse(&v4).unwrap().0);
    let of_v6 = AnyEnds::of_v6(&KeyV6::parse(&v6).unwrap().0);
    for (packet, ends, tunnel) in [(&v4[..], of_v4, 4), (&v6[..], of_v6, 6)] {
        let decision = Some(Decision::Protect(TunnelSlot(tunnel)));
        assert_eq!(spd.decide(&Flow::parse(packet).unwrap()), decision);
        assert_eq!(spd.decide_ends(&ends), decision);
    }
}
