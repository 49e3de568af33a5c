//! Step 4, inbound: SPI to SA; and what a live SA of either direction consists of.
//!
//! Everything here is shared by all workers and never locked: what changes is an atomic, all else
//! is fixed when the SA is installed.

use crate::{
    AeadKey,
    aead::{prefetch, prefetch_lines},
    replay::ReplayWindow,
    sequence::SequenceCounter,
    spd::{AnyEnds, Networks, Selectors, TunnelSlot},
    usage::Usage,
    wire::KeyV4,
};
use esplane_api::{Esn, SaEvent, SaId, SaStatistics};
use std::{
    mem::offset_of,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
};

mod table;
pub use table::Sad;

/// Failed packets in a row after which an SA with extended numbers tries further high halves.
const RESYNCHRONISE_AFTER: u32 = 64;

/// An SA that sends. What each packet needs is its first two cache lines.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct OutboundSa {
    /// What it has carried.
    pub usage: Usage,
    /// Its numbers. They belong to the key: an SA installed again with the same key shares them.
    pub sequence: Arc<SequenceCounter>,
    /// Its expanded key.
    pub key: AeadKey,
    /// Its name.
    pub id: SaId,
    /// Dummies among what it has carried.
    pub dummies: AtomicU64,
}

#[cfg(not(loom))]
const _: () = assert!(offset_of!(OutboundSa, id) <= 2 * 64);

impl OutboundSa {
    /// Asks for what a packet needs of the record itself.
    #[inline]
    pub fn prefetch(&self) {
        prefetch_lines::<2, _>(self);
    }

    /// Asks for what it points to and a packet needs: call it once the record itself has been asked for.
    #[inline]
    pub fn prefetch_rest(&self) {
        prefetch(&*self.sequence);
        self.key.prefetch();
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
///
/// ```text
///   line 1   read by packets      key, window, networks …
///   line 2   written by packets   what it has carried, where from
///   …        seldom needed        other selectors, its name, failures
/// ```
#[derive(Debug)]
#[repr(C, align(64))]
pub struct InboundSa {
    /// Its expanded key.
    pub key: AeadKey,
    /// Which numbers have come. It belongs to the key, as an outbound SA's numbers do.
    pub window: Arc<ReplayWindow>,
    /// Of [`InboundSa::selectors`] what is mostly enough.
    pub(crate) networks: Option<Networks>,
    /// Where its tunnel is: a tunnel keeps its place as long as it has SAs.
    pub tunnel: TunnelSlot,
    /// Wrong ICVs since the last right one.
    pub failures_in_a_row: AtomicU32,
    /// Whether its numbers have 64 bits.
    pub esn: Esn,
    /// Whether its packets come in UDP.
    pub in_udp: bool,
    /// Whether one worker of the peer's sends with it ([`esplane_api::SaParams::worker`]).
    pub of_worker: bool,
    /// Whether the first authentic packet has been told.
    pub first_told: AtomicBool,

    /// What it has carried.
    pub usage: Usage,
    /// Stands for where its packets come from, if that is no news.
    pub(crate) known_origin: AtomicU64,
    /// Packets refused by the window.
    pub replays: AtomicU64,

    /// What its packets may carry.
    pub selectors: Selectors,
    /// Its name.
    pub id: SaId,
    /// Dummies among what it has carried.
    pub dummies: AtomicU64,
    /// Packets with a wrong ICV.
    pub authentication_failures: AtomicU64,
}

#[cfg(not(loom))]
const _: () =
    assert!(offset_of!(InboundSa, usage) == 64 && offset_of!(InboundSa, selectors) == 2 * 64);

impl InboundSa {
    /// Asks for what a packet needs of the record itself.
    #[inline]
    pub fn prefetch(&self) {
        prefetch_lines::<2, _>(self);
    }

    /// Asks for what it points to and a packet needs: call it once the record itself has been asked for.
    #[inline]
    pub fn prefetch_rest(&self) {
        self.window.prefetch();
        self.key.prefetch();
        if self.networks.is_none() {
            self.selectors.prefetch();
        }
    }

    /// Whether a plain packet from the far side may pass (RFC 4301 §5.2 step 4).
    #[inline]
    pub(crate) fn lets_in(&self, key: &KeyV4) -> bool {
        let usual = matches!(&self.networks, Some(networks) if networks.hold_inbound(key));
        usual || self.selectors.let_in(&AnyEnds::of_v4(key))
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

    /// Notes a packet that the window refuses.
    #[cold]
    pub fn note_replay(&self) {
        self.replays.fetch_add(1, Relaxed);
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
    use esplane_api::{
        AeadSuite, Direction, IpPrefix, Lifetime, Now, SelectorPair, Spi, TunnelId, WindowSize,
    };

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
            networks: None,
            known_origin: AtomicU64::default(),
            dummies: AtomicU64::default(),
            authentication_failures: AtomicU64::default(),
            replays: AtomicU64::default(),
            failures_in_a_row: AtomicU32::default(),
            first_told: AtomicBool::default(),
        }
    }

    /// The short cut for two networks lets in what the selectors do, and nothing else.
    #[test]
    fn a_short_cut_changes_no_decision() {
        let prefix = |text: &str| text.parse::<IpPrefix>().unwrap();
        let pair = |local, remote| SelectorPair {
            local: prefix(local).into(),
            remote: prefix(remote).into(),
        };
        let with_port = |mut pair: SelectorPair| {
            pair.remote = pair.remote.with_protocol(17).with_ports(7..=7).unwrap();
            pair
        };
        let plain = pair("10.1.0.0/16", "10.2.0.0/16");
        let other = pair("10.1.0.0/17", "10.3.0.0/16");
        let all = [
            (vec![plain], true),
            (vec![with_port(plain)], false),
            (vec![with_port(plain), other], true),
            (vec![other, with_port(plain)], true),
            (vec![pair("fd00::/64", "fd01::/64")], false),
            (vec![], false),
        ];
        for (pairs, has_short_cut) in all {
            let mut sa = inbound(256);
            sa.selectors = Selectors::new(&pairs);
            sa.networks = sa.selectors.networks();
            assert_eq!(sa.networks.is_some(), has_short_cut, "{pairs:?}");
            for case in 0..4 * 5 * 3 {
                let third = [0, 127, 128, 255][case % 4];
                let (second, port) = ((case / 4 % 5) as u8, (case / 20 + 6) as u8);
                let mut packet = [0; 28];
                (packet[0], packet[3], packet[9]) = (0x45, 28, 17);
                packet[12..20].copy_from_slice(&[10, second, 0, 1, 10, 1, third, 1]);
                packet[21] = port;
                let (key, _) = KeyV4::parse(&packet).unwrap();
                let expected = sa.selectors.let_in(&AnyEnds::of_v4(&key));
                assert_eq!(sa.lets_in(&key), expected, "{pairs:?}, {packet:?}");
            }
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
