//! The inner interface as the kernel knows it: MTU, addresses, and the routes that lead into it.

use crate::{
    config::{Config, Endpoint, Mtu},
    io::TUN_QUEUE_PACKETS,
    netlink::{Installed, Netlink, NetlinkError, SourceRoute},
    ways::Ways,
};
use esplane_api::{AeadSuite, IpPrefix, OuterPath, TrafficSelector, UdpEncap};
use esplane_dataplane::max_inner_bytes;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};
use tracing::{info, warn};

/// What the way to a peer is taken to bear when nobody knows.
const USUAL_MTU: u32 = 1500;

/// The interface, its addresses and its routes; all of them go again.
pub struct Network {
    installed: Installed,
    link: u32,
    /// Each route with its metric.
    routes: BTreeMap<IpPrefix, u32>,
    /// What is a route for packets from some networks alone.
    by_source: BTreeSet<SourceRoute>,
    /// Which address packets of this machine itself take, where a route says so.
    sources: BTreeMap<IpPrefix, IpAddr>,
}

impl Network {
    /// Gives the interface its MTU and addresses, and brings it up. On an error the caller's TUN goes,
    /// and with it whatever was set.
    pub async fn set_up(netlink: Netlink, config: &Config, mtu: u32) -> Result<Self, NetlinkError> {
        let link = netlink.link_index(&config.interface.name).await?;
        netlink.set_mtu(link, mtu).await?;
        netlink.set_queue_packets(link, TUN_QUEUE_PACKETS).await?;
        netlink.set_quiet(link).await?;
        netlink.remove_leftover_source_routes(link).await?;
        let mut installed = Installed::new(netlink);
        for address in &config.interface.addresses {
            installed
                .add_address(link, address.address, address.prefix_length)
                .await?;
        }
        installed.netlink().set_up(link).await?;
        exempt_from_kernel_policies(&config.interface.name);
        Ok(Self {
            installed,
            link,
            routes: BTreeMap::new(),
            by_source: BTreeSet::new(),
            sources: BTreeMap::new(),
        })
    }

    /// Makes exactly these the routes into the interface. On an error they are as they were.
    pub async fn set_routes(
        &mut self,
        wanted: BTreeMap<IpPrefix, u32>,
    ) -> Result<(), NetlinkError> {
        let old = self.routes.clone();
        if let Err(error) = self.change_routes(&wanted).await {
            if let Err(error) = self.change_routes(&old).await {
                warn!("cannot restore the routes: {error}");
            }
            return Err(error);
        }
        Ok(())
    }

    /// New ones first: a packet for them meets the tunnels, not the default route.
    async fn change_routes(
        &mut self,
        wanted: &BTreeMap<IpPrefix, u32>,
    ) -> Result<(), NetlinkError> {
        self.add_missing(wanted).await?;
        let stale: Vec<_> = self
            .routes
            .iter()
            .filter(|(prefix, _)| !wanted.contains_key(prefix))
            .map(|(prefix, metric)| (*prefix, *metric))
            .collect();
        for (prefix, metric) in stale {
            self.installed
                .remove_route(prefix, self.link, metric)
                .await?;
            self.routes.remove(&prefix);
            self.sources.remove(&prefix);
        }
        Ok(())
    }

    /// Lets packets of this machine itself that take one of our routes have an address that the far end
    /// expects: the first of this machine's that lies within what `local` says.
    pub async fn prefer_sources(&mut self, local: &[(IpPrefix, TrafficSelector)]) {
        let own = match self.netlink().addresses().await {
            Ok(own) => own,
            Err(error) => return warn!("{error}"),
        };
        for (prefix, metric) in self.routes.clone() {
            let ranges = local.iter().filter(|(remote, _)| *remote == prefix);
            let source = ranges
                .flat_map(|(_, range)| own.iter().find(|address| range.contains(**address)))
                .next();
            if let Some(source) = source
                && self.sources.get(&prefix) != Some(source)
            {
                let netlink = self.netlink();
                match netlink
                    .replace_route_from(prefix, self.link, metric, *source)
                    .await
                {
                    Ok(()) => _ = self.sources.insert(prefix, *source),
                    Err(error) => warn!(
                        "packets of this machine to {prefix} may have the wrong source address: {error}"
                    ),
                }
            }
        }
    }

