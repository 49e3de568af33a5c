use super::{Datagram, Random, number_of};
use esplane_api::{DropCounters, DropReason, IpPrefix, Now, SaEvent, SelectorPair, TunnelId};
use esplane_control_noise::{
    Engine, LoadPolicy, NodeConfig, Notice, PeerConfig, PeerStatus, StaticSecretKey,
};
use esplane_dataplane::{
    Batch, Inbound, Outbound, Outer, OuterHeaders, Report, Settings, TableWriter, Verdict,
};
use esplane_gateway::{
    aead,
    node::{Action, Node},
};
use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// Packets of one batch, and packets held while an SA is negotiated.
const BATCH_PACKETS: usize = 32;
/// Workers of a gateway.
const WORKERS: usize = 3;
const HELD_PACKETS_MAX: usize = 64;
const FRAME_BYTES: usize = 2048;

/// A gateway of the world, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GatewayId(pub usize);

/// What survives a restart: a gateway's configuration.
#[derive(Clone)]
pub struct GatewaySpec {
    /// Its name.
    pub name: String,
    /// Its static private key.
    pub private_key: StaticSecretKey,
    /// Where it listens.
    pub address: SocketAddr,
    /// Ports from which its workers from 1 on send with SAs of their own.
    pub worker_ports: Vec<u16>,
    /// When it asks strangers for cookies.
    pub under_load: LoadPolicy,
    /// Its peers.
    pub peers: Vec<PeerConfig>,
}

impl GatewaySpec {
    /// How this gateway's peers name it: reached at its address, these networks behind it, and all
    /// else by default.
    pub fn as_peer(&self, id: u32, networks: &[&str]) -> PeerConfig {
        let selectors = networks.iter().map(|network| {
            let network: IpPrefix = network.parse().expect("a network such as 10.2.0.0/16");
            SelectorPair::to(network)
        });
        let public_key = self.private_key.public_key();
        PeerConfig {
            endpoint: Some(self.address),
            selectors: selectors.collect(),
            ..PeerConfig::new(TunnelId(id), self.name.clone(), public_key)
        }
    }
}

/// One running gateway: a [`Node`] with the scratch memory of workers, who take turns at sending, and a hold queue, without sockets.
pub struct Gateway {
    /// Its configuration, as the next restart finds it.
    pub spec: GatewaySpec,
    /// Where its packets come from now; changes when it roams.
    pub address: SocketAddr,
    /// What a NAT adds to its workers' ports.
    pub nat_shift: u16,
    /// The real thing.
    pub node: Node,
    /// Packets dropped by its dataplane.
    pub drops: DropCounters,
    /// What it told its operator.
    pub notices: Vec<Notice>,
    /// Manually keyed SAs that have ended.
    pub ended: Vec<SaEvent>,
    batch: Batch,
    outbound: [Outbound; WORKERS],
    turn: usize,
    inbound: Inbound,
    report: Report,
    held: VecDeque<Vec<u8>>,
    outbox: Vec<Datagram>,
    delivered: Vec<Vec<u8>>,
}

impl Gateway {
    /// Starts it. `random` is its source of ephemeral keys, as the operating system's is the daemon's.
    pub fn start(spec: GatewaySpec, now: Now, random: &mut Random) -> Self {
        let engine = Engine::new(NodeConfig {
            private_key: spec.private_key.clone(),
            listen_port: spec.address.port(),
            local: None,
            seed: random.bytes32(),
            worker_ports: spec.worker_ports.clone(),
            reserved_spis: Vec::new(),
            under_load: spec.under_load,
        })
        .expect("a valid node");
        let settings = Settings {
            outer_headers: OuterHeaders::ByKernel,
        };
        let mut node = Node::new(
            engine,
            TableWriter::new(settings, aead::choose().expect("a name this CPU knows")),
        );
        node.set_peers(now, spec.peers.clone())
            .expect("valid peers");
        let mut gateway = Self {
            address: spec.address,
            nat_shift: 0,
            spec,
            node,
            drops: DropCounters::default(),
            notices: Vec::new(),
            ended: Vec::new(),
            batch: Batch::new(BATCH_PACKETS, FRAME_BYTES),
            outbound: std::array::from_fn(|worker| {
                Outbound::new(BATCH_PACKETS).of_worker(worker as u16)
            }),
            turn: 0,
            inbound: Inbound::new(BATCH_PACKETS),
            report: Report::new(),
            held: VecDeque::new(),
            outbox: Vec::new(),
            delivered: Vec::new(),
        };
        gateway.act(now);
        gateway
    }

