use crate::netlink::{ROUTE_PROTOCOL, SourceRoute};
use esplane_api::IpPrefix;
use std::{fmt, io, net::IpAddr};

/// What was asked of the kernel; reads on after "cannot".
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are named as in the requests
pub enum Action {
    FindLink(String),
    SetMtu {
        link: u32,
        mtu: u32,
    },
    SetUp {
        link: u32,
    },
    SetQueue {
        link: u32,
        packets: u32,
    },
    SetQuiet {
        link: u32,
    },
    AddVeth {
        name: String,
        peer: String,
    },
    MoveLink {
        link: u32,
    },
    RemoveLink {
        link: u32,
    },
    AddAddress {
        link: u32,
        address: IpAddr,
        prefix_length: u8,
    },
    RemoveAddress {
        link: u32,
        address: IpAddr,
        prefix_length: u8,
    },
    AddRoute {
        prefix: IpPrefix,
        link: u32,
        metric: u32,
    },
    AddRouteVia {
        prefix: IpPrefix,
        router: IpAddr,
    },
    RemoveRoute {
        prefix: IpPrefix,
        link: u32,
        metric: u32,
    },
    RemoveRouteVia {
        prefix: IpPrefix,
        router: IpAddr,
    },
    AddSourceRoute(SourceRoute),
    RemoveSourceRoute(SourceRoute),
    FindRoute(IpAddr),
    ListRoutes,
    ListAddresses,
    ListRules,
}

/// The route in the way of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Obstacle {
    /// The interface it leads to, where it has one.
    pub interface: Option<String>,
    /// The number of who put it there, as in `ip route`'s `proto`; `None` if it has gone meanwhile.
    pub protocol: Option<u8>,
}

/// Why the kernel did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No netlink socket.
    #[error("cannot open a netlink socket: {0}")]
    Open(#[source] io::Error),
    /// EPERM.
    #[error("cannot {action}: that needs CAP_NET_ADMIN; run as root, or grant the capability")]
    Permission {
        /// What was asked.
        action: Action,
    },
    /// There is no interface of this name.
    #[error("there is no network interface `{0}`")]
    NoLink(String),
    /// What was to be changed or removed is not there.
    #[error("cannot {action}: it is not there (any more)")]
    Gone {
        /// What was asked.
        action: Action,
    },
    /// What was to be added is there already.
    #[error("cannot {action}: it exists already")]
    Exists {
        /// What was asked.
        action: Action,
    },
    /// Another route with the same network and metric.
    #[error(
        "cannot add the route to {prefix} with metric {metric}: {obstacle}; remove that one or choose another metric"
    )]
    RouteExists {
        /// The network.
        prefix: IpPrefix,
        /// The metric.
        metric: u32,
        /// Who is in the way.
        obstacle: Obstacle,
    },
    /// ESP to a peer would take the way into the tunnel that leads to this peer.
    #[error(
        "packets to the peer at {end} leave with the address {ours}, which lies in {local}, and what comes from there goes into the tunnel for {remote}: ESP would run in circles; narrow that route, or set `install_routes: false` and route yourself"
    )]
    Circle {
        /// The peer.
        end: IpAddr,
        /// Our address on the way there.
        ours: IpAddr,
        /// What is behind us.
        local: IpPrefix,
        /// What is behind the peer.
        remote: IpPrefix,
    },
    /// The kernel knows no way there.
    #[error("there is no route to {0}")]
    Unreachable(IpAddr),
    /// Any other refusal.
    #[error("cannot {action}: {source}")]
    Refused {
        /// What was asked.
        action: Action,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Not a refusal but a breakdown of the conversation.
    #[error("cannot {action}: {source}")]
    Conversation {
        /// What was asked.
        action: Action,
        /// What went wrong.
        source: Box<rtnetlink::Error>,
    },
}

impl NetlinkError {
    /// Whether what was to be removed is gone already, which suits whoever removes.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. } | Self::NoLink(_))
    }
}

