//! One packet's stream of lanes, four blocks a vector: short packets in a pipeline, long ones in groups.

use super::{
    super::{
        field::reversed as reversed_lane,
        packet::{Packet, aad_block, finish, lengths_block, nonce_block},
    },
    Aligned, Run, SHORT_VECTORS, counters,
    field::{
        Products, all_lanes, falling_powers, multiply_add, no_products, one_power, reduce,
        reduce_sum, reversed, zero,
    },
    vectors, with_features,
};
use core::{arch::x86_64::*, array};

/// Counters of a stream of lanes: 0, 1, 2, 3 in the first vector.
static STREAM_COUNTERS: Aligned<[[u8; 64]; SHORT_VECTORS]> = Aligned(counters(true));

with_features! {
    /// The bytes of vector `v` of a stream that are payload, as a mask. `end` counts from the stream's start.
    fn payload_mask(v: usize, end: usize) -> u64 {
        let mask = _bzhi_u64(u64::MAX, end.saturating_sub(64 * v).min(64) as u32);
        if v == 0 { mask & (u64::MAX << 32) } else { mask }
    }

    /// Puts the lengths into the lane behind the last block, where `lane` is its number.
    fn with_lengths(vector: __m512i, lane: usize, lengths: __m128i) -> __m512i {
        _mm512_mask_broadcast_i32x4(vector, 0xf << (4 * (lane % 4)), lengths)
    }

    /// Seals or opens `count` packets of V vectors each, any keys: while AES works on a packet, the
    /// multiplier hashes the one before.
    pub(super) fn pipelined<const R: usize, const V: usize, const SEAL: bool>(run: &mut Run<'_, '_>, at: usize, count: usize) {
        let mut previous: Option<Hashing<'_, V>> = None;
        for index in at..at + count {
            let Some(packet) = run.packet::<4>(index) else { return };
            let nonce = all_lanes(nonce_block(&packet));
            let mut stream = [zero(); V];
            for (v, s) in stream.iter_mut().enumerate() {
                *s = _mm512_xor_si512(nonce, stream_counter(v));
            }
            let mut sum = no_products();
            for round in 1..R {
                let key = all_lanes(packet.key.round_keys[round]);
                for s in &mut stream {
                    *s = _mm512_aesenc_epi128(*s, key);
                }
                if round <= V && let Some(hashing) = &previous {
                    hash_vector(&mut sum, hashing, round - 1);
                }
            }
            let key = all_lanes(packet.key.round_keys[R]);
            for s in &mut stream {
                *s = _mm512_aesenclast_epi128(*s, key);
            }
            if let Some(hashing) = &previous {
                run.jobs[index - 1].ok = finish::<SEAL>(&hashing.packet, tag_of(hashing, sum));
            }

            let end = packet.bytes + 32;
            let lanes = end.div_ceil(16); // with the two before the payload: the lengths' number
            let mut blocks = [zero(); V];
            for v in 0..V {
                let place = packet.payload.wrapping_sub(32).wrapping_add(64 * v);
                let mask = if v == 0 || v + 2 >= V { payload_mask(v, end) } else { u64::MAX };
                // SAFETY: masked to the payload.
                let input = unsafe { _mm512_maskz_loadu_epi8(mask, place.cast()) };
                let output = _mm512_xor_si512(input, stream[v]);
                // SAFETY: masked to the payload.
                unsafe { _mm512_mask_storeu_epi8(place.cast(), mask, output) };
                blocks[v] = reversed(if SEAL { _mm512_maskz_mov_epi8(mask, output) } else { input });
            }
            blocks[0] = _mm512_mask_broadcast_i32x4(blocks[0], 0x00f0, aad_block(&packet));
            blocks[V - 1] = with_lengths(blocks[V - 1], lanes, lengths_block(&packet));
            previous = Some(Hashing {
                packet,
                blocks,
                first_power: lanes + 1,
                tag_mask: _mm512_extracti32x4_epi32::<1>(stream[0]),
            });
        }
        if let Some(hashing) = &previous {
            let mut sum = no_products();
            for v in 0..V {
                hash_vector(&mut sum, hashing, v);
            }
            run.jobs[at + count - 1].ok = finish::<SEAL>(&hashing.packet, tag_of(hashing, sum));
        }
    }

    fn stream_counter(v: usize) -> __m512i {
        // SAFETY: a whole vector of the table; the index is checked.
        unsafe { _mm512_load_si512(STREAM_COUNTERS.0[v].as_ptr().cast()) }
    }

    fn hash_vector<const V: usize>(sum: &mut Products, hashing: &Hashing<'_, V>, v: usize) {
        let power = falling_powers(hashing.packet.key, hashing.first_power - 4 * v);
        multiply_add(sum, hashing.blocks[v], power);
    }

    fn tag_of<const V: usize>(hashing: &Hashing<'_, V>, sum: Products) -> __m128i {
        _mm_xor_si128(reversed_lane(reduce_sum(sum)), hashing.tag_mask)
    }
}

