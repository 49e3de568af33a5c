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
    let secrets: Vec<(AeadSuite, [u8; 32])> = (0..count)
        .map(|i| {
            let mut secret = [0; 32];
            random.fill(&mut secret);
            (suite(i), secret)
        })
        .collect();
    let expand = |aead| {
        secrets
            .iter()
            .map(|(suite, secret)| {
                AeadKey::new(aead, *suite, &secret[..suite.key_bytes()]).unwrap()
            })
            .collect()
    };
    Keys {
        ours: expand(aead),
        oracle: expand(Aead::portable()),
    }
}

/// A run of packets in one arena, each behind a random gap, so that every alignment comes up.
struct Packets {
    arena: Vec<u8>,
    jobs: Vec<Packet>,
}

#[derive(Debug)]
struct Packet {
    key: usize,
    nonce: [u8; NONCE_BYTES],
    aad: [u8; 16],
    aad_bytes: u8,
    payload: Range<usize>,
}

fn packets(sizes: &[usize], keys: usize, random: &mut Random) -> Packets {
    let mut at = 0;
    let mut jobs = Vec::new();
    for size in sizes {
        at += random.below(97);
        let payload = at..at + size;
        at = payload.end + ICV_BYTES;
        let (mut nonce, mut aad) = ([0; NONCE_BYTES], [0; 16]);
        let aad_bytes = if random.below(2) == 0 { 8 } else { 12 };
        random.fill(&mut nonce);
        random.fill(&mut aad[..aad_bytes]);
        jobs.push(Packet {
            key: random.below(keys),
            nonce,
            aad,
            aad_bytes: aad_bytes as u8,
            payload,
        });
    }
    let mut arena = vec![0; at + random.below(97)];
    random.fill(&mut arena);
    Packets { arena, jobs }
}

impl Packets {
    fn jobs<'k>(&self, keys: &'k [AeadKey]) -> Vec<Job<'k>> {
        let job = |packet: &Packet| Job {
            key: &keys[packet.key],
            nonce: packet.nonce,
            aad: packet.aad,
            aad_bytes: packet.aad_bytes,
            payload: packet.payload.clone(),
            ok: false,
        };
        self.jobs.iter().map(job).collect()
    }
}

/// Seals with both, compares the whole arena (gaps included), opens again, then breaks one byte of one packet.
fn check(aead: Aead, keys: &Keys, packets: &Packets, random: &mut Random) {
    let (mut ours, mut oracle) = (packets.arena.clone(), packets.arena.clone());
    let mut jobs = packets.jobs(&keys.ours);
    aead.seal(&mut Arena::over(&mut ours), &mut jobs);
    assert!(jobs.iter().all(|job| job.ok));
    Aead::portable().seal(
        &mut Arena::over(&mut oracle),
        &mut packets.jobs(&keys.oracle),
    );
    assert!(ours == oracle, "sealed differently: {:?}", packets.jobs);

    let mut opened = ours.clone();
    let mut jobs = packets.jobs(&keys.ours);
    aead.open(&mut Arena::over(&mut opened), &mut jobs);
    assert!(
        jobs.iter().all(|job| job.ok),
        "refused its own: {:?}",
        packets.jobs
    );
    for Packet { payload, .. } in &packets.jobs {
        assert!(opened[payload.clone()] == packets.arena[payload.clone()]);
    }

    let victim = random.below(packets.jobs.len());
    let payload = packets.jobs[victim].payload.clone();
    let at = payload.start + random.below(payload.len() + ICV_BYTES);
    let mut broken = ours.clone();
    broken[at] ^= 1 << random.below(8);
    let ciphertext = broken.clone();
    let mut jobs = packets.jobs(&keys.ours);
    aead.open(&mut Arena::over(&mut broken), &mut jobs);
    for (index, job) in jobs.iter().enumerate() {
        assert_eq!(
            job.ok,
            index != victim,
            "broken byte {at} of {:?}",
            packets.jobs
        );
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
                for aad_bytes in [8, 12] {
                    let mut packets = packets(&[size; 5], 1, &mut random);
                    let stride = (size + ICV_BYTES).next_multiple_of(64) + 64;
                    packets.arena = vec![0xa7; 5 * stride + 128];
                    let to_line = packets.arena.as_ptr().align_offset(64);
                    for (index, job) in packets.jobs.iter_mut().enumerate() {
                        let start = to_line + index * stride + alignment;
                        job.payload = start..start + size;
                        job.aad[usize::from(job.aad_bytes.min(aad_bytes))..].fill(0);
                        job.aad_bytes = aad_bytes;
                    }
                    check(aead, &keys, &packets, &mut random);
                }
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
                    for packets_alike in [2, 3, 7, 8, 13, 70] {
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
        let keys = keys(aead, 1, |_| AeadSuite::Aes128Gcm16, &mut random);
        let packets = packets(&[64; 9], 1, &mut random);
        let mut arena = packets.arena.clone();
        let mut jobs = packets.jobs(&keys.ours);
        jobs[2].payload = arena.len() - 10..arena.len();
        jobs[6].payload = usize::MAX - 3..usize::MAX;
        aead.seal(&mut Arena::over(&mut arena), &mut jobs);
        for (index, job) in jobs.iter().enumerate() {
            assert_eq!(job.ok, index != 2 && index != 6);
        }
    }
}
