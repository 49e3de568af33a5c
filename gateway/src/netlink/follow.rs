//! What the kernel knows of the surroundings: neighbours, routes, its own addresses; and hearing when that changes.

use super::{Action, Connection, Netlink, NetlinkError, destination, lookup, out_link};
use esplane_api::IpPrefix;
use futures_util::TryStreamExt;
use rtnetlink::{
    MulticastGroup,
    packet_core::NetlinkPayload,
    packet_route::{
        address::AddressAttribute,
        link::LinkAttribute,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteMetric, RouteType},
    },
};
use std::{collections::BTreeMap, net::IpAddr, sync::Arc};
use tokio::sync::mpsc;

/// Bells. Each rings once for all that has changed since it was heard; both fall silent with the connection.
#[derive(Debug)]
pub struct Changes {
    /// A neighbour has come, gone, or changed.
    pub neighbours: mpsc::Receiver<()>,
    /// A route, address or link; or more has changed than could be told.
    pub others: mpsc::Receiver<()>,
}

/// The kernel's choice for a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// The interface.
    pub link: u32,
    /// The neighbour to hand packets to: a router, or the destination itself.
    pub neighbour: IpAddr,
    /// The source address it would choose.
    pub source: Option<IpAddr>,
    /// What it has learnt of the path's MTU, if anything.
    pub mtu: Option<u32>,
}

/// A neighbour whose MAC address is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The address.
    pub mac: [u8; 6],
    /// Whether the kernel would like to hear from it again.
    pub stale: bool,
}

impl Netlink {
    /// A connection of its own that tells what has changed. Must be called within a tokio runtime.
    pub fn follow() -> Result<(Self, Changes), NetlinkError> {
        use MulticastGroup as Group;
        let groups = [
            Group::Link,
            Group::Neigh,
            Group::Ipv4Ifaddr,
            Group::Ipv6Ifaddr,
            Group::Ipv4Route,
            Group::Ipv6Route,
        ];
        let (connection, handle, mut messages) =
            rtnetlink::new_multicast_connection(&groups).map_err(NetlinkError::Open)?;
        let (neighbour, neighbours) = mpsc::channel(1);
        let (rest, others) = mpsc::channel(1);
        let task = tokio::spawn(async move {
            let relay = async {
                use futures_util::StreamExt;
                while let Some((message, _)) = messages.next().await {
                    use rtnetlink::packet_route::RouteNetlinkMessage as Message;
                    let of_neighbour = matches!(
                        message.payload,
                        NetlinkPayload::InnerMessage(
                            Message::NewNeighbour(_) | Message::DelNeighbour(_)
                        )
                    );
                    // One bell that was not heard yet is enough.
                    let _ = if of_neighbour { &neighbour } else { &rest }.try_send(());
                }
            };
            tokio::join!(connection, relay);
        });
        let netlink = Self {
            handle,
            _connection: Arc::new(Connection(task.abort_handle())),
        };
        Ok((netlink, Changes { neighbours, others }))
    }