    /// Packets from its private network.
    pub fn send_clear(&mut self, now: Now, packets: &[Vec<u8>]) {
        for run in packets.chunks(BATCH_PACKETS) {
            self.seal(run);
            self.tell_events(now);
        }
        self.act(now);
    }

    /// A datagram from the network.
    pub fn receive(&mut self, now: Now, from: SocketAddr, payload: &[u8]) {
        let outer = Outer {
            local: self.address.ip(),
            remote: from,
            udp: true,
            ..Outer::NONE
        };
        self.batch.clear();
        if !self.batch.push(payload, outer) {
            self.drops.add(DropReason::ReceiveTruncated, 1);
            return;
        }
        self.inbound
            .process(&self.node.tables(), &mut self.batch, &mut self.report);
        match self.batch.packets()[0].verdict {
            Verdict::Forward => self.delivered.push(self.batch.data(0).to_vec()),
            Verdict::Control => self.node.handle_datagram(now, from, self.batch.data(0)),
            Verdict::Drop(_) => {}
            verdict => panic!("{}: an inbound packet is left {verdict:?}", self.spec.name),
        }
        self.tell_events(now);
        self.act(now);
    }

    /// Its timers.
    pub fn wake(&mut self, now: Now) {
        if self
            .node
            .poll_timeout()
            .is_some_and(|at| at <= now.monotonic)
        {
            self.node.handle_timeout(now);
        }
        self.act(now);
    }

    /// Once a second.
    pub fn second(&mut self, now: Now) {
        self.node.handle_second(now);
        self.act(now);
    }

    /// Whatever a story does with [`Gateway::node`] itself takes effect now.
    pub(super) fn act(&mut self, now: Now) {
        while let Some(action) = self.node.poll_action() {
            match action {
                Action::Send { to, datagram } => {
                    let outer = Outer {
                        remote: to,
                        ..Outer::NONE
                    };
                    self.post(outer, datagram, None);
                }
                Action::SendDummy(tunnel) => self.send_dummy(tunnel),
                Action::TablesChanged => self.retry_held(),
                Action::StaticSaEnded(event) => self.ended.push(event),
                Action::Notice(notice) => self.notices.push(notice),
                Action::ExtendReservation { sa, next } => {
                    self.node.extend_sequence(now, sa, next + 1_000_000)
                }
                Action::Refused(error) => {
                    panic!("{}: the dataplane refused: {error}", self.spec.name)
                }
                Action::Xfrm(_) | Action::Vici(_) | Action::ImportNotice(_) => {
                    panic!("{}: no strongSwan is simulated here", self.spec.name)
                }
            }
            self.tell_events(now);
        }
    }

    /// When it wants to be woken.
    pub(super) fn next_wake(&self) -> Option<Duration> {
        self.node.poll_timeout()
    }

    /// What it has sent since the last call.
    pub fn take_outbox(&mut self) -> Vec<Datagram> {
        std::mem::take(&mut self.outbox)
    }

