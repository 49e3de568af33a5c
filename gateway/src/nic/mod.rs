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
            Frames, HopsReader, Queue, Steering, Taken, WorkerQueues, XdpError, XdpInner, XdpOuter,
            XdpSocket, next_hops, queues_of,
        },
    },
    netlink::{Link, Netlink, NetlinkError},
    worker::BATCH_PACKETS,
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
    /// Those of each worker.
    pub workers: Vec<WorkerDrivers>,
    /// To be kept as long as the drivers.
    pub nics: Nics,
}

/// What one worker moves packets with.
pub struct WorkerDrivers {
    /// The private side.
    pub inner: Box<dyn Driver>,
    /// The public side.
    pub outer: Box<dyn Driver>,
    /// The frames that both share with the kernel, if any does.
    pub frames: Option<Frames>,
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

/// Puts AF_XDP in front of the drivers, on those sides where the configuration asks for it. `mtu` is what the interface of the
/// tunnels has at most.
pub async fn attach(
    config: &Config,
    netlink: &Netlink,
    inner: Vec<TunQueue>,
    outer: Vec<OuterSockets>,
    mtu: u32,
) -> Result<Attached, NicError> {
    let (mut inner, mut outer) = (boxed(inner), boxed(outer));
    let workers = inner.len();
    let inner_nic = Nic::find(netlink, config.drivers.inner.as_ref(), workers).await?;
    let outer_nic = Nic::find(netlink, config.drivers.outer.as_ref(), workers).await?;
    // 1. The programs, before any socket takes a queue away from the kernel.
    let port = config.listen.port();
    let outer_steering = outer_nic.as_ref().map(|nic| {
        let charons = config.strongswan.as_ref().map_or(port, |it| it.port);
        let ports = [port, charons];
        nic.steer(Taken::Outer { ports })
    });
    let inner_steering = (inner_nic.as_ref()).map(|nic| nic.steer(Taken::Inner { mac: nic.mac }));
    let (outer_steering, inner_steering) =
        (outer_steering.transpose()?, inner_steering.transpose()?);
    // 2. Each worker's queues of both sides, over one memory.
    let (mut inner_queues, mut outer_queues, mut frames) = (Vec::new(), Vec::new(), Vec::new());
    for worker in 0..workers {
        let of = |nic: &Option<Nic>| {
            nic.as_ref()
                .map_or(Vec::new(), |nic| nic.queues_of(worker, workers))
        };
        let (inner, outer) = (of(&inner_nic), of(&outer_nic));
        let are_any = !inner.is_empty() || !outer.is_empty();
        let opened = are_any
            .then(|| WorkerQueues::open(&inner, &outer, BATCH_PACKETS, mtu))
            .transpose()?;
        let opened = opened.map(|it| (it.inner, it.outer, Some(it.frames)));
        let (inner, outer, shared) = opened.unwrap_or_default();
        inner_queues.push(inner);
        outer_queues.push(outer);
        frames.push(shared);
    }
    // 3. The drivers.
    let mut nics = Nics::default();
    if let (Some(nic), Some(steering)) = (outer_nic, outer_steering) {
        let wrap = |queues, kernel, hops| -> Box<dyn Driver> {
            Box::new(XdpOuter::new(queues, kernel, hops, port))
        };
        let hops = nic.start("outer", steering, Towards::Peers, &outer_queues, &mut nics)?;
        outer = wrapped(outer, outer_queues, &hops, wrap);
    }
    if let (Some(nic), Some(steering)) = (inner_nic, inner_steering) {
        let tunnels = netlink.link_index(&config.interface.name).await?;
        let towards = Towards::Hosts { tunnels };
        let wrap = |queues, kernel, hops| -> Box<dyn Driver> {
            Box::new(XdpInner::new(queues, kernel, hops))
        };
        let hops = nic.start("inner", steering, towards, &inner_queues, &mut nics)?;
        inner = wrapped(inner, inner_queues, &hops, wrap);
    }
    let drivers = inner.into_iter().zip(outer).zip(frames);
    let workers = drivers
        .map(|((inner, outer), frames)| WorkerDrivers {
            inner,
            outer,
            frames,
        })
        .collect();
    Ok(Attached { workers, nics })
}

/// AF_XDP in front of the driver of each worker that has queues.
fn wrapped(
    kernel: Vec<Box<dyn Driver>>,
    queues: Vec<Vec<XdpSocket>>,
    hops: &HopsReader,
    wrap: impl Fn(Vec<XdpSocket>, Box<dyn Driver>, HopsReader) -> Box<dyn Driver>,
) -> Vec<Box<dyn Driver>> {
    kernel
        .into_iter()
        .zip(queues)
        .map(|(kernel, queues)| match queues.is_empty() {
            true => kernel,
            false => wrap(queues, kernel, hops.clone()),
        })
        .collect()
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
    /// How many of its queues are ours, from the first on.
    queues: u32,
}

impl Nic {
    /// The interface that the configuration names, if it does.
    async fn find(
        netlink: &Netlink,
        xdp: Option<&XdpInterface>,
        workers: usize,
    ) -> Result<Option<Self>, NicError> {
        let Some(xdp) = xdp else {
            return Ok(None);
        };
        let link = netlink.link(&xdp.name).await?;
        let mac = netlink.mac_of(link.index).await?;
        let mac = mac.ok_or_else(|| NicError::NoMac(xdp.name.clone()))?;
        let there = queues_of(&link.name);
        let wanted = xdp.queues.map_or(there, u32::from);
        if wanted > there {
            let interface = link.name;
            return Err(XdpError::Queues {
                interface,
                there,
                wanted,
            }
            .into());
        }
        let most = (workers * QUEUES_PER_WORKER) as u32;
        if wanted > most {
            warn!(
                "{}: {wanted} queues are more than the workers serve; the kernel keeps all beyond {most}",
                link.name
            );
        }
        let queues = wanted.min(most);
        Ok(Some(Self { link, mac, queues }))
    }

    fn steer(&self, taken: Taken) -> Result<Steering, XdpError> {
        Steering::attach(&self.link.name, self.link.index, taken)
    }

    /// The queues that one worker of so many serves.
    fn queues_of(&self, worker: usize, workers: usize) -> Vec<Queue> {
        (worker as u32..self.queues)
            .step_by(workers)
            .map(|number| Queue {
                interface: self.link.name.clone(),
                link: self.link.index,
                mtu: self.link.mtu,
                number,
            })
            .collect()
    }

    /// Lets frames through to the sockets, and starts the task that keeps all told. Answers where drivers look up next hops.
    fn start(
        self,
        side: &'static str,
        steering: Steering,
        towards: Towards,
        sockets: &[Vec<XdpSocket>],
        nics: &mut Nics,
    ) -> Result<HopsReader, NicError> {
        let Self { link, mac, queues } = self;
        for socket in sockets.iter().flatten() {
            steering.add_socket(socket.queue(), socket)?;
        }
        let zero_copy = sockets.iter().flatten().all(XdpSocket::is_zero_copy);
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
        Ok(reader)
    }
}
