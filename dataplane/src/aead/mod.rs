//! The AEAD behind a narrow seam: ESP packets in one arena, up to 64 a call, each a [`Job`].
//!
//! ```text
//!   arena  … │ headroom │ SPI seq IV │ payload ……………… │ ICV │ tailroom │ …
//!                       └──── 16 ────┘└ Job::bytes ────┘└ 16 ┘
//!                                    ▲ Job::start
//! ```
//!
//! A job says where a packet is, and no more: nonce and associated data are put together from what lies before the payload,
//! from the high half of the number, which no packet carries, and from what the [`AeadKey`] knows, the salt and whether
//! numbers are extended.
//!
//! ```text
//!   nonce             salt │ IV                  RFC 4106 §4, RFC 7634 §2
//!   associated data   SPI │ seq                  RFC 4106 §5, RFC 7634 §2.1
//!                     SPI │ Job::high │ seq      the same, with extended numbers
//! ```
//!
//! An implementation is chosen once, when the process starts ([`Aead::detect`]), and makes every
//! [`AeadKey`]: a key is expanded into the form its implementation works with, and knows by itself
//! how to seal and open. Jobs of one call may use different keys and suites, each for some jobs in a row ([`Keyed`]).
//!
//! | file | holds |
//! |---|---|
//! | `choice.rs` | which implementation |
//! | `x86/` | AES-GCM with the instructions of x86-64: `avx512`, `vaes256`, `aesni` |
//! | `portable.rs` | all suites over crates, a packet at a time: every CPU, and the oracle in tests |
//! | `prefetch.rs` | keys and records, asked for before they are needed |
//! | `newer.rs` | safe code elsewhere, compiled for newer CPUs |
//!
//! To add an implementation: a file or folder here with its key type, a variant in `Implementation` (the fastest first) and in
//! `Expanded`. It sees ranges of one arena and nothing else. The
//! tests beside this file then hold it to the published vectors and to the portable one.

mod choice;
mod newer;
mod portable;
mod prefetch;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use choice::{ChoiceError, ChoiceProblem};
pub(crate) use newer::{Work, on_newer_cpus};
pub(crate) use prefetch::{prefetch, prefetch_lines};

use crate::Arena;
use choice::Implementation;
use esplane_api::{AeadSuite, Esn, KeyMaterial};
use std::{fmt, ops::Range};
use zeroize::Zeroizing;

/// Bytes of a nonce: 4 of salt, 8 of IV (RFC 4106 §4, RFC 7634 §2).
pub const NONCE_BYTES: usize = 12;
/// Bytes of salt.
pub const SALT_BYTES: usize = 4;
/// Bytes of ICV behind each payload.
pub const ICV_BYTES: usize = 16;
/// Jobs of one call, at most.
pub const JOBS_MAX: usize = 64;
/// Bytes before each payload: SPI, sequence number, IV.
const HEADER_BYTES: usize = 16;
/// Bytes of associated data at most: ESP has 8 or 12, published vectors have more.
const AAD_BYTES_MAX: usize = 16;

/// One packet to be sealed or opened in place. Header, payload and ICV lie within the arena, or it is refused.
///
/// Sixteen bytes: kernels read four jobs as one vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct Job {
    /// Where in the arena what is encrypted starts. SPI, sequence number and IV lie right before.
    pub start: u32,
    /// How many bytes are encrypted. The ICV lies right behind them.
    pub bytes: u32,
    /// The high half of the number, where numbers are extended.
    pub high: u32,
    /// What would follow the number in associated data longer than ESP's, as published vectors have it. Otherwise zero, and
    /// without effect.
    pub more: u32,
}

impl Job {
    /// Header, payload and ICV in the arena; `None` if they do not lie within.
    fn split<'a>(&self, arena: &'a mut Arena<'_>) -> Option<Split<'a>> {
        let (start, bytes) = (self.start as usize, self.bytes as usize);
        let end = start.checked_add(bytes)?.checked_add(ICV_BYTES)?;
        let (header, rest) = arena
            .get_mut(start.checked_sub(HEADER_BYTES)?..end)?
            .split_first_chunk_mut()?;
        let (payload, icv) = rest.split_last_chunk_mut()?;
        Some((header, payload, icv))
    }
}

type Split<'a> = (
    &'a [u8; HEADER_BYTES],
    &'a mut [u8],
    &'a mut [u8; ICV_BYTES],
);

/// Jobs in a row of one key: from where the ones before end.
#[derive(Clone, Copy, Debug)]
pub struct Keyed<'k> {
    /// The key, expanded.
    pub key: &'k AeadKey,
    /// Where they end.
    pub end: usize,
}

/// Which jobs of a call are done, a bit each: sealed, or authentic and opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Done(u64);

impl Done {
    /// Whether this one is.
    #[inline]
    pub fn has(self, job: usize) -> bool {
        job < JOBS_MAX && self.0 >> job & 1 == 1
    }

    /// Whether all of these are.
    #[inline]
    pub fn has_all(self, jobs: Range<usize>) -> bool {
        jobs.end <= JOBS_MAX && set_of(jobs) & !self.0 == 0
    }

