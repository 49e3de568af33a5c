//! Two gateways in memory, and the packets between them.

use esplane_api::{
    AeadSuite, DfPolicy, Direction, Esn, IpPrefix, KeyMaterial, Lifetime, Now, OuterPath, Policy,
    PolicyAction, SaCommand, SaParams, SelectorPair, SequenceStart, Spi, TunnelId, TunnelParams,
    UdpEncap, WindowSize,
};
use esplane_dataplane::{
    Aead, Batch, HEADROOM_BYTES, Inbound, Outbound, Outer, OuterHeaders, Report, Settings,
    TAILROOM_BYTES, TableWriter, Tables, Verdict,
};
use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

/// Packets in one window.
pub const PACKETS: usize = 64;
/// Seven small, four middling, one large packet: the simple mix of Internet traffic.
const IMIX: [usize; 12] = [64, 576, 64, 64, 576, 64, 1400, 64, 576, 64, 576, 64];
const WEST: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const EAST: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1));

/// Sizes of inner packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    Bytes(usize),
    Imix,
}

impl Size {
    /// The size of packet number `index`.
    pub fn of(self, index: usize) -> usize {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Imix => IMIX[index % IMIX.len()],
        }
    }

    /// The mean over a window.
    pub fn mean(self) -> f64 {
        (0..PACKETS).map(|index| self.of(index)).sum::<usize>() as f64 / PACKETS as f64
    }

    /// The largest.
    pub fn largest(self) -> usize {
        (0..IMIX.len())
            .map(|index| self.of(index))
            .max()
            .unwrap_or(0)
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    pub suite: AeadSuite,
    pub sas: usize,
    pub size: Size,
    pub headers: OuterHeaders,
    /// Whether every packet has a destination of its own, so that each needs a look-up.
    pub many_flows: bool,
}

/// Tables of both ends, and a window of packets.
pub struct Scene {
    setting: Setting,
    pub west: Arc<Tables>,
    pub east: Arc<Tables>,
    pub batch: Batch,
    pub report: Report,
    packets: Vec<Vec<u8>>,
    next: usize,
}

impl Scene {
    pub fn new(aead: Aead, setting: Setting) -> Self {
        let tables = |direction| {
            let mut writer = TableWriter::new(
                Settings {
                    outer_headers: setting.headers,
                },
                aead,
            );
            let commands = (0..setting.sas)
                .flat_map(|number| commands(setting.suite, direction, number))
                .collect();
            match writer.apply(Now::default(), commands) {
                Ok(()) => writer.tables(),
                Err(error) => panic!("the benchmark's own tables are refused: {error}"),
            }
        };
        let frame = (HEADROOM_BYTES + setting.size.largest() + TAILROOM_BYTES).next_multiple_of(64);
        // Windows go round all SAs, so that 10,000 of them are really met.
        let count = PACKETS.max(setting.sas).next_multiple_of(PACKETS);
        Self {
            west: tables(Direction::Outbound),
            east: tables(Direction::Inbound),
            batch: Batch::new(PACKETS, frame),
            report: Report::new(),
            packets: (0..count).map(|index| packet(&setting, index)).collect(),
            next: 0,
            setting,
        }
    }

    /// Fills the batch with fresh inner packets.
    pub fn fill(&mut self) {
        self.batch.clear();
        self.report.clear();
        for _ in 0..PACKETS {
            let fits = self.batch.push(&self.packets[self.next], Outer::NONE);
            assert!(fits, "a packet of the benchmark must fit into its frame");
            self.next = (self.next + 1) % self.packets.len();
        }
    }

    /// Fills the batch with freshly sealed packets, as they would arrive.
    pub fn fill_sealed(&mut self, outbound: &mut Outbound) {
        self.fill();
        outbound.process(&self.west, &mut self.batch, &mut self.report);
        self.arrive();
    }

