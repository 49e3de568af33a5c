//! One gateway without control plane: namespace, interfaces, tables, two workers.

use arc_swap::ArcSwap;
use esplane_api::{
    AeadSuite, DfPolicy, Direction, Esn, IpPrefix, KeyMaterial, Lifetime, Now, OuterPath, Policy,
    PolicyAction, SaCommand, SaParams, SelectorPair, SequenceStart, Spi, TunnelId, TunnelParams,
    UdpEncap, WindowSize,
};
use esplane_dataplane::{OuterHeaders, Settings, TableWriter, Tables};
use esplane_gateway::{
    aead,
    hold::HoldLimits,
    io::{
        AddressFilter, OuterSockets, SharedPort, TunOffloads, TunOptions, TunQueue, UdpOffloads,
        frame_bytes,
    },
    netlink::{Netlink, NetlinkError},
    worker::{
        self, BATCH_PACKETS, ToControl, WorkerCounters, WorkerHandle, WorkerSetup, WorkerSnapshot,
    },
};
use nix::sched::{CloneFlags, setns, unshare};
use std::{
    fs::File,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsFd, OwnedFd},
    panic::resume_unwind,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

const WORKERS: usize = 2;
const INNER_MTU: u32 = 1400;
const UDP_PORT: u16 = 4500;
const TUNNEL: TunnelId = TunnelId(1);

#[derive(Clone, Copy, PartialEq)]
pub enum Encapsulation {
    Udp,
    Plain,
    /// In UDP, on a port that another program owns.
    Beside,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Family {
    V4,
    V6,
}

pub struct Sites {
    pub a: Site,
    pub b: Site,
}

pub struct Site {
    namespace: OwnedFd,
    which: usize,
    encapsulation: Encapsulation,
    family: Family,
    writer: TableWriter,
    tables: Arc<ArcSwap<Tables>>,
    counters: Vec<Arc<WorkerCounters>>,
    workers: Vec<WorkerHandle>,
    /// The owner of the port, of either family, and at which addresses we take ESP beside it.
    charon: Vec<UdpSocket>,
    filter: Option<AddressFilter>,
    pub control: mpsc::Receiver<ToControl>,
}

impl Sites {
    /// Both gateways with all offloads, their tunnel defined, no SA yet.
    pub fn start(encapsulation: Encapsulation, family: Family) -> Self {
        Self::start_with(encapsulation, family, [true; 2])
    }

    /// The same, with offloads on either side or not.
    pub fn start_with(encapsulation: Encapsulation, family: Family, offloads: [bool; 2]) -> Self {
        let namespaces = [namespace(), namespace()];
        connect(&namespaces).expect("a cable between the namespaces");
        let [a, b] = namespaces;
        Self {
            a: Site::start(0, a, encapsulation, family, offloads[0]),
            b: Site::start(1, b, encapsulation, family, offloads[1]),
        }
    }

    /// Installs both SAs: inbound ones first, so that nothing arrives too early.
    pub fn install_sas(&mut self) {
        for direction in [Direction::Inbound, Direction::Outbound] {
            for site in [&mut self.a, &mut self.b] {
                let sa = site.sa(direction);
                site.apply(vec![SaCommand::Install(sa)]);
            }
        }
    }
}

impl Site {
    fn start(
        which: usize,
        namespace: OwnedFd,
        encapsulation: Encapsulation,
        family: Family,
        offloads: bool,
    ) -> Self {
        let settings = Settings {
            outer_headers: OuterHeaders::ByKernel,
        };
        let writer = TableWriter::new(settings, aead::choose().expect("a name this CPU knows"));
        let (sender, control) = mpsc::channel(64);
        let mut site = Self {
            namespace,
            which,
            encapsulation,
            family,
            tables: Arc::new(ArcSwap::new(writer.tables())),
            writer,
            counters: Vec::new(),
            workers: Vec::new(),
            charon: Vec::new(),
            filter: None,
            control,
        };
        site.apply(vec![site.tunnel()]);
        let inside = site.namespace.try_clone().expect("another descriptor");
        let (tuns, sockets) = within(&inside, || site.open_drivers(offloads));
        for (index, (tun, outer)) in tuns.into_iter().zip(sockets).enumerate() {
            let counters = Arc::new(WorkerCounters::new());
            let worker = worker::spawn(WorkerSetup {
                index,
                inner: Box::new(tun),
                outer: Box::new(outer),
                tables: Arc::clone(&site.tables),
                control: sender.clone(),
                counters: Arc::clone(&counters),
                pin_to_core: None,
                busy_poll: false,
                batch_packets: BATCH_PACKETS,
                frame_bytes: frame_bytes(INNER_MTU as usize),
                frames: None,
                hold: HoldLimits::default(),
            });
            site.workers.push(worker.expect("a worker"));
            site.counters.push(counters);
        }
        site
    }

