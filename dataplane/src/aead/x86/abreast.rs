//! Four packets abreast: each lane of a vector holds a block of another packet, of equal block count, and one reduction
//! ends all four. The cheapest way for short packets; they are picked out of a run, wherever they stand in it.
//!
//! ```text
//!   lane    0           1           2           3
//!           J0 of a     J0 of b     J0 of c     J0 of d        stream 1   hashed beside it: the AAD
//!           a's 1st     b's 1st     c's 1st     d's 1st        stream 2
//!           …                                                  …
//!           a's nth     b's nth     c's nth     d's nth        stream n + 1
//! ```
//!
//! Up to ten streams are a pass, and packets of more are two. Alone, a pass would wait most of the time: ten rounds of AES,
//! a multiplication and its reduction one after the other are a hundred cycles, and the instructions of a pass are about
//! all that the core looks ahead. So AES works on one pass while the multiplier hashes the pass before, instruction by
//! instruction, as in `parts.rs`.
//!
//! ```text
//!            packets a b c d       e f g h               i k l m
//!   AES      1 to n + 1            1 to n + 1            1 to n + 1
//!   GHASH                          AAD to lengths, tags  AAD to lengths, tags  AAD to lengths, tags
//! ```
//!
//! All is written out per number of blocks: no branch within a four but on its key's length and on whether last blocks
//! are whole.

use super::{
    super::*,
    chunk::{Chunk, Four, LONG, LONG_KEY, sorted},
    parts, *,
};
use crate::aead::x86::{
    key::POWERS,
    packet::{finish, header, icv, iv_shuffle},
};

/// The largest packets, in blocks, that go abreast.
const BLOCKS_MAX: usize = 17;
/// Runs of fewer are not worth being sorted.
const JOBS_MIN: usize = 4;
/// The same, if their keys differ: there, every round key and power is put together from four.
const BLOCKS_MAX_MIXED: usize = 9;
const _: () = assert!(BLOCKS_MAX + 2 <= COUNTERS_BLOCKS);

/// The same of each of four. Written out: `array::map` is compiled without this width's features, and what it calls would
/// not be inlined.
macro_rules! each {
    ($one:ident of $four:expr => $value:expr) => {{
        let [a, b, c, d] = $four;
        [
            {
                let $one = a;
                $value
            },
            {
                let $one = b;
                $value
            },
            {
                let $one = c;
                $value
            },
            {
                let $one = d;
                $value
            },
        ]
    }};
}

/// All rounds of AES but the last.
macro_rules! encrypt {
    ($same_key:ident, $four:expr, $rounds:expr, $streams:expr) => {{
        let rounds = $rounds;
        each_round!(round of rounds {
            let key = round_key::<$same_key>(&$four, round);
            for s in &mut $streams {
                *s = _mm512_aesenc_epi128(*s, key);
            }
        });
    }};
}

/// The same, and beside it GHASH: adds to a sum the products of so many blocks behind (or the lengths, which follow them)
/// with the powers of H from one on downwards. A macro, as is the one above, since a function would not be inlined.
macro_rules! encrypt_and_hash {
    ($same_key:ident, $four:expr, $rounds:expr, $streams:expr, $behind:expr, $count:expr, $power:expr, $sum:expr) => {{
        let rounds = $rounds;
        each_round!(round of rounds {
            let key = round_key::<$same_key>(&$four, round);
            for s in &mut $streams {
                *s = in_order(_mm512_aesenc_epi128(*s, key));
            }
            let i = 2 * (round - 1);
            if i + 1 < $count {
                two_products::<_, $same_key>(&$behind, i, $power - i, &mut $sum);
            } else if i + 1 == $count {
                product::<_, $same_key>(&$behind, i, $power - i, &mut $sum);
            }
        });
    }};
}

