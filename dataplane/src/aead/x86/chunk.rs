//! What goes abreast: 64 jobs are looked at together, once, and sorted by what they have in common.

use super::super::{self as x86, *};
use super::LANES;
use crate::aead::AeadKey;
use crate::aead::x86::key::Schedule;
use core::{arch::x86_64::__m128i, mem::MaybeUninit, ops::Range};

/// Jobs that are looked at together: a bit each of a word.
pub(super) const CHUNK: usize = 64;
/// A bit of [`Chunk::kinds`]: does not go abreast.
pub(super) const LONG: u8 = 0x80;
/// Another: AES-256.
pub(super) const LONG_KEY: u8 = 0x40;

/// Jobs as packets, and which of them may go abreast.
pub(super) struct Chunk<'k> {
    /// Number in the run of the first.
    pub(super) start: usize,
    /// Written where there is a kind.
    packets: [MaybeUninit<Short<'k>>; CHUNK],
    /// Zero is none, or one refused. Packets of equal kind have equally many blocks and rounds.
    pub(super) kinds: Aligned<[u8; CHUNK]>,
    pub(super) keys: Aligned<[*const Schedule; CHUNK]>,
}

/// A packet: no more than what is read again and again of those that go abreast.
pub(super) struct Short<'k> {
    pub(super) lengths: Lengths,
    /// As in [`Packet`].
    pub(super) payload: *mut u8,
    pub(super) key: &'k Schedule,
    /// 12 bytes, and right behind them 16 of AAD with zeros at the end.
    pub(super) nonce: *const u8,
}

impl<'k> Short<'k> {
    /// As the other kernel sees it.
    pub(super) fn packet(&self, rounds: usize) -> Packet<'k> {
        Packet {
            key: self.key,
            nonce: self.nonce,
            aad: self.nonce.wrapping_add(NONCE_BYTES),
            aad_bytes: self.lengths.0[1] as u32,
            payload: self.payload,
            bytes: self.bytes(),
            rounds,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.lengths.0[0] as usize
    }
}

/// Bytes of payload and of AAD, side by side as GHASH wants them. To be read at once long after they were written one by
/// one: soon after, they would have to wait for the cache.
#[repr(align(16))]
pub(super) struct Lengths(pub(super) [u64; 2]);

/// Four packets of equal kind. Where there are fewer, the last stands in several lanes: each step reads all lanes before
/// it writes any, so it is crypted once.
#[derive(Clone, Copy)]
pub(super) struct Four<'c, 'k> {
    pub(super) packets: [&'c Short<'k>; 4],
    /// Their numbers in the run.
    pub(super) jobs: [usize; 4],
    /// Sums of the halves of the key's powers, if it is the same.
    pub(super) sums: *const __m128i,
}

impl<'k> Chunk<'k> {
    /// Nothing read yet.
    #[inline(always)]
    pub(super) fn new(start: usize) -> Self {
        Self {
            start,
            packets: [const { MaybeUninit::uninit() }; CHUNK],
            kinds: Aligned([0; CHUNK]),
            keys: Aligned([core::ptr::null(); CHUNK]),
        }
    }

    /// Jobs, as many as a chunk holds at most. Those that are refused have their `ok` false, the others true until a tag
    /// is found to be wrong.
    pub(super) fn read(&mut self, run: &mut Run<'_, 'k>, jobs: Range<usize>, blocks_max: usize) {
        let Some(last_end) = run.arena_bytes.checked_sub(ICV_BYTES) else {
            return run.jobs[jobs].iter_mut().for_each(|job| job.ok = false);
        };
        let mut key: *const AeadKey = core::ptr::null();
        let mut schedule = None;
        let mut long_key = 0;
        let places = self
            .packets
            .iter_mut()
            .zip(&mut self.kinds.0)
            .zip(&mut self.keys.0);
        for (job, ((place, kind), place_of_key)) in run.jobs[jobs].iter_mut().zip(places) {
            if !core::ptr::eq(job.key, key) {
                key = job.key;
                schedule = x86::schedule::<LANES>(&job.key.expanded);
                long_key = if job.key.suite == AeadSuite::Aes256Gcm16 {
                    LONG_KEY
                } else {
                    0
                };
            }
            let Range { start, end } = job.payload;
            let (true, true, Some(schedule)) = (end <= last_end, start <= end, schedule) else {
                job.ok = false;
                continue;
            };
            job.ok = true;
            let bytes = end - start;
            let blocks = bytes.div_ceil(16);
            let blocks = if (1..=blocks_max).contains(&blocks) {
                blocks as u8
            } else {
                LONG
            };
            *kind = blocks | long_key;
            *place_of_key = schedule;
            place.write(Short {
                lengths: Lengths([
                    bytes as u64,
                    u64::from(job.aad_bytes).min(job.aad.len() as u64),
                ]),
                // SAFETY: start <= end < arena_bytes.
                payload: unsafe { run.arena.add(start) },
                key: schedule,
                // Not from the field alone: the AAD is read too.
                nonce: (&raw const *job)
                    .cast::<u8>()
                    .wrapping_add(offset_of!(Job<'_>, nonce)),
            });
        }
    }

    /// One that has a kind.
    pub(super) fn packet(&self, i: usize) -> &Short<'k> {
        debug_assert_ne!(self.kinds.0[i], 0);
        // SAFETY: of what has a kind, the packet is written; sets are made of such alone.
        unsafe { self.packets[i & (CHUNK - 1)].assume_init_ref() }
    }

    /// Takes the first four out of a set of one kind, or what there is.
    #[inline(always)]
    pub(super) fn four(&self, of: &mut u64, sums: *const __m128i) -> Four<'_, 'k> {
        let mut last = 0;
        let mut next = || {
            if *of != 0 {
                last = of.trailing_zeros() as usize;
                *of &= *of - 1;
            }
            last
        };
        let four = [next(), next(), next(), next()];
        Four {
            packets: four.map(|i| self.packet(i)),
            jobs: four.map(|i| self.start + i),
            sums,
        }
    }
}
