use crate::{IpPrefix, PrefixError};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    str::FromStr,
};

/// One end of the traffic an SA may carry: addresses, protocol, ports (RFC 4301 §4.4.1.1).
///
/// Written as swanctl writes it, with ranges besides networks: `10.1.0.0/16`, `10.1.0.7`,
/// `10.1.0.5-10.1.0.9`, each with an optional `[PROTOCOL]` or `[PROTOCOL/PORT]` or
/// `[PROTOCOL/FIRST-LAST]`; protocols are numbers or tcp, udp, icmp, icmpv6, sctp.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TrafficSelector {
    first: IpAddr,
    last: IpAddr,
    protocol: Option<u8>,
    first_port: u16,
    last_port: u16,
}

const PROTOCOLS: [(&str, u8); 5] = [
    ("icmp", 1),
    ("tcp", 6),
    ("udp", 17),
    ("icmpv6", 58),
    ("sctp", 132),
];

impl TrafficSelector {
    /// Everything in IPv4.
    pub const ANY_V4: Self = Self::any_between(
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V4(Ipv4Addr::BROADCAST),
    );
    /// Everything in IPv6.
    pub const ANY_V6: Self = Self::any_between(
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        IpAddr::V6(Ipv6Addr::from_bits(u128::MAX)),
    );

    const fn any_between(first: IpAddr, last: IpAddr) -> Self {
        Self {
            first,
            last,
            protocol: None,
            first_port: 0,
            last_port: u16::MAX,
        }
    }

    /// All addresses from `first` to `last`, any protocol and port.
    pub fn range(first: IpAddr, last: IpAddr) -> Result<Self, SelectorError> {
        if first.is_ipv4() != last.is_ipv4() {
            return Err(SelectorError::MixedFamilies { first, last });
        }
        if first > last {
            return Err(SelectorError::AddressesReversed { first, last });
        }
        Ok(Self::any_between(first, last))
    }

    /// The same addresses, narrowed to one protocol.
    #[must_use]
    pub fn with_protocol(mut self, protocol: u8) -> Self {
        self.protocol = Some(protocol);
        self
    }

    /// The same, narrowed to ports; only protocols that have ports can be (RFC 4301 §4.4.1.1).
    pub fn with_ports(mut self, ports: RangeInclusive<u16>) -> Result<Self, SelectorError> {
        match self.protocol {
            Some(6 | 17 | 33 | 132 | 136) => {}
            _ => return Err(SelectorError::PortsWithoutProtocol),
        }
        if ports.is_empty() {
            return Err(SelectorError::PortsReversed {
                first: *ports.start(),
                last: *ports.end(),
            });
        }
        (self.first_port, self.last_port) = ports.into_inner();
        Ok(self)
    }

    /// The lowest address.
    pub fn first(&self) -> IpAddr {
        self.first
    }

    /// The highest address.
    pub fn last(&self) -> IpAddr {
        self.last
    }

    /// The one protocol it is narrowed to, if it is.
    pub fn protocol(&self) -> Option<u8> {
        self.protocol
    }

    /// The ports; `0..=65535` means any, and packets without visible ports too.
    pub fn ports(&self) -> RangeInclusive<u16> {
        self.first_port..=self.last_port
    }

    /// Whether any port will do.
    pub fn any_port(&self) -> bool {
        self.first_port == 0 && self.last_port == u16::MAX
    }

    /// Whether one end of a packet fits. `port` is `None` where the packet shows none (another
    /// protocol, or a later fragment): then only a selector for any port fits.
    pub fn matches(&self, address: IpAddr, protocol: u8, port: Option<u16>) -> bool {
        self.contains(address)
            && self.protocol.is_none_or(|wanted| wanted == protocol)
            && (self.any_port() || port.is_some_and(|port| self.ports().contains(&port)))
    }

