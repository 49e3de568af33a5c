//! What goes abreast: the jobs of a call are looked at together, once, and sorted by what they have in common.

use super::super::*;
use super::*;
use crate::aead::{
    JOBS_MAX, set_of,
    x86::{key::Schedule, packet::Form},
};
use core::ptr;

/// A bit of [`Chunk::kinds`]: does not go abreast.
pub(super) const LONG: u8 = 0x80;
/// Another: AES-256.
pub(super) const LONG_KEY: u8 = 0x40;

/// Which packets may go abreast.
pub(super) struct Chunk<'k> {
    /// A bit each: lies within the arena, and has a key.
    pub(super) valid: u64,
    /// Packets of equal kind have equally many blocks and rounds.
    pub(super) kinds: Vector,
    /// Of those that are valid.
    keys: [&'k Schedule; JOBS_MAX],
    /// Whether there is but one.
    one_key: bool,
    /// If it is that of all keys.
    form: Option<&'static Form>,
}

/// Four packets of equal kind. Where there are fewer, the last stands in several lanes: each step reads all lanes before
/// it writes any, so it is crypted once.
#[derive(Clone, Copy)]
pub(super) struct Four<'k, 'r> {
    pub(super) jobs: [&'r Job; 4],
    /// As in [`Packet`].
    pub(super) payloads: [*mut u8; 4],
    pub(super) keys: [&'k Schedule; 4],
    /// If it is the same for all four.
    pub(super) form: Option<&'static Form>,
}

with_features! {
    /// Looks at all jobs of a run. Those that are refused are not valid.
    pub(super) fn sorted<'k>(run: &Run<'_, 'k>, blocks_max: usize) -> Option<Chunk<'k>> {
        let mut keys = run.keys::<LANES>();
        let (first, jobs) = keys.next()?;
        let mut chunk = Chunk {
            valid: set_of(jobs),
            kinds: zero(),
            keys: [first; JOBS_MAX],
            one_key: true,
            form: Some(first.form),
        };
        let mut long_keys = if first.rounds == 14 { chunk.valid } else { 0 };
        for (key, jobs) in keys {
            let set = set_of(jobs.clone());
            chunk.valid |= set;
            long_keys |= if key.rounds == 14 { set } else { 0 };
            chunk.keys[jobs].fill(key);
            chunk.one_key = false;
            chunk.form = chunk.form.filter(|form| ptr::eq(*form, key.form));
        }
        let sixteen = |i| sixteen_kinds(run, 16 * i, blocks_max);
        let (mut kinds, mut inside) = (zero(), 0);
        for i in 0..run.jobs.len().div_ceil(16) {
            let (these, these_inside) = sixteen(i);
            kinds = with_lane(kinds, i, these);
            inside |= u64::from(these_inside) << (16 * i);
        }
        chunk.valid &= inside;
        chunk.kinds = _mm512_mask_or_epi32(kinds, 0xffff, kinds, _mm512_maskz_set1_epi8(long_keys, LONG_KEY as i8));
        Some(chunk)
    }

    /// Kinds of sixteen jobs, but for their keys, and which of them lie within the arena.
    fn sixteen_kinds(run: &Run<'_, '_>, first: usize, blocks_max: usize) -> (__m128i, u16) {
        const WORDS: usize = size_of::<Job>() / 4;
        const _: () = assert!(WORDS == 4 && core::mem::offset_of!(Job, start) == 0 && core::mem::offset_of!(Job, bytes) == 4);
        let four = |i: usize| {
            let left = run.jobs.len().saturating_sub(first + 4 * i);
            let mask = _bzhi_u32(0xffff, (WORDS * left.min(4)) as u32) as u16;
            // SAFETY: masked to the jobs there are.
            unsafe { _mm512_maskz_loadu_epi32(mask, run.jobs.as_ptr().wrapping_add(first + 4 * i).cast()) }
        };
        // Of eight jobs, where they start and how long they are.
        let order = _mm512_set_epi32(29, 25, 21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
        let a = _mm512_permutex2var_epi32(four(0), order, four(1));
        let b = _mm512_permutex2var_epi32(four(2), order, four(3));
        let (starts, bytes) = (_mm512_shuffle_i64x2::<0x44>(a, b), _mm512_shuffle_i64x2::<0xee>(a, b));
        // The last byte before an ICV that still fits.
        let limit = u32::try_from(run.arena_bytes.saturating_sub(ICV_BYTES)).unwrap_or(u32::MAX);
        let limit = _mm512_set1_epi32(limit as i32);
        let behind_header = _mm512_cmpge_epu32_mask(starts, _mm512_set1_epi32(HEADER_BYTES as i32));
        let short_enough = _mm512_mask_cmple_epu32_mask(behind_header, bytes, limit);
        let inside = _mm512_mask_cmple_epu32_mask(short_enough, starts, _mm512_sub_epi32(limit, bytes));
        let blocks = _mm512_srli_epi32::<4>(_mm512_add_epi32(bytes, _mm512_set1_epi32(15)));
        // None at all is more than any.
        let fewer = _mm512_sub_epi32(blocks, _mm512_set1_epi32(1));
        let short = _mm512_cmplt_epu32_mask(fewer, _mm512_set1_epi32(blocks_max as i32));
        let kinds = _mm512_mask_mov_epi32(_mm512_set1_epi32(i32::from(LONG)), short, blocks);
        (_mm512_cvtepi32_epi8(kinds), inside)
    }
}

impl<'k> Chunk<'k> {
    /// Of one that is valid.
    #[inline(always)]
    pub(super) fn key(&self, job: usize) -> &'k Schedule {
        self.keys[job % JOBS_MAX]
    }

    /// Takes the first four out of a set of valid ones of one kind, or what there is.
    #[inline(always)]
    pub(super) fn four<'r>(&self, run: &Run<'r, 'k>, of: &mut u64) -> Four<'k, 'r> {
        let mut last = 0;
        let mut next = || {
            if *of != 0 {
                last = of.trailing_zeros() as usize;
                *of &= *of - 1;
            }
            last
        };
        let four = [next(), next(), next(), next()];
        // SAFETY: what is valid is one of the jobs.
        let jobs = four.map(|i| unsafe { run.jobs.get_unchecked(i) });
        Four {
            jobs,
            // SAFETY: and lies within the arena.
            payloads: jobs.map(|job| unsafe { run.arena.add(job.start as usize) }),
            keys: four.map(|i| self.key(i)),
            form: self.form,
        }
    }

    /// Whose key is that of the first of `alike`.
    #[inline(always)]
    pub(super) fn same_key(&self, alike: u64) -> u64 {
        if self.one_key {
            return alike;
        }
        let key = self.key(alike.trailing_zeros() as usize);
        let mut same = 0;
        for (i, other) in self.keys.iter().enumerate() {
            same |= u64::from(ptr::eq(*other, key)) << i;
        }
        same & alike
    }
}
