//! How much work strangers may cause: token buckets per source, and a count over all of them.

use crate::{LoadPolicy, timers::LOAD_CALM};
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// Sources remembered at once; each is a few dozen bytes.
const MOST_SOURCES: usize = 4096;

/// What to do with an initiation whose MAC1 is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Work on it.
    Admit,
    /// Answer with a cookie only.
    Cookie,
    /// Nothing.
    Refuse,
}

/// The node's load by initiations, over all sources and by source.
pub(crate) struct Limiter {
    policy: LoadPolicy,
    second: Duration,
    in_this_second: u32,
    loaded_until: Option<Duration>,
    /// Sources that have shown no cookie: their addresses may be forged, in somebody's name.
    unproven: Buckets,
    /// Sources that have.
    proven: Buckets,
}

impl Limiter {
    pub(crate) fn new(policy: LoadPolicy) -> Self {
        Self {
            policy,
            second: Duration::ZERO,
            in_this_second: 0,
            loaded_until: None,
            unproven: Buckets::default(),
            proven: Buckets::default(),
        }
    }

    /// Counts one initiation. `proven`: it carries a valid MAC2.
    pub(crate) fn admit(&mut self, now: Duration, from: SocketAddr, proven: bool) -> Admission {
        self.count(now);
        if self.in_this_second > self.policy.at_most {
            return Admission::Refuse;
        }
        if proven {
            // Nobody else can use up a bucket that takes a cookie.
            return match self.proven.take(&self.policy, now, from) {
                true => Admission::Admit,
                false => Admission::Refuse,
            };
        }
        if self.is_loaded(now) || !self.unproven.take(&self.policy, now, from) {
            return Admission::Cookie;
        }
        Admission::Admit
    }

    pub(crate) fn is_loaded(&self, now: Duration) -> bool {
        self.loaded_until.is_some_and(|until| now < until)
    }

    fn count(&mut self, now: Duration) {
        if now.saturating_sub(self.second) >= Duration::from_secs(1) {
            self.second = now;
            self.in_this_second = 0;
        }
        self.in_this_second = self.in_this_second.saturating_add(1);
        if self.in_this_second > self.policy.cookies_above {
            self.loaded_until = Some(now + LOAD_CALM);
        }
    }
}

/// A token bucket per source, each stored as the moment at which it will be full again.
#[derive(Default)]
struct Buckets(BTreeMap<IpAddr, Duration>);

impl Buckets {
    /// Whether the source has a token left; takes it. A source that finds the table full has none.
    fn take(&mut self, policy: &LoadPolicy, now: Duration, from: SocketAddr) -> bool {
        let source = source(from);
        if self.0.len() >= MOST_SOURCES && !self.0.contains_key(&source) {
            self.0.retain(|_, full| *full > now);
            if self.0.len() >= MOST_SOURCES {
                return false;
            }
        }
        let token = Duration::from_secs(1) / policy.per_source;
        let full = self.0.entry(source).or_default();
        let after = now.max(*full) + token;
        if after > now + token * policy.per_source_burst {
            return false;
        }
        *full = after;
        true
    }
}

/// Who counts as one: an IPv4 address, an IPv6 /64 (whoever has one address there has them all).
fn source(from: SocketAddr) -> IpAddr {
    esplane_api::IpPrefix::truncated(from.ip(), if from.is_ipv4() { 32 } else { 64 }).address()
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: LoadPolicy = LoadPolicy {
        cookies_above: 100,
        at_most: 200,
        per_source: 10,
        per_source_burst: 5,
    };

    fn at(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn a_source_may_burst_and_then_goes_at_its_rate() {
        let mut limiter = Limiter::new(POLICY);
        let from = "192.0.2.1:4500".parse().unwrap();
        let admitted =
            |limiter: &mut Limiter, ms| limiter.admit(at(ms), from, true) == Admission::Admit;
        assert_eq!((0..20).filter(|_| admitted(&mut limiter, 5_000)).count(), 5);
        assert!(!admitted(&mut limiter, 5_099));
        assert!(admitted(&mut limiter, 5_100));
        assert!(!admitted(&mut limiter, 5_101));
        let neighbour = "192.0.2.2:4500".parse().unwrap();
        assert_eq!(limiter.admit(at(5_101), neighbour, true), Admission::Admit);
    }

    #[test]
    fn who_has_no_cookie_is_asked_for_one_instead_of_refused() {
        let mut limiter = Limiter::new(POLICY);
        let from = "[2001:db8::1]:4500".parse().unwrap();
        let same_network = "[2001:db8::2]:4500".parse().unwrap();
        for _ in 0..5 {
            assert_eq!(limiter.admit(at(0), from, false), Admission::Admit);
        }
        assert_eq!(limiter.admit(at(0), same_network, false), Admission::Cookie);
        assert_eq!(
            limiter.admit(at(0), from, true),
            Admission::Admit,
            "its own bucket is untouched"
        );
    }

    #[test]
    fn load_asks_everyone_for_cookies_then_refuses_and_passes() {
        let mut limiter = Limiter::new(POLICY);
        let from = |n: u32| SocketAddr::new(IpAddr::from(n.to_be_bytes()), 4500);
        let mut seen = Vec::new();
        for n in 1..=201 {
            seen.push(limiter.admit(at(0), from(n), false));
        }
        assert!(
            seen[..100]
                .iter()
                .all(|admission| *admission == Admission::Admit)
        );
        assert!(
            seen[100..200]
                .iter()
                .all(|admission| *admission == Admission::Cookie)
        );
        assert_eq!(seen[200], Admission::Refuse);
        assert_eq!(
            limiter.admit(at(1_000), from(999), false),
            Admission::Cookie
        );
        assert_eq!(limiter.admit(at(6_100), from(999), false), Admission::Admit);
    }

    #[test]
    fn the_table_is_bounded() {
        let mut buckets = Buckets::default();
        for n in 0..2 * MOST_SOURCES as u32 {
            buckets.take(
                &POLICY,
                at(0),
                SocketAddr::new(IpAddr::from(n.to_be_bytes()), 1),
            );
        }
        assert_eq!(buckets.0.len(), MOST_SOURCES);
        assert!(
            buckets.take(&POLICY, at(10_000), "192.0.2.1:1".parse().unwrap()),
            "old ones make room"
        );
    }
}