    fn open_drivers(&mut self, offloads: bool) -> (Vec<TunQueue>, Vec<OuterSockets>) {
        let options = TunOptions {
            offloads,
            ..TunOptions::new("esp0", WORKERS)
        };
        let tuns = TunQueue::open(&options).expect("a TUN interface");
        block_on(self.configure_tun()).expect("addresses and routes");
        let listen: Vec<SocketAddr> = match self.encapsulation {
            Encapsulation::Udp => vec![SocketAddr::new("::".parse().unwrap(), UDP_PORT)],
            Encapsulation::Plain | Encapsulation::Beside => Vec::new(),
        };
        let plain = self.encapsulation == Encapsulation::Plain;
        let mut sockets = OuterSockets::open_group(&listen, plain, WORKERS).expect("sockets");
        if self.encapsulation == Encapsulation::Beside {
            self.charon = ["0.0.0.0", "::"].map(own_port).into();
            let (shares, filter) = SharedPort::open_group(UDP_PORT, WORKERS).expect("sockets");
            let with_shares = sockets.into_iter().zip(shares);
            sockets = with_shares
                .map(|(sockets, share)| sockets.beside(share))
                .collect();
            self.filter = Some(filter);
            let addresses =
                [Family::V4, Family::V6].map(|family| outer_address(self.which, family));
            self.listen_at(&addresses.map(|address| address.to_string()));
        }
        if !offloads {
            let without = sockets.into_iter().map(OuterSockets::without_offloads);
            sockets = without.collect();
            assert_eq!(tuns[0].offloads(), TunOffloads::default());
            // Beside the owner of the port, what others have made one comes as one all the same.
            let gro = self.encapsulation == Encapsulation::Beside;
            let without = UdpOffloads { gso: false, gro };
            assert_eq!(sockets[0].offloads(), without);
        }
        (tuns, sockets)
    }

    async fn configure_tun(&self) -> Result<(), NetlinkError> {
        let netlink = Netlink::open()?;
        let tun = netlink.link_index("esp0").await?;
        netlink.set_quiet(tun).await?;
        netlink.set_mtu(tun, INNER_MTU).await?;
        netlink.set_up(tun).await?;
        for family in [Family::V4, Family::V6] {
            let length = if family == Family::V4 { 32 } else { 128 };
            netlink.add_address(tun, self.inner(family), length).await?;
            netlink
                .add_route(self.networks(family)[1], tun, 100)
                .await?;
        }
        Ok(())
    }

    /// Takes ESP beside the port's owner at these addresses.
    pub fn listen_at(&mut self, addresses: &[impl AsRef<str>]) {
        let addresses = addresses.iter().map(|text| text.as_ref().parse().unwrap());
        let filter = self.filter.as_mut().expect("a shared port");
        filter.listen_at(addresses.collect()).expect("a filter");
    }

    /// The socket that owns the port.
    pub fn charon(&self, family: Family) -> UdpSocket {
        let socket = &self.charon[usize::from(family == Family::V6)];
        socket.try_clone().expect("another descriptor")
    }

    pub fn outer_socket(&self, family: Family) -> SocketAddr {
        SocketAddr::new(outer_address(self.which, family), UDP_PORT)
    }

    pub fn namespace(&self) -> &OwnedFd {
        &self.namespace
    }

