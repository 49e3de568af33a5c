//! Vectors of two lanes: VAES and VPCLMULQDQ on AVX2's registers.

use super::packet::crypt_last_block;
use core::arch::{asm, x86_64::*};

pub(super) const LANES: usize = 2;
/// Vectors of a part at most: what registers hold.
pub(super) const PART_VECTORS: usize = 8;
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

    /// The same, here and now: the compiler moves no instruction of which `x` is the result past this.
    pub(super) fn in_order(mut x: Vector) -> Vector {
        // SAFETY: no instruction at all.
        unsafe { asm!("/* {} */", inout(ymm_reg) x, options(nomem, nostack, preserves_flags)) };
        x
    }

    pub(super) fn multiply<const HALVES: i32>(x: Vector, y: Vector) -> Vector {
        _mm256_clmulepi64_epi128::<HALVES>(x, y)
    }

    pub(super) fn halves_swapped(x: Vector) -> Vector {
        _mm256_shuffle_epi32::<0x4e>(x)
    }

    /// The sum of all lanes.
    pub(super) fn add_lanes(x: Vector) -> __m128i {
        _mm_xor_si128(lane::<0>(x), lane::<1>(x))
    }

    pub(super) fn lane<const I: usize>(x: Vector) -> __m128i {
        if I == 0 { _mm256_castsi256_si128(x) } else { _mm256_extracti128_si256::<1>(x) }
    }

    pub(super) fn with_lane(x: Vector, i: usize, lane: __m128i) -> Vector {
        if i == 0 { _mm256_inserti128_si256::<0>(x, lane) } else { _mm256_inserti128_si256::<1>(x, lane) }
    }

    pub(super) fn first_lane(lane: __m128i) -> Vector {
        _mm256_zextsi128_si256(lane)
    }

    /// Crypts bytes 0 to `to` at `place`; gives what is to be hashed.
    ///
    /// # Safety
    /// They are the last of a payload, at least one, and the ICV follows.
    pub(super) unsafe fn crypt_edge<const SEAL: bool>(place: *mut u8, _: usize, to: usize, stream: Vector) -> Vector {
        // SAFETY: the caller's; the second block is only touched if it has payload.
        unsafe {
            let first = first_lane(crypt_last_block::<SEAL>(place, to.min(16), lane::<0>(stream)));
            if to <= 16 {
                return first;
            }
            with_lane(first, 1, crypt_last_block::<SEAL>(place.add(16), to - 16, lane::<1>(stream)))
        }
    }
}
