//! Traffic selectors as charon prints them: `10.1.0.0/16[tcp/http]`, `10.0.0.1..10.0.0.9`, `dynamic`.
//!
//! charon writes the names of its host's /etc/protocols and /etc/services in place of numbers
//! wherever these have one; [`Names`] turns them back.

use esplane_api::{IpPrefix, SelectorError, TrafficSelector};
use std::collections::HashMap;

/// What names of protocols and services mean.
#[derive(Clone, Debug)]
pub struct Names {
    protocols: HashMap<String, u8>,
    /// By the name of the service and its protocol's.
    services: HashMap<(String, String), u16>,
}

/// What Debian's /etc/protocols calls those that tunnels are narrowed to.
const PROTOCOLS: [(&str, u8); 20] = [
    ("icmp", 1),
    ("igmp", 2),
    ("ipencap", 4),
    ("tcp", 6),
    ("egp", 8),
    ("igp", 9),
    ("udp", 17),
    ("dccp", 33),
    ("ipv6", 41),
    ("rsvp", 46),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("ipv6-icmp", 58),
    ("icmpv6", 58),
    ("ospf", 89),
    ("pim", 103),
    ("vrrp", 112),
    ("l2tp", 115),
    ("sctp", 132),
];

impl Default for Names {
    /// The usual protocols and no service: a host without these two files.
    fn default() -> Self {
        let protocols = PROTOCOLS.map(|(name, number)| (name.to_owned(), number));
        Self {
            protocols: protocols.into(),
            services: HashMap::new(),
        }
    }
}

impl Names {
    /// What these texts of /etc/protocols and /etc/services say, besides the usual. Lines that say
    /// nothing are passed over.
    pub fn from_files(protocols: &str, services: &str) -> Self {
        let mut names = Self::default();
        for (name, number) in lines(protocols) {
            if let Ok(number) = number.parse() {
                names.protocols.insert(name.to_owned(), number);
            }
        }
        for (name, port) in lines(services) {
            let Some((port, protocol)) = port.split_once('/') else {
                continue;
            };
            if let Ok(port) = port.parse() {
                let key = (name.to_owned(), protocol.to_owned());
                names.services.entry(key).or_insert(port);
            }
        }
        names
    }

    /// Reads a selector as charon prints it.
    pub fn selector(&self, text: &str) -> Result<TrafficSelector, SelectorTextError> {
        let error = |problem| SelectorTextError {
            text: text.to_owned(),
            problem,
        };
        self.read(text).map_err(error)
    }

    fn read(&self, text: &str) -> Result<TrafficSelector, SelectorProblem> {
        let (addresses, narrowed) = match text.split_once('[') {
            Some((addresses, rest)) => {
                let rest = rest.strip_suffix(']').ok_or(SelectorProblem::Syntax)?;
                (addresses, Some(rest))
            }
            None => (text, None),
        };
        let selector = range(addresses)?;
        match narrowed {
            None => Ok(selector),
            Some(narrowed) => self.narrow(selector, narrowed),
        }
    }

    fn narrow(
        &self,
        selector: TrafficSelector,
        narrowed: &str,
    ) -> Result<TrafficSelector, SelectorProblem> {
        let (name, ports) = match narrowed.split_once('/') {
            Some((name, ports)) => (name, Some(ports)),
            None => (narrowed, None),
        };
        let protocol = match (name.parse::<u8>(), self.protocols.get(name)) {
            // Without a protocol charon prints the port alone, or in its place a 0.
            (Ok(0), _) if ports.is_some() => return Err(SelectorProblem::PortsOnly),
            (Ok(number), _) | (_, Some(&number)) => number,
            _ if ports.is_none() => return Err(SelectorProblem::PortsOnly),
            _ => return Err(SelectorProblem::Protocol(name.to_owned())),
        };
        let selector = selector.with_protocol(protocol);
        let Some(ports) = ports else {
            return Ok(selector);
        };
        match protocol {
            _ if ports == "OPAQUE" => return Err(SelectorProblem::Opaque),
            1 | 58 => return Err(SelectorProblem::IcmpType),
            _ => {}
        }
        let service = (ports.to_owned(), name.to_owned());
        let port = |text: &str| {
            text.parse::<u16>()
                .map_err(|_| SelectorProblem::Service(text.to_owned()))
        };
        // Names have dashes too: `netbios-ns`.
        let ports = match (self.services.get(&service), ports.split_once('-')) {
            (Some(&port), _) => port..=port,
            (None, Some((first, last))) if first.parse::<u16>().is_ok() => {
                port(first)?..=port(last)?
            }
            (None, _) => {
                let port = port(ports)?;
                port..=port
            }
        };
        Ok(selector.with_ports(ports)?)
    }
}

fn range(addresses: &str) -> Result<TrafficSelector, SelectorProblem> {
    if addresses == "dynamic" {
        return Err(SelectorProblem::Dynamic);
    }
    if let Some((first, last)) = addresses.split_once("..") {
        let parse = |text: &str| text.parse().map_err(|_| SelectorProblem::Syntax);
        return Ok(TrafficSelector::range(parse(first)?, parse(last)?)?);
    }
    let (address, bits) = addresses.split_once('/').ok_or(SelectorProblem::Syntax)?;
    let address = address.parse().map_err(|_| SelectorProblem::Syntax)?;
    let bits = bits.parse().map_err(|_| SelectorProblem::Syntax)?;
    let prefix = IpPrefix::new(address, bits).map_err(SelectorError::from)?;
    Ok(prefix.into())
}

