//! ICMP echo (RFC 792, RFC 4443 §4.1): the questions are ours, the answers the other kernel's.

use super::{Ends, MARKER, STRAGGLERS, Schedule, Stop};
use crate::demo::namespaces::Namespace;
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io::{self, ErrorKind::*, Read},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Questions a second and direction.
pub const PER_SECOND: u32 = 50;

/// What became of the questions of one or more streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PingResult {
    /// Questions sent.
    pub sent: u64,
    /// Answers received, one counted per question.
    pub received: u64,
    /// Answers received once more.
    pub duplicated: u64,
    /// Round trip times.
    pub rtt_ms: RoundTrip,
}

/// Round trip times in milliseconds; zeros if there were none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct RoundTrip {
    /// The shortest.
    pub min: f64,
    /// The mean.
    pub avg: f64,
    /// The longest.
    pub max: f64,
}

impl PingResult {
    /// Whether every question was answered once.
    pub fn is_perfect(&self) -> bool {
        self.sent > 0 && self.received == self.sent && self.duplicated == 0
    }
}

impl std::ops::AddAssign for PingResult {
    fn add_assign(&mut self, other: Self) {
        let (mine, theirs) = (self.received as f64, other.received as f64);
        if other.received > 0 {
            self.rtt_ms = RoundTrip {
                min: if mine > 0.0 {
                    self.rtt_ms.min.min(other.rtt_ms.min)
                } else {
                    other.rtt_ms.min
                },
                avg: (self.rtt_ms.avg * mine + other.rtt_ms.avg * theirs) / (mine + theirs),
                max: self.rtt_ms.max.max(other.rtt_ms.max),
            };
        }
        self.sent += other.sent;
        self.received += other.received;
        self.duplicated += other.duplicated;
    }
}

/// Pings under way.
pub struct Pinger {
    thread: JoinHandle<io::Result<PingResult>>,
    counts: Arc<(AtomicU64, AtomicU64)>,
}

impl Pinger {
    /// Starts asking: `per_second` a second until the stop, or until `most` have been sent.
    pub fn start(
        from: &Namespace,
        ends: Ends,
        per_second: u32,
        most: u64,
        stop: Arc<Stop>,
    ) -> io::Result<Self> {
        let counts = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
        let thread = from.spawn("ping", {
            let counts = counts.clone();
            move || {
                let mut session = Session::open(ends)?;
                session.run(per_second, most, &stop, &counts)?;
                Ok(session.result())
            }
        })?;
        Ok(Self { thread, counts })
    }

    /// Sent and received so far.
    pub fn progress(&self) -> (u64, u64) {
        (self.counts.0.load(Relaxed), self.counts.1.load(Relaxed))
    }

