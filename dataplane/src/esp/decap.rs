//! Inbound: check, authenticate, commit, strip. Each step is a type that only the one before can
//! make, so none can be left out:
//!
//! ```text
//!   Esp ──check──▶ Sealed ──authenticate──▶ Authentic ──commit──▶ Accepted ──strip──▶ Opened
//!        window:           ICV                          window:            padding,
//!        look only                                      take the number    next header
//! ```

use super::{Jobs, associated_data, job};
use crate::{
    aead::{Aead, ICV_BYTES, Job},
    sad::InboundEntry,
    sequence::infer,
    wire::{
        Esp,
        esp::{BEFORE_PAYLOAD_BYTES, TRAILER_BYTES},
        protocol,
    },
};
use esplane_api::{DropReason, Esn};
use std::{ops::Range, sync::atomic::Ordering::Relaxed};

/// High halves tried beyond the inferred one when an SA may be out of step.
const HIGH_HALVES_TRIED: u64 = 4;

/// A packet whose number could be accepted, if it is authentic.
pub struct Sealed<'t> {
    /// Its SA.
    pub entry: &'t InboundEntry,
    number: u64,
}

/// A packet with the right ICV.
pub struct Authentic<'t>(Sealed<'t>);

/// An authentic packet whose number is taken.
pub struct Accepted<'t> {
    /// Its SA.
    pub entry: &'t InboundEntry,
    /// Whether its number is the highest so far.
    pub newest: bool,
}

/// The payload of an accepted packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// 4 for IPv4, 41 for IPv6.
    pub next_header: u8,
    /// Where it lies in the arena.
    pub payload: Range<usize>,
}

impl<'t> Sealed<'t> {
    /// Looks at the window and answers what the AEAD is to do. `at` is the ESP packet's place in
    /// the arena.
    #[inline]
    pub fn check(
        entry: &'t InboundEntry,
        esp: &Esp<'_>,
        at: &Range<usize>,
        jobs: &mut Jobs<'t>,
    ) -> Result<Self, DropReason> {
        let sa = &*entry.sa;
        let low = esp.sequence_low();
        let number = match sa.esn {
            Esn::Off => u64::from(low),
            Esn::On => infer(sa.window.head(), sa.window.window_packets(), low)
                .ok_or(DropReason::ReplayTooOld)?,
        };
        sa.window.check(number)?;
        let payload = at.start + BEFORE_PAYLOAD_BYTES..at.end - ICV_BYTES;
        let numbered = (sa.id.spi, sa.esn, number);
        jobs.push(job(&sa.key, sa.salt, esp.iv(), numbered, payload));
        Ok(Self { entry, number })
    }

    /// Goes on only with the right ICV.
    #[inline]
    pub fn authenticate(self, job: &Job<'_>) -> Result<Authentic<'t>, DropReason> {
        if job.ok {
            Ok(Authentic(self))
        } else {
            self.entry.sa.note_failure();
            Err(DropReason::AuthenticationFailed)
        }
    }

    /// Tries the next few high halves on a packet that failed with the inferred one (RFC 4303
    /// Appendix A3). `ciphertext` is what was in the job's place, payload and ICV, before it was
    /// opened.
    pub fn resynchronise(
        &mut self,
        aead: Aead,
        arena: &mut [u8],
        job: &mut Job<'t>,
        ciphertext: &[u8],
    ) {
        let sa = &*self.entry.sa;
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
    /// Takes the number, unless another copy of the packet was faster.
    #[inline]
    pub fn commit(self) -> Result<Accepted<'t>, DropReason> {
        let Sealed { entry, number } = self.0;
        match entry.sa.window.commit(number) {
            Ok(newest) => Ok(Accepted { entry, newest }),
            Err(reason) => {
                entry.sa.replays.fetch_add(1, Relaxed);
                Err(reason)
            }
        }
    }
}

impl Accepted<'_> {
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
