//! Two gateways in one process, and packets to send through them.
//!
//! ```text
//!   10.1.0.0/16     ┌──────┐  192.0.2.1    192.0.2.2  ┌───────┐    10.2.0.0/16
//!   2001:db8:1::/48 │ west │════════ ESP ═════════════│ east  │  2001:db8:2::/48
//!                   └──────┘ 2001:db8::1  2001:db8::2 └───────┘
//! ```
#![allow(dead_code, reason = "each test file uses its share")]

use esplane_api::*;
use esplane_dataplane::*;
use std::net::{IpAddr, SocketAddr};

pub const TUNNEL: TunnelId = TunnelId(1);
pub const NOW: Now = Now {
    monotonic: std::time::Duration::ZERO,
    unix: std::time::Duration::ZERO,
};

/// How a tunnel is set up; a test changes what it is about.
#[derive(Clone, Debug)]
pub struct Scene {
    pub suite: AeadSuite,
    pub esn: Esn,
    pub outer_v6: bool,
    pub udp: bool,
    pub headers: OuterHeaders,
    pub window: u32,
    pub lifetime: Lifetime,
    pub sequence: SequenceStart,
    pub roaming: bool,
    pub df: DfPolicy,
    pub local: Vec<&'static str>,
    pub remote: Vec<&'static str>,
}

impl Default for Scene {
    fn default() -> Self {
        Self {
            suite: AeadSuite::Aes128Gcm16,
            esn: Esn::On,
            outer_v6: false,
            udp: false,
            headers: OuterHeaders::Written,
            window: 4096,
            lifetime: Lifetime::UNLIMITED,
            sequence: SequenceStart::FRESH,
            roaming: false,
            df: DfPolicy::Clear,
            local: vec!["10.1.0.0/16", "2001:db8:1::/48"],
            remote: vec!["10.2.0.0/16", "2001:db8:2::/48"],
        }
    }
}

impl Scene {
    /// West sends to east with this SA; the other way there is none unless a test adds it.
    pub fn build(&self) -> (Gateway, Gateway) {
        let mut west = Gateway::new(self.headers);
        let mut east = Gateway::new(self.headers);
        west.apply(vec![
            SaCommand::DefineTunnel(self.tunnel_of_west()),
            SaCommand::Install(self.outbound(spi(0x1000), 1)),
        ]);
        east.apply(vec![
            SaCommand::DefineTunnel(self.tunnel_of_east()),
            SaCommand::Install(self.inbound(spi(0x1000), 1)),
        ]);
        (west, east)
    }

    pub fn tunnel_of_west(&self) -> TunnelParams {
        self.tunnel("east", self.selectors())
    }

    pub fn tunnel_of_east(&self) -> TunnelParams {
        self.tunnel("west", self.selectors().into_iter().map(swapped).collect())
    }

    fn tunnel(&self, name: &str, selectors: Vec<SelectorPair>) -> TunnelParams {
        let policy = |selectors| Policy {
            selectors,
            action: PolicyAction::Protect(TUNNEL),
            priority: 10,
        };
        TunnelParams {
            id: TUNNEL,
            name: name.into(),
            policies: selectors.into_iter().map(policy).collect(),
            roaming: self.roaming,
            df: self.df,
        }
    }

    /// Seen from west.
    pub fn selectors(&self) -> Vec<SelectorPair> {
        let pairs = self.local.iter().zip(&self.remote);
        pairs.map(|(local, remote)| pair(local, remote)).collect()
    }

    pub fn west_path(&self) -> OuterPath {
        let encap = self.udp.then_some(UdpEncap {
            local_port: 4500,
            remote_port: 4501,
        });
        let (west, east) = self.ends();
        OuterPath::new(west, east, encap).unwrap()
    }

    pub fn east_path(&self) -> OuterPath {
        let encap = self.udp.then_some(UdpEncap {
            local_port: 4501,
            remote_port: 4500,
        });
        let (west, east) = self.ends();
        OuterPath::new(east, west, encap).unwrap()
    }

    pub fn ends(&self) -> (IpAddr, IpAddr) {
        if self.outer_v6 {
            (ip("2001:db8::1"), ip("2001:db8::2"))
        } else {
            (ip("192.0.2.1"), ip("192.0.2.2"))
        }
    }

    /// What west sends with.
    pub fn outbound(&self, spi: Spi, key: u8) -> SaParams {
        SaParams {
            tunnel: TUNNEL,
            direction: Direction::Outbound,
            spi,
            key: self.key(key),
            esn: self.esn,
            window: WindowSize::new(self.window).unwrap(),
            path: self.west_path(),
            selectors: self.selectors(),
            lifetime: self.lifetime,
            sequence: self.sequence,
            worker: None,
        }
    }

