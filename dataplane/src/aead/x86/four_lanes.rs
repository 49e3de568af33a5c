//! Vectors of four lanes: AVX-512 with VAES and VPCLMULQDQ. Bytes that are not payload are masked: never read, never
//! written.

use core::arch::{asm, x86_64::*};

pub(super) const LANES: usize = 4;
/// Vectors of a part at most: registers would hold more, but keys would need more powers of H.
pub(super) const PART_VECTORS: usize = 10;
pub(super) type Vector = __m512i;

/// Gives each function the features that this width needs.
macro_rules! with_features {
    ($($item:item)*) => {
        $(
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,vaes,vpclmulqdq,aes,pclmulqdq,bmi2")]
            #[inline]
            $item
        )*
    };
}

#[path = "abreast.rs"]
pub(super) mod abreast;
#[path = "chunk.rs"]
mod chunk;
#[path = "parts.rs"]
pub(super) mod parts;

with_features! {
    pub(super) fn zero() -> Vector {
        _mm512_setzero_si512()
    }

    pub(super) fn all_lanes(lane: __m128i) -> Vector {
        _mm512_broadcast_i32x4(lane)
    }

    pub(super) fn reversed(x: Vector) -> Vector {
        _mm512_shuffle_epi8(x, all_lanes(super::field::reversal()))
    }

    /// # Safety
    /// One vector is readable at `place`.
    pub(super) unsafe fn load(place: *const u8) -> Vector {
        // SAFETY: the caller's.
        unsafe { _mm512_loadu_si512(place.cast()) }
    }

    /// # Safety
    /// One vector is writable at `place`.
    pub(super) unsafe fn store(place: *mut u8, x: Vector) {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_si512(place.cast(), x) }
    }

    pub(super) fn add(x: Vector, y: Vector) -> Vector {
        _mm512_xor_si512(x, y)
    }

    pub(super) fn aes_round(x: Vector, round_key: __m128i) -> Vector {
        _mm512_aesenc_epi128(x, all_lanes(round_key))
    }

    pub(super) fn aes_last_round(x: Vector, round_key: __m128i) -> Vector {
        _mm512_aesenclast_epi128(x, all_lanes(round_key))
    }

    /// The same, here and now: the compiler moves no instruction of which `x` is the result past this.
    pub(super) fn in_order(mut x: Vector) -> Vector {
        // SAFETY: no instruction at all.
        unsafe { asm!("/* {} */", inout(zmm_reg) x, options(nomem, nostack, preserves_flags)) };
        x
    }

    pub(super) fn multiply<const HALVES: i32>(x: Vector, y: Vector) -> Vector {
        _mm512_clmulepi64_epi128::<HALVES>(x, y)
    }

    pub(super) fn halves_swapped(x: Vector) -> Vector {
        _mm512_shuffle_epi32::<0x4e>(x)
    }

    /// The sum of all lanes.
    pub(super) fn add_lanes(x: Vector) -> __m128i {
        let half = _mm256_xor_si256(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64::<1>(x));
        _mm_xor_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half))
    }

    pub(super) fn lane<const I: usize>(x: Vector) -> __m128i {
        match I {
            0 => _mm512_castsi512_si128(x),
            1 => _mm512_extracti32x4_epi32::<1>(x),
            2 => _mm512_extracti32x4_epi32::<2>(x),
            _ => _mm512_extracti32x4_epi32::<3>(x),
        }
    }

    pub(super) fn with_lane(x: Vector, i: usize, lane: __m128i) -> Vector {
        _mm512_mask_broadcast_i32x4(x, 0xf << (4 * i), lane)
    }

    pub(super) fn first_lane(lane: __m128i) -> Vector {
        _mm512_zextsi128_si512(lane)
    }

    /// Crypts bytes `from` to `to` of the vector at `place`; gives what is to be hashed, with zeros around.
    ///
    /// # Safety
    /// They are payload.
    pub(super) unsafe fn crypt_edge<const SEAL: bool>(place: *mut u8, from: usize, to: usize, stream: Vector) -> Vector {
        let mask = _bzhi_u64(u64::MAX, to as u32) & (u64::MAX << from);
        // SAFETY: masked to the payload; masked bytes cause neither access nor fault.
        unsafe {
            let input = _mm512_maskz_loadu_epi8(mask, place.cast());
            let output = _mm512_xor_si512(input, stream);
            _mm512_mask_storeu_epi8(place.cast(), mask, output);
            reversed(if SEAL { _mm512_maskz_mov_epi8(mask, output) } else { input })
        }
    }
}