/// The first two words of each line, comments left out.
fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| {
        let line = line.split_once('#').map_or(line, |(line, _)| line);
        let mut words = line.split_ascii_whitespace();
        Some((words.next()?, words.next()?))
    })
}

/// Why Esplane cannot hold traffic to a selector of charon's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the traffic selector `{text}` {problem}")]
pub struct SelectorTextError {
    /// As charon prints it.
    pub text: String,
    /// What is the matter with it.
    pub problem: SelectorProblem,
}

/// What is the matter with a selector.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectorProblem {
    /// Not in any of charon's forms.
    #[error(
        "is in none of charon's forms (10.1.0.0/16, 10.0.0.1..10.0.0.9, each with [PROTOCOL] or [PROTOCOL/PORTS])"
    )]
    Syntax,
    /// Not negotiated yet.
    #[error("gets its address only when the SA is negotiated")]
    Dynamic,
    /// ICMP types and codes.
    #[error("names ICMP types or codes, which Esplane does not tell apart; use the whole protocol")]
    IcmpType,
    /// Ports that must not be visible.
    #[error("asks for opaque ports, which Esplane does not have")]
    Opaque,
    /// Ports without a protocol.
    #[error("names ports without a protocol; name one, such as [tcp/80]")]
    PortsOnly,
    /// A protocol that /etc/protocols does not have.
    #[error("names the protocol `{0}`, which /etc/protocols does not have")]
    Protocol(String),
    /// A service that /etc/services does not have.
    #[error("names the service `{0}`, which /etc/services does not have")]
    Service(String),
    /// Wrong in itself.
    #[error("is wrong: {0}")]
    Selector(#[from] SelectorError),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        Names::from_files(
            "# Internet protocols\nip\t0\tIP\nipv6-icmp 58\tIPv6-ICMP\nskip\t57\tSKIP\nnonsense\n",
            "http\t\t80/tcp\t\twww\t# WorldWideWeb\nnetbios-ns\t137/udp\nfs-cache 7000-7009/tcp\n",
        )
    }

    #[test]
    fn every_form_of_charons_is_read() {
        for (charon, ours) in [
            ("10.1.0.0/16", "10.1.0.0/16"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("10.0.0.1..10.0.0.9", "10.0.0.1-10.0.0.9"),
            (
                "2001:db8::/32[udp/1000-2000]",
                "2001:db8::/32[udp/1000-2000]",
            ),
            ("10.1.0.0/16[tcp/http]", "10.1.0.0/16[tcp/80]"),
            ("10.1.0.0/16[tcp/81]", "10.1.0.0/16[tcp/81]"),
            ("10.1.0.0/16[udp/netbios-ns]", "10.1.0.0/16[udp/137]"),
            ("fec0::1/128[ipv6-icmp]", "fec0::1/128[icmpv6]"),
            ("10.1.0.0/16[gre]", "10.1.0.0/16[47]"),
            ("10.1.0.0/16[skip]", "10.1.0.0/16[57]"),
            ("10.1.0.0/16[253]", "10.1.0.0/16[253]"),
            ("10.1.0.0/16[sctp/5000]", "10.1.0.0/16[sctp/5000]"),
        ] {
            let selector = names().selector(charon).unwrap();
            assert_eq!(selector.to_string(), ours, "{charon}");
        }
    }

    #[test]
    fn what_cannot_be_held_to_is_named_never_widened() {
        for (charon, says) in [
            ("dynamic", "`dynamic` gets its address"),
            ("dynamic[tcp/http]", "gets its address"),
            ("10.1.0.0/16[icmp/8]", "ICMP types"),
            ("10.1.0.0/16[icmp/3(4)]", "ICMP types"),
            ("::/0[ipv6-icmp/128-129]", "ICMP types"),
            ("10.1.0.0/16[tcp/OPAQUE]", "opaque"),
            ("10.1.0.0/16[ssh]", "ports without a protocol"),
            ("10.1.0.0/16[1024-2048]", "ports without a protocol"),
            ("10.1.0.0/16[0/80]", "ports without a protocol"),
            ("10.1.0.0/16[tcp/gopher]", "the service `gopher`"),
            ("10.1.0.0/16[quic/80]", "the protocol `quic`"),
            ("10.1.0.0/16[tcp", "none of charon's forms"),
            ("10.1.0.1", "none of charon's forms"),
            ("(null)", "none of charon's forms"),
            ("10.1.0.1/16", "is wrong: "),
            ("10.1.0.0/16[gre/7]", "ports need a protocol"),
            ("10.0.0.9..10.0.0.1", "runs backwards"),
        ] {
            let error = names().selector(charon).unwrap_err().to_string();
            assert!(error.contains(says), "{charon}: {error}");
        }
    }
}