    /// What has just been sent arrives.
    pub fn arrive(&mut self) {
        for packet in self.batch.packets_mut() {
            assert_eq!(packet.verdict, Verdict::Forward);
            packet.verdict = Verdict::Pending;
        }
        if self.setting.headers == OuterHeaders::ByKernel {
            let outer = Outer {
                remote: (WEST, 4500).into(),
                udp: true,
                ..Outer::NONE
            };
            (0..self.batch.len()).for_each(|index| self.batch.set_outer(index, outer));
        }
    }

    pub fn outbound(&mut self, outbound: &mut Outbound) {
        outbound.process(&self.west, &mut self.batch, &mut self.report);
    }

    pub fn inbound(&mut self, inbound: &mut Inbound) {
        inbound.process(&self.east, &mut self.batch, &mut self.report);
    }

    /// Whether all packets of the window have passed.
    pub fn all_passed(&self) -> bool {
        let mut packets = self.batch.packets().iter();
        self.batch.len() == PACKETS && packets.all(|packet| packet.verdict == Verdict::Forward)
    }

    /// A benchmark that drops packets measures nothing.
    pub fn check(&self) {
        assert!(
            self.all_passed(),
            "{:?}: {:?}",
            self.setting,
            self.report.drops
        );
    }
}

/// One tunnel of SA `number`, with a network of its own.
fn commands(suite: AeadSuite, direction: Direction, number: usize) -> [SaCommand; 2] {
    let tunnel = TunnelId(number as u32 + 1);
    let prefix = network(number);
    let any = SelectorPair::to(prefix);
    let selectors = match direction {
        Direction::Outbound => any,
        Direction::Inbound => SelectorPair {
            local: any.remote,
            remote: any.local,
        },
    };
    let mut secret = vec![7; suite.keying_material_bytes()];
    secret[..8].copy_from_slice(&(number as u64 + 1).to_be_bytes());
    let encap = UdpEncap {
        local_port: 4500,
        remote_port: 4500,
    };
    let (local, remote) = match direction {
        Direction::Outbound => (WEST, EAST),
        Direction::Inbound => (EAST, WEST),
    };
    let (Ok(spi), Ok(key), Ok(path)) = (
        Spi::new(0x1000 + number as u32),
        KeyMaterial::new(suite, &secret),
        OuterPath::new(local, remote, Some(encap)),
    ) else {
        panic!("the benchmark's own parameters are refused")
    };
    [
        SaCommand::DefineTunnel(TunnelParams {
            id: tunnel,
            name: format!("bench-{number}"),
            policies: vec![Policy {
                selectors,
                action: PolicyAction::Protect(tunnel),
                priority: 0,
            }],
            roaming: false,
            df: DfPolicy::Clear,
        }),
        SaCommand::Install(SaParams {
            tunnel,
            direction,
            spi,
            key,
            esn: Esn::On,
            window: WindowSize::DEFAULT,
            path,
            selectors: vec![selectors],
            lifetime: Lifetime::UNLIMITED,
            sequence: SequenceStart::FRESH,
            worker: None,
        }),
    ]
}

/// 10.0.0.0/8 is cut into networks of 64 addresses.
fn network(number: usize) -> IpPrefix {
    IpPrefix::truncated(
        IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + number as u32 * 64)),
        26,
    )
}

/// A UDP packet for SA `index` modulo their number.
fn packet(setting: &Setting, index: usize) -> Vec<u8> {
    let bytes = setting.size.of(index);
    let IpAddr::V4(network) = network(index % setting.sas).address() else {
        return Vec::new();
    };
    let host = if setting.many_flows {
        index as u32 % 64
    } else {
        1
    };
    let mut packet = vec![0xa5; bytes];
    packet[..28].copy_from_slice(&[
        0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 172, 16, 0, 1, 0, 0, 0, 0, 0x30, 0x39, 0x30, 0x39,
        0, 0, 0, 0,
    ]);
    packet[2..4].copy_from_slice(&(bytes as u16).to_be_bytes());
    packet[16..20].copy_from_slice(&(network.to_bits() + host).to_be_bytes());
    packet[24..26].copy_from_slice(&(bytes as u16 - 20).to_be_bytes());
    packet
}
