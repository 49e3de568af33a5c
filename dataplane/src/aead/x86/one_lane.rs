//! Vectors of one lane: AES-NI and PCLMULQDQ, without AVX, for every CPU that has AES instructions at all.

use super::field;
use core::arch::x86_64::*;

pub(super) const LANES: usize = 1;
pub(super) type Vector = __m128i;

pub(super) use field::one_lane_features as with_features;
pub(super) use field::reversed;

#[path = "parts.rs"]
pub(super) mod parts;

with_features! {
    pub(super) fn zero() -> Vector {
        _mm_setzero_si128()
    }

    pub(super) fn all_lanes(lane: __m128i) -> Vector {
        lane
    }

    /// # Safety
    /// One vector is readable at `place`.
    pub(super) unsafe fn load(place: *const u8) -> Vector {
        // SAFETY: the caller's.
        unsafe { _mm_loadu_si128(place.cast()) }
    }

    /// # Safety
    /// One vector is writable at `place`.
    pub(super) unsafe fn store(place: *mut u8, x: Vector) {
        // SAFETY: the caller's.
        unsafe { _mm_storeu_si128(place.cast(), x) }
    }

    pub(super) fn add(x: Vector, y: Vector) -> Vector {
        _mm_xor_si128(x, y)
    }

    pub(super) fn aes_round(x: Vector, round_key: __m128i) -> Vector {
        _mm_aesenc_si128(x, round_key)
    }

    pub(super) fn aes_last_round(x: Vector, round_key: __m128i) -> Vector {
        _mm_aesenclast_si128(x, round_key)
    }

    pub(super) fn multiply<const HALVES: i32>(x: Vector, y: Vector) -> Vector {
        _mm_clmulepi64_si128::<HALVES>(x, y)
    }

    pub(super) fn halves_swapped(x: Vector) -> Vector {
        _mm_shuffle_epi32::<0x4e>(x)
    }

    /// The sum of all lanes.
    pub(super) fn add_lanes(x: Vector) -> __m128i {
        x
    }

    pub(super) fn lanes_of(lanes: [__m128i; LANES]) -> Vector {
        lanes[0]
    }

    pub(super) fn lanes_apart(x: Vector) -> [__m128i; LANES] {
        [x]
    }
}
