//! The kernel of all widths: any run of packets as one pipeline of parts. `one_lane.rs`, `two_lanes.rs` and
//! `four_lanes.rs` each compile this file with vectors of theirs.
//!
//! A part is up to eight or ten vectors of one packet's stream of lanes. While AES works on a part, the multiplier
//! hashes the part before, of the same packet or of the one before:
//!
//! ```text
//!            packet 1              packet 2     packet 3
//!   AES      part 1     part 2     part 1       part 1
//!   GHASH               part 1     part 2, tag  part 1, tag    part 1, tag
//! ```
//!
//! So neither unit waits for the other, nor for the end of a packet, and short packets fill the gaps of each other.

use super::{super::*, *};
use crate::aead::{
    set_of,
    x86::{
        field,
        key::{POWERS, SUM_BYTES, Schedule},
        packet::{aad_block, finish, is_authentic, lengths_block, nonce_block, received},
    },
};

/// Vectors that share all of the counter but what the table has. No part goes across.
const COUNTERS_VECTORS: usize = COUNTERS_BLOCKS / LANES;
/// Bytes of a vector.
const VECTOR_BYTES: usize = 16 * LANES;
/// Where a stream begins: vectors of unused lanes alone are left out.
const FIRST_VECTOR: usize = 1 / LANES;
/// The lane of J0 and the AAD in that vector.
const J0_LANE: usize = 1 - FIRST_VECTOR;
/// Bytes of that vector before the payload.
const HEAD_BYTES: usize = 32 - FIRST_VECTOR * VECTOR_BYTES;

const _: () = assert!(COUNTERS_BLOCKS.is_power_of_two() && COUNTERS_BLOCKS <= 256);
// AAD, all blocks of a part and the lengths.
const _: () = assert!(PART_VECTORS * LANES < POWERS);

with_features! {
    /// Seals or opens all jobs of the run.
    pub(in crate::aead::x86) fn all<const SEAL: bool>(run: &mut Run<'_, '_>) {
        let mut keys = run.keys::<LANES>().peekable();
        let Some((first, _)) = keys.peek() else { return };
        let mut behind = Behind::new(first);
        for (key, jobs) in keys {
            for index in jobs {
                one_job::<SEAL>(run, &mut behind, key, index);
            }
        }
        end_run::<SEAL>(run, &mut behind);
    }

    /// Seals or opens one packet, and ends the one before.
    pub(in crate::aead::x86) fn one_job<'k, 'r, const SEAL: bool>(
        run: &mut Run<'r, 'k>, behind: &mut Behind<'r>, key: &'k Schedule, index: usize,
    ) {
        let Some(packet) = run.packet(key, index) else { return };
        run.done |= set_of(index..index + 1);
        match key.rounds {
            10 => one_packet::<10, SEAL>(run, behind, &packet),
            _ => one_packet::<14, SEAL>(run, behind, &packet),
        }
    }

    /// Hashes what is still behind.
    pub(in crate::aead::x86) fn end_run<'r, const SEAL: bool>(run: &mut Run<'r, '_>, behind: &mut Behind<'r>) {
        let mut sum = no_products();
        behind.blocks[0] = add(behind.blocks[0], first_lane(behind.hash));
        for v in 0..behind.vectors.min(PART_VECTORS + 1) {
            multiply_add(&mut sum, behind, v);
        }
        end_part::<SEAL>(run, behind, sum);
    }

    fn one_packet<'k, 'r, const R: usize, const SEAL: bool>(
        run: &mut Run<'r, 'k>, behind: &mut Behind<'r>, packet: &Packet<'k, 'r>,
    ) {
        let (nonce, aad) = (all_lanes(nonce_block(packet)), aad_block(packet));
        let vectors = (2 + packet.blocks()).div_ceil(LANES);
        let mut first = FIRST_VECTOR;
        let mut hash = behind.hash;
        while first < vectors {
            let left = vectors.min((first / COUNTERS_VECTORS + 1) * COUNTERS_VECTORS) - first;
            let count = if left <= PART_VECTORS { left } else { 8 };
            let part = Part { packet, nonce, aad, first, ends: first + count == vectors };
            hash = match count {
                1 => one_part::<R, 1, SEAL>(run, behind, part, hash),
                2 => one_part::<R, 2, SEAL>(run, behind, part, hash),
                3 => one_part::<R, 3, SEAL>(run, behind, part, hash),
                4 => one_part::<R, 4, SEAL>(run, behind, part, hash),
                5 => one_part::<R, 5, SEAL>(run, behind, part, hash),
                6 => one_part::<R, 6, SEAL>(run, behind, part, hash),
                7 => one_part::<R, 7, SEAL>(run, behind, part, hash),
                8 if PART_VECTORS > 8 => one_part::<R, 8, SEAL>(run, behind, part, hash),
                9 if PART_VECTORS > 8 => one_part::<R, NINE, SEAL>(run, behind, part, hash),
                _ => one_part::<R, PART_VECTORS, SEAL>(run, behind, part, hash),
            };
            first += count;
        }
        behind.hash = hash;
    }
}

