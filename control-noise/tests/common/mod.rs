//! A world for engines: a clock that only moves when told, a network that loses, doubles, reorders
//! and delays by a seed, and a dataplane that does what commands say and complains of every
//! command that a real one would refuse.
#![allow(dead_code)] // each test file uses its part

mod node;

pub use node::*;

use esplane_api::{
    Direction, DropReason, KeyMaterial, LifetimeUnit, Now, SaCommand, SaEvent, SaId, SaParams,
    SelectorPair, Spi, TunnelActivity, TunnelId,
};
use esplane_control_noise::{
    Engine, LoadPolicy, NodeConfig, Notice, NoticeEvent, Output, PeerConfig, PeerState, PeerStatus,
    PresharedKey, StaticSecretKey,
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
    time::Duration,
};

pub const TUNNEL: TunnelId = TunnelId(1);
/// 2026-01-01, in seconds of Unix time.
const EPOCH: Duration = Duration::from_secs(1_767_225_600);

pub fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

pub fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub fn secret(number: u8) -> StaticSecretKey {
    StaticSecretKey::generate([number; 32])
}

pub fn psk(number: u8) -> Option<PresharedKey> {
    Some(PresharedKey::generate([number; 32]))
}

/// Two keys in the order of their public halves: the first wins simultaneous initiations.
pub fn ordered_secrets() -> (StaticSecretKey, StaticSecretKey) {
    let (one, other) = (secret(1), secret(2));
    if one.public_key() < other.public_key() {
        (one, other)
    } else {
        (other, one)
    }
}

pub fn address(node: usize) -> SocketAddr {
    format!("192.0.2.{}:4500", node + 1).parse().unwrap()
}

pub fn node_config(key: StaticSecretKey, seed: u8) -> NodeConfig {
    NodeConfig {
        private_key: key,
        listen_port: 4500,
        local: None,
        seed: [seed; 32],
        worker_ports: Vec::new(),
        reserved_spis: Vec::new(),
        under_load: LoadPolicy::default(),
    }
}

/// The peer `key` with a route of its own.
pub fn peer_config(
    id: TunnelId,
    name: &str,
    key: &StaticSecretKey,
    endpoint: Option<SocketAddr>,
) -> PeerConfig {
    PeerConfig {
        endpoint,
        selectors: vec![SelectorPair::to(
            format!("10.{}.0.0/16", id.0).parse().unwrap(),
        )],
        ..PeerConfig::new(id, name, key.public_key())
    }
}

/// Small random numbers for the network; nothing secret.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// True `percent` times in a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.roll() % 100 < percent
    }
}

/// What the network does to packets, in percent and milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    pub lose_percent: u64,
    pub double_percent: u64,
    pub delay_ms: (u64, u64),
}

impl Faults {
    pub const NONE: Self = Self {
        lose_percent: 0,
        double_percent: 0,
        delay_ms: (10, 10),
    };
}

#[derive(Clone, Debug)]
pub enum Cargo {
    Handshake(Vec<u8>),
    /// An ESP packet: sealed if the key is the same, which is all that matters here.
    Esp {
        spi: Spi,
        key: KeyMaterial,
        number: Option<u64>,
    },
}

#[derive(Clone, Debug)]
pub struct Packet {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub cargo: Cargo,
}

impl Packet {
    /// The type byte of a handshake message, 0 for ESP.
    pub fn kind(&self) -> u8 {
        match &self.cargo {
            Cargo::Handshake(datagram) => datagram[8],
            Cargo::Esp { .. } => 0,
        }
    }

    pub fn is_dummy(&self) -> bool {
        matches!(self.cargo, Cargo::Esp { number: None, .. })
    }
}

pub type Filter = Box<dyn FnMut(&Packet, Duration) -> bool>;

pub struct World {
    pub now: Duration,
    pub nodes: Vec<Node>,
    pub handshake_faults: Faults,
    pub esp_faults: Faults,
    /// Sees every packet before the network does; `false` loses it.
    pub filter: Filter,
    /// Every packet that was sent.
    pub log: Vec<(Duration, Packet)>,
    in_flight: BTreeMap<(Duration, u64), Packet>,
    dice: Dice,
    serial: u64,
    next_number: u64,
    next_tick: Duration,
}

