use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// An AEAD as ESP uses it: 16-byte ICV, 8-byte IV on the wire, 4-byte salt kept with the key.
///
/// Names are those of swanctl proposals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum AeadSuite {
    /// `aes128gcm16`: AES-GCM, 128-bit key (RFC 4106).
    Aes128Gcm16,
    /// `aes256gcm16`: AES-GCM, 256-bit key (RFC 4106).
    Aes256Gcm16,
    /// `chacha20poly1305` (RFC 7634).
    ChaCha20Poly1305,
}

impl AeadSuite {
    /// Every suite, in order of preference.
    pub const ALL: [Self; 3] = [Self::Aes128Gcm16, Self::Aes256Gcm16, Self::ChaCha20Poly1305];

    /// Bytes of key, without the salt.
    pub const fn key_bytes(self) -> usize {
        match self {
            Self::Aes128Gcm16 => 16,
            Self::Aes256Gcm16 | Self::ChaCha20Poly1305 => 32,
        }
    }

    /// Bytes of salt after the key in keying material (RFC 4106 §8.1, RFC 7634 §2).
    pub const fn salt_bytes(self) -> usize {
        4
    }

    /// Bytes of IV in each packet (RFC 4106 §3.1, RFC 7634 §2).
    pub const fn iv_bytes(self) -> usize {
        8
    }

    /// Bytes of Integrity Check Value at the end of each packet.
    pub const fn icv_bytes(self) -> usize {
        16
    }

    /// Bytes of key and salt together, as key exchanges hand them over.
    pub const fn keying_material_bytes(self) -> usize {
        self.key_bytes() + self.salt_bytes()
    }

    /// The swanctl name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Aes128Gcm16 => "aes128gcm16",
            Self::Aes256Gcm16 => "aes256gcm16",
            Self::ChaCha20Poly1305 => "chacha20poly1305",
        }
    }
}

impl fmt::Display for AeadSuite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The name of no suite that Esplane has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no AEAD suite; use aes128gcm16, aes256gcm16 or chacha20poly1305")]
pub struct SuiteError(pub String);

impl FromStr for AeadSuite {
    type Err = SuiteError;
    fn from_str(text: &str) -> Result<Self, SuiteError> {
        Self::ALL
            .into_iter()
            .find(|suite| suite.name() == text)
            .ok_or_else(|| SuiteError(text.to_owned()))
    }
}

impl TryFrom<String> for AeadSuite {
    type Error = SuiteError;
    fn try_from(text: String) -> Result<Self, SuiteError> {
        text.parse()
    }
}

impl From<AeadSuite> for String {
    fn from(suite: AeadSuite) -> String {
        suite.name().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_parses_back_and_a_wrong_one_lists_them() {
        for suite in AeadSuite::ALL {
            assert_eq!(suite.name().parse(), Ok(suite));
        }
        let error = "aes128-sha1".parse::<AeadSuite>().unwrap_err().to_string();
        assert!(
            error.contains("aes128-sha1") && error.contains("aes256gcm16"),
            "{error}"
        );
    }
}