    /// What east receives that with.
    pub fn inbound(&self, spi: Spi, key: u8) -> SaParams {
        SaParams {
            direction: Direction::Inbound,
            path: self.east_path(),
            selectors: self.selectors().into_iter().map(swapped).collect(),
            sequence: SequenceStart::FRESH,
            ..self.outbound(spi, key)
        }
    }

    pub fn key(&self, seed: u8) -> KeyMaterial {
        let bytes: Vec<u8> = (0..self.suite.keying_material_bytes())
            .map(|at| seed.wrapping_mul(31).wrapping_add(at as u8) | 1)
            .collect();
        KeyMaterial::new(self.suite, &bytes).unwrap()
    }

    /// The outer side of a packet from west as a driver of east reports it.
    pub fn outer_at_east(&self) -> Outer {
        let (west, east) = self.ends();
        Outer {
            local: east,
            remote: SocketAddr::new(west, if self.udp { 4500 } else { 0 }),
            local_port: if self.udp { 4501 } else { 0 },
            udp: self.udp,
            tos: 0,
            df: false,
        }
    }
}

/// One gateway's dataplane with one worker.
/// The implementation that `ESPLANE_AEAD` names, or the fastest: every test here can be run with each.
pub fn aead() -> Aead {
    std::env::var("ESPLANE_AEAD").map_or(Aead::detect(), |name| Aead::named(&name).unwrap())
}

pub struct Gateway {
    pub writer: TableWriter,
    pub outbound: Outbound,
    pub inbound: Inbound,
    pub report: Report,
}

impl Gateway {
    pub fn new(outer_headers: OuterHeaders) -> Self {
        Self {
            writer: TableWriter::new(Settings { outer_headers }, aead()),
            outbound: Outbound::new(64),
            inbound: Inbound::new(64),
            report: Report::new(),
        }
    }

    pub fn apply(&mut self, commands: Vec<SaCommand>) {
        self.writer.apply(NOW, commands).unwrap();
    }

    /// Sends inner packets; answers verdicts, data and outer sides.
    pub fn send(&mut self, packets: &[Vec<u8>]) -> Vec<(Verdict, Vec<u8>, Outer)> {
        let mut batch = filled(
            packets
                .iter()
                .map(|packet| (packet.as_slice(), Outer::NONE)),
        );
        let tables = self.writer.tables();
        self.outbound.process(&tables, &mut batch, &mut self.report);
        emptied(&batch)
    }

    /// Receives outer packets; answers verdicts, data and outer sides.
    pub fn receive<'a>(
        &mut self,
        packets: impl IntoIterator<Item = (&'a [u8], Outer)>,
    ) -> Vec<(Verdict, Vec<u8>, Outer)> {
        let mut batch = filled(packets.into_iter());
        let tables = self.writer.tables();
        self.inbound.process(&tables, &mut batch, &mut self.report);
        emptied(&batch)
    }

    /// One packet, whose headers it reads itself.
    pub fn receive_one(&mut self, packet: &[u8]) -> (Verdict, Vec<u8>) {
        let mut received = self.receive([(packet, Outer::NONE)]);
        let (verdict, data, _) = received.remove(0);
        (verdict, data)
    }

    /// Sends one packet and expects it to leave.
    pub fn sealed(&mut self, packet: &[u8]) -> Vec<u8> {
        let (verdict, data, _) = self.send(&[packet.to_vec()]).remove(0);
        assert_eq!(verdict, Verdict::Forward);
        data
    }

    /// The one outbound or inbound SA.
    pub fn status(&self, direction: Direction) -> SaStatus {
        let all = self.writer.sas();
        let mut of_direction = all.into_iter().filter(|sa| sa.id.direction == direction);
        of_direction.next().unwrap()
    }

    pub fn drops(&self, reason: DropReason) -> u64 {
        self.report.drops[reason]
    }
}

fn filled<'a>(packets: impl Iterator<Item = (&'a [u8], Outer)>) -> Batch {
    let packets: Vec<_> = packets.collect();
    let longest = packets
        .iter()
        .map(|(data, _)| data.len())
        .max()
        .unwrap_or(0);
    let frame = longest + HEADROOM_BYTES + TAILROOM_BYTES;
    let mut batch = Batch::new(packets.len(), frame);
    for (data, outer) in packets {
        assert!(batch.push(data, outer));
    }
    batch
}

fn emptied(batch: &Batch) -> Vec<(Verdict, Vec<u8>, Outer)> {
    let packets = batch.packets().iter().enumerate();
    packets
        .map(|(at, packet)| {
            assert_ne!(packet.verdict, Verdict::Pending);
            (
                packet.verdict,
                batch.data(at).to_vec(),
                batch.outer_of(packet),
            )
        })
        .collect()
}

