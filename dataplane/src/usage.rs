//! What an SA has carried, against what it may carry (RFC 4301 §4.4.2.1).
//!
//! Most SAs are used by one worker, and a locked instruction for each of their runs costs more than all else about counting. So
//! the worker that first counts owns half of the counters and adds without a lock; all others share the other half:
//!
//! ```text
//!   own       packets, bytes    the owner's: load, add, store
//!   next      packets, bytes    nothing is to be told while the sums are below
//!   others    packets, bytes    everybody else's, elsewhere: locked adds; looked at once there are others
//! ```
//!
//! Nothing is lost either way. What a run adds is seen by others a moment later, so of runs that reach a limit together both may
//! have missed it: then the next one tells. Each limit is told once.

use crate::atomic::{AtomicU8, AtomicU32, AtomicU64, Relaxed};
use esplane_api::{Lifetime, LifetimeUnit, Now, SaEvent, SaId};
use std::{
    sync::atomic::{AtomicU32 as NumberOfScribes, Ordering},
    time::Duration,
};

const UNITS: [LifetimeUnit; 3] = [
    LifetimeUnit::Packets,
    LifetimeUnit::Bytes,
    LifetimeUnit::Seconds,
];

/// Who counts: each worker has one of its own, and so knows which counters are its own.
#[derive(Debug)]
pub struct Scribe(u32);

impl Scribe {
    /// One that never owns an SA's counters: for who uses SAs that others use more.
    pub const GUEST: Self = Self(0);

    /// One more. Two never have the same number: when all are given away, guests follow.
    pub fn new() -> Self {
        static LAST: NumberOfScribes = NumberOfScribes::new(0);
        let more = |last: u32| last.checked_add(1);
        match LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(last) => Self(last + 1),
            Err(_) => Self::GUEST,
        }
    }
}

impl Default for Scribe {
    fn default() -> Self {
        Self::new()
    }
}

/// Whose a counter's own half is: a scribe's number, 0 as long as it is nobody's.
#[derive(Debug)]
struct Owner(AtomicU32);

impl Owner {
    /// The first one to ask is.
    #[inline]
    fn is(&self, scribe: &Scribe) -> bool {
        match self.0.load(Relaxed) {
            0 => self.becomes(scribe),
            owner => owner == scribe.0,
        }
    }

    #[cold]
    fn becomes(&self, scribe: &Scribe) -> bool {
        let taken = |owner: &AtomicU32| owner.compare_exchange(0, scribe.0, Relaxed, Relaxed);
        scribe.0 != Scribe::GUEST.0 && taken(&self.0).is_ok()
    }
}

/// Packets and bytes of one SA, and its lifetime.
///
/// What packets need and change is small, and part of a cache line of the SA's record.
#[derive(Debug)]
#[repr(C)]
pub struct Usage {
    own: Counters,
    next: Counters,
    /// The scribe that counts in `own`.
    owner: Owner,
    /// Whether others have counted: 1.
    shared: AtomicU8,
    /// 0, or for good 1 + the place in [`UNITS`] of the hard limit that was reached.
    ended: AtomicU8,
    rest: Box<Rest>,
}

/// What few packets need.
#[derive(Debug)]
#[repr(align(64))]
struct Rest {
    others: Counters,
    /// Limits that have been told, a bit for each place in [`UNITS`]: soft ones from 1 on, hard ones from [`HARD`] on.
    told: AtomicU8,
    lifetime: Lifetime,
    installed: Duration,
}

/// In [`Rest::told`], the first hard limit.
const HARD: u8 = 1 << 4;

#[derive(Debug)]
struct Counters {
    packets: AtomicU64,
    bytes: AtomicU64,
}

impl Counters {
    fn new((packets, bytes): (u64, u64)) -> Self {
        Self {
            packets: AtomicU64::new(packets),
            bytes: AtomicU64::new(bytes),
        }
    }

