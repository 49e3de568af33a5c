//! A stream of numbered UDP packets of mixed sizes.
//!
//! ```text
//!   0        8        16
//!   ┌────────┬────────┬───────────────────────────────────────┐
//!   │ MARKER │ number │ pattern that follows from the number  │
//!   └────────┴────────┴───────────────────────────────────────┘
//! ```

use super::{Ends, MARKER, Pattern, STRAGGLERS, Schedule, Stop, WINDOW_PACKETS, Window};
use crate::demo::namespaces::Namespace;
use serde::Serialize;
use socket2::SockRef;
use std::{
    io::{self, ErrorKind::*},
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Packets a second and direction.
pub const PACKETS_PER_SECOND: u32 = 10_000;
const SMALLEST_BYTES: usize = 64;
const LARGEST_BYTES: usize = 1400;
const HEADER_BYTES: usize = 16;

/// What became of the packets of one or more streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct UdpResult {
    /// Numbers sent.
    pub sent: u64,
    /// Numbers received, each counted once.
    pub received: u64,
    /// Received once more.
    pub duplicated: u64,
    /// Received after a higher number.
    pub reordered: u64,
    /// Received with a byte changed, missing or added.
    pub corrupted: u64,
    /// Bytes of UDP payload received.
    pub bytes: u64,
}

impl UdpResult {
    /// Whether every packet arrived once and unharmed. Order is not promised: IP does not either.
    pub fn is_perfect(&self) -> bool {
        self.sent > 0 && self.received == self.sent && (self.duplicated, self.corrupted) == (0, 0)
    }
}

impl std::ops::AddAssign for UdpResult {
    fn add_assign(&mut self, other: Self) {
        self.sent += other.sent;
        self.received += other.received;
        self.duplicated += other.duplicated;
        self.reordered += other.reordered;
        self.corrupted += other.corrupted;
        self.bytes += other.bytes;
    }
}

/// One stream under way.
pub struct UdpStream {
    sender: JoinHandle<io::Result<()>>,
    receiver: JoinHandle<io::Result<UdpResult>>,
    shared: Arc<Shared>,
}

/// What sender and receiver tell each other beside the network.
#[derive(Default)]
struct Shared {
    window: Window,
    sent: AtomicU64,
    received: AtomicU64,
}

impl UdpStream {
    /// Starts sending and receiving.
    pub fn start(
        from: &Namespace,
        to: &Namespace,
        ends: Ends,
        stop: Arc<Stop>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        // The receiver's socket exists before the first packet can arrive.
        let inbound = to.enter(|| receiving_socket(ends))?;
        let target = inbound.local_addr()?;
        let receiver = to.spawn("udp-rx", {
            let (shared, stop) = (shared.clone(), stop.clone());
            move || receive(&inbound, &shared, &stop)
        })?;
        let sender = from.spawn("udp-tx", {
            let shared = shared.clone();
            move || send(ends, target, &shared, &stop)
        })?;
        Ok(Self {
            sender,
            receiver,
            shared,
        })
    }

    /// Sent and received so far.
    pub fn progress(&self) -> (u64, u64) {
        let received = self.shared.received.load(Relaxed);
        (self.shared.sent.load(Relaxed), received)
    }

