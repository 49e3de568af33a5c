//! Vectors of four lanes: AVX-512 with VAES and VPCLMULQDQ.
//!
//! | packets | kernel | a vector holds |
//! |---|---|---|
//! | four in a row of equal block count, small | [`four_packets`] | one block of each of four packets |
//! | short (up to 5 vectors) | [`pipelined`] | four blocks of one packet; GHASH of the packet before runs between the AES rounds |
//! | any | [`one_packet`] | four blocks of one packet; GHASH of the group before runs between the AES rounds |
//!
//! `abreast.rs` and `stream.rs` hold the kernels, `field.rs` their arithmetic; this file cuts a run into what each
//! kernel likes best. Lanes that are not payload are masked: never read, never written.

mod abreast;
mod field;
mod stream;

use super::{
    Aligned, Run,
    key::POWERS,
    packet::{Packet, finish},
};
use abreast::four_packets;
use field::lanes_apart;
use stream::{one_packet, pipelined};

/// The largest packet, in blocks, that [`four_packets`] takes: AAD and lengths need a power each.
const FOUR_PACKETS_BLOCKS: usize = POWERS - 2;
/// With different keys, gathering them costs more than four lanes win beyond this.
const FOUR_KEYS_BLOCKS: usize = 9;
/// Vectors of one packet that [`pipelined`] keeps in registers.
const SHORT_VECTORS: usize = 5;

/// Gives each function the features that this width needs.
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

/// Vectors of a packet's stream of lanes, the two before the payload and the lengths included.
fn vectors(packet: &Packet<'_>) -> usize {
    (packet.blocks() + 2) / 4 + 1
}

impl<'k> Run<'_, 'k> {
    /// The four packets from `first` on, if [`four_packets`] is what they want.
    fn four(&self, first: usize, one: Packet<'k>) -> Option<([Packet<'k>; 4], bool)> {
        let blocks = one.blocks();
        if !(1..=FOUR_PACKETS_BLOCKS).contains(&blocks) || first + 4 > self.jobs.len() {
            return None;
        }
        let four = [
            one,
            self.packet::<4>(first + 1)?,
            self.packet::<4>(first + 2)?,
            self.packet::<4>(first + 3)?,
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
                self.packet::<4>(index)
                    .is_some_and(|p| vectors(&p) == vectors(&one) && p.key.rounds == one.key.rounds)
            })
            .count()
    }
}

with_features! {
    /// Seals or opens all jobs of the run: cuts it into what each kernel likes best.
    pub(super) fn all<const SEAL: bool>(mut run: Run<'_, '_>) {
        let mut at = 0;
        while at < run.jobs.len() {
            at += match run.packet::<4>(at) {
                None => {
                    run.jobs[at].ok = false;
                    1
                }
                Some(packet) if packet.key.rounds == 10 => next::<10, SEAL>(&mut run, at, packet),
                Some(packet) => next::<14, SEAL>(&mut run, at, packet),
            };
        }
    }

    /// Handles the packets from `at` on with one kernel and says how many those were.
    fn next<'k, const R: usize, const SEAL: bool>(run: &mut Run<'_, 'k>, at: usize, packet: Packet<'k>) -> usize {
        if let Some((four, same_key)) = run.four(at, packet) {
            let tags = if same_key {
                four_packets::<R, true, SEAL>(&four)
            } else {
                four_packets::<R, false, SEAL>(&four)
            };
            for (i, (packet, tag)) in four.iter().zip(lanes_apart(tags)).enumerate() {
                run.jobs[at + i].ok = finish::<SEAL>(packet, tag);
            }
            return 4;
        }
        match vectors(&packet) {
            1 => short::<R, 1, SEAL>(run, at, packet),
            2 => short::<R, 2, SEAL>(run, at, packet),
            3 => short::<R, 3, SEAL>(run, at, packet),
            4 => short::<R, 4, SEAL>(run, at, packet),
            5 => short::<R, 5, SEAL>(run, at, packet),
            _ => {
                let tag = one_packet::<R, SEAL>(&packet);
                run.jobs[at].ok = finish::<SEAL>(&packet, tag);
                1
            }
        }
    }

    fn short<'k, const R: usize, const V: usize, const SEAL: bool>(
        run: &mut Run<'_, 'k>, at: usize, packet: Packet<'k>,
    ) -> usize {
        let count = run.equal_vectors(at, packet);
        pipelined::<R, V, SEAL>(run, at, count);
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