    #[inline]
    fn get(&self) -> (u64, u64) {
        (self.packets.load(Relaxed), self.bytes.load(Relaxed))
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
        let usage = Self {
            own: Counters::new((0, 0)),
            next: Counters::new((0, 0)),
            owner: Owner(AtomicU32::new(0)),
            shared: AtomicU8::new(0),
            ended: AtomicU8::new(0),
            rest: Box::new(Rest {
                others: Counters::new((0, 0)),
                told: AtomicU8::new(0),
                lifetime,
                installed: now.monotonic,
            }),
        };
        usage.place_marks();
        usage
    }

    /// Packets carried.
    pub fn packets(&self) -> u64 {
        self.carried().0
    }

    /// Inner bytes carried.
    pub fn bytes(&self) -> u64 {
        self.carried().1
    }

    #[inline]
    fn carried(&self) -> (u64, u64) {
        let own = self.own.get();
        if self.shared.load(Relaxed) == 0 {
            return own;
        }
        let others = self.rest.others.get();
        (own.0 + others.0, own.1 + others.1)
    }

    /// Whether a hard limit has been reached.
    #[inline]
    pub fn ended(&self) -> bool {
        self.ended.load(Relaxed) != 0
    }

    /// The hard limit that has been reached.
    pub fn ended_by(&self) -> Option<LifetimeUnit> {
        let place = usize::from(self.ended.load(Relaxed)).checked_sub(1)?;
        UNITS.get(place).copied()
    }

    /// Counts a run that has been carried, and tells which limits are reached. Also an empty run tells what others have missed.
    #[inline]
    pub fn add(&self, scribe: &Scribe, packets: u64, bytes: u64, tell: impl FnMut(Reached)) {
        if self.owner.is(scribe) {
            let (packets_before, bytes_before) = self.own.get(); // nobody else changes them
            self.own.packets.store(packets_before + packets, Relaxed);
            self.own.bytes.store(bytes_before + bytes, Relaxed);
        } else {
            self.add_to_others(packets, bytes);
        }
        let (carried, next) = (self.carried(), self.next.get());
        if carried.0 >= next.0 || carried.1 >= next.1 {
            self.tell_reached(carried, tell);
        }
    }

    fn add_to_others(&self, packets: u64, bytes: u64) {
        // Load first: what all read is not to go back and forth between them.
        if self.shared.load(Relaxed) == 0 {
            self.shared.store(1, Relaxed);
        }
        self.rest.others.packets.fetch_add(packets, Relaxed);
        self.rest.others.bytes.fetch_add(bytes, Relaxed);
    }

    #[cold]
    fn tell_reached(&self, (packets, bytes): (u64, u64), mut tell: impl FnMut(Reached)) {
        let (soft, hard) = (self.rest.lifetime.soft(), self.rest.lifetime.hard());
        let over = |carried: u64, limit: Option<u64>| limit.is_some_and(|limit| carried >= limit);
        let over_soft = [over(packets, soft.packets), over(bytes, soft.bytes)];
        let over_hard = [over(packets, hard.packets), over(bytes, hard.bytes)];
        for (place, unit) in UNITS.into_iter().enumerate().take(2) {
            if over_soft[place] && self.is_untold(1 << place) {
                tell(Reached::Soft(unit));
            }
        }
        for (place, unit) in UNITS.into_iter().enumerate().take(2) {
            if over_hard[place] {
                self.end(unit);
                if self.is_untold(HARD << place) {
                    tell(Reached::Hard(unit));
                }
            }
        }
        self.place_marks();
    }

    /// Whether nobody has told this; from now on the caller has.
    fn is_untold(&self, bit: u8) -> bool {
        self.rest.told.fetch_or(bit, Relaxed) & bit == 0
    }