with_features! {
    /// Seals or opens all jobs of the run: four abreast where some are alike, the others as a pipeline of parts.
    pub(in crate::aead::x86) fn all<const SEAL: bool>(run: &mut Run<'_, '_>) {
        if run.at.len() < JOBS_MIN {
            return parts::all::<SEAL>(run);
        }
        let Some(chunk) = sorted(run, BLOCKS_MAX) else { return };
        run.done |= chunk.valid;
        let mut kinds = [0; 64];
        // SAFETY: 64 bytes.
        unsafe { store(kinds.as_mut_ptr(), chunk.kinds) };
        let (mut left, mut one_by_one) = (chunk.valid, 0);
        while left != 0 {
            let kind = kinds[left.trailing_zeros() as usize];
            let alike = left & _mm512_cmpeq_epi8_mask(chunk.kinds, _mm512_set1_epi8(kind as i8));
            left &= !alike;
            let rounds = if kind & LONG_KEY != 0 { 14 } else { 10 };
            one_by_one |= if kind & LONG != 0 { alike } else {
                abreast::<SEAL>(run, &chunk, alike, usize::from(kind & !LONG_KEY), rounds)
            };
        }
        if one_by_one == 0 {
            return;
        }
        let mut behind = parts::Behind::new(chunk.key(0));
        while one_by_one != 0 {
            let job = one_by_one.trailing_zeros() as usize;
            one_by_one &= one_by_one - 1;
            parts::one_job::<SEAL>(run, &mut behind, chunk.key(job), job);
        }
        parts::end_run::<SEAL>(run, &mut behind);
    }

    /// Takes packets of one kind, one bit each: four of one key as long as there are, then four of any. Gives what
    /// remains: one at most.
    fn abreast<'k, const SEAL: bool>(
        run: &mut Run<'_, 'k>, chunk: &Chunk<'k>, mut alike: u64, blocks: usize, rounds: usize,
    ) -> u64 {
        loop {
            let mut same_key = chunk.same_key(alike);
            let rest = same_key.count_ones() % 4;
            if same_key.count_ones() < 4 {
                break;
            }
            // What does not make four stays for later.
            let mut over = 0;
            for _ in 0..rest {
                over |= same_key & same_key.wrapping_neg();
                same_key &= same_key - 1;
            }
            alike = alike & !same_key | over;
            of_kind::<true, SEAL>(run, chunk, same_key, blocks, rounds);
        }
        if blocks > BLOCKS_MAX_MIXED {
            return alike;
        }
        let rest = u64::from(alike.count_ones() % 4 == 1) * (alike & alike.wrapping_neg());
        if alike != rest {
            of_kind::<false, SEAL>(run, chunk, alike ^ rest, blocks, rounds);
        }
        rest
    }

    fn of_kind<'k, const SAME_KEY: bool, const SEAL: bool>(
        run: &mut Run<'_, 'k>, chunk: &Chunk<'k>, set: u64, blocks: usize, rounds: usize,
    ) {
        match blocks {
            1 => one_pass::<2, SAME_KEY, SEAL>(run, chunk, set, rounds),
            2 => one_pass::<3, SAME_KEY, SEAL>(run, chunk, set, rounds),
            3 => one_pass::<4, SAME_KEY, SEAL>(run, chunk, set, rounds),
            4 => one_pass::<5, SAME_KEY, SEAL>(run, chunk, set, rounds),
            5 => one_pass::<6, SAME_KEY, SEAL>(run, chunk, set, rounds),
            6 => one_pass::<7, SAME_KEY, SEAL>(run, chunk, set, rounds),
            7 => one_pass::<8, SAME_KEY, SEAL>(run, chunk, set, rounds),
            8 => one_pass::<9, SAME_KEY, SEAL>(run, chunk, set, rounds),
            9 => one_pass::<10, SAME_KEY, SEAL>(run, chunk, set, rounds),
            10 => two_passes::<6, 5, SEAL>(run, chunk, set, rounds),
            11 => two_passes::<6, 6, SEAL>(run, chunk, set, rounds),
            12 => two_passes::<7, 6, SEAL>(run, chunk, set, rounds),
            13 => two_passes::<7, 7, SEAL>(run, chunk, set, rounds),
            14 => two_passes::<8, 7, SEAL>(run, chunk, set, rounds),
            15 => two_passes::<8, 8, SEAL>(run, chunk, set, rounds),
            16 => two_passes::<9, 8, SEAL>(run, chunk, set, rounds),
            _ => two_passes::<9, 9, SEAL>(run, chunk, set, rounds),
        }
    }
}

