//! Links, addresses and routes, over the kernel's rtnetlink socket.
//!
//! ```text
//!   daemon, demo ──▶ Installed ──▶ Netlink ──▶ rtnetlink ──▶ kernel
//!                    remembers     one call
//!                    what to undo  = one request
//! ```
//!
//! [`Netlink`] is one connection to the network namespace of the thread that opened it.
//! [`Installed`] adds through it and remembers, so that the daemon takes back exactly what it
//! brought. Every route carries [`ROUTE_PROTOCOL`], so that one left over can be told from others'.
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | [`Netlink`], [`Link`]: the requests |
//! | `by_source.rs` | [`SourceRoute`]: what only packets of some sources take |
//! | `follow.rs` | neighbours, next hops, own addresses; hearing when they change |
//! | `installed.rs` | [`Installed`]: the journal |
//! | `error.rs` | [`NetlinkError`], [`Action`]: what was asked, what is wrong, what would be right |

mod by_source;
mod error;
mod follow;
mod installed;

pub use by_source::SourceRoute;
pub use error::{Action, NetlinkError, Obstacle};
pub use follow::{Changes, Neighbour, Way};
pub use installed::Installed;

use esplane_api::IpPrefix;
use futures_util::TryStreamExt;
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressHeaderFlags, AddressScope},
        link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage},
        route::{
            RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
            RouteScope,
        },
    },
};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
};
use tokio::task::AbortHandle;

/// The protocol number of our routes (`proto 50` in `ip route`): ESP's own number, which no
/// routing daemon uses.
pub const ROUTE_PROTOCOL: u8 = 50;

/// One connection to the kernel's routing tables, in the network namespace of the thread that
/// opened it. Clones share it; it closes with the last one.
#[derive(Clone)]
pub struct Netlink {
    handle: rtnetlink::Handle,
    _connection: Arc<Connection>,
}

/// The task that moves the connection's messages.
struct Connection(AbortHandle);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// The largest IP packet it takes, in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether packets pass: up, and the cable connected.
    pub running: bool,
}

/// Connection.
impl Netlink {
    /// Connects to this thread's network namespace. Must be called within a tokio runtime.
    pub fn open() -> Result<Self, NetlinkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetlinkError::Open)?;
        let task = tokio::spawn(connection).abort_handle();
        Ok(Self {
            handle,
            _connection: Arc::new(Connection(task)),
        })
    }
}

/// Links.
impl Netlink {
    /// The interface of this name.
    pub async fn link(&self, name: &str) -> Result<Link, NetlinkError> {
        let request = self.handle.link().get().match_name(name);
        let found = request.execute().try_next().await;
        match found.map_err(|error| Action::FindLink(name.to_owned()).failed(error)) {
            Ok(Some(message)) => Ok(Link::from_message(&message)),
            Ok(None) | Err(NetlinkError::Gone { .. }) => Err(NetlinkError::NoLink(name.to_owned())),
            Err(error) => Err(error),
        }
    }

    /// The number of the interface of this name.
    pub async fn link_index(&self, name: &str) -> Result<u32, NetlinkError> {
        Ok(self.link(name).await?.index)
    }

    /// The interface of this number.
    pub async fn link_by_index(&self, index: u32) -> Result<Link, NetlinkError> {
        let action = || Action::FindLink(format!("number {index}"));
        let request = self.handle.link().get().match_index(index);
        let found = request.execute().try_next().await;
        match found.map_err(|error| action().failed(error))? {
            Some(message) => Ok(Link::from_message(&message)),
            None => Err(NetlinkError::Gone { action: action() }),
        }
    }

    /// Sets the largest IP packet an interface takes.
    pub async fn set_mtu(&self, link: u32, mtu: u32) -> Result<(), NetlinkError> {
        self.set(link, Action::SetMtu { link, mtu }, |message| {
            message.mtu(mtu)
        })
        .await
    }

    /// Brings an interface up.
    pub async fn set_up(&self, link: u32) -> Result<(), NetlinkError> {
        self.set(link, Action::SetUp { link }, |message| message.up())
            .await
    }

    /// Sets how many packets may wait in an interface's queue (for a TUN device: for its reader).
    pub async fn set_queue_packets(&self, link: u32, packets: u32) -> Result<(), NetlinkError> {
        let action = Action::SetQueue { link, packets };
        self.set(link, action, |message| message.txqueuelen(packets))
            .await
    }

