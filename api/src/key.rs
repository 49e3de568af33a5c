use crate::AeadSuite;
use std::fmt;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// The secret half of an SA: AEAD key and salt. Wiped on drop; `Debug` prints no secret.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct KeyMaterial {
    #[zeroize(skip)]
    suite: AeadSuite,
    key: [u8; 32],
    salt: [u8; 4],
}

impl KeyMaterial {
    /// Takes key ‖ salt in the order RFC 4106 §8.1 and RFC 7634 §2 define: 20 bytes for AES-128,
    /// 36 for AES-256 and ChaCha20.
    ///
    /// Refuses another length, and a key of only zeros: that is what a locked-down kernel shows
    /// instead of keys, and never a negotiated one.
    pub fn new(suite: AeadSuite, key_and_salt: &[u8]) -> Result<Self, KeyError> {
        if key_and_salt.len() != suite.keying_material_bytes() {
            return Err(KeyError::Length {
                suite,
                got: key_and_salt.len(),
            });
        }
        let (key_bytes, salt_bytes) = key_and_salt.split_at(suite.key_bytes());
        if key_bytes.iter().all(|byte| *byte == 0) {
            return Err(KeyError::AllZero);
        }
        let mut material = Self {
            suite,
            key: [0; 32],
            salt: [0; 4],
        };
        material.key[..key_bytes.len()].copy_from_slice(key_bytes);
        material.salt.copy_from_slice(salt_bytes);
        Ok(material)
    }

    /// Which AEAD the key is for.
    pub fn suite(&self) -> AeadSuite {
        self.suite
    }

    /// The AEAD key, 16 or 32 bytes. Only for whoever sets up the cipher.
    pub fn dangerous_key(&self) -> &[u8] {
        &self.key[..self.suite.key_bytes()]
    }

    /// The salt: the first four bytes of every nonce (RFC 4106 §4).
    pub fn dangerous_salt(&self) -> [u8; 4] {
        self.salt
    }

    /// Whether both are the same secret, compared without early exit.
    pub fn same_secret(&self, other: &Self) -> bool {
        let difference = self
            .key
            .iter()
            .zip(&other.key)
            .fold(0, |sum, (a, b)| sum | (a ^ b))
            | self
                .salt
                .iter()
                .zip(&other.salt)
                .fold(0, |sum, (a, b)| sum | (a ^ b));
        self.suite == other.suite && difference == 0
    }
}

impl fmt::Debug for KeyMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyMaterial({}, [redacted])", self.suite)
    }
}

/// Why bytes are no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Key and salt together have a fixed length per suite.
    #[error("{suite} takes {} bytes (key {} and salt {}), got {got}",
        suite.keying_material_bytes(), suite.key_bytes(), suite.salt_bytes())]
    Length {
        /// The suite asked for.
        suite: AeadSuite,
        /// The number of bytes offered.
        got: usize,
    },
    /// What a kernel under lockdown "confidentiality" shows in place of keys.
    #[error(
        "the key is all zeros: nobody negotiates such a key; a kernel under lockdown shows zeros instead of keys"
    )]
    AllZero,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_secret() {
        let key = KeyMaterial::new(AeadSuite::Aes128Gcm16, &[0xab; 20]).unwrap();
        let shown = format!("{key:?}");
        assert_eq!(shown, "KeyMaterial(aes128gcm16, [redacted])");
    }

    #[test]
    fn a_wrong_length_is_refused_with_the_right_one() {
        let error = KeyMaterial::new(AeadSuite::Aes256Gcm16, &[1; 32])
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "aes256gcm16 takes 36 bytes (key 32 and salt 4), got 32"
        );
    }

    #[test]
    fn a_key_of_zeros_is_refused_even_with_a_salt() {
        let mut bytes = [0; 20];
        bytes[19] = 7;
        assert_eq!(
            KeyMaterial::new(AeadSuite::Aes128Gcm16, &bytes).unwrap_err(),
            KeyError::AllZero
        );
    }

    #[test]
    fn key_and_salt_are_split_as_the_rfc_says() {
        let bytes: Vec<u8> = (0..20).collect();
        let key = KeyMaterial::new(AeadSuite::Aes128Gcm16, &bytes).unwrap();
        assert_eq!(key.dangerous_key(), &bytes[..16]);
        assert_eq!(key.dangerous_salt(), [16, 17, 18, 19]);
        let other = KeyMaterial::new(AeadSuite::Aes128Gcm16, &[9; 20]).unwrap();
        assert!(key.same_secret(&key.clone()) && !key.same_secret(&other));
    }
}
