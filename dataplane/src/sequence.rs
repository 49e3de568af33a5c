//! Step 5: sequence numbers. Outbound they are reserved, inbound their high half is inferred.
//!
//! The number is also the IV (RFC 4106 §3.1), so one number used twice under one key would give the
//! key away. [`SequenceCounter`] is therefore the one place where numbers are made, and it only
//! ever goes up:
//!
//! ```text
//!   1 …… used …… next …… low_at …… last …… Esn::last_sequence
//!                │        │         └ nothing beyond is handed out; ExtendSequence moves it on
//!                │        └ from here on SequenceLow asks for that
//!                └ one atomic add per run of packets, by any number of workers
//! ```

use crate::atomic::{AtomicU64, Relaxed};
use esplane_api::{Esn, SequenceStart};
use std::ops::Range;

/// `low_at` of a counter that has no reservation to extend.
const NEVER: u64 = u64::MAX;

/// Hands out the numbers of one outbound key, each at most once.
///
/// One cache line.
#[derive(Debug)]
#[repr(align(64))]
pub struct SequenceCounter {
    next: AtomicU64,
    last: AtomicU64,
    low_at: AtomicU64,
    esn: Esn,
}

impl SequenceCounter {
    /// Starts as the parameters say.
    pub fn new(esn: Esn, start: SequenceStart) -> Self {
        let counter = Self {
            next: AtomicU64::new(start.first),
            last: AtomicU64::new(esn.last_sequence()),
            low_at: AtomicU64::new(NEVER),
            esn,
        };
        if let Some(until) = start.reserved_until {
            counter.last.store(until.min(esn.last_sequence()), Relaxed);
            counter.place_low_mark();
        }
        counter
    }

    /// Takes up to `wanted` consecutive numbers; fewer, or none, at the end of what is reserved.
    ///
    /// Check before add: a counter past its end is never added to, so each worker can overshoot it
    /// by one run at most. [`Esn::last_sequence`] leaves 2^32 numbers for that, more than any
    /// number of workers can hold at once: the counter cannot wrap. Numbers overshot are skipped,
    /// not reused.
    pub fn reserve(&self, wanted: u32) -> Range<u64> {
        let last = self.last.load(Relaxed);
        if self.next.load(Relaxed) > last {
            return 0..0; // RFC 4303 §3.3.3: never cycle
        }
        let first = self.next.fetch_add(u64::from(wanted), Relaxed);
        let end = (first + u64::from(wanted)).min(last + 1);
        first.min(end)..end
    }

    /// Moves the end of the reservation on, never back.
    pub fn extend(&self, until: u64) {
        self.last
            .fetch_max(until.min(self.esn.last_sequence()), Relaxed);
        self.place_low_mark();
    }

    /// Takes up a further start for the same key: goes on from whichever is higher.
    pub fn resume(&self, start: SequenceStart) {
        self.next.fetch_max(start.first, Relaxed);
        match start.reserved_until {
            Some(until) => self.extend(until),
            None => {
                self.last.store(self.esn.last_sequence(), Relaxed);
                self.low_at.store(NEVER, Relaxed);
            }
        }
    }

    /// The next number it will hand out.
    pub fn next(&self) -> u64 {
        self.next.load(Relaxed)
    }

    /// The last number it has handed out, or the one before its first.
    pub fn used(&self) -> u64 {
        let next = self.next.load(Relaxed).saturating_sub(1);
        next.min(self.last.load(Relaxed))
    }

    /// Whether more than half of the reservation is used.
    pub fn is_low(&self) -> bool {
        self.next.load(Relaxed) > self.low_at.load(Relaxed)
    }

    /// Whether every number that exists is used, reservation or not.
    pub fn is_exhausted(&self) -> bool {
        self.next.load(Relaxed) > self.esn.last_sequence()
    }

    /// Whether its numbers have 64 bits.
    pub fn esn(&self) -> Esn {
        self.esn
    }

    fn place_low_mark(&self) {
        let (next, last) = (self.next.load(Relaxed), self.last.load(Relaxed));
        let mark = if last == self.esn.last_sequence() {
            NEVER // nothing is left to reserve
        } else {
            next + (last + 1).saturating_sub(next) / 2
        };
        self.low_at.store(mark, Relaxed);
    }
}

/// What a packet's number is, of which it carries the low 32 bits.
#[derive(Clone, Copy, Debug)]
pub struct Inference {
    bottom: u64,
}

impl Inference {
    /// Given the highest number authenticated so far (RFC 4303 Appendix A2.2).
    ///
    /// With extended numbers it is the one number with these low bits in the 2^32 that begin at the lower edge of the window,
    /// so both of the appendix's cases are one subtraction; without, in those that begin at 0.
    #[inline]
    pub fn new(esn: Esn, head: u64, window_packets: u32) -> Self {
        let bottom = match esn {
            Esn::On => head.wrapping_sub(u64::from(window_packets) - 1),
            Esn::Off => 0,
        };
        Self { bottom }
    }