impl World {
    pub fn new(seed: u64) -> Self {
        Self {
            now: seconds(1000),
            nodes: Vec::new(),
            handshake_faults: Faults::NONE,
            esp_faults: Faults::NONE,
            filter: Box::new(|_, _| true),
            log: Vec::new(),
            in_flight: BTreeMap::new(),
            dice: Dice::new(seed),
            serial: 0,
            next_number: 0,
            next_tick: seconds(1001),
        }
    }

    /// Two nodes that know each other; `adjust` sees both configurations before they count.
    pub fn pair(seed: u64, adjust: impl Fn(usize, &mut PeerConfig)) -> Self {
        let (first, second) = ordered_secrets();
        let mut world = Self::new(seed);
        world.add(node_config(first.clone(), seed as u8 ^ 1));
        world.add(node_config(second.clone(), seed as u8 ^ 2));
        for (node, name, key) in [(0, "east", &second), (1, "west", &first)] {
            let mut peer = peer_config(TUNNEL, name, key, Some(address(1 - node)));
            adjust(node, &mut peer);
            world.set_peers(node, vec![peer]);
        }
        world
    }

    pub fn add(&mut self, config: NodeConfig) -> usize {
        let index = self.nodes.len();
        self.nodes.push(Node {
            engine: Engine::new(config).unwrap(),
            address: address(index),
            unix_offset: 0,
            tunnels: BTreeMap::new(),
            definitions: BTreeMap::new(),
            notices: Vec::new(),
            delivered: BTreeSet::new(),
            undeliverable: 0,
            keys: Vec::new(),
            most_inbound: 0,
            sent_per_sa: BTreeMap::new(),
        });
        index
    }

    /// The node loses all its state, keys included, and starts over.
    pub fn restart(&mut self, node: usize, config: NodeConfig, peers: Vec<PeerConfig>) {
        let old = &mut self.nodes[node];
        old.engine = Engine::new(config).unwrap();
        old.tunnels.clear();
        old.definitions.clear();
        self.set_peers(node, peers);
    }

    pub fn time(&self, node: usize) -> Now {
        let unix = EPOCH + self.now;
        let offset = self.nodes[node].unix_offset;
        let unix = if offset < 0 {
            unix - seconds(offset.unsigned_abs())
        } else {
            unix + seconds(offset as u64)
        };
        Now {
            monotonic: self.now,
            unix,
        }
    }

    pub fn set_peers(&mut self, node: usize, peers: Vec<PeerConfig>) {
        let now = self.time(node);
        self.nodes[node].engine.set_peers(now, peers).unwrap();
        self.carry_out(node);
    }

    pub fn initiate(&mut self, node: usize) {
        let now = self.time(node);
        self.nodes[node].engine.initiate(now, TUNNEL);
        self.carry_out(node);
    }

    pub fn event(&mut self, node: usize, event: SaEvent) {
        let now = self.time(node);
        self.nodes[node].engine.handle_event(now, event);
        self.carry_out(node);
    }

    /// Hands a datagram (with its marker) to a node as if it came from there, right now.
    pub fn deliver_handshake(&mut self, node: usize, from: SocketAddr, datagram: &[u8]) {
        let now = self.time(node);
        self.nodes[node]
            .engine
            .handle_datagram(now, from, &datagram[4..]);
        self.carry_out(node);
    }

