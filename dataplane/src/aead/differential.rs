//! Every implementation against the portable one: the same ciphertext, the same ICV, the same verdict, and no
//! byte touched that is not the packet's.

use super::*;

/// xorshift64*: enough to make packets that are not alike.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        bytes.fill_with(|| self.next() as u8);
    }
}

const SUITES: [AeadSuite; 2] = [AeadSuite::Aes128Gcm16, AeadSuite::Aes256Gcm16];

/// The same secret, expanded for each implementation.
struct Keys {
    ours: Vec<AeadKey>,
    oracle: Vec<AeadKey>,
}

fn keys(aead: Aead, count: usize, suite: impl Fn(usize) -> AeadSuite, random: &mut Random) -> Keys {
    let secrets: Vec<(AeadSuite, [u8; 32], [u8; SALT_BYTES], Esn)> = (0..count)
        .map(|i| {
            let (mut secret, mut salt) = ([0; 32], [0; SALT_BYTES]);
            random.fill(&mut secret);
            random.fill(&mut salt);
            (suite(i), secret, salt, [Esn::On, Esn::Off][random.below(2)])
        })
        .collect();
    let expand = |aead| {
        secrets
            .iter()
            .map(|(suite, secret, salt, esn)| {
                AeadKey::new(aead, *suite, (&secret[..suite.key_bytes()], *salt), *esn).unwrap()
            })
            .collect()
    };
    Keys {
        ours: expand(aead),
        oracle: expand(Aead::portable()),
    }
}

/// A run of packets in one arena, each behind a random gap, so that every alignment comes up. SPIs, numbers and IVs are
/// what the arena is filled with.
struct Packets {
    arena: Vec<u8>,
    packets: Vec<Packet>,
}

#[derive(Debug)]
struct Packet {
    key: usize,
    job: Job,
}

impl Packet {
    fn payload(&self) -> Range<usize> {
        self.job.start as usize..(self.job.start + self.job.bytes) as usize
    }
}

fn packets(sizes: &[usize], keys: usize, random: &mut Random) -> Packets {
    let mut at = 0;
    let mut packets = Vec::new();
    for size in sizes {
        let start = at + random.below(97) + HEADER_BYTES;
        at = start + size + ICV_BYTES;
        packets.push(Packet {
            key: random.below(keys),
            job: Job {
                start: start as u32,
                bytes: *size as u32,
                high: random.next() as u32,
                more: 0,
            },
        });
    }
    let mut arena = vec![0; at + random.below(97)];
    random.fill(&mut arena);
    Packets { arena, packets }
}

/// Seals or opens all, as many a call as may be, and tells which are done.
fn crypt(
    aead: Aead,
    seal: bool,
    keys: &[AeadKey],
    arena: &mut [u8],
    packets: &[Packet],
) -> Vec<bool> {
    let mut all = Vec::new();
    for packets in packets.chunks(JOBS_MAX) {
        let jobs: Vec<Job> = packets.iter().map(|packet| packet.job).collect();
        let mut keyed: Vec<Keyed<'_>> = Vec::new();
        for (index, packet) in packets.iter().enumerate() {
            let (key, end) = (&keys[packet.key], index + 1);
            match keyed.last_mut() {
                Some(last) if std::ptr::eq(last.key, key) => last.end = end,
                _ => keyed.push(Keyed { key, end }),
            }
        }
        let arena = &mut Arena::over(arena);
        let done = if seal {
            aead.seal(arena, &keyed, &jobs)
        } else {
            aead.open(arena, &keyed, &jobs)
        };
        all.extend((0..jobs.len()).map(|index| done.has(index)));
    }
    all
}

/// Seals with both, compares the whole arena (gaps included), opens again, then breaks one byte of one packet.
fn check(aead: Aead, keys: &Keys, packets: &Packets, random: &mut Random) {
    let Packets { arena, packets } = packets;
    let (mut ours, mut oracle) = (arena.clone(), arena.clone());
    let sealed = crypt(aead, true, &keys.ours, &mut ours, packets);
    assert!(sealed.into_iter().all(|done| done));
    crypt(Aead::portable(), true, &keys.oracle, &mut oracle, packets);
    assert!(ours == oracle, "sealed differently: {packets:?}");

    let mut opened = ours.clone();
    let done = crypt(aead, false, &keys.ours, &mut opened, packets);
    assert!(
        done.into_iter().all(|done| done),
        "refused its own: {packets:?}"
    );
    for packet in packets {
        assert!(opened[packet.payload()] == arena[packet.payload()]);
    }

    let victim = random.below(packets.len());
    let payload = packets[victim].payload();
    let at = payload.start + random.below(payload.len() + ICV_BYTES);
    let mut broken = ours.clone();
    broken[at] ^= 1 << random.below(8);
    let ciphertext = broken.clone();
    let done = crypt(aead, false, &keys.ours, &mut broken, packets);
    for (index, done) in done.into_iter().enumerate() {
        assert_eq!(done, index != victim, "broken byte {at} of {packets:?}");
    }
    let left = &broken[payload.clone()];
    assert!(
        left.iter().all(|byte| *byte == 0) || *left == ciphertext[payload],
        "plaintext left behind"
    );
}

