//! One packet as the kernels see it, how it begins and how it ends.

use super::{
    AAD_BYTES_MAX, HEADER_BYTES, Job,
    field::{one_lane_features, reversed},
    key::Schedule,
};
use core::arch::x86_64::*;

/// One packet as the kernels see it. Its pointer is valid as long as the [`super::Run`] it comes from.
#[derive(Clone, Copy)]
pub(super) struct Packet<'k, 'r> {
    pub(super) key: &'k Schedule,
    pub(super) job: &'r Job,
    /// 16 bytes of header before it, the job's bytes, and 16 of ICV behind them.
    pub(super) payload: *mut u8,
}

impl Packet<'_, '_> {
    pub(super) fn bytes(&self) -> usize {
        self.job.bytes as usize
    }

    pub(super) fn blocks(&self) -> usize {
        self.bytes().div_ceil(16)
    }
}

/// Where SPI, sequence number and IV are.
pub(super) fn header(payload: *mut u8) -> *const u8 {
    payload.wrapping_sub(HEADER_BYTES)
}

/// Where the ICV is.
pub(super) fn icv(payload: *mut u8, bytes: usize) -> *mut u8 {
    payload.wrapping_add(bytes)
}

one_lane_features! {
    /// Writes the tag, or compares it.
    pub(super) fn finish<const SEAL: bool>(payload: *mut u8, bytes: usize, tag: __m128i) -> bool {
        if SEAL {
            // SAFETY: 16 bytes of ICV lie behind the payload.
            unsafe { _mm_storeu_si128(icv(payload, bytes).cast(), tag) };
            return true;
        }
        let received = received(payload, bytes);
        is_authentic(payload, bytes, tag, received)
    }

    /// The ICV of a packet to be opened.
    pub(super) fn received(payload: *mut u8, bytes: usize) -> __m128i {
        // SAFETY: 16 bytes of ICV lie behind the payload.
        unsafe { _mm_loadu_si128(icv(payload, bytes).cast()) }
    }

    /// Compares the tag with the ICV: all bytes at once, without early exit. A payload that is not authentic is wiped, so that
    /// nobody can use it by mistake.
    pub(super) fn is_authentic(payload: *mut u8, bytes: usize, tag: __m128i, received: __m128i) -> bool {
        let difference = _mm_xor_si128(tag, received);
        let authentic = _mm_testz_si128(difference, difference) == 1;
        if !authentic {
            // SAFETY: the payload's own bytes.
            unsafe { payload.write_bytes(0, bytes) };
        }
        authentic
    }

    /// Nonce ⊕ round key 0, the counter still 0: the key has the salt.
    pub(super) fn nonce_block(packet: &Packet<'_, '_>) -> __m128i {
        _mm_xor_si128(_mm_shuffle_epi8(header_block(packet), iv_shuffle()), packet.key.round_keys[0])
    }

    /// The shuffle from a packet's header to its nonce.
    pub(super) fn iv_shuffle() -> __m128i {
        _mm_set_epi8(-1, -1, -1, -1, 15, 14, 13, 12, 11, 10, 9, 8, -1, -1, -1, -1)
    }

    /// The AAD as GHASH wants it: SPI and number of the header, what else there is from the job.
    pub(super) fn aad_block(packet: &Packet<'_, '_>) -> __m128i {
        // SAFETY: a job has 16 bytes.
        let job = unsafe { _mm_load_si128((&raw const *packet.job).cast()) };
        _mm_shuffle_epi8(_mm_blend_epi16::<0xf0>(header_block(packet), job), packet.key.form.aad)
    }

    fn header_block(packet: &Packet<'_, '_>) -> __m128i {
        // SAFETY: 16 bytes of header lie before the payload.
        unsafe { _mm_loadu_si128(header(packet.payload).cast()) }
    }

    /// The lengths of AAD and payload in bits, as GHASH wants them.
    pub(super) fn lengths_block(packet: &Packet<'_, '_>) -> __m128i {
        _mm_or_si128(packet.key.form.lengths, _mm_set_epi64x(0, packet.bytes() as i64 * 8))
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

/// How AAD of one length is put together.
#[repr(C)]
pub(super) struct Form {
    /// The shuffle from SPI, low half of the number, high half and what is more (see [`Job`]), to AAD byte-reversed.
    pub(super) aad: __m128i,
    /// The length in bits, in the place that GHASH wants it in.
    pub(super) lengths: __m128i,
}

/// By length.
pub(super) static FORMS: [Form; AAD_BYTES_MAX + 1] = {
    let mut forms = [const { form(0) }; AAD_BYTES_MAX + 1];
    let mut bytes = 0;
    while bytes <= AAD_BYTES_MAX {
        forms[bytes] = form(bytes);
        bytes += 1;
    }
    forms
};

const fn form(bytes: usize) -> Form {
    // The header's words lie as they are sent, the job's as numbers of this CPU.
    const SHORT: [u8; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
    const EXTENDED: [u8; 16] = [0, 1, 2, 3, 11, 10, 9, 8, 4, 5, 6, 7, 15, 14, 13, 12];
    let mut aad = [0x80; 16]; // zero
    let mut at = 0;
    while at < bytes {
        aad[15 - at] = if bytes <= SHORT.len() {
            SHORT[at]
        } else {
            EXTENDED[at]
        };
        at += 1;
    }
    let lengths = [0, 8 * bytes as u64];
    // SAFETY: all are sixteen bytes of any value.
    unsafe {
        Form {
            aad: core::mem::transmute::<[u8; 16], __m128i>(aad),
            lengths: core::mem::transmute::<[u64; 2], __m128i>(lengths),
        }
    }
}