/// Or as many as a part has at most.
const NINE: usize = if PART_VECTORS < 9 { PART_VECTORS } else { 9 };

/// What AES works on next.
struct Part<'p, 'k, 'r> {
    packet: &'p Packet<'k, 'r>,
    nonce: Vector,
    aad: __m128i,
    /// Number of the first vector in the packet's stream.
    first: usize,
    /// Whether it is the packet's last.
    ends: bool,
}

/// What is encrypted or read, and still to be hashed.
pub(in crate::aead::x86) struct Behind<'r> {
    payload: *mut u8,
    job: Option<&'r Job>,
    /// Byte-reversed; AAD and lengths are in their lanes.
    blocks: [Vector; PART_VECTORS + 1],
    vectors: usize,
    /// Where the powers of H of the first vector are.
    powers: *const u8,
    /// The hash of the packet's parts before.
    hash: __m128i,
    tag_mask: __m128i,
    /// The ICV that came with it. Read before the payload's end is written: a load that a masked store may overlap waits for it.
    received: __m128i,
    ends: bool,
}

/// A sum of products of each lane.
#[derive(Clone, Copy)]
pub(super) struct Products {
    pub(super) low: Vector,
    pub(super) cross: Vector,
    pub(super) high: Vector,
}

with_features! {
    /// N vectors through AES, and the part behind through GHASH; then this part is the one behind.
    fn one_part<'k, 'r, const R: usize, const N: usize, const SEAL: bool>(
        run: &mut Run<'r, 'k>, behind: &mut Behind<'r>, part: Part<'_, 'k, 'r>, hash: __m128i,
    ) -> __m128i {
        let round_keys = &part.packet.key.round_keys;
        let mut stream = [zero(); N];
        let place = part.first % COUNTERS_VECTORS;
        let start = ((part.first - place) * LANES) as u32;
        let start = add(part.nonce, all_lanes(_mm_set_epi32(start.swap_bytes() as i32, 0, 0, 0)));
        for (v, s) in stream.iter_mut().enumerate() {
            // SAFETY: place + v < COUNTERS_VECTORS, and the table has as many lanes.
            let counter = unsafe { load(COUNTERS.0.as_ptr().add(LANES * (place + v)).cast()) };
            *s = add(start, counter);
        }
        let mut sum = no_products();
        let vectors = behind.vectors;
        each_round!(round of R {
            for s in &mut stream {
                *s = in_order(aes_round(*s, round_keys[round]));
            }
            // The first vector waits for the hash of the part before, so it comes last.
            if round == 9 {
                behind.blocks[0] = add(behind.blocks[0], first_lane(hash));
                multiply_add(&mut sum, behind, 0);
            } else if round < 9 && round.is_multiple_of(2) {
                if round < vectors {
                    multiply_add_two(&mut sum, behind, round - 1);
                } else if round - 1 < vectors {
                    multiply_add(&mut sum, behind, round - 1);
                }
                if round == 8 && PART_VECTORS > 8 && vectors > 9 {
                    for v in 9..vectors.min(PART_VECTORS + 1) {
                        multiply_add(&mut sum, behind, v);
                    }
                }
            }
        });
        for s in &mut stream {
            *s = aes_last_round(*s, round_keys[R]);
        }
        let hash = end_part::<SEAL>(run, behind, sum);
        crypt::<R, N, SEAL>(behind, &part, stream);
        (behind.payload, behind.job) = (part.packet.payload, Some(part.packet.job));
        behind.ends = part.ends;
        hash
    }

    /// Adds the key stream to the part's payload, and lays out what is to be hashed.
    fn crypt<const R: usize, const N: usize, const SEAL: bool>(
        behind: &mut Behind<'_>, part: &Part<'_, '_, '_>, stream: [Vector; N],
    ) {
        let packet = part.packet;
        if !SEAL && part.ends {
            behind.received = received(packet.payload, packet.bytes());
        }
        let mut last = zero();
        for (v, stream) in stream.into_iter().enumerate() {
            let offset = VECTOR_BYTES * (part.first + v);
            let place = packet.payload.wrapping_add(offset).wrapping_sub(32);
            let bytes = packet.bytes() + 32 - offset;
            let begins = v == 0 && part.first == FIRST_VECTOR;
            last = if begins && HEAD_BYTES == VECTOR_BYTES {
                zero()
            } else if begins || v + 1 == N && bytes < VECTOR_BYTES {
                let head = if begins { HEAD_BYTES } else { 0 };
                // SAFETY: these bytes are payload, and the ICV follows.
                unsafe { crypt_edge::<SEAL>(place, head, bytes.min(VECTOR_BYTES), stream) }
            } else {
                // SAFETY: a whole vector of payload: only the first and the last of a packet may be less.
                unsafe {
                    let input = load(place);
                    let output = add(input, stream);
                    store(place, output);
                    reversed(if SEAL { output } else { input })
                }
            };
            if begins {
                behind.tag_mask = lane::<J0_LANE>(stream);
                last = with_lane(last, J0_LANE, part.aad);
            }
            behind.blocks[v] = last;
        }
        let mut first_power = LANES * N;
        behind.vectors = N;
        if part.ends {
            let place = packet.blocks() + 2 - LANES * part.first;
            let v = place / LANES;
            let vector = if v == N { zero() } else { last };
            behind.blocks[v] = with_lane(vector, place - LANES * v, lengths_block(packet));
            first_power = place + 1;
            behind.vectors = v + 1;
        }
        // The first power is at most POWERS; the last vector begins with H¹ at least, and zeros follow.
        debug_assert!((1..=POWERS).contains(&first_power) && LANES * (behind.vectors - 1) < first_power);
        behind.powers = packet.key.powers.as_ptr().wrapping_add(POWERS - first_power).cast();
    }

    pub(super) fn no_products() -> Products {
        Products { low: zero(), cross: zero(), high: zero() }
    }

    /// Adds the products of a vector that is behind, each lane with its power of H.
    fn multiply_add(sum: &mut Products, behind: &Behind<'_>, v: usize) {
        let [low, cross, high] = products(behind, v);
        sum.low = add(sum.low, low);
        sum.cross = add(sum.cross, cross);
        sum.high = add(sum.high, high);
    }

    /// The same of this one and the next: with AVX-512, a sum of three is one instruction.
    fn multiply_add_two(sum: &mut Products, behind: &Behind<'_>, v: usize) {
        let [low, cross, high] = products(behind, v);
        let [next_low, next_cross, next_high] = products(behind, v + 1);
        sum.low = add(sum.low, add(low, next_low));
        sum.cross = add(sum.cross, add(cross, next_cross));
        sum.high = add(sum.high, add(high, next_high));
    }

    fn products(behind: &Behind<'_>, v: usize) -> [Vector; 3] {
        let x = behind.blocks[v];
        let place = behind.powers.wrapping_add(VECTOR_BYTES * v);
        // SAFETY: powers of H lie there for each vector, and their sums after them.
        let (power, sum) = unsafe { (load(place), load(place.wrapping_add(SUM_BYTES))) };
        [
            multiply::<0x00>(x, power),
            multiply::<0x00>(halves_added(x), sum),
            multiply::<0x11>(x, power),
        ]
    }

    pub(super) fn p() -> Vector {
        all_lanes(_mm_set1_epi64x(field::P))
    }

    pub(super) fn halves_added(x: Vector) -> Vector {
        add(x, halves_swapped(x))
    }

    /// Of each lane, what is to be folded once more and added to `high`.
    pub(super) fn middle(sum: Products) -> Vector {
        let multiple = multiply::<0x00>(sum.low, p());
        add(add(sum.cross, add(sum.low, sum.high)), add(multiple, halves_swapped(sum.low)))
    }

    /// Reduces the sum of a part: the tag, or what the next part's hash begins with.
    fn end_part<const SEAL: bool>(run: &mut Run<'_, '_>, behind: &Behind<'_>, sum: Products) -> __m128i {
        let hash = _mm_xor_si128(add_lanes(sum.high), field::fold(add_lanes(middle(sum))));
        let (true, Some(job)) = (behind.ends, behind.job) else {
            return hash;
        };
        let (tag, bytes) = (_mm_xor_si128(field::reversed(hash), behind.tag_mask), job.bytes as usize);
        if SEAL {
            finish::<SEAL>(behind.payload, bytes, tag);
        } else if !is_authentic(behind.payload, bytes, tag, behind.received) {
            run.refuse(job);
        }
        _mm_setzero_si128()
    }
}

impl Behind<'_> {
    /// Nothing yet, but powers of H that may be read.
    pub(in crate::aead::x86) fn new(key: &Schedule) -> Self {
        // SAFETY: all zeros is a vector.
        let (vector, lane) = unsafe { core::mem::zeroed() };
        Self {
            payload: core::ptr::null_mut(),
            job: None,
            blocks: [vector; PART_VECTORS + 1],
            vectors: 0,
            powers: key.powers.as_ptr().cast(),
            hash: lane,
            tag_mask: lane,
            received: lane,
            ends: false,
        }
    }
}
