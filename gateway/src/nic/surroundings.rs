//! What the kernel knows of the surroundings of one interface, kept up to date for those who pass it by: which networks are
//! taken from the interface, and the next hop to each address that packets go to.

use super::NicError;
use crate::{
    io::xdp::{NextHop, NextHops, Steering},
    netlink::{Changes, Netlink, NetlinkError, Way},
};
use arc_swap::ArcSwap;
use esplane_api::IpPrefix;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::mpsc,
    task::AbortHandle,
    time::{MissedTickBehavior, interval, sleep},
};
use tracing::{debug, warn};

/// Addresses kept, at most; then all are asked for anew, as they come.
const ADDRESSES_MAX: usize = 4096;
/// Changes come in swarms: what comes within this time is looked at once.
const SETTLE: Duration = Duration::from_millis(20);
/// How often neighbours in use that the kernel has not heard from are asked for. It cannot know that they are in use.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// The interface.
#[derive(Clone, Copy, Debug)]
pub(super) struct Side {
    pub link: u32,
    pub mtu: u32,
    pub mac: [u8; 6],
    pub towards: Towards,
}

/// Who is behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Towards {
    /// Peers: taken is what is addressed to us.
    Peers,
    /// Hosts: taken is what the kernel would route to the interface with this number.
    Hosts { tunnels: u32 },
}

/// The task.
pub(super) struct Surroundings {
    side: Side,
    steering: Steering,
    table: Arc<ArcSwap<NextHops>>,
    netlink: Netlink,
    /// How the kernel would send to each address in use; `None`: not over this interface.
    ways: BTreeMap<IpAddr, Option<Way>>,
    /// Neighbours in use that the kernel has not heard from lately.
    stale: BTreeSet<IpAddr>,
    /// Whether the interface has been deleted.
    gone: bool,
}

impl Surroundings {
    /// Starts it. The program takes nothing until it has looked around first, a moment later.
    pub(super) fn start(
        side: Side,
        steering: Steering,
        table: Arc<ArcSwap<NextHops>>,
        questions: mpsc::Receiver<IpAddr>,
    ) -> Result<AbortHandle, NicError> {
        let (netlink, changes) = Netlink::follow()?;
        let task = Self {
            side,
            steering,
            table,
            netlink,
            ways: BTreeMap::new(),
            stale: BTreeSet::new(),
            gone: false,
        };
        Ok(tokio::spawn(task.run(changes, questions)).abort_handle())
    }

    async fn run(mut self, mut changes: Changes, mut questions: mpsc::Receiver<IpAddr>) {
        let mut ask_again = interval(ASK_AGAIN);
        ask_again.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut outcome = self.look_around().await;
        loop {
            if let Err(error) = &outcome {
                // What was known stays in force; the next change tries again.
                warn!(
                    "{}: cannot learn of the surroundings: {error}",
                    self.steering.interface()
                );
            }
            outcome = tokio::select! {
                Some(address) = questions.recv() => {
                    let mut new = BTreeSet::from([address]);
                    while let Ok(address) = questions.try_recv() {
                        new.insert(address);
                    }
                    self.answer(new).await
                }
                Some(()) = changes.others.recv() => {
                    sleep(SETTLE).await;
                    let _ = (changes.others.try_recv(), changes.neighbours.try_recv());
                    self.look_around().await
                }
                Some(()) = changes.neighbours.recv() => {
                    sleep(SETTLE).await;
                    let _ = changes.neighbours.try_recv();
                    self.publish().await
                }
                _ = ask_again.tick() => self.ask().await,
                else => return,
            };
        }
    }

    /// Everything anew.
    async fn look_around(&mut self) -> Result<(), NicError> {
        self.look_at_link().await?;
        let networks = match self.side.towards {
            Towards::Peers => self.own_addresses(u32::MAX).await?,
            Towards::Hosts { tunnels } => self.networks_into(tunnels).await?,
        };
        self.steering.set_networks(&networks)?;
        let known = std::mem::take(&mut self.ways).into_keys().collect();
        self.answer(known).await
    }

