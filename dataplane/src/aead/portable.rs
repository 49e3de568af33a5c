//! All suites on every CPU, over the crates `aes-gcm` and `chacha20poly1305`. Where the CPU has AES instructions the former
//! uses them; elsewhere it is constant-time in software.

use super::{ICV_BYTES, NONCE_BYTES};
use aes_gcm::{
    Aes128Gcm, Aes256Gcm,
    aead::{AeadCore, AeadInOut, KeyInit, array::typenum},
};
use chacha20poly1305::ChaCha20Poly1305;
use esplane_api::AeadSuite;

/// An expanded key; the crates wipe it on drop.
pub(super) enum Key {
    Aes128(Aes128Gcm),
    Aes256(Aes256Gcm),
    ChaCha(ChaCha20Poly1305),
}

impl Key {
    /// `None` for a key of another length than the suite's.
    pub fn new(suite: AeadSuite, key: &[u8]) -> Option<Self> {
        match suite {
            AeadSuite::Aes128Gcm16 => Aes128Gcm::new_from_slice(key).map(Self::Aes128),
            AeadSuite::Aes256Gcm16 => Aes256Gcm::new_from_slice(key).map(Self::Aes256),
            AeadSuite::ChaCha20Poly1305 => ChaCha20Poly1305::new_from_slice(key).map(Self::ChaCha),
        }
        .ok()
    }

    /// Seals or opens one packet in place. `false` for a wrong ICV, and for more bytes than an AEAD can take: 64 GiB.
    pub fn crypt<const SEAL: bool>(
        &self,
        nonce: &[u8; NONCE_BYTES],
        aad: &[u8],
        payload: &mut [u8],
        icv: &mut [u8; ICV_BYTES],
    ) -> bool {
        match self {
            Self::Aes128(key) => crypt::<_, SEAL>(key, nonce, aad, payload, icv),
            Self::Aes256(key) => crypt::<_, SEAL>(key, nonce, aad, payload, icv),
            Self::ChaCha(key) => crypt::<_, SEAL>(key, nonce, aad, payload, icv),
        }
    }
}

/// The crates check an ICV (in constant time) before they decrypt: where it is wrong, the ciphertext stays as it was.
fn crypt<K, const SEAL: bool>(
    key: &K,
    nonce: &[u8; NONCE_BYTES],
    aad: &[u8],
    payload: &mut [u8],
    icv: &mut [u8; ICV_BYTES],
) -> bool
where
    K: AeadInOut + AeadCore<NonceSize = typenum::U12, TagSize = typenum::U16>,
{
    if SEAL {
        key.encrypt_inout_detached(nonce.into(), aad, payload.into())
            .map(|tag| *icv = tag.into())
            .is_ok()
    } else {
        key.decrypt_inout_detached(nonce.into(), aad, payload.into(), (&*icv).into())
            .is_ok()
    }
}
