//! AES-GCM with the instructions of x86-64: three widths of one arithmetic.
//!
//! A vector holds one, two or four *lanes* of 16 bytes, and one instruction works on all of them: a round of AES, or a
//! carry-less multiplication.
//!
//! | file | lanes | for CPUs with |
//! |---|---|---|
//! | `four_lanes.rs` | 4 | AVX-512, VAES, VPCLMULQDQ: Ice Lake, Zen 4 and later |
//! | `two_lanes.rs` | 2 | AVX2, VAES, VPCLMULQDQ: Zen 3, Alder Lake and its small cores |
//! | `one_lane.rs` | 1 | AES-NI, PCLMULQDQ, SSE4.1: everything of the last decade, small appliances without AVX included |
//! | `parts.rs` | all | the kernel of any run: a pipeline of parts of packets; compiled once for each width |
//! | `abreast.rs` | 4 | the kernel of short packets: four of equal block count, one in each lane |
//! | `chunk.rs` | 4 | which packets go abreast |
//! | `field.rs`, `key.rs`, `packet.rs` | | what all share: arithmetic of one lane, what is prepared per key, how a packet begins and ends |
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
//! no part needs a pass of its own. Counters differ only in the last four bytes of a block, so they are XORed onto
//! nonce ⊕ round key 0; and as that key is used for nothing else, the salt is added to it once and for all.
//!
//! Nonce and AAD are no one's to prepare: the 16 bytes before a payload (SPI, number, IV) are read as one block, from which
//! a shuffle makes the nonce, and another the AAD, which with extended numbers takes the high half out of the job.
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
//! A product is kept in three parts, which takes three multiplications (Karatsuba):
//!
//! ```text
//!   low = a₀·b₀     high = a₁·b₁     cross = (a₀+a₁)·(b₀+b₁)
//!   a·b = high·x¹²⁸ + middle·x⁶⁴ + low     with     middle = cross + low + high
//! ```
//!
//! and reduced by two folds:
//!
//! ```text
//!   a·b·x⁻¹²⁸ = high + fold(middle + fold(low))
//! ```
//!
//! Parts are sums: any number of products, by different powers of H, is added up before one reduction ends
//! them all. So the blocks of a packet are multiplied by falling powers of H independently of each other
//! (m₁·Hⁿ + m₂·Hⁿ⁻¹ + … is Horner's rule written out). The multiplier is the bottleneck on most CPUs, so three
//! multiplications beat the four that a second, folded table would allow with a cheaper reduction.
//!
//! A key keeps H¹ to H⁴¹ and, apart from them, the sum b₀+b₁ of the halves of each: 1728 bytes with the round keys, of which
//! 704 are the sums. Packets abreast under different keys add up their halves anew instead, as of many keys each line is
//! far away.
//!
//! # Where the cycles go
//!
//! A vector costs ten rounds of AES and three multiplications, on units of their own that work at the same time. Cores of
//! the Sapphire Rapids class are bound by AES (one a cycle: 10 a vector). Zen 5 does two rounds a cycle and four vector
//! instructions in all, of any width; but a multiplication is three of them, ends every other cycle, and takes a cycle of
//! its own on the way into the core, which others share by eight. There, fewer instructions are what makes a packet
//! cheaper: hence three multiplications, powers at fixed distances from one pointer, four packets abreast.
//!
//! Then there is waiting. From nonce to tag, ten rounds, a multiplication, a sum over lanes and two folds, one after the
//! other, are a hundred cycles at least, and a core looks some 450 instructions ahead: about one short packet by four.
//! Hence both kernels write the GHASH of what is behind between the rounds of what is next.
//!
//! Core cycles a packet, sealing with AES-128, one key, 64 packets a run that lie in the cache (`esplane bench --filter aead-seal`,
//! minima, each implementation forced in turn on one Zen 5 core). `portable` is the `aes-gcm` crate, with the vector instructions
//! that it finds by itself.
//!
//! | | 64 B | 128 B | 256 B | 512 B | 1024 B | 1400 B | 8960 B | IMIX |
//! |---|---|---|---|---|---|---|---|---|
//! | `avx512` | 24 | 37 | 57 | 109 | 185 | 246 | 1360 | 74 |
//! | `avx512`, AES-256 | 26 | | | | | 273 | | |
//! | `vaes256` | 63 | 76 | 137 | 224 | 396 | 492 | 2970 | 153 |
//! | `aesni` | 74 | 122 | 206 | 369 | 698 | 945 | 6000 | 253 |
//! | `portable` | 536 | 601 | 732 | 996 | 1580 | 2340 | 10200 | 850 |
//!
//! # Nothing secret steers
//!
//! No branch and no address depends on key, plaintext or tag; lengths and the verdict are public. AES and
//! multiplication are single instructions of fixed time. A tag is compared in one piece, see
//! `packet::is_authentic`; four abreast at once, and one by one only where one of them is wrong.
//!
//! # Safety
//!
//! The functions of a width require its CPU features. The only safe way in is [`Key::new`], which asks the CPU, and
//! [`Run`], which needs a [`Key`] of its width for each packet it touches. Memory is reached only through
//! `Packet` and `Four`, whose pointers come from a range of the arena that was found to hold header, payload **and** ICV
//! (`Run::packet`; of sixteen jobs at once, `chunk::sorted`): blocks that are not whole are read whole where the rest of
//! them is the packet's own ICV, and masked or kept when written.
#![allow(unsafe_code)]
#![allow(
    clippy::duplicate_mod,
    reason = "`parts.rs` is compiled once per width, with the features of each"
)]

