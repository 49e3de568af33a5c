//! The kernel of the narrow widths: any run of packets as one pipeline of parts. `one_lane.rs` and `two_lanes.rs`
//! each compile this file with vectors of theirs.
//!
//! A part is up to eight vectors of one packet's stream of lanes. While AES works on a part, the multiplier
//! hashes the part before, of the same packet or of the one before:
//!
//! ```text
//!            packet 1              packet 2     packet 3
//!   AES      part 1     part 2     part 1       part 1
//!   GHASH               part 1     part 2, tag  part 1, tag    part 1, tag
//! ```
//!
//! There are no byte masks on these CPUs. A last block that is not whole is read and written whole nevertheless: its
//! other bytes are the packet's own ICV, which keeps its value.

use super::{super::*, *};
use crate::aead::x86::{
    field,
    key::POWERS,
    packet::{aad_block, finish, lengths_block, nonce_block},
};

/// Vectors of a part. As many lanes must be a power of two, for the counters.
const PART_VECTORS: usize = 8;
/// Bytes of a vector.
const VECTOR_BYTES: usize = 16 * LANES;
/// Where a stream begins: vectors of unused lanes alone are left out.
const FIRST_VECTOR: usize = 1 / LANES;

const _: () = assert!((PART_VECTORS * LANES).is_power_of_two());
const _: () = assert!(PART_VECTORS * LANES <= COUNTERS_BLOCKS);
// AAD, all blocks of a part and the lengths.
const _: () = assert!(PART_VECTORS * LANES < POWERS);

with_features! {
    /// Seals or opens all jobs of the run.
    pub(in crate::aead::x86) fn all<const SEAL: bool>(mut run: Run<'_, '_>) {
        let Some(first) = (0..run.jobs.len()).find_map(|index| run.packet::<LANES>(index)) else {
            return run.jobs.iter_mut().for_each(|job| job.ok = false);
        };
        let mut behind = Behind::new(first);
        for index in 0..run.jobs.len() {
            match run.packet::<LANES>(index) {
                None => run.jobs[index].ok = false,
                Some(packet) if packet.key.rounds == 10 => one_packet::<10, SEAL>(&mut run, &mut behind, index, packet),
                Some(packet) => one_packet::<14, SEAL>(&mut run, &mut behind, index, packet),
            }
        }
        let mut sum = no_products();
        for v in 0..behind.vectors {
            hash_vector(&mut sum, &behind, v);
        }
        end_part::<SEAL>(&mut run, &behind, sum);
    }

    fn one_packet<'k, const R: usize, const SEAL: bool>(
        run: &mut Run<'_, 'k>, behind: &mut Behind<'k>, job: usize, packet: Packet<'k>,
    ) {
        let (nonce, aad) = (all_lanes(nonce_block(&packet)), aad_block(&packet));
        let vectors = (2 + packet.blocks()).div_ceil(LANES);
        let mut first = FIRST_VECTOR;
        while first < vectors {
            let end = vectors.min((first / PART_VECTORS + 1) * PART_VECTORS);
            let part = Part { packet, job, nonce, aad, first, ends: end == vectors };
            match end - first {
                1 => one_part::<R, 1, SEAL>(run, behind, part),
                2 => one_part::<R, 2, SEAL>(run, behind, part),
                3 => one_part::<R, 3, SEAL>(run, behind, part),
                4 => one_part::<R, 4, SEAL>(run, behind, part),
                5 => one_part::<R, 5, SEAL>(run, behind, part),
                6 => one_part::<R, 6, SEAL>(run, behind, part),
                7 => one_part::<R, 7, SEAL>(run, behind, part),
                _ => one_part::<R, 8, SEAL>(run, behind, part),
            }
            first = end;
        }
    }
}

/// What AES works on next.
struct Part<'k> {
    packet: Packet<'k>,
    /// The packet's number in the run.
    job: usize,
    nonce: Vector,
    aad: __m128i,
    /// Number of the first vector in the packet's stream.
    first: usize,
    /// Whether it is the packet's last.
    ends: bool,
}

impl Part<'_> {
    fn begins(&self) -> bool {
        self.first == FIRST_VECTOR
    }
}

/// What is encrypted or read, and still to be hashed.
struct Behind<'k> {
    packet: Packet<'k>,
    job: usize,
    /// Byte-reversed; AAD and lengths are in their lanes.
    blocks: [Vector; PART_VECTORS + 1],
    vectors: usize,
    /// The power of H of the first lane.
    first_power: usize,
    /// The hash of the packet's parts before.
    hash: __m128i,
    tag_mask: __m128i,
    ends: bool,
}

/// A sum of products of each lane.
struct Products {
    low: Vector,
    cross: Vector,
    high: Vector,
}

