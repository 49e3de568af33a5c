//! Step 4, inbound: SPI to SA; and what a live SA of either direction consists of.
//!
//! Everything here is shared by all workers and never locked: what changes is an atomic, all else
//! is fixed when the SA is installed.

use crate::{
    AeadKey,
    aead::prefetch,
    replay::ReplayWindow,
    sequence::SequenceCounter,
    spd::{Selectors, TunnelSlot},
    tables::Activity,
    usage::Usage,
};
use esplane_api::{Esn, SaEvent, SaId, SaStatistics};
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
};

mod table;
pub use table::Sad;

/// Failed packets in a row after which an SA with extended numbers tries further high halves.
const RESYNCHRONISE_AFTER: u32 = 64;

/// An SA that sends.
#[derive(Debug)]
pub struct OutboundSa {
    /// Its name.
    pub id: SaId,
    /// Its expanded key.
    pub key: AeadKey,
    /// Its numbers. They belong to the key: an SA installed again with the same key shares them.
    pub sequence: Arc<SequenceCounter>,
    /// What it has carried.
    pub usage: Usage,
}

impl OutboundSa {
    /// Asks for what a packet needs of the record itself.
    #[inline]
    pub fn prefetch(&self) {
        prefetch(&self.key);
        prefetch(&self.sequence);
        self.usage.prefetch();
    }

    /// What it has done.
    pub fn statistics(&self) -> SaStatistics {
        SaStatistics {
            packets: self.usage.packets(),
            bytes: self.usage.bytes(),
            ..SaStatistics::default()
        }
    }
}

/// An SA that receives. It owns a window.
#[derive(Debug)]
pub struct InboundSa {
    /// Its name.
    pub id: SaId,
    /// Where its tunnel is: a tunnel keeps its place as long as it has SAs.
    pub tunnel: TunnelSlot,
    /// Its expanded key.
    pub key: AeadKey,
    /// Whether its numbers have 64 bits.
    pub esn: Esn,
    /// Which numbers have come. It belongs to the key, as an outbound SA's numbers do.
    pub window: Arc<ReplayWindow>,
    /// Whether its packets come in UDP.
    pub in_udp: bool,
    /// Whether one worker of the peer's sends with it ([`esplane_api::SaParams::worker`]).
    pub of_worker: bool,
    /// What its packets may carry.
    pub selectors: Selectors,
    /// What it has carried.
    pub usage: Usage,
    /// What its tunnel has carried.
    pub(crate) activity: Arc<Activity>,
    /// Packets with a wrong ICV.
    pub authentication_failures: AtomicU64,
    /// Packets refused by the window.
    pub replays: AtomicU64,
    /// Wrong ICVs since the last right one.
    pub failures_in_a_row: AtomicU32,
    /// Whether the first authentic packet has been told.
    pub first_told: AtomicBool,
}

impl InboundSa {
    /// Asks for what it points to and a packet needs: call it once the record itself has been asked for.
    #[inline]
    pub fn prefetch(&self) {
        self.window.prefetch();
        self.key.prefetch();
        self.selectors.prefetch();
        prefetch(&*self.activity);
    }

    /// What it has done.
    pub fn statistics(&self) -> SaStatistics {
        SaStatistics {
            packets: self.usage.packets(),
            bytes: self.usage.bytes(),
            authentication_failures: self.authentication_failures.load(Relaxed),
            replays: self.replays.load(Relaxed),
        }
    }

    /// Notes a wrong ICV. Nothing but statistics and the right to try resynchronisation follow from
    /// it.
    pub fn note_failure(&self) {
        self.authentication_failures.fetch_add(1, Relaxed);
        if self.failures_in_a_row.load(Relaxed) < RESYNCHRONISE_AFTER {
            self.failures_in_a_row.fetch_add(1, Relaxed);
        }
    }

    /// Notes an authentic packet; the first one is told through `raise`, which answers whether it
    /// could be told.
    pub fn note_authentic(&self, raise: impl FnOnce(SaEvent) -> bool) {
        // Load first: a store per packet would send the cache line back and forth between workers.
        if self.failures_in_a_row.load(Relaxed) != 0 {
            self.failures_in_a_row.store(0, Relaxed);
        }
        if !self.first_told.load(Relaxed)
            && !self.first_told.swap(true, Relaxed)
            && !raise(SaEvent::FirstReceived { sa: self.id })
        {
            self.first_told.store(false, Relaxed); // the next packet tells
        }
    }

    /// Whether so many packets have failed in a row that the high half may have been lost
    /// (RFC 4303 Appendix A3).
    pub fn may_be_out_of_step(&self) -> bool {
        self.esn == Esn::On && self.failures_in_a_row.load(Relaxed) >= RESYNCHRONISE_AFTER
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Aead;
    use esplane_api::{AeadSuite, Direction, Lifetime, Now, Spi, TunnelId, WindowSize};

    pub(super) fn inbound(spi: u32) -> InboundSa {
        InboundSa {
            id: SaId {
                tunnel: TunnelId(1),
                direction: Direction::Inbound,
                spi: Spi::new(spi).unwrap(),
            },
            tunnel: TunnelSlot(0),
            key: {
                let secret = (&[1; 16][..], [0; 4]);
                AeadKey::new(Aead::portable(), AeadSuite::Aes128Gcm16, secret, Esn::On).unwrap()
            },
            esn: Esn::On,
            window: Arc::new(ReplayWindow::new(WindowSize::DEFAULT, 0)),
            in_udp: false,
            of_worker: false,
            selectors: Selectors::default(),
            usage: Usage::new(Lifetime::UNLIMITED, Now::default()),
            activity: Arc::default(),
            authentication_failures: AtomicU64::default(),
            replays: AtomicU64::default(),
            failures_in_a_row: AtomicU32::default(),
            first_told: AtomicBool::default(),
        }
    }

    #[test]
    fn a_first_packet_that_could_not_be_told_is_told_by_the_next() {
        let sa = inbound(256);
        let mut told = 0;
        for room in [false, false, true, true] {
            sa.note_authentic(|event| {
                assert_eq!(event, SaEvent::FirstReceived { sa: sa.id });
                told += u32::from(room);
                room
            });
        }
        assert_eq!(told, 1);
    }

    #[test]
    fn one_authentic_packet_ends_the_suspicion() {
        let sa = inbound(256);
        for _ in 0..RESYNCHRONISE_AFTER {
            assert!(!sa.may_be_out_of_step());
            sa.note_failure();
        }
        assert!(sa.may_be_out_of_step());
        sa.note_authentic(|_| true);
        assert!(!sa.may_be_out_of_step());
        assert_eq!(
            sa.statistics().authentication_failures,
            u64::from(RESYNCHRONISE_AFTER)
        );
    }
}