    /// Waits for the last stragglers. Call it after the stop.
    pub fn finish(self) -> io::Result<UdpResult> {
        let joined = self.sender.join();
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let joined = self.receiver.join();
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn receiving_socket(ends: Ends) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((ends.to, 0))?;
    // Twice what the window can fill, where the administrator allows that much.
    let enough = 2 * WINDOW_PACKETS as usize * 2304;
    SockRef::from(&socket).set_recv_buffer_size(enough)?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    Ok(socket)
}

fn send(ends: Ends, to: SocketAddr, shared: &Shared, stop: &Stop) -> io::Result<()> {
    let socket = UdpSocket::bind((ends.from, 0))?;
    socket.connect(to)?;
    let header_bytes = if to.is_ipv4() { 20 + 8 } else { 40 + 8 };
    let mut buffer = [0; LARGEST_BYTES];
    let schedule = Schedule::new(PACKETS_PER_SECOND);
    for number in 0.. {
        let wait = schedule.wait(number);
        // A sleep lasts a millisecond or so; a few packets early or late do no harm.
        if wait > Duration::from_millis(1) {
            std::thread::sleep(wait);
        }
        shared.window.wait_for(number, stop);
        if stop.is_over() {
            break;
        }
        let payload = &mut buffer[..payload_bytes(number, header_bytes)];
        write_payload(payload, number);
        send_surely(&socket, payload)?;
        shared.sent.store(number + 1, Relaxed);
    }
    Ok(())
}

/// An ICMP error about an earlier packet is reported by, and prevents, the next one: send it again.
fn send_surely(socket: &UdpSocket, payload: &[u8]) -> io::Result<()> {
    let mut refusals = 0;
    loop {
        match socket.send(payload) {
            Ok(_) => return Ok(()),
            Err(error) if refusals == 10 => return Err(error),
            Err(_) => refusals += 1,
        }
    }
}

fn receive(socket: &UdpSocket, shared: &Shared, stop: &Stop) -> io::Result<UdpResult> {
    let mut tally = Tally::default();
    let mut buffer = [0; 2048];
    let mut over_since = None;
    loop {
        match socket.recv(&mut buffer) {
            Ok(bytes) => {
                if let Some(number) = tally.take(&buffer[..bytes]) {
                    shared.window.saw(number);
                    shared.received.store(tally.result.received, Relaxed);
                }
            }
            Err(error) if matches!(error.kind(), WouldBlock | TimedOut | Interrupted) => {}
            Err(error) => return Err(error),
        }
        if stop.is_over() {
            let since = *over_since.get_or_insert_with(Instant::now);
            tally.result.sent = shared.sent.load(Relaxed);
            // Stay a moment even when all have come, for one that should not come twice.
            let patience = if tally.result.received < tally.result.sent {
                STRAGGLERS
            } else {
                Duration::from_millis(200)
            };
            if since.elapsed() > patience {
                return Ok(tally.result);
            }
        }
    }
}

/// The receiver's book: which numbers it has seen.
#[derive(Default)]
struct Tally {
    result: UdpResult,
    seen: Vec<u64>,
    next: u64,
}

impl Tally {
    /// Books one packet; its number, unless it is damaged.
    fn take(&mut self, payload: &[u8]) -> Option<u64> {
        let Some(number) = read_payload(payload) else {
            self.result.corrupted += 1;
            return None;
        };
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        if self.seen.len() <= word {
            self.seen.resize(word + 1, 0);
        }
        if self.seen[word] & bit != 0 {
            self.result.duplicated += 1;
            return Some(number);
        }
        self.seen[word] |= bit;
        self.result.received += 1;
        self.result.bytes += payload.len() as u64;
        if number < self.next {
            self.result.reordered += 1;
        }
        self.next = self.next.max(number + 1);
        Some(number)
    }
}

/// Sizes between the smallest and the largest, in an order that looks random.
fn payload_bytes(number: u64, header_bytes: usize) -> usize {
    let span = (LARGEST_BYTES - SMALLEST_BYTES + 1) as u64;
    let packet_bytes = SMALLEST_BYTES + (Pattern(!number).next() % span) as usize;
    packet_bytes.saturating_sub(header_bytes).max(HEADER_BYTES)
}

fn write_payload(payload: &mut [u8], number: u64) {
    let (header, body) = payload.split_at_mut(HEADER_BYTES);
    header[..8].copy_from_slice(&MARKER);
    header[8..].copy_from_slice(&number.to_be_bytes());
    Pattern(number).fill(body);
}

/// The number of an unharmed packet.
fn read_payload(payload: &[u8]) -> Option<u64> {
    let (marker, rest) = payload.split_first_chunk::<8>()?;
    let (number, body) = rest.split_first_chunk::<8>()?;
    let number = u64::from_be_bytes(*number);
    let lengths = [28, 48].map(|header_bytes| payload_bytes(number, header_bytes));
    let plausible = *marker == MARKER && number < 1 << 32 && lengths.contains(&payload.len());
    let mut pattern = Pattern(number);
    let intact = body
        .chunks(8)
        .all(|chunk| *chunk == pattern.next().to_be_bytes()[..chunk.len()]);
    (plausible && intact).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(number: u64) -> Vec<u8> {
        let mut payload = vec![0; payload_bytes(number, 28)];
        write_payload(&mut payload, number);
        payload
    }

    #[test]
    fn every_packet_once_is_perfect_in_any_order() {
        let mut tally = Tally::default();
        for number in [0, 1, 3, 2, 4] {
            assert_eq!(tally.take(&packet(number)), Some(number));
        }
        tally.result.sent = 5;
        assert_eq!((tally.result.received, tally.result.reordered), (5, 1));
        assert!(tally.result.is_perfect());
    }

    #[test]
    fn loss_duplication_and_damage_are_each_found() {
        let mut tally = Tally::default();
        tally.result.sent = 3;
        tally.take(&packet(0));
        tally.take(&packet(2));
        assert!(!tally.result.is_perfect());
        tally.take(&packet(1));
        assert!(tally.result.is_perfect());
        tally.take(&packet(1));
        assert_eq!(tally.result.duplicated, 1);

        for at in [0, 9, 15, 20] {
            let mut damaged = packet(70);
            damaged[at] ^= 1;
            assert_eq!(tally.take(&damaged), None, "byte {at}");
        }
        assert_eq!(tally.take(&packet(70)[..20]), None);
        assert_eq!(tally.result.corrupted, 5);
    }

    #[test]
    fn sizes_span_the_whole_range() {
        let sizes: Vec<_> = (0..20_000)
            .map(|number| 28 + payload_bytes(number, 28))
            .collect();
        assert_eq!(sizes.iter().min(), Some(&SMALLEST_BYTES));
        assert_eq!(sizes.iter().max(), Some(&LARGEST_BYTES));
    }
}
