//! The AEAD behind a narrow seam: a whole run of packets per call, each packet a [`Job`] over one
//! arena.
//!
//! ```text
//!   arena  … │ headroom │ SPI seq IV │ payload ……………… │ ICV │ tailroom │ …
//!                                     └ Job::payload ──┘└ 16 ┘
//! ```
//!
//! An implementation is chosen once, when the process starts ([`Aead::detect`]), and makes every
//! [`AeadKey`]: a key is expanded into the form its implementation works with, and knows by itself
//! how to seal and open. Jobs of one call may use different keys and suites.
//!
//! | file | holds |
//! |---|---|
//! | `choice.rs` | which implementation |
//! | `x86/` | AES-GCM with the instructions of x86-64: `avx512`, `vaes256`, `aesni` |
//! | `portable.rs` | AES-GCM over the `aes-gcm` crate: every CPU, and the oracle in tests |
//! | `chacha.rs` | ChaCha20-Poly1305 over the `chacha20poly1305` crate |
//! | `prefetch.rs` | keys and records, asked for before they are needed |
//! | `newer.rs` | safe code elsewhere, compiled for newer CPUs |
//!
//! To add an implementation: a file or folder here with its key type, a variant in `Implementation` (the fastest first) and in
//! `Expanded`. It sees ranges of one arena and nothing else. The
//! tests beside this file then hold it to the published vectors and to the portable one.

mod chacha;
mod choice;
mod newer;
mod portable;
mod prefetch;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use choice::{ChoiceError, ChoiceProblem};
pub(crate) use newer::{Work, on_newer_cpus};
pub use prefetch::prefetch;

use crate::Arena;
use choice::Implementation;
use esplane_api::{AeadSuite, KeyMaterial};
use std::{fmt, ops::Range};

/// Bytes of a nonce: 4 of salt, 8 of IV (RFC 4106 §4, RFC 7634 §2).
pub const NONCE_BYTES: usize = 12;
/// Bytes of ICV behind each payload.
pub const ICV_BYTES: usize = 16;

/// One packet to be sealed or opened in place.
///
/// Nonce and AAD lie side by side, so that kernels can read 16 bytes from either.
#[derive(Clone, Debug)]
#[repr(C)]
pub struct Job<'k> {
    /// The key, expanded.
    pub key: &'k AeadKey,
    /// Salt and IV.
    pub nonce: [u8; NONCE_BYTES],
    /// Associated data in its first [`Job::aad_bytes`] bytes, zeros behind.
    pub aad: [u8; 16],
    /// 8, or 12 with extended sequence numbers.
    pub aad_bytes: u8,
    /// Set by [`Aead::open`]: whether the ICV is right. [`Aead::seal`] sets it too: `false` only
    /// where payload and ICV do not lie within the arena.
    pub ok: bool,
    /// What is encrypted, as a range of the arena. Its ICV lies right behind it.
    pub payload: Range<usize>,
}

impl Job<'_> {
    /// The associated data.
    pub fn associated_data(&self) -> &[u8] {
        &self.aad[..usize::from(self.aad_bytes).min(self.aad.len())]
    }

    /// Payload and ICV in the arena; `None` if they do not lie within.
    fn split<'a>(
        &self,
        arena: &'a mut Arena<'_>,
    ) -> Option<(&'a mut [u8], &'a mut [u8; ICV_BYTES])> {
        arena
            .get_mut(self.payload.start..self.payload.end.checked_add(ICV_BYTES)?)?
            .split_last_chunk_mut()
    }
}

/// The implementation chosen at start. Small and copied freely; holds no key.
#[derive(Clone, Copy, Debug)]
pub struct Aead {
    implementation: Implementation,
}

impl Aead {
    /// Seals every job: payload becomes ciphertext, its ICV is written behind it.
    pub fn seal(&self, arena: &mut Arena<'_>, jobs: &mut [Job<'_>]) {
        let mut rest = jobs;
        while let Some(first) = rest.first() {
            let key = first.key;
            let (run, others) = rest.split_at_mut(key.run_length(rest));
            match &key.expanded {
                #[cfg(target_arch = "x86_64")]
                Expanded::Avx512(key) => x86::Run::new(arena, run).seal(key),
                #[cfg(target_arch = "x86_64")]
                Expanded::Vaes256(key) => x86::Run::new(arena, run).seal(key),
                #[cfg(target_arch = "x86_64")]
                Expanded::AesNi(key) => x86::Run::new(arena, run).seal(key),
                Expanded::Portable(key) => each(arena, run, |nonce, aad, payload, icv| {
                    key.seal(nonce, aad, payload, icv)
                }),
                Expanded::ChaCha(key) => each(arena, run, |nonce, aad, payload, icv| {
                    key.seal(nonce, aad, payload, icv)
                }),
            }
            rest = others;
        }
    }

    /// Opens every job: where the ICV is right, ciphertext becomes payload and [`Job::ok`] is
    /// `true`. Where it is wrong, `ok` is `false` and no plaintext is in the arena: the bytes are
    /// the ciphertext or zeros.
    pub fn open(&self, arena: &mut Arena<'_>, jobs: &mut [Job<'_>]) {
        let mut rest = jobs;
        while let Some(first) = rest.first() {
            let key = first.key;
            let (run, others) = rest.split_at_mut(key.run_length(rest));
            match &key.expanded {
                #[cfg(target_arch = "x86_64")]
                Expanded::Avx512(key) => x86::Run::new(arena, run).open(key),
                #[cfg(target_arch = "x86_64")]
                Expanded::Vaes256(key) => x86::Run::new(arena, run).open(key),
                #[cfg(target_arch = "x86_64")]
                Expanded::AesNi(key) => x86::Run::new(arena, run).open(key),
                Expanded::Portable(key) => each(arena, run, |nonce, aad, payload, icv| {
                    key.open(nonce, aad, payload, icv)
                }),
                Expanded::ChaCha(key) => each(arena, run, |nonce, aad, payload, icv| {
                    key.open(nonce, aad, payload, icv)
                }),
            }
            rest = others;
        }
    }
}

