//! Inbound: check, authenticate, commit, strip. Each step is a type that only the one before can
//! make, so none can be left out:
//!
//! ```text
//!   Esp ──check──▶ Sealed ──authenticate──▶ Authentic ──commit──▶ Accepted ──strip──▶ Opened
//!        window:           ICV                          window:            padding,
//!        look only                                      take the number    next header
//! ```

use crate::{
    Arena,
    aead::{Aead, Done, ICV_BYTES, Job, Keyed},
    sad::InboundSa,
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

/// Padding that is compared in one piece: more than a sender needs.
const PADDING_USUAL: [u8; 6] = [1, 2, 3, 4, 5, 6];
const PADDING_USUAL_WORD: u64 = {
    let [a, b, c, d, e, f] = PADDING_USUAL;
    u64::from_be_bytes([0, 0, a, b, c, d, e, f])
};

/// A packet whose number could be accepted, if it is authentic.
#[derive(Clone, Copy)]
pub struct Sealed {
    number: u64,
    /// Its place in the chunk.
    at: u8,
}

/// Packets of one SA with the right ICV: a run, as numbers are taken together.
pub struct Authentic<'t, 's> {
    sa: &'t InboundSa,
    packets: &'s [Sealed],
}

/// An authentic packet whose number is taken.
pub struct Accepted<'t> {
    sa: &'t InboundSa,
}

/// The payload of an accepted packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// 4 for IPv4, 41 for IPv6.
    pub next_header: u8,
    /// From the start of what was decrypted.
    pub payload_bytes: usize,
}

impl Sealed {
    /// Looks at the window and answers what the AEAD is to do. The ESP packet is number `at` of its chunk, and lies at `place`
    /// in the arena.
    #[inline(always)]
    pub fn check(
        sa: &InboundSa,
        esp: &Esp<'_>,
        at: u8,
        place: &Range<usize>,
    ) -> Result<(Self, Job), DropReason> {
        let low = esp.sequence_low();
        let head = sa.window.head();
        let number = match sa.esn {
            Esn::Off => u64::from(low),
            Esn::On => {
                infer(head, sa.window.window_packets(), low).ok_or(DropReason::ReplayTooOld)?
            }
        };
        sa.window.check_below(head, number)?;
        let job = Job {
            start: (place.start + BEFORE_PAYLOAD_BYTES) as u32,
            bytes: esp.encrypted_bytes() as u32,
            high: (number >> 32) as u32,
            more: 0,
        };
        Ok((Self { number, at }, job))
    }

    /// Asks for what taking its number needs.
    #[inline]
    pub fn prefetch(&self, sa: &InboundSa) {
        sa.window.prefetch_slot(self.number);
    }

    /// Tries the next few high halves on a packet that failed with the inferred one (RFC 4303
    /// Appendix A3). `ciphertext` is what was in the job's place, payload and ICV, before it was
    /// opened. Answers whether one was right.
    pub fn resynchronise(
        &mut self,
        sa: &InboundSa,
        aead: Aead,
        arena: &mut Arena<'_>,
        mut job: Job,
        ciphertext: &[u8],
    ) -> bool {
        for beyond in 1..=HIGH_HALVES_TRIED {
            let number = self.number.saturating_add(beyond << 32);
            let start = job.start as usize;
            let place = arena.get_mut(start..start + job.bytes as usize + ICV_BYTES);
            let (Some(place), true) = (place, number <= Esn::On.last_sequence()) else {
                return false;
            };
            if place.len() != ciphertext.len() {
                return false;
            }
            place.copy_from_slice(ciphertext);
            job.high = (number >> 32) as u32;
            let key = &sa.key;
            if aead.open(arena, &[Keyed { key, end: 1 }], &[job]).has(0) {
                self.number = number;
                return true;
            }
        }
        false
    }
}