impl Action {
    /// The error when this action ended so.
    pub(super) fn failed(self, error: rtnetlink::Error) -> NetlinkError {
        let rtnetlink::Error::NetlinkError(refusal) = &error else {
            let source = Box::new(error);
            return NetlinkError::Conversation {
                action: self,
                source,
            };
        };
        let source = refusal.to_io();
        match (source.raw_os_error(), self) {
            (Some(libc::EPERM | libc::EACCES), action) => NetlinkError::Permission { action },
            (Some(libc::EEXIST), action) => NetlinkError::Exists { action },
            (Some(libc::ENETUNREACH | libc::EHOSTUNREACH), Self::FindRoute(address)) => {
                NetlinkError::Unreachable(address)
            }
            (Some(libc::ENODEV | libc::ENOENT | libc::ESRCH | libc::EADDRNOTAVAIL), action) => {
                NetlinkError::Gone { action }
            }
            (_, action) => NetlinkError::Refused { action, source },
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FindLink(name) => write!(f, "find interface {name}"),
            Self::SetMtu { link, mtu } => write!(f, "set interface {link}'s MTU to {mtu}"),
            Self::SetUp { link } => write!(f, "bring interface {link} up"),
            Self::SetQueue { link, packets } => {
                write!(f, "set interface {link}'s queue to {packets} packets")
            }
            Self::SetQuiet { link } => {
                write!(f, "keep interface {link} from IPv6 autoconfiguration")
            }
            Self::AddVeth { name, peer } => write!(f, "create the veth pair {name}, {peer}"),
            Self::MoveLink { link } => write!(f, "move interface {link} to another namespace"),
            Self::RemoveLink { link } => write!(f, "remove interface {link}"),
            Self::AddAddress {
                link,
                address,
                prefix_length,
            } => write!(
                f,
                "add address {address}/{prefix_length} to interface {link}"
            ),
            Self::RemoveAddress {
                link,
                address,
                prefix_length,
            } => write!(
                f,
                "remove address {address}/{prefix_length} from interface {link}"
            ),
            Self::AddRoute {
                prefix,
                link,
                metric,
            } => write!(
                f,
                "add the route to {prefix} by interface {link}, metric {metric}"
            ),
            Self::AddRouteVia { prefix, router } => {
                write!(f, "add the route to {prefix} by way of {router}")
            }
            Self::RemoveRoute {
                prefix,
                link,
                metric,
            } => write!(
                f,
                "remove the route to {prefix} by interface {link}, metric {metric}"
            ),
            Self::RemoveRouteVia { prefix, router } => {
                write!(f, "remove the route to {prefix} by way of {router}")
            }
            Self::AddSourceRoute(route) => write!(f, "add the rules for packets {route}"),
            Self::RemoveSourceRoute(route) => {
                write!(f, "remove the rules for packets {route}")
            }
            Self::FindRoute(address) => write!(f, "find the route to {address}"),
            Self::ListRoutes => f.write_str("list the routes"),
            Self::ListAddresses => f.write_str("list the addresses"),
            Self::ListRules => f.write_str("list the routing rules"),
        }
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("there is one")?;
        if let Some(interface) = &self.interface {
            write!(f, " by interface {interface}")?;
        }
        // Numbers of linux/rtnetlink.h, RTPROT_*.
        match self.protocol {
            None => f.write_str(" that has gone meanwhile"),
            Some(ROUTE_PROTOCOL) => f.write_str(" of another Esplane, or left over from one"),
            Some(2) => f.write_str(", which the kernel made for an interface's address"),
            Some(3 | 4) => f.write_str(", which an administrator or a script put there"),
            Some(9) => f.write_str(" from an IPv6 router advertisement"),
            Some(16) => f.write_str(" from a DHCP client"),
            Some(12) => f.write_str(" from the routing daemon BIRD"),
            Some(11 | 186..=189) => f.write_str(" from a routing daemon such as FRRouting"),
            Some(other) => write!(f, ", which protocol {other} of `ip route` put there"),
        }
    }
}