with_features! {
    /// N vectors through AES, and the part behind through GHASH; then this part is the one behind.
    fn one_part<'k, const R: usize, const N: usize, const SEAL: bool>(
        run: &mut Run<'_, 'k>, behind: &mut Behind<'k>, part: Part<'k>,
    ) {
        let round_keys = &part.packet.key.round_keys;
        let mut stream = [zero(); N];
        let place = part.first % PART_VECTORS;
        let start = ((part.first - place) * LANES) as u32;
        let start = add(part.nonce, all_lanes(_mm_set_epi32(start.swap_bytes() as i32, 0, 0, 0)));
        for (v, s) in stream.iter_mut().enumerate() {
            // SAFETY: place + v < PART_VECTORS, and the table has as many lanes.
            let counter = unsafe { load(COUNTERS.0.as_ptr().add(LANES * (place + v)).cast()) };
            *s = add(start, counter);
        }
        let mut sum = no_products();
        each_round!(round of R {
            for s in &mut stream {
                *s = aes_round(*s, round_keys[round]);
            }
            if round <= behind.vectors {
                hash_vector(&mut sum, behind, round - 1);
            }
        });
        for s in &mut stream {
            *s = aes_last_round(*s, round_keys[R]);
        }
        let hash = end_part::<SEAL>(run, behind, sum);
        crypt::<R, N, SEAL>(behind, &part, stream);
        behind.packet = part.packet;
        behind.job = part.job;
        behind.hash = hash;
        behind.ends = part.ends;
    }

    /// Adds the key stream to the part's payload, and lays out what is to be hashed.
    fn crypt<const R: usize, const N: usize, const SEAL: bool>(behind: &mut Behind<'_>, part: &Part<'_>, stream: [Vector; N]) {
        let packet = &part.packet;
        let mut last = zero();
        for (v, stream) in stream.into_iter().enumerate() {
            let offset = VECTOR_BYTES * (part.first + v);
            let place = packet.payload.wrapping_add(offset).wrapping_sub(32);
            last = if v == 0 && part.begins() {
                behind.tag_mask = lanes_apart(stream)[LANES - 1];
                let mut lanes = [_mm_setzero_si128(); LANES];
                lanes[LANES - 1] = part.aad;
                lanes_of(lanes)
            } else if v + 1 < N || packet.bytes + 32 >= offset + VECTOR_BYTES {
                // SAFETY: a whole vector of payload; only the last vector of a packet is less.
                unsafe {
                    let input = load(place);
                    let output = add(input, stream);
                    store(place, output);
                    reversed(if SEAL { output } else { input })
                }
            } else {
                last_vector::<SEAL>(place, packet.bytes + 32 - offset, stream)
            };
            behind.blocks[v] = last;
        }
        (behind.vectors, behind.first_power) = (N, LANES * N);
        if part.ends {
            let place = packet.blocks() + 2 - LANES * part.first;
            let v = place / LANES;
            let mut lanes = lanes_apart(if v == N { zero() } else { last });
            lanes[place - LANES * v] = lengths_block(packet);
            behind.blocks[v] = lanes_of(lanes);
            (behind.vectors, behind.first_power) = (v + 1, place + 1);
        }
    }

    /// The last vector of a packet, of which `bytes` are payload: at least one and not all. Gives what is to be
    /// hashed, with zeros behind the payload.
    fn last_vector<const SEAL: bool>(place: *mut u8, bytes: usize, stream: Vector) -> Vector {
        let mut lanes = lanes_apart(stream);
        for (i, lane) in lanes.iter_mut().enumerate() {
            let bytes = bytes.saturating_sub(16 * i).min(16);
            *lane = if bytes == 0 {
                _mm_setzero_si128()
            } else {
                // SAFETY: the block holds a byte of payload, and 16 bytes of ICV follow the payload; what is written
                // behind the payload is what was there. The table has 32 bytes.
                unsafe {
                    let place = place.add(16 * i).cast();
                    let mask = _mm_loadu_si128(MASKS.as_ptr().add(16 - bytes).cast());
                    let input = _mm_loadu_si128(place);
                    let output = _mm_xor_si128(input, _mm_and_si128(*lane, mask));
                    _mm_storeu_si128(place, output);
                    field::reversed(_mm_and_si128(if SEAL { output } else { input }, mask))
                }
            };
        }
        lanes_of(lanes)
    }

    fn no_products() -> Products {
        Products { low: zero(), cross: zero(), high: zero() }
    }

    /// Multiplies vector `v` of the part with its powers of H.
    fn hash_vector(sum: &mut Products, behind: &Behind<'_>, v: usize) {
        let mut x = behind.blocks[v];
        if v == 0 {
            let mut lanes = [_mm_setzero_si128(); LANES];
            lanes[0] = behind.hash;
            x = add(x, lanes_of(lanes));
        }
        let at = POWERS - (behind.first_power - LANES * v);
        debug_assert!(at < POWERS);
        // SAFETY: the first power is at most POWERS, the last at least 1, and zeros follow.
        let power = unsafe { load(behind.packet.key.powers.as_ptr().add(at).cast()) };
        let halves_added = |x| add(x, halves_swapped(x));
        sum.low = add(sum.low, multiply::<0x00>(x, power));
        sum.cross = add(sum.cross, multiply::<0x00>(halves_added(x), halves_added(power)));
        sum.high = add(sum.high, multiply::<0x11>(x, power));
    }

    /// Reduces the sum of a part: the tag, or what the next part's hash begins with.
    fn end_part<const SEAL: bool>(run: &mut Run<'_, '_>, behind: &Behind<'_>, sum: Products) -> __m128i {
        let hash = field::reduce(add_lanes(sum.low), add_lanes(sum.cross), add_lanes(sum.high));
        if !behind.ends {
            return hash;
        }
        let tag = _mm_xor_si128(field::reversed(hash), behind.tag_mask);
        run.jobs[behind.job].ok = finish::<SEAL>(&behind.packet, tag);
        _mm_setzero_si128()
    }
}

impl<'k> Behind<'k> {
    /// Nothing yet.
    fn new(packet: Packet<'k>) -> Self {
        // SAFETY: all zeros is a vector.
        let (vector, lane) = unsafe { core::mem::zeroed() };
        Self {
            packet,
            job: 0,
            blocks: [vector; PART_VECTORS + 1],
            vectors: 0,
            first_power: 0,
            hash: lane,
            tag_mask: lane,
            ends: false,
        }
    }
}

/// Read from 16 - n on: a mask of n bytes.
static MASKS: [u8; 32] = {
    let mut masks = [0; 32];
    let mut at = 0;
    while at < 16 {
        masks[at] = 0xff;
        at += 1;
    }
    masks
};
