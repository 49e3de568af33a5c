//! The packet path: inner packets out, foreign packets in.

use crate::sim;
use aes_gcm::{
    Aes128Gcm, KeyInit,
    aead::{Aead as _, Payload},
};
use esplane_api::{
    AeadSuite, DfPolicy, Direction, Esn, KeyMaterial, Lifetime, Now, OuterPath, Policy,
    PolicyAction, SaCommand, SaParams, SelectorPair, SequenceStart, Spi, TrafficSelector, TunnelId,
    TunnelParams, UdpEncap, WindowSize,
};
use esplane_dataplane::{
    Batch, Inbound, Outbound, Outer, OuterHeaders, Report, Settings, TableWriter, Verdict,
};
use esplane_gateway::aead;
use std::{
    cell::{Cell, RefCell},
    net::{IpAddr, Ipv4Addr},
};

const SPI: u32 = 0xc0ff_ee01;
const KEY_AND_SALT: [u8; 20] = *b"sixteen bytes+salt!?";
const TUNNEL: TunnelId = TunnelId(1);
const US: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));

/// A sender and a receiver with one key: what the one seals the other opens.
struct Loop {
    sender: TableWriter,
    receiver: TableWriter,
    outbound: Outbound,
    inbound: Inbound,
    batch: Batch,
    report: Report,
}

impl Loop {
    fn new(outer_headers: OuterHeaders) -> Self {
        let writer = |direction| {
            let aead = aead::choose().expect("a name this CPU knows");
            let mut writer = TableWriter::new(Settings { outer_headers }, aead);
            let commands = vec![
                SaCommand::DefineTunnel(tunnel()),
                SaCommand::Install(sa(direction)),
            ];
            writer
                .apply(Now::default(), commands)
                .expect("a valid tunnel");
            writer
        };
        Self {
            sender: writer(Direction::Outbound),
            receiver: writer(Direction::Inbound),
            outbound: Outbound::new(1),
            inbound: Inbound::new(1),
            batch: Batch::new(1, 1 << 17),
            report: Report::new(),
        }
    }

    fn seal(&mut self, packet: &[u8]) -> Option<(Outer, Vec<u8>)> {
        self.batch.clear();
        if !self.batch.push(packet, Outer::NONE) {
            return None;
        }
        self.report.clear();
        self.outbound
            .process(&self.sender.tables(), &mut self.batch, &mut self.report);
        let packet = self.batch.packets()[0];
        assert_ne!(packet.verdict, Verdict::Pending);
        (packet.verdict == Verdict::Forward)
            .then(|| (self.batch.outer_of(&packet), self.batch.data(0).to_vec()))
    }

    fn open(&mut self, outer: Outer, data: &[u8]) -> Option<Vec<u8>> {
        self.batch.clear();
        if !self.batch.push(data, outer) {
            return None;
        }
        self.report.clear();
        self.inbound
            .process(&self.receiver.tables(), &mut self.batch, &mut self.report);
        let verdict = self.batch.packets()[0].verdict;
        assert_ne!(verdict, Verdict::Pending);
        (verdict == Verdict::Forward).then(|| self.batch.data(0).to_vec())
    }
}

thread_local! {
    static BY_KERNEL: RefCell<Loop> = RefCell::new(Loop::new(OuterHeaders::ByKernel));
    static WRITTEN: RefCell<Loop> = RefCell::new(Loop::new(OuterHeaders::Written));
    static FOREIGN: RefCell<Loop> = RefCell::new(Loop::new(OuterHeaders::ByKernel));
    static SEQUENCE: Cell<u32> = const { Cell::new(0) };
}

/// Whatever a host sends: dropped, or sealed so that it opens to the same packet (without what a
/// link may have put behind it).
pub fn inner_packet(data: &[u8]) {
    BY_KERNEL.with_borrow_mut(|dataplane| {
        if let Some((_, sealed)) = dataplane.seal(data) {
            let opened = dataplane.open(from_peer(true), &sealed);
            assert_eq!(
                opened.as_deref(),
                data.get(..ip_bytes(data)),
                "sealed, but it opens to something else"
            );
        }
    });
}

/// The length an IP header claims.
fn ip_bytes(packet: &[u8]) -> usize {
    let field = |at: usize| usize::from(packet[at]) << 8 | usize::from(packet[at + 1]);
    if packet[0] >> 4 == 4 {
        field(2)
    } else {
        40 + field(4)
    }
}

/// A datagram from anybody, on the UDP socket or (first bit of the input) the raw one: never forwarded.
pub fn esp_datagram(data: &[u8]) {
    let Some((first, datagram)) = data.split_first() else {
        return;
    };
    FOREIGN.with_borrow_mut(|dataplane| {
        let opened = dataplane.open(from_peer(first & 1 == 0), datagram);
        assert_eq!(opened, None, "a forged packet came through");
    });
}

/// A whole outer IP packet from anybody, as AF_XDP hands it over: never forwarded.
pub fn outer_packet(data: &[u8]) {
    WRITTEN.with_borrow_mut(|dataplane| {
        assert_eq!(
            dataplane.open(Outer::NONE, data),
            None,
            "a forged packet came through"
        );
    });
}