    /// What it has delivered to its private network since the last call.
    pub fn take_delivered(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.delivered)
    }

    /// Drops of its dataplane and of its key exchange together.
    pub fn all_drops(&self) -> DropCounters {
        let mut all = self.drops;
        all += *self.node.handshake_drops();
        all
    }

    /// Everything a forged packet must not change: SAs, windows and what they delivered; peers, where
    /// they are and what was agreed with them.
    pub fn state(&self) -> String {
        let sas = self.node.table_writer().sas();
        let sas = sas.iter().map(|sa| {
            (
                sa.id,
                sa.sequence,
                sa.statistics.packets,
                sa.path,
                sa.active,
            )
        });
        let peers = self.node.peers();
        let peers = peers.iter().map(|peer| {
            (
                &peer.name,
                peer.state,
                peer.endpoint,
                peer.handshakes,
                peer.suite,
            )
        });
        format!(
            "{:#?} {:#?}",
            sas.collect::<Vec<_>>(),
            peers.collect::<Vec<_>>()
        )
    }

    /// What its key exchange says about a peer.
    ///
    /// # Panics
    /// If it has no peer of this name.
    pub fn peer(&self, name: &str) -> PeerStatus {
        let peer = self.node.peers().into_iter().find(|peer| peer.name == name);
        peer.unwrap_or_else(|| panic!("{} has no peer {name}", self.spec.name))
    }

    fn seal(&mut self, packets: &[Vec<u8>]) {
        self.batch.clear();
        for packet in packets {
            assert!(
                self.batch.push(packet, Outer::NONE),
                "stories send packets that fit"
            );
        }
        self.turn = (self.turn + 1) % WORKERS;
        self.outbound[self.turn].process(&self.node.tables(), &mut self.batch, &mut self.report);
        for (index, packet) in packets.iter().enumerate() {
            let sealed = self.batch.packets()[index];
            match sealed.verdict {
                Verdict::Forward => {
                    let data = self.batch.data(index).to_vec();
                    let outer = self.batch.outer_of(&sealed);
                    self.post(outer, data, number_of(packet));
                }
                Verdict::Hold(_) => self.hold(packet.clone()),
                Verdict::Drop(_) => {}
                verdict => panic!("{}: an outbound packet is left {verdict:?}", self.spec.name),
            }
        }
    }

    fn hold(&mut self, packet: Vec<u8>) {
        if self.held.len() == HELD_PACKETS_MAX {
            self.drops.add(DropReason::HoldQueueFull, 1);
            self.held.pop_front();
        }
        self.held.push_back(packet);
    }

    fn retry_held(&mut self) {
        let held: Vec<_> = self.held.drain(..).collect();
        for run in held.chunks(BATCH_PACKETS) {
            self.seal(run);
        }
    }

    fn send_dummy(&mut self, tunnel: TunnelId) {
        self.batch.clear();
        if self.outbound[0].dummy(
            &self.node.tables(),
            tunnel,
            &mut self.batch,
            &mut self.report,
        ) {
            let outer = self.batch.outer_of(&self.batch.packets()[0]);
            let data = self.batch.data(0).to_vec();
            self.post(outer, data, None);
        }
    }

    /// What of the network's it receives: its address, and the ports of its workers there.
    pub(super) fn is_at(&self, to: SocketAddr) -> bool {
        let ports = self.spec.worker_ports.iter();
        let mut ports = ports.map(|port| port + self.nat_shift);
        to == self.address || to.ip() == self.address.ip() && ports.any(|port| port == to.port())
    }

    fn post(&mut self, outer: Outer, payload: Vec<u8>, carries: Option<u64>) {
        let (to, mut from) = (outer.remote, self.address);
        if self.spec.worker_ports.contains(&outer.local_port) {
            from.set_port(outer.local_port + self.nat_shift);
        }
        self.outbox.push(Datagram {
            from,
            to,
            payload,
            carries,
        });
    }

    fn tell_events(&mut self, now: Now) {
        let events: Vec<_> = self.report.drain_events().collect();
        for event in events {
            self.node.handle_event(now, event);
        }
        self.drops += self.report.drops;
        self.report.clear();
    }
}

/// A private network's host, as stories name it: host `host` behind gateway `gateway`.
pub(super) fn host(gateway: GatewayId, host: u8, v6: bool) -> IpAddr {
    let network = gateway.0 + 1;
    let text = if v6 {
        format!("fd00:{network}::{host}")
    } else {
        format!("10.{network}.0.{host}")
    };
    text.parse().expect("an address")
}
