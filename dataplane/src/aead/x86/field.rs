//! The field GHASH works in, one lane at a time; see the parent's documentation for the mathematics.

use core::arch::x86_64::*;

/// P = x⁶³ + x⁶² + x⁵⁷.
pub(super) const P: i64 = 0xC200_0000_0000_0000_u64 as i64;

/// Gives each function the features that all widths have.
macro_rules! one_lane_features {
    ($($item:item)*) => {
        $(
            #[target_feature(enable = "sse4.1,aes,pclmulqdq")]
            #[inline]
            $item
        )*
    };
}
pub(super) use one_lane_features;

one_lane_features! {
    /// The shuffle that reverses the bytes of a lane: GHASH counts bits from the other end.
    pub(super) fn reversal() -> __m128i {
        _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    }

    pub(super) fn reversed(x: __m128i) -> __m128i {
        _mm_shuffle_epi8(x, reversal())
    }

    /// In both halves, the sum of both.
    pub(super) fn halves_added(x: __m128i) -> __m128i {
        _mm_xor_si128(x, _mm_shuffle_epi32::<0x4e>(x))
    }

    /// x·x⁻⁶⁴ modulo g.
    pub(super) fn fold(x: __m128i) -> __m128i {
        _mm_xor_si128(_mm_shuffle_epi32::<0x4e>(x), _mm_clmulepi64_si128::<0x00>(x, _mm_set1_epi64x(P)))
    }

    /// Ends a sum of products; `cross` still has low and high in it.
    pub(super) fn reduce(low: __m128i, cross: __m128i, high: __m128i) -> __m128i {
        let middle = _mm_xor_si128(cross, _mm_xor_si128(low, high));
        _mm_xor_si128(high, fold(_mm_xor_si128(middle, fold(low))))
    }

    /// a·b·x⁻¹²⁸ modulo g.
    pub(super) fn multiply(a: __m128i, b: __m128i) -> __m128i {
        reduce(
            _mm_clmulepi64_si128::<0x00>(a, b),
            _mm_clmulepi64_si128::<0x00>(halves_added(a), halves_added(b)),
            _mm_clmulepi64_si128::<0x11>(a, b),
        )
    }
}