/// A packet that is encrypted or read, and still to be hashed.
struct Hashing<'k, const V: usize> {
    packet: Packet<'k>,
    /// Byte-reversed; AAD and lengths are in their lanes.
    blocks: [__m512i; V],
    /// The power of H of lane 0.
    first_power: usize,
    tag_mask: __m128i,
}

/// A long packet on its way through [`one_packet`].
struct Stream<'r, 'k> {
    packet: &'r Packet<'k>,
    nonce: __m512i,
    /// The hash of all groups so far, in the lanes it is to be added to next.
    hash: __m512i,
    tag_mask: __m128i,
}

with_features! {
    /// Seals or opens one packet of more than [`SHORT_VECTORS`] vectors: groups of four, then the
    /// rest. When sealing, the hash runs a group behind; when opening, it has its input at once.
    pub(super) fn one_packet<const R: usize, const SEAL: bool>(packet: &Packet<'_>) -> __m128i {
        let vectors = vectors(packet);
        let rest = (vectors - 2) % 4 + 2; // 2 to 5: masks are needed in the last two only
        let groups = (vectors - rest) / 4;
        let mut stream = Stream {
            packet,
            nonce: all_lanes(nonce_block(packet)),
            hash: _mm512_maskz_broadcast_i32x4(0x00f0, aad_block(packet)),
            tag_mask: _mm_setzero_si128(),
        };
        let mut sealed = [zero(); 4];
        for group in 0..groups {
            full_group::<R, SEAL>(&mut stream, group, &mut sealed);
        }
        let sum = match rest {
            2 => last_group::<R, 2, SEAL>(&mut stream, groups, &sealed),
            3 => last_group::<R, 3, SEAL>(&mut stream, groups, &sealed),
            4 => last_group::<R, 4, SEAL>(&mut stream, groups, &sealed),
            _ => last_group::<R, 5, SEAL>(&mut stream, groups, &sealed),
        };
        _mm_xor_si128(reversed_lane(sum), stream.tag_mask)
    }

    /// Vector `v` of a group's counters. The fifth would carry into the bits of the group's number, so
    /// it counts as the first of the next group.
    fn group_counter(nonce: __m512i, group: usize, v: usize) -> __m512i {
        let start = 16 * (group + v / 4) as u32;
        let start = _mm512_maskz_set1_epi32(0x8888, start.swap_bytes() as i32);
        _mm512_ternarylogic_epi64::<0x96>(nonce, start, stream_counter(v % 4))
    }

    /// One vector of a group of four: lane l carries the hash times H¹⁶, so that groups add up lane by lane.
    fn hash_in_group(sum: &mut Products, stream: &Stream<'_, '_>, group: &[__m512i; 4], v: usize) {
        let mut lanes = reversed(group[v]);
        if v == 0 {
            lanes = _mm512_xor_si512(lanes, stream.hash);
        }
        let power = one_power(stream.packet.key, 16 - 4 * v);
        multiply_add(sum, lanes, power);
    }

    /// Group number `group`: sixteen lanes, all payload but the first two of the first group. `sealed` is the
    /// ciphertext of the group before, and then of this one.
    fn full_group<const R: usize, const SEAL: bool>(stream: &mut Stream<'_, '_>, group: usize, sealed: &mut [__m512i; 4]) {
        let key = stream.packet.key;
        let place = stream.packet.payload.wrapping_sub(32).wrapping_add(256 * group);
        let mask = if group == 0 { u64::MAX << 32 } else { u64::MAX };
        let mut s: [__m512i; 4] = array::from_fn(|v| group_counter(stream.nonce, group, v));
        let input: [__m512i; 4] = array::from_fn(|v| {
            // SAFETY: the first vector is masked to the payload, the others lie within it: at least two
            // vectors follow the last full group.
            unsafe {
                match v {
                    0 => _mm512_maskz_loadu_epi8(mask, place.cast()),
                    _ => _mm512_loadu_si512(place.wrapping_add(64 * v).cast()),
                }
            }
        });
        let hashes = !SEAL || group > 0;
        let cipher = if SEAL { *sealed } else { input };
        let mut sum = no_products();
        for round in 1..R {
            let round_key = all_lanes(key.round_keys[round]);
            for s in &mut s {
                *s = _mm512_aesenc_epi128(*s, round_key);
            }
            if hashes && round % 2 == 1 && round < 8 {
                hash_in_group(&mut sum, stream, &cipher, round / 2);
            }
        }
        // The data goes into the last round key: AES then ends with the output.
        let round_key = all_lanes(key.round_keys[R]);
        s[0] = _mm512_aesenclast_epi128(s[0], round_key);
        if group == 0 {
            stream.tag_mask = _mm512_extracti32x4_epi32::<1>(s[0]);
        }
        s[0] = _mm512_xor_si512(s[0], input[0]);
        for v in 1..4 {
            s[v] = _mm512_aesenclast_epi128(s[v], _mm512_xor_si512(round_key, input[v]));
        }
        if hashes {
            stream.hash = reduce(sum);
        }
        // SAFETY: as for the loads.
        unsafe {
            _mm512_mask_storeu_epi8(place.cast(), mask, s[0]);
            for (v, s) in s.iter().enumerate().skip(1) {
                _mm512_storeu_si512(place.wrapping_add(64 * v).cast(), *s);
            }
        }
        if SEAL {
            s[0] = _mm512_maskz_mov_epi8(mask, s[0]);
            *sealed = s;
        }
    }

    /// The last V vectors with the lengths, and what is still to be hashed; gives the hash.
    fn last_group<const R: usize, const V: usize, const SEAL: bool>(
        stream: &mut Stream<'_, '_>, group: usize, sealed: &[__m512i; 4],
    ) -> __m128i {
        let packet = stream.packet;
        let key = packet.key;
        let place = packet.payload.wrapping_sub(32).wrapping_add(256 * group);
        let end = packet.bytes + 32 - 256 * group;
        let lanes = end.div_ceil(16);
        let mask = |v: usize| {
            if v + 2 >= V { _bzhi_u64(u64::MAX, end.saturating_sub(64 * v).min(64) as u32) } else { u64::MAX }
        };
        let mut s: [__m512i; V] = array::from_fn(|v| group_counter(stream.nonce, group, v));
        // SAFETY: masked to the payload.
        let input: [__m512i; V] =
            array::from_fn(|v| unsafe { _mm512_maskz_loadu_epi8(mask(v), place.wrapping_add(64 * v).cast()) });

        let hash = |sum: &mut Products, v: usize, cipher: __m512i, before: __m512i| {
            let mut blocks = reversed(cipher);
            if v == 0 {
                blocks = _mm512_xor_si512(blocks, before);
            }
            if v + 1 == V {
                blocks = with_lengths(blocks, lanes, lengths_block(packet));
            }
            let power = falling_powers(key, lanes + 1 - 4 * v);
            multiply_add(sum, blocks, power);
        };
        let mut before = no_products();
        let mut sum = no_products();
        for round in 1..R {
            let round_key = all_lanes(key.round_keys[round]);
            for s in &mut s {
                *s = _mm512_aesenc_epi128(*s, round_key);
            }
            if SEAL && round % 2 == 1 && round < 8 {
                hash_in_group(&mut before, stream, sealed, round / 2);
            }
            if !SEAL && round + V >= R {
                let v = round + V - R;
                hash(&mut sum, v, input[v], stream.hash);
            }
        }
        if SEAL {
            stream.hash = reduce(before);
        }
        let round_key = all_lanes(key.round_keys[R]);
        for v in 0..V {
            let output = _mm512_xor_si512(_mm512_aesenclast_epi128(s[v], round_key), input[v]);
            // SAFETY: masked to the payload.
            unsafe { _mm512_mask_storeu_epi8(place.wrapping_add(64 * v).cast(), mask(v), output) };
            if SEAL {
                hash(&mut sum, v, _mm512_maskz_mov_epi8(mask(v), output), stream.hash);
            }
        }
        reduce_sum(sum)
    }
}