/// Writes out a block for each round of AES but the last, of 10 or 14 in all. The compiler would not unroll a loop as long
/// as that, and registers cannot be indexed.
macro_rules! each_round {
    ($round:ident of $rounds:ident $body:block) => {
        each_round!(@ $round $body 1 2 3 4 5 6 7 8 9);
        if $rounds == 14 {
            each_round!(@ $round $body 10 11 12 13);
        }
    };
    (@ $round:ident $body:block $($number:literal)*) => {
        $({
            let $round: usize = $number;
            $body
        })*
    };
}

mod field;
mod four_lanes;
mod key;
mod one_lane;
mod packet;
mod two_lanes;

pub(super) use key::Key;

use super::{AAD_BYTES_MAX, Expanded, HEADER_BYTES, ICV_BYTES, Job, Keyed, SALT_BYTES};
use crate::Arena;
use core::ops::Range;
use key::Schedule;
use packet::Packet;

/// The named CPU features that this CPU (or its kernel) lacks.
macro_rules! lacking {
    ($($name:tt),*) => {{
        let mut lacking = Vec::new();
        $(if !is_x86_feature_detected!($name) { lacking.push($name); })*
        lacking
    }};
}

/// The features that this CPU lacks to run the kernels of `LANES` lanes.
#[rustfmt::skip]
pub(super) fn missing<const LANES: usize>() -> Vec<&'static str> {
    match LANES {
        4 => lacking!["avx512f", "avx512bw", "avx512dq", "avx512vl", "vaes", "vpclmulqdq", "aes", "pclmulqdq", "bmi2"],
        2 => lacking!["avx2", "vaes", "vpclmulqdq", "aes", "pclmulqdq"],
        _ => lacking!["sse4.1", "aes", "pclmulqdq"],
    }
}

/// Packets of keys of one width: jobs over one arena.
pub(super) struct Run<'r, 'k> {
    arena: *mut u8,
    arena_bytes: usize,
    keys: &'r [Keyed<'k>],
    /// All of the call, of which these are the run's.
    jobs: &'r [Job],
    at: Range<usize>,
    /// A bit each: done.
    done: u64,
}

impl<'r, 'k> Run<'r, 'k> {
    /// Of `jobs` those `at`, which lie within; at most 64. Those that do not lie within the arena are refused.
    pub(super) fn new(
        arena: &'r mut Arena<'_>,
        keys: &'r [Keyed<'k>],
        jobs: &'r [Job],
        at: Range<usize>,
    ) -> Self {
        Self {
            arena: arena.as_mut_ptr(),
            arena_bytes: arena.len(),
            keys,
            jobs,
            at,
            done: 0,
        }
    }

    /// Encrypts every payload and writes its ICV behind it; or decrypts every payload, and where the ICV is wrong, leaves
    /// zeros. Answers which are done, a bit each. Any key of the width shows that the CPU can do it; jobs with keys of
    /// another kind are refused.
    pub(super) fn crypt<const LANES: usize, const SEAL: bool>(mut self, _: &Key<LANES>) -> u64 {
        // SAFETY: a key of a width exists only on a CPU that has its features.
        unsafe {
            match LANES {
                4 => four_lanes::abreast::all::<SEAL>(&mut self),
                2 => two_lanes::parts::all::<SEAL>(&mut self),
                _ => one_lane::parts::all::<SEAL>(&mut self),
            }
        }
        self.done
    }

    /// The keys of this width, each with its jobs.
    #[inline(always)]
    fn keys<const LANES: usize>(
        &self,
    ) -> impl Iterator<Item = (&'k Schedule, Range<usize>)> + use<'r, 'k, LANES> {
        let Range { mut start, end } = self.at.clone();
        self.keys.iter().filter_map(move |keyed| {
            let jobs = start..keyed.end.clamp(start, end);
            start = jobs.end;
            Some((schedule::<LANES>(&keyed.key.expanded)?, jobs))
        })
    }

    /// Takes back that one of its jobs is done.
    #[inline(always)]
    fn refuse(&mut self, job: &Job) {
        // SAFETY: both are of one slice.
        let index = unsafe { (&raw const *job).offset_from(self.jobs.as_ptr()) };
        self.done &= !(1_u64.wrapping_shl(index as u32));
    }

    /// The job as a packet; `None` if header, payload and ICV do not lie within the arena.
    #[inline(always)]
    fn packet(&self, key: &'k Schedule, index: usize) -> Option<Packet<'k, 'r>> {
        let job = &self.jobs[index];
        let (start, bytes) = (job.start as usize, job.bytes as usize);
        if start < HEADER_BYTES || start + bytes + ICV_BYTES > self.arena_bytes {
            return None;
        }
        Some(Packet {
            key,
            job,
            // SAFETY: start < arena_bytes.
            payload: unsafe { self.arena.add(start) },
        })
    }
}

/// What the key holds, if it is one of this width.
#[inline(always)]
fn schedule<const LANES: usize>(expanded: &Expanded) -> Option<&Schedule> {
    match expanded {
        Expanded::Avx512(key) if LANES == 4 => Some(key.schedule()),
        Expanded::Vaes256(key) if LANES == 2 => Some(key.schedule()),
        Expanded::AesNi(key) if LANES == 1 => Some(key.schedule()),
        _ => None,
    }
}

/// Byte *i* of block *b*: the number `b` as a block's 32-bit counter.
const fn counters<const BLOCKS: usize>() -> [[u8; 16]; BLOCKS] {
    let mut table = [[0; 16]; BLOCKS];
    let mut number = 0;
    while number < BLOCKS {
        table[number][15] = number as u8;
        number += 1;
    }
    table
}

/// Counters of a stream of lanes.
static COUNTERS: Aligned<[[u8; 16]; COUNTERS_BLOCKS]> = Aligned(counters());
const COUNTERS_BLOCKS: usize = 128;

#[repr(align(64))]
struct Aligned<T>(T);
