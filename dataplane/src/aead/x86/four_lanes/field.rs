//! The field GHASH works in, four lanes at a time.

use super::{
    super::{
        field::{P, reduce as reduce_lane, reversal},
        key::{POWERS, Schedule},
    },
    with_features,
};
use core::arch::x86_64::*;

/// A sum of products not yet reduced; any number of them may be added up.
#[derive(Clone, Copy)]
pub(super) struct Products {
    low: __m512i,
    cross: __m512i,
    high: __m512i,
}

with_features! {
    pub(super) fn zero() -> __m512i {
        _mm512_setzero_si512()
    }

    /// Four copies of one lane.
    pub(super) fn all_lanes(lane: __m128i) -> __m512i {
        _mm512_broadcast_i32x4(lane)
    }

    pub(super) fn reversed(x: __m512i) -> __m512i {
        _mm512_shuffle_epi8(x, all_lanes(reversal()))
    }

    pub(super) fn no_products() -> Products {
        Products { low: zero(), cross: zero(), high: zero() }
    }

    /// Adds the product of each lane with its power of H.
    pub(super) fn multiply_add(sum: &mut Products, lanes: __m512i, power: __m512i) {
        let halves_added = |x| _mm512_xor_si512(x, _mm512_shuffle_epi32::<0x4e>(x));
        sum.low = _mm512_xor_si512(sum.low, _mm512_clmulepi64_epi128::<0x00>(lanes, power));
        sum.cross = _mm512_xor_si512(
            sum.cross,
            _mm512_clmulepi64_epi128::<0x00>(halves_added(lanes), halves_added(power)),
        );
        sum.high = _mm512_xor_si512(sum.high, _mm512_clmulepi64_epi128::<0x11>(lanes, power));
    }

    /// Reduces each lane for itself.
    pub(super) fn reduce(sum: Products) -> __m512i {
        let middle = _mm512_ternarylogic_epi64::<0x96>(sum.cross, sum.low, sum.high);
        _mm512_xor_si512(sum.high, fold(_mm512_xor_si512(middle, fold(sum.low))))
    }

    /// x·x⁻⁶⁴ modulo g.
    fn fold(x: __m512i) -> __m512i {
        let multiple = _mm512_clmulepi64_epi128::<0x00>(x, _mm512_set1_epi64(P));
        _mm512_xor_si512(_mm512_shuffle_epi32::<0x4e>(x), multiple)
    }

    /// Reduces the sum of all lanes.
    pub(super) fn reduce_sum(sum: Products) -> __m128i {
        reduce_lane(add_lanes(sum.low), add_lanes(sum.cross), add_lanes(sum.high))
    }

    /// Powers e, e-1, e-2, e-3 of H in lanes 0 to 3; zeros below the first power.
    pub(super) fn falling_powers(key: &Schedule, e: usize) -> __m512i {
        let at = POWERS - e;
        debug_assert!(at < POWERS);
        // SAFETY: e is 1 to POWERS, and the array is three longer: at + 4 <= POWERS + 3.
        unsafe { _mm512_loadu_si512(key.powers.as_ptr().add(at).cast()) }
    }

    /// Power e of H in every lane.
    pub(super) fn one_power(key: &Schedule, e: usize) -> __m512i {
        all_lanes(key.powers[POWERS - e])
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
