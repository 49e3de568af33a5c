use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};

/// Where an SA's ESP packets travel: from our address to the peer's, plain or in UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct OuterPath {
    local: IpAddr,
    remote: IpAddr,
    encap: Option<UdpEncap>,
}

/// ESP in UDP (RFC 3948): the ports of both ends, usually 4500.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UdpEncap {
    /// Our UDP port.
    pub local_port: u16,
    /// The peer's UDP port, as its packets show it (behind a NAT: the NAT's).
    pub remote_port: u16,
}

impl OuterPath {
    /// Both addresses must share a family, the remote one must name one host, ports must not be 0.
    /// An unspecified `local` leaves the choice to the kernel's routing.
    pub fn new(local: IpAddr, remote: IpAddr, encap: Option<UdpEncap>) -> Result<Self, PathError> {
        if local.is_ipv4() != remote.is_ipv4() {
            return Err(PathError::MixedFamilies { local, remote });
        }
        if remote.is_unspecified() || remote.is_multicast() {
            return Err(PathError::NoHost(remote));
        }
        if encap.is_some_and(|encap| encap.local_port == 0 || encap.remote_port == 0) {
            return Err(PathError::PortZero);
        }
        Ok(Self {
            local,
            remote,
            encap,
        })
    }

    /// Our address; unspecified where the kernel chooses.
    pub fn local(&self) -> IpAddr {
        self.local
    }

    /// The peer's address.
    pub fn remote(&self) -> IpAddr {
        self.remote
    }

    /// The UDP ports, where ESP travels in UDP.
    pub fn encap(&self) -> Option<UdpEncap> {
        self.encap
    }

    /// The same path from another UDP port of ours; a path in plain ESP has none.
    pub fn from_port(&self, local_port: u16) -> Result<Self, PathError> {
        let encap = self.encap.map(|encap| UdpEncap {
            local_port,
            ..encap
        });
        Self::new(self.local, self.remote, encap)
    }

    /// Where to send: the peer's address, with its port where ESP travels in UDP, else port 0.
    pub fn remote_socket(&self) -> SocketAddr {
        SocketAddr::new(self.remote, self.encap.map_or(0, |encap| encap.remote_port))
    }

    /// The same path to a peer that has moved. Its port matters only where ESP travels in UDP; a
    /// changed family leaves our own address to the kernel's routing.
    pub fn moved_to(&self, remote: SocketAddr) -> Result<Self, PathError> {
        let local = match (self.local, remote.ip()) {
            (IpAddr::V6(_), IpAddr::V4(_)) => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
            (IpAddr::V4(_), IpAddr::V6(_)) => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
            (same, _) => same,
        };
        let encap = self.encap.map(|encap| UdpEncap {
            remote_port: remote.port(),
            ..encap
        });
        Self::new(local, remote.ip(), encap)
    }
}

/// Why addresses and ports are no [`OuterPath`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// A tunnel has one outer family.
    #[error("the tunnel ends {local} and {remote} are of different address families")]
    MixedFamilies {
        /// As given.
        local: IpAddr,
        /// As given.
        remote: IpAddr,
    },
    /// Nothing can be sent there.
    #[error("{0} names no single host; a tunnel needs the peer's unicast address")]
    NoHost(IpAddr),
    /// UDP has no port 0.
    #[error("UDP port 0 cannot be used; ESP in UDP usually uses 4500")]
    PortZero,
}

/// What to do with the Don't Fragment bit of an IPv4 outer header (RFC 4301 §8.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DfPolicy {
    /// Leave it clear: routers may fragment the ESP packet.
    #[default]
    Clear,
    /// Set it: too large an ESP packet is dropped on the way.
    Set,
    /// As the inner IPv4 packet has it; clear for inner IPv6.
    Copy,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn impossible_paths_are_refused() {
        let v4 = address("192.0.2.1");
        assert!(matches!(
            OuterPath::new(v4, address("2001:db8::1"), None),
            Err(PathError::MixedFamilies { .. })
        ));
        assert!(matches!(
            OuterPath::new(v4, address("0.0.0.0"), None),
            Err(PathError::NoHost(_))
        ));
        assert!(matches!(
            OuterPath::new(v4, address("224.0.0.1"), None),
            Err(PathError::NoHost(_))
        ));
        let encap = Some(UdpEncap {
            local_port: 0,
            remote_port: 4500,
        });
        assert_eq!(
            OuterPath::new(v4, address("192.0.2.2"), encap),
            Err(PathError::PortZero)
        );
    }

    #[test]
    fn a_move_changes_address_and_port_and_may_change_family() {
        let encap = Some(UdpEncap {
            local_port: 4500,
            remote_port: 4500,
        });
        let path = OuterPath::new(address("192.0.2.1"), address("192.0.2.2"), encap).unwrap();
        let moved = path
            .moved_to("198.51.100.7:61000".parse().unwrap())
            .unwrap();
        assert_eq!(moved.remote_socket(), "198.51.100.7:61000".parse().unwrap());
        assert_eq!(moved.local(), address("192.0.2.1"));
        let moved = path
            .moved_to("[2001:db8::7]:4500".parse().unwrap())
            .unwrap();
        assert_eq!(moved.local(), address("::"));
    }
}
