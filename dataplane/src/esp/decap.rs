//! Inbound: check, authenticate, commit, strip. Each step is a type that only the one before can
//! make, so none can be left out:
//!
//! ```text
//!   Gate ──check──▶ Sealed ──authenticate──▶ Authentic ──commit──▶ Unique ──▶ Accepted ──strip──▶ Opened
//!         window:           ICV                          window:   each that is           padding,
//!         look only                                      take the numbers                 next header
//! ```

use crate::{
    Arena,
    aead::{Aead, Done, ICV_BYTES, Job, Keyed},
    replay::Committed,
    sad::InboundSa,
    sequence::Inference,
    wire::{
        esp::{BEFORE_PAYLOAD_BYTES, TRAILER_BYTES},
        protocol,
    },
};
use esplane_api::{DropReason, Esn};
use std::ops::Range;

/// High halves tried beyond the inferred one when an SA may be out of step.
const HIGH_HALVES_TRIED: u64 = 4;

/// Padding that is compared in one piece, at most: more than a sender needs.
const PADDING_USUAL: usize = 6;
/// By its length: padding as it lies in the last eight bytes, and which of their bits it takes.
const PADDINGS: [(u64, u64); PADDING_USUAL + 1] = {
    let mut all = [(0, 0); PADDING_USUAL + 1];
    let mut length = 1;
    while length <= PADDING_USUAL {
        let (mut padding, mut bits, mut byte) = (0, 0, 1);
        while byte <= length {
            let shift = 8 * (PADDING_USUAL - length + byte - 1);
            padding |= (byte as u64) << shift; // RFC 4303 §2.4: 1, 2, 3, …
            bits |= 0xff << shift;
            byte += 1;
        }
        all[length] = (padding, bits);
        length += 1;
    }
    all
};

/// Decides over packets of one SA before they are opened. What that takes is read once for some in a row.
pub struct Gate<'t> {
    sa: &'t InboundSa,
    head: u64,
    inference: Inference,
    in_udp: bool,
    ended: bool,
}

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

/// Such packets, each of which now comes for the first time, or does not.
pub struct Unique<'t, 's> {
    sa: &'t InboundSa,
    packets: &'s [Sealed],
    committed: Committed,
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

impl<'t> Gate<'t> {
    /// As the SA is at this moment.
    #[inline]
    pub fn of(sa: &'t InboundSa) -> Self {
        let head = sa.window.head();
        Self {
            sa,
            head,
            inference: Inference::new(sa.esn, head, sa.window.window_packets()),
            in_udp: sa.in_udp,
            ended: sa.usage.ended(),
        }
    }

    /// The SA.
    #[inline]
    pub fn sa(&self) -> &'t InboundSa {
        self.sa
    }

    /// Whether the SA takes packets at all, in UDP or not.
    #[inline]
    pub fn admits(&self, udp: bool) -> Result<(), DropReason> {
        if self.in_udp != udp {
            return Err(DropReason::EncapMismatch);
        }
        if self.ended {
            return Err(DropReason::InboundLifetimeExpired);
        }
        Ok(())
    }

    /// Infers the number, looks at the window, and answers what the AEAD is to do. The ESP packet is number `at` of its chunk,
    /// has the low half `low` of its number, and lies, long enough, at `place` in the arena.
    #[inline(always)]
    pub fn check(
        &self,
        low: u32,
        at: u8,
        place: &Range<usize>,
    ) -> Result<(Sealed, Job), DropReason> {
        let number = match self.inference.number(low) {
            Some(number) if number > self.head => number, // as nearly always: nothing so high has come
            other => self.check_closely(other)?,
        };
        let job = Job {
            start: (place.start + BEFORE_PAYLOAD_BYTES) as u32,
            bytes: (place.len() - BEFORE_PAYLOAD_BYTES - ICV_BYTES) as u32,
            high: (number >> 32) as u32,
            more: 0,
        };
        Ok((Sealed { number, at }, job))
    }

    #[inline(never)]
    fn check_closely(&self, number: Option<u64>) -> Result<u64, DropReason> {
        let number = number.ok_or(DropReason::ReplayTooOld);
        let seen = number.and_then(|number| self.sa.window.check(number).map(|()| number));
        seen.inspect_err(|_| self.sa.note_replay())
    }
}

impl Sealed {
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

    /// Takes the numbers, each unless another copy of its packet was faster.
    #[inline]
    pub fn commit(self) -> Unique<'t, 's> {
        let Self { sa, packets } = self;
        let committed = sa.window.commit_run(packets, |packet| packet.number);
        Unique {
            sa,
            packets,
            committed,
        }
    }
}

impl<'t, 's> Unique<'t, 's> {
    /// Each packet's place in the chunk, and whether its number was taken for it.
    #[inline]
    pub fn packets(&self) -> impl Iterator<Item = (u8, Result<Accepted<'t>, DropReason>)> {
        let Self { sa, committed, .. } = *self;
        self.packets.iter().enumerate().map(move |(index, packet)| {
            let taken = committed.of(index).map(|()| Accepted { sa });
            (packet.at, taken.inspect_err(|_| sa.note_replay()))
        })
    }

    /// The place of the newest packet so far, if it is one of them.
    #[inline]
    pub fn newest(&self) -> Option<u8> {
        Some(self.packets.get(self.committed.newest?)?.at)
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
        let last = decrypted.last_chunk().copied().map(u64::from_le_bytes);
        let usual = last.and_then(|last| {
            let padding_bytes = (last >> 48) as u8;
            Some((
                last,
                padding_bytes,
                PADDINGS.get(usize::from(padding_bytes))?,
            ))
        });
        let (padding_bytes, next_header) = match usual {
            Some((last, padding_bytes, (padding, bits))) => {
                // RFC 4303 §2.4: the receiver SHOULD inspect the padding
                if (last ^ padding) & bits != 0 {
                    return Err(DropReason::BadPadding);
                }
                (padding_bytes.into(), (last >> 56) as u8)
            }
            None => long_padding(decrypted).ok_or(DropReason::BadPadding)?,
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