    /// With one more.
    #[inline]
    pub fn with(self, job: usize) -> Self {
        Self(self.0 | set_of(job..job + 1))
    }
}

/// A bit for each of some in a row, of 64.
#[inline]
pub(crate) fn set_of(jobs: Range<usize>) -> u64 {
    let (count, shift) = (jobs.len().min(64), (jobs.start % 64) as u32);
    let ones = match count {
        0 => 0,
        _ => u64::MAX >> (64 - count),
    };
    ones << shift
}

/// The implementation chosen at start. Small and copied freely; holds no key.
#[derive(Clone, Copy, Debug)]
pub struct Aead {
    implementation: Implementation,
}

impl Aead {
    /// Seals every job: payload becomes ciphertext, its ICV is written behind it. Not done are only those that do not lie
    /// within the arena, that have no key, or that are more than [`JOBS_MAX`].
    pub fn seal(&self, arena: &mut Arena<'_>, keys: &[Keyed<'_>], jobs: &[Job]) -> Done {
        crypt::<true>(arena, keys, jobs)
    }

    /// Opens every job: where the ICV is right, ciphertext becomes payload and the job is done. Where it is wrong, it is
    /// not, and no plaintext is in the arena: the bytes are the ciphertext or zeros.
    pub fn open(&self, arena: &mut Arena<'_>, keys: &[Keyed<'_>], jobs: &[Job]) -> Done {
        crypt::<false>(arena, keys, jobs)
    }
}

fn crypt<const SEAL: bool>(arena: &mut Arena<'_>, keys: &[Keyed<'_>], jobs: &[Job]) -> Done {
    let jobs = &jobs[..jobs.len().min(JOBS_MAX)];
    let (mut rest, mut begin, mut done) = (keys, 0, Done::default());
    while let Some(Keyed { key, .. }) = rest.first() {
        let (run, others) = rest.split_at(key.run_length(rest));
        let end = run.last().map_or(0, |last| last.end);
        let at_end = end.clamp(begin, jobs.len());
        let at = begin..at_end;
        done.0 |= match &key.expanded {
            #[cfg(target_arch = "x86_64")]
            Expanded::Avx512(key) => x86::Run::new(arena, run, jobs, at).crypt::<4, SEAL>(key),
            #[cfg(target_arch = "x86_64")]
            Expanded::Vaes256(key) => x86::Run::new(arena, run, jobs, at).crypt::<2, SEAL>(key),
            #[cfg(target_arch = "x86_64")]
            Expanded::AesNi(key) => x86::Run::new(arena, run, jobs, at).crypt::<1, SEAL>(key),
            Expanded::Portable(portable) => each::<SEAL>(arena, key, portable, jobs, at),
        };
        (rest, begin) = (others, at_end);
    }
    done
}

/// Works through jobs one at a time.
fn each<const SEAL: bool>(
    arena: &mut Arena<'_>,
    key: &AeadKey,
    portable: &portable::Key,
    jobs: &[Job],
    at: Range<usize>,
) -> u64 {
    let mut done = Done::default();
    for index in at {
        if let Some((header, payload, icv)) = jobs[index].split(arena) {
            let (nonce, aad) = (key.nonce(header), key.associated_data(header, &jobs[index]));
            if portable.crypt::<SEAL>(&nonce, &aad[..key.aad_bytes.into()], payload, icv) {
                done = done.with(index);
            }
        }
    }
    done.0
}

/// A key expanded for one implementation, with the salt of its nonces. Wiped on drop.
///
/// Small: it lies in an SA's record beside what else a packet needs of it.
pub struct AeadKey {
    suite: AeadSuite,
    /// 8, or 12 with extended sequence numbers.
    aad_bytes: u8,
    salt: Zeroizing<[u8; SALT_BYTES]>,
    expanded: Expanded,
}

const _: () = assert!(size_of::<AeadKey>() <= 24);

enum Expanded {
    #[cfg(target_arch = "x86_64")]
    Avx512(Box<x86::Key<4>>),
    #[cfg(target_arch = "x86_64")]
    Vaes256(Box<x86::Key<2>>),
    #[cfg(target_arch = "x86_64")]
    AesNi(Box<x86::Key<1>>),
    Portable(Box<portable::Key>),
}

impl AeadKey {
    /// Expands `key` for `aead`, with the salt of its nonces (RFC 4106 §8.1), and for packets whose numbers are extended or
    /// not.
    pub fn new(
        aead: Aead,
        suite: AeadSuite,
        (key, salt): (&[u8], [u8; SALT_BYTES]),
        esn: Esn,
    ) -> Result<Self, KeyLengthError> {
        let aad_bytes = match esn {
            Esn::On => 12,
            Esn::Off => 8,
        };
        Self::with_aad_bytes(aead, suite, (key, salt), aad_bytes)
    }

