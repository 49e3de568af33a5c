use super::*;
use AeadSuite::{Aes128Gcm16, Aes256Gcm16, ChaCha20Poly1305};
use proptest::prelude::*;

/// A published vector, in hexadecimal.
struct Vector {
    source: &'static str,
    suite: AeadSuite,
    key: &'static str,
    nonce: &'static str,
    aad: &'static str,
    plain: &'static str,
    sealed: &'static str,
}

const VECTORS: &[Vector] = &[
    Vector {
        source: "McGrew, Viega: The Galois/Counter Mode of Operation, test case 1",
        suite: Aes128Gcm16,
        key: "00000000000000000000000000000000",
        nonce: "000000000000000000000000",
        aad: "",
        plain: "",
        sealed: "58e2fccefa7e3061367f1d57a4e7455a",
    },
    Vector {
        source: "test case 2",
        suite: Aes128Gcm16,
        key: "00000000000000000000000000000000",
        nonce: "000000000000000000000000",
        aad: "",
        plain: "00000000000000000000000000000000",
        sealed: "0388dace60b6a392f328c2b971b2fe78ab6e47d42cec13bdf53a67b21257bddf",
    },
    Vector {
        source: "test case 3",
        suite: Aes128Gcm16,
        key: "feffe9928665731c6d6a8f9467308308",
        nonce: "cafebabefacedbaddecaf888",
        aad: "",
        plain: "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525\
                b16aedf5aa0de657ba637b391aafd255",
        sealed: "42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e21d514b25466931c7d8f6a5aac84aa05\
                 1ba30b396a0aac973d58e091473f59854d5c2af327cd64a62cf35abd2ba6fab4",
    },
    Vector {
        source: "test case 13",
        suite: Aes256Gcm16,
        key: "0000000000000000000000000000000000000000000000000000000000000000",
        nonce: "000000000000000000000000",
        aad: "",
        plain: "",
        sealed: "530f8afbc74536b9a963b4f1c4cb738b",
    },
    Vector {
        source: "test case 14",
        suite: Aes256Gcm16,
        key: "0000000000000000000000000000000000000000000000000000000000000000",
        nonce: "000000000000000000000000",
        aad: "",
        plain: "00000000000000000000000000000000",
        sealed: "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919",
    },
    Vector {
        source: "test case 15",
        suite: Aes256Gcm16,
        key: "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308",
        nonce: "cafebabefacedbaddecaf888",
        aad: "",
        plain: "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525\
                b16aedf5aa0de657ba637b391aafd255",
        sealed: "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838\
                 c5f61e6393ba7a0abcc9f662898015adb094dac5d93471bdec1a502270e3cc6c",
    },
    Vector {
        source: "NIST CAVP gcmEncryptExtIV128, 128 bits of plaintext and of AAD, count 0",
        suite: Aes128Gcm16,
        key: "c939cc13397c1d37de6ae0e1cb7c423c",
        nonce: "b3d8cc017cbb89b39e0f67e2",
        aad: "24825602bd12a984e0092d3e448eda5f",
        plain: "c3b3c41f113a31b73d9a5cd432103069",
        sealed: "93fe7d9e9bfd10348a5606e5cafa73540032a1dc85f1c9786925a2e71d8272dd",
    },
    Vector {
        source: "draft-mcgrew-gcm-test-01 §4: ESP with extended sequence numbers, AES-128",
        suite: Aes128Gcm16,
        key: "4c80cdefbb5d10da906ac73c3613a634",
        nonce: "2e443b684956ed7e3b244cfe",
        aad: "000043218765432100000000",
        plain: "45000048699a000080114db7c0a80102c0a801010a9bf15638d301000001000000000000045f736970045f7564700373\
                69700963796265726369747902646b000021000101020201",
        sealed: "fecf537e729d5b07dc30df528dd22b768d1b98736696a6fd348509fa13ceac34cfa2436f14a3f3cf65925bf1f4a13c5d\
                 15b21e1884f5ff6247aeabb786b93bce61bc17d768fd9732459018148f6cbe722fd04796562dfdb4",
    },
    Vector {
        source: "draft-mcgrew-gcm-test-01: ESP with 32-bit numbers, AES-256",
        suite: Aes256Gcm16,
        key: "abbccddef00112233445566778899aababbccddef00112233445566778899aab",
        nonce: "112233440102030405060708",
        aad: "4a2cbfe300000002",
        plain: "4500003069a6400080062690c0a801029389155e0a9e008b2dc57ee0000000007002400020bf0000020405b401010402\
                01020201",
        sealed: "ff425c9b724599df7a3bcd510194e00d6a78107f1b0b1cbf06efae9d65a5d763748a637985771d347f0545659f14e99d\
                 ef842d8eb335f4eecfdbf831824b4c4915956c96",
    },
    Vector {
        source: "RFC 7634 Appendix A",
        suite: ChaCha20Poly1305,
        key: "808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f",
        nonce: "a0a1a2a31011121314151617",
        aad: "0102030400000005",
        plain: "45000054a6f200004001e778c6336405c000020508005b7a3a080000553bec100007362708090a0b0c0d0e0f10111213\
                1415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363701020204",
        sealed: "24039428b97f417e3c13753a4f05087b67c352e6a7fab1b982d466ef407ae5c614ee8099d52844eb61aa95dfab4c02f7\
                 2aa71e7c4c4f64c9befe2facc638e8f3cbec163fac469b502773f6fb94e664da9165b82829f641e076aaa8266b7fb0f7\
                 b11b369907e1ad43",
    },
    Vector {
        source: "RFC 8439 §2.8.2",
        suite: ChaCha20Poly1305,
        key: "808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f",
        nonce: "070000004041424344454647",
        aad: "50515253c0c1c2c3c4c5c6c7",
        plain: "4c616469657320616e642047656e746c656d656e206f662074686520636c617373206f66202739393a204966204920636f\
                756c64206f6666657220796f75206f6e6c79206f6e652074697020666f7220746865206675747572652c2073756e73637265\
                656e20776f756c642062652069742e",
        sealed: "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d63dbea45e8ca9671282fafb69da92728b\
                 1a71de0a9e060b2905d6a5b67ecd3b3692ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc\
                 3ff4def08e4b7a9de576d26586cec64b61161ae10b594f09e26a7e902ecbd0600691",
    },
];

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.chars().map(|c| c.to_digit(16).unwrap() as u8).collect();
    digits
        .chunks(2)
        .map(|pair| pair[0] << 4 | pair[1])
        .collect()
}