    /// Its MTU and MAC address may change, and the interface may go; what cannot be followed is said.
    async fn look_at_link(&mut self) -> Result<(), NicError> {
        let name = self.steering.interface();
        match self.netlink.link_by_index(self.side.link).await {
            Ok(link) => self.side.mtu = link.mtu,
            Err(NetlinkError::Gone { .. }) if !self.gone => {
                self.gone = true;
                warn!(
                    "{name} is gone; what comes and goes by one of this name later is the kernel's until the daemon is started again"
                );
            }
            Err(NetlinkError::Gone { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        if let Ok(Some(mac)) = self.netlink.mac_of(self.side.link).await
            && mac != self.side.mac
        {
            self.side.mac = mac;
            if self.side.towards != Towards::Peers {
                warn!(
                    "{name} has another MAC address: its frames go by the kernel, more slowly, until the daemon is started again"
                );
            }
        }
        Ok(())
    }

    /// Finds the way to new addresses, and publishes.
    async fn answer(&mut self, new: BTreeSet<IpAddr>) -> Result<(), NicError> {
        if self.ways.len() + new.len() > ADDRESSES_MAX {
            debug!(
                "{}: more than {ADDRESSES_MAX} addresses in use; starting anew",
                self.steering.interface()
            );
            self.ways.clear();
        }
        for address in new.into_iter().take(ADDRESSES_MAX) {
            let way = self.netlink.way_to(address).await?;
            self.ways
                .insert(address, way.filter(|way| way.link == self.side.link));
        }
        self.publish().await
    }

    /// From ways and neighbours to next hops.
    async fn publish(&mut self) -> Result<(), NicError> {
        let neighbours = self.netlink.neighbours(self.side.link).await?;
        self.stale.clear();
        let mut hops = NextHops::with_capacity(self.ways.len());
        for (address, way) in &self.ways {
            let hop = way.and_then(|way| {
                // Not known yet, or gone: the packet goes by the kernel, which finds out and tells.
                let neighbour = neighbours.get(&way.neighbour)?;
                if neighbour.stale {
                    self.stale.insert(way.neighbour);
                }
                Some(NextHop {
                    from: self.side.mac,
                    to: neighbour.mac,
                    source: way.source?,
                    mtu: way.mtu.unwrap_or(self.side.mtu) as usize,
                })
            });
            hops.insert(*address, hop);
        }
        if **self.table.load() != hops {
            self.table.store(Arc::new(hops));
        }
        Ok(())
    }

    /// The kernel cannot know that these are in use, for their packets pass it by.
    async fn ask(&mut self) -> Result<(), NicError> {
        for address in &self.stale {
            match self.netlink.ask_neighbour(self.side.link, *address).await {
                Ok(()) | Err(NetlinkError::Gone { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    async fn own_addresses(&self, largest: u32) -> Result<BTreeMap<IpPrefix, u32>, NicError> {
        let addresses = self.netlink.own_addresses().await?.into_iter();
        let unicast = addresses.filter(|address| !address.is_loopback());
        Ok(unicast
            .map(|address| (IpPrefix::host(address), largest))
            .collect())
    }

    /// What the kernel would route there, and what lies within that and it would not.
    async fn networks_into(&self, tunnels: u32) -> Result<BTreeMap<IpPrefix, u32>, NicError> {
        // Larger ones go to the kernel, which tells their senders or cuts them.
        let mtu = self.netlink.link_by_index(tunnels).await?.mtu;
        let routes = self.netlink.all_routes().await?;
        let (into, elsewhere): (Vec<_>, Vec<_>) =
            routes.into_iter().partition(|(_, link)| *link == tunnels);
        let into: BTreeSet<IpPrefix> = into.into_iter().map(|(network, _)| network).collect();
        let within = |inside: &IpPrefix| {
            into.iter().any(|network| {
                network.length() <= inside.length() && network.contains(inside.address())
            })
        };
        let mut networks: BTreeMap<IpPrefix, u32> =
            into.iter().map(|network| (*network, mtu)).collect();
        for (network, _) in elsewhere {
            if within(&network) {
                // The same network twice: metrics decide, so the kernel does.
                networks.insert(network, 0);
            }
        }
        networks.extend(self.own_addresses(0).await?);
        Ok(networks)
    }
}