    async fn add_missing(&mut self, wanted: &BTreeMap<IpPrefix, u32>) -> Result<(), NetlinkError> {
        for (prefix, metric) in wanted {
            if self.routes.get(prefix) != Some(metric) {
                self.installed
                    .add_route(*prefix, self.link, *metric)
                    .await?;
                if let Some(old) = self.routes.insert(*prefix, *metric) {
                    self.installed.remove_route(*prefix, self.link, old).await?;
                }
            }
        }
        Ok(())
    }

    /// The same, but what the kernel refuses is answered, and the others come all the same.
    pub async fn set_what_can_be(
        &mut self,
        wanted: &BTreeMap<IpPrefix, u32>,
    ) -> BTreeMap<IpPrefix, NetlinkError> {
        let mut refused = BTreeMap::new();
        let mut possible = BTreeMap::new();
        for (prefix, metric) in wanted {
            let one = BTreeMap::from([(*prefix, *metric)]);
            match self.add_missing(&one).await {
                Ok(()) => possible.extend(one),
                Err(error) => _ = refused.insert(*prefix, error),
            }
        }
        if let Err(error) = self.change_routes(&possible).await {
            warn!("{error}");
        }
        refused
    }

    /// Makes exactly these (local, remote) networks lead into the interface for packets from one to the other; what the
    /// kernel refuses is answered by the remote one.
    pub async fn set_by_source(
        &mut self,
        wanted: &BTreeSet<(IpPrefix, IpPrefix)>,
    ) -> BTreeMap<IpPrefix, NetlinkError> {
        let link = self.link;
        let route = |(local, remote): &(IpPrefix, IpPrefix)| SourceRoute {
            local: *local,
            remote: *remote,
            link,
        };
        let wanted: BTreeSet<SourceRoute> = wanted.iter().map(route).collect();
        let mut refused = BTreeMap::new();
        for new in wanted.difference(&self.by_source.clone()) {
            match self.installed.add_source_route(*new).await {
                Ok(()) => _ = self.by_source.insert(*new),
                Err(error) => _ = refused.insert(new.remote, error),
            }
        }
        for stale in self.by_source.clone().difference(&wanted) {
            match self.installed.remove_source_route(*stale).await {
                Ok(()) => _ = self.by_source.remove(stale),
                Err(error) => warn!("{error}"),
            }
        }
        refused
    }

    /// No ESP may take a way for packets from behind us: it would if the kernel gave it an address of there.
    pub(crate) async fn check_circles(&self, ways: &Ways) -> Result<(), NetlinkError> {
        for end in &ways.ends {
            let mut around = ways.by_source.iter();
            if around.all(|(_, remote)| !remote.contains(*end)) {
                continue;
            }
            let Ok(Some(ours)) = self.netlink().source_to(*end).await else {
                continue; // no route yet: the one that comes may be right
            };
            let takes_it = |(local, remote): &&(IpPrefix, IpPrefix)| {
                local.contains(ours) && remote.contains(*end)
            };
            if let Some((local, remote)) = ways.by_source.iter().find(takes_it) {
                return Err(NetlinkError::Circle {
                    end: *end,
                    ours,
                    local: *local,
                    remote: *remote,
                });
            }
        }
        Ok(())
    }

    /// Whether this network is a route, for all packets or for those of some sources.
    pub fn has_route(&self, network: &IpPrefix) -> bool {
        let mut by_source = self.by_source.iter();
        self.routes.contains_key(network) || by_source.any(|route| route.remote == *network)
    }

    /// Gives the interface another MTU.
    pub async fn set_mtu(&self, mtu: u32) -> Result<(), NetlinkError> {
        self.installed.netlink().set_mtu(self.link, mtu).await
    }

