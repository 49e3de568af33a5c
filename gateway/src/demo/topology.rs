//! The five machines, their links, addresses and routes.
//!
//! ```text
//!   private network A                 the Internet                 private network B
//!  10.1.0.0/24 fd00:a::/64   198.51.100.0/24   203.0.113.0/24   10.2.0.0/24 fd00:b::/64
//!
//!  ┌──────┐      ┌─────────┐        ┌──────────┐        ┌─────────┐      ┌──────┐
//!  │  h1  ├──────┤ gateway ╞════════╡ internet ╞════════╡ gateway ├──────┤  h2  │
//!  │      │.2  .1│   g1    │.2    .1│  router  │.1    .2│   g2    │.1  .2│      │
//!  └──────┘      └─────────┘        └──────────┘        └─────────┘      └──────┘
//!      eth0   inside    outside        a    b      outside    inside    eth0
//! ```
//!
//! The Internet has no route to the private networks, as the real one has none: what the gateways
//! let out in clear cannot arrive, but the wiretap there would see it.

use super::{DemoError, namespaces::Namespace};
use crate::netlink::{Netlink, NetlinkError};
use esplane_api::IpPrefix;
use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    time::{Duration, Instant},
};

/// The MTU of the private networks. A full packet and its ESP headers fit into the Internet's 1500
/// bytes, so that nothing depends on fragmentation.
const PRIVATE_MTU: u32 = 1400;
/// Packets a link's queue holds; see [`super::traffic`] on why less would do.
const QUEUE_PACKETS: u32 = 10_000;

/// How long to wait for links; what then still fails will say so by itself.
const CARRIER_PATIENCE: Duration = Duration::from_secs(5);

/// A private network with its host, and its gateway's address in the Internet.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// 1 or 2.
    pub number: u8,
}

/// Left in the picture.
pub const A: Site = Site { number: 1 };
/// Right in the picture.
pub const B: Site = Site { number: 2 };

impl Site {
    fn v4(self, host: u8) -> IpAddr {
        Ipv4Addr::new(10, self.number, 0, host).into()
    }

    fn v6(self, host: u16) -> IpAddr {
        let site = 9 + u16::from(self.number);
        Ipv6Addr::new(0xfd00, site, 0, 0, 0, 0, 0, host).into()
    }

    fn outside(self, host: u8) -> IpAddr {
        let network = if self.number == 1 {
            [198, 51, 100]
        } else {
            [203, 0, 113]
        };
        Ipv4Addr::new(network[0], network[1], network[2], host).into()
    }

    /// The host's address, IPv4 or IPv6.
    pub fn host(self, ipv6: bool) -> IpAddr {
        if ipv6 { self.v6(2) } else { self.v4(2) }
    }

    /// The gateway's private address, IPv4 or IPv6.
    pub fn gateway(self, ipv6: bool) -> IpAddr {
        if ipv6 { self.v6(1) } else { self.v4(1) }
    }

    /// The gateway's address in the Internet.
    pub fn endpoint(self) -> IpAddr {
        self.outside(2)
    }

    /// The Internet's router next to the gateway.
    fn router(self) -> IpAddr {
        self.outside(1)
    }

    /// The private network, IPv4 or IPv6.
    pub fn network(self, ipv6: bool) -> IpPrefix {
        IpPrefix::truncated(self.gateway(ipv6), if ipv6 { 64 } else { 24 })
    }

    /// Whether an address belongs to the private network.
    pub fn contains(self, address: IpAddr) -> bool {
        self.network(address.is_ipv6()).contains(address)
    }
}

/// The machines, linked and addressed. They go when this goes.
pub struct Topology {
    /// The host of network A.
    pub h1: Namespace,
    /// The gateway of network A.
    pub g1: Namespace,
    /// What lies between.
    pub internet: Namespace,
    /// The gateway of network B.
    pub g2: Namespace,
    /// The host of network B.
    pub h2: Namespace,
    /// Whether this kernel has IPv6.
    pub ipv6: bool,
}

impl Topology {
    /// Builds it all.
    pub fn build() -> Result<Self, DemoError> {
        let create =
            |name| Namespace::create(name).map_err(|source| DemoError::Namespace { name, source });
        let topology = Self {
            h1: create("h1")?,
            g1: create("g1")?,
            internet: create("internet")?,
            g2: create("g2")?,
            h2: create("h2")?,
            ipv6: Path::new("/proc/sys/net/ipv6").exists(),
        };
        for machine in topology.machines() {
            topology
                .set_parameters(machine)
                .map_err(DemoError::io("set kernel parameters of", machine.name()))?;
        }
        topology.link()?;
        topology.address()?;
        topology.wait_for_carriers()?;
        Ok(topology)
    }

    /// All five.
    pub fn machines(&self) -> [&Namespace; 5] {
        [&self.h1, &self.g1, &self.internet, &self.g2, &self.h2]
    }