#[test]
fn every_length_alone_and_in_runs_of_its_kind() {
    for aead in Aead::all() {
        let mut random = Random(1);
        for suite in SUITES {
            let keys = keys(aead, 3, |_| suite, &mut random);
            for size in 0..=2048 {
                for count in [1, 5] {
                    check(
                        aead,
                        &keys,
                        &packets(&vec![size; count], 3, &mut random),
                        &mut random,
                    );
                }
            }
        }
    }
}

#[test]
fn every_alignment_within_a_cache_line() {
    for aead in Aead::all() {
        let mut random = Random(6);
        let keys = keys(aead, 1, |_| AeadSuite::Aes128Gcm16, &mut random);
        for alignment in 0..64 {
            for size in [1, 16, 31, 64, 100, 256, 511, 1400] {
                let mut packets = packets(&[size; 5], 1, &mut random);
                let stride = (size + ICV_BYTES).next_multiple_of(64) + 64;
                packets.arena = vec![0xa7; 5 * stride + 192];
                let to_line = 64 + packets.arena.as_ptr().align_offset(64);
                for (index, packet) in packets.packets.iter_mut().enumerate() {
                    packet.job.start = (to_line + index * stride + alignment) as u32;
                }
                check(aead, &keys, &packets, &mut random);
            }
        }
    }
}

#[test]
fn four_packets_of_one_key_and_of_four() {
    for aead in Aead::all() {
        let mut random = Random(2);
        for suite in SUITES {
            for count in [1, 4] {
                let keys = keys(aead, count, |_| suite, &mut random);
                for blocks in 0..24 {
                    for _ in 0..8 {
                        let sizes: Vec<usize> =
                            (0..4).map(|_| 16 * blocks + 1 + random.below(16)).collect();
                        check(
                            aead,
                            &keys,
                            &packets(&sizes, count, &mut random),
                            &mut random,
                        );
                    }
                }
            }
        }
    }
}

/// What goes abreast is picked from 64 jobs at a time, one key's first; while one four is encrypted, the one before is
/// hashed; and what is left over is a four as well if it is more than one.
#[test]
fn runs_of_packets_alike_of_any_count_and_of_few_keys() {
    for aead in Aead::all() {
        let mut random = Random(7);
        for suite in SUITES {
            for count in [1, 2, 9] {
                let keys = keys(aead, count, |_| suite, &mut random);
                for blocks in 1..=20 {
                    for packets_alike in [2, 3, 4, 5, 7, 8, 13, 70] {
                        let sizes: Vec<usize> = (0..packets_alike)
                            .map(|_| 16 * blocks - random.below(16))
                            .collect();
                        let packets = packets(&sizes, count, &mut random);
                        check(aead, &keys, &packets, &mut random);
                    }
                }
            }
        }
    }
}

#[test]
fn three_sizes_and_two_suites_shuffled() {
    for aead in Aead::all() {
        let mut random = Random(8);
        for count in [1, 2, 5, 200] {
            let keys = keys(aead, count, |i| SUITES[i % 2], &mut random);
            for _ in 0..12 {
                let sizes: Vec<usize> = (0..random.below(200) + 1)
                    .map(|_| [68, 44 + random.below(16), 180, 580][random.below(4)])
                    .collect();
                check(
                    aead,
                    &keys,
                    &packets(&sizes, count, &mut random),
                    &mut random,
                );
            }
        }
    }
}

#[test]
fn mixed_sizes_and_suites_in_one_run() {
    for aead in Aead::all() {
        let mut random = Random(3);
        for round in 0..300 {
            let keys = keys(aead, 4, |i| SUITES[i % 2], &mut random);
            let bound = [70, 300, 1500, 9000][round % 4];
            let sizes: Vec<usize> = (0..1 + random.below(40))
                .map(|_| random.below(bound))
                .collect();
            check(aead, &keys, &packets(&sizes, 4, &mut random), &mut random);
        }
    }
}

#[test]
fn long_packets_up_to_64_kib() {
    for aead in Aead::all() {
        let mut random = Random(4);
        for suite in SUITES {
            let keys = keys(aead, 1, |_| suite, &mut random);
            for _ in 0..60 {
                let sizes = [2048 + random.below(65_536 - 2048), 65_535];
                check(aead, &keys, &packets(&sizes, 1, &mut random), &mut random);
            }
        }
    }
}

#[test]
fn a_job_outside_the_arena_is_refused_and_the_others_are_not() {
    for aead in Aead::all() {
        let mut random = Random(5);
        let keys = keys(aead, 2, |_| AeadSuite::Aes128Gcm16, &mut random);
        for count in [3, 9, 40] {
            let mut packets = packets(&vec![64; count], 2, &mut random);
            let mut arena = packets.arena.clone();
            packets.packets[0].job.start = HEADER_BYTES as u32 - 1;
            packets.packets[2].job.start = arena.len() as u32 - 10;
            let done = crypt(aead, true, &keys.ours, &mut arena, &packets.packets);
            for (index, (done, packet)) in done.into_iter().zip(&packets.packets).enumerate() {
                assert_eq!(done, index != 0 && index != 2);
                assert!(!done || arena[packet.payload()] != packets.arena[packet.payload()]);
            }
        }
    }
}