/// A packet as published vectors describe it: any nonce, and any AAD of up to 16 bytes.
pub(super) struct Spelled {
    /// What lies before the payload.
    pub header: [u8; HEADER_BYTES],
    /// The rest of the AAD, for a payload that lies nowhere yet.
    pub job: Job,
    pub salt: [u8; SALT_BYTES],
}

/// Lays nonce and AAD out as ESP does. What no byte of the AAD is for is filled, and must not matter.
pub(super) fn spelled(nonce: &[u8], aad: &[u8]) -> Spelled {
    let mut padded = [0xb7; AAD_BYTES_MAX];
    padded[..aad.len()].copy_from_slice(aad);
    let word = |at: usize| -> [u8; 4] { padded[at..at + 4].try_into().unwrap() };
    let (number, high) = if aad.len() > 8 {
        (word(8), word(4))
    } else {
        (word(4), word(8))
    };
    Spelled {
        header: [&word(0), &number, &nonce[SALT_BYTES..]]
            .concat()
            .try_into()
            .unwrap(),
        job: Job {
            high: u32::from_be_bytes(high),
            more: u32::from_be_bytes(word(12)),
            ..Job::default()
        },
        salt: nonce[..SALT_BYTES].try_into().unwrap(),
    }
}

#[test]
fn published_vectors_are_reproduced_both_ways() {
    for aead in Aead::all() {
        for vector in VECTORS {
            let (plain, sealed, aad) =
                (bytes(vector.plain), bytes(vector.sealed), bytes(vector.aad));
            let Spelled { header, job, salt } = spelled(&bytes(vector.nonce), &aad);
            let secret = bytes(vector.key);
            let key =
                AeadKey::with_aad_bytes(aead, vector.suite, (&secret, salt), aad.len()).unwrap();
            let mut arena = [&header[..], &plain, &[0xee; ICV_BYTES]].concat();
            let jobs = [Job {
                start: 16,
                bytes: plain.len() as u32,
                ..job
            }];
            let keys = [Keyed { key: &key, end: 1 }];
            let done = aead.seal(&mut Arena::over(&mut arena), &keys, &jobs);
            assert!(
                done.has(0) && arena[16..] == sealed && arena[..16] == header,
                "{}",
                vector.source
            );
            let done = aead.open(&mut Arena::over(&mut arena), &keys, &jobs);
            assert!(done.has(0), "{}", vector.source);
            assert_eq!(arena[16..16 + plain.len()], plain, "{}", vector.source);
        }
    }
}