    /// A data packet for the tunnel: sent, or held until there is an SA.
    pub fn send_data(&mut self, node: usize) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        let sas = self.nodes[node].tunnels.get_mut(&TUNNEL).unwrap();
        if sas.active.is_none() {
            sas.held.push_back(number);
            self.event(node, SaEvent::SaNeeded { tunnel: TUNNEL });
        } else {
            self.seal(node, TUNNEL, Some(number));
        }
        number
    }

    /// Sends a packet each way every `every` until `until`.
    pub fn talk_until(&mut self, until: Duration, every: Duration) -> Vec<(usize, u64)> {
        let mut sent = Vec::new();
        while self.now < until {
            for node in 0..2 {
                sent.push((node, self.send_data(node)));
            }
            self.run_until(self.now + every);
        }
        sent
    }

    /// Panics unless each packet that was sent by one of two nodes came out at the other.
    pub fn assert_delivered(&self, sent: &[(usize, u64)]) {
        let lost: Vec<_> = sent
            .iter()
            .filter(|(from, number)| !self.nodes[1 - from].delivered.contains(number))
            .collect();
        assert!(
            lost.is_empty(),
            "{} of {} lost: {:?}",
            lost.len(),
            sent.len(),
            &lost[..lost.len().min(20)]
        );
    }

    pub fn run_for(&mut self, time: Duration) {
        self.run_until(self.now + time);
    }

    pub fn run_until(&mut self, until: Duration) {
        loop {
            let timers = self
                .nodes
                .iter()
                .filter_map(|node| node.engine.poll_timeout());
            let arrival = self.in_flight.keys().next().map(|(at, _)| *at);
            let next = timers.chain(arrival).chain([self.next_tick]).min().unwrap();
            if next > until {
                self.now = self.now.max(until);
                return;
            }
            self.now = self.now.max(next);
            self.step();
        }
    }

    fn step(&mut self) {
        if let Some(entry) = self.in_flight.first_entry()
            && entry.key().0 <= self.now
        {
            let packet = entry.remove();
            self.arrive(packet);
        }
        for node in 0..self.nodes.len() {
            if self.nodes[node]
                .engine
                .poll_timeout()
                .is_some_and(|due| due <= self.now)
            {
                let now = self.time(node);
                self.nodes[node].engine.handle_timeout(now);
                self.carry_out(node);
            }
        }
        if self.next_tick <= self.now {
            self.next_tick += seconds(1);
            for node in 0..self.nodes.len() {
                let now = self.time(node);
                let activity: Vec<_> = self.nodes[node]
                    .tunnels
                    .iter()
                    .map(|(id, sas)| sas.activity(*id))
                    .collect();
                self.nodes[node].engine.handle_activity(now, &activity);
                self.carry_out(node);
            }
        }
    }

    fn arrive(&mut self, packet: Packet) {
        let Some(node) = self.nodes.iter().position(|node| node.address == packet.to) else {
            return;
        };
        match packet.cargo {
            Cargo::Handshake(datagram) => self.deliver_handshake(node, packet.from, &datagram),
            Cargo::Esp { spi, key, number } => {
                for event in self.nodes[node].open(packet.from, spi, &key, number) {
                    self.event(node, event);
                }
            }
        }
    }

    /// Does what the engine wants done, in its order.
    pub fn carry_out(&mut self, node: usize) {
        while let Some(output) = self.nodes[node].engine.poll_output() {
            match output {
                Output::Send { to, datagram } => {
                    assert_eq!(datagram[..4], [0; 4], "the non-ESP marker");
                    self.transmit(node, to, Cargo::Handshake(datagram));
                }
                Output::Commands(commands) => {
                    self.nodes[node].apply(commands);
                    let sendable: Vec<_> = self.nodes[node].release_held();
                    for (tunnel, number) in sendable {
                        self.seal(node, tunnel, Some(number));
                    }
                }
                Output::SendDummy(tunnel) => self.seal(node, tunnel, None),
                Output::Notice(notice) => self.nodes[node].notices.push(notice),
            }
        }
    }

    fn seal(&mut self, node: usize, tunnel: TunnelId, number: Option<u64>) {
        let sas = self.nodes[node].tunnels.get_mut(&tunnel).unwrap();
        // As if four workers took turns.
        let worker = number.map(|number| (number % 4) as u16);
        let own = worker.and_then(|worker| sas.of_workers.get(&worker));
        let spi = own.copied().or(sas.active);
        let spi = spi.expect("a packet is sealed with an active SA");
        let sa = sas.outbound.iter().find(|sa| sa.spi == spi).unwrap();
        sas.activity.0 += u64::from(number.is_some());
        let (to, cargo) = (
            sa.path.remote_socket(),
            Cargo::Esp {
                spi,
                key: sa.key.clone(),
                number,
            },
        );
        let lifetime = (sa.lifetime, sa.id());
        self.transmit(node, to, cargo);
        let sent = self.nodes[node].sent_per_sa.entry(spi).or_default();
        *sent += 1;
        let sent = *sent;
        if lifetime.0.soft().packets == Some(sent) {
            self.event(
                node,
                SaEvent::SoftExpired {
                    sa: lifetime.1,
                    unit: LifetimeUnit::Packets,
                },
            );
        }
    }

    fn transmit(&mut self, node: usize, to: SocketAddr, cargo: Cargo) {
        let packet = Packet {
            from: self.nodes[node].address,
            to,
            cargo,
        };
        self.log.push((self.now, packet.clone()));
        if !(self.filter)(&packet, self.now) {
            return;
        }
        let faults = if packet.kind() == 0 {
            self.esp_faults
        } else {
            self.handshake_faults
        };
        if self.dice.chance(faults.lose_percent) {
            return;
        }
        let copies = 1 + u64::from(self.dice.chance(faults.double_percent));
        for _ in 0..copies {
            let (least, most) = faults.delay_ms;
            let delay = ms(least + self.dice.roll() % (most - least + 1));
            self.serial += 1;
            self.in_flight
                .insert((self.now + delay, self.serial), packet.clone());
        }
    }

    pub fn status(&self, node: usize) -> PeerStatus {
        self.nodes[node].engine.peers().remove(0)
    }

    pub fn is_established(&self) -> bool {
        (0..2).all(|node| self.status(node).state == PeerState::Established)
    }

    pub fn drops(&self, node: usize, reason: DropReason) -> u64 {
        self.nodes[node].engine.drops()[reason]
    }

    /// Handshake messages of one type that were sent so far.
    pub fn count_sent(&self, kind: u8) -> usize {
        self.log
            .iter()
            .filter(|(_, packet)| packet.kind() == kind)
            .count()
    }

    /// The last handshake message of one type that a node sent.
    pub fn last_sent(&self, node: usize, kind: u8) -> Vec<u8> {
        let address = self.nodes[node].address;
        let found = self
            .log
            .iter()
            .rev()
            .find(|(_, packet)| packet.from == address && packet.kind() == kind);
        match &found.expect("such a message was sent").1.cargo {
            Cargo::Handshake(datagram) => datagram.clone(),
            Cargo::Esp { .. } => unreachable!(),
        }
    }

    /// Panics unless each end sends with a key that the other receives with, and not the same both ways.
    pub fn assert_keys_match(&self) {
        let mut all: Vec<&KeyMaterial> = Vec::new();
        for node in 0..2 {
            let sas = &self.nodes[node].tunnels[&TUNNEL];
            assert!(sas.outbound.iter().any(|sa| Some(sa.spi) == sas.active));
            for sa in &sas.outbound {
                let received = &self.nodes[1 - node].tunnels[&TUNNEL].inbound[&sa.spi].params;
                assert!(received.key.same_secret(&sa.key), "key of node {node}");
                assert_eq!(received.esn, sa.esn);
                assert!(
                    !all.iter().any(|key| key.same_secret(&sa.key)),
                    "each SA has its own key"
                );
                all.push(&sa.key);
            }
        }
    }

    /// What must not change when a message is dropped.
    pub fn fingerprint(
        &self,
        node: usize,
    ) -> (
        Vec<Spi>,
        Option<Spi>,
        Option<Duration>,
        Option<SocketAddr>,
        u64,
    ) {
        let sas = &self.nodes[node].tunnels[&TUNNEL];
        let status = self.status(node);
        (
            sas.inbound.keys().copied().collect(),
            sas.active,
            self.nodes[node].engine.poll_timeout(),
            status.endpoint,
            status.handshakes,
        )
    }
}
