//! Four packets abreast: one block of each in a vector, one reduction for all four.

use super::{
    super::{
        key::POWERS,
        packet::{Packet, aad_block, lengths_block, nonce_block},
    },
    Aligned, FOUR_PACKETS_BLOCKS, counters,
    field::{
        Products, all_lanes, lanes_apart, lanes_of, multiply_add, no_products, one_power, reduce,
        reversed, zero,
    },
    with_features,
};
use core::arch::x86_64::*;

/// Counters of four packets abreast: 1 in each lane of the first vector.
static ABREAST_COUNTERS: Aligned<[[u8; 64]; FOUR_PACKETS_BLOCKS + 1]> = Aligned(counters(false));

with_features! {
    /// Seals or opens four packets of equal block count, one in each lane; gives their tags.
    pub(super) fn four_packets<const R: usize, const SAME_KEY: bool, const SEAL: bool>(packets: &[Packet<'_>; 4]) -> __m512i {
        let blocks = packets[0].blocks();
        let mut work = Abreast {
            packets,
            blocks,
            nonces: lanes_of(packets.each_ref().map(|p| nonce_block(p))),
            tag_mask: zero(),
            sum: no_products(),
        };
        let aads = lanes_of(packets.each_ref().map(|p| aad_block(p)));
        let power = abreast_power::<SAME_KEY>(packets, blocks + 2);
        multiply_add(&mut work.sum, aads, power);

        // Counter 1 masks the tag, the blocks follow; equal passes keep the AES units equally busy.
        let counters = blocks + 1;
        let per_pass = counters.div_ceil(counters.div_ceil(8));
        let mut first = 0;
        while first < counters {
            match per_pass.min(counters - first) {
                1 => abreast_pass::<R, 1, SAME_KEY, SEAL>(&mut work, first),
                2 => abreast_pass::<R, 2, SAME_KEY, SEAL>(&mut work, first),
                3 => abreast_pass::<R, 3, SAME_KEY, SEAL>(&mut work, first),
                4 => abreast_pass::<R, 4, SAME_KEY, SEAL>(&mut work, first),
                5 => abreast_pass::<R, 5, SAME_KEY, SEAL>(&mut work, first),
                6 => abreast_pass::<R, 6, SAME_KEY, SEAL>(&mut work, first),
                7 => abreast_pass::<R, 7, SAME_KEY, SEAL>(&mut work, first),
                _ => abreast_pass::<R, 8, SAME_KEY, SEAL>(&mut work, first),
            }
            first += per_pass;
        }

        let lengths = lanes_of(packets.each_ref().map(|p| lengths_block(p)));
        let power = abreast_power::<SAME_KEY>(packets, 1);
        multiply_add(&mut work.sum, lengths, power);
        _mm512_xor_si512(reversed(reduce(work.sum)), work.tag_mask)
    }
}

/// Four packets on their way.
struct Abreast<'r, 'k> {
    packets: &'r [Packet<'k>; 4],
    blocks: usize,
    nonces: __m512i,
    tag_mask: __m512i,
    sum: Products,
}

with_features! {
    /// Counters `first` + 1 to `first` + N: their key stream, and what it encrypts.
    fn abreast_pass<const R: usize, const N: usize, const SAME_KEY: bool, const SEAL: bool>(
        work: &mut Abreast<'_, '_>, first: usize,
    ) {
        let mut stream = [zero(); N];
        for (i, s) in stream.iter_mut().enumerate() {
            // SAFETY: a whole vector of the table; the index is checked.
            let counter = unsafe { _mm512_load_si512(ABREAST_COUNTERS.0[first + i].as_ptr().cast()) };
            *s = _mm512_xor_si512(work.nonces, counter);
        }
        for round in 1..R {
            let key = abreast_round_key::<SAME_KEY>(work.packets, round);
            for s in &mut stream {
                *s = _mm512_aesenc_epi128(*s, key);
            }
        }
        let key = abreast_round_key::<SAME_KEY>(work.packets, R);
        for (i, s) in stream.into_iter().enumerate() {
            let s = _mm512_aesenclast_epi128(s, key);
            match first + i {
                0 => work.tag_mask = s,
                counter => abreast_block::<SAME_KEY, SEAL>(work, counter - 1, s),
            }
        }
    }

    /// Encrypts or decrypts block `j` of each packet, and hashes it.
    fn abreast_block<const SAME_KEY: bool, const SEAL: bool>(work: &mut Abreast<'_, '_>, j: usize, stream: __m512i) {
        let places = work.packets.each_ref().map(|p| p.payload.wrapping_add(16 * j));
        let cipher = if j + 1 < work.blocks {
            whole_blocks::<SEAL>(places, stream)
        } else {
            last_blocks::<SEAL>(places, work.packets.each_ref().map(|p| p.bytes - 16 * j), stream)
        };
        let power = abreast_power::<SAME_KEY>(work.packets, work.blocks + 1 - j);
        multiply_add(&mut work.sum, reversed(cipher), power);
    }

    /// One whole block at each place; gives the ciphertext. All packets have equally many blocks, and all
    /// but the last are whole.
    fn whole_blocks<const SEAL: bool>(places: [*mut u8; 4], stream: __m512i) -> __m512i {
        // SAFETY: 16 bytes of payload lie at each place.
        let input = lanes_of(places.map(|p| unsafe { _mm_loadu_si128(p.cast()) }));
        let output = _mm512_xor_si512(input, stream);
        for (place, lane) in places.into_iter().zip(lanes_apart(output)) {
            // SAFETY: as above.
            unsafe { _mm_storeu_si128(place.cast(), lane) };
        }
        if SEAL { output } else { input }
    }

    /// The last block, of 1 to 16 `bytes`, at each place: only they are touched, the rest hashes as zeros.
    fn last_blocks<const SEAL: bool>(places: [*mut u8; 4], bytes: [usize; 4], stream: __m512i) -> __m512i {
        let masks = bytes.map(|bytes| _bzhi_u32(0xffff, bytes as u32) as u16);
        // SAFETY: masked to the payload.
        let lane = |i: usize| unsafe { _mm_maskz_loadu_epi8(masks[i], places[i].cast()) };
        let input = lanes_of([lane(0), lane(1), lane(2), lane(3)]);
        let output = _mm512_xor_si512(input, stream);
        for (i, lane) in lanes_apart(output).into_iter().enumerate() {
            // SAFETY: masked to the payload.
            unsafe { _mm_mask_storeu_epi8(places[i].cast(), masks[i], lane) };
        }
        let mask = masks.iter().rev().fold(0_u64, |all, mask| all << 16 | u64::from(*mask));
        if SEAL { _mm512_maskz_mov_epi8(mask, output) } else { input }
    }

    fn abreast_round_key<const SAME_KEY: bool>(packets: &[Packet<'_>; 4], round: usize) -> __m512i {
        if SAME_KEY {
            all_lanes(packets[0].key.round_keys[round])
        } else {
            lanes_of(packets.each_ref().map(|p| p.key.round_keys[round]))
        }
    }

    fn abreast_power<const SAME_KEY: bool>(packets: &[Packet<'_>; 4], e: usize) -> __m512i {
        if SAME_KEY {
            one_power(packets[0].key, e)
        } else {
            lanes_of(packets.each_ref().map(|p| p.key.powers[POWERS - e]))
        }
    }
}
