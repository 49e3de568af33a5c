//! Vectors of one lane: AES-NI and PCLMULQDQ, without AVX, for every CPU that has AES instructions at all.

use super::{field, packet::crypt_last_block};
use core::arch::{asm, x86_64::*};

pub(super) const LANES: usize = 1;
/// Vectors of a part at most: what registers hold.
pub(super) const PART_VECTORS: usize = 8;
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

    /// The same, here and now: the compiler moves no instruction of which `x` is the result past this.
    pub(super) fn in_order(mut x: Vector) -> Vector {
        // SAFETY: no instruction at all.
        unsafe { asm!("/* {} */", inout(xmm_reg) x, options(nomem, nostack, preserves_flags)) };
        x
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

    pub(super) fn lane<const I: usize>(x: Vector) -> __m128i {
        x
    }

    pub(super) fn with_lane(_: Vector, _: usize, lane: __m128i) -> Vector {
        lane
    }

    pub(super) fn first_lane(lane: __m128i) -> Vector {
        lane
    }

    /// Crypts bytes 0 to `to` at `place`; gives what is to be hashed.
    ///
    /// # Safety
    /// They are the last of a payload, at least one, and the ICV follows.
    pub(super) unsafe fn crypt_edge<const SEAL: bool>(place: *mut u8, _: usize, to: usize, stream: Vector) -> Vector {
        // SAFETY: the caller's.
        unsafe { crypt_last_block::<SEAL>(place, to, stream) }
    }
}
