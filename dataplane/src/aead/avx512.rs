//! AES-GCM on 512-bit vectors: AVX-512 with VAES and VPCLMULQDQ.
//!
//! A vector holds four *lanes* of 16 bytes, and one instruction works on all four: a round of AES,
//! or a carry-less multiplication. Three kernels share the arithmetic, see [`Run`]:
//!
//! | packets | kernel | a vector holds |
//! |---|---|---|
//! | four in a row of equal block count, small | [`four_packets`] | one block of each of four packets |
//! | short (up to 5 vectors) | [`pipelined`] | four blocks of one packet; GHASH of the packet before runs between the AES rounds |
//! | any | [`one_packet`] | four blocks of one packet; GHASH of the group before runs between the AES rounds |
//!
//! # A packet as a stream of lanes
//!
//! ```text
//!   lane        0        1        2        3            n+1      n+2
//!          │ unused │  AAD   │ block 1│ block 2│ …  │ block n│ lengths │
//!   counter     0        1        2        3            n+1
//!                        └ J0: its AES output masks the tag
//!            ▲ 32 bytes before the payload
//! ```
//!
//! GCM (NIST SP 800-38D) encrypts block *i* with counter *i* + 1 and the tag with counter 1, and
//! hashes AAD, blocks and lengths in this order. Seen as a stream that starts 32 bytes before the
//! payload, lane number and counter are the same, lane 1 serves AES as J0 and GHASH as the AAD, and
//! no part needs a pass of its own. Lanes that are not payload are masked: never read, never written.
//! Counters differ only in the last four bytes of a block, so they are XORed onto nonce ⊕ round key 0.
//!
//! # GHASH as POLYVAL
//!
//! Byte-reversed, GHASH is POLYVAL with the key H = mulX(reverse(AES(0))) (RFC 8452, appendix A): Horner's
//! rule with the product a·b·x⁻¹²⁸ modulo g = x¹²⁸ + x¹²⁷ + x¹²⁶ + x¹²¹ + 1, bits in their natural order.
//! As g = 0, x⁻⁶⁴ = x⁶⁴ + P with P = x⁶³ + x⁶² + x⁵⁷, so for halves v = v₁x⁶⁴ + v₀
//!
//! ```text
//!   fold(v) = v·x⁻⁶⁴ = (v₀x⁶⁴ + v₁) + v₀·P                 one multiplication, one swap
//! ```
//!
//! With D = fold(H) kept beside H, the product needs four multiplications and no reduction of its own:
//!
//! ```text
//!   a·H·x⁻¹²⁸ = x⁻⁶⁴·(a₁·H + a₀·D) = R + fold(F)
//!       R = a₁·H₁ + a₀·D₁          F = a₁·H₀ + a₀·D₀
//! ```
//!
//! R and F are sums: any number of products, by different powers of H, is added up before one `fold`
//! ends them all ([`Product`]).
//!
//! # Safety
//!
//! All functions here require the CPU features of [`available`]; the only safe way in is [`Key::new`] and
//! [`Run`], which the parent module reaches after asking it. Memory is touched only through [`Packet`], whose
//! pointers come from a bounds-checked range of the arena; every access beyond a whole block is masked
//! to the payload's length, and masked lanes cause neither access nor fault.
#![allow(unsafe_code)]

use super::{Expanded, ICV_BYTES, Job};
use core::arch::x86_64::*;
use core::array;
use zeroize::Zeroize;

/// Powers of H kept per key: enough for five vectors in one go.
const POWERS: usize = 20;
/// The largest packet, in blocks, that [`four_packets`] takes: AAD and lengths need a power each.
const FOUR_PACKETS_BLOCKS: usize = POWERS - 2;
/// With different keys, gathering them costs more than four lanes win beyond this.
const FOUR_KEYS_BLOCKS: usize = 9;
/// Vectors of one packet that [`pipelined`] keeps in registers.
const SHORT_VECTORS: usize = 5;
/// P = x⁶³ + x⁶² + x⁵⁷, see the module's documentation.
const P: i64 = 0xC200_0000_0000_0000_u64 as i64;

/// Whether this CPU (and its kernel) can run this module.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("vaes")
        && is_x86_feature_detected!("vpclmulqdq")
        && is_x86_feature_detected!("aes")
        && is_x86_feature_detected!("pclmulqdq")
        && is_x86_feature_detected!("bmi2")
}

