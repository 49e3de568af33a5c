//! Real packets between the two hosts, every one of them accounted for.
//!
//! ```text
//!   h1 ──ping IPv4, 50/s──▶ h2      each answer matched with its question
//!   h1 ◀─ping IPv6, 50/s─── h2
//!   h1 ──UDP IPv4, numbered──▶ h2   each number exactly once, each byte checked
//!   h1 ◀─UDP IPv6, numbered─── h2
//!   h1 ──TCP IPv4, bulk──▶ h2       as fast as it goes, each byte checked
//! ```
//!
//! # Why nothing may be lost
//!
//! The demo claims that a rekey loses no packet, so no packet may be lost for another reason, such as
//! a queue that overflows while a busy machine does not run its reader for a second or two. Rates
//! alone cannot promise that; a bound on what is in flight can. Each UDP stream has at most
//! [`WINDOW_PACKETS`] packets under way (sender and receiver share a counter, [`Window`]), TCP at most
//! [`TCP_BUFFER_BYTES`], ping a few. Together that is less than the smallest queue on the way: 1000
//! packets in the kernel's per-core backlog between namespaces, and about 200 kB of socket buffer
//! where the administrator allows no more. If the machine stalls, the senders wait for the receivers
//! and later catch up with their schedule; whatever is missing at the end was lost by a gateway.

pub mod ping;
pub mod tcp;
pub mod udp;

use std::{
    net::IpAddr,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Numbered packets of one stream that may be under way at once.
pub const WINDOW_PACKETS: u64 = 96;
/// Bytes of the TCP stream that may be under way at once.
pub const TCP_BUFFER_BYTES: usize = 512 * 1024;
/// What every payload carries and no encrypted packet ever shows; the wiretap looks for it.
pub const MARKER: [u8; 8] = *b"cleartxt";
/// How long to wait for stragglers after the last packet was sent.
pub const STRAGGLERS: Duration = Duration::from_secs(3);

/// The ends of one stream.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// The sender's address.
    pub from: IpAddr,
    /// The receiver's address.
    pub to: IpAddr,
}

/// Says when to end; shared by all generators.
#[derive(Debug, Default)]
pub struct Stop(AtomicBool);

impl Stop {
    /// Ends it.
    pub fn stop(&self) {
        self.0.store(true, Relaxed);
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        self.0.load(Relaxed)
    }
}

/// Bounds how many numbered packets are under way: the sender asks before each, the receiver tells
/// the highest number it has seen. A packet that was overtaken and lost thus does not shrink it.
#[derive(Debug, Default)]
struct Window {
    /// Numbers below have been seen, or given up.
    seen_below: AtomicU64,
}

impl Window {
    /// The receiver has seen this number.
    fn saw(&self, number: u64) {
        self.seen_below.fetch_max(number + 1, Relaxed);
    }

    /// Waits until this number may be sent. Should nothing arrive for as long as stragglers are
    /// waited for, all that is under way counts as lost and sending goes on.
    fn wait_for(&self, number: u64, stop: &Stop) {
        let mut waiting_since = Instant::now();
        let mut seen = self.seen_below.load(Relaxed);
        while number >= seen + WINDOW_PACKETS && !stop.is_over() {
            std::thread::sleep(Duration::from_micros(200));
            let now_seen = self.seen_below.load(Relaxed);
            if now_seen != seen {
                (seen, waiting_since) = (now_seen, Instant::now());
            } else if waiting_since.elapsed() > STRAGGLERS {
                self.seen_below.fetch_max(number, Relaxed);
                return;
            }
        }
    }
}

/// Packets at a steady rate: which number is due when. What a stall has delayed is due at once.
#[derive(Clone, Copy, Debug)]
struct Schedule {
    start: Instant,
    interval: Duration,
}

impl Schedule {
    fn new(packets_per_second: u32) -> Self {
        Self {
            start: Instant::now(),
            interval: Duration::from_secs(1) / packets_per_second,
        }
    }

    /// How long until the packet of this number is due; zero if it is.
    fn wait(&self, number: u64) -> Duration {
        let nanoseconds = self.interval.as_nanos() as u64 * number;
        let due = self.start + Duration::from_nanos(nanoseconds);
        due.saturating_duration_since(Instant::now())
    }
}

/// A generator of bytes that anyone can repeat from the same seed (SplitMix64).
struct Pattern(u64);

impl Pattern {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_be_bytes()[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn the_window_holds_the_sender_until_the_receiver_has_seen_enough() {
        let (window, stop) = (Arc::new(Window::default()), Stop::default());
        window.wait_for(WINDOW_PACKETS - 1, &stop);
        let receiver = std::thread::spawn({
            let window = window.clone();
            move || window.saw(4)
        });
        window.wait_for(WINDOW_PACKETS + 4, &stop);
        assert_eq!(window.seen_below.load(Relaxed), 5);
        receiver.join().unwrap();
    }

    #[test]
    fn an_older_number_does_not_close_the_window() {
        let window = Window::default();
        window.saw(100);
        window.saw(7);
        assert_eq!(window.seen_below.load(Relaxed), 101);
    }
}