#[test]
fn a_wrong_key_length_is_refused_with_the_right_one() {
    let secret = (&[1; 16][..], [2; 4]);
    let error = AeadKey::new(Aead::portable(), Aes256Gcm16, secret, Esn::On).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a key for aes256gcm16 has 32 bytes, got 16"
    );
}

#[test]
fn debug_shows_no_key() {
    let secret = (&[0xab; 16][..], [0xab; 4]);
    let key = AeadKey::new(Aead::detect(), Aes128Gcm16, secret, Esn::On).unwrap();
    assert_eq!(format!("{key:?}"), "AeadKey(aes128gcm16, [redacted])");
}

fn key(aead: Aead, suite: AeadSuite, byte: u8, esn: Esn) -> AeadKey {
    AeadKey::new(
        aead,
        suite,
        (&vec![byte; suite.key_bytes()], [byte; 4]),
        esn,
    )
    .unwrap()
}

fn job(start: usize, bytes: usize) -> Job {
    Job {
        start: start as u32,
        bytes: bytes as u32,
        ..Job::default()
    }
}

/// Seals or opens jobs of one key.
fn with(key: &AeadKey, seal: bool, arena: &mut [u8], jobs: &[Job]) -> Done {
    let (aead, keys) = (
        Aead::detect(),
        [Keyed {
            key,
            end: jobs.len(),
        }],
    ); // the key knows how
    let arena = &mut Arena::over(arena);
    if seal {
        aead.seal(arena, &keys, jobs)
    } else {
        aead.open(arena, &keys, jobs)
    }
}

#[test]
fn a_job_beyond_the_arena_fails_and_touches_nothing() {
    const ARENA_BYTES: usize = 48;
    for aead in Aead::all() {
        for suite in AeadSuite::ALL {
            let key = key(aead, suite, 7, Esn::Off);
            let max = u32::MAX as usize;
            let wrong = [
                (0, 0),
                (15, 1),  // no room for the header
                (16, 17), // none for the ICV
                (33, 0),
                (49, 7),
                (max, 0),
                (max - 8, 4),
                (max - 8, 8),
                (16, max),
                (16, max - 16),
                (16, max - 31),
                (max, max),
            ];
            let jobs = wrong.map(|(start, bytes)| job(start, bytes));
            for count in 1..=jobs.len() {
                let mut arena = [0x55; ARENA_BYTES];
                for seal in [true, false] {
                    assert_eq!(
                        with(&key, seal, &mut arena, &jobs[..count]),
                        Done::default()
                    );
                    assert_eq!(
                        with(&key, seal, &mut arena[..count], &jobs),
                        Done::default()
                    );
                    assert_eq!(arena, [0x55; ARENA_BYTES]);
                }
            }
            assert!(with(&key, true, &mut [0; ARENA_BYTES], &[job(16, 16)]).has(0));
        }
    }
}

#[test]
fn a_job_without_a_key_is_not_done_and_one_past_the_limit_neither() {
    for aead in Aead::all() {
        for suite in AeadSuite::ALL {
            let key = key(aead, suite, 7, Esn::Off);
            let jobs: Vec<Job> = (0..JOBS_MAX + 6).map(|i| job(16 + 40 * i, 20)).collect();
            for ends in [
                &[][..],
                &[0],
                &[5],
                &[5, 3, 9],
                &[64],
                &[65],
                &[99],
                &[70, 5, 80],
            ] {
                let keys: Vec<_> = ends
                    .iter()
                    .map(|end| Keyed {
                        key: &key,
                        end: *end,
                    })
                    .collect();
                let mut arena = vec![0x55; 16 + 40 * jobs.len()];
                let done = aead.seal(&mut Arena::over(&mut arena), &keys, &jobs);
                let with_key = ends.iter().copied().max().unwrap_or(0).min(JOBS_MAX);
                for (i, packet) in arena[16..].chunks(40).enumerate() {
                    assert_eq!(done.has(i), i < with_key);
                    assert_eq!(packet[..20] != [0x55; 20], i < with_key);
                }
            }
        }
    }
}

#[test]
fn bits_of_what_is_done() {
    let done = Done(0b1011);
    assert!(done.has_all(0..2) && done.has_all(3..4) && done.has_all(7..7));
    assert!(!done.has_all(0..3) && !done.has_all(0..64) && !done.has(2) && !done.has(64));
    assert!(!Done(u64::MAX).has_all(0..65) && Done(u64::MAX).has_all(0..64));
    assert!(done.with(2).has_all(0..4));
}

