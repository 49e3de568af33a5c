//! ChaCha20-Poly1305 over the `chacha20poly1305` crate.

use super::{ICV_BYTES, NONCE_BYTES};
use chacha20poly1305::{ChaCha20Poly1305, KeyInit, aead::AeadInOut};

/// A key; the crate wipes it on drop.
pub(super) struct Key(ChaCha20Poly1305);

impl Key {
    pub fn new(key: &[u8]) -> Option<Self> {
        ChaCha20Poly1305::new_from_slice(key).ok().map(Self)
    }

    /// Encrypts in place and writes the ICV. `false` only for sizes past 256 GiB.
    pub fn seal(
        &self,
        nonce: &[u8; NONCE_BYTES],
        aad: &[u8],
        payload: &mut [u8],
        icv: &mut [u8; ICV_BYTES],
    ) -> bool {
        self.0
            .encrypt_inout_detached(nonce.into(), aad, payload.into())
            .map(|tag| *icv = tag.into())
            .is_ok()
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
        self.0
            .decrypt_inout_detached(nonce.into(), aad, payload.into(), icv.into())
            .is_ok()
    }
}
