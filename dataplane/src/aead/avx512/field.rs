//! The field GHASH works in, four lanes at a time; see the parent's documentation for the mathematics.

use super::with_features;
use core::arch::x86_64::*;

/// P = x⁶³ + x⁶² + x⁵⁷.
pub(super) const P: i64 = 0xC200_0000_0000_0000_u64 as i64;

/// A sum of products not yet reduced; any number of them may be added up.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub(super) r: __m512i,
    pub(super) f: __m512i,
}

with_features! {
    pub(super) fn zero() -> __m512i {
        _mm512_setzero_si512()
    }

    /// Four copies of one lane.
    pub(super) fn all_lanes(lane: __m128i) -> __m512i {
        _mm512_broadcast_i32x4(lane)
    }

    /// The shuffle that reverses the bytes of a lane: GHASH counts bits from the other end.
    pub(super) fn reversal() -> __m128i {
        _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    }

    pub(super) fn reversed(x: __m512i) -> __m512i {
        _mm512_shuffle_epi8(x, all_lanes(reversal()))
    }

    pub(super) fn reversed_lane(x: __m128i) -> __m128i {
        _mm_shuffle_epi8(x, reversal())
    }

    /// x·x⁻⁶⁴ modulo g.
    pub(super) fn fold(x: __m128i) -> __m128i {
        _mm_xor_si128(_mm_shuffle_epi32::<0x4e>(x), _mm_clmulepi64_si128::<0x00>(x, _mm_set1_epi64x(P)))
    }

    pub(super) fn no_product() -> Product {
        Product { r: zero(), f: zero() }
    }

    /// Adds the product of each lane with its power of H.
    pub(super) fn multiply_add(sum: &mut Product, lanes: __m512i, power: __m512i, folded: __m512i) {
        sum.r = _mm512_ternarylogic_epi64::<0x96>(
            sum.r,
            _mm512_clmulepi64_epi128::<0x10>(lanes, folded),
            _mm512_clmulepi64_epi128::<0x11>(lanes, power),
        );
        sum.f = _mm512_ternarylogic_epi64::<0x96>(
            sum.f,
            _mm512_clmulepi64_epi128::<0x00>(lanes, folded),
            _mm512_clmulepi64_epi128::<0x01>(lanes, power),
        );
    }

    /// Reduces each lane for itself.
    pub(super) fn reduce(sum: Product) -> __m512i {
        let multiple = _mm512_clmulepi64_epi128::<0x00>(sum.f, _mm512_set1_epi64(P));
        _mm512_ternarylogic_epi64::<0x96>(sum.r, _mm512_shuffle_epi32::<0x4e>(sum.f), multiple)
    }

    /// Reduces the sum of all lanes.
    pub(super) fn reduce_sum(sum: Product) -> __m128i {
        _mm_xor_si128(add_lanes(sum.r), fold(add_lanes(sum.f)))
    }

    pub(super) fn add_lanes(x: __m512i) -> __m128i {
        let half = _mm256_xor_si256(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64::<1>(x));
        _mm_xor_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half))
    }

    pub(super) fn lanes_of(lanes: [__m128i; 4]) -> __m512i {
        let x = _mm512_castsi128_si512(lanes[0]);
        let x = _mm512_inserti32x4::<1>(x, lanes[1]);
        let x = _mm512_inserti32x4::<2>(x, lanes[2]);
        _mm512_inserti32x4::<3>(x, lanes[3])
    }

    pub(super) fn lanes_apart(x: __m512i) -> [__m128i; 4] {
        [
            _mm512_castsi512_si128(x),
            _mm512_extracti32x4_epi32::<1>(x),
            _mm512_extracti32x4_epi32::<2>(x),
            _mm512_extracti32x4_epi32::<3>(x),
        ]
    }
}