/// Works through jobs one at a time.
fn each(
    arena: &mut Arena<'_>,
    jobs: &mut [Job<'_>],
    crypt: impl Fn(&[u8; NONCE_BYTES], &[u8], &mut [u8], &mut [u8; ICV_BYTES]) -> bool,
) {
    for job in jobs {
        job.ok = match job.split(arena) {
            Some((payload, icv)) => crypt(&job.nonce, job.associated_data(), payload, icv),
            None => false,
        };
    }
}

/// A key expanded for one implementation. Wiped on drop.
pub struct AeadKey {
    suite: AeadSuite,
    expanded: Expanded,
}

enum Expanded {
    #[cfg(target_arch = "x86_64")]
    Avx512(Box<x86::Key<4>>),
    #[cfg(target_arch = "x86_64")]
    Vaes256(Box<x86::Key<2>>),
    #[cfg(target_arch = "x86_64")]
    AesNi(Box<x86::Key<1>>),
    Portable(Box<portable::Key>),
    ChaCha(chacha::Key),
}

impl AeadKey {
    /// Expands `key` for `aead`. Salts are no part of it: they belong to the nonce.
    pub fn new(aead: Aead, suite: AeadSuite, key: &[u8]) -> Result<Self, KeyLengthError> {
        let wrong_length = KeyLengthError {
            suite,
            got: key.len(),
        };
        let expanded = match (aead.implementation, suite) {
            (_, suite) if key.len() != suite.key_bytes() => None,
            #[cfg(target_arch = "x86_64")]
            (Implementation::Avx512, AeadSuite::Aes128Gcm16 | AeadSuite::Aes256Gcm16) => {
                x86::Key::new(key).map(|key| Expanded::Avx512(Box::new(key)))
            }
            #[cfg(target_arch = "x86_64")]
            (Implementation::Vaes256, AeadSuite::Aes128Gcm16 | AeadSuite::Aes256Gcm16) => {
                x86::Key::new(key).map(|key| Expanded::Vaes256(Box::new(key)))
            }
            #[cfg(target_arch = "x86_64")]
            (Implementation::AesNi, AeadSuite::Aes128Gcm16 | AeadSuite::Aes256Gcm16) => {
                x86::Key::new(key).map(|key| Expanded::AesNi(Box::new(key)))
            }
            (Implementation::Portable, AeadSuite::Aes128Gcm16) => {
                portable::Key::aes128(key).map(|key| Expanded::Portable(Box::new(key)))
            }
            (Implementation::Portable, AeadSuite::Aes256Gcm16) => {
                portable::Key::aes256(key).map(|key| Expanded::Portable(Box::new(key)))
            }
            (_, AeadSuite::ChaCha20Poly1305) => chacha::Key::new(key).map(Expanded::ChaCha),
        };
        expanded
            .map(|expanded| Self { suite, expanded })
            .ok_or(wrong_length)
    }

    /// Expands the key of an SA.
    pub fn from_material(aead: Aead, material: &KeyMaterial) -> Self {
        Self::new(aead, material.suite(), material.dangerous_key())
            .expect("key material has its suite's length by construction")
    }

    /// Which AEAD it is for.
    pub fn suite(&self) -> AeadSuite {
        self.suite
    }

    /// Asks for what a short packet needs of it: call it for a batch of packets before the first of them is worked on, and
    /// after the key itself was asked for with [`fn@prefetch`], as it leads to the rest.
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
            Expanded::ChaCha(_) => {}
        }
    }

    /// How many of `jobs`, from the first on, belong to one run: vector kernels mix keys, the
    /// others take one key at a time.
    fn run_length(&self, jobs: &[Job<'_>]) -> usize {
        jobs.iter().take_while(|job| self.same_run(job.key)).count()
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
