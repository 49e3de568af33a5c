//! Four packets abreast: each lane of a vector holds a block of another packet, of equal block count, and one reduction
//! ends all four. The cheapest way for short packets; they are picked out of a run, wherever they stand in it.

use super::{super::*, parts, *};
use crate::aead::x86::{
    key::POWERS,
    packet::{finish, icv},
};

/// The largest packets, in blocks, that go abreast: AAD and lengths need a power each.
const BLOCKS_MAX: usize = POWERS - 2;
const _: () = assert!(BLOCKS_MAX + 2 <= COUNTERS_BLOCKS);
/// Streams of a pass: what registers hold.
const PASS: usize = 8;

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

/// Packets of equal block count that wait for their fourth, by their numbers in the run.
struct Waiting {
    numbers: [[u32; 4]; BLOCKS_MAX + 1],
    counts: [u8; BLOCKS_MAX + 1],
    /// Bit b: somebody waits with b blocks.
    any: u32,
}

with_features! {
    /// Seals or opens all jobs of the run: four abreast where four are alike, the others as a pipeline of parts.
    pub(in crate::aead::x86) fn all<const SEAL: bool>(mut run: Run<'_, '_>) {
        let Some(first) = (0..run.jobs.len()).find_map(|index| run.packet::<LANES>(index)) else {
            return run.jobs.iter_mut().for_each(|job| job.ok = false);
        };
        let mut waiting = Waiting { numbers: [[0; 4]; BLOCKS_MAX + 1], counts: [0; BLOCKS_MAX + 1], any: 0 };
        let mut behind = parts::Behind::new(first);
        let mut index = 0;
        while index < run.jobs.len() {
            match run.packet::<LANES>(index) {
                None => run.jobs[index].ok = false,
                Some(packet) if (1..=BLOCKS_MAX).contains(&packet.blocks()) => {
                    let next = index as u32;
                    if next_alike(&run, index, &packet) {
                        four_jobs::<SEAL>(&mut run, &mut behind, &[next, next + 1, next + 2, next + 3]);
                        index += 3;
                    } else if let Some(four) = waiting.add(packet.blocks(), index) {
                        four_jobs::<SEAL>(&mut run, &mut behind, four);
                    }
                }
                Some(packet) => parts::packet::<SEAL>(&mut run, &mut behind, index, &packet),
            }
            index += 1;
        }
        while waiting.any != 0 {
            let blocks = waiting.any.trailing_zeros() as usize;
            waiting.any &= waiting.any - 1;
            for number in &waiting.numbers[blocks][..usize::from(waiting.counts[blocks] & 3)] {
                alone::<SEAL>(&mut run, &mut behind, *number as usize);
            }
        }
        parts::end_run::<SEAL>(&mut run, &mut behind);
    }

    /// Whether the next three have as many blocks: mostly they have, or the very next has not.
    fn next_alike(run: &Run<'_, '_>, index: usize, packet: &Packet<'_>) -> bool {
        let Some(next) = run.jobs.get(index + 1..index + 4) else { return false };
        let alike = |i: usize| {
            let job: &Job<'_> = &next[i];
            job.payload.end.wrapping_sub(job.payload.start).wrapping_add(15) / 16 == packet.blocks()
        };
        alike(0) && alike(1) && alike(2)
    }

    fn alone<'k, const SEAL: bool>(run: &mut Run<'_, 'k>, behind: &mut parts::Behind, index: usize) {
        match run.packet::<LANES>(index) {
            Some(packet) => parts::packet::<SEAL>(run, behind, index, &packet),
            None => run.jobs[index].ok = false,
        }
    }

    /// Four packets of equal block count.
    fn four_jobs<'k, const SEAL: bool>(run: &mut Run<'_, 'k>, behind: &mut parts::Behind, numbers: &[u32; 4]) {
        // One by one: what was written as words and is read as a vector at once would have to wait for the cache.
        let at = |i: usize| numbers[i] as usize;
        let (a, b) = (run.packet::<LANES>(at(0)), run.packet::<LANES>(at(1)));
        let (c, d) = (run.packet::<LANES>(at(2)), run.packet::<LANES>(at(3)));
        let (Some(a), Some(b), Some(c), Some(d)) = (a, b, c, d) else {
            for number in numbers {
                alone::<SEAL>(run, behind, *number as usize);
            }
            return;
        };
        let four = [a, b, c, d];
        let same_key = each!(p of &four => core::ptr::eq(p.key, a.key)) == [true; 4];
        let same_rounds = each!(p of &four => p.key.rounds == a.key.rounds) == [true; 4];
        let ok = match (same_key, a.key.rounds) {
            (true, 10) => any_blocks::<10, true, SEAL>(&four),
            (true, _) => any_blocks::<14, true, SEAL>(&four),
            (_, 10) if same_rounds => any_blocks::<10, false, SEAL>(&four),
            (_, 14) if same_rounds => any_blocks::<14, false, SEAL>(&four),
            _ => {
                for number in numbers {
                    alone::<SEAL>(run, behind, *number as usize);
                }
                return;
            }
        };
        for (i, ok) in ok.into_iter().enumerate() {
            run.jobs[at(i)].ok = ok;
        }
    }

    fn any_blocks<const R: usize, const SAME_KEY: bool, const SEAL: bool>(packets: &[Packet<'_>; 4]) -> [bool; 4] {
        if packets[0].blocks() < PASS {
            few_blocks::<R, SAME_KEY, SEAL>(packets)
        } else {
            many_blocks::<R, SAME_KEY, SEAL>(packets)
        }
    }

    /// J0 and all blocks in one pass.
    fn few_blocks<const R: usize, const SAME_KEY: bool, const SEAL: bool>(packets: &[Packet<'_>; 4]) -> [bool; 4] {
        let mut four = Four::begin::<SAME_KEY>(packets);
        match packets[0].blocks() {
            1 => pass::<R, 2, SAME_KEY, SEAL, true, true>(&mut four, 0),
            2 => pass::<R, 3, SAME_KEY, SEAL, true, true>(&mut four, 0),
            3 => pass::<R, 4, SAME_KEY, SEAL, true, true>(&mut four, 0),
            4 => pass::<R, 5, SAME_KEY, SEAL, true, true>(&mut four, 0),
            5 => pass::<R, 6, SAME_KEY, SEAL, true, true>(&mut four, 0),
            6 => pass::<R, 7, SAME_KEY, SEAL, true, true>(&mut four, 0),
            _ => pass::<R, 8, SAME_KEY, SEAL, true, true>(&mut four, 0),
        }
        four.end::<SAME_KEY, SEAL>()
    }

    /// Several passes.
    fn many_blocks<const R: usize, const SAME_KEY: bool, const SEAL: bool>(packets: &[Packet<'_>; 4]) -> [bool; 4] {
        let mut four = Four::begin::<SAME_KEY>(packets);
        pass::<R, PASS, SAME_KEY, SEAL, true, false>(&mut four, 0);
        let mut at = PASS - 1;
        while packets[0].blocks() - at > PASS {
            pass::<R, PASS, SAME_KEY, SEAL, false, false>(&mut four, at);
            at += PASS;
        }
        match packets[0].blocks() - at {
            1 => pass::<R, 1, SAME_KEY, SEAL, false, true>(&mut four, at),
            2 => pass::<R, 2, SAME_KEY, SEAL, false, true>(&mut four, at),
            3 => pass::<R, 3, SAME_KEY, SEAL, false, true>(&mut four, at),
            4 => pass::<R, 4, SAME_KEY, SEAL, false, true>(&mut four, at),
            5 => pass::<R, 5, SAME_KEY, SEAL, false, true>(&mut four, at),
            6 => pass::<R, 6, SAME_KEY, SEAL, false, true>(&mut four, at),
            7 => pass::<R, 7, SAME_KEY, SEAL, false, true>(&mut four, at),
            _ => pass::<R, 8, SAME_KEY, SEAL, false, true>(&mut four, at),
        }
        four.end::<SAME_KEY, SEAL>()
    }
}

impl Waiting {
    /// One more with so many blocks: gives the four as soon as there are four.
    #[inline(always)]
    fn add(&mut self, blocks: usize, index: usize) -> Option<&[u32; 4]> {
        let count = self.counts[blocks];
        self.numbers[blocks][usize::from(count & 3)] = index as u32;
        self.counts[blocks] = (count + 1) & 3;
        if count == 3 {
            self.any &= !(1 << blocks);
            return Some(&self.numbers[blocks]);
        }
        self.any |= 1 << blocks;
        None
    }
}

/// Four packets on their way.
struct Four<'r, 'k> {
    packets: &'r [Packet<'k>; 4],
    blocks: usize,
    nonces: Vector,
    tag_masks: Vector,
    sum: parts::Products,
}

impl<'r, 'k> Four<'r, 'k> {
    #[target_feature(
        enable = "avx512f,avx512bw,avx512dq,avx512vl,vaes,vpclmulqdq,aes,pclmulqdq,bmi2"
    )]
    #[inline]
    fn begin<const SAME_KEY: bool>(packets: &'r [Packet<'k>; 4]) -> Self {
        // SAFETY: 16 bytes are readable at nonce and AAD.
        let (nonces, aads) = unsafe {
            (
                gathered(each!(p of packets => p.nonce)),
                gathered(each!(p of packets => p.aad)),
            )
        };
        let blocks = packets[0].blocks();
        let mut four = Self {
            packets,
            blocks,
            nonces: add(
                _mm512_maskz_mov_epi32(0x7777, nonces),
                round_key::<SAME_KEY>(packets, 0),
            ),
            tag_masks: zero(),
            sum: parts::no_products(),
        };
        parts::multiply_add(
            &mut four.sum,
            reversed(aads),
            power::<SAME_KEY>(packets, blocks + 2),
        );
        four
    }

    /// Hashes the lengths, reduces, and ends each packet.
    #[target_feature(
        enable = "avx512f,avx512bw,avx512dq,avx512vl,vaes,vpclmulqdq,aes,pclmulqdq,bmi2"
    )]
    #[inline]
    fn end<const SAME_KEY: bool, const SEAL: bool>(mut self) -> [bool; 4] {
        let packets = self.packets;
        let bytes =
            lanes_of(each!(p of packets => _mm_set_epi64x(p.aad_bytes as i64, p.bytes as i64)));
        let lengths = _mm512_slli_epi64::<3>(bytes);
        parts::multiply_add(&mut self.sum, lengths, power::<SAME_KEY>(packets, 1));
        let tags = add(reversed(reduce(self.sum)), self.tag_masks);
        if SEAL {
            // SAFETY: 16 bytes of ICV lie behind each payload.
            unsafe { scatter(each!(p of packets => icv(p.payload, p.bytes)), tags) };
            return [true; 4];
        }
        // SAFETY: as above.
        let received =
            unsafe { gathered(each!(p of packets => icv(p.payload, p.bytes).cast_const())) };
        if _mm512_cmpneq_epi64_mask(received, tags) == 0 {
            return [true; 4];
        }
        let tags = [
            lane::<0>(tags),
            lane::<1>(tags),
            lane::<2>(tags),
            lane::<3>(tags),
        ];
        let mut ok = [false; 4];
        for (i, tag) in tags.into_iter().enumerate() {
            ok[i] = finish::<false>(packets[i].payload, packets[i].bytes, tag);
        }
        ok
    }
}