    /// Its address in its private network.
    pub fn inner(&self, family: Family) -> IpAddr {
        let addresses = match family {
            Family::V4 => ["10.1.0.1", "10.2.0.1"],
            Family::V6 => ["fd00:1::1", "fd00:2::1"],
        };
        addresses[self.which].parse().unwrap()
    }

    /// Its own private network and the far one.
    fn networks(&self, family: Family) -> [IpPrefix; 2] {
        let both = match family {
            Family::V4 => ["10.1.0.0/24", "10.2.0.0/24"],
            Family::V6 => ["fd00:1::/64", "fd00:2::/64"],
        };
        [both[self.which], both[1 - self.which]].map(|text| text.parse().unwrap())
    }

    fn selectors(&self) -> Vec<SelectorPair> {
        [Family::V4, Family::V6]
            .map(|family| {
                let [local, remote] = self.networks(family).map(Into::into);
                SelectorPair { local, remote }
            })
            .to_vec()
    }

    fn tunnel(&self) -> SaCommand {
        let policy = |selectors| Policy {
            selectors,
            action: PolicyAction::Protect(TUNNEL),
            priority: 0,
        };
        SaCommand::DefineTunnel(TunnelParams {
            id: TUNNEL,
            name: "far".to_owned(),
            policies: self.selectors().into_iter().map(policy).collect(),
            roaming: false,
            df: DfPolicy::Copy,
        })
    }

    fn sa(&self, direction: Direction) -> SaParams {
        // Who sends decides SPI and key.
        let sender = match direction {
            Direction::Outbound => self.which,
            Direction::Inbound => 1 - self.which,
        };
        let key = [sender as u8 + 1; 20];
        let encap = UdpEncap {
            local_port: UDP_PORT,
            remote_port: UDP_PORT,
        };
        let path = OuterPath::new(
            outer_address(self.which, self.family),
            outer_address(1 - self.which, self.family),
            (self.encapsulation != Encapsulation::Plain).then_some(encap),
        );
        SaParams {
            tunnel: TUNNEL,
            direction,
            spi: Spi::new(0x1000 + sender as u32).unwrap(),
            key: KeyMaterial::new(AeadSuite::Aes128Gcm16, &key).unwrap(),
            esn: Esn::On,
            window: WindowSize::DEFAULT,
            path: path.unwrap(),
            selectors: self.selectors(),
            lifetime: Lifetime::UNLIMITED,
            sequence: SequenceStart::FRESH,
            worker: None,
        }
    }

    fn apply(&mut self, commands: Vec<SaCommand>) {
        self.writer
            .apply(Now::default(), commands)
            .expect("commands that fit");
        self.tables.store(self.writer.tables());
        for worker in &self.workers {
            worker.wake();
        }
    }

    /// Over all workers.
    pub fn snapshot(&self) -> WorkerSnapshot {
        let mut total = WorkerSnapshot::default();
        for counters in &self.counters {
            let one = counters.snapshot();
            total.inner_received += one.inner_received;
            total.inner_sent += one.inner_sent;
            total.outer_received += one.outer_received;
            total.outer_sent += one.outer_sent;
            total.held_packets += one.held_packets;
            total.drops += one.drops;
        }
        total
    }

    /// Sets the MTU of the cable's end.
    pub fn set_link_mtu(&self, mtu: u32) {
        let name = ["link", "far"][self.which];
        within(&self.namespace, || {
            block_on(async {
                let netlink = Netlink::open()?;
                netlink.set_mtu(netlink.link_index(name).await?, mtu).await
            })
        })
        .expect("an MTU that a cable can have");
    }

    pub fn wait_until(&self, condition: impl Fn(&WorkerSnapshot) -> bool) {
        assert!(self.waits_until(condition), "{:?}", self.snapshot());
    }