    /// Keeps the kernel from talking on an interface by itself: no IPv6 link-local address, hence
    /// no router solicitations, and no multicast group reports. Call it before [`Netlink::set_up`].
    ///
    /// On a TUN device such packets could only be dropped. A few still come on a router, which has
    /// joined the group of all routers (ff02::2) by the time it can be told not to.
    pub async fn set_quiet(&self, link: u32) -> Result<(), NetlinkError> {
        let action = Action::SetQuiet { link };
        let no_link_local = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let no_link_local = vec![AfSpecUnspec::Inet6(vec![no_link_local])];
        self.set(link, action, |message| {
            message
                .multicast(false)
                .append_extra_attribute(LinkAttribute::AfSpecUnspec(no_link_local))
        })
        .await
    }

    /// Creates a pair of virtual Ethernet interfaces: what enters one leaves the other.
    pub async fn add_veth_pair(&self, name: &str, peer: &str) -> Result<(), NetlinkError> {
        let message = LinkVeth::new(name, peer).build();
        let request = self.handle.link().add(message);
        request.execute().await.map_err(|error| {
            Action::AddVeth {
                name: name.to_owned(),
                peer: peer.to_owned(),
            }
            .failed(error)
        })
    }

    /// Moves an interface into the network namespace that `namespace` is open on. It arrives down
    /// and without addresses.
    pub async fn move_link(
        &self,
        link: u32,
        namespace: BorrowedFd<'_>,
    ) -> Result<(), NetlinkError> {
        let action = Action::MoveLink { link };
        self.set(link, action, |message| {
            message.setns_by_fd(namespace.as_raw_fd())
        })
        .await
    }

    /// Removes an interface; with it go its addresses, routes and, of a veth pair, the other end.
    pub async fn remove_link(&self, link: u32) -> Result<(), NetlinkError> {
        let request = self.handle.link().del(link);
        let outcome = request.execute().await;
        outcome.map_err(|error| Action::RemoveLink { link }.failed(error))
    }

    async fn set(
        &self,
        link: u32,
        action: Action,
        change: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
    ) -> Result<(), NetlinkError> {
        let message = change(LinkUnspec::new_with_index(link)).build();
        let outcome = self.handle.link().set(message).execute().await;
        outcome.map_err(|error| action.failed(error))
    }
}

/// Addresses.
impl Netlink {
    /// Gives an interface an address; the kernel adds the route to its network. An IPv6 address can be used at
    /// once: nobody beyond an interface of ours could answer duplicate address detection (RFC 4862 §5.4),
    /// and until that is over the kernel lends packets another source, which no policy covers.
    pub async fn add_address(
        &self,
        link: u32,
        address: IpAddr,
        prefix_length: u8,
    ) -> Result<(), NetlinkError> {
        let mut request = self.handle.address().add(link, address, prefix_length);
        if address.is_ipv6() {
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        request.execute().await.map_err(|error| {
            Action::AddAddress {
                link,
                address,
                prefix_length,
            }
            .failed(error)
        })
    }

    /// Every address of this machine, in the kernel's order, but for those of single links.
    pub async fn addresses(&self) -> Result<Vec<IpAddr>, NetlinkError> {
        let mut found = Vec::new();
        let mut stream = self.handle.address().get().execute();
        let failed = |error| Action::ListAddresses.failed(error);
        while let Some(message) = stream.try_next().await.map_err(failed)? {
            if message.header.scope == AddressScope::Link {
                continue;
            }
            let mut address = None;
            for attribute in &message.attributes {
                match attribute {
                    // Of a point-to-point interface `Address` is the other end.
                    AddressAttribute::Local(local) => address = Some(*local),
                    AddressAttribute::Address(own) => address = address.or(Some(*own)),
                    _ => {}
                }
            }
            found.extend(address);
        }
        Ok(found)
    }

    /// Takes an address from an interface.
    pub async fn remove_address(
        &self,
        link: u32,
        address: IpAddr,
        prefix_length: u8,
    ) -> Result<(), NetlinkError> {
        let mut add = self.handle.address().add(link, address, prefix_length);
        let message = std::mem::take(add.message_mut());
        let outcome = self.handle.address().del(message).execute().await;
        outcome.map_err(|error| {
            Action::RemoveAddress {
                link,
                address,
                prefix_length,
            }
            .failed(error)
        })
    }
}

/// Routes.
impl Netlink {
    /// Adds a route through an interface. Refuses, and says who put it there, if another one with
    /// the same network and metric exists.
    pub async fn add_route(
        &self,
        prefix: IpPrefix,
        link: u32,
        metric: u32,
    ) -> Result<(), NetlinkError> {
        let action = Action::AddRoute {
            prefix,
            link,
            metric,
        };
        let request = self.handle.route().add(route(prefix, link, metric));
        match request
            .execute()
            .await
            .map_err(|error| action.failed(error))
        {
            Err(NetlinkError::Exists { .. }) => Err(NetlinkError::RouteExists {
                prefix,
                metric,
                obstacle: self.obstacle(prefix, metric).await?,
            }),
            outcome => outcome,
        }
    }