impl<'t, 's> Authentic<'t, 's> {
    /// Only with the right ICV does a packet of the SA go on; where others are is told. The packets are those at `jobs` of
    /// what was opened.
    #[inline]
    pub fn of_run(
        sa: &'t InboundSa,
        packets: &'s mut [Sealed],
        (opened, jobs): (Done, Range<usize>),
        refused: impl FnMut(u8),
    ) -> Self {
        let all = packets.len() == jobs.len() && opened.has_all(jobs.clone());
        let kept = if all {
            packets.len()
        } else {
            keep_authentic(sa, packets, (opened, jobs), refused)
        };
        Self {
            sa,
            packets: packets.get(..kept).unwrap_or_default(),
        }
    }

    /// Takes the numbers, each unless another copy of its packet was faster. Tells so for each packet of the chunk, and
    /// answers which one is the newest so far, if one is.
    #[inline]
    pub fn commit(self, mut tell: impl FnMut(u8, Result<Accepted<'t>, DropReason>)) -> Option<u8> {
        let Self { sa, packets } = self;
        let number = |packet: &Sealed| packet.number;
        let newest = sa.window.commit_run(packets, number, |packet, taken| {
            if taken.is_err() {
                sa.replays.fetch_add(1, Relaxed);
            }
            tell(packet.at, taken.map(|()| Accepted { sa }));
        });
        newest.map(|packet| packet.at)
    }
}

/// Moves authentic packets to the front, and answers how many there are.
#[cold]
fn keep_authentic(
    sa: &InboundSa,
    packets: &mut [Sealed],
    (opened, jobs): (Done, Range<usize>),
    mut refused: impl FnMut(u8),
) -> usize {
    let mut kept = 0;
    for (index, job) in (0..packets.len()).zip(jobs) {
        if opened.has(job) {
            packets.swap(kept, index); // those between are refused, whatever their order
            kept += 1;
        } else {
            sa.note_failure();
            refused(packets[index].at);
        }
    }
    kept
}

impl<'t> Accepted<'t> {
    /// Its SA.
    #[inline]
    pub fn sa(&self) -> &'t InboundSa {
        self.sa
    }

    /// Finds padding and trailer of what was decrypted.
    #[inline]
    pub fn strip(&self, decrypted: &[u8]) -> Result<Opened, DropReason> {
        let (padding_bytes, next_header) = match decrypted.last_chunk::<8>() {
            Some(last) if usize::from(last[6]) <= PADDING_USUAL.len() => {
                // RFC 4303 §2.4: the receiver SHOULD inspect the padding 1, 2, 3, …
                let bits = 8 * u32::from(last[6]);
                let (got, usual) = (
                    u64::from_be_bytes(*last) >> 16,
                    PADDING_USUAL_WORD >> (48 - bits),
                );
                if got & !(u64::MAX << bits) != usual {
                    return Err(DropReason::BadPadding);
                }
                (usize::from(last[6]), last[7])
            }
            _ => long_padding(decrypted).ok_or(DropReason::BadPadding)?,
        };
        match next_header {
            protocol::IPV4 | protocol::IPV6 => Ok(Opened {
                next_header,
                payload_bytes: decrypted.len() - TRAILER_BYTES - padding_bytes,
            }),
            // RFC 4303 §2.6: discarded without prejudice.
            protocol::NO_NEXT_HEADER => Err(DropReason::DummyPacket),
            _ => Err(DropReason::UnsupportedNextHeader),
        }
    }
}

/// Length of padding of any length, and the next header. `None` where the padding is not 1, 2, 3, …
#[cold]
fn long_padding(decrypted: &[u8]) -> Option<(usize, u8)> {
    let [rest @ .., padding_bytes, next_header] = decrypted else {
        return None;
    };
    let padding_bytes = usize::from(*padding_bytes);
    let padding = rest.get(rest.len().checked_sub(padding_bytes)?..)?;
    let right = padding
        .iter()
        .zip(1u8..)
        .all(|(got, expected)| *got == expected);
    right.then_some((padding_bytes, *next_header))
}
