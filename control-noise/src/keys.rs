//! The three kinds of long-lived keys and their text form: base64 of 32 bytes, as WireGuard writes
//! them, so that one key file serves both.

use base64ct::{Base64, Encoding};
use std::{fmt, str::FromStr};
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Bytes of every key here.
pub const KEY_BYTES: usize = 32;

/// A node's public name: its static X25519 public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; KEY_BYTES]);

/// A node's static X25519 private key. Wiped on drop; `Debug` prints no secret.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct StaticSecretKey([u8; KEY_BYTES]);

/// A secret that two nodes share besides their static keys, mixed into every handshake of theirs.
/// Wiped on drop; `Debug` prints no secret.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PresharedKey([u8; KEY_BYTES]);

/// Why a text or bytes are no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyTextError {
    /// Not base64, or not of 32 bytes. The text is not repeated: it may be a secret.
    #[error(
        "not a key: {got} characters that are not base64 of 32 bytes; a key has 44 characters and ends in `=`"
    )]
    Syntax {
        /// How long the text is, without the blanks around it.
        got: usize,
    },
    /// Only zeros, or another of the few points that make every shared secret the same.
    #[error(
        "a key of zeros, or a point of low order, protects nothing; make a key with `esplane keygen`"
    )]
    Weak,
}

impl PublicKey {
    /// Refuses the points of low order, with which every shared secret would be zero.
    pub fn from_bytes(bytes: [u8; KEY_BYTES]) -> Result<Self, KeyTextError> {
        let probe = x25519_dalek::StaticSecret::from([0x5a; KEY_BYTES]);
        let shared = probe.diffie_hellman(&x25519_dalek::PublicKey::from(bytes));
        if shared.was_contributory() {
            Ok(Self(bytes))
        } else {
            Err(KeyTextError::Weak)
        }
    }

    /// The 32 bytes of the point.
    pub fn as_bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

impl StaticSecretKey {
    /// Makes a key out of 32 bytes from a good random source (the operating system's).
    pub fn generate(seed: [u8; KEY_BYTES]) -> Self {
        let mut key = Self(seed);
        // RFC 7748 §5: clamped here, so that the file holds what is used, as WireGuard's does.
        key.0[0] &= 248;
        key.0[31] = (key.0[31] & 127) | 64;
        key
    }

    /// Takes a key as a file holds it. Refuses zeros.
    pub fn from_bytes(bytes: [u8; KEY_BYTES]) -> Result<Self, KeyTextError> {
        if bytes == [0; KEY_BYTES] {
            Err(KeyTextError::Weak)
        } else {
            Ok(Self(bytes))
        }
    }

    /// The public half.
    pub fn public_key(&self) -> PublicKey {
        let secret = x25519_dalek::StaticSecret::from(self.0);
        PublicKey(x25519_dalek::PublicKey::from(&secret).to_bytes())
    }

    /// The text for the key file.
    pub fn dangerous_to_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(Base64::encode_string(&self.0))
    }

    pub(crate) fn dangerous_bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

impl PresharedKey {
    /// Makes a key out of 32 bytes from a good random source (the operating system's).
    pub fn generate(seed: [u8; KEY_BYTES]) -> Self {
        Self(seed)
    }

    /// Takes a key as a file holds it. Refuses zeros: that is what "no key" means on the wire.
    pub fn from_bytes(bytes: [u8; KEY_BYTES]) -> Result<Self, KeyTextError> {
        if bytes == [0; KEY_BYTES] {
            Err(KeyTextError::Weak)
        } else {
            Ok(Self(bytes))
        }
    }

    /// The text for the key file.
    pub fn dangerous_to_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(Base64::encode_string(&self.0))
    }

    /// Whether both are the same secret, compared without early exit.
    pub fn same_secret(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }

    pub(crate) fn dangerous_bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

/// Reads base64 of 32 bytes without a secret-dependent branch.
fn decode(text: &str) -> Result<Zeroizing<[u8; KEY_BYTES]>, KeyTextError> {
    let text = text.trim();
    let mut bytes = Zeroizing::new([0; KEY_BYTES]);
    match Base64::decode(text, bytes.as_mut_slice()) {
        Ok(decoded) if decoded.len() == KEY_BYTES => Ok(bytes),
        _ => Err(KeyTextError::Syntax { got: text.len() }),
    }
}

impl FromStr for PublicKey {
    type Err = KeyTextError;
    fn from_str(text: &str) -> Result<Self, KeyTextError> {
        Self::from_bytes(*decode(text)?)
    }
}

impl FromStr for StaticSecretKey {
    type Err = KeyTextError;
    fn from_str(text: &str) -> Result<Self, KeyTextError> {
        Self::from_bytes(*decode(text)?)
    }
}

impl FromStr for PresharedKey {
    type Err = KeyTextError;
    fn from_str(text: &str) -> Result<Self, KeyTextError> {
        Self::from_bytes(*decode(text)?)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&Base64::encode_string(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for StaticSecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StaticSecretKey([redacted])")
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey([redacted])")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_form_is_wireguards() {
        // From RFC 7748 §6.1: Alice's keys.
        let secret =
            StaticSecretKey::from_str("dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=").unwrap();
        assert_eq!(
            secret.public_key().to_string(),
            "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo="
        );
        assert_eq!(
            *secret.dangerous_to_base64(),
            "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo="
        );
        let public = secret.public_key();
        assert_eq!(public.to_string().parse(), Ok(public));
        assert_eq!(
            format!("{public}\n").parse(),
            Ok(public),
            "a file ends in a newline"
        );
    }

    #[test]
    fn what_is_no_key_is_refused_and_not_repeated() {
        for text in [
            "",
            "c2VjcmV0",
            "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo",
            "no base64 at all, dear reader, not even near",
        ] {
            let error = text.parse::<StaticSecretKey>().unwrap_err();
            assert_eq!(error, KeyTextError::Syntax { got: text.len() });
            assert!(text.is_empty() || !error.to_string().contains(text));
        }
        let zeros = Base64::encode_string(&[0; 32]);
        assert_eq!(zeros.parse::<PublicKey>(), Err(KeyTextError::Weak));
        assert_eq!(
            zeros.parse::<StaticSecretKey>().unwrap_err(),
            KeyTextError::Weak
        );
        assert_eq!(
            zeros.parse::<PresharedKey>().unwrap_err(),
            KeyTextError::Weak
        );
        let mut low_order = [0; 32];
        low_order[0] = 1;
        assert_eq!(PublicKey::from_bytes(low_order), Err(KeyTextError::Weak));
    }

    #[test]
    fn debug_shows_no_secret() {
        let secret = StaticSecretKey::generate([0xab; 32]);
        let shared = PresharedKey::generate([0xcd; 32]);
        assert_eq!(
            format!("{secret:?} {shared:?}"),
            "StaticSecretKey([redacted]) PresharedKey([redacted])"
        );
    }
}
