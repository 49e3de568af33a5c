//! Vectors of two lanes: VAES and VPCLMULQDQ on AVX2's registers.

use core::arch::x86_64::*;

pub(super) const LANES: usize = 2;
pub(super) type Vector = __m256i;

/// Gives each function the features that this width needs.
macro_rules! with_features {
    ($($item:item)*) => {
        $(
            #[target_feature(enable = "avx2,vaes,vpclmulqdq,aes,pclmulqdq")]
            #[inline]
            $item
        )*
    };
}

#[path = "parts.rs"]
pub(super) mod parts;

with_features! {
    pub(super) fn zero() -> Vector {
        _mm256_setzero_si256()
    }

    pub(super) fn all_lanes(lane: __m128i) -> Vector {
        _mm256_broadcastsi128_si256(lane)
    }

    pub(super) fn reversed(x: Vector) -> Vector {
        _mm256_shuffle_epi8(x, all_lanes(super::field::reversal()))
    }

    /// # Safety
    /// One vector is readable at `place`.
    pub(super) unsafe fn load(place: *const u8) -> Vector {
        // SAFETY: the caller's.
        unsafe { _mm256_loadu_si256(place.cast()) }
    }

    /// # Safety
    /// One vector is writable at `place`.
    pub(super) unsafe fn store(place: *mut u8, x: Vector) {
        // SAFETY: the caller's.
        unsafe { _mm256_storeu_si256(place.cast(), x) }
    }

    pub(super) fn add(x: Vector, y: Vector) -> Vector {
        _mm256_xor_si256(x, y)
    }

    pub(super) fn aes_round(x: Vector, round_key: __m128i) -> Vector {
        _mm256_aesenc_epi128(x, all_lanes(round_key))
    }

    pub(super) fn aes_last_round(x: Vector, round_key: __m128i) -> Vector {
        _mm256_aesenclast_epi128(x, all_lanes(round_key))
    }

    pub(super) fn multiply<const HALVES: i32>(x: Vector, y: Vector) -> Vector {
        _mm256_clmulepi64_epi128::<HALVES>(x, y)
    }

    pub(super) fn halves_swapped(x: Vector) -> Vector {
        _mm256_shuffle_epi32::<0x4e>(x)
    }

    /// The sum of all lanes.
    pub(super) fn add_lanes(x: Vector) -> __m128i {
        let [even, odd] = lanes_apart(x);
        _mm_xor_si128(even, odd)
    }

    pub(super) fn lanes_of(lanes: [__m128i; LANES]) -> Vector {
        _mm256_set_m128i(lanes[1], lanes[0])
    }

    pub(super) fn lanes_apart(x: Vector) -> [__m128i; LANES] {
        [_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x)]
    }
}
