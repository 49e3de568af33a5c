//! Reads what crosses the Internet between the gateways.
//!
//! Two sockets listen on the router in the middle. One gets every packet that is *not* ESP in UDP
//! (the kernel filters, so that gigabits a second cannot overflow it) and looks for addresses of the
//! private networks. The other gets a random sample of the ESP packets and looks for the
//! [`MARKER`] that every payload carries. To be sure that it would notice, the tap is shown one clear
//! packet before the gateways start.

use super::{
    DemoError,
    topology::{A, B, Topology},
    traffic::{MARKER, Stop},
};
use serde::Serialize;
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use std::{
    io::{self, ErrorKind::*, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// ESP in UDP travels from and to this port (RFC 3948 §2.1).
pub const ESP_PORT: u16 = 4500;
/// Bytes of a sampled packet that are looked into.
const SAMPLE_BYTES: u32 = 2048;
/// One ESP packet of so many is looked into; a power of two.
const SAMPLE_ONE_OF: u32 = 64;

/// What the wire has shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WireResult {
    /// Packets of the private networks that crossed in clear. Must be zero.
    pub clear_packets: u64,
    /// ESP packets looked into, a random sample.
    pub esp_packets_inspected: u64,
    /// Of those, the ones in which a payload could be read. Must be zero.
    pub payloads_readable: u64,
}

impl WireResult {
    /// Whether the wire kept the secret, and was looked at.
    pub fn is_perfect(&self) -> bool {
        self.clear_packets == 0 && self.payloads_readable == 0 && self.esp_packets_inspected > 0
    }
}

/// A tap that listens.
pub struct Wiretap {
    threads: Vec<JoinHandle<io::Result<()>>>,
    counts: Arc<Counts>,
    stop: Arc<Stop>,
}

#[derive(Default)]
struct Counts {
    clear: AtomicU64,
    inspected: AtomicU64,
    readable: AtomicU64,
}

impl Wiretap {
    /// Starts listening and proves that it hears.
    pub fn start(topology: &Topology) -> Result<Self, DemoError> {
        let tap = Self::listen(topology).map_err(DemoError::io("tap the wire of", "internet"))?;
        tap.hear_a_clear_packet(topology)
            .map_err(DemoError::io("test the wiretap from", "g1"))?;
        Ok(tap)
    }

    fn listen(topology: &Topology) -> io::Result<Self> {
        let (counts, stop) = (Arc::new(Counts::default()), Arc::new(Stop::default()));
        let mut taps: Vec<(&str, u16, Vec<SockFilter>, Look)> = vec![
            ("tap-clear", libc::ETH_P_IP as u16, all_but_esp(), clear),
            ("tap-esp", libc::ETH_P_IP as u16, sample_of_esp(), esp),
        ];
        if topology.ipv6 {
            taps.push(("tap-v6", libc::ETH_P_IPV6 as u16, Vec::new(), clear));
        }
        let mut threads = Vec::new();
        for (name, protocol, filter, look) in taps {
            let socket = topology.internet.enter(|| tap(protocol, &filter))?;
            let (counts, stop) = (counts.clone(), stop.clone());
            let thread = topology
                .internet
                .spawn(name, move || watch(&socket, look, &counts, &stop))?;
            threads.push(thread);
        }
        Ok(Self {
            threads,
            counts,
            stop,
        })
    }

    /// Sends a packet with a private source address towards the other gateway, past any tunnel.
    fn hear_a_clear_packet(&self, topology: &Topology) -> io::Result<()> {
        topology.g1.enter(|| {
            let socket = UdpSocket::bind((A.gateway(false), 0))?;
            socket.send_to(b"can you hear me?", (B.endpoint(), 9))
        })?;
        let since = Instant::now();
        while self.counts.clear.load(Relaxed) == 0 {
            if since.elapsed() > Duration::from_secs(5) {
                return Err(io::Error::other("the wiretap does not hear a clear packet"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.counts.clear.store(0, Relaxed);
        Ok(())
    }

    /// What it has seen so far.
    pub fn result(&self) -> WireResult {
        WireResult {
            clear_packets: self.counts.clear.load(Relaxed),
            esp_packets_inspected: self.counts.inspected.load(Relaxed),
            payloads_readable: self.counts.readable.load(Relaxed),
        }
    }

    /// Ends it.
    pub fn finish(self) -> io::Result<WireResult> {
        self.stop.stop();
        let result = self.result();
        for thread in self.threads {
            let joined = thread.join();
            joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(result)
    }
}

type Look = fn(&[u8], &Counts);

/// A socket that gets each packet that enters the machine, from its IP header on. (One for a single
/// protocol sees no packet on its way out, so none twice.)
fn tap(protocol: u16, filter: &[SockFilter]) -> io::Result<Socket> {
    let protocol = Protocol::from(i32::from(protocol.to_be()));
    let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol))?;
    if !filter.is_empty() {
        socket.attach_filter(filter)?;
    }
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    Ok(socket)
}

fn watch(mut socket: &Socket, look: Look, counts: &Counts, stop: &Stop) -> io::Result<()> {
    let mut buffer = [0; SAMPLE_BYTES as usize];
    while !stop.is_over() {
        match socket.read(&mut buffer) {
            Ok(bytes) => look(&buffer[..bytes], counts),
            Err(error) if matches!(error.kind(), WouldBlock | TimedOut | Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn clear(packet: &[u8], counts: &Counts) {
    let private = |address: IpAddr| A.contains(address) || B.contains(address);
    let exposed = addresses(packet).is_some_and(|ends| ends.into_iter().any(private));
    counts.clear.fetch_add(exposed.into(), Relaxed);
}

fn esp(packet: &[u8], counts: &Counts) {
    let readable = packet.windows(MARKER.len()).any(|bytes| bytes == MARKER);
    counts.readable.fetch_add(readable.into(), Relaxed);
    counts.inspected.fetch_add(1, Relaxed);
}

/// Source and destination.
fn addresses(packet: &[u8]) -> Option<[IpAddr; 2]> {
    let v4 = |at: usize| {
        let octets: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
        Some(IpAddr::V4(Ipv4Addr::from(octets)))
    };
    let v6 = |at: usize| {
        let octets: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
        Some(IpAddr::V6(Ipv6Addr::from(octets)))
    };
    match packet.first()? >> 4 {
        4 => Some([v4(12)?, v4(16)?]),
        6 => Some([v6(8)?, v6(24)?]),
        _ => None,
    }
}

/// Classic BPF, as in linux/filter.h. Jumps count instructions from the next one on.
mod bpf {
    use socket2::SockFilter;

    pub const fn load_byte(at: u32) -> SockFilter {
        SockFilter::new(0x30, 0, 0, at)
    }
    /// X = bytes of the IPv4 header.
    pub const fn index_ipv4_header() -> SockFilter {
        SockFilter::new(0xb1, 0, 0, 0)
    }
    /// From X + `at`.
    pub const fn load_half_indexed(at: u32) -> SockFilter {
        SockFilter::new(0x48, 0, 0, at)
    }
    /// SKF_AD_OFF + SKF_AD_RANDOM.
    pub const fn load_random() -> SockFilter {
        SockFilter::new(0x20, 0, 0, (-0x1000_i32 + 56) as u32)
    }
    pub const fn and(mask: u32) -> SockFilter {
        SockFilter::new(0x54, 0, 0, mask)
    }
    pub const fn if_equal(value: u32, then: u8, otherwise: u8) -> SockFilter {
        SockFilter::new(0x15, then, otherwise, value)
    }
    pub const fn take(bytes: u32) -> SockFilter {
        SockFilter::new(0x06, 0, 0, bytes)
    }
}

fn all_but_esp() -> Vec<SockFilter> {
    esp_or_not(bpf::take(0), bpf::take(SAMPLE_BYTES))
}

fn sample_of_esp() -> Vec<SockFilter> {
    let mut program = vec![
        bpf::load_random(),
        bpf::and(SAMPLE_ONE_OF - 1),
        bpf::if_equal(0, 1, 0),
        bpf::take(0),
    ];
    program.extend(esp_or_not(bpf::take(SAMPLE_BYTES), bpf::take(0)));
    program
}

/// UDP from and to the ESP port ends in the first of the two, all else in the second.
fn esp_or_not(esp: SockFilter, not: SockFilter) -> Vec<SockFilter> {
    const IPV4_PROTOCOL: u32 = 9;
    const UDP: u32 = 17;
    vec![
        bpf::load_byte(IPV4_PROTOCOL),
        bpf::if_equal(UDP, 0, 6),
        bpf::index_ipv4_header(),
        bpf::load_half_indexed(0),
        bpf::if_equal(ESP_PORT.into(), 0, 3),
        bpf::load_half_indexed(2),
        bpf::if_equal(ESP_PORT.into(), 0, 1),
        esp,
        not,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_private_address_on_either_side_of_either_family_is_noticed() {
        let counts = Counts::default();
        let mut packet = [0; 28];
        packet[0] = 0x45;
        packet[12..20].copy_from_slice(&[198, 51, 100, 2, 203, 0, 113, 2]);
        clear(&packet, &counts);
        assert_eq!(counts.clear.load(Relaxed), 0);
        packet[16..20].copy_from_slice(&[10, 2, 0, 2]);
        clear(&packet, &counts);
        let mut packet = [0; 40];
        packet[0] = 0x60;
        let IpAddr::V6(host) = A.host(true) else {
            unreachable!()
        };
        packet[8..24].copy_from_slice(&host.octets());
        clear(&packet, &counts);
        assert_eq!(counts.clear.load(Relaxed), 2);
        clear(&packet[..30], &counts);
    }

    #[test]
    fn a_readable_payload_is_noticed_wherever_it_starts() {
        let counts = Counts::default();
        esp(&[&[0; 45][..], &MARKER, &[1; 9]].concat(), &counts);
        esp(&[7; 90], &counts);
        assert_eq!(
            (
                counts.readable.load(Relaxed),
                counts.inspected.load(Relaxed)
            ),
            (1, 2)
        );
    }
}
