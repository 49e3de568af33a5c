//! A key expanded: AES round keys and the powers of H.

use super::{
    available,
    field::{P, all_lanes, fold, multiply_add, no_product, reduce_sum, reversed_lane},
    with_features,
};
use core::{arch::x86_64::*, array};
use zeroize::Zeroize;

/// Powers of H kept per key: enough for five vectors in one go.
pub(super) const POWERS: usize = 20;

/// A key with all that its packets need: round keys and powers of H. Wiped on drop.
///
/// Powers lie in falling order, so that four neighbours are what the four lanes of a vector are to be
/// multiplied with; zeros behind H¹ leave lanes past the end without effect.
#[repr(C, align(64))]
pub(in crate::aead) struct Key {
    pub(super) rounds: usize,
    pub(super) round_keys: [__m128i; 15],
    /// `powers[POWERS - i]` is Hⁱ.
    pub(super) powers: [__m128i; POWERS + 4],
    /// `folded[POWERS - i]` is fold(Hⁱ).
    pub(super) folded: [__m128i; POWERS + 4],
}

impl Key {
    /// Expands a key of 16 or 32 bytes; `None` for another length or on a CPU that cannot use it.
    pub(in crate::aead) fn new(key: &[u8]) -> Option<Self> {
        if !available() || !matches!(key.len(), 16 | 32) {
            return None;
        }
        // SAFETY: the CPU has the features.
        Some(unsafe { Self::expand(key) })
    }

    pub(super) fn is_aes128(&self) -> bool {
        self.rounds == 10
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.round_keys.zeroize();
        self.powers.zeroize();
        self.folded.zeroize();
    }
}

impl Key {
    #[target_feature(
        enable = "avx512f,avx512bw,avx512dq,avx512vl,vaes,vpclmulqdq,aes,pclmulqdq,bmi2"
    )]
    fn expand(key: &[u8]) -> Self {
        let rounds = key.len() / 4 + 6; // FIPS 197 §5
        let round_keys = expand_round_keys(key, rounds);
        let mut hash_key = round_keys[0]; // AES of the zero block
        for round_key in &round_keys[1..rounds] {
            hash_key = _mm_aesenc_si128(hash_key, *round_key);
        }
        hash_key = reversed_lane(_mm_aesenclast_si128(hash_key, round_keys[rounds]));

        let h = multiply_by_x(hash_key);
        let h_folded = fold(h);
        let mut expanded = Self {
            rounds,
            round_keys,
            powers: [_mm_setzero_si128(); POWERS + 4],
            folded: [_mm_setzero_si128(); POWERS + 4],
        };
        let mut power = h;
        for at in (0..POWERS).rev() {
            expanded.powers[at] = power;
            expanded.folded[at] = fold(power);
            let mut next = no_product();
            let lane = |x| _mm512_zextsi128_si512(x);
            multiply_add(&mut next, lane(power), lane(h), lane(h_folded));
            power = reduce_sum(next);
        }
        expanded
    }
}

with_features! {
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

    /// Powers e, e-1, e-2, e-3 of H in lanes 0 to 3, and their folds; zeros below the first power.
    pub(super) fn falling_powers(key: &Key, e: usize) -> (__m512i, __m512i) {
        debug_assert!(e <= POWERS);
        let at = POWERS - e;
        // SAFETY: e <= POWERS, and the arrays are four longer: at + 4 <= POWERS + 4.
        unsafe {
            (
                _mm512_loadu_si512(key.powers.as_ptr().add(at).cast()),
                _mm512_loadu_si512(key.folded.as_ptr().add(at).cast()),
            )
        }
    }

    /// Power e of H in every lane, and its fold.
    pub(super) fn one_power(key: &Key, e: usize) -> (__m512i, __m512i) {
        (all_lanes(key.powers[POWERS - e]), all_lanes(key.folded[POWERS - e]))
    }
}