/// A key with all that its packets need: round keys and powers of H. Wiped on drop.
///
/// Powers lie in falling order, so that four neighbours are what the four lanes of a vector are to be
/// multiplied with; zeros behind H¹ leave lanes past the end without effect.
#[repr(C, align(64))]
pub(super) struct Key {
    rounds: usize,
    round_keys: [__m128i; 15],
    /// `powers[POWERS - i]` is Hⁱ.
    powers: [__m128i; POWERS + 4],
    /// `folded[POWERS - i]` is fold(Hⁱ).
    folded: [__m128i; POWERS + 4],
}

impl Key {
    /// Expands a key of 16 or 32 bytes; `None` for another length or on a CPU that cannot use it.
    pub(super) fn new(key: &[u8]) -> Option<Self> {
        if !available() || !matches!(key.len(), 16 | 32) {
            return None;
        }
        // SAFETY: the CPU has the features.
        Some(unsafe { Self::expand(key) })
    }

    fn is_aes128(&self) -> bool {
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

/// One call's packets: jobs whose keys are all [`Key`]s, over one arena.
pub(super) struct Run<'r, 'k> {
    arena: *mut u8,
    arena_bytes: usize,
    jobs: &'r mut [Job<'k>],
}

impl<'r, 'k> Run<'r, 'k> {
    /// Jobs with keys of another implementation are refused, each by its `ok`.
    pub(super) fn new(arena: &'r mut [u8], jobs: &'r mut [Job<'k>]) -> Self {
        Self {
            arena: arena.as_mut_ptr(),
            arena_bytes: arena.len(),
            jobs,
        }
    }

    /// Encrypts every payload and writes its ICV behind it.
    pub(super) fn seal(self) {
        // SAFETY: a `Key` exists only on a CPU that has the features.
        unsafe { self.all::<true>() }
    }

    /// Decrypts every payload; where the ICV is wrong, `ok` is `false` and the payload zeros.
    pub(super) fn open(self) {
        // SAFETY: as above.
        unsafe { self.all::<false>() }
    }
}

impl<'k> Run<'_, 'k> {
    /// The job as a packet; `None` if payload and ICV do not lie within the arena, or its key is none of ours.
    fn packet(&self, index: usize) -> Option<Packet<'k>> {
        let job = &self.jobs[index];
        let Expanded::Avx512(key) = &job.key.expanded else {
            return None;
        };
        let bytes = job.payload.end.checked_sub(job.payload.start)?;
        if job.payload.end.checked_add(ICV_BYTES)? > self.arena_bytes {
            return None;
        }
        Some(Packet {
            key,
            nonce: job.nonce.as_ptr(),
            aad: job.aad.as_ptr(),
            aad_bytes: usize::from(job.aad_bytes).min(job.aad.len()),
            // SAFETY: start <= end < arena_bytes.
            payload: unsafe { self.arena.add(job.payload.start) },
            bytes,
        })
    }

    /// The four packets from `first` on, if [`four_packets`] is what they want.
    fn four(&self, first: usize, one: Packet<'k>) -> Option<([Packet<'k>; 4], bool)> {
        let blocks = one.blocks();
        if !(1..=FOUR_PACKETS_BLOCKS).contains(&blocks) || first + 4 > self.jobs.len() {
            return None;
        }
        let four = [
            one,
            self.packet(first + 1)?,
            self.packet(first + 2)?,
            self.packet(first + 3)?,
        ];
        let alike = |p: &Packet| p.blocks() == blocks && p.key.rounds == one.key.rounds;
        let same_key = four.iter().all(|p| core::ptr::eq(p.key, one.key));
        (four[1..].iter().all(alike) && (same_key || blocks <= FOUR_KEYS_BLOCKS))
            .then_some((four, same_key))
    }

    /// How many packets from `first` on have as many vectors and rounds as it has.
    fn equal_vectors(&self, first: usize, one: Packet<'_>) -> usize {
        1 + (first + 1..self.jobs.len())
            .take_while(|&index| {
                self.packet(index)
                    .is_some_and(|p| p.vectors() == one.vectors() && p.key.rounds == one.key.rounds)
            })
            .count()
    }
}

/// One packet as the kernels see it. Its pointers are valid as long as the [`Run`] they come from.
#[derive(Clone, Copy)]
struct Packet<'k> {
    key: &'k Key,
    /// 12 bytes.
    nonce: *const u8,
    /// 16 bytes, zeros behind the first `aad_bytes`.
    aad: *const u8,
    aad_bytes: usize,
    /// `bytes`, and 16 of ICV behind them.
    payload: *mut u8,
    bytes: usize,
}

impl Packet<'_> {
    fn blocks(&self) -> usize {
        self.bytes.div_ceil(16)
    }

    /// Vectors of its stream of lanes, the two before the payload and the lengths included.
    fn vectors(&self) -> usize {
        (self.blocks() + 2) / 4 + 1
    }

    fn icv(&self) -> *mut u8 {
        self.payload.wrapping_add(self.bytes)
    }
}