#[test]
fn one_flipped_bit_anywhere_is_noticed_and_leaves_no_plaintext() {
    const BYTES: usize = 16 + 40 + ICV_BYTES;
    for aead in Aead::all() {
        for suite in AeadSuite::ALL {
            for esn in [Esn::On, Esn::Off] {
                let key = key(aead, suite, 9, esn);
                let jobs = [Job {
                    high: 3,
                    ..job(16, 40)
                }];
                let mut sealed = [0xa5; BYTES];
                assert!(with(&key, true, &mut sealed, &jobs).has(0));
                // SPI, number and IV as well.
                for bit in 0..sealed.len() * 8 {
                    let mut arena = sealed;
                    arena[bit / 8] ^= 1 << (bit % 8);
                    let ciphertext = arena;
                    assert!(!with(&key, false, &mut arena, &jobs).has(0), "bit {bit}");
                    let left = &arena[16..56];
                    assert!(left == &ciphertext[16..56] || left == [0; 40], "bit {bit}");
                }
                for bit in 0..32 {
                    let other_high = [Job {
                        high: 3 ^ 1 << bit,
                        ..jobs[0]
                    }];
                    let opened = with(&key, false, &mut sealed.clone(), &other_high).has(0);
                    assert_eq!(opened, esn == Esn::Off, "bit {bit} of the high half");
                }
            }
        }
    }
}

/// A comparison of less than all bits would let one of these through; four abreast are compared at once.
#[test]
fn each_bit_of_each_tag_of_four_counts_for_its_own_packet() {
    const STRIDE: usize = 16 + 68 + ICV_BYTES;
    for aead in Aead::all() {
        let key = key(aead, Aes128Gcm16, 9, Esn::On);
        let jobs = [0, 1, 2, 3].map(|i| job(16 + i * STRIDE, 68));
        let mut sealed = [0xa5; 4 * STRIDE];
        assert!(with(&key, true, &mut sealed, &jobs).has_all(0..4));
        for (packet, bit) in (0..4).flat_map(|packet| (0..128).map(move |bit| (packet, bit))) {
            let mut arena = sealed;
            arena[packet * STRIDE + 16 + 68 + bit / 8] ^= 1 << (bit % 8);
            let opened = with(&key, false, &mut arena, &jobs);
            for i in 0..4 {
                assert_eq!(opened.has(i), i != packet, "{} bit {bit}", aead.name());
            }
        }
    }
}

proptest! {
    /// A run of jobs with mixed keys and lengths, one of them damaged: every implementation agrees
    /// with the portable one, byte by byte, and nothing outside the jobs changes.
    #[test]
    fn a_mixed_run_agrees_with_the_oracle(
        lengths in proptest::collection::vec(0usize..600, 1..20),
        seed in any::<u8>(),
        damaged in any::<proptest::sample::Index>(),
    ) {
        let run = |aead: Aead| {
            let esn = |index: usize| if index.is_multiple_of(2) { Esn::On } else { Esn::Off };
            let keys: Vec<_> = AeadSuite::ALL
                .iter()
                .flat_map(|suite| [0, 1].map(|index| key(aead, *suite, seed | 1, esn(index))))
                .collect();
            let mut arena = vec![seed; lengths.iter().map(|length| length + 40).sum()];
            let (mut jobs, mut keyed) = (Vec::new(), Vec::new());
            let mut at = 16;
            for (index, length) in lengths.iter().enumerate() {
                let key = &keys[(index + usize::from(seed)) % keys.len()];
                keyed.push(Keyed { key, end: index + 1 });
                jobs.push(Job { high: index as u32, ..job(at, *length) });
                at += length + 40;
            }
            let _ = aead.seal(&mut Arena::over(&mut arena), &keyed, &jobs);
            let sealed = arena.clone();
            let damaged = damaged.index(jobs.len());
            arena[(jobs[damaged].start + jobs[damaged].bytes) as usize] ^= 1;
            let done = aead.open(&mut Arena::over(&mut arena), &keyed, &jobs);
            (sealed, arena, done, damaged)
        };
        let (sealed, opened, done, damaged) = run(Aead::detect());
        let (expected_sealed, _, expected_done, _) = run(Aead::portable());
        prop_assert_eq!(&sealed, &expected_sealed);
        prop_assert_eq!(&done, &expected_done);
        let mut at = 0;
        for (index, length) in lengths.iter().enumerate() {
            prop_assert_eq!(done.has(index), index != damaged);
            prop_assert_eq!(&opened[at..at + 16], &[seed; 16]);
            if index != damaged {
                prop_assert_eq!(&opened[at + 16..at + 16 + length], &vec![seed; *length][..]);
            }
            prop_assert_eq!(&opened[at + 16 + length + 16..at + length + 40], &[seed; 8]);
            at += length + 40;
        }
    }
}
