use super::{
    Datagram, Gateway, GatewayId, GatewaySpec, Laws, Network, Random, gateway::host, inner_packet,
    number_of,
};
use esplane_api::{DropCounters, DropStage, Now};
use esplane_control_noise::{LoadPolicy, PeerConfig, StaticSecretKey};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    ops::{Index, IndexMut},
    time::Duration,
};

/// 2030-01-01: the worlds begin.
const UNIX_START: Duration = Duration::from_secs(1_893_456_000);
const SECOND: Duration = Duration::from_secs(1);

/// A clock, a network, gateways and the traffic between the hosts behind them.
pub struct World {
    /// The moment.
    pub now: Now,
    /// What carries the datagrams.
    pub network: Network,
    /// What has been sent and delivered between hosts.
    pub ledger: Ledger,
    /// What must always hold.
    pub laws: Laws,
    gateways: Vec<Gateway>,
    flows: Vec<Flow>,
    random: Random,
    next_second: Duration,
}

/// What hosts have sent to each other and what came of it.
#[derive(Default)]
pub struct Ledger {
    /// The receiver of each packet, by its number.
    pub sent: BTreeMap<u64, GatewayId>,
    /// How often each packet was delivered.
    pub delivered: BTreeMap<u64, u32>,
}

/// Packets sent at a steady pace.
struct Flow {
    from: GatewayId,
    to: GatewayId,
    interval: Duration,
    next: Duration,
    end: Duration,
}

