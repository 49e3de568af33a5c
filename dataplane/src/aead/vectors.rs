//! Published vectors by the hundred: NIST's (CAVP) and Wycheproof's, with each implementation, each alone and four
//! abreast. What cannot be ESP is left out: other sizes of nonce and tag, and more than 16 bytes of AAD.

use super::{
    tests::{Spelled, spelled},
    *,
};
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
    let Spelled { header, job, salt } = spelled(&case.nonce, &case.aad);
    let key = AeadKey::with_aad_bytes(aead, suite, (&case.key, salt), case.aad.len()).unwrap();
    let payload_bytes = case.sealed.len() - ICV_BYTES;
    for count in [1, 4] {
        let source = format!("{} of {count}, {}", case.source, aead.name());
        let before = [&[0xc3; 19][..], &header].concat();
        let arena_of = |bytes: &[u8]| [&before[..], bytes].concat().repeat(count);
        let starts = (0..count).map(|i| before.len() + i * (before.len() + case.sealed.len()));
        let jobs: Vec<Job> = starts
            .map(|start| Job {
                start: start as u32,
                bytes: payload_bytes as u32,
                ..job
            })
            .collect();
        let keys = [Keyed {
            key: &key,
            end: count,
        }];
        let mut arena = arena_of(&case.sealed);
        let done = aead.open(&mut Arena::over(&mut arena), &keys, &jobs);
        match &case.plain {
            None => {
                assert_eq!(done, Done::default(), "{source}: accepted");
                for job in &jobs {
                    let left = &arena[job.start as usize..][..payload_bytes];
                    let ciphertext = &case.sealed[..payload_bytes];
                    assert!(
                        left.iter().all(|byte| *byte == 0) || left == ciphertext,
                        "{source}"
                    );
                }
            }
            Some(plain) => {
                let opened = [plain, &case.sealed[payload_bytes..]].concat();
                assert!(done.has_all(0..count), "{source}: refused");
                assert!(
                    arena == arena_of(&opened),
                    "{source}: opened to something else"
                );
                let mut arena = arena_of(&[plain, &[0; ICV_BYTES][..]].concat());
                let done = aead.seal(&mut Arena::over(&mut arena), &keys, &jobs);
                assert!(
                    done.has_all(0..count) && arena == arena_of(&case.sealed),
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
