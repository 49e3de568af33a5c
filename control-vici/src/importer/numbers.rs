//! The nonce rule: which sequence numbers of a key may still be used.
//!
//! The IV is the sequence number (RFC 4106 §3.1), so a number used twice under one key gives the key away. charon's keys outlive
//! this process, and they move: MOBIKE deletes an SA and adds it again with the same SPI and key under another address.
//! So numbers belong to (SPI, key), and before any is used the kernel has stored, and acknowledged, up to where:
//!
//! ```text
//!   1 …… used …… used_until │ requested …
//!                  │           └ a Store is under way; not ours before its reply
//!                  └ handed to the dataplane, stored in the kernel: a successor of this process goes on behind it
//! ```
//!
//! What a kernel's SA tells a fresh process:
//!
//! | stored there | seen being born | then |
//! |---|---|---|
//! | n > 0 | either | go on at n + 1 + [`Chunk::margin`] |
//! | 0 | yes | nobody has used it: begin at 1 |
//! | 0 | no | perhaps used, perhaps reset by a MOBIKE while nobody looked: charon is asked to rekey |
//!
//! The margin is for one race: charon's MOBIKE reads an SA's counter, deletes the SA, and adds it with what it has read;
//! a Store in between is lost there. We store again as soon as the new SA appears. Should this process die just then, the
//! kernel's number lags by what a few milliseconds reserve: less than the margin.

use super::charon::ChildId;
use crate::xfrm::XfrmSa;
use esplane_api::{Direction, Esn, KeyMaterial, SequenceStart, Spi, TunnelId};
use std::{
    collections::{BTreeMap, VecDeque, hash_map::RandomState},
    hash::BuildHasher,
};

/// Keys remembered without an SA; the oldest are forgotten first.
const REMEMBERED_MAX: usize = 4096;

/// How many numbers are reserved at once.
pub(super) struct Chunk;

impl Chunk {
    /// Numbers reserved at once: seconds of traffic at full speed. With 32 bits hundreds of restarts use them up;
    /// with ESN so few that a receiver who infers the high half follows the jump (RFC 4303 Appendix A2).
    pub fn size(esn: Esn) -> u64 {
        match esn {
            Esn::On => 1 << 26,
            Esn::Off => 1 << 22,
        }
    }

    /// How far behind what the kernel has stored a fresh process begins.
    pub fn margin(esn: Esn) -> u64 {
        2 * Self::size(esn)
    }

    /// From here on charon is asked for a successor: an eighth is left.
    pub fn nearly_all(esn: Esn) -> u64 {
        esn.last_sequence() / 8 * 7
    }
}

/// Recognises an SPI with its key, without holding the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct KeyName {
    spi: Spi,
    digest: u64,
}

/// What is known of a key, whether it has an SA at the moment or not.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    /// Which way its SA goes, once that is known.
    pub direction: Option<Direction>,
    /// The tunnel its SA was in.
    pub tunnel: Option<TunnelId>,
    /// charon's number of its CHILD_SA.
    pub child: Option<ChildId>,
    /// Outbound: the last number that may have been used. `None`: nobody knows.
    pub used_until: Option<u64>,
    /// Outbound: the last number a Store has asked for.
    pub requested_until: u64,
    /// Inbound: the highest number received.
    pub received: u64,
    /// Packets and bytes carried, by processes before this one too.
    pub carried: (u64, u64),
    /// How many SAs have it now: one, none, or for a moment two.
    pub live: u32,
}

/// All keys seen.
#[derive(Default)]
pub(super) struct Numbers {
    secret: RandomState,
    known: BTreeMap<KeyName, Known>,
    gone: VecDeque<KeyName>,
}

impl Numbers {
    /// The same for the same SPI and key, as long as this process lives.
    pub fn name(&self, spi: Spi, key: &KeyMaterial) -> KeyName {
        let secret = (key.dangerous_key(), key.dangerous_salt());
        KeyName {
            spi,
            digest: self.secret.hash_one(secret),
        }
    }

    /// An SA with this key is there. `born`: it was negotiated while this process looked on.
    pub fn appeared(&mut self, name: KeyName, sa: &XfrmSa, born: bool) {
        let fresh = || Known {
            direction: None,
            tunnel: None,
            child: None,
            used_until: match sa.sequence_sent {
                0 if born => Some(0),
                0 => None,
                stored => Some(stored.saturating_add(Chunk::margin(esn(sa)))),
            },
            requested_until: sa.sequence_sent,
            received: sa.sequence_received,
            carried: (sa.packets, sa.bytes),
            live: 0,
        };
        self.known.entry(name).or_insert_with(fresh).live += 1;
        self.seen(name, sa.sequence_sent);
    }

    /// The kernel has this number stored for a key: if it is not ours, somebody else may have used those up to it.
    pub fn seen(&mut self, name: KeyName, stored: u64) {
        if let Some(known) = self.known.get_mut(&name)
            && stored > known.requested_until
        {
            known.requested_until = stored;
            known.used_until = known.used_until.map(|used| used.max(stored));
        }
    }

    /// An SA with this key is gone. The key is remembered.
    pub fn disappeared(&mut self, name: KeyName) {
        let Some(known) = self.known.get_mut(&name) else {
            return;
        };
        known.live = known.live.saturating_sub(1);
        if known.live > 0 {
            return;
        }
        self.gone.push_back(name);
        while self.gone.len() > REMEMBERED_MAX {
            if let Some(oldest) = self.gone.pop_front()
                && self.known.get(&oldest).is_some_and(|known| known.live == 0)
                && !self.gone.contains(&oldest)
            {
                self.known.remove(&oldest);
            }
        }
    }

    pub fn get(&self, name: KeyName) -> Option<&Known> {
        self.known.get(&name)
    }

    pub fn get_mut(&mut self, name: KeyName) -> Option<&mut Known> {
        self.known.get_mut(&name)
    }

    /// The next numbers of an outbound key to have stored, before they are used. `None`: none are left, or nobody
    /// knows which are used.
    pub fn reserve(&mut self, name: KeyName, esn: Esn, next: u64) -> Option<SequenceStart> {
        let known = self.known.get_mut(&name)?;
        let first = next.max(known.used_until? + 1);
        if first > esn.last_sequence() {
            return None;
        }
        let until = (first - 1).saturating_add(Chunk::size(esn));
        // Never the same twice: a late answer to an earlier Store answers no later one.
        let until = until
            .max(known.requested_until.saturating_add(1))
            .min(esn.last_sequence());
        known.requested_until = until;
        Some(SequenceStart {
            first,
            reserved_until: Some(until),
        })
    }

    /// Numbers up to here are stored and handed to the dataplane: from now on they count as used.
    pub fn hand_over(&mut self, name: KeyName, until: u64) {
        if let Some(known) = self.known.get_mut(&name) {
            known.used_until = known.used_until.map(|used| used.max(until));
        }
    }
}

/// How an SA's numbers count.
pub(super) fn esn(sa: &XfrmSa) -> Esn {
    if sa.esn { Esn::On } else { Esn::Off }
}