/// Byte *i* of lane *l* of vector *v*: the number `number(v, l)` as a block's 32-bit counter.
const fn counters<const VECTORS: usize>(lanes_differ: bool) -> [[u8; 64]; VECTORS] {
    let mut table = [[0; 64]; VECTORS];
    let mut lane = 0;
    while lane < 4 * VECTORS {
        table[lane / 4][lane % 4 * 16 + 15] = if lanes_differ { lane } else { lane / 4 + 1 } as u8;
        lane += 1;
    }
    table
}

#[repr(align(64))]
struct Aligned<T>(T);

/// Counters of a stream of lanes: 0, 1, 2, 3 in the first vector.
static STREAM_COUNTERS: Aligned<[[u8; 64]; SHORT_VECTORS]> = Aligned(counters(true));
/// Counters of four packets abreast: 1 in each lane of the first vector.
static ABREAST_COUNTERS: Aligned<[[u8; 64]; FOUR_PACKETS_BLOCKS + 1]> = Aligned(counters(false));

/// A sum of products not yet reduced; see the module's documentation.
#[derive(Clone, Copy)]
struct Product {
    r: __m512i,
    f: __m512i,
}

/// Gives each function the features that [`available`] has found.
macro_rules! with_features {
    ($($item:item)*) => {
        $(
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,vaes,vpclmulqdq,aes,pclmulqdq,bmi2")]
            #[inline]
            $item
        )*
    };
}

// ---- Arithmetic ----

with_features! {
    fn zero() -> __m512i {
        _mm512_setzero_si512()
    }

    /// Four copies of one lane.
    fn all_lanes(lane: __m128i) -> __m512i {
        _mm512_broadcast_i32x4(lane)
    }

    /// The shuffle that reverses the bytes of a lane: GHASH counts bits from the other end.
    fn reversal() -> __m128i {
        _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    }

    fn reversed(x: __m512i) -> __m512i {
        _mm512_shuffle_epi8(x, all_lanes(reversal()))
    }

    fn reversed_lane(x: __m128i) -> __m128i {
        _mm_shuffle_epi8(x, reversal())
    }

    /// x·x⁻⁶⁴ modulo g.
    fn fold(x: __m128i) -> __m128i {
        _mm_xor_si128(_mm_shuffle_epi32::<0x4e>(x), _mm_clmulepi64_si128::<0x00>(x, _mm_set1_epi64x(P)))
    }

    fn no_product() -> Product {
        Product { r: zero(), f: zero() }
    }

    /// Adds the product of each lane with its power of H.
    fn multiply_add(sum: &mut Product, lanes: __m512i, power: __m512i, folded: __m512i) {
        sum.r = _mm512_ternarylogic_epi64::<0x96>(
            sum.r,
            _mm512_clmulepi64_epi128::<0x10>(lanes, folded),
            _mm512_clmulepi64_epi128::<0x11>(lanes, power),
        );
        sum.f = _mm512_ternarylogic_epi64::<0x96>(
            sum.f,
            _mm512_clmulepi64_epi128::<0x00>(lanes, folded),
            _mm512_clmulepi64_epi128::<0x01>(lanes, power),
        );
    }

    /// Reduces each lane for itself.
    fn reduce(sum: Product) -> __m512i {
        let multiple = _mm512_clmulepi64_epi128::<0x00>(sum.f, _mm512_set1_epi64(P));
        _mm512_ternarylogic_epi64::<0x96>(sum.r, _mm512_shuffle_epi32::<0x4e>(sum.f), multiple)
    }

    /// Reduces the sum of all lanes.
    fn reduce_sum(sum: Product) -> __m128i {
        _mm_xor_si128(add_lanes(sum.r), fold(add_lanes(sum.f)))
    }

    fn add_lanes(x: __m512i) -> __m128i {
        let half = _mm256_xor_si256(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64::<1>(x));
        _mm_xor_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half))
    }

    /// Powers e, e-1, e-2, e-3 of H in lanes 0 to 3, and their folds; zeros below the first power.
    fn falling_powers(key: &Key, e: usize) -> (__m512i, __m512i) {
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
    fn one_power(key: &Key, e: usize) -> (__m512i, __m512i) {
        (all_lanes(key.powers[POWERS - e]), all_lanes(key.folded[POWERS - e]))
    }
}

// ---- Keys ----

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
}

// ---- A run ----