    /// Whether the address lies in the range (and family).
    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.first.is_ipv4() && self.first <= address && address <= self.last
    }

    /// The fewest networks that together are exactly the address range, in order.
    pub fn prefixes(&self) -> Vec<IpPrefix> {
        let (mut at, last, bits, v4) = match (self.first, self.last) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                (u128::from(a.to_bits()), u128::from(b.to_bits()), 32, true)
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits(), b.to_bits(), 128, false),
            _ => return Vec::new(), // cannot be made: both ends share a family
        };
        let mut networks = Vec::new();
        loop {
            // The largest network that starts here and ends no later than the range.
            let aligned = at.trailing_zeros().min(bits);
            let host_bits = (0..=aligned)
                .rev()
                .find(|&host| Self::end_of(at, host) <= last)
                .unwrap_or(0);
            let address = if v4 {
                IpAddr::V4(Ipv4Addr::from_bits(at as u32))
            } else {
                IpAddr::V6(Ipv6Addr::from_bits(at))
            };
            networks.push(IpPrefix::truncated(address, (bits - host_bits) as u8));
            let end = Self::end_of(at, host_bits);
            if end >= last {
                return networks;
            }
            at = end + 1;
        }
    }

    fn end_of(start: u128, host_bits: u32) -> u128 {
        start
            | 1u128
                .checked_shl(host_bits)
                .map_or(u128::MAX, |size| size - 1)
    }
}

impl From<IpPrefix> for TrafficSelector {
    fn from(prefix: IpPrefix) -> Self {
        Self::any_between(prefix.address(), prefix.last())
    }
}

/// Why something is no [`TrafficSelector`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    /// Not in any of the forms.
    #[error(
        "`{0}` is no traffic selector; write a network, address or range, then optionally [PROTOCOL/PORTS], such as 10.1.0.0/16[tcp/80-443]"
    )]
    Syntax(String),
    /// The network within is wrong.
    #[error(transparent)]
    Prefix(#[from] PrefixError),
    /// One end is IPv4, the other IPv6.
    #[error("the range {first}-{last} mixes address families")]
    MixedFamilies {
        /// As given.
        first: IpAddr,
        /// As given.
        last: IpAddr,
    },
    /// The range is empty.
    #[error("the range {first}-{last} runs backwards; write {last}-{first}")]
    AddressesReversed {
        /// As given.
        first: IpAddr,
        /// As given.
        last: IpAddr,
    },
    /// The port range is empty.
    #[error("the port range {first}-{last} runs backwards; write {last}-{first}")]
    PortsReversed {
        /// As given.
        first: u16,
        /// As given.
        last: u16,
    },
    /// Ports mean nothing without a protocol that has them.
    #[error("ports need a protocol that has them: tcp, udp, sctp, 33 (DCCP) or 136 (UDP-Lite)")]
    PortsWithoutProtocol,
}

impl FromStr for TrafficSelector {
    type Err = SelectorError;
    fn from_str(text: &str) -> Result<Self, SelectorError> {
        let syntax = || SelectorError::Syntax(text.to_owned());
        let (addresses, rest) = match text.split_once('[') {
            Some((addresses, rest)) => {
                (addresses, Some(rest.strip_suffix(']').ok_or_else(syntax)?))
            }
            None => (text, None),
        };
        let selector = if let Some((first, last)) = addresses.split_once('-') {
            Self::range(
                first.parse().map_err(|_| syntax())?,
                last.parse().map_err(|_| syntax())?,
            )?
        } else if addresses.contains('/') {
            addresses.parse::<IpPrefix>()?.into()
        } else {
            IpPrefix::host(addresses.parse().map_err(|_| syntax())?).into()
        };
        let Some(rest) = rest else {
            return Ok(selector);
        };
        let (protocol, ports) = match rest.split_once('/') {
            Some((protocol, ports)) => (protocol, Some(ports)),
            None => (rest, None),
        };
        let protocol = PROTOCOLS
            .iter()
            .find(|(name, _)| *name == protocol)
            .map(|(_, number)| *number)
            .or_else(|| protocol.parse().ok())
            .ok_or_else(syntax)?;
        let selector = selector.with_protocol(protocol);
        let Some(ports) = ports else {
            return Ok(selector);
        };
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        selector
            .with_ports(first.parse().map_err(|_| syntax())?..=last.parse().map_err(|_| syntax())?)
    }
}

impl TryFrom<String> for TrafficSelector {
    type Error = SelectorError;
    fn try_from(text: String) -> Result<Self, SelectorError> {
        text.parse()
    }
}