    /// Waits for the last answers.
    pub fn finish(self) -> io::Result<PingResult> {
        let joined = self.thread.join();
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// One socket and its book.
struct Session {
    socket: Socket,
    to: SocketAddr,
    identifier: u16,
    /// When each question was sent and, once answered, how long that took.
    book: Vec<(Instant, Option<Duration>)>,
    received: u64,
    duplicated: u64,
}

impl Session {
    fn open(ends: Ends) -> io::Result<Self> {
        let (domain, protocol) = match ends.to {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
        socket.bind(&SocketAddr::new(ends.from, 0).into())?;
        Ok(Self {
            socket,
            to: SocketAddr::new(ends.to, 0),
            identifier: std::process::id() as u16,
            book: Vec::new(),
            received: 0,
            duplicated: 0,
        })
    }

    fn run(
        &mut self,
        per_second: u32,
        most: u64,
        stop: &Stop,
        counts: &(AtomicU64, AtomicU64),
    ) -> io::Result<()> {
        let schedule = Schedule::new(per_second);
        let mut last_sent = Instant::now();
        loop {
            let sent = self.book.len() as u64;
            let over = stop.is_over() || sent == most;
            if over && (self.received == sent || last_sent.elapsed() > STRAGGLERS) {
                return Ok(());
            }
            let wait = schedule.wait(sent);
            if !over && wait.is_zero() {
                self.ask()?;
                last_sent = Instant::now();
                counts.0.store(sent + 1, Relaxed);
                continue;
            }
            let wait = wait.clamp(Duration::from_millis(1), Duration::from_millis(50));
            self.socket.set_read_timeout(Some(wait))?;
            self.listen()?;
            counts.1.store(self.received, Relaxed);
        }
    }

    fn ask(&mut self) -> io::Result<()> {
        let question = question(self.to.is_ipv4(), self.identifier, self.book.len() as u64);
        self.book.push((Instant::now(), None));
        match self.socket.send_to(&question, &self.to.into()) {
            // Unreachable just now: a question without an answer.
            Err(error) if matches!(error.kind(), NetworkUnreachable | HostUnreachable) => Ok(()),
            outcome => outcome.map(|_| ()),
        }
    }

    /// Waits for one packet at most.
    fn listen(&mut self) -> io::Result<()> {
        let mut buffer = [0; 256];
        let bytes = match (&self.socket).read(&mut buffer) {
            Ok(bytes) => bytes,
            Err(error) if matches!(error.kind(), WouldBlock | TimedOut | Interrupted) => {
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let number = answer(self.to.is_ipv4(), self.identifier, &buffer[..bytes]);
        let entry = number.and_then(|number| self.book.get_mut(number as usize));
        match entry {
            Some((at, took @ None)) => {
                *took = Some(at.elapsed());
                self.received += 1;
            }
            Some(_) => self.duplicated += 1,
            None => {}
        }
        Ok(())
    }

    fn result(&self) -> PingResult {
        let times = self.book.iter().filter_map(|(_, took)| *took);
        let times: Vec<_> = times.map(|took| took.as_secs_f64() * 1e3).collect();
        let rtt_ms = match times.len() {
            0 => RoundTrip::default(),
            count => RoundTrip {
                min: times.iter().copied().fold(f64::INFINITY, f64::min),
                avg: times.iter().sum::<f64>() / count as f64,
                max: times.iter().copied().fold(0.0, f64::max),
            },
        };
        PingResult {
            sent: self.book.len() as u64,
            received: self.received,
            duplicated: self.duplicated,
            rtt_ms,
        }
    }
}

const V4_REQUEST: u8 = 8;
const V4_REPLY: u8 = 0;
const V6_REQUEST: u8 = 128;
const V6_REPLY: u8 = 129;

/// Type, code, checksum, identifier, sequence; then the marker and the full number.
fn question(v4: bool, identifier: u16, number: u64) -> [u8; 56] {
    let mut message = [0; 56];
    message[0] = if v4 { V4_REQUEST } else { V6_REQUEST };
    message[4..6].copy_from_slice(&identifier.to_be_bytes());
    message[6..8].copy_from_slice(&(number as u16).to_be_bytes());
    message[8..16].copy_from_slice(&MARKER);
    message[16..24].copy_from_slice(&number.to_be_bytes());
    // Of ICMPv6 the kernel computes the checksum, which covers addresses (RFC 3542 §3.1).
    if v4 {
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    message
}

/// The number of one of our questions, if this is an answer to one. An IPv4 raw socket delivers the
/// IP header as well.
fn answer(v4: bool, identifier: u16, packet: &[u8]) -> Option<u64> {
    let header_bytes = if v4 {
        usize::from(packet.first()? & 15) * 4
    } else {
        0
    };
    let message = packet.get(header_bytes..)?;
    let reply = if v4 { V4_REPLY } else { V6_REPLY };
    let number = u64::from_be_bytes(message.get(16..24)?.try_into().ok()?);
    let mut expected = question(v4, identifier, number);
    expected[0] = reply;
    expected[2..4].copy_from_slice(&message[2..4]);
    (message == expected).then_some(number)
}

/// RFC 1071.
fn checksum(data: &[u8]) -> u16 {
    let words = data.chunks(2).map(|pair| match *pair {
        [high, low] => u32::from(u16::from_be_bytes([high, low])),
        [high] => u32::from(high) << 8,
        _ => 0,
    });
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_unharmed_answer_to_our_own_question_counts() {
        let mut reply = question(false, 7, 300_000);
        assert_eq!(answer(false, 7, &reply), None, "a question is no answer");
        reply[0] = V6_REPLY;
        assert_eq!(answer(false, 7, &reply), Some(300_000));
        assert_eq!(answer(false, 8, &reply), None, "another's");
        assert_eq!(answer(false, 7, &reply[..55]), None, "truncated");
        reply[40] ^= 1;
        assert_eq!(answer(false, 7, &reply), None, "damaged");

        let mut packet = vec![0x45; 20];
        packet.extend(question(true, 7, 5));
        packet[20] = V4_REPLY;
        assert_eq!(answer(true, 7, &packet), Some(5));
    }

    #[test]
    fn the_checksum_of_a_message_with_its_checksum_is_zero() {
        assert_eq!(checksum(&question(true, 0xbeef, 12)), 0);
    }

    #[test]
    fn results_of_both_directions_add_up() {
        let one = |received, min, avg, max| PingResult {
            sent: 10,
            received,
            duplicated: 0,
            rtt_ms: RoundTrip { min, avg, max },
        };
        let mut sum = PingResult::default();
        sum += one(10, 1.0, 2.0, 3.0);
        sum += one(5, 0.5, 5.0, 9.0);
        assert_eq!(
            sum.rtt_ms,
            RoundTrip {
                min: 0.5,
                avg: 3.0,
                max: 9.0
            }
        );
        assert!(!sum.is_perfect());
    }
}
