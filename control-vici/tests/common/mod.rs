//! Two gateways behind charon: a kernel's SA database, an importer and a real dataplane each.
//!
//! ```text
//!   10.1.0.0/16 ── west 192.0.2.1 ═══ ESP ═══ 192.0.2.2 east ── 10.2.0.0/16
//!
//!     story ──ViciEvent──▶ Importer ──SaCommand──▶ TableWriter, Outbound, Inbound
//!       └─ NEWSA, DELSA ─▶ Sadb ──XfrmEvent──▶ ▲  ◀─XfrmRequest: stored, answered at once or when the story says
//! ```
//!
//! After every event [`End::check`] holds the laws; [`World::talk`] sends numbered packets both ways.
#![allow(dead_code, reason = "each test file uses its share")]

mod facts;
pub mod orders;

pub use facts::*;

use esplane_api::*;
use esplane_control_vici::{importer::*, vici::*, xfrm::*};
use esplane_dataplane::*;
use std::{
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// A kernel's SA database, as far as inert SAs need one.
#[derive(Default)]
pub struct Sadb {
    pub sas: BTreeMap<SaKey, XfrmSa>,
    /// Ages: creation order by (SPI).
    pub clock: u64,
    /// Whether stores fail.
    pub broken: bool,
}

/// One gateway.
pub struct End {
    pub side: Side,
    pub address: IpAddr,
    pub peer: IpAddr,
    pub now: Now,
    pub settings: ImportSettings,
    pub importer: Importer,
    pub writer: TableWriter,
    pub outbound: Outbound,
    pub inbound: Inbound,
    pub report: Report,
    pub sadb: Sadb,
    /// Answers of the kernel that the story has not delivered yet.
    pub replies: VecDeque<XfrmReply>,
    /// Whether answers wait for the story.
    pub slow_kernel: bool,
    pub asked: Vec<ViciRequest>,
    pub told: Vec<XfrmRequest>,
    pub notices: Vec<ImportNotice>,
    pub held: Vec<Vec<u8>>,
    pub refusals: Vec<String>,
    pub refuse_next: u32,
    pub defined: Vec<TunnelParams>,
    /// SPIs of outbound SAs by age, as the kernel got them; what sends must be the oldest that can.
    pub ages: BTreeMap<Spi, u64>,
    /// Whether facts come that no charon tells: then only nonces and the dataplane's consent are watched.
    pub chaos: bool,
    sent_as: HashSet<(Vec<u8>, u64)>,
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

impl End {
    pub fn new(side: Side) -> Self {
        Self::with(side, ImportSettings::default())
    }

    pub fn with(side: Side, settings: ImportSettings) -> Self {
        let (west, east) = (ip("192.0.2.1"), ip("192.0.2.2"));
        let (address, peer) = match side {
            Side::West => (west, east),
            Side::East => (east, west),
        };
        Self {
            side,
            address,
            peer,
            now: Now::default().after(Duration::from_secs(1000)),
            importer: Importer::new(settings.clone()),
            settings,
            writer: writer(),
            outbound: Outbound::new(64),
            inbound: Inbound::new(64),
            report: Report::new(),
            sadb: Sadb::default(),
            replies: VecDeque::new(),
            slow_kernel: false,
            asked: Vec::new(),
            told: Vec::new(),
            notices: Vec::new(),
            held: Vec::new(),
            refusals: Vec::new(),
            refuse_next: 0,
            defined: Vec::new(),
            ages: BTreeMap::new(),
            chaos: false,
            sent_as: HashSet::new(),
        }
    }

    // ---- the events

    pub fn vici(&mut self, event: ViciEvent) {
        self.importer.handle_vici(self.now, event);
        self.drain();
    }

    pub fn xfrm(&mut self, event: XfrmEvent) {
        self.importer.handle_xfrm(self.now, event);
        self.drain();
    }

    pub fn event(&mut self, event: SaEvent) {
        self.importer.handle_event(self.now, event);
        self.drain();
    }

    /// UPDSA or NEWSA.
    pub fn add(&mut self, of: &Negotiated, direction: Direction) {
        let sa = self.sa(of, direction);
        self.add_sa(sa);
    }

    pub fn add_sa(&mut self, sa: XfrmSa) {
        self.sadb.clock += 1;
        let age = self.sadb.clock;
        if sa.key.destination != self.address {
            self.ages.entry(sa.key.spi).or_insert(age);
        }
        self.sadb.sas.insert(sa.key, sa.clone());
        self.xfrm(XfrmEvent::Installed(sa));
    }

    /// DELSA.
    pub fn delete(&mut self, of: &Negotiated, direction: Direction) {
        let key = self.sa(of, direction).key;
        self.delete_key(key);
    }

    pub fn delete_key(&mut self, key: SaKey) {
        self.sadb.sas.remove(&key);
        self.ages.remove(&key.spi);
        self.xfrm(XfrmEvent::Removed(key));
    }

    pub fn child_up(&mut self, of: &Negotiated) {
        let ike = self.ike(of, vec![self.child(of)]);
        self.vici(ViciEvent::ChildUpDown { up: true, ike });
    }

    pub fn child_down(&mut self, of: &Negotiated) {
        let ike = self.ike(of, vec![self.child(of)]);
        self.vici(ViciEvent::ChildUpDown { up: false, ike });
    }

    pub fn child_rekey(&mut self, old: &Negotiated, new: &Negotiated) {
        let replaced = ChildSa {
            state: ChildState::Replaced,
            ..self.child(old)
        };
        self.vici(ViciEvent::ChildRekey {
            ike: self.ike(new, Vec::new()),
            old: replaced,
            new: self.child(new),
        });
    }

    /// Everything charon has: these.
    pub fn charon_snapshot(&mut self, of: &[&Negotiated]) {
        let ikes = of.iter().map(|one| self.ike(one, vec![self.child(one)]));
        let ikes = ikes.collect();
        self.vici(ViciEvent::Snapshot(ikes));
    }

    pub fn kernel_snapshot(&mut self) {
        let all = self.sadb.sas.values().cloned().collect();
        self.xfrm(XfrmEvent::Snapshot(all));
    }

    /// Starts with empty lists.
    pub fn start(&mut self) {
        self.kernel_snapshot();
        self.charon_snapshot(&[]);
    }

    /// Both SAs and charon's word, as at the initiator of the first exchange.
    pub fn establish(&mut self, of: &Negotiated) {
        self.add(of, Direction::Inbound);
        self.add(of, Direction::Outbound);
        self.child_up(of);
    }

    /// Killed and started again: all is forgotten but the kernel's database and what was sent.
    pub fn restart(&mut self, charon: &[&Negotiated]) {
        self.importer = Importer::new(self.settings.clone());
        self.writer = writer();
        self.replies.clear();
        self.kernel_snapshot();
        self.charon_snapshot(charon);
    }

    pub fn answer_one(&mut self) -> bool {
        match self.replies.pop_front() {
            Some(reply) => {
                self.xfrm(XfrmEvent::Reply(reply));
                true
            }
            None => false,
        }
    }

    pub fn later(&mut self, by: Duration) {
        self.now = self.now.after(by);
        while let Some(at) = self.importer.poll_timeout()
            && at <= self.now.monotonic
        {
            self.importer.handle_timeout(self.now);
            self.drain();
        }
    }

    pub fn second(&mut self) {
        self.later(Duration::from_secs(1));
        for event in self.writer.tick(self.now) {
            self.importer.handle_event(self.now, event);
        }
        self.importer.handle_usage(self.now, &self.writer.sas());
        self.drain();
    }

    pub fn drain(&mut self) {
        loop {
            while let Some(output) = self.importer.poll_output() {
                self.carry_out(output);
            }
            if self.slow_kernel || !self.answer_one_without_drain() {
                break;
            }
        }
        self.check();
    }

    fn answer_one_without_drain(&mut self) -> bool {
        let Some(reply) = self.replies.pop_front() else {
            return false;
        };
        self.importer.handle_xfrm(self.now, XfrmEvent::Reply(reply));
        true
    }

    fn carry_out(&mut self, output: ImportOutput) {
        match output {
            ImportOutput::Commands(commands) => {
                assert!(!commands.is_empty());
                for command in &commands {
                    if let SaCommand::DefineTunnel(params) = command {
                        self.defined.push(params.clone());
                    }
                }
                let adds = |command: &SaCommand| matches!(command, SaCommand::Install(_));
                let may_refuse = u32::from(commands.iter().any(adds));
                let refused = match (self.refuse_next * may_refuse).checked_sub(1) {
                    Some(left) => {
                        self.refuse_next = left;
                        Some("as the story wants".to_owned())
                    }
                    None => match self.writer.apply(self.now, commands.clone()) {
                        Ok(()) => None,
                        Err(error) => panic!("{:?}: {error}\n{commands:#?}", self.side),
                    },
                };
                if let Some(reason) = refused {
                    self.refusals.push(reason.clone());
                    self.importer.handle_refusal(self.now, &reason);
                }
            }
            ImportOutput::Xfrm(request) => self.tell_kernel(request),
            ImportOutput::Vici(request) => self.asked.push(request),
            ImportOutput::Notice(notice) => {
                assert!(!notice.to_string().is_empty());
                self.notices.push(notice);
            }
        }
    }

    fn tell_kernel(&mut self, request: XfrmRequest) {
        self.told.push(request);
        let reply = match request {
            XfrmRequest::Store { key, progress } => {
                let broken = self.sadb.broken;
                let sa = self.sadb.sas.get_mut(&key).filter(|_| !broken);
                let done = sa.is_some();
                if let Some(sa) = sa {
                    if let Some(number) = progress.sent {
                        assert!(number >= sa.sequence_sent, "a stored number went back");
                    }
                    sa.sequence_sent = progress.sent.unwrap_or(sa.sequence_sent);
                    sa.sequence_received = progress.received.unwrap_or(sa.sequence_received);
                    (sa.packets, sa.bytes) = (progress.packets, progress.bytes);
                }
                XfrmReply {
                    key,
                    done,
                    sequence_sent: progress.sent.filter(|_| done),
                }
            }
            XfrmRequest::Expire { key, .. } => XfrmReply {
                key,
                done: self.sadb.sas.contains_key(&key),
                sequence_sent: None,
            },
            XfrmRequest::Acquire { .. } | XfrmRequest::PeerMoved { .. } => return,
        };
        self.replies.push_back(reply);
    }

    // ---- the laws

    pub fn check(&self) {
        let all = self.writer.sas();
        let installed: BTreeSet<(Direction, Spi)> =
            all.iter().map(|sa| (sa.id.direction, sa.id.spi)).collect();
        let active: Vec<Spi> = (all.iter())
            .filter(|sa| sa.id.direction == Direction::Outbound && sa.active)
            .map(|sa| sa.id.spi)
            .collect();
        // What sends has its inbound half, if the kernel has that: else the answer would be lost.
        for spi in &active {
            let number = spi.get() & 0xfff;
            let inbound = self.sadb.sas.values().find(|sa| {
                sa.key.destination == self.address && sa.key.spi.get() & 0xfff == number
            });
            if let Some(inbound) = inbound.filter(|_| !self.chaos) {
                let name = (Direction::Inbound, inbound.key.spi);
                assert!(
                    installed.contains(&name),
                    "sends before it can receive: {spi}"
                );
            }
        }
        // Numbers are stored before they are used.
        for sa in (all.iter()).filter(|sa| sa.id.direction == Direction::Outbound) {
            let of_spi = self.sadb.sas.values().filter(|stored| {
                stored.key.destination != self.address && stored.key.spi == sa.id.spi
            });
            if let Some(stored) = of_spi.map(|stored| stored.sequence_sent).max() {
                assert!(sa.sequence <= stored, "used without being stored");
            }
        }
    }

    /// Of all outbound SAs in the kernel the oldest sends.
    pub fn check_oldest_sends(&self) {
        let oldest = self
            .ages
            .iter()
            .min_by_key(|(_, age)| **age)
            .map(|(spi, _)| *spi);
        assert_eq!(self.sender(), oldest, "{:?} at {:?}", self.ages, self.side);
    }

    pub fn sender(&self) -> Option<Spi> {
        let all = self.writer.sas();
        let mut active = all
            .iter()
            .filter(|sa| sa.id.direction == Direction::Outbound && sa.active);
        active.next().map(|sa| sa.id.spi)
    }

    pub fn installed(&self, direction: Direction) -> Vec<Spi> {
        let all = self.writer.sas().into_iter();
        all.filter(|sa| sa.id.direction == direction)
            .map(|sa| sa.id.spi)
            .collect()
    }

    pub fn last_defined(&self) -> &TunnelParams {
        self.defined.last().unwrap()
    }

    pub fn notice_texts(&self) -> String {
        let texts: Vec<String> = self.notices.iter().map(ToString::to_string).collect();
        texts.join("\n")
    }

    // ---- packets

    /// Sends one inner packet; what leaves, or `None` while it is held.
    pub fn seal(&mut self, inner: &[u8]) -> Option<Vec<u8>> {
        let tables = self.writer.tables();
        let mut batch = filled(inner);
        self.outbound.process(&tables, &mut batch, &mut self.report);
        match batch.packets()[0].verdict {
            Verdict::Forward => {
                let sealed = batch.data(0).to_vec();
                let esp = &sealed[esp_at(&sealed)..];
                let spi = u32::from_be_bytes(esp[..4].try_into().unwrap());
                let iv = u64::from_be_bytes(esp[8..16].try_into().unwrap());
                let key = self.key_that_sends(spi, &sealed[16..20]);
                assert!(
                    self.sent_as.insert((key, iv)),
                    "number {iv} of {spi:#x} used twice"
                );
                Some(sealed)
            }
            Verdict::Hold(_) => {
                self.held.push(inner.to_vec());
                None
            }
            Verdict::Drop(_) if self.chaos => None,
            other => panic!("{:?}: {other:?}", self.side),
        }
    }

    fn key_that_sends(&self, spi: u32, destination: &[u8]) -> Vec<u8> {
        let destination = IpAddr::from(<[u8; 4]>::try_from(destination).unwrap());
        let of_spi = || self.sadb.sas.values().filter(|sa| sa.key.spi.get() == spi);
        let exactly = of_spi().find(|sa| sa.key.destination == destination);
        let key = |sa: &XfrmSa| match &sa.cipher {
            XfrmCipher::Aead(key) => Some(key.dangerous_key().to_vec()),
            _ => None,
        };
        let found = exactly.or_else(|| of_spi().next()).and_then(key);
        found.unwrap_or_else(|| {
            assert!(
                self.chaos,
                "sends with {spi:#x}, which the kernel does not have"
            );
            spi.to_be_bytes().to_vec()
        })
    }

    /// Opens one outer packet.
    pub fn open(&mut self, sealed: &[u8]) -> Result<Vec<u8>, Verdict> {
        let tables = self.writer.tables();
        let mut batch = filled(sealed);
        self.inbound.process(&tables, &mut batch, &mut self.report);
        match batch.packets()[0].verdict {
            Verdict::Forward => Ok(batch.data(0).to_vec()),
            other => Err(other),
        }
    }
}

/// Two ends, and a count of what they have told each other.
pub struct World {
    pub west: End,
    pub east: End,
    pub number: u32,
}

impl World {
    pub fn new() -> Self {
        Self {
            west: End::new(Side::West),
            east: End::new(Side::East),
            number: 0,
        }
    }

    /// Started, and up.
    pub fn with(of: &Negotiated) -> Self {
        let mut world = Self::new();
        for end in [&mut world.west, &mut world.east] {
            end.start();
            end.establish(of);
        }
        world.talk();
        world
    }

    pub fn end(&mut self, side: Side) -> &mut End {
        match side {
            Side::West => &mut self.west,
            Side::East => &mut self.east,
        }
    }

    /// A numbered packet each way, and those held before. None is lost.
    pub fn talk(&mut self) {
        for side in [Side::West, Side::East] {
            self.number += 1;
            let inner = inner(side, self.number);
            let sender = self.end(side);
            let mut waiting = std::mem::take(&mut sender.held);
            waiting.push(inner);
            for inner in waiting {
                if let Some(sealed) = self.end(side).seal(&inner) {
                    let opened = self.end(side.other()).open(&sealed);
                    assert_eq!(opened, Ok(inner), "lost on the way from {side:?}");
                }
            }
        }
    }

    pub fn nothing_held(&self) -> bool {
        self.west.held.is_empty() && self.east.held.is_empty()
    }
}

/// From a host of one side's network to one of the other's.
pub fn inner(side: Side, number: u32) -> Vec<u8> {
    let hosts = match side {
        Side::West => ([10, 1, 0, 7], [10, 2, 0, 9]),
        Side::East => ([10, 2, 0, 9], [10, 1, 0, 7]),
    };
    udp(hosts.0, hosts.1, 5000, &number.to_be_bytes())
}

pub fn udp(source: [u8; 4], destination: [u8; 4], port: u16, payload: &[u8]) -> Vec<u8> {
    let length = 28 + payload.len() as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend(source);
    packet.extend(destination);
    let sum: u32 = packet
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    packet.extend(port.to_be_bytes());
    packet.extend(port.to_be_bytes());
    packet.extend((length - 20).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    packet
}

fn writer() -> TableWriter {
    let settings = Settings {
        outer_headers: OuterHeaders::Written,
    };
    TableWriter::new(settings, Aead::detect())
}

fn filled(data: &[u8]) -> Batch {
    let mut batch = Batch::new(1, data.len() + HEADROOM_BYTES + TAILROOM_BYTES);
    assert!(batch.push(data, Outer::NONE));
    batch
}

/// Where ESP begins in an IPv4 packet of ours.
fn esp_at(packet: &[u8]) -> usize {
    if packet[9] == 17 { 28 } else { 20 }
}
