//! A key expanded: AES round keys and the powers of H.

use super::{
    super::prefetch_lines,
    SALT_BYTES,
    field::{P, halves_added, multiply, one_lane_features, reversed},
    missing,
    packet::{FORMS, Form},
};
use core::{arch::x86_64::*, array};
use zeroize::Zeroize;

/// Powers of H kept per key: enough for ten vectors of four lanes, and the lengths.
pub(super) const POWERS: usize = 41;

/// A key for kernels of `LANES` lanes. That it exists shows that the CPU has their features.
pub(in crate::aead) struct Key<const LANES: usize>(Schedule);

/// All that the packets of a key need: round keys and powers of H. Wiped on drop.
///
/// Powers lie in falling order, so that neighbours are what the lanes of a vector are to be multiplied with;
/// zeros behind H¹ leave lanes past the end without effect. Short packets with AES-128 need the first three lines and the last
/// one or two of the powers.
#[repr(C, align(64))]
pub(in crate::aead) struct Schedule {
    pub(super) form: &'static Form,
    /// 10 or 14.
    pub(super) rounds: usize,
    /// The first has the salt added, as it is only ever added to a nonce.
    pub(super) round_keys: [__m128i; 15],
    _line: [__m128i; 3],
    /// `powers[POWERS - i]` is Hⁱ. H⁴⁰ begins a cache line.
    pub(super) powers: [__m128i; POWERS + 3],
    /// In the place of each power: its halves' sum, in both halves. Apart from the powers, as short packets go without.
    pub(super) sums: [__m128i; POWERS + 3],
}
const _: () = assert!(core::mem::offset_of!(Schedule, powers) % 64 == 48);
const _: () = assert!(core::mem::offset_of!(Schedule, round_keys) + 11 * 16 == 3 * 64);
/// From a power to its sum.
pub(super) const SUM_BYTES: usize =
    core::mem::offset_of!(Schedule, sums) - core::mem::offset_of!(Schedule, powers);
const _: () = assert!(SUM_BYTES.is_multiple_of(64));

impl<const LANES: usize> Key<LANES> {
    /// Expands a key of 16 or 32 bytes, for packets with AAD of this length; `None` for other lengths or on a CPU that cannot
    /// use it.
    pub(in crate::aead) fn new(
        key: &[u8],
        salt: [u8; SALT_BYTES],
        aad_bytes: usize,
    ) -> Option<Self> {
        if !missing::<LANES>().is_empty() || !matches!(key.len(), 16 | 32) {
            return None;
        }
        let form = FORMS.get(aad_bytes)?;
        // SAFETY: the features of one lane are among those of every width.
        Some(Self(unsafe { Schedule::expand(key, salt, form) }))
    }

    pub(in crate::aead) fn schedule(&self) -> &Schedule {
        &self.0
    }
}

impl Drop for Schedule {
    fn drop(&mut self) {
        self.round_keys.zeroize();
        self.powers.zeroize();
        self.sums.zeroize();
    }
}

one_lane_features! {
    /// mulX of RFC 8452, appendix A: a shift by one bit, modulo g. Branches on no secret.
    fn multiply_by_x(v: __m128i) -> __m128i {
        let (low, high) = (_mm_extract_epi64::<0>(v) as u64, _mm_extract_epi64::<1>(v) as u64);
        let carry = (high >> 63).wrapping_neg();
        _mm_set_epi64x(
            (((high << 1) | (low >> 63)) ^ (carry & P as u64)) as i64,
            ((low << 1) ^ (carry & 1)) as i64,
        )
    }

    /// FIPS 197 §5.2, with the S-box of the AES instructions.
    fn expand_round_keys(key: &[u8], rounds: usize) -> [__m128i; 15] {
        let key_words = key.len() / 4;
        let mut words = [0_u32; 60];
        for (word, bytes) in words.iter_mut().zip(key.chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        let substitute = |word: u32| {
            _mm_cvtsi128_si32(_mm_aeskeygenassist_si128::<0>(_mm_set_epi32(0, 0, word as i32, 0))) as u32
        };
        let mut round_constant = 1_u32;
        for i in key_words..4 * (rounds + 1) {
            let mut word = words[i - 1];
            if i % key_words == 0 {
                word = substitute(word).rotate_right(8) ^ round_constant;
                round_constant = (round_constant << 1) ^ ((round_constant >> 7) * 0x11b);
            } else if key_words > 6 && i % key_words == 4 {
                word = substitute(word);
            }
            words[i] = words[i - key_words] ^ word;
        }
        let round_keys = array::from_fn(|i| {
            let word = |j: usize| words[4 * i + j] as i32;
            _mm_set_epi32(word(3), word(2), word(1), word(0))
        });
        words.zeroize();
        round_keys
    }
}

impl Schedule {
    /// Asks for what packets of few blocks need: the round keys that all key lengths have, and H⁸ to H¹. Five lines.
    #[inline]
    pub(in crate::aead) fn prefetch(&self) {
        prefetch_lines::<3, _>(self);
        prefetch_lines::<2, _>(&self.powers[POWERS - 8]); // begins a line, as H⁴⁰ does
    }

    #[target_feature(enable = "sse4.1,aes,pclmulqdq")]
    fn expand(key: &[u8], salt: [u8; SALT_BYTES], form: &'static Form) -> Self {
        let rounds = key.len() / 4 + 6; // FIPS 197 §5
        let mut round_keys = expand_round_keys(key, rounds);
        let mut hash_key = round_keys[0]; // AES of the zero block
        for round_key in &round_keys[1..rounds] {
            hash_key = _mm_aesenc_si128(hash_key, *round_key);
        }
        hash_key = reversed(_mm_aesenclast_si128(hash_key, round_keys[rounds]));

        let h = multiply_by_x(hash_key);
        let salt = _mm_set_epi32(0, 0, 0, i32::from_le_bytes(salt));
        round_keys[0] = _mm_xor_si128(round_keys[0], salt);
        let mut expanded = Self {
            form,
            rounds,
            round_keys,
            _line: [_mm_setzero_si128(); 3],
            powers: [_mm_setzero_si128(); POWERS + 3],
            sums: [_mm_setzero_si128(); POWERS + 3],
        };
        let mut power = h;
        for at in (0..POWERS).rev() {
            expanded.powers[at] = power;
            expanded.sums[at] = halves_added(power);
            power = multiply(power, h);
        }
        expanded
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::{mem::ManuallyDrop, slice};

    #[test]
    fn nothing_of_a_key_is_left_when_it_is_dropped() {
        let Some(Key(schedule)) = Key::<1>::new(&[0x5a; 32], [0; 4], 8) else {
            return; // no AES instructions here
        };
        let mut schedule = ManuallyDrop::new(schedule);
        let secrets = |schedule: &ManuallyDrop<Schedule>| -> Vec<u8> {
            let bytes = |lanes: &[__m128i]| -> Vec<u8> {
                // SAFETY: lanes are bytes.
                unsafe { slice::from_raw_parts(lanes.as_ptr().cast(), 16 * lanes.len()) }.to_vec()
            };
            [
                bytes(&schedule.round_keys),
                bytes(&schedule.powers),
                bytes(&schedule.sums),
            ]
            .concat()
        };
        let before = secrets(&schedule);
        assert!(before[..32].iter().all(|byte| *byte == 0x5a));
        // SAFETY: dropped once, and of what is left only plain bytes are read.
        unsafe { ManuallyDrop::drop(&mut schedule) };
        assert!(secrets(&schedule).iter().all(|byte| *byte == 0));
    }
}