pub fn spi(value: u32) -> Spi {
    Spi::new(value).unwrap()
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn pair(local: &str, remote: &str) -> SelectorPair {
    SelectorPair {
        local: local.parse().unwrap(),
        remote: remote.parse().unwrap(),
    }
}

pub fn swapped(pair: SelectorPair) -> SelectorPair {
    SelectorPair {
        local: pair.remote,
        remote: pair.local,
    }
}

pub fn sa_id(direction: Direction, spi_value: u32) -> SaId {
    SaId {
        tunnel: TUNNEL,
        direction,
        spi: spi(spi_value),
    }
}

/// A UDP packet from west's network to east's, with `payload` bytes behind the UDP header.
pub fn inner(v6: bool, payload: usize) -> Vec<u8> {
    if v6 {
        ipv6(
            ip("2001:db8:1::7"),
            ip("2001:db8:2::9"),
            17,
            0,
            &udp(1000, 53, payload),
        )
    } else {
        ipv4(
            ip("10.1.0.7"),
            ip("10.2.0.9"),
            17,
            0,
            &udp(1000, 53, payload),
        )
    }
}

pub fn udp(source: u16, destination: u16, payload: usize) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(source.to_be_bytes());
    datagram.extend(destination.to_be_bytes());
    datagram.extend((payload as u16 + 8).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend((0..payload).map(|at| at as u8));
    datagram
}

pub fn ipv4(source: IpAddr, destination: IpAddr, protocol: u8, tos: u8, payload: &[u8]) -> Vec<u8> {
    let (IpAddr::V4(source), IpAddr::V4(destination)) = (source, destination) else {
        panic!("not IPv4");
    };
    let mut packet = vec![0x45, tos];
    packet.extend((payload.len() as u16 + 20).to_be_bytes());
    packet.extend([0x12, 0x34, 0, 0, 61, protocol, 0, 0]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    let sum = ipv4_checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(payload);
    packet
}

pub fn ipv6(source: IpAddr, destination: IpAddr, protocol: u8, tos: u8, payload: &[u8]) -> Vec<u8> {
    let (IpAddr::V6(source), IpAddr::V6(destination)) = (source, destination) else {
        panic!("not IPv6");
    };
    let mut packet = vec![0x60 | tos >> 4, tos << 4, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([protocol, 61]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(payload);
    packet
}

/// Computed the slow way, independent of the crate's.
pub fn ipv4_checksum(header: &[u8]) -> u16 {
    let mut sum = 0u32;
    for word in header[..20].chunks(2) {
        sum += u32::from(word[0]) << 8 | u32::from(word[1]);
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

/// Seals whatever it is told to, right or wrong: a peer that knows the key of [`Scene::inbound`].
pub struct Forger {
    key: AeadKey,
    spi: u32,
}

impl Forger {
    pub fn new(scene: &Scene, spi: u32, key: u8) -> Self {
        Self {
            key: AeadKey::from_material(Aead::portable(), &scene.key(key), scene.esn),
            spi,
        }
    }

    /// An ESP packet with this number around `encrypted`, which must hold the trailer already.
    pub fn esp(&self, number: u64, encrypted: &[u8]) -> Vec<u8> {
        let mut packet = self.spi.to_be_bytes().to_vec();
        packet.extend((number as u32).to_be_bytes());
        packet.extend([0xaa; 8]); // a peer may choose any IV
        packet.extend(encrypted);
        packet.extend([0; 16]);
        let job = aead::Job {
            start: 16,
            bytes: encrypted.len() as u32,
            high: (number >> 32) as u32,
            more: 0,
        };
        let keys = [aead::Keyed {
            key: &self.key,
            end: 1,
        }];
        let sealed = Aead::portable().seal(&mut Arena::over(&mut packet), &keys, &[job]);
        assert!(sealed.has(0));
        packet
    }

    /// The same around a well-padded inner packet, and in an outer IPv4 header.
    pub fn packet(&self, number: u64, inner: &[u8]) -> Vec<u8> {
        in_ipv4(&self.esp(
            number,
            &padded(inner, if inner[0] >> 4 == 4 { 4 } else { 41 }),
        ))
    }
}

/// Padding, pad length and next header behind a payload.
pub fn padded(payload: &[u8], next_header: u8) -> Vec<u8> {
    let mut encrypted = payload.to_vec();
    let mut padding = 0;
    while !(encrypted.len() + 2).is_multiple_of(4) {
        padding += 1;
        encrypted.push(padding);
    }
    encrypted.extend([padding, next_header]);
    encrypted
}

/// A packet from west's outer address to east's.
pub fn in_ipv4(esp: &[u8]) -> Vec<u8> {
    ipv4(ip("192.0.2.1"), ip("192.0.2.2"), 50, 0, esp)
}

/// The same in UDP.
pub fn in_udp(payload: &[u8]) -> Vec<u8> {
    let mut datagram = udp(4500, 4501, payload.len());
    datagram[8..].copy_from_slice(payload);
    ipv4(ip("192.0.2.1"), ip("192.0.2.2"), 17, 0, &datagram)
}