    /// Whether it comes to that, within a time that is long enough on any machine.
    pub fn waits_until(&self, condition: impl Fn(&WorkerSnapshot) -> bool) -> bool {
        let start = Instant::now();
        while !condition(&self.snapshot()) {
            if start.elapsed() > Duration::from_secs(20) {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Ends the workers; nothing of them is left behind.
    pub fn stop(self) -> WorkerSnapshot {
        self.workers.iter().for_each(WorkerHandle::stop);
        let counters = self.counters;
        for worker in self.workers {
            worker
                .join()
                .expect("a worker that was told to end ends well");
        }
        within(&self.namespace, || {
            let tun = block_on(async { Netlink::open()?.link("esp0").await });
            assert!(matches!(tun, Err(NetlinkError::NoLink(_))), "{tun:?}");
        });
        let mut total = WorkerSnapshot::default();
        for counters in counters {
            let one = counters.snapshot();
            total.inner_received += one.inner_received;
            total.inner_sent += one.inner_sent;
            total.outer_received += one.outer_received;
            total.outer_sent += one.outer_sent;
            total.drops += one.drops;
        }
        total
    }
}

/// A network namespace without a name: it goes with its last descriptor, thread and socket.
pub fn namespace() -> OwnedFd {
    thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("root may make network namespaces");
        // Addresses can be used at once: nobody else is there to have them. Without IPv6 in the kernel, the
        // stories that need it say so themselves.
        for conf in ["all", "default"] {
            for (parameter, value) in [("disable_ipv6", "0"), ("accept_dad", "0")] {
                let _ =
                    std::fs::write(format!("/proc/sys/net/ipv6/conf/{conf}/{parameter}"), value);
            }
        }
        File::open("/proc/thread-self/ns/net")
            .expect("the namespace of this thread")
            .into()
    })
    .join()
    .unwrap_or_else(|panic| resume_unwind(panic))
}

/// Does something within a namespace, in a thread of its own.
pub fn within<T: Send>(namespace: &OwnedFd, job: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("entering the namespace");
            job()
        });
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

pub fn block_on<T>(job: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.expect("a runtime").block_on(job)
}

/// As charon does: every address, not shared.
fn own_port(address: &str) -> UdpSocket {
    let address = SocketAddr::new(address.parse().unwrap(), UDP_PORT);
    let domain = socket2::Domain::for_address(address);
    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None).expect("a socket");
    if address.is_ipv6() {
        socket.set_only_v6(true).expect("IPv6 alone");
    }
    socket.bind(&address.into()).expect("the port");
    let patience = Some(Duration::from_secs(10));
    socket.set_read_timeout(patience).expect("patience");
    socket.into()
}

/// What the port's owner hears next that is no ESP: without UDP_ENCAP it hears that, too.
pub fn next_ike(charon: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    loop {
        let mut buffer = [0; 2048];
        let (bytes, from) = charon.recv_from(&mut buffer).expect("a message");
        if bytes < 4 || buffer[..4] == [0; 4] {
            return (buffer[..bytes].to_vec(), from);
        }
    }
}

pub fn outer_address(which: usize, family: Family) -> IpAddr {
    let addresses = match family {
        Family::V4 => ["192.0.2.1", "192.0.2.2"],
        Family::V6 => ["2001:db8::1", "2001:db8::2"],
    };
    addresses[which].parse().unwrap()
}

/// The cable between both.
pub fn connect(namespaces: &[OwnedFd; 2]) -> Result<(), NetlinkError> {
    within(&namespaces[0], || {
        block_on(async {
            let netlink = Netlink::open()?;
            netlink.add_veth_pair("link", "far").await?;
            let far = netlink.link_index("far").await?;
            netlink.move_link(far, namespaces[1].as_fd()).await
        })
    })?;
    for (which, (namespace, name)) in namespaces.iter().zip(["link", "far"]).enumerate() {
        within(namespace, || {
            block_on(async {
                let netlink = Netlink::open()?;
                netlink.set_up(netlink.link_index("lo").await?).await?;
                let link = netlink.link_index(name).await?;
                for (family, length) in [(Family::V4, 24), (Family::V6, 64)] {
                    let address = outer_address(which, family);
                    netlink.add_address(link, address, length).await?;
                }
                netlink.set_up(link).await
            })
        })?;
    }
    Ok(())
}
