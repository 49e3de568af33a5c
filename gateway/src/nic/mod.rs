//! NIC mode: puts AF_XDP drivers around the kernel's, and keeps them told of the surroundings.
//!
//! ```text
//!   config ─▶ attach ─▶ io/xdp: program on the interface, sockets of its queues, one set a worker
//!                │                       ▲ networks taken      ▲ next hops
//!                └─▶ surroundings.rs ────┴─────────────────────┘
//!                      one task a side: neighbours, routes and addresses of the kernel, live
//! ```

mod surroundings;

use crate::{
    config::{Config, XdpInterface},
    io::{
        DESCRIPTORS_MAX, Driver, OuterSockets, TunQueue,
        xdp::{
            HopsReader, Steering, Taken, XdpError, XdpInner, XdpOuter, XdpSocket, next_hops,
            queues_of,
        },
    },
    netlink::{Link, Netlink, NetlinkError},
};
use surroundings::{Side, Surroundings, Towards};
use tokio::task::AbortHandle;
use tracing::{info, warn};

/// Queues of one interface that one worker serves: its sockets need descriptors too.
const QUEUES_PER_WORKER: usize = DESCRIPTORS_MAX - 6;

/// Why NIC mode could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum NicError {
    /// AF_XDP.
    #[error(transparent)]
    Xdp(#[from] XdpError),
    /// What the kernel says of the interface.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// No Ethernet.
    #[error("`{0}` has no MAC address; NIC mode needs an Ethernet interface")]
    NoMac(String),
}

/// The workers' drivers, and the tasks that keep them told; those end when this is dropped.
pub struct Attached {
    /// The private side of each worker.
    pub inner: Vec<Box<dyn Driver>>,
    /// The public side of each worker.
    pub outer: Vec<Box<dyn Driver>>,
    /// To be kept as long as the drivers.
    pub nics: Nics,
}

/// Programs and tasks of NIC mode.
#[derive(Default)]
pub struct Nics(Vec<AbortHandle>);

impl Drop for Nics {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

/// Puts AF_XDP in front of the drivers, on those sides where the configuration asks for it.
pub async fn attach(
    config: &Config,
    netlink: &Netlink,
    inner: Vec<TunQueue>,
    outer: Vec<OuterSockets>,
) -> Result<Attached, NicError> {
    let mut nics = Nics::default();
    let (mut inner, mut outer) = (boxed(inner), boxed(outer));
    if let Some(xdp) = &config.drivers.outer {
        let port = config.listen.port();
        let nic = Nic::find(netlink, xdp).await?;
        let charons = config.strongswan.as_ref().map_or(port, |it| it.port);
        let taken = Taken::Outer {
            ports: [port, charons],
        };
        let wrap = |queues, kernel, hops| -> Box<dyn Driver> {
            Box::new(XdpOuter::new(queues, kernel, hops, port))
        };
        outer = nic.drive(xdp, "outer", taken, Towards::Peers, outer, wrap, &mut nics)?;
    }
    if let Some(xdp) = &config.drivers.inner {
        let nic = Nic::find(netlink, xdp).await?;
        let taken = Taken::Inner { mac: nic.mac };
        let tunnels = netlink.link_index(&config.interface.name).await?;
        let wrap = |queues, kernel, hops| -> Box<dyn Driver> {
            Box::new(XdpInner::new(queues, kernel, hops))
        };
        inner = nic.drive(
            xdp,
            "inner",
            taken,
            Towards::Hosts { tunnels },
            inner,
            wrap,
            &mut nics,
        )?;
    }
    Ok(Attached { inner, outer, nics })
}

fn boxed<D: Driver + 'static>(drivers: Vec<D>) -> Vec<Box<dyn Driver>> {
    drivers
        .into_iter()
        .map(|driver| Box::new(driver) as Box<dyn Driver>)
        .collect()
}

/// An interface and what its drivers must know of it.
struct Nic {
    link: Link,
    mac: [u8; 6],
}

impl Nic {
    async fn find(netlink: &Netlink, xdp: &XdpInterface) -> Result<Self, NicError> {
        let link = netlink.link(&xdp.name).await?;
        let mac = netlink.mac_of(link.index).await?;
        let mac = mac.ok_or_else(|| NicError::NoMac(xdp.name.clone()))?;
        Ok(Self { link, mac })
    }

    /// Opens the queues, gives each to a worker, and starts the task that keeps all told.
    #[allow(clippy::too_many_arguments)] // one call, above, for each side
    fn drive(
        self,
        xdp: &XdpInterface,
        side: &'static str,
        taken: Taken,
        towards: Towards,
        workers: Vec<Box<dyn Driver>>,
        wrap: impl Fn(Vec<XdpSocket>, Box<dyn Driver>, HopsReader) -> Box<dyn Driver>,
        nics: &mut Nics,
    ) -> Result<Vec<Box<dyn Driver>>, NicError> {
        let Self { link, mac } = self;
        let there = queues_of(&link.name);
        let queues = match xdp.queues.map(u32::from) {
            None => there,
            Some(wanted) if wanted > there => {
                let interface = link.name;
                return Err(XdpError::Queues {
                    interface,
                    there,
                    wanted,
                }
                .into());
            }
            Some(wanted) => wanted,
        };
        let most = workers.len() * QUEUES_PER_WORKER;
        if queues as usize > most {
            warn!(
                "{}: {queues} queues are more than the workers serve; the kernel keeps all beyond {most}",
                link.name
            );
        }
        let steering = Steering::attach(&link.name, link.index, taken)?;
        let mut of_worker: Vec<Vec<XdpSocket>> = workers.iter().map(|_| Vec::new()).collect();
        for queue in 0..queues.min(most as u32) {
            let socket = XdpSocket::open(link.index, &link.name, link.mtu, queue)?;
            steering.add_socket(queue, &socket)?;
            let worker = queue as usize % of_worker.len();
            of_worker[worker].push(socket);
        }
        let zero_copy = of_worker.iter().flatten().all(XdpSocket::is_zero_copy);
        info!(
            "{side} side over AF_XDP: {}, {queues} queues, {} mode, {}",
            link.name,
            steering.mode(),
            if zero_copy { "zero-copy" } else { "copying" }
        );
        let (table, reader, questions) = next_hops();
        let side = Side {
            link: link.index,
            mtu: link.mtu,
            mac,
            towards,
        };
        nics.0
            .push(Surroundings::start(side, steering, table, questions)?);
        let wrapped =
            workers
                .into_iter()
                .zip(of_worker)
                .map(|(kernel, queues)| match queues.is_empty() {
                    true => kernel,
                    false => wrap(queues, kernel, reader.clone()),
                });
        Ok(wrapped.collect())
    }
}
