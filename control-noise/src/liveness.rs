//! Is the peer still there? Answered without a single packet while traffic flows both ways.
//!
//! As in WireGuard, both ends keep two promises: whoever receives data and has nothing to send answers
//! with a dummy after ten seconds; so whoever sends and hears nothing for longer than that knows that
//! something is wrong, and asks by a handshake.

use crate::timers::PASSIVE_KEEPALIVE;
use esplane_api::TunnelActivity;
use std::time::Duration;

#[derive(Default)]
pub(crate) struct Liveness {
    seen: Option<TunnelActivity>,
    /// We send since then, and have heard nothing.
    unanswered_since: Option<Duration>,
    /// The peer wants to hear from us by then.
    answer_due: Option<Duration>,
    /// NATs have seen something from the port that the peer answers to.
    last_sent: Duration,
    silent: bool,
}

/// The two settings that matter here.
#[derive(Clone, Copy)]
pub(crate) struct LivenessPolicy {
    pub keepalive: Option<Duration>,
    pub dead_after: Option<Duration>,
    /// What we send may leave from other ports than the one that the peer answers to, and then keeps nothing open.
    pub several_ports: bool,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LivenessAction {
    SendDummy,
    /// Nothing was heard for so long.
    AskWhetherAlive(Duration),
}

impl LivenessPolicy {
    /// Soon enough for a peer that waits as long as we do.
    fn passive_keepalive(self) -> Duration {
        self.dead_after.map_or(PASSIVE_KEEPALIVE, |dead_after| {
            PASSIVE_KEEPALIVE.min(dead_after * 2 / 3)
        })
    }
}

impl Liveness {
    /// Compares with what the tunnel had carried when we looked last.
    pub(crate) fn observe(
        &mut self,
        now: Duration,
        activity: &TunnelActivity,
        policy: LivenessPolicy,
    ) {
        let Some(before) = self.seen.replace(*activity) else {
            return;
        };
        let heard = activity.received_packets > before.received_packets;
        let got_data = activity.received_data_packets > before.received_data_packets;
        let sent = activity.sent_data_packets > before.sent_data_packets;
        if heard {
            self.unanswered_since = None;
            self.silent = false;
        }
        if sent {
            if !policy.several_ports {
                self.last_sent = now;
            }
            self.answer_due = None;
            if !heard {
                self.unanswered_since.get_or_insert(now);
            }
        } else if got_data {
            self.answer_due
                .get_or_insert(now + policy.passive_keepalive());
        }
    }

    /// The peer has proven by a handshake that it is there.
    pub(crate) fn reset(&mut self, now: Duration) {
        self.unanswered_since = None;
        self.answer_due = None;
        self.silent = false;
        self.last_sent = now;
    }

    /// Whether we have given the peer up for now.
    pub(crate) fn is_silent(&self) -> bool {
        self.silent
    }

    pub(crate) fn deadline(&self, policy: LivenessPolicy) -> Option<Duration> {
        let keepalive = policy.keepalive.map(|every| self.last_sent + every);
        let dead = policy
            .dead_after
            .and_then(|after| Some(self.unanswered_since? + after));
        [keepalive, dead, self.answer_due]
            .into_iter()
            .flatten()
            .min()
    }

    pub(crate) fn due(&mut self, now: Duration, policy: LivenessPolicy) -> Option<LivenessAction> {
        if let (Some(since), Some(after)) = (self.unanswered_since, policy.dead_after)
            && now >= since + after
        {
            self.unanswered_since = None;
            self.silent = true;
            return Some(LivenessAction::AskWhetherAlive(now - since));
        }
        let keepalive = policy
            .keepalive
            .is_some_and(|every| now >= self.last_sent + every);
        let answer = self.answer_due.is_some_and(|due| now >= due);
        if keepalive || answer {
            self.answer_due = None;
            self.last_sent = now;
            return Some(LivenessAction::SendDummy);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use esplane_api::TunnelId;

    const POLICY: LivenessPolicy = LivenessPolicy {
        keepalive: None,
        dead_after: Some(Duration::from_secs(15)),
        several_ports: false,
    };

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn activity(sent: u64, received_data: u64, received: u64) -> TunnelActivity {
        TunnelActivity {
            tunnel: TunnelId(1),
            sent_data_packets: sent,
            received_data_packets: received_data,
            received_packets: received,
        }
    }

    #[test]
    fn sending_into_silence_is_noticed_once() {
        let mut liveness = Liveness::default();
        liveness.observe(seconds(1), &activity(0, 0, 0), POLICY);
        for second in 2..16 {
            liveness.observe(seconds(second), &activity(second, 0, 0), POLICY);
            assert_eq!(liveness.due(seconds(second), POLICY), None);
        }
        assert_eq!(liveness.deadline(POLICY), Some(seconds(17)));
        assert_eq!(
            liveness.due(seconds(17), POLICY),
            Some(LivenessAction::AskWhetherAlive(seconds(15)))
        );
        assert_eq!(liveness.due(seconds(17), POLICY), None);
        assert!(liveness.is_silent());
        liveness.observe(seconds(18), &activity(18, 0, 1), POLICY);
        assert!(!liveness.is_silent());
    }

    #[test]
    fn received_data_is_answered_unless_we_send_anyway() {
        let mut liveness = Liveness::default();
        liveness.observe(seconds(1), &activity(0, 0, 0), POLICY);
        liveness.observe(seconds(2), &activity(0, 1, 1), POLICY);
        assert_eq!(liveness.deadline(POLICY), Some(seconds(12)));
        liveness.observe(seconds(3), &activity(1, 1, 1), POLICY);
        assert_eq!(
            liveness.due(seconds(12), POLICY),
            None,
            "our own data was the answer"
        );
        liveness.observe(seconds(13), &activity(1, 2, 2), POLICY);
        assert_eq!(
            liveness.due(seconds(23), POLICY),
            Some(LivenessAction::SendDummy)
        );
    }

    #[test]
    fn a_dummy_that_arrives_asks_for_no_answer() {
        let mut liveness = Liveness::default();
        liveness.observe(seconds(1), &activity(0, 0, 0), POLICY);
        liveness.observe(seconds(2), &activity(0, 0, 1), POLICY);
        assert_eq!(
            liveness.deadline(POLICY),
            None,
            "else two idle peers would talk for ever"
        );
    }

    #[test]
    fn a_persistent_keepalive_counts_from_what_was_sent_last() {
        let policy = LivenessPolicy {
            keepalive: Some(seconds(20)),
            dead_after: None,
            several_ports: false,
        };
        let mut liveness = Liveness::default();
        liveness.reset(seconds(5));
        assert_eq!(liveness.due(seconds(24), policy), None);
        assert_eq!(
            liveness.due(seconds(25), policy),
            Some(LivenessAction::SendDummy)
        );
        assert_eq!(liveness.deadline(policy), Some(seconds(45)));
    }

    /// Workers that send from ports of their own would let a NAT forget the one to which the peer answers.
    #[test]
    fn what_leaves_from_other_ports_puts_no_keepalive_off() {
        for (several_ports, at_20) in [(false, None), (true, Some(LivenessAction::SendDummy))] {
            let policy = LivenessPolicy {
                keepalive: Some(seconds(20)),
                dead_after: None,
                several_ports,
            };
            let mut liveness = Liveness::default();
            for second in 0..20 {
                liveness.observe(seconds(second), &activity(second, 0, second), policy);
                assert_eq!(liveness.due(seconds(second), policy), None);
            }
            assert_eq!(liveness.due(seconds(20), policy), at_20);
        }
    }
}