    /// The lowest limits that have not been told. Marks left behind by another worker, who knew less, cost one look more.
    fn place_marks(&self) {
        let told = self.rest.told.load(Relaxed);
        let (soft, hard) = (self.rest.lifetime.soft(), self.rest.lifetime.hard());
        let lowest = |place: u8, soft: Option<u64>, hard: Option<u64>| {
            let untold = |bit: u8, limit: Option<u64>| limit.filter(|_| told & bit == 0);
            let limits = [untold(1 << place, soft), untold(HARD << place, hard)];
            limits.into_iter().flatten().min().unwrap_or(u64::MAX)
        };
        let packets = lowest(0, soft.packets, hard.packets);
        self.next.packets.store(packets, Relaxed);
        self.next
            .bytes
            .store(lowest(1, soft.bytes, hard.bytes), Relaxed);
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

    /// Whether this many packets and bytes may certainly all still be carried, without a look at each packet; where not, ask
    /// [`Usage::room_for`].
    #[inline]
    pub fn has_room_for_all(&self, packets: u64, bytes: u64) -> bool {
        let (carried, next) = (self.carried(), self.next.get());
        let packets_left = next.0.saturating_sub(carried.0);
        let bytes_left = next.1.saturating_sub(carried.1);
        !self.ended() && packets <= packets_left && bytes <= bytes_left
    }

    /// How many packets of these sizes may still be carried: those that begin within the hard
    /// limits. Workers that ask at the same moment may together exceed a limit by one run each.
    pub fn room_for(&self, bytes: impl Iterator<Item = usize>) -> usize {
        if self.ended() {
            return 0;
        }
        let (carried, hard) = (self.carried(), self.rest.lifetime.hard());
        let left = |limit: Option<u64>, carried: u64| {
            limit.map_or(u64::MAX, |limit| limit.saturating_sub(carried))
        };
        let packets_left = left(hard.packets, carried.0);
        let mut bytes_left = left(hard.bytes, carried.1);
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
        let age = now.monotonic.saturating_sub(self.rest.installed);
        let over =
            |limit: Option<u64>| limit.is_some_and(|limit| age >= Duration::from_secs(limit));
        if over(self.rest.lifetime.hard().seconds) {
            if self.end(LifetimeUnit::Seconds) {
                tell(Reached::Hard(LifetimeUnit::Seconds));
            }
        } else if over(self.rest.lifetime.soft().seconds) && self.is_untold(1 << 2) {
            tell(Reached::Soft(LifetimeUnit::Seconds));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use esplane_api::Limits;

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
        let (scribe, mut told) = (Scribe::new(), Vec::new());
        for _ in 0..8 {
            usage.add(&scribe, 4, 400, |reached| told.push(reached));
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
        usage.add(&Scribe::GUEST, 3, 300, |_| {});
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

    #[test]
    fn workers_count_together_and_each_limit_is_told_once() {
        let (workers, runs) = (4, 10_000);
        let all = workers * runs * 3;
        let usage = limited(packets(all / 3), packets(all));
        let told = std::sync::Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for number in 0..workers {
                let (usage, told) = (&usage, &told);
                let scribe = if number == 3 {
                    Scribe::GUEST
                } else {
                    Scribe::new()
                };
                scope.spawn(move || {
                    for _ in 0..runs {
                        usage.add(&scribe, 3, 7, |reached| told.lock().unwrap().push(reached));
                    }
                });
            }
        });
        usage.add(&Scribe::GUEST, 0, 0, |reached| {
            told.lock().unwrap().push(reached)
        });
        assert_eq!((usage.packets(), usage.bytes()), (all, all / 3 * 7));
        let unit = LifetimeUnit::Packets;
        let told = told.into_inner().unwrap();
        assert_eq!(told, [Reached::Soft(unit), Reached::Hard(unit)]);
    }

    #[test]
    fn a_run_at_the_soft_limit_still_has_room() {
        let usage = limited(packets(10), packets(20));
        let (scribe, sizes) = (Scribe::new(), [100; 12]);
        assert!(!usage.has_room_for_all(12, 1200), "a closer look is needed");
        assert_eq!(usage.room_for(sizes.into_iter()), 12);
        usage.add(&scribe, 12, 1200, |_| {});
        assert!(usage.has_room_for_all(8, 800) && !usage.has_room_for_all(9, 900));
        assert_eq!(usage.room_for(sizes.into_iter()), 8);
    }
}
