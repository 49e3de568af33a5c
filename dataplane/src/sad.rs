//! Step 4, inbound: SPI to SA; and what a live SA of either direction consists of.
//!
//! Everything here is shared by all workers and never locked: what changes is an atomic, all else
//! is fixed when the SA is installed.

use crate::{
    AeadKey,
    replay::ReplayWindow,
    sequence::SequenceCounter,
    spd::{Selectors, TunnelSlot},
    usage::Usage,
};
use esplane_api::{Esn, SaEvent, SaId, SaStatistics};
use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
};

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
    /// Its expanded key.
    pub key: AeadKey,
    /// Whether its numbers have 64 bits.
    pub esn: Esn,
    /// Which numbers have come. It belongs to the key, as an outbound SA's numbers do.
    pub window: Arc<ReplayWindow>,
    /// Whether its packets come in UDP.
    pub in_udp: bool,
    /// What its packets may carry.
    pub selectors: Selectors,
    /// What it has carried.
    pub usage: Usage,
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

/// The Security Association Database: what receives, by SPI. Immutable.
#[derive(Default)]
pub struct Sad {
    by_spi: HashMap<u32, InboundEntry, BuildHasherDefault<SpiHasher>>,
}

/// One inbound SA and the place of its tunnel.
pub struct InboundEntry {
    /// The SA.
    pub sa: Arc<InboundSa>,
    /// Its tunnel.
    pub tunnel: TunnelSlot,
}

impl Sad {
    /// From all inbound SAs.
    pub fn new(entries: impl IntoIterator<Item = InboundEntry>) -> Self {
        let by_spi = entries
            .into_iter()
            .map(|entry| (entry.sa.id.spi.get(), entry));
        Self {
            by_spi: by_spi.collect(),
        }
    }

    /// The SA with this SPI.
    #[inline]
    pub fn find(&self, spi: u32) -> Option<&InboundEntry> {
        self.by_spi.get(&spi)
    }
}

/// One multiplication. Enough, as SPIs in the table are ours: nobody else can choose them to
/// collide.
#[derive(Default)]
pub struct SpiHasher(u64);

impl Hasher for SpiHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, spi: u32) {
        // Fibonacci hashing; the table takes both ends of the word, the good bits are in the upper half.
        self.0 = (self.0 ^ u64::from(spi))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(32);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Aead;
    use esplane_api::{AeadSuite, Direction, Lifetime, Now, Spi, TunnelId, WindowSize};

    fn inbound(spi: u32) -> InboundSa {
        InboundSa {
            id: SaId {
                tunnel: TunnelId(1),
                direction: Direction::Inbound,
                spi: Spi::new(spi).unwrap(),
            },
            key: {
                let secret = (&[1; 16][..], [0; 4]);
                AeadKey::new(Aead::portable(), AeadSuite::Aes128Gcm16, secret, Esn::On).unwrap()
            },
            esn: Esn::On,
            window: Arc::new(ReplayWindow::new(WindowSize::DEFAULT, 0)),
            in_udp: false,
            selectors: Selectors::default(),
            usage: Usage::new(Lifetime::UNLIMITED, Now::default()),
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

    #[test]
    fn every_spi_is_found_and_no_other() {
        let spis = (0..2000u32).map(|number| 256 + number * 4099);
        let sad = Sad::new(spis.clone().map(|spi| InboundEntry {
            sa: Arc::new(inbound(spi)),
            tunnel: TunnelSlot(spi),
        }));
        for spi in spis {
            assert_eq!(sad.find(spi).unwrap().tunnel, TunnelSlot(spi));
            assert!(sad.find(spi + 1).is_none());
        }
    }
}
