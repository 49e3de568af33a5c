//! What an SA has carried, against what it may carry (RFC 4301 §4.4.2.1).
//!
//! Counted with one atomic add per run of packets. Because adds hand out disjoint intervals, each
//! limit is crossed by exactly one run, whichever worker it belongs to: that one tells.

use esplane_api::{Lifetime, LifetimeUnit, Limits, Now, SaEvent, SaId};
use std::{
    sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

const UNITS: [LifetimeUnit; 3] = [
    LifetimeUnit::Packets,
    LifetimeUnit::Bytes,
    LifetimeUnit::Seconds,
];

/// Packets and bytes of one SA, and its lifetime.
///
/// What packets change lies on a cache line of its own: workers that share the SA send one line back and forth per run,
/// and keep what they only read.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Usage {
    packets: AtomicU64,
    bytes: AtomicU64,
    soft: Marks,
    hard: Marks,
    /// 0, or for good 1 + the place in [`UNITS`] of the hard limit that was reached.
    ended: AtomicU8,
    soft_seconds_told: AtomicBool,
    lifetime: Lifetime,
    installed: Duration,
}

/// Limits of packets and bytes; the highest number where there is none.
#[derive(Clone, Copy, Debug)]
struct Marks {
    packets: u64,
    bytes: u64,
}

impl Marks {
    fn new(limits: Limits) -> Self {
        Self {
            packets: limits.packets.unwrap_or(u64::MAX),
            bytes: limits.bytes.unwrap_or(u64::MAX),
        }
    }
}

/// A limit that has been reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// Time for a successor.
    Soft(LifetimeUnit),
    /// The end.
    Hard(LifetimeUnit),
}

impl Reached {
    /// What to tell the control planes.
    pub fn event(self, sa: SaId) -> SaEvent {
        match self {
            Self::Soft(unit) => SaEvent::SoftExpired { sa, unit },
            Self::Hard(unit) => SaEvent::HardExpired { sa, unit },
        }
    }
}

impl Usage {
    /// Of an SA installed now.
    pub fn new(lifetime: Lifetime, now: Now) -> Self {
        Self {
            packets: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            soft: Marks::new(lifetime.soft()),
            hard: Marks::new(lifetime.hard()),
            ended: AtomicU8::new(0),
            soft_seconds_told: AtomicBool::new(false),
            lifetime,
            installed: now.monotonic,
        }
    }

    /// Packets carried.
    pub fn packets(&self) -> u64 {
        self.packets.load(Relaxed)
    }

    /// Inner bytes carried.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// Whether a hard limit has been reached.
    pub fn ended(&self) -> bool {
        self.ended.load(Relaxed) != 0
    }

    /// The hard limit that has been reached.
    pub fn ended_by(&self) -> Option<LifetimeUnit> {
        let place = usize::from(self.ended.load(Relaxed)).checked_sub(1)?;
        UNITS.get(place).copied()
    }

    /// Ends it; `true` if it had not ended before.
    fn end(&self, unit: LifetimeUnit) -> bool {
        let code = UNITS
            .iter()
            .position(|known| *known == unit)
            .map_or(0, |place| place + 1);
        self.ended
            .compare_exchange(0, code as u8, Relaxed, Relaxed)
            .is_ok()
    }

    /// Counts a run that has been carried, and tells which limits it reached.
    #[inline]
    pub fn add(&self, packets: u64, bytes: u64, mut tell: impl FnMut(Reached)) {
        let packets_before = self.packets.fetch_add(packets, Relaxed);
        let bytes_before = self.bytes.fetch_add(bytes, Relaxed);
        let crossed = |before: u64, more: u64, limit: u64| {
            before < limit && limit <= before.saturating_add(more)
        };
        if crossed(packets_before, packets, self.soft.packets) {
            tell(Reached::Soft(LifetimeUnit::Packets));
        }
        if crossed(bytes_before, bytes, self.soft.bytes) {
            tell(Reached::Soft(LifetimeUnit::Bytes));
        }
        if crossed(packets_before, packets, self.hard.packets) {
            self.end(LifetimeUnit::Packets);
            tell(Reached::Hard(LifetimeUnit::Packets));
        }
        if crossed(bytes_before, bytes, self.hard.bytes) {
            self.end(LifetimeUnit::Bytes);
            tell(Reached::Hard(LifetimeUnit::Bytes));
        }
    }

