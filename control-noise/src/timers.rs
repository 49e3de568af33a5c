//! Every duration of the protocol in one place, and the queue of who is due when.

use crate::random::Random;
use esplane_api::TunnelId;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// The first repetition of an unanswered initiation; each further one waits twice as long.
pub(crate) const RETRY_FIRST: Duration = Duration::from_millis(500);
/// The longest wait between two initiations of one handshake.
pub(crate) const RETRY_MOST: Duration = Duration::from_secs(16);
/// The same while a packet waits for the answer.
pub(crate) const RETRY_WANTED: Duration = Duration::from_secs(5);
/// A handshake without an answer is given up after this, or goes on slowly (at start).
pub(crate) const GIVE_UP: Duration = Duration::from_secs(90);
/// The slow pace of a peer that should be there from the start on, and of one that refused us.
pub(crate) const RETRY_SLOW: Duration = Duration::from_secs(30);
/// How long the loser of a simultaneous initiation lets the winner go on before it tries itself.
pub(crate) const YIELD: Duration = Duration::from_millis(1500);
/// An answer this young stops us from initiating: its confirmation is probably on its way.
pub(crate) const PENDING_YOUNG: Duration = Duration::from_secs(2);
/// An answer that was not confirmed for so long will not be any more.
pub(crate) const PENDING_MOST: Duration = Duration::from_secs(20);
/// The first repetition of the initiator's confirming dummy; each further one waits twice as long.
pub(crate) const CONFIRM_FIRST: Duration = Duration::from_millis(250);
/// Without a packet on the new SA for so long, the initiator starts over.
pub(crate) const CONFIRM_MOST: Duration = Duration::from_secs(10);
/// When the responder sends its dummies after the confirmation, besides at once.
pub(crate) const ECHO: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(3)];
/// How long a superseded inbound SA still receives stragglers.
pub(crate) const GRACE: Duration = Duration::from_secs(15);
/// SAs end this long after their successor was due (WireGuard's 180 s).
pub(crate) const OVERTIME: Duration = Duration::from_secs(180);
/// Received data and nothing to send for so long: a dummy tells the peer that we live.
pub(crate) const PASSIVE_KEEPALIVE: Duration = Duration::from_secs(10);
/// How old the secret behind our cookies becomes; its predecessor is still good for as long.
pub(crate) const COOKIE_SECRET_AGE: Duration = Duration::from_secs(120);
/// How long we show a cookie: shorter than the sender can accept it.
pub(crate) const COOKIE_USABLE: Duration = Duration::from_secs(115);
/// The same notice about the same peer comes no more often than this.
pub(crate) const NOTICE_PAUSE: Duration = Duration::from_secs(30);
/// Cookies are asked for until it was calm for this long.
pub(crate) const LOAD_CALM: Duration = Duration::from_secs(5);

/// The wait before the next repetition, the first being number 0: doubling, with up to a quarter of
/// it more at random, so that nodes that failed together do not come back together.
pub(crate) fn backoff(
    first: Duration,
    most: Duration,
    number: u32,
    random: &mut Random,
) -> Duration {
    let wait = first.saturating_mul(1 << number.min(16)).min(most);
    wait + random.up_to(wait / 4)
}

/// Who is due when.
#[derive(Default)]
pub(crate) struct Timers {
    queue: BTreeSet<(Duration, TunnelId)>,
    due: BTreeMap<TunnelId, Duration>,
}

impl Timers {
    pub(crate) fn set(&mut self, peer: TunnelId, due: Option<Duration>) {
        if let Some(earlier) = self.due.remove(&peer) {
            self.queue.remove(&(earlier, peer));
        }
        if let Some(due) = due {
            self.due.insert(peer, due);
            self.queue.insert((due, peer));
        }
    }

    pub(crate) fn next(&self) -> Option<Duration> {
        self.queue.first().map(|(due, _)| *due)
    }

    /// Somebody who is due by `now`.
    pub(crate) fn due(&self, now: Duration) -> Option<TunnelId> {
        self.queue
            .first()
            .filter(|(due, _)| *due <= now)
            .map(|(_, peer)| *peer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_its_limit_and_never_overflows() {
        let mut random = Random::from_seed([1; 32]);
        for number in [0, 1, 2, 5, 6, 40, u32::MAX] {
            let plain = RETRY_FIRST
                .saturating_mul(1 << number.min(16))
                .min(RETRY_MOST);
            let wait = backoff(RETRY_FIRST, RETRY_MOST, number, &mut random);
            assert!(
                plain <= wait && wait <= plain + plain / 4,
                "{number}: {wait:?}"
            );
        }
    }

    #[test]
    fn a_peer_is_in_the_queue_once_with_its_last_time() {
        let (one, other) = (TunnelId(1), TunnelId(2));
        let mut timers = Timers::default();
        timers.set(one, Some(Duration::from_secs(5)));
        timers.set(other, Some(Duration::from_secs(3)));
        timers.set(one, Some(Duration::from_secs(2)));
        assert_eq!(timers.due(Duration::from_secs(2)), Some(one));
        timers.set(one, None);
        assert_eq!(timers.next(), Some(Duration::from_secs(3)));
        assert_eq!(timers.due(Duration::from_millis(2_999)), None);
        assert_eq!(timers.due(Duration::from_secs(3)), Some(other));
    }
}