    /// How the kernel would send to `address`; `None` if not over any interface.
    pub async fn way_to(&self, address: IpAddr) -> Result<Option<Way>, NetlinkError> {
        let action = Action::FindRoute(address);
        let request = self
            .handle
            .route()
            .get(lookup(address))
            .execute()
            .try_next()
            .await;
        let route = match request.map_err(|error| action.failed(error)) {
            Ok(Some(route)) if route.header.kind == RouteType::Unicast => route,
            Ok(_) | Err(NetlinkError::Gone { .. } | NetlinkError::Unreachable(_)) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let Some(link) = out_link(&route) else {
            return Ok(None);
        };
        let mut way = Way {
            link,
            neighbour: address,
            source: None,
            mtu: None,
        };
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Gateway(router) => way.neighbour = plain(router).unwrap_or(address),
                RouteAttribute::PrefSource(source) => way.source = plain(source),
                RouteAttribute::Metrics(metrics) => {
                    way.mtu = metrics.iter().find_map(|metric| match metric {
                        RouteMetric::Mtu(bytes) => Some(*bytes),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        Ok(Some(way))
    }

    /// All neighbours of an interface whose MAC address is known.
    pub async fn neighbours(&self, link: u32) -> Result<BTreeMap<IpAddr, Neighbour>, NetlinkError> {
        let action = Action::FindLink(format!("number {link}"));
        let mut found = self.handle.neighbours().get().execute();
        let mut neighbours = BTreeMap::new();
        while let Some(message) = found
            .try_next()
            .await
            .map_err(|error| action.clone().failed(error))?
        {
            use NeighbourState as State;
            let known = matches!(
                message.header.state,
                State::Reachable
                    | State::Stale
                    | State::Delay
                    | State::Probe
                    | State::Permanent
                    | State::Noarp
            );
            if !known || message.header.ifindex != link {
                continue;
            }
            let (mut address, mut mac) = (None, None);
            for attribute in &message.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                        address = Some((*v4).into())
                    }
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                        address = Some((*v6).into())
                    }
                    NeighbourAttribute::LinkLayerAddress(bytes) => {
                        mac = bytes.as_slice().try_into().ok()
                    }
                    _ => {}
                }
            }
            if let (Some(address), Some(mac)) = (address, mac) {
                let stale = message.header.state == State::Stale;
                neighbours.insert(address, Neighbour { mac, stale });
            }
        }
        Ok(neighbours)
    }

    /// Lets the kernel find out whether a neighbour is still there, as if it had a packet for it.
    pub async fn ask_neighbour(&self, link: u32, address: IpAddr) -> Result<(), NetlinkError> {
        let request = self.handle.neighbours().add(link, address);
        let request = request
            .state(NeighbourState::None)
            .flags(NeighbourFlags::Use)
            .replace();
        let action = Action::FindLink(format!("number {link}"));
        request
            .execute()
            .await
            .map_err(|error| action.failed(error))
    }

    /// Every unicast route of the main table, with its interface.
    pub async fn all_routes(&self) -> Result<Vec<(IpPrefix, u32)>, NetlinkError> {
        let mut all = Vec::new();
        for family in [IpPrefix::ALL_V4, IpPrefix::ALL_V6] {
            for route in self.routes(family).await? {
                if route.header.kind == RouteType::Unicast
                    && let (Some(network), Some(link)) = (destination(&route), out_link(&route))
                {
                    all.push((network, link));
                }
            }
        }
        Ok(all)
    }

    /// Every address of this machine.
    pub async fn own_addresses(&self) -> Result<Vec<IpAddr>, NetlinkError> {
        let action = Action::FindLink("any".to_owned());
        let mut found = self.handle.address().get().execute();
        let mut all = Vec::new();
        while let Some(message) = found
            .try_next()
            .await
            .map_err(|error| action.clone().failed(error))?
        {
            // Of a point-to-point interface `Address` is the far end.
            let local = message
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    AddressAttribute::Local(address) => Some(*address),
                    _ => None,
                });
            let address = message
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    AddressAttribute::Address(address) => Some(*address),
                    _ => None,
                });
            all.extend(local.or(address));
        }
        Ok(all)
    }

    /// The MAC address of an interface; `None` if it has none of six bytes.
    pub async fn mac_of(&self, link: u32) -> Result<Option<[u8; 6]>, NetlinkError> {
        let action = Action::FindLink(format!("number {link}"));
        let found = self
            .handle
            .link()
            .get()
            .match_index(link)
            .execute()
            .try_next()
            .await;
        let message = found.map_err(|error| action.failed(error))?;
        Ok(message
            .into_iter()
            .flat_map(|message| message.attributes)
            .find_map(|attribute| match attribute {
                LinkAttribute::Address(bytes) => bytes.try_into().ok(),
                _ => None,
            }))
    }
}

fn plain(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}