impl<'k> Run<'_, 'k> {
    /// Cuts the run into what each kernel likes best.
    #[target_feature(
        enable = "avx512f,avx512bw,avx512dq,avx512vl,vaes,vpclmulqdq,aes,pclmulqdq,bmi2"
    )]
    fn all<const SEAL: bool>(mut self) {
        let mut at = 0;
        while at < self.jobs.len() {
            at += match self.packet(at) {
                None => {
                    self.jobs[at].ok = false;
                    1
                }
                Some(packet) if packet.key.is_aes128() => self.next::<10, SEAL>(at, packet),
                Some(packet) => self.next::<14, SEAL>(at, packet),
            };
        }
    }

    /// Handles the packets from `at` on with one kernel and says how many those were.
    #[target_feature(
        enable = "avx512f,avx512bw,avx512dq,avx512vl,vaes,vpclmulqdq,aes,pclmulqdq,bmi2"
    )]
    fn next<const R: usize, const SEAL: bool>(&mut self, at: usize, packet: Packet<'k>) -> usize {
        if let Some((four, same_key)) = self.four(at, packet) {
            let tags = if same_key {
                four_packets::<R, true, SEAL>(&four)
            } else {
                four_packets::<R, false, SEAL>(&four)
            };
            for (i, (packet, tag)) in four.iter().zip(lanes_apart(tags)).enumerate() {
                self.jobs[at + i].ok = finish::<SEAL>(packet, tag);
            }
            return 4;
        }
        match packet.vectors() {
            1 => self.short::<R, 1, SEAL>(at, packet),
            2 => self.short::<R, 2, SEAL>(at, packet),
            3 => self.short::<R, 3, SEAL>(at, packet),
            4 => self.short::<R, 4, SEAL>(at, packet),
            5 => self.short::<R, 5, SEAL>(at, packet),
            _ => {
                let tag = one_packet::<R, SEAL>(&packet);
                self.jobs[at].ok = finish::<SEAL>(&packet, tag);
                1
            }
        }
    }

    #[target_feature(
        enable = "avx512f,avx512bw,avx512dq,avx512vl,vaes,vpclmulqdq,aes,pclmulqdq,bmi2"
    )]
    fn short<const R: usize, const V: usize, const SEAL: bool>(
        &mut self,
        at: usize,
        packet: Packet<'k>,
    ) -> usize {
        let count = self.equal_vectors(at, packet);
        pipelined::<R, V, SEAL>(self, at, count);
        count
    }
}