/// What an authenticated peer may have put inside: any payload, padding and next header. Only a
/// valid IP packet may come out.
pub fn decrypted_payload(data: &[u8]) {
    let sequence = SEQUENCE.get() + 1;
    SEQUENCE.set(sequence);
    let sealed = seal_anything(sequence, data);
    FOREIGN.with_borrow_mut(|dataplane| {
        if let Some(inner) = dataplane.open(from_peer(true), &sealed) {
            assert!(
                matches!(inner.first().map(|byte| byte >> 4), Some(4 | 6)),
                "neither IPv4 nor IPv6: {inner:02x?}"
            );
        }
    });
}

/// ESP over arbitrary plaintext, by the `aes-gcm` crate alone (RFC 4106 §3, §4).
fn seal_anything(sequence: u32, plaintext: &[u8]) -> Vec<u8> {
    let (key, salt) = KEY_AND_SALT.split_at(16);
    let iv = u64::from(sequence).to_be_bytes();
    let mut packet = [SPI.to_be_bytes(), sequence.to_be_bytes()].concat();
    let nonce: [u8; 12] = [salt, &iv].concat().try_into().expect("twelve bytes");
    let payload = Payload {
        msg: plaintext,
        aad: &packet.clone(),
    };
    let cipher = Aes128Gcm::new_from_slice(key).expect("sixteen bytes");
    let sealed = cipher
        .encrypt(&nonce.into(), payload)
        .expect("short enough");
    packet.extend(iv);
    packet.extend(sealed);
    packet
}

pub(super) fn inner_seeds() -> Vec<Vec<u8>> {
    let v4 = sim::inner_packet(
        "10.1.0.5".parse().unwrap(),
        "10.2.0.5".parse().unwrap(),
        1,
        100,
    );
    let v6 = sim::inner_packet(
        "fd00:1::5".parse().unwrap(),
        "fd00:2::5".parse().unwrap(),
        1,
        100,
    );
    // An IPv6 packet with hop-by-hop options and a fragment header before its UDP.
    let mut extended = v6[..40].to_vec();
    extended[5] += 16;
    extended[6] = 0;
    extended.extend([44, 0, 1, 4, 0, 0, 0, 0, 17, 0, 0, 1, 0, 0, 0, 9]);
    extended.extend(&v6[40..]);
    vec![v4, v6, extended]
}

pub(super) fn esp_seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![vec![0, 0xff], vec![0, 0, 0, 0, 0, 1, 2, 3]];
    seeds.extend(inner_seeds().iter().map(|inner| {
        let mut sealed = seal_anything(1, &with_trailer(inner));
        *sealed.last_mut().expect("an ICV") ^= 1;
        [&[1], &sealed[..]].concat()
    }));
    seeds
}

pub(super) fn outer_seeds() -> Vec<Vec<u8>> {
    let mut dataplane = Loop::new(OuterHeaders::Written);
    let sealed = inner_seeds()
        .into_iter()
        .filter_map(|inner| dataplane.seal(&inner));
    sealed
        .map(|(_, mut packet)| {
            *packet.last_mut().expect("an ICV") ^= 1;
            packet
        })
        .collect()
}

pub(super) fn decrypted_seeds() -> Vec<Vec<u8>> {
    let dummy = vec![1, 2, 2, 59];
    inner_seeds()
        .iter()
        .map(|inner| with_trailer(inner))
        .chain([dummy])
        .collect()
}

/// Padding 1, 2, 3…, its length, and the next header (RFC 4303 §2.4 to §2.6).
fn with_trailer(inner: &[u8]) -> Vec<u8> {
    let padding = (4 - (inner.len() + 2) % 4) % 4;
    let mut plaintext = inner.to_vec();
    plaintext.extend(
        (1..=padding as u8).chain([padding as u8, if inner[0] >> 4 == 4 { 4 } else { 41 }]),
    );
    plaintext
}

fn from_peer(udp: bool) -> Outer {
    Outer {
        local: US,
        remote: (PEER, 4500).into(),
        udp,
        ..Outer::NONE
    }
}

fn any() -> Vec<SelectorPair> {
    [TrafficSelector::ANY_V4, TrafficSelector::ANY_V6]
        .map(|any| SelectorPair {
            local: any,
            remote: any,
        })
        .to_vec()
}

fn tunnel() -> TunnelParams {
    let protect = |selectors| Policy {
        selectors,
        action: PolicyAction::Protect(TUNNEL),
        priority: 0,
    };
    TunnelParams {
        id: TUNNEL,
        name: "loop".to_owned(),
        policies: any().into_iter().map(protect).collect(),
        roaming: true,
        df: DfPolicy::Copy,
    }
}

fn sa(direction: Direction) -> SaParams {
    let encap = UdpEncap {
        local_port: 4500,
        remote_port: 4500,
    };
    SaParams {
        tunnel: TUNNEL,
        direction,
        spi: Spi::new(SPI).expect("not reserved"),
        key: KeyMaterial::new(AeadSuite::Aes128Gcm16, &KEY_AND_SALT).expect("twenty bytes"),
        esn: Esn::Off,
        window: WindowSize::DEFAULT,
        path: OuterPath::new(US, PEER, Some(encap)).expect("a valid path"),
        selectors: any(),
        lifetime: Lifetime::UNLIMITED,
        sequence: SequenceStart::FRESH,
        worker: None,
    }
}