impl World {
    /// An empty world; everything random in it comes from `seed`.
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        Self {
            now: Now {
                monotonic: Duration::from_secs(100),
                unix: UNIX_START,
            },
            network: Network::new(random.number()),
            ledger: Ledger::default(),
            laws: Laws::default(),
            gateways: Vec::new(),
            flows: Vec::new(),
            random,
            next_second: Duration::from_secs(101),
        }
    }

    /// Two gateways that know each other, with 10.1.0.0/16, fd00:1::/32 and 10.2.0.0/16,
    /// fd00:2::/32 behind them. `adjust` may change each one's view of the other before they start.
    pub fn pair(
        seed: u64,
        adjust: impl Fn(GatewayId, &mut PeerConfig),
    ) -> (Self, GatewayId, GatewayId) {
        let (world, ids) = Self::mesh(seed, 2, adjust);
        (world, ids[0], ids[1])
    }

    /// So many gateways that all know each other.
    pub fn mesh(
        seed: u64,
        count: usize,
        adjust: impl Fn(GatewayId, &mut PeerConfig),
    ) -> (Self, Vec<GatewayId>) {
        let mut world = Self::new(seed);
        let mut specs: Vec<_> = (0..count).map(|index| world.spec(index)).collect();
        let known = specs.clone();
        for (index, spec) in specs.iter_mut().enumerate() {
            for (other, peer) in known
                .iter()
                .enumerate()
                .filter(|(other, _)| *other != index)
            {
                let network = other + 1;
                let networks = [
                    format!("10.{network}.0.0/16"),
                    format!("fd00:{network}::/32"),
                ];
                let mut peer = peer.as_peer(other as u32 + 1, &[&networks[0], &networks[1]]);
                adjust(GatewayId(index), &mut peer);
                spec.peers.push(peer);
            }
        }
        let ids = specs.into_iter().map(|spec| world.start(spec)).collect();
        (world, ids)
    }

    /// Starts one more gateway.
    pub fn start(&mut self, spec: GatewaySpec) -> GatewayId {
        self.gateways
            .push(Gateway::start(spec, self.now, &mut self.random));
        self.collect();
        GatewayId(self.gateways.len() - 1)
    }

    /// Stops a gateway as a power cut does, and starts it again from its configuration.
    pub fn restart(&mut self, id: GatewayId) {
        let spec = self[id].spec.clone();
        self.gateways[id.0] = Gateway::start(spec, self.now, &mut self.random);
        self.collect();
    }

    /// One packet of a random size from a host behind `from` to a host behind `to`, IPv4 or IPv6;
    /// returns its number.
    pub fn send(&mut self, from: GatewayId, to: GatewayId) -> u64 {
        let v6 = self.random.chance(0.3);
        self.send_between(from, host(from, 5, v6), to, host(to, 5, v6))
    }

    /// The same from `source` to `destination`.
    pub fn send_between(
        &mut self,
        from: GatewayId,
        source: IpAddr,
        to: GatewayId,
        destination: IpAddr,
    ) -> u64 {
        let number = self.ledger.sent.len() as u64 + 1;
        let bytes = 72 + self.random.below(1228);
        self.ledger.sent.insert(number, to);
        let packet = inner_packet(source, destination, number, bytes);
        let now = self.now;
        self.gateways[from.0].send_clear(now, &[packet]);
        self.collect();
        number
    }

    /// Whether the packet of this number has arrived.
    pub fn has_arrived(&self, number: u64) -> bool {
        self.ledger.delivered.contains_key(&number)
    }

    /// Packets go both ways and arrive.
    ///
    /// # Panics
    /// If they do not within ten seconds.
    pub fn assert_connected(&mut self, a: GatewayId, b: GatewayId) {
        let numbers = [self.send(a, b), self.send(b, a)];
        self.run(10 * SECOND);
        for number in numbers {
            assert!(
                self.has_arrived(number),
                "packet {number} has not arrived; drops: {:?}",
                self.drops()
            );
        }
    }

    /// From now on, so many packets a second from `from` to `to`, for `duration`.
    pub fn flow(
        &mut self,
        from: GatewayId,
        to: GatewayId,
        packets_per_second: u32,
        duration: Duration,
    ) {
        self.flows.push(Flow {
            from,
            to,
            interval: SECOND / packets_per_second,
            next: self.now.monotonic,
            end: self.now.monotonic + duration,
        });
    }

    /// Lets `duration` pass.
    pub fn run(&mut self, duration: Duration) {
        let end = self.now.monotonic + duration;
        let mut idle_steps = 0;
        while let Some(next) = self.next_event().filter(|next| *next <= end) {
            idle_steps = if next > self.now.monotonic {
                0
            } else {
                idle_steps + 1
            };
            assert!(
                idle_steps < 100_000,
                "time stands still: somebody asks to be woken again and again"
            );
            self.advance_to(next);
            self.step();
        }
        self.advance_to(end);
    }

    /// Does something to a gateway's node, such as a reload, and lets it take effect.
    pub fn with_node<R>(
        &mut self,
        id: GatewayId,
        change: impl FnOnce(Now, &mut esplane_gateway::node::Node) -> R,
    ) -> R {
        let now = self.now;
        let gateway = &mut self.gateways[id.0];
        let result = change(now, &mut gateway.node);
        gateway.act(now);
        self.collect();
        result
    }

    /// A datagram that no gateway sent: an attacker's.
    pub fn inject(&mut self, from: SocketAddr, to: GatewayId, payload: &[u8]) {
        let now = self.now;
        self.gateways[to.0].receive(now, from, payload);
        self.collect();
    }

    /// All drops of all gateways since they started.
    pub fn drops(&self) -> DropCounters {
        let mut all = DropCounters::default();
        for gateway in &self.gateways {
            all += gateway.all_drops();
        }
        all
    }

    /// # Panics
    /// If a gateway dropped a packet that is no dummy or keepalive. (Of two handshakes that cross, one is
    /// dropped by design; that is no packet.)
    pub fn assert_nothing_dropped(&self) {
        for (reason, count) in self.drops().iter() {
            let harmless = reason.is_expected() || reason.stage() == DropStage::Handshake;
            assert!(
                count == 0 || harmless,
                "{count} x {reason}: {}",
                reason.meaning()
            );
        }
    }

    /// # Panics
    /// If a packet was delivered twice, or one that the network did not lose was not delivered.
    pub fn assert_nothing_lost(&self) {
        let lost: BTreeSet<_> = self.network.lost.iter().copied().collect();
        let missing: Vec<_> = self
            .ledger
            .sent
            .keys()
            .filter(|number| !self.ledger.delivered.contains_key(number) && !lost.contains(number))
            .collect();
        assert!(
            missing.is_empty(),
            "{} of {} packets lost, and not by the network: {missing:?}; drops: {:?}",
            missing.len(),
            self.ledger.sent.len(),
            self.drops()
        );
        self.assert_nothing_twice();
    }

    /// # Panics
    /// If a packet was delivered twice.
    pub fn assert_nothing_twice(&self) {
        let twice: Vec<_> = self
            .ledger
            .delivered
            .iter()
            .filter(|(_, times)| **times > 1)
            .collect();
        assert!(twice.is_empty(), "delivered more than once: {twice:?}");
    }

    /// A configuration: gateway `index` at 192.0.2.{index + 1}, port 4500.
    pub fn spec(&mut self, index: usize) -> GatewaySpec {
        const NAMES: [&str; 4] = ["berlin", "oslo", "quito", "tokyo"];
        GatewaySpec {
            worker_ports: Vec::new(),
            name: NAMES[index].to_owned(),
            private_key: StaticSecretKey::generate(self.random.bytes32()),
            under_load: LoadPolicy::default(),
            address: SocketAddr::from(([192, 0, 2, index as u8 + 1], 4500)),
            peers: Vec::new(),
        }
    }

    fn advance_to(&mut self, moment: Duration) {
        if moment > self.now.monotonic {
            self.now = self.now.after(moment - self.now.monotonic);
        }
    }

    fn next_event(&self) -> Option<Duration> {
        let flows = self.flows.iter().map(|flow| flow.next);
        let wakes = self.gateways.iter().filter_map(Gateway::next_wake);
        let arrival = self.network.next_arrival();
        flows
            .chain(wakes)
            .chain(arrival)
            .chain([self.next_second])
            .min()
    }

    /// Everything that is due now: arrivals, timers, the second, the hosts.
    fn step(&mut self) {
        let now = self.now;
        while let Some(datagram) = self.network.arrived(now.monotonic) {
            self.deliver(datagram);
        }
        for gateway in &mut self.gateways {
            gateway.wake(now);
        }
        if self.next_second <= now.monotonic {
            self.next_second += SECOND;
            for gateway in &mut self.gateways {
                gateway.second(now);
            }
        }
        self.collect();
        self.send_flows();
    }

    fn deliver(&mut self, datagram: Datagram) {
        let now = self.now;
        match self
            .gateways
            .iter_mut()
            .find(|gateway| gateway.is_at(datagram.to))
        {
            Some(gateway) => gateway.receive(now, datagram.from, &datagram.payload),
            None => {
                self.network.lost.extend(datagram.carries);
                self.network.stray.push(datagram);
            }
        }
        self.collect();
    }

    fn send_flows(&mut self) {
        let mut due = Vec::new();
        for flow in &mut self.flows {
            while flow.next <= self.now.monotonic && flow.next < flow.end {
                due.push((flow.from, flow.to));
                flow.next += flow.interval;
            }
        }
        self.flows.retain(|flow| flow.next < flow.end);
        for (from, to) in due {
            self.send(from, to);
        }
    }

    /// Hands what gateways have sent to the network, and what they have delivered to the ledger.
    fn collect(&mut self) {
        for (index, gateway) in self.gateways.iter_mut().enumerate() {
            for datagram in gateway.take_outbox() {
                self.laws.check(&datagram);
                self.network.send(self.now.monotonic, datagram);
            }
            for packet in gateway.take_delivered() {
                let number = number_of(&packet).expect("only hosts' packets are delivered");
                assert_eq!(
                    self.ledger.sent[&number],
                    GatewayId(index),
                    "delivered to the wrong network"
                );
                *self.ledger.delivered.entry(number).or_default() += 1;
            }
        }
    }
}

impl Index<GatewayId> for World {
    type Output = Gateway;
    fn index(&self, id: GatewayId) -> &Gateway {
        &self.gateways[id.0]
    }
}

impl IndexMut<GatewayId> for World {
    fn index_mut(&mut self, id: GatewayId) -> &mut Gateway {
        &mut self.gateways[id.0]
    }
}
