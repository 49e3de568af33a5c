//! Inbound: check, authenticate, commit, strip. Each step is a type that only the one before can
//! make, so none can be left out:
//!
//! ```text
//!   Esp ──check──▶ Sealed ──authenticate──▶ Authentic ──commit──▶ Accepted ──strip──▶ Opened
//!        window:           ICV                          window:            padding,
//!        look only                                      take the number    next header
//! ```

use super::{associated_data, job};
use crate::{
    aead::{Aead, ICV_BYTES, Job},
    outbound::CHUNK_PACKETS,
    sad::{InboundEntry, InboundSa},
    sequence::infer,
    wire::{
        Esp,
        esp::{BEFORE_PAYLOAD_BYTES, TRAILER_BYTES},
        protocol,
    },
};
use arrayvec::ArrayVec;
use esplane_api::{DropReason, Esn};
use std::{ops::Range, sync::atomic::Ordering::Relaxed};

/// High halves tried beyond the inferred one when an SA may be out of step.
const HIGH_HALVES_TRIED: u64 = 4;

/// A packet whose number could be accepted, if it is authentic.
#[derive(Clone, Copy)]
pub struct Sealed {
    number: u64,
}

/// Packets of one SA with the right ICV: a run, as numbers are taken together.
pub struct Authentic<'t> {
    entry: &'t InboundEntry,
    numbers: ArrayVec<u64, CHUNK_PACKETS>,
}

/// An authentic packet whose number is taken.
pub struct Accepted<'t> {
    entry: &'t InboundEntry,
}

/// The payload of an accepted packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// 4 for IPv4, 41 for IPv6.
    pub next_header: u8,
    /// Where it lies in the arena.
    pub payload: Range<usize>,
}

impl Sealed {
    /// Looks at the window and answers what the AEAD is to do. `at` is the ESP packet's place in
    /// the arena.
    #[inline]
    pub fn check<'t>(
        sa: &'t InboundSa,
        esp: &Esp<'_>,
        at: &Range<usize>,
    ) -> Result<(Self, Job<'t>), DropReason> {
        let low = esp.sequence_low();
        let head = sa.window.head();
        let number = match sa.esn {
            Esn::Off => u64::from(low),
            Esn::On => {
                infer(head, sa.window.window_packets(), low).ok_or(DropReason::ReplayTooOld)?
            }
        };
        sa.window.check_below(head, number)?;
        let payload = at.start + BEFORE_PAYLOAD_BYTES..at.end - ICV_BYTES;
        let numbered = (sa.id.spi, sa.esn, number);
        let job = job(&sa.key, sa.salt, esp.iv(), numbered, payload);
        Ok((Self { number }, job))
    }

    /// Tries the next few high halves on a packet that failed with the inferred one (RFC 4303
    /// Appendix A3). `ciphertext` is what was in the job's place, payload and ICV, before it was
    /// opened.
    pub fn resynchronise(
        &mut self,
        sa: &InboundSa,
        aead: Aead,
        arena: &mut [u8],
        job: &mut Job<'_>,
        ciphertext: &[u8],
    ) {
        for beyond in 1..=HIGH_HALVES_TRIED {
            let number = self.number.saturating_add(beyond << 32);
            let place = arena.get_mut(job.payload.start..job.payload.end + ICV_BYTES);
            let (Some(place), true) = (place, number <= Esn::On.last_sequence()) else {
                return;
            };
            if place.len() != ciphertext.len() {
                return;
            }
            place.copy_from_slice(ciphertext);
            (job.aad, job.aad_bytes) = associated_data(sa.id.spi, sa.esn, number);
            aead.open(arena, std::slice::from_mut(job));
            if job.ok {
                self.number = number;
                return;
            }
        }
    }
}

impl<'t> Authentic<'t> {
    /// Of no packet yet.
    #[inline]
    pub fn none_of(entry: &'t InboundEntry) -> Self {
        Self {
            entry,
            numbers: ArrayVec::new(),
        }
    }

    /// Only with the right ICV does a packet of the SA go on.
    #[inline]
    pub fn authenticate(&mut self, sealed: Sealed, job: &Job<'_>) -> Result<(), DropReason> {
        if job.ok && self.numbers.try_push(sealed.number).is_ok() {
            Ok(())
        } else {
            self.entry.sa.note_failure();
            Err(DropReason::AuthenticationFailed)
        }
    }

    /// Takes the numbers, each unless another copy of its packet was faster. Tells so for each, in the order in which they
    /// were authenticated, and answers which one is the highest so far, if one is.
    #[inline]
    pub fn commit(
        self,
        mut tell: impl FnMut(usize, Result<Accepted<'t>, DropReason>),
    ) -> Option<usize> {
        let entry = self.entry;
        entry.sa.window.commit_run(&self.numbers, |index, taken| {
            if taken.is_err() {
                entry.sa.replays.fetch_add(1, Relaxed);
            }
            tell(index, taken.map(|()| Accepted { entry }));
        })
    }
}

impl<'t> Accepted<'t> {
    /// Its SA.
    #[inline]
    pub fn sa(&self) -> &'t InboundSa {
        &self.entry.sa
    }

    /// Takes padding and trailer off what was decrypted at `at`.
    #[inline]
    pub fn strip(&self, decrypted: &[u8], at: &Range<usize>) -> Result<Opened, DropReason> {
        let [rest @ .., padding_bytes, next_header] = decrypted else {
            return Err(DropReason::BadPadding);
        };
        let payload_bytes = rest
            .len()
            .checked_sub(usize::from(*padding_bytes))
            .ok_or(DropReason::BadPadding)?;
        // RFC 4303 §2.4: the receiver SHOULD inspect the padding 1, 2, 3, …
        let padding = &rest[payload_bytes..];
        if padding
            .iter()
            .zip(1u8..)
            .any(|(got, expected)| *got != expected)
        {
            return Err(DropReason::BadPadding);
        }
        match *next_header {
            protocol::IPV4 | protocol::IPV6 => Ok(Opened {
                next_header: *next_header,
                payload: at.start..at.end - TRAILER_BYTES - padding.len(),
            }),
            // RFC 4303 §2.6: discarded without prejudice.
            protocol::NO_NEXT_HEADER => Err(DropReason::DummyPacket),
            _ => Err(DropReason::UnsupportedNextHeader),
        }
    }
}