/// What is encrypted or read, and still to be hashed: of four packets, what N streams of theirs have encrypted.
#[derive(Clone, Copy)]
struct Behind<'k, 'r, const N: usize> {
    four: Four<'k, 'r>,
    /// Byte-reversed. Where the first stream is J0, the AAD is first.
    blocks: [Vector; N],
    tag_masks: Vector,
}

with_features! {
    /// Packets that are one pass of N streams.
    fn one_pass<'k, const N: usize, const SAME_KEY: bool, const SEAL: bool>(
        run: &mut Run<'_, 'k>, chunk: &Chunk<'k>, mut set: u64, rounds: usize,
    ) {
        let four = chunk.four(run, &mut { set });
        let mut behind = Behind { four, blocks: [zero(); N], tag_masks: zero() };
        let mut begins = true;
        while set != 0 {
            let four = chunk.four(run, &mut set);
            let mut streams = begun::<N, SAME_KEY>(&four, 1);
            if begins {
                begins = false;
                encrypt!(SAME_KEY, four, rounds, streams);
            } else {
                let mut sum = parts::no_products();
                encrypt_and_hash!(SAME_KEY, four, rounds, streams, behind, N + 1, N + 1, sum);
                end::<SEAL>(run, &behind.four, sum, behind.tag_masks);
            }
            behind = crypted::<N, 0, SAME_KEY, SEAL>(&four, rounds, streams, 1, N - 1);
        }
        let mut sum = parts::no_products();
        hash::<N, SAME_KEY>(&behind, N + 1, &mut sum);
        end::<SEAL>(run, &behind.four, sum, behind.tag_masks);
    }

    /// Packets that are one pass of A streams, and one of B.
    fn two_passes<'k, const A: usize, const B: usize, const SEAL: bool>(
        run: &mut Run<'_, 'k>, chunk: &Chunk<'k>, mut set: u64, rounds: usize,
    ) {
        const SAME_KEY: bool = true;
        let blocks = A + B - 1;
        let four = chunk.four(run, &mut { set });
        let mut second = Behind { four, blocks: [zero(); B], tag_masks: zero() };
        let mut sum = parts::no_products();
        let mut begins = true;
        while set != 0 {
            let four = chunk.four(run, &mut set);
            let mut streams = begun::<A, true>(&four, 1);
            if begins {
                begins = false;
                encrypt!(SAME_KEY, four, rounds, streams);
            } else {
                encrypt_and_hash!(SAME_KEY, four, rounds, streams, second, B + 1, B + 1, sum);
                end::<SEAL>(run, &second.four, sum, second.tag_masks);
            }
            let first = crypted::<A, 1, true, SEAL>(&four, rounds, streams, 1, blocks);
            let mut streams = begun::<B, true>(&four, 1 + A);
            sum = parts::no_products();
            encrypt_and_hash!(SAME_KEY, four, rounds, streams, first, A, blocks + 2, sum);
            second = crypted::<B, 2, true, SEAL>(&four, rounds, streams, 1 + A, blocks);
            second.tag_masks = first.tag_masks;
        }
        hash::<B, true>(&second, B + 1, &mut sum);
        end::<SEAL>(run, &second.four, sum, second.tag_masks);
    }

    /// N streams from number `first` on, before the first round.
    fn begun<const N: usize, const SAME_KEY: bool>(four: &Four<'_, '_>, first: usize) -> [Vector; N] {
        let nonces = _mm512_shuffle_epi8(headers(four), all_lanes(iv_shuffle()));
        let nonces = add(nonces, round_key::<SAME_KEY>(four, 0));
        let mut streams = [zero(); N];
        for (i, s) in streams.iter_mut().enumerate() {
            *s = add(nonces, all_lanes_of(&COUNTERS.0[first + i]));
        }
        streams
    }

    /// GHASH of all blocks of what is behind, and of the lengths.
    fn hash<const N: usize, const SAME_KEY: bool>(behind: &Behind<'_, '_, N>, power: usize, sum: &mut parts::Products) {
        for i in 0..=N {
            product::<N, SAME_KEY>(behind, i, power - i, sum);
        }
    }

    /// Ends AES with streams from number `first` on, and crypts what payload they are for. PASS tells the callers apart:
    /// what is called in one place only is inlined.
    fn crypted<'k, 'r, const N: usize, const PASS: u8, const SAME_KEY: bool, const SEAL: bool>(
        four: &Four<'k, 'r>, rounds: usize, mut streams: [Vector; N], first: usize, blocks: usize,
    ) -> Behind<'k, 'r, N> {
        let key = round_key::<SAME_KEY>(four, rounds);
        for s in &mut streams {
            *s = _mm512_aesenclast_epi128(*s, key);
        }
        let mut behind = Behind { four: *four, blocks: [zero(); N], tag_masks: streams[0] };
        for (i, stream) in streams.into_iter().enumerate() {
            behind.blocks[i] = if first + i == 1 {
                aads(four)
            } else {
                block::<SEAL>(four, first + i - 2, blocks, stream)
            };
        }
        behind
    }

    /// Block i of what is behind; the lengths are after the last.
    fn hashed<const N: usize>(behind: &Behind<'_, '_, N>, i: usize) -> Vector {
        if i == N { lengths(&behind.four) } else { behind.blocks[i] }
    }

    /// Adds the product of block i with a power of H.
    fn product<const N: usize, const SAME_KEY: bool>(
        behind: &Behind<'_, '_, N>, i: usize, power: usize, sum: &mut parts::Products,
    ) {
        let (x, (power, halves)) = (hashed(behind, i), powers::<SAME_KEY>(&behind.four, power));
        sum.low = add(sum.low, multiply::<0x00>(x, power));
        sum.cross = add(sum.cross, multiply::<0x00>(parts::halves_added(x), halves));
        sum.high = add(sum.high, multiply::<0x11>(x, power));
    }

    /// The same of block i and the next, with the next power. All six multiplications in a row: on Zen 5 each takes a cycle
    /// of its own on the way into the core, and what was to go in together with others must wait.
    fn two_products<const N: usize, const SAME_KEY: bool>(
        behind: &Behind<'_, '_, N>, i: usize, power: usize, sum: &mut parts::Products,
    ) {
        let (mut x0, mut x1) = (hashed(behind, i), hashed(behind, i + 1));
        let (mut h0, mut h1) = (parts::halves_added(x0), parts::halves_added(x1));
        let (p0, s0) = powers::<SAME_KEY>(&behind.four, power);
        let (p1, s1) = powers::<SAME_KEY>(&behind.four, power - 1);
        let (low0, low1): (Vector, Vector);
        // SAFETY: arithmetic of registers. It is not pure, so that the compiler leaves it where it stands.
        unsafe {
            asm!(
                "vpclmulqdq {low0}, {x0}, {p0}, 0x00",
                "vpclmulqdq {low1}, {x1}, {p1}, 0x00",
                "vpclmulqdq {h0}, {h0}, {s0}, 0x00",
                "vpclmulqdq {h1}, {h1}, {s1}, 0x00",
                "vpclmulqdq {x0}, {x0}, {p0}, 0x11",
                "vpclmulqdq {x1}, {x1}, {p1}, 0x11",
                low0 = out(zmm_reg) low0, low1 = out(zmm_reg) low1,
                x0 = inout(zmm_reg) x0, x1 = inout(zmm_reg) x1,
                h0 = inout(zmm_reg) h0, h1 = inout(zmm_reg) h1,
                p0 = in(zmm_reg) p0, p1 = in(zmm_reg) p1,
                s0 = in(zmm_reg) s0, s1 = in(zmm_reg) s1,
                options(nomem, nostack, preserves_flags),
            );
        }
        sum.low = add(sum.low, add(low0, low1));
        sum.cross = add(sum.cross, add(h0, h1));
        sum.high = add(sum.high, add(x0, x1));
    }

    /// Crypts block `number` of so many in each packet; gives what is to be hashed.
    fn block<const SEAL: bool>(four: &Four<'_, '_>, number: usize, blocks: usize, stream: Vector) -> Vector {
        let places = each!(payload of four.payloads => payload.wrapping_add(16 * number));
        reversed(if number + 1 == blocks {
            last_blocks::<SEAL>(places, each!(job of four.jobs => job.bytes as usize - 16 * number), stream)
        } else {
            whole_blocks::<SEAL>(places, stream)
        })
    }

    /// SPI, number and IV of each.
    fn headers(four: &Four<'_, '_>) -> Vector {
        // SAFETY: 16 bytes of header lie before each payload.
        unsafe { gathered(each!(payload of four.payloads => header(payload))) }
    }

    fn jobs(four: &Four<'_, '_>) -> Vector {
        // SAFETY: 16 bytes each.
        unsafe { gathered(each!(job of four.jobs => (&raw const *job).cast())) }
    }

    /// AADs as GHASH wants them: SPI and number of the header, what else there is from the job.
    fn aads(four: &Four<'_, '_>) -> Vector {
        let shuffle = match four.form {
            Some(form) => all_lanes(form.aad),
            None => lanes_of(each!(key of four.keys => key.form.aad)),
        };
        _mm512_shuffle_epi8(_mm512_mask_mov_epi32(jobs(four), 0x3333, headers(four)), shuffle)
    }

    /// Those of AAD and payload in bits.
    fn lengths(four: &Four<'_, '_>) -> Vector {
        let of_aads = match four.form {
            Some(form) => all_lanes(form.lengths),
            None => lanes_of(each!(key of four.keys => key.form.lengths)),
        };
        let bytes = _mm512_maskz_srli_epi64::<32>(0x55, jobs(four));
        _mm512_or_si512(_mm512_slli_epi64::<3>(bytes), of_aads)
    }

    /// Reduces the sum of all products, and ends each packet.
    fn end<const SEAL: bool>(run: &mut Run<'_, '_>, four: &Four<'_, '_>, sum: parts::Products, tag_masks: Vector) {
        let tags = add(reversed(reduce(sum)), tag_masks);
        let [a, b, c, d] = four.payloads;
        let [i, j, k, l] = each!(job of four.jobs => job.bytes as usize);
        let icvs = [icv(a, i), icv(b, j), icv(c, k), icv(d, l)];
        if SEAL {
            // SAFETY: 16 bytes of ICV lie there.
            unsafe { scatter(icvs, tags) };
        } else {
            // SAFETY: as above.
            let received = unsafe { gathered(each!(icv of icvs => icv.cast_const())) };
            if _mm512_cmpneq_epi64_mask(received, tags) != 0 {
                finish_each(run, four, tags);
            }
        }
    }

    #[cold]
    fn finish_each(run: &mut Run<'_, '_>, four: &Four<'_, '_>, tags: Vector) {
        let tags = [lane::<0>(tags), lane::<1>(tags), lane::<2>(tags), lane::<3>(tags)];
        for (i, tag) in tags.into_iter().enumerate() {
            let job = four.jobs[i];
            if !finish::<false>(four.payloads[i], job.bytes as usize, tag) {
                run.refuse(job);
            }
        }
    }

    /// One whole block at each place; gives the ciphertext. All packets have equally many blocks, and all
    /// but the last are whole.
    fn whole_blocks<const SEAL: bool>(places: [*mut u8; 4], stream: Vector) -> Vector {
        // SAFETY: 16 bytes of payload lie at each place.
        unsafe {
            let input = gathered(each!(place of places => place.cast_const()));
            let output = add(input, stream);
            scatter(places, output);
            if SEAL { output } else { input }
        }
    }

    /// The last block, of 1 to 16 `bytes`, at each place: only they are written, and the rest hashes as zeros.
    fn last_blocks<const SEAL: bool>(places: [*mut u8; 4], bytes: [usize; 4], stream: Vector) -> Vector {
        if bytes[0] | bytes[1] | bytes[2] | bytes[3] == 16 {
            return whole_blocks::<SEAL>(places, stream);
        }
        let masks = each!(bytes of bytes => _bzhi_u32(0xffff, bytes as u32) as u16);
        let [a, b, c, d] = masks.map(u64::from);
        let mask = a | b << 16 | c << 32 | d << 48;
        // SAFETY: a byte of payload and 16 of ICV lie at each place, so a whole block can be read; writes are masked to
        // the payload.
        unsafe {
            let input = gathered(each!(place of places => place.cast_const()));
            let output = add(input, stream);
            let lanes = [lane::<0>(output), lane::<1>(output), lane::<2>(output), lane::<3>(output)];
            _mm_mask_storeu_epi8(places[0].cast(), masks[0], lanes[0]);
            _mm_mask_storeu_epi8(places[1].cast(), masks[1], lanes[1]);
            _mm_mask_storeu_epi8(places[2].cast(), masks[2], lanes[2]);
            _mm_mask_storeu_epi8(places[3].cast(), masks[3], lanes[3]);
            _mm512_maskz_mov_epi8(mask, if SEAL { output } else { input })
        }
    }

    /// # Safety
    /// 16 bytes are readable at each place.
    unsafe fn gathered(places: [*const u8; 4]) -> Vector {
        // SAFETY: the caller's.
        lanes_of(each!(place of places => unsafe { _mm_loadu_si128(place.cast()) }))
    }

    /// # Safety
    /// 16 bytes are writable at each place.
    unsafe fn scatter(places: [*mut u8; 4], x: Vector) {
        // SAFETY: the caller's.
        unsafe {
            _mm_storeu_si128(places[0].cast(), lane::<0>(x));
            _mm_storeu_si128(places[1].cast(), lane::<1>(x));
            _mm_storeu_si128(places[2].cast(), lane::<2>(x));
            _mm_storeu_si128(places[3].cast(), lane::<3>(x));
        }
    }

    fn lanes_of(lanes: [__m128i; 4]) -> Vector {
        let x = _mm512_castsi128_si512(lanes[0]);
        let x = _mm512_inserti32x4::<1>(x, lanes[1]);
        let x = _mm512_inserti32x4::<2>(x, lanes[2]);
        _mm512_inserti32x4::<3>(x, lanes[3])
    }

    fn all_lanes_of(block: &[u8; 16]) -> Vector {
        // SAFETY: 16 bytes.
        all_lanes(unsafe { _mm_loadu_si128(block.as_ptr().cast()) })
    }

    fn round_key<const SAME_KEY: bool>(four: &Four<'_, '_>, round: usize) -> Vector {
        if SAME_KEY {
            all_lanes(four.keys[0].round_keys[round])
        } else {
            lanes_of(each!(key of four.keys => key.round_keys[round]))
        }
    }

    /// Power e of H in every lane, and its halves added.
    fn powers<const SAME_KEY: bool>(four: &Four<'_, '_>, e: usize) -> (Vector, Vector) {
        if SAME_KEY {
            let key = four.keys[0];
            (all_lanes(key.powers[POWERS - e]), all_lanes(key.sums[POWERS - e]))
        } else {
            let powers = lanes_of(each!(key of four.keys => key.powers[POWERS - e]));
            (powers, parts::halves_added(powers))
        }
    }

    /// Reduces each lane for itself.
    fn reduce(sum: parts::Products) -> Vector {
        let middle = parts::middle(sum);
        let multiple = multiply::<0x00>(middle, parts::p());
        add(sum.high, add(halves_swapped(middle), multiple))
    }
}