    /// The same for associated data of any length up to [`AAD_BYTES_MAX`].
    fn with_aad_bytes(
        aead: Aead,
        suite: AeadSuite,
        (key, salt): (&[u8], [u8; SALT_BYTES]),
        aad_bytes: usize,
    ) -> Result<Self, KeyLengthError> {
        let wrong_length = KeyLengthError {
            suite,
            got: key.len(),
        };
        let expanded = match (aead.implementation, suite) {
            (_, suite) if key.len() != suite.key_bytes() => None,
            #[cfg(target_arch = "x86_64")]
            (Implementation::Avx512, AeadSuite::Aes128Gcm16 | AeadSuite::Aes256Gcm16) => {
                x86::Key::new(key, salt, aad_bytes).map(|key| Expanded::Avx512(Box::new(key)))
            }
            #[cfg(target_arch = "x86_64")]
            (Implementation::Vaes256, AeadSuite::Aes128Gcm16 | AeadSuite::Aes256Gcm16) => {
                x86::Key::new(key, salt, aad_bytes).map(|key| Expanded::Vaes256(Box::new(key)))
            }
            #[cfg(target_arch = "x86_64")]
            (Implementation::AesNi, AeadSuite::Aes128Gcm16 | AeadSuite::Aes256Gcm16) => {
                x86::Key::new(key, salt, aad_bytes).map(|key| Expanded::AesNi(Box::new(key)))
            }
            (Implementation::Portable, _) | (_, AeadSuite::ChaCha20Poly1305) => {
                portable::Key::new(suite, key).map(|key| Expanded::Portable(Box::new(key)))
            }
        };
        expanded
            .map(|expanded| Self {
                suite,
                aad_bytes: aad_bytes.min(AAD_BYTES_MAX) as u8,
                salt: Zeroizing::new(salt),
                expanded,
            })
            .ok_or(wrong_length)
    }

    /// Expands the key of an SA.
    pub fn from_material(aead: Aead, material: &KeyMaterial, esn: Esn) -> Self {
        let secret = (material.dangerous_key(), material.dangerous_salt());
        Self::new(aead, material.suite(), secret, esn)
            .expect("key material has its suite's length by construction")
    }

    /// Salt and IV (RFC 4106 §4, RFC 7634 §2).
    fn nonce(&self, header: &[u8; HEADER_BYTES]) -> [u8; NONCE_BYTES] {
        let mut nonce = [0; NONCE_BYTES];
        nonce[..SALT_BYTES].copy_from_slice(&*self.salt);
        nonce[SALT_BYTES..].copy_from_slice(&header[8..]);
        nonce
    }

    /// SPI and number (RFC 4106 §5, RFC 7634 §2.1), of which the first [`AeadKey::aad_bytes`] count.
    fn associated_data(&self, header: &[u8; HEADER_BYTES], job: &Job) -> [u8; AAD_BYTES_MAX] {
        let mut aad = [0; AAD_BYTES_MAX];
        aad[..8].copy_from_slice(&header[..8]);
        if self.aad_bytes > 8 {
            aad[4..8].copy_from_slice(&job.high.to_be_bytes());
            aad[8..12].copy_from_slice(&header[4..8]);
            aad[12..].copy_from_slice(&job.more.to_be_bytes());
        }
        aad
    }

    /// Which AEAD it is for.
    pub fn suite(&self) -> AeadSuite {
        self.suite
    }

    /// Asks for what a short packet needs of it: call it for a batch of packets before the first of them is worked on, and
    /// after the key itself was asked for, as it leads to the rest.
    #[inline]
    pub fn prefetch(&self) {
        match &self.expanded {
            #[cfg(target_arch = "x86_64")]
            Expanded::Avx512(key) => key.schedule().prefetch(),
            #[cfg(target_arch = "x86_64")]
            Expanded::Vaes256(key) => key.schedule().prefetch(),
            #[cfg(target_arch = "x86_64")]
            Expanded::AesNi(key) => key.schedule().prefetch(),
            Expanded::Portable(key) => prefetch(&**key),
        }
    }

    /// How many of `keys`, from the first on, go together: vector kernels mix keys, the others take one key at a time.
    fn run_length(&self, keys: &[Keyed<'_>]) -> usize {
        keys.iter()
            .take_while(|keyed| self.same_run(keyed.key))
            .count()
    }

    fn same_run(&self, other: &Self) -> bool {
        match (&self.expanded, &other.expanded) {
            #[cfg(target_arch = "x86_64")]
            (Expanded::Avx512(_), Expanded::Avx512(_))
            | (Expanded::Vaes256(_), Expanded::Vaes256(_))
            | (Expanded::AesNi(_), Expanded::AesNi(_)) => true,
            _ => std::ptr::eq(self, other),
        }
    }
}

impl fmt::Debug for AeadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AeadKey({}, [redacted])", self.suite)
    }
}

/// A key of the wrong length.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a key for {suite} has {} bytes, got {got}", suite.key_bytes())]
pub struct KeyLengthError {
    /// The suite asked for.
    pub suite: AeadSuite,
    /// The number of bytes offered.
    pub got: usize,
}

#[cfg(test)]
mod differential;
#[cfg(all(test, unix))]
mod guard;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod vectors;