    /// Adds a route, in place of whatever route has the same network and metric.
    pub async fn replace_route(
        &self,
        prefix: IpPrefix,
        link: u32,
        metric: u32,
    ) -> Result<(), NetlinkError> {
        let action = Action::AddRoute {
            prefix,
            link,
            metric,
        };
        let request = self.handle.route().add(route(prefix, link, metric));
        let outcome = request.replace().execute().await;
        outcome.map_err(|error| action.failed(error))
    }

    /// The same, and packets of this machine itself take this address for it.
    pub async fn replace_route_from(
        &self,
        prefix: IpPrefix,
        link: u32,
        metric: u32,
        source: IpAddr,
    ) -> Result<(), NetlinkError> {
        let action = Action::AddRoute {
            prefix,
            link,
            metric,
        };
        let mut message = route(prefix, link, metric);
        let source = RouteAttribute::PrefSource(source.into());
        message.attributes.push(source);
        let request = self.handle.route().add(message).replace();
        request
            .execute()
            .await
            .map_err(|error| action.failed(error))
    }

    /// Adds a route by way of a router.
    pub async fn add_route_via(
        &self,
        prefix: IpPrefix,
        router: IpAddr,
    ) -> Result<(), NetlinkError> {
        let message = route_via(prefix, router);
        let outcome = self.handle.route().add(message).execute().await;
        outcome.map_err(|error| Action::AddRouteVia { prefix, router }.failed(error))
    }

    /// Removes the route that [`Netlink::add_route_via`] added.
    pub async fn remove_route_via(
        &self,
        prefix: IpPrefix,
        router: IpAddr,
    ) -> Result<(), NetlinkError> {
        let message = route_via(prefix, router);
        let outcome = self.handle.route().del(message).execute().await;
        outcome.map_err(|error| Action::RemoveRouteVia { prefix, router }.failed(error))
    }

    /// Removes the route that [`Netlink::add_route`] added; never another's.
    pub async fn remove_route(
        &self,
        prefix: IpPrefix,
        link: u32,
        metric: u32,
    ) -> Result<(), NetlinkError> {
        let request = self.handle.route().del(route(prefix, link, metric));
        request.execute().await.map_err(|error| {
            Action::RemoveRoute {
                prefix,
                link,
                metric,
            }
            .failed(error)
        })
    }