    /// The connection to the kernel.
    pub fn netlink(&self) -> &Netlink {
        self.installed.netlink()
    }

    /// Takes everything back.
    pub async fn tear_down(mut self) {
        for error in self.installed.remove_all().await {
            warn!("left behind: {error}");
        }
    }
}

/// The kernel's own IPsec policies have no say over this interface: what leaves through it is not yet protected, what
/// comes out of it was. Else a policy of charon's for the same networks, such as that of an SA which ends in a moment, would
/// drop what Esplane has decrypted. Every route-based tunnel is set so (`net.ipv4.conf.vti0.disable_policy`).
fn exempt_from_kernel_policies(interface: &str) {
    for setting in [
        "ipv4/conf/{}/disable_policy",
        "ipv4/conf/{}/disable_xfrm",
        "ipv6/conf/{}/disable_policy",
    ] {
        let path = format!("/proc/sys/net/{}", setting.replace("{}", interface));
        match fs::write(&path, "1") {
            Ok(()) => {}
            // A kernel without IPv6, or without IPsec, has no such policy.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => warn!(
                "cannot set {path} to 1: {error}; IPsec policies of the kernel may drop packets of our tunnels"
            ),
        }
    }
}

/// The interface's MTU: as configured, or the largest that leaves ESP unfragmented on the way to every peer
/// whose address is known. `imported` are the paths of the tunnels that strongSwan has negotiated so far; what
/// the way to a peer bears is asked once while the peer stays, and kept in `ways`.
pub async fn inner_mtu(
    netlink: &Netlink,
    config: &Config,
    imported: &[OuterPath],
    ways: &mut BTreeMap<IpAddr, u32>,
) -> u32 {
    if let Mtu::Bytes(bytes) = config.interface.mtu {
        return bytes.into();
    }
    let mut mtu = u32::MAX;
    let paths = paths(config, imported);
    let remotes: BTreeSet<IpAddr> = paths.iter().map(OuterPath::remote).collect();
    ways.retain(|remote, _| remotes.contains(remote));
    for path in paths {
        let remote = path.remote();
        let outer = match ways.get(&remote) {
            _ if remote.is_loopback() => USUAL_MTU, // stands for an unknown address
            Some(known) => *known,
            None => {
                let outer = netlink.route_mtu_to(remote).await.unwrap_or_else(|error| {
                    info!("the MTU towards {remote} is taken to be {USUAL_MTU}: {error}");
                    USUAL_MTU
                });
                ways.insert(remote, outer);
                outer
            }
        };
        // All suites need the same room.
        let inner = max_inner_bytes(outer as usize, &path, AeadSuite::Aes128Gcm16);
        mtu = mtu.min(inner as u32);
    }
    if mtu == u32::MAX {
        USUAL_MTU
    } else {
        mtu.max(576)
    }
}

/// The way to each peer; where the address is not known yet, one over IPv6, which costs most.
fn paths(config: &Config, imported: &[OuterPath]) -> Vec<OuterPath> {
    let unknown = IpAddr::V6(Ipv6Addr::LOCALHOST);
    let port = config.listen.port();
    let encap = Some(UdpEncap {
        local_port: port,
        remote_port: port,
    });
    let not_negotiated = config.strongswan.is_some() && imported.is_empty();
    let not_negotiated = not_negotiated
        .then(|| OuterPath::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), unknown, encap).ok());
    let peers = config.peers.iter().filter_map(|peer| {
        let remote = match &peer.endpoint {
            Some(Endpoint::Address(address)) => address.ip(),
            _ if config.listen.is_ipv4() => IpAddr::V4(Ipv4Addr::LOCALHOST),
            _ => unknown,
        };
        let local = match remote {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        OuterPath::new(local, remote, encap).ok()
    });
    peers
        .chain(config.static_sas.iter().map(|sa| sa.path))
        .chain(not_negotiated.flatten())
        .chain(imported.iter().copied())
        .collect()
}