with_features! {
    /// Writes the tag, or compares it: all bytes at once, without early exit. A payload that is not
    /// authentic is wiped, so that nobody can use it by mistake.
    fn finish<const SEAL: bool>(packet: &Packet<'_>, tag: __m128i) -> bool {
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
    fn nonce_block(packet: &Packet<'_>) -> __m128i {
        // SAFETY: 12 bytes are read.
        let nonce = unsafe { _mm_maskz_loadu_epi8(0x0fff, packet.nonce.cast()) };
        _mm_xor_si128(nonce, packet.key.round_keys[0])
    }

    /// The AAD as GHASH wants it.
    fn aad_block(packet: &Packet<'_>) -> __m128i {
        // SAFETY: 16 bytes are readable.
        reversed_lane(unsafe { _mm_loadu_si128(packet.aad.cast()) })
    }

    /// The lengths of AAD and payload in bits, as GHASH wants them.
    fn lengths_block(packet: &Packet<'_>) -> __m128i {
        _mm_set_epi64x(packet.aad_bytes as i64 * 8, packet.bytes as i64 * 8)
    }
}

// ---- Four packets abreast ----

with_features! {
    /// Seals or opens four packets of equal block count, one in each lane; gives their tags.
    fn four_packets<const R: usize, const SAME_KEY: bool, const SEAL: bool>(packets: &[Packet<'_>; 4]) -> __m512i {
        let blocks = packets[0].blocks();
        let mut work = Abreast {
            packets,
            blocks,
            nonces: lanes_of(packets.each_ref().map(|p| nonce_block(p))),
            tag_mask: zero(),
            sum: no_product(),
        };
        let aads = lanes_of(packets.each_ref().map(|p| aad_block(p)));
        let (power, folded) = abreast_power::<SAME_KEY>(packets, blocks + 2);
        multiply_add(&mut work.sum, aads, power, folded);

        // Counter 1 masks the tag, the blocks follow; equal passes keep the AES units equally busy.
        let counters = blocks + 1;
        let per_pass = counters.div_ceil(counters.div_ceil(8));
        let mut first = 0;
        while first < counters {
            match per_pass.min(counters - first) {
                1 => abreast_pass::<R, 1, SAME_KEY, SEAL>(&mut work, first),
                2 => abreast_pass::<R, 2, SAME_KEY, SEAL>(&mut work, first),
                3 => abreast_pass::<R, 3, SAME_KEY, SEAL>(&mut work, first),
                4 => abreast_pass::<R, 4, SAME_KEY, SEAL>(&mut work, first),
                5 => abreast_pass::<R, 5, SAME_KEY, SEAL>(&mut work, first),
                6 => abreast_pass::<R, 6, SAME_KEY, SEAL>(&mut work, first),
                7 => abreast_pass::<R, 7, SAME_KEY, SEAL>(&mut work, first),
                _ => abreast_pass::<R, 8, SAME_KEY, SEAL>(&mut work, first),
            }
            first += per_pass;
        }

        let lengths = lanes_of(packets.each_ref().map(|p| lengths_block(p)));
        let (power, folded) = abreast_power::<SAME_KEY>(packets, 1);
        multiply_add(&mut work.sum, lengths, power, folded);
        _mm512_xor_si512(reversed(reduce(work.sum)), work.tag_mask)
    }
}

/// Four packets on their way.
struct Abreast<'r, 'k> {
    packets: &'r [Packet<'k>; 4],
    blocks: usize,
    nonces: __m512i,
    tag_mask: __m512i,
    sum: Product,
}

with_features! {
    /// Counters `first` + 1 to `first` + N: their key stream, and what it encrypts.
    fn abreast_pass<const R: usize, const N: usize, const SAME_KEY: bool, const SEAL: bool>(
        work: &mut Abreast<'_, '_>, first: usize,
    ) {
        let mut stream = [zero(); N];
        for (i, s) in stream.iter_mut().enumerate() {
            // SAFETY: a whole vector of the table; the index is checked.
            let counter = unsafe { _mm512_load_si512(ABREAST_COUNTERS.0[first + i].as_ptr().cast()) };
            *s = _mm512_xor_si512(work.nonces, counter);
        }
        for round in 1..R {
            let key = abreast_round_key::<SAME_KEY>(work.packets, round);
            for s in &mut stream {
                *s = _mm512_aesenc_epi128(*s, key);
            }
        }
        let key = abreast_round_key::<SAME_KEY>(work.packets, R);
        for (i, s) in stream.into_iter().enumerate() {
            let s = _mm512_aesenclast_epi128(s, key);
            match first + i {
                0 => work.tag_mask = s,
                counter => abreast_block::<SAME_KEY, SEAL>(work, counter - 1, s),
            }
        }
    }

    /// Encrypts or decrypts block `j` of each packet, and hashes it.
    fn abreast_block<const SAME_KEY: bool, const SEAL: bool>(work: &mut Abreast<'_, '_>, j: usize, stream: __m512i) {
        let places = work.packets.each_ref().map(|p| p.payload.wrapping_add(16 * j));
        let cipher = if j + 1 < work.blocks {
            whole_blocks::<SEAL>(places, stream)
        } else {
            last_blocks::<SEAL>(places, work.packets.each_ref().map(|p| p.bytes - 16 * j), stream)
        };
        let (power, folded) = abreast_power::<SAME_KEY>(work.packets, work.blocks + 1 - j);
        multiply_add(&mut work.sum, reversed(cipher), power, folded);
    }

    /// One whole block at each place; gives the ciphertext. All packets have equally many blocks, and all
    /// but the last are whole.
    fn whole_blocks<const SEAL: bool>(places: [*mut u8; 4], stream: __m512i) -> __m512i {
        // SAFETY: 16 bytes of payload lie at each place.
        let input = lanes_of(places.map(|p| unsafe { _mm_loadu_si128(p.cast()) }));
        let output = _mm512_xor_si512(input, stream);
        for (place, lane) in places.into_iter().zip(lanes_apart(output)) {
            // SAFETY: as above.
            unsafe { _mm_storeu_si128(place.cast(), lane) };
        }
        if SEAL { output } else { input }
    }

    /// The last block, of 1 to 16 `bytes`, at each place: only they are touched, the rest hashes as zeros.
    fn last_blocks<const SEAL: bool>(places: [*mut u8; 4], bytes: [usize; 4], stream: __m512i) -> __m512i {
        let masks = bytes.map(|bytes| _bzhi_u32(0xffff, bytes as u32) as u16);
        // SAFETY: masked to the payload.
        let lane = |i: usize| unsafe { _mm_maskz_loadu_epi8(masks[i], places[i].cast()) };
        let input = lanes_of([lane(0), lane(1), lane(2), lane(3)]);
        let output = _mm512_xor_si512(input, stream);
        for (i, lane) in lanes_apart(output).into_iter().enumerate() {
            // SAFETY: masked to the payload.
            unsafe { _mm_mask_storeu_epi8(places[i].cast(), masks[i], lane) };
        }
        let mask = masks.iter().rev().fold(0_u64, |all, mask| all << 16 | u64::from(*mask));
        if SEAL { _mm512_maskz_mov_epi8(mask, output) } else { input }
    }

    fn abreast_round_key<const SAME_KEY: bool>(packets: &[Packet<'_>; 4], round: usize) -> __m512i {
        if SAME_KEY {
            all_lanes(packets[0].key.round_keys[round])
        } else {
            lanes_of(packets.each_ref().map(|p| p.key.round_keys[round]))
        }
    }

    fn abreast_power<const SAME_KEY: bool>(packets: &[Packet<'_>; 4], e: usize) -> (__m512i, __m512i) {
        if SAME_KEY {
            one_power(packets[0].key, e)
        } else {
            (
                lanes_of(packets.each_ref().map(|p| p.key.powers[POWERS - e])),
                lanes_of(packets.each_ref().map(|p| p.key.folded[POWERS - e])),
            )
        }
    }

    fn lanes_of(lanes: [__m128i; 4]) -> __m512i {
        let x = _mm512_castsi128_si512(lanes[0]);
        let x = _mm512_inserti32x4::<1>(x, lanes[1]);
        let x = _mm512_inserti32x4::<2>(x, lanes[2]);
        _mm512_inserti32x4::<3>(x, lanes[3])
    }

    fn lanes_apart(x: __m512i) -> [__m128i; 4] {
        [
            _mm512_castsi512_si128(x),
            _mm512_extracti32x4_epi32::<1>(x),
            _mm512_extracti32x4_epi32::<2>(x),
            _mm512_extracti32x4_epi32::<3>(x),
        ]
    }
}

// ---- One packet, four blocks a vector ----

with_features! {
    /// The bytes of vector `v` of a stream that are payload, as a mask. `end` counts from the stream's start.
    fn payload_mask(v: usize, end: usize) -> u64 {
        let mask = _bzhi_u64(u64::MAX, end.saturating_sub(64 * v).min(64) as u32);
        if v == 0 { mask & (u64::MAX << 32) } else { mask }
    }

    /// Puts the lengths into the lane behind the last block, where `lane` is its number.
    fn with_lengths(vector: __m512i, lane: usize, lengths: __m128i) -> __m512i {
        _mm512_mask_broadcast_i32x4(vector, 0xf << (4 * (lane % 4)), lengths)
    }

    /// Seals or opens `count` packets of V vectors each, any keys: while AES works on a packet, the
    /// multiplier hashes the one before.
    fn pipelined<const R: usize, const V: usize, const SEAL: bool>(run: &mut Run<'_, '_>, at: usize, count: usize) {
        let mut previous: Option<Hashing<'_, V>> = None;
        for index in at..at + count {
            let Some(packet) = run.packet(index) else { return };
            let nonce = all_lanes(nonce_block(&packet));
            let mut stream = [zero(); V];
            for (v, s) in stream.iter_mut().enumerate() {
                *s = _mm512_xor_si512(nonce, stream_counter(v));
            }
            let mut sum = no_product();
            for round in 1..R {
                let key = all_lanes(packet.key.round_keys[round]);
                for s in &mut stream {
                    *s = _mm512_aesenc_epi128(*s, key);
                }
                if round <= V && let Some(hashing) = &previous {
                    hash_vector(&mut sum, hashing, round - 1);
                }
            }
            let key = all_lanes(packet.key.round_keys[R]);
            for s in &mut stream {
                *s = _mm512_aesenclast_epi128(*s, key);
            }
            if let Some(hashing) = &previous {
                run.jobs[index - 1].ok = finish::<SEAL>(&hashing.packet, tag_of(hashing, sum));
            }

            let end = packet.bytes + 32;
            let lanes = end.div_ceil(16); // with the two before the payload: the lengths' number
            let mut blocks = [zero(); V];
            for v in 0..V {
                let place = packet.payload.wrapping_sub(32).wrapping_add(64 * v);
                let mask = if v == 0 || v + 2 >= V { payload_mask(v, end) } else { u64::MAX };
                // SAFETY: masked to the payload.
                let input = unsafe { _mm512_maskz_loadu_epi8(mask, place.cast()) };
                let output = _mm512_xor_si512(input, stream[v]);
                // SAFETY: masked to the payload.
                unsafe { _mm512_mask_storeu_epi8(place.cast(), mask, output) };
                blocks[v] = reversed(if SEAL { _mm512_maskz_mov_epi8(mask, output) } else { input });
            }
            blocks[0] = _mm512_mask_broadcast_i32x4(blocks[0], 0x00f0, aad_block(&packet));
            blocks[V - 1] = with_lengths(blocks[V - 1], lanes, lengths_block(&packet));
            previous = Some(Hashing {
                packet,
                blocks,
                first_power: lanes + 1,
                tag_mask: _mm512_extracti32x4_epi32::<1>(stream[0]),
            });
        }
        if let Some(hashing) = &previous {
            let mut sum = no_product();
            for v in 0..V {
                hash_vector(&mut sum, hashing, v);
            }
            run.jobs[at + count - 1].ok = finish::<SEAL>(&hashing.packet, tag_of(hashing, sum));
        }
    }

    fn stream_counter(v: usize) -> __m512i {
        // SAFETY: a whole vector of the table; the index is checked.
        unsafe { _mm512_load_si512(STREAM_COUNTERS.0[v].as_ptr().cast()) }
    }

    fn hash_vector<const V: usize>(sum: &mut Product, hashing: &Hashing<'_, V>, v: usize) {
        let (power, folded) = falling_powers(hashing.packet.key, hashing.first_power - 4 * v);
        multiply_add(sum, hashing.blocks[v], power, folded);
    }

    fn tag_of<const V: usize>(hashing: &Hashing<'_, V>, sum: Product) -> __m128i {
        _mm_xor_si128(reversed_lane(reduce_sum(sum)), hashing.tag_mask)
    }
}

/// A packet that is encrypted or read, and still to be hashed.
struct Hashing<'k, const V: usize> {
    packet: Packet<'k>,
    /// Byte-reversed; AAD and lengths are in their lanes.
    blocks: [__m512i; V],
    /// The power of H of lane 0.
    first_power: usize,
    tag_mask: __m128i,
}

/// A long packet on its way through [`one_packet`].
struct Stream<'r, 'k> {
    packet: &'r Packet<'k>,
    nonce: __m512i,
    /// The hash of all groups so far, in the lanes it is to be added to next.
    hash: __m512i,
    tag_mask: __m128i,
}

with_features! {
    /// Seals or opens one packet of more than [`SHORT_VECTORS`] vectors: groups of four, then the
    /// rest. When sealing, the hash runs a group behind; when opening, it has its input at once.
    fn one_packet<const R: usize, const SEAL: bool>(packet: &Packet<'_>) -> __m128i {
        let vectors = packet.vectors();
        let rest = (vectors - 2) % 4 + 2; // 2 to 5: masks are needed in the last two only
        let groups = (vectors - rest) / 4;
        let mut stream = Stream {
            packet,
            nonce: all_lanes(nonce_block(packet)),
            hash: _mm512_maskz_broadcast_i32x4(0x00f0, aad_block(packet)),
            tag_mask: _mm_setzero_si128(),
        };
        let mut sealed = [zero(); 4];
        for group in 0..groups {
            full_group::<R, SEAL>(&mut stream, group, &mut sealed);
        }
        let sum = match rest {
            2 => last_group::<R, 2, SEAL>(&mut stream, groups, &sealed),
            3 => last_group::<R, 3, SEAL>(&mut stream, groups, &sealed),
            4 => last_group::<R, 4, SEAL>(&mut stream, groups, &sealed),
            _ => last_group::<R, 5, SEAL>(&mut stream, groups, &sealed),
        };
        _mm_xor_si128(reversed_lane(sum), stream.tag_mask)
    }

    /// Vector `v` of a group's counters. The fifth would carry into the bits of the group's number, so
    /// it counts as the first of the next group.
    fn group_counter(nonce: __m512i, group: usize, v: usize) -> __m512i {
        let start = 16 * (group + v / 4) as u32;
        let start = _mm512_maskz_set1_epi32(0x8888, start.swap_bytes() as i32);
        _mm512_ternarylogic_epi64::<0x96>(nonce, start, stream_counter(v % 4))
    }

    /// One vector of a group of four: lane l carries the hash times H¹⁶, so that groups add up lane by lane.
    fn hash_in_group(sum: &mut Product, stream: &Stream<'_, '_>, group: &[__m512i; 4], v: usize) {
        let mut lanes = reversed(group[v]);
        if v == 0 {
            lanes = _mm512_xor_si512(lanes, stream.hash);
        }
        let (power, folded) = one_power(stream.packet.key, 16 - 4 * v);
        multiply_add(sum, lanes, power, folded);
    }

    /// Group number `group`: sixteen lanes, all payload but the first two of the first group. `sealed` is the
    /// ciphertext of the group before, and then of this one.
    fn full_group<const R: usize, const SEAL: bool>(stream: &mut Stream<'_, '_>, group: usize, sealed: &mut [__m512i; 4]) {
        let key = stream.packet.key;
        let place = stream.packet.payload.wrapping_sub(32).wrapping_add(256 * group);
        let mask = if group == 0 { u64::MAX << 32 } else { u64::MAX };
        let mut s: [__m512i; 4] = array::from_fn(|v| group_counter(stream.nonce, group, v));
        let input: [__m512i; 4] = array::from_fn(|v| {
            // SAFETY: the first vector is masked to the payload, the others lie within it: at least two
            // vectors follow the last full group.
            unsafe {
                match v {
                    0 => _mm512_maskz_loadu_epi8(mask, place.cast()),
                    _ => _mm512_loadu_si512(place.wrapping_add(64 * v).cast()),
                }
            }
        });
        let hashes = !SEAL || group > 0;
        let cipher = if SEAL { *sealed } else { input };
        let mut sum = no_product();
        for round in 1..R {
            let round_key = all_lanes(key.round_keys[round]);
            for s in &mut s {
                *s = _mm512_aesenc_epi128(*s, round_key);
            }
            if hashes && round % 2 == 1 && round < 8 {
                hash_in_group(&mut sum, stream, &cipher, round / 2);
            }
        }
        // The data goes into the last round key: AES then ends with the output.
        let round_key = all_lanes(key.round_keys[R]);
        s[0] = _mm512_aesenclast_epi128(s[0], round_key);
        if group == 0 {
            stream.tag_mask = _mm512_extracti32x4_epi32::<1>(s[0]);
        }
        s[0] = _mm512_xor_si512(s[0], input[0]);
        for v in 1..4 {
            s[v] = _mm512_aesenclast_epi128(s[v], _mm512_xor_si512(round_key, input[v]));
        }
        if hashes {
            stream.hash = reduce(sum);
        }
        // SAFETY: as for the loads.
        unsafe {
            _mm512_mask_storeu_epi8(place.cast(), mask, s[0]);
            for (v, s) in s.iter().enumerate().skip(1) {
                _mm512_storeu_si512(place.wrapping_add(64 * v).cast(), *s);
            }
        }
        if SEAL {
            s[0] = _mm512_maskz_mov_epi8(mask, s[0]);
            *sealed = s;
        }
    }

    /// The last V vectors with the lengths, and what is still to be hashed; gives the hash.
    fn last_group<const R: usize, const V: usize, const SEAL: bool>(
        stream: &mut Stream<'_, '_>, group: usize, sealed: &[__m512i; 4],
    ) -> __m128i {
        let packet = stream.packet;
        let key = packet.key;
        let place = packet.payload.wrapping_sub(32).wrapping_add(256 * group);
        let end = packet.bytes + 32 - 256 * group;
        let lanes = end.div_ceil(16);
        let mask = |v: usize| {
            if v + 2 >= V { _bzhi_u64(u64::MAX, end.saturating_sub(64 * v).min(64) as u32) } else { u64::MAX }
        };
        let mut s: [__m512i; V] = array::from_fn(|v| group_counter(stream.nonce, group, v));
        // SAFETY: masked to the payload.
        let input: [__m512i; V] =
            array::from_fn(|v| unsafe { _mm512_maskz_loadu_epi8(mask(v), place.wrapping_add(64 * v).cast()) });

        let hash = |sum: &mut Product, v: usize, cipher: __m512i, before: __m512i| {
            let mut blocks = reversed(cipher);
            if v == 0 {
                blocks = _mm512_xor_si512(blocks, before);
            }
            if v + 1 == V {
                blocks = with_lengths(blocks, lanes, lengths_block(packet));
            }
            let (power, folded) = falling_powers(key, lanes + 1 - 4 * v);
            multiply_add(sum, blocks, power, folded);
        };
        let mut before = no_product();
        let mut sum = no_product();
        for round in 1..R {
            let round_key = all_lanes(key.round_keys[round]);
            for s in &mut s {
                *s = _mm512_aesenc_epi128(*s, round_key);
            }
            if SEAL && round % 2 == 1 && round < 8 {
                hash_in_group(&mut before, stream, sealed, round / 2);
            }
            if !SEAL && round + V >= R {
                let v = round + V - R;
                hash(&mut sum, v, input[v], stream.hash);
            }
        }
        if SEAL {
            stream.hash = reduce(before);
        }
        let round_key = all_lanes(key.round_keys[R]);
        for v in 0..V {
            let output = _mm512_xor_si512(_mm512_aesenclast_epi128(s[v], round_key), input[v]);
            // SAFETY: masked to the payload.
            unsafe { _mm512_mask_storeu_epi8(place.wrapping_add(64 * v).cast(), mask(v), output) };
            if SEAL {
                hash(&mut sum, v, _mm512_maskz_mov_epi8(mask(v), output), stream.hash);
            }
        }
        reduce_sum(sum)
    }
}