    /// What the kernels have dropped at interfaces, by machine, interface and direction; zeros left
    /// out. Only for telling where something went missing, so what cannot be read is left out too.
    pub fn kernel_drops(&self) -> BTreeMap<String, u64> {
        let mut drops = BTreeMap::new();
        for machine in self.machines() {
            let table = machine.enter(|| fs::read_to_string("/proc/thread-self/net/dev"));
            for line in table.unwrap_or_default().lines().skip(2) {
                let Some((interface, counters)) = line.split_once(':') else {
                    continue;
                };
                let counters: Vec<&str> = counters.split_whitespace().collect();
                // bytes packets errs drop … of receive, then of transmit, eight columns each
                for (direction, column) in [("in", 3), ("out", 11)] {
                    let count = counters.get(column).and_then(|text| text.parse().ok());
                    if let Some(count @ 1..) = count {
                        let place = format!("{} {} {direction}", machine.name(), interface.trim());
                        drops.insert(place, count);
                    }
                }
            }
        }
        drops
    }

    /// Whether the machine passes packets on.
    fn forwards(&self, machine: &Namespace) -> bool {
        ![self.h1.name(), self.h2.name()].contains(&machine.name())
    }

    fn set_parameters(&self, machine: &Namespace) -> io::Result<()> {
        let forwarding = if self.forwards(machine) { "1" } else { "0" };
        machine.set_parameter("net/ipv4/ip_forward", forwarding)?;
        if !self.ipv6 {
            return Ok(());
        }
        for conf in ["all", "default"] {
            for (parameter, value) in [
                ("disable_ipv6", "0"),
                // Addresses can be used at once: nobody else is there to have them.
                ("accept_dad", "0"),
                ("forwarding", forwarding),
            ] {
                machine.set_parameter(&format!("net/ipv6/conf/{conf}/{parameter}"), value)?;
            }
        }
        Ok(())
    }

    /// Each gateway makes its two cables and hands the far ends over.
    fn link(&self) -> Result<(), DemoError> {
        for (gateway, host, router_end) in [(&self.g1, &self.h1, "a"), (&self.g2, &self.h2, "b")] {
            configure(gateway, async |netlink| {
                netlink.add_veth_pair("inside", "eth0").await?;
                netlink.add_veth_pair("outside", router_end).await?;
                for (end, machine) in [("eth0", host), (router_end, &self.internet)] {
                    let link = netlink.link_index(end).await?;
                    netlink.move_link(link, machine.descriptor()).await?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// A cable carries only when the kernel has noticed that both ends are up, up to a second later;
    /// until then packets vanish.
    fn wait_for_carriers(&self) -> Result<(), DemoError> {
        let since = Instant::now();
        for (machine, ends) in [
            (&self.h1, ["eth0", "eth0"]),
            (&self.g1, ["inside", "outside"]),
            (&self.internet, ["a", "b"]),
            (&self.g2, ["inside", "outside"]),
            (&self.h2, ["eth0", "eth0"]),
        ] {
            configure(machine, async |netlink| {
                for end in ends {
                    while !netlink.link(end).await?.running && since.elapsed() < CARRIER_PATIENCE {
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn address(&self) -> Result<(), DemoError> {
        let families: &[bool] = if self.ipv6 { &[false, true] } else { &[false] };
        let default_route = |ipv6| {
            if ipv6 {
                IpPrefix::ALL_V6
            } else {
                IpPrefix::ALL_V4
            }
        };
        for (site, host, gateway, router_end) in
            [(A, &self.h1, &self.g1, "a"), (B, &self.h2, &self.g2, "b")]
        {
            configure(host, async |netlink| {
                let link = bring_up(&netlink, "eth0", PRIVATE_MTU).await?;
                for ipv6 in families.iter().copied() {
                    let length = site.network(ipv6).length();
                    netlink.add_address(link, site.host(ipv6), length).await?;
                    netlink
                        .add_route_via(default_route(ipv6), site.gateway(ipv6))
                        .await?;
                }
                Ok(())
            })?;
            configure(gateway, async |netlink| {
                let inside = bring_up(&netlink, "inside", PRIVATE_MTU).await?;
                for ipv6 in families.iter().copied() {
                    let length = site.network(ipv6).length();
                    netlink
                        .add_address(inside, site.gateway(ipv6), length)
                        .await?;
                }
                let outside = bring_up(&netlink, "outside", 1500).await?;
                netlink.add_address(outside, site.endpoint(), 24).await?;
                netlink.add_route_via(IpPrefix::ALL_V4, site.router()).await
            })?;
            configure(&self.internet, async |netlink| {
                let link = bring_up(&netlink, router_end, 1500).await?;
                netlink.add_address(link, site.router(), 24).await
            })?;
        }
        Ok(())
    }
}

/// Talks netlink within a machine.
pub fn configure<T: Send>(
    machine: &Namespace,
    job: impl AsyncFnOnce(Netlink) -> Result<T, NetlinkError> + Send,
) -> Result<T, DemoError> {
    let outcome = machine.enter_async(async || job(Netlink::open()?).await);
    outcome
        .map_err(DemoError::io("enter the namespace of", machine.name()))?
        .map_err(|source| DemoError::Configure {
            machine: machine.name(),
            source,
        })
}

/// Brings one interface and the loopback up.
async fn bring_up(netlink: &Netlink, name: &str, mtu: u32) -> Result<u32, NetlinkError> {
    let loopback = netlink.link_index("lo").await?;
    netlink.set_up(loopback).await?;
    let link = netlink.link_index(name).await?;
    netlink.set_mtu(link, mtu).await?;
    netlink.set_queue_packets(link, QUEUE_PACKETS).await?;
    netlink.set_up(link).await?;
    Ok(link)
}
