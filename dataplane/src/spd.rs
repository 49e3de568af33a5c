//! Step 4, outbound: which policy decides over a packet (RFC 4301 §4.4.1).
//!
//! Policies hang in one trie per family, at the networks of their remote selectors. A lookup finds
//! the longest network that holds the destination, tries its policies in order, then climbs to the
//! next shorter network:
//!
//! ```text
//!   trie: destination ──longest match──▶ node 10.1.2.0/24 ──▶ node 10.0.0.0/8 ──▶ node 0.0.0.0/0
//!                                          │ priority 1         │ …                 │ …
//!                                          │ priority 2         ▼                   ▼
//!                                          ▼ first whose selectors fit decides
//! ```

use crate::wire::Flow;
use esplane_api::{IpPrefix, SelectorPair};
use prefix_trie::PrefixMap;
use std::{net::IpAddr, ops::Range};

/// A tunnel's place in [`crate::Tables`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TunnelSlot(pub(crate) u32);

/// What becomes of a packet by policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Into this tunnel.
    Protect(TunnelSlot),
    /// In clear.
    Bypass,
    /// Nowhere.
    Discard,
}

/// One policy as the SPD wants it.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Which packets.
    pub selectors: SelectorPair,
    /// Lower decides first among policies of the same network.
    pub priority: u32,
    /// What becomes of them.
    pub decision: Decision,
}

/// The Security Policy Database, immutable.
#[derive(Default)]
pub struct Spd {
    v4: PrefixMap<(u32, u8), u32>,
    v6: PrefixMap<(u128, u8), u32>,
    nodes: Vec<Node>,
    /// Rules by node; within a node by priority, then as they came.
    rules: Vec<Rule>,
}

struct Node {
    rules: Range<u32>,
    /// The node of the next shorter network that has policies.
    shorter: Option<u32>,
}

impl Spd {
    /// From all rules, in the order in which they came.
    pub fn new(rules: impl IntoIterator<Item = Rule>) -> Self {
        let mut placed: Vec<(IpPrefix, Rule)> = rules
            .into_iter()
            .flat_map(|rule| {
                let networks = rule.selectors.remote.prefixes();
                networks.into_iter().map(move |network| (network, rule))
            })
            .collect();
        // Shorter networks first, so that a node finds the one it climbs to. Stable: equals stay as they came.
        placed.sort_by_key(|(network, rule)| (network.length(), *network, rule.priority));

        let mut spd = Self::default();
        for at_one_network in placed.chunk_by(|(a, _), (b, _)| a == b) {
            let Some((network, _)) = at_one_network.first() else {
                continue;
            };
            let first = spd.rules.len() as u32;
            spd.rules
                .extend(at_one_network.iter().map(|(_, rule)| *rule));
            let node = Node {
                rules: first..spd.rules.len() as u32,
                shorter: spd.longest_match(network.address(), network.length()),
            };
            let number = spd.nodes.len() as u32;
            spd.nodes.push(node);
            match network.address() {
                IpAddr::V4(v4) => spd.v4.insert((v4.to_bits(), network.length()), number),
                IpAddr::V6(v6) => spd.v6.insert((v6.to_bits(), network.length()), number),
            };
        }
        spd
    }

    /// The decision over an outbound packet: its source is on our side. `None` if no policy fits.
    #[inline]
    pub fn decide(&self, flow: &Flow) -> Option<Decision> {
        let mut at = self.longest_match(flow.destination, 128);
        while let Some(node) = at.and_then(|number| self.nodes.get(number as usize)) {
            let rules = &self.rules[node.rules.start as usize..node.rules.end as usize];
            if let Some(rule) = rules
                .iter()
                .find(|rule| fits_outbound(&rule.selectors, flow))
            {
                return Some(rule.decision);
            }
            at = node.shorter;
        }
        None
    }

    fn longest_match(&self, address: IpAddr, length: u8) -> Option<u32> {
        match address {
            IpAddr::V4(v4) => {
                let found = self.v4.get_lpm(&(v4.to_bits(), length.min(32)));
                found.map(|(_, node)| *node)
            }
            IpAddr::V6(v6) => self
                .v6
                .get_lpm(&(v6.to_bits(), length))
                .map(|(_, node)| *node),
        }
    }
}

/// Whether a packet from our side to the far one fits.
pub fn fits_outbound(selectors: &SelectorPair, flow: &Flow) -> bool {
    let (source_port, destination_port) = flow.ports.unzip();
    selectors
        .local
        .matches(flow.source, flow.protocol, source_port)
        && selectors
            .remote
            .matches(flow.destination, flow.protocol, destination_port)
}

/// Whether a packet from the far side to ours fits.
pub fn fits_inbound(selectors: &SelectorPair, flow: &Flow) -> bool {
    let (source_port, destination_port) = flow.ports.unzip();
    selectors
        .remote
        .matches(flow.source, flow.protocol, source_port)
        && selectors
            .local
            .matches(flow.destination, flow.protocol, destination_port)
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