    /// The largest IP packet that reaches `address` as far as the kernel knows: the MTU of the route
    /// there (discovered or set), else of the interface it leaves by.
    pub async fn route_mtu_to(&self, address: IpAddr) -> Result<u32, NetlinkError> {
        let action = Action::FindRoute(address);
        let message = lookup(address);
        let found = self.handle.route().get(message).execute().try_next().await;
        let Some(found) = found.map_err(|error| action.clone().failed(error))? else {
            return Err(NetlinkError::Unreachable(address));
        };
        let (mut out, mut mtu) = (None, None);
        for attribute in &found.attributes {
            match attribute {
                RouteAttribute::Oif(index) => out = Some(*index),
                RouteAttribute::Metrics(metrics) => {
                    mtu = metrics.iter().find_map(|metric| match metric {
                        RouteMetric::Mtu(bytes) => Some(*bytes),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        match (mtu, out) {
            (Some(mtu), _) => Ok(mtu),
            (None, Some(index)) => Ok(self.link_by_index(index).await?.mtu),
            // A blackhole or prohibit route names no interface.
            (None, None) => Err(NetlinkError::Unreachable(address)),
        }
    }

    /// The address that a packet of this machine to `address` gets, where the kernel has a route there.
    pub async fn source_to(&self, address: IpAddr) -> Result<Option<IpAddr>, NetlinkError> {
        let request = self.handle.route().get(lookup(address));
        let found = request.execute().try_next().await;
        let found = found.map_err(|error| Action::FindRoute(address).failed(error))?;
        let attributes = found.into_iter().flat_map(|found| found.attributes);
        Ok(attributes
            .filter_map(|attribute| match attribute {
                RouteAttribute::PrefSource(RouteAddress::Inet(v4)) => Some(v4.into()),
                RouteAttribute::PrefSource(RouteAddress::Inet6(v6)) => Some(v6.into()),
                _ => None,
            })
            .next())
    }

    /// Our own routes in the main table, whoever of us added them: their networks and interfaces.
    pub async fn own_routes(&self) -> Result<Vec<(IpPrefix, u32)>, NetlinkError> {
        let routes = self.routes(IpPrefix::ALL_V4).await?;
        let routes = routes
            .into_iter()
            .chain(self.routes(IpPrefix::ALL_V6).await?);
        Ok(routes
            .filter(|route| route.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL))
            .filter_map(|route| Some((destination(&route)?, out_link(&route)?)))
            .collect())
    }

    /// What stands in the way of a route to add.
    async fn obstacle(&self, prefix: IpPrefix, metric: u32) -> Result<Obstacle, NetlinkError> {
        // The kernel reads metric 0 as 1024 in IPv6 (IP6_RT_PRIO_USER).
        let metric = if metric == 0 && prefix.address().is_ipv6() {
            1024
        } else {
            metric
        };
        let routes = self.routes(prefix).await?;
        let found = routes
            .iter()
            .find(|route| destination(route) == Some(prefix) && route_metric(route) == metric);
        let Some(found) = found else {
            return Ok(Obstacle::default());
        };
        let interface = match out_link(found) {
            Some(index) => self.link_by_index(index).await.ok().map(|link| link.name),
            None => None,
        };
        Ok(Obstacle {
            interface,
            protocol: Some(found.header.protocol.into()),
        })
    }

    /// The main table's routes of the family of `like`.
    async fn routes(&self, like: IpPrefix) -> Result<Vec<RouteMessage>, NetlinkError> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(like.address());
        let routes: Result<Vec<_>, _> = self
            .handle
            .route()
            .get(message)
            .execute()
            .try_collect()
            .await;
        let mut routes = routes.map_err(|error| Action::ListRoutes.failed(error))?;
        routes.retain(|route| route.header.table == RouteHeader::RT_TABLE_MAIN);
        Ok(routes)
    }
}

impl Link {
    fn from_message(message: &LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
            running: message.header.flags.contains(LinkFlags::Running),
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                _ => {}
            }
        }
        link
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// A question for the route to one address.
fn lookup(address: IpAddr) -> RouteMessage {
    let host = IpPrefix::host(address);
    let mut message = RouteMessage::default();
    message.header.address_family = family(address);
    message.header.destination_prefix_length = host.length();
    message
        .attributes
        .push(RouteAttribute::Destination(address.into()));
    message
}

/// Our route to a network, without the way there.
fn unrouted(prefix: IpPrefix) -> RouteMessage {
    let protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
    let mut message = RouteMessageBuilder::<IpAddr>::new()
        .protocol(protocol)
        .build();
    message.header.address_family = family(prefix.address());
    message.header.destination_prefix_length = prefix.length();
    // A default route has no destination attribute.
    if prefix.length() > 0 {
        message
            .attributes
            .push(RouteAttribute::Destination(prefix.address().into()));
    }
    message
}

/// Our route to a network by way of a router.
fn route_via(prefix: IpPrefix, router: IpAddr) -> RouteMessage {
    let mut message = unrouted(prefix);
    let router = RouteAttribute::Gateway(router.into());
    message.attributes.push(router);
    message
}

/// Our route to a network through an interface.
fn route(prefix: IpPrefix, link: u32, metric: u32) -> RouteMessage {
    let mut message = unrouted(prefix);
    if prefix.address().is_ipv4() {
        message.header.scope = RouteScope::Link;
    }
    message.attributes.push(RouteAttribute::Oif(link));
    message.attributes.push(RouteAttribute::Priority(metric));
    message
}

fn out_link(route: &RouteMessage) -> Option<u32> {
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        })
}

fn route_metric(route: &RouteMessage) -> u32 {
    let metric = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Priority(metric) => Some(*metric),
            _ => None,
        });
    metric.unwrap_or(0)
}

fn destination(route: &RouteMessage) -> Option<IpPrefix> {
    let address = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
            RouteAttribute::Destination(RouteAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
            _ => None,
        });
    let any = match route.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    IpPrefix::new(
        address.unwrap_or(any),
        route.header.destination_prefix_length,
    )
    .ok()
}

#[cfg(test)]
mod tests;
