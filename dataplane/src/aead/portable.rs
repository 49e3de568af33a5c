//! AES-GCM on every CPU, over the `aes-gcm` crate. Where the CPU has AES instructions the crate
//! uses them; elsewhere it is constant-time in software.

use super::{ICV_BYTES, NONCE_BYTES};
use aes_gcm::{Aes128Gcm, Aes256Gcm, KeyInit, aead::AeadInOut};

/// An expanded AES key; the crate wipes it on drop.
pub(super) enum Key {
    Aes128(Aes128Gcm),
    Aes256(Aes256Gcm),
}

impl Key {
    pub fn aes128(key: &[u8]) -> Option<Self> {
        Aes128Gcm::new_from_slice(key).ok().map(Self::Aes128)
    }

    pub fn aes256(key: &[u8]) -> Option<Self> {
        Aes256Gcm::new_from_slice(key).ok().map(Self::Aes256)
    }

    /// Encrypts in place and writes the ICV. `false` only for sizes past 64 GiB.
    pub fn seal(
        &self,
        nonce: &[u8; NONCE_BYTES],
        aad: &[u8],
        payload: &mut [u8],
        icv: &mut [u8; ICV_BYTES],
    ) -> bool {
        let tag = match self {
            Self::Aes128(key) => key.encrypt_inout_detached(nonce.into(), aad, payload.into()),
            Self::Aes256(key) => key.encrypt_inout_detached(nonce.into(), aad, payload.into()),
        };
        tag.map(|tag| *icv = tag.into()).is_ok()
    }

    /// Decrypts in place if the ICV is right. The crate checks it (in constant time) before it
    /// decrypts, so the ciphertext stays as it was otherwise.
    pub fn open(
        &self,
        nonce: &[u8; NONCE_BYTES],
        aad: &[u8],
        payload: &mut [u8],
        icv: &[u8; ICV_BYTES],
    ) -> bool {
        match self {
            Self::Aes128(key) => {
                key.decrypt_inout_detached(nonce.into(), aad, payload.into(), icv.into())
            }
            Self::Aes256(key) => {
                key.decrypt_inout_detached(nonce.into(), aad, payload.into(), icv.into())
            }
        }
        .is_ok()
    }
}
