//! Published vectors by the hundred: NIST's (CAVP) and Wycheproof's, with each implementation, each alone and four
//! abreast. What cannot be ESP is left out: other sizes of nonce and tag, and more than 16 bytes of AAD.

use super::*;
use wycheproof::{TestResult, aead::*};

struct Case {
    source: String,
    key: Vec<u8>,
    nonce: [u8; NONCE_BYTES],
    aad: Vec<u8>,
    /// `None`: must be refused.
    plain: Option<Vec<u8>>,
    /// With the tag.
    sealed: Vec<u8>,
}

/// Opens, and seals where there is something to be sealed, in runs of one and of four, behind a gap that must not change.
fn check(aead: Aead, suite: AeadSuite, case: &Case) {
    let key = AeadKey::new(aead, suite, &case.key).unwrap();
    let payload_bytes = case.sealed.len() - ICV_BYTES;
    for count in [1, 4] {
        let source = format!("{} of {count}, {}", case.source, aead.name());
        let gap = [0xc3; 19];
        let arena_of = |bytes: &[u8]| [&gap[..], bytes].concat().repeat(count);
        let mut aad = [0; 16];
        aad[..case.aad.len()].copy_from_slice(&case.aad);
        let mut jobs: Vec<Job<'_>> = (0..count)
            .map(|i| {
                let start = gap.len() + i * (gap.len() + case.sealed.len());
                Job {
                    key: &key,
                    nonce: case.nonce,
                    aad,
                    aad_bytes: case.aad.len() as u8,
                    ok: false,
                    payload: start..start + payload_bytes,
                }
            })
            .collect();
        let mut arena = arena_of(&case.sealed);
        aead.open(&mut Arena::over(&mut arena), &mut jobs);
        match &case.plain {
            None => {
                assert!(jobs.iter().all(|job| !job.ok), "{source}: accepted");
                for job in &jobs {
                    let left = &arena[job.payload.clone()];
                    let ciphertext = &case.sealed[..payload_bytes];
                    assert!(
                        left.iter().all(|byte| *byte == 0) || left == ciphertext,
                        "{source}"
                    );
                }
            }
            Some(plain) => {
                let opened = [plain, &case.sealed[payload_bytes..]].concat();
                assert!(jobs.iter().all(|job| job.ok), "{source}: refused");
                assert!(
                    arena == arena_of(&opened),
                    "{source}: opened to something else"
                );
                let mut arena = arena_of(&[plain, &[0; ICV_BYTES][..]].concat());
                aead.seal(&mut Arena::over(&mut arena), &mut jobs);
                assert!(
                    arena == arena_of(&case.sealed),
                    "{source}: sealed to something else"
                );
            }
        }
    }
}

#[test]
fn wycheproof() {
    let sets = [
        (
            TestName::AesGcm,
            &[AeadSuite::Aes128Gcm16, AeadSuite::Aes256Gcm16][..],
        ),
        (
            TestName::ChaCha20Poly1305,
            &[AeadSuite::ChaCha20Poly1305][..],
        ),
    ];
    for (name, suites) in sets {
        let (mut checked, mut refused) = (0, 0);
        for group in TestSet::load(name).unwrap().test_groups {
            let suite = suites
                .iter()
                .find(|suite| suite.key_bytes() * 8 == group.key_size);
            let (Some(suite), 96, 128) = (suite, group.nonce_size, group.tag_size) else {
                continue;
            };
            for test in group.tests.iter().filter(|test| test.aad.len() <= 16) {
                let valid = test.result != TestResult::Invalid;
                let case = Case {
                    source: format!("Wycheproof {name:?} {}", test.tc_id),
                    key: test.key.to_vec(),
                    nonce: test.nonce[..].try_into().unwrap(),
                    aad: test.aad.to_vec(),
                    plain: valid.then(|| test.pt.to_vec()),
                    sealed: [&test.ct[..], &test.tag[..]].concat(),
                };
                for aead in Aead::all() {
                    check(aead, *suite, &case);
                }
                checked += 1;
                refused += usize::from(!valid);
            }
        }
        assert!(
            checked > 100 && refused > 30,
            "{name:?}: only {checked} fit, {refused} to be refused"
        );
    }
}

#[test]
fn cavp() {
    let bytes = |hex: &str| -> Vec<u8> {
        let digits: Vec<u8> = hex
            .chars()
            .filter_map(|c| c.to_digit(16))
            .map(|d| d as u8)
            .collect();
        digits
            .chunks(2)
            .map(|pair| pair[0] << 4 | pair[1])
            .collect()
    };
    let mut checked = 0;
    for line in include_str!("cavp.txt")
        .lines()
        .filter(|line| !line.starts_with('#'))
    {
        let fields: Vec<&str> = line.split(' ').collect();
        let [what, cipher, count, key, nonce, aad, plain, ciphertext, tag] = fields[..] else {
            panic!("nine fields, not {line}");
        };
        let case = Case {
            source: format!("CAVP {what} {cipher} {count}, key {key}"),
            key: bytes(key),
            nonce: bytes(nonce).try_into().unwrap(),
            aad: bytes(aad),
            plain: (plain != "FAIL").then(|| bytes(plain)),
            sealed: [bytes(ciphertext), bytes(tag)].concat(),
        };
        let suite = match cipher {
            "AES-128" => AeadSuite::Aes128Gcm16,
            _ => AeadSuite::Aes256Gcm16,
        };
        for aead in Aead::all() {
            check(aead, suite, &case);
        }
        checked += 1;
    }
    assert_eq!(checked, 199);
}