    /// Whether this many packets and bytes may all still be carried: what [`Usage::room_for`] answers, without a look at
    /// each packet.
    #[inline]
    pub fn has_room_for_all(&self, packets: u64, bytes: u64) -> bool {
        let packets_left = self.hard.packets.saturating_sub(self.packets());
        let bytes_left = self.hard.bytes.saturating_sub(self.bytes());
        !self.ended() && packets <= packets_left && bytes <= bytes_left
    }

    /// How many packets of these sizes may still be carried: those that begin within the hard
    /// limits. Workers that ask at the same moment may together exceed a limit by one run each.
    pub fn room_for(&self, bytes: impl Iterator<Item = usize>) -> usize {
        if self.ended() {
            return 0;
        }
        let packets_left = self.hard.packets.saturating_sub(self.packets());
        let mut bytes_left = self.hard.bytes.saturating_sub(self.bytes());
        let within = bytes.take_while(|bytes| {
            let begins = bytes_left > 0;
            bytes_left = bytes_left.saturating_sub(*bytes as u64);
            begins
        });
        within
            .take(usize::try_from(packets_left).unwrap_or(usize::MAX))
            .count()
    }

    /// Looks at the limits in seconds. The soft one is told once, the hard one once.
    pub fn tick(&self, now: Now, mut tell: impl FnMut(Reached)) {
        let age = now.monotonic.saturating_sub(self.installed);
        let over =
            |limit: Option<u64>| limit.is_some_and(|limit| age >= Duration::from_secs(limit));
        if over(self.lifetime.hard().seconds) {
            if self.end(LifetimeUnit::Seconds) {
                tell(Reached::Hard(LifetimeUnit::Seconds));
            }
        } else if over(self.lifetime.soft().seconds) && !self.soft_seconds_told.swap(true, Relaxed)
        {
            tell(Reached::Soft(LifetimeUnit::Seconds));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limited(soft: Limits, hard: Limits) -> Usage {
        Usage::new(Lifetime::new(soft, hard).unwrap(), Now::default())
    }

    fn packets(packets: u64) -> Limits {
        Limits {
            packets: Some(packets),
            ..Limits::NONE
        }
    }

    #[test]
    fn each_limit_is_told_by_the_run_that_reaches_it_and_by_no_other() {
        let usage = limited(packets(10), packets(20));
        let mut told = Vec::new();
        for _ in 0..8 {
            usage.add(4, 400, |reached| told.push(reached));
        }
        let unit = LifetimeUnit::Packets;
        assert_eq!(told, [Reached::Soft(unit), Reached::Hard(unit)]);
        assert!(usage.ended());
    }

    #[test]
    fn only_packets_that_begin_within_the_limits_have_room() {
        let usage = limited(Limits::NONE, packets(3));
        assert_eq!(usage.room_for([9; 5].into_iter()), 3);
        assert!(usage.has_room_for_all(3, 27) && !usage.has_room_for_all(4, 36));
        let bytes = Limits {
            bytes: Some(250),
            ..Limits::NONE
        };
        let usage = limited(Limits::NONE, bytes);
        assert_eq!(usage.room_for([100; 5].into_iter()), 3);
        usage.add(3, 300, |_| {});
        assert_eq!(usage.room_for([100; 5].into_iter()), 0);
    }

    #[test]
    fn seconds_are_told_once_each() {
        let seconds = |seconds| Limits {
            seconds: Some(seconds),
            ..Limits::NONE
        };
        let usage = limited(seconds(5), seconds(9));
        let mut told = Vec::new();
        for second in 0..20 {
            let now = Now::default().after(Duration::from_secs(second));
            usage.tick(now, |reached| told.push((second, reached)));
        }
        let unit = LifetimeUnit::Seconds;
        assert_eq!(told, [(5, Reached::Soft(unit)), (9, Reached::Hard(unit))]);
        assert_eq!(usage.room_for([1].into_iter()), 0);
    }
}
