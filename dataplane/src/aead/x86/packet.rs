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
    /// 12 bytes, and 4 more that can be read.
    pub(super) nonce: *const u8,
    /// 16 bytes, zeros behind the first `aad_bytes`.
    pub(super) aad: *const u8,
    /// `bytes`, and 16 of ICV behind them.
    pub(super) payload: *mut u8,
    pub(super) bytes: usize,
    /// Of another width than `bytes`, lest a compiler loads both at once: what was just written as two would have to wait
    /// for the cache.
    pub(super) aad_bytes: u32,
    /// 10 or 14.
    pub(super) rounds: usize,
}

impl Packet<'_> {
    pub(super) fn blocks(&self) -> usize {
        self.bytes.div_ceil(16)
    }
}

/// Where the ICV is.
pub(super) fn icv(payload: *mut u8, bytes: usize) -> *mut u8 {
    payload.wrapping_add(bytes)
}

one_lane_features! {
    /// Writes the tag, or compares it: all bytes at once, without early exit. A payload that is not
    /// authentic is wiped, so that nobody can use it by mistake.
    pub(super) fn finish<const SEAL: bool>(payload: *mut u8, bytes: usize, tag: __m128i) -> bool {
        if SEAL {
            // SAFETY: 16 bytes of ICV lie behind the payload.
            unsafe { _mm_storeu_si128(icv(payload, bytes).cast(), tag) };
            return true;
        }
        // SAFETY: as above.
        let received = unsafe { _mm_loadu_si128(icv(payload, bytes).cast()) };
        let difference = _mm_xor_si128(tag, received);
        let authentic = _mm_testz_si128(difference, difference) == 1;
        if !authentic {
            // SAFETY: the payload's own bytes.
            unsafe { payload.write_bytes(0, bytes) };
        }
        authentic
    }

    /// Nonce ⊕ round key 0, the counter still 0, in the low lane.
    pub(super) fn nonce_block(packet: &Packet<'_>) -> __m128i {
        // SAFETY: 16 bytes are readable.
        let nonce = unsafe { _mm_loadu_si128(packet.nonce.cast()) };
        _mm_xor_si128(_mm_insert_epi32::<3>(nonce, 0), packet.key.round_keys[0])
    }

    /// The AAD as GHASH wants it.
    pub(super) fn aad_block(packet: &Packet<'_>) -> __m128i {
        // SAFETY: 16 bytes are readable.
        reversed(unsafe { _mm_loadu_si128(packet.aad.cast()) })
    }

    /// The lengths of AAD and payload in bits, as GHASH wants them.
    pub(super) fn lengths_block(packet: &Packet<'_>) -> __m128i {
        _mm_set_epi64x(i64::from(packet.aad_bytes) * 8, packet.bytes as i64 * 8)
    }

    /// Crypts a block of which `bytes` are payload, and gives what is to be hashed, with zeros behind the payload.
    /// There are no byte masks on narrow CPUs: a block that is not whole is read and written whole, as its other bytes
    /// are the packet's own ICV, which keeps its value.
    ///
    /// # Safety
    /// `bytes` is 1 to 16, so many bytes of payload lie at `place`, and all of the ICV behind them.
    pub(super) unsafe fn crypt_last_block<const SEAL: bool>(place: *mut u8, bytes: usize, stream: __m128i) -> __m128i {
        // SAFETY: as argued above; the table has 32 bytes.
        unsafe {
            let mask = _mm_loadu_si128(MASKS.as_ptr().add(16 - bytes).cast());
            let input = _mm_loadu_si128(place.cast());
            let output = _mm_xor_si128(input, _mm_and_si128(stream, mask));
            _mm_storeu_si128(place.cast(), output);
            reversed(_mm_and_si128(if SEAL { output } else { input }, mask))
        }
    }
}

/// Read from 16 - n on: a mask of n bytes.
pub(super) static MASKS: [u8; 32] = {
    let mut masks = [0; 32];
    let mut at = 0;
    while at < 16 {
        masks[at] = 0xff;
        at += 1;
    }
    masks
};
