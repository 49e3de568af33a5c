//! One packet as the kernels see it, and how it ends.

use super::{
    field::{one_lane_features, reversed},
    key::Schedule,
};
use core::arch::x86_64::*;

/// One packet as the kernels see it. Its pointers are valid as long as the [`super::Run`] they come from.
#[derive(Clone, Copy)]
pub(super) struct Packet<'k> {
    pub(super) key: &'k Schedule,
    /// 12 bytes.
    pub(super) nonce: *const u8,
    /// 16 bytes, zeros behind the first `aad_bytes`.
    pub(super) aad: *const u8,
    pub(super) aad_bytes: usize,
    /// `bytes`, and 16 of ICV behind them.
    pub(super) payload: *mut u8,
    pub(super) bytes: usize,
}

impl Packet<'_> {
    pub(super) fn blocks(&self) -> usize {
        self.bytes.div_ceil(16)
    }

    fn icv(&self) -> *mut u8 {
        self.payload.wrapping_add(self.bytes)
    }
}

one_lane_features! {
    /// Writes the tag, or compares it: all bytes at once, without early exit. A payload that is not
    /// authentic is wiped, so that nobody can use it by mistake.
    pub(super) fn finish<const SEAL: bool>(packet: &Packet<'_>, tag: __m128i) -> bool {
        if SEAL {
            // SAFETY: 16 bytes of ICV lie behind the payload.
            unsafe { _mm_storeu_si128(packet.icv().cast(), tag) };
            return true;
        }
        // SAFETY: as above.
        let received = unsafe { _mm_loadu_si128(packet.icv().cast()) };
        let difference = _mm_xor_si128(tag, received);
        let authentic = _mm_testz_si128(difference, difference) == 1;
        if !authentic {
            // SAFETY: the payload's own bytes.
            unsafe { packet.payload.write_bytes(0, packet.bytes) };
        }
        authentic
    }

    /// Nonce ⊕ round key 0, the counter still 0, in the low lane.
    pub(super) fn nonce_block(packet: &Packet<'_>) -> __m128i {
        // SAFETY: the nonce has 12 bytes.
        let (salt_and_half, rest) = unsafe {
            (_mm_loadl_epi64(packet.nonce.cast()), packet.nonce.add(8).cast::<i32>().read_unaligned())
        };
        _mm_xor_si128(_mm_insert_epi32::<2>(salt_and_half, rest), packet.key.round_keys[0])
    }

    /// The AAD as GHASH wants it.
    pub(super) fn aad_block(packet: &Packet<'_>) -> __m128i {
        // SAFETY: 16 bytes are readable.
        reversed(unsafe { _mm_loadu_si128(packet.aad.cast()) })
    }

    /// The lengths of AAD and payload in bits, as GHASH wants them.
    pub(super) fn lengths_block(packet: &Packet<'_>) -> __m128i {
        _mm_set_epi64x(packet.aad_bytes as i64 * 8, packet.bytes as i64 * 8)
    }
}
