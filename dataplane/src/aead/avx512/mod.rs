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
//! `field.rs` holds the arithmetic, `key.rs` what is prepared once per key, `abreast.rs` and `stream.rs` the kernels,
//! `packet.rs` where a packet begins and how it ends; this file cuts a run into what each kernel likes best.
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

mod abreast;
mod field;
mod key;
mod packet;
mod stream;

pub(super) use key::Key;

use super::{Expanded, ICV_BYTES, Job};
use abreast::four_packets;
use field::lanes_apart;
use key::POWERS;
use packet::{Packet, finish};
use stream::{one_packet, pipelined};

/// The largest packet, in blocks, that [`four_packets`] takes: AAD and lengths need a power each.
const FOUR_PACKETS_BLOCKS: usize = POWERS - 2;
/// With different keys, gathering them costs more than four lanes win beyond this.
const FOUR_KEYS_BLOCKS: usize = 9;
/// Vectors of one packet that [`pipelined`] keeps in registers.
const SHORT_VECTORS: usize = 5;

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
use with_features;

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
