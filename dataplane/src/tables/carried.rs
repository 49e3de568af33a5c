//! What a tunnel has carried: summed up over its SAs when it is asked for, so no packet counts for both.

use crate::sad::{InboundSa, OutboundSa};
use esplane_api::{TunnelActivity, TunnelId};
use std::sync::atomic::Ordering::Relaxed;

/// Packets with payload in both directions, and dummies that came.
#[derive(Clone, Copy, Default)]
pub(super) struct Carried {
    sent: u64,
    received: u64,
    received_dummies: u64,
}

impl Carried {
    /// Adds what an SA has sent. A dummy is noted before it counts as a packet, hence no plain difference.
    pub fn add_outbound(&mut self, sa: &OutboundSa) {
        let dummies = sa.dummies.load(Relaxed);
        self.sent += sa.usage.packets().saturating_sub(dummies);
    }

    /// Adds what an SA has received.
    pub fn add_inbound(&mut self, sa: &InboundSa) {
        let dummies = sa.dummies.load(Relaxed);
        self.received += sa.usage.packets().saturating_sub(dummies);
        self.received_dummies += dummies;
    }

    /// All of it as a control plane sees it.
    pub fn activity_of(self, tunnel: TunnelId) -> TunnelActivity {
        TunnelActivity {
            tunnel,
            sent_data_packets: self.sent,
            received_data_packets: self.received,
            received_packets: self.received + self.received_dummies,
        }
    }
}