with_features! {
    /// N streams through AES, and the blocks that they encrypt: from `at` on. With HEAD the first stream is J0; with
    /// LAST the last block may be less than whole.
    fn pass<const R: usize, const N: usize, const SAME_KEY: bool, const SEAL: bool, const HEAD: bool, const LAST: bool>(
        four: &mut Four<'_, '_>, at: usize,
    ) {
        let packets = four.packets;
        let counter = at + if HEAD { 1 } else { 2 };
        let mut stream = [zero(); N];
        for (i, s) in stream.iter_mut().enumerate() {
            *s = add(four.nonces, all_lanes_of(&COUNTERS.0[counter + i]));
        }
        each_round!(round of R {
            let key = round_key::<SAME_KEY>(packets, round);
            for s in &mut stream {
                *s = _mm512_aesenc_epi128(*s, key);
            }
        });
        let key = round_key::<SAME_KEY>(packets, R);
        for s in &mut stream {
            *s = _mm512_aesenclast_epi128(*s, key);
        }
        let places = each!(p of packets => p.payload.wrapping_add(16 * at));
        for (i, stream) in stream.into_iter().enumerate() {
            if HEAD && i == 0 {
                four.tag_masks = stream;
                continue;
            }
            let j = i - usize::from(HEAD);
            let places = each!(place of places => place.wrapping_add(16 * j));
            let block = if LAST && i + 1 == N {
                last_blocks::<SEAL>(places, each!(p of packets => p.bytes - 16 * (at + j)), stream)
            } else {
                whole_blocks::<SEAL>(places, stream)
            };
            parts::multiply_add(&mut four.sum, reversed(block), power::<SAME_KEY>(packets, four.blocks + 1 - at - j));
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

    fn round_key<const SAME_KEY: bool>(packets: &[Packet<'_>; 4], round: usize) -> Vector {
        if SAME_KEY {
            all_lanes(packets[0].key.round_keys[round])
        } else {
            lanes_of(each!(p of packets => p.key.round_keys[round]))
        }
    }

    /// Power e of H in every lane.
    fn power<const SAME_KEY: bool>(packets: &[Packet<'_>; 4], e: usize) -> Vector {
        if SAME_KEY {
            all_lanes(packets[0].key.powers[POWERS - e])
        } else {
            lanes_of(each!(p of packets => p.key.powers[POWERS - e]))
        }
    }

    /// Reduces each lane for itself.
    fn reduce(sum: parts::Products) -> Vector {
        let fold = |x| {
            let multiple = _mm512_clmulepi64_epi128::<0x00>(x, _mm512_set1_epi64(super::super::field::P));
            add(halves_swapped(x), multiple)
        };
        let middle = add(sum.cross, add(sum.low, sum.high));
        add(sum.high, fold(add(middle, fold(sum.low))))
    }
}