impl From<TrafficSelector> for String {
    fn from(selector: TrafficSelector) -> String {
        selector.to_string()
    }
}

impl fmt::Display for TrafficSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefixes()[..] {
            [network] => write!(f, "{network}")?,
            _ => write!(f, "{}-{}", self.first, self.last)?,
        }
        let Some(protocol) = self.protocol else {
            return Ok(());
        };
        match PROTOCOLS.iter().find(|(_, number)| *number == protocol) {
            Some((name, _)) => write!(f, "[{name}")?,
            None => write!(f, "[{protocol}")?,
        }
        match (self.any_port(), self.first_port == self.last_port) {
            (true, _) => write!(f, "]"),
            (false, true) => write!(f, "/{}]", self.first_port),
            (false, false) => write!(f, "/{}-{}]", self.first_port, self.last_port),
        }
    }
}

impl fmt::Debug for TrafficSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Both ends of a packet flow as this gateway sees it: our side and the far side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SelectorPair {
    /// Our private network: source of outbound packets, destination of inbound ones.
    pub local: TrafficSelector,
    /// The far private network.
    pub remote: TrafficSelector,
}

impl SelectorPair {
    /// Anything of ours to and from `remote`, whatever its family.
    pub fn to(remote: IpPrefix) -> Self {
        Self {
            local: if remote.address().is_ipv4() {
                TrafficSelector::ANY_V4
            } else {
                TrafficSelector::ANY_V6
            },
            remote: remote.into(),
        }
    }
}

impl fmt::Display for SelectorPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} === {}", self.local, self.remote)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_parses_and_prints_back() {
        for text in [
            "10.1.0.0/16",
            "10.1.0.7/32",
            "10.1.0.5-10.1.0.9",
            "10.1.0.0/16[tcp]",
            "10.1.0.0/16[tcp/80]",
            "2001:db8::/32[udp/1000-2000]",
            "10.1.0.0/16[50]",
        ] {
            assert_eq!(text.parse::<TrafficSelector>().unwrap().to_string(), text);
        }
        assert_eq!(
            "10.1.0.7".parse::<TrafficSelector>().unwrap().to_string(),
            "10.1.0.7/32"
        );
    }

    #[test]
    fn wrong_texts_say_what_would_be_right() {
        for (text, hint) in [
            ("ten", "such as"),
            ("10.0.0.9-10.0.0.1", "write 10.0.0.1-10.0.0.9"),
            ("10.0.0.1-::1", "mixes"),
            ("10.0.0.0/8[/80]", "such as"),
            ("10.0.0.0/8[icmp/80]", "ports need a protocol"),
            ("10.0.0.0/8[tcp/90-80]", "write 80-90"),
            ("10.0.0.1/8", "write 10.0.0.0/8"),
        ] {
            let error = text.parse::<TrafficSelector>().unwrap_err().to_string();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }

    #[test]
    fn a_packet_without_ports_fits_only_any_port() {
        let any: TrafficSelector = "10.0.0.0/8[udp]".parse().unwrap();
        let some: TrafficSelector = "10.0.0.0/8[udp/53]".parse().unwrap();
        let host = "10.1.1.1".parse().unwrap();
        assert!(any.matches(host, 17, None) && !some.matches(host, 17, None));
        assert!(some.matches(host, 17, Some(53)) && !some.matches(host, 17, Some(54)));
        assert!(!any.matches(host, 6, Some(53)));
        assert!(!any.matches("::1".parse().unwrap(), 17, None));
    }

    #[test]
    fn ranges_become_the_fewest_networks() {
        let networks = |text: &str| text.parse::<TrafficSelector>().unwrap().prefixes();
        let expected: Vec<IpPrefix> = ["10.0.0.1/32", "10.0.0.2/31", "10.0.0.4/31", "10.0.0.6/32"]
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        assert_eq!(networks("10.0.0.1-10.0.0.6"), expected);
        assert_eq!(TrafficSelector::ANY_V4.prefixes(), [IpPrefix::ALL_V4]);
        assert_eq!(TrafficSelector::ANY_V6.prefixes(), [IpPrefix::ALL_V6]);
        assert_eq!(networks("255.255.255.254-255.255.255.255").len(), 1);
    }
}