    /// The whole number. `None` where it lies before zero.
    #[inline]
    pub fn number(self, low: u32) -> Option<u64> {
        let beyond = low.wrapping_sub(self.bottom as u32);
        let number = self.bottom.wrapping_add(u64::from(beyond));
        (number <= Esn::On.last_sequence()).then_some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn infer(head: u64, window_packets: u32, low: u32) -> Option<u64> {
        Inference::new(Esn::On, head, window_packets).number(low)
    }

    use std::{collections::HashSet, sync::Mutex, thread};

    fn start(first: u64, reserved_until: Option<u64>) -> SequenceStart {
        SequenceStart {
            first,
            reserved_until,
        }
    }

    #[test]
    fn a_fresh_counter_begins_at_one() {
        let counter = SequenceCounter::new(Esn::On, SequenceStart::FRESH);
        assert_eq!(counter.used(), 0);
        assert_eq!(counter.reserve(3), 1..4);
        assert_eq!(counter.reserve(1), 4..5);
        assert_eq!((counter.used(), counter.next()), (4, 5));
    }

    #[test]
    fn thirty_two_bits_end_without_wrapping() {
        let last = u64::from(u32::MAX);
        let counter = SequenceCounter::new(Esn::Off, start(last - 2, None));
        assert_eq!(counter.reserve(2), last - 2..last);
        assert_eq!(counter.reserve(64), last..last + 1);
        for _ in 0..1000 {
            assert!(counter.reserve(64).is_empty());
        }
        assert!(counter.is_exhausted() && counter.used() == last);
    }

    #[test]
    fn sixty_four_bits_end_without_wrapping() {
        let last = Esn::On.last_sequence();
        let counter = SequenceCounter::new(Esn::On, start(last, None));
        assert_eq!(counter.reserve(u32::MAX), last..last + 1);
        assert!(counter.reserve(u32::MAX).is_empty() && counter.is_exhausted());
    }

    #[test]
    fn a_reservation_ends_early_and_goes_on_when_extended() {
        let counter = SequenceCounter::new(Esn::On, start(11, Some(20)));
        assert!(!counter.is_low());
        assert_eq!(counter.reserve(5), 11..16);
        assert!(!counter.is_low(), "half is not more than half");
        assert_eq!(counter.reserve(1), 16..17);
        assert!(counter.is_low());
        assert_eq!(counter.reserve(8), 17..21);
        assert!(counter.reserve(1).is_empty());
        assert!(!counter.is_exhausted());
        counter.extend(15); // an old answer: nothing goes back
        assert!(counter.reserve(1).is_empty());
        counter.extend(60);
        assert!(!counter.is_low());
        let further = counter.reserve(1);
        assert!(further.start > 20 && further.end == further.start + 1);
    }

    #[test]
    fn a_resumed_counter_never_goes_back() {
        let counter = SequenceCounter::new(Esn::On, start(1, Some(100)));
        counter.reserve(50);
        counter.resume(start(1, Some(100)));
        assert_eq!(counter.next(), 51);
        counter.resume(start(101, Some(200)));
        assert_eq!(counter.reserve(1), 101..102);
    }

    #[test]
    fn many_workers_never_share_a_number() {
        let counter = SequenceCounter::new(Esn::Off, start(u64::from(u32::MAX) - 9_999, None));
        let all = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for worker in 0..4 {
                let (counter, all) = (&counter, &all);
                scope.spawn(move || {
                    let mut mine = Vec::new();
                    loop {
                        let run = counter.reserve(worker * 7 + 1);
                        if run.is_empty() {
                            break;
                        }
                        mine.extend(run);
                    }
                    all.lock().unwrap().extend(mine);
                });
            }
        });
        let all = all.into_inner().unwrap();
        assert_eq!(all.len(), 10_000);
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), 10_000);
        assert_eq!(all.iter().max(), Some(&u64::from(u32::MAX)));
    }

    /// RFC 4303 Appendix A2.2 as it is written, case by case.
    fn by_the_letter(head: u64, window: u32, low: u32) -> Option<u64> {
        let (top_high, top_low) = (head >> 32, head as u32);
        let high = if top_low >= window - 1 {
            if low >= top_low - (window - 1) {
                Some(top_high)
            } else {
                top_high.checked_add(1)
            }
        } else if low >= top_low.wrapping_sub(window - 1) {
            top_high.checked_sub(1)
        } else {
            Some(top_high)
        };
        high.map(|high| high << 32 | u64::from(low))
    }

    #[test]
    fn the_high_half_follows_the_appendix() {
        let edges = [0, 1, 30, 31, 32, 33, 1 << 31, u32::MAX - 31, u32::MAX];
        for high in [0, 1, 77] {
            for top_low in edges {
                for low in edges {
                    let head = high << 32 | u64::from(top_low);
                    assert_eq!(
                        infer(head, 32, low),
                        by_the_letter(head, 32, low),
                        "head {head:#x}, low {low:#x}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_high_half_moves_on_when_the_low_half_wraps() {
        assert_eq!(infer(0xffff_fff0, 64, 5), Some(0x1_0000_0005));
        assert_eq!(infer(0x1_0000_0005, 64, 0xffff_fff0), Some(0xffff_fff0));
        assert_eq!(infer(5, 64, 0xffff_fff0), None);
    }
}
